"""Items and tables of them, as users hold them: texts or mappings of fields, in lists, data frames and datasets.

The files of a catalogue: items as Parquet, vectors as safetensors, and a manifest that vouches for both.

FAISS indexes over a catalogue's base vectors.

Shapes: B users, N vectors, K found for each user, D = vector_width.


A catalogue at one moment: its items and vectors, read and searched exactly or by an index.

Shapes: B users, N rows of vectors, M items of a call, D = vector_width.


A catalogue: items with their vectors, searched exactly or by an index, and changed at will, also by many threads.

Shapes: M items of a call, D = vector_width.
"""

import hashlib
import importlib
import json
import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from transformers.utils import logging

from .atomic_m6rec import atomic_folder, standing
from .configuration_m6rec import check_format
from .layers_m6rec import inference_mode
from .segment_cache_m6rec import SegmentCache
from .values_m6rec import normalize_id

# --------------------------------------------------------------------------------------------------- items and tables


Item = str | dict[str, Any]

"""A text, or fields; `item_id` among them is never worded."""

Model = Any

"""An M6RecForRecommendation, also within a PeftModel, which hands on what it lacks."""


class NamedText(str):
    """The text of an item of a catalogue of texts, with its id.

    Args:
        text: The text.
        item_id: The id.
    """

    item_id: str

    def __new__(cls, text: str, item_id: str) -> "NamedText":
        """Make a text with an id."""
        own = super().__new__(cls, text)
        own.item_id = item_id
        return own


def item_identity(item: Any, place: str = "item") -> str | None:
    """Return the id of an item, None if it carries none."""
    if isinstance(item, NamedText):
        return item.item_id
    known = isinstance(item, Mapping) and item.get("item_id") is not None
    return normalize_id(item["item_id"], f"{place}.item_id") if known else None


def without_stats(item: Any) -> Any:
    """Return an item without its statistics, which vary and so are no part of it."""
    if isinstance(item, Mapping) and "stats" in item:
        return {name: value for name, value in item.items() if name != "stats"}
    return item


def item_texts(processor: Any, items: Iterable[Any]) -> list[str]:
    """Word items as the processor's template does."""
    return processor.item_texts([without_stats(item) for item in items])


