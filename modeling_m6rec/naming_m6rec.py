"""Which items are the same where ids do not say so: by the field that names them, and by all that both say."""

from collections.abc import Iterable
from typing import Any

from .wording_m6rec import Segment, Wording


class ItemNames:
    """Compares items as they are worded.

    Two items are the same if they have the same name, the first field of their wording, and no field in which they
    differ. A text is the same as an item whose name or whole wording it is.

    Args:
        wording: Words the items.
    """

    def __init__(self, wording: Wording) -> None:
        self._wording = wording

    def item_texts(self, items: Iterable[Any]) -> list[str]:
        """Return the name of each item: what a catalogue then finds items by."""
        return [self._worded(item).parts[0] for item in items]

    def candidates(self, item: Any) -> list[str]:
        """Return the names that an item which is the same may have."""
        segment = self._worded(item)
        if not isinstance(item, str) or not segment.join:
            return [segment.parts[0]]
        pieces = segment.text.split(segment.join)
        return [segment.join.join(pieces[:count]) for count in range(1, len(pieces) + 1)]

    def same(self, one: Any, other: Any) -> bool:
        """Say whether two items are the same."""
        first, second = self._worded(one), self._worded(other)
        if isinstance(one, str) or isinstance(other, str):
            return bool({first.text, first.parts[0]} & {second.text, second.parts[0]})
        fields, others = (dict(zip(segment.names, segment.parts)) for segment in (first, second))
        equal = all(fields[name] == others[name] for name in fields.keys() & others.keys())
        return equal and first.parts[0] == second.parts[0]

    def _worded(self, item: Any) -> Segment:
        return self._wording.item(item, "item")


__all__ = ["ItemNames"]
