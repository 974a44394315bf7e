"""Doors that requests come through: the pipeline, the processor, files of requests."""

import copy
import functools
import json
import math
import tempfile
import unicodedata
from pathlib import Path

from hypothesis import strategies as st

from m6rec import Catalogue, RecommendationPipeline
from m6rec.formatting_m6rec import TASKS, WRITING_TASKS
from m6rec.processing_m6rec import M6RecProcessor
from m6rec.train.answering.loading import parse_request
from m6rec.train.answering.offline import Job, answer_file, answer_here
from m6rec.values_m6rec import normalize_id
from tests.fuzz.draws import (
    FILTERS,
    ODD,
    SPELLINGS,
    TEXTS,
    WORDS,
    WRITTEN,
    junk,
    mixed,
    odd,
    odd_parameters,
    parameters,
    plain_requests,
    requests,
)
from tests.fuzz.harness import Door, shown
from tests.modeling_m6rec.shop import ITEMS, build, processor, tokenizer

SETUPS = [
    {"model": {}, "processor": {}},
    {
        "model": {"history_attention": "bidirectional", "segment_attention": "bidirectional", "segment_summary": 1},
        "processor": {"max_length": 96, "max_events": 4, "options": True, "time": "ago"},
    },
    {
        "model": {"tfidf_weight": 0.3, "bow_embeddings": True, "num_joint_layers": 2, "exit_layers": [1]},
        "processor": {"max_length": 200, "truncation_stride": 5, "item_rows": None},
    },
]
BOUNDS = {"click": (0, 1), "interaction": (0, 1), "plausibility": (-math.inf, 0), "rating": (1, 10)}


def rule(holds, message):
    """Raise AssertionError unless something holds; `assert` would be left out by python -O."""
    if not holds:
        raise AssertionError(message)


@functools.cache
def recommender(setup):
    """A pipeline with a tiny random model and a catalogue, made once."""
    given = SETUPS[setup]
    model, reader = build(seed=setup, **given["model"]), processor(**given["processor"])
    if model.model.word_sketch is not None:
        model.model.word_sketch.fit(reader.encode_items(ITEMS))
    catalogue = Catalogue.from_dataset(ITEMS, model, reader, progress=False)
    return RecommendationPipeline(model=model, processor=reader, device="cpu", catalogue=catalogue)


# ------------------------------------------------------------------------------------------------------ the pipeline

CALLS = st.fixed_dictionaries({
    "setup": st.integers(0, len(SETUPS) - 1),
    "requests": mixed((st.lists(requests, min_size=1, max_size=1), 6), (st.lists(requests, min_size=2, max_size=3), 1)),
    "parameters": mixed((parameters, 19), (odd_parameters, 1)),
})  # fmt: skip


def check_call(case):
    """Ask a pipeline: each answer follows the rules, and neither neighbours nor an earlier call change it."""
    recommend, asked = recommender(case["setup"]), [_few(request) for request in case["requests"]]
    given = {**case["parameters"]}
    if isinstance(given.get("filter"), str):
        given["filter"] = FILTERS.get(given["filter"], given["filter"])
    if len(asked) == 1:
        before = shown(asked[0])
        answer = answered(recommend, asked[0], given)
        rule(shown(asked[0]) == before, "the pipeline changed the request that it was given")
        if isinstance(asked[0], list | tuple):  # a batch
            rule(len(answer) == len(asked[0]), "another number of answers than of requests")
            for request, own in zip(asked[0], answer):
                check_answer(recommend, request, own, given)
            return
        if isinstance(asked[0], str | dict):  # else rows of another kind, such as a generator of requests
            check_answer(recommend, asked[0], answer, given)
        return
    try:
        together = answered(recommend, copied(asked), given | {"batch_size": len(asked)})
    except (TypeError, ValueError):
        refused = [error for request in copied(asked) if (error := alone_error(recommend, request, given))]
        rule(refused, "requests are refused together, but each is answered alone")
        raise refused[0] from None
    rule(len(together) == len(asked), "another number of answers than of requests")
    for request, answer in zip(asked, together):
        check_answer(recommend, request, answer, given)
        same(answered(recommend, copied([request]), given)[0], answer, "an answer changes with its neighbours")


def _few(request):
    """A list in place of a request is a batch of requests: the work of thousands is no hang."""
    return request[:20] if isinstance(request, list | tuple) else request


def answered(recommend, requests, given):
    """Call the pipeline; the answers to a generator, or to rows of any other kind, come one by one."""
    answer = recommend(requests, **given)
    return answer if isinstance(answer, list) else list(answer)


