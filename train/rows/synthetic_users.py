"""Synthetic users, from whom a model learns to infer likes from a history before it has seen a real label.

Each user has a base probability of liking, which drifts from event to event, and prefers some words of the items'
texts. No real behaviour is used; a log's labels then teach only how real users differ.
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
"""Standard deviations, in logits: between users, from one event to the next, between texts, and between items if
`item_likes` is given (not in the paper)."""
STATISTICS_SHARE = 0.5
"""Share of the users whose candidates have statistics, if a recipe has any; the rest train the case without."""
MOST_WORDINGS = 1000


class SyntheticUsers:
    """Generates synthetic users.

    Args:
        writer: Has the catalogue and the statistics.
        frame: Training events: only the verb and rating of labelled events are used, as the form of likes and dislikes.
        task: How labels are derived from events, and the maximum number of candidates of a user.
        max_events: Maximum number of events in a history; half of the histories have this length.

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
        """Return a request with an item (a catalogue row) and others as candidates, and the candidates' labels."""
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
        expressed = [self.wordings[like][rng.integers(len(self.wordings[like]))] for like in liked[: len(history)]]
        events = [{"item": self.writer.items[row], **how} for row, how in zip(history, expressed)]
        return {"history": events, "candidates": candidates}, liked[len(history) :]

    def _tastes(self, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draw a weight per word; return the preference for each item, correlated for texts with common words."""
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
