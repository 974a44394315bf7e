"""`m6rec fit`: fits the best recommender to two tables, within a time limit.

First evidence, within seconds: transitions, words, popularity, a linear model. Then a network, which is kept, with or
without the evidence, only if it is better on validation.

m6rec fit events.csv items.csv runs/shop
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas

from ...catalogue_m6rec import Catalogue, refuse_journal
from ...pipeline_m6rec import FOLDER
from ..answering.evidence import FIT_FILE, PlainWording, count_log, kept_evidence
from ..answering.loading import load_pipeline
from ..config.recipe import RECIPES, Recipe, load_recipe, load_saved, write_json
from ..data.columns import Found, find_columns, write_items
from ..data.log import Log, read_log
from ..data.splits import Split, has_times, histories
from ..data.tables import load_table
from ..evaluation.baselines import TABLED
from ..evaluation.evidence import Choice, Evidence, EvidenceSettings, choose_evidence
from ..evaluation.reports import (
    OWN,
    Scores,
    count_repeats,
    learnt_sequences,
    learnt_times,
    rank_catalogue,
    ranking_examples,
    ranking_rows,
)
from ..evaluation.untrained import Untrained, plain
from ..evaluation.verdicts import NETWORK
from ..rows.examples import RequestWriter
from ..rows.held_out import before_and_in
from ..runs.adapters import trainable_parameters
from ..runs.build import make_split, prepare, save
from ..runs.facts import keep_facts
from ..runs.run import Run
from ..runs.with_evidence import NETWORK_ONLY, Outcome, batch_size, combined, train_with_evidence, train_with_gap
from .prepare import REVISITS

METRICS_FILE = "metrics.json"
TABLES = "tables"
"""Folder, next to the model, of tables given as data frames, and of the items as they are read."""
MOST_DROPPED = 0.5
"""Maximum share of unusable events."""
MANY_EVENTS = 100_000
"""Number of events above which the advice is not to collect more events (our choice)."""
FIRST_SHARE = 0.5
"""Share of the time for training in which epochs are chosen, if the network is then trained again with the gap."""
STALE_FROM = 5
"""Median number of events per user from which validation is `stale`: third last events are then not learnt."""
SORTED = 0.99
"""Share of a user's consecutive rows in order of their items from which a log without times is sorted by item."""
SORTED_PAIRS = 20
"""Minimum number of such pairs of rows."""
SAMPLED = 4096
"""Number of items that a batch of the loss draws if the catalogue has more than `TABLED` items."""
Report = dict[str, dict[str, dict[str, Any]]]


class Measured:
    """The parts of a log that evidence uses: items, texts, and the sequences of the training events.

    Args:
        recipe: Settings of the evaluation.
        log: The log.
        split: Its parts.
    """

    def __init__(self, recipe: Recipe, log: Log, split: Split) -> None:
        self.recipe, self.log, self.split = recipe, log, split
        self.writer = RequestWriter(log)
        fields = [[text for name, text in item.items() if name != "item_id"] for item in self.writer.items]
        self.texts = [" ".join(own) for own in fields]
        self.sequences = learnt_sequences(self.writer, split, "test", recipe.evaluation)
        self.times = learnt_times(split, "test", recipe.evaluation)
        self.counts = np.bincount(np.concatenate([*self.sequences, np.empty(0, int)]), minlength=len(self.texts))

    def report(self, settings: EvidenceSettings, run: Run | None = None, share: float = 0.0) -> Report:
        """Measure the kept recommender and the untrained rows on the test part.

        Args:
            settings: Settings of the evidence.
            run: A trained network, if there is one; it has a separate row.
            share: Weight of the network's cosine in the kept recommender: 0 = only evidence, `NETWORK_ONLY` = only
                the network.

        Returns:
            `retrieval` -> name -> metrics; empty if no event is held out.
        """
        arguments, seed = self.recipe.evaluation, self.recipe.seed
        processor = None if run is None else run.processor
        examples = ranking_examples(self.writer, processor, self.split, "test", arguments, seed)
        if not examples.users:
            return {}
        evidence = Evidence(self.texts, self.sequences, settings, self.times)
        alone = Scores(lambda users: evidence.scores(examples.histories[users], examples.moments[users]))
        scores: dict[str, Any] = {OWN: alone}
        if run is not None:
            cosines = rank_catalogue(run.model, examples, run.catalogue, run.collator, False, run.segment_cache)
            scores[OWN] = combined(cosines, alone, share)
        rows = plain(arguments, self.split, len(self.texts))
        scores |= Untrained(self.writer, self.texts, self.split, rows, seed).scores(examples, "test")
        if share:
            scores["evidence"] = alone
        if run is not None and share != NETWORK_ONLY:
            scores[NETWORK] = cosines
        return {"retrieval": ranking_rows(scores, examples, self.counts, arguments, seed)}


