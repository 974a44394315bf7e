"""What is told of candidates: counted by hand, and never from the labels that are learnt with it."""

import numpy as np
import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m6rec.train.config.arguments import TaskArguments, TextArguments
from m6rec.train.data.log import Log
from m6rec.train.data.splits import histories
from m6rec.train.evaluation.reports import scoring_examples
from m6rec.train.rows.examples import RequestWriter, ScoringRows, item_likes, target_labels
from m6rec.train.rows.item_likes import FOLDS, ItemLikes
from m6rec.train.runs.build import make_writer, prepare

CLICK = {"task": {"learn": ["click"]}, "text": {"statistics": ["item_likes"]}}


def test_shares_are_drawn_towards_that_of_all():
    users, rows = np.array(["a", "b", "c", "d", "a"]), np.array([0, 0, 0, 1, 1])
    likes = ItemLikes(users, rows, np.array([1, 1, 0, 0, 0]), num_items=3)
    # Two of five labels are likes. Item 0: (2 + 5 * 0.4) / (3 + 5) = 0.5; item 1: (0 + 2) / (2 + 5) = 0.286
    assert likes.of(np.array([0, 1, 2])) == [50, 30, 40]


events = st.lists(
    st.tuples(st.integers(0, 11), st.integers(0, 3), st.integers(0, 1)),
    min_size=2,
    max_size=60,
    unique_by=lambda e: e[:2],
)


@given(events, st.integers(0, 3))
def test_own_labels_do_not_change_what_is_told_of_own_candidates(log, seed):
    users, rows, labels = map(np.array, zip(*log))
    users = np.array([f"u{user}" for user in users])
    own = users == users[0]
    told, flipped = (
        ItemLikes(users, rows, given, 4, seed).of(np.arange(4), users[0]) for given in (labels, labels ^ own)
    )
    if len(set(users)) >= FOLDS:
        assert told == flipped


@given(events)
def test_others_labels_do_change_it(log):
    users, rows, labels = map(np.array, zip(*log))
    users = np.array([f"u{user}" for user in users])
    likes, other = (ItemLikes(users, rows, given, 4) for given in (np.ones_like(labels), np.zeros_like(labels)))
    assert likes.of(np.arange(4), "nobody known") == likes.of(np.arange(4), users[0]) == [100] * 4
    assert other.of(np.arange(4)) == other.of(np.arange(4), users[0]) == [0] * 4


def test_rows_tell_training_labels_only(make_recipe):
    run = prepare(make_recipe(**CLICK))
    labels = target_labels(run.split.train, "click", run.recipe.task)
    rows = np.array([run.writer.rows[item] for item in run.split.train["item_id"]])
    rows, labels = rows[labels >= 0], labels[labels >= 0]
    expected = {
        row: round((labels[rows == row].sum() + 5 * labels.mean()) / ((rows == row).sum() + 5) * 20) * 5
        for row in range(len(run.writer.items))
    }
    asked = run.writer.candidates(list(expected))
    assert {row: item["stats"]["item_likes"] for row, item in zip(expected, asked)} == expected
    examples = scoring_examples(
        run.writer, run.processor, run.split, "test", "click", run.recipe.task, run.recipe.evaluation, 0
    )
    text = run.processor.tokenizer.decode(examples.rows[0]["input_ids"], skip_special_tokens=True)
    share = expected[run.writer.rows[examples.item_ids[0]]]
    assert f"liked by {share}% of those who said" in " ".join(text.split())


def test_training_rows_leave_the_users_part_out(make_recipe):
    run = prepare(make_recipe(**CLICK))
    asked = []
    run.writer.candidates = lambda rows, learner=None: asked.append(learner) or [run.writer.items[row] for row in rows]
    scoring = ScoringRows(run.writer, run.split.train, run.processor, run.recipe.task, 0)
    scoring.read(range(len(scoring)))
    assert set(asked) == set(histories(run.split.train))


def test_without_statistics_candidates_are_the_items(run):
    assert run.writer.candidates([2, 0]) == [run.writer.items[2], run.writer.items[0]]


def test_what_cannot_be_told_is_refused(make_recipe):
    with pytest.raises(ValueError, match=r"text\.statistics: unknown ctr; expected some of item_likes"):
        TextArguments(statistics=["ctr", "item_likes"])
    log = pandas.DataFrame({"user_id": ["a"], "item_id": ["x"], "timestamp": [1.0]})
    writer = RequestWriter(Log(log, pandas.DataFrame({"title": ["x"]}, index=["x"])))
    with pytest.raises(ValueError, match="negatives_per_event=2 the log holds no dislikes"):
        item_likes(writer, log, TaskArguments(learn=["click"], negatives_per_event=2), 0)
    with pytest.raises(ValueError, match="column 'label'"):
        item_likes(writer, log, TaskArguments(learn=["click"]), 0)
    assert make_writer(make_recipe(), writer.log, None).statistics is None
