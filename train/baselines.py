"""Baselines that stand in every table: popularity, most similar text, and for clicks the share of likes."""

import re
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from .metrics import UNSPACED

WORD = re.compile(f"[{UNSPACED}]|[^\\W_{UNSPACED}]+")
"""A word of any script with spaces, or a single character of one without."""


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
        words: dict[str, int] = {}
        rows: list[int] = []
        columns: list[int] = []
        counts: list[int] = []
        for row, text in enumerate(texts):
            own: dict[int, int] = {}
            for word in WORD.findall(text.lower()):
                column = words.setdefault(word, len(words))
                own[column] = own.get(column, 0) + 1
            rows += [row] * len(own)
            columns += own.keys()
            counts += own.values()
        shape = (len(texts), max(len(words), 1))
        places = torch.tensor([rows, columns], dtype=torch.long)
        frequency = torch.bincount(places[1], minlength=shape[1])
        rarity = torch.log((1 + len(texts)) / (1 + frequency.double()))
        weights = (1 + torch.tensor(counts, dtype=torch.double).log()) * rarity[places[1]]
        norms = torch.zeros(len(texts), dtype=torch.double).index_add(0, places[0], weights**2).sqrt().clamp_min(1e-12)
        self.matrix = torch.sparse_coo_tensor(
            places, weights / norms[places[0]], shape, check_invariants=False
        ).coalesce()

    def scores(self, histories: Iterable[Sequence[int] | np.ndarray]) -> np.ndarray:
        """Score all items for users with these item rows in their histories: U x M."""
        items = [torch.as_tensor(np.asarray(history, dtype=int)) for history in histories]
        share = torch.zeros(self.matrix.shape[0], len(items), dtype=torch.double)
        for user, history in enumerate(items):
            share[:, user].index_add_(
                0, history, torch.full((len(history),), 1 / max(len(history), 1), dtype=torch.double)
            )
        return (self.matrix @ (self.matrix.t() @ share)).T.numpy()


def like_rates(labels: np.ndarray, groups: np.ndarray, asked: np.ndarray, strength: float = 5.0) -> np.ndarray:
    """Share of training labels that are 1, by user or by item, drawn towards the overall share.

    Args:
        labels: N training labels, 0 or 1.
        groups: N ids of whom they belong to.
        asked: Ids to answer for; those never seen get the overall share.
        strength: How many examples the overall share counts as (ours).

    >>> like_rates(np.array([1, 1, 0, 0]), np.array(["a", "a", "a", "b"]), np.array(["a", "c"]), strength=2.0).tolist()
    [0.6, 0.5]
    """
    overall = float(labels.mean())
    names, place = np.unique(groups, return_inverse=True)
    total = np.bincount(place, weights=labels, minlength=len(names))
    count = np.bincount(place, minlength=len(names))
    rates = dict(zip(names.tolist(), (total + strength * overall) / (count + strength)))
    return np.array([rates.get(name, overall) for name in asked.tolist()])


__all__ = ["SimilarText", "like_rates", "popularity_scores"]
