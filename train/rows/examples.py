"""Requests from a log, and training rows from requests."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ...tokenization import M6RecProcessor
from ...values_m6rec import IGNORE_INDEX, label_field
from ..config.arguments import TaskArguments
from ..data.log import Log
from ..data.splits import histories, shuffled_ties
from ..data.tasks import SCORED
from .item_likes import ITEM_LIKES, ItemLikes

READ_AT_ONCE = 256
"""Number of requests that the processor encodes together."""


FACTS = "facts"


class RequestWriter:
    """Converts a log's events to the processor's input: verb, item, time, rating.

    Args:
        log: The log, with the descriptions of items and users.
        times: Whether events include their times.

    Attributes:
        statistics: Statistics added to candidates' texts, if any.
    """

    def __init__(self, log: Log, times: bool = True) -> None:
        self.log = log
        self._said = ("event", "timestamp", "rating", "text") if times else ("event", "rating", "text")
        self.statistics: ItemLikes | None = None
        self.item_ids = list(log.items.index)
        self.rows = {item_id: row for row, item_id in enumerate(self.item_ids)}
        columns = list(log.items.columns)
        texts = zip(*(log.items[column].tolist() for column in columns)) if columns else ((),) * len(self.item_ids)
        self.items = [
            {**{column: str(text) for column, text in zip(columns, own) if text}, "item_id": item_id}
            for item_id, own in zip(self.item_ids, texts)
        ]
        self._users: dict[str, dict[str, str]] = {}

    def item(self, item_id: str) -> dict[str, str]:
        """Return the fields of an item, including its id."""
        return self.items[self.rows[item_id]]

    def candidates(self, rows: Sequence[int] | np.ndarray, learner: str | None = None) -> list[dict[str, Any]]:
        """Return items of the catalogue as candidates, with their statistics.

        Args:
            rows: Catalogue rows of the items.
            learner: User whose training labels are learnt from this request; None: no training.
        """
        items: list[dict[str, Any]] = [self.items[row] for row in rows]
        if self.statistics is None:
            return items
        shares = self.statistics.of(np.asarray(rows, dtype=int), learner)
        return [{**item, "stats": {ITEM_LIKES: share}} for item, share in zip(items, shares)]

    def user(self, user_id: str) -> dict[str, str]:
        """Return the fields of a user; empty if the user is unknown."""
        if user_id not in self._users:
            self._users[user_id] = self.log.user_fields(user_id)
        return self._users[user_id]

    def events(self, frame: pandas.DataFrame) -> list[dict[str, Any]]:
        """Convert rows of the log to events, in their order."""
        columns = {name: frame[name].tolist() for name in self._said if name in frame}
        events: list[dict[str, Any]] = []
        for place, item_id in enumerate(frame["item_id"]):
            event: dict[str, Any] = {"item": self.item(item_id)}
            event |= {name: values[place] for name, values in columns.items() if not _absent(values[place])}
            events.append(event)
        return events

    def request(
        self, user_id: str, history: Sequence[dict[str, Any]], candidates: Sequence[dict[str, Any]] = ()
    ) -> dict[str, Any]:
        """Make a request: user, history, candidates. The lines of a user's field `facts` are the request's facts."""
        request: dict[str, Any] = {"history": list(history)}
        user = {name: value for name, value in self.user(user_id).items() if name != FACTS}
        if user:
            request["user"] = user
        if FACTS in self.user(user_id):
            request["facts"] = [line for line in self.user(user_id)[FACTS].split("\n") if line.strip()]
        return {**request, "candidates": list(candidates)} if candidates else request


@dataclass(frozen=True)
class Window:
    """A window of a user's events: `start` to `cut` are the history, `cut` to `stop` the targets."""

    start: int
    cut: int
    stop: int


