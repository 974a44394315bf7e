"""From segments to a row of ids: what fits, what is dropped, and what was promised to stand there."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from .wording_m6rec import Segment


@dataclass(slots=True)
class Dropped:
    """What a reading left out: how many events, and (place, field) of each text dropped or, as "text", cut short."""

    events: int = 0
    fields: list[tuple[str, str]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.events or self.fields)


@dataclass(slots=True)
class Reading:
    """One request as a row of ids, and what they say.

    Attributes:
        input_ids: The row.
        item_ids: Beside each id the row of the item memory, 0 where there is none.
        segments: (kind, text) of each segment, in the row's order.
        dropped: What did not fit.
    """

    input_ids: list[int]
    item_ids: list[int]
    segments: list[tuple[str, str]]
    dropped: Dropped

    @property
    def text(self) -> str:
        """The segments in one line."""
        return " ".join(f"[{kind.upper()}] {text}" for kind, text in self.segments)


@dataclass(slots=True)
class Slot:
    """A segment at its place in the request; once encoded, its ids: `head` + `body` + `tail`.

    The body is the text that may be cut short; `cut` says it was, `fixed` that it cannot be cut further.
    """

    segment: Segment
    place: str = ""
    head: Sequence[int] = ()
    body: Sequence[int] = ()
    tail: Sequence[int] = ()
    cut: bool = False
    fixed: bool = False

    def __len__(self) -> int:
        return len(self.head) + len(self.body) + len(self.tail)


@dataclass(slots=True)
class Draft:
    """The segments of a request before they are fitted: the source's start, events and end, then the targets.

    `gaps` says that [AGE] tells the time since the event before, so that the first event has none. `closed` says that
    targets end with [EOS].
    """

    start: list[Slot]
    events: list[list[Slot]]
    end: list[Slot]
    targets: list[list[Slot]]
    gaps: bool = True
    closed: bool = True
    dropped: Dropped = field(default_factory=Dropped)

    def slots(self) -> Iterator[Slot]:
        """Yield all slots, in the row's order."""
        yield from self.start
        for group in (*self.events, self.end, *self.targets):
            yield from group


