"""The log: tables joined and checked, and MovieLens-100K."""

import logging
import subprocess
import sys
from pathlib import Path

import datasets
import numpy
import pandas
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from m6rec.train.data.log import DataArguments, Log, build_log, read_log, read_movielens, repeated_rows
from tests.conftest import real_data


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


T = 1_600_000_000
EVENTS = {"user_id": ["u1", "u2", "u1"], "item_id": ["b", "a", "a"], "timestamp": [T + 30, T + 20, T + 10]}
ITEMS = {"item_id": ["a", "b", "c"], "title": ["靴子", "Coat", "Hat"], "brand": ["", None, "X"]}


def log_of(events=None, items=None, users=None, **arguments) -> Log:
    events, items = Dataset.from_dict(EVENTS | (events or {})), Dataset.from_dict(ITEMS | (items or {}))
    return build_log(events, items, users and Dataset.from_dict(users), DataArguments(**arguments))


def test_the_three_tables_by_hand():
    log = log_of({"event": ["buy", None, " click "]}, users={"user_id": ["u1"], "age": [30], "city": [None]})
    assert log.interactions.to_dict("list") == {
        "user_id": ["u1", "u2", "u1"],
        "item_id": ["b", "a", "a"],
        "timestamp": [T + 30.0, T + 20.0, T + 10.0],
        "event": ["buy", "", "click"],
    }
    assert log.items.index.tolist() == ["a", "b", "c"]
    assert log.items.index.name == "item_id"
    assert log.item_fields("a") == {"title": "靴子"}
    assert log.item_fields("c") == {"title": "Hat", "brand": "X"}
    assert log.user_fields("u1") == {"age": "30"}
    assert log.user_fields("u2") == {}
    assert log_of().user_fields("u1") == {}
    with pytest.raises(KeyError, match="item 'd' is not in the items table"):
        log.item_fields("d")


def test_item_columns_choose_and_order_the_texts():
    assert list(log_of(item_columns=["brand", "title"]).item_fields("c").items()) == [("brand", "X"), ("title", "Hat")]
    with pytest.raises(ValueError, match="items: no column 'colour'; the columns are item_id, title, brand"):
        log_of(item_columns=["colour"])


def test_labels_come_from_ratings_where_there_are_none():
    ratings = {"rating": ["4", "3.5", "5"]}
    assert log_of(ratings).interactions["label"].tolist() == [1, 0, 1]
    assert log_of(ratings, min_rating_liked=5).interactions["label"].tolist() == [0, 0, 1]
    assert log_of(ratings | {"label": [0, 1, 0]}).interactions["label"].tolist() == [0, 1, 0]
    assert log_of(ratings).interactions["rating"].tolist() == [4.0, 3.5, 5.0]
    assert "label" not in log_of().interactions


@pytest.mark.parametrize("ending", [".csv", ".parquet", ".jsonl"])
def test_read_from_files_under_the_users_own_names(tmp_path, ending):
    events = {"谁": ["007", "用户"], "什么": ["NA", "商品"], "when": ["2020-01-01", "2020-01-02"], "stars": [5, 1]}
    frames = {
        "interactions": pandas.DataFrame(events),
        "items": pandas.DataFrame({"什么": ["商品", "NA"], "标题": ["轻便保暖男士冬季连帽夹克", "boots, “warm”"]}),
        "users": pandas.DataFrame({"谁": ["007"], "age": ["30"]}),
    }
    for name, frame in frames.items():
        path = tmp_path / f"{name}{ending}"
        if ending == ".csv":
            frame.to_csv(path, index=False)
        elif ending == ".parquet":
            frame.to_parquet(path)
        else:
            frame.to_json(path, orient="records", lines=True, force_ascii=False)
    paths = {name: str(tmp_path / f"{name}{ending}") for name in frames}
    roles = {"user_id": "谁", "item_id": "什么", "timestamp": "when", "rating": "stars"}
    log = read_log(DataArguments(**paths, columns=roles))
    assert log.interactions.to_dict("list") == {
        "user_id": ["007", "用户"],
        "item_id": ["NA", "商品"],
        "timestamp": [1577836800.0, 1577836800.0 + 86400],
        "rating": [5.0, 1.0],
        "label": [1, 0],
    }
    assert log.item_fields("商品") == {"标题": "轻便保暖男士冬季连帽夹克"}
    assert log.item_fields("NA") == {"标题": "boots, “warm”"}
    assert log.user_fields("007") == {"age": "30"}


