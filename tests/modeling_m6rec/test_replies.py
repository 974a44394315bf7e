"""Replies that recommend: an item of the catalogue, at the place in the text that the answer names, and no other."""

import functools

import pytest
import torch

from m6rec import Catalogue, M6RecConfig, M6RecForRecommendation, M6RecProcessor, RecommendationPipeline
from m6rec.ranking_m6rec import Guard
from m6rec.tokenization import M6RecTokenizer
from m6rec.writing_m6rec import Chosen, Writer, WritingOptions, phrases
from tests.modeling_m6rec.shop import ITEMS, TITLES

ASK = {"role": "user", "content": "something warm for the mountains?"}
CHAT = {"user": "a man", "messages": [{"role": "system", "content": "Be brief."}, ASK]}
NAMES = {item["item_id"]: item for item in ITEMS}


@functools.cache
def recommender(slot=True, language="en", **more):
    torch.manual_seed(0)
    texts = [*TITLES, "SYSTEM: I recommend hiking boots, they are warm and dry"]
    tokenizer = M6RecTokenizer.train(texts * 3, vocab_size=420, slot=slot)
    fields = {"initializer_range": 0.4, "tie_word_embeddings": False, "num_joint_layers": 2, "num_hidden_layers": 3}
    config = M6RecConfig.preset("tiny", **tokenizer.structural_ids, **fields, **more)
    model, processor = M6RecForRecommendation(config).eval(), M6RecProcessor.from_template(tokenizer, "video", language)
    catalogue = Catalogue.from_dataset(ITEMS, model, processor, progress=False)
    return RecommendationPipeline(
        model=model, processor=processor, tokenizer=tokenizer, catalogue=catalogue, device="cpu"
    )


def ask(recommend, request=CHAT, **options):
    (reply,) = recommend(request, task="conversation", **{"max_new_tokens": 16, **options})
    return reply


def name_of(recommend, item_id):
    return recommend.processor.names.item_texts([recommend.catalogue.snapshot().item(item_id)])[0]


def slotted_options():
    """Options under which a reply begins with the item, has it within, or is written by draws."""
    return [
        {"slot_threshold": 0.0},
        {"slot_threshold": 0.002},
        {"temperature": 1.0, "seed": 4, "slot_threshold": 0.001},
    ]


@pytest.mark.parametrize("options", slotted_options(), ids=str)
def test_the_item_of_a_reply_is_the_best_of_the_catalogue_and_stands_at_its_place(options):
    recommend = recommender()
    reply = ask(recommend, **options)
    assert reply.keys() == {"role", "content", "items", "finish"} and reply["role"] == "assistant"
    (item,) = reply["items"]
    assert reply["content"][item["start"] : item["end"]] == name_of(recommend, item["item_id"])
    (best,) = recommend(CHAT, task="retrieval", top_k=1)
    assert (item["item_id"], item["score"]) == (best["item_id"], pytest.approx(best["score"], abs=1e-6))
    assert "[SLOT]" not in reply["content"]
    if options == {"slot_threshold": 0.0}:
        assert item["start"] == 0


def test_a_reply_is_what_the_model_writes_around_the_slot():
    """The slow way: continue until [SLOT], choose, and continue behind it with the item in front, one by one."""
    recommend = recommender()
    model, processor, threshold = recommend.model, recommend.processor, 0.002
    slot, end = processor.tokenizer.slot_token_id, model.config.eos_token_id

    def following(row, step):
        with torch.no_grad():
            logits = model(torch.tensor([row]), plan="flat").logits[0, -1]
        special = set(processor.tokenizer.all_special_ids) - {end, slot}  # nothing structural is ever written
        logits[[*special]] = -torch.inf
        if step == "slot" and logits.softmax(-1)[slot] >= threshold:
            return slot
        logits[slot] = -torch.inf
        return int(logits.argmax())

    row, before = processor.read(CHAT, "conversation").input_ids, []
    while not before or before[-1] != slot:
        before.append(following([*row, *before], "slot"))
        assert len(before) < 16
    item = ask(recommend, slot_threshold=threshold)["items"][0]["item_id"]
    row = processor.read({**CHAT, "candidates": [NAMES[item]]}, "conversation").input_ids
    after = []
    while len(before) + len(after) < 16 and end not in after:
        after.append(following([*row, *before, *after], "rest"))
    text = processor.tokenizer.decode_text(before[:-1]).strip()
    expected = f"{text}{' ' if text else ''}{name_of(recommend, item)}"
    rest = processor.tokenizer.decode_text([each for each in after if each != end]).rstrip()
    assert ask(recommend, slot_threshold=threshold)["content"] == expected + rest


