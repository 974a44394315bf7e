"""Qwen3, dense; models whose sliding window is switched on are refused."""

from typing import Any

from .family import DECODER_NAMES, Family, decoder_fields


def fields(config: Any) -> dict[str, Any]:
    """Llama's block, with norms of each head's queries and keys; all heads together may be wider than the states."""
    bias = config.attention_bias
    return {**decoder_fields(config), "qk_norm": True, "qkv_bias": bias, "output_bias": bias, "mlp_bias": False}


QWEN3 = Family("Qwen3Model", "Qwen3ForCausalLM", fields, DECODER_NAMES)

__all__ = ["QWEN3"]
