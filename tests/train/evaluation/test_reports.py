"""What is measured: the right events, told nothing of the answer, the same in batches as one by one."""

import copy
import math

import numpy as np
import pandas
import pytest
import torch

from m6rec.train.config.arguments import BASELINES, EvaluationArguments, TaskArguments
from m6rec.train.data.splits import Split, hold_out, order
from m6rec.train.evaluation import reports as evaluation
from m6rec.train.evaluation.reports import (
    RankingExamples,
    Scores,
    ScoringExamples,
    before_and_in,
    catalogue_vectors,
    learnt_sequences,
    predictions,
    rank_catalogue,
    ranking_examples,
    ranking_intervals,
    ranking_rows,
    ranking_scores_report,
    ranks_of_sums,
    scoring_baselines,
    scoring_examples,
    scoring_report,
    user_vectors,
)
from m6rec.train.evaluation.untrained import untrained_rows
from m6rec.train.metrics import auc, grouped_auc, log_loss, ndcg_at_k, rmse, target_ranks
from m6rec.train.runs.build import prepare
from tests.fast import some

TASK = TaskArguments(learn=["click", "rating"])
BY_TIME = {"split": "time", "valid_fraction": 0.2, "test_fraction": 0.3}


@pytest.fixture
def timed(make_recipe):
    """The world split by time, where users have several held-out events, and some no history."""
    return prepare(make_recipe(evaluation=BY_TIME, model={"item_embeddings": True}))


def examples_of(run, part="test", max_users=None, seed=0):
    arguments = EvaluationArguments(max_users=max_users)
    return ranking_examples(run.writer, run.processor, run.split, part, arguments, seed)


def scored(run, part="test", task="click", max_users=None, seed=0):
    evaluating = EvaluationArguments(max_users=max_users)
    return scoring_examples(run.writer, run.processor, run.split, part, task, TASK, evaluating, seed)


def by_user(frame):
    return {user: own["item_id"].tolist() for user, own in frame.groupby("user_id")}


@pytest.mark.parametrize("part", ["valid", "test"])
def test_each_users_next_item_is_asked_and_all_before_it_is_told(run, part):
    examples = examples_of(run, part)
    ordered = by_user(order(run.log.interactions, 0))
    back = {"valid": 2, "test": 1}[part]
    assert examples.users == sorted(ordered)
    trained = {item for events in ordered.values() for item in events[:-2]}
    for place, user in enumerate(examples.users):
        events = ordered[user]
        target = events[-back]
        seen = [run.writer.item_ids[row] for row in examples.histories[place]]
        assert seen == events[:-back]
        assert run.writer.item_ids[examples.targets[place]] == target
        assert examples.cold[place] == (target not in trained)
        text = run.processor.tokenizer.decode(examples.rows[place]["input_ids"])
        titles = [run.writer.item(item)["title"] for item in seen[-run.processor.max_events :]]
        found = [text.find(title) for title in titles]
        assert found == sorted(found)
        assert min(found) > 0
        assert run.writer.item(target)["title"] not in text
        assert text.count("[EVENT]") == len(titles)
        assert "[BOS]" not in text
    assert len(set(examples.cold)) == 2 or part == "valid", "the world has a cold target"


def test_what_may_be_known_of_the_test_is_also_the_validation_part(timed):
    split = timed.split
    assert before_and_in(split, "valid")[0] is split.train
    known, held_out = before_and_in(split, "test")
    assert held_out is split.test
    assert sorted([*split.train.index, *split.valid.index]) == known.index.tolist()
    for _, own in known.groupby("user_id"):
        assert own["timestamp"].is_monotonic_increasing


def test_only_users_with_a_history_are_ranked_and_only_their_first_event(timed):
    examples = examples_of(timed, "test")
    known, held_out = (by_user(frame) for frame in before_and_in(timed.split, "test"))
    assert set(examples.users) == set(known) & set(held_out)
    firsts = [held_out[user][0] for user in examples.users]
    assert [timed.writer.item_ids[row] for row in examples.targets] == firsts
    assert any(len(items) > 1 for items in held_out.values())


def test_an_item_that_only_the_validation_part_has_is_cold_in_the_test(run):
    train, valid, test = run.split.train, run.split.valid, run.split.test
    split = Split(train, valid.assign(item_id="i14"), test.assign(item_id=["i14"] * 6 + ["i0"] * 6))
    examples = ranking_examples(run.writer, run.processor, split, "test", EvaluationArguments(), seed=0)
    assert examples.cold.tolist() == [True] * 6 + [False] * 6


