"""A network that is combined with evidence: trained within a time limit, and compared with untrained rules."""

import dataclasses
import shutil
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, TrainerCallback

from ..config.recipe import Recipe
from ..data.log import Log
from ..data.splits import histories
from ..evaluation import reports as evaluation
from ..evaluation.evidence import Evidence, EvidenceSettings, FoldedEvidence
from ..evaluation.reports import OWN, RankingExamples, Scores
from ..evaluation.untrained import Untrained, plain
from ..evaluation.verdicts import compare
from ..metrics import ndcg_gains
from . import finetune
from .best import check_best_metric
from .budget import TimeBudget
from .build import plain_forward, prepare
from .run import Run

SHARES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
"""Weights of the network's cosine tried in combination with evidence, whose transitions have the weight 1."""
NETWORK_ONLY = float("inf")
"""The weight of a network without evidence."""
VALIDATION_USERS = 2_000
"""Maximum number of users on which epochs and shares are chosen."""
MORE_USERS = 10_000
"""Maximum number of users on which a network is compared with evidence, if fewer show no clear difference."""
CLOSE = 0.9
"""Untrained rows with less than this share of the best row's value are not compared on more users."""
LOSS_WEIGHT = 0.6
"""Weight of evidence relative to the cosine in the loss (chosen on Amazon Beauty)."""
PATIENCE = 3
"""Number of epochs without improvement after which training stops."""
STEPS_OF_AN_EPOCH = 16
"""Minimum number of steps per epoch: batches are made smaller for it, down to `LEAST_BATCH` rows."""
LEAST_BATCH = 16


@dataclasses.dataclass
class Outcome:
    """The result of a training."""

    run: Run
    share: float
    """Weight of the cosine relative to evidence that is best on validation; `NETWORK_ONLY`: no evidence."""
    found: dict[str, Any]
    """Its comparison with the best untrained row on validation, from `compare`."""
    facts: dict[str, Any]
    """Epochs, steps, and the metric of each share."""


