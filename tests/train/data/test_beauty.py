"""Amazon Beauty: ids and titles joined, the order of the file kept."""

import json

import pytest

from m6rec.train.data.beauty import UNTITLED, beauty_tables
from m6rec.train.data.log import DataArguments, read_log
from m6rec.train.data.splits import hold_out
from tests.conftest import real_data


def write_beauty(folder):
    maps = {"id2user": {"1": "ANNA", "2": "BEN"}, "id2item": {"1": "B01", "2": "B02", "3": "B03"}}
    (folder / "datamaps.json").write_text(json.dumps(maps))
    (folder / "item_id_to_int.json").write_text('{"B03": 7, "B01": 5, "B02": 6, "B99": 8}')
    rows = [",global_product_id,name", '0,6,"Shea &amp; Cocoa,  8 oz"', "1,7,", "2,5,Soap &#9733; 肥皂", "3,8,Unsold"]
    (folder / "products_lookup.csv").write_text("\n".join(rows), encoding="utf-8")
    (folder / "sequential.txt").write_text("1 3 1 2\n2 2 3 1\n")
    return folder


def test_purchases_and_titles_by_hand(tmp_path):
    events, items, users = beauty_tables(write_beauty(tmp_path))
    assert users is None
    assert events.to_numpy().tolist() == [
        *(["ANNA", item, "buy"] for item in ("B03", "B01", "B02")),
        *(["BEN", item, "buy"] for item in ("B02", "B03", "B01")),
    ]
    assert items.to_numpy().tolist() == [["B01", "Soap ★ 肥皂"], ["B02", "Shea & Cocoa, 8 oz"], ["B03", UNTITLED]]


def test_the_published_split_is_leave_one_out(tmp_path):
    log = read_log(DataArguments(source="amazon-beauty", directory=str(write_beauty(tmp_path))))
    split = hold_out(log.interactions, "published", "fresh", seed=3)
    parts = [part["item_id"].tolist() for part in (split.train, split.valid, split.test)]
    assert parts == [["B03", "B02"], ["B01", "B03"], ["B02", "B01"]]


def test_times_are_read_where_they_are_known(tmp_path):
    folder = write_beauty(tmp_path)
    times = [(2, 0, 2, 50), (2, 1, 3, 50), (2, 2, 1, 60), (1, 0, 3, 20), (1, 1, 1, 10), (1, 2, 2, 30)]
    rows = ["user,place,item,timestamp", *(",".join(map(str, row)) for row in times)]
    (folder / "times.csv").write_text("\n".join(rows))
    events, _, _ = beauty_tables(folder)
    assert events["timestamp"].tolist() == [20, 20, 30, 50, 50, 60]  # the second would run backwards
    (folder / "times.csv").write_text("\n".join(rows[:-1]))
    with pytest.raises(ValueError, match="5 rows; expected one for each of the 6 purchases"):
        beauty_tables(folder)


def test_a_missing_file_is_named(tmp_path):
    write_beauty(tmp_path)
    (tmp_path / "datamaps.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no datamaps\.json; expected the folder of amazon-beauty"):
        beauty_tables(tmp_path)


@pytest.mark.real_data
def test_beauty_is_complete():
    log = read_log(DataArguments(source="amazon-beauty", directory=str(real_data("amazon-beauty"))))
    events = log.interactions
    assert (events["user_id"].nunique(), events["item_id"].nunique(), len(events)) == (22_363, 12_101, 198_502)
    assert (log.items["title"] == UNTITLED).sum() == 7
    assert log.item_fields("B001DJ2USM") == {"title": UNTITLED}
    assert not log.items["title"].str.contains("&#|&amp;").any()
    if log.interactions["timestamp"].notna().all():  # with times.csv, which adds days and changes nothing else
        published = hold_out(log.interactions, "published", "fresh")
        last = log.interactions.groupby("user_id", sort=True, observed=True)["item_id"].last()
        assert published.test["item_id"].tolist() == last.tolist()
        assert 6000 < hold_out(log.interactions, "time", "time").test["user_id"].nunique() < 6200
