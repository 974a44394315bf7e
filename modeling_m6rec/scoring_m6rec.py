"""Requests as rows of ids, and what a model says of them: scores of targets, users, and what each event adds.

Shapes: B rows, T tokens, N targets of a request, E events of a request, I values of a score (1, or one an interaction),
D = vector_width.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from typing import Any, NamedTuple

import torch
from transformers.utils import logging

from .configuration_m6rec import M6RecConfig
from .items_m6rec import Model
from .layout_m6rec import Layout, Picked, layout
from .segment_cache_m6rec import SegmentCache
from .user_states_m6rec import UserStates

logger = logging.get_logger(__name__)

TARGETS_A_ROW = 100
"""Targets that share a row of the flat plan, whose masks grow with their square."""
TOKENS_AT_ONCE = 16384
"""Tokens of rows that are read together; bounds memory."""


class Tokens(NamedTuple):
    """A stretch of a row: its ids, and beside each its row of item memory."""

    ids: list[int]
    memory: list[int]

    def followed_by(self, others: Sequence["Tokens"]) -> "Tokens":
        """Return this stretch and others after it."""
        parts = [self, *others]
        return Tokens([i for part in parts for i in part.ids], [row for part in parts for row in part.memory])


@dataclass
class Told:
    """One request as the model reads it: the source, the targets, and the texts of the events (the last ones)."""

    source: Tokens
    targets: list[Tokens]
    events: list[str]

    confidence: float | None = None
    """How sure all answers must be for the last joint layers to be left out; None = these are never left out."""
    exit_layer: int | None = None
    """The joint layer after which the answers were read; None = as the scorer says."""

    def rows(self, chosen: Sequence[int], most_targets: int | None, most_tokens: int | None) -> list[Tokens]:
        """Make rows of the source with the chosen targets; targets do not see each other."""
        parts: list[list[Tokens]] = []
        tokens = 0
        for target in (self.targets[index] for index in chosen):
            tokens += len(target.ids)
            full = bool(parts) and most_targets is not None and len(parts[-1]) == most_targets
            if not parts or full or (most_tokens is not None and tokens > most_tokens):
                parts.append([])
                tokens = len(self.source.ids) + len(target.ids)
            parts[-1].append(target)
        return [self.source.followed_by(part) for part in parts]


class Scorer:
    """Reads requests with a model.

    The outermost model's `forward` is called: on a PeftModel with prefix or prompt tuning nothing else has the virtual
    tokens, and only the flat plan takes them.

    Args:
        model: The model, possibly within a PeftModel.
        processor: Makes the rows.
        segment_cache: Where segment states are kept.
        user_states: Where users are kept; None = they are not.
        exit_layer: How many joint layers are read; None = all.
    """

    def __init__(
        self,
        model: Model,
        processor: Any,
        segment_cache: SegmentCache,
        user_states: UserStates | None = None,
        exit_layer: int | None = None,
    ) -> None:
        self.model, self.processor, self.segment_cache, self.exit_layer = model, processor, segment_cache, exit_layer
        self.config = model.config
        self.virtual = bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))
        self.plan = {"plan": "cached", "segment_cache": segment_cache, "user_states": user_states}
        self.plan = {} if self.virtual else self.plan

    def check(self, task: str, confidence: Any) -> None:
        """Refuse what cannot be stopped early, and warn of exits that were not trained.

        Args:
            task: What requests are read for.
            confidence: Their `exit_confidence`, None if they have none.
        """
        trained = self.config.exit_layers or []
        if confidence is None:
            early = self.exit_layer not in (None, self.config.num_joint_layers)
            if early and (task not in self.config.score_slices or self.exit_layer not in trained):
                logger.warning_once(
                    f"exit_layer={self.exit_layer} was not trained for task {task!r}: exit_layers={trained} of the "
                    "configuration says after which joint layers scores were trained as well"
                )
            return
        check_confidence(confidence)
        if self.exit_layer is not None:
            raise ValueError(f"exit_layer={self.exit_layer} and exit_confidence={confidence} both say where to stop")
        if task not in self.config.score_slices or task == "rating" and self.config.rating_loss == "regression":
            raise ValueError(
                f"exit_confidence={confidence}: the answers to task {task!r} are no probabilities of this model, so "
                "none is sure: leave it out, or give exit_layer"
            )
        if self.virtual:
            raise ValueError(
                f"exit_confidence={confidence}: with prefix or prompt tuning all requests of a batch are read equally "
                "deep: give exit_layer"
            )
        if not trained:
            logger.warning_once(
                f"exit_confidence={confidence}: no joint layer but the last was trained to score (exit_layers of the "
                "configuration); each is asked all the same"
            )

    def tell(self, requests: Sequence[Any], task: str) -> list[Told]:
        """Read requests for a task."""
        return [self._told(reading) for reading in self.processor.read_many(requests, task)]

    def _told(self, reading: Any) -> Told:
        ids = reading.input_ids
        starts = [index for index, token in enumerate(ids) if token == self.config.bos_token_id]
        cuts = pairwise([0, *starts, len(ids)])
        source, *targets = [Tokens(ids[start:end], reading.item_ids[start:end]) for start, end in cuts]
        kinds = set(self.config.kind_token_ids.values())
        events: list[list[str]] = []
        for kind, text in reading.segments[: sum(token in kinds for token in source.ids)]:
            if kind == "event":
                events.append([text])
            elif events and kind in ("item", "text"):
                events[-1].append(text)
        return Told(source, targets, [" ".join(texts) for texts in events])

    def scores(self, told: Sequence[Told], task: str) -> list[torch.Tensor]:
        """Score all targets of each request, N x I each; and note the exit of those that name a confidence."""
        rows: list[Tokens] = []
        owners: list[int] = []
        for number, each in enumerate(told):
            own = self._rows(each, range(len(each.targets)))
            rows += own
            owners += [number] * len(own)
        limits = [told[number].confidence for number in owners]
        parts: list[list[torch.Tensor]] = [[] for _ in told]
        for number, (values, exit_layer) in zip(owners, self._target_values(rows, task, limits=limits)):
            parts[number].append(values)
            told[number].exit_layer = exit_layer
        return [torch.cat(several) for several in parts]

    def users(self, told: Sequence[Told]) -> torch.Tensor:
        """Return the vector of each user: B x D."""
        return self._user_vectors([each.source for each in told])

    def scores_without(self, told: Told, chosen: Sequence[int], task: str) -> torch.Tensor:
        """Score chosen targets as if one event had not been, for each event: E x N x I."""
        rows, count = self._rows(told, chosen), len(told.events)
        hidden = [event for event in range(1, count + 1) for _ in rows]
        found = iter(self._target_values(rows * count, task, hidden, exit_layer=told.exit_layer))
        return torch.stack([torch.cat([next(found)[0] for _ in rows]) for _ in range(count)])

    def users_without(self, told: Told) -> torch.Tensor:
        """Return the user's vector as if one event had not been, for each event: E x D."""
        count = len(told.events)
        return self._user_vectors([told.source] * count, range(1, count + 1))

    def _rows(self, told: Told, chosen: Sequence[int]) -> list[Tokens]:
        if self.virtual:
            return told.rows(chosen, TARGETS_A_ROW, None)
        # Answers that are decided together are read together.
        return told.rows(chosen, None, TOKENS_AT_ONCE if told.confidence is None else None)

    def _target_values(
        self,
        rows: Sequence[Tokens],
        task: str,
        hidden: Sequence[int] | None = None,
        limits: Sequence[float | None] = (),
        exit_layer: int | None = None,
    ) -> list[tuple[torch.Tensor, int | None]]:
        """Return N x I values of each row's targets, and the exit they were read at where `limits` decide it."""
        found: list[Any] = [None] * len(rows)
        options = {"return_plausibility": task == "plausibility", "exit_layer": exit_layer or self.exit_layer}
        options["return_vectors"] = False
        decision = _Decision(self.model, task, limits) if any(limits) else None
        for part, out in self._read(rows, hidden, decision, options):
            values = out.plausibility if task == "plausibility" else self.model.read_scores(out.scores, task)
            values = values if values.dim() == 3 else values[..., None]
            exits = [None] * len(part) if out.exit_layers is None else out.exit_layers.tolist()
            for row, own, last in zip(part, values.float().cpu(), exits):
                found[row] = own[: rows[row].ids.count(self.config.bos_token_id)], last
        return found

    def _user_vectors(self, rows: Sequence[Tokens], hidden: Sequence[int] | None = None) -> torch.Tensor:
        found: list[Any] = [None] * len(rows)
        for part, out in self._read(rows, hidden, None, {"exit_layer": self.exit_layer}):
            if out.user_vectors is None:
                raise ValueError(
                    "task 'retrieval' needs a model with segment layers (num_joint_layers below num_hidden_layers): "
                    "score candidates by another task"
                )
            for row, vectors in zip(part, out.user_vectors.float().cpu()):
                places = vectors[vectors.isfinite().all(-1)]
                if not len(places):
                    raise ValueError(
                        "user vectors hold NaN: the model's weights are damaged, or too large for its number type"
                    )
                found[row] = places[-1]  # the last place that the row has
        return torch.stack(found)

    def _read(
        self,
        rows: Sequence[Tokens],
        hidden: Sequence[int] | None,
        decision: "_Decision | None",
        options: dict[str, Any],
    ) -> Iterator[tuple[list[int], Any]]:
        """Read rows, those of like length together and a bounded number at once; also say which they are.

        `hidden` says for each row the event that is not seen (0 = none).
        """
        order = sorted(range(len(rows)), key=lambda row: len(rows[row].ids))
        for part in _batches(order, rows):
            features = [{"input_ids": rows[row].ids, "item_ids": rows[row].memory} for row in part]
            batch = {name: value.to(self.model.device) for name, value in self.processor.pad(features).items()}
            if hidden is not None:
                event = layout(batch["input_ids"], batch["attention_mask"], self.config).event
                unseen = torch.tensor([hidden[row] for row in part], device=event.device)[:, None]
                batch["hidden_events"] = (event == unseen) & (event > 0)
            if decision is not None:
                batch["decide"] = decision.of(batch["input_ids"], part)
            yield part, self.model(**batch, **self.plan, return_logits=False, **options)


