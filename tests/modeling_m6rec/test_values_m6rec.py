"""Ids and times: one rule for one value, whatever type it comes in, and a named reason for what is refused."""

from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m6rec.values_m6rec import near_id, normalize_id, read_time, short, time_seconds, time_text

NEW_YEAR = 1577836800.0  # 2020-01-01 00:00 UTC


@pytest.mark.parametrize(
    ("value", "known"),
    [
        *[(seven, "7") for seven in (7, 7.0, "7", np.int8(7), np.float32(7), np.str_(" 7\n"), Decimal("7.00"))],
        *[(text, text) for text in ("00001", "7.0", "-1", "用户 1", "1e5")],
        ("\u3000A\u00a0\u2003", "A"),
        (-0.0, "0"),
        (2**53 - 1.0, "9007199254740991"),
        (2**64 + 1, "18446744073709551617"),
        (Decimal(2**64 + 1), "18446744073709551617"),
    ],
)
def test_ids(value, known):
    assert normalize_id(value, "item_id") == known
    assert normalize_id(known, "item_id") == known


@pytest.mark.parametrize(
    ("value", "message"),
    [
        *[(value, "no id: give a text that is not empty") for value in ("", " \t", None, True, np.bool_(False), [1])],
        *[
            (value, "no id: give a text")
            for value in (
                float("nan"),
                Decimal("sNaN"),
                Decimal("1E+999999"),
                float("inf"),
                b"a",
                date(2020, 1, 1),
                "\ud800",
            )
        ],
        *[(value, r"give a whole number below 2\*\*53") for value in (7.5, 2.0**53, -(2.0**60), Decimal("7.5"))],
        pytest.param(10**5000, "a whole number of .* bits", id="huge"),
    ],
)
def test_what_is_no_id(value, message):
    with pytest.raises(ValueError, match=rf"^item_id: .*{message}"):
        normalize_id(value, "item_id")


def test_ids_that_people_may_mean_as_one():
    for same in (["00006", "6", "6.0", " 6", "+6", "6."], ["Ab-1", "aB-1\u200b", "ab- 1"], ["0", "000", "0.00"]):
        assert len(set(map(near_id, same))) == 1
    others = ["6", "60", "6.5", "6.01", "a6", "-6"]
    assert len(set(map(near_id, others))) == len(others)


@pytest.mark.parametrize(
    ("value", "way"),
    [
        *[(NEW_YEAR * scale, unit) for scale, unit in ((1, "seconds"), (1e3, "milliseconds"), (1e6, "microseconds"))],
        (int(NEW_YEAR) * 10**9, "nanoseconds"),
        (np.int64(NEW_YEAR), "seconds"),
        (Decimal("1577836800.0"), "seconds"),
        *[(text, "seconds") for text in ("1577836800", " 1577836800.0 ", "1.5778368e9", "+1577836800")],
        ("1577836800000", "milliseconds"),
        *[(text, "words") for text in ("2020-01-01", "2020-01", "2020/1/1", "2020.01.01", "2020-W01-3", "20200101T00")],
        *[(text, "words") for text in ("2020-01-01T08:00+08:00", "2020-01-01 0:00", "2020-01-01 00:00:00 UTC")],
        *[(text, "words") for text in ("2020-01-01T00:00:00Z", "2020-1-1 1:00:00+0100", "2020-01-01T00")],
        *[(pd.Timestamp("2020-01-01", tz=zone), "moment") for zone in (None, "UTC")],
        (pd.Timestamp("2020-01-01 08:00", tz="Asia/Shanghai"), "moment"),
        (date(2020, 1, 1), "moment"),
        (datetime(2020, 1, 1, 1, tzinfo=timezone(timedelta(hours=1))), "moment"),
        *[(np.datetime64("2020-01-01", unit), "moment") for unit in ("Y", "D", "s", "ns")],
    ],
)  # fmt: skip
def test_times(value, way):
    assert read_time(value, "timestamp") == (NEW_YEAR, way)
    assert time_seconds(value, "timestamp", relative=True) == NEW_YEAR


@pytest.mark.parametrize(
    "value",
    [
        *["", "yesterday", "now", "NaT", "nan", "2020-13-01", "2020-02-30", "12:30", "01/02/2020", "2020-01-01T25:00"],
        *["2020-01-01 UTC+1", "Thu", "1e5000", "0x5e0be100", "1_577_836_800", "١٥٧٧٨٣٦٨٠٠"],
        *[float("nan"), float("inf"), 10**400, 1e20, -1e20, "9999-12-31", date(5139, 1, 1), datetime(9999, 12, 31)],
        *[20231114, 20231114.0, "20231114", 202311141530, 20231114153000],
        *[pd.NaT, np.datetime64("NaT"), np.datetime64("12020-01-01")],
    ],
)
def test_what_is_no_time_is_refused_for_requests_too(value):
    with pytest.raises(ValueError, match=r"^timestamp: "):
        time_seconds(value, "timestamp", relative=True)


@pytest.mark.parametrize("value", [None, True, np.bool_(True), [NEW_YEAR], b"2020-01-01", time(12), timedelta(1), 1j])
def test_a_type_that_no_time_has(value):
    with pytest.raises(TypeError, match=r"^timestamp: expected seconds .* since 1970, .* got \w+"):
        time_seconds(value, "timestamp", relative=True)


@pytest.mark.parametrize("value", [0, 1, 2019, 45244.5, -1, 99_999_999.0, "5"])
def test_small_numbers_are_no_times_but_where_a_request_counts_from_its_own_beginning(value):
    with pytest.raises(ValueError, match="is no time"):
        time_seconds(value, "timestamp")
    assert time_seconds(value, "timestamp", relative=True) == float(value)


def test_a_written_date_is_refused_with_how_to_write_it():
    with pytest.raises(ValueError, match="20231114 is no time: its digits are a date, write '2023-11-14T00:00:00'"):
        time_seconds(20231114, "timestamp", relative=True)
    assert time_seconds(20231314, "timestamp", relative=True) == 20231314  # no month 13: seconds


@given(st.datetimes(datetime(1973, 4, 1), datetime(2286, 1, 1)), st.integers(-14 * 60, 14 * 60))
def test_a_moment_is_the_same_in_every_form(moment, minutes):
    seconds = (moment - datetime(1970, 1, 1)) // timedelta(microseconds=1) / 10**6
    there = moment.replace(tzinfo=UTC).astimezone(timezone(timedelta(minutes=minutes)))
    forms = [moment, there, there.isoformat(), pd.Timestamp(there), np.datetime64(moment), seconds, repr(seconds)]
    forms += [seconds * 1e3, seconds * 1e6, seconds * 1e9]
    for form in forms:
        assert time_seconds(form, "timestamp") == pytest.approx(seconds, abs=1e-5)


def test_equal_moments_are_written_alike():
    there = datetime(2020, 1, 1, 1, tzinfo=timezone(timedelta(hours=1)))
    assert time_text(there, "x") == time_text(datetime(2020, 1, 1, tzinfo=UTC), "x") == "2020-01-01T00:00:00+00:00"
    assert time_text(datetime(2020, 1, 1), "x") == "2020-01-01T00:00:00"
    assert time_text(date(2020, 1, 1), "x") == "2020-01-01"
    for missing in (pd.NaT, datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=14)))):
        with pytest.raises(ValueError, match=r"^x: "):
            time_text(missing, "x")


def test_values_of_an_error_are_short():
    deep: list = []
    deep.append(deep)
    for value in ("a" * 10**6, [["x" * 1000] * 1000] * 1000, 10**10000, deep, {"a": list(range(10**5))}):
        assert len(short(value)) <= 100
