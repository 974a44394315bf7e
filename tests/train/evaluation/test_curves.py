"""Curves show what was logged, all of it, and need no display."""

import json

import pytest
from PIL import Image

from m6rec.train.evaluation.curves import curves, panels, save_curves
from m6rec.train.runs.build import prepare
from m6rec.train.runs.finetune import fit

LOG = [
    {"loss": 2.0, "loss_click": 1.5, "loss_rating": 0.5, "learning_rate": 0.1, "epoch": 0.5, "step": 1},
    {"eval_click_auc": 0.5, "eval_ndcg@10": 0.1, "epoch": 0.5, "step": 1},
    {"loss": 1.0, "loss_click": 0.75, "learning_rate": 0.05, "epoch": 1.0, "step": 2},
    {"eval_click_auc": 0.75, "eval_note": "said", "step": 2},
    {"train_runtime": 3.0, "train_samples_per_second": 8.0, "total_flos": 1.0, "train_loss": 1.5, "step": 2},
]


def test_entries_are_sorted_by_name_and_text_is_no_curve():
    assert curves(LOG) == {
        "loss": [(1, 2.0), (2, 1.0)],
        "loss_click": [(1, 1.5), (2, 0.75)],
        "loss_rating": [(1, 0.5)],
        "learning_rate": [(1, 0.1), (2, 0.05)],
        "eval_click_auc": [(1, 0.5), (2, 0.75)],
        "eval_ndcg@10": [(1, 0.1)],
        "train_loss": [(2, 1.5)],
    }


def test_losses_stand_together_and_each_figure_by_itself():
    assert panels([*curves(LOG), "eval_auc"]) == {
        "loss": ["loss", "loss_click", "loss_rating"],
        "learning_rate": ["learning_rate"],
        "auc": ["eval_click_auc", "eval_auc"],
        "ndcg@10": ["eval_ndcg@10"],
    }


@pytest.mark.usefixtures("pictures")
def test_picture_and_numbers_are_written(tmp_path):
    save_curves(LOG, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"curves.png", "curves.json"}
    assert json.loads((tmp_path / "curves.json").read_text())["loss"] == [[1, 2.0], [2, 1.0]]
    picture = Image.open(tmp_path / "curves.png")
    assert picture.width > picture.height > 300
    assert len(picture.convert("RGB").getcolors(1 << 24)) > 3, "curves of several colours on white"


def test_nothing_is_drawn_of_nothing(tmp_path):
    save_curves([{"train_runtime": 3.0, "train_loss": 1.5, "step": 2}], tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("pictures")
def test_diverged_losses_are_drawn(tmp_path):
    save_curves(
        [{"loss": value, "step": step} for step, value in enumerate((1.0, float("inf"), float("nan")))], tmp_path
    )
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_curves_tell_the_whole_history_also_after_a_resume(make_recipe):
    training = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "lr_scheduler_type": "constant"}
    task = {"learn": ["click"]}
    fit(prepare(make_recipe(task=task, training={**training, "max_steps": 2})))
    folder = make_recipe().output_dir
    before = json.loads((folder / "curves.json").read_text())
    going_on = {**training, "max_steps": 4, "resume_from_checkpoint": True}
    fit(prepare(make_recipe(task=task, training=going_on)))
    after = json.loads((folder / "curves.json").read_text())
    assert [step for step, _ in after["loss_click"]] == [1, 2, 3, 4]
    assert after["loss_click"][:2] == before["loss_click"]
