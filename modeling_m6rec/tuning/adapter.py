"""Adapters parallel to the feed-forward blocks, and scores by option tokens, as one PEFT method (paper, section 3).

The method has two optional parts: a low-rank adapter parallel to each feed-forward block (adapter tuning), and trained
embeddings of the option tokens and the other special tokens (option tuning). Both together are option-adapter tuning.
"""

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from ..configuration_m6rec import check_format
from ..layers_m6rec import M6RecMLP
from .peft_types import ADAPTER_TYPE, add_peft_type

FORMAT_VERSION = 1
"""Newest format version of an adapter's configuration and weights."""
NO_ADAPTERS = DUMMY_TARGET_MODULES
"""As `target_modules`: no feed-forward block gets an adapter, only tokens are trained."""


@dataclass
class M6RecAdapterConfig(PeftConfig):
    """PEFT configuration of the method; fields without a docstring are as in every PEFT configuration."""

    r: int = 64
    """Width of an adapter's bottleneck (not given in the paper; our choice)."""
    target_modules: list[str] | str | None = None
    """Feed-forward blocks with an adapter; None = all, NO_ADAPTERS = none."""
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """Tokens whose embeddings are trained."""
    score_names: list[str] | None = None
    """Names of the score outputs that the options represent, in their order; None = scores by the model's own head."""
    init_weights: bool = True
    """Initialise to the model without adapters; False = random values, for tests."""
    format_version: int = FORMAT_VERSION
    """Format version of this configuration and the adapter's weights; newer versions are refused."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_format(self.format_version, FORMAT_VERSION, "the adapter's adapter_config.json")
        self.peft_type = add_peft_type(ADAPTER_TYPE)
        if self.r < 1:
            raise ValueError(f"r={self.r}: an adapter's bottleneck is 1 wide or more")
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))


class M6RecAdapterLayer(nn.Module, BaseTunerLayer):
    """A feed-forward block with parallel adapters (paper, option-adapter tuning).

    FFN(Z) becomes FFN(Z) + lambda * (ReLU(Z W1 + b1) W2 + b2). W2, b2 start at zero and lambda at 1 (not given in the
    paper; our choice): initially the model's outputs are unchanged.
    """

    # PEFT finds an adapter's weights one level below these names, which contain the method's prefix.
    adapter_layer_names = ("m6rec_adapter_down", "m6rec_adapter_up", "m6rec_adapter_scale")
    other_param_names = ()

    def __init__(self, base_layer: M6RecMLP, adapter_name: str, config: M6RecAdapterConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.m6rec_adapter_down = nn.ModuleDict()  # W1, b1
        self.m6rec_adapter_up = nn.ModuleDict()  # W2, b2
        self.m6rec_adapter_scale = nn.ParameterDict()  # lambda
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: M6RecAdapterConfig) -> None:
        """Add an adapter."""
        first: Any = self.base_layer.up_proj  # not an nn.Linear if it has adapters or is quantised
        size, weight = first.in_features, first.weight
        down, up, scale = nn.Linear(size, config.r), nn.Linear(config.r, size), torch.ones(1)
        if config.init_weights:
            nn.init.zeros_(up.weight)
            nn.init.zeros_(up.bias)
        if not up.weight.is_meta:  # PEFT uses meta weights before it loads weights
            dtype: Any = weight.dtype if weight.is_floating_point() else None
            down, up, scale = down.to(weight.device, dtype), up.to(weight.device, dtype), scale.to(weight.device, dtype)
        self.m6rec_adapter_down[adapter_name], self.m6rec_adapter_up[adapter_name] = down, up
        self.m6rec_adapter_scale[adapter_name] = nn.Parameter(scale)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map B x Q x hidden_size to itself."""
        result = self.base_layer(hidden_states)
        if not self.disable_adapters:
            for name in self.active_adapters:
                if name in self.m6rec_adapter_up:
                    result = result + self._beside(hidden_states, name).to(result.dtype)
        return result

    def _beside(self, hidden_states: torch.Tensor, name: str) -> torch.Tensor:
        down: Any = self.m6rec_adapter_down[name]
        inner = down(hidden_states.to(down.weight.dtype)).relu()
        return self.m6rec_adapter_scale[name] * self.m6rec_adapter_up[name](inner)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: a bottleneck with an activation cannot be expressed as a change of the block's weights."""
        raise ValueError(
            "adapters beside the feed-forward blocks are not linear and cannot be merged into the weights: keep the "
            "adapter, or tune by lora, adalora, ia3 or option"
        )

    def unmerge(self) -> None:
        """Do nothing: adapters are never merged."""


class M6RecAdapterModel(BaseTuner):
    """Inserts the method into an M6Rec model."""

    prefix = "m6rec_adapter_"
    tuner_layer_cls = M6RecAdapterLayer
    target_module_mapping = {"m6rec": ["mlp"]}

    def _prepare_model(self, peft_config: Any, model: Any) -> None:
        if peft_config.score_names is not None:
            _read_scores_by_options(model, peft_config.score_names)

    def inject_adapter(self, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter to a model, as every tuner does."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        head = model.get_output_embeddings()
        if isinstance(head, TrainableTokensWrapper) and _add_bias not in head._forward_hooks.values():
            head.register_forward_hook(_add_bias)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, M6RecAdapterLayer):
            target.update_layer(adapter_name, peft_config)
            return
        if not isinstance(target, M6RecMLP):
            raise ValueError(
                f"target_modules chooses {current_key!r}, a {type(target).__name__}: adapters stand beside "
                "feed-forward blocks, which are called 'mlp'"
            )
        layer = M6RecAdapterLayer(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, TrainableTokensWrapper):  # its weight is composed and cannot be passed on
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _check_merge_allowed(self) -> None:
        for module in self.model.modules():
            if isinstance(module, M6RecAdapterLayer):
                module.merge()  # raises before anything is merged
        super()._check_merge_allowed()


def _read_scores_by_options(model: Any, names: list[str]) -> None:
    """Make a model score by option tokens in place of a head; `names` must equal the model's score outputs.

    Raises:
        ValueError: If the names differ, or another adapter has its own head.
    """
    config = model.config
    if config.score_names != names:
        raise ValueError(
            f"the adapter's options stand for {names}, but the model scores {config.score_names}: load the model with "
            "the configuration beside the adapter, as AutoModel.from_pretrained(adapter_folder) does"
        )
    if isinstance(model.score_head, ModulesToSaveWrapper):
        raise ValueError(
            "another adapter of this model has trained a score head, which reading scores by options would drop: use a "
            "model of its own for each"
        )
    config.score_head, model.score_head = "option", None
    config.validate()


def _add_bias(head: TrainableTokensWrapper, args: Any, logits: torch.Tensor) -> torch.Tensor:
    """Add the bias of a writing head with trained tokens, which PEFT leaves out."""
    tokens, bias = head.token_adapter, head.original_module.bias
    passed_through = tokens.disable_adapters or tokens.merged or not tokens.active_adapters
    return logits if passed_through or bias is None else logits + bias


__all__ = ["NO_ADAPTERS", "M6RecAdapterConfig", "M6RecAdapterLayer", "M6RecAdapterModel"]
