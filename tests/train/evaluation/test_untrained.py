"""Rows that need no training: settings are chosen on validation, nothing of the test is counted."""

import dataclasses
import json

import numpy as np
import pandas
import pytest

from m6rec.item_features_m6rec import Transitions, Words
from m6rec.train.cli import main
from m6rec.train.config.arguments import BASELINES, EvaluationArguments
from m6rec.train.data.log import DataArguments, read_log
from m6rec.train.data.splits import hold_out
from m6rec.train.evaluation.baselines import LastItems
from m6rec.train.evaluation.reports import ranking_examples
from m6rec.train.evaluation.tuning import DEFAULT, Trial, choose_counting, choose_weights, choose_words, counted
from m6rec.train.evaluation.untrained import Learnt, Untrained, plain, untrained_rows
from m6rec.train.evaluation.verdicts import RULE
from m6rec.train.metrics import ndcg_at_k, target_ranks
from m6rec.train.rows.examples import RequestWriter

SETTINGS = ["recency", "second", "steps", "backwards", "out_power", "in_power", "share_ties"]


def after_one(num_users, gap):
    """Users of a world where what comes next follows the item so many places back, among 40 items."""
    rng, found = np.random.default_rng(0), []
    for _ in range(num_users):
        items = list(rng.integers(0, 40, gap))
        while len(items) < 12:
            items.append((items[-gap] + 1) % 40)
        found.append(np.array(items))
    return found


def test_the_window_that_predicts_is_chosen():
    sequences = after_one(60, 4)
    trial = Trial([own[:-1] for own in sequences], np.array([own[-1] for own in sequences]), exclude_seen=False)
    chosen = choose_counting([own[:-1] for own in sequences], 40, trial)
    assert len(chosen.steps) >= 5 and trial.of(counted(chosen, sequences, 40)) > trial.of(
        counted(DEFAULT, sequences, 40)
    )


@pytest.mark.parametrize("protocol", ["shuffled", "published"])
def test_tuned_rows_give_events_of_one_time_no_order_where_it_is_drawn(protocol, tmp_path):
    """Users take an item and its partner, on days with two events each: which of a day comes last says nothing."""
    rng, rows = np.random.default_rng(0), []
    for user in range(60):
        groups = rng.permutation(10)[:5]
        for day, group in enumerate(groups):
            rows += [
                (f"u{user}", f"i{3 * group + part}", 1_700_000_000 + 86_400 * day) for part in rng.permutation(3)[:2]
            ]
    events = pandas.DataFrame(rows, columns=["user_id", "item_id", "timestamp"])
    items = pandas.DataFrame({"item_id": [f"i{row}" for row in range(30)], "title": [f"t{row}" for row in range(30)]})
    for name, table in (("events", events), ("items", items)):
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    log = read_log(DataArguments(interactions=str(tmp_path / "events.csv"), items=str(tmp_path / "items.csv")))
    arguments = EvaluationArguments(protocol=protocol, baselines=["transitions", "words", "neighbours_and_words_tuned"])
    split, writer = hold_out(log.interactions, protocol, "fresh", 0), RequestWriter(log)
    rules = Untrained(writer, [f"t{row}" for row in range(30)], split, arguments, 0)
    examples = ranking_examples(writer, None, split, "test", arguments, 0)
    found = {name: own.settings.get("share_ties") for name, own in rules.scores(examples, "test").items()}
    share = protocol == "shuffled"
    assert found == {"transitions": share, "words": None, "neighbours_and_words_tuned": share}
    assert rules.words.rule.share_ties == share
    tuned = rules.scores(examples, "test")["neighbours_and_words_tuned"][slice(0, 60)]
    order = [rng.permutation(len(own)) for own in examples.histories]
    swapped = [
        own[shuffled[np.argsort(times[shuffled], kind="stable")]]
        for own, times, shuffled in zip(examples.histories, examples.moments, order)
    ]
    other = dataclasses.replace(examples, histories=swapped)
    again = rules.scores(other, "test")["neighbours_and_words_tuned"][slice(0, 60)]
    assert np.allclose(tuned, again, atol=1e-6) == share


