"""Fine-tuning: what is asked for is learnt, measured, kept and found again, and nothing else moves."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, TrainerCallback

from m6rec import M6RecForRecommendation
from m6rec.train.config.arguments import BASELINES as UNTRAINED
from m6rec.train.config.recipe import load_recipe
from m6rec.train.rows.examples import training_rows
from m6rec.train.runs.build import prepare, save
from m6rec.train.runs.finetune import examples_of, finetune, fit, full_report, measure
from m6rec.train.runs.trainer import M6RecTrainer
from m6rec.train.runs.training_set import TrainingSet, training_parts
from tests.fast import some
from tests.train.world import best_of_steps, figures, recipe_of, write_checkerboard

INTERACTIONS = {"like": ["like"], "skip": ["skip"]}
TASKS = {
    "retrieval": {"learn": ["retrieval"]},
    "click": {"learn": ["click"]},
    "rating": {"learn": ["rating"]},
    "interaction": {"learn": ["interaction"], "interactions": INTERACTIONS},
    "all": {"learn": ["retrieval", "click", "rating", "interaction"], "interactions": INTERACTIONS},
}
MEANS = ["user_mean", "item_mean", "history_mean", "history_and_item"]
BASELINES = {
    "retrieval": ["m6rec", *UNTRAINED[:-1]],  # the last one only where seen items are recommended
    **{name: ["m6rec", *MEANS] for name in ("click", "rating", "interaction")},
}
OTHERS = ("batch", "sampled")


@pytest.mark.parametrize("task", some(TASKS, ["all"]))
def test_two_steps_of_each_task_leave_a_model_that_is_found_again(make_recipe, task):
    recipe = make_recipe(task=TASKS[task], model={"item_embeddings": task == "all"})
    report = finetune(recipe)
    folder, learnt = recipe.output_dir, TASKS[task]["learn"]
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "processor_config.json", "recipe.yaml", "metrics.json"} <= names
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    assert json.loads((folder / "metrics.json").read_text()) == report
    assert {name: list(rows) for name, rows in report.items()} == {
        name: rows for name, rows in BASELINES.items() if name in learnt
    }
    for rows in report.values():
        values = [value for row in rows.values() for value in figures(row).values() if value not in ("in", "out")]
        assert all(math.isfinite(value) for value in values)
    assert load_recipe(folder) == recipe
    loaded = M6RecForRecommendation.from_pretrained(folder)
    assert loaded.config.trained_tasks == sorted(learnt)
    assert all(torch.isfinite(tensor).all() for tensor in load_file(folder / "model.safetensors").values())
    # A run that goes on from the folder measures the same, to the last digit: weights, text and split are the same.
    again = load_recipe(folder, [f"model.checkpoint={folder}", f"training.output_dir={folder}-again"])
    assert full_report(prepare(again)) == report


def run_of(make_recipe, **sections):
    run = prepare(make_recipe(**sections))
    return run, fit(run)


def test_a_saved_run_scores_the_same_to_the_last_bit(make_recipe):
    run, _ = run_of(make_recipe, task=TASKS["all"])
    save(run)
    model = M6RecForRecommendation.from_pretrained(run.recipe.output_dir)
    processor = AutoProcessor.from_pretrained(run.recipe.output_dir)
    request = run.writer.request("u1", run.writer.events(run.split.train.iloc[:3]), run.writer.items[:4])
    own, other = (maker([request], "click", return_tensors="pt") for maker in (run.processor, processor))
    assert torch.equal(own["input_ids"], other["input_ids"])
    assert not run.model.training
    with torch.no_grad():
        assert torch.equal(run.model.score(**own), model.score(**other))


def test_the_same_seed_gives_the_same_model_and_figures(make_recipe):
    def outcome(seed):
        recipe = make_recipe(
            task=TASKS["all"],
            model={"item_embeddings": True, "config": {"hidden_dropout": 0.2}},
            training={"seed": seed},
        )
        run = prepare(recipe)
        fit(run)
        return run.model.state_dict(), run

    (first, run), (second, same), (other, _) = outcome(1), outcome(1), outcome(2)
    assert full_report(run) == full_report(same)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["score_head.weight"], other["score_head.weight"])


@pytest.mark.parametrize(
    ("task", "negatives"),
    some(
        [*((task, "catalogue") for task in TASKS), *((task, kind) for task in ("retrieval", "all") for kind in OTHERS)],
        [("click", "catalogue"), ("retrieval", "sampled"), ("all", "batch")],
    ),
)
def test_all_that_should_move_has_moved_and_nothing_else(make_recipe, task, negatives):
    recipe = make_recipe(
        task={**TASKS[task], "negatives": negatives, "num_sampled": 4},
        model={"item_embeddings": True, "config": {"item_embedding_dropout": 0.0, "max_events": 4}},
        training={"max_steps": 4, "learning_rate": 0.01, "per_device_train_batch_size": 16},
    )
    run = prepare(recipe)
    with torch.no_grad():
        run.model.model.item_memory.weight.normal_()
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    fit(run)
    retrieval, scores = "retrieval" in recipe.task.learn, recipe.task.learn != ["retrieval"]
    still = {
        "user_projection.weight": not retrieval,
        "item_projection.weight": not retrieval,
        "item_norm.weight": not retrieval,
        "score_head.weight": not scores,
        "score_head.bias": not scores,
    }
    for name, tensor in run.model.state_dict().items():
        assert torch.isfinite(tensor).all(), name
        assert torch.equal(tensor, before[name]) == still.get(name, False), name
    moved = (run.model.model.item_memory.weight != before["model.item_memory.weight"]).any(1)
    rows = {item_id: moved[row].item() for item_id, row in run.processor.item_rows.items()}
    met = {item_id for item_id in run.split.train["item_id"]}
    assert not moved[0]
    assert sum(rows[item_id] for item_id in met) > len(met) // 2
    assert not rows["i14"], "nobody has met it, so it is no negative either"


class Watcher(TrainerCallback):
    """Keeps the weights at each evaluation, and the figures."""

    def __init__(self, run):
        self.run, self.kept = run, []

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        weights = {name: tensor.clone() for name, tensor in self.run.model.state_dict().items()}
        self.kept.append((metrics, weights))


@pytest.mark.parametrize(
    ("metric", "key", "best"),
    some(
        [
            ("mrr", "eval_mrr", max),
            ("rating_rmse", "eval_rating_rmse", min),
            ("click_log_loss", "eval_click_log_loss", min),
        ],
        [("mrr", "eval_mrr", max)],
    ),
)
def test_the_best_checkpoint_by_any_figure_is_the_one_that_is_kept(make_recipe, monkeypatch, metric, key, best):
    training = best_of_steps(5, metric)
    run = prepare(make_recipe(task=TASKS["all"], model={"item_embeddings": True}, training=training))
    watcher = Watcher(run)
    start = M6RecTrainer.__init__

    def watched(trainer, *args, **kwargs):
        start(trainer, *args, **{**kwargs, "callbacks": [*kwargs.get("callbacks", ()), watcher]})

    monkeypatch.setattr(M6RecTrainer, "__init__", watched)
    trainer = fit(run)
    figures = [metrics[key] for metrics, _ in watcher.kept]
    assert len(set(figures)) > 1
    chosen = watcher.kept[figures.index(best(figures))][1]
    assert trainer.state.best_metric == best(figures)
    assert trainer.model is run.model
    after = run.model.state_dict()
    assert all(torch.equal(after[name], chosen[name]) for name in after)
    assert run.model.lm_head.weight is run.model.get_input_embeddings().weight
    assert {"eval_ndcg@5", "eval_click_auc", "eval_rating_mae", "eval_warm/recall@1"} <= set(watcher.kept[0][0])
    assert trainer.evaluate()[key] == best(figures)
    assert not run.model.training


@pytest.mark.slow
def test_a_run_goes_on_from_the_checkpoint_that_the_recipe_names(make_recipe, tmp_path, monkeypatch):
    plan = {"max_steps": 4, "learning_rate": 0.01, "lr_scheduler_type": "constant"}
    whole, _ = run_of(make_recipe, training={**plan, "output_dir": str(tmp_path / "whole")})
    saving = {"save_strategy": "steps", "save_steps": 2, "output_dir": str(tmp_path / "half")}
    run_of(make_recipe, training={**plan, **saving, "max_steps": 2})
    steps, compute = [], M6RecTrainer.compute_loss
    monkeypatch.setattr(M6RecTrainer, "compute_loss", lambda *args, **kw: steps.append(1) or compute(*args, **kw))
    going_on = {**plan, **saving, "resume_from_checkpoint": str(tmp_path / "half" / "checkpoint-2")}
    resumed, trainer = run_of(make_recipe, training=going_on)
    assert (trainer.state.global_step, len(steps)) == (4, 2)
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)


def losses(run, rows, batch_size, accumulation, steps=3, **training):
    """Loss of each optimizer step over rows in their order."""
    arguments = run.recipe.training_arguments(
        **{"bf16": False, "use_cpu": True, "logging_steps": 1, "train_sampling_strategy": "sequential", **training}
    )
    arguments.per_device_train_batch_size = batch_size
    arguments.gradient_accumulation_steps, arguments.max_steps = accumulation, steps
    dataset = TrainingSet([rows])
    trainer = M6RecTrainer(run, model=run.model, args=arguments, train_dataset=dataset, data_collator=run.collator)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
def test_accumulated_small_batches_learn_as_a_large_one(make_recipe):
    task = {"learn": ["click"], "targets": 3}
    sections = {"task": task, "training": {"optim": "sgd", "learning_rate": 0.5}}
    together, apart = prepare(make_recipe(**sections)), prepare(make_recipe(**sections))
    rows = training_rows(together.writer, together.split.train, together.processor, together.recipe.task)
    rows = [row for row in rows if len(row["click_labels"]) == 3][:12]
    assert len(rows) == 12
    large, small = losses(together, rows, 4, 1), losses(apart, rows, 2, 2)
    assert small == pytest.approx(large, rel=1e-5)
    for name, tensor in together.model.state_dict().items():
        torch.testing.assert_close(apart.model.state_dict()[name], tensor, rtol=1e-4, atol=1e-4, msg=name)


def test_rows_of_like_length_can_be_put_together(make_recipe):
    run = prepare(make_recipe(training={"train_sampling_strategy": "group_by_length"}))
    trainer = fit(run)
    assert trainer.state.global_step == 2
    batches = list(trainer.get_train_dataloader())
    assert sum(len(batch["input_ids"]) for batch in batches) == len(trainer.train_dataset)


def test_frozen_texts_are_read_once_and_stay_as_they_are(make_recipe):
    run, _ = run_of(
        make_recipe, model={"freeze_segments": True, "config": {"segment_summary": 1}}, training={"max_steps": 3}
    )
    assert len(run.segment_cache) > 0
    fresh = prepare(run.recipe).model.state_dict()
    same = {name for name, tensor in run.model.state_dict().items() if torch.equal(tensor, fresh[name])}
    assert {"model.embeddings.tokens.weight", "model.layers.0.mlp.down_proj.weight"} <= same
    assert "user_projection.weight" not in same


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True])
def test_a_compiled_model_learns_the_same(make_recipe, frozen):
    sections = {"model": {"freeze_segments": frozen, "config": {"num_hidden_layers": 2, "num_joint_layers": 1}}}
    plain, _ = run_of(make_recipe, **sections)
    recipe = make_recipe(**sections, training={"torch_compile": True, "torch_compile_backend": "eager"})
    fresh = prepare(recipe).model.state_dict()
    with torch._dynamo.config.patch(assume_static_by_default=False):  # each graph is made once
        report = finetune(recipe)
    learnt = M6RecForRecommendation.from_pretrained(recipe.output_dir).state_dict()
    torch.testing.assert_close(learnt, plain.model.state_dict())
    assert not torch.equal(learnt["user_projection.weight"], fresh["user_projection.weight"])
    assert report["retrieval"]["m6rec"] == full_report(plain)["retrieval"]["m6rec"]
    torch._dynamo.reset()


@pytest.mark.parametrize("memory", [False, True])
def test_the_states_of_a_frozen_catalogue_stand_in_for_its_texts(make_recipe, memory):
    settings = {"item_embedding_dropout": 0.0, "bow_embeddings": memory}
    model = {"freeze_segments": True, "item_embeddings": memory, "config": settings}
    run, trainer = run_of(make_recipe, model=model, task={"negatives": "catalogue"}, training={"max_steps": 1})
    rows = training_parts(run)[0][:5]
    short = run.collator(rows)
    run.collator.frozen = False
    long = run.collator(rows)
    assert set(long) - set(short) == {"item_input_ids", "item_attention_mask"}
    run.model.train()
    if memory:
        torch.nn.init.normal_(run.model.model.word_memory.weight)
    fast, slow = trainer.compute_loss(run.model, short), trainer.compute_loss(run.model, long)
    torch.testing.assert_close(fast, slow)
    examples = examples_of(run, "test", "retrieval")
    through_cache = measure(run, examples, "retrieval")
    assert run.segment_cache.hits > 0
    run.segment_cache = None
    assert measure(run, examples, "retrieval") == pytest.approx(through_cache)


def test_what_cannot_be_measured_is_said(make_recipe):
    split = {"split": "time", "valid_fraction": 0.0, "test_fraction": 0.3}
    run, trainer = run_of(make_recipe, evaluation=split)
    with pytest.raises(ValueError, match="no event to measure 'retrieval' on"):
        trainer.evaluate()
    assert list(full_report(run)) == ["retrieval"]


@pytest.mark.slow  # where time counts, the quickstart's model is what has to learn such a world
@pytest.mark.parametrize("memory", [False, True])
def test_two_halves_of_a_world_are_learnt_far_above_popularity(tmp_path, memory):
    data = write_checkerboard(tmp_path / "board")
    recipe = load_recipe(
        recipe_of(
            data,
            tmp_path / "run",
            text={"max_events": 10},
            model={"item_embeddings": memory, "config": {"initializer_range": 0.02}},  # as in own-data.yaml
            training={"max_steps": 150, "learning_rate": 0.005, "per_device_train_batch_size": 20},
            evaluation={"ks": [3]},
        )
    )
    report = finetune(recipe)["retrieval"]
    # 7 of a half's 10 items are met before: of the 13 that can be recommended 3 are of the right half.
    assert report["m6rec"]["recall@3"] > 0.8
    assert report["popularity"]["recall@3"] < 0.4


EVERY = {**TASKS["all"], "learn": [*TASKS["all"]["learn"], "writing"], "writing": {"item_text": []}}
WEIGHTS = {"retrieval": 1.0, "click": 0.5, "rating": 0.25, "interaction": 2.0, "writing": 0.125}


def test_rows_of_different_tasks_share_a_batch_and_keep_their_losses(make_recipe):
    run = prepare(make_recipe(task={**EVERY, "weights": WEIGHTS}, model={"item_embeddings": True}))
    parts = [list(part)[:3] for part in training_parts(run)]
    assert len(parts) == 3

    def losses_of(rows):
        with torch.no_grad():
            return run.model.eval()(**run.collator(rows))

    mixed = losses_of([row for some in zip(*parts) for row in some])
    alone = [losses_of(part).losses for part in parts]
    assert [sorted(losses) for losses in alone] == [["retrieval"], ["click", "interaction", "rating"], ["text"]]
    assert set(mixed.losses) == {name for losses in alone for name in losses}
    for losses in alone:
        for name, loss in losses.items():
            torch.testing.assert_close(mixed.losses[name], loss, rtol=1e-5, atol=1e-6)
    weights = {**WEIGHTS, "text": WEIGHTS["writing"]}
    total = sum(weights[name] * loss for name, loss in mixed.losses.items())
    torch.testing.assert_close(mixed.loss, total)


def test_every_head_learns_where_tasks_are_learnt_together(make_recipe):
    sections = {"task": {**EVERY, "weights": WEIGHTS}, "training": {"max_steps": 8, "logging_steps": 8}}
    run = prepare(make_recipe(**sections))
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    trainer = fit(run)
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    names = ("retrieval", "click", "rating", "interaction", "text")
    assert all(logged[f"loss_{name}"] > 0 for name in names)
    after, scores = run.model.state_dict(), run.model.config.score_slices
    assert list(scores) == ["click", "rating", "interaction"]
    for task, rows in scores.items():
        assert not torch.equal(after["score_head.weight"][rows], before["score_head.weight"][rows]), task
    for name in ("user_projection.weight", "item_projection.weight", "lm_head.weight"):
        assert not torch.equal(after[name], before[name]), name
    assert run.model.config.trained_tasks == sorted(EVERY["learn"])
