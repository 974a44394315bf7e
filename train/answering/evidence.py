"""Answers from evidence, alone or with a network beside it: requests in, ranked items out."""

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
"""What a fit decided and why."""
FROM_CATALOGUE = 10
"""Items that are answered, unless told otherwise."""


class EvidenceAnswers:
    """Recommends items of a log by what its events and texts say; called as the pipeline "recommendation" is.

    Args:
        log: Its events are counted, all of them; its items are recommended.
        settings: How much each kind of evidence counts.
        recipe: Says in which order events of one time stand, and whether what a history holds is left out.
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
            requests: One request or several; of each its `history` is read, whose items are in the catalogue.
            task: "retrieval", which is all that evidence answers.
            top_k: How many items; None: 10.
            exclude_seen: Leave out what the history holds; None: as the log asks for.
            filter: Says of an item's fields whether it may be recommended.
            explain: Say what each event adds: the score minus the score without it.
            batch_size: Requests that are scored together.

        Returns:
            For each request a list of `{"rank", "item", "item_id", "score", "because"}`, as the pipeline gives it.

        Raises:
            ValueError: A task is none that evidence answers, or an item of a history is not in the catalogue.
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
        """Write a history with what the catalogue says of its items."""
        items = [self.writer.items[row] for row in rows]
        return [
            {**event, "item": item} if isinstance(event, Mapping) and "item" in event else {"item": item}
            for event, item in zip(request.get("history") or (), items)
        ]

    def _reasons(
        self, request: Mapping[str, Any], history: np.ndarray, ranked: list[int]
    ) -> list[list[dict[str, Any]]]:
        """Say for each ranked item what each event adds: its score minus that without the event."""
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
    """What a fit has kept of evidence."""

    settings: EvidenceSettings
    share: float
    """Weight of the cosine of the network beside it; 0: there is no network."""


def kept_evidence(folder: str | Path) -> KeptEvidence | None:
    """Read what a fit has kept in a folder; None: no fit wrote it, or it kept a network without evidence."""
    path = Path(folder) / FIT_FILE
    if not path.is_file():
        return None
    decisions = json.loads(path.read_text(encoding="utf-8"))
    if decisions["kept"] == "network":
        return None
    share = decisions["share"] if decisions["kept"] == "network and evidence" else 0.0
    return KeptEvidence(EvidenceSettings.of(decisions["evidence"]["settings"]), share)


__all__ = ["FIT_FILE", "EvidenceAnswers", "KeptEvidence", "kept_evidence"]
