"""BERT and models of the same architecture, such as MiniLM, with or without a masked language model head."""

from typing import Any

from .family import Family, refuse, size_fields


def fields(config: Any) -> dict[str, Any]:
    """BERT's block: post-norm, learned positions, row 0 of its token types for every token."""
    # transformers 5 treats all positions as absolute, independently of the file.
    positions = getattr(config, "position_embedding_type", None) or "absolute"
    refuse(
        {
            "is_decoder=True": config.is_decoder,
            "add_cross_attention=True": config.add_cross_attention,
            f"position_embedding_type={positions!r}": positions != "absolute",
        }
    )
    return {
        **size_fields(config),
        "intermediate_size": config.intermediate_size,
        "hidden_act": config.hidden_act,
        "gated_mlp": False,
        "position_embedding_type": "learned",
        "norm_type": "layer",
        "norm_position": "post",
        "norm_eps": config.layer_norm_eps,
        "final_norm": False,
        "embedding_norm": True,
        "type_vocab_size": config.type_vocab_size,
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "attention_dropout": float(config.attention_probs_dropout_prob),
        "hidden_dropout": float(config.hidden_dropout_prob),
    }


BERT = Family(
    "BertModel",
    "BertForMaskedLM",
    fields,
    {
        r"embeddings\.word_embeddings": r"model.embeddings.tokens",
        r"embeddings\.position_embeddings": r"model.embeddings.positions",
        r"embeddings\.token_type_embeddings": r"model.embeddings.types",
        r"embeddings\.LayerNorm": r"model.embeddings.norm",
        r"encoder\.layer\.(\d+)\.attention\.self\.(q|k|v)(?:uery|ey|alue)": r"model.layers.\1.self_attn.\2_proj",
        r"encoder\.layer\.(\d+)\.attention\.output\.dense": r"model.layers.\1.self_attn.o_proj",
        r"encoder\.layer\.(\d+)\.attention\.output\.LayerNorm": r"model.layers.\1.attention_norm",
        r"encoder\.layer\.(\d+)\.intermediate\.dense": r"model.layers.\1.mlp.up_proj",
        r"encoder\.layer\.(\d+)\.output\.dense": r"model.layers.\1.mlp.down_proj",
        r"encoder\.layer\.(\d+)\.output\.LayerNorm": r"model.layers.\1.mlp_norm",
        r"cls\.predictions\.transform\.dense": r"lm_transform.dense",
        r"cls\.predictions\.transform\.LayerNorm": r"lm_transform.norm",
        r"cls\.predictions\.decoder": r"lm_head",
    },
    causal=False,
    # The pooler, the head of next-sentence prediction, and the second name of the decoder's bias.
    unread=r"(^|\.)pooler\.|^cls\.seq_relationship\.|^cls\.predictions\.bias$",
)

__all__ = ["BERT"]
