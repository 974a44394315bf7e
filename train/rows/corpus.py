"""Pretraining data: raw texts, the items' texts and histories, each text in the training or the validation part.

A hash of a text decides whether it is held out. So a text is always in the same part, independent of source and order,
also for streams.
"""

import glob
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas
from datasets import Dataset as Table
from datasets import IterableDataset as Stream
from datasets import load_dataset

from ...catalogue_m6rec import item_texts
from ...tokenization import M6RecProcessor
from ..data.log import Log
from ..data.splits import histories
from ..data.table_files import FORMATS, check_file, csv_options
from ..data.tables import load_table
from .examples import RequestWriter, windows

ITEMS, HISTORIES = "items", "histories"
SHUFFLED = 1000
"""Size of the shuffle buffer of a stream, in texts."""
VOCABULARY_TEXTS, VOCABULARY_CHARACTERS = 100_000, 10_000
"""Texts per source on which a new tokenizer is trained, and characters of each: at most 1 GB per source."""
Document = dict[str, Any]
"""`text`, and `item` if it is an item's; or `request`: a history, with the user's next events as candidates."""


def held_out(text: str, fraction: float) -> bool:
    """Return whether a text belongs to the validation part.

    >>> sum(held_out(str(number), 0.1) for number in range(1000))
    106
    """
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


class Source:
    """Documents of one source with random access, in memory or on disk.

    Args:
        name: A location, `items` or `histories`.
        documents: All of them.
        keys: Text to hash of each document; a document with an empty key is left out.
        valid_fraction: Share held out.
    """

    def __init__(self, name: str, documents: Sequence[Document], keys: Iterable[str], valid_fraction: float) -> None:
        self.name, self.documents = name, documents
        parts = [held_out(key, valid_fraction) if key.strip() else None for key in keys]
        self.train = np.array([row for row, part in enumerate(parts) if part is False], dtype=int)
        self.valid = np.array([row for row, part in enumerate(parts) if part], dtype=int)

    def __len__(self) -> int:
        return len(self.train)

    def __getitem__(self, index: int) -> Document:
        return self.documents[int(self.train[index])]

    def order(self, rng: np.random.Generator) -> Iterator[int]:
        """Yield indices of training documents without end, in a new order in each pass."""
        while True:
            yield from rng.permutation(len(self)).tolist()

    def walk(self, seed: int) -> Iterator[Document]:
        """Yield training documents without end."""
        return map(self.__getitem__, self.order(np.random.default_rng(seed)))

    def validation(self, rows: int, seed: int) -> list[Document]:
        """Return at most `rows` held-out documents, drawn by the seed."""
        chosen = np.random.default_rng(seed).permutation(self.valid)[:rows]
        return [self.documents[int(row)] for row in chosen]


class StreamedSource:
    """Streamed raw texts.

    Args:
        name: The location.
        read: Starts reading the texts from the beginning.
        valid_fraction: Share held out.
    """

    def __init__(self, name: str, read: Callable[[], Iterator[str]], valid_fraction: float) -> None:
        self.name, self.read, self.valid_fraction = name, read, valid_fraction

    def __len__(self) -> int:
        return 1  # unknown

    def walk(self, seed: int) -> Iterator[Document]:
        """Yield training documents without end; each is drawn from a buffer of `SHUFFLED` documents.

        Raises:
            ValueError: If there is no training document.
        """
        rng, waiting = np.random.default_rng(seed), []
        while True:
            found = False
            for text in self._part(valid=False):
                found = True
                waiting.append(text)
                if len(waiting) > SHUFFLED:
                    place = int(rng.integers(len(waiting)))
                    waiting[place], waiting[-1] = waiting[-1], waiting[place]
                    yield {"text": waiting.pop()}
            if not found:
                raise ValueError(f"{self.name} holds no text to train on")
            yield from ({"text": waiting[place]} for place in rng.permutation(len(waiting)).tolist())
            waiting = []

    def validation(self, rows: int, seed: int) -> list[Document]:
        """Return the first held-out documents, at most `rows`."""
        return [{"text": text} for text, _ in zip(self._part(valid=True), range(rows))]

    def _part(self, valid: bool) -> Iterator[str]:
        return (text for text in self.read() if text.strip() and held_out(text, self.valid_fraction) == valid)


AnySource = Source | StreamedSource


@dataclass(frozen=True)
class _Texts(Sequence[Document]):
    """A column of texts on disk."""

    rows: Table
    column: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return {"text": self.rows[index][self.column] or ""}

    def keys(self) -> Iterator[str]:
        for batch in self.rows.iter(1000):
            yield from (text or "" for text in batch[self.column])


class _Histories(Sequence[Document]):
    """Windows of the users' training events: a history and the next events."""

    def __init__(self, writer: RequestWriter, frame: pandas.DataFrame, max_events: int, targets: int) -> None:
        self.writer, self.frame, self.places = writer, frame, histories(frame)
        self.windows = [
            (user, window)
            for user, places in self.places.items()
            for window in windows(len(places), max_events, targets)
        ]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: Any) -> Any:
        user, window = self.windows[index]
        events = self.writer.events(self.frame.iloc[self.places[user][window.start : window.stop]])
        done, following = events[: window.cut - window.start], events[window.cut - window.start :]
        return {"request": self.writer.request(user, done, [event["item"] for event in following])}


