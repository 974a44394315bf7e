"""The training data of a recommender: one `Log`, read from the user's own tables or from a named data set."""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy
import pandas
from datasets import Dataset

from ...values_m6rec import near_id, normalize_id
from .beauty import beauty_tables
from .dialogues import iard_dialogues, iard_tables, inspired_dialogues, inspired_tables
from .knowledge import Knowledge, with_facts
from .lastfm import lastfm_tables
from .movielens import find_movielens, movielens_tables
from .redaction import without_names
from .reviews import clothing_tables, gift_card_tables
from .splits import PARTS, tie_keys
from .tables import Table, find_folder, load_table
from .tallrec import tallrec_tables
from .tasks import further_columns
from .times import ORDER, check_form

logger = logging.getLogger(__name__)

ROLES = ("user_id", "item_id", "timestamp", "rating", "event", "label", "text", "part")
"""Roles of the columns of tables; further scoring tasks add their own."""
Frames = tuple[pandas.DataFrame, pandas.DataFrame, pandas.DataFrame | None]


@dataclass(frozen=True)
class Source:
    """A named data set."""

    read: Callable[[Path, int], Frames]
    """Reads interactions, items and users, given its folder and `data.seed`."""
    find: Callable[[], Path]
    """Finds its folder if the recipe names none."""
    dialogues: Callable[[Path, int], pandas.DataFrame] | None = None
    """Reads its dialogues, if it has any: columns dialogue_id, speaker (user or assistant), text, item_id, part."""


SOURCES = {
    "ml-100k": Source(lambda folder, seed: movielens_tables(folder), find_movielens),
    "amazon-beauty": Source(
        lambda folder, seed: beauty_tables(folder),
        partial(find_folder, "amazon-beauty", "P5's Amazon Beauty (sequential.txt, datamaps.json), with its titles"),
    ),
    "lastfm": Source(lastfm_tables, partial(find_folder, "lastfm", "hetrec2011-lastfm-2k of grouplens.org")),
    "tallrec": Source(
        lambda folder, seed: tallrec_tables(folder),
        partial(find_folder, "tallrec-movie", "the folder data/movie of TALLRec's repository"),
    ),
    "clothing-reviews": Source(
        clothing_tables, partial(find_folder, "clothing-reviews", "Women's E-Commerce Clothing Reviews, as Parquet")
    ),
    "gift-cards": Source(
        gift_card_tables, partial(find_folder, "gift-cards", "Amazon's Gift Cards of 2018, 5-core, with metadata")
    ),
    "movie-dialogues": Source(
        iard_tables,
        partial(find_folder, "movie-dialogues", "IARD's annotated dialogues and the films of MovieLens-25M"),
        iard_dialogues,
    ),
    "inspired": Source(
        inspired_tables,
        partial(find_folder, "inspired", "INSPIRED (dev.tsv, test.tsv), and movie-dialogues next to it"),
        inspired_dialogues,
    ),
}


