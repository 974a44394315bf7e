"""Events of a store as tables, in both directions: what a service saw trains the next model."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pandas

from ...atomic_m6rec import atomic_file
from ...values_m6rec import normalize_id, short, time_seconds
from ..answering.loading import parse_json
from .store import ROWS_AT_ONCE, Store, user_name

NEEDED = ("user_id", "item_id")
EXPORTED = ("user_id", "item_id", "timestamp", "event", "rating")
FORMATS = (".csv", ".tsv", ".parquet", ".jsonl")


def import_events(store: Store, path: Path) -> int:
    """Write the events of a table with the columns `user_id` and `item_id`, and further ones of EXPORTED.

    Args:
        store: The store.
        path: A file of one of FORMATS.

    Returns:
        Number of events.

    Raises:
        ValueError: A column is missing, or a cell is invalid; then the rows before it may have been written.
    """
    count = 0
    for table in _chunks(path):
        missing = [name for name in NEEDED if name not in table.columns]
        if missing:
            raise ValueError(f"{path}: column {missing[0]!r} is missing; it has {', '.join(map(str, table.columns))}")
        names = [name for name in EXPORTED if name in table.columns]
        rows = table[names].astype(object).where(table[names].notna(), None).to_dict("records")
        events = [
            _event({str(name): own for name, own in row.items()}, f"{path}, row {count + number}")
            for number, row in enumerate(rows)
        ]
        store.add_events(events)
        count += len(events)
    return count


def _event(row: dict[str, Any], place: str) -> tuple[str, dict[str, Any]]:
    """Return the user and the event of a row; empty cells are absent."""
    try:
        filled = {name: value for name, value in row.items() if value is not None and value != ""}
        if missing := [name for name in NEEDED if name not in filled]:
            raise ValueError(f"{missing[0]} is empty")
        event: dict[str, Any] = {"item": {"item_id": normalize_id(filled["item_id"], "item_id")}}
        if "event" in filled:
            event["event"] = str(filled["event"])
        if "rating" in filled:
            event["rating"] = float(filled["rating"])
        if "timestamp" in filled:
            event["timestamp"] = time_seconds(filled["timestamp"], "timestamp")
        return user_name(filled["user_id"]), event
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from error


def _chunks(path: Path) -> Iterator[pandas.DataFrame]:
    if path.suffix not in FORMATS:
        raise ValueError(f"{path}: unknown suffix {short(path.suffix)}; expected one of {', '.join(FORMATS)}")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    if path.suffix == ".parquet":
        whole = pandas.read_parquet(path)
        yield from (whole.iloc[start : start + ROWS_AT_ONCE] for start in range(0, len(whole), ROWS_AT_ONCE))
        return
    if path.suffix == ".jsonl":
        with path.open("rb") as lines:
            objects = (parse_json(line) for line in lines if line.strip())
            while rows := list(islice(objects, ROWS_AT_ONCE)):
                yield pandas.DataFrame(rows, dtype=object)
        return
    separator = "\t" if path.suffix == ".tsv" else ","
    with pandas.read_csv(path, sep=separator, dtype=str, keep_default_na=False, chunksize=ROWS_AT_ONCE) as parts:
        yield from parts


def export_events(store: Store, path: Path) -> tuple[int, int]:
    """Write all events with an item of the catalogue as a table, in the order of time.

    Returns:
        Number of events written, and of events without an `item_id`, which a log cannot hold.
    """
    rows, left = [], 0
    for user, moment, event in store.all_events():
        item = event.get("item")
        if not isinstance(item, dict) or item.get("item_id") is None:
            left += 1
            continue
        row = {"user_id": user, "item_id": item["item_id"], "timestamp": moment}
        rows.append({**row, "event": event.get("event"), "rating": event.get("rating")})
    table = pandas.DataFrame(rows, columns=list(EXPORTED))
    for name in ("event", "rating"):
        if table[name].isna().all():
            table = table.drop(columns=name)
    _write(table, path)
    return len(rows), left


def export_items(store: Store, path: Path) -> int:
    """Write the items that were added to the store, or changed in it, as a table; returns their number."""
    items = [change.content for change in store.changes(0) if change.kind == "item"]
    rows = [{**content["item"]} for content in items if not content.get("removed")]
    _write(pandas.DataFrame(rows), path)
    return len(rows)


def _write(table: pandas.DataFrame, path: Path) -> None:
    if path.suffix not in FORMATS:
        raise ValueError(f"{path}: unknown suffix {short(path.suffix)}; expected one of {', '.join(FORMATS)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        if path.suffix == ".parquet":
            table.to_parquet(partial, index=False)
        elif path.suffix == ".jsonl":
            table.to_json(partial, orient="records", lines=True, force_ascii=False)
        else:
            table.to_csv(partial, index=False, sep="\t" if path.suffix == ".tsv" else ",")


__all__ = ["export_events", "export_items", "import_events"]
