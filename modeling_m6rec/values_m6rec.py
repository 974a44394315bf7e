"""Rules that text and model share: ids, times and numbers from users, limits of requests, table of scoring tasks."""

import math
import re
import reprlib
from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

import numpy as np

IGNORE_INDEX = -100
"""A label that every loss ignores."""

UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
"""Characters of Chinese and Japanese, which are written without spaces."""

WORD = re.compile(f"[{UNSPACED}]|[^\\W_{UNSPACED}]+")
"""A word of a script with spaces, or a single character of one without."""

RENAMED_KEYS = {
    # fields of a configuration
    "num_item_memory": "num_item_embeddings",
    "item_memory_dropout": "item_embedding_dropout",
    "word_memory": "bow_embeddings",
    "word_similarity": "tfidf_weight",
    "word_similarity_dim": "tfidf_dim",
    "new_item_bonus": "cold_item_bias",
    # arguments of a processor
    "forget_events": "truncation_stride",
    # keys of a recipe
    "item_memory": "item_embeddings",
    "rows_together": "group_user_rows",
    "gather_negatives": "cross_batch_negatives",
    "correct_popularity": "logq_correction",
    "cold_pretend": "cold_validation",
    # plans of the network
    "reuse": "shared_prefix",
}
"""Keys of version 0.1 in saved files, recipes and calls, and their names since 0.2."""

EXACT_FLOAT = 2**53
"""From this number on, a float no longer distinguishes neighbouring whole numbers."""

TIME_UNITS = {
    "seconds": (1e8, 1e11, 1.0),
    "milliseconds": (1e11, 1e14, 1e3),
    "microseconds": (1e14, 1e17, 1e6),
    "nanoseconds": (1e17, 1e20, 1e9),
}
"""Unit of a number since 1970 -> the magnitudes that are read in it (from, up to), and how many make a second.

Each reaches from 1973 to 5138. A smaller number is no time by itself: years (2019), written dates (20231114), days of a
spreadsheet (45244) and positions (0, 1, 2) are such numbers."""

WORDS, MOMENT = "words", "moment"
"""Forms of a time that is not a number: an ISO 8601 text, or a date or datetime."""

EARLIEST, LATEST = -62135596800.0, 1e11
"""Seconds of the first time, the beginning of the year 1, and the end, in 5138: as numbers these stay seconds."""

TIME_EXPECTED = (
    "seconds (also milliseconds, microseconds, nanoseconds) since 1970, an ISO 8601 date or time, or a datetime"
)

_SHORT = reprlib.Repr()

_SHORT.maxstring = _SHORT.maxother = 80

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]{1,4})?")

_YEAR_FIRST = re.compile(r"([0-9]{4})[-/.]([0-9]{1,2})(?:[-/.]([0-9]{1,2})(?:([T ])([0-9]{1,2})(:.*|[-+Z].*)?)?)?")

_DATE_DIGITS = {8: "%Y%m%d", 12: "%Y%m%d%H%M", 14: "%Y%m%d%H%M%S"}


def normalize_id(value: Any, place: str) -> str:
    """Return an id as text without surrounding white space: 7, 7.0 and "7" are one id; "007" stays "007".

    >>> normalize_id(7.0, "item_id"), normalize_id(" A ", "item_id")
    ('7', 'A')

    Args:
        value: A nonempty text, a whole number, or a float or decimal that is whole. A float must be below 2**53: from
            there on two ids may be the same float.
        place: Place of the value, for the error.

    Raises:
        ValueError: If it is none of these.
    """
    if isinstance(value, str):
        text = value.strip()
        if text and (text.isascii() or _is_unicode(text)):
            return text
    elif isinstance(value, int | Integral) and not isinstance(value, bool):
        if abs(int(value)) < 10**1000:
            return str(int(value))
    elif isinstance(value, Real | Decimal) and not isinstance(value, bool) and _is_finite(value):
        whole = int(value)  # type: ignore[arg-type]  # numbers.Real is no type to mypy
        if whole == value and (abs(whole) < EXACT_FLOAT or isinstance(value, Decimal)):
            return str(whole)
        raise ValueError(f"{place}: {short(value)} is no id: give a whole number below 2**53, or the id as a text")
    raise ValueError(
        f"{place}: {short(value)} ({type(value).__name__}) is no id: give a text that is not empty, or a whole number"
    )


def _is_finite(value: Any) -> bool:
    """Return whether a number is finite and, as a decimal, has at most 1000 digits: longer ones take minutes.

    A signalling NaN raises an error in most functions.
    """
    if isinstance(value, Decimal):
        return value.is_finite() and abs(value.adjusted()) < 1000
    return math.isfinite(value)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which no file can hold
        return False
    return True


