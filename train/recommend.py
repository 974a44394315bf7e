"""Recommendations of a trained model, from the command line: for a request, a file of them, or a user of the log."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from transformers import AutoProcessor

from ..catalogue_m6rec import Catalogue
from ..pipeline_m6rec import FOLDER, RecommendationPipeline
from ..tuning import load_model
from .data import read_log
from .examples import RequestWriter
from .recipe import load_recipe
from .splits import histories, order


def load_pipeline(model: str) -> RecommendationPipeline:
    """Load a trained model as a pipeline, with its catalogue if it has one."""
    try:
        processor, network = AutoProcessor.from_pretrained(model), load_model(model)
    except OSError as error:
        raise OSError(f"{model!r} is no folder of a model here, and the Hub does not give it: {error}") from error
    return RecommendationPipeline(model=network.eval(), processor=processor)


def build_catalogue(directory: str | Path, items: list[dict[str, Any]]) -> RecommendationPipeline:
    """Embed items with the model in a folder, save them there as its catalogue, and load it all as a pipeline."""
    recommend = load_pipeline(str(directory))
    recommend.catalogue = Catalogue.from_dataset(items, recommend.model, recommend.processor)
    recommend.catalogue.save(Path(directory) / FOLDER)
    return recommend


def read_requests(path: str | Path) -> Iterator[Any]:
    """Read requests one by one: a JSON value a line (.jsonl), or a row of a table (.parquet)."""
    path = Path(path)
    if path.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"{path} is neither .jsonl nor .parquet: give requests as JSON, one a line, or as a table")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    return _parquet_rows(path) if path.suffix == ".parquet" else _json_lines(path)


def _json_lines(path: Path) -> Iterator[Any]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _from_json(line, f"{path}, line {number}")


def _parquet_rows(path: Path) -> Iterator[Any]:
    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is no valid Parquet: {error}") from error
    columns = [name for name in table.schema_arrow.names if not name.startswith("__index_level_")]  # pandas' own
    with table:
        for batch in table.iter_batches(columns=columns):
            yield from map(_given, batch.to_pylist())


def _given(value: Any) -> Any:
    """Leave out, at any depth, the keys that hold null: a table has no other way to say that a row lacks a field."""
    if isinstance(value, dict):
        return {name: _given(entry) for name, entry in value.items() if entry is not None}
    return [_given(entry) for entry in value] if isinstance(value, list) else value


def parse_request(text: str) -> Any:
    """Read a request given as JSON, or as the bare text of who the user is."""
    return _from_json(text, "the request") if text.lstrip().startswith(("{", '"')) else text.strip()


def _from_json(text: str | bytes, place: str) -> Any:
    try:
        request = json.loads(text)
    except ValueError as error:  # no JSON, or no UTF-8
        raise ValueError(f"{place} is no valid JSON: {error}") from error
    if not isinstance(request, str | dict):
        raise ValueError(f"{place} is {request!r}: expected a request, an object or a text")
    return request


def user_request(model: str, user_id: str, overrides: list[str]) -> dict[str, Any]:
    """Write the request of a user of the log that a model was trained on: everything the user ever did."""
    recipe = load_recipe(model, overrides)
    log = read_log(recipe.data)
    ordered = order(log.interactions, recipe.data.seed)
    places = histories(ordered).get(user_id)
    if places is None:
        known = ", ".join(map(repr, ordered["user_id"].unique()[:5]))
        raise ValueError(f"user {user_id!r} is not in the log, which begins with the users {known}")
    writer = RequestWriter(log)
    return writer.request(user_id, writer.events(ordered.iloc[places]))


def write_answers(
    recommend: RecommendationPipeline, requests: Iterator[Any], output: Path, batch_size: int, **options: Any
) -> int:
    """Answer requests into a .jsonl file, in their order; if one fails, the file stays as it was, or absent.

    Returns:
        How many requests there were.

    Raises:
        ValueError: A request cannot be used; the message says among which it is.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial")
    count = 0
    try:
        with partial.open("w", encoding="utf-8") as lines:
            for answer in recommend(requests, batch_size=batch_size, **options):
                lines.write(json.dumps(answer, ensure_ascii=False) + "\n")
                count += 1
        partial.replace(output)
    except (TypeError, ValueError) as error:
        raise ValueError(f"among requests {count + 1} to {count + batch_size}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return count


__all__ = [
    "build_catalogue",
    "load_pipeline",
    "parse_request",
    "read_requests",
    "user_request",
    "write_answers",
]
