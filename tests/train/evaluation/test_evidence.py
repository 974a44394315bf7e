"""Evidence against a loop over pairs and items, and the choice of its settings."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m6rec.item_features_m6rec import Reader, ReadTexts, Sparse, Words
from m6rec.train.evaluation import baselines, evidence
from m6rec.train.evaluation.baselines import NeighboursAndWords
from m6rec.train.evaluation.evidence import (
    FOLDS,
    WIDE,
    Evidence,
    EvidenceSettings,
    FoldedEvidence,
    choose_evidence,
    learnt_settings,
    popularity,
)
from m6rec.train.evaluation.products import Likeness
from m6rec.train.metrics import ndcg_at_k, target_ranks
from tests.fast import examples

TEXTS = ["red shoes", "blue shoes", "green tea", "tea pot", "a pot", "red pot"]
READ = ReadTexts.of(Reader.of(None), TEXTS).vectors
sequences = st.lists(st.lists(st.integers(0, 5), max_size=7), max_size=6)
SETTINGS = [
    EvidenceSettings(),
    EvidenceSettings(**WIDE, recency=(1.0,) * 50, words=1.0, popularity=0.3),
    EvidenceSettings(recency=(1.0,), words=0.0, second=0.0, again=2.0),
    EvidenceSettings(unseen=0.5, texts=0.4),
    EvidenceSettings(linear=0.7, strength=2.0, recency=(1.0, 0.5)),
    EvidenceSettings(share_ties=True, recency=(1.0, 0.5, 0.4)),
]
NAMES = ["rule", "wide", "again", "unseen", "linear", "ties"]


def times_of(history):
    """Two events each have one time."""
    return (np.arange(len(history)) // 2).astype(float)


def slow_scores(own, learnt, history):
    """Score item by item, pair by pair."""
    count = np.zeros((6, 6))
    for known in learnt:
        for first, item in enumerate(known):
            for second in range(first + 1, min(first + len(own.steps), len(known) - 1) + 1):
                if known[second] != item:
                    weight = own.steps[second - first - 1]
                    tied = own.share_ties and first // 2 == second // 2
                    ways = [(1 + own.backwards) / 2] * 2 if tied else [1, own.backwards]
                    count[item, known[second]] += weight * ways[0]
                    count[known[second], item] += weight * ways[1]
    out, into = np.maximum(count.sum(1), 1), np.maximum(count.sum(0), 1)
    follows = count / out[:, None] ** own.powers[0] / into ** own.powers[1]
    words = Words.of(TEXTS)
    every = np.arange(len(TEXTS))
    vectors = words.vectors(Sparse(every, every, np.ones(len(TEXTS)))).dense(len(TEXTS), len(words.rarity))
    known = np.array([[item in each for item in range(6)] for each in learnt] or [[False] * 6]).astype(float)
    inverse = np.linalg.inv(known.T @ known + own.strength * np.eye(6))
    linear = own.linear * (np.eye(6) - inverse / np.diag(inverse))
    met = np.log1p(np.bincount([item for known in learnt for item in known], minlength=6))
    scores = (own.popularity + 1e-6) * met / max(met.max(), 1e-12)
    weights = [*own.recency, *[0.0] * len(history)][: len(history)][::-1]
    if own.share_ties:
        weights = [np.mean(weights[place - place % 2 :][:2]) for place in range(len(history))]
    for weight, item in zip(weights, history):
        alike = own.words * np.where(met > 0, 1, 1 + own.unseen) * (vectors @ vectors[item])
        added = follows[item] + own.second * follows[item] @ follows + alike
        added += own.texts * READ @ READ[item] + linear[item]
        added[item] += own.again
        scores = scores + weight * added
    return scores


@pytest.mark.parametrize("own", SETTINGS, ids=NAMES)
@settings(max_examples=examples(30), deadline=None)
@given(learnt=sequences, asked=sequences)
def test_scores_are_those_of_a_loop(own, learnt, asked):
    found = Evidence(TEXTS, learnt, own, [*map(times_of, learnt)]).scores(asked, [*map(times_of, asked)])
    assert found.shape == (len(asked), 6)
    np.testing.assert_allclose(
        found, np.array([slow_scores(own, learnt, each) for each in asked]).reshape(-1, 6), atol=1e-7
    )


@pytest.mark.parametrize("tabled", [True, False])
@pytest.mark.parametrize("own", SETTINGS, ids=NAMES)
def test_evidence_of_the_loss_does_not_count_the_events_of_a_users_fold(own, tabled, monkeypatch):
    monkeypatch.setattr(baselines, "TABLED", 6 if tabled else 5)
    rng = np.random.default_rng(0)
    known = {f"u{user}": rng.integers(6, size=rng.integers(1, 6)) for user in range(3 * FOLDS)}
    times = {user: times_of(each) for user, each in known.items()}
    folded = FoldedEvidence(TEXTS, known, own, weight=0.6, seed=1, times=times)
    assert sorted(np.bincount([*folded.folds.values()])) == [3] * FOLDS
    asked = [(user, known[user][:length]) for user in known for length in range(len(known[user]))]
    asked = [asked[place] for place in rng.permutation(len(asked))]  # a user's histories need not be neighbours
    moments, candidates = [times_of(history) for _, history in asked], np.array([4, 0, 3])
    found = folded.scores(*map(list, zip(*asked)), moments)
    some = folded.scores(*map(list, zip(*asked)), moments, candidates)
    np.testing.assert_allclose(some, found[:, candidates], atol=1e-6)
    for (user, history), scores in zip(asked, found.numpy()):
        others = [known[each] for each in known if folded.folds[each] != folded.folds[user]]
        popular = own.popularity * popularity(others, 6)
        rule = dataclasses.replace(own, popularity=0.0)
        np.testing.assert_allclose(
            scores, 0.6 * (slow_scores(rule, others, history) + popular), atol=1e-5, err_msg=user
        )


def test_the_defaults_are_the_rule_of_the_tables_but_for_ties():
    learnt, asked = [[0, 1, 2], [3, 1], [0, 2, 2, 4]], [[0], [1, 3], []]
    rule = NeighboursAndWords(TEXTS, learnt).scores(asked)
    ties = 1e-6 * popularity(learnt, 6)
    np.testing.assert_allclose(Evidence(TEXTS, learnt).scores(asked), rule + ties)
    assert Evidence(TEXTS, learnt).scores([[]])[0].argmax() == 2, "the most popular, where nothing is known"


def test_settings_survive_json():
    own = SETTINGS[1]
    kept = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(own).items()}
    assert EvidenceSettings.of(kept) == own


def sessions(rng, users=60, items=40, noise=0.0):
    """Histories in which item i is followed by i + 1, but for some noise."""
    found = []
    for _ in range(users):
        start = int(rng.integers(items))
        walk = [(start + step) % items for step in range(6)]
        found.append(np.array([int(rng.integers(items)) if rng.random() < noise else item for item in walk]))
    return found


def test_what_is_clearly_better_is_chosen():
    """Every second item is of the user's series, the others are noise: a longer memory is better."""
    rng = np.random.default_rng(0)
    texts = [f"series{item // 8}" for item in range(40)]
    likes = [rng.permutation(np.arange(8) + 8 * rng.integers(5))[:5] for _ in range(40)]
    histories = [np.insert(own, range(5), rng.integers(0, 40, 5)) for own in likes]
    found = choose_evidence(texts, histories, exclude_seen=False)
    assert found.settings.words > 0 and len(found.settings.recency) > 5 and found.value > found.default_value + 0.04
    assert found.events == 40 * 4 and found.tried > 10


