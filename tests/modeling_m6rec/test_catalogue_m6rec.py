"""The catalogue finds what a slow twin finds, changes at will, and what it keeps is whole or refused."""

import copy
import datetime
import importlib
import json
import os
import shutil
import sys

import datasets
import pandas
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from m6rec import Catalogue, catalogue_m6rec
from tests.fast import examples
from tests.modeling_m6rec.shop import ITEMS, ROWS, TITLES, build, change, processor

MODEL, PROCESSOR = build(), processor()
ADDED = {"item_id": "new", "title": "camping stove"}


def make(items=ITEMS, **more):
    return Catalogue.from_dataset(items, MODEL, PROCESSOR, **more)


def vector(item):
    """One item, embedded by itself."""
    ids = torch.tensor(PROCESSOR.encode_items([item]))
    memory = torch.tensor([ROWS.get(item["item_id"], 0) if isinstance(item, dict) else 0])
    with torch.no_grad():
        return MODEL.embed_items(ids, memory_ids=memory)[0]


def slow_search(vectors, user, top_k):
    """All dot products in Python, sorted; `vectors` by id in the order of insertion."""
    scores = {name: sum(a * b for a, b in zip(own.tolist(), user.tolist())) for name, own in vectors.items()}
    return sorted(scores.items(), key=lambda pair: -pair[1])[:top_k]


def users(number=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(number, 10, generator=generator), dim=-1)


def same(found, expected):
    assert [name for name, _ in found] == [name for name, _ in expected]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], abs=1e-6)


# ------------------------------------------------------------------------------------------------------------- making


