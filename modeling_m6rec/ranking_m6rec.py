"""From requests to ranked items: which items are ranked, by what, and why each stands where it stands.

Shapes: E events of a request, N items of an answer, I values of a score (1, or one an interaction), D = vector_width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers.utils import logging

from .catalogue_m6rec import Predicate, cosines, embed
from .catalogue_view_m6rec import CatalogueView
from .items_m6rec import Item, NamedText, item_identity, item_texts, without_stats
from .scoring_m6rec import Scorer, Told
from .values_m6rec import normalize_id

logger = logging.get_logger(__name__)

FROM_CATALOGUE = 10
"""Items found in a catalogue, unless told otherwise."""


class Candidate(NamedTuple):
    """An item that is ranked, and its id as it was given, if it was."""

    item: Item
    item_id: Any


@dataclass
class Query:
    """One request on its way to an answer."""

    request: dict[str, Any]
    """What the processor reads, without candidates."""
    told: Told
    candidates: list[Candidate]
    seen: set[str] | None = None
    """Where candidates are still to be found in the catalogue: ids that are left out."""
    best: list[tuple[int, float]] = field(default_factory=list)
    """Numbers of the candidates that are answered, and scores, the best first."""
    details: list[list[float]] = field(default_factory=list)
    """I values of each of the best."""
    vectors: torch.Tensor | None = None
    """N x D vectors of the best, for retrieval."""
    confidence: float | None = None
    """How sure all answers must be for the last joint layers to be left out."""


@dataclass
class Ranker:
    """Answers requests by one task."""

    scorer: Scorer
    task: str
    catalogue: Callable[[], CatalogueView]
    """Returns the catalogue, or raises the error that says what is missing."""
    top_k: int | None = None
    exclude_seen: bool | None = None
    predicate: Predicate | None = None
    explain: bool = False
    exit_confidence: float | None = None
    notice: Callable[[str, str], None] = lambda text, place: None
    """Is shown each bare text that stands for an item, and its place."""

    def answer(self, requests: Sequence[str | Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
        """Answer requests."""
        split = [{"user": request} if isinstance(request, str) else self._described(request) for request in requests]
        given = [request.pop("candidates", None) for request in split]
        own: list[Any] = [request.pop("exit_confidence", None) for request in split]
        confidences = [self.exit_confidence if confidence is None else confidence for confidence in own]
        for confidence in confidences:
            self.scorer.check(self.task, confidence)
        # Read first, which checks the requests.
        told = self.scorer.tell(split, "retrieval")
        if self.task == "retrieval":
            self._say_unread(split, given, told)
        queries = [self._query(*parts) for parts in zip(split, given, told)]
        for query, confidence in zip(queries, confidences):
            query.confidence = confidence
        if self.task == "retrieval":
            self._retrieve(queries)
        else:
            self._score([query for query in queries if query.candidates])
        return [self._rows(query) for query in queries]

    def _say_unread(self, requests: Sequence[Mapping[str, Any]], given: Sequence[Any], told: Sequence[Told]) -> None:
        """Warn of what retrieval does not read, where it is there: each kind once."""
        config = self.scorer.config
        if any(isinstance(item, Mapping) and item.get("stats") is not None for own in given for item in own or ()):
            logger.warning_once("task 'retrieval' does not read the statistics of candidates (`stats`)")
        if config.history_attention != "causal":
            return
        moment = config.kind_token_ids["now"]
        if any(moment in each.source.ids for each in told):
            logger.warning_once(
                "task 'retrieval' does not read `now`: with causal history the user is read after the last event, "
                "before the moment"
            )
        if any(request.get("facts") and not each.events for request, each in zip(requests, told)):
            logger.warning_once(
                "task 'retrieval' does not read `facts` where there is no history: with causal history the user is "
                "then read before the facts. Say it in `user`"
            )

    def _described(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Copy a request, and describe the items that it names by their id alone with what the catalogue holds."""
        found = dict(request)
        if isinstance(found.get("candidates"), list):
            items = enumerate(found["candidates"])
            found["candidates"] = [self._described_item(item, f"candidates[{place}]") for place, item in items]
        if isinstance(found.get("history"), list):
            found["history"] = [
                {**event, "item": self._described_item(event["item"], f"history[{place}].item")}
                if isinstance(event, Mapping) and "item" in event
                else self._described_item(event, f"history[{place}]")
                for place, event in enumerate(found["history"])
            ]
        return found

    def _described_item(self, item: Any, place: str) -> Any:
        if isinstance(item, str):
            self.notice(item, place)
        if not isinstance(item, Mapping) or set(item) - {"stats"} != {"item_id"} or item["item_id"] is None:
            return item
        item_id = normalize_id(item["item_id"], f"{place}.item_id")
        try:
            catalogue = self.catalogue()
        except ValueError as error:
            raise ValueError(f"{place}: item_id {item_id!r} alone says nothing, and {error}") from error
        if item_id not in catalogue:
            raise ValueError(
                f"{place}: item_id {item_id!r} alone says nothing, and is not in the catalogue: give its text as well"
            )
        known = catalogue.item(item_id)
        if isinstance(known, str):
            if item.get("stats") is not None:
                raise ValueError(
                    f"{place}.stats: item {item_id!r} of the catalogue is a text, which has no statistics: give it "
                    f"with fields, such as {{'title': ..., 'stats': ...}}"
                )
            return NamedText(known, item_id)
        return {**known, **item}

    # ---------------------------------------------------------------------------------------------- what can be chosen

    def _query(self, request: dict[str, Any], given: Any, told: Told) -> Query:
        if given is not None:
            return Query(request, told, self._allowed(_checked(given), request))
        catalogue = self.catalogue()
        seen = set() if self.exclude_seen is False else self._seen_in(catalogue, request)
        if self.task == "retrieval":
            return Query(request, told, [], seen)
        names = [name for name in catalogue if name not in seen]
        kept = [name for name in names if self.predicate is None or self.predicate(catalogue.fields(name))]
        return Query(request, told, [Candidate(catalogue.item(name), name) for name in kept])

    def _allowed(self, candidates: list[Candidate], request: Mapping[str, Any]) -> list[Candidate]:
        """Leave out candidates that the history holds, if asked, or that the filter refuses."""
        if self.exclude_seen:
            seen = _Seen(self.scorer.processor.names, _past_items(request))
            candidates = [candidate for candidate in candidates if not seen.holds(without_stats(candidate.item))]
        if self.predicate is None:
            return candidates
        fields = [_fields(item) for item, _ in candidates]
        return [candidate for candidate, own in zip(candidates, fields) if self.predicate(own)]

    def _seen_in(self, catalogue: CatalogueView, request: Mapping[str, Any]) -> set[str]:
        """Ids of the catalogue's items that the history holds: by their id, else by their text."""
        past = _past_items(request)
        ids = {item_id for item in past if (item_id := item_identity(item)) is not None}
        nameless = [item for item in past if item_identity(item) is None]
        names = self.scorer.processor.names
        for item in nameless:
            alike = catalogue.worded({*names.candidates(item)}, names)
            ids.update(item_id for item_id in alike if names.same(item, catalogue.item(item_id)))
        return ids

    # --------------------------------------------------------------------------------------------------------- ranking

    def _score(self, queries: list[Query]) -> None:
        requests = [{**query.request, "candidates": [item for item, _ in query.candidates]} for query in queries]
        told = self.scorer.tell(requests, self.task)
        for query, own in zip(queries, told):
            own.confidence = query.confidence
        for query, own, values in zip(queries, told, self.scorer.scores(told, self.task)):
            query.told = own
            query.best = _best(values.mean(-1), self.top_k)
            query.details = [values[number].tolist() for number, _ in query.best]

    def _retrieve(self, queries: list[Query]) -> None:
        users = self.scorer.users([query.told for query in queries])
        for query, user in zip(queries, users):
            if query.seen is None:
                items = [without_stats(item) for item, _ in query.candidates]
                scorer = self.scorer
                vectors = embed(items, scorer.model, scorer.processor, segment_cache=scorer.segment_cache)
                query.best = _best(cosines(user[None], vectors)[0], self.top_k)
                query.vectors = vectors[[number for number, _ in query.best]]
        searching = [number for number, query in enumerate(queries) if query.seen is not None]
        if not searching:
            return
        catalogue, seen = self.catalogue(), [queries[number].seen for number in searching]
        found = catalogue.search(users[searching], self.top_k or FROM_CATALOGUE, seen, self.predicate)
        for number, pairs in zip(searching, found):
            names = [name for name, _ in pairs]
            queries[number].candidates = [Candidate(catalogue.item(name), name) for name in names]
            queries[number].best = [(place, score) for place, (_, score) in enumerate(pairs)]
            queries[number].vectors = catalogue.vectors(names)

    # -------------------------------------------------------------------------------------------------------- answering

    def _rows(self, query: Query) -> list[dict[str, Any]]:
        chosen = [query.candidates[number] for number, _ in query.best]
        texts = iter(item_texts(self.scorer.processor, [item for item, _ in chosen if not isinstance(item, str)]))
        rows = []
        for rank, ((item, item_id), (_, score)) in enumerate(zip(chosen, query.best), 1):
            row = {"rank": rank, "item": str(item) if isinstance(item, str) else next(texts)}
            row |= {} if item_id is None else {"item_id": item_id}
            rows.append(row | {"score": score})
        if query.confidence is not None:
            for row in rows:
                row["exit_layer"] = query.told.exit_layer
        if self.task == "interaction":
            for row, values in zip(rows, query.details):
                row["interactions"] = dict(zip(self.scorer.config.interactions, values))
        if self.explain and rows:
            for row, reasons in zip(rows, self._reasons(query)):
                row["because"] = reasons
        return rows

    def _reasons(self, query: Query) -> list[list[dict[str, Any]]]:
        """Say for each of the best what each event adds: the score minus the score with the event unseen."""
        told = query.told
        if not told.events:
            return [[] for _ in query.best]
        if query.vectors is not None:
            without = cosines(self.scorer.users_without(told), query.vectors)
        else:
            without = self.scorer.scores_without(told, [number for number, _ in query.best], self.task).mean(-1)
        events = [{"event": text} for text in told.events]
        for event, entry in zip(events, query.request["history"][-len(events) :]):
            item = entry.get("item") if isinstance(entry, Mapping) else None
            if isinstance(item, NamedText):
                event["item_id"] = item.item_id
            if isinstance(item, Mapping) and item.get("item_id") is not None:
                event["item_id"] = item["item_id"]
        reasons = []
        for (_, score), others in zip(query.best, without.T.tolist()):
            added = [{**event, "contribution": score - other} for event, other in zip(events, others)]
            reasons.append(sorted(added, key=lambda reason: -reason["contribution"]))
        return reasons


