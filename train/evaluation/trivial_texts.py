"""Texts that need no model: one sentence for all, the nearest training text, the user's previous text copied.

BLEU and ROUGE of a single fixed sentence come close to those of a trained model, and users who paste one review many
times make copying hard to beat: each table of written texts contains these rows.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..metrics import plain_text, rouge_1, rouge_l
from ..rows.writing import WritingExample

CENTRAL = 10
"""Number of training texts that one sentence for all is chosen from, on validation."""
DRAWN = 200
"""Number of training texts, and of validation texts, that they are compared with."""
IDENTITIES = ("item_id", "user_id", "role")
"""Fields of a request that say nothing in words."""


def trivial_texts(
    training: Sequence[WritingExample],
    validation: Sequence[WritingExample],
    examples: Sequence[WritingExample],
    seed: int,
) -> dict[str, list[str]]:
    """Return the rows that need no model: name -> a text for each example.

    Args:
        training: Training texts of one writing task.
        validation: Its validation texts, on which one sentence is chosen; if there are none, on training texts.
        examples: Texts to write.
        seed: Seed of the draws.
    """
    if not training:
        return {"previous_text": previous_texts(examples)}
    sentence = one_sentence(training, validation or training, seed)
    return {
        "one_sentence": [sentence] * len(examples),
        "nearest_text": nearest_texts(training, examples),
        "previous_text": previous_texts(examples),
    }


def one_sentence(training: Sequence[WritingExample], validation: Sequence[WritingExample], seed: int) -> str:
    """Return the text that fits all: of the ten most central training texts, the best by ROUGE-L on validation.

    Central are texts with the highest mean ROUGE-1 with the other drawn training texts.
    """
    drawn = _drawn(training, seed)
    texts = list(dict.fromkeys(drawn))
    plain = [plain_text(text) for text in drawn]
    central = sorted(texts, key=lambda text: -rouge_1([plain_text(text)] * len(plain), plain))[:CENTRAL]
    wanted = [plain_text(text) for text in _drawn(validation, seed)]
    return max(central, key=lambda text: rouge_l([plain_text(text)] * len(wanted), wanted))


def nearest_texts(training: Sequence[WritingExample], examples: Sequence[WritingExample]) -> list[str]:
    """Return for each example the text of the training request whose words are most alike (cosine of TF-IDF)."""
    counts = [Counter(words_of(example.request)) for example in training]
    frequency = Counter(word for own in counts for word in own)
    rarity = {word: math.log((1 + len(counts)) / (1 + number)) + 1 for word, number in frequency.items()}
    postings: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row, own in enumerate(counts):
        weights = {word: number * rarity[word] for word, number in own.items()}
        length = math.sqrt(sum(weight**2 for weight in weights.values()))
        for word, weight in weights.items():
            postings[word].append((row, weight / length))
    lists = {word: (np.array([row for row, _ in own]), np.array([w for _, w in own])) for word, own in postings.items()}
    found = []
    for example in examples:
        scores = np.zeros(len(training))
        for word, number in Counter(words_of(example.request)).items():
            if word in lists:
                rows, shares = lists[word]
                scores[rows] += number * rarity[word] * shares
        found.append(training[int(scores.argmax())].text)
    return found


def previous_texts(examples: Sequence[WritingExample]) -> list[str]:
    """Return for each example the last text in its request that the user wrote; empty if there is none."""
    return [_previous(example.request) for example in examples]


def _previous(request: Mapping[str, Any]) -> str:
    turns = request.get("text")
    if isinstance(turns, list):
        return next((str(turn["content"]) for turn in reversed(turns) if turn["role"] == "user"), "")
    events = [event for event in request.get("history") or [] if isinstance(event, Mapping)]
    return next((str(event["text"]) for event in reversed(events) if event.get("text")), "")


def words_of(request: Mapping[str, Any]) -> list[str]:
    """Return the words of all texts in a request: of the user, the history, the facts and the candidates."""
    return plain_text(" ".join(_texts(request))).split()


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, own in value.items():
            if name not in IDENTITIES:
                yield from _texts(own)
    elif isinstance(value, list | tuple):
        for own in value:
            yield from _texts(own)


def _drawn(examples: Sequence[WritingExample], seed: int) -> list[str]:
    places = np.random.default_rng(seed).permutation(len(examples))[:DRAWN]
    return [examples[place].text for place in sorted(places)]


__all__ = ["nearest_texts", "one_sentence", "previous_texts", "trivial_texts", "words_of"]
