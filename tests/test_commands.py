"""Each command of `m6rec` that code, README, cards and recipes show exists: its recipe, its options, its keys."""

import re
import shlex

import pytest

from m6rec.train.cli import _parser
from m6rec.train.config.recipe import RECIPES, load_recipe
from tests.test_repository import FILES, ROOT

PAST = ("docs/experiments.md", "docs/results.md", "CHANGELOG.md")
"""What was run once, with the commands of its time."""
PLACES = sorted(
    path
    for path in (*FILES, *ROOT.glob("*.md"), *ROOT.glob("docs/cards/*.md"), *RECIPES.glob("*.yaml"), ROOT / "Makefile")
    if str(path.relative_to(ROOT)) not in PAST
)
COMMAND = re.compile(r"(?:^|[`\s/])m6rec ((?:prepare|pretrain|finetune|run|convert|evaluate|recommend|push) [^`\n]*)")
OWN_FILES = re.compile(r"(?:[\w-]+/)*[\w-]+\.yaml|own-data|DIR|shop\.yaml")
"""Recipes that the reader writes, by copying own-data.yaml."""


def commands(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        text = text.replace('" \\\n', "").replace("{{ facts.preset }}", "tiny")
    return [match.strip() for match in COMMAND.findall(text)]


def words(command):
    """Cut a command into its words, without the remark behind it: after two blanks, a # or a bracket; and its dots."""
    plain = re.split(r"\s{2,}|\s#|\s\(|\s\.\.\.|;|\$\(", command)[0].rstrip(".,:)").replace("{}", "'{}'")
    return [word for word in shlex.split(plain) if word != "..."]


FOUND = [(path, command) for path in PLACES for command in commands(path)]


def test_commands_are_found():
    assert len(FOUND) > 40
    assert {path.name for path, _ in FOUND} >= {"README.md", "finetune.py", "pretrain.py", "convert.py", "push.py"}


@pytest.mark.parametrize(("path", "command"), FOUND, ids=[f"{p.relative_to(ROOT)}: {c[:50]}" for p, c in FOUND])
def test_a_command_exists(path, command):
    given = words(command)
    options, more = _parser().parse_known_args(given)
    unknown = [word for word in more if word.startswith("--") and "=" not in word]
    assert not unknown, unknown
    overrides = [*options.overrides, *more]
    if options.command in ("prepare", "pretrain", "finetune", "run"):
        recipe = RECIPES / "own-data.yaml" if OWN_FILES.fullmatch(options.recipe) else options.recipe
        load_recipe(recipe, ["training.output_dir=anywhere", *overrides])
    elif options.command in ("evaluate", "recommend"):
        load_recipe(RECIPES / "own-data.yaml", overrides)
    elif options.command == "convert":
        fields = [entry if entry.startswith("text.") else f"model.config.{entry}" for entry in overrides]
        load_recipe({"training": {"output_dir": "anywhere"}}, fields)
