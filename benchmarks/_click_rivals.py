"""MovieLens-100K's likes: the recipe `video`, and means of known labels and RecBole's models on the same candidates.

Four stars or more are a like. Each event is predicted from all earlier events of its user, also those in the last
tenth (`rolling`).
"""

import json
import os
import subprocess
import tempfile
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas
import torch

from m6rec import M6RecForRecommendation
from m6rec.train.config.recipe import Recipe, load_recipe
from m6rec.train.data.log import Log, read_log
from m6rec.train.data.splits import Split, by_time, histories
from m6rec.train.evaluation.reports import (
    ScoringExamples,
    all_events,
    eval_queries,
    scoring_baselines,
    scoring_examples,
    scoring_report,
)
from m6rec.train.metrics import auc
from m6rec.train.rows.examples import RequestWriter

ASKED = ("click", "rating")
HELD_OUT = ("valid", "test")
LAST_ITEMS = 20
"""Maximum number of history items for RecBole's models; the recipe uses as many events."""
RECBOLE: dict[str, dict[str, Any]] = {
    "DIN": {"history": "marked", "features": False, "embedding_size": 16, "mlp_hidden_size": [64, 64]},
    "DeepFM": {"history": "marked", "features": True, "embedding_size": 16},
}
"""Inputs of RecBole's models (`history`: see `items_before`; `features` of items: year and genres), and their
settings. The histories, and DeepFM's size and learning rate, were chosen by AUC on the validation part of seed 0; DIN's
size and features were not searched. DeepFM gets the history as one more field, the mean of its ids' vectors. Both get
the users' age, gender and occupation, which RecBole's DIN does not use."""
SHARED = {
    "epochs": 30,
    "stopping_step": 3,
    "train_batch_size": 512,
    "learning_rate": 1e-3,
    "dropout_prob": 0.2,
    "MAX_ITEM_LIST_LENGTH": LAST_ITEMS,
}


def unread(max_events: int) -> Any:
    """Return a replacement of a processor for evaluations without a model: it returns empty rows."""

    def read_many(requests: Sequence[Any], task: str) -> list[Any]:
        return [SimpleNamespace(input_ids=[])] * len(requests)

    return SimpleNamespace(max_events=max_events, item_rows=None, read_many=read_many)


def recipe(data: Path, folder: Path, seed: int) -> Recipe:
    """Return the recipe with these folders."""
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
    """Return the row of a model from its reports on both tasks."""
    clicks, ratings = (report[task] for task in ASKED)
    return {"auc": clicks["auc"], "gauc": clicks["gauc"], "rmse": ratings["rmse"], "examples": clicks["examples"]}


def mean_likes(data: Path, folder: Path, seed: int) -> dict[str, dict[str, Any]]:
    """Measure means of known labels: rows by name."""
    source = recipe(data, folder, seed)
    arguments = source.evaluation
    log = read_log(source.data)
    split = by_time(log.interactions, arguments.valid_fraction, arguments.test_fraction, seed)
    writer, found = RequestWriter(log), {}
    for task in ASKED:
        rows = scoring_examples(
            writer, unread(source.text.max_events), split, "test", task, source.task, arguments, seed
        )
        means = scoring_baselines(split, writer, rows, "test", task, source.task, seed)
        found[task] = {name: scoring_report(own, rows, task) for name, own in means.items()}
    return {name: row({task: found[task][name] for task in ASKED}) for name in found["click"]}


def trained(data: Path, folder: Path, seed: int) -> dict[str, Any]:
    """Pretrain and fine-tune with the recipe, and measure."""
    from m6rec.train.runs.finetune import finetune
    from m6rec.train.runs.pretrain import pretrain

    source = recipe(data, folder, seed)
    pretrain(source)
    report = finetune(source)  # starts from the pretrained model
    parameters = M6RecForRecommendation.from_pretrained(folder / "model").num_parameters()
    return {**row({task: report[task]["m6rec"] for task in ASKED}), "parameters": parameters}


# ------------------------------------------------------------------------------------------------------------ RecBole


def recbole(data: Path, folder: Path, kind: str, seed: int, python: str | None = None) -> list[dict[str, Any]]:
    """Train a model of RecBole (DIN, DeepFM) on the training part, and choose the number of its epochs.

    It runs with the python of a separate environment (pip install recbole==1.2.1 "numpy<2" "pandas<3"), which is given
    as argument or in the variable M6REC_RECBOLE_PYTHON.
    """
    if not (python := python or os.environ.get("M6REC_RECBOLE_PYTHON")):
        raise ValueError("RecBole has no environment: set M6REC_RECBOLE_PYTHON to the python of one that has it")
    settings = {**SHARED, **RECBOLE[kind]}
    reported = {name: settings.pop(name) for name in ("history", "features")}
    with tempfile.TemporaryDirectory(dir=folder.absolute()) as place:
        examples = write_likes(recipe(data, folder, seed), Path(place), seed, **reported)
        facts = run_recbole(python, Path(place), kind, settings, seed)
        return [measure_recbole(Path(place), examples, facts)]


