"""The HTTP interface of a service.

Bodies are read and checked here, answers come from `Service`. All work on model and store runs in one other thread per
worker, which answers the requests that arrive together in one batch.
"""

import asyncio
import contextlib
import hmac
import json
import logging
import math
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from fastapi import FastAPI, Request, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess
from sqlalchemy.exc import SQLAlchemyError

from ...ranking_m6rec import WISHES
from ...values_m6rec import normalize_id
from ...version import __version__
from ..answering.loading import parse_json
from .batching import Batcher, Busy, TooLate
from .service import Conflict, Service, Settings, Unknown
from .store import Store, user_name

logger = logging.getLogger(__name__)

ENVIRONMENT = "M6REC_SERVICE"
"""Environment variable with the settings, for workers."""
LATER = 1
"""Seconds after which a client may try again while the service is not ready or the database is busy."""
EXPIRY = 3600.0
"""Seconds between two deletions of old events."""
FOLLOWING = 1.0
"""Seconds between two looks at the changes of other workers, while no request comes."""
CLOSED = 0.02
"""Share of answers after which a worker of several closes the connection. Connections that are made together are all
taken by one worker, and would stay with it; the next connection of a client is taken by a worker that is free."""
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """What a worker counts; with several workers in files that all of them read (`PROMETHEUS_MULTIPROC_DIR`)."""

    def __init__(self) -> None:
        self.shared = "PROMETHEUS_MULTIPROC_DIR" in os.environ
        """Whether there are other workers."""
        self._registry = CollectorRegistry()
        more: dict[str, Any] = {"registry": self._registry}
        self.requests = Counter("m6rec_requests", "Requests.", ["endpoint", "status"], **more)
        self.seconds = Histogram("m6rec_request_seconds", "Time of a request.", ["endpoint"], buckets=BUCKETS, **more)
        sizes = (1, 2, 4, 8, 16, 32, 64, 128)
        self.batches = Histogram("m6rec_batch_size", "Requests answered together.", buckets=sizes, **more)
        self.events = Counter("m6rec_events_written", "Events written.", **more)
        self.waiting = Gauge(
            "m6rec_waiting_requests", "Requests that wait or are answered.", multiprocess_mode="livesum", **more
        )

    def text(self) -> bytes:
        """Return all counts of all workers in the format of Prometheus."""
        if not self.shared:
            return generate_latest(self._registry)
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)
        return generate_latest(registry)


class Worker:
    """One process of a service: the service, its thread, and its batches.

    Args:
        settings: The settings.
        owns_process: As of `Service`.
    """

    def __init__(self, settings: Settings, owns_process: bool = False) -> None:
        self.settings, self.metrics = settings, Metrics()
        self.service = Service(settings, Store(settings.store), owns_process)
        self._thread = ThreadPoolExecutor(1, "m6rec-model")
        self._others = ThreadPoolExecutor(2, "m6rec-store")
        wait = settings.wait_ms / 1000
        most, room = settings.batch_size, settings.max_waiting
        self._answers = Batcher(self.service.answer, self._thread, most, wait, room, self.metrics.batches.observe)
        # Events that arrive together are checked together, with one look at the changes of other workers, and written
        # in one transaction: each costs a wait for the disk.
        self._checks = Batcher(self.service.check_events, self._thread, 1024, 0.0, room)
        self._events = Batcher(self._write_events, self._others, 1024, 0.0, room)
        self._tasks: list[asyncio.Task] = []

    async def start(self) -> None:
        """Begin to load the model, and answer as soon as it is warm."""
        self._answers.start()
        self._checks.start()
        self._events.start()
        create = asyncio.get_running_loop().create_task
        self._tasks = [create(self._load()), create(self._follow()), create(self._expire())]

    async def stop(self) -> None:
        """End; the server has answered all requests that it took."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._answers.stop()
        await self._checks.stop()
        await self._events.stop()
        self._thread.shutdown()
        self._others.shutdown()
        self.service.store.close()

    async def model(self, work: Callable[..., Any], *given: Any) -> Any:
        """Run something in the model's thread, if the model is loaded."""
        self.service.loaded  # noqa: B018  raises an error otherwise
        return await self._in_thread(work, *given)

    async def _in_thread(self, work: Callable[..., Any], *given: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, partial(work, *given))

    async def aside(self, work: Callable[..., Any], *given: Any) -> Any:
        """Run something in another thread, while the model answers."""
        return await asyncio.get_running_loop().run_in_executor(self._others, partial(work, *given))

    async def answer(self, request: dict[str, Any]) -> Any:
        """Answer a request, in a batch with others."""
        self.service.loaded  # noqa: B018  as above
        self.metrics.waiting.set(self._answers.size + 1)
        try:
            answer = await self._answers.submit(request, self.settings.timeout)
        finally:
            self.metrics.waiting.set(self._answers.size)
        if isinstance(answer, dict):
            raise ValueError(answer["error"])
        return answer

    async def write_events(self, given: Any) -> int:
        """Check and write events; returns their number."""
        self.service.loaded  # noqa: B018  raises an error otherwise
        events = await self._checks.submit(given, self.settings.timeout)
        await self._events.submit(events, self.settings.timeout)
        self.metrics.events.inc(len(events))
        return len(events)

    def _write_events(self, groups: list[list[tuple[str, dict[str, Any]]]]) -> list[None]:
        self.service.store.add_events([event for group in groups for event in group])
        return [None] * len(groups)

    async def _load(self) -> None:
        try:
            await self._in_thread(self.service.load)
        except Exception as error:  # raised again: whatever it is, /ready must say why the model is not there
            self.service.failure = f"the model cannot be loaded: {error}"
            logger.exception(self.service.failure)
            raise

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(FOLLOWING)
            if self.service.ready:
                with contextlib.suppress(SQLAlchemyError):  # the next look succeeds, or requests report it
                    await self.model(self.service.sync)

    async def _expire(self) -> None:
        while True:
            with contextlib.suppress(SQLAlchemyError):
                await self.aside(self.service.expire)
            await asyncio.sleep(EXPIRY)