def alone_error(recommend, request, given):
    """Return the error of a request that is refused in a batch of its own, None if it is answered."""
    try:
        answered(recommend, [request], given)
    except (TypeError, ValueError) as error:
        return error
    return None


def copied(value):
    """Copy what can be copied; iterators stay."""
    try:
        return copy.deepcopy(value)
    except (TypeError, RecursionError):
        return value


def same(one, other, message):
    """Answers are the same, but for rounding and the order of what is as good."""
    rule(len(one) == len(other), f"{message}: its length")
    scores = [[row["score"] for row in rows] for rows in (one, other)]
    rule(all(abs(a - b) <= 1e-4 * max(1, abs(a)) for a, b in zip(*scores)), f"{message}: its scores")


def check_answer(recommend, request, answer, given):
    """Check one answer against the request."""
    rule(isinstance(answer, list), "an answer is no list")
    fields = request if isinstance(request, dict) else {}
    candidates, top_k = fields.get("candidates"), given.get("top_k")
    task = given.get("task") or ("retrieval" if candidates is None else "click")
    scores = [row["score"] for row in answer]
    rule([row["rank"] for row in answer] == list(range(1, len(answer) + 1)), "ranks are not 1..n")
    rule(all(isinstance(score, float) and math.isfinite(score) for score in scores), "a score is not finite")
    rule(scores == sorted(scores, reverse=True), "scores do not fall")
    low, high = BOUNDS.get(task, (-math.inf, math.inf))
    rule(all(low - 1e-6 <= score <= high + 1e-6 for score in scores), f"a {task} score is out of its bounds")
    rule(top_k is None or len(answer) <= top_k, "more items than top_k")
    rule(all(isinstance(row["item"], str) and row["item"].strip() for row in answer), "an item has no text")
    if given.get("explain"):
        values = [[reason["contribution"] for reason in row["because"]] for row in answer]
        rule(all(math.isfinite(value) for own in values for value in own), "a contribution is not finite")
        rule(all(own == sorted(own, reverse=True) for own in values), "contributions do not fall")
    if candidates is None:
        _check_found(recommend.catalogue, fields, answer, given, task)
    elif not given.get("filter") and not given.get("exclude_seen"):
        rule(len(answer) == min(len(candidates), top_k or len(candidates)), "a candidate has no answer")
        texts = {entry.strip() for entry in candidates if isinstance(entry, str)}
        named = {row["item"].strip() for row in answer}
        rule(top_k is not None or texts <= named, "a candidate's text is not among the answers")


def _check_found(catalogue, fields, answer, given, task):
    """Check what was found in the catalogue: each item once, none that was seen, as many as there are."""
    names = [row["item_id"] for row in answer]
    rule(len(set(names)) == len(names) and all(name in catalogue for name in names), "an item is there twice")
    seen = set()
    history = fields.get("history")
    for event in history if isinstance(history, list | tuple) else ():
        item = event.get("item") if isinstance(event, dict) else event
        if isinstance(item, dict) and item.get("item_id") is not None:
            seen.add(normalize_id(item["item_id"], "item_id"))
    if given.get("exclude_seen") is not False:
        rule(seen.isdisjoint(names), "an item of the history is recommended")
        seen = {name for name in seen if name in catalogue}
    else:
        seen = set()
    if not given.get("filter") and (history is None or not len(history) or given.get("exclude_seen") is False):
        asked = given.get("top_k") or (10 if task == "retrieval" else len(catalogue))
        rule(len(answer) == min(asked, len(catalogue) - len(seen)), "fewer items than there are")


# ----------------------------------------------------------------------------------------------------- the processor

READERS = st.fixed_dictionaries({}, optional={
    "max_length": st.sampled_from([8, 24, 64, 200, 1024]), "max_events": st.sampled_from([1, 3, 50]),
    "time": st.sampled_from(["gap", "ago"]), "options": st.sampled_from([False, True, 3]),
    "item_rows": st.sampled_from([None, {"i0": 2, "i3": 1, "i5": 3}]), "domain": st.sampled_from(["ecommerce",
    "video"]),
    "language": st.sampled_from(["en", "zh"]),
})  # fmt: skip


def _with_texts(value, depth=5):
    """Give the items of a request that are named by their id a text, since no catalogue stands behind a processor."""
    if not depth:
        return value
    if isinstance(value, dict):
        inside = {name: _with_texts(entry, depth - 1) for name, entry in value.items()}
        return {**inside, "title": "yoga mat"} if [*inside] == ["item_id"] else inside
    return [_with_texts(entry, depth - 1) for entry in value[:100]] if type(value) is list and value else value


