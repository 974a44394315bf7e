"""Inputs of `m6rec recommend`: a trained model, a request, a file of requests, a user of the log."""

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
from transformers import AutoProcessor

from ...catalogue_m6rec import Catalogue
from ...pipeline_m6rec import FOLDER, RecommendationPipeline
from ...tuning import load_model
from ...values_m6rec import MAX_DEPTH, MAX_REQUEST_VALUES, check_size, normalize_id, short
from ..config.recipe import load_saved
from ..data.log import nearly, read_log
from ..data.splits import histories, order
from ..rows.examples import RequestWriter

ROWS_AT_ONCE = 1024
"""Number of rows of a table that are read together; bounds memory."""
DEEPEST = MAX_DEPTH + 4
"""Maximum nesting of lists and objects in a request: values in fields of items of events."""


def load_pipeline(model: str, **defaults: Any) -> RecommendationPipeline:
    """Load a trained model as a pipeline, with its catalogue if it has one.

    Args:
        model: The folder or the Hub id of a model.
        **defaults: Parameters of every call.
    """
    try:
        processor, network = AutoProcessor.from_pretrained(model), load_model(model)
    except OSError as error:
        raise OSError(f"{model!r} is no folder of a model here, and the Hub does not give it: {error}") from error
    return RecommendationPipeline(model=network.eval(), processor=processor, **defaults)


def load_recommender(model: str, overrides: Sequence[str] = ()) -> RecommendationPipeline:
    """Load a model as a pipeline; another `evaluation.exclude_seen` than the run's becomes its default.

    Args:
        model: The folder of a run or of a fit, or the Hub id of a model.
        overrides: What differs from the recipe in the folder.
    """
    if overrides:
        wanted, saved = (load_saved(model, given).evaluation.exclude_seen for given in (overrides, []))
        if wanted != saved:
            return load_pipeline(model, exclude_seen=wanted)
    return load_pipeline(model)


def build_catalogue(
    directory: str | Path, items: list[dict[str, Any]], exclude_seen: bool = True
) -> RecommendationPipeline:
    """Embed items with the model in a folder, save them there as its catalogue, and load the pipeline.

    Args:
        directory: The folder.
        items: Items with an `item_id` each.
        exclude_seen: Whether the pipeline leaves out the items of a history by default.
    """
    recommend = load_pipeline(str(directory))
    catalogue = Catalogue.from_dataset(items, recommend.model, recommend.processor)
    catalogue.set_exclude_seen(exclude_seen)
    catalogue.save(Path(directory) / FOLDER)
    recommend.catalogue = catalogue
    return recommend


class RequestReader:
    """Reads a file of requests sequentially: one JSON value per line (.jsonl), or rows of a table (.parquet).

    Args:
        path: The file.
        strict: Raise for an invalid line; else it becomes `Failed`.
    """

    def __init__(self, path: str | Path, strict: bool = True) -> None:
        self.path, self._strict = Path(path), strict
        if self.path.suffix not in (".jsonl", ".parquet"):
            raise ValueError(f"{path} is neither .jsonl nor .parquet: give requests as JSON, one a line, or as a table")
        if not self.path.is_file():
            raise FileNotFoundError(f"there is no file {str(path)!r}")
        self._rows, self._next = self._open(), 0
        self.places: list[str] = []
        """Positions of the requests that were read last: the file, and the line or the row."""

    def read(self, row: int, count: int) -> list[Any]:
        """Read `count` requests from a row on, or fewer at the end; to go back, the file is read again."""
        if row < self._next:
            self._rows, self._next = self._open(), 0
        deque(islice(self._rows, row - self._next), maxlen=0)  # skipped rows are not decoded
        found, self.places = [], []
        for place, decode in islice(self._rows, count):
            self.places.append(f"{self.path}, {place}")
            found.append(self._decoded(decode))
        self._next = row + len(found)
        return found

    def _open(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        return _parquet_rows(self.path) if self.path.suffix == ".parquet" else _json_lines(self.path)

    def _decoded(self, decode: Callable[[], Any]) -> Any:
        try:
            return decode()
        except ValueError as error:
            message = f"{self.places[-1]} {error}"
            if self._strict:
                raise ValueError(message) from error
            return Failed(message)


class Failed(NamedTuple):
    """Replaces a request that cannot be read, or the answer to an invalid request."""

    message: str


def _json_lines(path: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"line {number}", partial(_from_json, line)


def _parquet_rows(path: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    try:
        # Not buffered as a whole: a row group may be as large as the file.
        table = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
        columns = [name for name in table.schema_arrow.names if not name.startswith("__index_level_")]  # pandas' own
        first = 0
        with table:
            for batch in table.iter_batches(ROWS_AT_ONCE, columns=columns):
                for row in range(len(batch)):
                    yield f"row {first + row} (the first is row 0)", partial(_table_row, batch, row)
                first += len(batch)
    except (pyarrow.ArrowException, OSError) as error:  # a damaged page is an OSError
        raise ValueError(f"{path} is no valid Parquet: {error}") from error


def _table_row(batch: pyarrow.RecordBatch, row: int) -> Any:
    try:
        return _given(batch.slice(row, 1).to_pylist()[0])
    except ValueError as error:  # a time before the year 1, or invalid UTF-8
        raise ValueError(f"cannot be read: {error}") from error


def _given(value: Any) -> Any:
    """Remove, at any depth, keys with the value null: in a table, null means that the row lacks the field."""
    if isinstance(value, dict):
        return {name: _given(entry) for name, entry in value.items() if entry is not None}
    return [_given(entry) for entry in value] if isinstance(value, list) else value


def parse_request(text: str) -> Any:
    """Parse a request given as JSON, or as a plain text that describes the user."""
    if not text.lstrip().startswith(("{", '"')):
        return text.strip()
    try:
        return _from_json(text)
    except ValueError as error:
        raise ValueError(f"the request {error}") from error


def _from_json(text: str | bytes) -> Any:
    request = parse_json(text)
    if not isinstance(request, str | dict):
        raise ValueError(f"is {short(request)}: expected a request, an object or a text")
    return request


def parse_json(text: str | bytes) -> Any:
    """Parse JSON of limited size and depth.

    Raises:
        ValueError: It is invalid, or too large.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"holds lists and objects more than {DEEPEST} deep, which is the limit") from error
    except ValueError as error:  # invalid JSON or UTF-8
        raise ValueError(f"is no valid JSON: {error}") from error
    check_size(value, "holds too much", MAX_REQUEST_VALUES, DEEPEST)
    return value


def user_request(model: str, user_id: str, overrides: list[str]) -> dict[str, Any]:
    """Make the request of a user of the log that a model was trained on, with all events of the user."""
    recipe = load_saved(model, overrides)
    log = read_log(recipe.data)
    ordered = order(log.interactions, recipe.data.seed, recipe.evaluation.ties)
    known, users = normalize_id(user_id, "--user"), histories(ordered)
    if known not in users:
        first = ", ".join(map(repr, ordered["user_id"].unique()[:5]))
        raise ValueError(
            f"user {user_id!r} is not in the log, which begins with the users {first}{nearly(known, users)}"
        )
    writer = RequestWriter(log, recipe.text.times)
    return writer.request(known, writer.events(ordered.iloc[users[known]]))


__all__ = [
    "Failed",
    "RequestReader",
    "build_catalogue",
    "load_pipeline",
    "load_recommender",
    "parse_json",
    "parse_request",
    "user_request",
]
