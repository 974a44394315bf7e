"""Folders that hold an adapter: what is beside the adapter, and how the model below it is found and loaded.

`m6rec finetune` writes the adapter with the configuration of the model as it was tuned, which may differ from the
base's in what it scores. The base stands in the folder `base` beside it where it had no folder of its own.
"""

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, find_adapter_config_file
from transformers.utils.hub import cached_file

from .configuration_m6rec import M6RecConfig

BASE = "base"
"""Folder of a base that has no other place, within the adapter's folder."""
BROUGHT = ("score_head.", "model.item_memory.", "model.word_memory.")
"""Weights that may have another shape in the base: then the adapter has its own."""
VIRTUAL = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT", "CARTRIDGE")
"""Methods of PEFT that act outside of the model, with virtual tokens."""

OWN = "M6REC_ADAPTER"
"""Our method of tuning, which only the package makes known to PEFT; all others PEFT knows by itself."""


def adapter_settings(name: str | Path, **hub: Any) -> dict[str, Any] | None:
    """Read what a folder or a repository of the Hub says of its adapter; None if it holds none, or a whole model too.

    Args:
        name: The folder or the name on the Hub.
        **hub: `revision`, `token` and so on.
    """
    folder = Path(name)
    if any((folder / weights).is_file() for weights in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
        return None  # the library loads an adapter beside its base by itself
    file = find_adapter_config_file(str(name), **hub)
    return None if file is None else json.loads(Path(file).read_text(encoding="utf-8"))


def load_base(cls: Any, name: str | Path, settings: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Load the model below an adapter, configured as it was when the adapter was trained.

    Args:
        cls: Its class.
        name: Folder or Hub name of the adapter.
        settings: What `adapter_settings` found there.
        *args: As of `PreTrainedModel.from_pretrained`, as are
        **kwargs: these.

    Raises:
        ValueError: If the adapter does not say what it belongs to, or that has other weights than it was trained with.
    """
    given = settings.get("base_model_name_or_path")
    if not given:
        raise ValueError(
            f"the adapter {str(name)!r} does not name its base: write it into adapter_config.json as "
            "base_model_name_or_path"
        )
    base = _beside(Path(name), given) or given
    hub = {key: kwargs[key] for key in ("token", "cache_dir", "local_files_only") if key in kwargs}
    config = kwargs.pop("config", None)
    if not isinstance(config, M6RecConfig):
        found = cached_file(str(name), CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **hub)
        config, kwargs = M6RecConfig.from_pretrained(found or base, return_unused_kwargs=True, **kwargs)
    quantized = vars(config).pop("quantization_config", None)  # says how the base was read, not how it is stored
    if quantized is not None:
        kwargs.setdefault("quantization_config", quantized)
    try:
        model, info = cls.from_pretrained(
            base, *args, config=config, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs
        )
    except OSError as error:
        raise OSError(f"the base {base!r} of the adapter {str(name)!r} cannot be loaded: {error}") from error
    wrong = [entry for entry in sorted(map(str, info["mismatched_keys"])) if not any(part in entry for part in BROUGHT)]
    if wrong:
        raise ValueError(f"{base!r} is not the base of the adapter {str(name)!r}: its shapes differ in {wrong[0]}")
    if any("model.item_memory." in str(entry) for entry in (*info["missing_keys"], *info["mismatched_keys"])):
        # As when the adapter was trained. The library has drawn numbers, and so each time another fingerprint.
        torch.nn.init.zeros_(model.model.item_memory.weight)
    return model


def _beside(adapter: Path, given: str) -> str | None:
    """Find a base that stands beside its adapter, or beside the checkpoints of one, wherever the folder is now."""
    places = (adapter / BASE, adapter.parent / BASE) if Path(given).name == BASE else ()
    return next((str(place) for place in places if place.is_dir()), None)


def load_adapted(cls: Any, name: str | Path, settings: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Load a model with its adapter inside, as `from_pretrained` of a folder with an adapter does; see `load_base`.

    Raises:
        ValueError: If the adapter acts outside of the model.
    """
    kind = settings.get("peft_type")
    if kind in VIRTUAL:
        raise ValueError(
            f"{str(name)!r} holds {kind}, whose virtual tokens act outside of the model: load it with "
            f"m6rec.tuning.load_tuned({str(name)!r})"
        )
    output_loading_info = kwargs.pop("output_loading_info", False)
    if kind == OWN:
        try:
            importlib.import_module("m6rec.tuning")  # makes our method known to PEFT
        except ImportError as error:
            raise ImportError(f"the adapter {str(name)!r} needs the package: pip install m6rec") from error
    model = load_base(cls, name, settings, *args, **kwargs)
    keep_trainable(model)
    info = model.load_adapter(str(name))
    model.name_or_path = str(name)  # where its catalogue is
    return (model, info.to_dict()) if output_loading_info else model


def keep_trainable(model: torch.nn.Module) -> None:
    """Keep a 4-bit model from repacking its weights for inference when it is first evaluated.

    On processors with AVX512-BF16 bitsandbytes does so for good, with a kernel that has no gradient: adapters below it
    would learn nothing from then on. Call it before anything is read.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False


__all__ = ["BASE", "OWN", "adapter_settings", "keep_trainable", "load_adapted", "load_base"]
