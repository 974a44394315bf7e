"""The page answers as the pipeline does: lists, scores, reasons, new products; its folder is complete and closed."""

import json
import re
import shutil

import numpy as np
import pytest

from m6rec.catalogue_m6rec import without_stats
from m6rec.train.commands import page as command
from m6rec.train.commands.export import export
from m6rec.train.commands.page import RUNTIME_FILES, vector_bytes
from tests.modeling_m6rec.shop import ITEMS, REQUEST
from tests.modeling_m6rec.test_onnx_model import CATALOGUE, MODEL, PROCESSOR, REQUESTS, SOURCE, make, same
from tests.web.node import CODE, run

NEW = {"title": "a red tent", "category": "outdoor"}


@pytest.fixture
def runtime(tmp_path):
    """A folder with files that are called like those of onnxruntime-web."""
    folder = tmp_path / "dist"
    folder.mkdir()
    for name in RUNTIME_FILES:
        (folder / name).write_text(f"// {name}")
    return folder


def without_graphs(model, folder, weights, exit_layer):
    """Stands for `export_onnx`, which takes long."""
    folder.mkdir(exist_ok=True)
    for name in ("reader.onnx", "joint.onnx", "config.json", "onnx.json"):
        (folder / name).write_bytes(b"graph")
    return {"files": {name: {"bytes": 5, "gzip": 5} for name in ("reader.onnx", "joint.onnx")}}


def test_the_folder_is_complete_and_loads_nothing_from_elsewhere(shop, runtime, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "export_onnx", without_graphs)
    monkeypatch.setattr(command, "_unknown_user", lambda recommend, folder: [0.25] * CATALOGUE.dimension)
    said = []
    export(str(shop), tmp_path / "page", "web", "int8", runtime=str(runtime), say=said.append)
    page = tmp_path / "page"
    assert any("catalogue of 8 items" in line for line in said)
    found = {str(path.relative_to(page)) for path in page.rglob("*") if path.is_file()}
    code = {f"m6rec/{path.name}" for path in CODE.glob("*.js")} | {"index.html", "app.js", "base.css", "style.css"}
    model = {"reader.onnx", "joint.onnx", "tokenizer.json", "items.json", "vectors.bin", "manifest.json"}
    assert found == code | {f"model/{name}" for name in model} | {f"vendor/{name}" for name in RUNTIME_FILES}
    policy = re.search(r'Content-Security-Policy"\s+content="([^"]+)"', (page / "index.html").read_text())[1]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "unsafe-inline" not in policy
    for name in code:
        assert not re.search(r"https?://", (page / name).read_text()), name
    manifest = json.loads((page / "model/manifest.json").read_text())
    assert manifest["catalogue"] == {"width": CATALOGUE.dimension, "weights": "int8", "exclude_seen": True}
    assert manifest["model"]["unknown_user"] == [0.25] * CATALOGUE.dimension and manifest["evidence"] is None
    assert manifest["processor"]["item_rows"] == {"i0": 2, "i3": 1, "i5": 3}
    items = json.loads((page / "model/items.json").read_text())
    assert items["ids"] == list(CATALOGUE) and items["items"][0] == ITEMS[0]
    export(str(shop), page, "web", "int8", runtime=str(runtime), say=said.append)  # an earlier page is replaced


def test_what_cannot_become_a_page_is_refused(shop, runtime, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "export_onnx", without_graphs)
    monkeypatch.setattr(command, "_unknown_user", lambda recommend, folder: [0.25] * CATALOGUE.dimension)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(FileExistsError, match="holds other files"):
        export(str(shop), tmp_path / "mine", "web")
    (runtime / RUNTIME_FILES[2]).unlink()
    with pytest.raises(ValueError, match=f"the folder lacks {RUNTIME_FILES[2]}"):
        export(str(shop), tmp_path / "page", "web", runtime=str(runtime))
    assert not (tmp_path / "page").exists()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="install npm"):
        export(str(shop), tmp_path / "page", "web")


def test_vectors_of_8_bits_are_near():
    vectors = np.random.default_rng(0).normal(size=(5, 7)).astype("f4")
    assert np.array_equal(np.frombuffer(vector_bytes(vectors, "float32"), "<f4").reshape(5, 7), vectors)
    content = vector_bytes(vectors, "int8")
    scales, small = np.frombuffer(content[:20], "<f4"), np.frombuffer(content[20:], np.int8).reshape(5, 7)
    assert np.abs(scales[:, None] * small - vectors).max() <= 0.51 * scales.max()
    assert vector_bytes(np.zeros((2, 3), "f4"), "int8")[8:] == bytes(6)


@pytest.mark.slow
def test_answers_are_those_of_the_pipeline(page, tmp_path):
    scored = [[REQUEST, task] for task in ("click", "rating", "interaction")]
    given = {
        "requests": REQUESTS,
        "explained": REQUESTS,
        "scored": scored,
        "added": [["new", NEW]],
        "options": {"topK": 6},
    }
    (tmp_path / "requests.json").write_text(json.dumps(given))
    found = run("answers.mjs", page, tmp_path / "requests.json")
    recommend = make(MODEL)
    same(found["answers"], recommend(REQUESTS, top_k=6), 1e-5)
    same(found["reasons"], recommend(REQUESTS, top_k=6, explain=True), 1e-5)
    for (request, task), own in zip(scored, found["scores"]):
        answer = {row["item"]: row for row in recommend(request, task=task)}
        names = PROCESSOR.item_texts([without_stats(each) for each in request["candidates"]])
        values = [answer[name].get("interactions", answer[name]["score"]) for name in names]
        same(own, [list(value.values()) if isinstance(value, dict) else value for value in values], 1e-5)
    assert REQUESTS[0] == SOURCE
    with_new = {row["item_id"]: row["score"] for row in found["after"]}
    expected = recommend({**SOURCE, "candidates": [NEW]}, task="retrieval")[0]["score"]
    assert with_new["new"] == pytest.approx(expected, abs=1e-5)
