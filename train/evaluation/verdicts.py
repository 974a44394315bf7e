"""Comparison of a model with untrained rules: one sentence, with an interval."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...configuration_m6rec import M6RecConfig
from ...model_cards.card import OWN, VERDICT
from ..config.recipe import LESS_IS_BETTER, Recipe
from ..metrics import interval_of, resampled_means

NETWORK = "network"
"""The row of a trained network without the evidence that it is combined with."""
RULE = "neighbours_and_words"
"""The reference row of all comparisons: the same untrained rule, with the same settings, for every log."""


def compare(
    metric: str,
    values: Mapping[str, np.ndarray],
    groups: Sequence[Any] | np.ndarray | None = None,
    seed: int = 0,
    resampled: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Any]:
    """Compare the model with the best baseline on the same examples.

    Args:
        metric: The compared metric: the mean of the values, or its root if the name ends in `rmse`.
        values: Name, one of which is `OWN`, -> values of N examples. `NETWORK` is trained, and no baseline.
        groups: N ids of the users, which are drawn with all their examples; None: each example has another user.
        seed: Seed of the bootstrap.
        resampled: Name -> means of the values on resamples, if computed already.

    Returns:
        `metric`, `value` of the model, the best `baseline` with its `baseline_value`, the `difference` with its 95%
        `interval` (paired bootstrap over users), `better` (the whole interval is on the good side), `worse` (on the
        bad side), and a `sentence` with these facts.

    >>> found = compare("ndcg@10", {"m6rec": np.ones(8), "popularity": np.zeros(8), "similar_text": np.full(8, 0.5)})
    >>> found["baseline"], found["difference"], found["interval"], found["better"]
    ('similar_text', 0.5, [0.5, 0.5], True)
    """
    root = metric.endswith("rmse")
    less = metric.endswith(LESS_IS_BETTER)

    figures = {who: float(own.mean()) for who, own in values.items()}
    figures = {who: math.sqrt(own) if root else own for who, own in figures.items()}
    others = [who for who in figures if who not in (OWN, NETWORK)]
    best = min(others, key=figures.__getitem__) if less else max(others, key=figures.__getitem__)
    if resampled is None:
        drawn = resampled_means(np.column_stack([values[OWN], values[best]]), groups, seed=seed).T
    else:
        drawn = np.stack([resampled[OWN], resampled[best]])
    own, other = np.sqrt(drawn) if root else drawn
    low, high = interval_of(own - other)
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
    users = len(values[OWN]) if groups is None else len(set(groups))
    return {**found, "sentence": _sentence(found, users)}


def differences(
    figures: Mapping[str, Mapping[str, float]], resampled: Mapping[str, Mapping[str, np.ndarray]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Compare each row of a table with every other row, on the same resamples.

    Args:
        figures: Name -> metric -> value.
        resampled: Name -> metric -> the metric on each resample.

    Returns:
        Name -> other name -> metric -> `value` of the difference, and its 95% `interval`.

    >>> drawn = {"mrr": np.ones(3)}
    >>> differences({"a": {"mrr": 0.5}, "b": {"mrr": 0.25}}, {"a": drawn, "b": drawn})["b"]
    {'a': {'mrr': {'value': -0.25, 'interval': [0.0, 0.0]}}}
    """
    found: dict[str, dict[str, dict[str, Any]]] = {who: {} for who in figures}
    for who, own in resampled.items():
        for other, theirs in resampled.items():
            if other == who:
                continue
            found[who][other] = {
                metric: {
                    "value": figures[who][metric] - figures[other][metric],
                    "interval": interval_of(means - theirs[metric]),
                }
                for metric, means in own.items()
            }
    return found


def _sentence(found: Mapping[str, Any], users: int) -> str:
    how = "better" if found["better"] else "worse" if found["worse"] else "not measurably better"
    low, high = found["interval"]
    return (
        f"{OWN} is {how} than {found['baseline']}, the best row that needs no training: {found['metric']} "
        f"{found['value']:.4f} against {found['baseline_value']:.4f}, a difference of {found['difference']:+.4f} "
        f"[{low:+.4f}, {high:+.4f}] (95% interval, paired bootstrap over {users:,} users)"
    )


def advised(found: Mapping[str, Any], task: str, recipe: Recipe, config: M6RecConfig) -> dict[str, Any]:
    """Add advice to a comparison in which the model is not better."""
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


__all__ = ["NETWORK", "OWN", "RULE", "VERDICT", "advised", "compare", "differences", "verdicts"]
