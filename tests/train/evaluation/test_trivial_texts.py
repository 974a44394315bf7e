"""Rows of texts that need no model: by hand, on few texts."""

import numpy as np
import pytest

from m6rec.train.evaluation.tables import tables
from m6rec.train.evaluation.trivial_texts import nearest_texts, one_sentence, previous_texts, trivial_texts, words_of
from m6rec.train.metrics import plain_text, rouge_l
from m6rec.train.rows.writing import WritingExample


def written(text, **request):
    return WritingExample("explanation", request, text)


def test_one_sentence_is_central_in_training_and_the_best_of_ten_on_validation():
    common = [f"i love this dress {word}" for word in "abcdefghijklm"]
    training = [written(text) for text in [*common, "nothing in common at all here"] * 2]
    validation = [written("i love this dress d"), written("I love this dress, d!")]
    assert one_sentence(training, validation, 0) == "i love this dress d"
    assert "nothing" not in one_sentence(training, [written("nothing in common at all here")], 0)


def test_nearest_texts_equal_the_cosine_of_dense_vectors():
    rng = np.random.default_rng(0)
    words = np.array(["red", "blue", "shoe", "dress", "soft", "warm"])
    training = [
        written(f"text {row}", facts=[" ".join(words[rng.integers(6, size=4)])], candidates=[{"item_id": "soft"}])
        for row in range(20)
    ]
    asked = [written("?", facts=" ".join(words[rng.integers(6, size=3)])) for _ in range(9)]

    def vector(example):
        own = words_of(example.request)
        return np.array([own.count(word) for word in words], dtype=float)

    table = np.stack([vector(example) for example in training])
    rarity = np.log((1 + len(table)) / (1 + (table > 0).sum(0))) + 1
    table = table * rarity
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    expected = [training[int((table @ (vector(example) * rarity)).argmax())].text for example in asked]
    assert nearest_texts(training, asked) == expected


def test_words_of_a_request_leave_out_ids():
    request = {
        "user": {"user_id": "u1", "name": "Ann Lee"},
        "history": ["socks", {"item": {"item_id": "i9", "title": "Shoes!"}, "rating": 5}],
        "text": [{"role": "user", "content": "Hi"}],
    }
    assert words_of(request) == ["ann", "lee", "socks", "shoes", "hi"]


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        ({"history": [{"text": "first"}, {"text": "second"}, {"item": "x"}, "y"]}, "second"),
        ({"history": []}, ""),
        ({}, ""),
        ({"text": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "a"),
    ],
)
def test_the_previous_text_is_the_users_last(request_, text):
    assert previous_texts([WritingExample("conversation", request_, "?")]) == [text]


def test_without_training_texts_only_the_copy_remains():
    assert list(trivial_texts([], [], [written("a")], 0)) == ["previous_text"]
    rows = trivial_texts([written("a b", facts="x")], [], [written("a", facts="x")] * 2, 0)
    assert rows == {"one_sentence": ["a b"] * 2, "nearest_text": ["a b"] * 2, "previous_text": [""] * 2}
    assert rouge_l([plain_text("A.")], ["a"]) == 1


def test_tables_show_the_texts_of_each_row_that_has_some():
    own = {"perplexity": 2.5, "explanation/bleu_4": 0.25, "explanation/texts": 3, "examples": 3}
    rows = {"m6rec": own, "previous_text": {"explanation/bleu_4": 0.5}, "unigram": {"perplexity": 9.0}}
    lines = tables({"writing": rows}).split("\n")
    assert [line.split() for line in lines] == [
        ["writing", "(3", "examples)"],
        ["perplexity"],
        ["m6rec", "2.5000"],
        ["unigram", "9.0000"],
        ["explanation", "(3", "texts)"],
        ["bleu_4"],
        ["m6rec", "0.2500"],
        ["previous_text", "0.5000"],
    ]
