"""What every test shares: no network, the same seed, the same number type, nothing warned of yet."""

import gc
import os
import socket
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch
from transformers import dynamic_module_utils
from transformers.utils import logging

from tests import fast
from tests.fresh import Host

torch.set_num_threads(1)
REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_configure(config):
    fast.ONLY = "not slow" in config.option.markexpr
    slow = [hypothesis.HealthCheck.too_slow]  # of the machine, not of a test
    hypothesis.settings.register_profile(
        "m6rec", max_examples=fast.examples(100), deadline=None, suppress_health_check=slow
    )
    hypothesis.settings.load_profile("m6rec")


@pytest.fixture(autouse=True, scope="session")
def _relative_imports_are_looked_for_once():
    """Each save of a model searches the code that goes with it."""
    kept, search = {}, dynamic_module_utils.get_relative_imports

    def once(path):
        changed = os.stat(path)
        key = str(path), changed.st_mtime_ns, changed.st_size
        if key not in kept:
            kept[key] = search(path)
        return list(kept[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "get_relative_imports", once)
        yield


def pytest_collection():
    gc.disable()  # nothing of what is imported and collected is garbage


def pytest_collection_finish():
    gc.freeze()  # nor is it looked through again and again
    gc.enable()


@pytest.fixture(autouse=True)
def _same_start():
    torch.default_generator.manual_seed(0)  # `torch.manual_seed` also notes where it was called, for GPUs
    logging.warning_once.cache_clear()
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    connect = socket.socket.connect

    def only_here(self, address):
        host = address[0] if isinstance(address, tuple) else None
        if host not in (None, "127.0.0.1", "localhost", "::1"):
            raise OSError(f"a test tried to reach {host!r}: tests never use the network")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", only_here)


@pytest.fixture(scope="session")
def fresh(tmp_path_factory):
    """Run code in a process that has imported what every user of a model has, but not the package."""
    host = Host(tmp_path_factory.mktemp("fresh"))
    yield host
    host.close()


def real_data(name: str) -> Path:
    """The folder of a real data set, or skip, saying why."""
    for root in (os.environ.get("M6REC_DATA"), REPOSITORY.parent / "shared" / "data"):
        if root and (Path(root) / name).is_dir():
            return Path(root) / name
    pytest.skip(f"real data set {name!r} is absent: set M6REC_DATA to the folder that holds it")
