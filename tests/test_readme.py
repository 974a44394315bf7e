"""README's Python is run as it stands, in order, against a small model in the place of the quickstart's."""

import re

from m6rec.train.config.recipe import load_recipe
from tests.quickstart_model import quickstart_folder  # noqa: F401 - a fixture
from tests.test_repository import ROOT

README = (ROOT / "README.md").read_text()


def test_snippets_run_in_order(quickstart_folder, capsys):  # noqa: F811
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["1", "2", "3"] and "Star Wars" not in "".join(printed[:1])
    assert len(names["ranked"]) == 2 and names["ranked"][0]["rank"] == 1
    assert [len(answer) for answer in names["answers"]] == [3, 3]
    assert names["vector"].shape == (128,) and names["vectors"].shape == (2, 128)
    assert abs(float(names["vector"].norm()) - 1) < 1e-5


def test_recipes_and_files_that_it_names_exist():
    for name in re.findall(r"m6rec (?:finetune|pretrain) ([\w-]+)", README):
        load_recipe(name, ["training.output_dir=anywhere"])
    for link in re.findall(r"\]\(([\w/.-]+)\)", README):
        assert (ROOT / link).is_file(), link


def test_make_targets_that_it_names_exist():
    targets = (ROOT / "Makefile").read_text()
    for name in re.findall(r"(?:^|`)make ([a-z-]+)", README, re.M):
        assert f"\n{name}:" in targets, name
