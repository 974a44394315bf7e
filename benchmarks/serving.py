"""What a request costs: by stage beside its bare matrix products, against another commit, and over HTTP.

    python benchmarks/serving.py m6rec-ml100k --stages
    python benchmarks/serving.py m6rec-ml100k --against OTHER_CHECKOUT --rounds 15
    python benchmarks/serving.py m6rec-ml100k --all --against OTHER_CHECKOUT --items items.csv --seconds 60 --kills 20 \
        --output benchmarks/results/serving.json

One thread; requests have 20 events of items that are given by their ids, and all texts are encoded before. With
`--against`, two processes answer the same requests alternately, round by round, so that a busy machine slows both: the
ratio of their medians is the result. `--all` also starts `m6rec serve`, puts load on it from this process for
`--seconds` each, kills it, and writes the file of results; with `--items` (a table with `item_id` and `title`, such as
the 12,101 products of Amazon Beauty) also on an untrained model with two joint layers 384 wide, whose texts are cached.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EVENTS = 20
BATCH = 64
ONE_BY_ONE = 40
"""Requests of a round that are answered one by one."""


def load(model: str) -> tuple[Any, list[dict[str, Any]]]:
    """Load a model with warm texts, and make requests."""
    import torch

    from m6rec.train.answering.loading import load_pipeline

    torch.set_num_threads(1)
    recommend = load_pipeline(model)
    ids = list(recommend.catalogue.snapshot())
    recommend.warm(progress=False)

    def history(number: int) -> list[dict[str, Any]]:
        items = [ids[(7 * number + 13 * place) % len(ids)] for place in range(EVENTS)]
        return [
            {"event": "rate", "rating": 1 + (number + place) % 5, "item": {"item_id": item}}
            for place, item in enumerate(items)
        ]

    user = {"gender": "female", "occupation": "engineer"}
    requests = [{"user": {"age": 20 + number % 40, **user}, "history": history(number)} for number in range(2 * BATCH)]
    recommend(requests, batch_size=BATCH)
    return recommend, requests


# --------------------------------------------------------------------------------------------------- one request's time


def answer_rounds(model: str) -> None:
    """Answer a round for each line on the standard input; print milliseconds of a request, and requests a second."""
    recommend, requests = load(model)
    print("ready", flush=True)
    for _ in sys.stdin:
        times = []
        for request in requests[:ONE_BY_ONE]:
            begin = time.process_time()
            recommend(request)
            times.append(time.process_time() - begin)
        begin = time.process_time()
        recommend(requests, batch_size=BATCH)
        print(1000 * statistics.median(times), len(requests) / (time.process_time() - begin), flush=True)


def compare(model: str, checkouts: list[Path], rounds: int) -> list[dict[str, float]]:
    """Let processes that import the package from several checkouts answer alternately; returns figures of each."""
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for number, checkout in enumerate(checkouts):
            links = Path(folder) / str(number) / "m6rec"
            links.mkdir(parents=True)
            for path in [*(checkout / "modeling_m6rec").iterdir()]:
                (links / path.name).symlink_to(path)
            for name in ("tokenization", "train", "model_cards"):
                (links / name).symlink_to(checkout / name)
            environment = {**os.environ, "PYTHONPATH": str(links.parent), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            words = [sys.executable, str(Path(__file__).resolve()), model, "--rounds-of-stdin"]
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            process = subprocess.Popen(words, text=True, env=environment, **pipes)
            if process.stdout.readline() != "ready\n":
                raise SystemExit(f"the package of {checkout} does not answer")
            running.append(process)
        figures: list[list[list[float]]] = [[] for _ in running]
        for _ in range(rounds):
            for process, own in zip(running, figures):
                process.stdin.write("\n")
                process.stdin.flush()
                own.append([float(value) for value in process.stdout.readline().split()])
        for process in running:
            process.stdin.close()
            process.wait()
    return [
        {
            "median_ms": round(statistics.median(one for one, _ in own), 2),
            "least_ms": round(min(one for one, _ in own), 2),
            "batch64_rps": round(statistics.median(many for _, many in own), 1),
        }
        for own in figures
    ]


# -------------------------------------------------------------------------------------------------------------- stages


class Stages:
    """Processor time of functions while they run, and the linear layers' inputs."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.products: list[tuple[Any, Any, Any]] = []

    def watch(self, owner: Any, name: str, stage: str) -> None:
        """Measure a method."""
        inner = getattr(owner, name)

        def measured(*given: Any, **more: Any) -> Any:
            begin = time.process_time()
            try:
                return inner(*given, **more)
            finally:
                self.seconds[stage] = self.seconds.get(stage, 0.0) + time.process_time() - begin

        setattr(owner, name, measured)

    def note_products(self, model: Any) -> None:
        """Note the inputs of all linear layers."""
        import torch

        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(
                    lambda layer, given, _: self.products.append((given[0], layer.weight, layer.bias))
                )