def windows(num_events: int, max_events: int, targets: int = 1, learn_history: bool = False) -> Iterator[Window]:
    """Yield windows of a user's events such that each event is learnt once.

    Args:
        num_events: Number of events of the user.
        max_events: Maximum number of events in a history.
        targets: Number of events after the history that are targets.
        learn_history: The events of the history are learnt together with the targets (retrieval), except its first if
            earlier events are left out; windows are then `max_events` apart. Else they are `targets` apart.

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


class Negatives:
    """Draws items as candidates with label 0 for an event, for logs without negative labels.

    They are drawn uniformly without replacement from the items that occur with the event's verb and that the user has
    never met. By verb, since in a log where artists are listened to and users are followed, an artist who was not
    followed is not informative. A user who has met nearly all of these items gets fewer.

    Args:
        writer: Has the catalogue's rows.
        events: Events that define met and occurring items: in training the training events, so that later ones do not
            leak; in evaluation the whole log, so that no negative is a positive of another part.
        per_event: Number of negatives per event.
        seed: Each draw depends only on (seed, epoch, event).
    """

    def __init__(self, writer: RequestWriter, events: pandas.DataFrame, per_event: int, seed: int) -> None:
        self.per_event, self.seed = per_event, seed
        rows = np.array([writer.rows[item_id] for item_id in events["item_id"]], dtype=int)
        self._met = {user: np.unique(rows[places]) for user, places in histories(events).items()}
        verbs = _verbs(events)
        self._pools = {verb: np.unique(rows[verbs == verb]) for verb in np.unique(verbs)}

    def draw(self, user_id: str, verb: str, event: int, epoch: int) -> np.ndarray:
        """Draw catalogue rows for an event of a user.

        Args:
            user_id: The user.
            verb: The event's verb.
            event: The event's number in the log.
            epoch: Each epoch has its own draws.
        """
        free = np.setdiff1d(self._pools[verb], self._met[user_id], assume_unique=True)
        rng = np.random.default_rng([self.seed, epoch, event])
        return rng.choice(free, min(self.per_event, len(free)), replace=False, shuffle=False)


class Candidates:
    """Converts events to candidates: the event's item with its labels per task, followed by its negatives.

    A negative has label 0 where its event has label 1; if the event's label is unknown, so is the negative's.

    Args:
        writer: Has the catalogue's rows.
        frame: The events.
        names: Scoring tasks.
        task: How labels are derived from events.
        negatives: Draws the negatives; None: no negatives.
    """

    def __init__(
        self,
        writer: RequestWriter,
        frame: pandas.DataFrame,
        names: Iterable[str],
        task: TaskArguments,
        negatives: Negatives | None = None,
    ) -> None:
        self.labels = {name: target_labels(frame, name, task) for name in names}
        self.negatives = negatives
        self._rows = np.array([writer.rows[item_id] for item_id in frame["item_id"]], dtype=int)
        self._users, self._verbs, self._events = frame["user_id"].to_numpy(), _verbs(frame), frame.index.to_numpy()

    @property
    def known(self) -> np.ndarray:
        """Mask of the events with a known label of at least one task."""
        found = np.zeros(len(self._rows), dtype=bool)
        for values in self.labels.values():
            found |= (values != IGNORE_INDEX).reshape(len(values), -1).any(1)
        return found

    def of(self, places: np.ndarray, epoch: int = 0) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return the catalogue rows and the labels of the candidates of the events at these positions."""
        if self.negatives is None:
            return self._rows[places], {name: values[places] for name, values in self.labels.items()}
        rows: list[int] = []
        labels: dict[str, list[Any]] = {name: [] for name in self.labels}
        for place in places:
            own = {name: values[place] for name, values in self.labels.items()}
            against = {name: _against(name, value) for name, value in own.items()}
            drawn = np.empty(0, dtype=int)
            if any((value != IGNORE_INDEX).any() for value in against.values()):
                event = (str(self._users[place]), self._verbs[place], int(self._events[place]))
                drawn = self.negatives.draw(*event, epoch)
            rows += [self._rows[place], *drawn]
            for name in labels:
                labels[name] += [own[name], *[against[name]] * len(drawn)]
        return np.array(rows, dtype=int), {name: np.array(values) for name, values in labels.items()}


def _against(name: str, own: Any) -> np.ndarray:
    """Label of a negative for an event with label `own`; ratings of negatives are unknown."""
    return np.where((np.asarray(own) == 1) & SCORED[name].negatives, 0, IGNORE_INDEX)


def _verbs(frame: pandas.DataFrame) -> np.ndarray:
    return frame["event"].to_numpy(dtype=object) if "event" in frame else np.full(len(frame), "", dtype=object)


