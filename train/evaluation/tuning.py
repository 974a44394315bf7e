"""Settings of the untrained rules, chosen by NDCG on validation events."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

from ...item_features_m6rec import Evidence, Transitions
from ..metrics import ndcg_gains, target_ranks
from .baselines import TABLED, LastItems, second_work

CUT_OFF = 10
"""Cut-off of the NDCG by which settings are chosen."""
USERS_AT_ONCE = 256
MOST_PAIRS = 20_000_000
"""Maximum number of pairs of events for which a window of steps is tried."""
MOST_WORK = 300_000_000
"""Maximum number of additions for second-order transitions, for catalogues too large for tables."""


def falling(length: int, share: float) -> tuple[float, ...]:
    """Return weights with a constant ratio `share` of consecutive weights.

    >>> falling(3, 0.5)
    (1.0, 0.5, 0.25)
    """
    return tuple(round(share**age, 4) for age in range(length))


DEFAULT = Evidence()
WINDOWS = ((1.0,), falling(5, 0.9), falling(20, 0.95), falling(60, 0.98))
"""Windows tried in addition to the default."""
WIDE_RECENCY = falling(30, 0.9)
RECENCIES = (DEFAULT.recency, (1.0,), (1.0,) * 5, falling(10, 0.8), WIDE_RECENCY, falling(50, 0.95))
POWERS = ((0.7, 0.3), (0.5, 0.5), (0.7, 0.6), (1.0, 0.0))
WORD_WEIGHTS = tuple(DEFAULT.words * 2.0**power for power in range(-5, 6))
UNSEEN = (0.0, 0.1, 0.25, 0.5, 1.0)
Setting = TypeVar("Setting")


def counted(
    rule: Evidence, sequences: Sequence[np.ndarray], num_items: int, times: Sequence[np.ndarray] | None = None
) -> LastItems:
    """Count the transitions of histories by a rule; it reads their times if it shares ties."""
    return LastItems(Transitions.fit(sequences, num_items, rule, times), rule)


def has_ties(times: Iterable[np.ndarray]) -> bool:
    """Return whether consecutive events of a user have equal times.

    >>> has_ties([np.array([1.0, 2.0]), np.array([np.nan, np.nan])]), has_ties([np.array([1.0, 1.0])])
    (False, True)
    """
    return any(bool((own[1:] == own[:-1]).any()) for own in times)


class Trial:
    """Held-out events on which settings are compared.

    Args:
        histories: Catalogue rows that each of U users has met, in order.
        targets: Catalogue rows of the held-out events.
        exclude_seen: Leave out items that a user has met before.
        times: Times of the events of each history, if ties are shared; None = the order of equal times has a meaning.
    """

    def __init__(
        self,
        histories: Sequence[np.ndarray],
        targets: np.ndarray,
        exclude_seen: bool,
        times: Sequence[np.ndarray] | None = None,
    ) -> None:
        self.histories, self.targets, self.exclude_seen, self.times = histories, targets, exclude_seen, times

    def __len__(self) -> int:
        return len(self.histories)

    def value(self, score: Callable[[slice], np.ndarray]) -> float:
        """Return the mean NDCG of scores; `score` returns those of a slice of the users."""
        total = 0.0
        for start in range(0, len(self), USERS_AT_ONCE):
            part = slice(start, start + USERS_AT_ONCE)
            seen = self.histories[part] if self.exclude_seen else None
            total += ndcg_gains(target_ranks(score(part), self.targets[part], seen), CUT_OFF).sum()
        return float(total / len(self))

    def of(self, rule: LastItems) -> float:
        """Return the mean NDCG of a rule of the last items."""
        return self.value(lambda part: self.scores(rule, part))

    def scores(self, rule: LastItems, part: slice) -> np.ndarray:
        """Score all items for a slice of the users by a rule of the last items."""
        return rule.scores(self.histories[part], None if self.times is None else self.times[part])


def best(settings: Iterable[Setting], value: Callable[[Setting], float]) -> Setting:
    """Return the setting with the highest value; of ties the first.

    >>> best([1, -3, 3], abs)
    -3
    """
    return max(settings, key=value)


def choose_counting(
    sequences: Sequence[np.ndarray], num_items: int, trial: Trial, times: Sequence[np.ndarray] | None = None
) -> Evidence:
    """Choose how transitions are counted, one setting at a time; windows are also tried with the recency of wide ones.

    Args:
        sequences: Items of each counted history, in order.
        num_items: M.
        trial: The comparison of settings.
        times: Times of the items of each counted history, if ties are shared; None = they are not.
    """
    values: dict[Evidence, float] = {}
    first = dataclasses.replace(DEFAULT, share_ties=times is not None)

    def measure(rule: Evidence, recencies: Sequence[tuple[float, ...]]) -> None:
        made = counted(rule, sequences, num_items, times)
        assert isinstance(made.evidence, Transitions)
        if rule.second and num_items > TABLED and second_work(made.evidence) > MOST_WORK:
            return
        for recency in recencies:
            values[dataclasses.replace(rule, recency=recency)] = trial.of(made.aged(recency))

    measure(first, RECENCIES)
    ages = max(values, key=values.__getitem__, default=first).recency
    for steps in _windows(sequences, num_items):
        measure(dataclasses.replace(first, steps=steps), [ages, WIDE_RECENCY])
    others: tuple[tuple[dict[str, Any], ...], ...] = (
        tuple({"out_power": out, "in_power": into} for out, into in POWERS),
        ({"backwards": 0.0}, {"backwards": 1.0}),
        ({"second": 0.0},),
    )
    for changes in others:
        chosen = max(values, key=values.__getitem__, default=first)
        for change in changes:
            measure(dataclasses.replace(chosen, **change), [chosen.recency])
    return max(values, key=values.__getitem__, default=first)


def _windows(sequences: Sequence[np.ndarray], num_items: int) -> list[tuple[float, ...]]:
    """Return the windows with few enough pairs."""
    lengths = np.array([len(sequence) for sequence in sequences])
    found = []
    for steps in WINDOWS:
        pairs = 2 * int(np.minimum(lengths, len(steps)) @ lengths)
        if pairs <= MOST_PAIRS and (num_items <= TABLED or len(steps) <= 5):
            found.append(steps)
    return found


def choose_words(words: LastItems, trial: Trial) -> LastItems:
    """Choose the recency weights of words."""
    return words.aged(best(RECENCIES, lambda recency: trial.of(words.aged(recency))))


def choose_weights(transitions: LastItems, words: LastItems, unseen: np.ndarray, trial: Trial) -> tuple[float, float]:
    """Choose the weight of words relative to transitions, then its increase for items without events.

    Args:
        transitions: Scores by transitions.
        words: Scores by words.
        unseen: M, True for items without events.
        trial: The comparison of settings.
    """
    parts = []
    for start in range(0, len(trial), USERS_AT_ONCE):
        own = slice(start, start + USERS_AT_ONCE)
        parts.append((trial.scores(transitions, own), trial.scores(words, own)))

    def value(weight: float, more: float = 0.0) -> float:
        def scores(part: slice) -> np.ndarray:
            after, alike = parts[part.start // USERS_AT_ONCE]
            return after + weight * (1 + more * unseen).astype(alike.dtype) * alike

        return trial.value(scores)

    weight = best(WORD_WEIGHTS, value)
    return weight, best(UNSEEN if unseen.any() else UNSEEN[:1], lambda more: value(weight, more))


__all__ = ["Trial", "best", "choose_counting", "choose_weights", "choose_words", "counted", "falling", "has_ties"]
