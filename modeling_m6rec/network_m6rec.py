"""The two-stage network, the plans that run it, and its outputs.

Segment layers read each segment independently, joint layers read all segments of a row together.

Outputs, plans and network are sections of one file because a checkpoint carries few files and all in one folder.

The cache of keys and values has two names: `cache`, and `past_key_values` before Transformers 5.24. `generate`, PEFT
and users' code each use one of them: outputs have both, and functions accept either.

Plans are ways to run the network. All give the same numbers as "flat", which masks whole rows, with less work:

| plan | segments | joint layers |
|---|---|---|
| compact | each distinct segment of the batch once | whole rows, only the tokens that are keys |
| shared_prefix | each row without deduplication | a user's source once; candidates attend to it |
| cached | each distinct segment once, through a SegmentCache | a user's source once; candidates attend to it |

Shapes of plans: B rows (users), T tokens of a row, N targets of a row, S kept source tokens, C kept tokens of a target,
W states in the bank, H = hidden_size. Shapes of the network: B rows, T tokens so far, Q queries (the last Q tokens of
the T, after P virtual tokens on their first call), H = hidden_size.

torch.compile compiles the stages of the network; the code around them stays Python, since its lists of ids, cache keys
and data-dependent sizes differ between batches and would cause recompilation. Functions that call a stage are therefore
disabled for the compiler without their callees (`recursive=False`), all others including their callees.
"""

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import nn
from torch.nn import functional
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput, logging
from transformers.utils.output_capturing import capture_outputs

from .configuration_m6rec import KINDS, M6RecConfig
from .item_features_m6rec import ITEM_FEATURES, features_at
from .layers_m6rec import (
    M6RecAttention,
    M6RecEmbeddings,
    M6RecLayer,
    M6RecLocalRotaryEmbedding,
    M6RecRotaryEmbedding,
    SharedKeys,
    make_norm,
)
from .layout_m6rec import (
    Continuation,
    Layout,
    Payloads,
    Picked,
    Piece,
    Rows,
    SegmentKey,
    attention_bias,
    gather_tokens,
    head_places,
    item_layout,
    joint_mask,
    kept_sources,
    layout,
    mean_at_close,
    near,
    own_segment_mask,
    pick,
    read_by_text,
    segment_mask,
    source_tokens,
    standalone_layout,
    summary_keys,
)
from .segment_cache_m6rec import PrefixMatches, SegmentCache, UserStates
from .values_m6rec import RENAMED_KEYS

# -------------------------------------------------------------------------------------------- outputs and their cache


CACHE_NAMES = ("cache", "past_key_values")
"""Newer name, which is the field of M6Rec's outputs, and older name of the cache."""

LIBRARY_NAME = next((field.name for field in fields(BaseModelOutputWithPast) if field.name in CACHE_NAMES), "cache")
"""Name of the cache in the installed Transformers, under which its `generate` accepts a cache."""


class CachedOutput(ModelOutput):
    """An output whose field `cache` is also found and set as `past_key_values`."""

    @property
    def past_key_values(self) -> Cache | None:
        """The cache."""
        return getattr(self, CACHE_NAMES[0])

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(_own(key))

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(_own(key), value)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(_own(name), value)

    def __contains__(self, key: Any) -> bool:
        return super().__contains__(_own(key))

    def get(self, key: str, default: Any = None) -> Any:
        """Return a field's value.

        Args:
            key: Name of the field.
            default: Value to return if the field is absent.
        """
        return super().get(_own(key), default)


def _own(key: Any) -> Any:
    return CACHE_NAMES[0] if isinstance(key, str) and key in CACHE_NAMES else key


def all_ids(input_ids: torch.Tensor | None, layout_ids: torch.Tensor | None) -> torch.Tensor:
    """Return `layout_ids`, or `input_ids`, which are all ids of the rows where nothing else is given.

    Raises:
        ValueError: If neither is given.
    """
    if layout_ids is not None:
        return layout_ids
    if input_ids is None:
        raise ValueError("layout_ids (all ids so far) must come with inputs_embeds or a filled cache")
    return input_ids


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """Choose the cache if caches were given under both names.

    Prefix tuning replaces the cache under the name that PEFT uses, and leaves the empty cache of `generate` under the
    other name: the filled cache is used.

    Args:
        cache: Cache under the newer name.
        past_key_values: Cache under the older name.

    Raises:
        ValueError: If both are filled and differ.
    """
    given = [each for each in (cache, past_key_values) if each is not None]
    if len(given) < 2 or given[0] is given[1]:
        return given[0] if given else None
    filled = [each for each in given if int(each.get_seq_length())]
    if len(filled) > 1:
        raise ValueError(
            "cache and past_key_values are two names of one argument, and two filled caches came: give one"
        )
    return (filled or given)[0]


def library_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return keyword arguments with the cache, if any, under the name that the installed library accepts."""
    cache = one_cache(*(kwargs.get(name) for name in CACHE_NAMES))
    others = {name: value for name, value in kwargs.items() if name not in CACHE_NAMES}
    return others if cache is None else {**others, LIBRARY_NAME: cache}


# -------------------------------------------------------------------------------------------------------------- plans


PLANS = ("flat", "compact", "shared_prefix", "cached")

TOKENS_AT_ONCE = {"cpu": 1024}
"""Tokens that go through the layers together, by device type. Fewer tokens load the weights more often; more tokens
exceed the processor's cache."""

TOKENS_AT_ONCE_ELSEWHERE = 16384
"""Tokens that go through the layers together on other devices; this bounds memory."""

PADDED = 1.25
"""Rows run through the joint layers together while padding lengthens them by at most this factor plus SPARE_TOKENS."""

PADDED_SEGMENTS = 1.1
"""The same factor for segments, which are many and sorted by length, so that a smaller one is enough."""

SPARE_TOKENS = 64
"""Number of padding tokens that are always allowed: a further pass over the weights costs as much."""

TOGETHER = 512
"""Up to this number of tokens, source and targets run as one row of the joint layers: a second pass over the weights
would cost more than the masked attention between targets."""

Stop = Callable[[torch.Tensor, list[int]], torch.Tensor]
"""Maps b x n x H states of kept tokens and their b row numbers to b bool: stop at this exit."""

Decide = Callable[[torch.Tensor, Picked, Layout, list[int]], torch.Tensor]
"""Like `Stop`, with two more arguments: which tokens these are, and their layout."""


