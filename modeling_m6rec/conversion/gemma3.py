"""Gemma 3, its text models: norms around each block, windows and other rotary positions in some layers."""

from typing import Any

from .family import DECODER_NAMES, Family, Weights, refuse, size_fields


def fields(config: Any) -> dict[str, Any]:
    """Gemma 3's block; the library's window counts the token itself, like ours."""
    rope, local = config.rope_parameters["full_attention"], config.rope_parameters["sliding_attention"]
    kinds = set(config.layer_types) - {"full_attention", "sliding_attention"}
    refuse(
        {
            "use_bidirectional_attention=True": config.use_bidirectional_attention,
            "attn_logit_softcapping": config.attn_logit_softcapping,
            "final_logit_softcapping": config.final_logit_softcapping,
            f"some layers have {', '.join(sorted(kinds))}": kinds,
            f"its windows have rotary positions of type {local['rope_type']!r}": local["rope_type"] != "default",
        }
    )
    windows = [index for index, kind in enumerate(config.layer_types) if kind == "sliding_attention"]
    return {
        **size_fields(config),
        "intermediate_size": config.intermediate_size,
        "hidden_act": config.hidden_activation,
        "gated_mlp": True,
        "position_embedding_type": "rotary",
        "rope_parameters": dict(rope),
        "norm_type": "rms",
        "norm_position": "both",
        "norm_eps": config.rms_norm_eps,
        "final_norm": True,
        "qk_norm": True,
        "qkv_bias": config.attention_bias,
        "output_bias": config.attention_bias,
        "mlp_bias": False,
        "attention_dropout": float(config.attention_dropout or 0),
        "hidden_dropout": 0.0,
        "embedding_scale": float(config.hidden_size**0.5),
        "attention_scale": float(config.query_pre_attn_scalar**-0.5),
        "local_layers": windows or None,
        "local_window": config.sliding_window if windows else None,
        "local_rope_theta": float(local["rope_theta"]) if windows else None,
    }


def untangle(weights: Weights) -> Weights:
    """Add 1 to the weights of norms, which Gemma stores as their distance from 1."""
    return {name: tensor + 1 if name.endswith("norm.weight") else tensor for name, tensor in weights.items()}


GEMMA3 = Family(
    "Gemma3TextModel",
    "Gemma3ForCausalLM",
    fields,
    {
        **DECODER_NAMES,
        r"layers\.(\d+)\.post_attention_layernorm": r"model.layers.\1.attention_out_norm",
        r"layers\.(\d+)\.pre_feedforward_layernorm": r"model.layers.\1.mlp_norm",
        r"layers\.(\d+)\.post_feedforward_layernorm": r"model.layers.\1.mlp_out_norm",
    },
    untangle=untangle,
)

__all__ = ["GEMMA3"]
