"""Batches of rows: padding by the processor, and the negatives of retrieval."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...configuration_m6rec import M6RecConfig
from ...layout_m6rec import layout, user_places
from ...tokenization import M6RecProcessor
from ...values_m6rec import IGNORE_INDEX, label_field
from ..config.arguments import TaskArguments


def label_names(config: M6RecConfig) -> list[str]:
    """Return the names of all labels that `M6RecForRecommendation.forward` takes."""
    return ["labels", *map(label_field, config.scored), "retrieval_labels"]


NOT_READ = ("next_items", "number", "events")
"""Keys of rows that are not arguments of `forward`."""


@dataclass(frozen=True)
class CatalogueRows:
    """The encoded items of a catalogue, one entry per catalogue row.

    Attributes:
        input_ids: Ids of [ITEM] ... [SEG].
        memory_ids: Rows of the item embeddings, 0 = none.
        counts: Training events of each item.
    """

    input_ids: list[list[int]]
    memory_ids: list[int]
    counts: np.ndarray

    @classmethod
    def read(cls, items: Sequence[dict[str, Any]], counts: np.ndarray, processor: M6RecProcessor) -> "CatalogueRows":
        """Encode items with a processor."""
        return cls(processor.encode_items(items), [processor.item_row(item) for item in items], counts)


class M6RecDataCollator:
    """Makes a batch of rows.

    `next_items` of rows become `retrieval_labels`, and the batch then holds the candidate items, each distinct one
    once: two items with equal encodings share an index, so that no item is its own negative.

    A batch with labels of one kind holds one -100 per row for each other kind, which `forward` ignores: the library's
    Trainer then computes `eval_loss` for any of the tasks. With rows that have `next_items` the Trainer must
    keep all columns: `TrainingArguments(remove_unused_columns=False)`.

    Args:
        processor: Pads.
        config: Decides the position of the user vector in a row.
        catalogue: The items; needed for rows with `next_items`.
        task: Which items are negatives.
        seed: Seed of the sampled negatives, which depend only on the seed and on the rows of the batch: on their
            `number` (epoch and index, set by the Trainer), or without one on their `next_items`.
        padding_side: "right" or "left".
    """

    def __init__(
        self,
        processor: M6RecProcessor,
        config: M6RecConfig,
        catalogue: CatalogueRows | None = None,
        task: TaskArguments | None = None,
        seed: int = 0,
        padding_side: str = "right",
    ) -> None:
        self.processor, self.config, self.catalogue = processor, config, catalogue
        self.task, self.seed, self.padding_side = task or TaskArguments(), seed, padding_side
        self.all_labels = True
        """A batch with labels of one kind holds placeholders for the other kinds. Runs of the package need none, and
        PEFT's prompt tuning accepts none."""
        self.evidence: Callable[..., torch.Tensor] | None = None
        """Scores rows of the catalogue for users, their histories and the times of these, U x C: added to the cosines
        of the retrieval loss. Rows then need `events`."""
        self.frozen = False
        """Segment layers are frozen, so the states of the whole catalogue are cached and batches need not hold it."""
        self._same = self._first_alike() if catalogue else np.empty(0, dtype=int)
        self._learnt = self._same[catalogue.counts > 0] if catalogue else self._same
        """Items with training events. Items without are not negatives: never a positive, they would only be pushed away
        and could not be retrieved when they are new."""
        self.distinct = np.unique(self._learnt)
        """Catalogue rows that are the negatives of "catalogue": items with training events, without duplicates."""

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Make the batch that `M6RecForRecommendation.forward` takes."""
        next_items, numbers, events = ([row.get(name) for row in rows] for name in NOT_READ)
        read = [{name: value for name, value in row.items() if name not in NOT_READ} for row in rows]
        batch = self.processor.pad(read, self.padding_side)
        if any(entry is not None for entry in next_items):
            if self.catalogue is None:
                raise ValueError("rows with next_items need the catalogue: pass catalogue=CatalogueRows.read(...)")
            batch |= self._retrieval(batch, next_items, events, [place for number in numbers for place in number or ()])
        names = label_names(self.config)
        if self.all_labels and any(name in batch for name in names):
            unknown = torch.full((len(rows),), IGNORE_INDEX)
            batch = {**dict.fromkeys(names, unknown), **batch}
        return batch

    def _retrieval(
        self,
        batch: dict[str, torch.Tensor],
        next_items: list[list[int] | None],
        events: list[tuple[str, list[int], list[float]] | None],
        numbers: list[int],
    ) -> dict[str, torch.Tensor]:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        places = user_places(ids, layout(ids, mask, self.config), self.config)
        wanted = torch.full_like(places, IGNORE_INDEX)
        for row, items in enumerate(next_items):
            if items:
                kept = int((places[row] >= 0).sum())  # if old events were truncated, the head has no label
                wanted[row, :kept] = torch.tensor(items[-kept:])
                if kept < len(items):
                    wanted[row, 0] = IGNORE_INDEX
                if self.config.history_attention == "bidirectional":
                    wanted[row, : kept - 1] = IGNORE_INDEX  # earlier positions have attended to the next item
        known = (wanted != IGNORE_INDEX) & (places >= 0)
        rows, positives = self._choose(wanted[known].numpy(), numbers)
        labels = torch.full_like(ids, IGNORE_INDEX)
        labels[known.nonzero()[:, 0], places[known]] = torch.from_numpy(positives)
        found = {"retrieval_labels": labels, **self._items(rows, len(positives))}
        if self.evidence is not None:
            users, histories, times = [], [], []
            for row, place in known.nonzero().tolist():
                own, met, moments = events[row]
                dropped = len(next_items[row]) - int((places[row] >= 0).sum())
                users.append(own)
                histories.append(np.array(met[: place + dropped], dtype=int))
                times.append(np.array(moments[: place + dropped]))
            found["item_evidence"] = self.evidence(users, histories, times, rows)
        return found

    def _choose(self, positives: np.ndarray, numbers: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return the distinct candidate rows of the catalogue, and the index of each positive among them."""
        positives = self._same[positives]
        if self.task.negatives == "catalogue":
            rows = self.distinct
            if not np.isin(positives, rows).all():
                raise ValueError("next_items holds an item without a training event: count them all in `counts`")
        else:
            rows = np.unique(positives) if len(positives) else self._same[:1]  # no positives: a loss of zero
            if self.task.negatives == "sampled":
                drawn = np.random.default_rng([self.seed, *(numbers or positives.tolist())]).integers(
                    len(self._learnt), size=self.task.num_sampled
                )
                rows = np.union1d(rows, self._learnt[drawn])
        return rows, np.searchsorted(rows, positives)

    def _items(self, rows: np.ndarray, num_positives: int) -> dict[str, torch.Tensor]:
        catalogue = self.catalogue
        assert catalogue is not None
        found = {"candidate_embedding_ids": torch.tensor([catalogue.memory_ids[row] for row in rows])}
        if not (self.frozen and self.task.negatives == "catalogue"):
            padded = self.processor.pad([{"input_ids": catalogue.input_ids[row]} for row in rows])
            found |= {"item_input_ids": padded["input_ids"], "item_attention_mask": padded["attention_mask"]}
        if self.task.negatives != "catalogue" and self.task.logq_correction:
            found["item_log_frequency"] = torch.from_numpy(self._log_frequency(num_positives)[rows]).float()
        return found

    def _log_frequency(self, num_positives: int) -> np.ndarray:
        """Log of the expected count of each item in a batch: as a positive, and as a sampled negative."""
        assert self.catalogue is not None
        counts = np.bincount(self._same, weights=self.catalogue.counts, minlength=len(self._same))
        expected = num_positives * counts / max(counts.sum(), 1)
        if self.task.negatives == "sampled":
            drawn = np.bincount(self._learnt, minlength=len(self._same)) / len(self._learnt)
            expected = expected + self.task.num_sampled * drawn
        return np.log(np.maximum(expected, 1e-12))

    def _first_alike(self) -> np.ndarray:
        """For each item the first one with the same encoding and item embedding."""
        assert self.catalogue is not None
        first: dict[tuple, int] = {}
        pairs = zip(self.catalogue.input_ids, self.catalogue.memory_ids)
        return np.array([first.setdefault((memory, *ids), row) for row, (ids, memory) in enumerate(pairs)])


__all__ = ["CatalogueRows", "M6RecDataCollator", "label_names"]
