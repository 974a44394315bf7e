"""Reading tables: the same rows from every format, and a named reason for every refusal."""

import bz2
import datetime
import gzip
import lzma
import os
import re
import tempfile
from decimal import Decimal
from pathlib import Path

import datasets
import pandas
import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from m6rec.train.data.tables import Table, find_folder, load_table, require_files
from m6rec.train.data.times import WAYS, check_form, read_times
from m6rec.values_m6rec import normalize_id, read_time
from tests.fast import examples


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write(frame: pandas.DataFrame, path: Path) -> str:
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    elif path.suffix == ".parquet":
        frame.to_parquet(path, index=False)
    elif path.suffix == ".jsonl":
        frame.to_json(path, orient="records", lines=True, force_ascii=False)
    else:
        Dataset.from_pandas(frame).save_to_disk(path)
    return str(path)


def table(values, kind=None, role="item_id", **columns) -> Table:
    """A table of one column, of a given Arrow type."""
    return Table("things", Dataset(pyarrow.table({role: pyarrow.array(values, kind)})), columns)


ENDINGS = [".csv", ".parquet", ".jsonl", ""]
# Without the characters that end a line, which a CSV file may not keep.
words = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=8)
traps = st.sampled_from(
    ["007", "7", "1.0", "NA", "nan", "null", "None", "1e5", "用户", "用户购买了一件衬衫", '"', "a,b", " x"]
)


@settings(max_examples=examples(15), deadline=None)
@given(st.lists(st.tuples(traps | words, traps | words), min_size=1, max_size=6), st.sampled_from(ENDINGS))
def test_texts_survive_every_format(rows, ending):
    frame = pandas.DataFrame(rows, columns=["标题", "b"])
    with tempfile.TemporaryDirectory() as folder:
        read = Table("t", load_table(write(frame, Path(folder) / f"table{ending}")), {})
        assert read.text("标题").tolist() == frame["标题"].tolist()
        assert read.text("b").tolist() == frame["b"].tolist()


@pytest.mark.parametrize("ending", ENDINGS[1:])
def test_missing_texts_are_empty_in_every_format(tmp_path, ending):
    read = Table("t", load_table(write(pandas.DataFrame({"a": ["x", None]}), tmp_path / f"t{ending}")), {})
    assert read.text("a").tolist() == ["x", ""]


def test_csv_keeps_cells_as_they_are_and_short_rows_end_in_nothing(tmp_path):
    (tmp_path / "t.csv").write_bytes("\ufeff用户,b,c\r\n007,NA,1995\r\n8,\r\n".encode())  # as Excel writes it
    read = Table("t", load_table(str(tmp_path / "t.csv")), {})
    assert [read.text(name).tolist() for name in ("用户", "b", "c")] == [["007", "8"], ["NA", ""], ["1995", ""]]


def test_a_changed_file_is_read_again(tmp_path):
    path = write(pandas.DataFrame({"a": ["old"]}), tmp_path / "t.csv")
    assert load_table(path)["a"][:] == ["old"]
    write(pandas.DataFrame({"a": ["new"]}), tmp_path / "t.csv")
    os.utime(path, (2e9, 2e9))
    assert load_table(path)["a"][:] == ["new"]


def test_a_path_with_pattern_characters_is_a_path(tmp_path):
    folder = tmp_path / "[1] a*"
    folder.mkdir()
    assert load_table(write(pandas.DataFrame({"a": ["x"]}), folder / "t?.CSV".lower()))["a"][:] == ["x"]


def test_splits_of_a_saved_folder(tmp_path):
    parts = {name: Dataset.from_dict({"a": [name]}) for name in ("train", "later")}
    DatasetDict(parts).save_to_disk(tmp_path / "two")
    assert load_table(f"{tmp_path}/two:later")["a"][:] == ["later"]
    with pytest.raises(ValueError, match=r"no split is named.*train, later"):
        load_table(f"{tmp_path}/two")
    with pytest.raises(ValueError, match=r"no split 'dev'.*train, later"):
        load_table(f"{tmp_path}/two:dev")
    DatasetDict({"only": parts["later"]}).save_to_disk(tmp_path / "one")
    assert load_table(f"{tmp_path}/one")["a"][:] == ["later"]


