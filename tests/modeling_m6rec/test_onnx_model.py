"""A pipeline answers through an exported model as through the model itself; 8-bit weights are really 8 bits."""

import json

import pytest
import torch

from m6rec import Catalogue, RecommendationPipeline, onnx_model
from m6rec.export import JointPart, ReaderPart, output_names
from m6rec.onnx_model import MANIFEST, STAGES, OnnxModel, export_onnx, quantize
from tests.modeling_m6rec.shop import ITEMS, REQUEST, SOURCE, build, processor

SETTINGS = {"segment_summary": 1, "segment_pooling": "mean", "bow_embeddings": True, "skipped_kinds": ["age"]}
MODEL, PROCESSOR = build(**SETTINGS), processor()
CATALOGUE = Catalogue.from_dataset(ITEMS, MODEL, PROCESSOR)
REQUESTS = [
    SOURCE,
    {"user": "a man"},
    {"history": [{"item": ITEMS[0]}, {"item": ITEMS[1]}]},
    {**SOURCE, "history": SOURCE["history"][:2]},
]


class Eager:
    """A session of onnxruntime whose graph is the torch module itself."""

    def __init__(self, model, part):
        self.module, self.names = part(model), output_names(model, "reader" if part is ReaderPart else "joint")
        self.rows = 0

    @torch.no_grad()
    def run(self, names, given):
        self.rows += len(given["input_ids"])
        found = self.module(**{name: torch.from_numpy(value) for name, value in given.items()})
        return [found[self.names.index(name)].numpy() for name in names or self.names]


def eager():
    sessions = {"reader": Eager(MODEL, ReaderPart), "joint": Eager(MODEL, JointPart)}
    return OnnxModel(MODEL.config, sessions, MODEL.fingerprint())


def make(model):
    return RecommendationPipeline(model=model, processor=PROCESSOR, device="cpu", catalogue=CATALOGUE)


def same(found, expected, bound=1e-5):
    """Whether two answers agree: the same items, scores and reasons up to rounding."""
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            same(found[name], value, bound)
    elif isinstance(expected, list):
        for one, other in zip(found, expected, strict=True):
            same(one, other, bound)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=bound)
    else:
        assert found == expected


def check(recommend, bound=1e-5):
    expected = make(MODEL)
    for options in ({"top_k": 8}, {"explain": True, "top_k": 3, "exclude_seen": False}):
        same(recommend(REQUESTS, batch_size=4, **options), expected(REQUESTS, batch_size=4, **options), bound)
    for task in ("click", "rating", "interaction"):
        same(recommend(REQUEST, task=task, explain=True), expected(REQUEST, task=task, explain=True), bound)


def test_a_pipeline_answers_through_the_two_stages_as_through_the_model():
    check(make(eager()))


def test_a_segment_is_read_once_and_the_oldest_is_dropped_first(monkeypatch):
    model = eager()
    recommend = make(model)
    first = recommend(SOURCE)
    read = model.sessions["reader"].rows
    assert read and recommend(SOURCE) == first and model.sessions["reader"].rows == read
    monkeypatch.setattr(onnx_model, "KEPT_SEGMENTS", 5)
    assert recommend(SOURCE) == first
    assert len(model._states) == 5
    assert recommend(SOURCE) == first and model.sessions["reader"].rows > read


def test_what_the_files_cannot_compute_is_refused():
    recommend = make(eager())
    for options in ({"task": "plausibility"}, {"task": "click", "exit_confidence": 0.9}, {"exit_layer": 1}):
        with pytest.raises(ValueError, match="an exported model computes retrieval and scores"):
            recommend(REQUEST, **options)
    with pytest.raises(ValueError, match="candidates with item embeddings"):
        recommend(REQUEST, task="retrieval")
    assert recommend({**REQUEST, "candidates": ["yoga mat", "a tent"]}, task="retrieval")
    with pytest.raises(ValueError, match="weights='int4'"):
        export_onnx(MODEL, "nowhere", weights="int4")


def test_weights_that_stay_in_float32_are_an_error(tmp_path, monkeypatch):
    onnx = pytest.importorskip("onnx")
    quantization = pytest.importorskip("onnxruntime.quantization")
    weight = onnx.numpy_helper.from_array(torch.randn(64, 64).numpy(), "weight")
    node = onnx.helper.make_node("MatMul", ["x", "weight"], ["y"])
    ends = [onnx.helper.make_tensor_value_info(name, 1, ["rows", 64]) for name in "xy"]
    graph = onnx.helper.make_graph([node], "graph", ends[:1], ends[1:], [weight])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "part.onnx")
    given = torch.randn(3, 64).numpy()
    onnx.save(model, tmp_path / "whole.onnx")
    facts = quantize(tmp_path / "part.onnx")
    assert facts["products"] == 1 and 0.25 <= facts["share"] < 0.35
    runtime = pytest.importorskip("onnxruntime")
    one, other = (
        runtime.InferenceSession(str(tmp_path / name)).run(None, {"x": given})[0]
        for name in ("part.onnx", "whole.onnx")
    )
    assert 0 < abs(one - other).max() < 0.5  # sums that saturate at 16 bits differ by 2 and more
    onnx.save(model, tmp_path / "part.onnx")
    monkeypatch.setattr(quantization, "quantize_dynamic", lambda source, target, **_: onnx.save(model, target))
    with pytest.raises(ValueError, match=r"part.onnx was not quantised: 0 matrix products .* 100%"):
        quantize(tmp_path / "part.onnx")


@pytest.mark.slow
def test_files_answer_as_the_model(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    made = export_onnx(MODEL, tmp_path)
    assert made == json.loads((tmp_path / MANIFEST).read_text())
    assert {f"{part}.onnx" for part in STAGES} == made["files"].keys()
    check(make(OnnxModel.load(tmp_path, threads=1)))


@pytest.mark.slow
def test_files_of_8_bits_answer_nearly_as_the_model(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    wide = {"hidden_size": 96, "intermediate_size": 128, "embedding_dim": 32, "initializer_range": 0.1}
    model = build(**{**SETTINGS, **wide, "num_hidden_groups": 1})  # layers share their weights
    made = export_onnx(model, tmp_path, "int8")
    assert all(facts["products"] >= 7 for facts in made["files"].values())
    catalogue = Catalogue.from_dataset(ITEMS, model, PROCESSOR)
    whole, own = (
        RecommendationPipeline(model=each, processor=PROCESSOR, device="cpu", catalogue=catalogue)
        for each in (model, OnnxModel.load(tmp_path, threads=1))
    )
    scores = {row["item_id"]: row["score"] for row in whole(SOURCE, top_k=8)}
    found = {row["item_id"]: row["score"] for row in own(SOURCE, top_k=8)}
    assert found.keys() == scores.keys()
    assert 0 < max(abs(found[name] - scores[name]) for name in scores) < 0.1
