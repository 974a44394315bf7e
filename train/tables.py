"""Tables of any kind (CSV, Parquet, JSONL, a folder saved by `datasets`, a Hub dataset) and their columns, checked.

Everything is read into Arrow by `datasets` and left there until a column is asked for.
"""

import glob
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas
import pyarrow
import pyarrow.parquet
from datasets import Dataset, DatasetDict, Features, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

FORMATS = {".csv": "csv", ".parquet": "parquet", ".jsonl": "json", ".json": "json"}
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_LARGEST_SECONDS = 1e11  # the year 5138; as milliseconds it is 1973
_EXACT_FLOAT = 2**53  # above it a float no longer tells neighbouring whole numbers apart


def load_table(location: str) -> Dataset:
    """Reads one table.

    Args:
        location: A CSV, Parquet or JSONL file; else `name`, `name:split` or `name:config:split`, where the name is a
            folder saved by `datasets` or a Hub dataset id. The split may be left out where there is only one.

    Returns:
        The rows. Every column of a CSV file is text (so "007" and "NA" stay what they are), empty where a cell is.
    """
    if Path(location).is_file():
        return _load_file(Path(location))
    name, *parts = location.split(":")
    if Path(name).is_dir():
        loaded = load_from_disk(name)
    elif _HUB_ID.fullmatch(name) and Path(name).suffix.lower() not in FORMATS:
        try:
            loaded = load_dataset(name, *parts[:-1])
        except (ConnectionError, DatasetNotFoundError) as error:
            raise FileNotFoundError(
                f"{name!r} is no file or folder here, and the Hub does not give it: {error}"
            ) from error
    else:
        raise FileNotFoundError(
            f"no table at {location!r}: expected a file ({', '.join(FORMATS)}), a folder saved by `datasets`, "
            "or a Hub dataset id such as 'org/name:train'"
        )
    if isinstance(loaded, Dataset):
        return loaded
    return _one_split(loaded, parts[-1] if parts else None, name)


def _load_file(path: Path) -> Dataset:
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path}: unknown suffix {path.suffix!r}; expected one of {', '.join(FORMATS)}")
    try:
        if _holds_nothing(path, kind):
            raise ValueError("it holds no rows")
        options = _csv_options(path) if kind == "csv" else {}
        # `datasets` reads * ? [ in a path as patterns.
        return load_dataset(kind, data_files=glob.escape(str(path)), split="train", **options)
    except (DatasetGenerationError, ValueError) as error:  # pandas' and Arrow's errors are ValueErrors
        raise ValueError(f"{path} cannot be read as {kind} in UTF-8: {error.__cause__ or error}") from error


def _holds_nothing(path: Path, kind: str) -> bool:
    if kind == "parquet":
        return pyarrow.parquet.read_metadata(path).num_rows == 0
    with path.open("rb") as file:
        lines = (line for line in file if line.strip())
        return next(lines, None) is None or (kind == "csv" and next(lines, None) is None)


def _csv_options(path: Path) -> dict[str, Any]:
    head = pandas.read_csv(path, dtype=str, nrows=1)
    if not isinstance(head.index, pandas.RangeIndex):  # pandas would take the first column for row names
        raise ValueError(f"its first row has more cells than its header ({', '.join(head.columns)})")
    return {"features": Features({name: Value("string") for name in head.columns}), "keep_default_na": False}


def _one_split(loaded: DatasetDict, split: str | None, name: str) -> Dataset:
    if split is None and len(loaded) == 1:
        return next(iter(loaded.values()))
    if split not in loaded:
        given = "no split is named" if split is None else f"there is no split {split!r}"
        raise ValueError(f"{name}: {given}; write '{name}:SPLIT' with one of {', '.join(loaded)}")
    return loaded[split]


