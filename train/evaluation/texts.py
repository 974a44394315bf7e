"""Metrics of generated texts: perplexity, and a comparison with the texts of the log."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ...modeling_m6rec import M6RecForRecommendation
from ...tokenization import M6RecProcessor
from ...values_m6rec import IGNORE_INDEX
from ...writing_m6rec import Vocabulary, Writer
from ..config.arguments import EvaluationArguments
from ..metrics import writing_intervals, writing_report
from ..rows.collator import M6RecDataCollator
from ..rows.writing import WritingExample, WritingExamples, encoded
from .checked_texts import CHECKED, checks_report, contributions
from .trivial_texts import trivial_texts
from .verdicts import OWN

INTERVALS = "intervals"
SOURCE = ("user", "facts", "history", "now", "text", "messages")
"""Keys of a request that are its source."""
NEW_TOKENS = 64
"""Maximum number of tokens of a text generated for the report."""


def measure_writing(
    model: M6RecForRecommendation, examples: WritingExamples, collator: M6RecDataCollator, bf16: bool = False
) -> dict[str, Any]:
    """Return the perplexity per token, over all texts and for each writing task (`explanation/perplexity`)."""
    names = dict.fromkeys(example.name for example in examples.examples)
    report: dict[str, Any] = {"perplexity": perplexity(model, examples.rows, collator, bf16)}
    for name in names:
        own = [examples.rows[place] for place in examples.of(name)]
        report[f"{name}/perplexity"] = perplexity(model, own, collator, bf16)
    return {**report, "examples": len(examples.rows)}


def unigram_perplexity(training: WritingExamples, examples: WritingExamples, vocab_size: int) -> dict[str, Any]:
    """Measure the unigram baseline: token frequencies with add-one smoothing."""
    counts = np.ones(vocab_size)
    for row in training.rows:
        np.add.at(counts, _written(row), 1)
    costs = -np.log(counts / counts.sum())
    tokens = np.concatenate([_written(row) for row in examples.rows])
    return {"perplexity": math.exp(costs[tokens].mean()), "examples": len(examples.rows)}


def _written(row: dict[str, Any]) -> np.ndarray:
    labels = np.array(row["labels"])
    return labels[labels != IGNORE_INDEX]


def measure_texts(
    model: M6RecForRecommendation,
    examples: WritingExamples,
    known: tuple[WritingExamples, WritingExamples],
    collator: M6RecDataCollator,
    evaluation: EvaluationArguments,
    seed: int,
    items: Sequence[Mapping[str, Any]] = (),
) -> dict[str, dict[str, Any]]:
    """Generate texts and compare them with the log's, as do rows that need no model (`trivial_texts`).

    Args:
        model: Generates greedily, at most `NEW_TOKENS` tokens.
        examples: The texts to generate.
        known: Training and validation texts, for the rows that need no model.
        collator: Its processor encodes requests and decodes answers.
        evaluation: `max_texts` texts of each writing task are drawn; `text_features` are the features they may name.
        seed: Seed of the draw.
        items: The catalogue's items, whose words explanations are checked by.

    Returns:
        Name of the row -> metrics (`explanation/rouge_l`, ...), with their `intervals` by bootstrap over users;
        explanations also have those of `checks_report`, and the model `explanation/source_gain` (`source_gain`).
    """
    report: dict[str, dict[str, Any]] = {}
    features = evaluation.text_features or None
    for name in dict.fromkeys(example.name for example in examples.examples):
        places = np.random.default_rng(seed).permutation(examples.of(name))[: evaluation.max_texts]
        own = [examples.examples[place] for place in sorted(places)]
        if not own:
            continue
        training, validation = ([part.examples[place] for place in part.of(name)] for part in known)
        rows = {OWN: write(model, own, collator.processor), **trivial_texts(training, validation, own, seed)}
        references, users = [example.text for example in own], [example.group for example in own]
        for who, written in rows.items():
            row = report.setdefault(who, {INTERVALS: {}})
            found = writing_report(written, references, features)
            row |= {f"{name}/{metric}": value for metric, value in found.items()}
            drawn = writing_intervals(written, references, features, users, seed=seed)
            row[INTERVALS] |= {f"{name}/{metric}": interval for metric, interval in drawn.items()}
        if name == "explanation":
            for who, checked in _checks(model, own, rows, collator.processor, items).items():
                report[who] |= {f"{name}/{metric}": value for metric, value in checked.items()}
        gain = source_gain(model, own, collator)
        report[OWN] |= {} if gain is None else {f"{name}/source_gain": gain}
    return report


def _checks(
    model: M6RecForRecommendation,
    examples: Sequence[WritingExample],
    rows: Mapping[str, Sequence[str]],
    processor: M6RecProcessor,
    items: Sequence[Mapping[str, Any]],
) -> dict[str, dict[str, float]]:
    """Check the explanations of each row against the contributions of the events to the model's score."""
    places = [
        place for place, own in enumerate(examples) if own.request.get("history") and own.request.get("candidates")
    ]
    places = places[:CHECKED]
    if not places:
        return {}
    requests = [examples[place].request for place in places]
    because = contributions(model, processor, requests)
    known: list[Any] = [*items, *(request["candidates"][0] for request in requests if not items)]
    vocabulary = Vocabulary.of(known, processor)
    return {
        who: checks_report([texts[place] for place in places], requests, because, vocabulary, processor)
        for who, texts in rows.items()
    }


