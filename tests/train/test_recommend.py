"""Requests from files, answers into files, and a user of the log: nothing is misread, reordered or half written."""

import json

import datasets
import pandas
import pyarrow.parquet
import pytest

from m6rec.catalogue_m6rec import Catalogue
from m6rec.train.finetune import finetune
from m6rec.train.recipe import load_recipe
from m6rec.train.recommend import (
    build_catalogue,
    load_pipeline,
    parse_request,
    read_requests,
    user_request,
    write_answers,
)
from tests.train.world import TITLES, recipe_of, write_tables

ITEMS = [{"item_id": f"i{row}", "title": title, "year": str(1990 + row)} for row, title in enumerate(TITLES)]
REQUESTS = [
    {"user": "一位女性", "history": [{"event": "watch", "item": "红色港湾"}, {"event": "skip", "item": "夜行列车"}]},
    {"history": [{"event": "watch", "item": {"item_id": "i3"}, "rating": 4, "timestamp": 1_600_000_000}]},
    {"user": "a man", "history": [], "candidates": ["Low Tide", "退潮", "Night Train"]},
    {"history": [{"event": "like", "item": {"title": "Old Harbour", "year": 1970}}] * 3},
    {"user": "nobody in particular"},
    {"history": [{"event": "search", "query": "glass"}], "candidates": ["Glass Towers", "Low Tide"]},
    {"user": "nobody in particular"},
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tables, tmp_path_factory):
    """A model that has learnt retrieval, with its catalogue."""
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")
    path = tmp_path_factory.mktemp("trained") / "model"
    finetune(load_recipe(recipe_of(tables, path)))
    build_catalogue(path, ITEMS)
    patch.undo()
    return path


@pytest.fixture(scope="module")
def recommend(folder):
    return load_pipeline(str(folder))


def write_lines(path, requests):
    path.write_text("".join(json.dumps(request, ensure_ascii=False) + "\n" for request in requests), encoding="utf-8")
    return path


# --------------------------------------------------------------------------------------------------------- requests


def test_lines_are_read_as_they_are(tmp_path):
    path = write_lines(tmp_path / "requests.jsonl", ["who the user is", *REQUESTS])
    text = path.read_text(encoding="utf-8")
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n", 1).replace("\n", "\n\n  \n").encode())
    assert list(read_requests(path)) == ["who the user is", *REQUESTS]


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
    assert list(read_requests(tmp_path / "requests.parquet")) == rows


def test_an_index_of_pandas_is_no_field(tmp_path):
    frame = pandas.DataFrame({"user": ["a", "b", "c", "d"], "facts": [["x"], [], None, []]})
    frame[frame["user"] != "b"].to_parquet(tmp_path / "some.parquet")
    assert "__index_level_0__" in pyarrow.parquet.read_schema(tmp_path / "some.parquet").names
    rows = list(read_requests(tmp_path / "some.parquet"))
    assert rows == [{"user": "a", "facts": ["x"]}, {"user": "c"}, {"user": "d", "facts": []}]


def test_large_tables_and_files_are_read_one_by_one(tmp_path):
    pandas.DataFrame({"user": [f"user {n}" for n in range(100_000)]}).to_parquet(tmp_path / "many.parquet")
    rows = read_requests(tmp_path / "many.parquet")
    assert [next(rows), next(rows)] == [{"user": "user 0"}, {"user": "user 1"}]
    (tmp_path / "many.jsonl").write_text('"fine"\n' * 3 + "{broken\n")
    lines = read_requests(tmp_path / "many.jsonl")
    assert [next(lines) for _ in range(3)] == ["fine"] * 3


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
        list(read_requests(tmp_path / "bad.jsonl"))


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
        list(read_requests(tmp_path / "bad.parquet"))


def test_a_request_is_json_or_a_bare_text():
    assert parse_request(' {"user": "女", "history": []}') == {"user": "女", "history": []}
    assert parse_request('"a woman"') == "a woman"
    assert parse_request(" a woman in her thirties ") == "a woman in her thirties"
    assert parse_request("35") == "35"
    with pytest.raises(ValueError, match="the request is no valid JSON"):
        parse_request('{"user": ')


# ---------------------------------------------------------------------------------------------------------- answers


