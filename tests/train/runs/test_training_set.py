"""Replay: shares and draws follow the recipe, earlier rows are as they were, and what cannot be replayed is refused."""

from collections import Counter

import pytest
from transformers import AutoProcessor

from m6rec.train.config.recipe import load_recipe
from m6rec.train.runs.build import prepare
from m6rec.train.runs.finetune import ValidationMetrics, finetune, fit, full_report
from m6rec.train.runs.training_set import TrainingSet, earlier_runs, training_parts, training_set
from tests.train.world import recipe_of, write_tables

CLICK = {"learn": ["click"]}


@pytest.fixture(scope="module")
def films(tables, tmp_path_factory):
    """The output folder of a run that learnt clicks on films."""
    folder = tmp_path_factory.mktemp("runs") / "films"
    finetune(load_recipe(recipe_of(tables, folder, task=CLICK)))
    return folder


@pytest.fixture(scope="module")
def goods(tmp_path_factory):
    """The tables of a shop: eight users who bought some of ten goods."""
    events = [
        {"user_id": f"u{user}", "item_id": f"g{(user * 3 + step) % 10}", "timestamp": 10**9 + step, "event": "buy"}
        for user in range(8)
        for step in range(6)
    ]
    items = [{"item_id": f"g{row}", "title": f"soap {row}"} for row in range(10)]
    return write_tables(tmp_path_factory.mktemp("goods"), interactions=events, items=items)


@pytest.fixture
def make_run(films, goods, tmp_path):
    """Prepare a run on the goods that goes on from the films and replays them."""

    def make(task=None, **sections):
        learn = {"learn": ["click"], "negatives_per_event": 1, "replay": [str(films)], **(task or {})}
        own = {"text": {"domain": "ecommerce"}, "model": {"checkpoint": str(films)}, **sections}
        return prepare(load_recipe(recipe_of(goods, tmp_path / "run", task=learn, **own)))

    return make


def test_a_share_of_the_rows_is_replayed_anew_in_each_epoch():
    own, first, second = range(60), range(100, 110), range(200, 300)
    rows = TrainingSet([own[:20], own[20:]], [[first], [second[:50], second[50:]]], share=0.25, seed=3)
    assert len(rows) == 80
    assert [rows[index] for index in range(60)] == list(own)
    epochs = []
    for epoch in (0, 1, 0):
        rows.set_epoch(epoch)
        epochs.append([rows[index] for index in range(60, 80)])
    assert epochs[0] == epochs[2] != epochs[1]
    assert rows[79] == epochs[0][19], "whatever was read before"
    assert list(rows) == [*own, *epochs[0]]
    counts: Counter[int] = Counter()
    for epoch in range(300):
        rows.set_epoch(epoch)
        counts.update(rows[index] // 100 for index in range(60, 80))
    assert counts[1] == pytest.approx(3000, abs=200), "earlier runs are alike likely, whatever their size"
    assert counts[1] + counts[2] == 6000
    assert TrainingSet([own], [[first]], share=0.25, seed=4)[60] in first
    assert len(TrainingSet([own], (), share=0.25)) == 60
    for beyond in (-1, 80):
        with pytest.raises(IndexError):
            rows[beyond]


def test_earlier_rows_are_read_as_they_were_and_the_new_ones_in_their_own_words(make_run, films):
    run = make_run({"replay_share": 0.6})
    earlier = earlier_runs(run)
    assert list(earlier) == ["films"]
    before = prepare(load_recipe(films, [f"model.checkpoint={films}"]))
    assert training_parts(earlier["films"]) == training_parts(before)
    rows = training_set(run, earlier)
    own = sum(map(len, training_parts(run)))
    assert len(rows) == own + round(own * 1.5)
    texts = [run.processor.tokenizer.decode(row["input_ids"]) for row in rows]
    assert all("soap" in text for text in texts[:own])
    assert any("bought" in text for text in texts[:own])
    assert not any("soap" in text for text in texts[own:])
    assert any("watched" in text for text in texts[own:])


def test_negatives_of_both_are_drawn_anew_in_each_epoch(make_run, films, tables, tmp_path):
    task = {"learn": ["click"], "negatives_per_event": 2}
    old = tmp_path / "shop"
    finetune(load_recipe(recipe_of(tables, old, task=task, model={"checkpoint": str(films)})))
    rows = training_set(run := make_run({"replay": [str(old)]}), earlier_runs(run))
    parts = [rows.parts[0], rows.replayed[0][0]]
    for part in parts:
        first = list(part)
        rows.set_epoch(1)
        assert list(part) != first
        rows.set_epoch(0)
        assert list(part) == first


def test_what_is_forgotten_is_seen_during_training_and_in_the_report(make_run, films):
    training = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 2}
    run = make_run(training=training)
    trainer = fit(run)
    logged = {name for entry in trainer.state.log_history for name in entry}
    assert {"eval_click_auc", "eval_replay_films_click_auc"} <= logged
    report = full_report(run)
    assert list(report) == ["click", "replay/films/click"]
    assert list(report["replay/films/click"])[:2] == ["m6rec", "user_mean"]
    untouched = full_report(make_run())["replay/films/click"]
    assert untouched == full_report(prepare(load_recipe(films, [f"model.checkpoint={films}"])))["click"]
    assert report["replay/films/click"]["m6rec"] != untouched["m6rec"]
    assert report["replay/films/click"]["item_mean"] == untouched["item_mean"]
    figures = ValidationMetrics(run, earlier_runs(run), bf16=False)()
    assert figures["replay_films_click_log_loss"] > 0


