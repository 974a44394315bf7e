"""Items and tables of them, as users hold them: texts or mappings of fields, in lists, data frames and datasets."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from .values_m6rec import normalize_id

Item = str | dict[str, Any]
"""A text, or fields; `item_id` among them is never worded."""
Model = Any
"""An M6RecForRecommendation, also within a PeftModel, which hands on what it lacks."""


class NamedText(str):
    """The text of an item of a catalogue of texts, with its id.

    Args:
        text: The text.
        item_id: The id.
    """

    item_id: str

    def __new__(cls, text: str, item_id: str) -> "NamedText":
        """Make a text with an id."""
        own = super().__new__(cls, text)
        own.item_id = item_id
        return own


def item_identity(item: Any, place: str = "item") -> str | None:
    """Return the id of an item, None if it carries none."""
    if isinstance(item, NamedText):
        return item.item_id
    known = isinstance(item, Mapping) and item.get("item_id") is not None
    return normalize_id(item["item_id"], f"{place}.item_id") if known else None


def without_stats(item: Any) -> Any:
    """Return an item without its statistics, which vary and so are no part of it."""
    if isinstance(item, Mapping) and "stats" in item:
        return {name: value for name, value in item.items() if name != "stats"}
    return item


def item_texts(processor: Any, items: Iterable[Any]) -> list[str]:
    """Word items as the processor's template does."""
    return processor.item_texts([without_stats(item) for item in items])


def plain(value: Any) -> Any:
    """Turn tensors, arrays and tuples, at any depth, into numbers and lists."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value


def table_rows(table: Any) -> Iterable[Any]:
    """Return the rows of a pandas data frame, or of anything that yields rows, such as a list or a dataset.

    Raises:
        TypeError: It is one row, or no table at all.
    """
    if hasattr(table, "iloc") and hasattr(table, "columns"):
        # None in place of NaN, NaT and NA: a field that is missing.
        return table.astype(object).where(table.notna(), None).to_dict("records")
    rows = hasattr(table, "__iter__") or hasattr(table, "__getitem__")
    single = getattr(table, "ndim", None) == 0  # a number as an array or a tensor, which cannot be iterated
    if isinstance(table, str | bytes | Mapping | type) or single or not rows:
        raise TypeError(f"expected a list, a data frame or a dataset of rows, got {type(table).__name__}")
    return table


@contextmanager
def reading(model: Model) -> Iterator[None]:
    """Let the model read without drop-out and gradients, and leave each of its modules in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


__all__ = [
    "Item",
    "Model",
    "NamedText",
    "item_identity",
    "item_texts",
    "plain",
    "reading",
    "table_rows",
    "without_stats",
]
