"""Losses of the four heads. A label of -100 is unknown and takes no part; an empty batch gives a loss of zero.

Shapes: B rows, T tokens, N targets of a row, I interactions, U user vectors, M items, D = embedding_dim,
V = vocab_size.
"""

import torch
from torch.nn import functional

from .configuration_m6rec import M6RecConfig
from .layout_m6rec import Layout

UNKNOWN = -100


def text_targets(labels: torch.Tensor, lay: Layout, config: M6RecConfig) -> torch.Tensor:
    """Say which token each position predicts: the next one, or its own where a document is read in both directions.

    Args:
        labels: B x T ids of the tokens that carry loss, else -100.
        lay: Layout of the B x T tokens.
        config: Says how documents are read.

    Returns:
        B x T ids, -100 where nothing is predicted.
    """
    following = functional.pad(labels[:, 1:], (0, 1), value=UNKNOWN)
    own = lay.plain & (config.document_attention == "bidirectional")
    return torch.where(own, labels, following)


def text_loss(logits: torch.Tensor, targets: torch.Tensor, count: torch.Tensor | int | None = None) -> torch.Tensor:
    """Cross-entropy of n x V logits for n target ids (paper, pretraining: both its losses have this form).

    Args:
        logits: n x V.
        targets: n ids.
        count: Tokens of the whole optimizer step, where micro-batches are accumulated; None = mean over these n.
    """
    total = functional.cross_entropy(logits.float(), targets, reduction="sum")
    return total / (max(len(targets), 1) if count is None else count)


def click_loss(logits: torch.Tensor, labels: torch.Tensor, config: M6RecConfig) -> torch.Tensor:
    """Binary cross-entropy over the two classes of B x N x 2 logits for B x N labels 0 or 1 (paper, scoring)."""
    known = labels != UNKNOWN
    _check_classes(labels[known], 2, "click_labels")
    return _cross_entropy(logits[known], labels[known].long(), "click", config)


def rating_loss(logits: torch.Tensor, labels: torch.Tensor, config: M6RecConfig) -> torch.Tensor:
    """Loss of B x N ratings: cross-entropy over `rating_values`, or squared error with `rating_loss="regression"`."""
    known = labels != UNKNOWN
    ratings = labels[known].float()
    if config.rating_loss == "regression":
        predicted = rating_from_logits(logits[known], config)
        return functional.mse_loss(predicted, ratings) if known.any() else predicted.sum()
    values = torch.tensor(config.rating_values, device=ratings.device)
    distance = (ratings[:, None] - values).abs()
    if known.any() and distance.amin(1).max() > 1e-4:
        strange = ratings[distance.amin(1).argmax()].item()
        raise ValueError(
            f"rating_labels holds {strange:g}, which is none of rating_values={config.rating_values}: "
            "set rating_values, or rating_loss='regression'"
        )
    return _cross_entropy(logits[known], distance.argmin(1), "rating", config)


def interaction_loss(logits: torch.Tensor, labels: torch.Tensor, config: M6RecConfig) -> torch.Tensor:
    """Binary cross-entropy of each interaction by itself: B x N x I logits, B x N x I labels 0 or 1."""
    known = labels != UNKNOWN
    _check_classes(labels[known], 2, "interaction_labels")
    weights = (config.class_weights or {}).get("interaction")
    positive = None if weights is None else torch.tensor(weights, device=logits.device).expand_as(logits)[known]
    smooth = labels[known].float() * (1 - config.label_smoothing) + config.label_smoothing / 2
    loss = functional.binary_cross_entropy_with_logits(
        logits[known].float(), smooth, pos_weight=positive, reduction="sum"
    )
    return loss / max(int(known.sum()), 1)


def retrieval_loss(
    users: torch.Tensor,
    items: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
    log_frequency: torch.Tensor | None = None,
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
    """
    logits = (users @ items.T).float() / temperature
    if log_frequency is not None:
        logits = logits - log_frequency.float()
    if len(labels) and int(labels.max()) >= len(items):
        raise ValueError(f"retrieval_labels holds row {int(labels.max())}, but only {len(items)} items were given")
    return functional.cross_entropy(logits, labels, reduction="sum") / max(len(labels), 1)


def rating_from_logits(logits: torch.Tensor, config: M6RecConfig) -> torch.Tensor:
    """Turn ... x (1 or number of ratings) logits into expected ratings, clear of any class boundary."""
    if config.rating_loss == "regression":
        middle = (config.rating_values[0] + config.rating_values[-1]) / 2
        return logits[..., 0].float() + middle
    return logits.float().softmax(-1) @ torch.tensor(config.rating_values, device=logits.device)


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor, task: str, config: M6RecConfig) -> torch.Tensor:
    """Mean cross-entropy with the task's class weights and label smoothing; zero for no rows."""
    weights = (config.class_weights or {}).get(task)
    tensor = None if weights is None else torch.tensor(weights, device=logits.device)
    if not len(labels):
        return logits.float().sum()
    return functional.cross_entropy(logits.float(), labels, weight=tensor, label_smoothing=config.label_smoothing)


def _check_classes(labels: torch.Tensor, classes: int, name: str) -> None:
    strange = (labels != labels.long()) | (labels < 0) | (labels >= classes)
    if strange.any():
        raise ValueError(f"{name} holds {labels[strange][0].item():g}: use 0, 1, or {UNKNOWN} where it is unknown")


__all__ = [
    "UNKNOWN",
    "click_loss",
    "interaction_loss",
    "rating_from_logits",
    "rating_loss",
    "retrieval_loss",
    "text_loss",
    "text_targets",
]
