"""Reports: rankings, clicks, ratings and interactions of held-out events, for the model and the baselines."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas
import torch
from tqdm.auto import tqdm

from ...item_features_m6rec import Transitions
from ...model_cards.card import FAIRNESS
from ...modeling_m6rec import M6RecForRecommendation
from ...segment_cache_m6rec import SegmentCache
from ...tokenization import M6RecProcessor
from ...values_m6rec import IGNORE_INDEX
from ..config.arguments import EvaluationArguments, TaskArguments
from ..data.splits import Split, has_times, histories
from ..data.tasks import SCORED
from ..metrics import (
    coverage,
    interval_of,
    ndcg_gains,
    popularity_bias,
    ranking_report,
    resampled_means,
    target_ranks,
    top_items,
)
from ..rows.collator import CatalogueRows, M6RecDataCollator
from ..rows.examples import Candidates, Negatives, RequestWriter, read_requests, target_labels
from ..rows.held_out import all_events, before_and_in, drawn_users, eval_queries, learnt_before, rankings
from ..rows.item_likes import like_rates
from .fairness import Fields, fairness_report, fields_of
from .measures import MEASURES
from .verdicts import OWN, RULE, VERDICT, compare, differences

logger = logging.getLogger(__name__)
ROWS_AT_ONCE = 64
SCORES_AT_ONCE = 1 << 23
"""Maximum number of scores (users times items) in memory at once: 64 MB."""
LIKE_STRENGTH = 5.0
"""Weight of the overall mean, in examples, in the means of a user, an item or a history (not in the paper)."""
COMPARED_AT = 10
"""Cut-off of the NDCG for comparisons of model and baselines, if it is in `ks`; else the largest one."""
SHOWN_REPEATS = 5
"""Maximum number of users that a warning of repeated items names."""
FEW_EVENTS = 5
"""Histories with fewer events are reported separately."""
SHOWS_PROGRESS = 2000
"""Minimum number of rows for a progress bar."""


@dataclass(frozen=True)
class RankingExamples:
    """Held-out events, each ranked against the whole catalogue.

    Attributes:
        users: User ids of the U events; a user may occur more than once.
        rows: Encoded rows of the events; empty if no model is measured.
        histories: Catalogue rows that each user has met before, in order.
        targets: Catalogue rows of the held-out events.
        cold: U bool: the target has no learnt event.
        left_out: Ids of users who are not evaluated, since they have met the target before.
        transition: U bool: in learnt sequences the target is one or two steps from the history's last item.
        conditions: Conditions of the metrics: the `protocol`, and whether the validation part is `observed`.
        fields: The fields of `evaluation.fairness`; None if it names none.
        moments: Times of the events of each history, in seconds since 1970; NaN without times.
    """

    users: list[str]
    rows: list[dict[str, Any]]
    histories: list[np.ndarray]
    targets: np.ndarray
    cold: np.ndarray
    left_out: list[str] = field(default_factory=list)
    transition: np.ndarray | None = None
    conditions: dict[str, Any] = field(default_factory=dict)
    fields: Fields | None = None
    moments: list[np.ndarray] = field(default_factory=list)

    @cached_property
    def times(self) -> np.ndarray:
        """Time of the last event of each history, U, in seconds since 1970; NaN without times."""
        return np.array([own[-1] for own in self.moments])

    @cached_property
    def repeated(self) -> np.ndarray:
        """U bool: the user has met the target before."""
        return np.array([target in history for target, history in zip(self.targets, self.histories)], dtype=bool)

    @cached_property
    def subsets(self) -> dict[str, np.ndarray]:
        """Name -> U bool, for the subsets with separate metrics."""
        found = {"warm": ~self.cold, "cold": self.cold, "repeated": self.repeated}
        if self.transition is not None:
            found["seen_transition"] = self.transition & ~self.cold
            found["unseen_transition"] = ~self.transition & ~self.cold
        found["few_events"] = np.array([len(history) < FEW_EVENTS for history in self.histories], dtype=bool)
        return found


@dataclass(frozen=True)
class ScoringExamples:
    """Held-out events whose label or rating is predicted, and their negatives.

    Attributes:
        rows: Encoded rows: a user's history with candidates.
        user_ids: User ids of the N candidates.
        item_ids: Item ids of the N candidates.
        labels: N labels or ratings, or N x interactions, -100 if unknown.
        interactions: Names of parallel outputs, such as interactions.
        history_means: Mean label of each candidate's history, in the shape of the labels: the share of likes, or the
            mean rating, smoothed towards the overall mean as in `like_rates`; None with drawn negatives, since a
            history then holds positives only.
        negatives_per_event: Number of negatives drawn per event.
    """

    rows: list[dict[str, Any]]
    user_ids: np.ndarray
    item_ids: np.ndarray
    labels: np.ndarray
    interactions: list[str] = field(default_factory=list)
    history_means: np.ndarray | None = None
    negatives_per_event: int = 0


@dataclass(frozen=True)
class Scores:
    """U x M scores of a catalogue, computed for a slice of users at a time to bound memory.

    Attributes:
        of: Returns the scores of a slice of the users. Equal scores share a rank.
        settings: Settings chosen for the rule.
    """

    of: Callable[[slice], np.ndarray]
    settings: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, part: slice) -> np.ndarray:
        return self.of(part)


def ranking_examples(
    writer: RequestWriter,
    processor: M6RecProcessor | None,
    split: Split,
    part: str,
    arguments: EvaluationArguments,
    seed: int,
) -> RankingExamples:
    """Make the ranking examples of a part.

    With `exclude_seen` and `repeats: leave_out` an event of an item that the user has met before is not evaluated.

    Args:
        writer: Makes the requests.
        processor: Encodes them; None: no model is measured, and rows are empty.
        split: The parts.
        part: "valid" or "test".
        arguments: Selects the events to rank.
        seed: Seed of the draw of users.
    """
    everything = all_events(split)
    rows = np.array([writer.rows[item_id] for item_id in everything["item_id"]], dtype=int)
    found = rankings(split, part, arguments)
    drawn = set(drawn_users(list(dict.fromkeys(each.user_id for each in found)), arguments, seed))
    found = [each for each in found if each.user_id in drawn]
    left_out = []
    if arguments.exclude_seen and arguments.repeats == "leave_out":
        left_out = [each for each in found if rows[each.held_out[0]] in rows[each.history]]
        found = [each for each in found if rows[each.held_out[0]] not in rows[each.history]]
    read: list[dict[str, Any]] = []
    if processor is not None:
        kept = [(each.user_id, everything.iloc[each.history[-processor.max_events :]]) for each in found]
        requests = [writer.request(user, writer.events(frame)) for user, frame in kept]
        read = read_requests(processor, requests, "retrieval", f"Reading {part} users")
    sequences = learnt_sequences(writer, split, part, arguments)
    last = rows[[each.history[-1] for each in found]]
    targets = rows[[each.held_out[0] for each in found]]
    times = everything["timestamp"].to_numpy(dtype=float)
    users = [each.user_id for each in found]
    return RankingExamples(
        users,
        read,
        [rows[each.history] for each in found],
        targets,
        ~np.isin(targets, np.concatenate([np.empty(0, dtype=int), *sequences])),
        [each.user_id for each in left_out],
        Transitions.fit(sequences, len(writer.item_ids)).holds(last, targets),
        {"protocol": protocol_name(arguments, split), "observed": arguments.observe_validation and part == "test"},
        fields_of(arguments.fairness, writer, users) if arguments.fairness else None,
        [times[each.history] for each in found],
    )


def protocol_name(arguments: EvaluationArguments, split: Split) -> str:
    """Return the name of a split's protocol: published, shuffled or time.

    Parts named in the log count as published; so does a log without times, whose order is kept.
    """
    if arguments.protocol:
        return arguments.protocol
    if arguments.split == "time":
        return "time"
    return "shuffled" if arguments.split == "leave-one-out" and has_times(split.test) else "published"


def learnt_sequences(
    writer: RequestWriter, split: Split, part: str, arguments: EvaluationArguments
) -> list[np.ndarray]:
    """Return each user's events that may be counted before a part is predicted, as catalogue rows, in order."""
    learnt = learnt_before(split, part, arguments.observe_validation)
    rows = np.array([writer.rows[item_id] for item_id in learnt["item_id"]], dtype=int)
    return [rows[places] for places in histories(learnt).values()]


