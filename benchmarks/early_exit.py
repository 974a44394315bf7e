"""Early exit: AUC and seconds after each joint layer, and with exit by confidence.

    python benchmarks/early_exit.py [--quality DIR] [--rows 640] [--candidates 1500] [--rate 1e-4] [--seed 0]

One model of the clicks in `_quality.py`: MiniLM, its last 3 layers joint, each trained to score (`exit_layers`), one
state a text. `exit_layer` skips the layers after it; `exit_confidence` skips them if all candidates of a
request have that confidence; here a request has one. Seconds are processor time for 100 requests with all texts cached,
medians of five, the ways in turn. DIR holds `ml-100k`. The last line printed is the JSON in
benchmarks/results/early_exit.json.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import _quality
import numpy as np
import torch

from m6rec import SegmentCache
from m6rec.ranking_m6rec import EncodedRequest, Scorer, Tokens
from m6rec.train.config.recipe import load_recipe
from m6rec.train.metrics import auc
from m6rec.train.runs.build import prepare
from m6rec.train.runs.finetune import examples_of, fit

FIELDS = {**_quality.LATE, "segment_summary": 1, "exit_layers": [1, 2]}
CONFIDENCES = (0.55, 0.6, 0.65, 0.7, 0.8)
ROUNDS = 5
Way = tuple[dict[str, Any], Callable[[], tuple[np.ndarray, float]]]
"""What a row says of itself, and what scores all candidates: probabilities, and the joint layers that were run."""
RESULTS = Path(__file__).parent / "results" / "early_exit.json"


def requests(rows: list[dict[str, Any]], bos: int, confidence: float | None) -> list[EncodedRequest]:
    """Rows of the evaluation as the scorer takes them."""
    found = []
    for row in rows:
        ids, memory = row["input_ids"], row.get("item_embedding_ids") or [0] * len(row["input_ids"])
        starts = [index for index, token in enumerate(ids) if token == bos]
        source, *targets = (Tokens(ids[a:b], memory[a:b]) for a, b in pairwise([0, *starts, len(ids)]))
        found.append(EncodedRequest(source, targets, [], confidence))
    return found


def measured(ways: list[Way], labels: np.ndarray) -> list[dict[str, Any]]:
    """AUC of each way, and the median seconds for 100 candidates."""
    rows: list[dict[str, Any]] = [{} for _ in ways]
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(ROUNDS):
        for (way, score), row, own in zip(ways, rows, times):
            start = time.process_time()
            scores, layers = score()
            own.append((time.process_time() - start) * 100 / len(labels))
            row.update(way, auc=float(auc(scores, labels)), mean_layers=layers, seconds_per_100=statistics.median(own))
    return rows


def main() -> None:
    """Train, then score every way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quality", type=Path, default=os.environ.get("M6REC_DATA", "../shared/data"), metavar="DIR")
    parser.add_argument("--rows", type=int, default=640)
    parser.add_argument("--candidates", type=int, default=1500)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs/early_exit"))
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    print("time budget: 5 minutes", flush=True)
    torch.set_num_threads(options.threads)
    run = prepare(load_recipe(_quality.recipe_of(options, FIELDS, options.seed, options.runs)))
    bos = run.model.config.bos_token_id
    examples = _quality.cut(examples_of(run, "test", "click"), options.candidates, bos)
    fit(run)
    model, cache = run.base_model.eval(), SegmentCache()
    labels = np.asarray(examples.labels)

    def scorer(encoded: list[EncodedRequest], exit_layer: int | None) -> tuple[np.ndarray, float]:
        with torch.inference_mode():
            found = Scorer(model, run.processor, cache, exit_layer=exit_layer).scores(encoded, "click")
        weights = [len(each.targets) for each in encoded]
        layers = [each.exit_layer or exit_layer or FIELDS["num_joint_layers"] for each in encoded]
        return torch.cat(found)[:, 0].double().numpy(), float(np.average(layers, weights=weights))

    plain = requests(examples.rows, bos, None)
    scorer(plain, None)  # reads the texts
    ways: list[Way] = [({"exit_layer": layer}, partial(scorer, plain, layer)) for layer in (1, 2, 3)]
    for confidence in CONFIDENCES:
        ways.append(({"exit_confidence": confidence}, partial(scorer, requests(examples.rows, bos, confidence), None)))
    rows = measured(ways, labels)
    result = {name: getattr(options, name) for name in ("rate", "seed", "threads")}
    result |= {"training_rows": options.rows, "examples": len(labels), "requests": len(plain), "rows": rows}
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    for row in rows:
        print(row)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
