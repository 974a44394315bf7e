"""The library's own Trainer, as somebody else uses it with our collator: it measures `eval_loss` and keeps the best."""

import math

import pytest
import torch
from transformers import Trainer, TrainingArguments

from m6rec import M6RecDataCollator
from m6rec.losses_m6rec import given_labels, label_weights
from m6rec.train.rows.collator import label_names
from m6rec.train.runs.build import prepare
from tests.modeling_m6rec.tiny import Writer, build

TASKS = {
    "click": {"click_labels": [1, 0]},
    "rating": {"rating_labels": [4.0, -100]},
    "interaction": {"interaction_labels": [[1, 0], [0, 1]]},
    "writing": {"labels": None},
    "retrieval": {"next_items": None},
}


@pytest.fixture(scope="module")
def prepared(tables, tmp_path_factory):
    from m6rec.train.config.recipe import load_recipe
    from tests.train.world import recipe_of

    return prepare(load_recipe(recipe_of(tables, tmp_path_factory.mktemp("own"))))


def rows_of(run, task):
    """Four rows with labels of one task."""
    history = [{"event": "watch", "item": "Low Tide"}, {"event": "like", "item": "Night Train"}]
    rows = []
    for number in range(4):
        candidates = ["Glass Towers", "Salt and Stone"][: 2 - number % 2]
        request = {"user": "a man", "history": history[: number % 2 + 1]}
        if task == "writing":
            ids, labels = run.processor.document(f"a sentence, number {number}")
            rows.append({"input_ids": ids, "labels": labels})
        elif task == "retrieval":
            row = run.processor.read(request, "retrieval")
            rows.append({"input_ids": row.input_ids, "next_items": [number] * (1 + len(request["history"]))})
        else:
            row = run.processor.read({**request, "candidates": candidates}, "click")
            name, labels = next(iter(TASKS[task].items()))
            rows.append({"input_ids": row.input_ids, name: labels[: len(candidates)]})
    return rows


def trainer_of(run, task, folder, **more):
    torch.manual_seed(0)
    model = build({"num_joint_layers": 2, "interactions": ["like", "skip"]}, **run.processor.tokenizer.structural_ids)
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, per_device_eval_batch_size=4, use_cpu=True,
        report_to="none", disable_tqdm=True, remove_unused_columns=task != "retrieval", **more,
    )  # fmt: skip
    collator = M6RecDataCollator(run.processor, model.config, run.catalogue)
    rows = rows_of(run, task)
    return Trainer(model=model, args=arguments, data_collator=collator, train_dataset=rows, eval_dataset=rows)


@pytest.mark.parametrize("task", TASKS)
def test_eval_loss_of_a_single_task_is_the_models(prepared, task, tmp_path):
    trainer = trainer_of(prepared, task, tmp_path)
    found = trainer.evaluate()["eval_loss"]
    batch = trainer.data_collator(rows_of(prepared, task))
    labels = label_names(trainer.model.config)
    batch = {name: value for name, value in batch.items() if name not in labels or value.dim() > 1}
    with torch.no_grad():
        out = trainer.model.eval()(**batch)
    assert math.isclose(found, out.loss.item(), rel_tol=1e-5) and found > 0
    assert list(out.losses) == ["text" if task == "writing" else task]


def test_the_best_model_is_kept(prepared, tmp_path):
    each = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    trainer = trainer_of(prepared, "click", tmp_path, load_best_model_at_end=True, learning_rate=0.05, **each)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 2 and trainer.state.best_metric == min(losses)
    assert math.isclose(trainer.evaluate()["eval_loss"], min(losses), rel_tol=1e-5)


def test_a_step_is_the_mean_of_its_micro_batches(prepared, tmp_path):
    """Not their sum: the library counts `labels` only, of which a batch of clicks has none."""
    trainer = trainer_of(prepared, "click", tmp_path, gradient_accumulation_steps=2, max_steps=1, logging_steps=1)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    (loss,) = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert abs(loss / before - 1) < 0.25


def test_rows_without_labels_are_predicted_without_a_loss(prepared, tmp_path):
    trainer = trainer_of(prepared, "click", tmp_path)
    rows = [{"input_ids": row["input_ids"]} for row in rows_of(prepared, "click")]
    assert not set(trainer.data_collator(rows)) & set(label_names(trainer.model.config))
    assert "eval_loss" not in trainer.evaluate(rows)


def test_labels_of_one_dimension_say_that_there_are_none():
    rows = [Writer(0).source(1) + Writer(1).candidate()]
    model = build({"num_joint_layers": 2})
    none, known = torch.tensor([-100]), torch.tensor([1])
    assert given_labels(none) is None and given_labels(known[None]) is not None
    ids = torch.tensor(rows)
    assert model(ids, click_labels=none).loss is None
    with pytest.raises(ValueError, match="click_labels has one dimension"):
        model(ids, click_labels=known)
    batch = {"input_ids": ids, **dict.fromkeys(label_names(model.config), none), "click_labels": known[None]}
    assert list(label_weights(batch, model.config)) == ["click"]
