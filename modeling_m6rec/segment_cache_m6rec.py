"""Values in a folder, one file each, shared by any number of processes. It may lose a value, never tell a wrong one.

There is no index and no lock, so nothing goes stale and nothing stays locked when a process is killed: a file takes its
name by renaming, when it is whole, and whoever reads it believes it only if its digest bears it out.


Segment states kept between calls: an item's text is read once, for as long as the model does not change.

Users kept between calls: a history that grows is read from where it ended, not from its beginning.

With causal history the joint layers make of a source's beginning the same whatever follows. So the keys and values of
its kept tokens serve every later request that begins with the same segments.

Shapes: B rows, T tokens, L joint layers that were run, G key/value heads, P positions of a beginning, D = head_dim.
"""

import hashlib
import io
import json
import os
import re
import stat
import threading
import uuid
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.utils import logging

from .atomic_m6rec import atomic_file
from .configuration_m6rec import OF_LIBRARY, ROLES, M6RecConfig
from .layers_m6rec import SharedKeys, inference_mode
from .layout_m6rec import KIND_NUMBER, Rows, SegmentKey

# --------------------------------------------------------------------------------------------- segment states on disk


logger = logging.get_logger(__name__)

DIGEST = hashlib.sha256().digest_size

KEPT_FREE = 16
"""A sweep leaves 1/16 of the bound free, which a process then fills before it sweeps again."""

OWN_NAME = re.compile(r"[0-9a-f]{64}(\.[0-9a-f]{32})?")
"""A value, or one that was being written; the folder's other files are let alone."""


class SegmentStore:
    """Keeps values by 64 hexadecimal digits in a folder.

    Several processes may read, write and sweep at once, also after a fork; renaming within a folder is all that is
    asked of the file system, so that it may be a network's. Nothing waits for the disk: what a power cut tears or
    empties is found out and written again. A folder that cannot be written to is read; one that cannot be read holds
    nothing. The digests guard against accidents: do not use a folder that others may forge files in.

    When the folder is opened, and after every sixteenth of the bound that a process has written, the files that were
    written, or read by any process, longest ago are removed. One process thus keeps the bound, P processes exceed it by
    at most (P - 1) / 16. What killed processes left unfinished counts, and leaves in its turn.

    Args:
        directory: The folder; it is made if need be.
        max_bytes: Bytes of files that are kept at most.
    """

    def __init__(self, directory: str | Path, max_bytes: int) -> None:
        self.directory = Path(directory).expanduser().absolute()
        if max_bytes <= 0:
            raise ValueError(f"max_disk_bytes={max_bytes} keeps nothing: give a positive number of bytes, or no folder")
        if self.directory.exists() and not self.directory.is_dir():
            raise NotADirectoryError(f"directory={str(directory)!r} is a file: give a folder, which is made if need be")
        self.directory.mkdir(parents=True, exist_ok=True)
        self.max_bytes = max_bytes
        self.damaged = self.failures = 0
        self.sweep()

    def get(self, key: str, longest: int) -> bytearray | None:
        """Return the value of a key; None if there is none that is whole, or it has more than `longest` bytes."""
        path = self._path(key)
        try:
            with open(path, "rb") as file:
                data = bytearray(file.read(longest + DIGEST + 1))
        except FileNotFoundError:
            return None
        except OSError as error:
            self._failed("read", error)
            return None
        value, found = data[:-DIGEST], data[-DIGEST:]
        if len(value) > longest or _file_digest(key, value) != found:
            self.damaged += 1
            return None
        with suppress(OSError):
            os.utime(path)  # used just now
        return value

    def put(self, key: str, value: bytes) -> None:
        """Keep a value, also in the place of a damaged one. If that cannot be done, the old state of things remains."""
        path, data = self._path(key), value + _file_digest(key, value)
        if len(data) > self.max_bytes:
            return
        partial = path.with_name(f"{key}.{uuid.uuid4().hex}")
        try:
            os.makedirs(path.parent, exist_ok=True)
            with atomic_file(path, durable=False, partial=partial), open(partial, "xb") as file:
                file.write(data)
        except OSError as error:
            self._failed("write", error)
            return
        self.num_bytes += len(data)
        self._until_sweep -= len(data)
        if self._until_sweep <= 0:
            self.sweep()

    def sweep(self) -> None:
        """Measure the folder, and remove the files used longest ago until a sixteenth of the bound is free."""
        found = list(self._files())
        self.num_bytes = sum(size for _, size, _ in found)
        self._until_sweep = self.max_bytes // KEPT_FREE
        room = self.max_bytes - self._until_sweep
        if self.num_bytes <= room:
            return
        for _, size, path in sorted(found):
            try:
                os.unlink(path)
            except FileNotFoundError:
                pass  # another process was faster
            except OSError as error:
                self._failed("remove", error)
                continue
            self.num_bytes -= size
            if self.num_bytes <= room:
                return

    def _files(self) -> Iterator[tuple[int, int, str]]:
        """Yield time of last use, size and path of each of our files."""
        for folder in _entries(self.directory):
            for file in _entries(folder.path) if re.fullmatch("[0-9a-f]{2}", folder.name) else ():
                with suppress(OSError):  # removed in this moment
                    facts = file.stat(follow_symlinks=False)
                    if OWN_NAME.fullmatch(file.name) and stat.S_ISREG(facts.st_mode):
                        yield facts.st_mtime_ns, facts.st_size, file.path

    def _path(self, key: str) -> Path:
        return self.directory / key[:2] / key

    def _failed(self, what: str, error: OSError) -> None:
        self.failures += 1
        logger.warning_once(f"segment states on disk: cannot {what} in {self.directory}: {error.strerror or error}")


