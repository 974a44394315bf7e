"""The pipeline's answers are those of the model, however requests come, and its reasons are exact."""

import copy
import itertools

import datasets
import numpy as np
import pandas
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Pipeline

from m6rec import Catalogue, RecommendationPipeline, SegmentCache, pipeline_m6rec, ranking_m6rec
from m6rec.catalogue_m6rec import without_stats
from m6rec.layout_m6rec import layout
from tests.fast import examples
from tests.modeling_m6rec.shop import ITEMS, REQUEST, SOURCE, build, change, processor, tokenizer

MODEL, PROCESSOR = build(), processor()
TASKS = ("click", "rating", "interaction", "retrieval", "plausibility")
SIMPLE = {"user": "a man", "history": ["yoga mat"], "candidates": ["head lamp", "trekking poles", "yoga mat"]}


def make(model=MODEL, processor=PROCESSOR, **more):
    return RecommendationPipeline(model=model, processor=processor, device="cpu", **more)


@pytest.fixture(scope="module")
def catalogue():
    return Catalogue.from_dataset(ITEMS, MODEL, PROCESSOR)


@pytest.fixture(scope="module")
def recommend(catalogue):
    return make(catalogue=catalogue)


def by_hand(request, task, model=MODEL, hide=None, processor=PROCESSOR):
    """One score for each candidate, by one forward call of the flat plan; `hide` is the ordinal of an unseen event."""
    task_of_row = task if task != "retrieval" else "click"  # a row that holds the candidates, too
    batch = processor([request], task_of_row, return_tensors="pt")
    if hide is not None:
        batch["hidden_events"] = layout(batch["input_ids"], None, model.config).event == hide
    with torch.no_grad():
        asked = {"return_plausibility": task == "plausibility", "plausibility_lead": processor.plausibility_lead()}
        out = model(**batch, plan="flat", **asked)
    if task == "plausibility":
        return out.plausibility[0].tolist()
    if task == "retrieval":
        user = out.user_vectors[0]
        user = user[~user.isnan().any(-1)][-1]
        return (out.item_vectors[0, -len(request["candidates"]) :] @ user).tolist()
    scores = model.read_scores(out.scores, task)[0]
    return (scores.mean(-1) if task == "interaction" else scores).tolist()


def scores_in_order(rows, request):
    """Scores of an answer in the order of the candidates, found again by their text."""
    texts = [candidate if isinstance(candidate, str) else candidate["title"] for candidate in request["candidates"]]
    found = [next(row["score"] for row in rows if row["item"].startswith(text)) for text in texts]
    assert len(rows) == len(texts)
    return found


def close(rows, others):
    """The same answers, up to rounding."""
    assert len(rows) == len(others)
    for row, other in zip(rows, others):
        row, other = dict(row), dict(other)
        for name in ("score", "contribution"):
            if name in row:
                assert row.pop(name) == pytest.approx(other.pop(name), rel=1e-5, abs=1e-5)
        close(row.pop("because", []), other.pop("because", []))
        for value, expected in zip(row.pop("interactions", {}).values(), other.pop("interactions", {}).values()):
            assert value == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert row == other


# ------------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("task", TASKS)
def test_scores_are_those_of_the_model(recommend, task):
    rows = recommend(REQUEST, task=task)
    assert scores_in_order(rows, REQUEST) == pytest.approx(by_hand(REQUEST, task), rel=1e-5, abs=1e-5)
    assert [row["rank"] for row in rows] == [1, 2, 3, 4]
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)


def test_rows_say_what_was_ranked(recommend):
    rows = {row["item"]: row for row in recommend(REQUEST)}
    assert "yoga mat" in rows and "item_id" not in rows["yoga mat"] and "because" not in rows["yoga mat"]
    first = next(row for row in rows.values() if row.get("item_id") == "i0")
    assert first["item"] == dict(PROCESSOR.read({"history": [{"item": ITEMS[0]}]}, "retrieval").segments)["item"]
    assert next(row for row in rows.values() if row.get("item_id") == "i4")["item"].startswith("防水登山鞋")


def test_interactions_are_named(recommend):
    for row in recommend(REQUEST, task="interaction"):
        assert list(row["interactions"]) == MODEL.config.interactions
        assert sum(row["interactions"].values()) / 3 == pytest.approx(row["score"])


