"""How a family of language models is described, and what several families have in common."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

Weights = dict[str, torch.Tensor]


class Family(NamedTuple):
    """What is to be known of a family to read its checkpoints."""

    base: str
    """Name of the class in transformers that has no head."""
    head: str
    """Name of the class that writes."""
    fields: Callable[[Any], dict[str, Any]]
    """Its configuration -> fields of M6RecConfig; raises ValueError for what an M6Rec block cannot hold."""
    names: Mapping[str, str]
    """Pattern of a module's name, without the prefix of the body -> the name of ours."""
    causal: bool = True
    """Whether it reads a document from left to right only."""
    unread: str = r"(?!)"
    """Pattern of the weights that M6Rec has no use for."""
    untangle: Callable[[Weights], Weights] = dict
    """Brings weights into the form of plain linear layers, before they are renamed."""


DECODER_NAMES = {
    r"embed_tokens": r"model.embeddings.tokens",
    r"layers\.(\d+)\.input_layernorm": r"model.layers.\1.attention_norm",
    r"layers\.(\d+)\.post_attention_layernorm": r"model.layers.\1.mlp_norm",
    r"layers\.(\d+)\.(self_attn\.[qkvo]_proj|self_attn\.[qk]_norm|mlp\.(?:gate|up|down)_proj)": r"model.layers.\1.\2",
    r"norm": r"model.norm",
    r"lm_head": r"lm_head",
}
"""Names of Llama, which Qwen2 and Qwen3 took over."""


def refuse(problems: Mapping[str, Any]) -> None:
    """Raise if any of the problems (what it is -> whether it is there) is there.

    >>> refuse({"it is a decoder": False, "it has an odd mask": True})
    Traceback (most recent call last):
    ValueError: an M6Rec block cannot hold this backbone: it has an odd mask
    """
    found = [text for text, there in problems.items() if there]
    if found:
        raise ValueError(f"an M6Rec block cannot hold this backbone: {'; '.join(found)}")


def size_fields(config: Any) -> dict[str, Any]:
    """Fields that every family names alike, and the traits of M6Rec's block that few of them have."""
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