def raw_source(location: str, valid_fraction: float, streaming: bool = False) -> AnySource:
    """Open raw texts.

    Args:
        location: A .txt file with one text per line; or a table as `load_table` accepts it, with `#column` appended.
            Without it the column is `text`, or the only one that holds texts.
        valid_fraction: Share held out.
        streaming: Stream the texts.

    Raises:
        FileNotFoundError: If there is no such file or table.
        ValueError: If it holds no text, or no such column.
    """
    place, _, column = location.rpartition("#") if "#" in location else (location, "", "")
    place = os.path.expanduser(place)
    rows = _stream(place) if streaming else _table(place)
    column = _text_column(rows, column, location)
    rows = rows.select_columns([column])
    if isinstance(rows, Stream):
        return StreamedSource(location, lambda: (str(row[column] or "") for row in rows), valid_fraction)
    texts = _Texts(rows, column)
    source = Source(location, texts, texts.keys(), valid_fraction)
    if not len(source):
        raise ValueError(f"{location} holds no text to train on ({len(rows)} rows, {len(source.valid)} held out)")
    return source


def item_source(log: Log, writer: RequestWriter, processor: M6RecProcessor, valid_fraction: float) -> Source:
    """Return the items of a log, each with its text as in requests."""
    texts = item_texts(processor, writer.items)
    documents = [{"text": text, "item": item} for text, item in zip(texts, writer.items)]
    return Source(ITEMS, documents, item_keys(log), valid_fraction)


def item_keys(log: Log) -> list[str]:
    """Return the text to hash of each item: its fields, before they are formatted."""
    return [" ".join(log.item_fields(item_id).values()) for item_id in log.items.index]


def history_source(
    writer: RequestWriter, frame: pandas.DataFrame, max_events: int, targets: int, valid_fraction: float
) -> Source:
    """Return the histories of training events; all histories of a user are in one part.

    Args:
        writer: Writes requests.
        frame: Training events only.
        max_events: Maximum number of events in a history.
        targets: Number of next events to generate.
        valid_fraction: Share of the users held out.
    """
    found = _Histories(writer, frame, max_events, targets)
    return Source(HISTORIES, found, (user for user, _ in found.windows), valid_fraction)


def vocabulary_texts(source: AnySource, seed: int) -> Iterator[str]:
    """Yield training texts of a source for a new tokenizer: a random sample, or the first ones of a stream."""
    if isinstance(source, StreamedSource):
        texts: Iterable[str] = source._part(valid=False)
    else:
        drawn = np.random.default_rng(seed).permutation(len(source)).tolist()
        texts = (source[index]["text"] for index in drawn)
    return (text[:VOCABULARY_CHARACTERS] for text, _ in zip(texts, range(VOCABULARY_TEXTS)))


def _table(place: str) -> Table:
    if Path(place).suffix != ".txt":
        return load_table(place)
    return load_dataset("text", data_files=_existing(place), split="train")


def _stream(place: str) -> Table | Stream:
    """Open a table without reading it; a folder saved by `datasets` is read from disk on access."""
    path = Path(place)
    if path.suffix == ".txt":
        return load_dataset("text", data_files=_existing(place), split="train", streaming=True)
    if path.is_file() and (kind := FORMATS.get(path.suffix.lower())):
        check_file(path, kind)
        options = csv_options(path) if kind == "csv" else {}
        return load_dataset(kind, data_files=_existing(place), split="train", streaming=True, **options)
    name, *parts = place.split(":")
    if path.is_file() or Path(name).is_dir() or not parts:
        return load_table(place)
    return load_dataset(name, *parts[:-1], split=parts[-1], streaming=True)


def _existing(place: str) -> str:
    if not Path(place).is_file():
        raise FileNotFoundError(f"there is no file {place!r}: pretraining.texts names files, folders or Hub datasets")
    return glob.escape(place)


def _text_column(rows: Table | Stream, column: str, location: str) -> str:
    kinds = {} if rows.features is None else {name: getattr(kind, "dtype", "") for name, kind in rows.features.items()}
    texts = [name for name, kind in kinds.items() if kind in ("string", "large_string")]
    if column and (column in texts or not kinds):
        return column
    if not column and ("text" in texts or not kinds):
        return "text"
    if not column and len(texts) == 1:
        return texts[0]
    given = f"no column {column!r} of texts" if column else "no column of texts is named"
    raise ValueError(
        f"{location}: {given}; write it behind a #, one of {', '.join(texts) or 'none: there are no texts'}"
    )


__all__ = [
    "HISTORIES",
    "ITEMS",
    "AnySource",
    "Document",
    "Source",
    "StreamedSource",
    "held_out",
    "history_source",
    "item_keys",
    "item_source",
    "raw_source",
    "vocabulary_texts",
]
