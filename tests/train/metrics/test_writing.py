"""Metrics of texts: against their definitions written out, and arithmetic by hand."""

import math
from collections import Counter
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m6rec.train.metrics import bleu, distinct, rouge_l, tokens_of, writing_report
from tests.fast import examples

texts = st.lists(st.sampled_from(["a", "b", "c", "好"]), max_size=7).map(" ".join)
pairs = st.lists(st.tuples(texts, texts), min_size=1, max_size=4)


def longest_common(one, other):
    @cache
    def best(i, j):
        if i == len(one) or j == len(other):
            return 0
        if one[i] == other[j]:
            return 1 + best(i + 1, j + 1)
        return max(best(i + 1, j), best(i, j + 1))

    return best(0, 0)


@settings(max_examples=examples(60), deadline=None)
@given(pairs)
def test_rouge_is_the_mean_of_f1_over_common_subsequences(given_pairs):
    wanted = []
    for own, reference in given_pairs:
        one, other = own.split(), reference.split()
        common = longest_common(tuple(one), tuple(other))
        precision, recall = common / max(len(one), 1), common / max(len(other), 1)
        wanted.append(2 * precision * recall / (precision + recall) if common else 0.0)
    found = rouge_l(*map(list, zip(*given_pairs)))
    assert found == pytest.approx(sum(wanted) / len(wanted))


@settings(max_examples=examples(60), deadline=None)
@given(pairs, st.integers(1, 3))
def test_bleu_is_clipped_precision_times_brevity(given_pairs, order):
    precisions, written, wanted = [], 0, 0
    for size in range(1, order + 1):
        hits = total = 0
        for own, reference in given_pairs:
            one, other = own.split(), reference.split()
            grams = [tuple(one[i : i + size]) for i in range(len(one) - size + 1)]
            left = Counter(tuple(other[i : i + size]) for i in range(len(other) - size + 1))
            for gram in grams:
                hits += left[gram] > 0
                left[gram] -= 1
            total += len(grams)
        precisions.append(hits / total if total else 0.0)
    for own, reference in given_pairs:
        written, wanted = written + len(own.split()), wanted + len(reference.split())
    product = math.prod(precisions) ** (1 / order)
    brevity = 1.0 if written > wanted else math.exp(1 - wanted / written) if written else 0.0
    assert bleu(*map(list, zip(*given_pairs)), order) == pytest.approx(product * brevity)


def test_the_shorter_corpus_pays_and_the_longer_does_not():
    assert bleu(["a b"], ["a b c d"], 2) == pytest.approx(math.exp(-1))
    assert bleu(["a b c d"], ["a b"], 1) == pytest.approx(1 / 2)


def test_chinese_is_compared_by_characters_and_english_by_words():
    assert tokens_of("很好 the Gift, the") == ["很", "好", "the", "Gift,", "the"]
    assert rouge_l(["物流很快"], ["快递很快"]) == pytest.approx(1 / 2)
    assert rouge_l(["Gift"], ["gift"]) == 0


def test_distinct_counts_over_all_texts():
    assert distinct(["a b", "a b", "a c"], 1) == 3 / 6
    assert distinct(["a b", "a b", "a c"], 2) == 2 / 3
    assert distinct(["", ""], 1) == 0


def test_a_text_that_is_not_written_scores_nothing():
    assert writing_report(["", "a b c d"], ["a", "a b c d"]) == {
        "rouge_l": 0.5,
        "bleu_4": pytest.approx(math.exp(1 - 5 / 4)),
        "distinct_1": 1.0,
        "distinct_2": 1.0,
        "texts": 2,
    }


@pytest.mark.parametrize("metric", [rouge_l, bleu, writing_report])
def test_what_cannot_be_compared_is_refused(metric):
    with pytest.raises(ValueError, match="references has 1 entries and written 2"):
        metric(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="written is empty"):
        metric([], [])


def test_an_order_of_nothing_is_refused():
    for call in (lambda: bleu(["a"], ["a"], 0), lambda: distinct(["a"], 0)):
        with pytest.raises(ValueError, match="is 0; expected a whole number from 1 on"):
            call()
