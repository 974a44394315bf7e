"""The Space of a model is complete: its code runs without the package, and shows what the model on the Hub answers."""

import json
import os
import re
import runpy
import subprocess
import sys
import time
import urllib.request
from functools import partial
from pathlib import Path

import pytest
import uvicorn
import yaml

from m6rec import Evidence
from m6rec.train.answering.loading import load_pipeline
from m6rec.train.cli import main
from m6rec.train.commands.export import export
from m6rec.train.demo.command import load_demo
from m6rec.train.publishing.push import push
from m6rec.train.publishing.space import CODE, REQUIREMENTS, push_demo, push_page, space_files, write_space
from tests.modeling_m6rec.test_hub import WITHOUT_PACKAGE
from tests.quickstart_model import quickstart_folder  # noqa: F401 - a fixture
from tests.test_repository import ROOT
from tests.train.publishing.test_push import hub, quiet  # noqa: F401 - a fixture

PAGE = {f"{CODE}/page/{name}" for name in ("app.js", "base.css", "index.html", "style.css", "texts.js", "view.js")}
FILES = {"README.md", "Dockerfile", "requirements.txt", "app.py", "settings.json", *PAGE}
FILES |= {f"{CODE}/{name}" for name in ("__init__.py", "answers.py", "server.py")}


@pytest.fixture
def films(quickstart_folder):  # noqa: F811
    folder = Path("m6rec-ml100k").resolve()
    example = {"history": [{"event": "rate", "rating": 5, "item": {"title": "Star Wars"}}], "candidates": ["x"]}
    (folder / "card.json").write_text(json.dumps({"example": example}))
    return folder


def test_its_metadata_name_the_model(films):
    files = space_files(films, "org/films")
    assert files.keys() == FILES
    head = yaml.safe_load(files["README.md"].split("---\n")[1])
    assert head["sdk"] == "docker" and head["models"] == ["org/films"] and head["title"] == "films"
    assert len(head["short_description"]) <= 60 and {head["colorFrom"], head["colorTo"]} <= {"blue", "green"}
    settings = json.loads(files["settings.json"])
    assert settings == {"model": "org/films", "event": {"event": "rate", "rating": 5}, "port": head["app_port"]}
    assert f"EXPOSE {head['app_port']}\n" in files["Dockerfile"] and "app.py --fetch" in files["Dockerfile"]
    assert "--fetch" not in space_files(films, "org/films", private=True)["Dockerfile"]


def test_its_code_imports_nothing_of_the_package(films):
    for name, text in space_files(films, "org/films").items():
        if name.endswith(".py"):
            assert not re.search(r"^\s*(from|import) (m6rec\b|\.\.)", text, re.M), name


def test_its_requirements_are_those_of_the_package():
    wanted = {line.strip() for line in (ROOT / "setup.cfg").read_text().splitlines()}
    assert {line for line in REQUIREMENTS if not line.startswith("--")} <= wanted


def test_pushed_and_listed(films, hub, capsys):  # noqa: F811
    assert main(["push", str(films), "org/films", "--demo", "--dry-run"]) == 0
    said = capsys.readouterr().out
    written = Path(re.search(r"files of the Space org/films-demo lie in (.*)", said)[1])
    assert {path.relative_to(written).as_posix() for path in written.rglob("*") if path.is_file()} == FILES
    assert not hub.repositories
    assert main(["push", str(films), "org/films", "--demo"]) == 0
    assert f"the demo is published as {hub.url}/spaces/org/films-demo" in capsys.readouterr().out
    files = hub.files("org/films-demo")
    assert files.keys() - {".gitattributes"} == FILES and "config.json" in hub.files("org/films")
    assert {name: files[name].decode() for name in FILES} == space_files(films, "org/films")
    branch = hub.repositories["org/films-demo"]
    kept = {**branch.files("main"), f"{CODE}/old.py": hub.keep(b"", False), "notes.md": hub.keep(b"", False)}
    branch.commit("main", kept)
    push_demo(films, "org/films", quiet, False, False, None)
    assert hub.files("org/films-demo").keys() - {".gitattributes"} == FILES | {"notes.md"}


def test_a_private_space_asks_for_a_secret(films, hub):  # noqa: F811
    said = []
    push_demo(films, "org/films", said.append, True, False, None)
    assert hub.repositories["org/films-demo"].private and "secret HF_TOKEN" in said[-1]


def test_its_program_serves_the_model(films, tmp_path, monkeypatch):
    space = write_space(space_files(films, "org/films"), tmp_path / "space")
    settings = json.loads((space / "settings.json").read_text()) | {"model": str(films)}
    (space / "settings.json").write_text(json.dumps(settings))
    served = []
    monkeypatch.setattr(uvicorn, "run", lambda app, **options: served.append((app, options)))
    monkeypatch.syspath_prepend(str(space))
    monkeypatch.setattr(sys, "argv", ["app.py"])
    monkeypatch.delenv("PORT", raising=False)
    runpy.run_path(str(space / "app.py"), run_name="__main__")
    ((app, options),) = served
    assert options["port"] == 7860 and options["host"] == "0.0.0.0" and app.title == "m6rec demo"
    for name in [name for name in sys.modules if name.partition(".")[0] == CODE]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.slow