def test_item_memory_counts(recommend):
    forgetful = make(processor=processor(item_rows=None))
    one, other = (scores_in_order(each(REQUEST), REQUEST) for each in (recommend, forgetful))
    assert max(abs(a - b) for a, b in zip(one, other)) > 1e-4


@pytest.mark.parametrize("task", TASKS)
def test_explanations_are_exact(recommend, task):
    rows = recommend(REQUEST, task=task, explain=True)
    whole, without = by_hand(REQUEST, task), [by_hand(REQUEST, task, hide=event) for event in (1, 2, 3, 4)]
    texts = [row["item"] for row in sorted(rows, key=lambda row: -row["score"])]
    order = sorted(range(4), key=lambda number: -whole[number])
    for text, number in zip(texts, order):
        because = next(row for row in rows if row["item"] == text)["because"]
        values = [reason["contribution"] for reason in because]
        assert values == sorted(values, reverse=True)
        expected = sorted((whole[number] - other[number] for other in without), reverse=True)
        assert values == pytest.approx(expected, rel=1e-4, abs=2e-6)


def test_each_contribution_belongs_to_its_event(recommend):
    row = recommend(REQUEST, explain=True, top_k=1)[0]
    whole = by_hand(REQUEST, "click")
    number = whole.index(max(whole))
    jacket, poles = (PROCESSOR.read({"candidates": [item]}).segments[0][1] for item in (ITEMS[1], ITEMS[3]))
    events = [f"clicked {jacket}", "bought merino hiking socks", "searched winter hiking", f"clicked {poles}"]
    for event, (text, entry) in enumerate(zip(events, REQUEST["history"]), 1):
        reason = next(reason for reason in row["because"] if reason["event"] == text)
        contribution = whole[number] - by_hand(REQUEST, "click", hide=event)[number]
        assert reason["contribution"] == pytest.approx(contribution, rel=1e-4, abs=2e-6)
        item = entry.get("item")
        assert reason.get("item_id") == (item["item_id"] if isinstance(item, dict) else None)


