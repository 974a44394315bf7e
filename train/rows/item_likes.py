"""Statistics of an item that are added to it as a candidate: a short segment that may change every day."""

import numpy as np
import pandas

ITEM_LIKES = "item_likes"
"""Name of the statistic, in `text.statistics` and in the templates: the percentage of an item's labels that are 1."""
FOLDS = 5
"""Folds of the users in training: statistics of a user's candidates are counted without the users of the same fold.
If only the own label were left out, an item's text and share together would leak it."""
STRENGTH = 5.0
"""Weight of the overall share in an item's share, in labels (not in the paper)."""
STEP = 5
"""Percentages are rounded to a multiple of this, so that there are few distinct texts to learn and to cache."""


class ItemLikes:
    """Shares of likes among the training labels of each item, smoothed towards the overall share.

    Args:
        users: User ids of the N labels.
        rows: Catalogue rows of the N labels' items.
        labels: 0 or 1.
        num_items: Number of items in the catalogue, M.
        seed: Seed of the folds of the users.
    """

    def __init__(self, users: np.ndarray, rows: np.ndarray, labels: np.ndarray, num_items: int, seed: int = 0) -> None:
        places, names = pandas.factorize(users)
        folds = np.random.default_rng(seed).permutation(len(names)) % FOLDS
        self._folds = dict(zip(map(str, names), folds.tolist()))
        likes, counts = np.zeros((2, FOLDS, num_items))
        np.add.at(likes, (folds[places], rows), labels)
        np.add.at(counts, (folds[places], rows), 1)
        without = [np.arange(FOLDS) != fold for fold in range(FOLDS)]
        kept = [slice(None) if len(names) < FOLDS else own for own in without]
        self._all = _shares(likes, counts)
        self._without = [_shares(likes[own], counts[own]) for own in kept]

    def of(self, rows: np.ndarray, learner: str | None = None) -> list[int]:
        """Return the percentage of likes of each of these items.

        Args:
            rows: Catalogue rows.
            learner: User whose training labels are learnt with these statistics; None: no training.
        """
        shares = self._all if learner is None else self._without[self._folds.get(learner, 0)]
        return percent(shares[rows])


def _shares(likes: np.ndarray, counts: np.ndarray) -> np.ndarray:
    overall = likes.sum() / max(counts.sum(), 1)
    return (likes.sum(0) + STRENGTH * overall) / (counts.sum(0) + STRENGTH)


def percent(shares: np.ndarray) -> list[int]:
    """Convert shares to rounded percentages.

    >>> percent(np.array([0.0, 0.07, 0.08, 1.0]))
    [0, 5, 10, 100]
    """
    return (np.round(shares * 100 / STEP) * STEP).astype(int).tolist()


def like_rates(labels: np.ndarray, groups: np.ndarray, ids: np.ndarray, strength: float = 5.0) -> np.ndarray:
    """Share of training labels that are 1, by user or by item, smoothed towards the overall share.

    Args:
        labels: N training labels, 0 or 1.
        groups: N ids of the labels' users or items.
        ids: Ids to return shares for; unknown ids get the overall share.
        strength: Weight of the overall share, in examples (not in the paper).

    >>> like_rates(np.array([1, 1, 0, 0]), np.array(["a", "a", "a", "b"]), np.array(["a", "c"]), strength=2.0).tolist()
    [0.6, 0.5]
    """
    overall = float(labels.mean())
    names, place = np.unique(groups, return_inverse=True)
    total = np.bincount(place, weights=labels, minlength=len(names))
    count = np.bincount(place, minlength=len(names))
    rates = dict(zip(names.tolist(), (total + strength * overall) / (count + strength)))
    return np.array([rates.get(name, overall) for name in ids.tolist()])


__all__ = [
    "ITEM_LIKES",
    "ItemLikes",
    "like_rates",
    "percent",
]
