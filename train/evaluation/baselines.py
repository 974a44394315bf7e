"""Baselines of every table: popularity, similar texts, neighbours and words, and for clicks the share of likes."""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from ..metrics import WORD
from .transitions import Transitions, recent_shares

WORDS = 0.3
"""What likeness of words counts beside transitions."""


def popularity_scores(counts: np.ndarray, num_users: int) -> np.ndarray:
    """Score items by their training events, the same for every user: U x M."""
    return np.broadcast_to(counts.astype(float), (num_users, len(counts)))


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

    def scores(self, histories: Iterable[Sequence[int] | np.ndarray]) -> np.ndarray:
        """Score all items for users with these item rows in their histories: U x M."""
        items = [np.asarray(history, dtype=int) for history in histories]
        shares = np.zeros((len(items), self.matrix.shape[0]))
        for user, history in enumerate(items):
            np.add.at(shares[user], history, 1 / max(len(history), 1))
        return _likeness(self.matrix, shares)


class NeighboursAndWords:
    """Scores items by what followed the last items in other histories, and by the rare words they share with them.

    The sum, over the last items by `RECENCY`, of the transitions to an item and of `WORDS` times the cosine of TF-IDF
    vectors, whose term weight is log((1 + M) / (1 + df)) + 1 for each word of a text. Nothing is learnt; the settings
    were chosen once, on validation purchases of Amazon Beauty, and are the same for every log.

    Args:
        texts: Text of each of the M items.
        sequences: Items of each training history, in order, as rows of the catalogue.

    >>> rule = NeighboursAndWords(["red shoes", "blue shoes", "green tea", "tea pot"], [[0, 2], [0, 2], [3, 0]])
    >>> rule.scores([[0]])[0].argsort()[::-1].tolist()      # green tea was bought after red shoes
    [2, 0, 3, 1]
    """

    def __init__(self, texts: Sequence[str], sequences: Iterable[Sequence[int] | np.ndarray]) -> None:
        self.transitions = Transitions.fit(sequences, len(texts))
        self.words = RareWords(texts)

    def scores(self, histories: Iterable[Sequence[int] | np.ndarray]) -> np.ndarray:
        """Score all items for users with these item rows in their histories: U x M."""
        shares = recent_shares(histories, self.transitions.num_items)
        return self.transitions.scores_of(shares) + WORDS * self.words.likeness(shares)


class RareWords:
    """Vectors of which words texts hold, rare ones counting more: log((1 + M) / (1 + df)) + 1 for each word of a text.

    Args:
        texts: Text of each of the M items.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        words = _Words(texts)
        rarity = torch.log((1 + words.shape[0]) / (1 + words.frequency)) + 1
        self.matrix = words.matrix(rarity[words.columns])

    def likeness(self, shares: np.ndarray) -> np.ndarray:
        """Compare all items with weighted items, U x M: the sum of the weighted cosines, U x M."""
        return _likeness(self.matrix, shares)


class _Words:
    """Which words each text holds, and how often.

    Attributes:
        rows: Text of each entry.
        columns: Word of each entry.
        counts: How often the text holds the word.
        frequency: In how many texts each word is.
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
        """Return the texts' vectors of these weights of the entries, each of length 1, as a sparse matrix."""
        norms = torch.zeros(self.shape[0], dtype=torch.double).index_add(0, self.rows, weights**2).sqrt()
        values = weights / norms.clamp_min(1e-12)[self.rows]
        places = torch.stack([self.rows, self.columns])
        return torch.sparse_coo_tensor(places, values, self.shape, check_invariants=False).coalesce()


def _likeness(vectors: torch.Tensor, shares: np.ndarray) -> np.ndarray:
    """Multiply the items' vectors with the users', the sums of those of weighted items (U x M): U x M."""
    return (vectors @ (vectors.t() @ torch.from_numpy(shares.T.copy()))).T.numpy()


__all__ = [
    "WORDS",
    "NeighboursAndWords",
    "RareWords",
    "SimilarText",
    "popularity_scores",
]