def test_words_of_the_right_age_and_their_weight_are_chosen():
    texts = [f"group{row % 8} w{row}" for row in range(40)]
    words = LastItems(Words.of(texts), DEFAULT)
    rng = np.random.default_rng(0)
    histories = [rng.permutation(40)[:6] for _ in range(80)]
    newest = [next(item for item in range(40) if item % 8 == own[-1] % 8 and item not in own) for own in histories]
    trial = Trial(histories, np.array(newest), exclude_seen=True)
    assert choose_words(words, trial).rule.recency in ((1.0,), DEFAULT.recency)
    nothing = LastItems(Transitions.fit([], 40), DEFAULT)
    noise = LastItems(Transitions.fit(rng.integers(0, 40, (50, 10)), 40), DEFAULT)
    known = np.zeros(40, dtype=bool)
    assert choose_weights(nothing, words, known, trial) == (pytest.approx(0.3 * 2**-5), 0)  # all alike: the first
    assert choose_weights(noise, words, known, trial)[0] > 0.3


def test_words_count_more_for_items_without_events_where_these_are_chosen():
    """Users take an item of their group; half of the items are new, and transitions favour the others."""
    words = LastItems(Words.of([f"group{row % 8} w{row}" for row in range(80)]), DEFAULT)
    rng = np.random.default_rng(0)
    histories = [rng.permutation(40)[:6] for _ in range(80)]
    transitions = LastItems(Transitions.fit([rng.permutation(40) for _ in range(60)], 80), DEFAULT)
    new = np.array([40 + own[-1] % 8 for own in histories])
    old = np.array(
        [next(item for item in range(40) if item % 8 == own[-1] % 8 and item not in own) for own in histories]
    )
    unseen = np.arange(80) >= 40
    assert choose_weights(transitions, words, unseen, Trial(histories, new, exclude_seen=True))[1] > 0
    assert choose_weights(transitions, words, unseen, Trial(histories, old, exclude_seen=True))[1] == 0


def test_a_trial_measures_as_the_table_does():
    rng = np.random.default_rng(1)
    histories, targets = [rng.permutation(9)[:3] for _ in range(700)], rng.integers(0, 9, 700)
    scores = rng.random((700, 9))
    for exclude_seen in (False, True):
        trial = Trial(histories, targets, exclude_seen)
        ranks = target_ranks(scores, targets, histories if exclude_seen else None)
        assert trial.value(lambda part: scores[part]) == pytest.approx(ndcg_at_k(ranks, 10))


@pytest.mark.parametrize("observed", [False, True])
def test_what_is_held_out_is_never_counted(run, observed):
    """Where the test's items are exchanged, no score changes."""
    arguments = EvaluationArguments(protocol="time", observe_validation=observed, ks=[5])
    split = hold_out(run.log.interactions, "time", "time", 0, 0.2, 0.3)
    learnt = Learnt(run.writer, split, "test", arguments)
    assert learnt.counts.sum() == len(split.train) + len(split.gap) + len(split.valid) * observed
    made = Untrained(run.writer, run.texts, split, arguments, seed=0)
    examples = ranking_examples(run.writer, None, split, "test", arguments, 0)
    before = {name: scores[slice(None)] for name, scores in made.scores(examples, "test").items()}
    assert list(before) == list(BASELINES[:-1])
    changed = split.test.assign(item_id=np.roll(split.test["item_id"].to_numpy(dtype=object), 1))
    other = type(split)(split.train, split.valid, changed, split.gap)
    again = Untrained(run.writer, run.texts, other, arguments, seed=0).scores(examples, "test")
    for name, scores in again.items():
        np.testing.assert_array_equal(scores[slice(None)], before[name])


