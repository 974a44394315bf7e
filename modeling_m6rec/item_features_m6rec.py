"""What an item adds to a model besides the states of its text: the list of item features.

| feature | where it acts | weights | settings |
|---|---|---|---|
| `ItemEmbeddings` | states of items, before the joint layers and before item vectors | `item_memory` | `num_item_embeddings`, `item_embedding_dropout` |
| `BagOfWords` | segment states, at the [SEG] of an item | `word_memory` | `bow_embeddings` |
| `Tfidf` | user and item vectors | `word_sketch` | `tfidf_weight`, `tfidf_dim` |
| `ColdItemBias` | user and item vectors | - | `cold_item_bias` |

A new feature is a subclass of `ItemFeature` in `ITEM_FEATURES`, and its settings are fields of `M6RecConfig` with their
roles. Weights, initial values, resizing, adapters, conversion, fingerprints and recipes follow from the list. What a
catalogue counts and no network holds, transitions and words in common, is its `Evidence` (below), not a row of this list.

Shapes: B rows, T tokens of a row, E places of a row where a user is read, M items (of a row, or that stand alone) of up
to L tokens, V = vocabulary, H = hidden_size, D = tfidf_dim.

Evidence: U users, M items that events name, N rows of words.
"""  # noqa: E501 - a row of a table is one line

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
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
from .values_m6rec import WORD

FACTOR, RANGE = 2654435761, 1 << 32
"""Multiplicative hashing (Knuth): ids that follow each other land far apart."""

TFIDF_ITEMS = 5
"""The last items of a user whose words `tfidf_weight` compares with."""

PLACES = ("segments", "states", "vectors")
"""Where a feature can act: on segment states at the [SEG] of items; on the states of items, before the joint layers and
before item vectors; on user and item vectors, as more dimensions of them."""


class Network(Protocol):
    """What features know of the network that holds their weights (`M6RecModel`)."""

    config: M6RecConfig
    embed_kind: nn.Embedding
    training: bool


class RowItems(NamedTuple):
    """Rows whose users and items get vectors."""

    ids: torch.Tensor
    """B x T, all tokens of the rows."""
    lay: Layout
    """Of these."""
    kept: KeptTokens
    """The tokens among them that have states."""
    users: torch.Tensor
    """B x E places among the tokens that have states, -1 = none."""
    items: torch.Tensor
    """B x M such places."""
    hidden: torch.Tensor | None
    """B x T: tokens that no other sees."""
    embedding_ids: torch.Tensor | None
    """B x M rows of item embeddings."""


class LoneItems(NamedTuple):
    """Items that stand alone."""

    texts: torch.Tensor
    """M x H, what was read of them."""
    embedding_ids: torch.Tensor | None
    """M rows of item embeddings."""
    ids: torch.Tensor | None = None
    """M x L ids of [ITEM] ... [SEG], padded right; None = not known."""
    lay: Layout | None = None
    """Of the ids, as of `item_layout`."""