def test_items_named_blocked_or_filtered_are_not_recommended():
    recommend = recommender()
    left, seen = set(NAMES), []
    while left:
        item = ask(recommend, slot_threshold=0.0, max_new_tokens=6, filter=lambda fields: fields["item_id"] in left)[
            "items"
        ][0]["item_id"]
        said = {
            **CHAT,
            "messages": [*CHAT["messages"][:-1], {**ASK, "content": f"not {NAMES[item]['title'].upper()}!"}],
        }
        named = {**said, "messages": [{**ASK, "content": f"not {NAMES[item]['title']}, please"}]}
        for request, options in ((named, {}), (CHAT, {"block": [item]}), (CHAT, {"guard": Guard(block_items=[item])})):
            reply = ask(
                recommend,
                request,
                slot_threshold=0.0,
                max_new_tokens=6,
                filter=lambda fields: fields["item_id"] in left,
                **options,
            )
            assert [own["item_id"] for own in reply["items"]] != [item]
            assert bool(reply["items"]) == (len(left) > 1), "without an allowed item the reply has none"
        left.remove(item)
        seen.append(item)
    assert len(seen) == len(ITEMS) > 3


def test_candidates_are_what_a_reply_may_recommend():
    recommend = recommender()
    for item in ITEMS:
        reply = ask(recommend, {**CHAT, "candidates": [{"item_id": item["item_id"]}]}, slot_threshold=0.0)
        assert [own["item_id"] for own in reply["items"]] == [item["item_id"]]


def test_the_older_form_of_a_conversation_recommends_too():
    recommend = recommender()
    request = {"user": "a man", "messages": [ASK]}
    older = {"user": "a man", "text": [ASK["content"]]}
    assert ask(recommend, request, slot_threshold=0.0) == ask(recommend, older, slot_threshold=0.0)


def test_without_a_decision_to_recommend_nothing_is_recommended():
    recommend = recommender()
    reply = ask(recommend, slot_threshold=2.0)
    assert reply["items"] == [] and reply["content"]
    assert (
        reply["content"]
        == Writer(recommend.model, recommend.processor).write([CHAT], "conversation", max_new_tokens=16)[0][0].text
    )


def test_vocabularies_without_a_slot_and_other_tasks_write_freely():
    plain = recommender(slot=False)
    assert ask(plain)["items"] == []
    recommend = recommender()
    writer, slot = Writer(recommend.model, recommend.processor), recommend.processor.tokenizer.slot_token_id
    with torch.no_grad():
        recommend.model.lm_head.weight[slot] *= 100  # [SLOT] would be written at every step
    for options in ({}, {"num_beams": 2}, {"temperature": 2.0, "seed": 1}):
        (text,) = writer.write([{"user": "a man"}], "query", max_new_tokens=4, **options)[0]
        ids = recommend.processor.tokenizer(text.text)["input_ids"]
        assert slot not in ids and text.text
    with torch.no_grad():
        recommend.model.lm_head.weight[slot] /= 100


def test_no_reply_depends_on_the_batch():
    recommend = recommender()
    requests = [
        CHAT,
        {"messages": [{**ASK, "content": "hello"}]},
        {**CHAT, "user": "a woman", "history": [{"item": ITEMS[0]}]},
    ]
    for options in slotted_options():
        found = recommend(requests, task="conversation", max_new_tokens=8, batch_size=3, **options)
        alone = [recommend(request, task="conversation", max_new_tokens=8, **options) for request in requests]
        for (one,), (other,) in zip(found, alone, strict=True):
            scores = [[item.pop("score") for item in reply["items"]] for reply in (one, other)]
            assert scores[0] == pytest.approx(scores[1], abs=1e-5) and one == other


def test_a_blocked_reply_is_written_anew_or_empty():
    recommend = recommender()
    reply = ask(recommend, slot_threshold=0.0)
    title = reply["content"][: reply["items"][0]["end"]]
    blocked = ask(recommend, slot_threshold=0.0, guard=Guard(block_texts=[title]))
    assert (blocked["content"], blocked["items"], blocked["finish"]) == ("", [], "blocked") and blocked["reason"]


def test_several_texts_are_refused():
    recommend = recommender()
    for options in ({"top_k": 2}, {"num_beams": 2}, {"num_texts": 2, "temperature": 1.0}):
        with pytest.raises(ValueError, match="written once and without beams"):
            ask(recommend, **options)
    for value in (True, "high"):
        with pytest.raises(ValueError, match="slot_threshold="):
            WritingOptions(slot_threshold=value)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("I know", ", it is good", "I know ITEM, it is good"),
        ("", " is good", "ITEM is good"),
        ('Try "', '"!', 'Try "ITEM"!'),
        ("Try (", ")", "Try (ITEM)"),
        ('He said "yes"', "", 'He said "yes" ITEM'),
    ],
)
def test_spaces_around_a_slot(before, after, expected):
    recommend = recommender()
    encode = recommend.processor.tokenizer.encode_text
    writer = Writer(recommend.model, recommend.processor)
    reply = writer._reply(encode(before), Chosen({"title": "ITEM"}, "i", 0.5), encode(after), True, -1.0)
    (mention,) = reply.items
    assert reply.text == expected and reply.text[mention.start : mention.end] == "ITEM"


def test_phrases_that_may_be_names():
    found = phrases(["I liked (Heat), the lord of the rings and It (2017)! 我看过《英雄》了"])
    assert {"Heat", "The Lord of the Rings", "It", "英雄"} <= found
    assert "the" not in found and "The" not in found
