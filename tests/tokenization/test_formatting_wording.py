"""What the parts of a request are worded as."""

from datetime import UTC, date, datetime, timedelta, timezone

import numpy as np
import pandas as pd
import pytest

from m6rec.formatting_m6rec import RequestFormatter, value_text
from m6rec.tokenization import load_template


@pytest.fixture
def shop():
    return RequestFormatter(load_template("ecommerce", "en"), {"7": 3})


@pytest.mark.parametrize(
    ("user", "text"),
    [
        ("  a woman ", "a woman"),
        ({"gender": "F", "age": 35}, "a female user in her mid thirties"),
        ({"age": "41"}, "a user in their early forties"),
        ({"gender": "male", "age": "25-34"}, "a male user, age: 25-34"),
        ({"gender": "x"}, "a user, gender: x"),
        ({"user_id": 5, "zip_code": "10115", "city": "Berlin"}, "a user, lives in Berlin, zip code: 10115"),
        ({"interests": ["hiking", "chess"], "member": True}, "a user, interested in hiking, chess, member: yes"),
        ({"age": 120}, "a user in their nineties"),
    ],
)
def test_user(shop, user, text):
    assert shop.user(user).text == text


@pytest.mark.parametrize("user", [None, {}, {"user_id": 3}, {"gender": None}])
def test_user_of_whom_nothing_is_said(shop, user):
    assert shop.user(user) is None


@pytest.mark.parametrize(
    ("age", "words"),
    [(9, "childhood"), (10, "early teens"), (22, "early twenties"), (25, "mid twenties"), (29, "late twenties")],
)
def test_age(shop, age, words):
    assert shop.user({"age": age}).text.endswith(words)


@pytest.mark.parametrize(
    ("now", "text"),
    [
        ("a cold evening", "a cold evening"),
        (
            {"date": "2022-12-05", "place": "Beijing, China", "weather": "cold"},
            "December, Beijing, China, cold weather",
        ),
        ({"date": date(2022, 1, 31)}, "January"),
        ({"date": "Christmas", "device": "phone"}, "Christmas, device: phone"),
    ],
)
def test_now(shop, now, text):
    assert shop.now(now, None).text == text


def test_now_says_the_gap(shop):
    assert shop.now({"timestamp": 5, "place": "Rome"}, 3 * 86400).text == "Rome, last event days ago"
    assert shop.now(None, 0).text == "last event less than a minute ago"
    assert shop.now({"timestamp": 5}, None) is None


@pytest.mark.parametrize(
    ("item", "text"),
    [
        ("[EOS] boots", "[EOS] boots"),
        ({"category": "boots", "name": "hiking shoes", "item_id": 7}, "hiking shoes, category boots"),
        ({"name": "tent", "price": 19.99, "size_eu": 4.0, "colour": None}, "tent, price 19.99, size eu: 4"),
        ({"b": 1, "name": "x", "a": [1, "y"]}, "x, a: 1, y, b: 1"),
        ({"name": "x {value} {0}", "brand": "{name}"}, "x {value} {0}, by {name}"),
        ({"name": np.str_("x"), "year": np.int64(1995), "score": np.float32(4.5)}, "x, score: 4.5, year: 1995"),
        ({"name": "x", "tags": np.array(["a", "b"])}, "x, tags: a, b"),
    ],
)
def test_item(shop, item, text):
    assert shop.item(item, "item").text == shop.item(item, "item").text == text


def test_item_text_does_not_depend_on_the_order_of_fields(shop):
    fields = {"name": "tent", "zeta": 1, "alpha": 2}
    assert shop.item(fields, "").text == shop.item(dict(reversed(fields.items())), "").text


def test_kept_wordings_tell_types_apart(shop):
    texts = [shop.item({"name": "x", "new": value}, "").text for value in (1, True, 1.0, [1], [True], (True,), (1,))]
    assert texts == ["x, new: 1", "x, new: yes", "x, new: 1", "x, new: 1", "x, new: yes", "x, new: yes", "x, new: 1"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (datetime(2020, 1, 1, 0, tzinfo=UTC), datetime(2020, 1, 1, 1, tzinfo=timezone(timedelta(hours=1)))),
        (pd.Timestamp("2020-01-01", tz="UTC"), pd.Timestamp("2020-01-01 09:00", tz="Asia/Tokyo")),
        (np.datetime64("2020-01-01"), np.datetime64("2020-01-01T00:00")),
        (np.float32(0.1), 0.1),
        (1, True),
        (1, "1"),
        (["1"], [1]),
        ([True], [1]),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_equal_values_of_other_words_are_worded_apart(one, other, wrapped):
    """What is kept of an item is found again by its words, not by values that equal each other."""
    wording = load_template("ecommerce", "en")
    items = [{"name": "mat", "since": [value, "x"] if wrapped else value} for value in (one, other)]
    alone = [RequestFormatter(wording).item(item, "item").text for item in items]
    kept = RequestFormatter(wording)
    for item, text in [*zip(items, alone), *zip(items[::-1], alone[::-1])]:
        assert kept.item(item, "item").text == text
    words = load_template("ecommerce", "en")["words"]
    assert (alone[0] == alone[1]) == (value_text(one, "", words) == value_text(other, "", words))


@pytest.mark.parametrize(
    ("item", "row"), [({"item_id": 7}, 3), ({"item_id": "7"}, 3), ({"item_id": 8}, 0), ("7", 0), ({"name": "7"}, 0)]
)
def test_item_row(shop, item, row):
    assert shop.item_row(item) == row


@pytest.mark.parametrize(
    ("event", "texts"),
    [
        ("socks", ["clicked", "socks"]),
        ({"item": "socks"}, ["clicked", "socks"]),
        ({"event": "Add_To-Cart", "item": "socks"}, ["added to the cart", "socks"]),
        ({"event": "gazed at", "item": "socks"}, ["gazed at", "socks"]),
        ({"event": "rate", "item": "socks", "rating": 4.0}, ["rated, 4 stars", "socks"]),
        ({"event": "rate", "item": "socks", "rating": "B+"}, ["rated, B+ stars", "socks"]),
        ({"event": "search", "query": "winter", "item": None}, ["searched", "winter"]),
        ({"event": "review", "item": "socks", "text": "warm"}, ["reviewed", "socks", "warm"]),
        ({"event": "logged in"}, ["logged in"]),
    ],
)
def test_event(shop, event, texts):
    verb, item, text, _ = shop.event(event, "event")
    assert [segment.text for segment in (verb, item, text) if segment is not None] == texts


@pytest.mark.parametrize(
    ("moment", "seconds"),
    [
        (5, 5.0),
        (np.float64(5.5), 5.5),
        ("1970-01-02", 86400.0),
        ("1970-01-01T01:00:00+01:00", 0.0),
        (datetime(1970, 1, 1, 0, 1), 60.0),
        (datetime(1970, 1, 1, 0, 1, tzinfo=UTC), 60.0),
        (pd.Timestamp("1970-01-02", tz="UTC"), 86400.0),
        (None, None),
    ],
)
def test_moment_of_an_event(shop, moment, seconds):
    assert shop.event({"item": "x", "timestamp": moment}, "event").seconds == seconds


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "within a minute"), (60, "within a minute"), (61, "minutes later"), (1e12, "years later")],
)
def test_gap(shop, seconds, words):
    assert shop.gap(seconds) == words


