"""Damaged and forged folders of a catalogue are refused in one way, before anything large is read."""

import hashlib
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import save, save_file

from m6rec import Catalogue
from m6rec.catalogue_m6rec import ITEMS, MANIFEST, VECTORS, read_catalogue, write_catalogue

SIZE = 4
ROWS = {f"i{number}": {"item_id": f"i{number}", "title": f"tent {number}"} for number in range(3)}
VALUES = torch.nn.functional.normalize(torch.arange(1.0, 13.0).view(3, SIZE), dim=-1)


@pytest.fixture
def folder(tmp_path):
    write_catalogue(tmp_path / "catalogue", ROWS, VALUES, "f" * 64)
    return tmp_path / "catalogue"


def test_items_keep_the_order_of_their_fields(tmp_path):
    rows = {
        "i0": {"item_id": "i0", "title": "tent", "brand": "North", "price": 3.5},
        "i1": {"item_id": "i1", "price": 2.0, "title": "shoes"},
        "i2": "a text",
        "i3": {"item_id": "i3", "brand": "Trail", "title": "lamp"},
    }
    write_catalogue(tmp_path / "catalogue", rows, VALUES[[0, 1, 2, 0]], "f" * 64)
    found = read_catalogue(tmp_path / "catalogue").items
    assert found == rows and [[*item] for item in found.values()] == [[*item] for item in rows.values()]


@pytest.mark.parametrize(
    "orders", [7, [{"rows": [0]}], [{"fields": ["brand"], "rows": [0]}], [{"fields": [], "rows": [9]}]]
)
def test_forged_orders_of_fields_are_refused(folder, orders):
    forge(folder, {"field_orders": orders})
    with pytest.raises(ValueError, match=f"{MANIFEST} is damaged"):
        read_catalogue(folder)


def forge(folder, manifest=None, **files):
    """Replace files and sign them, as a stranger can."""
    encoded = {**json.loads((folder / MANIFEST).read_text()), **(manifest or {})}
    for name, data in {"items": ITEMS, "vectors": VECTORS}.items():
        if name in files:
            (folder / data).write_bytes(files[name])
            encoded["sha256"][data] = hashlib.sha256(files[name]).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(encoded))


def table(rows, **options):
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink, **options)
    return sink.getvalue().to_pybytes()


def header(content, body=b""):
    text = json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text + body


def test_what_was_written_is_read(folder):
    kept = read_catalogue(folder)
    assert (kept.items, kept.fingerprint, kept.index) == (ROWS, "f" * 64, None)
    assert torch.equal(kept.vectors, VALUES) and kept.vectors.dtype == torch.float32
    forge(folder, vectors=save({"vectors": VALUES}, {"format": "pt"}))
    assert torch.equal(read_catalogue(folder).vectors, VALUES)


