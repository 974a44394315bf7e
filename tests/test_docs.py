"""The documentation is true: its Python runs, its commands parse, its links have targets, its reference is whole."""

import dataclasses
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import yaml

from m6rec import M6RecConfig
from m6rec.train.cli import _parser
from m6rec.train.config.recipe import RECIPES, SECTIONS, load_recipe
from tests.fast import some
from tests.quickstart_model import quickstart_folder  # noqa: F401 - a fixture
from tests.test_repository import ROOT

DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *(DOCS / "guides").glob("*.md"), *(DOCS / "reference").glob("*.md")])
WITH_PYTHON = [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")]
COMMANDS = [
    (page.name, line.split("  #")[0].strip())
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]
    for block in re.findall(r"```shell\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    for line in block.splitlines()
    if line.strip()
]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.S)


@pytest.mark.parametrize(
    "page", some(WITH_PYTHON, [page for page in WITH_PYTHON if page.name != "export.md"]), ids=lambda page: page.name
)
def test_the_python_of_a_page_runs_in_order(page, quickstart_folder):  # noqa: F811
    names: dict = {}
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), names)


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_commands_exist(page, command):
    words = shlex.split(command, comments=True)
    if words[:1] == ["make"]:
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(), command
    if "m6rec.train.cli" in words:
        words = ["m6rec", *words[words.index("m6rec.train.cli") + 1 :]]
    if words[:1] != ["m6rec"]:
        return
    options, more = _parser().parse_known_args(words[1:])
    assert all("=" in word for word in more), command
    recipe = getattr(options, "recipe", None)
    known = recipe is not None and (RECIPES / f"{Path(recipe).stem}.yaml").is_file()
    assert recipe is None or known, f"{command}: there is no recipe {recipe!r}"
    if hasattr(options, "overrides") and options.command in ("prepare", "pretrain", "finetune", "run", "evaluate"):
        load_recipe(Path(recipe or "own-data").stem, [*options.overrides, *more, "training.output_dir=anywhere"])


def test_yaml_of_the_guides_is_a_recipe():
    for page in PAGES:
        for block in blocks(page, "yaml"):
            assert set(yaml.safe_load(block)) <= {*SECTIONS, "training"}, page


def test_links_lead_to_files_and_every_page_is_in_the_navigation():
    generated = {"reference/recipe.md", "reference/configuration.md", "reference/cli.md", "contributing.md"}
    for page in [*PAGES, DOCS / "llms.txt"]:
        for link in re.findall(r"\]\(([\w/.-]+\.\w+)\)", page.read_text(encoding="utf-8")):
            target = (page.parent / link).resolve().relative_to(ROOT.resolve())
            assert (ROOT / target).is_file() or str(target).removeprefix("docs/") in generated, f"{page.name}: {link}"
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:")[1]
    listed = set(re.findall(r": ([\w/-]+\.md)$", navigation, re.M))
    assert listed == {str(page.relative_to(DOCS)) for page in PAGES} | generated


def test_the_reference_describes_every_key():
    """Each field of a recipe section and of the configuration stands in the reference with its meaning."""
    spec = importlib.util.spec_from_file_location("reference_pages", DOCS / "reference_pages.py")
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    pages = reference.pages()
    for owner in (section for section in SECTIONS.values() if section.__module__.startswith("m6rec")):
        for field in dataclasses.fields(owner):
            assert f"| `{field.name}` |" in pages["reference/recipe.md"], field.name
            assert reference.field_docstrings(owner)[field.name], f"{owner.__name__}.{field.name} has no docstring"
    own = [name for name in vars(M6RecConfig)["__annotations__"] if not name.startswith("_")]
    for name in own:
        assert f"| `{name}` |" in pages["reference/configuration.md"], name
