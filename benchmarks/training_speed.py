"""Speed of training: fine-tuning against Transformers' Llama, and an epoch of retrieval against RecTools' SASRec.

    python benchmarks/training_speed.py [--data DIR] [--turns 5] [--steps 16]                        about 10 minutes
    python benchmarks/training_speed.py --rectools-python PATH [--batches 30]                        5 minutes more

DIR holds `tallrec-movie`, `ml-100k` and `amazon-beauty`. Times are processor seconds, with one thread by default,
so that other work on the machine does not count; a turn's first step is a warm-up and is not counted.

Llama: the same rows of TALLRec (ten films that a user liked or not, and one more), the same ids in the same batches,
the same width, layers, heads and vocabulary, random weights, no drop-out, the same arguments of the Trainer; both
models take turns in one process, and the ratio is the median of the turns' ratios. M6-Rec encodes a batch's distinct
texts once and joins their states in the last layers; Llama encodes whole rows. With `group_user_rows` 8, eight rows of
a user stay together in a batch, for both. A token is an id that is not padding, counted once for both: the ratio is
also that of the rows per second.

SASRec: `_rectools_epoch.py`, run with the python of a separate environment (pip install "rectools[torch]"), uses the
same training part of Amazon Beauty; without `--rectools-python` its part is left out and null. Both have two layers of
width 64 that read the history, 128 users a batch, the whole catalogue in the softmax, 32-bit numbers.

Writes benchmarks/results/training_speed.json; the last line printed is the same JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import (
    DataCollatorWithPadding,
    LlamaConfig,
    LlamaForSequenceClassification,
    Trainer,
    TrainerCallback,
)

from m6rec import SegmentCache
from m6rec.train.config.recipe import load_recipe
from m6rec.train.rows.sampler import SeededOrder
from m6rec.train.runs.build import Run, on_cpu, plain_forward, prepare, use_bf16
from m6rec.train.runs.trainer import M6RecTrainer
from m6rec.train.runs.training_set import training_set

RESULTS = Path(__file__).parent / "results" / "training_speed.json"
SHAPE = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4}
JOINT = 2
BATCH = 32
TOGETHER = (1, 8)
"""Number of rows of a user that stay together in a batch; the first is compared."""
WIDTH, BLOCKS, HEADS, EVENTS, USERS, DROPOUT = 64, 2, 2, 50, 128, 0.2
"""Of both models of Amazon Beauty; USERS in a batch."""
LOSSES = ({"negatives": "catalogue"}, {"negatives": "sampled", "num_sampled": 256})
"""Negatives of retrieval; the first is compared."""


class Clock(TrainerCallback):
    """Notes the processor's seconds at the begin of an epoch and at the end of each step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the time before the first batch is made."""
        self.times.append(time.process_time())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the time after a step."""
        self.times.append(time.process_time())


def training(seed: int, output: str, **settings: Any) -> dict[str, Any]:
    """The section `training` of a recipe: nothing is written, evaluated or logged."""
    return {
        "output_dir": output,
        "learning_rate": 1e-4,
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "seed": seed,
        **settings,
    }


def timed(run: Run, rows: Dataset) -> list[float]:
    """Train a run's model as `m6rec finetune` does."""
    clock, arguments = Clock(), run.recipe.training_arguments(use_cpu=on_cpu(), bf16=use_bf16())
    trainer = M6RecTrainer(
        run, model=run.model, args=arguments, train_dataset=rows, data_collator=run.collator, callbacks=[clock]
    )
    trainer.train()
    plain_forward(run.model)
    return clock.times


# Llama


def tallrec_run(data: Path, steps: int, output: str, together: int) -> Run:
    """Our model and the rows of TALLRec, one candidate a row."""
    tree = {
        "data": {"source": "tallrec", "directory": str(data / "tallrec-movie")},
        "text": {"domain": "video", "max_events": 10, "max_length": 512, "vocab_size": 4000},
        "model": {
            "attention": "eager",
            "config": {**SHAPE, "num_joint_layers": JOINT, "segment_summary": 1, "embedding_dim": 128},
        },
        "task": {"learn": ["click"], "targets": 1, "group_user_rows": together},
        "evaluation": {"split": "given", "rolling": True},
        "training": training(0, output, per_device_train_batch_size=BATCH, max_steps=steps),
    }
    return prepare(load_recipe(tree))


class LlamaRows(Dataset):
    """The same ids and labels, as a sequence classifier reads them."""

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        return {"input_ids": row["input_ids"], "labels": int(row["click_labels"][0])}


