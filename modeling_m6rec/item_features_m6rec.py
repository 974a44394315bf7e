"""Item features, which add information about an item to the states of its text, and the evidence of a catalogue.

| feature | where it acts | weights | settings |
|---|---|---|---|
| `ItemEmbeddings` | states of items, before the joint layers and before item vectors | `item_memory` | `num_item_embeddings`, `item_embedding_dropout` |
| `BagOfWords` | segment states, at the [SEG] of an item | `word_memory` | `bow_embeddings` |
| `Tfidf` | user and item vectors | `word_sketch` | `tfidf_weight`, `tfidf_dim` |
| `ColdItemBias` | user and item vectors | - | `cold_item_bias` |

A new feature is a subclass of `ItemFeature` in `ITEM_FEATURES`, and its settings are fields of `M6RecConfig` with their
roles. Weights, initial values, resizing, adapters, conversion, fingerprints and recipes are derived from this list.
Transitions and common words, which a catalogue counts outside the network, are its `Evidence` (below), not features.

Features, evidence and the static reader are sections of one file because a checkpoint carries few files and all in one
folder.

Shapes: B rows, T tokens of a row, E places of a row that give a user vector, M items (of a row, or standalone) of up to
L tokens, V = vocabulary, H = hidden_size, D = tfidf_dim.

Shapes of evidence: U users, M items of the events, N rows of words.
"""  # noqa: E501 - a row of a table is one line

import hashlib
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save_file
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional
from transformers import initialization as init

from .configuration_m6rec import ROLES, M6RecConfig
from .layout_m6rec import (
    KeptTokens,
    Layout,
    closes_item,
    gather_or_zero,
    item_words,
    largest,
    latest,
    row_starts,
    value_at,
)
from .values_m6rec import WORD, short

FACTOR, RANGE = 2654435761, 1 << 32
"""Multiplicative hashing (Knuth): consecutive ids get distant hashes."""

TFIDF_ITEMS = 5
"""Number of a user's last items that `tfidf_weight` compares with."""

PLACES = ("segments", "states", "vectors")
"""Places where a feature can act: segment states at the [SEG] of items; states of items, before the joint layers and
before item vectors; user and item vectors, as further dimensions."""


class Network(Protocol):
    """Interface of the network (`M6RecModel`) that holds the weights of features."""

    config: M6RecConfig
    embed_kind: nn.Embedding
    training: bool


class RowItems(NamedTuple):
    """Rows whose users and items get vectors."""

    ids: torch.Tensor
    """B x T, ids of all tokens of the rows."""
    lay: Layout
    """Layout of these tokens."""
    kept: KeptTokens
    """Selects the tokens that have states."""
    users: torch.Tensor
    """B x E places among the tokens that have states, -1 = none."""
    items: torch.Tensor
    """B x M places of the same kind."""
    hidden: torch.Tensor | None
    """B x T: tokens that no other token attends to."""
    embedding_ids: torch.Tensor | None
    """B x M rows of item embeddings."""


class LoneItems(NamedTuple):
    """Standalone items."""

    texts: torch.Tensor
    """M x H, states of their texts."""
    embedding_ids: torch.Tensor | None
    """M rows of item embeddings."""
    ids: torch.Tensor | None = None
    """M x L ids of [ITEM] ... [SEG], padded right; None = unknown."""
    lay: Layout | None = None
    """Layout of the ids, by `item_layout`."""


class ItemFeature:
    """Base class of item features; a subclass defines a feature's computation, weights and settings.

    Raises:
        TypeError: If the subclass does not declare its weights, settings and places.
    """

    weights: ClassVar[str | None]
    """Attribute of the network that holds the weights, and their name in checkpoints; None = no weights."""
    settings: ClassVar[tuple[str, ...]]
    """This feature's fields of the configuration; the first one switches it on."""
    places: ClassVar[tuple[str, ...]]
    """The members of PLACES where it acts."""
    is_trained: ClassVar[bool] = True
    """Whether gradients train the weights; otherwise `fit` sets them."""
    reads_rows: ClassVar[bool] = False
    """Whether it uses the items' rows of item embeddings."""
    needs: ClassVar[str | None] = None
    """A setting of another feature that must be on before this one is switched on."""

    def __init__(self) -> None:
        kind = type(self)
        lacking = [name for name in ("weights", "settings", "places") if not hasattr(kind, name)]
        if lacking:
            raise TypeError(f"{kind.__name__} does not declare {', '.join(lacking)}, which each item feature does")
        if not self.settings or not self.places or not set(self.places) <= set(PLACES):
            raise TypeError(
                f"{kind.__name__} declares settings={self.settings} and places={self.places}: name at least one field "
                f"of the configuration, and where it acts, of {PLACES}"
            )
        known = {name for names in ROLES.values() for name in names}
        without = [name for name in self.settings if name not in known]
        if without:
            raise TypeError(f"{kind.__name__} has settings without a role in ROLES of the configuration: {without}")
        if self.weights is not None and self.settings[0] not in ROLES["shapes"]:
            raise TypeError(f"{kind.__name__} has weights, so its setting {self.settings[0]!r} needs the role 'shapes'")

    # ------------------------------------------------------------------------------------------------------- weights

    def is_on(self, config: M6RecConfig) -> bool:
        """Whether a configuration enables it."""
        return bool(getattr(config, self.settings[0]))

    def module(self, network: Network) -> Any:
        """Return the module of a network that holds the weights, or None."""
        return None if self.weights is None else getattr(network, self.weights)

    def put(self, network: Network, module: nn.Module | None) -> None:
        """Set the module of a network that holds the weights, or None."""
        if self.weights is not None:
            setattr(network, self.weights, module)

    def make(self, config: M6RecConfig) -> nn.Module | None:
        """Make that module if the configuration enables the feature."""
        return None

    def reset(self, module: nn.Module) -> None:
        """Initialise a new model's module, if it is this feature's and the library's initial values do not fit."""

    def forget(self, network: Network) -> None:
        """Set the weights to values without effect."""
        module = self.module(network)
        for weight in (*module.parameters(), *module.buffers()):
            nn.init.zeros_(weight)

    def resize_items(self, network: Network, rows: int) -> None:
        """Change the number of rows of item embeddings."""

    def resize_words(self, network: Network, words: int) -> None:
        """Change the number of words in the vocabulary."""

    def fit(self, network: Network, texts: Sequence[Sequence[int]]) -> None:
        """Fit to the ids of a catalogue's items, without gradients, unless it is fitted already."""

    def refuse_unfitted(self, network: Network) -> None:
        """Raise an error if `fit` must be called first."""

    def is_tuned(self, config: M6RecConfig, before: M6RecConfig, item_rows: bool) -> bool:
        """Whether an adapter has its own weights of this feature.

        Args:
            config: Configuration of the tuned model.
            before: Configuration of the initial checkpoint.
            item_rows: Whether the recipe requests item embeddings.
        """
        if self.weights is None or not self.is_on(config):
            return False
        return self.is_trained or not self.is_on(before)

    # ------------------------------------------------------------------------------------------------------ "segments"

    def in_rows(self, network: Network, ids: torch.Tensor, lay: Layout) -> torch.Tensor:
        """Return its contribution to the segment states of rows: B x T x H, nonzero only at the [SEG] of items."""
        raise NotImplementedError

    def of_items(self, network: Network, ids: torch.Tensor, lay: Layout) -> torch.Tensor:
        """Return its contribution at the [SEG] of standalone items: M x L ids -> M x H."""
        last = (lay.valid.sum(1) - 1).clamp_min(0)
        return gather_or_zero(self.in_rows(network, ids, lay), last[:, None])[:, 0]

    # -------------------------------------------------------------------------------------------------------- "states"

    def add(self, network: Network, states: torch.Tensor, embedding_ids: torch.Tensor) -> torch.Tensor:
        """Add to ... x H states the contribution of ... rows of item embeddings; row 0 = no item."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------------- "vectors"

    def width(self, config: M6RecConfig) -> int:
        """Return the number of dimensions that it adds to vectors."""
        return 0

    def row_vectors(self, network: Network, rows: RowItems) -> tuple[torch.Tensor, torch.Tensor]:
        """Make its part of the vectors of rows: users, B x E x width, and items, B x M x width."""
        raise NotImplementedError

    def user_vectors(self, network: Network, items: Sequence[Sequence[tuple[int, ...]]]) -> torch.Tensor:
        """Make its part of the vectors of users, B x width, from the ids of each one's items, [ITEM] ... [SEG]."""
        raise NotImplementedError

    def item_vectors(self, network: Network, items: LoneItems) -> torch.Tensor:
        """Make its part of the vectors of standalone items: M x width."""
        raise NotImplementedError