def test_a_run_with_another_tokenizer_is_refused(make_run, films, tables, tmp_path):
    other = tmp_path / "other"
    finetune(load_recipe(recipe_of(tables, other, task=CLICK, text={"vocab_size": 300})))
    with pytest.raises(ValueError, match=r"other has another tokenizer: .* go on from its checkpoint"):
        earlier_runs(make_run({"replay": [str(other)]}))


def test_what_has_nothing_to_replay_is_refused(make_run, films, tables, tmp_path):
    def after(name, task, **sections):
        folder = tmp_path / name
        finetune(load_recipe(recipe_of(tables, folder, task=task, model={"checkpoint": str(films)}, **sections)))
        return str(folder)

    with pytest.raises(ValueError, match="retrieved learnt retrieval only"):
        earlier_runs(make_run({"replay": [after("retrieved", {"learn": ["retrieval"]})]}))
    liked = after("liked", {"learn": ["interaction"], "interactions": {"love": ["like"], "skip": ["skip"]}})
    with pytest.raises(ValueError, match=r"liked learnt the interactions \['love', 'skip'\], but this model has"):
        earlier_runs(make_run({"replay": [liked]}))
    run = make_run({"replay": [liked]}, model={"checkpoint": liked})
    assert "interaction_labels" in training_set(run, earlier_runs(run))[len(training_parts(run)[0])]
    with pytest.raises(ValueError, match="two folders called 'liked'"):
        earlier_runs(make_run({"replay": [liked, liked]}, model={"checkpoint": liked}))


def test_retrieval_beside_other_tasks_is_measured_but_not_replayed(make_run, films, tables, tmp_path, caplog):
    both = tmp_path / "both"
    sections = {
        "task": {"learn": ["retrieval", "click"]},
        "model": {"checkpoint": str(films)},
        "evaluation": {"split": "time", "valid_fraction": 0.0, "test_fraction": 0.3},
    }
    finetune(load_recipe(recipe_of(tables, both, **sections)))
    run = make_run({"replay": [str(both)]}, model={"checkpoint": str(both)})
    rows = training_set(run, earlier_runs(run))
    assert "both: retrieval is measured but not replayed" in caplog.text
    assert all("next_items" not in row for row in rows)
    assert {"replay/both/retrieval", "replay/both/click"} <= set(full_report(run))
    figures = ValidationMetrics(run, earlier_runs(run), bf16=False)()
    assert figures["click_auc"] >= 0
    assert not [name for name in figures if name.startswith("replay")], "its validation part is empty"


def test_item_memories_are_kept_apart(films, tables, goods, tmp_path):
    memory = {"item_embeddings": True, "checkpoint": str(films)}
    folder = tmp_path / "remembered"
    finetune(load_recipe(recipe_of(tables, folder, task=CLICK, model=memory)))
    task = {**CLICK, "negatives_per_event": 1, "replay": [str(folder)]}
    sections = {"task": task, "model": {**memory, "checkpoint": str(folder)}}
    run = prepare(load_recipe(recipe_of(goods, tmp_path / "run", **sections)))
    rows = training_set(run, earlier_runs(run))
    new = {run.processor.item_rows[item_id] for item_id in run.writer.item_ids}
    told = [{*row["item_embedding_ids"]} - {0} for row in rows]
    own = len(training_parts(run)[0])
    assert set.union(*told[:own]) <= new
    assert not set.union(*told[own:]) & new
    assert set(AutoProcessor.from_pretrained(folder).item_rows.values()) >= set.union(*told[own:])
    with pytest.raises(ValueError, match="remembered has an item memory that this model has not"):
        earlier_runs(
            prepare(load_recipe(recipe_of(goods, tmp_path / "a", task=task, model={"checkpoint": str(films)})))
        )
    clash = write_tables(
        tmp_path / "clash",
        interactions=[{"user_id": f"u{row % 4}", "item_id": "i0", "timestamp": 10**9 + row} for row in range(12)],
        items=[{"item_id": "i0", "title": "soap"}],
    )
    with pytest.raises(ValueError, match="remembered has an item 'i0' that is not this run's"):
        earlier_runs(prepare(load_recipe(recipe_of(clash, tmp_path / "b", **sections))))