def learnt_times(split: Split, part: str, arguments: EvaluationArguments) -> list[np.ndarray]:
    """Return the times of the events of `learnt_sequences`, in seconds since 1970; NaN without times."""
    learnt = learnt_before(split, part, arguments.observe_validation)
    times = learnt["timestamp"].to_numpy(dtype=float)
    return [times[places] for places in histories(learnt).values()]


def count_repeats(split: Split, part: str, arguments: EvaluationArguments) -> tuple[int, int]:
    """Count the events that `ranking_examples` ranks in a part, and those of items that their users have met.

    Returns:
        The number of events of items that the user has met before, and the number of all events.
    """
    items, _ = pandas.factorize(all_events(split)["item_id"])
    found = rankings(split, part, arguments)
    return sum(bool((items[each.history] == items[each.held_out]).any()) for each in found), len(found)


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
    """Make the examples of a scoring task in a part.

    Negatives are drawn from the items that the user meets in no part; they are the same for every model.
    """
    everything, per_event = all_events(split), _negatives_per_event(task, arguments)
    negatives = Negatives(writer, everything, per_event, seed) if per_event else None
    candidates = Candidates(writer, everything, [task], arguments, negatives)
    values = candidates.labels[task]
    overall = _means(target_labels(before_and_in(split, part)[0], task, arguments))
    requests, users, rows, labels, means = [], [], [], [], []
    for question in eval_queries(split, part, candidates.known, processor.max_events, evaluation, seed):
        targets, own = candidates.of(question.held_out)
        history = writer.events(everything.iloc[question.history])
        requests.append(writer.request(question.user_id, history, writer.candidates(targets)))
        users += [question.user_id] * len(targets)
        rows += [writer.item_ids[row] for row in targets]
        labels.append(own[task])
        means += [_means(values[question.history], overall, LIKE_STRENGTH)] * len(targets)
    return ScoringExamples(
        read_requests(processor, requests, task, f"Reading {part} candidates"),
        np.array(users, dtype=object),
        np.array(rows, dtype=object),
        np.concatenate(labels) if labels else values[:0],
        list(SCORED[task].names(arguments)),
        None if per_event else np.array(means),
        per_event,
    )


