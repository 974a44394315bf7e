"""A Hub on this machine, in memory: enough of its HTTP interface to create, push and list models and Spaces, and to
download models.

Processes reach it by `HF_ENDPOINT`, with `HF_HUB_DISABLE_XET=1`; this process by `use(hub, monkeypatch)`.
"""

import base64
import hashlib
import inspect
import json
import re
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import huggingface_hub
import transformers
import yaml

LARGE = (".safetensors", ".parquet", ".png")
"""Files that go through LFS, as on the Hub."""
LICENCES = {"apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc0-1.0", "openrail", "other"}
"""Some of the licences that the Hub knows."""
TASKS = {
    "text-generation",
    "text-ranking",
    "feature-extraction",
    "sentence-similarity",
    "fill-mask",
    "tabular-regression",
}
"""Some of the tasks that the Hub knows; recommendation is none."""
NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass
class Repository:
    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, str]] = field(default_factory=dict)
    """Commit -> path -> the digest of its content."""

    def commit(self, branch: str, files: dict[str, str]) -> str:
        parent = self.branches.get(branch, "")
        name = hashlib.sha1(json.dumps([parent, len(self.commits), files]).encode()).hexdigest()
        self.commits[name], self.branches[branch] = files, name
        return name

    def files(self, revision: str) -> dict[str, str] | None:
        return self.commits.get(self.branches.get(revision, revision))


