"""Quality of recommendations: all models of a data set on the same users, with the same code, over several seeds.

    python benchmarks/quality.py --data DIR [--dataset beauty] [--models m6rec popularity ...] [--seeds 0 1 2]
    python benchmarks/quality.py --table                                    only rewrites docs/results.md

DIR holds the data sets' folders. Every cell (a model with a seed) runs in a separate process and is kept in `--runs`,
so that an interrupted benchmark can be resumed; rows of models that were measured elsewhere are kept. Rankings are of
the whole catalogue, with and without the items that a user has met before. All settings were chosen on validation
parts (docs/experiments.md has the search); the test part is reported. Times are processor seconds of training and
measuring on one thread, with other work on the machine.

Writes benchmarks/results/quality_DATASET.json and docs/results.md; the last line printed is the same JSON.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from _recommenders import DATASETS
from _results_page import write_page

from m6rec.train.config.arguments import BASELINES
from m6rec.train.evaluation.verdicts import RULE
from m6rec.train.metrics import interval_of, ndcg_gains, resampled_means

RESULTS = Path(__file__).parent / "results"
BUDGET_MINUTES = 90
METRICS = ("recall@10", "ndcg@10", "auc", "gauc", "rmse")
GROUP_KEYS = ("model", "seen", "subset", "protocol", "observed")
"""Fields that are equal in rows of several seeds."""
CELL_ONLY = ("row", "ranks", "asked")
"""Fields only of the rows of cells, for pairing rows."""
MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 33), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}
"""glibc keeps the large buffers of a training step, which it would else ask the system for again at each."""


def cell(options: argparse.Namespace, model: str, seed: int) -> list[dict[str, Any]]:
    """Return the rows of a cell; it is run in a separate process if it has no results."""
    folder = options.runs / options.dataset / f"{model}-{seed}"
    kept = folder / "cell.json"
    if not kept.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        places = ["--data", str(options.data), "--runs", str(options.runs), "--dataset", options.dataset]
        command = [sys.executable, __file__, *places, "--cell", model, str(seed)]
        with (folder / "log").open("w") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log, env={**MEMORY, **os.environ})
    rows: list[dict[str, Any]] = json.loads(kept.read_text())
    return rows


def run_cell(options: argparse.Namespace, model: str, seed: int) -> None:
    """Run a cell in this process and save its rows."""
    import resource

    import torch

    torch.set_num_threads(options.threads)
    folder = options.runs / options.dataset / f"{model}-{seed}"
    start = time.process_time()
    rows = DATASETS[options.dataset][model](options.data, folder, seed)
    used = {"seconds": time.process_time() - start}
    used["peak_memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    rows = [{**used, **row, "model": row.get("row", model), "seed": seed} for row in rows]
    (folder / "cell.json").write_text(json.dumps(rows) + "\n")


def summed_up(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Summarise rows of single seeds: mean and standard deviation of each metric."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in cells:
        groups.setdefault(tuple(row.get(name) for name in GROUP_KEYS), []).append(row)
    found = []
    for rows in groups.values():
        first = min(rows, key=lambda row: row["seed"])
        one = {name: value for name, value in first.items() if name not in (*METRICS, "seed", "seconds", *CELL_ONLY)}
        for name in METRICS:
            values = [row[name] for row in rows if name in row]
            if values:
                one[name] = {"mean": statistics.mean(values), "std": statistics.stdev(values) if values[1:] else 0.0}
        one["seeds"] = sorted(row["seed"] for row in rows)
        one["seconds"] = statistics.mean(row["seconds"] for row in rows)
        found.append(one)
    return found


def with_differences(
    rows: list[dict[str, Any]], cells: list[dict[str, Any]], parts: tuple[str, ...] = ("all",)
) -> list[dict[str, Any]]:
    """Add to summarised rows their paired differences to the other rows of the same events, and to the rule.

    Rows of the same events are paired by seed; with several seeds, differences are averaged.

    Args:
        rows: The summed rows, which are changed.
        cells: Rows of single seeds.
        parts: Parts of the test events that are compared.
    """
    groups: dict[tuple, dict[str, list[dict[str, Any]]]] = {}
    for row in cells:
        if "ranks" in row and row["seen"] == "out" and row["subset"] in parts:
            place = tuple(row.get(name) for name in GROUP_KEYS[1:])
            groups.setdefault(place, {}).setdefault(row["model"], []).append(row)
    for row in rows:
        models = groups.get(tuple(row.get(name) for name in GROUP_KEYS[1:]), {})
        if row["model"] in models:
            row["differences"] = _paired(models[row["model"]], {**models, row["model"]: []})
            if row["model"] == RULE:
                nothing = {"value": 0.0, "interval": [0.0, 0.0]}
                row["difference"] = {"to": RULE, "recall@10": nothing, "ndcg@10": nothing}
            elif RULE in row["differences"]:
                row["difference"] = {"to": RULE, **row["differences"][RULE]}
    return rows


def _paired(own: list[dict[str, Any]], models: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Return the mean differences of rows to other models' rows of the same events, with intervals."""
    columns: dict[str, np.ndarray] = {}
    for other, theirs in models.items():
        others = {row["asked"]: row for row in theirs}
        pairs = [(row, others[row["asked"]]) for row in own if row["asked"] in others]
        if pairs and {len(row["ranks"]) for row, _ in pairs} == {len(own[0]["ranks"])}:
            columns[other] = np.mean([_gains(row) - _gains(one) for row, one in pairs], axis=0)
    if not columns:
        return {}
    drawn = np.split(resampled_means(np.hstack(list(columns.values()))), len(columns), axis=1)
    found: dict[str, dict[str, Any]] = {}
    for (other, mean), means in zip(columns.items(), drawn):
        figures = zip(("recall@10", "ndcg@10"), mean.mean(0), means.T)
        found[other] = {name: {"value": float(value), "interval": interval_of(own)} for name, value, own in figures}
    return found


