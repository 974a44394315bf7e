"""What a request may hold: the checks every part of it passes, with errors that name the place."""

import math
import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from datetime import date
from numbers import Integral, Real
from typing import Any

import numpy as np

from .limits_m6rec import MAX_VALUES, check_characters, check_count
from .values_m6rec import short, time_seconds, time_text

SCORING_TASKS = ("click", "rating", "interaction")
WRITING_TASKS = ("explanation", "query", "conversation", "item_text")
TASKS = (*SCORING_TASKS, "retrieval", "plausibility", *WRITING_TASKS)

REQUEST_KEYS = frozenset({"user", "history", "now", "facts", "candidates", "text"})
EVENT_KEYS = frozenset({"event", "item", "timestamp", "rating", "query", "text"})


class Kept(OrderedDict):
    """A bounded memory that forgets what was used least recently. It is copied and pickled empty.

    Several threads may use one.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self._lock = threading.Lock()

    def find(self, key: Hashable) -> Any:
        """Return what is kept under `key`, or None."""
        with self._lock:
            value = self.get(key)
            if value is not None:
                self.move_to_end(key)
            return value

    def keep(self, key: Hashable, value: Any) -> None:
        """Keep `value`, and forget the oldest if there are too many."""
        with self._lock:
            self[key] = value
            if len(self) > self.capacity:
                self.popitem(last=False)

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return type(self), (self.capacity,)


def wrong_type(value: Any, place: str, expected: str) -> TypeError:
    """Make the error for a value of the wrong type."""
    return TypeError(f"{place}: expected {expected}, got {type(value).__name__} ({short(value)})")


def check_text(value: Any, place: str, limited: bool = True) -> str:
    """Return a text without the white space around it; it must hold something, and be valid Unicode.

    Args:
        value: The text.
        place: Where it stands, for the error.
        limited: Its length is limited, as that of every text of a request.
    """
    if not isinstance(value, str):
        raise wrong_type(value, place, "a text")
    if limited:
        check_characters(value, place)
    text = value.strip()
    if not text:
        raise ValueError(f"{place}: the text is empty; leave the key out, or give a text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: {short(value)} is not valid Unicode ({error.reason})") from error
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
            raise ValueError(f"{place}: unknown key {short(key)}; known keys: {', '.join(sorted(known))}")
    return value


def check_list(value: Any, place: str, most: int = MAX_VALUES) -> list[Any]:
    """Return a list of at most so many entries; tuples and one-dimensional arrays pass, None is an empty list."""
    if value is None:
        return []
    if not isinstance(value, list | tuple) and not (isinstance(value, np.ndarray) and value.ndim == 1):
        raise wrong_type(value, place, "a list")
    check_count(len(value), place, most)
    return value.tolist() if isinstance(value, np.ndarray) else list(value)


def check_read(parts: Mapping[str, Any], task: str) -> None:
    """Refuse a text for a task that reads none."""
    if parts.get("text") is not None and task not in WRITING_TASKS:
        raise ValueError(
            f"text: task {task!r} does not read it, only {', '.join(WRITING_TASKS)} do. Say who the user is in `user`, "
            "and what the user looks for as an event: {'event': 'search', 'query': ...}"
        )


def check_number(value: Any, place: str) -> float:
    """Return a finite number; booleans are none."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, Real):
        raise wrong_type(value, place, "a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{place}: expected a finite number, got {short(value)}")
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


__all__ = [
    "EVENT_KEYS",
    "REQUEST_KEYS",
    "SCORING_TASKS",
    "TASKS",
    "WRITING_TASKS",
    "Kept",
    "check_list",
    "check_mapping",
    "check_moment",
    "check_number",
    "check_read",
    "check_text",
    "number_text",
    "value_text",
    "wrong_type",
]
