"""Finds the roles of a table's columns: by usual names, else by the cells."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy
import pandas
import pyarrow
from datasets import Dataset

from .tables import Table
from .times import ORDER, TIME_SCALES, in_form, read_times

NAMES: dict[str, tuple[str, ...]] = {
    "user_id": (
        *("user_id", "user", "uid", "customer_id", "customer", "client_id", "client", "member_id", "member"),
        *("reviewer_id", "visitor_id", "visitor", "account_id", "account", "buyer_id", "person_id", "reader_id"),
        *("listener_id", "player_id", "profile_id", "household_id", "household", "subscriber_id", "device_id"),
        *("session_id", "session"),
    ),
    "item_id": (
        *("item_id", "item", "iid", "product_id", "product", "asin", "parent_asin", "sku", "article_id", "movie_id"),
        *("film_id", "book_id", "isbn", "song_id", "track_id", "artist_id", "video_id", "content_id", "news_id"),
        *("business_id", "game_id", "app_id", "recipe_id", "course_id", "listing_id", "place_id", "post_id", "id"),
    ),
    "timestamp": (
        *("timestamp", "time", "unix_review_time", "unix_timestamp", "datetime", "date", "created_at", "event_time"),
        *("ts", "event_timestamp", "purchase_date", "order_date", "invoice_date", "review_date", "visited_at", "when"),
    ),
    "rating": ("rating", "ratings", "stars", "overall", "score", "rate"),
    "event": ("event", "event_type", "action", "behavior", "behaviour", "behavior_type"),
    "label": ("label", "liked", "clicked", "click"),
}
"""Role -> usual names of its column, the surest first; case, spaces, dots and underscores are ignored."""
TITLES = ("title", "name", "item_name", "product_name", "product_title", "movie_title", "book_title", "headline")
FORMS = (
    *("%d.%m.%Y", "%d.%m.%Y %H:%M", "%d.%m.%Y %H:%M:%S", "%m/%d/%Y", "%m/%d/%Y %H:%M", "%m/%d/%Y %H:%M:%S"),
    *("%d/%m/%Y", "%d/%m/%Y %H:%M", "%d/%m/%Y %H:%M:%S", "%Y/%m/%d", "%Y/%m/%d %H:%M", "%Y/%m/%d %H:%M:%S"),
    *("%m %d, %Y", "%b %d, %Y", "%d %b %Y", "%Y%m%d", "%Y%m%d%H%M%S", "%Y-%m-%d %H:%M:%S UTC"),
)
"""Formats of times to try where the rule for times cannot read a column."""
LOOKED_AT = 10_000
"""Number of evenly spaced rows of a table from which a column's role is inferred."""
MOSTLY = 0.95
"""Share of a column's filled cells that must be of a kind for the column to be of that kind."""
SHARED = 0.5
"""Minimum share of the events' items that the items table holds, for two columns to hold the same ids."""
LONG = 300
"""Mean characters per cell from which a column is a description, which is left out if there is a title."""

_ADDRESS = re.compile(r"(https?://|www\.|/?[\w./-]+\.(jpe?g|png|gif|webp)\b)", re.I)
_CODE = re.compile(r"(?=.*\d)[\w:/.+-]+")
_NUMBER = re.compile(r"[-+]?[\d.,\s%$€£¥]*\d[\d.,\s%$€£¥]*")
_ID_NAME = re.compile(r"[_\s.-](id|ID|Id)$|[a-z]I[dD]$")
_DATE = re.compile(r"\d{4}-\d\d-\d\d([T ].*)?")


def plain_name(name: str) -> str:
    """Return a column's name without case, separators and RecBole's type.

    >>> plain_name("reviewerID"), plain_name("user_id:token"), plain_name("Customer ID")
    ('reviewerid', 'userid', 'customerid')
    """
    return re.sub(r"[^a-z0-9]", "", name.partition(":")[0].lower())


@dataclass(frozen=True)
class Found:
    """Roles of the columns of two tables."""

    columns: dict[str, str | None]
    """Role -> column of the events table; None: the table has no such column."""
    item_id: str
    """The column of ids in the items table."""
    item_columns: list[str]
    """Columns of the items table that are read as text, in this order."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Other columns of the items table -> why they are not read."""
    time_format: str | None = None


