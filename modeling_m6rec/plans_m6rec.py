"""Ways to run the network that give the same numbers as the flat one and do less work.

A plan reads segments in one of two ways and joins them in one of two ways:

| plan | segments | joint layers |
|---|---|---|
| compact | each distinct segment of the batch once | whole rows, of the tokens that are keys |
| reuse | every row as it stands | a user's source once; candidates attend to it |
| cached | each distinct segment once, through a SegmentCache | a user's source once; candidates attend to it |

Shapes: B rows (users), T tokens of a row, N targets of a row, S kept source tokens, C kept tokens of a target, W states
in the bank, H = hidden_size.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from .layers_m6rec import SharedKeys
from .layout_m6rec import Layout, Picked, alone, attention_bias, joint_mask, pick, segment_mask
from .segment_cache_m6rec import SegmentCache, SegmentKey

if TYPE_CHECKING:
    from .network_m6rec import M6RecModel

PLANS = ("flat", "compact", "reuse", "cached")
TOKENS_AT_ONCE = 16384
"""Tokens of segments that go through the segment layers together; bounds memory."""
TARGETS_AT_ONCE = 25
"""Targets of a user that go through the joint layers together; more were slower in the trial, and bound memory."""


class Rows(NamedTuple):
    """What a plan is run on."""

    input_ids: torch.Tensor
    """B x T."""
    lay: Layout
    """Of the B x T tokens."""
    item_ids: torch.Tensor | None
    """B x T rows of item memory."""
    keys: torch.Tensor
    """B x T bool: tokens that segment_summary keeps; the others are left out of the joint layers altogether."""
    hidden: torch.Tensor
    """B x T bool: tokens that stay, but are seen by no other."""
    exits: Sequence[int]
    """Joint layers after which states are wanted, ascending."""
    alone: Sequence[SegmentKey] = ()
    """Segments that stand in no row (items to choose among), read together with those that do."""


def segment_states(
    model: "M6RecModel", rows: Rows, distinct: bool, cache: SegmentCache | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Read all segments of rows, and those that stand alone.

    Returns:
        The bank, W x H segment states; B x T: the place of each token's state in it; and the last state of each
        segment that stands alone.
    """
    input_ids, lay = rows.input_ids, rows.lay
    if distinct and model.config.num_segment_layers:
        return _distinct_segments(model, rows, cache)
    positions = model.embedding_positions(lay)
    embeds = model.embeddings.tokens(input_ids)
    size = input_ids.shape[1]
    bias = attention_bias(segment_mask(lay, size, model.config), size, size, embeds.dtype)
    bank = model.segment_stage(embeds, positions, bias).flatten(0, 1)
    place = torch.arange(len(bank), device=bank.device).view(input_ids.shape)
    return bank, place, last_states(model, rows.alone)


def joint_rows(
    model: "M6RecModel", states: torch.Tensor, lay: Layout, keys: torch.Tensor, exits: Sequence[int]
) -> list[torch.Tensor]:
    """Run the joint layers over whole rows (B x T x H); one result for each exit."""
    size = lay.valid.shape[1]
    bias = attention_bias(joint_mask(lay, size, model.config, keys), size, size, states.dtype)
    return model.joint_stage(states, model.joint_positions(lay), bias, exits)


def joint_shared(
    model: "M6RecModel", states: torch.Tensor, lay: Layout, keys: torch.Tensor, exits: Sequence[int]
) -> list[torch.Tensor]:
    """Run the joint layers over each source once, then over its targets, which attend to it. As `joint_rows`."""
    if ((lay.request != lay.request.amax(1, keepdim=True)) & lay.valid).any():
        raise ValueError("the plans 'reuse' and 'cached' take one request a row: unpack the rows, or use 'compact'")
    tokens = states.shape[1]
    source = pick(torch.where(lay.valid & (lay.target == 0), 0, -1), 1)
    kept = lay.take(*source)
    users, read = _read_sources(model, source.of(states), kept, source.of(keys) & source.present, exits)
    results = [source.back(state, tokens) for state in read]
    if (lay.target > 0).any():
        slots = int(lay.target.max())
        target = pick(torch.where(lay.target > 0, lay.target - 1, -1), slots)
        # From here on every target is a row of its own: B x N x C (x H).
        folded = Layout(*(field.unflatten(1, (slots, -1)) for field in lay.take(*target)))
        own, seen = target.of(states), target.of(keys) & target.present
        read = _read_targets(model, own.unflatten(1, (slots, -1)), folded, seen.unflatten(1, (slots, -1)), users, exits)
        results = [result + target.back(state.flatten(1, 2), tokens) for result, state in zip(results, read)]
    return results


def _read_sources(
    model: "M6RecModel", states: torch.Tensor, lay: Layout, keys: torch.Tensor, exits: Sequence[int]
) -> tuple[list[SharedKeys], list[torch.Tensor]]:
    """Joint layers over B x S source tokens: what targets attend to in each layer, and the states."""
    size, skipped = states.shape[1], model.config.num_segment_layers
    cache = DynamicCache()
    bias = attention_bias(joint_mask(lay, size, model.config, keys), size, size, states.dtype)
    read = model.joint_stage(states, model.joint_positions(lay), bias, exits, past_key_values=cache)
    unseen = states.new_zeros(keys.shape).masked_fill(~keys, torch.finfo(states.dtype).min)[:, None, None]
    users = [SharedKeys(layer.keys, layer.values, unseen) for layer in cast(list[DynamicLayer], cache.layers[skipped:])]
    return users, read


