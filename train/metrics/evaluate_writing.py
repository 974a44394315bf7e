"""Metrics of generated texts for `evaluate.load`: give it the path of this file."""

# The loader copies this file elsewhere (hence the absolute names) and reads its imports line by line.
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
from numpy.typing import ArrayLike

from m6rec.train.metrics.writing import writing_intervals, writing_report

USAGE = """
Args:
    predictions: The generated texts.
    references: The reference of each text.
    features: Words or phrases; with them, `fcr`, `fmr` and `div` are reported.
    groups: The group of each text, usually its user, in the order in which the texts were added; for the intervals.
    intervals: Whether to report 95% bootstrap intervals.

Returns:
    `bleu_1`, `bleu_4`, `rouge_1`, `rouge_l`, `distinct_1`, `distinct_2`, `usr` of texts without case and punctuation;
    `raw_bleu_1`, `raw_bleu_4`, `raw_rouge_1`, `raw_rouge_l` of texts as they stand; `texts`, their number; with
    features `fcr`, `fmr`, `div`; with intervals `intervals`, metric -> [low, high].
"""


class GeneratedTexts(evaluate.Metric):
    """Similarity to references, repetition and named features of generated texts, from `writing_report`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="BLEU, ROUGE, distinct-n, USR, FCR, FMR and DIV of generated texts.",
            citation="",
            inputs_description=USAGE,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(
        self,
        predictions: list[str],
        references: list[str],
        features: Sequence[str] | None = None,
        groups: ArrayLike | None = None,
        intervals: bool = False,
    ) -> dict[str, Any]:
        report: dict[str, Any] = writing_report(predictions, references, features)
        if intervals:
            report["intervals"] = writing_intervals(predictions, references, features, groups)
        return report


__all__ = ["GeneratedTexts"]
