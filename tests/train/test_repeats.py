"""Held-out items that their users have met before: asked about, missed, left out, and the same in the product."""

import numpy as np
import pytest

from m6rec.train.answering.loading import build_catalogue
from m6rec.train.commands.prepare import prepare_report
from m6rec.train.config.recipe import load_recipe
from m6rec.train.evaluation.reports import count_repeats, ranking_examples
from m6rec.train.evaluation.tables import tables
from m6rec.train.runs.build import prepare, save
from m6rec.train.runs.finetune import full_report
from tests.fast import some
from tests.train.world import recipe_of, write_tables

WORDS = ["harbour", "winter", "train", "field", "glass", "salt"]
ITEMS = [
    {"item_id": f"s{row}", "title": f"{WORDS[row % 6]} {WORDS[row // 6]}", "year": 1990 + row} for row in range(30)
]

USERS = 150


def write_revisits(folder, num_users, seed=0):
    """A log of users who play five of 30 songs, each at random from the three that they like."""
    rng = np.random.default_rng(seed)
    events = []
    for user in range(num_users):
        liked = rng.permutation(30)[:3]
        for time in range(5):
            item = rng.choice(liked) if rng.random() < 0.8 else rng.integers(30)
            events.append({"user_id": f"u{user}", "item_id": f"s{item}", "timestamp": 1_600_000_000 + 60 * time})
    return write_tables(folder, interactions=events, items=ITEMS)


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    return write_revisits(tmp_path_factory.mktemp("played"), USERS)


@pytest.fixture(scope="module")
def product(played, tmp_path_factory):
    """A run on the log of many users, untrained, and the pipeline that a user gets of it."""
    folder = tmp_path_factory.mktemp("product")
    run = prepare(load_recipe(recipe_of(played, folder, evaluation={"ks": [10]})))
    save(run)
    return run, build_catalogue(folder, run.writer.items)


def asked_of(run, **settings):
    """The recipe's evaluation, changed, with the examples that it asks about."""
    for name, value in settings.items():
        setattr(run.recipe.evaluation, name, value)
    return ranking_examples(run.writer, run.processor, run.split, "test", run.recipe.evaluation, run.recipe.seed)


@pytest.mark.parametrize("exclude_seen", some([True, False], [True]))
def test_evaluation_and_pipeline_agree_on_events_with_repeats(product, monkeypatch, exclude_seen):
    run, recommend = product
    monkeypatch.setattr(run.recipe.evaluation, "exclude_seen", exclude_seen)
    examples = asked_of(run)
    repeated = int(examples.repeated.sum())
    assert len(examples.users) == USERS and USERS / 5 < repeated < USERS
    row = full_report(run)["retrieval"]["m6rec"]
    known = {user: own["item_id"].tolist()[:-1] for user, own in run.log.interactions.groupby("user_id")}
    requests = [
        run.writer.request(user, run.writer.events(run.log.interactions.query("user_id == @user")[:-1]))
        for user in examples.users
    ]
    answers = recommend(requests, top_k=10, exclude_seen=exclude_seen, batch_size=64)
    found = [[item["item_id"] for item in answer] for answer in answers]
    targets = [run.writer.item_ids[target] for target in examples.targets]
    hits = [target in items for target, items in zip(targets, found)]
    assert row["recall@10"] == np.mean(hits)
    assert (row["examples"], row["repeats"]) == (USERS, repeated)
    assert row["repeats_counted"] == ("as misses" if exclude_seen else "as others")
    assert any(set(items) & set(known[user]) for user, items in zip(examples.users, found)) != exclude_seen
    again = np.array([target in known[user] for user, target in zip(examples.users, targets)])
    assert again.tolist() == examples.repeated.tolist()
    assert (
        row["repeated/recall@10"] == np.mean(np.array(hits)[again]) and (row["repeated/recall@10"] == 0) == exclude_seen
    )


