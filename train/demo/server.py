"""The demo over HTTP: its page, and the answers that the page asks for."""

import json
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool

from .answers import Demo

PAGE = Path(__file__).with_name("page")
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
MOST = 1 << 16
"""Largest body in bytes."""
WAITING = 64
"""Requests that wait or are answered at once; the page tries again after a 503."""
KEEP_ALIVE = 75
"""Seconds that a visitor's connection stays open between two clicks."""
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:"


class Endpoints:
    """What a demo's addresses answer.

    Args:
        demo: The demo.
    """

    def __init__(self, demo: Demo) -> None:
        self._demo, self._room = demo, threading.Semaphore(WAITING)
        self._files = {path.name: path.read_bytes() for path in PAGE.iterdir() if path.suffix in KINDS}

    async def about(self) -> Response:
        """Return what the page says of the model."""
        return _json(self._demo.about())

    async def items(self, q: str = "") -> Response:
        """Search."""
        return await self._answer(self._demo.find, q[:200])

    async def lists(self, request: Request) -> Response:
        """Return the lists of a visitor's state."""
        return await self._posted(self._demo.lists, request)

    async def reasons(self, request: Request) -> Response:
        """Return why items of the lists have their scores."""
        return await self._posted(self._demo.reasons, request)

    async def write(self, request: Request) -> Response:
        """Write a text."""
        return await self._posted(self._demo.write, request)

    async def file(self, name: str = "index.html") -> Response:
        """Return a file of the page."""
        if name not in self._files:
            return _json({"error": f"there is no file {name!r:.80}"}, 404)
        headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"}
        return Response(self._files[name], 200, headers, KINDS[Path(name).suffix])

    async def _posted(self, work: Callable[[Any], Any], request: Request) -> Response:
        """Read a body, and answer it."""
        parts, size = [], 0
        async for part in request.stream():
            parts.append(part)
            size += len(part)
            if size > MOST:
                return _json({"error": f"the body has more than {MOST:,} bytes, which is the limit"}, 413)
        try:
            given = json.loads(b"".join(parts))
        except (ValueError, RecursionError) as error:
            return _json({"error": f"the body is no valid JSON: {error}"}, 422)
        return await self._answer(work, given)

    async def _answer(self, work: Callable[[Any], Any], given: Any) -> Response:
        """Answer in another thread, if there is room."""
        if not self._room.acquire(blocking=False):
            return _json({"error": "many people are here: try again in a second"}, 503, {"Retry-After": "1"})
        try:
            return _json(await run_in_threadpool(work, given))
        except (ValueError, TypeError) as error:
            return _json({"error": str(error)}, 422)
        finally:
            self._room.release()


def make_app(demo: Demo) -> FastAPI:
    """Make the application of a demo."""
    app, own = FastAPI(title="m6rec demo", docs_url=None, redoc_url=None, openapi_url=None), Endpoints(demo)
    for name, endpoint in (("about", own.about), ("items", own.items)):
        app.add_api_route(f"/api/{name}", endpoint, methods=["GET"])
    for name, posted in (("lists", own.lists), ("reasons", own.reasons), ("write", own.write)):
        app.add_api_route(f"/api/{name}", posted, methods=["POST"])
    app.add_api_route("/{name}", own.file, methods=["GET"])
    app.add_api_route("/", _index(own), methods=["GET"])
    return app


def _index(own: Endpoints) -> Callable[[], Awaitable[Response]]:
    async def index() -> Response:
        return await own.file()

    return index


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    text = json.dumps(content, allow_nan=False, ensure_ascii=False)
    return Response(text, status, {"Cache-Control": "no-store", **(headers or {})}, "application/json")


__all__ = ["KEEP_ALIVE", "make_app"]
