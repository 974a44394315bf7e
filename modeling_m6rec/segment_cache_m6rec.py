"""Segment states kept between calls: an item's text is read once, for as long as the model does not change."""

from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from .network_m6rec import M6RecModel

SegmentKey = tuple[int, tuple[int, ...]]
"""(mode, the whole segment's ids): the same ids are read differently as given text, written text or a document."""


class SegmentCache:
    """A bounded store of segment states in memory; the least recently used segments leave first.

    It belongs to one model at a time: when weights that decide segment states, adapters or number type have changed
    since the last call, or another model asks, everything kept is forgotten. It may lose a state, it never returns a
    wrong one.

    Args:
        max_bytes: Bytes of states that are kept at most.
    """

    def __init__(self, max_bytes: int = 1 << 30) -> None:
        if max_bytes <= 0:
            raise ValueError(f"max_bytes={max_bytes} keeps nothing: give a positive number of bytes")
        self.max_bytes = max_bytes
        self.num_bytes = self.hits = self.misses = 0
        self._states: OrderedDict[SegmentKey, torch.Tensor] = OrderedDict()
        self._owner: tuple | None = None

    def __len__(self) -> int:
        return len(self._states)

    def serve(self, model: "M6RecModel") -> None:
        """Forget everything unless `model` is, weight for weight, the one that was served last."""
        owner = _identity(model)
        if owner != self._owner:
            self.clear()
            self._owner = owner

    def get(self, key: SegmentKey) -> torch.Tensor | None:
        """Return the length x H states of a segment, or None."""
        states = self._states.get(key)
        if states is None:
            self.misses += 1
        else:
            self.hits += 1
            self._states.move_to_end(key)
        return states

    def put(self, key: SegmentKey, states: torch.Tensor) -> None:
        """Keep the length x H states of a segment."""
        replaced = self._states.pop(key, None)
        self.num_bytes += states.nbytes - (0 if replaced is None else replaced.nbytes)
        self._states[key] = states
        while self.num_bytes > self.max_bytes:
            _, oldest = self._states.popitem(last=False)
            self.num_bytes -= oldest.nbytes

    def clear(self) -> None:
        """Forget all states."""
        self._states.clear()
        self.num_bytes = 0


def _identity(model: "M6RecModel") -> tuple:
    """What changes whenever the states of a live model may: where its weights stand, how often written, adapters."""
    modules = model.segment_modules()
    weights = tuple(
        (weight.data_ptr(), weight._version, weight.dtype) for module in modules for weight in module.parameters()
    )
    return id(model), weights, active_adapters(modules), modules[0].training, repr(model.config.to_dict())


def active_adapters(modules: Iterable[nn.Module]) -> tuple:
    """Say of each place with adapters of PEFT which are active, or that they are disabled, and how they are scaled."""
    found = []
    for part in (part for module in modules for part in module.modules()):
        active = getattr(part, "active_adapters", None)
        if isinstance(active, list | tuple):
            scales = getattr(part, "scaling", None)
            found.append((bool(getattr(part, "disable_adapters", False)), tuple(active), repr(scales)))
    return tuple(found)


__all__ = ["SegmentCache", "SegmentKey", "active_adapters"]
