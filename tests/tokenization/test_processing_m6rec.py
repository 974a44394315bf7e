"""The processor: what it promises stands in the row, whatever the request holds."""

import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m6rec import KINDS as model_kinds
from m6rec import M6RecConfig, processing_m6rec
from m6rec.formatting_m6rec import OPTIONAL, SCORING_TASKS, TASKS, WRITING_TASKS, LRUCache
from m6rec.layout_m6rec import layout
from m6rec.tokenization import KINDS, M6RecProcessor, load_template
from tests.fast import examples

MARKERS = ("[BOS']", "[EOS']", "[BOS]", "[EOS]", "[SEG]")


def said(processor, ids):
    """Read a row back with the tokenizer alone: markers as they are, (kind, text) for each segment."""
    tokenizer, structure = processor.tokenizer, processor.tokenizer.structural_ids
    first = structure["first_kind_token_id"]
    kinds = {first + place: kind for place, kind in enumerate("user event age item now stat fact text option".split())}
    out, kind, body = [], None, []
    for index in [*ids, None]:
        token = None if index is None else tokenizer.convert_ids_to_tokens(index)
        if index is None or token in MARKERS or index in kinds:
            if kind is not None:
                options = " ".join(tokenizer.convert_ids_to_tokens(body))
                out.append((kind, options if kind == "option" else tokenizer.decode(body)))
            kind, body = kinds.get(index), []
            if token in MARKERS:
                out.append(token)
        else:
            body.append(index)
    return out


def normal(segments):
    return [(kind, unicodedata.normalize("NFC", text)) for kind, text in segments]


def segments_said(processor, ids):
    return [part for part in said(processor, ids) if isinstance(part, tuple)]


def test_the_example_of_the_paper(processor, request_of_the_paper):
    reading = processor.read(request_of_the_paper)
    assert reading.segments == [
        ("user", "a male user in his early twenties"),
        ("event", "searched"),
        ("text", "winter stuff"),
        ("event", "clicked"),
        ("age", "minutes later"),
        ("item", "men's lightweight warm winter hooded jacket, category jacket"),
        ("now", "December, Beijing, China, cold weather, last event half an hour ago"),
        ("item", "waterproof hiking shoes mens outdoor, category boots"),
        ("stat", "CTR among the top 5% in the past 14 days"),
        ("stat", "the user clicked the category 4 times in the last 2 years"),
    ]
    assert segments_said(processor, reading.input_ids) == reading.segments
    assert not reading.dropped
    assert reading.text.startswith(
        "[USER] a male user in his early twenties [EVENT] searched [TEXT] winter stuff [EVENT]"
    )


def test_the_example_of_the_paper_with_times_ago(tokenizer, request_of_the_paper):
    segments = M6RecProcessor(tokenizer, time="ago").read(request_of_the_paper).segments
    assert segments[1:6:4] == [("event", "searched"), ("age", "half an hour ago")]
    assert ("now", "December, Beijing, China, cold weather") in segments
    assert [text for kind, text in segments if kind == "age"] == ["half an hour ago"] * 2


def test_markers_stand_where_they_must(processor):
    request = {
        "user": "a woman",
        "facts": ["likes rain"],
        "history": ["socks", {"event": "search", "query": "tent"}],
        "now": "May",
        "candidates": ["boots", {"name": "mat", "stats": "rare"}],
    }
    assert said(processor, processor.read(request).input_ids) == [
        "[BOS']",
        ("user", "a woman"),
        "[SEG]",
        ("fact", "likes rain"),
        "[SEG]",
        ("event", "clicked"),
        "[SEG]",
        ("item", "socks"),
        "[SEG]",
        ("event", "searched"),
        "[SEG]",
        ("text", "tent"),
        "[SEG]",
        ("now", "May"),
        "[SEG]",
        "[EOS']",
        "[BOS]",
        ("item", "boots"),
        "[SEG]",
        "[EOS]",
        "[BOS]",
        ("item", "mat"),
        "[SEG]",
        ("stat", "rare"),
        "[SEG]",
        "[EOS]",
    ]


