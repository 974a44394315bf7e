"""Packing: several documents in one row, without attention between them.

In rows of requests each [BOS'] starts a new request. Plain documents are distinguished by the numbers in their
attention mask (`layout`). Positions restart in each document, so that packed losses equal those of separate rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Row = dict[str, Any]


def pack(rows: Sequence[Row], length: int, structured: frozenset[int]) -> list[Row]:
    """Pack rows into rows of `length` tokens; a longer row stays separate.

    The longest are placed first, each into the first row with room. Requests and plain documents are not mixed.

    Args:
        rows: Rows of `input_ids` and `labels`, with `item_embedding_ids` or without.
        length: Number of tokens of a row.
        structured: Ids with which a row of requests begins: those of [BOS'] and [BOS].

    Returns:
        Rows of `input_ids`, `labels`, `attention_mask`, and `item_embedding_ids` if any row has them.

    >>> [row["attention_mask"] for row in pack([{"input_ids": [9] * n, "labels": [9] * n} for n in (2, 3, 1)], 5, {8})]
    [[1, 1, 1, 2, 2], [1]]
    """
    bins: list[tuple[bool, list[Row], int]] = []
    for row in sorted(rows, key=lambda row: -len(row["input_ids"])):
        size, kind = len(row["input_ids"]), row["input_ids"][0] in structured
        place = next((at for at, (own, _, used) in enumerate(bins) if own == kind and used + size <= length), None)
        if place is None:
            bins.append((kind, [row], size))
        else:
            _, members, used = bins[place]
            bins[place] = (kind, [*members, row], used + size)
    memory = any("item_embedding_ids" in row for row in rows)
    return [_joined(members, memory) for _, members, _ in bins]


def _joined(members: list[Row], memory: bool) -> Row:
    joined = {name: [each for row in members for each in row[name]] for name in ("input_ids", "labels")}
    joined["attention_mask"] = [number for number, row in enumerate(members, 1) for _ in row["input_ids"]]
    if memory:
        joined["item_embedding_ids"] = [
            each for row in members for each in row.get("item_embedding_ids", [0] * len(row["input_ids"]))
        ]
    return joined


@dataclass(frozen=True)
class PackingCollator:
    """Packs the rows of a batch before collating them: fewer rows, the same documents, the same loss.

    Attributes:
        collator: Makes the batch.
        length: Tokens of a row.
        structured: Ids with which a row of requests begins.
    """

    collator: Callable[[Sequence[Row]], dict[str, torch.Tensor]]
    length: int
    structured: frozenset[int]

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """Make the batch."""
        return self.collator(pack(rows, self.length, self.structured))


__all__ = ["PackingCollator", "pack"]
