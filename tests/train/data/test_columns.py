"""Columns of strangers' tables, found by name and by contents."""

import pandas
import pytest
from datasets import Dataset

from m6rec.train.data.columns import Sample, find_columns, pick_texts, plain_name, write_items

TITLES = ["Red Harbour", "The Long Winter", "Night Train", "A Quiet Field", "Glass Towers", "Salt and Stone"]


def events(**columns):
    own = {"user": [f"u{row % 12}" for row in range(48)], "item": [f"i{row % 6}" for row in range(48)], **columns}
    return Dataset.from_pandas(pandas.DataFrame({name: cells for name, cells in own.items() if cells is not None}))


def items(**columns):
    return Dataset.from_pandas(pandas.DataFrame({"item": [f"i{row}" for row in range(6)], "title": TITLES, **columns}))


def found(events, items, time_format=None, **given):
    return find_columns(events, items, given, time_format)


@pytest.mark.parametrize(
    ("user", "item", "time", "rating"),
    [
        ("user_id", "item_id", "timestamp", "rating"),
        ("reviewerID", "asin", "unixReviewTime", "overall"),
        ("user_id:token", "item_id:token", "timestamp:float", "rating:float"),
        ("CustomerID", "StockCode", "InvoiceDate", "Stars"),
    ],
)
def test_usual_names(user, item, time, rating):
    columns = {user: [f"u{row % 12}" for row in range(48)], item: [f"i{row % 6}" for row in range(48)]}
    columns |= {time: [1_600_000_000 + row for row in range(48)], rating: [1 + row % 5 for row in range(48)]}
    log = Dataset.from_pandas(pandas.DataFrame(columns))
    own = found(log, items())
    assert own.columns == {
        **{"user_id": user, "item_id": item, "timestamp": time, "rating": rating},
        **{"event": None, "label": None},
    }
    assert own.item_id == "item" and own.item_columns == ["title"]


def test_columns_without_a_usual_name_are_found_by_what_they_hold():
    log = events(
        user=None, item=None, wer=[f"u{row % 12}" for row in range(48)], was=[f"i{row % 6}" for row in range(48)]
    )
    log = log.add_column("wann", [f"2024-05-{1 + row % 28:02d}" for row in range(48)])
    own = found(log, items().rename_column("item", "Nr"))
    assert (own.columns["user_id"], own.columns["item_id"], own.columns["timestamp"]) == ("wer", "was", "wann")
    assert own.item_id == "Nr" and own.time_format is None


def test_of_several_columns_that_may_be_users_the_only_id_is_taken():
    """Amounts repeat as ids of users do."""
    amounts = {"quantity": [f"{row % 11}" for row in range(48)], "paid": [f"{row % 17}.50" for row in range(48)]}
    for name in ("payer_id", "payerId", "payer ID"):
        log = events(user=None, **amounts, **{name: [f"u{row % 12}" for row in range(48)]})
        assert found(log, items()).columns["user_id"] == name
    two = {name: [f"u{row % 12}" for row in range(48)] for name in ("payer_id", "bill_id")}
    with pytest.raises(ValueError, match="quantity, paid, payer_id, bill_id may"):
        found(events(user=None, **amounts, **two), items())


def test_a_usual_name_gives_way_to_ids_that_fit():
    """`product` holds names, `code` the ids of the items table."""
    log = events(item=None, product=["a thing"] * 48, code=[f"i{row % 6}" for row in range(48)])
    assert found(log, items()).columns["item_id"] == "code"


