"""How scoring tasks are learnt from a log, and measured: the training half of the table of tasks.

What their answers are is said by SCORING_TASKS, whose names this table has too.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...values_m6rec import IGNORE_INDEX


def numbers(values: np.ndarray, names: Mapping[str, list[str]], drawn: bool) -> np.ndarray:
    """Read N labels off N numbers; NaN is unknown.

    >>> numbers(np.array([4.0, np.nan]), {}, False).tolist()
    [4.0, -100.0]
    """
    values = values.astype(float)
    return np.where(np.isnan(values), IGNORE_INDEX, values)


def verbs(values: np.ndarray, names: Mapping[str, list[str]], drawn: bool) -> np.ndarray:
    """Read N x I labels off N verbs: whether the verb is one of the I-th name's.

    Where negatives are drawn, an event says something of its own names only. An empty verb is unknown.

    >>> verbs(np.array(["like", "skip", ""]), {"likes": ["like"], "skips": ["skip"]}, False).tolist()
    [[1, 0], [0, 1], [-100, -100]]
    """
    labels = np.stack([np.isin(values, own).astype(int) for own in names.values()], 1)
    return np.where(labels == 0 if drawn else (values == "")[:, None], IGNORE_INDEX, labels)


@dataclass(frozen=True)
class ScoredTask:
    """The training half of a row of the table of tasks.

    Attributes:
        column: Column of the log that labels come from. One that no other task reads is a role of `data.columns`, and
            holds numbers.
        measure: How predictions are measured: a name in MEASURES of `train.evaluation.measures`.
        labels: Turns N values of the column into N or N x I labels; it is also given what `names_in` holds, and whether
            negatives are drawn.
        negatives: Whether an item that the user has not met has label 0, beside an event with label 1.
        implied: Whether each event has label 1 where the log lacks the column and negatives are drawn.
        names_in: Key of a recipe's section `task` that names I labels side by side: name -> verbs. The configuration
            has a field of the same name.
    """

    column: str
    measure: str
    labels: Callable[[np.ndarray, Mapping[str, list[str]], bool], np.ndarray] = numbers
    negatives: bool = False
    implied: bool = False
    names_in: str | None = None

    def names(self, section: Any) -> Mapping[str, list[str]]:
        """Return the names of labels side by side, and their verbs, in a recipe's section `task`; else nothing."""
        return getattr(section, self.names_in) if self.names_in else {}


SCORED: dict[str, ScoredTask] = {
    "click": ScoredTask("label", "chances", negatives=True, implied=True),
    "rating": ScoredTask("rating", "numbers"),
    "interaction": ScoredTask("event", "chances", verbs, negatives=True, names_in="interactions"),
}
"""The table, by the names of SCORING_TASKS."""

KNOWN_COLUMNS = ("rating", "event", "label")
"""Columns of labels that every log may have."""


def further_columns() -> list[str]:
    """Name the columns of numbers that a log has for tasks beyond those of `KNOWN_COLUMNS`."""
    return list(dict.fromkeys(task.column for task in SCORED.values() if task.column not in KNOWN_COLUMNS))


__all__ = ["SCORED", "ScoredTask", "further_columns", "numbers", "verbs"]
