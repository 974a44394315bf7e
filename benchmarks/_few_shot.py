"""TALLRec's film clicks from 16, 64, 256 or all 8,000 labelled rows, by our model; `quality.py` runs the cells.

A row is ten films that a user liked or not, and whether the user likes one more. In a draw of few rows each row is a
separate user, and nothing else of the training file is used. The model is initialised from MiniLM and pretrained by
`likes`: synthetic users over the films' titles, years and genres, without real behaviour. A film's percentage of likes
is added to its text, counted in the histories of the drawn rows (with all 8,000: in their labels); in the rows named
`histories counted`, in the histories of all 8,000 training rows. Later histories hold many target films of earlier
rows, so these are not free of labels. All settings were chosen on validation.
"""

import ast
import csv
import random
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from _rivals import minilm_folder
from _training import quiet_training

from m6rec.train.metrics import auc, bootstrap_interval

COLUMNS = ("user_id", "item_id", "event", "label", "part")
VERBS = ("dislike", "like")
MODEL = {"num_joint_layers": 2, "segment_summary": 1, "segment_pooling": "mean", "embedding_dim": 128}
PRETRAINING = {"max_steps": 480, "learning_rate": 1e-3, "per_device_train_batch_size": 64}
FINETUNING: dict[int, dict[str, Any]] = {
    16: {"num_train_epochs": 2, "learning_rate": 1e-5, "per_device_train_batch_size": 8},
    64: {"num_train_epochs": 2, "learning_rate": 1e-5, "per_device_train_batch_size": 16},
    256: {"num_train_epochs": 2, "learning_rate": 2e-5, "per_device_train_batch_size": 16},
    8000: {"num_train_epochs": 2, "learning_rate": 3e-4, "per_device_train_batch_size": 64},
}
"""Settings of fine-tuning by the number of labelled rows."""
PRIOR = 10.0
"""Smoothing of a film's like rate; not searched."""


