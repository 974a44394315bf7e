"""The small world's tables and a prepared run on them, made once; what is read of them is cached beside them."""

import datasets
import pytest

from m6rec.train.build import prepare
from m6rec.train.recipe import load_recipe
from tests.train.world import recipe_of, write_world


@pytest.fixture(scope="session")
def tables(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


@pytest.fixture
def make_recipe(tables, tmp_path):
    """Make a recipe on the small world; sections add to the plain one."""
    return lambda **sections: load_recipe(recipe_of(tables, tmp_path / "run", **sections))


@pytest.fixture
def run(make_recipe):
    return prepare(make_recipe())
