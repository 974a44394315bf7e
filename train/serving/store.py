"""Events of users and changes of items, in a database that all workers of a service share.

SQLite (in WAL mode) is the default, PostgreSQL is chosen by its URL; both run the same SQLAlchemy Core statements. A
write is acknowledged after it is on the disk, so that a killed process loses none that was acknowledged.
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import sqlalchemy
from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Double,
    Index,
    Integer,
    MetaData,
    Select,
    Table,
    Text,
    bindparam,
    delete,
    func,
    insert,
    select,
)
from sqlalchemy.engine import make_url

from ...values_m6rec import normalize_id, short

WAITING = 30
"""Seconds that a write of SQLite waits for another process's write."""
ROWS_AT_ONCE = 5000
"""Rows that are read or written together when tables are moved."""
NUMBER = BigInteger().with_variant(Integer, "sqlite")
"""Type of row numbers: SQLite counts only INTEGER columns itself."""

TABLES = MetaData()
EVENTS = Table(
    "events",
    TABLES,
    Column("number", NUMBER, primary_key=True, autoincrement=True),
    Column("user_id", Text, nullable=False),
    Column("moment", Double, nullable=False),  # seconds since 1970
    Column("event", Text, nullable=False),  # JSON of the event, as in a request
    Index("events_by_user", "user_id", "moment", "number"),
    Index("events_by_moment", "moment"),
)
CHANGES = Table(
    "changes",
    TABLES,
    Column("number", NUMBER, primary_key=True, autoincrement=True),
    Column("kind", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("content", Text, nullable=False),
    Index("changes_by_name", "kind", "name"),
    sqlite_autoincrement=True,  # a number is never used twice, also after its row was deleted
)
"""What workers have to apply, in this order: items (kind "item", content their JSON with `removed`), the model (kind
"model"), and that something about users was deleted (kind "forget"). Only the newest row of a name is kept."""


def _newest() -> Select:
    """Return the statement that reads the newest events, at most `most` of each of the `users`."""
    newest = EVENTS.c.moment.desc(), EVENTS.c.number.desc()
    place = func.row_number().over(partition_by=EVENTS.c.user_id, order_by=newest).label("place")
    asked = EVENTS.c.user_id.in_(bindparam("users", expanding=True))
    own = select(EVENTS, place).where(asked).subquery()
    rows = select(own.c.user_id, own.c.moment, own.c.event).where(own.c.place <= bindparam("most"))
    return rows.order_by(own.c.moment, own.c.number)


NEWEST = _newest()
"""Made once: making it takes as long as running it."""


class Change(NamedTuple):
    """One row of CHANGES."""

    number: int
    kind: str
    name: str
    content: dict[str, Any]


class Store:
    """The database of a service.

    Args:
        location: The file of a SQLite database, which is created if it does not exist, or an SQLAlchemy URL such as
            `postgresql+psycopg://user@host/name`.

    Raises:
        ValueError: The URL is of another kind of database.
    """

    def __init__(self, location: str | Path) -> None:
        text = str(location)
        url = make_url(text if "://" in text else f"sqlite:///{Path(text).absolute()}")
        if url.get_backend_name() not in ("sqlite", "postgresql"):
            raise ValueError(f"{short(text)}: events are kept in SQLite (a file) or PostgreSQL (postgresql+psycopg://)")
        self.is_sqlite = url.get_backend_name() == "sqlite"
        if self.is_sqlite and url.database:
            Path(url.database).parent.mkdir(parents=True, exist_ok=True)
        waiting = {"connect_args": {"timeout": WAITING, "check_same_thread": False}} if self.is_sqlite else {}
        self._engine = sqlalchemy.create_engine(url, pool_pre_ping=not self.is_sqlite, **waiting)
        if self.is_sqlite:
            sqlalchemy.event.listen(self._engine, "connect", _prepare_sqlite)
            sqlalchemy.event.listen(self._engine, "begin", _begin_sqlite)
        self._writer = self._engine.execution_options(writing=True)
        with self._writing() as connection:
            TABLES.create_all(connection)

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        with self._writer.begin() as connection:
            if not self.is_sqlite:
                # Workers that start together create the tables one after the other, and numbers of changes become
                # visible in their order.
                connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7162)")
            yield connection

    # ----------------------------------------------------------------------------------------------------------- events

    def add_events(self, events: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        """Keep events, all or none of them; they are on the disk when this returns.

        Args:
            events: (user id, event as in a request) each; an event without a `timestamp`, in seconds, gets the present.
        """
        now = time.time()
        rows = [
            {
                "user_id": user,
                "moment": float(now if event.get("timestamp") is None else event["timestamp"]),
                "event": json.dumps({name: value for name, value in event.items() if name != "timestamp"}),
            }
            for user, event in events
        ]
        # Rows of events need no common order of numbers, so that writers of PostgreSQL need not wait for each other.
        with self._writer.begin() as connection:
            for start in range(0, len(rows), ROWS_AT_ONCE):
                connection.execute(insert(EVENTS), rows[start : start + ROWS_AT_ONCE])

    def histories(self, user_ids: Iterable[str], most: int) -> dict[str, list[dict[str, Any]]]:
        """Return the newest events of users, at most `most` each, the oldest first, as in a request."""
        found: dict[str, list[dict[str, Any]]] = {user: [] for user in user_ids}
        with self._engine.connect() as connection:
            for user, moment, event in connection.execute(NEWEST, {"users": list(found), "most": most}):
                found[user].append({**json.loads(event), "timestamp": moment})
        return found

    def all_events(self) -> Iterator[tuple[str, float, dict[str, Any]]]:
        """Yield user id, moment and event of all events, in the order of time."""
        order = EVENTS.c.moment, EVENTS.c.number
        rows = select(EVENTS.c.user_id, EVENTS.c.moment, EVENTS.c.event).order_by(*order)
        with self._engine.connect().execution_options(yield_per=ROWS_AT_ONCE) as connection:
            for user, moment, event in connection.execute(rows):
                yield user, moment, json.loads(event)

    def delete_user(self, user_id: str) -> int:
        """Delete all events of a user, also from the free space of SQLite's files; returns their number."""
        with self._writing() as connection:
            count = connection.execute(delete(EVENTS).where(EVENTS.c.user_id == user_id)).rowcount
            self._put(connection, "forget", "", {})  # without the id: nothing about the user stays
        self._erase()
        return count

    def delete_before(self, moment: float) -> int:
        """Delete the events before a moment, in seconds since 1970; returns their number."""
        with self._writing() as connection:
            count = connection.execute(delete(EVENTS).where(EVENTS.c.moment < moment)).rowcount
            if count:
                self._put(connection, "forget", "", {})
        if count:
            self._erase()
        return count

    def _erase(self) -> None:
        """Empty SQLite's journal, which holds what was deleted; `secure_delete` has overwritten the database itself."""
        if self.is_sqlite:
            with self._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")

    # ---------------------------------------------------------------------------------------------------------- changes

    def put_items(self, items: Sequence[Mapping[str, Any]]) -> None:
        """Record items that are added or changed, each with its `item_id`."""
        with self._writing() as connection:
            for item in items:
                self._put(connection, "item", str(item["item_id"]), {"item": dict(item)})

    def remove_item(self, item_id: str, item: Any) -> None:
        """Record that an item is removed; its text is kept for the histories that contain it."""
        with self._writing() as connection:
            self._put(connection, "item", item_id, {"item": item, "removed": True})

    def put_model(self, model: str, digest: str) -> None:
        """Record the model that all workers shall load."""
        with self._writing() as connection:
            self._put(connection, "model", "", {"model": model, "digest": digest})

    def changes(self, after: int) -> list[Change]:
        """Return the changes after a number, in their order."""
        # Every batch of requests asks; a statement of SQLAlchemy's own would cost twice the time.
        rows = f"SELECT number, kind, name, content FROM changes WHERE number > {int(after)} ORDER BY number"
        with self._engine.connect() as connection:
            found = connection.exec_driver_sql(rows).all()
        return [Change(number, kind, name, json.loads(text)) for number, kind, name, text in found]

    @staticmethod
    def _put(connection: Connection, kind: str, name: str, content: Mapping[str, Any]) -> None:
        connection.execute(delete(CHANGES).where((CHANGES.c.kind == kind) & (CHANGES.c.name == name)))
        connection.execute(insert(CHANGES).values(kind=kind, name=name, content=json.dumps(content)))

    def ping(self) -> None:
        """Raise if the database cannot be read."""
        with self._engine.connect() as connection:
            connection.execute(select(1))

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()


def user_name(value: Any) -> str:
    """Return a user id as text; PostgreSQL cannot hold the character NUL."""
    name = normalize_id(value, "user_id")
    if "\0" in name:
        raise ValueError(f"user_id: {short(name)} contains the character NUL: give another id")
    return name


def _prepare_sqlite(connection: Any, _: Any) -> None:
    """Let `_begin_sqlite` open transactions, and acknowledge a write only when it is on the disk."""
    connection.isolation_level = None
    for setting in ("journal_mode=WAL", "synchronous=FULL", "secure_delete=ON", f"busy_timeout={WAITING * 1000}"):
        connection.execute(f"PRAGMA {setting}").close()


def _begin_sqlite(connection: Connection) -> None:
    """Begin a write with the lock: a read that becomes a write fails if another process has written since."""
    writing = connection.get_execution_options().get("writing", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")


__all__ = ["Change", "Store", "user_name"]