def _read_targets(
    model: "M6RecModel",
    states: torch.Tensor,
    lay: Layout,
    keys: torch.Tensor,
    users: list[SharedKeys],
    exits: Sequence[int],
) -> list[torch.Tensor]:
    """Joint layers over B x N targets of C tokens each, some targets of each user at a time."""
    users_count, slots, size = lay.valid.shape
    parts = []
    for start in range(0, slots, TARGETS_AT_ONCE):
        chunk = slice(start, start + TARGETS_AT_ONCE)
        part = Layout(*(field[:, chunk].flatten(0, 1) for field in lay))
        mask = joint_mask(part, size, model.config, keys[:, chunk].flatten(0, 1))
        bias = attention_bias(mask, size, size, states.dtype)
        own = states[:, chunk].flatten(0, 1)
        read = model.joint_stage(own, model.joint_positions(part), bias, exits, shared=users)
        parts.append([state.unflatten(0, (users_count, -1)) for state in read])
    return [torch.cat(exit_states, 1) for exit_states in zip(*parts)]


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
    return bank, place, bank[offsets[alone] + torch.tensor(ends, device=offsets.device, dtype=torch.long)]


def last_states(model: "M6RecModel", segments: Sequence[SegmentKey]) -> torch.Tensor:
    """Read segments by themselves: the state of the last token of each, M x H."""
    numbers = {key: number for number, key in enumerate(dict.fromkeys(segments))}
    if not numbers:
        return model.embed_kind.weight.new_zeros(0, model.config.hidden_size)
    bank, offsets = encode_segments(model, list(numbers))
    ends = [int(offsets[numbers[key]]) + len(key[1]) - 1 for key in segments]
    return bank[torch.tensor(ends, device=bank.device)]


def encode_segments(
    model: "M6RecModel", segments: list[SegmentKey], cache: SegmentCache | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the segment layers on distinct segments, similar lengths together.

    Args:
        model: The network.
        segments: (mode, ids) of each.
        cache: Where states are looked up and kept; it takes no part while the segment layers learn.

    Returns:
        The bank, W x H states one segment after another, and the place of each segment's first state in it.
    """
    learning = torch.is_grad_enabled() and not model.segments_are_frozen
    found: dict[int, torch.Tensor] = {}
    use_cache = cache is not None and not learning
    if use_cache:
        cache.serve(model)
        found = {index: states for index, key in enumerate(segments) if (states := cache.get(key)) is not None}
    missing = [index for index in range(len(segments)) if index not in found]
    order, parts = list(found), list(found.values())
    for batch in _batches(missing, segments):
        with torch.set_grad_enabled(learning):
            states, lengths = _encode(model, [segments[index] for index in batch])
        if use_cache:
            for index, own in zip(batch, states.split(lengths)):
                cache.put(segments[index], own.clone())
        order += batch
        parts.append(states)
    sizes = torch.tensor([len(segments[index][1]) for index in order], dtype=torch.long)
    offsets = torch.empty_like(sizes)
    offsets[torch.tensor(order, dtype=torch.long)] = sizes.cumsum(0) - sizes
    return torch.cat(parts), offsets


def _batches(missing: list[int], segments: list[SegmentKey]) -> Iterator[list[int]]:
    """Group segments of similar length, so that a padded batch holds at most TOKENS_AT_ONCE tokens."""
    batch: list[int] = []
    for index in sorted(missing, key=lambda number: len(segments[number][1])):
        if batch and (len(batch) + 1) * len(segments[index][1]) > TOKENS_AT_ONCE:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _encode(model: "M6RecModel", segments: list[SegmentKey]) -> tuple[torch.Tensor, list[int]]:
    """One padded batch through the segment layers; returns states without padding, and lengths."""
    device = model.embeddings.tokens.weight.device
    lengths = [len(ids) for _, ids in segments]
    width, fill = max(lengths), model.config.pad_token_id
    ids = torch.tensor([[*ids, *[fill] * (width - len(ids))] for _, ids in segments], device=device)
    index = torch.arange(width, device=device).expand_as(ids)
    valid = index < torch.tensor(lengths, device=device)[:, None]
    mode = torch.tensor([mode for mode, _ in segments], device=device)[:, None].expand_as(ids)
    embeds = model.embeddings.tokens(ids)
    bias = attention_bias(segment_mask(alone(valid, mode), width, model.config), width, width, embeds.dtype)
    return model.segment_stage(embeds, index, bias)[valid], lengths


def run(
    model: "M6RecModel", plan: str, rows: Rows, cache: SegmentCache | None
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, Picked]:
    """Run the plan "compact", "reuse" or "cached"; only the last uses the cache.

    Returns:
        Joint states of each exit and segment states, all B x n x H, of the n tokens of a row that were kept; the last
        states of segments that stand alone, M x H; and which tokens were kept.
    """
    bank, place, alone = segment_states(model, rows, plan != "reuse", cache if plan == "cached" else None)
    kept = pick(torch.where(rows.keys, 0, -1), 1)
    states, here = bank[kept.of(place)], rows.lay.take(*kept)
    entered = model.enter(states, here, None if rows.item_ids is None else kept.of(rows.item_ids) * kept.present)
    join = joint_rows if plan == "compact" else joint_shared
    read = join(model, entered, here, kept.of(rows.keys & ~rows.hidden) & kept.present, rows.exits)
    return read, states, alone, kept


__all__ = ["PLANS", "Rows", "encode_segments", "last_states", "run"]
