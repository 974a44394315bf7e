"""A catalogue: items with their vectors, searched exactly or by an index, and changed by any number of threads.

Its parts: items as users pass them (texts or mappings of fields, in lists, data frames and datasets); the files of a
catalogue (items as Parquet, vectors as safetensors, and a manifest with digests); FAISS indexes over the base vectors;
the immutable state of a catalogue at one moment; and `Catalogue`, which replaces that state with each change.

They are one file, with a section for each, because a checkpoint carries few files and all in one folder.

Shapes: B users, N rows of vectors, K results per user, M items of a call, D = vector_width.
"""

import copy
import hashlib
import importlib
import json
import math
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from io import BufferedReader
from numbers import Real
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from transformers.utils import logging

from .atomic_m6rec import Journal, atomic_folder, read_journal, recover, standing
from .configuration_m6rec import check_format
from .item_features_m6rec import (
    NOTHING,
    WIDTH,
    Counts,
    EventLog,
    Evidence,
    Histories,
    ItemWeights,
    Reader,
    ReadTexts,
    Sparse,
    Transitions,
    Words,
    ages,
    reads_item_rows,
    stretches,
    vector_width,
)
from .layers_m6rec import inference_mode
from .segment_cache_m6rec import SegmentCache
from .trie_m6rec import ItemTrie
from .values_m6rec import MAPPINGS, SIMPLE, TIME_UNITS, KnownItem, check_size, normalize_id, short, time_seconds

# --------------------------------------------------------------------------------------------------- items and tables


Item = str | dict[str, Any]
"""A text, or fields; the field `item_id` is not part of the text."""

Model = Any
"""An M6RecForRecommendation, possibly inside a PeftModel, which forwards attributes."""


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
    """Return the id of an item, None if it has none."""
    if isinstance(item, NamedText):
        return item.item_id
    known = isinstance(item, MAPPINGS) and item.get("item_id") is not None
    return normalize_id(item["item_id"], f"{place}.item_id") if known else None


def without_stats(item: Any) -> Any:
    """Return an item without its statistics, which vary and are not part of the item."""
    if isinstance(item, MAPPINGS) and "stats" in item:
        return {name: value for name, value in item.items() if name != "stats"}
    return item


def item_texts(processor: Any, items: Iterable[Any]) -> list[str]:
    """Return the texts of items by the processor's template."""
    return processor.item_texts([without_stats(item) for item in items])


class PlainTexts:
    """A processor without a template: the text of an item is the texts of its fields, joined."""

    def item_texts(self, items: Iterable[Item]) -> list[str]:
        """Return the texts of items.

        >>> PlainTexts().item_texts([{"item_id": "7", "title": "Dune", "year": 2021, "genres": ["Drama", "SF"]}, "tea"])
        ['Dune 2021 Drama SF', 'tea']
        """
        return [item if isinstance(item, str) else " ".join(_field_texts(item)) for item in items]


def _field_texts(item: Mapping[str, Any]) -> Iterator[str]:
    for name, value in item.items():
        if name not in ("item_id", "stats"):
            yield from (str(each) for each in (value if isinstance(value, list | tuple) else [value]))


def plain(value: Any) -> Any:
    """Convert tensors, arrays and tuples, at any depth, to numbers and lists."""
    kind = type(value)
    if kind in SIMPLE:
        return value
    if kind is dict:
        return {name: own if type(own) in SIMPLE else plain(own) for name, own in value.items()}
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [own if type(own) in SIMPLE else plain(own) for own in value]
    return value


def is_frame(table: Any) -> bool:
    """Return whether a table is a pandas data frame."""
    return hasattr(table, "iloc") and hasattr(table, "columns")


def _missing_as_none(frame: Any) -> Any:
    """Replace NaN, NaT and NA of a data frame or a column, which mark missing fields, by None."""
    return frame.astype(object).where(frame.notna(), None)


def table_rows(table: Any) -> Iterable[Any]:
    """Return the rows of a pandas data frame, or of any iterable of rows, such as a list or a dataset.

    Raises:
        TypeError: If it is a single row or no table.
    """
    if is_frame(table):
        return _missing_as_none(table).to_dict("records")
    rows = hasattr(table, "__iter__") or hasattr(table, "__getitem__")
    single = getattr(table, "ndim", None) == 0  # a number as an array or a tensor, which cannot be iterated
    if isinstance(table, str | bytes | bytearray | memoryview | Mapping | type) or single or not rows:
        raise TypeError(f"expected a list, a data frame or a dataset of rows, got {type(table).__name__}")
    return table


# -------------------------------------------------------------------------------------------------------------- files


FORMAT = 2
"""Format version: 2 = with evidence, which older code would drop; a catalogue without evidence is written as 1."""

MANIFEST, ITEMS, VECTORS = "catalogue.json", "items.parquet", "vectors.safetensors"

EVIDENCE, EVENTS, JOURNAL = "evidence.safetensors", "events.parquet", "events.journal"
"""Files of evidence: counts; events, which may be left out; journal of events since the last save."""

READER_FILE = "reader.safetensors"
"""File of the reader, if evidence compares texts."""

NO_MODEL = ""
"""Fingerprint of a catalogue that no model has embedded."""

TEXT_COLUMN = "__text__"
"""Column of `items.parquet` for items that are a text without fields."""

BATCH = 1024
"""Rows of `items.parquet` that are converted at once."""

LONGEST_HEADER = 100_000_000
"""Most bytes of the header of a safetensors file, by its format."""


@dataclass(frozen=True)
class KeptEvidence:
    """Evidence as stored in the files of a catalogue."""

    words: Words
    """One row for each item, in the order of the items."""
    transitions: Transitions
    names: Sequence[str]
    """Item id by number in the transitions."""
    log: EventLog
    reading: ReadTexts | None = None
    """One row for each item; None = evidence does not compare texts."""
    linear: ItemWeights | None = None
    """Weights of the linear model by number; None = there are none."""


