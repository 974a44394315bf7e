"""What the writer writes: the model's own texts, whatever the batch, and items by their likelihood."""

import copy
import functools

import pytest
import torch

from m6rec import Catalogue, writing_m6rec
from m6rec.writing_m6rec import Writer, WritingOptions, _Draws
from tests.fast import some
from tests.modeling_m6rec.shop import ITEMS, SOURCE, TITLES, build, processor

REQUESTS = [
    {"user": "A woman in her thirties"},
    SOURCE,
    {"user": "a man", "history": [{"event": "clicked", "item": item} for item in ITEMS[:3]]},
    {**SOURCE, "history": SOURCE["history"][:1]},
    {"user": "a man", "history": ["yoga mat"] * 9},
]


@functools.cache
def writer(**more):
    return Writer(build(num_joint_layers=2, initializer_range=0.4), processor(**more))


def plain(rows):
    return [[(text.text, text.finish, round(text.logprob, 4)) for text in own] for own in rows]


def test_greedy_texts_are_those_of_generate_one_by_one():
    own = writer()
    found = own.write(REQUESTS, "query", max_new_tokens=12)
    for request, (text,) in zip(REQUESTS, found):
        batch = own.processor([request], "query", return_tensors="pt", padding_side="left")
        ids = own.model.generate(**batch, max_new_tokens=12, do_sample=False)[0, batch["input_ids"].shape[1] :].tolist()
        ended = own.config.eos_token_id in ids
        ids = ids[: ids.index(own.config.eos_token_id)] if ended else ids
        assert text.text == own.processor.tokenizer.decode_text(ids).strip()
        assert text.finish == ("end" if ended else "length") and text.items == [] and text.checked is None
        row = torch.tensor([[*batch["input_ids"][0].tolist(), *ids, *[own.config.eos_token_id] * ended]])
        memory = torch.zeros_like(row)
        memory[:, : batch["input_ids"].shape[1]] = batch["item_embedding_ids"]
        with torch.no_grad():
            logp = own.model(row, item_embedding_ids=memory, plan="flat").logits[0].log_softmax(-1)
        places = torch.arange(batch["input_ids"].shape[1], row.shape[1])
        assert abs(float(logp[places - 1, row[0, places]].mean()) - text.logprob) < 1e-4
    assert len({text.text for (text,) in found}) > 2 and {text.finish for (text,) in found} <= {"end", "length"}


def test_a_special_token_of_the_backbone_ends_a_text():
    """A conversion that is not tuned ends its texts as the backbone did."""
    own = build(num_joint_layers=2, initializer_range=0.4), processor()
    tokenizer = own[1].tokenizer
    first = Writer(*own).write(REQUESTS[:1], "query", max_new_tokens=8)[0][0]
    batch = own[1](REQUESTS[:1], "query", return_tensors="pt", padding_side="left")
    start = batch["input_ids"].shape[1]
    ids = own[0].generate(**batch, max_new_tokens=8, do_sample=False)[0, start:].tolist()
    changed = copy.copy(own[1])
    changed.tokenizer = _Special(tokenizer, ids[3])
    found = Writer(own[0], changed).write(REQUESTS[:1], "query", max_new_tokens=8)[0][0]
    place = ids.index(ids[3])
    assert found.text == tokenizer.decode_text(ids[:place]).strip() and found.finish == "end" != first.finish


class _Special:
    """A tokenizer with one more special token."""

    def __init__(self, tokenizer, token):
        self._own, self.all_special_ids = tokenizer, [*tokenizer.all_special_ids, token]

    def __getattr__(self, name):
        return getattr(self._own, name)


@pytest.mark.parametrize(
    "how",
    some(
        [
            {},
            {"num_beams": 3, "num_texts": 2},
            {"temperature": 1.5, "seed": 3, "num_texts": 2},
            {"top_p": 0.7, "seed": 3},
        ],
        [{"num_beams": 3, "num_texts": 2}, {"top_p": 0.7, "seed": 3}],
    ),
    ids=str,
)
def test_no_text_depends_on_the_batch(how, monkeypatch):
    own = writer()
    together = plain(own.write(REQUESTS, "query", max_new_tokens=8, **how))
    assert together[::-1] == plain(own.write(REQUESTS[::-1], "query", max_new_tokens=8, **how))
    assert together == [plain(own.write([request], "query", max_new_tokens=8, **how))[0] for request in REQUESTS]
    monkeypatch.setattr(writing_m6rec, "KEPT_LOGITS", 1)
    assert together == plain(own.write(REQUESTS, "query", max_new_tokens=8, **how))


def test_draws_differ_by_seed_text_and_request():
    own, how = writer(), {"max_new_tokens": 8, "temperature": 2.0}
    first = own.write(REQUESTS, "query", num_texts=3, seed=1, **how)
    assert all(len({text.text for text in texts}) == 3 for texts in first)
    assert plain(first) != plain(own.write(REQUESTS, "query", num_texts=3, seed=2, **how))
    one = own.write(REQUESTS, "query", seed=1, **how)
    assert [texts[:1] for texts in plain(first)] == plain(one)
    torch.manual_seed(5)
    unseeded = plain(own.write(REQUESTS, "query", **how))
    assert unseeded != plain(own.write(REQUESTS, "query", **how))
    torch.manual_seed(5)
    assert unseeded == plain(own.write(REQUESTS, "query", **how))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.6)])
