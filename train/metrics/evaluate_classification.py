"""Metrics of click probabilities for `evaluate.load`: give it the path of this file."""

# The loader copies this file elsewhere (hence the absolute names) and reads its imports line by line.
from typing import Any

import datasets
import evaluate
from numpy.typing import ArrayLike

from m6rec.train.metrics.classification import classification_report

USAGE = """
Args:
    predictions: The probability of label 1 for each example.
    references: The label of each example, 0 or 1.
    groups: The group of each example, usually its user, in the order in which the examples were added.
    bins: Bins of the calibration error.

Returns:
    `auc` (where there are both classes), `log_loss`, `calibration_error`, `accuracy`, `examples`; with groups `gauc`,
    `gauc_groups`, `gauc_examples`.
"""


class BinaryClassification(evaluate.Metric):
    """Order, likelihood and calibration of click probabilities, from `classification_report`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="AUC, grouped AUC, log-loss, expected calibration error and accuracy of click probabilities.",
            citation="",
            inputs_description=USAGE,
            # Labels as floats: an integer feature would truncate 0.7 to 0; the functions raise.
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(
        self, predictions: list[float], references: list[float], groups: ArrayLike | None = None, bins: int = 15
    ) -> dict[str, Any]:
        return classification_report(predictions, references, groups, bins)


__all__ = ["BinaryClassification"]
