"""Real processes on a real port: workers that share a store, kills at any moment, and an orderly end."""

import asyncio
import contextlib
import http.client
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from m6rec.train.serving.store import Store
from tests.fast import some
from tests.test_repository import ROOT
from tests.train.serving.test_guide import free_port

pytestmark = pytest.mark.slow

spec = importlib.util.spec_from_file_location("load_test", ROOT / "examples" / "load_test.py")
load_test = importlib.util.module_from_spec(spec)
spec.loader.exec_module(load_test)


class Running:
    """A service of several workers in processes of its own."""

    def __init__(self, folder, store, workers):
        self.port = free_port()
        words = ["serve", folder, "--store", store, "--port", self.port, "--workers", workers, "--token", "secret"]
        code = "import sys; from m6rec.train.cli import main; sys.exit(main())"
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, words)], env=environment, start_new_session=True
        )
        self.workers = workers

    def post(self, path, body):
        """Return status and JSON; None if the connection broke."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("POST", path, json.dumps(body), {"Authorization": "Bearer secret"})
            response = connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()
        return response.status, json.loads(content)

    def wait(self):
        """Wait until every worker answers: as many answers in a row as are unlikely to come from some of them only."""
        until, good = time.monotonic() + 120, 0
        while good < 10 * self.workers:
            assert time.monotonic() < until and self.process.poll() is None
            found = self.post("/recommend", {"user": "a man", "top_k": 1})
            good = good + 1 if found is not None and found[0] == 200 else 0
            if not good:
                time.sleep(0.1)

    def children(self):
        found = psutil.Process(self.process.pid).children()
        return [child for child in found if "resource_tracker" not in " ".join(child.cmdline())]

    def kill(self):
        """Kill all processes at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(60) in (0, -signal.SIGTERM)


@contextlib.contextmanager
def running(folder, store, workers):
    service = Running(folder, store, workers)
    try:
        service.wait()
        yield service
        service.stop()
    finally:
        service.kill()


def test_every_answer_of_four_workers_contains_the_events_written_before_it(served, tmp_path):
    with running(served, tmp_path / "events.sqlite", 4) as service:
        found = asyncio.run(load_test.run(f"http://127.0.0.1:{service.port}", 16, 20.0, "secret", events=3))
    assert set(found["statuses"]) == {"200"} and found["stale"] == 0 and found["requests"] > 200


def test_what_was_taken_is_answered_before_the_end(served, tmp_path):
    with running(served, tmp_path / "events.sqlite", 1) as service:
        answers, begun = [], threading.Barrier(9)

        def ask():
            begun.wait()
            answers.append(service.post("/recommend", {"user": "a man", "top_k": 30, "explain": True}))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        begun.wait()
        time.sleep(0.05)
        service.stop()
        for thread in threads:
            thread.join()
    # A connection that came after the signal is refused; one that was taken has a whole answer.
    assert any(answer is not None for answer in answers)
    assert all(answer[0] == 200 and answer[1]["items"] for answer in answers if answer is not None)


@pytest.mark.parametrize("kills", some([4, 100], [4]))
def test_kills_of_workers_and_of_the_service_lose_nothing_that_was_acknowledged(served, tmp_path, kills):
    store, rng, acknowledged = tmp_path / "events.sqlite", random.Random(kills), {}
    service, done = Running(served, store, 2), threading.Event()
    current = [service]
    service.wait()

    def write(name):
        number = 0
        while not done.is_set():
            events = [{"user_id": name, "query": f"{number} {part}", "timestamp": 1.7e9 + number} for part in (0, 1)]
            found = current[0].post("/events", events)
            if found is not None and found[0] == 200:
                acknowledged.setdefault(name, []).append(number)
            assert found is None or found[0] in (200, 429, 503), found
            number += 1

    threads = [threading.Thread(target=write, args=(f"w{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for kill in range(kills):
        time.sleep(rng.random())
        if kill % 4 == 3:
            current[0].kill()
            current[0] = Running(served, store, 2)
        elif children := current[0].children():
            with contextlib.suppress(psutil.NoSuchProcess):
                rng.choice(children).kill()
        current[0].wait()
    done.set()
    for thread in threads:
        thread.join()
    current[0].stop()
    kept = {}
    for user, _, event in Store(store).all_events():
        number, part = map(int, event["query"].split())
        kept.setdefault((user, number), set()).add(part)
    assert all(parts == {0, 1} for parts in kept.values()), "a torn write"
    assert sum(map(len, acknowledged.values())) > 5 * kills
    assert all((user, number) in kept for user, numbers in acknowledged.items() for number in numbers)
