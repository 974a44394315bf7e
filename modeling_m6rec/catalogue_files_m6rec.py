"""The files of a catalogue: items as Parquet, vectors as safetensors, and a manifest that vouches for both."""

import hashlib
import importlib
import json
import os
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from .atomic_m6rec import atomic_folder, standing
from .configuration_m6rec import check_format
from .items_m6rec import Item

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
            return _read(standing(folder), folder)
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


def _read(standing: Path, folder: Path) -> Kept:
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


__all__ = ["ITEMS", "MANIFEST", "TEXT_COLUMN", "VECTORS", "Kept", "read_catalogue", "write_catalogue"]
