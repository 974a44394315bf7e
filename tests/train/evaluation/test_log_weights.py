"""Facts of a log against loops over pairs, and the weights that other logs suggest for it."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from m6rec.item_features_m6rec import Sparse, Words
from m6rec.train.evaluation import evidence
from m6rec.train.evaluation.evidence import EvidenceSettings, choose_evidence, learnt_settings
from m6rec.train.evaluation.log_weights import (
    CONCENTRATION_PAIRS,
    LEARNT,
    LIKENESS_PAIRS,
    NEAR,
    POPULARITY,
    SECOND_BELOW,
    USUAL_CONCENTRATION,
    USUAL_LIKENESS,
    WIDE,
    WORDS,
    LogFacts,
)

TEXTS = ["red shoes", "blue shoes", "green tea", "tea pot", "a pot", "red pot"]


def slow_facts(texts, sequences):
    """Compare item by item, pair by pair."""
    words, every = Words.of(texts), np.arange(len(texts))
    vectors = words.vectors(Sparse(every, every, np.ones(len(texts)))).dense(len(texts), len(words.rarity))
    cosines = vectors @ vectors.T
    usual = np.mean([cosines[i, j] for i in every for j in every if i != j])
    alike = [cosines[i, j] - usual for own in sequences for i, j in itertools.pairwise(own)]
    items = [int(item) for own in sequences for item in own]
    same = [items[a] == items[b] for a in range(len(items)) for b in range(len(items)) if a != b]
    likeness = (sum(alike) + LIKENESS_PAIRS * USUAL_LIKENESS) / (len(alike) + LIKENESS_PAIRS)
    met = sum(same) + CONCENTRATION_PAIRS * USUAL_CONCENTRATION / len(texts)
    return len(items), len(items) / len(texts), likeness, met / (len(same) + CONCENTRATION_PAIRS)


def test_facts_are_those_of_loops_over_pairs():
    rng = np.random.default_rng(0)
    for sequences in ([], [np.array([3])], [rng.integers(0, 6, rng.integers(1, 9)) for _ in range(12)]):
        assert LogFacts.of(Words.of(TEXTS), sequences) == pytest.approx(slow_facts(TEXTS, sequences))


def test_words_count_more_where_consecutive_items_are_alike_and_less_in_a_dense_log():
    own = dataclasses.replace(LEARNT, words=1.0, likeness=1.0, words_falling=1.0, popularity=1.0, ratio=1.0)
    own = dataclasses.replace(own, popularity_falling=2.0)
    plain = LogFacts(100, 1.0, 0.08, 0.16)  # words .8 = .08 / .05 / 2; popularity .4 = words * 2 / 4, nearest .3
    assert own.of(plain) == (0.8, 0.3)
    assert own.of(plain._replace(likeness=0.04)) == (0.4, 0.3), "(.4, .4): fewer words, as much popularity"
    assert own.of(plain._replace(density=7.0)) == (0.2, 0.01), "(.2, .00625): both fall with events per item"
    assert own.of(plain._replace(concentration=1e-6))[1] == 0 and own.of(plain._replace(likeness=1e-4))[0] == min(WORDS)


def test_what_other_logs_suggest_are_settings_of_evidence():
    sequences = [np.array([0, 1]), np.array([2, 3])] * 30
    facts = LogFacts.of(Words.of(TEXTS), sequences)
    found = learnt_settings(Words.of(TEXTS), sequences)
    assert (found.words, found.popularity) == LEARNT.of(facts) and found.recency == LEARNT.recency
    assert (found.steps, found.second) == (NEAR["steps"] if facts.density >= LEARNT.near_from else WIDE["steps"], 0.4)
    assert found.words in WORDS and found.popularity in POPULARITY


def test_a_sparse_log_counts_wide_pairs_and_a_large_one_no_second_order():
    own = dataclasses.replace(LEARNT, near_from=8.0)
    sparse = LogFacts(100, 1.0, 0.05, 0.01)
    assert own.structure(sparse) == {**WIDE, "second": 0.4}
    assert own.structure(sparse._replace(events=SECOND_BELOW, density=8.0)) == {**NEAR, "second": 0.0}
    assert dataclasses.replace(own, near_from=math.inf).structure(sparse._replace(density=1e9)) == {
        **WIDE,
        "second": 0.4,
    }


def test_a_small_log_takes_the_weights_of_other_logs_and_a_large_one_the_rule(monkeypatch):
    """Nothing is measured where no event can be held out."""
    single = [np.array([3])] * 5
    learnt = learnt_settings(Words.of(TEXTS), single)
    found = choose_evidence(TEXTS, single, exclude_seen=True)
    assert found.settings == learnt and found.origin == "learnt over other logs" and found.events == 0
    assert learnt.steps == WIDE["steps"] and 0 < learnt.words < LEARNT.words and learnt.popularity > 0
    other = dataclasses.replace(LEARNT, words=2 * LEARNT.words)
    assert choose_evidence(TEXTS, single, exclude_seen=True, weights=other).settings.words > learnt.words
    monkeypatch.setattr(evidence, "LEARNT_BELOW", 5)
    found = choose_evidence(TEXTS, single, exclude_seen=True)
    assert found.settings == EvidenceSettings() and found.origin == "those of the rule"


@pytest.mark.parametrize("follows", [True, False], ids=["order", "favourites"])
def test_the_better_of_the_two_is_the_default_of_a_small_log(follows):
    """In a series order is all, which the rule counts; where all end with the same items, popularity is better."""
    rng = np.random.default_rng(0)
    series = [np.arange(start, start + 6) % 60 for start in rng.integers(0, 60, 40)]
    favourites = [np.append(rng.choice(60, 4, replace=False), rng.integers(60, 64)) for _ in range(40)]
    texts = [f"w{item}" for item in range(60 if follows else 64)]
    found = choose_evidence(texts, series if follows else favourites, exclude_seen=True)
    assert found.default == ("rule" if follows else "other logs")


def test_settings_with_too_many_pairs_are_not_tried(monkeypatch):
    """A log of long histories is large for wide pairs; the rule counts two steps, and is always tried."""
    histories = [np.arange(8)] * 30
    monkeypatch.setattr(evidence, "LEARNT_BELOW", 0)
    every = choose_evidence(["a thing"] * 8, histories, exclude_seen=False)
    monkeypatch.setattr(evidence, "MOST_PAIRS", 1)
    fewer = choose_evidence(["a thing"] * 8, histories, exclude_seen=False)
    assert 0 < fewer.tried < every.tried