def by_protocol(run, part="test", **arguments):
    asked = EvaluationArguments(**arguments)
    validate = asked.validate or ("time" if asked.protocol == "time" else "fresh")
    split = hold_out(run.log.interactions, asked.protocol, validate, 0, 0.2, 0.3)
    return split, ranking_examples(run.writer, None, split, part, asked, seed=0)


@pytest.mark.parametrize("successive", [False, True])
def test_by_time_the_last_event_is_ranked_or_each_after_all_before_it(run, successive):
    split, examples = by_protocol(run, protocol="time", successive=successive)
    ordered = by_user(order(run.log.interactions, 0))
    wanted = []
    for user, own in split.test.groupby("user_id"):
        places = range(len(ordered[user]) - len(own), len(ordered[user]))
        wanted += [(user, ordered[user][:at], ordered[user][at]) for at in places if at][0 if successive else -1 :]
    ids = run.writer.item_ids
    found = [
        (user, [ids[row] for row in history], ids[target])
        for user, history, target in zip(examples.users, examples.histories, examples.targets)
    ]
    assert found == wanted and len(found) > len(set(examples.users)) * successive
    last = order(run.log.interactions, 0).groupby("user_id")["timestamp"].apply(list)
    assert examples.times.tolist() == [last[user][len(history) - 1] for user, history, _ in wanted]
    assert examples.conditions == {"protocol": "time", "observed": False} and examples.rows == []


@pytest.mark.parametrize(("protocol", "validate"), [("shuffled", "stale"), ("time", "time"), ("published", "fresh")])
@pytest.mark.parametrize("observed", [False, True])
def test_what_is_learnt_before_a_part(run, protocol, validate, observed):
    split, examples = by_protocol(run, protocol=protocol, validate=validate, observe_validation=observed)
    learnt = pandas.concat([split.train, split.gap, *([split.valid] if observed else [])])
    asked = EvaluationArguments(protocol=protocol, observe_validation=observed)
    sequences = learnt_sequences(run.writer, split, "test", asked)
    assert sum(map(len, sequences)) == len(learnt)
    assert [[run.writer.item_ids[row] for row in own] for own in sequences] == list(
        by_user(learnt.sort_index()).values()
    )
    assert sum(map(len, learnt_sequences(run.writer, split, "valid", asked))) == len(split.train)
    known = set(learnt["item_id"])
    assert examples.cold.tolist() == [run.writer.item_ids[target] not in known for target in examples.targets]
    pairs = {(one, other) for own in sequences for step in (1, 2) for one, other in zip(own, own[step:])}
    pairs |= {(other, one) for one, other in pairs}
    together = [(own[-1], target) in pairs for own, target in zip(examples.histories, examples.targets)]
    assert examples.transition.tolist() == together
    assert examples.conditions == {"protocol": protocol, "observed": observed}
    parts = [examples.subsets[name] for name in ("seen_transition", "unseen_transition", "cold")]
    assert (np.sum(parts, 0) == 1).all() and examples.subsets["seen_transition"].any()
    short = examples.subsets["few_events"].tolist()
    assert short == [len(history) < 5 for history in examples.histories]


def test_a_stale_validation_event_is_predicted_after_the_gap(run):
    split, examples = by_protocol(run, "valid", protocol="shuffled", validate="stale")
    ordered = by_user(order(run.log.interactions, 0))
    for user, history in zip(examples.users, examples.histories, strict=True):
        assert [run.writer.item_ids[row] for row in history] == ordered[user][:-2]
    assert len(split.gap) == len(split.valid) == 12


def test_scored_events_are_the_held_out_ones_with_their_labels(timed):
    for task, column in (("click", "label"), ("rating", "rating")):
        examples = scored(timed, task=task)
        told = {(event["user_id"], event["item_id"]): event[column] for event in timed.split.test.to_dict("records")}
        asked = dict(zip(zip(examples.user_ids, examples.item_ids), examples.labels))
        assert asked == told
        assert sum(row["input_ids"].count(timed.model.config.bos_token_id) for row in examples.rows) == len(told)


