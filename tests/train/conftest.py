"""The small world's tables and a prepared run on them, made once; what is read of them is cached beside them."""

import copy

import datasets
import pytest

from m6rec.train.answering.loading import build_catalogue, load_pipeline
from m6rec.train.config.recipe import load_recipe
from m6rec.train.evaluation import curves
from m6rec.train.runs import build
from m6rec.train.runs.build import prepare
from m6rec.train.runs.finetune import finetune
from tests.train.world import ITEMS, draw_nothing, recipe_of, write_world

DRAW = curves.draw


@pytest.fixture(scope="session")
def small_world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def tables(small_world):
    """The tables of most tests; some files have their own."""
    return small_world


@pytest.fixture(autouse=True, scope="session")
def _the_small_world_is_read_once(small_world):
    """Runs get a copy of its log: most tests prepare a run, and few are about reading tables."""
    kept, read_log = {}, build.read_log

    def read_once(arguments):
        if arguments.interactions != small_world["interactions"]:
            return read_log(arguments)
        if (key := repr(arguments)) not in kept:
            log = read_log(arguments)
            if log.dropped:
                return log  # and says so each time
            kept[key] = copy.deepcopy(log)
        return copy.deepcopy(kept[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "read_log", read_once)
        yield


@pytest.fixture(autouse=True, scope="session")
def _no_pictures():
    """Plotting the curves of a run takes longer than its few steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "draw", draw_nothing)
        yield


@pytest.fixture
def pictures(monkeypatch):
    """Let curves be plotted as they are for users."""
    monkeypatch.setattr(curves, "draw", DRAW)


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


@pytest.fixture(scope="module")
def folder(tables, tmp_path_factory):
    """A model that has learnt retrieval, with its catalogue."""
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")
    path = tmp_path_factory.mktemp("trained") / "model"
    finetune(load_recipe(recipe_of(tables, path)))
    build_catalogue(path, ITEMS)
    patch.undo()
    return path


@pytest.fixture(scope="module")
def recommend(folder):
    return load_pipeline(str(folder))
