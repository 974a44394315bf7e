"""Retrieval from a million items: exact search against FAISS's flat, hnsw and ivf indexes in the catalogue.

python benchmarks/retrieval_scale.py [--items 1000000] [--threads 2]

The items are synthetic: vectors around 10,000 centres (one for 100 items), of width 128, from one seed; users come from
the same centres. Embedding is left out: an item's vector is looked up. For each way of searching, a fresh catalogue is
loaded; measured are recall against exact search, seconds a query (one at a time, and 64 together), what building the
index takes, and how fast items are added and removed and searched right after. The last line printed is the JSON in
benchmarks/results/retrieval_scale.json.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import torch

from m6rec import Catalogue, catalogue_m6rec
from m6rec.catalogue_m6rec import write_catalogue

WIDTH, SPREAD, ITEMS_A_CENTRE, QUERIES, TOGETHER, CHANGES = 128, 0.8, 100, 128, 64, 50
WAYS = {"exact": None, "flat": {}, "ivf": {}, "hnsw": {"M": 16, "efConstruction": 64}}
RESULTS = Path(__file__).parent / "results" / "retrieval_scale.json"
MODEL = SimpleNamespace(fingerprint=lambda: "0" * 64)
VECTORS: dict[str, torch.Tensor] = {}
"""Of the items that are added, which `embed` looks up."""


def synthetic(count: int, centres: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Normalised vectors around centres."""
    found = torch.empty(count, WIDTH)
    for part in found.split(100_000):
        own = centres[torch.randint(len(centres), (len(part),), generator=generator)]
        part[:] = own + SPREAD * torch.randn(part.shape, generator=generator) / WIDTH**0.5
        part /= part.norm(dim=-1, keepdim=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    print(f"time budget: {max(1, round(options.items * 15e-6))} minutes", flush=True)
    torch.set_num_threads(options.threads)
    result = {"items": options.items, "dimension": WIDTH, "threads": options.threads, "queries": QUERIES, "rows": []}
    for row in compare(options.items, WAYS):
        result["rows"].append(row)
        options.output.parent.mkdir(exist_ok=True)
        options.output.write_text(json.dumps(result, indent=2) + "\n")
        print(json.dumps(row), flush=True)
    print(json.dumps(result))


def compare(count: int, ways: dict[str, dict | None]) -> Iterator[dict]:
    """Measure each way of searching among so many items; the first must be exact."""
    catalogue_m6rec.embed = lambda items, *rest, **more: torch.stack([VECTORS[item["item_id"]] for item in items])
    generator = torch.Generator().manual_seed(0)
    centres = torch.nn.functional.normalize(
        torch.randn(max(count // ITEMS_A_CENTRE, 1), WIDTH, generator=generator), dim=-1
    )
    vectors = synthetic(count, centres, generator)
    users, fresh = (synthetic(QUERIES, centres, generator) for _ in range(2))
    VECTORS.update((f"new {number}", own) for number, own in enumerate(fresh))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "catalogue"
        items = {str(number): {"item_id": str(number), "title": f"item {number}"} for number in range(len(vectors))}
        write_catalogue(place, items, vectors, MODEL.fingerprint())
        del items, vectors
        expected: list[list[str]] = []
        for way, settings in ways.items():
            yield measure(place, way, settings, users, expected)


def measure(place: Path, way: str, settings: dict | None, users: torch.Tensor, expected: list[list[str]]) -> dict:
    """Everything about one way of searching; the first one, exact search, fills `expected`."""
    catalogue = Catalogue.load(place, index=None)
    before, start = psutil.Process().memory_info().rss, time.perf_counter()
    if settings is not None:
        catalogue.build_index(way, **settings)
    row = {"way": way, "settings": catalogue.index.settings if catalogue.index else {}}
    row["build_seconds"] = time.perf_counter() - start
    row["index_mb"] = (psutil.Process().memory_info().rss - before) / 1e6 if settings is not None else 0.0
    catalogue.search(users[:1])  # warm
    start = time.perf_counter()
    for part in users.split(TOGETHER):
        catalogue.search(part)
    row["ms_a_query_of_64"] = 1e3 * (time.perf_counter() - start) / len(users)
    found = [[name for name, _ in own] for part in users.split(TOGETHER) for own in catalogue.search(part, 100)]
    expected[:] = expected or found
    for top_k in (10, 100):
        hits = [len({*own[:top_k]} & {*other[:top_k]}) for own, other in zip(found, expected)]
        row[f"recall_{top_k}"] = sum(hits) / (top_k * len(hits))
    times = [timed(catalogue.search, user[None])[0] for user in users]
    row |= {"ms_median": statistics.median(times), "ms_p99": sorted(times)[int(0.99 * len(times))]}
    return row | changes(catalogue, users)


def changes(catalogue: Catalogue, users: torch.Tensor) -> dict:
    """Adds and removals, one item a call, each followed by the search that it matters to."""
    names = list(VECTORS)[:CHANGES]
    adding, after_add, added = [], [], 0
    for name in names:
        adding.append(timed(catalogue.add, [{"item_id": name, "title": name}], MODEL, None, progress=False)[0])
        spent, found = timed(catalogue.search, VECTORS[name][None])
        after_add.append(spent)
        added += found[0][0][0] == name
    removing, after_remove, gone = [], [], 0
    for user in users[:CHANGES]:
        best = catalogue.search(user[None], 1)[0][0][0]
        removing.append(timed(catalogue.remove, [best])[0])
        spent, found = timed(catalogue.search, user[None])
        after_remove.append(spent)
        gone += best not in {name for name, _ in found[0]} and len(found[0]) == 10
    return {
        "adds_a_second": 1e3 / statistics.median(adding),
        "removes_a_second": 1e3 / statistics.median(removing),
        "ms_after_add": statistics.median(after_add),
        "ms_after_remove": statistics.median(after_remove),
        "added_found_first": added / len(names),
        "removed_gone_and_ten_found": gone / CHANGES,
    }


def timed(act, *given, **named) -> tuple[float, object]:
    """Milliseconds, and what came of it."""
    start = time.perf_counter()
    found = act(*given, **named)
    return 1e3 * (time.perf_counter() - start), found


if __name__ == "__main__":
    main()
