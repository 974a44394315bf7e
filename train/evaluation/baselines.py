"""Rules that need no training, each a class with `scores(histories)`: U x M scores of all items.

Popularity, recent popularity, similar text, transitions, words, transitions with words, and EASE.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn import functional

from ...item_features_m6rec import WIDTH, Evidence, ItemWeights, Sparse, Transitions, Words, ages, recent
from ...values_m6rec import WORD

TABLED = 16_384
"""Maximum number of items for which the M x M table of item scores is computed: 1 GiB in float32."""
ROWS_AT_ONCE = 1024
"""Number of rows of a table computed together."""
EASE_ITEMS = 25_000
"""Side of the largest square table that EASE computes; its matrices then take 7.5 GB."""
EASE_QUICK = 5_000
"""Maximum number of items, or of histories, for which EASE is quick: its time is cubic in the smaller one."""
EASE_CELLS = 25_000 * EASE_QUICK
"""Maximum size of its table then, the smaller number times the number of items: 500 MB."""
STRENGTHS = (300.0, 100.0, 30.0, 1000.0)
"""Ridge penalties of EASE that are tried; the first is the default."""
CELLS_AT_ONCE = 1 << 24
"""Number of cells of a table of histories and items that are counted together."""
ENTRIES = 200
"""Weights of an item that a catalogue keeps of EASE."""

Histories = Iterable[Sequence[int] | np.ndarray]


def popularity_scores(counts: np.ndarray, num_users: int) -> np.ndarray:
    """Score items by their training events, the same for every user: U x M."""
    return np.broadcast_to(counts.astype(float), (num_users, len(counts)))


class RecentPopularity:
    """Scores items by the number of their events up to the user's last one, with exponential decay by age.

    An event counts 2 ** -(age / half_life). Only events up to the moment of a user's last event are counted, so that
    later popularity does not leak.

    Args:
        items: Catalogue row of each of N events.
        times: Time of each event, in seconds.
        num_items: M.
        half_life: Half-life of an event's weight, in seconds.

    >>> rule = RecentPopularity(np.array([0, 1, 1, 2]), np.array([0.0, 10, 10, 20]), num_items=3, half_life=10)
    >>> rule.scores_at(np.array([20.0, 10.0])).tolist()
    [[0.25, 1.0, 1.0], [0.5, 2.0, 0.0]]
    """

    def __init__(self, items: np.ndarray, times: np.ndarray, num_items: int, half_life: float) -> None:
        order = np.argsort(times, kind="stable")
        self.items, self.times = items[order], times[order]
        self.num_items, self.half_life = num_items, half_life

    def scores_at(self, moments: np.ndarray) -> np.ndarray:
        """Score all items for users at these moments, in seconds: U x M."""
        found, total, done, now = np.zeros((len(moments), self.num_items)), np.zeros(self.num_items), 0, 0.0
        for user in np.argsort(moments, kind="stable"):
            moment = moments[user]
            stop = int(np.searchsorted(self.times, moment, side="right"))
            total *= 2.0 ** (-(moment - now) / self.half_life) if done else 1.0
            weights = 2.0 ** (-(moment - self.times[done:stop]) / self.half_life)
            total += np.bincount(self.items[done:stop], weights, minlength=self.num_items)
            done, now, found[user] = stop, moment, total
        return found


class Repeat:
    """Scores items by how often the user has met them; of equally frequent ones the last met is first.

    Items that the user has not met follow by popularity.

    Args:
        counts: M, training events of each item.

    >>> Repeat(np.array([1, 9, 3, 0])).scores([[0, 2, 0, 3]])[0].argsort()[::-1].tolist()
    [0, 3, 2, 1]
    """

    def __init__(self, counts: np.ndarray) -> None:
        self.popularity = counts / (4 * max(counts.max(initial=0), 1))

    def scores(self, histories: Histories) -> np.ndarray:
        """Score all items for users with these item rows in their histories: U x M."""
        several = [np.asarray(history, dtype=int) for history in histories]
        found = np.tile(self.popularity, (len(several), 1))
        for own, items in zip(found, several):
            np.add.at(own, items, 1)
            last = {item: place for place, item in enumerate(items.tolist(), 1)}
            own[list(last)] += np.array(list(last.values())) / (2 * max(len(items), 1))
        return found


class SimilarText:
    """Scores items by how similar their text is to those of the history: cosine of TF-IDF vectors.

    A user's vector is the mean of the history's item vectors. Source: the classic content-based baseline; term weight
    (1 + log tf) * log((1 + M) / (1 + df)).

    Args:
        texts: Text of each of the M items.

    >>> scores = SimilarText(["red shoes", "blue shoes", "green tea", "tea pot"]).scores([[0], [2]])
    >>> scores.argsort(1)[:, ::-1][:, :2].tolist()
    [[0, 1], [2, 3]]
    """

    def __init__(self, texts: Sequence[str]) -> None:
        words = _Words(texts)
        rarity = torch.log((1 + words.shape[0]) / (1 + words.frequency))
        self.matrix = words.matrix((1 + words.counts.log()) * rarity[words.columns])

    def scores(self, histories: Histories) -> np.ndarray:
        """Score all items for users with these item rows in their histories: U x M."""
        items = [np.asarray(history, dtype=int) for history in histories]
        shares = np.zeros((len(items), self.matrix.shape[0]))
        for user, history in enumerate(items):
            np.add.at(shares[user], history, 1 / max(len(history), 1))
        return _likeness(self.matrix, shares)


class LastItems:
    """Scores items by a weighted sum, over the last items of a history, of those items' evidence.

    Args:
        evidence: Scores of items given one item.
        rule: Weights of the last items.
    """

    def __init__(self, evidence: Transitions | Words, rule: Evidence) -> None:
        self.evidence, self.rule = evidence, rule
        self.num_items = evidence.num_items if isinstance(evidence, Transitions) else len(evidence.live)
        self._shared = _Table()

    @property
    def table(self) -> np.ndarray | None:
        """Evidence scores of all pairs of items, M x M in float32; None if there are too many items."""
        if self.num_items > TABLED:
            return None
        if self._shared.rows is None:
            self._shared.rows = self._all_rows()
        return self._shared.rows

    def _all_rows(self) -> np.ndarray:
        found = np.empty((self.num_items, self.num_items), dtype=np.float32)
        work = second_work(self.evidence) if isinstance(self.evidence, Transitions) else 0
        product = work > self.num_items**3 / 400  # then a dense product is faster
        for start in range(0, self.num_items, ROWS_AT_ONCE):
            items = np.arange(start, min(start + ROWS_AT_ONCE, self.num_items))
            found[items] = self._rows(self._first if product else self._said, items)
        return found + np.float32(self.rule.second) * (found @ found) if product and self.rule.second else found

    def _rows(self, score: Callable[[Sparse], Sparse], items: np.ndarray) -> np.ndarray:
        own = Sparse(np.arange(len(items)), items, np.ones(len(items)))
        return score(own).dense(len(items), self.num_items).astype(np.float32)

    def _first(self, shares: Sparse) -> Sparse:
        assert isinstance(self.evidence, Transitions)
        return self.evidence.follow(shares)

    def _said(self, shares: Sparse) -> Sparse:
        if isinstance(self.evidence, Words):
            return self.evidence.likeness(self.evidence.vectors(shares))
        return self.evidence.after(shares) if self.evidence.rule.second else self.evidence.follow(shares)

    def scores(self, histories: Histories, times: Sequence[np.ndarray] | None = None) -> np.ndarray:
        """Score all items for users with these item rows in their histories, met at these times: U x M."""
        whole = [np.asarray(history, dtype=int) for history in histories]
        weights = [np.array(self.rule.recency[: len(own)]) for own in whole]
        if times is not None and self.rule.share_ties:
            weights = [ages(own, self.rule) for own in times]
        several = [own[::-1][: len(by_age)] for own, by_age in zip(whole, weights)]
        self._shared.asked += sum(map(len, several))
        # Making the table takes as long as scoring its M rows.
        pays = self._shared.rows is not None or self._shared.asked > self.num_items
        if not pays or self.table is None:
            shares = recent(whole, self.rule, times)
            return self._said(shares).dense(len(several), self.num_items)
        return summed_rows(self.table, list(zip(several, weights)))

    def aged(self, recency: Sequence[float]) -> "LastItems":
        """Return a copy with other weights of the last items; it shares the table."""
        return self.ruled(replace(self.rule, recency=tuple(recency)))

    def ruled(self, rule: Evidence) -> "LastItems":
        """Return a copy that weights the last items by another rule; it shares the table."""
        other = LastItems(self.evidence, rule)
        other._shared = self._shared
        return other


@dataclass
class _Table:
    """A table of item scores, which rules with other weights of the last items share."""

    rows: np.ndarray | None = None
    """M x M; None: not made."""
    asked: int = 0
    """Number of rows that were used so far."""


def second_work(transitions: Transitions) -> int:
    """Number of additions needed for second-order transitions."""
    first, second = np.divmod(transitions.counts().keys, WIDTH)
    return int(np.bincount(first, minlength=transitions.num_items)[second].sum())


class NeighboursAndWords:
    """Scores items by transitions from the last items in other histories, and by rare words in common with them.

    A catalogue with `Evidence`, which defines the formula, adds the same scores to the model's. Nothing is learnt; the
    settings were chosen once, on validation purchases of Amazon Beauty, and are the same for every log.

    Args:
        texts: Text of each of the M items.
        sequences: Items of each training history, in order, as rows of the catalogue.
        words: The `Words` of the texts, if computed already.

    >>> rule = NeighboursAndWords(["red shoes", "blue shoes", "green tea", "tea pot"], [[0, 2], [0, 2], [3, 0]])
    >>> rule.scores([[0]])[0].argsort()[::-1].tolist()      # green tea was bought after red shoes
    [2, 0, 3, 1]
    """

    def __init__(self, texts: Sequence[str], sequences: Histories, words: LastItems | None = None) -> None:
        self.rule = Evidence()
        self.transitions = LastItems(Transitions.fit(sequences, len(texts), self.rule), self.rule)
        self.words = words or LastItems(Words.of(texts), self.rule)

    def scores(self, histories: Histories) -> np.ndarray:
        """Score all items for users with these item rows in their histories: U x M."""
        several = list(histories)
        followed = self.rule.transitions * self.transitions.scores(several)
        return followed + self.rule.words * self.words.scores(several)


class Met:
    """Which items each of N histories has met, as EASE reads them; models with several penalties share it.

    Args:
        sequences: Items of each history, as rows of the catalogue.
        num_items: M.

    Attributes:
        gram: The smaller of M x M, counts of the histories with both of two items, and N x N, counts of the items in
            both of two histories.

    Raises:
        ValueError: There are too many histories and items.
    """

    def __init__(self, sequences: Sequence[Sequence[int] | np.ndarray], num_items: int) -> None:
        refuse_large_ease(len(sequences), num_items)
        self.num_items, self.num_histories = num_items, len(sequences)
        self.by_histories = self.num_histories < num_items
        self.owners, self.items = _distinct(sequences, num_items)
        if self.by_histories:
            order = np.argsort(self.items, kind="stable")
            self.owners, self.items = self.owners[order], self.items[order]
            self.starts = np.searchsorted(self.items, np.arange(num_items + 1))
            self.readers = np.split(self.owners, self.starts[1:-1])
        self.gram = met_together(*((self.readers, self.num_histories) if self.by_histories else (sequences, num_items)))

    def inverse(self, strength: float) -> torch.Tensor:
        """Return the inverse of the Gram matrix plus a ridge penalty."""
        matrix = torch.from_numpy(self.gram)
        diagonal = matrix.diagonal().clone()
        matrix.diagonal().add_(strength)
        factor = torch.linalg.cholesky(matrix)
        matrix.diagonal().copy_(diagonal)
        return torch.cholesky_inverse(factor)


class Ease:
    """EASE (Steck 2019): the linear model between items without self-weights, in closed form.

    An item's score is the sum of the weights from each distinct item of the history. The closed form inverts a matrix
    of M x M, or with fewer histories than items one of N x N (Woodbury's identity); the scores are the same.

    Args:
        met: The N training histories.
        strength: Ridge penalty.
    """

    def __init__(self, met: Met, strength: float) -> None:
        self.num_items, self.strength = met.num_items, strength
        self._weights: torch.Tensor | None = None
        if met.by_histories:
            self._invert_histories(met)
        else:
            weights = met.inverse(strength)
            weights /= -weights.diagonal().clone()
            weights.fill_diagonal_(0)
            self._weights = weights

    def _invert_histories(self, met: Met) -> None:
        """Prepare the weights from the inverse for histories, K = (X X' + strength)^-1, with X of N x M."""
        self._readers = met.readers
        owners, items = torch.from_numpy(met.owners), torch.from_numpy(met.items)
        loads = functional.embedding_bag(
            owners, met.inverse(self.strength), torch.from_numpy(met.starts[:-1]), mode="sum"
        )
        own = torch.zeros(self.num_items)
        own.index_add_(0, items, loads[items, owners])
        self._scale = 1 - own
        self._loads = loads.T.contiguous()
        """K X: N x M."""

    def rows(self, items: np.ndarray, columns: np.ndarray | None = None) -> torch.Tensor:
        """Return the weights from each of D items to C distinct items, or to all: D x C in float32."""
        places, chosen = torch.from_numpy(items), None if columns is None else torch.from_numpy(columns)
        if self._weights is not None:
            rows = self._weights[places]
            return rows if chosen is None else rows.index_select(1, chosen)
        readers = [self._readers[item] for item in items.tolist()]
        starts = np.cumsum([0, *map(len, readers)])[:-1]
        flat = torch.from_numpy(np.concatenate([np.empty(0, dtype=int), *readers]))
        loads, scale = self._loads, self._scale
        if chosen is not None:
            loads, scale = loads.index_select(1, chosen), scale[chosen]
        found = functional.embedding_bag(flat, loads, torch.from_numpy(starts), mode="sum") / scale
        if chosen is None:
            found[torch.arange(len(items)), places] = 0  # without self-weights
        else:
            found[places[:, None] == chosen] = 0
        return found

    def scores(self, histories: Histories) -> np.ndarray:
        """Score all items for users with these item rows in their histories: U x M."""
        distinct = [np.unique(np.asarray(history, dtype=int)) for history in histories]
        owners = np.repeat(np.arange(len(distinct)), [len(own) for own in distinct])
        items = np.concatenate([np.empty(0, dtype=int), *distinct])
        return self.weighed(Sparse(owners, items, np.ones(len(items))), len(distinct))

    def weighed(self, shares: Sparse, count: int) -> np.ndarray:
        """Score all items for `count` users with these weighted items: U x M in float32."""
        owners, items, weights = (torch.from_numpy(own) for own in shares)
        loads = torch.zeros(count, self.num_items)
        loads[owners, items] = weights.float()
        if self._weights is not None:
            return (loads @ self._weights).numpy()
        found = (self._shared(shares, count) @ self._loads) / self._scale
        return (found + loads * (1 - 1 / self._scale)).numpy()  # without self-weights

    def _shared(self, shares: Sparse, count: int) -> torch.Tensor:
        """Return the summed weights of the items that each user has in common with each history: U x N."""
        found = np.zeros((count, len(self._loads)), dtype=np.float32)
        for owner, item, weight in zip(*(own.tolist() for own in shares)):
            found[owner, self._readers[item]] += weight
        return torch.from_numpy(found)

    def table(self, entries: int = ENTRIES) -> ItemWeights:
        """Return the weights of each item with the largest absolute values, `entries` for each row at most."""
        columns, values = [], []
        for start in range(0, self.num_items, ROWS_AT_ONCE):
            rows = self.rows(np.arange(start, min(start + ROWS_AT_ONCE, self.num_items)))
            kept = rows.abs().topk(min(entries, self.num_items), dim=1).indices
            columns.append(kept.numpy())
            values.append(rows.gather(1, kept).numpy())
        return ItemWeights.of_rows(np.concatenate(columns), np.concatenate(values))


def ease_is_quick(num_histories: int, num_items: int) -> bool:
    """Return whether EASE takes only seconds, and little memory."""
    smaller = min(num_histories, num_items)
    return smaller <= EASE_QUICK and smaller * num_items <= EASE_CELLS


def refuse_large_ease(num_histories: int, num_items: int) -> None:
    """Raise if EASE would take too much memory and time."""
    if min(num_histories, num_items) * num_items > EASE_ITEMS**2:
        raise ValueError(
            f"EASE keeps a table of {num_items:,} items by as many items, or by {num_histories:,} histories if these "
            f"are fewer; this is more than {EASE_ITEMS:,} by {EASE_ITEMS:,}: leave ease out of evaluation.baselines"
        )


def met_together(sequences: Histories, num_items: int) -> np.ndarray:
    """Count the users who have met both of two items: M x M in float32, with each item's users on the diagonal."""
    counts, several = torch.zeros(num_items, num_items), list(sequences)
    at_once = max(CELLS_AT_ONCE // max(num_items, 1), 1)
    for start in range(0, len(several), at_once):
        part = several[start : start + at_once]
        owners, items = (torch.from_numpy(own) for own in _distinct(part, num_items))
        table = torch.zeros(len(part), num_items)
        table[owners, items] = 1
        rows, order = torch.sort(items, stable=True)
        rows, lengths = torch.unique_consecutive(rows, return_counts=True)
        counts[rows] += functional.embedding_bag(owners[order], table, lengths.cumsum(0) - lengths, mode="sum")
    return counts.numpy()


def _distinct(sequences: Histories, num_items: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the history and the item of each distinct item of a history, sorted by history, then by item."""
    several = [np.asarray(sequence, dtype=int) for sequence in sequences]
    owners = np.repeat(np.arange(len(several)), [len(own) for own in several])
    keys = np.unique(owners * num_items + np.concatenate([np.empty(0, dtype=int), *several]))
    return keys // max(num_items, 1), keys % max(num_items, 1)


def summed_rows(table: np.ndarray, chosen: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Sum weighted rows of an M x M table, for each of U pairs (rows, weights): U x M."""
    found = np.zeros((len(chosen), table.shape[1]), dtype=table.dtype)
    for user, (rows, weights) in enumerate(chosen):
        if len(rows):
            np.dot(weights.astype(table.dtype), table[rows], out=found[user])
    return found


class _Words:
    """Word counts of texts, as a sparse matrix.

    Attributes:
        rows: Text of each entry.
        columns: Word of each entry.
        counts: Count of the word in the text, per entry.
        frequency: Number of texts with each word.
        shape: Texts x words.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        words: dict[str, int] = {}
        rows: list[int] = []
        columns: list[int] = []
        counts: list[int] = []
        for row, text in enumerate(texts):
            own = Counter(words.setdefault(word, len(words)) for word in WORD.findall(text.lower()))
            rows += [row] * len(own)
            columns += own.keys()
            counts += own.values()
        self.shape = (len(texts), max(len(words), 1))
        self.rows, self.columns = torch.tensor([rows, columns], dtype=torch.long)
        self.counts = torch.tensor(counts, dtype=torch.double)
        self.frequency = torch.bincount(self.columns, minlength=self.shape[1]).double()

    def matrix(self, weights: torch.Tensor) -> torch.Tensor:
        """Return the texts' vectors with these entry weights, normalised to length 1, as a sparse matrix."""
        norms = torch.zeros(self.shape[0], dtype=torch.double).index_add(0, self.rows, weights**2).sqrt()
        values = weights / norms.clamp_min(1e-12)[self.rows]
        places = torch.stack([self.rows, self.columns])
        return torch.sparse_coo_tensor(places, values, self.shape, check_invariants=False).coalesce()


def _likeness(vectors: torch.Tensor, shares: np.ndarray) -> np.ndarray:
    """Multiply the items' vectors with the users' vectors, weighted sums (U x M) of item vectors: U x M."""
    return (vectors @ (vectors.t() @ torch.from_numpy(shares.T.copy()))).T.numpy()


__all__ = [
    "Ease",
    "LastItems",
    "Met",
    "NeighboursAndWords",
    "RecentPopularity",
    "Repeat",
    "SimilarText",
    "ease_is_quick",
    "met_together",
    "popularity_scores",
    "refuse_large_ease",
    "second_work",
    "summed_rows",
]
