"""Baselines against arithmetic by hand and dense twins."""

import math
import re
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m6rec.item_features_m6rec import Evidence, Sparse, Transitions, Words, recent
from m6rec.train.evaluation import baselines
from m6rec.train.evaluation.baselines import (
    Ease,
    LastItems,
    Met,
    RecentPopularity,
    SimilarText,
    met_together,
    popularity_scores,
)
from m6rec.train.rows.item_likes import like_rates
from m6rec.values_m6rec import WORD
from tests.fast import examples

words = st.lists(st.sampled_from(["red", "Shoe", "tea", "1999", "靴", "子", "é"]), max_size=6).map(" ".join)


def dense_scores(texts, histories):
    """The same with dictionaries and loops."""
    bags = []
    for text in texts:
        found = re.findall(r"[a-z0-9é]+|[靴子]", text.lower())
        bags.append({word: found.count(word) for word in found})
    size = len(texts)
    rarity = {word: math.log((1 + size) / (1 + sum(word in bag for bag in bags))) for bag in bags for word in bag}
    vectors = [{word: (1 + math.log(count)) * rarity[word] for word, count in bag.items()} for bag in bags]
    norms = [math.sqrt(sum(value**2 for value in vector.values())) or 1 for vector in vectors]
    vectors = [{word: value / norm for word, value in vector.items()} for vector, norm in zip(vectors, norms)]

    def dot(one, other):
        return sum(value * vectors[other].get(word, 0) for word, value in vectors[one].items())

    return [
        [sum(dot(met, item) for met in history) / max(len(history), 1) for item in range(size)] for history in histories
    ]


def test_three_texts_by_hand():
    # tea is in two of three texts, the others in one: idf ln(4/3) and ln 2; tf of "green green" is 1 + ln 2.
    common, rare = math.log(4 / 3), math.log(2)
    green = (1 + math.log(2)) * rare
    first, second = math.hypot(common, green), math.hypot(common, rare)
    scores = SimilarText(["green green tea", "tea pot", "shoe"]).scores([[0], [1, 2], []])
    together = common * common / (first * second)
    np.testing.assert_allclose(scores, [[1, together, 0], [together / 2, 0.5, 0.5], [0, 0, 0]], atol=1e-12)


def test_chinese_is_compared_by_characters_and_other_scripts_by_words():
    assert WORD.findall("防水登山鞋 hiking-shoes_2 café кот 코트 がくカ") == [
        *"防水登山鞋",
        *["hiking", "shoes", "2", "café", "кот", "코트"],
        *"がくカ",
    ]
    scores = SimilarText(["登山鞋", "山鞋", "雨衣", "rain"]).scores([[0], [2]])
    # 登 is in one of four texts, 山 and 鞋 in two: ln(5/2) and ln(5/3)
    shared = math.sqrt(2) * math.log(5 / 3)
    np.testing.assert_allclose(scores[0], [1, shared / math.hypot(shared, math.log(5 / 2)), 0, 0])
    np.testing.assert_allclose(scores[1], [0, 0, 1, 0])


@settings(max_examples=examples(60), deadline=None)
@given(st.lists(words, min_size=1, max_size=6), st.data())
def test_similar_text_equals_its_dense_twin(texts, data):
    histories = data.draw(st.lists(st.lists(st.integers(0, len(texts) - 1), max_size=4), max_size=4))
    scores = SimilarText(texts).scores([np.array(history, dtype=int) for history in histories])
    assert scores.shape == (len(histories), len(texts))
    if histories:
        np.testing.assert_allclose(scores, dense_scores(texts, histories), atol=1e-9)


def test_nothing_is_said_to_the_user_of_how_it_is_computed():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SimilarText(["a b", "b"]).scores([[0]])


def test_popularity_is_the_same_for_every_user():
    scores = popularity_scores(np.array([3, 0, 7]), 2)
    assert scores.tolist() == [[3, 0, 7], [3, 0, 7]]
    assert popularity_scores(np.array([3]), 0).shape == (0, 1)


@settings(max_examples=examples(60), deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 5)), min_size=1, max_size=12),
    st.lists(st.sampled_from("abcz"), max_size=5),
    st.floats(0.5, 20),
)
def test_rates_are_means_drawn_towards_the_mean_of_all(examples, asked, strength):
    groups, labels = np.array([group for group, _ in examples]), np.array([float(label) for _, label in examples])
    overall = sum(labels) / len(labels)
    wanted = []
    for name in asked:
        own = [label for group, label in examples if group == name]
        wanted.append((sum(own) + strength * overall) / (len(own) + strength))
    found = like_rates(labels, groups, np.array(asked, dtype=object), strength)
    assert found.tolist() == pytest.approx(wanted)


@settings(max_examples=examples(40), deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), min_size=1, max_size=15),
    st.lists(st.integers(0, 12), min_size=1, max_size=5),
)
def test_recent_popularity_counts_what_came_before_by_its_age(events, moments):
    items, times = np.array([item for item, _ in events]), np.array([float(time) for _, time in events])
    found = RecentPopularity(items, times, 4, half_life=2.5).scores_at(np.array(moments, dtype=float))
    for moment, row in zip(moments, found):
        wanted = [sum(2 ** (-(moment - t) / 2.5) for i, t in events if i == item and t <= moment) for item in range(4)]
        assert row == pytest.approx(wanted)