class ItemEmbeddings(ItemFeature):
    """A vector of each known item, looked up by its id (our addition: the paper uses texts only)."""

    weights = "item_memory"
    settings = ("num_item_embeddings", "item_embedding_dropout")
    places = ("states",)
    reads_rows = True

    def make(self, config: M6RecConfig) -> nn.Embedding | None:
        """Make an embedding per row; row 0 belongs to no item and stays zero."""
        rows = config.num_item_embeddings
        return nn.Embedding(rows + 1, config.hidden_size, padding_idx=0) if rows else None

    @torch.no_grad()
    def resize_items(self, network: Network, rows: int) -> None:
        """Change the number of rows: existing rows stay, new rows start at zero (text only)."""
        if rows < 0:
            raise ValueError(f"item memory cannot have {rows} rows: give 0 (off) or more")
        old, network.config.num_item_embeddings = self.module(network), rows
        new = self.make(network.config)
        if new is not None:
            new = new.to(network.embed_kind.weight)
            init.zeros_(new.weight)
            if old is not None:
                kept = min(len(old.weight), rows + 1)
                new.weight[:kept] = old.weight[:kept]
        self.put(network, new)

    def is_tuned(self, config: M6RecConfig, before: M6RecConfig, item_rows: bool) -> bool:
        """Whether the recipe requests item embeddings, or the checkpoint has another number of rows."""
        changed = before.num_item_embeddings != config.num_item_embeddings
        return self.is_on(config) and (item_rows or changed)

    def add(self, network: Network, states: torch.Tensor, embedding_ids: torch.Tensor) -> torch.Tensor:
        """Add the embeddings of items; training leaves out some occurrences, so that the text works without them."""
        share = network.config.item_embedding_dropout
        if network.training and share:
            kept = torch.rand(embedding_ids.shape, device=embedding_ids.device) >= share
            embedding_ids = embedding_ids * kept
        return states + self.module(network)(embedding_ids)

    def is_new(self, network: Network, embedding_ids: torch.Tensor) -> torch.Tensor:
        """Return for each of ... rows whether it is untrained; row 0 belongs to no item."""
        module = self.module(network)
        if module is None:
            return torch.ones_like(embedding_ids, dtype=torch.bool)
        return (module(embedding_ids) == 0).all(-1)


class BagOfWords(ItemFeature):
    """A vector per word; an item's text adds their sum divided by the root of its length (our addition)."""

    weights = "word_memory"
    settings = ("bow_embeddings",)
    places = ("segments",)

    def make(self, config: M6RecConfig) -> nn.Module | None:
        """Make a vector for each word."""
        return nn.EmbeddingBag(config.vocab_size, config.hidden_size, mode="sum") if config.bow_embeddings else None

    def reset(self, module: nn.Module) -> None:
        """Initialise to zero."""
        if isinstance(module, nn.EmbeddingBag):
            init.zeros_(module.weight)

    @torch.no_grad()
    def resize_words(self, network: Network, words: int) -> None:
        """Change the number of words: existing vectors stay, new vectors start at zero."""
        old = self.module(network)
        if old is None or words == len(old.weight):
            return
        kept = min(len(old.weight), words)
        new = nn.EmbeddingBag(words, network.config.hidden_size, mode="sum").to(old.weight)
        init.zeros_(new.weight)
        new.weight[:kept] = old.weight[:kept]
        self.put(network, new)

    def in_rows(self, network: Network, ids: torch.Tensor, lay: Layout) -> torch.Tensor:
        """Return at each [SEG] of an item the sum of its word vectors divided by the root of their number."""
        words = item_words(ids, lay, network.config)
        slots = largest(lay.segment) + 1
        slot = (lay.segment + row_starts(ids, slots)).flatten()
        vectors = self._word_vectors(network, ids) * words[..., None]
        total = vectors.new_zeros(ids.shape[0] * slots, vectors.shape[-1]).index_add(0, slot, vectors.flatten(0, 1))
        count = slot.new_zeros(ids.shape[0] * slots).index_add(0, slot, words.flatten().long())
        read = (total / count.clamp_min(1).sqrt()[:, None]).index_select(0, slot).view_as(vectors)
        return torch.where(closes_item(ids, lay, network.config)[..., None], read, 0)

    def of_items(self, network: Network, ids: torch.Tensor, lay: Layout) -> torch.Tensor:
        """Return the same as `in_rows` for standalone items, loading only the vectors of their words."""
        words = item_words(ids, lay, network.config)
        counts = words.sum(1)
        return self.module(network)(ids[words], counts.cumsum(0) - counts) / counts.clamp_min(1).sqrt()[:, None]

    def _word_vectors(self, network: Network, ids: torch.Tensor) -> torch.Tensor:
        """Return the vectors of B x T words, B x T x H."""
        module = self.module(network)
        if torch.compiler.is_exporting():  # ONNX would hold a loop over bags
            return functional.embedding(ids, module.weight)
        return module(ids.flatten()[:, None]).view(*ids.shape, -1)


KEPT_SKETCHES = 4096
"""Number of texts whose TF-IDF vectors are kept."""


class HashedTfidf(nn.Module):
    """Hashed TF-IDF vectors of texts, with D dimensions.

    The hash of a word's id gives its dimension and its sign, so that collisions cancel in expectation, and the product
    of two vectors approximates the cosine of the texts' TF-IDF vectors. Source: feature hashing (Weinberger et al.,
    2009).

    Args:
        words: V, number of ids.
        width: D.
    """

    rarity: torch.Tensor
    """V, inverse document frequencies; zero until `fit`."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("rarity", torch.zeros(words))
        self._kept: tuple[torch.Tensor, int, dict[tuple[int, ...], torch.Tensor]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def forget(self) -> None:
        """Drop the vectors of texts that are kept."""
        self._kept = None

    @property
    def is_fitted(self) -> bool:
        """Whether document frequencies have been counted."""
        return bool(self.rarity.any())

    def fit(self, texts: Iterable[Sequence[int]]) -> None:
        """Compute each word's inverse document frequency from texts' ids: log((1 + texts) / (1 + texts with it))."""
        number, found = 0, torch.zeros_like(self.rarity)
        for text in texts:
            number += 1
            found[list(set(text))] += 1
        self.rarity = torch.log((1 + number) / (1 + found))

    def resize(self, words: int) -> None:
        """Change the number of ids; new ids are unused, and get the highest inverse document frequency."""
        more = max(words - len(self.rarity), 0)
        kept = self.rarity[:words]
        self.rarity = torch.cat((kept, kept.max().expand(more))) if len(kept) else kept

    def forward(self, ids: torch.Tensor, texts: torch.Tensor, number: int, where: torch.Tensor) -> torch.Tensor:
        """Make the TF-IDF vectors of texts.

        Args:
            ids: B x T ids, including the words of the texts.
            texts: B x T, number of each id's text, counted from 0.
            number: Number of texts.
            where: B x T bool, ids that are words of a text.

        Returns:
            number x D, l2-normalised; zero for a text without words.

        Raises:
            ValueError: If `fit` has not been called.
        """
        if not torch.compiler.is_exporting() and not self.is_fitted:  # `export_program` checks this before
            raise ValueError(
                "tfidf_weight does not know how rare words are: train with it or name it to `m6rec evaluate`, which "
                "count the catalogue's words, or call model.model.word_sketch.fit(processor.encode_items(items))"
            )
        key = ids * FACTOR % RANGE
        steps = self.rarity[ids] * (1 - 2 * (key >> 31))
        # One extra text collects ids that are not words: selecting words first would make a data-dependent size.
        place = texts.masked_fill(~where, number) * self.width + (key >> 4) % self.width
        sketch = self.rarity.new_zeros((number + 1) * self.width).index_add(0, place.flatten(), steps.flatten())
        return functional.normalize(sketch.view(number + 1, self.width)[:number], dim=-1)

    def of_texts(self, texts: Sequence[tuple[int, ...]]) -> torch.Tensor:
        """Return the vectors of texts that are given by the ids of their words, M x D; requests repeat texts."""
        if not texts or self.rarity.is_inference():
            return self._of_texts(texts)
        kept, version = self._kept, self.rarity._version
        if kept is None or kept[0] is not self.rarity or kept[1] != version or len(kept[2]) > KEPT_SKETCHES:
            kept = self._kept = self.rarity, version, {}
        new = [text for text in dict.fromkeys(texts) if text not in kept[2]]
        if new:
            kept[2].update(zip(new, self._of_texts(new)))
        return torch.stack([kept[2][text] for text in texts])

    def _of_texts(self, texts: Sequence[tuple[int, ...]]) -> torch.Tensor:
        words = [(word, number) for number, text in enumerate(texts) for word in text]
        ids, places = torch.tensor(words, dtype=torch.long, device=self.rarity.device).view(-1, 2).T
        return self(ids, places, len(texts), torch.ones_like(ids, dtype=torch.bool))


class Tfidf(ItemFeature):
    """Adds the TF-IDF similarity of an item to the user's last items to the product of vectors (our addition)."""

    weights = "word_sketch"
    settings = ("tfidf_weight", "tfidf_dim")
    places = ("vectors",)
    is_trained = False

    def make(self, config: M6RecConfig) -> nn.Module | None:
        """Make the table of inverse document frequencies."""
        return HashedTfidf(config.vocab_size, config.tfidf_dim) if config.tfidf_weight else None

    def reset(self, module: nn.Module) -> None:
        """Reset to the state before `fit`."""
        if isinstance(module, HashedTfidf):
            init.zeros_(module.rarity)

    def resize_words(self, network: Network, words: int) -> None:
        """Change the number of words."""
        if self.module(network) is not None:
            self.module(network).resize(words)

    def fit(self, network: Network, texts: Sequence[Sequence[int]]) -> None:
        """Count document frequencies in a catalogue, unless they have been counted."""
        sketch = self.module(network)
        if sketch is not None and not sketch.is_fitted:
            sketch.fit(texts)

    def refuse_unfitted(self, network: Network) -> None:
        """Raise an error if `fit` has not been called."""
        if self.is_on(network.config) and not self.module(network).is_fitted:
            raise ValueError("count the words of a catalogue before the export: model.model.word_sketch.fit(...)")

    def width(self, config: M6RecConfig) -> int:
        """Return `tfidf_dim`."""
        return config.tfidf_dim

    def row_vectors(self, network: Network, rows: RowItems) -> tuple[torch.Tensor, torch.Tensor]:
        """Make the TF-IDF vectors of the last items before each place, and of each item."""
        ids, lay, kept, config = rows.ids, rows.lay, rows.kept, network.config
        closing = closes_item(ids, lay, config)
        # An item's number is the number of items before it in the row, at its words and its [SEG].
        sketches = self.sketches(network, ids, lay, closing)
        number = kept.of(closing.cumsum(1) - closing.long(), 0)
        words = _pick(sketches, gather_or_zero(number, rows.items))
        if rows.hidden is not None:
            closing &= ~rows.hidden.bool()
            sketches = self.sketches(network, ids, lay, closing)
        met = closing.cumsum(1)  # candidates follow their user, before the next request's user
        opens = (ids == config.source_token_id) & lay.source
        earlier = value_at(met, latest(opens))  # of other requests in the row
        # The sum of all items so far, minus the sum of all but the last ones.
        total = functional.pad(sketches.cumsum(1), (0, 0, 1, 0))
        last, first = (
            gather_or_zero(kept.of(met, 0), rows.users),
            gather_or_zero(kept.of(torch.maximum(met - TFIDF_ITEMS, earlier), 0), rows.users),
        )
        own = (_pick(total, last) - _pick(total, first)) / (last - first).clamp_min(1)[..., None]
        return own, config.tfidf_weight * words

    def user_vectors(self, network: Network, items: Sequence[Sequence[tuple[int, ...]]]) -> torch.Tensor:
        """Make the mean TF-IDF vector of each user's last items."""
        last, sketch = [own[-TFIDF_ITEMS:] for own in items], self.module(network)
        end, device = network.config.segment_token_id, sketch.rarity.device
        texts = [ids[1:-1] if ids[-1] == end else ids[1:] for own in last for ids in own]
        owners = torch.tensor([user for user, own in enumerate(last) for _ in own], dtype=torch.long, device=device)
        total = sketch.rarity.new_zeros(len(items), sketch.width).index_add(0, owners, sketch.of_texts(texts))
        counts = torch.tensor([max(1, len(own)) for own in last], device=device)
        return total / counts[:, None]

    def item_vectors(self, network: Network, items: LoneItems) -> torch.Tensor:
        """Make the TF-IDF vectors of standalone items.

        Raises:
            ValueError: If their ids are unknown.
        """
        ids, lay = items.ids, items.lay
        if ids is None or lay is None:
            raise ValueError("items have no words to compare (config.tfidf_weight): give their ids beside the states")
        words = item_words(ids, lay, network.config)
        read = self.module(network)(ids, row_starts(ids, 1).expand_as(ids), ids.shape[0], words)
        return network.config.tfidf_weight * read

    def sketches(self, network: Network, ids: torch.Tensor, lay: Layout, closing: torch.Tensor) -> torch.Tensor:
        """Make the TF-IDF vectors of the items of B x T ids whose [SEG] are `closing`, in their order: B x M x D."""
        number, segments = closing.cumsum(1), ids.shape[1] + 1
        items = largest(number)
        item = torch.full((ids.shape[0], segments + 1), -1, device=ids.device)
        item = item.scatter(1, lay.segment.masked_fill(~closing, segments), number - 1).gather(1, lay.segment)
        words = (item >= 0) & item_words(ids, lay, network.config)
        text = item + row_starts(ids, items)
        sketches = self.module(network)(ids, text, ids.shape[0] * items, words)
        return sketches.view(ids.shape[0], items, sketches.shape[-1])


