"""A base in 8 or 4 bits under an adapter, by bitsandbytes."""

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
"""Linear layers that are small, that learn, or whose weights are looked at: they are not quantised."""


def quantization_config(kind: str) -> BitsAndBytesConfig:
    """Say how a checkpoint is quantised while it is loaded.

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
    # It says with every matrix product that it rounds its input, which is what was asked for.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return BitsAndBytesConfig(**settings[kind], llm_int8_skip_modules=UNQUANTIZED_MODULES)


def quantized(kind: str | None) -> dict[str, Any]:
    """Return what `from_pretrained` is given so that a checkpoint is quantised; nothing for None."""
    return {} if kind is None else {"quantization_config": quantization_config(kind)}


__all__ = ["UNQUANTIZED_MODULES", "quantization_config", "quantized"]
