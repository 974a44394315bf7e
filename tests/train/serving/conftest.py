"""A model to serve."""

import pytest

from m6rec import Catalogue, RecommendationPipeline
from tests.modeling_m6rec.shop import ITEMS, TITLES, build, processor

MORE = [{"item_id": f"p{n}", "title": f"{TITLES[n % 8]} {n}", "brand": f"b{n % 5}"} for n in range(30)]


def write_model(folder, seed):
    model, own = build(seed), processor()
    catalogue = Catalogue.from_dataset([*ITEMS, *MORE], model, own, progress=False)
    RecommendationPipeline(model=model, processor=own, device="cpu", catalogue=catalogue).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """The folder of a tiny random model with a catalogue of 38 items."""
    return write_model(tmp_path_factory.mktemp("served"), 0)


@pytest.fixture(scope="session")
def another(tmp_path_factory):
    """The folder of another one."""
    return write_model(tmp_path_factory.mktemp("another"), 1)
