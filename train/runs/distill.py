"""Distillation: a smaller model, the student, learns to answer as a trained model, the teacher.

m6rec distill student.yaml distillation.teacher=runs/films

The student reads rows with the teacher's processor. Besides the recipe's own losses it learns the teacher's behaviour:
which of the items that the retrieval loss compares, such as the whole catalogue, fits each place of a user (`vectors`),
the score logits of each target (`scores`), and how tokens of texts relate in the segment layers (`relations`: MiniLMv2,
Wang et al. 2021). It learns vectors and scores at every exit layer, so that it can stop early. The teacher reads each
text once: its segment states are kept.

Shapes: B rows, T tokens of a row, U labelled places of users, M items of the retrieval loss, N targets, S score
outputs, D = embedding_dim, H = hidden_size, M segments of up to L tokens, R relation heads.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from ...configuration_m6rec import M6RecConfig
from ...layers_m6rec import inference_mode
from ...layout_m6rec import item_layout
from ...losses_m6rec import PRODUCTS_AT_ONCE, PRODUCTS_AT_ONCE_ELSEWHERE, retrieval_loss
from ...modeling_m6rec import M6RecForRecommendation
from ...network_m6rec import M6RecModel, read_standalone
from ...segment_cache_m6rec import SegmentCache
from ...tuning import load_model
from ..config.recipe import Recipe
from .build import Run
from .trainer import M6RecTrainer

RELATION_HEADS = 4
"""Number of parts into which queries, keys and values are cut for their relations, in teacher and student alike."""

TEMPERATURE = 0.07
"""Temperature of the softmax over the items of the retrieval loss."""

ITEMS_READ = 64
"""Number of items of a batch whose texts are compared token by token."""

INPUTS = ("input_ids", "attention_mask", "item_embedding_ids")
"""Arguments of `forward` that teacher and student share."""

CONTRASTED = ("retrieval_labels", "item_input_ids", "item_attention_mask", "candidate_embedding_ids")
"""Arguments of `forward` that name the places of users and the items of the retrieval loss."""


class Fit(NamedTuple):
    """Vectors whose products say which items fit which places of users."""

    users: torch.Tensor
    """U x D."""
    items: torch.Tensor
    """M x D."""


class Watch:
    """A retrieval loss that keeps the vectors which it compares.

    Args:
        loss: Computes the loss.
    """

    def __init__(self, loss: Callable[..., torch.Tensor] = retrieval_loss) -> None:
        self.loss = loss
        self.seen: Fit | None = None

    def __call__(self, users: torch.Tensor, items: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Keep U x D and M x D vectors, and return the loss."""
        self.seen = Fit(users, items)
        return self.loss(users, items, *args, **kwargs)


