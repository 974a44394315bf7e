"""Paths of a run's data: absolute in a saved recipe, and a digest by which changed data are noticed.

A recipe may name files by paths relative to the working directory of `m6rec`. In the recipe that is saved with the
weights they are absolute.
"""

import copy
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas

from ..data.log import Log

SETTINGS = (
    ("data", "interactions"),
    ("data", "items"),
    ("data", "users"),
    ("data", "directory"),
    ("data", "knowledge"),
    ("data", "knowledge_links"),
    ("data", "knowledge_names"),
    ("model", "checkpoint"),
    ("model", "backbone"),
    ("pretraining", "texts"),
    ("distillation", "teacher"),
    ("task", "dialogues"),
    ("task", "replay"),
)
"""Section and key of a run's inputs. A value need not be a file: it may be a Hub id or the source `items`."""
ITEMS = "items"
"""Name in `pretraining.texts` of the texts of the log's items."""


def located(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the sections of a recipe with the paths of all files and folders that exist here made absolute."""
    found = copy.deepcopy(tree)
    for section, key in SETTINGS:
        if key in found.get(section, {}):
            found[section][key] = _each(found[section][key], _absolute)
    return found


def missing(tree: dict[str, Any]) -> dict[str, str]:
    """Return the settings of a saved recipe that hold an absolute path that does not exist: setting -> path."""
    found: dict[str, str] = {}
    for section, key in SETTINGS:
        if section in ("data", "task"):  # the run's folder holds the results of the other sections

            def note(name: str, setting: str = f"{section}.{key}") -> str:
                if Path(name).is_absolute() and _path(name) is None:
                    found.setdefault(setting, name)
                return name

            _each((tree.get(section) or {}).get(key), note)
    return found


def log_digest(log: Log) -> str:
    """Return a digest of all events, items and users of a log."""
    digest = hashlib.sha256()
    for frame in (log.interactions, log.items.reset_index(), None if log.users is None else log.users.reset_index()):
        if frame is not None:
            plain = frame.astype({name: str for name, kind in frame.dtypes.items() if kind.name == "category"})
            digest.update(repr(list(plain.columns)).encode())
            digest.update(pandas.util.hash_pandas_object(plain, index=False).to_numpy().tobytes())
    return digest.hexdigest()[:32]


def _each(value: Any, change: Callable[[str], str]) -> Any:
    """Apply `change` to each name of a setting: a text, the entries of a list, or the keys of a mapping."""
    if isinstance(value, list):
        return [change(name) for name in value]
    if isinstance(value, dict):
        return {change(name): weight for name, weight in value.items()}
    return change(value) if isinstance(value, str) else value


def _absolute(name: str) -> str:
    path = _path(name)
    return name if path is None or path.is_absolute() or name == ITEMS else str(Path.cwd() / name)


def _path(name: str) -> Path | None:
    """Find the file or folder of a name, which may be `table.csv#column`, `folder:split` or a pattern."""
    for candidate in (name, name.partition("#")[0], name.partition(":")[0]):
        path = Path(candidate).expanduser()
        if candidate and path.exists():
            return path
    path = Path(name.partition("#")[0]).expanduser()
    has_pattern = any(character in name for character in "*?[")
    return path if has_pattern and any(Path(path.anchor).glob(str(path.relative_to(path.anchor)))) else None


__all__ = ["located", "log_digest", "missing"]
