"""Rows: every event is learnt, nothing is told that is asked, labels stand beside what they belong to."""

import dataclasses
import math
from collections import Counter

import numpy as np
import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m6rec.train.config.arguments import TaskArguments
from m6rec.train.data.log import Log
from m6rec.train.data.splits import histories, shuffled_ties
from m6rec.train.rows.examples import (
    Negatives,
    RequestWriter,
    ScoringRows,
    read_requests,
    retrieval_rows,
    target_labels,
    training_rows,
    windows,
)
from m6rec.train.runs.build import prepare
from m6rec.train.runs.training_set import TrainingSet, training_parts

EVERYTHING = {
    "learn": ["retrieval", "click", "rating", "interaction"],
    "interactions": {"like": ["like"], "seen": ["watch", "like"]},
    "targets": 3,
}


class Recorder:
    """A processor that reads a request as itself."""

    item_rows = None

    def __init__(self, max_events):
        self.max_events, self.requests, self.tasks = max_events, [], []

    def read_many(self, requests, task):
        self.requests += requests
        self.tasks += [task] * len(requests)
        return [
            type("EncodedRow", (), {"input_ids": [len(request["history"])], "item_embedding_ids": [0]})
            for request in requests
        ]


def learn(run, max_events=4, bidirectional=False, **task):
    """Rows of the small world's training part, and the requests they were read from, by user."""
    recorder = Recorder(max_events)
    rows = training_rows(run.writer, run.split.train, recorder, TaskArguments(**task), bidirectional)
    assert len(rows) == len(recorder.requests)
    return rows, recorder


