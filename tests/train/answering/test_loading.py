"""Requests from files, a model with its catalogue, and a user of the log: nothing is misread or left out."""

import json

import pandas
import pyarrow.parquet
import pytest

from m6rec.catalogue_m6rec import Catalogue
from m6rec.train.answering.loading import (
    Failed,
    RequestReader,
    build_catalogue,
    parse_request,
    user_request,
)
from tests.train.world import ITEMS, write_tables

REQUESTS = [
    {"user": "一位女性", "history": [{"event": "watch", "item": "红色港湾"}, {"event": "skip", "item": "夜行列车"}]},
    {"history": [{"event": "watch", "item": {"item_id": "i3"}, "rating": 4, "timestamp": 1_600_000_000}]},
    {"user": "a man", "history": [], "candidates": ["Low Tide", "退潮", "Night Train"]},
    {"history": [{"event": "like", "item": {"title": "Old Harbour", "year": 1970}}] * 3},
    {"user": "nobody in particular"},
    {"history": [{"event": "search", "query": "glass"}], "candidates": ["Glass Towers", "Low Tide"]},
    {"user": "nobody in particular"},
]  # fmt: skip


def write_lines(path, requests):
    path.write_text("".join(json.dumps(request, ensure_ascii=False) + "\n" for request in requests), encoding="utf-8")
    return path


# --------------------------------------------------------------------------------------------------------- requests


def read_requests(path):
    return RequestReader(path).read(0, 1_000_000)


def test_lines_are_read_as_they_are(tmp_path):
    path = write_lines(tmp_path / "requests.jsonl", ["who the user is", *REQUESTS])
    text = path.read_text(encoding="utf-8")
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n", 1).replace("\n", "\n\n  \n").encode())
    assert read_requests(path) == ["who the user is", *REQUESTS]


def as_rows(requests):
    """Requests as a table can hold them: an item is a mapping everywhere, because it is one somewhere."""
    requests = json.loads(json.dumps(requests))
    for event in (event for request in requests for event in request.get("history", [])):
        if isinstance(event.get("item"), str):
            event["item"] = {"title": event["item"]}
    return requests


def test_rows_of_parquet_are_read_as_lines_are(tmp_path):
    """A table has a cell for every field of every row; what is null there was never said."""
    rows = as_rows(REQUESTS)
    pandas.DataFrame(rows).to_parquet(tmp_path / "requests.parquet")
    assert "None" in str(pandas.read_parquet(tmp_path / "requests.parquet")["history"][0])
    assert read_requests(tmp_path / "requests.parquet") == rows


def test_an_index_of_pandas_is_no_field(tmp_path):
    frame = pandas.DataFrame({"user": ["a", "b", "c", "d"], "facts": [["x"], [], None, []]})
    frame[frame["user"] != "b"].to_parquet(tmp_path / "some.parquet")
    assert "__index_level_0__" in pyarrow.parquet.read_schema(tmp_path / "some.parquet").names
    rows = read_requests(tmp_path / "some.parquet")
    assert rows == [{"user": "a", "facts": ["x"]}, {"user": "c"}, {"user": "d", "facts": []}]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_any_stretch_is_read_in_any_order(tmp_path, suffix):
    path, rows = tmp_path / f"many.{suffix}", [{"user": f"user {n}"} for n in range(3000)]
    if suffix == "parquet":
        pandas.DataFrame(rows).to_parquet(path, row_group_size=700)
    else:
        write_lines(path, rows)
    reader = RequestReader(path)
    for start, count in [(0, 2), (2, 3), (1100, 5), (2995, 10), (3, 1), (1023, 2), (4000, 3), (0, 3000)]:
        assert reader.read(start, count) == rows[start : start + count], (start, count)


def test_what_is_not_asked_for_is_not_decoded(tmp_path):
    (tmp_path / "many.jsonl").write_text('"fine"\n' * 3 + "{broken\n" + '"fine"\n')
    assert RequestReader(tmp_path / "many.jsonl").read(0, 3) == ["fine"] * 3
    assert RequestReader(tmp_path / "many.jsonl").read(4, 3) == ["fine"]