def test_numeric_ids_join_whatever_number_type_each_table_has():
    log = log_of({"user_id": [1.0, 2.0, 1.0], "item_id": [1, 2, 3]}, {"item_id": ["1", "2", "3"]})
    assert log.interactions["user_id"].tolist() == ["1", "2", "1"]
    assert log.items.index.tolist() == ["1", "2", "3"]


def test_white_space_around_ids_is_no_part_of_them_in_any_table():
    log = log_of(
        {"item_id": ["b ", "\u3000a", "a"]}, {"item_id": [" a", "b", "c\t"]}, {"user_id": ["u1 "], "age": [30]}
    )
    assert log.interactions["item_id"].tolist() == ["b", "a", "a"]
    assert log.items.index.tolist() == ["a", "b", "c"]
    assert log.item_fields(" a ") == {"title": "靴子"}
    assert log.user_fields("u1") == {"age": "30"}
    with pytest.raises(ValueError, match=r"items: .* row 2: expected an id that no earlier row has, got 'a '"):
        log_of(items={"item_id": ["a", "a ", "b"]})


@pytest.mark.parametrize(
    ("events", "items", "told"),
    [
        (["6", "7", "6"], ["00006", "00007", "x"], "3 of these are nearly there, '6' as '00006'"),
        (["6.0", "7", "6.0"], ["6", "7", "x"], "2 of these are nearly there, '6.0' as '6'"),
        (["A", "b", "z"], ["a", "b", "x"], "1 of these are nearly there, 'A' as 'a'"),
    ],
)
def test_ids_that_nearly_are_in_the_items_table_are_named(events, items, told):
    with pytest.raises(
        ValueError, match=f"expected an item of the items table.*{told}: write ids alike in both tables"
    ):
        log_of({"item_id": events}, {"item_id": items})
    with pytest.raises(KeyError, match="item '01' is not in the items table; '1' nearly is it"):
        log_of({"item_id": [1, 1, 1]}, {"item_id": [1, 2, 3]}).item_fields("01")


def test_an_order_of_events_is_no_time():
    rows = {"user_id": ["u1"] * 4, "item_id": ["a", "b", "c", "c"], "timestamp": ["10", "9", "2", "2"]}
    events = Dataset.from_dict(rows)
    log = build_log(events, Dataset.from_dict(ITEMS), None, DataArguments(time_format="order"))
    assert log.interactions["item_id"].tolist() == ["c", "b", "a"]
    assert log.interactions["timestamp"].isna().all()
    assert list(log.interactions) == ["user_id", "item_id", "timestamp"]
    assert log.dropped == {"interactions: repeats another row's user_id, item_id, timestamp": 1}
    with pytest.raises(ValueError, match=r"row 1: expected a time .*data\.time_format: order"):
        build_log(events, Dataset.from_dict(ITEMS), None, DataArguments())


def test_events_at_the_same_place_of_an_order_are_shuffled_by_the_seed():
    rows = {"user_id": ["u"] * 40, "item_id": [f"i{row}" for row in range(40)], "timestamp": [1] * 40}
    items = Dataset.from_dict({"item_id": rows["item_id"], "title": rows["item_id"]})
    orders = [
        build_log(Dataset.from_dict(rows), items, None, DataArguments(time_format="order", seed=seed)).interactions
        for seed in (0, 0, 1)
    ]
    first, same, other = (log["item_id"].tolist() for log in orders)
    assert first == same != other
    assert rows["item_id"] not in (first, other)


