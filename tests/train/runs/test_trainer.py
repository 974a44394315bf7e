"""An optimizer step is the same however it is split; what is logged, measured and refused."""

import copy
import json
import time

import numpy
import pytest
import torch

from m6rec.train.rows.examples import training_rows
from m6rec.train.runs import checkpoints
from m6rec.train.runs.build import prepare
from m6rec.train.runs.finetune import fit
from m6rec.train.runs.gradient_cache import cached_gradients
from m6rec.train.runs.trainer import M6RecTrainer
from tests.fast import some

INTERACTIONS = {"like": ["like"], "skip": ["skip"]}
WEIGHTS = {"click": [0.3, 2.0], "rating": [1.0, 2.0, 3.0, 4.0, 5.0], "interaction": [3.0, 0.5]}


def weighted(*tasks):
    return {"class_weights": {task: WEIGHTS[task] for task in tasks}}


CASES = {
    "click": ({"learn": ["click"]}, {**weighted("click"), "label_smoothing": 0.1}),
    "rating": ({"learn": ["rating"]}, {**weighted("rating"), "exit_layers": [1]}),
    "regression": ({"learn": ["rating"]}, {"rating_loss": "regression"}),
    "interaction": ({"learn": ["interaction"], "interactions": INTERACTIONS}, weighted("interaction")),
    "catalogue": ({"learn": ["retrieval"]}, {}),
    "batch": ({"learn": ["retrieval"], "negatives": "batch"}, {}),
    "text": ({}, {}),
    "documents": ({}, {"document_attention": "bidirectional"}),
    "all": (
        {"learn": ["retrieval", "click", "rating", "interaction"], "interactions": INTERACTIONS, "negatives": "batch"},
        {**weighted(*WEIGHTS), "loss_weights": {"click": 0.5, "text": 2.0}},
    ),
}


def rows_of(run, case):
    """Rows of a case, for a full step and a short one; of all tasks together so that batches lack some labels."""
    texts = [run.processor.document(run.writer.items[row]["title"]) for row in (0, 8, 3, 5, 7, 9)]
    plain = [{"input_ids": ids, "labels": list(ids)} for ids, _ in texts for _ in range(4)]
    if case in ("text", "documents"):
        return plain[:18]
    rows = training_rows(run.writer, run.split.train, run.processor, run.recipe.task)
    if case == "all":
        place = numpy.random.default_rng(0).permutation(len(rows))
        rows = (
            [rows[at] for at in place[:6]] + plain[:4] + [row for at in place[6:] for row in (rows[at], plain[at % 24])]
        )
    return rows[:18]


def prepared(make_recipe, case):
    task, config = CASES[case]
    run = prepare(make_recipe(task=task, model={"config": dict(config)}))
    return run, rows_of(run, case), copy.deepcopy(run.model.state_dict())


def trained(run, rows, start, batch_size, accumulation):
    """Weights and logs after two steps of 12 and 6 rows."""
    run.model.load_state_dict(start)
    assert len(rows) == 18
    arguments = run.recipe.training_arguments(
        optim="sgd",
        learning_rate=0.5,
        train_sampling_strategy="sequential",
        logging_steps=1,
        lr_scheduler_type="constant",
    )
    arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps = batch_size, accumulation
    trainer = M6RecTrainer(run, model=run.model, args=arguments, train_dataset=rows, data_collator=run.collator)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "learning_rate" in entry]
    for entry in logs:  # counted in micro-batches, of which the last ones of an epoch are fewer
        del entry["epoch"]
    return copy.deepcopy(run.model.state_dict()), logs


def same(left, right, **bounds):
    for name, tensor in left.items():
        torch.testing.assert_close(right[name], tensor, **{"rtol": 1e-5, "atol": 1e-5, "msg": name, **bounds})


@pytest.mark.parametrize("case", some(CASES, ["regression", "catalogue", "documents", "all"]))
def test_a_step_does_not_depend_on_how_it_is_split(make_recipe, case):
    given = prepared(make_recipe, case)
    whole, logs = trained(*given, 12, 1)
    assert len(logs) == 2
    weights, same_logs = trained(*given, 3, 4)
    same(whole, weights)
    for entry, other in zip(logs, same_logs):
        assert entry.keys() == other.keys()
        assert other == pytest.approx(entry, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_nor_where_each_row_is_a_batch(make_recipe, case):
    given = prepared(make_recipe, case)
    whole, _ = trained(*given, 12, 1)
    for split in ((4, 3), (1, 12)):
        same(whole, trained(*given, *split)[0])


def test_negatives_of_each_micro_batch_alone_are_another_loss(make_recipe):
    run, *given = prepared(make_recipe, "batch")
    whole, _ = trained(run, *given, 12, 1)
    run.recipe.task.cross_batch_negatives = False
    alone, _ = trained(run, *given, 4, 3)
    assert not torch.allclose(whole["user_projection.weight"], alone["user_projection.weight"], atol=1e-3)


def test_cached_gradients_hold_with_dropout(make_recipe):
    """Reading twice draws the same masks: gradients are those of vectors as they are read the second time."""
    run = prepare(
        make_recipe(task={"learn": ["retrieval"], "negatives": "batch"}, model={"config": {"hidden_dropout": 0.3}})
    )
    rows = training_rows(run.writer, run.split.train, run.processor, run.recipe.task)
    batches = [run.collator(rows[start : start + 3]) for start in (0, 3)]
    run.model.train()
    seen = []

    def forward(batch, contrast):
        kept = lambda *given: seen.append(given[:2]) or contrast(*given)  # noqa: E731
        return run.model(**batch, only_losses=True, contrast=kept, num_items_in_batch={"retrieval": 1.0})

    found = cached_gradients(forward, batches)
    for batch, replay in zip(batches, found):
        forward(batch, replay)
    for once, again in zip(seen[:2], seen[2:]):
        # Layers without gradients write in place, which rounds otherwise; other masks would differ in the first digit.
        assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(once, again))
        assert again[0].requires_grad