def test_explanations_from_the_catalogue(recommend, catalogue):
    rows = recommend(SOURCE, explain=True, top_k=3)
    asked = {**SOURCE, "candidates": [catalogue.item(row["item_id"]) for row in rows]}
    whole, last = by_hand(asked, "retrieval"), by_hand(asked, "retrieval", hide=4)
    for row, score, without in zip(rows, whole, last):
        assert row["score"] == pytest.approx(score, abs=1e-5)
        reason = next(reason for reason in row["because"] if reason.get("item_id") == "i3")
        assert reason["contribution"] == pytest.approx(score - without, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("short", [{"max_events": 2}, {"max_length": 130}])
def test_dropped_events_leave_the_last_ones(short):
    processed = processor(**short)
    reading = processed.read(REQUEST, "click")
    kept = 4 - reading.dropped.events
    assert 0 < kept < 4
    rows = make(processor=processed)(REQUEST, explain=True)
    assert scores_in_order(rows, REQUEST) == pytest.approx(by_hand(REQUEST, "click", processor=processed), abs=1e-5)
    for row in rows:
        found = {reason["event"].split()[0]: reason.get("item_id") for reason in row["because"]}
        assert len(row["because"]) == kept and found["clicked"] == "i3"


# ------------------------------------------------------------------------------------------- how requests come and go

MIXED = [REQUEST, SIMPLE, SOURCE, "a man", {**SIMPLE, "candidates": []}, {**SIMPLE, "history": []}, REQUEST]


@pytest.mark.parametrize("batch_size", (1, 2, 3, 8))
def test_any_batch_size_gives_the_same(recommend, batch_size):
    for options in ({}, {"explain": True, "top_k": 2}):
        alone = [recommend(request, **options) for request in MIXED]
        together = recommend(MIXED, batch_size=batch_size, **options)
        assert len(together) == len(alone)
        for rows, others in zip(together, alone):
            close(rows, others)


def test_any_collection_will_do(recommend):
    requests = [REQUEST, SOURCE, REQUEST]
    expected = recommend(requests)
    plain = [SIMPLE, {"user": "a man"}]
    table, flat = datasets.Dataset.from_list(plain), recommend(plain)
    for batch_size in (1, 2):
        for rows, others in zip(recommend((each for each in requests), batch_size=batch_size), expected, strict=True):
            close(rows, others)
        forms = [table, table.to_iterable_dataset(), table.to_iterable_dataset().with_format("torch")]
        forms += [pandas.DataFrame(plain), tuple(plain)]
        for form in forms:
            for rows, others in zip(recommend(form, batch_size=batch_size), flat, strict=True):
                close(rows, others)
    assert recommend([]) == [] and list(recommend(each for each in ())) == []


def test_generators_are_read_lazily(recommend):
    seen = []

    def endless():
        for number in itertools.count():
            seen.append(number)
            yield {**SIMPLE, "user": f"man {number}"}

    stream = iter(recommend(endless()))
    next(stream)
    next(stream)
    assert len(seen) <= 4


def test_numbers_may_be_tensors(recommend):
    timed = {**SIMPLE, "history": [{"item": "yoga mat", "timestamp": 100}], "now": {"timestamp": 90000}}
    tensors = copy.deepcopy(timed)
    tensors["history"][0]["timestamp"] = torch.tensor(100)
    close(recommend(tensors), recommend(timed))


def test_small_batches_within_give_the_same(recommend, monkeypatch):
    expected = recommend([REQUEST, SIMPLE], explain=True)
    monkeypatch.setattr(ranking_m6rec, "TARGETS_A_ROW", 2)
    monkeypatch.setattr(ranking_m6rec, "TOKENS_AT_ONCE", 200)
    for rows, others in zip(recommend([REQUEST, SIMPLE], explain=True, batch_size=2), expected):
        close(rows, others)


@settings(max_examples=examples(25), deadline=None)
@given(st.permutations(range(6)), st.integers(0, 5), st.sampled_from(TASKS))
def test_other_candidates_and_their_order_change_no_score(recommend, order, left_out, task):
    candidates = [ITEMS[0], "yoga mat", ITEMS[4], "a red tent", "lamp", {"title": "boots", "stats": "rare"}]
    whole = recommend({**SOURCE, "candidates": candidates}, task=task)
    scores = {row["item"]: row["score"] for row in whole}
    part = [candidates[number] for number in order if number != left_out]
    found = {row["item"]: row["score"] for row in recommend({**SOURCE, "candidates": part}, task=task)}
    assert len(found) == 5
    assert found == pytest.approx({item: scores[item] for item in found}, rel=1e-5, abs=1e-5)


def test_equal_candidates_keep_their_order(recommend):
    same = [{"item_id": number, "title": "tent"} for number in range(60)]
    rows = recommend({**SOURCE, "candidates": same}, task="retrieval")
    assert [row["item_id"] for row in rows] == list(range(60))


# ------------------------------------------------------------------------------------------- which items, by what task


def test_without_candidates_the_catalogue_is_searched(recommend, catalogue):
    rows = recommend(SOURCE, top_k=99)
    assert {row["item_id"] for row in rows} == {item["item_id"] for item in ITEMS} - {"i1", "i3"}
    asked = {**SOURCE, "candidates": [catalogue.item(row["item_id"]) for row in rows]}
    assert [row["score"] for row in rows] == pytest.approx(by_hand(asked, "retrieval"), abs=1e-5)
    assert len(recommend(SOURCE, top_k=99, exclude_seen=False)) == len(ITEMS)


@pytest.mark.parametrize("task", ["click", "plausibility"])
def test_any_task_ranks_the_catalogue(recommend, task):
    rows = recommend(SOURCE, task=task, filter=lambda fields: fields["price"] > 20)
    kept = [item for item in ITEMS if item["price"] > 20 and item["item_id"] not in ("i1", "i3")]
    close(rows, recommend({**SOURCE, "candidates": kept}, task=task))


def test_what_was_seen_is_left_out_by_id_else_by_text():
    catalogue = Catalogue.from_dataset(["head lamp", "tent", "stove"], MODEL, PROCESSOR)
    recommend = make(catalogue=catalogue)
    request = {"history": [" tent ", {"event": "clicked", "item": {"item_id": 2, "title": "another wording"}}]}
    assert [row["item_id"] for row in recommend(request)] == ["0"]
    catalogue.add(["tent"], MODEL, PROCESSOR)
    assert [row["item_id"] for row in recommend(request)] == ["0"]
    catalogue.remove(["1"])
    assert [row["item_id"] for row in recommend(request)] == ["0"]

    history = ["yoga mat", {"item": ITEMS[1]}, {"event": "searched", "query": "lamp"}]
    candidates = ["yoga mat", {"item_id": "x", "title": "yoga mat"}, {**ITEMS[1], "title": "changed"}, ITEMS[2], "tent"]
    shown = {"history": history, "candidates": [*candidates, {"title": ITEMS[1]["title"]}]}
    left = [row["item"] for row in recommend(shown, exclude_seen=True)]
    assert left == ["tent"]
    assert len(recommend(shown)) == 6


def test_filter_reads_fields(recommend):
    asked = []

    def cheap(fields):
        asked.append(fields)
        return fields.get("price", 0) < 1

    rows = recommend(REQUEST, filter=cheap)
    assert sorted(row["item"] for row in rows)[0] == "a red tent" and len(rows) == 3
    assert asked == [ITEMS[0], {"item": "yoga mat"}, {**ITEMS[4], "stats": "bought often"}, {"item": "a red tent"}]
    assert [row["item_id"] for row in recommend(SOURCE, filter=lambda fields: fields["item_id"] == "i5")] == ["i5"]


def test_an_item_of_the_catalogue_is_seen_by_its_name_and_all_that_both_say():
    films = [
        {"item_id": "a", "title": "Dune", "year": 1984, "genres": "Sci-Fi"},
        {"item_id": "b", "title": "Dune", "year": 2021},
        {"item_id": "c", "title": "Robot Dreams", "year": 2023},
        {"item_id": "3", "title": "Alien"},
    ]
    recommend = make(catalogue=Catalogue.from_dataset(films, MODEL, PROCESSOR))
    text = PROCESSOR.item_texts(films)[2]
    for item, seen in [
        ({"title": "Robot Dreams"}, "c"),
        ({"title": " Robot Dreams ", "director": "Berger"}, "c"),
        ({"title": "Robot Dreams", "year": 2022}, ""),
        ({"title": "Robot Dreams", "item_id": "elsewhere"}, ""),
        ("Robot Dreams", "c"),
        (text, "c"),
        ({"title": "Dune"}, "ab"),
        ({"title": "Dune", "year": 2021}, "b"),
        ("Alien", "3"),
        ("robots", ""),
    ]:
        request = {"history": [{"event": "rate", "item": item, "rating": 4}]}
        left = {row["item_id"] for row in recommend(request)}
        assert left == {*"abc3"}.difference(seen), item
        rows = recommend({**request, "candidates": films}, exclude_seen=True, task="click")
        assert {row["item_id"] for row in rows} == left, item


def test_an_item_of_a_catalogue_of_texts_is_the_same_by_its_id():
    recommend = make(catalogue=Catalogue.from_dataset(["red shoe", "blue hat", "tent"], MODEL, PROCESSOR))
    for task in TASKS:
        rows = recommend({"user": "x", "candidates": [{"item_id": "0"}, "red shoe"]}, task=task)
        assert [row["item"] for row in rows] == ["red shoe"] * 2 and rows[0]["score"] == pytest.approx(rows[1]["score"])
        assert {row.get("item_id") for row in rows} == {"0", None}
    by_id, by_text = ({"history": [{"item": item}, "mat"]} for item in ({"item_id": 1}, "blue hat"))
    rows = recommend(by_id, explain=True)
    assert [row["score"] for row in rows] == [row["score"] for row in recommend(by_text)]
    assert {row["item_id"] for row in rows} == {"0", "2"}
    assert {reason.get("item_id") for reason in rows[0]["because"]} == {"1", None}
    fields = []
    recommend({"candidates": [{"item_id": "2"}]}, filter=lambda own: fields.append(own) or True)
    assert fields == [{"item_id": "2", "item": "tent"}]
    with pytest.raises(ValueError, match=r"candidates\[0\]\.stats: item '0' of the catalogue is a text"):
        recommend({"candidates": [{"item_id": "0", "stats": "rare"}]})


@pytest.mark.parametrize(
    ("request_", "place"),
    [
        ({"history": ["i5", "i7"]}, "history[0]"),
        ({"history": [{"item": "a tent"}, {"item": " i5 "}]}, "history[1].item"),
        ({"candidates": ["mat", "i5"]}, "candidates[1]"),
        ({"history": ["i99", "mat"]}, None),
    ],
)
def test_a_bare_id_is_read_as_words_and_that_is_said_once(catalogue, monkeypatch, request_, place):
    said = []
    monkeypatch.setattr(pipeline_m6rec.logger, "warning", said.append)
    recommend = make(catalogue=catalogue)
    first = recommend(request_)
    assert recommend(request_) == first and len(said) == (place is not None)
    assert not place or said[0].startswith(f"{place}: the text ") and "{'item_id': " in said[0]


def test_what_retrieval_does_not_read_is_said(catalogue, monkeypatch):
    said = []
    monkeypatch.setattr(ranking_m6rec.logger, "warning_once", said.append)
    recommend = make(catalogue=catalogue)
    quiet = {"history": ["yoga mat"], "facts": ["likes tents"]}
    recommend(quiet)
    recommend({**REQUEST, "candidates": ["tent"]}, task="click")
    assert not said
    recommend({**quiet, "now": "May"})
    recommend({"facts": ["likes tents"]})
    recommend({"user": "a", "candidates": [{"title": "tent", "stats": "rare"}]}, task="retrieval")
    assert ["`now`" in said[0], "`facts`" in said[1], "`stats`" in said[2], len(said)] == [True, True, True, 3]
    open_model = build(history_attention="bidirectional")
    both = make(open_model, catalogue=Catalogue.from_dataset(ITEMS, open_model, PROCESSOR))
    scores = [both({**quiet, "now": now})[0]["score"] for now in ("May", "a cold night")]
    assert len(said) == 3 and scores[0] != scores[1], "there it is read"


class Untouched(list):
    """A list that is only counted."""

    def __iter__(self):
        raise AssertionError("too many entries were read")


def test_long_and_deep_requests_are_cut_or_refused(recommend):
    for request in ({"history": ["字" * 2000]}, {"user": "x", "candidates": ["字" * 2000, {"title": "字" * 2000}]}):
        rows = recommend(request, explain=True)
        assert rows and all(row["score"] == row["score"] for row in rows)
    deep: list = []
    deep.append(deep)
    for wrong in ({"user": {"a": deep}}, {"history": deep}, {"history": Untouched(["a"] * 10**6)}):
        with pytest.raises((ValueError, TypeError), match=r"request: lists and mappings|limit is 100,000"):
            recommend(wrong)


def test_top_k(recommend):
    assert len(recommend(REQUEST, top_k=np.int64(2))) == len(recommend(SOURCE, top_k=np.uint8(2))) == 2
    assert len(recommend(REQUEST)) == 4
    assert recommend(REQUEST, top_k=2) == recommend(REQUEST)[:2]
    assert len(recommend(REQUEST, top_k=9)) == 4
    assert len(make(catalogue=recommend.catalogue, top_k=3)(SOURCE)) == 3


def test_a_new_item_is_recommended_straight_after_add():
    recommend = make(catalogue=Catalogue.from_dataset(ITEMS, MODEL, PROCESSOR))
    before = {row["item_id"]: row["score"] for row in recommend(SOURCE, top_k=99)}
    recommend.catalogue.add([{"item_id": "new", "title": "camping stove"}], MODEL, PROCESSOR)
    after = {row["item_id"]: row["score"] for row in recommend(SOURCE, top_k=99)}
    assert after.pop("new") and after == before


@pytest.mark.parametrize(
    ("trained", "with_candidates"),
    [
        (None, "click"),
        (["rating", "retrieval"], "rating"),
        (["writing", "retrieval"], "retrieval"),
        (["interaction"], "interaction"),
        (["writing"], "plausibility"),
    ],
)
def test_the_task_is_chosen_by_what_was_trained(caplog, trained, with_candidates):
    model = build()
    model.config.trained_tasks = trained
    recommend = make(model)
    request = {**REQUEST, "now": None, "candidates": [*map(without_stats, REQUEST["candidates"])]}
    close(recommend(request), recommend(request, task=with_candidates))
    assert not caplog.records


def test_an_untrained_task_warns_once_and_answers(caplog):
    model = build()
    model.config.trained_tasks = ["rating"]
    recommend = make(model)
    assert len(recommend(REQUEST, task="click")) == len(recommend(REQUEST, task="click")) == 4
    assert [record.getMessage() for record in caplog.records] == [
        "task 'click' is not among those that this model was trained for: ['rating']"
    ]


# ------------------------------------------------------------------------------------------------------ model's states


def test_a_model_in_training_is_read_without_drop_out():
    model = build(hidden_dropout=0.5)
    expected = make(model)(REQUEST)
    model.train()
    assert make(model)(REQUEST) == expected and model.training


def test_the_segment_cache_is_used_and_forgets_other_weights():
    model, cache = build(), SegmentCache()
    recommend = make(model, segment_cache=cache)
    recommend(REQUEST)
    read = cache.misses
    recommend(REQUEST)
    assert cache.misses == read and cache.hits >= read > 0
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    assert scores_in_order(recommend(REQUEST), REQUEST) == pytest.approx(by_hand(REQUEST, "click", model), abs=1e-5)


def test_a_stale_catalogue_is_refused():
    model = build()
    recommend = make(model, catalogue=Catalogue.from_dataset(ITEMS, model, PROCESSOR))
    recommend(SOURCE)
    change(model)
    with pytest.raises(ValueError, match=r"catalogue\.encode"):
        recommend(SOURCE)
    assert recommend(REQUEST)
    recommend.catalogue.encode(model, PROCESSOR)
    assert recommend(SOURCE)


def test_a_catalogue_of_another_model_is_refused_at_once(tmp_path):
    Catalogue.from_dataset(ITEMS, build(seed=1), PROCESSOR).save(tmp_path / "catalogue")
    with pytest.raises(ValueError, match="fingerprint"):
        make(catalogue=str(tmp_path / "catalogue"))


@pytest.mark.parametrize("kind", ["lora", "prefix", "prompt"])
@pytest.mark.parametrize("task", ["click", "retrieval", "plausibility"])
def test_adapters_take_part(kind, task):
    model = build()
    settings_of = {
        "lora": lambda: peft.LoraConfig(
            task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], init_lora_weights=False
        ),
        "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }
    tuned = peft.get_peft_model(model, settings_of[kind]()).eval()
    if kind == "prefix":
        torch.nn.init.normal_(tuned.prompt_encoder["default"].embedding.weight)
    rows = make(tuned)(REQUEST, task=task, explain=True)
    found = scores_in_order(rows, REQUEST)
    assert found == pytest.approx(by_hand_outermost(tuned, REQUEST, task), rel=1e-5, abs=1e-5)
    assert max(abs(a - b) for a, b in zip(found, by_hand(REQUEST, task))) > 1e-4


def by_hand_outermost(tuned, request, task):
    batch = dict(PROCESSOR([request], "click" if task == "retrieval" else task, return_tensors="pt"))
    with torch.no_grad():
        out = tuned(**batch, return_plausibility=True, plausibility_lead=PROCESSOR.plausibility_lead())
    if task == "plausibility":
        return out.plausibility[0].tolist()
    if task == "click":
        return out.scores[0, :, :2].softmax(-1)[:, 1].tolist()
    user = out.user_vectors[0]
    return (out.item_vectors[0, -4:] @ user[~user.isnan().any(-1)][-1]).tolist()


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("request_", "options", "error", "match"),
    [
        (7, {}, TypeError, "got int"),
        ([SIMPLE, 7], {}, TypeError, r"got int \(7\)"),
        ([[SIMPLE]], {}, TypeError, "got list"),
        ({**SIMPLE, "candidate": []}, {}, ValueError, "'candidate'"),
        ({**SIMPLE, "candidates": [], "candidate": []}, {}, ValueError, "'candidate'"),
        ({**SIMPLE, "candidates": "tent"}, {}, TypeError, "tent"),
        ({**SIMPLE, "candidates": {"title": "tent"}}, {}, TypeError, "got dict"),
        ({**SIMPLE, "candidates": ["tent", 7]}, {}, TypeError, r"candidates\[1\].*int"),
        ({**SIMPLE, "candidates": ["tent", {"item_id": 7}]}, {}, ValueError, "'7' alone says nothing"),
        (
            {**SIMPLE, "candidates": ["tent", {"item_id": 7}]},
            {"task": "retrieval"},
            ValueError,
            "'7' alone says nothing",
        ),
        ({**SIMPLE, "history": "tent"}, {}, TypeError, "history"),
        ({**SIMPLE, "history": [{"item": 7}]}, {"exclude_seen": True}, TypeError, r"history\[0\]"),
        (SOURCE, {}, ValueError, r"candidates.*catalogue"),
        ({**SIMPLE, "candidates": 1e-320}, {"task": "retrieval"}, TypeError, "candidates: expected a list, got float"),
        ({**SIMPLE, "facts": torch.tensor(3)}, {}, TypeError, "facts: expected a list, got int"),
        ({**SIMPLE, "candidates": "a" * 9999}, {"task": "retrieval"}, TypeError, r"got str \('a{10,90}\.\.\.a+'\)$"),
        (
            {**SIMPLE, "candidates": [{"item_id": "9" * 5000}]},
            {},
            ValueError,
            r"^.{,50}item_id '9+\.\.\.9+' alone.{,150}$",
        ),
        (SIMPLE, {"task": "writing"}, ValueError, "'writing'"),
        (SIMPLE, {"top_k": 0}, ValueError, "top_k=0"),
        (SIMPLE, {"top_k": True}, ValueError, "top_k=True"),
        (SIMPLE, {"filter": "cheap"}, TypeError, "'cheap'"),
        (SIMPLE, {"topk": 3}, TypeError, "'topk'"),
    ],
)
def test_what_cannot_be_answered_says_why(request_, options, error, match):
    with pytest.raises(error, match=match):
        make()(request_, **options)