def test_a_hub_dataset_is_asked_for_by_its_name_config_and_split(monkeypatch):
    asked = []

    def load(*names):
        asked.append(names)
        return DatasetDict({"full": Dataset.from_dict({"a": [1]}), "other": Dataset.from_dict({"a": [2]})})

    monkeypatch.setattr("m6rec.train.data.tables.load_dataset", load)
    assert load_table("org/films.v1:full")["a"][:] == [1]
    assert load_table("org/films.v1:5-core:other")["a"][:] == [2]
    assert asked == [("org/films.v1",), ("org/films.v1", "5-core")]


@pytest.mark.parametrize(
    "location", ["absent.csv", "data/absent.parquet", "data/absent/deep", "absent", "org/absent-films"]
)
def test_a_table_that_is_nowhere(monkeypatch, tmp_path, location):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=location):
        load_table(location)


def test_a_folder_that_datasets_did_not_save(tmp_path):
    with pytest.raises(FileNotFoundError, match=tmp_path.name):
        load_table(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.xlsx", b"x", r"t\.xlsx: unknown suffix '\.xlsx'.*\.csv, \.tsv, \.parquet"),
        ("t.csv", b"", r"t\.csv.*no rows"),
        ("t.csv", b"user_id,item_id\n\n", r"t\.csv.*no rows"),
        ("t.csv", b"a,b\n1,2,3\n", r"more cells than its header \(a, b\)"),
        ("t.csv", b"a,b\n1,2\n4,5,6\n", r"Expected 2 fields in line 3, saw 3"),
        ("t.csv", "用户,b\n1,商品\n".encode("gbk"), "UTF-8.*can't decode byte 0xd3"),
        ("t.jsonl", b"\n", r"t\.jsonl.*no rows"),
        ("t.jsonl", b'{"a": 1}\n{"a": ', r"t\.jsonl cannot be read as json"),
        ("t.parquet", b"not parquet", r"t\.parquet cannot be read as parquet"),
    ],
)
def test_files_that_are_no_tables(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_table(str(tmp_path / name))


def test_an_empty_parquet_file_and_an_empty_dataset(tmp_path):
    with pytest.raises(ValueError, match="no rows"):
        load_table(write(pandas.DataFrame({"a": []}), tmp_path / "t.parquet"))
    with pytest.raises(ValueError, match="things: the table is empty"):
        table([], pyarrow.string())


@pytest.mark.parametrize(
    ("values", "kind", "texts"),
    [
        ([7, None], None, ["7", ""]),
        ([2**62 + 1, None], None, [str(2**62 + 1), ""]),
        ([1995.0, None, 1.5], None, ["1995", "", "1.5"]),
        ([float("nan"), 2.0**60], None, ["", "1.152921504606847e+18"]),
        ([True, None], None, ["true", ""]),
        ([["动作", "喜剧"], None, [], ["a", None]], None, ["动作, 喜剧", "", "", "a"]),
        ([datetime.date(1995, 1, 31)], None, ["1995-01-31"]),
        ([datetime.datetime(1995, 1, 31)], pyarrow.timestamp("s"), ["1995-01-31"]),
        ([datetime.datetime(1995, 1, 31, 20, 15)], None, ["1995-01-31 20:15:00"]),
        (["a", None, ""], pyarrow.large_string(), ["a", "", ""]),
    ],
)
def test_text_of_every_type(values, kind, texts):
    assert table(values, kind).text("item_id").tolist() == texts


def test_a_date_that_the_json_reader_takes_for_a_time_stays_a_date(tmp_path):
    path = write(pandas.DataFrame({"released": ["1995-01-31", "2001-12-01"]}), tmp_path / "t.jsonl")
    assert Table("t", load_table(path), {}).text("released").tolist() == ["1995-01-31", "2001-12-01"]


@pytest.mark.parametrize("value", [{"a": 1}, b"a", [b"a"]])
def test_what_is_no_text(value):
    with pytest.raises(ValueError, match=r"things: column 'item_id' cannot be read as text.*(dict|bytes)"):
        table([value]).text("item_id")


def test_mixed_types_are_refused_rather_than_guessed(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"user_id": 7}\n{"user_id": "007"}')
    with pytest.raises(ValueError, match="column 'user_id' mixes types"):
        Table("t", load_table(str(tmp_path / "t.jsonl")), {}).ids("user_id")


def test_ids_keep_their_digits():
    assert table([7.0, 8.0]).ids("item_id").tolist() == ["7", "8"]
    assert table([2**63 - 1]).ids("item_id").tolist() == ["9223372036854775807"]
    assert table([-1, 2**64 - 1], pyarrow.decimal128(20)).ids("item_id").tolist() == ["-1", "18446744073709551615"]
    assert table(["007", " 7", "7.0"]).ids("item_id").tolist() == ["007", "7", "7.0"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["a", None, None], r"things: column 'item_id', row 2: expected an id, got None \(2 of 3 rows"),
        (["a", " "], r"row 2: expected an id, got ' '"),
        ([1.0, float("nan")], r"row 2: expected an id, got nan"),
        ([-1.0, float("-inf")], r"row 2: expected a whole number .*got -inf"),
        ([1.0, 1.5], r"row 2: expected a whole number below 2\*\*53.*got 1\.5"),
        ([2.0**53], r"row 1: expected a whole number below 2\*\*53.*got 9007199254740992\.0"),
    ],
)
def test_what_is_no_id(values, message):
    with pytest.raises(ValueError, match=message):
        table(values).ids("item_id")