class ItemFeature:
    """Something that an item adds to a model; subclasses say what, and own its weights and settings.

    Raises:
        TypeError: If the subclass does not declare its weights, settings and places.
    """

    weights: ClassVar[str | None]
    """Attribute of the network that holds the weights, and their name in checkpoints; None = there are none."""
    settings: ClassVar[tuple[str, ...]]
    """Fields of the configuration that are this feature's; the first says whether it is on."""
    places: ClassVar[tuple[str, ...]]
    """Where it acts, of PLACES."""
    is_trained: ClassVar[bool] = True
    """Whether the weights are learnt by gradients, so that an adapter may have its own."""
    reads_rows: ClassVar[bool] = False
    """Whether it reads the items' rows of item embeddings."""
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
        """Say whether a configuration asks for it."""
        return bool(getattr(config, self.settings[0]))

    def module(self, network: Network) -> Any:
        """Return the module of a network that holds the weights; None = there is none."""
        return None if self.weights is None else getattr(network, self.weights)

    def put(self, network: Network, module: nn.Module | None) -> None:
        """Give a network the module that holds the weights, or None."""
        if self.weights is not None:
            setattr(network, self.weights, module)

    def make(self, config: M6RecConfig) -> nn.Module | None:
        """Make that module, where the configuration asks for it."""
        return None

    def reset(self, module: nn.Module) -> None:
        """Give a module of a new model its first weights, if it is this feature's and the library's do not serve."""

    def forget(self, network: Network) -> None:
        """Set the weights to what says nothing of any item."""
        for weight in self.module(network).parameters():
            nn.init.zeros_(weight)

    def resize_items(self, network: Network, rows: int) -> None:
        """Change the number of rows of item embeddings."""

    def resize_words(self, network: Network, words: int) -> None:
        """Change the number of words in the vocabulary."""

    def fit(self, network: Network, texts: Sequence[Sequence[int]]) -> None:
        """Learn, without gradients and unless it was done before, from the ids of a catalogue's items."""

    def refuse_unfitted(self, network: Network) -> None:
        """Raise if `fit` has to be called first."""

    def is_tuned(self, config: M6RecConfig, before: M6RecConfig, item_rows: bool) -> bool:
        """Say whether an adapter has its own weights of it.

        Args:
            config: Of the model that is tuned.
            before: Of the checkpoint that it began as.
            item_rows: Whether the recipe asks for item embeddings.
        """
        return self.weights is not None and self.is_trained and self.is_on(config)

    # ------------------------------------------------------------------------------------------------------ "segments"

    def in_rows(self, network: Network, ids: torch.Tensor, lay: Layout) -> torch.Tensor:
        """Return what it adds to the segment states of rows: B x T x H, zero but at the [SEG] of items."""
        raise NotImplementedError

    def of_items(self, network: Network, ids: torch.Tensor, lay: Layout) -> torch.Tensor:
        """Return what it adds at the [SEG] of items that stand alone: M x L ids -> M x H."""
        last = (lay.valid.sum(1) - 1).clamp_min(0)
        return gather_or_zero(self.in_rows(network, ids, lay), last[:, None])[:, 0]

    # -------------------------------------------------------------------------------------------------------- "states"

    def add(self, network: Network, states: torch.Tensor, embedding_ids: torch.Tensor) -> torch.Tensor:
        """Add to ... x H states what is known of ... rows of item embeddings; row 0 is no item's."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------------- "vectors"

    def width(self, config: M6RecConfig) -> int:
        """Return how many dimensions vectors have of it."""
        return 0

    def row_vectors(self, network: Network, rows: RowItems) -> tuple[torch.Tensor, torch.Tensor]:
        """Make its part of the vectors of rows: of users, B x E x width, and of items, B x M x width."""
        raise NotImplementedError

    def item_vectors(self, network: Network, items: LoneItems) -> torch.Tensor:
        """Make its part of the vectors of items that stand alone: M x width."""
        raise NotImplementedError


class ItemEmbeddings(ItemFeature):
    """A vector of each known item, looked up by its id. Source: ours; the paper reads texts only."""

    weights = "item_memory"
    settings = ("num_item_embeddings", "item_embedding_dropout")
    places = ("states",)
    reads_rows = True

    def make(self, config: M6RecConfig) -> nn.Embedding | None:
        """Make an embedding of each row; row 0 is no item's and stays zero."""
        rows = config.num_item_embeddings
        return nn.Embedding(rows + 1, config.hidden_size, padding_idx=0) if rows else None

    @torch.no_grad()
    def resize_items(self, network: Network, rows: int) -> None:
        """Change the number of rows: kept ones stay, new ones begin at zero (their text speaks first)."""
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
        """Say so where the recipe asks for item embeddings, or the checkpoint has another number of them."""
        changed = before.num_item_embeddings != config.num_item_embeddings
        return self.is_on(config) and (item_rows or changed)

    def add(self, network: Network, states: torch.Tensor, embedding_ids: torch.Tensor) -> torch.Tensor:
        """Add the embeddings of items; in training some occurrences are left out, so that the text still works."""
        share = network.config.item_embedding_dropout
        if network.training and share:
            kept = torch.rand(embedding_ids.shape, device=embedding_ids.device) >= share
            embedding_ids = embedding_ids * kept
        return states + self.module(network)(embedding_ids)

    def is_new(self, network: Network, embedding_ids: torch.Tensor) -> torch.Tensor:
        """Say of ... rows whether nothing has been learnt there; row 0 is nobody's."""
        module = self.module(network)
        if module is None:
            return torch.ones_like(embedding_ids, dtype=torch.bool)
        return (module(embedding_ids) == 0).all(-1)


class BagOfWords(ItemFeature):
    """A vector of each word of an item's text; a text has their sum over the root of its length. Source: ours."""

    weights = "word_memory"
    settings = ("bow_embeddings",)
    places = ("segments",)

    def make(self, config: M6RecConfig) -> nn.Module | None:
        """Make a vector of each word."""
        return nn.EmbeddingBag(config.vocab_size, config.hidden_size, mode="sum") if config.bow_embeddings else None

    def reset(self, module: nn.Module) -> None:
        """Begin at zero: nothing has been learnt of any word."""
        if isinstance(module, nn.EmbeddingBag):
            init.zeros_(module.weight)

    @torch.no_grad()
    def resize_words(self, network: Network, words: int) -> None:
        """Change the number of words: kept ones stay, new ones begin at zero."""
        old = self.module(network)
        if old is None or words == len(old.weight):
            return
        kept = min(len(old.weight), words)
        new = nn.EmbeddingBag(words, network.config.hidden_size, mode="sum").to(old.weight)
        init.zeros_(new.weight)
        new.weight[:kept] = old.weight[:kept]
        self.put(network, new)

    def in_rows(self, network: Network, ids: torch.Tensor, lay: Layout) -> torch.Tensor:
        """Return at each [SEG] of an item the sum of its words over the root of their number."""
        words = item_words(ids, lay, network.config)
        slots = largest(lay.segment) + 1
        slot = (lay.segment + row_starts(ids, slots)).flatten()
        vectors = self._word_vectors(network, ids) * words[..., None]
        total = vectors.new_zeros(ids.shape[0] * slots, vectors.shape[-1]).index_add(0, slot, vectors.flatten(0, 1))
        count = slot.new_zeros(ids.shape[0] * slots).index_add(0, slot, words.flatten().long())
        read = (total / count.clamp_min(1).sqrt()[:, None]).index_select(0, slot).view_as(vectors)
        return torch.where(closes_item(ids, lay, network.config)[..., None], read, 0)

    def of_items(self, network: Network, ids: torch.Tensor, lay: Layout) -> torch.Tensor:
        """Return what `in_rows` does for items that stand alone, and read no vector but those of their words."""
        words = item_words(ids, lay, network.config)
        counts = words.sum(1)
        return self.module(network)(ids[words], counts.cumsum(0) - counts) / counts.clamp_min(1).sqrt()[:, None]

    def _word_vectors(self, network: Network, ids: torch.Tensor) -> torch.Tensor:
        """Return the vector of each of B x T words, B x T x H."""
        module = self.module(network)
        if torch.compiler.is_exporting():  # ONNX would hold a loop over bags
            return functional.embedding(ids, module.weight)
        return module(ids.flatten()[:, None]).view(*ids.shape, -1)


