"""The model as a graph of `torch.export` or ONNX: scores of candidates, vectors of users and vectors of items.

One graph accepts any number of rows and tokens; it runs the plan "flat".

Shapes: B rows, T tokens of a row, N targets of a row, I interactions, M items of up to L tokens, D = vector_width.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from .item_features_m6rec import ITEM_FEATURES, LoneItems, reads_item_rows
from .layers_m6rec import inference_mode
from .layout_m6rec import item_layout
from .modeling_m6rec import M6RecForRecommendation, item_vectors
from .network_m6rec import read_standalone

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
        places = (~vectors[..., :1].isnan()).sum(1, keepdim=True)
        return vectors.gather(1, (places - 1).clamp_min(0).expand(-1, -1, vectors.shape[-1]))[:, 0]


class ItemPart(nn.Module):
    """Makes the vectors of standalone items, as `M6RecForRecommendation.embed_items` does."""

    def __init__(self, model: M6RecForRecommendation) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, memory_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return M x D vectors of M x L ids ([ITEM] ... [SEG], padded right)."""
        model, valid = self.model, attention_mask.bool()
        lay = item_layout(input_ids, valid)
        states = model.model.add_to_rows(read_standalone(model.model, input_ids, lay), input_ids, lay)
        last = (valid.sum(1) - 1).clamp_min(0)[:, None, None]
        texts = states.gather(1, last.expand(-1, -1, states.shape[-1]))[:, 0]
        return item_vectors(model, LoneItems(texts, memory_ids, input_ids, lay))


PARTS = {"score": ScorePart, "user": UserPart, "item": ItemPart}
OUTPUTS = {"score": "scores", "user": "user_vectors", "item": "item_vectors"}
"""Name of the output of each part's ONNX file."""


def export_program(
    model: M6RecForRecommendation, part: str = "score", task: str = "click", strict: bool = False
) -> "ExportedProgram":
    """Export a part of a model with `torch.export`, for any number of rows and tokens.

    Inputs are `input_ids` and `attention_mask`. A model with item embeddings also takes their rows:
    `item_embedding_ids` for "score" and "user" (B x T), `memory_ids` for "item" (M), 0 = none.

    Args:
        model: The model; a PEFT model is merged first, by its `merge_and_unload`.
        part: "score" gives B x N scores, "user" B x D and "item" M x D vectors.
        task: Which score: "click", "rating" or "interaction".
        strict: As in `torch.export.export`.

    Raises:
        ValueError: If the model, the part or the task cannot be exported; the message gives the reason.
    """
    _refuse(model, part, task)
    module = ScorePart(model, task) if part == "score" else PARTS[part](model)
    example = _example(model, part)
    shapes = {name: dict.fromkeys(range(value.dim()), torch.export.Dim.DYNAMIC) for name, value in example.items()}
    with inference_mode(model):
        return torch.export.export(module.eval(), (), example, dynamic_shapes=shapes, strict=strict)


def to_onnx(model: M6RecForRecommendation, path: str | Path, part: str = "score", task: str = "click") -> Path:
    """Write a part of a model as ONNX; inputs as in `export_program`, the output is named after the part.

    It needs `pip install 'm6rec[onnx]'`. Weights above a gigabyte are written into a second file, `path`.data.

    Args:
        model: The model, on the CPU.
        path: The file to write.
        part: "score", "user" or "item".
        task: Which score.

    Returns:
        The path.
    """
    program = export_program(model, part, task)
    size = sum(weight.nbytes for weight in model.state_dict().values())
    inputs, outputs = list(_example(model, part)), [OUTPUTS[part]]
    made = torch.onnx.export(program, dynamo=True, verbose=False, input_names=inputs, output_names=outputs)
    assert made is not None  # it is None only with dynamo=False
    made.save(str(path), external_data=size > ONE_FILE)
    return Path(path)


def _refuse(model: M6RecForRecommendation, part: str, task: str) -> None:
    if not isinstance(model, M6RecForRecommendation):
        raise ValueError(
            f"{type(model).__name__} cannot be exported: give an M6RecForRecommendation, such as merge_and_unload() of "
            "a PEFT model returns (prefix and prompt tuning cannot be merged)"
        )
    if part not in PARTS:
        raise ValueError(f"part={part!r} is unknown: choose one of {list(PARTS)}")
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
    row = item if part == "item" else source + [config.bos_token_id, *item, config.eos_token_id] * 2
    ids = torch.tensor([row] * 2, device=model.device)
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if reads_item_rows(config) and part == "item":
        found["memory_ids"] = torch.zeros_like(ids[:, 0])
    elif reads_item_rows(config):
        found["item_embedding_ids"] = torch.zeros_like(ids)
    return found


__all__ = ["ItemPart", "ScorePart", "UserPart", "export_program", "to_onnx"]
