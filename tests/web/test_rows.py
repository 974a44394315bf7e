"""The page's code turns requests into the same rows as the processor: wording, tokenizer, truncation, errors."""

import itertools
import json
import random

import pytest
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordPiece
from tokenizers.trainers import WordPieceTrainer
from transformers import TokenizersBackend

from m6rec import M6RecProcessor, M6RecTokenizer
from m6rec.values_m6rec import SCORING_TASKS
from tests import fast
from tests.web.node import run
from tests.web.requests_of_both_languages import CHINESE, ENGLISH, ODD, Requests

TASKS = ("retrieval", *SCORING_TASKS)
ROWS = {"i1": 3, "i2": 1, "3": 2, "4": 9}
SETTINGS = [
    {"max_length": 1000},
    {"max_length": 150, "time": "ago"},
    {"max_length": 90, "max_events": 6, "truncation_stride": 3},
    {"max_length": 60, "max_segment": 12, "options": 5},
    {"max_length": 24, "max_events": 3},
]


def corpus():
    draw = random.Random(0)
    texts = ["".join(draw.choices(CHINESE, k=5)) + " " + " ".join(draw.choices(ENGLISH, k=6)) for _ in range(300)]
    return [*texts, *ODD[:-1:3], "years old, occupation, stars, watched a day later", "一位三十多岁的女性用户"]


def byte_level():
    return M6RecTokenizer.train(corpus(), vocab_size=700)


def word_piece():
    backend = Tokenizer(WordPiece(unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = WordPieceTrainer(vocab_size=500, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False)
    backend.train_from_iterator(corpus(), trainer)
    named = {"unk_token": "[UNK]", "pad_token": "[PAD]"}
    return M6RecTokenizer.from_backbone(TokenizersBackend(tokenizer_object=backend, **named), num_options=8)


def settings_of(processor):
    names = ("template", "max_length", "max_events", "time", "item_rows", "options", "truncation_stride", "max_segment")
    return {name: getattr(processor, name) for name in names}


def expected(processor, example):
    """The processor's row; None if it refuses the request."""
    try:
        if "item" in example:
            return {"input_ids": processor.encode_items([example["item"]])[0]}
        row = processor.read(example["request"], example["task"])
    except (ValueError, TypeError):
        return None
    return {
        "input_ids": list(row.input_ids),
        "item_embedding_ids": list(row.item_embedding_ids),
        "segments": [list(segment) for segment in row.segments],
        "events": [list(span) for span in row.events],
        "dropped": row.dropped.events,
    }


def fixture(tokenizer, count, seed):
    """Requests of both languages for processors of every template, and the rows that Python makes of them."""
    processors = [
        M6RecProcessor.from_template(tokenizer, domain, language, item_rows=ROWS, **settings)
        for domain, language in itertools.product(("ecommerce", "video", "social"), ("en", "zh"))
        for settings in SETTINGS
    ]
    requests, made = Requests(seed), []
    for number in range(count):
        place = number % len(processors)
        example = {"processor": place, "task": requests.draw.choice(TASKS)}
        example |= {"item": requests.item()} if number % 10 == 9 else {"request": requests.request()}
        made.append({**example, "expected": expected(processors[place], example)})
    ids = tokenizer.structural_ids
    kinds = processors[0]._kinds
    return {
        "tokenizers": [json.loads(tokenizer.backend_tokenizer.to_str())],
        "processors": [
            {"tokenizer": 0, "settings": settings_of(each), "ids": ids, "kinds": kinds} for each in processors
        ],
        "examples": made,
    }


@pytest.mark.parametrize("make", [byte_level, word_piece])
def test_rows_are_those_of_the_processor(make, tmp_path):
    count = 300 if fast.ONLY else 5000  # all tests: 10,000 requests
    given = fixture(make(), count, seed=1)
    refused = sum(example["expected"] is None for example in given["examples"]) / count
    assert 0.02 < refused < 0.6
    (tmp_path / "fixture.json").write_text(json.dumps(given))
    found = run("rows.mjs", tmp_path / "fixture.json")
    assert found["read"] == count
    assert not found["different"], found["some"]
