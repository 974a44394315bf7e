"""The files of a table: found by a path, a pattern or a folder, and checked before they are parsed."""

import bz2
import glob
import gzip
import hashlib
import json
import lzma
import os
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import datasets
import pandas
import pyarrow
import pyarrow.parquet
from datasets import Features, Value

FORMATS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".jsonl": "json", ".json": "json"}
PACKED: dict[str, Callable[..., IO[Any]]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
"""Suffixes of compressed files -> function that opens them. Parquet is compressed internally."""
UNPACKING_ERRORS = (EOFError, zlib.error, lzma.LZMAError)
DEEPEST_JSON = 100
"""Maximum nesting of lists and objects in a row. Arrow's reader crashes on much deeper ones."""
SAVED = ("dataset_info.json", "dataset_dict.json", "state.json")
"""Files that identify a folder saved by `datasets`."""

_SEPARATORS = ",;\t"
_JSON_TEXT = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_KNOWN = f"{', '.join(FORMATS)}; of texts also with {', '.join(PACKED)}"


def find_files(location: str) -> list[Path] | None:
    """Find the files of a local table; None if there is no such file or folder.

    Args:
        location: A file, a pattern such as `part-*.parquet`, or a folder of files of one kind.

    Raises:
        ValueError: A pattern or folder matches nothing, or files of several kinds.
    """
    path = Path(location)
    if path.is_file():
        return [path]
    if path.is_dir():
        if any((path / name).is_file() for name in SAVED):
            return None
        found = sorted(each for each in path.rglob("*") if each.is_file() and not _is_aside(each.relative_to(path)))
        partitions = [each for each in found if any("=" in part for part in each.relative_to(path).parts[:-1])]
        if partitions:
            raise ValueError(
                f"{partitions[0]}: the name of its folder holds a column, which is not read: write it into the files"
            )
    elif glob.has_magic(location):
        found = sorted(Path(each) for each in glob.glob(location, recursive=True) if Path(each).is_file())
    else:
        return None
    if not found:
        raise FileNotFoundError(f"{location}: no file of a table lies there; expected {_KNOWN}")
    kinds = {kind_of(each): each for each in found}
    if len(kinds) > 1:
        first, second, *_ = kinds.values()
        raise ValueError(f"{location}: {first} and {second} are of two kinds: name those of one, as in '*.parquet'")
    return found


def _is_aside(path: Path) -> bool:
    """Whether a file in the folder of a table is not part of it, such as `_SUCCESS` and `.part-0.crc`."""
    return any(part.startswith((".", "_")) for part in path.parts)


def kind_of(path: Path) -> str:
    """Return the reader of `datasets` for a file: csv, json or parquet."""
    suffix = path.suffix.lower()
    packed = suffix in PACKED
    kind = FORMATS.get(Path(path.stem).suffix.lower() if packed else suffix)
    if kind is None or (packed and kind == "parquet"):
        raise ValueError(f"{path}: unknown suffix {path.suffix!r}; expected one of {_KNOWN}")
    return kind


def unpacked(path: Path) -> Path:
    """Decompress a compressed file into the cache of `datasets`; return any other file as it is.

    `datasets` itself caches decompressed files by path only, and so reads an old version of a changed file; here the
    name also depends on size and modification time.
    """
    if path.suffix.lower() not in PACKED:
        return path
    state = path.stat()
    name = hashlib.sha256(f"{path.resolve()} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()
    plain = Path(datasets.config.HF_DATASETS_CACHE) / "m6rec-unpacked" / f"{name}{Path(path.stem).suffix}"
    if not plain.is_file():
        plain.parent.mkdir(parents=True, exist_ok=True)
        partial = plain.with_name(f".{plain.name}-{os.getpid()}")
        try:
            with PACKED[path.suffix.lower()](path, "rb") as packed, partial.open("wb") as file:
                shutil.copyfileobj(packed, file)
            partial.replace(plain)
        finally:
            partial.unlink(missing_ok=True)
    return plain


def check_file(path: Path, kind: str) -> None:
    """Raise if a file holds no rows, or JSON other than objects: Arrow's reader crashes on some of these.

    Raises:
        ValueError: The file is of that kind.
    """
    if kind == "parquet":
        if pyarrow.parquet.read_metadata(path).num_rows == 0:
            raise ValueError("it holds no rows")
        return
    with path.open("rb") as file:
        lines = (line for line in file if line.strip())
        if next(lines, None) is None or (kind == "csv" and next(lines, None) is None):
            raise ValueError("it holds no rows")
    if kind == "json":
        _check_json(path)


def _check_json(path: Path) -> None:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            text = line.removeprefix(b"\xef\xbb\xbf").strip()
            if text and not (text[:1] == b"{" and text[-1:] == b"}"):
                break
            _check_depth(text, f"line {number}")
        else:
            return
    _check_whole_json(path.read_bytes())


def _check_depth(text: bytes, place: str) -> None:
    if text.count(b"[") + text.count(b"{") <= DEEPEST_JSON:
        return
    depth = 0
    for bracket in re.findall(rb"[\[\]{}]", _JSON_TEXT.sub(b"", text)):
        depth += 1 if bracket in b"[{" else -1
        if depth > DEEPEST_JSON:
            raise ValueError(f"{place}: lists and objects stand more than {DEEPEST_JSON} deep within each other")


def _check_whole_json(content: bytes) -> None:
    """Check a JSON file without one object per line: one list of objects, or objects over several lines."""
    _check_depth(content, "it")
    text, place, decode = content.decode("utf-8-sig"), 0, json.JSONDecoder().raw_decode
    rows: list[Any] = []
    while place < len(text):
        if text[place].isspace():
            place += 1
            continue
        row, place = decode(text, place)
        rows.append(row)
    if len(rows) == 1 and isinstance(rows[0], list):
        rows = rows[0]
    if not rows:
        raise ValueError("it holds no rows")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"its value {number} is {json.dumps(row)[:80]}; expected objects, a row each")


def csv_options(path: Path) -> dict[str, Any]:
    """Options with which `datasets` reads a CSV file: its separator, and all cells as text."""
    with path.open(encoding="utf-8-sig") as file:
        line = file.readline()
    separator = max(_SEPARATORS, key=line.count)
    head = pandas.read_csv(path, sep=separator, dtype=str, nrows=1)
    if not isinstance(head.index, pandas.RangeIndex):  # pandas would use the first column as row names
        raise ValueError(f"its first row has more cells than its header ({', '.join(head.columns)})")
    features = Features({name: Value("string") for name in head.columns})
    return {"features": features, "keep_default_na": False, "sep": separator}


__all__ = [
    "FORMATS",
    "PACKED",
    "UNPACKING_ERRORS",
    "check_file",
    "csv_options",
    "find_files",
    "kind_of",
    "unpacked",
]