def test_scored_candidates_stand_in_the_order_of_their_labels_behind_what_is_known(timed):
    examples = scored(timed)
    known, _ = before_and_in(timed.split, "test")
    place = 0
    for row in examples.rows:
        source, *targets = timed.processor.tokenizer.decode(row["input_ids"]).split("[BOS]")
        user = examples.user_ids[place]
        for target in targets:
            assert examples.user_ids[place] == user
            assert timed.writer.item(examples.item_ids[place])["title"] in target
            assert "stars" not in target
            place += 1
        history = known[known["user_id"] == user]["item_id"].tolist()[-timed.processor.max_events :]
        assert source.count("[EVENT]") == len(history)
        assert all(timed.writer.item(item)["title"] in source for item in history)
    assert place == len(examples.labels)


def test_events_without_a_label_are_not_asked(timed):
    test = timed.split.test.assign(rating=timed.split.test["rating"].where(timed.split.test["rating"] != 3))
    split = type(timed.split)(timed.split.train, timed.split.valid, test)
    examples = scoring_examples(
        timed.writer, timed.processor, split, "test", "rating", TASK, EvaluationArguments(), seed=0
    )
    assert len(examples.labels) == test["rating"].notna().sum() < len(test)
    assert 3 not in examples.labels


def of_task(run, task, rolling=False, part="test", **arguments):
    evaluating = EvaluationArguments(rolling=rolling)
    arguments = TaskArguments(learn=[task], **arguments)
    return scoring_examples(run.writer, run.processor, run.split, part, task, arguments, evaluating, seed=0)


@pytest.mark.parametrize("part", ["valid", "test"])
def test_rolling_asks_each_event_after_all_before_it(timed, part):
    timed.processor.max_events = 3
    examples = of_task(timed, "click", rolling=True, part=part)
    ordered = order(timed.log.interactions, 0)
    held_out = {
        (event["user_id"], event["item_id"]) for event in before_and_in(timed.split, part)[1].to_dict("records")
    }
    expected = []
    for user, own in ordered.groupby("user_id"):
        events = own.to_dict("records")
        for place, event in enumerate(events):
            if (user, event["item_id"]) in held_out:
                expected.append((user, event["item_id"], event["label"], events[max(place - 3, 0) : place]))
    asked = zip(examples.user_ids, examples.item_ids, examples.labels, strict=True)
    assert list(asked) == [(user, item, label) for user, item, label, _ in expected]
    overall = before_and_in(timed.split, part)[0]["label"].mean()
    for row, mean, (_, item, _, history) in zip(examples.rows, examples.history_means, expected, strict=True):
        source, target = timed.processor.tokenizer.decode(row["input_ids"]).split("[BOS]")
        assert timed.writer.item(item)["title"] in target
        titles = [timed.writer.item(event["item_id"])["title"] for event in history]
        places = [source.find(title) for title in titles]
        assert places == sorted(places)
        assert all(place > 0 for place in places)
        assert source.count("[EVENT]") == len(history)
        assert mean == pytest.approx((sum(event["label"] for event in history) + 5 * overall) / (len(history) + 5))
    assert any(len(history) for *_, history in expected)


def test_rolling_asks_the_same_events_as_asking_all_at_once(timed):
    at_once, rolling = of_task(timed, "rating"), of_task(timed, "rating", rolling=True)
    assert len(at_once.rows) < len(rolling.rows) == len(rolling.labels)
    for name in ("user_ids", "item_ids", "labels"):
        assert getattr(at_once, name).tolist() == getattr(rolling, name).tolist()


INTERACTIONS = {"like": ["like"], "seen": ["watch", "like"]}


