"""GPT-2: learned positions, layer norms, transposed weights, and fused weights of queries, keys and values."""

from typing import Any

from .family import Family, Weights, refuse, size_fields


def fields(config: Any) -> dict[str, Any]:
    """GPT-2's block; its residual dropout rate replaces both of its dropout rates of states."""
    refuse(
        {
            "add_cross_attention=True": config.add_cross_attention,
            "scale_attn_weights=False": not config.scale_attn_weights,
            "scale_attn_by_inverse_layer_idx=True": config.scale_attn_by_inverse_layer_idx,
        }
    )
    return {
        **size_fields(config),
        "intermediate_size": config.n_inner or 4 * config.hidden_size,
        "hidden_act": config.activation_function,
        "gated_mlp": False,
        "position_embedding_type": "learned",
        "norm_type": "layer",
        "norm_position": "pre",
        "norm_eps": config.layer_norm_epsilon,
        "final_norm": True,
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "attention_dropout": float(config.attn_pdrop),
        "hidden_dropout": float(config.resid_pdrop),
    }


def untangle(weights: Weights) -> Weights:
    """Transpose the weights `c_...`, and split the fused weights into three."""
    plain: Weights = {}
    for name, tensor in weights.items():
        turned = tensor.T if ".c_" in name and name.endswith(".weight") else tensor
        if ".c_attn." in name:
            parts = zip("qkv", turned.chunk(3))
            plain |= {name.replace(".c_attn.", f".{part}."): piece for part, piece in parts}
        else:
            plain[name] = turned
    return plain


GPT2 = Family(
    "GPT2Model",
    "GPT2LMHeadModel",
    fields,
    {
        r"wte": r"model.embeddings.tokens",
        r"wpe": r"model.embeddings.positions",
        r"h\.(\d+)\.ln_1": r"model.layers.\1.attention_norm",
        r"h\.(\d+)\.attn\.([qkv])": r"model.layers.\1.self_attn.\2_proj",
        r"h\.(\d+)\.attn\.c_proj": r"model.layers.\1.self_attn.o_proj",
        r"h\.(\d+)\.ln_2": r"model.layers.\1.mlp_norm",
        r"h\.(\d+)\.mlp\.c_fc": r"model.layers.\1.mlp.up_proj",
        r"h\.(\d+)\.mlp\.c_proj": r"model.layers.\1.mlp.down_proj",
        r"ln_f": r"model.norm",
        r"lm_head": r"lm_head",
    },
    untangle=untangle,
)

__all__ = ["GPT2"]