class ColdItemBias(ItemFeature):
    """Adds a bias to the product of vectors for items with untrained embeddings (our addition)."""

    weights = None
    settings = ("cold_item_bias",)
    places = ("vectors",)
    reads_rows = True
    needs = "num_item_embeddings"

    def width(self, config: M6RecConfig) -> int:
        """Return 1."""
        return 1

    def row_vectors(self, network: Network, rows: RowItems) -> tuple[torch.Tensor, torch.Tensor]:
        """Return 1 for users, and the bias or 0 for items."""
        users = torch.ones_like(rows.users, dtype=torch.float32)[..., None]
        return users, self._of(network, rows.items, rows.embedding_ids)

    def user_vectors(self, network: Network, items: Sequence[Sequence[tuple[int, ...]]]) -> torch.Tensor:
        """Return 1 for each user."""
        return torch.ones(len(items), 1, device=network.embed_kind.weight.device)

    def item_vectors(self, network: Network, items: LoneItems) -> torch.Tensor:
        """Return the bias for new items, 0 for all other items."""
        return self._of(network, items.texts[..., 0], items.embedding_ids)

    def _of(self, network: Network, items: torch.Tensor, embedding_ids: torch.Tensor | None) -> torch.Tensor:
        """Return ... x 1 biases of ... items, whose rows of item embeddings may be unknown."""
        if embedding_ids is None:
            new = torch.ones_like(items, dtype=torch.float32)
        else:
            new = EMBEDDINGS.is_new(network, embedding_ids)
        return network.config.cold_item_bias * new[..., None]


def _pick(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Gather B x M x W values by B x N indices: B x N x W."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


EMBEDDINGS = ItemEmbeddings()

ITEM_FEATURES: list[ItemFeature] = [EMBEDDINGS, BagOfWords(), Tfidf(), ColdItemBias()]
"""All features; this is the order of their weights, their contributions and their parts of vectors."""


def features_at(place: str, config: M6RecConfig) -> list[ItemFeature]:
    """Return the features that act at a place of PLACES and that a configuration enables."""
    return [feature for feature in ITEM_FEATURES if place in feature.places and feature.is_on(config)]


def forget_texts(model: nn.Module) -> None:
    """Drop what features of a model keep of texts."""
    for module in model.modules():
        if isinstance(module, HashedTfidf):
            module.forget()


def feature_weights() -> tuple[str, ...]:
    """Return the prefixes of all features' weight names in a whole model's state."""
    return tuple(f"model.{feature.weights}." for feature in ITEM_FEATURES if feature.weights is not None)


def feature_modules(network: Network) -> list[nn.Module]:
    """Return the modules of a network that hold weights of features."""
    modules = (feature.module(network) for feature in ITEM_FEATURES)
    return [module for module in modules if module is not None]


def reads_item_rows(config: M6RecConfig) -> bool:
    """Whether a model uses the rows of items in addition to their texts."""
    return any(feature.reads_rows and feature.is_on(config) for feature in ITEM_FEATURES)


def vector_width(config: M6RecConfig) -> int:
    """Return the width of user and item vectors: `embedding_dim` plus the widths of features."""
    return config.embedding_dim + sum(feature.width(config) for feature in features_at("vectors", config))


# ----------------------------------------------------------------------------------- evidence: transitions and words


SCALE = 1 << 30
"""Parts of one transition: totals are whole numbers of parts, so that they do not depend on the order of changes."""
WIDTH = 1 << 31
"""A pair of items (i, j) has the key i * WIDTH + j."""
HALF_LIVES = 16
"""Decaying counts are relative to the last moment that is a multiple of this number of half-lives."""
APART = 1e-3
"""Seconds between events without times."""
ENTRIES_AT_ONCE = 1 << 22
"""Most entries of sparse rows that are summed together, unless they belong to one user; this bounds memory."""
TABLE_SHARE = 8
"""Share of counted pairs in the number of items, from which their places are in a table: its inverse."""
TAIL_SHARE, TAIL_ROWS = 0.25, 1024
"""Later rows of words are sorted again with each change, until they exceed this share of all rows and this number."""


LONGEST = {"recency": 1000, "steps": 100}
"""Most numbers of a setting of evidence."""


@dataclass(frozen=True)
class Evidence:
    """Settings of a catalogue's ranking by counted events and words, in addition to the learnt score.

    The score of item j is `learnt` times the cosine of the user's and the item's vector, plus a sum over the user's
    last items i, where the k-th last has the weight `recency[k]`, of these terms: `words` times the cosine of the
    TF-IDF vectors of i and j, and 1 + `unseen` times that if j has no events; `texts` times the cosine of their vectors
    by a static reader; `transitions` times P(i, j) + `second` (P P)(i, j); `again` if j is i; and `linear` times the
    weight B(i, j) of a linear model of histories (`ItemWeights`); plus `popularity` times log(1 + events of j), scaled
    to 1 for the most frequent item. Texts of the user that name no item are compared
    with j by `words` and `texts` as well: what the user searched for or wrote, with the weight `queries` times
    `recency[k]` after k later items and texts, and what the user is, with the weight `profile`. Here

    P(i, j) = n(i, j) / (out(i) ** out_power * in(j) ** in_power).

    n(i, j) counts how often j follows i in a history within `len(steps)` steps, with the weight `steps` of each
    distance, and how often j precedes i, with the additional factor `backwards`. out and in are the sums of its rows
    and columns, at least 1. n(i, i) = 0. The TF-IDF weight of a word is log((1 + items) / (1 + items with it)) + 1.

    With `share_ties`, consecutive events of a user with equal times have no order: each has the mean of their weights
    by `recency`, and their pairs count the mean of both directions. Many logs hold days, or seconds in which a page of
    items is rated at once; the order of such events in a table is often that of their ids.

    The defaults were chosen once, on validation purchases of Amazon Beauty.
    Source: after "An Embarrassingly Simple Graph Heuristic Reveals Shortcut-Solvable Benchmarks" (arXiv 2605.07125).

    Attributes:
        learnt: Weight of the cosine; 0 = the model's vectors are neither made nor used.
        words: Weight of common words, by TF-IDF.
        unseen: Additional weight of words, relative to `words`, for items without events, which have no transitions.
        texts: Weight of similar texts, by a static reader (`Reader`); above 0, the catalogue has a copy of the reader.
        transitions: Weight of transitions.
        popularity: Weight of popularity, equal for all users.
        again: Weight of the user's own last items, if known items may be recommended again.
        linear: Weight of a linear model between items; above 0, the catalogue has its `ItemWeights`.
        queries: Weight of a text of the history, such as a search, relative to an item of the same age.
        profile: Weight of the description of the user, and of facts, relative to the last item.
        recency: Weights of a history's last items, the last one first; earlier items have no weight.
        second: Weight of transitions over two steps.
        steps: Weights of pairs at a distance of one, two, ... steps.
        backwards: Weight of a pair in reverse order.
        out_power: Exponent of the first item's frequency in the normalisation.
        in_power: Exponent of the second item's frequency in the normalisation.
        half_life: Seconds after which the weight of a transition halves; None = no decay.
        share_ties: Whether events of a user with equal times have no order.
    """

    learnt: float = 1.0
    words: float = 0.3
    unseen: float = 0.0
    texts: float = 0.0
    transitions: float = 1.0
    popularity: float = 0.0
    again: float = 0.0
    linear: float = 0.0
    queries: float = 1.0
    profile: float = 0.3
    recency: tuple[float, ...] = (1.0, 0.6, 0.4, 0.3, 0.2)
    second: float = 0.4
    steps: tuple[float, ...] = (1.0, 0.7)
    backwards: float = 0.5
    out_power: float = 0.5
    in_power: float = 0.3
    half_life: float | None = None
    share_ties: bool = False

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name == "share_ties":
                if not isinstance(value, bool):
                    raise ValueError(f"evidence: share_ties={short(value)}: give true or false")
            elif name in LONGEST:
                numbers = list(value) if isinstance(value, list | tuple) else []
                if not 1 <= len(numbers) <= LONGEST[name] or not all(map(_is_weight, numbers)):
                    most = LONGEST[name]
                    raise ValueError(f"evidence: {name}={short(value)}: give 1 to {most} numbers from 0 to 1000")
                object.__setattr__(self, name, tuple(map(float, numbers)))
            elif not (_is_weight(value) or name == "half_life" and value is None or _is_time(name, value)):
                raise ValueError(f"evidence: {name}={short(value)}: give a number from 0 to 1000")
            elif value is not None:
                object.__setattr__(self, name, float(value))
        if self.half_life is not None and self.half_life < 1:
            raise ValueError(f"evidence: half_life={self.half_life}: give 1 second or more, or None")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings in a form for JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, settings: Any) -> "Evidence":
        """Make evidence from the result of `to_dict`.

        Raises:
            ValueError: If a setting is unknown or its value is invalid.
        """
        names = [each.name for each in fields(cls)]
        if not isinstance(settings, dict) or not settings.keys() <= {*names}:
            raise ValueError(f"evidence: expected settings among {', '.join(names)}, got {short(settings)}")
        return cls(**settings)

    @property
    def counting(self) -> tuple[Any, ...]:
        """Settings that decide the counts; all other settings can change without counting again."""
        return self.steps, self.backwards, self.half_life, self.share_ties

    def origin(self, latest: float) -> float:
        """Return the moment to which decaying counts are relative, for a log that ends at `latest`."""
        if self.half_life is None:
            return 0.0
        return math.floor(latest / (HALF_LIVES * self.half_life)) * HALF_LIVES * self.half_life


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1000


