"""Text: tokenizer, processor, templates."""

from ..processing_m6rec import M6RecProcessor
from ..tokenization_m6rec import KINDS, M6RecTokenizer
from .templates import available_templates, load_template

__all__ = ["KINDS", "M6RecProcessor", "M6RecTokenizer", "available_templates", "load_template"]
