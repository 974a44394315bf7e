"""Ways to run the network that give the same numbers as the flat one and do less work.

A plan reads segments in one of two ways and joins them in one of two ways:

| plan | segments | joint layers |
|---|---|---|
| compact | each distinct segment of the batch once | whole rows, of the tokens that are keys |
| reuse | every row as it stands | a user's source once; candidates attend to it |
| cached | each distinct segment once, through a SegmentCache | a user's source once; candidates attend to it |

Shapes: B rows (users), T tokens of a row, N targets of a row, S kept source tokens, C kept tokens of a target, W states
in the bank, H = hidden_size.

With torch.compile the stages of the network are compiled, and what is around them stays Python: ids as lists, keys of
caches and sizes that follow from the data differ from batch to batch, and each would be compiled again. So functions
that call a stage are disabled for the compiler by themselves (`recursive=False`), all others with what they call.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch.nn import functional
from transformers.cache_utils import DynamicCache, DynamicLayer

from .layers_m6rec import SharedKeys
from .layout_m6rec import Layout, Picked, alone, at, attention_bias, joint_mask, pick, segment_mask
from .segment_cache_m6rec import SegmentCache, SegmentKey
from .user_states_m6rec import Beginnings, UserStates

if TYPE_CHECKING:
    from .network_m6rec import M6RecModel

PLANS = ("flat", "compact", "reuse", "cached")
TOKENS_AT_ONCE = {"cpu": 1024}
"""Tokens that go through the layers together, by kind of device: fewer read the weights again and again, more leave the
processor's cache."""
TOKENS_AT_ONCE_ELSEWHERE = 16384
"""On other devices; bounds memory."""
PADDED = 1.25
"""Rows run through the joint layers together as long as padding makes them no more than so many times longer,"""
PADDED_SEGMENTS = 1.1
"""The same of segments: these are many, and sorted by length, so that less is enough,"""
SPARE_TOKENS = 64
"""or adds no more than so many tokens: a pass over the weights costs as much."""
TOGETHER = 512
"""Up to so many tokens, targets stand behind their source in one row of the joint layers: a second pass over weights
would cost more than the attention between targets that is computed in vain."""
Stop = Callable[[torch.Tensor, list[int]], torch.Tensor]
"""b x n x H states of kept tokens and the b rows they are of -> b bool: go no deeper."""
Decide = Callable[[torch.Tensor, Picked, Layout, list[int]], torch.Tensor]
"""The same, told which tokens these are and their layout as well."""


class Rows(NamedTuple):
    """What a plan is run on."""

    input_ids: torch.Tensor
    """B x T."""
    lay: Layout
    """Of the B x T tokens."""
    item_ids: torch.Tensor | None
    """B x T rows of item memory."""
    keys: torch.Tensor
    """B x T bool: tokens that `summary_keys` keeps; the others are left out of the joint layers altogether."""
    hidden: torch.Tensor
    """B x T bool: tokens that stay, but are seen by no other."""
    exits: Sequence[int]
    """Joint layers after which states are wanted, ascending."""
    alone: Sequence[SegmentKey] = ()
    """Segments that stand in no row (items to choose among), read together with those that do."""
    asking: torch.Tensor | None = None
    """B x T bool: tokens whose states after the last exit are wanted; None = all."""


