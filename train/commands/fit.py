"""`m6rec fit`: from two tables to a recommender within seconds: transitions, words and popularity, without training.

m6rec fit events.csv items.csv runs/shop
"""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..answering.evidence import FIT_FILE
from ..config.recipe import RECIPES, Recipe, load_recipe, write_json
from ..data.columns import Found, find_columns, write_items
from ..data.log import Log, read_log
from ..data.splits import Split, histories
from ..data.tables import load_table
from ..evaluation.evidence import Choice, Evidence, EvidenceSettings, choose_evidence
from ..evaluation.reports import (
    OWN,
    Scores,
    count_repeats,
    learnt_sequences,
    ranking_baselines,
    ranking_examples,
    ranking_rows,
)
from ..rows.examples import RequestWriter
from ..rows.held_out import before_and_in
from ..runs.build import make_split
from ..runs.run import item_texts
from .prepare import REVISITS

METRICS_FILE = "metrics.json"
TABLES = "tables"
"""Folder, beside the model, of tables that were given as data frames, and of the items as they are read."""
MOST_DROPPED = 0.5
"""Share of the events that may be unusable."""
Report = dict[str, dict[str, dict[str, Any]]]


class Measured:
    """A log as evidence reads it: items, texts, and the sequences of the training events.

    Args:
        recipe: Says what is measured.
        log: The log.
        split: Its parts.
    """

    def __init__(self, recipe: Recipe, log: Log, split: Split) -> None:
        self.recipe, self.log, self.split = recipe, log, split
        self.writer = RequestWriter(log)
        self.texts = item_texts(log)
        self.sequences = learnt_sequences(self.writer, split, "test", recipe.evaluation)
        self.counts = np.bincount(np.concatenate([*self.sequences, np.empty(0, int)]), minlength=len(self.texts))

    def report(self, settings: EvidenceSettings, part: str = "test") -> Report:
        """Measure evidence beside the other rows that need no training: `retrieval` -> who -> metrics."""
        arguments, seed = self.recipe.evaluation, self.recipe.seed
        examples = ranking_examples(self.writer, None, self.split, part, arguments, seed)
        if not examples.users:
            return {}
        evidence = Evidence(self.texts, self.sequences, settings)
        scores: dict[str, Any] = {OWN: Scores(lambda users: evidence.scores(examples.histories[users]))}
        scores |= ranking_baselines(self.texts, self.sequences, examples, self.counts)
        return {"retrieval": ranking_rows(scores, examples, self.counts, arguments, seed)}


@dataclasses.dataclass
class Fitting:
    """A fit on its way: what has been decided, and who is told."""

    measured: Measured
    say: Callable[[str], object]
    started: float
    decisions: dict[str, Any]
    """What fit.json holds."""

    @property
    def folder(self) -> Path:
        """The folder that is written."""
        return self.measured.recipe.output_dir

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def note(self, text: str) -> None:
        """Say something, with the time since the start."""
        whole = int(self.seconds)
        self.say(f"{whole // 60}:{whole % 60:02d} {text}")

    def keep(self) -> None:
        """Write what has been decided into the folder."""
        write_json(self.folder / FIT_FILE, self.decisions)


def recipe_of_tables(places: Sequence[str], users: str | None, overrides: Sequence[str]) -> Recipe:
    """Make the recipe of a fit.

    Args:
        places: The table of events, that of items and the folder that is written; or a recipe, and perhaps a folder.
        users: A table of users.
        overrides: Entries such as `data.columns.user_id=customer`.
    """
    if not places or len(places) > 3 or (len(places) < 3 and not _is_recipe(places[0])):
        raise ValueError(
            f"expected EVENTS ITEMS OUT, the two tables and the folder that is written, or a recipe; got {list(places)}"
        )
    if _is_recipe(places[0]):
        source, named = places[0], dict(zip(["training.output_dir"], places[1:]))
    else:
        source, named = "own-data", dict(zip(["data.interactions", "data.items", "training.output_dir"], places))
    named |= {"data.users": users} if users else {}
    return load_recipe(source, [*(f"{name}={json.dumps(value)}" for name, value in named.items()), *overrides])


def _is_recipe(place: str) -> bool:
    """Say whether a name is that of a recipe, and no table."""
    return Path(place).suffix in (".yaml", ".yml") or (RECIPES / f"{place}.yaml").is_file()


def fit_recommender(recipe: Recipe, say: Callable[[str], object]) -> Report:
    """Fit a recommender to the tables that a recipe names, and write it into the recipe's folder.

    Args:
        recipe: Names the tables and the folder; what it says of columns wins over what is found.
        say: Is given lines for a reader.

    Returns:
        Task -> who -> metrics, on the test part, as `metrics.json` holds it.

    Raises:
        ValueError: The tables cannot be used; the message says what was found and which setting helps.
    """
    started = time.monotonic()
    recipe, decisions = _read_columns(recipe, say)
    fitting = _read(recipe, decisions, say, started)
    choice = choose(fitting)
    report = fitting.measured.report(choice.settings)
    _save(fitting, report)
    return report