def test_interactions_are_measured_one_by_one(timed):
    examples = of_task(timed, "interaction", interactions=INTERACTIONS)
    verbs = {(event["user_id"], event["item_id"]): event["event"] for event in timed.split.test.to_dict("records")}
    own = [verbs[pair] for pair in zip(examples.user_ids, examples.item_ids)]
    assert examples.labels.tolist() == [[verb == "like", verb in ("watch", "like")] for verb in own]
    chances = np.random.default_rng(0).random(examples.labels.shape)
    report = scoring_report(chances, examples, "interaction")
    for place, name in enumerate(INTERACTIONS):
        assert report[f"{name}/auc"] == auc(chances[:, place], examples.labels[:, place])
        assert report[f"{name}/log_loss"] == log_loss(chances[:, place], examples.labels[:, place])
    for metric in ("auc", "log_loss", "calibration_error"):
        assert report[metric] == pytest.approx((report[f"like/{metric}"] + report[f"seen/{metric}"]) / 2)
    assert report["examples"] == len(own)
    task = TaskArguments(learn=["interaction"], interactions=INTERACTIONS)
    found = scoring_baselines(timed.split, timed.writer, examples, "test", "interaction", task, 0)
    table = {name: scoring_report(own, examples, "interaction") for name, own in found.items()}
    known, _ = before_and_in(timed.split, "test")
    liked = known["event"] == "like"
    means = [
        (liked[known["item_id"] == item].sum() + 5 * liked.mean()) / ((known["item_id"] == item).sum() + 5)
        for item in examples.item_ids
    ]
    assert table["item_mean"]["like/log_loss"] == pytest.approx(log_loss(means, examples.labels[:, 0]))


def test_an_event_without_refusals_is_measured_beside_negatives(timed):
    examples = of_task(timed, "interaction", interactions={"like": ["like"], "seen": ["watch"]}, negatives_per_event=3)
    everything = timed.log.interactions
    met = {user: set(own["item_id"]) for user, own in everything.groupby("user_id")}
    occurs = {verb: set(own["item_id"]) for verb, own in everything.groupby("event")}
    verbs = {(event["user_id"], event["item_id"]): event["event"] for event in everything.to_dict("records")}
    positives = negatives = 0
    for user, item, label in zip(examples.user_ids, examples.item_ids, examples.labels.tolist(), strict=True):
        if item in met[user]:
            positives, verb = positives + 1, verbs[user, item]
            assert label == [1 if verb == "like" else -100, 1 if verb == "watch" else -100]
            continue
        negatives += 1
        assert item in occurs[verb]
        assert label == [0 if verb == "like" else -100, 0 if verb == "watch" else -100]
    assert positives == timed.split.test["event"].isin(["like", "watch"]).sum()
    assert negatives > positives
    assert (
        sum(row["input_ids"].count(timed.model.config.bos_token_id) for row in examples.rows) == positives + negatives
    )
    chances = np.where(examples.labels == -100, 0.9, 0.25 + 0.5 * examples.labels)
    report = scoring_report(chances, examples, "interaction")
    assert (report["auc"], report["negatives_per_event"], report["negatives"]) == (1, 3, "uniform")
    assert report["like/examples"] + report["seen/examples"] == positives + negatives


def test_beside_negatives_the_mean_of_an_item_is_its_popularity(timed):
    task = TaskArguments(learn=["click"], negatives_per_event=4)
    split = Split(*(part.drop(columns=["label", "rating"]) for part in vars(timed.split).values()))
    made = (timed.writer, timed.processor, split, "test", "click", task, EvaluationArguments(), 0)
    examples = scoring_examples(*made)
    assert examples.history_means is None
    found = scoring_baselines(split, timed.writer, examples, "test", "click", task, 0)
    table = {name: scoring_report(own, examples, "click") for name, own in found.items()}
    assert list(table) == ["user_mean", "item_mean"]
    known, _ = before_and_in(split, "test")
    popular = known["item_id"].value_counts()
    by_popularity = auc([popular.get(item, 0) for item in examples.item_ids], examples.labels)
    assert table["item_mean"]["auc"] == pytest.approx(by_popularity, abs=0.1)
    assert table["item_mean"]["negatives_per_event"] == 4


@pytest.mark.parametrize("task", ["click", "interaction"])
def test_labels_of_one_kind_have_no_auc_and_the_log_says_why(task, caplog):
    labels = np.array([1.0, 1.0]) if task == "click" else np.array([[1, 0], [1, 1]])
    users = np.array(["a", "b"], dtype=object)
    examples = ScoringExamples([], users, users, labels, [] if task == "click" else ["like", "seen"])
    report = scoring_report(np.full(labels.shape, 0.5), examples, task)
    name = "click" if task == "click" else "like"
    assert f"{name} has no AUC: all held-out labels are 1" in caplog.text
    if task == "click":
        assert "auc" not in report
        assert report["log_loss"] == pytest.approx(math.log(2))
    else:
        assert "like/auc" not in report
        assert report["auc"] == report["seen/auc"] == 0.5


