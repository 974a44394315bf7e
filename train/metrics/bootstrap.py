"""How sure a figure is: bootstrap intervals over examples or over whole users."""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .checks import group_numbers, positive, refuse


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
    one user are no independent evidence. For a metric, resample what it is computed from:
    `bootstrap_interval(ranks, lambda r: ndcg_at_k(r, 10))`, or
    `bootstrap_interval(np.column_stack([scores, labels]), lambda rows: auc(*rows.T), groups=users)`. To compare two
    models on the same examples, give the differences of their values.

    Args:
        values: N numbers, or N rows of them.
        statistic: From resampled rows to a number.
        groups: The group of each row, usually its user.
        samples: How often to resample.
        level: The share of the statistic's values inside the interval.
        seed: The same seed gives the same interval.

    Returns:
        The lower and the upper end.

    Raises:
        ValueError: There are no values, one is NaN, the level is not between 0 and 1, or the statistic is undefined on
            a resample (an AUC, where one class is rare).

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


def _ranges(starts: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """start, start + 1, ... (size of them) for each pair, one after the other."""
    ends = np.cumsum(sizes)
    return np.arange(ends[-1]) + np.repeat(starts - (ends - sizes), sizes)


__all__ = ["bootstrap_interval"]