def _file_digest(key: str, value: bytes | bytearray) -> bytes:
    """Digest a value and the key that it belongs to."""
    digest = hashlib.sha256(key.encode())
    digest.update(value)
    return digest.digest()


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """List a folder; one that cannot be read, or is gone, is empty."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []


# ----------------------------------------------------------------------------------------------------- segment states


FORMAT = b"m6rec segment states 1"

NUMBER_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Of states on disk; the place here is what is written: FORMAT changes with it."""

WARMED_AT_ONCE = 256
"""Segments that are read between two steps of the progress bar."""

IGNORED_BY_SEGMENTS = OF_LIBRARY.union(*ROLES.values()).difference(ROLES["segments"])
"""Fields of the configuration that change no segment state; one without a role costs a miss, no wrong state."""


class Network(Protocol):
    """What stores of states know of the network whose states they keep (`M6RecModel`)."""

    config: M6RecConfig
    embed_kind: nn.Embedding
    training: bool

    def segment_modules(self) -> list[nn.Module]:
        """Return the modules that decide segment states."""


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
    def serve(self, model: Network) -> Owner:
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

    def warm(
        self, model: nn.Module, segments: Iterable[SegmentKey | tuple[int, tuple[int, ...]]], progress: bool = True
    ) -> None:
        """Read segments now, so that later calls find them.

        Args:
            model: The network, or any model around it.
            segments: (mode, ids) of each, or `SegmentKey`; items are (0, the ids of `M6RecProcessor.encode_items`).
            progress: Show a bar, if it takes more than two seconds.
        """
        # Classes are asked: what wraps a network hands its methods on.
        network: Any = next((part for part in model.modules() if hasattr(type(part), "segment_modules")), None)
        if network is None or not network.config.num_segment_layers:
            raise ValueError(
                f"{type(model).__name__} has no segment layers, whose states are kept: give an M6Rec whose "
                "num_joint_layers is below num_hidden_layers"
            )
        keys = dict.fromkeys(SegmentKey(*segment) for segment in segments)
        order = sorted(keys, key=lambda key: len(key.ids))
        bar = logging.tqdm(total=len(order), desc="Reading texts", delay=2, disable=not progress)
        with inference_mode(model), bar:
            for start in range(0, len(order), WARMED_AT_ONCE):
                batch = order[start : start + WARMED_AT_ONCE]
                network.encode_segments(batch, self)
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
        numbers = len(segment.ids) * owner.width
        data = self._store.get(_key(owner, segment), numbers * 8 + 1)
        if data is None:
            return None
        kind = NUMBER_TYPES[data.pop()]
        states = torch.frombuffer(data, dtype=kind).view(-1, owner.width).to(owner.device)
        self.disk_hits += 1
        self._remember(owner, segment, states)
        return states


