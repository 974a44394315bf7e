"""Recommendations of a trained model, from the command line: for a request, a file of them, or a user of the log."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas
from transformers import AutoModel, AutoProcessor

from ..catalogue_m6rec import Catalogue
from ..pipeline_m6rec import FOLDER, RecommendationPipeline
from .data import read_log
from .examples import RequestWriter
from .recipe import load_recipe
from .splits import histories, order

logger = logging.getLogger(__name__)


def load_pipeline(model: str) -> RecommendationPipeline:
    """Load a trained model as a pipeline, with its catalogue if it has one."""
    return RecommendationPipeline(
        model=AutoModel.from_pretrained(model).eval(), processor=AutoProcessor.from_pretrained(model)
    )


def build_catalogue(directory: Path, recommend: RecommendationPipeline, items: list[dict[str, Any]]) -> Catalogue:
    """Embed a log's items with the model in `directory` and save them beside it."""
    catalogue = Catalogue.from_dataset(items, recommend.model, recommend.processor)
    catalogue.save(directory / FOLDER)
    recommend.catalogue = catalogue
    return catalogue


def read_requests(path: str | Path) -> Iterator[Any]:
    """Read requests one by one: a JSON value a line (.jsonl), or a row of a Parquet table."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}: give requests as .jsonl or .parquet")
    if path.suffix == ".parquet":
        for row in pandas.read_parquet(path).to_dict("records"):
            yield {name: value for name, value in row.items() if value is not None}
        return
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield parse_request(line, f"{path.name}, line {number}")


def parse_request(text: str, place: str = "the request") -> Any:
    """Read a request given as JSON, or as the bare text of who the user is."""
    if not text.lstrip().startswith(("{", '"')):
        return text.strip()
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is no valid JSON: {error}") from error


def user_request(model: str, user_id: str, overrides: list[str]) -> dict[str, Any]:
    """Write the request of a user of the log that a model was trained on: everything the user ever did."""
    recipe = load_recipe(model, overrides)
    log = read_log(recipe.data)
    ordered = order(log.interactions, recipe.data.seed)
    places = histories(ordered).get(user_id)
    if places is None:
        raise ValueError(f"user {user_id!r} is not in the log; the first users are {ordered['user_id'].unique()[:5]}")
    writer = RequestWriter(log)
    return writer.request(user_id, writer.events(ordered.iloc[places]))


def write_answers(
    recommend: RecommendationPipeline, requests: Iterator[Any], output: Path, batch_size: int, **options: Any
) -> int:
    """Answer requests into a .jsonl file, in their order; nothing is left behind if it fails half way."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial")
    count = 0
    try:
        with partial.open("w", encoding="utf-8") as lines:
            for answer in recommend(requests, batch_size=batch_size, **options):
                lines.write(json.dumps(answer, ensure_ascii=False) + "\n")
                count += 1
        partial.replace(output)
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
