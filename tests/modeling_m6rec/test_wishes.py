"""Requests that are answered together are each answered by their own wishes, exactly as if they came by themselves."""

import random

import pytest
import torch

from m6rec import Catalogue, RecommendationPipeline
from m6rec.catalogue_m6rec import Conditions
from m6rec.item_features_m6rec import Evidence
from tests.modeling_m6rec.shop import ITEMS, build, processor

MODEL, PROCESSOR = build(), processor()
MANY = [
    {"item_id": f"p{n}", "title": f"{ITEMS[n % 8]['title']} {n}", "brand": f"b{n % 5}", "price": n} for n in range(60)
]


def make(evidence=None):
    catalogue = Catalogue.from_dataset(MANY, MODEL, PROCESSOR, evidence=evidence)
    return RecommendationPipeline(model=MODEL, processor=PROCESSOR, device="cpu", catalogue=catalogue)


@pytest.fixture(scope="module")
def recommend():
    return make()


def history(*numbers):
    return {"user": "a man", "history": [{"event": "clicked", "item": {"item_id": f"p{n}"}} for n in numbers]}


def ids(rows):
    return [row["item_id"] for row in rows]


WISHES = [
    {},
    {"top_k": 3},
    {"top_k": 25, "explain": True},
    {"filter": {"brand": "b2"}},
    {"filter": {"brand": ["b1", "b3"], "price": {"min": 10, "max": 30}}, "top_k": 4},
    {"exclude_seen": False, "top_k": 60},
    {"task": "click", "top_k": 5},
    {"block": ["p3", "p9"], "top_k": 8},
    {"block": {"brand": "b0"}},
    {"pin": ["p50", "p7"], "top_k": 6},
    {"boost": {"p20": 5}, "top_k": 3},
    {"boost": [{"where": {"brand": "b4"}, "by": -5}], "top_k": 10},
    {"diversity": 0.7, "top_k": 5},
    {"candidates": [{"item_id": "p1"}, "yoga mat", {"item_id": "p2"}], "block": ["p2"]},
    {"candidates": [{"item_id": "p1"}, {"item_id": "p2"}, "yoga mat"], "task": "click", "pin": "p2", "top_k": 2},
]


@pytest.mark.parametrize("evidence", [None, Evidence(transitions=0.1, words=0.2)])
def test_a_batch_is_answered_as_its_requests_are(evidence):
    recommend = make(evidence)
    recommend.warm(progress=False)
    requests = [{**history(place, place + 1), **own} for place, own in enumerate(WISHES)]
    random.Random(0).shuffle(requests)
    expected = [recommend(request) for request in requests]
    together = recommend(requests, batch_size=len(requests))
    for rows, others in zip(together, expected):
        assert [(row["item"], row.get("item_id")) for row in rows] == [
            (row["item"], row.get("item_id")) for row in others
        ]
        assert [row["score"] for row in rows] == pytest.approx([row["score"] for row in others], abs=1e-5)
        assert [set(row) for row in rows] == [set(row) for row in others]


def test_a_wish_of_a_request_goes_before_that_of_the_call(recommend):
    rows = recommend([history(1), {**history(1), "top_k": 2}, {**history(1), "top_k": None}], top_k=4, batch_size=3)
    assert [len(own) for own in rows] == [4, 2, 4]


@pytest.mark.parametrize("evidence", [None, Evidence(transitions=0.1, words=0.2)])
def test_block_boost_and_pin_are_those_of_the_whole_ranking(evidence):
    recommend = make(evidence)
    asked = history(4, 5)
    whole = recommend(asked, top_k=60)
    scores = {row["item_id"]: row["score"] for row in whole}
    by = {name: (-1.0 if int(name[1:]) % 5 == 4 else 0.0) + (0.3 if name == "p20" else 0.0) for name in scores}
    boost = [{"where": {"brand": "b4"}, "by": -1}, {"where": {"item_id": "p20"}, "by": 0.3}]
    rows = recommend(asked, top_k=12, boost=boost)
    expected = sorted(scores, key=lambda name: -(scores[name] + by[name]))[:12]
    assert ids(rows) == expected
    assert [row["score"] for row in rows] == [scores[name] for name in expected]
    assert {row["item_id"]: row["boost"] for row in rows if "boost" in row} == {
        name: by[name] for name in expected if by[name]
    }
    left = [name for name in scores if name not in ("p8", ids(whole)[0])]
    assert ids(recommend(asked, top_k=7, block=["p8", ids(whole)[0], "unknown"])) == left[:7]
    last = ids(whole)[-1]
    rows = recommend(asked, top_k=3, pin=[last, "p4", "p33"])  # p4 was seen
    assert ids(rows) == [last, "p33", ids(whole)[0]]
    assert [row.get("pinned") for row in rows] == [True, True, None] and rows[0]["score"] == whole[-1]["score"]
    assert ids(recommend(asked, top_k=2, pin=[last], filter={"item_id": ids(whole)[:9]})) == ids(whole)[:2]