def write_likes(
    source: Recipe, folder: Path, seed: int, history: str | None, features: bool
) -> dict[str, ScoringExamples]:
    """Write RecBole's tables, and return the examples of the rows of the held-out parts."""
    log = read_log(source.data)
    split = by_time(log.interactions, source.evaluation.valid_fraction, source.evaluation.test_fraction, seed)
    everything = all_events(split)
    table = pandas.DataFrame({f"{name}:token": everything[name].astype(str) for name in ("user_id", "item_id")})
    if history:
        table["item_id_list:token_seq"] = items_before(everything, history)
    table["label:float"] = everything["label"].astype(float)
    folder = folder / "likes"
    folder.mkdir()
    write_described(log, folder, features)
    table[everything.index.isin(split.train.index)].to_csv(folder / "likes.train.inter", sep="\t", index=False)
    writer, found = RequestWriter(log), {}
    for part in HELD_OUT:
        found[part] = scoring_examples(writer, unread(1), split, part, "click", source.task, source.evaluation, seed)
        places = held_out_places(split, part, source, seed)
        table.iloc[places].to_csv(folder / f"likes.{part}.inter", sep="\t", index=False)
    return found


def held_out_places(split: Split, part: str, source: Recipe, seed: int) -> np.ndarray:
    """Return the positions, among all events, of the events of `scoring_examples`, in its order."""
    heard: np.ndarray = np.ones(len(all_events(split)), dtype=bool)  # each event has a label
    return np.concatenate([one.held_out for one in eval_queries(split, part, heard, 1, source.evaluation, seed)])


def items_before(events: pandas.DataFrame, history: str) -> list[str]:
    """Return the last items that the user of each event met before it, oldest first.

    They include earlier held-out events.

    Args:
        events: All events, in order.
        history: "all" items, only "liked" ones, or "marked": all, with separate ids for items that were not liked.
    """
    items, labels = events["item_id"].astype(str).to_numpy(), events["label"].to_numpy()
    found = [""] * len(events)
    for places in histories(events).values():
        before: deque[str] = deque(maxlen=LAST_ITEMS)
        for place in places:
            found[place] = " ".join(before)
            if labels[place] == 1 or history != "liked":
                before.append(items[place] + ("-" if labels[place] != 1 and history == "marked" else ""))
    return found


def write_described(log: Log, folder: Path, features: bool) -> None:
    """Write the features of users and, if `features`, of items."""
    if features:
        genres = log.items["genres"].str.replace(", ", " ")
        items = {"item_id:token": log.items.index, "release_year:token": log.items["year"], "class:token_seq": genres}
        pandas.DataFrame(items).to_csv(folder / "likes.item", sep="\t", index=False)
    if log.users is not None:
        users = log.users[["age", "gender", "occupation"]].rename(columns=lambda name: f"{name}:token")
        users.rename_axis("user_id:token").to_csv(folder / "likes.user", sep="\t")


def run_recbole(python: str, folder: Path, kind: str, settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """Train in the other environment, with the folder as its working directory, where RecBole leaves files."""
    threads = torch.get_num_threads()
    task = {"kind": kind, "settings": settings, "folder": str(folder), "seed": seed, "threads": threads}
    command = [python, str(Path(__file__).with_name("_recbole_rivals.py").absolute()), json.dumps(task)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=folder, env=environment)
    reported: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return reported


def measure_recbole(folder: Path, examples: dict[str, ScoringExamples], reported: dict[str, Any]) -> dict[str, Any]:
    """Measure RecBole's predictions of the test part after the epoch with the best validation AUC."""
    predicted = np.load(folder / "predictions.npz")
    for part, own in examples.items():
        if own.item_ids.tolist() != predicted[f"{part}_items"].tolist():
            raise ValueError(f"RecBole's rows of the {part} part are not the held-out ones")
    searched = [auc(epoch, examples["valid"].labels) for epoch in predicted["valid"]]
    epochs = int(np.argmax(searched)) + 1
    report = scoring_report(predicted["test"][epochs - 1], examples["test"], "click")
    return {
        **{name: report[name] for name in ("auc", "gauc", "examples")},
        "seconds": reported["seconds"][epochs - 1],
        "peak_memory_gib": reported["peak_memory_gib"],
        "parameters": reported["parameters"],
        "setting": epochs,
        "searched": {str(epoch): value for epoch, value in enumerate(searched, 1)},
    }


__all__ = ["mean_likes", "recbole", "trained"]
