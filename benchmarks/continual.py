"""Does a recommender that learns cosmetics forget films? Film clicks (TALLRec) before and after Beauty's.

    python benchmarks/continual.py --data DIR [--seeds 0 1 2]

A small new model learns film clicks with all weights, then clicks on Amazon Beauty: `full` continues with all weights,
`replay` mixes in a share of the film rows, `adapter` freezes the film model and trains an adapter (LoRA; films are
measured without it, cosmetics with it), `adapter+replay` measures both with the adapter. Beauty's clicks are purchases
and randomly drawn products; to fit the budget it is reduced to its most bought products, some users and the first words
of titles. Untrained rules, similarity of titles and popularity, are measured on the same examples.
Cells are kept in `--runs`. Writes `benchmarks/results/continual.json`; the last line printed is the same JSON.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from tuning import common

RESULTS = Path(__file__).parent / "results" / "continual.json"
BUDGET_MINUTES = 30
PRODUCTS, USERS, WORDS = 3000, 4000, 8
"""Of Beauty: the most bought products, users with five purchases of them or more, first words of a title."""
REPLAY_SHARE = 0.3
FILM_EPOCHS, FILM_RATE = 2, 1e-3
MODEL = {
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_joint_layers": 2,
    "segment_pooling": "mean",
    "segment_summary": 1,
    "embedding_dim": 128,
    "hidden_dropout": 0.1,
}
ARMS: dict[str, dict[str, Any]] = {
    "full": {"method": "full", "replay": False},
    "replay": {"method": "full", "replay": True},
    "adapter": {"method": "lora", "replay": False},
    "adapter+replay": {"method": "lora", "replay": True},
}
RATES = {"full": 1e-3, "lora": 5e-3}
"""Learning rates on Beauty: a guess, and what was tried on validation with seed 0."""
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SETTINGS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"r": 32, "lora_alpha": 64, "target_modules": [*LAYERS, "tokens"]},
}
"""Rank 32, a quarter of the width, and the embeddings too: cosmetics have words that films never had."""


def beauty_data(options: argparse.Namespace) -> dict[str, Any]:
    """Write Beauty's cut tables, unless they are there, and name them as a recipe does."""
    from m6rec.train.data.beauty import beauty_tables

    folder = options.runs / "beauty"
    if not (folder / "items.csv").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        events, items, _ = beauty_tables(options.data / "amazon-beauty")
        events = events[["user_id", "item_id", "event"]]  # in the published order, without times
        bought = events["item_id"].value_counts().index[:PRODUCTS]
        events = events[events["item_id"].isin(bought)]
        events = events[events.groupby("user_id")["item_id"].transform("size") >= 5]
        events = events[events["user_id"].isin(events["user_id"].unique()[:USERS])]
        items = items[items["item_id"].isin(bought)]
        items = items.assign(title=items["title"].str.split().str[:WORDS].str.join(" "))
        events.to_csv(folder / "events.csv", index=False)
        items.to_csv(folder / "items.csv", index=False)
    return {"source": "tables", "interactions": str(folder / "events.csv"), "items": str(folder / "items.csv")}


def film_run(options: argparse.Namespace, seed: int) -> Any:
    """Prepare film clicks, learnt by every weight; the tokenizer knows the words of both."""
    from m6rec.train.config.recipe import load_recipe
    from m6rec.train.data.log import DataArguments, read_log
    from m6rec.train.runs.build import item_texts, prepare

    folder = options.runs / f"films-{seed}" / "model"
    tree = common(options.data, seed, folder, num_train_epochs=FILM_EPOCHS, learning_rate=FILM_RATE)
    tree["text"]["vocab_size"] = 6000
    tree["model"] = {"preset": "tiny", "attention": "eager", "config": MODEL}
    recipe = load_recipe(tree)
    log, beauty = read_log(recipe.data), read_log(DataArguments(**beauty_data(options)))
    return prepare(recipe, log, texts=[*item_texts(log), *item_texts(beauty)])


def beauty_run(options: argparse.Namespace, arm: str, seed: int) -> Any:
    """Prepare Beauty's clicks after films."""
    from m6rec.train.config.recipe import load_recipe
    from m6rec.train.runs.build import prepare

    films, method = options.runs / f"films-{seed}" / "model", ARMS[arm]["method"]
    output = options.runs / f"{arm}-{seed}" / "model"
    tree = common(options.data, seed, output, max_steps=options.steps, learning_rate=RATES[method])
    tree["data"] = beauty_data(options)
    tree["text"] = {"domain": "ecommerce", "max_events": 5, "max_length": 512}
    tree["model"] = {"checkpoint": str(films), "attention": "eager"}
    tree["task"] = {"learn": ["click"], "targets": 2, "negatives_per_event": 1, "group_user_rows": 4}
    tree["task"] |= {"replay": [str(films)], "replay_share": REPLAY_SHARE} if ARMS[arm]["replay"] else {}
    tree["tuning"] = {"method": method, "settings": SETTINGS[method]}
    tree["evaluation"] = {"split": "leave-one-out", "max_users": 1000}
    return prepare(load_recipe(tree))