def test_a_column_that_is_not_to_be_read():
    log = log_of({"rating": [1, 2, 3]}, columns={"timestamp": None, "rating": None})
    assert log.interactions["timestamp"].isna().all()
    assert "rating" not in log.interactions


def repeated(**columns):
    return {name: numpy.repeat(values, 2).tolist() for name, values in (EVENTS | columns).items()}


def test_repeated_events_are_dropped_and_counted(caplog):
    with caplog.at_level(logging.WARNING):
        log = log_of(repeated(text=["x", "y", "z"]))
    assert log.interactions["text"].tolist() == ["x", "y", "z"]
    assert "dropped 3 rows" in caplog.text


def test_events_that_differ_in_kind_or_time_are_not_repeated():
    assert len(log_of(repeated() | {"event": ["view", "buy"] * 3}).interactions) == 6
    assert len(log_of(repeated() | {"timestamp": range(T, T + 6)}).interactions) == 6


def test_without_times_the_order_of_the_table_counts_and_repetitions_stay(caplog):
    events = Dataset.from_dict({"user_id": ["u", "u", "u"], "item_id": ["a", "b", "a"]})
    log = build_log(events, Dataset.from_dict(ITEMS), None, DataArguments())
    assert log.interactions["item_id"].tolist() == ["a", "b", "a"]
    assert log.interactions["timestamp"].isna().all()
    assert "no column 'timestamp'" in caplog.text


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"events": {"user_id": ["u", "", "u"]}}, r"interactions: column 'user_id', row 2: expected an id, got ''"),
        ({"events": {"item_id": ["a", "b", None]}}, r"interactions: column 'item_id', row 3: expected an id, got None"),
        (
            {"events": {"item_id": ["a", "x", "y"]}},
            r"interactions: column 'item_id', row 2: expected an item of the items table, got 'x' \(2 of 3 rows",
        ),
        ({"events": {"timestamp": [str(T), str(T), "noon"]}}, r"interactions: column 'timestamp', row 3: .*'noon'"),
        (
            {"events": {"rating": [1.0, float("nan"), 5.0]}},
            r"column 'rating', row 2: expected a finite number or nothing, got nan",
        ),
        (
            {"events": {"rating": [1.0, 2.0, float("inf")]}},
            r"column 'rating', row 3: expected a finite number or nothing, got inf",
        ),
        ({"events": {"label": [0, 1, 2]}}, r"column 'label', row 3: expected label 0 or 1, got 2"),
        ({"events": {"label": ["0", "yes", "1"]}}, r"column 'label', row 2: .* got 'yes'"),
        ({"items": {"item_id": ["a", "b", "a"]}}, r"items: column 'item_id', row 3: .* no earlier row has, got 'a'"),
        ({"items": {"item_id": ["a", None, "b"]}}, r"items: column 'item_id', row 2: expected an id"),
        (
            {"items": {"title": ["x", " ", "y"]}},
            r"items: .* row 2: expected an item with some text in title, brand, got 'b'",
        ),
        ({"users": {"user_id": ["u1", "u1"], "age": [1, 2]}}, r"users: column 'user_id', row 2: .* got 'u1'"),
        ({"users": {"id": ["u1"]}}, r"users: no column 'user_id'; the columns are id"),
        (
            {"columns": {"rating": "stars"}},
            r"interactions: no column 'stars'; the columns are user_id, item_id, timestamp",
        ),
        ({"columns": {"item_id": "sku"}}, r"items: no column 'sku'; the columns are item_id, title, brand"),
        ({"item_columns": []}, r"row 1: expected an item with some text in no column, got 'a'"),
    ],
)
def test_bad_tables_are_refused_by_name(tables, message):
    with pytest.raises(ValueError, match=message):
        log_of(**tables)