def rounded(answers):
    return [[{**row, "score": pytest.approx(row["score"], abs=1e-5)} for row in answer] for answer in answers]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
def test_answers_stand_in_the_order_of_the_requests(recommend, tmp_path, batch_size):
    alone = [recommend(request, task="retrieval") for request in REQUESTS]
    source = write_lines(tmp_path / "requests.jsonl", REQUESTS)
    output = tmp_path / "new" / "answers.jsonl"
    assert write_answers(recommend, read_requests(source), output, batch_size, task="retrieval") == len(REQUESTS)
    answers = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert answers == rounded(alone)
    assert [len(answer) for answer in answers] == [10, 10, 3, 10, 10, 2, 10]
    told = {tuple((row["item"], round(row["score"], 4)) for row in answer) for answer in alone}
    assert len(told) == 6, "two requests are the same, the others are not"


def test_parquet_and_lines_get_the_same_answers(recommend, tmp_path):
    rows = as_rows(REQUESTS)
    pandas.DataFrame(rows).to_parquet(tmp_path / "requests.parquet")
    texts, options = [], {"explain": True, "top_k": 3, "task": "retrieval"}
    for source in (tmp_path / "requests.parquet", write_lines(tmp_path / "requests.jsonl", rows)):
        write_answers(recommend, read_requests(source), tmp_path / "answers", 4, **options)
        texts.append((tmp_path / "answers").read_text(encoding="utf-8"))
    assert texts[0] == texts[1]
    assert "退潮" in texts[0] and "\\u" not in texts[0], "Chinese stays readable"


@pytest.mark.parametrize("before", [None, "earlier answers\n"])
def test_a_request_that_fails_leaves_no_file_and_no_part_of_one(recommend, tmp_path, before):
    requests = [*REQUESTS[:4], {"histroy": []}, *REQUESTS[4:]]
    source, output = write_lines(tmp_path / "requests.jsonl", requests), tmp_path / "out" / "answers.jsonl"
    if before:
        output.parent.mkdir()
        output.write_text(before)
    with pytest.raises(ValueError, match="among requests 5 to 6: request: unknown key 'histroy'"):
        write_answers(recommend, read_requests(source), output, 2, task="retrieval")
    found = {path.name: path.read_text() for path in output.parent.iterdir()}
    assert found == ({"answers.jsonl": before} if before else {})


def test_a_line_that_is_no_json_leaves_no_file(recommend, tmp_path):
    source = tmp_path / "requests.jsonl"
    source.write_text('"a"\n"b"\n"c"\nd\n')
    with pytest.raises(ValueError, match=r"among requests 3 to 4: .*requests\.jsonl, line 4 is no valid JSON"):
        write_answers(recommend, read_requests(source), tmp_path / "answers.jsonl", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["requests.jsonl"]


def test_answers_may_take_the_place_of_the_requests(recommend, tmp_path):
    path = write_lines(tmp_path / "file.jsonl", REQUESTS[:3])
    write_answers(recommend, read_requests(path), path, 2, task="retrieval", top_k=1)
    assert [len(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()] == [1, 1, 1]


def test_no_requests_are_an_empty_file(recommend, tmp_path):
    (tmp_path / "none.jsonl").write_text("\n")
    assert write_answers(recommend, read_requests(tmp_path / "none.jsonl"), tmp_path / "answers.jsonl", 2) == 0
    assert (tmp_path / "answers.jsonl").read_text() == ""


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
    moved = write_tables(tmp_path, interactions=[{"user_id": "new", "item_id": "i2", "timestamp": 5}])
    request = user_request(str(folder), "new", [f"data.interactions={moved['interactions']}"])
    assert [event["item"]["title"] for event in request["history"]] == ["Night Train"]


def test_an_unknown_user_and_a_missing_log_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match="user 'u99' is not in the log, which begins with the users 'u0', 'u1', 'u10'"):
        user_request(str(folder), "u99", [])
    with pytest.raises(FileNotFoundError, match=r"gone\.csv"):
        user_request(str(folder), "u3", [f"data.interactions={tmp_path / 'gone.csv'}"])
    with pytest.raises(FileNotFoundError, match=r"there is no recipe '.*nowhere'"):
        user_request(str(tmp_path / "nowhere"), "u3", [])
