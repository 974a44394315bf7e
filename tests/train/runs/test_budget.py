"""A training is cut to the time that is left: by a clock that the test turns."""

from types import SimpleNamespace

import pytest
import torch
from transformers import TrainingArguments
from transformers.optimization import get_scheduler

from m6rec.train.runs.budget import TimeBudget
from m6rec.train.runs.with_evidence import NETWORK_ONLY, combined


class Training:
    """Epochs of ten steps that take a second each, and evaluations of five."""

    def __init__(self, deadline, tmp_path, step=1.0):
        self.now, self.step, self.lines = 0.0, step, []
        self.args = TrainingArguments(output_dir=str(tmp_path), warmup_steps=0, use_cpu=True, report_to="none")
        self.budget = TimeBudget(deadline, self.lines.append, clock=lambda: self.now)
        self.state = SimpleNamespace(max_steps=100, num_train_epochs=10, global_step=0, epoch=0.0)
        self.control = SimpleNamespace(should_training_stop=False)
        self.optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        self.scheduler = get_scheduler("linear", self.optimizer, 0, 100)

    def run(self):
        self.budget.on_train_begin(self.args, self.state, self.control)
        while self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            self.budget.on_step_begin(self.args, self.state, self.control)
            self.now += 10 if self.state.global_step == 0 else self.step
            self.optimizer.step()
            self.scheduler.step()
            self.state.global_step += 1
            self.state.epoch = self.state.global_step / 10
            self.budget.on_step_end(self.args, self.state, self.control, lr_scheduler=self.scheduler)
            if self.state.global_step % 10 == 0:
                self.budget.on_epoch_end(self.args, self.state, self.control)
                self.now += 5
                more = {"lr_scheduler": self.scheduler}
                self.budget.on_evaluate(self.args, self.state, self.control, metrics={"eval_ndcg@10": 0.5}, **more)
        return self


def test_all_steps_where_there_is_time(tmp_path):
    found = Training(1000, tmp_path).run()
    assert found.state.global_step == 100 and found.budget.planned is None and not found.budget.out_of_time
    assert found.lines[0] == "training: a step takes 1 s; 10.0 epochs, about 1:34 min"
    assert found.lines[1].startswith("epoch 1.0 of 10.0: ndcg@10 0.5000 on validation; 2:15 min left")


def test_steps_are_cut_and_the_rate_ends_with_them(tmp_path):
    found = Training(70, tmp_path).run()
    assert found.now <= 70 and found.state.global_step == found.budget.planned == found.state.max_steps < 50
    assert found.scheduler.get_last_lr()[0] == pytest.approx(0, abs=0.02)


def test_the_deadline_stops_a_training_that_becomes_slow(tmp_path):
    training = Training(60, tmp_path)
    slow = training.budget.on_step_end

    def become_slow(*given, **more):
        training.step = 30.0 if training.state.global_step > 8 else 1.0
        slow(*given, **more)

    training.budget.on_step_end = become_slow
    found = training.run()
    assert found.budget.out_of_time and found.now < 60 + 31 + 5
    found.budget.on_evaluate(found.args, found.state, found.control, metrics={"eval_ndcg@10": 0.5})
    assert found.lines[-1].endswith("ndcg@10 0.5000 on validation; out of time")


def test_shares():
    evidence, cosines = torch.zeros(1, 2).numpy() + 3, torch.ones(1, 2).numpy()
    assert combined(cosines, evidence, NETWORK_ONLY) is cosines and combined(cosines, evidence, 0) is evidence
    assert combined(cosines, evidence, 0.5)[slice(None)].tolist() == [[3.5, 3.5]]
