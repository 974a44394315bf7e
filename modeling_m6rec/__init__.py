"""m6rec: the open M6-Rec, a generative language model that is also a recommender."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_m6rec import KINDS, PRESETS, TASKS, M6RecConfig
from .modeling_m6rec import M6RecForRecommendation, M6RecOutput
from .network_m6rec import M6RecModel
from .segment_cache_m6rec import SegmentCache
from .version import __version__

AutoConfig.register("m6rec", M6RecConfig, exist_ok=True)
AutoModel.register(M6RecConfig, M6RecForRecommendation, exist_ok=True)
AutoModelForCausalLM.register(M6RecConfig, M6RecForRecommendation, exist_ok=True)
M6RecConfig.register_for_auto_class("AutoConfig")
M6RecForRecommendation.register_for_auto_class("AutoModelForCausalLM")

__all__ = [
    "KINDS",
    "PRESETS",
    "TASKS",
    "M6RecConfig",
    "M6RecForRecommendation",
    "M6RecModel",
    "M6RecOutput",
    "SegmentCache",
    "__version__",
]
