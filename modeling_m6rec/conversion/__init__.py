"""Conversion of published language models to M6Rec, one file per family. Checkpoints do not contain this code."""

from .backbone import FAMILIES, from_backbone, load_backbone, load_tokenizer

__all__ = ["FAMILIES", "from_backbone", "load_backbone", "load_tokenizer"]
