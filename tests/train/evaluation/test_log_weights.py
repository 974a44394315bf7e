"""Facts of a log against loops over pairs, and the weights that other logs suggest for it."""

import dataclasses
import itertools
import json
import math
from pathlib import Path

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
    SECOND_BELOW,
    USUAL_CONCENTRATION,
    USUAL_LIKENESS,
    WIDE,
    LogFacts,
)

TEXTS = ["red shoes", "blue shoes", "green tea", "tea pot", "a pot", "red pot"]
RESULTS = Path(__file__).parents[3] / "benchmarks" / "results" / "open_domain.json"


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
    plain = LogFacts(100, 1.0, 0.05, 0.01)
    words, popular = LEARNT.of(plain)
    assert words == pytest.approx(LEARNT.words * 2**-LEARNT.words_falling)
    ratio = (0.01 / 0.05) ** LEARNT.ratio
    assert popular == pytest.approx(LEARNT.popularity * words * ratio * 2**-LEARNT.popularity_falling)
    names = LEARNT.of(plain._replace(likeness=0.001))
    assert names[0] < words and names[1] / names[0] > popular / words
    assert LEARNT.of(plain._replace(density=20.0))[0] < words


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
    rng = np.random.default_rng(0)
    texts = [f"w{rng.integers(9)} v{rng.integers(9)}" for _ in range(200)]
    histories = [rng.integers(0, 200, 4) for _ in range(20)]
    learnt = learnt_settings(Words.of(texts), histories)
    found = choose_evidence(texts, histories, exclude_seen=False)
    assert found.default == "other logs" and found.settings == learnt and found.value == found.default_value
    assert learnt.steps == WIDE["steps"] and 0 < learnt.words < LEARNT.words and learnt.popularity > 0
    monkeypatch.setattr(evidence, "LEARNT_BELOW", 80)
    found = choose_evidence(texts, histories, exclude_seen=False)
    assert found.default == "rule" and found.settings == EvidenceSettings()


def test_settings_with_too_many_pairs_are_not_tried(monkeypatch):
    """A log of long histories is large for wide pairs; the rule counts two steps, and is always tried."""
    histories = [np.arange(8)] * 30
    monkeypatch.setattr(evidence, "LEARNT_BELOW", 0)
    every = choose_evidence(["a thing"] * 8, histories, exclude_seen=False)
    monkeypatch.setattr(evidence, "MOST_PAIRS", 1)
    fewer = choose_evidence(["a thing"] * 8, histories, exclude_seen=False)
    assert 0 < fewer.tried < every.tried


def test_the_shipped_weights_are_those_that_the_benchmark_learns():
    shipped = json.loads(RESULTS.read_text())["shipped"]
    assert {**shipped, "recency": tuple(shipped["recency"])} == dataclasses.asdict(LEARNT)
