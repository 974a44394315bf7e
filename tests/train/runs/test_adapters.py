"""Tuning by recipe: each method from the command line to a recommendation, and what surrounds it in a run."""

import json
import logging

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, TrainerCallback

from m6rec import M6RecForRecommendation
from m6rec.train.answering.loading import load_pipeline
from m6rec.train.cli import main
from m6rec.train.config.recipe import load_recipe
from m6rec.train.runs import finetune as finetuning
from m6rec.train.runs.adapters import attach, callbacks, reads_through_cache, trainable_parameters
from m6rec.train.runs.build import prepare, save
from m6rec.train.runs.finetune import finetune, fit, full_report
from m6rec.tuning import METHODS, load_tuned
from tests.fast import some
from tests.train.world import best_of_steps, figures, recipe_of

TASKS = {"learn": ["click", "retrieval"]}


@pytest.fixture(scope="module")
def base(tables, tmp_path_factory):
    """A model that has been trained before."""
    folder = tmp_path_factory.mktemp("tuned") / "base"
    run = prepare(load_recipe(recipe_of(tables, folder)))
    save(run)
    return str(folder)


@pytest.fixture
def tuning_recipe(make_recipe, base):
    def make(method, checkpoint=True, task=TASKS, model=None, training=None, **tuning):
        return make_recipe(
            task=task,
            model={**({"checkpoint": base} if checkpoint else {}), **(model or {})},
            tuning={"method": method, **tuning},
            training={"learning_rate": 0.01, **(training or {})},
        )

    return make


