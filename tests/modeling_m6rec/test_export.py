"""A part of the model as a graph answers what the model does, for any number of rows and tokens."""

import pytest
import torch

from m6rec.export import OUTPUTS, PARTS, ScorePart, export_program, to_onnx
from tests.fast import some
from tests.modeling_m6rec.tiny import BLOCKS, ITEM, Writer, build, close, item_rows, pad

SMALL = {"num_hidden_layers": 2, "num_joint_layers": 1}
EVERYTHING = {
    **SMALL,
    "segment_pooling": "mean",
    "segment_attention": "bidirectional",
    "segment_summary": 1,
    "bow_embeddings": True,
    "tfidf_weight": 0.3,
    "cold_item_bias": 0.1,
}
SETTINGS = {"everything": EVERYTHING, "learned": {**BLOCKS[0], **SMALL, "num_item_embeddings": 0}}


def rows(model, seed, count, events):
    writer = Writer(seed)
    heads = [writer.source(events + number) for number in range(count)]
    batch = pad([head + writer.candidate() + writer.candidate() * (n % 2) for n, head in enumerate(heads)])
    return {**batch, "item_embedding_ids": item_rows(batch["input_ids"])} if model.config.num_item_embeddings else batch


def items(model, seed, count):
    writer = Writer(seed)
    batch = pad([writer.segment(ITEM, 1, 7) for _ in range(count)])
    return {**batch, "memory_ids": torch.arange(count) % 10} if model.config.num_item_embeddings else batch


def batches(model, part):
    return [items(model, 1, 1), items(model, 2, 9)] if part == "item" else [rows(model, 0, 1, 1), rows(model, 1, 4, 5)]


def answer(model, part, batch):
    """What the model itself says, by another plan."""
    with torch.no_grad():
        if part == "item":
            return model.embed_items(**batch)
        if part == "score":
            return model.score("click", **batch, plan="compact")
        vectors = model.embed(**batch, plan="compact").user_vectors
        return torch.stack([own[~own[:, 0].isnan()][-1] for own in vectors])


@pytest.mark.parametrize(
    ("part", "settings"),
    some(
        [(part, settings) for part in PARTS for settings in SETTINGS],
        [("score", "everything"), ("item", "everything"), ("user", "learned")],
    ),
)
def test_programs_answer_as_the_model(part, settings):
    model = build(SETTINGS[settings])
    program = export_program(model, part).module()
    for batch in batches(model, part):
        close(program(**batch), answer(model, part, batch))


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_strict_programs_answer_as_the_model(part):
    model = build(EVERYTHING)
    program = export_program(model, part, strict=True).module()
    for batch in batches(model, part):
        close(program(**batch), answer(model, part, batch))


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_onnx_answers_as_the_model(part, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = build(EVERYTHING)
    session = runtime.InferenceSession(str(to_onnx(model, tmp_path / "part.onnx", part)))
    assert [output.name for output in session.get_outputs()] == [OUTPUTS[part]]
    for batch in batches(model, part):
        (found,) = session.run(None, {name: value.numpy() for name, value in batch.items()})
        close(torch.from_numpy(found), answer(model, part, batch))


def test_what_cannot_be_exported_is_refused():
    model = build(SMALL)
    for arguments, why in [(("words",), "part='words'"), (("score", "writing"), "task='writing'")]:
        with pytest.raises(ValueError, match=why):
            export_program(model, *arguments)
    with pytest.raises(ValueError, match="merge_and_unload"):
        export_program(ScorePart(model, "click"))
    with pytest.raises(ValueError, match="segment layers"):
        export_program(build({"num_joint_layers": 4}), "item")
    uncounted = build({**SMALL, "tfidf_weight": 0.3})
    uncounted.model.word_sketch.rarity.zero_()
    with pytest.raises(ValueError, match="count the words"):
        export_program(uncounted, "user")
