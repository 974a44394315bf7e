"""A scoring task that the package does not have, added by its rows of the table and its loss, and by nothing else."""

import json
import math

import datasets
import numpy
import pytest
import torch
from transformers import Trainer, TrainingArguments, pipeline

from m6rec import M6RecConfig, M6RecDataCollator, M6RecForRecommendation, M6RecProcessor
from m6rec.losses_m6rec import FORMS, Form, label_weights
from m6rec.train import finetune, load_recipe
from m6rec.train.commands.prepare import prepare_report
from m6rec.train.config.recipe import RECIPE_FILE
from m6rec.train.data.tasks import SCORED, ScoredTask
from m6rec.train.runs.build import prepare
from m6rec.values_m6rec import IGNORE_INDEX, SCORING_TASKS, ScoringTask
from tests.modeling_m6rec.tiny import Writer, build, close, pad
from tests.train.world import recipe_of, write_tables

COLOURS = ("red", "blue", "green")
USERS = 30
SHORT, LONG = 4.0, 60.0
"""Seconds that everybody stays with a clip, and with a film."""


class Seconds(Form):
    """Squared error of log(1 + seconds)."""

    is_probability = False

    def loss(self, logits, labels, task, config):
        known = labels != IGNORE_INDEX
        return (logits[known][..., 0].float() - labels[known].float().log1p()).square().sum()

    def answer(self, logits, task, config):
        return logits[..., 0].float().expm1()


ROW = ScoringTask(
    outputs=lambda config: ["log seconds"],
    form=lambda config: "seconds",
    about={"en": "the seconds that a user stays with an item"},
)


@pytest.fixture(scope="module", autouse=True)
def dwell():
    """Add the task, for the tests of this file."""
    patch = pytest.MonkeyPatch()
    patch.setitem(FORMS, "seconds", Seconds())
    patch.setitem(SCORING_TASKS, "dwell", ROW)
    patch.setitem(SCORED, "dwell", ScoredTask("seconds", "numbers"))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """Thirty users and twelve items, of which half are films; of some events it is not known how long they took."""
    items = [{"item_id": f"i{row}", "title": f"{COLOURS[row // 4]} {('clip', 'film')[row % 2]}"} for row in range(12)]
    rng, events = numpy.random.default_rng(5), []
    for user in range(USERS):
        for time, item in enumerate(rng.permutation(12)[:8]):
            row = {"user_id": f"u{user}", "item_id": f"i{item}", "timestamp": 1_600_000_000 + 60 * time}
            events.append({**row, "stay": "" if (user + item) % 7 == 0 else (SHORT, LONG)[item % 2]})
    return write_tables(tmp_path_factory.mktemp("log"), interactions=events, items=items)


def recipe(log, folder, learn, **sections):
    data = {**log, "columns": {"seconds": "stay"}}
    training = {"max_steps": 80, "learning_rate": 0.005, **sections.pop("training", {})}
    return load_recipe(recipe_of(data, folder, task={"learn": learn}, training=training, **sections))


@pytest.fixture(scope="module")
def learnt(log, tmp_path_factory):
    """The folder of a model that has learnt the task, and the report of its training."""
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")
    best = {"eval_strategy": "steps", "eval_steps": 40, "save_strategy": "steps", "save_steps": 40}
    best |= {"load_best_model_at_end": True, "metric_for_best_model": "dwell_rmse"}
    folder = tmp_path_factory.mktemp("made-up") / "model"
    report = finetune(recipe(log, folder, ["dwell"], training=best))
    patch.undo()
    return folder, report


def test_it_is_learnt_and_measured_better_than_any_mean_of_a_user(learnt):
    folder, report = learnt
    rows = report["dwell"]
    assert list(rows) == ["m6rec", "user_mean", "item_mean", "history_mean", "history_and_item"]
    assert rows["m6rec"]["rmse"] < 5 < rows["user_mean"]["rmse"]
    assert rows["m6rec"]["verdict"]["metric"] == "rmse"
    assert json.loads((folder / "metrics.json").read_text()) == report
    config = json.loads((folder / "config.json").read_text())
    assert config["score_tasks"] == ["click", "rating", "interaction", "dwell"]
    assert config["trained_tasks"] == ["dwell"]


