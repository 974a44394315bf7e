"""`m6rec fit`: a recommender of two tables, within seconds, that every command then works on."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas
import pytest
from transformers import pipeline

from m6rec import Catalogue
from m6rec.train import Recommender
from m6rec.train.answering.evidence import kept_evidence
from m6rec.train.answering.loading import load_recommender
from m6rec.train.cli import main
from m6rec.train.commands import fit
from m6rec.train.commands.fit import add_cosine, fit_recommender
from m6rec.train.config.recipe import load_recipe, load_saved
from m6rec.train.data.splits import order
from m6rec.train.evaluation.evidence import Choice, Evidence, EvidenceSettings
from m6rec.train.evaluation.tables import tables as printed
from m6rec.train.evaluation.untrained import PLAIN
from m6rec.train.runs import with_evidence
from m6rec.train.runs.with_evidence import NETWORK_ONLY
from tests.fast import some
from tests.train.world import figures, recipe_of, write_tables


def tables(folder, users=40, seed=0, **changed):
    """A shop where rain follows sun: the next item of a series, or a re-visit if asked."""
    rng = np.random.default_rng(seed)
    words = ["castle", "dragon", "rocket", "engine", "harbour"]
    items = [{"id": f"p{row}", "name": f"{words[row % 5]} {row}", "link": f"https://shop/{row}"} for row in range(30)]
    events = []
    for user in range(users):
        start = int(rng.integers(30))
        for step in range(int(rng.integers(3, 8))):
            place = (start + step % changed.get("period", 99)) % 30
            day = step // changed.get("events_of_a_day", 1) + 1
            events.append({"customer": f"c{user}", "product": f"p{place}", "when": f"2024-05-{day:02d}"})
    return write_tables(folder, events=events, items=items)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A folder that was fitted without training, and what was printed."""
    folder = tmp_path_factory.mktemp("fit")
    paths = tables(folder)
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr("builtins.print", lambda *texts, **how: said.append(" ".join(map(str, texts))))
        assert main(["fit", paths["events"], paths["items"], str(folder / "shop"), "--minutes", "0"]) == 0
    return folder / "shop", "\n".join(said)


def test_columns_are_said_and_kept(fitted):
    folder, said = fitted
    assert "events: item_id product, timestamp when, user_id customer" in said
    assert "items: id id; read as text: name; not read: link (addresses)" in said
    assert "a first recommender is there" in said and "neighbours_and_words" in said
    decisions = json.loads((folder / "fit.json").read_text())
    assert decisions["kept"] == "evidence" and decisions["log"]["users"] == 40
    assert "weights of the evidence: " in said and decisions["evidence"]["default"] in ("rule", "other logs")
    assert decisions["columns"]["items not read"] == {"link": "addresses"}
    assert decisions["seen items"] == "left out" and decisions["seconds"]["first recommender"] > 0


def test_metrics_are_in_the_form_of_fine_tuning_and_the_rule_is_not_beaten_by_it(fitted):
    rows = json.loads((fitted[0] / "metrics.json").read_text())["retrieval"]
    assert set(rows) >= {"m6rec", "popularity", "similar_text", "neighbours_and_words"}
    assert rows["m6rec"]["ndcg@10"] >= rows["neighbours_and_words"]["ndcg@10"] - 0.05
    assert rows["m6rec"]["ndcg@10"] > 0.5, "what follows is certain in this world"
    assert rows["m6rec"]["verdict"]["sentence"]


def test_the_command_and_the_recommender_answer_alike(fitted, capsys):
    folder, _ = fitted
    assert main(["recommend", str(folder), "--user", "c3", "--top-k", "3", "--explain"]) == 0
    printed = json.loads(capsys.readouterr().out)
    shop = Recommender(folder)
    table = shop.recommend(["c3"], k=3)
    assert [row["item_id"] for row in printed] == table["item_id"].tolist()
    seen = shop.log.interactions.query("user_id == 'c3'")["item_id"].tolist()
    assert not set(table["item_id"]) & set(seen)
    last = int(seen[-1][1:])
    assert table["item_id"][0] == f"p{(last + 1) % 30}"
    reason = printed[0]["because"][0]
    assert reason["item_id"] == seen[-1]
    assert reason["contribution"] == pytest.approx(reason["words"] + reason["transitions"]) and reason["learnt"] == 0