@given(st.integers(0, 60), st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_windows_learn_every_event_once_and_never_tell_what_they_ask(num_events, max_events, targets, learn_history):
    found = list(windows(num_events, max_events, targets, learn_history))
    learnt = []
    for window in found:
        history, asked = range(window.start, window.cut), range(window.cut, window.stop)
        assert 0 <= window.start <= window.cut < window.stop <= num_events
        assert not set(history) & set(asked)
        assert len(asked) == min(targets, window.stop)
        assert len(history) == min(max_events, window.cut), "the whole past, as far as it may be told"
        if learn_history:
            learnt += range(window.start + 1 if window.start else 0, window.cut)
        learnt += asked
    assert learnt == list(range(num_events))


@pytest.mark.parametrize("max_events", [1, 2, 4, 50])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_every_event_is_the_next_item_of_one_place(run, max_events, bidirectional):
    rows, recorder = learn(run, max_events, bidirectional, learn=["retrieval"])
    names = [run.writer.item_ids[row] for row in range(len(run.writer.items))]
    learnt = Counter()
    for row, request in zip(rows, recorder.requests):
        told = [event["item"]["item_id"] for event in request["history"]]
        following = row["next_items"]
        assert len(following) == len(told) + 1
        assert "candidates" not in request
        assert [names[item] for item in following[1:-1]] == told[1:]
        learnt.update(names[item] for item in (following[-1:] if bidirectional else following) if item != -100)
    assert learnt == Counter(run.split.train["item_id"])


def test_the_head_learns_a_users_first_event_only(run):
    rows, _ = learn(run, 2, learn=["retrieval"])
    first = [events[0] for events in histories(run.split.train).values()]
    expected = [run.writer.rows[run.split.train["item_id"].iat[place]] for place in first]
    assert [row["next_items"][0] for row in rows if row["next_items"][0] != -100] == expected
    assert len(rows) > len(expected)


def test_labels_stand_beside_the_candidates_they_belong_to(run):
    rows, recorder = learn(run, **EVERYTHING)
    train = run.split.train
    said = {}
    for event in train.to_dict("records"):
        interactions = [int(event["event"] == "like"), int(event["event"] in ("watch", "like"))]
        said[event["user_id"], event["item_id"]] = (int(event["rating"] >= 4), event["rating"], interactions)
    users = {tuple(run.writer.user(user).items()): user for user in histories(train) if run.writer.user(user)}
    scored = [(row, request) for row, request in zip(rows, recorder.requests) if "candidates" in request]
    asked = Counter()
    for row, request in scored:
        assert "next_items" not in row
        user = users.get(tuple(request.get("user", {}).items()))
        labels = zip(row["click_labels"], row["rating_labels"], row["interaction_labels"], strict=True)
        for item, own in zip(request["candidates"], labels, strict=True):
            asked[item["item_id"]] += 1
            if user:
                assert own == said[user, item["item_id"]]
        assert set(item.keys()) == {"item_id", "title", "year"}, "a candidate says nothing of its event"
    assert asked == Counter(train["item_id"]), "each event is asked once"
    assert Counter(recorder.tasks) == {"click": len(scored), "retrieval": len(rows) - len(scored)}


def test_rows_of_which_nothing_is_known_are_left_out(run):
    train = run.split.train.assign(label=np.nan)
    train.loc[train.index[::4], "label"] = [1.0, 0.0] * (len(train.index[::4]) // 2) + [1.0] * (len(train[::4]) % 2)
    rows = training_rows(run.writer, train, Recorder(4), TaskArguments(learn=["click"], targets=1))
    assert [row["click_labels"] for row in rows] == [[label] for label in train["label"].dropna()]


LIKED = {"like": ["like"], "seen": ["watch", "like"]}


def drawn(run, epoch=0, seed=0, **task):
    """The scored rows of an epoch as (user, requests, labels)."""
    recorder = Recorder(4)
    rows = ScoringRows(run.writer, run.split.train, recorder, TaskArguments(targets=2, **task), seed)
    rows.set_epoch(epoch)
    return list(zip([user for user, *_ in rows._windows], rows.read(range(len(rows))), recorder.requests))


def test_negatives_are_items_of_the_same_verb_that_the_user_never_met(run):
    train = run.split.train
    met = {user: set(own["item_id"]) for user, own in train.groupby("user_id")}
    occurs = {verb: set(own["item_id"]) for verb, own in train.groupby("event")}
    told = {(event["user_id"], event["item_id"]): event["event"] for event in train.to_dict("records")}
    asked, negatives = Counter(), 0
    for user, row, request in drawn(run, learn=["click", "interaction"], interactions=LIKED, negatives_per_event=2):
        verb, beside = None, []
        candidates = [item["item_id"] for item in request["candidates"]]
        for item, click, seen in zip(candidates, row["click_labels"], row["interaction_labels"], strict=True):
            if item in met[user]:
                asked[item] += 1
                verb, beside, own = told[user, item], [], seen
                positive = [1 if verb == "like" else -100, 1 if verb in ("watch", "like") else -100]
                assert seen == positive, "an event says something of its own interactions only"
                wanted, against = click, [0 if label == 1 else -100 for label in own]
                continue
            beside.append(item)
            negatives += 1
            assert len(set(beside)) == len(beside) <= 2
            assert item in occurs[verb]
            assert click == (0 if wanted == 1 else -100)
            assert seen == against
    assert asked == Counter(train["item_id"])
    assert negatives > len(train)


def test_draws_depend_on_seed_epoch_and_event_and_on_nothing_else(run):
    task = {"learn": ["click"], "negatives_per_event": 1}
    first = drawn(run, **task)
    assert drawn(run, **task) == first
    assert drawn(run, epoch=1, **task) != first != drawn(run, seed=1, **task)
    rows = ScoringRows(run.writer, run.split.train, Recorder(4), TaskArguments(targets=2, **task), 0)
    rows.processor.requests.clear()
    assert (rows[3], rows.processor.requests[-1]) == first[3][1:], "whatever was read before"


def test_negatives_are_uniform_over_what_may_be_drawn():
    events = frame(event=["buy"] * 6)
    events["user_id"] = ["u", "u", "v", "v", "w", "w"]
    writer = RequestWriter(Log(events, pandas.DataFrame({"title": list("abcdef")}, index=events["item_id"])))
    negatives = Negatives(writer, events, 2, seed=1)
    counts = np.zeros(6)
    for event in range(3000):
        counts[negatives.draw("u", "buy", event, 0)] += 1
    assert counts[:2].tolist() == [0, 0]
    np.testing.assert_allclose(counts[2:], 1500, atol=5 * math.sqrt(3000 / 4))
    assert sorted(Negatives(writer, events, 9, seed=1).draw("u", "buy", 0, 0)) == [2, 3, 4, 5], "all there are"


def test_a_log_without_refusals_is_learnt_with_negatives_only():
    events = frame(timestamp=[1.0, 2.0, 3.0])
    events["user_id"] = ["u", "v", "w"]
    writer = RequestWriter(Log(events, pandas.DataFrame({"title": ["a", "b", "c"]}, index=events["item_id"])))
    with pytest.raises(ValueError, match=r"'label', which .* do not have, unless task.negatives_per_event"):
        training_rows(writer, events, Recorder(4), TaskArguments(learn=["click"]))
    with pytest.raises(ValueError, match=r"'click' are 1 .*; task.negatives_per_event draws"):
        training_rows(writer, events.assign(label=1), Recorder(4), TaskArguments(learn=["click"]))
    task = TaskArguments(learn=["click"], negatives_per_event=1)
    rows = training_rows(writer, events, Recorder(4), task)
    assert [row["click_labels"] for row in rows] == [[1, 0]] * 3
    with pytest.raises(ValueError, match="all labels of 'click' are 0"):
        training_rows(writer, events.assign(label=0), Recorder(4), task)


def test_retrieval_is_learnt_the_same_beside_other_tasks(run):
    alone, _ = learn(run, learn=["retrieval"])
    beside, _ = learn(run, **EVERYTHING)
    assert [row for row in beside if "next_items" in row] == alone


def frame(**columns) -> pandas.DataFrame:
    size = len(next(iter(columns.values())))
    return pandas.DataFrame({"user_id": ["u"] * size, "item_id": [f"i{row}" for row in range(size)], **columns})


def test_what_is_missing_has_no_label():
    arguments = TaskArguments(**EVERYTHING)
    ratings = target_labels(frame(rating=[3.0, math.nan, 4.5]), "rating", arguments)
    assert ratings.tolist() == [3.0, -100, 4.5]
    assert target_labels(frame(label=[1, 0]), "click", arguments).tolist() == [1, 0]
    verbs = target_labels(frame(event=["like", "", "watch", "skip"]), "interaction", arguments)
    assert verbs.tolist() == [[1, 1], [-100, -100], [0, 1], [0, 0]]


@pytest.mark.parametrize(("task", "column"), [("click", "label"), ("rating", "rating"), ("interaction", "event")])
def test_a_task_without_its_column_is_refused(task, column):
    with pytest.raises(ValueError, match=f"task '{task}' is learnt from column '{column}'"):
        target_labels(frame(timestamp=[1.0]), task, TaskArguments(**EVERYTHING))


@pytest.mark.parametrize(
    ("columns", "task", "message"),
    [
        ({"label": [1, 1, 1]}, {"learn": ["click"]}, "all labels of 'click' are 1 in the training part"),
        ({"rating": [4.5, math.nan, 4.5]}, {"learn": ["rating"]}, "all labels of 'rating' are 4.5"),
        ({"rating": [math.nan] * 3}, {"learn": ["rating"]}, "all labels of 'rating' are missing"),
        (
            {"event": ["like", "skip", "like"]},
            {"learn": ["interaction"], "interactions": {"like": ["like"], "share": ["shared"]}},
            "all labels of 'share' are 0",
        ),
    ],
)
def test_equal_labels_are_refused_since_nothing_can_be_learnt(columns, task, message):
    events = frame(timestamp=[1.0, 2.0, 3.0], **columns)
    writer = RequestWriter(Log(events, pandas.DataFrame({"title": ["a", "b", "c"]}, index=events["item_id"])))
    with pytest.raises(ValueError, match=message):
        training_rows(writer, events, Recorder(4), TaskArguments(**task))
    target_labels(events, task["learn"][0], TaskArguments(**task))  # a held-out part may well be of one kind


def test_events_are_written_in_order_with_all_that_is_known_of_them():
    columns = {
        "timestamp": [5.0, 7.0, 9.0],
        "rating": [4.0, math.nan, 2.0],
        "event": ["watch", "", "like"],
        "text": ["", "棒", ""],
    }
    events = frame(label=[1, 0, 1], **columns)
    items = pandas.DataFrame({"title": ["a", "b", "丙"], "year": ["", "1999", ""]}, index=["i0", "i1", "i2"])
    users = pandas.DataFrame({"gender": ["女", ""]}, index=["u", "v"])
    writer = RequestWriter(Log(events, items, users))
    assert writer.events(events.iloc[[1, 0, 2]]) == [
        {"item": {"title": "b", "year": "1999", "item_id": "i1"}, "timestamp": 7.0, "text": "棒"},
        {"item": {"title": "a", "item_id": "i0"}, "event": "watch", "timestamp": 5.0, "rating": 4.0},
        {"item": {"title": "丙", "item_id": "i2"}, "event": "like", "timestamp": 9.0, "rating": 2.0},
    ]
    untimed = events.assign(timestamp=math.nan)
    assert all("timestamp" not in event for event in writer.events(untimed))
    history = writer.events(events)
    assert writer.request("u", history[:1], [writer.item("i1")]) == {
        "user": {"gender": "女"},
        "history": history[:1],
        "candidates": [{"title": "b", "year": "1999", "item_id": "i1"}],
    }
    assert writer.request("v", []) == writer.request("nobody", []) == {"history": []}


def test_the_rows_say_who_the_user_is_and_what_happened(run):
    rows = training_rows(run.writer, run.split.train, run.processor, TaskArguments(learn=["rating"], targets=2))
    texts = [run.processor.tokenizer.decode(row["input_ids"]) for row in rows]
    own = run.split.train[run.split.train["user_id"] == "u0"]
    mine = [text for text in texts if "a male user in his early twenties" in text][: math.ceil(len(own) / 2)]
    for item_id in own["item_id"]:
        title = run.writer.item(item_id)["title"]
        assert any(title in text.split("[BOS]", 1)[1] for text in mine), "asked once"
    first, last = run.writer.item(own["item_id"].iat[0])["title"], run.writer.item(own["item_id"].iat[-1])["title"]
    assert first in mine[-1].split("[BOS]")[0]
    assert last not in mine[-1].split("[BOS]")[0]


def test_many_requests_are_read_as_few(run, monkeypatch):
    monkeypatch.setattr("m6rec.train.rows.examples.READ_AT_ONCE", 3)
    events = run.writer.events(run.split.train.assign(timestamp=math.nan).iloc[:8])
    requests = [{"history": events[:size]} for size in range(8)]
    rows = read_requests(run.processor, requests, "retrieval", "Reading")
    assert [row["input_ids"] for row in rows] == [
        run.processor.read(request, "retrieval").input_ids for request in requests
    ]
    assert all("item_embedding_ids" not in row for row in rows)


def test_item_memory_rows_are_written_where_the_processor_has_them(make_recipe):
    from m6rec.train.runs.build import prepare

    run = prepare(make_recipe(model={"item_embeddings": True}))
    rows = training_rows(run.writer, run.split.train, run.processor, TaskArguments(learn=["click"]))
    for row in rows:
        assert len(row["item_embedding_ids"]) == len(row["input_ids"])
    told = np.concatenate([row["item_embedding_ids"] for row in rows])
    assert set(told) - {0} <= set(run.processor.item_rows.values())
    assert (told > 0).any()


def test_rows_of_retrieval_may_tell_ties_in_another_order_in_each_epoch(make_recipe):
    run = prepare(make_recipe(task={"learn": ["retrieval", "click"], "shuffle_ties": True}, training={"seed": 3}))
    times = run.split.train["timestamp"] // 3  # three events of a user at a time
    run.split = dataclasses.replace(run.split, train=run.split.train.assign(timestamp=times))
    rows = TrainingSet(training_parts(run))
    epochs = []
    for epoch in (0, 1, 0):
        rows.set_epoch(epoch)
        epochs.append([*rows])
        frame = shuffled_ties(run.split.train, 3, epoch)
        count = len(rows.parts[0])
        assert epochs[-1][:count] == retrieval_rows(run.writer, frame, run.processor, False)
    assert epochs[0] == epochs[2] != epochs[1] and epochs[0][count:] == epochs[1][count:]
    assert [len(row["next_items"]) for row in epochs[0][:count]] == [
        len(row["next_items"]) for row in epochs[1][:count]
    ]
    run.recipe.task.shuffle_ties = False
    assert training_parts(run)[0] == retrieval_rows(run.writer, run.split.train, run.processor, False)


def test_the_items_of_a_writer_are_those_of_the_log(run):
    for item_id, item in zip(run.writer.item_ids, run.writer.items):
        assert item == {**run.log.item_fields(item_id), "item_id": item_id}
    empty = dataclasses.replace(run.log, items=run.log.items[[]])
    assert RequestWriter(empty).items == [{"item_id": item_id} for item_id in run.log.items.index]
