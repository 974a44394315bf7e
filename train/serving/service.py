"""What a service does, without HTTP: a model, the events and items of its store, and answers from both.

All workers of a service read one store. A worker applies the store's changes before each batch, and reads the events of
a request's user when it answers, so that an answer contains every write that was acknowledged before it was asked for.
"""

import gc
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ...item_features_m6rec import forget_texts
from ...pipeline_m6rec import RecommendationPipeline
from ...segment_cache_m6rec import UserStates
from ...values_m6rec import check_size, normalize_id, short, time_seconds
from ..answering.loading import load_pipeline
from ..answering.offline import fingerprint
from .store import Change, Store, user_name

logger = logging.getLogger(__name__)

WIDE = 1 << 17
"""Joint layers times squared width above which states of histories are kept: two layers of 384 are above it, one of 256
is below. With narrower layers, looking a history up costs about as much as computing it."""
MAX_ITEMS = 10_000
"""Items or events of one request."""


class Unknown(LookupError):  # noqa: N818  the name of the condition, as `LookupError` says little
    """A thing that a request names does not exist."""


class Conflict(RuntimeError):  # noqa: N818  as above
    """A request contradicts the state of the service."""


@dataclass(frozen=True)
class Settings:
    """Settings of a service, equal in all its workers.

    Attributes:
        model: Folder or Hub id of the model.
        store: File of the SQLite database, or a URL.
        token: Token of requests that write; empty = no token is needed.
        batch_size: Most requests that are answered together.
        wait_ms: Milliseconds that a request waits for others.
        max_waiting: Most requests that wait or are being answered.
        timeout: Seconds within which a request is answered.
        max_body: Most bytes of a request.
        max_events: Most events of a history that a request may give.
        max_candidates: Most candidates of a request.
        user_states: Keep the states of users' histories, so that a new event costs little; None = if this saves time.
        retention_days: Days after which events are deleted; None = never.
        threads: Threads that a worker computes with.
    """

    model: str
    store: str
    token: str = ""
    batch_size: int = 64
    wait_ms: float = 2.0
    max_waiting: int = 512
    timeout: float = 10.0
    max_body: int = 1 << 20
    max_events: int = 1000
    max_candidates: int = 1000
    user_states: bool | None = None
    retention_days: float | None = None
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_waiting", "timeout", "max_body", "max_events", "max_candidates", "threads"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: give a number above 0")
        if self.wait_ms < 0:
            raise ValueError(f"wait_ms={self.wait_ms}: give 0 or more milliseconds")
        if self.retention_days is not None and self.retention_days <= 0:
            raise ValueError(f"retention_days={self.retention_days}: give a number above 0, or leave it out")

    def to_json(self) -> str:
        """Serialise, for the environment of workers."""
        return json.dumps(asdict(self))


def has_wide_joint_layers(model: Any) -> bool:
    """Whether computing a history again costs more than finding and copying its kept states."""
    config = model.config
    return not model.reads_sources or config.num_joint_layers * config.hidden_size**2 > WIDE


class Loaded:
    """A model that answers, and the number of the last change that its catalogue contains.

    Args:
        model: Folder or Hub id.
        settings: The service's settings.

    Attributes:
        digest: Digest of weights, settings, processor and the catalogue that came with the model.
        gone: Removed items by id, as texts or fields: histories may contain them.
    """

    def __init__(self, model: str, settings: Settings) -> None:
        self.name = model
        self.recommend = load_pipeline(model, user_states=bool(settings.user_states))
        if settings.user_states is None and has_wide_joint_layers(self.recommend.model):
            self.recommend.user_states = UserStates()
        if self.recommend.catalogue is None:
            raise ValueError(f"{model!r} has no catalogue to recommend from: serve a model that has one")
        self.digest = fingerprint(self.recommend)
        self.gone: dict[str, Any] = {}
        self.seen = 0

    def warm(self) -> None:
        """Encode all texts of the catalogue, and answer once."""
        if self.recommend.model.config.num_segment_layers:
            self.recommend.warm(progress=False)
        self.recommend("somebody", top_k=1)

    def apply(self, changes: Sequence[Change]) -> None:
        """Apply changes of items and of users."""
        items: dict[str, Any] = {}
        for change in changes:
            if change.kind == "item":
                items[change.name] = change.content
            if change.kind == "forget":
                self.forget()
        if items:
            self._apply_items(items)
        if changes:
            self.seen = changes[-1].number

    def _apply_items(self, contents: Mapping[str, Any]) -> None:
        recommend, catalogue = self.recommend, self.recommend.catalogue
        assert catalogue is not None, "a model without a catalogue is not served"
        removed = {name: own["item"] for name, own in contents.items() if own.get("removed")}
        added = [own["item"] for name, own in contents.items() if name not in removed]
        if present := [name for name in removed if name in catalogue]:
            catalogue.remove(present)
        if added:
            catalogue.add(added, recommend.model, recommend.processor, replace=True, progress=False)
            self._encode([item["item_id"] for item in added])
        self.gone = {name: item for name, item in {**self.gone, **removed}.items() if name not in catalogue}

    def _encode(self, names: Sequence[str]) -> None:
        if self.recommend.model.config.num_segment_layers:
            self.recommend.warm(progress=False, item_ids=names)

    def forget(self) -> None:
        """Drop what is kept of histories: after the deletion of a user's events nothing of them stays in memory."""
        if self.recommend.user_states is not None:
            self.recommend.user_states.clear()
        self.recommend.segment_cache.clear()
        self.recommend.processor.forget_texts()
        forget_texts(self.recommend.model)