class HashedTfidf(nn.Module):
    """Writes the words of a text into D places, a rare word as a longer step than a common one.

    Each word has a place and a sign by the hash of its id, so that words that share a place cancel out in the mean, and
    the product of two sketches is close to the cosine of the texts' TF-IDF vectors. Source: feature hashing (Weinberger
    et al., 2009).

    Args:
        words: V, ids there are.
        width: D.
    """

    rarity: torch.Tensor
    """V; zero until words are counted."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("rarity", torch.zeros(words))

    @property
    def is_fitted(self) -> bool:
        """Whether it is known how rare words are."""
        return bool(self.rarity.any())

    def fit(self, texts: Iterable[Sequence[int]]) -> None:
        """Learn how rare each word is among the ids of some texts: log((1 + texts) / (1 + texts with the word))."""
        number, found = 0, torch.zeros_like(self.rarity)
        for text in texts:
            number += 1
            found[list(set(text))] += 1
        self.rarity = torch.log((1 + number) / (1 + found))

    def resize(self, words: int) -> None:
        """Change the number of ids; nobody has used the new ones, so that they are as rare as any."""
        more = max(words - len(self.rarity), 0)
        kept = self.rarity[:words]
        self.rarity = torch.cat((kept, kept.max().expand(more))) if len(kept) else kept

    def forward(self, ids: torch.Tensor, texts: torch.Tensor, number: int, where: torch.Tensor) -> torch.Tensor:
        """Sketch texts.

        Args:
            ids: B x T ids, words of the texts among them.
            texts: B x T, the text that each stands in, counted from 0.
            number: How many texts there are.
            where: B x T bool, the ids that are words of a text.

        Returns:
            number x D, l2-normalised; zero where a text has no word.

        Raises:
            ValueError: If no words have been counted.
        """
        if not torch.compiler.is_exporting() and not self.is_fitted:  # `export_program` asks before it exports
            raise ValueError(
                "tfidf_weight does not know how rare words are: train with it or name it to `m6rec evaluate`, which "
                "count the catalogue's words, or call model.model.word_sketch.fit(processor.encode_items(items))"
            )
        key = ids * FACTOR % RANGE
        steps = self.rarity[ids] * (1 - 2 * (key >> 31))
        # One text more takes what is no word: to choose the words first would make a size that depends on their number.
        place = texts.masked_fill(~where, number) * self.width + (key >> 4) % self.width
        sketch = self.rarity.new_zeros((number + 1) * self.width).index_add(0, place.flatten(), steps.flatten())
        return functional.normalize(sketch.view(number + 1, self.width)[:number], dim=-1)


class Tfidf(ItemFeature):
    """Adds to the product of vectors how alike an item's words are to those of the user's last items. Source: ours."""

    weights = "word_sketch"
    settings = ("tfidf_weight", "tfidf_dim")
    places = ("vectors",)
    is_trained = False

    def make(self, config: M6RecConfig) -> nn.Module | None:
        """Make the table of how rare words are."""
        return HashedTfidf(config.vocab_size, config.tfidf_dim) if config.tfidf_weight else None

    def reset(self, module: nn.Module) -> None:
        """Begin without any count."""
        if isinstance(module, HashedTfidf):
            init.zeros_(module.rarity)

    def resize_words(self, network: Network, words: int) -> None:
        """Change the number of words."""
        if self.module(network) is not None:
            self.module(network).resize(words)

    def fit(self, network: Network, texts: Sequence[Sequence[int]]) -> None:
        """Count the words of a catalogue, unless they have been counted."""
        sketch = self.module(network)
        if sketch is not None and not sketch.is_fitted:
            sketch.fit(texts)

    def refuse_unfitted(self, network: Network) -> None:
        """Raise if no words have been counted."""
        if self.is_on(network.config) and not self.module(network).is_fitted:
            raise ValueError("count the words of a catalogue before the export: model.model.word_sketch.fit(...)")

    def width(self, config: M6RecConfig) -> int:
        """Return `tfidf_dim`."""
        return config.tfidf_dim

    def row_vectors(self, network: Network, rows: RowItems) -> tuple[torch.Tensor, torch.Tensor]:
        """Say what words the last items before each place hold, and each item."""
        ids, lay, kept, config = rows.ids, rows.lay, rows.kept, network.config
        closing = closes_item(ids, lay, config)
        # An item's number in its row is that of those before it, which stands beside its words and its [SEG].
        sketches = self.sketches(network, ids, lay, closing)
        number = kept.of(closing.cumsum(1) - closing.long(), 0)
        words = _pick(sketches, gather_or_zero(number, rows.items))
        if rows.hidden is not None:
            closing &= ~rows.hidden.bool()
            sketches = self.sketches(network, ids, lay, closing)
        met = closing.cumsum(1)  # candidates stand behind their user, and before that of the next request
        opens = (ids == config.source_token_id) & lay.source
        earlier = value_at(met, latest(opens))  # of other requests in the row
        # The sum of all items so far, less that of all but the last few.
        total = functional.pad(sketches.cumsum(1), (0, 0, 1, 0))
        last, first = (
            gather_or_zero(kept.of(met, 0), rows.users),
            gather_or_zero(kept.of(torch.maximum(met - TFIDF_ITEMS, earlier), 0), rows.users),
        )
        own = (_pick(total, last) - _pick(total, first)) / (last - first).clamp_min(1)[..., None]
        return own, config.tfidf_weight * words

    def item_vectors(self, network: Network, items: LoneItems) -> torch.Tensor:
        """Say what words items hold.

        Raises:
            ValueError: If their ids are not known.
        """
        ids, lay = items.ids, items.lay
        if ids is None or lay is None:
            raise ValueError("items have no words to compare (config.tfidf_weight): give their ids beside the states")
        words = item_words(ids, lay, network.config)
        read = self.module(network)(ids, row_starts(ids, 1).expand_as(ids), ids.shape[0], words)
        return network.config.tfidf_weight * read

    def sketches(self, network: Network, ids: torch.Tensor, lay: Layout, closing: torch.Tensor) -> torch.Tensor:
        """Sketch the items of B x T ids whose [SEG] are `closing`, in their order: B x M x D."""
        number, segments = closing.cumsum(1), ids.shape[1] + 1
        items = largest(number)
        item = torch.full((ids.shape[0], segments + 1), -1, device=ids.device)
        item = item.scatter(1, lay.segment.masked_fill(~closing, segments), number - 1).gather(1, lay.segment)
        words = (item >= 0) & item_words(ids, lay, network.config)
        text = item + row_starts(ids, items)
        sketches = self.module(network)(ids, text, ids.shape[0] * items, words)
        return sketches.view(ids.shape[0], items, sketches.shape[-1])


class ColdItemBias(ItemFeature):
    """Adds to the product of vectors a number for items whose embedding has learnt nothing. Source: ours."""

    weights = None
    settings = ("cold_item_bias",)
    places = ("vectors",)
    reads_rows = True
    needs = "num_item_embeddings"

    def width(self, config: M6RecConfig) -> int:
        """Return 1."""
        return 1

    def row_vectors(self, network: Network, rows: RowItems) -> tuple[torch.Tensor, torch.Tensor]:
        """Make 1 for users, and the bias or 0 for items."""
        users = torch.ones_like(rows.users, dtype=torch.float32)[..., None]
        return users, self._of(network, rows.items, rows.embedding_ids)

    def item_vectors(self, network: Network, items: LoneItems) -> torch.Tensor:
        """Make the bias for new items, 0 for others."""
        return self._of(network, items.texts[..., 0], items.embedding_ids)

    def _of(self, network: Network, items: torch.Tensor, embedding_ids: torch.Tensor | None) -> torch.Tensor:
        """Return ... x 1 of ... items, of which the rows of item embeddings may be known."""
        if embedding_ids is None:
            new = torch.ones_like(items, dtype=torch.float32)
        else:
            new = EMBEDDINGS.is_new(network, embedding_ids)
        return network.config.cold_item_bias * new[..., None]


def _pick(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """B x M x W values and B x N numbers of them -> B x N x W."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