def test_empty_and_missing_tables(tmp_path):
    empty = Dataset.from_dict({"user_id": [], "item_id": []})
    with pytest.raises(ValueError, match="interactions: the table is empty"):
        build_log(empty, Dataset.from_dict(ITEMS), None, DataArguments())
    with pytest.raises(FileNotFoundError, match=r"absent\.csv"):
        read_log(DataArguments(interactions=str(tmp_path / "absent.csv"), items="b.csv"))
    with pytest.raises(ValueError, match=r"needs data\.interactions and data\.items.*got 'a\.csv' and None"):
        read_log(DataArguments(interactions="a.csv"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "ml-1m"}, "data.source is 'ml-1m'; expected one of tables, ml-100k"),
        ({"columns": {"usr": "a"}}, "data.columns: unknown role usr; the roles are user_id, item_id"),
        ({"columns": {"item_id": None}}, "data.columns.item_id is null, and no event is without it: name its column"),
        ({"time_format": "ISO"}, "data.time_format is 'ISO'; expected one of seconds, "),
        ({"min_rating_liked": float("nan")}, "data.min_rating_liked is nan"),
        ({"source": "ml-100k", "items": "i.csv"}, "'ml-100k' has its own tables; remove data.items"),
        ({"directory": "d"}, "data.directory 'd' is read by data.source ml-100k, amazon-beauty, .* only"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**arguments)


def test_movielens_in_small(tmp_path):
    (tmp_path / "ml-100k.inter").write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\t2\t3\t881250949\n1\t1\t4\t881250950\n"
    )
    (tmp_path / "ml-100k.item").write_text(
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        "1\tNet, The\t1995\tSci-Fi\n2\tX\t\t\n"
    )
    (tmp_path / "ml-100k.user").write_text(
        "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n1\t24\tF\tnone\t85711\n"
    )
    log = read_movielens(tmp_path)
    assert log.interactions.to_dict("list") == {
        "user_id": ["1", "1"],
        "item_id": ["2", "1"],
        "timestamp": [881250949.0, 881250950.0],
        "rating": [3.0, 4.0],
        "event": ["rate", "rate"],
        "label": [0, 1],
    }
    assert log.item_fields("1") == {"title": "The Net", "year": "1995", "genres": "Sci-Fi"}
    assert log.user_fields("1") == {"age": "24", "gender": "female"}
    titles = read_log(DataArguments(source="ml-100k", directory=str(tmp_path), item_columns=["title"]))
    assert titles.item_fields("1") == {"title": "The Net"}


@pytest.mark.parametrize(
    ("events", "labels", "kind"),
    [
        ({"rating": [5.0, None, 1.0]}, [1, -1, 0], "float32"),
        ({"label": ["1", "", "0"], "rating": [1, 2, 3]}, [1, -1, 0], "float32"),
        ({"label": [1, 0, 0]}, [1, 0, 0], "int8"),
    ],
)
def test_what_an_event_does_not_say_is_unknown(events, labels, kind):
    found = log_of(events).interactions["label"]
    assert found.fillna(-1).tolist() == labels
    assert found.dtype == kind


def test_ids_and_events_are_kept_once():
    kinds = log_of({"event": ["buy", "view", "buy"]}).interactions.dtypes
    assert [str(kinds[name]) for name in ("user_id", "item_id", "event")] == ["category"] * 3


def test_negative_and_huge_ids_are_names_like_others():
    log = log_of({"user_id": [-1, 2**62, -1], "item_id": [2**63 - 1, -7, -7]}, {"item_id": [-7, 2**63 - 1, 0]})
    assert log.interactions["user_id"].tolist() == ["-1", str(2**62), "-1"]
    assert log.interactions["item_id"].tolist() == [str(2**63 - 1), "-7", "-7"]