class ValidationMetrics:
    """Measures a network on held-out events, with and without evidence: `ndcg@10` is the best of these.

    Args:
        run: The run in training.
        settings: Settings of the evidence.
        max_users: Maximum number of users, drawn by the run's seed.
    """

    def __init__(self, run: Run, settings: EvidenceSettings, max_users: int) -> None:
        self.run, recipe = run, run.recipe
        arguments = dataclasses.replace(recipe.evaluation, max_users=max_users)
        self.examples = evaluation.ranking_examples(
            run.writer, run.processor, run.split, "valid", arguments, recipe.seed
        )
        self.evidence = evidence_scores(run, self.examples, settings, "valid")

    def __call__(self) -> dict[str, float]:
        """Return the metrics by name."""
        gains = self.gains()
        found = {share: float(own.mean()) for share, own in gains.items()}
        return {"ndcg@10": max(found.values()), "network_ndcg@10": found[NETWORK_ONLY]}

    def gains(self) -> dict[float, np.ndarray]:
        """Return each event's NDCG@10 for each share."""
        run, examples = self.run, self.examples
        cosines = evaluation.rank_catalogue(run.model, examples, run.catalogue, run.collator, False, run.segment_cache)
        weights = {NETWORK_ONLY: (0.0, 1.0), **{share: (1.0, share) for share in SHARES}}
        exclude = run.recipe.evaluation.exclude_seen
        ranks = evaluation.ranks_of_sums([self.evidence, cosines], weights, examples, exclude)
        return {share: ndcg_gains(own, evaluation.COMPARED_AT) for share, own in ranks.items()}

    def untrained(self, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
        """Return each event's NDCG@10 for the evidence, and for the other untrained rows, or those of the names."""
        run = self.run
        arguments = plain(run.recipe.evaluation, run.split, len(run.texts))
        kept = [name for name in arguments.baselines or () if names is None or name in names]
        arguments = dataclasses.replace(arguments, baselines=kept)
        others = Untrained(run.writer, run.texts, run.split, arguments, run.recipe.seed)
        return gains_of({"evidence": self.evidence, **others.scores(self.examples, "valid")}, run, self.examples)


def combined(cosines: Scores, evidence: Scores, share: float) -> Scores:
    """Add cosines, weighted by a share, to the scores of evidence; `NETWORK_ONLY`: only cosines, 0: only evidence."""
    if share == NETWORK_ONLY:
        return cosines
    return Scores(lambda part: evidence[part] + share * cosines[part]) if share else evidence


def gains_of(scores: Mapping[Any, Any], run: Run, examples: RankingExamples) -> dict[Any, np.ndarray]:
    """Return each event's NDCG@10, by the name of the scores."""
    exclude = run.recipe.evaluation.exclude_seen
    return {
        name: ndcg_gains(evaluation.ranks_of(own, examples, exclude), evaluation.COMPARED_AT)
        for name, own in scores.items()
    }


def evidence_scores(run: Run, examples: RankingExamples, settings: EvidenceSettings, part: str) -> Scores:
    """Score the catalogue by the evidence that may be counted for the prediction of a part."""
    sequences = evaluation.learnt_sequences(run.writer, run.split, part, run.recipe.evaluation)
    times = evaluation.learnt_times(run.split, part, run.recipe.evaluation)
    counted = Evidence(run.texts, sequences, settings, times)
    return Scores(lambda users: counted.scores(examples.histories[users], examples.moments[users]))


def evidence_of_loss(run: Run, settings: EvidenceSettings) -> FoldedEvidence:
    """Count the training events for the loss."""
    rows = np.array([run.writer.rows[item_id] for item_id in run.split.train["item_id"]], dtype=int)
    moments = run.split.train["timestamp"].to_numpy(dtype=float)
    places = histories(run.split.train)
    sequences = {user: rows[own] for user, own in places.items()}
    times = {user: moments[own] for user, own in places.items()}
    return FoldedEvidence(run.texts, sequences, settings, LOSS_WEIGHT, run.recipe.seed, times)


def train_with_evidence(
    recipe: Recipe, log: Log, settings: EvidenceSettings, deadline: float, say: Callable[[str], object]
) -> Outcome:
    """Train a network until a deadline, and compare it with the untrained rows on validation.

    Args:
        recipe: Settings of the training; the best epoch is used if the recipe evaluates each epoch.
        log: The data.
        settings: Settings of the evidence.
        deadline: Deadline on the clock `time.monotonic`.
        say: Receives lines of progress.
    """
    check_best_metric(recipe)
    run = prepare(recipe, log=log)
    figures = ValidationMetrics(run, settings, recipe.evaluation.max_users or VALIDATION_USERS)
    untrained = figures.untrained()  # before the training, since after it there is no time left
    run.collator.evidence = evidence_of_loss(run, settings).scores
    budget = TimeBudget(deadline, say)
    more: list[TrainerCallback] = [budget]
    if recipe.training.get("load_best_model_at_end"):
        more.append(EarlyStoppingCallback(PATIENCE))
    trainer = finetune.fit(run, figures, more, without=(PrinterCallback, ProgressCallback))
    plain_forward(run.model)
    run.collator.evidence = None  # frees its tables
    for checkpoint in recipe.output_dir.glob("checkpoint-*"):  # the best checkpoint is in memory
        shutil.rmtree(checkpoint)
    gains = figures.gains()
    found = compared(gains, untrained, recipe.seed)
    known = run.split.valid["user_id"].nunique()
    if unclear(found) and not recipe.evaluation.max_users and known > VALIDATION_USERS:
        say(f"{found['difference']:+.4f} {found['metric']} on {VALIDATION_USERS:,} users is not clear: drawing more")
        figures = ValidationMetrics(run, settings, MORE_USERS)
        gains, untrained = figures.gains(), figures.untrained(close_rows(untrained))
        found = compared(gains, untrained, recipe.seed)
    state = trainer.state
    best = state.best_global_step if recipe.training.get("load_best_model_at_end") else state.global_step
    facts = {
        "epochs": round(float(state.epoch or 0), 2),
        "steps": state.global_step,
        "best epoch": round(float(state.epoch or 0) * (best or state.global_step) / max(state.global_step, 1), 2),
        "out of time": budget.out_of_time or budget.planned is not None,
        "ndcg@10 by weight of the cosine": {str(each): float(value.mean()) for each, value in gains.items()},
    }
    return Outcome(run, best_share(gains), found, facts)


def compared(gains: Mapping[float, np.ndarray], untrained: Mapping[str, np.ndarray], seed: int) -> dict[str, Any]:
    """Compare a network, combined with evidence by the best share, with the best untrained row."""
    return compare("ndcg@10", {OWN: chosen_elsewhere(gains, seed), **untrained}, seed=seed)


def unclear(found: Mapping[str, Any]) -> bool:
    """Return whether a comparison is in favour of the network, but not clearly."""
    return found["difference"] > 0 and not found["better"]


def close_rows(untrained: Mapping[str, np.ndarray]) -> list[str]:
    """Return the rows that may be the best ones on more users.

    >>> close_rows({"evidence": np.full(3, 0.5), "popularity": np.full(3, 0.1), "ease": np.full(3, 0.48)})
    ['evidence', 'ease']
    """
    values = {name: float(own.mean()) for name, own in untrained.items()}
    return [name for name, value in values.items() if value >= CLOSE * max(values.values())]


def train_with_gap(
    recipe: Recipe, log: Log, settings: EvidenceSettings, epochs: float, deadline: float, say: Callable[[str], object]
) -> Run | None:
    """Train for a number of epochs on all events before the validation part, with those of its gap.

    The gap is not learnt where epochs and shares are chosen, so that validation is as far from the training events as
    the test is. The network that is kept learns it.

    Args:
        recipe: Settings of the training.
        log: The data.
        settings: Settings of the evidence.
        epochs: Number of epochs.
        deadline: Deadline on the clock `time.monotonic`.
        say: Receives lines of progress.

    Returns:
        The run, or None if there is not enough time.
    """
    changes = {
        "num_train_epochs": epochs,
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
    }
    training = {**recipe.training, **changes, "metric_for_best_model": None}
    arguments = dataclasses.replace(recipe.evaluation, validate="fresh")
    run = prepare(dataclasses.replace(recipe, evaluation=arguments, training=training), log=log)
    run.collator.evidence = evidence_of_loss(run, settings).scores
    budget = TimeBudget(deadline, say)
    finetune.fit(run, dict, [budget], without=(PrinterCallback, ProgressCallback))
    plain_forward(run.model)
    run.collator.evidence = None
    return None if budget.out_of_time or budget.planned is not None else run


def best_share(gains: Mapping[float, np.ndarray], where: np.ndarray | slice = slice(None)) -> float:
    """Return the share with the highest mean over the events in `where`."""
    return max(gains, key=lambda share: gains[share][where].mean())


def chosen_elsewhere(gains: Mapping[float, np.ndarray], seed: int) -> np.ndarray:
    """Return each event's value for the share that is best on the other half of the events, drawn by the seed.

    Choosing the best of several shares and measuring it on the same events would be biased upwards.

    >>> gains = {0.5: np.array([1.0, 1.0, 0.0, 0.0]), 1.0: np.array([0.0, 0.0, 1.0, 1.0])}
    >>> float(chosen_elsewhere(gains, 0).mean()) <= 0.5
    True
    """
    count = len(next(iter(gains.values())))
    half = np.random.default_rng(seed).permutation(count) < count // 2
    found = np.empty(count)
    for own in (half, ~half):
        other = ~own if (~own).any() else own
        found[own] = gains[best_share(gains, other)][own]
    return found


def batch_size(given: int, rows: int) -> int:
    """Return a smaller batch size if there are few rows.

    >>> batch_size(128, 20_000), batch_size(128, 800), batch_size(128, 40)
    (128, 50, 16)
    """
    return min(given, max(rows // STEPS_OF_AN_EPOCH, LEAST_BATCH))


__all__ = [
    "NETWORK_ONLY",
    "Outcome",
    "batch_size",
    "best_share",
    "chosen_elsewhere",
    "combined",
    "evidence_scores",
    "gains_of",
    "train_with_evidence",
    "train_with_gap",
]
