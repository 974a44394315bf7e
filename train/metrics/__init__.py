"""Metrics of ranking, classification and generated texts, in NumPy and Python.

The files `evaluate_*.py` offer them to Hugging Face's `evaluate`:

    import evaluate
    from m6rec.train.metrics import evaluate_ranking

    metric = evaluate.load(evaluate_ranking.__file__)
"""

from .bootstrap import bootstrap_interval, interval_of, resampled_means
from .classification import (
    accuracy,
    auc,
    classification_report,
    expected_calibration_error,
    grouped_auc,
    log_loss,
    log_losses,
    mae,
    mixed_groups,
    rmse,
)
from .ranking import (
    coverage,
    gini,
    list_exposure,
    mrr,
    ndcg_at_k,
    ndcg_gains,
    popularity_bias,
    ranking_report,
    recall_at_k,
    target_ranks,
    top_items,
)
from .writing import (
    bleu,
    distinct,
    feature_report,
    plain_text,
    rouge_1,
    rouge_l,
    tokens_of,
    unique_share,
    writing_intervals,
    writing_report,
)

__all__ = [
    "accuracy",
    "auc",
    "bleu",
    "bootstrap_interval",
    "classification_report",
    "coverage",
    "distinct",
    "expected_calibration_error",
    "feature_report",
    "gini",
    "grouped_auc",
    "interval_of",
    "list_exposure",
    "log_loss",
    "log_losses",
    "mae",
    "mixed_groups",
    "mrr",
    "ndcg_at_k",
    "ndcg_gains",
    "plain_text",
    "popularity_bias",
    "ranking_report",
    "recall_at_k",
    "resampled_means",
    "rmse",
    "rouge_1",
    "rouge_l",
    "target_ranks",
    "tokens_of",
    "top_items",
    "unique_share",
    "writing_intervals",
    "writing_report",
]
