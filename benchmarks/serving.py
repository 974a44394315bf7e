"""What a request costs: by stage beside its bare matrix products, against another commit, and over HTTP.

    python benchmarks/serving.py m6rec-ml100k --stages
    python benchmarks/serving.py m6rec-ml100k --against OTHER_CHECKOUT --rounds 15
    python benchmarks/serving.py m6rec-ml100k --service --seconds 30 --output benchmarks/results/serving.json

One thread; requests have 20 events of items that are given by their ids, and all texts are encoded before. With
`--against`, two processes answer the same requests alternately, round by round, so that a busy machine slows both: the
ratio of their medians is the result. `--service` starts `m6rec serve` and puts load on it from another process.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
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
    found.watch(type(recommend.model), "forward", "network")
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


def memory(process: int) -> float:
    """Return the resident memory of a process and its children in MB."""
    import psutil

    parent = psutil.Process(process)
    return sum(own.memory_info().rss for own in [parent, *parent.children(recursive=True)]) / 2**20


def serve(model: str, seconds: float, options: list[str], loads: dict[str, list[str]]) -> dict[str, Any]:
    """Start a service, put loads on it one after the other, and return their reports."""
    reports: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        port = str(8500 + os.getpid() % 1000)
        code = "import sys; from m6rec.train.cli import main; sys.exit(main())"
        words = ["serve", model, "--store", f"{folder}/events.sqlite", "--port", port, "--token", "secret", *options]
        service = subprocess.Popen([sys.executable, "-c", code, *words], env={**os.environ, "HF_HUB_OFFLINE": "1"})
        address = f"http://127.0.0.1:{port}"
        try:
            _await(address, service)
            for name, given in loads.items():
                before, begin = memory(service.pid), time.monotonic()
                command = [sys.executable, str(ROOT / "examples" / "load_test.py"), address, "--seconds", str(seconds)]
                done = subprocess.run([*command, *given], check=True, capture_output=True, text=True)
                minutes = (time.monotonic() - begin) / 60
                slope = round((memory(service.pid) - before) / minutes, 2)
                reports[name] = {**json.loads(done.stdout), "rss_slope_mb_per_min": slope}
                print(name, json.dumps(reports[name]), flush=True)
        finally:
            service.terminate()
            service.wait(60)
    return reports


def _await(address: str, service: subprocess.Popen) -> None:
    while service.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/ready", timeout=5).close()
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise SystemExit("the service does not start")


def main() -> None:
    """Read the arguments, measure, print, and write the results."""
    parser = argparse.ArgumentParser(description="What a request costs.")
    parser.add_argument("model", help="the folder of a model, such as m6rec-ml100k of `make quickstart`")
    parser.add_argument("--stages", action="store_true")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="another checkout of this repository")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rounds-of-stdin", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--service", action="store_true")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each load")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    if given.rounds_of_stdin:
        answer_rounds(given.model)
        return
    results: dict[str, Any] = {}
    if given.stages:
        results["stages_ms"] = {str(size): stages(given.model, size) for size in (1, BATCH)}
        print(json.dumps(results["stages_ms"], indent=1))
    if given.against:
        now, then = compare(given.model, [ROOT, given.against], given.rounds)
        ratio = {"single_ratio": round(then["median_ms"] / now["median_ms"], 2)}
        ratio["batch64_ratio"] = round(now["batch64_rps"] / then["batch64_rps"], 2)
        results["against"] = {"now": now, "then": then, **ratio}
        print(json.dumps(results["against"], indent=1))
    if given.service:
        full = {
            "64 clients": ["--clients", "64"],
            "64 clients, event then answer": ["--clients", "64", "--token", "secret"],
            "100 a second": ["--clients", "16", "--rate", "100"],
            "200 clients": ["--clients", "200"],
        }
        results["service"] = serve(given.model, given.seconds, [], full)
        alone = {"64 clients, without batches": full["64 clients"]}
        results["service"] |= serve(given.model, given.seconds, ["--batch-size", "1"], alone)
    if given.output:
        given.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
