"""MovieLens-100K's likes: the recipe `video`, and means of known labels on the same candidates.

Four stars or more are a like. Each is asked after all that its user did before, in the last tenth too (`rolling`).
"""

import json
from pathlib import Path
from typing import Any

from _ranking_rivals import unread

from m6rec.train.data import read_log
from m6rec.train.evaluation import scoring_baselines, scoring_examples
from m6rec.train.examples import RequestWriter
from m6rec.train.recipe import Recipe, load_recipe
from m6rec.train.splits import by_time

ASKED = ("click", "rating")


def recipe(data: Path, folder: Path, seed: int) -> Recipe:
    """The recipe, in these folders."""
    changed = {
        "data.directory": str(data / "ml-100k"),
        "data.seed": seed,
        "pretraining.output_dir": str(folder / "pretrained"),
        "training.output_dir": str(folder / "model"),
        "training.disable_tqdm": True,
        "training.seed": seed,
    }
    return load_recipe("video", [f"{key}={json.dumps(value)}" for key, value in changed.items()])


def row(report: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The row of a model, of what its reports on both tasks say."""
    clicks, ratings = (report[task] for task in ASKED)
    return {"auc": clicks["auc"], "gauc": clicks["gauc"], "rmse": ratings["rmse"], "examples": clicks["examples"]}


def mean_likes(data: Path, folder: Path, seed: int) -> dict[str, dict[str, Any]]:
    """Measure means of known labels: rows by name."""
    asked = recipe(data, folder, seed)
    arguments = asked.evaluation
    log = read_log(asked.data)
    split = by_time(log.interactions, arguments.valid_fraction, arguments.test_fraction, seed)
    writer, found = RequestWriter(log), {}
    for task in ASKED:
        rows = scoring_examples(writer, unread(asked.text.max_events), split, "test", task, asked.task, arguments, seed)
        found[task] = scoring_baselines(split, writer, rows, "test", task, asked.task, seed)
    return {name: row({task: found[task][name] for task in ASKED}) for name in found["click"]}


def trained(data: Path, folder: Path, seed: int) -> dict[str, Any]:
    """Pretrain and fine-tune by the recipe, and measure."""
    from m6rec.train.finetune import finetune
    from m6rec.train.pretrain import pretrain

    asked = recipe(data, folder, seed)
    pretrain(asked)
    report = finetune(asked)  # goes on from what was pretrained
    return row({task: report[task]["m6rec"] for task in ASKED})


__all__ = ["mean_likes", "trained"]
