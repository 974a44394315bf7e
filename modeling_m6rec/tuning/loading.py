"""Loading tuned models from the folder that `m6rec finetune` wrote."""

from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import AutoModel

from ..modeling_m6rec import M6RecForRecommendation, adapter_settings, keep_trainable, load_base


def load_tuned(name: str | Path, **kwargs: Any) -> Any:
    """Load an adapter of any method with its base, as a PeftModel.

    Args:
        name: Folder or Hub name of the adapter.
        **kwargs: Arguments of `from_pretrained` for the base.

    Raises:
        ValueError: If there is no adapter.
    """
    settings = adapter_settings(name)
    if settings is None:
        raise ValueError(f"{str(name)!r} holds no adapter: load it with AutoModel.from_pretrained")
    base = load_base(M6RecForRecommendation, name, settings, **kwargs)
    keep_trainable(base)
    tuned: Any = PeftModel.from_pretrained(base, str(name))
    tuned.name_or_path = str(name)  # where its catalogue is
    return tuned.eval()


def load_model(name: str | Path, **kwargs: Any) -> Any:
    """Load a whole model, or an adapter with its base, from a folder or the Hub."""
    whole = adapter_settings(name) is None
    return AutoModel.from_pretrained(str(name), **kwargs) if whole else load_tuned(name, **kwargs)


__all__ = ["load_model", "load_tuned"]