def film_auc(model: Any, films: Path) -> float:
    """Measure a model on the test rows of the films, formatted as in the training of the film model."""
    from m6rec.train.config.recipe import load_recipe
    from m6rec.train.runs.build import prepare
    from m6rec.train.runs.finetune import examples_of, measure

    run = prepare(load_recipe(films, [f"model.checkpoint={json.dumps(str(films))}"]))
    run.model = model
    return measure(run, examples_of(run, "test", "click"), "click")["auc"]


def without_learning(run: Any) -> dict[str, float]:
    """Measure untrained rules on Beauty's test clicks: AUC of title similarity, of popularity, and of both."""
    from m6rec.train.evaluation.baselines import SimilarText
    from m6rec.train.evaluation.reports import all_events, eval_queries
    from m6rec.train.metrics import auc
    from m6rec.train.runs.finetune import examples_of

    examples, events = examples_of(run, "test", "click"), all_events(run.split)
    arguments = (run.processor.max_events, run.recipe.evaluation, run.recipe.seed)
    questions = eval_queries(run.split, "test", np.ones(len(events), dtype=bool), *arguments)
    rows = np.array([run.writer.rows[item_id] for item_id in events["item_id"]])
    similar = SimilarText(run.texts).scores([rows[question.history] for question in questions])
    place = {question.user_id: number for number, question in enumerate(questions)}
    items = np.array([run.writer.rows[item_id] for item_id in examples.item_ids])
    scores = {
        "similar_title": similar[[place[user] for user in examples.user_ids], items],
        "popularity": run.catalogue.counts[items].astype(float),
    }
    scores["both"] = sum(np.argsort(np.argsort(own)) for own in scores.values()).astype(float)
    return {name: auc(own, examples.labels) for name, own in scores.items()}


def run_cell(options: argparse.Namespace, arm: str, seed: int) -> dict[str, Any]:
    """Learn films, or cosmetics after them, and measure."""
    from m6rec.train.runs.build import save
    from m6rec.train.runs.finetune import examples_of, fit, measure

    run = film_run(options, seed) if arm == "films" else beauty_run(options, arm, seed)
    start = time.process_time()  # of the processor: others may share the machine
    fit(run)
    seconds = time.process_time() - start
    own = {part: measure(run, examples_of(run, part, "click"), "click")["auc"] for part in ("valid", "test")}
    if arm == "films":
        save(run)
        return {"arm": arm, "seed": seed, "films": own["test"], "valid": own["valid"], "seconds": seconds}
    films = options.runs / f"films-{seed}" / "model"
    found = {"arm": arm, "seed": seed, "beauty": own["test"], "valid": own["valid"], "seconds": seconds}
    found["without_learning"] = without_learning(run)
    if arm == "adapter":  # films are measured without the adapter, on the unchanged film model
        with run.model.disable_adapter():
            return {**found, "films": film_auc(run.model, films)}
    return {**found, "films": film_auc(run.model, films)}


def cell(options: argparse.Namespace, arm: str, seed: int) -> dict[str, Any]:
    """Return a cell; it is run if it has no results."""
    kept = options.runs / f"{arm}-{seed}" / "cell.json"
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        found = run_cell(options, arm, seed)
        kept.write_text(json.dumps(found, indent=2) + "\n")
    return json.loads(kept.read_text())


def table(runs: Path) -> list[dict[str, Any]]:
    """Summarise all cells with results, each arm over its seeds."""
    cells = [json.loads(kept.read_text()) for kept in sorted(runs.glob("*/cell.json"))]
    before = {found["seed"]: found["films"] for found in cells if found["arm"] == "films"}
    rows = []
    for arm in ARMS:
        own = [found for found in cells if found["arm"] == arm]
        lost = {found["seed"]: before[found["seed"]] - found["films"] for found in own}
        if own:
            rows.append(
                {
                    "arm": arm,
                    "film_auc_lost_mean": statistics.mean(lost.values()),
                    "film_auc_lost": lost,
                    "beauty_auc_mean": statistics.mean(found["beauty"] for found in own),
                    "seconds": statistics.median(found["seconds"] for found in own),
                }
            )
    return rows


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("M6REC_DATA", "../shared/data")))
    parser.add_argument("--runs", type=Path, default=Path("runs/continual"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps on Beauty")
    return parser.parse_args()


def main() -> None:
    """Run what is missing, then print and write the table."""
    options = parse()
    print(f"time budget: {BUDGET_MINUTES} minutes of one core; cells are kept in {options.runs}", flush=True)
    beauty: dict[str, float] = {}
    for seed in options.seeds:
        before = cell(options, "films", seed)["films"]
        for arm in options.arms:
            found = cell(options, arm, seed)
            beauty = beauty or found["without_learning"]
            figures = f"films {before:.4f} -> {found['films']:.4f}, Beauty {found['beauty']:.4f}"
            print(f"seed {seed} {arm:15} {figures}", flush=True)
    films = {path.parent.name: json.loads(path.read_text())["films"] for path in options.runs.glob("films-*/cell.json")}
    result = {
        "replay_share": REPLAY_SHARE,
        "steps": options.steps,
        "film_auc_before": films,
        "beauty_without_learning": beauty,
        "rows": table(options.runs),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