def _negatives_per_event(task: str, arguments: TaskArguments) -> int:
    return arguments.negatives_per_event if SCORED[task].negatives else 0


def _means(labels: np.ndarray, overall: Any = 0.0, strength: float = 0.0) -> np.ndarray:
    """Mean of the known labels per interaction, smoothed towards `overall`; NaN without labels."""
    labelled = labels != IGNORE_INDEX
    with np.errstate(invalid="ignore"):
        return ((labels * labelled).sum(0) + strength * overall) / (labelled.sum(0) + strength)


@torch.no_grad()
def catalogue_vectors(
    model: M6RecForRecommendation,
    catalogue: CatalogueRows,
    collator: M6RecDataCollator,
    bf16: bool = False,
    cache: SegmentCache | None = None,
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
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            vectors.append(model.embed_items(ids, mask, memory_ids=memory, segment_cache=cache).float().cpu())
    return torch.cat(vectors)[torch.from_numpy(np.argsort(order))]


@torch.no_grad()
def answers(
    model: M6RecForRecommendation,
    rows: Sequence[dict[str, Any]],
    collator: M6RecDataCollator,
    field: str,
    bf16: bool = False,
    cache: SegmentCache | None = None,
    part: Callable[[torch.Tensor], torch.Tensor] = torch.clone,
) -> list[torch.Tensor]:
    """Run rows through the model in batches of similar length, and return a part of the output's `field` for each row.

    `part` must not return a view, which would keep the whole batch in memory.
    """
    model.eval()
    how: dict[str, Any] = {} if cache is None else {"plan": "cached", "segment_cache": cache}
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]["input_ids"]))
    found: list[Any] = [None] * len(rows)
    names = ("input_ids", "item_embedding_ids")
    for start in tqdm(
        range(0, len(order), ROWS_AT_ONCE), desc="Evaluating", disable=True if len(rows) < SHOWS_PROGRESS else None
    ):
        batch_rows = order[start : start + ROWS_AT_ONCE]
        batch = collator([{name: rows[row][name] for name in names if name in rows[row]} for row in batch_rows])
        batch = {name: value.to(model.device) for name, value in batch.items()}
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            out = getattr(model(**batch, **how, return_logits=False), field)
        for row, value in zip(batch_rows, out.float().cpu()):
            found[row] = part(value)
    return found


def user_vectors(
    model: M6RecForRecommendation,
    rows: Sequence[dict[str, Any]],
    collator: M6RecDataCollator,
    bf16: bool = False,
    cache: SegmentCache | None = None,
) -> torch.Tensor:
    """Embed users as of the end of their histories: U x D."""
    return torch.stack(answers(model, rows, collator, "user_vectors", bf16, cache, _last_place))


