"""What a recommender learns from: one `Log`, read from the user's own tables or from MovieLens-100K."""

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import pandas
from datasets import Dataset

from .movielens import find_movielens, movielens_tables
from .tables import Table, load_table

logger = logging.getLogger(__name__)

ROLES = ("user_id", "item_id", "timestamp", "rating", "event", "label", "text")
Source = Literal["tables", "ml-100k"]


@dataclass
class DataArguments:
    """The `data:` section of a recipe.

    A table is a CSV, Parquet or JSONL file, a folder saved by `datasets`, or a Hub dataset id; of the latter two one
    split is named as `name:split` or `name:config:split`.
    """

    source: Source = "tables"
    """Where the log comes from: the user's own `tables`, or `ml-100k`."""
    interactions: str | None = None
    """Table of what users did: user_id, item_id, and as far as there are any timestamp, rating, event, label, text."""
    items: str | None = None
    """Table of items: item_id and text columns."""
    users: str | None = None
    """Table of users: user_id and text columns. None: nothing is known of users."""
    columns: dict[str, str] = field(default_factory=dict)
    """Role -> column, for each role whose column is not called like it; an id's is the same in all tables."""
    item_columns: list[str] | None = None
    """Columns of the items table that the model reads, in this order. None: all but the id."""
    directory: str | None = None
    """Folder of ml-100k. None: RecBole's wheel, else the folder M6REC_DATA."""
    min_rating_liked: float = 4.0
    """Lowest rating that counts as label 1, where there are ratings and no labels."""
    seed: int = 0
    """Seed of the order in which events of the same user and time are taken."""

    def __post_init__(self) -> None:
        if self.source not in get_args(Source):
            raise ValueError(f"data.source is {self.source!r}; expected one of {', '.join(get_args(Source))}")
        unknown = [role for role in self.columns if role not in ROLES]
        if unknown:
            raise ValueError(f"data.columns: unknown role {', '.join(unknown)}; the roles are {', '.join(ROLES)}")
        if not math.isfinite(self.min_rating_liked):
            raise ValueError(f"data.min_rating_liked is {self.min_rating_liked}; expected a finite number")
        tables = [name for name in ("interactions", "items", "users", "columns") if getattr(self, name)]
        if self.source == "ml-100k" and tables:
            raise ValueError(f"data.source 'ml-100k' has its own tables; remove data.{', data.'.join(tables)}")
        if self.source == "tables" and self.directory:
            raise ValueError(f"data.directory {self.directory!r} is read by data.source 'ml-100k' only")


@dataclass(frozen=True, eq=False)
class Log:
    """All events, items and users. Ids are text; every item that has an event is among the items."""

    interactions: pandas.DataFrame
    """user_id, item_id, timestamp (seconds since 1970, UTC; NaN everywhere where the table has no times); where given
    also rating, event, label (0 or 1) and text (empty where missing). Rows keep the table's order."""
    items: pandas.DataFrame
    """Text columns by item_id; what is missing is empty, and no row is empty altogether."""
    users: pandas.DataFrame | None = None
    """Text columns by user_id; what is missing is empty."""

    def item_fields(self, item_id: str) -> dict[str, str]:
        """The texts of an item by column, in order, without the empty ones."""
        if item_id not in self.items.index:
            raise KeyError(f"item {item_id!r} is not in the items table")
        return _filled(self.items, item_id)

    def user_fields(self, user_id: str) -> dict[str, str]:
        """The texts of a user by column, without the empty ones; nothing for a user whom no table describes."""
        if self.users is None or user_id not in self.users.index:
            return {}
        return _filled(self.users, user_id)


def _filled(texts: pandas.DataFrame, row: str) -> dict[str, str]:
    return {column: str(text) for column in texts.columns if (text := texts.at[row, column])}


