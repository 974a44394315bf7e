"""What is known of an item beside its text, told with it as a candidate: a short segment that may change every day."""

import numpy as np
import pandas

ITEM_LIKES = "item_likes"
"""Name of the statistic, in `text.statistics` and in the templates: how many in a hundred of an item's labels are 1."""
FOLDS = 5
"""Parts of the users, in training: what is told of a user's candidates is counted without the users of the own part.
Were the own label alone left out, each item's text and share would together give it away."""
STRENGTH = 5.0
"""How many labels the share of all counts as in an item's (ours)."""
STEP = 5
"""What is told is rounded to so many in a hundred, so that there are few texts to learn and to keep."""


class ItemLikes:
    """Shares of likes among the training labels of each item, drawn towards the share of all.

    Args:
        users: Ids of whom the N labels are.
        rows: Catalogue rows of what they are about.
        labels: 0 or 1.
        num_items: Items of the catalogue, M.
        seed: Of the parts of the users.
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
        """Tell how many in a hundred like each of these items.

        Args:
            rows: Catalogue rows.
            learner: Whose training labels are learnt with this at hand; None: nobody's.
        """
        shares = self._all if learner is None else self._without[self._folds.get(learner, 0)]
        return percent(shares[rows])


def _shares(likes: np.ndarray, counts: np.ndarray) -> np.ndarray:
    overall = likes.sum() / max(counts.sum(), 1)
    return (likes.sum(0) + STRENGTH * overall) / (counts.sum(0) + STRENGTH)


def percent(shares: np.ndarray) -> list[int]:
    """Round shares to steps in a hundred.

    >>> percent(np.array([0.0, 0.07, 0.08, 1.0]))
    [0, 5, 10, 100]
    """
    return (np.round(shares * 100 / STEP) * STEP).astype(int).tolist()


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


__all__ = [
    "ITEM_LIKES",
    "ItemLikes",
    "like_rates",
    "percent",
]
