"""What the demo answers, without HTTP: lists by two readings of a history, with reasons, and written texts.

A visitor's whole state (history, invented products, weights) comes with each request, and nothing is kept of it but a
few catalogues by their products: so nobody sees the products of others, and any number of visitors need no memory.

This file and `server.py` are copied into a Space, where the package is not installed: they import nothing of it.
"""

import copy
import hashlib
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

MAX_EVENTS, MAX_PRODUCTS, MAX_TEXT = 50, 20, 300
"""Limits of a request: events of a history, invented products, characters of a text."""
LISTED = 10
"""Items of a list."""
RANKED = 300
"""Items within which an invented product is looked for; below them its rank is unknown."""
FOUND = 8
"""Items that a search returns."""
STARTERS = 6
"""Items that the page offers for a beginning."""
KEPT = 64
"""Catalogues with a visitor's products, and weights, that are kept."""
BOTH = 0.5
"""Weight of the learnt part at which both parts count as the catalogue's settings say."""
NEW_TOKENS = 48
"""Most tokens of a written text."""
WRITING = ("explanation", "query", "conversation", "next_item")
"""Writing tasks that the demo shows, if the model has learnt to write."""
PARTS = ("learnt", "words", "transitions", "texts", "popularity", "profile")
"""Parts of a score; the first four are also those of an event's contribution."""


