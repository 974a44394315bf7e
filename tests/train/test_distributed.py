"""Two processes learn what one learns that accumulates two batches; one of them speaks, writes and measures."""

import json
import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

from m6rec.train.cli import main
from tests import fast
from tests.train.world import recipe_of

REPOSITORY = Path(__file__).resolve().parents[2]
CASES = {
    "click": {"task": {"learn": ["click"]}},
    "rating": {"task": {"learn": ["rating"]}, "training": {"train_sampling_strategy": "group_by_length"}},
    "catalogue": {
        "task": {"learn": ["retrieval"]},
        "training": {
            "eval_strategy": "steps",
            "eval_steps": 1,
            "save_strategy": "steps",
            "save_steps": 1,
            "save_total_limit": 2,
            "load_best_model_at_end": True,
            "metric_for_best_model": "mrr",
        },
    },
    "batch": {"task": {"learn": ["retrieval"], "negatives": "batch"}, "model": {"freeze_segments": True}},
    "text": {},
}
FAST = ("catalogue", "batch", "text")
"""Cases that are also run where slow tests are left out."""
PLAN = {
    "max_steps": 3,
    "optim": "sgd",
    "learning_rate": 0.5,
    "weight_decay": 0.1,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
}


def launch(commands, processes=2):
    """Run commands in several processes of one training."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    command += ["-m", "tests.train.several", json.dumps(commands)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        command, check=False, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def fork(commands, place, processes=2):
    """Run them in forks of this process, where torch is loaded; they find each other as launched ones do."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    started = []
    for rank in range(processes):
        if child := os.fork():
            started.append(child)
            continue
        code = 1
        try:
            with open(place / f"said-{rank}", "w") as said:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
                sys.stdout = sys.stderr = said
                own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
                own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                os.environ.update({name: str(value) for name, value in own.items()})
                GradientState._reset_state()
                AcceleratorState._reset_state(reset_partial_state=True)
                code = max(main(command) for command in commands)
        except BaseException:  # noqa: BLE001 - a fork must not go on as if it were its parent
            (place / f"error-{rank}").write_text(traceback.format_exc())
        finally:
            os._exit(code)
    ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in started]
    assert ended == [0] * processes, [path.read_text() for path in place.glob("*-[01]")]
    return "".join((place / f"said-{rank}").read_text() for rank in range(processes))


def write(folder, data, case, **training):
    """Write the recipe of a case; returns the command that runs it."""
    own = CASES[case]
    training = {**PLAN, **own.get("training", {}), **training}
    sections = {**own, "training": training, "pretraining": {"valid_fraction": 0.2}}
    recipe = recipe_of(data, folder / "run", **sections)
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    return ["pretrain" if case == "text" else "finetune", str(folder / "recipe.yaml")]


def weights(folder):
    return load_file(folder / "run" / "model.safetensors")


def same(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(right[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


@pytest.fixture(scope="module")
def both(tables, tmp_path_factory):
    """Every case as learnt by one process, and by two; and what those two said."""
    folder = tmp_path_factory.mktemp("several")
    chosen = FAST if fast.ONLY else tuple(CASES)
    two = [
        write(folder / f"two-{case}", tables, case, per_device_train_batch_size=3, gradient_accumulation_steps=1)
        for case in chosen
    ]
    # Goes on within the second epoch; of 18 rows of retrieval an epoch has three steps.
    going_on = [*two[chosen.index("catalogue")], "--resume", "training.max_steps=5"]
    said = fork([*two, going_on], folder) if fast.ONLY else launch([*two, going_on])
    for case in chosen:
        more = {"max_steps": 5} if case == "catalogue" else {}
        split = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
        assert main(write(folder / f"one-{case}", tables, case, **split, **more)) == 0
    return folder, said, chosen


@pytest.mark.parametrize("case", fast.some(CASES, FAST))
def test_two_processes_learn_what_one_does(both, case):
    folder, *_ = both
    same(weights(folder / f"one-{case}"), weights(folder / f"two-{case}"))


def test_one_process_speaks_and_writes(both):
    folder, said, chosen = both
    assert said.count("written to") == len(chosen) + 1
    for case in chosen:
        one, two = ({path.name for path in (folder / f"{kind}-{case}" / "run").iterdir()} for kind in ("one", "two"))
        assert one == two
        assert not [name for name in two if name.startswith((".partial", ".complete", ".replaced"))]


@pytest.mark.parametrize("case", fast.some(CASES, FAST))
def test_they_log_and_measure_the_same(both, case):
    folder, *_ = both
    one, two = (json.loads((folder / f"{kind}-{case}" / "run" / "curves.json").read_text()) for kind in ("one", "two"))
    assert one.keys() == two.keys()
    assert "loss_text" in one or "eval_mrr" in one or "loss" in one
    for name in one:
        if name != "train_loss":  # of the steps since the resume
            assert [step for step, _ in one[name]] == [step for step, _ in two[name]]
            assert [value for _, value in one[name]] == pytest.approx([value for _, value in two[name]], rel=1e-3)


def test_a_checkpoint_of_two_processes_is_whole(both):
    folder, *_ = both
    found = sorted((folder / "two-catalogue" / "run").glob("checkpoint-*"))
    assert len(found) == 2
    assert found[-1].name == "checkpoint-5"
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt", "model.safetensors", "trainer_state.json"} <= {
        path.name for path in found[-1].iterdir()
    }
