"""A catalogue: items with their vectors, searched exactly or by an index, and changed at will, also by many threads.

Shapes: M items of a call, D = vector_width.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from .catalogue_files_m6rec import TEXT_COLUMN, after_ids, read_catalogue, write_catalogue
from .catalogue_index_m6rec import VectorIndex, check_settings
from .catalogue_view_m6rec import CatalogueView, Predicate, State, Texts, check_fingerprint, cosines
from .items_m6rec import Item, Model, item_identity, plain, reading, table_rows
from .segment_cache_m6rec import SegmentCache

logger = logging.get_logger(__name__)

REBUILD_SHARE, REBUILD_ROWS = 0.1, 1024
"""All is put into one matrix once added and removed rows are more than this share of it, and than this number."""


class Catalogue(CatalogueView):
    """Items and their l2-normalised vectors.

    The vectors stand in a base matrix, which `build_index` makes an index of. Items added later stand in a side buffer,
    which is searched exactly, and removed ones stay where they are and are left out of every search, until `save`,
    `encode`, `build_index` or the change by which added and removed rows become more than a tenth of the base (and than
    1024) makes one matrix of it all, with a new index if there was one.

    Make one with `from_dataset` or `load`. An item is a text, or a mapping of fields with an `item_id`.

    Any number of threads may read, search and change a catalogue at once: each call answers by the catalogue as it was
    at one moment, changes follow one another, and a change is there for every call that begins after it. `snapshot`
    gives the catalogue of one moment to several calls.

    Args:
        fingerprint: Digest of the model that makes the vectors.
        dimension: Width of the vectors.
    """

    def __init__(self, fingerprint: str, dimension: int) -> None:
        super().__init__(State.of({}, torch.empty(0, dimension), fingerprint))
        self._lock = threading.RLock()  # of changes; who reads takes `_state` once

    def __getstate__(self) -> dict[str, Any]:
        return {"_state": self._state}

    def __setstate__(self, kept: dict[str, Any]) -> None:
        state: State = kept["_state"]
        # A copy appends to lists of its own.
        own: dict[str, Any] = {"ids": [*state.ids], "items": [*state.items], "rows": {**state.rows}, "texts": Texts()}
        self._state, self._lock = replace(state, **own), threading.RLock()

    @classmethod
    def from_dataset(
        cls, items: Any, model: Model, processor: Any, batch_size: int = 256, progress: bool = True
    ) -> "Catalogue":
        """Embed items.

        Args:
            items: A dataset, a data frame or a list, of mappings with an `item_id` or of texts (whose running number
                is the id: from 0, or from one past the largest whole number that was an id). Fields that hold None or
                NaN are absent.
            model: What embeds them.
            processor: What words them.
            batch_size: Items embedded at once.
            progress: Show a bar, if it takes more than two seconds.

        Raises:
            ValueError: An id is missing or there twice, or an item has no text.
        """
        catalogue = cls(model.fingerprint(), model.config.vector_width)
        found = _read(items, catalogue._state)
        vectors = embed(list(found.values()), model, processor, batch_size, progress)
        catalogue._state = State.of(found, vectors, catalogue.fingerprint, next_number=after_ids(found))
        return catalogue

    # --------------------------------------------------------------------------------------------------- changing it

    def add(
        self,
        items: Any,
        model: Model,
        processor: Any,
        replace: bool = False,
        batch_size: int = 256,
        progress: bool = True,
    ) -> None:
        """Embed more items; they are found from now on. Arguments as of `from_dataset`.

        Raises:
            ValueError: An id is in the catalogue already and `replace` was not said; then nothing is changed.
        """
        with self._lock:
            state = self._state
            check_fingerprint(state.fingerprint, model)
            found = _read(items, state)
            known = {item_id: row for item_id in found if (row := state.row(item_id)) is not None}
            if known and not replace:
                name = next(iter(known))
                raise ValueError(f"item_id {name!r} is in the catalogue already: pass replace=True to replace it")
            vectors = embed(list(found.values()), model, processor, batch_size, progress)
            self._state = _changed(state, found, vectors, list(known.values()))

    def remove(self, item_ids: Sequence[Any]) -> None:
        """Remove items; if one is unknown, nothing is changed."""
        if isinstance(item_ids, str):
            raise TypeError(f"remove expects several item ids, got the one text {item_ids!r}: put it in a list")
        with self._lock:
            state = self._state
            rows = [*dict.fromkeys([state.known(each) for each in item_ids])]
            self._state = _changed(state, {}, state.side[:0], rows)

    def encode(self, model: Model, processor: Any, batch_size: int = 256, progress: bool = True) -> None:
        """Embed all items again, after the model has changed. Arguments as of `from_dataset`."""
        with self._lock:
            state = self._state
            rows = state.live_rows()
            items = {state.ids[row]: state.items[row] for row in rows}
            vectors = embed(list(items.values()), model, processor, batch_size, progress)
            self._state = _replaced(state, rows, items, vectors, model.fingerprint())

    def snapshot(self) -> CatalogueView:
        """Return the catalogue as it is now, for several calls that have to agree; later changes do not reach it."""
        return CatalogueView(self._state)

    # ------------------------------------------------------------------------------------------------------ the index

    def build_index(self, kind: str | None, **settings: int) -> None:
        """Search by a FAISS index from now on, which `save` remembers the kind and settings of.

        Every search still gives `top_k` items if there are as many: where an index finds too few that are neither
        removed nor excluded nor filtered out, it is asked more widely, and in the end all rows are searched.

        Args:
            kind: "flat" (exact), "hnsw" (a graph) or "ivf" (lists around centroids); None = no index.
            **settings: By FAISS's names, of which `VectorIndex` says more.

        Raises:
            ImportError: FAISS is not installed.
            ValueError: There is no such index or setting.
        """
        if kind is None:
            if settings:
                raise ValueError(f"kind=None is no index, and has no settings: leave out {', '.join(settings)}")
            with self._lock:
                self._state = replace(self._state, index=None, wanted=None)
            return
        check_settings(kind, settings)
        with self._lock:
            state = _compacted(replace(self._state, index=None))
            index = VectorIndex(kind, settings, state.base)
            self._state = replace(state, index=index, wanted={"kind": kind, "settings": settings})

    # ------------------------------------------------------------------------------------------------------- keeping

    def save(self, directory: str | Path) -> None:
        """Write the catalogue into a folder of its own, all or nothing: on failure, what was there before stays."""
        with self._lock:
            state = self._state = _compacted(self._state)
        items = dict(zip(state.ids[: state.count], state.items[: state.count]))
        write_catalogue(directory, items, state.base, state.fingerprint, state.wanted, state.next_number)

    @classmethod
    def load(cls, directory: str | Path, model: Model | None = None, index: str | None = "saved") -> "Catalogue":
        """Read a catalogue, and make sure that it is whole.

        Args:
            directory: The folder.
            model: If given, it must be the one that made the vectors.
            index: Kind of the index that is built, as of `build_index`; "saved" = the one that was saved, with its
                settings, if there is FAISS.

        Raises:
            FileNotFoundError: There is no catalogue.
            ImportError: The index needs FAISS, which is not installed.
            ValueError: A file is damaged, of another format or catalogue, or another model made the vectors, or there
                is no such index.
        """
        kept = read_catalogue(directory)
        wanted, catalogue = kept.index, cls(kept.fingerprint, kept.vectors.shape[1])
        catalogue._state = State.of(kept.items, kept.vectors, kept.fingerprint, next_number=kept.next_number)
        if model is not None:
            catalogue.check(model)
        if index != "saved":
            catalogue.build_index(index)
        elif wanted is not None:
            check_settings(wanted["kind"], wanted["settings"])
            try:
                catalogue.build_index(wanted["kind"], **wanted["settings"])
            except ImportError as error:
                logger.warning_once(f"the catalogue in {directory} is searched exactly: {error}")
                catalogue._state = replace(catalogue._state, wanted=wanted)
        return catalogue


def _changed(state: State, found: dict[str, Item], vectors: torch.Tensor, gone: Sequence[int]) -> State:
    """Return a state with more items and without some rows."""
    start = len(state.live)
    live = torch.cat((state.live, torch.ones(len(found), dtype=torch.bool)))
    live[list(gone)] = False
    side = torch.cat((state.side, vectors))
    # Shared with the state so far, which looks at its own rows only.
    state.ids[start:], state.items[start:] = found, found.values()
    for row, item_id in enumerate(found, start):
        state.rows[item_id] = (*state.rows.get(item_id, ()), row)
    number = after_ids(found, state.next_number)
    new = replace(state, live=live, side=side, count=state.count + len(found) - len(gone), next_number=number)
    changed = len(side) + len(live) - new.count
    return _compacted(new) if changed > max(REBUILD_ROWS, REBUILD_SHARE * len(state.base)) else new


def _compacted(state: State) -> State:
    """Return a state with one base matrix of what is left and what was added."""
    if state.count == len(state.base) == len(state.live):
        return state
    rows = state.live_rows()
    vectors = state.gather(rows)
    items = {state.ids[row]: state.items[row] for row in rows}
    return _replaced(state, rows, items, vectors, state.fingerprint)


def _replaced(
    state: State, rows: Sequence[int], items: dict[str, Item], vectors: torch.Tensor, fingerprint: str
) -> State:
    """Return a state of one base matrix for the items of some rows, with an index of the same kind."""
    index = None if state.index is None else VectorIndex(state.index.kind, state.index.given, vectors)
    more = {"index": index, "wanted": state.wanted, "texts": state.texts.kept(rows), "next_number": state.next_number}
    return State.of(items, vectors, fingerprint, **more)


def _read(items: Any, state: State) -> dict[str, Item]:
    """Check items: by id, without fields that hold nothing.

    The id of a text is its place among the items, counted on from one past the largest whole number that was ever an
    id, so that no text takes an id over.
    """
    rows: list[tuple[str | None, Item]] = []
    seen: set[str] = set()
    for number, row in enumerate(table_rows(items)):
        place = f"items[{number}]"
        if not isinstance(row, str | Mapping):
            raise TypeError(f"{place}: expected a text or a mapping of fields, got {type(row).__name__} ({row!r})")
        item = row if isinstance(row, str) else _read_fields(row, place)
        item_id = None if isinstance(item, str) else item["item_id"]
        if item_id in seen:
            raise ValueError(f"{place}: item_id {item_id!r} is there twice; each item needs one of its own")
        if item_id is not None:
            seen.add(item_id)
        rows.append((item_id, item))
    first = after_ids(seen, state.next_number)
    return {str(first + place) if item_id is None else item_id: item for place, (item_id, item) in enumerate(rows)}


def _read_fields(row: Mapping[str, Any], place: str) -> dict[str, Any]:
    item_id = item_identity(row, place)
    if item_id is None:
        raise ValueError(f"{place}: no item_id, which each item needs; it has {sorted(map(str, row))}")
    if TEXT_COLUMN in row:
        raise ValueError(f"{place}: the name {TEXT_COLUMN!r} is taken, give the field another")
    fields = {name: plain(value) for name, value in row.items() if name != "item_id"}
    present = {name: value for name, value in fields.items() if value is not None and value == value}  # NaN != NaN
    return {"item_id": item_id, **present}


def embed(
    items: Sequence[Item],
    model: Model,
    processor: Any,
    batch_size: int = 256,
    progress: bool = False,
    segment_cache: SegmentCache | None = None,
) -> torch.Tensor:
    """Embed items, similar lengths together: M x D float32 on the CPU. Arguments as of `Catalogue.from_dataset`."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: give 1 or more")
    encoded = processor.encode_items(items)
    order = sorted(range(len(items)), key=lambda index: len(encoded[index]))
    vectors = torch.empty(len(items), model.config.vector_width)
    starts = range(0, len(items), batch_size)
    with reading(model):
        for start in logging.tqdm(starts, desc="Embedding items", unit="batch", delay=2, disable=not progress):
            batch = order[start : start + batch_size]
            padded = processor.pad([{"input_ids": encoded[index]} for index in batch])
            ids, mask = (padded[name].to(model.device) for name in ("input_ids", "attention_mask"))
            memory = None
            if model.config.num_item_memory:
                memory = torch.tensor([processor.item_row(items[index]) for index in batch], device=model.device)
            embedded = model.embed_items(ids, mask, memory_ids=memory, segment_cache=segment_cache)
            vectors[batch] = embedded.float().cpu()
    broken = (~vectors.isfinite().all(1)).nonzero()[:, 0].tolist()
    if broken:
        raise ValueError(
            f"the model's vectors of {len(broken)} of {len(items)} items hold NaN or infinity, such as that of "
            f"{items[broken[0]]!r}: its weights are damaged, or too large for {model.dtype}"
        )
    return vectors


__all__ = ["Catalogue", "Predicate", "cosines", "embed"]
