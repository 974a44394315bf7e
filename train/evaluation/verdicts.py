"""Whether a model is better than the rules that need no training: one sentence, with an interval."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...configuration_m6rec import M6RecConfig
from ...model_cards.card import OWN, VERDICT
from ..config.recipe import LESS_IS_BETTER, Recipe
from ..metrics import bootstrap_interval
from ..metrics.checks import group_numbers


def compare(
    metric: str, values: Mapping[str, np.ndarray], groups: Sequence[Any] | np.ndarray | None = None, seed: int = 0
) -> dict[str, Any]:
    """Compare the model with the best baseline on the same examples.

    Args:
        metric: What is compared: the mean of the values; where it ends in `rmse`, its root.
        values: Who, of whom one is `OWN`, -> what each of N examples adds.
        groups: N ids of the users, which are drawn with all their examples; None: each example is of another user.
        seed: Of the bootstrap.

    Returns:
        `metric`, `value` of the model, the best `baseline` with its `baseline_value`, the `difference` with its 95%
        `interval` (paired bootstrap over users), `better` (the whole interval is on the good side), `worse` (on the
        other), and all of it as a `sentence`.

    >>> found = compare("ndcg@10", {"m6rec": np.ones(8), "popularity": np.zeros(8), "similar_text": np.full(8, 0.5)})
    >>> found["baseline"], found["difference"], found["interval"], found["better"]
    ('similar_text', 0.5, [0.5, 0.5], True)
    """
    root = metric.endswith("rmse")
    less = metric.endswith(LESS_IS_BETTER)

    def value(total: float, count: float) -> float:
        mean = float(total / count)
        return math.sqrt(mean) if root else mean

    figures = {who: value(own.sum(), len(own)) for who, own in values.items()}
    others = [who for who in figures if who != OWN]
    best = min(others, key=figures.__getitem__) if less else max(others, key=figures.__getitem__)
    numbers = np.arange(len(values[OWN])) if groups is None else group_numbers(groups, len(values[OWN]))
    sums = [np.bincount(numbers, own) for own in (np.ones(len(numbers)), values[OWN], values[best])]

    def difference(rows: np.ndarray) -> float:
        count, own, other = rows.sum(0)
        return value(own, count) - value(other, count)

    low, high = bootstrap_interval(np.column_stack(sums), difference, seed=seed)
    found = {
        "metric": metric,
        "value": figures[OWN],
        "baseline": best,
        "baseline_value": figures[best],
        "difference": figures[OWN] - figures[best],
        "interval": [low, high],
        "better": high < 0 if less else low > 0,
        "worse": low > 0 if less else high < 0,
    }
    return {**found, "sentence": _sentence(found, len(sums[0]))}


def _sentence(found: Mapping[str, Any], users: int) -> str:
    how = "better" if found["better"] else "worse" if found["worse"] else "not measurably better"
    low, high = found["interval"]
    return (
        f"{OWN} is {how} than {found['baseline']}, the best row that needs no training: {found['metric']} "
        f"{found['value']:.4f} against {found['baseline_value']:.4f}, a difference of {found['difference']:+.4f} "
        f"[{low:+.4f}, {high:+.4f}] (95% interval, paired bootstrap over {users:,} users)"
    )


def advised(found: Mapping[str, Any], task: str, recipe: Recipe, config: M6RecConfig) -> dict[str, Any]:
    """Add to a comparison, where the model is not better, what to try."""
    if found["better"]:
        return {**found, "sentence": f"{found['sentence']}."}
    tries = []
    if task == "retrieval" and not config.tfidf_weight:
        tries.append("model.config.tfidf_weight=0.6, which adds the likeness of words to those of the last items")
    if task == "retrieval":
        tries.append("a sentence embedder as the start (as in the recipe beauty)")
    elif "item_likes" not in recipe.text.statistics:
        tries.append("text.statistics=[item_likes], which tells how many like an item")
    if not recipe.training.get("load_best_model_at_end") and recipe.tuning.average_checkpoints == 1:
        tries.append("the best epoch in place of the last (training.load_best_model_at_end=true)")
    tries.append("another number of epochs or learning rate, and more data")
    return {**found, "sentence": f"{found['sentence']}. Try {'; '.join(tries)}."}


def verdicts(report: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, str]:
    """Return the sentence of each task of a report that has one."""
    found = {task: rows.get(OWN, {}).get(VERDICT) for task, rows in report.items()}
    return {task: verdict["sentence"] for task, verdict in found.items() if verdict}


__all__ = ["OWN", "VERDICT", "advised", "compare", "verdicts"]