EMBEDDINGS = ItemEmbeddings()

ITEM_FEATURES: list[ItemFeature] = [EMBEDDINGS, BagOfWords(), Tfidf(), ColdItemBias()]
"""All features: the order of their weights in a network, of what they add, and of their parts in vectors."""


def features_at(place: str, config: M6RecConfig) -> list[ItemFeature]:
    """Return the features that act at a place of PLACES and that a configuration asks for."""
    return [feature for feature in ITEM_FEATURES if place in feature.places and feature.is_on(config)]


def feature_weights(trained: bool = False) -> tuple[str, ...]:
    """Return how the names of all features' weights begin, in the state of a whole model.

    Args:
        trained: Only those that are learnt by gradients.
    """
    found = [feature for feature in ITEM_FEATURES if feature.weights is not None]
    return tuple(f"model.{feature.weights}." for feature in found if feature.is_trained or not trained)


def feature_modules(network: Network) -> list[nn.Module]:
    """Return the modules of a network that hold weights of features."""
    modules = (feature.module(network) for feature in ITEM_FEATURES)
    return [module for module in modules if module is not None]


def reads_item_rows(config: M6RecConfig) -> bool:
    """Say whether a model reads the rows of items beside their texts."""
    return any(feature.reads_rows and feature.is_on(config) for feature in ITEM_FEATURES)


def vector_width(config: M6RecConfig) -> int:
    """Return the width of user and item vectors: `embedding_dim`, and what features need."""
    return config.embedding_dim + sum(feature.width(config) for feature in features_at("vectors", config))


# ----------------------------------------------------------------------------------- evidence: transitions and words


SCALE = 1 << 30
"""Parts of one transition: totals are whole numbers of them, so that no order of adding and removing changes one."""
WIDTH = 1 << 31
"""A pair of items (i, j) has the key i * WIDTH + j."""
HALF_LIVES = 16
"""Decaying counts are in units of the last moment that is a multiple of so many half-lives."""
ENTRIES_AT_ONCE = 1 << 22
"""Entries of sparse rows that are added up together, where they are not of one user; bounds memory."""
TAIL_SHARE, TAIL_ROWS = 0.25, 1024
"""Rows of words that came later are sorted anew, until they are more than this share of all, and than this number."""


