"""Llama and models of the same architecture: SmolLM2, TinyLlama, Llama 2 and 3."""

from typing import Any

from .family import DECODER_NAMES, Family, decoder_fields


def fields(config: Any) -> dict[str, Any]:
    """Llama's block; one field of its configuration switches all four attention biases."""
    bias = config.attention_bias
    return {**decoder_fields(config), "qkv_bias": bias, "output_bias": bias, "mlp_bias": config.mlp_bias}


LLAMA = Family("LlamaModel", "LlamaForCausalLM", fields, DECODER_NAMES)

__all__ = ["LLAMA"]
