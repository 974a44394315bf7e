"""Metrics of generated texts: similarity to references, repetition, named features, and bootstrap intervals.

A text is compared by tokens: words separated by white space; in Chinese and Japanese, which have no spaces, single
characters. `writing_report` compares texts without case and punctuation (`plain_text`), so that "dress." equals
"dress", and gives the similarity of the texts as they stand as well, under `raw_`.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...values_m6rec import UNSPACED
from .bootstrap import interval_of, resampled_means
from .checks import positive, same_length

TOKEN = re.compile(f"[{UNSPACED}]|[^\\s{UNSPACED}]+")
APOSTROPHES = "'’"
BLEU_ORDER = 4


def tokens_of(text: str) -> list[str]:
    """Split a text into tokens for comparison.

    >>> tokens_of("a good gift! 很好 2x")
    ['a', 'good', 'gift!', '很', '好', '2x']
    """
    return TOKEN.findall(text)


def plain_text(text: str) -> str:
    """Return a text in lower case; punctuation and symbols become spaces, apostrophes are removed.

    >>> plain_text("I don't love this well-made Dress... 很好！")
    'i dont love this well made dress 很 好'
    """
    kept = []
    for char in unicodedata.normalize("NFKC", text).lower():
        if char in APOSTROPHES:
            continue
        kept.append(" " if unicodedata.category(char)[0] in "PSZC" else char)
    return " ".join(tokens_of("".join(kept)))


def rouge_1(written: Sequence[str], references: Sequence[str]) -> float:
    """Return the mean ROUGE-1 F1 of pairs of texts: 2 hits / (tokens written + tokens of the reference) (Lin, 2004).

    Args:
        written: Generated texts.
        references: Reference texts.

    Raises:
        ValueError: There is not one reference for each text, or none at all.

    >>> rouge_1(["good the gift good"], ["the card was very good"])     # the, good: P = 2/4, R = 2/5
    0.4444...
    """
    return float(_rouge_1(_pairs(written, references)).mean())


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
    return float(_rouge_l(_pairs(written, references)).mean())


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
    counts = _bleu_counts(_pairs(written, references), positive("order", order))
    return float(_bleu_of(counts.sum(0)[None], order)[0])


def distinct(texts: Sequence[str], size: int) -> float:
    """Return the share of different n-grams among all n-grams of the texts (Li et al., 2016); 0 without n-grams.

    >>> distinct(["a b a", "a b"], 2)       # ab, ba, ab
    0.6666...
    """
    grams: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        grams.update(_grams(tokens_of(text), positive("size", size)))
    return len(grams) / max(grams.total(), 1)


def unique_share(texts: Sequence[str]) -> float:
    """Return the share of different texts among all, USR (Li et al., 2020): 1 if no text repeats another.

    >>> unique_share(["a", "a", "b", "a"])
    0.5
    """
    if not texts:
        raise ValueError("texts is empty, and no metric is defined on nothing; give at least one text")
    return len(set(texts)) / len(texts)


def feature_report(written: Sequence[str], references: Sequence[str], features: Sequence[str]) -> dict[str, float]:
    """Return how texts name features, such as "fabric" or "battery life" (Li et al., 2020, for one feature a text).

    Args:
        written: Generated texts.
        references: Reference texts.
        features: Words or phrases; case and punctuation are ignored.

    Returns:
        `fcr`, the share of the features that any text names; `fmr`, the mean share of a reference's features that its
        text names, over references with a feature (absent if there is none); `div`, the mean number of features that
        two texts have in common (absent with one text): lower is more diverse.

    Raises:
        ValueError: There are no features, or not one reference for each text.

    >>> feature_report(["soft fabric", "Soft!"], ["the fabric is soft", "good size"], ["soft", "fabric", "size"])
    {'fcr': 0.6666..., 'fmr': 0.5, 'div': 1.0}
    """
    named, wanted = _named(written, references, features)
    report = {"fcr": float(named.any(0).mean())}
    shares = _matched(named, wanted)
    if not np.isnan(shares).all():
        report["fmr"] = float(np.nanmean(shares))
    if len(written) > 1:
        times = named.sum(0, dtype=np.int64)
        report["div"] = float((times * (times - 1)).sum() / (len(written) * (len(written) - 1)))
    return report


def writing_report(
    written: Sequence[str], references: Sequence[str], features: Sequence[str] | None = None
) -> dict[str, float]:
    """Return all metrics of generated texts as one flat dict.

    Args:
        written: Generated texts.
        references: Reference texts.
        features: Words or phrases whose use is reported (`feature_report`); None: not reported.

    Raises:
        ValueError: There is not one reference for each text, or none at all.

    >>> writing_report(["a b c D"], ["a b c d."])
    {'bleu_1': 1.0, 'bleu_4': 1.0, 'rouge_1': 1.0, 'rouge_l': 1.0, 'distinct_1': 1.0, 'distinct_2': 1.0, 'usr': 1.0,
    'raw_bleu_1': 0.75, 'raw_bleu_4': 0.0, 'raw_rouge_1': 0.75, 'raw_rouge_l': 0.75, 'texts': 1}
    """
    own, given = list(map(plain_text, written)), list(map(plain_text, references))
    report = _similarity(own, given)
    report |= {"distinct_1": distinct(own, 1), "distinct_2": distinct(own, 2), "usr": unique_share(own)}
    report |= {} if features is None else feature_report(written, references, features)
    report |= {f"raw_{name}": value for name, value in _similarity(written, references).items()}
    return report | {"texts": len(written)}


def writing_intervals(
    written: Sequence[str],
    references: Sequence[str],
    features: Sequence[str] | None = None,
    groups: ArrayLike | None = None,
    samples: int = 2000,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Return 95% bootstrap intervals of the metrics that compare a text with its reference: metric -> [low, high].

    BLEU is computed from the counts of each resample. Distinct-n, USR, FCR and DIV have no interval: they count what
    repeats, and a resample repeats texts.

    Args:
        written: Generated texts.
        references: Reference texts.
        features: As in `writing_report`; adds `fmr`, if each resample of the references has a feature.
        groups: The group of each text, usually its user; whole groups are drawn. None: each text is a group.
        samples: Number of resamples.
        seed: The same seed gives the same interval.

    Raises:
        ValueError: There is not one reference for each text, or none at all.

    >>> writing_intervals(["a b", "a b"], ["a b", "a b"], samples=10)["rouge_l"]
    [1.0, 1.0]
    """
    pairs = _pairs(list(map(plain_text, written)), list(map(plain_text, references)))
    columns = [_rouge_1(pairs)[:, None], _rouge_l(pairs)[:, None], _bleu_counts(pairs, BLEU_ORDER)]
    if features is not None:
        shares = _matched(*_named(written, references, features))
        columns += [np.nan_to_num(shares)[:, None], ~np.isnan(shares)[:, None]]
    means = resampled_means(np.column_stack(columns), groups, samples, seed)
    width = 2 * BLEU_ORDER + 2
    counts = means[:, 2 : 2 + width]
    drawn = {"bleu_1": _bleu_of(counts, 1), "bleu_4": _bleu_of(counts, BLEU_ORDER)}
    drawn |= {"rouge_1": means[:, 0], "rouge_l": means[:, 1]}
    if features is not None and means[:, -1].all():
        drawn["fmr"] = means[:, -2] / means[:, -1]
    return {name: interval_of(values) for name, values in drawn.items()}