def test_the_library_visits_no_values_of_requests_and_answers(monkeypatch):
    """It moves tensors within lists and mappings to the device, one value at a time: seconds for a long request."""
    visited, visit = [], Pipeline._ensure_tensor_on_device

    def watch(self, inputs, device):
        visited.append(inputs)
        return visit(self, inputs, device)

    monkeypatch.setattr(Pipeline, "_ensure_tensor_on_device", watch)
    recommend = make()
    found = recommend([SIMPLE, {**SIMPLE, "candidates": ["tent"] * 100}], batch_size=2)
    assert [len(answer) for answer in found] == [len(SIMPLE["candidates"]), 100] and 4 <= len(visited) < 20
    assert len(recommend({**SIMPLE, "candidates": ["tent"] * 100})) == 100 and len(visited) < 30


@pytest.mark.parametrize(
    "name", ["task", "top_k", "exclude_seen", "explain", "filter", "exit_layer", "exit_confidence"]
)
def test_an_error_shortens_the_value_of_a_parameter(name):
    with pytest.raises((TypeError, ValueError), match=f"{name}=") as caught:
        make()(SIMPLE, **{name: [{"title": "mat"}] * 1000})
    assert len(str(caught.value)) < 300


def test_retrieval_needs_segment_layers():
    model = build(num_joint_layers=4)
    assert len(make(model)(REQUEST)) == 4
    with pytest.raises(ValueError, match="segment layers"):
        make(model)(REQUEST, task="retrieval")