class Service:
    """Answers requests from a model and a store. Its methods are called by one thread, except `ready` and `digest`.

    Args:
        settings: The settings.
        store: The store.
        owns_process: Whether nothing else runs in the process, so that its garbage collection may be configured.
    """

    def __init__(self, settings: Settings, store: Store, owns_process: bool = False) -> None:
        self.settings, self.store, self.owns_process = settings, store, owns_process
        self._loaded: Loaded | None = None
        self._loading = threading.Lock()
        self._wanted: tuple[str, str] | None = None  # model and digest of the newest change of the model
        self.failure: str | None = None
        """Why the model could not be loaded."""

    @property
    def ready(self) -> bool:
        """Whether the model is loaded and warm."""
        return self._loaded is not None

    @property
    def loaded(self) -> Loaded:
        """The model that answers."""
        if self._loaded is None:
            raise Conflict(self.failure or "the model is being loaded")
        return self._loaded

    def load(self) -> None:
        """Load and warm the model that the store names, else that of the settings."""
        named = [change for change in self.store.changes(0) if change.kind == "model"]
        model, digest = self.settings.model, None
        if named:
            model, digest = named[-1].content["model"], named[-1].content["digest"]
        self._loaded = self._load(model, digest)

    def reload(self, model: str | None, digest: str | None) -> dict[str, Any]:
        """Load another model, or the same folder again, while the present one answers; then answer by the new one.

        Args:
            model: Folder or Hub id; None = as before.
            digest: The digest that it must have; None = any.

        Raises:
            Conflict: It has another digest.
        """
        new = self._load(model or self.loaded.name, digest)
        self._loaded = new
        self.store.put_model(new.name, new.digest)
        return {"model": new.name, "digest": new.digest}

    def _load(self, model: str, digest: str | None) -> Loaded:
        with self._loading:
            new = Loaded(model, self.settings)
            if digest is not None and new.digest != digest:
                raise Conflict(f"the model {model!r} has the digest {new.digest}, not {digest}")
            new.apply(self.store.changes(0))
            new.warm()
            if self.owns_process:
                # A full collection visits all objects of model and catalogue, which stay: requests would wait for it.
                gc.unfreeze()
                gc.collect()
                gc.freeze()
            return new

    def sync(self) -> None:
        """Apply what other workers have written; a new model is loaded in the background."""
        loaded = self.loaded
        changes = self.store.changes(loaded.seen)
        loaded.apply(changes)
        for change in changes:
            wanted = (change.content.get("model", ""), change.content.get("digest", ""))
            if change.kind == "model" and wanted[1] != loaded.digest and wanted != self._wanted:
                self._wanted = wanted
                threading.Thread(target=self._follow, args=wanted, daemon=True).start()

    def _follow(self, model: str, digest: str) -> None:
        try:
            self._loaded = self._load(model, digest)
        except (OSError, ValueError, Conflict) as error:
            logger.error("the model %s cannot be loaded, the present one stays: %s", model, error)

    # ---------------------------------------------------------------------------------------------------------- answers

    def answer(self, requests: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Answer requests together.

        A request has the form of the pipeline's; with a `user_id`, the events of this user in the store precede those
        of its `history`.

        Returns:
            For each request its answer, or the error that concerns it alone.
        """
        self.sync()
        loaded = self.loaded
        results: list[Any] = [None] * len(requests)
        full: dict[int, dict[str, Any]] = {}
        most = loaded.recommend.processor.max_events
        users = {request["user_id"] for request in requests if "user_id" in request}
        known = self.store.histories(users, most) if users else {}
        for place, request in enumerate(requests):
            own = {name: value for name, value in request.items() if name != "user_id"}
            if "user_id" in request:
                events = [event for stored in known[request["user_id"]] if (event := self._read(loaded, stored))]
                own["history"] = [*events, *(own.get("history") or [])]
            full[place] = own
        answers = loaded.recommend(list(full.values()), batch_size=len(full), on_error="return") if full else []
        for place, answer in zip(full, answers):
            results[place] = answer
        return results

    @staticmethod
    def _read(loaded: Loaded, event: dict[str, Any]) -> dict[str, Any] | None:
        """Return a stored event for a request; None if it is of an item that nobody knows any more."""
        item = event.get("item")
        if not isinstance(item, Mapping) or set(item) != {"item_id"}:
            return event
        name, catalogue = item["item_id"], loaded.recommend.catalogue
        if catalogue is not None and name in catalogue:
            return event
        return {**event, "item": loaded.gone[name]} if name in loaded.gone else None

    def similar(self, item_id: str, top_k: int) -> list[dict[str, Any]]:
        """Return the items whose vectors are nearest to an item's, as an answer."""
        self.sync()
        recommend = self.loaded.recommend
        catalogue = recommend._fitting_catalogue()
        if item_id not in catalogue:
            raise Unknown(f"item_id {short(item_id)} is not in the catalogue")
        found = catalogue.search(catalogue.vectors([item_id]), top_k, [[item_id]])[0]
        texts = recommend.processor.item_texts([catalogue.item(name) for name, _ in found])
        return [
            {"rank": rank, "item": text, "item_id": name, "score": score}
            for rank, ((name, score), text) in enumerate(zip(found, texts), 1)
        ]

    # ----------------------------------------------------------------------------------------------------------- writes

    def check_events(self, several: Sequence[Any]) -> list[Any]:
        """Check the events of several requests: mappings in the form of a history's events, with a `user_id` each.

        Returns:
            For each request, user id and event of each; or its error, which names the place.
        """
        self.sync()
        found: list[Any] = []
        for events in several:
            try:
                found.append(self._checked_events(events))
            except (ValueError, TypeError) as error:
                found.append(error)
        return found

    def _checked_events(self, events: Any) -> list[tuple[str, dict[str, Any]]]:
        loaded, found = self.loaded, []
        for place, event in _numbered(events, "events"):
            check_size(event, place)
            if event.get("user_id") is None:
                raise ValueError(f"{place}.user_id: missing; an event belongs to a user")
            own = {name: value for name, value in event.items() if name != "user_id"}
            if isinstance(own.get("item"), Mapping) and own["item"].get("item_id") is not None:
                own["item"] = {**own["item"], "item_id": normalize_id(own["item"]["item_id"], f"{place}.item.item_id")}
            self._check_event(loaded.recommend, own, place)
            found.append((user_name(event["user_id"]), own))
        return found

    @staticmethod
    def _check_event(recommend: RecommendationPipeline, event: dict[str, Any], place: str) -> None:
        item, catalogue = event.get("item"), recommend.catalogue
        item = item if isinstance(item, Mapping) else {}
        by_id = set(item) == {"item_id"}
        if by_id and (catalogue is None or item["item_id"] not in catalogue):
            raise ValueError(f"{place}.item.item_id: {short(item['item_id'])} is not in the catalogue: add it first")
        shown = {**event, "item": "an item of the catalogue"} if by_id else event
        try:
            recommend.processor.read({"history": [shown]}, "retrieval")
        except (ValueError, TypeError) as error:
            raise type(error)(str(error).replace("history[0]", place, 1)) from error
        moment = event.get("timestamp")
        if moment is not None:
            event["timestamp"] = time_seconds(moment, f"{place}.timestamp")

    def add_items(self, items: Any) -> list[str]:
        """Add items, or replace those of the same ids; returns the ids."""
        loaded, found = self.loaded, {}
        for place, item in _numbered(items, "items"):
            check_size(item, place)
            if item.get("item_id") is None:
                raise ValueError(f"{place}.item_id: missing; an item of the catalogue has an id")
            name = normalize_id(item["item_id"], f"{place}.item_id")
            if "\0" in name:
                raise ValueError(f"{place}.item_id: {short(name)} contains the character NUL: give another id")
            found[name] = {**item, "item_id": name}
            try:
                loaded.recommend.processor.item_texts([found[name]])
            except (ValueError, TypeError) as error:
                raise type(error)(str(error).replace("items[0]", place, 1)) from error
        self.store.put_items(list(found.values()))
        self.sync()
        return list(found)

    def remove_item(self, item_id: str) -> None:
        """Remove an item."""
        self.sync()
        catalogue = self.loaded.recommend.catalogue
        if catalogue is None or item_id not in catalogue:
            raise Unknown(f"item_id {short(item_id)} is not in the catalogue")
        self.store.remove_item(item_id, catalogue.item(item_id))
        self.sync()

    def delete_user(self, user_id: str) -> int:
        """Delete a user's events, and drop what is kept of histories; returns the number of events."""
        count = self.store.delete_user(user_id)
        self.sync()
        return count

    def expire(self, now: Callable[[], float] = time.time) -> int:
        """Delete events that are older than `retention_days`; returns their number."""
        days = self.settings.retention_days
        return 0 if days is None else self.store.delete_before(now() - 86400 * days)


def _numbered(given: Any, name: str) -> list[tuple[str, dict[str, Any]]]:
    """Return one mapping or several with their places."""
    entries = given if isinstance(given, list) else [given]
    if not entries:
        raise ValueError(f"{name}: there are none; give at least one")
    if len(entries) > MAX_ITEMS:
        raise ValueError(f"{name}: {len(entries):,} entries; the limit is {MAX_ITEMS:,}: give fewer at a time")
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise TypeError(f"{name}[{number}]: expected an object, got {short(entry)}")
    return [(f"{name}[{number}]", entry) for number, entry in enumerate(entries)]


__all__ = ["Conflict", "Loaded", "Service", "Settings", "Unknown"]