def _read_columns(recipe: Recipe, say: Callable[[str], object]) -> tuple[Recipe, dict[str, Any]]:
    """Find the columns of a recipe's tables, and write the items as they are read."""
    data = recipe.data
    if data.source != "tables":
        return recipe, {"columns": f"those of {data.source}"}
    if not data.interactions or not data.items:
        raise ValueError("a fit needs two tables: data.interactions and data.items")
    events, items = load_table(data.interactions), load_table(data.items)
    # A recipe that names a role's column as the role itself says no more than the default.
    given = {role: column for role, column in data.columns.items() if column != role or column in events.column_names}
    found = find_columns(events, items, given, data.time_format)
    if data.item_columns is not None:
        found = dataclasses.replace(found, item_columns=data.item_columns, left_out={})
    path = recipe.output_dir / TABLES / "items.parquet"
    nameless = write_items(items, found, path)
    for line in _columns_told(found, events.column_names, nameless, len(items)):
        say(line)
    data = dataclasses.replace(
        data,
        columns=found.columns,
        items=str(path),
        item_columns=None,
        time_format=found.time_format,
        drop_invalid=True,
    )
    told = {"events": found.columns, "items": found.item_columns, "items not read": found.left_out}
    return dataclasses.replace(recipe, data=data), {"columns": {**told, "items without text": nameless}}


def _columns_told(found: Found, columns: list[str], nameless: int, count: int) -> list[str]:
    """Say what the columns are taken for."""
    roles = ", ".join(f"{role} {column}" for role, column in found.columns.items() if column)
    unread = [column for column in columns if column not in found.columns.values()]
    written = f" (written as {found.time_format})" if found.time_format else ""
    lines = [f"events: {roles}{written}" + (f"; not read: {', '.join(unread)}" if unread else "")]
    texts = f"read as text: {', '.join(found.item_columns)}" if found.item_columns else "no column describes them"
    left = ", ".join(f"{column} ({reason})" for column, reason in found.left_out.items())
    lines.append(f"items: id {found.item_id}; {texts}" + (f"; not read: {left}" if left else ""))
    if nameless:
        lines.append(f"{nameless} of {count} items have no text: their ids stand for it, and words do not compare them")
    return lines


def _read(recipe: Recipe, decisions: dict[str, Any], say: Callable[[str], object], started: float) -> Fitting:
    """Read the log, and settle whether seen items are recommended."""
    log = read_log(recipe.data)
    lost = sum(count for reason, count in log.dropped.items() if reason.startswith("interactions"))
    if lost > MOST_DROPPED * (lost + len(log.interactions)):
        raise ValueError(
            f"{lost} of {lost + len(log.interactions)} events cannot be used ({'; '.join(log.dropped)}): were columns "
            "taken for others? Name them: data.columns.user_id=COLUMN, data.columns.item_id=COLUMN"
        )
    split = make_split(recipe, log)
    repeated, asked = count_repeats(split, "test", recipe.evaluation)
    revisits = bool(asked) and repeated / asked >= REVISITS
    if revisits and recipe.evaluation.exclude_seen:
        recipe = dataclasses.replace(recipe, evaluation=dataclasses.replace(recipe.evaluation, exclude_seen=False))
    fitting = Fitting(Measured(recipe, log, split), say, started, decisions)
    users, dropped = log.interactions["user_id"].nunique(), log.dropped
    decisions["log"] = {"users": users, "items": len(log.items), "events": len(log.interactions), "dropped": dropped}
    decisions["seen items"] = "left out" if recipe.evaluation.exclude_seen else "recommended"
    fitting.note(f"{len(log.interactions):,} events of {users:,} users, {len(log.items):,} items")
    if revisits:
        fitting.note(f"{repeated} of {asked} last events are of items that their users know: these are recommended too")
    if not asked:
        fitting.note("no user has three events, so that none can be held out: nothing is measured")
    return fitting


def choose(fitting: Fitting) -> Choice:
    """Choose how much each kind of evidence counts, and keep it: from now on the folder recommends."""
    own = fitting.measured
    known = before_and_in(own.split, "test")[0]
    rows = np.array([own.writer.rows[item_id] for item_id in known["item_id"]], dtype=int)
    sequences = [rows[places] for places in histories(known).values()]
    choice = choose_evidence(own.texts, sequences, own.recipe.evaluation.exclude_seen, own.recipe.seed)
    fitting.decisions |= {
        "kept": "evidence",
        "evidence": dataclasses.asdict(choice),
        "seconds": {"first recommender": round(fitting.seconds, 1)},
    }
    own.recipe.save(fitting.folder)
    fitting.keep()
    fitting.note(f"a first recommender is there: m6rec recommend {fitting.folder} --user ID")
    return choice


def _save(fitting: Fitting, report: Report) -> None:
    """Write the figures."""
    fitting.decisions["seconds"]["all"] = round(fitting.seconds, 1)
    write_json(fitting.folder / METRICS_FILE, report)
    fitting.keep()


__all__ = ["Fitting", "Measured", "fit_recommender", "recipe_of_tables"]
