"""Ranking metrics for `evaluate.load`: give it the path of this file."""

# The loader copies this file elsewhere (hence the absolute names) and reads its imports line by line.
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from numpy.typing import ArrayLike

from m6rec.train.metrics.ranking import coverage, popularity_bias, ranking_report, target_ranks, top_items

USAGE = """
Args:
    predictions: For each user the scores of the whole catalogue, higher is better; -inf is never recommended.
    references: For each user the column of the relevant item.
    ks: Cut-offs of recall, NDCG, coverage and popularity bias.
    excluded: Columns to leave out, one list a user (seen items), in the order in which the users were added.
    subsets: name -> mask of the users that belong to it, such as "warm" and "cold".
    popularity: Each item's events in the training data; with it, `popularity_bias@k` is reported.

Returns:
    `recall@k`, `ndcg@k`, `mrr`, `examples` (also under `name/` for each subset), `coverage@k`, `popularity_bias@k`.
"""


class RecommendationRanking(evaluate.Metric):
    """Rank of each user's relevant item in the catalogue; the functions of `ranking` define the treatment of ties.

    The table of scores is temporarily held as Python lists: for a large catalogue call the functions batch by batch.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Recall, NDCG, MRR, coverage and popularity bias of a ranking of the whole catalogue.",
            citation="",
            inputs_description=USAGE,
            # Columns as floats: an integer feature would truncate 1.7 to 1; the functions raise.
            features=datasets.Features(
                {"predictions": datasets.List(datasets.Value("float64")), "references": datasets.Value("float64")}
            ),
        )

    def _compute(
        self,
        predictions: list[list[float]],
        references: list[float],
        ks: Sequence[int] = (5, 10, 20),
        excluded: Sequence[ArrayLike] | None = None,
        subsets: Mapping[str, ArrayLike] | None = None,
        popularity: ArrayLike | None = None,
    ) -> dict[str, Any]:
        lengths = {len(row) for row in predictions}
        if len(lengths) > 1:
            raise ValueError(
                f"predictions have from {min(lengths)} to {max(lengths)} scores; expected the whole catalogue for "
                "every user: fill with -inf what must not be recommended"
            )
        scores = np.array(predictions, dtype=np.float64)
        report: dict[str, Any] = ranking_report(target_ranks(scores, references, excluded), ks, subsets)
        lists = top_items(scores, max(ks, default=1), excluded)
        for k in ks:
            first = [row[:k] for row in lists]
            report[f"coverage@{k}"] = coverage(first, scores.shape[1])
            if popularity is not None:
                report[f"popularity_bias@{k}"] = popularity_bias(first, popularity)
        return report


__all__ = ["RecommendationRanking"]