def plain(value: Any) -> Any:
    """Turn tensors, arrays and tuples, at any depth, into numbers and lists."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value


def table_rows(table: Any) -> Iterable[Any]:
    """Return the rows of a pandas data frame, or of anything that yields rows, such as a list or a dataset.

    Raises:
        TypeError: It is one row, or no table at all.
    """
    if hasattr(table, "iloc") and hasattr(table, "columns"):
        # None in place of NaN, NaT and NA: a field that is missing.
        return table.astype(object).where(table.notna(), None).to_dict("records")
    rows = hasattr(table, "__iter__") or hasattr(table, "__getitem__")
    single = getattr(table, "ndim", None) == 0  # a number as an array or a tensor, which cannot be iterated
    if isinstance(table, str | bytes | Mapping | type) or single or not rows:
        raise TypeError(f"expected a list, a data frame or a dataset of rows, got {type(table).__name__}")
    return table


# -------------------------------------------------------------------------------------------------------------- files


FORMAT = 1

MANIFEST, ITEMS, VECTORS = "catalogue.json", "items.parquet", "vectors.safetensors"

TEXT_COLUMN = "__text__"

"""Column of `items.parquet` for items that are a text and no fields."""

BATCH = 1024

"""Rows of `items.parquet` that are turned into items at once."""

LONGEST_HEADER = 100_000_000

"""Bytes of the header of a safetensors file, as the format allows."""


def write_catalogue(
    directory: str | Path,
    items: Mapping[str, Item],
    vectors: torch.Tensor,
    fingerprint: str,
    index: Mapping[str, Any] | None = None,
    next_number: int = 0,
) -> None:
    """Write a catalogue into a folder of its own, all or nothing: on failure, what was there before stays.

    Args:
        directory: The folder.
        items: Items by id.
        vectors: Their vectors, one row each.
        fingerprint: Of the model that made the vectors.
        index: Kind and settings of the index that is built whenever the catalogue is read; None = none. An index itself
            is never kept: its files are not safe to read from others.
        next_number: Id of the next item that is a text; it is written where the ids do not give it.

    Raises:
        ValueError: The folder holds other files, or a field has values that cannot be kept.
    """
    target = Path(directory).resolve()
    strange = sorted({path.name for path in target.glob("*")} - {MANIFEST, ITEMS, VECTORS})
    if strange:
        raise ValueError(f"{target} holds other files, such as {strange[0]!r}: give the catalogue a folder of its own")
    with atomic_folder(target) as fresh:
        encoded = _write_items(items, fresh / ITEMS)
        save_file({"vectors": vectors.contiguous()}, fresh / VECTORS)
        manifest = {
            "format": FORMAT,
            "fingerprint": fingerprint,
            "dimension": vectors.shape[1],
            "count": len(items),
            "json_columns": encoded,
            "index": index,
            "sha256": {name: _digest(fresh / name) for name in (ITEMS, VECTORS)},
        }
        if next_number > after_ids(items):
            manifest["next_number"] = next_number
        (fresh / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Kept:
    """What the files of a catalogue hold."""

    items: dict[str, Item]
    vectors: torch.Tensor
    """One row for each item, float32."""
    fingerprint: str
    index: dict[str, Any] | None
    """Kind and settings; older manifests have none."""
    next_number: int
    """Id of the next item that is a text."""


def after_ids(item_ids: Iterable[str], least: int = 0) -> int:
    """Return the smallest number, from `least` up, that is past every whole number among some ids.

    >>> after_ids(["7", "red", "007x"])
    8
    """
    numbers = (int(item_id) for item_id in item_ids if item_id.isascii() and item_id.isdigit() and len(item_id) < 16)
    return max(least, max(numbers, default=-1) + 1)


def read_catalogue(directory: str | Path) -> Kept:
    """Read a catalogue and make sure that it is whole, also while other processes replace it.

    The folder is read where `standing` finds it. What fails while the catalogue is replaced is read again.

    Raises:
        FileNotFoundError: There is no catalogue.
        ValueError: A file is damaged, or of another format or catalogue.
    """
    folder = Path(directory)
    while True:
        version = _version(folder)
        try:
            return _read_part(standing(folder), folder)
        except (FileNotFoundError, ValueError):
            if _version(folder) == version:
                raise


def _version(folder: Path) -> tuple[int, ...]:
    """Return what differs whenever another catalogue stands in a folder."""
    try:
        facts = (standing(folder) / MANIFEST).stat()
    except FileNotFoundError:
        return ()
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


def _read_part(standing: Path, folder: Path) -> Kept:
    """Read from handles that are opened at once: what they hold stays, though the folder be replaced meanwhile."""
    with ExitStack() as stack:
        files: dict[str, BufferedReader] = {}
        for name in (MANIFEST, ITEMS, VECTORS):
            try:
                files[name] = stack.enter_context((standing / name).open("rb"))
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
                if name == MANIFEST:
                    raise FileNotFoundError(
                        f"there is no catalogue in {folder}: {MANIFEST} is missing; Catalogue.save writes it"
                    ) from error
                raise ValueError(f"{folder / name} is missing: save the catalogue again") from error
        manifest = _read_manifest(files[MANIFEST], folder / MANIFEST)
        for name in (ITEMS, VECTORS):
            if hashlib.file_digest(files[name], "sha256").hexdigest() != manifest["sha256"].get(name):
                raise ValueError(f"{folder / name} is damaged or of another catalogue: save the catalogue again")
            files[name].seek(0)
        vectors = _read_vectors(files[VECTORS], folder / VECTORS, manifest["count"], manifest["dimension"])
        items = _read_items(files[ITEMS], folder / ITEMS, manifest["count"], manifest["json_columns"])
    number = after_ids(items, manifest.get("next_number", 0))
    return Kept(items, vectors, manifest["fingerprint"], manifest.get("index"), number)


def _write_items(items: Mapping[str, Item], path: Path) -> list[str]:
    """Write items as Parquet; return the columns that hold JSON, since Parquet has no type for their values."""
    rows = [{TEXT_COLUMN: item} if isinstance(item, str) else item for item in items.values()]
    pyarrow = _arrow()
    columns, encoded = {"item_id": pyarrow.array(list(items), "string")}, []
    for name in dict.fromkeys(name for row in rows for name in row if name != "item_id"):
        values = [row.get(name) for row in rows]
        columns[name] = _column(values)
        if columns[name] is None:
            try:
                texts = [None if value is None else json.dumps(value) for value in values]
            except TypeError as error:
                raise ValueError(
                    f"field {name!r} mixes kinds of values that cannot be kept together: {error}"
                ) from error
            columns[name] = pyarrow.array(texts, "string")
            encoded.append(name)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return encoded


def _column(values: list[Any]) -> Any:
    """Make an Arrow column that gives back what it was given; None if there is no such type."""
    pyarrow = _arrow()
    try:
        column = pyarrow.array(values)
    except (pyarrow.ArrowException, OverflowError):
        return None
    return column if column.to_pylist() == values else None


def _read_items(file: BufferedReader, path: Path, count: int, encoded: Collection[str]) -> dict[str, Item]:
    """Read items, after their number was compared: rows of a stranger's file may take any amount of memory."""
    pyarrow = _arrow()
    try:
        table = pyarrow.parquet.ParquetFile(file)
        found = table.metadata.num_rows
        if found != count:
            raise _damaged(path, f"expected {count} rows by {MANIFEST}, found {found}")
        items: dict[str, Item] = {}
        for batch in table.iter_batches(batch_size=BATCH):
            for row in batch.to_pylist():
                fields = {name: value for name, value in row.items() if value is not None}
                fields |= {name: json.loads(fields[name]) for name in encoded if name in fields}
                items[_text(fields, "item_id")] = _text(fields, TEXT_COLUMN) if TEXT_COLUMN in fields else fields
    # What pyarrow and json raise on rubbish whose digest is right.
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise error if isinstance(error, DamagedError) else _damaged(path, error) from error
    if len(items) != count:
        raise _damaged(path, f"an item_id is there twice: {count} rows, {len(items)} ids")
    return items


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields[name]
    if not isinstance(value, str):
        raise TypeError(f"{name}={value!r} is no text")
    return value