def near_id(item_id: str) -> str:
    """Return a common form of ids that people may confuse: `00006`, `6.0` and `6`; `Ab-1` and `ab-1`.

    >>> near_id("00006"), near_id("6.0"), near_id("Ab-1 ")
    ('6', '6', 'ab-1')
    """
    text = "".join(each for each in item_id.casefold() if each.isprintable() and not each.isspace())
    found = re.fullmatch(r"[+]?0*([0-9]+)(?:\.0*)?", text)
    return found[1] if found else text


def time_seconds(value: Any, place: str, relative: bool = False) -> float:
    """Return a time as seconds since 1970, by one rule for requests and tables.

    A number, or a text with a number, is in seconds, milliseconds, microseconds or nanoseconds by its magnitude
    (TIME_UNITS). Any other text is an ISO 8601 date or time. Without a zone it is UTC. Times are cut to microseconds.

    >>> time_seconds(1577836800000, "timestamp"), time_seconds("2020-01-01T08:00+08:00", "timestamp")
    (1577836800.0, 1577836800.0)

    Args:
        value: A number, a text, a date or datetime, or such a scalar of NumPy or pandas.
        place: Place of the value, for the error.
        relative: Whether a number below the magnitude of all units is seconds since an arbitrary moment. A request may
            contain such numbers, since its text contains only the time between two events.

    Raises:
        ValueError: If it is not a time.
        TypeError: If its type is not a type of times.
    """
    return read_time(value, place, relative)[0]


def read_time(value: Any, place: str, relative: bool = False) -> tuple[float, str]:
    """Return a time as `time_seconds` does, and its form: a name of TIME_UNITS, WORDS or MOMENT."""
    if isinstance(value, np.datetime64):
        value = value.astype("datetime64[us]").item()  # None for "not a time", a number beyond the year 9999
        if not isinstance(value, datetime):
            raise ValueError(f"{place}: NaT, or a time beyond the year 9999: expected {TIME_EXPECTED}")
    if isinstance(value, date):
        return _of_date(value, place), MOMENT
    if isinstance(value, str):
        text = value.strip()
        if not _NUMBER.fullmatch(text):
            return _of_words(text, place), WORDS
        return _of_number(float(text), value, place, relative)
    if isinstance(value, bool) or not isinstance(value, Real | Decimal):
        raise TypeError(f"{place}: expected {TIME_EXPECTED}, got {type(value).__name__} ({short(value)})")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    return _of_number(number, value, place, relative)


def _of_number(number: float, given: Any, place: str, relative: bool) -> tuple[float, str]:
    if not math.isfinite(number):
        raise ValueError(f"{place}: {short(given)} is no time: expected a finite number, or {TIME_EXPECTED}")
    written = written_date(number)
    if written:
        raise ValueError(
            f"{place}: {short(given)} is no time: its digits are a date, write {written[0].isoformat()!r}; "
            f"expected {TIME_EXPECTED}"
        )
    size = abs(number)
    for unit, (first, last, in_a_second) in TIME_UNITS.items():
        if first <= size < last:
            return number / in_a_second, unit
    if relative and size < TIME_UNITS["seconds"][0]:
        return number, "seconds"
    raise ValueError(f"{place}: {short(given)} is no time: expected {TIME_EXPECTED}")


def written_date(number: float) -> tuple[datetime, str] | None:
    """Return the date in a number's digits, such as 20231114, and its form; None if the digits are not a date."""
    if not (1.9e7 <= number < 2.1e13 and number.is_integer()):
        return None
    digits = str(int(number))
    form = _DATE_DIGITS.get(len(digits))
    if form is None or not "1900" <= digits[:4] < "2100":
        return None
    try:
        return datetime.strptime(digits, form), form
    except ValueError:  # a month 13, an hour 24
        return None


def _of_date(value: date, place: str) -> float:
    if value != value:  # NaT
        raise ValueError(f"{place}: {value} is no time: expected {TIME_EXPECTED}")
    if not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    # pandas' own kind of datetime counts nanoseconds, and may lie beyond the year 9999
    fields = (value.year, value.month, value.day, value.hour, value.minute, value.second, value.microsecond)
    try:
        since = datetime(*fields, tzinfo=value.tzinfo or UTC, fold=value.fold) - _EPOCH
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{place}: {value} is no time between the years 1 and 5138: {error}") from error
    seconds = since.days * 86400 + since.seconds + since.microseconds / 1e6
    if not EARLIEST <= seconds < LATEST:
        raise ValueError(f"{place}: {value} is no time between the years 1 and 5138")
    return seconds


