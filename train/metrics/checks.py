"""Input checks of the metrics; each error names the invalid value and its position."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray


def vector(name: str, values: ArrayLike, *, finite: bool = False) -> NDArray[np.float64]:
    """Return the values as a non-empty vector of float64 without NaN.

    Args:
        name: Name of the values in errors.
        values: Numbers of shape (N,).
        finite: Whether infinities are refused too.

    Raises:
        ValueError: The values have another shape, are empty, or hold NaN (or, if refused, an infinity).
    """
    row = np.asarray(values, dtype=np.float64)
    if row.ndim != 1:
        raise ValueError(f"{name} has the shape {row.shape}; expected one number an example: give a flat list")
    if not len(row):
        raise ValueError(f"{name} is empty, and no metric is defined on nothing; give at least one example")
    refuse(name, row, np.isnan(row), "a number; drop or repair these examples")
    if finite:
        refuse(name, row, np.isinf(row), "a finite number; drop or repair these examples")
    return row


def pair(
    names: tuple[str, str], first: ArrayLike, second: ArrayLike, *, finite: bool = False
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return two vectors of the same length: a prediction and the truth for every example.

    Args:
        names: Names of the two in errors.
        first: Numbers of shape (N,).
        second: Numbers of shape (N,).
        finite: Whether infinities are refused too.

    Raises:
        ValueError: One of them is not a vector, or their lengths differ.
    """
    one, other = vector(names[0], first, finite=finite), vector(names[1], second, finite=finite)
    same_length(names[1], len(other), names[0], len(one))
    return one, other


def same_length(name: str, length: int, other_name: str, other_length: int) -> None:
    """Raise if two inputs differ in length."""
    if length != other_length:
        raise ValueError(
            f"{name} has {length} entries and {other_name} {other_length}; expected one of each for every example"
        )


def refuse(name: str, values: NDArray, wrong: NDArray[np.bool_], expected: str) -> None:
    """Raise a ValueError that names the first wrong value, its position and the number of wrong values.

    Args:
        name: Name of the values in the error.
        values: The values, of any shape.
        wrong: A mask of the same shape.
        expected: Description of valid values and advice, for the end of the message.
    """
    if not wrong.any():
        return
    place = tuple(int(i) for i in np.argwhere(wrong)[0])
    where = place[0] if len(place) == 1 else place
    raise ValueError(f"{name} holds {values[place]} at {where} ({wrong.sum()} such in all); expected {expected}")


def whole(name: str, values: NDArray[np.float64], below: int) -> NDArray[np.int64]:
    """Return the numbers as columns of a catalogue.

    Args:
        name: Name of the values in errors.
        values: Numbers that must be integers, at least 0 and less than `below`.
        below: Size of the catalogue.

    Raises:
        ValueError: One of them is not a column; a negative one would silently index from the end.
    """
    inside = (values == np.floor(values)) & (values >= 0) & (values < below)
    refuse(name, values, ~inside, f"a column of the catalogue, a whole number from 0 to {below - 1}")
    return values.astype(np.int64)


def flat_rows(
    name: str, rows: Sequence[ArrayLike] | NDArray, below: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return lists of items, which may differ in length, as two flat arrays: list index and item.

    Args:
        name: Name of the lists in errors.
        rows: One list of columns per user.
        below: Size of the catalogue.

    Raises:
        ValueError: An entry is not a column of the catalogue.
    """
    lists = [np.asarray(row, dtype=np.float64) for row in rows]
    for user, row in enumerate(lists):
        if row.ndim != 1:
            raise ValueError(f"{name} holds {rows[user]} for user {user}; expected a list of columns a user")
    users = np.repeat(np.arange(len(lists)), [len(row) for row in lists])
    return users, whole(name, np.concatenate([np.empty(0), *lists]), below)


def group_numbers(groups: ArrayLike, size: int) -> NDArray[np.int64]:
    """Number the groups from 0, in sorted order, and return the number of every example.

    Args:
        groups: Names or numbers of shape (N,), such as user ids.
        size: N.

    Raises:
        ValueError: The number of groups is not N, a group is missing, or groups cannot be ordered.
    """
    labels = np.asarray(groups)
    if labels.ndim != 1:
        raise ValueError(f"groups has the shape {labels.shape}; expected one group an example: give a flat list")
    same_length("groups", len(labels), "the examples", size)
    try:
        missing = np.asarray(labels != labels, dtype=bool)
        refuse("groups", labels, missing, "the group of the example; drop these examples or name a group for them")
        return np.unique(labels, return_inverse=True)[1].astype(np.int64)
    except TypeError as error:
        raise ValueError(
            f"groups cannot be ordered ({error}); expected all text or all numbers and none missing: convert them"
        ) from error


def positive(name: str, value: int) -> int:
    """Return an integer that is at least 1, such as a cut-off or a count."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} is {value!r}; expected a whole number from 1 on")
    return int(value)


__all__ = ["flat_rows", "group_numbers", "pair", "positive", "refuse", "same_length", "vector", "whole"]
