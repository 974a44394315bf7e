"""The two-stage network: segment layers that read every segment alone, joint layers that read all of them together.

Shapes: B rows, T tokens so far, Q queries (the last Q tokens of the T, after P virtual tokens on their first call),
H = hidden_size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging
from transformers.utils.output_capturing import capture_outputs

from .configuration_m6rec import KINDS, M6RecConfig
from .heads_m6rec import head_places
from .layers_m6rec import M6RecAttention, M6RecEmbeddings, M6RecLayer, M6RecRotaryEmbedding, SharedKeys, make_norm
from .layout_m6rec import (
    KIND_NUMBER,
    Layout,
    Picked,
    at,
    attention_bias,
    joint_mask,
    largest,
    layout,
    mean_at_close,
    pick,
    row_starts,
    segment_mask,
    summary_keys,
)
from .outputs_m6rec import CACHE_NAMES, CachedOutput, one_cache
from .plans_m6rec import PLANS, Rows, last_states, run
from .segment_cache_m6rec import SegmentCache, SegmentKey
from .sketch_m6rec import M6RecWordSketch
from .user_states_m6rec import UserStates

logger = logging.get_logger(__name__)


@dataclass
class M6RecModelOutput(CachedOutput):
    """What the network returns.

    Attributes:
        last_hidden_state: B x Q x H; plans other than "flat" leave zeros where the joint layers leave out a token.
        segment_states: B x Q x H, what the segment layers made of each token.
        alone_states: M x H, the last states of the segments that were given to be read alone, without word memory.
        exit_states: Joint states after each wanted exit, B x Q x H each; the last is `last_hidden_state`.
        cache: The cache, if one was asked for; also found as `past_key_values`.
        layout: Layout of the Q tokens, virtual ones left out.
        kept: With `compact_output`, which tokens of the row the Q are.
        exit_layers: B, the joint layers that each row went through, if `decide` was given.
        hidden_states: Output of every layer, if asked for.
        attentions: Attention weights of every layer, if asked for (eager attention only).
    """

    last_hidden_state: torch.FloatTensor | None = None
    segment_states: torch.FloatTensor | None = None
    alone_states: torch.FloatTensor | None = None
    exit_states: tuple[torch.FloatTensor, ...] | None = None
    cache: Cache | None = None
    layout: Layout | None = None
    kept: Picked | None = None
    exit_layers: torch.LongTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class M6RecPreTrainedModel(PreTrainedModel):
    """What Hugging Face needs to know of every M6Rec class."""

    config: M6RecConfig
    config_class = M6RecConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["M6RecLayer"]
    _skip_keys_device_placement = list(CACHE_NAMES)
    _supports_sdpa = True
    _supports_flex_attn = False  # torch 2.13 crashes in it on a CPU, with masks such as ours
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": M6RecLayer, "attentions": M6RecAttention}

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.EmbeddingBag):  # word memory: nothing has been learnt of any word
            init.zeros_(module.weight)
        if isinstance(module, M6RecWordSketch):
            init.zeros_(module.rarity)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize as the library does, and word memory with it: of new words nothing has been learnt."""
        embeddings = cast(nn.Embedding, super().resize_token_embeddings(*args, **kwargs))
        cast(M6RecModel, self.base_model).resize_word_memory(len(embeddings.weight))
        return embeddings