@dataclass
class DataArguments:
    """The `data:` section of a recipe.

    A table is a CSV, Parquet or JSONL file, a folder saved by `datasets`, or a Hub dataset id; for the latter two a
    split is given as `name:split` or `name:config:split`.
    """

    source: str = "tables"
    """Source of the log: the user's own `tables`, or the name of a data set in SOURCES."""
    interactions: str | None = None
    """Table of events: columns user_id, item_id, and optionally timestamp, rating, event, label, text."""
    items: str | None = None
    """Table of items: column item_id and text columns."""
    users: str | None = None
    """Table of users: column user_id and text columns. None: users have no description."""
    columns: dict[str, str | None] = field(default_factory=dict)
    """Role -> column, for each role whose column has another name; an id column has the same name in all tables. None:
    no column has that role, even if its name fits. The role `part` (train, valid or test, for
    `evaluation.split: given`) is read only if it is named here."""
    time_format: str | None = None
    """Format of the column of times. None: seconds, milliseconds, microseconds or nanoseconds since 1970, by their
    magnitude, or ISO 8601. Else one of these units, `excel` (days of a spreadsheet), a format such as `%d.%m.%Y`, or
    `order`: numbers that give the order of a user's events but not the time between them."""
    item_columns: list[str] | None = None
    """Columns of the items table that the model reads, in this order. None: all but the id."""
    knowledge: str | None = None
    """Table of triples (columns head, relation, tail) whose facts are added to the texts of items, as the field
    `facts`; needs `knowledge_relations`."""
    knowledge_relations: dict[str, str] = field(default_factory=dict)
    """Relation -> its wording, such as `directed_by: "directed by {value}"`; other relations are left out."""
    knowledge_links: str | None = None
    """Table with columns item_id and entity, the head of the item's triples. None: heads are item ids."""
    knowledge_names: str | None = None
    """Table with columns entity and name, of the tails. None: tails are words; ids such as m.0abc are refused."""
    knowledge_values: int = 3
    """Maximum number of values of a relation of an item."""
    redact: bool = False
    """Replace names of persons, mail and web addresses and telephone numbers in the texts of events, and in the column
    `facts` of the users, by "…". Names are words that are always capitalised within sentences and in no item's text."""
    drop_invalid: bool = False
    """Leave out rows that cannot be used, and count them by reason, instead of raising an error."""
    directory: str | None = None
    """Folder of a named data set. None: searched for in the folder M6REC_DATA (ml-100k first in RecBole's wheel)."""
    min_rating_liked: float = 4.0
    """Lowest rating that counts as label 1, if there are ratings and no labels."""
    seed: int = 0
    """Seed of the order of events with the same user and time."""

    def __post_init__(self) -> None:
        if self.source != "tables" and self.source not in SOURCES:
            raise ValueError(f"data.source is {self.source!r}; expected one of tables, {', '.join(SOURCES)}")
        roles = (*ROLES, *further_columns())
        unknown = [role for role in self.columns if role not in roles]
        if unknown:
            raise ValueError(f"data.columns: unknown role {', '.join(unknown)}; the roles are {', '.join(roles)}")
        required = [role for role in ("user_id", "item_id") if self.columns.get(role, role) is None]
        if required:
            raise ValueError(f"data.columns.{required[0]} is null, and no event is without it: name its column")
        check_form(self.time_format)
        self._check_knowledge()
        if not math.isfinite(self.min_rating_liked):
            raise ValueError(f"data.min_rating_liked is {self.min_rating_liked}; expected a finite number")
        tables = [name for name in ("interactions", "items", "users", "columns") if getattr(self, name)]
        if self.source in SOURCES and tables:
            raise ValueError(f"data.source {self.source!r} has its own tables; remove data.{', data.'.join(tables)}")
        if self.source == "tables" and self.directory:
            raise ValueError(f"data.directory {self.directory!r} is read by data.source {', '.join(SOURCES)} only")

    def _check_knowledge(self) -> None:
        given = [name for name in ("relations", "links", "names") if getattr(self, f"knowledge_{name}")]
        if given and not self.knowledge:
            raise ValueError(f"data.knowledge_{given[0]} goes with data.knowledge, the table of triples: give both")
        if self.knowledge:
            _ = self.facts

    @property
    def facts(self) -> Knowledge | None:
        """What is known of items beyond their table."""
        if self.knowledge is None:
            return None
        own = (self.knowledge_relations, self.knowledge_links, self.knowledge_names, self.knowledge_values)
        return Knowledge(self.knowledge, *own)


@dataclass(frozen=True, eq=False)
class Log:
    """All events, items and users. Ids are text; every item with an event is in `items`."""

    interactions: pandas.DataFrame
    """Columns user_id, item_id, timestamp (seconds since 1970, UTC; all NaN if the table has no times); if given also
    rating (NaN if unknown), event, label (0 or 1, NaN if unknown), text (empty if missing), part, and numbers of
    further scoring tasks (NaN if unknown). Rows keep the table's order, or have that of `data.time_format: order`. Ids,
    events and parts are categorical: about 30 bytes a row, plus its text."""
    items: pandas.DataFrame
    """Text columns by item_id; missing cells are empty, and no row is entirely empty."""
    users: pandas.DataFrame | None = None
    """Text columns by user_id; missing cells are empty."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Reason -> number of rows left out for it."""
    dialogues: pandas.DataFrame | None = None
    """Utterances of a data set with dialogues: dialogue_id, speaker (user or assistant), text, item_id (of the item
    that it recommends, else empty), part."""

    def item_fields(self, item_id: str) -> dict[str, str]:
        """The texts of an item by column, in order, without the empty ones."""
        known = normalize_id(item_id, "item_id")
        if known not in self.items.index:
            raise KeyError(f"item {item_id!r} is not in the items table{nearly(known, self.items.index)}")
        return _filled(self._item_columns, self.items.index.get_loc(known))

    def user_fields(self, user_id: str) -> dict[str, str]:
        """The texts of a user by column, without the empty ones; nothing for a user without a description."""
        known = normalize_id(user_id, "user_id")
        if self.users is None or known not in self.users.index:
            return {}
        return _filled(self._user_columns, self.users.index.get_loc(known))

    @cached_property
    def _item_columns(self) -> dict[str, numpy.ndarray]:
        return _columns(self.items)

    @cached_property
    def _user_columns(self) -> dict[str, numpy.ndarray]:
        assert self.users is not None
        return _columns(self.users)


