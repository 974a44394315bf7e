"""What evidence costs a catalogue: searches among a million items with and without transitions, and counting events.

python benchmarks/evidence.py [--items 1000000] [--events 2000000] [--threads 1]

Items and events are synthetic, from one seed: vectors of width 128 around 10,000 centres, users who walk among the
items of a centre, popular ones more often. Searches of the same users are timed in turns, without histories and with
them, exactly and by an ivf index, in one run, by the processor's time: the ratio of the medians is what counts. Words
have a weight of 0, since texts are not the question here, except in the rows that say so. Events are counted in batches
of 1,000 in a tenth as many items, each on the disk before the call returns. The last line printed is the JSON in
benchmarks/results/evidence.json.
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

from m6rec import Catalogue, Evidence, M6RecConfig, catalogue_m6rec

WIDTH, SPREAD, ITEMS_A_CENTRE, EVENTS_A_USER, QUERIES, BATCH, BATCHES = 128, 0.8, 100, 10, 64, 1000, 100
RESULTS = Path(__file__).parent / "results" / "evidence.json"
MODEL = SimpleNamespace(config=M6RecConfig.preset("tiny", embedding_dim=WIDTH), fingerprint=lambda: "0" * 64)
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
    result["counting"] = counting(options.items // 10, options.events // 10)
    print(json.dumps(result), flush=True)
    result["searching"] = searching(options.items, options.events)
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


def counting(count: int, events: int) -> dict:
    """Events that are counted a second, in a catalogue that is kept in a folder."""
    random = np.random.default_rng(0)
    found: dict = {}
    with tempfile.TemporaryDirectory() as folder:
        catalogue = make(torch.zeros(count, WIDTH), random, Evidence(learnt=0))
        catalogue.save(Path(folder) / "catalogue")
        log = walks(events, count, random)
        first = log.iloc[: -BATCHES * BATCH]
        found["first_events_a_second"] = len(first) / timed(catalogue.observe, first)
        start, parts = (
            time.process_time(),
            [log.iloc[len(first) + BATCH * number :][:BATCH] for number in range(BATCHES)],
        )
        times = [timed(catalogue.observe, part) for part in parts]
        found["events_a_processor_second"] = BATCH * len(times) / (time.process_time() - start)
        found["events_a_second"] = BATCH * len(times) / sum(times)
        found["slowest_batch_seconds"] = max(times)
        found["forget_seconds"] = timed(catalogue.forget, log["user_id"].iloc[-1])
    return found


def searching(count: int, events: int) -> dict:
    """What searches cost with and without evidence."""
    random = np.random.default_rng(1)
    vectors, found = synthetic(count, random), {}
    catalogue = make(vectors, random, Evidence(learnt=0.3, words=0))
    log = walks(events, count, random)
    for start in range(0, events, 100_000):
        catalogue.observe(log.iloc[start : start + 100_000])
    users = vectors[random.integers(0, count, QUERIES)]
    histories = log["item_id"].to_numpy()[-QUERIES * EVENTS_A_USER :].reshape(QUERIES, EVENTS_A_USER).tolist()
    for kind, settings in (("exact", None), ("ivf", {"nlist": 1000})):
        if settings is not None:
            catalogue.build_index(kind, **settings)
        found[kind] = compare(catalogue, users, histories)
        catalogue.set_evidence(Evidence(learnt=0.3))
        found[f"{kind}, words"] = compare(catalogue, users, histories)
        catalogue.set_evidence(Evidence(learnt=0.3, words=0))
    return found


def make(vectors: torch.Tensor, random: np.random.Generator, evidence: Evidence) -> Catalogue:
    """Make a catalogue of titles with three common words and five rare ones."""
    catalogue_m6rec.embed = lambda items, *rest: vectors
    words = np.concatenate(
        (random.integers(0, 50, (len(vectors), 3)), random.integers(50, 50_000, (len(vectors), 5))), 1
    )
    items = ({"item_id": str(row), "title": " ".join(f"w{word}" for word in own)} for row, own in enumerate(words))
    return Catalogue.from_dataset(items, MODEL, PROCESSOR, evidence=evidence)


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
        plain.append(1e3 * timed(catalogue.search, user[None], clock=time.process_time))
        evident.append(1e3 * timed(catalogue.search, user[None], histories=[history], clock=time.process_time))
    found = {"ms_without": statistics.median(plain), "ms_with": statistics.median(evident)}
    return found | {"ratio": found["ms_with"] / found["ms_without"]}


def timed(act, *given, clock=time.perf_counter, **named) -> float:
    start = clock()
    act(*given, **named)
    return clock() - start


if __name__ == "__main__":
    main()