@dataclass(frozen=True)
class Evidence:
    """How a catalogue ranks by what is counted, beside what is learnt.

    The score of item j is `learnt` times the cosine of the user's and the item's vector, plus the sum over the user's
    last items i, the k-th last weighed by `recency[k]`, of `words` times the cosine of the TF-IDF vectors of i and j,
    and `transitions` times P(i, j) + `second` (P P)(i, j), and of `again` where j is i; plus `popularity` times
    log(1 + events of j), of the most frequent item 1. Here

    P(i, j) = n(i, j) / (out(i) ** out_power * in(j) ** in_power).

    n(i, j) is how often j stands `len(steps)` steps or fewer behind i in a history, each step weighed by `steps`, and
    as far before it, weighed by `backwards` too. out and in are the sums of its rows and columns, at least 1. No item
    follows itself. A term of TF-IDF weighs log((1 + items) / (1 + items with the word)) + 1.

    The defaults were chosen once, on validation purchases of Amazon Beauty.
    Source: after "An Embarrassingly Simple Graph Heuristic Reveals Shortcut-Solvable Benchmarks" (arXiv 2605.07125).

    Attributes:
        learnt: Weight of the cosine; 0 = the model's vectors are neither made nor read.
        words: Weight of rare words in common.
        transitions: Weight of transitions.
        popularity: Weight of popularity, the same for every user.
        again: Weight of the user's own last items, where what was met before may be recommended.
        recency: Weights of a history's last items, the last one first; earlier ones count nothing.
        second: Weight of what follows an item that follows.
        steps: Weights of pairs that stand one, two, ... steps apart.
        backwards: Weight of a pair against the order of time.
        out_power: How much of the first item's frequency is divided out.
        in_power: How much of the second item's frequency is divided out.
        half_life: Seconds after which a transition counts half; None = it counts for ever.
    """

    learnt: float = 1.0
    words: float = 0.3
    transitions: float = 1.0
    popularity: float = 0.0
    again: float = 0.0
    recency: tuple[float, ...] = (1.0, 0.6, 0.4, 0.3, 0.2)
    second: float = 0.4
    steps: tuple[float, ...] = (1.0, 0.7)
    backwards: float = 0.5
    out_power: float = 0.5
    in_power: float = 0.3
    half_life: float | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name in ("recency", "steps"):
                numbers = list(value) if isinstance(value, list | tuple) else []
                if not 1 <= len(numbers) <= 100 or not all(map(_is_weight, numbers)):
                    raise ValueError(f"evidence: {name}={value!r}: give 1 to 100 numbers from 0 to 1000")
                object.__setattr__(self, name, tuple(map(float, numbers)))
            elif not (_is_weight(value) or name == "half_life" and value is None or _is_time(name, value)):
                raise ValueError(f"evidence: {name}={value!r}: give a number from 0 to 1000")
            elif value is not None:
                object.__setattr__(self, name, float(value))
        if self.half_life is not None and self.half_life < 1:
            raise ValueError(f"evidence: half_life={self.half_life}: give 1 second or more, or None")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON holds them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, settings: Any) -> "Evidence":
        """Read what `to_dict` wrote.

        Raises:
            ValueError: A setting is unknown or none of its values.
        """
        names = [each.name for each in fields(cls)]
        if not isinstance(settings, dict) or not settings.keys() <= {*names}:
            raise ValueError(f"evidence: expected settings among {', '.join(names)}, got {settings!r}")
        return cls(**settings)

    @property
    def counting(self) -> tuple[Any, ...]:
        """What decides the counts; the other settings can change without counting again."""
        return self.steps, self.backwards, self.half_life

    def origin(self, latest: float) -> float:
        """Return the moment in whose units decaying transitions are counted, for a log that ends at a moment."""
        if self.half_life is None:
            return 0.0
        return math.floor(latest / (HALF_LIVES * self.half_life)) * HALF_LIVES * self.half_life


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1000


def _is_time(name: str, value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return name == "half_life" and number and value > 0


class Counts(NamedTuple):
    """Totals by key; keys ascend, no total is 0."""

    keys: np.ndarray
    totals: np.ndarray

    @classmethod
    def of(cls, keys: np.ndarray, totals: np.ndarray) -> "Counts":
        """Add up whole numbers that have the same key."""
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
        """Add up counts."""
        return cls.of(*(np.concatenate(parts) for parts in zip(_NONE, *several)))


_NONE = Counts(np.empty(0, np.int64), np.empty(0, np.int64))


class Histories(NamedTuple):
    """Events of some users: those of one user stand together, in order."""

    users: np.ndarray
    items: np.ndarray
    times: np.ndarray
    """Seconds."""

    def pairs(self, rule: Evidence, origin: float, counted: np.ndarray | None = None) -> Counts:
        """Count transitions.

        Args:
            rule: Says how.
            origin: As of `Evidence.origin`.
            counted: Events that count as the later one of a pair; None = all.
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
            for way in (1, rule.backwards):
                totals.append(np.broadcast_to(np.rint(scale * way), first.shape).astype(np.int64))
        return Counts.of(np.concatenate(keys), np.concatenate(totals))


class Sparse(NamedTuple):
    """Numbers of users at items: sorted by user, then by item."""

    users: np.ndarray
    items: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, users: np.ndarray, items: np.ndarray, values: np.ndarray, width: int) -> "Sparse":
        """Add up, in the order given, the numbers of each user at each item; items are below `width`."""
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
        """Cut the numbers into groups of users, given what is made of each number: `ENTRIES_AT_ONCE`, or of one user.

        Users stay whole, so that no other user of a call changes in which order their numbers are added.
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
        """Add up numbers at items below `width`."""
        users, items, values = (np.concatenate(parts) for parts in zip(*several))
        return cls.of(users, items, values, width)

    def known(self, width: int) -> "Sparse":
        """Return the numbers at items below `width`."""
        kept = self.items < width
        return Sparse(self.users[kept], self.items[kept], self.values[kept])

    def dense(self, num_users: int, width: int) -> np.ndarray:
        """Return the U x `width` table."""
        table = np.zeros((num_users, width))
        table[self.users, self.items] = self.values
        return table


_NOTHING = Sparse(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))


def recent(histories: Iterable[Sequence[int] | np.ndarray], rule: Evidence) -> Sparse:
    """Weigh the last items of each history by their age.

    >>> recent([[3, 0, 2, 0]], Evidence()).dense(1, 4).tolist()     # the last item is also the last but two
    [[1.4, 0.0, 0.6, 0.3]]
    """
    length = len(rule.recency)
    last = [np.asarray(history, dtype=np.int64)[: -length - 1 : -1] for history in histories]
    users = np.repeat(np.arange(len(last)), [len(own) for own in last])
    items = np.concatenate([np.empty(0, np.int64), *last])
    weights = np.concatenate([np.empty(0), *(rule.recency[: len(own)] for own in last)])
    return Sparse.of(users, items, weights, int(items.max(initial=0)) + 1)


