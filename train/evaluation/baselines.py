"""Baselines of every table: popularity, similar texts, neighbours and words, and for clicks the share of likes."""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from ...item_features_m6rec import Evidence, Transitions, Words, recent
from ...values_m6rec import WORD


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

    It is what a catalogue with `Evidence`, where the formula is, ranks by beside the model. Nothing is learnt; the
    settings were chosen once, on validation purchases of Amazon Beauty, and are the same for every log.

    Args:
        texts: Text of each of the M items.
        sequences: Items of each training history, in order, as rows of the catalogue.

    >>> rule = NeighboursAndWords(["red shoes", "blue shoes", "green tea", "tea pot"], [[0, 2], [0, 2], [3, 0]])
    >>> rule.scores([[0]])[0].argsort()[::-1].tolist()      # green tea was bought after red shoes
    [2, 0, 3, 1]
    """

    def __init__(self, texts: Sequence[str], sequences: Iterable[Sequence[int] | np.ndarray]) -> None:
        self.rule = Evidence()
        self.transitions = Transitions.fit(sequences, len(texts), self.rule)
        self.words = Words.of(texts)

    def scores(self, histories: Iterable[Sequence[int] | np.ndarray]) -> np.ndarray:
        """Score all items for users with these item rows in their histories: U x M."""
        several = list(histories)
        shares, shape = recent(several, self.rule), (len(several), self.transitions.num_items)
        found = self.rule.transitions * self.transitions.after(shares).dense(*shape)
        return found + self.rule.words * self.words.likeness(self.words.vectors(shares)).dense(*shape)


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
    "NeighboursAndWords",
    "SimilarText",
    "popularity_scores",
]
