"""Bootstrap intervals over examples or over whole users."""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .checks import group_numbers, positive, refuse

DRAWN_AT_ONCE = 1 << 22
"""Number of rows drawn together; bounds memory."""


def bootstrap_interval(
    values: ArrayLike,
    statistic: Callable[[NDArray], float] = np.mean,
    groups: ArrayLike | None = None,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of a statistic.

    The rows are drawn with replacement, as many as there are, `samples` times; the interval holds the middle `level` of
    the statistic's values. With groups whole groups are drawn, as many as there are, with all their rows: the rows of
    one user are not independent. For a metric, resample what it is computed from:
    `bootstrap_interval(ranks, lambda r: ndcg_at_k(r, 10))`, or
    `bootstrap_interval(np.column_stack([scores, labels]), lambda rows: auc(*rows.T), groups=users)`. To compare two
    models on the same examples, give the differences of their values.

    Args:
        values: N numbers, or N rows of them.
        statistic: Maps resampled rows to a number.
        groups: The group of each row, usually its user.
        samples: Number of resamples.
        level: The share of the statistic's values inside the interval.
        seed: The same seed gives the same interval.

    Returns:
        The lower and the upper bound.

    Raises:
        ValueError: There are no values, one is NaN, the level is not between 0 and 1, or the statistic is undefined on
            a resample (an AUC with a rare class).

    >>> bootstrap_interval([2.0, 2.0, 2.0])
    (2.0, 2.0)
    >>> low, high = bootstrap_interval([0, 1] * 50)     # mean 1/2, standard error sqrt(1/4 / 100) = 0.05
    >>> abs(low - (0.5 - 1.96 * 0.05)) < 0.02 and abs(high - (0.5 + 1.96 * 0.05)) < 0.02
    True
    """
    rows = np.asarray(values, dtype=np.float64)
    if rows.ndim == 0 or not len(rows):
        raise ValueError(f"values has the shape {rows.shape}; expected at least one row to resample")
    refuse("values", rows, np.isnan(rows), "a number; drop or repair these rows")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; expected a share between 0 and 1, such as 0.95")
    samples = positive("samples", samples)
    numbers = np.arange(len(rows)) if groups is None else group_numbers(groups, len(rows))
    members = np.argsort(numbers, kind="stable")
    sizes = np.bincount(numbers)
    starts = np.cumsum(sizes) - sizes
    generator = np.random.default_rng(seed)
    found = np.empty(samples)
    for i in range(samples):
        drawn = generator.integers(len(sizes), size=len(sizes))
        found[i] = statistic(rows[members[_ranges(starts[drawn], sizes[drawn])]])
    wrong = ~np.isfinite(found)
    refuse(
        "the statistic", found, wrong, "a finite number on every resample; choose one that is defined on all of them"
    )
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def resampled_means(
    values: ArrayLike, groups: ArrayLike | None = None, samples: int = 10_000, seed: int = 0
) -> NDArray[np.float64]:
    """Return the means of columns of numbers on bootstrap resamples of their rows.

    All columns have the same resamples, so differences of their means are paired. It is many times faster than
    `bootstrap_interval`, which calls a statistic on each resample.

    Args:
        values: N rows of C numbers.
        groups: The group of each row, usually its user; whole groups are drawn. None: each row is a group.
        samples: Number of resamples.
        seed: The same seed gives the same resamples.

    Returns:
        samples x C means.

    Raises:
        ValueError: There are no values, or one is NaN.

    >>> own, other = np.arange(100.0), np.arange(100.0) + 1
    >>> means = resampled_means(np.column_stack([own, other]), samples=50)
    >>> means.shape, bool(np.ptp(means[:, 1] - means[:, 0]) < 1e-9)     # each resample has the same rows of both
    ((50, 2), True)
    """
    rows = np.asarray(values, dtype=np.float64)
    if rows.ndim != 2 or not len(rows):
        raise ValueError(f"values has the shape {rows.shape}; expected at least one row of numbers to resample")
    refuse("values", rows, np.isnan(rows), "a number; drop or repair these rows")
    samples = positive("samples", samples)
    if groups is not None:
        numbers = group_numbers(groups, len(rows))
        sums = np.zeros((numbers.max() + 1, rows.shape[1] + 1))
        np.add.at(sums, numbers, np.column_stack([rows, np.ones(len(rows))]))
    else:
        sums = np.column_stack([rows, np.ones(len(rows))])
    generator, size = np.random.default_rng(seed), len(sums)
    found = np.empty((samples, sums.shape[1]))
    at_once = max(DRAWN_AT_ONCE // size, 1)
    for start in range(0, samples, at_once):
        count = min(at_once, samples - start)
        drawn = generator.integers(size, size=(count, size)) + np.arange(count)[:, None] * size
        times = np.bincount(drawn.ravel(), minlength=count * size).reshape(count, size)
        found[start : start + count] = times.astype(np.float64) @ sums
    return found[:, :-1] / found[:, -1:]


def interval_of(means: NDArray[np.float64], level: float = 0.95) -> list[float]:
    """Return the bounds of the middle `level` of resampled values.

    >>> [round(end, 6) for end in interval_of(np.arange(101.0), level=0.9)]
    [5.0, 95.0]
    """
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return [float(low), float(high)]


def _ranges(starts: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """start, start + 1, ... (size of them) for each pair, one after the other."""
    ends = np.cumsum(sizes)
    return np.arange(ends[-1]) + np.repeat(starts - (ends - sizes), sizes)


__all__ = ["bootstrap_interval", "interval_of", "resampled_means"]
