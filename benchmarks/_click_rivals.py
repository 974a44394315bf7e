"""What clicks are compared with: means of known labels, on the rows and the split of ours."""

from pathlib import Path
from typing import Any

from _ranking_rivals import unread

from m6rec.train.data import DataArguments, read_log
from m6rec.train.evaluation import scoring_baselines, scoring_examples
from m6rec.train.examples import RequestWriter
from m6rec.train.sections import EvaluationArguments, TaskArguments
from m6rec.train.splits import by_time

HISTORY = 50
"""Events of a history, at most."""


def mean_likes(data: Path) -> dict[str, dict[str, Any]]:
    """Measure means of known labels on MovieLens-100K's likes of four stars or more, split by time: rows by name."""
    task = TaskArguments(learn=["click"])
    evaluation = EvaluationArguments(split="time", valid_fraction=0.05, test_fraction=0.1)
    log = read_log(DataArguments(source="ml-100k", directory=str(data / "ml-100k")))
    split, writer = by_time(log.interactions, evaluation.valid_fraction, evaluation.test_fraction), RequestWriter(log)
    examples = scoring_examples(writer, unread(HISTORY), split, "test", "click", task, evaluation, 0)
    found = scoring_baselines(split, writer, examples, "test", "click", task, 0)
    return {name: {"auc": own["auc"], "examples": own["examples"]} for name, own in found.items()}


__all__ = ["mean_likes"]
