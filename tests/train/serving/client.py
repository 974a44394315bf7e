"""Calls the application of a service in this process, without a network."""

import asyncio
import contextlib
import json

from m6rec.train.serving.app import make_app
from m6rec.train.serving.service import Settings

TOKEN = {"Authorization": "Bearer secret"}


class Client:
    """Sends requests to an application."""

    def __init__(self, app):
        self.app, self.worker = app, app.state.worker

    async def raw(self, method, path, body=b"", headers=None):
        """Return status, headers and body of a response."""
        sent, parts = [], iter([{"type": "http.request", "body": body, "more_body": False}])
        path, _, query = path.partition("?")
        scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path}
        scope |= {"raw_path": path.encode(), "query_string": query.encode(), "scheme": "http", "root_path": ""}
        scope |= {"server": ("here", 80), "client": ("there", 1)}
        scope["headers"] = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]

        async def receive():
            return next(parts, {"type": "http.disconnect"})

        async def send(message):
            sent.append(message)

        await self.app(scope, receive, send)
        found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return sent[0]["status"], found, b"".join(message.get("body", b"") for message in sent[1:])

    async def call(self, method, path, body=None, headers=None):
        """Return status and JSON of a response."""
        status, _, content = await self.raw(method, path, json.dumps(body).encode(), headers)
        return status, json.loads(content)

    async def post(self, path, body):
        """Send with the token; return the JSON of the response, which must be a success."""
        status, content = await self.call("POST", path, body, TOKEN)
        assert status == 200, content
        return content

    async def ready(self):
        """Wait until the model is loaded."""
        while (await self.call("GET", "/ready"))[0] != 200:
            assert self.worker.service.failure is None, self.worker.service.failure
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def serving(folder, store, **more):
    """Run a service; yields its client."""
    app = make_app(Settings(str(folder), str(store), **{"token": "secret", **more}))
    async with app.router.lifespan_context(app):
        client = Client(app)
        await client.ready()
        yield client
