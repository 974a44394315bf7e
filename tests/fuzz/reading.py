"""Doors that files come through: tables, recipes, folders of a catalogue."""

import dataclasses
import functools
import hashlib
import io
import json
import math
import tempfile
from pathlib import Path

import numpy
import pandas
import pyarrow
import pyarrow.parquet
import torch
import yaml
from hypothesis import strategies as st
from safetensors.torch import save

from m6rec import Catalogue
from m6rec.train.commands.prepare import report
from m6rec.train.config.recipe import RECIPES as FOLDER
from m6rec.train.config.recipe import load_recipe
from m6rec.train.data.log import DataArguments, read_log
from tests.fuzz.answering import recommender, rule
from tests.fuzz.draws import ITEM_FIELDS, ODD_IDS, TEXTS, junk, mixed, odd, places, put
from tests.fuzz.harness import Door

# ---------------------------------------------------------------------------------------------------------- tables

CELLS = [
    "",
    " ",
    "A",
    "A ",
    " A",
    "7",
    "7.0",
    "007",
    "NA",
    "null",
    "nan",
    "i1",
    "İ",
    "字",
    '"',
    "a,b",
    "x\ny",
    "\x00",
    "1e5",
    "'",
]
TIMES = [
    "1600000000", "1600000000000", "1600000000000000", "1.6e9", "2024-01-02", "2024-01-02T03:04:05Z",
    "20231114", "2019", "",
    "45000", "0", "-1", "yesterday", "nan", "inf", "1e300", "2024-13-01", "2024-01-02 03:04", "03/04/2024", "9" * 30,
]  # fmt: skip


def _column(values, odd_values):
    """Draw a column of mostly good cells."""
    return mixed((st.sampled_from(values), 60), (st.sampled_from(odd_values), 1))


@st.composite
def _events(draw):
    base = draw(st.sampled_from([1_600_000_000, 1_600_000_000_000, 1_600_000_000_000_000]))
    rows = []
    for place in range(draw(st.integers(1, 8))):
        row = {
            "user_id": draw(_column(["u1", "u2", "u3", "u1 "], CELLS)),
            "item_id": draw(_column(["i1", "i2", "i3", "i4", "i1 ", "7", "007"], CELLS)),
            "timestamp": draw(_column([str(base + place * 60)], TIMES)),
        }
        for role, good, bad in (
            ("rating", ["1", "4.5", ""], ["five", "nan", "inf", "-3"]),
            ("event", ["view", "buy"], CELLS),
        ):
            if draw(st.integers(0, 2)) == 0:
                row[role] = draw(_column(good, bad))
        if draw(st.integers(0, 5)) == 0:
            row["label"] = draw(_column(["0", "1", ""], ["2", "yes"]))
        rows.append(row)
    return rows


KNOWN = ["i1", "i2", "i3", "i4", "7", "007"]


@st.composite
def _items(draw):
    names = draw(st.lists(_column(["i1", "i2", "i3", "i4"], CELLS), min_size=1, max_size=5))
    names = list({name.strip(): name for name in [*names, *draw(st.sampled_from([KNOWN, KNOWN, KNOWN, []]))]}.values())
    column = draw(st.sampled_from(["title", "title", "name", "Unnamed: 0", "字", "a.b", "item id"]))
    return [{"item_id": name, column: draw(mixed((TEXTS, 9), (st.sampled_from(CELLS), 1)))} for name in names]


DAMAGES = [
    lambda data, place: data[: place % (len(data) + 1)],
    lambda data, place: data[: place % (len(data) + 1)] + b"\xff\x00" + data[place % (len(data) + 1) :],
    lambda data, place: b"\xef\xbb\xbf" + data,
    lambda data, place: data.decode("utf-8", "replace").encode("utf-16"),
    lambda data, place: data.replace(b"\n", b"\r\n"),
    lambda data, place: data.replace(b"\n", b"\r"),
    lambda data, place: data + b'"',
    lambda data, place: data + data,
    lambda data, place: b"\n\n" + data,
    lambda data, place: data.replace(b",", b";"),
    lambda data, place: [b"null", b"[]", b"{}", b"null\nnull", b"1\n2", b'"a"', b"[[1]]", b"{", b"[{}]",
    b'{"a": {}}'][place % 10],
    lambda data, place: b"",
]  # fmt: skip