def _checked(given: Any) -> list[Candidate]:
    if not isinstance(given, list):
        raise TypeError(f"candidates: expected a list, got {type(given).__name__} ({given!r})")
    for number, item in enumerate(given):
        if not isinstance(item, str | Mapping):
            raise TypeError(
                f"candidates[{number}]: expected a text or a mapping of fields, got {type(item).__name__} ({item!r})"
            )
    return [
        Candidate(item, item.get("item_id") if isinstance(item, Mapping) else item_identity(item)) for item in given
    ]


class _Seen:
    """The items of a history, found again by their ids, or by what they say where one of the two has no id."""

    def __init__(self, names: Any, past: Sequence[Item]) -> None:
        self.names, self.ids = names, {item_identity(item) for item in past}
        self._by_name: dict[str, list[Item]] = {}
        for item in past:
            for name in names.candidates(item):
                self._by_name.setdefault(name, []).append(item)

    def holds(self, item: Item) -> bool:
        """Say whether an item is among them."""
        item_id = item_identity(item)
        if item_id is not None and item_id in self.ids:
            return True
        alike = [other for name in self.names.candidates(item) for other in self._by_name.get(name, ())]
        return any(
            (item_id is None or item_identity(other) is None) and self.names.same(item, other) for other in alike
        )


def _fields(item: Item) -> dict[str, Any]:
    """Return the fields of an item as a filter reads them."""
    if isinstance(item, NamedText):
        return {"item_id": item.item_id, "item": str(item)}
    return {"item": item} if isinstance(item, str) else item


def _past_items(request: Mapping[str, Any]) -> list[Item]:
    """Return the items of a history that the processor has read."""
    items = [event if isinstance(event, str) else event.get("item") for event in request.get("history") or ()]
    return [item for item in items if item is not None]


def _best(scores: torch.Tensor, top_k: int | None) -> list[tuple[int, float]]:
    """Number and score of the best; equal ones keep their order."""
    if scores.isnan().any():
        raise ValueError("scores hold NaN: the model's weights are damaged, or too large for its number type")
    order = scores.argsort(descending=True, stable=True)[:top_k]
    return list(zip(order.tolist(), scores[order].tolist()))


__all__ = ["Ranker"]
