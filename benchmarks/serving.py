"""What a request costs: by stage beside its bare matrix products, against another commit, and over HTTP.

    python benchmarks/serving.py m6rec-ml100k --parts stages against --against OTHER_CHECKOUT --rounds 15
    python benchmarks/serving.py m6rec-ml100k --against OTHER_CHECKOUT --items items.csv --seconds 600 --kills 100 \
        --output benchmarks/results/serving.json

Parts, all of them unless `--parts` names some:

- `stages`: processor time of a request by stage, one by one and in batches of 64.
- `against`: two processes answer the same requests alternately, round by round, so that a busy machine slows both; the
  ratio of their medians is the result.
- `wide`: an untrained model with two joint layers 384 wide over the products of `--items` (a table with `item_id` and
  `title`, such as the 12,101 products of Amazon Beauty), whose texts are cached.
- `rate`: `m6rec serve` with 100 requests a second from this process, for a tenth of `--seconds`.
- `workers`: both, 64 clients and 100 requests a second, with two workers; with `--items` also the wide model.
- `loads`: with 64 clients for `--seconds`; with 200, and with 64 that write events, for a tenth of that.
- `unbatched`, `cold`: 64 clients without batches across requests; with texts that were never read before.
- `kills`: workers, and each fourth time the whole service, are killed while events are written.
- `pairs`: pairs of an event and an answer that must contain it, with four workers; each request has a connection of its
  own, so that any worker may take it.

The file of results is written after each load and each part, and keeps what it held: parts may be run one by one.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from _request_time import BATCH, ROOT, compare, one_event_more, stages
from _service import Running, kill_under_load, load, slope

KILLS_AT_ONCE = 10
"""Kills of one store: the results are written after so many."""


class Results:
    """Figures by name, and the file that holds them.

    Args:
        path: The file; None = keep the figures here only. What it holds already is kept.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.found: dict[str, Any] = json.loads(path.read_text()) if path and path.is_file() else {}

    def put(self, **figures: Any) -> None:
        """Add or replace figures, print them, and write the file with the summary of all."""
        self.found |= figures
        self.found |= summary(self.found)
        if self.path is not None:
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(self.found, indent=1) + "\n")
            partial.replace(self.path)
        print(json.dumps(figures), flush=True)

    def put_in(self, name: str, **figures: Any) -> None:
        """Add figures to a group."""
        self.put(**{name: {**self.found.get(name, {}), **figures}})