TABLES = st.fixed_dictionaries({
    "events": _events(), "items": _items(), "format": st.sampled_from(["csv", "csv", "tsv", "jsonl", "parquet",
    "json"]),
    "typed": mixed((st.just(False), 4), (st.just(True), 1)),
    "prepared": mixed((st.just(False), 19), (st.just(True), 1)),
    "arguments": mixed((st.just({}), 3), (st.fixed_dictionaries({}, optional={
        "drop_invalid": st.booleans(), "item_columns": st.sampled_from([["title"], ["nope"], []]),
        "columns": st.sampled_from([{"timestamp": "time"}, {"rating": "event"}, {"part": "event"}, {"event": "event"}]),
    }), 1)),
    "damage": mixed((st.none(), 3), (st.tuples(
        st.sampled_from(["events", "items"]), st.integers(0, len(DAMAGES) - 1), st.integers(0, 4000)
    ), 1)),
})  # fmt: skip


def _typed(text):
    """A cell as a number where it is one."""
    try:
        number = float(text)
    except ValueError:
        return text or None
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


def _bytes(rows, kind, typed):
    """Write rows as the bytes of a table."""
    rows = [{name: _typed(value) if typed else value for name, value in row.items()} for row in rows]
    if kind in ("csv", "tsv"):
        separator = "," if kind == "csv" else "\t"
        return pandas.DataFrame(rows).to_csv(index=False, sep=separator).encode("utf-8", "surrogatepass")
    if kind == "parquet":
        buffer, names = io.BytesIO(), dict.fromkeys(name for row in rows for name in row)
        columns = {}
        for name in names:
            values = [row.get(name) for row in rows]
            same_type = len({type(value) for value in values if value is not None}) <= 1
            columns[name] = values if same_type else [None if value is None else str(value) for value in values]
        pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
        return buffer.getvalue()
    lines = [json.dumps(row) for row in rows]
    return (f"[{', '.join(lines)}]" if kind == "json" else "\n".join(lines) + "\n").encode()