@pytest.mark.parametrize(
    ("cells", "form"),
    [
        ([1_600_000_000 + row for row in range(48)], None),
        ([f"2024-05-{1 + row % 28:02d} 10:00:00" for row in range(48)], None),
        ([f"{1 + row % 28:02d}.05.2024" for row in range(48)], "%d.%m.%Y"),
        ([f"05/{1 + row % 28:02d}/2024" for row in range(48)], "%m/%d/%Y"),
        ([f"05 {1 + row % 28:02d}, 2024" for row in range(48)], "%m %d, %Y"),
        ([row // 12 for row in range(48)], "order"),
    ],
)
def test_how_times_are_written(cells, form):
    assert found(events(time=cells), items()).time_format == form
    assert found(events(time=cells), items(), timestamp=None).columns["timestamp"] is None


def test_what_cannot_be_found_is_asked_for():
    with pytest.raises(ValueError, match=r"says who it was\? The columns are item, .*data\.columns\.user_id=COLUMN"):
        found(events(user=None, other=["x"] * 48), items())
    two = {"a": [f"a{row % 12}" for row in range(48)], "b": [f"b{row % 14}" for row in range(48)]}
    with pytest.raises(ValueError, match="a, b may"):
        found(events(user=None, **two), items())
    with pytest.raises(
        ValueError, match=r"events have the columns user, item, the items item, title.*data\.columns\.item"
    ):
        found(events(item=[f"x{row}" for row in range(48)]), items())
    with pytest.raises(ValueError, match=r"user_id=who: the events table has no such column; it has user, item"):
        found(events(), items(), user_id="who")
    with pytest.raises(ValueError, match=r"'01/02/2024', reads as '%m/%d/%Y' and as '%d/%m/%Y': say which"):
        found(events(time=[f"0{1 + row % 2}/02/2024" for row in range(48)]), items())
    with pytest.raises(ValueError, match=r"'soon', is no time .*data\.columns\.timestamp=null"):
        found(events(time=["soon"] * 48), items())
    assert found(events(time=["01/02/2024"] * 48), items(), time_format="%d/%m/%Y").time_format == "%d/%m/%Y"


def test_texts_are_picked_and_the_rest_has_a_reason():
    table = items(
        brand=["North", "Trail", "North", "", "Sea", "Sea"],
        year=[1990, 1991, 1992, 1993, 1990, 1991],
        price=[9.5, 3.25, 100.0, 7.75, 1.5, 2.0],
        url=[f"https://shop.example/{row}" for row in range(6)],
        image=[f"img/{row}.jpg" for row in range(6)],
        ean=[f"40062{row}933X" for row in range(6)],
        currency=["EUR"] * 6,
        added=[f"2024-05-{1 + row:02d}" for row in range(6)],
        in_stock=["yes", "no", "yes", "no", "no", "yes"],
        notes=[""] * 6,
        description=["word " * 100] * 3 + ["more " * 100] * 3,
    )
    texts, left_out = pick_texts(Sample("items", table.select_columns([*reversed(table.column_names)])), "item")
    assert texts == ["title", "year", "brand"], "the title first, then in the order of the table"
    assert left_out == {
        **{"price": "numbers", "url": "addresses", "image": "addresses", "ean": "codes"},
        **{"currency": "the same everywhere", "added": "dates", "in_stock": "yes or no"},
        **{"notes": "empty, or no text", "description": "long texts"},
    }
    assert pick_texts(Sample("items", table.select_columns(["item", "description"])), "item") == (["description"], {})


def test_names_of_one_word_are_no_codes():
    table = Dataset.from_dict({"id": list("abc"), "artist": ["Radiohead", "Björk", "ABBA"]})
    assert pick_texts(Sample("items", table), "id")[0] == ["artist"]


def test_items_are_written_with_the_events_name_of_the_id(tmp_path):
    table = items(brand=["", "Trail", "", "", "Sea", "Sea"]).rename_column("item", "Nr")
    own = found(events(), table)
    rows = table.to_pandas()
    rows.loc[[1, 3], ["title", "brand"]] = ""
    assert write_items(Dataset.from_pandas(rows), own, tmp_path / "t" / "items.parquet") == 2
    written = pandas.read_parquet(tmp_path / "t" / "items.parquet").set_index("item")
    assert written.loc["i1", "title"] == "i1" and written.loc["i0", "title"] == "Red Harbour"
    only_ids = Dataset.from_dict({"item": [f"i{row}" for row in range(6)]})
    assert write_items(only_ids, found(events(), only_ids), tmp_path / "ids.parquet") == 6
    assert pandas.read_parquet(tmp_path / "ids.parquet")["name"].tolist() == [f"i{row}" for row in range(6)]


def test_plain_names():
    assert {plain_name(name) for name in ("user_id", "User ID", "userId:token", "USER.ID")} == {"userid"}