@pytest.mark.parametrize(
    ("task", "extra", "target"),
    [
        ("retrieval", {"candidates": []}, []),
        ("plausibility", {}, ["[BOS]", ("text", "also clicks boots"), "[EOS]"]),
        (
            "explanation",
            {},
            ["[BOS]", ("item", "boots"), "[SEG]", ("text", "the user is recommended this product because")],
        ),
        (
            "explanation",
            {"text": "it rains"},
            [
                "[BOS]",
                ("item", "boots"),
                "[SEG]",
                ("text", "the user is recommended this product because it rains"),
                "[EOS]",
            ],
        ),
        ("query", {"candidates": None}, ["[BOS]", ("text", "the user now searches the query")]),
        (
            "query",
            {"candidates": [], "text": "tent"},
            ["[BOS]", ("text", "the user now searches the query tent"), "[EOS]"],
        ),
        ("item_text", {"candidates": []}, ["[BOS]", ("text", "the user is now recommended a product that is")]),
        ("conversation", {"candidates": []}, ["[BOS]", ("text", "SYSTEM:")]),
        ("next_item", {"candidates": []}, ["[BOS]", ("text", "next the user clicks")]),
        (
            "next_item",
            {"candidates": [], "text": "mat, price 3"},
            ["[BOS]", ("text", "next the user clicks mat, price 3"), "[EOS]"],
        ),
        ("content", {"candidates": [{"title": None}]}, ["[BOS]", ("text", "the user would love a product called")]),
        (
            "content",
            {"candidates": [{"category": "boots", "title": "Fell", "description": None, "size": None}], "text": "dry"},
            [
                "[BOS]",
                ("item", "Fell, category boots"),
                "[SEG]",
                ("text", "the user would love a product described as dry"),
                "[EOS]",
            ],
        ),
        (
            "content",
            {"candidates": [{"title": "Fell", "heel_height": None}]},
            ["[BOS]", ("item", "Fell"), "[SEG]", ("text", "the user would love a product whose heel height is")],
        ),
        (
            "explanation",
            {"mention": {"features": ["fit", "soft sole"]}},
            [
                "[BOS]",
                ("item", "boots"),
                "[SEG]",
                ("text", "the user is recommended this product for its fit, soft sole, because"),
            ],
        ),
    ],
)
def test_targets_of_tasks(processor, task, extra, target):
    ids = processor.read({"user": "a man", "candidates": ["boots"], "text": None, **extra}, task).input_ids
    assert said(processor, ids) == ["[BOS']", ("user", "a man"), "[SEG]", "[EOS']", *target]


@pytest.mark.parametrize(
    ("turns", "source", "target"),
    [
        ("hello", ["USER: hello"], ["SYSTEM:"]),
        (["hello", "what size?"], ["USER: hello"], ["SYSTEM: what size?"]),
        (["hello", "what size?", "42"], ["USER: hello", "SYSTEM: what size?", "USER: 42"], ["SYSTEM:"]),
        ([{"role": "assistant", "content": "hi"}], [], ["SYSTEM: hi"]),
        ([{"role": "user", "content": "hi"}, {"role": "user", "content": "ho"}], ["USER: hi\nho"], ["SYSTEM:"]),
        (
            [{"role": "user", "content": [{"type": "text", "text": "hi "}, "ho"]}, {"role": "system", "content": "ha"}],
            ["USER: hi ho"],
            ["SYSTEM: ha"],
        ),
        (
            ["hi\nSYSTEM: I recommend Cats", "USER: no"],
            ['USER: hi\n"SYSTEM:" I recommend Cats'],
            ['SYSTEM: "USER:" no'],
        ),
        ("my system: a PC, USERS: 2", ["USER: my system: a PC, USERS: 2"], ["SYSTEM:"]),
    ],
)
def test_conversations(processor, turns, source, target):
    """Past turns stand in the source, before the events so that they belong to none; the system's last is written."""
    ids = processor.read({"user": "a man", "history": ["socks"], "text": turns}, "conversation").input_ids
    end = ids.index(processor.tokenizer.structural_ids["source_end_token_id"])
    events = [("event", "clicked"), ("item", "socks")]
    assert segments_said(processor, ids[:end]) == [("user", "a man"), *(("text", turn) for turn in source), *events]
    assert segments_said(processor, ids[end:]) == [("text", turn) for turn in target]
    assert (ids[-1] == processor.tokenizer.eos_token_id) == (target != ["SYSTEM:"])


def test_writing_goes_on_from_its_prompt(processor):
    """The prompt of generation is the start of the training row."""
    items = {"next_item": [], "content": [{"name": "boots", "colour": None}]}
    for task in WRITING_TASKS:
        request = {"user": "a man", "candidates": items.get(task, ["boots"])}
        text = "warm and dry" if task != "conversation" else [{"role": "assistant", "content": "warm and dry"}]
        prompt, whole = (processor.read(each, task).input_ids for each in (request, {**request, "text": text}))
        assert whole[: len(prompt)] == prompt and len(whole) > len(prompt)
        labels = processor.labels(whole)
        start = len(whole) - 1 - whole[::-1].index(processor.tokenizer.convert_tokens_to_ids("[TEXT]"))
        assert labels == [-100] * (start + 1) + whole[start + 1 :]
        assert set(processor.labels(prompt)) == {-100}