def _columns(texts: pandas.DataFrame) -> dict[str, numpy.ndarray]:
    """Return the columns as arrays: a cell of a data frame takes a hundred times as long to read."""
    return {column: texts[column].to_numpy(dtype=object) for column in texts.columns}


def _filled(columns: dict[str, numpy.ndarray], row: Any) -> dict[str, str]:
    return {column: str(text) for column, texts in columns.items() if (text := texts[row])}


def read_log(arguments: DataArguments) -> Log:
    """Reads the log that the `data:` section of a recipe names."""
    dialogues, facts = None, arguments.facts
    if arguments.source in SOURCES:
        source = SOURCES[arguments.source]
        folder = Path(arguments.directory) if arguments.directory else source.find()
        frames = source.read(folder, arguments.seed)
        dialogues = None if source.dialogues is None else source.dialogues(folder, arguments.seed)
        if "part" in frames[0]:
            arguments = dataclasses.replace(arguments, source="tables", directory=None, columns={"part": "part"})
        interactions, items, users = (
            None if frame is None else Dataset.from_pandas(frame, preserve_index=False) for frame in frames
        )
    elif arguments.interactions and arguments.items:
        interactions, items = load_table(arguments.interactions), load_table(arguments.items)
        users = load_table(arguments.users) if arguments.users else None
    else:
        raise ValueError(
            "data.source 'tables' needs data.interactions and data.items, each a file or a dataset; got "
            f"{arguments.interactions!r} and {arguments.items!r}. Where there are items and no events yet, there is "
            "nothing to train on or to measure: m6rec fit --items ITEMS OUT makes a recommender of the items alone"
        )
    log = dataclasses.replace(build_log(interactions, items, users, arguments), dialogues=dialogues)
    return log if facts is None else dataclasses.replace(log, items=with_facts(log.items, facts))


def items_log(arguments: DataArguments) -> Log:
    """Reads a log without events: the items that the `data:` section of a recipe names."""
    if not arguments.items:
        raise ValueError("data.items is missing: name the table of items, a file or a dataset")
    described = _described("items", load_table(arguments.items), arguments)
    ids = pandas.Categorical([])
    events = pandas.DataFrame({"user_id": ids, "item_id": ids, "timestamp": numpy.array([], dtype=float)})
    for reason, count in described.dropped.items():
        logger.warning("dropped %d rows: %s", count, reason)
    texts = described.texts if arguments.facts is None else with_facts(described.texts, arguments.facts)
    return Log(events, texts, dropped=described.dropped)


def read_movielens(directory: str | Path) -> Log:
    """Reads MovieLens-100K: every event is a "rate"; the label says whether the rating was 4 or 5."""
    return read_log(DataArguments(source="ml-100k", directory=str(directory)))


def build_log(interactions: Dataset, items: Dataset, users: Dataset | None, arguments: DataArguments) -> Log:
    """Checks and joins three loaded tables.

    Args:
        interactions: One row per event.
        items: One row per item.
        users: One row per user.
        arguments: `columns`, `item_columns`, `drop_invalid` and `min_rating_liked` are used.

    Returns:
        The log. A duplicate event (same user, item, time and, if given, kind of event) is kept once; without times
        a repetition is a separate event.
    """
    described = _described("items", items, arguments)
    table = Table("interactions", interactions, arguments.columns, arguments.drop_invalid)
    events = _events(table, described.texts.index, arguments)
    if "label" not in events and "rating" in events:
        liked = (events["rating"] >= arguments.min_rating_liked).astype(float)
        events["label"] = _smallest(liked.where(events["rating"].notna()))
    kept = _in_order(_without_repeated(events, table), arguments.seed)
    profiles = None if users is None else _described("users", users, arguments)
    dropped = {**described.dropped, **table.dropped, **(profiles.dropped if profiles else {})}
    for reason, count in dropped.items():
        logger.warning("dropped %d rows: %s", count, reason)
    texts = profiles.texts if profiles else None
    if arguments.redact:
        kept, texts = without_names(kept, described.texts, texts)
    return Log(kept, described.texts, texts, dropped)


def _without_repeated(events: pandas.DataFrame, table: Table) -> pandas.DataFrame:
    when = ORDER if ORDER in events else "timestamp"
    if events[when].isna().all():
        return events
    known = [name for name in ("user_id", "item_id", when, "event") if name in events]
    repeated = repeated_rows(events[known])
    if not repeated.any():
        return events
    named = [table.column("timestamp") if name == ORDER else name for name in known]
    table.dropped[f"interactions: repeats another row's {', '.join(named)}"] = int(repeated.sum())
    return events[~repeated].reset_index(drop=True)