def _last_place(vectors: torch.Tensor) -> torch.Tensor:
    """Return the last valid of a row's E x D vectors: NaN follows it, and a diverged model gives only NaN."""
    return vectors[max(int(vectors.isfinite().all(-1).sum()) - 1, 0)].clone()


def rank_catalogue(
    model: M6RecForRecommendation,
    examples: RankingExamples,
    catalogue: CatalogueRows,
    collator: M6RecDataCollator,
    bf16: bool,
    cache: SegmentCache | None = None,
) -> Scores:
    """Score the whole catalogue for each user: U x M cosines."""
    items = catalogue_vectors(model, catalogue, collator, bf16, cache)
    users = user_vectors(model, examples.rows, collator, bf16, cache)
    return Scores(lambda part: (users[part] @ items.T).numpy().astype(np.float64))


def _ranked(
    scores: Scores | np.ndarray, examples: RankingExamples, exclude_seen: bool, k: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Rank each target, and list each user's first k items."""
    ranks, top = [], []
    for part in _slices(scores, len(examples.users)):
        table, seen = scores[part], examples.histories[part] if exclude_seen else None
        ranks.append(target_ranks(table, examples.targets[part], seen))
        top += top_items(table, k, seen)
    return np.concatenate(ranks) if ranks else np.empty(0), top


def _slices(scores: Scores | np.ndarray, users: int) -> Iterator[slice]:
    """Yield slices of the users whose scores fit the memory together."""
    num_items = scores[:1].shape[1] if users else 1
    at_once = max(SCORES_AT_ONCE // num_items, 1)
    yield from (slice(start, start + at_once) for start in range(0, users, at_once))


def ranks_of(scores: Scores | np.ndarray, examples: RankingExamples, exclude_seen: bool) -> np.ndarray:
    """Rank each target: U."""
    return ranks_of_sums([scores], {0: [1.0]}, examples, exclude_seen)[0]


def ranks_of_sums(
    scores: Sequence[Scores | np.ndarray],
    weights: Mapping[Any, Sequence[float]],
    examples: RankingExamples,
    exclude_seen: bool,
) -> dict[Any, np.ndarray]:
    """Rank each target by weighted sums of scores, each of which is computed once.

    Args:
        scores: K times U x M scores.
        weights: Name -> K weights.
        examples: The U users.
        exclude_seen: Leave out the items of a user's history.

    Returns:
        Name -> U ranks.
    """
    ranks: dict[Any, list[np.ndarray]] = {name: [np.empty(0)] for name in weights}
    for part in _slices(scores[0], len(examples.users)):
        tables, seen = [own[part] for own in scores], examples.histories[part] if exclude_seen else None
        for name, own in weights.items():
            used = [weight * table if weight != 1 else table for weight, table in zip(own, tables) if weight]
            ranks[name].append(target_ranks(sum(used[1:], used[0]), examples.targets[part], seen))
    return {name: np.concatenate(several) for name, several in ranks.items()}


def ranking_rows(
    scores: Mapping[str, Scores | np.ndarray],
    examples: RankingExamples,
    counts: np.ndarray,
    arguments: EvaluationArguments,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Measure model and baselines: name -> metrics.

    Each row has intervals, its `differences` to all other rows with paired intervals, its `difference` to the rule
    `neighbours_and_words`, and its chosen `settings`; the model's row also has the comparison with the best baseline.
    """
    rows, gains = {}, {}
    k = COMPARED_AT if COMPARED_AT in arguments.ks else max(arguments.ks)
    for who, own in scores.items():
        ranks, top = _ranked(own, examples, arguments.exclude_seen, max(arguments.ks))
        rows[who] = _ranking_row(ranks, top, examples, counts, arguments)
        gains[who] = _gains(ranks, arguments)
        if examples.fields is not None:
            compared = {name: gains[who][name] for name in (f"recall@{k}", f"ndcg@{k}")}
            first = [items[:k] for items in top]
            found = fairness_report(first, compared, examples.users, examples.fields, counts, seed)
            rows[who][FAIRNESS] = {"top": k, **found}
        if isinstance(own, Scores) and own.settings:
            rows[who]["settings"] = own.settings
    groups = examples.users if len(set(examples.users)) < len(examples.users) else None
    resampled = _resampled(gains, groups, seed)
    shown = (f"recall@{k}", f"ndcg@{k}")
    known = {who: {name: own[name] for name in shown} for who, own in resampled.items()}
    others = differences(rows, known)
    for who, row in rows.items():
        row["intervals"] = {name: interval_of(means) for name, means in resampled[who].items()}
        row["differences"] = others[who]
        if RULE in rows:
            none = {name: {"value": 0.0, "interval": [0.0, 0.0]} for name in shown}
            row["difference"] = {"to": RULE, **others[who].get(RULE, none)}
    if OWN in rows and len(rows) > 1:
        ndcg = f"ndcg@{k}"
        drawn = {who: own[ndcg] for who, own in resampled.items()}
        rows[OWN][VERDICT] = compare(ndcg, {who: own[ndcg] for who, own in gains.items()}, groups, resampled=drawn)
    return rows


def _gains(ranks: np.ndarray, arguments: EvaluationArguments) -> dict[str, np.ndarray]:
    """Return each event's value of each metric, whose mean is the metric."""
    found = {f"recall@{k}": (ranks <= k).astype(float) for k in arguments.ks}
    return found | {f"ndcg@{k}": ndcg_gains(ranks, k) for k in arguments.ks} | {"mrr": 1 / ranks}


def _resampled(
    gains: Mapping[str, Mapping[str, np.ndarray]], groups: Sequence[str] | None, seed: int
) -> dict[str, dict[str, np.ndarray]]:
    """Return name -> metric -> its value on each bootstrap resample of the users, the same resamples for all."""
    columns = [(who, name) for who, own in gains.items() for name in own]
    means = resampled_means(np.column_stack([gains[who][name] for who, name in columns]), groups, seed=seed)
    found: dict[str, dict[str, np.ndarray]] = {who: {} for who in gains}
    for (who, name), own in zip(columns, means.T):
        found[who][name] = own
    return found


def ranking_scores_report(
    scores: Scores | np.ndarray, examples: RankingExamples, counts: np.ndarray, arguments: EvaluationArguments
) -> dict[str, Any]:
    """Measure U x M scores: recall, NDCG, MRR, coverage and popularity bias.

    Warm, cold and repeated items also have separate metrics; for repeated items the report states their number and
    how they are counted.
    """
    ranks, top = _ranked(scores, examples, arguments.exclude_seen, max(arguments.ks))
    return _ranking_row(ranks, top, examples, counts, arguments)


def _ranking_row(
    ranks: np.ndarray,
    top: list[np.ndarray],
    examples: RankingExamples,
    counts: np.ndarray,
    arguments: EvaluationArguments,
) -> dict[str, Any]:
    report: dict[str, Any] = ranking_report(ranks, tuple(arguments.ks), examples.subsets)
    report[f"coverage@{max(arguments.ks)}"] = coverage(top, len(counts))
    report[f"popularity_bias@{max(arguments.ks)}"] = popularity_bias(top, counts)
    seen = "out" if arguments.exclude_seen else "in"
    return {**report, "seen": seen, **examples.conditions, **_repeats(examples, arguments)}


def _repeats(examples: RankingExamples, arguments: EvaluationArguments) -> dict[str, Any]:
    """Return the number of held-out events of items that their users have met before, and how they are counted."""
    count = int(examples.repeated.sum()) + len(examples.left_out)
    if not count:
        return {}
    if examples.left_out:
        return {"repeats": count, "repeats_counted": "not at all"}
    return {"repeats": count, "repeats_counted": "as misses" if arguments.exclude_seen else "as others"}


def warn_of_repeats(examples: RankingExamples, arguments: EvaluationArguments) -> None:
    """Warn of held-out events whose items are excluded from the ranking, with advice."""
    users = examples.left_out or [user for user, repeated in zip(examples.users, examples.repeated) if repeated]
    if not users or not arguments.exclude_seen:
        return
    counted = "are left out" if examples.left_out else "count as misses"
    named = ", ".join(map(repr, users[:SHOWN_REPEATS])) + (", ..." if len(users) > SHOWN_REPEATS else "")
    logger.warning(
        "%d of %d held-out events are of items that their users have met before (users %s), and seen items are left "
        "out, as the pipeline does by default: these events %s. A model trained with evaluation.exclude_seen=false "
        "recommends seen items too",
        len(users),
        len(examples.users) + len(examples.left_out),
        named,
        counted,
    )


def ranking_intervals(ranks: np.ndarray, arguments: EvaluationArguments, seed: int) -> dict[str, list[float]]:
    """Return 95% bootstrap intervals, over users, of the metrics of their targets' ranks: metric -> [low, high]."""
    means = _resampled({OWN: _gains(ranks, arguments)}, None, seed)[OWN]
    return {name: interval_of(own) for name, own in means.items()}


def predictions(
    model: M6RecForRecommendation,
    examples: ScoringExamples,
    task: str,
    collator: M6RecDataCollator,
    bf16: bool = False,
    cache: SegmentCache | None = None,
) -> np.ndarray:
    """Return the N candidates' click probabilities or ratings, or N x interactions probabilities."""
    scores = answers(model, examples.rows, collator, "scores", bf16, cache)
    lengths = [row["input_ids"].count(model.config.bos_token_id) for row in examples.rows]
    found = [model.read_scores(own[:length], task) for own, length in zip(scores, lengths)]
    return torch.cat(found).double().numpy()


def scoring_report(predicted: np.ndarray, examples: ScoringExamples, task: str) -> dict[str, Any]:
    """Measure predictions by the measure of the task: RMSE and MAE of numbers, AUC and others of probabilities."""
    measure, names = MEASURES[SCORED[task].measure], examples.interactions or [task]
    report = measure.report(predicted, examples.labels, examples.user_ids, names)
    drawn = {"negatives_per_event": examples.negatives_per_event, "negatives": "uniform"}
    return {**report, **(drawn if examples.negatives_per_event else {})}


def scoring_rows(
    predicted: Mapping[str, np.ndarray], examples: ScoringExamples, task: str, seed: int
) -> dict[str, dict[str, Any]]:
    """Measure predictions of model and baselines: name -> metrics; the model's row also has the comparison."""
    rows = {who: scoring_report(own, examples, task) for who, own in predicted.items()}
    known = examples.labels != IGNORE_INDEX
    if not known.any():
        return rows
    measure = MEASURES[SCORED[task].measure]
    errors = {who: measure.errors(own, examples.labels) for who, own in predicted.items()}
    users = np.broadcast_to(examples.user_ids.reshape(-1, *[1] * (known.ndim - 1)), known.shape)[known]
    rows[OWN][VERDICT] = compare(measure.compared_by, errors, users, seed)
    return rows


def scoring_baselines(
    split: Split,
    writer: RequestWriter,
    examples: ScoringExamples,
    part: str,
    task: str,
    arguments: TaskArguments,
    seed: int,
) -> dict[str, np.ndarray]:
    """Predict the same candidates by means of known labels: the user's, the item's, and the request's own history's.

    Known are the events of the earlier parts and, with drawn negatives, their negatives, so that `item_mean` is the
    item's popularity as a probability. `history_mean` is the mean of the candidate's own history (with `rolling` it
    holds earlier held-out events), `history_and_item` the mean of both.
    """
    known, _ = before_and_in(split, part)
    per_event = _negatives_per_event(task, arguments)
    negatives = Negatives(writer, known, per_event, seed) if per_event else None
    candidates = Candidates(writer, known, [task], arguments, negatives)
    rows, users, labels = [], [], []
    for user_id, places in histories(known).items():
        own_rows, own = candidates.of(places)
        rows.append(own_rows)
        users += [user_id] * len(own_rows)
        labels.append(own[task])
    item_ids = np.array(writer.item_ids, dtype=object)[np.concatenate(rows)]
    groups = {
        "user_mean": (np.array(users, dtype=object), examples.user_ids),
        "item_mean": (item_ids, examples.item_ids),
    }
    means = {name: _rates(np.concatenate(labels), given, predicted) for name, (given, predicted) in groups.items()}
    if examples.history_means is not None:
        means["history_mean"] = examples.history_means
        means["history_and_item"] = (means["history_mean"] + means["item_mean"]) / 2
    return means


def _rates(labels: np.ndarray, groups: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """`like_rates` of the known labels, per interaction."""
    if labels.ndim == 2:
        return np.stack([_rates(column, groups, predicted) for column in labels.T], 1)
    labelled = labels != IGNORE_INDEX
    return like_rates(labels[labelled], groups[labelled], predicted, LIKE_STRENGTH)


__all__ = [
    "RankingExamples",
    "Scores",
    "ScoringExamples",
    "catalogue_vectors",
    "count_repeats",
    "learnt_sequences",
    "learnt_times",
    "predictions",
    "protocol_name",
    "rank_catalogue",
    "ranking_examples",
    "ranking_intervals",
    "ranking_rows",
    "ranking_scores_report",
    "ranks_of",
    "ranks_of_sums",
    "scoring_baselines",
    "scoring_examples",
    "scoring_report",
    "scoring_rows",
    "user_vectors",
    "warn_of_repeats",
]
