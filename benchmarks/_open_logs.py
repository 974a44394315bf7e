"""Events of several logs ranked by grids of weights, at several numbers of counted events; used by open_domain.py."""

import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fit_logs
import numpy as np
import torch

from m6rec.item_features_m6rec import WIDTH, Evidence, Reader, ReadTexts, Transitions, Words, recent
from m6rec.train.config.arguments import EvaluationArguments
from m6rec.train.data.log import DataArguments, Log, read_log
from m6rec.train.data.splits import hold_out
from m6rec.train.evaluation.evidence import LEARNT_BELOW, EvidenceSettings, choose_evidence, learnt_settings, popularity
from m6rec.train.evaluation.evidence import Evidence as Untrained
from m6rec.train.evaluation.log_weights import NEAR, POPULARITY, SECOND_BELOW, WIDE, WORDS, LogFacts, LogWeights
from m6rec.train.evaluation.reports import RankingExamples, learnt_sequences, ranking_examples
from m6rec.train.evaluation.tuning import falling
from m6rec.train.metrics import ndcg_gains, target_ranks
from m6rec.train.rows.examples import RequestWriter

COUNTS = (0, 100, 1000, 10_000, None)
"""Numbers of counted events; None = all."""
USERS = 400
"""Number of users of each draw whose event is ranked."""
RECENCIES = (Evidence().recency, falling(10, 0.7), falling(12, 0.8))
STRUCTURES: tuple[dict[str, Any], ...] = (WIDE, NEAR)
DENSE = 4000
"""Number of items up to which counts are a dense table."""
ALL_RANKED = 500
"""Number of items up to which the grid ranks all items."""
TIE_BREAK = 1e-6
RULE, WORDS_ONLY, READER_ONLY = "rule", "words", "reader"


def _known(name: str) -> Callable[[Path], Log]:
    return lambda data: read_log(DataArguments(source=name, directory=str(data / name)))


def _tables(make: Callable[[Path], fit_logs.Tables], columns: dict[str, str]) -> Callable[[Path], Log]:
    def log(data: Path) -> Log:
        with tempfile.TemporaryDirectory() as folder:
            places = [f"{folder}/events.csv", f"{folder}/items.csv"]
            for table, place in zip(make(data), places):
                table.to_csv(place, index=False)
            own = DataArguments("tables", interactions=places[0], items=places[1], columns=columns, drop_invalid=True)
            return read_log(own)

    return log


GIFTS = {"user_id": "reviewerID", "item_id": "asin", "timestamp": "unixReviewTime", "rating": "overall"}
LOGS: dict[str, tuple[str, Callable[[Path], Log]]] = {
    "gift-cards": ("shuffled", _tables(fit_logs.gift_cards, GIFTS)),
    "ml-100k": ("shuffled", _known("ml-100k")),
    "lastfm": ("published", _tables(fit_logs.lastfm, {"user_id": "userID", "item_id": "artistID"})),
    "amazon-beauty": ("time", _known("amazon-beauty")),
}
"""Protocol and reader of each log."""


class Cell(NamedTuple):
    """One draw of a part of a log, with some events counted."""

    facts: LogFacts
    grid: np.ndarray
    """Structures x recencies x weights of words x weights of popularity x U: NDCG@10 of each ranked event."""
    fixed: dict[str, np.ndarray]
    """Name of an untrained row -> U: NDCG@10."""
    missed: float
    """Largest difference of a mean between all items and the candidates that the grid ranks, for the rule."""

    def save(self, path: Path) -> None:
        """Write it into a file."""
        np.savez(path, facts=np.array(self.facts), grid=self.grid, missed=self.missed, **self.fixed)

    @classmethod
    def load(cls, path: Path) -> "Cell":
        """Read it from a file."""
        found = np.load(path)
        events, *others = found["facts"].tolist()
        fixed = {name: found[name] for name in (RULE, WORDS_ONLY, READER_ONLY)}
        return cls(LogFacts(int(events), *others), found["grid"], fixed, float(found["missed"]))


def cells(name: str, data: Path, seeds: Sequence[int], known: Container[str] = ()) -> Iterator[tuple[str, Cell]]:
    """Rank events of a log: name of a cell (part, seed, number of counted events) and the cell, but for known names."""
    places = {
        (seed, part): {f"{part}_{seed}_{number_name(count)}": count for count in COUNTS}
        for seed, part in itertools.product(seeds, ("valid", "test"))
    }
    missing = [place for place, names in places.items() if not all(cell in known for cell in names)]
    catalogue = None
    for draw in draws(name, data, missing):
        catalogue = catalogue or Texts(Words.of(draw.texts), ReadTexts.of(Reader.of(None), draw.texts))
        users = catalogue.compared(draw.examples)
        for cell, count in places[draw.seed, draw.part].items():
            if cell not in known and (count is None or count < draw.events):
                yield cell, users.cell(drawn(draw.sequences, count, draw.seed))