def _gains(row: dict[str, Any]) -> np.ndarray:
    ranks = np.array(row["ranks"])
    return np.column_stack([ranks <= 10, ndcg_gains(ranks, 10)])


def with_unpaired(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add the difference to the rule to rows whose ranks were not kept, as if their events were others than the rule's.

    Rows of the same events vary together, so that the interval is wider than a paired one would be.
    """
    rules = {tuple(row.get(name) for name in GROUP_KEYS[1:]): row for row in rows if row["model"] == RULE}
    for row in rows:
        rule = rules.get(tuple(row.get(name) for name in GROUP_KEYS[1:]))
        if rule is None or "difference" in row or not {"interval"} <= row.keys() & rule.keys():
            continue
        row["difference"] = {"to": RULE, "paired": False}
        for name in ("recall@10", "ndcg@10"):
            halves = [(one["interval"][name][1] - one["interval"][name][0]) / 2 for one in (row, rule)]
            value, half = row[name]["mean"] - rule[name]["mean"], math.hypot(*halves)
            row["difference"][name] = {"value": value, "interval": [value - half, value + half]}
    return rows


def kept_cells(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of all cells of the data set that have been run, model by model."""
    cells = [json.loads(path.read_text()) for path in (options.runs / options.dataset).glob("*/cell.json")]
    return [row for rows in sorted(filter(None, cells), key=lambda rows: rows[0]["seed"]) for row in rows]


def with_earlier(rows: list[dict[str, Any]], place: Path, order: list[str]) -> list[dict[str, Any]]:
    """Keep the rows of the results file of models that have no cell here."""
    earlier = json.loads(place.read_text()) if place.is_file() else []
    measured = {_kind(row) for row in rows}
    rows = rows + [row for row in earlier if _kind(row) not in measured]
    return sorted(rows, key=lambda row: order.index(row["model"]) if row["model"] in order else len(order))


def _kind(row: dict[str, Any]) -> tuple:
    return tuple(row.get(name) for name in ("model", "protocol", "observed"))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("M6REC_DATA", "../shared/data")))
    parser.add_argument("--dataset", choices=list(DATASETS))
    parser.add_argument("--models", nargs="+", help="all of the data set's if none is named")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="measure nothing, write docs/results.md again")
    parser.add_argument("--cell", nargs=2, metavar=("MODEL", "SEED"), help=argparse.SUPPRESS)
    return parser.parse_args()


def run(options: argparse.Namespace) -> None:
    """Run the cells of a data set that are missing, then print and write its rows."""
    known = DATASETS[options.dataset]
    if unknown := sorted(set(options.models or ()) - set(known)):
        sys.exit(f"{options.dataset} has no model {', '.join(unknown)}; it has {', '.join(known)}")
    print(f"{options.dataset}: time budget {BUDGET_MINUTES} minutes; cells are kept in {options.runs}", flush=True)
    for seed in options.seeds:
        for model in options.models or known:
            for row in cell(options, model, seed):
                figures = "  ".join(f"{name} {row[name]:.4f}" for name in METRICS if name in row)
                names = ("protocol", "observed", "seen", "subset")
                about = " ".join(str(row[name]) for name in names if name in row)
                print(f"{options.dataset} {row['model']:16} seed {seed} {about:10} {figures}", flush=True)
    cells = kept_cells(options)
    rows = with_differences(summed_up(cells), cells, ("all", "warm", "cold") if "cold" in options.dataset else ("all",))
    place = RESULTS / f"quality_{options.dataset}.json"
    rows = with_unpaired(with_earlier(rows, place, [*known, *BASELINES]))
    place.parent.mkdir(exist_ok=True)
    place.write_text(json.dumps(rows, indent=1) + "\n")
    print(json.dumps(rows))


def main() -> None:
    """Run one data set or all of them, or write the page."""
    options = parse()
    if options.cell:
        run_cell(options, options.cell[0], int(options.cell[1]))
        return
    if not options.table:
        for dataset in [options.dataset] if options.dataset else DATASETS:
            run(argparse.Namespace(**{**vars(options), "dataset": dataset}))
    write_page(RESULTS, Path(__file__).parents[1] / "docs" / "results.md")


if __name__ == "__main__":
    main()
