"""A small draw of what `make fuzz` runs: always the same cases, so that a failure stays one."""

import datasets
import pytest

from tests.fuzz.__main__ import doors
from tests.fuzz.harness import Door, Report, run, take

DRAWN = {"requests": 30, "processor": 30, "tables": 6, "recipes": 30, "lines": 2, "catalogues": 30}
DOORS = doors()


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.mark.parametrize("name", DRAWN)
def test_no_drawn_case_is_a_fault(name):
    report = run(DOORS[name], DRAWN[name])
    assert report.faults == {}
    assert report.ran == DRAWN[name] and report.answered > 0


def refuse(case):
    exec(compile("raise ValueError('nobody of the package says so')", "elsewhere.py", "exec"))


def wrong(case):
    raise AssertionError("scores do not fall")


def endless(case):
    while True:
        pass


@pytest.mark.parametrize(
    ("check", "kind"),
    [
        (refuse, "raised from within"),
        (wrong, "wrong: scores do not fall"),
        (endless, "hang"),
        (lambda case: [][0], "IndexError"),
    ],
)
def test_what_counts_as_a_fault(check, kind, monkeypatch):
    monkeypatch.setattr("tests.fuzz.harness.LIMIT", 0.1)
    report = Report("any")
    take(report, Door("any", None, check), {"a": 1}, "the case")
    take(report, Door("any", None, check), {"a": 1}, "case")
    [(found, fault)] = report.faults.items()
    assert kind in found and fault["count"] == 2 and fault["case"] == "case"
    assert report.answered == 0 and report.crashes + report.wrong + report.hangs == 2


def test_a_refusal_is_counted_by_its_words():
    from m6rec.values_m6rec import normalize_id

    report = Report("any")
    for case in ({}, [], None):
        take(report, Door("any", None, lambda value: normalize_id(value, "item_id")), case, "case")
    assert report.faults == {} and sum(report.refusals.values()) == 3 and len(report.refusals) <= 3


def test_a_report_is_read_as_it_was_written(tmp_path):
    report = Report("any", 3, 1)
    report.refusals["a: expected N"] += 2
    report.fault("hang", "long case")
    report.fault("hang", "case")
    report.write(tmp_path / "report.json")
    assert Report.read(tmp_path / "report.json") == report
    whole = Report("any", 1)
    whole.add(report)
    assert (whole.ran, whole.refusals, whole.faults["hang"]["count"]) == (4, report.refusals, 2)