def fitting(request, task, written):
    """Give a request what its task needs, most often."""
    if not isinstance(request, dict):
        return request
    found = _with_texts(request)
    if task not in WRITING_TASKS and task != "retrieval":
        found["candidates"] = found.get("candidates") or ["yoga mat", "red shoes [SEG]"]
    elif task == "retrieval":
        found.pop("candidates", None)
    else:
        found["candidates"] = {"next_item": [], "content": [{**ITEMS[3], "story": None}]}.get(task, [ITEMS[3]])
        found["text"] = written if task == "conversation" or isinstance(written, str) else "because"
    if "text" in found and task not in WRITING_TASKS:
        del found["text"]
    return found


READINGS = st.tuples(
    READERS, mixed((st.lists(requests, min_size=1, max_size=1), 6), (st.lists(requests, min_size=2, max_size=2), 1)),
    st.sampled_from(TASKS), st.integers(0, 9), WRITTEN,
).map(
    lambda drawn: {
        "processor": drawn[0], "task": drawn[2],
        "requests": [fitting(each, drawn[2], drawn[4]) if drawn[3] else each for each in drawn[1]],
    }
)  # fmt: skip


def check_reading(case):
    """Read requests: rows have the structure that their segments have, and say what the segments say."""
    settings = {name: str(value) if name == "item_rows" else value for name, value in case["processor"].items()}
    reader = _reader_of(json.dumps(settings, sort_keys=True), case["processor"])
    asked, task = case["requests"], case["task"]
    readings = reader.read_many(asked, task)
    rule(len(readings) == len(asked), "another number of readings than of requests")
    for request, reading in zip(asked, readings):
        check_row(reader, request, reading, task)
        if len(asked) > 1:
            rule(reader.read(copied(request), task) == reading, "a reading changes with its neighbours")


_READERS = {}


def _reader_of(key, settings):
    if key not in _READERS:
        known = {**settings}
        if known.get("max_events", 50) < 1:
            del known["max_events"]
        _READERS[key] = M6RecProcessor.from_template(tokenizer(), **known)
    return _READERS[key]


def check_row(reader, request, reading, task):
    """Check one row against its segments."""
    ids, words, special = reader._ids, reader.tokenizer, {*reader.tokenizer.all_special_ids}
    row, segments = reading.input_ids, iter(reading.segments)
    rule(len(reading.item_embedding_ids) == len(row), "item_embedding_ids are not as long as the row")
    rule(row[0] == ids["source_token_id"], "a row does not begin with [BOS']")
    place, source_end, longest, length = 1, None, 0, 0
    markers = {ids["bos_token_id"], ids["eos_token_id"]}
    kinds = {index: kind for kind, index in reader._kinds.items()}
    options = range(ids["first_option_token_id"], ids["first_option_token_id"] + ids["num_options"])
    while place < len(row):
        index = row[place]
        if index == ids["source_end_token_id"]:
            rule(source_end is None, "a row has two ends of its source")
            source_end, length = place, 0
        elif index in markers:
            rule(source_end is not None, "a target begins in the source")
            length = 1 if index == ids["bos_token_id"] else length + 1
        else:
            rule(index in kinds, "something stands where a segment begins")
            end = place + 1
            while end < len(row) and row[end] not in special - {*options}:
                end += 1
            kind, text = next(segments, (None, ""))
            rule(kind == kinds[index], "a segment is of another kind than it says")
            body = row[place + 1 : end]
            rule(kind == "option" or not special & {*body}, "a special token stands within a text")
            if kind != "option":
                said = words.decode(body, skip_special_tokens=False)
                rule(normal(said) == normal(text), "a row says something else than its segment")
            closed = end < len(row) and row[end] == ids["segment_token_id"]
            rule(closed or (source_end is not None and kind == "text"), "a segment is not closed")
            length += end - place + closed
            place = end if closed else end - 1
            rule(not any(reading.item_embedding_ids[place - len(body) : place]), "the item memory stands within a text")
        longest = max(longest, length) if source_end is not None else 0
        place += 1
    rule(next(segments, None) is None, "a segment is not in the row")
    rule(source_end is not None, "a row has no end of its source")
    rule(source_end + 1 + longest <= reader.max_length, "a row is longer than max_length")
    if isinstance(request, dict) and isinstance(request.get("history"), list):
        events = sum(kind == "event" for kind, _ in reading.segments)
        rule(events + reading.dropped.events == len(request["history"]), "an event is neither there nor dropped")
    if task not in WRITING_TASKS and task != "retrieval":
        rule(row[-1] == ids["eos_token_id"], "the last target is not closed")


