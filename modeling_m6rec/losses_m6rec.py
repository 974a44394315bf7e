"""Losses of the four heads, and answers of the score head.

A label of -100 is unknown and ignored; an empty batch gives a loss of zero.

Each loss is the sum over its known labels divided by their weight. The weight is that of the given labels or, if
passed, that of all labels of an optimizer step, so that the step does not depend on its split into batches.

Shapes: B rows, T tokens, N targets of a row, K outputs of a scoring task, U user vectors, M items, D = embedding_dim,
V = vocab_size.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from .configuration_m6rec import M6RecConfig
from .layout_m6rec import Layout, layout
from .values_m6rec import IGNORE_INDEX, SCORING_TASKS, label_field

PRODUCTS_AT_ONCE = {"cpu": 1 << 22}
"""Most products of users and items in memory at once, by device type: on a CPU as many as its cache holds."""
PRODUCTS_AT_ONCE_ELSEWHERE = 1 << 26
"""Most products in memory at once on other devices; this bounds memory."""
Weight = torch.Tensor | float | None
"""Weight of the labels of a whole optimizer step; None = weight of the given labels."""


def loss_names(config: M6RecConfig) -> list[str]:
    """Return the names of the losses that a model with this configuration may have."""
    return ["text", *config.scored, "retrieval"]


def given_labels(labels: torch.Tensor | None, name: str = "labels") -> torch.Tensor | None:
    """Return labels, or None if they are one -100 per row (B), which marks a batch without labels of this kind.

    The library's Trainer computes `eval_loss` only for batches with all labels that `forward` names.

    Raises:
        ValueError: If known labels have only one dimension.
    """
    if labels is None or labels.dim() > 1:
        return labels
    if not torch.compiler.is_compiling() and (labels != IGNORE_INDEX).any():
        raise ValueError(f"{name} has one dimension, {tuple(labels.shape)}: give a column for each target or token")
    return None


def label_weights(batch: Mapping[str, torch.Tensor], config: M6RecConfig) -> dict[str, torch.Tensor]:
    """Return the weight of a batch's known labels per loss: predicted tokens, or targets times their class weights.

    Args:
        batch: Arguments of `M6RecForRecommendation.forward`.
        config: Configuration of the model.

    Returns:
        Loss name -> weight of its labels in this batch; the sums over the batches of an optimizer step are the
        argument `num_items_in_batch` of `forward`.
    """
    found: dict[str, torch.Tensor] = {}
    batch = {name: value for name, value in batch.items() if "labels" not in name or given_labels(value) is not None}
    if "labels" in batch:
        ids = batch["layout_ids"] if "layout_ids" in batch else batch["input_ids"]
        targets = text_targets(batch["labels"], layout(ids, batch.get("attention_mask"), config), config)
        found["text"] = (targets != IGNORE_INDEX).sum()
    for task in config.scored:
        if (labels := batch.get(label_field(task))) is not None:
            found[task] = form_of(task, config).weight(labels, task, config)
    if "retrieval_labels" in batch:
        found["retrieval"] = (batch["retrieval_labels"] != IGNORE_INDEX).sum()
    return found


def text_targets(labels: torch.Tensor, lay: Layout, config: M6RecConfig) -> torch.Tensor:
    """Return the token that each position predicts: the next one, or its own in documents with bidirectional attention.

    No position predicts a document's first token, also if documents are packed or padded on the left.

    Args:
        labels: B x T ids of the tokens that carry loss, else -100.
        lay: Layout of the B x T tokens.
        config: Gives the attention of documents.

    Returns:
        B x T ids, -100 = no prediction.
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


