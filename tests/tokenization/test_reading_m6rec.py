"""What fits: the oldest events go first, then item fields, then the ends of long texts; never a candidate."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m6rec.tokenization import M6RecProcessor


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
    processor = M6RecProcessor(tokenizer, max_events=6, forget_events=3)
    first = []
    for count in range(1, 14):
        reading = processor.read({"history": [f"thing {place}" for place in range(count)]}, "retrieval")
        kept = [text for kind, text in reading.segments if kind == "item"]
        assert kept[-1] == f"thing {count - 1}" and len(kept) <= 6 and reading.dropped.events == count - len(kept)
        first.append(int(kept[0].split()[1]))
    assert first == [0] * 6 + [3] * 3 + [6] * 3 + [9]
    # The same where it is the tokens that are too many: three events fit.
    lengths_ = [len(processor.read({"history": ["thing 1"] * count}, "retrieval").input_ids) for count in (1, 2)]
    short = M6RecProcessor(tokenizer, max_length=2 * lengths_[1] - lengths_[0], max_events=6, forget_events=2)
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
    for gone in range(1, 7):
        less = {**request, "history": history[gone:]}
        if gone == 6:  # what [NOW] says of the last event stays true, though that event is dropped
            continue
        fits = sum(lengths(tokenizer, M6RecProcessor(tokenizer, max_length=10**6, time=time).read(less).input_ids))
        reading = M6RecProcessor(tokenizer, max_length=fits, time=time).read(request)
        assert reading.dropped.events == gone and fits < whole + 10
        assert reading.input_ids == M6RecProcessor(tokenizer, time=time).read(less).input_ids
        one_less = M6RecProcessor(tokenizer, max_length=fits - 1, time=time).read(request)
        assert one_less.dropped.events > gone


def test_then_the_longest_field_of_the_longest_candidate_goes_whole(tokenizer):
    long = {"name": "hiking boots", "price": 12, "description": "very " * 30, "brand": "b" * 10}
    request = {"user": "a man", "history": ["socks"], "candidates": ["mat", long]}
    processor = M6RecProcessor(tokenizer, max_length=60)
    reading = processor.read(request)
    assert reading.dropped.events == 1 and reading.dropped.fields == [("candidates[1]", "description")]
    assert reading.segments[1:] == [("item", "mat"), ("item", f"hiking boots, by {'b' * 10}, price 12")]
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


def test_what_cannot_fit_is_refused(tokenizer):
    request = {"candidates": [{"name": "boots", "stats": ["a"] * 20}]}
    with pytest.raises(ValueError, match="max_length is 30"):
        M6RecProcessor(tokenizer, max_length=30).read(request)


@settings(max_examples=150, deadline=None)
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
    if reading.dropped.fields:
        assert row.count("[EVENT]") == 0, "events go first"