def test_a_bad_line_can_be_a_request_that_failed(tmp_path):
    (tmp_path / "some.jsonl").write_text('"a"\n\n{broken\n[3]\n"b"\n')
    found = RequestReader(tmp_path / "some.jsonl", strict=False).read(0, 9)
    assert [found[0], found[3]] == ["a", "b"] and all(isinstance(each, Failed) for each in found[1:3])
    assert "line 3 is no valid JSON" in found[1].message and "line 4 is [3]" in found[2].message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"user": "a"}\n{"user": \n', r"bad\.jsonl, line 2 is no valid JSON"),
        (b'"fine"\n\n\n{"user": "a"} {}\n', r"bad\.jsonl, line 4 is no valid JSON"),
        (b"a woman in her thirties\n", r"bad\.jsonl, line 1 is no valid JSON"),
        (b'"ok"\n[1, 2]\n', r"bad\.jsonl, line 2 is \[1, 2\]: expected a request"),
        (b"null\n", r"bad\.jsonl, line 1 is None: expected a request"),
        ('"一位女性"\n'.encode("gbk"), r"bad\.jsonl, line 1 is no valid JSON: .*utf-8"),
    ],
)
def test_bad_lines_are_named(tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_requests(tmp_path / "bad.jsonl")


def test_bad_files_are_named(tmp_path):
    for name in ("no.jsonl", "no.parquet"):
        with pytest.raises(FileNotFoundError, match=f"there is no file '.*{name}'"):
            read_requests(tmp_path / name)
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(FileNotFoundError, match=r"folder\.jsonl"):
        read_requests(tmp_path / "folder.jsonl")
    (tmp_path / "requests.csv").write_text("user\na\n")
    with pytest.raises(ValueError, match=r"requests\.csv is neither \.jsonl nor \.parquet"):
        read_requests(tmp_path / "requests.csv")
    (tmp_path / "bad.parquet").write_text("no table")
    with pytest.raises(ValueError, match=r"bad\.parquet is no valid Parquet"):
        read_requests(tmp_path / "bad.parquet")


def test_a_request_is_json_or_a_bare_text():
    assert parse_request(' {"user": "女", "history": []}') == {"user": "女", "history": []}
    assert parse_request('"a woman"') == "a woman"
    assert parse_request(" a woman in her thirties ") == "a woman in her thirties"
    assert parse_request("35") == "35"
    with pytest.raises(ValueError, match="the request is no valid JSON"):
        parse_request('{"user": ')


# ------------------------------------------------------------------------------------------------- log and catalogue


def test_catalogue_is_saved_beside_the_model(folder, recommend):
    catalogue = Catalogue.load(folder / "catalogue", recommend.model)
    assert list(catalogue) == [item["item_id"] for item in ITEMS]
    assert catalogue.fields("i14") == {"item_id": "i14", "title": "山的另一边", "year": "2004"}
    everything = recommend({"history": [{"item": {"item_id": "i0"}}]}, top_k=99)
    assert {row["item_id"] for row in everything} == {f"i{row}" for row in range(1, 15)}
    assert len(build_catalogue(folder, ITEMS).catalogue) == 15, "again, in its own place"


def test_a_user_of_the_log_has_all_events_in_order(folder, tables):
    log = pandas.read_csv(tables["interactions"])
    log = log[log["user_id"] == "u3"]
    request = user_request(str(folder), "u3", [])
    assert request["user"] == {"gender": "女", "age": "23"}
    assert "candidates" not in request
    told = [
        (event["item"]["item_id"], event["timestamp"], event["rating"], event["event"]) for event in request["history"]
    ]
    assert sorted(told) == sorted(zip(log["item_id"], log["timestamp"], log["rating"], log["event"]))
    assert [time for _, time, *_ in told] == sorted(log["timestamp"])
    assert request["history"][0]["item"] == next(item for item in ITEMS if item["item_id"] == told[0][0])
    assert "user" not in user_request(str(folder), "u11", []), "no table describes this one"


def test_the_log_may_have_moved(folder, tmp_path):
    moved = write_tables(tmp_path, interactions=[{"user_id": "new", "item_id": "i2", "timestamp": 10**9}])
    request = user_request(str(folder), "new", [f"data.interactions={moved['interactions']}"])
    assert [event["item"]["title"] for event in request["history"]] == ["Night Train"]


def test_an_unknown_user_and_a_missing_log_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match="user 'u99' is not in the log, which begins with the users 'u0', 'u1', 'u10'"):
        user_request(str(folder), "u99", [])
    with pytest.raises(FileNotFoundError, match=r"gone\.csv"):
        user_request(str(folder), "u3", [f"data.interactions={tmp_path / 'gone.csv'}"])
    with pytest.raises(FileNotFoundError, match=r"there is no recipe '.*nowhere'"):
        user_request(str(tmp_path / "nowhere"), "u3", [])