def _of_words(text: str, place: str) -> float:
    iso = re.sub(r" ?(UTC|GMT)$", "+00:00", text)
    if found := _YEAR_FIRST.fullmatch(iso):  # 2020-1-2 3:04 and 2020/01/02 are meant the same
        year, month, day, between, hour, rest = found.groups()
        iso = f"{year}-{month:0>2}-{day or '1':0>2}" + (f"{between}{hour:0>2}{rest or ''}" if hour else "")
    try:
        return _of_date(datetime.fromisoformat(iso), place)
    except ValueError as error:
        raise ValueError(f"{place}: {short(text)} is no time: expected {TIME_EXPECTED}") from error


def time_text(value: date, place: str) -> str:
    """Format a date or datetime in ISO form, in UTC if it has a zone, so that equal moments have equal texts.

    Raises:
        ValueError: If it is pandas' missing date, which is also a datetime.
    """
    _of_date(value, place)
    if not isinstance(value, datetime) or value.tzinfo is None:
        return value.isoformat()
    try:
        return value.astimezone(UTC).isoformat()
    except OverflowError as error:
        raise ValueError(f"{place}: {value} is not between the years 1 and 9999 in UTC") from error


def short(value: Any) -> str:
    """Return a short text of a value for an error."""
    if isinstance(value, int) and value.bit_length() > 300:
        return f"a whole number of {value.bit_length()} bits"
    text = _SHORT.repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


# ------------------------------------------------------------------------------------------------------ scoring tasks


@dataclass(frozen=True)
class ScoringTask:
    """A task that the score head answers for each target. Its labels are named NAME_labels everywhere.

    Attributes:
        outputs: Configuration -> names of its outputs in the score head.
        form: Configuration -> form of answer and loss: a name in FORMS of `losses_m6rec`.
        values: Configuration -> allowed labels, ascending. With classes, each value belongs to one output. None: labels
            are 0 or 1 for each output, or any number.
        advice: Advice in the error about a label that is not in `values`.
        details: Key of a ranked answer with the value of each output by name; the score is then their mean, and labels
            have one more axis. None: there is one value.
        about: Language -> text about the answer in a model card.
        by_default: Whether a score head has these outputs if the configuration has no `score_tasks`.
    """

    outputs: Callable[[Any], list[str]]
    form: Callable[[Any], str]
    values: Callable[[Any], list[float]] | None = None
    advice: str = ""
    details: str | None = None
    about: Mapping[str, str] = field(default_factory=dict)
    by_default: bool = False


def _rating_outputs(config: Any) -> list[str]:
    return ["rating"] if config.rating_loss == "regression" else [f"rating {value:g}" for value in config.rating_values]


SCORING_TASKS: dict[str, ScoringTask] = {
    "click": ScoringTask(
        outputs=lambda config: ["no click", "click"],
        form=lambda config: "chance",
        values=lambda config: [0.0, 1.0],
        about={
            "en": "the probability that a user clicks or likes an item",
            "zh": "用户点击或喜欢某物品的概率",
        },
        by_default=True,
    ),
    "rating": ScoringTask(
        outputs=_rating_outputs,
        form=lambda config: "number" if config.rating_loss == "regression" else "classes",
        values=lambda config: config.rating_values,
        advice="set rating_values, or rating_loss='regression'",
        about={"en": "the rating that a user is expected to give an item", "zh": "用户对某物品的预期评分"},
        by_default=True,
    ),
    "interaction": ScoringTask(
        outputs=lambda config: config.interactions,
        form=lambda config: "chances",
        details="interactions",
        about={
            "en": "the probability of each kind of interaction with an item",
            "zh": "用户与某物品发生各类互动的概率",
        },
        by_default=True,
    ),
}
"""The table of scoring tasks, by name, in the order of their outputs and of preference.

Further rows stand at the end, with `by_default` off, so that checkpoints from before load. How a task is learnt from a
log and measured is its row in `m6rec.train.data.tasks`."""


def label_field(task: str) -> str:
    """Return the name of the labels of a scoring task in batches and in `forward`."""
    return f"{task}_labels"


def labelled_task(name: str) -> str | None:
    """Return the scoring task whose labels have this name; None for other names.

    >>> labelled_task("click_labels"), labelled_task("retrieval_labels")
    ('click', None)
    """
    task = name.removesuffix("_labels")
    return task if task != name and task in SCORING_TASKS else None


# ------------------------------------------------------------------------------------------------ limits of a request


MAX_CHARACTERS = 100_000
"""Most characters of a text."""

MAX_EVENTS = 100_000
"""Most events of a history."""


