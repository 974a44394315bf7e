"""Importing the package imports little, and makes all of it known all the same, whatever is imported first."""

import pytest

KNOWN = """
from m6rec import M6RecConfig
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer, pipelines
from transformers.models.auto import modeling_auto, processing_auto, tokenization_auto

mappings = [
    modeling_auto.MODEL_MAPPING,
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    tokenization_auto.TOKENIZER_MAPPING,
    processing_auto.PROCESSOR_MAPPING,
]
result = [mapping[M6RecConfig].__name__ for mapping in mappings]
result.append(pipelines.PIPELINE_REGISTRY.check_task("recommendation")[1]["impl"].__name__)
"""
PEFT = """
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

result.append([kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING if "M6REC" in kind.value])
"""
ALL_KNOWN = [
    "M6RecForRecommendation",
    "M6RecForRecommendation",
    "M6RecTokenizer",
    "M6RecProcessor",
    "RecommendationPipeline",
]
FIRST = [
    "import m6rec",
    "import m6rec.pipeline_m6rec",
    "import m6rec.tokenization",
    "import m6rec.processing_m6rec",
    "from m6rec import *",
    "import m6rec; from transformers import AutoTokenizer",
    "import m6rec; from transformers import AutoProcessor",
    "import m6rec; from transformers import pipeline",
    "from transformers import AutoTokenizer; import m6rec",
    "from transformers import pipeline; import m6rec",
    "import transformers.models.auto.tokenization_auto; import m6rec; import m6rec.pipeline_m6rec",
]


def test_the_package_imports_little(fresh):
    """Transformers' own layers import tokenizers and psutil; all else comes when it is asked for."""
    code = """
before = set(sys.modules)
import m6rec
roots = {name.partition(".")[0] for name in set(sys.modules) - before}
known = {name.partition(".")[0] for name in before} | set(sys.stdlib_module_names)
result = [sorted(roots - known), sorted(name for name in sys.modules if name.startswith("m6rec."))]
result += [[name for name in ("transformers.pipelines", "transformers.trainer") if name in sys.modules]]
"""
    roots, own, library = fresh(code)
    assert set(roots) <= {"m6rec", "tokenizers", "psutil"} and not library
    late = (
        "catalogue",
        "pipeline",
        "ranking",
        "scoring",
        "tokenization",
        "train",
        "tuning",
        "conversion",
        "model_cards",
    )
    assert "m6rec.modeling_m6rec" in own and not [name for name in own if name.split(".")[1].startswith(late)]


@pytest.mark.parametrize("first", FIRST)
def test_everything_is_known_whatever_is_imported_first(fresh, first):
    assert fresh(first + KNOWN) == ALL_KNOWN


@pytest.mark.parametrize("first", ["import m6rec; import peft", "import peft; import m6rec", "import m6rec.tuning"])
def test_our_method_is_known_to_peft(fresh, first):
    assert fresh(first + "\nresult = []" + PEFT) == [["M6REC_ADAPTER"]]


def test_each_class_is_known_alone(fresh):
    """The tokenizer does not wait until somebody wants a processor."""
    code = """
import m6rec, sys
from transformers import AutoTokenizer
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

result = [TOKENIZER_MAPPING[m6rec.M6RecConfig].__name__, "transformers.pipelines" in sys.modules]
"""
    assert fresh(code) == ["M6RecTokenizer", False]


def test_names_that_come_late_are_listed_and_others_are_refused(fresh):
    code = """
import m6rec

late = ("Catalogue", "M6RecProcessor", "M6RecTokenizer", "RecommendationPipeline")
result = [set(late) <= set(dir(m6rec)), [getattr(m6rec, name).__name__ for name in late]]
result.append(set(m6rec.__all__) <= set(dir(m6rec)))
try:
    m6rec.Catalog
except AttributeError as error:
    result.append(str(error))
"""
    listed, names, whole, refused = fresh(code)
    assert listed and whole and names == ["Catalogue", "M6RecProcessor", "M6RecTokenizer", "RecommendationPipeline"]
    assert "'m6rec' has no attribute 'Catalog'" in refused
