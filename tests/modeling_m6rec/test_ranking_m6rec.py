"""What a guard blocks never shortens an answer; a re-ranker moves an item by its weight at most."""

import json
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m6rec import Catalogue, Guard, RecommendationPipeline
from m6rec.item_features_m6rec import Evidence
from m6rec.ranking_m6rec import Reranker
from tests.fast import examples
from tests.modeling_m6rec.shop import ITEMS, REQUEST, SOURCE, build, processor

MODEL, PROCESSOR = build(), processor()
USER = {"history": [{"event": "clicked", "item": ITEMS[1]}]}


@pytest.fixture(scope="module")
def recommend():
    return RecommendationPipeline(
        model=MODEL, processor=PROCESSOR, device="cpu", catalogue=Catalogue.from_dataset(ITEMS, MODEL, PROCESSOR)
    )


def ids(rows):
    return [row.get("item_id") for row in rows]


# --------------------------------------------------------------------------------------------------------------- guard


@pytest.mark.parametrize("task", ["retrieval", "click", "plausibility"])
@pytest.mark.parametrize(
    "blocked", [{"i0", "i5"}, lambda fields: fields["item_id"] in ("i0", "i5"), ["i0", "i5", "unknown"]]
)
def test_blocked_items_never_shorten_an_answer(recommend, task, blocked):
    everything = recommend(USER, task=task, top_k=8)
    rows = recommend(USER, task=task, top_k=4, guard=Guard(block_items=blocked))
    assert ids(rows) == [item_id for item_id in ids(everything) if item_id not in ("i0", "i5")][:4]
    assert [row["rank"] for row in rows] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "blocked", [["i4", "i2"], lambda fields: "yoga" in str(fields) or fields.get("item_id") == "i4"]
)
def test_blocked_candidates_are_not_ranked(recommend, blocked):
    """The candidate "yoga mat" has no id: it is the blocked item i2 by its text."""
    request = {**REQUEST, "candidates": [*REQUEST["candidates"][:2], ITEMS[4], "a red tent"]}
    rows = recommend({**request, "candidates": [ITEMS[0], "a red tent"]}, task="click")
    guarded = recommend(
        {**request, "candidates": [ITEMS[0], {"title": "yoga mat"}, ITEMS[4], "a red tent"]},
        task="click",
        guard=Guard(block_items=blocked),
    )
    assert [row["item"] for row in guarded] == [row["item"] for row in rows]
    assert [row["score"] for row in guarded] == pytest.approx([row["score"] for row in rows], abs=1e-6)


def test_guard_filter_and_seen_items_act_together(recommend):
    outdoor = lambda fields: fields["category"] == "outdoor"  # noqa: E731
    for blocked in (["i0"], lambda fields: fields["item_id"] == "i0"):
        rows = recommend(SOURCE, task="retrieval", filter=outdoor, guard=Guard(block_items=blocked))
        assert set(ids(rows)) == {"i2", "i4", "i6"}
        rows = recommend(USER, task="retrieval", guard=Guard(block_items=blocked))
        assert set(ids(rows)) == {f"i{number}" for number in range(8)} - {"i0", "i1"}


def test_an_index_leaves_blocked_items_out():
    catalogue = Catalogue.from_dataset(ITEMS, MODEL, PROCESSOR)
    catalogue.build_index("flat")
    found = RecommendationPipeline(model=MODEL, processor=PROCESSOR, device="cpu", catalogue=catalogue)
    everything = ids(found(USER, task="retrieval", top_k=8))
    kept = ids(found(USER, task="retrieval", top_k=3, guard=Guard(block_items=everything[:3])))
    assert kept == everything[3:6]


def test_a_guard_may_be_a_default_of_the_pipeline(recommend):
    own = RecommendationPipeline(
        model=MODEL, processor=PROCESSOR, device="cpu", catalogue=recommend.catalogue, guard=Guard(block_items=["i0"])
    )
    assert "i0" not in ids(own(USER, top_k=8))
    assert "i0" in ids(own(USER, top_k=8, guard=None))


@pytest.mark.parametrize(
    ("guard", "text", "reason"),
    [
        (Guard(block_texts=["casino"]), "Our CASINO", "block list: casino"),
        (Guard(block_texts=["casino"]), "Our ca\u200bsino", "block list: casino"),
        (Guard(block_texts=["casino"]), "Our ＣＡＳＩＮＯ", "block list: casino"),
        (Guard(block_texts=["casino"], reasons={"casino": "gambling"}), "casino", "gambling"),
        (Guard(block_texts=[re.compile("Casino")]), "casino", None),
        (Guard(block_texts=lambda text: "too long" if len(text) > 3 else None), "casino", "too long"),
        (Guard(block_texts=lambda text: len(text) > 3), "casino", "block list"),
        (Guard(block_texts=lambda text: ""), "casino", "block list"),
        (Guard(), "casino", None),
    ],
)
def test_texts_are_blocked_with_a_reason(guard, text, reason):
    assert guard.text_reason(text) == reason