def test_it_runs_without_the_package(films, hub, tmp_path):  # noqa: F811
    """It is awake once it answers, and shows the lists that `m6rec demo` shows of the same folder."""
    push(films, "org/films", quiet)
    space = write_space(space_files(films, "org/films"), tmp_path / "space")
    code = (
        "import runpy, sys\n"
        + WITHOUT_PACKAGE
        + "sys.path.insert(0, '.')\nrunpy.run_path('app.py', run_name='__main__')\n"
    )
    port = "7864"
    env = {**os.environ, **hub.environment(tmp_path / "home"), "OMP_NUM_THREADS": "1", "PORT": port}
    env.pop("PYTHONPATH", None)
    fetched = subprocess.run(
        [sys.executable, "-c", code, "--fetch"], check=False, capture_output=True, text=True, env=env, cwd=space
    )
    assert fetched.returncode == 0, fetched.stderr[-3000:]
    asked = len(hub.log)
    state = {"history": [{"item_id": "50"}], "products": ["Moon Harbour"], "weights": [0.0, 1.0]}
    with open(tmp_path / "log", "w+") as log:
        running = subprocess.Popen([sys.executable, "-c", code], stdout=log, stderr=log, env=env, cwd=space)
        try:
            found = _ask(f"http://127.0.0.1:{port}/api/lists", state, running, log)
            page = urllib.request.urlopen(f"http://127.0.0.1:{port}/").read()
        finally:
            running.terminate()
            running.wait(60)
    expected = load_demo(str(films)).lists(state)
    for own in (*found["readings"], *expected["readings"]):
        own.pop("ms")
    assert found == expected and b"<title>m6rec</title>" in page
    sent = [path for _, path in hub.log[asked:] if path.endswith("model.safetensors") and "/resolve/" in path]
    assert len(sent) <= 1  # a question whether it is still the same, no download


def _ask(address, state, running, log):
    """Return the answer as soon as there is one."""
    end = time.monotonic() + 300
    while time.monotonic() < end:
        request = urllib.request.Request(address, json.dumps(state).encode())
        try:
            return json.load(urllib.request.urlopen(request))
        except OSError:
            log.seek(0)
            assert running.poll() is None, log.read()
            time.sleep(0.2)
    raise AssertionError("no answer in five minutes")


@pytest.fixture
def counted(films):
    """The films with a catalogue that ranks by evidence alone, whose page has no graphs."""
    recommend = load_pipeline(str(films))
    recommend.catalogue.set_evidence(Evidence(learnt=0), recommend.processor)
    recommend.catalogue.observe([{"user_id": "secret-ann", "item_id": item} for item in ("50", "172")])
    recommend.catalogue.save(films / "catalogue")
    return films


def test_a_page_is_pushed_as_a_static_space(counted, hub, capsys):  # noqa: F811
    assert main(["push", str(counted), "org/films", "--web", "--dry-run"]) == 0
    written = Path(re.search(r"files of the Space org/films-web lie in (.*)", capsys.readouterr().out)[1])
    names = {path.relative_to(written).as_posix() for path in written.rglob("*") if path.is_file()}
    assert {"index.html", "app.js", "m6rec/recommender.js", "model/manifest.json", "model/evidence.bin"} < names
    head = yaml.safe_load((written / "README.md").read_text().split("---\n")[1])
    assert head["sdk"] == "static" and head["app_file"] == "index.html" and head["models"] == ["org/films"]
    assert len(head["short_description"]) <= 60 and not hub.repositories
    assert main(["push", str(counted), "org/films", "--web"]) == 0
    assert f"the page is published as {hub.url}/spaces/org/films-web" in capsys.readouterr().out
    files = hub.files("org/films-web")
    assert files.keys() - {".gitattributes"} == names and "config.json" in hub.files("org/films")
    assert files == {**files, **{name: (written / name).read_bytes() for name in names}}
    assert not any(b"secret-ann" in content for content in files.values())
    space = hub.repositories["org/films-web"]
    old = {name: hub.keep(b"", False) for name in ("vendor/ort.wasm.min.mjs", "notes.md")}
    space.commit("main", {**space.files("main"), **old})
    push_page(partial(export, str(counted), target="web"), "org/films", quiet)
    assert hub.files("org/films-web").keys() - {".gitattributes"} == names | {"notes.md"}


def test_a_page_with_a_secret_is_not_pushed(films, hub):  # noqa: F811
    recommend = load_pipeline(str(films))
    recommend.catalogue.set_evidence(Evidence(learnt=0), recommend.processor)
    recommend.catalogue.add([{"item_id": "9", "title": "hf_" + "aB3" * 12}], recommend.model, recommend.processor)
    recommend.catalogue.save(films / "catalogue")
    with pytest.raises(ValueError, match=r"items\.json of the page holds .*: remove it"):
        push_page(partial(export, str(films), target="web"), "org/films", quiet)
    assert not hub.repositories