class KnownItem(dict):
    """The fields of an item that are never changed, so that its formatted text can be kept with it.

    A catalogue holds its items in this form. Copies and pickles are plain mappings.

    Attributes:
        segment: A formatter and the segment that it has made of the item, once there is one.
    """

    __slots__ = ("segment",)

    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__(fields)
        self.segment: tuple[Any, Any] = (None, None)

    def __reduce__(self) -> tuple[type, tuple[dict[str, Any]]]:
        return dict, (dict(self),)


MAX_CANDIDATES = 100_000

MAX_FACTS = 10_000

MAX_VALUES = 10_000
"""Most values of a user, a moment, an event, a candidate or any other list, at all depths together."""

MAX_REQUEST_VALUES = 2_000_000
"""Most values of a whole request, at all depths together."""

MAX_DEPTH = 12
"""Largest depth of nested lists and mappings."""

LISTS = {"history": MAX_EVENTS, "candidates": MAX_CANDIDATES, "facts": MAX_FACTS}
"""Most entries of each list of a request."""

SIMPLE = frozenset({str, int, float, bool, type(None)})
"""Types of values that contain no other values."""


MAPPINGS = (dict, Mapping)
"""Classes of mappings; that of most comes first, since an abstract class is slow to check."""


def check_size(value: Any, place: str, most: int = MAX_VALUES, depth: int = MAX_DEPTH) -> None:
    """Refuse a value with too many values inside, or too deep nesting; it may contain itself.

    Args:
        value: Any value.
        place: Its place in the request, for the error.
        most: Most values inside, at all depths together.
        depth: Largest depth of nested lists and mappings.

    Raises:
        ValueError: If it is too large.
    """
    level, count = [value], 0
    for _ in range(depth + 1):
        below: list[Any] = []
        for each in level:
            inner = each.values() if type(each) is dict else each if type(each) is list else _inner(each)
            count += len(inner)
            if count > most:
                raise ValueError(f"{place}: more than {most:,} values, which is the limit: give fewer")
            below += [own for own in inner if type(own) not in SIMPLE]
        if not below:
            return
        level = below
    raise ValueError(
        f"{place}: lists and mappings stand within each other more than {depth} deep, which is the limit "
        f"(got {short(value)})"
    )


def check_lists(request: Mapping[str, Any]) -> None:
    """Refuse a request whose lists are too long, before any work that grows with them."""
    for name, most in LISTS.items():
        own = request.get(name)
        number = getattr(own, "ndim", 1) == 0  # an array or a tensor without a length
        if isinstance(own, Sized) and not isinstance(own, str | Mapping) and not number:
            check_count(len(own), name, most)


def check_characters(text: str, place: str, most: int = MAX_CHARACTERS) -> None:
    """Refuse a text that is too long."""
    if len(text) > most:
        raise ValueError(f"{place}: a text of {len(text):,} characters; the limit is {most:,}: shorten it")


def check_count(count: int, place: str, most: int) -> None:
    """Refuse too many entries of a list."""
    if count > most:
        raise ValueError(f"{place}: {count:,} entries; the limit is {most:,}: give fewer")


def _inner(value: Any) -> Any:
    """Return the values inside a value."""
    if isinstance(value, list | tuple):
        return value
    if isinstance(value, Mapping):
        return value.values()
    return value.ravel().tolist() if isinstance(value, np.ndarray) and value.dtype == object else ()


def rename_keys(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the keys of version 0.1 to their current names.

    >>> rename_keys({"word_similarity": 0.3, "hidden_size": 8})
    {'tfidf_weight': 0.3, 'hidden_size': 8}

    Args:
        fields: Fields of a configuration or a processor, or keys of a section of a recipe.

    Raises:
        ValueError: If a field is given under both names.
    """
    twice = {old: new for old, new in RENAMED_KEYS.items() if old in fields and new in fields}
    if twice:
        raise ValueError(f"both names of a field are given: {twice}; leave the older one out")
    return {RENAMED_KEYS.get(name, name): value for name, value in fields.items()}


__all__ = [
    "EARLIEST",
    "EXACT_FLOAT",
    "IGNORE_INDEX",
    "LATEST",
    "MAPPINGS",
    "MAX_CANDIDATES",
    "MAX_CHARACTERS",
    "MAX_DEPTH",
    "MAX_EVENTS",
    "MAX_FACTS",
    "MAX_REQUEST_VALUES",
    "MAX_VALUES",
    "MOMENT",
    "RENAMED_KEYS",
    "SCORING_TASKS",
    "SIMPLE",
    "TIME_EXPECTED",
    "TIME_UNITS",
    "WORDS",
    "KnownItem",
    "ScoringTask",
    "check_characters",
    "check_count",
    "check_lists",
    "check_size",
    "label_field",
    "labelled_task",
    "near_id",
    "normalize_id",
    "read_time",
    "rename_keys",
    "short",
    "time_seconds",
    "time_text",
    "written_date",
]