def _similarity(written: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    return {
        "bleu_1": bleu(written, references, 1),
        "bleu_4": bleu(written, references, BLEU_ORDER),
        "rouge_1": rouge_1(written, references),
        "rouge_l": rouge_l(written, references),
    }


def _rouge_1(pairs: Sequence[tuple[list[str], list[str]]]) -> NDArray[np.float64]:
    hits = [(_grams(own, 1) & _grams(given, 1)).total() for own, given in pairs]
    return np.array([2 * hit / max(len(own) + len(given), 1) for hit, (own, given) in zip(hits, pairs)])


def _rouge_l(pairs: Sequence[tuple[list[str], list[str]]]) -> NDArray[np.float64]:
    # 2 P R / (P + R) = 2 l / (tokens written + tokens of the reference)
    return np.array([2 * _common(own, given) / max(len(own) + len(given), 1) for own, given in pairs])


def _bleu_counts(pairs: Sequence[tuple[list[str], list[str]]], order: int) -> NDArray[np.float64]:
    """Return for each pair: tokens written, tokens of the reference, then hits and number of n-grams for each n."""
    rows = []
    for own, given in pairs:
        row = [len(own), len(given)]
        for size in range(1, order + 1):
            grams = _grams(own, size)
            row += [(grams & _grams(given, size)).total(), grams.total()]
        rows.append(row)
    return np.array(rows, dtype=np.float64)


def _bleu_of(counts: NDArray[np.float64], order: int) -> NDArray[np.float64]:
    """Return BLEU of rows of summed counts (`_bleu_counts`); a common factor of a row does not change it."""
    hits, grams = counts[:, 2 : 2 + 2 * order : 2], counts[:, 3 : 3 + 2 * order : 2]
    found = np.zeros(len(counts))
    some = (hits > 0).all(1)
    logs = np.log(hits[some] / grams[some]).mean(1)
    found[some] = np.exp(np.minimum(0.0, 1 - counts[some, 1] / counts[some, 0]) + logs)
    return found


def _named(
    written: Sequence[str], references: Sequence[str], features: Sequence[str]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which features each text and each reference names: texts x features each."""
    same_length("references", len(references), "written", len(written))
    wanted = [f" {plain_text(feature)} " for feature in dict.fromkeys(features)]
    if not wanted or "  " in wanted:
        raise ValueError("features: expected words or phrases, none of them empty; leave features out otherwise")
    tables = [
        np.array([[feature in f" {plain_text(text)} " for feature in wanted] for text in texts], dtype=bool)
        for texts in (written, references)
    ]
    return tables[0], tables[1]


def _matched(named: NDArray[np.bool_], wanted: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the share of each reference's features that its text names; NaN for a reference without a feature."""
    with np.errstate(invalid="ignore"):
        return (named & wanted).sum(1) / wanted.sum(1)


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


__all__ = [
    "bleu",
    "distinct",
    "feature_report",
    "plain_text",
    "rouge_1",
    "rouge_l",
    "tokens_of",
    "unique_share",
    "writing_intervals",
    "writing_report",
]