def test_an_interaction_that_no_held_out_event_tells_of_is_left_out(caplog):
    users = np.array(["a", "b"], dtype=object)
    examples = ScoringExamples([], users, users, np.array([[1, -100], [0, -100]]), ["like", "follow"])
    report = scoring_report(np.array([[0.9, 0.5], [0.1, 0.5]]), examples, "interaction")
    assert "follow is not measured: no held-out event says anything of it" in caplog.text
    assert (report["auc"], report["follow/examples"]) == (1, 0)


def test_some_users_are_drawn_by_the_seed_and_keep_their_order(timed):
    everybody = examples_of(timed)
    some = [examples_of(timed, max_users=4, seed=seed) for seed in (0, 0, 1, 2)]
    assert some[0].users == some[1].users
    assert len({tuple(examples.users) for examples in some}) > 1
    for examples in some:
        places = [everybody.users.index(user) for user in examples.users]
        assert places == sorted(places)
        assert len(places) == 4
        assert examples.rows == [everybody.rows[place] for place in places]
        assert examples.targets.tolist() == everybody.targets[places].tolist()
    assert examples_of(timed, max_users=99).users == everybody.users
    few = scored(timed, max_users=3)
    assert len(few.rows) == len(set(few.user_ids)) == 3
    again = scored(timed, max_users=3)
    assert few.user_ids.tolist() == again.user_ids.tolist()


def test_a_model_that_knows_the_answer_is_first_everywhere(run, monkeypatch):
    examples = examples_of(run)
    items = torch.eye(len(run.writer.items))
    monkeypatch.setattr(evaluation, "catalogue_vectors", lambda *_: items)
    for sign, rank in ((1, 1), (-1, len(items))):
        monkeypatch.setattr(evaluation, "user_vectors", lambda *_, sign=sign: sign * items[examples.targets])
        scores = rank_catalogue(run.model, examples, run.catalogue, run.collator, False)
        assert scores[:].dtype == np.float64
        kept = EvaluationArguments(ks=[1, 3], exclude_seen=False)
        report = ranking_scores_report(scores, examples, run.catalogue.counts, kept)
        assert report["mrr"] == pytest.approx(1 / rank)
        assert report["recall@1"] == report["warm/ndcg@3"] == report["cold/ndcg@3"] == (rank == 1)
        assert report["seen"] == "in"
        assert report["examples"] == report["warm/examples"] + report["cold/examples"] == 12


@pytest.mark.parametrize("at_once", some([1, 5, 1000], [5]))
def test_users_are_ranked_some_at_a_time(run, monkeypatch, at_once):
    examples, arguments = examples_of(run), EvaluationArguments(ks=[1, 3])
    scores = rank_catalogue(run.model, examples, run.catalogue, run.collator, False)
    counts, whole = run.catalogue.counts, scores[:]
    ranks = target_ranks(whole, examples.targets, examples.histories)
    monkeypatch.setattr(evaluation, "SCORES_AT_ONCE", at_once * len(counts))
    report = ranking_scores_report(scores, examples, counts, arguments)
    assert report == ranking_scores_report(whole, examples, counts, arguments)
    assert report["ndcg@3"] == pytest.approx(ndcg_at_k(ranks, 3)) and len(examples.users) > 5
    made = (examples, counts, arguments, 1)
    rows, same = ranking_rows({"m6rec": scores, "popularity": -whole}, *made), {"m6rec": whole, "popularity": -whole}
    assert rows == ranking_rows(same, *made)
    for name, interval in ranking_intervals(ranks, arguments, seed=1).items():
        assert rows["m6rec"]["intervals"][name] == pytest.approx(interval)
    beside = ("intervals", "verdict", "differences")
    assert report == {name: value for name, value in rows["m6rec"].items() if name not in beside}
    assert rows["m6rec"]["differences"]["popularity"]["ndcg@3"]["interval"] == rows["m6rec"]["verdict"]["interval"]