def imitated(student: torch.Tensor, teacher: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Return the mean Kullback-Leibler divergence of the student's softmax from the teacher's over known rows.

    Args:
        student: ... x C logits of the student.
        teacher: ... x C logits of the teacher.
        known: ... bool.
    """
    divergence = functional.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True)
    return (divergence.sum(-1) * known).sum() / known.sum().clamp_min(1)


def vector_loss(student: Fit, teacher: Fit) -> torch.Tensor:
    """Compare which items fit each place of a user: `imitated` of all places, without storing all U x M products."""
    total: torch.Tensor = _ChunkedDivergence.apply(*student, *teacher)
    return total / max(len(student.users), 1)


class _ChunkedDivergence(torch.autograd.Function):
    """The sum of divergences over places, some places at a time; forward also computes gradients."""

    @staticmethod
    def forward(
        ctx: Any, users: torch.Tensor, items: torch.Tensor, other_users: torch.Tensor, other_items: torch.Tensor
    ) -> torch.Tensor:
        scaled, wanted = (own.detach().float() / TEMPERATURE for own in (users, other_users))
        own_items, wanted_items = (own.detach().float() for own in (items, other_items))
        total = torch.zeros((), device=users.device)
        of_users, of_items = torch.empty_like(scaled), torch.zeros_like(own_items)
        rows = max(PRODUCTS_AT_ONCE.get(users.device.type, PRODUCTS_AT_ONCE_ELSEWHERE) // max(len(items), 1), 1)
        for start in range(0, len(users), rows):
            part = slice(start, start + rows)
            own, teacher = (scaled[part] @ own_items.T).log_softmax(1), (wanted[part] @ wanted_items.T).log_softmax(1)
            chances = teacher.exp()
            total += (chances * teacher.sub_(own)).sum()
            slope = own.exp_().sub_(chances)
            of_users[part] = slope @ own_items / TEMPERATURE
            of_items += slope.T @ scaled[part]
        ctx.save_for_backward(of_users.to(users.dtype), of_items.to(items.dtype))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        of_users, of_items = ctx.saved_tensors
        return slope * of_users, slope * of_items, None, None


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
        self._known, self._watch = SegmentCache(), Watch()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the loss of a micro-batch: the recipe's losses, and the differences from the teacher."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        steps = max(self.args.gradient_accumulation_steps, 1)
        loss = self.weights.labels * loss + self.differences(model, inputs, self._watch.seen) / steps
        return (loss, outputs) if return_outputs else loss

    def _how(self, weights: dict[str, float] | None) -> dict[str, Any]:
        how = super()._how(weights)
        self._watch = Watch(how.get("contrast", retrieval_loss))
        return {**how, "contrast": self._watch}

    def differences(self, model: Any, inputs: dict[str, Any], own: Fit | None = None) -> torch.Tensor:
        """Return the weighted sum of the differences on a batch, at all exits.

        Args:
            model: The student.
            inputs: The batch.
            own: The student's vectors after all layers, if they have been computed for this batch.
        """
        config, weights = model.config, self.weights
        total = torch.zeros((), device=self.args.device)
        if weights.vectors and "retrieval_labels" in inputs:
            total = total + weights.vectors * self._of_vectors(model, inputs, own)
        if weights.scores and (inputs["input_ids"] == config.bos_token_id).any():
            total = total + weights.scores * self._of_scores(model, inputs)
        if weights.relations:
            texts = self._texts(inputs["input_ids"])
            total = total + weights.relations * relation_loss(model, self.teacher.to(self.args.device), *texts)
        return total

    def _exits(self, config: M6RecConfig) -> Sequence[int]:
        return sorted({*(config.exit_layers or []), config.num_joint_layers})

    def _of_vectors(self, model: Any, inputs: dict[str, Any], own: Fit | None) -> torch.Tensor:
        """Return the mean over the exits of the differences of which items fit."""
        batch = {name: inputs[name] for name in (*INPUTS, *CONTRASTED) if name in inputs}
        frozen = "candidate_embedding_ids" in inputs and "item_input_ids" not in inputs
        whole = batch | (self._catalogue() if frozen else {})
        with inference_mode(self.teacher):
            wanted = _fit(self.teacher.to(self.args.device), {**whole, "plan": "cached", "segment_cache": self._known})
        found = []
        for exit_layer in self._exits(model.config):
            last = own is not None and exit_layer == model.config.num_joint_layers
            more = self._frozen_catalogue() if frozen else {}
            cached = {name: how for name, how in super()._how(None).items() if name in ("plan", "segment_cache")}
            student = own if last else _fit(model, {**batch, **more, **cached, "exit_layer": exit_layer})
            assert student is not None
            found.append(vector_loss(student, wanted))
        return torch.stack(found).mean()

    def _of_scores(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """Return the mean over the exits of the differences of score logits."""
        batch = {name: inputs[name] for name in INPUTS if name in inputs}
        more = {"return_logits": False, "return_vectors": False}
        cached = {"plan": "cached", "segment_cache": self._known}
        with inference_mode(self.teacher):
            wanted = self.teacher.to(self.args.device)(**batch, **more, **cached)
        own = [model(**batch, **more, exit_layer=exit_layer) for exit_layer in self._exits(model.config)]
        return torch.stack([score_loss(student, wanted) for student in own]).mean()

    def _catalogue(self) -> dict[str, torch.Tensor]:
        """Return the ids of the catalogue's texts and their mask, in the order of the retrieval loss."""
        run, device = self.run, self.args.device
        padded = run.processor.pad([{"input_ids": run.catalogue.input_ids[row]} for row in run.collator.distinct])
        return {
            "item_input_ids": padded["input_ids"].to(device),
            "item_attention_mask": padded["attention_mask"].to(device),
        }

    def _texts(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw the ids of some items of the catalogue, and their mask; the same for a seed and a step."""
        texts = self.run.catalogue.input_ids
        draw = torch.Generator().manual_seed(self.state.global_step)
        chosen = torch.randperm(len(texts), generator=draw)[:ITEMS_READ].tolist()
        padded = self.run.processor.pad([{"input_ids": texts[row]} for row in chosen])
        return padded["input_ids"].to(ids.device), padded["attention_mask"].to(ids.device)


def _fit(model: Any, inputs: dict[str, Any]) -> Fit:
    """Run a model for the vectors that its retrieval loss compares, without computing the loss."""
    watch = Watch(lambda users, *_, **__: users.new_zeros(()))
    model(**inputs, only_losses=True, contrast=watch)
    assert watch.seen is not None, "the batch has labels of retrieval"
    return watch.seen


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
    "Fit",
    "Watch",
    "check_pair",
    "distiller",
    "imitated",
    "relation_loss",
    "score_loss",
    "vector_loss",
]
