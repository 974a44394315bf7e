"""The files of a catalogue: items as Parquet, vectors as safetensors, and a manifest that vouches for both."""

import hashlib
import importlib
import json
import os
import shutil
import uuid
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .configuration_m6rec import check_format
from .items_m6rec import Item

FORMAT = 1
MANIFEST, ITEMS, VECTORS = "catalogue.json", "items.parquet", "vectors.safetensors"
TEXT_COLUMN = "__text__"
"""Column of `items.parquet` for items that are a text and no fields."""


def write_catalogue(
    directory: str | Path,
    items: Mapping[str, Item],
    vectors: torch.Tensor,
    fingerprint: str,
    index: Mapping[str, Any] | None = None,
) -> None:
    """Write a catalogue into a folder of its own, all or nothing: on failure, what was there before stays.

    Args:
        directory: The folder.
        items: Items by id.
        vectors: Their vectors, one row each.
        fingerprint: Of the model that made the vectors.
        index: Kind and settings of the index that is built whenever the catalogue is read; None = none. An index itself
            is never kept: its files are not safe to read from others.

    Raises:
        ValueError: The folder holds other files, or a field has values that cannot be kept.
    """
    target = Path(directory).resolve()
    if target.exists():
        strange = sorted({path.name for path in target.iterdir()} - {MANIFEST, ITEMS, VECTORS})
        if strange:
            raise ValueError(
                f"{target} holds other files, such as {strange[0]!r}: give the catalogue a folder of its own"
            )
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.parent / f".{target.name}-{uuid.uuid4().hex}"
    fresh.mkdir()
    try:
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
        (fresh / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        _put(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def read_catalogue(directory: str | Path) -> tuple[dict[str, Item], torch.Tensor, str, dict[str, Any] | None]:
    """Read a catalogue and make sure that it is whole: items by id, their vectors, the model's fingerprint, the index.

    Raises:
        FileNotFoundError: There is no catalogue.
        ValueError: A file is damaged, or of another format or catalogue.
    """
    folder = Path(directory)
    manifest = _read_manifest(folder)
    items = _read_items(folder / ITEMS, manifest["json_columns"])
    vectors = load_file(folder / VECTORS)["vectors"]
    found, expected = (len(items), *vectors.shape), (manifest["count"], manifest["count"], manifest["dimension"])
    if found != expected:
        raise ValueError(
            f"{folder}: expected (items, vectors, dimension) to be {expected} by {MANIFEST}, found {found}"
        )
    return items, vectors, manifest["fingerprint"], manifest.get("index")  # older manifests know of none


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


def _read_items(path: Path, encoded: Collection[str]) -> dict[str, Item]:
    items: dict[str, Item] = {}
    for row in _arrow().parquet.read_table(path).to_pylist():
        fields = {name: value for name, value in row.items() if value is not None}
        fields |= {name: json.loads(fields[name]) for name in encoded if name in fields}
        items[fields["item_id"]] = fields.get(TEXT_COLUMN, fields)
    return items


def _arrow() -> Any:
    """Import pyarrow, which only keeping a catalogue needs."""
    try:
        importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ImportError("a catalogue is kept as Parquet, which needs pyarrow: pip install pyarrow") from error
    return importlib.import_module("pyarrow")


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest and make sure that the files are those it speaks of."""
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"there is no catalogue in {folder}: {MANIFEST} is missing; Catalogue.save writes it")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(manifest, dict):
        raise ValueError(f"{path} is damaged: expected a mapping, found {manifest!r}")
    check_format(manifest.get("format"), FORMAT, str(path))
    missing = {"fingerprint", "dimension", "count", "json_columns", "sha256"} - manifest.keys()
    if missing:
        raise ValueError(f"{path} is damaged: it lacks {sorted(missing)}")
    index = manifest.get("index")
    if index is not None and not (isinstance(index, dict) and index.keys() == {"kind", "settings"}):
        raise ValueError(f"{path} is damaged: index is {index!r}, expected a kind and settings, or null")
    for name in (ITEMS, VECTORS):
        if not (folder / name).is_file() or _digest(folder / name) != manifest["sha256"].get(name):
            raise ValueError(f"{folder / name} is missing, damaged or of another catalogue: save the catalogue again")
    return manifest


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _put(fresh: Path, target: Path) -> None:
    """Put a written folder in the place of another."""
    for path in fresh.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if not target.exists():
        os.replace(fresh, target)
        return
    old = fresh.with_name(f"{fresh.name}-old")
    os.replace(target, old)
    try:
        os.replace(fresh, target)
    except OSError:
        os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


__all__ = ["ITEMS", "MANIFEST", "TEXT_COLUMN", "VECTORS", "read_catalogue", "write_catalogue"]
