"""Losses of the four heads. A label of -100 is unknown and takes no part; an empty batch gives a loss of zero.

Each loss is the sum over its known labels divided by their weight: by that of the labels at hand, or by a given one,
that of all labels of an optimizer step, so that the step does not depend on how it is split into batches.

Shapes: B rows, T tokens, N targets of a row, I interactions, U user vectors, M items, D = embedding_dim,
V = vocab_size.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from .configuration_m6rec import M6RecConfig
from .layout_m6rec import Layout, layout
from .values_m6rec import IGNORE_INDEX

LOSSES = ("text", "click", "rating", "interaction", "retrieval")
"""The losses by name."""
PRODUCTS_AT_ONCE = {"cpu": 1 << 22}
"""Products of users and items that are held together, by kind of device: on a CPU what its cache takes,"""
PRODUCTS_AT_ONCE_ELSEWHERE = 1 << 26
"""elsewhere what bounds memory."""
Weight = torch.Tensor | float | None
"""Of the labels of a whole optimizer step; None = of those at hand."""


def given_labels(labels: torch.Tensor | None, name: str = "labels") -> torch.Tensor | None:
    """Return labels, or None where one -100 a row (B) says that a batch holds none of this kind.

    The library's Trainer computes `eval_loss` only of batches that hold all labels which `forward` names.

    Raises:
        ValueError: Known labels have one dimension.
    """
    if labels is None or labels.dim() > 1:
        return labels
    if not torch.compiler.is_compiling() and (labels != IGNORE_INDEX).any():
        raise ValueError(f"{name} has one dimension, {tuple(labels.shape)}: give a column for each target or token")
    return None


def label_weights(batch: Mapping[str, torch.Tensor], config: M6RecConfig) -> dict[str, torch.Tensor]:
    """Weigh the known labels of a batch for each loss: tokens that are predicted, targets times their class weight.

    Args:
        batch: What `M6RecForRecommendation.forward` takes.
        config: Its configuration.

    Returns:
        Loss by name -> the weight that its sum over this batch belongs to; summed over the batches of an optimizer step
        they are what `forward` takes as `num_items_in_batch`.
    """
    found: dict[str, torch.Tensor] = {}
    batch = {name: value for name, value in batch.items() if "labels" not in name or given_labels(value) is not None}
    if "labels" in batch:
        ids = batch["layout_ids"] if "layout_ids" in batch else batch["input_ids"]
        targets = text_targets(batch["labels"], layout(ids, batch.get("attention_mask"), config), config)
        found["text"] = (targets != IGNORE_INDEX).sum()
    for task in ("click", "rating"):
        if (labels := batch.get(f"{task}_labels")) is not None:
            labels = labels[labels != IGNORE_INDEX]
            weights = _class_weights(task, config, labels.device)
            classes = _rating_classes(labels, config)[0] if task == "rating" else labels.long()
            found[task] = torch.tensor(len(labels)) if weights is None else weights[classes].sum()
    for name, field in (("interaction", "interaction_labels"), ("retrieval", "retrieval_labels")):
        if field in batch:
            found[name] = (batch[field] != IGNORE_INDEX).sum()
    return found


def text_targets(labels: torch.Tensor, lay: Layout, config: M6RecConfig) -> torch.Tensor:
    """Say which token each position predicts: the next one, or its own where a document is read in both directions.

    A document's first token is predicted by nothing, also where documents are packed or padded on the left.

    Args:
        labels: B x T ids of the tokens that carry loss, else -100.
        lay: Layout of the B x T tokens.
        config: Says how documents are read.

    Returns:
        B x T ids, -100 where nothing is predicted.
    """
    following = functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    goes_on = lay.valid & functional.pad(lay.request[:, 1:] == lay.request[:, :-1], (0, 1))
    following = following.masked_fill(~goes_on, IGNORE_INDEX)
    own = lay.plain & (config.document_attention == "bidirectional")
    return torch.where(own, labels, following)


def text_loss(logits: torch.Tensor, targets: torch.Tensor, weight: Weight = None) -> torch.Tensor:
    """Cross-entropy of n x V logits for n target ids (paper, pretraining: both its losses have this form)."""
    total = functional.cross_entropy(logits.float(), targets, reduction="sum")
    return _mean(total, len(targets) if weight is None else weight)


def click_loss(logits: torch.Tensor, labels: torch.Tensor, config: M6RecConfig, weight: Weight = None) -> torch.Tensor:
    """Binary cross-entropy over the two classes of B x N x 2 logits for B x N labels 0 or 1 (paper, scoring)."""
    known = labels != IGNORE_INDEX
    _check_classes(labels[known], 2, "click_labels")
    return _cross_entropy(logits[known], labels[known].long(), "click", config, weight)


def rating_loss(logits: torch.Tensor, labels: torch.Tensor, config: M6RecConfig, weight: Weight = None) -> torch.Tensor:
    """Loss of B x N ratings: cross-entropy over `rating_values`, or squared error with `rating_loss="regression"`."""
    known = labels != IGNORE_INDEX
    ratings = labels[known].float()
    if config.rating_loss == "regression":
        predicted = rating_from_logits(logits[known], config)
        return _mean((predicted - ratings).square().sum(), len(ratings) if weight is None else weight)
    classes, distance = _rating_classes(ratings, config)
    if known.any() and distance.max() > 1e-4:
        strange = ratings[distance.argmax()].item()
        raise ValueError(
            f"rating_labels holds {strange:g}, which is none of rating_values={config.rating_values}: "
            "set rating_values, or rating_loss='regression'"
        )
    return _cross_entropy(logits[known], classes, "rating", config, weight)


def interaction_loss(
    logits: torch.Tensor, labels: torch.Tensor, config: M6RecConfig, weight: Weight = None
) -> torch.Tensor:
    """Binary cross-entropy of each interaction by itself: B x N x I logits, B x N x I labels 0 or 1.

    A class weight makes an interaction's positives count so many times; the mean is over labels.
    """
    known = labels != IGNORE_INDEX
    _check_classes(labels[known], 2, "interaction_labels")
    weights = _class_weights("interaction", config, logits.device)
    positive = None if weights is None else weights.expand_as(logits)[known]
    smooth = labels[known].float() * (1 - config.label_smoothing) + config.label_smoothing / 2
    loss = functional.binary_cross_entropy_with_logits(
        logits[known].float(), smooth, pos_weight=positive, reduction="sum"
    )
    return _mean(loss, known.sum() if weight is None else weight)


def score_losses(
    exit_scores: Sequence[torch.Tensor],
    labels: Mapping[str, torch.Tensor],
    config: M6RecConfig,
    step_weights: Mapping[str, Weight],
) -> dict[str, torch.Tensor]:
    """Compute the losses of the score head over all exits; weights rise with depth and sum to 1.

    Source: the paper, early exit: 2k / (L (L + 1)).

    Args:
        exit_scores: B x N x S score logits of each exit, the last layer's last.
        labels: Task -> B x N (x I) labels.
        config: Which outputs belong to which task.
        step_weights: Loss by name -> weight of the labels of the whole optimizer step.
    """
    found: dict[str, torch.Tensor] = {}
    compute = {"click": click_loss, "rating": rating_loss, "interaction": interaction_loss}
    layers = sorted({*(config.exit_layers or []), config.num_joint_layers})
    shares = [layer / sum(layers) for layer in layers] if len(exit_scores) == len(layers) else [1.0]
    for task, given in labels.items():
        if given.shape[:2] != exit_scores[-1].shape[:2]:
            raise ValueError(
                f"{task}_labels has shape {tuple(given.shape)}, but rows and most targets of a row are "
                f"{tuple(exit_scores[-1].shape[:2])}: pad with -100"
            )
        own = [scores[..., config.score_slices[task]] for scores in exit_scores]
        found[task] = sum(
            share * compute[task](logits, given, config, step_weights.get(task)) for share, logits in zip(shares, own)
        )
    return found


def retrieval_loss(
    users: torch.Tensor,
    items: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
    log_frequency: torch.Tensor | None = None,
    weight: Weight = None,
) -> torch.Tensor:
    """InfoNCE over the given items (paper, retrieval: in-batch negatives, temperature 0.07).

    The items decide what it is: those of the batch, each once, make it the in-batch loss; with drawn negatives it is a
    sampled softmax; with the whole catalogue it is the full softmax.

    Args:
        users: U x D, l2-normalised.
        items: M x D, l2-normalised.
        labels: U rows of `items`.
        temperature: Divides the cosines.
        log_frequency: M log probabilities with which each item got among `items` (logQ correction); None = none.
        weight: Labels of the whole optimizer step.
    """
    _check_rows(labels, items)
    total = _ChunkedInfoNCE.apply(users, items, labels, temperature, log_frequency)
    return _mean(total, len(labels) if weight is None else weight)


def retrieval_losses(
    users: torch.Tensor,
    items: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
    log_frequency: torch.Tensor | None = None,
) -> torch.Tensor:
    """InfoNCE of each of the U users; see `retrieval_loss`, which sums it without ever holding all U x M products."""
    _check_rows(labels, items)
    logits = (users / temperature @ items.T).float()  # U x M numbers are divided nowhere
    if log_frequency is not None:
        logits = logits - log_frequency.float()
    return functional.cross_entropy(logits, labels, reduction="none")


class _ChunkedInfoNCE(torch.autograd.Function):
    """The sum of `retrieval_losses`, some users at a time; gradients are made with it, while products are at hand.

    A catalogue's products with all users of a batch do not fit into a processor's cache, and autograd would keep them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        users: torch.Tensor,
        items: torch.Tensor,
        labels: torch.Tensor,
        temperature: float,
        log_frequency: torch.Tensor | None,
    ) -> torch.Tensor:
        learning = any(ctx.needs_input_grad)
        kind = users.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else users.dtype
        scaled, others = (users / temperature).to(dtype), items.to(dtype)
        total = torch.zeros((), device=users.device)
        of_users, of_items = torch.empty_like(users), torch.zeros_like(items)
        rows = max(PRODUCTS_AT_ONCE.get(kind, PRODUCTS_AT_ONCE_ELSEWHERE) // max(len(items), 1), 1)
        for start in range(0, len(users), rows):
            part = slice(start, start + rows)
            logits = (scaled[part] @ others.T).float()
            if log_frequency is not None:
                logits -= log_frequency.float()
            wanted = labels[part, None]
            norm = logits.logsumexp(1, keepdim=True)
            total += (norm - logits.gather(1, wanted)).sum()
            if learning:
                slope = logits.sub_(norm).exp_().scatter_add_(1, wanted, logits.new_full(wanted.shape, -1.0)).to(dtype)
                of_users[part] = slope @ others / temperature
                of_items += slope.T @ scaled[part]
        ctx.save_for_backward(of_users, of_items)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        of_users, of_items = ctx.saved_tensors
        return slope * of_users, slope * of_items, None, None, None


def rating_from_logits(logits: torch.Tensor, config: M6RecConfig) -> torch.Tensor:
    """Turn ... x (1 or number of ratings) logits into expected ratings, clear of any class boundary."""
    if config.rating_loss == "regression":
        middle = (config.rating_values[0] + config.rating_values[-1]) / 2
        return logits[..., 0].float() + middle
    return logits.float().softmax(-1) @ torch.tensor(config.rating_values, device=logits.device)


def _cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, task: str, config: M6RecConfig, weight: Weight
) -> torch.Tensor:
    """Weighted mean of the cross-entropy, with the task's class weights and label smoothing."""
    classes = _class_weights(task, config, logits.device)
    total = functional.cross_entropy(
        logits.float(), labels, weight=classes, label_smoothing=config.label_smoothing, reduction="sum"
    )
    if weight is None:
        weight = len(labels) if classes is None else classes[labels].sum()
    return _mean(total, weight)