def number_name(count: int | None) -> str:
    """Return the name of a number of counted events."""
    return "all" if count is None else str(count)


class Draw(NamedTuple):
    """One draw of a part of a log."""

    seed: int
    part: str
    texts: list[str]
    examples: RankingExamples
    sequences: list[np.ndarray]
    """Items of each user's events that may be counted."""

    @property
    def events(self) -> int:
        """Number of events that may be counted."""
        return sum(map(len, self.sequences))

    def gains(self, sequences: list[np.ndarray], settings: EvidenceSettings) -> np.ndarray:
        """Return the NDCG@10 of each ranked event among all items, with some histories counted: U."""
        histories = self.examples.histories
        scores = Untrained(self.texts, sequences, settings).scores(histories)
        return ndcg_gains(target_ranks(scores, self.examples.targets, histories), 10)


def draws(name: str, data: Path, places: Sequence[tuple[int, str]]) -> Iterator[Draw]:
    """Draw users of a log, and shuffle ties, for some seeds and parts."""
    protocol, read = LOGS[name]
    log = read(data)
    writer = RequestWriter(log)
    texts = [" ".join(text for field, text in item.items() if field != "item_id") for item in writer.items]
    arguments = EvaluationArguments(max_users=USERS)
    if protocol == "time":
        arguments = dataclasses.replace(arguments, protocol="time", validate="time")
    for seed, part in places:
        split = hold_out(log.interactions, protocol, "time" if protocol == "time" else "stale", seed)
        examples = ranking_examples(writer, None, split, part, arguments, seed)
        yield Draw(seed, part, texts, examples, learnt_sequences(writer, split, part, arguments))


def fitted(
    name: str, data: Path, seeds: Sequence[int], weights: LogWeights
) -> Iterator[tuple[str, np.ndarray, np.ndarray | None]]:
    """Rank test events of a log, among all items, with weights learnt over other logs.

    Returns:
        Number of counted events by name; NDCG@10 of each ranked event (U) with these weights; and with those that
        `m6rec fit` chooses, if there are some events, but fewer than 20,000.
    """
    for draw in draws(name, data, [(seed, "test") for seed in seeds]):
        words = Words.of(draw.texts)
        for count in COUNTS:
            if (count or 0) >= draw.events:
                continue
            sequences, chosen = drawn(draw.sequences, count, draw.seed), None
            if 0 < sum(map(len, sequences)) < LEARNT_BELOW:
                choice = choose_evidence(draw.texts, sequences, True, draw.seed, weights)
                chosen = draw.gains(sequences, choice.settings)
            yield number_name(count), draw.gains(sequences, learnt_settings(words, sequences, weights)), chosen


def drawn(sequences: Sequence[np.ndarray], count: int | None, seed: int) -> list[np.ndarray]:
    """Draw users until they have `count` events; the last one's later events are left out."""
    found, left = [], count
    for user in np.random.default_rng(seed).permutation(len(sequences)).tolist():
        if left == 0:
            break
        found.append(sequences[user][:left])
        left = None if left is None else left - len(found[-1])
    return found


@dataclasses.dataclass
class Texts:
    """The texts of a catalogue."""

    words: Words
    reading: ReadTexts

    def compared(self, examples: RankingExamples) -> "Users":
        """Compare the texts of all items with those of users' last items, for each recency."""
        shape, vectors = (len(examples.users), len(self.words.live)), torch.from_numpy(self.reading.vectors)
        shares, alike = [], []
        for recency in RECENCIES:
            own = recent(examples.histories, Evidence(recency=recency))
            shares.append(torch.from_numpy(own.dense(*shape)).float())
            alike.append(torch.from_numpy(self.words.likeness(self.words.vectors(own)).dense(*shape)).float())
        seen = torch.zeros(shape, dtype=torch.bool)
        for user, history in enumerate(examples.histories):
            seen[user, torch.from_numpy(np.asarray(history))] = True
        read = (shares[0] @ vectors) @ vectors.T
        return Users(self.words, shares, alike, read, seen, torch.from_numpy(examples.targets))


