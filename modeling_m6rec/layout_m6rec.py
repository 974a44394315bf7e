"""From ids to the layout of a row, from the layout to attention masks, and the places where the heads read.

Shapes: B rows, T tokens of a row, Q queries (the last Q of the T), P virtual tokens in front, K keys = P + T, and for
picked tokens N slots of up to C tokens each. Shapes of the heads: N targets of a row, E places of a row that give a
user vector, M items of a row, H = hidden_size.

The functions of the plan "flat" can be exported: they use `shape`, since `len` would fix sizes to the example's.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional

from .configuration_m6rec import KINDS, M6RecConfig
from .values_m6rec import IGNORE_INDEX

KIND_NUMBER = {kind: index + 1 for index, kind in enumerate(KINDS)}
EVENT, USER, CLOSES_EVENT = KIND_NUMBER["event"], KIND_NUMBER["user"], (0, KIND_NUMBER["now"])
"""Numbers of kinds of segments: what opens an event, who the user is, and what ends the last event (0 = a marker)."""


class Layout(NamedTuple):
    """The position of each token in the structure of its row; each field is B x T, with zeros at padding."""

    valid: torch.Tensor
    """bool: not padding."""
    source: torch.Tensor
    """bool: the user's side of a request."""
    written: torch.Tensor
    """bool: text that the model writes (causal, with text loss); plain rows count as written."""
    request: torch.Tensor
    """1, 2, ... in the row; 0 = before any request (a target without source). In a plain row the document: 0, 1, ..."""
    target: torch.Tensor
    """1, 2, ... in the row; 0 = source, or a plain row."""
    kind: torch.Tensor
    """1 + index in KINDS; 0 = none (markers, tokens outside segments, plain rows)."""
    event: torch.Tensor
    """Ordinal of the event in its request; 0 = outside every event."""
    segment: torch.Tensor
    """1, 2, ... in the row; each marker is a separate segment."""
    segment_position: torch.Tensor
    """Position in the segment."""
    request_position: torch.Tensor
    """Position in the request, without other targets."""

    def last(self, queries: int) -> "Layout":
        """Return the layout of the last `queries` tokens."""
        return Layout(*(field[:, field.shape[1] - queries :] for field in self))

    def take(self, index: torch.Tensor, present: torch.Tensor) -> "Layout":
        """Return the layout of the tokens at `index` (B x N), zero where not `present`."""
        found = (field.gather(1, index) for field in self)
        if not torch.compiler.is_exporting() and present.all():
            return Layout(*found)
        return Layout(*(field * present for field in found))

    @property
    def plain(self) -> torch.Tensor:
        """B x T bool: tokens of plain rows, which belong to neither a request nor a target."""
        return self.written & (self.target == 0)

    @property
    def text(self) -> torch.Tensor:
        """B x T bool: written tokens of targets; plain rows have none."""
        return self.written & (self.target > 0)

    @property
    def mode(self) -> torch.Tensor:
        """B x T: attention mode of a token's segment in the segment layers: 0 = given, 1 = written, 2 = document."""
        return self.written.long() + self.plain


class Picked(NamedTuple):
    """Some tokens of each row: `columns`, their indices in the row, and `present`, both B x n."""

    columns: torch.Tensor
    present: torch.Tensor

    def of(self, values: torch.Tensor, fill: int | None = None) -> torch.Tensor:
        """Gather the picked tokens: B x T (x H) -> B x n (x H); absent ones get `fill`, or repeat token 0."""
        found = gather_tokens(values, self.columns)
        if fill == 0:  # ONNX Runtime has no Where of truth values
            return found * self.present
        return found if fill is None else found.masked_fill(~self.present, fill)

    def chosen(self, rows: list[int] | torch.Tensor) -> "Picked":
        """Return the picked tokens of some rows."""
        return Picked(self.columns[rows], self.present[rows])

    def back(self, states: torch.Tensor, tokens: int) -> torch.Tensor:
        """Scatter B x n x H states back to their tokens: B x T x H, zero elsewhere."""
        place = self.columns + torch.arange(len(states), device=states.device)[:, None] * tokens
        if self.present.all():
            place, found = place.flatten(), states.flatten(0, 1)
        else:
            place, found = place[self.present], states[self.present]
        out = states.new_zeros(len(states) * tokens, states.shape[-1])
        return out.index_copy(0, place, found).view(len(states), tokens, -1)

    def places(self, tokens: int) -> torch.Tensor:
        """Return the slot of each of T tokens of a row: B x T, zero for tokens that were not picked."""
        slot = self.columns.masked_fill(~self.present, tokens)
        order = torch.arange(slot.shape[1], device=slot.device).expand_as(slot)
        return slot.new_zeros(len(slot), tokens + 1).scatter(1, slot, order)[:, :tokens]