def test_items_met_before_are_left_out_or_kept_as_asked():
    examples = RankingExamples(["a", "b"], [], [np.array([0]), np.array([1, 2])], np.array([1, 0]), np.zeros(2, bool))
    scores, counts = np.array([[3.0, 2.0, 1.0], [1.0, 3.0, 2.0]]), np.array([4, 1, 1])
    out = ranking_scores_report(scores, examples, counts, EvaluationArguments(ks=[1]))
    assert (out["mrr"], out["recall@1"], out["seen"]) == (1, 1, "out")
    # Recommended first: item 1 to a, item 0 to b. Their mean popularity is 2.5, that of the catalogue 2.
    assert (out["coverage@1"], out["popularity_bias@1"]) == (2 / 3, pytest.approx(2.5 / 2 - 1))
    kept = ranking_scores_report(scores, examples, counts, EvaluationArguments(ks=[1], exclude_seen=False))
    assert (kept["mrr"], kept["recall@1"], kept["seen"]) == (pytest.approx((1 / 2 + 1 / 3) / 2), 0, "in")
    assert "cold/mrr" not in kept


def test_intervals_are_as_wide_as_the_number_of_users_says():
    """Half of the targets stand first and half second: the standard error of MRR is 1/4 over the root of the users."""
    users = 400
    found = ranking_intervals(1 + np.arange(users) % 2, EvaluationArguments(ks=[1, 2]), seed=3)
    assert found.keys() == {"recall@1", "ndcg@1", "recall@2", "ndcg@2", "mrr"} and found["recall@2"] == [1, 1]
    assert found["mrr"] == pytest.approx([0.75 - 1.96 / 80, 0.75 + 1.96 / 80], abs=0.004)
    assert ranking_intervals(np.array([np.inf, 2.0]), EvaluationArguments(ks=[1]), seed=3)["recall@1"] == [0, 0]


def forward(run, row):
    ids = torch.tensor([row["input_ids"]])
    item_ids = torch.tensor([row["item_embedding_ids"]]) if "item_embedding_ids" in row else None
    with torch.no_grad():
        return run.model.eval()(ids, item_embedding_ids=item_ids, return_logits=False)


@pytest.fixture
def noisy(timed, monkeypatch):
    """The timed run with a model that would answer differently in training mode, read in small batches."""
    monkeypatch.setattr(evaluation, "ROWS_AT_ONCE", 3)
    torch.nn.init.normal_(timed.model.model.item_memory.weight)
    return timed


