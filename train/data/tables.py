"""Tables of any kind (CSV, Parquet, JSONL, a folder saved by `datasets`, a Hub dataset) and their columns, checked.

`datasets` reads tables into Arrow files, in chunks; rows stay on disk until a column is read.
"""

import glob
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pandas
import pyarrow
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from ...values_m6rec import EARLIEST, EXACT_FLOAT, LATEST, normalize_id
from .table_files import FORMATS, PACKED, UNPACKING_ERRORS, check_file, csv_options, find_files, kind_of, unpacked
from .times import TIME_SCALES, in_form, read_times, time_hint

logger = logging.getLogger(__name__)
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_NAMELESS = re.compile(r"\s*|Unnamed: [0-9]+(\.[0-9]+)?|__index_level_[0-9]+__")
"""Names that pandas gives to an index, or to a column without a name in a CSV file."""
_ID = "an id: a text, or a whole number"
_ROWS_AT_ONCE = 250_000
"""Rows whose texts are parsed together: as Python strings they take about 60 bytes each."""


def find_folder(name: str, contents: str) -> Path:
    """The folder of a data set below the folder in the environment variable M6REC_DATA.

    Args:
        name: Its name there.
        contents: The files that it must hold, for the error message.
    """
    root = os.environ.get("M6REC_DATA")
    if root and (Path(root) / name).is_dir():
        return Path(root) / name
    where = f"no folder {name!r} in M6REC_DATA ({root})" if root else "M6REC_DATA is not set"
    raise FileNotFoundError(
        f"the data set {name} is not here: {where}. Get {contents}, and name its folder as data.directory, or put it "
        f"as {name!r} into the folder that M6REC_DATA names"
    )


def require_files(directory: Path, names: Iterable[str], what: str) -> None:
    """Raises if a data set's folder lacks one of the files."""
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{directory}: no {', '.join(missing)}; expected the folder of {what}")


def load_table(location: str) -> Dataset:
    """Reads one table.

    Args:
        location: A CSV, Parquet or JSONL file (text files also compressed: .csv.gz); a pattern such as
            `part-*.parquet`, or a folder, of such files with the same columns; else `name`, `name:split` or
            `name:config:split`, where the name is a folder saved by `datasets` or a Hub dataset id. The split may be
            omitted if there is only one. `~` is the user's home.

    Returns:
        The rows. All columns of a CSV file are text (so "007" and "NA" are kept), and empty cells are empty texts; its
        separator is the most frequent one in its first line, of comma, semicolon and tab. A nested field is a separate
        column, named `outer.inner`.
    """
    return _load(os.path.expanduser(location)).flatten()


def _load(location: str) -> Dataset:
    files = find_files(location)
    if files is not None:
        return _load_files(files, location)
    parts = location.split(":")
    for count in range(len(parts), 0, -1):  # a folder's name may contain colons
        folder = ":".join(parts[:count])
        if Path(folder).is_dir():
            return _one_split(_load_saved(folder), parts[count:], folder)
    name, *parts = parts
    if not _HUB_ID.fullmatch(name) or Path(name).suffix.lower() in (*FORMATS, *PACKED):
        raise FileNotFoundError(
            f"no table at {location!r}: expected a file ({', '.join(FORMATS)}), a folder or pattern of such files, a "
            "folder saved by `datasets`, or a Hub dataset id such as 'org/name:train'"
        )
    try:
        loaded = load_dataset(name, *parts[:-1])
    except (ConnectionError, DatasetNotFoundError) as error:
        raise FileNotFoundError(f"{name!r} is no file or folder here, and the Hub does not give it: {error}") from error
    return _one_split(loaded, parts, name)


def _load_saved(folder: str) -> Dataset | DatasetDict:
    try:
        return load_from_disk(folder)
    except FileNotFoundError:
        raise
    except (ValueError, OSError, KeyError, TypeError, pyarrow.ArrowException) as error:
        raise ValueError(f"{folder} cannot be read as a folder saved by `datasets`: {error!r}") from error


def _load_files(paths: list[Path], location: str) -> Dataset:
    kind, plain = kind_of(paths[0]), [_checked(path) for path in paths]
    options = [csv_options(path) for path in plain] if kind == "csv" else [{}]
    heads = [(each.get("sep"), list(each.get("features", ()))) for each in options]
    other = next((place for place, head in enumerate(heads) if head != heads[0]), None)
    if other is not None:
        raise ValueError(f"{paths[other]} has another header or separator than {paths[0]}: expected parts of one table")
    # `datasets` reads * ? [ in a path as patterns.
    files = [glob.escape(str(path)) for path in plain]
    with _named(location, kind):
        return load_dataset(kind, data_files=files, split="train", **options[0])