def live_identity(model: Network, modules: Iterable[nn.Module]) -> tuple:
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


def _numbers(model: Network) -> tuple:
    """How numbers are computed: settings of PyTorch that change results by more than their rounding."""
    device = model.embed_kind.weight.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return autocast, torch.get_float32_matmul_precision(), model.config._attn_implementation


def _digest(model: Network) -> bytes:
    """Digest all that decides segment states, so that it is the same in every process."""
    fields = {name: value for name, value in model.config.to_dict().items() if name not in IGNORED_BY_SEGMENTS}
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
    mode, ids, payload = segment
    digest = hashlib.sha256()
    # Without a payload as ever: the states that are on disk stay valid.
    for part in (FORMAT, owner.digest, bytes([mode]), np.array(ids, "<i8").tobytes(), *[payload] * bool(payload)):
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


# ------------------------------------------------------------------------------------------------- histories of users


BOUNDARY_BYTES = 128
"""What the number of a boundary costs in a list and a table."""


class CachedPrefix(NamedTuple):
    """The beginning of one source, up to the moment and the source's end, which differ from request to request."""

    data: bytes
    """Ids and rows of item memory of all its tokens, and what its segments carry besides them."""
    numbers: list[int]
    """A hash of all that stands before each boundary between segments."""
    keys: torch.Tensor
    """L x G x P x D."""
    values: torch.Tensor
    """L x G x P x D."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all that is kept."""
        return self.keys.nbytes + self.values.nbytes + len(self.data) + BOUNDARY_BYTES * len(self.numbers)


class PrefixMatch(NamedTuple):
    """The beginning of a row's source, and what is known of it already."""

    data: bytes
    numbers: list[int]
    positions: int
    """Positions of the joint layers in the whole of it."""
    known: CachedPrefix | None
    reused: int
    """Positions of `known` that stand at the begin of this row, too."""


