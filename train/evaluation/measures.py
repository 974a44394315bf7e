"""Metrics of scoring tasks, and the metric of their comparisons."""

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ...values_m6rec import IGNORE_INDEX
from ..metrics import classification_report, log_losses, mae, mixed_groups, rmse

logger = logging.getLogger(__name__)


class Measure(ABC):
    """Measures N or N x I predictions of a task against labels of the same shape, -100 if unknown.

    Attributes:
        compared_by: The metric for the comparison of a model with baselines.
        usual: Metrics that an error may suggest.
    """

    compared_by: str
    usual: tuple[str, ...]

    @abstractmethod
    def report(self, predicted: np.ndarray, labels: np.ndarray, users: np.ndarray, names: Sequence[str]) -> dict:
        """Measure predictions.

        Args:
            predicted: N or N x I.
            labels: Same shape.
            users: N ids, for metrics within users.
            names: Names of the I outputs, or only the task's.
        """

    @abstractmethod
    def errors(self, predicted: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Return the value of each known label, of which `compared_by` is the mean."""

    @abstractmethod
    def pattern(self, names: Iterable[str]) -> str:
        """Return a pattern of the names of all metrics; `names` are the I names, or empty."""


class Chances(Measure):
    """AUC, GAUC, log-loss and calibration of probabilities of 0 or 1.

    Each of I parallel outputs is measured separately (`like/auc`), and `auc`, `log_loss` and `calibration_error` are
    means over them. Metrics that are undefined are left out, with a warning that gives the reason.
    """

    compared_by, usual = "log_loss", ("auc", "log_loss")

    def report(self, predicted: np.ndarray, labels: np.ndarray, users: np.ndarray, names: Sequence[str]) -> dict:
        """Measure N or N x I probabilities."""
        if labels.ndim == 1:
            return self._of_one(names[0], predicted, labels, users)
        columns = enumerate(names)
        reports = {name: self._of_one(name, predicted[:, place], labels[:, place], users) for place, name in columns}
        found: dict[str, Any] = {}
        for metric in ("auc", "log_loss", "calibration_error"):
            values = [own[metric] for own in reports.values() if metric in own]
            found |= {metric: float(np.mean(values))} if values else {}
        for name, own in reports.items():
            found |= {f"{name}/{metric}": value for metric, value in own.items()}
        return {**found, "examples": len(predicted)}

    @staticmethod
    def _of_one(name: str, chances: np.ndarray, labels: np.ndarray, users: np.ndarray) -> dict[str, Any]:
        known = labels != IGNORE_INDEX
        if not known.any():
            logger.warning("%s is not measured: no held-out event says anything of it", name)
            return {"examples": 0}
        chances, labels, users = chances[known], labels[known], users[known]
        if labels.min() == labels.max():
            logger.warning(
                "%s has no AUC: all held-out labels are %g, and an AUC compares two classes", name, labels[0]
            )
        # GAUC compares events within a user: with one held-out event per user it is undefined and left out.
        return dict(classification_report(chances, labels, users if mixed_groups(labels, users).any() else None))

    def errors(self, predicted: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Return each label's log-loss, weighted so that the mean is the mean of the I log-losses."""
        known = labels != IGNORE_INDEX
        losses = log_losses(predicted[known], labels[known])
        counts = np.broadcast_to(known.sum(0), known.shape)[known]
        return losses * (len(losses) / np.count_nonzero(known.sum(0)) / counts)

    def pattern(self, names: Iterable[str]) -> str:
        """Return a pattern of the metrics of one output, or of each output and the means."""
        each = "|".join(map(re.escape, names))
        apart = f"(({each})/)?" if each else ""
        return rf"{apart}(auc|gauc|gauc_groups|gauc_examples|log_loss|calibration_error|accuracy|examples)"


class Numbers(Measure):
    """RMSE and MAE of N numbers."""

    compared_by, usual = "rmse", ("rmse", "mae")

    def report(self, predicted: np.ndarray, labels: np.ndarray, users: np.ndarray, names: Sequence[str]) -> dict:
        """Measure N numbers."""
        return {"rmse": rmse(predicted, labels), "mae": mae(predicted, labels), "examples": len(predicted)}

    def errors(self, predicted: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Return each label's squared error."""
        known = labels != IGNORE_INDEX
        return (predicted[known] - labels[known]) ** 2

    def pattern(self, names: Iterable[str]) -> str:
        """Return a pattern of the metrics."""
        return "rmse|mae|examples"


MEASURES: dict[str, Measure] = {"chances": Chances(), "numbers": Numbers()}
"""The measures, by the names in SCORED of `train.data.tasks`."""


__all__ = ["MEASURES", "Chances", "Measure", "Numbers"]
