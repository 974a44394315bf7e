"""Counted transitions against a loop over pairs, and the rule that adds words to them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m6rec import item_features_m6rec
from m6rec.item_features_m6rec import Evidence, Sparse, Transitions, Words, recent
from m6rec.train.evaluation.baselines import NeighboursAndWords
from tests.fast import examples

sequences = st.lists(st.lists(st.integers(0, 5), max_size=7), max_size=6)


def slow_matrix(histories, num_items):
    counts = np.zeros((num_items, num_items))
    for history in histories:
        for place, first in enumerate(history):
            for step, weight in ((1, 1.0), (2, 0.7)):
                if place + step < len(history) and history[place + step] != first:
                    counts[first, history[place + step]] += weight
                    counts[history[place + step], first] += weight * 0.5
    out, into = np.maximum(counts.sum(1), 1), np.maximum(counts.sum(0), 1)
    return counts / out[:, None] ** 0.5 / into**0.3


def slow_scores(matrix, histories):
    rows = []
    for history in histories:
        row = np.zeros(len(matrix))
        for item, weight in zip(history[::-1], (1, 0.6, 0.4, 0.3, 0.2)):
            row += weight * (matrix[item] + 0.4 * (matrix @ matrix)[item])
        rows.append(row)
    return np.array(rows).reshape(len(histories), len(matrix))


@settings(max_examples=examples(60), deadline=None)
@given(sequences, sequences, st.sampled_from([1, 3, 1 << 22]), st.sampled_from([0, 8]))
def test_scores_are_those_of_a_loop_however_many_are_added_together(learnt, asked, at_once, table_share):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(item_features_m6rec, "ENTRIES_AT_ONCE", at_once)
        patch.setattr(item_features_m6rec, "TABLE_SHARE", table_share)
        found = Transitions.fit(learnt, 6)
        matrix = slow_matrix(learnt, 6)
        np.testing.assert_allclose(found.matrix(), matrix, atol=1e-8)
        np.testing.assert_allclose(found.scores(asked), slow_scores(matrix, asked), atol=1e-8)
        assert found.scores(asked).shape == (len(asked), 6)


def test_three_purchases_by_hand():
    # Twice 0 then 1, once 2 two steps behind 0 and one behind 1.
    matrix = Transitions.fit([[0, 1, 2], [0, 1]], 4).matrix()
    assert matrix[0, 1] == pytest.approx(2 / (2.7**0.5 * 2.5**0.3))  # in(1) = 2 from 0, and .5 backwards from 2
    assert matrix[2, 0] == pytest.approx(0.35 / (1 * 1.35**0.3))  # out(2) = .85 counts as 1; in(0) = 1 + .35
    assert not matrix[3].any() and not matrix[:, 3].any() and not matrix.diagonal().any()


def test_a_pair_is_counted_within_one_history_only():
    assert not Transitions.fit([[0], [1], [], [2]], 3).matrix().any()
    assert Transitions.fit([], 3).scores([[0, 1], []]).tolist() == [[0] * 3] * 2


def test_the_last_items_count_by_age_and_repeats_add_up():
    rule = Evidence()
    assert recent([[5, 4, 3, 2, 1, 0]], rule).dense(1, 6).tolist() == [[*rule.recency, 0]]
    assert recent([[1, 1], []], rule).dense(2, 2).tolist() == [[0, 1.6], [0, 0]]


@settings(max_examples=examples(60), deadline=None)
@given(sequences, st.data(), st.sampled_from([(1.0,), (1.0, 0.6, 0.1)]))
def test_items_of_one_time_share_their_weights(histories, data, recency):
    rule = Evidence(recency=recency, share_ties=True)
    moments = st.sampled_from([1.0, 2.0, 3.0, float("nan")])
    times = [data.draw(st.lists(moments, min_size=len(each), max_size=len(each))) for each in histories]
    expected = np.zeros((len(histories), 6))
    for user, (history, own) in enumerate(zip(histories, times)):
        ages = range(len(history) - 1, -1, -1)
        weights = [recency[age] if age < len(recency) else 0.0 for age in ages]
        groups = [0] * len(own)
        for place in range(1, len(own)):
            groups[place] = groups[place - 1] + (own[place] != own[place - 1])
        for item, group in zip(history, groups):
            tied = [weight for weight, other in zip(weights, groups) if other == group]
            expected[user, item] += sum(tied) / len(tied)
    np.testing.assert_allclose(recent(histories, rule, times).dense(len(histories), 6), expected, atol=1e-12)
    plain = recent(histories, Evidence(recency=recency)).dense(len(histories), 6)
    assert (recent(histories, Evidence(recency=recency), times).dense(len(histories), 6) == plain).all()
    assert (recent(histories, rule).dense(len(histories), 6) == plain).all(), "without times there are no ties"


titles = st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=5).map(" ".join), min_size=1, max_size=9)


@settings(max_examples=examples(60), deadline=None)
@given(titles, titles, st.data())
def test_products_of_some_rows_are_those_of_all_and_within_their_bound(first, later, data):
    words = Words.of(first).adding(later, gone=[0])
    own = words.vector_of(data.draw(titles)[0], weight=data.draw(st.sampled_from([0.5, 2.0])))
    count = len(first) + len(later)
    table = words.likeness(own).dense(1, count)[0]
    rows = np.array(data.draw(st.lists(st.integers(0, count - 1), max_size=20)), np.int64)
    found = words.products(own.items, own.values, rows)
    np.testing.assert_allclose(found, table[rows], atol=1e-12)
    assert [words.products(own.items, own.values, rows[place : place + 1])[0] for place in range(len(rows))] == [*found]
    few = np.array(data.draw(st.lists(st.booleans(), min_size=len(own.items), max_size=len(own.items))), bool)
    part = Sparse(own.users[few], own.items[few], own.values[few])
    most = words.likeness(part).dense(1, count).max()
    assert most <= words.bound(part.items, part.values) + 1e-12


def test_rare_words_stand_beside_transitions():
    texts = ["red shoes", "red red hat", "tea pot", "shoes"]
    # idf log(5 / (1 + df)) + 1; a word counts once, however often it stands there
    common, rare = np.log(5 / 3) + 1, np.log(5 / 2) + 1
    lengths = [np.hypot(common, common), np.hypot(common, rare), np.hypot(rare, rare), common]
    alike = [1, common**2 / (lengths[0] * lengths[1]), 0, common**2 / (lengths[0] * lengths[3])]
    rule = NeighboursAndWords(texts, [[0, 2]])
    plain = slow_scores(slow_matrix([[0, 2]], 4), [[0]])[0]
    np.testing.assert_allclose(rule.scores([[0]])[0], plain + 0.3 * np.array(alike), atol=1e-6)
    assert rule.scores([[]]).tolist() == [[0] * 4]
    older = rule.scores([[0, 3]])[0] - rule.scores([[3]])[0]
    np.testing.assert_allclose(older, 0.6 * rule.scores([[0]])[0], atol=1e-6)
