"""`m6rec prepare`: inspects a recipe's data before training.

It reports present and missing values, dropped rows with reasons, the held-out events, and the encoded requests. Only a
tokenizer is trained, if the recipe needs a new one.

m6rec prepare own-data.yaml
"""

import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pandas

from ...processing_m6rec import EncodedRow
from ...tokenization import M6RecProcessor
from ...values_m6rec import near_id
from ..config.recipe import Recipe
from ..data.log import DataArguments, Log, read_log, repeated_rows
from ..data.splits import PARTS, Split, cold_items, histories
from ..data.tasks import SCORED, further_columns
from ..data.times import ORDER
from ..evaluation.reports import count_repeats
from ..rows.corpus import AnySource, StreamedSource, vocabulary_texts
from ..rows.dialogues import dialogue_examples, read_dialogues
from ..rows.examples import Candidates, Negatives, RequestWriter, refuse_equal_labels, windows
from ..rows.writing import TextSource
from ..runs.build import item_texts, make_processor, make_split, make_writer
from ..runs.pretrain import raw_sources

READ = 500
"""Number of requests of a task that are encoded to measure their lengths, drawn by the seed."""
SHOWN = 5
REVISITS = 0.05
"""Share of repeats among the held-out events from which a log counts as one of re-visits (our choice)."""
MOST_VALUES = 12
"""Maximum number of values of a column that are counted separately."""
EARLY = pandas.Timestamp("1990-01-01").timestamp()


def prepare_report(recipe: Recipe) -> dict[str, Any]:
    """Inspect all inputs of a recipe.

    Returns:
        Sections `events`, `items`, `users`, `dropped` (reason -> rows), `split`, `requests` (task -> lengths and
        samples), `texts` (raw texts of the pretraining) and `warnings`; empty sections are left out.

    Raises:
        ValueError: If a table cannot be read; the message names the column, the row and what was expected.
    """
    raw = raw_sources(recipe.pretraining)
    report: dict[str, Any] = {}
    if recipe.data.source != "tables" or recipe.data.interactions or recipe.data.items or not raw:
        log = read_log(recipe.data)
        split = make_split(recipe, log)
        report |= {"events": _events(log, recipe), "items": _items(log), "users": _users(log), "dropped": log.dropped}
        report |= {"split": _split(split, recipe), "warnings": _warnings(log, split) + _repeats(split, recipe)}
        writer = make_writer(recipe, log, split)
        processor = _processor(recipe, log, writer, raw)
        report["requests"] = _requests(recipe, split, writer, processor, report["warnings"])
    else:
        nothing = pandas.DataFrame(index=pandas.Index([], name="item_id"))
        log = Log(pandas.DataFrame({"user_id": [], "item_id": [], "timestamp": []}), nothing)
        processor = _processor(recipe, log, RequestWriter(log), raw)
    if raw:
        report["texts"] = {source.name: _raw_texts(source, processor, recipe.seed) for source in raw}
    return report


def report(recipe: Recipe) -> str:
    """Return the findings of `prepare_report` as text."""
    found = prepare_report(recipe)
    lines = []
    for title in ("events", "items", "users", "dropped", "split", "texts"):
        if found.get(title):
            lines += [title, *_lines(found[title], "  ")]
    for task, own in found.get("requests", {}).items():
        lines += [f"requests of {task}", *_lines({name: own[name] for name in own if name != "samples"}, "  ")]
    shown = zip_longest(*([(task, text) for text in own["samples"]] for task, own in found.get("requests", {}).items()))
    samples = [sample for row in shown for sample in row if sample is not None][:SHOWN]
    if samples:
        lines += ["samples, as the model reads them", *(f"  {task}: {text}" for task, text in samples)]
    return "\n".join([*lines, *(f"warning: {text}" for text in found.get("warnings", []))])


def _lines(values: dict[str, Any], indent: str) -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield f"{indent}{name}"
            yield from _lines(value, indent + "  ")
        else:
            yield f"{indent}{name}: {_number(value)}"


def _number(value: Any) -> str:
    """Format a number for people.

    >>> _number(100000), _number(0.0630469), _number("2026")
    ('100,000', '0.06305', '2026')
    """
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


# The log


