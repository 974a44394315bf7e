import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m6rec.train.metrics import (
    coverage,
    mrr,
    ndcg_at_k,
    popularity_bias,
    ranking_report,
    recall_at_k,
    target_ranks,
    top_items,
)


@st.composite
def worlds(draw):
    """Scores with many ties and some -inf, a target and seen items a user."""
    users, items = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    score = st.sampled_from([-np.inf, -1.0, 0.0, 0.25, 2.0])
    column = st.integers(0, items - 1)
    rows = [
        (draw(st.lists(score, min_size=items, max_size=items)), draw(column), draw(st.lists(column, max_size=items)))
        for _ in range(users)
    ]
    scores, targets, seen = zip(*rows)
    return [list(row) for row in scores], list(targets), [list(row) for row in seen]


def slow_rank(scores, target, seen):
    if target in seen:
        return np.inf
    rank = 1.0
    for item, score in enumerate(scores):
        if item == target or item in seen:
            continue
        if score > scores[target]:
            rank += 1
        elif score == scores[target]:
            rank += 0.5
    return rank


@given(worlds())
def test_ranks_equal_the_loop(world):
    scores, targets, seen = world
    expected = [slow_rank(*row) for row in zip(scores, targets, seen)]
    assert target_ranks(scores, targets, seen).tolist() == expected
    without = [slow_rank(row, target, []) for row, target in zip(scores, targets)]
    assert target_ranks(np.array(scores, dtype=np.float32), np.array(targets)).tolist() == without


@given(worlds(), st.randoms(use_true_random=False))
def test_ranks_do_not_depend_on_where_items_are_stored(world, random):
    scores, targets, seen = world
    order = list(range(len(scores[0])))
    random.shuffle(order)
    moved = [[row[old] for old in order] for row in scores]
    ranks = target_ranks(moved, [order.index(t) for t in targets], [[order.index(i) for i in row] for row in seen])
    assert ranks.tolist() == target_ranks(scores, targets, seen).tolist()


def test_equal_scores_stand_in_the_middle():
    assert target_ranks(np.zeros((2, 9)), [0, 8]).tolist() == [5.0, 5.0]


def test_ranks_by_hand():
    scores = [[0.9, 0.5, 0.1, -np.inf], [-np.inf, -np.inf, 0.3, -np.inf]]
    assert target_ranks(scores, [2, 1]).tolist() == [3.0, 1 + 1 + 2 / 2]
    assert target_ranks(scores, [2, 1], [[0], [2]]).tolist() == [2.0, 1 + 0 + 2 / 2]
    assert target_ranks(scores, [2, 1], np.array([[0, 1], [0, 0]])).tolist() == [1.0, 1 + 1 + 1 / 2]


def test_an_excluded_target_is_a_miss_of_every_metric():
    scores = [[0.9, 0.5, 0.1], [0.9, 0.5, 0.1]]
    ranks = target_ranks(scores, [0, 0], [[0, 1], [1]])
    assert ranks.tolist() == [np.inf, 1.0]
    assert (recall_at_k(ranks, 3), ndcg_at_k(ranks, 3), mrr(ranks)) == (0.5, 0.5, 0.5)
    assert [row.tolist() for row in top_items(scores, 3, [[0, 1], [1]])] == [[2], [0, 2]]


def test_ranks_of_one_user_and_of_none():
    assert target_ranks([[3, 1, 2]], [2.0]).tolist() == [2.0]
    assert target_ranks(np.empty((0, 3)), []).tolist() == []


@pytest.mark.parametrize(
    ("scores", "targets", "excluded", "message"),
    [
        ([[0.1, np.nan]], [0], None, r"scores holds nan at \(0, 1\)"),
        ([0.1, 0.2], [0], None, r"float64 of shape \(2,\)"),
        ([["a", "b"]], [0], None, "<U1 of shape"),
        ([[0.1, 0.2]], [2], None, "targets holds 2.0 at 0"),
        ([[0.1, 0.2]], [-1], None, "targets holds -1.0 at 0"),
        ([[0.1, 0.2]], [0, 1], None, "targets has 2 entries and scores 1"),
        ([[0.1, 0.2]], [0], [[5]], "excluded holds 5.0 at 0"),
        ([[0.1, 0.2]], [0], [[1], [0]], "excluded has 2 entries and scores 1"),
    ],
)
def test_ranks_refuse(scores, targets, excluded, message):
    with pytest.raises(ValueError, match=message):
        target_ranks(scores, targets, excluded)


@given(worlds(), st.integers(1, 9))
def test_top_items_equal_a_sort(world, k):
    scores, _, seen = world
    expected = []
    for row, left_out in zip(scores, seen):
        allowed = [i for i, score in enumerate(row) if score > -np.inf and i not in left_out]
        expected.append(sorted(allowed, key=lambda i: (-row[i], i))[:k])
    assert [row.tolist() for row in top_items(scores, k, seen)] == expected


def test_top_items_without_items_or_users():
    assert top_items(np.empty((0, 4)), 2) == []
    assert [row.tolist() for row in top_items(np.empty((2, 0)), 2)] == [[], []]
    with pytest.raises(ValueError, match="k is 0"):
        top_items([[1.0]], 0)


def test_a_mean_rank_beyond_the_cut_off_does_not_count():
    ranks = [1.0, 10.0, 10.5, 30.0]
    assert recall_at_k(ranks, 10) == 2 / 4
    assert ndcg_at_k(ranks, 10) == pytest.approx((1 + 1 / math.log2(11)) / 4)
    assert ndcg_at_k([1.5, 1.5], 5) == pytest.approx(1 / math.log2(2.5))
    assert mrr([1.5, 4.0]) == pytest.approx((2 / 3 + 1 / 4) / 2)


