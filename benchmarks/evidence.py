"""What evidence costs a catalogue: searches among a million items with and without transitions, and counting events.

python benchmarks/evidence.py [--items 1000000] [--events 2000000] [--threads 1]

Items and events are synthetic, from one seed: vectors of width 128 around 10,000 centres, users who walk among the
items of a centre, popular ones more often. Searches of the same users are timed in turns, without histories and with
them, exactly and by an hnsw index, in one run: the ratio of the medians is what counts. Words have a weight of 0, since
texts are not the question here, except in the row `words`. Events are counted in batches of 1,000, each on the disk
before the call returns. The last line printed is the JSON in benchmarks/results/evidence.json.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas
import torch

from m6rec import Catalogue, Evidence, catalogue_m6rec

WIDTH, SPREAD, ITEMS_A_CENTRE, EVENTS_A_USER, QUERIES, BATCH = 128, 0.8, 100, 10, 64, 1000
RESULTS = Path(__file__).parent / "results" / "evidence.json"
MODEL = SimpleNamespace(config=SimpleNamespace(vector_width=WIDTH), fingerprint=lambda: "0" * 64)
PROCESSOR = SimpleNamespace(item_texts=lambda items: [item["title"] for item in items])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--events", type=int, default=2_000_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    print(f"time budget: {max(1, round(options.items * 10e-6))} minutes", flush=True)
    torch.set_num_threads(options.threads)
    result = {"items": options.items, "events": options.events, "threads": options.threads, "dimension": WIDTH}
    result |= measure(options.items, options.events)
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


def measure(count: int, events: int) -> dict:
    random = np.random.default_rng(0)
    vectors = synthetic(count, random)
    catalogue_m6rec.embed = lambda items, *rest: vectors
    common, rare = random.integers(0, 50, (count, 3)), random.integers(0, 50_000, (count, 5))
    items = [
        {"item_id": str(row), "title": " ".join(f"w{word}" for word in (*common[row], *(50 + rare[row])))}
        for row in range(count)
    ]
    found: dict = {}
    with tempfile.TemporaryDirectory() as folder:
        catalogue = Catalogue.from_dataset(items, MODEL, PROCESSOR, evidence=Evidence(learnt=0.3, words=0))
        catalogue.save(Path(folder) / "catalogue")
        log = walks(events, count, random)
        parts = [log.iloc[start : start + BATCH] for start in range(0, len(log), BATCH)]
        # Most are counted at once, as a first load does; the last 100 batches as a service does.
        start = time.perf_counter()
        catalogue.observe(pandas.concat(parts[:-100]))
        found["first_events_a_second"] = (len(log) - 100 * BATCH) / (time.perf_counter() - start)
        times = [timed(catalogue.observe, part) for part in parts[-100:]]
        found["events_a_second"] = BATCH * len(times) / sum(times)
        found["slowest_batch_seconds"] = max(times)
        start = time.perf_counter()
        catalogue.forget(log["user_id"].iloc[-1])
        found["forget_seconds"] = time.perf_counter() - start
    users = vectors[random.integers(0, count, QUERIES)]
    histories = [walk["item_id"].tolist() for _, walk in log.iloc[-QUERIES * EVENTS_A_USER :].groupby("user_id")]
    histories = [*histories, *histories][:QUERIES]
    found["exact"] = compare(catalogue, users, histories)
    catalogue.set_evidence(Evidence(learnt=0.3))
    found["exact, words"] = compare(catalogue, users, histories)
    catalogue.build_index("hnsw", M=16, efConstruction=64)
    found["hnsw, words"] = compare(catalogue, users, histories)
    catalogue.set_evidence(Evidence(learnt=0.3, words=0))
    found["hnsw"] = compare(catalogue, users, histories)
    return found


def synthetic(count: int, random: np.random.Generator) -> torch.Tensor:
    """Normalised vectors around centres, those of a centre one after the other."""
    centres = torch.nn.functional.normalize(
        torch.from_numpy(random.standard_normal((count // ITEMS_A_CENTRE + 1, WIDTH), np.float32)), dim=-1
    )
    found = centres.repeat_interleave(ITEMS_A_CENTRE, 0)[:count]
    for part in found.split(100_000):
        part += SPREAD * torch.from_numpy(random.standard_normal(tuple(part.shape), np.float32)) / WIDTH**0.5
    return torch.nn.functional.normalize(found, dim=-1)


def walks(events: int, count: int, random: np.random.Generator) -> pandas.DataFrame:
    """Events of users, each of whom meets items of one centre, its first ones more often, and a fifth any others."""
    users = np.arange(events) // EVENTS_A_USER
    centres = random.integers(0, max(count // ITEMS_A_CENTRE, 1), users[-1] + 1)[users]
    near = centres * ITEMS_A_CENTRE + (ITEMS_A_CENTRE * random.random(events) ** 3).astype(int)
    items = np.where(random.random(events) < 0.8, near, random.integers(0, count, events)) % count
    return pandas.DataFrame({"user_id": users, "item_id": items, "timestamp": 1.7e9 + np.arange(events)})


def compare(catalogue: Catalogue, users: torch.Tensor, histories: list[list[str]]) -> dict:
    """Milliseconds of a search of one user, without and with the history, in turns."""
    catalogue.search(users[:1], histories=histories[:1])  # warm
    plain, evident = [], []
    for user, history in zip(users, histories):
        plain.append(1e3 * timed(catalogue.search, user[None]))
        evident.append(1e3 * timed(catalogue.search, user[None], histories=[history]))
    found = {"ms_without": statistics.median(plain), "ms_with": statistics.median(evident)}
    return found | {"ratio": found["ms_with"] / found["ms_without"]}


def timed(act, *given, **named) -> float:
    start = time.perf_counter()
    act(*given, **named)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
