"""Values that every part of m6rec reads by one rule: ids."""

import math
from numbers import Integral, Real
from typing import Any


def normalize_id(value: Any, place: str) -> str:
    """Return an id as text: white space around it is removed, and 7, 7.0 and "7" are one id.

    >>> normalize_id(7.0, "item_id"), normalize_id(" A ", "item_id")
    ('7', 'A')

    Args:
        value: A text that is not empty, or a finite number.
        place: Where the value stands, for the error.

    Raises:
        ValueError: It is neither.
    """
    if isinstance(value, str) and value.strip():
        return value.strip()
    if isinstance(value, Integral) and not isinstance(value, bool):
        return str(int(value))
    if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value):
        number = float(value)
        return str(int(number)) if number.is_integer() and abs(number) < 2**53 else repr(number)
    raise ValueError(
        f"{place}: {value!r} ({type(value).__name__}) is no id: give a text that is not empty, or a finite number"
    )


__all__ = ["normalize_id"]
