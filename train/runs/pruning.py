"""Gradual magnitude pruning: the smallest weights of each matrix become zero while the rest is trained.

Source: Zhu and Gupta, 2017; M6-Edge (the paper) prunes embeddings and linear layers to 80%.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

FIRST, LAST = 0.1, 0.7
"""Shares of the steps at which pruning begins and is complete; afterwards the remaining weights recover."""


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


@torch.no_grad()
def prune(model: nn.Module, share: float) -> None:
    """Set the smallest weights of each matrix to zero; rows of an embedding that are zero count as pruned.

    Args:
        model: The model.
        share: Share of each matrix's weights that are zero afterwards; weights of equal size are set in their order.
    """
    for _, weight in prunable(model):
        count = int(share * weight.numel())
        if count:
            smallest = weight.abs().flatten().topk(count, largest=False, sorted=False).indices
            weight.view(-1)[smallest] = 0


def sparsity(model: nn.Module) -> float:
    """Return the share of zeros among the weights that can be pruned."""
    zeros, total = 0, 0
    for _, weight in prunable(model):
        zeros, total = zeros + int((weight == 0).sum()), total + weight.numel()
    return zeros / max(total, 1)


class GradualPruning(TrainerCallback):
    """Prunes the model after each optimizer step, more and more, up to a share.

    A weight that is zero stays among the smallest unless its gradient makes it larger than another: which weights are
    zero may change until the end.

    Args:
        model: The model.
        share: Share of each matrix's weights that are zero at the end.
    """

    def __init__(self, model: nn.Module, share: float) -> None:
        self.model, self.share = model, share

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prune to the share of this step."""
        prune(self.model, share_at(state.global_step / state.max_steps, self.share))


__all__ = ["GradualPruning", "prunable", "prune", "share_at", "sparsity"]
