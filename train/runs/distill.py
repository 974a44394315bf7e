"""Distillation: a smaller model, the student, learns to answer as a trained model, the teacher.

m6rec distill student.yaml distillation.teacher=runs/films

The student reads rows with the teacher's processor. Besides the recipe's own losses it learns the teacher's behaviour:
which item of a batch fits each place of a user (`vectors`), the score logits of each target (`scores`), and how tokens
of texts relate in the segment layers (`relations`: MiniLMv2, Wang et al. 2021). It learns vectors and scores at every
exit layer, so that it can stop early.

Shapes: B rows, T tokens of a row, E places of users, M items of a row, N targets, S score outputs, H = hidden_size,
M segments of up to L tokens, R relation heads.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from ...configuration_m6rec import M6RecConfig
from ...layers_m6rec import inference_mode
from ...layout_m6rec import item_layout
from ...modeling_m6rec import M6RecForRecommendation
from ...network_m6rec import M6RecModel, read_standalone
from ...tuning import load_model
from ..config.recipe import Recipe
from .build import Run
from .trainer import M6RecTrainer

RELATION_HEADS = 4
"""Number of parts into which queries, keys and values are cut for their relations, in teacher and student alike."""

TEMPERATURE = 0.07
"""Temperature of the softmax over the items of a batch."""

ITEMS_READ = 64
"""Number of items of a batch whose texts are compared token by token."""

INPUTS = ("input_ids", "attention_mask", "item_embedding_ids")


def imitated(student: torch.Tensor, teacher: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Return the mean Kullback-Leibler divergence of the student's softmax from the teacher's over known rows.

    Args:
        student: ... x C logits of the student.
        teacher: ... x C logits of the teacher.
        known: ... bool.
    """
    divergence = functional.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True)
    return (divergence.sum(-1) * known).sum() / known.sum().clamp_min(1)


def vector_loss(student: Any, teacher: Any) -> torch.Tensor:
    """Compare which items of the batch fit each place of a user; outputs of `forward` with vectors."""
    known = ~(student.user_vectors.isnan().any(-1) | teacher.user_vectors.isnan().any(-1))
    items = ~(student.item_vectors.isnan().any(-1) | teacher.item_vectors.isnan().any(-1))
    student_fit, teacher_fit = (
        (out.user_vectors.nan_to_num().flatten(0, 1) @ out.item_vectors[items].T) / TEMPERATURE
        for out in (student, teacher)
    )
    return imitated(student_fit, teacher_fit, known.flatten())


def score_loss(student: Any, teacher: Any) -> torch.Tensor:
    """Compare the score logits of each target by their mean squared difference; 0 if there is no target."""
    difference = (student.scores - teacher.scores) ** 2
    known = ~difference.isnan()
    return (difference.nan_to_num() * known).sum() / known.sum().clamp_min(1)


@contextmanager
def projections_of(network: M6RecModel) -> Iterator[list[torch.Tensor]]:
    """Collect the queries, keys and values of the last segment layer in each run of the network."""
    attention = network.layer(network.config.num_segment_layers - 1).self_attn
    runs: list[list[torch.Tensor]] = [[], [], []]
    parts = (attention.q_proj, attention.k_proj, attention.v_proj)
    hooks = [
        part.register_forward_hook(lambda _module, _given, out, own=own: own.append(out))
        for part, own in zip(parts, runs)
    ]
    found: list[torch.Tensor] = []
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
        found += [own[-1] for own in runs]  # of layers that share weights, the last


