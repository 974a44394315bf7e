"""Rules of the house that a machine can check."""

import ast
import doctest
import functools
import importlib
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("modeling_m6rec", "tokenization", "train", "model_cards")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
TRAVELLING = [path for path in FILES if path.stem.endswith("_m6rec")]
MODULES = sorted(
    ".".join(["m6rec", *path.relative_to(ROOT).with_suffix("").parts]).replace("m6rec.modeling_m6rec", "m6rec")
    for path in FILES
    if path.name != "__init__.py"
)
LONG_BY_NATURE = {"M6RecForRecommendation.forward", "M6RecModel.forward"}
"""One line in the signature and one in the docstring for each input."""


@functools.cache
def parsed(path: Path) -> ast.Module:
    """Return the tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", MODULES)
def test_doctests_and_exports(name):
    module = importlib.import_module(name)
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    assert doctest.testmod(module, optionflags=flags).failed == 0
    assert [entry for entry in getattr(module, "__all__", ()) if not hasattr(module, entry)] == []


@pytest.mark.parametrize("path", TRAVELLING, ids=lambda path: path.name)
def test_files_that_travel_import_only_siblings(path):
    """transformers copies flat files and follows `from .sibling import name` only."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] != "m6rec", node.lineno
            assert node.level <= 1 and not (node.level == 1 and (not node.module or "." in node.module)), node.lineno
        if isinstance(node, ast.Import):
            assert all(entry.name.split(".")[0] != "m6rec" for entry in node.names), node.lineno


FLOORS = (
    ("values", "atomic"),
    ("configuration", "tokenization", "formatting"),
    ("layout", "processing"),
    ("layers", "losses", "item_features"),
    ("segment_cache", "trie"),
    ("network", "catalogue"),
    ("ranking", "writing"),
    ("pipeline",),
    ("modeling",),
)
"""Travelling files from the ground up: each imports only files below it, and those on its floor to its left."""
TEXT = {"tokenization", "formatting", "processing"}
"""Travelling files about text. They know nothing of the model, and the model knows nothing of them: the pipeline and
the catalogue hold a processor and a model without their classes. The model imports the pipeline to take it along."""
SHARED = {"values", "atomic"}


def test_travelling_files_are_few_and_import_only_lower_ones():
    order = [name for floor in FLOORS for name in floor]
    assert sorted(order) == sorted(path.stem.removesuffix("_m6rec") for path in TRAVELLING)
    assert len(order) <= 18
    for path in TRAVELLING:
        own = path.stem.removesuffix("_m6rec")
        imported = set(re.findall(r"^\s*from \.(\w+)_m6rec import", path.read_text(), re.M))
        assert imported <= set(order[: order.index(own)]), own
        assert not imported & (TEXT if own not in TEXT else set(order) - TEXT - SHARED), own


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_are_short(path):
    for owner in ast.walk(parsed(path)):
        for node in getattr(owner, "body", ()) if isinstance(getattr(owner, "body", ()), list) else ():
            if isinstance(node, ast.FunctionDef):
                name = f"{owner.name}.{node.name}" if isinstance(owner, ast.ClassDef) else node.name
                assert name in LONG_BY_NATURE or node.end_lineno - node.lineno < 60, name


LOWER = ("metrics", "data", "config", "rows", "evaluation", "answering", "runs")
ROOMS = (*LOWER, "demo", "publishing", "serving", "commands")
"""Rooms of `train/` from the ground up: each imports only itself and those below it. On top stand the command line,
`recommender.py` and the package itself."""


def imported_modules(path: Path) -> set[str]:
    """Return the modules of m6rec that a file imports anywhere, also inside functions and for types only."""
    own = module_of(path)
    package = own if path.name == "__init__.py" else own.rpartition(".")[0]
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            name = ".".join(part for part in (base, node.module) if part)
            found |= {child if (child := f"{name}.{alias.name}") in BY_MODULE else name for alias in node.names}
    return found & set(BY_MODULE) - {own}


def module_of(path: Path) -> str:
    """Return the name by which a file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "modeling_m6rec" else parts
    return ".".join(["m6rec", *(part for part in parts if part != "__init__")])


BY_MODULE = {module_of(path): path for path in FILES}


@functools.cache
def imports() -> dict[str, set[str]]:
    """Return the modules that each module of the package imports."""
    return {name: imported_modules(path) for name, path in BY_MODULE.items()}


def test_rooms_import_only_lower_rooms():
    floors = {f"m6rec.train.{room}": floor for floor, room in enumerate(ROOMS)}
    assert {path.name for path in (ROOT / "train").iterdir() if (path / "__init__.py").is_file()} == set(ROOMS)

    def floor(name: str) -> int:
        return next((floor for room, floor in floors.items() if f"{name}.".startswith(f"{room}.")), len(ROOMS))

    upward = [
        f"{name} imports {other}"
        for name, others in imports().items()
        for other in others
        if name.startswith("m6rec.train.") and other.startswith("m6rec.train.") and floor(other) > floor(name)
    ]
    assert upward == []


def test_there_is_no_circle_of_imports():
    """Also among the imports inside functions and those for types only; the package itself loads its names lazily."""
    left = {name: others - {"m6rec"} for name, others in imports().items() if name != "m6rec"}
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    assert left == {}


def test_messages_with_braces_are_f_strings():
    for path in FILES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                for text in (each for each in node.exc.args if isinstance(each, ast.Constant)):
                    assert "{" not in str(text.value), f"{path}:{node.lineno}"


@pytest.mark.parametrize("path", sorted((ROOT / "train" / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_recipes_name_the_source_of_their_numbers(path):
    """Each number of a recipe is the paper's or ours, and says so (the template for own data explains instead)."""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        value = re.match(r"\s+(\w+): *[-\d.e]+ *(#.*)?$", line)
        if value and path.stem != "own-data" and value[1] not in ("seed", "save_total_limit"):
            assert value[2], f"{path.name}, line {number}: where does {value[1]} come from?"


def test_every_symbol_of_the_paper_index_exists():
    index = (ROOT / "docs" / "paper_index.md").read_text()
    rows = re.findall(r"`(\w+/[\w/]+\.py)::([\w.]+)`", index)
    tests = re.findall(r"`(test_\w+\.py)::(test_\w+)`", index)
    assert len(rows) > 20 and len(tests) > 10
    by_name = defaultdict(list)
    for path in (ROOT / "tests").rglob("test_*.py"):
        by_name[path.name].append(path)
    for file, name in tests:
        assert any(f"def {name}(" in path.read_text() for path in by_name[file]), f"{file}::{name}"
    for file, symbol in rows:
        names = set()
        for node in ast.walk(parsed(ROOT / file)):
            if isinstance(node, ast.ClassDef):
                methods = [each.name for each in node.body if isinstance(each, ast.FunctionDef)]
                fields = [each.target.id for each in node.body if isinstance(each, ast.AnnAssign)]
                names |= {node.name, *(f"{node.name}.{name}" for name in methods + fields)}
            if isinstance(node, ast.FunctionDef):
                names.add(node.name)
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(node.target.id)
        assert symbol in names, f"{file}::{symbol}"