def test_diversity_is_maximal_marginal_relevance(recommend):
    whole = recommend(history(1), top_k=60, exclude_seen=False)
    vectors = recommend.catalogue.vectors(ids(whole)).double()
    scores = torch.tensor([row["score"] for row in whole]).double()
    scores = (scores - scores.min()) / (scores.max() - scores.min())
    chosen = [0]
    while len(chosen) < 6:
        worth = 0.4 * scores - 0.6 * (vectors @ vectors[chosen].T).amax(1)
        worth[chosen] = -torch.inf
        chosen.append(int(worth.argmax()))
    rows = recommend(history(1), top_k=6, exclude_seen=False, diversity=0.6)
    assert ids(rows) == [whole[place]["item_id"] for place in chosen] != ids(whole)[:6]
    assert ids(recommend(history(1), top_k=6, exclude_seen=False, diversity=0)) == ids(whole)[:6]


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ({"brand": "x"}, True),
        ({"brand": "X"}, False),
        ({"brand": ["y", "x"]}, True),
        ({"year": 1995}, True),
        ({"year": "1995"}, True),
        ({"year": 1995.0, "brand": "x"}, True),
        ({"year": {"min": 1995, "max": 1995}}, True),
        ({"year": {"min": 1996}}, False),
        ({"price": {"max": 10}}, True),
        ({"tags": "red"}, True),
        ({"tags": ["green"]}, False),
        ({"tags": {"not": "red"}}, False),
        ({"other": {"not": "red"}}, True),
        ({"other": "red"}, False),
        ({"name": {"contains": "HIK"}}, True),
        ({"code": "7"}, False),
        ({"code": "007"}, True),
        ({"new": True}, True),
        ({"new": 1}, False),
        ({"brand": {"min": 1}}, False),
    ],
)
def test_conditions(conditions, expected):
    item = {"brand": "x", "year": "1995", "price": 9.5, "tags": ["red", "blue"], "name": "hiking", "code": "007"}
    assert Conditions(conditions)({**item, "new": True}) is expected


def test_results_of_conditions_are_kept_with_the_state_that_they_describe():
    recommend = make()
    wanted = {"brand": "b2"}
    before = ids(recommend(history(1), filter=wanted, top_k=60))
    recommend.catalogue.remove(before[:1])
    recommend.catalogue.add([{"item_id": "new", "title": "lamp", "brand": "b2"}], MODEL, PROCESSOR)
    after = ids(recommend(history(1), filter=wanted, top_k=60))
    assert sorted(after) == sorted([*before[1:], "new"])


BAD = [
    ({"top_k": 0}, "top_k=0"),
    ({"task": "nothing"}, "nothing"),
    ({"filter": "brand"}, "filter='brand'"),
    ({"filter": {"price": {"above": 3}}}, "above"),
    ({"filter": {"price": {"min": "3"}}}, "min='3'"),
    ({"boost": [{"where": {"brand": "x"}}]}, "boost="),
    ({"boost": {"p1": "much"}}, "much"),
    ({"boost": {"p1": float("nan")}}, "nan"),
    ({"block": {}}, "block="),
    ({"diversity": 2}, "diversity=2"),
    ({"explain": "yes"}, "explain='yes'"),
    ({"pin": [None]}, "pin"),
    ({"history": [{"item": {"item_id": "nobody"}}]}, "nobody"),
    ({"now": []}, "now"),
    ({"unknown": 1}, "unknown"),
    (7, "expected a request"),
]


@pytest.mark.parametrize(("bad", "match"), BAD)
def test_a_bad_request_is_an_error_of_its_own(recommend, bad, match):
    request = {**history(2), **bad} if isinstance(bad, dict) else bad
    requests = [history(1), request, history(3)]
    with pytest.raises((ValueError, TypeError), match=match):
        recommend(requests, batch_size=3)
    first, error, last = recommend(requests, batch_size=3, on_error="return")
    assert set(error) == {"error"} and match in error["error"]
    assert [ids(first), ids(last)] == [ids(recommend(history(1))), ids(recommend(history(3)))]


def test_the_failing_disk_is_no_error_of_a_request(recommend, monkeypatch):
    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr(recommend, "_fitting_catalogue", fail)
    with pytest.raises(OSError, match="no space"):
        recommend([history(1)], on_error="return")


def test_diversity_and_rerank_are_not_both(recommend):
    with pytest.raises(ValueError, match="give one of them"):
        recommend(history(1), diversity=0.5, rerank={"field": "brand", "weight": 0.1})
