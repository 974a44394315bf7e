"""A training that is killed again and again, at random moments, and resumed each time.

Each attempt is a fork of this process, so that torch is loaded once. Every batch is noted as it is trained on.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

from m6rec.train.cli import main
from m6rec.train.evaluation import curves
from m6rec.train.runs.trainer import M6RecTrainer
from tests.train.world import draw_nothing


def note_batches(notes):
    """Let the Trainer write a line for each micro-batch: its step, its place in the step, a digest of what it holds."""
    train, seen = M6RecTrainer.training_step, {}

    def training_step(trainer, model, inputs, *args, **kwargs):
        digest = hashlib.sha256()
        for name in sorted(inputs):
            digest.update(f"{name} {tuple(inputs[name].shape)}".encode() + inputs[name].numpy().tobytes())
        step = trainer.state.global_step
        seen[step] = seen.get(step, 0) + 1
        loss = train(trainer, model, inputs, *args, **kwargs)
        with notes.open("a") as file:
            file.write(f"{step} {seen[step]} {digest.hexdigest()} {float(loss)!r}\n")
        return loss

    M6RecTrainer.training_step = training_step


def start(command, notes, log):
    """Run a command in a fork; returns its process id."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        note_batches(notes)
        curves.draw = draw_nothing
        code = main(command)
    except BaseException:  # noqa: BLE001 - a fork must not go on as if it were its parent
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def finish(process):
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kill_somewhere(process, folder, notes, chance):
    """Kill a process: while a checkpoint is written, or some time after some batch; returns where it was hit."""
    in_save = chance.random() < 0.5
    batches, begun = chance.randint(0, 6), len(notes.read_text().splitlines()) if notes.exists() else 0
    while not os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        saving = any(folder.glob(".partial-*")) or any(folder.glob(".complete-*"))
        trained = len(notes.read_text().splitlines()) - begun if notes.exists() else 0
        if (saving and trained > 0) if in_save else trained >= batches:
            time.sleep(chance.uniform(0, 0.03))
            os.kill(process, signal.SIGKILL)
            break
        time.sleep(0.002)
    if finish(process) == 0:
        return "finished"
    return "killed while saving" if any(folder.glob(".*-*")) else "killed"


def run(command, folder, rounds, seed):
    """Train with `rounds` kills; returns what happened in each."""
    notes, log, chance = folder.with_suffix(".notes"), folder.with_suffix(".log"), random.Random(seed)
    happened = []
    for _ in range(rounds):
        happened.append(kill_somewhere(start([*command, "--resume"], notes, log), folder, notes, chance))
    code = finish(start([*command, "--resume"], notes, log))
    if code:
        raise SystemExit(f"{command} failed with {code}: {log.read_text()[-3000:]}")
    return happened


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    plan = json.loads(sys.argv[1])
    sys.stdout.write(json.dumps([run(command, Path(folder), rounds, seed) for command, folder, rounds, seed in plan]))