def read_rows(data: Path, part: str) -> list[dict[str, Any]]:
    """Read a file of TALLRec."""
    with (data / "tallrec-movie" / f"{part}.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    lists = ("history_movie_id", "history_rating")
    return [{**row, **{name: ast.literal_eval(row[name]) for name in lists}} for row in rows]


def draw(rows: list[dict[str, Any]], shots: int, seed: int) -> list[dict[str, Any]]:
    """Draw labelled rows that include both labels."""
    draws = random.Random(seed)
    while True:
        drawn = draws.sample(rows, shots)
        if len({row["rating"] for row in drawn}) == 2:
            return drawn


def write_tables(data: Path, drawn: list[dict[str, Any]], folder: Path) -> None:
    """Write drawn rows, and all validation and test rows, as a log: each row is a separate user."""
    from m6rec.train.data.movielens import movielens_tables

    parts = {"train": drawn, **{part: read_rows(data, part) for part in ("valid", "test")}}
    with (folder / "interactions.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for part, rows in parts.items():
            for number, row in enumerate(rows):
                user = f"{part}-{number}-{row['user_id']}"
                history = zip(row["history_movie_id"], map(int, row["history_rating"]))
                table.writerows((user, film, VERBS[like], "", "train") for film, like in history)
                table.writerow((user, row["movie_id"], VERBS[int(row["rating"])], row["rating"], part))
    movielens_tables(data / "ml-100k")[1].to_csv(folder / "items.csv", index=False)


def recipe(folder: Path, seed: int, **training: Any) -> dict[str, Any]:
    """Return the common settings of pretraining and fine-tuning."""
    return {
        "data": {
            "interactions": str(folder / "interactions.csv"),
            "items": str(folder / "items.csv"),
            "columns": {"part": "part"},
        },
        "text": {"domain": "video", "max_events": 10, "max_length": 512},
        "model": {"attention": "eager", "freeze_segments": True},
        "task": {"learn": ["click"]},
        "evaluation": {"split": "given", "rolling": True},
        "training": quiet_training(folder / "model", seed, **training),
    }


def pretrained(data: Path, folder: Path) -> Path:
    """Make the initial model of all draws, unless it exists; no behaviour is used for it."""
    from m6rec.train.config.recipe import load_recipe
    from m6rec.train.runs.pretrain import pretrain

    if not (folder / "model" / "metrics.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_tables(data, draw(read_rows(data, "train"), 16, 0), folder)  # for its films, and its words for likes
        tree = recipe(folder, 0, **PRETRAINING)
        tree["model"] |= {"backbone": str(minilm_folder()), "config": MODEL}
        tree["task"]["targets"] = 8
        tree["text"]["statistics"] = ["item_likes"]
        tree["pretraining"] = {"objectives": {"likes": 1}, "valid_rows": 64}
        pretrain(load_recipe(tree))
    return folder / "model"


def history_likes(writer: Any, rows: list[dict[str, Any]], drawn: list[dict[str, Any]]) -> Any:
    """Count the likes of each film in the histories of rows, once per user, without targets of drawn rows."""
    from m6rec.train.rows.item_likes import ItemLikes

    reported = {
        (row["user_id"], film): int(like)
        for row in rows
        for film, like in zip(row["history_movie_id"], row["history_rating"])
    }
    for row in drawn:
        reported.pop((row["user_id"], row["movie_id"]), None)
    users, films = zip(*reported)
    places = np.array([writer.rows[film] for film in films])
    return ItemLikes(np.array(users), places, np.array(list(reported.values())), len(writer.items))


def few_shot(data: Path, folder: Path, seed: int, *, shots: int, everyone: bool = False) -> list[dict[str, Any]]:
    """Tune the pretrained model on a draw of labelled rows, and measure it: a row of the table.

    Args:
        data: Folder of the data sets.
        folder: Folder of this cell; the pretrained model is next to it.
        seed: Seed of the draw and of the training.
        shots: Number of labelled rows; 0: the pretrained model without tuning.
        everyone: Count likes of films in the histories of all training rows, not only of the drawn ones.
    """
    from m6rec.segment_cache_m6rec import SegmentCache
    from m6rec.train.config.recipe import load_recipe
    from m6rec.train.runs.build import prepare
    from m6rec.train.runs.finetune import fit

    base, rows = pretrained(data, folder.parent / "pretrained"), read_rows(data, "train")
    folder.mkdir(parents=True, exist_ok=True)
    tree = recipe(folder, seed, **FINETUNING.get(shots, {}))
    drawn = draw(rows, shots or 16, seed)
    if shots == len(rows):
        tree["data"] = {"source": "tallrec", "directory": str(data / "tallrec-movie")}
    else:
        write_tables(data, drawn, folder)
    tree["model"]["checkpoint"] = str(base)
    tree["task"] |= {"targets": 1, "group_user_rows": 8 if shots == len(rows) else 1}
    tree["text"]["statistics"] = ["item_likes"] if shots else []
    run = prepare(load_recipe(tree))
    if 0 < shots < len(rows):  # all rows make a log, whose own statistic counts every label once
        run.writer.statistics = history_likes(run.writer, rows if everyone else drawn, drawn)
    start = time.process_time()
    if shots:
        fit(run)
    run.segment_cache = run.segment_cache or SegmentCache()
    return [{**measured(run), "training_seconds": time.process_time() - start}]


def measured(run: Any) -> dict[str, Any]:
    """Measure a model on validation and test rows; the interval is from resampling the test's users."""
    from m6rec.train.evaluation.reports import predictions
    from m6rec.train.runs.finetune import examples_of

    aucs = {}
    for part in ("valid", "test"):
        examples = examples_of(run, part, "click")
        predicted = predictions(run.model, examples, "click", run.collator, cache=run.segment_cache)
        aucs[part] = auc(predicted, examples.labels)
    users = [user.rpartition("-")[2] for user in examples.user_ids]
    return {
        "auc": aucs["test"],
        "valid_auc": aucs["valid"],
        "interval": {"auc": by_user(predicted, examples.labels, users)},
        "examples": len(predicted),
        "parameters": run.model.num_parameters(),
    }


def rule(data: Path, folder: Path, seed: int, *, films: bool) -> list[dict[str, Any]]:
    """Measure a rule without training: the share of likes in the row's own history, and the film's like rate with it.

    The rate is counted in the histories of all training rows, each user's film once, and smoothed towards the mean with
    the weight of PRIOR labels.
    """
    reported: dict[tuple[str, str], int] = {}
    for row in read_rows(data, "train") if films else ():
        reported |= {
            (row["user_id"], film): int(like) for film, like in zip(row["history_movie_id"], row["history_rating"])
        }
    likes, counts = Counter[str](), Counter[str]()
    for (_, film), like in reported.items():
        likes[film] += like
        counts[film] += 1
    mean = sum(likes.values()) / max(sum(counts.values()), 1)
    aucs = {}
    for part in ("valid", "test"):
        rows = read_rows(data, part)
        scores = np.array([np.mean(list(map(int, row["history_rating"]))) for row in rows])
        if films:
            asked_for = [row["movie_id"] for row in rows]
            scores += [(likes[film] + PRIOR * mean) / (counts[film] + PRIOR) for film in asked_for]
        labels = np.array([int(row["rating"]) for row in rows])
        aucs[part] = auc(scores, labels)
    interval = by_user(scores, labels, [row["user_id"] for row in rows])
    return [{"auc": aucs["test"], "valid_auc": aucs["valid"], "interval": {"auc": interval}, "examples": len(rows)}]


def by_user(scores: np.ndarray, labels: np.ndarray, users: list[str]) -> list[float]:
    """Return the AUC's 95% interval from resampling users."""
    pairs = np.column_stack([scores, labels])
    return list(bootstrap_interval(pairs, lambda rows: auc(*rows.T), groups=users, samples=1000))


def cells() -> dict[str, Callable[[Path, Path, int], list[dict[str, Any]]]]:
    """Return the cells for `quality.py`: name -> function of the data's folder, the cell's folder, and the seed."""
    found: dict[str, Callable[[Path, Path, int], list[dict[str, Any]]]] = {
        "share of likes in the history": partial(rule, films=False),
        "the same and the film's like rate": partial(rule, films=True),
        "m6rec, 0 labels": partial(few_shot, shots=0),
    }
    for shots in FINETUNING:
        found[f"m6rec, {shots} labels"] = partial(few_shot, shots=shots)
        if shots < max(FINETUNING):
            found[f"m6rec, {shots} labels, histories counted"] = partial(few_shot, shots=shots, everyone=True)
    return found


__all__ = ["cells", "few_shot"]