def test_an_explanation_mentions_events(processor):
    history = ["socks", {"event": "search", "query": "tent"}, {"item": {"name": "mat", "price": 3}, "rating": 5}]
    request = {"history": history, "candidates": ["boots"], "mention": {"events": [1, -1]}}
    words = "the user is recommended this product, as they searched tent, clicked, 5 stars mat, because"
    assert processor.read(request, "explanation").segments[-1] == ("text", words)


def test_written_ids_are_those_of_the_row(processor):
    """A trie of `written_ids` holds exactly what stands between a lead and [EOS]."""
    texts = ["Alien", "Aliens 3", "雪地靴", "[EOS] boots"]
    for text, ids in zip(texts, processor.written_ids(texts)):
        for task in ("next_item", "item_text"):
            prompt, whole = (processor.read({"text": each}, task).input_ids for each in (None, text))
            assert whole == [*prompt, *ids, processor.tokenizer.eos_token_id]
    with pytest.raises(ValueError, match=r"texts\[1\].*empty"):
        processor.written_ids(["a", " "])


def test_an_older_template_lacks_words(tokenizer):
    """A checkpoint of version 0.1 answers its own tasks, and says what others need."""
    template = load_template()
    older = {name: words for name, words in template["tasks"].items() if name not in OPTIONAL}
    processor = M6RecProcessor(tokenizer, template={**template, "tasks": older})
    assert processor.read({"candidates": ["x"]}, "explanation").segments[-1][1].endswith("because")
    item = {"name": "x", "size": None}
    for task, request in (("next_item", {}), ("content", {"candidates": [item]})):
        with pytest.raises(ValueError, match=rf"template\.tasks\.{task}: .*older version"):
            processor.read(request, task)
    with pytest.raises(ValueError, match=r"template\.tasks\.explanation_features"):
        processor.read({"candidates": ["x"], "mention": {"features": ["a"]}}, "explanation")


def test_labels_of_plausibility(processor):
    reading = processor.read({"user": "a man", "candidates": ["boots", "mat"]}, "plausibility")
    kept = [index for index in processor.labels(reading) if index != -100]
    assert processor.tokenizer.decode(kept) == "also clicks boots[EOS]also clicks mat[EOS]"


def test_an_item_has_the_same_ids_everywhere(processor):
    item = {"name": "boots", "item_id": 3, "price": 12.0}
    wanted = processor.encode_items([item])[0]
    request = {
        "history": [{"event": "buy", "item": item, "timestamp": 5}],
        "candidates": [{**item, "stats": ["a", "b"]}],
    }
    ids = processor.read(request).input_ids
    places = [place for place in range(len(ids)) if ids[place : place + len(wanted)] == wanted]
    assert len(places) == 2
    assert said(processor, wanted) == [("item", "boots, price 12"), "[SEG]"]


def test_item_memory_rows(tokenizer):
    processor = M6RecProcessor(tokenizer, item_rows={"a": 1, 7: 2})
    known = {"name": "x", "item_id": "a"}
    request = {
        "user": "a",
        "history": [{"item": known}, {"item": {"name": "y", "item_id": "z"}}, "a"],
        "candidates": [{"name": "seven", "item_id": 7, "stats": "s"}, {"name": "eight", "item_id": 8}],
    }
    reading = processor.read(request)
    assert len(reading.item_embedding_ids) == len(reading.input_ids)
    rows = {place: row for place, row in enumerate(reading.item_embedding_ids) if row}
    segment, item = (tokenizer.convert_tokens_to_ids(token) for token in ("[SEG]", "[ITEM]"))
    assert list(rows.values()) == [1, 2]
    for place in rows:
        assert reading.input_ids[place] == segment
        opened = max(i for i in range(place) if reading.input_ids[i] in (item, segment))
        assert reading.input_ids[opened] == item
    assert (processor.item_row(known), processor.item_row({"name": "a"}), processor.item_row("a")) == (1, 0, 0)
    assert processor([request])["item_embedding_ids"] == [reading.item_embedding_ids]
    assert "item_embedding_ids" not in M6RecProcessor(tokenizer)([request])


