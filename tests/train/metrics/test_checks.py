import numpy as np
import pytest

from m6rec.train.metrics.checks import flat_rows, group_numbers, pair, positive, refuse, vector, whole


def test_vector_takes_what_holds_numbers():
    assert vector("x", [True, 2, 3.5]).tolist() == [1.0, 2.0, 3.5]
    assert vector("x", [np.inf]).tolist() == [np.inf]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[1.0, 2.0]], r"x has the shape \(1, 2\)"),
        (3.0, r"x has the shape \(\)"),
        ([], "x is empty"),
        ([1.0, np.nan, np.nan], r"x holds nan at 1 \(2 such in all\)"),
        ([1.0, None], "x holds nan at 1"),
        ([0.0, -np.inf], "x holds -inf at 1"),
        (["seven"], "seven"),
    ],
)
def test_vector_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        vector("x", values, finite=True)


def test_pair_compares_lengths():
    with pytest.raises(ValueError, match="labels has 3 entries and scores 2"):
        pair(("scores", "labels"), [1, 2], [1, 2, 3])


def test_refuse_names_the_first_place():
    table = np.array([[1, 2], [3, -4]])
    with pytest.raises(ValueError, match=r"table holds -4 at \(1, 1\) \(1 such in all\); expected counts"):
        refuse("table", table, table < 0, "counts")


@pytest.mark.parametrize("wrong", [-1, 4, 1.5, np.nan, np.inf])
def test_whole_refuses_what_is_no_column(wrong):
    assert whole("targets", np.array([0.0, 3.0]), 4).tolist() == [0, 3]
    with pytest.raises(ValueError, match=f"targets holds {float(wrong)} at 1 .* from 0 to 3"):
        whole("targets", np.array([0.0, wrong]), 4)


def test_flat_rows_names_owner_and_item():
    users, items = flat_rows("seen", [[3, 1], [], np.array([0])], 4)
    assert (users.tolist(), items.tolist()) == ([0, 0, 2], [3, 1, 0])
    with pytest.raises(ValueError, match="seen holds 7 for user 1"):
        flat_rows("seen", [[1], 7], 8)
    with pytest.raises(ValueError, match=r"seen holds 4.0"):
        flat_rows("seen", [[1], [4]], 4)


def test_group_numbers_of_text_numbers_and_dates():
    assert group_numbers(["b", "a", "b"], 3).tolist() == [1, 0, 1]
    assert group_numbers(np.array(["b", "a", "b"], dtype=object), 3).tolist() == [1, 0, 1]
    assert group_numbers(np.array(["2020-01-02", "2020-01-01"], dtype="datetime64[D]"), 2).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (["a", "b"], "groups has 2 entries and the examples 3"),
        ([["a"], ["b"], ["c"]], r"shape \(3, 1\)"),
        ([1.0, np.nan, 2.0], "groups holds nan at 1"),
        (np.array(["a", np.nan, "b"], dtype=object), "groups holds nan at 1"),
        (np.array(["a", None, "b"], dtype=object), "NoneType"),
        (np.array(["a", 1, "b"], dtype=object), "'int'"),
    ],
)
def test_group_numbers_refuses(groups, message):
    with pytest.raises(ValueError, match=message):
        group_numbers(groups, 3)


@pytest.mark.parametrize("wrong", [0, -3, 2.0, True, "5", None])
def test_positive(wrong):
    assert positive("k", np.int64(3)) == 3
    with pytest.raises(ValueError, match=f"k is {wrong!r}"):
        positive("k", wrong)
