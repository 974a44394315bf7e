"""Recommendations from evidence, with or without a network: requests in, ranked items out."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...layers_m6rec import inference_mode
from ...pipeline_m6rec import RecommendationPipeline
from ...ranking_m6rec import Scorer
from ...values_m6rec import normalize_id, short
from ..config.recipe import Recipe
from ..data.log import Log
from ..data.splits import histories, order
from ..evaluation.evidence import Evidence, EvidenceSettings
from ..rows.examples import RequestWriter

FIT_FILE = "fit.json"
"""File with the decisions of a fit and their reasons."""
FROM_CATALOGUE = 10
"""Default number of recommended items."""


class EvidenceAnswers:
    """Recommends items of a log from its events and texts; has the interface of the pipeline "recommendation".

    Args:
        log: All its events are counted; its items are recommended.
        settings: Weights of the kinds of evidence.
        recipe: Decides the order of events with equal times, and whether seen items are left out.
        network: A trained model with a catalogue of the same items, whose cosine is added.
        share: Weight of the cosine.
    """

    def __init__(
        self,
        log: Log,
        settings: EvidenceSettings,
        recipe: Recipe,
        network: RecommendationPipeline | None = None,
        share: float = 0.0,
    ) -> None:
        self.network, self.share = network, share
        self.writer, self.exclude_seen = RequestWriter(log), recipe.evaluation.exclude_seen
        ordered = order(log.interactions, recipe.data.seed, recipe.evaluation.ties)
        rows = np.array([self.writer.rows[item_id] for item_id in ordered["item_id"]], dtype=int)
        self.texts = [", ".join(log.item_fields(item_id).values()) for item_id in self.writer.item_ids]
        self.evidence = Evidence(self.texts, [rows[places] for places in histories(ordered).values()], settings)

    def __call__(
        self,
        requests: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        task: str | None = None,
        top_k: int | None = None,
        exclude_seen: bool | None = None,
        filter: Callable[[dict[str, Any]], bool] | None = None,
        explain: bool = False,
        batch_size: int = 64,
    ) -> list[Any]:
        """Recommend items of the catalogue.

        Args:
            requests: One or several requests; only `history` is used, and its items must be in the catalogue.
            task: "retrieval", the only task that evidence supports.
            top_k: Number of items; None: 10.
            exclude_seen: Leave out items of the history; None: as in the recipe.
            filter: Returns whether an item may be recommended, given its fields.
            explain: Add each event's contribution: the score minus the score without the event.
            batch_size: Number of requests that are scored together.

        Returns:
            For each request a list of `{"rank", "item", "item_id", "score", "because"}`, as the pipeline returns it.

        Raises:
            ValueError: Evidence does not support the task, or an item of a history is not in the catalogue.
        """
        if task not in (None, "retrieval"):
            raise ValueError(f"task={task!r}: this recommender answers 'retrieval' only")
        if isinstance(requests, Mapping):
            return self([requests], task, top_k, exclude_seen, filter, explain, batch_size)[0]
        met = [self._rows(request, f"request {number}") for number, request in enumerate(requests)]
        out = self.exclude_seen if exclude_seen is None else exclude_seen
        allowed = np.array([filter is None or filter(item) for item in self.writer.items])
        answers: list[Any] = []
        for start in range(0, len(met), batch_size):
            own = met[start : start + batch_size]
            asked = requests[start : start + batch_size]
            for request, history, scores in zip(asked, own, self._scores(asked, own)):
                kept = np.where(allowed, scores, -np.inf)
                kept[history if out else []] = -np.inf
                best = np.argsort(-kept, kind="stable")[: top_k or FROM_CATALOGUE]
                ranked = [int(row) for row in best if kept[row] > -np.inf]
                answer = [self._row(rank, row, scores[row]) for rank, row in enumerate(ranked, 1)]
                for row, reasons in zip(answer, self._reasons(request, history, ranked) if explain else ()):
                    row["because"] = reasons
                answers.append(answer)
        return answers

    def _row(self, rank: int, row: int, score: float) -> dict[str, Any]:
        return {"rank": rank, "item": self.texts[row], "item_id": self.writer.item_ids[row], "score": float(score)}

    def _scores(self, requests: Sequence[Mapping[str, Any]], histories: Sequence[np.ndarray]) -> np.ndarray:
        """Score all items for users: U x M."""
        scores = self.evidence.scores(histories)
        if self.network is None or self.network.catalogue is None:
            return scores
        own = self.network
        described = [
            {**request, "history": self._described(request, rows)} for request, rows in zip(requests, histories)
        ]
        with inference_mode(own.model):
            scorer = Scorer(own.model, own.processor, own.segment_cache)
            users = scorer.users(scorer.encode(described, "retrieval"))
        cosines = users.float().cpu() @ self.network.catalogue.vectors(self.writer.item_ids).T
        return scores + self.share * cosines.double().numpy()

    def _described(self, request: Mapping[str, Any], rows: np.ndarray) -> list[Any]:
        """Return a history with the catalogue's fields of its items."""
        items = [self.writer.items[row] for row in rows]
        return [
            {**event, "item": item} if isinstance(event, Mapping) and "item" in event else {"item": item}
            for event, item in zip(request.get("history") or (), items)
        ]

    def _reasons(
        self, request: Mapping[str, Any], history: np.ndarray, ranked: list[int]
    ) -> list[list[dict[str, Any]]]:
        """Return each event's contribution to each ranked item: the score minus the score without the event."""
        told = list(request.get("history") or ())
        requests = [request, *({**request, "history": [*told[:at], *told[at + 1 :]]} for at in range(len(told)))]
        without = [np.delete(history, event) for event in range(len(history))]
        scores = self._scores(requests, [history, *without])[:, ranked]
        events = [{"event": self.texts[row], "item_id": self.writer.item_ids[row]} for row in history]
        reasons = []
        for added in (scores[0] - scores[1:]).T.tolist():
            found = [{**event, "contribution": value} for event, value in zip(events, added)]
            reasons.append(sorted(found, key=lambda reason: -reason["contribution"]))
        return reasons

    def _rows(self, request: Mapping[str, Any], place: str) -> np.ndarray:
        """Return the catalogue rows of a request's history."""
        if not isinstance(request, Mapping) or request.get("candidates") is not None:
            raise ValueError(f"{place}: expected a request with a history and without candidates, got {short(request)}")
        return np.array([*self._known(request.get("history") or [], place)], dtype=int)

    def _known(self, history: Sequence[Any], place: str) -> Iterator[int]:
        for number, event in enumerate(history):
            item = event.get("item", event) if isinstance(event, Mapping) else event
            item_id = normalize_id(item["item_id"], place) if isinstance(item, Mapping) and "item_id" in item else None
            row = self.writer.rows.get(item_id) if item_id is not None else None
            if row is None:
                raise ValueError(
                    f"{place}: history[{number}] is {short(item)}: expected an item of the catalogue, by its item_id"
                )
            yield row


class KeptEvidence(NamedTuple):
    """The evidence that a fit has saved."""

    settings: EvidenceSettings
    share: float
    """Weight of the network's cosine; 0: there is no network."""


def kept_evidence(folder: str | Path) -> KeptEvidence | None:
    """Read the evidence of a fit's folder; None: no fit wrote it, or the fit kept a network without evidence."""
    path = Path(folder) / FIT_FILE
    if not path.is_file():
        return None
    decisions = json.loads(path.read_text(encoding="utf-8"))
    if decisions["kept"] == "network":
        return None
    share = decisions["share"] if decisions["kept"] == "network and evidence" else 0.0
    return KeptEvidence(EvidenceSettings.of(decisions["evidence"]["settings"]), share)


__all__ = ["FIT_FILE", "EvidenceAnswers", "KeptEvidence", "kept_evidence"]