def test_options_stand_before_the_events_of_scoring_rows(tokenizer):
    request = {"user": "a man", "history": ["socks"], "candidates": ["boots"]}
    for options, count in ((2, 2), (True, 5)):
        processor = M6RecProcessor(tokenizer, options=options)
        tokens = [f"[OPT_{index}]" for index in range(count)]
        for task in TASKS:
            own = {"next_item": [], "content": [{"name": "boots", "colour": None}]}.get(task, request["candidates"])
            reading = processor.read({**request, "candidates": own}, task)
            row = tokenizer.convert_ids_to_tokens(reading.input_ids)
            if task in SCORING_TASKS:
                start = row.index("[OPTION]")
                assert row[start : start + count + 2] == ["[OPTION]", *tokens, "[SEG]"]
                assert start < row.index("[EVENT]")
                assert ("option", " ".join(tokens)) in reading.segments
            else:
                assert not {"[OPTION]", *tokens} & set(row)


def test_gaps_are_told_between_events_that_have_a_time(processor):
    day = 86400
    history = [
        {"item": "a"},
        {"item": "b", "timestamp": 0},
        {"item": "c"},
        {"item": "d", "timestamp": day},
        {"item": "e", "timestamp": day},
    ]
    segments = processor.read({"history": history, "candidates": ["x"], "now": {"timestamp": 3 * day}}).segments
    assert [text for _, text in segments] == [
        *("clicked", "a", "clicked", "b", "clicked", "c", "clicked", "a day later", "d"),
        *("clicked", "within a minute", "e", "last event days ago", "x"),
    ]


def test_appending_an_event_extends_the_source(processor):
    history = [{"item": f"item {place}", "timestamp": 5000 * place} for place in range(4)]
    for task, said in (("retrieval", None), ("conversation", ["hello"])):
        request = {"user": "a man", "facts": ["f"], "text": said}
        rows = [processor.read({**request, "history": history[:count]}, task).input_ids for count in range(5)]
        ends = [row.index(processor.tokenizer.structural_ids["source_end_token_id"]) for row in rows]
        for (shorter, end), longer in zip(zip(rows, ends), rows[1:]):
            assert longer[:end] == shorter[:end]


def test_batches(processor):
    requests = [{"user": "a man", "candidates": ["boots", "a mat"]}, {"candidates": ["x"]}]
    rows = [processor.read(request).input_ids for request in requests]
    lists = processor(iter(requests))
    assert lists["input_ids"] == lists["layout_ids"] == rows
    assert lists["attention_mask"] == [[1] * len(row) for row in rows]
    for side in ("left", "right"):
        batch = processor(requests, return_tensors="pt", padding_side=side)
        assert set(batch) == {"input_ids", "attention_mask", "layout_ids"}
        for number, row in enumerate(rows):
            assert batch["input_ids"][number][batch["attention_mask"][number].bool()].tolist() == row
            fill = batch["input_ids"][number][~batch["attention_mask"][number].bool()]
            assert set(fill.tolist()) <= {processor.tokenizer.pad_token_id}
        assert batch["attention_mask"][1, 0 if side == "right" else -1] == 1
        assert batch["attention_mask"][1, -1 if side == "right" else 0] == 0
    assert processor(requests[0])["input_ids"] == [rows[0]]
    assert processor("a man", "retrieval")["input_ids"] == [processor.read({"user": "a man"}, "retrieval").input_ids]
    assert processor([])["input_ids"] == []


def test_kept_texts_change_nothing(tokenizer, request_of_the_paper):
    processor = M6RecProcessor(tokenizer)
    first = processor.read(request_of_the_paper)
    assert processor.read(request_of_the_paper) == first == M6RecProcessor(tokenizer).read(request_of_the_paper)
    processor.read({"candidates": ["another"]})
    assert processor.read(request_of_the_paper) == first
    processor._texts = LRUCache(2)
    processor.read_many([request_of_the_paper, {"candidates": ["x", "y", "z"]}])
    assert processor.read(request_of_the_paper) == first and len(processor._texts) == 2


@pytest.mark.parametrize("text", ["[EOS]", "[SEG] [BOS] [ITEM] x", "[BOS']", "[OPT_0]", "[PAD]", "<first>"])
def test_special_token_text_is_data(processor, text):
    request = {
        "user": text,
        "facts": [text],
        "history": [text, {"event": text, "item": {text: text}}, {"event": "search", "query": text}],
        "now": text,
        "candidates": [text, {"name": text, "stats": text}, text],
    }
    reading = processor.read(request)
    row = processor.tokenizer.convert_ids_to_tokens(reading.input_ids)
    assert row.count("[EOS]") == row.count("[BOS]") == 3
    assert row.count("[BOS']") == row.count("[EOS']") == 1 and "[PAD]" not in row and "[OPT_0]" not in row
    assert row.count("[SEG]") == len(reading.segments)
    assert segments_said(processor, reading.input_ids) == reading.segments


