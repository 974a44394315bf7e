"""Metrics of click probabilities and of ratings.

N examples; s a score, p a probability, y a label, 0 or 1. A score may be any monotone function of the probability if
only the order matters (`auc`, `grouped_auc`); `log_loss` and the calibration error need the probability itself.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .checks import group_numbers, pair, positive, refuse, vector

# Avoids an infinite loss for a probability of exactly 0 or 1: a certain error costs -ln(2 ** -52) = 36.04.
CLIP = float(np.finfo(np.float64).eps)


def auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Return the area under the ROC curve: the probability that a positive example scores higher than a negative one.

    AUC = (sum of the positives' ranks - P (P + 1) / 2) / (P N), ranks from the lowest score, with P positives and N
    negatives. Ties share the mean rank, which counts a tied pair as a half.

    Args:
        scores: s of each example; infinities allowed.
        labels: y of each example.

    Raises:
        ValueError: All labels are the same (there is no pair to compare), or the input is not valid.

    >>> auc([0.1, 0.4, 0.4, 0.8], [0, 0, 1, 1])     # pairs: 1, 1, a tie, 1: (3 + 1/2) / 4
    0.875
    """
    scores, truth = _with_labels("scores", scores, labels)
    if truth.min() == truth.max():
        raise ValueError(f"labels are all {truth[0]:.0f}; expected both classes: the AUC compares one with the other")
    return float(_auc_by_group(scores, truth, np.zeros(len(truth), dtype=np.int64))[0])


def grouped_auc(scores: ArrayLike, labels: ArrayLike, groups: ArrayLike) -> float:
    """Return the AUC within groups, weighted by their size (GAUC): it ignores differences between users.

    GAUC = sum over groups of n_g AUC_g / sum of n_g, with n_g the examples of group g. Groups with one class only have
    no AUC and are left out of both sums; `mixed_groups` returns the remaining examples.

    Args:
        scores: s of each example; infinities allowed.
        labels: y of each example.
        groups: The group of each example, usually its user.

    Raises:
        ValueError: No group has both classes, or the input is not valid.

    >>> grouped_auc([0.2, 0.9, 0.3, 0.7, 0.5, 0.6], [0, 1, 1, 0, 0, 1], ["a", "a", "b", "b", "b", "c"])
    0.4

    a: 1 of 1 pair, b: 0 of 2, c has one class: (2 * 1 + 3 * 0) / 5.
    """
    scores, truth = _with_labels("scores", scores, labels)
    mixed = mixed_groups(truth, groups)
    if not mixed.any():
        raise ValueError(
            f"none of the {len(np.unique(np.asarray(groups)))} groups has both classes; "
            "expected at least one that has: the AUC compares one class with the other"
        )
    numbers = group_numbers(np.asarray(groups)[mixed], int(mixed.sum()))
    return float(np.average(_auc_by_group(scores[mixed], truth[mixed], numbers), weights=np.bincount(numbers)))


def mixed_groups(labels: ArrayLike, groups: ArrayLike) -> NDArray[np.bool_]:
    """Return the mask (N) of examples in a group with both classes: those that `grouped_auc` uses.

    >>> mixed_groups([0, 1, 1, 1], ["a", "a", "b", "b"])
    array([ True,  True, False, False])
    """
    truth = _binary(vector("labels", labels))
    numbers = group_numbers(groups, len(truth))
    sizes, positives = np.bincount(numbers), np.bincount(numbers, weights=truth)
    return ((positives > 0) & (positives < sizes))[numbers]


