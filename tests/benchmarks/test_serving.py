"""What the benchmark of serving makes of its samples, and what it keeps of a run that is cut."""

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import _service
from _service import Running, Writers, slope
from serving import Results

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
STATUSES = {"200": 6, "429": 2, "0": 1}
REPORT = {"requests": 9, "requests_per_second": 3.0, "p99_ms": 5.0, "stale": 1, "statuses": STATUSES}


def test_memory_grows_by_the_slope_after_the_caches_are_filled():
    filling = [(minute / 60, 100.0 * minute) for minute in range(10)]
    assert slope(filling + [(minute / 60, 1000 + 0.5 * minute) for minute in range(10, 40)]) == 30
    assert slope([(minute / 60, 500.0) for minute in range(8)]) == 0


def test_parts_that_are_run_one_by_one_share_a_file_and_its_summary(tmp_path):
    path = tmp_path / "serving.json"
    Results(path).put_in("loads", **{"64 clients": REPORT})
    found = json.loads(path.read_text())
    assert (found["saturation_rps"], found["errors"], found["stale"]) == (3.0, 1, 1)
    assert found["lost"] is None and found["batch64_ratio"] is None and found["p99_ms_at_100_rps"] is None

    now, then = ({"median_ms": ms, "batch64_rps": rps} for ms, rps in ((2.0, 300.0), (5.0, 100.0)))
    Results(path).put(against={"now": now, "then": then})
    Results(path).put(kills={"kills": 4, "lost": 1, "torn": 2, "errors": 5})
    Results(path).put_in("loads", **{"100 a second, 2 workers": {**REPORT, "p99_ms": 7.0}})
    found = json.loads(path.read_text())
    assert (found["single_ratio"], found["batch64_ratio"], found["median_ms"]) == (2.5, 3.0, 2.0)
    assert (found["lost"], found["errors"], found["stale"]) == (3, 7, 2)
    assert (found["p99_ms_at_saturation"], found["p99_ms_at_100_rps"]) == (5.0, 7.0)


def test_a_run_that_is_ended_says_so_and_keeps_what_it_measured(tmp_path):
    code = f"""
import sys, time
sys.path.insert(0, {str(BENCHMARKS)!r})
import serving
def part(results, given):
    try:
        results.put(kills={{"kills": 1, "lost": 0, "torn": 0, "errors": 0}})
        time.sleep(600)
    finally:
        print("services are ended", flush=True)
serving.PARTS = {{"kills": part}}
sys.argv = ["serving.py", "model", "--output", {str(tmp_path / "out.json")!r}]
serving.main()
"""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code], **pipes)
    assert json.loads(process.stdout.readline())["kills"]["kills"] == 1
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=60)
    assert out == "services are ended\n" and "ended by SIGTERM" in error and process.returncode == 1
    assert json.loads((tmp_path / "out.json").read_text())["lost"] == 0


def test_writers_count_an_answer_that_is_no_json_and_wait_while_nobody_answers(monkeypatch):
    class Service:
        answers = iter([None, (503, {}), (500, b"Internal Server Error"), (200, {"written": 2})])

        def post(self, path, body):
            found = next(self.answers, "end")
            if found == "end":
                writers._done.set()
                return None
            return found

    writers, waits = Writers(Service(), 1), []
    wait = writers._done.wait
    monkeypatch.setattr(writers._done, "wait", lambda seconds: waits.append(seconds) or wait(0))
    with writers:
        for thread in writers._threads:
            thread.join()
    assert writers.errors == 1 and writers.acknowledged == {"w0": [3]} and len(waits) == 3


def test_a_posted_answer_is_read_as_json_only_if_it_is(monkeypatch):
    async def run():
        async def answer(reader, writer):
            path = (await reader.readuntil(b"\r\n")).split()[1]
            kind, content = ("application/json", b'{"a": 1}') if path == b"/good" else ("text/plain", b"broken")
            head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {len(content)}\r\n\r\n"
            writer.write(head.encode() + content)
            await writer.drain()
            writer.close()

        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            service = object.__new__(Running)
            service.port = server.sockets[0].getsockname()[1]
            return [await asyncio.to_thread(service.post, path, {}) for path in ("/good", "/bad")]

    assert asyncio.run(run()) == [(200, {"a": 1}), (200, b"broken")]


def histories(events, count, **more):
    """Return the histories of a client's first requests."""
    load, found = _service.load_test.Load("http://127.0.0.1:1", "", events=events, pairs=count, **more), []
    load.items = ["a", "b"]

    async def timed(connection, path, body):
        found.append(body["history"])

    load._timed = timed
    asyncio.run(load.client(0, float("inf"), 0.0))
    return found


def test_histories_of_the_load_grow_event_by_event_and_then_lose_the_oldest():
    assert [len(history) for history in histories(3, 4)] == [4, 4, 4, 4]
    growing = histories(3, 6, growth=3)
    assert [len(history) for history in growing] == [4, 5, 6, 4, 5, 6]
    assert growing[1][:4] == growing[0] and growing[3][:3] == growing[2][3:]
    assert {event["item"]["item_id"] for event in growing[-1]} <= {"a", "b"}


def test_unread_texts_of_the_load_never_occur_twice():
    titles = [history[-1]["item"]["title"] for history in histories(2, 50, unread=True)]
    assert len(set(titles)) == 50