class Sample:
    """Rows of a table, spread evenly, column by column as text."""

    def __init__(self, name: str, rows: Dataset) -> None:
        self.name, self.rows = name, rows
        count = len(rows)
        places = numpy.unique(numpy.linspace(0, max(count - 1, 0), min(count, LOOKED_AT)).astype(int))
        self._sample = rows if len(places) == count else rows.select(places)
        self._table = Table(name, self._sample, {})
        self._cells: dict[str, pandas.Series] = {}

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return self.rows.column_names

    @cached_property
    def by_name(self) -> dict[str, str]:
        """Plain name -> column; the first of columns with equal plain names."""
        return {plain_name(column): column for column in reversed(self.columns)}

    def named(self, role: str) -> list[str]:
        """Columns with a usual name of a role, the surest first."""
        names = [plain_name(name) for name in NAMES[role]]
        return [self.by_name[name] for name in names if name in self.by_name]

    def cells(self, column: str) -> pandas.Series:
        """The filled cells of a column in the sample, as text; empty if the cells are not texts."""
        if column not in self._cells:
            try:
                texts = self._table.text(column).str.strip()
            except ValueError:  # objects within cells, mixed types
                texts = pandas.Series([], dtype="str")
            self._cells[column] = texts[texts != ""]
        return self._cells[column]

    def ids(self, column: str) -> pandas.Index:
        """The distinct ids of a column, in the sample."""
        return pandas.Index(self.cells(column).unique())

    def values(self, column: str) -> pyarrow.ChunkedArray:
        """The cells of a column in the sample."""
        return self._sample.with_format("arrow").select_columns([column])[:].column(0)


def find_columns(events: Dataset, items: Dataset, given: Mapping[str, str | None], time_format: str | None) -> Found:
    """Find the roles of the columns of two tables.

    Args:
        events: One row per event.
        items: One row per item.
        given: Role -> column that the user named; None: the table has no such column.
        time_format: The user's format; None: inferred.

    Raises:
        ValueError: A column cannot be found; the message lists the columns and says which setting names it.
    """
    what, about = Sample("events", events), Sample("items", items)
    _check_given(what, given)
    item, item_id = _item_columns(what, about, given)
    columns: dict[str, str | None] = {"item_id": item}
    named = given.get("user_id") or next((column for column in what.named("user_id") if column != item), None)
    columns["timestamp"], found_format = _time_column(what, given, [item, named], time_format)
    columns["user_id"] = named or _user_column(what, {item, columns["timestamp"]})
    taken = set(columns.values())
    for role in ("rating", "event", "label"):
        columns[role] = given[role] if role in given else _optional(what, role, taken)
        taken.add(columns[role])
    columns |= {role: column for role, column in given.items() if role not in columns}
    texts, left_out = pick_texts(about, item_id)
    return Found(columns, item_id, texts, left_out, found_format)


def find_item_columns(items: Dataset, given: Mapping[str, str | None]) -> Found:
    """Find the roles of the columns of a table of items without events.

    Args:
        items: One row per item.
        given: Role -> column that the user named.

    Raises:
        ValueError: No column holds ids; the message lists the columns and says which setting names it.
    """
    about = Sample("items", items)
    named = [given["item_id"]] if given.get("item_id") in about.columns else about.named("item_id")
    for column in [*named, *(name for name in about.columns if name not in named)]:
        ids = _all_texts(about, str(column))
        if len(ids) and (column in named or ids.is_unique) and (ids != "").all():
            texts, left_out = pick_texts(about, str(column))
            return Found({"item_id": str(column)}, str(column), texts, left_out)
    raise ValueError(
        f"which column of the items holds their ids? The columns are {', '.join(about.columns)}; none is called so, "
        "and in none all cells are filled and differ. Name it: data.columns.item_id=COLUMN"
    )


def _check_given(what: Sample, given: Mapping[str, str | None]) -> None:
    for role, column in given.items():
        if column is not None and column not in what.columns:
            raise ValueError(
                f"data.columns.{role}={column}: the events table has no such column; it has {', '.join(what.columns)}"
            )


