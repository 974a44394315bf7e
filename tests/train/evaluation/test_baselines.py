"""Baselines against arithmetic by hand and dense twins."""

import math
import re
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m6rec.train.evaluation.baselines import SimilarText, popularity_scores
from m6rec.train.rows.item_likes import like_rates
from m6rec.values_m6rec import WORD

words = st.lists(st.sampled_from(["red", "Shoe", "tea", "1999", "靴", "子", "é"]), max_size=6).map(" ".join)


def dense_scores(texts, histories):
    """The same with dictionaries and loops."""
    bags = []
    for text in texts:
        found = re.findall(r"[a-z0-9é]+|[靴子]", text.lower())
        bags.append({word: found.count(word) for word in found})
    size = len(texts)
    rarity = {word: math.log((1 + size) / (1 + sum(word in bag for bag in bags))) for bag in bags for word in bag}
    vectors = [{word: (1 + math.log(count)) * rarity[word] for word, count in bag.items()} for bag in bags]
    norms = [math.sqrt(sum(value**2 for value in vector.values())) or 1 for vector in vectors]
    vectors = [{word: value / norm for word, value in vector.items()} for vector, norm in zip(vectors, norms)]

    def dot(one, other):
        return sum(value * vectors[other].get(word, 0) for word, value in vectors[one].items())

    return [
        [sum(dot(met, item) for met in history) / max(len(history), 1) for item in range(size)] for history in histories
    ]


def test_three_texts_by_hand():
    # tea is in two of three texts, the others in one: idf ln(4/3) and ln 2; tf of "green green" is 1 + ln 2.
    common, rare = math.log(4 / 3), math.log(2)
    green = (1 + math.log(2)) * rare
    first, second = math.hypot(common, green), math.hypot(common, rare)
    scores = SimilarText(["green green tea", "tea pot", "shoe"]).scores([[0], [1, 2], []])
    together = common * common / (first * second)
    np.testing.assert_allclose(scores, [[1, together, 0], [together / 2, 0.5, 0.5], [0, 0, 0]], atol=1e-12)


def test_chinese_is_compared_by_characters_and_other_scripts_by_words():
    assert WORD.findall("防水登山鞋 hiking-shoes_2 café кот 코트 がくカ") == [
        *"防水登山鞋",
        *["hiking", "shoes", "2", "café", "кот", "코트"],
        *"がくカ",
    ]
    scores = SimilarText(["登山鞋", "山鞋", "雨衣", "rain"]).scores([[0], [2]])
    # 登 is in one of four texts, 山 and 鞋 in two: ln(5/2) and ln(5/3)
    shared = math.sqrt(2) * math.log(5 / 3)
    np.testing.assert_allclose(scores[0], [1, shared / math.hypot(shared, math.log(5 / 2)), 0, 0])
    np.testing.assert_allclose(scores[1], [0, 0, 1, 0])


@settings(max_examples=60, deadline=None)
@given(st.lists(words, min_size=1, max_size=6), st.data())
def test_similar_text_equals_its_dense_twin(texts, data):
    histories = data.draw(st.lists(st.lists(st.integers(0, len(texts) - 1), max_size=4), max_size=4))
    scores = SimilarText(texts).scores([np.array(history, dtype=int) for history in histories])
    assert scores.shape == (len(histories), len(texts))
    if histories:
        np.testing.assert_allclose(scores, dense_scores(texts, histories), atol=1e-9)


def test_nothing_is_said_to_the_user_of_how_it_is_computed():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SimilarText(["a b", "b"]).scores([[0]])


def test_popularity_is_the_same_for_every_user():
    scores = popularity_scores(np.array([3, 0, 7]), 2)
    assert scores.tolist() == [[3, 0, 7], [3, 0, 7]]
    assert popularity_scores(np.array([3]), 0).shape == (0, 1)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 5)), min_size=1, max_size=12),
    st.lists(st.sampled_from("abcz"), max_size=5),
    st.floats(0.5, 20),
)
def test_rates_are_means_drawn_towards_the_mean_of_all(examples, asked, strength):
    groups, labels = np.array([group for group, _ in examples]), np.array([float(label) for _, label in examples])
    overall = sum(labels) / len(labels)
    wanted = []
    for name in asked:
        own = [label for group, label in examples if group == name]
        wanted.append((sum(own) + strength * overall) / (len(own) + strength))
    found = like_rates(labels, groups, np.array(asked, dtype=object), strength)
    assert found.tolist() == pytest.approx(wanted)
