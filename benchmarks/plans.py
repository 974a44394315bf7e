"""Seconds to score 100 candidates for a user of 50 events by each execution plan, against one row a candidate.

python benchmarks/plans.py [--hidden 256] [--rounds 5]

The rival is the plain cross-encoder of the same model: each candidate reads the user again (4 rows are timed and scaled
to 100). All plans run in one process, in turn (ABAB), and the medians are compared. The weights are random: only time
is measured here. The last line printed is the JSON in benchmarks/results/plans.json.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from m6rec import M6RecConfig, M6RecForRecommendation, SegmentCache

EVENTS, CANDIDATES, WORDS = 50, 100, 10
ROWS_TIMED = 4
RESULTS = Path(__file__).parent / "results" / "plans.json"


def request(config: M6RecConfig) -> tuple[list[int], list[list[int]]]:
    """Ids of a source of 50 events, and of 100 candidates of about 12 tokens."""
    kinds, draw = config.kind_token_ids, random.Random(0)
    seg = config.segment_token_id

    def words(count: int) -> list[int]:
        return [draw.randrange(64, config.vocab_size) for _ in range(count)]

    source = [config.source_token_id, kinds["user"], *words(8), seg]
    for _ in range(EVENTS):
        source += [kinds["event"], 40 + draw.randrange(4), seg, kinds["age"], 50 + draw.randrange(10), seg]
        source += [kinds["item"], *words(WORDS), seg]
    source += [config.source_end_token_id]
    candidates = [
        [config.bos_token_id, kinds["item"], *words(WORDS), seg, config.eos_token_id] for _ in range(CANDIDATES)
    ]
    return source, candidates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print("time budget: 3 minutes")
    seconds: dict[str, dict[str, float]] = {}
    for summary in (None, 1):
        seconds[f"summary {summary}"] = measure(options.hidden, summary, options.rounds)
    rows = [
        {"model": model, "plan": plan, "seconds_per_100": value, "ratio": own["cross_encoder"] / value}
        for model, own in seconds.items()
        for plan, value in own.items()
    ]
    result = {"hidden_size": options.hidden, "threads": torch.get_num_threads(), "rows": rows}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    for row in rows:
        print(f"{row['model']:14}{row['plan']:15}{row['seconds_per_100']:10.3f} s{row['ratio']:9.1f} x")
    print(json.dumps(result))


def measure(hidden: int, summary: int | None, rounds: int) -> dict[str, float]:
    """Median seconds of each plan."""
    torch.manual_seed(0)
    config = M6RecConfig(
        vocab_size=8000, hidden_size=hidden, intermediate_size=hidden * 8 // 3, num_hidden_layers=12,
        num_attention_heads=8, num_joint_layers=3, segment_summary=summary,
    )  # fmt: skip
    model, cache = M6RecForRecommendation(config).eval(), SegmentCache()
    source, candidates = request(config)
    one_row = torch.tensor([source + sum(candidates, [])])
    apart = torch.tensor([source + candidate for candidate in candidates[:ROWS_TIMED]])

    def ask(ids: torch.Tensor, **how: object) -> None:
        model(ids, return_logits=False, **how)

    ways: dict[str, Callable[[], None]] = {
        "cross_encoder": lambda: ask(apart, plan="flat"),
        "flat": lambda: ask(one_row, plan="flat"),
        "compact": lambda: ask(one_row, plan="compact"),
        "reuse": lambda: ask(one_row, plan="shared_prefix"),
        "cached": lambda: ask(one_row, plan="cached", segment_cache=cache),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for way in ways.values():
            way()  # warm: the cache holds all segments, as it would when serving
        for _ in range(rounds):
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                times[name].append(time.perf_counter() - start)
    found = {name: statistics.median(own) for name, own in times.items()}
    found["cross_encoder"] *= CANDIDATES / ROWS_TIMED
    return found


if __name__ == "__main__":
    main()