class UserStates:
    """A bounded store of what the joint layers made of users' histories; the least recently used leave first.

    It needs no name of a user: of each source it finds the longest beginning, cut between two segments, that it has
    seen, and appends what is new. A new event so costs its own tokens and the source's end. What it returns equals
    reading all again; where that is not so, it takes no part: with bidirectional history, where events are hidden
    (explanations), in training. It belongs to one model at a time, like `SegmentCache`, and forgets everything when any
    weight, adapter, number type or setting has changed.

    `hits` and `misses` count sources, `positions_reused` and `positions_run` their positions in the joint layers.

    Args:
        max_bytes: Bytes that are kept at most.
    """

    def __init__(self, max_bytes: int = 1 << 28) -> None:
        if max_bytes <= 0:
            raise ValueError(f"max_bytes={max_bytes} keeps nothing: give a positive number of bytes")
        self.max_bytes = max_bytes
        self.num_bytes = self.hits = self.misses = self.positions_reused = self.positions_run = 0
        self._kept: OrderedDict[int, CachedPrefix] = OrderedDict()
        self._index: dict[int, CachedPrefix] = {}
        self._identity: tuple | None = None
        self._storages: list[StorageWeakRef] = []
        self._lock = threading.RLock()

    def __len__(self) -> int:
        """Count the histories that are kept."""
        return len(self._kept)

    def __reduce__(self) -> tuple[type, tuple]:
        return type(self), (self.max_bytes,)

    def clear(self) -> None:
        """Forget all histories."""
        with self._lock:
            self._kept.clear()
            self._index.clear()
            self.num_bytes, self._identity = 0, None

    def stats(self) -> dict[str, float]:
        """Return what was asked and what is kept: `hits`, `misses`, `positions_*`, `users` and `bytes`."""
        return {
            "hits": self.hits,
            "misses": self.misses,
            "positions_reused": self.positions_reused,
            "positions_run": self.positions_run,
            "users": len(self),
            "bytes": self.num_bytes,
        }

    @torch.compiler.disable
    def find(self, model: Network, rows: Rows) -> "PrefixMatches | None":
        """Find what is kept of the sources of rows; None where nothing may be reused or kept."""
        config = model.config
        if config.history_attention != "causal" or torch.is_grad_enabled() or model.training:
            return None
        with self._lock:
            identity = live_identity(model, [cast(nn.Module, model)])
            if self._identity is None or identity != self._identity:
                self.clear()
                self._identity = identity
                # As long as these are held, no other weights can get the numbers of those that are gone.
                self._storages = storages([cast(nn.Module, model)])
            return PrefixMatches(self, model, rows, self._identity)

    def longest(self, data: bytes, numbers: Sequence[int], ends: Sequence[int]) -> tuple[CachedPrefix | None, int]:
        """Find the longest beginning of some bytes that is kept, and how many of its boundaries it spans.

        The first boundary, after [BOS'], is that of every source, and nothing is saved by it.
        """
        with self._lock:
            for count in range(len(ends), 1, -1):
                found = self._index.get(numbers[count - 1])
                if found is not None and found.data.startswith(data[: ends[count - 1]]):
                    self._kept.move_to_end(found.numbers[-1])
                    return found, count
        return None, 0

    def holds(self, data: bytes, number: int) -> bool:
        """Say whether a whole beginning is kept."""
        with self._lock:
            found = self._index.get(number)
            return found is not None and found.data.startswith(data)

    def put(self, identity: tuple, new: CachedPrefix, replaced: CachedPrefix | None) -> None:
        """Keep a beginning, in place of one that it goes on from."""
        with self._lock:
            if identity is not self._identity or new.num_bytes > self.max_bytes:
                return  # the model has changed meanwhile
            if replaced is not None:
                self._drop(replaced)
            self._drop(self._kept.get(new.numbers[-1]))
            self._kept[new.numbers[-1]] = new
            self._index.update(dict.fromkeys(new.numbers, new))
            self.num_bytes += new.num_bytes
            while self.num_bytes > self.max_bytes:
                self._drop(next(iter(self._kept.values())))

    def _drop(self, old: CachedPrefix | None) -> None:
        if old is None or self._kept.get(old.numbers[-1]) is not old:
            return
        del self._kept[old.numbers[-1]]
        self.num_bytes -= old.num_bytes
        for number in old.numbers:
            if self._index.get(number) is old:
                del self._index[number]


def _written(payload: bytes) -> bytes:
    """Write what a segment carries behind its ids: after an id of -1, which no token has, and its length."""
    return np.array((-1, len(payload)), np.int64).tobytes() + payload if payload else b""


