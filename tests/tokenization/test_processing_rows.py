"""What fits: the oldest events go first, then item fields, then the ends of long texts; never the newest event."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m6rec.tokenization import M6RecProcessor
from tests.fast import examples


def lengths(tokenizer, row):
    """Tokens of the source, and of the longest target."""
    source, *targets = " ".join(tokenizer.convert_ids_to_tokens(row)).split("[BOS]")
    return len(source.split()), max((len(target.split()) + 1 for target in targets), default=0)


def shortest(tokenizer, request, task="click"):
    """The least max_length that takes the whole request, found by reading it unbounded."""
    return sum(lengths(tokenizer, M6RecProcessor(tokenizer, max_length=10**6).read(request, task).input_ids))


def test_only_the_latest_events_are_kept(tokenizer):
    history = [{"item": f"thing {place}", "timestamp": 100 * place} for place in range(6)]
    request = {"user": "a man", "history": history, "candidates": ["x"]}
    reading = M6RecProcessor(tokenizer, max_events=2).read(request)
    assert reading.dropped.events == 4 and not reading.dropped.fields
    asked_for_less = M6RecProcessor(tokenizer, max_events=2).read({**request, "history": history[4:]})
    assert reading.input_ids == asked_for_less.input_ids
    assert [text for kind, text in reading.segments if kind in ("item", "age")] == [
        "thing 4",
        "minutes later",
        "thing 5",
        "x",
    ]


def test_events_are_forgotten_so_many_at_a_time(tokenizer):
    processor = M6RecProcessor(tokenizer, max_events=6, truncation_stride=3)
    first = []
    for count in range(1, 14):
        reading = processor.read({"history": [f"thing {place}" for place in range(count)]}, "retrieval")
        kept = [text for kind, text in reading.segments if kind == "item"]
        assert kept[-1] == f"thing {count - 1}" and len(kept) <= 6 and reading.dropped.events == count - len(kept)
        first.append(int(kept[0].split()[1]))
    assert first == [0] * 6 + [3] * 3 + [6] * 3 + [9]
    # The same where it is the tokens that are too many: three events fit.
    lengths_ = [len(processor.read({"history": ["thing 1"] * count}, "retrieval").input_ids) for count in (1, 2)]
    short = M6RecProcessor(tokenizer, max_length=2 * lengths_[1] - lengths_[0], max_events=6, truncation_stride=2)
    for count, expected in ((3, 3), (4, 2), (5, 3), (6, 2)):
        reading = short.read({"history": ["thing 1"] * count}, "retrieval")
        assert (reading.dropped.events, len(reading.segments) // 2) == (count - expected, expected)


@pytest.mark.parametrize("time", ["gap", "ago"])
def test_too_long_drops_the_oldest_events_as_if_never_given(tokenizer, time):
    history = [{"item": f"thing {place}", "timestamp": 100 * place} for place in range(6)]
    request = {
        "user": "a man",
        "history": history,
        "now": {"timestamp": 900},
        "candidates": ["short", "a longer candidate"],
    }
    whole = shortest(tokenizer, request)
    for gone in range(1, 6):
        less = {**request, "history": history[gone:]}
        fits = sum(lengths(tokenizer, M6RecProcessor(tokenizer, max_length=10**6, time=time).read(less).input_ids))
        reading = M6RecProcessor(tokenizer, max_length=fits, time=time).read(request)
        assert reading.dropped.events == gone and fits < whole + 10
        assert reading.input_ids == M6RecProcessor(tokenizer, time=time).read(less).input_ids
        one_less = M6RecProcessor(tokenizer, max_length=fits - 1, time=time).read(request)
        assert one_less.dropped.events == min(gone + 1, 5) and bool(one_less.dropped.fields) == (gone == 5)


def test_then_the_longest_field_of_the_longest_candidate_goes_whole(tokenizer):
    long = {"name": "hiking boots", "price": 12, "description": "very " * 30, "brand": "b" * 10}
    request = {"user": "a man", "history": ["mat", "socks"], "candidates": ["mat", long]}
    processor = M6RecProcessor(tokenizer, max_length=70)
    reading = processor.read(request)
    assert reading.dropped.fields == [("candidates[1]", "description")]
    assert reading.segments[-3:] == [
        ("item", "socks"),
        ("item", "mat"),
        ("item", f"hiking boots, by {'b' * 10}, price 12"),
    ]
    plausible = processor.read(request, "plausibility")
    assert plausible.dropped.fields == [("candidates[1]", "description")]
    assert plausible.segments[-1] == ("text", f"also clicks hiking boots, by {'b' * 10}, price 12")


def test_then_the_longest_text_is_cut(tokenizer):
    request = {"user": "a man", "facts": ["rain " * 40], "candidates": [{"name": "boots " * 50, "price": 3}]}
    reading = M6RecProcessor(tokenizer, max_length=40).read(request)
    assert reading.dropped.fields[0] == ("candidates[0]", "price"), (
        "whole fields first, but never the one that names it"
    )
    assert set(reading.dropped.fields[1:]) == {("candidates[0]", "text"), ("facts[0]", "text")}
    assert sum(lengths(tokenizer, reading.input_ids)) == 40
    (_, user), (_, fact), (_, item) = reading.segments
    assert user == "a man" and ("rain " * 40).startswith(fact) and ("boots " * 50).startswith(item)
    assert len(tokenizer.encode_text(fact)) - len(tokenizer.encode_text(item)) in (-1, 0, 1), "both are cut alike"


def test_a_cut_never_ends_inside_a_character(tokenizer):
    for room in range(20, 60):
        reading = M6RecProcessor(tokenizer, max_length=room).read({"candidates": ["🥾靴子é" * 30]})
        (_, text), *rest = reading.segments
        assert not rest and text and ("🥾靴子é" * 30).startswith(text)
        used = sum(lengths(tokenizer, reading.input_ids))
        assert room - 4 < used <= room


def test_the_prompt_of_a_writing_task_is_never_cut(tokenizer):
    request = {"user": "a man " * 30, "candidates": ["boots " * 30], "text": "because " * 30}
    prompt = "the user is recommended this product because"
    for room in range(50, 90, 7):
        reading = M6RecProcessor(tokenizer, max_length=room).read(request, "explanation")
        assert reading.segments[-1][1].startswith(prompt) and sum(lengths(tokenizer, reading.input_ids)) <= room
        assert reading.input_ids[-1] == tokenizer.eos_token_id


def test_items_alone_are_cut_too(tokenizer):
    processor = M6RecProcessor(tokenizer, max_length=20)
    (row,) = processor.encode_items(["boots " * 50])
    assert len(row) <= 20 and tokenizer.convert_ids_to_tokens(row[-1]) == "[SEG]"


LONG = "字" * 600


@pytest.mark.parametrize(
    "request_",
    [
        {"history": [LONG]},
        {"history": ["socks", {"event": "search", "query": LONG}]},
        {"history": [{"item": {"name": LONG, "description": LONG}}], "candidates": [LONG, {"name": LONG, "x": LONG}]},
        {"user": LONG, "now": LONG, "facts": [LONG] * 3, "history": [LONG, "socks"], "candidates": ["mat", LONG]},
        {"user": "a" + LONG, "candidates": ["mat", {"name": "mat", "tags": [LONG] * 3}]},
    ],
)
def test_texts_longer_than_a_row_are_cut_and_leave_the_newest_event(tokenizer, request_):
    for task in ("click", "plausibility", "retrieval"):
        asked = {name: value for name, value in request_.items() if name != "candidates" or task != "retrieval"}
        if task != "retrieval":
            asked.setdefault("candidates", ["mat"])
        reading = M6RecProcessor(tokenizer, max_length=128).read(asked, task)
        row = tokenizer.convert_ids_to_tokens(reading.input_ids)
        assert 128 - 8 <= sum(lengths(tokenizer, reading.input_ids)) <= 128
        assert row.count("[EVENT]") == min(1, len(asked.get("history", ()))), "the newest event stays"
        assert row.count("[BOS]") == len(asked.get("candidates", ())) and all(text for _, text in reading.segments)


def test_a_long_candidate_takes_half_of_the_row_from_the_history_and_no_more(tokenizer):
    history = [f"thing {place}" for place in range(6)]
    processor = M6RecProcessor(tokenizer, max_length=128)
    reading = processor.read({"history": history, "candidates": [LONG]})
    without = M6RecProcessor(tokenizer, max_length=64).read({"history": history}, "retrieval")
    assert reading.dropped.events == without.dropped.events < 5
    assert sum(lengths(tokenizer, reading.input_ids)) > 128 - 4


@pytest.mark.parametrize("room", [120, 121, 150, 199])
def test_only_texts_above_the_common_length_are_cut(tokenizer, room):
    user, fact, now = ("a" * 300, "b c " * 10, "x" * 90)
    request = {"user": user, "facts": [fact.strip()], "now": now}
    reading = M6RecProcessor(tokenizer, max_length=room).read(request, "retrieval")
    counts = [len(tokenizer.encode_text(text)) for _, text in reading.segments]
    whole = [len(tokenizer.encode_text(text)) for text in (user, fact.strip(), now)]
    assert len(reading.input_ids) == room and counts[1] == whole[1] < counts[0]
    assert counts[2] == min(whole[2], counts[2]) and (counts[2] == whole[2] or 0 <= counts[2] - counts[0] <= 1)


@pytest.mark.parametrize("turns", [7, 41])
def test_the_oldest_turns_go_and_the_last_request_stays_whole(tokenizer, turns):
    said = [f"turn {place}: I recommend tents" if place % 2 else f"turn {place}: and boots?" for place in range(turns)]
    said[-1] = last = "Yes, recommend me another one of these"
    reading = M6RecProcessor(tokenizer, max_length=120).read({"user": "a man", "text": said}, "conversation")
    texts = [text for kind, text in reading.segments if kind == "text"]
    kept = texts[:-2]
    assert texts[-2] == f"USER: {last}" and texts[-1] == "SYSTEM:" and len(kept) < turns - 1
    assert [text.split(": ", 1)[1] for text in kept] == said[turns - 1 - len(kept) : -1], "whole, the latest ones"
    assert reading.dropped.fields == [(f"text[{place}]", "text") for place in range(turns - 1 - len(kept))]


def test_the_last_turn_loses_its_beginning_and_never_its_end(tokenizer):
    """What is asked stands at the end of a request; other texts are cut at their ends."""
    wish = "nothing with horses in it"
    for size in (100, 101, 102, 160):
        processor = M6RecProcessor(tokenizer, max_length=size)
        talk = [{"role": "assistant", "content": "well?"}, {"role": "user", "content": f"{LONG} please {wish}"}]
        reading = processor.read({"messages": [{"role": "system", "content": LONG}, *talk]}, "conversation")
        instruction, last, lead = (text for kind, text in reading.segments)
        assert (
            instruction.startswith("INSTRUCTION: 字")
            and lead == "SYSTEM:"
            and size - 8 <= len(reading.input_ids) <= size
        )
        assert last.startswith("USER:字") and last.endswith(f"字 please {wish}")
        assert set(reading.dropped.fields) == {(f"messages[{place}]", "text") for place in (0, 1, 2)}


def test_max_events_binds_the_turns_of_a_conversation(tokenizer):
    said = [f"turn {place}" for place in range(9)]
    reading = M6RecProcessor(tokenizer, max_events=3).read({"text": said}, "conversation")
    assert [text for _, text in reading.segments] == ["USER: turn 6", "SYSTEM: turn 7", "USER: turn 8", "SYSTEM:"]
    assert reading.dropped.fields == [(f"text[{place}]", "text") for place in range(6)]
    talk = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(said)]
    reading = M6RecProcessor(tokenizer, max_events=3).read({"history": ["mat"], "messages": talk}, "retrieval")
    assert [text for kind, text in reading.segments if kind == "text"] == ["turn 6", "turn 7", "turn 8"]
    assert reading.dropped.events == 7


def test_the_last_facts_go_whole(tokenizer):
    facts = [f"fact number {place}" for place in range(120)]
    candidate = {"name": "boots", "price": 3}
    request = {"facts": facts, "history": ["mat", "socks"], "candidates": [candidate]}
    reading = M6RecProcessor(tokenizer, max_length=128).read(request)
    kept = [text for kind, text in reading.segments if kind == "fact"]
    assert kept == facts[: len(kept)] and 3 < len(kept) < 20 and reading.dropped.events == 0
    assert reading.segments[-1] == ("item", "boots, price 3")
    assert reading.dropped.fields == [(f"facts[{place}]", "text") for place in range(119, len(kept) - 1, -1)]


@pytest.mark.parametrize(
    "request_",
    [
        {"user": "a" + "字" * 1500, "candidates": ["字" * 1500]},
        {"facts": [f"fact {place}" for place in range(3000)], "candidates": ["mat"]},
        {"candidates": [{"name": "mat", **{f"field {place}": "x" for place in range(500)}}]},
        {"candidates": [{"name": f"mat {place}", "text": "long " * place} for place in range(200)]},
    ],
)
def test_shortening_costs_in_proportion_to_the_request(tokenizer, monkeypatch, request_):
    """Tokens that are encoded and decoded are counted: a quadratic way would take hundreds of times the request."""
    work = 0
    encode, decode = type(tokenizer).encode_texts, type(tokenizer).decode

    def counted_encode(self, texts):
        nonlocal work
        rows = encode(self, texts)
        work += sum(map(len, rows))
        return rows

    def counted_decode(self, ids, *args, **kwargs):
        nonlocal work
        work += len(ids)
        return decode(self, ids, *args, **kwargs)

    monkeypatch.setattr(type(tokenizer), "encode_texts", counted_encode)
    M6RecProcessor(tokenizer, max_length=10**6).read(request_)
    whole, work = work, 0
    monkeypatch.setattr(type(tokenizer), "decode", counted_decode)
    M6RecProcessor(tokenizer, max_length=100).read(request_)
    assert whole <= work < 15 * whole


def test_what_cannot_fit_is_refused(tokenizer):
    request = {"candidates": [{"name": "boots", "stats": ["a"] * 20}]}
    with pytest.raises(ValueError, match="max_length is 30"):
        M6RecProcessor(tokenizer, max_length=30).read(request)


@settings(max_examples=examples(150), deadline=None)
@given(st.data())
def test_any_length_is_kept_and_nothing_needed_is_lost(tokenizer, data):
    words = st.text("ab 靴🥾", min_size=1, max_size=30).filter(str.strip)
    request = data.draw(
        st.fixed_dictionaries(
            {
                "user": words,
                "history": st.lists(words, max_size=5),
                "candidates": st.lists(st.fixed_dictionaries({"name": words, "x": words}), min_size=1, max_size=3),
            }
        )
    )
    room = data.draw(st.integers(20, 120))
    reading = M6RecProcessor(tokenizer, max_length=room).read(request)
    row = tokenizer.convert_ids_to_tokens(reading.input_ids)
    whole = shortest(tokenizer, request)
    assert sum(lengths(tokenizer, reading.input_ids)) <= room
    assert bool(reading.dropped) == (whole > room)
    assert row.count("[EOS]") == row.count("[BOS]") == len(request["candidates"])
    assert row.count("[EVENT]") == len(request["history"]) - reading.dropped.events
    assert row.count("[SEG]") == len(reading.segments)
    assert row.count("[ITEM]") == row.count("[EVENT]") + len(request["candidates"])
    assert not request["history"] or room < 60 or row.count("[EVENT]") > 0, "the newest event stays"
    longest = max(sum(map(len, tokenizer.encode_texts([*each.values()]))) for each in request["candidates"]) + 12
    if reading.dropped.fields and longest < room / 2:
        assert row.count("[EVENT]") <= 1, "events go first"


def test_a_segment_longer_than_a_model_reads_is_cut_to_its_beginning(tokenizer):
    """Wherever an item stands it has the same ids, no more than may be."""
    processor = M6RecProcessor(tokenizer, max_length=400, max_segment=20)
    whole = M6RecProcessor(tokenizer, max_length=400)
    item = {"title": "a long story " * 20, "brand": "North"}
    (ids,), (uncut,) = processor.encode_items([item]), whole.encode_items([item])
    assert len(ids) <= 20 < len(uncut) and ids[:-1] == uncut[: len(ids) - 1] and ids[-1] == uncut[-1]
    reading = processor.read({"history": [{"item": item}, "socks"], "candidates": [item]})
    text = " ".join(map(str, reading.input_ids))
    assert text.count(" ".join(map(str, ids))) == 2, "in the history and as a candidate"
    assert ("history[0]", "text") in reading.dropped.fields and ("candidates[0]", "text") in reading.dropped.fields
    assert reading.segments[1][0] == "item" and item["title"].startswith(reading.segments[1][1])
    short = {"history": ["socks"], "candidates": ["shoes"]}
    assert processor.read(short) == whole.read(short)
    with pytest.raises(ValueError, match="max_segment=4 is too small"):
        M6RecProcessor(tokenizer, max_segment=4)
