"""Does a recommender that learns cosmetics forget films? Film clicks (TALLRec) before and after Beauty's.

    python benchmarks/continual.py --data DIR [--seeds 0 1 2]

From the base of `benchmarks/tuning.py` (run that first), film clicks are learnt by every weight, then clicks on Amazon
Beauty: `full` goes on with every weight, `replay` mixes a share of the film rows in, `adapter` leaves the film model as
it is and trains an adapter beside it (films are asked without it, cosmetics with it), `adapter+replay` asks both with
the adapter. Beauty's clicks are purchases beside products drawn at random. Cells are kept in `--runs`. Writes
`benchmarks/results/continual.json`; the last line printed is the same JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tuning import EPOCHS, METHODS, common

RESULTS = Path(__file__).parent / "results" / "continual.json"
BUDGET_MINUTES = 60
REPLAY_SHARE = 0.3
RATES = {"full": 1e-4, "adapter": 1e-3}
"""Learning rates on Beauty, guesses."""
ARMS: dict[str, dict[str, Any]] = {
    "full": {"method": "full", "replay": False},
    "replay": {"method": "full", "replay": True},
    "adapter": {"method": "adapter", "replay": False},
    "adapter+replay": {"method": "adapter", "replay": True},
}


def film_recipe(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Film clicks, learnt by every weight."""
    folder = options.runs / f"films-{seed}" / "model"
    tree = common(options.data, seed, folder, num_train_epochs=EPOCHS, learning_rate=METHODS["full"]["learning_rate"])
    return {**tree, "model": {"checkpoint": str(options.base), "attention": "eager"}}


def beauty_recipe(options: argparse.Namespace, arm: str, seed: int, films: Path) -> dict[str, Any]:
    """Beauty's clicks after it."""
    method, replay = ARMS[arm]["method"], ARMS[arm]["replay"]
    tree = film_recipe(options, seed)
    tree["data"] = {"source": "amazon-beauty", "directory": str(options.data / "amazon-beauty")}
    tree["text"] = {"domain": "ecommerce", "max_events": 5, "max_length": 512}
    tree["model"] = {"checkpoint": str(films), "attention": "eager"}
    tree["task"] = {"learn": ["click"], "targets": 2, "negatives_per_event": 1}
    tree["task"] |= {"replay": [str(films)], "replay_share": REPLAY_SHARE} if replay else {}
    tree["tuning"] = {"method": method}
    tree["evaluation"] = {"split": "leave-one-out", "max_users": 500}
    output = options.runs / f"{arm}-{seed}" / "model"
    rate = RATES[method]
    tree["training"] |= {"output_dir": str(output), "max_steps": options.steps, "learning_rate": rate}
    tree["training"]["per_device_train_batch_size"] = 32
    return tree


def film_auc(model: Any, films: Path) -> float:
    """Measure a model on the test rows of the films, worded as the film model was taught."""
    from m6rec.train.build import prepare
    from m6rec.train.finetune import examples_of, measure
    from m6rec.train.recipe import load_recipe

    run = prepare(load_recipe(films, [f"model.checkpoint={json.dumps(str(films))}"]))
    if model is not None:
        run.model = model
    return measure(run, examples_of(run, "test", "click"), "click")["auc"]


def run_cell(options: argparse.Namespace, arm: str, seed: int) -> dict[str, Any]:
    """Learn films, or cosmetics after them, and measure."""
    from m6rec.train.build import prepare, save
    from m6rec.train.finetune import fit, full_report
    from m6rec.train.recipe import load_recipe

    films = options.runs / f"films-{seed}" / "model"
    tree = film_recipe(options, seed) if arm == "films" else beauty_recipe(options, arm, seed, films)
    run = prepare(load_recipe(tree))
    start = time.process_time()  # of the processor: others may share the machine
    fit(run)
    seconds = time.process_time() - start
    save(run)
    own = full_report(run)["click"]["m6rec"]["auc"]
    if arm == "films":
        return {"arm": arm, "seed": seed, "films": own, "seconds": seconds}
    found = {"arm": arm, "seed": seed, "beauty": own, "seconds": seconds}
    if arm == "adapter":  # films are asked of the film model, which the adapter has left alone
        with run.model.disable_adapter():
            return {**found, "films": film_auc(run.model, films)}
    return {**found, "films": film_auc(run.model, films)}


def cell(options: argparse.Namespace, arm: str, seed: int) -> dict[str, Any]:
    """Return a cell, run in a process of its own unless it has been."""
    folder = options.runs / f"{arm}-{seed}"
    kept = folder / "cell.json"
    if not kept.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        places = ["--data", str(options.data), "--runs", str(options.runs), "--base", str(options.base)]
        arguments = [*places, "--steps", str(options.steps), "--cell", arm, str(seed)]
        with (folder / "log").open("w") as log:
            subprocess.run([sys.executable, __file__, *arguments], check=True, stdout=log, stderr=log)
    return json.loads(kept.read_text())


def table(runs: Path) -> list[dict[str, Any]]:
    """Sum up all cells that have been run, each arm over its seeds."""
    cells = [json.loads(kept.read_text()) for kept in sorted(runs.glob("*/cell.json"))]
    before = {found["seed"]: found["films"] for found in cells if found["arm"] == "films"}
    rows = []
    for arm in ARMS:
        own = [found for found in cells if found["arm"] == arm]
        lost = {found["seed"]: before[found["seed"]] - found["films"] for found in own}
        if own:
            beauty = statistics.mean(found["beauty"] for found in own)
            mean = statistics.mean(lost.values())
            rows.append({"arm": arm, "film_auc_lost_mean": mean, "film_auc_lost": lost, "beauty_auc_mean": beauty})
    return rows


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("M6REC_DATA", "../shared/data")))
    parser.add_argument("--base", type=Path, default=Path("runs/tuning/base"))
    parser.add_argument("--runs", type=Path, default=Path("runs/continual"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps on Beauty")
    parser.add_argument("--cell", nargs=2, metavar=("ARM", "SEED"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run what is missing, then print and write the table."""
    options = parse()
    if options.cell:
        arm, seed = options.cell[0], int(options.cell[1])
        found = run_cell(options, arm, seed)
        (options.runs / f"{arm}-{seed}" / "cell.json").write_text(json.dumps(found, indent=2) + "\n")
        return
    print(f"time budget: {BUDGET_MINUTES} minutes on 2 cores; cells are kept in {options.runs}", flush=True)
    for seed in options.seeds:
        before = cell(options, "films", seed)["films"]
        for arm in options.arms:
            found = cell(options, arm, seed)
            print(f"seed {seed} {arm:15} films {before:.4f} -> {found['films']:.4f}", flush=True)
    rows = table(options.runs)
    result = {"replay_share": REPLAY_SHARE, "steps": options.steps, "rows": rows}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
