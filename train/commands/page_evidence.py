"""A catalogue's evidence as flat arrays, which the page of `m6rec export --to web` reads as they are.

Shapes: N rows of the catalogue, M counted items, of which some may be outside the catalogue, V words, P pairs.
"""

from typing import Any

import numpy as np

from ...catalogue_m6rec import Counted
from ...item_features_m6rec import WIDTH

ALIGNED = 8
"""Each array starts at a multiple of this number of bytes."""

FEW = 1 << 16
"""Most different numbers of an array that is written as places in a table of them."""

WHOLE = ("uint8", "uint16", "uint32")
"""Types of whole numbers, the narrowest first."""


class Packed:
    """Arrays in one file, and the type, start and length of each."""

    def __init__(self) -> None:
        self.content = bytearray()
        self.places: dict[str, dict[str, Any]] = {}

    def put(self, name: str, values: np.ndarray) -> None:
        """Append an array under a name.

        Args:
            name: The name.
            values: Whole numbers of at least 0, which get the narrowest type; or fractions: those of float32 as they
                are, others as float64, or as places in a table of the different ones if that is smaller.
        """
        if values.dtype.kind in "iu":
            most = int(values.max(initial=0))
            self._append(name, next(kind for kind in WHOLE if most <= np.iinfo(kind).max), values)
            return
        if values.dtype == np.float32:
            self._append(name, "float32", values)
            return
        table, places = np.unique(values, return_inverse=True)
        if len(table) <= FEW and len(table) < len(values) / 2:
            self._append(f"{name}.table", "float64", table)
            self.put(f"{name}.places", places)
        else:
            self._append(name, "float64", values)

    def _append(self, name: str, kind: str, values: np.ndarray) -> None:
        self.content.extend(bytes(-len(self.content) % ALIGNED))
        self.places[name] = {"type": kind, "start": len(self.content), "length": len(values)}
        self.content.extend(values.astype(np.dtype(kind).newbyteorder("<")).tobytes())


def evidence_files(counted: Counted) -> tuple[dict[str, Any], bytes, list[str]]:
    """Return the evidence of a catalogue in the form that the page reads.

    Numbers are those that the catalogue computes with, so that the page adds the same numbers in the same order.

    Args:
        counted: Evidence of the catalogue's items, all of them live, in their order.

    Returns:
        For the manifest: settings, ids of counted items outside the catalogue with their numbers, and the places of the
        arrays; the arrays; the words in the order of their numbers.
    """
    words, transitions, rule = counted.words, counted.transitions, counted.rule
    keys, totals = transitions.counts()
    first, second = np.divmod(keys, WIDTH)
    count = transitions.num_items
    arrays = Packed()
    # Number of the item of each row, counted from 1; 0 = none.
    numbers = np.zeros(len(words.live), np.int64)
    here = np.flatnonzero(counted.rows >= 0)
    numbers[counted.rows[here]] = here + 1
    arrays.put("numbers", numbers)
    arrays.put("pair_starts", np.searchsorted(first, np.arange(count + 1)))
    arrays.put("pair_items", second)
    arrays.put("pair_totals", totals * transitions.unit)
    arrays.put("out", np.maximum(transitions.out * transitions.unit, 1) ** rule.out_power)
    arrays.put("into", np.maximum(transitions.into * transitions.unit, 1) ** rule.in_power)
    if rule.linear and counted.linear is not None:
        linear = counted.linear
        places = np.minimum(np.arange(count + 1), linear.num_items)
        arrays.put("linear_starts", linear.starts[places])
        arrays.put("linear_items", linear.columns)
        arrays.put("linear_values", linear.values)
    arrays.put("popular", counted.popular)
    arrays.put("word_weights", counted.word_weights(np.arange(len(words.live))))
    arrays.put("word_starts", words.starts)
    arrays.put("word_columns", words.columns)
    arrays.put("rarity", words.rarity)
    outside = {counted.names[number]: int(number) for number in np.flatnonzero(counted.rows < 0)}
    manifest = {"rule": rule.to_dict(), "outside": outside, "items": count, "arrays": arrays.places}
    return manifest, bytes(arrays.content), list(words.vocabulary)


__all__ = ["evidence_files"]