@dataclasses.dataclass
class Fitting:
    """State of a running fit: its decisions, and the output of progress."""

    measured: Measured
    say: Callable[[str], object]
    started: float
    decisions: dict[str, Any]
    """Contents of fit.json."""
    catalogue: Catalogue = dataclasses.field(init=False)
    """What the folder recommends from."""

    @property
    def folder(self) -> Path:
        """The output folder."""
        return self.measured.recipe.output_dir

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def note(self, text: str) -> None:
        """Print a line, with the time since the start."""
        whole = int(self.seconds)
        self.say(f"{whole // 60}:{whole % 60:02d} {text}")

    def keep(self) -> None:
        """Write the decisions into the folder."""
        write_json(self.folder / FIT_FILE, self.decisions)


def recipe_of_tables(places: Sequence[str], users: str | None, overrides: Sequence[str]) -> Recipe:
    """Make the recipe of a fit.

    Args:
        places: The table of events, the table of items and the output folder; or a recipe, and optionally a folder.
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
    """Return whether a name is that of a recipe, and not of a table."""
    return Path(place).suffix in (".yaml", ".yml") or (RECIPES / f"{place}.yaml").is_file()


def fit_recommender(recipe: Recipe, minutes: float, say: Callable[[str], object]) -> Report:
    """Fit a recommender to the tables that a recipe names, and write it into the recipe's folder.

    Args:
        recipe: Names the tables and the folder; its columns override inferred ones; it has the settings of the
            network's training.
        minutes: Time limit of training, counted from the start; 0: nothing is trained. The evaluation on the test part
            follows it.
        say: Receives lines of progress.

    Returns:
        Task -> name -> metrics, on the test part, as in `metrics.json`.

    Raises:
        ValueError: The tables cannot be used; the message gives the cause and the setting that helps.
    """
    if not 0 <= minutes < math.inf:
        raise ValueError(f"minutes is {minutes}: expected a number of 0 (nothing is trained) or more")
    if recipe.task.learn != ["retrieval"]:
        raise ValueError(
            f"task.learn is {recipe.task.learn}: a fit compares rankings, and learns retrieval alone; for other tasks "
            "use m6rec finetune"
        )
    started = time.monotonic()
    recipe, decisions = _read_columns(recipe, say)
    fitting = _read(recipe, decisions, say, started)
    choice = choose(fitting)
    outcome, share = None, 0.0
    if minutes and not fitting.measured.split.valid.empty:
        outcome = train(fitting, choice, started + 60 * minutes)
        share = decide(fitting, choice, outcome)
    else:
        why = "nothing was trained" if fitting.measured.split.valid.empty else "nothing was trained (--minutes 0)"
        fitting.decisions["sentence"] = f"Kept: evidence; {why}. {_help(fitting, None)}"
    if not share:
        fitting.catalogue.save(fitting.folder / FOLDER)  # lets go of the journal: others may observe
    fitting.note("measuring on the test events")
    report = fitting.measured.report(choice.settings, outcome.run if outcome else None, share)
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
    # A column with the same name as its role is the default.
    given = {role: column for role, column in data.columns.items() if column != role or column in events.column_names}
    found = find_columns(events, items, given, data.time_format)
    if data.item_columns is not None:
        found = dataclasses.replace(found, item_columns=data.item_columns, left_out={})
    path = recipe.output_dir / TABLES / "items.parquet"
    nameless = write_items(items, found, path)
    for line in _column_lines(found, events.column_names, nameless, len(items)):
        say(line)
    data = dataclasses.replace(
        data,
        columns=found.columns,
        items=str(path),
        item_columns=None,
        time_format=found.time_format,
        drop_invalid=True,
    )
    read = {"events": found.columns, "items": found.item_columns, "items not read": found.left_out}
    return dataclasses.replace(recipe, data=data), {"columns": {**read, "items without text": nameless}}


def _column_lines(found: Found, columns: list[str], nameless: int, count: int) -> list[str]:
    """Return lines with the roles of the columns."""
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
    """Read the log, and decide whether seen items are recommended."""
    log = read_log(recipe.data)
    lost = sum(count for reason, count in log.dropped.items() if reason.startswith("interactions"))
    if lost > MOST_DROPPED * (lost + len(log.interactions)):
        raise ValueError(
            f"{lost} of {lost + len(log.interactions)} events cannot be used ({'; '.join(log.dropped)}): were columns "
            "taken for others? Name them: data.columns.user_id=COLUMN, data.columns.item_id=COLUMN"
        )
    recipe = _stale(recipe, log)
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
    if sorted_by_item(log.interactions):
        fitting.note(
            "the rows of each user are sorted by item, which is no order of time: the last one, which is held out, "
            "says little about what comes next; name a column of times (data.columns.timestamp=COLUMN), or shuffle rows"
        )
    if not asked:
        fitting.note("no user has three events, so that none can be held out: nothing is measured")
    return fitting


def sorted_by_item(events: pandas.DataFrame) -> bool:
    """Return whether the rows of users are sorted by item, in a log without times: a table's order by two keys.

    Args:
        events: The columns `user_id`, `item_id` and `timestamp`.
    """
    if has_times(events):
        return False
    users = pandas.factorize(events["user_id"])[0]
    numbers = pandas.to_numeric(events["item_id"], errors="coerce")
    unnumbered = bool(numbers.isna().any())
    items = pandas.factorize(events["item_id"], sort=True)[0] if unnumbered else numbers.to_numpy(dtype=float)
    order = np.argsort(users, kind="stable")
    users, keys = users[order], items[order]
    pairs = users[1:] == users[:-1]
    if pairs.sum() < SORTED_PAIRS:
        return False
    steps = np.sign(np.diff(keys)[pairs])
    return bool(max((steps > 0).mean(), (steps < 0).mean()) >= SORTED)


def _stale(recipe: Recipe, log: Log) -> Recipe:
    """Use `stale` validation, as far from the learnt events as the test is, if users have enough events."""
    own = recipe.evaluation
    if own.validate or own.protocol or own.split != "leave-one-out":
        return recipe
    if log.interactions["user_id"].value_counts().median() < STALE_FROM:
        return recipe
    return dataclasses.replace(recipe, evaluation=dataclasses.replace(own, validate="stale"))


def choose(fitting: Fitting) -> Choice:
    """Choose the weights of the evidence and save them: from now on the folder can recommend."""
    own = fitting.measured
    known = before_and_in(own.split, "test")[0]
    rows = np.array([own.writer.rows[item_id] for item_id in known["item_id"]], dtype=int)
    places, arguments = histories(known).values(), own.recipe.evaluation
    sequences, moments = [rows[each] for each in places], known["timestamp"].to_numpy(dtype=float)
    times = [moments[each] for each in places] if arguments.ties == "shuffled" else None
    choice = choose_evidence(own.texts, sequences, arguments.exclude_seen, own.recipe.seed, times=times)
    fitting.decisions |= {
        "kept": "evidence",
        "evidence": dataclasses.asdict(choice),
        "seconds": {"first recommender": round(fitting.seconds, 1)},
    }
    fitting.catalogue = _keep_untrained(fitting, choice.settings)
    fitting.keep()
    command = f"m6rec recommend {fitting.folder} --user ID"
    fitting.note(f"weights of the evidence: {choice.origin}")
    fitting.note(f"a first recommender is there: {command}")
    return choice


def _keep_untrained(fitting: Fitting, settings: EvidenceSettings) -> Catalogue:
    """Write a model that has learnt nothing, with a catalogue that does not read it: evidence alone answers.

    Returns:
        The catalogue. It holds the journal of its folder, so that nothing is observed there that the end of the fit
        would not know of.
    """
    own = fitting.measured
    refuse_journal((fitting.folder / FOLDER).resolve())  # before the model there is replaced
    run = prepare(own.recipe, log=own.log)
    save(run)
    keep_facts(run, {}, 0, "m6rec fit")
    loaded = load_pipeline(str(fitting.folder))
    catalogue = count_log(own.recipe, own.log, own.writer.items, settings, loaded.model, loaded.processor)
    catalogue.save(fitting.folder / FOLDER)
    catalogue.open_journal()
    return catalogue


def add_cosine(catalogue: Catalogue, folder: Path, share: float) -> None:
    """Let a catalogue of evidence rank by the model in a folder too, and save it there.

    Args:
        catalogue: The catalogue.
        folder: The folder, whose model is trained.
        share: Weight of the cosine; `NETWORK_ONLY`: events are still counted, with weights of 0.
    """
    loaded = load_pipeline(str(folder))
    if share == NETWORK_ONLY:
        none: dict[str, Any] = dict.fromkeys(("words", "texts", "transitions", "popularity", "again", "linear"), 0.0)
        assert catalogue.evidence is not None
        catalogue.set_evidence(dataclasses.replace(catalogue.evidence, **none))
    learnt = 1.0 if share == NETWORK_ONLY else share
    catalogue.encode(loaded.model, PlainWording(loaded.processor), learnt=learnt)
    catalogue.save(folder / FOLDER)


def train(fitting: Fitting, choice: Choice, deadline: float) -> Outcome:
    """Train a network until a deadline; batches are smaller if there are few users.

    If validation leaves out a gap of events, a network that is better is trained again with them.
    """
    recipe, log, gap = fitting.measured.recipe, fitting.measured.log, not fitting.measured.split.gap.empty
    users = fitting.measured.split.train["user_id"].nunique()
    given = int(recipe.training.get("per_device_train_batch_size", 8))
    training = {**recipe.training, "per_device_train_batch_size": batch_size(given, users)}
    model = recipe.model
    if model.checkpoint is None:  # evidence compares words already
        model = dataclasses.replace(model, config={**model.config, "tfidf_weight": 0.0})
    task, size = recipe.task, len(fitting.measured.texts)
    if task.negatives == "catalogue" and size > TABLED:  # all cosines and evidence of a batch would take gigabytes
        task = dataclasses.replace(task, negatives="sampled", num_sampled=SAMPLED)
        fitting.note(f"more than {TABLED:,} items: a step of training compares with {SAMPLED:,} drawn ones")
    recipe = dataclasses.replace(recipe, training=training, model=model, task=task).for_finetuning()
    left = deadline - time.monotonic()
    first = deadline - (1 - FIRST_SHARE) * left if gap else deadline
    outcome = train_with_evidence(recipe, log, choice.settings, first, fitting.note)
    if gap and outcome.found["better"]:
        fitting.note("training again, with the events before the validation events")
        run = train_with_gap(recipe, log, choice.settings, outcome.facts["best epoch"], deadline, fitting.note)
        outcome.facts["trained again"] = run is not None
        outcome.run = run or outcome.run
    fitting.decisions["network"] = {**outcome.facts, "validation": outcome.found}
    fitting.decisions["seconds"]["trained"] = round(fitting.seconds, 1)
    return outcome


def decide(fitting: Fitting, choice: Choice, outcome: Outcome) -> float:
    """Keep the network if it is better than all untrained rows, else the evidence.

    Returns:
        The weight of the network's cosine in the kept recommender; 0: only evidence.
    """
    found, run = outcome.found, outcome.run
    share = outcome.share if found["better"] else 0.0
    kept = "evidence" if not share else "network" if share == NETWORK_ONLY else "network and evidence"
    low, high = found["interval"]
    compared = (
        f"{found['metric']} on validation {found['value']:.4f} against {found['baseline_value']:.4f} of "
        f"{found['baseline']}, {found['difference']:+.4f} [{low:+.4f}, {high:+.4f}]"
    )
    if share:
        save(run)
        add_cosine(fitting.catalogue, fitting.folder, share)
        trained = trainable_parameters(run.model)[0]
        keep_facts(run, {"training": fitting.decisions["seconds"]["trained"]}, trained, "m6rec fit")
        weight = "" if share == NETWORK_ONLY else f" (weight of the cosine {share:g})"
        sentence = f"Kept: {kept}{weight}, which is better than all that needs no training: {compared}."
        fitting.decisions |= {"share": share} if share != NETWORK_ONLY else {}
    else:
        sentence = f"Kept: evidence; a network combined with it is not clearly better: {compared}."
    fitting.decisions |= {"kept": kept, "sentence": f"{sentence} {_help(fitting, outcome)}"}
    fitting.keep()
    return share


def _help(fitting: Fitting, outcome: Outcome | None) -> str:
    """Return advice for better results."""
    own = fitting.measured
    found = []
    if len(own.log.interactions) < MANY_EVENTS:
        found.append("more events")
    if outcome is not None and outcome.facts["out of time"]:
        found.append("more minutes")
    if outcome is None and not own.split.valid.empty:
        found.append("training (--minutes 10)")
    if not own.recipe.model.backbone:
        found.append("a text backbone (model.backbone, see the guide)")
    if "rating" not in own.log.interactions and "label" not in own.log.interactions:
        found.append("ratings or labels, if clicks are to be predicted")
    return f"What may help: {'; '.join(found)}." if found else ""


def kept_report(folder: str | Path, overrides: Sequence[str] = ()) -> tuple[Log, Report]:
    """Measure the recommender of a fit's folder again, and return the log as well."""
    kept = kept_evidence(folder)
    assert kept is not None, folder
    own = [f"model.checkpoint={json.dumps(str(folder))}", "model.backbone=null"] if kept.share else []
    recipe = load_saved(folder, [*overrides, *own])
    log = read_log(recipe.data)
    run = prepare(recipe, log=log) if kept.share else None
    return log, Measured(recipe, log, make_split(recipe, log)).report(kept.settings, run, kept.share)


def _save(fitting: Fitting, report: Report) -> None:
    """Write the metrics, and print which recommender was kept."""
    fitting.decisions["seconds"]["all"] = round(fitting.seconds, 1)
    write_json(fitting.folder / METRICS_FILE, report)
    fitting.keep()
    fitting.note(fitting.decisions["sentence"])


__all__ = ["Fitting", "Measured", "add_cosine", "fit_recommender", "kept_report", "recipe_of_tables"]
