"""Rows side by side: labels of written text, padding, text infilling, and masked texts."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import BatchEncoding

IGNORED = -100
"""The label that no loss counts."""
PER_TARGET = frozenset({"click_labels", "rating_labels", "interaction_labels"})
MASKED_SHARE, MEAN_SPAN = 0.15, 3  # not given in the paper; ours (as in T5)
HIDDEN, REPLACED = 0.8, 0.1
"""Shares of a masked text's chosen tokens that [MASK] or any other token stands for; the rest stay (as in BERT)."""


def written_labels(input_ids: Sequence[int], ids: Mapping[str, int], text_token_id: int) -> list[int]:
    """Label what is written in a row: after [TEXT] up to and including [EOS], in each closed target.

    A row that opens with neither [BOS'] nor [BOS] is a plain document, and written throughout.

    Args:
        input_ids: One row without padding.
        ids: The tokenizer's `structural_ids`.
        text_token_id: The id of [TEXT].
    """
    openers = {ids["source_token_id"], ids["bos_token_id"]}
    if input_ids and input_ids[0] not in openers:
        return list(input_ids)
    labels = [IGNORED] * len(input_ids)
    in_target, start = False, None
    for place, index in enumerate(input_ids):
        if index in openers:
            in_target, start = index == ids["bos_token_id"], None
        elif in_target and start is None and index == text_token_id:
            start = place + 1
        elif index == ids["eos_token_id"] and start is not None:
            labels[start : place + 1] = input_ids[start : place + 1]
            in_target, start = False, None
    return labels


def pad(features: Sequence[Mapping[str, Any]], ids: Mapping[str, int], padding_side: str) -> dict[str, Any]:
    """Pad rows to the longest and make tensors of them.

    Args:
        features: Rows: `input_ids`, and what belongs to them. A row may lack labels that others have.
        ids: The tokenizer's `structural_ids`.
        padding_side: "right" or "left", for what is aligned with tokens; labels of targets always pad on the right.

    Raises:
        ValueError: There are no rows, or something in a row is neither aligned with its tokens nor a label.
    """
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side={padding_side!r}: expected 'left' or 'right'")
    if not features:
        raise ValueError("there are no rows to pad: give at least one request or feature")
    rows = [{name: _plain(value) for name, value in feature.items()} for feature in features]
    for row in rows:
        row.setdefault("attention_mask", [1] * len(row["input_ids"]))
        row.setdefault("layout_ids", row["input_ids"])
    pad_id = ids["pad_token_id"]
    fills = {"input_ids": pad_id, "layout_ids": pad_id}
    names = list(dict.fromkeys(name for row in rows for name in row))
    arrays = {}
    for name in names:
        values = [row.get(name) for row in rows]
        if _is_label(name) and not _aligned(name, values, rows):
            arrays[name] = _stack([_per_target(name, row, ids) for row in rows])
        else:
            fill = IGNORED if _is_label(name) else fills.get(name, 0)
            arrays[name] = _beside_tokens(name, rows, fill, padding_side)
    return dict(BatchEncoding(arrays, tensor_type="pt"))


def infilling(
    text_ids: Sequence[int], ids: Mapping[str, int], text_token_id: int, rng: np.random.Generator, max_length: int
) -> list[int]:
    """Write a text-infilling row: the text with spans masked as the source, the spans as the written target.

    Every draw comes from `rng`. A text too long for `max_length` is cut.
    """
    length = min(len(text_ids), max_length)
    while length and length + 2 * _spans(length)[0] + 6 > max_length:
        length -= 1
    if length == 0:
        raise ValueError(f"infilling needs a text, and max_length of at least 9 (it is {max_length})")
    count, masked = _spans(length)
    hidden = _parts(masked, count, rng, least=1)
    # Spans do not touch: two [MASK] in a row could not be told apart.
    between = _parts(length - masked - (count - 1), count + 1, rng, least=0)
    between[1:-1] += 1
    source, target, place = [], [], 0
    for kept, gone in zip(between, hidden):
        source += [*text_ids[place : place + kept], ids["mask_token_id"]]
        target += [*text_ids[place + kept : place + kept + gone], ids["segment_token_id"]]
        place += kept + gone
    source += text_ids[place:length]
    opened = [ids["source_token_id"], text_token_id, *source, ids["segment_token_id"], ids["source_end_token_id"]]
    return [*opened, ids["bos_token_id"], text_token_id, *target[:-1], ids["eos_token_id"]]


