"""Which item follows which in users' histories: counted, not learnt."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

RECENCY = (1.0, 0.6, 0.4, 0.3, 0.2)
"""Weights of a history's last items, the last one first; earlier ones count nothing."""
STEPS = (1.0, 0.7)
"""Weights of pairs that stand one and two steps apart."""
BACKWARDS = 0.5
"""Weight of a pair against the order of time."""
OUT_POWER, IN_POWER = 0.5, 0.3
"""How much of an item's own frequency is divided out, as the first and as the second of a pair."""
SECOND = 0.4
"""Weight of what follows an item that follows."""
ENTRIES_AT_ONCE = 1 << 22
"""Entries of the matrix that are added up together; bounds memory."""


def recent_shares(
    histories: Iterable[Sequence[int] | np.ndarray], num_items: int, recency: Sequence[float] = RECENCY
) -> np.ndarray:
    """Weigh the items of each history by their age: U x M, the sum of `recency` where an item is among the last.

    >>> recent_shares([[3, 0, 2, 0]], 4).tolist()       # the last item is also the last but two
    [[1.4, 0.0, 0.6, 0.3]]
    """
    recent = [np.asarray(history, dtype=int)[: -len(recency) - 1 : -1] for history in histories]
    shares = np.zeros((len(recent), num_items))
    for user, items in enumerate(recent):
        np.add.at(shares[user], items, recency[: len(items)])
    return shares


@dataclass(frozen=True, eq=False)
class Transitions:
    """Counted transitions between M items: P as a sparse matrix, row by row.

    P(i, j) = n(i, j) / (out(i) ** a * in(j) ** b), where n(i, j) is the number of times that j stands one, two, ...
    steps behind i in a history, weighed by the steps' weights, and as far before it, weighed by `backwards` too; out
    and in are the sums of its rows and columns, at least 1. No item follows itself.

    Source: after "An Embarrassingly Simple Graph Heuristic Reveals Shortcut-Solvable Benchmarks" (arXiv 2605.07125).

    Attributes:
        starts: Where each row starts in `columns` and `values`, and where the last one ends: M + 1.
        columns: Second items of the pairs.
        values: P of the pairs.

    >>> transitions = Transitions.fit([[0, 1, 2], [0, 1]], num_items=4)
    >>> transitions.matrix()[0].round(3).tolist()       # n(0, 1) = 2, out(0) = 2.7, in(1) = 2.5; n(0, 2) = .7
    [0.0, 0.925, 0.363, 0.0]
    """

    starts: np.ndarray
    columns: np.ndarray
    values: np.ndarray

    @classmethod
    def fit(
        cls,
        sequences: Iterable[Sequence[int] | np.ndarray],
        num_items: int,
        steps: Sequence[float] = STEPS,
        backwards: float = BACKWARDS,
        powers: tuple[float, float] = (OUT_POWER, IN_POWER),
    ) -> "Transitions":
        """Count the transitions in histories.

        Args:
            sequences: Items of each history, in order, as rows of the catalogue.
            num_items: M.
            steps: Weights of pairs that stand one, two, ... steps apart.
            backwards: Weight of a pair against the order of time.
            powers: a and b, how much of an item's own frequency is divided out, as the first and the second of a pair.
        """
        parts = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
        items = np.concatenate([np.empty(0, dtype=np.int64), *parts])
        owner = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        pairs, counts = [np.empty(0, dtype=np.int64)], [np.empty(0)]
        for step, weight in enumerate(steps, 1):
            first, second = items[:-step], items[step:]
            stays = (owner[:-step] == owner[step:]) & (first != second)
            first, second = first[stays], second[stays]
            pairs += [first * num_items + second, second * num_items + first]
            counts += [np.full(len(first), weight), np.full(len(first), weight * backwards)]
        found, place = np.unique(np.concatenate(pairs), return_inverse=True)
        weights = np.bincount(place, np.concatenate(counts), minlength=len(found))
        rows, columns = np.divmod(found, num_items)
        out, into = (np.maximum(np.bincount(side, weights, num_items), 1) for side in (rows, columns))
        values = weights / (out[rows] ** powers[0] * into[columns] ** powers[1])
        return cls(np.searchsorted(rows, np.arange(num_items + 1)), columns, values)

    def holds(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Say of pairs of items whether they were counted.

        >>> Transitions.fit([[0, 1, 2]], num_items=4).holds(np.array([0, 2, 3]), np.array([2, 0, 1])).tolist()
        [True, True, False]
        """
        rows = np.repeat(np.arange(self.num_items), np.diff(self.starts))
        return np.isin(first * self.num_items + second, rows * self.num_items + self.columns)

    @property
    def num_items(self) -> int:
        """M."""
        return len(self.starts) - 1

    def matrix(self) -> np.ndarray:
        """Return P as a dense matrix, for small catalogues."""
        return self.follow(np.eye(self.num_items))

    def scores(self, histories: Iterable[Sequence[int] | np.ndarray]) -> np.ndarray:
        """Score all items for users with these histories: U x M."""
        return self.scores_of(recent_shares(histories, self.num_items))

    def scores_of(self, shares: np.ndarray, second: float = SECOND) -> np.ndarray:
        """Score all items for weighted items, U x M: those that follow, and those that follow these."""
        following = self.follow(shares)
        return following + second * self.follow(following) if second else following

    def follow(self, shares: np.ndarray) -> np.ndarray:
        """Multiply U x M weights of items with P."""
        found = np.zeros(shares.shape)
        users, items = np.nonzero(shares)
        weights, starts = shares[users, items], self.starts[items]
        lengths = self.starts[items + 1] - starts
        ends = np.cumsum(lengths)
        cut = 0
        while cut < len(items):
            before = ends[cut] - lengths[cut]
            stop = max(int(np.searchsorted(ends, before + ENTRIES_AT_ONCE, side="right")), cut + 1)
            part = slice(cut, stop)
            places = np.arange(before, ends[stop - 1])
            places += np.repeat(starts[part] - (ends[part] - lengths[part]), lengths[part])
            low, high = users[cut], users[stop - 1] + 1
            flat = np.repeat((users[part] - low) * self.num_items, lengths[part]) + self.columns[places]
            added = np.repeat(weights[part], lengths[part]) * self.values[places]
            total = np.bincount(flat, added, minlength=(high - low) * self.num_items)
            found[low:high] += total.reshape(high - low, self.num_items)
            cut = stop
        return found


__all__ = ["RECENCY", "Transitions", "recent_shares"]
