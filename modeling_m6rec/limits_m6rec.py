"""How large a request may be: limits that are checked before any work."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from .values_m6rec import short

MAX_CHARACTERS = 100_000
"""Of a text."""
MAX_EVENTS = 100_000
"""Of a history."""
MAX_CANDIDATES = 100_000
MAX_FACTS = 10_000
MAX_VALUES = 10_000
"""Of a user, a moment, an event, a candidate or any other list, at all depths together."""
MAX_REQUEST_VALUES = 2_000_000
"""Of a whole request, at all depths together."""
MAX_DEPTH = 12
"""Lists and mappings within each other."""

SIMPLE = frozenset({str, int, float, bool, type(None)})
"""Types of values that hold no others."""


def check_size(value: Any, place: str, most: int = MAX_VALUES, depth: int = MAX_DEPTH) -> None:
    """Refuse a value that holds too many others, or holds them too deep; it may hold itself.

    Args:
        value: Any value.
        place: Where it stands, for the error.
        most: How many values it may hold, at all depths together.
        depth: How many lists and mappings may stand within each other.

    Raises:
        ValueError: It is too large.
    """
    level, count = [value], 0
    for _ in range(depth + 1):
        below: list[Any] = []
        for each in level:
            inner = _inner(each)
            count += len(inner)
            if count > most:
                raise ValueError(f"{place}: more than {most:,} values, which is the limit: give fewer")
            below += [own for own in inner if type(own) not in SIMPLE]
        if not below:
            return
        level = below
    raise ValueError(
        f"{place}: lists and mappings stand within each other more than {depth} deep, which is the limit "
        f"(got {short(value)})"
    )


def check_characters(text: str, place: str, most: int = MAX_CHARACTERS) -> None:
    """Refuse a text that is too long."""
    if len(text) > most:
        raise ValueError(f"{place}: a text of {len(text):,} characters; the limit is {most:,}: shorten it")


def check_count(count: int, place: str, most: int) -> None:
    """Refuse too many entries of a list."""
    if count > most:
        raise ValueError(f"{place}: {count:,} entries; the limit is {most:,}: give fewer")


def _inner(value: Any) -> Any:
    """Return the values that a value holds."""
    if isinstance(value, list | tuple):
        return value
    if isinstance(value, Mapping):
        return value.values()
    return value.ravel().tolist() if isinstance(value, np.ndarray) and value.dtype == object else ()


__all__ = [
    "MAX_CANDIDATES",
    "MAX_CHARACTERS",
    "MAX_DEPTH",
    "MAX_EVENTS",
    "MAX_FACTS",
    "MAX_REQUEST_VALUES",
    "MAX_VALUES",
    "SIMPLE",
    "check_characters",
    "check_count",
    "check_size",
]