def stages(model: str, batch_size: int) -> dict[str, float]:
    """Return milliseconds of a request by stage, beside its bare matrix products."""
    import torch

    from m6rec import catalogue_m6rec, ranking_m6rec
    from m6rec.segment_cache_m6rec import Watch

    recommend, requests = load(model)
    found = Stages()
    found.watch(type(recommend.processor), "read_many", "read texts")
    found.watch(ranking_m6rec.Ranker, "described", "complete items")
    found.watch(ranking_m6rec.Ranker, "_query", "leave out seen items")
    for name in ("embed_users", "forward"):
        found.watch(type(recommend.model), name, "network")
    found.watch(catalogue_m6rec.CatalogueView, "search", "search")
    found.watch(ranking_m6rec.Ranker, "rows", "write rows")
    found.watch(Watch, "changed", "look at weights")
    begin = time.process_time()
    for start in range(0, len(requests), batch_size):
        recommend(requests[start : start + batch_size], batch_size=batch_size)
    whole = time.process_time() - begin
    found.note_products(recommend.model)
    with torch.no_grad():
        recommend(requests[:batch_size], batch_size=batch_size)
        products, repeats = list(found.products), 20
        begin = time.process_time()
        for _ in range(repeats):
            for states, weight, bias in products:
                torch.nn.functional.linear(states, weight, bias)
        bare = (time.process_time() - begin) / repeats / batch_size * len(requests)
    each = {**found.seconds, "whole request": whole, "bare matrix products": bare}
    return {name: round(1000 * seconds / len(requests), 3) for name, seconds in each.items()}


# ------------------------------------------------------------------------------------------------------------- service


