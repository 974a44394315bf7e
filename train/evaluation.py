"""What a model is measured on: full ranking of held-out events, and clicks and ratings, beside the baselines."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas
import torch
from tqdm.auto import tqdm

from ..modeling_m6rec import M6RecForRecommendation
from ..tokenization import M6RecProcessor
from .baselines import SimilarText, like_rates, popularity_scores
from .collator import CatalogueRows, M6RecDataCollator
from .examples import UNKNOWN, RequestWriter, read_requests, target_labels
from .metrics import (
    classification_report,
    coverage,
    mae,
    mixed_groups,
    popularity_bias,
    ranking_report,
    rmse,
    target_ranks,
    top_items,
)
from .recipe import EvaluationArguments, TaskArguments
from .splits import Split, histories

ROWS_AT_ONCE = 64
SHOWS_PROGRESS = 2000
"""Rows from which on an evaluation shows a progress bar."""


@dataclass(frozen=True)
class RankingExamples:
    """Held-out events, each ranked against the whole catalogue.

    Attributes:
        users: Ids of the U users.
        rows: What the model reads of each.
        histories: Catalogue rows each has met before, in order.
        targets: Catalogue rows of the held-out events.
        cold: U bool: the target never occurs in training.
    """

    users: list[str]
    rows: list[dict[str, Any]]
    histories: list[np.ndarray]
    targets: np.ndarray
    cold: np.ndarray


@dataclass(frozen=True)
class ScoringExamples:
    """Held-out events whose label or rating is predicted.

    Attributes:
        rows: What the model reads: a user's history with the held-out events as candidates.
        user_ids: Of the N events.
        item_ids: Of the N events.
        labels: N labels or ratings.
    """

    rows: list[dict[str, Any]]
    user_ids: np.ndarray
    item_ids: np.ndarray
    labels: np.ndarray


def before_and_in(split: Split, part: str) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """Return the events that may be known when a part is predicted, and the part: the test knows the validation."""
    if part == "valid":
        return split.train, split.valid
    return pandas.concat([split.train, split.valid]).sort_index(), split.test


def ranking_examples(
    writer: RequestWriter, processor: M6RecProcessor, split: Split, part: str, arguments: EvaluationArguments, seed: int
) -> RankingExamples:
    """Prepare the ranking of each user's first event in the part "valid" or "test"."""
    known, held_out = before_and_in(split, part)
    before, after = histories(known), histories(held_out)
    users = _drawn([user for user in after if user in before], arguments, seed)
    catalogue_rows = np.array([writer.rows[item_id] for item_id in known["item_id"]], dtype=int)
    requests, seen = [], []
    for user in users:
        places = before[user]
        seen.append(catalogue_rows[places])
        requests.append(writer.request(user, writer.events(known.iloc[places[-processor.max_events :]])))
    targets = [held_out["item_id"].iat[after[user][0]] for user in users]
    trained = set(split.train["item_id"])
    return RankingExamples(
        users,
        read_requests(processor, requests, "retrieval", f"Reading {part} users"),
        seen,
        np.array([writer.rows[item_id] for item_id in targets], dtype=int),
        np.array([item_id not in trained for item_id in targets], dtype=bool),
    )


def _drawn(users: list[str], arguments: EvaluationArguments, seed: int) -> list[str]:
    """Draw `max_users` of the users; they keep their order."""
    if arguments.max_users is None or len(users) <= arguments.max_users:
        return users
    drawn = np.random.default_rng(seed).choice(len(users), arguments.max_users, replace=False)
    return [users[place] for place in sorted(drawn)]


def scoring_examples(
    writer: RequestWriter,
    processor: M6RecProcessor,
    split: Split,
    part: str,
    task: str,
    arguments: TaskArguments,
    evaluation: EvaluationArguments,
    seed: int,
) -> ScoringExamples:
    """Prepare the prediction of what "click" or "rating" says of the users' events in the part."""
    known, held_out = before_and_in(split, part)
    labels = target_labels(held_out, task, arguments)
    heard = {user: own[labels[own] != UNKNOWN] for user, own in histories(held_out).items()}
    before, requests, places = histories(known), [], []
    for user in _drawn([user for user, own in heard.items() if len(own)], evaluation, seed):
        own = heard[user]
        history = known.iloc[before[user][-processor.max_events :]] if user in before else known.iloc[:0]
        candidates = [writer.item(item_id) for item_id in held_out["item_id"].iloc[own]]
        requests.append(writer.request(user, writer.events(history), candidates))
        places.append(own)
    order = np.concatenate(places) if places else np.empty(0, dtype=int)
    return ScoringExamples(
        read_requests(processor, requests, task, f"Reading {part} candidates"),
        held_out["user_id"].to_numpy()[order],
        held_out["item_id"].to_numpy()[order],
        labels[order],
    )


@torch.no_grad()
def catalogue_vectors(
    model: M6RecForRecommendation, catalogue: CatalogueRows, collator: M6RecDataCollator
) -> torch.Tensor:
    """Embed a catalogue: M x D."""
    model.eval()
    order = np.argsort([len(ids) for ids in catalogue.input_ids], kind="stable")
    vectors = []
    for start in range(0, len(order), 1024):
        rows = order[start : start + 1024]
        padded = collator.processor.pad([{"input_ids": catalogue.input_ids[row]} for row in rows])
        memory = torch.tensor([catalogue.memory_ids[row] for row in rows], device=model.device)
        ids, mask = padded["input_ids"].to(model.device), padded["attention_mask"].to(model.device)
        vectors.append(model.embed_items(ids, mask, memory_ids=memory).float().cpu())
    return torch.cat(vectors)[torch.from_numpy(np.argsort(order))]