@given(st.lists(st.integers(2, 80).map(lambda n: n / 2), min_size=1, max_size=20), st.integers(1, 30))
def test_figures_equal_the_loop(ranks, k):
    hits = gain = reciprocal = 0.0
    for rank in ranks:
        reciprocal += 1 / rank
        if rank <= k:
            hits += 1
            gain += 1 / math.log2(rank + 1)
    figures = [recall_at_k(ranks, k), ndcg_at_k(ranks, k), mrr(ranks)]
    assert figures == pytest.approx([x / len(ranks) for x in (hits, gain, reciprocal)])


@pytest.mark.parametrize(
    ("ranks", "k", "message"),
    [
        ([], 5, "ranks is empty"),
        ([1, np.nan], 5, "ranks holds nan at 1"),
        ([3, 0], 5, "ranks holds 0.0 at 1"),
        ([1], 0, "k is 0"),
        ([1], 2.5, "k is 2.5"),
    ],
)
@pytest.mark.parametrize("metric", [recall_at_k, ndcg_at_k, lambda ranks, k: ranking_report(ranks, [k])])
def test_figures_refuse(metric, ranks, k, message):
    with pytest.raises(ValueError, match=message):
        metric(ranks, k)


def test_mrr_refuses():
    with pytest.raises(ValueError, match=r"ranks holds 0.5 at 0"):
        mrr([0.5])


def test_report_keeps_subsets_apart():
    ranks = np.array([1.0, 3.0, 20.0, 2.0])
    warm = np.array([True, True, False, False])
    report = ranking_report(ranks, ks=(2, 5), subsets={"warm": warm, "cold": ~warm, "nobody": warm & ~warm})
    assert report == {
        "recall@2": 2 / 4,
        "ndcg@2": pytest.approx((1 + 1 / math.log2(3)) / 4),
        "recall@5": 3 / 4,
        "ndcg@5": pytest.approx((1 + 1 / 2 + 1 / math.log2(3)) / 4),
        "mrr": pytest.approx((1 + 1 / 3 + 1 / 20 + 1 / 2) / 4),
        "examples": 4,
        "warm/recall@2": 1 / 2,
        "warm/ndcg@2": 1 / 2,
        "warm/recall@5": 2 / 2,
        "warm/ndcg@5": pytest.approx((1 + 1 / 2) / 2),
        "warm/mrr": pytest.approx((1 + 1 / 3) / 2),
        "warm/examples": 2,
        "cold/recall@2": 1 / 2,
        "cold/ndcg@2": pytest.approx(1 / math.log2(3) / 2),
        "cold/recall@5": 1 / 2,
        "cold/ndcg@5": pytest.approx(1 / math.log2(3) / 2),
        "cold/mrr": pytest.approx((1 / 20 + 1 / 2) / 2),
        "cold/examples": 2,
    }
    assert json.loads(json.dumps(report)) == report


@pytest.mark.parametrize("mask", [[True], [0, 1], [[True, False]]])
def test_report_refuses_what_is_no_mask(mask):
    with pytest.raises(
        ValueError, match=r"subset 'cold' is (bool|int64) of shape \(.*\); expected a bool for each of 2"
    ):
        ranking_report([1, 2], subsets={"cold": mask})


def test_coverage_counts_an_item_once():
    assert coverage(np.array([[0, 1], [1, 0], [4, 1]]), 10) == 3 / 10
    assert coverage([[0], [], [2, 3]], 4) == 3 / 4
    assert coverage([[]], 4) == 0.0


@pytest.mark.parametrize(
    ("lists", "items", "message"),
    [([], 3, "recommended is empty"), ([[-1]], 3, "recommended holds -1.0"), ([[0]], 0, "num_items is 0")],
)
def test_coverage_refuses(lists, items, message):
    with pytest.raises(ValueError, match=message):
        coverage(lists, items)


def test_popularity_bias_by_hand():
    popularity = [10, 4, 2, 0]
    assert popularity_bias([[0], [0]], popularity) == pytest.approx(10 / 4 - 1)
    assert popularity_bias([[3, 2], [1]], popularity) == pytest.approx(((0 + 2) / 2 + 4) / 2 / 4 - 1)
    assert popularity_bias([[0, 1, 2, 3]], popularity) == pytest.approx(0)
    # Users weigh the same whatever the length of their list, and one without a list does not weigh.
    assert popularity_bias([[0], [], [1, 1, 1]], popularity) == pytest.approx((10 + 4) / 2 / 4 - 1)


@given(worlds(), st.integers(2, 1000))
def test_popularity_bias_is_a_ratio(world, factor):
    _, _, lists = world
    popularity = np.arange(1, 8)
    if any(lists):
        means = [np.mean(popularity[row]) for row in lists if row]
        expected = np.mean(means) / 4 - 1
        assert popularity_bias(lists, popularity) == pytest.approx(expected)
        assert popularity_bias(lists, popularity * factor) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("lists", "popularity", "message"),
    [
        ([], [1, 2], "recommended is empty"),
        ([[], []], [1, 2], "recommended holds 2 empty lists"),
        ([[2]], [1, 2], "recommended holds 2.0"),
        ([[0]], [1, -2], "popularity holds -2.0 at 1"),
        ([[0]], [1, np.inf], "popularity holds inf at 1"),
        ([[0]], [0, 0], "popularity is 0 for every item"),
    ],
)
def test_popularity_bias_refuses(lists, popularity, message):
    with pytest.raises(ValueError, match=message):
        popularity_bias(lists, popularity)
