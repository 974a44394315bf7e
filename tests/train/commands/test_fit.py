"""`m6rec fit`: a recommender of two tables, within seconds, that every command then works on."""

import json

import numpy as np
import pandas
import pytest

from m6rec.train import Recommender
from m6rec.train.answering.loading import load_pipeline, load_recommender
from m6rec.train.cli import main
from m6rec.train.commands.fit import fit_recommender
from m6rec.train.config.recipe import load_recipe
from m6rec.train.runs import beside_evidence
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
            events.append({"customer": f"c{user}", "product": f"p{place}", "when": f"2024-05-{step + 1:02d}"})
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
    assert printed[0]["because"][0] == {
        "event": f"{printed[0]['because'][0]['event']}",
        "item_id": seen[-1],
        "contribution": pytest.approx(printed[0]["because"][0]["contribution"]),
    }


def test_an_explanation_is_the_score_without_the_event(fitted):
    answers = load_recommender(fitted[0])
    history = [{"item": {"item_id": name}} for name in ("p3", "p4", "p9")]
    for row in answers({"history": history}, top_k=4, explain=True):
        for place, event in enumerate(history):
            less = [each for each in history if each is not event]
            found = answers({"history": less}, top_k=30, exclude_seen=False)
            without = next(each["score"] for each in found if each["item_id"] == row["item_id"])
            name = event["item"]["item_id"]
            (told,) = [reason for reason in row["because"] if reason["item_id"] == name]
            assert told["contribution"] == pytest.approx(row["score"] - without), (place, name)


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
    found, said = {}, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(beside_evidence, "best_share", lambda gains, where=slice(None): 0.5)
        for kept in (True, False):
            compared = {**dict.fromkeys(("value", "baseline_value", "difference"), 0.0), "interval": [0.0, 0.0]}
            told = {"metric": "ndcg@10", "baseline": "evidence", "better": kept, **compared}
            patch.setattr(beside_evidence, "compare", lambda *given, told=told, **more: told)
            recipe = load_recipe(recipe_of(data, folder / str(kept)))
            fit_recommender(recipe, 30, said.append)
            found[kept] = folder / str(kept)
    return found, said


def test_a_better_network_is_kept_beside_evidence(trained):
    """Answers are those of evidence, plus the weight times the cosine."""
    folder = trained[0][True]
    decisions = json.loads((folder / "fit.json").read_text())
    assert (decisions["kept"], decisions["share"]) == ("network and evidence", 0.5)
    shop = Recommender(folder)
    items = shop.log.items.index.tolist()
    seen = shop.log.interactions.query("user_id == 'c3'")["item_id"]
    history = [{"item": {"item_id": name}} for name in seen]
    evidence = load_recommender(str(trained[0][False]))
    alone, cosines, both = (
        {row["item_id"]: row["score"] for row in ask({"history": history}, top_k=30, exclude_seen=False)}
        for ask in (evidence, load_pipeline(str(folder)), shop.pipeline)
    )
    assert both == pytest.approx({name: alone[name] + 0.5 * cosines[name] for name in items}, abs=1e-5)
    best = max((name for name in items if name not in set(seen)), key=both.get)
    assert shop.recommend(["c3"], k=1)["item_id"][0] == best
    written = json.loads((folder / "metrics.json").read_text())["retrieval"]
    assert set(written) == {"m6rec", "popularity", "similar_text", "neighbours_and_words", "evidence", "network"}
    again = shop.evaluate()["retrieval"]["m6rec"]
    assert figures(again) == pytest.approx(figures(written["m6rec"]), abs=1e-4)


def test_another_network_is_not_kept(trained):
    folders, said = trained
    decisions = json.loads((folders[False] / "fit.json").read_text())
    assert decisions["kept"] == "evidence" and decisions["network"]["steps"] == 2
    assert (
        "a network beside it is not surely better" in decisions["sentence"] and "more events" in decisions["sentence"]
    )
    assert {path.name for path in folders[False].iterdir()} >= {"metrics.json", "recipe.yaml", "fit.json", "tables"}
    assert not [*folders[False].glob("checkpoint-*"), *folders[False].glob("*.safetensors")]
    assert "network" in json.loads((folders[False] / "metrics.json").read_text())["retrieval"]
    assert sum("Kept: " in line for line in said) == 2


def test_what_cannot_be_used_is_refused(tmp_path, fitted, capsys):
    paths = tables(tmp_path)

    def refused(*arguments):
        assert main([str(argument) for argument in arguments]) == 2
        return capsys.readouterr().err

    assert "config.json" not in [path.name for path in fitted[0].iterdir()]
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
    answers = load_recommender(fitted[0])
    with pytest.raises(ValueError, match=r"history\[0\] is 'p3': expected an item of the catalogue"):
        answers({"history": ["p3"]})
    with pytest.raises(ValueError, match="answers 'retrieval' only"):
        answers({"history": []}, task="click")
    with pytest.raises(ValueError, match="without candidates"):
        answers({"history": [], "candidates": ["a"]})


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