def test_rows_name_their_settings_and_what_they_rest_on(run):
    arguments = EvaluationArguments(ks=[5], baselines=["popularity", "transitions", "neighbours_and_words"])
    rows = untrained_rows(run.writer, run.texts, run.split, "test", arguments, seed=0)
    assert list(rows) == arguments.baselines
    assert list(rows["transitions"]["settings"]) == SETTINGS
    for who, row in rows.items():
        assert (row["protocol"], row["observed"], row["difference"]["to"]) == (
            "shuffled",
            False,
            RULE,
        )
        assert set(row["differences"]) == set(rows) - {who}
        for other, found in row["differences"].items():
            assert found["ndcg@5"]["value"] == pytest.approx(row["ndcg@5"] - rows[other]["ndcg@5"])
            low, high = found["ndcg@5"]["interval"]
            assert low <= found["ndcg@5"]["value"] <= high
            back = rows[other]["differences"][who]["ndcg@5"]["interval"]
            assert [-high, -low] == pytest.approx(back)
    assert rows["popularity"]["difference"]["ndcg@5"] == rows["popularity"]["differences"][RULE]["ndcg@5"]


def test_repeats_are_a_row_where_seen_items_are_recommended(run):
    found = {}
    for exclude in (True, False):
        arguments = EvaluationArguments(ks=[5], exclude_seen=exclude)
        untrained = Untrained(run.writer, run.texts, run.split, arguments, seed=0)
        assert ("repeat" in untrained.wanted) == (not exclude)
        assert ("repeat" in plain(arguments, run.split, len(run.texts)).baselines) == (not exclude)
        found[exclude] = untrained
    examples = ranking_examples(run.writer, None, run.split, "test", found[False].arguments, 0)
    first = found[False].scores(examples, "test")["repeat"][slice(0, 1)][0]
    met, counts = np.unique(examples.histories[0], return_counts=True)
    assert first[np.setdiff1d(np.arange(len(first)), met)].max() < 1 <= first[met].min()
    assert first.argmax() in met[counts == counts.max()]


def test_where_nothing_is_held_out_for_validation_the_first_settings_are_taken(run):
    split = type(run.split)(run.split.train, run.split.valid[:0], run.split.test)
    rows = untrained_rows(run.writer, run.texts, split, "test", EvaluationArguments(ks=[5]), seed=0)
    expected = {name: DEFAULT.to_dict()[name] for name in SETTINGS}
    assert rows["transitions"]["settings"] == {**expected, "share_ties": True}, "some events of the log have one time"
    assert "neighbours_and_words_tuned" not in rows and rows["words"]["settings"] == {"recency": list(DEFAULT.recency)}


def test_ease_is_left_out_of_large_catalogues_unless_it_is_named(run, monkeypatch, caplog):
    monkeypatch.setattr("m6rec.train.evaluation.baselines.EASE_QUICK", 3)
    with caplog.at_level("INFO"):
        rows = untrained_rows(run.writer, run.texts, run.split, "test", EvaluationArguments(ks=[5]), seed=0)
    assert "ease" not in rows and "ease is left out" in caplog.text
    named = EvaluationArguments(ks=[5], baselines=["ease"])
    assert list(untrained_rows(run.writer, run.texts, run.split, "test", named, seed=0)) == ["ease"]
    monkeypatch.setattr("m6rec.train.evaluation.baselines.EASE_ITEMS", 3)
    with pytest.raises(ValueError, match="leave ease out"):
        untrained_rows(run.writer, run.texts, run.split, "test", named, seed=0)


def test_a_recipe_is_measured_without_a_model(make_recipe, tables, tmp_path, capsys):
    recipe = make_recipe()
    recipe.save(tmp_path)
    asked = ["evaluation.protocol=time", "evaluation.test_fraction=0.3", "evaluation.validate=fresh"]
    asked.append("evaluation.observe_validation=true")
    assert main(["evaluate", str(tmp_path), "--untrained", "--output", str(tmp_path / "rows.json"), *asked]) == 0
    printed = capsys.readouterr().out
    assert "retrieval (11 examples, protocol time, validation part observed, seen items out" in printed
    assert "ndcg@5 - neighbours_and_words" in printed
    kept = json.loads((tmp_path / "rows.json").read_text())["retrieval"]
    assert list(kept) == list(BASELINES[:-1]) and kept["ease"]["observed"]
    assert main(["evaluate", str(tmp_path), "--output", "x.json"]) == 2
    assert "--output x.json goes with --untrained" in capsys.readouterr().err