@pytest.mark.parametrize("batch_size", (1, 3, 256))
def test_vectors_are_those_of_each_item_alone(batch_size):
    catalogue = make(batch_size=batch_size)
    expected = torch.stack([vector(item) for item in ITEMS])
    torch.testing.assert_close(catalogue.vectors([item["item_id"] for item in ITEMS]), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(expected.norm(dim=-1), torch.ones(len(ITEMS)))


def test_item_memory_is_part_of_the_vector():
    text_alone = MODEL.embed_items(torch.tensor(PROCESSOR.encode_items([ITEMS[3]])))[0]
    assert (make().vectors(["i3"])[0] - text_alone).abs().max() > 0.1


def test_new_items_are_found_by_their_bonus():
    model = copy.deepcopy(MODEL)
    model.config.cold_item_bias = 3.0
    catalogue = Catalogue.from_dataset(ITEMS, model, PROCESSOR)
    assert PROCESSOR.item_row({"item_id": "new", "item": "yoga mat"}) == 0
    catalogue.add([{"item_id": "new", "item": "yoga mat"}], model, PROCESSOR)
    new = {"new", *(item["item_id"] for item in ITEMS if item["item_id"] not in ROWS)}
    for own in catalogue.search(torch.nn.functional.pad(users(), (0, 1), value=1.0), len(catalogue)):
        assert {name for name, _ in own[: len(new)]} == new
        assert own[len(new) - 1][1] - own[len(new)][1] > 1, "three more than a cosine, which is 2 at most apart"


def test_any_table_will_do():
    expected = make().vectors(list(make()))
    for table in (datasets.Dataset.from_list(ITEMS), pandas.DataFrame(ITEMS), iter(ITEMS), tuple(ITEMS)):
        catalogue = make(table)
        assert list(catalogue) == [item["item_id"] for item in ITEMS]
        assert catalogue.fields("i2") == ITEMS[2]
        assert torch.equal(catalogue.vectors(list(catalogue)), expected)


def test_no_text_takes_over_an_id(tmp_path):
    """Running numbers go on past every whole number that was ever an id, also after removal, saving and loading."""
    model, own = MODEL, PROCESSOR
    catalogue = Catalogue.from_dataset(
        [{"item_id": "0", "title": "tent"}, {"item_id": "1", "title": "mat"}], model, own
    )
    catalogue.add(["a lamp"], model, own)
    assert list(catalogue) == ["0", "1", "2"] and catalogue.fields("0") == {"item_id": "0", "title": "tent"}
    catalogue.remove(["2"])
    catalogue.add(["a rope"], model, own)
    assert list(catalogue) == ["0", "1", "3"]
    catalogue.remove(["3"])
    catalogue.save(tmp_path / "catalogue")
    again = Catalogue.load(tmp_path / "catalogue", model)
    again.add(["a bag", {"item_id": 9, "title": "cup"}, "a map"], model, own)
    assert list(again) == ["0", "1", "10", "9", "12"]
    mixed = Catalogue.from_dataset(
        ["a lamp", {"item_id": "0", "title": "tent"}, {"item_id": "x1", "title": "mat"}], model, own
    )
    assert list(mixed) == ["1", "0", "x1"]


def test_texts_get_running_numbers():
    catalogue = make(TITLES)
    assert list(catalogue) == [str(number) for number in range(len(TITLES))]
    assert catalogue.fields(2) == {"item_id": "2", "item": "yoga mat"} and catalogue.item("2") == "yoga mat"
    torch.testing.assert_close(catalogue.vectors([2])[0], vector("yoga mat"), rtol=1e-5, atol=1e-5)
    catalogue.add(["a tent"], MODEL, PROCESSOR)
    assert catalogue.item(len(TITLES)) == "a tent"


def test_ids_may_be_numbers_and_missing_fields_are_absent():
    frame = pandas.DataFrame(
        {"item_id": [3, 4], "title": ["tent", "stove"], "price": [None, 2.5], "brand": ["x", None]}
    )
    catalogue = make(frame)
    assert catalogue.fields(3) == {"item_id": "3", "title": "tent", "brand": "x"}
    assert catalogue.fields("4") == {"item_id": "4", "title": "stove", "price": 2.5}
    assert 4 in catalogue and 4.0 in catalogue and "4" in catalogue and 5 not in catalogue


@pytest.mark.parametrize(
    ("items", "error", "match"),
    [
        ([ITEMS[0], ITEMS[0]], ValueError, "'i0' is there twice"),
        ([{"item_id": 1, "title": "a"}, {"item_id": 1.0, "title": "b"}], ValueError, "'1' is there twice"),
        ([ITEMS[0], {"title": "tent"}], ValueError, r"items\[1\]: no item_id"),
        ([{"item_id": None, "title": "tent"}], ValueError, "no item_id"),
        ([{"item_id": " ", "title": "tent"}], ValueError, r"' ' \(str\) is no id"),
        ([{"item_id": True, "title": "tent"}], ValueError, r"True \(bool\) is no id"),
        ([ITEMS[0], {"item_id": "x"}], ValueError, r"items\[1\].*no text"),
        ([ITEMS[0], {"item_id": "x", "title": float("nan")}], ValueError, r"items\[1\].*no text"),
        (["tent", ""], ValueError, r"items\[1\]"),
        ([ITEMS[0], 7], TypeError, r"items\[1\].*int"),
        ([{"item_id": "x", "__text__": "y"}], ValueError, "__text__"),
        (ITEMS[0], TypeError, "got dict"),
        ("tent", TypeError, "got str"),
        (7, TypeError, "got int"),
    ],
)
def test_bad_items(items, error, match):
    with pytest.raises(error, match=match):
        make(items)


def test_a_model_in_training_is_read_without_drop_out_and_stays_in_training():
    model = build(hidden_dropout=0.5)
    expected = Catalogue.from_dataset(ITEMS, model, PROCESSOR).vectors(["i0"])
    model.train()
    model.model.layers[0].eval()
    found = Catalogue.from_dataset(ITEMS, model, PROCESSOR).vectors(["i0"])
    assert torch.equal(found, expected)
    assert model.training and not model.model.layers[0].training and not found.requires_grad


def test_a_model_without_segment_layers_has_no_item_vectors():
    with pytest.raises(ValueError, match="segment layers"):
        Catalogue.from_dataset(ITEMS, build(num_joint_layers=4), PROCESSOR)


# ---------------------------------------------------------------------------------------------------------- searching


def test_search_is_exact():
    catalogue, vectors = make(), {item["item_id"]: vector(item) for item in ITEMS}
    for user, found in zip(users(), catalogue.search(users(), 3)):
        same(found, slow_search(vectors, user, 3))
    assert [len(found) for found in catalogue.search(users(), 99)] == [len(ITEMS)] * 3


@pytest.mark.parametrize("at_once", [7, 1 << 16])
@pytest.mark.parametrize("sparse", [0, 7, 8, 16])
def test_columns_that_are_mostly_zero_are_read_where_they_are_not(sparse, at_once, monkeypatch):
    monkeypatch.setattr(catalogue_m6rec, "ROWS_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(sparse)
    matrix, users = torch.randn(40, 16, generator=generator), torch.randn(4, 16, generator=generator)
    matrix[:, :sparse] *= (torch.arange(40)[:, None] + torch.arange(sparse)) % 20 == 3
    matrix = matrix[:, torch.randperm(16, generator=generator)]
    users[1, ::2], users[2] = 0, 0
    products = catalogue_m6rec.Products()
    taken = catalogue_m6rec._SparseColumns.of(matrix)
    assert (taken is not None) == (sparse >= 8) and (taken is None or len(taken.columns) >= sparse)
    for rows in (users, users[2:3]):
        found = products.of(rows, matrix)
        torch.testing.assert_close(found.double(), rows.double() @ matrix.double().T, rtol=0, atol=2e-6)
    torch.testing.assert_close(products.of(users, 2 * matrix), 2 * users @ matrix.T, rtol=0, atol=2e-6)


def test_search_by_hashed_words_is_exact():
    items = [{"item_id": str(number), "title": f"{title} {number}"} for number, title in enumerate(TITLES * 4)]
    model = build(tfidf_weight=0.5)
    model.model.word_sketch.fit(PROCESSOR.encode_items(items))
    catalogue = Catalogue.from_dataset(items, model, PROCESSOR)
    state = catalogue.snapshot()._state
    assert catalogue_m6rec._SparseColumns.of(state.base) is not None
    vectors = dict(zip(catalogue, catalogue.vectors(list(catalogue))))
    asked = torch.stack([(vectors["3"] + vectors["5"]) / 2, vectors["8"]])
    for user, found in zip(asked, catalogue.search(asked, 9)):
        same(found, slow_search(vectors, user, 9))
    products = state.products
    catalogue.add([{"item_id": "new", "title": f"{TITLES[0]} {TITLES[1]}"}], model, PROCESSOR)
    assert catalogue.snapshot()._state.products is products
    vectors["new"] = catalogue.vectors(["new"])[0]
    same(catalogue.search(vectors["new"][None], 3)[0], slow_search(vectors, vectors["new"], 3))


def test_exclude_and_filter():
    catalogue, vectors = make(), {item["item_id"]: vector(item) for item in ITEMS}
    sport = {item["item_id"] for item in ITEMS if item["category"] == "sport"}
    exclude = [["i1", "unknown"], None, sport]
    found = catalogue.search(users(), 99, exclude, lambda fields: fields["category"] == "sport")
    for user, own, left_out in zip(users(), found, exclude):
        allowed = sport - {*(left_out or ())}
        same(own, slow_search({name: vectors[name] for name in vectors if name in allowed}, user, 99))
    assert found[2] == []


def test_equal_items_tie_in_the_order_of_insertion():
    items = [{"item_id": str(number), "title": TITLES[number % 2]} for number in range(40)]
    catalogue = make(items[:23])
    catalogue.add(items[23:], MODEL, PROCESSOR)
    for user in users(5):
        found = catalogue.search(user[None], 40)[0]
        assert len({score for _, score in found}) == 2
        halves = [int(name) for name, _ in found[:20]], [int(name) for name, _ in found[20:]]
        assert all(half == sorted(half) for half in halves)
        assert [name for name, _ in catalogue.search(user[None], 7)[0]] == [name for name, _ in found[:7]]


def test_a_score_depends_on_nothing_else():
    catalogue = make(ITEMS[:5])
    before = dict(catalogue.search(users(7), 99)[6])
    catalogue.add(ITEMS[5:], MODEL, PROCESSOR)
    catalogue.remove(["i0"])
    after = dict(catalogue.search(users(7)[6:], 99)[0])
    assert {name: after[name] for name in before.keys() & after.keys()} == {
        name: score for name, score in before.items() if name != "i0"
    }


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"user_vectors": torch.zeros(2, 9)}, r"\(2, 9\)"),
        ({"user_vectors": torch.zeros(10)}, r"\(10,\)"),
        ({"user_vectors": torch.full((1, 10), float("nan"))}, "NaN"),
        ({"user_vectors": users(), "top_k": 0}, "top_k=0"),
        ({"user_vectors": users(), "exclude": [None]}, "1 entries for 3"),
    ],
)
def test_bad_searches(arguments, match):
    with pytest.raises(ValueError, match=match):
        make().search(**arguments)