def _stretches(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the places of stretches one after the other.

    >>> _stretches(np.array([7, 2]), np.array([2, 3])).tolist()
    [7, 8, 2, 3, 4]
    """
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + lengths, lengths)


@dataclass(frozen=True, eq=False)
class Transitions:
    """Counted transitions between M items, which never change: `adding` gives others.

    Attributes:
        rule: Says how they are counted and weighed.
        levels: Totals of pairs in parts of `SCALE`, the largest first; a pair may be in several.
        out: Total of each item as the first of a pair.
        into: Total of each item as the second of a pair.
        met: Events of each item.
        unit: What one part counts now.
        origin: As of `Evidence.origin`.

    >>> transitions = Transitions.fit([[0, 1, 2], [0, 1]], num_items=4)
    >>> transitions.matrix()[0].round(3).tolist()       # n(0, 1) = 2, out(0) = 2.7, in(1) = 2.5; n(0, 2) = .7
    [0.0, 0.925, 0.363, 0.0]
    """

    rule: Evidence
    levels: tuple[Counts, ...]
    out: np.ndarray
    into: np.ndarray
    met: np.ndarray
    unit: float = 1 / SCALE
    origin: float = 0.0

    @classmethod
    def empty(cls, rule: Evidence) -> "Transitions":
        """Return none between no items."""
        return cls(rule, (), out=_NONE.keys, into=_NONE.keys, met=_NONE.keys)

    @classmethod
    def fit(
        cls, sequences: Iterable[Sequence[int] | np.ndarray], num_items: int, rule: Evidence | None = None
    ) -> "Transitions":
        """Count the transitions in histories without times.

        Args:
            sequences: Items of each history, in order, as numbers.
            num_items: M.
            rule: Says how; None = the defaults.
        """
        rule = rule or Evidence()
        parts = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
        users = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        items = np.concatenate([np.empty(0, np.int64), *parts])
        counts = Histories(users, items, np.zeros(len(items))).pairs(rule, 0.0)
        return cls.empty(rule).adding(counts, num_items).meeting(items)

    @property
    def num_items(self) -> int:
        """M."""
        return len(self.out)

    def adding(self, counts: Counts, num_items: int, latest: float = 0.0) -> "Transitions":
        """Return these and others, in units of the same origin.

        Args:
            counts: The others; negative ones are removed.
            num_items: M, now.
            latest: The last moment of all events; it matters where counts decay.
        """
        sized = self.sized(num_items)
        for own, side in zip((sized.out, sized.into), np.divmod(counts.keys, WIDTH)):
            np.add.at(own, side, counts.totals)
        levels = [*self.levels, counts]
        while len(levels) > 1 and len(levels[-2].keys) < 2 * len(levels[-1].keys):
            levels[-2:] = [Counts.sum(levels[-2:])]
        levels = [own for own in levels if len(own.keys)]
        decayed = 1.0
        if self.rule.half_life is not None:
            decayed = 2 ** ((self.origin - latest) / self.rule.half_life)
        return replace(sized, levels=tuple(levels), unit=decayed / SCALE)

    def sized(self, num_items: int) -> "Transitions":
        """Return these among M items."""
        more = np.zeros(num_items - self.num_items, np.int64)
        out, into, met = (np.concatenate((own, more)) for own in (self.out, self.into, self.met))
        return replace(self, out=out, into=into, met=met)

    def meeting(self, items: np.ndarray, count: int = 1) -> "Transitions":
        """Return these with events of items, each so many times, for their popularity."""
        return replace(self, met=self.met + count * np.bincount(items, minlength=self.num_items))

    @property
    def popularity(self) -> np.ndarray:
        """log(1 + events) of each item, of the most frequent 1: M."""
        counts = np.log1p(self.met)
        return counts / max(counts.max(initial=0), 1e-12)

    def holds(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Say of pairs of items whether they were counted.

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
        """Score what follows weighted items of users, and what follows that: P + second * P P."""
        first = self.follow(shares)
        if not self.rule.second:
            return first
        second = self.follow(first)
        return Sparse.sum([first, second._replace(values=self.rule.second * second.values)], self.num_items)

    def follow(self, shares: Sparse) -> Sparse:
        """Multiply weights of users at items with P."""
        weights = shares.values / np.maximum(self.out[shares.items] * self.unit, 1) ** self.rule.out_power
        rows = shares.items * WIDTH
        spans = [tuple(np.searchsorted(keys, (rows, rows + WIDTH))) for keys, _ in self.levels]
        entries = sum((high - low for low, high in spans), np.zeros(len(rows), np.int64))
        weighed = shares._replace(values=weights)
        parts = [self._multiplied(weighed.part(part), spans, part) for part in shares.groups(entries)]
        users, items, values = parts[0] if len(parts) == 1 else map(np.concatenate, zip(_NOTHING, *parts))
        return Sparse(users, items, values / np.maximum(self.into[items] * self.unit, 1) ** self.rule.in_power)

    def _multiplied(self, shares: Sparse, spans: Sequence[tuple[np.ndarray, ...]], part: slice) -> Sparse:
        """Multiply weights of users at items with n, whose rows stand in a part of these spans of each level."""
        users, items, weights = shares
        owners, columns, totals = [_NONE.keys], [_NONE.keys], [_NONE.totals]
        for (keys, own), span in zip(self.levels, spans):
            low, high = (side[part] for side in span)
            places = _stretches(low, high - low)
            owners.append(np.repeat(np.arange(len(items)), high - low))
            columns.append(keys[places] & (WIDTH - 1))
            totals.append(own[places])
        owner, column, total = (np.concatenate(parts) for parts in (owners, columns, totals))
        if len(self.levels) > 1:  # whole numbers first, so that it does not matter in which levels a pair stands
            found = Counts.of(owner * self.num_items + column, total)
            owner, column = np.divmod(found.keys, self.num_items)
            total = found.totals
        return Sparse.of(users[owner], column, weights[owner] * (total * self.unit), self.num_items)


class EventLog:
    """The events that transitions were counted from, so that a user can be forgotten and late events find their place.

    What is counted depends on the events alone, not on the order in which they came or on how many came together: of
    one user they count by time, those of one moment as they came. Nothing here is safe among threads.

    Args:
        rule: Says how they are counted.
        latest: The last moment of events that are not here, which then cannot be forgotten; None = all are here.
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
        self._last_times = np.empty(0)  # -inf = none

    def __len__(self) -> int:
        return self._count

    @property
    def is_complete(self) -> bool:
        """Whether all events that were counted are here."""
        return self._elsewhere is None

    @property
    def events(self) -> Histories:
        """All events, as they came."""
        return Histories(*(column[: self._count] for column in self._events))

    @property
    def latest(self) -> float:
        """The last moment of all events, 0 if there are none."""
        return self._latest if math.isfinite(self._latest) else 0.0

    def numbered(self, users: Iterable[str]) -> np.ndarray:
        """Return the number of each user; new ones get one."""
        found = []
        for user in users:
            number = self.numbers.get(user)
            if number is None:
                number = self.numbers[user] = self._users
                self._users += 1
            found.append(number)
        return np.array(found, np.int64)

    def without_times(self, users: np.ndarray) -> np.ndarray:
        """Return times for events that have none: each stands behind all of its user's earlier ones."""
        times = np.zeros(len(users))
        known = users < len(self._last_times)
        last = self._last_times[users[known]]
        times[known] = np.where(np.isfinite(last), last, 0.0)
        return times

    def observe(self, new: Histories, transitions: Transitions, num_items: int) -> tuple[Transitions, "Histories"]:
        """Count more events; `append` keeps them.

        Args:
            new: The events, in any order.
            transitions: What was counted of the others.
            num_items: M, with the new ones.

        Returns:
            The transitions with them; and the last events of their users, for `append`.
        """
        order = np.lexsort((new.times, new.users))
        new = Histories(*(column[order] for column in new))
        known = new.users < len(self._last_times)
        last = np.full(len(new.users), -np.inf)
        last[known] = self._last_times[new.users[known]]
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
        """Keep events that `observe` has counted."""
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
        """Return the same events, to be counted by another rule."""
        new = EventLog(rule, self._elsewhere)
        new.numbers, new._users = dict(self.numbers), self._users
        new.fill(self.events)
        return new

    def fill(self, events: Histories) -> None:
        """Keep the events, in the order in which they came, of a log that has none yet."""
        order = np.lexsort((events.times, events.users))
        self.append(events, Histories(*(column[order] for column in events)))

    def forget(self, users: Sequence[str], transitions: Transitions) -> tuple[Transitions, int]:
        """Remove all that was counted of users, and their events and ids.

        Returns:
            The transitions without them, and how many events are gone.
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
        """Count all events anew."""
        return self._rebased(Transitions.empty(self.rule), self.latest, num_items, anew=True).meeting(self.events.items)

    def _rebased(self, transitions: Transitions, latest: float, num_items: int, anew: bool = False) -> Transitions:
        """Return transitions in units of the origin that a log with another end has."""
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
        """Return the last events of users, as many as a new one makes pairs with."""
        known = users[users < len(self._last_items)]
        width = self._last_items.shape[1]
        owners, items = np.repeat(known, width), self._last_items[known].ravel()
        found = items >= 0
        return Histories(owners[found], items[found], np.repeat(self._last_times[known], width)[found])

    def _remember(self, whole: Histories) -> None:
        """Note the last events of users."""
        count, width = self._users, self._last_items.shape[1]
        if count > len(self._last_items):
            room = max(count, 2 * len(self._last_items)) - len(self._last_items)
            self._last_items = np.concatenate((self._last_items, np.full((room, width), -1)))
            self._last_times = np.concatenate((self._last_times, np.full(room, -np.inf)))
        ends = np.flatnonzero(np.diff(whole.users, append=-1)) + 1
        starts = np.concatenate(([0], ends[:-1]))
        users = whole.users[ends - 1]
        for back in range(1, width + 1):
            there = ends - back >= starts
            self._last_items[users, width - back] = np.where(there, whole.items[np.maximum(ends - back, 0)], -1)
        self._last_times[users] = whole.times[ends - 1]


def _joined(before: Histories, after: Histories) -> tuple[Histories, np.ndarray]:
    """Join two histories of each user in the order of time, and say which events are the second's."""
    users, items, times = (np.concatenate(parts) for parts in zip(before, after))
    order = np.lexsort((times, users))
    return Histories(users[order], items[order], times[order]), order >= len(before.users)


class Postings(NamedTuple):
    """Which rows hold a word."""

    starts: np.ndarray
    """Where each word starts in `rows`, and where the last one ends."""
    rows: np.ndarray

    @classmethod
    def of(cls, columns: np.ndarray, lengths: np.ndarray, first: int) -> "Postings":
        """Sort the words of rows, which are numbered from `first` up."""
        order = np.argsort(columns, kind="stable")
        ends = np.cumsum(np.bincount(columns))
        return cls(np.concatenate(([0], ends)), np.repeat(np.arange(first, first + len(lengths)), lengths)[order])

    def lengths(self, words: np.ndarray) -> np.ndarray:
        """Return how many rows hold each of some words."""
        known = np.minimum(words, max(len(self.starts) - 2, 0))
        lengths = np.diff(self.starts, append=self.starts[-1])[known]
        return np.where(words < len(self.starts) - 1, lengths, 0)

    def entries(self, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the places of words among these, and beside each a row that holds it."""
        known = np.flatnonzero(words < len(self.starts) - 1)
        low, high = self.starts[words[known]], self.starts[words[known] + 1]
        return np.repeat(known, high - low), self.rows[_stretches(low, high - low)]


@dataclass(frozen=True, eq=False)
class Words:
    """The words of N rows of texts, and how rare they are among those that are live.

    Attributes:
        vocabulary: Number of each word; shared with later ones, which add to it.
        starts: Where each row starts in `columns`, and where the last one ends: N + 1.
        columns: Words of the rows, each once.
        live: N, False where a row counts no more.

    >>> words = Words.of(["red shoes", "blue shoes", "green tea"])
    >>> words.likeness(words.vectors(recent([[0]], Evidence()))).dense(1, 3).round(2).tolist()
    [[1.0, 0.37, 0.0]]
    """

    vocabulary: dict[str, int]
    starts: np.ndarray
    columns: np.ndarray
    live: np.ndarray
    first: tuple[int, Postings | None] = (0, None)
    """How many rows are sorted by word already, and how."""

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Words":
        """Read texts."""
        return cls({}, np.zeros(1, np.int64), np.empty(0, np.int64), np.empty(0, bool)).adding(texts)

    def adding(self, texts: Iterable[str], gone: Sequence[int] = ()) -> "Words":
        """Return these and the words of more rows, with some rows not live."""
        columns, lengths = [], []
        for text in texts:
            own = dict.fromkeys(WORD.findall(text.lower()))
            columns += [self.vocabulary.setdefault(word, len(self.vocabulary)) for word in own]
            lengths.append(len(own))
        live = np.concatenate((self.live, np.ones(len(lengths), bool)))
        live[list(gone)] = False
        starts = np.concatenate((self.starts, self.starts[-1] + np.cumsum(lengths, dtype=np.int64)))
        every = np.concatenate((self.columns, np.array(columns, np.int64)))
        first = self._sorted if "_sorted" in self.__dict__ else self.first
        if len(live) - first[0] > max(TAIL_ROWS, TAIL_SHARE * len(live)):
            first = (0, None)
        return Words(self.vocabulary, starts, every, live, first)

    def kept(self, rows: Sequence[int]) -> "Words":
        """Return the words of some rows, which get new numbers."""
        index = np.asarray(rows, np.int64)
        lengths = self.starts[index + 1] - self.starts[index]
        starts = np.concatenate(([0], np.cumsum(lengths)))
        columns = self.columns[_stretches(self.starts[index], lengths)]
        return Words(self.vocabulary, starts, columns, np.ones(len(index), bool))

    @cached_property
    def rarity(self) -> np.ndarray:
        """How rare each word is; the last entry is for one that no row holds."""
        found = np.bincount(self.columns, np.repeat(self.live, np.diff(self.starts)), len(self.vocabulary) + 1)
        return np.log((1 + self.live.sum()) / (1 + found)) + 1

    @cached_property
    def norms(self) -> np.ndarray:
        """Length of each row's vector, at least 1e-12: N."""
        rows = np.repeat(np.arange(len(self.live)), np.diff(self.starts))
        squares = np.bincount(rows, self.rarity[self.columns] ** 2, len(self.live))
        return np.maximum(np.sqrt(squares), 1e-12)

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
        """Return the users' vectors, which are the sums of those of weighted rows."""
        lengths = self.starts[shares.items + 1] - self.starts[shares.items]
        words = self.columns[_stretches(self.starts[shares.items], lengths)]
        weights = np.repeat(shares.values / self.norms[shares.items], lengths) * self.rarity[words]
        return Sparse.of(np.repeat(shares.users, lengths), words, weights, len(self.rarity))

    def vector_of(self, text: str, weight: float = 1.0) -> Sparse:
        """Return the vector of a text, times a weight, as that of user 0.

        Words that no row holds only make the text longer.
        """
        unknown = len(self.rarity) - 1
        words = [self.vocabulary.get(word, unknown) for word in dict.fromkeys(WORD.findall(text.lower()))]
        found = np.sort(np.minimum(np.array(words, np.int64), unknown))
        weights = self.rarity[found]
        weights = weight * weights / max(math.sqrt((weights**2).sum()), 1e-12)
        return Sparse(np.zeros(len(found), np.int64), found, weights).known(unknown)

    def likeness(self, vectors: Sparse) -> Sparse:
        """Multiply vectors of users with those of all rows, dead ones too."""
        postings = (self._sorted[1], self._tail)
        parts = []
        for piece in vectors.groups(postings[0].lengths(vectors.items) + postings[1].lengths(vectors.items)):
            part = vectors.part(piece)
            weights = part.values * self.rarity[part.items]
            owners, rows = zip(*(own.entries(part.items) for own in postings))
            owner, row = np.concatenate(owners), np.concatenate(rows)
            parts.append(Sparse.of(part.users[owner], row, weights[owner], max(len(self.live), 1)))
        users, rows, values = (np.concatenate(several) for several in zip(_NOTHING, *parts))
        return Sparse(users, rows, values / self.norms[rows])


__all__ = [
    "ITEM_FEATURES",
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
    "LoneItems",
    "Postings",
    "RowItems",
    "Sparse",
    "Tfidf",
    "Transitions",
    "Words",
    "feature_modules",
    "feature_weights",
    "features_at",
    "reads_item_rows",
    "recent",
    "vector_width",
]
