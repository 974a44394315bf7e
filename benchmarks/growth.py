"""How time and memory grow with a user's events, with candidates and with the catalogue: numbers and a picture.

    python benchmarks/growth.py [--threads 1] [--rounds 5]

Scoring: the three joint layers of SmolLM2-135M's shape, random weights, bfloat16 where the processor multiplies it in
hardware (the committed figures), else float32; texts of 12 tokens that are all cached (so that one segment layer stands
for the 27 that read them before); `late_all` attends to every token, `late_summary` to one state a text.
Seconds are the processor's own, medians of `--rounds`; memory is the peak of a call
above what the process held before, and what the caches hold. A growing history is scored with one new event and
10 candidates, encoded again or from `UserStates`. Catalogues up to 100,000 items are measured here as in
`retrieval_scale.py`, whose results are used for a million.

Writes benchmarks/results/growth.json, which is also the last printed line, and docs/growth.png. Linux only: the peak is
read from /proc.
"""

import argparse
import ctypes
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from retrieval_scale import WAYS, compare
from retrieval_scale import WIDTH as VECTOR
from scoring_speed import DTYPE, SHAPE, Request, make_request

from m6rec import M6RecConfig, M6RecForRecommendation, SegmentCache
from m6rec.segment_cache_m6rec import UserStates

mpl.use("Agg")
from matplotlib import pyplot as plt

EVENTS = (10, 25, 50, 100, 200, 400)
CANDIDATES = (10, 30, 100, 300, 1000)
ITEMS = (1_000, 10_000, 100_000)
SUMMARIES = {"late_all": None, "late_summary": 1}
RESULTS = Path(__file__).parent / "results"
PICTURE = Path(__file__).parent.parent / "docs" / "growth.png"


class Shop:
    """A model with its caches, and requests of any size."""

    def __init__(self, summary: int | None) -> None:
        torch.manual_seed(0)
        config = M6RecConfig(**{**SHAPE, "num_hidden_layers": 4}, num_joint_layers=3, segment_summary=summary)
        self.model = M6RecForRecommendation(config).eval().to(DTYPE)
        self.cache = SegmentCache()

    def request(self, events: int, candidates: int, seed: int = 0) -> Request:
        """Make a request."""
        return make_request(self.model.config, random.Random(seed), events=events, candidates=candidates)

    @torch.inference_mode()
    def ask(self, request: Request, users: UserStates | None = None) -> torch.Tensor:
        """Score all candidates."""
        row = torch.tensor([request.user + [token for own in request.candidates for token in own]])
        return self.model.score(input_ids=row, plan="cached", segment_cache=self.cache, user_states=users)

    def extended(self, request: Request, seed: int) -> Request:
        """Append an event to the history."""
        more = self.request(1, 1, seed).user[1:-1]
        return Request([*request.user[:-1], *more, request.user[-1]], request.candidates)


def spent(call: Callable[..., Any], *given: Any) -> float:
    """Processor seconds of a call."""
    start = time.process_time()
    call(*given)
    return time.process_time() - start


