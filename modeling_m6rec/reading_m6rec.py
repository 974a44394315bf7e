"""From segments to a row of ids: what fits, what is dropped, and what was promised to stand there."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from .wording_m6rec import Segment

NEAR = 8
"""Tokens before and after a cut that are looked at: a character has no more."""


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

    What goes, as far as it must, so that the source fits beside a target of half of `max_length`, or of its own length
    where that is less: turns and facts that fill more than half (the oldest turns, then the last facts); the oldest
    events; more turns and facts; whole fields of items in the source. Then, so that all fits: whole fields of
    candidates and of items in the source, the longest first, and the ends of the longest texts. The last
    turn, the first fact and the first field of an item are never left out, only cut, nor is the newest event if there
    is room for a token of each text. The work is linear in the
    size of the draft, but for a logarithm.

    Args:
        ids: The tokenizer's `structural_ids`.
        kinds: The kind token of each kind of segment.
        encode: Turns texts into ids.
        decode: Turns ids into a text.
        max_length: Most tokens of a source with its longest target.
        forget_events: Events are dropped so many at a time.
    """

    def __init__(
        self,
        ids: dict[str, int],
        kinds: dict[str, int],
        encode: Callable[[Sequence[str]], Sequence[Sequence[int]]],
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
        if self._excess(draft) > 0:
            start, given, before = draft.start, [(slot, slot.segment) for slot in draft.slots()], draft.dropped.events
            events = len(draft.events)
            self._fit(draft)
            if self._excess(draft) > 0 and draft.events:  # there is no room for any event
                draft.start, draft.events, draft.dropped = start, [], Dropped(before + events)
                for slot, slot.segment in given:
                    slot.cut = slot.fixed = False
                    self._fill(slot)
                self._fit(draft)
        if (excess := self._excess(draft)) > 0:
            raise ValueError(
                f"the request needs {self.max_length + excess} tokens when all that may be dropped is, "
                f"but max_length is {self.max_length}: give fewer statistics, or raise max_length"
            )
        return self._write(draft)

    def _fit(self, draft: Draft) -> None:
        self._drop_events(draft)
        self._drop_fields(draft)
        self._cut_texts(draft)

    def _fill(self, slot: Slot) -> None:
        segment = slot.segment
        slot.head = self._heads[segment.kind]
        slot.body = self.encode([segment.text])[0] if segment.text else ()
        slot.tail = () if segment.written else self._segment_end
        if segment.lead:
            slot.head = (*slot.head, *self.encode([segment.lead])[0])
        if segment.kind == "option":  # its parts are tokens, not text
            first = self.ids["first_option_token_id"]
            slot.head = (*slot.head, *range(first, first + len(segment.parts)))
            slot.body = ()

    # How much is too much

    def _room(self, draft: Draft) -> int:
        """Count the tokens that a target may have."""
        source = 2 + _length(draft.start) + _length(draft.end) + sum(map(_length, draft.events))
        return self.max_length - source - (1 + draft.closed if draft.targets else 0)

    def _excess(self, draft: Draft) -> int:
        """Count the tokens by which the source is too long beside its longest target."""
        return max(map(_length, draft.targets), default=0) - self._room(draft)

    def _half_excess(self, draft: Draft) -> int:
        """Count the tokens by which the source is too long beside half a row, or its longest target if that is less."""
        return min(max(map(_length, draft.targets), default=0), self.max_length // 2) - self._room(draft)

    # What goes

    def _drop_events(self, draft: Draft) -> None:
        """Drop turns, facts and events for the sake of half a row of target."""
        excess = self._half_excess(draft)
        self._drop_spare(draft, min(excess, _length(draft.start) - self.max_length // 2))
        excess, gone = self._half_excess(draft), 0
        while gone < len(draft.events) - 1 and (excess > 0 or gone < up_to_whole(gone, self.forget_events)):
            excess -= _length(draft.events[gone])
            gone += 1
            if draft.gaps:  # as if the events before had never been given
                first = draft.events[gone]
                draft.events[gone] = [slot for slot in first if slot.segment.kind != "age"]
                excess -= _length(first) - _length(draft.events[gone])
        draft.events = draft.events[gone:]
        draft.dropped.events += gone
        self._drop_spare(draft, excess)

    @staticmethod
    def _drop_spare(draft: Draft, excess: int) -> None:
        """Drop the oldest turns but the last, then the last facts but the first."""
        turns, facts = ([slot for slot in draft.start if slot.segment.kind == kind] for kind in ("text", "fact"))
        gone = set()
        for slot in [*turns[:-1], *reversed(facts[1:])]:
            if excess <= 0:
                break
            excess -= len(slot)
            gone.add(id(slot))
            draft.dropped.fields.append((slot.place, "text"))
        draft.start = [slot for slot in draft.start if id(slot) not in gone]

    def _drop_fields(self, draft: Draft) -> None:
        """Drop whole fields of items."""
        source = [*draft.start, *(slot for event in draft.events for slot in event), *draft.end]
        self._drop_longest(source, self._half_excess(draft), draft.dropped)
        room = self._room(draft)
        for target in draft.targets:
            self._drop_longest(target, _length(target) - room, draft.dropped)
        self._drop_longest(source, self._excess(draft), draft.dropped)

    def _drop_longest(self, slots: list[Slot], excess: int, dropped: Dropped) -> None:
        """Drop the longest fields of items, no more than must be; an item's first field, which names it, stays."""
        if excess <= 0:
            return
        items = [slot for slot in slots if slot.segment.is_item]
        whole, room = [slot.segment for slot in items], _length(items) - excess
        parts = [(place, index) for place, segment in enumerate(whole) for index in range(1, len(segment.parts))]
        lengths = map(len, self.encode([whole[place].parts[index] for place, index in parts]))
        order = [part for _, part in sorted(zip(lengths, parts), key=lambda entry: -entry[0])]

        def length(count: int) -> int:
            """Leave out so many; return how many tokens are left."""
            gone = set(order[:count])
            for place, (slot, segment) in enumerate(zip(items, whole)):
                kept = [index for index in range(len(segment.parts)) if (place, index) not in gone]
                if len(kept) != len(slot.segment.parts):
                    slot.segment = segment.only(kept) if len(kept) < len(segment.parts) else segment
                    self._fill(slot)
            return _length(items)

        few = bisect_left(range(len(order)), True, key=lambda count: length(count) <= room)
        length(few)
        dropped.fields += [(items[place].place, whole[place].names[index]) for place, index in order[:few]]

    def _cut_texts(self, draft: Draft) -> None:
        """Cut the longest texts of the source and its longest target to one length, then those of other targets."""
        source = [*draft.start, *(slot for event in draft.events for slot in event), *draft.end]
        while (excess := self._excess(draft)) > 0:
            if not self._cut(source + max(draft.targets, key=_length, default=[]), excess, draft.dropped):
                return
            room = self._room(draft)
            for target in draft.targets:
                self._cut(target, _length(target) - room, draft.dropped)

    def _cut(self, slots: list[Slot], excess: int, dropped: Dropped) -> bool:
        """Cut texts; return whether there was one that may be."""
        slots = [slot for slot in slots if len(slot.body) > 1 and not slot.fixed]
        if excess <= 0 or not slots:
            return False
        lengths = [len(slot.body) for slot in slots]
        # The largest length, 1 at least, at which enough goes; the last ones keep what then would be too much.
        level = bisect_left(range(1, max(lengths)), True, key=lambda own: _above(lengths, own + 1) < excess) + 1
        longest = [slot for slot in slots if len(slot.body) > level]
        spared = max(0, _above(lengths, level) - excess)
        for place, slot in enumerate(longest):
            self._shorten(slot, level + (place >= len(longest) - spared), dropped)
        return True

    def _shorten(self, slot: Slot, count: int, dropped: Dropped) -> None:
        """Cut a text to so many tokens, or fewer where it would end inside a character."""
        if count >= len(slot.body):
            return
        kept = self._whole_characters(slot.body, count)
        if kept == 0:
            slot.fixed = True
            return
        if not slot.cut:
            dropped.fields.append((slot.place, "text"))
        slot.body, slot.cut = slot.body[:kept], True

    def _whole_characters(self, ids: Sequence[int], count: int) -> int:
        """Return the most tokens, `count` or fewer, that do not end inside a character; 0 if there are none."""
        for kept in range(count, 0, -1):
            start = max(0, kept - NEAR)
            if self.decode(ids[start : kept + NEAR]).startswith(self.decode(ids[start:kept])):
                return kept
        return 0

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


def _above(lengths: list[int], level: int) -> int:
    """Count what stands above a level."""
    return sum(length - level for length in lengths if length > level)


__all__ = ["Draft", "Dropped", "Fitter", "Reading", "Slot", "up_to_whole"]
