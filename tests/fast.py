"""What `make test` runs of a family of cases: some values of a parameter, and fewer drawn examples.

The other values are marked slow: `make test-all` runs them, and draws all examples.
"""

import itertools
from collections.abc import Iterable
from typing import Any

import pytest

ONLY = False
"""Whether slow tests are deselected. `tests/conftest.py` sets it before test files are imported."""


def some(values: Iterable[Any], fast: Iterable[Any]) -> list[Any]:
    """List the values of a parameter for `parametrize`; those that are not among `fast` are marked slow.

    A tuple is a value for several parameters.

    Raises:
        ValueError: `fast` names a value that is not there.
    """
    values, fast = list(values), list(fast)
    if unknown := [value for value in fast if value not in values]:
        raise ValueError(f"no such values: {unknown}; there are {values}")
    found = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*each, marks=() if value in fast else pytest.mark.slow) for each, value in zip(found, values)]


def meet(*parameters: Iterable[Any]) -> list[Any]:
    """List all combinations of the values of several parameters; those are slow without which each value is there."""
    values = [list(each) for each in parameters]
    longest = max(map(len, values))
    return some(itertools.product(*values), [tuple(own[n % len(own)] for own in values) for n in range(longest)])


def examples(count: int) -> int:
    """Return how many examples a property test draws: all of them, or a tenth of them and at least five."""
    return max(count // 10, min(count, 5)) if ONLY else count
