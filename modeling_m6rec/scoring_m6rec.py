"""Requests as rows of ids, and what a model says of them: scores of targets, users, and what each event adds.

Shapes: B rows, T tokens, N targets of a request, E events of a request, I values of a score (1, or one an interaction),
D = embedding_dim.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from .items_m6rec import Model
from .layout_m6rec import layout
from .segment_cache_m6rec import SegmentCache

TARGETS_A_ROW = 100
"""Targets that share a row; more would make tables that grow with their square."""
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

    def rows(self, chosen: Sequence[int]) -> list[Tokens]:
        """Make rows of the source with the chosen targets; targets do not see each other."""
        starts = range(0, len(chosen), TARGETS_A_ROW)
        parts = [chosen[start : start + TARGETS_A_ROW] for start in starts]
        return [self.source.followed_by([self.targets[index] for index in part]) for part in parts]


class Scorer:
    """Reads requests with a model.

    The outermost model's `forward` is called: on a PeftModel with prefix or prompt tuning nothing else has the virtual
    tokens, and only the flat plan takes them.

    Args:
        model: The model, possibly within a PeftModel.
        processor: Makes the rows.
        segment_cache: Where segment states are kept.
    """

    def __init__(self, model: Model, processor: Any, segment_cache: SegmentCache) -> None:
        self.model, self.processor = model, processor
        self.config = model.config
        virtual = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
        self.plan = {} if virtual else {"plan": "cached", "segment_cache": segment_cache}

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
        """Score all targets of each request: N x I each."""
        rows = [each.rows(range(len(each.targets))) for each in told]
        found = iter(self._target_values([row for several in rows for row in several], task))
        return [torch.cat([next(found) for _ in several]) for several in rows]

    def users(self, told: Sequence[Told]) -> torch.Tensor:
        """Return the vector of each user: B x D."""
        return torch.stack(list(self._user_vectors([each.source for each in told])))

    def scores_without(self, told: Told, chosen: Sequence[int], task: str) -> torch.Tensor:
        """Score chosen targets as if one event had not been, for each event: E x N x I."""
        masked = []
        rows = told.rows(chosen)
        count = len(told.events)
        hidden = [event for event in range(1, count + 1) for _ in rows]
        found = iter(self._target_values(rows * count, task, hidden))
        for _ in range(count):
            masked.append(torch.cat([next(found) for _ in rows]))
        return torch.stack(masked)

    def users_without(self, told: Told) -> torch.Tensor:
        """Return the user's vector as if one event had not been, for each event: E x D."""
        count = len(told.events)
        return torch.stack(list(self._user_vectors([told.source] * count, range(1, count + 1))))

    def _target_values(
        self, rows: Sequence[Tokens], task: str, hidden: Sequence[int] | None = None
    ) -> Iterator[torch.Tensor]:
        for part, out in self._read(rows, hidden, task == "plausibility"):
            values = out.plausibility if task == "plausibility" else self.model.read_scores(out.scores, task)
            values = values if values.dim() == 3 else values[..., None]
            for row, own in zip(part, values.float().cpu()):
                yield own[: row.ids.count(self.config.bos_token_id)]

    def _user_vectors(self, rows: Sequence[Tokens], hidden: Sequence[int] | None = None) -> Iterator[torch.Tensor]:
        for _, out in self._read(rows, hidden, False):
            if out.user_vectors is None:
                raise ValueError(
                    "task 'retrieval' needs a model with segment layers (num_joint_layers below num_hidden_layers): "
                    "score candidates by another task"
                )
            for vectors in out.user_vectors.float().cpu():
                yield vectors[vectors.isfinite().all(-1)][-1]  # the last place that the row has

    def _read(
        self, rows: Sequence[Tokens], hidden: Sequence[int] | None, plausibility: bool
    ) -> Iterator[tuple[Sequence[Tokens], Any]]:
        """Read rows, a bounded number at once. `hidden` says for each row the event that is not seen (0 = none)."""
        for part in _batches(rows):
            features = [{"input_ids": row.ids, "item_ids": row.memory} for row in rows[part]]
            batch = {name: value.to(self.model.device) for name, value in self.processor.pad(features).items()}
            if hidden is not None:
                event = layout(batch["input_ids"], batch["attention_mask"], self.config).event
                unseen = torch.tensor(hidden[part], device=event.device)[:, None]
                batch["hidden_events"] = (event == unseen) & (event > 0)
            yield rows[part], self.model(**batch, **self.plan, return_logits=False, return_plausibility=plausibility)


def _batches(rows: Sequence[Tokens]) -> Iterator[slice]:
    """Cut rows into batches of at most TOKENS_AT_ONCE padded tokens, or of one row."""
    start = width = 0
    for index, row in enumerate(rows):
        width = max(width, len(row.ids))
        if index > start and (index + 1 - start) * width > TOKENS_AT_ONCE:
            yield slice(start, index)
            start, width = index, len(row.ids)
    if len(rows) > start:
        yield slice(start, len(rows))


__all__ = ["Scorer", "Told"]