def _item_columns(what: Sample, about: Sample, given: Mapping[str, str | None]) -> tuple[str, str]:
    """Find the columns of item ids in both tables: those with usual names if they share ids, else any that do."""
    own = given.get("item_id")
    named = [own] if own else what.named("item_id")
    usual = [*dict.fromkeys([*([own] if own in about.columns else []), *about.named("item_id")])]
    others = named if own else [column for column in what.columns if column not in what.named("user_id")]
    known = {column: set(_all_texts(about, column)) for column in usual}
    found = _sharing(what, named, known)
    if found is None:
        known |= {column: set(_all_texts(about, column)) for column in about.columns if column not in known}
        found = _sharing(what, [*dict.fromkeys([*named, *others])], known)
    if found is None:
        raise ValueError(
            "no column of the events names the items of the items table: none shares half of its ids, item_id, with a "
            f"column there. The events have the columns {', '.join(what.columns)}, the items {', '.join(about.columns)}"
            ". Name the column of the events (data.columns.item_id=COLUMN), and write ids alike in both tables"
        )
    return found


def _all_texts(about: Sample, column: str) -> pandas.Series:
    try:
        return Table(about.name, about.rows, {}).text(column).str.strip()
    except ValueError:
        return pandas.Series([], dtype="str")


def _sharing(what: Sample, columns: Sequence[str], known: Mapping[str, set[str]]) -> tuple[str, str] | None:
    for column in columns:
        ids = what.ids(column)
        for name, own in known.items():
            if len(ids) and len(own) > 1 and ids.isin(own).mean() >= SHARED:
                return column, name
    return None


def _user_column(what: Sample, taken: set[str | None]) -> str:
    """Find the column of users among those without a usual name: the one whose cells repeat as ids do.

    Of several, such as amounts, it is the only one whose name ends in "id".
    """
    aside = {*taken, *(column for role in ("timestamp", "rating", "event", "label") for column in what.named(role))}
    others = [column for column in what.columns if column not in aside and _may_be_users(what, column)]
    ids = [column for column in others if _ID_NAME.search(column)]
    for found in (others, ids):
        if len(found) == 1:
            return found[0]
    why = f"{', '.join(others)} may" if others else "none is called so, and none repeats as ids do"
    raise ValueError(
        f"which column of the events says who it was? The columns are {', '.join(what.columns)}; {why}. Name it: "
        "data.columns.user_id=COLUMN"
    )


def _may_be_users(what: Sample, column: str) -> bool:
    """Return whether a column's cells repeat as ids of users do, and are short."""
    cells = what.cells(column)
    distinct = cells.nunique()
    return bool(len(cells)) and 20 < 2 * distinct < 1.8 * len(cells) and cells.str.len().mean() <= 64


def _time_column(
    what: Sample, given: Mapping[str, str | None], taken: Sequence[str | None], time_format: str | None
) -> tuple[str | None, str | None]:
    """Find the column of times and their format."""
    if "timestamp" in given:
        column = given["timestamp"]
        return column, time_format or (time_form(what, column) if column else None)
    for column in what.named("timestamp"):
        if column not in taken:
            return column, time_format or time_form(what, column)
    for column in what.columns:
        if column not in taken and len(what.cells(column)) and _holds_times(what, column):
            return column, time_format
    return None, None


def _holds_times(what: Sample, column: str) -> bool:
    """Return whether a column of any name holds times of 1995 to 2100 by the rule for times."""
    seconds, _ = read_times(what.values(column), lambda values: pandas.Series(values.to_pylist(), dtype="str"))
    known = (seconds > 788918400) & (seconds < 4102444800)
    return bool(known.mean() >= MOSTLY) and len(numpy.unique(seconds[known])) > 1


def time_form(what: Sample, column: str) -> str | None:
    """Return the format of a column's times: None for the rule for times, else a format or `order`.

    Raises:
        ValueError: No format fits, or days and months cannot be distinguished.
    """
    cells = what.cells(column)
    if cells.empty:
        raise ValueError(f"column {column!r} of the events is empty: data.columns.timestamp=null reads no times")
    array = pyarrow.chunked_array([pyarrow.array(cells, pyarrow.large_string())])
    seconds, _ = read_times(what.values(column), lambda values: what.cells(column))
    if (~numpy.isnan(seconds)).mean() >= MOSTLY:
        return None
    found = {form: read for form in FORMS if (read := in_form(cells, form)).notna().mean() >= MOSTLY}
    if found:
        form, read = next(iter(found.items()))
        other = next((name for name, values in found.items() if not values.equals(read)), None)
        if other is not None:
            raise ValueError(
                f"column {column!r} of the events, such as {cells.iloc[0]!r}, reads as {form!r} and as {other!r}: say "
                f"which it is, data.time_format='{form}' or data.time_format='{other}'"
            )
        return form
    numbers = pandas.to_numeric(cells, errors="coerce")
    if numbers.notna().all() and len(array):
        return ORDER
    raise ValueError(
        f"column {column!r} of the events, such as {cells.iloc[0]!r}, is no time that is known here: say how it is "
        f"written, data.time_format='%d.%m.%Y %H:%M' or one of {', '.join([*TIME_SCALES, ORDER])}; or read none, "
        "data.columns.timestamp=null"
    )