@dataclasses.dataclass
class Users:
    """Users whose next event is ranked: U users, M items."""

    words: Words
    shares: list[torch.Tensor]
    """U x M for each recency: weights of the user's last items."""
    alike: list[torch.Tensor]
    """U x M for each recency: scores by words."""
    read: torch.Tensor
    """U x M: scores by the reader."""
    seen: torch.Tensor
    targets: torch.Tensor

    def cell(self, sequences: list[np.ndarray]) -> Cell:
        """Rank the events by all weights of the grid, with some histories counted."""
        facts, size = LogFacts.of(self.words, sequences), self.seen.shape[1]
        popular = torch.from_numpy(popularity(sequences, size)).float().expand_as(self.seen)
        rule = Evidence()
        plain = (
            self._after(_table(sequences, size, rule), rule.second, 0)
            + rule.words * self.alike[0]
            + TIE_BREAK * popular
        )
        fixed = {
            RULE: self._gains(plain),
            WORDS_ONLY: self._gains(self.alike[0] + TIE_BREAK * popular),
            READER_ONLY: self._gains(self.read + TIE_BREAK * popular),
        }
        second = 0.4 if facts.events < SECOND_BELOW else 0.0
        rules = [Evidence(**own, second=second) for own in STRUCTURES]
        tables = [_table(sequences, size, own) for own in rules]
        after = [[self._after(table, second, age) for age in range(len(RECENCIES))] for table in tables]
        places = self._candidates(after, popular, plain)
        chosen = places.clamp_min(0)
        there = places >= 0
        popular = popular.gather(1, chosen)
        grid = np.empty((len(STRUCTURES), len(RECENCIES), len(WORDS), len(POPULARITY), len(places)), np.float32)
        for structure, age in itertools.product(range(len(STRUCTURES)), range(len(RECENCIES))):
            follow, alike = (own.gather(1, chosen) for own in (after[structure][age], self.alike[age]))
            for row, column in itertools.product(range(len(WORDS)), range(len(POPULARITY))):
                scores = follow + WORDS[row] * alike + (POPULARITY[column] + TIE_BREAK) * popular
                grid[structure, age, row, column] = _first_gains(scores.masked_fill(~there, -torch.inf))
        narrow = _first_gains(plain.gather(1, chosen).masked_fill(~there, -torch.inf))
        return Cell(facts, grid, fixed, abs(float(narrow.mean() - fixed[RULE].mean())))

    def _after(self, table: torch.Tensor, second: float, age: int) -> torch.Tensor:
        """Score all items by transitions: U x M."""
        first = (table @ self.shares[age].T.contiguous()).T
        return first + second * (table @ first.T.contiguous()).T if second else first

    def _gains(self, scores: torch.Tensor) -> np.ndarray:
        """Return the NDCG@10 of each user's target among all items."""
        users = torch.arange(len(self.targets))
        own = scores[users, self.targets].clone()
        scores = scores.masked_fill(self.seen, -torch.inf)
        scores[users, self.targets] = own
        equal = (scores == own[:, None]).sum(1) - 1
        return _ndcg(1 + (scores > own[:, None]).sum(1) + equal / 2)

    def _candidates(self, after: list[list[torch.Tensor]], popular: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
        """Choose the items of each user that the grid ranks, the target first, padded by -1.

        In a large catalogue these are the first of each kind of evidence and of several sums.
        """
        users, size = self.seen.shape
        chosen = torch.full((users, size), size <= ALL_RANKED)
        if size > ALL_RANKED:
            parts = [plain, popular + 1e-4 * self.alike[1]]
            for age, alike in enumerate(self.alike):
                parts += [alike + weight * popular for weight in (1e-3, 0.1)]
                parts += [own[age] + weight * alike + 1e-3 * popular for own in after for weight in (0.0, 0.2, 1.0)]
                parts += [own[age] + 0.1 * popular for own in after]
            for scores in parts:
                chosen.scatter_(1, scores.masked_fill(self.seen, -1).topk(40).indices, True)
        chosen &= ~self.seen
        chosen.scatter_(1, self.targets[:, None], False)
        places = torch.full((users, 1 + int(chosen.sum(1).max())), -1)
        places[:, 0] = self.targets
        for user in range(users):
            own = chosen[user].nonzero()[:, 0]
            places[user, 1 : 1 + len(own)] = own
        return places


def _table(sequences: list[np.ndarray], size: int, rule: Evidence) -> torch.Tensor:
    """Return the transposed matrix P of a rule: M x M."""
    transitions = Transitions.fit(sequences, size, rule)
    keys, totals = transitions.counts()
    first, second = np.divmod(keys, WIDTH)
    scale = np.maximum(transitions.out[first] * transitions.unit, 1) ** rule.out_power
    scale *= np.maximum(transitions.into[second] * transitions.unit, 1) ** rule.in_power
    values = torch.from_numpy(totals * transitions.unit / scale).float()
    if size <= DENSE:
        table = torch.zeros(size, size)
        table[torch.from_numpy(second), torch.from_numpy(first)] = values
        return table
    order = np.lexsort((first, second))
    starts = np.concatenate(([0], np.cumsum(np.bincount(second, minlength=size))))
    rows, columns = torch.from_numpy(starts), torch.from_numpy(first[order])
    return torch.sparse_csr_tensor(rows, columns, values[torch.from_numpy(order)], (size, size))


def _first_gains(scores: torch.Tensor) -> np.ndarray:
    """Return the NDCG@10 of the first column: U."""
    own, others = scores[:, :1], scores[:, 1:]
    return _ndcg(1 + (others > own).sum(1) + (others == own).sum(1) / 2)


def _ndcg(ranks: torch.Tensor) -> np.ndarray:
    return ndcg_gains(ranks.numpy().astype(float), 10).astype(np.float32)