def test_bad_rows_are_left_out_with_their_reasons(caplog):
    events = {
        "user_id": ["u1", "u2", "", "u1", "u1", "u1", "u1"],
        "item_id": ["a", "b", "a", "x", "c", "a", "a"],
        "timestamp": [*(f"{T + place}" for place in range(5)), "later", str(T)],
        "label": ["1", "0", "0", "1", "1", "1", "1"],
    }
    items = {"item_id": ["a", "b", "c", "a"], "title": ["靴子", "Coat", " ", "Boots"]}
    tables = (
        Dataset.from_dict(events),
        Dataset.from_dict(items),
        Dataset.from_dict({"user_id": ["u1", ""], "age": [1, 2]}),
    )
    with pytest.raises(ValueError, match="row 4: expected an id that no earlier row has, got 'a'"):
        build_log(*tables, DataArguments())
    log = build_log(*tables, DataArguments(drop_invalid=True))
    assert log.interactions.to_dict("list") == {
        "user_id": ["u1", "u2"],
        "item_id": ["a", "b"],
        "timestamp": [T, T + 1],
        "label": [1, 0],
    }
    assert log.items["title"].to_dict() == {"a": "靴子", "b": "Coat"}
    assert log.users.index.tolist() == ["u1"]
    assert log.dropped == {
        "items: column 'item_id': not an id that no earlier row has": 1,
        "items: column 'item_id': not an item with some text in title": 1,
        "interactions: column 'user_id': not an id": 1,
        "interactions: column 'item_id': not an item of the items table": 2,
        "interactions: column 'timestamp': not a time (seconds or ISO 8601, one of them in all rows)": 1,
        "interactions: repeats another row's user_id, item_id, timestamp": 1,
        "users: column 'user_id': not an id": 1,
    }
    assert "dropped 2 rows: interactions: column 'item_id'" in caplog.text


def test_a_row_is_left_out_for_its_first_reason_alone():
    events = {"user_id": ["u1", ""], "item_id": ["a", "x"], "timestamp": [str(T), str(T)]}
    tables = Dataset.from_dict(events), Dataset.from_dict({"item_id": ["a"], "title": ["Boots"]})
    assert build_log(*tables, None, DataArguments(drop_invalid=True)).dropped == {
        "interactions: column 'user_id': not an id": 1
    }


def test_parts_are_read_only_where_they_are_named():
    parts = {"part": ["wheel", "brake", "wheel"], "fold": ["train", "test", "valid"]}
    assert "part" not in log_of(parts).interactions
    assert log_of(parts, columns={"part": "fold"}).interactions["part"].tolist() == ["train", "test", "valid"]
    with pytest.raises(ValueError, match="column 'part', row 1: expected one of train, valid, test, got 'wheel'"):
        log_of(parts, columns={"part": "part"})


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 3), st.sampled_from([0.0, 1.5]))))
def test_repeated_rows_against_a_loop(rows):
    found = repeated_rows(pandas.DataFrame(rows, columns=["a", "b", "c"]))
    assert found.tolist() == [row in rows[:place] for place, row in enumerate(rows)]


def test_rows_of_the_same_hash_are_compared(monkeypatch):
    monkeypatch.setattr(pandas.util, "hash_pandas_object", lambda rows, index: pandas.Series(0, rows.index))
    assert repeated_rows(pandas.DataFrame({"a": ["x", "y", "x"]})).tolist() == [False, False, True]


def test_data_sets_known_by_name_are_looked_for_and_never_fetched(monkeypatch):
    monkeypatch.delenv("M6REC_DATA", raising=False)
    for source, file in (("amazon-beauty", "sequential"), ("lastfm", "grouplens"), ("tallrec", "TALLRec")):
        with pytest.raises(FileNotFoundError, match=f"is not here: M6REC_DATA is not set.*{file}"):
            read_log(DataArguments(source=source))


