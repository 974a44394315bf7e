"""What one request costs in the process: by stage beside its bare matrix products, and against other checkouts.

One thread; requests have 20 events of items that are given by their ids, and all texts are encoded before. Run as a
script with the folder of a model, it answers a round of requests for each line of the standard input.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
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
            words = [sys.executable, str(Path(__file__).resolve()), model]
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


if __name__ == "__main__":
    answer_rounds(sys.argv[1])
