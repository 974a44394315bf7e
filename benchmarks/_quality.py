"""AUC of each way of encoding: MovieLens-100K clicks, one trained model per configuration.

Four stars or more are a like. Split by time; each click is predicted from at most EVENTS earlier events of its user
(`rolling`: without it most users of the test part have no history). A candidate's text includes its percentage of
likes. Every model is initialised from MiniLM (23M parameters, 11M of them in its six layers), and trained on `--rows`
rows of TARGETS candidates once, with the same learning rate. Ways that only run the same model differently share a
cell.

The rivals are those of `_click_models.py`. The two cross-encoders encode user and candidate together, one candidate at
a time, and so learn only two candidates of each row: all would take four times as long.
"""

import argparse
import dataclasses
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from _click_models import CrossEncoder, SentenceTransformers, TwoTower
from _rivals import minilm_folder
from _training import quiet_training

BUDGET_MINUTES = 75
BATCH, TARGETS, EVENTS = 16, 8, 5
LATE = {"num_joint_layers": 3, "segment_pooling": "mean"}
CELLS: dict[str, dict[str, Any]] = {
    "joint": {"joint_positions": "request"},
    "late_all": LATE,
    "late_summary": {**LATE, "segment_summary": 1},
    "cross_encoder": {},
    "sentence_transformers": {},
    "two_tower": {},
}
"""Fields of the configuration that differ between the cells."""
RIVALS = {"cross_encoder": CrossEncoder, "two_tower": TwoTower, "sentence_transformers": SentenceTransformers}
SHARED = {
    "joint": ("flat_one_row", "reuse_all_joint"),
    "cross_encoder": ("cross_encoder", "user_states_reused", "user_states_reused_warm"),
}
"""Rows of the table that share one cell."""