numbers = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.integers(-3000, 10**5),
    st.integers(int(1.9e11), int(2.1e11)),
    st.sampled_from([scale * 10**power for power in range(8, 19) for scale in (1, 1.5777)]),
    st.floats(),
)
moments = st.datetimes(datetime.datetime(1, 1, 2), datetime.datetime(9999, 12, 30))
digits = st.from_regex(r"[-+]?[0-9]{1,20}(\.[0-9]{0,10})?(e[0-9]{1,2})?", fullmatch=True)
isos = st.one_of(
    st.from_regex(r"20[0-9]{2}[-/.]?[01]?[0-9][-/.]?[0-3]?[0-9]([ T][0-2]?[0-9](:[0-5][0-9]){0,2})?", fullmatch=True),
    st.from_regex(r"20[0-9]{2}-0[1-9]-[0-3][0-9][ T]([0-2][0-6]:?){3}(\.[0-9]{1,9})?(Z|[-+]1[0-9]:?30)?"),
    moments.map(str),
    moments.map(datetime.datetime.isoformat),
)  # fmt: skip
texts = st.one_of(words, traps, digits, isos, isos.map(lambda text: f" {text}\t"))


def scalar(rule, value):
    """What a rule for one value says; None where it refuses."""
    try:
        return rule(value, "x")
    except (ValueError, TypeError):
        return None


COLUMNS = [
    (texts, pyarrow.string()),
    (texts, pyarrow.dictionary(pyarrow.int32(), pyarrow.string())),
    (numbers.map(float), pyarrow.float64()),
    (st.floats(width=32), pyarrow.float32()),
    (st.integers(-(2**63), 2**63 - 1) | st.integers(0, 10**10), pyarrow.int64()),
    (st.integers(0, 2**64 - 1), pyarrow.uint64()),
    (st.decimals(-(10**17), 10**17, places=2), pyarrow.decimal128(38, 2)),
    (st.booleans(), pyarrow.bool_()),
    (moments, pyarrow.timestamp("us")),
    (moments, pyarrow.timestamp("ms", "Asia/Shanghai")),
    (st.dates(), pyarrow.date32()),
    (st.times(), pyarrow.time64("us")),
]


@settings(max_examples=examples(25), deadline=None)
@given(st.data())
@pytest.mark.parametrize(("values", "kind"), COLUMNS, ids=[str(kind) for _, kind in COLUMNS])
def test_a_column_is_read_by_the_rule_for_one_value(values, kind, data):
    drawn = data.draw(st.lists(st.none() | values, min_size=1, max_size=20))
    cells = pyarrow.array(drawn, kind)
    read = [None if value is None else value for value in cells.to_pylist()]
    assert ids_of(cells) == [scalar(normalize_id, value) for value in read]
    seconds, ways = read_times(
        pyarrow.chunked_array([cells]), lambda piece: pandas.Series(piece.to_pylist(), dtype="str").fillna("")
    )
    expected = [scalar(read_time, value) for value in read]
    assert [None if way < 0 else (second, WAYS[way]) for second, way in zip(seconds.tolist(), ways)] == expected