# ------------------------------------------------------------------------------------------------------------ endpoints


def from_environment() -> FastAPI:
    """Make the application of a worker."""
    settings = Settings(**json.loads(os.environ[ENVIRONMENT]))
    torch.set_num_threads(settings.threads)
    return make_app(settings, owns_process=True)


def make_app(settings: Settings, owns_process: bool = False) -> FastAPI:
    """Make the application of a service."""
    worker = Worker(settings, owns_process)

    @contextlib.asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        await worker.start()
        yield
        await worker.stop()

    app = FastAPI(title="m6rec", version=__version__, description=DESCRIPTION, lifespan=life)
    app.state.worker = worker
    route = partial(_route, app, worker)
    route("POST", "/recommend", recommend, "Recommend items to a user.", REQUEST)
    route("POST", "/score", score, "Score the candidates of a request.", REQUEST)
    route("POST", "/explain", explain, "Recommend items, each with what every event contributed.", REQUEST)
    route("GET", "/similar/{item_id:path}", similar, "Items that are similar to an item of the catalogue.")
    route("POST", "/events", add_events, "Keep one event or several.", EVENTS, writes=True)
    route("POST", "/items", add_items, "Add or replace one item or several.", ITEMS, writes=True)
    route("DELETE", "/items/{item_id:path}", remove_item, "Remove an item.", writes=True)
    route("DELETE", "/users/{user_id:path}", delete_user, "Delete all that is kept of a user.", writes=True)
    route("POST", "/reload", reload, "Load another model while the present one answers.", MODEL, writes=True)
    route("GET", "/health", health, "Whether the process runs.")
    route("GET", "/ready", ready, "Whether the model is loaded and warm, and which it is.")
    app.add_api_route("/metrics", lambda: Response(worker.metrics.text(), media_type=PLAIN), methods=["GET"])
    return app


Endpoint = Callable[[Worker, Any, Mapping[str, str], Mapping[str, str]], Awaitable[Any]]
"""Receives the worker, the body, the parameters of the path and those of the query; returns what becomes JSON."""


def _route(
    app: FastAPI,
    worker: Worker,
    method: str,
    path: str,
    run: Endpoint,
    text: str,
    body: dict[str, Any] | None = None,
    writes: bool = False,
) -> None:
    """Add an endpoint, with its errors, counts and limits."""
    name = path.split("/")[1]

    async def endpoint(request: Request) -> Response:
        begin = time.monotonic()
        status, content, headers = await _handle(worker, request, run, body is not None, writes)
        worker.metrics.requests.labels(name, str(status)).inc()
        worker.metrics.seconds.labels(name).observe(time.monotonic() - begin)
        if worker.metrics.shared and random.random() < CLOSED:
            headers["Connection"] = "close"
        return Response(json.dumps(content, allow_nan=False), status, headers, "application/json")

    parameters = [
        {"name": part.split(":")[0], "in": "path", "required": True, "schema": {"type": "string"}}
        for part in (piece[1:-1] for piece in path.split("/") if piece.startswith("{"))
    ]
    more: dict[str, Any] = {"parameters": parameters}
    if body is not None:
        more["requestBody"] = {"required": True, "content": {"application/json": body}}
    if writes:
        more["security"] = [{"token": []}]
    responses: dict[int | str, dict[str, Any]] = {code: {"description": own} for code, own in ERRORS.items()}
    app.add_api_route(
        path, endpoint, methods=[method], summary=text, name=name, responses=responses, openapi_extra=more
    )


