"""Segment states kept between calls: an item's text is read once, for as long as the model does not change."""

import hashlib
import io
import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.utils import logging

from .configuration_m6rec import OF_LIBRARY, ROLES
from .items_m6rec import reading
from .segment_store_m6rec import SegmentStore

if TYPE_CHECKING:
    from .network_m6rec import M6RecModel

logger = logging.get_logger(__name__)

SegmentKey = tuple[int, tuple[int, ...]]
"""(mode, the whole segment's ids): the same ids are read differently as given text, written text or a document."""

FORMAT = b"m6rec segment states 1"
NUMBER_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Of states on disk; the place here is what is written: FORMAT changes with it."""
WARMED_AT_ONCE = 256
"""Segments that are read between two steps of the progress bar."""
NOT_OF_SEGMENTS = OF_LIBRARY.union(*ROLES.values()).difference(ROLES["segments"])
"""Fields of the configuration that change no segment state; one without a role costs a miss, no wrong state."""


class Owner(NamedTuple):
    """A model as it stands, whose states are asked for."""

    digest: bytes
    """Of all that decides states, for the disk."""
    width: int
    device: torch.device


class SegmentCache:
    """Segment states: a bounded store in memory, and if a folder is given a larger one below it, shared by processes.

    In memory it belongs to one model at a time: when weights that decide segment states, adapters, number type or
    configuration have changed since the last call, or another model asks, all states in memory are forgotten; when
    there are too many, the least recently used ones. On disk (see `SegmentStore`) states of any number of models stand
    side by side: a state's key is a digest of the weights and active adapters below the joint layers, of the settings
    that change states, and of the whole segment. The network knows text as ids only, so no tokenizer takes part; nor do
    the device and the texts that were read together, which change a state's rounding and nothing else.

    It may lose a state, it never returns a wrong one. What it cannot see is a weight written to through `.data` or
    `.numpy()`, which PyTorch does not count: call `clear` after that. Of a model made inside `torch.inference_mode()`
    it counts nothing, so that every call counts as a change. While the segment layers learn or drop out it takes no
    part. Copies of a cache, in another process too, start empty and share the folder.

    Args:
        max_bytes: Bytes of states that are kept in memory at most.
        directory: Folder of the states on disk; None = none. Whatever is read is kept there, what users said included.
        max_disk_bytes: Bytes of files that are kept there at most.
    """

    def __init__(
        self, max_bytes: int = 1 << 30, directory: str | Path | None = None, max_disk_bytes: int = 1 << 34
    ) -> None:
        if max_bytes <= 0:
            raise ValueError(f"max_bytes={max_bytes} keeps nothing: give a positive number of bytes")
        self.max_bytes = max_bytes
        self.num_bytes = self.hits = self.misses = self.disk_hits = 0
        self._store = None if directory is None else SegmentStore(directory, max_disk_bytes)
        self._states: OrderedDict[SegmentKey, torch.Tensor] = OrderedDict()
        self._identity: tuple | None = None
        self._owner: Owner | None = None
        self._storages: list[StorageWeakRef] = []
        self._lock = threading.RLock()

    def __len__(self) -> int:
        """Count the segments in memory."""
        return len(self._states)

    def __reduce__(self) -> tuple[type, tuple]:
        store = self._store
        return type(self), (self.max_bytes, *(() if store is None else (store.directory, store.max_bytes)))

    @torch.compiler.disable
    def serve(self, model: "M6RecModel") -> Owner:
        """Say whose states are asked for from now on; they are forgotten unless it is, weight for weight, as before."""
        identity = live_identity(model, model.segment_modules())
        with self._lock:
            if self._owner is None or identity != self._identity:
                self.clear()
                digest = b"" if self._store is None else _digest(model)
                self._owner = Owner(digest, model.config.hidden_size, model.embed_kind.weight.device)
                self._identity = identity
                # As long as these are held, no other weights can get the numbers of those that are gone.
                self._storages = storages(model.segment_modules())
            return self._owner

    @torch.compiler.disable
    def get(self, owner: Owner, segment: SegmentKey) -> torch.Tensor | None:
        """Return a copy of the length x H states of a segment, or None."""
        found = self.find(owner, [segment])
        return found[0].clone() if found else None

    @torch.compiler.disable
    def find(self, owner: Owner, segments: Sequence[SegmentKey]) -> dict[int, torch.Tensor]:
        """Look several segments up: the length x H states of those that are kept, by number; not to be written to."""
        found = {}
        with self._lock:
            for number, segment in enumerate(segments):
                states = self._states.get(segment) if owner is self._owner else None
                if states is not None:
                    self._states.move_to_end(segment)
                elif (states := self._from_disk(owner, segment)) is None:
                    continue
                found[number] = states
            self.hits += len(found)
            self.misses += len(segments) - len(found)
        return found

    @torch.compiler.disable
    def put(self, owner: Owner, segment: SegmentKey, states: torch.Tensor) -> None:
        """Keep a copy of the length x H states of a segment."""
        states = states.detach().clone(memory_format=torch.contiguous_format)
        with self._lock:
            self._remember(owner, segment, states)
        if self._store is not None:
            data = states.cpu().view(torch.uint8).numpy().tobytes()
            self._store.put(_key(owner, segment), data + bytes([NUMBER_TYPES.index(states.dtype)]))

    def clear(self) -> None:
        """Forget all states in memory, and whose they were."""
        with self._lock:
            self._states.clear()
            self.num_bytes, self._owner = 0, None

    def stats(self) -> dict[str, float]:
        """Return what was asked and what is kept.

        Returns:
            `hits` (of which `disk_hits` came from the disk), `misses`, `hit_rate`, `segments` and `bytes` in memory;
            with a folder also `disk_bytes` (as of the last sweep, and what was written since), `disk_damaged` (files
            that were not believed) and `disk_failures` (reads and writes that the system refused).
        """
        asked = self.hits + self.misses
        found: dict[str, float] = {
            "hits": self.hits,
            "misses": self.misses,
            "hit_rate": self.hits / asked if asked else 0.0,
            "segments": len(self),
            "bytes": self.num_bytes,
        }
        if self._store is not None:
            found |= {"disk_hits": self.disk_hits, "disk_bytes": self._store.num_bytes}
            found |= {"disk_damaged": self._store.damaged, "disk_failures": self._store.failures}
        return found

    def warm(self, model: nn.Module, segments: Iterable[SegmentKey], progress: bool = True) -> None:
        """Read segments now, so that later calls find them.

        Args:
            model: The network, or any model around it.
            segments: (mode, ids) of each; items are (0, the ids of `M6RecProcessor.encode_items`).
            progress: Show a bar, if it takes more than two seconds.
        """
        from .plans_m6rec import encode_segments  # which imports this file

        # Classes are asked: what wraps a network hands its methods on.
        network: Any = next((part for part in model.modules() if hasattr(type(part), "segment_modules")), None)
        if network is None or not network.config.num_segment_layers:
            raise ValueError(
                f"{type(model).__name__} has no segment layers, whose states are kept: give an M6Rec whose "
                "num_joint_layers is below num_hidden_layers"
            )
        order = sorted(dict.fromkeys(segments), key=lambda segment: len(segment[1]))
        with reading(model), logging.tqdm(total=len(order), desc="Reading texts", delay=2, disable=not progress) as bar:
            for start in range(0, len(order), WARMED_AT_ONCE):
                batch = order[start : start + WARMED_AT_ONCE]
                encode_segments(network, batch, self)
                bar.update(len(batch))
        if len(self) < len(order) and self._store is None:
            logger.warning(
                f"max_bytes={self.max_bytes} holds {len(self)} of {len(order)} texts: give more, or a folder"
            )

    def _remember(self, owner: Owner, segment: SegmentKey, states: torch.Tensor) -> None:
        if owner is not self._owner or states.nbytes > self.max_bytes:
            return
        replaced = self._states.pop(segment, None)
        self.num_bytes += states.nbytes - (0 if replaced is None else replaced.nbytes)
        self._states[segment] = states
        while self.num_bytes > self.max_bytes:
            _, oldest = self._states.popitem(last=False)
            self.num_bytes -= oldest.nbytes

    def _from_disk(self, owner: Owner, segment: SegmentKey) -> torch.Tensor | None:
        if self._store is None:
            return None
        numbers = len(segment[1]) * owner.width
        data = self._store.get(_key(owner, segment), numbers * 8 + 1)
        if data is None:
            return None
        kind = NUMBER_TYPES[data.pop()]
        states = torch.frombuffer(data, dtype=kind).view(-1, owner.width).to(owner.device)
        self.disk_hits += 1
        self._remember(owner, segment, states)
        return states


def live_identity(model: "M6RecModel", modules: Iterable[nn.Module]) -> tuple:
    """Return what changes whenever that may which some modules of a live model compute.

    It tells weights apart by where they are, which holds only as long as `storages` of before are kept.
    """
    parts = _parts(modules)  # gone through once: this stands before every call of the model
    weights = tuple(
        (weight.untyped_storage()._cdata, weight.storage_offset(), _writes(weight), weight.dtype)
        for weight in _weights(parts)
    )
    tuned = _tuned(parts)
    merged = repr([getattr(part, "merged_adapters", None) for part in tuned])
    return id(model), weights, _adapters(tuned), merged, _numbers(model), repr(vars(model.config))


def storages(modules: Iterable[nn.Module]) -> list[StorageWeakRef]:
    """Refer to where the weights are: as long as the result is held, no other weights can be told to be there."""
    return [StorageWeakRef(weight.untyped_storage()) for weight in _weights(_parts(modules))]


def _parts(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """List modules and all that is in them; `Module.modules` takes twice as long."""
    parts = list(modules)
    for part in parts:
        if part._modules:
            parts += [inner for inner in part._modules.values() if inner is not None]
    return parts


def _weights(parts: Iterable[nn.Module]) -> list[torch.Tensor]:
    own = [weight for part in parts for weight in (*part._parameters.values(), *part._buffers.values())]
    return [weight for weight in own if weight is not None]


def _writes(weight: torch.Tensor) -> Any:
    """Say how often a weight was written to; where that is not counted, give what equals nothing."""
    if not weight.is_inference():
        return weight._version
    logger.warning_once(
        "the model was made inside torch.inference_mode(), where PyTorch does not count what is written to weights: "
        "no state is kept in memory between calls; make or load it outside"
    )
    return object()


def _tuned(parts: Sequence[nn.Module]) -> list[Any]:
    """Find the places with adapters; classes are asked, since a module takes long to say what it lacks."""
    kinds = {kind for kind in set(map(type, parts)) if hasattr(kind, "active_adapters")}
    return [part for part in parts if type(part) in kinds] if kinds else []


def _numbers(model: "M6RecModel") -> tuple:
    """How numbers are computed: settings of PyTorch that change results by more than their rounding."""
    device = model.embed_kind.weight.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return autocast, torch.get_float32_matmul_precision(), model.config._attn_implementation


def _digest(model: "M6RecModel") -> bytes:
    """Digest all that decides segment states, so that it is the same in every process."""
    fields = {name: value for name, value in model.config.to_dict().items() if name not in NOT_OF_SEGMENTS}
    settings = fields, active_adapters(model.segment_modules()), _numbers(model)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    digest_weights(digest, model.segment_modules())
    return digest.digest()


def digest_weights(digest: Any, modules: Iterable[nn.Module]) -> None:
    """Update a digest of hashlib with the names, shapes, types and numbers of all weights."""
    for module in modules:
        for name, value in module.state_dict().items():
            digest_weight(digest, name, value)


def digest_weight(digest: Any, name: str, value: Any) -> None:
    """Update a digest of hashlib with a value of a `state_dict`."""
    if isinstance(value, torch.Tensor):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return
    packed = io.BytesIO()  # quantized layers have (weight, bias) and a number type there
    torch.save(value, packed)
    digest.update(name.encode() + packed.getvalue())


def _key(owner: Owner, segment: SegmentKey) -> str:
    """Name a state on disk: a digest of fields that each say their length, so that none runs into the next."""
    mode, ids = segment
    digest = hashlib.sha256()
    for part in (FORMAT, owner.digest, bytes([mode]), np.array(ids, "<i8").tobytes()):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def active_adapters(modules: Iterable[nn.Module]) -> tuple:
    """Say of each place with adapters of PEFT which are active, or that they are disabled, and how they are scaled."""
    return _adapters(_tuned(_parts(modules)))


def _adapters(tuned: Iterable[Any]) -> tuple:
    found = []
    for part in tuned:
        active = part.active_adapters
        if isinstance(active, list | tuple):  # a method, of a whole model of Transformers
            scales = getattr(part, "scaling", None)
            found.append((bool(getattr(part, "disable_adapters", False)), tuple(active), repr(scales)))
    return tuple(found)


__all__ = [
    "SegmentCache",
    "SegmentKey",
    "active_adapters",
    "digest_weight",
    "digest_weights",
    "live_identity",
    "storages",
]