def relations(states: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Return the scaled products of M x L x W states with themselves, the smallest number at padding: M x R x L x L."""
    parts = states.unflatten(-1, (RELATION_HEADS, -1)).transpose(1, 2)
    products = parts @ parts.transpose(-1, -2) / parts.shape[-1] ** 0.5
    return products.masked_fill(~valid[:, None, None], torch.finfo(products.dtype).min)


def relation_loss(
    student: M6RecForRecommendation, teacher: M6RecForRecommendation, ids: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Compare relations of queries, keys and values in the last segment layer, on M x L texts of items."""
    lay = item_layout(ids, mask.bool())
    with projections_of(student.model) as own:
        read_standalone(student.model, ids, lay)
    with torch.no_grad(), projections_of(teacher.model) as wanted:
        read_standalone(teacher.model, ids, lay)
    known = lay.valid[:, None].expand(-1, RELATION_HEADS, -1)
    total = [imitated(relations(one, lay.valid), relations(other, lay.valid), known) for one, other in zip(own, wanted)]
    return torch.stack(total).mean()


class DistillationTrainer(M6RecTrainer):
    """Adds the differences between student and teacher to the student's loss.

    Args:
        run: The run of the student.
        teacher: The teacher; it is not trained.
        **kwargs: As in `M6RecTrainer`.
    """

    def __init__(self, run: Run, teacher: M6RecForRecommendation, **kwargs: Any) -> None:
        super().__init__(run, **kwargs)
        self.teacher, self.weights = teacher.eval().requires_grad_(False), run.recipe.distillation

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the loss of a micro-batch: the recipe's losses, and the differences from the teacher."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        steps = max(self.args.gradient_accumulation_steps, 1)
        loss = self.weights.labels * loss + self.differences(model, inputs) / steps
        return (loss, outputs) if return_outputs else loss

    def differences(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """Return the weighted sum of the differences on a batch, at all exits."""
        self.teacher.to(self.args.device)
        batch = {name: inputs[name] for name in INPUTS if name in inputs}
        config, weights = model.config, self.weights
        with inference_mode(self.teacher):
            wanted = self.teacher(**batch, return_logits=False)
        scored = weights.scores and wanted.scores.shape == (*wanted.scores.shape[:2], config.num_labels)
        last: int = config.num_joint_layers
        exits: Sequence[int] = sorted({*(config.exit_layers or []), last})
        total = torch.zeros((), device=self.args.device)
        for exit_layer in exits if weights.vectors or scored else ():
            own = model(**batch, return_logits=False, exit_layer=exit_layer)
            total = total + weights.vectors * vector_loss(own, wanted) / len(exits)
            if scored:
                total = total + weights.scores * score_loss(own, wanted) / len(exits)
        if weights.relations:
            total = total + weights.relations * relation_loss(model, self.teacher, *self._texts(batch["input_ids"]))
        return total

    def _texts(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw the ids of some items of the catalogue, and their mask; the same for a seed and a step."""
        texts = self.run.catalogue.input_ids
        draw = torch.Generator().manual_seed(self.state.global_step)
        chosen = torch.randperm(len(texts), generator=draw)[:ITEMS_READ].tolist()
        padded = self.run.processor.pad([{"input_ids": texts[row]} for row in chosen])
        return padded["input_ids"].to(ids.device), padded["attention_mask"].to(ids.device)


def distiller(run: Run) -> Callable[..., M6RecTrainer]:
    """Return what makes the Trainer of a run: one that compares with the recipe's teacher, if it names one."""
    recipe = run.recipe
    if not recipe.distillation.teacher:
        return M6RecTrainer
    teacher = load_model(recipe.distillation.teacher, dtype="float32")
    check_pair(run.base_model.config, teacher.config, recipe)
    return partial(DistillationTrainer, teacher=teacher)


def check_pair(own: M6RecConfig, other: M6RecConfig, recipe: Recipe) -> None:
    """Raise if a student and its teacher cannot be compared; the message names the setting to change.

    Args:
        own: Configuration of the student.
        other: Configuration of the teacher.
        recipe: The recipe of the student.
    """
    weights = recipe.distillation
    if recipe.model.backbone or recipe.tuning.method != "full":
        raise ValueError(
            "distillation trains a whole model with the teacher's tokenizer: leave model.backbone and tuning.method out"
        )
    if recipe.model.freeze_segments and weights.relations:
        raise ValueError(
            "distillation.relations trains the segment layers: set it to 0, or model.freeze_segments=false"
        )
    if own.num_item_embeddings != other.num_item_embeddings:
        raise ValueError(
            f"the teacher has {other.num_item_embeddings} item embeddings, the student {own.num_item_embeddings}: set "
            f"model.item_embeddings={str(bool(other.num_item_embeddings)).lower()}"
        )
    if own.num_segment_layers == 0 or other.num_segment_layers == 0:
        raise ValueError("distillation compares vectors: teacher and student need segment layers (num_joint_layers)")
    widths = {each.num_attention_heads * each.head_dim for each in (own, other)}
    widths |= {each.num_key_value_heads * each.head_dim for each in (own, other)}
    if weights.relations and any(width % RELATION_HEADS for width in widths):
        raise ValueError(
            f"distillation.relations cuts queries, keys and values into {RELATION_HEADS} parts: widths "
            f"{sorted(widths)} must be multiples of it, or set distillation.relations=0"
        )
    if weights.scores and own.score_names != other.score_names:
        raise ValueError(
            f"the teacher scores {other.score_names}, the student {own.score_names}: set the same score_tasks, or "
            "distillation.scores=0"
        )


__all__ = [
    "DistillationTrainer",
    "check_pair",
    "distiller",
    "imitated",
    "relation_loss",
    "score_loss",
    "vector_loss",
]
