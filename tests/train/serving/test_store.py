"""The store of a service: what was acknowledged stays, what was deleted is gone, in SQLite and in PostgreSQL."""

import multiprocessing
import os
import random
import signal
import tempfile
import time
from pathlib import Path

import pandas
import pytest

from m6rec.train.config.recipe import load_recipe
from m6rec.train.data.log import read_log
from m6rec.train.serving.store import Store, user_name
from m6rec.train.serving.tables import export_events, export_items, import_events
from tests.fast import some
from tests.train.serving import database


@pytest.fixture(scope="module")
def postgres():
    if reason := database.missing():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # a socket's path is short
        Path(folder).chmod(0o755)
        with database.server(Path(folder)) as url:
            yield url


@pytest.fixture(params=some(["sqlite", "postgresql"], ["sqlite"]))
def location(request, tmp_path):
    if request.param == "sqlite":
        return str(tmp_path / "of its own" / "events.sqlite")
    return request.getfixturevalue("postgres")


@pytest.fixture
def store(location):
    opened = Store(location)
    with opened._writing() as connection:
        for table in ("events", "changes"):
            connection.exec_driver_sql(f"DELETE FROM {table}")
    yield opened
    opened.close()


def event(number, **more):
    return {"event": "buy", "item": {"item_id": f"i{number}"}, **more}


def test_a_history_is_in_the_order_of_time(store):
    store.add_events([("ann", event(2, timestamp=20.0)), ("bob", event(9, timestamp=5.0))])
    store.add_events([("ann", event(1, timestamp=10.0)), ("ann", event(3, timestamp=20.0))])
    found = store.histories(["ann", "bob", "nobody", "ann"], 10)
    assert found["ann"] == [event(1, timestamp=10.0), event(2, timestamp=20.0), event(3, timestamp=20.0)]
    assert found["bob"] == [event(9, timestamp=5.0)] and found["nobody"] == []
    assert store.histories(["ann"], 2)["ann"] == [event(2, timestamp=20.0), event(3, timestamp=20.0)]
    assert [(user, moment) for user, moment, _ in store.all_events()] == [
        ("bob", 5.0),
        ("ann", 10.0),
        ("ann", 20.0),
        ("ann", 20.0),
    ]


def test_an_event_without_a_time_happens_now(store):
    before = time.time()
    store.add_events([("ann", event(1)), ("ann", event(2, timestamp=0))])
    first, second = store.histories(["ann"], 10)["ann"]
    assert first["timestamp"] == 0 and before <= second["timestamp"] <= time.time()


def test_any_text_is_kept_as_it_is(store):
    text = "热\x00'; DROP TABLE events; --\ud800"
    store.add_events([("'; --", {"query": text, "timestamp": 1.0})])
    assert store.histories(["'; --"], 1)["'; --"] == [{"query": text, "timestamp": 1.0}]
    with pytest.raises(ValueError, match="NUL"):
        user_name("a\0b")


def test_of_several_events_all_are_written_or_none(store):
    with pytest.raises(TypeError):
        store.add_events([("ann", event(1)), ("ann", {"query": object()})])
    assert store.histories(["ann"], 5)["ann"] == []


def test_changes_come_in_their_order_and_only_the_newest_of_a_name(store):
    store.put_items([{"item_id": "a", "title": "x"}, {"item_id": "b", "title": "y"}])
    first = store.changes(0)
    store.put_items([{"item_id": "a", "title": "z"}])
    store.remove_item("b", {"item_id": "b", "title": "y"})
    store.put_model("folder", "digest")
    later = store.changes(first[-1].number)
    assert [(own.kind, own.name) for own in first] == [("item", "a"), ("item", "b")]
    assert [own.content for own in later] == [
        {"item": {"item_id": "a", "title": "z"}},
        {"item": {"item_id": "b", "title": "y"}, "removed": True},
        {"model": "folder", "digest": "digest"},
    ]
    assert store.changes(0) == later and store.changes(later[-1].number) == []


def test_a_number_of_a_change_is_not_used_again(store):
    seen = 0
    for _ in range(3):
        store.put_model("folder", "digest")
        (change,) = store.changes(seen)
        assert change.number > seen
        seen = change.number


def test_a_deleted_user_is_in_no_file(tmp_path):
    store = Store(tmp_path / "events.sqlite")
    secret = "a text that only ann wrote"
    for number in range(200):
        store.add_events([("ann-the-secret", {"query": f"{secret} {number}"}), ("bob", event(number))])

    def found(text):
        return [path.name for path in tmp_path.iterdir() if text.encode() in path.read_bytes()]

    assert found(secret) and found("ann-the-secret")
    assert store.delete_user("ann-the-secret") == 200
    assert not found(secret) and not found("ann-the-secret") and found("bob")
    assert store.histories(["bob"], 500)["bob"][-1]["item"] == {"item_id": "i199"}
    assert store.delete_before(time.time() + 1) == 200 and not found("bob")


def test_old_events_are_deleted_and_workers_are_told_to_forget(store):
    store.add_events([("ann", event(1, timestamp=10.0)), ("ann", event(2, timestamp=30.0))])
    assert store.delete_before(20.0) == 1 and store.delete_before(20.0) == 0
    assert store.histories(["ann"], 9)["ann"] == [event(2, timestamp=30.0)]
    assert [(own.kind, own.name, own.content) for own in store.changes(0)] == [("forget", "", {})]