def _is_time(name: str, value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return name == "half_life" and number and value > 0


class Counts(NamedTuple):
    """Totals by key, with ascending keys and without zero totals."""

    keys: np.ndarray
    totals: np.ndarray

    @classmethod
    def of(cls, keys: np.ndarray, totals: np.ndarray) -> "Counts":
        """Sum the whole numbers of each key."""
        order = np.argsort(keys, kind="stable")
        keys, totals = keys[order], totals[order]
        new = np.ones(len(keys), bool)
        new[1:] = keys[1:] != keys[:-1]
        starts = np.flatnonzero(new)
        summed = np.add.reduceat(totals, starts) if len(keys) else totals
        kept = summed != 0
        return cls(keys[starts[kept]], summed[kept])

    @classmethod
    def sum(cls, several: Sequence["Counts"]) -> "Counts":
        """Sum several counts."""
        return cls.of(*(np.concatenate(parts) for parts in zip(_NONE, *several)))


_NONE = Counts(np.empty(0, np.int64), np.empty(0, np.int64))


class Level(Counts):
    """Counts by pairs of items that searches read."""

    @cached_property
    def starts(self) -> np.ndarray:
        """Place of each first item's pairs, and the end of the last one's."""
        return np.concatenate(([0], np.cumsum(np.bincount(self.keys // WIDTH))))

    def spans(self, items: np.ndarray, num_items: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the places, from and to, of the pairs whose first item is each of `items`, among M."""
        if TABLE_SHARE * len(self.keys) < num_items:  # fewer steps than a table costs
            low, high = np.searchsorted(self.keys, (items * WIDTH, (items + 1) * WIDTH))
            return low, high
        low, high = (np.minimum(items + more, len(self.starts) - 1) for more in (0, 1))
        return self.starts[low], self.starts[high]


class Histories(NamedTuple):
    """Events of some users; events of one user are consecutive, in order."""

    users: np.ndarray
    items: np.ndarray
    times: np.ndarray
    """Seconds."""

    def pairs(self, rule: Evidence, origin: float, counted: np.ndarray | None = None) -> Counts:
        """Count transitions.

        Args:
            rule: Settings of counting.
            origin: Result of `Evidence.origin`.
            counted: Events that count as the later event of a pair; None = all.
        """
        keys, totals = [_NONE.keys], [_NONE.totals]
        for step, weight in enumerate(rule.steps, 1):
            first, second = self.items[:-step], self.items[step:]
            stays = (self.users[:-step] == self.users[step:]) & (first != second)
            stays &= True if counted is None else counted[step:]
            first, second = first[stays], second[stays]
            scale: Any = SCALE * weight
            if rule.half_life is not None:
                scale = scale * np.exp2((self.times[step:][stays] - origin) / rule.half_life)
            keys += [first * WIDTH + second, second * WIDTH + first]
            ways: list[Any] = [1, rule.backwards]
            if rule.share_ties:
                tied = (self.times[:-step] == self.times[step:])[stays]
                ways = [np.where(tied, (1 + rule.backwards) / 2, way) for way in ways]
            totals += [np.broadcast_to(np.rint(scale * way), first.shape).astype(np.int64) for way in ways]
        return Counts.of(np.concatenate(keys), np.concatenate(totals))


class Sparse(NamedTuple):
    """A sparse table of numbers by user and item, sorted by user, then by item."""

    users: np.ndarray
    items: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, users: np.ndarray, items: np.ndarray, values: np.ndarray, width: int) -> "Sparse":
        """Sum, in the order given, the numbers of each user and item; items are below `width`."""
        if not len(users):
            return cls(users, items, values)
        least, most = int(users.min()), int(users.max())
        keys = (users - least) * width + items
        if (most - least + 1) * width <= 4 * len(keys):
            totals = np.bincount(keys, values, minlength=1)
            found = np.flatnonzero(np.bincount(keys))
            totals = totals[found]
        else:
            order = np.argsort(keys, kind="stable")
            keys = keys[order]
            new = np.ones(len(keys), bool)
            new[1:] = keys[1:] != keys[:-1]
            found, totals = keys[new], np.bincount(np.cumsum(new) - 1, values[order])
        rows, columns = np.divmod(found, width)
        return cls(rows + least, columns, totals)

    def part(self, part: slice) -> "Sparse":
        """Return a part of the numbers."""
        return Sparse(self.users[part], self.items[part], self.values[part])

    def groups(self, entries: np.ndarray) -> Iterator[slice]:
        """Split the numbers into groups of users with at most `ENTRIES_AT_ONCE` entries in total, or of one user.

        A user's numbers stay together, so that other users of a call do not change the order of their summation.
        """
        if entries.sum() <= ENTRIES_AT_ONCE:
            yield slice(0, len(entries))
            return
        stops = np.flatnonzero(np.diff(self.users, append=-1)) + 1
        ends = np.concatenate(([0], np.cumsum(entries)[stops - 1]))
        user = start = 0
        while user < len(stops):
            user = max(int(np.searchsorted(ends, ends[user] + ENTRIES_AT_ONCE, side="right")) - 1, user + 1)
            part = slice(start, int(stops[user - 1]))
            yield part
            start = part.stop

    def of_user(self, user: int) -> tuple[np.ndarray, np.ndarray]:
        """Return one user's items and numbers."""
        part = slice(*np.searchsorted(self.users, (user, user + 1)))
        return self.items[part], self.values[part]

    @classmethod
    def sum(cls, several: Iterable["Sparse"], width: int) -> "Sparse":
        """Sum several tables with items below `width`."""
        users, items, values = (np.concatenate(parts) for parts in zip(*several))
        return cls.of(users, items, values, width)

    def known(self, width: int) -> "Sparse":
        """Return the numbers of items below `width`."""
        kept = self.items < width
        return Sparse(self.users[kept], self.items[kept], self.values[kept])

    def dense(self, num_users: int, width: int) -> np.ndarray:
        """Return the U x `width` table."""
        table = np.zeros((num_users, width))
        table[self.users, self.items] = self.values
        return table


NOTHING = Sparse(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))


def recent(
    histories: Iterable[Sequence[int] | np.ndarray],
    rule: Evidence,
    times: Iterable[Sequence[float] | np.ndarray] | None = None,
) -> Sparse:
    """Weight the last items of each history by their age.

    Args:
        histories: Items of each history, in order.
        rule: The weights by age.
        times: The time of each of these items, for `share_ties`; NaN and None = unknown, which equals no other time.

    >>> recent([[3, 0, 2, 0]], Evidence()).dense(1, 4).tolist()     # the last item is also the last but two
    [[1.4, 0.0, 0.6, 0.3]]
    >>> recent([[3, 0, 2]], Evidence(share_ties=True), [[1.0, 5.0, 5.0]]).dense(1, 4).tolist()
    [[0.8, 0.0, 0.8, 0.4]]
    """
    own_items = [np.asarray(history, dtype=np.int64) for history in histories]
    if times is None or not rule.share_ties:
        parts: list[Any] = [rule.recency[: len(own)] for own in own_items]
    else:
        parts = [ages(own, rule) for own in times]
    last = [own[::-1][: len(weights)] for own, weights in zip(own_items, parts)]
    users = np.repeat(np.arange(len(last)), [len(own) for own in last])
    items = np.concatenate([np.empty(0, np.int64), *last])
    weights = np.concatenate([np.empty(0), *parts])
    return Sparse.of(users, items, weights, int(items.max(initial=0)) + 1)


def ages(times: Sequence[float] | np.ndarray, rule: Evidence) -> np.ndarray:
    """Return the weights of a history's last events, the last one first; earlier events have no weight.

    Args:
        times: Time of each event of the history, in order; NaN = unknown.
        rule: The weights by age.

    >>> ages([2.0, 2.0, 5.0], Evidence(recency=(1.0, 0.5), share_ties=True)).tolist()
    [1.0, 0.25, 0.25]
    """
    latest = np.asarray(times, dtype=float)[::-1]
    length = num_recent(latest, rule)
    weights = np.zeros(length)
    weights[: len(rule.recency)] = rule.recency[:length]
    if not rule.share_ties or length < 2:
        return weights
    runs = np.concatenate(([0], np.cumsum(latest[1:length] != latest[: length - 1])))
    return (np.bincount(runs, weights) / np.bincount(runs))[runs]


def num_recent(latest: np.ndarray, rule: Evidence) -> int:
    """Return how many last events have a weight, from their times, the last one first; NaN = unknown.

    >>> num_recent(np.array([5.0, 2.0, 2.0, 1.0]), Evidence(recency=(1.0, 0.5), share_ties=True))
    3
    """
    length = min(len(rule.recency), len(latest))
    if not rule.share_ties or not 0 < length < len(latest):
        return length
    other = np.flatnonzero(latest[length:] != latest[length - 1])
    return length + int(other[0]) if len(other) else len(latest)


def stretches(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the concatenated indices of ranges.

    >>> stretches(np.array([7, 2]), np.array([2, 3])).tolist()
    [7, 8, 2, 3, 4]
    """
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + lengths, lengths)


@dataclass(frozen=True, eq=False)
class Transitions:
    """Counted transitions between M items; they are immutable, and `adding` returns new ones.

    Attributes:
        rule: Settings of counting and weighting.
        levels: Totals of pairs in parts of `SCALE`, the largest level first; a pair may be in several levels.
        out: Total of each item as the first of a pair.
        into: Total of each item as the second of a pair.
        met: Number of events of each item.
        unit: Current value of one part.
        origin: Result of `Evidence.origin`.

    >>> transitions = Transitions.fit([[0, 1, 2], [0, 1]], num_items=4)
    >>> transitions.matrix()[0].round(3).tolist()       # n(0, 1) = 2, out(0) = 2.7, in(1) = 2.5; n(0, 2) = .7
    [0.0, 0.925, 0.363, 0.0]
    """

    rule: Evidence
    levels: tuple[Level, ...]
    out: np.ndarray
    into: np.ndarray
    met: np.ndarray
    unit: float = 1 / SCALE
    origin: float = 0.0

    @classmethod
    def empty(cls, rule: Evidence) -> "Transitions":
        """Return empty transitions without items."""
        return cls(rule, (), out=_NONE.keys, into=_NONE.keys, met=_NONE.keys)

    @classmethod
    def fit(
        cls,
        sequences: Iterable[Sequence[int] | np.ndarray],
        num_items: int,
        rule: Evidence | None = None,
        times: Iterable[np.ndarray] | None = None,
    ) -> "Transitions":
        """Count the transitions in histories, without decay.

        Args:
            sequences: Items of each history, in order, as numbers.
            num_items: M.
            rule: Settings of counting; None = the defaults.
            times: The time of each of these items, for `share_ties`; NaN and None = unknown, equal to no other time.
        """
        rule = rule or Evidence()
        parts = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
        users = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        items = np.concatenate([np.empty(0, np.int64), *parts])
        moments = np.full(len(items), np.nan) if times is None else np.concatenate([np.empty(0), *times])
        counts = Histories(users, items, moments).pairs(replace(rule, half_life=None), 0.0)
        return cls.empty(rule).adding(counts, num_items).meeting(items)

    @property
    def num_items(self) -> int:
        """M."""
        return len(self.out)

    def adding(self, counts: Counts, num_items: int, latest: float = 0.0) -> "Transitions":
        """Return the sum of these transitions and `counts`, relative to the same origin.

        Args:
            counts: Counts to add; negative counts are subtracted.
            num_items: New M.
            latest: The last moment of all events, for decaying counts.
        """
        sized = self.sized(num_items)
        for own, side in zip((sized.out, sized.into), np.divmod(counts.keys, WIDTH)):
            np.add.at(own, side, counts.totals)
        levels = [*self.levels, Level(*counts)]
        while len(levels) > 1 and len(levels[-2].keys) < 2 * len(levels[-1].keys):
            levels[-2:] = [Level(*Counts.sum(levels[-2:]))]
        levels = [own for own in levels if len(own.keys)]
        decayed = 1.0
        if self.rule.half_life is not None:
            decayed = 2 ** ((self.origin - latest) / self.rule.half_life)
        return replace(sized, levels=tuple(levels), unit=decayed / SCALE)

    def sized(self, num_items: int) -> "Transitions":
        """Return the same transitions with M items."""
        more = np.zeros(num_items - self.num_items, np.int64)
        out, into, met = (np.concatenate((own, more)) for own in (self.out, self.into, self.met))
        return replace(self, out=out, into=into, met=met)

    def meeting(self, items: np.ndarray, count: int = 1) -> "Transitions":
        """Return the same transitions with `count` more events of each of `items`, for popularity."""
        return replace(self, met=self.met + count * np.bincount(items, minlength=self.num_items))

    @property
    def popularity(self) -> np.ndarray:
        """log(1 + events) of each item, scaled to 1 for the most frequent item: M."""
        counts = np.log1p(self.met)
        return counts / max(counts.max(initial=0), 1e-12)

    def holds(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Return for pairs of items whether they were counted.

        >>> Transitions.fit([[0, 1, 2]], num_items=4).holds(np.array([0, 2, 3]), np.array([2, 0, 1])).tolist()
        [True, True, False]
        """
        return np.isin(first * WIDTH + second, self.counts().keys)

    def counts(self) -> Counts:
        """Return all totals."""
        return Counts.sum(self.levels)

    def matrix(self) -> np.ndarray:
        """Return P as a dense matrix, for few items."""
        every = np.arange(self.num_items)
        return self.follow(Sparse(every, every, np.ones(len(every)))).dense(len(every), len(every))

    def scores(self, histories: Sequence[Sequence[int] | np.ndarray]) -> np.ndarray:
        """Score all items for users with these histories: U x M."""
        return self.after(recent(histories, self.rule)).dense(len(histories), self.num_items)

    def after(self, shares: Sparse) -> Sparse:
        """Multiply weights of users at items with P + second * P P."""
        first = self.follow(shares)
        if not self.rule.second:
            return first
        second = self.follow(first)
        return Sparse.sum([first, second._replace(values=self.rule.second * second.values)], self.num_items)

    def follow(self, shares: Sparse) -> Sparse:
        """Multiply weights of users at items with P."""
        weights = shares.values / np.maximum(self.out[shares.items] * self.unit, 1) ** self.rule.out_power
        spans = [level.spans(shares.items, self.num_items) for level in self.levels]
        entries = sum((high - low for low, high in spans), np.zeros(len(weights), np.int64))
        weighed = shares._replace(values=weights)
        parts = [self._multiplied(weighed.part(part), spans, part) for part in shares.groups(entries)]
        users, items, values = parts[0] if len(parts) == 1 else map(np.concatenate, zip(NOTHING, *parts))
        return Sparse(users, items, values / np.maximum(self.into[items] * self.unit, 1) ** self.rule.in_power)

    def _multiplied(self, shares: Sparse, spans: Sequence[tuple[np.ndarray, ...]], part: slice) -> Sparse:
        """Multiply weights of users at items with n, whose rows are in the given spans of each level."""
        users, items, weights = shares
        owners, columns, totals = [_NONE.keys], [_NONE.keys], [_NONE.totals]
        for (keys, own), span in zip(self.levels, spans):
            low, high = (side[part] for side in span)
            places = stretches(low, high - low)
            owners.append(np.repeat(np.arange(len(items)), high - low))
            columns.append(keys[places] & (WIDTH - 1))
            totals.append(own[places])
        owner, column, total = (np.concatenate(parts) for parts in (owners, columns, totals))
        if len(self.levels) > 1:  # whole numbers first, so that it does not matter in which levels a pair stands
            found = Counts.of(owner * self.num_items + column, total)
            owner, column = np.divmod(found.keys, self.num_items)
            total = found.totals
        return Sparse.of(users[owner], column, weights[owner] * (total * self.unit), self.num_items)


@dataclass(frozen=True, eq=False)
class ItemWeights:
    """Weights between items of a linear model of histories: a sparse M x M table by rows.

    An item's score is the sum of its weights in the rows of a history's items. They are learnt, as the network's are:
    counting further events does not change them.

    Source: EASE (Steck, "Embarrassingly Shallow Autoencoders for Sparse Data", 2019), with few weights of each row.

    Attributes:
        starts: M + 1, places of each row's entries.
        columns: Item of each entry; those of one row ascend.
        values: Weight of each entry, float32; weights may be negative.

    >>> ItemWeights.of_rows(np.array([[1], [0], [0]]), np.float32([[0.5], [0.25], [-0.5]])).follow(
    ...     Sparse(np.array([0, 0]), np.array([0, 2]), np.array([1.0, 0.5])), 3).dense(1, 3).tolist()
    [[-0.25, 0.5, 0.0]]
    """

    starts: np.ndarray
    columns: np.ndarray
    values: np.ndarray

    @classmethod
    def of_rows(cls, columns: np.ndarray, values: np.ndarray) -> "ItemWeights":
        """Make weights from the columns and values of M rows with equally many entries each: M x E; 0 = no entry."""
        order = np.argsort(columns, axis=1)
        columns, values = (np.take_along_axis(own, order, 1) for own in (columns, values))
        kept = values != 0
        starts = np.concatenate(([0], np.cumsum(kept.sum(1))))
        return cls(starts, columns[kept].astype(np.int64), values[kept].astype(np.float32))

    @property
    def num_items(self) -> int:
        """M."""
        return len(self.starts) - 1

    def follow(self, shares: Sparse, width: int) -> Sparse:
        """Multiply weights of users at items with the table; items are below `width`, those from M on have no row."""
        known = shares.known(self.num_items)
        low, high = self.starts[known.items], self.starts[known.items + 1]
        parts = [NOTHING]
        for part in known.groups(high - low):
            lengths = (high - low)[part]
            places = stretches(low[part], lengths)
            users, weights = (np.repeat(own[part], lengths) for own in (known.users, known.values))
            parts.append(Sparse.of(users, self.columns[places], weights * self.values[places], width))
        return Sparse(*(np.concatenate(own) for own in zip(*parts)))

    def numbered(self, numbers: np.ndarray) -> "ItemWeights":
        """Return the weights with other, distinct numbers of the M items."""
        size = int(numbers.max(initial=-1)) + 1
        lengths = np.zeros(size, np.int64)
        lengths[numbers] = np.diff(self.starts)
        rows = np.repeat(numbers, np.diff(self.starts))
        columns = numbers[self.columns]
        order = np.lexsort((columns, rows))
        return ItemWeights(np.concatenate(([0], np.cumsum(lengths))), columns[order], self.values[order])


class EventLog:
    """The events behind counted transitions, so that users can be forgotten and late events are counted in order.

    Counts depend on the events only, not on the order or the number of calls: events of one user count by time, events
    with equal times in the order of arrival. This class is not thread-safe.

    Args:
        rule: Settings of counting.
        latest: The last moment of counted events that are not stored and cannot be forgotten; None = all are stored.
    """

    def __init__(self, rule: Evidence, latest: float | None = None) -> None:
        self.rule = rule
        self.numbers: dict[str, int] = {}
        """Number of each user."""
        self._elsewhere = latest
        self._users = self._count = 0
        self._latest = -math.inf if latest is None else latest
        self._events = Histories(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))
        self._last_items = np.empty((0, len(rule.steps)), np.int64)  # the last one last, -1 = none
        self._last_times = np.empty((0, len(rule.steps)))  # -inf = none

    def __len__(self) -> int:
        return self._count

    @property
    def is_complete(self) -> bool:
        """Whether all counted events are stored."""
        return self._elsewhere is None

    @property
    def events(self) -> Histories:
        """All events, in the order of arrival."""
        return Histories(*(column[: self._count] for column in self._events))

    @property
    def latest(self) -> float:
        """The last moment of all events, 0 if there are none."""
        return self._latest if math.isfinite(self._latest) else 0.0

    def numbered(self, users: Iterable[str]) -> np.ndarray:
        """Return the number of each user; new users get a new number."""
        found = []
        for user in users:
            number = self.numbers.get(user)
            if number is None:
                number = self.numbers[user] = self._users
                self._users += 1
            found.append(number)
        return np.array(found, np.int64)

    def without_times(self, users: np.ndarray) -> np.ndarray:
        """Return times for events without times: each is later than all of its user's earlier events, by `APART`."""
        times = np.zeros(len(users))
        known = users < len(self._last_times)
        last = self._last_times[users[known], -1]
        times[known] = np.where(np.isfinite(last), last + APART, 0.0)
        order = np.argsort(users, kind="stable")
        starts = np.flatnonzero(np.diff(users[order], prepend=-1))
        lengths = np.diff(starts, append=len(users))
        times[order] += APART * (np.arange(len(users)) - np.repeat(starts, lengths))
        return times

    def observe(self, new: Histories, transitions: Transitions, num_items: int) -> tuple[Transitions, "Histories"]:
        """Count more events; `append` keeps them.

        Args:
            new: The events, in any order.
            transitions: Transitions of the earlier events.
            num_items: M, including new items.

        Returns:
            The transitions including the new events; and the last events of their users, for `append`.
        """
        order = np.lexsort((new.times, new.users))
        new = Histories(*(column[order] for column in new))
        known = new.users < len(self._last_times)
        last = np.full(len(new.users), -np.inf)
        last[known] = self._last_times[new.users[known], -1]
        late = np.unique(new.users[new.times < last])
        behind = np.isin(new.users, late)
        on_time = Histories(*(column[~behind] for column in new))
        before = self._tails(np.unique(on_time.users))
        whole, is_new = _joined(before, on_time)
        latest = float(new.times.max(initial=self._latest)) if len(new.times) else self.latest
        origin = self.rule.origin(latest)
        parts = [whole.pairs(self.rule, origin, is_new)]
        if len(late):
            earlier = self._of(late)
            merged, _ = _joined(earlier, Histories(*(column[behind] for column in new)))
            gone = earlier.pairs(self.rule, origin)
            parts += [Counts(gone.keys, -gone.totals), merged.pairs(self.rule, origin)]
            whole = Histories(*(np.concatenate(several) for several in zip(whole, merged)))
        rebased = self._rebased(transitions, latest, num_items)
        return rebased.adding(Counts.sum(parts), num_items, latest).meeting(new.items), whole

    def append(self, new: Histories, whole: Histories) -> None:
        """Store events that `observe` has counted."""
        count = self._count + len(new.users)
        if count > len(self._events.users):
            room = max(count, 2 * len(self._events.users), 1024) - self._count
            grown = [np.concatenate((own[: self._count], np.empty(room, own.dtype))) for own in self._events]
            self._events = Histories(*grown)
        for column, own in zip(self._events, new):
            column[self._count : count] = own
        self._count = count
        self._latest = float(new.times.max(initial=self._latest))
        self._remember(whole)

    def under(self, rule: Evidence) -> "EventLog":
        """Return a log of the same events with another rule."""
        new = EventLog(rule, self._elsewhere)
        new.numbers, new._users = dict(self.numbers), self._users
        new.fill(self.events)
        return new

    def fill(self, events: Histories) -> None:
        """Store events, in the order of arrival, in an empty log."""
        order = np.lexsort((events.times, events.users))
        self.append(events, Histories(*(column[order] for column in events)))

    def forget(self, users: Sequence[str], transitions: Transitions) -> tuple[Transitions, int]:
        """Remove users' counts, events and ids.

        Returns:
            The transitions without them, and the number of removed events.
        """
        numbers = np.array([self.numbers[user] for user in users if user in self.numbers], np.int64)
        gone = self._of(numbers)
        removed = gone.pairs(self.rule, transitions.origin)
        without = transitions.adding(Counts(removed.keys, -removed.totals), transitions.num_items, self.latest)
        stays = ~np.isin(self.events.users, numbers)
        self._events = Histories(*(column[stays] for column in self.events))
        self._count = len(self._events.users)
        if len(gone.users):
            elsewhere = -math.inf if self._elsewhere is None else self._elsewhere
            self._latest = float(self._events.times.max(initial=elsewhere))
        without = self._rebased(without, self.latest, transitions.num_items)
        for user in users:
            self.numbers.pop(user, None)
        self._last_items[numbers[numbers < len(self._last_items)]] = -1
        self._last_times[numbers[numbers < len(self._last_times)]] = -np.inf
        return without.adding(_NONE, transitions.num_items, self.latest).meeting(gone.items, -1), len(gone.users)

    def counted(self, num_items: int) -> Transitions:
        """Count all events again."""
        return self._rebased(Transitions.empty(self.rule), self.latest, num_items, anew=True).meeting(self.events.items)

    def _rebased(self, transitions: Transitions, latest: float, num_items: int, anew: bool = False) -> Transitions:
        """Return transitions relative to the origin of a log with another end."""
        origin = self.rule.origin(latest)
        if transitions.origin == origin and not anew:
            return transitions
        if self.is_complete or anew:
            counts = self._of(None).pairs(self.rule, origin)
        else:
            keys, totals = transitions.counts()
            totals = np.rint(totals * 2 ** ((transitions.origin - origin) / (self.rule.half_life or 1)))
            counts = Counts.of(keys, totals.astype(np.int64))
        nothing = np.zeros(transitions.num_items, np.int64)
        emptied = replace(transitions, levels=(), out=nothing, into=nothing, origin=origin)
        return emptied.adding(counts, num_items, latest)

    def _of(self, users: np.ndarray | None) -> Histories:
        """Return the histories of some users, None = of all."""
        events = self.events
        if users is not None:
            places = np.flatnonzero(np.isin(events.users, users))
            events = Histories(*(column[places] for column in events))
        order = np.lexsort((events.times, events.users))
        return Histories(*(column[order] for column in events))

    def _tails(self, users: np.ndarray) -> Histories:
        """Return the last events of users that can form pairs with a new event."""
        known = users[users < len(self._last_items)]
        width = self._last_items.shape[1]
        owners, items = np.repeat(known, width), self._last_items[known].ravel()
        found = items >= 0
        return Histories(owners[found], items[found], self._last_times[known].ravel()[found])

    def _remember(self, whole: Histories) -> None:
        """Store the last events of users."""
        count, width = self._users, self._last_items.shape[1]
        if count > len(self._last_items):
            room = max(count, 2 * len(self._last_items)) - len(self._last_items)
            self._last_items = np.concatenate((self._last_items, np.full((room, width), -1)))
            self._last_times = np.concatenate((self._last_times, np.full((room, width), -np.inf)))
        ends = np.flatnonzero(np.diff(whole.users, append=-1)) + 1
        starts = np.concatenate(([0], ends[:-1]))
        users = whole.users[ends - 1]
        for back in range(1, width + 1):
            there, places = ends - back >= starts, np.maximum(ends - back, 0)
            self._last_items[users, width - back] = np.where(there, whole.items[places], -1)
            self._last_times[users, width - back] = np.where(there, whole.times[places], -np.inf)


def _joined(before: Histories, after: Histories) -> tuple[Histories, np.ndarray]:
    """Merge two histories of each user by time, and return which events belong to the second."""
    users, items, times = (np.concatenate(parts) for parts in zip(before, after))
    order = np.lexsort((times, users))
    return Histories(users[order], items[order], times[order]), order >= len(before.users)


class Postings(NamedTuple):
    """The rows that contain each word."""

    starts: np.ndarray
    """Start of each word in `rows`, and the end of the last word."""
    rows: np.ndarray

    @classmethod
    def of(cls, columns: np.ndarray, lengths: np.ndarray, first: int) -> "Postings":
        """Sort the words of rows, whose numbers start at `first`."""
        order = np.argsort(columns, kind="stable")
        ends = np.cumsum(np.bincount(columns))
        return cls(np.concatenate(([0], ends)), np.repeat(np.arange(first, first + len(lengths)), lengths)[order])

    def lengths(self, words: np.ndarray) -> np.ndarray:
        """Return the number of rows with each of the words."""
        low, high = (np.minimum(words + more, len(self.starts) - 1) for more in (0, 1))
        return self.starts[high] - self.starts[low]

    def entries(self, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return indices into `words`, and for each index a row that contains the word."""
        known = np.flatnonzero(words < len(self.starts) - 1)
        low, high = self.starts[words[known]], self.starts[words[known] + 1]
        return np.repeat(known, high - low), self.rows[stretches(low, high - low)]


def _more_rows(
    starts: np.ndarray, live: np.ndarray, lengths: Sequence[int], gone: Sequence[int] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return `starts` and `live` of rows of words with more rows of some lengths, and without the rows `gone`."""
    live = np.concatenate((live, np.ones(len(lengths), bool)))
    live[list(gone)] = False
    return np.concatenate((starts, starts[-1] + np.cumsum(lengths, dtype=np.int64))), live


def _some_rows(
    starts: np.ndarray, columns: np.ndarray, rows: Sequence[int] | np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return `starts`, `columns` and `live` of some rows of words, which get new numbers."""
    index = np.asarray(rows, np.int64)
    lengths = starts[index + 1] - starts[index]
    return (
        np.concatenate(([0], np.cumsum(lengths))),
        columns[stretches(starts[index], lengths)],
        np.ones(len(index), bool),
    )


def _rarity(starts: np.ndarray, columns: np.ndarray, live: np.ndarray, width: int) -> np.ndarray:
    """Return the inverse document frequency, among live rows, of each of `width` words."""
    found = np.bincount(columns, np.repeat(live, np.diff(starts)), width)
    return np.log((1 + live.sum()) / (1 + found)) + 1


@dataclass(frozen=True, eq=False)
class Words:
    """The words of N rows of texts, and their document frequencies among live rows.

    Attributes:
        vocabulary: Number of each word; later states share it and append to it.
        starts: Start of each row in `columns`, and the end of the last row: N + 1.
        columns: Words of the rows, each once.
        live: N, False where a row no longer counts.

    >>> words = Words.of(["red shoes", "blue shoes", "green tea"])
    >>> words.likeness(words.vectors(recent([[0]], Evidence()))).dense(1, 3).round(2).tolist()
    [[1.0, 0.37, 0.0]]
    """

    vocabulary: dict[str, int]
    starts: np.ndarray
    columns: np.ndarray
    live: np.ndarray
    first: tuple[int, Postings | None] = (0, None)
    """Number of rows that are sorted by word, and their postings."""

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Words":
        """Make words from texts."""
        return cls({}, np.zeros(1, np.int64), np.empty(0, np.int64), np.empty(0, bool)).adding(texts)

    def adding(self, texts: Iterable[str], gone: Sequence[int] | np.ndarray = ()) -> "Words":
        """Return these words with those of more rows, and without the rows `gone`."""
        columns, lengths = [], []
        for text in texts:
            own = dict.fromkeys(WORD.findall(text.lower()))
            columns += [self.vocabulary.setdefault(word, len(self.vocabulary)) for word in own]
            lengths.append(len(own))
        starts, live = _more_rows(self.starts, self.live, lengths, gone)
        every = np.concatenate((self.columns, np.array(columns, np.int64)))
        first = self._sorted if "_sorted" in self.__dict__ else self.first
        if len(live) - first[0] > max(TAIL_ROWS, TAIL_SHARE * len(live)):
            first = (0, None)
        return Words(self.vocabulary, starts, every, live, first)

    def kept(self, rows: Sequence[int]) -> "Words":
        """Return the words of some rows, which get new numbers."""
        return Words(self.vocabulary, *_some_rows(self.starts, self.columns, rows))

    @cached_property
    def rarity(self) -> np.ndarray:
        """Inverse document frequency of each word; the last entry is for words that no row contains."""
        return _rarity(self.starts, self.columns, self.live, len(self.vocabulary) + 1)

    @cached_property
    def norms(self) -> np.ndarray:
        """Length of each row's vector, at least 1e-12: N."""
        rows = np.repeat(np.arange(len(self.live)), np.diff(self.starts))
        squares = np.bincount(rows, self.rarity[self.columns] ** 2, len(self.live))
        return np.maximum(np.sqrt(squares), 1e-12)

    @cached_property
    def impacts(self) -> np.ndarray:
        """Largest entry of each word in the vector of a row, 0 for words that no row contains."""
        rows = np.repeat(np.arange(len(self.live)), np.diff(self.starts))
        least = np.full(len(self.rarity), np.inf)
        np.minimum.at(least, self.columns, self.norms[rows])
        return self.rarity / least

    @cached_property
    def _sorted(self) -> tuple[int, Postings]:
        count, known = self.first
        if known is not None:
            return count, known
        return len(self.live), Postings.of(self.columns, np.diff(self.starts), 0)

    @cached_property
    def _tail(self) -> Postings:
        count = self._sorted[0]
        return Postings.of(self.columns[self.starts[count] :], np.diff(self.starts[count:]), count)

    def vectors(self, shares: Sparse) -> Sparse:
        """Return the users' vectors: sums of the vectors of weighted rows."""
        lengths = self.starts[shares.items + 1] - self.starts[shares.items]
        words = self.columns[stretches(self.starts[shares.items], lengths)]
        weights = np.repeat(shares.values / self.norms[shares.items], lengths) * self.rarity[words]
        return Sparse.of(np.repeat(shares.users, lengths), words, weights, len(self.rarity))

    def vector_of(self, text: str, weight: float = 1.0) -> Sparse:
        """Return the vector of a text, times a weight, as the vector of user 0.

        Words that no row contains only increase the norm of the text.
        """
        unknown = len(self.rarity) - 1
        words = [self.vocabulary.get(word, unknown) for word in dict.fromkeys(WORD.findall(text.lower()))]
        found = np.sort(np.minimum(np.array(words, np.int64), unknown))
        weights = self.rarity[found]
        weights = weight * weights / max(math.sqrt((weights**2).sum()), 1e-12)
        return Sparse(np.zeros(len(found), np.int64), found, weights).known(unknown)

    def lengths(self, words: np.ndarray) -> np.ndarray:
        """Return the number of rows with each of the words."""
        return self._sorted[1].lengths(words) + self._tail.lengths(words)

    def bound(self, words: np.ndarray, weights: np.ndarray) -> float:
        """Return an upper bound of the product of a vector, given by its words, with the vector of any row."""
        if not len(words):
            return 0.0
        return min(math.sqrt(float(weights @ weights)), float(weights @ self.impacts[words]))

    def products(self, words: np.ndarray, weights: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Multiply a vector with the vectors of some rows.

        Each product is the same whatever the other rows are.

        Args:
            words: Words of the vector, ascending.
            weights: Their weights.
            rows: The rows.
        """
        products = np.zeros(len(rows))
        if not len(words) or not len(rows):
            return products
        places = np.arange(len(rows))
        if self.lengths(words).sum() < len(rows):
            having = [own.entries(words)[1] for own in (self._sorted[1], self._tail)]
            places = np.flatnonzero(np.isin(rows, np.concatenate(having)))
        asked = rows[places]
        lengths = self.starts[asked + 1] - self.starts[asked]
        columns = self.columns[stretches(self.starts[asked], lengths)]
        found = np.minimum(np.searchsorted(words, columns), len(words) - 1)
        terms = np.where(words[found] == columns, weights[found] * self.rarity[columns], 0.0)
        owners = np.repeat(np.arange(len(asked)), lengths)
        products[places] = np.bincount(owners, terms, len(asked)) / self.norms[asked]
        return products

    def likeness(self, vectors: Sparse) -> Sparse:
        """Multiply vectors of users with the vectors of all rows, including rows that are not live."""
        postings = (self._sorted[1], self._tail)
        parts = []
        for piece in vectors.groups(self.lengths(vectors.items)):
            part = vectors.part(piece)
            weights = part.values * self.rarity[part.items]
            owners, rows = zip(*(own.entries(part.items) for own in postings))
            owner, row = np.concatenate(owners), np.concatenate(rows)
            parts.append(Sparse.of(part.users[owner], row, weights[owner], max(len(self.live), 1)))
        users, rows, values = (np.concatenate(several) for several in zip(NOTHING, *parts))
        return Sparse(users, rows, values / self.norms[rows])


# ------------------------------------------------------------------------------------------------------- static reader


READER = Path(__file__).parent / "reader" / "reader.safetensors"
"""The package's reader. A checkpoint's code comes without it: a catalogue that uses a reader has its own copy."""
LONGEST_TOKENIZER = 1 << 26
"""Most bytes of a reader's tokenizer as JSON, so that a damaged file cannot take any amount of memory."""


class Reader:
    """A static text reader: a vector for each token, independent of the other tokens of a text.

    `m6rec.conversion.distil` makes one of a sentence embedder. A catalogue weights tokens by their rarity in it
    (`ReadTexts`).

    Args:
        tokenizer: A tokenizer of the library `tokenizers`, as JSON.
        vectors: T x W int8.
        scales: T float32; the vector of a token is its row of `vectors` times its scale.
        first: Id of the first row's token. Tokens with smaller ids, such as [CLS], are not read.
        notice: Notice of origin and licence, which copies of the file keep.

    Raises:
        ValueError: If these do not fit together.
    """

    def __init__(self, tokenizer: str, vectors: np.ndarray, scales: np.ndarray, first: int, notice: str = "") -> None:
        try:
            self._tokenizer = Tokenizer.from_str(tokenizer)
        except Exception as error:  # the library raises no narrower class
            raise ValueError(f"the tokenizer cannot be read: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if vectors.dtype != np.int8 or vectors.ndim != 2 or not vectors.size:
            raise ValueError(f"vectors: expected T x W of int8, found {vectors.dtype} of shape {vectors.shape}")
        if scales.dtype != np.float32 or scales.shape != vectors.shape[:1] or not np.isfinite(scales).all():
            raise ValueError(f"scales: expected {len(vectors)} finite float32, found {scales.dtype} {scales.shape}")
        if first < 0 or first + len(vectors) != self._tokenizer.get_vocab_size():
            tokens = self._tokenizer.get_vocab_size()
            raise ValueError(f"first={first}: {len(vectors)} vectors after it are not those of {tokens} tokens")
        self.tokenizer, self.vectors, self.scales, self.first = tokenizer, vectors, scales, first
        self.notice = notice

    def __reduce__(self) -> tuple[type, tuple]:
        return type(self), (self.tokenizer, self.vectors, self.scales, self.first, self.notice)

    @classmethod
    def quantized(cls, tokenizer: str, vectors: np.ndarray, first: int, notice: str = "") -> "Reader":
        """Make a reader of T x W float vectors, at 8 bits with one scale per token."""
        scales = np.abs(vectors).max(1).astype(np.float32) / 127
        rounded = np.rint(vectors / np.maximum(scales, 1e-30)[:, None]).astype(np.int8)
        return cls(tokenizer, rounded, scales, first, notice)

    @classmethod
    def of(cls, source: "Reader | str | Path | None") -> "Reader":
        """Return a reader, given as such, as its file, or as None = the package's."""
        if isinstance(source, Reader):
            return source
        path = READER if source is None else Path(source)
        if source is None and not path.is_file():
            raise FileNotFoundError(
                f"the package's reader, {path}, is not there, as in code that came with a checkpoint: install m6rec, "
                "or give the file of a reader"
            )
        return cls.read(path.read_bytes(), path)

    @classmethod
    def read(cls, data: bytes, path: str | Path) -> "Reader":
        """Read the content of a reader's file.

        Raises:
            ValueError: If it is damaged, or not a reader.
        """
        try:
            found = load(data)
            unpacked = zlib.decompressobj()
            tokenizer = unpacked.decompress(found["tokenizer"].tobytes(), LONGEST_TOKENIZER)
            if not unpacked.eof:
                raise ValueError(f"its tokenizer is cut, or has more than {LONGEST_TOKENIZER} bytes")
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            notice = header.get("__metadata__", {}).get("notice", "")
            return cls(tokenizer.decode(), found["vectors"], found["scales"], int(found["first"].item()), notice)
        except (SafetensorError, zlib.error, KeyError, ValueError) as error:
            raise ValueError(f"{path} is damaged, or not a reader of m6rec: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the reader into a file."""
        packed = np.frombuffer(zlib.compress(self.tokenizer.encode(), 9), np.uint8)
        arrays = {"vectors": self.vectors, "scales": self.scales, "first": np.array([self.first]), "tokenizer": packed}
        save_file(arrays, path, {"notice": self.notice})
        Path(path).chmod(0o644)  # safetensors writes files that only their owner reads

    @property
    def width(self) -> int:
        """W."""
        return self.vectors.shape[1]

    @cached_property
    def digest(self) -> str:
        """Digest of vectors and tokenizer."""
        digest = hashlib.sha256(self.tokenizer.encode())
        for numbers in (self.vectors, self.scales, np.array([self.first])):
            digest.update(numbers.astype(numbers.dtype.newbyteorder("<")).tobytes())
        return digest.hexdigest()

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the rows of each text's tokens, each once; tokens without a vector are left out."""
        found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        first = self.first
        return [[token - first for token in dict.fromkeys(each.ids) if token >= first] for each in found]

    def table(self, tokens: np.ndarray) -> np.ndarray:
        """Return the vectors of rows: ... x W float32."""
        return self.vectors[tokens] * self.scales[tokens, None]


@dataclass(frozen=True, eq=False)
class ReadTexts:
    """N rows of texts as a reader encodes them.

    The vector of a text is the sum of its tokens' vectors, each once, weighted by their rarity among the live rows,
    log((1 + rows) / (1 + rows with it)) + 1, and l2-normalised; it is zero for a text without tokens.

    Attributes:
        reader: The reader.
        starts: Start of each row in `columns`, and the end of the last row: N + 1.
        columns: Rows of the reader for the tokens of the texts, each once per text.
        live: N, False where a row no longer counts.
    """

    reader: Reader
    starts: np.ndarray
    columns: np.ndarray
    live: np.ndarray

    @classmethod
    def of(cls, reader: Reader, texts: Iterable[str]) -> "ReadTexts":
        """Encode texts."""
        return cls(reader, np.zeros(1, np.int64), np.empty(0, np.int32), np.empty(0, bool)).adding(texts)

    def adding(self, texts: Iterable[str], gone: Sequence[int] | np.ndarray = ()) -> "ReadTexts":
        """Return these rows with more of them, and without the rows `gone`."""
        found = self.reader.tokens([*texts])
        starts, live = _more_rows(self.starts, self.live, [len(own) for own in found], gone)
        columns = np.concatenate((self.columns, *(np.array(own, np.int32) for own in found)))
        return ReadTexts(self.reader, starts, columns, live)

    def kept(self, rows: Sequence[int]) -> "ReadTexts":
        """Return some rows, which get new numbers."""
        return ReadTexts(self.reader, *_some_rows(self.starts, self.columns, rows))

    @cached_property
    def rarity(self) -> np.ndarray:
        """Inverse document frequency of each token: T."""
        return _rarity(self.starts, self.columns, self.live, len(self.reader.vectors))

    @cached_property
    def vectors(self) -> np.ndarray:
        """Vectors of all rows: N x W float32."""
        return self._read(self.columns, self.starts)

    def vector_of(self, text: str) -> np.ndarray:
        """Return the vector of a text: W float32."""
        tokens = np.array(self.reader.tokens([text])[0], np.int32)
        return self._read(tokens, np.array([0, len(tokens)]))[0]

    def _read(self, columns: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Return the vectors of the texts with these tokens."""
        if not len(columns):
            return np.zeros((len(starts) - 1, self.reader.width), np.float32)
        used, places = np.unique(columns, return_inverse=True)
        table = torch.from_numpy(self.reader.table(used) * self.rarity[used, None].astype(np.float32))
        bags = torch.from_numpy(places), table, torch.from_numpy(starts[:-1])
        return functional.normalize(functional.embedding_bag(*bags, mode="sum")).numpy()


__all__ = [
    "ITEM_FEATURES",
    "NOTHING",
    "TFIDF_ITEMS",
    "BagOfWords",
    "ColdItemBias",
    "Counts",
    "EventLog",
    "Evidence",
    "HashedTfidf",
    "Histories",
    "ItemEmbeddings",
    "ItemFeature",
    "Level",
    "LoneItems",
    "Postings",
    "ReadTexts",
    "Reader",
    "RowItems",
    "Sparse",
    "Tfidf",
    "Transitions",
    "Words",
    "feature_modules",
    "feature_weights",
    "features_at",
    "forget_texts",
    "reads_item_rows",
    "recent",
    "stretches",
    "vector_width",
]