@torch.compiler.disable(recursive=False)
def segment_states(
    model: "M6RecModel", rows: Rows, distinct: bool, cache: SegmentCache | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Read all segments of rows, and those that stand alone.

    Returns:
        The bank, W x H segment states; B x T: the place of each token's state in it; and the last state of each
        segment that stands alone, without word memory.
    """
    input_ids, lay = rows.input_ids, rows.lay
    if distinct and model.config.num_segment_layers:
        return _distinct_segments(model, rows, cache)
    positions = model.embedding_positions(lay)
    embeds = model.embeddings.tokens(input_ids)
    size = input_ids.shape[1]
    bias = attention_bias(segment_mask(lay, size, model.config), size, size, embeds.dtype)
    bank = model.segment_stage(embeds, positions, bias, input_ids, lay)
    bank = model.add_words_in_rows(bank, input_ids, lay).flatten(0, 1)
    place = torch.arange(len(bank), device=bank.device).view(input_ids.shape)
    return bank, place, last_states(model, rows.alone, cache)


class Entered(NamedTuple):
    """Tokens as they enter the joint layers."""

    states: torch.Tensor
    """B x T x H."""
    lay: Layout
    """Of these tokens."""
    keys: torch.Tensor
    """B x T bool: tokens that are seen."""
    asking: torch.Tensor
    """B x T bool: tokens whose states after the last exit are wanted."""

    def of(self, rows: list[int]) -> "Entered":
        """Return some rows."""
        lay = Layout(*(field[rows] for field in self.lay))
        return Entered(self.states[rows], lay, self.keys[rows], self.asking[rows])


def joint_rows(model: "M6RecModel", entered: Entered, exits: Sequence[int]) -> list[torch.Tensor]:
    """Run the joint layers over whole rows (B x T x H); one result for each exit."""
    states, lay, keys, asking = entered
    size = lay.valid.shape[1]
    bias = attention_bias(joint_mask(lay, size, model.config, keys), size, size, states.dtype)
    read = model.joint_stage(states, model.joint_positions(lay), bias, exits, asking=asking)
    return [model.norm(state) for state in read]


@torch.compiler.disable(recursive=False)
def joint_shared(
    model: "M6RecModel",
    entered: Entered,
    exits: Sequence[int],
    past: Beginnings | None = None,
    stop: Stop | None = None,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Run the joint layers over each source once, then over its targets, which attend to it.

    Rows of unlike shapes run apart: padding would cost more.

    Args:
        model: The network.
        entered: The tokens, B x T.
        exits: Joint layers after which states are wanted.
        past: What is kept of the beginnings of the sources; then these are read through all layers, and kept.
        stop: Says after an exit which rows (numbers, in the order of the states) need no further layer.

    Returns:
        States of each exit, B x T x H, of stopped rows those they stopped with; and the exit of each row.
    """
    lay = entered.lay
    if ((lay.request != lay.request.amax(1, keepdim=True)) & lay.valid).any():
        raise ValueError("the plans 'reuse' and 'cached' take one request a row: unpack the rows, or use 'compact'")
    groups = _alike(lay)
    if len(groups) == 1:
        return _Walk(model, entered, sorted(groups[0])).through(exits, past, stop)
    results = [torch.zeros_like(entered.states) for _ in exits]
    left = torch.zeros_like(lay.request[:, 0])
    for rows in groups:
        read, left[rows] = _Walk(model, entered.of(rows), rows).through(exits, past, stop)
        for result, state in zip(results, read):
            result[rows] = state
    return results, left


@torch.compiler.disable
def _alike(lay: Layout) -> list[list[int]]:
    """Group rows so that padding sources and targets to the longest of a group is cheap."""
    target = (lay.target > 0).sum(1)
    sizes = torch.stack((target, lay.valid.sum(1) - target), 1).tolist()
    groups: list[list[int]] = []
    tokens, widest = 0, (0, 0)
    for row in sorted(range(len(sizes)), key=sizes.__getitem__):
        tokens += sum(sizes[row])
        widest = (max(widest[0], sizes[row][0]), max(widest[1], sizes[row][1]))
        if not groups or (len(groups[-1]) + 1) * sum(widest) > PADDED * tokens + SPARE_TOKENS:
            groups.append([])
            tokens, widest = sum(sizes[row]), (sizes[row][0], sizes[row][1])
        groups[-1].append(row)
    return groups


class _Part(NamedTuple):
    """Tokens on their way through the joint layers: sources, B x S, or targets, B x N x C."""

    states: torch.Tensor
    """... x H."""
    positions: torch.Tensor
    bias: torch.Tensor
    """B x 1 x S x S or B x N x 1 x C x C."""
    asking: torch.Tensor
    """Of the same shape as positions."""

    def chosen(self, rows: torch.Tensor) -> "_Part":
        """Return some rows."""
        return _Part(*(field[rows] for field in self))


class _Walk:
    """Rows on their way through the joint layers: sources first, then targets, which attend to their row's source.

    The [BOS] that opens a target sees the source and itself, so that it is the same in all of them: the first is read
    with the source, as its last token, and stands for the others.

    Args:
        model: The network.
        entered: Their tokens, B x T.
        rows: Numbers by which others know the rows.
    """

    @torch.compiler.disable
    def __init__(self, model: "M6RecModel", entered: Entered, rows: list[int]) -> None:
        lay, tokens = entered.lay, entered.states.shape[1]
        self.model, self.rows = model, rows
        opens = (lay.target > functional.pad(lay.target, (1, -1))) & entered.keys
        first = opens & (opens.cumsum(1) == 1)
        near = pick(torch.where(lay.valid & (lay.target == 0) | first, 0, -1), 1)
        self.near, self.seen = self._part(entered, near)
        self.place = near.places(tokens)
        """B x T: where the states of a token are, in sources and then targets."""
        self.place = torch.where(opens, (self.place * first).sum(1, keepdim=True), self.place)
        slots, self.far = int(lay.target.max()), None
        if slots:
            # Every target is a row of its own: B * N x C.
            target = pick(torch.where((lay.target > 0) & ~opens, lay.target - 1, -1), slots)
            far, _ = self._part(entered, target, slots)
            self.far = _Part(*(field.unflatten(0, (-1, slots)) for field in far))
            behind = target.places(tokens) + near.index.shape[1]
            self.place = torch.where((lay.target > 0) & ~opens, behind, self.place)
        self.users: list[SharedKeys] = []
        """Of the layers ahead, where sources were read already."""

    def _tokens(self, far: _Part) -> int:
        return self.near.positions.numel() + far.positions.numel()

    @torch.compiler.disable
    def _united(self, far: _Part) -> _Part:
        """Put a row's targets behind its source, where they attend to it without further ado."""
        near, (rows, slots, size) = self.near, far.positions.shape
        start = near.positions.shape[1]
        end = start + slots * size
        bias = near.bias.new_full((rows, 1, end, end), torch.finfo(near.bias.dtype).min)
        bias[:, :, :start, :start] = near.bias
        bias[:, :, start:, :start].masked_fill_(self.seen[:, None, None], 0)
        own = bias[:, 0, start:, start:].unflatten(1, (slots, size)).unflatten(3, (slots, size))
        own.diagonal(dim1=1, dim2=3).copy_(far.bias[:, :, 0].permute(0, 2, 3, 1))

        def both(field: str) -> torch.Tensor:
            return torch.cat((getattr(near, field), getattr(far, field).flatten(1, 2)), 1)

        return _Part(both("states"), both("positions"), bias, both("asking"))

    def _part(self, entered: Entered, picked: Picked, slots: int = 1) -> tuple[_Part, torch.Tensor]:
        """Take the picked tokens, each slot as a row of its own; also say which are seen."""

        def own(field: torch.Tensor) -> torch.Tensor:
            return field.reshape(len(field) * slots, -1, *field.shape[2:])

        states, lay = own(picked.of(entered.states)), Layout(*map(own, entered.lay.take(*picked)))
        seen, asking = (own(picked.of(field) & picked.present) for field in (entered.keys, entered.asking))
        size = states.shape[1]
        bias = attention_bias(joint_mask(lay, size, self.model.config, seen), size, size, states.dtype)
        return _Part(states, self.model.joint_positions(lay), bias, asking), seen

    @torch.compiler.disable(recursive=False)
    def through(
        self, exits: Sequence[int], past: Beginnings | None, stop: Stop | None
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Go from exit to exit; see `joint_shared`."""
        going = torch.arange(len(self.rows), device=self.near.states.device)
        left = torch.full_like(going, exits[-1])
        results: list[torch.Tensor] = []
        ends_early = past is not None and stop is not None  # sources are then read deeper than targets
        if self.far is not None and not ends_early and self._tokens(self.far) <= TOGETHER:
            self.near, self.far = self._united(self.far), None
        for first, last in pairwise((0, *exits)):
            if not self.users:
                ahead = self._read_sources(first, last, exits, past)
            self.near = self.near._replace(states=next(ahead))
            found = self.near.states
            if self.far is not None:
                self.far = self._read_targets(self.far, first, last, exits[-1])
                found = torch.cat((found, self.far.states.flatten(1, 2)), 1)
            found = at(self.model.norm(found), self.place)
            self.users = self.users[last - first :]
            results.append(found if len(going) == len(left) else results[-1].index_copy(0, going, found))
            if stop is None or last == exits[-1]:
                continue
            stays = ~stop(found, [self.rows[row] for row in going.tolist()])
            left[going[~stays]] = last
            if not stays.any():
                return results + results[-1:] * (len(exits) - len(results)), left
            if not stays.all():
                going = going[stays]
                self._only(stays)
                ahead = iter([state[stays] for state in ahead])
        return results, left

    @torch.compiler.disable
    def _only(self, stays: torch.Tensor) -> None:
        """Leave rows behind."""
        self.near, self.place, self.seen = self.near.chosen(stays), self.place[stays], self.seen[stays]
        if self.far is not None:
            self.far = self.far.chosen(stays)
        self.users = [keys.chosen(stays) for keys in self.users]

    @torch.compiler.disable(recursive=False)
    def _read_sources(
        self, first: int, last: int, exits: Sequence[int], past: Beginnings | None
    ) -> Iterator[torch.Tensor]:
        """Joint layers from `first` to the next exit, or to all if they are kept, over the sources.

        Returns:
            Their states at each exit; what targets attend to, or what is kept, is in `users`.
        """
        model, cache = self.model, None if self.far is None and past is None else DynamicCache()
        known = [] if past is None else past.shared(self.rows)
        ends = [last] if past is None else exits
        asking = self.near.asking if ends[-1] == exits[-1] else None
        read = model.joint_stage(*self.near[:3], ends, known or None, first, asking, key_cache=cache)
        if cache is None:
            return iter(read)
        bias = None
        if not self.seen.all():
            lowest = torch.finfo(self.near.states.dtype).min
            bias = self.near.states.new_zeros(self.seen.shape).masked_fill(~self.seen, lowest)[:, None, None]
        own = cast(list[DynamicLayer], cache.layers[model.config.num_segment_layers + first :])
        self.users = [SharedKeys(layer.keys, layer.values, bias) for layer in own]
        if known:
            self.users = [before.followed_by(after) for before, after in zip(known, self.users)]
        if past is not None:
            past.keep(self.rows, self.users, known[0].key.shape[2] if known else 0)
        return iter(read)

    @torch.compiler.disable(recursive=False)
    def _read_targets(self, far: _Part, first: int, last: int, end: int) -> _Part:
        """Joint layers from `first` to `last` (of `end`) over the targets, some targets of each user at a time."""
        parts, (users, slots, size) = [], far.positions.shape
        step = -(-slots // max(round(users * slots * size / _at_once(far.states.device)), 1))  # none is left over small
        for start in range(0, slots, step):
            states, positions, bias, asking = (field[:, start : start + step].flatten(0, 1) for field in far)
            asked = asking if last == end else None
            (read,) = self.model.joint_stage(states, positions, bias, [last], self.users, first, asked)
            parts.append(read.unflatten(0, (users, -1)))
        return far._replace(states=torch.cat(parts, 1))


def _at_once(device: torch.device) -> int:
    return TOKENS_AT_ONCE.get(device.type, TOKENS_AT_ONCE_ELSEWHERE)


@torch.compiler.disable(recursive=False)
def _distinct_segments(
    model: "M6RecModel", rows: Rows, cache: SegmentCache | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Read each distinct segment once, or take its states from the cache."""
    input_ids, lay = rows.input_ids, rows.lay
    row = torch.arange(len(input_ids), device=input_ids.device)[:, None] * (input_ids.shape[1] + 1)
    _, lengths = torch.unique_consecutive((lay.segment + row)[lay.valid], return_counts=True)
    ids, modes = input_ids[lay.valid].tolist(), lay.mode[lay.valid].tolist()
    numbers: dict[SegmentKey, int] = {}
    order, start = [], 0
    for length in lengths.tolist():
        key = (modes[start], tuple(ids[start : start + length]))
        order.append(numbers.setdefault(key, len(numbers)))
        start += length
    alone = [numbers.setdefault(key, len(numbers)) for key in rows.alone]
    bank, offsets = encode_segments(model, list(numbers), cache)
    offsets = offsets.to(input_ids.device)
    first = offsets[torch.tensor(order, device=input_ids.device)]
    place = torch.zeros_like(input_ids)
    place[lay.valid] = first.repeat_interleave(lengths) + lay.segment_position[lay.valid]
    ends = [len(ids) - 1 for _, ids in rows.alone]
    alone_states = bank[offsets[alone] + torch.tensor(ends, device=offsets.device, dtype=torch.long)]
    return model.add_words_in_bank(bank, list(numbers), offsets), place, alone_states


def last_states(model: "M6RecModel", segments: Sequence[SegmentKey], cache: SegmentCache | None = None) -> torch.Tensor:
    """Read segments by themselves: the state of the last token of each, M x H, without word memory."""
    if not segments:  # of what is exported
        return model.embed_kind.weight.new_zeros(0, model.config.hidden_size)
    return _last_states(model, segments, cache)


@torch.compiler.disable(recursive=False)
def _last_states(model: "M6RecModel", segments: Sequence[SegmentKey], cache: SegmentCache | None) -> torch.Tensor:
    numbers = {key: number for number, key in enumerate(dict.fromkeys(segments))}
    bank, offsets = encode_segments(model, list(numbers), cache)
    ends = [int(offsets[numbers[key]]) + len(key[1]) - 1 for key in segments]
    return bank[torch.tensor(ends, device=bank.device)]


@torch.compiler.disable(recursive=False)
def encode_segments(
    model: "M6RecModel", segments: list[SegmentKey], cache: SegmentCache | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the segment layers on distinct segments, similar lengths together.

    Args:
        model: The network.
        segments: (mode, ids) of each.
        cache: Where states are looked up and kept; it takes no part while the segment layers learn or drop out.

    Returns:
        The bank, W x H states one segment after another, and the place of each segment's first state in it.
    """
    learning = torch.is_grad_enabled() and not model.segments_are_frozen
    found: dict[int, torch.Tensor] = {}
    use_cache = cache is not None and not learning and not model.embeddings.training
    if use_cache:
        owner = cache.serve(model)
        found = cache.find(owner, segments)
    missing = [index for index in range(len(segments)) if index not in found]
    order, parts = list(found), list(found.values())
    for batch in _batches(missing, segments, _at_once(model.embeddings.tokens.weight.device)):
        with torch.set_grad_enabled(learning):
            states, lengths = _encode(model, [segments[index] for index in batch])
        if use_cache:
            for index, own in zip(batch, states.split(lengths)):
                cache.put(owner, segments[index], own)
        order += batch
        parts.append(states)
    sizes = torch.tensor([len(segments[index][1]) for index in order], dtype=torch.long)
    offsets = torch.empty_like(sizes)
    offsets[torch.tensor(order, dtype=torch.long)] = sizes.cumsum(0) - sizes
    return torch.cat(parts), offsets


def _batches(missing: list[int], segments: list[SegmentKey], tokens: int) -> Iterator[list[int]]:
    """Group segments of similar length: a padded batch holds at most so many tokens, and little padding."""
    batch: list[int] = []
    own = 0
    for index in sorted(missing, key=lambda number: len(segments[number][1])):
        length = len(segments[index][1])
        if batch and (len(batch) + 1) * length > min(tokens, PADDED_SEGMENTS * (own + length) + SPARE_TOKENS):
            yield batch
            batch, own = [], 0
        batch.append(index)
        own += length
    if batch:
        yield batch


@torch.compiler.disable(recursive=False)
def _encode(model: "M6RecModel", segments: list[SegmentKey]) -> tuple[torch.Tensor, list[int]]:
    """One padded batch through the segment layers; returns states without padding, and lengths."""
    ids, lay = _padded(model, segments)
    return read_alone(model, ids, lay)[lay.valid], [len(ids) for _, ids in segments]


@torch.compiler.disable
def _padded(model: "M6RecModel", segments: list[SegmentKey]) -> tuple[torch.Tensor, Layout]:
    """Make one batch of segments, B x T ids padded right, and their layout."""
    device = model.embeddings.tokens.weight.device
    lengths = [len(ids) for _, ids in segments]
    width, fill = max(lengths), model.config.pad_token_id
    ids = torch.tensor([[*ids, *[fill] * (width - len(ids))] for _, ids in segments], device=device)
    index = torch.arange(width, device=device).expand_as(ids)
    valid = index < torch.tensor(lengths, device=device)[:, None]
    mode = torch.tensor([mode for mode, _ in segments], device=device)[:, None].expand_as(ids)
    return ids, alone(valid, mode)


def read_alone(model: "M6RecModel", ids: torch.Tensor, lay: Layout) -> torch.Tensor:
    """Read B x T ids of one segment a row, padded right, through the segment layers: B x T x H."""
    width = ids.shape[1]
    index = torch.arange(width, device=ids.device).expand_as(ids)
    embeds = model.embeddings.tokens(ids)
    bias = attention_bias(segment_mask(lay, width, model.config), width, width, embeds.dtype)
    return model.segment_stage(embeds, index, bias, ids, lay)


@torch.compiler.disable(recursive=False)
def run(
    model: "M6RecModel",
    plan: str,
    rows: Rows,
    cache: SegmentCache | None,
    users: UserStates | None = None,
    decide: Decide | None = None,
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, Picked, torch.Tensor | None]:
    """Run the plan "compact", "reuse" or "cached"; only the last uses the cache and `users`.

    `decide` is asked after each exit but the last: of b x n x H states of kept tokens, which these are, their layout
    and the b rows they stand in, it returns b bool, the rows that go no deeper.

    Returns:
        Joint states of each exit and segment states, all B x n x H, of the n tokens of a row that were kept; the last
        states of segments that stand alone, M x H; which tokens were kept; and the exit of each row, if it is decided.
    """
    past = users.find(model, rows) if users is not None else None
    if past is not None:  # what is kept counts as absent from here on
        rest = Layout(*(field * ~past.reused for field in rows.lay))
        rows = rows._replace(lay=rest, keys=rows.keys & ~past.reused)
    bank, place, alone = segment_states(model, rows, plan != "reuse", cache if plan == "cached" else None)
    joint, states, kept = _entered(model, rows, bank, place)
    if plan == "compact":
        return joint_rows(model, joint, rows.exits), states, alone, kept, None
    stop = None if decide is None else partial(_decided, decide, kept, joint.lay)
    read, left = joint_shared(model, joint, rows.exits, past, stop)
    return read, states, alone, kept, None if decide is None else left


@torch.compiler.disable
def _entered(
    model: "M6RecModel", rows: Rows, bank: torch.Tensor, place: torch.Tensor
) -> tuple[Entered, torch.Tensor, Picked]:
    """Pick the tokens that are keys; also return their segment states, B x n x H, and which they are."""
    kept = pick(torch.where(rows.keys, 0, -1), 1)
    states, here = bank[kept.of(place)], rows.lay.take(*kept)
    entered = model.enter(states, here, None if rows.item_ids is None else kept.of(rows.item_ids) * kept.present)
    asking = torch.ones_like(rows.keys) if rows.asking is None else rows.asking
    seen, asking = (kept.of(field) & kept.present for field in (rows.keys & ~rows.hidden, asking))
    return Entered(entered, here, seen, asking), states, kept


@torch.compiler.disable
def _decided(decide: Decide, kept: Picked, lay: Layout, states: torch.Tensor, rows: list[int]) -> torch.Tensor:
    return decide(states, kept.chosen(rows), Layout(*(field[rows] for field in lay)), rows)


__all__ = ["PLANS", "Rows", "encode_segments", "last_states", "read_alone", "run"]
