"""How well items that dialogues recommend are found from what was said before."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...tokenization import M6RecProcessor
from ..rows.dialogues import Wanted
from ..rows.examples import read_requests
from .reports import RankingExamples

POPULARITY_WEIGHT = 0.05
"""Weight of the logarithm of an item's count in the rule `words`, which orders items without a common word."""


def dialogue_ranking(wanted: Wanted, processor: M6RecProcessor, counts: np.ndarray) -> RankingExamples:
    """Make ranking examples: each recommended item against the whole catalogue, but for items recommended before.

    Args:
        wanted: The recommended items and the messages before them.
        processor: Encodes the messages.
        counts: Training events and recommendations of each item.
    """
    targets = np.asarray(wanted.targets, dtype=int)
    rows = read_requests(processor, wanted.requests, "retrieval", "Reading dialogues")
    named = [np.asarray(own, dtype=int) for own in wanted.named]
    return RankingExamples(wanted.names, rows, named, targets, counts[targets] == 0)


def rules(wanted: Wanted, texts: Sequence[str], counts: np.ndarray) -> dict[str, np.ndarray]:
    """Score the catalogue by rules that need no training: `popularity`, and `words` of the talk in items' texts.

    Returns:
        Name -> U x M scores.
    """
    popularity = np.log1p(np.asarray(counts, dtype=float))
    words = _Words(texts)
    said = [" ".join(_text(message) for message in request["messages"]) for request in wanted.requests]
    return {
        "popularity": np.tile(popularity, (len(said), 1)),
        "words": np.stack([words.scores(text) for text in said]) + POPULARITY_WEIGHT * popularity,
    }


class _Words:
    """TF-IDF similarity of a text to each of the items' texts."""

    def __init__(self, texts: Sequence[str]) -> None:
        bags = [set(_words(text)) for text in texts]
        counts = Counter(word for bag in bags for word in bag)
        self._idf = {word: float(np.log(len(texts) / count)) + 1.0 for word, count in counts.items()}
        self._rows: dict[str, list[int]] = {}
        for row, bag in enumerate(bags):
            for word in bag:
                self._rows.setdefault(word, []).append(row)
        self._norms = np.array([max(sum(self._idf[word] ** 2 for word in bag), 1e-12) ** 0.5 for bag in bags])

    def scores(self, text: str) -> np.ndarray:
        """Return the cosine with each item, up to the text's own norm."""
        found = np.zeros(len(self._norms))
        for word in set(_words(text)) & self._rows.keys():
            found[self._rows[word]] += self._idf[word] ** 2
        found /= self._norms
        return found / max(found.max(), 1e-12)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _text(message: dict[str, Any]) -> str:
    return str(message["content"])


__all__ = ["dialogue_ranking", "rules"]
