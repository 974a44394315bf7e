"""The vectors of users and items, whose product ranks a catalogue.

They are made of up to three parts: what was learnt, l2-normalised; with `word_similarity` which words an item holds,
and the mean of the user's last items; with `new_item_bonus` a place that says of an item whether it is new. Losses see
the first alone. Source: the paper's retrieval for the first part; the others are ours.

Shapes: B rows, T tokens, E places of a row where a user is read, M items of a row, H = hidden_size,
W = word_similarity_dim, D = vector_width.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn import functional

from .heads_m6rec import Beside, closes_item, item_places, user_places
from .layout_m6rec import Layout, blank, largest, latest, layout, read, row_starts, value_at

if TYPE_CHECKING:
    from .modeling_m6rec import M6RecForRecommendation
    from .network_m6rec import M6RecModelOutput

SIMILAR_ITEMS = 5
"""The last items of a user whose words `word_similarity` compares with."""


class Given(NamedTuple):
    """Rows as they were given, of T tokens."""

    input_ids: torch.Tensor
    """B x T."""
    attention_mask: torch.Tensor | None
    """B x (P + T)."""
    item_ids: torch.Tensor | None
    """B x T rows of item memory."""
    hidden: torch.Tensor | None
    """B x T: tokens that no other sees."""


def learnt_user_vectors(model: "M6RecForRecommendation", states: torch.Tensor) -> torch.Tensor:
    """Make vectors of ... x H joint states, as losses see them: ... x embedding_dim."""
    return functional.normalize(model.user_projection(states).float(), dim=-1)


def learnt_item_vectors(
    model: "M6RecForRecommendation", texts: torch.Tensor, memory_ids: torch.Tensor | None
) -> torch.Tensor:
    """Make vectors of ... x H texts and ... rows of item memory, as losses see them: ... x embedding_dim."""
    states = model.model.remember(texts, memory_ids)
    return functional.normalize(model.item_projection(model.item_norm(states)).float(), dim=-1)


def user_vectors(
    model: "M6RecForRecommendation", states: torch.Tensor, words: torch.Tensor | None = None
) -> torch.Tensor:
    """Make ... x D vectors of ... x H joint states, and ... x W of what words their last items hold."""
    parts = [learnt_user_vectors(model, states)]
    parts += [] if words is None else [words]
    parts += [torch.ones_like(parts[0][..., :1])] if model.config.new_item_bonus else []
    return torch.cat(parts, -1)


def item_vectors(
    model: "M6RecForRecommendation",
    texts: torch.Tensor,
    memory_ids: torch.Tensor | None,
    words: torch.Tensor | None = None,
) -> torch.Tensor:
    """Make ... x D vectors of ... x H texts, ... rows of item memory, and ... x W of what words the items hold."""
    parts, bonus = [learnt_item_vectors(model, texts, memory_ids)], model.config.new_item_bonus
    parts += [] if words is None else [model.config.word_similarity * words]
    if bonus:
        new = parts[0].new_ones(texts.shape[:-1]) if memory_ids is None else model.model.is_new(memory_ids)
        parts.append(bonus * new[..., None])
    return torch.cat(parts, -1)


def row_vectors(
    model: "M6RecForRecommendation", out: "M6RecModelOutput", given: Given, beside: Beside
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Make the vectors of rows, B x E x D and B x M x D; None without segment layers, or when going on from a cache.

    Args:
        model: The model.
        out: What its network returned.
        given: The rows.
        beside: Picks what stands beside the tokens that have states.
    """
    config, lay = model.config, out.layout
    if not config.num_segment_layers or beside.is_part:
        return None, None
    ids = beside(given.input_ids, config.pad_token_id)
    seen = None if given.hidden is None else ~beside(given.hidden.bool(), 0)
    users, items = user_places(ids, lay, config, seen), item_places(ids, lay, config)
    own = words = None
    if config.word_similarity:
        own, words = _row_sketches(model, given, beside, users, items)
    memory = None if given.item_ids is None else read(beside(given.item_ids, 0), items)
    texts, states = (field[:, -beside.tokens :] for field in (out.segment_states, out.last_hidden_state))
    return (
        blank(user_vectors(model, read(states, users), own), users),
        blank(item_vectors(model, read(texts, items), memory, words), items),
    )


def item_sketches(model: "M6RecForRecommendation", ids: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Say what words items hold that stand by themselves: M x L ids of [ITEM] ... [SEG] -> M x W."""
    words = valid & (ids != model.config.segment_token_id)
    words[:, 0] = False
    return model.model.word_sketch(ids, row_starts(ids, 1).expand_as(ids), ids.shape[0], words)


def _row_sketches(
    model: "M6RecForRecommendation", given: Given, beside: Beside, users: torch.Tensor, items: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Say what words the last items before B x E places hold, B x E x W, and each of B x M items, B x M x W."""
    ids, config = given.input_ids, model.config
    mask = None if given.attention_mask is None else given.attention_mask[:, -ids.shape[1] :]
    lay = layout(ids, mask, config)
    closing = closes_item(ids, lay, config)
    # An item's number in its row is that of those before it, which stands beside its words and its [SEG].
    sketches = _sketches(model, ids, lay, closing)
    number = beside(closing.cumsum(1) - closing.long(), 0)
    words = _pick(sketches, read(number, items))
    if given.hidden is not None:
        closing &= ~given.hidden.bool()
        sketches = _sketches(model, ids, lay, closing)
    met = closing.cumsum(1)  # candidates stand behind their user, and before that of the next request
    opens = (ids == config.source_token_id) & lay.source
    earlier = value_at(met, latest(opens))  # of other requests in the row
    # The sum of all items so far, less that of all but the last few.
    total = functional.pad(sketches.cumsum(1), (0, 0, 1, 0))
    last, first = read(beside(met, 0), users), read(beside(torch.maximum(met - SIMILAR_ITEMS, earlier), 0), users)
    return (_pick(total, last) - _pick(total, first)) / (last - first).clamp_min(1)[..., None], words


def _sketches(model: "M6RecForRecommendation", ids: torch.Tensor, lay: Layout, closing: torch.Tensor) -> torch.Tensor:
    """Sketch the items of B x T ids whose [SEG] are `closing`, in their order: B x M x W."""
    number, segments = closing.cumsum(1), ids.shape[1] + 1
    items = largest(number)
    item = torch.full((ids.shape[0], segments + 1), -1, device=ids.device)
    item = item.scatter(1, lay.segment.masked_fill(~closing, segments), number - 1).gather(1, lay.segment)
    words = (item >= 0) & (lay.segment_position > 0) & (ids != model.config.segment_token_id) & lay.valid
    text = item + row_starts(ids, items)
    sketches = model.model.word_sketch(ids, text, ids.shape[0] * items, words)
    return sketches.view(ids.shape[0], items, sketches.shape[-1])


def _pick(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """B x M x W values and B x N numbers of them -> B x N x W."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


__all__ = [
    "SIMILAR_ITEMS",
    "Given",
    "item_sketches",
    "item_vectors",
    "learnt_item_vectors",
    "learnt_user_vectors",
    "row_vectors",
]