class _Decision(NamedTuple):
    """Says after an exit which rows are decided: all answers as sure as the row's limit asks."""

    model: Model
    task: str
    limits: Sequence[float | None]
    """Of each row; from 1 up, or None, it is never decided."""

    def of(
        self, ids: torch.Tensor, part: Sequence[int]
    ) -> Callable[[torch.Tensor, Picked, Layout, list[int]], torch.Tensor]:
        """Decide for a batch of B x T ids, which are these rows."""
        limits = torch.tensor([math.inf if (self.limits[row] or 1) >= 1 else self.limits[row] for row in part])

        def decide(states: torch.Tensor, kept: Picked, lay: Layout, rows: list[int]) -> torch.Tensor:
            chosen = kept.of(ids[rows], self.model.config.pad_token_id)
            sure = confidence(self.model.score_logits(states, chosen, lay), self.task, self.model.config)
            return sure >= limits[rows].to(sure.device)

        return decide


def confidence(logits: torch.Tensor, task: str, config: M6RecConfig) -> torch.Tensor:
    """Say how sure the least sure answer of each row is: B x N x S score logits (NaN = no target) -> B.

    Of a click or an interaction it is the probability of the likelier of yes and no, of a rating that of the likeliest.
    """
    own = logits[..., config.score_slices[task]].float()
    if task == "interaction":
        sure = own.abs().sigmoid().amin(-1)
    else:
        sure = own.softmax(-1).amax(-1)
    return sure.nan_to_num(math.inf).amin(1)


def check_confidence(value: Any) -> None:
    """Refuse an `exit_confidence` that is no positive number; None is none."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if value is not None and not (number and value > 0):
        raise ValueError(
            f"exit_confidence={value!r}: give a probability from which an answer is sure (1 and more = never), or None"
        )


def _batches(order: Sequence[int], rows: Sequence[Tokens]) -> Iterator[list[int]]:
    """Cut rows into batches of at most TOKENS_AT_ONCE padded tokens, or of one row."""
    batch: list[int] = []
    width = 0
    for row in order:
        width = max(width, len(rows[row].ids))
        if batch and (len(batch) + 1) * width > TOKENS_AT_ONCE:
            yield batch
            batch, width = [], len(rows[row].ids)
        batch.append(row)
    if batch:
        yield batch


__all__ = ["Scorer", "Told", "check_confidence", "confidence"]