@torch.compiler.disable(recursive=False)
def segment_states(
    model: "M6RecModel", rows: Rows, distinct: bool, cache: SegmentCache | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the segment layers on all segments of rows, and on standalone segments.

    Returns:
        The bank, W x H segment states; B x T, the index of each token's state in the bank; and the last state of each
        standalone segment, without item features.
    """
    if not distinct or not model.config.num_segment_layers:
        return *_whole_rows(model, rows), last_states(model, rows.standalone, cache)
    writes = rows.lay.text.any(1)
    if not model.config.writes_from_source or not writes.any():
        return _distinct_segments(model, rows, cache)
    if writes.all():
        return *_whole_rows(model, rows), last_states(model, rows.standalone, cache)
    bank, others, alone = _distinct_segments(model, rows.of(~writes), cache)
    own_bank, own = _whole_rows(model, rows.of(writes))
    place = torch.zeros_like(rows.input_ids)
    place[~writes], place[writes] = others, own + len(bank)
    return torch.cat((bank, own_bank)), place, alone


def _whole_rows(model: "M6RecModel", rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the segment layers over whole rows: the bank, W x H, and B x T, the index of each token's state in it."""
    input_ids, lay = rows.input_ids, rows.lay
    embeds = model.embed_ids(input_ids, lay, rows.payloads)
    size = input_ids.shape[1]
    mask, positions = segment_mask(lay, size, model.config, rows.hidden), model.embedding_positions(lay)
    bias, local = model.biases(model.with_local(mask, positions), size, size, embeds.dtype)
    bank = model.segment_stage(embeds, positions, bias, input_ids, lay, local)
    bank = model.add_to_rows(bank, input_ids, lay).flatten(0, 1)
    return bank, torch.arange(len(bank), device=bank.device).view(input_ids.shape)


class JointInputs(NamedTuple):
    """Input of the joint layers."""

    states: torch.Tensor
    """B x T x H."""
    lay: Layout
    """Layout of these tokens."""
    keys: torch.Tensor
    """B x T bool: tokens that others may attend to."""
    output_mask: torch.Tensor
    """B x T bool: tokens whose states after the last exit are needed."""
    text_keys: torch.Tensor | None = None
    """B x T bool: tokens that written text may attend to; None = `keys`."""

    def of(self, rows: list[int]) -> "JointInputs":
        """Return some rows."""
        lay = Layout(*(field[rows] for field in self.lay))
        text_keys = None if self.text_keys is None else self.text_keys[rows]
        return JointInputs(self.states[rows], lay, self.keys[rows], self.output_mask[rows], text_keys)


def joint_rows(model: "M6RecModel", entered: JointInputs, exits: Sequence[int]) -> list[torch.Tensor]:
    """Run the joint layers over whole rows (B x T x H); returns one result per exit."""
    states, lay, keys, output_mask, text_keys = entered
    size = lay.valid.shape[1]
    mask, positions = joint_mask(lay, size, model.config, keys, text_keys), model.joint_positions(lay)
    bias, local = model.biases(model.with_local(mask, positions), size, size, states.dtype)
    read = model.joint_stage(states, positions, bias, exits, output_mask=output_mask, local_bias=local)
    return [model.norm(state) for state in read]


@torch.compiler.disable(recursive=False)
def joint_shared(
    model: "M6RecModel",
    entered: JointInputs,
    exits: Sequence[int],
    past: PrefixMatches | None = None,
    stop: Stop | None = None,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Run the joint layers over each source once, then over its targets, which attend to it.

    Rows of different shapes run separately: padding would cost more. Rows in which written text attends to tokens that
    given text does not attend to run as in `joint_rows`, since their targets do not share one set of keys; so do rows
    that are longer than the window of `local_layers`.

    Args:
        model: The network.
        entered: The tokens, B x T.
        exits: Joint layers after which states are needed.
        past: Kept prefixes of the sources; if given, sources run through all layers, and are kept.
        stop: Decides after an exit which rows (numbers, in the order of the states) need no further layer.

    Returns:
        States of each exit, B x T x H; a stopped row repeats its last states. And the exit of each row.
    """
    lay = entered.lay
    if ((lay.request != lay.request.amax(1, keepdim=True)) & lay.valid).any():
        raise ValueError(
            "the plans 'shared_prefix' and 'cached' take one request a row: unpack the rows, or use 'compact'"
        )
    apart = _whole_in_joint_layers(model, entered)
    groups = _alike(lay, set(apart))
    if len(groups) == 1 and not apart:
        return _JointRun(model, entered, sorted(groups[0])).through(exits, past, stop)
    results = [torch.zeros_like(entered.states) for _ in exits]
    left = torch.full_like(lay.request[:, 0], exits[-1])
    for rows in groups:
        read, left[rows] = _JointRun(model, entered.of(rows), rows).through(exits, past, stop)
        for result, state in zip(results, read):
            result[rows] = state
    if apart:
        for result, state in zip(results, joint_rows(model, entered.of(apart), exits)):
            result[apart] = state
    return results, left


@torch.compiler.disable
def _whole_in_joint_layers(model: "M6RecModel", entered: JointInputs) -> list[int]:
    """List the rows whose targets cannot share their source's keys."""
    lay, window = entered.lay, model.config.local_window
    whole = torch.zeros_like(lay.valid[:, 0])
    if entered.text_keys is not None:
        whole = lay.text.any(1)
    if model.local_layers and window is not None:
        whole = whole | (model.joint_positions(lay).amax(1) >= window)
    return whole.nonzero()[:, 0].tolist()


@torch.compiler.disable
def _alike(lay: Layout, apart: Container[int] = ()) -> list[list[int]]:
    """Group rows, except those `apart`, so that padding sources and targets to the longest of a group is cheap."""
    target = (lay.target > 0).sum(1)
    return _groups(torch.stack((target, lay.valid.sum(1) - target), 1).tolist(), apart)


def _groups(sizes: Sequence[Any], apart: Container[int] = ()) -> list[list[int]]:
    """Do `_alike` by the numbers of tokens of each row's targets and source."""
    groups: list[list[int]] = []
    tokens, widest = 0, (0, 0)
    for row in sorted((row for row in range(len(sizes)) if row not in apart), key=sizes.__getitem__):
        tokens += sum(sizes[row])
        widest = (max(widest[0], sizes[row][0]), max(widest[1], sizes[row][1]))
        if not groups or (len(groups[-1]) + 1) * sum(widest) > PADDED * tokens + SPARE_TOKENS:
            groups.append([])
            tokens, widest = sum(sizes[row]), (sizes[row][0], sizes[row][1])
        groups[-1].append(row)
    return groups


class _FilledLayer(Protocol):
    """A layer of a cache after a call has filled it."""

    keys: torch.Tensor
    values: torch.Tensor


class _Part(NamedTuple):
    """Tokens inside the joint layers: sources, B x S, or targets, B x N x C."""

    states: torch.Tensor
    """... x H."""
    positions: torch.Tensor
    bias: torch.Tensor
    """B x 1 x S x S or B x N x 1 x C x C."""
    output_mask: torch.Tensor
    """Same shape as positions."""

    def chosen(self, rows: torch.Tensor) -> "_Part":
        """Return some rows."""
        return _Part(*(field[rows] for field in self))


class _JointRun:
    """A run of rows through the joint layers: sources first, then targets, which attend to their row's source.

    The [BOS] that opens a target attends to the source and itself only, so that its state is equal in all targets of a
    row: the first [BOS] is computed as the last token of the source and used for all targets.

    Args:
        model: The network.
        entered: The tokens, B x T.
        rows: Numbers of the rows in the batch.
    """

    @torch.compiler.disable
    def __init__(self, model: "M6RecModel", entered: JointInputs, rows: list[int]) -> None:
        lay, tokens = entered.lay, entered.states.shape[1]
        self.model, self.rows = model, rows
        opens = (lay.target > functional.pad(lay.target, (1, -1))) & entered.keys
        first = opens & (opens.cumsum(1) == 1)
        near = pick(torch.where(lay.valid & (lay.target == 0) | first, 0, -1), 1)
        self.near, self.seen = self._part(entered, near)
        self.place = near.places(tokens)
        """B x T: index of a token's state in the concatenation of sources and targets."""
        self.place = torch.where(opens, (self.place * first).sum(1, keepdim=True), self.place)
        slots, self.far = int(lay.target.max()), None
        if slots:
            # Each target becomes a separate row: B * N x C.
            target = pick(torch.where((lay.target > 0) & ~opens, lay.target - 1, -1), slots)
            far, _ = self._part(entered, target, slots)
            self.far = _Part(*(field.unflatten(0, (-1, slots)) for field in far))
            behind = target.places(tokens) + near.columns.shape[1]
            self.place = torch.where((lay.target > 0) & ~opens, behind, self.place)
        self.users: list[SharedKeys] = []
        """Keys and values of the next layers, if the sources have run through them already."""

    def _tokens(self, far: _Part) -> int:
        return self.near.positions.numel() + far.positions.numel()

    @torch.compiler.disable
    def _united(self, far: _Part) -> _Part:
        """Append a row's targets to its source, so that one pass computes both."""
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

        return _Part(both("states"), both("positions"), bias, both("output_mask"))

    def _part(self, entered: JointInputs, picked: Picked, slots: int = 1) -> tuple[_Part, torch.Tensor]:
        """Return the picked tokens, each slot as a separate row, and which of them others may attend to."""

        def own(field: torch.Tensor) -> torch.Tensor:
            return field if slots == 1 else field.reshape(len(field) * slots, -1, *field.shape[2:])

        states, lay = own(picked.of(entered.states)), Layout(*map(own, entered.lay.take(*picked)))
        seen, output_mask = (own(picked.of(field) & picked.present) for field in (entered.keys, entered.output_mask))
        size = states.shape[1]
        bias = attention_bias(joint_mask(lay, size, self.model.config, seen), size, size, states.dtype)
        return _Part(states, self.model.joint_positions(lay), bias, output_mask), seen

    @torch.compiler.disable(recursive=False)
    def through(
        self, exits: Sequence[int], past: PrefixMatches | None, stop: Stop | None
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Run from exit to exit; see `joint_shared`."""
        going = torch.arange(len(self.rows), device=self.near.states.device)
        left = torch.full_like(going, exits[-1])
        results: list[torch.Tensor] = []
        ends_early = past is not None and stop is not None  # then sources run deeper than targets
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
            found = gather_tokens(self.model.norm(found), self.place)
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
        """Keep only the rows that go on."""
        self.near, self.place, self.seen = self.near.chosen(stays), self.place[stays], self.seen[stays]
        if self.far is not None:
            self.far = self.far.chosen(stays)
        self.users = [keys.chosen(stays) for keys in self.users]

    @torch.compiler.disable(recursive=False)
    def _read_sources(
        self, first: int, last: int, exits: Sequence[int], past: PrefixMatches | None
    ) -> Iterator[torch.Tensor]:
        """Run the sources through joint layers `first` to the next exit, or through all layers if they are kept.

        Returns:
            Their states at each exit. `users` then holds the keys and values, for targets and for keeping.
        """
        model, cache = self.model, None if self.far is None and past is None else DynamicCache()
        known = [] if past is None else past.shared(self.rows)
        ends = [last] if past is None else exits
        output_mask = self.near.output_mask if ends[-1] == exits[-1] else None
        read = model.joint_stage(*self.near[:3], ends, known or None, first, output_mask, key_cache=cache)
        if cache is None:
            return iter(read)
        bias = None
        if not self.seen.all():
            lowest = torch.finfo(self.near.states.dtype).min
            bias = self.near.states.new_zeros(self.seen.shape).masked_fill(~self.seen, lowest)[:, None, None]
        own = cast(list[_FilledLayer], cache.layers[model.config.num_segment_layers + first :])
        self.users = [SharedKeys(layer.keys, layer.values, bias) for layer in own]
        if known:
            self.users = [before.followed_by(after) for before, after in zip(known, self.users)]
        if past is not None:
            past.keep(self.rows, self.users, known[0].key.shape[2] if known else 0)
        return iter(read)

    @torch.compiler.disable(recursive=False)
    def _read_targets(self, far: _Part, first: int, last: int, end: int) -> _Part:
        """Run the targets through joint layers `first` to `last` (of `end`), some targets of each user at a time."""
        parts, (users, slots, size) = [], far.positions.shape
        step = -(-slots // max(round(users * slots * size / _at_once(far.states.device)), 1))  # of similar size
        for start in range(0, slots, step):
            states, positions, bias, output_mask = (field[:, start : start + step].flatten(0, 1) for field in far)
            asked = output_mask if last == end else None
            (read,) = self.model.joint_stage(states, positions, bias, [last], self.users, first, asked)
            parts.append(read.unflatten(0, (users, -1)))
        return far._replace(states=torch.cat(parts, 1))


def _at_once(device: torch.device) -> int:
    return TOKENS_AT_ONCE.get(device.type, TOKENS_AT_ONCE_ELSEWHERE)


@torch.compiler.disable(recursive=False)
def _distinct_segments(
    model: "M6RecModel", rows: Rows, cache: SegmentCache | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute each distinct segment once, or take its states from the cache."""
    input_ids, lay = rows.input_ids, rows.lay
    row = torch.arange(len(input_ids), device=input_ids.device)[:, None] * (input_ids.shape[1] + 1)
    _, lengths = torch.unique_consecutive((lay.segment + row)[lay.valid], return_counts=True)
    ids, modes = input_ids[lay.valid].tolist(), lay.mode[lay.valid].tolist()
    payloads = _payloads_in_order(rows)
    numbers: dict[SegmentKey, int] = {}
    order, start = [], 0
    for number, length in enumerate(lengths.tolist()):
        payload = payloads[number] if payloads else b""
        key = SegmentKey(modes[start], tuple(ids[start : start + length]), payload)
        order.append(numbers.setdefault(key, len(numbers)))
        start += length
    alone = [numbers.setdefault(key, len(numbers)) for key in rows.standalone]
    bank, offsets = model.encode_segments(list(numbers), cache)
    offsets = offsets.to(input_ids.device)
    first = offsets[torch.tensor(order, device=input_ids.device)]
    place = torch.zeros_like(input_ids)
    place[lay.valid] = first.repeat_interleave(lengths) + lay.segment_position[lay.valid]
    ends = [len(key.ids) - 1 for key in rows.standalone]
    standalone_states = bank[offsets[alone] + torch.tensor(ends, device=offsets.device, dtype=torch.long)]
    return model.add_to_bank(bank, list(numbers), offsets), place, standalone_states


@torch.compiler.disable
def _payloads_in_order(rows: Rows) -> list[bytes]:
    """List the payloads of the segments of all rows, one row after another; empty if no segment has one."""
    if not any(rows.payloads):
        return []
    segments = [field[valid].unique_consecutive().tolist() for field, valid in zip(rows.lay.segment, rows.lay.valid)]
    return [own.get(number, b"") for own, numbers in zip(rows.payloads, segments) for number in numbers]


def last_states(model: "M6RecModel", segments: Sequence[SegmentKey], cache: SegmentCache | None = None) -> torch.Tensor:
    """Run the segment layers on standalone segments: state of each last token, M x H, without item features."""
    if not segments:  # an exported graph has none
        return model.embed_kind.weight.new_zeros(0, model.config.hidden_size)
    return _last_states(model, segments, cache)


@torch.compiler.disable(recursive=False)
def _last_states(model: "M6RecModel", segments: Sequence[SegmentKey], cache: SegmentCache | None) -> torch.Tensor:
    numbers = {key: number for number, key in enumerate(dict.fromkeys(segments))}
    bank, offsets = model.encode_segments(list(numbers), cache)
    ends = [int(offsets[numbers[key]]) + len(key.ids) - 1 for key in segments]
    return bank[torch.tensor(ends, device=bank.device)]


def _batches(missing: list[int], segments: list[SegmentKey], tokens: int) -> Iterator[list[int]]:
    """Group segments of similar length: a padded batch holds at most `tokens` tokens, and little padding."""
    batch: list[int] = []
    own = 0
    for index in sorted(missing, key=lambda number: len(segments[number].ids)):
        length = len(segments[index].ids)
        if batch and (len(batch) + 1) * length > min(tokens, PADDED_SEGMENTS * (own + length) + SPARE_TOKENS):
            yield batch
            batch, own = [], 0
        batch.append(index)
        own += length
    if batch:
        yield batch


@torch.compiler.disable(recursive=False)
def _encode(model: "M6RecModel", segments: list[SegmentKey]) -> tuple[torch.Tensor, list[int]]:
    """Run one padded batch through the segment layers; returns states without padding, and lengths."""
    ids, lay = _padded(model, segments)
    payloads = [{1: key.payload} for key in segments] if any(key.payload for key in segments) else ()
    return read_standalone(model, ids, lay, payloads)[lay.valid], [len(key.ids) for key in segments]


@torch.compiler.disable
def _padded(model: "M6RecModel", segments: list[SegmentKey]) -> tuple[torch.Tensor, Layout]:
    """Make one batch of segments, B x T ids padded right, and their layout."""
    device = model.embeddings.tokens.weight.device
    lengths = [len(key.ids) for key in segments]
    width, fill = max(lengths, default=0), model.config.pad_token_id
    padded = [[*key.ids, *[fill] * (width - len(key.ids))] for key in segments]
    ids = torch.tensor(padded, dtype=torch.long, device=device).view(len(segments), width)
    index = torch.arange(width, device=device).expand_as(ids)
    valid = index < torch.tensor(lengths, dtype=torch.long, device=device)[:, None]
    mode = torch.tensor([key.mode for key in segments], dtype=torch.long, device=device)[:, None].expand_as(ids)
    return ids, standalone_layout(valid, mode)


def read_standalone(model: "M6RecModel", ids: torch.Tensor, lay: Layout, payloads: Payloads = ()) -> torch.Tensor:
    """Run B x T ids, one segment per row, padded right, through the segment layers: B x T x H."""
    width = ids.shape[1]
    index = torch.arange(width, device=ids.device).expand_as(ids)
    embeds = model.embed_ids(ids, lay, payloads)
    mask = own_segment_mask(lay, width, model.config)
    bias, local = model.biases(model.with_local(mask, index), width, width, embeds.dtype)
    return model.segment_stage(embeds, index, bias, ids, lay, local)


@torch.compiler.disable(recursive=False)
def run(
    model: "M6RecModel",
    plan: str,
    rows: Rows,
    cache: SegmentCache | None,
    users: UserStates | None = None,
    decide: Decide | None = None,
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, Picked, torch.Tensor | None]:
    """Run the plan "compact", "shared_prefix" or "cached"; only the last uses the cache and `users`.

    `decide` is called after each exit but the last, with b x n x H states of kept tokens, which tokens these are, their
    layout and their b row numbers; it returns b bool: the rows that stop there.

    Returns:
        Joint states of each exit and segment states, all B x n x H, of the n kept tokens of a row; the last states of
        standalone segments, M x H; which tokens were kept; and the exit of each row, if `decide` is given.
    """
    past = users.find(model, rows) if users is not None else None
    if past is not None:  # from here on, reused tokens count as absent
        rest = Layout(*(field * ~past.reused for field in rows.lay))
        rows = rows._replace(lay=rest, keys=rows.keys & ~past.reused)
    bank, place, alone = segment_states(model, rows, plan != "shared_prefix", cache if plan == "cached" else None)
    joint, states, kept = _entered(model, rows, bank, place)
    if plan == "compact":
        return joint_rows(model, joint, rows.exits), states, alone, kept, None
    stop = None if decide is None else partial(_decided, decide, kept, joint.lay)
    read, left = joint_shared(model, joint, rows.exits, past, stop)
    return read, states, alone, kept, None if decide is None else left


@torch.compiler.disable
def _entered(
    model: "M6RecModel", rows: Rows, bank: torch.Tensor, place: torch.Tensor
) -> tuple[JointInputs, torch.Tensor, Picked]:
    """Return the input of the joint layers for the tokens that are keys, their segment states and their indices."""
    kept = pick(torch.where(rows.keys, 0, -1), 1)
    states, here = bank[kept.of(place)], rows.lay.take(*kept)
    entered = model.enter(
        states, here, None if rows.item_embedding_ids is None else kept.of(rows.item_embedding_ids) * kept.present
    )
    output_mask = torch.ones_like(rows.keys) if rows.output_mask is None else rows.output_mask
    seen, output_mask = (kept.of(field) & kept.present for field in (rows.keys & ~rows.hidden, output_mask))
    if rows.text_only is None:
        return JointInputs(entered, here, seen, output_mask), states, kept
    return JointInputs(entered, here, seen & ~kept.of(rows.text_only), output_mask, seen), states, kept


@torch.compiler.disable
def _decided(decide: Decide, kept: Picked, lay: Layout, states: torch.Tensor, rows: list[int]) -> torch.Tensor:
    return decide(states, kept.chosen(rows), Layout(*(field[rows] for field in lay)), rows)


# -------------------------------------------------------------------------------------------------------- the network


logger = logging.get_logger(__name__)


GIVEN: Any = None
"""Default, as ModelOutput wants it, of a field that the network always gives a value."""


@dataclass
class M6RecModelOutput(CachedOutput):
    """Output of the network.

    Attributes:
        last_hidden_state: B x Q x H; plans other than "flat" return zeros for tokens that the joint layers skip.
        segment_states: B x Q x H, output of the segment layers for each token.
        standalone_states: M x H, last states of the standalone segments, without item features.
        exit_states: Joint states after each requested exit, B x Q x H each; the last is `last_hidden_state`.
        cache: The cache, if requested; also available as `past_key_values`.
        layout: Layout of the Q tokens, without virtual tokens.
        row_layout: Layout of all T tokens of the rows.
        kept: With `compact_output`, the indices of the Q tokens in the row.
        exit_layers: B, number of joint layers that each row ran through, if `decide` was given.
        continuation: With a cache, what the next written token needs to know of the rows, if all rows can go on.
        hidden_states: Output of every layer, if requested.
        attentions: Attention weights of every layer, if requested (eager attention only).
    """

    last_hidden_state: torch.Tensor = GIVEN
    segment_states: torch.Tensor = GIVEN
    standalone_states: torch.Tensor = GIVEN
    exit_states: tuple[torch.Tensor, ...] = GIVEN
    cache: Cache | None = None
    layout: Layout = GIVEN
    row_layout: Layout = GIVEN
    kept: Picked | None = None
    exit_layers: torch.Tensor | None = None
    continuation: Continuation | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class M6RecPreTrainedModel(PreTrainedModel):
    """Settings and initialisation that Transformers needs for every M6Rec class."""

    config: M6RecConfig
    config_class = M6RecConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["M6RecLayer"]
    _skip_keys_device_placement = list(CACHE_NAMES)
    _supports_sdpa = True
    _supports_flex_attn = False  # torch 2.13 crashes in it on a CPU, with M6Rec's masks
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": M6RecLayer, "attentions": M6RecAttention}

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        for feature in ITEM_FEATURES:
            feature.reset(module)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize as the library does, together with the word tables of item features."""
        embeddings = cast(nn.Embedding, super().resize_token_embeddings(*args, **kwargs))
        cast(M6RecModel, self.base_model).resize_word_tables(len(embeddings.weight))
        return embeddings


class M6RecModel(M6RecPreTrainedModel):
    """The bare network. Plans use its parts `segment_stage`, `enter` and `joint_stage`."""

    def __init__(self, config: M6RecConfig) -> None:
        super().__init__(config)
        size = config.hidden_size
        self.embeddings = M6RecEmbeddings(config)
        self.embed_kind = nn.Embedding(len(KINDS) + 1, size, padding_idx=0)
        self.embed_event = nn.Embedding(config.max_events + 1, size, padding_idx=0)
        for feature in ITEM_FEATURES:
            feature.put(self, feature.make(config))
        self.entry_norm = make_norm(config, size) if config.entry_norm else nn.Identity()
        self.layers = nn.ModuleList(M6RecLayer(config) for _ in range(config.num_hidden_groups))
        groups, layers = config.num_hidden_groups, config.num_hidden_layers
        self._groups = [index * groups // layers for index in range(layers)]
        self.norm = make_norm(config, size) if config.final_norm else nn.Identity()
        rotary = config.position_embedding_type == "rotary"
        self.rotary = M6RecRotaryEmbedding(config) if rotary else None
        self.local_layers = frozenset(config.local_layers or ())
        other = rotary and self.local_layers and config.local_rope_theta is not None
        self.local_rotary = M6RecLocalRotaryEmbedding(config) if other else None
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the token embeddings."""
        return self.embeddings.tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embeddings."""
        self.embeddings.tokens = cast(nn.Embedding, value)

    def embed_ids(self, ids: torch.Tensor, lay: Layout, payloads: Payloads = ()) -> torch.Tensor:
        """Embed tokens. An override may embed payloads (content of segments besides ids); this version has none.

        Args:
            ids: B x Q ids.
            lay: Their layout, which gives each token's segment.
            payloads: For each row, digests of its segments' payloads by segment number.

        Returns:
            B x Q x embedding_size.
        """
        return self.embeddings.tokens(ids)

    def layer(self, index: int) -> M6RecLayer:
        """Return the weights of layer `index`; consecutive layers share them if there are fewer groups than layers."""
        return cast(M6RecLayer, self.layers[self._groups[index]])

    def segment_modules(self) -> list[nn.Module]:
        """Return the modules that decide segment states: the embeddings and the segment layers."""
        layers, groups, segment = self.config.num_hidden_layers, len(self.layers), self.config.num_segment_layers
        used = (segment - 1) * groups // layers + 1 if segment else 0
        return [self.embeddings, *list(self.layers)[:used]]

    def freeze_segments(self) -> None:
        """Freeze embeddings and segment layers, so that segment states can be kept while the rest is trained.

        Raises:
            ValueError: If joint layers share their weights with segment layers.
        """
        joint = {
            id(self.layer(index)) for index in range(self.config.num_segment_layers, self.config.num_hidden_layers)
        }
        modules = self.segment_modules()
        if any(id(module) in joint for module in modules):
            raise ValueError(
                f"num_hidden_groups={self.config.num_hidden_groups}: joint layers share weights with segment layers, "
                "which cannot be frozen alone"
            )
        for module in modules:
            module.requires_grad_(False)
        self.train(self.training)

    @property
    def segments_are_frozen(self) -> bool:
        """Whether no weight that decides segment states is being trained."""
        return not any(weight.requires_grad for module in self.segment_modules() for weight in module.parameters())

    def train(self, mode: bool = True) -> "M6RecModel":
        """Switch dropout on or off; frozen segment layers run without dropout, as in serving."""
        super().train(mode)
        if mode and self.segments_are_frozen:
            for module in self.segment_modules():
                module.eval()
        return self

    @torch.compiler.disable(recursive=False)
    def encode_segments(
        self, segments: list[SegmentKey], cache: SegmentCache | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the segment layers on distinct segments, batched by similar length.

        Args:
            segments: Key of each segment.
            cache: Cache of states; it is not used while the segment layers are trained or use dropout.

        Returns:
            The bank, W x H states one segment after another, and the index of each segment's first state in it.
        """
        learning = torch.is_grad_enabled() and not self.segments_are_frozen
        found: dict[int, torch.Tensor] = {}
        store = None if learning or self.embeddings.training else cache
        if store is not None:
            owner = store.serve(self)
            found = store.find(owner, segments)
        missing = [index for index in range(len(segments)) if index not in found]
        order, parts = list(found), list(found.values())
        for batch in _batches(missing, segments, _at_once(self.embeddings.tokens.weight.device)):
            with torch.set_grad_enabled(learning):
                states, lengths = _encode(self, [segments[index] for index in batch])
            if store is not None:
                for index, own in zip(batch, states.split(lengths)):
                    store.put(owner, segments[index], own)
            order += batch
            parts.append(states)
        sizes = torch.tensor([len(segments[index].ids) for index in order], dtype=torch.long)
        offsets = torch.empty_like(sizes)
        offsets[torch.tensor(order, dtype=torch.long)] = sizes.cumsum(0) - sizes
        return torch.cat(parts), offsets

    def with_local(
        self, mask: torch.Tensor, positions: torch.Tensor, keys: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a mask (B x Q x T bool), and that of `local_layers` by B x Q and B x T positions (default: equal)."""
        window = self.config.local_window
        exporting = torch.compiler.is_exporting()  # an exported graph must accept all lengths
        if not self.local_layers or window is None or not exporting and mask.shape[2] <= window:
            return mask, mask
        return mask, mask & near(positions, positions if keys is None else keys, window)

    def _rotaries(self, states: torch.Tensor, positions: torch.Tensor) -> list[tuple | None]:
        """Return the rotations of B x Q positions in layers that attend to everything and in `local_layers`."""
        if self.rotary is None:
            return [None, None]
        found = self.rotary(states, positions)
        return [found, found if self.local_rotary is None else self.local_rotary(states, positions)]

    def segment_stage(
        self,
        embeds: torch.Tensor,
        positions: torch.Tensor,
        bias: torch.Tensor | None,
        ids: torch.Tensor,
        lay: Layout,
        local_bias: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Read each segment independently: B x Q x embedding_size token embeddings -> B x Q x H segment states.

        `ids` and `lay` belong to the last tokens: virtual tokens in front of them belong to no segment. `local_bias` is
        the bias of `local_layers`; None = `bias`. Without segment layers there is no bias.
        """
        states = self.embeddings(embeds, positions)
        if not self.config.num_segment_layers:
            return states
        rotaries, biases = self._rotaries(states, positions), (bias, bias if local_bias is None else local_bias)
        for index in range(self.config.num_segment_layers):
            local = index in self.local_layers
            states = self.layer(index)(states, rotaries[local], biases[local], layer_idx=index, **kwargs)
        if self.config.segment_pooling == "mean":
            virtual, own = states.tensor_split((states.shape[1] - ids.shape[1],), 1)
            states = torch.cat((virtual, mean_at_close(own, lay, ids == self.config.segment_token_id)), 1)
        return states

    def add_to_items(self, states: torch.Tensor, item_embedding_ids: torch.Tensor | None) -> torch.Tensor:
        """Add to ... x H states the features of items, by ... rows of item embeddings (0 = none)."""
        if item_embedding_ids is None:
            return states
        for feature in features_at("states", self.config):
            states = feature.add(self, states, item_embedding_ids)
        return states

    def add_to_texts(self, states: torch.Tensor, ids: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """Add to M x H states of standalone items the features of their M x L ids of [ITEM] ... [SEG]."""
        for feature in features_at("segments", self.config):
            states = states + feature.of_items(self, ids, item_layout(ids, valid)).to(states.dtype)
        return states

    def add_to_rows(self, states: torch.Tensor, ids: torch.Tensor, lay: Layout) -> torch.Tensor:
        """Add to B x Q x H segment states the features of each item, at its [SEG]; T ids, the last of the Q."""
        for feature in features_at("segments", self.config):
            added = feature.in_rows(self, ids, lay).to(states.dtype)
            states = states + functional.pad(added, (0, 0, states.shape[1] - ids.shape[1], 0))
        return states

    @torch.compiler.disable
    def last_rows(self, segments: Sequence[tuple[int, ...]], cache: SegmentCache) -> tuple[torch.Tensor, list[int]]:
        """Run the segment layers on given segments: the states that stay, with the features of items, and their number.

        These are the states of `segment_summary` tokens of each segment, its last, or of all its tokens.
        """
        keys = [SegmentKey(0, ids) for ids in segments]
        bank, offsets = self.encode_segments(keys, cache)
        bank = self.add_to_bank(bank, keys, offsets)
        lengths, most = [len(ids) for ids in segments], self.config.segment_summary
        counts = [length if most is None else min(length, most) for length in lengths]
        index = [
            place
            for start, length, count in zip(offsets.tolist(), lengths, counts)
            for place in range(start + length - count, start + length)
        ]
        return bank[torch.tensor(index, dtype=torch.long, device=bank.device)], counts

    def read_sources(
        self,
        sources: Sequence[Sequence[Piece]],
        cache: SegmentCache,
        exit_layer: int,
        version: object | None = None,
        users: UserStates | None = None,
    ) -> tuple[torch.Tensor, list[int]]:
        """Run rows that hold one source each, with causal history, by the plan "cached".

        The states are those of `forward` at the last places of users, but the work outside the layers grows with the
        number of segments instead of tokens, and the last layer computes no other states.

        Args:
            sources: For each row its segments, see `source_tokens`.
            cache: Cache of segment states.
            exit_layer: Number of joint layers to run.
            version: As of `StateTable.find`.
            users: Cache of histories, of which only new tokens are then computed; None = no cache.

        Returns:
            B x E x H joint states, the last one that of the user's last place, the others of tokens before it: their
            number decides on CPUs how a product is rounded. And for each row the segment of the last place.
        """
        device = self.embed_kind.weight.device
        every = [ids for own in sources for ids, _ in own]
        table, ends = cache.table.find(self, every, partial(self.last_rows, cache=cache), version)
        read = source_tokens(sources, ends, self.config)
        past = None if users is None else users.find_sources(self, sources, read, exit_layer, version)
        kept = kept_sources(read if past is None else past.rest(read))
        kind, event, position, memory, place = kept.tokens.to(device)
        states = table.index_select(0, place.flatten()).view(*place.shape, -1)
        states = self._enter(states, kind, event, memory)
        asked = kept.asked.to(device)
        groups = _groups([(0, length) for length in kept.lengths])
        if len(groups) == 1:
            groups = [sorted(groups[0])]
        found = []
        for rows in groups:
            known, new = ([], None) if past is None else (past.shared(rows), DynamicCache())
            own = slice(None) if len(groups) == 1 else rows
            width = max(kept.lengths[row] for row in rows)
            bias = states.new_full((width, width), torch.finfo(states.dtype).min).triu_(1)
            bias = bias.expand(len(rows), 1, -1, -1)
            picked = Picked(asked[own], torch.ones_like(asked[own], dtype=torch.bool))
            (joint,) = self.joint_stage(
                states[own, :width], position[own, :width], bias, [exit_layer], known or None, 0, picked, key_cache=new
            )
            found.append(self.norm(joint[:, -kept.users :]))
            if past is not None and new is not None:
                layers = cast(list[_FilledLayer], new.layers[self.config.num_segment_layers :])
                past.keep(rows, [SharedKeys(layer.keys, layer.values, None) for layer in layers], 0)
        last = [row.last for row in read]
        if len(found) == 1:
            return found[0], last
        order = torch.tensor([row for rows in groups for row in rows], device=device).argsort()
        return torch.cat(found)[order], last

    @torch.compiler.disable
    def add_to_bank(self, bank: torch.Tensor, segments: Sequence[SegmentKey], offsets: torch.Tensor) -> torch.Tensor:
        """Add to W x H segment states the features of items, at [SEG]; each segment starts at its offset."""
        features = features_at("segments", self.config)
        if not features:
            return bank
        opens, closes = self.config.kind_token_ids["item"], self.config.segment_token_id
        own = [n for n, key in enumerate(segments) if not key.mode and key.ids[0] == opens and key.ids[-1] == closes]
        ids, lay = _padded(self, [segments[number] for number in own])
        lay = item_layout(ids, lay.valid)
        ends = offsets[own] + lay.valid.sum(1) - 1
        for feature in features:
            bank = bank.index_add(0, ends, feature.of_items(self, ids, lay).to(bank.dtype))
        return bank

    def resize_item_embeddings(self, rows: int) -> None:
        """Change the number of rows of item embeddings; existing rows stay, new rows have no effect until trained."""
        for feature in ITEM_FEATURES:
            feature.resize_items(self, rows)

    def resize_word_tables(self, words: int) -> None:
        """Change the number of words in the word tables of item features, if there are any."""
        for feature in ITEM_FEATURES:
            feature.resize_words(self, words)

    def enter(self, states: torch.Tensor, lay: Layout, item_embedding_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Make the input of the joint layers: add kind, event ordinal and item features to B x Q x H segment states."""
        return self._enter(states, lay.kind, lay.event, item_embedding_ids)

    def _enter(
        self, states: torch.Tensor, kind: torch.Tensor, event: torch.Tensor, item_embedding_ids: torch.Tensor | None
    ) -> torch.Tensor:
        event = event.clamp_max(self.config.max_events)
        states = self.add_to_items(states + self.embed_kind(kind) + self.embed_event(event), item_embedding_ids)
        return functional.dropout(self.entry_norm(states), self.config.entry_dropout, self.training)

    def joint_positions(self, lay: Layout) -> torch.Tensor:
        """Return B x Q positions in the request or in the segment, as configured."""
        return lay.request_position if self.config.joint_positions == "request" else lay.segment_position

    def embedding_positions(self, lay: Layout) -> torch.Tensor:
        """Return B x Q positions at the embedding and in the segment layers.

        Where written text attends to its source there, they are those of the joint layers. Given text is then rotated
        by another position, but attends to its own segment only, where distances decide: its states stay equal.
        """
        apart = self.config.num_segment_layers and not self.config.writes_from_source
        return lay.segment_position if apart else self.joint_positions(lay)

    def joint_stage(
        self,
        states: torch.Tensor,
        positions: torch.Tensor,
        bias: torch.Tensor,
        exits: Sequence[int],
        shared: Sequence[SharedKeys] | None = None,
        first: int = 0,
        output_mask: torch.Tensor | Picked | None = None,
        local_bias: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> list[torch.Tensor]:
        """Read all segments together: B x Q x H -> states, before `norm`, after each of the joint layers in `exits`.

        Runs from joint layer `first`, counted from 0, to the last exit. `shared` holds a user's keys in each of these
        layers. With `output_mask` (B x Q bool) the last layer computes these tokens only and sets all others to zero.
        If the tokens are picked already, only their states are returned. `local_bias` is the bias of `local_layers`;
        None = `bias`.
        """
        rotaries, biases = self._rotaries(states, positions), [bias, bias if local_bias is None else local_bias]
        results, start, tokens = [], self.config.num_segment_layers, states.shape[1]
        asked: Picked | None = None
        for index in range(first, exits[-1]):
            if index + 1 == exits[-1]:
                asked = _asked(output_mask)
            if asked is not None:
                several = biases[:1] if biases[0] is biases[1] else biases
                biases = [gather_tokens(each[:, 0], asked.columns)[:, None] for each in several] * (3 - len(several))
                kwargs["output_mask"] = asked.columns
            own = None if shared is None else shared[index - first]
            layer, local = start + index, start + index in self.local_layers
            states = self.layer(layer)(states, rotaries[local], biases[local], layer_idx=layer, shared=own, **kwargs)
            if index + 1 in exits:
                results.append(states if asked is None or asked is output_mask else asked.back(states, tokens))
        return results

    @capture_outputs
    def forward(  # noqa: PLR0913 - one argument for each input
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        layout_ids: torch.Tensor | None = None,
        item_embedding_ids: torch.Tensor | None = None,
        hidden_events: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        plan: str | None = None,
        segment_cache: SegmentCache | None = None,
        user_states: UserStates | None = None,
        exits: Sequence[int] | None = None,
        decide: Callable[[torch.Tensor, Picked, Layout, list[int]], torch.Tensor] | None = None,
        standalone: Sequence[SegmentKey] = (),
        compact_output: bool = False,
        heads: Sequence[str] | None = None,
        extra_output_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        payloads: Payloads = (),
        continuation: Continuation | None = None,
        **kwargs: Any,
    ) -> M6RecModelOutput:
        """Run the network on rows.

        Args:
            input_ids: B x Q new ids.
            attention_mask: B x (P + T), nonzero = not padding; None = only pad ids are padding.
            layout_ids: B x T, all ids so far; required with `inputs_embeds` or a filled cache, else `input_ids`.
            item_embedding_ids: B x T rows of item embeddings at the [SEG] of [ITEM] segments, 0 = none.
            hidden_events: B x T bool, tokens that no other token attends to in the joint layers.
            past_key_values: The older name of `cache`.
            inputs_embeds: B x Q x embedding_size, in place of `input_ids`.
            use_cache: Return a cache.
            plan: How to run (see `network_m6rec`); None = "compact", or "flat" if every state is needed or a graph is
                exported.
            segment_cache: Segment states kept between calls, for plan "cached".
            user_states: User histories kept between calls, for plan "cached". Reused tokens have no output, like tokens
                that a summary drops.
            exits: Joint layers, from 1, after which states are needed; None = the last.
            decide: Decides after each exit which rows stop (see `network_m6rec.run`), for "shared_prefix" and "cached".
            standalone: Standalone segments, which belong to no row, to be computed as well.
            compact_output: If a plan skips tokens, return states and layout of the kept tokens only (Q = the largest
                number in a row) and their indices in `kept`.
            heads: Heads that read the last states: "score" at the ends of targets, "user" at the places of users. The
                last joint layer then skips all other tokens, whose states are undefined. None = no token is skipped.
            extra_output_mask: B x T bool, further tokens whose last states are needed.
            cache: A cache to fill or to continue from.
            payloads: For each row, digests of its segments' content besides ids, by segment number; segments with
                different digests share no state. Empty = no such content; see `embed_ids`.
            continuation: That of the output before, if one token follows which is neither structural (but for [EOS])
                nor padding: the layout of earlier tokens is then not computed again.
            **kwargs: Passed to the attention function.

        Raises:
            ValueError: If the arguments contradict each other; the message names the arguments to give.
        """
        given = inputs_embeds if input_ids is None else input_ids
        if given is None or input_ids is not None and inputs_embeds is not None:
            raise ValueError("give either input_ids or inputs_embeds, not both and not neither")
        cache = self._usable(one_cache(cache, past_key_values))
        past = 0 if cache is None else int(cache.get_seq_length())
        layout_ids = all_ids(None if past else input_ids, layout_ids)
        total, queries = layout_ids.shape[1], given.shape[1]
        exits = sorted(set(exits or [self.config.num_joint_layers]))
        goes_on = continuation is not None and queries == 1 and continuation.tokens == total - 1 <= past
        goes_on = goes_on and (not self.local_layers or total <= (self.config.local_window or 0))
        if goes_on and input_ids is not None and continuation is not None and cache is not None:
            following = continuation.followed_by(input_ids, self.config)
            return self._write_on(input_ids, following, cache, past, exits, **kwargs)
        if past + queries < total:
            raise ValueError(f"layout_ids holds {total} ids, but only {past + queries} are in the cache and the input")
        lay = layout(layout_ids, None if attention_mask is None else attention_mask[:, -total:], self.config)
        keys = summary_keys(lay, layout_ids == self.config.segment_token_id, self.config)
        hidden = torch.zeros_like(keys) if hidden_events is None else _widen(hidden_events.bool(), total)
        item_embedding_ids = None if item_embedding_ids is None else _widen(item_embedding_ids, total)
        output_mask = None if heads is None else head_places(layout_ids, lay, self.config, "user" in heads)
        if output_mask is not None and extra_output_mask is not None:
            output_mask = output_mask | _widen(extra_output_mask, total)
        text_only = self._text_only(lay, keys)
        stay = keys if text_only is None else keys | text_only
        rows = Rows(
            layout_ids, lay, item_embedding_ids, stay, hidden, text_only, exits, standalone, output_mask, payloads
        )
        whole = not (use_cache or cache is not None or inputs_embeds is not None)
        plan = self._choose(plan, whole, kwargs)
        if (
            plan != "cached"
            and user_states is not None
            or plan not in ("shared_prefix", "cached")
            and decide is not None
        ):
            raise ValueError(f"plan={plan!r} keeps no users and stops at no exit: use plan='cached'")
        if plan == "flat":
            if use_cache and cache is None:
                cache = self._usable(DynamicCache(config=self.config))
            return self._flat(self._embedded(input_ids, inputs_embeds, rows), rows, cache, past, **kwargs)
        read, segment_states, standalone_states, kept, left = run(self, plan, rows, segment_cache, user_states, decide)
        if not compact_output:
            read, segment_states = [kept.back(state, total) for state in read], kept.back(segment_states, total)
        return M6RecModelOutput(
            last_hidden_state=read[-1],
            segment_states=segment_states,
            standalone_states=standalone_states,
            exit_states=tuple(read),
            layout=lay.take(*kept) if compact_output else lay,
            row_layout=lay,
            kept=kept if compact_output else None,
            exit_layers=left,
        )

    def _text_only(self, lay: Layout, keys: torch.Tensor) -> torch.Tensor | None:
        """Mark the tokens that written text attends to, but given text does not; None if there can be none."""
        config = self.config
        if config.written_attention != "source" or config.segment_summary is None and not config.skipped_kinds:
            return None
        return read_by_text(lay) & ~keys

    def _usable(self, cache: Cache | None) -> Cache | None:
        """With gradient checkpointing, drop an empty cache, which would be filled twice, and refuse a filled one."""
        if cache is None or not (self.gradient_checkpointing and self.training and torch.is_grad_enabled()):
            return cache
        if int(cache.get_seq_length()):
            raise ValueError(
                "gradient checkpointing computes each layer twice and cannot go on from a cache (nor learn prefixes): "
                "call model.gradient_checkpointing_disable(), or give whole rows"
            )
        logger.warning_once("gradient checkpointing computes each layer twice: no cache is kept (use_cache=False)")
        return None

    def _choose(self, plan: str | None, whole: bool, kwargs: dict[str, Any]) -> str:
        """Choose the plan: only "flat" can fill caches, take embeddings or record every layer."""
        recording = any(
            kwargs.get(name) or getattr(self.config, name, False)
            for name in ("output_hidden_states", "output_attentions")
        )
        if plan is None:
            exporting = torch.compiler.is_exporting()  # the graph of other plans depends on a batch's segments
            return "compact" if whole and not recording and not exporting else "flat"
        plan = RENAMED_KEYS.get(plan, plan)
        if plan not in PLANS:
            raise ValueError(f"plan={plan!r} is unknown: choose one of {list(PLANS)}")
        if plan != "flat" and not (whole and not recording):
            raise ValueError(
                f"plan={plan!r} takes whole rows of input_ids and records no layer: use plan='flat' with a cache, with "
                "inputs_embeds, with prefix or prompt tuning, or to get hidden states or attentions"
            )
        return plan

    def _embedded(self, ids: torch.Tensor | None, embeds: torch.Tensor | None, rows: Rows) -> torch.Tensor:
        """Return the given embeddings, or else the embeddings of the ids, of the last Q tokens of rows."""
        if ids is None:
            assert embeds is not None
            return embeds
        return self.embed_ids(ids, rows.lay.last(ids.shape[1]), rows.payloads)

    def _flat(
        self, embeds: torch.Tensor, rows: Rows, cache: Cache | None, past: int, **kwargs: Any
    ) -> M6RecModelOutput:
        """Run the plan "flat": every token goes through every layer, masks restrict attention."""
        lay, (queries, total) = rows.lay, (embeds.shape[1], rows.lay.valid.shape[1])
        virtual, new = past + queries - total, min(queries, total)
        self._refuse_bad_chunks(rows, total - new, virtual, cache)
        here, ids = lay.last(new), rows.input_ids[:, total - new :]
        seen = rows.keys & ~rows.hidden
        keys, text_keys = (seen, None) if rows.text_only is None else (seen & ~rows.text_only, seen)
        places = (self.embedding_positions(lay), self.joint_positions(lay))
        masks = [
            self.with_local(mask, where[:, total - new :], where)
            for mask, where in zip(
                (
                    segment_mask(lay, new, self.config, rows.hidden),
                    joint_mask(lay, new, self.config, keys, text_keys),
                ),
                places,
            )
        ]
        item_embedding_ids = None if rows.item_embedding_ids is None else rows.item_embedding_ids[:, total - new :]
        found = self._masked(embeds, ids, here, masks, cache, virtual, rows.exits, item_embedding_ids, **kwargs)
        return M6RecModelOutput(
            **found,
            standalone_states=last_states(self, rows.standalone),
            row_layout=lay,
            continuation=None if cache is None else Continuation.after(ids, here, [m for m, _ in masks], self.config),
        )

    def _write_on(
        self, ids: torch.Tensor, following: Continuation, cache: Cache, past: int, exits: Sequence[int], **kwargs: Any
    ) -> M6RecModelOutput:
        """Run the plan "flat" on one written token of each row, B x 1 ids."""
        here, seen = following.last, (following.segment_keys[:, None], following.joint_keys[:, None])
        masks, virtual = [(mask, mask) for mask in seen], past + 1 - following.tokens
        found = self._masked(self.embed_ids(ids, here), ids, here, masks, cache, virtual, exits, None, **kwargs)
        return M6RecModelOutput(**found, standalone_states=last_states(self, ()), continuation=following)

    def _masked(
        self,
        embeds: torch.Tensor,
        ids: torch.Tensor,
        here: Layout,
        masks: Sequence[tuple[torch.Tensor, torch.Tensor]],
        cache: Cache | None,
        virtual: int,
        exits: Sequence[int],
        item_embedding_ids: torch.Tensor | None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Run every layer over the last tokens of rows, and over virtual tokens that are not in the cache yet.

        Args:
            embeds: B x Q x embedding_size.
            ids: Ids of the last tokens, B x N; N < Q if virtual tokens precede them.
            here: Their layout.
            masks: Masks of segment layers and joint layers, B x N x T bool each, and of those among `local_layers`.
            cache: Cache to fill.
            virtual: P, number of virtual tokens, in the cache or not.
            exits: Joint layers after which states are needed.
            item_embedding_ids: B x N rows of item embeddings.
            **kwargs: Passed to the attention function.

        Returns:
            Fields of the output: states, cache and layout.
        """
        queries = embeds.shape[1]
        ahead = queries - ids.shape[1]
        width = queries if cache is None else cache.get_mask_sizes(queries, 0)[0]
        kwargs["key_cache"] = cache

        def front(field: torch.Tensor) -> torch.Tensor:
            return functional.pad(field, (ahead, 0)) if ahead else field

        order = torch.arange(ahead, device=embeds.device).expand(embeds.shape[0], -1)
        positions = torch.cat((order, self.embedding_positions(here)), 1)
        # Given text attends to virtual tokens in the joint layers only: its segment state depends on its segment only.
        sees = here.text if self.config.writes_from_source else False
        bias, local = None, None
        if self.config.num_segment_layers:
            bias, local = self.biases(masks[0], queries, width, embeds.dtype, virtual, sees)
        segment_states = self.segment_stage(embeds, positions, bias, ids, here, local, **kwargs)
        segment_states = self.add_to_rows(segment_states, ids, here)
        item_embedding_ids = None if item_embedding_ids is None else front(item_embedding_ids)
        states = self.enter(
            segment_states, here._replace(kind=front(here.kind), event=front(here.event)), item_embedding_ids
        )
        bias, local = self.biases(masks[1], queries, width, states.dtype, virtual)
        positions = torch.cat((order, self.joint_positions(here)), 1)
        found = self.joint_stage(states, positions, bias, exits, local_bias=local, **kwargs)
        read = [self.norm(state) for state in found]
        return {
            "last_hidden_state": read[-1],
            "segment_states": segment_states,
            "exit_states": tuple(read),
            "cache": cache,
            "layout": here,
        }

    def biases(self, masks: tuple[torch.Tensor, torch.Tensor], *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn a mask and that of `local_layers` into biases; arguments as of `attention_bias`."""
        bias = attention_bias(masks[0], *args)
        return bias, bias if masks[1] is masks[0] else attention_bias(masks[1], *args)

    def _refuse_bad_chunks(self, rows: Rows, start: int, virtual: int, cache: Cache | None) -> None:
        """Refuse a chunk that ends inside a given segment or bidirectional text: its states would change later."""
        if virtual and cache is not None and cache.is_compileable:
            raise ValueError("a static cache has no room for prefix or prompt tuning: use the default cache")
        if not start:
            return
        lay, old, new = rows.lay, slice(start - 1, start), slice(start, start + 1)
        same_segment = lay.segment[:, old] == lay.segment[:, new]
        cut = same_segment & ~lay.written[:, new] & lay.valid[:, new]  # rows that have ended are padded
        same_source = lay.source[:, old] & lay.source[:, new] & (lay.request[:, old] == lay.request[:, new])
        cut = cut | same_source & (self.config.history_attention == "bidirectional")
        cut = cut | lay.plain[:, new] & lay.plain[:, old] & (self.config.document_attention == "bidirectional")
        if cut.any():
            raise ValueError(
                "the cache ends inside text that must be read at once (a given segment, a bidirectional source or "
                "document): begin a chunk where that text ends, or pass the whole row without a cache"
            )


def _asked(output_mask: torch.Tensor | Picked | None) -> Picked | None:
    """Pick the tokens whose last states are needed; None = all."""
    if output_mask is None or isinstance(output_mask, Picked):
        return output_mask
    return None if output_mask.all() else pick(torch.where(output_mask, 0, -1), 1)


def _widen(field: torch.Tensor, tokens: int) -> torch.Tensor:
    """Pad a B x T' field with zeros to B x tokens: tokens generated later have no item and are not hidden."""
    return functional.pad(field, (0, tokens - field.shape[1]))


__all__ = [
    "CACHE_NAMES",
    "LIBRARY_NAME",
    "PLANS",
    "CachedOutput",
    "M6RecModel",
    "M6RecModelOutput",
    "M6RecPreTrainedModel",
    "all_ids",
    "last_states",
    "library_arguments",
    "one_cache",
    "read_standalone",
    "run",
]