def test_draws_have_the_probabilities_of_the_logits(temperature, top_p):
    logits = torch.tensor([0.0, 1.0, -torch.inf, 2.0, 0.5])
    share = (logits / temperature).softmax(0)
    order = share.argsort(descending=True)
    before = share[order].cumsum(0) - share[order]
    share[order[before >= top_p]] = 0
    draws = _Draws(range(2000), temperature, top_p)(torch.zeros(2000, 1), logits.expand(2000, 5))
    counts = (draws == 0).sum(0)
    assert (counts[share == 0] == 0).all() and counts.sum() == 2000
    assert (counts / 2000 - share / share.sum()).abs().max() < 0.03


def test_beams_give_different_texts_the_likeliest_first():
    found = writer().write(REQUESTS, "query", max_new_tokens=6, num_beams=4, num_texts=4)
    for texts in found:
        assert 1 < len({text.text for text in texts}) == len(texts) <= 4
        assert [text.logprob for text in texts] == sorted((text.logprob for text in texts), reverse=True)


def test_a_prompt_leaves_room_for_the_text():
    own = writer(max_length=60)
    widths = []
    generate = own.model.generate
    own.model.generate = lambda **given: (
        widths.append((given["input_ids"].shape[1], given["max_new_tokens"])) or generate(**given)
    )
    try:
        own.write(REQUESTS[-1:], "query", max_new_tokens=20)
        own.write(REQUESTS[-1:], "query", max_new_tokens=50)
    finally:
        del own.model.generate
    assert widths[0][0] <= 40 and widths[0][1] == 20 and widths[1][0] <= 30 and widths[1][1] == 30
    with pytest.raises(ValueError, match="request 1: its text is complete"):
        own.write([REQUESTS[0], {**REQUESTS[0], "text": "shoes"}], "query", max_new_tokens=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"num_beams": True}, "num_beams=True"),
        ({"num_texts": 2}, "num_beams=2 or more"),
        ({"num_texts": 3, "num_beams": 2}, "num_beams=3 or more"),
        ({"temperature": 0}, "temperature=0"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"seed": 1}, "nothing is drawn"),
        ({"seed": 1.5, "top_p": 1}, "seed=1.5"),
        ({"num_beams": 2, "temperature": 1.0}, "not drawn"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        WritingOptions(**options)


def test_items_are_ranked_by_the_likelihood_of_their_texts():
    own = writer()
    catalogue = Catalogue.from_dataset(
        [*ITEMS, {"item_id": "long", "title": f"{TITLES[2]}, extra wide"}, {**ITEMS[2], "item_id": "twin"}],
        processor=own.processor,
    )
    trie = catalogue.trie(own.processor)
    found = own.items(REQUESTS[:3], "next_item", trie, num_beams=10, top_k=10)
    for request, items in zip(REQUESTS, found):
        expected = {}
        for item_id in catalogue:
            text = own.processor.item_texts([catalogue.item(item_id)])[0]
            batch = own.processor([{**request, "text": text}], "next_item", return_tensors="pt")
            start = own.processor([request], "next_item", return_tensors="pt")["input_ids"].shape[1]
            ids = batch["input_ids"]
            with torch.no_grad():
                logp = own.model(**batch, plan="flat").logits[0].log_softmax(-1)
            places = torch.arange(start, ids.shape[1])
            expected[item_id] = float(logp[places - 1, ids[0, places]].mean())
        assert [item.item_id for item in items] == sorted(expected, key=lambda item_id: -round(expected[item_id], 4))
        assert all(abs(item.score - expected[item.item_id]) < 1e-4 for item in items)
    alone = [own.items([request], "next_item", trie, num_beams=10, top_k=10)[0] for request in REQUESTS[:3]]
    assert [[item.item_id for item in items] for items in alone] == [
        [item.item_id for item in items] for items in found
    ]


def test_items_of_each_request_obey_its_own_filter():
    own = writer()
    catalogue = Catalogue.from_dataset(ITEMS, processor=own.processor)
    tries = [catalogue.trie(own.processor, exclude=[f"i{number}"]) for number in range(5)]
    tries[2] = catalogue.trie(own.processor, filter=lambda item: item["item_id"] == "i4")
    own.model.generation_config.no_repeat_ngram_size = 1  # of a checkpoint: it would forbid most titles
    try:
        found = own.items(REQUESTS, "next_item", tries, num_beams=3, top_k=3)
    finally:
        own.model.generation_config.no_repeat_ngram_size = 0
    for number, items in enumerate(found):
        assert f"i{number}" not in {item.item_id for item in items}
        assert 1 <= len({item.item_id for item in items}) == len(items) <= 3
    assert [item.item_id for item in found[2]] == ["i4"]
    none = catalogue.trie(own.processor, exclude=[f"i{number}" for number in range(8)])
    with pytest.raises(ValueError, match="no item left"):
        own.items(REQUESTS[:1], "next_item", none)