def test_a_decimal_is_read_to_the_last_bit():
    cells = pyarrow.chunked_array([pyarrow.array([Decimal("36584600500968.73")])])
    assert read_times(cells, str)[0].tolist() == [read_time(Decimal("36584600500968.73"), "x")[0]]


def ids_of(cells):
    things = Table("things", Dataset(pyarrow.table({"item_id": cells})), {}, drop=True)
    ids = things.ids("item_id")
    return [None if pandas.isna(known) else known for known in ids]


def test_columns_are_found_by_role_or_by_the_name_given():
    films = table(["a", "b"], role="movieId", item_id="movieId", event="verb")
    assert films.unique_ids("item_id").tolist() == ["a", "b"]
    assert [films.has(role) for role in ("item_id", "rating", "event")] == [True, False, True]
    with pytest.raises(ValueError, match="things: no column 'verb'; the columns are movieId"):
        films.text(films.column("event"))
    with pytest.raises(ValueError, match="no column 'user_id'; the columns are movieId"):
        films.ids("user_id")
    with pytest.raises(ValueError, match=r"row 3: expected an id that no earlier row has, got 'x' .* stands in row 1;"):
        table(["x", "y", "x"]).unique_ids("item_id")
    with pytest.raises(ValueError, match=r"row 2: .* got '00001 ' .*: '00001' stands in row 1; white space around"):
        table(["00001", "00001 "]).unique_ids("item_id")
    assert films.has("user_id") is Table("t", films.rows, {"movieId": None}).has("movieId") is False


@pytest.mark.parametrize("values", [["3", " 4.5 ", "1e1"], [3.0, 4.5, 10.0]])
def test_numbers(values):
    assert table(values).numbers("item_id").tolist() == [3.0, 4.5, 10.0]


@pytest.mark.parametrize(
    ("values", "got"),
    [
        (["3", "good"], "'good'"),
        (["3", "nan"], "'nan'"),
        (["1", "inf"], "'inf'"),
        ([3.0, float("nan")], "nan"),
    ],
)
def test_what_is_no_number(values, got):
    with pytest.raises(ValueError, match=f"column 'item_id', row 2: expected a finite number or nothing, got {got}"):
        table(values).numbers("item_id")


@pytest.mark.parametrize("values", [["3", " ", ""], [3, None, None], [3.0, None, None]])
def test_an_empty_cell_is_an_unknown_number_but_not_all_can_be(values):
    assert table(values).numbers("item_id").fillna(-1).tolist() == [3.0, -1, -1]
    with pytest.raises(ValueError, match="column 'item_id' is empty in all 2 rows"):
        table(values[1:], pyarrow.array(values).type).numbers("item_id")


NEW_YEAR, TIME = 1577836800.0, "1577836800"  # 2020-01-01 00:00 UTC


@pytest.mark.parametrize(
    ("values", "kind", "seconds"),
    [
        ([1577836800, 1577836802.5], None, [NEW_YEAR, NEW_YEAR + 2.5]),
        ([-NEW_YEAR, 10**9], None, [-NEW_YEAR, 1e9]),
        ([1577836800123], None, [NEW_YEAR + 0.123]),
        ([1577836800000000], None, [NEW_YEAR]),
        ([1577836800000000000], None, [NEW_YEAR]),
        (["1577836800", "1577836801.5"], None, [NEW_YEAR, NEW_YEAR + 1.5]),
        (["1577836800000"], None, [NEW_YEAR]),
        (
            ["2020-01-01", "2020-01-01 00:00:01", "2020-01-01T08:00:02.5+08:00"],
            None,
            [NEW_YEAR + s for s in (0, 1, 2.5)],
        ),
        (["5138-01-01", "0001-01-01"], None, [99972403200.0, -62135596800.0]),
        ([datetime.date(2020, 1, 1)], None, [NEW_YEAR]),
        ([datetime.datetime(2020, 1, 1, 0, 0, 3)], None, [NEW_YEAR + 3]),
    ],
)
def test_times_in_seconds(values, kind, seconds):
    assert table(values, kind).seconds("item_id").tolist() == pytest.approx(seconds, abs=1e-3)