class ScoringRows(Dataset):
    """Training rows of scoring tasks: some of a user's events as candidates, the events before them as history.

    Rows are encoded on access, since each epoch draws its own negatives.

    Args:
        writer: Makes the requests.
        frame: Training events, ordered.
        processor: Encodes the requests.
        task: The tasks to learn.
        seed: Seed of the negatives.
    """

    def __init__(
        self, writer: RequestWriter, frame: pandas.DataFrame, processor: M6RecProcessor, task: TaskArguments, seed: int
    ) -> None:
        self.writer, self.processor, self.epoch = writer, processor, 0
        self.names = task.scored
        negatives = Negatives(writer, frame, task.negatives_per_event, seed) if task.negatives_per_event else None
        self.candidates = Candidates(writer, frame, self.names, task, negatives)
        for name, values in self.candidates.labels.items():
            refuse_equal_labels(values, name, task)
        known, self._windows = self.candidates.known, []
        self._events: dict[str, list[dict[str, Any]]] = {}
        for user_id, places in histories(frame).items():
            self._events[user_id] = writer.events(frame.iloc[places])
            for window in windows(len(places), processor.max_events, task.targets):
                targets = places[window.cut : window.stop]
                if known[targets].any():
                    self._windows.append((user_id, window, targets))

    def set_epoch(self, epoch: int) -> None:
        """Draw new negatives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.read([index])[0]

    def read(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Encode several rows at once, which is faster than one by one."""
        requests, labels = [], []
        for index in indices:
            user_id, window, targets = self._windows[index]
            rows, own = self.candidates.of(targets, self.epoch)
            history = self._events[user_id][window.start : window.cut]
            requests.append(self.writer.request(user_id, history, self.writer.candidates(rows, user_id)))
            labels.append({label_field(name): values.tolist() for name, values in own.items()})
        readings = read_requests(self.processor, requests, self.names[0], "Reading training rows of candidates")
        return [{**row, **own} for row, own in zip(readings, labels)]


