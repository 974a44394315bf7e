"""Tables of items, as users hold them."""

import numpy
import pandas
import pytest
import torch

from m6rec.catalogue_m6rec import table_rows


@pytest.mark.parametrize(
    "single",
    [
        "a text",
        b"bytes",
        {"item_id": 1},
        bytearray(b"mat"),
        memoryview(b"mat"),
        7,
        None,
        list,
        numpy.float64(1),
        numpy.datetime64("2024-01-02"),
        numpy.array("mat"),
        torch.tensor(3),
        pandas.NaT,
    ],
)
def test_one_value_is_no_table(single):
    with pytest.raises(TypeError, match="expected a list, a data frame or a dataset of rows, got "):
        table_rows(single)


@pytest.mark.parametrize("rows", [["a"], ("a",), numpy.array(["a"]), iter(["a"]), pandas.Series(["a"])])
def test_several_values_are_rows(rows):
    assert [*table_rows(rows)] == ["a"]
