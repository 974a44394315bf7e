"""Metrics of generated texts: similarity to references, and diversity.

Texts are compared by tokens: words separated by white space, with punctuation and case; in Chinese and Japanese, which
have no spaces, single characters.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

from ...values_m6rec import UNSPACED
from .checks import positive, same_length

TOKEN = re.compile(f"[{UNSPACED}]|[^\\s{UNSPACED}]+")


def tokens_of(text: str) -> list[str]:
    """Split a text into tokens for comparison.

    >>> tokens_of("a good gift! 很好 2x")
    ['a', 'good', 'gift!', '很', '好', '2x']
    """
    return TOKEN.findall(text)


def rouge_l(written: Sequence[str], references: Sequence[str]) -> float:
    """Return the mean ROUGE-L F1 of pairs of texts.

    With l the length of the longest common subsequence, P = l / tokens written, R = l / tokens of the reference, and
    F1 = 2 P R / (P + R); 0 if nothing is in common (Lin, 2004, with beta = 1).

    Args:
        written: Generated texts.
        references: Reference texts.

    Raises:
        ValueError: There is not one reference for each text, or none at all.

    >>> rouge_l(["the gift was good"], ["the card was very good"])     # the, was, good: P = 3/4, R = 3/5
    0.6666...
    """
    pairs = _pairs(written, references)
    # 2 P R / (P + R) = 2 l / (tokens written + tokens of the reference)
    return sum(2 * _common(own, given) / max(len(own) + len(given), 1) for own, given in pairs) / len(pairs)


def bleu(written: Sequence[str], references: Sequence[str], order: int = 4) -> float:
    """Return BLEU of a corpus with one reference per text (Papineni et al., 2002), without smoothing.

    BLEU = min(1, exp(1 - r / c)) (p_1 ... p_order)^(1 / order), with c tokens written, r tokens of the references, and
    p_n the share of written n-grams that occur in the reference, with clipped counts; over the whole corpus, so a
    corpus without a common n-gram has BLEU 0.

    Args:
        written: Generated texts.
        references: Reference texts.
        order: Length of the longest n-grams.

    Raises:
        ValueError: There is not one reference for each text, or none at all.

    >>> bleu(["the gift was good"], ["the gift was very good"], order=2)     # p = 4/4, 2/3; r/c = 5/4
    0.6358...
    """
    pairs = _pairs(written, references)
    order = positive("order", order)
    length = sum(len(own) for own, _ in pairs)
    logs = 0.0
    for size in range(1, order + 1):
        counts = [(_grams(own, size), _grams(given, size)) for own, given in pairs]
        hits = sum((own & given).total() for own, given in counts)
        if not hits:
            return 0.0
        logs += math.log(hits / sum(own.total() for own, _ in counts)) / order
    return math.exp(min(0.0, 1 - sum(len(given) for _, given in pairs) / length) + logs)


def distinct(texts: Sequence[str], size: int) -> float:
    """Return the share of different n-grams among all n-grams of the texts (Li et al., 2016); 0 without n-grams.

    >>> distinct(["a b a", "a b"], 2)       # ab, ba, ab
    0.6666...
    """
    grams: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        grams.update(_grams(tokens_of(text), positive("size", size)))
    return len(grams) / max(grams.total(), 1)


def writing_report(written: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return all metrics of generated texts as one flat dict.

    >>> writing_report(["a b c d"], ["a b c d"])
    {'rouge_l': 1.0, 'bleu_4': 1.0, 'distinct_1': 1.0, 'distinct_2': 1.0, 'texts': 1}
    """
    return {
        "rouge_l": rouge_l(written, references),
        "bleu_4": bleu(written, references),
        "distinct_1": distinct(written, 1),
        "distinct_2": distinct(written, 2),
        "texts": len(written),
    }


def _pairs(written: Sequence[str], references: Sequence[str]) -> list[tuple[list[str], list[str]]]:
    same_length("references", len(references), "written", len(written))
    if not written:
        raise ValueError("written is empty, and no metric is defined on nothing; give at least one text")
    return [(tokens_of(own), tokens_of(given)) for own, given in zip(written, references)]


def _grams(tokens: list[str], size: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(tokens[start:] for start in range(size))))


def _common(one: list[str], other: list[str]) -> int:
    """Length of the longest common subsequence."""
    best = [0] * (len(other) + 1)
    for token in one:
        before = 0  # the value of the previous row and column
        for place, against in enumerate(other, 1):
            before, best[place] = best[place], before + 1 if token == against else max(best[place], best[place - 1])
    return best[-1]


__all__ = ["bleu", "distinct", "rouge_l", "tokens_of", "writing_report"]