def test_vectors_in_batches_are_those_one_by_one(noisy):
    examples = examples_of(noisy)
    noisy.model.train()
    users = user_vectors(noisy.model, examples.rows, noisy.collator)
    one_by_one = torch.stack([forward(noisy, row).user_vectors[0, -1] for row in examples.rows])
    torch.testing.assert_close(users, one_by_one, rtol=1e-5, atol=1e-5)
    noisy.model.train()
    items = catalogue_vectors(noisy.model, noisy.catalogue, noisy.collator)
    for vector, ids, memory in zip(items, noisy.catalogue.input_ids, noisy.catalogue.memory_ids, strict=True):
        own = noisy.model.eval().embed_items(torch.tensor([ids]), memory_ids=torch.tensor([memory]))
        torch.testing.assert_close(vector, own[0], rtol=1e-5, atol=1e-5)
    noisy.model.train()
    scores = rank_catalogue(noisy.model, examples, noisy.catalogue, noisy.collator, False)
    np.testing.assert_allclose(scores[:], (one_by_one @ items.T).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("task", ["click", "rating"])
def test_predictions_in_batches_are_those_one_by_one(noisy, task):
    examples = scored(noisy, task=task)
    noisy.model.train()
    found = predictions(noisy.model, examples, task, noisy.collator)
    one_by_one = torch.cat([noisy.model.read_scores(forward(noisy, row).scores[0], task) for row in examples.rows])
    np.testing.assert_allclose(found, one_by_one.numpy(), rtol=1e-5, atol=1e-5)
    assert len(found) == len(examples.labels)
    assert len({len(row["input_ids"]) for row in examples.rows}) > 1


def test_a_model_that_has_diverged_is_refused_not_measured(run):
    broken = copy.deepcopy(run.model)
    with torch.no_grad():
        for parameter in broken.parameters():
            parameter.fill_(math.nan)
    examples = examples_of(run)
    scores = rank_catalogue(broken, examples, run.catalogue, run.collator, False)
    with pytest.raises(ValueError, match="nan"):
        ranking_scores_report(scores, examples, run.catalogue.counts, EvaluationArguments())
    clicks = scored(run)
    with pytest.raises(ValueError, match="nan"):
        scoring_report(predictions(broken, clicks, "click", run.collator), clicks, "click")


def test_the_baselines_stand_beside_the_model_on_the_same_users(run):
    examples, arguments = examples_of(run), EvaluationArguments(ks=[3])
    table = untrained_rows(run.writer, run.texts, run.split, "test", arguments, seed=0)
    assert list(table) == list(BASELINES[:-1])
    popular = np.array([(run.split.train["item_id"] == item_id).sum() for item_id in run.writer.item_ids])
    ranks = target_ranks(np.tile(popular, (12, 1)), examples.targets, examples.histories)
    assert table["popularity"]["ndcg@3"] == pytest.approx(ndcg_at_k(ranks, 3))
    assert all(row["examples"] == 12 and row["seen"] == "out" for row in table.values())


@pytest.mark.parametrize(("task", "column"), [("click", "label"), ("rating", "rating")])
def test_mean_labels_are_the_baselines_of_scores(timed, task, column):
    examples = scored(timed, task=task)
    found = scoring_baselines(timed.split, timed.writer, examples, "test", task, TASK, 0)
    table = {name: scoring_report(own, examples, task) for name, own in found.items()}
    known, _ = before_and_in(timed.split, "test")
    overall = known[column].mean()
    for name, ids, group in (("user_mean", examples.user_ids, "user_id"), ("item_mean", examples.item_ids, "item_id")):
        means = []
        for asked in ids:
            own = known[known[group] == asked][column]
            means.append((own.sum() + 5 * overall) / (len(own) + 5))
        if task == "click":
            assert table[name]["log_loss"] == pytest.approx(log_loss(means, examples.labels))
        else:
            assert table[name]["rmse"] == pytest.approx(rmse(means, examples.labels))
        assert table[name]["examples"] == len(examples.labels)
    both = (examples.history_means + np.array(means)) / 2  # the last means are those of the items
    metric, measure = ("log_loss", log_loss) if task == "click" else ("rmse", rmse)
    assert table["history_mean"][metric] == pytest.approx(measure(examples.history_means, examples.labels))
    assert table["history_and_item"][metric] == pytest.approx(measure(both, examples.labels))


def test_clicks_are_compared_within_a_user_only_where_that_is_possible():
    chances, labels = np.array([0.2, 0.6, 0.4, 0.9]), np.array([0.0, 1.0, 1.0, 0.0])
    users = np.array(["a", "a", "b", "b"], dtype=object)
    report = scoring_report(chances, ScoringExamples([], users, users, labels), "click")
    assert report["gauc"] == pytest.approx(grouped_auc(chances, labels, users)) == 0.5
    alone = scoring_report(chances, ScoringExamples([], np.array(list("abcd"), dtype=object), users, labels), "click")
    assert "gauc" not in alone
    assert alone["auc"] == report["auc"] == auc(chances, labels)


def test_errors_of_ratings_by_hand():
    examples = ScoringExamples([], np.array(["a", "b"]), np.array(["x", "y"]), np.array([4.0, 1.0]))
    report = scoring_report(np.array([3.0, 4.0]), examples, "rating")
    assert report == {"rmse": pytest.approx(math.sqrt(5)), "mae": 2.0, "examples": 2}


@pytest.mark.parametrize("cells", [1, 60, 1000])
def test_ranks_of_sums_are_those_of_the_added_scores(monkeypatch, cells):
    """However many users are scored at once; each score is computed once for each user."""
    monkeypatch.setattr(evaluation, "SCORES_AT_ONCE", cells)
    rng, users, read = np.random.default_rng(0), 40, []
    tables = rng.integers(0, 4, (2, users, 9)).astype(float)
    histories = [rng.choice(9, 2, replace=False) for _ in range(users)]
    examples = RankingExamples(
        [str(user) for user in range(users)], [], histories, rng.integers(0, 9, users), np.zeros(users, bool)
    )

    def scores(number):
        def of(part):
            read.extend((number, user) for user in range(users)[part])
            return tables[number][part]

        return Scores(of)

    weights = {"first": (1.0, 0.0), "second": (0.0, 1.0), "both": (1.0, 0.5), "more": (1.0, 3.0)}
    found = ranks_of_sums([scores(0), scores(1)], weights, examples, exclude_seen=True)
    assert sorted(read)[1:] == [(number, user) for number in (0, 1) for user in range(users)], "the first user's width"
    for name, (first, second) in weights.items():
        expected = target_ranks(first * tables[0] + second * tables[1], examples.targets, histories)
        np.testing.assert_array_equal(found[name], expected)
