"""Spaces that show a published model: the demo with a server, and the page that needs none.

m6rec push runs/films org/films --demo
m6rec push runs/films org/films --web
"""

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from ...model_cards import find_secrets
from ..demo import event
from .check import own_secrets

DEMO = Path(event.__file__).parent
CODE = "m6rec_demo"
"""Folder of the demo's code in a Space."""
PORT = 7860
"""Port that a Space serves."""
REQUIREMENTS = (
    "--extra-index-url https://download.pytorch.org/whl/cpu",
    "torch>=2.10.0",
    "transformers>=5.18.0,<5.25",
    "safetensors>=0.8.0",
    "numpy>=2.3.0",
    "pyarrow>=21.0.0",
    "Jinja2>=3.1.2",
    "fastapi>=0.115.0",
    "uvicorn>=0.37.0",
)
"""What the model's code and the demo's code import; `tests/train/publishing/test_space.py` compares with setup.cfg."""
CARD = """---
title: {title}
emoji: 🎬
colorFrom: blue
colorTo: green
sdk: docker
app_port: {port}
models:
  - {name}
short_description: Recommendations from text, with reasons
---

# {title}

A demo of [{name}](https://huggingface.co/{name}): pick or type a history, compare two readings of it, see what each
event contributed, invent a product and watch it enter.

选择或输入历史，比较两种解读，查看每个事件的贡献，虚构一件商品并看它上榜。

It was made by `m6rec push MODEL NAME --demo`. A visitor's history stays in their tab; the Space keeps none.
"""
PAGE_CARD = """---
title: {title}
emoji: 🎬
colorFrom: blue
colorTo: green
sdk: static
app_file: index.html
models:
  - {name}
short_description: Recommendations computed in your browser
---

# {title}

[{name}](https://huggingface.co/{name}) in a browser tab: model and catalogue are downloaded once, and everything is
computed in the tab. 模型与商品目录只下载一次，全部计算在浏览器中完成。

It was made by `m6rec push MODEL NAME --web`. Nothing that a visitor does leaves the tab.
"""
OF_PAGE = ("m6rec/", "model/", "vendor/")
"""Folders of a page, of which an earlier push may have left files."""
DOCKERFILE = """FROM python:3.12-slim
RUN useradd --create-home --uid 1000 user
USER user
ENV HOME=/home/user PATH=/home/user/.local/bin:$PATH PYTHONUNBUFFERED=1
WORKDIR /home/user/app
COPY --chown=user requirements.txt .
RUN pip install --no-cache-dir --user -r requirements.txt
COPY --chown=user . .
{fetch}EXPOSE {port}
CMD ["python", "app.py"]
"""
FETCH = "RUN python app.py --fetch\n"
"""Downloads a public model while the Space is built, so that it wakes fast."""
APP = '''"""Starts the demo: python app.py. With --fetch the model is downloaded only."""

import json
import os
import sys
from pathlib import Path

SETTINGS = json.loads(Path(__file__).with_name("settings.json").read_text(encoding="utf-8"))


def main() -> None:
    """Download the model, or show it."""
    if "--fetch" in sys.argv:
        from huggingface_hub import snapshot_download

        snapshot_download(SETTINGS["model"])
        return
    import uvicorn
    from transformers import pipeline

    from m6rec_demo.answers import Demo
    from m6rec_demo.server import KEEP_ALIVE, make_app

    recommend = pipeline("recommendation", model=SETTINGS["model"], trust_remote_code=True, device="cpu")
    app = make_app(Demo(recommend, SETTINGS["event"], SETTINGS["model"]))
    options = {"access_log": False, "timeout_keep_alive": KEEP_ALIVE}
    uvicorn.run(app, host="0.0.0.0", port=int(os.environ.get("PORT", SETTINGS["port"])), **options)


if __name__ == "__main__":
    main()
'''


def space_files(folder: Path, name: str, private: bool = False) -> dict[str, str]:
    """Return the files of the Space that shows a model: path -> text.

    Args:
        folder: The model's folder, whose card says which event a click stands for.
        name: The model's name on the Hub.
        private: The model can be read with a token only, so that it is downloaded when the Space starts.
    """
    settings = {"model": name, "event": event.click_event(folder), "port": PORT}
    files = {
        "README.md": CARD.format(title=name.partition("/")[2], name=name, port=PORT),
        "Dockerfile": DOCKERFILE.format(fetch="" if private else FETCH, port=PORT),
        "requirements.txt": "\n".join(REQUIREMENTS) + "\n",
        "app.py": APP,
        "settings.json": json.dumps(settings, ensure_ascii=False, indent=2) + "\n",
    }
    paths = [DEMO / "__init__.py", DEMO / "answers.py", DEMO / "server.py", *sorted((DEMO / "page").iterdir())]
    return files | {f"{CODE}/{path.relative_to(DEMO).as_posix()}": path.read_text(encoding="utf-8") for path in paths}


