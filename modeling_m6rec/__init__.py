"""m6rec: the open M6-Rec, a generative language model that is also a recommender."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer
from transformers.pipelines import PIPELINE_REGISTRY

from .beside_peft import register_beside_peft
from .catalogue_m6rec import Catalogue
from .configuration_m6rec import KINDS, PRESETS, TASKS, M6RecConfig
from .modeling_m6rec import M6RecForRecommendation, M6RecOutput
from .network_m6rec import M6RecModel
from .pipeline_m6rec import RecommendationPipeline
from .segment_cache_m6rec import SegmentCache
from .tokenization import M6RecProcessor, M6RecTokenizer
from .version import __version__

AutoConfig.register("m6rec", M6RecConfig, exist_ok=True)
AutoModel.register(M6RecConfig, M6RecForRecommendation, exist_ok=True)
AutoModelForCausalLM.register(M6RecConfig, M6RecForRecommendation, exist_ok=True)
AutoTokenizer.register(M6RecConfig, tokenizer_class=M6RecTokenizer, exist_ok=True)
AutoProcessor.register(M6RecConfig, M6RecProcessor, exist_ok=True)
PIPELINE_REGISTRY.register_pipeline("recommendation", RecommendationPipeline, AutoModelForCausalLM, type="text")
M6RecConfig.register_for_auto_class("AutoConfig")
M6RecForRecommendation.register_for_auto_class("AutoModelForCausalLM")
register_beside_peft()

__all__ = [
    "KINDS",
    "PRESETS",
    "TASKS",
    "Catalogue",
    "M6RecConfig",
    "M6RecForRecommendation",
    "M6RecModel",
    "M6RecOutput",
    "M6RecProcessor",
    "M6RecTokenizer",
    "RecommendationPipeline",
    "SegmentCache",
    "__version__",
]