class MiniHub:
    """The server, as a context manager. `before(method, path)` is called as each request comes in."""

    def __init__(self, before: Callable[[str, str], object] | None = None) -> None:
        self.before = before or (lambda method, path: None)
        self.repositories: dict[str, Repository] = {}
        self.contents: dict[str, bytes] = {}
        self.log: list[tuple[str, str]] = []
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *given: Handler(self, *given))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "MiniHub":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a repository."""
        return {path: self.contents[digest] for path, digest in self.repositories[name].files(revision).items()}

    def environment(self, home: object) -> dict[str, str]:
        """What a process needs in its environment to use this Hub and no other."""
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": "hub-of-the-tests", "HF_HUB_OFFLINE": "0"}
        return {**own, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*"}

    def keep(self, content: bytes, large: bool) -> str:
        blob = content if large else b"blob %d\0" % len(content) + content
        digest = (hashlib.sha256 if large else hashlib.sha1)(blob).hexdigest()
        self.contents[digest] = content
        return digest


def use(hub: MiniHub, monkeypatch: object) -> None:
    """Let this process use the Hub: its constants are read when huggingface_hub is imported."""
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    constants = {"ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": template}
    for name, value in {**constants, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    # Clients that live as long as the process keep the Hub that they were made with: that behind functions such as
    # file_exists, and the one that Transformers makes when it first asks.
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    if "https://huggingface.co" in inspect.getsource(huggingface_hub.RepoCard.validate):  # before huggingface_hub 2
        posted = huggingface_hub.repocard.get_session().post
        client = types.SimpleNamespace(
            post=lambda url, **more: posted(url.replace("https://huggingface.co", hub.url), **more)
        )
        monkeypatch.setattr(huggingface_hub.repocard, "get_session", lambda: client)
    monkeypatch.setenv("HF_TOKEN", "hub-of-the-tests")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: MiniHub, *given: object) -> None:
        self.hub = hub
        super().__init__(*given)

    def log_message(self, *given: object) -> None:
        """Say nothing."""

    def _answer(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self._body()
        self.hub.log.append((self.command, path))
        self.hub.before(self.command, path)
        for pattern, answer in ROUTES:
            if match := re.fullmatch(pattern, path):
                answer(self, body, **match.groupdict())
                return
        self._refuse("EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, content: object, status: int = 200, **headers: object) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(data), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _refuse(self, code: str, status: int = 404, **headers: object) -> None:
        self._send({"error": code}, status, X_Error_Code=code, X_Error_Message=code, **headers)

    def _repository(self, name: str) -> Repository | None:
        found = self.hub.repositories.get(name)
        if found is None or (found.private and "authorization" not in self.headers):
            self._refuse("RepoNotFound")
            return None
        return found

    # -------------------------------------------------------------------------------------------------------- accounts

    def who(self, body: bytes) -> None:
        self._send({"type": "user", "name": "org", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def check_card(self, body: bytes) -> None:
        errors = [{"message": message} for message in card_errors(json.loads(body)["content"])]
        self._send({"errors": errors, "warnings": []}, 400 if errors else 200)

    def create(self, body: bytes) -> None:
        given = json.loads(body)
        name = f"{given.get('organization') or 'org'}/{given['name']}"
        with self.hub.lock:
            if there := name in self.hub.repositories:
                self._send({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409)
            else:
                repository = self.hub.repositories[name] = Repository(
                    given.get("visibility") == "private" or given.get("private") or False
                )
                repository.commit("main", {".gitattributes": self.hub.keep(b"", large=False)})
        if not there:
            self._send({"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    # ---------------------------------------------------------------------------------------------------- repositories

    def info(self, body: bytes, name: str, revision: str | None) -> None:
        if (repository := self._repository(name)) is None:
            return
        commit = repository.branches.get(revision or "main", revision)
        if commit not in repository.commits:
            self._refuse("RevisionNotFound")
            return
        files = [{"rfilename": path} for path in repository.commits[commit]]
        about = {"_id": name, "id": name, "modelId": name, "sha": commit, "private": repository.private}
        self._send(
            {**about, "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": [], "siblings": files}
        )

    def tree(self, body: bytes, name: str, revision: str, folder: str | None) -> None:
        if (repository := self._repository(name)) is None:
            return
        if (files := repository.files(revision)) is None:
            self._refuse("RevisionNotFound")
            return
        inside = {path: digest for path, digest in files.items() if path.startswith(folder or "")}
        if not inside:
            self._refuse("EntryNotFound")
            return
        self._send([self._entry(path, digest) for path, digest in inside.items()])

    def some(self, body: bytes, name: str, revision: str) -> None:
        asked = [value for value in re.split(r"&?paths=", unquote(body.decode())) if value]
        asked = json.loads(body)["paths"] if body[:1] == b"{" else asked
        if (repository := self._repository(name)) is not None:
            files = repository.files(revision) or {}
            self._send([self._entry(path, files[path]) for path in asked if path in files])

    def _entry(self, path: str, digest: str) -> dict[str, object]:
        size = len(self.hub.contents[digest])
        large = {"lfs": {"oid": digest, "size": size, "pointerSize": 130}} if path.endswith(LARGE) else {}
        return {"type": "file", "path": path, "size": size, "oid": digest, **large}

    def branch(self, body: bytes, name: str, revision: str) -> None:
        if (repository := self._repository(name)) is None:
            return
        if revision in repository.branches:
            self._send({"error": "Reference already exists"}, 409)
            return
        repository.branches[revision] = repository.branches["main"]
        self._send({})

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        if (repository := self._repository(name)) is None:
            return
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            self._refuse("RevisionNotFound")
        elif path not in repository.commits[commit]:
            self._refuse("EntryNotFound", X_Repo_Commit=commit)
        else:
            digest = repository.commits[commit][path]
            content = self.hub.contents[digest]
            self._send(content, X_Repo_Commit=commit, ETag=f'"{digest}"', Content_Length=len(content))

    # ---------------------------------------------------------------------------------------------------------- upload

    def modes(self, body: bytes, name: str, revision: str) -> None:
        if (repository := self._repository(name)) is None:
            return
        files = repository.files(revision) or {}
        asked = [entry["path"] for entry in json.loads(body)["files"]]
        answers = [
            {"path": path, "uploadMode": "lfs" if path.endswith(LARGE) else "regular", "oid": files.get(path)}
            for path in asked
        ]
        self._send({"files": [{**answer, "shouldIgnore": False} for answer in answers]})

    def offer(self, body: bytes, name: str) -> None:
        objects = []
        for entry in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/large/{entry['oid']}", "header": {}}}
            there = {} if entry["oid"] in self.hub.contents else {"actions": upload}
            objects.append({"oid": entry["oid"], "size": entry["size"], **there})
        self._send({"transfer": "basic", "objects": objects})

    def put(self, body: bytes, digest: str) -> None:
        if hashlib.sha256(body).hexdigest() != digest:
            self._refuse("BadDigest", 400)
            return
        self.hub.contents[digest] = body
        self._send(b"")

    def commit(self, body: bytes, name: str, revision: str) -> None:
        if (repository := self._repository(name)) is None:
            return
        with self.hub.lock:
            files = dict(repository.files(revision) or {})
            for line in body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    files[value["path"]] = self.hub.keep(base64.b64decode(value["content"]), large=False)
                elif entry["key"] == "lfsFile":
                    files[value["path"]] = value["oid"]
                elif entry["key"] == "deletedFile":
                    del files[value["path"]]
            done = repository.commit(revision, files)
        self._send({"success": True, "commitOid": done, "commitUrl": f"{self.hub.url}/{name}/commit/{done}"})


MODEL = r"/api/(?:models|spaces)/(?P<name>[^/]+/[^/]+)"
ROUTES: list[tuple[str, Callable[..., None]]] = [
    (r"/api/whoami-v2", Handler.who),
    (r"/api/validate-yaml", Handler.check_card),
    (r"/api/repos/create", Handler.create),
    (rf"{MODEL}(?:/revision/(?P<revision>.+))?", Handler.info),
    (rf"{MODEL}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", Handler.tree),
    (rf"{MODEL}/paths-info/(?P<revision>.+)", Handler.some),
    (rf"{MODEL}/branch/(?P<revision>.+)", Handler.branch),
    (rf"{MODEL}/preupload/(?P<revision>.+)", Handler.modes),
    (rf"{MODEL}/commit/(?P<revision>.+)", Handler.commit),
    (r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", Handler.offer),
    (r"/large/(?P<digest>[0-9a-f]{64})", Handler.put),
    (r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
]


# ------------------------------------------------------------------------------------------------- what a card may say


def card_errors(card: str) -> list[str]:
    """What the Hub's specification (hub-docs, modelcard.md) and its own checks forbid in the head of a model's card."""
    head = re.match(r"---\n(.*?\n)---\n", card, re.DOTALL)
    if not head:
        return []
    data = yaml.safe_load(head[1])
    if not isinstance(data, dict):
        return ["the metadata are no mapping"]
    found = [f'"{name}" is empty' for name, value in data.items() if value is None or value in ([], {})]
    for name in ("language", "license", "library_name", "tags", "datasets", "metrics", "base_model"):
        values = data.get(name, [])
        if not all(isinstance(value, str) and value for value in (values if isinstance(values, list) else [values])):
            found.append(f'"{name}" must be a string or a list of strings')
    if "license" in data and data["license"] not in LICENCES:
        found.append(f'"license" must be one of {sorted(LICENCES)}')
    for name in ("datasets", "base_model"):
        values = data.get(name, [])
        for value in values if isinstance(values, list) else [values]:
            if not NAME.fullmatch(str(value)):
                found.append(f'"{name}": {value!r} is no id of the Hub')
    languages = data.get("language", [])
    if not all(re.fullmatch(r"[a-z]{2,3}|multilingual", value) for value in languages):
        found.append(f'"language": {languages} are no ISO 639 codes')
    if data.get("pipeline_tag", "text-generation") not in TASKS:
        found.append(f'"pipeline_tag" must be one of {sorted(TASKS)}')
    if data.get("base_model_relation", "finetune") not in ("finetune", "adapter", "merge", "quantized"):
        found.append('"base_model_relation" must be one of finetune, adapter, merge, quantized')
    if not all(isinstance(entry, dict) and isinstance(entry.get("text"), str) for entry in data.get("widget", [])):
        found.append('"widget" must be a list of examples with a "text"')
    for number, index in enumerate(data.get("model-index", [])):
        found += _index_errors(index, f"model-index[{number}]")
    return found


def _index_errors(index: dict, place: str) -> list[str]:
    found = [] if isinstance(index.get("name"), str) else [f'"{place}.name" is required']
    for number, result in enumerate(index.get("results") or [{}]):
        own = f"{place}.results[{number}]"
        needed = [("task", "type"), ("dataset", "type"), ("dataset", "name")]
        found += [f'"{own}.{a}.{b}" is required' for a, b in needed if not isinstance(result.get(a, {}).get(b), str)]
        for metric in result.get("metrics") or [{}]:
            if not isinstance(metric.get("type"), str) or isinstance(metric.get("value"), (bool, type(None))):
                found.append(f'"{own}.metrics" need a type and a value')
    return found