def test_items_are_blocked_with_a_reason():
    guard = Guard(block_items=[7, "i1"], reasons={"7": "recalled"})
    assert guard.item_reason({"item_id": "7"}) == guard.item_reason({"item_id": 7}) == "recalled"
    assert guard.item_reason({"item_id": "i1", "title": "x"}) == "block list: i1"
    assert guard.item_reason({"item": "a text"}) is None
    assert Guard(block_items=lambda fields: fields["age"] > 17 and "adult").item_reason({"age": 18}) == "adult"


def test_a_guard_is_read_from_a_file(tmp_path):
    path = tmp_path / "guard.json"
    path.write_text(json.dumps({"block_items": [7], "block_texts": ["bad"], "reasons": {"7": "recalled"}}))
    guard = Guard.load(path)
    assert guard == Guard(block_items=["7"], block_texts=["bad"], reasons={"7": "recalled"})
    assert repr(guard) == repr(Guard.load(path))
    path.write_text("{'block'")
    with pytest.raises(ValueError, match=r"guard\.json is no valid JSON"):
        Guard.load(path)
    path.write_text('{"items": []}')
    with pytest.raises(ValueError, match=r"expected an object with some of block_items, block_texts, reasons"):
        Guard.load(path)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"block_items": "i0"}, TypeError, "block_items='i0': give a list, or a function"),
        ({"block_items": [1.5]}, ValueError, "block_items"),
        ({"block_texts": 3}, TypeError, "block_texts=3"),
        ({"block_texts": ["("]}, ValueError, r"'\(', which is no regular expression"),
        ({"block_texts": [3]}, TypeError, "block_texts holds 3"),
        ({"reasons": {"i0": 3}}, TypeError, "reasons="),
    ],
)
def test_a_wrong_guard_is_refused(arguments, error, match):
    with pytest.raises(error, match=match):
        Guard(**arguments)


# ----------------------------------------------------------------------------------------------------------- re-ranker


def slow_order(rerank, scores, values, top_k):
    """The definition: fill the list from the top, one penalty at a time."""
    pool, chosen = list(range(min(rerank.pool, len(scores)))), []
    while pool and len(chosen) < top_k:
        best = None
        for place in pool:
            if rerank.field == "popularity":
                penalty = rerank.weight * (values[place] or 0)
            else:
                above = [(values[own], 1 / math.log2(rank + 2)) for rank, own in enumerate(chosen)]
                equal = sum(shown for value, shown in above if value is not None and value == values[place])
                penalty = rerank.weight * equal / max(sum(shown for _, shown in above), 1)
            if best is None or scores[place] - penalty > scores[best[0]] - best[1]:
                best = (place, penalty)
        pool.remove(best[0])
        chosen.append(best[0])
    return [*chosen, *range(min(rerank.pool, len(scores)), len(scores))][:top_k]


@settings(max_examples=examples(80), deadline=None)
@given(
    st.lists(st.tuples(st.integers(-20, 20), st.integers(0, 3)), min_size=1, max_size=12),
    st.sampled_from(["popularity", "category"]),
    st.integers(0, 16),
    st.integers(1, 13),
    st.integers(1, 13),
)
def test_a_rerankers_order_is_its_definition_and_bounded(pairs, field, weight, pool, top_k):
    scores = sorted((score / 8 for score, _ in pairs), reverse=True)
    values = [value / 4 if field == "popularity" else value or None for _, value in pairs]
    rerank = Reranker(field, weight / 8, pool)
    found = rerank.order(scores, values, top_k)
    places = [place for place, _ in found]
    assert places == slow_order(rerank, scores, values, min(top_k, len(scores)))
    assert all(0 <= penalty <= rerank.weight for _, penalty in found)
    for rank, place in enumerate(places):
        assert all(scores[passed] - scores[place] <= rerank.weight for passed in set(range(place)) - set(places[:rank]))