def test_the_saved_model_ranks_by_it_without_being_asked_to(learnt):
    recommend = pipeline("recommendation", model=str(learnt[0]))
    request = {"history": ["red clip"], "candidates": ["red clip", "blue film", "green clip", "green film"]}
    found = recommend(request)
    assert {row["item"] for row in found[:2]} == {"blue film", "green film"}
    assert all(row["score"] == pytest.approx((SHORT, LONG)["film" in row["item"]], rel=0.3) for row in found)
    assert found == recommend(request, task="dwell")
    batch = M6RecProcessor.from_pretrained(learnt[0])([request], "dwell", return_tensors="pt")
    with torch.no_grad():
        scores = M6RecForRecommendation.from_pretrained(learnt[0]).eval().score("dwell", **batch)[0]
    close(scores.sort(descending=True)[0], torch.tensor([row["score"] for row in found]))
    with pytest.raises(ValueError, match="'dwell' are no probabilities"):
        recommend(request, task="dwell", exit_confidence=0.9)


def test_a_report_of_the_data_and_a_card_speak_of_it(log, learnt, tmp_path):
    found = prepare_report(recipe(log, tmp_path, ["dwell"]))
    assert set(found["events"]["by seconds"]) == {"4", "60", "unknown"} and found["requests"]["dwell"]["read"] == USERS
    from m6rec.model_cards import render_card
    from m6rec.train.runs.facts import folder_facts

    card = render_card(folder_facts(learnt[0], "org/clips"))
    assert "- Task `dwell`: the seconds that a user stays with an item." in card
    assert 'model.score("dwell", **batch)' in card


def test_a_model_that_was_without_it_gets_its_output_and_keeps_the_others(log, tmp_path):
    first = prepare(recipe(log, tmp_path / "first", ["retrieval"]))
    first.model.save_pretrained(tmp_path / "first")
    first.processor.save_pretrained(tmp_path / "first")
    then = prepare(recipe(log, tmp_path / "then", ["dwell"], model={"checkpoint": str(tmp_path / "first")})).model
    assert then.config.score_names == [*first.model.config.score_names, "log seconds"]
    assert torch.equal(then.score_head.weight[:-1], first.model.score_head.weight)


def test_losses_of_a_head_of_this_task_alone_are_arithmetic():
    model = build({"num_joint_layers": 2, "score_tasks": ["dwell"], "class_weights": None})
    rows = [
        Writer(0).source(1) + Writer(1).candidate() + Writer(2).candidate(),
        Writer(3).source(2) + [*Writer(4).candidate()],
    ]
    batch = {**pad(rows), "dwell_labels": torch.tensor([[3.0, -100.0], [10.0, -100.0]])}
    out = model(**batch)
    assert out.scores.shape == (2, 2, 1)
    expected = (out.scores[:, 0, 0] - torch.tensor([3.0, 10.0]).log1p()).square()
    close(out.loss, expected.mean())
    close(model(**batch, num_items_in_batch={"dwell": 8.0}).loss, expected.sum() / 8)
    assert label_weights(batch, model.config) == {"dwell": torch.tensor(2)}
    with pytest.raises(ValueError, match="click_labels: the score head has no outputs for it, only for dwell"):
        model(**pad(rows), click_labels=torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"task='click' has no score: choose one of \['dwell'\]"):
        model.score("click", **pad(rows))


@pytest.mark.parametrize("options", [{"label_names": ["dwell_labels"]}, {"remove_unused_columns": False}])
def test_the_librarys_trainer_learns_it(learnt, tmp_path, options):
    processor = M6RecProcessor.from_pretrained(learnt[0])
    model = M6RecForRecommendation.from_pretrained(learnt[0])
    request = {"history": ["red clip"], "candidates": ["red clip", "blue film"]}
    row = {"input_ids": processor.read(request, "dwell").input_ids, "dwell_labels": [SHORT, LONG]}
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True, **options
    )
    collator = M6RecDataCollator(processor, model.config)
    trainer = Trainer(model, arguments, collator, train_dataset=[row] * 2, eval_dataset=[row] * 2)
    before = trainer.evaluate()["eval_loss"]
    with torch.no_grad():
        assert math.isclose(before, model.eval()(**collator([row] * 2)).loss.item(), rel_tol=1e-5)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] != before


def test_without_its_rows_it_is_refused_by_name(learnt, tmp_path, monkeypatch):
    monkeypatch.delitem(SCORING_TASKS, "dwell")
    monkeypatch.delitem(SCORED, "dwell")
    with pytest.raises(ValueError, match=r"'dwell'\] must name some of click, rating, interaction, each once"):
        M6RecConfig.from_pretrained(learnt[0])
    with pytest.raises(ValueError, match=r"data\.columns: unknown role seconds"):
        load_recipe(learnt[0] / RECIPE_FILE)
    with pytest.raises(ValueError, match=r"expected some of retrieval, click, rating, interaction, writing$"):
        load_recipe(recipe_of({}, learnt[0], task={"learn": ["dwell"]}))
