"""Weights of evidence learnt over several logs, tested on a log that was left out, from 0 to all of its events.

python benchmarks/open_domain.py [--data DIR] [--work DIR] [--logs gift-cards ml-100k lastfm amazon-beauty]

Each log is ranked in three draws: 400 users, whose next event is predicted from their own events before it, by full
ranking, seen items left out; the order of ties; and the users whose events, 100, 1,000, 10,000 or all, are counted.
Gift cards and MovieLens: the last event of each user, ties shuffled; Last.fm has no times, and a drawn order; Beauty:
the last purchase after the quantile .9 of all times, and counted is what was bought before it.

For each log the weights (`LogWeights`) are learnt on the validation events of the three others: the mean share of what
the best weights of each log and number of events reach there. They are tested on the test events of the log left out,
next to the rule, words only, the reader only, and weights tuned on all validation events of the log itself at the same
number of events, which a log of that size does not have. "as m6rec fit chooses" is the product below 20,000 events: the
weights learnt without this log or the rule, whichever ranks held-out ones of the counted events better, or others that
are clearly better there. The last step learns the shipped weights over all logs.

With --work, ranked events are kept in a folder, and those that are there are not ranked again. Writes
benchmarks/results/open_domain.json and docs/open_domain.png; the last line printed is the same JSON.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from _open_logs import (
    COUNTS,
    LOGS,
    POPULARITY,
    READER_ONLY,
    RECENCIES,
    RULE,
    WORDS,
    WORDS_ONLY,
    Cell,
    cells,
    fitted,
    number_name,
)

from m6rec.train.evaluation.log_weights import LogWeights
from m6rec.train.metrics import bootstrap_interval

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RESULTS = Path(__file__).parent / "results" / "open_domain.json"
PICTURE = Path(__file__).parents[1] / "docs" / "open_domain.png"
MINUTES = 12
SEEDS = (0, 1, 2)
EVENTS = [number_name(count) for count in COUNTS]
LEARNT, TUNED, FITTED = "learnt over other logs", "tuned on own validation", "as m6rec fit chooses"
FORM: dict[str, tuple[float, ...]] = {
    "words": (0.2, 0.3, 0.5, 0.7, 1.0, 1.4),
    "likeness": (0.0, 0.25, 0.5, 0.75, 1.0),
    "words_falling": (0.0, 0.15, 0.3, 0.5),
    "popularity": (0.0, 1.0, 2.0, 3.0, 6.0),
    "ratio": (0.0, 0.25, 0.5, 0.75, 1.0),
    "popularity_falling": (0.0, 0.5, 1.0, 1.5),
    "near_from": (0.0, 8.0, math.inf),
}
STARTS = 6
Table = dict[tuple[str, str, str, int], Cell]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("M6REC_DATA", "../shared/data")))
    parser.add_argument("--work", type=Path)
    parser.add_argument("--logs", nargs="*", choices=LOGS, default=[*LOGS])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    options = parser.parse_args()
    print(f"time budget: {MINUTES} minutes", flush=True)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        table = ranked(options.logs, options.data, work)
        result: dict[str, Any] = {"missed": max(cell.missed for cell in table.values()), "logs": {}}
        for name in options.logs:
            weights = learnt([other for other in options.logs if other != name], table)
            chosen = as_fitted(name, options.data, weights, work)
            result["logs"][name] = tested(name, table, weights, chosen)
            print(json.dumps({name: result["logs"][name]}), flush=True)
    result["shipped"] = dataclasses.asdict(learnt(options.logs, table))
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    draw(result["logs"], options.picture)
    print(json.dumps(result))


def ranked(names: Iterable[str], data: Path, folder: Path) -> Table:
    """Rank the events of logs, or read them from the folder."""
    folder.mkdir(exist_ok=True, parents=True)
    table = {}
    for name in names:
        known = {path.stem.removeprefix(f"{name}_") for path in folder.glob(f"{name}_*.npz")}
        if not all(f"{part}_{seed}_all" in known for part in ("valid", "test") for seed in SEEDS):
            for key, cell in cells(name, data, SEEDS, known):
                cell.save(folder / f"{name}_{key}.npz")
        for path in sorted(folder.glob(f"{name}_*.npz")):
            part, seed, count = path.stem.removeprefix(f"{name}_").split("_")
            table[name, count, part, int(seed)] = Cell.load(path)
    return table


def as_fitted(name: str, data: Path, weights: LogWeights, folder: Path) -> dict[str, list[np.ndarray]]:
    """Rank test events with weights learnt over other logs and as `m6rec fit` does, or read them.

    Returns:
        Row and number of counted events, such as "learnt over other logs, 100" -> NDCG@10 in each draw.
    """
    digest = hashlib.sha256(repr(weights).encode()).hexdigest()[:12]
    path = folder / f"fitted-{digest}_{name}.npz"
    if not path.exists():
        own: dict[str, list[np.ndarray]] = {}
        for count, learnt, chosen in fitted(name, data, SEEDS, weights):
            own.setdefault(f"{LEARNT}, {count}", []).append(learnt)
            if chosen is not None:
                own.setdefault(f"{FITTED}, {count}", []).append(chosen)
        np.savez(path, **{row: np.stack(several) for row, several in own.items()})
    return {row: [*several] for row, several in np.load(path).items()}


def learnt(names: Sequence[str], table: Table) -> LogWeights:
    """Learn weights on the validation events of some logs, from several starts, one number at a time."""
    counts = {name: [count for count in EVENTS[1:] if (name, count, "valid", 0) in table] for name in names}
    means = {key: cell.grid.mean(-1) for key, cell in table.items() if key[0] in counts and key[2] == "valid"}
    best = {
        (name, count): sum(means[name, count, "valid", seed] for seed in SEEDS).max()
        for name in names
        for count in counts[name]
    }
    known: dict[tuple[float, ...], float] = {}
    options = [*FORM.values(), tuple(range(len(RECENCIES)))]

    def value(chosen: tuple[float, ...]) -> float:
        if chosen not in known:
            weights, shares = weights_of(chosen), []
            for name in names:
                own = []
                for count in counts[name]:
                    keys = [(name, count, "valid", seed) for seed in SEEDS]
                    own.append(sum(means[key][place(weights, table[key])] for key in keys) / best[name, count])
                shares.append(np.mean(own))
            known[chosen] = float(np.mean(shares))
        return known[chosen]

    generator = np.random.default_rng(0)
    for _ in range(STARTS):
        chosen = tuple(own[generator.integers(len(own))] for own in options)
        before = None
        while chosen != before:
            before = chosen
            for number, own in enumerate(options):
                chosen = max((chosen[:number] + (each,) + chosen[number + 1 :] for each in own), key=value)
    return weights_of(max(known, key=known.__getitem__))


def weights_of(chosen: tuple[float, ...]) -> LogWeights:
    """Make weights of the numbers of the form and of the place of a recency."""
    return LogWeights(**dict(zip(FORM, chosen[:-1])), recency=RECENCIES[int(chosen[-1])])


def place(weights: LogWeights, cell: Cell) -> tuple[int, int, int, int]:
    """Return the place in a grid of the weights for a log."""
    words, popular = weights.of(cell.facts)
    structure = int(cell.facts.density >= weights.near_from)
    return structure, RECENCIES.index(weights.recency), WORDS.index(words), POPULARITY.index(popular)


def tested(name: str, table: Table, weights: LogWeights, chosen: dict[str, list[np.ndarray]]) -> dict[str, Any]:
    """Measure the rows on the test events of a log, at each number of events."""
    found: dict[str, Any] = {"weights": dataclasses.asdict(weights), "events": {}}
    for count in EVENTS:
        if (name, count, "test", 0) not in table:
            continue
        valid, test = ([table[name, count, part, seed] for seed in SEEDS] for part in ("valid", "test"))
        mean = sum(cell.grid.mean(-1) for cell in valid)
        tuned = np.unravel_index(int(mean.argmax()), mean.shape)
        rows = {row: [cell.fixed[row] for cell in test] for row in (RULE, WORDS_ONLY, READER_ONLY)}
        rows[TUNED] = [cell.grid[tuned] for cell in test]
        rows |= {row: chosen[f"{row}, {count}"] for row in (LEARNT, FITTED) if f"{row}, {count}" in chosen}
        every = {row: np.concatenate(own) for row, own in rows.items()}
        found["events"][count] = {
            "counted": test[0].facts.events,
            "ndcg@10": {row: float(own.mean()) for row, own in every.items()},
            "by draw": {row: [float(each.mean()) for each in own] for row, own in rows.items()},
            "weights": {"words": weights.of(test[0].facts)[0], "popularity": weights.of(test[0].facts)[1]},
            "difference": {row: difference(every[LEARNT], every[row]) for row in (RULE, TUNED)},
            "fitted to rule": difference(every[FITTED], every[RULE]) if FITTED in every else None,
        }
    return found


def difference(own: np.ndarray, other: np.ndarray) -> list[float]:
    """Return the difference of means, and its 95% interval."""
    return [float((own - other).mean()), *map(float, bootstrap_interval(own - other))]


def draw(logs: dict[str, Any], path: Path) -> None:
    """Draw NDCG@10 against the number of counted events, a picture for each log."""
    figure, axes = plt.subplots(1, len(logs), figsize=(3.2 * len(logs), 3.4), constrained_layout=True, squeeze=False)
    rows = {RULE: "o--", TUNED: "s:", READER_ONLY: "-", LEARNT: "o-", FITTED: "x"}
    for axis, (name, found) in zip(axes[0], logs.items()):
        counts = [own["counted"] for own in found["events"].values()]
        places = [max(count, 10) for count in counts]
        for row, style in rows.items():
            values = [own["ndcg@10"].get(row, math.nan) for own in found["events"].values()]
            axis.plot(places, values, style, label=row, ms=4)
        axis.set(title=name, xscale="log", xlabel="counted events")
        axis.set_xticks(places, ["0" if not count else f"{count:,}" for count in counts], rotation=45, fontsize=8)
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("NDCG@10 on the log left out")
    axes[0, 0].legend(fontsize=7)
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main()