# ----------------------------------------------------------------------------------------------------------- changing


def test_an_added_item_is_found_straight_away():
    catalogue = make()
    catalogue.add([ADDED], MODEL, PROCESSOR)
    name, score = catalogue.search(vector(ADDED)[None], 1)[0][0]
    assert (name, score) == ("new", pytest.approx(1, abs=1e-5)) and len(catalogue) == len(ITEMS) + 1


def test_an_id_is_replaced_only_if_told():
    catalogue = make()
    before = catalogue.search(users(), 99)
    with pytest.raises(ValueError, match="'i2' is in the catalogue already"):
        catalogue.add([ADDED, {**ITEMS[2], "title": "x"}], MODEL, PROCESSOR)
    assert catalogue.search(users(), 99) == before and "new" not in catalogue
    catalogue.add([{"item_id": "i2", "title": "camping stove"}], MODEL, PROCESSOR, replace=True)
    assert catalogue.fields("i2") == {"item_id": "i2", "title": "camping stove"} and len(catalogue) == len(ITEMS)
    assert [name for name, _ in catalogue.search(users(), 99)[0]].count("i2") == 1
    torch.testing.assert_close(catalogue.vectors(["i2"])[0], vector(catalogue.item("i2")), rtol=1e-5, atol=1e-5)


