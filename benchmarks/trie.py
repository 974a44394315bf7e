"""What a trie of 100,000 items' texts costs, against Python dicts: time to build, memory, a step, changes.

    python benchmarks/trie.py [--items 100000] [--rounds 3]

Texts are 4 to 12 random words of 1 to 3 tokens, some much more frequent than others, as in product titles. Times are
the process's own, medians of `--rounds`, one thread. A step is the logits processor on beams that write random items;
the dicts stand for `prefix_allowed_tokens_fn` with a nested dict. Writes benchmarks/results/trie.json, which is also
the last printed line. Linux only: memory of the dicts is read from /proc.
"""

import argparse
import gc
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.generation import PrefixConstrainedLogitsProcessor

from m6rec.trie_m6rec import ItemTrie, TrieProcessor

VOCABULARY, END, PAD, PROMPT = 49_185, 49_158, 49_160, 50
RESULTS = Path(__file__).parent / "results"


def make_texts(count: int, seed: int = 0) -> list[list[int]]:
    """Make texts of words of one to three tokens; frequent words are much more frequent, as in titles."""
    rng = random.Random(seed)
    words = [[rng.randrange(8_000), *(rng.randrange(49_152) for _ in range(rng.randint(0, 2)))] for _ in range(30_000)]
    weights = np.cumsum(1 / np.arange(2, len(words) + 2)).tolist()
    found: dict[tuple[int, ...], None] = {}
    while len(found) < count:
        chosen = rng.choices(words, cum_weights=weights, k=rng.randint(4, 12))
        found[tuple(token for word in chosen for token in word)] = None
    return [list(text) for text in found]


def nested(texts: list[list[int]]) -> dict:
    """Make a trie of dicts."""
    root: dict = {}
    for text in texts:
        node = root
        for token in (*text, END):
            node = node.setdefault(token, {})
    return root


def resident() -> float:
    """Return the MiB that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def seconds(call: Callable[[], Any], rounds: int) -> float:
    """Return the median processor time of a call."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return statistics.median(times)


def step_times(texts: list[list[int]], make: Callable[[int], Any], beams: int, rounds: int) -> float:
    """Return the mean milliseconds of a step of beams that write random items."""
    rng = random.Random(beams)
    prompt, scores, times = torch.zeros(beams, PROMPT, dtype=torch.long), torch.randn(beams, VOCABULARY), []
    for _ in range(rounds):
        chosen, processor = [rng.choice(texts) for _ in range(beams)], make(beams)
        for step in range(min(map(len, chosen))):
            ids = torch.cat((prompt, torch.tensor([text[:step] for text in chosen]).view(beams, step).long()), 1)
            start = time.process_time()
            processor(ids, scores)
            times.append(time.process_time() - start)
    return 1000 * statistics.mean(times)


def measure(items: int, rounds: int) -> dict[str, Any]:
    """Measure one catalogue."""
    texts = make_texts(items + 1_000)
    texts, more = texts[:items], texts[items:]
    names = [f"i{number}" for number in range(items + 1_000)]
    build = seconds(lambda: ItemTrie.from_texts(texts, names[:items], END), rounds)
    trie = ItemTrie.from_texts(texts, names[:items], END)
    trie.remove(names[:1])  # makes the table of ids
    gc.collect()
    before = resident()
    start = time.process_time()
    root = nested(texts)
    dicts = {"build_s": time.process_time() - start, "mib": resident() - before}

    def allowed(_: int, ids: torch.Tensor) -> list[int]:
        node = root
        for token in ids[PROMPT:].tolist():
            node = node[token]
        return list(node)

    found: dict[str, Any] = {
        "items": items,
        "tokens": sum(map(len, texts)) + items,
        "nodes": len(trie.pieces[0].token),
        "build_s": build,
        "mib": trie.nbytes / 2**20,
    }
    for beams in (1, 4, 16, 64):
        found[f"ms_per_step_{beams}"] = step_times(texts, lambda _: TrieProcessor([trie], PROMPT, PAD), beams, rounds)
        dicts[f"ms_per_step_{beams}"] = step_times(
            texts, lambda own: PrefixConstrainedLogitsProcessor(allowed, num_beams=own), beams, rounds
        )
    found["us_remove"] = 1e6 * seconds(lambda: trie.remove(names[5:6]), 30)
    found["us_first_step_after"] = 1e6 * seconds(lambda: trie.remove(names[5:6]).sums, 30)
    for count in (1, 100, 1_000):
        own = names[items : items + count]
        found[f"ms_add_{count}"] = 1000 * seconds(lambda own=own, count=count: trie.add(more[:count], own), 9)
    return {**found, "dicts": dicts}


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(given.items, given.rounds)
    (RESULTS / "trie.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