def training_rows(
    writer: RequestWriter,
    frame: pandas.DataFrame,
    processor: M6RecProcessor,
    task: TaskArguments,
    bidirectional: bool = False,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Convert the training events of all users to rows: rows of retrieval and rows of scoring tasks.

    Args:
        writer: Makes the requests.
        frame: Training events, ordered.
        processor: Encodes the requests.
        task: The tasks to learn.
        bidirectional: Attention over the history is bidirectional, so that only the event after its end can be learnt.
        seed: Seed of the negatives, which are here those of the first epoch.

    Returns:
        Rows of `input_ids` and `item_embedding_ids`; with labels of targets, or for retrieval with `next_items`: the
        catalogue rows of the next item after the head of the source and after each event, -100 without a label.
    """
    rows = retrieval_rows(writer, frame, processor, bidirectional) if "retrieval" in task.learn else []
    if task.scored:
        scoring = ScoringRows(writer, frame, processor, task, seed)
        rows += scoring.read(range(len(scoring)))
    return rows


def retrieval_rows(
    writer: RequestWriter, frame: pandas.DataFrame, processor: M6RecProcessor, bidirectional: bool
) -> list[dict[str, Any]]:
    """Convert the training events of all users to rows of retrieval; see `training_rows`."""
    requests, extras = [], []
    for user_id, places in histories(frame).items():
        own = frame.iloc[places]
        events, rows = writer.events(own), [writer.rows[item_id] for item_id in own["item_id"]]
        times = own["timestamp"].tolist()
        for window in windows(len(events), processor.max_events, learn_history=not bidirectional):
            requests.append(writer.request(user_id, events[window.start : window.cut]))
            following = rows[window.start : window.cut + 1]
            if window.start:  # earlier events are left out: the head predicts only a user's first event
                following[0] = IGNORE_INDEX
            met = slice(window.start, window.cut)
            extras.append({"next_items": following, "events": (user_id, rows[met], times[met])})
    readings = read_requests(processor, requests, "retrieval", "Reading training rows of retrieval")
    return [{**row, **extra} for row, extra in zip(readings, extras)]


class RetrievalRows(Dataset):
    """Training rows of retrieval where events with equal times get a new order in each epoch; see `training_rows`.

    Args:
        writer: Makes the requests.
        frame: Training events, ordered.
        processor: Encodes the requests.
        bidirectional: Attention over the history is bidirectional.
        seed: Seed of the orders.
    """

    def __init__(
        self, writer: RequestWriter, frame: pandas.DataFrame, processor: M6RecProcessor, bidirectional: bool, seed: int
    ) -> None:
        self.source, self.seed, self.epoch = (writer, frame, processor, bidirectional), seed, -1
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw a new order and encode the rows."""
        if epoch == self.epoch:
            return
        writer, frame, processor, bidirectional = self.source
        self.rows = retrieval_rows(writer, shuffled_ties(frame, self.seed, epoch), processor, bidirectional)
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def read_requests(
    processor: M6RecProcessor, requests: Sequence[dict[str, Any]], task: str, description: str
) -> list[dict[str, Any]]:
    """Encode requests as rows of `input_ids` and `item_embedding_ids`, with a progress bar."""
    rows: list[dict[str, Any]] = []
    with tqdm(
        total=len(requests), desc=description, unit="row", disable=True if len(requests) < READ_AT_ONCE else None
    ) as bar:
        for start in range(0, len(requests), READ_AT_ONCE):
            readings = processor.read_many(requests[start : start + READ_AT_ONCE], task)
            for reading in readings:
                row: dict[str, Any] = {"input_ids": reading.input_ids}
                if processor.item_rows is not None:
                    row["item_embedding_ids"] = reading.item_embedding_ids
                rows.append(row)
            bar.update(len(readings))
    return rows


def target_labels(frame: pandas.DataFrame, task: str, arguments: TaskArguments) -> np.ndarray:
    """Return the events' labels of a task: N labels, or N x I parallel labels; -100 if unknown.

    With drawn negatives (`negatives_per_event`) the log has no negative labels: an event without a label is a click,
    and an event has labels only for its own interactions.

    Raises:
        ValueError: If the log has no column for the task.
    """
    row, drawn = SCORED[task], bool(arguments.negatives_per_event)
    if row.column not in frame and row.implied and drawn:
        return np.ones(len(frame))
    if row.column not in frame:
        hint = ", unless task.negatives_per_event draws what was not clicked" if row.implied else ""
        raise ValueError(
            f"task {task!r} is learnt from column {row.column!r}, which the interactions do not have{hint}"
        )
    return row.labels(frame[row.column].to_numpy(), row.names(arguments), drawn)


def item_likes(writer: RequestWriter, frame: pandas.DataFrame, task: TaskArguments, seed: int) -> ItemLikes:
    """Count the likes of each item in training events.

    Raises:
        ValueError: If the log has no labels, or no negative labels.
    """
    if task.negatives_per_event:
        raise ValueError(
            f"text.statistics 'item_likes' counts likes and dislikes, but with task.negatives_per_event="
            f"{task.negatives_per_event} the log holds no dislikes: leave one of them out"
        )
    labels = target_labels(frame, "click", task)
    known = labels != IGNORE_INDEX
    rows = np.array([writer.rows[item_id] for item_id in frame["item_id"]], dtype=int)
    users = frame["user_id"].to_numpy(dtype=object)
    return ItemLikes(users[known], rows[known], labels[known], len(writer.items), seed)


def refuse_equal_labels(labels: np.ndarray, task: str, arguments: TaskArguments) -> None:
    """Raise if all known labels of a task, or of one of its names, are equal, so that nothing can be learnt."""
    row = SCORED[task]
    named = zip(row.names(arguments), labels.T) if row.names_in else [(task, labels)]
    for name, values in named:
        known = np.unique(values[values != IGNORE_INDEX])
        completed = row.negatives and 1 in known
        if arguments.negatives_per_event and completed:
            continue
        if len(known) < 2:
            found = f"are {known[0]:g}" if len(known) else "are missing"
            hint = "; task.negatives_per_event draws what was not met" if completed else ""
            raise ValueError(
                f"all labels of {name!r} {found} in the training part: there is nothing to learn from them{hint}"
            )


def _absent(value: Any) -> bool:
    return value is None or value == "" or isinstance(value, float) and np.isnan(value)


__all__ = [
    "Candidates",
    "Negatives",
    "RequestWriter",
    "RetrievalRows",
    "ScoringRows",
    "Window",
    "item_likes",
    "read_requests",
    "refuse_equal_labels",
    "retrieval_rows",
    "target_labels",
    "training_rows",
    "windows",
]