@pytest.mark.parametrize(
    ("values", "row", "hint"),
    [
        ([2019, 2020], 1, "'%Y' reads it as the year 2019"),
        ([20231114, 20231115], 1, "'%Y%m%d' reads it as 2023-11-14 00:00:00"),
        (["202311141530"], 1, "'%Y%m%d%H%M' reads it as 2023-11-14 15:30:00"),
        ([20231114153005.0], 1, "'%Y%m%d%H%M%S' reads it as 2023-11-14 15:30:05"),
        ([45244.5, 45245.0], 1, "excel reads it as 2023-11-14 12:00, the days of a spreadsheet"),
        ([0, 1, 2], 1, "order takes numbers that only say what came first"),
        (["14/11/2023"], 1, "names another form, such as '%d.%m.%Y'"),
        ([TIME, TIME, "1577836800000"], 3, "this one is in milliseconds, most rows are in seconds: write all alike"),
        ([10**12] * 3 + [10**9] * 2, 4, "this one is in seconds, most rows are in milliseconds"),
        (["2020-01-01", "2020-01-02", TIME], 3, "this one is in seconds, most rows are in words"),
        ([True, True], 1, "data.time_format"),
        ([NEW_YEAR, NEW_YEAR, 0.0], 3, "too small or too large"),
    ],
)
def test_what_can_be_done_about_a_column_that_holds_no_times(values, row, hint):
    with pytest.raises(ValueError, match=rf"column 'timestamp', row {row}: .*{re.escape(hint)}"):
        table(values, role="timestamp").seconds("timestamp")


@pytest.mark.parametrize(
    ("form", "values", "seconds"),
    [
        ("%Y", [2020, 2020], [NEW_YEAR, NEW_YEAR]),
        ("%Y%m%d", [20200101.0, 20200102.0], [NEW_YEAR, NEW_YEAR + 86400]),
        ("%d.%m.%Y %H:%M", ["01.01.2020 00:00", " 01.01.2020 00:01 "], [NEW_YEAR, NEW_YEAR + 60]),
        ("%Y-%m-%dT%H:%M%z", ["2020-01-01T08:00+0800"], [NEW_YEAR]),
        ("excel", [43831, 43831.5], [NEW_YEAR, NEW_YEAR + 43200]),
        ("seconds", ["0", "60"], [0, 60]),
        ("milliseconds", [0.0, 60000.0], [0, 60]),
        ("nanoseconds", [10**9], [1]),
    ],
)
def test_other_forms_of_times_are_named(form, values, seconds):
    check_form(form)
    assert table(values, role="timestamp").seconds("timestamp", form).tolist() == seconds


@pytest.mark.parametrize(
    ("form", "values", "row"),
    [("%Y%m%d", [20200101, 20201301], 2), ("excel", ["43831", "x"], 2), ("seconds", [1, 1e12], 2), ("%d", [""], 1)],
)
def test_what_is_not_of_the_form_that_is_named(form, values, row):
    with pytest.raises(ValueError, match=f"row {row}: expected a time of the form '{form}', got"):
        table(values, role="timestamp").seconds("timestamp", form)


@pytest.mark.parametrize("form", ["", "iso", "Excel", "%", "%Q", "dd.mm.yyyy", "order "])
def test_a_form_that_is_none(form):
    with pytest.raises(
        ValueError, match=r"data.time_format is .*; expected one of seconds, .*, excel, order, or a form"
    ):
        check_form(form)


def test_an_order_is_a_number():
    assert table(["10", "2"]).order("item_id").tolist() == [10, 2]
    with pytest.raises(ValueError, match="row 2: expected a number that says the order of a user's events, got 'x'"):
        table(["10", "x"]).order("item_id")


def test_a_time_zone_is_for_showing_only():
    moments = pyarrow.array([1577836800_500_000_001]).cast(pyarrow.timestamp("ns", "Asia/Shanghai"))
    assert table(moments).seconds("item_id").tolist() == [NEW_YEAR + 0.5]


@pytest.mark.parametrize(
    ("values", "row", "got"),
    [
        ([TIME, TIME, "yesterday"], 3, "'yesterday'"),
        (["2020-01-01", "2020-13-01"], 2, "'2020-13-01'"),
        (["2020-01-01", "9999-12-31"], 2, "'9999-12-31'"),
        ([datetime.date(2020, 1, 1), datetime.date(9999, 12, 31)], 2, r"datetime.date\(9999, 12, 31\)"),
        (["2020-01-01", "2020-01-02", "1577836800"], 3, "'1577836800'"),
        ([TIME, TIME, "2020-01-01"], 3, "'2020-01-01'"),
        ([TIME, ""], 2, "''"),
        ([TIME, "inf"], 2, "'inf'"),
        ([NEW_YEAR, float("inf")], 2, "inf"),
        ([int(NEW_YEAR), None], 2, "None"),
        ([datetime.datetime(2020, 1, 1), None], 2, "None"),
    ],
)
def test_what_is_no_time(values, row, got):
    with pytest.raises(ValueError, match=f"things: column 'item_id', row {row}: expected a time .* got {got}"):
        table(values).seconds("item_id")


