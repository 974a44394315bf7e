"""The shop's model as a folder, and as an exported page."""

import shutil

import pytest

from m6rec.train.commands.export import export
from tests.modeling_m6rec.test_onnx_model import CATALOGUE, MODEL, PROCESSOR


@pytest.fixture(scope="session")
def shop(tmp_path_factory):
    """The folder of the shop's model with its catalogue."""
    folder = tmp_path_factory.mktemp("shop")
    MODEL.save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    CATALOGUE.save(folder / "catalogue")
    return folder


@pytest.fixture(scope="session")
def page(shop, tmp_path_factory):
    """The folder of its page in float32; npm fetches onnxruntime-web."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed, which fetches onnxruntime-web")
    pytest.importorskip("onnxscript")
    folder = tmp_path_factory.mktemp("page") / "page"
    export(str(shop), folder, "web")
    return folder
