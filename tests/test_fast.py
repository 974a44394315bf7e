"""The fast form of a family of tests leaves out what it says, and the whole form nothing."""

import pytest

from tests import fast


def test_values_that_are_not_fast_are_slow():
    marked = {each.values: [mark.name for mark in each.marks] for each in fast.some(["a", ("b", 1), "c"], [("b", 1)])}
    assert marked == {("a",): ["slow"], ("b", 1): [], ("c",): ["slow"]}
    with pytest.raises(ValueError, match="no such values: "):
        fast.some({"a": 1}, ["b"])


def test_each_value_meets_another_one():
    marked = {each.values: bool(each.marks) for each in fast.meet(["a", "b"], [1, 2, 3])}
    assert len(marked) == 6 and [values for values, slow in marked.items() if not slow] == [
        ("a", 1),
        ("a", 3),
        ("b", 2),
    ]


def test_fewer_examples_are_drawn_where_slow_tests_are_deselected(monkeypatch):
    monkeypatch.setattr(fast, "ONLY", True)
    assert [fast.examples(count) for count in (3, 40, 300)] == [3, 5, 30]
    monkeypatch.setattr(fast, "ONLY", False)
    assert [fast.examples(count) for count in (3, 40, 300)] == [3, 40, 300]
