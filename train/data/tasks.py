"""Labels, negatives and metrics of scoring tasks: the training half of the table of tasks.

SCORING_TASKS, with the same names, defines their answers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...values_m6rec import IGNORE_INDEX


def numbers(values: np.ndarray, names: Mapping[str, list[str]], drawn: bool) -> np.ndarray:
    """Convert N numbers to N labels; NaN is unknown.

    >>> numbers(np.array([4.0, np.nan]), {}, False).tolist()
    [4.0, -100.0]
    """
    values = values.astype(float)
    return np.where(np.isnan(values), IGNORE_INDEX, values)


def verbs(values: np.ndarray, names: Mapping[str, list[str]], drawn: bool) -> np.ndarray:
    """Convert N verbs to N x I labels: whether the verb belongs to the I-th name.

    If negatives are drawn, an event has labels for its own names only. An empty verb is unknown.

    >>> verbs(np.array(["like", "skip", ""]), {"likes": ["like"], "skips": ["skip"]}, False).tolist()
    [[1, 0], [0, 1], [-100, -100]]
    """
    labels = np.stack([np.isin(values, own).astype(int) for own in names.values()], 1)
    return np.where(labels == 0 if drawn else (values == "")[:, None], IGNORE_INDEX, labels)


@dataclass(frozen=True)
class ScoredTask:
    """The training half of a row of the table of tasks.

    Attributes:
        column: Column of the log with the labels. If no other task reads it, it is a role of `data.columns`, and
            holds numbers.
        measure: Metrics of the predictions: a name in MEASURES of `train.evaluation.measures`.
        labels: Turns N values of the column into N or N x I labels; its other arguments are the mapping of
            `names_in`, and whether negatives are drawn.
        negatives: Whether items that the user has not met can be drawn with label 0 for an event with label 1.
        implied: Whether each event has label 1 if the log lacks the column and negatives are drawn.
        names_in: Key of a recipe's section `task` that names I parallel labels: name -> verbs. The configuration
            has a field of the same name.
    """

    column: str
    measure: str
    labels: Callable[[np.ndarray, Mapping[str, list[str]], bool], np.ndarray] = numbers
    negatives: bool = False
    implied: bool = False
    names_in: str | None = None

    def names(self, section: Any) -> Mapping[str, list[str]]:
        """Return the names of parallel labels, and their verbs, in a recipe's section `task`; empty if it has none."""
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
    """Return the numeric columns that tasks read in addition to `KNOWN_COLUMNS`."""
    return list(dict.fromkeys(task.column for task in SCORED.values() if task.column not in KNOWN_COLUMNS))


__all__ = ["SCORED", "ScoredTask", "further_columns", "numbers", "verbs"]
