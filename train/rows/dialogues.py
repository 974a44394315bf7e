"""Dialogues: what was said and recommended, as texts to write and as items to retrieve.

A reply that names its recommended item is learnt as two texts: up to the slot, where the model does not know the item
yet and decides to recommend; and from the slot on, where it knows the item. Replies without an item, and those of
vocabularies without [SLOT], are one text each.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...tokenization import M6RecProcessor
from ...values_m6rec import IGNORE_INDEX
from ..config.arguments import EvaluationArguments, TaskArguments
from ..data.log import Log
from ..data.splits import PARTS
from ..data.tables import Table, load_table
from .examples import RequestWriter, read_requests

BETWEEN = "\n"
"""Joins consecutive utterances of one speaker, as the processor joins messages."""

YEAR = r"(?:\s*\(\d{4}\))?"


@dataclass(frozen=True)
class Dialogue:
    """One dialogue.

    Attributes:
        name: Its id.
        turns: Chat messages, in which speakers alternate.
        items: For each turn, the id of the item that it recommends; "" if there is none.
    """

    name: str
    turns: list[dict[str, str]]
    items: list[str]


@dataclass(frozen=True)
class WritingExample:
    """A text to generate.

    Attributes:
        name: The writing task.
        request: The request, without the text.
        text: The text; in a conversation the last turn, which `request` then does not hold.
        group: The user or the dialogue: texts of one group are drawn together by the bootstrap.
        slot: In a conversation, where the recommended item's title stands in the text.
        known: Whether the request holds the recommended item, so that the text after the slot is learnt; otherwise the
            text up to the slot is.
    """

    name: str
    request: dict[str, Any]
    text: str
    group: str = ""
    slot: tuple[int, int] | None = None
    known: bool = False

    @property
    def answered(self) -> dict[str, Any]:
        """The request with the text."""
        if self.name != "conversation":
            return {**self.request, "text": self.text}
        content: Any = self.text
        if self.slot is not None:
            before, after = self.text[: self.slot[0]], self.text[self.slot[1] :]
            pieces = [before, {"type": "slot"}, after if self.known else ""]
            content = [piece for piece in pieces if not isinstance(piece, str) or piece.strip()]
        return {**self.request, "messages": [*self.request["messages"], {"role": "assistant", "content": content}]}

    def labels(self, labels: Sequence[int], ids: Sequence[int], slot_token_id: int | None) -> list[int]:
        """Return the labels of the row, without those that the example does not learn."""
        if self.slot is None or slot_token_id is None or slot_token_id not in labels:
            return list(labels)
        place = len(ids) - 1 - list(reversed(ids)).index(slot_token_id)
        if self.known:
            return [IGNORE_INDEX] * (place + 1) + list(labels[place + 1 :])
        return list(labels[: place + 1]) + [IGNORE_INDEX] * (len(ids) - place - 1)


def read_dialogues(
    task: TaskArguments, log: Log, evaluation: EvaluationArguments, seed: int
) -> dict[str, list[Dialogue]]:
    """Read the dialogues of each part: "train", "valid" and "test".

    They come from the table `task.dialogues`, else from the log's data set. Parts are whole dialogues: those that the
    data set names, else drawn by the evaluation's fractions and the seed.

    Raises:
        ValueError: If there are no dialogues, no turn is the system's, or an item is unknown.
    """
    dialogues, parts = _from_table(task) if task.dialogues else _from_log(log)
    unknown = {item for each in dialogues for item in each.items if item} - set(log.items.index)
    if unknown:
        raise ValueError(
            f"dialogues: {len(unknown)} items are not in the items table, such as {sorted(unknown)[0]!r}: add them, or "
            "leave their ids empty"
        )
    if parts is None:
        order = np.random.default_rng(seed).permutation(len(dialogues))
        shares = (evaluation.test_fraction, evaluation.valid_fraction)
        cuts = np.cumsum([round(len(order) * share) for share in shares])
        chosen = dict(zip(("test", "valid", "train"), np.split(order, cuts)))
        return {part: [dialogues[place] for place in sorted(chosen[part])] for part in PARTS}
    return {part: [each for each in dialogues if parts[each.name] == part] for part in PARTS}


def _from_log(log: Log) -> tuple[list[Dialogue], dict[str, str]]:
    if log.dialogues is None:
        raise ValueError(
            "task.writing 'conversation' is learnt from dialogues: name their table as task.dialogues, or a data set "
            "that has them as data.source (inspired, movie-dialogues)"
        )
    frame = log.dialogues
    rows = zip(frame["dialogue_id"], frame["speaker"] == "assistant", frame["text"], frame["item_id"])
    return _dialogues(rows), dict(zip(frame["dialogue_id"], frame["part"]))


def _from_table(task: TaskArguments) -> tuple[list[Dialogue], None]:
    assert task.dialogues is not None
    table = Table("dialogues", load_table(task.dialogues), task.dialogue_columns)
    ids = table.ids("dialogue_id")
    speakers, texts = (table.text(table.column(role)).str.strip() for role in ("speaker", "text"))
    items = table.text(table.column("item_id")).str.strip() if table.has("item_id") else [""] * len(ids)
    system = speakers.str.lower().isin([name.lower() for name in task.system_speakers])
    if not system.any():
        found = ", ".join(sorted(speakers.unique())[:5])
        raise ValueError(
            f"dialogues: no speaker is one of task.system_speakers ({', '.join(task.system_speakers)}); "
            f"the table has {found}"
        )
    return _dialogues(zip(ids, system, texts, items)), None


def _dialogues(rows: Iterable[tuple[str, bool, str, str]]) -> list[Dialogue]:
    """Group utterances by dialogue, leave out empty ones, and join consecutive ones of a speaker."""
    found: dict[str, Dialogue] = {}
    for name, system, text, item in rows:
        own = found.setdefault(name, Dialogue(name, [], []))
        role, item = "assistant" if system else "user", item if system else ""
        if not text.strip():
            continue
        if own.turns and own.turns[-1]["role"] == role:
            own.turns[-1]["content"] += BETWEEN + text.strip()
            own.items[-1] = own.items[-1] or item
        else:
            own.turns.append({"role": role, "content": text.strip()})
            own.items.append(item)
    return [each for each in found.values() if each.turns]


def title_span(text: str, name: str) -> tuple[int, int] | None:
    """Find an item's name in a text, as words of its own, with the year after it if there is one.

    >>> title_span("Try alien (1979)! Aliens is good, too.", "Alien")
    (4, 16)
    """
    found = re.search(rf"(?<!\w){re.escape(name)}(?!\w){YEAR}", text, re.IGNORECASE)
    return None if found is None else found.span()


def dialogue_examples(
    dialogues: Sequence[Dialogue], writer: RequestWriter, processor: M6RecProcessor
) -> Iterator[WritingExample]:
    """Yield the system's turns, each with the last `max_events` turns before it."""
    for each in dialogues:
        for place, (turn, item) in enumerate(zip(each.turns, each.items)):
            if turn["role"] != "assistant":
                continue
            request = {"messages": each.turns[max(0, place - processor.max_events) : place]}
            span = None
            if item and processor.tokenizer.slot_token_id is not None:
                span = title_span(turn["content"], processor.names.item_texts([writer.item(item)])[0])
            if span is None:
                yield WritingExample("conversation", request, turn["content"], each.name)
                continue
            yield WritingExample("conversation", request, turn["content"], each.name, span)
            given = {**request, "candidates": [writer.item(item)]}
            yield WritingExample("conversation", given, turn["content"], each.name, span, known=True)