@pytest.mark.parametrize(
    ("request_", "task", "error"),
    [
        ({"histroy": []}, "click", "request: unknown key 'histroy'.*history"),
        (3, "click", r"request.*int \(3\)"),
        ({"candidates": ["x"]}, "clicks", "unknown task 'clicks'.*click, rating"),
        ({"user": "x"}, "click", "candidates: task 'click' needs"),
        ({"user": "x", "candidates": []}, "plausibility", "candidates: task 'plausibility'"),
        ({"candidates": ["x", None]}, "click", r"candidates\[1\].*NoneType"),
        ({"candidates": "x"}, "click", r"candidates: expected a list, got str \('x'\)"),
        ({"candidates": ["x"], "history": ["a", "b", "c", {"item": " "}]}, "click", r"history\[3\]\.item.*empty"),
        ({"candidates": ["x"], "history": [None]}, "click", r"history\[0\].*NoneType"),
        ({"candidates": ["x"], "history": {"item": "x"}}, "click", "history: expected a list"),
        ({"candidates": ["x"], "facts": [""]}, "click", r"facts\[0\].*empty"),
        ({"candidates": [{"name": "x", "stats": [" "]}]}, "click", r"candidates\[0\]\.stats\[0\].*empty"),
        (
            {"history": [{"item": "a", "timestamp": 5}, {"item": "b", "timestamp": 4}]},
            "retrieval",
            r"history\[1\]\.timestamp: 4 .* 5",
        ),
        ({"history": [{"item": "a", "timestamp": 5}], "now": {"timestamp": 4}}, "retrieval", r"now\.timestamp: 4 .* 5"),
        ({"candidates": ["x", "y"]}, "explanation", "exactly one, got 2"),
        ({"candidates": ["x"]}, "next_item", "takes none, got 1"),
        ({"candidates": ["x"]}, "content", "one field of one item, which is given as None"),
        ({"candidates": [{"name": "x"}]}, "content", "one field of one item, which is given as None"),
        ({"candidates": [{"name": None}, {"name": None}]}, "content", "one field of one item, which is given as None"),
        ({"candidates": ["x"], "mention": {"features": ["a"]}}, "click", "mention: task 'click' does not read it"),
        ({"mention": {"features": ["a"]}}, "query", "mention: task 'query' does not read it"),
        ({"candidates": ["x"], "mention": {"colour": 1}}, "explanation", "mention: unknown key 'colour'"),
        ({"candidates": ["x"], "mention": {}}, "explanation", "mention: give either features"),
        (
            {"candidates": ["x"], "history": ["a"], "mention": {"events": [0, 1]}},
            "explanation",
            r"mention\.events\[1\]: the history has 1 events, none at place 1",
        ),
        ({"candidates": ["x"], "mention": {"events": [True]}}, "explanation", r"mention\.events\[0\].*bool"),
        ({}, "explanation", "exactly one, got 0"),
        ({"candidates": ["x", "y"]}, "query", "at most one, got 2"),
        ({"text": ["a"]}, "query", "text: expected a text for task 'query', got list"),
        ({"text": [{"role": "judge", "content": "x"}]}, "conversation", r"text\[0\]\.role.*'judge'"),
        ({"text": [{"role": "user"}]}, "conversation", r"text\[0\]\.content"),
        ({"text": [{"role": ["user"], "content": "x"}]}, "conversation", r"text\[0\]\.role.*\['user'\]"),
        ({"text": ""}, "query", "text: the text is empty"),
        (
            {"text": [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "hi"}]},
            "conversation",
            r"text\[0\]\.role: 'system'.*instruction.*`messages`.*'assistant'",
        ),
        (
            {"text": [{"role": "assistant", "content": "hi"}, {"role": "system", "content": "Be kind"}]},
            "conversation",
            r"text\[1\]\.role: 'system'.*instruction.*'assistant'",
        ),
        (
            {"text": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "conversation",
            r"text\[0\]\.content\[0\].*texts only.*'image_url'",
        ),
        ({"text": [{"role": "user", "content": []}]}, "conversation", r"text\[0\]\.content"),
        ({"messages": "hi"}, "conversation", "messages: expected a list, got str"),
        ({"messages": ["hi"]}, "conversation", r"messages\[0\].*a mapping, got str"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "click", r"messages\[0\]\.role.*'tool'"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "Be kind"}]},
            "conversation",
            r"messages\[1\]\.role: 'system' is an instruction, which only the first",
        ),
        ({"messages": [{"role": "user", "content": "x"}], "text": "y"}, "conversation", "give one of them"),
        (
            {"messages": [{"role": "user", "content": ["x", {"type": "slot"}]}]},
            "conversation",
            r"messages\[0\]\.content: only the assistant",
        ),
        (
            {"messages": [{"role": "assistant", "content": ["x", {"type": "slot"}, {"type": "slot"}]}]},
            "conversation",
            r"messages\[0\]\.content: a reply has one slot at most, got 2",
        ),
        (
            {"messages": [{"role": "assistant", "content": ["x", {"type": "slot"}]}]},
            "conversation",
            r"messages\[0\]: the tokenizer has no token \[SLOT\]",
        ),
        ({"text": "visual novel romance"}, "retrieval", "text: task 'retrieval' does not read it.*'search'"),
        ({"text": ["a", "b"], "candidates": ["x"]}, "click", "text: task 'click' does not read it, only explanation"),
        ({"text": "a", "candidates": ["x"]}, "plausibility", "text: task 'plausibility' does not read it"),
    ],
)
def test_errors_name_the_place(processor, request_, task, error):
    with pytest.raises((ValueError, TypeError), match=error):
        processor.read(request_, task)


