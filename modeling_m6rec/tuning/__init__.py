"""m6rec.tuning: the nine tuning methods, all but `full` as PEFT adapters. Importing it registers M6Rec's own method."""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from ..modeling_m6rec import keep_trainable
from .adapter import M6RecAdapterConfig, M6RecAdapterModel
from .loading import load_model, load_tuned
from .methods import MERGEABLE, METHODS, heads, parameter_counts, peft_config, tune
from .peft_types import ADAPTER_TYPE, add_peft_type
from .quantization import quantization_config, quantized

add_peft_type(ADAPTER_TYPE)
if ADAPTER_TYPE not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name=ADAPTER_TYPE.lower(), config_cls=M6RecAdapterConfig, model_cls=M6RecAdapterModel)

__all__ = [
    "MERGEABLE",
    "METHODS",
    "M6RecAdapterConfig",
    "M6RecAdapterModel",
    "heads",
    "keep_trainable",
    "load_model",
    "load_tuned",
    "parameter_counts",
    "peft_config",
    "quantization_config",
    "quantized",
    "tune",
]