def peak_mb(call: Callable[..., Any], *given: Any) -> float:
    """The most memory that a call held beyond what was held before."""

    def status(name: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
        return int(line.split()[1])

    ctypes.CDLL(None).malloc_trim(0)  # what was freed before, but not given back, would hide what is taken now
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    call(*given)
    return (status("VmHWM") - before) / 1024


def scoring(rounds: int) -> Iterator[dict[str, Any]]:
    """Grow the history and the candidates."""
    sizes = [("events", events, 100) for events in EVENTS] + [("candidates", 50, count) for count in CANDIDATES]
    for way, summary in SUMMARIES.items():
        shop = Shop(summary)
        for grown, events, candidates in sizes:
            shop.cache.clear()
            request = shop.request(events, candidates)
            shop.ask(request)
            yield {
                "grown": grown,
                "way": way,
                "events": events,
                "candidates": candidates,
                "seconds": statistics.median(spent(shop.ask, request) for _ in range(rounds)),
                "peak_mb": peak_mb(shop.ask, request),
                "cache_mb": shop.cache.num_bytes / 2**20,
            }


def histories(rounds: int) -> Iterator[dict[str, Any]]:
    """Score with one new event, with and without the user's cached states."""
    for way, summary in SUMMARIES.items():
        shop = Shop(summary)
        for events in EVENTS:
            users, request = UserStates(), shop.request(events, 10)
            shop.ask(request, users)
            later = [shop.extended(request, seed) for seed in range(1, rounds + 1)]
            for each in later:
                shop.ask(each)  # so that the new event's text is cached
            yield {
                "way": way,
                "events": events,
                "anew_seconds": statistics.median(spent(shop.ask, each) for each in later),
                "kept_seconds": statistics.median(spent(shop.ask, each, users) for each in later),
                "kept_mb": users.num_bytes / 2**20 / len(users),
            }


def catalogues() -> Iterator[dict[str, Any]]:
    """Exact search and HNSW among more and more items."""
    ways = {way: WAYS[way] for way in ("exact", "hnsw")}
    measured = [(count, list(compare(count, ways))) for count in ITEMS]
    scale = RESULTS / "retrieval_scale.json"
    if scale.is_file():
        million = json.loads(scale.read_text())
        measured.append((million["items"], [row for row in million["rows"] if row["way"] in ways]))
    for count, rows in measured:
        for row in rows:
            taken = {name: row[name] for name in ("way", "ms_median", "recall_10", "build_seconds", "index_mb")}
            yield {"items": count, **taken, "vectors_mb": count * VECTOR * 4 / 2**20}


def draw(result: dict[str, Any]) -> None:
    """Draw six small pictures."""
    figure, axes = plt.subplots(2, 3, figsize=(10, 5.6), constrained_layout=True)
    for column, grown in enumerate(("events", "candidates")):
        for way in SUMMARIES:
            rows = [row for row in result["scoring"] if row["grown"] == grown and row["way"] == way]
            place = [row[grown] for row in rows]
            axes[0, column].plot(place, [1e3 * row["seconds"] for row in rows], "o-", label=way)
            axes[1, column].plot(place, [row["peak_mb"] for row in rows], "o-", label=f"{way}, a call")
            axes[1, column].plot(place, [row["cache_mb"] for row in rows], "--", label=f"{way}, cached texts")
        fixed = "100 candidates" if grown == "events" else "50 events"
        axes[0, column].set(xlabel=f"{grown} ({fixed})", ylabel="ms a request")
        axes[1, column].set(xlabel=f"{grown} ({fixed})", ylabel="MB")
    for way in SUMMARIES:
        rows = [row for row in result["histories"] if row["way"] == way]
        for kept, style in (("anew", "o--"), ("kept", "o-")):
            seconds = [1e3 * row[f"{kept}_seconds"] for row in rows]
            axes[0, 2].plot([row["events"] for row in rows], seconds, style, label=f"{way}, {kept}")
    axes[0, 2].set(xlabel="events, and one more (10 candidates)", ylabel="ms a request")
    memory = axes[1, 2].twinx()
    for way in ("exact", "hnsw"):
        rows = [row for row in result["catalogues"] if row["way"] == way]
        place = [row["items"] for row in rows]
        (line,) = axes[1, 2].plot(place, [row["ms_median"] for row in rows], "o-", label=f"{way}, ms")
        memory.plot(place, [row["vectors_mb"] + row["index_mb"] for row in rows], "--", color=line.get_color())
        axes[1, 2].plot([], [], "--", color=line.get_color(), label=f"{way}, MB")  # for the legend
    axes[1, 2].set(xlabel="items of the catalogue", ylabel="ms a search", xscale="log", yscale="log")
    memory.set(ylabel="MB of vectors and index", yscale="log")
    for axis in axes.flat:
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    axes[0, 1].set(xscale="log", yscale="log")
    axes[1, 1].set(xscale="log", yscale="log")
    figure.savefig(PICTURE, dpi=90)


def main() -> None:
    """Measure, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print("time budget: 4 minutes", flush=True)
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {"threads": options.threads}
    parts = {"scoring": scoring(options.rounds), "histories": histories(options.rounds), "catalogues": catalogues()}
    for name, rows in parts.items():
        result[name] = []
        for row in rows:
            result[name].append(row)
            print(name, json.dumps(row), flush=True)
    (RESULTS / "growth.json").write_text(json.dumps(result, indent=2) + "\n")
    draw(result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
