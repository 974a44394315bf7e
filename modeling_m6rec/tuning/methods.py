"""The tuning methods: each defines which weights of an M6Rec model are trained."""

import dataclasses
import logging
import re
from collections.abc import Collection, Sequence
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from torch import nn

from ..configuration_m6rec import KINDS, M6RecConfig
from ..modeling_m6rec import M6RecForRecommendation, keep_trainable
from ..values_m6rec import SCORING_TASKS
from .adapter import NO_ADAPTERS, M6RecAdapterConfig

logger = logging.getLogger(__name__)

METHODS: dict[str, type[PeftConfig] | None] = {
    "full": None,
    "lora": LoraConfig,
    "adalora": AdaLoraConfig,
    "ia3": IA3Config,
    "adapter": M6RecAdapterConfig,
    "prefix": PrefixTuningConfig,
    "prompt": PromptTuningConfig,
    "option": M6RecAdapterConfig,
    "option-adapter": M6RecAdapterConfig,
}
"""Method -> its PEFT configuration; None = every weight is trained, without PEFT."""
MERGEABLE = ("lora", "adalora", "ia3", "option")
"""Methods whose result can be merged into plain weights."""
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
SCALED = ("k_proj", "v_proj", "down_proj")
"""Scaled by (IA)3: keys, values, and the inner states of the feed-forward blocks (the input of down_proj)."""
BOTTLENECK = 64
"""Width of adapters, about 1% of the weights of M6-base (not given in the paper; our choice)."""


def heads(config: M6RecConfig, tasks: Collection[str]) -> list[str]:
    """Name the heads of the given tasks, which start from random values and are trained fully with any adapter."""
    found = []
    if config.score_head == "linear" and not SCORING_TASKS.keys().isdisjoint(tasks):
        found.append("score_head")
    if "retrieval" in tasks:
        found += ["user_projection", "item_projection", "item_norm"]
    if "writing" in tasks and (config.lm_head_transform or config.embedding_size != config.hidden_size):
        found.append("lm_transform")
    return found


def peft_config(
    method: str, model: M6RecForRecommendation, tasks: Collection[str], **settings: Any
) -> PeftConfig | None:
    """Make the PEFT configuration of a method.

    If the segment layers are frozen, only joint layers are adapted, so that segment states can be kept.

    Args:
        method: One of METHODS.
        model: The model, without adapters.
        tasks: Tasks to learn: click, rating, interaction, retrieval, writing.
        **settings: Fields of the method's configuration that override M6Rec's defaults; `modules_to_save` adds to the
            heads.

    Returns:
        The configuration; None for "full".

    Raises:
        ValueError: If the method or a field is unknown, or the method cannot be used with this model.
    """
    if method not in METHODS:
        raise ValueError(f"there is no tuning method {method!r}: choose one of {', '.join(METHODS)}")
    cls = METHODS[method]
    if cls is None:
        return None
    known = {entry.name for entry in dataclasses.fields(cls) if entry.init}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ValueError(f"{method} has no setting {unknown[0]!r}: its settings are {', '.join(sorted(known))}")
    defaults = {"task_type": TaskType.CAUSAL_LM, **_defaults(method, model)}
    by_options = "score_names" in defaults
    trained = dict.fromkeys([*heads(model.config, tasks), *(settings.pop("modules_to_save", None) or [])])
    if by_options:
        trained.pop("score_head", None)
    return cls(**{**defaults, **settings, "modules_to_save": list(trained) or None})


def _defaults(method: str, model: M6RecForRecommendation) -> dict[str, Any]:
    config = model.config
    if method == "lora":
        return {"r": 8, "lora_alpha": 16, "target_modules": _targets(model, [*ATTENTION, *FEED_FORWARD])}
    if method == "adalora":
        targets = _targets(model, [*ATTENTION, *FEED_FORWARD])
        # The number of steps is known only when training begins; PEFT requires one earlier.
        return {"init_r": 8, "target_r": 4, "lora_alpha": 16, "total_step": 1, "target_modules": targets}
    if method == "ia3":
        return {"target_modules": _targets(model, SCALED), "feedforward_modules": _targets(model, SCALED[2:])}
    if method == "prefix":
        return {"num_virtual_tokens": 16}
    if method == "prompt":
        # The library assumes that embeddings are as wide as the states.
        return {
            "num_virtual_tokens": 16,
            "token_dim": config.embedding_size,
            "prompt_tuning_init": "SAMPLE_VOCAB",
        }
    adapters = {"r": min(BOTTLENECK, config.hidden_size // 4), "target_modules": _targets(model, ["mlp"])}
    if method == "adapter":
        return adapters
    if config.num_segment_layers and model.model.segments_are_frozen:
        raise ValueError(
            f"{method} tuning trains [SEG] and the kind tokens, which stand in every segment: it cannot be used with "
            "frozen segment layers (model.freeze_segments)"
        )
    options = {"trainable_token_indices": special_tokens(config), "score_names": config.score_names}
    return {**adapters, **options} if method == "option-adapter" else {"target_modules": NO_ADAPTERS, **options}


def special_tokens(config: M6RecConfig) -> list[int]:
    """List the tokens that option tuning trains: options, structural tokens and soft prompts (paper).

    Options beyond the classes serve as the soft prompts.
    """
    markers = [config.source_token_id, config.source_end_token_id, config.bos_token_id, config.eos_token_id]
    kinds = range(config.first_kind_token_id, config.first_kind_token_id + len(KINDS))
    options = range(config.first_option_token_id, config.first_option_token_id + config.num_options)
    return [index for index in (*markers, config.segment_token_id, *kinds, *options) if index is not None]


def _targets(model: M6RecForRecommendation, names: Sequence[str]) -> list[str] | str:
    """Name the modules of all layers, or of the joint layers if the segment layers are frozen."""
    network = model.model
    if not (network.config.num_segment_layers and network.segments_are_frozen):
        return list(names)
    joint = range(network.config.num_segment_layers, network.config.num_hidden_layers)
    layers = list(network.layers)
    places = sorted({layers.index(network.layer(index)) for index in joint})
    return rf"model\.layers\.({'|'.join(map(str, places))})\.(.*\.)?({'|'.join(map(re.escape, names))})"


def tune(model: M6RecForRecommendation, method: str, tasks: Collection[str], **settings: Any) -> Any:
    """Insert the adapter of a method into a model; arguments as in `peft_config`.

    Returns:
        The PeftModel; for "full" the unchanged model.
    """
    config = peft_config(method, model, tasks, **settings)
    if config is None:
        return model
    keep_trainable(model)
    tuned = get_peft_model(model, config)
    if method == "prefix":
        # PEFT draws with standard deviation 1, far larger than the initial weights of a model's layers.
        width = model.config.initializer_range
        assert width is not None
        with torch.no_grad():
            for weight in tuned.prompt_encoder.parameters():
                weight.mul_(width)
    return tuned


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Return the numbers of trained parameters and of the model's parameters without adapters."""
    if isinstance(model, PeftModel):
        trained, everything = model.get_nb_trainable_parameters()
        return trained, everything - trained
    weights = list(model.parameters())
    return sum(weight.numel() for weight in weights if weight.requires_grad), sum(weight.numel() for weight in weights)


__all__ = ["MERGEABLE", "METHODS", "heads", "parameter_counts", "peft_config", "special_tokens", "tune"]
