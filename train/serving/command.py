"""The commands `m6rec serve`, `m6rec log import` and `m6rec log export`."""

import ipaddress
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import uvicorn

from .app import ENVIRONMENT
from .service import Loaded, Settings
from .store import Store
from .tables import export_events, export_items, import_events

HUNG = 60
"""Seconds without a sign of life after which a worker is killed and replaced. A worker that shares a busy machine, or
imports torch there, may be silent for longer than uvicorn's five seconds."""
TOKEN = "M6REC_TOKEN"
"""Environment variable with the token of requests that write."""


def serve(settings: Settings, host: str, port: int, workers: int, say: Callable[[str], None]) -> None:
    """Serve until the process is told to stop; then the requests that were taken are answered first.

    Args:
        settings: The settings.
        host: Address to listen on.
        port: Port to listen on.
        workers: Number of processes; they share the store.
        say: Prints a line.

    Raises:
        ValueError: Writes from other machines would need no token.
    """
    if workers < 1:
        raise ValueError(f"--workers {workers}: give a whole number from 1 up")
    if not settings.token and not _is_local(host):
        raise ValueError(f"--host {host}: other machines could write: set {TOKEN}, or give --token")
    Store(settings.store).close()  # an error of the store is reported here, and tables exist before workers start
    os.environ[ENVIRONMENT] = settings.to_json()
    say(f"serving {settings.model} at http://{host}:{port}, documentation at /docs, events in {_shown(settings.store)}")
    with tempfile.TemporaryDirectory(prefix="m6rec-metrics-") as folder:
        if workers > 1:
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        uvicorn.run(
            "m6rec.train.serving.app:from_environment",
            factory=True,
            host=host,
            port=port,
            workers=workers,
            access_log=False,  # addresses name users
            log_level="warning",
            timeout_graceful_shutdown=int(settings.timeout) + 5,
            timeout_worker_healthcheck=HUNG,
        )


def print_digest(settings: Settings, say: Callable[[str], None]) -> None:
    """Print the digest that `/ready` reports for a model, for `/reload`."""
    say(Loaded(settings.model, settings).digest)


def log_import(store: str, table: str, say: Callable[[str], None]) -> None:
    """Write the events of a table into a store."""
    opened = Store(store)
    try:
        say(f"{import_events(opened, Path(table))} events written to {_shown(store)}")
    finally:
        opened.close()


def log_export(store: str, table: str, items: str | None, say: Callable[[str], None]) -> None:
    """Write the events of a store, and the items that were added to it, as tables."""
    opened = Store(store)
    try:
        written, left = export_events(opened, Path(table))
        say(f"{written} events written to {table}; {left} left out, since they name no item by its id")
        if items is not None:
            say(f"{export_items(opened, Path(items))} items written to {items}")
    finally:
        opened.close()


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _shown(store: str) -> str:
    """Return a store without the password of its URL."""
    from sqlalchemy.engine import make_url

    return make_url(store).render_as_string(hide_password=True) if "://" in store else store


__all__ = ["TOKEN", "log_export", "log_import", "print_digest", "serve"]