def recipe_of(options: argparse.Namespace, fields: dict[str, Any], seed: int, output: Path) -> dict[str, Any]:
    """Return the recipe for clicks, with these fields of the configuration."""
    return {
        "data": {"source": "ml-100k", "directory": str(options.quality / "ml-100k"), "min_rating_liked": 4},
        "text": {
            "domain": "video",
            "max_events": EVENTS,
            "max_length": 512,
            "statistics": ["item_likes"],
        },
        "model": {"backbone": str(minilm_folder()), "attention": "eager", "config": {"embedding_dim": 128, **fields}},
        "task": {"learn": ["click"], "targets": TARGETS},
        "evaluation": {"split": "time", "valid_fraction": 0.05, "test_fraction": 0.1, "rolling": True},
        "training": quiet_training(
            output,
            seed,
            max_steps=max(options.rows // BATCH, 1),
            per_device_train_batch_size=BATCH,
            learning_rate=options.rate,
        ),
    }


def run_cell(options: argparse.Namespace, name: str, seed: int, folder: Path) -> dict[str, Any]:
    """Train a cell's model and measure it."""
    from m6rec import SegmentCache
    from m6rec.train.config.recipe import load_recipe
    from m6rec.train.evaluation.reports import predictions, scoring_report
    from m6rec.train.runs.build import prepare
    from m6rec.train.runs.finetune import examples_of, fit

    run = prepare(load_recipe(recipe_of(options, CELLS[name], seed, folder / "model")))
    examples = cut(examples_of(run, options.part, "click"), options.candidates, run.model.config.bos_token_id)
    start = time.process_time()
    if name in RIVALS:
        own = (folder,) if name == "sentence_transformers" else ()
        rival = RIVALS[name](run, options.rate, seed, BATCH, *own)
        rival.train(options.rows)
        trained = time.process_time()
        predicted = rival.predict(examples.rows)
    else:
        fit(run)
        trained = time.process_time()
        cache = SegmentCache() if run.model.config.num_segment_layers else None
        predicted = predictions(run.model, examples, "click", run.collator, cache=cache)
    end = time.process_time()
    report = scoring_report(predicted, examples, "click")
    return {
        "cell": name,
        "seed": seed,
        "auc": report["auc"],
        "log_loss": report["log_loss"],
        "examples": len(predicted),
        "training_rows": options.rows // BATCH * BATCH,
        "training_cpu_seconds": trained - start,
        "scoring_cpu_seconds": end - trained,
    }


def cut(examples: Any, candidates: int, bos: int) -> Any:
    """Keep whole rows, drawn by a fixed seed, with at most `candidates` candidates in total (at least one row)."""
    sizes = [row["input_ids"].count(bos) for row in examples.rows]
    starts, kept, total = np.cumsum([0, *sizes]), [], 0
    for row in random.Random(0).sample(range(len(sizes)), len(sizes)):
        if kept and total + sizes[row] > candidates:
            continue
        kept.append(row)
        total += sizes[row]
    places = np.concatenate([np.arange(starts[row], starts[row + 1]) for row in kept])
    arrays = ("user_ids", "item_embedding_ids", "labels", "history_means")
    fields = {name: value[places] for name in arrays if (value := getattr(examples, name)) is not None}
    return dataclasses.replace(examples, rows=[examples.rows[row] for row in kept], **fields)


def simple_means(options: argparse.Namespace) -> dict[str, float]:
    """Return the AUC of means of known labels on the same clicks."""
    from m6rec.train.config.recipe import load_recipe
    from m6rec.train.evaluation.reports import scoring_baselines, scoring_report
    from m6rec.train.runs.build import prepare
    from m6rec.train.runs.finetune import examples_of

    run = prepare(load_recipe(recipe_of(options, CELLS["joint"], 0, options.runs / "means")))
    examples = cut(examples_of(run, options.part, "click"), options.candidates, run.model.config.bos_token_id)
    recipe = run.recipe
    found = scoring_baselines(run.split, run.writer, examples, options.part, "click", recipe.task, recipe.seed)
    return {name: scoring_report(own, examples, "click")["auc"] for name, own in found.items()}


def measure_quality(options: argparse.Namespace, script: Path) -> dict[str, Any]:
    """Run the missing cells, each in a separate process, and summarise; or run the one named cell."""
    if options.cell:
        name, seed = options.cell[0], int(options.cell[1])
        folder = cell_folder(options, name, seed)
        (folder / "cell.json").write_text(json.dumps(run_cell(options, name, seed, folder), indent=2) + "\n")
        return {}
    print(f"time budget: {BUDGET_MINUTES} core-minutes; cells are kept in {options.runs}", flush=True)
    run_cells(options, script)
    cells = kept_cells(options)
    aucs = {}
    for name in CELLS:
        if own := [cell["auc"] for cell in cells if cell["cell"] == name]:
            aucs |= dict.fromkeys(SHARED.get(name, (name,)), statistics.mean(own))
    about = {name: getattr(options, name) for name in ("rows", "rate", "part", "candidates")}
    learnt = {name: rival.candidates for name, rival in RIVALS.items()}
    about |= {"backbone": "MiniLM", "targets": TARGETS, "events": EVENTS, "candidates_learnt_of_rivals": learnt}
    return {"quality": {**about, "cells": cells, "means": simple_means(options)}, "aucs": aucs}


def cell_folder(options: argparse.Namespace, name: str, seed: int | str) -> Path:
    """Return the folder of a cell; other settings are other cells."""
    return Path(options.runs, f"{name}-{options.part}-{options.rows}-{options.candidates}-{options.rate:g}-{seed}")


def kept_cells(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return all cells of these settings, from all calls."""
    found = options.runs.glob(f"{cell_folder(options, '*', '*').name}/cell.json")
    cells = [json.loads(path.read_text()) for path in found]
    return sorted(cells, key=lambda cell: (list(CELLS).index(cell["cell"]), cell["seed"]))


def run_cells(options: argparse.Namespace, script: Path) -> None:
    """Run the requested cells that have no results, and print their results."""
    for seed in options.seeds:
        for name in options.cells:
            folder = cell_folder(options, name, seed)
            kept = folder / "cell.json"
            if not kept.is_file():
                folder.mkdir(parents=True, exist_ok=True)
                same = ("quality", "runs", "rows", "candidates", "rate", "threads", "part")
                arguments = [text for key in same for text in (f"--{key}", str(getattr(options, key)))]
                with (folder / "log").open("w") as log:
                    command = [sys.executable, str(script), *arguments, "--cell", name, str(seed)]
                    subprocess.run(command, check=True, stdout=log, stderr=log)
            cell = json.loads(kept.read_text())
            print(
                f"{name:24} seed {seed} AUC {cell['auc']:.4f}, {cell['training_cpu_seconds']:.0f} s of training and "
                f"{cell['scoring_cpu_seconds']:.0f} s of scoring on one core",
                flush=True,
            )


__all__ = ["CELLS", "cut", "measure_quality", "recipe_of"]