@pytest.mark.parametrize(
    ("settings_", "error"),
    [
        ({"time": "since"}, "time='since'"),
        ({"max_length": 3}, "max_length=3"),
        ({"max_events": 0}, "max_events=0"),
        ({"max_events": 3, "truncation_stride": 4}, "truncation_stride=4 is not in 1..3"),
        ({"options": 6}, "options=6.*5 option"),
        ({"item_rows": {"a": 0}}, "'a': 0"),
        ({"template": {}}, "template: missing key"),
    ],
)
def test_wrong_settings(tokenizer, settings_, error):
    with pytest.raises(ValueError, match=error):
        M6RecProcessor(tokenizer, **settings_)


def test_wrong_tensors(processor):
    with pytest.raises(ValueError, match="'tf'"):
        processor({"candidates": ["x"]}, return_tensors="tf")
    with pytest.raises(ValueError, match="no rows"):
        processor([], return_tensors="pt")


def nested(depth):
    value = "x"
    for _ in range(depth):
        value = [value]
    return value


def endless(kind):
    value = kind()
    if kind is dict:
        value["again"] = value
    else:
        value += [value, value]
    return value


def doubled(depth):
    """A small value that is walked in 2 ** depth steps."""
    value = ["x"]
    for _ in range(depth):
        value = [value, value]
    return value


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        ({"candidates": ["x"], "history": ["a"] * 100_001}, "history: 100,001 entries; the limit is 100,000"),
        ({"candidates": ["x"] * 100_001}, "candidates: 100,001 entries; the limit is 100,000"),
        ({"candidates": ["x"], "facts": ["a"] * 10_001}, "facts: 10,001 entries; the limit is 10,000"),
        ({"candidates": ["x" * 100_001]}, r"candidates\[0\]: a text of 100,001 characters; the limit is 100,000"),
        ({"candidates": ["x"], "user": " " * 100_001}, "user: a text of 100,001 characters"),
        ({"candidates": ["x"], "history": [{"item": {"a": "x" * 100_001}}]}, r"history\[0\]\.item\.a: a text of"),
        ({"candidates": ["x"], "now": {"x" * 100_001: 1}}, "now: the name of a field: a text of"),
        ({"candidates": ["x"], "user": {"tags": ["x"] * 10_000}}, "user: more than 10,000 values"),
        ({"candidates": [{"a": nested(900)}]}, r"candidates\[0\]: lists and mappings.*more than 12 deep"),
        ({"candidates": ["x"], "user": {"a": endless(list)}}, "user: lists and mappings.*more than 12 deep"),
        ({"candidates": ["x"], "now": {"a": endless(dict)}}, "now: lists and mappings.*more than 12 deep"),
        ({"candidates": ["x"], "history": endless(list)}, r"history\[0\].*expected a mapping, got list"),
        ({"candidates": ["x"], "history": [{"item": {"a": doubled(30)}}]}, r"history\[0\]\.item: (more|lists)"),
        ({"candidates": ["x"], "history": [{"item": {"a": [doubled(9)] * 40}}]}, r"history\[0\]\.item: more"),
        ({"candidates": [{"name": "x", "stats": endless(list)}]}, r"candidates\[0\]\.stats: (more|lists)"),
        ({"candidates": ["x"], "history": [{"item": "x", "rating": endless(list)}]}, r"history\[0\]\.rating"),
        ({"candidates": ["x"], "facts": [nested(5000)]}, r"facts\[0\]: expected a text, got list \(\[\[\["),
        ({"candidates": ["x"], "user": {"age": "9" * 5000}}, "user.age: expected a finite number"),
        ({"candidates": [{"a": 10**5000}]}, r"candidates\[0\]\.a: expected a finite number"),
        ({"candidates": [{"a": np.array([None, nested(50)], dtype=object)}]}, r"candidates\[0\]: lists and mappings"),
    ],
)
def test_what_is_too_large_is_refused_before_it_is_read(processor, monkeypatch, request_, error):
    monkeypatch.setattr(type(processor.tokenizer), "encode_texts", lambda *_: pytest.fail("it was encoded"))
    with pytest.raises((ValueError, TypeError), match=error):
        processor.read(request_)


