"""What a request may hold: the checks every part of it passes, with errors that name the place."""

import math
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from datetime import date
from numbers import Integral, Real
from typing import Any

import numpy as np

from .values_m6rec import time_seconds, time_text

SCORING_TASKS = ("click", "rating", "interaction")
WRITING_TASKS = ("explanation", "query", "conversation", "item_text")
TASKS = (*SCORING_TASKS, "retrieval", "plausibility", *WRITING_TASKS)

REQUEST_KEYS = frozenset({"user", "history", "now", "facts", "candidates", "text"})
EVENT_KEYS = frozenset({"event", "item", "timestamp", "rating", "query", "text"})
TURN_KEYS = frozenset({"role", "content"})


class Kept(OrderedDict):
    """A bounded memory that forgets what was used least recently. It is copied and pickled empty."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity

    def find(self, key: Hashable) -> Any:
        """Return what is kept under `key`, or None."""
        value = self.get(key)
        if value is not None:
            self.move_to_end(key)
        return value

    def keep(self, key: Hashable, value: Any) -> None:
        """Keep `value`, and forget the oldest if there are too many."""
        self[key] = value
        if len(self) > self.capacity:
            self.popitem(last=False)

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return type(self), (self.capacity,)


def wrong_type(value: Any, place: str, expected: str) -> TypeError:
    """Make the error for a value of the wrong type."""
    return TypeError(f"{place}: expected {expected}, got {type(value).__name__} ({_short(value)})")


def check_text(value: Any, place: str) -> str:
    """Return a text without the white space around it; it must hold something, and be valid Unicode."""
    if not isinstance(value, str):
        raise wrong_type(value, place, "a text")
    text = value.strip()
    if not text:
        raise ValueError(f"{place}: the text is empty; leave the key out, or give a text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: {_short(value)} is not valid Unicode ({error.reason})") from error
    return text


def check_mapping(value: Any, place: str, known: frozenset[str] | None = None) -> Mapping[str, Any]:
    """Return a mapping whose keys are texts, and among `known` if that is given."""
    if not isinstance(value, Mapping):
        raise wrong_type(value, place, "a mapping")
    if known is not None and value.keys() <= known:
        return value
    for key in value:
        if not isinstance(key, str):
            raise wrong_type(key, f"{place}: a key", "a text")
        if known is not None and key not in known:
            raise ValueError(f"{place}: unknown key {_short(key)}; known keys: {', '.join(sorted(known))}")
    return value


def check_list(value: Any, place: str) -> list[Any]:
    """Return a list; tuples and one-dimensional arrays pass, None is an empty list."""
    if value is None:
        return []
    if isinstance(value, np.ndarray) and value.ndim == 1:
        return value.tolist()
    if not isinstance(value, list | tuple):
        raise wrong_type(value, place, "a list")
    return list(value)


def check_number(value: Any, place: str) -> float:
    """Return a finite number; booleans are none."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, Real):
        raise wrong_type(value, place, "a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{place}: expected a finite number, got {_short(value)}")
    return number


def check_moment(value: Any, place: str) -> float:
    """Return a moment in seconds, read by the rule for times; small numbers count from a beginning of their own."""
    return time_seconds(value, place, relative=True)


def number_text(value: float) -> str:
    """Write a number as people do: 1995, 4.5, and 4 for 4.0.

    >>> number_text(4.0), number_text(4.5), number_text(1995)
    ('4', '4.5', '1995')
    """
    number = float(value)
    exact = isinstance(value, Integral) or (number.is_integer() and abs(number) < 1e15)
    return str(int(value)) if exact else repr(number)


def value_text(value: Any, place: str, words: Mapping[str, str]) -> str:
    """Word the value of a field: a text, a number, a truth value, or a list of these.

    Args:
        value: The value.
        place: Where it stands, for the error.
        words: The template's `words`: what truth values are called, and what stands between a list's values.
    """
    if isinstance(value, str):
        return check_text(value, place)
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, bool):
        return words["true" if value else "false"]
    if isinstance(value, list | tuple) and value:
        return words["list"].join(value_text(each, f"{place}[{index}]", words) for index, each in enumerate(value))
    if isinstance(value, date):
        return time_text(value, place)
    if isinstance(value, Real):
        check_number(value, place)
        return number_text(value)  # type: ignore[arg-type]  # numbers.Real is no type to mypy
    raise wrong_type(value, place, "a text, a number, a truth value or a list of these")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


__all__ = [
    "EVENT_KEYS",
    "REQUEST_KEYS",
    "SCORING_TASKS",
    "TASKS",
    "TURN_KEYS",
    "WRITING_TASKS",
    "Kept",
    "check_list",
    "check_mapping",
    "check_moment",
    "check_number",
    "check_text",
    "number_text",
    "value_text",
    "wrong_type",
]
