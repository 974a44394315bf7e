"""One small tokenizer for all tests here; its pad id is not 0."""

import pytest
from transformers import AutoTokenizer

from m6rec import M6RecConfig
from m6rec.tokenization import M6RecProcessor, M6RecTokenizer

AutoTokenizer.register(M6RecConfig, tokenizer_class=M6RecTokenizer, exist_ok=True)  # as the package's root does

TEXTS = [
    "a woman in her thirties clicked men's hooded jacket, waterproof hiking shoes, category boots",
    "the user is recommended this product because it is cold in December",
    "一位女性用户，三十岁出头，点击了防水登山鞋，类目靴子",
    "向用户推荐这部视频，因为天气冷",
]


@pytest.fixture(scope="session")
def tokenizer():
    return M6RecTokenizer.train(TEXTS * 4, vocab_size=420, num_options=5, leading_tokens=["<first>"])


@pytest.fixture
def processor(tokenizer):
    return M6RecProcessor(tokenizer)


@pytest.fixture
def request_of_the_paper():
    """The scoring example of the paper's task formats, as structured fields."""
    now = 1_670_000_000
    return {
        "user": {"gender": "male", "age": 22},
        "history": [
            {"event": "search", "query": "winter stuff", "timestamp": now - 23 * 60},
            {
                "event": "click",
                "item": {"category": "jacket", "name": "men's lightweight warm winter hooded jacket", "item_id": "j1"},
                "timestamp": now - 19 * 60,
            },
        ],
        "now": {"date": "2022-12-02", "place": "Beijing, China", "weather": "cold", "timestamp": now},
        "candidates": [
            {
                "category": "boots",
                "name": "waterproof hiking shoes mens outdoor",
                "stats": {"ctr": {"top_percent": 5, "days": 14}, "category_clicks": {"times": 4, "years": 2}},
            }
        ],
    }