def _events(log: Log, recipe: Recipe) -> dict[str, Any]:
    frame = log.interactions
    counts = frame["user_id"].value_counts()
    counts = counts[counts > 0]
    met = int(frame["item_id"].nunique())
    repeated = int(repeated_rows(frame[["user_id", "item_id"]]).sum())
    found: dict[str, Any] = {
        "rows": len(frame),
        "users": len(counts),
        "items met": met,
        "density": (len(frame) - repeated) / (len(counts) * len(log.items)),
        "of an item that the user has met before": repeated,
        "time": _time(frame, recipe.data),
        "per user": {
            "fewest": int(counts.min()),
            "median": float(counts.median()),
            "most": int(counts.max()),
            "users with one event": int((counts == 1).sum()),
            "users with two events": int((counts == 2).sum()),
        },
    }
    for column in ("event", "rating", "label", *further_columns()):
        if column in frame:
            found[f"by {column}"] = _distribution(frame[column])
    if "text" in frame:
        found["without text"] = int((frame["text"] == "").sum())
    return found


def _time(frame: pandas.DataFrame, data: DataArguments) -> dict[str, Any] | str:
    times = frame["timestamp"]
    if times.isna().all() and data.time_format == ORDER:
        column = data.columns.get("timestamp") or "timestamp"
        return f"none: each user's events stand in the order of the column {column!r}"
    if times.isna().all():
        return "none: each user's events keep the order of the table"
    first, last = (
        pandas.Timestamp(moment, unit="s").isoformat(" ", "seconds") for moment in (times.min(), times.max())
    )
    tied = int(repeated_rows(frame[["user_id", "timestamp"]]).sum())
    return {"first": first, "last": last, "days": (times.max() - times.min()) / 86400, "same user and second": tied}


def _distribution(values: pandas.Series) -> dict[str, Any]:
    counts = values.value_counts(dropna=True)
    counts = counts[counts > 0]
    unknown = {"unknown": missing} if (missing := int(values.isna().sum())) else {}
    if len(counts) > MOST_VALUES and pandas.api.types.is_numeric_dtype(values):
        return {"least": float(values.min()), "mean": float(values.mean()), "most": float(values.max()), **unknown}
    shown = counts.sort_index() if pandas.api.types.is_numeric_dtype(values) else counts
    found = {_value(value): int(count) for value, count in shown.head(MOST_VALUES).items()}
    rest = {f"{len(counts) - MOST_VALUES} others": int(shown.iloc[MOST_VALUES:].sum())}
    return {**found, **(rest if len(counts) > MOST_VALUES else {}), **unknown}


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float | np.number) else value or "(empty)"


def _items(log: Log) -> dict[str, Any]:
    return {
        "rows": len(log.items),
        "never met": len(log.items) - int(log.interactions["item_id"].nunique()),
        "with the same text as another": int(log.items.duplicated(keep=False).sum()),
        "without": {column: int((log.items[column] == "").sum()) for column in log.items},
    }


def _users(log: Log) -> dict[str, Any]:
    if log.users is None:
        return {"described": 0}
    active = log.interactions["user_id"].unique()
    return {
        "described": len(log.users),
        "with events but not described": int((~pandas.Index(active).isin(log.users.index)).sum()),
        "without": {column: int((log.users[column] == "").sum()) for column in log.users},
    }


def _split(split: Split, recipe: Recipe) -> dict[str, Any]:
    parts = {name: getattr(split, name) for name in PARTS}
    users = {name: set(part["user_id"]) for name, part in parts.items()}
    cold, held_out = cold_items(split), pandas.concat([split.valid, split.test])
    repeated, retrievals = count_repeats(split, "test", recipe.evaluation)
    return {
        "by": recipe.evaluation.protocol or recipe.evaluation.split,
        **{name: {"events": len(part), "users": len(users[name])} for name, part in parts.items()},
        **({} if split.gap.empty else {"gap between train and valid": {"events": len(split.gap)}}),
        "users in train only": len(users["train"] - users["valid"] - users["test"]),
        "held-out users without a training event": len((users["valid"] | users["test"]) - users["train"]),
        "cold items (held out, but not in train)": len(cold),
        "held-out events of cold items": int(held_out["item_id"].isin(cold).sum()),
        "retrievals in the test": retrievals,
        "retrievals of an item that the user has met before": repeated,
    }


