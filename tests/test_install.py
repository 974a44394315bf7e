"""The installed package is imported by its name from any folder, also where a folder is called like it."""

import subprocess
import sys

import pytest

from tests.test_repository import ROOT

ORIGIN = "import importlib.util; print(importlib.util.find_spec('m6rec').origin)"
"""`None` is printed for a namespace package, which is what Python makes of a folder without an `__init__.py`."""


def clone(folder):
    (folder / "m6rec").symlink_to(ROOT, target_is_directory=True)


def results(folder):
    (folder / "m6rec" / "train").mkdir(parents=True)
    (folder / "m6rec" / "train" / "notes.txt").write_text("other files")


@pytest.mark.parametrize("way", ["-c", "script", "-m"])
@pytest.mark.parametrize("make", [clone, results])
def test_a_folder_called_m6rec_does_not_hide_the_package(tmp_path, make, way):
    make(tmp_path)
    (tmp_path / "find_it.py").write_text(ORIGIN)
    command = {"-c": ["-c", ORIGIN], "script": ["find_it.py"], "-m": ["-m", "find_it"]}[way]
    found = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout.strip().endswith("m6rec/__init__.py"), found.stdout
