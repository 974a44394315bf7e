"""The two halves of the table of scoring tasks fit together, and each row names what there is."""

import dataclasses

import numpy
import pandas
import pytest

from m6rec import M6RecConfig
from m6rec.losses_m6rec import FORMS, form_of
from m6rec.train.config.arguments import TaskArguments
from m6rec.train.data.tasks import SCORED
from m6rec.train.evaluation.measures import MEASURES
from m6rec.train.rows.examples import target_labels
from m6rec.values_m6rec import SCORING_TASKS


@pytest.mark.parametrize("loss", ["classes", "regression"])
@pytest.mark.parametrize("task", SCORING_TASKS)
def test_a_row_names_a_form_a_measure_and_fields_that_there_are(task, loss):
    config, row, own = M6RecConfig.preset("tiny", rating_loss=loss), SCORING_TASKS[task], SCORED[task]
    assert row.form(config) in FORMS and own.measure in MEASURES
    outputs = row.outputs(config)
    assert outputs and len({*outputs}) == len(outputs)
    if row.form(config) in ("classes", "chance"):
        assert len(row.values(config)) == len(outputs)
    assert (own.names_in is not None) == (row.details is not None)
    if own.names_in:
        for arguments in (M6RecConfig, TaskArguments):
            assert own.names_in in {field.name for field in dataclasses.fields(arguments)}
    assert set(row.about) == {"en", "zh"}


def test_both_halves_have_the_same_rows_and_score_heads_begin_as_in_the_first_version():
    assert list(SCORED) == list(SCORING_TASKS)
    assert [name for name, row in SCORING_TASKS.items() if row.by_default] == ["click", "rating", "interaction"]


def test_answers_are_probabilities_unless_they_are_numbers():
    config = M6RecConfig.preset("tiny", rating_loss="regression")
    assert {task: form_of(task, config).is_probability for task in ("click", "rating", "interaction")} == {
        "click": True,
        "rating": False,
        "interaction": True,
    }


def test_labels_of_the_log_are_read_by_the_row():
    frame = pandas.DataFrame({"label": [1, numpy.nan], "rating": [4.5, numpy.nan], "event": ["like", ""]})
    task = TaskArguments(learn=["click", "interaction"], interactions={"likes": ["like"], "skips": ["skip"]})
    assert target_labels(frame, "click", task).tolist() == [1, -100]
    assert target_labels(frame, "rating", task).tolist() == [4.5, -100]
    assert target_labels(frame, "interaction", task).tolist() == [[1, 0], [-100, -100]]
    task.negatives_per_event = 1
    assert target_labels(frame, "interaction", task).tolist() == [[1, -100], [-100, -100]]
    assert target_labels(frame.drop(columns="label"), "click", task).tolist() == [1, 1]
