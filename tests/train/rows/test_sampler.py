"""The order of rows, and blank rows that teach nothing."""

import numpy
import pytest
import torch

from m6rec.train.rows.examples import training_rows
from m6rec.train.rows.sampler import EpochRows, SeededOrder
from m6rec.train.runs.build import prepare


def test_the_order_of_rows_depends_on_seed_and_epoch_alone():
    rows = [{"input_ids": [0] * length} for length in numpy.random.default_rng(1).integers(1, 50, 40)]
    for group in (None, 8):
        order = SeededOrder(rows, 3, group)
        first = list(order)
        torch.rand(5)
        assert list(order) == first
        assert sorted(first) == list(range(40))
        order.set_epoch(1)
        second = list(order)
        assert second != first
        assert list(SeededOrder(rows, 4, group)) == second, "as the library numbers epochs, so that figures stay"
    grouped = SeededOrder(rows, 3, 8)
    lengths = [len(rows[place]["input_ids"]) for place in grouped]
    assert all(lengths[at : at + 8] == sorted(lengths[at : at + 8], reverse=True) for at in range(0, 40, 8))


def test_rows_that_follow_each_other_stay_together():
    rows = [{"input_ids": [0]}] * 41
    order, cuts = SeededOrder(rows, 3, together=4), set()
    for epoch in range(8):
        order.set_epoch(epoch)
        found = list(order)
        assert sorted(found) == list(range(41)) and found != sorted(found)
        assert list(order) == found
        starts = [place for at, place in enumerate(found) if not at or found[at - 1] != place - 1]
        assert len(starts) <= 12, "at most 10 whole blocks, and a shorter one at each end"
        cuts.add(min(place % 4 for place in starts if place))
    assert len(cuts) > 1, "each epoch cuts elsewhere"
    assert sorted(SeededOrder(rows[:2], 0, together=5)) == [0, 1]


@pytest.mark.parametrize("size", (1, 5, 6, 7))
def test_blank_rows_fill_the_last_batches_and_come_last(size):
    rows = [{"input_ids": [number], "labels": [number]} for number in range(size)]
    filled = EpochRows(rows, 6)
    order = list(SeededOrder(filled, 1))
    assert len(filled) == len(order) == (6 if size <= 6 else 12)
    assert sorted(order[:size]) == list(range(size))
    filled.set_epoch(4)
    for place in order:
        expected = {"input_ids": [place], "labels": [place]} if place < size else {"input_ids": [0], "labels": [-100]}
        assert filled[place] == {**expected, "number": (4, place)}


def test_a_blank_row_has_no_label_of_any_kind(make_recipe):
    task = {"learn": ["retrieval", "click", "interaction"], "interactions": {"like": ["like"], "skip": ["skip"]}}
    run = prepare(make_recipe(task=task))
    rows = training_rows(run.writer, run.split.train, run.processor, run.recipe.task)
    for start in (0, len(rows) - 1):
        blank = EpochRows(rows[start:], 7 if len(rows) - start == 1 else len(rows) + 1)[len(rows) - start]
        batch = run.collator([blank, blank])
        labels = {name: values for name, values in batch.items() if name.endswith("labels")}
        assert labels
        assert all((values == -100).all() for values in labels.values())
        out = run.model.train()(**batch, only_losses=True)
        out.loss.backward()
        assert out.loss == 0
        assert all(not parameter.grad.any() for parameter in run.model.parameters() if parameter.grad is not None)


def test_sampled_negatives_are_drawn_anew_in_each_epoch(make_recipe):
    run = prepare(make_recipe(task={"learn": ["retrieval"], "negatives": "sampled", "num_sampled": 3}))
    rows = EpochRows(training_rows(run.writer, run.split.train, run.processor, run.recipe.task))

    def items(epoch, *places):
        rows.set_epoch(epoch)
        return run.collator([rows[place] for place in places])["item_input_ids"].tolist()

    first = items(0, 2, 5)
    numpy.random.seed(3)  # noqa: NPY002 - the old global state must not matter
    torch.manual_seed(3)
    assert items(0, 2, 5) == first
    assert len({str(items(epoch, 2, 5)) for epoch in range(6)}) > 1
