"""Metrics of ratings for `evaluate.load`: give it the path of this file."""

# The loader copies this file elsewhere (hence the absolute names) and reads its imports line by line.
from typing import Any

import datasets
import evaluate

from m6rec.train.metrics.classification import mae, rmse

USAGE = """
Args:
    predictions: The predicted rating of each example.
    references: The given rating of each example.

Returns:
    `rmse`, `mae`, `examples`.
"""


class RatingError(evaluate.Metric):
    """Errors of predicted ratings."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Root mean squared and mean absolute error of ratings.",
            citation="",
            inputs_description=USAGE,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, Any]:
        return {
            "rmse": rmse(predictions, references),
            "mae": mae(predictions, references),
            "examples": len(predictions),
        }


__all__ = ["RatingError"]
