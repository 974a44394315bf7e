"""`m6rec fit --items`: makes a recommender of a table of items alone, before there is a log.

It ranks by words, by a static text reader and, from the first observed event on, by transitions.

m6rec fit --items items.csv runs/shop
"""

import dataclasses
import json
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...catalogue_m6rec import TEXTS_ONLY, Catalogue, refuse_journal
from ...pipeline_m6rec import FOLDER
from ..answering.evidence import FIT_FILE
from ..config.recipe import Recipe, load_recipe, write_json
from ..data.columns import find_item_columns, write_items
from ..data.log import items_log
from ..data.tables import load_table
from ..evaluation.evidence import EvidenceSettings
from ..runs.build import prepare, save
from ..runs.facts import keep_facts
from .fit import TABLES


def recipe_of_items(items: str, output: str, overrides: Sequence[str]) -> Recipe:
    """Make the recipe of a fit without events.

    Args:
        items: The table of items.
        output: The folder that is written.
        overrides: Entries such as `data.item_columns=[title]`.
    """
    named: dict[str, str | bool | None] = {"data.items": items, "data.interactions": None}
    named |= {"training.output_dir": output, "model.item_embeddings": False}
    return load_recipe("own-data", [*(f"{name}={json.dumps(value)}" for name, value in named.items()), *overrides])


def fit_items(recipe: Recipe, say: Callable[[str], object], reader: str | Path | None = None) -> Catalogue:
    """Make a recommender of the items that a recipe names, and write it into the recipe's folder.

    The folder holds an untrained model, as every folder of a fit without training does, and a catalogue that does not
    use it.

    Args:
        recipe: Names the table of items and the folder; its columns override inferred ones.
        say: Receives lines of progress.
        reader: File of the text reader; None = the package's.

    Returns:
        The catalogue in the folder.

    Raises:
        ValueError: The table cannot be used; the message gives the cause and the setting that helps.
    """
    started = time.monotonic()
    folder = recipe.output_dir
    refuse_journal((folder / FOLDER).resolve())  # before the model there is replaced
    recipe, columns = _read_columns(recipe, say)
    log = items_log(recipe.data)
    run = prepare(recipe, log=log)
    save(run)
    keep_facts(run, {}, 0, "m6rec fit --items")
    settings = EvidenceSettings(words=TEXTS_ONLY.words, texts=TEXTS_ONLY.texts)
    rule = settings.catalogue_rule
    catalogue = Catalogue.from_dataset(run.writer.items, evidence=rule, reader=reader, progress=False)
    catalogue.save(folder / FOLDER)
    seconds = time.monotonic() - started
    decisions = {
        "kept": "evidence",
        "evidence": {"settings": dataclasses.asdict(settings)},
        "columns": columns,
        "log": {"users": 0, "items": len(log.items), "events": 0, "dropped": log.dropped},
        "seconds": {"first recommender": round(seconds, 1)},
        "sentence": "Kept: evidence; there are no events yet. Those that the catalogue observes count at once; with a "
        "log of some hundred users m6rec fit EVENTS ITEMS OUT chooses weights and trains.",
    }
    write_json(folder / FIT_FILE, decisions)
    request = json.dumps({"history": [{"event": "search", "query": "..."}]})
    command = shlex.join(["m6rec", "recommend", str(folder), "--request", request])
    say(f"{len(log.items):,} items, {seconds:.1f} s; recommendations: {command}")
    return catalogue


def _read_columns(recipe: Recipe, say: Callable[[str], object]) -> tuple[Recipe, dict[str, Any]]:
    """Find the columns of the items, and write the items as they are read."""
    assert recipe.data.items is not None
    items = load_table(recipe.data.items)
    found = find_item_columns(items, recipe.data.columns)
    if recipe.data.item_columns is not None:
        found = dataclasses.replace(found, item_columns=recipe.data.item_columns, left_out={})
    path = recipe.output_dir / TABLES / "items.parquet"
    nameless = write_items(items, found, path)
    texts = ", ".join(found.item_columns) or "no column: the ids stand for the items"
    left = ", ".join(f"{column} ({reason})" for column, reason in found.left_out.items())
    say(f"items: id {found.item_id}; read as text: {texts}" + (f"; not read: {left}" if left else ""))
    data = dataclasses.replace(
        recipe.data, columns=found.columns, items=str(path), item_columns=None, drop_invalid=True
    )
    told = {"items": found.item_columns, "items not read": found.left_out, "items without text": nameless}
    return dataclasses.replace(recipe, data=data), told


__all__ = ["fit_items", "recipe_of_items"]