def test_repeats_are_left_out_and_counted(product, monkeypatch, caplog):
    run, _ = product
    monkeypatch.setattr(run.recipe.evaluation, "repeats", "miss")
    missed, whole = full_report(run)["retrieval"], asked_of(run)
    assert (
        f"{whole.repeated.sum()} of {USERS} held-out events are of items that their users have met before"
        in caplog.text
    )
    assert "these events count as misses" in caplog.text
    asked = asked_of(run, repeats="leave_out")
    assert asked.users == [user for user, repeated in zip(whole.users, whole.repeated) if not repeated]
    assert set(asked.left_out) == set(whole.users) - set(asked.users) and not asked.repeated.any()
    left = full_report(run)["retrieval"]
    assert "these events are left out" in caplog.text
    share = len(asked.users) / USERS
    for who, row in left.items():
        assert (row["examples"], row["repeats"], row["repeats_counted"]) == (
            len(asked.users),
            len(asked.left_out),
            "not at all",
        )
        assert missed[who]["recall@10"] == pytest.approx(share * row["recall@10"])
        assert missed[who]["mrr"] == pytest.approx(share * row["mrr"])
    assert f", seen items out, {len(asked.left_out)} repeats counted not at all)" in tables({"retrieval": left})
    monkeypatch.setattr(run.recipe.evaluation, "exclude_seen", False)
    assert asked_of(run).users == whole.users, "seen items are in the ranking: there is nothing to leave out"


def test_without_repeats_nothing_is_said_of_them(run, caplog):
    row = full_report(run)["retrieval"]["m6rec"]
    assert not [name for name in row if name.startswith("repeat")] and "met before" not in caplog.text


def test_a_log_of_repeats_alone_is_not_measured_where_they_are_left_out(tmp_path, caplog):
    events = [
        {"user_id": f"u{user}", "item_id": f"s{user}", "timestamp": 1_600_000_000 + time}
        for user in range(4)
        for time in range(4)
    ]
    data = write_tables(tmp_path / "same", interactions=events, items=ITEMS)
    run = prepare(load_recipe(recipe_of(data, tmp_path / "run", evaluation={"repeats": "leave_out"})))
    assert full_report(run) == {}
    assert "4 of 4 held-out events" in caplog.text and "retrieval is not measured" in caplog.text


@pytest.mark.parametrize("split", [{"split": "leave-one-out"}, {"split": "time", "test_fraction": 0.2}])
@pytest.mark.parametrize("part", ["valid", "test"])
def test_repeats_are_counted_as_they_are_asked_about(tmp_path, split, part):
    data = write_revisits(tmp_path / "few", 40, seed=1)
    run = prepare(load_recipe(recipe_of(data, tmp_path / "run", evaluation=split)))
    asked = ranking_examples(run.writer, run.processor, run.split, part, run.recipe.evaluation, 0)
    assert count_repeats(run.split, part, run.recipe.evaluation) == (asked.repeated.sum(), len(asked.users))


def warning_of(data, folder, **evaluation):
    report = prepare_report(load_recipe(recipe_of(data, folder, evaluation=evaluation)))
    return report["split"], [text for text in report["warnings"] if "met before" in text]


def test_prepare_recommends_a_setting_for_a_log_of_revisits(played, tmp_path):
    split, (warning,) = warning_of(played, tmp_path)
    count = split["retrievals of an item that the user has met before"]
    assert split["retrievals in the test"] == USERS and USERS / 5 < count < USERS
    assert warning.startswith(f"{count} of {USERS} retrievals of the test ({count / USERS:.1%}) ask for an item that")
    assert "they count as misses" in warning and "set evaluation.exclude_seen=false" in warning
    assert "left out of the evaluation" in warning_of(played, tmp_path, repeats="leave_out")[1][0]
    (kept,) = warning_of(played, tmp_path, exclude_seen=False)[1]
    assert "seen items stay in the ranking" in kept and "set evaluation" not in kept


def test_prepare_says_that_few_repeats_are_no_reason(tmp_path, tables):
    events = [
        {"user_id": f"u{user}", "item_id": f"s{item}", "timestamp": 1_600_000_000 + item}
        for user in range(40)
        for item in range(user % 20, user % 20 + 4)
    ]
    assert warning_of(write_tables(tmp_path / "none", interactions=events, items=ITEMS), tmp_path)[1] == []
    events[3]["item_id"] = "s0"
    (warning,) = warning_of(write_tables(tmp_path / "one", interactions=events, items=ITEMS), tmp_path)[1]
    assert warning.startswith("1 of 40 retrievals of the test (2.5%)") and "exclude_seen=true fits" in warning