@pytest.mark.parametrize("separator", [";", "\t", ","])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_cells_are_separated_by_what_stands_most_often_in_the_first_line(tmp_path, separator, mark):
    lines = [separator.join(line) for line in (["user", "时间", "a.b"], ["u;1", "3,5", "x"], ["u2", "", "y"])]
    lines[1] = separator.join(['"u;1"', '"3,5"', "x"])
    path = tmp_path / ("t.tsv" if separator == "\t" else "t.csv")
    path.write_text(mark + "\n".join(lines), encoding="utf-8")
    rows = load_table(str(path))
    assert {name: rows[name][:] for name in rows.column_names} == {
        "user": ["u;1", "u2"],
        "时间": ["3,5", ""],
        "a.b": ["x", "y"],
    }


def test_fields_within_fields_are_columns_of_their_own(tmp_path):
    (tmp_path / "t.jsonl").write_text(
        '{"item_id": "a", "brand": {"name": "K", "at": {"city": "上海"}}, "tags": ["x", "y"]}\n{"item_id": "b"}\n',
        encoding="utf-8",
    )
    read = Table("t", load_table(str(tmp_path / "t.jsonl")), {})
    assert read.text("brand.name").tolist() == ["K", ""]
    assert read.text("brand.at.city").tolist() == ["上海", ""]
    assert read.text("tags").tolist() == ["x, y", ""]
    (tmp_path / "l.jsonl").write_text('{"item_id": "a", "parts": [{"name": "K"}]}\n')
    with pytest.raises(ValueError, match=r"column 'parts' cannot be read as text: a value is of type dict"):
        Table("t", load_table(str(tmp_path / "l.jsonl")), {}).text("parts")