@pytest.mark.parametrize(
    ("stats", "texts"),
    [
        ("popular", ["popular"]),
        ({"ctr": {"top_percent": 4.2, "days": 14}}, ["CTR among the top 5% in the past 14 days"]),
        (
            {"category_clicks": {"times": 7, "years": 2}},
            ["the user clicked the category 5 to 9 times in the last 2 years"],
        ),
        (["a", {"stock_left": 3, "sale": None}], ["a", "stock left: 3"]),
        (None, []),
    ],
)
def test_stats(shop, stats, texts):
    assert [segment.text for segment in shop.stats(stats, "stats")] == texts


def test_a_statistic_of_one_value_may_come_bare():
    video = RequestFormatter(load_template("video", "en"))
    assert video.stats({"ratings": 1}, "")[0].text == "mean rating among the top 1%"


@pytest.mark.parametrize(
    ("part", "value", "error"),
    [
        ("user", {"age": -1}, r"user\.age.*-1"),
        ("user", {"age": True}, r"user\.age.*True"),
        ("user", {"age": float("nan")}, r"user\.age.*nan"),
        ("user", {3: "x"}, r"user: a key.*int \(3\)"),
        ("user", 3, r"user.*int \(3\)"),
        ("user", "\ud800", r"user.*ud800"),
        ("user", {"mood": {}}, r"user\.mood.*dict"),
        ("item", {"name": float("nan")}, r"place\.name.*nan"),
        ("item", {"name": " "}, "no text"),
        ("item", {"item_id": 7}, "place: the item has no text"),
        ("item", {"item_id": [7], "name": "x"}, r"place\.item_id.*list"),
        ("item", {"name": "x", "stats": "y"}, r"place\.stats"),
        ("item", {"name": ["x", None]}, r"place\.name\[1\].*NoneType"),
        ("item", {" ": "x"}, "name of a field.*empty"),
        ("item", None, "place.*NoneType"),
        ("event", {"itme": "x"}, "place: unknown key 'itme'"),
        ("event", {"item": None}, r"place\.item: None"),
        ("event", {}, r"place\.item: None"),
        ("event", {"item": "x", "rating": float("inf")}, r"place\.rating.*inf"),
        ("event", {"item": "x", "rating": [5]}, r"place\.rating.*\[5\]"),
        ("event", {"item": "x", "event": 5}, r"place\.event.*int \(5\)"),
        ("event", {"query": "x", "text": "y"}, "query and text"),
        ("event", {"item": "x", "timestamp": "yesterday"}, r"place\.timestamp.*yesterday"),
        ("event", {"item": "x", "timestamp": pd.NaT}, r"place\.timestamp.*NaT|nan"),
        ("event", {"item": "x", "timestamp": 10**400}, r"place\.timestamp.*finite"),
        ("stats", {"ctr": {"top_percent": 5}}, r"place\.ctr.*top_percent, days.*top_percent"),
        ("stats", {"ctr": 5}, r"place\.ctr.*days"),
        ("stats", {"nonsense": {"a": 1}}, r"place\.nonsense.*ctr"),
        ("stats", {"ctr": {"top_percent": "high", "days": 3}}, r"place\.ctr\.top_percent.*high"),
        ("stats", [3], r"place\[0\].*int \(3\)"),
    ],
)
def test_errors_name_the_place(shop, part, value, error):
    arguments = (value,) if part == "user" else (value, "place")
    with pytest.raises((ValueError, TypeError), match=error):
        getattr(shop, part)(*arguments)


def test_empty_cells_of_a_table_count_as_absent(shop):
    empty = {"name": "boots", "brand": "", "category": None, "colours": [], "note": "  "}
    assert shop.item(empty, "place").text == shop.item({"name": "boots"}, "place").text
