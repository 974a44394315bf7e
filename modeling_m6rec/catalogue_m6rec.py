"""A catalogue: items with their vectors, searched exactly or by an index, and changed at will.

Shapes: B users, N rows of vectors, M items of a call, D = vector_width.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from .catalogue_files_m6rec import TEXT_COLUMN, read_catalogue, write_catalogue
from .catalogue_index_m6rec import VectorIndex, check_settings, nearest
from .items_m6rec import Item, Model, item_identity, item_texts, plain, reading, table_rows
from .segment_cache_m6rec import SegmentCache
from .values_m6rec import normalize_id

logger = logging.get_logger(__name__)

Predicate = Callable[[dict[str, Any]], bool]
"""Says of an item's fields whether the item may be recommended."""
Ranking = list[tuple[str, float]]
"""Ids and scores, the best first."""

ROUNDING = 1e-5
"""More than float32 products of normalised vectors are off by."""
REBUILD_SHARE, REBUILD_ROWS = 0.1, 1024
"""An index is built anew once added and removed rows are more than this share of its own, and than this number."""
EXTRA, WIDER, EXACT_SHARE = 16, 4, 1 / 16
"""An index is asked for so many rows more than wanted, then for so many times as many, up to this share of all."""


class Catalogue:
    """Items and their l2-normalised vectors.

    The vectors stand in a base matrix, which `build_index` makes an index of. Items added later stand in a side buffer,
    which is searched exactly, and removed ones stay where they are and are left out of every search, until `save`,
    `encode` or `build_index` makes one matrix of it all. With an index, so does the change by which added and removed
    rows become more than a tenth of the base (and than 1024).

    Make one with `from_dataset` or `load`. An item is a text, or a mapping of fields with an `item_id`.

    Several threads may search at once, but not while one changes the catalogue: hold a lock for that.

    Args:
        fingerprint: Digest of the model that makes the vectors.
        dimension: Width of the vectors.
    """

    def __init__(self, fingerprint: str, dimension: int) -> None:
        self.fingerprint = fingerprint
        self.dimension = dimension
        self._items: dict[str, Item] = {}  # in the order of insertion, as are rows
        self._rows: dict[str, int] = {}
        self._ids: list[str] = []  # of each of the N rows
        self._live = torch.empty(0, dtype=torch.bool)  # N
        self._base = torch.empty(0, dimension)
        self._side = torch.empty(0, dimension)
        self._wordings: tuple[Any, dict[str, list[str]]] | None = None
        self._wanted: dict[str, Any] | None = None  # kind and settings of the index, also where there is no FAISS
        self._index: VectorIndex | None = None

    @classmethod
    def from_dataset(
        cls, items: Any, model: Model, processor: Any, batch_size: int = 256, progress: bool = True
    ) -> "Catalogue":
        """Embed items.

        Args:
            items: A dataset, a data frame or a list, of mappings with an `item_id` or of texts (whose running number
                is the id). Fields that hold None or NaN are absent.
            model: What embeds them.
            processor: What words them.
            batch_size: Items embedded at once.
            progress: Show a bar, if it takes more than two seconds.

        Raises:
            ValueError: An id is missing or there twice, or an item has no text.
        """
        catalogue = cls(model.fingerprint(), model.config.vector_width)
        found = catalogue._read(items)
        catalogue._replace(found, embed(list(found.values()), model, processor, batch_size, progress))
        return catalogue

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[str]:
        """Yield the ids in the order of insertion."""
        return iter(self._items)

    def __contains__(self, item_id: Any) -> bool:
        return normalize_id(item_id, "item_id") in self._items

    def item(self, item_id: Any) -> Item:
        """Return an item as requests take it: its text, or its fields and its `item_id`."""
        item = self._items[self._known(item_id)]
        return item if isinstance(item, str) else dict(item)

    def fields(self, item_id: Any) -> dict[str, Any]:
        """Return an item's fields and its `item_id`; the text of an item without fields is called `item`."""
        item = self.item(item_id)
        return {"item_id": self._known(item_id), "item": item} if isinstance(item, str) else item

    def vectors(self, item_ids: Sequence[Any]) -> torch.Tensor:
        """Return the M x D vectors of items."""
        return self._gather([self._rows[self._known(each)] for each in item_ids])

    def worded(self, texts: Collection[str], processor: Any) -> list[str]:
        """Return the ids of the items that the processor words as one of the texts."""
        if self._wordings is None or self._wordings[0] is not processor:
            ids: dict[str, list[str]] = {}
            for item_id, text in zip(self._items, item_texts(processor, self._items.values())):
                ids.setdefault(text, []).append(item_id)
            self._wordings = processor, ids
        return [item_id for text in texts for item_id in self._wordings[1].get(text, ())]

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
        self.check(model)
        found = self._read(items)
        known = [item_id for item_id in found if item_id in self._items]
        if known and not replace:
            raise ValueError(f"item_id {known[0]!r} is in the catalogue already: pass replace=True to replace it")
        vectors = embed(list(found.values()), model, processor, batch_size, progress)
        self._drop(known)
        self._rows.update((item_id, len(self._ids) + index) for index, item_id in enumerate(found))
        self._items.update(found)
        self._ids += found
        self._live = torch.cat((self._live, torch.ones(len(found), dtype=torch.bool)))
        self._side = torch.cat((self._side, vectors))
        self._settle()

    def remove(self, item_ids: Sequence[Any]) -> None:
        """Remove items; if one is unknown, nothing is changed."""
        if isinstance(item_ids, str):
            raise TypeError(f"remove expects several item ids, got the one text {item_ids!r}: put it in a list")
        self._drop([*dict.fromkeys([self._known(each) for each in item_ids])])
        self._settle()

    def encode(self, model: Model, processor: Any, batch_size: int = 256, progress: bool = True) -> None:
        """Embed all items again, after the model has changed. Arguments as of `from_dataset`."""
        vectors = embed(list(self._items.values()), model, processor, batch_size, progress)
        self.fingerprint, self.dimension = model.fingerprint(), model.config.vector_width
        self._replace(self._items, vectors)

    def check(self, model: Model) -> None:
        """Make sure that the vectors are this model's.

        Raises:
            ValueError: Another model made them.
        """
        found = model.fingerprint()
        if found != self.fingerprint:
            raise ValueError(
                f"the catalogue's vectors were made by a model with fingerprint {self.fingerprint[:12]}, this one has "
                f"{found[:12]} (other weights, adapters or number type): make them again with "
                "catalogue.encode(model, processor)"
            )

    def _replace(self, items: dict[str, Item], vectors: torch.Tensor) -> None:
        """Start anew with one base matrix."""
        self._items, self._base, self._side = items, vectors, vectors[:0]
        self._ids = list(items)
        self._rows = {item_id: row for row, item_id in enumerate(items)}
        self._live = torch.ones(len(items), dtype=torch.bool)
        self._wordings = None
        # If building fails, searches are exact: an index of other rows would lie.
        before, self._index = self._index, None
        if before is not None:
            self._index = VectorIndex(before.kind, before.given, vectors)

    def _drop(self, names: Sequence[str]) -> None:
        for name in names:
            self._live[self._rows.pop(name)] = False
            del self._items[name]
        self._wordings = None

    def _compact(self) -> None:
        """Make one base matrix of what is left and what was added."""
        if len(self._side) or len(self._items) < len(self._ids):
            self._replace(self._items, self._gather(list(self._rows.values())))

    def _settle(self) -> None:
        """Compact if the index has become too small a part of the catalogue."""
        changed = len(self._side) + len(self._ids) - len(self._items)
        if self._index is not None and changed > max(REBUILD_ROWS, REBUILD_SHARE * len(self._base)):
            self._compact()

    def _read(self, items: Any) -> dict[str, Item]:
        """Check items: by id, without fields that hold nothing."""
        first: int | None = None  # running number of the first row, which only texts need
        found: dict[str, Item] = {}
        for number, row in enumerate(table_rows(items)):
            place = f"items[{number}]"
            if not isinstance(row, str | Mapping):
                raise TypeError(f"{place}: expected a text or a mapping of fields, got {type(row).__name__} ({row!r})")
            item = row if isinstance(row, str) else _read_fields(row, place)
            if isinstance(item, str):
                first = self._next_number() if first is None else first
                item_id = str(first + number)
            else:
                item_id = item["item_id"]
            if item_id in found:
                raise ValueError(f"{place}: item_id {item_id!r} is there twice; each item needs one of its own")
            found[item_id] = item
        return found

    def _next_number(self) -> int:
        return max((int(item_id) for item_id, item in self._items.items() if isinstance(item, str)), default=-1) + 1

    def _known(self, item_id: Any) -> str:
        known = normalize_id(item_id, "item_id")
        if known not in self._items:
            raise ValueError(f"item_id {known!r} is not among the {len(self)} items of the catalogue")
        return known

    def _gather(self, rows: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """Return the vectors of rows, from the base and the side buffer."""
        index = torch.as_tensor(rows, dtype=torch.long)
        base = index < len(self._base)
        vectors = torch.empty(len(index), self.dimension)
        vectors[base], vectors[~base] = self._base[index[base]], self._side[index[~base] - len(self._base)]
        return vectors

    # ----------------------------------------------------------------------------------------------------- searching

    def search(
        self,
        user_vectors: torch.Tensor,
        top_k: int = 10,
        exclude: Sequence[Collection[Any] | None] | None = None,
        filter: Predicate | None = None,
    ) -> list[Ranking]:
        """Find the items nearest to each user.

        Args:
            user_vectors: B x D.
            top_k: Items for each user; fewer where fewer are left.
            exclude: For each user the ids that are left out, of which the catalogue need not know all.
            filter: Which items may be found at all, by their `fields`.

        Returns:
            For each user (item_id, score) by falling score, equal ones in the order of insertion.
        """
        users = torch.as_tensor(user_vectors).detach().float().cpu()
        if users.dim() != 2 or users.shape[1] != self.dimension:
            raise ValueError(f"user_vectors: expected B x {self.dimension}, got the shape {tuple(users.shape)}")
        if not users.isfinite().all():
            raise ValueError("user_vectors hold NaN or infinity: read each user at a place that its row has")
        if top_k < 1:
            raise ValueError(f"top_k={top_k} finds nothing: give 1 or more")
        exclude = [None] * len(users) if exclude is None else exclude
        if len(exclude) != len(users):
            raise ValueError(f"exclude has {len(exclude)} entries for {len(users)} users: give one for each")
        names = [{normalize_id(item_id, "exclude") for item_id in own or ()} for own in exclude]
        left_out = [[self._rows[name] for name in own if name in self._rows] for own in names]
        found = self._ask_index(users, top_k, left_out, filter)
        missing = [number for number, own in enumerate(found) if own is None]
        if missing:
            exact = self._search_all(users[missing], top_k, [left_out[number] for number in missing], filter)
            for number, own in zip(missing, exact):
                found[number] = own
        return [own for own in found if own is not None]

    def _search_all(
        self, users: torch.Tensor, top_k: int, left_out: list[list[int]], predicate: Predicate | None
    ) -> list[Ranking]:
        """Search all N rows."""
        allowed = self._allowed(predicate)
        scores = torch.cat((users @ self._base.T, users @ self._side.T), 1)
        found = []
        for user, own, rows in zip(users, scores, left_out):
            kept = allowed.clone()
            kept[rows] = False
            count = min(top_k, int(kept.sum()))
            own = own.masked_fill(~kept, -torch.inf)
            cut = own.topk(count).values[-1] - ROUNDING if count else torch.inf
            found.append(self._ranked(user, (own >= cut).nonzero()[:, 0], count))
        return found

    def _allowed(self, predicate: Predicate | None) -> torch.Tensor:
        """Say which of the N rows may be found."""
        if predicate is None:
            return self._live
        allowed = torch.zeros_like(self._live)
        allowed[[row for item_id, row in self._rows.items() if predicate(self.fields(item_id))]] = True
        return allowed

    def _ask_index(
        self, users: torch.Tensor, top_k: int, left_out: list[list[int]], predicate: Predicate | None
    ) -> list[Ranking | None]:
        """Search by the index, ever more widely; None for a user whom it did not answer.

        What is removed, left out or filtered is dropped from what the index finds, so that the filter sees few items.
        """
        answers: list[Ranking | None] = [None] * len(users)
        if self._index is None:
            return answers
        verdicts: dict[int, bool] = {}

        def allowed(row: int) -> bool:
            if row not in verdicts:
                verdicts[row] = predicate is None or predicate(self.fields(self._ids[row]))
            return verdicts[row]

        waiting = list(range(len(users)))
        count, breadth = top_k + EXTRA + max(map(len, left_out), default=0), 1
        while waiting and count <= EXACT_SHARE * len(self._ids):
            asked = users[waiting]
            for number, base, side in zip(
                waiting, self._index.search(asked, count, breadth), nearest(asked, self._side, count)
            ):
                scores = torch.cat((base.scores, side.scores))
                rows = torch.cat((base.rows, side.rows + len(self._base)))
                own = {*left_out[number]}
                live = self._live[rows].tolist()
                kept = [
                    place for place, row in enumerate(rows.tolist()) if live[place] and row not in own and allowed(row)
                ]
                floor = max(base.floor, side.floor)
                answers[number] = self._certain(users[number], scores[kept], rows[kept], floor, top_k)
            waiting = [number for number in waiting if answers[number] is None]
            count, breadth = WIDER * count, WIDER * breadth
        return answers

    def _certain(
        self, user: torch.Tensor, scores: torch.Tensor, rows: torch.Tensor, floor: float, top_k: int
    ) -> Ranking | None:
        """Rank what was found, if there is enough of it and no other row can tie with the last."""
        if len(rows) < top_k:
            return None
        cut = scores.topk(top_k).values[-1] - ROUNDING
        return self._ranked(user, rows[scores >= cut].sort().values, top_k) if cut > floor else None

    def _ranked(self, user: torch.Tensor, rows: torch.Tensor, count: int) -> Ranking:
        """Rank the finalists, whose rows ascend.

        A matrix product rounds by the shape of the matrix and the place in it, and FAISS in its own way. The finalists'
        scores are therefore computed anew, so that equal items tie, and neither batch size nor other items nor the
        index change a score.
        """
        exact = cosines(user[None], self._gather(rows))[0]
        order = exact.argsort(descending=True, stable=True)[:count]
        return [(self._ids[row], score) for row, score in zip(rows[order].tolist(), exact[order].tolist())]

    # ------------------------------------------------------------------------------------------------------ the index

    @property
    def index(self) -> VectorIndex | None:
        """The index that searches go by; None = they are exact."""
        return self._index

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
            self._wanted = self._index = None
            return
        check_settings(kind, settings)
        self._index = None  # else compacting would build it as well
        self._compact()
        self._index = VectorIndex(kind, settings, self._base)
        self._wanted = {"kind": kind, "settings": settings}

    # ------------------------------------------------------------------------------------------------------- keeping

    def save(self, directory: str | Path) -> None:
        """Write the catalogue into a folder of its own, all or nothing: on failure, what was there before stays."""
        self._compact()
        write_catalogue(directory, self._items, self._base, self.fingerprint, self._wanted)

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
        items, vectors, fingerprint, wanted = read_catalogue(directory)
        catalogue = cls(fingerprint, vectors.shape[1])
        catalogue._replace(items, vectors)
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
                catalogue._wanted = wanted
        return catalogue


def cosines(users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
    """Multiply normalised B x D and M x D vectors: B x M, each rounded once, whatever stands beside it."""
    return (users.double()[:, None] * items.double()).sum(-1).float()


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
    return vectors


__all__ = ["Catalogue", "Predicate", "cosines", "embed"]
