"""Caches between calls: segment states in memory and on disk, and the joint layers' keys and values of users.

`SegmentStore` keeps values in a folder, one file each, shared by any number of processes. It may lose a value, but
never returns a wrong one. It has no index and no lock, so a killed process leaves nothing stale or locked: a complete
file gets its name by renaming, and a reader checks its digest and treats a mismatch as a miss.

`SegmentCache` keeps segment states: an item's text is encoded once while the model does not change.

`UserStates` keeps prefixes of histories: a growing history continues from where it ended. With causal history, keys and
values of a source's prefix do not depend on later tokens, so they serve every later request that begins with the same
segments.

Shapes: B rows, T tokens, L joint layers that were run, G key/value heads, P positions of a prefix, D = head_dim.
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
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
from .layers_m6rec import SharedKeys, all_modules, inference_mode
from .layout_m6rec import KIND_NUMBER, Piece, ReadSource, Rows, SegmentKey
from .values_m6rec import SIMPLE

# --------------------------------------------------------------------------------------------- segment states on disk


logger = logging.get_logger(__name__)

DIGEST = hashlib.sha256().digest_size

KEPT_FREE = 16
"""A sweep leaves 1/16 of the bound free; a process sweeps again after writing that many bytes."""

OWN_NAME = re.compile(r"[0-9a-f]{64}(\.[0-9a-f]{32})?")
"""Names of value files, complete or being written; other files in the folder are not touched."""


class SegmentStore:
    """Keeps values in a folder; a key has 64 hexadecimal digits.

    Several processes may read, write and sweep concurrently, also after a fork. The file system only has to support
    renaming within a folder, so it may be a network file system. Writes are not synchronised to disk: digests reveal
    files damaged by a power failure, which are then rewritten. A folder without write permission is only read; without
    read permission it counts as empty. Digests protect against accidents, not against forged files: use a folder that
    only trusted users can write to.

    A sweep removes the files that were least recently written or read by any process. It runs when the folder is
    opened, and whenever a process has written a sixteenth of the bound. One process stays within the bound, P processes
    exceed it by at most (P - 1) / 16. Unfinished files of killed processes count, and are removed likewise.

    Args:
        directory: The folder; it is created if it does not exist.
        max_bytes: Most bytes of files to keep.
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
        """Return the value of a key; None if it is absent, damaged or longer than `longest` bytes."""
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
        """Keep a value, or replace a damaged one. If writing fails, the folder is unchanged."""
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
        """Measure the folder, and remove the least recently used files until a sixteenth of the bound is free."""
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
        """Yield time of last use, size and path of each file of the store."""
        for folder in _entries(self.directory):
            for file in _entries(folder.path) if re.fullmatch("[0-9a-f]{2}", folder.name) else ():
                with suppress(OSError):  # removed meanwhile
                    facts = file.stat(follow_symlinks=False)
                    if OWN_NAME.fullmatch(file.name) and stat.S_ISREG(facts.st_mode):
                        yield facts.st_mtime_ns, facts.st_size, file.path

    def _path(self, key: str) -> Path:
        return self.directory / key[:2] / key

    def _failed(self, what: str, error: OSError) -> None:
        self.failures += 1
        logger.warning_once(f"segment states on disk: cannot {what} in {self.directory}: {error.strerror or error}")


def _file_digest(key: str, value: bytes | bytearray) -> bytes:
    """Digest a value together with its key."""
    digest = hashlib.sha256(key.encode())
    digest.update(value)
    return digest.digest()


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """List a folder; an unreadable or missing folder is empty."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []


# ----------------------------------------------------------------------------------------------------- segment states


FORMAT = b"m6rec segment states 1"

NUMBER_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Number types of states on disk. A file holds the index in this tuple: change FORMAT if the order changes."""

WARMED_AT_ONCE = 256
"""Segments that are encoded between two steps of the progress bar."""

IGNORED_BY_SEGMENTS = OF_LIBRARY.union(*ROLES.values()).difference(ROLES["segments"])
"""Fields of the configuration that change no segment state. A field without a role causes a miss, not a wrong state."""


class Network(Protocol):
    """Interface of the network (`M6RecModel`) that the caches use."""

    config: M6RecConfig
    embed_kind: nn.Embedding
    training: bool

    def segment_modules(self) -> list[nn.Module]:
        """Return the modules that decide segment states."""


