"""Users kept between calls: a history that grows is read from where it ended, not from its beginning.

With causal history the joint layers make of a source's beginning the same whatever follows. So the keys and values of
its kept tokens serve every later request that begins with the same segments.

Shapes: B rows, T tokens, L joint layers that were run, G key/value heads, P positions of a beginning, D = head_dim.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from .layers_m6rec import SharedKeys
from .layout_m6rec import KIND_NUMBER
from .segment_cache_m6rec import live_identity, storages

if TYPE_CHECKING:
    from .network_m6rec import M6RecModel
    from .plans_m6rec import Rows

BOUNDARY_BYTES = 128
"""What the number of a boundary costs in a list and a table."""


class Kept(NamedTuple):
    """The beginning of one source, up to the moment and the source's end, which differ from request to request."""

    data: bytes
    """Ids and rows of item memory of all its tokens."""
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


class Beginning(NamedTuple):
    """The beginning of a row's source, and what is known of it already."""

    data: bytes
    numbers: list[int]
    positions: int
    """Positions of the joint layers in the whole of it."""
    known: Kept | None
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
        self._kept: OrderedDict[int, Kept] = OrderedDict()
        self._index: dict[int, Kept] = {}
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
    def find(self, model: "M6RecModel", rows: "Rows") -> "Beginnings | None":
        """Find what is kept of the sources of rows; None where nothing may be reused or kept."""
        config = model.config
        if config.history_attention != "causal" or torch.is_grad_enabled() or model.training:
            return None
        with self._lock:
            identity = live_identity(model, [model])
            if self._identity is None or identity != self._identity:
                self.clear()
                self._identity = identity
                # As long as these are held, no other weights can get the numbers of those that are gone.
                self._storages = storages([model])
            return Beginnings(self, model, rows, self._identity)

    def longest(self, data: bytes, numbers: Sequence[int], ends: Sequence[int]) -> tuple[Kept | None, int]:
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

    def put(self, identity: tuple, new: Kept, replaced: Kept | None) -> None:
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

    def _drop(self, old: Kept | None) -> None:
        if old is None or self._kept.get(old.numbers[-1]) is not old:
            return
        del self._kept[old.numbers[-1]]
        self.num_bytes -= old.num_bytes
        for number in old.numbers:
            if self._index.get(number) is old:
                del self._index[number]


class Beginnings:
    """What is kept of the sources of one batch.

    Args:
        store: Where it is kept.
        model: The network.
        rows: The rows that are read.
        identity: What `store` knows the model by.

    Attributes:
        reused: B x T bool, tokens that need not be read again.
    """

    def __init__(self, store: UserStates, model: "M6RecModel", rows: "Rows", identity: tuple) -> None:
        self._store, self._identity = store, identity
        lay, ids = rows.lay, rows.input_ids
        memory = torch.full_like(ids, -1) if rows.item_ids is None else rows.item_ids
        ends = lay.source & ((lay.kind == KIND_NUMBER["now"]) | (ids == model.config.source_end_token_id))
        read = (lay.event > 0) | (lay.kind == KIND_NUMBER["user"]) | (ids == model.config.source_token_id)
        fields = torch.stack((ids, memory, lay.segment, ends.long(), read.long(), rows.keys.long())).cpu().numpy()
        source, depth = lay.source.cpu().numpy(), rows.exits[-1]
        strange = (rows.hidden | (lay.valid & (lay.target == 0) & ~lay.source)).any(1).tolist()
        reused = np.zeros(source.shape, bool)
        self._rows: list[Beginning | None] = []
        for row, tokens in enumerate(map(np.flatnonzero, source)):
            found = None if strange[row] or not len(tokens) else self._read(fields[:, row, tokens], depth)
            beginning, count = found or (None, 0)
            self._rows.append(beginning)
            reused[row, tokens[:count]] = True
        self.reused = torch.from_numpy(reused).to(ids.device)

    def _read(self, fields: np.ndarray, depth: int) -> tuple[Beginning, int] | None:
        """Look up a source: 6 x S `ids`, `memory`, `segment`, `ends`, `read` and `keys`; also count reused tokens."""
        store, (segment, ends, read, keys) = self._store, fields[2:]
        starts = np.flatnonzero(np.diff(segment, prepend=-1))
        length = int(ends.argmax()) if ends.any() else len(ends)
        starts = starts[starts < length]
        if not len(starts):
            return None
        bounds = [*starts.tolist(), length]
        data, width = fields[:2, :length].T.tobytes(), 2 * fields.itemsize
        number, numbers = depth, []
        for start, end in pairwise(bounds):
            number = hash((number, data[start * width : end * width]))
            numbers.append(number)
        # Where the user is read last is read again: the request may ask for the state there.
        last = int(np.flatnonzero(read[starts])[-1]) if read[starts].any() else len(starts)
        known, count = store.longest(data, numbers, [end * width for end in bounds[1 : last + 1]])
        reused = int(keys[: bounds[count]].sum())
        store.hits += known is not None
        store.misses += known is None
        store.positions_reused += reused
        store.positions_run += int(keys.sum()) - reused
        return Beginning(data, numbers, int(keys[:length].sum()), known, reused), bounds[count]

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
            self._store.put(self._identity, Kept(data, numbers, keys, values), replaced)

    def _chosen(self, rows: Iterable[int]) -> list[Beginning | None]:
        return [self._rows[row] for row in rows]


__all__ = ["Beginnings", "UserStates"]
