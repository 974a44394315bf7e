"""A service in processes of its own, under load, and killed: shared by the benchmark and the tests of serving."""

import asyncio
import contextlib
import http.client
import importlib.util
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
STARTED = 600
"""Seconds within which a service must start, and end."""

spec = importlib.util.spec_from_file_location("load_test", ROOT / "examples" / "load_test.py")
assert spec is not None and spec.loader is not None
load_test = importlib.util.module_from_spec(spec)
spec.loader.exec_module(load_test)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Running:
    """A service of several workers in processes of its own.

    Args:
        model: Folder of the model.
        store: The store.
        workers: Number of workers.
        options: Further options of `m6rec serve`.
    """

    def __init__(self, model: Any, store: Any, workers: int = 1, options: tuple[str, ...] = ()) -> None:
        self.port, self.workers = free_port(), workers
        self.address = f"http://127.0.0.1:{self.port}"
        words = ["serve", model, "--store", store, "--port", self.port, "--workers", workers, "--token", "secret"]
        code = "import sys; from m6rec.train.cli import main; sys.exit(main())"
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, words), *options], env=environment, start_new_session=True
        )

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def post(self, path: str, body: Any) -> tuple[int, Any] | None:
        """Return status and content, which is read if it is JSON; None if the connection broke."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("POST", path, json.dumps(body), {"Authorization": "Bearer secret"})
            response = connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()
        is_json = response.headers.get_content_type() == "application/json"
        return response.status, json.loads(content) if is_json else content

    def wait(self) -> None:
        """Wait until every worker answers: as many answers in a row as are unlikely to come from some of them only."""
        until, good = time.monotonic() + STARTED, 0
        while good < 10 * self.workers:
            if time.monotonic() > until or self.process.poll() is not None:
                raise RuntimeError("the service does not start")
            found = self.post("/recommend", {"user": "a man", "top_k": 1})
            good = good + 1 if found is not None and found[0] == 200 else 0
            if not good:
                time.sleep(0.1)

    def children(self) -> list[psutil.Process]:
        """Return the workers, if there are several."""
        found = []
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):  # killed, and not collected yet
                if "resource_tracker" not in " ".join(child.cmdline()):
                    found.append(child)
        return found

    def megabytes(self) -> float:
        """Return the resident memory of all processes."""
        parent = psutil.Process(self.process.pid)
        return sum(own.memory_info().rss for own in [parent, *parent.children(recursive=True)]) / 2**20

    def kill(self) -> None:
        """Kill all processes at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> int:
        """Tell it to end, and return its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STARTED)


def load(service: Running, clients: int, seconds: float, **more: Any) -> dict[str, Any]:
    """Put load on a service from this process; arguments as of `examples/load_test.py`, `token` among them."""
    token = more.pop("token", "")
    return dict(asyncio.run(load_test.run(service.address, clients, seconds, token, **more)))


def slope(samples: list[tuple[float, float]]) -> float:
    """Fit MB a minute to (minute, MB) samples, without the first quarter, in which caches fill."""
    own = samples[len(samples) // 4 :]
    middle, mean = (statistics.fmean(values) for values in zip(*own))
    spread = sum((minute - middle) ** 2 for minute, _ in own)
    return round(sum((minute - middle) * (size - mean) for minute, size in own) / spread, 2) if spread else 0.0


class Writers:
    """Threads that write pairs of events until they are stopped, whatever happens to the service.

    Attributes:
        service: The service that they write to; a new one may take its place at any time.
        acknowledged: For each user the numbers of the pairs whose write was acknowledged.
        errors: Number of answers other than success, 429 and 503.
    """

    def __init__(self, service: Running, count: int) -> None:
        self.service, self.errors = service, 0
        self.acknowledged: dict[str, list[int]] = {f"w{number}": [] for number in range(count)}
        self._done = threading.Event()
        self._threads = [threading.Thread(target=self._write, args=(name,)) for name in self.acknowledged]

    def _write(self, name: str) -> None:
        number = 0
        while not self._done.is_set():
            events = [{"user_id": name, "query": f"{number} {part}", "timestamp": 1.7e9 + number} for part in (0, 1)]
            found = self.service.post("/events", events)
            if found is None or found[0] in (429, 503):
                self._done.wait(0.05)  # it starts, and needs the processor
            elif found[0] == 200:
                self.acknowledged[name].append(number)
            else:
                self.errors += 1
            number += 1

    def __enter__(self) -> "Writers":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()


def kill_under_load(model: Any, store: Any, kills: int, seed: int = 0) -> dict[str, int]:
    """Kill workers, and each fourth time the whole service, while events are written.

    Args:
        model: Folder of the model.
        store: The store.
        kills: Number of kills.
        seed: Seed of the moments of kills and of the workers that are killed.

    Returns:
        `acknowledged` pairs of events, those `lost`, `torn` pairs of which one event is kept, and `errors`.
    """
    rng, service = random.Random(seed), Running(model, store, 2)
    try:
        service.wait()
        with Writers(service, 4) as writers:
            for kill in range(kills):
                time.sleep(rng.random())
                if kill % 4 == 3:
                    service.kill()
                    writers.service = service = Running(model, store, 2)
                elif children := service.children():
                    with contextlib.suppress(psutil.NoSuchProcess):
                        rng.choice(children).kill()
                service.wait()
    finally:
        service.kill()
    kept = kept_pairs(store)
    written = [(user, number) for user, numbers in writers.acknowledged.items() for number in numbers]
    return {
        "acknowledged": len(written),
        "lost": sum(pair not in kept for pair in written),
        "torn": sum(parts != {0, 1} for parts in kept.values()),
        "errors": writers.errors,
    }


def kept_pairs(store: Any) -> dict[tuple[str, int], set[int]]:
    """Return (user, number of a pair) -> the parts of the pair that a store holds."""
    from m6rec.train.serving.store import Store

    kept: dict[tuple[str, int], set[int]] = {}
    for user, _, event in Store(store).all_events():
        number, part = map(int, event["query"].split())
        kept.setdefault((user, number), set()).add(part)
    return kept
