"""A part of the model as a graph answers what the model does, for any number of rows and tokens."""

import pytest
import torch

from m6rec.export import ItemPart, JointPart, ReaderPart, ScorePart, UserPart, export_program, output_names, to_onnx
from m6rec.layout_m6rec import layout, pick, summary_keys
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
WHOLE = ("score", "user", "item")
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


def writes_to_parts(program):
    """The operations that write to a slice of a tensor, for which an ONNX graph transposes the whole tensor twice."""
    names = [str(node.target) for node in program.graph.nodes]
    return [name for name in names if name.startswith(("aten.copy_", "aten.fill_", "aten.addcmul_", "aten.slice_s"))]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(
    ("part", "whole"), {"score": lambda m: ScorePart(m, "click"), "user": UserPart, "item": ItemPart}.items()
)
def test_parts_answer_as_the_model(part, whole, settings):
    model = build(SETTINGS[settings])
    own = whole(model)
    for batch in batches(model, part):
        with torch.no_grad():
            close(own(**batch), answer(model, part, batch))


@pytest.mark.parametrize(
    ("part", "settings"),
    some([(part, settings) for part in WHOLE for settings in SETTINGS], [("item", "everything")]),
)
def test_programs_answer_as_the_model(part, settings):
    model = build(SETTINGS[settings])
    program = export_program(model, part)
    assert not writes_to_parts(program)
    for batch in batches(model, part):
        close(program.module()(**batch), answer(model, part, batch))


@pytest.mark.slow
@pytest.mark.parametrize("part", WHOLE)
def test_strict_programs_answer_as_the_model(part):
    model = build(EVERYTHING)
    program = export_program(model, part, strict=True).module()
    for batch in batches(model, part):
        close(program(**batch), answer(model, part, batch))


@pytest.mark.slow
@pytest.mark.parametrize("part", WHOLE)
def test_onnx_answers_as_the_model(part, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = build(EVERYTHING)
    session = runtime.InferenceSession(str(to_onnx(model, tmp_path / "part.onnx", part)))
    assert [output.name for output in session.get_outputs()] == output_names(model, part)
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


def segments_of(ids, lay):
    """The ids of each segment of a row."""
    numbers = lay.segment[0][lay.valid[0]]
    return [ids[0][lay.valid[0]][numbers == number] for number in range(1, int(numbers.max()) + 1)]


def staged(read, join, model, batch):
    """What the two stages say of a batch: each row's segments are read alone, one at a time, and kept states joined."""
    lay = layout(batch["input_ids"], batch["attention_mask"], model.config)
    keys = summary_keys(lay, batch["input_ids"] == model.config.segment_token_id, model.config)
    kept = pick(torch.where(keys, 0, -1), 1)
    states = []
    for number, ids in enumerate(batch["input_ids"]):
        own = type(lay)(*(field[number : number + 1] for field in lay))
        parts = segments_of(ids[None], own)
        lone = torch.cat([read(part[None], torch.ones_like(part)[None])[0][0] for part in parts])
        lone = torch.nn.functional.pad(lone, (0, 0, 0, len(ids) - len(lone)))
        states.append(lone[kept.columns[number]])
    hidden = batch.get("hidden_events", torch.zeros_like(batch["input_ids"], dtype=torch.bool))
    places = torch.where(kept.present, kept.columns, -1)
    more = [batch["item_embedding_ids"]] if "item_embedding_ids" in batch else []
    return join(batch["input_ids"], batch["attention_mask"], hidden, places, torch.stack(states), *more)


def stage_batches(model):
    """Rows of several sizes: with candidates, with a hidden event, and without any candidate."""
    writer = Writer(5)
    source = pad([writer.source(3), writer.source(1)])
    source = {**source, **({"item_embedding_ids": item_rows(source["input_ids"])} if more(model) else {})}
    seen = rows(model, 3, 2, 2)
    event = layout(seen["input_ids"], seen["attention_mask"], model.config).event
    return [rows(model, 0, 1, 1), rows(model, 1, 4, 5), {**seen, "hidden_events": event == 1}, source]


def more(model):
    return model.config.num_item_embeddings


def check_stages(model, read, join, exit_layer=None):
    for batch in stage_batches(model):
        users, *scores = staged(read, join, model, batch)
        with torch.no_grad():
            expected = model(**batch, plan="compact", return_logits=False, exit_layer=exit_layer)
        vectors = [own[~own[:, 0].isnan()][-1] for own in expected.user_vectors]
        close(users, torch.stack(vectors))
        for task, found in zip(model.config.scored, scores, strict=True):
            close(found, model.read_scores(expected.scores, task))
    batch = items(model, 2, 9)
    with torch.no_grad():
        batch.pop("memory_ids", None)
        close(read(batch["input_ids"], batch["attention_mask"])[1], model.embed_items(**batch))


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("exit_layer", [None, 1])
@torch.no_grad()
def test_the_two_stages_answer_as_the_model(settings, exit_layer):
    model = build({**SETTINGS[settings], "num_hidden_layers": 3, "num_joint_layers": 2})
    check_stages(model, ReaderPart(model), JointPart(model, exit_layer), exit_layer)


def onnx_stage(runtime, model, path, part):
    session = runtime.InferenceSession(str(to_onnx(model, path / f"{part}.onnx", part)))
    assert [output.name for output in session.get_outputs()] == output_names(model, part)
    names = [given.name for given in session.get_inputs()]

    def run(*values):
        found = session.run(None, {name: value.numpy() for name, value in zip(names, values, strict=True)})
        return tuple(map(torch.from_numpy, found))

    return run


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS)
def test_the_two_stages_as_onnx_answer_as_the_model(settings, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = build(SETTINGS[settings])
    check_stages(model, *(onnx_stage(runtime, model, tmp_path, part) for part in ("reader", "joint")))


def test_an_exit_layer_that_is_not_there_is_refused():
    model = build(SMALL)
    for part, exit_layer in [("joint", 2), ("joint", 0), ("score", 1)]:
        with pytest.raises(ValueError, match=f"exit_layer={exit_layer} of part='{part}'"):
            export_program(model, part, exit_layer=exit_layer)