def _warnings(log: Log, split: Split) -> list[str]:
    found = []
    frame = log.interactions
    if frame["timestamp"].min() < EARLY:
        first = pandas.Timestamp(frame["timestamp"].min(), unit="s").isoformat(" ", "seconds")
        found.append(
            f"the first event is of {first}: were numbers taken for times of another unit? See data.time_format"
        )
    if frame["timestamp"].max() > time.time() + 366 * 86400:
        last = datetime.fromtimestamp(frame["timestamp"].max(), UTC).replace(tzinfo=None).isoformat(" ", "seconds")
        found.append(f"the last event is of {last}, more than a year from now: what do its times mean?")
    near = pandas.Series([near_id(item_id) for item_id in log.items.index], index=log.items.index, dtype="str")
    if len(alike := near[near.duplicated(keep=False)].sort_values(kind="stable")):
        found.append(
            f"{len(alike)} items have ids that others nearly have too, such as {alike.index[0]!r} and "
            f"{alike.index[1]!r}: if they are the same item, write its id in one way"
        )
    empty = [name for name in PARTS[1:] if getattr(split, name).empty]
    if empty:
        found.append(f"nothing is held out for {' and '.join(empty)}: nothing can be measured there")
    same = int(log.items.duplicated(keep=False).sum())
    if same:
        found.append(f"{same} items have the same text as another: by text no model can tell them apart")
    return found


def _repeats(split: Split, recipe: Recipe) -> list[str]:
    """Return warnings of held-out items that their users have met before, with the setting that fits such a log."""
    repeated, retrievals = count_repeats(split, "test", recipe.evaluation)
    if not repeated or "retrieval" not in recipe.task.learn:
        return []
    found = (
        f"{repeated} of {retrievals} retrievals of the test ({repeated / retrievals:.1%}) ask for an item that the "
        "user has met before"
    )
    if not recipe.evaluation.exclude_seen:
        return [f"{found}: seen items stay in the ranking, and the pipeline recommends them"]
    if recipe.evaluation.repeats == "leave_out":
        counted = "they are left out of the evaluation"
    else:
        counted = "they count as misses (evaluation.repeats=leave_out leaves them out)"
    found += f", and seen items are never recommended: {counted}"
    if repeated / retrievals < REVISITS:
        return [f"{found}. They are rare: evaluation.exclude_seen=true fits"]
    return [f"{found}. This is a log of re-visits: set evaluation.exclude_seen=false, and they are recommended too"]


# What the model reads


def _processor(recipe: Recipe, log: Log, writer: RequestWriter, raw: Sequence[AnySource]) -> M6RecProcessor:
    """Load the processor of the pretrained model, if it exists, else make a new one."""
    folder = recipe.pretraining.output_dir
    if folder and (Path(folder) / "config.json").is_file():
        recipe = recipe.for_finetuning()
    texts = chain(item_texts(log), *(vocabulary_texts(source, recipe.seed) for source in raw)) if raw else None
    return make_processor(recipe, log, writer, texts)


def _requests(
    recipe: Recipe, split: Split, writer: RequestWriter, processor: M6RecProcessor, warnings: list[str]
) -> dict[str, Any]:
    """Encode requests of each task; data from which a task cannot be learnt are warnings."""
    found: dict[str, Any] = {}
    for name, make in _makers(recipe, split, writer, processor).items():
        try:
            requests = make()
            if not requests:
                raise ValueError(f"there is no training row of {name!r}")
        except ValueError as error:
            warnings.append(str(error))
            continue
        found[name] = _lengths(processor.read_many(requests, name), processor)
    return found


def _lengths(readings: list[EncodedRow], processor: M6RecProcessor) -> dict[str, Any]:
    tokens = np.array([len(reading.input_ids) for reading in readings])
    return {
        "read": len(readings),
        "tokens, median": float(np.median(tokens)),
        "tokens, 95th percentile": float(np.quantile(tokens, 0.95)),
        "tokens, most": int(tokens.max()),
        "share cut to max_length": sum(bool(reading.dropped) for reading in readings) / len(readings),
        "samples": [processor.tokenizer.decode(reading.input_ids) for reading in readings[:SHOWN]],
    }