def wide_model(folder: Path, items: Path) -> Path:
    """Make an untrained model of the shape of the recipe `beauty`, with a catalogue, unless the folder has one.

    Its one segment layer stands for MiniLM's six: texts are cached, so that their cost does not count.
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
    own = M6RecProcessor.from_template(tokenizer, max_length=4000, max_events=50, item_rows=places)
    torch.manual_seed(0)
    size: dict[str, Any] = {"hidden_size": 384, "embedding_size": 384, "intermediate_size": 1536}
    size |= {"num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 32}
    size |= {"num_hidden_layers": 3, "num_hidden_groups": 3, "num_joint_layers": 2}
    size |= {"max_position_embeddings": 4096, "attn_implementation": "eager"}
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


def one_event_more(model: str, users: int = 20) -> dict[str, float]:
    """Return milliseconds of a request with 49 events, and of one with one event more, whose states are kept."""
    from m6rec.train.answering.loading import load_pipeline

    recommend = load_pipeline(model, user_states=True)
    ids = list(recommend.catalogue.snapshot())
    recommend.warm(progress=False)
    first: list[float] = []
    more: list[float] = []
    for user in range(users):
        history = [{"item": {"item_id": ids[(7 * user + 13 * place) % len(ids)]}} for place in range(50)]
        for times, length in ((first, 49), (more, 50)):
            begin = time.process_time()
            recommend({"history": history[:length]})
            times.append(time.process_time() - begin)
    found = {"history_of_49_ms": first, "one_event_more_ms": more}
    return {name: round(1000 * statistics.median(times), 2) for name, times in found.items()}


def slope(samples: list[tuple[float, float]]) -> float:
    """Fit MB a minute to (minute, MB) samples, without the first quarter, in which caches fill."""
    own = samples[len(samples) // 4 :]
    middle, mean = (statistics.fmean(values) for values in zip(*own))
    spread = sum((minute - middle) ** 2 for minute, _ in own)
    return round(sum((minute - middle) * (size - mean) for minute, size in own) / spread, 2) if spread else 0.0


def under_load(model: Any, loads: dict[str, dict[str, Any]], options: tuple[str, ...] = ()) -> dict[str, Any]:
    """Start a service, put loads on it one after the other, and return their reports with memory and load average."""
    from _service import Running, load

    reports: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, Running(model, f"{folder}/events.sqlite", 1, options) as service:
        service.wait()
        for name, given in loads.items():
            samples, done, begin = [], threading.Event(), time.monotonic()

            def watch(samples: Any = samples, done: Any = done, begin: float = begin) -> None:
                while not done.wait(1):
                    samples.append(((time.monotonic() - begin) / 60, service.megabytes()))

            watching = threading.Thread(target=watch)
            watching.start()
            report = load(service, **given)
            done.set()
            watching.join()
            reports[name] = {**report, "seconds": given["seconds"], "load_average": round(os.getloadavg()[0], 1)}
            reports[name] |= {"rss_slope_mb_per_min": slope(samples)} if len(samples) > 3 else {}
            print(name, json.dumps(reports[name]), flush=True)
        service.stop()
    return reports


def serve(given: argparse.Namespace) -> dict[str, Any]:
    """Measure the service: saturation, a fixed rate, overload, kills, and the wide model."""
    from _service import kill_under_load

    seconds, quarter = given.seconds, given.seconds / 4
    loads: dict[str, dict[str, Any]] = {
        "64 clients": {"clients": 64, "seconds": seconds},
        "100 a second": {"clients": 16, "seconds": seconds / 2, "rate": 100},
        "64 clients, event then answer": {"clients": 64, "seconds": seconds / 2, "token": "secret"},
        "200 clients": {"clients": 200, "seconds": quarter},
    }
    single = {"64 clients, without batches": {"clients": 64, "seconds": quarter}}
    found = under_load(given.model, loads) | under_load(given.model, single, ("--batch-size", "1"))
    results: dict[str, Any] = {"loads": found}
    if given.items:
        folder = wide_model(given.wide, given.items)
        results["beauty_one_event_more"] = one_event_more(str(folder))
        wide = {"12,101 products, 50 events": {"clients": 64, "seconds": seconds / 2, "events": 50}}
        found |= under_load(folder, wide)
        results["beauty_rps"] = found[next(iter(wide))]["requests_per_second"]
    if given.kills:
        with tempfile.TemporaryDirectory() as store:
            results["kills"] = {"kills": given.kills, **kill_under_load(given.model, f"{store}/s.sqlite", given.kills)}
        results["lost"] = results["kills"]["lost"] + results["kills"]["torn"]
    strange = [Counter(own["statuses"]) for own in found.values()]
    return {
        "saturation_rps": found["64 clients"]["requests_per_second"],
        "p99_ms_at_saturation": found["64 clients"]["p99_ms"],
        "p99_ms_at_100_rps": found["100 a second"]["p99_ms"],
        "errors": sum(count for own in strange for status, count in own.items() if status not in ("200", "429")),
        "stale": sum(own["stale"] for own in found.values()),
        "rss_slope_mb_per_min": found["64 clients"].get("rss_slope_mb_per_min"),
        **results,
    }


def main() -> None:
    """Read the arguments, measure, print, and write the results."""
    parser = argparse.ArgumentParser(description="What a request costs.")
    parser.add_argument("model", help="the folder of a model, such as m6rec-ml100k of `make quickstart`")
    parser.add_argument("--stages", action="store_true")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="another checkout of this repository")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rounds-of-stdin", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--all", action="store_true", help="also the service; writes all figures")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the longest load; others are shorter")
    parser.add_argument("--kills", type=int, default=20, help="of workers and of the service while events are written")
    parser.add_argument("--items", type=Path, help="table of the wide model's products")
    parser.add_argument("--wide", type=Path, default=Path("runs/wide"), help="folder of the wide model, made if absent")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    if given.rounds_of_stdin:
        answer_rounds(given.model)
        return
    results: dict[str, Any] = {"load_average_before": round(os.getloadavg()[0], 1)}
    if given.stages or given.all:
        results["stages_ms"] = {str(size): stages(given.model, size) for size in (1, BATCH)}
        print(json.dumps(results["stages_ms"], indent=1))
    if given.against:
        now, then = compare(given.model, [ROOT, given.against], given.rounds)
        results |= {"median_ms": now["median_ms"], "single_ratio": round(then["median_ms"] / now["median_ms"], 2)}
        results["batch64_ratio"] = round(now["batch64_rps"] / then["batch64_rps"], 2)
        results["against"] = {"now": now, "then": then}
        print(json.dumps({name: own for name, own in results.items() if name != "stages_ms"}, indent=1), flush=True)
    if given.all:
        results |= serve(given)
    if given.output:
        results["load_average_after"] = round(os.getloadavg()[0], 1)
        given.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
