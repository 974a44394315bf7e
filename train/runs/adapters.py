"""Tuning methods of a run: the adapter is added to the model before training, and saved instead of the model."""

import logging
import os
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import AutoConfig, TrainerCallback

from ...atomic_m6rec import atomic_folder
from ...item_features_m6rec import ITEM_FEATURES
from ...modeling_m6rec import BASE
from ...tuning import MERGEABLE, parameter_counts, tune
from ..config.recipe import Recipe
from .pruning import GradualPruning
from .run import Run

logger = logging.getLogger(__name__)
WARM_UP, FIXED = 0.1, 0.3
"""AdaLoRA: shares of the steps before ranks are pruned and after they are fixed (our choice)."""


def attach(run: Run) -> None:
    """Add the adapter of the recipe's tuning method to the model of a run, and log the number of trained weights.

    `run.model` is then the PeftModel: its `forward` adds the virtual tokens of prefix and prompt tuning. A base that is
    not saved in a folder is written next to the adapter, so that the adapter can be loaded again.

    Raises:
        ValueError: If the method cannot be used with this model or with the recipe's other settings.
    """
    arguments = run.recipe.tuning
    if isinstance(run.model, PeftModel):
        raise ValueError(
            f"model.checkpoint {run.recipe.model.checkpoint!r} holds an adapter: begin with its base, or merge the "
            "adapter (tuning.merge) to train on top of it"
        )
    if arguments.method != "full":
        _check(run.recipe)
        more = [*arguments.settings.get("modules_to_save", []), *_own_modules(run)]
        settings = {**arguments.settings, "modules_to_save": more}
        if not run.recipe.model.checkpoint:
            _save_base(run, run.recipe.output_dir / BASE)
        run.model = tune(run.model, arguments.method, run.recipe.task.learn, **settings)
        if run.base_model.config.score_head == "option" and not run.processor.options:
            run.processor.options = run.base_model.config.num_options
    count, everything = parameter_counts(run.model)
    logger.info("%s trains %d of %d parameters (%.2f%%)", arguments.method, count, everything, 100 * count / everything)


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """Count the parameters that are trained, and those of the model without adapters."""
    return parameter_counts(model)


def _check(recipe: Recipe) -> None:
    arguments = recipe.tuning
    if arguments.merge and arguments.method not in MERGEABLE:
        raise ValueError(
            f"tuning.merge: {arguments.method!r} adds what no plain weights can hold; these can be merged: "
            f"{', '.join(MERGEABLE)}"
        )
    if arguments.quantization and not recipe.model.checkpoint:
        raise ValueError(
            f"tuning.quantization {arguments.quantization!r} is done while a checkpoint is read, and the recipe names "
            "none: pretrain first (pretraining.output_dir), or convert the backbone (m6rec convert)"
        )
    if arguments.merge and arguments.quantization:
        raise ValueError(
            f"tuning.merge with tuning.quantization {arguments.quantization!r} would round what was learnt: keep the "
            "adapter, which also fits the base that is not quantised"
        )


def _own_modules(run: Run) -> list[str]:
    """Return the modules that the adapter must save: of another shape than the checkpoint's, or not in it."""
    config, name, found = run.model.config, run.recipe.model.checkpoint, []
    before = AutoConfig.from_pretrained(name) if name else config
    if run.model.score_head is not None and before.score_names != config.score_names:
        found.append("score_head")
    rows = run.recipe.model.item_embeddings
    own = [feature for feature in ITEM_FEATURES if feature.is_tuned(config, before, rows)]
    return found + [feature.weights for feature in own if feature.weights is not None]


def _save_base(run: Run, folder: Path) -> None:
    """Write the base as a separate model, with its processor: it is published separately from its adapters."""
    if int(os.environ.get("RANK", "0")) == 0:  # only one process writes
        with atomic_folder(folder) as partial:
            run.model.save_pretrained(partial)
            run.processor.save_pretrained(partial)
    run.model.name_or_path = str(folder)


def keeps_states(run: Run) -> bool:
    """Return whether segment states can be cached while a model is measured."""
    return not _takes_virtual_tokens(run) and run.base_model.config.num_segment_layers > 0


def _takes_virtual_tokens(run: Run) -> bool:
    """Return whether an adapter adds virtual tokens, which only the flat plan supports; it caches nothing."""
    config = getattr(run.model, "active_peft_config", None)
    return config is not None and config.is_prompt_learning


def reads_through_cache(run: Run) -> bool:
    """Return whether segment states may be cached while the model of a run is trained.

    They may if nothing below the joint layers is trained, neither weights nor adapters.
    """
    return not _takes_virtual_tokens(run) and run.base_model.model.segments_are_frozen


def callbacks(run: Run) -> list[TrainerCallback]:
    """Return the callbacks that the tuning of a run needs."""
    tuning = run.recipe.tuning
    ranks = [AllocateRanks(run.model)] if tuning.method == "adalora" else []
    return [*ranks, *([GradualPruning(run.model, tuning.pruning)] if tuning.pruning else [])]


class AllocateRanks(TrainerCallback):
    """Runs AdaLoRA's rank pruning, between each optimizer step and the clearing of its gradients.

    The remaining ranks are stored here, not in the adapter's configuration: a saved adapter has all its ranks, with
    zeros for pruned ones, and loads like any other. If training is resumed, the averaged importance of ranks restarts.

    Args:
        model: The PeftModel.
    """

    def __init__(self, model: Any) -> None:
        self.tuner = model.base_model
        self.config = model.active_peft_config
        self.left: dict[str, list[bool]] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the schedule: the number of steps is known only now."""
        self.config.total_step = state.max_steps
        self.config.tinit = self.config.tinit or int(WARM_UP * state.max_steps)
        self.config.tfinal = self.config.tfinal or int(FIXED * state.max_steps)
        if self.config.tinit + self.config.tfinal >= state.max_steps:
            raise ValueError(
                f"adalora: tinit={self.config.tinit} and tfinal={self.config.tfinal} leave no step of "
                f"{state.max_steps} to cut ranks in"
            )
        self.tuner.rankallocator.set_total_step(state.max_steps)
        if state.global_step > state.max_steps - self.config.tfinal:
            self.left = {
                name: (weight != 0).flatten().tolist()
                for name, weight in self.tuner.model.named_parameters()
                if "lora_E" in name
            }

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prune the least important ranks."""
        self.config.rank_pattern = self.left
        self.tuner.update_and_allocate(state.global_step)
        self.left, self.config.rank_pattern = self.config.rank_pattern, None


def save_model(run: Run, folder: Path) -> None:
    """Save the trained weights: the whole model, or the adapter with the configuration it needs."""
    if run.recipe.tuning.merge and isinstance(run.model, PeftModel):
        run.model = run.model.merge_and_unload()
    run.model.save_pretrained(folder)
    if isinstance(run.model, PeftModel):
        run.base_model.config.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's model card, an empty template


__all__ = [
    "AllocateRanks",
    "attach",
    "callbacks",
    "keeps_states",
    "reads_through_cache",
    "save_model",
    "trainable_parameters",
]
