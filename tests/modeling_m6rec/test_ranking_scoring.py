"""Batches and exits change what is computed when, never an answer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m6rec import RecommendationPipeline, SegmentCache, network_m6rec, ranking_m6rec
from m6rec.ranking_m6rec import Scorer, confidence
from tests.fast import examples
from tests.modeling_m6rec.shop import ITEMS, REQUEST, build, processor

PROCESSOR = processor()
WORDS = ["tent", "stove", "lamp", "boots", "rope", "mat", "poles", "socks"]
MODEL = build(segment_summary=1)


def make(model=MODEL, **more):
    return RecommendationPipeline(model=model, processor=PROCESSOR, device="cpu", **more)


def wide(**more):
    """Three joint layers, each a trained exit, whose answers differ in how sure they are."""
    return build(num_joint_layers=3, exit_layers=[1, 2], **more)


def scores(rows):
    return {row["item"]: row["score"] for row in rows}


EVENT = st.sampled_from([*WORDS, {"event": "bought", "item": ITEMS[2]}, {"event": "searched", "query": "winter"}])
ASKED = st.builds(
    lambda user, history, items: {"user": user, "history": history, "candidates": items},
    st.sampled_from(["a man", "A woman in her thirties", "runs a lot"]),
    st.lists(EVENT, max_size=9),
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=12, unique=True),
)


@settings(max_examples=examples(25), deadline=None)
@given(st.lists(ASKED, min_size=2, max_size=6), st.integers(2, 6), st.sampled_from(["click", "rating", "plausibility"]))
def test_batched_equals_one_by_one(requests, batch_size, task):
    together = make()(requests, task=task, batch_size=batch_size)
    for request, rows in zip(requests, together, strict=True):
        assert scores(rows) == pytest.approx(scores(make()(request, task=task)), rel=1e-5, abs=1e-5)


def count_tokens(model, layer, call):
    """Shapes of what goes through a layer."""
    seen = []
    handle = model.model.layers[layer].register_forward_hook(
        lambda _, args, out: seen.append(tuple(args[0].shape[:-1]))
    )
    answer = call()
    handle.remove()
    return seen, answer


def test_a_source_is_read_once_however_many_the_candidates():
    model = build(num_joint_layers=2)
    few = {"user": "a man", "history": WORDS[:4], "candidates": [f"tent {number}" for number in range(2)]}
    many = {**few, "candidates": [f"tent {number}" for number in range(230)]}
    source = len(PROCESSOR.read({**few, "candidates": None}, "retrieval").input_ids) + 1  # and the [BOS] of all targets
    seen, rows = count_tokens(model, -1, lambda: make(model)(many))
    assert [shape for shape in seen if shape[1] == source] == [(1, source)]
    assert sum(rows_ for rows_, tokens in seen if tokens != source) == 230
    assert scores(make(model)(few)) == pytest.approx({item: scores(rows)[item] for item in few["candidates"]}, abs=1e-5)


def test_candidates_beyond_the_bound_make_rows_of_their_own(monkeypatch):
    model, many = build(num_joint_layers=2), {**REQUEST, "candidates": [f"tent {number}" for number in range(50)]}
    expected = make(model)(many)
    monkeypatch.setattr(ranking_m6rec, "TOKENS_AT_ONCE", 300)
    encoded = Scorer(model, PROCESSOR, SegmentCache()).encode([many], "click")[0]
    rows = encoded.rows(range(50), None, 300)
    assert len(rows) > 2 and all(len(row.ids) <= 300 for row in rows)
    assert sum(row.ids.count(model.config.bos_token_id) for row in rows) == 50
    assert scores(make(model)(many)) == pytest.approx(scores(expected), rel=1e-5, abs=1e-5)


def test_each_text_of_a_batch_is_read_once():
    model = build(num_joint_layers=2)
    requests = [
        {"user": "a man", "history": WORDS[:count], "candidates": WORDS[count:]} for count in (1, 3, 5, 7, 1, 3)
    ]
    seen, _ = count_tokens(model, 0, lambda: make(model)(requests, batch_size=6))
    texts = {
        tuple(text)
        for request in requests
        for text in PROCESSOR.read(request, "click").segments  # without markers, of which there are four
    }
    assert sum(rows for rows, _ in seen) == len(texts) + 4


def test_requests_of_unlike_size_do_not_pad_each_other(monkeypatch):
    monkeypatch.setattr(network_m6rec, "TOGETHER", 0)
    model = build(num_joint_layers=2)
    short = {"user": "a man", "history": [], "candidates": ["tent"]}
    long = {"user": "a man", "history": WORDS * 5, "candidates": WORDS}
    seen, _ = count_tokens(model, -1, lambda: make(model)([short, long] * 4, batch_size=8))
    # Each source, and the [BOS] of its targets.
    sizes = [len(PROCESSOR.read({**one, "candidates": None}, "retrieval").input_ids) + 1 for one in (short, long)]
    assert (4, sizes[1]) in seen and (8, sizes[1]) not in seen and (4, sizes[0]) in seen
    seen, _ = count_tokens(model, -1, lambda: make(model)([short] * 4, batch_size=4))
    assert len(seen) == 2
    monkeypatch.setattr(network_m6rec, "TOGETHER", 512)
    seen, _ = count_tokens(model, -1, lambda: make(model)([short] * 4, batch_size=4))
    assert len(seen) == 1


# -------------------------------------------------------------------------------------------------------- early exit

SURE = st.sampled_from([0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.9, 1.0, 1.5, None])


@settings(max_examples=examples(25), deadline=None)
@given(
    st.lists(st.tuples(ASKED, SURE), min_size=1, max_size=5),
    st.sampled_from(["click", "interaction", "rating"]),
    st.booleans(),
)
def test_a_request_is_answered_at_the_first_exit_that_is_sure(wide_model, requests, task, keep):
    given_ = [request if sure is None else {**request, "exit_confidence": sure} for request, sure in requests]
    answers = make(wide_model, user_states=keep)(given_, task=task, batch_size=len(given_))
    for (request, sure), rows in zip(requests, answers, strict=True):
        encoded = Scorer(wide_model, PROCESSOR, SegmentCache()).encode([request], task)[0]
        batch = PROCESSOR.pad([{"input_ids": encoded.rows(range(len(encoded.targets)), None, None)[0].ids}])
        expected = next(
            layer
            for layer in (1, 2, 3)
            if layer == 3 or (sure or 9) < 1 and least(wide_model, batch, layer, task) >= sure
        )
        assert scores(rows) == pytest.approx(
            scores(make(wide_model)(request, task=task, exit_layer=expected)), rel=1e-5, abs=1e-5
        )
        assert all(row.get("exit_layer") == (None if sure is None else expected) for row in rows)


@pytest.fixture(scope="module")
def wide_model():
    return wide(num_item_embeddings=0)


def least(model, batch, layer, task):
    """How sure the least sure answer is, from probabilities."""
    with torch.no_grad():
        logits = model(**batch, exit_layer=layer, plan="flat").scores[0][:, model.config.score_slices[task]]
    if task == "interaction":
        return min(max(p, 1 - p) for p in logits.sigmoid().flatten().tolist())
    return min(max(each) for each in logits.softmax(-1).tolist())


def test_exits_differ_and_who_is_asked_along_changes_nothing(wide_model):
    requests = [{"user": word, "history": WORDS[:4], "candidates": [word, "tent"]} for word in WORDS]
    alone = [make(wide_model)(request, exit_confidence=0.75) for request in requests]
    exits = [rows[0]["exit_layer"] for rows in alone]
    assert len(set(exits)) > 1
    for batch_size in (3, 8):
        together = make(wide_model)(requests, exit_confidence=0.75, batch_size=batch_size)
        assert [rows[0]["exit_layer"] for rows in together] == exits
        for rows, others in zip(together, alone):
            assert scores(rows) == pytest.approx(scores(others), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("keep", [False, True])
def test_layers_after_the_exit_are_not_run_and_none_twice(wide_model, keep, monkeypatch):
    monkeypatch.setattr(network_m6rec, "TOGETHER", 0)
    requests = [{"user": word, "history": WORDS[:4], "candidates": [word, "tent"]} for word in WORDS]
    exits = [rows[0]["exit_layer"] for rows in make(wide_model)(requests, exit_confidence=0.75, batch_size=8)]
    layers = len(wide_model.model.layers)
    for number in (1, 2, 3):
        seen, _ = count_tokens(
            wide_model,
            layers - 4 + number,
            lambda: make(wide_model, user_states=keep)(requests, exit_confidence=0.75, batch_size=8),
        )
        going = sum(last >= number for last in exits)
        # A source and two candidates each; users that are kept are read to the end.
        assert sum(rows for rows, _ in seen) == (8 if keep else going) + 2 * going


def test_half_is_the_first_exit_and_one_is_the_last(wide_model):
    for sure, layer in ((0.5, 1), (0.1, 1), (1.0, 3), (7, 3)):
        rows = make(wide_model, exit_confidence=sure)(REQUEST)
        assert {row["exit_layer"] for row in rows} == {layer}
        assert scores(rows) == pytest.approx(scores(make(wide_model)(REQUEST, exit_layer=layer)), abs=1e-5)
    assert "exit_layer" not in make(wide_model)(REQUEST, exit_layer=1)[0]


def test_explanations_are_those_of_the_exit(wide_model):
    for sure, layer in ((0.5, 1), (1, 3)):
        found = make(wide_model)(REQUEST, exit_confidence=sure, explain=True)
        expected = make(wide_model)(REQUEST, exit_layer=layer, explain=True)
        for row, other in zip(found, expected, strict=True):
            one, two = ({r["event"]: r["contribution"] for r in each["because"]} for each in (row, other))
            assert one == pytest.approx(two, rel=1e-4, abs=1e-5)
    whole, first = (make(wide_model)(REQUEST, exit_layer=layer, explain=True) for layer in (3, 1))
    assert whole[0]["because"][0]["contribution"] != pytest.approx(first[0]["because"][0]["contribution"], abs=1e-4)


def test_many_candidates_are_decided_together(wide_model, monkeypatch):
    many = {**REQUEST, "candidates": [f"{word} {number}" for word in WORDS for number in range(5)]}
    expected = make(wide_model)(many, exit_confidence=0.75)
    monkeypatch.setattr(ranking_m6rec, "TOKENS_AT_ONCE", 200)
    rows = make(wide_model)(many, exit_confidence=0.75)
    assert len({row["exit_layer"] for row in rows}) == 1 and rows[0]["exit_layer"] == expected[0]["exit_layer"]
    assert scores(rows) == pytest.approx(scores(expected), abs=1e-5)


def test_confidence_by_hand():
    config = build().config
    logits = torch.full((2, 3, config.num_labels), float("nan"))
    logits[0, :2, :2] = torch.tensor([[0.0, 3.0], [1.0, 0.0]])
    logits[1, :, :2] = torch.tensor([0.0, 0.0])
    assert confidence(logits, "click", config).tolist() == pytest.approx([1 / (1 + 2.718281828**-1), 0.5])
    logits[:, :, config.score_slices["interaction"]] = torch.tensor([2.0, -0.5, 9.0])
    assert confidence(logits, "interaction", config).tolist() == pytest.approx([1 / (1 + 2.718281828**-0.5)] * 2)


def test_only_trained_exits_are_asked_and_untrained_ones_warn(caplog):
    model = build(num_joint_layers=3, exit_layers=[2])
    assert make(model)(REQUEST, exit_confidence=0.5)[0]["exit_layer"] == 2
    make(model)(REQUEST, exit_layer=2)
    make(model)(REQUEST, exit_layer=3)
    assert not caplog.records
    make(model)(REQUEST, exit_layer=1)
    assert "exit_layer=1 was not trained for task 'click': exit_layers=[2]" in caplog.text
    caplog.clear()
    assert make(build(num_joint_layers=3))(REQUEST, exit_confidence=0.5)[0]["exit_layer"] == 1
    assert "no joint layer but the last was trained to score" in caplog.text


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"exit_layer": 4}, "exit_layer=4"),
        ({"exit_layer": True}, "exit_layer=True"),
        ({"exit_confidence": 0}, "exit_confidence=0"),
        ({"exit_confidence": "much"}, "exit_confidence='much'"),
        ({"exit_confidence": float("nan")}, "exit_confidence=nan"),
        ({"exit_confidence": 0.9, "exit_layer": 1}, "both say where to stop"),
        ({"exit_confidence": 0.9, "task": "retrieval"}, "'retrieval'"),
        ({"exit_confidence": 0.9, "task": "plausibility"}, "'plausibility'"),
    ],
)
def test_what_cannot_stop_says_why(wide_model, options, match):
    with pytest.raises(ValueError, match=match):
        make(wide_model)(REQUEST, **options)
    if "exit_confidence" in options:
        own = {**REQUEST, "exit_confidence": options.pop("exit_confidence")}
        with pytest.raises(ValueError, match=match):
            make(wide_model)(own, **options)


def test_ratings_that_are_numbers_are_never_sure():
    with pytest.raises(ValueError, match="'rating' are no probabilities"):
        make(build(rating_loss="regression", exit_layers=[1]))(REQUEST, task="rating", exit_confidence=0.9)