def log_loss(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Return the mean negative log-likelihood of the labels, in nats.

    log-loss = -mean of y ln p + (1 - y) ln(1 - p), p clipped to [2 ** -52, 1 - 2 ** -52]. One class only is allowed.

    Args:
        probabilities: p of label 1 for each example.
        labels: y of each example.

    Raises:
        ValueError: A probability is outside 0 to 1, or the input is not valid.

    >>> log_loss([0.5, 0.25], [1, 0])       # (ln 2 + ln 4/3) / 2 = ln(8/3) / 2
    0.4904...
    """
    return float(np.mean(log_losses(probabilities, labels)))


def log_losses(probabilities: ArrayLike, labels: ArrayLike) -> NDArray[np.float64]:
    """Return each example's -ln of the probability of its label, of which `log_loss` is the mean.

    Args:
        probabilities: p of label 1 for each example.
        labels: y of each example.

    Raises:
        ValueError: A probability is outside 0 to 1, or the input is not valid.

    >>> log_losses([0.5, 0.25], [1, 0])     # ln 2, ln 4/3
    array([0.693..., 0.287...])
    """
    chance, truth = _probabilities_and_labels(probabilities, labels)
    chance = np.clip(chance, CLIP, 1 - CLIP)
    return -(truth * np.log(chance) + (1 - truth) * np.log1p(-chance))


def expected_calibration_error(probabilities: ArrayLike, labels: ArrayLike, bins: int = 15) -> float:
    """Return the mean difference of probabilities and frequencies, over bins of equal width.

    ECE = sum over bins of n_b / N * |mean p in b - mean y in b|. Bin b of B is [b / B, (b + 1) / B), the last one holds
    1 too; empty bins are ignored. One class only is allowed. The value depends on B: report B with it.

    Args:
        probabilities: p of label 1 for each example.
        labels: y of each example.
        bins: B.

    Raises:
        ValueError: A probability is outside 0 to 1, or the input is not valid.

    >>> expected_calibration_error([0.25, 0.25, 1.0, 0.5], [0, 1, 1, 1], bins=2)
    0.25

    Below 1/2: 2/4 * |0.25 - 0.5| = 0.125; from 1/2 on: 2/4 * |0.75 - 1| = 0.125.
    """
    chance, truth = _probabilities_and_labels(probabilities, labels)
    bins = positive("bins", bins)
    # A comparison with b / B puts 0.29 into bin 29 of 100; floor(0.29 * 100) is 28.
    numbers = np.searchsorted(np.arange(1, bins) / bins, chance, side="right")
    return float(np.abs(np.bincount(numbers, weights=chance - truth)).sum() / len(truth))


def accuracy(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Return the share of examples whose predicted class is the true one; any number of classes.

    Args:
        predictions: The predicted class of each example: integers, not probabilities.
        labels: The class of each example.

    Raises:
        ValueError: A class is not an integer, or the input is not valid.

    >>> accuracy([1, 0, 4, 2], [1, 1, 4, 2])        # 3 of 4
    0.75
    """
    guess, truth = pair(("predictions", "labels"), predictions, labels, finite=True)
    for name, classes in (("predictions", guess), ("labels", truth)):
        refuse(name, classes, classes != np.floor(classes), "a class, a whole number: choose one by a threshold")
    return float(np.mean(guess == truth))


def rmse(predictions: ArrayLike, targets: ArrayLike) -> float:
    """Return the root of the mean squared error, in the unit of the ratings.

    Args:
        predictions: The predicted rating of each example.
        targets: The given rating of each example.

    Raises:
        ValueError: A value is not finite, or the input is not valid.

    >>> rmse([3, 1], [3, 3])        # sqrt((0 + 4) / 2)
    1.4142...
    """
    guess, truth = pair(("predictions", "targets"), predictions, targets, finite=True)
    return float(np.sqrt(np.mean((guess - truth) ** 2)))


def mae(predictions: ArrayLike, targets: ArrayLike) -> float:
    """Return the mean absolute error, in the unit of the ratings.

    Args:
        predictions: The predicted rating of each example.
        targets: The given rating of each example.

    Raises:
        ValueError: A value is not finite, or the input is not valid.

    >>> mae([3, 1], [3, 3])         # (0 + 2) / 2
    1.0
    """
    guess, truth = pair(("predictions", "targets"), predictions, targets, finite=True)
    return float(np.mean(np.abs(guess - truth)))


def classification_report(
    probabilities: ArrayLike, labels: ArrayLike, groups: ArrayLike | None = None, bins: int = 15
) -> dict[str, float]:
    """Return all metrics of click probabilities as one flat dict.

    Args:
        probabilities: p of label 1 for each example.
        labels: y of each example.
        groups: The group of each example, usually its user.
        bins: Bins of the calibration error.

    Returns:
        `auc` (only with both classes), `log_loss`, `calibration_error`, `accuracy` (label 1 from p = 1/2 on)
        and `examples`; with groups also `gauc`, `gauc_groups` and `gauc_examples`: the numbers it used.

    Raises:
        ValueError: One of the other metrics is not defined on the input.

    >>> classification_report([0.25, 0.75], [0, 1], groups=["a", "a"])
    {'auc': 1.0, 'log_loss': 0.28..., 'calibration_error': 0.25, 'accuracy': 1.0, 'examples': 2,
     'gauc': 1.0, 'gauc_groups': 1, 'gauc_examples': 2}
    """
    chance, truth = _probabilities_and_labels(probabilities, labels)
    both = truth.min() != truth.max()
    report: dict[str, float] = {
        **({"auc": auc(chance, truth)} if both else {}),
        "log_loss": log_loss(chance, truth),
        "calibration_error": expected_calibration_error(chance, truth, bins),
        "accuracy": accuracy(chance >= 0.5, truth),
        "examples": len(truth),
    }
    if groups is not None:
        report["gauc"] = grouped_auc(chance, truth, groups)
        mixed = mixed_groups(truth, groups)
        report["gauc_groups"] = len(np.unique(np.asarray(groups)[mixed]))
        report["gauc_examples"] = int(mixed.sum())
    return report


def _binary(labels: NDArray[np.float64]) -> NDArray[np.float64]:
    refuse("labels", labels, (labels != 0) & (labels != 1), "0 or 1: map the labels, or split them by a threshold")
    return labels


def _with_labels(name: str, values: ArrayLike, labels: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    numbers, truth = pair((name, "labels"), values, labels)
    return numbers, _binary(truth)


def _probabilities_and_labels(
    probabilities: ArrayLike, labels: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    values, truth = _with_labels("probabilities", probabilities, labels)
    outside = (values < 0) | (values > 1)
    refuse("probabilities", values, outside, "a probability from 0 to 1: put scores through a sigmoid or softmax")
    return values, truth


def _auc_by_group(
    scores: NDArray[np.float64], labels: NDArray[np.float64], groups: NDArray[np.int64]
) -> NDArray[np.float64]:
    """The AUC of every group, numbered from 0 without gaps; each must have both classes."""
    values, level = np.unique(scores, return_inverse=True)
    _, place, counts = np.unique(groups * len(values) + level, return_inverse=True, return_counts=True)
    sizes = np.bincount(groups)
    # The last rank of a tie is the running count; its mean rank is (count - 1) / 2 lower. Ranks restart in each group.
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place] - (np.cumsum(sizes) - sizes)[groups]
    positives = np.bincount(groups, weights=labels)
    rank_sums = np.bincount(groups, weights=labels * ranks)
    return (rank_sums - positives * (positives + 1) / 2) / (positives * (sizes - positives))


__all__ = [
    "accuracy",
    "auc",
    "classification_report",
    "expected_calibration_error",
    "grouped_auc",
    "log_loss",
    "log_losses",
    "mae",
    "mixed_groups",
    "rmse",
]
