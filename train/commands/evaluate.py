"""`m6rec evaluate`: measures a trained model again, and keeps its earlier results.

m6rec evaluate runs/own evaluation.exclude_seen=false
m6rec evaluate beauty --untrained evaluation.protocol=time
"""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas

from ..answering.evidence import kept_evidence
from ..config.locations import log_digest
from ..config.recipe import Recipe, load_recipe, load_saved, write_json
from ..data.log import Log, read_log
from ..evaluation.tables import tables, why_unwritable
from ..evaluation.untrained import untrained_rows
from ..evaluation.verdicts import OWN
from ..rows.examples import RequestWriter
from ..runs.build import make_split, prepare
from ..runs.facts import CARD_FILE
from ..runs.finetune import full_report
from ..runs.run import Run, item_texts
from .fit import METRICS_FILE, Report, kept_report

logger = logging.getLogger(__name__)
OTHERWISE_FILE = "evaluation.json"
"""File with results under other settings than the run's, or on other data."""


def evaluate(folder: str | Path, overrides: Sequence[str] = (), say: Callable[[str], object] | None = None) -> Report:
    """Measure a trained model again, and save the report in its folder if possible.

    Args:
        folder: The folder of a run.
        overrides: Entries such as `evaluation.exclude_seen=false` that differ from its recipe.
        say: Prints the tables; None: nothing is printed.

    Returns:
        Task -> name (the model, each baseline) -> metric -> value.
    """
    log, report = _measured(folder, overrides)
    if say is not None:
        say(tables(report))
    other = _other_data(Path(folder), log) if not overrides else None
    if other:
        logger.warning("%s: %s is kept as it is, and this report is saved as %s", other, METRICS_FILE, OTHERWISE_FILE)
    measured: dict[str, Any] = {"overrides": list(overrides), **report} if overrides or other else report
    path = Path(folder) / (OTHERWISE_FILE if overrides or other else METRICS_FILE)
    try:
        write_json(path, measured)
    except OSError as error:  # the metrics are printed in any case
        logger.warning("the report is not saved as %s: %s. %s", path, error, why_unwritable(error, path.parent))
    return report


def _measured(folder: str | Path, overrides: Sequence[str]) -> tuple[Log, Report]:
    """Measure the contents of a folder: a trained model, or the evidence that a fit has saved."""
    if kept_evidence(folder):
        return kept_report(folder, overrides)
    saved = [f"model.checkpoint={json.dumps(str(folder))}", "model.backbone=null"]
    run = prepare(load_saved(folder, [*overrides, *saved]))
    report = full_report(run)
    if overrides and "retrieval" in report:
        _warn_of_learnt(report["retrieval"][OWN], load_recipe(folder), run)
    return run.log, report


def evaluate_untrained(
    recipe: str | Path, overrides: Sequence[str] = (), say: Callable[[str], object] | None = None, output: str = ""
) -> Report:
    """Measure the untrained rows of retrieval on the log of a recipe, without a model.

    Args:
        recipe: A recipe, or the folder of a run.
        overrides: Entries such as `evaluation.protocol=time` that differ from the recipe.
        say: Prints the table; None: nothing is printed.
        output: A JSON file for the report; empty: none.

    Returns:
        `retrieval` -> name -> metric -> value.
    """
    loaded = load_recipe(recipe, [*overrides, "training.output_dir=."])  # not used, but required
    log = read_log(loaded.data)
    split = make_split(loaded, log)
    rows = untrained_rows(RequestWriter(log), item_texts(log), split, "test", loaded.evaluation, loaded.seed)
    report = {"retrieval": rows}
    if say is not None:
        say(tables(report))
    if output:
        write_json(Path(output), report)
    return report


def _warn_of_learnt(row: dict[str, Any], then: Recipe, run: Run) -> None:
    """Warn, also in the model's row, of held-out events that the model has learnt under its own split."""
    held_out = run.split.test
    learnt = make_split(then, run.log).train
    names = ["user_id", "item_id"]
    known = pandas.MultiIndex.from_frame(learnt[names].astype(str))
    count = int(pandas.MultiIndex.from_frame(held_out[names].astype(str)).isin(known).sum())
    if count:
        row["learnt"] = count
        logger.warning(
            "%d of the %d held-out events are among those that the model was trained on: its figures are no test. "
            "Train it under the same protocol (m6rec finetune with these settings)",
            count,
            len(held_out),
        )


def _other_data(folder: Path, log: Log) -> str | None:
    """Return a message if a log differs from that of the run in a folder, as far as the run's files show it."""
    card = folder / CARD_FILE
    then = (json.loads(card.read_text(encoding="utf-8")) if card.is_file() else {}).get("data") or {}
    now = {
        "users": int(log.interactions["user_id"].nunique()),
        "items": len(log.items),
        "events": len(log.interactions),
        "digest": log_digest(log),
    }
    other = [name for name in now if then.get(name) is not None and then[name] != now[name]]
    if not other:
        return None
    counts = [f"{then[name]:,} {name} then, {now[name]:,} now" for name in other if name != "digest"]
    return f"the data are others than those of the run ({'; '.join(counts) or 'as many users, items and events'})"


__all__ = ["evaluate", "evaluate_untrained"]
