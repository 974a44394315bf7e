"""A file of requests becomes a file of answers: in order, each once, whatever dies, changes or fills up meanwhile."""

import errno
import itertools
import json
import os
import pathlib
import random
import re
import shutil
import signal
import time
import tracemalloc
from functools import partial

import pyarrow.parquet
import pytest
import torch

from m6rec import Evidence
from m6rec.pipeline_m6rec import _each
from m6rec.segment_cache_m6rec import SegmentCache
from m6rec.train.answering import offline
from m6rec.train.answering.loading import load_pipeline
from m6rec.train.answering.offline import SCHEMA, Job, answer_chunk, answer_file, answer_here, fingerprint
from tests.fast import some
from tests.train.world import REQUESTS, TITLES, write_lines


class Stub:
    """Answers by the request's text and counts; raises for a text that begins with "bad"."""

    def __init__(self):
        self.segment_cache, self.asked = SegmentCache(), []

    def __call__(self, requests, batch_size, on_error, **options):
        self.asked += requests
        return _each(self.answer, requests)

    def answer(self, requests):
        for request in requests:
            if str(request).startswith("bad"):
                raise ValueError(f"request: {request!r} means nothing")
        return [[{"rank": 1, "item": f"item for {request}", "score": 0.1}] for request in requests]


def read_lines(path):
    """The answers in lines, in their order; where there is none, the object with the error."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["row"] for row in rows] == list(range(len(rows)))
    return [row.get("answer", row) for row in rows]


def answered(recommend, job, restart=False):
    """Answer in this process; returns the output's bytes, what came of it, and the numbers of the chunks that were."""
    numbers = []

    def run(job, chunks):
        for each in answer_here(recommend, job, chunks):
            numbers.append(each.number)
            yield each

    report = answer_file(job, run, restart)
    return job.output.read_bytes(), report, numbers


def parts(folder):
    return sorted(path.name for path in folder.glob(".*.parts/*.part"))