def _read_vectors(file: BufferedReader, path: Path, count: int, dimension: int) -> torch.Tensor:
    """Read the one float32 tensor of a safetensors file, whose header has to say what the manifest says."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    numbers = count * dimension
    if length > min(size, LONGEST_HEADER) or size != 8 + length + 4 * numbers:
        raise _damaged(path, f"{size} bytes do not hold {count} vectors of {dimension} numbers")
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, error) from error
    expected = {"vectors": {"dtype": "F32", "shape": [count, dimension], "data_offsets": [0, 4 * numbers]}}
    if not isinstance(header, dict) or {name: header[name] for name in header if name != "__metadata__"} != expected:
        raise _damaged(path, f"expected one float32 tensor `vectors` of {count} x {dimension}, found {header}")
    vectors: Any = np.empty((count, dimension), "<f4")
    if file.readinto(memoryview(vectors).cast("B") if numbers else bytearray()) != 4 * numbers:
        raise _damaged(path, "it ends too early")
    broken = int((~np.isfinite(vectors.sum(1))).sum())
    if broken:
        raise _damaged(path, f"{broken} of {count} vectors hold NaN or infinity")
    return torch.from_numpy(vectors)


class DamagedError(ValueError):
    """A file of a catalogue does not hold what it should."""


def _damaged(path: Path, reason: object) -> DamagedError:
    return DamagedError(f"{path} is damaged: {reason}. Save the catalogue again")


def _arrow() -> Any:
    """Import pyarrow, which only keeping a catalogue needs."""
    try:
        importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ImportError("a catalogue is kept as Parquet, which needs pyarrow: pip install pyarrow") from error
    return importlib.import_module("pyarrow")


def _read_manifest(file: BufferedReader, path: Path) -> dict[str, Any]:
    """Read the manifest and make sure that it says all that it should."""
    try:
        manifest = json.loads(file.read())
    except (ValueError, RecursionError) as error:
        raise _damaged(path, error) from error
    if not isinstance(manifest, dict):
        raise _damaged(path, f"expected a mapping, found {manifest!r}")
    check_format(manifest.get("format"), FORMAT, str(path))
    columns, index = manifest.get("json_columns"), manifest.get("index")
    rules = {
        "fingerprint": isinstance(manifest.get("fingerprint"), str),
        "dimension": _is_count(manifest.get("dimension")) and manifest["dimension"] > 0,
        "count": _is_count(manifest.get("count")),
        "next_number": _is_count(manifest.get("next_number", 0)),
        "json_columns": isinstance(columns, list) and all(isinstance(name, str) for name in columns),
        "sha256": isinstance(manifest.get("sha256"), dict),
        "index": index is None or isinstance(index, dict) and index.keys() == {"kind", "settings"},
    }
    for name, holds in rules.items():
        if not holds:
            raise _damaged(path, f"{name} is {manifest.get(name)!r}")
    return manifest


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------- approximate search


logger = logging.get_logger(__name__)

SETTINGS = {"flat": (), "hnsw": ("M", "efConstruction", "efSearch"), "ivf": ("nlist", "nprobe", "seed")}

"""Kinds of index, and the settings of each."""

LARGEST = 1 << 16

"""More of any setting would only exhaust memory or time."""

POINTS_A_LIST = 39

"""FAISS's own floor: centroids of fewer vectors are no centroids of anything."""