def write_catalogue(
    directory: str | Path,
    items: Mapping[str, Item],
    vectors: torch.Tensor,
    fingerprint: str,
    index: Mapping[str, Any] | None = None,
    next_number: int = 0,
    evidence: KeptEvidence | None = None,
    exclude_seen: bool = True,
) -> None:
    """Write a catalogue atomically into a separate folder: on failure, the earlier catalogue there stays.

    Args:
        directory: The folder.
        items: Items by id.
        vectors: Their vectors, one row each.
        fingerprint: Fingerprint of the model that made the vectors.
        index: Kind and settings of the index to build whenever the catalogue is read; None = none. The index itself is
            not stored, since index files from others are not safe to read.
        next_number: Id of the next item that is a text; it is stored if the ids do not determine it.
        evidence: Evidence of the catalogue; None = none.
        exclude_seen: As `CatalogueView.exclude_seen`.

    Raises:
        ValueError: If the folder holds other files, or a field has values that cannot be stored.
    """
    target = Path(directory).resolve()
    own = {MANIFEST, ITEMS, VECTORS, EVIDENCE, EVENTS, JOURNAL, READER_FILE}
    strange = sorted({path.name for path in target.glob("*")} - own)
    if strange:
        raise ValueError(f"{target} holds other files, such as {strange[0]!r}: give the catalogue a folder of its own")
    with atomic_folder(target) as fresh:
        encoded, orders = _write_items(items, fresh / ITEMS)
        save_file({"vectors": vectors.contiguous()}, fresh / VECTORS)
        manifest: dict[str, Any] = {
            "format": 1 if evidence is None else FORMAT,
            "fingerprint": fingerprint,
            "dimension": vectors.shape[1],
            "count": len(items),
            "json_columns": encoded,
            "index": index,
            "sha256": {name: _digest(fresh / name) for name in (ITEMS, VECTORS)},
        }
        if next_number > after_ids(items):
            manifest["next_number"] = next_number
        if not exclude_seen:
            manifest["exclude_seen"] = False
        if orders:
            manifest["field_orders"] = orders
        if evidence is not None:
            _write_evidence(evidence, fresh)
            manifest["evidence"] = evidence.transitions.rule.to_dict()
            manifest |= {"events": len(evidence.log), "all_events": evidence.log.is_complete}
            names = [EVIDENCE, EVENTS, *([] if evidence.reading is None else [READER_FILE])]
            manifest["sha256"] |= {name: _digest(fresh / name) for name in names}
        (fresh / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Kept:
    """Content of the files of a catalogue."""

    items: dict[str, Item]
    vectors: torch.Tensor
    """One row for each item, float32."""
    fingerprint: str
    index: dict[str, Any] | None
    """Kind and settings of the index; older manifests have none."""
    next_number: int
    """Id of the next item that is a text."""
    evidence: KeptEvidence | None = None
    """Without the events of the journal."""
    journal: Sequence[Any] = ()
    """Records of changes of the evidence since then."""
    journal_size: int = 0
    version: tuple[int, ...] = ()
    """Differs whenever another catalogue stands in the folder."""
    exclude_seen: bool = True


def after_ids(item_ids: Iterable[str], least: int = 0) -> int:
    """Return the smallest number, at least `least`, that exceeds every whole number among the ids.

    >>> after_ids(["7", "red", "007x"])
    8
    """
    numbers = (int(item_id) for item_id in item_ids if item_id.isascii() and item_id.isdigit() and len(item_id) < 16)
    return max(least, max(numbers, default=-1) + 1)


def read_catalogue(directory: str | Path) -> Kept:
    """Read a catalogue and verify that it is complete, even while other processes replace it.

    `standing` locates the folder. A read that fails while the catalogue is being replaced is repeated.

    Raises:
        FileNotFoundError: If there is no catalogue.
        ValueError: If a file is damaged, or of another format or catalogue.
    """
    folder = Path(directory)
    while True:
        version = folder_version(folder)
        try:
            return replace(_read_part(standing(folder), folder), version=version)
        except (FileNotFoundError, ValueError):
            if folder_version(folder) == version:
                raise


def folder_version(folder: Path) -> tuple[int, ...]:
    """Return a key that changes whenever another catalogue replaces the one in a folder."""
    try:
        facts = (standing(folder) / MANIFEST).stat()
    except FileNotFoundError:
        return ()
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


def _read_part(standing: Path, folder: Path) -> Kept:
    """Read from handles that are all opened first: their content stays, even if the folder is replaced meanwhile."""
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
        for name in (EVIDENCE, EVENTS, JOURNAL, READER_FILE):
            with suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
                files[name] = stack.enter_context((standing / name).open("rb"))
        manifest = _read_manifest(files[MANIFEST], folder / MANIFEST)
        own = {ITEMS, VECTORS} | ({EVIDENCE, EVENTS, READER_FILE} & {*files} if manifest.get("evidence") else set())
        for name in sorted(own):
            if hashlib.file_digest(files[name], "sha256").hexdigest() != manifest["sha256"].get(name):
                raise ValueError(f"{folder / name} is damaged or of another catalogue: save the catalogue again")
            files[name].seek(0)
        vectors = _read_vectors(files[VECTORS], folder / VECTORS, manifest["count"], manifest["dimension"])
        items = _read_items(files[ITEMS], folder / ITEMS, manifest["count"], manifest["json_columns"])
        _ordered(items, manifest.get("field_orders", []), folder / MANIFEST)
        evidence: KeptEvidence | None = None
        journal: tuple[list[Any], int] = ([], 0)
        if manifest.get("evidence"):
            evidence = _read_evidence(files, folder, manifest)
            journal = read_journal(files[JOURNAL].read() if JOURNAL in files else b"", folder / JOURNAL)
    number = after_ids(items, manifest.get("next_number", 0))
    seen = manifest.get("exclude_seen", True)
    return Kept(
        items, vectors, manifest["fingerprint"], manifest.get("index"), number, evidence, *journal, exclude_seen=seen
    )


def _write_items(items: Mapping[str, Item], path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Write items as Parquet.

    Returns:
        The columns stored as JSON, whose values have no Parquet type; and the orders of fields that differ from that of
        the columns, each with its rows: the text of an item depends on the order.
    """
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
    orders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    places = {name: place for place, name in enumerate(columns)}
    for number, row in enumerate(rows):
        fields = tuple(name for name, value in row.items() if value is not None and name != "item_id")
        if list(fields) != sorted(fields, key=places.__getitem__):
            orders[fields].append(number)
    return encoded, [{"fields": [*fields], "rows": numbers} for fields, numbers in orders.items()]


def _ordered(items: dict[str, Item], orders: Any, path: Path) -> None:
    """Restore the orders of fields, from the manifest at `path`."""
    try:
        names = [*items] if orders else []
        for order in orders:
            for number in order["rows"]:
                fields = items[names[number]]
                if not isinstance(fields, Mapping) or {*order["fields"], "item_id"} != {*fields}:
                    raise ValueError(f"row {number} has other fields than {order['fields']}")
                items[names[number]] = {name: fields[name] for name in ("item_id", *order["fields"])}
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise _damaged(path, error) from error


def _column(values: list[Any]) -> Any:
    """Make an Arrow column that returns the same values when read; None if there is no such type."""
    pyarrow = _arrow()
    try:
        column = pyarrow.array(values)
    except (pyarrow.ArrowException, OverflowError):
        return None
    return column if column.to_pylist() == values else None


def _read_items(file: BufferedReader, path: Path, count: int, encoded: Collection[str]) -> dict[str, Item]:
    """Read items, after checking their number: an untrusted file could otherwise take any amount of memory."""
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
    # Errors of pyarrow and json for invalid content with a correct digest.
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise error if isinstance(error, DamagedError) else _damaged(path, error) from error
    if len(items) != count:
        raise _damaged(path, f"an item_id is there twice: {count} rows, {len(items)} ids")
    return items


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields[name]
    if not isinstance(value, str):
        raise TypeError(f"{name}={short(value)} is no text")
    return value


def _read_vectors(file: BufferedReader, path: Path, count: int, dimension: int) -> torch.Tensor:
    """Read the single float32 tensor of a safetensors file, whose header must agree with the manifest."""
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


def _write_evidence(evidence: KeptEvidence, fresh: Path) -> None:
    """Write counts, events and the reader; words are stored for rows without gaps."""
    words, log, names = evidence.words, evidence.log, list(evidence.names)
    keys, totals = evidence.transitions.counts()
    tensors = {
        "keys": keys,
        "totals": totals,
        "met": evidence.transitions.met,
        "latest": np.array([log.latest]),
        "names": _packed(names),
        "word_starts": words.starts,
        "word_columns": words.columns,
        "vocabulary": _packed(list(words.vocabulary)),
    }
    if evidence.reading is not None:
        tensors |= {"token_starts": evidence.reading.starts, "token_columns": evidence.reading.columns}
        evidence.reading.reader.save(fresh / READER_FILE)
    if evidence.linear is not None:
        linear = evidence.linear
        tensors |= {"linear_starts": linear.starts, "linear_values": linear.values}
        tensors["linear_columns"] = linear.columns.astype(np.int32)
    save_file({name: torch.from_numpy(np.ascontiguousarray(own)) for name, own in tensors.items()}, fresh / EVIDENCE)
    pyarrow, events = _arrow(), log.events
    ids = {number: user for user, number in log.numbers.items()}
    numbers, users = np.unique(events.users, return_inverse=True)
    told = pyarrow.array([ids[number] for number in numbers.tolist()], "string")
    columns = {
        "user_id": pyarrow.DictionaryArray.from_arrays(pyarrow.array(users.astype(np.int32)), told),
        "item_number": pyarrow.array(events.items),
        "timestamp": pyarrow.array(events.times),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), fresh / EVENTS)


def _packed(texts: list[str]) -> np.ndarray:
    return np.array(bytearray(json.dumps(texts).encode()), np.uint8)


def _read_evidence(files: Mapping[str, BufferedReader], folder: Path, manifest: Mapping[str, Any]) -> KeptEvidence:
    """Read evidence, and verify that it is consistent."""
    if EVIDENCE not in files:
        raise ValueError(f"{folder / EVIDENCE} is missing: save the catalogue again")
    path = folder / EVIDENCE
    try:
        rule = Evidence.from_dict(manifest["evidence"])
    except ValueError as error:
        raise _damaged(folder / MANIFEST, error) from error
    try:
        found = {name: own.numpy() for name, own in load(files[EVIDENCE].read()).items()}
        names, vocabulary = (_unpacked(found[name]) for name in ("names", "vocabulary"))
        kinds = {"keys": "i8", "totals": "i8", "met": "i8", "latest": "f8", "word_starts": "i8", "word_columns": "i8"}
        numbers = {name: _column_of(found[name], kind) for name, kind in kinds.items()}
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, error) from error
    keys, totals, met, latest, starts, columns = numbers.values()
    first, second = np.divmod(keys, WIDTH)
    rules = {
        "keys": bool((np.diff(keys) > 0).all() and ((first >= 0) & (first < len(names)) & (second < len(names))).all()),
        "totals": len(totals) == len(keys) and bool((totals > 0).all()),
        "met": len(met) == len(names) and bool((met >= 0).all()),
        "latest": len(latest) == 1 and bool(np.isfinite(latest).all()),
        "names": len({*names}) == len(names),
        "word_starts": len(starts) == manifest["count"] + 1 and starts[0] == 0 and starts[-1] == len(columns),
        "word_columns": bool((np.diff(starts) >= 0).all() and ((columns >= 0) & (columns < len(vocabulary))).all()),
        "vocabulary": len({*vocabulary}) == len(vocabulary),
    }
    for name, holds in rules.items():
        if not holds:
            raise _damaged(path, f"its {name} do not fit the rest")
    everything = manifest.get("all_events", True) and (EVENTS in files or not manifest["events"])
    log = EventLog(rule, None if everything else float(latest[0]))
    if EVENTS in files:
        log.fill(_read_events(files[EVENTS], folder / EVENTS, log, (manifest["events"], len(names))))
    end = float(latest[0])
    counted = replace(Transitions.empty(rule), origin=rule.origin(end))
    transitions = replace(counted.adding(Counts(keys, totals), len(names), end), met=met)
    known = {word: number for number, word in enumerate(vocabulary)}
    words = Words(known, starts, columns, np.ones(manifest["count"], bool))
    reading = _read_reading(files, folder, found, rule, words.live)
    return KeptEvidence(words, transitions, names, log, reading, _read_linear(path, found, rule, len(names)))


def _read_linear(path: Path, found: Mapping[str, np.ndarray], rule: Evidence, count: int) -> ItemWeights | None:
    """Read the weights of the linear model, if there are any."""
    if "linear_starts" not in found and not rule.linear:
        return None
    try:
        kinds = {"linear_starts": "i8", "linear_columns": "i4", "linear_values": "f4"}
        starts, columns, values = (_column_of(found[name], kind) for name, kind in kinds.items())
    except (KeyError, TypeError) as error:
        raise _damaged(path, error) from error
    fits = 1 <= len(starts) <= count + 1 and starts[0] == 0 and starts[-1] == len(columns) == len(values)
    fits = fits and bool((np.diff(starts) >= 0).all() and ((columns >= 0) & (columns < count)).all())
    if not (fits and np.isfinite(values).all()):
        raise _damaged(path, "its linear_starts, linear_columns and linear_values do not fit the rest")
    return ItemWeights(starts, columns.astype(np.int64), values)


def _read_reading(
    files: Mapping[str, BufferedReader], folder: Path, found: Mapping[str, np.ndarray], rule: Evidence, live: np.ndarray
) -> ReadTexts | None:
    """Read the reader, and the tokens of all items, if evidence compares texts."""
    if not rule.texts:
        return None
    if READER_FILE not in files:
        raise ValueError(f"{folder / READER_FILE} is missing: save the catalogue again")
    reader = Reader.read(files[READER_FILE].read(), folder / READER_FILE)
    try:
        starts, columns = _column_of(found["token_starts"], "i8"), _column_of(found["token_columns"], "i4")
    except (KeyError, TypeError) as error:
        raise _damaged(folder / EVIDENCE, error) from error
    fits = len(starts) == len(live) + 1 and starts[0] == 0 and starts[-1] == len(columns)
    fits = fits and bool((np.diff(starts) >= 0).all() and ((columns >= 0) & (columns < len(reader.vectors))).all())
    if not fits:
        raise _damaged(folder / EVIDENCE, "its token_starts and token_columns do not fit the rest")
    return ReadTexts(reader, starts, columns, live)


def _unpacked(data: np.ndarray) -> list[str]:
    texts = json.loads(data.tobytes())
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise TypeError("expected a list of texts")
    return texts


def _column_of(numbers: np.ndarray, kind: str) -> np.ndarray:
    if numbers.ndim != 1 or numbers.dtype != np.dtype(kind):
        raise TypeError(f"expected one row of {np.dtype(kind)}, found {numbers.dtype} of shape {numbers.shape}")
    return numbers


def _read_events(file: BufferedReader, path: Path, log: EventLog, counts: tuple[int, int]) -> Histories:
    """Read events, after checking `counts`, the numbers of events and items; the log numbers their users."""
    pyarrow = _arrow()
    try:
        parquet = pyarrow.parquet.ParquetFile(file)
        if parquet.metadata.num_rows != counts[0]:
            raise _damaged(path, f"expected {counts[0]} rows by {MANIFEST}, found {parquet.metadata.num_rows}")
        table = parquet.read()
        users = table["user_id"].combine_chunks().dictionary_encode()
        items, times = (table[name].to_numpy() for name in ("item_number", "timestamp"))
        numbers = log.numbered([normalize_id(user, "user_id") for user in users.dictionary.to_pylist()])
        events = Histories(numbers[users.indices.to_numpy()], _column_of(items, "i8"), _column_of(times, "f8"))
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise error if isinstance(error, DamagedError) else _damaged(path, error) from error
    if ((events.items < 0) | (events.items >= counts[1]) | ~np.isfinite(events.times)).any():
        raise _damaged(path, "an event names an item that is not there, or no time")
    return events


class DamagedError(ValueError):
    """A file of a catalogue has invalid content."""


def _damaged(path: Path, reason: object) -> DamagedError:
    return DamagedError(f"{path} is damaged: {reason}. Save the catalogue again")


def _arrow() -> Any:
    """Import pyarrow, which only saving and loading a catalogue need."""
    try:
        importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ImportError("a catalogue is kept as Parquet, which needs pyarrow: pip install pyarrow") from error
    return importlib.import_module("pyarrow")


def _read_manifest(file: BufferedReader, path: Path) -> dict[str, Any]:
    """Read the manifest and verify that it is complete."""
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
        "evidence": manifest.get("evidence") is None or isinstance(manifest["evidence"], dict),
        "events": _is_count(manifest.get("events", 0)) and ("events" in manifest or not manifest.get("evidence")),
        "all_events": isinstance(manifest.get("all_events", True), bool),
        "exclude_seen": isinstance(manifest.get("exclude_seen", True), bool),
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
"""Kinds of index, with the settings of each."""

LARGEST = 1 << 16
"""Upper bound of every setting: larger values would only exhaust memory or time."""

POINTS_A_LIST = 39
"""FAISS's minimum number of vectors per centroid."""

TRAINING_POINTS_A_LIST = 64


class Found(NamedTuple):
    """Search result of one user."""

    scores: torch.Tensor
    """K, descending."""
    rows: torch.Tensor
    """K, of the vectors."""
    floor: float
    """Score that vectors outside the result may have; in an exact search none exceeds it."""


def nearest(users: torch.Tensor, vectors: torch.Tensor, count: int) -> list[Found]:
    """Find the nearest of N x D vectors by exhaustive comparison."""
    scores = users @ vectors.T
    return _founds(*scores.topk(min(count, len(vectors))), len(vectors))


def _founds(scores: torch.Tensor, rows: torch.Tensor, total: int) -> list[Found]:
    """Split B x K scores and rows by user; -1 marks rows that FAISS did not find."""
    founds = []
    for own, reached in zip(scores, rows):
        own, reached = own[reached >= 0], reached[reached >= 0]
        lowest = own[-1].item() if len(own) else torch.inf
        founds.append(Found(own, reached, -torch.inf if len(own) == total else lowest))
    return founds


def check_settings(kind: Any, settings: Mapping[str, Any]) -> None:
    """Check the kind and the settings of an index.

    Raises:
        ValueError: If the kind or a setting is unknown.
    """
    if not isinstance(kind, str) or kind not in SETTINGS:
        raise ValueError(f"there is no index {kind!r}: choose one of {list(SETTINGS)}, or None for exact search")
    if not isinstance(settings, Mapping):
        raise ValueError(f"settings of the index {kind!r}: expected names and numbers, got {short(settings)}")
    for name, value in settings.items():
        if name not in SETTINGS[kind]:
            takes = f"it takes {', '.join(SETTINGS[kind])}" if SETTINGS[kind] else "it takes none"
            raise ValueError(f"the index {kind!r} has no setting {name!r}: {takes}")
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST:
            raise ValueError(f"{name}={short(value)}: give a whole number from 1 to {LARGEST}")
    if settings.get("M") == 1:
        raise ValueError("M=1 makes a graph that leads nowhere: give 2 or more")


class VectorIndex:
    """An inner-product index over constant vectors; it is built in memory, and never read from a file.

    - "flat" compares with every vector, as exact search does.
    - "hnsw" searches a graph. `M`: neighbours of a vector (32); `efConstruction`: width of the search for a new
      vector's neighbours (80); `efSearch`: width of a search (64; 128 from 100,000 vectors on).
    - "ivf" compares with the vectors of some lists, each around a centroid. `nlist`: number of lists (four times the
      root of N; at most one per 39 vectors); `nprobe`: lists per search (a 32nd of them, at least 8); `seed` of the
      centroids (1234).

    A flat or ivf index is reproducible from the same vectors; a graph only if one thread builds it, since several
    threads add vectors in varying order.

    If FAISS is imported after torch, it uses torch's OpenMP runtime, otherwise its own. In both cases it uses as many
    threads as torch: `torch.set_num_threads` governs both, and data loader workers, which have one thread, can search.
    Other processes that are forked after a search must not search with several threads: OpenMP's threads do not exist
    there, and OpenMP would wait for them indefinitely, as under torch itself.

    If more vectors are equal than a vector has links (2 M), a graph becomes disconnected, and searches miss vectors.

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
        """All settings in effect."""
        data = vectors.contiguous().numpy()
        with self._threads():
            self._index = self._make(vectors.shape[1])
            if len(data):  # FAISS cannot train without vectors
                self._index.train(data)
                self._index.add(data)

    def __getstate__(self) -> dict[str, Any]:
        content = self._faiss.serialize_index(self._index)
        return {"kind": self.kind, "given": self.given, "settings": self.settings, "content": content}

    def __setstate__(self, kept: dict[str, Any]) -> None:
        self.kind, self.given, self.settings = kept["kind"], kept["given"], kept["settings"]
        self._faiss = _import_faiss()
        self._index = self._faiss.deserialize_index(kept["content"])

    def search(self, users: torch.Tensor, count: int, breadth: int = 1) -> list[Found]:
        """Find the nearest vectors.

        Args:
            users: B x D, float32, on the CPU.
            count: K, number of results per user.
            breadth: Factor of the search width of an approximate index.
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
        """Complete the given settings by defaults that depend on N."""
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
        index.cp.min_points_per_centroid = 1  # short lists are intended: no warnings
        index.cp.max_points_per_centroid = TRAINING_POINTS_A_LIST
        return index

    @contextmanager
    def _threads(self) -> Iterator[None]:
        """Let FAISS use as many threads as torch; the setting is local to the calling thread."""
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
"""Decides by an item's fields whether the item may be recommended."""


class Conditions:
    """A filter that is data: conditions on fields, all of which an item must meet.

    A condition is a value (the field has it, or contains it if it is a list), a list of values (any of them), or a
    mapping with any of `min` and `max` (numbers, both included), `not` (a value or a list of values that the field must
    not have) and `contains` (a text within the field's text, without regard to case). An item without the field meets
    only `not`. Texts are compared exactly; a number equals its text: 7 and "7" are one value.

    Args:
        given: Field -> condition.
        place: Name of the parameter, for errors.

    Raises:
        TypeError: A part has the wrong type.
        ValueError: A condition is empty or unknown.

    >>> dear = Conditions({"brand": ["North", "Trail"], "price": {"max": 50}})
    >>> dear({"brand": "North", "price": 45}), dear({"brand": "North"}), dear({"brand": "Peak", "price": 5})
    (True, False, False)
    """

    def __init__(self, given: Any, place: str = "filter") -> None:
        if not isinstance(given, Mapping) or not given:
            raise TypeError(f"{place}={short(given)}: give a mapping of fields to conditions, such as {{'brand': 'x'}}")
        check_size(given, place)
        self._parts = {name: _condition(own, f"{place}.{short(name)}") for name, own in given.items()}
        self.key = json.dumps(given, sort_keys=True, default=str)
        """Text that is equal for equal conditions."""

    def __call__(self, fields: Mapping[str, Any]) -> bool:
        """Whether an item with these fields meets all conditions."""
        return all(meets(_several(fields.get(name))) for name, meets in self._parts.items())


def _condition(given: Any, place: str) -> Callable[[list[Any]], bool]:
    """Return a function that decides by the values of a field."""
    if not isinstance(given, Mapping):
        wanted = _wanted(given, place)
        return lambda values: any(value in wanted for value in values)
    if not given or not set(given) <= {"min", "max", "not", "contains"}:
        raise ValueError(f"{place}={short(given)}: give a value, a list, or any of min, max, not, contains")
    low, high = (_bound(given.get(name), f"{place}.{name}") for name in ("min", "max"))
    part = given.get("contains")
    if part is not None and not isinstance(part, str):
        raise TypeError(f"{place}.contains={short(part)}: give a text")
    unwanted = _wanted(given["not"], f"{place}.not") if "not" in given else frozenset()

    def meets(values: list[Any]) -> bool:
        if any(value in unwanted for value in values):
            return False
        if low is not None or high is not None:
            numbers = [number for value in values if (number := _number(value)) is not None]
            if not any((low is None or low <= own) and (high is None or own <= high) for own in numbers):
                return False
        return part is None or any(part.casefold() in str(value).casefold() for value in values)

    return meets


def _wanted(given: Any, place: str) -> frozenset[Any]:
    values = given if isinstance(given, list | tuple | set | frozenset) else [given]
    if not values or not all(isinstance(value, str | Real) for value in values):
        raise TypeError(f"{place}={short(given)}: give a text, a number, a truth value, or a list of these")
    return frozenset(map(_canonical, values))


def _several(value: Any) -> list[Any]:
    """Return the values of a field; none if it is absent."""
    values = value if isinstance(value, list | tuple) else [] if value is None else [value]
    return list(map(_canonical, values))


def _canonical(value: Any) -> Any:
    """Return a number as its text, since a table may hold either: 7, 7.0 and "7" are one value, True is only True."""
    number = None if isinstance(value, str | bool) else _number(value)
    if number is None:
        return value if isinstance(value, bool) else str(value)
    return str(int(number)) if number.is_integer() else repr(number)


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _bound(value: Any, place: str) -> float | None:
    if value is not None and (isinstance(value, str) or _number(value) is None):
        raise TypeError(f"{place}={short(value)}: give a finite number")
    return _number(value)


Ranking = list[tuple[str, float]]
"""Ids and scores, the best first."""

ROUNDING = 1e-5
"""Upper bound of the rounding error of float32 products of normalised vectors."""

EXTRA, WIDER, EXACT_SHARE = 16, 4, 1 / 16
"""Requests to an index: extra rows beyond the wanted number, then the factor of further rows, and the largest share of
all rows."""
AT_ONCE = 128
"""Rows with evidence beyond those that an index found, which are compared first; then `WIDER` times as many."""
POSTINGS, MORE = 4096, 96
"""With the first request to an index: entries of words' postings that are read, and extra rows if there are words."""


MOSTLY_ZERO = 1 / 16
"""A column is mostly zero if at most this share of its numbers is not."""
ROWS_AT_ONCE = 1 << 16
"""Rows of a matrix that are looked at together."""


class Products:
    """Computes products with all rows of a matrix.

    Of columns that are mostly zero, such as those of hashed words, only the other numbers are read, and of these only
    the columns in which a user is not zero. A matrix is taken apart at its first product; it must not change.
    """

    def __init__(self) -> None:
        self._made: tuple[torch.Tensor, _SparseColumns | None] | None = None

    def __reduce__(self) -> tuple[type, tuple]:
        return type(self), ()

    def of(self, users: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """Multiply B x D users and N x D rows: B x N, with the rounding of float32."""
        made = self._made
        if made is None or made[0] is not matrix:
            made = self._made = matrix, _SparseColumns.of(matrix)
        return users @ matrix.T if made[1] is None else made[1].products(users)


@dataclass(frozen=True)
class _SparseColumns:
    """A matrix, N x D, taken apart: E numbers in S columns that are mostly zero, and the other columns."""

    others: torch.Tensor
    """Indices of the other columns."""
    dense: torch.Tensor
    """N x (D - S)."""
    columns: torch.Tensor
    """S indices."""
    starts: np.ndarray
    """S + 1, where the numbers of each column begin and end."""
    rows: np.ndarray
    """E."""
    values: np.ndarray
    """E."""

    @classmethod
    def of(cls, matrix: torch.Tensor) -> "_SparseColumns | None":
        """Take a matrix apart; None if less than half of its columns are mostly zero."""
        parts = matrix.split(ROWS_AT_ONCE)
        filled = torch.stack([part.count_nonzero(0) for part in parts]).sum(0)
        sparse = filled <= MOSTLY_ZERO * len(matrix)
        if 2 * int(sparse.sum()) < matrix.shape[1]:
            return None
        columns, others = sparse.nonzero()[:, 0], (~sparse).nonzero()[:, 0]
        found = [(ROWS_AT_ONCE * number, part[:, columns].numpy()) for number, part in enumerate(parts)]
        entries = [(start, part, *part.nonzero()) for start, part in found]
        rows = np.concatenate([start + own for start, _, own, _ in entries])
        values = np.concatenate([part[own, places] for _, part, own, places in entries])
        order = np.argsort(np.concatenate([places for *_, places in entries]), kind="stable")
        starts = np.concatenate(([0], np.cumsum(filled[columns].numpy())))
        return cls(others, matrix[:, others].contiguous(), columns, starts, rows[order], values[order])

    def products(self, users: torch.Tensor) -> torch.Tensor:
        """Multiply B x D users and the matrix: B x N."""
        found = users[:, self.others] @ self.dense.T
        for own, scores in zip(users[:, self.columns].numpy(), found.numpy()):
            read = np.flatnonzero(own)
            counts = np.diff(self.starts)[read]
            entries = stretches(self.starts[read], counts)
            weights = self.values[entries] * np.repeat(own[read], counts)
            scores += np.bincount(self.rows[entries], weights, len(scores))
        return found


class Texts:
    """A processor's texts of rows' items; the text of each row is made once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._processor: Any = None
        self._texts: list[str] = []  # of the first rows
        self._rows: dict[str, list[int]] = {}

    def __reduce__(self) -> tuple[type, tuple]:
        return type(self), ()

    def kept(self, rows: Sequence[int]) -> "Texts":
        """Return the existing texts for the remaining rows, which get new numbers."""
        new = Texts()
        with self._lock:
            new._processor = self._processor
            new._texts = [self._texts[row] for row in rows if row < len(self._texts)]
        for row, text in enumerate(new._texts):
            new._rows.setdefault(text, []).append(row)
        return new

    def rows(self, texts: Collection[str], processor: Any, items: Sequence[Item], count: int) -> list[int]:
        """Return the rows with one of the texts, among the first `count` rows and possibly later ones."""
        with self._lock:
            if self._processor is not processor:
                self._processor, self._texts, self._rows = processor, [], {}
            for text in item_texts(processor, items[len(self._texts) : count]):
                self._rows.setdefault(text, []).append(len(self._texts))
                self._texts.append(text)
            return [row for text in texts for row in self._rows.get(text, ())]


class Tries:
    """A trie of the texts of rows' items, for one processor; the text of each row is tokenized once.

    It holds all rows that ever were, and says of none whether it is live: a state does.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._processor: Any = None
        self._trie: ItemTrie | None = None

    def __reduce__(self) -> tuple[type, tuple]:
        return type(self), ()

    def kept(self, rows: Sequence[int]) -> "Tries":
        """Return the existing texts for the remaining rows, which get new numbers."""
        new = Tries()
        with self._lock:
            if self._trie is not None:
                known = len(self._trie.live)
                new._processor, new._trie = self._processor, self._trie.kept([row for row in rows if row < known])
        return new

    def trie(self, processor: Any, ids: Sequence[str], items: Sequence[Item], count: int) -> ItemTrie:
        """Return the trie of the first `count` rows and possibly later ones; rows that cannot be written are not live.

        A text that is longer than half of the processor's `max_length` is cut.
        """
        tokens = processor.tokenizer.structural_ids
        with self._lock:
            if self._trie is None or self._processor is not processor:
                self._processor, self._trie = processor, ItemTrie.from_texts([], [], tokens["eos_token_id"])
            trie, start = self._trie, len(self._trie.live)
            if start < count:
                texts = processor.written_ids(item_texts(processor, items[start:count]))
                texts = [text[: processor.max_length // 2] for text in texts]
                lost = [row for row, text in enumerate(texts, start) if tokens["unk_token_id"] in text]
                if lost:
                    logger.warning(
                        f"{len(lost)} items cannot be written, such as {short(ids[lost[0]])}: their texts have "
                        "characters that the tokenizer's vocabulary lacks"
                    )
                trie = trie.add(texts, ids[start:count])
                writable = trie.live.copy()
                writable[lost] = False
                self._trie = trie = trie.where(writable)
            return trie


class Past(NamedTuple):
    """An item of a user's history, or a text about the user, as evidence uses it."""

    item_id: str | None = None
    text: str | None = None
    """The text of a query or of a profile; of an item, it is used if the catalogue has no item with this id."""
    kind: Literal["item", "query", "profile"] = "item"
    """A query is what the user searched for or wrote, a profile what the user is: neither is an item."""
    time: float = math.nan
    """Seconds since 1970 at which the user met the item, for evidence with `share_ties`; NaN = unknown."""


class Support(NamedTuple):
    """Rows, ascending, and the terms that words and transitions add to their scores for one user."""

    rows: np.ndarray
    scores: np.ndarray

    def of(self, rows: np.ndarray) -> np.ndarray:
        """Return the terms added to the scores of rows, 0 for rows without evidence."""
        if not len(self.rows):
            return np.zeros(len(rows))
        places = np.minimum(np.searchsorted(self.rows, rows), len(self.rows) - 1)
        return np.where(self.rows[places] == rows, self.scores[places], 0.0)


@dataclass(frozen=True, eq=False)
class Counted:
    """Evidence at one moment.

    Later states share `names`, `numbers` and the vocabulary of the words, and append to them.
    """

    words: Words
    """One row for each row of the catalogue."""
    transitions: Transitions
    names: list[str]
    """Ids of at least M items, also of items outside the catalogue."""
    numbers: dict[str, int]
    rows: np.ndarray
    """M, row of each of these items, -1 = not in the catalogue."""
    reading: ReadTexts | None = None
    """One row for each row of the catalogue; None = texts are not compared."""
    linear: ItemWeights | None = None
    """Weights of the linear model by number; None = there are none."""

    @classmethod
    def of(cls, rule: Evidence, ids: Sequence[str], texts: Sequence[str], reader: Reader | None) -> "Counted":
        """Make evidence without events for the rows of a catalogue; `reader` is needed if texts are compared."""
        names = [*ids]
        numbers = {name: number for number, name in enumerate(names)}
        words, rows = Words.of(texts), np.arange(len(names))
        reading = None if reader is None else ReadTexts.of(reader, texts)
        return cls(words, Transitions.empty(rule), names, numbers, rows, reading).numbering([])[0]

    @classmethod
    def read(cls, kept: KeptEvidence, ids: Sequence[str]) -> "Counted":
        """Return the evidence from the files of a catalogue, for its rows."""
        places = {item_id: row for row, item_id in enumerate(ids)}
        names = list(kept.names)
        rows = np.array([places.get(name, -1) for name in names], np.int64)
        numbers = {name: number for number, name in enumerate(names)}
        own = cls(kept.words, kept.transitions, names, numbers, rows, kept.reading, kept.linear)
        new, every = own.numbering(ids)  # files of other origin may lack some
        new.rows[every] = np.arange(len(ids))
        return new

    def copy(self) -> "Counted":
        """Return a copy with separate lists."""
        words = replace(self.words, vocabulary={**self.words.vocabulary})
        return replace(self, words=words, names=[*self.names], numbers={**self.numbers})

    @property
    def rule(self) -> Evidence:
        """Settings of the ranking."""
        return self.transitions.rule

    def numbering(self, ids: Iterable[str]) -> tuple["Counted", np.ndarray]:
        """Return the numbers of items, and evidence that contains them."""
        found = []
        for item_id in ids:
            number = self.numbers.get(item_id)
            if number is None:
                number = self.numbers[item_id] = len(self.names)
                self.names.append(item_id)
            found.append(number)
        numbers = np.array(found, np.int64)
        size = max(int(numbers.max(initial=-1)) + 1, len(self.rows))
        rows = np.concatenate((self.rows, np.full(size - len(self.rows), -1)))
        return replace(self, rows=rows, transitions=self.transitions.sized(size)), numbers

    def changed(self, found: Sequence[str], texts: Sequence[str], gone: Mapping[int, str]) -> "Counted":
        """Return evidence with more rows, and without the rows `gone`."""
        start = len(self.words.live)
        new, numbers = self.numbering(found)
        new.rows[[self.numbers[item_id] for item_id in gone.values()]] = -1
        new.rows[numbers] = np.arange(start, start + len(numbers))
        reading = None if self.reading is None else self.reading.adding(texts, [*gone])
        return replace(new, words=self.words.adding(texts, [*gone]), reading=reading)

    def kept(self, rows: Sequence[int]) -> "Counted":
        """Return evidence for some of the rows, which get new numbers."""
        place = np.full(len(self.words.live) + 1, -1)
        place[rows] = np.arange(len(rows))
        reading = None if self.reading is None else self.reading.kept(rows)
        return replace(self, words=self.words.kept(rows), rows=place[self.rows], reading=reading)

    def worded(self, texts: Sequence[str], reader: Reader | None) -> "Counted":
        """Return evidence with other texts of all rows, of which the same rows are live."""
        gone = np.flatnonzero(~self.words.live).tolist()
        reading = None if reader is None else ReadTexts.of(reader, texts).adding([], gone)
        return replace(self, words=Words.of(texts).adding([], gone), reading=reading)

    def parts(self, histories: Sequence[Sequence[tuple[Past, float]]]) -> "Parts":
        """Score rows by words and by transitions, for users with these weighted entries in their histories."""
        vectors, known, reading = self.read_histories(histories)
        alike = self.words.likeness(vectors) if len(vectors.items) else vectors
        return Parts(
            alike._replace(values=self.word_weights(alike.items) * alike.values),
            self._after(known),
            self.rule.texts * reading,
        )

    def _after(self, known: Sparse) -> Sparse:
        """Score rows by transitions, re-visits and the linear model, for users with these weighted items by number."""
        after = self.transitions.after(known if self.rule.transitions else known.known(0))
        several = [after._replace(values=self.rule.transitions * after.values)]
        if self.rule.again:
            several.append(known._replace(values=self.rule.again * known.values))
        if self.rule.linear and self.linear is not None:
            followed = self.linear.follow(known, len(self.rows))
            several.append(followed._replace(values=self.rule.linear * followed.values))
        users, numbers, values = (np.concatenate(parts) for parts in zip(*several))
        here = self.rows[numbers] >= 0
        return Sparse.of(users[here], self.rows[numbers[here]], values[here], max(len(self.words.live), 1))

    def read_histories(self, histories: Sequence[Sequence[tuple[Past, float]]]) -> tuple[Sparse, Sparse, np.ndarray]:
        """Return the users' words, their items by number, and their U x W vectors by the reader."""
        places: list[tuple[int, int, float]] = []
        known: list[tuple[int, int, float]] = []
        said: list[tuple[int, str, float]] = []
        for user, history in enumerate(histories):
            for past, weight in history:
                number = self.numbers.get(past.item_id, len(self.rows)) if past.item_id else len(self.rows)
                row = -1
                if number < len(self.rows):
                    known.append((user, number, weight))
                    row = int(self.rows[number])
                if row >= 0:
                    places.append((user, row, weight))
                elif past.text:
                    said.append((user, past.text, weight))
        reading = self._read(places, said, len(histories))
        if not self.rule.words:
            places, said = [], []
        several = [self.words.vectors(_sparse(places, len(self.words.live)))] if places else []
        for user, text, weight in said:
            vector = self.words.vector_of(text, weight)
            several.append(vector._replace(users=np.full(len(vector.items), user)))
        vectors = Sparse.sum(several, len(self.words.rarity)) if several else NOTHING
        return vectors, _sparse(known, len(self.rows)), reading

    def _read(
        self, places: Sequence[tuple[int, int, float]], said: Sequence[tuple[int, str, float]], count: int
    ) -> np.ndarray:
        """Return the users' sums of weighted vectors of rows and of other texts: U x W."""
        if self.reading is None:
            return np.zeros((count, 0))
        found = np.zeros((count, self.reading.reader.width))
        for user, row, weight in places:
            found[user] += weight * self.reading.vectors[row].astype(float)
        for user, text, weight in said:
            found[user] += weight * self.reading.vector_of(text).astype(float)
        return found

    @cached_property
    def _unseen(self) -> np.ndarray:
        """Whether each row is of an item without events: N."""
        found = np.ones(len(self.words.live), bool)
        found[self.rows[(self.rows >= 0) & (self.transitions.met > 0)]] = False
        return found

    @property
    def most_words(self) -> float:
        """Largest weight of words."""
        return self.rule.words * (1 + self.rule.unseen)

    def word_weights(self, rows: np.ndarray) -> np.ndarray:
        """Return the weight of words for each of some rows."""
        if not self.rule.unseen:
            return np.full(len(rows), self.rule.words)
        return np.where(self._unseen[rows], self.most_words, self.rule.words)

    @cached_property
    def popular(self) -> np.ndarray:
        """Popularity term of each row's score: N."""
        found = np.zeros(len(self.words.live))
        here = np.flatnonzero(self.rows >= 0)
        found[self.rows[here]] = self.rule.popularity * self.transitions.popularity[here]
        return found

    def weighed(self, history: Sequence[Past]) -> list[tuple[Past, float]]:
        """Weight the entries of a history; the last one comes last."""
        rule, items, texts, found = self.rule, 0, 0, []
        nothing = [0.0] * len(history)
        recency = [*rule.recency, *nothing]
        shares = recency
        if rule.share_ties:
            shares = [*ages([past.time for past in history if past.kind == "item"], rule).tolist(), *nothing]
        for past in reversed(history):
            if past.kind == "profile":
                weight = rule.profile
            elif past.kind == "query":
                weight = rule.queries * recency[items + texts]
                texts += 1
            else:
                weight = shares[items]
                items += 1
            found.append((past, weight))
        return found[::-1]

    def of_users(self, histories: Sequence[Sequence[Past]]) -> "list[UserEvidence]":
        """Return the evidence of users with these histories."""
        weighed = [[entry for entry in self.weighed(history) if entry[1]] for history in histories]
        vectors, known, reading = self.read_histories(weighed)
        after, found = self._after(known), []
        for user in range(len(histories)):
            own = Support(*after.of_user(user))
            found.append(UserEvidence(own, self, *vectors.of_user(user), self.rule.texts * reading[user]))
        return found


class Parts(NamedTuple):
    """What evidence finds for several users."""

    words: Sparse
    """Terms by user and row."""
    transitions: Sparse
    """Terms by user and row."""
    reading: np.ndarray
    """U x W, the users' vectors by the reader times the weight `texts`; W = 0 without a reader."""


@dataclass(frozen=True, eq=False)
class UserEvidence:
    """The terms that evidence adds to the scores of rows for one user."""

    after: Support
    """By transitions, re-visits and the linear model, of all rows where they are not 0."""
    counted: Counted | None = None
    """The evidence of all rows."""
    words: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    """Words of the user's vector, ascending."""
    weights: np.ndarray = field(default_factory=lambda: np.empty(0))
    """Their entries."""
    reading: np.ndarray = field(default_factory=lambda: np.empty(0))
    """W, the user's vector by the reader times the weight `texts`; its products with all rows are added as well."""

    def of(self, rows: np.ndarray) -> np.ndarray:
        """Return the exact terms of words and transitions for rows."""
        found = self.after.of(rows)
        if self.counted is None or not len(self.words):
            return found
        return found + self.counted.word_weights(rows) * self.counted.words.products(self.words, self.weights, rows)

    @cached_property
    def most(self) -> float:
        """Upper bound of the absolute values of all terms."""
        read = float(np.linalg.norm(self.reading))
        return max(float(np.abs(self.after.scores).max(initial=0.0)) + self._bound(self.words, self.weights), read)

    def support(self, most: float) -> tuple[Support, float]:
        """Find rows by transitions and by the user's rarest words.

        Common words are in very many rows, but they add little to a score.

        Args:
            most: Number of postings that are read; words beyond it are not.

        Returns:
            The rows with the terms added by what was read, and an upper bound of what other words add to any row.
        """
        if self.counted is None or not len(self.words):
            return self.after, 0.0
        every = self.counted.words
        lengths = every.lengths(self.words)
        order = np.argsort(lengths, kind="stable")
        read = np.zeros(len(order), bool)
        read[order[np.cumsum(lengths[order]) <= most]] = True
        own = Sparse(np.zeros(int(read.sum()), np.int64), self.words[read], self.weights[read])
        alike = every.likeness(own)
        alike = alike._replace(values=self.counted.word_weights(alike.items) * alike.values)
        rest = self._bound(self.words[~read], self.weights[~read])
        if not len(self.after.rows):
            return Support(alike.items, alike.values), rest
        after = Sparse(np.zeros(len(self.after.rows), np.int64), *self.after)
        return Support(*Sparse.sum([alike, after], len(every.live))[1:]), rest

    def _bound(self, words: np.ndarray, weights: np.ndarray) -> float:
        """Return an upper bound of what words of the user's vector add to any row."""
        return 0.0 if self.counted is None else self.counted.most_words * self.counted.words.bound(words, weights)


NO_EVIDENCE = UserEvidence(Support(np.empty(0, np.int64), np.empty(0)))


def _sparse(entries: Sequence[tuple[int, int, float]], width: int) -> Sparse:
    users, items, weights = zip(*entries) if entries else ((), (), ())
    return Sparse.of(np.array(users, np.int64), np.array(items, np.int64), np.array(weights, float), max(width, 1))


MASKS = 256
"""Number of conditions whose result a state of a catalogue keeps."""


@dataclass(frozen=True)
class State:
    """The complete state of a catalogue at one moment.

    A row keeps its number until all rows are copied into a new base matrix. Later states share `ids`, `items`, `rows`,
    `texts` and `tries`: they append to them and change no entry of the first N rows; all other fields are replaced,
    but `products` is kept with `base`.
    """

    fingerprint: str
    dimension: int
    ids: list[str]
    """Ids of at least N rows, in the order of insertion."""
    items: list[Item]
    """Items of at least N rows."""
    rows: dict[str, tuple[int, ...]]
    """All rows of an id, also former ones, the oldest first."""
    live: torch.Tensor
    """N, False where the item was removed or replaced."""
    base: torch.Tensor
    side: torch.Tensor
    count: int
    """Number of live rows."""
    index: VectorIndex | None = None
    """Index over `base`."""
    wanted: dict[str, Any] | None = None
    """Kind and settings of the index, also without FAISS."""
    texts: Texts = field(default_factory=Texts)
    tries: Tries = field(default_factory=Tries)
    products: Products = field(default_factory=Products)
    """Products with `base`."""
    next_number: int = 0
    """Id of the next item that is a text: larger than every whole number that was ever an id."""
    counted: Counted | None = None
    """Evidence; None = the catalogue ranks by the cosine only."""
    exclude_seen: bool = True
    """As `CatalogueView.exclude_seen`."""

    @classmethod
    def of(cls, items: dict[str, Item], vectors: torch.Tensor, fingerprint: str, **more: Any) -> "State":
        """Make a state with a single base matrix."""
        rows: dict[str, tuple[int, ...]] = {item_id: (row,) for row, item_id in enumerate(items)}
        live, side = torch.ones(len(items), dtype=torch.bool), vectors[:0]
        every = list(items), list(items.values())
        return cls(fingerprint, vectors.shape[1], *every, rows, live, vectors, side, len(items), **more)

    def row(self, item_id: str) -> int | None:
        """Return the row of an item."""
        flags = self.flags
        for row in reversed(self.rows.get(item_id, ())):
            if row < len(flags) and self.ids[row] == item_id:  # otherwise of a later state
                return row if flags[row] else None
        return None

    @cached_property
    def flags(self) -> np.ndarray:
        """`live` as an array, whose entries are read faster."""
        return self.live.numpy()

    @cached_property
    def _masks(self) -> dict[str, torch.Tensor]:
        return {}

    @cached_property
    def derived(self) -> dict[str, Any]:
        """What `CatalogueView.derived` keeps."""
        return {}

    def allowed(self, predicate: "Predicate | None") -> torch.Tensor:
        """Mark which of the N rows may be found; the result for `Conditions` is kept, since requests repeat them."""
        if predicate is None:
            return self.live
        kept = self._masks.get(predicate.key) if isinstance(predicate, Conditions) else None
        if kept is None:
            kept = torch.zeros_like(self.live)
            kept[[row for row in self.live_rows() if predicate(self.fields(row))]] = True
            if isinstance(predicate, Conditions) and len(self._masks) < MASKS:
                self._masks[predicate.key] = kept
        return kept

    def fixed(self, row: int) -> Item:
        """Return the item of a row without a copy: nobody may change it."""
        item = self.items[row]
        if type(item) is dict:
            item = self.items[row] = KnownItem(item)
        return item

    def known(self, item_id: Any) -> int:
        """Return the row of an item that must exist."""
        name = normalize_id(item_id, "item_id")
        row = self.row(name)
        if row is None:
            raise ValueError(f"item_id {short(name)} is not among the {self.count} items of the catalogue")
        return row

    def live_rows(self) -> list[int]:
        """Return the rows of all items in the order of insertion."""
        return self.live.nonzero()[:, 0].tolist()

    def fields(self, row: int) -> dict[str, Any]:
        """Return an item's fields and its `item_id`."""
        item = self.items[row]
        return {"item_id": self.ids[row], "item": item} if isinstance(item, str) else dict(item)

    @property
    def popularity(self) -> float:
        """Weight of popularity."""
        return 0.0 if self.counted is None else self.counted.rule.popularity

    @property
    def share(self) -> float:
        """Weight of the cosine."""
        return 1.0 if self.counted is None else self.counted.rule.learnt

    @property
    def read_texts(self) -> np.ndarray | None:
        """Vectors of all rows by the reader, N x W; None = texts are not compared."""
        return None if self.counted is None or self.counted.reading is None else self.counted.reading.vectors

    def gather(self, rows: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """Return the vectors of rows, from the base and the side buffer."""
        index = torch.as_tensor(rows, dtype=torch.long)
        if not len(self.side):
            return self.base[index]
        base = index < len(self.base)
        vectors = torch.empty(len(index), self.dimension)
        vectors[base], vectors[~base] = self.base[index[base]], self.side[index[~base] - len(self.base)]
        return vectors


class CatalogueView:
    """A thread-safe view of a catalogue at one moment; `Catalogue.snapshot` returns one."""

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
        """The index of searches; None = exact search."""
        return self._state.index

    @property
    def evidence(self) -> Evidence | None:
        """Settings of evidence; None = the catalogue ranks by the cosine only."""
        return None if self._state.counted is None else self._state.counted.rule

    @property
    def exclude_seen(self) -> bool:
        """Whether a pipeline leaves out the items of a request's history, unless a call says otherwise."""
        return self._state.exclude_seen

    def __len__(self) -> int:
        return self._state.count

    def __iter__(self) -> Iterator[str]:
        """Yield the ids in the order of insertion."""
        state = self._state
        return iter([state.ids[row] for row in state.live_rows()])

    def __contains__(self, item_id: Any) -> bool:
        return self._state.row(normalize_id(item_id, "item_id")) is not None

    def item(self, item_id: Any) -> Item:
        """Return an item in the form of requests: its text, or its fields and its `item_id`."""
        state = self._state
        item = state.items[state.known(item_id)]
        return item if isinstance(item, str) else dict(item)

    def fixed(self, item_id: str) -> Item | None:
        """Return an item like `item`, but without a copy: nobody may change it. None if there is none of this id."""
        row = self._state.row(item_id)
        return None if row is None else self._state.fixed(row)

    def fields(self, item_id: Any) -> dict[str, Any]:
        """Return an item's fields and its `item_id`; an item without fields has its text as field `item`."""
        state = self._state
        return state.fields(state.known(item_id))

    def vectors(self, item_ids: Sequence[Any]) -> torch.Tensor:
        """Return the M x D vectors of items."""
        state = self._state
        return state.gather([state.known(each) for each in item_ids])

    def worded(self, texts: Collection[str], processor: Any) -> list[str]:
        """Return the ids of the items whose text, by the processor, is one of the texts."""
        state = self._state
        rows = state.texts.rows(texts, processor, state.items, len(state.live))
        return [state.ids[row] for row in rows if row < len(state.live) and state.live[row]]

    def trie(self, processor: Any, exclude: Collection[Any] = (), filter: Predicate | None = None) -> ItemTrie:
        """Return the trie of the items' texts, for writing that is constrained to them.

        The texts are tokenized at the first call by a processor, later the texts of added items only. Removed items
        cannot be written. Items with characters that the vocabulary lacks cannot be written: a warning is logged.

        Args:
            processor: Processor that formats and tokenizes the items: `M6RecProcessor.written_ids` of their texts.
            exclude: Ids of items that may not be written; others than the catalogue's have no effect.
            filter: Function of an item's fields that decides whether the item may be written.
        """
        state = self._state
        trie = state.tries.trie(processor, state.ids, state.items, len(state.live))
        allowed = state.allowed(filter).numpy() & trie.live[: len(state.live)]
        allowed[[row for name in exclude if (row := state.row(normalize_id(name, "exclude"))) is not None]] = False
        return trie.where(allowed)

    def check(self, model: Model) -> None:
        """Verify that this model made the vectors, or that they are not used and no model made them.

        Raises:
            ValueError: If another model made them.
        """
        if self.fingerprint != NO_MODEL or self._state.share:
            check_fingerprint(self.fingerprint, model)

    def search(
        self,
        user_vectors: torch.Tensor | None = None,
        top_k: int = 10,
        exclude: Sequence[Collection[Any] | None] | None = None,
        filter: Predicate | None = None,
        histories: Sequence[Sequence[Any]] | None = None,
    ) -> list[Ranking]:
        """Find the items with the highest scores for each user.

        Without evidence a score is the cosine of the user's and the item's vector; `Evidence` defines it otherwise.

        Args:
            user_vectors: B x D; None is allowed if the cosine has weight 0.
            top_k: Number of items per user; fewer if fewer remain.
            exclude: For each user the ids to leave out; unknown ids are allowed.
            filter: Decides by `fields` which items may be found at all.
            histories: For each user the history, the last entry last, for evidence: ids of items, or `Past`, which may
                contain a text. None = no evidence.

        Returns:
            For each user (item_id, score) by descending score, equal scores in the order of insertion.
        """
        state = self._state
        if user_vectors is None and histories is not None and not state.share:
            user_vectors = torch.zeros(len(histories), state.dimension)
        if user_vectors is None:
            raise ValueError("search needs user_vectors, or histories and evidence with learnt=0")
        users = torch.as_tensor(user_vectors).detach().float().cpu()
        if users.dim() != 2 or users.shape[1] != state.dimension:
            raise ValueError(f"user_vectors: expected B x {state.dimension}, got the shape {tuple(users.shape)}")
        if not np.isfinite(users.numpy()).all():
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
        asked = [_Asked(*parts) for parts in zip(users, left_out, self._of_users(histories, len(users)))]
        found = _ask_index(state, asked, top_k, filter)
        missing = [number for number, own in enumerate(found) if own is None]
        if missing:
            exact = _search_all(state, [asked[number] for number in missing], top_k, filter)
            for number, own in zip(missing, exact):
                found[number] = own
        return [own for own in found if own is not None]

    def scores(
        self, user_vector: torch.Tensor, item_ids: Sequence[Any], history: Sequence[Any] | None = None
    ) -> list[float]:
        """Return the scores of some items for one user, bitwise as `search` finds them.

        Args:
            user_vector: D.
            item_ids: Ids of items of the catalogue.
            history: As in `search`.
        """
        state, user = self._state, torch.as_tensor(user_vector).detach().float().cpu()
        (evidence,) = self._of_users(None if history is None else [history], 1)
        rows = torch.tensor([state.known(each) for each in item_ids], dtype=torch.long)
        return _exact(state, _Asked(user, [], evidence), rows).tolist()

    def meeting(self, conditions: Conditions) -> list[str]:
        """Return the ids of the items that meet conditions, in the order of insertion."""
        state = self._state
        return [state.ids[row] for row in state.allowed(conditions).nonzero()[:, 0].tolist()]

    def derived(self, key: str, make: Callable[[], Any]) -> Any:
        """Return what `make` returned at the first call with this key for this state of the catalogue."""
        kept = self._state.derived
        if key not in kept:
            kept[key] = make()
        return kept[key]

    def event_counts(self) -> dict[str, int] | None:
        """Return the number of counted events of each item of the catalogue; None = there is no evidence."""
        state = self._state
        if state.counted is None:
            return None
        met = np.zeros(len(state.live), dtype=np.int64)
        here = np.flatnonzero(state.counted.rows >= 0)
        met[state.counted.rows[here]] = state.counted.transitions.met[here]
        return {state.ids[row]: int(met[row]) for row in state.live_rows()}

    def counted(self) -> Counted | None:
        """Return the evidence of the catalogue's items alone, numbered in their order; None = there is no evidence."""
        state = self._state
        return None if state.counted is None else state.counted.kept(state.live_rows())

    def evidence_digest(self) -> str:
        """Return a digest of the settings and counts of evidence; it is empty without evidence."""
        counted = self._state.counted
        if counted is None:
            return ""
        digest = hashlib.sha256(json.dumps(counted.rule.to_dict()).encode())
        transitions = counted.transitions
        digest.update(json.dumps([counted.names[: len(counted.rows)], transitions.unit]).encode())
        for numbers in (*transitions.counts(), transitions.met):
            digest.update(numbers.astype("<i8").tobytes())
        if counted.reading is not None:
            digest.update(counted.reading.reader.digest.encode())
        if counted.linear is not None:
            for own in (counted.linear.starts, counted.linear.columns, counted.linear.values):
                digest.update(own.tobytes())
        return digest.hexdigest()

    def _of_users(self, histories: Sequence[Sequence[Any]] | None, count: int) -> list[UserEvidence]:
        counted = self._state.counted
        if histories is None:
            return [NO_EVIDENCE] * count
        if counted is None:
            raise ValueError("the catalogue has no evidence to read histories by: call set_evidence, or leave them out")
        if len(histories) != count:
            raise ValueError(f"histories has {len(histories)} entries for {count} users: give one for each")
        return counted.of_users([[_past(item, "histories") for item in own] for own in histories])

    def evidence_scores(self, history: Sequence[Any], items: Sequence[Any]) -> "EvidenceScores":
        """Return the terms that evidence adds to the scores of items, event by event.

        Args:
            history: Items of a user's history, the last one last, as in `search`.
            items: The M items, as in `search`; an item outside the catalogue is scored by its text.

        Raises:
            ValueError: If the catalogue has no evidence.
        """
        state, counted = self._state, self._state.counted
        if counted is None:
            raise ValueError("the catalogue has no evidence: call set_evidence")
        past, asked = ([_past(item, name) for item in own] for own, name in ((history, "history"), (items, "items")))
        rows = [None if item.item_id is None else state.row(item.item_id) for item in asked]
        known = np.array([-1 if row is None else row for row in rows], np.int64)
        events = [[(entry, weight)] if weight else [] for entry, weight in counted.weighed(past)]
        *several, reading = counted.parts(events)
        each = ([Support(*part.of_user(event)).of(known) for event in range(len(past))] for part in several)
        words, transitions = (np.array(own).reshape(len(past), len(asked)) for own in each)
        others = [place for place, row in enumerate(rows) if row is None and asked[place].text]
        if others:
            vectors = counted.read_histories(events)[0].dense(len(past), len(counted.words.rarity))
            for place in others:
                own = counted.words.vector_of(asked[place].text or "")
                weight = counted.rule.words * (1 + counted.rule.unseen)
                words[:, place] = weight * (vectors[:, own.items] @ own.values)
        texts = np.zeros(words.shape)
        if counted.reading is not None:
            read = np.zeros((len(asked), counted.reading.reader.width))
            read[known >= 0] = counted.reading.vectors[known[known >= 0]]
            for place in others:
                read[place] = counted.reading.vector_of(asked[place].text or "")
            texts = np.array([(own * read).sum(1) for own in reading]).reshape(words.shape)
        popular = np.where(known >= 0, counted.popular[known], 0.0) if len(counted.popular) else np.zeros(len(asked))
        return EvidenceScores(words, transitions, texts, popular)


class EvidenceScores(NamedTuple):
    """The terms that evidence adds to the scores of M items."""

    words: np.ndarray
    """E x M, by each of E events."""
    transitions: np.ndarray
    """E x M, by each of E events; `again` and `linear` are included."""
    texts: np.ndarray
    """E x M, by each of E events."""
    popularity: np.ndarray
    """M."""

    def sum(self) -> np.ndarray:
        """Return the sum of all terms: M."""
        return self.words.sum(0) + self.transitions.sum(0) + self.texts.sum(0) + self.popularity


def _past(item: Any, place: str) -> Past:
    if isinstance(item, Past):
        return item
    return Past(normalize_id(item, place))


def check_fingerprint(fingerprint: str, model: Model) -> None:
    """Raise an error if another model made the vectors."""
    if fingerprint == NO_MODEL:
        raise ValueError("no model has made the catalogue's vectors: make them with catalogue.encode(model, processor)")
    found = model.fingerprint()
    if found != fingerprint:
        raise ValueError(
            f"the catalogue's vectors were made by a model with fingerprint {fingerprint[:12]}, this one has "
            f"{found[:12]} (other weights, adapters or number type): make them again with "
            "catalogue.encode(model, processor)"
        )


def cosines(users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
    """Multiply normalised B x D and M x D vectors: B x M, each rounded once, independently of other vectors."""
    return (users.double()[:, None] * items.double()).sum(-1).float()


class _Asked(NamedTuple):
    """The search of one user."""

    user: torch.Tensor
    left_out: list[int]
    evidence: UserEvidence

    def margin(self, state: State) -> float:
        """Return an upper bound of the error of scores before their exact computation."""
        return ROUNDING * max(1.0, state.share, state.popularity, self.evidence.most)

    def added(self, state: State, rows: torch.Tensor) -> torch.Tensor:
        """Return the exact terms that evidence adds to the scores of rows."""
        return self.terms(state, rows.numpy(), self.evidence.of(rows.numpy()))

    def terms(self, state: State, rows: np.ndarray, own: np.ndarray) -> torch.Tensor:
        """Return the sum of the user's own terms, popularity and what the reader adds."""
        if state.counted is not None and state.popularity:
            own = own + state.counted.popular[rows]
        if state.read_texts is not None and len(self.evidence.reading):
            own = own + (state.read_texts[rows] * self.evidence.reading).sum(1)
        return torch.from_numpy(own)


def _search_all(state: State, asked: Sequence[_Asked], top_k: int, predicate: Predicate | None) -> list[Ranking]:
    """Search all N rows."""
    allowed = state.allowed(predicate)
    if state.share:
        users = torch.stack([each.user for each in asked])
        scores = state.products.of(users, state.base)
        scores = torch.cat((scores, users @ state.side.T), 1) if len(state.side) else scores
        scores = scores if state.share == 1 else scores * state.share
    else:
        scores = torch.zeros(len(asked), len(state.live))
    if state.counted is not None and state.popularity:
        scores += torch.from_numpy(state.counted.popular).float()
    if state.read_texts is not None and all(len(each.evidence.reading) for each in asked):
        reading = np.stack([each.evidence.reading for each in asked]).astype(np.float32)
        scores += torch.from_numpy(reading) @ torch.from_numpy(state.read_texts).T
    if predicate is not None or state.count < len(allowed):
        scores.masked_fill_(~allowed, -torch.inf)
    found, total = [], state.count if predicate is None else int(allowed.sum())
    for each, own in zip(asked, scores):
        gone = torch.tensor(each.left_out, dtype=torch.long)  # live rows
        count = min(top_k, total - (len(gone) if predicate is None else int(allowed[gone].sum())))
        own.index_fill_(0, gone, -torch.inf)
        found.append(_ranked(state, each, _finalists(state, each, own, count), count))
    return found


def _finalists(state: State, asked: _Asked, scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return the rows that can be among the first `count`.

    Rare words are read first: the best scores with them are lower bounds, which mostly exclude the rows that have
    common words only.

    Args:
        state: The catalogue.
        asked: The user.
        scores: Scores of all N rows without evidence of the user, -inf for rows that may not be found.
        count: Number of rows that are wanted.
    """
    if not count:
        return torch.empty(0, dtype=torch.long)
    if asked.evidence is NO_EVIDENCE:
        return (scores >= scores.topk(count).values[-1] - asked.margin(state)).nonzero()[:, 0]
    few = max(EXACT_SHARE * len(scores), count)
    for most in (few, math.inf):
        support, rest = asked.evidence.support(most)
        with_support = scores.clone()
        with_support[torch.from_numpy(support.rows)] += torch.from_numpy(support.scores).float()
        cut = with_support.topk(count).values[-1] - asked.margin(state) - rest
        rows = (with_support >= cut).nonzero()[:, 0]
        if not rest or len(rows) <= few:
            break
    return rows


class _Allowed:
    """Decides which rows may be found; the filter sees each item at most once, and only if all else allows it."""

    def __init__(self, state: State, predicate: Predicate | None) -> None:
        self._state, self._predicate = state, predicate
        self._live = state.live.numpy()
        self._verdicts: dict[int, bool] = {}

    def places(self, rows: np.ndarray, left_out: Sequence[int]) -> np.ndarray:
        """Return the places of the rows that may be found, for a user with these excluded rows."""
        kept = self._live[rows]
        if left_out:
            kept &= ~np.isin(rows, left_out)
        places = np.flatnonzero(kept)
        if self._predicate is None:
            return places
        return places[[self._verdict(row) for row in rows[places].tolist()]]

    def _verdict(self, row: int) -> bool:
        assert self._predicate is not None
        if row not in self._verdicts:
            self._verdicts[row] = bool(self._predicate(self._state.fields(row)))
        return self._verdicts[row]


def _ask_index(state: State, asked: Sequence[_Asked], top_k: int, predicate: Predicate | None) -> list[Ranking | None]:
    """Search by the index with growing width; None for a user without a certain result.

    Removed, excluded and filtered rows are dropped from the results of the index, so that the filter sees few items.
    The reader concerns all rows, which are then compared exhaustively.
    """
    answers: list[Ranking | None] = [None] * len(asked)
    if state.index is None or not state.share or state.read_texts is not None:
        return answers
    allowed = _Allowed(state, predicate)
    few = EXACT_SHARE * len(state.live)
    waiting = [number for number, each in enumerate(asked) if len(each.evidence.after.rows) <= max(few, top_k)]
    count, breadth = top_k + EXTRA + max((len(each.left_out) for each in asked), default=0), 1
    if any(len(each.evidence.words) for each in asked):
        count += MORE  # the lower the floor, the fewer words have to be read
    most: float = POSTINGS
    while waiting and count <= few:
        users = torch.stack([asked[number].user for number in waiting])
        for number, base, side in zip(
            waiting, state.index.search(users, count, breadth), nearest(users, state.side, count)
        ):
            reached = Found(
                torch.cat((base.scores, side.scores)),
                torch.cat((base.rows, side.rows + len(state.base))),
                max(base.floor, side.floor),
            )
            support = asked[number].evidence.support(min(most, few))
            answers[number] = _certain(state, asked[number], reached, support, top_k, allowed)
        waiting = [number for number in waiting if answers[number] is None]
        count, breadth, most = WIDER * count, WIDER * breadth, WIDER * most
    return answers


def _certain(
    state: State, asked: _Asked, reached: Found, evidence: tuple[Support, float], top_k: int, allowed: _Allowed
) -> Ranking | None:
    """Rank the found rows, if there are enough and no other row can tie with the last.

    Rows with evidence that the index did not reach are added if their cosine, at most the floor of the index, could
    bring them among the first. All other rows have the cosine, and words that were not read.

    Args:
        state: The catalogue.
        asked: The user.
        reached: What the index found.
        evidence: Result of `UserEvidence.support`.
        top_k: Number of rows that are wanted.
        allowed: Decides which rows may be found.
    """
    share, (support, rest) = state.share, evidence
    kept = torch.from_numpy(allowed.places(reached.rows.numpy(), asked.left_out))
    rows, floor = reached.rows[kept], share * reached.floor + state.popularity
    scores = share * reached.scores[kept].double() + asked.added(state, rows)

    def cut() -> float:
        return scores.topk(top_k).values[-1].item() - asked.margin(state) if len(rows) >= top_k else -math.inf

    others = np.flatnonzero(support.scores >= cut() - floor - rest)
    others = others[~np.isin(support.rows[others], reached.rows.numpy())]
    others = others[np.argsort(-support.scores[others], kind="stable")]
    more, added = support.rows[others], support.scores[others]
    start, size = 0, AT_ONCE
    while start < len(more):
        least = cut() - floor
        stop = min(start + size, int(np.searchsorted(-added, rest - least, side="right")))
        if stop <= start:
            break
        part = more[start:stop]
        terms = asked.evidence.of(part) if rest else added[start:stop]
        enough = np.flatnonzero(terms >= least)
        enough = enough[allowed.places(part[enough], asked.left_out)]
        fresh = torch.from_numpy(part[enough])
        found = share * (state.gather(fresh) @ asked.user).double() + asked.terms(state, part[enough], terms[enough])
        rows, scores = torch.cat((rows, fresh)), torch.cat((scores, found))
        start, size = stop, WIDER * size
    last = cut()
    if len(rows) < top_k or last <= floor + rest:
        return None
    return _ranked(state, asked, rows[scores >= last].sort().values, top_k)


def _ranked(state: State, asked: _Asked, rows: torch.Tensor, count: int) -> Ranking:
    """Rank the finalists, whose rows ascend.

    The rounding of a matrix product depends on the shape of the matrix and the position in it, and differs in FAISS.
    The finalists' scores are therefore computed again, so that equal items tie, and a score does not depend on batch
    size, other items or the index.
    """
    exact = _exact(state, asked, rows)
    order = exact.argsort(descending=True, stable=True)[:count]
    return [(state.ids[row], score) for row, score in zip(rows[order].tolist(), exact[order].tolist())]


def _exact(state: State, asked: _Asked, rows: torch.Tensor) -> torch.Tensor:
    """Return the scores of rows."""
    exact = cosines(asked.user[None], state.gather(rows))[0] if state.share else torch.zeros(len(rows))
    return exact if state.counted is None else state.share * exact.double() + asked.added(state, rows)


# ------------------------------------------------------------------------------------------------------ the catalogue


TEXTS_ONLY = Evidence(learnt=0.0, texts=0.06)
"""Evidence of a catalogue without a model. The weight of texts was chosen on validation purchases of Amazon Beauty,
with the weight of words fixed, and before any event was counted (docs/experiments.md)."""

REBUILD_SHARE, REBUILD_ROWS = 0.1, 1024
"""A new base matrix is made once added and removed rows exceed this share of it, and this number."""


class Catalogue(CatalogueView):
    """Items and their l2-normalised vectors.

    The vectors are in a base matrix, over which `build_index` builds an index. Items added later are in a side buffer,
    which is searched exactly; removed items keep their rows, which searches skip. `save`, `encode`, `build_index` and
    any change after which added and removed rows exceed a tenth of the base (and 1024) merge everything into one
    matrix, with a new index if there was one.

    Make a catalogue with `from_dataset` or `load`. An item is a text, or a mapping of fields with an `item_id`.

    Any number of threads may read, search and change a catalogue concurrently: each call uses the state of one moment,
    changes are sequential, and every call that begins after a change sees it. `snapshot` gives several calls the same
    state.

    Args:
        fingerprint: Digest of the model that makes the vectors.
        dimension: Width of the vectors.
    """

    def __init__(self, fingerprint: str, dimension: int) -> None:
        super().__init__(State.of({}, torch.empty(0, dimension), fingerprint))
        self._lock = threading.RLock()  # for changes; readers read `_state` once
        self._log: EventLog | None = None
        self._home: _Home | None = None

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            return {"_state": self._state, "_log": copy.deepcopy(self._log)}

    def __setstate__(self, kept: dict[str, Any]) -> None:
        state: State = kept["_state"]
        # A copy has separate lists, and no folder.
        own: dict[str, Any] = {"ids": [*state.ids], "items": [*state.items], "rows": {**state.rows}}
        own |= {"texts": Texts(), "tries": Tries()}
        if state.counted is not None:
            own["counted"] = state.counted.copy()
        self._state, self._lock = replace(state, **own), threading.RLock()
        self._log, self._home = kept.get("_log"), None

    @classmethod
    def from_dataset(
        cls,
        items: Any,
        model: Model | None = None,
        processor: Any = None,
        batch_size: int = 256,
        progress: bool = True,
        evidence: Evidence | None = None,
        reader: Reader | str | Path | None = None,
    ) -> "Catalogue":
        """Embed items; without a model, make a catalogue that ranks by texts and events alone.

        Args:
            items: A dataset, a data frame or a list, of mappings with an `item_id` or of texts (whose id is a running
                number, from 0 or from the largest whole number that was an id plus 1). Fields with None or NaN are
                absent.
            model: Model that embeds the items. None = no vectors are made, and any model may use the catalogue.
            processor: Processor that formats the items; without a model, None = the texts of the fields, joined.
            batch_size: Items embedded at once.
            progress: Show a progress bar if embedding takes more than two seconds.
            evidence: Settings of evidence, as in `set_evidence`; None = the catalogue ranks by the cosine only or,
                without a model, by `TEXTS_ONLY`.
            reader: The reader, as in `set_evidence`.

        Raises:
            ValueError: If an id is missing or occurs twice, an item has no text, or there is no model and `learnt` of
                the evidence is above 0.
        """
        if model is None:
            evidence, processor = evidence or TEXTS_ONLY, processor or PlainTexts()
            if evidence.learnt:
                raise ValueError(f"learnt={evidence.learnt}, but there is no model: give one, or set learnt=0")
            catalogue = cls(NO_MODEL, 1)
        else:
            catalogue = cls(model.fingerprint(), vector_width(model.config))
        found = _read(items, catalogue._state)
        options = batch_size, progress
        vectors = _embedded(list(found.values()), model, processor, options, evidence, catalogue.dimension)
        catalogue._state = State.of(found, vectors, catalogue.fingerprint, next_number=after_ids(found))
        if evidence is not None:
            catalogue.set_evidence(evidence, processor, reader)
        return catalogue

    # --------------------------------------------------------------------------------------------------- changing it

    def add(
        self,
        items: Any,
        model: Model | None = None,
        processor: Any = None,
        replace: bool = False,
        batch_size: int = 256,
        progress: bool = True,
    ) -> None:
        """Embed more items, which later searches find. Arguments as in `from_dataset`.

        A catalogue that was made without a model needs none here.

        Raises:
            ValueError: If an id is in the catalogue already and `replace` is not set; then nothing is changed.
        """
        with self._lock:
            state = self._state
            if model is not None:
                self.check(model)
            elif state.fingerprint != NO_MODEL:
                raise ValueError("add needs the model and the processor that embed the items, as in from_dataset")
            processor = PlainTexts() if processor is None else processor
            found = _read(items, state)
            known = {item_id: row for item_id in found if (row := state.row(item_id)) is not None}
            if known and not replace:
                name = next(iter(known))
                raise ValueError(f"item_id {short(name)} is in the catalogue already: pass replace=True to replace it")
            options = batch_size, progress
            vectors = _embedded([*found.values()], model, processor, options, self.evidence, state.dimension)
            texts = [] if state.counted is None else item_texts(processor, found.values())
            self._state = _changed(state, found, vectors, list(known.values()), texts)

    def remove(self, item_ids: Sequence[Any]) -> None:
        """Remove items; if one is unknown, nothing is changed."""
        if isinstance(item_ids, str):
            raise TypeError(f"remove expects several item ids, got the one text {item_ids!r}: put it in a list")
        with self._lock:
            state = self._state
            rows = [*dict.fromkeys([state.known(each) for each in item_ids])]
            self._state = _changed(state, {}, state.side[:0], rows, [])

    def encode(
        self,
        model: Model,
        processor: Any,
        batch_size: int = 256,
        progress: bool = True,
        learnt: float | None = None,
    ) -> None:
        """Embed all items again, after the model has changed.

        Args:
            model: Model that embeds the items.
            processor: Processor that formats the items.
            batch_size: Items embedded at once.
            progress: Show a progress bar if embedding takes more than two seconds.
            learnt: New weight of the cosine next to evidence; None = as before.
        """
        with self._lock:
            state = self._state
            if learnt is not None:
                state = replace(state, counted=self._ruled(replace(self._evidence_log().rule, learnt=learnt)))
            rule = None if state.counted is None else state.counted.rule
            rows = state.live_rows()
            items = {state.ids[row]: state.items[row] for row in rows}
            options, width = (batch_size, progress), vector_width(model.config)
            vectors = _embedded([*items.values()], model, processor, options, rule, width)
            new = _replaced(state, rows, items, vectors, model.fingerprint())
            if new.counted is not None:
                reading = new.counted.reading
                texts = item_texts(processor, items.values())
                counted = new.counted.worded(texts, None if reading is None else reading.reader)
                new = replace(new, counted=counted)
                self._evidence_log().rule = counted.rule
            self._state = new

    def snapshot(self) -> CatalogueView:
        """Return the current state, for several calls that must agree; later changes do not affect it."""
        return CatalogueView(self._state)

    def set_exclude_seen(self, exclude_seen: bool) -> None:
        """Set whether a pipeline leaves out the items of a request's history; `save` stores it.

        It does by default. Set False where users return to the same items, e.g. songs.
        """
        if not isinstance(exclude_seen, bool):
            raise TypeError(f"exclude_seen={short(exclude_seen)}: give True or False")
        with self._lock:
            self._state = replace(self._state, exclude_seen=exclude_seen)

    # ------------------------------------------------------------------------------------------------------- evidence

    def set_evidence(
        self,
        evidence: Evidence | None,
        processor: Any = None,
        reader: Reader | str | Path | None = None,
        item_weights: ItemWeights | None = None,
    ) -> None:
        """Enable evidence, change its settings, or disable it.

        Weights can change at any time. The settings of counting (`steps`, `backwards`, `half_life`) can change only if
        all events are present, which are then counted again. If `learnt` was 0 there are no vectors: `encode` makes
        them.

        Args:
            evidence: The settings; None = the catalogue ranks by the cosine only, and events are deleted.
            processor: Processor that formats the items; required if there is no evidence yet, or none that compares
                texts.
            reader: The reader that compares texts, if `texts` of the evidence is above 0, or its file; None = the
                catalogue's own, else the package's.
            item_weights: Weights of a linear model, with a row and a column for each item of the catalogue, in its
                order; they are required if `linear` of the evidence is above 0 and the catalogue has none. None = the
                catalogue's own.

        Raises:
            ValueError: If `learnt` is above 0 without vectors, `linear` is above 0 without item weights, the processor
                is missing, or events to count again are missing.
        """
        with self._lock:
            state = self._state
            if state.counted is None and evidence is not None and processor is None:
                raise ValueError("evidence reads the items' words: give set_evidence the processor that words them")
            if evidence is None:
                if self._home is not None and self._home.journal is not None:
                    self._home.journal.close()
                    self._home.journal = None
                self._state, self._log = replace(state, counted=None), None
                return
            _check_parts(evidence, state, item_weights)
            if state.counted is None:
                state = _compacted(state)
                texts = item_texts(processor, state.items[: state.count])
                own = Reader.of(reader) if evidence.texts else None
                counted = Counted.of(evidence, state.ids[: state.count], texts, own)
                counted = _weighted(counted, state, item_weights)
                self._log, self._state = EventLog(evidence), replace(state, counted=counted)
                return
            counted, log = self._ruled(evidence), self._evidence_log()
            counted = _weighted(self._reading(counted, processor, reader), state, item_weights)
            if evidence.counting != state.counted.rule.counting:
                if not log.is_complete:
                    raise ValueError(
                        f"{EVENTS} was left out of the catalogue's folder, without which nothing can be counted anew: "
                        "keep steps, backwards and half_life, or observe all events with a new catalogue"
                    )
                log = log.under(evidence)
                counted = replace(counted, transitions=log.counted(len(counted.rows)))
            log.rule = evidence
            self._log, self._state = log, replace(state, counted=counted)

    def observe(self, events: Any) -> int:
        """Count events: which user met which item. Later searches use them; nothing is trained.

        Events count in the order of their times, independently of the order of calls; events with equal times count in
        the order given. A catalogue that was loaded from a folder or saved to one writes events to a journal there
        before this method returns, so that a killed process loses none; `save` moves them into the files. Items outside
        the catalogue are counted as well, since they may be added later. 20,000 events in one call take about a second
        or less; a call takes at least some milliseconds.

        Args:
            events: A list, a data frame or a dataset of rows with `user_id`, `item_id` and, as in requests,
                `timestamp`. Events without times follow their user's earlier events, in the order given.

        Returns:
            Number of events.

        Raises:
            ValueError: If the catalogue has no evidence, or an event is invalid; then none is counted.
            OSError: If the journal cannot be written; then none is counted.
        """
        with self._lock:
            log = self._evidence_log()
            columns = _event_columns(events, log.rule)
            if columns[0]:
                self.open_journal()
                self._observe(columns, journal=True)
            return len(columns[0])

    def forget(self, user_ids: Any) -> int:
        """Remove users' events from the evidence, as if they had never been counted.

        The next `save` removes their events and ids from the folder's files. What was learnt from these events stays
        until it is learnt again: weights of the network, and of a linear model (`ItemWeights`).

        Args:
            user_ids: The id of a user, or several.

        Returns:
            Number of removed events.

        Raises:
            ValueError: If the catalogue has no evidence, or may contain events of a user that it cannot remove, because
                they were left out of its folder.
        """
        given = [user_ids] if isinstance(user_ids, str | Real) else list(user_ids)
        users = [*dict.fromkeys(normalize_id(user, "user_ids") for user in given)]
        with self._lock:
            log = self._evidence_log()
            if not log.is_complete:
                raise ValueError(
                    f"{EVENTS} was left out of the catalogue's folder, so it is not known what was counted of whom: "
                    "put the file back, and load the catalogue again"
                )
            self.open_journal()
            return self._forget(users, journal=True)

    def _ruled(self, rule: Evidence) -> Counted:
        """Return the evidence with other weights."""
        counted = self._state.counted
        assert counted is not None
        return replace(counted, transitions=replace(counted.transitions, rule=rule))

    def _reading(self, counted: Counted, processor: Any, reader: Reader | str | Path | None) -> Counted:
        """Return evidence with the texts encoded, if it compares texts."""
        if not counted.rule.texts:
            return replace(counted, reading=None)
        if counted.reading is not None and reader is None:
            return counted
        if processor is None and self.fingerprint != NO_MODEL:
            raise ValueError(
                f"texts={counted.rule.texts} compares the items' texts, which are not encoded yet: give set_evidence "
                "the processor that words them"
            )
        texts = item_texts(processor or PlainTexts(), self._state.items[: len(self._state.live)])
        return counted.worded(texts, Reader.of(reader))

    def _evidence_log(self) -> EventLog:
        if self._log is None or self._state.counted is None:
            raise ValueError("the catalogue has no evidence: call set_evidence(Evidence(), processor) first")
        return self._log

    def _observe(self, columns: "_Columns", journal: bool) -> None:
        log, state = self._evidence_log(), self._state
        assert state.counted is not None
        users = log.numbered(columns[0])
        counted, items = state.counted.numbering(columns[1])
        times = log.without_times(users) if columns[2] is None else np.array(columns[2], float)
        new = Histories(users, items, times)
        transitions, whole = log.observe(new, counted.transitions, len(counted.rows))
        if journal and self._home is not None and self._home.journal is not None:
            self._home.journal.append({"observe": [columns[0], columns[1], times.tolist()]})
        log.append(new, whole)
        self._state = replace(state, counted=replace(counted, transitions=transitions))

    def _forget(self, users: Sequence[str], journal: bool) -> int:
        log, state = self._evidence_log(), self._state
        assert state.counted is not None
        if journal and self._home is not None and self._home.journal is not None:
            self._home.journal.append({"forget": users})
        transitions, count = log.forget(users, state.counted.transitions)
        self._state = replace(state, counted=replace(state.counted, transitions=transitions))
        return count

    def _replay(self, records: Sequence[Any], path: Path) -> None:
        """Count the events of a journal."""
        for number, record in enumerate(records, 1):
            try:
                if "forget" in record:
                    self._forget(record["forget"], journal=False)
                else:
                    self._observe(_Columns(*record["observe"]), journal=False)
            except (KeyError, TypeError, ValueError) as error:
                raise _damaged(path, f"record {number} is none of a catalogue: {error}") from error

    def open_journal(self) -> None:
        """Open the journal of the catalogue's folder for writing, and count events in it that are not counted yet.

        `observe` and `forget` do this on their first call. Until the end of this process no other one can change the
        catalogue's events. Without a folder there is no journal, and nothing happens.

        Raises:
            ValueError: If another process writes the journal or has saved the catalogue since, or if this process was
                forked from the one that writes it.
        """
        with self._lock:
            home = self._home
            if home is None or home.journal is not None and home.journal.is_open:
                return
            if home.journal is not None:
                raise ValueError(
                    f"{home.folder / JOURNAL} is written by the process that this one was forked from: load the "
                    "catalogue"
                )
            home.check()
            journal = Journal(home.folder / JOURNAL, home.known)
            self._replay(journal.unread, journal.path)
            home.journal = journal

    # ------------------------------------------------------------------------------------------------------ the index

    def build_index(self, kind: str | None, **settings: int) -> None:
        """Build a FAISS index for later searches; `save` stores its kind and settings.

        Every search still returns `top_k` items if there are that many: if the index finds too few items that are not
        removed, excluded or filtered out, the search width grows, and finally all rows are searched.

        Args:
            kind: "flat" (exact), "hnsw" (a graph) or "ivf" (lists around centroids); None = no index.
            **settings: Settings by FAISS's names, see `VectorIndex`.

        Raises:
            ImportError: If FAISS is not installed.
            ValueError: If the kind or a setting is unknown.
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
        """Write the catalogue atomically into a separate folder: on failure, the earlier catalogue there stays.

        With evidence the events are written as well, and later events go to a journal in this folder.

        Raises:
            BlockingIOError: If another process observes events in this folder.
            ValueError: If the folder holds other files, or observed events that this catalogue does not have.
        """
        with self._lock:
            state = self._state = _compacted(self._state)
            items = dict(zip(state.ids[: state.count], state.items[: state.count]))
            write = partial(
                write_catalogue,
                directory,
                items,
                state.base,
                state.fingerprint,
                state.wanted,
                state.next_number,
                exclude_seen=state.exclude_seen,
            )
            if state.counted is not None:
                self._save_with_evidence(Path(directory).resolve(), write)
                return
            if self._home is None or self._home.folder != Path(directory).resolve():
                refuse_journal(Path(directory).resolve())
        write()

    def _save_with_evidence(self, folder: Path, write: Callable[..., None]) -> None:
        """Write everything while no change can happen, and use this folder from then on."""
        home = self._home
        if home is not None and home.folder == folder:
            home.check()
            if (folder / JOURNAL).exists():
                self.open_journal()
        else:
            refuse_journal(folder)
        counted = self._state.counted
        assert counted is not None
        kept = KeptEvidence(
            counted.words,
            counted.transitions,
            counted.names[: len(counted.rows)],
            self._evidence_log(),
            counted.reading,
            counted.linear,
        )
        write(evidence=kept)
        if home is not None and home.journal is not None:
            home.journal.close()
        self._home = _Home(folder, folder_version(folder))

    @classmethod
    def load(
        cls, directory: str | Path, model: Model | None = None, index: str | None = "saved", journal: bool = True
    ) -> "Catalogue":
        """Read a catalogue, and verify that it is complete.

        Args:
            directory: The folder.
            model: If given, it must be the model that made the vectors.
            index: Kind of the index to build, as in `build_index`; "saved" = the saved kind with its settings, if FAISS
                is installed.
            journal: Write observed events to the folder; otherwise they are in memory only until `save`.

        Raises:
            FileNotFoundError: If there is no catalogue.
            ImportError: If the index needs FAISS, which is not installed.
            ValueError: If a file is damaged or of another format or catalogue, another model made the vectors, or the
                kind of index is unknown.
        """
        kept = read_catalogue(directory)
        wanted, catalogue = kept.index, cls(kept.fingerprint, kept.vectors.shape[1])
        more = {"next_number": kept.next_number, "exclude_seen": kept.exclude_seen}
        catalogue._state = State.of(kept.items, kept.vectors, kept.fingerprint, **more)
        if kept.evidence is not None:
            counted = Counted.read(kept.evidence, list(kept.items))
            catalogue._state, catalogue._log = replace(catalogue._state, counted=counted), kept.evidence.log
            catalogue._replay(kept.journal, Path(directory) / JOURNAL)
            catalogue._home = _Home(Path(directory).resolve(), kept.version, kept.journal_size) if journal else None
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


def _check_parts(evidence: Evidence, state: State, item_weights: ItemWeights | None) -> None:
    """Raise an error if evidence weights what a catalogue does not have."""
    if evidence.learnt and not state.share and state.count:
        raise ValueError(
            f"learnt={evidence.learnt}, but the catalogue has no vectors, since learnt was 0: call "
            f"encode(model, processor, learnt={evidence.learnt}), which makes them"
        )
    if evidence.linear and item_weights is None and (state.counted is None or state.counted.linear is None):
        raise ValueError(
            f"linear={evidence.linear}, but the catalogue has no weights between items: give item_weights, or set "
            "linear=0"
        )


def _weighted(counted: Counted, state: State, item_weights: ItemWeights | None) -> Counted:
    """Return evidence with the weights of a linear model, whose rows are the items of a catalogue in their order."""
    if item_weights is None:
        return counted
    ids = [state.ids[row] for row in state.live_rows()]
    if item_weights.num_items != len(ids):
        raise ValueError(
            f"item_weights has {item_weights.num_items:,} rows, and the catalogue {len(ids):,} items: give a row for "
            "each item, in the order of the catalogue"
        )
    numbers = np.array([counted.numbers[item_id] for item_id in ids], np.int64)
    return replace(counted, linear=item_weights.numbered(numbers))


@dataclass
class _Home:
    """The folder of a catalogue's evidence."""

    folder: Path
    version: tuple[int, ...]
    """Version of the files that the catalogue was loaded from or saved to."""
    known: int = 0
    """Bytes of the journal whose events are counted."""
    journal: Journal | None = None

    def check(self) -> None:
        """Raise an error if another catalogue was saved there since."""
        recover(self.folder.parent, self.folder.name)
        if folder_version(self.folder) != self.version:
            raise ValueError(
                f"{self.folder} was saved anew, or removed, since this catalogue was read from it or saved to it: load "
                "it again, or save this one to another folder"
            )


def refuse_journal(folder: Path) -> None:
    """Raise an error if saving into a folder would lose events that were observed there."""
    path = folder / JOURNAL
    if not path.exists():
        return
    journal = Journal(path)
    journal.close()
    if journal.unread:
        raise ValueError(
            f"{path} holds events that were observed and not saved: load the catalogue in that folder and save it, or "
            "remove the file if the events are not needed"
        )


class _Columns(NamedTuple):
    """Events by column."""

    users: list[str]
    items: list[str]
    times: list[float] | None


def _event_columns(events: Any, rule: Evidence) -> _Columns:
    """Read events, and check each of them before any is counted."""
    names = ("user_id", "item_id", "timestamp")
    if is_frame(events):
        columns = [[*_missing_as_none(events[name])] if name in events else [None] * len(events) for name in names]
    else:
        rows = list(table_rows(events))
        for number, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise TypeError(
                    f"events[{number}]: expected a mapping with {', '.join(names)}, got {type(row).__name__}"
                )
        columns = [[row.get(name) for row in rows] for name in names]
    users, items = (_ids(column, name) for column, name in zip(columns[:2], names))
    given = columns[2]
    missing = [number for number, time in enumerate(given) if time is None or time != time]  # NaN != NaN
    if missing and (len(missing) < len(given) or rule.half_life is not None):
        why = "others have one" if len(missing) < len(given) else "half_life lets events decay by their age"
        raise ValueError(f"events[{missing[0]}]: no timestamp, but {why}")
    if missing:
        return _Columns(users, items, None)
    return _Columns(users, items, _seconds(given))


def _ids(given: Sequence[Any], name: str) -> list[str]:
    """Return ids as texts; repeated ids are converted once."""
    known: dict[tuple[type, Any], str] = {}
    found = []
    for number, value in enumerate(given):
        key = type(value), value
        if key not in known:
            known[key] = normalize_id(value, f"events[{number}].{name}")
        found.append(known[key])
    return found


def _seconds(given: Sequence[Any]) -> list[float]:
    """Return times in seconds since 1970; if all are numbers of seconds, they are converted together."""
    least, most, _ = TIME_UNITS["seconds"]
    if given and {*map(type, given)} <= {int, float} and min(given) >= least and max(given) < most:
        return list(map(float, given))
    return [time_seconds(time, f"events[{number}].timestamp", True) for number, time in enumerate(given)]


def _embedded(
    items: Sequence[Item],
    model: Model | None,
    processor: Any,
    options: tuple[int, bool],
    evidence: Evidence | None,
    width: int,
) -> torch.Tensor:
    """Embed items; if the cosine has weight 0, the vectors are zeros of a width."""
    if evidence is not None and not evidence.learnt:
        return torch.zeros(len(items), width)
    return embed(items, model, processor, *options)


def _changed(
    state: State, found: dict[str, Item], vectors: torch.Tensor, gone: Sequence[int], texts: Sequence[str]
) -> State:
    """Return a state with more items, whose texts evidence uses, and without some rows."""
    start = len(state.live)
    live = torch.cat((state.live, torch.ones(len(found), dtype=torch.bool)))
    live[list(gone)] = False
    side = torch.cat((state.side, vectors))
    # Shared with the earlier state, which uses its own rows only.
    state.ids[start:], state.items[start:] = found, found.values()
    for row, item_id in enumerate(found, start):
        state.rows[item_id] = (*state.rows.get(item_id, ()), row)
    number = after_ids(found, state.next_number)
    new = replace(state, live=live, side=side, count=state.count + len(found) - len(gone), next_number=number)
    if state.counted is not None:
        new = replace(new, counted=state.counted.changed(list(found), texts, {row: state.ids[row] for row in gone}))
    changed = len(side) + len(live) - new.count
    return _compacted(new) if changed > max(REBUILD_ROWS, REBUILD_SHARE * len(state.base)) else new


def _compacted(state: State) -> State:
    """Return a state with one base matrix of the remaining and the added rows."""
    if state.count == len(state.base) == len(state.live):
        return state
    rows = state.live_rows()
    vectors = state.gather(rows)
    items = {state.ids[row]: state.items[row] for row in rows}
    return _replaced(state, rows, items, vectors, state.fingerprint)


def _replaced(
    state: State, rows: Sequence[int], items: dict[str, Item], vectors: torch.Tensor, fingerprint: str
) -> State:
    """Return a state with one base matrix for the items of some rows, and an index of the same kind."""
    index = None if state.index is None else VectorIndex(state.index.kind, state.index.given, vectors)
    more: dict[str, Any] = {
        "index": index,
        "wanted": state.wanted,
        "texts": state.texts.kept(rows),
        "next_number": state.next_number,
    }
    more["tries"] = state.tries.kept(rows)
    counted = None if state.counted is None else state.counted.kept(rows)
    return State.of(items, vectors, fingerprint, **more, counted=counted, exclude_seen=state.exclude_seen)


def _read(items: Any, state: State) -> dict[str, Item]:
    """Check items and return them by id, without empty fields.

    The id of a text is its index among the items plus the first number above every whole number that was ever an id,
    so that no text reuses an id.
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
            raise ValueError(f"{place}: item_id {short(item_id)} is there twice; each item needs one of its own")
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
    """Embed items, batched by similar length: M x D float32 on the CPU. Arguments as in `Catalogue.from_dataset`."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: give 1 or more")
    encoded = processor.encode_items(items)
    order = sorted(range(len(items)), key=lambda index: len(encoded[index]))
    vectors = torch.empty(len(items), vector_width(model.config))
    starts = range(0, len(items), batch_size)
    with inference_mode(model):
        for start in logging.tqdm(starts, desc="Embedding items", unit="batch", delay=2, disable=not progress):
            batch = order[start : start + batch_size]
            padded = processor.pad([{"input_ids": encoded[index]} for index in batch])
            ids, mask = (padded[name].to(model.device) for name in ("input_ids", "attention_mask"))
            memory = None
            if reads_item_rows(model.config):
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
    "EVENTS",
    "EVIDENCE",
    "ITEMS",
    "JOURNAL",
    "MANIFEST",
    "NO_MODEL",
    "READER_FILE",
    "SETTINGS",
    "TEXTS_ONLY",
    "TEXT_COLUMN",
    "VECTORS",
    "Catalogue",
    "CatalogueView",
    "Conditions",
    "Evidence",
    "EvidenceScores",
    "Found",
    "Item",
    "Kept",
    "KeptEvidence",
    "Model",
    "NamedText",
    "Past",
    "PlainTexts",
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
    "refuse_journal",
    "table_rows",
    "without_stats",
    "write_catalogue",
]
