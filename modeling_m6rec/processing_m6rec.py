"""The processor: turns requests into padded rows of ids.

Its parts: labels of written text, padding, text infilling and masking; truncation of a request's segments to a row; and
`M6RecProcessor`, which formats, encodes, truncates and pads. They are one file, with a section for each, because a
checkpoint carries few files and all in one folder.
"""

import importlib
import os
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import BatchEncoding, ProcessorMixin
from transformers.utils import logging

from .atomic_m6rec import atomic_files
from .formatting_m6rec import (
    EVENT_KEYS,
    OTHER_TASKS,
    REQUEST_KEYS,
    WRITING_TASKS,
    Event,
    ItemNames,
    LRUCache,
    RequestFormatter,
    Segment,
    Talk,
    Turn,
    chat_template,
    check_list,
    check_mapping,
    check_moment,
    check_read,
    check_text,
    wrong_type,
)
from .tokenization_m6rec import KINDS, SLOT_TOKEN, M6RecTokenizer
from .values_m6rec import (
    IGNORE_INDEX,
    MAX_CANDIDATES,
    MAX_EVENTS,
    MAX_FACTS,
    SCORING_TASKS,
    labelled_task,
    normalize_id,
    rename_keys,
    short,
)

# ------------------------------------------------------------------------------------------------------------ batches


MASKED_SHARE, MEAN_SPAN = 0.15, 3  # not given in the paper; as in T5

HIDDEN, REPLACED = 0.8, 0.1
"""Shares of the selected tokens that [MASK] or a random token replaces; the rest stay unchanged (as in BERT)."""


def written_labels(input_ids: Sequence[int], ids: Mapping[str, int], text_token_id: int) -> list[int]:
    """Make the labels of a row's written text: after [TEXT] up to and including [EOS], in each closed target.

    A row that begins with neither [BOS'] nor [BOS] is a plain document: all its tokens are labels.

    Args:
        input_ids: One row without padding.
        ids: The tokenizer's `structural_ids`.
        text_token_id: The id of [TEXT].
    """
    openers = {ids["source_token_id"], ids["bos_token_id"]}
    if input_ids and input_ids[0] not in openers:
        return list(input_ids)
    labels = [IGNORE_INDEX] * len(input_ids)
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
    """Pad rows to the longest and convert them to tensors.

    Args:
        features: Rows with `input_ids` and further fields. A row may lack labels that other rows have.
        ids: The tokenizer's `structural_ids`.
        padding_side: "right" or "left", for fields aligned with tokens; labels of targets are always padded right.

    Raises:
        ValueError: If there are no rows, or a field is neither aligned with the tokens nor a label.
    """
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side={short(padding_side)}: expected 'left' or 'right'")
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
            fill = IGNORE_INDEX if _is_label(name) else fills.get(name, 0)
            same = name == "layout_ids" and all(row["layout_ids"] is row["input_ids"] for row in rows)
            arrays[name] = arrays["input_ids"].copy() if same else _beside_tokens(name, rows, fill, padding_side)
    return dict(BatchEncoding(arrays, tensor_type="pt"))


def infilling(
    text_ids: Sequence[int], ids: Mapping[str, int], text_token_id: int, rng: np.random.Generator, max_length: int
) -> list[int]:
    """Make a text-infilling row: the source is the text with masked spans, the written target the spans.

    All random numbers come from `rng`. A text too long for `max_length` is cut.
    """
    length = min(len(text_ids), max_length)
    while length and length + 2 * _spans(length)[0] + 6 > max_length:
        length -= 1
    if length == 0:
        raise ValueError(f"infilling needs a text, and max_length of at least 9 (it is {max_length})")
    count, masked = _spans(length)
    hidden = _parts(masked, count, rng, least=1)
    # Spans do not touch: two adjacent [MASK] would be ambiguous.
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
    """Mask some tokens of a text for a model with bidirectional document attention.

    Args:
        text_ids: The text, at least one token.
        mask_token_id: The id of [MASK].
        ordinary: Ids of text tokens, from which replacements are drawn.
        rng: Source of all random numbers.

    Returns:
        The masked row, and its labels: the original ids at the selected places.
    """
    row, labels = list(text_ids), [IGNORE_INDEX] * len(text_ids)
    places = rng.choice(len(row), max(1, round(MASKED_SHARE * len(row))), replace=False)
    for place, draw in zip(places.tolist(), rng.random(len(places)).tolist()):
        labels[place] = row[place]
        if draw < HIDDEN:
            row[place] = mask_token_id
        elif draw < HIDDEN + REPLACED:
            row[place] = ordinary[int(rng.integers(len(ordinary)))]
    return row, labels


def _spans(length: int) -> tuple[int, int]:
    """Return the number of spans to mask in a text of `length` tokens, and the total number of masked tokens."""
    masked = max(1, round(MASKED_SHARE * length))
    count = max(1, min(round(masked / MEAN_SPAN), length - masked + 1))
    return count, masked


def _parts(total: int, count: int, rng: np.random.Generator, least: int) -> np.ndarray:
    """Split a total into `count` parts of at least `least`, uniformly over all splits."""
    free = total - least * count
    cuts = np.sort(rng.choice(free + count - 1, count - 1, replace=False))
    return np.diff(np.concatenate(([-1], cuts, [free + count - 1]))) - 1 + least


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _is_label(name: str) -> bool:
    return name == "labels" or name.endswith("_labels")