DEEP = "[" * 100_000
NAN = VALUES.clone().index_put_((torch.tensor(1), torch.tensor(2)), torch.tensor(float("nan")))
FORGED = {
    "items that are no table": {"items": b"PAR1 rubbish PAR1"},
    "items that are empty": {"items": b""},
    "items cut short": {"items": table(list(ROWS.values()))[:-20]},
    "items without an id": {"items": table([{"title": "a"}] * 3)},
    "an id that is a number": {"items": table([{"item_id": number} for number in range(3)])},
    "an id that is missing": {"items": table([{"item_id": "a"}, {"item_id": None}, {"item_id": "b"}])},
    "an id twice": {"items": table([{"item_id": name, "title": "a"} for name in "aba"])},
    "fewer rows": {"items": table(list(ROWS.values())[:2])},
    "more rows": {"items": table([*ROWS.values(), {"item_id": "i9", "title": "x"}])},
    "a text that is a number": {"items": table([{"item_id": name, "__text__": 7} for name in "abc"])},
    "JSON that is none": {
        "items": table([{"item_id": name, "tags": "{"} for name in "abc"]),
        "manifest": {"json_columns": ["tags"]},
    },
    "JSON nested too deep": {
        "items": table([{"item_id": name, "tags": DEEP} for name in "abc"]),
        "manifest": {"json_columns": ["tags"]},
    },
    "vectors that are rubbish": {"vectors": b"\xff" * 100},
    "vectors that are empty": {"vectors": b""},
    "a header that is no JSON": {"vectors": (2).to_bytes(8, "little") + b"{]" + b"\0" * 48},
    "a header that is a list": {"vectors": header([], b"\0" * 48)},
    "a header longer than the file": {"vectors": (10**9).to_bytes(8, "little") + b"{}"},
    "vectors of another type": {"vectors": save({"vectors": VALUES.half()})},
    "vectors of whole numbers": {"vectors": save({"vectors": VALUES.int()})},
    "vectors of another width": {"vectors": save({"vectors": VALUES[:, :2].contiguous()})},
    "fewer vectors": {"vectors": save({"vectors": VALUES[:2]})},
    "vectors by another name": {"vectors": save({"weights": VALUES})},
    "two tensors": {"vectors": save({"vectors": VALUES, "more": torch.ones(1)})},
    "NaN": {"vectors": save({"vectors": NAN})},
    "infinity": {"vectors": save({"vectors": NAN.nan_to_num(nan=float("inf"))})},
    "a count that is a truth value": {"manifest": {"count": True}},
    "a negative count": {"manifest": {"count": -1}},
    "a count that is huge": {"manifest": {"count": 10**30}},
    "a count that is a fraction": {"manifest": {"count": 3.0}},
    "no width": {"manifest": {"dimension": 0}},
    "a width that is a text": {"manifest": {"dimension": "4"}},
    "columns that are a text": {"manifest": {"json_columns": "tags"}},
    "columns that are numbers": {"manifest": {"json_columns": [1]}},
    "digests that are a list": {"manifest": {"sha256": []}},
    "digests that are numbers": {"manifest": {"sha256": {ITEMS: 1, VECTORS: 2}}},
    "a fingerprint that is none": {"manifest": {"fingerprint": None}},
    "an index that is a text": {"manifest": {"index": "hnsw"}},
    "a format that is a text": {"manifest": {"format": "1"}},
}


@pytest.mark.parametrize("what", FORGED)
def test_a_forged_folder_is_damaged(folder, what):
    forge(folder, **FORGED[what])
    with pytest.raises(ValueError, match=rf"{folder}.* is damaged"):
        Catalogue.load(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", DEEP.encode(), b"null"])
def test_a_manifest_that_is_none_is_damaged(folder, content):
    (folder / MANIFEST).write_bytes(content)
    with pytest.raises(ValueError, match=r"catalogue\.json is damaged"):
        Catalogue.load(folder)


@pytest.mark.parametrize("name", [ITEMS, VECTORS])
def test_a_folder_in_the_place_of_a_file(folder, name):
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        Catalogue.load(folder)


def test_rows_of_a_stranger_are_counted_before_they_are_read(folder, monkeypatch):
    """3 million rows of nothing take little room on the disk and gigabytes in memory."""
    sink = pyarrow.BufferOutputStream()
    count = 3_000_000
    pyarrow.parquet.write_table(pyarrow.table({"item_id": pyarrow.nulls(count, "string")}), sink)
    forge(folder, items=sink.getvalue().to_pybytes())
    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", None)
    with pytest.raises(ValueError, match=f"is damaged: expected 3 rows by {MANIFEST}, found {count}"):
        Catalogue.load(folder)
    forge(folder, {"count": count})  # then there have to be as many vectors
    with pytest.raises(ValueError, match=rf"do not hold {count} vectors of {SIZE} numbers"):
        Catalogue.load(folder)


def test_any_byte_that_is_wrong_is_noticed(folder):
    """Also by whoever signs it: what then loads is a whole catalogue."""
    chance = np.random.default_rng(0)
    whole = {name: (folder / name).read_bytes() for name in (ITEMS, VECTORS)}
    for name, key in ((ITEMS, "items"), (VECTORS, "vectors")):
        for place in chance.integers(0, len(whole[name]), 40):
            data = bytearray(whole[name])
            data[place] ^= 1 << int(chance.integers(8))
            (folder / name).write_bytes(data)
            with pytest.raises(ValueError, match="is damaged or of another catalogue"):
                Catalogue.load(folder)
            forge(folder, **{key: bytes(data)})
            try:
                kept = read_catalogue(folder)
            except ValueError as error:
                assert "is damaged" in str(error)
            else:
                assert len(kept.items) == len(kept.vectors) == 3 and kept.vectors.isfinite().all()
            forge(folder, **{key: whole[name]})


def test_other_files_are_no_part_of_a_catalogue(folder):
    save_file({"x": VALUES}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        write_catalogue(folder, ROWS, VALUES, "f" * 64)
