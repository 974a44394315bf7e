"""Users who are made up, from whom a model learns to read what a history says of likes before it knows a real label.

Each likes things with a chance that is theirs, drifts from event to event, and leans towards some words of the items'
texts. Nobody's behaviour is in it; what is left for the labels of a log to tell is how people differ from this.
"""

from typing import Any

import numpy as np
import pandas

from ...values_m6rec import WORD
from ..config.arguments import TaskArguments
from .corpus import item_keys
from .examples import RequestWriter, target_labels
from .item_likes import ITEM_LIKES, percent

LEVEL, DRIFT, TASTE, QUALITY = 1.5, 0.3, 0.7, 0.7
"""Standard deviations, in logits, between users, from an event to the next, between texts, and between items whose
likes are told as their statistic (ours)."""
STATISTICS_SHARE = 0.5
"""Share of the users whose candidates come with statistics, if a recipe has any: the others teach to do without."""
MOST_WORDINGS = 1000


class SyntheticUsers:
    """Makes up users.

    Args:
        writer: Knows the catalogue, and whether statistics are told.
        frame: Training events: an event with a label says how a like or a dislike is told, by its verb and rating, and
            nothing else of it is read.
        task: How events are read as labels; and candidates of a user, at most.
        max_events: Events of a history, at most; half of the histories are as long.

    Raises:
        ValueError: If the training events have likes or dislikes only.
    """

    def __init__(self, writer: RequestWriter, frame: pandas.DataFrame, task: TaskArguments, max_events: int) -> None:
        self.writer, self.targets, self.max_events = writer, task.targets, max_events
        labels = target_labels(frame, "click", task)
        self.wordings = [_wordings(writer, frame[labels == label], label) for label in (0, 1)]
        numbers: dict[str, int] = {}
        texts = (WORD.findall(text.lower()) for text in item_keys(writer.log))
        self._words = [[numbers.setdefault(word, len(numbers)) for word in sorted({*words})] for words in texts]

    def draw(self, item: int, rng: np.random.Generator) -> tuple[dict[str, Any], list[int]]:
        """Return a request about an item (a row of the catalogue) and others, and which of them are liked."""
        length = min(int(rng.integers(2 * self.max_events)), self.max_events)
        others = rng.permutation(np.setdiff1d(rng.integers(len(self.writer.items), size=length + self.targets), item))
        history, more = others[:length], others[length : length + self.targets - 1]
        rows = np.array([*history, item, *more], dtype=int)
        walk = rng.normal(0, LEVEL) + rng.normal(0, DRIFT, len(history) + 1).cumsum()
        logits = np.concatenate([walk, np.full(len(more), walk[-1])]) + self._tastes(rows, rng)
        candidates = [self.writer.items[row] for row in rows[len(history) :]]
        if self.writer.statistics is not None and rng.random() < STATISTICS_SHARE:
            quality = rng.normal(0, QUALITY, len(rows))
            logits += quality
            shares = percent(1 / (1 + np.exp(-quality[len(history) :])))
            candidates = [{**own, "stats": {ITEM_LIKES: share}} for own, share in zip(candidates, shares)]
        liked = (rng.random(len(rows)) < 1 / (1 + np.exp(-logits))).astype(int).tolist()
        told = [self.wordings[like][rng.integers(len(self.wordings[like]))] for like in liked[: len(history)]]
        events = [{"item": self.writer.items[row], **how} for row, how in zip(history, told)]
        return {"history": events, "candidates": candidates}, liked[len(history) :]

    def _tastes(self, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draw a weight for each word: how much the user leans to each item, alike for texts that share words."""
        owners = np.repeat(np.arange(len(rows)), [len(self._words[row]) for row in rows])
        words, places = np.unique([word for row in rows for word in self._words[row]], return_inverse=True)
        sums = np.bincount(owners, rng.normal(0, TASTE, len(words))[places], len(rows))
        return sums / np.sqrt(np.maximum(np.bincount(owners, minlength=len(rows)), 1))


def _wordings(writer: RequestWriter, frame: pandas.DataFrame, label: int) -> list[dict[str, Any]]:
    if frame.empty:
        raise ValueError(
            f"pretraining.objectives 'likes' makes up users who like and dislike, but no training event has label "
            f"{label}: give it the weight 0, or a log with both labels"
        )
    events = writer.events(frame.iloc[:MOST_WORDINGS])
    return [{name: event[name] for name in ("event", "rating") if name in event} for event in events]


__all__ = ["SyntheticUsers"]
