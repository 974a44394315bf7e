"""The evidence that a fit has chosen: what its folder says of it, and the catalogue that answers by it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas

from ...catalogue_m6rec import Catalogue, Model, PlainTexts
from ..config.recipe import Recipe
from ..data.log import Log
from ..data.splits import has_times, order
from ..evaluation.evidence import EvidenceSettings

FIT_FILE = "fit.json"
"""File with the decisions of a fit and their reasons."""


class PlainWording(PlainTexts):
    """A processor whose item texts are only the fields, without the words of a template, as a fit measures them.

    Args:
        processor: Does everything else.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)


def count_log(
    recipe: Recipe, log: Log, items: list[dict[str, Any]], settings: EvidenceSettings, model: Model, processor: Any
) -> Catalogue:
    """Make a catalogue that ranks by evidence only, with all events of a log observed.

    Args:
        recipe: Says in which order events of one time stand, and whether seen items are recommended.
        log: Its events are counted, all of them.
        items: The catalogue's items.
        settings: How much each kind of evidence counts.
        model: The model in whose folder the catalogue will be; it is not read.
        processor: Its processor.
    """
    rule, events = settings.catalogue_rule, log_events(recipe, log)
    without = replace(rule, linear=0.0)
    catalogue = Catalogue.from_dataset(items, model, PlainWording(processor), evidence=without)
    catalogue.set_exclude_seen(recipe.evaluation.exclude_seen)
    catalogue.observe(events)
    if settings.linear:
        rows = pandas.Series({item_id: row for row, item_id in enumerate(catalogue.snapshot())})
        sequences = [own.to_numpy() for _, own in events["item_id"].map(rows).groupby(events["user_id"], sort=False)]
        catalogue.set_evidence(rule, item_weights=settings.item_weights(sequences, len(rows)))
    return catalogue


def log_events(recipe: Recipe, log: Log) -> pandas.DataFrame:
    """Return all events of a log in their order, as `Catalogue.observe` takes them."""
    ordered = order(log.interactions, recipe.data.seed, recipe.evaluation.ties)
    names = ["user_id", "item_id", *(["timestamp"] if has_times(ordered) else [])]
    return ordered[names].astype({"user_id": str, "item_id": str})


class KeptEvidence(NamedTuple):
    """The evidence that a fit has saved."""

    settings: EvidenceSettings
    share: float
    """Weight of the network's cosine; 0: there is no network."""


def kept_evidence(folder: str | Path) -> KeptEvidence | None:
    """Read the evidence of a fit's folder; None: no fit wrote it, or the fit kept a network without evidence."""
    path = Path(folder) / FIT_FILE
    if not path.is_file():
        return None
    decisions = json.loads(path.read_text(encoding="utf-8"))
    if decisions["kept"] == "network":
        return None
    share = decisions["share"] if decisions["kept"] == "network and evidence" else 0.0
    return KeptEvidence(EvidenceSettings.of(decisions["evidence"]["settings"]), share)


__all__ = ["FIT_FILE", "KeptEvidence", "PlainWording", "count_log", "kept_evidence", "log_events"]