async def _handle(
    worker: Worker, request: Request, run: Endpoint, has_body: bool, writes: bool
) -> tuple[int, Any, dict[str, str]]:
    """Return status, content and headers of the response."""
    settings = worker.settings
    if writes and settings.token and not _has_token(request, settings.token):
        message = "give the token of the service: Authorization: Bearer TOKEN"
        return 401, {"error": message}, {"WWW-Authenticate": "Bearer"}
    try:
        body = parse_json(await _body(request, settings.max_body)) if has_body else None
        return 200, await run(worker, body, request.path_params, request.query_params), {}
    except _TooLarge as error:
        return 413, {"error": str(error)}, {}
    except Busy as error:
        return 429, {"error": str(error)}, {"Retry-After": str(math.ceil(error.seconds))}
    except TooLate as error:
        return 504, {"error": str(error)}, {"Retry-After": str(LATER)}
    except Unknown as error:
        return 404, {"error": str(error)}, {}
    except Conflict as error:
        status = 409 if worker.service.ready else 503
        return status, {"error": str(error)}, {"Retry-After": str(LATER)} if status == 503 else {}
    except (ValueError, TypeError) as error:
        return 422, {"error": str(error)}, {}
    except SQLAlchemyError as error:
        logger.exception("the database fails")
        return 503, {"error": f"the database fails: {type(error).__name__}"}, {"Retry-After": str(LATER)}


class _TooLarge(Exception):  # noqa: N818  the name of the condition
    pass


async def _body(request: Request, most: int) -> bytes:
    """Read a body, but not more than the limit."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise _TooLarge(f"the body has more than {most:,} bytes, which is the limit: give less at a time")
        parts.append(part)
    return b"".join(parts)


def _has_token(request: Request, token: str) -> bool:
    """Compare in a time that does not depend on the token."""
    given = request.headers.get("authorization", "")
    return hmac.compare_digest(given.encode(), f"Bearer {token}".encode())


async def recommend(worker: Worker, body: Any, path: Mapping[str, str], query: Mapping[str, str]) -> Any:
    """Answer a request."""
    return {"items": await worker.answer(_request(worker.settings, body))}


async def score(worker: Worker, body: Any, path: Mapping[str, str], query: Mapping[str, str]) -> Any:
    """Answer a request with candidates."""
    request = _request(worker.settings, body)
    if not request.get("candidates"):
        raise ValueError("candidates: missing; give the items to score, or use /recommend")
    return {"items": await worker.answer(request)}


async def explain(worker: Worker, body: Any, path: Mapping[str, str], query: Mapping[str, str]) -> Any:
    """Answer a request with reasons."""
    return {"items": await worker.answer({**_request(worker.settings, body), "explain": True})}


async def similar(worker: Worker, body: Any, path: Mapping[str, str], query: Mapping[str, str]) -> Any:
    """Find the items with similar vectors."""
    given = query.get("top_k", "10")
    if not given.isascii() or not given.isdecimal() or not 0 < int(given[:9]) <= MAX_SIMILAR:
        raise ValueError(f"top_k={given[:80]!r}: give a whole number from 1 to {MAX_SIMILAR}")
    name = normalize_id(path["item_id"], "item_id")
    return {"items": await worker.model(worker.service.similar, name, int(given))}


async def add_events(worker: Worker, body: Any, path: Mapping[str, str], query: Mapping[str, str]) -> Any:
    """Write events."""
    return {"written": await worker.write_events(body)}


async def add_items(worker: Worker, body: Any, path: Mapping[str, str], query: Mapping[str, str]) -> Any:
    """Add or replace items."""
    return {"item_ids": await worker.model(worker.service.add_items, body)}


async def remove_item(worker: Worker, body: Any, path: Mapping[str, str], query: Mapping[str, str]) -> Any:
    """Remove an item."""
    name = normalize_id(path["item_id"], "item_id")
    await worker.model(worker.service.remove_item, name)
    return {"removed": name}


async def delete_user(worker: Worker, body: Any, path: Mapping[str, str], query: Mapping[str, str]) -> Any:
    """Delete a user's events and states."""
    return {"deleted_events": await worker.model(worker.service.delete_user, user_name(path["user_id"]))}