histories = st.lists(st.lists(st.integers(0, 4), max_size=6), max_size=5)


@settings(max_examples=examples(40), deadline=None)
@given(histories, histories, st.sampled_from([0.0, 0.4]), st.sampled_from([0, 10**9]), st.booleans())
def test_last_items_score_alike_with_a_table_and_without(learnt, asked, second, work, share):
    texts = ["red shoes", "blue shoes", "green tea", "tea pot", ""]
    rule = Evidence(steps=(1.0, 0.5, 0.2), recency=(1.0, 0.5), second=second, share_ties=share)
    known, times = ([np.arange(len(each)) // 2 for each in several] for several in (learnt, asked))
    for evidence in (Transitions.fit(learnt, 5, rule, known), Words.of(texts)):
        last = LastItems(evidence, rule)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(baselines, "second_work", lambda _: work)  # a dense product, or pair by pair
            assert last.table is not None
            fast = last.scores(asked, times)
            patch.setattr(baselines, "TABLED", 0)
            slow = LastItems(evidence, rule).scores(asked, times)
            aged = LastItems(evidence, rule).aged((0.0, 2.0)).scores(asked, times)
        assert fast.shape == (len(asked), 5)
        np.testing.assert_allclose(fast, slow, atol=1e-6)
        assert last.aged((0.0, 2.0)).table is last.table
        np.testing.assert_allclose(last.aged((0.0, 2.0)).scores(asked, times), aged, atol=1e-6)
        weights = recent(asked, rule, times).dense(len(asked), 5)
        np.testing.assert_allclose(fast, weights @ last.table, atol=1e-6)


def test_last_items_make_a_table_once_as_many_rows_were_asked_as_it_has(monkeypatch):
    made, several = [], [np.array([0, 1]), np.array([2, 0])]
    monkeypatch.setattr(LastItems, "_all_rows", lambda self: made.append(self) or np.zeros((5, 5), np.float32))
    rule = Evidence(recency=(1.0, 0.5))
    last = LastItems(Transitions.fit([[0, 1, 2]], 5, rule), rule)
    last.scores(several)
    assert not made
    last.aged((1.0,)).scores(several)  # four rows and two
    last.scores(several)
    last.aged((1.0,)).scores(several)
    assert len(made) == 1


@pytest.mark.parametrize("users", [40, 7, 4], ids=["more users", "as many", "fewer users"])
def test_ease_is_the_ridge_regression_of_each_item_on_the_others(users, monkeypatch):
    met = np.random.default_rng(0).random((users, 7)) < 0.4
    sequences = [np.flatnonzero(own) for own in met]
    for cells in (1 << 24, 15):  # all at once, and two by two
        monkeypatch.setattr(baselines, "CELLS_AT_ONCE", cells)
        np.testing.assert_array_equal(met_together(sequences, 7), met.astype(float).T @ met)
    scores = Ease(Met([*sequences[:-1], [*sequences[-1]] * 2], 7), 2.5).scores([np.array([0, 3, 3]), np.array([6]), []])
    weights = np.zeros((7, 7))
    for item in range(7):
        others = np.delete(np.arange(7), item)
        known = met[:, others].astype(float)
        weights[others, item] = np.linalg.solve(known.T @ known + 2.5 * np.eye(6), known.T @ met[:, item])
    np.testing.assert_allclose(scores, [weights[0] + weights[3], weights[6], np.zeros(7)], atol=1e-5)
    met = Met(sequences, 7)
    Ease(met, 100.0)  # models share it
    ease, some = Ease(met, 2.5), np.array([4, 1])
    np.testing.assert_allclose(ease.rows(some), weights[some], atol=1e-5)
    columns = np.array([5, 4, 0])
    np.testing.assert_allclose(ease.rows(some, columns), weights[np.ix_(some, columns)], atol=1e-5)
    shares = Sparse(np.array([0, 0, 1]), np.array([2, 5, 2]), np.array([0.5, 1.0, 3.0]))
    np.testing.assert_allclose(ease.weighed(shares, 2), [0.5 * weights[2] + weights[5], 3 * weights[2]], atol=1e-5)
    monkeypatch.setattr(baselines, "ROWS_AT_ONCE", 3)
    every = Sparse(np.arange(7), np.arange(7), np.ones(7))
    np.testing.assert_allclose(ease.table(6).follow(every, 7).dense(7, 7), weights, atol=1e-5)
    two = ease.table(2).follow(every, 7).dense(7, 7)
    largest = np.sort(np.abs(weights), axis=1)[:, -2:]
    np.testing.assert_allclose(np.sort(np.abs(two), axis=1)[:, -2:], largest, atol=1e-5)
    np.testing.assert_array_equal((two != 0).sum(1), np.minimum((np.abs(weights) > 1e-9).sum(1), 2))
    monkeypatch.setattr(baselines, "EASE_ITEMS", 5)
    with pytest.raises(ValueError, match=r"7 items by .*more than 5 by 5: leave ease out of"):
        Met(sequences, 7)