def _aligned(name: str, values: Iterable[Any], rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether labels align with tokens; a target has at least two tokens, so that lengths are unambiguous."""
    if labelled_task(name):
        return False
    pairs = [(value, row["input_ids"]) for value, row in zip(values, rows) if value is not None]
    return all(isinstance(value, list) and len(value) == len(tokens) for value, tokens in pairs)


def _per_target(name: str, row: Mapping[str, Any], ids: Mapping[str, int]) -> list[Any]:
    value = row.get(name)
    if value is None:
        return []
    labels = value if isinstance(value, list) else [value]
    targets = list(row["input_ids"]).count(ids["bos_token_id"])
    if labelled_task(name) and len(labels) != targets:
        raise ValueError(f"{name} has {len(labels)} labels, but its row has {targets} targets: give one for each")
    return labels


def _beside_tokens(name: str, rows: Sequence[Mapping[str, Any]], fill: int, padding_side: str) -> np.ndarray:
    width = max(len(row["input_ids"]) for row in rows)
    arrays = [None if row.get(name) is None else np.asarray(row[name]) for row in rows]
    dtype = _dtype(array for array in arrays if array is not None)
    table: np.ndarray = np.full((len(rows), width), fill, dtype=dtype)
    for number, row in enumerate(rows):
        value, length = row.get(name), len(row["input_ids"])
        if value is None:
            if name == "attention_mask" or not (_is_label(name) or name == "item_embedding_ids"):
                raise ValueError(f"row {number} lacks {name!r}, which other rows have")
            continue
        if not isinstance(value, list) or len(value) != length:
            raise ValueError(f"{name!r} of row {number} is not aligned with its {length} tokens, and no known label")
        where = slice(0, length) if padding_side == "right" else slice(width - length, width)
        table[number, where] = arrays[number]
    return table


def _stack(rows: list[list[Any]]) -> np.ndarray:
    """Pad labels of targets on the right; a label may be a number or a list of numbers."""
    width = max(map(len, rows))
    entries = [np.asarray(entry) for row in rows for entry in row]
    shape = next((entry.shape for entry in entries), ())
    table: np.ndarray = np.full((len(rows), width, *shape), IGNORE_INDEX, dtype=_dtype(entries))
    for number, row in enumerate(rows):
        for place, entry in enumerate(row):
            table[number, place] = entry
    return table


def _dtype(values: Iterable[Any]) -> type:
    kinds = {np.asarray(value).dtype.kind for value in values}
    if kinds == {"b"}:
        return np.bool_
    return np.float32 if "f" in kinds else np.int64


# --------------------------------------------------------------------------------- rows of segments, shortened to fit


NEAR = 8
"""Number of tokens checked before and after a cut: a character has no more tokens."""


@dataclass(slots=True)
class Truncation:
    """Content left out of a row: the number of events, and (place, field) of each text dropped or, as "text", cut."""

    events: int = 0
    fields: list[tuple[str, str]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.events or self.fields)


@dataclass(slots=True)
class EncodedRow:
    """One request as a row of ids, with its text.

    Attributes:
        input_ids: The row.
        item_embedding_ids: For each id the row of item embeddings, 0 = none.
        segments: (kind, text) of each segment, in the row's order.
        dropped: Content that did not fit.
        events: (start, end) of each event's tokens in the row.
        pieces: Ids of each segment and its row of item embeddings, in the same order as `segments`.
    """

    input_ids: list[int]
    item_embedding_ids: list[int]
    segments: list[tuple[str, str]]
    dropped: Truncation
    events: list[tuple[int, int]] = field(default_factory=list)
    pieces: list[tuple[tuple[int, ...], int]] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The segments in one line."""
        return " ".join(f"[{kind.upper()}] {text}" for kind, text in self.segments)


@dataclass(slots=True)
class EncodedSegment:
    """A segment, its place in the request and, once encoded, its ids: `head` + `body` + `tail`.

    The body is the text that may be cut; `cut` marks that it was cut, `fixed` that it cannot be cut further. A `kept`
    segment is never dropped.
    """

    segment: Segment
    place: str = ""
    head: Sequence[int] = ()
    body: Sequence[int] = ()
    tail: Sequence[int] = ()
    cut: bool = False
    fixed: bool = False
    kept: bool = False

    def __len__(self) -> int:
        return len(self.head) + len(self.body) + len(self.tail)


@dataclass(slots=True)
class RequestParts:
    """The segments of a request before truncation: the source's start, events and end, then the targets.

    With `gaps`, [AGE] is the time since the previous event, so that the first event has none. With `closed`, targets
    end with [EOS].
    """

    start: list[EncodedSegment]
    events: list[list[EncodedSegment]]
    end: list[EncodedSegment]
    targets: list[list[EncodedSegment]]
    gaps: bool = True
    closed: bool = True
    dropped: Truncation = field(default_factory=Truncation)

    def slots(self) -> Iterator[EncodedSegment]:
        """Yield all segments, in the row's order."""
        yield from self.start
        for group in (*self.events, self.end, *self.targets):
            yield from group


class Truncator:
    """Encodes the parts of a request, truncates them to the allowed length and writes the row.

    First it makes room for the longest target, up to half of `max_length`. It drops, as far as necessary and in this
    order: turns and facts that fill more than half of the row (the oldest turns, then the last facts); the oldest
    events; more turns and facts; whole fields of items in the source. Then, until everything fits, it drops whole
    fields of candidates and of items in the source, the longest first, and cuts the ends of the longest texts. The last
    turn, the first fact and the first field of an item may be cut but are never dropped; the same holds for the newest
    event if there is room for one token of each text. The last turn is cut at its beginning, behind the speaker's
    label, so that the end of what was asked stays. The time is O(n log n) in the size of the request.

    Args:
        ids: The tokenizer's `structural_ids`.
        kinds: Id of the kind token of each kind of segment.
        encode: Function that turns texts into ids.
        decode: Function that turns ids into a text.
        max_length: Most tokens of a source with its longest target.
        truncation_stride: Number of events that are dropped at a time.
        max_segment: Most tokens of a segment, to which its text is cut first; None = no limit.
    """

    def __init__(
        self,
        ids: dict[str, int],
        kinds: dict[str, int],
        encode: Callable[[Sequence[str]], Sequence[Sequence[int]]],
        decode: Callable[[Sequence[int]], str],
        max_length: int,
        truncation_stride: int = 1,
        max_segment: int | None = None,
    ) -> None:
        self.ids, self.encode, self.decode, self.max_length = ids, encode, decode, max_length
        self.truncation_stride, self.max_segment = truncation_stride, max_segment
        self._heads = {kind: (index,) for kind, index in kinds.items()}
        self._segment_end = (ids["segment_token_id"],)

    def read(self, draft: RequestParts) -> EncodedRow:
        """Truncate a draft, which is modified, and write its row.

        Raises:
            ValueError: If it does not fit even after all permitted truncation.
        """
        if self._is_whole(draft):
            return self._write(draft)
        for slot in draft.slots():
            self._fill(slot, draft.dropped)
        if self._excess(draft) > 0:
            start, given, before = draft.start, [(slot, slot.segment) for slot in draft.slots()], draft.dropped.events
            events = len(draft.events)
            self._fit(draft)
            if self._excess(draft) > 0 and draft.events:  # no event fits
                draft.start, draft.events, draft.dropped = start, [], Truncation(before + events)
                for slot, slot.segment in given:
                    slot.cut = slot.fixed = False
                    self._fill(slot, draft.dropped)
                self._fit(draft)
        if (excess := self._excess(draft)) > 0:
            raise ValueError(
                f"the request needs {self.max_length + excess} tokens when all that may be dropped is, "
                f"but max_length is {self.max_length}: give fewer statistics, or raise max_length"
            )
        return self._write(draft)

    def _is_whole(self, draft: RequestParts) -> bool:
        """Whether everything fits as it is, so that no segment has to be taken apart; encodes new segments."""
        longest = 0

        def length(slots: Iterable[EncodedSegment]) -> int:
            nonlocal longest
            total = 0
            for slot in slots:
                ids = slot.segment.ids
                if ids is None:
                    ids = self._whole(slot.segment)
                longest = max(longest, len(ids))
                total += len(ids)
            return total

        source = 2 + length(draft.start) + length(draft.end) + sum(map(length, draft.events))
        target = max((length(own) + 1 + draft.closed for own in draft.targets), default=0)
        return source + target <= self.max_length and (self.max_segment is None or longest <= self.max_segment)

    def _fit(self, draft: RequestParts) -> None:
        self._drop_events(draft)
        self._drop_fields(draft)
        self._cut_texts(draft)

    def _fill(self, slot: EncodedSegment, dropped: Truncation) -> None:
        slot.head, slot.body, slot.tail = self._encoded(slot.segment)
        if self.max_segment is not None:
            self._shorten(slot, self.max_segment - len(slot.head) - len(slot.tail), dropped)

    def _encoded(self, segment: Segment) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
        """Return the ids of a segment: those before its text, of the text, and after it."""
        head: Sequence[int] = self._heads[segment.kind]
        tail = () if segment.written else self._segment_end
        if segment.lead:
            head = (*head, *self.encode([segment.lead])[0])
        if segment.kind == "option":  # the parts are tokens, not text
            first = self.ids["first_option_token_id"]
            return (*head, *range(first, first + len(segment.parts))), (), tail
        return head, self._body(segment), tail

    def _whole(self, segment: Segment) -> tuple[int, ...]:
        """Return the ids of a segment that is not cut, and keep them with it."""
        if segment.ids is None:
            segment.keep_ids(tuple(index for part in self._encoded(segment) for index in part))
        assert segment.ids is not None
        return segment.ids

    def _body(self, segment: Segment) -> Sequence[int]:
        if segment.slot is None:
            return self.encode([segment.text])[0] if segment.text else ()
        rows = [self.encode([text])[0] if text else () for text in segment.texts]
        return (*rows[0], self.ids["slot_token_id"], *rows[1])

    # Lengths

    def _room(self, draft: RequestParts) -> int:
        """Return the number of tokens that a target may have."""
        source = 2 + _length(draft.start) + _length(draft.end) + sum(map(_length, draft.events))
        return self.max_length - source - (1 + draft.closed if draft.targets else 0)

    def _excess(self, draft: RequestParts) -> int:
        """Return the number of tokens by which source and longest target exceed the row."""
        return max(map(_length, draft.targets), default=0) - self._room(draft)

    def _half_excess(self, draft: RequestParts) -> int:
        """Like `_excess`, with half a row in place of a longer target."""
        return min(max(map(_length, draft.targets), default=0), self.max_length // 2) - self._room(draft)

    # Truncation

    def _drop_events(self, draft: RequestParts) -> None:
        """Drop turns, facts and events to bring `_half_excess` to 0 or below."""
        excess = self._half_excess(draft)
        self._drop_spare(draft, min(excess, _length(draft.start) - self.max_length // 2))
        excess, gone = self._half_excess(draft), 0
        while gone < len(draft.events) - 1 and (excess > 0 or gone < up_to_whole(gone, self.truncation_stride)):
            excess -= _length(draft.events[gone])
            gone += 1
            if draft.gaps:  # as if the dropped events did not exist
                first = draft.events[gone]
                draft.events[gone] = [slot for slot in first if slot.segment.kind != "age"]
                excess -= _length(first) - _length(draft.events[gone])
        draft.events = draft.events[gone:]
        draft.dropped.events += gone
        self._drop_spare(draft, excess)

    @staticmethod
    def _drop_spare(draft: RequestParts, excess: int) -> None:
        """Drop the oldest turns, except the last turn, then the last facts, except the first fact."""
        spare = [slot for slot in draft.start if not slot.kept]
        turns, facts = ([slot for slot in spare if slot.segment.kind == kind] for kind in ("text", "fact"))
        gone = set()
        for slot in [*turns[:-1], *reversed(facts[1:])]:
            if excess <= 0:
                break
            excess -= len(slot)
            gone.add(id(slot))
            draft.dropped.fields.append((slot.place, "text"))
        draft.start = [slot for slot in draft.start if id(slot) not in gone]

    def _drop_fields(self, draft: RequestParts) -> None:
        """Drop whole fields of items."""
        source = [*draft.start, *(slot for event in draft.events for slot in event), *draft.end]
        self._drop_longest(source, self._half_excess(draft), draft.dropped)
        room = self._room(draft)
        for target in draft.targets:
            self._drop_longest(target, _length(target) - room, draft.dropped)
        self._drop_longest(source, self._excess(draft), draft.dropped)

    def _drop_longest(self, slots: list[EncodedSegment], excess: int, dropped: Truncation) -> None:
        """Drop the longest fields of items, as few as necessary; an item's first field, its name, stays."""
        if excess <= 0:
            return
        items = [slot for slot in slots if slot.segment.is_item]
        whole, room = [slot.segment for slot in items], _length(items) - excess
        parts = [(place, index) for place, segment in enumerate(whole) for index in range(1, len(segment.parts))]
        lengths = map(len, self.encode([whole[place].parts[index] for place, index in parts]))
        order = [part for _, part in sorted(zip(lengths, parts), key=lambda entry: -entry[0])]

        def length(count: int) -> int:
            """Drop the first `count` fields of `order`; return the number of remaining tokens."""
            gone = set(order[:count])
            for place, (slot, segment) in enumerate(zip(items, whole)):
                kept = [index for index in range(len(segment.parts)) if (place, index) not in gone]
                if len(kept) != len(slot.segment.parts):
                    slot.segment = segment.only(kept) if len(kept) < len(segment.parts) else segment
                    slot.cut = False
                    self._fill(slot, Truncation())  # its cut text is recorded already
            return _length(items)

        few = bisect_left(range(len(order)), True, key=lambda count: length(count) <= room)
        length(few)
        dropped.fields += [(items[place].place, whole[place].names[index]) for place, index in order[:few]]

    def _cut_texts(self, draft: RequestParts) -> None:
        """Cut the longest texts of source and longest target to a common length, then those of other targets."""
        source = [*draft.start, *(slot for event in draft.events for slot in event), *draft.end]
        while (excess := self._excess(draft)) > 0:
            if not self._cut(source + max(draft.targets, key=_length, default=[]), excess, draft.dropped):
                return
            room = self._room(draft)
            for target in draft.targets:
                self._cut(target, _length(target) - room, draft.dropped)

    def _cut(self, slots: list[EncodedSegment], excess: int, dropped: Truncation) -> bool:
        """Cut texts; return whether any text could be cut."""
        slots = [slot for slot in slots if len(slot.body) > 1 and not slot.fixed]
        if excess <= 0 or not slots:
            return False
        lengths = [len(slot.body) for slot in slots]
        # The largest length, at least 1, that removes enough; the last texts keep one token more if that is too much.
        level = bisect_left(range(1, max(lengths)), True, key=lambda own: _above(lengths, own + 1) < excess) + 1
        longest = [slot for slot in slots if len(slot.body) > level]
        spared = max(0, _above(lengths, level) - excess)
        for place, slot in enumerate(longest):
            self._shorten(slot, level + (place >= len(longest) - spared), dropped)
        return True

    def _shorten(self, slot: EncodedSegment, count: int, dropped: Truncation) -> None:
        """Cut a text to `count` tokens, or fewer if it would end inside a character.

        A text with a label loses the tokens after the label, so that the end of what was said stays.
        """
        if count >= len(slot.body):
            return
        body = (
            self._end_of(slot, count) if slot.segment.label else slot.body[: self._whole_characters(slot.body, count)]
        )
        if not body:
            slot.fixed = True
            return
        if not slot.cut:
            dropped.fields.append((slot.place, "text"))
        slot.body, slot.cut = body, True

    def _end_of(self, slot: EncodedSegment, count: int) -> Sequence[int]:
        """Return the label and the last tokens, `count` in all or fewer; nothing if no whole character fits."""
        label = self.encode([slot.segment.label])[0]
        for start in range(len(slot.body) - count + len(label), len(slot.body)):
            around = slot.body[max(0, start - NEAR) : start + NEAR]
            if self.decode(around).endswith(self.decode(slot.body[start : start + NEAR])):
                return (*label, *slot.body[start:])
        return ()

    def _whole_characters(self, ids: Sequence[int], count: int) -> int:
        """Return the largest number of tokens up to `count` that does not end inside a character; 0 if none."""
        for kept in range(count, 0, -1):
            start = max(0, kept - NEAR)
            if self.decode(ids[start : kept + NEAR]).startswith(self.decode(ids[start:kept])):
                return kept
        return 0

    def _write(self, draft: RequestParts) -> EncodedRow:
        reading = EncodedRow([], [], [], draft.dropped)
        ids = self.ids
        reading.input_ids.append(ids["source_token_id"])
        for slot in draft.start:
            self._put(slot, reading)
        for event in draft.events:
            begin = len(reading.input_ids)
            for slot in event:
                self._put(slot, reading)
            reading.events.append((begin, len(reading.input_ids)))
        for slot in draft.end:
            self._put(slot, reading)
        reading.input_ids.append(ids["source_end_token_id"])
        for target in draft.targets:
            reading.input_ids.append(ids["bos_token_id"])
            for slot in target:
                self._put(slot, reading)
            if draft.closed:
                reading.input_ids.append(ids["eos_token_id"])
        memory = reading.item_embedding_ids
        memory += [0] * (len(reading.input_ids) - len(memory))
        return reading

    def _put(self, slot: EncodedSegment, reading: EncodedRow) -> None:
        """Write one segment; an item's row of item embeddings is at its last token."""
        row, segment, memory = reading.input_ids, slot.segment, reading.item_embedding_ids
        ids = (*slot.head, *slot.body, *slot.tail) if slot.cut else self._whole(segment)
        row += ids
        text = self.decode(slot.body) if slot.cut else segment.text
        reading.segments.append((segment.kind, segment.lead + text if segment.lead else text))
        item = segment.row if segment.kind == "item" else 0
        if item:
            memory += [0] * (len(row) - 1 - len(memory))
            memory.append(item)
        reading.pieces.append((ids, item))


def up_to_whole(count: int, step: int) -> int:
    """Round up to a multiple of a step.

    >>> up_to_whole(5, 4)
    8
    """
    return -(-count // step) * step


def _length(slots: list[EncodedSegment]) -> int:
    return sum(map(len, slots))


def _above(lengths: list[int], level: int) -> int:
    """Sum the excess of lengths over a level."""
    return sum(length - level for length in lengths if length > level)


# ------------------------------------------------------------------------------------------------------ the processor


logger = logging.get_logger(__name__)

FORMAT_VERSION = 2
"""Format version of processor_config.json, written as `format_version`; absent = 1. A change that older code would
misread raises it; unknown fields are ignored. Format 2: templates with the keys `OPTIONAL` of `formatting_m6rec`."""

KEPT_TEXTS = 200_000
"""Number of texts whose ids are cached, since logs repeat texts."""


class M6RecProcessor(ProcessorMixin):
    """Turns recommendation requests into rows of ids: `[BOS'] user side [EOS']`, then `[BOS] candidate [EOS]` for each.

    A request is a text (who the user is) or a mapping with any of these keys:

    - `user`: a text or fields;
    - `history`: events, oldest first; an event is an item's text or a mapping with `event` (the verb), `item`,
      `timestamp`, `rating`, and `query` or `text`;
    - `now`: a text or fields such as `date`, `place`, `weather`, `timestamp`;
    - `facts`: texts;
    - `candidates`: items, each with `stats` if it has any;
    - `messages`: a conversation of chat messages, the last events of the history for all tasks but `conversation`;
    - `text`: what a writing task writes, or the turns of a conversation;
    - `mention`: `features` of the item, or `events` of the user, that the lead of an explanation names.

    An item is a text or fields; its `item_id` is not part of the text. A key with value None counts as absent. Writing
    tasks read `text`, other tasks refuse it. `retrieval` ignores candidates, and only scoring tasks read their `stats`:
    a warning is logged once. `values_m6rec` defines the size limits of a request.

    Args:
        tokenizer: A tokenizer with the tokens of requests.
        template: Template for the text of requests, see `load_template`; None = e-commerce in English.
        max_length: Most tokens of a source with its longest target.
        max_events: Most events of a history.
        time: Time of an event: "gap" since the previous event (for causal history), or "ago", the time before now.
        item_rows: Rows of item embeddings by item id, from 1; they must not change later. None = no item embeddings.
        options: Number of option tokens in the source of scoring tasks; True = all of the tokenizer.
        truncation_stride: Number of oldest events that are dropped at a time if a history is too long: cached prefixes
            of a user (`UserStates`) stay valid until the next drop. 1 = as few as necessary.
        max_segment: Most tokens of a segment, such as an item; a longer text is cut at the end. A model with learned
            positions cannot read longer segments than it has positions. None = no limit.
    """

    def __init__(  # noqa: PLR0913  its parameters are saved by name
        self,
        tokenizer: M6RecTokenizer,
        template: dict[str, Any] | None = None,
        max_length: int = 1024,
        max_events: int = 50,
        time: str = "gap",
        item_rows: dict[str, int] | None = None,
        options: int | bool = False,
        truncation_stride: int = 1,
        max_segment: int | None = None,
    ) -> None:
        # Parameters are positional and equal the attributes: ProcessorMixin saves and restores them by these names.
        self.template = _default_template() if template is None else template
        self.max_length = max_length
        self.max_events = max_events
        self.time = time
        self.truncation_stride = truncation_stride
        self.max_segment = max_segment
        self.item_rows = None if item_rows is None else _rows_by_id(item_rows)
        super().__init__(tokenizer)
        self._ids = tokenizer.structural_ids
        self.options = self._ids["num_options"] if options is True else int(options)
        self._check()
        slot = tokenizer.slot_token_id
        self._markers = self._ids if slot is None else {**self._ids, "slot_token_id": slot}
        self._kinds = {kind: self._ids["first_kind_token_id"] + place for place, kind in enumerate(KINDS)}
        self._wording = RequestFormatter(self.template, self.item_rows)
        self._names = ItemNames(self._wording)
        self._texts = LRUCache(KEPT_TEXTS)
        if tokenizer.chat_template is None:
            tokenizer.chat_template = chat_template(self.template["tasks"], tokenizer.get_added_vocab())

    @classmethod
    def from_template(
        cls, tokenizer: M6RecTokenizer, domain: str = "ecommerce", language: str = "en", **kwargs: Any
    ) -> "M6RecProcessor":
        """Make a processor with one of the package's templates; `kwargs` go to the constructor."""
        return cls(tokenizer, template=_templates().load_template(domain, language), **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Save tokenizer, template and code atomically. Arguments as in `ProcessorMixin.save_pretrained`.

        Returns:
            The paths of the files that the library reports.
        """
        with atomic_files(save_directory) as partial:
            files = super().save_pretrained(str(partial)) or []
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", None) or Path(save_directory).name, **kwargs)
        return [str(Path(save_directory) / Path(file).relative_to(partial)) for file in files]

    def to_dict(self) -> dict[str, Any]:
        """Serialise, including the format version."""
        return {**super().to_dict(), "format_version": FORMAT_VERSION}

    @classmethod
    def from_args_and_dict(cls, args: Sequence[Any], processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a processor from its tokenizer and a checkpoint's settings, unless a newer version wrote them.

        Raises:
            ValueError: If the format version is unknown.
        """
        fields = rename_keys(processor_dict)
        found = fields.pop("format_version", 1)
        if not isinstance(found, int) or found > FORMAT_VERSION:
            raise ValueError(
                f"processor_config.json is of format {found!r}, which a newer version wrote: this one reads formats "
                f"up to {FORMAT_VERSION}. Upgrade (pip install --upgrade m6rec), or load with trust_remote_code=True "
                "in a process that does not import m6rec, so that the code which the checkpoint carries is used"
            )
        return super().from_args_and_dict(args, fields, **kwargs)

    def _check(self) -> None:
        if self.max_length < 8:
            raise ValueError(f"max_length={self.max_length} is too small for any request: give 8 or more")
        if self.max_events < 1:
            raise ValueError(f"max_events={self.max_events}: give 1 or more")
        if not 1 <= self.truncation_stride <= self.max_events:
            raise ValueError(f"truncation_stride={self.truncation_stride} is not in 1..{self.max_events} (max_events)")
        if self.max_segment is not None and self.max_segment < 8:
            raise ValueError(f"max_segment={self.max_segment} is too small for any text: give 8 or more, or None")
        if self.time not in ("gap", "ago"):
            raise ValueError(f"time={self.time!r}: expected 'gap' or 'ago'")
        if not 0 <= self.options <= self._ids["num_options"]:
            raise ValueError(f"options={self.options}, but the tokenizer has {self._ids['num_options']} option tokens")
        wrong = {key: row for key, row in (self.item_rows or {}).items() if type(row) is not int or row < 1}
        if wrong:
            raise ValueError(f"item_rows: rows are whole numbers from 1 up (0 = unknown), got {wrong}")

    def __call__(
        self,
        requests: str | Mapping[str, Any] | Iterable[str | Mapping[str, Any]],
        task: str = "click",
        return_tensors: str | None = None,
        padding_side: str = "right",
    ) -> BatchEncoding:
        """Encode requests as a batch; a single request is a batch of one.

        Args:
            requests: One request or several.
            task: A scoring task, retrieval, plausibility or a writing task; it decides the targets.
            return_tensors: "pt" = padded tensors, None = lists of unpadded rows.
            padding_side: The side to pad; generation requires "left".
        """
        several = [requests] if isinstance(requests, str | Mapping) else list(requests)
        features = [self._feature(reading) for reading in self.read_many(several, task)]
        if return_tensors == "pt":
            return BatchEncoding(self.pad(features, padding_side))
        if return_tensors is not None:
            raise ValueError(f"return_tensors={short(return_tensors)}: expected 'pt' or None")
        names = ["input_ids", "attention_mask", "layout_ids"] + ["item_embedding_ids"] * (self.item_rows is not None)
        return BatchEncoding({name: [feature[name] for feature in features] for name in names})

    def _feature(self, reading: EncodedRow) -> dict[str, list[int]]:
        ids = reading.input_ids
        feature = {"input_ids": ids, "attention_mask": [1] * len(ids), "layout_ids": list(ids)}
        return feature if self.item_rows is None else {**feature, "item_embedding_ids": reading.item_embedding_ids}

    def read(self, request: str | Mapping[str, Any], task: str = "click") -> EncodedRow:
        """Encode one request: its row, its text, and the dropped content.

        Raises:
            ValueError: If a part of the request is invalid (the message names its place), or the request cannot fit.
            TypeError: If a part has the wrong type.
        """
        return self.read_many([request], task)[0]

    def read_many(self, requests: Sequence[str | Mapping[str, Any]], task: str = "click") -> list[EncodedRow]:
        """Encode several requests at once, which is faster than one by one."""
        if task not in (*SCORING_TASKS, *OTHER_TASKS):
            raise ValueError(f"unknown task {task!r}; known tasks: {', '.join((*SCORING_TASKS, *OTHER_TASKS))}")
        drafts = [self._draft(request, task) for request in requests]
        return self._read_drafts(drafts)

    def encode_items(self, items: Iterable[str | Mapping[str, Any]]) -> list[list[int]]:
        """Encode standalone items, each as `[ITEM] text [SEG]`, with the same ids as anywhere in a request."""
        segments = [self._wording.item(item, f"items[{index}]") for index, item in enumerate(items)]
        drafts = [
            RequestParts([EncodedSegment(segment, f"items[{index}]")], [], [], [])
            for index, segment in enumerate(segments)
        ]
        return [reading.input_ids[1:-1] for reading in self._read_drafts(drafts)]

    def item_texts(self, items: Iterable[str | Mapping[str, Any]]) -> list[str]:
        """Return the full texts of items; `EncodedRow.segments` holds the texts as cut in a row."""
        return [self._wording.item(item, f"items[{index}]").text for index, item in enumerate(items)]

    def history_items(self, request: Mapping[str, Any]) -> list[str | Mapping[str, Any]]:
        """Return the items of a request's history unchanged.

        Raises:
            ValueError: If an event or an item is invalid; the message names its place.
            TypeError: If one has the wrong type.
        """
        items = []
        for number, event in enumerate(check_list(request.get("history"), "history", MAX_EVENTS)):
            item, place = event, f"history[{number}]"
            if not isinstance(event, str):
                item, place = check_mapping(event, place, EVENT_KEYS).get("item"), f"{place}.item"
            if item is not None:
                self._wording.item(item, place)
                items.append(item)
        return items

    def forget_texts(self) -> None:
        """Drop the cached ids and formatted parts of earlier requests, such as after a user's data were deleted."""
        self._texts = LRUCache(KEPT_TEXTS)
        self._wording = RequestFormatter(self.template, self.item_rows)
        self._names = ItemNames(self._wording)

    @property
    def names(self) -> ItemNames:
        """Compares items by their text, for items without ids."""
        return self._names

    def item_row(self, item: str | Mapping[str, Any]) -> int:
        """Return an item's row of item embeddings, 0 = none."""
        return self._wording.item_row(item)

    def labels(self, reading: EncodedRow | Sequence[int]) -> list[int]:
        """Make the labels of one row's written text: after [TEXT] up to and including [EOS], in each closed target."""
        row = reading.input_ids if isinstance(reading, EncodedRow) else list(reading)
        return written_labels(row, self._ids, self._kinds["text"])

    def written_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts as a model writes them after the lead of a task: with the template's `join` in front.

        The ids of a text that follows a lead equal these ids in every row, so that a trie may be made of them.
        """
        return self._encode([self._wording.written(check_text(text, f"texts[{i}]")) for i, text in enumerate(texts)])

    def blank_field(self, request: Mapping[str, Any]) -> str:
        """Return the field of the candidate that task "content" writes: the first that is given as None.

        Raises:
            ValueError: If there is none.
        """
        return self._wording.blank_field(request)

    def plausibility_lead(self) -> list[int]:
        """Encode the words that precede an item's text in task "plausibility"."""
        words = self.template["tasks"]["plausibility"].format(item="\0").partition("\0")[0]
        return self._encode([words.rstrip()])[0]

    def document(self, text: str) -> tuple[list[int], list[int]]:
        """Make a plain row of a text, with [EOS] at the end, and its labels; a text longer than `max_length` is cut."""
        row = [
            *self._encode([check_text(text, "text", limited=False)])[0][: self.max_length - 1],
            self._ids["eos_token_id"],
        ]
        return row, list(row)

    def infill(self, text: str, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """Make a text-infilling row and its labels: spans of the text are masked; the target contains them.

        Args:
            text: The text; it is cut to fit `max_length`.
            rng: Source of all random numbers.
        """
        text_ids = self._encode([check_text(text, "text", limited=False)])[0]
        row = infilling(text_ids, self._ids, self._kinds["text"], rng, self.max_length)
        return row, self.labels(row)

    def messages_of(self, request: Mapping[str, Any]) -> list[dict[str, str]]:
        """Return the turns of a request's conversation as chat messages, without the instruction."""
        roles = {"user": "user", "system": "assistant"}
        return [
            {"role": roles[turn.role], "content": turn.content}
            for turn in self._wording.talk(request, "conversation").turns
        ]

    def with_turns(self, request: Mapping[str, Any], task: str) -> Mapping[str, Any]:
        """Return a request whose messages are the last events of its history, as all but conversations read them."""
        return self._wording.with_turns(request, task)

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        *args: Any,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = None,
        **parts: Any,
    ) -> Any:
        """Encode chat messages as the prompt of the recommender's next turn, padded on the left.

        With `tokenize` and `return_dict` this equals
        `processor({"messages": conversation}, "conversation", return_tensors, "left")`. If the
        recommender's turn is the last message, the row contains it and is closed, as in training.

        Args:
            conversation: Messages `{"role": ..., "content": ...}` with the roles "system", "user" and "assistant", or
                several conversations.
            chat_template: None; conversations are formatted by the processor's own template.
            *args: None; the order of the library's further parameters differs between releases.
            tokenize: Return ids; False = the text of the row, with the names of special tokens.
            return_dict: Return all inputs of the model; False = only `input_ids`.
            return_tensors: "pt" = padded tensors, None = lists.
            **parts: Other keys of the request, such as `history`; `add_generation_prompt` is ignored, since the row
                of a conversation always opens the recommender's turn.

        Raises:
            ValueError: A `chat_template` is given.
            TypeError: More than these two parameters are given by their place.
        """
        if chat_template is not None:
            raise ValueError("chat_template: the processor formats conversations by its own template; leave it out")
        if args:
            raise TypeError(f"expected the parameters after chat_template by name, got {len(args)} by place")
        parts.pop("add_generation_prompt", None)
        several = bool(conversation) and isinstance(conversation[0], list | tuple)
        talks = conversation if several else [conversation]
        requests = [{**parts, "messages": [*talk]} for talk in talks]
        if not tokenize:
            rows = self(requests, "conversation")["input_ids"]
            texts = self.tokenizer.batch_decode(rows)
            return texts if several else texts[0]
        batch = self(requests, "conversation", return_tensors, "left")
        return batch if return_dict else batch["input_ids"]

    def pad(self, features: Sequence[Mapping[str, Any]], padding_side: str = "right") -> dict[str, Any]:
        """Pad rows to the longest; all padding happens here.

        Fields aligned with tokens are padded on `padding_side`: ids with the pad id, `attention_mask` and
        `item_embedding_ids` with 0, labels with -100. Labels of targets (`click_labels`, ...) are padded with -100 on
        the right. Rows without a label that other rows have get -100. `layout_ids` are always added.

        Args:
            features: Rows as mappings of lists, including `input_ids`.
            padding_side: "right" or "left".
        """
        return pad(features, self._ids, padding_side)

    # Encoding

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer.encode_texts(texts)

    def _read_drafts(self, drafts: Sequence[RequestParts]) -> list[EncodedRow]:
        """Encode all texts that are not cached in one call, then truncate and write each draft."""
        segments = [slot.segment for draft in drafts for slot in draft.slots() if slot.segment.ids is None]
        texts = {text for segment in segments for text in segment.texts} | {segment.lead for segment in segments}
        found = {text: self._texts.find(text) for text in texts}
        missing = [text for text, ids in found.items() if ids is None]
        for text, ids in zip(missing, self._encode(missing) if missing else ()):
            found[text] = ids
            self._texts.keep(text, ids)

        def encode(texts: Sequence[str]) -> list[list[int]]:
            if len(texts) == 1 and texts[0] in found:
                return [found[texts[0]]]
            known = {text: self._texts.find(text) for text in texts if text not in found}
            new = [text for text, ids in known.items() if ids is None]
            found.update({**known, **dict(zip(new, self._encode(new) if new else ()))})
            return [found[text] for text in texts]

        limits = (self.max_length, self.truncation_stride, self.max_segment)
        fitter = Truncator(self._markers, self._kinds, encode, self._decode, *limits)
        return [fitter.read(draft) for draft in drafts]

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode_text(ids)

    # Segments of a request, in order

    def _draft(self, request: str | Mapping[str, Any], task: str) -> RequestParts:
        parts = check_mapping({"user": request} if isinstance(request, str) else request, "request", REQUEST_KEYS)
        check_read(parts, task)
        parts = self._wording.with_turns(parts, task)
        history = check_list(parts.get("history"), "history", MAX_EVENTS)
        skipped = up_to_whole(max(0, len(history) - self.max_events), self.truncation_stride)
        events = [
            self._wording.event(event, f"history[{place}]") for place, event in enumerate(history[skipped:], skipped)
        ]
        moment = self._moment(parts.get("now"))
        slots, since = self._events(events, moment, skipped)
        talk = self._wording.talk(parts, task)
        targets = self._targets(parts, task, talk)
        turns, silent = self._past_turns(talk, task)
        now = self._wording.now(parts.get("now"), since if self.time == "gap" else None)
        # Segments other than events and [NOW] come first: an event ends with the next event, [NOW] or [EOS'], and with
        # causal history earlier tokens must not move when an event is appended.
        return RequestParts(
            start=[*self._user(parts), *self._options(task), *turns],
            events=slots,
            end=[] if now is None else [EncodedSegment(now, "now")],
            targets=targets,
            gaps=self.time == "gap",
            closed=task not in WRITING_TASKS or bool(targets[0][-1].segment.text),
            dropped=Truncation(events=skipped, fields=silent),
        )

    def _user(self, parts: Mapping[str, Any]) -> list[EncodedSegment]:
        user = self._wording.user(parts.get("user"))
        facts = enumerate(check_list(parts.get("facts"), "facts", MAX_FACTS))
        slots = [] if user is None else [EncodedSegment(user, "user")]
        return slots + [
            EncodedSegment(Segment("fact", check_text(fact, f"facts[{i}]")), f"facts[{i}]") for i, fact in facts
        ]

    def _options(self, task: str) -> list[EncodedSegment]:
        if not self.options or task not in SCORING_TASKS:
            return []
        tokens = tuple(f"[OPT_{index}]" for index in range(self.options))
        return [EncodedSegment(Segment("option", " ".join(tokens), tokens, tokens, " "), "options")]

    @staticmethod
    def _moment(now: Any) -> float | None:
        given = now.get("timestamp") if isinstance(now, Mapping) else None
        return None if given is None else check_moment(given, "now.timestamp")

    def _events(
        self, events: list[Event], now: float | None, first: int
    ) -> tuple[list[list[EncodedSegment]], float | None]:
        """Add [AGE] to each event; also return the seconds from the last event until now, if both are known."""
        moments = [event.seconds for event in events if event.seconds is not None]
        until = now if now is not None else max(moments, default=None)
        slots, before = [], None
        for place, (verb, item, text, seconds) in enumerate(events, first):
            segments = [verb]
            if seconds is not None:
                self._check_order(before, seconds, f"history[{place}].timestamp")
                if self.time == "ago" and until is not None:
                    self._check_order(seconds, until, "now.timestamp")
                    segments.append(self._wording.age(until - seconds, "ago"))
                elif self.time == "gap" and before is not None:
                    segments.append(self._wording.age(seconds - before))
                before = seconds
            segments += [segment for segment in (item, text) if segment is not None]
            slots.append([EncodedSegment(segment, f"history[{place}]") for segment in segments])
        if now is None or before is None:
            return slots, None
        self._check_order(before, now, "now.timestamp")
        return slots, now - before

    @staticmethod
    def _check_order(before: float | None, after: float, place: str) -> None:
        if before is not None and after < before:
            raise ValueError(f"{place}: {after:.0f} is earlier than {before:.0f} before it; give the oldest first")

    def _targets(self, parts: Mapping[str, Any], task: str, talk: Talk) -> list[list[EncodedSegment]]:
        """Make the targets."""
        given = check_list(parts.get("candidates"), "candidates", MAX_CANDIDATES)
        lead = self._wording.lead(task, parts) if task in WRITING_TASKS else ""
        candidates = [
            self._candidate(candidate, f"candidates[{place}]")
            for place, candidate in enumerate(given)
            if task != "content" or self._wording.has_text(candidate)
        ]
        if task not in SCORING_TASKS and any(len(candidate) > 1 for candidate in candidates):
            logger.warning_once(f"task {task!r} does not read the statistics of candidates (`stats`)")
        if task == "retrieval":
            if candidates:
                logger.warning_once("a row of task 'retrieval' holds the user alone: its candidates are not read")
            return []
        if task in WRITING_TASKS:
            return [self._writing(candidates, self._answer(parts, task, talk), task, lead)]
        if not candidates:
            raise ValueError(f"candidates: task {task!r} needs at least one")
        if task == "plausibility":
            frame = tuple(self.template["tasks"]["plausibility"].format(item="\0").split("\0"))
            worded = [replace(item.segment.framed(frame), kind="text", written=True) for item, *_ in candidates]
            return [[EncodedSegment(segment, f"candidates[{place}]")] for place, segment in enumerate(worded)]
        return candidates

    def _candidate(self, candidate: Any, place: str) -> list[EncodedSegment]:
        stats: Any = None
        if isinstance(candidate, Mapping) and "stats" in candidate:
            stats = candidate["stats"]
            candidate = {name: value for name, value in candidate.items() if name != "stats"}
        item = EncodedSegment(self._wording.item(candidate, place), place)
        return [
            item,
            *(EncodedSegment(stat, f"{place}.stats") for stat in self._wording.stats(stats, f"{place}.stats")),
        ]

    def _writing(
        self, candidates: list[list[EncodedSegment]], answer: Turn | None, task: str, lead: str
    ) -> list[EncodedSegment]:
        """Make the target of a writing task: the item, if given, then the lead, then the text, if known."""
        self._check_count(len(candidates), task)
        written = Segment("text", "", lead=lead, written=True)
        if answer is not None:
            written = replace(written, text=self._wording.written(answer.content))
        if answer is not None and answer.slot is not None:
            if self.tokenizer.slot_token_id is None:
                raise ValueError(f"{answer.place}: the tokenizer has no token {SLOT_TOKEN}: make one with slot=True")
            before, after = answer.content[: answer.slot], answer.content[answer.slot :]
            before = self._wording.written(before) if before else ""
            written = replace(written, text=f"{before}{SLOT_TOKEN}{after}", slot=(before, after))
        return [*(candidates[0][:1] if candidates else []), EncodedSegment(written, "text")]

    def _answer(self, parts: Mapping[str, Any], task: str, talk: Talk) -> Turn | None:
        """Return the text that a writing task writes, if known: of a conversation, the recommender's last turn."""
        if task == "conversation":
            return talk.turns[-1] if talk.turns and talk.turns[-1].role == "system" else None
        text = parts.get("text")
        if not isinstance(text, str | None):
            raise wrong_type(text, "text", f"a text for task {task!r}")
        return None if text is None else Turn("system", check_text(text, "text"), "text")

    def _past_turns(self, talk: Talk, task: str) -> tuple[list[EncodedSegment], list[tuple[str, str]]]:
        """Make the segments of a conversation before the answer: the instruction, and the last `max_events` turns.

        Returns:
            The segments, and (place, "text") of each turn left out.
        """
        if task != "conversation":
            return [], []
        speakers, found = self.template["tasks"]["speakers"], []
        turns = talk.turns[:-1] if talk.turns and talk.turns[-1].role == "system" else talk.turns
        for turn in turns:
            if turn.slot is not None:
                raise ValueError(f"{turn.place}.content: only the last turn may hold a slot; write the item's title")
        if talk.instruction is not None:
            words = f"{self.template['tasks']['instruction']}{self._wording.written(talk.instruction.content)}"
            found = [EncodedSegment(Segment("text", words), talk.instruction.place, kept=True)]
        for number, turn in enumerate(turns[-self.max_events :], 1):
            label = speakers[turn.role]
            segment = Segment("text", f"{label}{self._wording.written(turn.content)}")
            last = number == min(len(turns), self.max_events)
            found.append(EncodedSegment(replace(segment, label=label) if last else segment, turn.place))
        return found, [(turn.place, "text") for turn in turns[: -self.max_events]]

    @staticmethod
    def _check_count(candidates: int, task: str) -> None:
        """Refuse numbers of candidates that a writing task does not take."""
        if candidates > 1 or (task == "explanation" and not candidates) or (task == "next_item" and candidates):
            expected = {"explanation": "exactly one", "next_item": "none"}.get(task, "at most one")
            raise ValueError(f"candidates: task {task!r} takes {expected}, got {candidates}")


def _rows_by_id(rows: Mapping[Any, int]) -> dict[str, int]:
    """Return rows of item embeddings by normalised id; if two keys have the same id, the normalised key is used.

    Older versions kept white space around ids, so older processors may contain such keys.
    """
    ids = {key: normalize_id(key, "item_rows: a key") for key in rows}
    return {known: rows[known] if known in rows else rows[key] for key, known in ids.items()}


def _templates() -> Any:
    """Import the package's templates, which are not part of a checkpoint."""
    try:
        return importlib.import_module("m6rec.tokenization.templates")
    except ImportError as error:
        raise ImportError(
            "the templates come with the package: install m6rec, or give `template` (a saved processor holds its own)"
        ) from error


def _default_template() -> dict[str, Any]:
    return _templates().load_template()


M6RecProcessor.register_for_auto_class("AutoProcessor")


__all__ = [
    "EncodedRow",
    "EncodedSegment",
    "M6RecProcessor",
    "RequestParts",
    "Truncation",
    "Truncator",
    "infilling",
    "masking",
    "pad",
    "up_to_whole",
    "written_labels",
]