async def reload(worker: Worker, body: Any, path: Mapping[str, str], query: Mapping[str, str]) -> Any:
    """Load a model."""
    known = {"model", "digest"}
    if not isinstance(body, dict) or not set(body) <= known or not all(isinstance(own, str) for own in body.values()):
        raise TypeError("expected an object with `model`, a folder or a Hub id, and `digest`, both optional texts")
    try:
        return await worker.aside(worker.service.reload, body.get("model"), body.get("digest"))
    except OSError as error:
        raise ValueError(str(error)) from error


async def health(worker: Worker, body: Any, path: Mapping[str, str], query: Mapping[str, str]) -> Any:
    """Report that the process runs."""
    if worker.service.failure is not None:
        raise Conflict(worker.service.failure)
    return {"status": "ok", "version": __version__}


async def ready(worker: Worker, body: Any, path: Mapping[str, str], query: Mapping[str, str]) -> Any:
    """Report the model, and that the database can be read."""
    loaded = worker.service.loaded
    await worker.aside(worker.service.store.ping)
    catalogue = loaded.recommend.catalogue
    return {"model": loaded.name, "digest": loaded.digest, "items": 0 if catalogue is None else len(catalogue)}


def _request(settings: Settings, body: Any) -> dict[str, Any]:
    """Check the sizes of a request, and that it may be given over HTTP."""
    if isinstance(body, str):
        body = {"user": body}
    if not isinstance(body, dict):
        raise TypeError(f"expected a request, an object or a text, got {type(body).__name__}")
    for name, most in (("history", settings.max_events), ("candidates", settings.max_candidates)):
        if isinstance(body.get(name), list) and len(body[name]) > most:
            raise ValueError(f"{name}: {len(body[name]):,} entries; this service takes {most:,}: give fewer")
    if body.get("user_id") is not None:
        body["user_id"] = user_name(body["user_id"])
    else:
        body.pop("user_id", None)
    if not isinstance(body.get("history"), list | None):
        raise TypeError(f"history: expected a list, got {type(body['history']).__name__}")
    return body


MAX_SIMILAR = 1000
PLAIN = "text/plain; version=0.0.4; charset=utf-8"
DESCRIPTION = """Recommendations by a model of m6rec. A request has the form of the pipeline's, and may name a `user_id`
whose events were given to `/events`. An answer contains every event that was acknowledged before it was asked for."""
ERRORS = {
    401: "The token is missing or wrong.",
    404: "There is no such item.",
    409: "The model has another digest.",
    413: "The body is too large.",
    422: "The request is invalid; `error` names the place.",
    429: "Too many requests are waiting; `Retry-After` says when to try again.",
    503: "The model is being loaded, or the database fails.",
    504: "There was no answer in time.",
}
EVENT = {"user_id": "ann", "event": "buy", "item": {"item_id": "00017"}}
REQUEST: dict[str, Any] = {
    "schema": {
        "type": "object",
        "properties": {
            "user_id": {"type": "string", "description": "A user whose events the service keeps."},
            "user": {"description": "Who the user is: a text, or fields."},
            "history": {"type": "array", "items": {}, "description": "Further events, the oldest first."},
            "candidates": {"type": "array", "items": {}, "description": "The items to rank; else the catalogue."},
            **{name: {"description": "As in the pipeline."} for name in ("facts", "now", *WISHES)},
        },
    },
    "example": {"user_id": "ann", "top_k": 5, "filter": {"brand": "North"}},
}
EVENTS = {
    "schema": {"oneOf": [{"type": "object"}, {"type": "array", "items": {"type": "object"}}]},
    "example": [EVENT],
}
ITEMS = {
    "schema": {"oneOf": [{"type": "object"}, {"type": "array", "items": {"type": "object"}}]},
    "example": [{"item_id": "00099", "title": "a red tent", "brand": "North"}],
}
MODEL = {
    "schema": {"type": "object", "properties": {"model": {"type": "string"}, "digest": {"type": "string"}}},
    "example": {"model": "runs/shop-2"},
}


__all__ = ["ENVIRONMENT", "Metrics", "Worker", "from_environment", "make_app"]
