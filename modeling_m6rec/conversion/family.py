"""Description of a family of language models, and parts that several families share."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

Weights = dict[str, torch.Tensor]


class Family(NamedTuple):
    """Description of a family for reading its checkpoints."""

    base: str
    """Name of the class without head in transformers."""
    head: str
    """Name of the class with a writing head."""
    fields: Callable[[Any], dict[str, Any]]
    """Its configuration -> fields of M6RecConfig; raises ValueError for properties that an M6Rec block cannot have."""
    names: Mapping[str, str]
    """Pattern of a module's name, without the prefix of the body -> M6Rec's name."""
    causal: bool = True
    """Whether its attention is causal."""
    unread: str = r"(?!)"
    """Pattern of the weights that M6Rec does not use."""
    untangle: Callable[[Weights], Weights] = dict
    """Converts weights to the form of plain linear layers, before they are renamed."""


DECODER_NAMES = {
    r"embed_tokens": r"model.embeddings.tokens",
    r"layers\.(\d+)\.input_layernorm": r"model.layers.\1.attention_norm",
    r"layers\.(\d+)\.post_attention_layernorm": r"model.layers.\1.mlp_norm",
    r"layers\.(\d+)\.(self_attn\.[qkvo]_proj|self_attn\.[qk]_norm|mlp\.(?:gate|up|down)_proj)": r"model.layers.\1.\2",
    r"norm": r"model.norm",
    r"lm_head": r"lm_head",
}
"""Names of modules in Llama, Qwen2 and Qwen3."""


def refuse(problems: Mapping[str, Any]) -> None:
    """Raise an error if any problem (description -> whether it is present) is present.

    >>> refuse({"it is a decoder": False, "it has an odd mask": True})
    Traceback (most recent call last):
    ValueError: an M6Rec block cannot hold this backbone: it has an odd mask
    """
    found = [text for text, there in problems.items() if there]
    if found:
        raise ValueError(f"an M6Rec block cannot hold this backbone: {'; '.join(found)}")


def size_fields(config: Any) -> dict[str, Any]:
    """Fields with equal names in all families, and properties of M6Rec's block that few families have."""
    return {
        "hidden_size": config.hidden_size,
        "embedding_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_hidden_groups": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": float(config.initializer_range),
        "type_vocab_size": 0,
        "embedding_norm": False,
        "qk_norm": False,
    }


def decoder_fields(config: Any) -> dict[str, Any]:
    """Fields of the block that Llama, Qwen2 and Qwen3 share: pre-norm with RMS norms, rotary, gated."""
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    refuse({f"some layers have {', '.join(sorted(kinds))}, of which only the full kind is known": kinds})
    return {
        **size_fields(config),
        "intermediate_size": config.intermediate_size,
        "hidden_act": config.hidden_act,
        "gated_mlp": True,
        "position_embedding_type": "rotary",
        "rope_parameters": dict(config.rope_parameters),
        "norm_type": "rms",
        "norm_position": "pre",
        "norm_eps": config.rms_norm_eps,
        "final_norm": True,
        "attention_dropout": float(config.attention_dropout or 0),
        "hidden_dropout": 0.0,
    }


__all__ = ["DECODER_NAMES", "Family", "Weights", "decoder_fields", "refuse", "size_fields"]