SUMMARY = {
    "median_ms": ("against", "now", "median_ms"),
    "saturation_rps": ("loads", "64 clients", "requests_per_second"),
    "p99_ms_at_saturation": ("loads", "64 clients", "p99_ms"),
    "rss_slope_mb_per_min": ("loads", "64 clients", "rss_slope_mb_per_min"),
    "p99_ms_at_100_rps": ("loads", "100 a second, 2 workers", "p99_ms"),
    "beauty_rps": ("loads", "wide model, histories that grow, 2 workers", "requests_per_second"),
    "beauty_one_event_more_ms": ("wide", "one_event_more_ms"),
}
"""Where the figures of the summary stand in the results."""


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Summarise results; what was not measured is None."""
    figures: dict[str, Any] = {}
    for name, path in SUMMARY.items():
        own: Any = found
        for key in path:
            own = own.get(key) if isinstance(own, dict) else None
        figures[name] = own
    against = found.get("against")
    figures["single_ratio"] = round(against["then"]["median_ms"] / against["now"]["median_ms"], 2) if against else None
    figures["batch64_ratio"] = (
        round(against["now"]["batch64_rps"] / against["then"]["batch64_rps"], 2) if against else None
    )
    reports = [*found.get("loads", {}).values(), *([found["pairs"]] if "pairs" in found else [])]
    statuses = sum((Counter(own["statuses"]) for own in reports), Counter())
    kills = found.get("kills")
    wrong = sum(count for status, count in statuses.items() if status not in ("200", "429"))
    figures["errors"] = wrong + (kills["errors"] if kills else 0) if reports else None
    figures["stale"] = sum(own["stale"] for own in reports) if reports else None
    figures["lost"] = kills["lost"] + kills["torn"] if kills else None
    return figures


# ---------------------------------------------------------------------------------------------------------------- loads


def wide_model(folder: Path, items: Path) -> Path:
    """Make an untrained model of the shape of the recipe `beauty`, with a catalogue, unless the folder has one.

    Its one segment layer stands for MiniLM's six: texts are cached, so that their cost does not count. Histories of up
    to 60 events are read; of longer ones the oldest ten are dropped at a time, so that the kept states stay valid.
    """
    import pandas
    import torch

    from m6rec import (
        Catalogue,
        M6RecConfig,
        M6RecForRecommendation,
        M6RecProcessor,
        M6RecTokenizer,
        RecommendationPipeline,
    )

    if (folder / "config.json").is_file():
        return folder
    table = pandas.read_csv(items, dtype=str).dropna(subset=["title"])
    rows = table[["item_id", "title"]].to_dict("records")
    tokenizer = M6RecTokenizer.train(table["title"], vocab_size=8000)
    places = {row["item_id"]: place for place, row in enumerate(rows, 1)}
    limits: dict[str, Any] = {"max_length": 4800, "max_events": 60, "truncation_stride": 10}
    own = M6RecProcessor.from_template(tokenizer, item_rows=places, **limits)
    torch.manual_seed(0)
    size: dict[str, Any] = {"hidden_size": 384, "embedding_size": 384, "intermediate_size": 1536}
    size |= {"num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 32}
    size |= {"num_hidden_layers": 3, "num_hidden_groups": 3, "num_joint_layers": 2}
    size |= {"max_position_embeddings": 4864, "attn_implementation": "eager"}
    config = M6RecConfig(
        **{**size, "gated_mlp": False, "segment_pooling": "mean", "segment_summary": 1, "skipped_kinds": ["event"]},
        **{"bow_embeddings": True, "tfidf_weight": 0.6, "embedding_dim": 128, "num_item_embeddings": len(rows)},
        **tokenizer.structural_ids,
    )
    model = M6RecForRecommendation(config).eval()
    model.model.word_sketch.fit(own.encode_items(rows))
    catalogue = Catalogue.from_dataset(rows, model, own)
    RecommendationPipeline(model=model, processor=own, device="cpu", catalogue=catalogue).save_pretrained(folder)
    return folder


def under_load(
    results: Results, model: Any, loads: dict[str, dict[str, Any]], options: tuple[str, ...] = (), workers: int = 1
) -> None:
    """Start a service and put loads on it one after the other; keep their reports, with memory and load average."""
    with (
        tempfile.TemporaryDirectory() as folder,
        Running(model, f"{folder}/events.sqlite", workers, options) as service,
    ):
        service.wait()
        for name, given in loads.items():
            samples: list[tuple[float, float]] = []
            done, begin = threading.Event(), time.monotonic()

            def watch(samples: Any = samples, done: Any = done, begin: float = begin) -> None:
                while not done.wait(1):
                    samples.append(((time.monotonic() - begin) / 60, service.megabytes()))

            watching = threading.Thread(target=watch)
            watching.start()
            try:
                report = load(service, **given)
            finally:
                done.set()
                watching.join()
            report |= {"seconds": given["seconds"], "load_average": round(os.getloadavg()[0], 1)}
            report |= {"rss_mb": round(samples[-1][1]), "rss_slope_mb_per_min": slope(samples)} if samples else {}
            results.put_in("loads", **{name: report})
        service.stop()


# ---------------------------------------------------------------------------------------------------------------- parts


def measure_stages(results: Results, given: argparse.Namespace) -> None:
    """Measure a request by stage."""
    results.put(stages_ms={str(size): stages(given.model, size) for size in (1, BATCH)})


def measure_against(results: Results, given: argparse.Namespace) -> None:
    """Measure this checkout and another one alternately."""
    now, then = compare(given.model, [ROOT, given.against], given.rounds)
    results.put(against={"rounds": given.rounds, "now": now, "then": then})


def measure_wide(results: Results, given: argparse.Namespace) -> None:
    """Measure the wide model in the process and under load."""
    folder = wide_model(given.wide, given.items)
    results.put(wide=one_event_more(str(folder)))
    growing = {"clients": 64, "seconds": given.seconds / 10, "events": 50, "growth": 10}
    under_load(results, folder, {"wide model, histories that grow": growing})


def measure_rate(results: Results, given: argparse.Namespace) -> None:
    """Measure a fixed rate."""
    under_load(results, given.model, {"100 a second": {"clients": 16, "seconds": given.seconds / 10, "rate": 100}})


def measure_workers(results: Results, given: argparse.Namespace) -> None:
    """Measure with two workers, which share the store."""
    seconds = given.seconds / 10
    loads: dict[str, dict[str, Any]] = {
        "64 clients, 2 workers": {"clients": 64, "seconds": seconds},
        "100 a second, 2 workers": {"clients": 16, "seconds": seconds, "rate": 100},
    }
    under_load(results, given.model, loads, workers=2)
    if given.items:
        growing = {"clients": 64, "seconds": seconds, "events": 50, "growth": 10}
        folder = wide_model(given.wide, given.items)
        under_load(results, folder, {"wide model, histories that grow, 2 workers": growing}, workers=2)


def measure_loads(results: Results, given: argparse.Namespace) -> None:
    """Measure saturation, answers after events, and overload."""
    tenth = given.seconds / 10
    loads: dict[str, dict[str, Any]] = {
        "64 clients": {"clients": 64, "seconds": given.seconds},
        "64 clients, event then answer": {"clients": 64, "seconds": tenth, "token": "secret"},
        "200 clients": {"clients": 200, "seconds": tenth},
    }
    under_load(results, given.model, loads)


def measure_unbatched(results: Results, given: argparse.Namespace) -> None:
    """Measure without batches across requests."""
    alone = {"64 clients, without batches": {"clients": 64, "seconds": given.seconds / 10}}
    under_load(results, given.model, alone, ("--batch-size", "1"))


def measure_cold(results: Results, given: argparse.Namespace) -> None:
    """Measure with histories of texts that were never read before."""
    cold = {"64 clients, unread texts": {"clients": 64, "seconds": given.seconds / 10, "unread": True}}
    under_load(results, given.model, cold)


def measure_kills(results: Results, given: argparse.Namespace) -> None:
    """Kill workers and services, some kills to a store."""
    total: Counter[str] = Counter()
    while total["kills"] < given.kills:
        count = min(KILLS_AT_ONCE, given.kills - total["kills"])
        with tempfile.TemporaryDirectory() as store:
            found = kill_under_load(given.model, f"{store}/events.sqlite", count, seed=total["kills"])
        total.update({"kills": count, **found})
        results.put(kills=dict(total))


def measure_pairs(results: Results, given: argparse.Namespace) -> None:
    """Count the answers of four workers that lack the event before them."""
    with tempfile.TemporaryDirectory() as store, Running(given.model, f"{store}/events.sqlite", 4) as service:
        service.wait()
        before = [sum(worker.cpu_times()[:2]) for worker in service.children()]
        report = load(service, 16, float("inf"), token="secret", events=3, pairs=given.pairs, reconnect=True)
        seconds = [round(sum(own.cpu_times()[:2]) - was, 1) for own, was in zip(service.children(), before)]
        service.stop()
    results.put(pairs={"workers": 4, "pairs": given.pairs, "processor_seconds": seconds, **report})


PARTS = {
    "stages": measure_stages,
    "against": measure_against,
    "wide": measure_wide,
    "rate": measure_rate,
    "workers": measure_workers,
    "loads": measure_loads,
    "unbatched": measure_unbatched,
    "cold": measure_cold,
    "kills": measure_kills,
    "pairs": measure_pairs,
}
"""Parts in the order in which they are run."""


def main() -> None:
    """Read the arguments, measure, print, and write the results."""
    parser = argparse.ArgumentParser(description="What a request costs.")
    parser.add_argument("model", help="the folder of a model, such as m6rec-ml100k of `make quickstart`")
    parser.add_argument("--parts", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="another checkout of this repository")
    parser.add_argument("--rounds", type=int, default=15, help="of the part `against`")
    parser.add_argument("--seconds", type=float, default=600.0, help="of the longest load; others last a tenth")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--items", type=Path, help="table of the wide model's products")
    parser.add_argument("--wide", type=Path, default=Path("runs/wide"), help="folder of the wide model, made if absent")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    needs = {"against": given.against, "wide": given.items}
    parts = given.parts or [name for name in PARTS if needs.get(name, True)]
    for name in parts:
        if needs.get(name, True) is None:
            parser.error(f"the part {name} needs --{'items' if name == 'wide' else name}")
    results = Results(given.output)
    # An end by a time limit says so, and ends the services that were started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(f"ended by SIGTERM; {given.output} holds what was measured"))
    for name in parts:
        before = round(os.getloadavg()[0], 1)
        PARTS[name](results, given)
        results.put_in("load_average", **{name: [before, round(os.getloadavg()[0], 1)]})


if __name__ == "__main__":
    main()
