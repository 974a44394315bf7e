"""The model as a graph of `torch.export` or ONNX: scores of candidates, vectors of users and vectors of items.

One graph accepts any number of rows and tokens. "score", "user" and "item" are whole and run the plan "flat". "reader"
and "joint" are the two stages of the network, so that the states of a text are computed once and kept: with them a
device answers as the plan "cached" does (`m6rec.edge`).

Shapes: B rows, T tokens of a row, K kept tokens of a row, N targets of a row, I interactions, M items or segments of up
to L tokens, H = hidden_size, D = vector_width.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from .item_features_m6rec import ITEM_FEATURES, LoneItems, reads_item_rows
from .layers_m6rec import inference_mode
from .layout_m6rec import KeptTokens, Layout, Picked, attention_bias, item_layout, joint_mask, layout, summary_keys
from .modeling_m6rec import Given, M6RecForRecommendation, item_vectors, row_vectors
from .network_m6rec import M6RecModelOutput, read_standalone

if TYPE_CHECKING:
    from torch.export import ExportedProgram

ONE_FILE = 1 << 30
"""Most bytes of weights in a single ONNX file; larger models store their weights in a second file."""


class ScorePart(nn.Module):
    """Scores every candidate of every row, as `M6RecForRecommendation.score` does.

    Args:
        model: The model.
        task: Which score.
    """

    def __init__(self, model: M6RecForRecommendation, task: str) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, item_embedding_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return B x N scores (B x N x I interactions) of B x T tokens; NaN where a row has fewer targets."""
        return self.model.score(
            self.task,
            input_ids=input_ids,
            attention_mask=attention_mask,
            item_embedding_ids=item_embedding_ids,
            plan="flat",
        )


class UserPart(nn.Module):
    """Makes each row's user vector after all its events."""

    def __init__(self, model: M6RecForRecommendation) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, item_embedding_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return B x D vectors of B x T tokens."""
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "item_embedding_ids": item_embedding_ids}
        vectors = self.model.embed(**batch, plan="flat").user_vectors
        assert vectors is not None  # `embed` makes them of whole rows
        return _last_place(vectors)


class ItemPart(nn.Module):
    """Makes the vectors of standalone items, as `M6RecForRecommendation.embed_items` does."""

    def __init__(self, model: M6RecForRecommendation) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, memory_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return M x D vectors of M x L ids ([ITEM] ... [SEG], padded right)."""
        model, lay = self.model, item_layout(input_ids, attention_mask.bool())
        states = model.model.add_to_rows(read_standalone(model.model, input_ids, lay), input_ids, lay)
        return item_vectors(model, LoneItems(_last_token(states, lay), memory_ids, input_ids, lay))


