"""Columns of times: `time_seconds`, the rule for one value, vectorised; and other formats that a recipe names."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import numpy
import pandas
import pyarrow
import pyarrow.compute

from ...values_m6rec import EARLIEST, LATEST, MOMENT, TIME_UNITS, WORDS, read_time, short, written_date

WAYS = (*TIME_UNITS, WORDS, MOMENT)
"""Formats of a time; a column's format is given as an index into this tuple."""
TIME_SCALES = {name: (0.0, 1.0, in_a_second) for name, (_, _, in_a_second) in TIME_UNITS.items()}
TIME_SCALES["excel"] = (25569.0, 86400.0, 1.0)
"""Scale of numbers that a recipe may name -> (origin, s, n): v is (v - origin) * s / n seconds since 1970."""
ORDER = "order"
"""Name in a recipe for numbers that give the order of events and not their times."""

_PLAIN_NUMBER = r"^-?[0-9]{1,17}(\.[0-9]{1,9})?$"
_PLAIN_ISO = (
    r"^[0-9]{4}-[0-9]{2}-[0-9]{2}([T ][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]{1,6})?)?(Z|[-+][0-9]{2}:[0-9]{2})?)?$"
)
_EXCEL_DAYS = (20_000, 80_000)  # 1954 to 2119


def check_form(form: str | None) -> None:
    """Raise if a format of times is invalid."""
    if form is None or form in TIME_SCALES or form == ORDER:
        return
    try:
        datetime.strptime(datetime(2001, 2, 3, 4, 5, 6, tzinfo=UTC).strftime(form), form)
        known = "%" in form
    except ValueError:
        known = False
    if not known:
        raise ValueError(
            f"data.time_format is {form!r}; expected one of {', '.join([*TIME_SCALES, ORDER])}, or a form such as "
            "'%d.%m.%Y %H:%M'"
        )


