"""Published language models' weights as M6Rec, one file a family. Stays in the package: checkpoints do not carry it."""

from .backbone import FAMILIES, from_backbone, load_backbone, load_tokenizer

__all__ = ["FAMILIES", "from_backbone", "load_backbone", "load_tokenizer"]
