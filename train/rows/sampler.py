"""The rows of an epoch and their order."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from ...values_m6rec import IGNORE_INDEX


class EpochRows(Dataset):
    """The rows of an epoch, each with its `number`, followed by padding rows without labels.

    Padding rows give all processes the same number of full batches. The library would repeat rows from the beginning
    of the epoch, which are then learnt twice.

    Args:
        rows: The rows.
        multiple: Rows in one batch of all processes; the epoch is padded to a multiple of it.
    """

    def __init__(self, rows: Any, multiple: int = 1) -> None:
        self.rows, self.size, self.epoch = rows, len(rows), 0
        self.filled = -(-self.size // multiple) * multiple

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; rows may be drawn again."""
        self.epoch = epoch
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)

    def __len__(self) -> int:
        return self.filled

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a row; its `number` (epoch and index) seeds the collator's draws."""
        row = {**self.rows[index if index < self.size else 0], "number": (self.epoch, index)}
        if index < self.size:
            return row
        return {
            name: _unknown(value) if name.endswith(("labels", "next_items")) else value for name, value in row.items()
        }


def _unknown(labels: Any) -> Any:
    if isinstance(labels, (list, tuple)):
        return [_unknown(label) for label in labels]
    return torch.full_like(labels, IGNORE_INDEX) if isinstance(labels, torch.Tensor) else IGNORE_INDEX


class SeededOrder(Sampler[int]):
    """The order of the rows in an epoch, which depends only on the seed and the epoch.

    The library's sampler by length draws from the global generator, and its random sampler does not get the epoch when
    several processes resume inside one. Padding rows come last.

    Args:
        rows: The rows.
        seed: Seed of the order.
        group: Number of rows that are grouped by length; None: a random order, the library's for one process.
        together: Number of consecutive rows that stay together in a random order with random cuts.
    """

    def __init__(self, rows: Any, seed: int, group: int | None = None, together: int = 1) -> None:
        self.seed, self.group, self.together, self.epoch = seed, group, together, 0
        self.size = rows.size if isinstance(rows, EpochRows) else len(rows)
        self.blank = range(self.size, len(rows))
        self.lengths = [len(rows[index]["input_ids"]) for index in range(self.size)] if group else []

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which decides the order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size + len(self.blank)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        if self.group:
            yield from get_length_grouped_indices(self.lengths, self.group, generator=generator)
        else:
            yield from self._random(generator)
        yield from self.blank

    def _random(self, generator: torch.Generator) -> Iterator[int]:
        ahead = 0 if self.together == 1 else int(torch.randint(self.together, (), generator=generator))
        for block in torch.randperm(-(-(self.size + ahead) // self.together), generator=generator).tolist():
            start = block * self.together - ahead
            yield from range(max(start, 0), min(start + self.together, self.size))


__all__ = ["EpochRows", "SeededOrder"]
