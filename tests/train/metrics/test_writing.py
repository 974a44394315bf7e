"""Metrics of texts: against their definitions written out, and arithmetic by hand."""

import math
from collections import Counter
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m6rec.train.metrics import (
    bleu,
    distinct,
    feature_report,
    plain_text,
    rouge_1,
    rouge_l,
    tokens_of,
    unique_share,
    writing_intervals,
    writing_report,
)
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


@settings(max_examples=examples(60), deadline=None)
@given(pairs)
def test_rouge_1_is_the_mean_f1_of_clipped_words(given_pairs):
    wanted = []
    for own, reference in given_pairs:
        one, left = own.split(), reference.split()
        total, hits = len(one) + len(left), 0
        for word in one:
            if word in left:
                left.remove(word)
                hits += 1
        wanted.append(2 * hits / total if total else 0.0)
    assert rouge_1(*map(list, zip(*given_pairs))) == pytest.approx(sum(wanted) / len(wanted))


def test_the_report_ignores_case_and_punctuation_and_gives_the_texts_as_they_stand_too():
    report = writing_report(["I love this DRESS.", ""], ["i love this dress!", "it's soft"], ["dress", "soft"])
    assert report == {
        "bleu_1": pytest.approx(math.exp(1 - 6 / 4)),
        "bleu_4": pytest.approx(math.exp(1 - 6 / 4)),
        "rouge_1": 0.5,
        "rouge_l": 0.5,
        "distinct_1": 1.0,
        "distinct_2": 1.0,
        "usr": 1.0,
        "fcr": 0.5,
        "fmr": 0.5,
        "div": 0.0,
        "raw_bleu_1": pytest.approx(math.exp(1 - 6 / 4) * 2 / 4),
        "raw_bleu_4": 0.0,
        "raw_rouge_1": pytest.approx(2 * 2 / 8 / 2),
        "raw_rouge_l": pytest.approx(2 * 2 / 8 / 2),
        "texts": 2,
    }
    assert "fcr" not in writing_report(["a"], ["a"])


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("Don't! 'Soft', soft-ish\u200b", "dont soft soft ish"),
        ("ＧＯＯＤ　gift…", "good gift"),
        ("很好！物流快。", "很 好 物 流 快"),
        ("café $5 ★", "café 5"),
        ("...", ""),
    ],
)
def test_plain_texts(text, plain):
    assert plain_text(text) == plain


def test_repeated_texts_are_counted_without_case_and_punctuation():
    assert writing_report(["Good.", "good", "bad", "good!"], ["a"] * 4)["usr"] == 2 / 4
    assert unique_share(["Good.", "good"]) == 1


def test_features_by_hand():
    written = ["Soft fabric, battery life", "soft", "a battery"]
    references = ["battery-life and soft", "the fabric", "nothing"]
    features = ["soft", "Fabric", "battery life", "size"]
    # Named: {soft, fabric, battery life}, {soft}, {}. Wanted: {battery life, soft}, {fabric}, none.
    # Common features of the three pairs: 1, 0, 0.
    expected = {"fcr": 3 / 4, "fmr": (2 / 2 + 0 / 1) / 2, "div": pytest.approx(1 / 3)}
    assert feature_report(written, references, features) == expected
    assert feature_report(["soft"], ["soft"], ["fabric"]) == {"fcr": 0.0}
    assert feature_report(["softer"], ["soft"], ["soft"])["fmr"] == 0


@settings(max_examples=examples(30), deadline=None)
@given(st.lists(st.sets(st.sampled_from("abcd")), min_size=2, max_size=6))
def test_div_is_the_mean_number_of_common_features_of_two_texts(named):
    texts = [" ".join(sorted(own)) for own in named]
    counts = [len(named[i] & named[j]) for i in range(len(named)) for j in range(i)]
    assert feature_report(texts, texts, list("abcd"))["div"] == pytest.approx(sum(counts) / len(counts))


def test_intervals_equal_the_metrics_of_resampled_texts():
    rng = np.random.default_rng(0)
    words = np.array(["soft", "a", "dress", "fits", "it"])
    written = [" ".join(words[rng.integers(5, size=8)]) for _ in range(30)]
    references = [" ".join(words[rng.integers(5, size=9)]) for _ in range(30)]
    found = writing_intervals(written, references, ["soft", "dress"], samples=300, seed=1)
    slow = {name: [] for name in found}
    for _ in range(300):
        drawn = rng.integers(30, size=30)
        report = writing_report([written[i] for i in drawn], [references[i] for i in drawn], ["soft", "dress"])
        for name in slow:
            slow[name].append(report[name])
    assert set(found) == {"bleu_1", "bleu_4", "rouge_1", "rouge_l", "fmr"}
    for name, interval in found.items():
        assert interval == pytest.approx(np.quantile(slow[name], [0.025, 0.975]), abs=0.04)
        assert interval[0] < writing_report(written, references, ["soft", "dress"])[name] < interval[1]


def test_intervals_draw_whole_users():
    same = writing_intervals(["a", "b"] * 8, ["a", "a"] * 8, groups=["ann"] * 16, samples=20)
    assert same["rouge_1"] == pytest.approx([0.5, 0.5])
    rows = writing_intervals(["a", "b"] * 8, ["a", "a"] * 8, samples=20)
    assert rows["rouge_1"][0] < 0.5 < rows["rouge_1"][1]


def test_a_text_that_is_not_written_scores_nothing():
    report = writing_report(["", "a b c d"], ["a", "a b c d"])
    assert report["rouge_l"] == 0.5
    assert report["bleu_4"] == pytest.approx(math.exp(1 - 5 / 4))


@pytest.mark.parametrize("features", [[], ["soft", "!"]])
def test_features_without_words_are_refused(features):
    with pytest.raises(ValueError, match="features: expected words or phrases"):
        feature_report(["a"], ["a"], features)


@pytest.mark.parametrize("metric", [rouge_1, rouge_l, bleu, writing_report])
def test_what_cannot_be_compared_is_refused(metric):
    with pytest.raises(ValueError, match="references has 1 entries and written 2"):
        metric(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="written is empty"):
        metric([], [])


def test_an_order_of_nothing_is_refused():
    for call in (lambda: bleu(["a"], ["a"], 0), lambda: distinct(["a"], 0)):
        with pytest.raises(ValueError, match="is 0; expected a whole number from 1 on"):
            call()
