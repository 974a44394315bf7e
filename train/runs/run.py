"""The parts of a training run."""

from dataclasses import dataclass
from typing import Any

from ...modeling_m6rec import M6RecForRecommendation
from ...segment_cache_m6rec import SegmentCache
from ...tokenization import M6RecProcessor
from ..config.recipe import Recipe
from ..data.log import Log
from ..data.splits import Split
from ..rows.collator import CatalogueRows, M6RecDataCollator
from ..rows.examples import RequestWriter


@dataclass
class Run:
    """The parts of a training run."""

    recipe: Recipe
    log: Log
    split: Split
    writer: RequestWriter
    processor: M6RecProcessor
    model: Any
    """The trained module: the M6Rec model, or the PeftModel around it."""
    catalogue: CatalogueRows
    collator: M6RecDataCollator
    segment_cache: SegmentCache | None = None
    """Cached segment states, if the layers that compute them are frozen."""

    @property
    def base_model(self) -> M6RecForRecommendation:
        """The M6Rec model, which a PeftModel wraps if an adapter is trained."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def texts(self) -> list[str]:
        """Text of each item of the catalogue, for the baselines."""
        return item_texts(self.log)


def item_texts(log: Log) -> list[str]:
    """Return the texts of all items, their fields joined."""
    return [" ".join(log.item_fields(item_id).values()) for item_id in log.items.index]


__all__ = [
    "Run",
    "item_texts",
]