@dataclass(frozen=True)
class Table:
    """A table while its columns are taken out, each by a method that checks it and names what it refuses."""

    name: str
    """What messages call it."""
    rows: Dataset
    """All of it; not in memory."""
    columns: Mapping[str, str]
    """Role -> column, for the roles whose column is not called like the role."""

    def __post_init__(self) -> None:
        if len(self.rows) == 0:
            raise ValueError(f"{self.name}: the table is empty; expected at least one row")

    def has(self, role: str) -> bool:
        """Whether the table has a column for the role; a column that the user named must be there."""
        return role in self.columns or role in self.rows.column_names

    def column(self, role: str) -> str:
        """The column that plays the role."""
        return self.named(self.columns.get(role, role))

    def named(self, column: str) -> str:
        """The column itself, once it is known to be there."""
        if column not in self.rows.column_names:
            raise ValueError(f"{self.name}: no column {column!r}; the columns are {', '.join(self.rows.column_names)}")
        return column

    def refuse(self, bad: pandas.Series, column: str, values: pandas.Series, expected: str) -> None:
        """Raises on the first bad row, counted from 1 after any header."""
        if bad.any():
            row = int(bad.to_numpy().argmax())
            raise ValueError(
                f"{self.name}: column {column!r}, row {row + 1}: expected {expected}, got {values.tolist()[row]!r} "
                f"({int(bad.sum())} of {len(bad)} rows are refused)"
            )

    def text(self, column: str) -> pandas.Series:
        """A column as text.

        Whole numbers lose a decimal point (a column with gaps often comes as 7.0), lists are joined by commas, times
        are written in ISO form, and what is missing is the empty text.
        """
        feature = self.rows.features[self.named(column)]
        values = self._arrow(column)
        if _is_exact(values.type):
            return pandas.Series(values.cast(pyarrow.large_string()).fill_null("").to_pandas(), dtype="str")
        if type(feature).__name__ == "Json":  # `datasets` could not find one type, and has dropped quotation marks
            raise ValueError(f"{self.name}: column {column!r} mixes types; write all its values as text or null")
        try:
            return pandas.Series([_plain(value) for value in values.to_pylist()], dtype="str")
        except TypeError as error:
            raise ValueError(f"{self.name}: column {column!r} cannot be read as text: {error}") from error

    def ids(self, role: str) -> pandas.Series:
        """An id column as text, unchanged."""
        column = self.column(role)
        ids = self.text(column)
        self.refuse(ids.str.strip() == "", column, ids, "an id")
        if pyarrow.types.is_floating(self.rows.features.arrow_schema.field(column).type):
            inexact = ~ids.str.fullmatch(r"-?\d+")
            self.refuse(inexact, column, ids, "a whole number below 2**53 (store other ids as text)")
        return ids

    def unique_ids(self, role: str) -> pandas.Index:
        """An id column without repetition."""
        ids = self.ids(role)
        self.refuse(ids.duplicated(), self.column(role), ids, "an id that no earlier row has")
        return pandas.Index(ids, name=role)

    def numbers(self, role: str) -> pandas.Series:
        """A numeric column as finite floats."""
        column = self.column(role)
        values = self._arrow(column)
        if _is_number(values.type):
            given = numbers = values.cast(pyarrow.float64(), safe=False).to_pandas()
        else:
            given = self.text(column)
            numbers = pandas.to_numeric(given, errors="coerce").astype(float)
        self.refuse(~_finite(numbers), column, given, "a finite number")
        return numbers

    def seconds(self, role: str) -> pandas.Series:
        """A time column as seconds since 1970.

        Numbers are seconds as long as the column's largest is at most 1e11; a column that goes beyond it is in
        milliseconds, beyond 1e14 in microseconds, beyond 1e17 in nanoseconds. All else must be an ISO 8601 date or
        time, in UTC unless it says otherwise. Which of the two a column is, most of its rows decide.
        """
        column = self.column(role)
        values = self._arrow(column)
        if pyarrow.types.is_timestamp(values.type) or pyarrow.types.is_date(values.type):
            given = values.cast(pyarrow.timestamp("us"), safe=False).to_pandas()
            seconds = _since_1970(given)
        elif _is_number(values.type):
            given = values.cast(pyarrow.float64(), safe=False).to_pandas()
            seconds = _to_seconds(given)
        else:
            given = self.text(column)
            numbers = pandas.to_numeric(given, errors="coerce").astype(float)
            if numbers.isna().mean() > 0.5:
                seconds = _since_1970(pandas.to_datetime(given, format="ISO8601", utc=True, errors="coerce"))
            else:
                seconds = _to_seconds(numbers)
        self.refuse(~_finite(seconds), column, given, "a time (seconds or ISO 8601, one of them in all rows)")
        return seconds

    def _arrow(self, column: str) -> pyarrow.ChunkedArray:
        return self.rows.with_format("arrow").select_columns([column])[:].column(0)


def _is_exact(kind: pyarrow.DataType) -> bool:
    """Whether Arrow's own text of a value of this type is ours too."""
    types = pyarrow.types
    return any(test(kind) for test in (types.is_string, types.is_large_string, types.is_integer, types.is_boolean))


def _is_number(kind: pyarrow.DataType) -> bool:
    types = pyarrow.types
    return any(test(kind) for test in (types.is_integer, types.is_floating, types.is_decimal, types.is_boolean))


def _plain(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < _EXACT_FLOAT else str(value)
    if isinstance(value, list):
        return ", ".join(filter(None, map(_plain, value)))
    if isinstance(value, dict | bytes):
        raise TypeError(f"a value is of type {type(value).__name__}")
    return str(value).removesuffix(" 00:00:00")  # JSON readers turn a mere date into midnight


def _finite(numbers: pandas.Series) -> pandas.Series:
    return numbers.abs() < math.inf  # NaN is not


def _since_1970(times: pandas.Series) -> pandas.Series:
    return (times - pandas.Timestamp("1970-01-01", tz=times.dt.tz)) / pandas.Timedelta(seconds=1)


def _to_seconds(numbers: pandas.Series) -> pandas.Series:
    while _LARGEST_SECONDS < numbers.abs().max() < math.inf:
        numbers = numbers / 1000
    return numbers


__all__ = ["FORMATS", "Table", "load_table"]