TRAINING_POINTS_A_LIST = 64


class Found(NamedTuple):
    """What a search found for one user."""

    scores: torch.Tensor
    """K, falling."""
    rows: torch.Tensor
    """K, of the vectors."""
    floor: float
    """Vectors that were not found may score this much, and by a search that is exact no more."""


def nearest(users: torch.Tensor, vectors: torch.Tensor, count: int) -> list[Found]:
    """Find the nearest of N x D vectors by comparing with all."""
    scores = users @ vectors.T
    return _founds(*scores.topk(min(count, len(vectors))), len(vectors))


def _founds(scores: torch.Tensor, rows: torch.Tensor, total: int) -> list[Found]:
    """Take B x K scores and rows apart, where -1 stands for rows that FAISS did not find."""
    founds = []
    for own, reached in zip(scores, rows):
        own, reached = own[reached >= 0], reached[reached >= 0]
        lowest = own[-1].item() if len(own) else torch.inf
        founds.append(Found(own, reached, -torch.inf if len(own) == total else lowest))
    return founds


def check_settings(kind: Any, settings: Mapping[str, Any]) -> None:
    """Make sure that there is such an index.

    Raises:
        ValueError: There is none, or it has no such setting.
    """
    if not isinstance(kind, str) or kind not in SETTINGS:
        raise ValueError(f"there is no index {kind!r}: choose one of {list(SETTINGS)}, or None for exact search")
    if not isinstance(settings, Mapping):
        raise ValueError(f"settings of the index {kind!r}: expected names and numbers, got {settings!r}")
    for name, value in settings.items():
        if name not in SETTINGS[kind]:
            takes = f"it takes {', '.join(SETTINGS[kind])}" if SETTINGS[kind] else "it takes none"
            raise ValueError(f"the index {kind!r} has no setting {name!r}: {takes}")
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST:
            raise ValueError(f"{name}={value!r}: give a whole number from 1 to {LARGEST}")
    if settings.get("M") == 1:
        raise ValueError("M=1 makes a graph that leads nowhere: give 2 or more")


