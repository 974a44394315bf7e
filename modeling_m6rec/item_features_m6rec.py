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
        if not torch.compiler.is_exporting() and not self.is_counted:  # `export_program` asks before it exports
            raise ValueError(
                "word_similarity does not know how rare words are: train with it or name it to `m6rec evaluate`, which "
                "count the catalogue's words, or call model.model.word_sketch.count(processor.encode_items(items))"
            )
        key = ids * FACTOR % RANGE
        steps = self.rarity[ids] * (1 - 2 * (key >> 31))
        # One text more takes what is no word: to choose the words first would make a size that depends on their number.
        place = texts.masked_fill(~where, number) * self.width + (key >> 4) % self.width
        sketch = self.rarity.new_zeros((number + 1) * self.width).index_add(0, place.flatten(), steps.flatten())
        return functional.normalize(sketch.view(number + 1, self.width)[:number], dim=-1)


__all__ = [
    "M6RecWordSketch",
]