def _optional(what: Sample, role: str, taken: Iterable[str | None]) -> str | None:
    """Find the column of an optional role: one with a usual name and suitable cells."""
    for column in what.named(role):
        cells = what.cells(column)
        if column in taken or cells.empty:
            continue
        numbers = pandas.to_numeric(cells, errors="coerce")
        fits = {
            "rating": bool(numbers.notna().all()) and cells.nunique() > 1,
            "label": bool(numbers.isin([0, 1]).all()) and cells.nunique() > 1,
            "event": cells.nunique() <= 50,
        }
        if fits[role]:
            return column
    return None


def pick_texts(about: Sample, item_id: str) -> tuple[list[str], dict[str, str]]:
    """Select the columns of items that are read as text: the title first, then the others in their order.

    Returns:
        The columns, and for each other column the reason why it is not read.
    """
    reasons = {column: _no_text(about, column) for column in about.columns if column != item_id}
    texts = [column for column, reason in reasons.items() if reason is None]
    titles = [plain_name(name) for name in TITLES]
    texts.sort(key=lambda column: titles.index(plain_name(column)) if plain_name(column) in titles else len(titles))
    lengths = {column: about.cells(column).str.len().mean() for column in texts}
    short = [column for column in texts if lengths[column] < LONG]
    left_out = {column: reason for column, reason in reasons.items() if reason is not None}
    left_out |= {column: "long texts" for column in texts if short and column not in short}
    return short or texts[:1], left_out


def _no_text(about: Sample, column: str) -> str | None:
    """Return why a column is not a text that describes items; None: it is one."""
    cells = about.cells(column)
    if cells.empty:
        return "empty, or no text"
    if cells.nunique() == 1:
        return "the same everywhere"
    parts = cells.str.split(r",\s*", regex=True).str[0]
    if _share(parts, _ADDRESS.match) >= SHARED:
        return "addresses"
    if _share(cells, _DATE.fullmatch) >= MOSTLY:
        return "dates"
    if _share(cells, _NUMBER.fullmatch) >= MOSTLY:
        return None if _are_years(cells) else "numbers"
    if cells.str.lower().isin(["true", "false", "yes", "no", "t", "f", "y", "n"]).all():
        return "yes or no"
    distinct = cells.nunique() / len(cells)
    codes = cells.str.replace(r",\s*", "", regex=True)
    if distinct > SHARED and _share(codes, _CODE.fullmatch) >= 0.8:
        return "codes"
    return None


def _are_years(cells: pandas.Series) -> bool:
    years = pandas.to_numeric(cells, errors="coerce")
    return bool(years.between(1800, 2100).mean() >= MOSTLY and (years.dropna() % 1 == 0).all())


def _share(cells: pandas.Series, holds: object) -> float:
    return float(numpy.mean([bool(holds(cell)) for cell in cells]))  # type: ignore[operator]


def write_items(items: Dataset, found: Found, path: Path) -> int:
    """Write the texts of items as a table whose id column has the name of the events' id column.

    Args:
        items: One row per item.
        found: Roles of its columns.
        path: The Parquet file to write.

    Returns:
        Number of items without text, for which their id is the text.
    """
    table = Table("items", items, {"item_id": found.item_id})
    ids = table.text(found.item_id).str.strip()
    texts = {column: table.text(column).str.strip() for column in found.item_columns if column != found.item_id}
    frame = pandas.DataFrame(texts or {"name": ids})
    empty = (frame == "").all(axis=1)
    frame.iloc[:, 0] = frame.iloc[:, 0].mask(empty, ids)
    frame = frame.rename(columns={column: f"{column}_text" for column in frame if column == found.columns["item_id"]})
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.assign(**{str(found.columns["item_id"]): ids}).to_parquet(path, index=False)
    return int(empty.sum()) if texts else len(ids)


__all__ = [
    "FORMS",
    "NAMES",
    "Found",
    "Sample",
    "find_columns",
    "find_item_columns",
    "pick_texts",
    "plain_name",
    "time_form",
    "write_items",
]