def _in_order(events: pandas.DataFrame, seed: int) -> pandas.DataFrame:
    """Sorts events by the column `order`, if there is one; ties are shuffled, as equal times are."""
    if ORDER not in events:
        return events
    rows = numpy.lexsort((tie_keys(events, seed), events[ORDER].to_numpy()))
    return events.drop(columns=ORDER).iloc[rows].reset_index(drop=True)


def nearly(item_id: str, known: Iterable[str]) -> str:
    """Return a hint for an error: the known id that differs from an unknown one only in spelling; empty if none."""
    near = near_id(item_id)
    found = next((each for each in known if near_id(each) == near), None)
    return "" if found is None else f"; {found!r} nearly is it: write the id alike"


def repeated_rows(rows: pandas.DataFrame) -> numpy.ndarray:
    """Mask of rows that repeat an earlier row; only rows with equal hashes are compared: pandas needs 70 bytes each."""
    hashes = pandas.util.hash_pandas_object(rows, index=False).to_numpy()
    ordered = numpy.sort(hashes)
    twice = numpy.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    repeated = numpy.zeros(len(rows), dtype=bool)
    if len(twice):
        suspects = numpy.flatnonzero(numpy.isin(hashes, twice))
        repeated[suspects] = rows.iloc[suspects].duplicated().to_numpy()
    return repeated


@dataclass(frozen=True)
class _Described:
    texts: pandas.DataFrame
    dropped: dict[str, int]


def _described(name: str, rows: Dataset, arguments: DataArguments) -> _Described:
    """Reads the texts of items or users from their table, by id."""
    table = Table(name, rows, arguments.columns, arguments.drop_invalid)
    role, columns = name.removesuffix("s") + "_id", arguments.item_columns if name == "items" else None
    ids = table.unique_ids(role)
    if columns is None:
        columns = [column for column in table.described() if column != table.column(role)]
    texts = pandas.DataFrame({column: table.text(column).str.strip().to_numpy() for column in columns}, index=ids)
    if name == "items":
        read = ", ".join(columns) or "no column"
        table.refuse((texts == "").all(axis=1), table.column(role), f"an item with some text in {read}")
    return _Described(table.kept(texts), table.dropped)


def _events(table: Table, item_ids: pandas.Index, arguments: DataArguments) -> pandas.DataFrame:
    events = pandas.DataFrame({role: table.ids(role) for role in ("user_id", "item_id")})
    known = events["item_id"].isin(item_ids)
    table.refuse(
        ~known,
        table.column("item_id"),
        "an item of the items table",
        lambda row: _nearly_known(events["item_id"][~known], item_ids),
    )
    if table.has("timestamp") and arguments.time_format == ORDER:
        events["timestamp"], events[ORDER] = math.nan, table.order("timestamp")
    elif table.has("timestamp"):
        events["timestamp"] = table.seconds("timestamp", arguments.time_format)
    else:
        logger.warning("%s: no column 'timestamp': each user's events keep the order of the table", table.name)
        events["timestamp"] = math.nan
    for role in ("rating", "label", *further_columns()):
        if table.has(role):
            events[role] = table.numbers(role)
    if "label" in events:
        table.refuse(~(events["label"].isin([0, 1]) | events["label"].isna()), table.column("label"), "label 0 or 1")
    if table.has("event"):
        events["event"] = table.words(table.column("event"), strip=True)
    if table.has("text"):
        events["text"] = table.text(table.column("text")).str.strip()
    if "part" in table.columns:  # a column with this name by chance may mean anything
        events["part"] = table.words(table.column("part"))
        table.refuse(~events["part"].isin(PARTS), table.column("part"), f"one of {', '.join(PARTS)}")
    events = table.kept(events).reset_index(drop=True)
    if "label" in events:
        events["label"] = _smallest(events["label"])
    return events


def _nearly_known(unknown: pandas.Series, item_ids: pandas.Index) -> str:
    """Return a hint: the number of unknown ids that differ from known ones in spelling only, and the first of them."""
    known = {near_id(item_id): item_id for item_id in reversed(item_ids)}
    near = {str(item_id): known[near_id(item_id)] for item_id in unknown.unique() if near_id(item_id) in known}
    if not near:
        return ""
    given, found = next(iter(near.items()))
    count = int(unknown.isin(list(near)).sum())
    return f"; {count} of these are nearly there, {given!r} as {found!r}: write ids alike in both tables"


def _smallest(labels: pandas.Series) -> pandas.Series:
    """Labels in a small number type: integers if all are known."""
    return labels.astype("float32" if labels.hasnans else "int8")


__all__ = [
    "ROLES",
    "SOURCES",
    "DataArguments",
    "Log",
    "Source",
    "build_log",
    "items_log",
    "nearly",
    "read_log",
    "read_movielens",
    "repeated_rows",
]
