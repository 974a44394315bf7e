"""A checkpoint is whole or not there; a run that was killed, wherever, ends as one that was not."""

import errno
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers.modeling_utils
import yaml
from peft import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModel

from m6rec.train.config.recipe import load_recipe
from m6rec.train.runs import checkpoints
from m6rec.train.runs.build import prepare, save
from m6rec.train.runs.checkpoints import find_checkpoint, newest
from m6rec.train.runs.finetune import fit
from tests import fast
from tests.fast import some
from tests.train import killed
from tests.train.world import recipe_of

REPOSITORY = Path(__file__).resolve().parents[3]
TRAINING = {
    "max_steps": 9,
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "logging_steps": 3,
    "learning_rate": 0.01,
}
DROPOUT = {"config": {"hidden_dropout": 0.2, "attention_dropout": 0.1}, "item_embeddings": True}
CASES = {
    # Every task at once, each epoch with its own negatives; an epoch is longer than a checkpoint's two steps.
    "all": {
        "task": {
            "learn": ["retrieval", "click", "rating", "interaction"],
            "interactions": {"like": ["like"], "skip": ["skip"]},
            "negatives_per_event": 1,
        },
        "model": DROPOUT,
        "training": {**TRAINING, "train_sampling_strategy": "group_by_length"},
    },
    # In-batch negatives of the whole step, and steps that are no whole part of an epoch (18 rows: 3 steps).
    "batch": {
        "task": {"learn": ["retrieval"], "negatives": "batch"},
        "model": DROPOUT,
        "training": {
            **TRAINING,
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
            "load_best_model_at_end": True,
            "metric_for_best_model": "mrr",
            "save_total_limit": 1,
        },
    },
    "lora": {
        "task": {"learn": ["retrieval"], "negatives": "sampled", "num_sampled": 4},
        "model": DROPOUT,
        "tuning": {"method": "lora"},
        "training": TRAINING,
    },
    "text": {"model": DROPOUT, "training": {**TRAINING, "save_steps": 3}, "pretraining": {"valid_fraction": 0.2}},
}


def write(folder, name, data, case):
    """Write the recipe of a case; returns the command that runs it."""
    recipe = recipe_of(data, folder / name, **CASES[case])
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    return ["pretrain" if case == "text" else "finetune", str(path)]


def run_killed(plan):
    if fast.ONLY:  # the forks are of this process, which has imported torch
        return [killed.run(command, Path(folder), rounds, seed) for command, folder, rounds, seed in plan]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "tests.train.killed", json.dumps(plan)]
    done = subprocess.run(
        command, check=False, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def notes(folder):
    return [line.split() for line in folder.with_suffix(".notes").read_text().splitlines()]


def same_ends(straight, killed):
    """Compare an unbroken run with one that was killed: batches, losses, weights, optimizer, log, report."""
    expected = {tuple(line[:2]): line[2:] for line in notes(straight)}
    assert len(expected) == len(notes(straight)), "an unbroken run trains on each batch once"
    for step, place, *found in notes(killed):
        assert found == expected[step, place]
    assert {tuple(line[:2]) for line in notes(killed)} == set(expected)
    weights = sorted(path.name for path in straight.glob("*.safetensors"))
    assert weights
    for name in weights:
        left, right = load_file(straight / name), load_file(killed / name)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left)
    assert (straight / "metrics.json").read_text() == (killed / "metrics.json").read_text()
    last = newest(straight)
    assert newest(killed).name == last.name
    left, right = (
        torch.load(folder / last.name / "optimizer.pt", weights_only=True)["state"] for folder in (straight, killed)
    )
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key][name], right[key][name]) for key in left for name in left[key])
    states = [json.loads((folder / last.name / "trainer_state.json").read_text()) for folder in (straight, killed)]
    assert states[0]["log_history"] == states[1]["log_history"]
    assert not [path for path in killed.iterdir() if path.name.startswith(".")]


