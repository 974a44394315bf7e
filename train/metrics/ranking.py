"""Metrics of ranked recommendations: one relevant item per user, ranked among the whole catalogue.

U users, M items of the catalogue. r is the 1-based rank of a user's target. Ties share the mean rank: if all items have
the same score, the target is in the middle of the catalogue, independent of its position.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .checks import flat_rows, positive, refuse, same_length, vector, whole


def target_ranks(
    scores: ArrayLike, targets: ArrayLike, excluded: Sequence[ArrayLike] | NDArray | None = None
) -> NDArray[np.float64]:
    """Return the rank of each user's target among all items that are not excluded.

    r = 1 + (items with a higher score) + (other items with the same score) / 2. An excluded target is never
    recommended: its rank is infinite, which every metric counts as a miss.

    Args:
        scores: U x M, higher is better; -inf is below everything, and ties with -inf.
        targets: The column of each user's relevant item (U).
        excluded: Columns to leave out, one list per user (seen items).

    Returns:
        The 1-based ranks (U), halves if an even number of items tie, inf if the target is excluded.

    Raises:
        ValueError: A score is NaN, a target or an excluded column is not in the catalogue, or the lengths differ.

    >>> target_ranks([[0.9, 0.5, 0.5, 0.1]], [1])                       # 1 higher, 1 other equal: 1 + 1 + 1/2
    array([2.5])
    >>> target_ranks([[0.9, 0.5, 0.5, 0.1]], [1], excluded=[[0]])       # the higher one is seen: 1 + 0 + 1/2
    array([1.5])
    >>> target_ranks([[0.9, 0.5, 0.5, 0.1]], [1], excluded=[[0, 1]])    # the target is seen: never recommended
    array([inf])
    """
    table = _score_table(scores)
    if not len(table):
        return np.empty(0)
    columns = whole("targets", vector("targets", targets), table.shape[1])
    same_length("targets", len(columns), "scores", len(table))
    users = np.arange(len(table))
    kept = _kept(table.shape, excluded)
    own = table[users, columns][:, None]
    higher = ((table > own) & kept).sum(axis=1)
    equal = ((table == own) & kept).sum(axis=1)
    return np.where(kept[users, columns], higher + (equal + 1) / 2, np.inf)


def top_items(
    scores: ArrayLike, k: int, excluded: Sequence[ArrayLike] | NDArray | None = None
) -> list[NDArray[np.int64]]:
    """Return the columns of each user's k highest scores, best first.

    Equal scores are in the order of the columns, also if the k-th place is tied. Items with score -inf are never
    recommended, so a list is shorter than k if fewer items are left.

    Args:
        scores: U x M, higher is better.
        k: Length of a list.
        excluded: Columns to leave out, one list per user.

    Raises:
        ValueError: A score is NaN, or an excluded column is not in the catalogue.

    >>> top_items([[0.1, 0.9, 0.5, 0.5]], k=2)
    [array([1, 2])]
    >>> top_items([[0.1, 0.9, 0.5, 0.5]], k=3, excluded=[[1, 2]])       # only two are left
    [array([3, 0])]
    """
    table = _score_table(scores)
    if not table.size:
        return [np.empty(0, dtype=np.int64) for _ in table]
    k = min(positive("k", k), table.shape[1])
    table = np.where(_kept(table.shape, excluded), table, -np.inf)
    # Partitioning finds the k-th best score without sorting the catalogue; of its ties the first columns are used.
    last = np.partition(table, -k, axis=1)[:, [-k]]
    above, tied = table > last, table == last
    chosen = above | (tied & (np.cumsum(tied, axis=1) <= k - above.sum(axis=1, keepdims=True)))
    columns = np.nonzero(chosen)[1].reshape(len(table), k)
    found = np.take_along_axis(table, columns, axis=1)
    order = np.argsort(-found, axis=1, kind="stable")
    columns, found = np.take_along_axis(columns, order, axis=1), np.take_along_axis(found, order, axis=1)
    return [row[best > -np.inf] for row, best in zip(columns, found)]


def recall_at_k(ranks: ArrayLike, k: int) -> float:
    """Return the share of users whose target is among the first k (with one target also called hit rate).

    Recall@k = mean over users of [r <= k]. A mean rank is not rounded: 10.5 is outside the first 10.

    Args:
        ranks: 1-based ranks of the targets (U), from `target_ranks`.
        k: The cut-off.

    Raises:
        ValueError: There are no ranks, or one is NaN or below 1, or k is not positive.

    >>> recall_at_k([1, 2.5, 4], k=2)       # (1 + 0 + 0) / 3
    0.3333333333333333
    """
    return float(np.mean(_ranks(ranks) <= positive("k", k)))


def ndcg_at_k(ranks: ArrayLike, k: int) -> float:
    """Return the normalised discounted cumulative gain with one relevant item per user.

    NDCG@k = mean over users of [r <= k] / log2(1 + r); the ideal gain is 1. A mean rank is not rounded: each of
    two tied first items has the gain 1 / log2(2.5).

    Args:
        ranks: 1-based ranks of the targets (U), from `target_ranks`.
        k: The cut-off.

    Raises:
        ValueError: There are no ranks, or one is NaN or below 1, or k is not positive.

    >>> ndcg_at_k([1, 3, 7], k=5)           # (1 / log2(2) + 1 / log2(4) + 0) / 3 = 1.5 / 3
    0.5
    """
    return float(np.mean(ndcg_gains(ranks, k)))


def ndcg_gains(ranks: ArrayLike, k: int) -> NDArray[np.float64]:
    """Return each user's [r <= k] / log2(1 + r), of which `ndcg_at_k` is the mean.

    Args:
        ranks: 1-based ranks of the targets (U), from `target_ranks`.
        k: The cut-off.

    Raises:
        ValueError: There are no ranks, or one is NaN or below 1, or k is not positive.

    >>> ndcg_gains([1, 3, 7], k=5)
    array([1. , 0.5, 0. ])
    """
    ranks = _ranks(ranks)
    return (ranks <= positive("k", k)) / np.log2(1 + ranks)


def mrr(ranks: ArrayLike) -> float:
    """Return the mean reciprocal rank, without a cut-off.

    MRR = mean over users of 1 / r, with r the mean rank if items tie.

    Args:
        ranks: 1-based ranks of the targets (U), from `target_ranks`.

    Raises:
        ValueError: There are no ranks, or one is NaN or below 1.

    >>> mrr([1, 2, 4, 4])                   # (1 + 1/2 + 1/4 + 1/4) / 4
    0.5
    """
    return float(np.mean(1 / _ranks(ranks)))


def ranking_report(
    ranks: ArrayLike, ks: Sequence[int] = (5, 10, 20), subsets: Mapping[str, ArrayLike] | None = None
) -> dict[str, float]:
    """Return all metrics of ranks as one flat dict, over all users and over named subsets.

    Args:
        ranks: 1-based ranks of the targets (U), from `target_ranks`.
        ks: The cut-offs.
        subsets: name -> mask of the users (or targets) that belong to it (U, bool), such as "warm" and "cold".

    Returns:
        `recall@k` and `ndcg@k` for each k, `mrr`, `examples`, and the same under `name/` for each subset. A subset
        without examples is left out.

    Raises:
        ValueError: The ranks are not valid, or a mask is not a bool per rank.

    >>> ranking_report([1, 3], ks=[1], subsets={"cold": [False, True], "empty": [False, False]})
    {'recall@1': 0.5, 'ndcg@1': 0.5, 'mrr': 0.66..., 'examples': 2,
     'cold/recall@1': 0.0, 'cold/ndcg@1': 0.0, 'cold/mrr': 0.33..., 'cold/examples': 1}
    """
    ranks = _ranks(ranks)
    report: dict[str, float] = {}
    for k in ks:
        report[f"recall@{k}"] = recall_at_k(ranks, k)
        report[f"ndcg@{k}"] = ndcg_at_k(ranks, k)
    report |= {"mrr": mrr(ranks), "examples": len(ranks)}
    for name, given in (subsets or {}).items():
        mask = np.asarray(given)
        if mask.dtype != np.bool_ or mask.shape != ranks.shape:
            raise ValueError(
                f"subset {name!r} is {mask.dtype} of shape {mask.shape}; expected a bool for each of {len(ranks)} ranks"
            )
        if mask.any():
            report |= {f"{name}/{key}": value for key, value in ranking_report(ranks[mask], ks).items()}
    return report


def coverage(recommended: Sequence[ArrayLike] | NDArray, num_items: int) -> float:
    """Return the share of the catalogue that is recommended to at least one user.

    coverage = |union of the users' lists| / M. It depends on the number of users and on k: report both with it.

    Args:
        recommended: Each user's list of columns, from `top_items`; the lists may differ in length.
        num_items: M.

    Raises:
        ValueError: There are no users, or a column is not in the catalogue.

    >>> coverage([[0, 1], [1, 3]], num_items=6)     # items 0, 1 and 3 of 6
    0.5
    """
    _some_users(recommended)
    num_items = positive("num_items", num_items)
    return len(np.unique(flat_rows("recommended", recommended, num_items)[1])) / num_items


def popularity_bias(recommended: Sequence[ArrayLike] | NDArray, popularity: ArrayLike) -> float:
    """Return the popularity of recommended items relative to the catalogue's, minus 1.

    bias = ARP / mean(p) - 1, with the average recommendation popularity ARP = mean over users of the mean p over the
    user's list, and p an item's popularity (its events in the training data). 0: as popular as items drawn at random;
    1: twice as popular; below 0: the tail is favoured. A ratio, so counts and shares give the same value. Users with
    an empty list are left out.

    Args:
        recommended: Each user's list of columns, from `top_items`; the lists may differ in length.
        popularity: p of every item of the catalogue (M), not negative.

    Raises:
        ValueError: All lists are empty, a column is not in the catalogue, or the popularity is negative, not finite or
            zero throughout.

    >>> popularity_bias([[0, 1], [0]], popularity=[6, 2, 1, 3])     # ARP = ((6 + 2) / 2 + 6) / 2 = 5; 5 / 3 - 1
    0.66...
    """
    _some_users(recommended)
    events = vector("popularity", popularity, finite=True)
    refuse("popularity", events, events < 0, "a count or share, not negative")
    if not events.any():
        raise ValueError("popularity is 0 for every item; expected the items' counts in the training data")
    users, items = flat_rows("recommended", recommended, len(events))
    lengths = np.bincount(users, minlength=len(recommended))
    if not len(users):
        raise ValueError(f"recommended holds {len(lengths)} empty lists; expected at least one recommended item")
    listed = lengths > 0
    sums = np.bincount(users, weights=events[items], minlength=len(recommended))
    return float(np.mean(sums[listed] / lengths[listed]) / np.mean(events) - 1)


def list_exposure(recommended: Sequence[ArrayLike] | NDArray, num_items: int) -> NDArray[np.float64]:
    """Return the exposure of each item (M): the sum over all lists of 1 / log2(rank + 1).

    Args:
        recommended: Each user's list of columns, the first item first; the lists may differ in length.
        num_items: M.

    Raises:
        ValueError: There are no users, or a column is not in the catalogue.

    >>> list_exposure([[0, 1], [0, 2]], num_items=4).round(2).tolist()
    [2.0, 0.63, 0.63, 0.0]
    """
    _some_users(recommended)
    users, items = flat_rows("recommended", recommended, positive("num_items", num_items))
    starts = np.searchsorted(users, users)
    weights = 1 / np.log2(np.arange(len(users)) - starts + 2)
    return np.bincount(items, weights, minlength=num_items).astype(np.float64)


def gini(values: ArrayLike) -> float:
    """Return the Gini coefficient of M amounts: 0 if all are equal, (M - 1) / M if one item has everything.

    G = sum_i (2 i - M - 1) x_i / (M sum x), x in ascending order. Amounts of 0 count.

    Args:
        values: M amounts, not negative, at least one above 0.

    Raises:
        ValueError: An amount is negative or not finite, or all are 0.

    >>> gini([0, 0, 0, 1]), gini([2, 2])
    (0.75, 0.0)
    """
    amounts = vector("values", values, finite=True)
    refuse("values", amounts, amounts < 0, "an amount, not negative")
    if not amounts.any():
        raise ValueError("values are all 0; expected an amount above 0")
    ranks = 2 * np.arange(1, len(amounts) + 1) - len(amounts) - 1
    return float((ranks * np.sort(amounts)).sum() / (len(amounts) * amounts.sum()))


def _score_table(scores: ArrayLike) -> NDArray:
    table = np.asarray(scores)
    if table.ndim != 2 or table.dtype.kind not in "fiu":
        raise ValueError(
            f"scores is {table.dtype} of shape {table.shape}; expected numbers of shape (users, items of the catalogue)"
        )
    refuse("scores", table, np.isnan(table), "a number, or -inf for what must not be recommended")
    return table


def _kept(shape: tuple[int, ...], excluded: Sequence[ArrayLike] | NDArray | None) -> NDArray[np.bool_]:
    """U x M, false where an item is excluded for a user."""
    kept = np.ones(shape, dtype=bool)
    if excluded is not None:
        same_length("excluded", len(excluded), "scores", shape[0])
        kept[flat_rows("excluded", excluded, shape[1])] = False
    return kept


def _ranks(ranks: ArrayLike) -> NDArray[np.float64]:
    values = vector("ranks", ranks)
    refuse("ranks", values, values < 1, "ranks that start at 1, as `target_ranks` returns them")
    return values


def _some_users(recommended: Sequence[ArrayLike] | NDArray) -> None:
    if not len(recommended):
        raise ValueError("recommended is empty; expected one list of columns a user")


__all__ = [
    "coverage",
    "gini",
    "list_exposure",
    "mrr",
    "ndcg_at_k",
    "ndcg_gains",
    "popularity_bias",
    "ranking_report",
    "recall_at_k",
    "target_ranks",
    "top_items",
]