def test_a_processor_of_another_model_is_refused():
    model = build()
    model.config.eos_token_id = 5
    with pytest.raises(ValueError, match=r"eos_token_id=6.*eos_token_id=5"):
        make(model)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(ITEMS[0]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["item", "title", "event"]), inner),
    max_leaves=5,
)
REQUESTS = st.dictionaries(st.sampled_from([*REQUEST, "facts", "text", "x"]), VALUES, max_size=4) | VALUES


@settings(max_examples=examples(150), deadline=None)
@given(REQUESTS, st.sampled_from([None, *TASKS]), st.booleans())
def test_whatever_is_asked_ends_in_an_error_or_an_answer(recommend, request, task, flag):
    try:
        rows = recommend(request, task=task, exclude_seen=flag, explain=flag)
    except (TypeError, ValueError) as error:
        assert len(str(error)) > 10
        return
    for answer in rows if isinstance(request, list) else [rows]:
        for row in answer:
            assert row["score"] == row["score"] and row["item"]


def test_the_tokenizer_is_the_processors(recommend):
    assert recommend.tokenizer is tokenizer()


def test_items_of_the_catalogue_may_be_given_by_their_id_alone(recommend, catalogue):
    first, second, third = list(catalogue)[:3]
    by_id = {"history": [{"item": {"item_id": first}}], "candidates": [{"item_id": second}, {"item_id": third}]}
    whole = {
        "history": [{"item": catalogue.fields(first)}],
        "candidates": [catalogue.fields(second), catalogue.fields(third)],
    }
    assert recommend(by_id) == recommend(whole)
    del by_id["candidates"], whole["candidates"]
    found = recommend(by_id, explain=True)
    assert found == recommend(whole, explain=True) and first not in [row["item_id"] for row in found]
    with pytest.raises(ValueError, match="'nowhere' alone says nothing"):
        recommend({"history": [{"item": {"item_id": "nowhere"}}]})
    assert by_id["history"] == [{"item": {"item_id": first}}]