def _makers(recipe: Recipe, split: Split, writer: RequestWriter, processor: M6RecProcessor) -> dict[str, Any]:
    """Task -> function that makes its requests; scoring tasks share one, as in training."""
    sampler = _Sampler(recipe, split, writer, processor)
    makers: dict[str, Any] = {"retrieval": sampler.retrieval} if "retrieval" in recipe.task.learn else {}
    makers |= {name: lambda name=name: sampler.scored(name) for name in recipe.task.scored}
    return makers | {name: lambda name=name: sampler.written(name) for name in recipe.task.writing}


class _Sampler:
    """Makes training requests of users or events drawn by the seed."""

    def __init__(self, recipe: Recipe, split: Split, writer: RequestWriter, processor: M6RecProcessor) -> None:
        self.recipe, self.writer, self.processor, self.train = recipe, writer, processor, split.train
        self.places = histories(split.train)
        self.users = self._drawn(list(self.places))

    def _drawn(self, all_of_them: Sequence[Any]) -> list[Any]:
        order = np.random.default_rng(self.recipe.seed).permutation(len(all_of_them))
        return [all_of_them[place] for place in order[:READ]]

    def _events(self, places: np.ndarray) -> list[dict[str, Any]]:
        return self.writer.events(self.train.iloc[places])

    def retrieval(self) -> list[dict[str, Any]]:
        """Each user's latest history."""
        most = self.processor.max_events
        return [self.writer.request(user, self._events(self.places[user][-most:])) for user in self.users]

    def scored(self, name: str) -> list[dict[str, Any]]:
        """Each user's last targets, with the events before them as history.

        Raises:
            ValueError: If the labels are missing or all equal.
        """
        task, writer = self.recipe.task, self.writer
        per_event = task.negatives_per_event if SCORED[name].negatives else 0
        negatives = Negatives(writer, self.train, per_event, self.recipe.seed) if per_event else None
        candidates = Candidates(writer, self.train, [name], task, negatives)
        refuse_equal_labels(candidates.labels[name], name, task)
        requests = []
        for user in self.users:
            own = self.places[user]
            *_, last = windows(len(own), self.processor.max_events, task.targets)
            if candidates.known[own[last.cut : last.stop]].any():
                rows, _ = candidates.of(own[last.cut : last.stop])
                history = self._events(own[last.start : last.cut])
                requests.append(writer.request(user, history, writer.candidates(rows, user)))
        return requests

    def written(self, name: str) -> list[dict[str, Any]]:
        """Texts of drawn events, each with the events before it as history; or turns of dialogues with earlier turns.

        Raises:
            ValueError: If the log lacks a column that the task needs.
        """
        recipe, most = self.recipe, self.processor.max_events
        if name == "conversation":
            dialogues = read_dialogues(recipe.task, self.writer.log, recipe.evaluation, recipe.seed)["train"]
            turns = dialogue_examples(dialogues, self.writer, self.processor)
            return [example.answered for example in islice(turns, READ)]
        source = TextSource(self.writer, self.processor, recipe.task)
        users, requests = self.train["user_id"].to_numpy(), []
        for place in self._drawn(np.flatnonzero(source.labelled(self.train, name)).tolist()):
            own = self.places[str(users[place])]
            at = int(np.searchsorted(own, place))
            events = self._events(own[max(at - most, 0) : at + 1])
            requests.append(source.example(name, str(users[place]), events[:-1], events[-1]).answered)
        return requests


def _raw_texts(source: AnySource, processor: M6RecProcessor, seed: int) -> dict[str, Any]:
    """Count the documents of raw texts, and inspect some."""
    texts = [document["text"] for document in islice(source.walk(seed), READ)]
    tokens = [len(ids) for ids in processor.tokenizer.encode_texts(texts)]
    known = {} if isinstance(source, StreamedSource) else {"texts": len(source), "held out": len(source.valid)}
    return {
        **(known or {"texts": "read as they are learnt"}),
        "tokens, median": float(np.median(tokens)),
        "tokens, most of those looked at": max(tokens),
        "sample": processor.tokenizer.decode(processor.tokenizer.encode_texts(texts[:1])[0][:64]),
    }


__all__ = ["prepare_report", "report"]