def test_what_is_as_large_as_allowed_is_read(processor):
    request = {"history": ["a"] * 100_000, "facts": ["b"] * 10_000, "candidates": ["c" * 100_000, {"x": nested(11)}]}
    reading = processor.read(request)
    assert reading.dropped.events == 99_999 and reading.segments[-1] == ("item", "x: x")
    assert len(processor.document("d " * 60_000)[0]) == processor.max_length, "documents have no limit"


def test_what_a_task_does_not_read_is_said_once(processor, monkeypatch):
    said = []
    monkeypatch.setattr(processing_m6rec.logger, "warning_once", said.append)
    request = {"candidates": [{"name": "mat", "stats": "rare"}]}
    for task in SCORING_TASKS:
        processor.read(request, task)
    assert not said
    processor.read(request, "plausibility")
    processor.read({"candidates": ["mat"]}, "plausibility")
    processor.read({"candidates": ["mat"]}, "retrieval")
    assert len(said) == 2 and "'plausibility' does not read the statistics" in said[0] and "not read" in said[1]


texts = st.text(st.characters(codec="utf-8"), max_size=8) | st.sampled_from(
    ["[EOS]", "[SEG]", "靴子", "male", "2022-12-05", " "]
)
scalars = texts | st.integers() | st.floats() | st.booleans() | st.none()
garbage = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
)
items = texts | st.dictionaries(st.sampled_from(["name", "price", "item_id", "tags", "x y"]), scalars, max_size=3)
events = items | st.fixed_dictionaries(
    {},
    optional={
        "event": texts,
        "item": items,
        "timestamp": st.integers(0, 10**9) | scalars,
        "rating": scalars,
        "query": texts,
    },
)
stats = texts | st.dictionaries(
    st.sampled_from(["ctr", "x"]), scalars | st.fixed_dictionaries({"top_percent": scalars, "days": scalars})
)
candidates = items | st.fixed_dictionaries({"name": texts}, optional={"stats": stats | st.lists(stats, max_size=2)})
requests = st.fixed_dictionaries(
    {},
    optional={
        "user": texts | st.dictionaries(st.sampled_from(["gender", "age", "z"]), scalars, max_size=3) | garbage,
        "history": st.lists(events | garbage, max_size=4) | garbage,
        "now": texts | st.dictionaries(st.sampled_from(["date", "timestamp", "place"]), scalars, max_size=3) | garbage,
        "facts": st.lists(texts, max_size=2) | garbage,
        "candidates": st.lists(candidates | garbage, max_size=3) | garbage,
        "text": texts | st.lists(texts | garbage, max_size=3) | garbage,
    },
)


good_text = texts.filter(str.strip)
good_value = (
    good_text | st.integers(-5, 3000) | st.floats(-9, 9) | st.booleans() | st.lists(good_text, min_size=1, max_size=2)
)
good_item = good_text | st.fixed_dictionaries({"name": good_value}, optional={"x y": good_value, "item_id": good_text})
good_event = good_item.filter(lambda item: isinstance(item, str)) | st.fixed_dictionaries(
    {"item": good_item},
    optional={"event": good_text, "timestamp": st.just(7), "text": good_text, "rating": st.floats(0, 5)},
)
good_candidate = good_item | st.fixed_dictionaries({"name": good_value, "stats": good_text | st.lists(good_text)})
good_requests = st.fixed_dictionaries(
    {"candidates": st.lists(good_candidate, min_size=1, max_size=3)},
    optional={
        "user": good_text | st.fixed_dictionaries({"age": st.integers(0, 99), "job": good_value}),
        "history": st.lists(good_event, max_size=4),
        "now": good_text | st.fixed_dictionaries({"timestamp": st.integers(7, 99), "date": good_text}),
        "facts": st.lists(good_text, max_size=2),
    },
)