def check_table(case):
    """Read a log: its rules hold, and every row of whole tables is in it or counted as dropped."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {}
        for name in ("events", "items"):
            data = _bytes(case[name], case["format"], case["typed"])
            if case["damage"] and case["damage"][0] == name:
                data = DAMAGES[case["damage"][1]](data, case["damage"][2])
            paths[name] = Path(folder) / f"{name}.{case['format']}"
            paths[name].write_bytes(data)
        arguments = DataArguments(interactions=str(paths["events"]), items=str(paths["items"]), **case["arguments"])
        log = read_log(arguments)
        if case["prepared"]:
            data = {name: value for name, value in dataclasses.asdict(arguments).items() if value is not None}
            told = report(load_recipe({"data": data, "training": {"output_dir": str(Path(folder) / "run")}}))
            rule(isinstance(told, str) and told.strip(), "a report says nothing")
    events, items = log.interactions, log.items
    users, names = events["user_id"].astype("str"), events["item_id"].astype("str")
    rule(items.index.is_unique, "an item is there twice")
    rule(names.isin(items.index).all(), "an event of an item that is not there")
    for ids in (users, names, items.index.to_series()):
        rule((ids == ids.str.strip()).all() and (ids != "").all(), "an id has white space around it, or is empty")
    times = events["timestamp"]
    rule(times.isna().all() or numpy.isfinite(times).all(), "a time is not finite")
    rule((items != "").any(axis=1).all(), "an item has no text")
    if "rating" in events:
        rule((events["rating"].isna() | numpy.isfinite(events["rating"])).all(), "a rating is not finite")
    if case["damage"] is None:
        dropped = {
            name: sum(n for why, n in log.dropped.items() if why.startswith(name)) for name in ("interactions", "items")
        }
        rule(len(events) + dropped["interactions"] == len(case["events"]), "an event is neither there nor dropped")
        rule(len(items) + dropped["items"] == len(case["items"]), "an item is neither there nor dropped")
        given = {row["item_id"].strip() for row in case["items"]}
        rule(case["typed"] or {*items.index} <= given, "an item has an id that no row has")


# --------------------------------------------------------------------------------------------------------- recipes

SOURCES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.yaml"))}
YAML_VALUES = st.sampled_from([
    None, True, "yes", 0, -1, 1, 3, 1e-3, float("nan"), float("inf"), 10**30, "", "text", "1e-3", [], ["a"], [1, 2], {},
    {"a": 1}, {1: 2}, [[]], [{"x": None}], "~/here", "a\nb", "字", "epoch", "no", "loss", ["retrieval",
    "click"], "../x",
])  # fmt: skip
KEYS = st.sampled_from([
    "training.learning_rate", "training.output_dir", "training.num_train_epochs",
    "training.metric_for_best_model", "data.seed",
    "training.save_strategy", "training.bf16", "data.columns", "data.interactions", "data.columns.timestamp",
    "text.max_length",
    "text.domain", "model.preset", "model.config", "model.config.hidden_size", "model.backbone", "task.learn",
    "task.weights",
    "task.weights.click", "tuning.method", "tuning.settings.r", "tuning.average_checkpoints", "evaluation.ks",
    "evaluation.split",
    "pretraining.objectives", "pretraining.texts", "recommend.requests", "nope", "data", "training",
    "text.nope", "a.b.c", "",
    ".", "data.", "text.max_events", "training.hub_token", "training.seed", "training.max_steps",
    "model.shape.num_hidden_layers",
])  # fmt: skip
YAML_TEXTS = st.one_of(
    YAML_VALUES.map(lambda value: yaml.safe_dump(value, default_flow_style=True, allow_unicode=True).strip()),
    st.sampled_from([
        "!!timestamp abc", "!!int ''", "!!float x", "!!python/object:os.system ls", "!!binary x", "&a [*a]",
        "*a", "{", "[", "'",
        "!!set {a}", "!!omap [a]", "!!pairs x", "!!bool x", "!!null x", "!!str [a]", "%", "? a", "<<: 1",
        "<<: [1]", "- - -",
        "2024-99-99", "0o9", "1:2:3", "0x", "1_0", ".inf", "=", "\t", "a: b: c", "!x y", "--- a\n--- b",
        "\x07", "[" * 3000,
        "{a: " * 3000, "&a [" + "*a, " * 3 + "]", "!!int 'é'", "!!timestamp 2024-13-45T99:99:99Z", "!!float ''",
    ]),
)  # fmt: skip
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + place)}: &{chr(98 + place)} [{','.join(['*' + chr(97 + place)] * 9)}]\n" for place in range(9)
)
"""A text of 475 letters whose aliases stand for 3 billion values."""


@st.composite
def recipe_texts(draw):
    """Draw the text of a recipe: one of the package's with another value, or with a damaged line."""
    text = SOURCES[draw(st.sampled_from(sorted(SOURCES)))]
    way = draw(st.integers(0, 9))
    if way < 5:
        tree = yaml.safe_load(text)
        known = [path for path in places(tree) if path]
        tree = put(tree, known[draw(st.integers(0, len(known) - 1))], draw(YAML_VALUES))
        return yaml.safe_dump(tree, allow_unicode=True)
    lines = text.splitlines()
    place = draw(st.integers(0, len(lines) - 1))
    if way < 8:
        name = lines[place].split(":")[0]
        lines[place] = f"{name}: {draw(YAML_TEXTS)}"
        return "\n".join(lines)
    return draw(st.sampled_from([
        BOMB, "", "null", "[]", "text", "a: 1\na: 2", "\t", "\x00", "data:\ndata:\n", "{}: x", "? {}\n: x",
        "training: 1",
        "training: {output_dir: [1]}", "data: null\ntext: null", "[" * 20_000, text.replace("\n", "\r\n"), "﻿" + text,
        text[: len(text) // 2], text + text, "&a {data: *a}",
        "training: &a {output_dir: x, label_names: [*a]}",
        "1: 2",
        "é: x",
    ]))  # fmt: skip


TREE = {"training": {"output_dir": "x"}, "data": {}, "task": {"weights": {}}}
RECIPES = st.fixed_dictionaries({
    "text": mixed((recipe_texts(), 3), (st.sampled_from(sorted(SOURCES.values())), 1)),
    "overrides": mixed(
        (st.just([]), 8), (st.lists(st.builds("{}={}".format, KEYS, YAML_TEXTS), min_size=1, max_size=2), 8),
        (st.lists(TEXTS, min_size=1, max_size=1), 1),
    ),
    "encoding": mixed((st.just("utf-8"), 12), (st.sampled_from(["latin-1", "utf-16", "utf-8-sig"]), 1)),
    "tree": mixed((st.none(), 4), (odd(st.just(TREE), junk).filter(lambda tree: isinstance(tree, dict)), 1)),
})  # fmt: skip


def check_recipe(case):
    """Read a recipe; what is read is written and read again as the same."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "given.yaml"
        path.write_bytes(case["text"].encode(case["encoding"], "replace"))
        source = path if case["tree"] is None else case["tree"]
        recipe = load_recipe(source, case["overrides"])
        recipe.save(Path(folder) / "run")
        again = load_recipe(Path(folder) / "run")
    one, other = (_told(dataclasses.asdict(each)) for each in (recipe, again))
    if case["tree"] is None:
        rule(one == other, "a recipe changes when it is written and read")


def _told(value):
    """A tree with texts in place of what is not equal to itself."""
    if isinstance(value, dict):
        return {key: _told(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_told(entry) for entry in value]
    return "nan" if isinstance(value, float) and math.isnan(value) else value


# ------------------------------------------------------------------------------------------ folders of a catalogue

FILES = ("catalogue.json", "items.parquet", "vectors.safetensors")
VECTOR_FILES = [
    lambda rows, width: save({"vectors": torch.zeros(rows, width, dtype=torch.float16)}),
    lambda rows, width: save({"vectors": torch.full((rows, width), float("nan"))}),
    lambda rows, width: save({"vectors": torch.zeros(rows + 1, width)}),
    lambda rows, width: save({"vectors": torch.zeros(rows)}),
    lambda rows, width: save({"vectors": torch.zeros(rows, width, 1)}),
    lambda rows, width: save({"others": torch.zeros(rows, width)}),
    lambda rows, width: save({"vectors": torch.zeros(rows, width, dtype=torch.int64)}),
    lambda rows, width: save({"vectors": torch.full((rows, width), 7.0)}),
    lambda rows, width: b"", lambda rows, width: b"{}", lambda rows, width: b"\xff" * 40,
]  # fmt: skip
ITEM_FILES = [
    lambda rows: pyarrow.table({"item_id": ["a"] * rows}),
    lambda rows: pyarrow.table({"title": ["a"] * rows}),
    lambda rows: pyarrow.table({"item_id": [None] * rows}),
    lambda rows: pyarrow.table({"item_id": list(range(rows))}),
    lambda rows: pyarrow.table({"item_id": [f"i{row}" for row in range(rows + 1)]}),
    lambda rows: pyarrow.table({"item_id": [f"i{row}" for row in range(rows)], "__text__": [["x"]] * rows}),
    lambda rows: pyarrow.table({"item_id": [f" i{row} " for row in range(rows)], "title": ["x"] * rows}),
    lambda rows: pyarrow.table({}),
]  # fmt: skip
CHANGES = mixed(
    (st.tuples(st.just("cut"), st.sampled_from(FILES), st.integers(0, 3000)), 2),
    (st.tuples(st.just("flip"), st.sampled_from(FILES), st.integers(0, 3000)), 2),
    (st.tuples(st.just("remove"), st.sampled_from(FILES), st.just(0)), 1),
    (st.tuples(st.just("folder"), st.sampled_from(FILES), st.just(0)), 1),
    (st.tuples(st.just("vectors"), st.just(FILES[2]), st.integers(0, len(VECTOR_FILES) - 1)), 3),
    (st.tuples(st.just("items"), st.just(FILES[1]), st.integers(0, len(ITEM_FILES) - 1)), 3),
    (st.tuples(st.just("manifest"), st.sampled_from([
        "format", "fingerprint", "dimension", "count", "json_columns", "index", "sha256", "new"
    ]), mixed((st.sampled_from([None, "", "x", 0, -1, 10**9, 2.5, [], ["title"], {}, {"kind": "flat",
    "settings": {}}, True]), 1))), 3),
)  # fmt: skip
CATALOGUES = st.fixed_dictionaries({
    "items": mixed(
        (st.lists(st.one_of(TEXTS, ITEM_FIELDS), max_size=6), 1),
        (st.lists(ITEM_FIELDS, max_size=5, unique_by=lambda item: str(item.get("item_id"))), 2),
        (st.lists(odd(ITEM_FIELDS), min_size=1, max_size=2), 1), (junk, 1),
    ),
    "added": st.lists(st.one_of(TEXTS, ITEM_FIELDS), max_size=3), "replace": st.booleans(),
    "removed": st.lists(st.one_of(st.sampled_from(["i0", "0", "1"]), ODD_IDS), max_size=1),
    "changes": st.lists(CHANGES, max_size=2),
    "vouched": st.booleans(),
})  # fmt: skip


@functools.cache
def _whole():
    """The files of a whole catalogue."""
    with tempfile.TemporaryDirectory() as folder:
        recommender(0).catalogue.save(Path(folder) / "catalogue")
        return {path.name: path.read_bytes() for path in (Path(folder) / "catalogue").iterdir()}


def check_catalogue(case):
    """Make, change, save and load a catalogue, then load the damaged files of another one."""
    with tempfile.TemporaryDirectory() as folder:
        if case["changes"]:
            _check_damaged(Path(folder) / "damaged", case)
        else:
            _check_made(Path(folder) / "made", case)


def _check_made(folder, case):
    recommend = recommender(0)
    model, processor = recommend.model, recommend.processor
    catalogue = Catalogue.from_dataset(case["items"], model, processor, progress=False)
    size = len(catalogue)
    before = [*catalogue]
    try:
        catalogue.add(case["added"], model, processor, replace=case["replace"], progress=False)
        catalogue.remove(case["removed"])
    finally:
        rule(
            case["replace"] or {*before} <= {*catalogue} | {str(each).strip() for each in case["removed"]},
            "an item is lost",
        )
        rule(len(catalogue) <= size + len(case["added"]), "more items than were given")
    catalogue.save(folder)
    _check_same(catalogue, Catalogue.load(folder, model))
    rule([path.name for path in folder.parent.iterdir()] == [folder.name], "files are left behind")


def _check_same(one, other):
    rule([*one] == [*other], "another order of items")
    users = torch.nn.functional.normalize(
        torch.randn(2, one.dimension, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    rule(one.search(users, 3) == other.search(users, 3), "another answer after saving and loading")
    for ranking in other.search(users, len(other) + 1):
        rule(len(ranking) == len(other), "a search loses items")
        rule(all(math.isfinite(score) and abs(score) <= 1.01 for _, score in ranking), "a score is no cosine")
    for name in one:
        rule(str(one.item(name)) == str(other.item(name)), "an item changes when it is saved and loaded")


def _check_damaged(folder, case):
    folder.mkdir()
    for name, data in _whole().items():
        (folder / name).write_bytes(data)
    manifest = json.loads(_whole()[FILES[0]])
    for how, name, value in case["changes"]:
        _damage(folder, manifest, how, name, value)
    if case["vouched"] and (folder / FILES[0]).is_file():
        for name in FILES[1:]:
            if (folder / name).is_file() and isinstance(manifest.get("sha256"), dict):
                manifest["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        (folder / FILES[0]).write_text(json.dumps(manifest))
    loaded = Catalogue.load(folder)
    _check_same(loaded, loaded)


def _damage(folder, manifest, how, name, value):
    path = folder / name
    if how == "manifest":
        manifest[name] = value
        if path.parent.is_dir() and not (folder / FILES[0]).is_dir():
            (folder / FILES[0]).write_text(json.dumps(manifest))
        return
    if path.is_dir() or not path.exists():
        return
    data = path.read_bytes()
    if how in ("remove", "folder"):
        path.unlink()
        if how == "folder":
            path.mkdir()
    elif how == "cut":
        path.write_bytes(data[: value % len(data)] if data else b"")
    elif how == "flip":
        place = value % max(1, len(data))
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :] if data else b"")
    elif how == "vectors":
        path.write_bytes(VECTOR_FILES[value](manifest["count"] if isinstance(manifest["count"], int) else 1, 8))
    else:
        pyarrow.parquet.write_table(ITEM_FILES[value](8), path)


OF_FILES = (ValueError, TypeError, FileNotFoundError)
DOORS_OF_FILES = [
    Door("tables", TABLES, check_table, OF_FILES),
    Door("recipes", RECIPES, check_recipe, OF_FILES),
    Door("catalogues", CATALOGUES, check_catalogue, OF_FILES),
]
TABLES_DOOR, RECIPES_DOOR, CATALOGUES_DOOR = DOORS_OF_FILES
