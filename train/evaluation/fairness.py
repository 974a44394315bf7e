"""Exposure of items, and accuracy for groups of users.

`evaluation.fairness` names fields of users, whose groups are compared, and fields of items, whose values share the
exposure of the lists; the exposure of popularity fifths is always reported.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..metrics import coverage, gini, interval_of, list_exposure, resampled_means
from ..rows.examples import RequestWriter

LEAST_USERS = 30
"""Groups with fewer users are not shown: their figures are noise, and may reveal a person."""
BANDS = 4
"""Number of groups of a field of many numbers, such as an age; they have about equally many users."""
MOST_NUMBERS = 8
"""A field with more different numbers is divided into bands."""
MOST_VALUES = 20
"""Number of values of an item's field whose exposure is reported; the others are added up."""
FIFTHS = 5
UNKNOWN, OTHERS = "unknown", "others"
LISTED = re.compile(r"\s*[,;|]\s*")


@dataclass(frozen=True)
class Fields:
    """The fields that `evaluation.fairness` names.

    Attributes:
        users: Field -> group of each of the U users.
        items: Field -> values of each of the M items; an item may have several, or none.
    """

    users: dict[str, np.ndarray]
    items: dict[str, list[list[str]]]


def fields_of(names: Sequence[str], writer: RequestWriter, users: Sequence[str]) -> Fields:
    """Read fields of users and items.

    Args:
        names: Fields; one that both have is that of the users.
        writer: Has the fields.
        users: Ids of the U users.

    Raises:
        ValueError: Neither users nor items have a field.
    """
    known = [] if writer.log.users is None else list(writer.log.users.columns)
    found, items = {}, {}
    for name in names:
        if name in known:
            values = {user: writer.user(user).get(name, UNKNOWN) for user in dict.fromkeys(users)}
            found[name] = _banded([values[user] for user in users], list(values.values()))
        elif name in writer.log.items.columns:
            own = [item.get(name) for item in writer.items]
            items[name] = [LISTED.split(value) if value else [UNKNOWN] for value in own]
        else:
            raise ValueError(
                f"evaluation.fairness: neither users nor items have a field {name!r}; users have "
                f"{', '.join(known) or 'none'}, items {', '.join(writer.log.items.columns)}"
            )
    return Fields(found, items)


def _banded(values: Sequence[str], once: Sequence[str]) -> np.ndarray:
    """Name the group of each value: itself, or the band of a number if there are many; bands by each user once."""
    known = sorted({float(value) for value in once if value != UNKNOWN}) if all(map(_number, once)) else []
    if len(known) <= MOST_NUMBERS:
        return np.array(values, dtype=object)
    numbers = np.array([float(value) for value in once if value != UNKNOWN])
    cuts = np.unique(np.quantile(numbers, np.arange(1, BANDS) / BANDS, method="inverted_cdf"))
    bands = np.searchsorted(cuts, known)  # a cut belongs to the band below it
    names = {}
    for value, band in zip(known, bands):
        own = np.array(known)[bands == band]
        names[value] = f"{own[0]:g} to {own[-1]:g}"
    return np.array([value if value == UNKNOWN else names[float(value)] for value in values], dtype=object)


def _order(group: str) -> tuple[float, str]:
    """Sort bands and numbers by their size, other groups by name."""
    first = group.split(" to ")[0]
    return (float(first), "") if group != UNKNOWN and _number(first) else (float("inf"), group)


def _number(value: str) -> bool:
    return value == UNKNOWN or re.fullmatch(r"-?\d+(\.\d+)?", value) is not None


def fairness_report(
    top: Sequence[np.ndarray],
    gains: Mapping[str, np.ndarray],
    users: Sequence[str],
    fields: Fields,
    counts: np.ndarray,
    seed: int,
) -> dict[str, Any]:
    """Report exposure and groups of one row of a table.

    Args:
        top: U lists of the first k items.
        gains: Metric -> value for each of the U users.
        users: Their ids; the bootstrap draws all events of a user together.
        fields: The fields to report.
        counts: Training events of each of the M items.
        seed: Seed of the bootstrap.

    Returns:
        `gini` of the exposure (items that are never recommended count with 0), `coverage` (share of the catalogue in
        anyone's list), `exposure` (field -> value -> `share` of the exposure, `events` and `items`: its share of the
        training events and of the catalogue), `groups` (field -> group -> `users` and metrics with `intervals`), and
        `not_shown` (field -> number of users in groups of fewer than LEAST_USERS).
    """
    shown = list_exposure(top, len(counts))
    values = {"popularity": [[name] for name in _fifths(counts)], **fields.items}
    report: dict[str, Any] = {
        "gini": gini(shown),
        "coverage": coverage(top, len(counts)),
        "exposure": {name: _shares(own, shown, counts) for name, own in values.items()},
        "groups": {},
        "not_shown": {},
    }
    for name, groups in fields.users.items():
        found, hidden = _groups(groups, gains, users, seed)
        report["groups"][name] = found
        if hidden:
            report["not_shown"][name] = hidden
    return report


def _fifths(counts: np.ndarray) -> list[str]:
    """Name each item's fifth by training events: 1 is the most popular; ties in the order of the catalogue."""
    order = np.argsort(-counts, kind="stable")
    ranks = np.empty(len(counts), dtype=int)
    ranks[order] = np.arange(len(counts))
    return [f"fifth {rank * FIFTHS // len(counts) + 1}" for rank in ranks]


def _shares(values: Sequence[Sequence[str]], shown: np.ndarray, counts: np.ndarray) -> dict[str, dict[str, float]]:
    """Return value -> shares of exposure, events and items; an item with several values is divided equally."""
    sums: dict[str, np.ndarray] = {}
    total = np.array([max(shown.sum(), 1e-12), max(counts.sum(), 1e-12), len(counts)])
    for row, own in enumerate(values):
        part = np.array([shown[row], counts[row], 1.0]) / total / len(own)
        for value in own:
            sums[value] = sums.get(value, np.zeros(3)) + part
    frequent = {value for value, _ in Counter({value: own[2] for value, own in sums.items()}).most_common(MOST_VALUES)}
    rest = [own for value, own in sums.items() if value not in frequent]
    kept = {value: own for value, own in sorted(sums.items()) if value in frequent}
    kept |= {OTHERS: np.sum(rest, axis=0)} if rest else {}
    return {value: dict(zip(("share", "events", "items"), own.tolist())) for value, own in kept.items()}


def _groups(
    groups: np.ndarray, gains: Mapping[str, np.ndarray], users: Sequence[str], seed: int
) -> tuple[dict[str, Any], int]:
    """Return group -> figures of the groups with enough users, and the number of users of the others."""
    found, hidden, everyone = {}, 0, np.array(users, dtype=object)
    for group in sorted(set(groups.tolist()), key=_order):
        places = np.flatnonzero(groups == group)
        own = everyone[places].tolist()
        size = len(set(own))
        if size < LEAST_USERS:
            hidden += size
            continue
        table = np.column_stack([values[places] for values in gains.values()])
        means = resampled_means(table, own if size < len(own) else None, samples=2000, seed=seed)
        figures = dict(zip(gains, table.mean(0).tolist()))
        intervals = {name: interval_of(column) for name, column in zip(gains, means.T)}
        found[group] = {"users": size, **figures, "intervals": intervals}
    return found, hidden


__all__ = ["LEAST_USERS", "Fields", "fairness_report", "fields_of"]
