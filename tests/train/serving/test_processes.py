"""Real processes on a real port: workers that share a store, kills at any moment, and an orderly end."""

import contextlib
import signal
import sys
import threading
import time

import pytest

from tests.fast import some
from tests.test_repository import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
from _service import Running, kill_under_load, load

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def running(folder, store, workers):
    with Running(folder, store, workers) as service:
        service.wait()
        yield service
        assert service.stop() in (0, -signal.SIGTERM)


@pytest.mark.parametrize("pairs", some([100, 10_000], [100]))
def test_every_answer_of_four_workers_contains_the_events_written_before_it(served, tmp_path, pairs):
    with running(served, tmp_path / "events.sqlite", 4) as service:
        found = load(service, 16, 3600.0, token="secret", events=3, pairs=pairs, reconnect=True)
    assert set(found["statuses"]) == {"200"} and found["stale"] == 0 and found["requests"] >= 2 * pairs


def test_a_worker_that_does_not_run_for_a_while_is_not_replaced(served, tmp_path):
    with running(served, tmp_path / "events.sqlite", 2) as service:
        before = {worker.pid for worker in service.children()}
        stopped = service.children()[0]
        stopped.suspend()
        time.sleep(8)  # more than the five seconds of uvicorn
        stopped.resume()
        assert {worker.pid for worker in service.children()} == before
        assert service.post("/recommend", {"user": "a man", "top_k": 1})[0] == 200


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
    found = kill_under_load(served, tmp_path / "events.sqlite", kills)
    assert found.pop("acknowledged") > 5 * kills
    assert found == {"lost": 0, "torn": 0, "errors": 0}
