"""Workers of Ray Data answer what one process answers, also when one of them is killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import psutil
import pyarrow.parquet
import pytest

from m6rec.train.answering.loading import load_pipeline
from m6rec.train.answering.offline import Job, _chunks, answer_chunk, answer_file, answer_here, fingerprint
from m6rec.train.answering.offline_ray import ChunkWorker
from tests.train.world import TITLES

COUNT = 120
"""Requests, enough to kill a worker in their midst."""


@pytest.fixture
def source(tmp_path):
    return write_source(tmp_path / "in.jsonl", COUNT)


def write_source(path, count):
    lines = [
        {
            "request_id": n,
            "history": [{"event": "watch", "item": TITLES[(n * n + place) % 15]} for place in range(n % 4)],
        }
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def as_table(chunks):
    return pyarrow.Table.from_pylist([chunk._asdict() for chunk in chunks])


def test_a_worker_answers_as_a_process_does_in_any_order(folder, tmp_path):
    recommend, source = load_pipeline(str(folder)), write_source(tmp_path / "in.jsonl", 20)
    job = Job(source, tmp_path / "out.parquet", fingerprint(recommend), {"explain": True}, 2, 4)
    chunks = list(_chunks(job))
    worker, expected = ChunkWorker(str(folder), job), list(answer_here(recommend, job, chunks))
    found = [worker(as_table([chunks[number]])).to_pylist()[0] for number in (3, 0, 4, 1, 2)]
    assert sorted(found, key=lambda row: row["number"]) == [each._asdict() for each in expected]
    assert [len(row["data"]) > 100 for row in found] == [True] * 5


def test_a_worker_with_another_model_answers_nothing(folder, source, tmp_path):
    job = Job(source, tmp_path / "out.jsonl", "other", {}, 4, 100)
    (found,) = ChunkWorker(str(folder), job)(as_table(list(_chunks(job))[:1])).to_pylist()
    assert found["data"] == b"" and f"another model in {str(folder)!r}" in found["failure"]


def test_a_request_that_fails_is_told_as_here(folder, source, tmp_path):
    source.write_text('"a"\n"b"\n{"histroy": []}\n')
    recommend = load_pipeline(str(folder))
    job = Job(source, tmp_path / "out.jsonl", fingerprint(recommend), {}, 2, 3)
    (chunk,) = _chunks(job)
    (found,) = ChunkWorker(str(folder), job)(as_table([chunk])).to_pylist()
    assert "line 3: " in found["failure"] and "unknown key 'histroy'" in found["failure"]
    assert found == answer_chunk(recommend, job.reader(), job, chunk)._asdict()


@pytest.fixture
def ray_environment(tmp_path):
    """What keeps Ray in a folder of its own, whose path is short enough for sockets."""
    pytest.importorskip("ray.data")
    place = tempfile.mkdtemp(prefix="ray")
    own = {"HOME": place, "RAY_TMPDIR": place, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    yield {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | own
    shutil.rmtree(place, ignore_errors=True)


def started(environment, *arguments):
    command = [sys.executable, "-m", "m6rec.train.cli", "recommend", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill_a_worker(process, parts):
    """Kill one of two workers once each part is being written; returns how many workers there were."""
    while process.poll() is None and len(list(parts.glob("*.part"))) < 4:
        time.sleep(0.005)
    family = psutil.Process(process.pid).children(recursive=True)
    workers = [each for each in family if "MapWorker" in " ".join(each.cmdline())]
    workers[0].send_signal(signal.SIGKILL)
    return len(workers), family


@pytest.mark.slow
def test_two_workers_one_killed_answer_each_request_once(folder, source, tmp_path, ray_environment):
    recommend = load_pipeline(str(folder))
    options = {"explain": True, "top_k": 5}
    job = Job(source, tmp_path / "here.parquet", fingerprint(recommend), options, 2, 2)
    answer_file(job, lambda job, chunks: answer_here(recommend, job, chunks))
    output = tmp_path / "there.parquet"
    sizes = ["--batch-size", 2, "--chunk-size", 2, "--explain", "--top-k", 5]
    process = started(ray_environment, folder, "--input", source, "--output", output, *sizes, "--ray", "--workers", 2)
    try:
        count, family = kill_a_worker(process, tmp_path / ".there.parquet.parts")
        finished = len(list((tmp_path / ".there.parquet.parts").glob("*.part")))
        out, error = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, error[-3000:]
    assert out.endswith(f"{COUNT} requests answered in {output}\n")  # Ray may tell of the dead worker before
    assert count == 2 and 4 <= finished < COUNT // 2, "it was killed in the middle"
    rows = pyarrow.parquet.read_table(output).to_pylist()
    assert [(row["row"], row["request_id"]) for row in rows] == [(n, str(n)) for n in range(COUNT)]
    assert output.read_bytes() == job.output.read_bytes()
    psutil.wait_procs(family, timeout=20)
    assert [each for each in family if each.is_running() and each.status() != psutil.STATUS_ZOMBIE] == []


@pytest.mark.slow
def test_what_was_begun_here_is_finished_by_workers(folder, source, tmp_path, ray_environment):
    """And an error of a request ends a run with workers as it ends one without."""
    recommend = load_pipeline(str(folder))
    lines = source.read_text().splitlines(keepends=True)
    source.write_text("".join([*lines[:50], '{"histroy": []}\n', *lines[51:]]))
    output = tmp_path / "out.jsonl"
    whole = answer_file(
        Job(source, tmp_path / "whole.jsonl", fingerprint(recommend), {}, 8, 8, skip_errors=True),
        lambda job, chunks: answer_here(recommend, job, chunks),
    )
    assert whole.errors == 1
    job = Job(source, output, fingerprint(recommend), {"explain": False}, 8, 8)
    with pytest.raises(ValueError, match="line 51: "):
        answer_file(job, lambda job, chunks: answer_here(recommend, job, chunks))
    command = [folder, "--input", source, "--output", output, "--batch-size", 8, "--chunk-size", 8, "--ray"]
    for more, code, told in (([], 2, "line 51: "), (["--on-error", "skip"], 0, "of them by an earlier run; 1 have")):
        process = started(ray_environment, *command, "--workers", 2, *more)
        out, error = process.communicate(timeout=300)
        assert process.returncode == code, error[-3000:]
        assert told in (out if code == 0 else error), error
        assert "Traceback" not in error, error
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