def read_log(arguments: DataArguments) -> Log:
    """Reads what the `data:` section of a recipe names."""
    if arguments.source == "ml-100k":
        directory = Path(arguments.directory) if arguments.directory else find_movielens()
        interactions, items, users = (Dataset.from_pandas(table) for table in movielens_tables(directory))
        return build_log(interactions, items, users, arguments)
    if not (arguments.interactions and arguments.items):
        raise ValueError(
            "data.source 'tables' needs data.interactions and data.items, each a file or a dataset; got "
            f"{arguments.interactions!r} and {arguments.items!r}"
        )
    users = load_table(arguments.users) if arguments.users else None
    return build_log(load_table(arguments.interactions), load_table(arguments.items), users, arguments)


def read_movielens(directory: str | Path) -> Log:
    """Reads MovieLens-100K: every event is a "rate"; the label says whether the rating was 4 or 5."""
    return read_log(DataArguments(source="ml-100k", directory=str(directory)))


def build_log(interactions: Dataset, items: Dataset, users: Dataset | None, arguments: DataArguments) -> Log:
    """Checks and joins three tables that are already loaded.

    Args:
        interactions: One row an event.
        items: One row an item.
        users: One row a user.
        arguments: `columns`, `item_columns` and `min_rating_liked` are heeded.

    Returns:
        The log. An event that is there twice (same user, item, time and, where given, kind of event) is kept once;
        without times a repetition is an event of its own.
    """
    described = _texts(Table("items", items, arguments.columns), "item_id", arguments.item_columns)
    events = _events(Table("interactions", interactions, arguments.columns), described.index)
    if "label" not in events and "rating" in events:
        events["label"] = (events["rating"] >= arguments.min_rating_liked).astype(int)
    profiles = None if users is None else _texts(Table("users", users, arguments.columns), "user_id", None)
    return Log(events, described, profiles)


def _texts(table: Table, role: str, columns: list[str] | None) -> pandas.DataFrame:
    ids = table.unique_ids(role)
    if columns is None:
        columns = [name for name in table.rows.column_names if name != table.column(role)]
    texts = pandas.DataFrame({name: table.text(name).str.strip().to_numpy() for name in columns}, index=ids)
    if role == "item_id":
        empty = (texts == "").all(axis=1).reset_index(drop=True)
        read = ", ".join(columns) or "no column"
        table.refuse(empty, table.column(role), ids.to_series(), f"an item with some text in {read}")
    return texts


def _events(table: Table, item_ids: pandas.Index) -> pandas.DataFrame:
    events = pandas.DataFrame({role: table.ids(role) for role in ("user_id", "item_id")})
    unknown = ~events["item_id"].isin(item_ids)
    if unknown.any():
        missing = events["item_id"][unknown].unique()
        raise ValueError(
            f"{table.name}: {unknown.sum()} rows name {len(missing)} items that the items table does not have, "
            f"such as {', '.join(map(repr, missing[:5]))}"
        )
    timed = table.has("timestamp")
    if not timed:
        logger.warning("%s: no column 'timestamp': each user's events keep the order of the table", table.name)
    events["timestamp"] = table.seconds("timestamp") if timed else math.nan
    if table.has("rating"):
        events["rating"] = table.numbers("rating")
    if table.has("label"):
        labels = table.numbers("label")
        table.refuse(~labels.isin([0, 1]), table.column("label"), labels, "label 0 or 1")
        events["label"] = labels.astype(int)
    for role in ("event", "text"):
        if table.has(role):
            events[role] = table.text(table.column(role)).str.strip()
    return _without_duplicates(events) if timed else events


def _without_duplicates(events: pandas.DataFrame) -> pandas.DataFrame:
    known = [name for name in ("user_id", "item_id", "timestamp", "event") if name in events]
    kept = events.drop_duplicates(known, ignore_index=True)
    if len(kept) < len(events):
        logger.warning("interactions: dropped %d rows that repeat another's %s", len(events) - len(kept), known)
    return kept


__all__ = ["ROLES", "DataArguments", "Log", "build_log", "find_movielens", "read_log", "read_movielens"]