@dataclass(frozen=True)
class Wanted:
    """Items that the system recommends in dialogues, and the turns before each.

    Attributes:
        names: The dialogue of each.
        requests: Requests with the messages up to the user's last turn.
        named: Catalogue rows of the items recommended before in the dialogue.
        targets: Catalogue rows of the items.
    """

    names: list[str]
    requests: list[dict[str, Any]]
    named: list[list[int]]
    targets: list[int]

    @classmethod
    def of(cls, dialogues: Sequence[Dialogue], writer: RequestWriter, max_turns: int) -> "Wanted":
        """Collect the recommended items that follow a user's turn."""
        found = cls([], [], [], [])
        for each in dialogues:
            rows = [writer.rows[item] if item else None for item in each.items]
            for place, row in enumerate(rows):
                if row is None or not place:
                    continue
                found.names.append(each.name)
                found.requests.append({"messages": each.turns[max(0, place - max_turns) : place]})
                found.named.append([other for other in rows[:place] if other is not None and other != row])
                found.targets.append(row)
        return found

    def rows(self, processor: M6RecProcessor) -> list[dict[str, Any]]:
        """Encode training rows of retrieval: the vector after the last turn has the recommended item as its label."""
        readings = read_requests(processor, self.requests, "retrieval", "Reading dialogues")
        return [
            {**row, "next_items": [IGNORE_INDEX] * len(request["messages"]) + [target], "events": (name, [], [])}
            for row, request, target, name in zip(readings, self.requests, self.targets, self.names)
        ]


def recommended_counts(wanted: Wanted, num_items: int) -> np.ndarray:
    """Count how often each item of the catalogue is recommended."""
    return np.bincount(np.asarray(wanted.targets, dtype=int), minlength=num_items)


__all__ = [
    "Dialogue",
    "Wanted",
    "WritingExample",
    "dialogue_examples",
    "read_dialogues",
    "recommended_counts",
    "title_span",
]
