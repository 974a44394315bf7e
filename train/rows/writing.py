"""Writing tasks: explanations, queries, items' texts and a conversation's answers as rows.

`task.writing` selects them from a log: the text of an event is an explanation (a review, a reason) or a query, by the
event's verb; the text of `item_text` and `next_item` is the formatted item, that of `content` one of its fields;
answers come from dialogues. The source of each is the events (or turns) before it, at most `max_events`.

If a row exceeds `max_length`, the processor drops the oldest events, then fields of the item, then the ends of the
longest texts. A truncated text is learnt without an end token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas

from ...catalogue_m6rec import item_texts
from ...tokenization import M6RecProcessor
from ...values_m6rec import IGNORE_INDEX
from ..config.arguments import EvaluationArguments, TaskArguments
from ..data.splits import Split, histories
from .dialogues import WritingExample, dialogue_examples, read_dialogues
from .examples import READ_AT_ONCE, RequestWriter, windows
from .held_out import all_events, eval_queries

OF_ITEMS = ("item_text", "next_item", "content")
"""Writing tasks whose texts are those of items."""


@dataclass(frozen=True)
class WritingExamples:
    """Texts to generate, and their encoded rows.

    Attributes:
        examples: The texts.
        rows: `input_ids`, `labels` and `item_embedding_ids` of each.
    """

    examples: list[WritingExample]
    rows: list[dict[str, Any]]

    def of(self, name: str) -> list[int]:
        """Return the indices of a writing task's examples."""
        return [place for place, example in enumerate(self.examples) if example.name == name]


class TextSource:
    """Selects the texts of a log for a writing task, and makes their requests.

    Args:
        writer: Makes the requests.
        processor: Formats the items.
        task: Defines the texts of events.
    """

    def __init__(self, writer: RequestWriter, processor: M6RecProcessor, task: TaskArguments) -> None:
        self.writer, self.processor, self.task = writer, processor, task
        self.names = [name for name in task.writing if name != "conversation"]
        self._items = item_texts(processor, writer.items) if {"item_text", "next_item"} & {*self.names} else []

    def labelled(self, frame: pandas.DataFrame, name: str) -> np.ndarray:
        """Return the mask of events with a text for the task.

        Raises:
            ValueError: If the log lacks a column for it.
        """
        verbs = self.task.writing[name]
        needed = ["text"] * (name not in OF_ITEMS) + ["event"] * bool(verbs)
        for column in needed:
            if column not in frame:
                raise ValueError(f"task.writing {name!r} is learnt from column {column!r}, which the interactions lack")
        found = frame["event"].isin(verbs).to_numpy() if verbs else np.ones(len(frame), dtype=bool)
        return found if name in OF_ITEMS else found & (frame["text"] != "").to_numpy()

    def example(self, name: str, user_id: str, history: list[dict[str, Any]], event: dict[str, Any]) -> WritingExample:
        """Make the example of one event of `RequestWriter.events`."""
        candidates, text = [], event.get("text", "")
        if name == "explanation":
            candidates = [event["item"]]
        elif name == "content":  # each event of a user asks for another field
            fields = [field for field in event["item"] if field != "item_id"]
            field = fields[len(history) % len(fields)]
            candidates, text = [{**event["item"], field: None}], event["item"][field]
        elif name in OF_ITEMS:
            text = self._items[self.writer.rows[event["item"]["item_id"]]]
        return WritingExample(name, self.writer.request(user_id, history, candidates), text, user_id)

    def training(self, frame: pandas.DataFrame) -> Iterator[WritingExample]:
        """Yield the examples of the training events."""
        labelled = {name: self.labelled(frame, name) for name in self.names}
        for name, places in labelled.items():
            if not places.any():
                raise ValueError(
                    f"task.writing {name!r}: no training event of {self.task.writing[name] or 'any kind'} has a text"
                )
        for user_id, places in histories(frame).items():
            events = self.writer.events(frame.iloc[places])
            for window in windows(len(places), self.processor.max_events):
                for name in self.names:
                    if labelled[name][places[window.cut]]:
                        past = events[window.start : window.cut]
                        yield self.example(name, user_id, past, events[window.cut])

    def held_out(self, split: Split, part: str, evaluation: EvaluationArguments, seed: int) -> Iterator[WritingExample]:
        """Yield the examples of a part, with the histories of `eval_queries`."""
        everything = all_events(split)
        for name in self.names:
            labelled = self.labelled(everything, name)
            for question in eval_queries(split, part, labelled, self.processor.max_events, evaluation, seed):
                history = self.writer.events(everything.iloc[question.history])
                for event in self.writer.events(everything.iloc[question.held_out]):
                    yield self.example(name, question.user_id, history, event)


def writing_examples(
    writer: RequestWriter,
    processor: M6RecProcessor,
    split: Split,
    part: str,
    task: TaskArguments,
    evaluation: EvaluationArguments,
    seed: int,
) -> WritingExamples:
    """Make the examples of all writing tasks in a part: "train", "valid" or "test"."""
    source = TextSource(writer, processor, task)
    if part == "train":
        found = list(source.training(split.train))
    else:
        found = list(source.held_out(split, part, evaluation, seed))
    if "conversation" in task.writing:
        dialogues = read_dialogues(task, writer.log, evaluation, seed)[part]
        found += dialogue_examples(dialogues, writer, processor)
    rows: list[dict[str, Any]] = [{}] * len(found)
    for name in task.writing:
        places = [place for place, example in enumerate(found) if example.name == name]
        for start in range(0, len(places), READ_AT_ONCE):
            own = places[start : start + READ_AT_ONCE]
            for place, row in zip(own, encoded([found[place] for place in own], processor)):
                rows[place] = row
    return WritingExamples(found, rows)


def encoded(examples: Sequence[WritingExample], processor: M6RecProcessor) -> Iterator[dict[str, Any]]:
    """Yield the labelled row of each example of one writing task."""
    readings = processor.read_many([example.answered for example in examples], examples[0].name)
    slot = processor.tokenizer.slot_token_id
    for example, reading in zip(examples, readings):
        labels = example.labels(processor.labels(reading), reading.input_ids, slot)
        if ("text", "text") in reading.dropped.fields:
            labels[-1] = IGNORE_INDEX  # the row's [EOS]: the text was truncated
        row: dict[str, Any] = {"input_ids": reading.input_ids, "labels": labels}
        yield row if processor.item_rows is None else {**row, "item_embedding_ids": reading.item_embedding_ids}


__all__ = [
    "TextSource",
    "WritingExample",
    "WritingExamples",
    "encoded",
    "writing_examples",
]
