"""A small shop, shared by the tests of catalogue, pipeline and Hub: tiny random models, items, requests."""

import functools

import torch

from m6rec import M6RecConfig, M6RecForRecommendation, M6RecProcessor, M6RecTokenizer

TITLES = [
    "waterproof hiking shoes",
    "men's hooded jacket",
    "yoga mat",
    "trekking poles",
    "防水登山鞋",
    "steel water bottle",
    "wool hiking socks",
    "head lamp",
]
ITEMS = [
    {"item_id": f"i{number}", "title": title, "category": ("outdoor", "sport")[number % 2], "price": 10.5 * number}
    for number, title in enumerate(TITLES)
]
ROWS = {"i0": 2, "i3": 1, "i5": 3}
REQUEST = {
    "user": "A woman in her thirties",
    "history": [
        {"event": "clicked", "item": ITEMS[1], "timestamp": 1_000_000},
        {"event": "bought", "item": "merino hiking socks", "timestamp": 1_003_000},
        {"event": "searched", "query": "winter hiking", "timestamp": 1_100_000},
        {"event": "clicked", "item": ITEMS[3], "timestamp": 1_200_000},
    ],
    "now": {"date": "2024-12-03", "weather": "cold"},
    "candidates": [ITEMS[0], "yoga mat", {**ITEMS[4], "stats": "bought often"}, "a red tent"],
}
SOURCE = {name: value for name, value in REQUEST.items() if name != "candidates"}


@functools.cache
def tokenizer():
    return M6RecTokenizer.train([*TITLES, "A woman in her thirties clicked bought searched"] * 3, vocab_size=420)


def processor(**more):
    return M6RecProcessor.from_template(tokenizer(), **{"item_rows": ROWS, **more})


def build(seed=0, **more):
    """A tiny random model whose outputs vary: untied head, wide initial weights, some item memory."""
    torch.manual_seed(seed)
    fields = {"initializer_range": 0.25, "tie_word_embeddings": False, "num_item_embeddings": 3, **more}
    model = M6RecForRecommendation(M6RecConfig.preset("tiny", **tokenizer().structural_ids, **fields)).eval()
    if model.model.item_memory is not None:
        torch.nn.init.normal_(model.model.item_memory.weight[1:])
    return model


def change(model):
    """Train the model a little."""
    with torch.no_grad():
        model.item_projection.weight += 0.01 * torch.randn_like(model.item_projection.weight)