@dataclass(frozen=True)
class Visit:
    """A visitor's state.

    Attributes:
        history: Item id -> its text, None for an item of the catalogue; the oldest event first.
        products: Texts of invented products.
        weights: Weight of the learnt part in each reading, from 0 (evidence alone) to 1 (the learnt part alone).
    """

    history: dict[str, str | None]
    products: tuple[str, ...]
    weights: tuple[float, ...]

    @classmethod
    def of(cls, given: Any) -> "Visit":
        """Read a state from JSON.

        Raises:
            ValueError: A part is invalid; the message names it.
            TypeError: One has the wrong type.
        """
        if not isinstance(given, Mapping):
            raise TypeError(f"expected an object with history, products and weights, got {type(given).__name__}")
        history = [_event(entry, f"history[{n}]") for n, entry in enumerate(_list(given, "history", MAX_EVENTS))]
        products = [_text(text, f"products[{n}]") for n, text in enumerate(_list(given, "products", MAX_PRODUCTS))]
        weights = [_weight(number, f"weights[{n}]") for n, number in enumerate(_list(given, "weights", 2))]
        for name, values in (("history", [own for own, _ in history]), ("products", products)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: an entry is there twice; give each once")
        return cls(dict(history), tuple(products), tuple(weights))


class Demo:
    """Answers visitors from a model with a catalogue.

    Args:
        recommend: The pipeline "recommendation". If its catalogue has no evidence, words of texts are compared.
        event: Keys of the event that a click stands for, such as {"event": "rate", "rating": 5}; empty = the
            template's default.
        name: What the model is called.

    Raises:
        ValueError: The pipeline has no catalogue.
    """

    def __init__(self, recommend: Any, event: Mapping[str, Any] | None = None, name: str = "m6rec") -> None:
        if recommend.catalogue is None:
            raise ValueError(f"{name!r} has no catalogue to recommend from: show a model that has one")
        self.name, self.event = name, dict(event or {})
        self._recommend = copy.copy(recommend)
        self._first_weight = BOTH if recommend.catalogue.evidence is not None else 1.0
        if recommend.catalogue.evidence is None:
            add_evidence(self._recommend)
        self._catalogue, self._processor = self._recommend.catalogue, recommend.processor
        self._rule = self._catalogue.evidence
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[tuple[str, ...], float], Any] = OrderedDict()
        self._read_items()
        trained = recommend.model.config.trained_tasks or ()
        self.tasks = [task for task in WRITING if not {task, "writing"}.isdisjoint(trained)]
        self._starters = self.lists({"weights": [self.weights[-1]]})["readings"][0]["rows"]

    def _read_items(self) -> None:
        """Read what a search and the marks of cold items need."""
        catalogue = self._catalogue
        self._ids = list(catalogue)
        items = [catalogue.item(item_id) for item_id in self._ids]
        self._texts = self._processor.item_texts(items)
        self._lower = [text.lower() for text in self._texts]
        names = list(dict.fromkeys(name for item in items if isinstance(item, Mapping) for name in item))
        named = [name for name in ("title", "name", "text", *names) if name in names and name != "item_id"]
        self._field = named[0] if named else "text"
        counts = catalogue.event_counts() or {}
        self._counts = [counts.get(item_id, 0) for item_id in self._ids]
        if any(self._counts):
            self._cold = {item_id for item_id, count in zip(self._ids, self._counts) if not count}
        elif self._recommend.model.config.num_item_embeddings:
            self._cold = {own for own, item in zip(self._ids, items) if not self._processor.item_row(item)}
        else:
            self._cold = set()  # a model of texts alone treats all items alike
        self._counted = any(self._counts)

    @property
    def weights(self) -> list[float]:
        """Weights of the two readings that the page begins with."""
        return [0.0, self._first_weight] if self._rule.learnt else [0.0]

    def about(self) -> dict[str, Any]:
        """Return what the page says of the model, and what it offers."""
        limits = {"events": MAX_EVENTS, "products": MAX_PRODUCTS, "text": MAX_TEXT, "ranked": RANKED}
        return {
            "name": self.name,
            "items": len(self._ids),
            "counted": self._counted,
            "weights": self.weights,
            "tasks": self.tasks,
            "limits": limits,
            "starters": [{"item_id": row["item_id"], "item": row["item"]} for row in self._starters[:STARTERS]],
        }

    def find(self, words: str) -> list[dict[str, str]]:
        """Return items whose texts contain all words: those that begin with them first, then the most met ones."""
        query = words.strip().lower()
        wanted = query.split()
        hits = [n for n, text in enumerate(self._lower) if wanted and all(word in text for word in wanted)]

        def order(number: int) -> tuple[bool, bool, int]:
            text = self._lower[number]
            return not text.startswith(query), f" {wanted[0]}" not in f" {text}", -self._counts[number]

        return [{"item_id": self._ids[n], "item": self._texts[n]} for n in sorted(hits, key=order)[:FOUND]]

    # ------------------------------------------------------------------------------------------------------ the lists

    def lists(self, given: Any) -> dict[str, Any]:
        """Return a list for each weight of a visitor's state.

        Returns:
            `products`, text and id of each invented product; and `readings`: for each weight `{"weight", "factors",
            "ms", "rows", "products"}`. A row has `rank`, `item`, `item_id`, `score`, `new` and `cold`. `products` has
            the row of each invented product that is not in the history; below the first RANKED items its `rank` and
            `score` are None. `factors` are by what the `parts` of `reasons` are multiplied in this reading.

        Raises:
            ValueError: The state is invalid; the message names the place.
            TypeError: A part of it has the wrong type.
        """
        visit = Visit.of(given)
        products = [{"text": text, "item_id": product_id(text)} for text in visit.products]
        readings = [self._reading(visit, weight) for weight in visit.weights or self.weights]
        return {"products": products, "readings": readings}

    def _reading(self, visit: Visit, weight: float) -> dict[str, Any]:
        began = time.perf_counter()
        request = {"history": self._history(visit), "task": "retrieval"}
        wanted = {own: text for text in visit.products if (own := product_id(text)) not in visit.history}
        with self._lock:
            recommend = self._weighed(visit.products, weight)
            rows = recommend(request, top_k=RANKED if wanted else LISTED)
        products = [self._row(row) for row in rows if row["item_id"] in wanted]
        near = {row["item_id"] for row in products}
        below = {"rank": None, "score": None, "new": True, "cold": True}
        products += [
            {"item_id": item_id, "item": wanted[item_id], **below} for item_id in wanted if item_id not in near
        ]
        learnt, others = factors(weight)
        reading = {"weight": weight, "factors": {name: learnt if name == "learnt" else others for name in PARTS}}
        ms = round(1000 * (time.perf_counter() - began), 1)
        return {**reading, "ms": ms, "rows": [self._row(row) for row in rows[:LISTED]], "products": products}

    def _row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row of the page."""
        item_id = row["item_id"]
        new = is_product(item_id)
        marks = {"score": _short(row["score"]), "new": new, "cold": new or item_id in self._cold}
        return {name: row[name] for name in ("rank", "item", "item_id")} | marks

    def reasons(self, given: Any) -> dict[str, Any]:
        """Return why `items`, ids of a visitor's lists, have their scores, if both parts count as they are set.

        Returns:
            `items`: for each id its `parts`, which sum to the score, and `events`, by parts what each event of the
            history contributed. Other weights multiply the parts by their `factors`.

        Raises:
            ValueError: The state is invalid, or an id unknown.
            TypeError: A part of it has the wrong type.
        """
        visit = Visit.of(given)
        entries = _list(given, "items", 2 * (LISTED + MAX_PRODUCTS))
        wanted = [_text(item_id, f"items[{number}]") for number, item_id in enumerate(entries)]
        if not wanted:
            return {"items": {}}
        request = {"history": self._history(visit), "task": "retrieval", "filter": {"item_id": wanted}}
        with self._lock:
            rows = self._weighed(visit.products, BOTH)(request, top_k=len(wanted), explain=True)
        places = {item_id: place for place, item_id in enumerate(visit.history)}
        return {"items": {row["item_id"]: _reasons(row, places) for row in rows}}

    def _history(self, visit: Visit) -> list[dict[str, Any]]:
        """Return the events of a request; a text is an item with an id of its own."""
        items = [
            {"item_id": item_id} if text is None else self._invented(text) for item_id, text in visit.history.items()
        ]
        return [{**self.event, "item": item} for item in items]

    def _invented(self, text: str) -> dict[str, str]:
        return {"item_id": product_id(text), self._field: text}

    def _weighed(self, products: tuple[str, ...], weight: float) -> Any:
        """Return the pipeline that answers by a weight, from a catalogue with these products."""
        key = products, weight
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        if weight == BOTH or not products:
            catalogue = copy.copy(self._catalogue)
            items = [self._invented(text) for text in products]
            catalogue.add(items, self._recommend.model, self._processor, progress=False)
        else:  # the texts are read once for all weights
            catalogue = copy.copy(self._weighed(products, BOTH).catalogue)
        catalogue.set_evidence(weighed(self._rule, weight), self._processor)
        found = self._kept[key] = copy.copy(self._recommend)
        found.catalogue = catalogue
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return found

    # ---------------------------------------------------------------------------------------------------------- writing

    def write(self, given: Any) -> dict[str, Any]:
        """Write a text for a visitor's state with a `task`; the explanation of an `item_id`, the reply to a `message`.

        Returns:
            `text`, and in `items` the texts of items that it names.

        Raises:
            ValueError: The state is invalid, or the model has not learnt the task.
            TypeError: A part has the wrong type.
        """
        visit = Visit.of(given)
        task = given.get("task")
        if task not in self.tasks:
            raise ValueError(f"task={task!r}: this model writes {', '.join(self.tasks) or 'nothing'}")
        request: dict[str, Any] = {"history": self._history(visit)}
        if task == "explanation":
            request["candidates"] = [{"item_id": _text(given.get("item_id"), "item_id")}]
        if task == "conversation":
            request["messages"] = [{"role": "user", "content": _text(given.get("message"), "message")}]
        more = {"max_new_tokens": NEW_TOKENS} if task != "next_item" else {"top_k": 3}
        with self._lock:
            rows = self._weighed(visit.products, (visit.weights or self.weights)[-1])(request, task=task, **more)
        if task == "next_item":
            return {"text": "", "items": [row["item"] for row in rows]}
        first = rows[0] if rows else {}
        items = [self._catalogue_text(each) for each in first.get("items", ())]
        return {"text": first.get("content", first.get("text", "")), "items": items}

    def _catalogue_text(self, named: Any) -> str:
        item_id = named["item_id"] if isinstance(named, Mapping) else named
        return self._texts[self._ids.index(item_id)] if item_id in self._ids else str(item_id)


def add_evidence(recommend: Any, events: Any = None) -> None:
    """Let the catalogue of a pipeline, which ranks by the model alone, also compare words and count events.

    The pipeline gets a copy: nothing is written into the catalogue's folder.

    Args:
        recommend: The pipeline.
        events: A table of events, as in `Catalogue.observe`; None = words are compared only.
    """
    catalogue = copy.copy(recommend.catalogue)
    # The class that the catalogue's own code has, be it this package's or the code that came with a model.
    evidence = sys.modules[type(catalogue).__module__].Evidence
    catalogue.set_evidence(evidence(), recommend.processor)
    if events is not None:
        catalogue.observe(events)
    recommend.catalogue = catalogue


def weighed(rule: Any, weight: float) -> Any:
    """Return settings of evidence with another weight of the learnt part.

    Args:
        rule: The settings.
        weight: 0 = evidence alone, 1 = the learnt part alone, `BOTH` = the settings as they are.
    """
    learnt, others = factors(weight)
    names = ("words", "texts", "transitions", "popularity", "again", "linear")
    # The code that came with a model may be older, and lack a term.
    terms = {name: others * getattr(rule, name) for name in names if hasattr(rule, name)}
    return replace(rule, learnt=learnt * rule.learnt, **terms)


def factors(weight: float) -> tuple[float, float]:
    """Return by what a weight multiplies the learnt part, and by what the others.

    >>> factors(0.0), factors(0.25), factors(0.5), factors(1.0)
    ((0.0, 1.0), (0.5, 1.0), (1.0, 1.0), (1.0, 0.0))
    """
    return min(1.0, weight / BOTH), min(1.0, (1 - weight) / (1 - BOTH))


def product_id(text: str) -> str:
    """Return the id of an invented product."""
    return "new-" + hashlib.sha256(text.encode()).hexdigest()[:16]


def is_product(item_id: str) -> bool:
    """Return whether an id is that of an invented product."""
    return len(item_id) == 20 and item_id.startswith("new-")


def _reasons(row: Mapping[str, Any], places: Mapping[str, int]) -> dict[str, Any]:
    """Return the reasons of a pipeline's row; `places` has the place of each item in the history."""
    events: list[dict[str, float]] = [{} for _ in places]
    for reason in row["because"]:
        events[places[reason["item_id"]]] = {name: _short(reason[name]) for name in PARTS if name in reason}
    return {"parts": {name: _short(row["parts"][name]) for name in PARTS}, "events": events}