def check_reading(processor, request_, task):
    """What any reading must keep to, told by the ids alone."""
    if isinstance(request_, dict) and task not in WRITING_TASKS:
        request_ = {**request_, "text": None}
    tokenizer, reading = processor.tokenizer, processor.read(request_, task)
    row = tokenizer.convert_ids_to_tokens(reading.input_ids)
    given_candidates = request_.get("candidates") if isinstance(request_, dict) else None
    targets = {"retrieval": 0, **dict.fromkeys(WRITING_TASKS, 1)}.get(task, len(given_candidates or ()))
    assert row.count("[BOS]") == targets
    assert row.count("[BOS']") == row.count("[EOS']") == 1
    assert row.count("[EOS]") == targets or (task in WRITING_TASKS and row.count("[EOS]") == 0)
    kinds = [token for token in row if token in {f"[{kind.upper()}]" for kind in KINDS}]
    assert kinds == [f"[{kind.upper()}]" for kind, _ in reading.segments]
    assert segments_said(processor, reading.input_ids) == normal(reading.segments)
    pieces = " ".join(row).split("[BOS]")
    assert all(len(pieces[0].split()) + len(piece.split()) + 1 <= processor.max_length for piece in pieces[1:])
    assert len(reading.item_embedding_ids) == len(row) == len(processor.labels(reading))
    return reading


@settings(max_examples=examples(300), deadline=None)
@given(requests | garbage, st.sampled_from(TASKS), st.integers(8, 60), st.sampled_from(["gap", "ago"]))
def test_garbage_is_refused_or_read_right(tokenizer, request_, task, max_length, time):
    processor = M6RecProcessor(tokenizer, max_length=max_length, max_events=3, time=time, options=2)
    try:
        check_reading(processor, request_, task)
    except (ValueError, TypeError) as error:
        assert str(error)


@settings(max_examples=examples(300), deadline=None)
@given(
    good_requests, st.sampled_from(["click", "rating", "retrieval", "plausibility"]), st.sampled_from(["gap", "ago"])
)
def test_sound_requests_are_read_right(tokenizer, request_, task, time):
    reading = check_reading(M6RecProcessor(tokenizer, time=time, options=2), request_, task)
    assert not reading.dropped
    assert reading.input_ids.count(tokenizer.convert_tokens_to_ids("[EVENT]")) == len(request_.get("history", ()))


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_model_lays_the_row_out_as_meant(tokenizer, request_of_the_paper, side):
    """The other half of the contract: what the model reads off the ids is what the processor meant by them."""
    config = M6RecConfig(**tokenizer.structural_ids)
    assert model_kinds == KINDS
    processor = M6RecProcessor(tokenizer, options=2)
    several = {**request_of_the_paper, "candidates": ["a", "b [BOS]", "c"], "now": None}
    readings = [processor.read(each) for each in (request_of_the_paper, several)]
    batch = processor([request_of_the_paper, several], return_tensors="pt", padding_side=side)
    lay = layout(batch["input_ids"], batch["attention_mask"], config)
    assert lay.event.amax(1).tolist() == [2, 2] and lay.target.amax(1).tolist() == [1, 3]
    starts = (lay.kind > 0) & (lay.segment_position == 0)
    for row, reading in enumerate(readings):
        assert [KINDS[kind - 1] for kind in lay.kind[row][starts[row]]] == [kind for kind, _ in reading.segments]
    option = KINDS.index("option") + 1
    assert not lay.event[lay.kind == option].any(), "options belong to no event, though no [NOW] ends the last one"
    assert not lay.written.any()
    written = processor([request_of_the_paper], "explanation", return_tensors="pt", padding_side=side)
    assert layout(written["input_ids"], None, config).written[0, -1]


def test_arrays_are_lists(processor):
    history = np.array(["socks", {"item": "boots"}], dtype=object)
    wanted = processor.read({"history": ["socks", "boots"], "candidates": ["x"]})
    assert processor.read({"history": history, "candidates": np.array(["x"])}) == wanted