def push_demo(
    folder: str | Path, name: str, say: Callable[[str], object], private: bool, dry_run: bool, token: str | None
) -> None:
    """Publish the Space `NAME-demo`, which shows a model, in one commit.

    Args:
        folder: The model's folder.
        name: The model's name on the Hub, `org/name`.
        say: Prints a line.
        private: Make a Space that only its owners see; it needs a secret HF_TOKEN that may read the model.
        dry_run: Write the files into a temporary folder only.
        token: Token of the Hub. None: the one of `hf auth login` or HF_TOKEN.

    Raises:
        OSError: The Hub refuses the commit, or cannot be reached.
    """
    space, files = f"{name}-demo", space_files(Path(folder), name, private)
    if dry_run:
        say(
            f"the files of the Space {space} lie in {write_space(files, Path(tempfile.mkdtemp(prefix='m6rec-space-')))}"
        )
        return
    url = _send(HfApi(token=token), space, files, private, "docker", (f"{CODE}/",))
    say(f"the demo is published as {url}")
    if private:
        say(f"give {space} a secret HF_TOKEN that may read {name}, in its settings")


def page_files(write: Callable[[Path], object], name: str, place: Path) -> dict[str, str | Path]:
    """Write the page of a model, and return the files of its Space: path -> file, or its text.

    Args:
        write: Writes the page into a folder.
        name: The model's name on the Hub.
        place: The folder.

    Raises:
        ValueError: A text of the catalogue holds a secret.
    """
    write(place)
    known = [*own_secrets()]
    for path in (place / "model").glob("*.json"):
        if found := find_secrets(path.read_text(encoding="utf-8"), known):
            raise ValueError(f"{path.name} of the page holds {', '.join(found)}: remove it from the catalogue's items")
    files: dict[str, str | Path] = {"README.md": PAGE_CARD.format(title=name.partition("/")[2], name=name)}
    return files | {path.relative_to(place).as_posix(): path for path in place.rglob("*") if path.is_file()}


def push_page(
    write: Callable[[Path], object],
    name: str,
    say: Callable[[str], object],
    *,
    private: bool = False,
    dry_run: bool = False,
    token: str | None = None,
) -> None:
    """Publish the static Space `NAME-web`, the page that recommends in a browser, in one commit.

    Args:
        write: Writes the page into a folder.
        name: The model's name on the Hub, `org/name`.
        say: Prints a line.
        private: Make a Space that only its owners see.
        dry_run: Write the files into a temporary folder only.
        token: Token of the Hub. None: the one of `hf auth login` or HF_TOKEN.

    Raises:
        ValueError: A text of the catalogue holds a secret.
        OSError: The Hub refuses the commit, or cannot be reached.
    """
    space = f"{name}-web"
    if dry_run:
        place = Path(tempfile.mkdtemp(prefix="m6rec-space-"))
        card = page_files(write, name, place)["README.md"]
        (place / "README.md").write_text(str(card), encoding="utf-8", newline="\n")
        say(f"the files of the Space {space} lie in {place}")
        return
    with tempfile.TemporaryDirectory() as scratch:
        files = page_files(write, name, Path(scratch) / "page")
        url = _send(HfApi(token=token), space, files, private, "static", OF_PAGE)
    say(f"the page is published as {url}")


def write_space(files: dict[str, str], folder: Path) -> Path:
    """Write the files of a Space into a folder, and return it."""
    for file, text in files.items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
    return folder


def _send(
    api: HfApi, space: str, files: Mapping[str, str | Path], private: bool, sdk: str, replaced: tuple[str, ...]
) -> str:
    """Commit the files of a Space, remove files of an earlier push below the folders `replaced`, and return its URL."""
    kind: Any = {"repo_type": "space"}
    try:
        api.create_repo(space, private=private or None, exist_ok=True, space_sdk=sdk, **kind)
        there = api.list_repo_files(space, **kind)
        gone = [file for file in there if file.startswith(replaced) and file not in files]
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(file, own.encode() if isinstance(own, str) else own) for file, own in files.items()),
            *map(CommitOperationDelete, gone),
        ]
        api.create_commit(space, operations, commit_message="Publish with m6rec", **kind)
    except HfHubHTTPError:
        raise
    except HTTPError as error:
        raise OSError(f"the Hub ({constants.ENDPOINT}) cannot be reached: {error}; repeat the push later") from error
    return f"{constants.ENDPOINT}/spaces/{space}"


__all__ = ["page_files", "push_demo", "push_page", "space_files", "write_space"]
