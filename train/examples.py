"""From a log to requests, and from requests to training rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas
from tqdm.auto import tqdm

from ..tokenization import M6RecProcessor
from .data import Log
from .recipe import TaskArguments
from .splits import histories

UNKNOWN = -100
READ_AT_ONCE = 256
"""Requests that the processor reads together."""


class RequestWriter:
    """Writes a log's events as the processor wants them: verb, item, time, rating.

    Args:
        log: Where items and users are described.
    """

    def __init__(self, log: Log) -> None:
        self.log = log
        self.item_ids = list(log.items.index)
        self.rows = {item_id: row for row, item_id in enumerate(self.item_ids)}
        self.items = [{**log.item_fields(item_id), "item_id": item_id} for item_id in self.item_ids]
        self._users: dict[str, dict[str, str]] = {}

    def item(self, item_id: str) -> dict[str, str]:
        """Return the fields of an item, its id among them."""
        return self.items[self.rows[item_id]]

    def user(self, user_id: str) -> dict[str, str]:
        """Return the fields of a user; empty where nothing is known."""
        if user_id not in self._users:
            self._users[user_id] = self.log.user_fields(user_id)
        return self._users[user_id]

    def events(self, frame: pandas.DataFrame) -> list[dict[str, Any]]:
        """Write rows of the log as events, in their order."""
        columns = {name: frame[name].tolist() for name in ("event", "timestamp", "rating", "text") if name in frame}
        events: list[dict[str, Any]] = []
        for place, item_id in enumerate(frame["item_id"]):
            event: dict[str, Any] = {"item": self.item(item_id)}
            event |= {name: values[place] for name, values in columns.items() if not _absent(values[place])}
            events.append(event)
        return events

    def request(
        self, user_id: str, history: Sequence[dict[str, Any]], candidates: Sequence[dict[str, Any]] = ()
    ) -> dict[str, Any]:
        """Write a request: who the user is, what they did, what might be recommended."""
        request: dict[str, Any] = {"history": list(history)}
        if self.user(user_id):
            request["user"] = self.user(user_id)
        return {**request, "candidates": list(candidates)} if candidates else request


@dataclass(frozen=True)
class Window:
    """A stretch of a user's events: `start` to `cut` are the history, `cut` to `stop` the targets."""

    start: int
    cut: int
    stop: int


def windows(num_events: int, max_events: int, targets: int, step: int) -> Iterator[Window]:
    """Lay windows over a user's events so that each event is a target of learning.

    Args:
        num_events: Events of the user.
        max_events: Events of a history, at most.
        targets: Events after it that are targets.
        step: How far apart windows begin: `max_events` where every event of the history is learnt (retrieval),
            `targets` where only the targets are.

    Yields:
        Windows with at least one target; a user's first ones have short histories.

    >>> [(w.start, w.cut, w.stop) for w in windows(7, max_events=3, targets=1, step=3)]
    [(0, 3, 4), (3, 6, 7)]
    >>> [(w.start, w.cut, w.stop) for w in windows(5, max_events=3, targets=2, step=2)]
    [(0, 1, 3), (0, 3, 5)]
    >>> [(w.start, w.cut, w.stop) for w in windows(1, max_events=3, targets=2, step=2)]
    [(0, 0, 1)]
    """
    stop = num_events
    found = []
    while stop > 0:
        cut = max(stop - targets, 0)
        found.append(Window(max(cut - max_events, 0), cut, stop))
        stop -= step
    yield from reversed(found)


def training_rows(
    writer: RequestWriter, frame: pandas.DataFrame, processor: M6RecProcessor, task: TaskArguments
) -> list[dict[str, Any]]:
    """Read the training events of all users as rows.

    Args:
        writer: Writes the requests.
        frame: Training events, ordered.
        processor: Reads the requests.
        task: What is learnt.

    Returns:
        Rows of `input_ids`, `item_ids`, labels of targets, and for retrieval `next_items`: the catalogue rows that
        came next after the head of the source and after each event, -100 where it is not learnt here.
    """
    retrieval, scoring = "retrieval" in task.learn, [name for name in task.learn if name != "retrieval"]
    targets = task.targets if scoring else 1
    step = processor.max_events if retrieval else targets
    labels = {name: target_labels(frame, name, task) for name in scoring}
    requests: list[dict[str, Any]] = []
    extras: list[dict[str, Any]] = []
    for user_id, places in histories(frame).items():
        own = frame.iloc[places]
        events, rows = writer.events(own), [writer.rows[item_id] for item_id in own["item_id"]]
        for window in windows(len(events), processor.max_events, targets, step):
            candidates = [event["item"] for event in events[window.cut : window.stop]] if scoring else []
            requests.append(writer.request(user_id, events[window.start : window.cut], candidates))
            asked = places[window.cut : window.stop]
            extra = {f"{name}_labels": values[asked].tolist() for name, values in labels.items()}
            if retrieval:
                extra["next_items"] = rows[window.start : window.cut + 1]
            extras.append(extra)
    readings = read_requests(processor, requests, scoring[0] if scoring else "retrieval", "Reading training rows")
    return [{**row, **extra} for row, extra in zip(readings, extras)]


def read_requests(
    processor: M6RecProcessor, requests: Sequence[dict[str, Any]], task: str, description: str
) -> list[dict[str, Any]]:
    """Read requests into rows of `input_ids` and `item_ids`, with a progress bar."""
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(requests), desc=description, unit="row", disable=len(requests) < READ_AT_ONCE) as bar:
        for start in range(0, len(requests), READ_AT_ONCE):
            readings = processor.read_many(requests[start : start + READ_AT_ONCE], task)
            for reading in readings:
                row: dict[str, Any] = {"input_ids": reading.input_ids}
                if processor.item_rows is not None:
                    row["item_ids"] = reading.item_ids
                rows.append(row)
            bar.update(len(readings))
    return rows


def target_labels(frame: pandas.DataFrame, task: str, arguments: TaskArguments) -> np.ndarray:
    """Return what each event says about a task: N labels, or N x interactions; -100 where it says nothing.

    Raises:
        ValueError: If the log has no column for the task, or all its labels are equal: there is nothing to learn.
    """
    if task == "interaction":
        if "event" not in frame:
            raise ValueError("task 'interaction' is learnt from the events of a log, and this log has none")
        events = frame["event"].to_numpy()
        return np.stack([np.isin(events, names).astype(int) for names in arguments.interactions.values()], 1)
    column = {"click": "label", "rating": "rating"}[task]
    if column not in frame:
        raise ValueError(f"task {task!r} is learnt from column {column!r}, which the interactions do not have")
    values = frame[column].to_numpy(dtype=float)
    known = values[~np.isnan(values)]
    if len(known) and (known == known[0]).all():
        raise ValueError(f"all {len(known)} values of {column!r} are {known[0]:g}: there is nothing to learn from them")
    return np.where(np.isnan(values), UNKNOWN, values)


def _absent(value: Any) -> bool:
    return value is None or value == "" or isinstance(value, float) and np.isnan(value)


__all__ = ["RequestWriter", "Window", "read_requests", "target_labels", "training_rows", "windows"]
