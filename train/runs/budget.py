"""Training within a time limit: steps are timed, their number is cut to fit, and progress is reported."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.optimization import get_scheduler

MEASURED = 5
"""Number of steps after the first (a warm-up) that are timed to estimate the duration of a step."""


class TimeBudget(TrainerCallback):
    """Cuts a training to the remaining time, so that the learning rate schedule still ends within it.

    After some steps, and after each evaluation, the number of steps is cut to the number that fits: a step takes the
    median time so far, and an evaluation follows each epoch. At the deadline training stops in any case.

    Args:
        deadline: Time to stop, on `clock`.
        say: Receives lines of progress.
        metric: The metric of evaluations that is shown.
        clock: Returns the time in seconds.

    Attributes:
        planned: Number of steps in the last plan; None: all steps.
        out_of_time: Whether the deadline ended the training.
    """

    def __init__(
        self,
        deadline: float,
        say: Callable[[str], object],
        metric: str = "ndcg@10",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.deadline, self.say, self.metric, self.clock = deadline, say, metric, clock
        self.planned: int | None = None
        self.out_of_time = False
        self._steps: list[float] = []
        self._evaluations: list[float] = []
        self._started = self._epoch_ended = 0.0
        self._per_epoch = 1

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Store the number of steps per epoch."""
        self._per_epoch = max(round(state.max_steps / max(state.num_train_epochs, 1)), 1)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start timing the step."""
        self._started = self.clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Time the step, plan once enough steps are timed, and stop at the deadline."""
        now = self.clock()
        if state.global_step > 1:
            self._steps.append(now - self._started)
        if len(self._steps) == MEASURED:
            self._plan(args, state, kwargs["lr_scheduler"])
            epochs = state.max_steps / self._per_epoch
            left = self._seconds(state.max_steps - state.global_step)
            self.say(f"training: a step takes {median(self._steps):.2g} s; {epochs:.1f} epochs, about {clock(left)}")
        if now >= self.deadline:
            self.out_of_time = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start timing the evaluation."""
        self._epoch_ended = self.clock()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Time the evaluation, report progress, and plan again."""
        if self._epoch_ended:
            self._evaluations.append(self.clock() - self._epoch_ended)
        if len(self._steps) >= MEASURED and "lr_scheduler" in kwargs:
            self._plan(args, state, kwargs["lr_scheduler"])
        value, left = (
            kwargs["metrics"].get(f"eval_{self.metric}"),
            self._seconds(max(state.max_steps - state.global_step, 0)),
        )
        figure = "" if value is None else f": {self.metric} {value:.4f} on validation"
        rest = "out of time" if self.out_of_time else f"{clock(left)} left"
        self.say(f"epoch {state.epoch:.1f} of {state.max_steps / self._per_epoch:.1f}{figure}; {rest}")

    def _seconds(self, steps: int) -> float:
        """Estimate the duration of steps and of the evaluations between them."""
        each = median(self._steps) if self._steps else 0.0
        evaluation = median(self._evaluations) if self._evaluations else 0.0
        return steps * each + -(-steps // self._per_epoch) * evaluation

    def _plan(self, args: Any, state: Any, lr_scheduler: Any) -> None:
        """Cut the number of steps to fit the time, and end the learning rate schedule with them."""
        left = self.deadline - self.clock()
        evaluation = median(self._evaluations) if self._evaluations else 0.0
        fitting = int(left / (median(self._steps) + evaluation / self._per_epoch))
        planned = min(state.max_steps, state.global_step + max(fitting, 0))
        if planned >= state.max_steps:
            return
        self.planned = state.max_steps = planned
        plain = getattr(lr_scheduler, "scheduler", lr_scheduler)
        if hasattr(plain, "lr_lambdas"):
            plain.lr_lambdas = [_schedule(args, max(planned, 1))] * len(plain.lr_lambdas)


def _schedule(args: Any, steps: int) -> Callable[[int], float]:
    """Return the learning rate factor at each step, for a training of `steps` steps."""
    unused = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = get_scheduler(args.lr_scheduler_type, unused, args.get_warmup_steps(steps), steps)
    return scheduler.lr_lambdas[0]


def clock(seconds: float) -> str:
    """Format a duration.

    >>> clock(7.4), clock(125)
    ('7 s', '2:05 min')
    """
    whole = round(max(seconds, 0))
    return f"{whole} s" if whole < 60 else f"{whole // 60}:{whole % 60:02d} min"


__all__ = ["TimeBudget", "clock"]