class M6RecModel(M6RecPreTrainedModel):
    """The bare network. Plans use its parts `segment_stage`, `enter` and `joint_stage`."""

    def __init__(self, config: M6RecConfig) -> None:
        super().__init__(config)
        size = config.hidden_size
        self.embeddings = M6RecEmbeddings(config)
        self.embed_kind = nn.Embedding(len(KINDS) + 1, size, padding_idx=0)
        self.embed_event = nn.Embedding(config.max_events + 1, size, padding_idx=0)
        rows = config.num_item_memory
        self.item_memory = nn.Embedding(rows + 1, size, padding_idx=0) if rows else None
        self.word_memory = nn.EmbeddingBag(config.vocab_size, size, mode="sum") if config.word_memory else None
        width = config.word_similarity_dim
        self.word_sketch = M6RecWordSketch(config.vocab_size, width) if config.word_similarity else None
        self.entry_norm = make_norm(config, size) if config.entry_norm else nn.Identity()
        self.layers = nn.ModuleList(M6RecLayer(config) for _ in range(config.num_hidden_groups))
        self.norm = make_norm(config, size) if config.final_norm else nn.Identity()
        self.rotary = M6RecRotaryEmbedding(config) if config.position_embedding_type == "rotary" else None
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the token embeddings."""
        return self.embeddings.tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embeddings."""
        self.embeddings.tokens = value

    def layer(self, index: int) -> M6RecLayer:
        """Return the weights of layer `index`: consecutive layers share them where there are fewer groups."""
        group = index * self.config.num_hidden_groups // self.config.num_hidden_layers
        return cast(M6RecLayer, self.layers[group])

    def segment_modules(self) -> list[nn.Module]:
        """Return what decides segment states: the embeddings and the weights of the segment layers."""
        layers, groups, segment = self.config.num_hidden_layers, len(self.layers), self.config.num_segment_layers
        used = (segment - 1) * groups // layers + 1 if segment else 0
        return [self.embeddings, *list(self.layers)[:used]]

    def freeze_segments(self) -> None:
        """Stop learning in embeddings and segment layers: states can then be kept while the rest is trained.

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
        """Switch drop-out on or off; frozen segments are read without, as they will be when serving."""
        super().train(mode)
        if mode and self.segments_are_frozen:
            for module in self.segment_modules():
                module.eval()
        return self

    def segment_stage(
        self,
        embeds: torch.Tensor,
        positions: torch.Tensor,
        bias: torch.Tensor,
        ids: torch.Tensor,
        lay: Layout,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Read every segment alone: B x Q x embedding_size embeddings of tokens -> B x Q x H segment states.

        `ids` and `lay` are those of the last tokens: the virtual ones in front of them belong to no segment.
        """
        states = self.embeddings(embeds, positions)
        rotary = None if self.rotary is None else self.rotary(states, positions)
        for index in range(self.config.num_segment_layers):
            states = self.layer(index)(states, rotary, bias, layer_idx=index, **kwargs)
        if self.config.segment_pooling == "mean":
            virtual, own = states.tensor_split((states.shape[1] - ids.shape[1],), 1)
            states = torch.cat((virtual, mean_at_close(own, lay, ids == self.config.segment_token_id)), 1)
        return states

    def remember(self, states: torch.Tensor, item_ids: torch.Tensor | None) -> torch.Tensor:
        """Add item memory to ... x H states (`item_ids`: its rows, 0 = none), dropped per occurrence in training."""
        if self.item_memory is None or item_ids is None:
            return states
        if self.training and self.config.item_memory_dropout:
            kept = torch.rand(item_ids.shape, device=item_ids.device) >= self.config.item_memory_dropout
            item_ids = item_ids * kept
        return states + self.item_memory(item_ids)

    def read_words(self, ids: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Sum word memory over M texts, by the root of their lengths.

        Args:
            ids: The words of all texts, one text after another.
            counts: M, words of each.

        Returns:
            M x H.
        """
        assert self.word_memory is not None
        return self.word_memory(ids, counts.cumsum(0) - counts) / counts.clamp_min(1).sqrt()[:, None]

    def add_words(self, states: torch.Tensor, ids: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """Add word memory to M x H states of items that stand by themselves: M x L ids of [ITEM] ... [SEG]."""
        if self.word_memory is None:
            return states
        words = valid & (ids != self.config.segment_token_id)
        words[:, 0] = False
        return states + self.read_words(ids[words], words.sum(1)).to(states.dtype)

    def add_words_in_rows(self, states: torch.Tensor, ids: torch.Tensor, lay: Layout) -> torch.Tensor:
        """Add word memory to B x Q x H segment states, at the [SEG] of each item; `ids` and `lay` are of the last T."""
        if self.word_memory is None:
            return states
        item = (lay.kind == KIND_NUMBER["item"]) & lay.valid & ~lay.written
        closing = item & (ids == self.config.segment_token_id)
        words = item & ~closing & (lay.segment_position > 0)
        slots = largest(lay.segment) + 1
        slot = (lay.segment + row_starts(ids, slots)).flatten()
        vectors = self.word_vectors(ids) * words[..., None]
        total = vectors.new_zeros(ids.shape[0] * slots, vectors.shape[-1]).index_add(0, slot, vectors.flatten(0, 1))
        count = slot.new_zeros(ids.shape[0] * slots).index_add(0, slot, words.flatten().long())
        read = (total / count.clamp_min(1).sqrt()[:, None]).index_select(0, slot).view_as(vectors)
        read = torch.where(closing[..., None], read, 0).to(states.dtype)
        return states + functional.pad(read, (0, 0, states.shape[1] - ids.shape[1], 0))

    def word_vectors(self, ids: torch.Tensor) -> torch.Tensor:
        """Return word memory of each of B x T words, B x T x H."""
        assert self.word_memory is not None
        if torch.compiler.is_exporting():  # ONNX would hold a loop over bags
            return functional.embedding(ids, self.word_memory.weight)
        return self.word_memory(ids.flatten()[:, None]).view(*ids.shape, -1)

    @torch.compiler.disable
    def add_words_in_bank(
        self, bank: torch.Tensor, segments: Sequence[SegmentKey], offsets: torch.Tensor
    ) -> torch.Tensor:
        """Add word memory to W x H states of segments, the first of each at its offset: at the [SEG] of each item."""
        if self.word_memory is None:
            return bank
        opens, closes = self.config.kind_token_ids["item"], self.config.segment_token_id
        own = [n for n, (mode, ids) in enumerate(segments) if not mode and ids[0] == opens and ids[-1] == closes]
        words = [segments[number][1][1:-1] for number in own]
        counts = torch.tensor([len(ids) for ids in words], dtype=torch.long, device=bank.device)
        ids = torch.tensor([token for ids in words for token in ids], dtype=torch.long, device=bank.device)
        return bank.index_add(0, offsets[own] + counts + 1, self.read_words(ids, counts).to(bank.dtype))

    def is_new(self, item_ids: torch.Tensor) -> torch.Tensor:
        """Say of ... rows of item memory whether nothing has been learnt there; row 0 is nobody's."""
        if self.item_memory is None:
            return torch.ones_like(item_ids, dtype=torch.bool)
        return (self.item_memory(item_ids) == 0).all(-1)

    @torch.no_grad()
    def resize_item_memory(self, rows: int) -> None:
        """Change the number of item memory rows; kept rows stay, new ones start at zero (their text speaks first)."""
        if rows < 0:
            raise ValueError(f"item memory cannot have {rows} rows: give 0 (off) or more")
        old = self.item_memory
        new = nn.Embedding(rows + 1, self.config.hidden_size, padding_idx=0) if rows else None
        if new is not None:
            new = new.to(self.embed_kind.weight)
            init.zeros_(new.weight)
            if old is not None:
                kept = min(len(old.weight), rows + 1)
                new.weight[:kept] = old.weight[:kept]
        self.item_memory, self.config.num_item_memory = new, rows

    @torch.no_grad()
    def resize_word_memory(self, rows: int) -> None:
        """Change the number of words that can be learnt of and compared, if any are."""
        if self.word_sketch is not None:
            self.word_sketch.resize(rows)
        old = self.word_memory
        if old is not None and rows != len(old.weight):
            kept = min(len(old.weight), rows)
            self.word_memory = nn.EmbeddingBag(rows, self.config.hidden_size, mode="sum").to(old.weight)
            init.zeros_(self.word_memory.weight)
            self.word_memory.weight[:kept] = old.weight[:kept]

    def enter(self, states: torch.Tensor, lay: Layout, item_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Begin the joint layers: add kind, event ordinal and item memory to B x Q x H segment states."""
        event = lay.event.clamp_max(self.config.max_events)
        states = self.remember(states + self.embed_kind(lay.kind) + self.embed_event(event), item_ids)
        return functional.dropout(self.entry_norm(states), self.config.entry_dropout, self.training)

    def joint_positions(self, lay: Layout) -> torch.Tensor:
        """Return B x Q positions in the request or in the segment, as configured."""
        return lay.request_position if self.config.joint_positions == "request" else lay.segment_position

    def embedding_positions(self, lay: Layout) -> torch.Tensor:
        """Return B x Q positions at the embedding and in the segment layers."""
        return lay.segment_position if self.config.num_segment_layers else self.joint_positions(lay)

    def joint_stage(
        self,
        states: torch.Tensor,
        positions: torch.Tensor,
        bias: torch.Tensor,
        exits: Sequence[int],
        shared: Sequence[SharedKeys] | None = None,
        first: int = 0,
        asking: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> list[torch.Tensor]:
        """Read all segments together: B x Q x H -> states, before `norm`, after each of the joint layers in `exits`.

        Runs from joint layer `first`, counted from 0, to the last exit. `shared` holds a user's keys in each of these.
        With `asking` (B x Q bool) the last layer is computed for these tokens only; after it the others are zero.
        """
        rotary = None if self.rotary is None else self.rotary(states, positions)
        results, start, tokens, asked = [], self.config.num_segment_layers, states.shape[1], None
        for index in range(first, exits[-1]):
            if asking is not None and index + 1 == exits[-1] and not asking.all():
                asked = pick(torch.where(asking, 0, -1), 1)
                bias, kwargs["asking"] = at(bias[:, 0], asked.index)[:, None], asked.index
            own = None if shared is None else shared[index - first]
            states = self.layer(start + index)(states, rotary, bias, layer_idx=start + index, shared=own, **kwargs)
            if index + 1 in exits:
                results.append(states if asked is None else asked.back(states, tokens))
        return results

    @capture_outputs
    def forward(  # noqa: PLR0913 - one argument for each input
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        layout_ids: torch.LongTensor | None = None,
        item_ids: torch.LongTensor | None = None,
        hidden_events: torch.BoolTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        plan: str | None = None,
        segment_cache: SegmentCache | None = None,
        user_states: UserStates | None = None,
        exits: Sequence[int] | None = None,
        decide: Callable[[torch.Tensor, Picked, Layout, list[int]], torch.Tensor] | None = None,
        alone: Sequence[SegmentKey] = (),
        compact_output: bool = False,
        heads: Sequence[str] | None = None,
        asked: torch.BoolTensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> M6RecModelOutput:
        """Read rows.

        Args:
            input_ids: B x Q new ids.
            attention_mask: B x (P + T), nonzero = not padding; None = padding is where the pad id stands.
            layout_ids: B x T, all ids so far; needed with `inputs_embeds` or a filled cache, else it is `input_ids`.
            item_ids: B x T rows of item memory, 0 = none (DESIGN: non-zero at the [SEG] of an [ITEM] segment only).
            hidden_events: B x T bool, tokens that no other token sees in the joint layers.
            past_key_values: The older name of `cache`.
            inputs_embeds: B x Q x embedding_size, in place of `input_ids`.
            use_cache: Return a cache.
            plan: How to run (see `plans_m6rec`); None = "compact", or "flat" where something asks
                for every state or a graph is exported.
            segment_cache: Segment states kept between calls, for plan "cached".
            user_states: Users kept between calls, for plan "cached"; tokens that need not be read again are left out of
                what is returned, as those that a summary drops.
            exits: Joint layers, from 1, after which states are wanted; None = the last.
            decide: Says after each exit which rows go no deeper (see `plans_m6rec.run`), for "reuse" and "cached".
            alone: Segments that stand in no row, (mode, ids) each, to be read as well.
            compact_output: Return states and layout of the kept tokens only (Q = the most of a row), where a plan
                leaves tokens out; `kept` says which.
            heads: What reads the last states: "score" does where targets are scored, "user" where users are read; of
                other tokens they then mean nothing, and the last joint layer leaves these out. None = they all count.
            asked: B x T bool, further tokens whose last states are read.
            cache: A cache to fill or to go on from.
            **kwargs: Handed to the attention function.

        Raises:
            ValueError: If the arguments contradict each other; the message says what to give.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, not both and not neither")
        cache = self._usable(one_cache(cache, past_key_values))
        past = 0 if cache is None else int(cache.get_seq_length())
        if layout_ids is None:
            if input_ids is None or past:
                raise ValueError("layout_ids (all ids so far) must come with inputs_embeds or a filled cache")
            layout_ids = input_ids
        total = layout_ids.shape[1]
        queries = input_ids.shape[1] if inputs_embeds is None else inputs_embeds.shape[1]
        if past + queries < total:
            raise ValueError(f"layout_ids holds {total} ids, but only {past + queries} are in the cache and the input")
        lay = layout(layout_ids, None if attention_mask is None else attention_mask[:, -total:], self.config)
        keys = summary_keys(lay, layout_ids == self.config.segment_token_id, self.config)
        hidden = torch.zeros_like(keys) if hidden_events is None else _widen(hidden_events.bool(), total)
        item_ids = None if item_ids is None else _widen(item_ids, total)
        exits = sorted(set(exits or [self.config.num_joint_layers]))
        asking = None if heads is None else head_places(layout_ids, lay, self.config, "user" in heads)
        if asking is not None and asked is not None:
            asking = asking | _widen(asked, total)
        rows = Rows(layout_ids, lay, item_ids, keys, hidden, exits, alone, asking)
        whole = not (use_cache or cache is not None or inputs_embeds is not None)
        plan = self._choose(plan, whole, kwargs)
        if plan != "cached" and user_states is not None or plan not in ("reuse", "cached") and decide is not None:
            raise ValueError(f"plan={plan!r} keeps no users and stops at no exit: use plan='cached'")
        if plan == "flat":
            embeds = self.embeddings.tokens(input_ids) if inputs_embeds is None else inputs_embeds
            if use_cache and cache is None:
                cache = self._usable(DynamicCache(config=self.config))
            return self._flat(embeds, rows, cache, past, **kwargs)
        read, segment_states, alone_states, kept, left = run(self, plan, rows, segment_cache, user_states, decide)
        if not compact_output:
            read, segment_states = [kept.back(state, total) for state in read], kept.back(segment_states, total)
        return M6RecModelOutput(
            last_hidden_state=read[-1],
            segment_states=segment_states,
            alone_states=alone_states,
            exit_states=tuple(read),
            layout=lay.take(*kept) if compact_output else lay,
            kept=kept if compact_output else None,
            exit_layers=left,
        )

    def _usable(self, cache: Cache | None) -> Cache | None:
        """Leave an empty cache out where layers are computed twice, which would fill it twice; refuse a filled one."""
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
        """Settle the plan: only the flat one can fill caches, take embeddings or record every layer."""
        recording = any(
            kwargs.get(name) or getattr(self.config, name, False)
            for name in ("output_hidden_states", "output_attentions")
        )
        if plan is None:
            exporting = torch.compiler.is_exporting()  # the other plans depend on the very segments of a batch
            return "compact" if whole and not recording and not exporting else "flat"
        if plan not in PLANS:
            raise ValueError(f"plan={plan!r} is unknown: choose one of {list(PLANS)}")
        if plan != "flat" and not (whole and not recording):
            raise ValueError(
                f"plan={plan!r} takes whole rows of input_ids and records no layer: use plan='flat' with a cache, with "
                "inputs_embeds, with prefix or prompt tuning, or to get hidden states or attentions"
            )
        return plan

    def _flat(
        self, embeds: torch.Tensor, rows: Rows, cache: Cache | None, past: int, **kwargs: Any
    ) -> M6RecModelOutput:
        """The plain plan: every token goes through every layer, masks say who sees whom."""
        lay, (queries, total) = rows.lay, (embeds.shape[1], rows.lay.valid.shape[1])
        virtual, new = past + queries - total, min(queries, total)
        self._refuse_bad_chunks(rows, total - new, virtual, cache)
        here, ahead = lay.last(new), queries - new
        width = queries if cache is None else cache.get_mask_sizes(queries, 0)[0]
        kwargs["key_cache"] = cache

        def front(field: torch.Tensor) -> torch.Tensor:
            return functional.pad(field, (ahead, 0))

        order = torch.arange(ahead, device=embeds.device).expand(embeds.shape[0], -1)
        positions = torch.cat((order, self.embedding_positions(here)), 1)
        # Virtual tokens are seen from the joint layers on: a segment state depends on its segment alone.
        bias = attention_bias(segment_mask(lay, new, self.config), queries, width, embeds.dtype, virtual, False)
        ids = rows.input_ids[:, total - new :]
        segment_states = self.segment_stage(embeds, positions, bias, ids, here, **kwargs)
        segment_states = self.add_words_in_rows(segment_states, ids, here)
        item_ids = None if rows.item_ids is None else front(rows.item_ids[:, total - new :])
        states = self.enter(segment_states, here._replace(kind=front(here.kind), event=front(here.event)), item_ids)
        mask = joint_mask(lay, new, self.config, rows.keys & ~rows.hidden)
        bias = attention_bias(mask, queries, width, states.dtype, virtual)
        positions = torch.cat((order, self.joint_positions(here)), 1)
        read = [self.norm(state) for state in self.joint_stage(states, positions, bias, rows.exits, **kwargs)]
        return M6RecModelOutput(
            last_hidden_state=read[-1],
            segment_states=segment_states,
            alone_states=last_states(self, rows.alone),
            exit_states=tuple(read),
            cache=cache,
            layout=here,
        )

    def _refuse_bad_chunks(self, rows: Rows, start: int, virtual: int, cache: Cache | None) -> None:
        """States of a given segment, or of text that sees forwards, are final only when all of it is there."""
        if virtual and cache is not None and cache.is_compileable:
            raise ValueError("a static cache has no room for prefix or prompt tuning: use the default cache")
        if not start:
            return
        lay, old, new = rows.lay, slice(start - 1, start), slice(start, start + 1)
        same_segment = lay.segment[:, old] == lay.segment[:, new]
        cut = same_segment & ~lay.written[:, new]
        same_source = lay.source[:, old] & lay.source[:, new] & (lay.request[:, old] == lay.request[:, new])
        cut = cut | same_source & (self.config.history_attention == "bidirectional")
        cut = cut | lay.plain[:, new] & lay.plain[:, old] & (self.config.document_attention == "bidirectional")
        if cut.any():
            raise ValueError(
                "the cache ends inside text that must be read at once (a given segment, a bidirectional source or "
                "document): begin a chunk where that text ends, or pass the whole row without a cache"
            )


def _widen(field: torch.Tensor, tokens: int) -> torch.Tensor:
    """Pad a B x T' field with zeros to B x tokens: what is written later has no item and is not hidden."""
    return functional.pad(field, (0, tokens - field.shape[1]))


__all__ = ["M6RecModel", "M6RecModelOutput", "M6RecPreTrainedModel"]