def test_removing_is_all_or_nothing():
    catalogue = make()
    with pytest.raises(ValueError, match="'i77' is not among"):
        catalogue.remove(["i0", "i77"])
    assert "i0" in catalogue
    with pytest.raises(TypeError, match="'i0'"):
        catalogue.remove("i0")
    catalogue.remove(["i0", "i3", "i0"])
    assert len(catalogue) == len(ITEMS) - 2 and "i0" not in catalogue
    assert {"i0", "i3"}.isdisjoint(name for name, _ in catalogue.search(users(), 99)[0])
    for ask in (catalogue.item, catalogue.fields, lambda name: catalogue.vectors([name])):
        with pytest.raises(ValueError, match="'i3'"):
            ask("i3")


def test_what_is_given_out_or_taken_in_is_not_shared():
    item = {"item_id": "a", "title": "tent", "tags": ["x"]}
    catalogue = make([item])
    item["title"] = "changed"
    item["tags"].append("y")
    catalogue.fields("a")["title"] = "changed"
    assert catalogue.fields("a") == {"item_id": "a", "title": "tent", "tags": ["x"]}


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["add", "replace", "remove", "keep", "encode"]), st.integers(0, 7)), max_size=12
)


@settings(max_examples=examples(40), deadline=None)
@given(OPERATIONS)
def test_any_history_of_changes(tmp_path_factory, operations):
    """Against a dictionary of vectors, whatever was done."""
    folder = tmp_path_factory.mktemp("kept") / "catalogue"
    catalogue, twin = make(ITEMS[:3]), {item["item_id"]: vector(item) for item in ITEMS[:3]}
    for operation, number in operations:
        name = f"i{number}"
        if operation == "remove" and name in twin:
            catalogue.remove([name])
            del twin[name]
        elif operation == "replace" or operation == "add" and name not in twin:
            item = {**ITEMS[number], "title": f"another {number}"}
            catalogue.add([item], MODEL, PROCESSOR, replace=operation == "replace")
            twin.pop(name, None)
            twin[name] = vector(item)
        elif operation == "keep":
            catalogue.save(folder)
            catalogue = Catalogue.load(folder, MODEL)
        elif operation == "encode":
            catalogue.encode(MODEL, PROCESSOR)
    assert list(catalogue) == list(twin) and len(catalogue) == len(twin)
    same(catalogue.search(users(1), 99)[0], slow_search(twin, users(1)[0], 99))


# ------------------------------------------------------------------------------------------------------------ keeping


def test_values_keep_their_types(tmp_path):
    items = [
        {"item_id": "a", "title": "防水登山鞋", "year": 1995, "price": 2.5, "new": True, "tags": ["x", "y"], "code": 7},
        {"item_id": "b", "title": "tent", "day": datetime.date(2024, 5, 1), "tags": ["z"], "code": "7", "many": 2**70},
        "just a text",
    ]
    catalogue = make(items)
    catalogue.save(tmp_path / "catalogue")
    again = Catalogue.load(tmp_path / "catalogue", MODEL)
    assert [again.fields(name) for name in again] == [catalogue.fields(name) for name in catalogue]
    for name, value in {**items[0], **items[1]}.items():
        owner = again.fields("b" if name in items[1] else "a")
        assert type(owner[name]) is type(value)
    assert again.item("2") == "just a text"
    assert torch.equal(again.vectors(list(again)), catalogue.vectors(list(catalogue)))


@pytest.mark.parametrize("other", ["May", datetime.datetime(2024, 5, 1, 12)])
def test_what_cannot_be_kept_is_refused_and_the_old_catalogue_stays(tmp_path, other):
    make().save(tmp_path / "catalogue")
    days = datetime.date(2024, 5, 1), other
    mixed = make([{"item_id": number, "title": "a", "day": day} for number, day in enumerate(days)])
    with pytest.raises(ValueError, match="'day'"):
        mixed.save(tmp_path / "catalogue")
    assert len(Catalogue.load(tmp_path / "catalogue")) == len(ITEMS)