# ---------------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize(("batch_size", "chunk_size"), [(1, 1), (2, 3), (3, 2), (16, 7), (4, 1024)])
def test_answers_stand_in_the_order_of_the_requests(recommend, tmp_path, batch_size, chunk_size):
    alone = [recommend(request, task="retrieval") for request in REQUESTS]
    source = write_lines(tmp_path / "requests.jsonl", REQUESTS)
    job = Job(source, tmp_path / "new" / "answers.jsonl", "model", {"task": "retrieval"}, batch_size, chunk_size)
    _, report, numbers = answered(recommend, job)
    assert report == (7, 0, 0) and numbers == list(range(-(-7 // chunk_size)))
    answers = read_lines(job.output)
    assert answers == [[{**row, "score": pytest.approx(row["score"], abs=1e-5)} for row in each] for each in alone]
    assert [len(answer) for answer in answers] == [10, 10, 3, 10, 10, 2, 10]
    told = {tuple((row["item"], round(row["score"], 4)) for row in answer) for answer in alone}
    assert len(told) == 6, "two requests are the same, the others are not"
    assert [path.name for path in job.output.parent.iterdir()] == ["answers.jsonl"]


def test_texts_are_written_into_files_as_by_calls(recommend, tmp_path):
    requests = [
        {"user": "a student", "task": "query", "top_k": 2},
        {"messages": [{"role": "user", "content": "a film, please"}], "task": "conversation"},
        {"user": "a student", "candidates": [{"genres": "Drama", "title": None}], "task": "content"},
        {"user": "a student", "top_k": 1, "explain": "text"},
        {"user": "a student", "task": "query", "text": "known"},
    ]
    source, options = write_lines(tmp_path / "requests.jsonl", requests), {"max_new_tokens": 4}
    for name in ("answers.jsonl", "answers.parquet"):
        answered(recommend, Job(source, tmp_path / name, "model", options, 5, 3, skip_errors=True))
    lines = read_lines(tmp_path / "answers.jsonl")
    table = pyarrow.parquet.read_table(tmp_path / "answers.parquet").to_pylist()
    for request, line, row in zip(requests[:4], lines, table):
        expected = recommend(request, **options)
        assert [list(own) for own in line] == [list(own) for own in expected]
        for written, cell, own in zip(line, row["answer"], expected, strict=True):
            for name in own.keys() - {"score", "logprob", "because"}:
                assert written[name] == own[name]
                assert (dict(cell[name]) if name == "fields" else cell[name]) == own[name]
    assert "its text is complete" in lines[4]["error"] and table[4]["error"] == lines[4]["error"]


def test_a_table_holds_what_the_lines_hold(recommend, tmp_path):
    named = [
        {"request_id": number * 10, **each} if isinstance(each, dict) else each for number, each in enumerate(REQUESTS)
    ]
    source, options = write_lines(tmp_path / "requests.jsonl", named), {"task": "retrieval", "explain": True}
    for name in ("answers.jsonl", "answers.parquet"):
        answered(recommend, Job(source, tmp_path / name, "model", options, 2, 3))
    table = pyarrow.parquet.read_table(tmp_path / "answers.parquet")
    assert table.schema == SCHEMA
    rows, lines = table.to_pylist(), read_lines(tmp_path / "answers.jsonl")
    assert [row["row"] for row in rows] == list(range(7)) and {row["error"] for row in rows} == {None}
    assert [row["request_id"] for row in rows] == ["0", "10", "20", "30", None, "50", "60"]
    assert lines[2][0]["because"] == [] and len(lines[0][0]["because"]) == 2 and "退潮" in str(lines)
    assert {entry.get("item_id") for entry in lines[2]} == {None, 7}
    for row, answer in zip(rows, lines):
        for found, expected in zip(row["answer"], answer, strict=True):
            item_id = str(expected["item_id"]) if "item_id" in expected else None
            without = dict.fromkeys(("item_id", "learnt", "words", "transitions"))  # this catalogue has no evidence
            reasons = [{**without, **reason} for reason in expected["because"]]
            absent = dict.fromkeys(name for name in offline.ITEM if name not in ("rank", "item", "score"))
            assert found == {**expected, **absent, "item_id": item_id, "because": reasons}


def test_interactions_are_a_map(tmp_path):
    answer = [{"rank": 1, "item": "x", "score": 0.5, "interactions": {"like": 0.25, "follow": 0.75}}, {"rank": 2}]
    found = pyarrow.parquet.read_table(
        pyarrow.BufferReader(offline._table([{"row": 4, "request_id": "a", "answer": answer}]))
    ).to_pylist()
    items = [entry["interactions"] for entry in found[0]["answer"]]
    assert found[0]["row"] == 4 and items == [[("like", 0.25), ("follow", 0.75)], None]


def test_lines_and_tables_of_requests_get_the_same_answers(recommend, tmp_path):
    rows = [{"user": "女", "history": [{"event": "watch", "item": {"title": "退潮"}}]}, {"user": "a man"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "requests.parquet")
    write_lines(tmp_path / "requests.jsonl", rows)
    options = {"explain": True, "top_k": 3}
    jobs = [Job(tmp_path / f"requests.{end}", tmp_path / f"{end}.jsonl", "m", options) for end in ("jsonl", "parquet")]
    texts = [answered(recommend, job)[0] for job in jobs]
    assert texts[0] == texts[1] and "退潮" in texts[0].decode(), "Chinese stays readable"


@pytest.mark.parametrize("name", ["answers.jsonl", "answers.parquet"])
def test_no_requests_are_no_answers(tmp_path, name):
    (tmp_path / "none.jsonl").write_text("\n")
    data, report, _ = answered(Stub(), Job(tmp_path / "none.jsonl", tmp_path / name, "m"))
    assert report == (0, 0, 0) and sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "none.jsonl"])
    assert data == b"" or pyarrow.parquet.read_table(tmp_path / name).num_rows == 0


@pytest.mark.parametrize("other", ["same", "dots", "symbolic", "hard"])
def test_answers_never_take_the_place_of_the_requests(tmp_path, other):
    path, output = write_lines(tmp_path / "file.jsonl", ["a", "b", "c"]), tmp_path / "out.jsonl"
    if other == "symbolic":
        output.symlink_to(path)
    elif other == "hard":
        output.hardlink_to(path)
    else:
        output = path if other == "same" else tmp_path / "x" / ".." / "file.jsonl"
        (tmp_path / "x").mkdir()
    with pytest.raises(ValueError, match=r"file\.jsonl is the input and the output: the answers would replace"):
        Job(path, output, "m", chunk_size=2)
    assert path.read_text().count("\n") == 3


@pytest.mark.parametrize(
    "error", [IndexError("index 7"), RecursionError("deep"), KeyError("x"), MemoryError(), RuntimeError("shape")]
)
def test_any_error_of_the_model_concerns_one_request(tmp_path, error):
    class Raising(Stub):
        def answer(self, requests):
            if "bad" in requests:
                raise error
            return super().answer(requests)

    (tmp_path / "in.jsonl").write_text('"a"\n\n"bad"\n"c"\n')
    job = partial(Job, tmp_path / "in.jsonl", tmp_path / "out.jsonl", "m", {}, 2, 2)
    place = rf"in\.jsonl, line 3: {type(error).__name__}: "
    with pytest.raises(ValueError, match=place):
        answered(Raising(), job())
    assert answered(Raising(), job(skip_errors=True))[1] == (3, 0, 1)
    first, second, third = read_lines(tmp_path / "out.jsonl")
    assert (first[0]["item"], third[0]["item"]) == ("item for a", "item for c")
    assert re.search(place, second["error"])


def test_an_error_of_the_disk_is_no_error_of_a_request(tmp_path):
    class Raising(Stub):
        def __call__(self, requests, batch_size, **options):
            raise OSError(errno.EIO, "Input/output error")

    source = write_lines(tmp_path / "in.jsonl", ["a"])
    with pytest.raises(OSError, match="Input/output error"):
        answered(Raising(), Job(source, tmp_path / "out.jsonl", "m", skip_errors=True))


HOSTILE = {
    "a long text": '{"history": ["' + "字" * 5000 + '"]}',
    "a deep list": "[" * 100_000,
    "a deep user": '{"user": ' + "[" * 900 + "]" * 900 + "}",
    "deep objects": '{"user": ' + '{"a": ' * 900 + "1" + "}" * 900 + "}",
    "half a character": '{"user": "\\ud800", "candidates": ["\\udc00", "b"]}',
    "a long number": '{"user": ' + "9" * 5000 + "}",
    "no number": '{"user": {"age": NaN}, "history": [{"item": "a", "rating": Infinity, "timestamp": 1e400}]}',
    "no text": '{"candidates": [[], {}, null]}',
    "an id of no kind": '{"candidates": [{"item_id": [1], "title": "x"}, {"item_id": {}, "title": "y"}]}',
    "a null byte": '{"user": "\\u0000"}',
}


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_no_line_ends_a_run(recommend, tmp_path, name):
    lines = ['"before"', *HOSTILE.values(), '"after"']
    (tmp_path / "in.jsonl").write_text("\n".join(lines), encoding="utf-8")
    job = Job(tmp_path / "in.jsonl", tmp_path / name, "m", {"task": "retrieval"}, 4, 5, skip_errors=True)
    _, report, _ = answered(recommend, job)
    assert report.requests == len(lines) and report.errors < len(lines) - 2
    rows = pyarrow.parquet.read_table(job.output).to_pylist() if name == "out.parquet" else json_rows(job.output)
    assert rows[0]["answer"] and rows[-1]["answer"]
    for number, row in enumerate(rows, 1):
        assert bool(row.get("answer")) != bool(row.get("error")), lines[number - 1][:80]
        assert not row.get("error") or f"in.jsonl, line {number}" in row["error"]
    deep = [rows[place]["error"] for place, line in enumerate(lines) if line in list(HOSTILE.values())[1:4]]
    assert len(deep) == 3 and all("deep, which is the limit" in error for error in deep)


def json_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_answers_can_be_joined_to_requests(tmp_path):
    requests = [
        {"request_id": " 7 ", "user": "a"},
        "b",
        {"request_id": 3, "user": "bad"},
        {"request_id": [], "user": 1},
    ]
    source = write_lines(tmp_path / "in.jsonl", requests)
    for name in ("out.jsonl", "out.parquet"):
        answered(Stub(), Job(source, tmp_path / name, "m", {}, 1, 2, skip_errors=True))
    lines = json_rows(tmp_path / "out.jsonl")
    rows = pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pylist()
    for told in (lines, rows):
        assert [row.get("request_id") for row in told] == ["7", None, "3", None]
        assert "request_id: []" in told[3]["error"]


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_texts_of_items_with_ids_can_be_left_out(recommend, tmp_path, name):
    requests = [REQUESTS[0], {"user": "a", "candidates": ["Low Tide", {"item_id": "i3"}]}]
    source = write_lines(tmp_path / "in.jsonl", requests)
    answered(recommend, Job(source, tmp_path / name, "m", {"task": "retrieval"}, texts=False))
    rows = pyarrow.parquet.read_table(tmp_path / name).to_pylist() if "parquet" in name else json_rows(tmp_path / name)
    assert [bool(entry.get("item")) for entry in rows[0]["answer"]] == [False] * 10
    assert {entry.get("item_id"): entry.get("item") for entry in rows[1]["answer"]} == {None: "Low Tide", "i3": None}


def test_a_chunk_does_not_depend_on_what_was_answered_before(recommend, tmp_path):
    """To the bit: a state that was read in another batch, for another chunk, would differ in its last digits."""
    rng = random.Random(4)
    texts = [" ".join(rng.choices(TITLES, k=rng.randint(1, 6))) for _ in range(12)]
    requests = [{"history": [{"event": "watch", "item": text} for text in rng.choices(texts, k=4)]} for _ in range(16)]
    job = Job(write_lines(tmp_path / "in.jsonl", requests), tmp_path / "out.jsonl", "m", {}, 3, 4)
    chunks = list(offline._chunks(job))
    forwards = list(answer_here(recommend, job, chunks))
    backwards = list(answer_here(recommend, job, chunks[::-1]))[::-1]
    alone = [answer_chunk(load_again(recommend), job.reader(), job, chunk) for chunk in chunks]
    assert forwards == backwards == alone


def load_again(recommend):
    return type(recommend)(model=recommend.model, processor=recommend.processor, catalogue=recommend.catalogue)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path, suffix):
    def peak(count):
        source = tmp_path / f"{count}.{suffix}"
        rows = [{"user": f"user {number} " + "x" * 3000} for number in range(count)]
        if suffix == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), source)  # one group of rows
        else:
            write_lines(source, rows)
        del rows
        stub = Measured()
        tracemalloc.start()
        assert answered(stub, Job(source, tmp_path / f"answers.{suffix}", "m", {}, 64, 128))[1].requests == count
        traced = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return traced + stub.arrow

    assert peak(3_000) < 1.25 * peak(1_000)