def write_many(location, name, count):
    store = Store(location)
    for number in range(count):
        store.add_events([(name, event(number, timestamp=float(number)))])
        store.put_items([{"item_id": f"{name}-{number}", "title": "x"}])
    store.close()


def test_processes_write_at_once_and_changes_are_seen_in_their_order(location, store):
    names = ["a", "b", "c"]
    processes = [multiprocessing.get_context("fork").Process(target=write_many, args=(location, n, 30)) for n in names]
    for process in processes:
        process.start()
    seen, last = [], 0
    while any(process.is_alive() for process in processes) or store.changes(last):
        for change in store.changes(last):
            seen.append(change.name)
            last = change.number
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sorted(seen) == sorted(f"{name}-{number}" for name in names for number in range(30))
    for own in store.histories(names, 100).values():
        assert [each["timestamp"] for each in own] == [float(number) for number in range(30)]


def note(location, pipe):
    """Write pairs of events until killed; say each number once it is acknowledged."""
    store, number = Store(location), 0
    while True:
        store.add_events([("ann", event(number, part=part)) for part in (0, 1)])
        os.write(pipe, number.to_bytes(4, "little"))
        number += 1


@pytest.mark.parametrize("kills", some([3, 100], [3]))
def test_a_kill_at_any_moment_loses_nothing_that_was_acknowledged(location, store, kills):
    rng = random.Random(kills)
    for _ in range(kills):
        with store._writing() as connection:
            connection.exec_driver_sql("DELETE FROM events")
        reader, writer = os.pipe()
        process = multiprocessing.get_context("fork").Process(target=note, args=(location, writer))
        process.start()
        os.close(writer)
        first = os.read(reader, 4)  # it has begun
        time.sleep(rng.random() * 0.1)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        with open(reader, "rb") as pipe:
            acknowledged = (len(first) + len(pipe.read())) // 4
        events = [own for _, _, own in Store(location).all_events()]
        numbers = sorted((int(own["item"]["item_id"][1:]), own["part"]) for own in events)
        # The last pair may be written and not yet acknowledged; no pair is torn.
        assert numbers == [(number, part) for number in range(len(numbers) // 2) for part in (0, 1)]
        assert acknowledged <= len(numbers) // 2 <= acknowledged + 1


def test_other_databases_are_refused():
    with pytest.raises(ValueError, match="SQLite"):
        Store("mysql://somewhere/x")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".jsonl"])
def test_tables_go_in_and_out(store, tmp_path, suffix):
    rng = random.Random(1)
    rows = [
        {"user_id": f"{number % 7:03}", "item_id": f"{number % 11:05}", "timestamp": 1_700_000_000 + number}
        for number in range(100)
    ]
    rows = [{**row, "event": rng.choice(["buy", "view"]), "rating": rng.choice([1.0, 4.5])} for row in rows]
    table = pandas.DataFrame(rows)
    first, second = tmp_path / f"in{suffix}", tmp_path / f"out{suffix}"
    write = {".csv": table.to_csv, ".parquet": table.to_parquet}
    if suffix == ".jsonl":
        table.to_json(first, orient="records", lines=True)
    elif suffix == ".tsv":
        table.to_csv(first, sep="\t", index=False)
    else:
        write[suffix](first, index=False)
    assert import_events(store, first) == 100
    assert store.histories(["003"], 1)["003"] == [
        {"event": rows[94]["event"], "rating": rows[94]["rating"], "item": {"item_id": "00006"}}
        | {"timestamp": 1_700_000_094.0}
    ]
    store.add_events([("003", {"query": "a text", "timestamp": 1.0})])
    assert export_events(store, second) == (100, 1)
    again = Store(tmp_path / "again.sqlite")
    assert import_events(again, second) == 100
    del rows[-1]
    assert [own for own in again.all_events()] == [own for own in store.all_events() if "query" not in own[2]]


def test_what_was_exported_is_a_log(store, tmp_path):
    store.add_events([(user, event(place, timestamp=1.7e9 + place)) for user in ("ann", "bob") for place in range(4)])
    store.put_items([{"item_id": f"i{place}", "title": f"thing {place}"} for place in range(5)])
    store.remove_item("i4", {"item_id": "i4", "title": "thing 4"})
    export_events(store, tmp_path / "events.csv")
    assert export_items(store, tmp_path / "items.csv") == 4
    names = [f"data.interactions={tmp_path}/events.csv", f"data.items={tmp_path}/items.csv"]
    log = read_log(load_recipe("own-data", names).data)
    assert len(log.interactions) == 8 and len(log.items) == 4


@pytest.mark.parametrize(
    ("text", "match"),
    [("user_id,timestamp\na,1\n", "'item_id' is missing"), ("user_id,item_id\na,\n", "row 0: item_id is empty")]
    + [("user_id,item_id,timestamp\na,b,soon\n", "row 0: timestamp"), ("user_id,item_id,rating\na,b,x\n", "row 0")],
)
def test_a_table_that_cannot_be_read_says_where(store, tmp_path, text, match):
    (tmp_path / "events.csv").write_text(text)
    with pytest.raises(ValueError, match=match):
        import_events(store, tmp_path / "events.csv")
    with pytest.raises(ValueError, match="suffix"):
        import_events(store, tmp_path / "events.doc")
