"""Qwen2 and Qwen2.5, dense; models whose sliding window is switched on are refused."""

from typing import Any

from .family import DECODER_NAMES, Family, decoder_fields


def fields(config: Any) -> dict[str, Any]:
    """Llama's block, with biases at queries, keys and values only."""
    return {**decoder_fields(config), "qkv_bias": True, "output_bias": False, "mlp_bias": False}


QWEN2 = Family("Qwen2Model", "Qwen2ForCausalLM", fields, DECODER_NAMES)

__all__ = ["QWEN2"]
