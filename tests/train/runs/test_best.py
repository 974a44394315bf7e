"""The figure that chooses the best checkpoint is checked before any data are read."""

from types import SimpleNamespace

import pytest

from m6rec.train.commands.run import run
from m6rec.train.config.recipe import load_recipe
from m6rec.train.runs.best import check_best_metric, examples
from m6rec.train.runs.finetune import finetune
from m6rec.train.runs.trainer import M6RecTrainer

TASKS = ["retrieval", "click", "rating", "interaction"]


def recipe_of_tasks(tasks, **training):
    task = {"learn": tasks} | ({"interactions": {"like": ["like"], "skip": ["skip"]}} if "interaction" in tasks else {})
    data = {"interactions": "nowhere.csv", "items": "nowhere.csv"}
    tree = {"data": data, "task": task, "evaluation": {"ks": [1, 5]}, "training": {"output_dir": "runs/x", **training}}
    return load_recipe(tree)


@pytest.mark.parametrize("metric", ["loss", "nonsense", "eval_loss", "ndcg@10", "coverage@1", "click_auc", "rmse"])
@pytest.mark.parametrize("start", [finetune, lambda recipe: run(recipe, print)])
def test_what_is_not_measured_is_refused_before_data_are_read(metric, start):
    recipe = recipe_of_tasks(["retrieval"], metric_for_best_model=metric)
    with pytest.raises(ValueError, match=rf"metric_for_best_model is '{metric}', .* one of ndcg@1, recall@1, ndcg@5"):
        start(recipe)


@pytest.mark.parametrize("training", [{"load_best_model_at_end": True}, {"save_strategy": "best"}])
def test_a_best_one_needs_a_figure(training):
    settings = {"eval_strategy": "epoch", "save_strategy": "epoch", "metric_for_best_model": None, **training}
    with pytest.raises(ValueError, match="metric_for_best_model is None"):
        check_best_metric(recipe_of_tasks(["click"], **settings))


def test_without_a_best_one_no_figure_is_needed():
    check_best_metric(recipe_of_tasks(["click"]))


@pytest.mark.parametrize(
    "metric", ["interaction_like/auc", "interaction_auc", "cold/ndcg@5", "eval_mrr", "popularity_bias@5", "click_gauc"]
)
def test_what_is_measured_is_taken(metric):
    check_best_metric(recipe_of_tasks(TASKS, metric_for_best_model=metric))


def test_the_figures_that_are_named_are_measured():
    recipe = recipe_of_tasks(TASKS)
    for name in examples(recipe):
        check_best_metric(recipe_of_tasks(TASKS, metric_for_best_model=name))


def test_a_figure_that_turns_out_to_be_missing_is_named():
    """As the AUC of held-out labels that are all the same."""
    trainer = SimpleNamespace(args=SimpleNamespace(metric_for_best_model="click_auc"))
    M6RecTrainer._require_best_metric(trainer, {"eval_click_auc": 0.5})
    with pytest.raises(ValueError, match=r"'click_auc', but measured were only click_log_loss, click_examples"):
        M6RecTrainer._require_best_metric(trainer, {"eval_click_log_loss": 0.5, "eval_click_examples": 3})
