"""Users who are made up: what they are told to like follows from their own chance, and nothing from the log's likes."""

import numpy as np
import pandas
import pytest

from m6rec.train.config.arguments import TaskArguments
from m6rec.train.data.log import Log
from m6rec.train.rows import synthetic_users as pretend
from m6rec.train.rows.examples import RequestWriter, item_likes
from m6rec.train.rows.synthetic_users import SyntheticUsers
from m6rec.train.runs.build import prepare
from m6rec.train.runs.pretrain import fit, pretrain

ITEMS = pandas.DataFrame({"title": [f"{word} {row}" for row in range(20) for word in ("red", "blue")]})
ITEMS.index = pandas.Index(map(str, ITEMS.index), name="item_id")
EVENTS = pandas.DataFrame(
    {
        "user_id": list("aab"),
        "item_id": list("123"),
        "timestamp": [1.0, 2.0, 3.0],
        "event": ["like", "dislike", "like"],
        "rating": [5, 1, 4],
        "label": [1, 0, 1],
    }
)
TASK = TaskArguments(learn=["click"], targets=3)
CLICKS = {"task": {"learn": ["click"], "targets": 2}, "pretraining": {"objectives": {"likes": 1}}}


@pytest.fixture
def writer():
    return RequestWriter(Log(EVENTS, ITEMS))


def drawn(users, count=400, item=7):
    return [users.draw(item, np.random.default_rng(seed)) for seed in range(count)]


def test_a_request_is_about_the_item_and_others_none_of_them_twice(writer):
    lengths = []
    for request, labels in drawn(SyntheticUsers(writer, EVENTS, TASK, 6)):
        history = [event["item"]["item_id"] for event in request["history"]]
        candidates = [item["item_id"] for item in request["candidates"]]
        assert candidates[0] == "7" and len(candidates) == len(labels) <= 3 and set(labels) <= {0, 1}
        assert len({*history, *candidates}) == len(history) + len(candidates)
        lengths.append(len(history))
        assert {(event["event"], event["rating"]) for event in request["history"]} <= {
            ("like", 5),
            ("like", 4),
            ("dislike", 1),
        }
    assert min(lengths) == 0 and max(lengths) == 6 and np.mean(np.array(lengths) >= 5) > 0.4


def shares(requests):
    """Share of likes in each full history, and whether the first candidate is liked."""
    found = [
        (np.mean([event["event"] == "like" for event in request["history"]]), labels[0])
        for request, labels in requests
        if len(request["history"]) >= 5
    ]
    return np.array(found).T


def test_who_liked_much_will_like_more(writer):
    share, liked = shares(drawn(SyntheticUsers(writer, EVENTS, TASK, 6)))
    assert liked[share > 0.7].mean() > liked[share < 0.3].mean() + 0.3


def test_what_reads_alike_is_liked_alike(writer, monkeypatch):
    for name, value in {"LEVEL": 0.0, "DRIFT": 0.0, "TASTE": 4.0}.items():
        monkeypatch.setattr(pretend, name, value)
    agree = {True: [], False: []}
    for request, labels in drawn(SyntheticUsers(writer, EVENTS, TASK, 6)):
        color = request["candidates"][0]["title"].split()[0]
        for event in request["history"]:
            agree[event["item"]["title"].startswith(color)].append((event["event"] == "like") == labels[0])
    assert np.mean(agree[True]) > np.mean(agree[False]) + 0.1


def test_shares_that_are_told_of_candidates_say_something(writer):
    writer.statistics = item_likes(writer, EVENTS, TASK, 0)
    requests = drawn(SyntheticUsers(writer, EVENTS, TASK, 6), 800)
    with_them = [(request, labels) for request, labels in requests if "stats" in request["candidates"][0]]
    assert 300 < len(with_them) < 500, "half of them do without"
    told = np.array([request["candidates"][0]["stats"]["item_likes"] for request, _ in with_them])
    liked = np.array([labels[0] for _, labels in with_them])
    assert liked[told > 60].mean() > liked[told < 40].mean() + 0.1
    assert all("stats" not in event["item"] for event in requests[0][0]["history"])


def test_the_logs_likes_are_not_read(writer):
    users = SyntheticUsers(writer, EVENTS, TASK, 6)
    others = SyntheticUsers(writer, EVENTS.assign(user_id=list("cde"), item_id=list("987")), TASK, 6)
    assert drawn(users, 20) == drawn(others, 20)


def test_a_log_without_dislikes_is_refused(writer):
    with pytest.raises(ValueError, match="no training event has label 0: give it the weight 0"):
        SyntheticUsers(writer, EVENTS[EVENTS["label"] == 1], TASK, 6)


def test_likes_are_learnt_beside_texts_and_alone(make_recipe):
    alone = prepare(make_recipe(**CLICKS))
    figures = fit(alone)["likes"]
    assert alone.model.config.trained_tasks == ["click"]
    assert 1 < figures["after"] < 6 and figures["before"] != figures["after"]
    both = {**CLICKS, "pretraining": {"objectives": {"likes": 1, "item": 1}}}
    run = prepare(make_recipe(**both))
    assert set(fit(run)) == {"likes", "item"}
    assert run.model.config.trained_tasks == ["click", "plausibility", "writing"]


def test_frozen_texts_stay_as_they_are_where_no_text_is_learnt(make_recipe):
    model = {"freeze_segments": True, "config": {"segment_summary": 1}}
    cases = (({"likes": 1}, False), ({"behaviour": 1}, False), ({"likes": 1, "item": 1}, True))
    for objectives, moved in cases:
        pretraining = {"objectives": objectives}
        run = prepare(make_recipe(**{**CLICKS, "model": model, "pretraining": pretraining}))
        layers = dict(run.model.model.layers[: run.model.config.num_segment_layers].named_parameters())
        before = {name: weight.detach().clone() for name, weight in layers.items()}
        fit(run)
        assert any(not weight.equal(before[name]) for name, weight in layers.items()) is moved


def test_pretraining_by_likes_repeats_itself(make_recipe):
    assert pretrain(make_recipe(**CLICKS)) == pretrain(make_recipe(**CLICKS))