class PrefixMatches:
    """What is kept of the sources of one batch.

    Args:
        store: Where it is kept.
        model: The network.
        rows: The rows that are read.
        identity: What `store` knows the model by.

    Attributes:
        reused: B x T bool, tokens that need not be read again.
    """

    def __init__(self, store: UserStates, model: Network, rows: Rows, identity: tuple) -> None:
        self._store, self._identity = store, identity
        lay, ids = rows.lay, rows.input_ids
        memory = torch.full_like(ids, -1) if rows.item_embedding_ids is None else rows.item_embedding_ids
        ends = lay.source & ((lay.kind == KIND_NUMBER["now"]) | (ids == model.config.source_end_token_id))
        read = (lay.event > 0) | (lay.kind == KIND_NUMBER["user"]) | (ids == model.config.source_token_id)
        fields = torch.stack((ids, memory, lay.segment, ends.long(), read.long(), rows.keys.long())).cpu().numpy()
        source, depth = lay.source.cpu().numpy(), rows.exits[-1]
        strange = (rows.hidden | (lay.valid & (lay.target == 0) & ~lay.source)).any(1).tolist()
        reused = np.zeros(source.shape, bool)
        self._rows: list[PrefixMatch | None] = []
        for row, tokens in enumerate(map(np.flatnonzero, source)):
            payloads = rows.payloads[row] if rows.payloads else {}
            found = None if strange[row] or not len(tokens) else self._read(fields[:, row, tokens], depth, payloads)
            beginning, count = found or (None, 0)
            self._rows.append(beginning)
            reused[row, tokens[:count]] = True
        self.reused = torch.from_numpy(reused).to(ids.device)

    def _read(self, fields: np.ndarray, depth: int, payloads: Mapping[int, bytes]) -> tuple[PrefixMatch, int] | None:
        """Look up a source: 6 x S `ids`, `memory`, `segment`, `ends`, `read` and `keys`; also count reused tokens."""
        store, (segment, ends, read, keys) = self._store, fields[2:]
        starts = np.flatnonzero(np.diff(segment, prepend=-1))
        length = int(ends.argmax()) if ends.any() else len(ends)
        starts = starts[starts < length]
        if not len(starts):
            return None
        bounds = [*starts.tolist(), length]
        tokens, width = fields[:2, :length].T.tobytes(), 2 * fields.itemsize
        number, numbers, pieces = depth, [], []
        for start, end in pairwise(bounds):
            pieces.append(tokens[start * width : end * width] + _written(payloads.get(int(segment[start]), b"")))
            number = hash((number, pieces[-1]))
            numbers.append(number)
        data, offsets = b"".join(pieces), [*accumulate(map(len, pieces))]
        # Where the user is read last is read again: the request may ask for the state there.
        last = int(np.flatnonzero(read[starts])[-1]) if read[starts].any() else len(starts)
        known, count = store.longest(data, numbers, offsets[:last])
        reused = int(keys[: bounds[count]].sum())
        store.hits += known is not None
        store.misses += known is None
        store.positions_reused += reused
        store.positions_run += int(keys.sum()) - reused
        return PrefixMatch(data, numbers, int(keys[:length].sum()), known, reused), bounds[count]

    @torch.compiler.disable
    def shared(self, rows: Sequence[int]) -> list[SharedKeys]:
        """Return what is known of some rows in each joint layer, padded to the longest; nothing if nothing is."""
        known = [
            (place, each.known, each.reused) for place, each in enumerate(self._chosen(rows)) if each and each.known
        ]
        if not known:
            return []
        first = known[0][1]
        (layers, groups, _, dim), width = first.keys.shape, max(size for _, _, size in known)
        keys, values = (first.keys.new_zeros(layers, len(rows), groups, width, dim) for _ in range(2))
        unseen = keys.new_full((len(rows), 1, 1, width), torch.finfo(keys.dtype).min)
        bias = None if len(known) == len(rows) and all(size == width for _, _, size in known) else unseen
        for place, kept, size in known:
            keys[:, place, :, :size] = kept.keys[:, :, :size]
            values[:, place, :, :size] = kept.values[:, :, :size]
            unseen[place, ..., :size] = 0
        return [SharedKeys(key, value, bias) for key, value in zip(keys, values)]

    @torch.compiler.disable
    def keep(self, rows: Sequence[int], users: Sequence[SharedKeys], width: int) -> None:
        """Keep the sources of some rows: `width` positions that `shared` gave, then what was read now."""
        for place, beginning in enumerate(self._chosen(rows)):
            if beginning is None:
                continue
            data, numbers, positions, known, reused = beginning
            if self._store.holds(data, numbers[-1]):
                continue
            new = slice(width, width + positions - reused)
            keys = torch.stack([layer.key[place, :, new] for layer in users])
            values = torch.stack([layer.value[place, :, new] for layer in users])
            replaced = None
            if known is not None:
                keys = torch.cat((known.keys[:, :, :reused], keys), 2)
                values = torch.cat((known.values[:, :, :reused], values), 2)
                replaced = known if data.startswith(known.data) else None
            self._store.put(self._identity, CachedPrefix(data, numbers, keys, values), replaced)

    def _chosen(self, rows: Iterable[int]) -> list[PrefixMatch | None]:
        return [self._rows[row] for row in rows]


__all__ = [
    "PrefixMatches",
    "SegmentCache",
    "SegmentStore",
    "UserStates",
    "active_adapters",
    "digest_weight",
    "digest_weights",
    "live_identity",
    "storages",
]