class Form(ABC):
    """How the K outputs of a scoring task give its answer and its loss.

    A task names its form in SCORING_TASKS; several tasks may share one.
    """

    is_probability = True
    """Whether answers are probabilities and so have a confidence."""

    @abstractmethod
    def loss(self, logits: torch.Tensor, labels: torch.Tensor, task: str, config: M6RecConfig) -> torch.Tensor:
        """Sum the losses of known labels: B x N x K logits, B x N or B x N x K labels.

        Raises:
            ValueError: If a label is invalid.
        """

    def weight(self, labels: torch.Tensor, task: str, config: M6RecConfig) -> torch.Tensor:
        """Return the divisor of `loss` for a mean: the number of known labels."""
        return (labels != IGNORE_INDEX).sum()

    @abstractmethod
    def answer(self, logits: torch.Tensor, task: str, config: M6RecConfig) -> torch.Tensor:
        """Convert ... x K logits to ... answers, or ... x K."""

    def confidence(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the confidence of each answer: ... x K logits -> ... probabilities of the answer."""
        raise TypeError(f"answers of {type(self).__name__} are no probabilities")


class Classes(Form):
    """One class for each of the task's values: cross-entropy; the answer is the expected value (paper, scoring).

    Class weights apply to the labels, also in the mean.
    """

    def loss(self, logits: torch.Tensor, labels: torch.Tensor, task: str, config: M6RecConfig) -> torch.Tensor:
        """Sum the cross-entropies of B x N labels, which must be values of the task."""
        known = labels != IGNORE_INDEX
        classes, distance = self._classes(labels[known], task, config)
        if known.any() and distance.max() > 1e-4:
            _refuse_label(labels[known][distance.argmax()].item(), task, self._values(task, config))
        weights = _class_weights(task, config, logits.device)
        return functional.cross_entropy(
            logits[known].float(), classes, weight=weights, label_smoothing=config.label_smoothing, reduction="sum"
        )

    def weight(self, labels: torch.Tensor, task: str, config: M6RecConfig) -> torch.Tensor:
        """Sum the class weights of the known labels."""
        known, weights = labels != IGNORE_INDEX, _class_weights(task, config, labels.device)
        return known.sum() if weights is None else weights[self._classes(labels[known], task, config)[0]].sum()

    def answer(self, logits: torch.Tensor, task: str, config: M6RecConfig) -> torch.Tensor:
        """Return the expected value, which need not be one of the task's values: ... x K logits -> ..."""
        return logits.float().softmax(-1) @ torch.tensor(self._values(task, config), device=logits.device)

    def confidence(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the probability of the likeliest class: ... x K logits -> ..."""
        return logits.softmax(-1).amax(-1)

    def _classes(self, labels: torch.Tensor, task: str, config: M6RecConfig) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the nearest of the task's values to each of n labels, and its distance."""
        values = torch.tensor(self._values(task, config), device=labels.device)
        distance, classes = (labels.float()[:, None] - values).abs().min(1)
        return classes, distance

    @staticmethod
    def _values(task: str, config: M6RecConfig) -> list[float]:
        values = SCORING_TASKS[task].values
        assert values is not None, f"{task} has classes and no values"
        return values(config)


class Chance(Classes):
    """Two classes, no and yes: the answer is the probability of yes (paper, scoring)."""

    def answer(self, logits: torch.Tensor, task: str, config: M6RecConfig) -> torch.Tensor:
        """Return the probability of the second class: ... x 2 logits -> ..."""
        return logits.float().softmax(-1)[..., 1]


class Chances(Form):
    """An independent yes or no for each output: binary cross-entropy; the mean is over labels.

    A class weight multiplies the loss of an output's positives.
    """

    def loss(self, logits: torch.Tensor, labels: torch.Tensor, task: str, config: M6RecConfig) -> torch.Tensor:
        """Sum the binary cross-entropies of B x N x K labels 0 or 1."""
        known = labels != IGNORE_INDEX
        strange = labels[known][(labels[known] != 0) & (labels[known] != 1)]
        if len(strange):
            _refuse_label(strange[0].item(), task, [0, 1])
        weights = _class_weights(task, config, logits.device)
        positive = None if weights is None else weights.expand_as(logits)[known]
        smooth = labels[known].float() * (1 - config.label_smoothing) + config.label_smoothing / 2
        return functional.binary_cross_entropy_with_logits(
            logits[known].float(), smooth, pos_weight=positive, reduction="sum"
        )

    def answer(self, logits: torch.Tensor, task: str, config: M6RecConfig) -> torch.Tensor:
        """Return the probability of each output: ... x K."""
        return logits.float().sigmoid()

    def confidence(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the probability of the likelier of yes and no, of the least sure output: ... x K logits -> ..."""
        return logits.abs().sigmoid().amin(-1)


class Number(Form):
    """One numeric output: squared error. If the task has values, the output is relative to their middle."""

    is_probability = False

    def loss(self, logits: torch.Tensor, labels: torch.Tensor, task: str, config: M6RecConfig) -> torch.Tensor:
        """Sum the squared errors of B x N labels."""
        known = labels != IGNORE_INDEX
        return (self.answer(logits[known], task, config) - labels[known].float()).square().sum()

    def answer(self, logits: torch.Tensor, task: str, config: M6RecConfig) -> torch.Tensor:
        """Return the number: ... x 1 logits -> ..."""
        values = SCORING_TASKS[task].values
        ends = values(config) if values else [0.0]
        return logits[..., 0].float() + (ends[0] + ends[-1]) / 2


FORMS: dict[str, Form] = {"chance": Chance(), "classes": Classes(), "chances": Chances(), "number": Number()}
"""The forms of answers by their names in SCORING_TASKS."""


def form_of(task: str, config: M6RecConfig) -> Form:
    """Return the form of the answer to a scoring task."""
    return FORMS[SCORING_TASKS[task].form(config)]


def score_loss(
    task: str, logits: torch.Tensor, labels: torch.Tensor, config: M6RecConfig, weight: Weight = None
) -> torch.Tensor:
    """Compute the loss of a scoring task from B x N x K logits and B x N (x K) labels."""
    form = form_of(task, config)
    total = form.loss(logits, labels, task, config)
    return _mean(total, form.weight(labels, task, config) if weight is None else weight)


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
        labels: Task -> B x N (x K) labels.
        config: Assigns outputs to tasks.
        step_weights: Loss by name -> weight of the labels of the whole optimizer step.
    """
    found: dict[str, torch.Tensor] = {}
    layers = sorted({*(config.exit_layers or []), config.num_joint_layers})
    shares = [layer / sum(layers) for layer in layers] if len(exit_scores) == len(layers) else [1.0]
    for task, given in labels.items():
        if given.shape[:2] != exit_scores[-1].shape[:2]:
            raise ValueError(
                f"{label_field(task)} has shape {tuple(given.shape)}, but rows and most targets of a row are "
                f"{tuple(exit_scores[-1].shape[:2])}: pad with -100"
            )
        own = [scores[..., config.score_slices[task]] for scores in exit_scores]
        first, *others = (
            share * score_loss(task, logits, given, config, step_weights.get(task))
            for share, logits in zip(shares, own)
        )
        found[task] = sum(others, first)
    return found


def retrieval_loss(
    users: torch.Tensor,
    items: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
    log_frequency: torch.Tensor | None = None,
    weight: Weight = None,
    evidence: torch.Tensor | None = None,
) -> torch.Tensor:
    """InfoNCE over the given items (paper, retrieval: in-batch negatives, temperature 0.07).

    With the distinct items of the batch it is the in-batch loss, with drawn negatives a sampled softmax, with the whole
    catalogue the full softmax.

    Args:
        users: U x D, l2-normalised.
        items: M x D, l2-normalised.
        labels: U rows of `items`.
        temperature: Divides the cosines.
        log_frequency: M log probabilities that each item is among `items` (logQ correction); None = no correction.
        weight: Number of labels of the whole optimizer step.
        evidence: U x M, added to the cosines: what is known without the network; None = nothing (ours).
    """
    _check_rows(labels, items)
    if evidence is not None and evidence.shape != (len(users), len(items)):
        raise ValueError(
            f"evidence has shape {tuple(evidence.shape)}; expected one number for each of {len(users)} users and "
            f"{len(items)} items"
        )
    total = _ChunkedInfoNCE.apply(users, items, labels, temperature, log_frequency, evidence)
    return _mean(total, len(labels) if weight is None else weight)


def retrieval_losses(
    users: torch.Tensor,
    items: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
    log_frequency: torch.Tensor | None = None,
    evidence: torch.Tensor | None = None,
) -> torch.Tensor:
    """InfoNCE of each of the U users; `retrieval_loss` sums it without storing all U x M products."""
    _check_rows(labels, items)
    logits = (users / temperature @ items.T).float()  # U x M numbers are divided nowhere
    if evidence is not None:
        logits = logits + evidence / temperature
    if log_frequency is not None:
        logits = logits - log_frequency.float()
    return functional.cross_entropy(logits, labels, reduction="none")


class _ChunkedInfoNCE(torch.autograd.Function):
    """The sum of `retrieval_losses`, some users at a time; forward also computes gradients, while products exist.

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
        evidence: torch.Tensor | None,
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
            if evidence is not None:
                logits.add_(evidence[part], alpha=1 / temperature)
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
        return slope * of_users, slope * of_items, None, None, None, None


def _mean(total: torch.Tensor, weight: torch.Tensor | float) -> torch.Tensor:
    """Divide a sum by the weight of its terms; an empty sum has the mean zero."""
    return total / (weight + (weight == 0))


def _class_weights(task: str, config: M6RecConfig, device: torch.device) -> torch.Tensor | None:
    weights = (config.class_weights or {}).get(task)
    return None if weights is None else torch.tensor(weights, dtype=torch.float32, device=device)


def _check_rows(labels: torch.Tensor, items: torch.Tensor) -> None:
    if len(labels) and int(labels.max()) >= len(items):
        raise ValueError(f"retrieval_labels holds row {int(labels.max())}, but only {len(items)} items were given")


def _refuse_label(label: float, task: str, values: Sequence[float]) -> None:
    known, advice = ", ".join(f"{value:g}" for value in values), SCORING_TASKS[task].advice
    raise ValueError(
        f"{label_field(task)} holds {label:g}: use {known}, or {IGNORE_INDEX} where it is unknown"
        f"{f'; else {advice}' if advice else ''}"
    )


__all__ = [
    "FORMS",
    "Chance",
    "Chances",
    "Classes",
    "Form",
    "Number",
    "form_of",
    "given_labels",
    "label_weights",
    "loss_names",
    "retrieval_loss",
    "retrieval_losses",
    "score_loss",
    "score_losses",
    "text_loss",
    "text_targets",
]