class Owner(NamedTuple):
    """A model with its current weights, whose states are requested."""

    digest: bytes
    """Digest of everything that decides states, for keys on disk."""
    width: int
    device: torch.device


class SegmentCache:
    """A bounded cache of segment states in memory, with an optional larger cache on disk that processes share.

    The memory cache serves one model at a time. All states in memory are dropped when another model uses the cache, or
    when weights that decide segment states, adapters, number type or configuration have changed since the last call; if
    there are too many states, the least recently used are dropped. The disk cache (see `SegmentStore`) serves many
    models: a state's key is a digest of the weights and active adapters below the joint layers, of the settings that
    change states, and of the whole segment. Tokenizer, device and the composition of a batch are not part of the key:
    the network receives ids only, and device and batch change a state's rounding only.

    The cache may lose a state, but never returns a wrong one, with one exception: PyTorch does not count writes to a
    weight through `.data` or `.numpy()`; call `clear` after them. PyTorch counts no writes for a model made inside
    `torch.inference_mode()`: every call then counts as a change. The cache is not used while the segment layers are
    trained or use dropout. Copies of a cache, also in other processes, start empty and share the folder.

    Args:
        max_bytes: Most bytes of states to keep in memory; `table` has at most a quarter as many more.
        directory: Folder of the states on disk; None = no disk cache. It holds states of all segments, including users'
            texts.
        max_disk_bytes: Most bytes of files to keep there.
    """

    def __init__(
        self, max_bytes: int = 1 << 30, directory: str | Path | None = None, max_disk_bytes: int = 1 << 34
    ) -> None:
        if max_bytes <= 0:
            raise ValueError(f"max_bytes={max_bytes} keeps nothing: give a positive number of bytes")
        self.max_bytes = max_bytes
        self.num_bytes = self.hits = self.misses = self.disk_hits = 0
        self._store = None if directory is None else SegmentStore(directory, max_disk_bytes)
        self.table = StateTable(max_bytes // 4)
        self._states: OrderedDict[SegmentKey, torch.Tensor] = OrderedDict()
        self._watch = Watch()
        self._owner: Owner | None = None
        self._lock = threading.RLock()

    def __len__(self) -> int:
        """Count the segments in memory."""
        return len(self._states)

    def __reduce__(self) -> tuple[type, tuple]:
        store = self._store
        return type(self), (self.max_bytes, *(() if store is None else (store.directory, store.max_bytes)))

    @torch.compiler.disable
    def serve(self, model: Network) -> Owner:
        """Register the model for the next calls; states in memory are dropped if the model or its weights changed."""
        with self._lock:
            if self._watch.changed(model, model.segment_modules()) or self._owner is None:
                self._clear_states()  # the table notices changes itself
                digest = b"" if self._store is None else _digest(model)
                self._owner = Owner(digest, model.config.hidden_size, model.embed_kind.weight.device)
            return self._owner

    @torch.compiler.disable
    def get(self, owner: Owner, segment: SegmentKey) -> torch.Tensor | None:
        """Return a copy of the length x H states of a segment, or None."""
        found = self.find(owner, [segment])
        return found[0].clone() if found else None

    @torch.compiler.disable
    def find(self, owner: Owner, segments: Sequence[SegmentKey]) -> dict[int, torch.Tensor]:
        """Look up several segments: number -> length x H states of each one that is kept; do not modify them."""
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
        """Drop all states in memory and their owner."""
        self._clear_states()
        self.table.clear()

    def _clear_states(self) -> None:
        with self._lock:
            self._states.clear()
            self.num_bytes, self._owner = 0, None

    def stats(self) -> dict[str, float]:
        """Return counts of look-ups and sizes.

        Returns:
            `hits` (including `disk_hits` from disk), `misses`, `hit_rate`, `segments` and `bytes` in memory; with a
            folder also `disk_bytes` (at the last sweep, plus writes since), `disk_damaged` (files with a wrong digest)
            and `disk_failures` (reads and writes that the system refused).
        """
        hits = self.hits + self.table.hits
        asked = hits + self.misses
        found: dict[str, float] = {
            "hits": hits,
            "misses": self.misses,
            "hit_rate": hits / asked if asked else 0.0,
            "segments": len(self),
            "bytes": self.num_bytes,
        }
        if self._store is not None:
            found |= {"disk_hits": self.disk_hits, "disk_bytes": self._store.num_bytes}
            found |= {"disk_damaged": self._store.damaged, "disk_failures": self._store.failures}
        return found

    def warm(
        self,
        model: nn.Module,
        segments: Iterable[SegmentKey | tuple[int, tuple[int, ...]]],
        progress: bool = True,
        version: object | None = None,
    ) -> None:
        """Encode segments now, so that later calls find them.

        Args:
            model: The network, or any model around it.
            segments: (mode, ids) or `SegmentKey` of each; an item is (0, its ids from `M6RecProcessor.encode_items`).
            progress: Show a progress bar if encoding takes more than two seconds.
            version: As of `StateTable.find`; the states are then put into `table` as well, as far as there is room.
        """
        # Check classes, not instances: wrappers forward the methods of the network inside.
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
                given = [key.ids for key in batch if not key.mode and not key.payload]
                if version is not None and given and self.table.has_room:
                    self.table.find(network, given, partial(network.last_rows, cache=self), version)
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


class StateTable:
    """Last states of segments in one tensor, so that a request takes all of its states in one operation.

    A `SegmentCache` owns it. The states are as the joint layers read them: with the features of items.

    Args:
        max_bytes: Most bytes to keep; a full table is emptied.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._watch = Watch()
        self._lock = threading.RLock()
        self._version: object | None = None
        self._places: dict[tuple[int, ...], int] = {}
        """Index of the last state of each segment."""
        self._states: torch.Tensor | None = None
        self._used = self.hits = 0

    def __len__(self) -> int:
        return len(self._places)

    @property
    def has_room(self) -> bool:
        """Whether at most half of the table is used."""
        return self._states is None or 2 * self._used * self._states[0].nbytes <= self.max_bytes

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            self._places, self._states, self._used = {}, None, 0

    @torch.compiler.disable
    def find(
        self,
        model: Network,
        segments: Sequence[tuple[int, ...]],
        make: Callable[[list[tuple[int, ...]]], tuple[torch.Tensor, list[int]]],
        version: object | None = None,
    ) -> tuple[torch.Tensor, list[int]]:
        """Return the table and, for each segment, the index of its last state.

        Args:
            model: The network.
            segments: Ids of each segment.
            make: Makes the states of new segments, one segment after another, and their numbers.
            version: An object that is the same as at the last call only if no weight and no setting has changed since;
                None = look at them.
        """
        with self._lock:
            changed = self._watch.changed(model, [cast(nn.Module, model)]) if version is None else False
            if changed or version is not self._version:
                self.clear()
            self._version, before = version, self._places
            places, states = [*map(before.get, segments)], self._states
            self.hits += len(segments) - places.count(None)
        known = [place for place in places if place is not None]
        if states is not None and len(known) == len(places):
            return states, known
        new = [*dict.fromkeys(ids for ids, place in zip(segments, places) if place is None)]
        made, counts = make(new)
        with self._lock:
            if before is self._places and (self._used + len(made)) * made[0].nbytes <= self.max_bytes:
                self._append(new, made, counts)
                assert self._states is not None
                return self._states, [self._places[ids] for ids in segments]
            self.clear()  # it is full, or another thread has emptied it
        every = [*dict.fromkeys(segments)]
        made, counts = make(every)
        ends = dict(zip(every, (place - 1 for place in accumulate(counts))))
        return made, [ends[ids] for ids in segments]

    def _append(self, new: list[tuple[int, ...]], made: torch.Tensor, counts: list[int]) -> None:
        states, end = made[:0] if self._states is None else self._states, self._used + len(made)
        if end > len(states):  # earlier callers keep the tensor that they have
            larger = made.new_empty(max(end, 2 * len(states)), made.shape[1])
            larger[: self._used] = states[: self._used]
            states = larger
        states[self._used : end] = made
        self._places.update(zip(new, (self._used - 1 + place for place in accumulate(counts))))
        self._states, self._used = states, end


class Watch:
    """Notices that the output of some modules could have changed: weights, adapters, number types or settings.

    A look costs a microsecond for each weight. A write to a weight through `.data` or `.numpy()` is not noticed.
    """

    def __init__(self) -> None:
        self._identity: tuple | None = None
        self._storages: list[StorageWeakRef] = []

    def changed(self, model: Any, modules: Sequence[nn.Module]) -> bool:
        """Return whether these modules of a model could differ from those at the last call; True at the first call."""
        identity = _identity(model, modules)
        if self._identity is not None and identity == self._identity:
            return False
        # Weights are identified by their addresses: while these references exist, no other weight can get the same.
        self._identity = identity
        self._storages = [StorageWeakRef(weight.untyped_storage()) for weight in _weights(all_modules(modules))]
        return True


def _identity(model: Any, modules: Iterable[nn.Module]) -> tuple:
    """Return a key that changes whenever the output of these modules could change."""
    parts = all_modules(modules)
    own = _weights(parts)
    weights = [(each.untyped_storage()._cdata, each.storage_offset(), _writes(each), each.dtype) for each in own]
    tuned, device = _tuned(parts), own[0].device.type if own else "cpu"
    merged = [repr(getattr(part, "merged_adapters", None)) for part in tuned]
    return id(model), weights, _adapters(tuned), merged, _numbers(model.config, device), *_settings(model.config)


def _settings(config: M6RecConfig) -> tuple[dict[str, Any], list[str]]:
    """Return a key of all settings: a copy, and those that may change in place, such as lists, as texts."""
    own = vars(config)
    return own.copy(), [repr(value) for value in own.values() if type(value) not in SIMPLE]


def _weights(parts: Iterable[nn.Module]) -> list[torch.Tensor]:
    own: list[torch.Tensor] = []
    for part in parts:
        if part._parameters:
            own += [weight for weight in part._parameters.values() if weight is not None]
        if part._buffers:
            own += [weight for weight in part._buffers.values() if weight is not None]
    return own


def _writes(weight: torch.Tensor) -> Any:
    """Return the number of writes to a weight; if PyTorch does not count them, an object that equals no other."""
    if not weight.is_inference():
        return weight._version
    logger.warning_once(
        "the model was made inside torch.inference_mode(), where PyTorch does not count what is written to weights: "
        "no state is kept in memory between calls; make or load it outside"
    )
    return object()


def _tuned(parts: Sequence[nn.Module]) -> list[Any]:
    """Return the modules with adapters; checks classes, since a module's missing attribute is slow to detect."""
    kinds = {kind for kind in set(map(type, parts)) if hasattr(kind, "active_adapters")}
    return [part for part in parts if type(part) in kinds] if kinds else []


def _numbers(config: M6RecConfig, device: str) -> tuple:
    """Return the numeric settings: PyTorch options that change results by more than rounding."""
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return autocast, torch.get_float32_matmul_precision(), config._attn_implementation


def _digest(model: Network) -> bytes:
    """Digest everything that decides segment states; the digest is equal in every process."""
    device = model.embed_kind.weight.device.type
    fields = {name: value for name, value in model.config.to_dict().items() if name not in IGNORED_BY_SEGMENTS}
    fields["format_version"] = 1  # it says which code can read the configuration, and changes no state
    settings = fields, active_adapters(model.segment_modules()), _numbers(model.config, device)
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
    packed = io.BytesIO()  # quantized layers: (weight, bias) and a number type
    torch.save(value, packed)
    digest.update(name.encode() + packed.getvalue())


def _key(owner: Owner, segment: SegmentKey) -> str:
    """Return the name of a state on disk: a digest of length-prefixed fields."""
    mode, ids, payload = segment
    digest = hashlib.sha256()
    # Without a payload the digest is as in earlier versions: states on disk stay valid.
    for part in (FORMAT, owner.digest, bytes([mode]), np.array(ids, "<i8").tobytes(), *[payload] * bool(payload)):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def active_adapters(modules: Iterable[nn.Module]) -> tuple:
    """Return, for each module with PEFT adapters, whether they are disabled, the active ones and their scales."""
    return _adapters(_tuned(all_modules(modules)))


def _adapters(tuned: Iterable[Any]) -> tuple:
    found = []
    for part in tuned:
        active = part.active_adapters
        if isinstance(active, list | tuple):  # in Transformers' models it is a method
            scales = getattr(part, "scaling", None)
            found.append((bool(getattr(part, "disable_adapters", False)), tuple(active), repr(scales)))
    return tuple(found)


# ------------------------------------------------------------------------------------------------- histories of users


BOUNDARY_BYTES = 128
"""Memory of a boundary's hash in a list and a table."""


class CachedPrefix(NamedTuple):
    """The prefix of a source before [NOW] and the source's end, which differ between requests."""

    data: bytes
    """Ids and rows of item embeddings of all its tokens, and its segments' other content."""
    numbers: list[int]
    """For each boundary between segments, a hash of everything before it."""
    keys: torch.Tensor
    """L x G x P x D."""
    values: torch.Tensor
    """L x G x P x D."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the cached prefix."""
        return self.keys.nbytes + self.values.nbytes + len(self.data) + BOUNDARY_BYTES * len(self.numbers)


class PrefixMatch(NamedTuple):
    """The prefix of a row's source, and the cached prefix that matches it."""

    data: bytes
    numbers: list[int]
    positions: int
    """Number of its positions in the joint layers."""
    known: CachedPrefix | None
    reused: int
    """Number of positions of `known` that this row begins with."""


class UserStates:
    """A bounded LRU cache of the joint layers' keys and values of users' histories.

    It needs no user ids: for each source it finds the longest known prefix that ends between two segments, and appends
    the new tokens. A new event then costs its own tokens and the source's end. Results equal a full computation. The
    cache is not used where they would not: with bidirectional history, with hidden events (explanations) and in
    training. It serves one model at a time, like `SegmentCache`, and drops everything when any weight, adapter, number
    type or setting has changed.

    `hits` and `misses` count sources, `positions_reused` and `positions_run` their positions in the joint layers.

    Args:
        max_bytes: Most bytes to keep.
    """

    def __init__(self, max_bytes: int = 1 << 28) -> None:
        if max_bytes <= 0:
            raise ValueError(f"max_bytes={max_bytes} keeps nothing: give a positive number of bytes")
        self.max_bytes = max_bytes
        self.num_bytes = self.hits = self.misses = self.positions_reused = self.positions_run = 0
        self._kept: OrderedDict[int, CachedPrefix] = OrderedDict()
        self._index: dict[int, CachedPrefix] = {}
        self._watch = Watch()
        self._identity: object | None = None
        self._version: object | None = None
        self._lock = threading.RLock()

    def __len__(self) -> int:
        """Return the number of kept histories."""
        return len(self._kept)

    def __reduce__(self) -> tuple[type, tuple]:
        return type(self), (self.max_bytes,)

    def clear(self) -> None:
        """Drop all histories."""
        with self._lock:
            self._kept.clear()
            self._index.clear()
            self.num_bytes, self._identity = 0, None

    def stats(self) -> dict[str, float]:
        """Return counts of look-ups and sizes: `hits`, `misses`, `positions_*`, `users` and `bytes`."""
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
        """Find the cached prefixes of rows' sources; None if nothing may be reused or kept."""
        config = model.config
        if config.history_attention != "causal" or torch.is_grad_enabled() or model.training:
            return None
        with self._lock:
            self._notice(model, None)
            reader = _RowReader(model, rows)
            matches = PrefixMatches(self, self._identity, reader.prefixes)
            matches.reused = reader.mark(matches.segments)
            return matches

    @torch.compiler.disable
    def find_sources(
        self,
        model: Network,
        sources: Sequence[Sequence[Piece]],
        read: Sequence[ReadSource],
        depth: int,
        version: object | None = None,
    ) -> "PrefixMatches | None":
        """Find the cached prefixes of sources that are given by their segments; None if nothing may be kept.

        Args:
            model: The network, with causal history and without local layers.
            sources: For each row its segments.
            read: The tokens of each row that stay.
            depth: Number of joint layers that are run.
            version: As of `StateTable.find`.
        """
        if torch.is_grad_enabled() or model.training:
            return None
        now, last = (model.config.kind_token_ids["now"],), (model.config.source_end_token_id,)
        prefixes = []
        for pieces, own in zip(sources, read):
            count = next(number for number, (ids, _) in enumerate(pieces) if ids[:1] in (now, last))
            counts = own.counts
            prefixes.append(_Prefix(depth, _piece_bytes(pieces[:count]), counts[:count], own.last, sum(counts)))
        with self._lock:
            self._notice(model, version)
            return PrefixMatches(self, self._identity, prefixes)

    def _notice(self, model: Network, version: object | None) -> None:
        """Drop all histories if the model has changed since the last call."""
        if version is not None and version is self._version and self._identity is not None:
            return
        if self._watch.changed(model, [cast(nn.Module, model)]) or self._identity is None:
            self.clear()
            self._identity = object()
        self._version = self._version if version is None else version

    def longest(self, data: bytes, numbers: Sequence[int], ends: Sequence[int]) -> tuple[CachedPrefix | None, int]:
        """Find the longest cached prefix of `data`, and the number of its boundaries that the prefix spans.

        The first boundary, after [BOS'], is common to all sources: a match there saves nothing and is ignored.
        """
        with self._lock:
            for count in range(len(ends), 1, -1):
                found = self._index.get(numbers[count - 1])
                if found is not None and found.data.startswith(data[: ends[count - 1]]):
                    self._kept.move_to_end(found.numbers[-1])
                    return found, count
        return None, 0

    def holds(self, data: bytes, number: int) -> bool:
        """Whether exactly this prefix is kept."""
        with self._lock:
            found = self._index.get(number)
            return found is not None and found.data.startswith(data)

    def put(self, identity: object, new: CachedPrefix, replaced: CachedPrefix | None) -> None:
        """Keep a prefix, in place of the one that it extends."""
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
    """Encode a segment's payload for `data`: the id -1, which no token has, the length, then the payload."""
    return np.array((-1, len(payload)), np.int64).tobytes() + payload if payload else b""


class _Prefix(NamedTuple):
    """The part of a source before [NOW] and the source's end, by its segments."""

    depth: int
    """Number of joint layers that are run."""
    pieces: list[bytes]
    """For each segment the ids and rows of item embeddings of its tokens, and its other content."""
    counts: list[int]
    """For each segment the number of its positions in the joint layers."""
    last: int
    """The segment with the last place of a user vector: it is computed again, since its state may be needed."""
    positions: int
    """Number of positions of the whole source."""


def _piece_bytes(pieces: Sequence[Piece]) -> list[bytes]:
    """Return for each segment the ids of its tokens with their rows of item embeddings."""
    offsets = [0, *accumulate(len(ids) for ids, _ in pieces)]
    table = np.zeros((offsets[-1], 2), np.int64)
    table[:, 0] = [token for ids, _ in pieces for token in ids]
    table[np.array(offsets[1:], int) - 1, 1] = [row for _, row in pieces]
    data, width = table.tobytes(), 2 * table.itemsize
    return [data[start * width : end * width] for start, end in pairwise(offsets)]


class _RowReader:
    """Reads the prefixes of rows, and which tokens these are.

    Args:
        model: The network.
        rows: The rows.

    Attributes:
        prefixes: For each row its prefix; None where nothing may be reused or kept.
    """

    def __init__(self, model: Network, rows: Rows) -> None:
        lay, ids = rows.lay, rows.input_ids
        memory = torch.full_like(ids, -1) if rows.item_embedding_ids is None else rows.item_embedding_ids
        ends = lay.source & ((lay.kind == KIND_NUMBER["now"]) | (ids == model.config.source_end_token_id))
        read = (lay.event > 0) | (lay.kind == KIND_NUMBER["user"]) | (ids == model.config.source_token_id)
        fields = torch.stack((ids, memory, lay.segment, ends.long(), read.long(), rows.keys.long())).cpu().numpy()
        source = lay.source.cpu().numpy()
        strange = rows.hidden | (lay.valid & (lay.target == 0) & ~lay.source)
        if model.config.writes_from_source or rows.text_only is not None:
            strange = strange | lay.text  # it attends to more of the source than is kept
        if model.config.local_layers and ids.shape[1] > (model.config.local_window or 0):
            strange = torch.ones_like(strange)  # what a token attends to moves on with it
        differs = strange.any(1).tolist()
        self._depth, self._shape, self._device = rows.exits[-1], source.shape, ids.device
        self._tokens = [*map(np.flatnonzero, source)]
        self._bounds: list[list[int]] = [[0] for _ in self._tokens]
        self.prefixes: list[_Prefix | None] = []
        for row, tokens in enumerate(self._tokens):
            payloads = rows.payloads[row] if rows.payloads else {}
            may = not differs[row] and len(tokens)
            self.prefixes.append(self._read(row, fields[:, row, tokens], payloads) if may else None)

    def _read(self, row: int, fields: np.ndarray, payloads: Mapping[int, bytes]) -> _Prefix | None:
        """Read a source, 6 x S `ids`, `memory`, `segment`, `ends`, `read` and `keys`."""
        segment, ends, read, keys = fields[2:]
        starts = np.flatnonzero(np.diff(segment, prepend=-1))
        length = int(ends.argmax()) if ends.any() else len(ends)
        starts = starts[starts < length]
        if not len(starts):
            return None
        self._bounds[row] = [*starts.tolist(), length]
        tokens, width = fields[:2, :length].T.tobytes(), 2 * fields.itemsize
        pieces = [
            tokens[start * width : end * width] + _written(payloads.get(int(segment[start]), b""))
            for start, end in pairwise(self._bounds[row])
        ]
        counts = np.add.reduceat(keys[:length], starts)
        places = np.flatnonzero((read[starts] > 0) & (counts > 0))  # a segment of `skipped_kinds` is none
        last = int(places[-1]) if len(places) else len(starts)
        return _Prefix(self._depth, pieces, counts.tolist(), last, int(keys.sum()))

    def mark(self, segments: Sequence[int]) -> torch.Tensor:
        """Mark the tokens of the first segments of each source: B x T bool."""
        marked = np.zeros(self._shape, bool)
        for row, (tokens, bounds, count) in enumerate(zip(self._tokens, self._bounds, segments)):
            marked[row, tokens[: bounds[count]]] = True
        return torch.from_numpy(marked).to(self._device)


class PrefixMatches:
    """Cached prefixes of the sources of one batch.

    Args:
        store: The cache.
        identity: Key of the model in `store`.
        prefixes: For each row its prefix; None where nothing may be reused or kept.

    Attributes:
        segments: For each row the number of segments that need not be computed again.
        reused: B x T bool, the tokens of these segments, if the rows are given by tokens.
    """

    reused: torch.Tensor

    def __init__(self, store: UserStates, identity: object, prefixes: Sequence[_Prefix | None]) -> None:
        self._store, self._identity = store, identity
        self._rows: list[PrefixMatch | None] = []
        self.segments: list[int] = []
        for prefix in prefixes:
            match, count = (None, 0) if prefix is None else self._look_up(prefix)
            self._rows.append(match)
            self.segments.append(count)

    def _look_up(self, prefix: _Prefix) -> tuple[PrefixMatch, int]:
        """Look a prefix up; also return the number of its segments that are kept."""
        store, number, numbers = self._store, prefix.depth, []
        for piece in prefix.pieces:
            number = hash((number, piece))
            numbers.append(number)
        data, offsets = b"".join(prefix.pieces), [*accumulate(map(len, prefix.pieces))]
        known, count = store.longest(data, numbers, offsets[: prefix.last])
        reused = sum(prefix.counts[:count])
        store.hits += known is not None
        store.misses += known is None
        store.positions_reused += reused
        store.positions_run += prefix.positions - reused
        return PrefixMatch(data, numbers, sum(prefix.counts), known, reused), count

    def rest(self, read: Sequence[ReadSource]) -> list[ReadSource]:
        """Return what has to be computed of sources."""
        return [own.without(match.reused) if match else own for own, match in zip(read, self._rows)]

    @torch.compiler.disable
    def shared(self, rows: Sequence[int]) -> list[SharedKeys]:
        """Return cached keys and values of some rows per joint layer, padded to the longest; empty if none."""
        known = [
            (place, each.known, each.reused) for place, each in enumerate(self._chosen(rows)) if each and each.known
        ]
        if not known:
            return []
        first = known[0][1]
        if len(rows) == 1:  # no copy
            size = known[0][2]
            return [SharedKeys(key[None, :, :size], value[None, :, :size], None) for key, value in zip(*first[2:4])]
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
        """Keep the sources of some rows: `width` positions from `shared`, then the newly computed ones."""
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
    "StateTable",
    "UserStates",
    "Watch",
    "active_adapters",
    "digest_weight",
    "digest_weights",
]