def test_a_step_computes_no_more_than_losses(make_recipe):
    run, rows, _ = prepared(make_recipe, "all")
    arguments = run.recipe.training_arguments()
    trainer = M6RecTrainer(run, model=run.model, args=arguments, train_dataset=rows, data_collator=run.collator)
    _, outputs = trainer.compute_loss(run.model, run.collator(rows), return_outputs=True)
    assert set(outputs.keys()) == {"loss", "losses"}


def test_every_loss_is_logged_by_name_and_they_sum_to_the_whole(make_recipe):
    _, logs = trained(*prepared(make_recipe, "all"), 4, 3)
    for entry in logs:
        parts = {name.removeprefix("loss_"): value for name, value in entry.items() if name.startswith("loss_")}
        assert {"text", "click"} <= set(parts)
        assert "learning_rate" in entry
        weights = {"click": 0.5, "text": 2.0}
        total = sum(weights.get(name, 1.0) * value for name, value in parts.items())
        assert entry["loss"] == pytest.approx(total, rel=1e-4)
    assert {"loss_retrieval", "loss_rating", "loss_interaction"} <= {name for entry in logs for name in entry}


@pytest.mark.parametrize(
    ("report_to", "module"), [("tensorboard", "tensorboard"), ("wandb", "wandb"), ("trackio", "trackio")]
)
def test_what_is_logged_arrives(make_recipe, tmp_path, monkeypatch, report_to, module):
    for name, value in {
        "TENSORBOARD_LOGGING_DIR": str(tmp_path / "logs"),
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(tmp_path),
        "WANDB_SILENT": "true",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
    }.items():
        monkeypatch.setenv(name, value)
    pytest.importorskip(module)  # only now: trackio reads its folder when it is imported
    training = {"report_to": report_to, "logging_steps": 1, "run_name": "trial"}
    fit(prepare(make_recipe(task={"learn": ["click"]}, training=training)))
    if report_to == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(next((tmp_path / "logs").rglob("events.*")).parent))
        events.Reload()
        assert {"train/loss", "train/loss_click", "train/learning_rate"} <= set(events.Tags()["scalars"])
        assert [event.step for event in events.Scalars("train/loss_click")] == [1, 2]
    elif report_to == "wandb":
        import wandb

        wandb.finish()
        written, deadline = next(tmp_path.rglob("*.wandb")), time.monotonic() + 20
        while b"train/loss_click" not in written.read_bytes():  # another process writes it
            assert time.monotonic() < deadline
            time.sleep(0.1)
    else:
        written = [path for path in (tmp_path / "trackio").rglob("*") if path.suffix in (".db", ".parquet", ".sqlite")]
        assert any(b"loss_click" in path.read_bytes() for path in written)


@pytest.mark.usefixtures("pictures")
def test_a_picture_and_its_numbers_lie_beside_the_model(make_recipe, tmp_path):
    training = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "output_dir": str(tmp_path / "run")}
    fit(prepare(make_recipe(task={"learn": ["click"]}, training=training)))
    assert (tmp_path / "run" / "curves.png").read_bytes()[:4] == b"\x89PNG"
    numbers = json.loads((tmp_path / "run" / "curves.json").read_text())
    assert [step for step, _ in numbers["loss_click"]] == [1, 2, 3, 4]
    assert [step for step, _ in numbers["eval_click_auc"]] == [2, 4]


def test_what_would_be_ignored_is_refused(make_recipe, monkeypatch):
    def trainer(**training):
        run = prepare(make_recipe(training=training))
        arguments = run.recipe.training_arguments()
        return M6RecTrainer(run, model=run.model, args=arguments, train_dataset=[], data_collator=run.collator)

    with pytest.raises(ValueError, match="FSDP was asked for, but this run computes on the CPU"):
        trainer(fsdp=True)
    with pytest.raises(ValueError, match="dataloader_persistent_workers keeps copies"):
        trainer(dataloader_persistent_workers=True, dataloader_num_workers=1)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP was asked for"):
        trainer()


def test_sharded_weights_come_back_into_a_whole_model(make_recipe):
    run = prepare(make_recipe())
    trainer = fit(run)
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    trainer._take_back()
    assert run.model is not trainer.model
    same(before, run.model.state_dict(), rtol=0, atol=0)


def test_the_steps_of_a_checkpoint_are_counted_in_rows(make_recipe):
    run = prepare(make_recipe(training={"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}))
    trainer = fit(run)
    assert trainer._facts() == {"stage": "finetune", "rows": len(trainer.train_dataset), "rows of a step": 6}
    assert checkpoints.newest(run.recipe.output_dir) is None