def test_reranked_answers_keep_their_scores(recommend):
    plain = recommend(USER, top_k=8)
    assert ids(recommend(USER, top_k=8, rerank={"field": "category", "weight": 0})) == ids(plain)
    counts = {row["item_id"]: 2 ** (9 - row["rank"]) - 1 for row in plain}  # what is first is the most popular
    for top_k in (2, 8):
        rows = recommend(
            USER, top_k=top_k, rerank={"field": "popularity", "weight": 10, "counts": counts}, explain=True
        )
        assert ids(rows) == ids(plain)[::-1][:top_k]
        scores = {row["item_id"]: row["score"] for row in plain}
        for row in rows:
            assert row["score"] == scores[row["item_id"]]
            # counts of one less than powers of two: log(1 + counts) are 8, 7, ... times log 2, of 8 at most
            assert row["penalty"] == pytest.approx(10 * (9 - ids(plain).index(row["item_id"]) - 1) / 8)
            hidden = recommend(
                {**USER, "candidates": [ITEMS[int(row["item_id"][1:])]]}, task="retrieval", explain=True
            )[0]
            assert row["because"][0]["contribution"] == pytest.approx(hidden["because"][0]["contribution"], abs=1e-6)


@pytest.mark.parametrize("task", ["click", "interaction", "retrieval"])
def test_given_candidates_are_reranked_with_their_details(recommend, task):
    request = {**USER, "candidates": ITEMS}
    plain = {row["item_id"]: row for row in recommend(request, task=task)}
    rows = recommend(request, task=task, rerank={"field": "category", "weight": 100}, top_k=6)
    kinds = [ITEMS[int(row["item_id"][1:])]["category"] for row in rows]
    # Exposure 1, then 1 and 0.63, then 1 and 0.63 + 0.5: the kind that was shown less comes next.
    assert kinds[0] == kinds[3] != kinds[1] == kinds[2]
    for row in rows:
        own = plain[row["item_id"]]
        assert row["score"] == pytest.approx(own["score"], abs=1e-6)
        assert row["item"] == own["item"]
        assert row.get("interactions") == pytest.approx(own.get("interactions"))


def test_popularity_is_what_the_evidence_has_counted():
    catalogue = Catalogue.from_dataset(ITEMS, MODEL, PROCESSOR, evidence=Evidence(learnt=1.0))
    events = [("ann", "i3"), ("ann", "i4"), ("bob", "i3")]
    catalogue.observe([{"user_id": user, "item_id": item, "timestamp": 1} for user, item in events])
    assert catalogue.snapshot().event_counts() == {f"i{n}": {3: 2, 4: 1}.get(n, 0) for n in range(8)}
    catalogue.remove(["i0"])
    found = RecommendationPipeline(model=MODEL, processor=PROCESSOR, device="cpu", catalogue=catalogue)
    rows = found(USER, task="retrieval", top_k=7, rerank={"field": "popularity", "weight": 50})
    assert ids(rows)[-2:] == ["i4", "i3"]
    penalties = {row["item_id"]: row["penalty"] for row in rows}
    assert penalties["i3"] == 50
    assert penalties["i4"] == pytest.approx(50 * math.log(2) / math.log(3))
    assert penalties["i5"] == 0


@pytest.mark.parametrize(
    ("rerank", "error", "match"),
    [
        ({"field": "popularity"}, TypeError, "give {'field': ..., 'weight': ...}"),
        ({"field": "x", "weight": 1, "more": 1}, TypeError, "give {'field'"),
        ("popularity", TypeError, "give {'field'"),
        ({"field": "", "weight": 1}, TypeError, "rerank field=''"),
        ({"field": "x", "weight": -1}, ValueError, "rerank weight=-1"),
        ({"field": "x", "weight": math.nan}, ValueError, "rerank weight=nan"),
        ({"field": "x", "weight": 1, "pool": 0}, ValueError, "rerank pool=0"),
        ({"field": "x", "weight": 1, "counts": {}}, TypeError, "rerank counts"),
        ({"field": "popularity", "weight": 1, "counts": {"i0": -1}}, ValueError, "rerank counts of 'i0'"),
        ({"field": "popularity", "weight": 1}, ValueError, "the catalogue has counted no events"),
    ],
)
def test_a_wrong_rerank_is_refused(recommend, rerank, error, match):
    with pytest.raises(error, match=re.escape(match)):
        recommend(USER, rerank=rerank)
    with pytest.raises(TypeError, match="guard="):
        recommend(USER, guard=["i0"])


def test_numbers_of_other_types_are_numbers():
    assert Reranker("popularity", np.float32(0.5), np.int64(3)).order([1.0, 0.9], [1.0, 0.0], 1) == [(1, 0.0)]