def compare(folder, data, cases, rounds, seed):
    plan = []
    for case in cases:
        for kind, kills in (("straight", 0), ("killed", rounds)):
            plan.append([write(folder, f"{case}-{kind}", data, case), str(folder / f"{case}-{kind}"), kills, seed])
    happened = run_killed(plan)
    for case in cases:
        same_ends(folder / f"{case}-straight", folder / f"{case}-killed")
    return happened


def test_a_killed_run_ends_as_an_unbroken_one(tables, tmp_path):
    happened = compare(tmp_path, tables, ["all"], 1, seed=1)
    assert all(any(what.startswith("killed") for what in rounds) for rounds in happened[1::2])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_wherever_it_is_killed(tables, tmp_path, case):
    happened = compare(tmp_path, tables, [case], 20, seed=2)
    assert "killed while saving" in happened[1]


# What is measured at the end of an epoch is in no checkpoint of its last step, and is not measured again.
NO_EVALUATION = {"eval_strategy": "no", "load_best_model_at_end": False}


@pytest.mark.parametrize(
    ("case", "steps"),
    some([(case, steps) for case in ("all", "batch") for steps in ((4,), (6,), (2, 8))], [("all", (4,))]),
)
def test_a_resumed_run_repeats_the_unbroken_one(tables, tmp_path, case, steps):
    """From each checkpoint in turn: within an epoch, at its end, and between two logs."""
    sections = {**CASES[case], "training": {**CASES[case]["training"], **TRAINING, **NO_EVALUATION}}

    def ends(**more):
        sections["training"] |= more
        run = prepare(load_recipe(recipe_of(tables, tmp_path / "run", **sections)))
        trainer = fit(run)
        return [entry for entry in trainer.state.log_history if "train_loss" not in entry], run.model.state_dict()

    log, weights = ends(save_total_limit=None)
    assert [entry["step"] for entry in log if "loss" in entry] == [2, 3, 4, 6, 8, 9]
    for step in steps:
        again, resumed = ends(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        assert again == log
        assert all(torch.equal(resumed[name], tensor) for name, tensor in weights.items())


def mean_of(folder, steps):
    """The mean of what the checkpoints of some steps hold, by name."""
    states = [load_file(next((folder / f"checkpoint-{step}").glob("*model.safetensors"))) for step in steps]
    return {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}


@pytest.mark.parametrize("method", some(["full", "lora"], ["full"]))
def test_weights_may_be_the_mean_of_the_last_checkpoints(tables, tmp_path, method, caplog):
    """Of this run: a later checkpoint of a longer run of the same folder, and those of another one, are passed over."""

    def weights(name, resume=None, **tuning):
        steps = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "learning_rate": 0.01}
        steps |= {"resume_from_checkpoint": resume} if resume else {}
        own = {"tuning": {"method": method, **tuning}, "training": steps, "model": DROPOUT}
        run = prepare(load_recipe(recipe_of(tables, tmp_path / name, **own)))
        fit(run)
        return get_peft_model_state_dict(run.model) if method == "lora" else run.model.state_dict()

    last = weights("last")
    found = weights("mean", average_checkpoints=3)
    mean = mean_of(tmp_path / "mean", (2, 3, 4))
    learnt = {name for name in mean if not torch.equal(last[name], found[name])}
    assert learnt and all(torch.allclose(found[name], mean[name], rtol=0, atol=1e-7) for name in mean)
    for step, place in (("3", "checkpoint-9"), ("2", "checkpoint-3")):
        shutil.rmtree(tmp_path / "mean" / place, ignore_errors=True)
        shutil.copytree(tmp_path / "mean" / f"checkpoint-{step}", tmp_path / "mean" / place)
    other = tmp_path / "mean" / "checkpoint-1" / "recipe.yaml"
    other.write_text(other.read_text().replace("learning_rate: 0.01", "learning_rate: 0.02"))
    again = weights("mean", resume=str(tmp_path / "mean" / "checkpoint-4"), average_checkpoints=4)
    mean = mean_of(tmp_path / "mean", (2, 2, 4))
    assert all(torch.allclose(again[name], mean[name], rtol=0, atol=1e-7) for name in mean)
    assert "3 of 4" in caplog.text