def source_gain(
    model: M6RecForRecommendation, examples: Sequence[WritingExample], collator: M6RecDataCollator, bf16: bool = False
) -> float | None:
    """Return by how much a wrong source raises the perplexity of texts: 0 = the model ignores what it is given.

    The source is everything but the item to write about: user, facts, history, earlier turns. A wrong one is that of
    another example, with another user and another item (ours). None = no example has such another.

    Args:
        model: The model.
        examples: Examples of one writing task.
        collator: Pads rows; its processor encodes them.
        bf16: Whether to compute in bfloat16.
    """
    pairs = [(own, other) for own in range(len(examples)) if (other := _stranger(examples, own)) is not None]
    if not pairs:
        return None
    right = [examples[own] for own, _ in pairs]
    wrong = [dataclasses.replace(examples[own], request=_with_source(examples, own, other)) for own, other in pairs]
    rows = (list(encoded(part, collator.processor)) for part in (wrong, right))
    wrong_one, right_one = (perplexity(model, part, collator, bf16) for part in rows)
    return wrong_one / right_one - 1


def _stranger(examples: Sequence[WritingExample], own: int) -> int | None:
    """Return the next example, in a circle, of another user and about another item."""
    for step in range(1, len(examples)):
        other = (own + step) % len(examples)
        one, two = examples[own], examples[other]
        items = one.request.get("candidates"), two.request.get("candidates")
        if (one.group != two.group or not one.group) and (items[0] is None or items[0] != items[1]):
            return other
    return None


def _with_source(examples: Sequence[WritingExample], own: int, other: int) -> dict[str, Any]:
    """Return the request of one example with the source of another."""
    kept = {name: value for name, value in examples[own].request.items() if name not in SOURCE}
    return kept | {name: value for name, value in examples[other].request.items() if name in SOURCE}


def write(model: M6RecForRecommendation, examples: Sequence[WritingExample], processor: M6RecProcessor) -> list[str]:
    """Generate the texts of examples of one writing task, greedily."""
    requests = [example.request for example in examples]
    written = Writer(model, processor).write(requests, examples[0].name, max_new_tokens=NEW_TOKENS)
    return [texts[0].text for texts in written]


@torch.no_grad()
def perplexity(
    model: M6RecForRecommendation,
    rows: Sequence[dict[str, Any]],
    collator: M6RecDataCollator,
    bf16: bool = False,
    rows_at_once: int = 8,
) -> float:
    """Return exp of the mean negative log-likelihood of a labelled token, or of a like."""
    model.eval()
    total, labelled = 0.0, 0
    rows = sorted(rows, key=lambda row: len(row["input_ids"]))
    for start in range(0, len(rows), rows_at_once):
        batch = {name: value.to(model.device) for name, value in collator(rows[start : start + rows_at_once]).items()}
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            loss = model(**batch, num_items_in_batch={"text": 1, "click": 1}, return_logits=False).loss
        total += float(loss)
        labels = [batch[name] for name in ("labels", "click_labels") if name in batch]
        labelled += sum(int((each != IGNORE_INDEX).sum()) for each in labels)
    return math.exp(total / labelled)


__all__ = [
    "NEW_TOKENS",
    "measure_texts",
    "measure_writing",
    "perplexity",
    "source_gain",
    "unigram_perplexity",
    "write",
]