class Measured(Stub):
    """Watches what Arrow holds, which Python does not know of."""

    arrow = 0

    def __call__(self, requests, batch_size, **options):
        self.arrow = max(self.arrow, pyarrow.total_allocated_bytes())
        return [[] for _ in requests]


# ----------------------------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize("before", [None, "earlier answers\n"])
def test_a_request_that_fails_ends_the_run_and_nothing_finished_is_lost(tmp_path, before):
    texts = [f"user {number}" for number in range(10)]
    source, output = (
        write_lines(tmp_path / "in.jsonl", [*texts[:6], "bad one", *texts[7:]]),
        tmp_path / "o" / "out.jsonl",
    )
    job = Job(source, output, "m", batch_size=2, chunk_size=2)
    if before:
        output.parent.mkdir()
        output.write_text(before)
    with pytest.raises(
        ValueError, match=r"in\.jsonl, line 7: request: 'bad one' means.*; 3 finished .*out\.jsonl\.parts"
    ):
        answered(Stub(), job)
    assert (output.read_text() if output.exists() else None) == before and len(parts(output.parent)) == 3
    write_lines(source, texts)  # mended
    stub = Stub()
    _, report, numbers = answered(stub, job)
    assert (report, numbers, stub.asked) == ((10, 6, 0), [3, 4], texts[6:])
    assert [answer[0]["item"] for answer in read_lines(output)] == [f"item for {text}" for text in texts]


