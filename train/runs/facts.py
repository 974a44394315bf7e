"""Facts for a model's card, from the folder of its run: `card.json` holds those that are in no other file."""

import dataclasses
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ...catalogue_m6rec import MANIFEST
from ...configuration_m6rec import ROLES, M6RecConfig
from ...model_cards import CardFacts, DataFacts, hardware
from ...modeling_m6rec import M6RecForRecommendation
from ...pipeline_m6rec import FOLDER
from ..config.locations import log_digest
from ..config.recipe import RECIPE_FILE, VERSIONED, Recipe, load_recipe, write_json
from ..evaluation.curves import PICTURE_FILE
from ..evaluation.latency import LATENCY_FILE, LATENCY_PICTURE
from .adapters import trainable_parameters
from .build import Run

CARD_FILE = "card.json"
"""Facts of a run for its card; fields such as licence, intended_use and limits may be filled in by hand."""
DATA_NAMES = {
    "ml-100k": "MovieLens-100K",
    "amazon-beauty": "Amazon Beauty, as P5 prepared it",
    "lastfm": "Last.fm, HetRec 2011",
    "tallrec": "MovieLens-100K, as TALLRec prepared it",
}
PICTURES = {"curves": PICTURE_FILE, "latency": LATENCY_PICTURE}


def keep_facts(run: Run, seconds: Mapping[str, float], trained: int, command: str, **given: Any) -> None:
    """Write the `card.json` of a run.

    Args:
        run: The trained run.
        seconds: Stage -> duration.
        trained: Number of trained weights.
        command: The command of `m6rec` that trained it.
        **given: More fields of `CardFacts`; `data` is merged into the known facts of the data.
    """
    recipe, log = run.recipe, run.log
    data = DataFacts(
        name=DATA_NAMES.get(recipe.data.source) or hub_id(recipe.data.interactions),
        hub_id=hub_id(recipe.data.interactions),
        users=int(log.interactions["user_id"].nunique()) or None,
        items=len(run.writer.items) or None,
        events=len(log.interactions) or None,
        digest=log_digest(log),
    )
    facts = {
        "licence": None,
        "intended_use": [],
        "limits": [],
        "example": _example(run.writer.items),
        "command": command,
        "base_model": _beginning(recipe.model.checkpoint or recipe.model.backbone),
        "parameters": trainable_parameters(run.model)[1],
        "trained_parameters": trained,
        "seconds": dict(seconds),
        "versions": {name: importlib.metadata.version(name) for name in ("m6rec", *VERSIONED)},
        "hardware": hardware(),
        **given,
        "data": dataclasses.asdict(data) | given.get("data", {}),
    }
    write_json(recipe.output_dir / CARD_FILE, facts)


def folder_facts(folder: Path, name: str, adapter: Mapping[str, Any] | None = None) -> CardFacts:
    """Collect the facts for a model's card: each from the one file of its folder that holds it.

    Args:
        folder: The folder of a run, or another folder with a model; facts without a file are unknown.
        name: The name by which users load the model.
        adapter: Contents of the model's `adapter_config.json`, if they differ from the file in the folder.

    Raises:
        ValueError: If `card.json` has unknown keys.
    """
    kept = _read(folder / CARD_FILE)
    known = {field.name for field in dataclasses.fields(CardFacts)} - {"name"}
    if unknown := sorted(set(kept) - known):
        raise ValueError(
            f"{folder / CARD_FILE} has unknown keys {', '.join(unknown)}; known are {', '.join(sorted(known))}"
        )
    config, adapter = _read(folder / "config.json"), adapter or _read(folder / "adapter_config.json")
    recipe = load_recipe(folder) if (folder / RECIPE_FILE).is_file() else None
    metrics = _read(folder / "metrics.json")
    perplexities = metrics.pop("perplexity", {})
    facts: dict[str, Any] = {
        **_of_recipe(recipe),
        "tasks": [task for task in config.get("trained_tasks") or [] if task != "plausibility"],
        "shape": {name: config[name] for name in ROLES["sizes"] if isinstance(config.get(name), int)},
        "catalogue_size": _read(folder / FOLDER / MANIFEST).get("count"),
        "pictures": {what: file for what, file in PICTURES.items() if (folder / file).is_file()},
        "latency": _read(folder / LATENCY_FILE),
        "results": metrics,
        "perplexities": perplexities,
        **kept,
        "data": DataFacts(**kept["data"]) if kept.get("data") else None,
    }
    if adapter:
        method = recipe.tuning.method if recipe else adapter["peft_type"].lower()
        facts |= {"method": method, "base_model": hub_id(adapter.get("base_model_name_or_path"))}
    return CardFacts(name=name, **facts)


def preset_facts(preset: str) -> CardFacts:
    """Return the facts of an untrained preset: its shape, and how to make it."""
    config = M6RecConfig.preset(preset)
    with torch.device("meta"):
        parameters = M6RecForRecommendation(config).num_parameters()
    shape = {name: getattr(config, name) for name in ROLES["sizes"]}
    return CardFacts(f"m6rec-{preset}", preset=preset, shape=shape, parameters=parameters, licence="apache-2.0")


def hub_id(name: str | None) -> str | None:
    """Return the Hub's id in the name of a model or of a table (`org/name:split`); None for a local path.

    >>> hub_id("org/films:train"), hub_id("/data/films"), hub_id(None)
    ('org/films', None, None)
    """
    given = (name or "").partition(":")[0]
    if given.count("/") != 1 or Path(given).exists() or Path(given).suffix in (".csv", ".parquet", ".jsonl"):
        return None
    try:
        validate_repo_id(given)
    except HFValidationError:
        return None
    return given


def _beginning(name: str | None) -> str | None:
    """Return the Hub id of a model's initial weights; for a local pretrained model it is read from its folder."""
    return hub_id(name) or (_read(Path(name) / CARD_FILE).get("base_model") if name else None)


def _of_recipe(recipe: Recipe | None) -> dict[str, Any]:
    if recipe is None:
        return {}
    language = recipe.text.language or "en"
    return {"recipe": dataclasses.asdict(recipe), "seed": recipe.seed, "languages": [language]}


def _example(items: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Make a request of the catalogue's first items, without user data."""
    texts = [{name: value for name, value in item.items() if name != "item_id"} for item in items[:4]]
    return {"history": [{"item": text} for text in texts[:2]], "candidates": texts[2:]} if len(texts) == 4 else None


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


__all__ = ["CARD_FILE", "folder_facts", "hub_id", "keep_facts", "preset_facts"]