def _mean(total: torch.Tensor, weight: torch.Tensor | float) -> torch.Tensor:
    """Divide a sum by the weight of what it sums over; the sum over nothing is zero, and so is its mean."""
    return total / (weight + (weight == 0))


def _class_weights(task: str, config: M6RecConfig, device: torch.device) -> torch.Tensor | None:
    weights = (config.class_weights or {}).get(task)
    return None if weights is None else torch.tensor(weights, dtype=torch.float32, device=device)


def _rating_classes(ratings: torch.Tensor, config: M6RecConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest of the `rating_values` to each of n ratings, and how far it is."""
    values = torch.tensor(config.rating_values, device=ratings.device)
    distance, classes = (ratings.float()[:, None] - values).abs().min(1)
    return classes, distance


def _check_rows(labels: torch.Tensor, items: torch.Tensor) -> None:
    if len(labels) and int(labels.max()) >= len(items):
        raise ValueError(f"retrieval_labels holds row {int(labels.max())}, but only {len(items)} items were given")


def _check_classes(labels: torch.Tensor, classes: int, name: str) -> None:
    strange = (labels != labels.long()) | (labels < 0) | (labels >= classes)
    if strange.any():
        raise ValueError(f"{name} holds {labels[strange][0].item():g}: use 0, 1, or {IGNORE_INDEX} where it is unknown")


__all__ = [
    "LOSSES",
    "click_loss",
    "given_labels",
    "interaction_loss",
    "label_weights",
    "rating_from_logits",
    "rating_loss",
    "retrieval_loss",
    "retrieval_losses",
    "score_losses",
    "text_loss",
    "text_targets",
]
