"""The grid of the benchmark over several logs against scores of the package, and what is learnt from it."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from m6rec.item_features_m6rec import Reader, ReadTexts, Words
from m6rec.train.evaluation.evidence import Evidence, EvidenceSettings
from m6rec.train.evaluation.log_weights import LEARNT, LogFacts, LogWeights
from m6rec.train.evaluation.reports import RankingExamples
from m6rec.train.metrics import ndcg_gains, target_ranks

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import _open_logs
import open_domain
from _open_logs import POPULARITY, RECENCIES, RULE, STRUCTURES, WORDS, Cell, Draw, Texts, drawn


@pytest.mark.parametrize("all_ranked", [0, 500], ids=["candidates", "all items"])
def test_a_grid_ranks_as_evidence_does(monkeypatch, all_ranked):
    monkeypatch.setattr(_open_logs, "ALL_RANKED", all_ranked)
    rng = np.random.default_rng(0)
    texts = [f"w{rng.integers(9)} v{rng.integers(9)}" for _ in range(45)]
    counted = [rng.integers(0, 45, 6) for _ in range(30)]
    histories = [rng.choice(45, rng.integers(1, 7), replace=False) for _ in range(25)]
    targets = np.array([rng.choice(np.setdiff1d(np.arange(45), own)) for own in histories])
    examples = RankingExamples([*map(str, range(25))], [], histories, targets, np.zeros(25, bool))
    catalogue = Texts(Words.of(texts), ReadTexts.of(Reader.of(None), texts))
    cell = catalogue.compared(examples).cell(counted)

    def gains(settings):
        ranks = target_ranks(Evidence(texts, counted, settings).scores(histories), targets, histories)
        return ndcg_gains(ranks, 10)

    assert cell.fixed[RULE] == pytest.approx(gains(EvidenceSettings()), abs=1e-6)
    assert cell.missed == 0 and cell.facts == LogFacts.of(catalogue.words, counted)
    for structure, age, words, popular in ((0, 0, 2, 0), (1, 1, 4, 3), (0, 2, 6, 5), (1, 2, 0, 1)):
        own = EvidenceSettings(
            **STRUCTURES[structure],
            recency=RECENCIES[age],
            words=WORDS[words],
            popularity=POPULARITY[popular],
        )
        assert cell.grid[structure, age, words, popular] == pytest.approx(gains(own), abs=1e-6)


def test_as_many_events_are_drawn_as_are_wanted():
    sequences = [np.arange(length) for length in (3, 4, 5)]
    assert sum(map(len, drawn(sequences, 8, 0))) == 8
    assert not drawn(sequences, 0, 0) and len(drawn(sequences, None, 0)) == 3


def test_what_several_logs_agree_on_is_learnt_and_kept():
    """In each log and at each number of events one structure, recency and constant weights are best."""
    shape = (2, 3, len(WORDS), len(POPULARITY), 2)
    best = (1, 2, WORDS.index(0.4), 0)
    table = {}
    for name in ("a", "b"):
        for seed in open_domain.SEEDS:
            for number, count in enumerate(("0", "100", "all")):
                far = sum(abs(own - there) for own, there in zip(np.indices(shape[:-1]), best))
                grid = np.repeat(1 - 0.05 * far[..., None], 2, axis=-1).astype(np.float32)
                facts = LogFacts(100 * number, 0.2 + 5 * number, 0.01 * (1 + number), 0.001)
                fixed = dict.fromkeys(("rule", "words", "reader"), np.full(2, 0.25, np.float32))
                for part in ("valid", "test"):
                    table[name, count, part, seed] = Cell(facts, grid, fixed, 0.0)
    weights = open_domain.learnt(["a"], table)
    assert open_domain.place(weights, table["b", "100", "test", 0]) == best
    chosen = {f"learnt over other logs, {count}": [np.ones(2)] * 3 for count in ("0", "100", "all")}
    chosen["as m6rec fit chooses, 100"] = [np.full(2, 0.5)] * 3
    events = open_domain.tested("b", table, weights, chosen)["events"]
    assert events["100"]["ndcg@10"]["as m6rec fit chooses"] == 0.5 and events["100"]["fitted to rule"][0] == 0.25
    found = events["all"]
    assert found["fitted to rule"] is None
    assert found["ndcg@10"]["learnt over other logs"] == found["ndcg@10"]["tuned on own validation"] == 1
    assert found["difference"]["rule"] == [0.75, 0.75, 0.75] and found["difference"]["tuned on own validation"][0] == 0


def test_what_a_fit_chooses_is_ranked_once_and_kept(monkeypatch, tmp_path):
    """Series: the next item is certain, and no weights but those of order are of use; 20 events show it."""
    sequences = [np.arange(start, start + 6) % 30 for start in range(30)]
    histories, targets = [np.array([7]), np.array([20, 21])], np.array([8, 22])
    examples = RankingExamples(["a", "b"], [], histories, targets, np.zeros(2, bool))
    asked = []

    def draws(name, data, places):
        for seed, part in places:
            asked.append((name, seed, part))
            yield Draw(seed, part, [f"w{item}" for item in range(30)], examples, sequences)

    monkeypatch.setattr(_open_logs, "draws", draws)
    for _ in range(2):
        found = open_domain.as_fitted("log", tmp_path, LEARNT, tmp_path)
    rows = {"learnt over other logs": ("0", "100", "all"), "as m6rec fit chooses": ("100", "all")}
    assert {*found} == {f"{row}, {count}" for row, counts in rows.items() for count in counts}, "180 events: no 1,000"
    assert [len(own) for own in found.values()] == [3] * 5
    assert (np.concatenate(found["as m6rec fit chooses, all"]) == 1).all()
    assert asked == [("log", seed, "test") for seed in open_domain.SEEDS]
    open_domain.as_fitted("log", tmp_path, dataclasses.replace(LEARNT, words=0.1), tmp_path)
    assert len(asked) == 6, "other weights are ranked again"


def test_the_shipped_weights_are_those_of_the_stored_results():
    shipped = json.loads(open_domain.RESULTS.read_text())["shipped"]
    assert LogWeights(**shipped | {"recency": tuple(shipped["recency"])}) == LEARNT


def test_a_cell_survives_its_file(tmp_path):
    fixed = {name: np.arange(2, dtype=np.float32) for name in ("rule", "words", "reader")}
    cell = Cell(LogFacts(7, 0.5, 0.1, 0.2), np.ones((2, 3, 7, 6, 2), np.float32), fixed, 0.25)
    cell.save(tmp_path / "cell.npz")
    found = Cell.load(tmp_path / "cell.npz")
    assert found.facts == cell.facts and found.missed == 0.25
    np.testing.assert_equal(found.fixed, fixed)