class Fitter:
    """Encodes a draft, shortens it to the allowed length and writes its row.

    Args:
        ids: The tokenizer's `structural_ids`.
        kinds: The kind token of each kind of segment.
        encode: Turns a text into ids.
        decode: Turns ids into a text.
        max_length: Most tokens of a source with its longest target.
        forget_events: Events are dropped so many at a time.
    """

    def __init__(
        self,
        ids: dict[str, int],
        kinds: dict[str, int],
        encode: Callable[[str], Sequence[int]],
        decode: Callable[[Sequence[int]], str],
        max_length: int,
        forget_events: int = 1,
    ) -> None:
        self.ids, self.encode, self.decode, self.max_length = ids, encode, decode, max_length
        self.forget_events = forget_events
        self._heads = {kind: (index,) for kind, index in kinds.items()}
        self._segment_end = (ids["segment_token_id"],)

    def read(self, draft: Draft) -> Reading:
        """Fit a draft, which is used up, and write it down.

        Raises:
            ValueError: It does not fit whatever is dropped.
        """
        for slot in draft.slots():
            self._fill(slot)
        excess = self._drop_events(draft)
        while excess > 0:
            blamed = draft.start + draft.end + max(draft.targets, key=_length, default=[])
            if not self._drop_field(blamed, draft.dropped) and not self._cut_text(blamed, excess, draft.dropped):
                raise ValueError(
                    f"the request needs {self.max_length + excess} tokens when all that may be dropped is, "
                    f"but max_length is {self.max_length}: give fewer facts or statistics, or raise max_length"
                )
            excess = self._excess(draft)
        return self._write(draft)

    def _fill(self, slot: Slot) -> None:
        segment = slot.segment
        slot.head = self._heads[segment.kind]
        slot.body = self.encode(segment.text) if segment.text else ()
        slot.tail = () if segment.written else self._segment_end
        if segment.lead:
            slot.head = (*slot.head, *self.encode(segment.lead))
        if segment.kind == "option":  # its parts are tokens, not text
            first = self.ids["first_option_token_id"]
            slot.head = (*slot.head, *range(first, first + len(segment.parts)))
            slot.body = ()

    @staticmethod
    def _source_length(draft: Draft) -> int:
        return 2 + _length(draft.start) + _length(draft.end) + sum(map(_length, draft.events))

    def _excess(self, draft: Draft) -> int:
        markers = 1 + draft.closed
        longest = max((markers + _length(target) for target in draft.targets), default=0)
        return self._source_length(draft) + longest - self.max_length

    # What goes: the oldest events, then whole fields of items, then the ends of the longest texts.

    def _drop_events(self, draft: Draft) -> int:
        excess, gone = self._excess(draft), 0
        while gone < len(draft.events) and (excess > 0 or gone < up_to_whole(gone, self.forget_events)):
            excess -= _length(draft.events[gone])
            gone += 1
            if draft.gaps and gone < len(draft.events):  # as if the events before had never been given
                first = draft.events[gone]
                draft.events[gone] = [slot for slot in first if slot.segment.kind != "age"]
                excess -= _length(first) - _length(draft.events[gone])
        draft.events = draft.events[gone:]
        draft.dropped.events += gone
        return excess

    def _drop_field(self, slots: list[Slot], dropped: Dropped) -> bool:
        """Drop the longest field of an item; an item's first field, which names it, stays."""
        fields = [
            (len(self.encode(part)), slot, index)
            for slot in slots
            if slot.segment.is_item
            for index, part in enumerate(slot.segment.parts[1:], 1)
        ]
        if not fields:
            return False
        _, slot, index = max(fields, key=lambda entry: entry[0])
        dropped.fields.append((slot.place, slot.segment.names[index]))
        slot.segment = slot.segment.without(index)
        self._fill(slot)
        return True

    def _cut_text(self, slots: list[Slot], excess: int, dropped: Dropped) -> bool:
        """Shorten one of the longest texts, at most down to the next longest."""
        slots = [slot for slot in slots if len(slot.body) > 1 and not slot.fixed]
        if not slots:
            return False
        lengths = sorted({len(slot.body) for slot in slots}, reverse=True)
        longest = [slot for slot in slots if len(slot.body) == lengths[0]]
        floor = lengths[1] if len(lengths) > 1 else 1
        slot = longest[0]
        kept = self._whole_characters(slot.body, max(floor, lengths[0] - max(1, excess // len(longest))))
        if kept == 0:
            slot.fixed = True
            return True
        slot.body, slot.cut = slot.body[:kept], True
        if (slot.place, "text") not in dropped.fields:
            dropped.fields.append((slot.place, "text"))
        return True

    def _whole_characters(self, ids: Sequence[int], count: int) -> int:
        """Return the most tokens, `count` or fewer, that do not end inside a character; 0 if there are none."""
        beyond = self.decode(ids[: count + 8])
        return next((kept for kept in range(count, 0, -1) if beyond.startswith(self.decode(ids[:kept]))), 0)

    def _write(self, draft: Draft) -> Reading:
        reading = Reading([], [], [], draft.dropped)
        ids = self.ids
        reading.input_ids.append(ids["source_token_id"])
        rows = [self._put(slot, reading) for group in (draft.start, *draft.events, draft.end) for slot in group]
        reading.input_ids.append(ids["source_end_token_id"])
        for target in draft.targets:
            reading.input_ids.append(ids["bos_token_id"])
            rows += [self._put(slot, reading) for slot in target]
            if draft.closed:
                reading.input_ids.append(ids["eos_token_id"])
        reading.item_ids = [0] * len(reading.input_ids)
        for place, row in rows:
            reading.item_ids[place] = row
        return reading

    def _put(self, slot: Slot, reading: Reading) -> tuple[int, int]:
        """Write one slot; return where its last token stands, and the item memory's row that belongs there."""
        row, segment = reading.input_ids, slot.segment
        row += slot.head
        row += slot.body
        row += slot.tail
        text = self.decode(slot.body) if slot.cut else segment.text
        reading.segments.append((segment.kind, segment.lead + text))
        return len(row) - 1, segment.row if segment.kind == "item" else 0


def up_to_whole(count: int, step: int) -> int:
    """Round up to a multiple of a step.

    >>> up_to_whole(5, 4)
    8
    """
    return -(-count // step) * step


def _length(slots: list[Slot]) -> int:
    return sum(map(len, slots))


__all__ = ["Draft", "Dropped", "Fitter", "Reading", "Slot", "up_to_whole"]