class ReaderPart(nn.Module):
    """Reads segments with the segment layers, one a row; of items it also makes vectors, without item embeddings."""

    def __init__(self, model: M6RecForRecommendation) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return states of M x L ids, M x L x H, with the features of items' texts, and M x D vectors.

        A vector has a meaning only for an item, [ITEM] ... [SEG].
        """
        model, config = self.model, self.model.config
        lay = item_layout(input_ids, attention_mask.bool())
        # As in `M6RecModel.add_to_bank`: a segment is an item if [ITEM] opens it; a closed one ends with [SEG].
        is_item = input_ids[:, :1] == config.kind_token_ids["item"]
        lay = lay._replace(kind=lay.kind * is_item)
        states = model.model.add_to_rows(read_standalone(model.model, input_ids, lay), input_ids, lay)
        return states, item_vectors(model, LoneItems(_last_token(states, lay), None, input_ids, lay))


class JointPart(nn.Module):
    """Runs the joint layers and the heads on kept tokens of rows, from the states that a ReaderPart made.

    Args:
        model: The model.
        exit_layer: Number of joint layers to run; None = all.
    """

    def __init__(self, model: M6RecForRecommendation, exit_layer: int | None = None) -> None:
        super().__init__()
        self.model = model
        self.exit_layer = model.config.num_joint_layers if exit_layer is None else exit_layer

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        hidden_events: torch.Tensor,
        kept: torch.Tensor,
        states: torch.Tensor,
        item_embedding_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Return B x D user vectors, and for each scoring task B x N scores (B x N x I interactions).

        Args:
            input_ids: B x T ids of whole rows.
            attention_mask: B x T, nonzero = not padding.
            hidden_events: B x T bool, tokens that no other token attends to.
            kept: B x K places of the kept tokens, -1 = none; at least those that `summary_keys` keeps.
            states: B x K x H states of these tokens.
            item_embedding_ids: B x T rows of item embeddings.
        """
        model, config = self.model, self.model.config
        lay = layout(input_ids, attention_mask, config)
        keys = summary_keys(lay, input_ids == config.segment_token_id, config)
        picked = Picked(kept.clamp_min(0), kept >= 0)
        here = lay.take(*picked)
        rows = None if item_embedding_ids is None else picked.of(item_embedding_ids) * picked.present
        read = self._read(model.model.enter(states, here, rows), here, picked.of(keys & ~hidden_events))
        out = M6RecModelOutput(
            last_hidden_state=read, segment_states=states, layout=here, row_layout=lay, kept=picked, exit_states=(read,)
        )
        chosen = KeptTokens(input_ids.shape[1], here, picked)
        given = Given(input_ids, attention_mask, item_embedding_ids, hidden_events)
        users, _ = row_vectors(model, out, given, chosen)
        assert users is not None  # the model has segment layers
        logits = self._logits(read, chosen.of(input_ids, config.pad_token_id), here)
        return _last_place(users), *(model.read_scores(logits, task)[:, :-1] for task in config.scored)

    def _logits(self, states: torch.Tensor, ids: torch.Tensor, here: Layout) -> torch.Tensor:
        """Return B x (N + 1) logits; the last target is made up, since a runtime may refuse an empty matrix."""
        more = functional.pad(ids, (0, 1), value=self.model.config.eos_token_id)
        target = torch.cat((here.target, here.target.max().expand(ids.shape[0], 1) + 1), 1)
        lay = Layout(*(functional.pad(field, (0, 1)) for field in here))._replace(target=target)
        return self.model.score_logits(functional.pad(states, (0, 0, 0, 1)), more, lay)

    def _read(self, entered: torch.Tensor, here: Layout, seen: torch.Tensor) -> torch.Tensor:
        network, size = self.model.model, entered.shape[1]
        bias = attention_bias(joint_mask(here, size, self.model.config, seen), size, size, entered.dtype)
        return network.norm(network.joint_stage(entered, network.joint_positions(here), bias, [self.exit_layer])[-1])


def _last_token(states: torch.Tensor, lay: Layout) -> torch.Tensor:
    """Pick the state of the last token of each segment: M x L x H -> M x H."""
    last = (lay.valid.sum(1) - 1).clamp_min(0)[:, None, None]
    return states.gather(1, last.expand(-1, -1, states.shape[-1]))[:, 0]


def _last_place(vectors: torch.Tensor) -> torch.Tensor:
    """Pick the last vector of each row: B x E x D, NaN at absent and hidden places -> B x D."""
    present = ~vectors[..., :1].isnan()
    last = (present * torch.arange(vectors.shape[1], device=vectors.device)[:, None]).amax(1, keepdim=True)
    return vectors.gather(1, last.expand(-1, -1, vectors.shape[-1]))[:, 0]


PARTS = {"score": ScorePart, "user": UserPart, "item": ItemPart, "reader": ReaderPart, "joint": JointPart}


def output_names(model: M6RecForRecommendation, part: str) -> list[str]:
    """Return the names of the outputs of a part's ONNX file."""
    whole = {"score": ["scores"], "user": ["user_vectors"], "item": ["item_vectors"]}
    stages = {"reader": ["states", "item_vectors"], "joint": ["user_vectors", *model.config.scored]}
    return {**whole, **stages}[part]


def export_program(
    model: M6RecForRecommendation,
    part: str = "score",
    task: str = "click",
    strict: bool = False,
    exit_layer: int | None = None,
) -> "ExportedProgram":
    """Export a part of a model with `torch.export`, for any number of rows and tokens.

    Inputs are `input_ids` and `attention_mask`. A model with item embeddings also takes their rows:
    `item_embedding_ids` for "score", "user" and "joint" (B x T), `memory_ids` for "item" (M), 0 = none. "joint" also
    takes `hidden_events`, `kept` and `states`, see `JointPart`.

    Args:
        model: The model; a PEFT model is merged first, by its `merge_and_unload`.
        part: "score" gives B x N scores, "user" B x D and "item" M x D vectors, "reader" states of M segments and
            their vectors, "joint" B x D vectors of users and B x N scores of each task.
        task: Which score, for "score": "click", "rating" or "interaction".
        strict: As in `torch.export.export`.
        exit_layer: Number of joint layers of "joint"; None = all.

    Raises:
        ValueError: If the model, the part or the task cannot be exported; the message gives the reason.
    """
    _refuse(model, part, task, exit_layer)
    further = {"score": (task,), "joint": (exit_layer,)}.get(part, ())
    module = PARTS[part](model, *further)
    example = _example(model, part)
    # Rows and tokens vary; the last dimension of states is the model's width.
    shapes = {
        name: dict.fromkeys(range(min(value.dim(), 2)), torch.export.Dim.DYNAMIC) for name, value in example.items()
    }
    with inference_mode(model):
        return torch.export.export(module.eval(), (), example, dynamic_shapes=shapes, strict=strict)


