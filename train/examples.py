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


def windows(num_events: int, max_events: int, targets: int = 1, learn_history: bool = False) -> Iterator[Window]:
    """Lay windows over a user's events so that each event is learnt once.

    Args:
        num_events: Events of the user.
        max_events: Events of a history, at most.
        targets: Events after it that are targets.
        learn_history: The events of the history are learnt along with the targets (retrieval), all but its first where
            earlier ones are left out: then windows are `max_events` apart. Else they are `targets` apart.

    Yields:
        Windows with at least one target; a user's first ones have short histories.

    >>> [(w.start, w.cut, w.stop) for w in windows(7, max_events=3, learn_history=True)]
    [(0, 3, 4), (3, 6, 7)]
    >>> [(w.start, w.cut, w.stop) for w in windows(5, max_events=3, targets=2)]
    [(0, 0, 1), (0, 1, 3), (0, 3, 5)]
    >>> [(w.start, w.cut, w.stop) for w in windows(1, max_events=3, targets=2)]
    [(0, 0, 1)]
    """
    stop = num_events
    found = []
    while stop > 0:
        cut = max(stop - targets, 0)
        start = max(cut - max_events, 0)
        found.append(Window(start, cut, stop))
        if learn_history:
            stop = start + 1 if start else 0
        else:
            stop = cut
    yield from reversed(found)


def training_rows(
    writer: RequestWriter,
    frame: pandas.DataFrame,
    processor: M6RecProcessor,
    task: TaskArguments,
    bidirectional: bool = False,
) -> list[dict[str, Any]]:
    """Read the training events of all users as rows: some for retrieval, others whose candidates are scored.

    Args:
        writer: Writes the requests.
        frame: Training events, ordered.
        processor: Reads the requests.
        task: What is learnt.
        bidirectional: History is read in both directions, so that only what comes after its end can be learnt.

    Returns:
        Rows of `input_ids` and `item_ids`; with labels of targets, or for retrieval with `next_items`: the catalogue
        rows that came next after the head of the source and after each event, -100 where it is not learnt here.
    """
    rows = _retrieval_rows(writer, frame, processor, bidirectional) if "retrieval" in task.learn else []
    scoring = [name for name in task.learn if name != "retrieval"]
    return rows + _scoring_rows(writer, frame, processor, task, scoring) if scoring else rows


def _retrieval_rows(
    writer: RequestWriter, frame: pandas.DataFrame, processor: M6RecProcessor, bidirectional: bool
) -> list[dict[str, Any]]:
    requests, extras = [], []
    for user_id, places in histories(frame).items():
        own = frame.iloc[places]
        events, rows = writer.events(own), [writer.rows[item_id] for item_id in own["item_id"]]
        for window in windows(len(events), processor.max_events, learn_history=not bidirectional):
            requests.append(writer.request(user_id, events[window.start : window.cut]))
            following = rows[window.start : window.cut + 1]
            if window.start:  # the head has not read what came before: only a user's first event is learnt there
                following[0] = UNKNOWN
            extras.append({"next_items": following})
    readings = read_requests(processor, requests, "retrieval", "Reading training rows of retrieval")
    return [{**row, **extra} for row, extra in zip(readings, extras)]


def _scoring_rows(
    writer: RequestWriter, frame: pandas.DataFrame, processor: M6RecProcessor, task: TaskArguments, names: list[str]
) -> list[dict[str, Any]]:
    labels = {name: target_labels(frame, name, task) for name in names}
    for name, values in labels.items():
        _refuse_equal(values, name, task)
    requests, extras = [], []
    for user_id, places in histories(frame).items():
        events = writer.events(frame.iloc[places])
        for window in windows(len(events), processor.max_events, task.targets):
            candidates = [event["item"] for event in events[window.cut : window.stop]]
            requests.append(writer.request(user_id, events[window.start : window.cut], candidates))
            asked = places[window.cut : window.stop]
            extras.append({f"{name}_labels": values[asked].tolist() for name, values in labels.items()})
    readings = read_requests(processor, requests, names[0], "Reading training rows of candidates")
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
        ValueError: If the log has no column for the task.
    """
    column = {"click": "label", "rating": "rating", "interaction": "event"}[task]
    if column not in frame:
        raise ValueError(f"task {task!r} is learnt from column {column!r}, which the interactions do not have")
    if task == "interaction":
        events = frame[column].to_numpy()
        labels = np.stack([np.isin(events, names).astype(int) for names in arguments.interactions.values()], 1)
        return np.where((events == "")[:, None], UNKNOWN, labels)
    values = frame[column].to_numpy(dtype=float)
    return np.where(np.isnan(values), UNKNOWN, values)


def _refuse_equal(labels: np.ndarray, task: str, arguments: TaskArguments) -> None:
    """Raise if all known labels of a task, or of one of its interactions, are equal: there is nothing to learn."""
    named = zip(arguments.interactions, labels.T) if task == "interaction" else [(task, labels)]
    for name, values in named:
        known = np.unique(values[values != UNKNOWN])
        if len(known) < 2:
            found = f"are {known[0]:g}" if len(known) else "are missing"
            raise ValueError(
                f"all labels of {name!r} {found} in the training part: there is nothing to learn from them"
            )


def _absent(value: Any) -> bool:
    return value is None or value == "" or isinstance(value, float) and np.isnan(value)


__all__ = ["RequestWriter", "Window", "read_requests", "target_labels", "training_rows", "windows"]
