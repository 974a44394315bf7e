"""In-batch negatives over a whole optimizer step: from all its micro-batches, on all processes.

The softmax over a large batch is not a sum of those over small batches. Gradient caching (Gao et al., 2021,
arXiv 2101.06983) still computes its exact gradients from small batches: encode all users and items without gradients,
compute the softmax and its gradients with respect to their vectors, then encode each micro-batch again and
backpropagate these gradients. It costs one more forward pass.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object

from ...losses_m6rec import retrieval_losses


@dataclass(frozen=True)
class Vectors:
    """Inputs of the softmax from a micro-batch: U users, M items.

    Attributes:
        users: U x D.
        items: M x D.
        labels: U rows of `items`.
        names: Key of each item, equal for equal items in all micro-batches.
        temperature: Divides the cosines.
        log_frequency: M log probabilities of an item to be in the step, up to a constant; None = no correction.
    """

    users: torch.Tensor
    items: torch.Tensor
    labels: torch.Tensor
    names: list[tuple[int, ...]]
    temperature: float
    log_frequency: torch.Tensor | None


class _Recorder:
    """Replaces the retrieval loss and records its arguments."""

    def __init__(self) -> None:
        self.given: tuple[Any, ...] | None = None

    def __call__(self, users: torch.Tensor, items: torch.Tensor, *more: Any) -> torch.Tensor:
        self.given = (users, items, *more)
        return users.new_zeros(())


@dataclass(frozen=True)
class CachedGradients:
    """Replaces the retrieval loss of a micro-batch: its share of the step's loss, with the step's gradients.

    Attributes:
        loss: Sum of the losses of this micro-batch's users.
        users: Gradients of the U x D users.
        items: Gradients of the M x D items.
    """

    loss: torch.Tensor
    users: torch.Tensor
    items: torch.Tensor

    def __call__(self, users: torch.Tensor, items: torch.Tensor, *more: Any) -> torch.Tensor:
        """Return the loss, divided by the last argument, the weight."""
        along = (users * self.users).sum() + (items * self.items).sum()
        weight = more[-1]
        return (along - along.detach() + self.loss) / (weight + (weight == 0))


def cached_gradients(
    forward: Callable[..., Any], batches: Sequence[Mapping[str, torch.Tensor]], process: int = 0
) -> list[CachedGradients | None]:
    """Compute the softmax of an optimizer step.

    Args:
        forward: Calls the model on a batch. It must draw the same random numbers as in training on the same batches in
            this order: this function restores the state of the generators.
        batches: The micro-batches of this process.
        process: Number of this process; all processes of a training must call this function together.

    Returns:
        The `contrast` of each micro-batch; None for micro-batches without labels of retrieval.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        own = [_read(forward, batch) for batch in batches]
    step = gather_object([(process, place, vectors) for place, vectors in enumerate(own)])
    step = [entry for entry in step if entry[2] is not None and len(entry[2].labels)]
    found: list[CachedGradients | None] = [None if vectors is None else _nothing(vectors) for vectors in own]
    if step:
        for (of, place, _), replay in zip(step, _softmax([vectors for *_, vectors in step])):
            if of == process:
                found[place] = replay
    device = next(iter(batches[0].values())).device
    return [
        replay and CachedGradients(*(getattr(replay, name).to(device) for name in vars(replay))) for replay in found
    ]


def _read(forward: Callable[..., Any], batch: Mapping[str, torch.Tensor]) -> Vectors | None:
    """Encode a micro-batch, also one without labels, since encoding draws random numbers."""
    recorder = _Recorder()
    forward(batch, contrast=recorder)
    if recorder.given is None:
        return None
    users, items, labels, temperature, log_frequency, _ = recorder.given
    lengths = batch["item_attention_mask"].sum(1).tolist()
    memory = batch["candidate_embedding_ids"].tolist()
    ids = batch["item_input_ids"].tolist()
    names = [(row, *own[:length]) for own, length, row in zip(ids, lengths, memory)]
    if log_frequency is not None:
        # The collator's frequencies assume the positives of a micro-batch; a softmax ignores a constant.
        log_frequency = log_frequency.cpu() - torch.tensor(float(max(len(labels), 1))).log()
    return Vectors(users.cpu(), items.cpu(), labels.cpu(), names, temperature, log_frequency)


def _softmax(step: Sequence[Vectors]) -> list[CachedGradients]:
    """Compute losses and gradients; an item that occurs several times is in the softmax once, by its first vector."""
    place: dict[tuple[int, ...], int] = {}
    first: list[int] = []
    where: list[int] = []
    for number, name in enumerate(name for vectors in step for name in vectors.names):
        if name not in place:
            place[name] = len(first)
            first.append(number)
        where.append(place[name])
    offsets = torch.tensor([0, *(len(vectors.names) for vectors in step)]).cumsum(0)[:-1]
    labels = torch.tensor(where)[torch.cat([own.labels + offset for own, offset in zip(step, offsets)])]
    users = torch.cat([vectors.users for vectors in step]).requires_grad_()
    items = torch.cat([vectors.items for vectors in step]).requires_grad_()
    frequencies = [vectors.log_frequency for vectors in step if vectors.log_frequency is not None]
    log_frequency = torch.cat(frequencies)[first] if frequencies else None
    with torch.enable_grad():
        losses = retrieval_losses(users, items[first], labels, step[0].temperature, log_frequency)
        of_users, of_items = torch.autograd.grad(losses.sum(), (users, items))
    num_users, num_items = ([len(part) for part in parts] for parts in zip(*((v.users, v.items) for v in step)))
    parts = zip(losses.detach().split(num_users), of_users.split(num_users), of_items.split(num_items))
    return [CachedGradients(own.sum(), *gradients) for own, *gradients in parts]


def _nothing(vectors: Vectors) -> CachedGradients:
    return CachedGradients(torch.zeros(()), torch.zeros_like(vectors.users), torch.zeros_like(vectors.items))


__all__ = ["CachedGradients", "Vectors", "cached_gradients"]
