"""Re-ranking: accuracy against the spread of exposure, for several weights of `rerank`.

    python benchmarks/exposure.py MODEL [--fields popularity genres] [--weights 0 0.02 0.05 0.1 0.2 0.4]

MODEL is the folder of a run that learnt retrieval, such as `m6rec-ml100k` of `make quickstart`; nothing is trained.
Each user's last event is ranked in the whole catalogue, seen items left out, the first `pool` (200) items reordered.
Gini, coverage and the share of the most popular fifth are those of the first 10 items (1 / log2(rank + 1) a row; items
that are never recommended count with 0). Differences of NDCG@10 to weight 0 have paired 95% intervals over users. The
untrained rules stand beside the model, not re-ranked. The last line printed is the JSON in
benchmarks/results/exposure.json.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from m6rec.ranking_m6rec import Reranker
from m6rec.train.config.recipe import load_saved
from m6rec.train.evaluation.fairness import Fields, fairness_report
from m6rec.train.evaluation.reports import RankingExamples, rank_catalogue
from m6rec.train.evaluation.untrained import Learnt, Untrained, plain
from m6rec.train.metrics import interval_of, ndcg_gains, resampled_means, top_items
from m6rec.train.runs.build import prepare
from m6rec.train.runs.finetune import examples_of
from m6rec.train.runs.run import Run

K = 10
RESULTS = Path(__file__).parent / "results" / "exposure.json"


def exposed(run: Run, field: str, counts: np.ndarray) -> list[Any]:
    """The re-ranker's value of each item of the catalogue."""
    if field == "popularity":
        return (np.log1p(counts) / np.log1p(counts.max())).tolist()
    return [item.get(field) for item in run.writer.items]


def lists_of(scores: np.ndarray, examples: RankingExamples, rerank: Reranker, values: list[Any]) -> list[np.ndarray]:
    """Each user's first K items in the order of the re-ranker."""
    found = []
    for user, items in enumerate(top_items(scores, rerank.pool, examples.histories)):
        own = [values[item] for item in items]
        order = rerank.order(scores[user, items].tolist(), own, K)
        found.append(items[[place for place, _ in order]])
    return found


def row_of(lists: list[np.ndarray], examples: RankingExamples, counts: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
    """Figures of lists, and the NDCG of each user."""
    ranks = np.full(len(lists), np.inf)
    for user, (items, target) in enumerate(zip(lists, examples.targets)):
        if (place := np.flatnonzero(items == target)).size:
            ranks[user] = place[0] + 1
    gains = {f"recall@{K}": (ranks <= K).astype(float), f"ndcg@{K}": ndcg_gains(ranks, K)}
    report = fairness_report(lists, gains, examples.users, Fields({}, {}), counts, 0)
    figures = {name: float(own.mean()) for name, own in gains.items()}
    first = report["exposure"]["popularity"]["fifth 1"]["share"]
    return {**figures, "gini": report["gini"], "coverage": report["coverage"], "first_fifth": first}, gains[f"ndcg@{K}"]


def main() -> None:
    """Rank once, re-rank for each field and weight."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=Path("m6rec-ml100k"))
    parser.add_argument("--fields", nargs="+", default=["popularity", "genres"])
    parser.add_argument("--weights", nargs="+", type=float, default=[0.0, 0.02, 0.05, 0.1, 0.2, 0.4])
    parser.add_argument(
        "--overrides", nargs="*", default=[], help="what differs from the run's recipe, such as data.path"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    own = [f"model.checkpoint={json.dumps(str(options.model))}", "model.backbone=null"]
    run = prepare(load_saved(options.model, [*options.overrides, *own]))
    evaluation = run.recipe.evaluation
    examples = examples_of(run, "test", "retrieval")
    counts = Learnt(run.writer, run.split, "test", evaluation).counts
    everyone = slice(0, len(examples.users))
    scores = rank_catalogue(run.model, examples, run.catalogue, run.collator, False)[everyone]
    rows = []
    rules = Untrained(run.writer, run.texts, run.split, plain(evaluation), run.recipe.seed).scores(examples, "test")
    for name, rule in rules.items():
        rows.append({"model": name, **row_of(top_items(rule[everyone], K, examples.histories), examples, counts)[0]})
    for field in options.fields:
        values = exposed(run, field, counts)
        before = row_of(top_items(scores, K, examples.histories), examples, counts)[1]
        for weight in options.weights:
            lists = lists_of(scores, examples, Reranker(field, weight), values)
            figures, gains = row_of(lists, examples, counts)
            drawn = resampled_means((gains - before)[:, None], examples.users)
            difference = {"value": float((gains - before).mean()), "interval": interval_of(drawn[:, 0])}
            rows.append({"model": "m6rec", "field": field, "weight": weight, **figures, "difference": difference})
            print(rows[-1], flush=True)
    result = {"model": options.model.name, "users": len(examples.users), "items": len(counts), "k": K, "rows": rows}
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
