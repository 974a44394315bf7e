"""The metric that selects the best checkpoint must be one that is measured."""

import re

from ..config.recipe import Recipe
from ..data.tasks import SCORED
from ..evaluation.measures import MEASURES


def check_best_metric(recipe: Recipe) -> None:
    """Raise if fine-tuning never measures `training.metric_for_best_model`.

    Raises:
        ValueError: The message names the measured metrics.
    """
    training = recipe.training
    metric = training.get("metric_for_best_model")
    chosen = training.get("load_best_model_at_end") or training.get("save_strategy") == "best"
    if metric is None and not chosen:
        return
    name = str(metric).removeprefix("eval_")
    if metric is None or not any(re.fullmatch(pattern, name) for pattern in _patterns(recipe)):
        raise ValueError(
            f"training.metric_for_best_model is {metric!r}, which is not measured while {', '.join(recipe.task.learn)} "
            f"is learnt: expected one of {', '.join(examples(recipe))}, ..."
        )


def examples(recipe: Recipe) -> list[str]:
    """Return the most common metrics that are measured during the training of a recipe."""
    usual = {
        "retrieval": [f"{name}@{k}" for k in recipe.evaluation.ks for name in ("ndcg", "recall")] + ["mrr"],
        **{task: [f"{task}_{name}" for name in MEASURES[row.measure].usual] for task, row in SCORED.items()},
        "writing": ["writing_perplexity"],
    }
    return [name for task in recipe.task.learn for name in usual[task]]


def _patterns(recipe: Recipe) -> list[str]:
    """Return patterns of the names of all metrics, with any names of subsets of the users."""
    ks, most = "|".join(map(str, recipe.evaluation.ks)), max(recipe.evaluation.ks)
    scored = {task: MEASURES[row.measure].pattern(row.names(recipe.task)) for task, row in SCORED.items()}
    known = {
        "retrieval": rf"(\w+/)?((ndcg|recall)@({ks})|mrr|examples)|(coverage|popularity_bias)@{most}",
        **{task: f"{re.escape(task)}_({pattern})" for task, pattern in scored.items()},
        "writing": r"writing_((\w+/)?perplexity|examples)",
    }
    # Metrics of a replayed run depend on its recipe: they are checked when they are measured.
    return [*(known[task] for task in recipe.task.learn), *(["replay_.+"] if recipe.task.replay else [])]


__all__ = ["check_best_metric", "examples"]
