"""m6rec: the open M6-Rec, a generative language model that is also a recommender.

Importing it registers the model with Transformers. Text, pipeline, catalogue and tuning are imported at their first
use, by their names here or by the library that they belong to.
"""

from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_m6rec import KINDS, PRESETS, TASKS, M6RecConfig
from .lazy_registration import register_on_import
from .modeling_m6rec import M6RecForRecommendation, M6RecOutput
from .network_m6rec import M6RecModel
from .segment_cache_m6rec import SegmentCache
from .version import __version__

if TYPE_CHECKING:
    from .catalogue_m6rec import Catalogue
    from .item_features_m6rec import Evidence, ItemWeights
    from .pipeline_m6rec import RecommendationPipeline
    from .processing_m6rec import M6RecProcessor
    from .ranking_m6rec import Guard
    from .segment_cache_m6rec import UserStates
    from .tokenization_m6rec import M6RecTokenizer
    from .train import fit
    from .train.rows.collator import M6RecDataCollator

LAZY = {
    "Catalogue": "m6rec.catalogue_m6rec",
    "Evidence": "m6rec.item_features_m6rec",
    "ItemWeights": "m6rec.item_features_m6rec",
    "Guard": "m6rec.ranking_m6rec",
    "M6RecDataCollator": "m6rec.train.rows.collator",
    "M6RecProcessor": "m6rec.processing_m6rec",
    "M6RecTokenizer": "m6rec.tokenization_m6rec",
    "RecommendationPipeline": "m6rec.pipeline_m6rec",
    "UserStates": "m6rec.segment_cache_m6rec",
    "fit": "m6rec.train",
}
"""Names of the package that are imported at their first use, and their modules."""


def __getattr__(name: str) -> Any:
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(import_module(LAZY[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *LAZY})


def _register_tokenizer() -> None:
    from transformers import AutoTokenizer

    from .tokenization_m6rec import M6RecTokenizer

    AutoTokenizer.register(M6RecConfig, tokenizer_class=M6RecTokenizer, exist_ok=True)


def _register_processor() -> None:
    from transformers import AutoProcessor

    from .processing_m6rec import M6RecProcessor

    AutoProcessor.register(M6RecConfig, M6RecProcessor, exist_ok=True)


def _register_pipeline() -> None:
    from transformers.pipelines import PIPELINE_REGISTRY

    from .pipeline_m6rec import RecommendationPipeline

    PIPELINE_REGISTRY.register_pipeline("recommendation", RecommendationPipeline, AutoModelForCausalLM, type="text")


AutoConfig.register("m6rec", M6RecConfig, exist_ok=True)
AutoModel.register(M6RecConfig, M6RecForRecommendation, exist_ok=True)
AutoModelForCausalLM.register(M6RecConfig, M6RecForRecommendation, exist_ok=True)
M6RecConfig.register_for_auto_class("AutoConfig")
M6RecForRecommendation.register_for_auto_class("AutoModelForCausalLM")
register_on_import("transformers.models.auto.tokenization_auto", "m6rec.tokenization_m6rec", _register_tokenizer)
register_on_import("transformers.models.auto.processing_auto", "m6rec.processing_m6rec", _register_processor)
register_on_import("transformers.pipelines", "m6rec.pipeline_m6rec", _register_pipeline)
register_on_import("peft", "m6rec.tuning", partial(import_module, "m6rec.tuning"))

__all__ = [
    "KINDS",
    "PRESETS",
    "TASKS",
    "Catalogue",
    "Evidence",
    "Guard",
    "ItemWeights",
    "M6RecConfig",
    "M6RecDataCollator",
    "M6RecForRecommendation",
    "M6RecModel",
    "M6RecOutput",
    "M6RecProcessor",
    "M6RecTokenizer",
    "RecommendationPipeline",
    "SegmentCache",
    "UserStates",
    "__version__",
    "fit",
]
