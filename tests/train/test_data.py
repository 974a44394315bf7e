"""The log: tables joined and checked, and MovieLens-100K."""

import logging

import datasets
import numpy
import pandas
import pytest
from datasets import Dataset

from m6rec.train.data import DataArguments, Log, build_log, read_log, read_movielens
from tests.conftest import real_data


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


EVENTS = {"user_id": ["u1", "u2", "u1"], "item_id": ["b", "a", "a"], "timestamp": [30, 20, 10]}
ITEMS = {"item_id": ["a", "b", "c"], "title": ["靴子", "Coat", "Hat"], "brand": ["", None, "X"]}


def log_of(events=None, items=None, users=None, **arguments) -> Log:
    events, items = Dataset.from_dict(EVENTS | (events or {})), Dataset.from_dict(ITEMS | (items or {}))
    return build_log(events, items, users and Dataset.from_dict(users), DataArguments(**arguments))


def test_the_three_tables_by_hand():
    log = log_of({"event": ["buy", None, " click "]}, users={"user_id": ["u1"], "age": [30], "city": [None]})
    assert log.interactions.to_dict("list") == {
        "user_id": ["u1", "u2", "u1"],
        "item_id": ["b", "a", "a"],
        "timestamp": [30.0, 20.0, 10.0],
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


def repeated(**columns):
    return {name: numpy.repeat(values, 2).tolist() for name, values in (EVENTS | columns).items()}


def test_repeated_events_are_dropped_and_counted(caplog):
    with caplog.at_level(logging.WARNING):
        log = log_of(repeated(text=["x", "y", "z"]))
    assert log.interactions["text"].tolist() == ["x", "y", "z"]
    assert "dropped 3 rows" in caplog.text


def test_events_that_differ_in_kind_or_time_are_not_repeated():
    assert len(log_of(repeated() | {"event": ["view", "buy"] * 3}).interactions) == 6
    assert len(log_of(repeated() | {"timestamp": range(6)}).interactions) == 6


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
        ({"events": {"item_id": ["a", "b", None]}}, r"interactions: column 'item_id', row 3: expected an id, got ''"),
        ({"events": {"item_id": ["a", "x", "y"]}}, r"interactions: 2 rows name 2 items .* such as 'x', 'y'"),
        ({"events": {"timestamp": ["1", "2", "noon"]}}, r"interactions: column 'timestamp', row 3: .*'noon'"),
        (
            {"events": {"rating": [1.0, float("nan"), 5.0]}},
            r"column 'rating', row 2: expected a finite number, got nan",
        ),
        (
            {"events": {"rating": [1.0, 2.0, float("inf")]}},
            r"column 'rating', row 3: expected a finite number, got inf",
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
        ({"min_rating_liked": float("nan")}, "data.min_rating_liked is nan"),
        ({"source": "ml-100k", "items": "i.csv"}, "'ml-100k' has its own tables; remove data.items"),
        ({"directory": "d"}, "data.directory 'd' is read by data.source 'ml-100k' only"),
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