@torch.no_grad()
def answers(
    model: M6RecForRecommendation,
    rows: Sequence[dict[str, Any]],
    collator: M6RecDataCollator,
    field: str,
    bf16: bool = False,
) -> list[torch.Tensor]:
    """Run rows through the model in batches of similar length and return `field` of the output, a row each."""
    model.eval()
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]["input_ids"]))
    found: list[Any] = [None] * len(rows)
    names = ("input_ids", "item_ids")
    for start in tqdm(range(0, len(order), ROWS_AT_ONCE), desc="Evaluating", disable=len(rows) < SHOWS_PROGRESS):
        batch_rows = order[start : start + ROWS_AT_ONCE]
        batch = collator([{name: rows[row][name] for name in names if name in rows[row]} for row in batch_rows])
        batch = {name: value.to(model.device) for name, value in batch.items()}
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            out = getattr(model(**batch, return_logits=False), field)
        for row, value in zip(batch_rows, out.float().cpu()):
            found[row] = value
    return found


def user_vectors(
    model: M6RecForRecommendation, rows: Sequence[dict[str, Any]], collator: M6RecDataCollator, bf16: bool = False
) -> torch.Tensor:
    """Embed users as of the end of their histories: U x D."""
    vectors = answers(model, rows, collator, "user_vectors", bf16)
    # Behind a row's last place stands NaN; a model that has diverged has nothing else, and the metrics refuse it.
    lengths = [int(own.isfinite().all(-1).sum()) for own in vectors]
    return torch.stack([own[max(length - 1, 0)] for own, length in zip(vectors, lengths)])


def rank_catalogue(
    model: M6RecForRecommendation,
    examples: RankingExamples,
    catalogue: CatalogueRows,
    collator: M6RecDataCollator,
    bf16: bool,
) -> np.ndarray:
    """Score the whole catalogue for each user: U x M cosines."""
    items = catalogue_vectors(model, catalogue, collator)
    return (user_vectors(model, examples.rows, collator, bf16) @ items.T).numpy().astype(np.float64)


def ranking_scores_report(
    scores: np.ndarray, examples: RankingExamples, counts: np.ndarray, arguments: EvaluationArguments
) -> dict[str, Any]:
    """Measure U x M scores: recall, NDCG, MRR for all, warm and cold items, coverage and popularity bias."""
    excluded = examples.histories if arguments.exclude_seen else None
    ranks = target_ranks(scores, examples.targets, excluded)
    report: dict[str, Any] = ranking_report(ranks, tuple(arguments.ks), {"warm": ~examples.cold, "cold": examples.cold})
    top = top_items(scores, max(arguments.ks), excluded)
    report[f"coverage@{max(arguments.ks)}"] = coverage(top, scores.shape[1])
    report[f"popularity_bias@{max(arguments.ks)}"] = popularity_bias(top, counts)
    return {**report, "seen": "out" if arguments.exclude_seen else "in"}


def ranking_baselines(
    texts: Sequence[str], examples: RankingExamples, counts: np.ndarray, arguments: EvaluationArguments
) -> dict[str, dict[str, Any]]:
    """Measure popularity and most similar text on the same users."""
    scores = {
        "popularity": popularity_scores(counts, len(examples.users)),
        "similar_text": SimilarText(texts).scores(examples.histories),
    }
    return {name: ranking_scores_report(own, examples, counts, arguments) for name, own in scores.items()}


def predictions(
    model: M6RecForRecommendation, examples: ScoringExamples, task: str, collator: M6RecDataCollator, bf16: bool = False
) -> np.ndarray:
    """Predict the N events' click probabilities or ratings."""
    scores = answers(model, examples.rows, collator, "scores", bf16)
    lengths = [row["input_ids"].count(model.config.bos_token_id) for row in examples.rows]
    found = [model.read_scores(own[:length], task) for own, length in zip(scores, lengths)]
    return torch.cat(found).double().numpy()


def scoring_report(predicted: np.ndarray, examples: ScoringExamples, task: str) -> dict[str, Any]:
    """Measure predictions: AUC, GAUC, log-loss and calibration of clicks; RMSE and MAE of ratings."""
    if task == "click":
        # With one held-out event a user nothing can be compared within a user: the report then has no GAUC.
        comparable = mixed_groups(examples.labels, examples.user_ids).any()
        return classification_report(predicted, examples.labels, examples.user_ids if comparable else None)
    return {
        "rmse": rmse(predicted, examples.labels),
        "mae": mae(predicted, examples.labels),
        "examples": len(predicted),
    }


def scoring_baselines(
    split: Split, examples: ScoringExamples, part: str, task: str, arguments: TaskArguments
) -> dict[str, dict[str, Any]]:
    """Measure the share of likes (or the mean rating) of the user and of the item on the same events."""
    known, _ = before_and_in(split, part)
    labels = target_labels(known, task, arguments)
    heard = labels != UNKNOWN
    found = {}
    asked_ids = {"user_id": examples.user_ids, "item_id": examples.item_ids}
    for name, column in (("user_mean", "user_id"), ("item_mean", "item_id")):
        asked = asked_ids[column]
        means = like_rates(labels[heard], known[column].to_numpy()[heard], asked)
        found[name] = scoring_report(means, examples, task)
    return found


__all__ = [
    "RankingExamples",
    "ScoringExamples",
    "catalogue_vectors",
    "predictions",
    "rank_catalogue",
    "ranking_baselines",
    "ranking_examples",
    "ranking_scores_report",
    "scoring_baselines",
    "scoring_examples",
    "scoring_report",
    "user_vectors",
]