def tree(folder):
    """All that a folder holds: name -> bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fill(folder, content):
    for name, text in content.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


def _checked(save_file, check, kind):
    def saved(content, path, *args, **kwargs):
        try:
            check(path)
        except OSError as error:
            raise kind(str(error)) from error
        return save_file(content, path, *args, **kwargs)

    return saved


def full_after(monkeypatch, folder, count):
    """Let the disk be full at the file with this number; returns the names of the files that were begun."""
    begun = []

    def check(path):
        if str(folder) in str(path):
            begun.append(Path(path).name)
            if len(begun) == count:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))

    def opened(path, mode="r", *args, _open=open, **kwargs):
        if "w" in mode or "a" in mode:
            check(path)
        return _open(path, mode, *args, **kwargs)

    monkeypatch.setattr("builtins.open", opened)
    monkeypatch.setattr(io, "open", opened)
    writers = ((torch, "save", RuntimeError), (transformers.modeling_utils, "safe_save_file", SafetensorError))
    for owner, name, kind in writers:
        monkeypatch.setattr(owner, name, _checked(getattr(owner, name), check, kind))
    return begun


def test_a_full_disk_leaves_the_checkpoint_and_the_model_before(make_recipe):
    """The N-th file finds no room, for each file of weights and each ninth file of a checkpoint and of a model."""
    training = {**TRAINING, "max_steps": 1, "save_steps": 1, "seed": 1}
    run = prepare(make_recipe(task={"learn": ["click"]}, training=training))
    trainer = fit(run)
    folder, written, told = run.recipe.output_dir, {}, set()
    saves = {"checkpoint": lambda: trainer._save_checkpoint(run.model, None), "model": lambda: save(run)}
    for what, write_again in saves.items():
        with pytest.MonkeyPatch.context() as monkeypatch:
            files = full_after(monkeypatch, folder, 0)
            write_again()
        written[what], before = len(files), tree(folder)
        weights = {number for number, name in enumerate(files, 1) if name.endswith((".safetensors", ".pt", ".bin"))}
        for count in sorted({*range(1, len(files), 9), len(files)} | weights):
            with pytest.MonkeyPatch.context() as monkeypatch:
                full_after(monkeypatch, folder, count)
                with pytest.raises(OSError, match="No space left on device") as error:
                    write_again()
            told.add(error.value.errno)
            assert tree(folder) == before, (what, count)
    assert told == {errno.ENOSPC, None}, "plain files tell it themselves; of weights it is told by us"
    assert written["checkpoint"] >= 10
    assert written["model"] >= 6
    assert AutoModel.from_pretrained(newest(folder)).config == AutoModel.from_pretrained(folder).config


def test_a_checkpoint_loads_like_a_model(make_recipe):
    run = prepare(make_recipe(task={"learn": ["click"]}, training={**TRAINING, "max_steps": 2}))
    fit(run)
    checkpoint = newest(run.recipe.output_dir)
    again = load_recipe(checkpoint, [f"model.checkpoint={checkpoint}"])
    for name, tensor in prepare(again).model.state_dict().items():
        assert torch.equal(tensor, run.model.state_dict()[name]), name


def test_the_newest_checkpoint_is_the_one_written_last(tmp_path, caplog):
    caplog.set_level("INFO")
    assert find_checkpoint(None, tmp_path) is find_checkpoint(False, tmp_path) is None
    assert find_checkpoint(True, tmp_path / "nowhere") is None
    assert "holds no checkpoint to go on from" in caplog.text
    for age, name in enumerate(("checkpoint-30", "checkpoint-4", "checkpoint-10")):
        fill(tmp_path, {f"{name}/trainer_state.json": "{}"})
        os.utime(tmp_path / name / "trainer_state.json", (age, age))
    (tmp_path / "checkpoint-99").mkdir()  # has no state: not one of ours
    (tmp_path / ".partial-checkpoint-50").mkdir()
    assert find_checkpoint(True, tmp_path).name == "checkpoint-10"
    assert find_checkpoint(str(tmp_path), Path("other")).name == "checkpoint-10"
    assert find_checkpoint(str(tmp_path / "checkpoint-4"), Path("other")).name == "checkpoint-4"
    with pytest.raises(FileNotFoundError, match="checkpoint-99"):
        find_checkpoint(str(tmp_path / "checkpoint-99"), tmp_path)


OTHERS = {
    "training.seed was 5, is 6": {"training": {"seed": 6}},
    "training.learning_rate was 0.01, is 0.02": {"training": {"learning_rate": 0.02}},
    "rows of a step was 6, is 12": {"training": {"per_device_train_batch_size": 6}},
    "task.targets was 3, is 2": {"task": {"targets": 2}},
    "text.max_events was 4, is 3": {"text": {"max_events": 3}},
    "model.preset was 'tiny', is 'edge'": {"model": {"preset": "edge"}},
    "evaluation.split was 'leave-one-out', is 'time'": {"evaluation": {"split": "time"}},
}


@pytest.fixture(scope="module")
def trained_before(tables, tmp_path_factory):
    folder = tmp_path_factory.mktemp("before") / "run"
    sections = {"task": {"learn": ["click"]}, "training": {**TRAINING, "max_steps": 2}}
    fit(prepare(load_recipe(recipe_of(tables, folder, **sections))))
    return folder, newest(folder), sections


@pytest.mark.parametrize("told", OTHERS)
def test_a_checkpoint_of_another_run_is_refused(trained_before, tables, told):
    folder, checkpoint, sections = trained_before
    more = {name: {**sections.get(name, {}), **own} for name, own in OTHERS[told].items()}
    recipe = load_recipe(recipe_of(tables, folder, **{**sections, **more}))
    run = json.loads((checkpoint / "run.json").read_text())
    run["rows of a step"] = 2 * recipe.training["per_device_train_batch_size"]
    with pytest.raises(ValueError, match=told):
        checkpoints.refuse_other(checkpoint, recipe, run)


def test_a_checkpoint_of_another_stage_or_of_other_rows_is_refused(trained_before, tables):
    folder, checkpoint, sections = trained_before
    recipe = load_recipe(recipe_of(tables, folder, **sections))
    run = json.loads((checkpoint / "run.json").read_text())
    checkpoints.refuse_other(checkpoint, recipe, run)
    with pytest.raises(ValueError, match="stage was 'finetune', is 'pretrain'"):
        checkpoints.refuse_other(checkpoint, recipe, {**run, "stage": "pretrain"})
    with pytest.raises(ValueError, match=f"rows was {run['rows']}, is 1000"):
        checkpoints.refuse_other(checkpoint, recipe, {**run, "rows": 1000})


def test_more_steps_and_other_logs_are_no_other_run(trained_before, tables):
    folder, checkpoint, sections = trained_before
    more = {"max_steps": 4, "logging_steps": 1, "save_steps": 1, "eval_strategy": "epoch", "output_dir": "elsewhere"}
    recipe = load_recipe(recipe_of(tables, folder, **{**sections, "training": {**TRAINING, **more}}))
    checkpoints.refuse_other(checkpoint, recipe, json.loads((checkpoint / "run.json").read_text()))


def test_a_finished_training_is_not_trained_beyond_its_end(trained_before, tables, monkeypatch):
    folder, _, sections = trained_before
    training = {**sections["training"], "resume_from_checkpoint": True}
    run = prepare(load_recipe(recipe_of(tables, folder, **{**sections, "training": training})))
    trainer = fit(run)
    assert trainer.state.global_step == 2
    assert newest(folder).name == "checkpoint-2"


def test_what_a_killed_run_left_is_put_right_before_training(make_recipe):
    recipe = make_recipe(training={"resume_from_checkpoint": True})
    fill(recipe.output_dir.parent, {"run/x": ""})
    fill(recipe.output_dir, {".partial-checkpoint-7/trainer_state.json": "{}", ".replaced-checkpoint-3/old": "text"})
    fit(prepare(recipe))
    assert not list(recipe.output_dir.glob(".*"))
    assert (recipe.output_dir / "checkpoint-3" / "old").read_text() == "text"