def test_an_empty_catalogue(tmp_path):
    catalogue = make([])
    catalogue.save(tmp_path / "catalogue")
    again = Catalogue.load(tmp_path / "catalogue", MODEL)
    assert len(again) == 0 and again.search(users(), 5) == [[], [], []]
    again.add([ADDED], MODEL, PROCESSOR)
    assert [name for name, _ in again.search(users(1), 5)[0]] == ["new"]


def test_another_model_is_refused_until_the_items_are_encoded_again(tmp_path):
    make().save(tmp_path / "catalogue")
    model = build()
    change(model)
    catalogue = Catalogue.load(tmp_path / "catalogue")
    for attempt in (
        lambda: Catalogue.load(tmp_path / "catalogue", model),
        lambda: catalogue.add([ADDED], model, PROCESSOR),
        lambda: Catalogue.load(tmp_path / "catalogue", build().bfloat16()),
    ):
        with pytest.raises(ValueError, match=r"catalogue\.encode\(model, processor\)"):
            attempt()
    catalogue.encode(model, PROCESSOR)
    catalogue.save(tmp_path / "catalogue")
    again = Catalogue.load(tmp_path / "catalogue", model)
    expected = Catalogue.from_dataset(ITEMS, model, PROCESSOR)
    assert torch.equal(again.vectors(list(again)), expected.vectors(list(expected)))


@pytest.mark.parametrize(
    "step", ["pyarrow.parquet.write_table", "save_file", "os.fsync", "os.replace 1", "os.replace 2"]
)
def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch, step):
    folder = tmp_path / "catalogue"
    make().save(folder)
    name, _, turn = step.partition(" ")
    path, _, last = name.rpartition(".")
    owner = importlib.import_module(path) if path else catalogue_m6rec
    real, calls = getattr(owner, last), []

    def fail(*arguments, **named):
        calls.append(arguments)
        if len(calls) == int(turn or 1):
            raise OSError(28, "no space left on device")
        return real(*arguments, **named)

    monkeypatch.setattr(owner, last, fail)
    with pytest.raises(OSError, match="no space"):
        make(ITEMS[:2]).save(folder)
    monkeypatch.undo()
    assert len(Catalogue.load(folder, MODEL)) == len(ITEMS)
    assert [path.name for path in tmp_path.iterdir()] == ["catalogue"]


@pytest.mark.parametrize("file", ["catalogue.json", "items.parquet", "vectors.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "empty", "flip", "gone", "swapped"])
def test_damage_is_noticed(tmp_path, file, damage):
    folder = tmp_path / "catalogue"
    make().save(folder)
    path = folder / file
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "swapped":
        make(ITEMS[::-1]).save(tmp_path / "other")
        shutil.copy(tmp_path / "other" / file, path)
    else:
        data[len(data) // 2] ^= 0xFF
        path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "flip": data}[damage])
    with pytest.raises((ValueError, FileNotFoundError), match="catalogue"):
        Catalogue.load(folder)


def test_manifests_of_other_kinds(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Catalogue.load(tmp_path / "nowhere")
    folder = tmp_path / "catalogue"
    make().save(folder)
    manifest = json.loads((folder / "catalogue.json").read_text())
    for content, match in (
        ({**manifest, "format": 99}, "99"),
        (["other"], "other"),
        ({name: value for name, value in manifest.items() if name != "fingerprint"}, "fingerprint"),
        ({**manifest, "count": 5}, "5"),
        ({**manifest, "dimension": 77}, "77"),
    ):
        (folder / "catalogue.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=match):
            Catalogue.load(folder)


def test_only_a_folder_of_its_own_is_overwritten(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        make().save(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == b"precious"
    make().save(tmp_path / "deep" / "catalogue")
    make(ITEMS[:2]).save(tmp_path / "deep" / "catalogue")
    assert len(Catalogue.load(tmp_path / "deep" / "catalogue")) == 2
    assert os.listdir(tmp_path / "deep") == ["catalogue"]


def test_vectors_are_plain_safetensors(tmp_path):
    make().save(tmp_path / "catalogue")
    kept = load_file(tmp_path / "catalogue" / "vectors.safetensors")
    save_file(kept, tmp_path / "same")
    assert list(kept) == ["vectors"] and kept["vectors"].dtype == torch.float32
    assert len(pandas.read_parquet(tmp_path / "catalogue" / "items.parquet")) == len(ITEMS)


def test_without_pyarrow_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match="pip install pyarrow"):
        make().save(tmp_path / "catalogue")
