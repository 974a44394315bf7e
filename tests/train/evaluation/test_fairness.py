"""Exposure and groups: by hand, and through a report of a log."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pandas
import pytest

from m6rec.train.config.arguments import EvaluationArguments
from m6rec.train.evaluation import fairness
from m6rec.train.evaluation.fairness import Fields, fairness_report, fields_of
from m6rec.train.evaluation.reports import ranking_examples, ranking_rows
from m6rec.train.evaluation.tables import tables
from m6rec.train.metrics import gini, list_exposure, ndcg_gains
from m6rec.train.runs.build import prepare


def test_gini_is_the_mean_difference_of_two_items_over_twice_the_mean():
    rng = np.random.default_rng(0)
    for _ in range(10):
        values = rng.integers(0, 9, size=7) + np.arange(7) % 2
        differences = np.abs(values[:, None] - values[None]).mean()
        assert gini(values) == pytest.approx(differences / (2 * values.mean()))
    with pytest.raises(ValueError, match="values are all 0"):
        gini([0, 0])
    with pytest.raises(ValueError, match=r"values holds -1.0 at 1"):
        gini([1, -1])


def test_exposure_counts_the_rank_in_each_list():
    found = list_exposure([[3, 1], [], [1, 3, 0]], 5)
    assert found == pytest.approx([1 / 2, 1 / np.log2(3) + 1, 0, 1 + 1 / np.log2(3), 0])
    assert list_exposure([[], [2]], 3).tolist() == [0, 0, 1]


def test_a_report_by_hand(monkeypatch):
    monkeypatch.setattr(fairness, "LEAST_USERS", 2)
    counts = np.array([1, 9, 3, 2, 0, 5, 4, 0, 0, 6])
    top = [np.array([1, 9]), np.array([1, 4]), np.array([5, 1])]
    kinds = [["a"], ["a", "b"], *[["b"]] * 8]
    fields = Fields({"gender": np.array(["f", "m", "f"], dtype=object)}, {"kind": kinds})
    gains = {"recall@2": np.array([1.0, 1.0, 0.0]), "ndcg@2": np.array([0.5, 1.0, 0.0])}
    report = fairness_report(top, gains, ["u", "v", "w"], fields, counts, seed=0)
    second = 1 / np.log2(3)
    total = 3 * (1 + second)
    # By events: items 1 and 9 are the first fifth, 5 and 6 the second; of those without events, 4 comes first.
    shares = {name: own["share"] for name, own in report["exposure"]["popularity"].items()}
    expected = [2 + second + second, 1, 0, second, 0]
    assert shares == pytest.approx({f"fifth {n + 1}": own / total for n, own in enumerate(expected)})
    assert report["exposure"]["popularity"]["fifth 1"]["events"] == pytest.approx(15 / 30)
    assert report["exposure"]["popularity"]["fifth 1"]["items"] == pytest.approx(2 / 10)
    kind = report["exposure"]["kind"]
    assert kind["a"]["share"] == pytest.approx((2 + second) / 2 / total)
    assert kind["a"]["items"] == pytest.approx(1.5 / 10)
    assert kind["b"]["events"] == pytest.approx((9 / 2 + 20) / 30)
    assert report["coverage"] == 4 / 10
    assert report["gini"] == pytest.approx(gini([0, 2 + second, 0, 0, second, 1, 0, 0, 0, second]))
    assert report["groups"] == {
        "gender": {
            "f": {"users": 2, "recall@2": 0.5, "ndcg@2": 0.25, "intervals": {"recall@2": [0, 1], "ndcg@2": [0, 0.5]}}
        }
    }
    assert report["not_shown"] == {"gender": 1}


def test_many_values_are_added_up(monkeypatch):
    monkeypatch.setattr(fairness, "MOST_VALUES", 1)
    fields = Fields({}, {"kind": [["a"], ["b"], ["b"], ["c"]]})
    report = fairness_report([np.array([0, 3])], {"ndcg@2": np.ones(1)}, ["u"], fields, np.ones(4), 0)
    kind = report["exposure"]["kind"]
    assert list(kind) == ["b", "others"]
    assert kind["others"] == pytest.approx({"share": 1.0, "events": 0.5, "items": 0.5})


def writer_of(users, items):
    known = pandas.DataFrame(users).set_index("user_id").astype(str) if users else None
    log = SimpleNamespace(users=known, items=pandas.DataFrame(items))
    rows = {} if known is None else {name: {k: v for k, v in row.items() if v} for name, row in known.iterrows()}
    return SimpleNamespace(log=log, items=items, user=lambda name: rows.get(name, {}))


def test_numbers_become_bands_and_lists_become_values():
    users = [{"user_id": f"u{age}", "age": age, "gender": "f" if age % 2 else ""} for age in range(20, 60)]
    writer = writer_of(users, [{"genres": "Crime, Drama"}, {"genres": "Drama|War"}, {}])
    names = [user["user_id"] for user in users]
    found = fields_of(["age", "gender", "genres"], writer, [*names, "u20", "stranger"])
    sizes = {band: int((found.users["age"][:40] == band).sum()) for band in dict.fromkeys(found.users["age"])}
    assert sizes == {"20 to 29": 10, "30 to 39": 10, "40 to 49": 10, "50 to 59": 10, "unknown": 0}
    assert found.users["age"][-2:].tolist() == ["20 to 29", "unknown"]
    assert set(found.users["gender"]) == {"f", "unknown"}
    assert found.items["genres"] == [["Crime", "Drama"], ["Drama", "War"], ["unknown"]]
    few = fields_of(["age"], writer, names[:8]).users["age"]
    assert few.tolist() == [str(age) for age in range(20, 28)]


def test_bands_are_listed_by_size(monkeypatch):
    monkeypatch.setattr(fairness, "LEAST_USERS", 1)
    groups = np.array(["26 to 31", "unknown", "7 to 25", "100", "f"], dtype=object)
    fields = Fields({"age": groups}, {})
    report = fairness_report([np.array([0])] * 5, {"ndcg@1": np.ones(5)}, list("abcde"), fields, np.ones(2), 0)
    assert list(report["groups"]["age"]) == ["7 to 25", "26 to 31", "100", "f", "unknown"]


def test_an_unknown_field_is_refused():
    with pytest.raises(ValueError, match="have a field 'colour'; users have none, items title"):
        fields_of(["colour"], writer_of([], [{"title": "a"}]), [])


def test_every_row_of_a_report_has_its_exposure_and_groups(make_recipe, monkeypatch):
    monkeypatch.setattr(fairness, "LEAST_USERS", 3)
    run = prepare(make_recipe(evaluation={"ks": [1, 5]}))
    arguments = EvaluationArguments(ks=[1, 5], fairness=["gender", "age", "year"])
    examples = ranking_examples(run.writer, run.processor, run.split, "test", arguments, 0)
    counts = np.arange(15)
    scores = {
        "m6rec": np.random.default_rng(0).random((len(examples.users), 15)),
        "popularity": np.tile(counts, (12, 1)),
    }
    rows = ranking_rows(scores, examples, counts, arguments, 0)
    own = rows["popularity"]["fairness"]
    assert own["top"] == 5
    assert own["coverage"] == rows["popularity"]["coverage@5"]
    assert own["exposure"]["popularity"]["fifth 1"]["share"] > 0.4
    assert sum(value["share"] for value in own["exposure"]["year"].values()) == pytest.approx(1)
    assert set(own["groups"]["gender"]) == {"male", "女"}
    assert own["not_shown"]["gender"] == 2
    ranks = evaluation_ranks(scores["popularity"], examples)
    men = np.array([run.writer.user(user).get("gender") == "male" for user in examples.users])
    assert own["groups"]["gender"]["male"]["ndcg@5"] == pytest.approx(ndcg_gains(ranks[men], 5).mean())
    text = tables({"retrieval": rows})
    assert "by gender (2 users in groups that are too small are not shown)" in text
    assert "exposure by year" in text
    plain = ranking_rows(scores, dataclasses.replace(examples, fields=None), counts, arguments, 0)
    assert "fairness" not in plain["popularity"]
    assert plain["popularity"] == {name: value for name, value in rows["popularity"].items() if name != "fairness"}


def evaluation_ranks(scores, examples):
    table = scores.astype(float)
    for row, seen in enumerate(examples.histories):
        table[row, seen] = -np.inf
    target = table[np.arange(len(table)), examples.targets][:, None]
    above, equal = (table > target).sum(1), (table == target).sum(1)
    return np.where(np.isneginf(target[:, 0]), np.inf, above + (equal + 1) / 2)