def gather_tokens(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Pick B x n tokens out of B x T (x H) values; this copies whole vectors, `gather` single numbers."""
    if values.shape[0] == 1 and not torch.compiler.is_exporting():  # one request: no offsets of rows
        return values[0].index_select(0, index[0])[None]
    first = torch.arange(values.shape[0], device=values.device)[:, None] * values.shape[1]
    found = values.flatten(0, 1).index_select(0, (index + first).flatten())
    return found.view(*index.shape, *values.shape[2:])


def pick(slot: torch.Tensor, slots: int) -> Picked:
    """Sort tokens into slots: B x T slot numbers (-1 = leave out) -> B x slots*C, each slot padded to the longest."""
    if slot.shape[0] == slots == 1:
        return _pick_all(slot)
    order = slot.argsort(dim=1, stable=True)
    count = slot.new_zeros(slot.shape[0], slots + 1).scatter_add(1, slot + 1, torch.ones_like(slot))
    rank = torch.empty_like(slot).scatter(1, order, torch.arange(slot.shape[1], device=slot.device).expand_as(slot))
    place = rank - (count.cumsum(1) - count).gather(1, slot + 1)
    width = max(int(count[:, 1:].max()), 1)
    index = slot.new_zeros(slot.shape[0], slots * width + 1)
    where = torch.where(slot >= 0, slot * width + place, slots * width)
    order = torch.arange(slot.shape[1], device=slot.device).expand_as(slot)
    index = index.scatter(1, where, order + 1)[:, :-1]
    return Picked((index - 1).clamp_min(0), index > 0)


def _pick_all(slot: torch.Tensor) -> Picked:
    """Do `pick` for one row and one slot, as for a request that comes by itself, in a few operations."""
    columns = (slot[0] >= 0).nonzero()[:, 0]
    if not len(columns):
        return Picked(slot.new_zeros(1, 1), slot.new_zeros(1, 1, dtype=torch.bool))
    return Picked(columns[None], torch.ones(1, len(columns), dtype=torch.bool, device=slot.device))


def layout(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, config: M6RecConfig) -> Layout:
    """Derive the structure of each row from its ids. A later token never changes the layout of an earlier one.

    A row is structured if and only if its first token that is not padding is [BOS'] or [BOS]. Otherwise it is one plain
    document, or several (packing): then a new number in the mask begins a new document, as in 1 1 1 2 2 3 3 3 0.

    Args:
        input_ids: B x T ids.
        attention_mask: B x T, nonzero = not padding; None = only pad ids are padding.
        config: Gives the ids that open and close regions and segments.
    """
    number = (input_ids != config.pad_token_id) if attention_mask is None else attention_mask
    valid = number.bool()
    rank = valid.cumsum(1) - 1
    opens_source, opens_target = input_ids == config.source_token_id, input_ids == config.bos_token_id
    structured = ((opens_source | opens_target) & valid & (rank == 0)).any(1, keepdim=True)
    real = valid & structured
    opens_source, opens_target = opens_source & real, opens_target & real
    previous = torch.nn.functional.pad(latest(valid), (1, -1), value=-1)
    opens_document = valid & ~structured & (number != value_at(number, previous))

    # Regions: the latest opener decides. Targets of one request share its source, and the positions after it.
    opener = latest(opens_source | opens_target | opens_document)
    before = torch.nn.functional.pad(opener, (1, -1), value=-1)
    source = value_at(opens_source, opener)
    first_target = latest(opens_target & value_at(opens_source, before))
    source_length = value_at(rank - value_at(rank, latest(opens_source)), first_target)
    request_position = rank - value_at(rank, opener) + torch.where(source, 0, source_length)

    # Segments: opened by a kind token, by a marker, and by any token after a marker or a closing [SEG].
    kind_here = (input_ids - config.first_kind_token_id + 1).clamp(0, len(KINDS) + 1) % (len(KINDS) + 1) * real
    source_end = (input_ids == config.source_end_token_id) & real
    marker = opens_source | opens_target | source_end | (input_ids == config.eos_token_id) & real
    closes = marker | (input_ids == config.segment_token_id) & real
    opens_segment = opens_document | real & ((kind_here > 0) | marker | value_at(closes, previous))
    segment_start = latest(opens_segment)

    # Events: [EVENT] opens one; [NOW] and [EOS'] close the last, so that the user vector never depends on [NOW].
    opens_event = source & (kind_here == KIND_NUMBER["event"])
    ends_event = opens_source | source & ((kind_here == KIND_NUMBER["now"]) | source_end)
    in_event = source & value_at(opens_event, latest(opens_event | ends_event))
    event = opens_event.cumsum(1)
    event = (event - value_at(event, latest(opens_source))) * in_event

    # Written: from the first [TEXT] of a target to the end of that target.
    text = latest(~source & (kind_here == KIND_NUMBER["text"]))
    written = ~structured | ~source & (text >= 0) & (text >= opener)
    fields = Layout(
        valid,
        source,
        written,
        opens_source.cumsum(1) + (opens_document.cumsum(1) - 1).clamp_min(0),
        opens_target.cumsum(1) * ~source,
        value_at(kind_here, segment_start),
        event,
        opens_segment.cumsum(1),
        rank - value_at(rank, segment_start),
        request_position,
    )
    return Layout(*(field * valid for field in fields))


def standalone_layout(valid: torch.Tensor, mode: torch.Tensor) -> Layout:
    """Make the layout of rows that hold one segment each, with the fields that `own_segment_mask` needs.

    Args:
        valid: B x T bool.
        mode: B x T, as in `Layout.mode`.
    """
    zeros = torch.zeros_like(mode)
    fields = {name: zeros for name in Layout._fields}
    fields |= {"valid": valid, "written": (mode > 0) & valid, "target": mode == 1, "segment": valid.long()}
    return Layout(**fields)


def item_layout(ids: torch.Tensor, valid: torch.Tensor) -> Layout:
    """Make the layout of standalone items, with the fields that `own_segment_mask` and `item_words` need.

    Args:
        ids: M x L ids of [ITEM] ... [SEG], padded right.
        valid: M x L bool.
    """
    index = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    lay = standalone_layout(valid, torch.zeros_like(ids))
    return lay._replace(kind=KIND_NUMBER["item"] * valid.long(), segment_position=index * valid)


def own_segment_mask(lay: Layout, queries: int, config: M6RecConfig) -> torch.Tensor:
    """Make the mask of attention within each segment, also of rows that hold one segment each; B x Q x T bool.

    A token attends to later tokens in given segments if `segment_attention` is bidirectional, and in plain rows if
    `document_attention` is.
    """
    query = lay.last(queries)
    forward = ~query.written & (config.segment_attention == "bidirectional") | _sees_whole_document(query, config)
    return _equal(query.segment, lay.segment) & lay.valid[:, None] & (forward[:, :, None] | _not_later(lay, queries))


def segment_mask(lay: Layout, queries: int, config: M6RecConfig, hidden: torch.Tensor | None = None) -> torch.Tensor:
    """Make the attention mask of the segment layers in rows: a token attends to its own segment.

    With `written_attention="source"` a written token of a target attends to everything before it in its source and
    target, except `hidden` (B x T bool) tokens. Returns B x Q x T bool.
    """
    own = own_segment_mask(lay, queries, config)
    if not config.writes_from_source:
        return own
    query = lay.last(queries)
    seen = lay.valid if hidden is None else lay.valid & ~hidden
    past = _not_later(lay, queries) & (lay.source[:, None] | _equal(query.target, lay.target))
    past = past & _equal(query.request, lay.request) & seen[:, None]
    return torch.where(query.text[:, :, None], past, own)


def joint_mask(
    lay: Layout, queries: int, config: M6RecConfig, keys: torch.Tensor, text_keys: torch.Tensor | None = None
) -> torch.Tensor:
    """Make the attention mask of the joint layers: a token attends to earlier tokens of its source and its own target.

    With bidirectional history, source tokens attend to the whole source. `keys` (B x T bool) are the tokens that may
    be attended to at all, and `text_keys` those for written tokens of targets, if they differ. Returns B x Q x T bool.
    """
    query = lay.last(queries)
    to_source = lay.source[:, None]
    whole = (query.source & (config.history_attention == "bidirectional"))[:, :, None] & to_source
    past = _not_later(lay, queries) & (to_source | _equal(query.target, lay.target))
    seen = past | whole | _sees_whole_document(query, config)[:, :, None]
    may = keys[:, None] if text_keys is None else torch.where(query.text[:, :, None], text_keys[:, None], keys[:, None])
    return _equal(query.request, lay.request) & may & seen


def near(query: torch.Tensor, key: torch.Tensor, window: int) -> torch.Tensor:
    """Say which of B x T keys are less than `window` positions away from B x Q queries; B x Q x T bool."""
    return (query[:, :, None] - key[:, None]).abs() < window


def read_by_text(lay: Layout) -> torch.Tensor:
    """Mark the tokens that written tokens of targets attend to with `written_attention="source"`; B x T bool.

    These are the sources of requests with such a target, and those targets.
    """
    slots = largest(lay.request) + 1
    row = row_starts(lay.request, slots)
    of_request = _any_of(lay.text, lay.request + row, len(lay.request) * slots)
    slots = largest(lay.target) + 1
    of_target = _any_of(lay.text, lay.target + row_starts(lay.target, slots), len(lay.target) * slots)
    return lay.valid & (lay.source & of_request | (lay.target > 0) & of_target)


def _any_of(where: torch.Tensor, group: torch.Tensor, groups: int) -> torch.Tensor:
    """Say for each of B x T tokens whether any token of its group (a number below `groups`) is marked."""
    count = group.new_zeros(groups).index_add(0, group.flatten(), where.flatten().long())
    return count[group] > 0


class Continuation(NamedTuple):
    """What the next written token of each row needs to know of the tokens before it, T in number.

    It is made once for a prompt, then extended by each written token: a layout of all ids, and masks over them, would
    be computed again and again.
    """

    last: Layout
    """Layout of the last token, B x 1; all are written."""
    ended: torch.Tensor
    """B x 1 bool: it is an [EOS] that ends a target."""
    segment_keys: torch.Tensor
    """B x T bool: tokens that the last one attends to in the segment layers, and itself."""
    joint_keys: torch.Tensor
    """B x T bool: the same in the joint layers."""

    @property
    def tokens(self) -> int:
        """T."""
        return self.joint_keys.shape[1]

    @classmethod
    def after(
        cls, ids: torch.Tensor, lay: Layout, masks: Sequence[torch.Tensor], config: M6RecConfig
    ) -> "Continuation | None":
        """Make the continuation of rows.

        Args:
            ids: B x Q, the last ids.
            lay: Their layout.
            masks: The masks of segment layers and joint layers, B x Q x T bool.
            config: Gives the id of [EOS].

        Returns:
            The continuation; None if the last token of any row is not written.
        """
        last = lay.last(1)
        if not last.written.all():
            return None
        keys = [mask[:, -1].index_fill(1, torch.tensor(mask.shape[2] - 1, device=ids.device), 1) for mask in masks]
        return cls(last, _ends_text(ids[:, -1:], last, config), *keys)

    def followed_by(self, ids: torch.Tensor, config: M6RecConfig) -> "Continuation":
        """Return the continuation after one more token of each row, B x 1 ids.

        Of all structural tokens only [EOS] may follow.
        """
        last, ended = self.last, _ends_text(ids, self.last, config)
        opens = ended | self.ended
        here = last._replace(
            kind=last.kind * ~opens,
            segment=last.segment + opens,
            segment_position=(last.segment_position + 1) * ~opens,
            request_position=last.request_position + 1,
        )
        apart = opens if not config.writes_from_source else torch.zeros_like(opens)
        keys = (self.segment_keys & ~apart, self.joint_keys)
        return Continuation(here, ended, *(functional.pad(seen, (0, 1), value=True) for seen in keys))


def _ends_text(ids: torch.Tensor, lay: Layout, config: M6RecConfig) -> torch.Tensor:
    return (ids == config.eos_token_id) & lay.text


def skipped(lay: Layout, config: M6RecConfig) -> torch.Tensor:
    """Mark the tokens of given segments of `skipped_kinds`; B x T bool."""
    found = torch.zeros_like(lay.valid)
    for kind in config.skipped_kinds or ():
        found |= (lay.kind == KIND_NUMBER[kind]) & ~lay.written
    return found


def summary_keys(lay: Layout, closing: torch.Tensor, config: M6RecConfig) -> torch.Tensor:
    """Mark the keys of the joint layers: only the last `segment_summary` tokens of a closed given segment.

    `closing` (B x T bool) marks [SEG]. Given segments of `skipped_kinds` have no keys; written tokens and markers are
    always keys. Returns B x T bool.
    """
    summary, valid = config.segment_summary, lay.valid & ~skipped(lay, config)
    if summary is None:
        return valid
    count = lay.segment.new_zeros(lay.segment.shape[0], lay.segment.shape[1] + 1)
    length = count.scatter_add(1, lay.segment, lay.valid.long()).gather(1, lay.segment)
    closed = count.scatter_add(1, lay.segment, (closing & lay.valid).long()).gather(1, lay.segment) > 0
    early = lay.segment_position < length - summary
    return valid & ~(closed & ~lay.written & early)


def mean_at_close(states: torch.Tensor, lay: Layout, closing: torch.Tensor) -> torch.Tensor:
    """Replace the state at the [SEG] of each given segment by the mean of the segment's states; B x T x H.

    `closing` (B x T bool) marks [SEG]; the segment must be complete.
    """
    slots = largest(lay.segment) + 1
    slot = (lay.segment + row_starts(lay.segment, slots)).flatten()
    count = slot.new_zeros(states.shape[0] * slots).index_add(0, slot, torch.ones_like(slot)).clamp_min(1)
    total = states.new_zeros(states.shape[0] * slots, states.shape[-1]).index_add(0, slot, states.flatten(0, 1))
    mean = (total / count[:, None]).index_select(0, slot).view_as(states)
    return torch.where((closing & lay.valid & ~lay.written)[..., None], mean, states)


def attention_bias(
    mask: torch.Tensor,
    queries: int,
    keys: int,
    dtype: torch.dtype,
    virtual: int = 0,
    see_virtual: bool | torch.Tensor = True,
) -> torch.Tensor:
    """Turn B x Q x T bool into B x 1 x queries x keys, to be added to attention scores.

    Every token attends to itself (padding too, to avoid NaN) and, if `see_virtual` (one bool, or B x Q), to all P
    `virtual` tokens, which precede the keys. Virtual tokens that are queries of the same call (prompt tuning:
    queries > Q) attend to earlier virtual tokens. Keys beyond P + T are the empty part of a static cache.
    """
    rows, tokens = mask.shape[1:]
    index = torch.arange(tokens, device=mask.device)
    mask = mask | (index[None] == index[tokens - rows :, None])
    mask = torch.nn.functional.pad(mask, (virtual, keys - virtual - tokens))
    if virtual:
        mask[..., :virtual] = see_virtual[..., None] if isinstance(see_virtual, torch.Tensor) else see_virtual
    if queries > rows:
        among_virtual = torch.ones(queries - rows, keys, dtype=torch.bool, device=mask.device).tril()
        mask = torch.cat((among_virtual.expand(mask.shape[0], -1, -1), mask), 1)
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill_(~mask, torch.finfo(dtype).min)[:, None]


def largest(numbers: torch.Tensor) -> int:
    """Return the largest of B x T numbers, or 0 if there are none.

    During export the numbers must be consecutive from 0 in whole rows: the result is then a size that `torch.export`
    and ONNX can trace, since a graph cannot hold the Python number.
    """
    if torch.compiler.is_exporting():
        index = torch.arange(numbers.shape[1], device=numbers.device)
        return (index < numbers.max()).nonzero().shape[0]
    return int(numbers.max()) if numbers.numel() else 0


def row_starts(rows: torch.Tensor, size: int) -> torch.Tensor:
    """Return the offset of each of B x ... rows when they are concatenated, `size` places each: B x 1."""
    return torch.arange(rows.shape[0], device=rows.device)[:, None] * size


def latest(where: torch.Tensor) -> torch.Tensor:
    """B x T bool -> index of the latest True at or before each token, -1 if none."""
    tokens = where.shape[1]
    index = torch.arange(tokens, device=where.device).expand_as(where)
    if not torch.compiler.is_exporting():  # ONNX has no running maximum
        return torch.where(where, index, -1).cummax(1).values
    rank = where.cumsum(1)
    # The index of each True by its rank; rank 0 means none, and the last place collects all False.
    places = torch.full((where.shape[0], tokens + 2), -1, device=where.device)
    return places.scatter(1, torch.where(where, rank, tokens + 1), index).gather(1, rank)


def value_at(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """values[b, index[b, t]], zero where the index is -1."""
    return values.gather(1, index.clamp_min(0)) * (index >= 0)


def last_index(where: torch.Tensor, slot: torch.Tensor, slots: int) -> torch.Tensor:
    """Find the last marked token of each slot: B x T bool and B x T slot numbers -> B x slots, -1 if none."""
    index = torch.arange(where.shape[1], device=where.device).expand_as(where)
    found = torch.full((where.shape[0], slots + 1), -1, device=where.device)
    return found.scatter_reduce(1, slot.masked_fill(~where, slots), index, "amax")[:, :slots]


def gather_or_zero(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Pick B x N tokens (-1 = absent) out of B x T (x D) values: B x N (x D), zero where absent."""
    place = index.clamp_min(0)
    found = values.gather(1, place if values.dim() == 2 else place[..., None].expand(-1, -1, values.shape[-1]))
    return found.masked_fill((index < 0).view(index.shape + (1,) * (values.dim() - 2)), 0)


def nan_where_absent(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Put NaN into B x N x D values where the B x N index is -1.

    Call it last: a weight whose input contains NaN gets a NaN gradient, even from outputs that enter no loss.
    """
    return values.masked_fill((index < 0)[..., None], float("nan"))


def _equal(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return query[:, :, None] == key[:, None]


def _not_later(lay: Layout, queries: int) -> torch.Tensor:
    index = torch.arange(lay.valid.shape[1], device=lay.valid.device)
    return (index[None] <= index[index.shape[0] - queries :, None])[None]


def _sees_whole_document(query: Layout, config: M6RecConfig) -> torch.Tensor:
    return query.plain & (config.document_attention == "bidirectional")


class SegmentKey(NamedTuple):
    """Key of a segment's states: two segments with equal keys have equal states."""

    mode: int
    """As in `Layout.mode`: states of the same ids differ between given text, written text and documents."""
    ids: tuple[int, ...]
    """All ids of the segment."""
    payload: bytes = b""
    """Digest of the segment's content besides its ids; empty = no such content."""


Payloads = Sequence[Mapping[int, bytes]]
"""For each row, digests of its segments' content besides ids, by segment number (`Layout.segment`)."""


class Rows(NamedTuple):
    """Input of a plan."""

    input_ids: torch.Tensor
    """B x T."""
    lay: Layout
    """Layout of the B x T tokens."""
    item_embedding_ids: torch.Tensor | None
    """B x T rows of item embeddings."""
    keys: torch.Tensor
    """B x T bool: tokens that stay: those of `summary_keys`, and with `written_attention="source"` those that written
    text attends to. The joint layers skip all others."""
    hidden: torch.Tensor
    """B x T bool: tokens that stay, but that no other token attends to."""
    text_only: torch.Tensor | None
    """B x T bool: tokens that stay, but that only written text attends to; None = there are none."""
    exits: Sequence[int]
    """Joint layers after which states are needed, ascending."""
    standalone: Sequence[SegmentKey] = ()
    """Standalone segments (items to choose from), computed together with the segments of rows."""
    output_mask: torch.Tensor | None = None
    """B x T bool: tokens whose states after the last exit are needed; None = all."""
    payloads: Payloads = ()
    """Payloads of each of the B rows; empty = no segment has content besides ids."""

    def of(self, chosen: torch.Tensor) -> "Rows":
        """Return the rows that a B bool marks, with all standalone segments."""
        names = ("input_ids", "item_embedding_ids", "keys", "hidden", "text_only", "output_mask")
        given = {name: getattr(self, name) for name in names}
        fields: dict[str, Any] = {name: None if field is None else field[chosen] for name, field in given.items()}
        return self._replace(
            **fields,
            lay=Layout(*(field[chosen] for field in self.lay)),
            payloads=[own for own, kept in zip(self.payloads, chosen.tolist()) if kept],
        )


Piece = tuple[tuple[int, ...], int]
"""Ids of a segment of a source, and its row of item embeddings, 0 = none."""


QUERY_BLOCK, FEW = 32, 4
"""Rounding on CPUs: attention computes queries in blocks, and a product of fewer rows than FEW is rounded otherwise."""


class KeptSources(NamedTuple):
    """The tokens of B sources that are keys of the joint layers, n in the longest."""

    tokens: torch.Tensor
    """5 x B x n: kind, event, position, row of item embeddings and index of the state; 0 where absent."""
    lengths: list[int]
    """Number of tokens of each source."""
    asked: torch.Tensor
    """B x m indices of the last places that `head_places` marks: their last block, see `_last_block`."""
    users: int
    """Most places of users in a source, at most FEW."""


class ReadSource(NamedTuple):
    """The tokens of a source that stay."""

    tokens: list[list[int]]
    """Of each token its kind, event, position, row of item embeddings and index of the state."""
    asked: list[int]
    """The tokens that `head_places` marks."""
    users: list[int]
    """The places of users, as indices among `asked`."""
    counts: list[int]
    """The number of tokens that stay of each segment."""
    last: int
    """The segment of the last place of a user."""

    def without(self, count: int) -> "ReadSource":
        """Leave out the first tokens, and the places among them; the last place of a user must not be among them."""
        if not count:
            return self
        gone = sum(place < count for place in self.asked)
        asked = [place - count for place in self.asked[gone:]]
        users = [place - gone for place in self.users if place >= gone]
        return self._replace(tokens=[field[count:] for field in self.tokens], asked=asked, users=users)


def source_tokens(sources: Sequence[Sequence[Piece]], ends: Sequence[int], config: M6RecConfig) -> list[ReadSource]:
    """Find the tokens of sources that stay, from their segments.

    This is what `layout`, `summary_keys`, `head_places` and `user_places` derive from the ids of rows that hold one
    source each and no target, but only tokens that stay are visited.

    Args:
        sources: For each row its segments; the first is [BOS'], the last [EOS'], all others end with [SEG].
        ends: Index of the last state of each segment of all rows.
        config: Gives ids, `segment_summary`, `skipped_kinds` and `joint_positions`.
    """
    reader, last = _SourceReader(config), iter(ends)
    return [reader.read(pieces, last) for pieces in sources]


def kept_sources(rows: Sequence[ReadSource]) -> KeptSources:
    """Make tensors of the tokens of sources."""
    lengths = [len(row.tokens[0]) for row in rows]
    table = np.zeros((5, len(rows), max(lengths)), np.int64)
    most = max(_last_block(len(row.asked)) for row in rows)
    asked = np.empty((len(rows), most), np.int64)
    for number, row in enumerate(rows):
        table[:, number, : lengths[number]] = row.tokens
        own = row.asked[-most:]
        asked[number] = own[:1] * (most - len(own)) + own  # the first one stands for absent ones
    users = min(FEW, max(len(row.users) for row in rows))
    return KeptSources(torch.from_numpy(table), lengths, torch.from_numpy(asked), users)


def _last_block(count: int) -> int:
    """Return how many of so many queries are computed if only the last one is needed.

    It is the last block of queries, so that the last one is rounded as if all were computed.

    >>> [_last_block(count) for count in (1, 35, 36, 61, 68)]
    [1, 35, 4, 29, 4]
    """
    return count if count < QUERY_BLOCK + FEW else (count - FEW) % QUERY_BLOCK + FEW


class _SourceReader:
    """Reads sources by segments; a loop over few segments is faster than array operations on them."""

    def __init__(self, config: M6RecConfig) -> None:
        kinds = config.kind_token_ids
        self._numbers = {index: KIND_NUMBER[kind] for kind, index in kinds.items()}
        self._skipped = {KIND_NUMBER[kind] for kind in config.skipped_kinds or ()}
        self._summary, self._in_request = config.segment_summary, config.joint_positions == "request"

    def read(self, pieces: Sequence[Piece], ends: Iterator[int]) -> ReadSource:
        """Read one source."""
        tokens: list[list[int]] = [[] for _ in range(5)]
        kinds, events, positions, memory, states = tokens
        asked: list[int] = []
        users: list[int] = []
        counts: list[int] = []
        start = event = met = group = last = 0
        for number, ((ids, row), end) in enumerate(zip(pieces, ends)):
            kind, length = self._numbers.get(ids[0], 0), len(ids)
            if kind == EVENT:
                met += 1
                event = met
            elif kind in CLOSES_EVENT:
                event = 0
            skipped = kind in self._skipped
            count = 0 if skipped else length if self._summary is None else min(length, self._summary)
            counts.append(count)
            if not skipped:
                for place in range(length - count, length):
                    kinds.append(kind)
                    events.append(event)
                    positions.append(start + place if self._in_request else place)
                    memory.append(0)
                    states.append(end - length + 1 + place)
                memory[-1] = row
                if event or kind == USER or not start:
                    # The last one of each event, and of the head, which begins at [BOS'], is a place of a user.
                    if not users or event != group:
                        users.append(len(asked))
                    users[-1], group, last = len(asked), event, number
                    asked.append(len(kinds) - 1)
            start += length
        return ReadSource(tokens, asked, users, counts, last)


# ----------------------------------------------------------------------------------------------- where the heads read


class KeptTokens:
    """Selects, from a field of the T tokens of rows, the entries of the tokens that have states.

    These are the kept tokens of a plan, or the last of the T tokens if a cache holds the earlier ones.

    Args:
        total: T.
        lay: The layout of the tokens that have states.
        kept: Their indices among the T tokens; None = the last.
    """

    def __init__(self, total: int, lay: Layout, kept: Picked | None) -> None:
        self.total, self.tokens, self.kept = total, lay.valid.shape[1], kept

    @property
    def is_part(self) -> bool:
        """Whether a cache holds earlier tokens."""
        return self.kept is None and self.tokens < self.total

    def of(self, field: torch.Tensor, fill: int) -> torch.Tensor:
        """Select from a field of up to T columns, B x T; missing columns and absent tokens get `fill`."""
        field = functional.pad(field, (0, self.total - field.shape[1]), value=fill)
        return field[:, -self.tokens :] if self.kept is None else self.kept.of(field, fill)


def target_ends(ids: torch.Tensor, lay: Layout, config: M6RecConfig) -> torch.Tensor:
    """Find each target's [EOS], the place of its score: B x N, -1 where a row has fewer targets."""
    return last_index(_ends_target(ids, lay, config), lay.target - 1, largest(lay.target))


def user_places(ids: torch.Tensor, lay: Layout, config: M6RecConfig, seen: torch.Tensor | None = None) -> torch.Tensor:
    """Find the places of user vectors: B x E, -1 where absent.

    A source has one place for its head (the last [SEG] of [USER], else [BOS']), then one for each event (its last
    [SEG]). Places of several requests in a row are numbered consecutively. `seen` (B x T bool) excludes hidden tokens.
    """
    reads = _tells_user(ids, lay, config)
    # A place begins where request or event exceed all earlier values; this also holds for the kept tokens of a plan.
    number = (lay.request * (ids.shape[1] + 1) + lay.event) * reads
    # The numbers of heads and those of events never decrease, so the highest of each is the latest.
    of_events = lay.event > 0
    highest = torch.maximum(*(value_at(number, latest(reads & part)) for part in (of_events, ~of_events)))
    place = (number > functional.pad(highest, (1, -1))).cumsum(1)
    return last_index(reads if seen is None else reads & seen, place - 1, largest(place))


def item_places(ids: torch.Tensor, lay: Layout, config: M6RecConfig) -> torch.Tensor:
    """Find the [SEG] of each given [ITEM] segment in the order of the row: B x M, -1 where absent."""
    return marked_places(closes_item(ids, lay, config))


def closes_item(ids: torch.Tensor, lay: Layout, config: M6RecConfig) -> torch.Tensor:
    """Mark the [SEG] of each given [ITEM] segment: B x T bool."""
    return (ids == config.segment_token_id) & (lay.kind == KIND_NUMBER["item"]) & ~lay.written


def item_words(ids: torch.Tensor, lay: Layout, config: M6RecConfig) -> torch.Tensor:
    """Mark the tokens of given items' texts, between the [ITEM] and the [SEG] of a segment: B x T bool."""
    item = (lay.kind == KIND_NUMBER["item"]) & lay.valid & ~lay.written
    return item & (lay.segment_position > 0) & (ids != config.segment_token_id)


def marked_places(marked: torch.Tensor) -> torch.Tensor:
    """Return the indices of the marked tokens of each row: B x T bool -> B x M, -1 where a row has fewer."""
    number = marked.cumsum(1)
    return last_index(marked, number - 1, largest(number))


def mean_log_likelihood(
    states: torch.Tensor,
    ids: torch.Tensor,
    lay: Layout,
    write_logits: Callable[[torch.Tensor], torch.Tensor],
    lead: Sequence[int] = (),
) -> torch.Tensor:
    """Average the log-likelihood of the tokens after each target's first [TEXT], up to and including [EOS].

    Only states that predict these tokens go through the writing head. Source: the paper, zero-shot scoring.

    Args:
        states: B x T x H joint states.
        ids: B x T.
        lay: Their layout.
        write_logits: The writing head: n x H states -> n x V logits.
        lead: Ids of a template's words. As far as a text begins with them, they are left out of the average.

    Returns:
        B x N; NaN for targets without written text.
    """
    written = lay.written & (lay.target > 0)
    wanted = written & functional.pad(written, (1, -1))  # all but the [TEXT] that opens it
    if lead:
        wanted = wanted & ~_begins(ids, lay, lead)
    targets = functional.pad(torch.where(wanted, ids, IGNORE_INDEX)[:, 1:], (0, 1), value=IGNORE_INDEX)
    known, slots = targets != IGNORE_INDEX, largest(lay.target)
    logits = write_logits(states[known]).float()
    likelihood = -functional.cross_entropy(logits, targets[known], reduction="none")
    row = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)[known]
    slot = functional.pad(lay.target[:, 1:] - 1, (0, 1))[known] + slots * row
    total = likelihood.new_zeros(len(ids) * slots).index_add(0, slot, likelihood)
    count = likelihood.new_zeros(len(ids) * slots).index_add(0, slot, torch.ones_like(likelihood))
    return (total / count).view(len(ids), slots)


def _begins(ids: torch.Tensor, lay: Layout, lead: Sequence[int]) -> torch.Tensor:
    """Mark the tokens after each [TEXT] as far as they are those of `lead`: B x T bool."""
    place, known = lay.segment_position, torch.tensor([*lead], device=ids.device)
    text = (lay.kind == KIND_NUMBER["text"]) & (place > 0) & (place <= len(known))
    alike = text & (ids == known[(place - 1).clamp(0, len(known) - 1)])
    index = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return alike & (index - torch.where(alike, -1, index).cummax(1).values == place)


def head_places(ids: torch.Tensor, lay: Layout, config: M6RecConfig, users: bool = True) -> torch.Tensor:
    """Mark the tokens that `target_ends` and, if `users`, `user_places` may point to: B x T bool."""
    ends = _ends_target(ids, lay, config)
    return ends | _tells_user(ids, lay, config) if users else ends


def _ends_target(ids: torch.Tensor, lay: Layout, config: M6RecConfig) -> torch.Tensor:
    return (ids == config.eos_token_id) & (lay.target > 0)


def _tells_user(ids: torch.Tensor, lay: Layout, config: M6RecConfig) -> torch.Tensor:
    told = (lay.event > 0) | lay.source & (lay.kind == KIND_NUMBER["user"])
    told = (ids == config.segment_token_id) & told & ~skipped(lay, config)
    return told | lay.source & (ids == config.source_token_id)


__all__ = [
    "KIND_NUMBER",
    "Continuation",
    "KeptSources",
    "KeptTokens",
    "Layout",
    "Payloads",
    "Picked",
    "Piece",
    "ReadSource",
    "Rows",
    "SegmentKey",
    "attention_bias",
    "closes_item",
    "gather_or_zero",
    "gather_tokens",
    "head_places",
    "item_layout",
    "item_places",
    "item_words",
    "joint_mask",
    "kept_sources",
    "largest",
    "last_index",
    "latest",
    "layout",
    "marked_places",
    "mean_at_close",
    "mean_log_likelihood",
    "nan_where_absent",
    "near",
    "own_segment_mask",
    "pick",
    "read_by_text",
    "row_starts",
    "segment_mask",
    "skipped",
    "source_tokens",
    "standalone_layout",
    "summary_keys",
    "target_ends",
    "user_places",
    "value_at",
]