class VectorIndex:
    """An index by inner product over vectors that do not change; it is built in memory, and never read from a file.

    - "flat" compares with every vector, as exact search does.
    - "hnsw" walks a graph. `M`: neighbours of a vector (32); `efConstruction`: how widely a new vector's neighbours are
      looked for (80); `efSearch`: how widely a search looks (64; 128 from 100,000 vectors on).
    - "ivf" compares with the vectors of some lists, each around a centroid. `nlist`: lists (four times the root of N;
      never more than one for 39 vectors); `nprobe`: lists that a search looks at (a 32nd of them, and 8 at least);
      `seed` of the centroids (1234).

    The same vectors make the same flat or ivf index again; a graph is the same only if one thread builds it, since
    several add vectors in a varying order.

    Imported after torch, FAISS uses torch's OpenMP runtime; imported before it, one of its own. Either way it is given
    as many threads as torch has: `torch.set_num_threads` governs both, and the workers of a data loader, which have
    one, can search. Other processes that are forked after a search must not search with several threads: OpenMP's are
    gone there, and it waits for them for ever, as under torch itself.

    Where more vectors are equal than have links to each other (2 M), a graph falls apart, and searches miss some.

    Args:
        kind: "flat", "hnsw" or "ivf".
        given: Settings, by FAISS's names.
        vectors: N x D, normalised, float32; they are copied.
    """

    def __init__(self, kind: str, given: Mapping[str, int], vectors: torch.Tensor) -> None:
        check_settings(kind, given)
        self.kind, self.given = kind, dict(given)
        self._faiss = _import_faiss()
        self.settings = self._complete(len(vectors))
        """All settings that are in force."""
        data = vectors.contiguous().numpy()
        with self._threads():
            self._index = self._make(vectors.shape[1])
            if len(data):  # nothing can be trained on nothing
                self._index.train(data)
                self._index.add(data)

    def search(self, users: torch.Tensor, count: int, breadth: int = 1) -> list[Found]:
        """Find the nearest vectors.

        Args:
            users: B x D, float32, on the CPU.
            count: K, how many for each user.
            breadth: How many times as widely as usual an approximate index looks.
        """
        if not self._index.ntotal:
            return nearest(users, users[:0], count)
        options: dict[str, Any] = {}
        if self.kind == "hnsw":
            wide = min(self.settings["efSearch"] * breadth, self._index.ntotal)
            options["params"] = self._faiss.SearchParametersHNSW(efSearch=wide)
        elif self.kind == "ivf":
            wide = min(self.settings["nprobe"] * breadth, self.settings["nlist"])
            options["params"] = self._faiss.SearchParametersIVF(nprobe=wide)
        with self._threads():
            scores, rows = self._index.search(users.contiguous().numpy(), count, **options)
        return _founds(torch.from_numpy(scores), torch.from_numpy(rows), self._index.ntotal)

    def _complete(self, count: int) -> dict[str, int]:
        """Add to the given settings those that suit N."""
        if self.kind == "hnsw":
            return {"M": 32, "efConstruction": 80, "efSearch": 64 if count < 100_000 else 128} | self.given
        if self.kind == "flat":
            return {}
        most = max(count // POINTS_A_LIST, 1)
        if self.given.get("nlist", 1) > most:
            logger.warning_once(f"nlist={self.given['nlist']} is too much for {count} vectors: {most} lists are made")
        lists = min(self.given.get("nlist", int(4 * count**0.5)), most)
        return {"nprobe": max(lists // 32, 8), "seed": 1234} | self.given | {"nlist": max(lists, 1)}

    def _make(self, dimension: int) -> Any:
        """Make an empty index."""
        faiss = self._faiss
        metric = faiss.METRIC_INNER_PRODUCT
        if self.kind == "flat":
            return faiss.IndexFlatIP(dimension)
        if self.kind == "hnsw":
            index = faiss.IndexHNSWFlat(dimension, self.settings["M"], metric)
            index.hnsw.efConstruction = self.settings["efConstruction"]
            return index
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dimension), dimension, self.settings["nlist"], metric)
        index.cp.seed = self.settings["seed"]
        index.cp.min_points_per_centroid = 1  # few lists are our doing: no warnings
        index.cp.max_points_per_centroid = TRAINING_POINTS_A_LIST
        return index

    @contextmanager
    def _threads(self) -> Iterator[None]:
        """Let FAISS use as many threads as torch does; the setting is the calling thread's."""
        before = self._faiss.omp_get_max_threads()
        self._faiss.omp_set_num_threads(torch.get_num_threads())
        try:
            yield
        finally:
            self._faiss.omp_set_num_threads(before)


def _import_faiss() -> Any:
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise ImportError(
            "an index needs FAISS: pip install faiss-cpu; without an index (None) searches are exact"
        ) from error


# ------------------------------------------------------------------------------------------ one moment of a catalogue


Predicate = Callable[[dict[str, Any]], bool]

"""Says of an item's fields whether the item may be recommended."""

Ranking = list[tuple[str, float]]

"""Ids and scores, the best first."""

ROUNDING = 1e-5

"""More than float32 products of normalised vectors are off by."""

EXTRA, WIDER, EXACT_SHARE = 16, 4, 1 / 16

"""An index is asked for so many rows more than wanted, then for so many times as many, up to this share of all."""


class Texts:
    """What a processor words the items of rows as; each row is worded once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._processor: Any = None
        self._texts: list[str] = []  # of the first rows
        self._rows: dict[str, list[int]] = {}

    def __reduce__(self) -> tuple[type, tuple]:
        return type(self), ()

    def kept(self, rows: Sequence[int]) -> "Texts":
        """Return the same for rows that are left and have new numbers, as far as they have been worded."""
        new = Texts()
        with self._lock:
            new._processor = self._processor
            new._texts = [self._texts[row] for row in rows if row < len(self._texts)]
        for row, text in enumerate(new._texts):
            new._rows.setdefault(text, []).append(row)
        return new

    def rows(self, texts: Collection[str], processor: Any, items: Sequence[Item], count: int) -> list[int]:
        """Return the rows, among the first `count` and perhaps later ones, that are worded as one of the texts."""
        with self._lock:
            if self._processor is not processor:
                self._processor, self._texts, self._rows = processor, [], {}
            for text in item_texts(processor, items[len(self._texts) : count]):
                self._rows.setdefault(text, []).append(len(self._texts))
                self._texts.append(text)
            return [row for text in texts for row in self._rows.get(text, ())]


@dataclass(frozen=True)
class State:
    """All of a catalogue at one moment.

    A row keeps its place until all rows are put into one new base matrix. `ids`, `items`, `rows` and `texts` are shared
    with later states, which append to them and change nothing that belongs to the first N rows; all else is replaced.
    """

    fingerprint: str
    dimension: int
    ids: list[str]
    """Of at least N rows, in the order of insertion."""
    items: list[Item]
    """Of at least N rows."""
    rows: dict[str, tuple[int, ...]]
    """All rows that an id has had, the oldest first."""
    live: torch.Tensor
    """N, False where the item was removed or replaced."""
    base: torch.Tensor
    side: torch.Tensor
    count: int
    """Live rows."""
    index: VectorIndex | None = None
    """Over `base`."""
    wanted: dict[str, Any] | None = None
    """Kind and settings of the index, also where there is no FAISS."""
    texts: Texts = field(default_factory=Texts)
    next_number: int = 0
    """Id of the next item that is a text: past every whole number that was ever an id."""

    @classmethod
    def of(cls, items: dict[str, Item], vectors: torch.Tensor, fingerprint: str, **more: Any) -> "State":
        """Make a state of one base matrix."""
        rows: dict[str, tuple[int, ...]] = {item_id: (row,) for row, item_id in enumerate(items)}
        live, side = torch.ones(len(items), dtype=torch.bool), vectors[:0]
        every = list(items), list(items.values())
        return cls(fingerprint, vectors.shape[1], *every, rows, live, vectors, side, len(items), **more)

    def row(self, item_id: str) -> int | None:
        """Return the row of an item."""
        for row in reversed(self.rows.get(item_id, ())):
            if row < len(self.live) and self.ids[row] == item_id:  # else a later state's
                return row if self.live[row] else None
        return None

    def known(self, item_id: Any) -> int:
        """Return the row of an item that has to be there."""
        name = normalize_id(item_id, "item_id")
        row = self.row(name)
        if row is None:
            raise ValueError(f"item_id {name!r} is not among the {self.count} items of the catalogue")
        return row

    def live_rows(self) -> list[int]:
        """Return the rows of all items in the order of insertion."""
        return self.live.nonzero()[:, 0].tolist()

    def fields(self, row: int) -> dict[str, Any]:
        """Return an item's fields and its `item_id`."""
        item = self.items[row]
        return {"item_id": self.ids[row], "item": item} if isinstance(item, str) else dict(item)

    def gather(self, rows: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """Return the vectors of rows, from the base and the side buffer."""
        index = torch.as_tensor(rows, dtype=torch.long)
        base = index < len(self.base)
        vectors = torch.empty(len(index), self.dimension)
        vectors[base], vectors[~base] = self.base[index[base]], self.side[index[~base] - len(self.base)]
        return vectors


class CatalogueView:
    """A catalogue as it was at one moment, for any number of threads: `Catalogue.snapshot` gives one."""

    def __init__(self, state: State) -> None:
        self._state = state

    @property
    def fingerprint(self) -> str:
        """Digest of the model that made the vectors."""
        return self._state.fingerprint

    @property
    def dimension(self) -> int:
        """Width of the vectors."""
        return self._state.dimension

    @property
    def index(self) -> VectorIndex | None:
        """The index that searches go by; None = they are exact."""
        return self._state.index

    def __len__(self) -> int:
        return self._state.count

    def __iter__(self) -> Iterator[str]:
        """Yield the ids in the order of insertion."""
        state = self._state
        return iter([state.ids[row] for row in state.live_rows()])

    def __contains__(self, item_id: Any) -> bool:
        return self._state.row(normalize_id(item_id, "item_id")) is not None

    def item(self, item_id: Any) -> Item:
        """Return an item as requests take it: its text, or its fields and its `item_id`."""
        state = self._state
        item = state.items[state.known(item_id)]
        return item if isinstance(item, str) else dict(item)

    def fields(self, item_id: Any) -> dict[str, Any]:
        """Return an item's fields and its `item_id`; the text of an item without fields is called `item`."""
        state = self._state
        return state.fields(state.known(item_id))

    def vectors(self, item_ids: Sequence[Any]) -> torch.Tensor:
        """Return the M x D vectors of items."""
        state = self._state
        return state.gather([state.known(each) for each in item_ids])

    def worded(self, texts: Collection[str], processor: Any) -> list[str]:
        """Return the ids of the items that the processor words as one of the texts."""
        state = self._state
        rows = state.texts.rows(texts, processor, state.items, len(state.live))
        return [state.ids[row] for row in rows if row < len(state.live) and state.live[row]]

    def check(self, model: Model) -> None:
        """Make sure that the vectors are this model's.

        Raises:
            ValueError: Another model made them.
        """
        check_fingerprint(self.fingerprint, model)

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
        state = self._state
        users = torch.as_tensor(user_vectors).detach().float().cpu()
        if users.dim() != 2 or users.shape[1] != state.dimension:
            raise ValueError(f"user_vectors: expected B x {state.dimension}, got the shape {tuple(users.shape)}")
        if not users.isfinite().all():
            raise ValueError(
                "user_vectors hold NaN or infinity: read each user at a place that its row has; if you do, the model's "
                "weights are damaged"
            )
        if top_k < 1:
            raise ValueError(f"top_k={top_k} finds nothing: give 1 or more")
        exclude = [None] * len(users) if exclude is None else exclude
        if len(exclude) != len(users):
            raise ValueError(f"exclude has {len(exclude)} entries for {len(users)} users: give one for each")
        names = [{normalize_id(item_id, "exclude") for item_id in own or ()} for own in exclude]
        left_out = [[row for name in own if (row := state.row(name)) is not None] for own in names]
        found = _ask_index(state, users, top_k, left_out, filter)
        missing = [number for number, own in enumerate(found) if own is None]
        if missing:
            exact = _search_all(state, users[missing], top_k, [left_out[number] for number in missing], filter)
            for number, own in zip(missing, exact):
                found[number] = own
        return [own for own in found if own is not None]


def check_fingerprint(fingerprint: str, model: Model) -> None:
    """Raise if another model made the vectors."""
    found = model.fingerprint()
    if found != fingerprint:
        raise ValueError(
            f"the catalogue's vectors were made by a model with fingerprint {fingerprint[:12]}, this one has "
            f"{found[:12]} (other weights, adapters or number type): make them again with "
            "catalogue.encode(model, processor)"
        )


def cosines(users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
    """Multiply normalised B x D and M x D vectors: B x M, each rounded once, whatever stands beside it."""
    return (users.double()[:, None] * items.double()).sum(-1).float()


def _search_all(
    state: State, users: torch.Tensor, top_k: int, left_out: list[list[int]], predicate: Predicate | None
) -> list[Ranking]:
    """Search all N rows."""
    allowed = _allowed(state, predicate)
    scores = torch.cat((users @ state.base.T, users @ state.side.T), 1)
    found = []
    for user, own, rows in zip(users, scores, left_out):
        kept = allowed.clone()
        kept[rows] = False
        count = min(top_k, int(kept.sum()))
        own = own.masked_fill(~kept, -torch.inf)
        cut = own.topk(count).values[-1] - ROUNDING if count else torch.inf
        found.append(_ranked(state, user, (own >= cut).nonzero()[:, 0], count))
    return found


def _allowed(state: State, predicate: Predicate | None) -> torch.Tensor:
    """Say which of the N rows may be found."""
    if predicate is None:
        return state.live
    allowed = torch.zeros_like(state.live)
    allowed[[row for row in state.live_rows() if predicate(state.fields(row))]] = True
    return allowed


def _ask_index(
    state: State, users: torch.Tensor, top_k: int, left_out: list[list[int]], predicate: Predicate | None
) -> list[Ranking | None]:
    """Search by the index, ever more widely; None for a user whom it did not answer.

    What is removed, left out or filtered is dropped from what the index finds, so that the filter sees few items.
    """
    answers: list[Ranking | None] = [None] * len(users)
    if state.index is None:
        return answers
    verdicts: dict[int, bool] = {}

    def allowed(row: int) -> bool:
        if row not in verdicts:
            verdicts[row] = predicate is None or predicate(state.fields(row))
        return verdicts[row]

    waiting = list(range(len(users)))
    count, breadth = top_k + EXTRA + max(map(len, left_out), default=0), 1
    while waiting and count <= EXACT_SHARE * len(state.live):
        asked = users[waiting]
        for number, base, side in zip(
            waiting, state.index.search(asked, count, breadth), nearest(asked, state.side, count)
        ):
            scores = torch.cat((base.scores, side.scores))
            rows = torch.cat((base.rows, side.rows + len(state.base)))
            own = {*left_out[number]}
            live = state.live[rows].tolist()
            kept = [place for place, row in enumerate(rows.tolist()) if live[place] and row not in own and allowed(row)]
            floor = max(base.floor, side.floor)
            answers[number] = _certain(state, users[number], scores[kept], rows[kept], floor, top_k)
        waiting = [number for number in waiting if answers[number] is None]
        count, breadth = WIDER * count, WIDER * breadth
    return answers


def _certain(
    state: State, user: torch.Tensor, scores: torch.Tensor, rows: torch.Tensor, floor: float, top_k: int
) -> Ranking | None:
    """Rank what was found, if there is enough of it and no other row can tie with the last."""
    if len(rows) < top_k:
        return None
    cut = scores.topk(top_k).values[-1] - ROUNDING
    return _ranked(state, user, rows[scores >= cut].sort().values, top_k) if cut > floor else None


def _ranked(state: State, user: torch.Tensor, rows: torch.Tensor, count: int) -> Ranking:
    """Rank the finalists, whose rows ascend.

    A matrix product rounds by the shape of the matrix and the place in it, and FAISS in its own way. The finalists'
    scores are therefore computed anew, so that equal items tie, and neither batch size nor other items nor the
    index change a score.
    """
    exact = cosines(user[None], state.gather(rows))[0]
    order = exact.argsort(descending=True, stable=True)[:count]
    return [(state.ids[row], score) for row, score in zip(rows[order].tolist(), exact[order].tolist())]


# ------------------------------------------------------------------------------------------------------ the catalogue


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
    with inference_mode(model):
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


__all__ = [
    "ITEMS",
    "MANIFEST",
    "SETTINGS",
    "TEXT_COLUMN",
    "VECTORS",
    "Catalogue",
    "CatalogueView",
    "Found",
    "Item",
    "Kept",
    "Model",
    "NamedText",
    "Predicate",
    "State",
    "VectorIndex",
    "check_fingerprint",
    "check_settings",
    "cosines",
    "embed",
    "item_identity",
    "item_texts",
    "nearest",
    "plain",
    "read_catalogue",
    "table_rows",
    "without_stats",
    "write_catalogue",
]
