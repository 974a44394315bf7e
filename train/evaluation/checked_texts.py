"""Explanations against the contributions of the events: what they name, whether it agrees, and the level of chance."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...catalogue_m6rec import CatalogueView
from ...modeling_m6rec import M6RecForRecommendation
from ...ranking_m6rec import Ranker, Scorer, Wishes
from ...segment_cache_m6rec import SegmentCache
from ...tokenization import M6RecProcessor
from ...writing_m6rec import Vocabulary, check

CHECKED = 20
"""Maximum number of explanations that are checked: each needs a score without each of its events."""

Because = list[dict[str, Any]]


def contributions(
    model: M6RecForRecommendation, processor: M6RecProcessor, requests: Sequence[Mapping[str, Any]]
) -> list[Because]:
    """Return the exact contribution of each event to the score of each request's item.

    The score is that of the first ranking task that the model was trained for, else of plausibility.

    Args:
        model: The model.
        processor: Encodes the requests.
        requests: Requests with one candidate each.
    """
    config = model.config
    known = [name for name in ("retrieval", *config.scored) if name in (config.trained_tasks or ())]
    task = next((name for name in known if name != "retrieval" or config.num_segment_layers), "plausibility")
    ranker = Ranker(Scorer(model, processor, SegmentCache()), task, _no_catalogue)
    answers = ranker.answer(list(requests), [Wishes(explain=True)] * len(requests))
    return [answer[0]["because"] for answer in answers]


def _no_catalogue() -> CatalogueView:
    raise ValueError("items of an evaluation have their texts")


def checks_report(
    texts: Sequence[str],
    requests: Sequence[Mapping[str, Any]],
    because: Sequence[Because],
    vocabulary: Vocabulary,
    processor: M6RecProcessor,
) -> dict[str, float]:
    """Report what explanations name.

    Args:
        texts: The explanations.
        requests: Their requests, with one candidate each.
        because: The contributions of the events to each candidate.
        vocabulary: Decides which words are rare, and which are features.
        processor: Formats the items.

    Returns:
        `naming_rate`, the share of texts that name an event; `agreement`, the share of those whose best-named event has
        contributed (absent if none names one); `unsupported`, the mean number of features that nothing supports; and,
        as the level of chance, `shuffled_naming_rate` and `shuffled_agreement` of texts that are read with the next
        request.
    """
    report: dict[str, float] = {}
    count = len(texts)
    for prefix, shift in (("", 0), ("shuffled_", 1)):
        others = [(place + shift) % count for place in range(count)]
        found = [
            check(texts[place], requests[own], requests[own]["candidates"][0], because[own], vocabulary, processor)
            for place, own in enumerate(others)
        ]
        report[f"{prefix}naming_rate"] = float(np.mean([bool(own.names) for own in found]))
        agrees = [own.agrees for own in found if own.agrees is not None]
        report |= {f"{prefix}agreement": float(np.mean(agrees))} if agrees else {}
        if not shift:
            report["unsupported"] = float(np.mean([len(own.unsupported) for own in found]))
    return report


__all__ = ["CHECKED", "checks_report", "contributions"]
