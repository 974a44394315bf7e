"""Weights of evidence for a log that is too small to choose its own: learnt over several other logs.

How much words, transitions and popularity count depends on four facts of a log, which a hundred events show well
enough: the number of events, the events per item, how much more alike the words of consecutive items are than those of
any two items, and how much events concentrate on the same items. `benchmarks/open_domain.py` learns the weights of
this form and tests them on a log that was left out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ...item_features_m6rec import Sparse, Words
from .tuning import falling

MOST_PAIRS = 2000
"""Number of pairs of consecutive items whose words are compared, at most."""
USUAL_LIKENESS, LIKENESS_PAIRS = 0.03, 20
"""Likeness of a log without events, and the number of pairs that it counts for."""
USUAL_CONCENTRATION, CONCENTRATION_PAIRS = 4.0, 3000
"""Concentration, times the number of items, of a log without events, and the number of pairs that it counts for."""
LEAST_LIKENESS = 1e-4


class LogFacts(NamedTuple):
    """Facts of a log that decide how much each kind of evidence counts."""

    events: int
    """Number of events."""
    density: float
    """Events per item of the catalogue."""
    likeness: float
    """Mean cosine of the TF-IDF vectors of consecutive items, minus that of any two items; smoothed, above 0."""
    concentration: float
    """Probability that two events are of the same item; smoothed."""

    @classmethod
    def of(cls, words: Words, sequences: Sequence[np.ndarray]) -> "LogFacts":
        """Measure a log.

        Args:
            words: Words of the M items.
            sequences: Items of each user's events, in order, as rows of the catalogue.

        >>> words = Words.of(["red shoes", "blue shoes", "green tea", "black tea"])
        >>> facts = LogFacts.of(words, [np.array([0, 1, 0, 1] * 10), np.array([2, 3] * 20)])
        >>> facts.events, facts.density, round(facts.likeness, 2), round(facts.concentration, 2)
        (80, 20.0, 0.21, 0.48)
        """
        size, items = len(words.live), np.concatenate([np.empty(0, int), *sequences])
        counts = np.bincount(items, minlength=size)
        pairs = len(items) * (len(items) - 1.0)
        same = float((counts * (counts - 1.0)).sum())
        concentration = (same + CONCENTRATION_PAIRS * USUAL_CONCENTRATION / size) / (pairs + CONCENTRATION_PAIRS)
        first, second = (
            np.concatenate([np.empty(0, int), *(own[part] for own in sequences)])
            for part in (slice(-1), slice(1, None))
        )
        kept = np.unique(np.linspace(0, len(first) - 1, min(len(first), MOST_PAIRS)).astype(int))
        more = _cosines(words, first[kept], second[kept]).sum() - len(kept) * _mean_cosine(words)
        likeness = (more + LIKENESS_PAIRS * USUAL_LIKENESS) / (len(kept) + LIKENESS_PAIRS)
        return cls(len(items), len(items) / size, max(float(likeness), LEAST_LIKENESS), concentration)


def _cosines(words: Words, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the cosine of each pair of rows: P."""
    places, width = np.arange(len(first)), len(words.rarity)
    vectors = [words.vectors(Sparse(places, rows, np.ones(len(rows)))) for rows in (first, second)]
    keys, others = (own.users * width + own.items for own in vectors)
    common, one, other = np.intersect1d(keys, others, assume_unique=True, return_indices=True)
    return np.bincount(common // width, vectors[0].values[one] * vectors[1].values[other], len(first))


def _mean_cosine(words: Words) -> float:
    """Return the mean cosine of two different rows."""
    size = len(words.live)
    if size < 2:
        return 0.0
    every = words.vectors(Sparse(np.zeros(size, int), np.arange(size), np.ones(size)))
    own = np.count_nonzero(np.diff(words.starts))  # each row with words has the cosine 1 with itself
    return float((every.values**2).sum() - own) / (size * (size - 1.0))


SECOND_BELOW = 20_000
"""Number of events below which second-order transitions count: with more they cost time, and gain nothing."""
WIDE: dict[str, Any] = {"steps": falling(20, 0.95), "backwards": 1.0}
"""Pairs of items within 20 steps, in any order."""
NEAR: dict[str, Any] = {"steps": falling(5, 0.9)}
"""Pairs of items within five steps."""


WORDS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
"""Weights of words that are compared."""
POPULARITY = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Weights of popularity that are compared."""


def nearest(options: Sequence[float], value: float) -> float:
    """Return the option with the nearest ratio to a value; 0 counts as 0.001.

    >>> nearest((0.0, 0.01, 0.1), 0.002), nearest((0.0, 0.01, 0.1), 0.05)
    (0.0, 0.1)
    """
    return min(options, key=lambda own: abs(math.log(max(own, 0.001) / max(value, 0.001))))


@dataclass(frozen=True)
class LogWeights:
    """Weights as a function of the facts of a log.

    words = `words` * (likeness / 0.05) ** `likeness` * (1 + density) ** -`words_falling`, and
    popularity = `popularity` * words * (concentration / likeness) ** `ratio` * (1 + density) ** -`popularity_falling`,
    both relative to transitions, and both as the nearest of `WORDS` and `POPULARITY`, which were compared.
    """

    words: float
    likeness: float
    words_falling: float
    popularity: float
    ratio: float
    popularity_falling: float
    recency: tuple[float, ...]
    """Weights of a history's last items."""
    near_from: float
    """Events per item from which pairs are counted within five steps in place of 20."""

    def of(self, facts: LogFacts) -> tuple[float, float]:
        """Return the weights of words and of popularity."""
        words = self.words * (facts.likeness / 0.05) ** self.likeness * (1 + facts.density) ** -self.words_falling
        popular = self.popularity * words * (facts.concentration / facts.likeness) ** self.ratio
        popular *= (1 + facts.density) ** -self.popularity_falling
        return nearest(WORDS, words), nearest(POPULARITY, popular)

    def structure(self, facts: LogFacts) -> dict[str, Any]:
        """Return how pairs are counted, and how much second-order transitions count."""
        second = 0.4 if facts.events < SECOND_BELOW else 0.0
        return {**(WIDE if facts.density < self.near_from else NEAR), "second": second}


LEARNT = LogWeights(
    words=0.7,
    likeness=0.75,
    words_falling=0.3,
    popularity=2.0,
    ratio=0.5,
    popularity_falling=1.5,
    recency=falling(12, 0.8),
    near_from=8.0,
)
"""Learnt on validation events of MovieLens-100K, Amazon Beauty, Last.fm and gift cards (docs/experiments.md)."""


__all__ = ["LEARNT", "NEAR", "POPULARITY", "SECOND_BELOW", "WIDE", "WORDS", "LogFacts", "LogWeights"]