def test_parquet_lists_of_texts_and_of_numbers(tmp_path):
    columns = {"item_id": [1, 2], "tags": [["a", "b"], None], "codes": [[7.0, 8.0], []]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    read = Table("t", load_table(str(tmp_path / "t.parquet")), {})
    assert read.text("tags").tolist() == ["a, b", ""]
    assert read.text("codes").tolist() == ["7, 8", ""]
    assert read.words("tags").tolist() == ["a, b", ""]


@pytest.mark.parametrize("text", [str(2**64), "99999999999999999999"])
def test_whole_numbers_beyond_all_types_stay_what_they_are_where_they_are_text(tmp_path, text):
    (tmp_path / "t.csv").write_text(f"item_id,b\n{text},x\n")
    assert Table("t", load_table(str(tmp_path / "t.csv")), {}).ids("item_id").tolist() == [text]
    (tmp_path / "t.jsonl").write_text(f'{{"item_id": {text}}}\n')
    with pytest.raises(ValueError, match=r"whole number below 2\*\*53|cannot be read as json|mixes types"):
        Table("t", load_table(str(tmp_path / "t.jsonl")), {}).ids("item_id")


@given(st.lists(st.sampled_from(["buy", " buy", "看", "", None, "buy "]), min_size=1, max_size=30))
def test_words_are_the_texts_in_categories(values):
    things = table(values, pyarrow.string())
    assert things.words("item_id").tolist() == things.text("item_id").tolist()
    stripped = things.words("item_id", strip=True)
    assert stripped.tolist() == [(value or "").strip() for value in values]
    assert stripped.cat.categories.tolist() == sorted(set(stripped))
    assert stripped.cat.codes.dtype == "int8"


def test_pieces_and_the_whole_agree(monkeypatch):
    values = ["2020-01-01", "2020-01-02", "2020-01-03T00:00:00+01:00", "1e3", "2020-01-05"]
    whole = [table(values).text("item_id"), table(values[:3]).seconds("item_id")]
    monkeypatch.setattr("m6rec.train.data.tables._ROWS_AT_ONCE", 2)
    assert table(values).text("item_id").equals(whole[0])
    assert table(values[:3]).seconds("item_id").equals(whole[1])
    assert table(["1", "", "3"]).numbers("item_id").fillna(-1).tolist() == [1, -1, 3]
    with pytest.raises(ValueError, match=r"row 4: expected a time .* got '1e3' \(1 of 5"):
        table(values).seconds("item_id")


def test_bad_rows_are_dropped_and_counted_once():
    columns = {
        "user_id": ["a", "", "c", "d"],
        "rating": ["1", "x", "good", "4"],
        "timestamp": [TIME, TIME, TIME, "inf"],
    }
    things = Table("things", Dataset.from_dict(columns), {}, drop=True)
    taken = pandas.DataFrame({"u": things.ids("user_id"), "r": things.numbers("rating")})
    taken["t"] = things.seconds("timestamp")
    assert things.kept(taken).to_numpy().tolist() == [["a", 1.0, NEW_YEAR]]
    assert list(things.dropped.values()) == [1, 1, 1]
    assert [reason.split(":")[1] for reason in things.dropped] == [
        " column 'user_id'",
        " column 'rating'",
        " column 'timestamp'",
    ]
    nothing = Table("things", Dataset.from_dict({"user_id": [" "]}), {}, drop=True)
    ids = nothing.ids("user_id").to_frame()
    with pytest.raises(ValueError, match="no row is left, all were dropped: 1 things: column 'user_id': not an id"):
        nothing.kept(ids)


def test_a_bad_time_does_not_change_how_others_are_read():
    times = Table("t", Dataset.from_dict({"timestamp": ["1577836800000", "inf", "x"]}), {}, drop=True)
    assert times.seconds("timestamp").tolist()[0] == NEW_YEAR


def test_the_folder_of_a_data_set(monkeypatch, tmp_path):
    monkeypatch.delenv("M6REC_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"lastfm is not here: M6REC_DATA is not set\. Get the archive, and"):
        find_folder("lastfm", "the archive")
    monkeypatch.setenv("M6REC_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"no folder 'lastfm' in M6REC_DATA .{tmp_path}"):
        find_folder("lastfm", "the archive")
    (tmp_path / "lastfm").mkdir()
    assert find_folder("lastfm", "") == tmp_path / "lastfm"
    (tmp_path / "a").touch()
    require_files(tmp_path, ["a"], "it")
    with pytest.raises(FileNotFoundError, match="no b, c; expected the folder of it"):
        require_files(tmp_path, ["a", "b", "c"], "it")


JSON_TABLES = ["null", "null\nnull", '{"a":' + "[" * 10**5 + "]" * 10**5 + "}", "[null]", "1", '"a"', "[[1]]", "[1, 2]"]
JSON_TABLES += ["true", "[]", "{} null", "nul", '{"a": 1}\nnull', '[{"a": 1}, null]', '{"a": 1']
JSON_TABLES += ['{"a": [' * 60 + "]}" * 60]


@pytest.mark.parametrize("content", JSON_TABLES, ids=lambda content: content[:20])
@pytest.mark.parametrize("name", ["t.jsonl", "t.json"])
def test_json_that_is_no_rows_is_refused_before_arrow_reads_it(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name} cannot be read as json"):
        load_table(str(tmp_path / name))


@pytest.mark.parametrize(
    "content", ['{"a": 1}\n\n{"a": 2}\n', '\ufeff[{"a": 1},\n {"a": 2}]', '{"a":\n 1}\n{"a": 2}', '{"a": 1} {"a": 2}']
)
def test_rows_of_json_in_every_form(tmp_path, content):
    (tmp_path / "t.json").write_text(content, encoding="utf-8")
    assert load_table(str(tmp_path / "t.json"))["a"][:] == [1, 2]


@pytest.mark.parametrize("place", [0, 3, 4, 40, 200, -9, -4, -1])
def test_damaged_parquet_is_refused_by_name_or_read(tmp_path, place):
    data = bytearray(Path(write(pandas.DataFrame({"a": ["x", "y"] * 50}), tmp_path / "t.parquet")).read_bytes())
    data[place] ^= 0xFF
    for content in (data, data[:place]):
        (tmp_path / "t.parquet").write_bytes(content)
        os.utime(tmp_path / "t.parquet", (1e9 + place, 1e9 + len(content)))
        try:
            assert len(load_table(str(tmp_path / "t.parquet"))) == 100
        except ValueError as error:
            assert re.search(r"t\.parquet cannot be read as parquet", str(error))


@pytest.mark.parametrize("pattern", ["", "/part-*.parquet", "/**/*.parquet"])
def test_parts_in_a_folder_and_by_a_pattern(tmp_path, pattern):
    folder = tmp_path / "log"
    (folder / "more").mkdir(parents=True)
    for number in (1, 0):
        write(pandas.DataFrame({"a": [number]}), folder / f"part-{number}.parquet")
    (folder / "_SUCCESS").touch()
    (folder / ".part-0.parquet.crc").write_bytes(b"x")
    assert load_table(f"{folder}{pattern}")["a"][:] == [0, 1]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.csv", "b.parquet"], "are of two kinds: name those of one"),
        (["a.csv", "b.txt"], r"b\.txt: unknown suffix '\.txt'"),
        (["day=1/a.parquet"], "the name of its folder holds a column"),
        (["_a.csv"], "no file of a table lies there"),
    ],
)
def test_a_folder_that_is_no_table(tmp_path, names, message):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a\n1\n")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_table(str(tmp_path))


def test_parts_have_one_header(tmp_path):
    (tmp_path / "a.csv").write_text("x,y\n1,2\n")
    (tmp_path / "b.csv").write_text("y,x\n1,2\n")
    with pytest.raises(ValueError, match=r"b\.csv has another header or separator than .*a\.csv"):
        load_table(f"{tmp_path}/*.csv")
    with pytest.raises(FileNotFoundError, match="no file of a table lies there"):
        load_table(f"{tmp_path}/*.tsv")


@pytest.mark.parametrize(("ending", "module"), [(".gz", gzip), (".bz2", bz2), (".xz", lzma)])
@pytest.mark.parametrize(("name", "text"), [("t.csv", "a\n{}\n"), ("t.jsonl", '{{"a": "{}"}}\n')])
def test_packed_texts_are_read_and_read_again_when_they_change(tmp_path, ending, module, name, text):
    path = tmp_path / f"{name}{ending}"
    for value in ("one", "two"):
        path.write_bytes(module.compress(text.format(value).encode()))
        os.utime(path, (1e9, 1e9 + len(value) * (value == "two")))
        assert load_table(str(path))["a"][:] == [value]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=re.escape(f"{path.name} cannot be read as")):
        load_table(str(path))