def masking(
    text_ids: Sequence[int], mask_token_id: int, ordinary: Sequence[int], rng: np.random.Generator
) -> tuple[list[int], list[int]]:
    """Hide some tokens of a text for a model that reads it in both directions.

    Args:
        text_ids: The text, one token at least.
        mask_token_id: The id of [MASK].
        ordinary: Ids of text, out of which replacements are drawn.
        rng: Where every draw comes from.

    Returns:
        The row as it is read, and its labels: the hidden ids at their own places.
    """
    row, labels = list(text_ids), [IGNORED] * len(text_ids)
    places = rng.choice(len(row), max(1, round(MASKED_SHARE * len(row))), replace=False)
    for place, draw in zip(places.tolist(), rng.random(len(places)).tolist()):
        labels[place] = row[place]
        if draw < HIDDEN:
            row[place] = mask_token_id
        elif draw < HIDDEN + REPLACED:
            row[place] = ordinary[int(rng.integers(len(ordinary)))]
    return row, labels


def _spans(length: int) -> tuple[int, int]:
    """How many spans to mask in a text of so many tokens, and how many tokens in all."""
    masked = max(1, round(MASKED_SHARE * length))
    count = max(1, min(round(masked / MEAN_SPAN), length - masked + 1))
    return count, masked


def _parts(total: int, count: int, rng: np.random.Generator, least: int) -> np.ndarray:
    """Split a total into `count` parts of at least `least`, all ways alike likely."""
    free = total - least * count
    cuts = np.sort(rng.choice(free + count - 1, count - 1, replace=False))
    return np.diff(np.concatenate(([-1], cuts, [free + count - 1]))) - 1 + least


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _is_label(name: str) -> bool:
    return name == "labels" or name.endswith("_labels")


def _aligned(name: str, values: Iterable[Any], rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether labels stand beside tokens; a target has two tokens at least, so that lengths cannot be mistaken."""
    if name in PER_TARGET:
        return False
    pairs = [(value, row["input_ids"]) for value, row in zip(values, rows) if value is not None]
    return all(isinstance(value, list) and len(value) == len(tokens) for value, tokens in pairs)


def _per_target(name: str, row: Mapping[str, Any], ids: Mapping[str, int]) -> list[Any]:
    value = row.get(name)
    if value is None:
        return []
    labels = value if isinstance(value, list) else [value]
    targets = list(row["input_ids"]).count(ids["bos_token_id"])
    if name in PER_TARGET and len(labels) != targets:
        raise ValueError(f"{name} has {len(labels)} labels, but its row has {targets} targets: give one for each")
    return labels


def _beside_tokens(name: str, rows: Sequence[Mapping[str, Any]], fill: int, padding_side: str) -> np.ndarray:
    width = max(len(row["input_ids"]) for row in rows)
    dtype = _dtype(row[name] for row in rows if row.get(name) is not None)
    table: np.ndarray = np.full((len(rows), width), fill, dtype=dtype)
    for number, row in enumerate(rows):
        value, length = row.get(name), len(row["input_ids"])
        if value is None:
            if name == "attention_mask" or not (_is_label(name) or name == "item_ids"):
                raise ValueError(f"row {number} lacks {name!r}, which other rows have")
            continue
        if not isinstance(value, list) or len(value) != length:
            raise ValueError(f"{name!r} of row {number} is not aligned with its {length} tokens, and no known label")
        where = slice(0, length) if padding_side == "right" else slice(width - length, width)
        table[number, where] = value
    return table


def _stack(rows: list[list[Any]]) -> np.ndarray:
    """Pad labels of targets on the right; each may be a number or a list of numbers."""
    width = max(map(len, rows))
    entries = [np.asarray(entry) for row in rows for entry in row]
    shape = next((entry.shape for entry in entries), ())
    table: np.ndarray = np.full((len(rows), width, *shape), IGNORED, dtype=_dtype(entries))
    for number, row in enumerate(rows):
        for place, entry in enumerate(row):
            table[number, place] = entry
    return table


def _dtype(values: Iterable[Any]) -> type:
    kinds = {np.asarray(value).dtype.kind for value in values}
    if kinds == {"b"}:
        return np.bool_
    return np.float32 if "f" in kinds else np.int64


__all__ = ["IGNORED", "infilling", "masking", "pad", "written_labels"]
