"""Products with matrices of evidence equal those pair by pair."""

import numpy as np
import pytest
import torch

from m6rec.item_features_m6rec import Evidence, Transitions, Words, recent
from m6rec.train.evaluation import products
from m6rec.train.evaluation.products import Following, Likeness, Product, dense, transition_rows, word_rows

RULE = Evidence(recency=(1.0, 0.6, 0.6), steps=(1.0, 0.5), out_power=0.7, in_power=0.3)


@pytest.mark.parametrize("dense_share", [0.0, 2.0], ids=["dense", "sparse"])
def test_products_equal_sums_of_pairs(dense_share, monkeypatch):
    monkeypatch.setattr(products, "DENSE_SHARE", dense_share)
    random = np.random.default_rng(0)
    table = random.random((5, 7)) * (random.random((5, 7)) < 0.4)
    rows, columns = (own[::-1].copy() for own in np.nonzero(table))
    weights = random.random((3, 5))
    own = Product(rows, columns, table[rows, columns], table.shape)
    assert own.is_dense == (dense_share == 0)
    np.testing.assert_allclose(own(torch.from_numpy(weights).float()), weights @ table, rtol=1e-5)


@pytest.mark.parametrize("price", [0.0, 1e9], ids=["pair by pair", "as a product"])
def test_transitions_are_followed_alike_in_both_ways(price, monkeypatch):
    monkeypatch.setattr(products, "PAIR", price)
    random = np.random.default_rng(1)
    sequences = [random.integers(0, 9, length) for length in (6, 1, 4, 0, 9)]
    transitions = Transitions.fit(sequences, 11, RULE)
    shares = recent([*sequences[::-1], np.array([10])], RULE)
    following = Following(transitions)
    first = following.after(shares, 6)
    assert (following._product is None) == (price == 0)
    np.testing.assert_allclose(first, transitions.follow(shares).dense(6, 11), atol=1e-6)
    second = transitions.follow(transitions.follow(shares)).dense(6, 11)
    np.testing.assert_allclose(following.product(first), second, atol=1e-6)


def test_common_words_equal_those_of_the_catalogue():
    words = Words.of(["red shoes", "blue shoes", "", "green tea", "tea pot, tea"])
    shares = recent([[0, 1], [4], [], [2, 3, 0, 3]], RULE)
    found = Likeness(words)(dense(shares, 4, 5))
    np.testing.assert_allclose(found, words.likeness(words.vectors(shares)).dense(4, 5), atol=1e-6)


def test_blocks_of_rows_and_columns_equal_those_of_the_dense_matrix():
    transitions = Transitions.fit([[0, 1, 2], [3, 1, 0], [2, 4]], 6, RULE)
    rows, columns = np.array([3, 0, 5]), np.array([4, 1])
    own, whole = transition_rows(transitions), transitions.matrix()
    np.testing.assert_allclose(own.block().to_dense(), whole, atol=1e-6)
    np.testing.assert_allclose(own.block(rows, columns).to_dense(), whole[np.ix_(rows, columns)], atol=1e-6)
    words = Words.of(["red shoes", "", "blue shoes"])
    vectors = word_rows(words).block(np.array([2, 0, 1])).to_dense()
    alike = words.likeness(words.vectors(recent([[2], [0], [1]], Evidence(recency=(1.0,))))).dense(3, 3)
    np.testing.assert_allclose(vectors @ vectors.T, alike[:, [2, 0, 1]], atol=1e-6)
