"""Gradual pruning: the least important weights become zero while the rest is trained.

Source: M6-Edge (the paper) prunes embeddings and linear layers to 80%; the schedule is that of Zhu and Gupta, 2017. The
importance is that of LeCun et al., 1989, with squared gradients in place of second derivatives (ours).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

FIRST, LAST = 0.1, 0.7
"""Shares of the steps at which pruning begins and is complete; afterwards the remaining weights recover."""

REMEMBERED = 0.95
"""Share of a squared gradient's mean that remains after a step."""


def prunable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the trained matrices of embeddings and linear layers; norms and biases are vectors and stay."""
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and weight.requires_grad:
            yield name, weight


def share_at(progress: float, share: float) -> float:
    """Return the share of weights that are zero at a point of the training, by the cubic schedule.

    >>> [round(share_at(progress, 0.8), 2) for progress in (0.0, 0.1, 0.4, 0.7, 1.0)]
    [0.0, 0.0, 0.7, 0.8, 0.8]

    Args:
        progress: Share of the steps that are done.
        share: The share at the end.
    """
    left = 1 - min(max((progress - FIRST) / (LAST - FIRST), 0.0), 1.0)
    return share * (1 - left**3)


def sparsity(model: nn.Module) -> float:
    """Return the share of zeros among the weights that can be pruned."""
    zeros, total = 0, 0
    for _, weight in prunable(model):
        zeros, total = zeros + int((weight == 0).sum()), total + weight.numel()
    return zeros / max(total, 1)


@torch.no_grad()
def prune_least(weights: Sequence[torch.Tensor], importance: Sequence[torch.Tensor], share: float) -> None:
    """Set the least important of all weights to zero.

    Args:
        weights: The matrices.
        importance: The importance of their weights, in the same shapes.
        share: Share of all weights that are zero afterwards.
    """
    ranked = torch.cat([own.flatten() for own in importance])
    count = int(share * ranked.numel())
    if not count:
        return
    stays = torch.ones_like(ranked, dtype=torch.bool)
    stays[ranked.topk(count, largest=False, sorted=False).indices] = False
    for weight, own in zip(weights, stays.split([each.numel() for each in weights]), strict=True):
        weight.masked_fill_(~own.view_as(weight), 0)


class GradualPruning(TrainerCallback):
    """Prunes the model after each optimizer step, more and more, up to a share of its trained matrices' weights.

    The importance of a weight is its square times the mean of its squared gradients: about how much the loss would rise
    without it. It is compared across matrices, so that those that the tasks need most keep most; weights without
    gradients go first. A weight that is zero stays unimportant unless its gradient makes it larger than another: which
    weights are zero may change until the end. A resumed run computes the means of gradients from its first step on.

    Args:
        model: The model.
        share: Share of the weights that are zero at the end.
    """

    def __init__(self, model: nn.Module, share: float) -> None:
        self.model, self.share = model, share
        self.squares: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Update the means of squared gradients."""
        for name, weight in prunable(self.model):
            mean = self.squares.setdefault(name, torch.zeros_like(weight, dtype=torch.float32))
            mean.mul_(REMEMBERED)
            if weight.grad is not None:
                mean.add_(weight.grad.float().square(), alpha=1 - REMEMBERED)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prune to the share of this step."""
        weights = [weight.detach() for _, weight in prunable(self.model)]
        means = [self.squares[name] for name, _ in prunable(self.model)]
        importance = [weight.float().square() * mean for weight, mean in zip(weights, means, strict=True)]
        prune_least(weights, importance, share_at(state.global_step / state.max_steps, self.share))


__all__ = ["GradualPruning", "prunable", "prune_least", "share_at", "sparsity"]