def read_times(
    values: pyarrow.ChunkedArray, as_text: Callable[[pyarrow.ChunkedArray], pandas.Series]
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Read times by the rule for times.

    Args:
        values: Of any type.
        as_text: Writes values of a type that is neither a number nor a time.

    Returns:
        Seconds since 1970, and each value's format as an index into WAYS; NaN and -1 if a value is not a time.
    """
    kind, types = values.type, pyarrow.types
    if types.is_timestamp(kind) or types.is_date(kind):
        seconds = _of_moments(values)
        return seconds, numpy.where(numpy.isnan(seconds), -1, WAYS.index(MOMENT)).astype(numpy.int8)
    if types.is_decimal(kind):  # Arrow's cast to float is sometimes off by the last bit
        return _of_numbers(numpy.array([numpy.nan if each is None else float(each) for each in values.to_pylist()]))
    if types.is_integer(kind) or types.is_floating(kind):
        return _of_numbers(values.cast(pyarrow.float64(), safe=False).to_numpy())
    return _of_texts(as_text(values).str.strip())


def _of_moments(values: pyarrow.ChunkedArray) -> numpy.ndarray:
    counted = values.cast(pyarrow.timestamp("us"), safe=False).cast(pyarrow.int64())
    whole = counted.fill_null(0).to_numpy()
    seconds = whole // 10**6 + whole % 10**6 / 1e6  # same order of operations as the scalar rule: bitwise equal
    missing = values.is_null().to_numpy() | (seconds < EARLIEST) | (seconds >= LATEST)
    return numpy.where(missing, numpy.nan, seconds)


def _of_numbers(numbers: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
    seconds, ways = numpy.full(len(numbers), numpy.nan), numpy.full(len(numbers), -1, dtype=numpy.int8)
    with numpy.errstate(invalid="ignore"):
        size = numpy.abs(numbers)
        for way, (first, last, in_a_second) in enumerate(TIME_UNITS.values()):
            own = (size >= first) & (size < last)
            seconds[own], ways[own] = numbers[own] / in_a_second, way
        digits = numpy.where(numbers >= 1e13, numbers / 100, numbers)
        dated = numpy.flatnonzero((digits >= 1.9e11) & (digits < 2.1e11))  # 202311141530 is a date, also with seconds
    for place in dated:
        if written_date(float(numbers[place])):
            seconds[place], ways[place] = numpy.nan, -1
    return seconds, ways


def _of_texts(texts: pandas.Series) -> tuple[numpy.ndarray, numpy.ndarray]:
    array = pyarrow.array(texts, pyarrow.large_string())
    plain = pyarrow.compute.match_substring_regex(array, _PLAIN_NUMBER).to_numpy(zero_copy_only=False)
    seconds, ways = numpy.full(len(texts), numpy.nan), numpy.full(len(texts), -1, dtype=numpy.int8)
    numbers = array.filter(pyarrow.array(plain)).cast(pyarrow.float64()).to_numpy(zero_copy_only=False)
    seconds[plain], ways[plain] = _of_numbers(numbers)
    iso = pyarrow.compute.match_substring_regex(array, _PLAIN_ISO).to_numpy(zero_copy_only=False)
    parsed = pandas.to_datetime(texts[iso], format="ISO8601", utc=True, errors="coerce")
    seconds[iso] = _of_moments(pyarrow.chunked_array([pyarrow.array(parsed)]))
    ways[iso & ~numpy.isnan(seconds)] = WAYS.index(WORDS)
    known: dict[str, tuple[float, int]] = {}
    others = numpy.flatnonzero((ways < 0) & ~plain)  # other forms of ISO 8601, and invalid times
    for place, text in zip(others.tolist(), texts.to_numpy(dtype=object)[others].tolist()):
        if text not in known:
            known[text] = _one(text)
        seconds[place], ways[place] = known[text]
    return seconds, ways


def _one(text: str) -> tuple[float, int]:
    try:
        seconds, way = read_time(text, "")
    except ValueError:
        return numpy.nan, -1
    return seconds, WAYS.index(way)


def in_form(texts: pandas.Series, form: str) -> pandas.Series:
    """Parse texts of a format such as `%d.%m.%Y`; NaN for a text that does not match."""
    parsed = pandas.to_datetime(texts.str.strip(), format=form, utc=True, errors="coerce")
    return pandas.Series(_of_moments(pyarrow.chunked_array([pyarrow.array(parsed)])), index=texts.index)


def time_hint(value: Any, usual: int) -> str:
    """Return advice for an error about a value that is not a time in the format of its column.

    Args:
        value: The value.
        usual: Format of most of the column's times, as an index into WAYS; -1 if none is a time.
    """
    try:
        way = read_time(value, "")[1]
    except (ValueError, TypeError):
        pass
    else:
        return f"this one is in {way}, most rows are in {WAYS[usual]}: write all alike"
    try:
        number = float(value)
    except (ValueError, TypeError):
        return "data.time_format names another form, such as '%d.%m.%Y' or '%m/%d/%Y %H:%M'"
    named = "data.time_format: {} reads it as {}"
    if written := written_date(number):
        return named.format(repr(written[1]), written[0].isoformat(" "))
    if 1900 <= number < 2100 and number.is_integer():
        return named.format("'%Y'", f"the year {number:.0f}")
    if _EXCEL_DAYS[0] <= number < _EXCEL_DAYS[1]:
        day = pandas.Timestamp(round((number - TIME_SCALES["excel"][0]) * 86400), unit="s")
        return named.format("excel", f"{day.isoformat(' ', 'minutes')}, the days of a spreadsheet")
    return (
        f"{short(value)} is too small or too large for a time since 1970: data.time_format: order takes numbers that "
        f"only say what came first; {', '.join(TIME_UNITS)} name a unit"
    )


__all__ = ["ORDER", "TIME_SCALES", "WAYS", "check_form", "in_form", "read_times", "time_hint"]