def _list(given: Mapping[str, Any], name: str, most: int) -> Sequence[Any]:
    value = given.get(name, [])
    if not isinstance(value, list):
        raise TypeError(f"{name}: expected a list, got {type(value).__name__}")
    if len(value) > most:
        raise ValueError(f"{name}: {len(value)} entries; the demo takes {most}: give fewer")
    return value


def _event(entry: Any, place: str) -> tuple[str, str | None]:
    if not isinstance(entry, Mapping) or len(entry) != 1 or not set(entry) <= {"item_id", "text"}:
        raise TypeError(f"{place}: expected an object with item_id or text, got {entry!r:.80}")
    ((kind, value),) = entry.items()
    text = _text(value, f"{place}.{kind}")
    return (text, None) if kind == "item_id" else (product_id(text), text)


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{place}: expected a text, got {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"{place}: empty; give a text")
    if len(value) > MAX_TEXT:
        raise ValueError(f"{place}: {len(value)} characters; the demo takes {MAX_TEXT}: give fewer")
    return value.strip()


def _weight(value: Any, place: str) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1:
        raise ValueError(f"{place}: {value!r:.40}; give a number from 0 to 1")
    return round(float(value), 2)


def _short(value: float) -> float:
    return round(float(value), 4)


__all__ = ["Demo", "Visit", "add_evidence", "factors", "is_product", "product_id", "weighed"]