def normal(text):
    """Return a text in the normal form that the tokenizer keeps."""
    return unicodedata.normalize("NFC", text)


# ------------------------------------------------------------------------------------------------- files of requests

GOOD_LINES = plain_requests().map(lambda request: json.dumps(request, default=str))
BAD_LINES = st.one_of(
    odd(plain_requests(), junk).map(lambda request: json.dumps(request, default=str) if writable(request) else "{}"),
    st.sampled_from([
        "null", "[]", "{}", "1", "1e999", '"a text"', '""', "NaN", "{", '{"user": "a"', '{"user": NaN}', "true", "[{}]",
        '{"history": ["' + "字" * 600 + '"]}', "[" * 100_000 + "]" * 100_000, '{"a":' * 3000 + "1" + "}" * 3000,
        '{"user": "\\ud800"}', '{"request_id": null, "user": "a"}', '{"request_id": {}, "user": "a"}', "﻿{}",
        '{"user": "a", "user": "b"}', "9" * 5000, '{"user": ' + "9" * 5000 + "}",
        '{"history": [' + '"mat",' * 400 + '"mat"]}',
        '{"candidates": [{"item_id": "nope"}]}', "'single'", "{'user': 'a'}", '{"top_k": 3}',
    ]),
)  # fmt: skip
RAW_LINES = mixed(
    (GOOD_LINES.map(lambda line: line.encode("utf-8", "surrogatepass")), 10),
    (BAD_LINES.map(lambda line: line.encode("utf-8", "surrogatepass")), 5),
    (st.sampled_from([b"\xff\xfe", b"\x00", b'{"user": "\xe9"}', b"   ", b"\r", b'\xef\xbb\xbf{"user": "a"}']), 1),
    (st.binary(max_size=12).map(lambda line: line.replace(b"\n", b"")), 1),
)
FILES = st.fixed_dictionaries({
    "setup": st.integers(0, len(SETUPS) - 1), "lines": st.lists(RAW_LINES, min_size=10, max_size=10),
    "batch_size": st.sampled_from([1, 3, 16]), "chunk_size": st.sampled_from([2, 5, 1024]),
    "task": st.sampled_from(["click", "retrieval", "plausibility"]), "output": st.sampled_from([".jsonl", ".parquet"]),
    "arguments": st.lists(st.one_of(TEXTS, BAD_LINES, st.sampled_from([*SPELLINGS, *ODD, *WORDS])), max_size=1),
})  # fmt: skip


def writable(value):
    """Say whether a value can be a line of JSON."""
    try:
        json.dumps(value, default=str)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def check_file(case):
    """Answer a file, errors skipped: a line an answer, in order, and the good ones as if they were alone."""
    recommend, options = recommender(case["setup"]), {"task": case["task"], "top_k": 3}
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "requests.jsonl", Path(folder) / f"answers{case['output']}"
        source.write_bytes(b"\n".join(case["lines"]) + b"\n")
        job = Job(source, output, "model", options, case["batch_size"], case["chunk_size"], skip_errors=True)
        report = answer_file(job, functools.partial(answer_here, recommend))
        answers = _answers(output)
        rule(
            [path.name for path in sorted(Path(folder).iterdir())] == [output.name, source.name],
            "files are left behind",
        )
    lines = [line for line in case["lines"] if line.strip()]
    rule(report.requests == len(lines) == len(answers), "another number of answers than of lines")
    rule(report.errors == sum(isinstance(answer, str) for answer in answers), "another number of errors than it says")
    for line, answer in zip(lines, answers):
        if isinstance(answer, str):
            rule(15 <= len(answer) <= 3000, "an error without words, or with too many")
            continue
        request = json.loads(line)
        if isinstance(request, dict):
            request.pop("request_id", None)
        same(recommend(request, **options), answer, "a line's answer changes with its neighbours")
    for text in case["arguments"]:
        parse_request(text)


def _answers(path):
    """Read answers: rows of items, or the text of an error."""
    if path.suffix == ".jsonl":
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
        return [
            answer["error"] if isinstance(answer, dict) and "error" in answer else _items(answer) for answer in found
        ]
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(path).to_pylist()
    return [row["answer"] if row["error"] is None else row["error"] for row in rows]


def _items(answer):
    return answer["answer"] if isinstance(answer, dict) else answer


DOORS_OF_REQUESTS = [
    Door("requests", CALLS, check_call),
    Door("processor", READINGS, check_reading),
    Door("lines", FILES, check_file, (ValueError, TypeError)),
]
REQUESTS, PROCESSOR, LINES = DOORS_OF_REQUESTS