def log_scores(shop):
    """Score all items for each user of a log by evidence counted from its tables: the slow twin of a catalogue."""
    kept = kept_evidence(shop.directory)
    ordered = order(shop.log.interactions, shop.recipe.data.seed, shop.recipe.evaluation.ties)
    names = shop.log.items.index.tolist()
    users = {user: [names.index(item) for item in own["item_id"]] for user, own in ordered.groupby("user_id")}
    times = [own["timestamp"].to_numpy() for _, own in ordered.groupby("user_id")]
    texts = [" ".join(shop.log.item_fields(name).values()) for name in names]
    found = Evidence(texts, list(users.values()), kept.settings, times).scores(users.values(), times)
    return {user: dict(zip(names, scores.tolist())) for user, scores in zip(users, found)}


def asked_of(shop, user):
    """Write the request of a user of the log by ids alone."""
    own = order(shop.log.interactions, shop.recipe.data.seed).query("user_id == @user")
    events = zip(own["item_id"], own["timestamp"])
    return {"history": [{"item": {"item_id": name}, "timestamp": time} for name, time in events]}


@pytest.fixture(scope="module")
def with_linear(tmp_path_factory):
    """A folder that was fitted without training, with a linear model among the evidence, and with ties."""
    folder = tmp_path_factory.mktemp("linear")
    paths = tables(folder, events_of_a_day=2)
    choice = Choice(EvidenceSettings(linear=2.0, strength=3.0, popularity=0.2, share_ties=True), 9, 0.2, 0.1, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("m6rec.train.commands.fit.choose_evidence", lambda *_, **__: choice)
        assert main(["fit", paths["events"], paths["items"], str(folder / "shop"), "--minutes", "0"]) == 0
    return folder / "shop"


@pytest.mark.parametrize("which", some(["fitted", "with_linear"], ["with_linear"]))
def test_the_library_pipeline_answers_by_evidence_as_every_other_way(which, request, capsys):
    made = request.getfixturevalue(which)
    folder = made if which == "with_linear" else made[0]
    shop, recommend = Recommender(folder), pipeline("recommendation", model=str(folder))
    assert recommend.catalogue.evidence.learnt == 0
    assert recommend.catalogue.evidence.linear == (2.0 if which == "with_linear" else 0.0)
    assert recommend.catalogue.evidence.share_ties == (which == "with_linear")
    expected = log_scores(shop)
    users = list(expected)[:20]
    answers = recommend([asked_of(shop, user) for user in users], top_k=5)
    table = shop.recommend(users, k=5)
    for user, answer in zip(users, answers):
        rows = table.query("user_id == @user")
        assert [row["item_id"] for row in answer] == rows["item_id"].tolist()
        seen = {event["item"]["item_id"] for event in asked_of(shop, user)["history"]}
        left = {name: score for name, score in expected[user].items() if name not in seen}
        assert [row["score"] for row in answer] == pytest.approx(sorted(left.values(), reverse=True)[:5], abs=1e-9)
        assert [row["score"] for row in answer] == pytest.approx([left[row["item_id"]] for row in answer], abs=1e-9)
    capsys.readouterr()
    assert main(["recommend", str(folder), "--user", users[3], "--top-k", "5"]) == 0
    printed = [row["item_id"] for row in json.loads(capsys.readouterr().out)]
    assert printed == [row["item_id"] for row in answers[3]]


@pytest.mark.parametrize(("ties", "expected"), [("shuffled", True), ("published", False)])
def test_ties_are_shared_where_their_order_is_drawn(tmp_path, ties, expected):
    paths = tables(tmp_path, events_of_a_day=2)
    protocol = f"evaluation.protocol={ties}"
    assert main(["fit", paths["events"], paths["items"], str(tmp_path / "shop"), "--minutes", "0", protocol]) == 0
    settings = json.loads((tmp_path / "shop" / "fit.json").read_text())["evidence"]["settings"]
    assert settings["share_ties"] == expected


def test_a_click_is_observed_and_kept(fitted, tmp_path):
    folder = Path(shutil.copytree(fitted[0], tmp_path / "shop"))
    recommend = pipeline("recommendation", model=str(folder))
    asked = {"history": [{"item": {"item_id": "p3"}}]}
    assert recommend(asked, top_k=1)[0]["item_id"] == "p4"
    events = [(f"new{user}", item, f"2024-07-0{day}") for user in range(60) for day, item in ((1, "p3"), (2, "p20"))]
    recommend.catalogue.observe([dict(zip(("user_id", "item_id", "timestamp"), event)) for event in events])
    assert recommend(asked, top_k=1)[0]["item_id"] == "p20"
    assert pipeline("recommendation", model=str(folder))(asked, top_k=1)[0]["item_id"] == "p20"
    del recommend
    with pytest.raises(ValueError, match="events that were observed and not saved"):
        fit_recommender(load_saved(folder, [f"training.output_dir={folder}"]), 0, print)
    assert pipeline("recommendation", model=str(folder))(asked, top_k=1)[0]["item_id"] == "p20", "as it was"


@pytest.mark.parametrize("share", [0.5, NETWORK_ONLY])
def test_a_network_joins_the_evidence_and_keeps_what_was_observed(fitted, tmp_path, share):
    folder = Path(shutil.copytree(fitted[0], tmp_path / "shop"))
    history = [{"item": {"item_id": "p3"}}]

    def ask(**changed):
        recommend = pipeline("recommendation", model=str(folder))
        if changed:
            recommend.catalogue.set_evidence(None)
        return {row["item_id"]: row["score"] for row in recommend({"history": history}, top_k=30)}

    early = Catalogue.load(folder / "catalogue")
    clicks = [(f"new{user}", item, f"2024-07-0{day}") for user in range(60) for day, item in ((1, "p3"), (2, "p20"))]
    early.observe([dict(zip(("user_id", "item_id", "timestamp"), click)) for click in clicks])
    evidence = ask()
    add_cosine(early, folder, share)
    found = ask()
    catalogue, cosines = pipeline("recommendation", model=str(folder)).catalogue, ask(evidence=None)
    assert max(evidence, key=evidence.get) == "p20"
    if share == NETWORK_ONLY:
        assert found == pytest.approx(cosines, abs=1e-6) and len(set(found.values())) > 1
        assert catalogue.observe([{"user_id": "a", "item_id": "p1", "timestamp": "2024-08-01"}]) == 1
        return
    assert catalogue.evidence.learnt == share
    assert found == pytest.approx({name: score + share * cosines[name] for name, score in evidence.items()}, abs=1e-5)


def test_files_of_requests_are_answered_and_the_folder_can_be_published(fitted, tmp_path, capsys):
    (tmp_path / "asked.jsonl").write_text(json.dumps({"history": [{"item": {"item_id": "p7"}}]}) + "\n")
    files = ["--input", str(tmp_path / "asked.jsonl"), "--output", str(tmp_path / "answers.jsonl")]
    assert main(["recommend", str(fitted[0]), *files, "--top-k", "1"]) == 0
    assert '"p8"' in (tmp_path / "answers.jsonl").read_text()
    assert main(["push", str(fitted[0]), "me/shop", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "catalogue/evidence.safetensors" in said.split("not published:")[0]
    assert "catalogue/events.parquet" not in said.split("not published:")[0]


def test_evidence_reads_further_back_than_the_model(fitted):
    recommend = pipeline("recommendation", model=str(fitted[0]))
    history = [{"item": {"item_id": name}} for name in ("p3", "p12", "p9", "p22")]
    whole = recommend({"history": history}, top_k=5, explain=True)
    recommend.processor.max_events = 2
    short = recommend({"history": history}, top_k=5, explain=True)
    assert [row["score"] for row in short] == [row["score"] for row in whole]
    for row, other in zip(whole, short):
        added = [{reason["item_id"]: reason["contribution"] for reason in each["because"]} for each in (row, other)]
        assert added[0] == added[1] and len(added[1]) == 4
        assert sum(added[1].values()) + other["parts"]["popularity"] == pytest.approx(other["score"])


def test_new_users_are_answered_by_their_events(fitted):
    shop = Recommender(fitted[0])
    new = pandas.DataFrame({"customer": ["new"], "product": ["p7"], "when": ["2024-06-01"]})
    assert shop.recommend(new, k=1)["item_id"].tolist() == ["p8"]
    asked = {"history": [{"item": {"item_id": "p7"}}]}
    assert shop.pipeline(asked, top_k=1, filter=lambda item: item["item_id"] != "p8")[0]["item_id"] != "p8"
    assert shop.pipeline({"history": []}, top_k=2)[0]["score"] > 0, "the popular ones, where nothing is known"


def test_it_is_measured_again_and_on_later_events(fitted, capsys):
    folder, _ = fitted
    written = json.loads((folder / "metrics.json").read_text())["retrieval"]["m6rec"]
    assert main(["evaluate", str(folder)]) == 0
    again = json.loads((folder / "metrics.json").read_text())["retrieval"]["m6rec"]
    assert figures(again) == pytest.approx(figures(written))
    shop = Recommender(folder)
    last = shop.log.interactions.query("user_id == 'c3'")["item_id"].tolist()[-1]
    later = {"customer": ["c3"], "product": [f"p{(int(last[1:]) + 1) % 30}"], "when": ["2024-06-01"]}
    found = shop.evaluate(pandas.DataFrame(later))["retrieval"]["m6rec"]
    assert found["examples"] == 1 and found["mrr"] == 1


def test_a_log_of_re_visits_recommends_seen_items(tmp_path, capsys):
    paths = tables(tmp_path, period=2)
    assert main(["fit", paths["events"], paths["items"], str(tmp_path / "shop"), "--minutes=0"]) == 0
    assert "last events are of items that their users know" in capsys.readouterr().out
    shop = Recommender(tmp_path / "shop")
    assert not shop.recipe.evaluation.exclude_seen
    seen = set(shop.log.interactions.query("user_id == 'c3'")["item_id"])
    assert shop.recommend(["c3"], k=1)["item_id"][0] in seen
    recommend, request = pipeline("recommendation", model=str(tmp_path / "shop")), asked_of(shop, "c3")
    assert recommend(request, top_k=1)[0]["item_id"] in seen, "also by default of the plain pipeline"
    assert not seen & {row["item_id"] for row in recommend(request, top_k=30, exclude_seen=True)}
    asked = ["recommend", str(tmp_path / "shop"), "--user=c3", "--top-k=30"]
    for more, found in (([], True), (["evaluation.exclude_seen=true"], False)):
        assert main([*asked, *more]) == 0
        assert (seen <= {row["item_id"] for row in json.loads(capsys.readouterr().out)}) is found


def test_tiny_logs_work(tmp_path, capsys):
    """One event a user, no times, no texts: nothing is measured, and there are answers."""
    events = [{"user": f"u{row}", "item": f"i{row % 4}"} for row in range(6)] + [{"user": "u0", "item": "i1"}]
    paths = write_tables(tmp_path, events=events, items=[{"item": f"i{row}"} for row in range(5)])
    assert main(["fit", paths["events"], paths["items"], str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "no user has three events" in said and "5 of 5 items have no text" in said
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == {}
    assert Recommender(tmp_path / "out").recommend(["u4"], k=2)["item_id"].tolist() == ["i1", "i2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Fit with a network of two steps that is kept, or is not, whatever its figures."""
    folder = tmp_path_factory.mktemp("trained")
    paths = tables(folder)
    data = {"interactions": paths["events"], "items": paths["items"]}
    found, said, looked_up, looks = {}, [], [], {True: [], False: []}

    class Evidence(with_evidence.FoldedEvidence):
        def scores(self, users, *events):
            looked_up.extend(users)
            return super().scores(users, *events)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(with_evidence, "FoldedEvidence", Evidence)
        patch.setattr(with_evidence, "best_share", lambda gains, where=slice(None): 0.5)
        patch.setattr(with_evidence, "VALIDATION_USERS", 6)
        patch.setattr(with_evidence, "MORE_USERS", 9)
        patch.setattr(with_evidence, "close_rows", lambda untrained: ["evidence", "popularity"])
        for kept in (True, False):
            figures = {"value": 0.0, "baseline_value": 0.0, "difference": 0.001, "interval": [0.0, 0.0]}
            result = {"metric": "ndcg@10", "baseline": "evidence", "better": kept, **figures}

            def compare(metric, values, seed, result=result, kept=kept):
                looks[kept].append({name: len(own) for name, own in values.items()})
                return result

            patch.setattr(with_evidence, "compare", compare)
            recipe = load_recipe(recipe_of(data, folder / str(kept)))

            click = {"user_id": "a", "item_id": "p1", "timestamp": "2024-07-01"}

            def say(line, catalogue=folder / str(kept) / "catalogue", click=click):
                said.append(line)
                if "a first recommender is there" in line:
                    with pytest.raises(BlockingIOError):  # else the end of the fit would lose it
                        Catalogue.load(catalogue).observe([click])

            fit_recommender(recipe, 30, say)
            found[kept] = folder / str(kept)
    assert len(set(looked_up)) > 10, "the loss sees the evidence"
    return found, said, looks


def test_a_table_sorted_by_item_has_no_order_of_time():
    rng = np.random.default_rng(0)
    rows = [{"user_id": f"u{user}", "item_id": str(item)} for user in range(9) for item in rng.permutation(200)[:6]]
    events = pandas.DataFrame(rows).assign(timestamp=np.nan)
    by_item = events.assign(number=events["item_id"].astype(int)).sort_values(["number"])
    names = events.assign(item_id="b" + events["item_id"])
    assert not fit.sorted_by_item(events) and not fit.sorted_by_item(names)
    assert fit.sorted_by_item(by_item) and fit.sorted_by_item(by_item[::-1])
    assert fit.sorted_by_item(names.sort_values(["user_id", "item_id"]))
    assert not fit.sorted_by_item(by_item.assign(timestamp=1.0)) and not fit.sorted_by_item(by_item[:9])
    assert not fit.sorted_by_item(events.assign(item_id="1")), "one item again and again"


def test_a_large_catalogue_is_learnt_with_drawn_items(tmp_path, monkeypatch):
    paths, said, tasks = tables(tmp_path), [], []
    monkeypatch.setattr(fit, "train_with_evidence", lambda recipe, *rest: tasks.append(recipe.task))
    data = {"interactions": paths["events"], "items": paths["items"]}
    for most, named in ((30, "catalogue"), (29, "sampled")):
        monkeypatch.setattr(fit, "TABLED", most)
        with pytest.raises(AttributeError):  # no outcome
            fit_recommender(load_recipe(recipe_of(data, tmp_path / named)), 1, said.append)
        assert tasks[-1].negatives == named
    assert tasks[-1].num_sampled == fit.SAMPLED and sum("drawn ones" in line for line in said) == 1


def test_a_network_that_is_not_clearly_better_is_compared_on_more_users(trained):
    rows = ["m6rec", "evidence", *PLAIN, "ease"]
    first = dict.fromkeys(rows, 6)
    assert trained[2] == {True: [first], False: [first, dict.fromkeys(["m6rec", "evidence", "popularity"], 9)]}


def test_a_better_network_is_kept_with_evidence(trained):
    """Answers are those of evidence, plus the weight times the cosine."""
    folder = trained[0][True]
    decisions = json.loads((folder / "fit.json").read_text())
    assert (decisions["kept"], decisions["share"]) == ("network and evidence", 0.5)
    shop, recommend = Recommender(folder), pipeline("recommendation", model=str(folder))
    assert decisions["network"]["trained again"] and shop.recipe.evaluation.validate == "fresh", "with the gap"
    assert recommend.catalogue.evidence.learnt == 0.5
    assert recommend.model.config.tfidf_weight == 0.0, "evidence compares words"
    alone = log_scores(shop)
    users = list(alone)[:20]
    requests = [asked_of(shop, user) for user in users]
    table = shop.recommend(users, k=5)
    plain = pipeline("recommendation", model=str(folder))
    plain.catalogue.set_evidence(None)
    asks = (plain(requests, top_k=30, exclude_seen=False), recommend(requests, top_k=30, exclude_seen=False))
    for user, cosines, both, answer in zip(users, *asks, recommend(requests, top_k=5)):
        own = {row["item_id"]: row["score"] for row in cosines}
        expected = {name: score + 0.5 * own[name] for name, score in alone[user].items()}
        assert {row["item_id"]: row["score"] for row in both} == pytest.approx(expected, abs=1e-5)
        assert [row["item_id"] for row in answer] == table.query("user_id == @user")["item_id"].tolist()
    written = json.loads((folder / "metrics.json").read_text())["retrieval"]
    assert set(written) == {"m6rec", *PLAIN, "ease", "evidence", "network"}
    assert written["m6rec"]["verdict"]["baseline"] != "network", "the network is trained"
    lines = printed({"retrieval": written}).splitlines()
    assert next(line for line in lines if line.startswith("network ")).endswith("]"), "with its interval"
    again = shop.evaluate()["retrieval"]["m6rec"]
    assert figures(again) == pytest.approx(figures(written["m6rec"]), abs=1e-4)


def test_another_network_is_not_kept(trained):
    folders, said, _ = trained
    decisions = json.loads((folders[False] / "fit.json").read_text())
    assert decisions["kept"] == "evidence" and decisions["network"]["steps"] == 2
    assert "trained again" not in decisions["network"]
    assert "a network combined with it is not clearly better" in decisions["sentence"]
    assert "more events" in decisions["sentence"]
    assert {path.name for path in folders[False].iterdir()} >= {"metrics.json", "recipe.yaml", "fit.json", "tables"}
    assert not [*folders[False].glob("checkpoint-*")]
    catalogue = pipeline("recommendation", model=str(folders[False])).catalogue
    assert catalogue.evidence.learnt == 0
    assert catalogue.observe([{"user_id": "a", "item_id": "p1", "timestamp": "2024-07-01"}]) == 1
    report = json.loads((folders[False] / "metrics.json").read_text())
    assert "network" in report["retrieval"] and "\nnetwork " in printed(report)
    assert sum("Kept: " in line for line in said) == 2


def test_what_cannot_be_used_is_refused(tmp_path, fitted, capsys):
    paths = tables(tmp_path)

    def refused(*arguments):
        assert main([str(argument) for argument in arguments]) == 2
        return capsys.readouterr().err

    assert "holds a model, which this run would replace" in refused("fit", paths["events"], paths["items"], fitted[0])
    assert "minutes is -1.0" in refused("fit", paths["events"], paths["items"], tmp_path / "out", "--minutes=-1")
    assert "use m6rec finetune" in refused(
        "fit", paths["events"], paths["items"], tmp_path / "out", "task.learn=[retrieval,click]"
    )
    assert "expected EVENTS ITEMS OUT" in refused("fit", paths["events"], paths["items"])
    assert "data.columns.user_id=who" in refused(
        "fit", paths["events"], paths["items"], tmp_path / "out", "data.columns.user_id=who"
    )
    frame = pandas.read_csv(paths["events"])
    frame.loc[frame.index[:130], "product"] = "gone"
    frame.to_csv(tmp_path / "gone.csv", index=False)
    assert (
        "events cannot be used"
        in refused("fit", tmp_path / "gone.csv", paths["items"], tmp_path / "out", "data.columns.item_id=product")
        or "none shares half" in capsys.readouterr().err
    )
    with pytest.raises(ValueError, match="item_id 'p99' alone says nothing, and is not in the catalogue"):
        load_recommender(str(fitted[0]))({"history": [{"item": {"item_id": "p99"}}]})


def test_a_recipe_names_tables_and_folder(tmp_path, capsys):
    paths = tables(tmp_path)
    recipe = tmp_path / "shop.yaml"
    recipe.write_text(
        f"data: {{interactions: {paths['events']}, items: {paths['items']}}}\n"
        f"training: {{output_dir: {tmp_path / 'shop'}}}\n"
    )
    assert main(["fit", str(recipe), "data.item_columns=[link]", "--minutes=0"]) == 0
    assert "read as text: link" in capsys.readouterr().out
    assert Recommender(tmp_path / "shop").recommend(["c1"], k=1).shape == (1, 4)