@pytest.mark.parametrize("method", some(METHODS, ["full", "option-adapter"]))
def test_each_method_from_the_command_line_to_a_recommendation(tables, tmp_path, base, method, capsys, caplog):
    caplog.set_level(logging.INFO)
    folder = tmp_path / "run"
    model = {"checkpoint": base, "item_embeddings": True}  # which the base has not
    recipe = recipe_of(tables, folder, task=TASKS, model=model, tuning={"method": method})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["finetune", str(tmp_path / "recipe.yaml")]) == 0
    share = [record.getMessage() for record in caplog.records if f"{method} trains" in record.getMessage()]
    assert len(share) == 1
    assert ("(100.00%)" in share[0]) == (method == "full")
    assert (folder / "adapter_config.json").is_file() == (method != "full")
    assert (folder / "model.safetensors").is_file() == (method == "full")
    assert not (folder / "base").exists()
    assert not (folder / "README.md").exists()
    measured = json.loads((folder / "metrics.json").read_text())
    folder = folder.rename(tmp_path / "moved")
    assert main(["evaluate", str(folder)]) == 0
    assert json.loads((folder / "metrics.json").read_text()) == measured
    capsys.readouterr()
    assert main(["recommend", str(folder), "--user", "u1", "--top-k", "3"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 3


@pytest.mark.parametrize("method", some(["option-adapter", "prefix"], ["option-adapter"]))
def test_a_base_made_in_the_run_is_kept_beside_the_adapter(tuning_recipe, tmp_path, method):
    recipe = tuning_recipe(method, checkpoint=False)
    run = prepare(recipe)
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    fit(run)
    save(run)
    folder = recipe.output_dir.rename(tmp_path / "elsewhere")
    kept = M6RecForRecommendation.from_pretrained(folder / "base").state_dict()
    assert all(torch.equal(kept[name], before[name]) for name in kept)
    run.recipe.model.checkpoint = str(folder)
    assert full_report(prepare(run.recipe)) == full_report(run)


def test_options_are_shown_and_read(tuning_recipe):
    run = prepare(tuning_recipe("option"))
    assert run.base_model.config.score_head == "linear"
    fit(run)
    assert run.processor.options == run.model.config.num_options
    assert run.base_model.config.score_head == "option"
    save(run)
    pipeline = load_pipeline(str(run.recipe.output_dir))
    assert pipeline.processor.options == run.processor.options
    row = pipeline.processor.read({"history": ["film"], "candidates": ["other"]}, "click").input_ids
    first = run.model.config.first_option_token_id
    assert set(range(first, first + run.model.config.num_options)) <= set(row)


@pytest.mark.parametrize("method", some(["lora", "adalora", "ia3", "option"], ["lora"]))
def test_what_is_linear_can_be_merged(tuning_recipe, method):
    recipe = tuning_recipe(method, merge=True)
    run = prepare(recipe)
    fit(run)
    report = full_report(run)
    save(run)
    assert not (recipe.output_dir / "adapter_config.json").exists()
    assert (recipe.output_dir / "model.safetensors").is_file()
    run.recipe.model.checkpoint, run.recipe.tuning.method = str(recipe.output_dir), "full"
    merged = full_report(prepare(run.recipe))
    for task, rows in report.items():
        for name, value in figures(rows["m6rec"]).items():
            assert merged[task]["m6rec"][name] == pytest.approx(value, abs=1e-5), (task, name)


def test_a_run_can_be_whole_where_an_adapter_was(tuning_recipe, base):
    run = prepare(tuning_recipe("lora"))
    fit(run)
    save(run)
    whole = prepare(tuning_recipe("full"))
    fit(whole)
    save(whole)
    folder = whole.recipe.output_dir
    loaded = M6RecForRecommendation.from_pretrained(folder)
    assert not hasattr(loaded, "peft_config")
    assert torch.equal(loaded.score_head.weight, whole.model.score_head.weight)


class Watcher(TrainerCallback):
    """Keeps a figure of each evaluation."""

    def __init__(self):
        self.figures = []

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.figures.append(metrics["eval_click_log_loss"])


@pytest.mark.parametrize("method", some(["lora", "adalora", "prefix", "option-adapter"], ["prefix"]))
def test_the_best_checkpoint_is_the_one_that_is_kept(tuning_recipe, monkeypatch, method):
    training = best_of_steps(3, "click_log_loss")
    watcher = Watcher()
    monkeypatch.setattr(finetuning, "callbacks", lambda run: [*callbacks(run), watcher])
    run = prepare(tuning_recipe(method, training=training))
    trainer = fit(run)
    assert len(set(watcher.figures)) == 3
    assert trainer.evaluate()["eval_click_log_loss"] == pytest.approx(min(watcher.figures), abs=1e-7)


@pytest.mark.parametrize("method", some(["lora", "prefix", "option-adapter"], ["option-adapter"]))
def test_an_adapter_goes_on_from_a_checkpoint(tuning_recipe, tmp_path, method):
    plan = {"max_steps": 4, "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 2}
    whole = prepare(tuning_recipe(method, training={**plan, "output_dir": str(tmp_path / "whole")}))
    fit(whole)
    going_on = {**plan, "resume_from_checkpoint": str(tmp_path / "whole" / "checkpoint-2")}
    resumed = prepare(tuning_recipe(method, training={**going_on, "output_dir": str(tmp_path / "resumed")}))
    assert fit(resumed).state.global_step == 4
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_adalora_cuts_its_ranks_on_schedule(tuning_recipe):
    settings = {"init_r": 6, "target_r": 2}
    run = prepare(tuning_recipe("adalora", training={"max_steps": 10}, settings=settings))
    fit(run)
    config = run.model.active_peft_config
    assert (config.total_step, config.tinit, config.tfinal) == (10, 1, 3)
    modules = len(run.model.base_model.targeted_module_names)
    ranks = [weight for name, weight in run.model.named_parameters() if "lora_E" in name]
    assert sum(int((weight != 0).sum()) for weight in ranks) == 2 * modules
    assert config.rank_pattern is None
    save(run)
    loaded = load_tuned(run.recipe.output_dir).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in run.model.state_dict().items() if "lora_" in name)


def test_segment_states_are_kept_where_nothing_below_is_trained(tuning_recipe):
    frozen = {"freeze_segments": True}
    for method, model, expected in (
        ("full", {}, False),
        ("full", frozen, True),
        ("lora", {}, False),
        ("lora", frozen, True),
        ("adapter", frozen, True),
        ("prefix", {}, False),
        ("prefix", frozen, False),
        ("option-adapter", {}, False),
    ):
        run = prepare(tuning_recipe(method, model=model))
        if model:
            run.base_model.model.freeze_segments()
        attach(run)
        assert reads_through_cache(run) == expected, (method, model)
    assert len(fit(prepare(tuning_recipe("lora", model=frozen))).run.segment_cache) > 0


def test_item_features_come_with_the_adapter(tuning_recipe):
    settings = {"item_embedding_dropout": 0.0, "bow_embeddings": True, "tfidf_weight": 0.5}
    recipe = tuning_recipe("lora", model={"item_embeddings": True, "config": settings})
    report = finetune(recipe)
    stored = load_file(recipe.output_dir / "adapter_model.safetensors")
    for memory in ("item_memory", "word_memory", "word_sketch"):
        assert any(value.any() for name, value in stored.items() if memory in name), memory
    again = load_recipe(recipe.output_dir, [f"model.checkpoint={recipe.output_dir}"])
    assert full_report(prepare(again)) == report
    # The base has none of these: what stands in their place must be the same each time the adapter is loaded.
    models = [load(recipe.output_dir) for load in (load_tuned, load_tuned, AutoModel.from_pretrained)]
    assert len({model.fingerprint() for model in models}) == 1
    assert main(["recommend", str(recipe.output_dir), "--user", "u1", "--top-k", "3"]) == 0


@pytest.mark.parametrize(("kind", "layer"), [("8bit", "Linear8bitLt"), ("nf4", "Linear4bit")])
def test_a_quantised_run_is_measured_and_found_again(tuning_recipe, kind, layer):
    pytest.importorskip("bitsandbytes")
    evaluated = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2}
    recipe = tuning_recipe("lora", quantization=kind, training=evaluated)
    report = finetune(recipe)
    again = prepare(load_recipe(recipe.output_dir, [f"model.checkpoint={recipe.output_dir}"]))
    assert any(type(part).__name__ == layer for part in again.model.modules())
    assert isinstance(again.model, PeftModel)
    for task, rows in full_report(again).items():
        for name, value in figures(rows["m6rec"]).items():
            assert value == pytest.approx(report[task]["m6rec"][name], abs=1e-6), (task, name)
    assert main(["recommend", str(recipe.output_dir), "--user", "u1", "--top-k", "3"]) == 0


def test_parameters_of_a_whole_run_are_all_trained(run):
    total = sum(weight.numel() for weight in run.model.parameters())
    assert trainable_parameters(run.model) == (total, total)


@pytest.mark.parametrize(
    ("method", "more", "message"),
    [
        ("prefix", {"merge": True}, "tuning.merge: 'prefix' adds what no plain weights can hold"),
        ("lora", {"merge": True, "quantization": "nf4"}, "tuning.quantization 'nf4' would round"),
        (
            "lora",
            {"quantization": "8bit", "checkpoint": False},
            "tuning.quantization '8bit' is done while a checkpoint",
        ),
        ("option", {"model": {"freeze_segments": True}}, "option tuning trains"),
        ("lora", {"settings": {"rank": 4}}, "lora has no setting 'rank'"),
    ],
)
def test_what_cannot_be_is_refused_before_training(tuning_recipe, method, more, message):
    if "quantization" in more:
        pytest.importorskip("bitsandbytes")
    run = prepare(tuning_recipe(method, **more))
    with pytest.raises(ValueError, match=message):
        fit(run)


def test_adapters_are_not_stacked_unawares(tuning_recipe):
    run = prepare(tuning_recipe("ia3"))
    attach(run)
    save(run)
    run.recipe.model.checkpoint = str(run.recipe.output_dir)
    with pytest.raises(ValueError, match=f"model.checkpoint '{run.recipe.output_dir}' holds an adapter"):
        fit(prepare(run.recipe))