def _checked(path: Path) -> Path:
    """Checks that a file of a table holds rows, and returns it decompressed."""
    kind = kind_of(path)
    with _named(path, kind):
        plain = unpacked(path)
        check_file(plain, kind)
        if kind == "csv":
            csv_options(plain)
        return plain


@contextmanager
def _named(place: str | Path, kind: str) -> Iterator[None]:
    """Adds the file's name to errors that a reader raises about its contents."""
    try:
        yield
    except (DatasetGenerationError, ValueError, OSError, pyarrow.ArrowException, *UNPACKING_ERRORS) as error:
        raise ValueError(f"{place} cannot be read as {kind} in UTF-8: {error.__cause__ or error}") from error


def _one_split(loaded: Dataset | DatasetDict, parts: list[str], name: str) -> Dataset:
    if isinstance(loaded, Dataset):
        return loaded
    split = parts[-1] if parts else None
    if split is None and len(loaded) == 1:
        return next(iter(loaded.values()))
    if split not in loaded:
        given = "no split is named" if split is None else f"there is no split {split!r}"
        raise ValueError(f"{name}: {given}; write '{name}:SPLIT' with one of {', '.join(loaded)}")
    return loaded[split]


@dataclass
class Table:
    """Reads the columns of a table; each method checks its column and reports the cells that it refuses."""

    name: str
    """Its name in messages."""
    rows: Dataset
    """All rows; not in memory."""
    columns: Mapping[str, str | None]
    """Role -> column, for roles whose column has another name; None: no column has that role."""
    drop: bool = False
    """Whether refused rows are left out and counted, instead of raising an error."""
    dropped: dict[str, int] = field(default_factory=dict, init=False)
    """Reason -> number of rows left out for it; a row is counted once, under the first reason."""

    def __post_init__(self) -> None:
        if len(self.rows) == 0:
            raise ValueError(f"{self.name}: the table is empty; expected at least one row")
        self._bad = numpy.zeros(len(self.rows), dtype=bool)

    def has(self, role: str) -> bool:
        """Whether the table has a column for the role; a column that the user named must be there."""
        return self.columns.get(role, role if role in self.rows.column_names else None) is not None

    def column(self, role: str) -> str:
        """The name of the role's column."""
        return self.named(self.columns.get(role) or role)

    def named(self, column: str) -> str:
        """The column's name; raises if the table lacks it."""
        if column not in self.rows.column_names:
            raise ValueError(f"{self.name}: no column {column!r}; the columns are {', '.join(self.rows.column_names)}")
        return column

    def described(self) -> list[str]:
        """All columns but those that hold pandas' row numbers, which are left out with a warning."""
        kept = [name for name in self.rows.column_names if not self._numbers_rows(name)]
        left = [name for name in self.rows.column_names if name not in kept]
        if left:
            named = ", ".join(map(repr, left))
            logger.warning("%s: column %s numbers the rows and is not read as text", self.name, named)
        return kept

    def _numbers_rows(self, column: str) -> bool:
        """Whether a column is an index that pandas wrote: one without a name of its own, or counting from 0 or 1."""
        if _NAMELESS.fullmatch(column):
            return True
        if column not in ("index", "level_0"):
            return False
        numbers = self._floats(column).to_numpy()
        return bool((numbers - numbers[0] == numpy.arange(len(numbers))).all() and numbers[0] in (0, 1))

    def refuse(self, bad: Any, column: str, expected: str, hint: Callable[[int], str] | None = None) -> None:
        """Raises for the first bad row, counted from 1 after any header; or records the bad rows as dropped.

        Args:
            bad: Mask of the bad rows.
            column: Column of the refused cells.
            expected: Description of valid cells, for the message.
            hint: Returns advice for the message, given the first bad row's position.
        """
        bad = numpy.asarray(bad, dtype=bool)
        if not bad.any():
            return
        if self.drop:
            if more := int((bad & ~self._bad).sum()):
                self.dropped[f"{self.name}: column {column!r}: not {expected}"] = more
            self._bad |= bad
            return
        row = int(bad.argmax())
        raise ValueError(
            f"{self.name}: column {column!r}, row {row + 1}: expected {expected}, got {self.rows[row][column]!r} "
            f"({int(bad.sum())} of {len(bad)} rows are refused; data.drop_invalid: true leaves them out)"
            f"{hint(row) if hint else ''}"
        )

    def kept(self, taken: pandas.DataFrame) -> pandas.DataFrame:
        """The given columns without the refused rows."""
        if self._bad.all():
            reasons = "; ".join(f"{count} {reason}" for reason, count in self.dropped.items())
            raise ValueError(f"{self.name}: no row is left, all were dropped: {reasons}")
        return taken[~self._bad] if self._bad.any() else taken

    def text(self, column: str) -> pandas.Series:
        """A column as text.

        Whole numbers lose a decimal point (a column with gaps often comes as 7.0), lists are joined by commas, times
        are written in ISO form, and a missing cell is the empty text.
        """
        return pandas.concat([self._text(column, piece) for piece in self._pieces(column)], ignore_index=True)

    def words(self, column: str, strip: bool = False) -> pandas.Series:
        """A column of few distinct texts, as categories in alphabetical order; else like `text`.

        In memory each row is a number of at most four bytes, and each distinct text is stored once.
        """
        self.named(column)
        values = self._arrow(column)
        if pyarrow.types.is_nested(values.type):
            values = pyarrow.chunked_array([pyarrow.array(self.text(column), pyarrow.large_string())])
        encoded = values.dictionary_encode("encode").combine_chunks()
        texts = self._text(column, pyarrow.chunked_array([encoded.dictionary]))
        texts = texts.str.strip() if strip else texts
        categories = pandas.Index(sorted(set(texts)), dtype="str")
        place = categories.get_indexer(pandas.Index(texts)).astype(numpy.int32)
        codes = place[encoded.indices.to_numpy(zero_copy_only=False)]
        return pandas.Series(pandas.Categorical.from_codes(codes, categories))

    def _text(self, column: str, values: pyarrow.ChunkedArray) -> pandas.Series:
        if _is_exact(values.type):
            return pandas.Series(values.cast(pyarrow.large_string()).fill_null("").to_pandas(), dtype="str")
        try:
            return pandas.Series([_plain(value) for value in values.to_pylist()], dtype="str")
        except TypeError as error:
            raise ValueError(f"{self.name}: column {column!r} cannot be read as text: {error}") from error

    def ids(self, role: str) -> pandas.Series:
        """An id column by the rule for ids (`normalize_id`), as categories; invalid ids are refused."""
        column = self.column(role)
        values = self._arrow(column)
        if pyarrow.types.is_nested(values.type):
            values = pyarrow.chunked_array([pyarrow.array(self.text(column), pyarrow.large_string())])
            self.refuse(numpy.ones(len(values), dtype=bool), column, f"{_ID}, no list")
        encoded = values.dictionary_encode("encode").combine_chunks()
        cells = encoded.dictionary.to_pylist()
        names = [_id_or_none(cell) for cell in cells]
        categories = pandas.Index(sorted({name for name in names if name is not None}), dtype="str")
        order = {name: place for place, name in enumerate(categories)}
        places = numpy.array([-1 if name is None else order[name] for name in names], dtype=numpy.int32)
        rows = encoded.indices.to_numpy(zero_copy_only=False)
        missing = numpy.array([_is_missing(cell) for cell in cells])[rows]
        self.refuse(missing, column, "an id")
        floats = pyarrow.types.is_floating(values.type)
        whole = "a whole number below 2**53 (store other ids as text)"
        self.refuse((places[rows] < 0) & ~missing, column, whole if floats else _ID)
        return pandas.Series(pandas.Categorical.from_codes(places[rows], categories))

    def unique_ids(self, role: str) -> pandas.Index:
        """An id column with unique ids; if bad rows are dropped, all rows but the first of an id are bad."""
        ids = self.ids(role)
        repeated = ids.duplicated() & ids.notna()
        self.refuse(repeated, self.column(role), "an id that no earlier row has", lambda row: self._earlier(ids, row))
        return pandas.Index(ids.astype("str"), name=role)

    def _earlier(self, ids: pandas.Series, row: int) -> str:
        first = int((ids == ids[row]).to_numpy().argmax())
        return f": {ids[row]!r} stands in row {first + 1}; white space around an id is no part of it"

    def numbers(self, role: str) -> pandas.Series:
        """A numeric column as finite floats; NaN for empty cells, but not for all."""
        column = self.column(role)
        numbers, missing = self._floats(column), self._missing(column)
        self.refuse(~(_finite(numbers) | missing), column, "a finite number or nothing")
        if missing.all():
            raise ValueError(f"{self.name}: column {column!r} is empty in all {len(numbers)} rows: leave it out")
        return numbers

    def seconds(self, role: str, form: str | None = None) -> pandas.Series:
        """A time column as seconds since 1970.

        Args:
            role: Role of the column.
            form: Format of the times, see `DataArguments.time_format`. None: by the rule for times (`time_seconds`),
                where all rows must have the format of most rows.
        """
        column = self.column(role)
        if form is not None:
            named = self._times_of_form(column, form)
            self.refuse(~named.between(EARLIEST, LATEST, inclusive="left"), column, f"a time of the form {form!r}")
            return named
        found = [read_times(piece, partial(self._text, column)) for piece in self._pieces(column)]
        seconds, ways = (numpy.concatenate(each) for each in zip(*found))
        counts = numpy.bincount(ways[ways >= 0], minlength=1)
        usual = int(counts.argmax()) if counts.any() else -1
        self.refuse(
            (ways < 0) | (ways != usual),
            column,
            "a time (seconds or ISO 8601, one of them in all rows)",
            lambda row: f"; {time_hint(self.rows[row][column], usual)}",
        )
        return pandas.Series(seconds)

    def order(self, role: str) -> pandas.Series:
        """A column of numbers that give only the order of events."""
        column = self.column(role)
        numbers = self._floats(column)
        self.refuse(~_finite(numbers), column, "a number that says the order of a user's events")
        return numbers

    def _times_of_form(self, column: str, form: str) -> pandas.Series:
        if form in TIME_SCALES:
            start, seconds, count = TIME_SCALES[form]
            return (self._floats(column) - start) * seconds / count
        return self._parsed(column, lambda texts: in_form(texts, form))

    def _floats(self, column: str) -> pandas.Series:
        """A column as floats; NaN for a cell that is not a number."""
        values = self._arrow(column)
        if _is_number(values.type):
            return values.cast(pyarrow.float64(), safe=False).to_pandas()
        return self._parsed(column, lambda texts: pandas.to_numeric(texts, errors="coerce").astype(float))

    def _missing(self, column: str) -> pandas.Series:
        """Whether a cell is null or an empty text."""
        values = self._arrow(column)
        if _is_number(values.type):
            return values.is_null().to_pandas()
        return self._parsed(column, lambda texts: texts.str.strip() == "")

    def _parsed(self, column: str, parse: Callable[[pandas.Series], pandas.Series]) -> pandas.Series:
        found = [parse(self._text(column, piece)) for piece in self._pieces(column)]
        return pandas.concat(found, ignore_index=True)

    def _pieces(self, column: str) -> Iterator[pyarrow.ChunkedArray]:
        values = self._arrow(self.named(column))
        for start in range(0, len(values), _ROWS_AT_ONCE):
            yield values.slice(start, _ROWS_AT_ONCE)

    def _arrow(self, column: str) -> pyarrow.ChunkedArray:
        if type(self.rows.features[column]).__name__ == "Json":  # `datasets` found mixed types, and dropped quotes
            raise ValueError(f"{self.name}: column {column!r} mixes types; write all its values as text or null")
        return self.rows.with_format("arrow").select_columns([column])[:].column(0)


def _is_exact(kind: pyarrow.DataType) -> bool:
    """Whether Arrow's text of a value of this type equals ours."""
    types = pyarrow.types
    return any(test(kind) for test in (types.is_string, types.is_large_string, types.is_integer, types.is_boolean))


def _is_number(kind: pyarrow.DataType) -> bool:
    types = pyarrow.types
    return any(test(kind) for test in (types.is_integer, types.is_floating, types.is_decimal, types.is_boolean))


def _plain(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < EXACT_FLOAT else str(value)
    if isinstance(value, list):
        return ", ".join(filter(None, map(_plain, value)))
    if isinstance(value, dict | bytes):
        raise TypeError(f"a value is of type {type(value).__name__}")
    return str(value).removesuffix(" 00:00:00")  # JSON readers turn a date into midnight


def _id_or_none(value: Any) -> str | None:
    try:
        return normalize_id(value, "id")
    except ValueError:
        return None


def _is_missing(value: Any) -> bool:
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _finite(numbers: pandas.Series) -> pandas.Series:
    return numbers.abs() < math.inf  # false for NaN


__all__ = ["FORMATS", "Table", "csv_options", "find_folder", "load_table", "require_files"]