def test_a_run_that_finished_nothing_leaves_nothing(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", ["bad one"])
    with pytest.raises(ValueError, match="line 1: "):
        answered(Stub(), Job(source, tmp_path / "out.jsonl", "m"))
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_line_that_is_no_json_is_found_before_anything_is_answered(tmp_path):
    (tmp_path / "in.jsonl").write_text('"a"\n"b"\n"c"\nd\n')
    stub = Stub()
    with pytest.raises(ValueError, match=r"in\.jsonl, line 4 is no valid JSON"):
        answered(stub, Job(tmp_path / "in.jsonl", tmp_path / "out.jsonl", "m", {}, 1, 1))
    assert stub.asked == []


def test_a_request_that_fails_can_leave_its_error_instead(tmp_path):
    (tmp_path / "in.jsonl").write_text('"a"\n"bad"\n{broken\n\n"b"\n{"request_id": [], "user": "c"}\n"d"\n')
    for name in ("out.jsonl", "out.parquet"):
        _, report, _ = answered(Stub(), Job(tmp_path / "in.jsonl", tmp_path / name, "m", {}, 4, 5, skip_errors=True))
        assert report == (6, 0, 3)
    lines = read_lines(tmp_path / "out.jsonl")
    assert [answer[0]["item"] for answer in lines if isinstance(answer, list)] == [f"item for {text}" for text in "abd"]
    errors = [None if isinstance(entry, list) else entry["error"] for entry in lines]
    assert (
        "'bad' means nothing" in errors[1] and "line 3 is no valid JSON" in errors[2] and "request_id: []" in errors[4]
    )
    rows = pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["error"] for row in rows] == errors and [row["answer"] is None for row in rows] == list(
        map(bool, errors)
    )


