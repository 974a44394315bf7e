"""Quantisation of an adapter's base to 8 or 4 bits, by bitsandbytes."""

import importlib.util
import logging
from typing import Any

from transformers import BitsAndBytesConfig

UNQUANTIZED_MODULES = [
    "score_head",
    "user_projection",
    "item_projection",
    "lm_head",
    "lm_transform",
    "embeddings.projection",
]
"""Linear layers that are not quantised: they are small, are trained, or have weights that code reads directly."""


def quantization_config(kind: str) -> BitsAndBytesConfig:
    """Return the settings for quantising a checkpoint while it is loaded.

    Args:
        kind: "8bit", or "nf4" (4 bits, the constants quantised again, as in QLoRA).

    Raises:
        ImportError: If bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(f"quantization {kind!r} needs bitsandbytes: pip install 'm6rec[quant]'")
    settings: dict[str, dict[str, Any]] = {
        "8bit": {"load_in_8bit": True},
        "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    }
    if kind not in settings:
        raise ValueError(f"quantization {kind!r} is unknown: expected one of {', '.join(settings)}")
    # It warns at every matrix product that it rounds its input, which is intended here.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return BitsAndBytesConfig(**settings[kind], llm_int8_skip_modules=UNQUANTIZED_MODULES)


def quantized(kind: str | None) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that quantise a checkpoint; empty for None."""
    return {} if kind is None else {"quantization_config": quantization_config(kind)}


__all__ = ["UNQUANTIZED_MODULES", "quantization_config", "quantized"]