class LlamaTrainer(Trainer):
    """The library's Trainer, with the order of the rows that ours has."""

    def __init__(self, order: SeededOrder, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.order = order

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> SeededOrder:
        return self.order


def make_llama(run: Run) -> LlamaForSequenceClassification:
    """Llama of the shape that our model has."""
    config, vocab = run.model.config, len(run.processor.tokenizer)
    assert config.vocab_size == vocab, "both read the same ids"
    shape = {**SHAPE, "vocab_size": vocab, "num_key_value_heads": config.num_key_value_heads}
    llama = LlamaConfig(**shape, pad_token_id=config.pad_token_id, num_labels=2, attn_implementation="sdpa")
    return LlamaForSequenceClassification(llama)


def timed_llama(run: Run, model: LlamaForSequenceClassification, rows: Dataset, order: SeededOrder) -> list[float]:
    """Train Llama under the same arguments."""
    clock, arguments = Clock(), run.recipe.training_arguments(use_cpu=on_cpu(), bf16=use_bf16())
    trainer = LlamaTrainer(
        order,
        model=model,
        args=arguments,
        train_dataset=LlamaRows(rows),
        data_collator=DataCollatorWithPadding(run.processor.tokenizer),
        callbacks=[clock],
    )
    trainer.train()
    plain_forward(model)
    return clock.times


def against_llama(data: Path, turns: int, steps: int, output: str) -> list[dict[str, Any]]:
    """Let ours and Llama take turns; one row for each number of rows together."""
    runs = {together: tallrec_run(data, steps, f"{output}/ours", together) for together in TOGETHER}
    first = runs[TOGETHER[0]]
    rows, llama = list(training_set(first, {})), make_llama(first)
    orders = {together: SeededOrder(rows, first.recipe.seed, together=together) for together in TOGETHER}
    counts = {
        together: sum(len(rows[index]["input_ids"]) for index in list(order)[BATCH : BATCH * steps])
        for together, order in orders.items()
    }
    taken: dict[tuple[str, int], list[float]] = {(who, each): [] for each in TOGETHER for who in ("m6rec", "llama")}
    for turn in range(turns):
        for together, run in runs.items():
            for who in ("m6rec", "llama"):
                times = timed(run, rows) if who == "m6rec" else timed_llama(run, llama, rows, orders[together])
                taken[who, together].append(times[-1] - times[1])
                speed = counts[together] / taken[who, together][-1]
                print(f"turn {turn + 1} of {turns}: {who:6} rows together {together} {speed:9.0f} tokens/s", flush=True)
    return [row_of(taken, counts[together], together, run) for together, run in runs.items()]


def row_of(taken: dict[tuple[str, int], list[float]], tokens: int, together: int, run: Run) -> dict[str, Any]:
    """Sum up the turns."""
    speeds = {who: [tokens / seconds for seconds in taken[who, together]] for who in ("m6rec", "llama")}
    medians = {who: statistics.median(own) for who, own in speeds.items()}
    return {
        "group_user_rows": together,
        "m6rec_tokens_per_second": medians["m6rec"],
        "llama_tokens_per_second": medians["llama"],
        "ratio": statistics.median(ours / theirs for ours, theirs in zip(speeds["m6rec"], speeds["llama"])),
        "spread": {who: [min(own), max(own)] for who, own in speeds.items()},
        "tokens_of_a_turn": tokens,
        "parameters": run.model.num_parameters(),
    }


# RecTools


def beauty_run(data: Path, task: dict[str, Any], batches: int, output: str) -> Run:
    """Our model of Amazon Beauty: texts read once by frozen layers, a memory of each item, two layers that learn."""
    config = {
        "hidden_size": WIDTH, "intermediate_size": 172, "num_hidden_layers": 2 + BLOCKS, "num_joint_layers": BLOCKS,
        "num_attention_heads": HEADS, "segment_summary": 1, "embedding_dim": WIDTH, "hidden_dropout": DROPOUT,
        "attention_dropout": DROPOUT,
    }  # fmt: skip
    own = training(0, output, per_device_train_batch_size=USERS, bf16=False, num_train_epochs=1)
    tree = {
        "data": {"source": "amazon-beauty", "directory": str(data / "amazon-beauty")},
        "text": {"max_events": EVENTS, "max_length": 2048, "vocab_size": 4000, "times": False},
        "evaluation": {"protocol": "published"},
        "model": {"attention": "eager", "freeze_segments": True, "item_embeddings": True, "config": config},
        "task": {"learn": ["retrieval"], **task},
        "training": own | ({"max_steps": batches} if batches else {}),
    }
    run = prepare(load_recipe(tree))
    run.base_model.model.freeze_segments()
    run.segment_cache, run.collator.frozen = SegmentCache(), True  # as `fit` does where no text is learnt
    return run


def against_rectools(options: argparse.Namespace, output: str) -> list[dict[str, Any]]:
    """Time an epoch of each, or `--batches` batches; one row for each loss."""
    found = []
    for task in LOSSES:
        run = beauty_run(options.data, task, options.batches, f"{output}/ours")
        rows = list(training_set(run, {}))
        whole = -(-len(rows) // USERS)
        ours = epoch(timed(run, rows), whole, len(rows))
        print(f"m6rec    {task} {ours}", flush=True)
        theirs = rectools_epoch(options, run, task, output)
        print(f"rectools {task} {theirs}", flush=True)
        found.append({**task, "m6rec": ours, "rectools": theirs, "ratio": theirs["seconds"] / ours["seconds"]})
    return found


def epoch(times: list[float], whole: int, rows: int) -> dict[str, Any]:
    """Seconds of an epoch of `whole` batches: measured, or the first batch and as many medians as it has others."""
    steps = [after - before for before, after in pairwise(times)]
    seconds = sum(steps) if len(steps) == whole else steps[0] + (whole - 1) * statistics.median(steps[1:])
    return {
        "seconds": seconds,
        "first_batch_seconds": steps[0],
        "batch_seconds": statistics.median(steps[1:]),
        "batches": whole,
        "batches_measured": len(steps),
        "rows": rows,
    }


def rectools_epoch(options: argparse.Namespace, run: Run, task: dict[str, Any], output: str) -> dict[str, Any]:
    """Hand the training part to the other environment, and read its times."""
    table = Path(output) / "train.csv"
    run.split.train[["user_id", "item_id"]].to_csv(table, index=False)
    loss = "softmax" if task["negatives"] == "catalogue" else "sampled_softmax"
    model = {
        "n_factors": WIDTH, "n_blocks": BLOCKS, "n_heads": HEADS, "session_max_len": EVENTS, "batch_size": USERS,
        "dropout_rate": DROPOUT, "loss": loss, "n_negatives": task.get("num_sampled", 1),
    }  # fmt: skip
    script = Path(__file__).with_name("_rectools_epoch.py")
    arguments = json.dumps(
        {"table": str(table), "model": model, "batches": options.batches, "threads": options.threads}
    )
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    command = [str(options.rectools_python), str(script), arguments]
    answer = subprocess.run(command, check=True, capture_output=True, text=True, cwd=output, env=environment)
    reported = json.loads(answer.stdout.splitlines()[-1])
    return {**epoch(reported["times"], reported["batches"], reported["rows"]), "version": reported["version"]}


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("M6REC_DATA", "../shared/data")))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=16, help="steps of a turn; the first is not counted")
    parser.add_argument("--rectools-python", type=Path, help="python of an environment with RecTools")
    parser.add_argument("--batches", type=int, default=0, help="batches of the epoch that are measured; 0 = all")
    parser.add_argument("--only", choices=["llama", "rectools"], help="measure one part, and keep the other's figures")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    """Measure the requested parts, then print and write the results."""
    options = parse()
    torch.set_num_threads(options.threads)
    print("time budget: 10 minutes for Llama, 5 to 10 more for RecTools, on one free core", flush=True)
    result = json.loads(options.output.read_text()) if options.output.is_file() else {}
    result = {"ratio_vs_llama": None, "ratio_vs_rectools_sasrec": None, **result}
    with tempfile.TemporaryDirectory() as output:
        if options.only != "rectools":
            rows = against_llama(options.data, options.turns, options.steps, output)
            result |= {"ratio_vs_llama": rows[0]["ratio"], "llama": {**SHAPE, "num_joint_layers": JOINT, "rows": rows}}
            result["llama"] |= {"batch": BATCH, "bf16": use_bf16(), "threads": options.threads, "turns": options.turns}
        if options.rectools_python is None:
            print("RecTools: left out; name the python of its environment with --rectools-python", flush=True)
        elif options.only != "llama":
            rows = against_rectools(options, output)
            shape = {"width": WIDTH, "layers": BLOCKS, "heads": HEADS, "events": EVENTS, "batch": USERS}
            own = {**shape, "threads": options.threads, "rows": rows}
            result |= {"ratio_vs_rectools_sasrec": rows[0]["ratio"], "rectools_sasrec": own}
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