def test_stopping_and_skipping_take_over_from_each_other(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", ["a", "b", "bad", "c", "d"])
    make = partial(Job, source, tmp_path / "out.jsonl", "m", {}, 2, 2)
    with pytest.raises(ValueError, match="line 3: "):
        answered(Stub(), make())
    interrupt(Stub(), make(skip_errors=True), after=1)
    assert [name[-7:] for name in parts(tmp_path)] == ["-0.part", "-1.part"]
    with pytest.raises(ValueError, match="line 3: "):
        answered(Stub(), make())
    assert answered(Stub(), make(skip_errors=True))[1:] == ((5, 4, 1), [2])


def interrupt(recommend, job, after):
    """Let a run end in the middle, as Ctrl-C ends it, once it has finished some chunks."""

    def run(job, chunks):
        yield from answer_here(recommend, job, chunks[:after])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer_file(job, run)


def test_bad_sizes_are_named(tmp_path):
    for name in ("batch_size", "chunk_size"):
        with pytest.raises(ValueError, match=f"{name} is 0"):
            Job(tmp_path / "in.jsonl", tmp_path / "out.jsonl", "m", **{name: 0})


@pytest.mark.parametrize("name", ["answers.csv", "answers.json", "answers", "answers.jsonl.gz"])
def test_an_output_of_another_kind_is_refused(tmp_path, name):
    source = write_lines(tmp_path / "in.jsonl", ["a"])
    with pytest.raises(ValueError, match=rf"/{name} is neither \.jsonl nor \.parquet: name the answers"):
        answered(Stub(), Job(source, tmp_path / name, "m"))
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


# ------------------------------------------------------------------------------------------------------ taking over


def test_a_run_of_another_kind_does_not_take_over(tmp_path):
    source, output = write_lines(tmp_path / "in.jsonl", list("abcdef")), tmp_path / "out.jsonl"
    interrupt(Stub(), Job(source, output, "m", {"top_k": 3}, 2, 2), after=2)
    others = [
        (Job(source, output, "n", {"top_k": 3}, 2, 2), "model was 'm', is 'n'"),
        (Job(source, output, "m", {"top_k": 4}, 2, 2), "top_k was 3, is 4"),
        (Job(source, output, "m", {"top_k": 3, "task": "click"}, 2, 2), "task was None, is 'click'"),
        (Job(source, output, "m", {"top_k": 3}, 1, 3), "batch_size was 2, is 1, chunk_size was 2, is 3"),
        (
            Job(write_lines(tmp_path / "2.jsonl", list("xyz")), output, "m", {"top_k": 3}, 2, 2),
            r"on other requests .*2\.jsonl",
        ),
    ]
    for job, message in others:
        with pytest.raises(ValueError, match=rf"out\.jsonl\.parts holds .*{message}.* --restart"):
            answered(Stub(), job)
    assert len(parts(tmp_path)) == 2
    _, report, _ = answered(Stub(), others[1][0], restart=True)
    assert report == (6, 0, 0) and not parts(tmp_path)
    interrupt(Stub(), others[1][0], after=2)
    assert answered(Stub(), others[1][0])[1] == (6, 4, 0)


@pytest.mark.parametrize("change", ["append", "edit", "insert", "shorten"])
def test_only_requests_that_changed_are_answered_again(tmp_path, change):
    source, job = tmp_path / "in.jsonl", Job(tmp_path / "in.jsonl", tmp_path / "out.jsonl", "m", {}, 2, 2)
    write_lines(source, list("abcdef"))
    interrupt(Stub(), job, after=3)
    expected = {
        "append": (list("abcdefg"), [3]),
        "edit": (list("abxdef"), [1]),
        "insert": (list("abxcdef"), [1, 2, 3]),
        "shorten": (list("abcde"), [2]),
    }
    texts, numbers = expected[change]
    write_lines(source, texts)
    assert answered(Stub(), job)[2] == numbers
    assert [answer[0]["item"] for answer in read_lines(job.output)] == [f"item for {text}" for text in texts]


def test_an_input_that_changes_while_it_is_read_is_noticed(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", list("abcdef"))

    def run(job, chunks):
        write_lines(source, list("abcxef"))
        yield from answer_here(Stub(), job, chunks)

    with pytest.raises(ValueError, match=r"in\.jsonl was changed while it was read: run it again; 1 finished"):
        answer_file(Job(source, tmp_path / "out.jsonl", "m", {}, 2, 2), run)


def test_a_fingerprint_knows_all_that_answers(folder, recommend, tmp_path):
    told = fingerprint(recommend)
    shutil.copytree(folder, tmp_path / "moved")
    assert fingerprint(load_pipeline(str(tmp_path / "moved"))) == told, "a folder may move"
    other = load_pipeline(str(folder))
    for name, weight in other.model.state_dict().items():
        weight.reshape(-1)[-1] += 1
        assert fingerprint(other) != told, name
        weight.reshape(-1)[-1] -= 1
    other = load_pipeline(str(folder))
    other.processor.max_events += 1
    assert fingerprint(other) != told
    other = load_pipeline(str(folder))
    other.catalogue.remove(["i3"])
    assert fingerprint(other) != told
    for evidence in (Evidence(), Evidence(words=0.2)):
        other.catalogue.set_evidence(evidence, other.processor)
        assert fingerprint(other) != told
        told = fingerprint(other)
    other.catalogue.observe([{"user_id": "a", "item_id": "i1"}, {"user_id": "a", "item_id": "i2"}])
    assert fingerprint(other) != told
    other, told = load_pipeline(str(folder)), fingerprint(recommend)
    other.model.config.max_events += 1
    assert fingerprint(other) != told
    (tmp_path / "moved" / "metrics.json").write_text("{}")
    assert fingerprint(load_pipeline(str(tmp_path / "moved"))) == told, "nor do files matter that answer nothing"


@pytest.mark.filterwarnings("ignore:torch.*quantiz")
def test_a_fingerprint_knows_quantized_weights(folder):
    def quantized(change=0.0):
        recommend = load_pipeline(str(folder))
        with torch.no_grad():
            recommend.model.model.layers[-1].mlp.down_proj.weight[0, 0] += change
        recommend.model = torch.ao.quantization.quantize_dynamic(recommend.model, {torch.nn.Linear})
        return recommend

    assert fingerprint(quantized()) == fingerprint(quantized()) != fingerprint(quantized(0.3))


# ------------------------------------------------------------------------------------------------- kills, full disks


def kill(job, recommend, seconds):
    """Answer in a fork of this process that is killed after some time; returns whether it was done before."""
    process = os.fork()
    if process == 0:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        try:
            answered(recommend, job)
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


def killed_rounds(recommend, folder, name, rounds, seed, times=6):
    """Kill runs at random moments until `rounds` were hit; returns in how many rounds finished work was there."""
    requests = [{**each, "user": f"user {n}"} for n in range(times) for each in REQUESTS if isinstance(each, dict)]
    source, rng = write_lines(folder / "in.jsonl", requests), random.Random(seed)
    options = {"task": "retrieval", "explain": True}
    started = time.perf_counter()
    unbroken, report, _ = answered(recommend, Job(source, folder / f"unbroken{name}", "m", options, 3, 4))
    lasted = time.perf_counter() - started
    assert report.requests == len(requests)
    hit = took_over = 0
    job = Job(source, folder / f"killed{name}", "m", options, 3, 4)
    while hit < rounds:
        done = kill(job, recommend, rng.uniform(0, lasted))
        hit += not done
        took_over += bool(parts(folder))
        whole = job.output.read_bytes() if job.output.exists() else unbroken
        assert whole == unbroken, "there is never a part of an output"
        if done or rng.random() < 0.3:
            data, report, numbers = answered(recommend, job)
            assert data == unbroken and report.kept + 4 * len(numbers) >= report.requests == len(requests)
            job.output.unlink()
            assert sorted(path.name for path in folder.iterdir()) == ["in.jsonl", f"unbroken{name}"]
    assert answered(recommend, job)[0] == unbroken
    return took_over


@pytest.mark.parametrize("name", some([".jsonl", ".parquet"], [".jsonl"]))
def test_a_killed_run_ends_as_an_unbroken_one(recommend, tmp_path, name):
    killed_rounds(recommend, tmp_path, name, rounds=2, seed=1, times=3)


@pytest.mark.slow
@pytest.mark.parametrize("name", [".jsonl", ".parquet"])
def test_thirty_kills_lose_and_repeat_nothing(recommend, tmp_path, name):
    assert killed_rounds(recommend, tmp_path, name, rounds=30, seed=2) >= 10


CALLS = (
    (os, "fsync"),
    (pathlib.Path, "replace"),
    (pathlib.Path, "mkdir"),
    (pathlib.Path, "rename"),
    (shutil, "rmtree"),
)


@pytest.mark.parametrize(
    ("before", "name"),
    some(itertools.product([False, True], ["out.jsonl", "out.parquet"]), [(False, "out.parquet"), (True, "out.jsonl")]),
)
def test_a_run_may_end_at_any_call_that_writes(tmp_path, monkeypatch, name, before):
    """Fails the first such call, then the second, and so on, before it acts or after."""
    source, place = write_lines(tmp_path / "in.jsonl", list("abcdefg")), 0
    expected = answered(Stub(), Job(source, tmp_path / f"expected-{name}", "m", {}, 2, 2))[0]
    reached = True
    while reached:
        folder = tmp_path / f"{place}"
        job = Job(source, folder / name, "m", {}, 2, 2)
        with monkeypatch.context() as patch:
            reached = fail_call(patch, place, before)
            try:
                answered(Stub(), job)
            except OSError as error:
                assert "No space left" in str(error) and f".{name}.parts" in str(error)
            reached = reached()
        assert not job.output.exists() or job.output.read_bytes() == expected
        assert answered(Stub(), job)[0] == expected
        assert [path.name for path in folder.iterdir()] == [name]
        place += 1
    assert place > 12


def fail_call(patch, place, before):
    """Let the call number `place` of CALLS fail, before it acts or after; returns a function: was it reached?"""
    count = 0

    def failing(call):
        def wrapped(*args, **kwargs):
            nonlocal count
            count += 1
            if count - 1 == place and before:
                raise OSError(errno.ENOSPC, "No space left on device")
            result = call(*args, **kwargs)
            if count - 1 == place:
                raise OSError(errno.ENOSPC, "No space left on device")
            return result

        return wrapped

    for owner, name in CALLS:
        patch.setattr(owner, name, failing(getattr(owner, name)))
    return lambda: count > place


def test_a_full_disk_is_told_and_loses_nothing(tmp_path, monkeypatch):
    job = Job(write_lines(tmp_path / "in.jsonl", list("abcdef")), tmp_path / "out.jsonl", "m", {}, 2, 2)
    with monkeypatch.context() as patch:
        fail_call(patch, 9, True)  # the second part is about to get its name
        with pytest.raises(
            OSError, match=r"No space left.* kept in .*\.out\.jsonl\.parts; .* the same command goes on"
        ):
            answered(Stub(), job)
    assert len(parts(tmp_path)) == 1
    assert answered(Stub(), job)[1] == (6, 2, 0)
