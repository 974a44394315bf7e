"""Tables in, tables out: `m6rec.fit`, and what a trained recommender answers."""

import json

import pandas
import pytest

import m6rec
from m6rec.train import Recommender, evaluate, load_recipe
from m6rec.train.cli import main
from tests.train.world import ITEMS, figures, recipe_of, write_world


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    paths = write_world(tmp_path_factory.mktemp("world"))
    return {name: pandas.read_csv(path, dtype={"user_id": str, "item_id": str}) for name, path in paths.items()}


@pytest.fixture(scope="module")
def trained(tables, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "own"
    return m6rec.fit(tables["interactions"], tables["items"], tables["users"], recipe=recipe_of({}, folder), minutes=0)


def test_users_of_the_log_get_a_table(trained, tables):
    found = trained.recommend(["u3", "u1"], k=4)
    assert list(found.columns) == ["user_id", "rank", "item_id", "score"]
    assert found["user_id"].tolist() == ["u3"] * 4 + ["u1"] * 4 and found["rank"].tolist() == [1, 2, 3, 4] * 2
    for user, own in found.groupby("user_id"):
        assert own["score"].is_monotonic_decreasing
        events = tables["interactions"]
        assert not set(own["item_id"]) & set(events[events["user_id"] == user]["item_id"])
    assert set(trained.recommend(["u3"], k=15, exclude_seen=False)["item_id"]) == {item["item_id"] for item in ITEMS}


def test_a_table_of_events_is_the_history_of_new_users(trained):
    """The answer is that of the pipeline to the same history."""
    events = pandas.DataFrame(
        {"user_id": ["new", "new"], "item_id": ["i3", "i5"], "timestamp": [1_600_007_200, 1_600_003_600]}
    )
    found = trained.recommend(events, k=3)
    history = [
        {"item": {"item_id": "i5"}, "timestamp": 1_600_003_600},
        {"item": {"item_id": "i3"}, "timestamp": 1_600_007_200},
    ]
    answer = trained.pipeline({"history": history}, task="retrieval", top_k=3)
    assert found["item_id"].tolist() == [row["item_id"] for row in answer]
    assert found["score"].tolist() == pytest.approx([row["score"] for row in answer], abs=1e-6)


def test_the_folder_is_a_run_for_every_command(trained, capsys):
    assert load_recipe(trained.directory).data.interactions == str(
        trained.directory / "tables" / "interactions.parquet"
    )
    assert main(["recommend", str(trained.directory), "--user", "u3", "--top-k", "2"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [row["item_id"] for row in printed] == trained.recommend(["u3"], k=2)["item_id"].tolist()
    again = Recommender(trained.directory).recommend(["u3"], k=2)
    pandas.testing.assert_frame_equal(again, trained.recommend(["u3"], k=2), atol=1e-5)


def test_evaluate_repeats_the_report_of_the_training(trained):
    written = json.loads((trained.directory / "metrics.json").read_text())
    found = trained.evaluate()
    assert found["retrieval"]["m6rec"]["ndcg@5"] == pytest.approx(written["retrieval"]["m6rec"]["ndcg@5"], abs=1e-6)
    assert set(found["retrieval"]) == set(written["retrieval"])
    again = evaluate(trained.directory)["retrieval"]["m6rec"]
    assert figures(again) == pytest.approx(figures(written["retrieval"]["m6rec"]), abs=1e-5)


def test_later_events_are_ranked_after_the_whole_log(trained):
    later = pandas.DataFrame({"user_id": ["u3", "u1"], "item_id": ["i14", "i14"], "timestamp": [2e9, 2e9]})
    report = trained.evaluate(later)["retrieval"]["m6rec"]
    assert report["examples"] == 2, sorted(report)
    ranks = [trained.recommend([user], k=15).set_index("item_id").loc["i14", "rank"] for user in ("u3", "u1")]
    assert report["mrr"] == pytest.approx(sum(1 / rank for rank in ranks) / 2, abs=1e-6)


def test_what_cannot_be_used_is_refused(trained, tables, tmp_path):
    with pytest.raises(ValueError, match=r"2 users are not in the log, the first is 'nobody'.*begins with 'u0'"):
        trained.recommend(["u1", "nobody", "none"])
    with pytest.raises(ValueError, match=r"item_id.*i99"):
        trained.recommend(pandas.DataFrame({"user_id": ["new"], "item_id": ["i99"], "timestamp": [1_600_000_000]}))
    with pytest.raises(ValueError, match="item_id"):
        m6rec.fit(tables["interactions"], tables["items"].drop(columns="item_id"), recipe=recipe_of({}, tmp_path))
    with pytest.raises(AttributeError, match="nothing"):
        m6rec.train.nothing
