"""README's Python is run as it stands, in order, against a small model in the place of the quickstart's."""

import re

from m6rec.train.config.recipe import load_recipe
from tests.quickstart_model import quickstart_folder  # noqa: F401 - a fixture
from tests.test_repository import ROOT

README = (ROOT / "README.md").read_text()


def test_snippets_run_in_order(quickstart_folder, capsys):  # noqa: F811
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 3 and README.count("\n") <= 150
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    ranks = [line.split()[0] for line in printed.splitlines() if line[:2] in ("1 ", "2 ", "3 ")]
    assert ranks == ["1", "2", "3"]
    assert names["top"]["user_id"].tolist() == ["ann"] * 3 + ["bob"] * 3 and len(names["top_of_new"]) == 3
    assert "new" in names["catalogue"]


def test_recipes_and_files_that_it_names_exist():
    for name in re.findall(r"m6rec (?:finetune|pretrain) ([\w-]+)", README):
        load_recipe(name, ["training.output_dir=anywhere"])
    for link in re.findall(r"\]\(([\w/.-]+)\)", README):
        assert (ROOT / link).is_file(), link


def test_make_targets_that_it_names_exist():
    targets = (ROOT / "Makefile").read_text()
    for name in re.findall(r"(?:^|`)make ([a-z-]+)", README, re.M):
        assert f"\n{name}:" in targets, name