def test_packed_parquet_is_no_format(tmp_path):
    (tmp_path / "t.parquet.gz").touch()
    with pytest.raises(
        ValueError, match=r"unknown suffix '\.gz'; expected one of .*\.parquet.* of texts also with \.gz"
    ):
        load_table(str(tmp_path / "t.parquet.gz"))


def test_home_and_colons_in_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(pandas.DataFrame({"a": ["x"]}), tmp_path / "t.csv")
    assert load_table("~/t.csv")["a"][:] == ["x"]
    parts = {name: Dataset.from_dict({"a": [name]}) for name in ("train", "later")}
    DatasetDict(parts).save_to_disk(tmp_path / "at 12:30" / "x:y")
    assert load_table("~/at 12:30/x:y:later")["a"][:] == ["later"]
    parts["train"].save_to_disk(tmp_path / "one:two")
    assert load_table(f"{tmp_path}/one:two")["a"][:] == ["train"]


@pytest.mark.parametrize(
    ("frame", "described"),
    [
        (pandas.DataFrame({"Unnamed: 0": [5, 7], "title": ["a", "b"]}), ["title"]),
        (pandas.DataFrame({"Unnamed: 0.1": [0, 1], "": ["", ""], "title": ["a", "b"]}), ["title"]),
        (pandas.DataFrame({"title": ["a", "b"]}, index=[3, 4]), ["title"]),
        (pandas.DataFrame({"index": ["0", "1"], "title": ["a", "b"]}), ["title"]),
        (pandas.DataFrame({"index": ["S&P", "DAX"], "level_0": [1, 3]}), ["index", "level_0"]),
    ],
)
def test_the_row_numbers_of_pandas_are_no_text(frame, described, caplog):
    things = Table("items", Dataset.from_pandas(frame), {})
    assert things.described() == described
    assert ("numbers the rows" in caplog.text) is (len(described) == 1)