MEASURE = """
import sys, threading, time
import datasets
from m6rec.train.data.log import DataArguments, read_log
from m6rec.train.data.splits import hold_out

datasets.config.HF_DATASETS_CACHE = sys.argv[1] + "/cache"
def own():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
def watch():
    while True:
        peak[0] = max(peak[0], own())
        time.sleep(0.005)
def write(rows):
    with open(sys.argv[1] + "/events.csv", "w") as file:
        file.write("user_id,item_id,timestamp,event,rating,session\\n")
        for row in range(rows):
            place = row * 7919 % 1_000_003
            what = f"user-{place % (rows // 20)},B{place % 9973:09},{15 * 10**8 + place * 60}"
            file.write(f"{what},view,{row % 5 + 1},{row**3}\\n")
with open(sys.argv[1] + "/items.csv", "w") as file:
    file.write("item_id,title\\n" + "".join(f"B{row:09},product {row}\\n" for row in range(9973)))
peak = [own()]
threading.Thread(target=watch, daemon=True).start()
peaks = []
for rows in map(int, sys.argv[2:]):
    write(rows)
    peak[0] = own()
    log = read_log(DataArguments(interactions=sys.argv[1] + "/events.csv", items=sys.argv[1] + "/items.csv"))
    split = hold_out(log.interactions, "shuffled", "fresh", 0)
    peaks.append(peak[0])
    held = log.interactions.memory_usage(deep=True).sum() / len(log.interactions)
print((peaks[1] - peaks[0]) / (int(sys.argv[3]) - int(sys.argv[2])), held)
"""


def bytes_a_row(folder, few, many):
    """What the peak of a process that reads and splits a log grows by with each row; and what the log itself takes."""
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is measured through /proc")
    command = [sys.executable, "-c", MEASURE, str(folder), str(few), str(many)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return map(float, done.stdout.split()[-2:])


def test_a_row_of_a_log_takes_as_much_memory_as_its_numbers(tmp_path):
    rows = [f"user-{row % 100},B{row % 99:09},{15 * 10**8 + row},view,{row % 5 + 1}\n" for row in range(5000)]
    (tmp_path / "events.csv").write_text("user_id,item_id,timestamp,event,rating\n" + "".join(rows))
    (tmp_path / "items.csv").write_text("item_id,title\n" + "".join(f"B{row:09},product {row}\n" for row in range(99)))
    found = read_log(DataArguments(interactions=str(tmp_path / "events.csv"), items=str(tmp_path / "items.csv")))
    assert found.interactions.memory_usage(deep=True).sum() / 5000 < 45


@pytest.mark.slow
def test_reading_a_large_file_takes_as_much_memory_as_its_numbers(tmp_path):
    peak, held = bytes_a_row(tmp_path, 100_000, 500_000)  # fewer measure the allocator
    assert held < 40
    assert peak < 200  # the log, its split, and what ordering the events takes


@pytest.mark.slow
def test_a_file_of_300_megabytes(tmp_path):
    peak, held = bytes_a_row(tmp_path, 200_000, 5_000_000)
    assert (tmp_path / "events.csv").stat().st_size > 250e6
    assert held < 40
    assert peak < 160


@pytest.mark.real_data
def test_movielens_is_complete():
    log = read_movielens(real_data("ml-100k"))
    events = log.interactions
    assert (events["user_id"].nunique(), events["item_id"].nunique(), len(events)) == (943, 1682, 100_000)
    assert (len(log.users), len(log.items)) == (943, 1682)
    assert events["rating"].value_counts().to_dict() == {4: 34_174, 3: 27_145, 5: 21_201, 2: 11_370, 1: 6_110}
    assert events["label"].sum() == 34_174 + 21_201
    assert log.item_fields("64") == {"title": "The Shawshank Redemption", "year": "1994", "genres": "Drama"}
    assert log.item_fields("1633") == {
        "title": "Á köldum klaka (Cold Fever)",
        "year": "1994",
        "genres": "Comedy, Drama",
    }
    assert not log.items["title"].str.contains(r", (?:The|A|An|La|Le|Les|L')$").any()
    assert log.items["year"][log.items["year"] != ""].astype(int).between(1922, 1998).all()
    assert set(log.users["gender"]) == {"male", "female"}