def tastes(rng, users=100, items=40, dimensions=4, length=10):
    """Histories without an order: each user takes the items that are nearest to a taste, with noise."""
    places, found = rng.normal(size=(items, dimensions)), []
    popular = -np.log1p(rng.permutation(items))
    for _ in range(users):
        liked = 3 * places @ rng.normal(size=dimensions) + popular + rng.gumbel(size=items)
        found.append(rng.permutation(np.argsort(-liked)[:length]))
    return found


def test_a_linear_model_is_chosen_where_order_says_nothing(monkeypatch):
    texts, log = [f"item {number}" for number in range(40)], tastes(np.random.default_rng(0))
    choice = choose_evidence(texts, log, exclude_seen=True)
    assert choice.settings.linear > 0
    monkeypatch.setattr(baselines, "EASE_QUICK", 39)
    without = choose_evidence(texts, log, exclude_seen=True)
    assert without.settings.linear == 0 and without.value < choice.value


def test_the_defaults_stay_where_nothing_is_better():
    rng = np.random.default_rng(0)
    texts = [f"w{rng.integers(9)} v{rng.integers(9)}" for _ in range(200)]
    histories = [rng.integers(0, 200, 4) for _ in range(20)]
    found = choose_evidence(texts, histories, exclude_seen=False)
    defaults = {"rule": EvidenceSettings(), "other logs": learnt_settings(Words.of(texts), histories)}
    assert found.settings == defaults[found.default] and found.value == found.default_value
    single = [np.array([3])] * 5
    assert choose_evidence(texts, single, exclude_seen=True).settings == learnt_settings(Words.of(texts), single)


def test_re_visits_are_found():
    rng = np.random.default_rng(1)
    histories = [np.tile(rng.integers(0, 30, 2), 4) for _ in range(30)]
    texts = ["thing"] * 30
    assert choose_evidence(texts, histories, exclude_seen=False).settings.again > 0
    assert choose_evidence(texts, histories, exclude_seen=True).events == 0, "no first visit is left to be asked about"


def test_a_trial_ranks_as_a_table_does():
    """What the choice is made by is the NDCG of `Evidence` on the same events, counted from the other users."""
    histories = sessions(np.random.default_rng(2), users=20, noise=0.3)
    texts = [f"w{item % 7}" for item in range(40)]
    own = dataclasses.replace(EvidenceSettings(), words=1.0, popularity=0.1)
    times = [np.sort(np.random.default_rng(each[0]).integers(0, 4, len(each))).astype(float) for each in histories]
    for share in (False, True):
        own = dataclasses.replace(own, share_ties=share)
        for fold in evidence._folds(histories, times, 1000, True, 0):
            trial = evidence._Trial(Likeness(Words.of(texts)), 40, fold, True)
            scores = Evidence(texts, fold.counted, own, fold.counted_times).scores(fold.histories, fold.times)
            ranks = target_ranks(scores, fold.targets, fold.histories)
            assert trial.gains(own).mean() == pytest.approx(ndcg_at_k(ranks, 10), abs=1e-3)
            own_users = set(fold.users)
            assert not any(any(each is histories[user] for user in own_users) for each in fold.counted)
            assert [len(each) for each in fold.times] == [len(each) for each in fold.histories]


def test_folds_ask_as_many_events_as_are_wanted():
    histories = sessions(np.random.default_rng(2), users=20)
    times = [np.arange(float(len(each))) for each in histories]
    few = evidence._folds(histories, times, 10, True, 0)
    assert [len(fold.users) for fold in few] == [4, 4, 2], "the last event of each user, while that is enough"
    assert all(len(history) == 5 for fold in few for history in fold.histories)
    everything = evidence._folds(histories, times, 1000, True, 0)
    assert len(everything) == 5 and sum(len(fold.users) for fold in everything) == 20 * 4
    assert sorted({user for fold in everything for user in fold.users}) == list(range(20))