def to_onnx(
    model: M6RecForRecommendation,
    path: str | Path,
    part: str = "score",
    task: str = "click",
    exit_layer: int | None = None,
) -> Path:
    """Write a part of a model as ONNX; inputs as in `export_program`, outputs as in `output_names`.

    It needs `pip install 'm6rec[onnx]'`. Weights above a gigabyte are written into a second file, `path`.data.

    Args:
        model: The model, on the CPU.
        path: The file to write.
        part: "score", "user", "item", "reader" or "joint".
        task: Which score, for "score".
        exit_layer: Number of joint layers of "joint"; None = all.

    Returns:
        The path.
    """
    program = export_program(model, part, task, exit_layer=exit_layer)
    size = sum(weight.nbytes for weight in model.state_dict().values())
    inputs, outputs = list(_example(model, part)), output_names(model, part)
    made = torch.onnx.export(program, dynamo=True, verbose=False, input_names=inputs, output_names=outputs)
    assert made is not None  # it is None only with dynamo=False
    made.save(str(path), external_data=size > ONE_FILE)
    return Path(path)


def _refuse(model: M6RecForRecommendation, part: str, task: str, exit_layer: int | None) -> None:
    if not isinstance(model, M6RecForRecommendation):
        raise ValueError(
            f"{type(model).__name__} cannot be exported: give an M6RecForRecommendation, such as merge_and_unload() of "
            "a PEFT model returns (prefix and prompt tuning cannot be merged)"
        )
    if part not in PARTS:
        raise ValueError(f"part={part!r} is unknown: choose one of {list(PARTS)}")
    joint = model.config.num_joint_layers
    if exit_layer is not None and not (part == "joint" and 0 < exit_layer <= joint):
        raise ValueError(f"exit_layer={exit_layer} of part={part!r}: give part='joint' a number from 1 to {joint}")
    if part == "score" and task not in model.config.score_slices:
        raise ValueError(f"task={task!r} has no score: choose one of {list(model.config.score_slices)}")
    if part != "score" and not model.config.num_segment_layers:
        raise ValueError(f"part={part!r} needs segment layers: set num_joint_layers below num_hidden_layers")
    if part != "score":
        for feature in ITEM_FEATURES:
            feature.refuse_unfitted(model.model)


def _example(model: M6RecForRecommendation, part: str) -> dict[str, torch.Tensor]:
    """Make two rows for tracing the graph; only their shapes matter."""
    config = model.config
    kinds, close = config.kind_token_ids, config.segment_token_id
    word = next(number for number in range(config.vocab_size) if number not in config.structural_token_ids)
    item = [kinds["item"], word, word, close]
    source = [config.source_token_id, kinds["event"], word, close, *item, config.source_end_token_id]
    alone = part in ("item", "reader")
    row = item if alone else source + [config.bos_token_id, *item, config.eos_token_id] * 2
    ids = torch.tensor([row] * 2, device=model.device)
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if part == "reader":
        return found
    if part == "joint":
        kept = torch.arange(len(row) - 3, device=model.device).expand(2, -1)
        found |= {"hidden_events": torch.zeros_like(ids, dtype=torch.bool), "kept": kept.contiguous()}
        found["states"] = torch.zeros(*kept.shape, config.hidden_size, dtype=model.dtype, device=model.device)
    if reads_item_rows(config) and part == "item":
        found["memory_ids"] = torch.zeros_like(ids[:, 0])
    elif reads_item_rows(config):
        found["item_embedding_ids"] = torch.zeros_like(ids)
    return found


__all__ = [
    "ItemPart",
    "JointPart",
    "ReaderPart",
    "ScorePart",
    "UserPart",
    "export_program",
    "output_names",
    "to_onnx",
]
