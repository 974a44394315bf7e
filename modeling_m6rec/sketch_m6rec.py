"""Which words a text holds, in a vector of fixed width: what `word_similarity` compares.

Shapes: V = vocabulary, D = word_similarity_dim.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.nn import functional

FACTOR, RANGE = 2654435761, 1 << 32
"""Multiplicative hashing (Knuth): ids that follow each other land far apart."""


class M6RecWordSketch(nn.Module):
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
    def is_counted(self) -> bool:
        """Whether it is known how rare words are."""
        return bool(self.rarity.any())

    def count(self, texts: Iterable[Sequence[int]]) -> None:
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

    def forward(self, ids: torch.Tensor, texts: torch.Tensor, number: int) -> torch.Tensor:
        """Sketch texts.

        Args:
            ids: Words of all texts, in any order.
            texts: The text that each stands in, counted from 0.
            number: How many texts there are.

        Returns:
            number x D, l2-normalised; zero where a text has no word.

        Raises:
            ValueError: If no words have been counted.
        """
        if not self.is_counted:
            raise ValueError(
                "word_similarity does not know how rare words are: train with it or name it to `m6rec evaluate`, which "
                "count the catalogue's words, or call model.model.word_sketch.count(processor.encode_items(items))"
            )
        key = ids * FACTOR % RANGE
        steps = self.rarity[ids] * (1 - 2 * (key >> 31))
        sketch = self.rarity.new_zeros(number * self.width)
        sketch.index_add_(0, texts * self.width + (key >> 4) % self.width, steps)
        return functional.normalize(sketch.view(number, self.width), dim=-1)


__all__ = ["M6RecWordSketch"]
