"""How a model compares with what needs no training: the figures by hand, the sentence, and where it is kept."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from m6rec.train.evaluation.reports import ScoringExamples, scoring_rows
from m6rec.train.evaluation.tables import tables
from m6rec.train.evaluation.verdicts import advised, compare, verdicts
from m6rec.train.runs.finetune import finetune

RECIPE = SimpleNamespace(
    text=SimpleNamespace(statistics=[]), training={}, tuning=SimpleNamespace(average_checkpoints=1)
)


def test_the_best_baseline_is_compared_on_the_same_users():
    rng = np.random.default_rng(0)
    hard = rng.random(400)  # what makes a user easy or hard is common to all, and leaves the difference alone
    values = {"m6rec": hard + 0.05, "popularity": hard * 0.5, "similar_text": hard + rng.normal(0, 0.2, 400)}
    found = compare("ndcg@10", values)
    assert (found["baseline"], found["metric"]) == ("similar_text", "ndcg@10")
    difference = values["m6rec"] - values["similar_text"]
    spread = difference.std() / 20
    assert found["difference"] == pytest.approx(difference.mean())
    assert found["interval"] == pytest.approx(
        [difference.mean() - 1.96 * spread, difference.mean() + 1.96 * spread], abs=0.003
    )
    assert found["better"] and not found["worse"]
    assert found == compare("ndcg@10", values), "the same seed draws the same users"
    with_network = compare("ndcg@10", {**values, "network": hard + 0.1})
    assert with_network["baseline"] == "similar_text", "a trained network is no baseline"


@pytest.mark.parametrize(
    ("metric", "own", "other", "how"),
    [
        ("ndcg@10", 0.5, 0.25, "better"),
        ("ndcg@10", 0.25, 0.5, "worse"),
        ("rmse", 0.25, 1.0, "better"),
        ("rmse", 1.0, 0.25, "worse"),
        ("log_loss", 0.25, 0.5, "better"),
        ("log_loss", 0.5, 0.25, "worse"),
        ("auc", 0.5, 0.5, "not measurably better"),
        ("rmse", 0.5, 0.5, "not measurably better"),
    ],
)
def test_less_is_better_of_errors(metric, own, other, how):
    found = compare(metric, {"m6rec": np.full(4, own), "item_mean": np.full(4, other)})
    assert f"m6rec is {how} than item_mean, the best row that needs no training: {metric}" in found["sentence"]
    shown = math.sqrt if metric == "rmse" else float
    assert found["difference"] == pytest.approx(shown(own) - shown(other))
    assert (found["better"], found["worse"]) == (how == "better", how == "worse")


def test_the_best_of_several_errors_is_the_smallest():
    values = {"m6rec": np.ones(3), "a": np.full(3, 3.0), "b": np.full(3, 2.0)}
    assert (compare("log_loss", values)["baseline"], compare("mrr", values)["baseline"]) == ("b", "a")


def test_whole_users_are_drawn():
    """Two users of opposite signs: an interval over users holds both, one over their 200 events would not."""
    users = np.repeat(["a", "b"], [100, 100])
    own, other = np.where(users == "a", 1.0, 0.0), np.where(users == "a", 0.0, 0.9)
    by_user = compare("mrr", {"m6rec": own, "popularity": other}, users)
    assert by_user["interval"] == [pytest.approx(-0.9), pytest.approx(1.0)] and not by_user["better"]
    assert "over 2 users" in by_user["sentence"]
    with pytest.raises(ValueError, match="groups has 3 entries"):
        compare("mrr", {"m6rec": own, "popularity": other}, ["a", "b", "c"])


def test_a_model_that_is_not_better_is_told_what_to_try():
    worse = compare("ndcg@10", {"m6rec": np.zeros(5), "similar_text": np.ones(5)})
    plain = advised(worse, "retrieval", RECIPE, SimpleNamespace(tfidf_weight=0.0))["sentence"]
    assert "Try model.config.tfidf_weight=0.6" in plain and "training.load_best_model_at_end=true" in plain
    tried = SimpleNamespace(**{**vars(RECIPE), "training": {"load_best_model_at_end": True}})
    rest = advised(worse, "retrieval", tried, SimpleNamespace(tfidf_weight=0.6))["sentence"]
    assert "tfidf_weight" not in rest and "load_best" not in rest and "more data" in rest
    assert "item_likes" in advised(worse, "click", RECIPE, SimpleNamespace(tfidf_weight=0.0))["sentence"]
    better = compare("ndcg@10", {"m6rec": np.ones(5), "similar_text": np.zeros(5)})
    assert "Try" not in advised(better, "retrieval", RECIPE, SimpleNamespace(tfidf_weight=0.0))["sentence"]


def test_the_values_compared_are_those_of_the_table():
    users = np.array(["a", "a", "b", "c"], dtype=object)
    labels = np.array([[1, 0], [0, -100], [1, -100], [0, -100]])  # one answer of the second interaction
    examples = ScoringExamples([], users, users, labels, ["like", "follow"])
    own, other = np.array([[0.9, 0.2]] * 4), np.array([[0.5, 0.5]] * 4)
    rows = scoring_rows({"m6rec": own, "item_mean": other}, examples, "interaction", 0)
    verdict = rows["m6rec"]["verdict"]
    assert verdict["value"] == pytest.approx(rows["m6rec"]["log_loss"])
    assert verdict["baseline_value"] == pytest.approx(rows["item_mean"]["log_loss"]) == pytest.approx(math.log(2))
    rated = ScoringExamples([], users, users, np.array([1.0, 2.0, 3.0, 4.0]))
    rows = scoring_rows({"m6rec": np.full(4, 2.0), "item_mean": np.full(4, 3.0)}, rated, "rating", 0)
    for name, who in (("value", "m6rec"), ("baseline_value", "item_mean")):
        assert rows["m6rec"]["verdict"][name] == pytest.approx(rows[who]["rmse"])


def test_a_run_ends_with_a_sentence_for_each_task(make_recipe):
    task = {"learn": ["retrieval", "click", "rating"]}
    recipe = make_recipe(task=task)
    report = finetune(recipe)
    assert list(verdicts(report)) == task["learn"]
    kept = json.loads((recipe.output_dir / "metrics.json").read_text())
    printed = tables(report)
    for name in task["learn"]:
        verdict = kept[name]["m6rec"]["verdict"]
        assert verdict["value"] == pytest.approx(report[name]["m6rec"][verdict["metric"]])
        best = {who: row[verdict["metric"]] for who, row in report[name].items() if who != "m6rec"}
        choose = max if name == "retrieval" else min
        assert best[verdict["baseline"]] == pytest.approx(choose(best.values())) == verdict["baseline_value"]
        assert verdict["sentence"] in printed.splitlines()
