"""The writing tasks of the pipeline: the writer's texts in the form of answers, for the right items."""

import functools

import pytest
import torch
from transformers import pipeline

from m6rec import Catalogue
from m6rec.catalogue_m6rec import without_stats
from m6rec.ranking_m6rec import Guard
from m6rec.writing_m6rec import Vocabulary, Writer, check
from tests.modeling_m6rec.shop import ITEMS, REQUEST, SOURCE, build, processor

BLANK = {"user": "a man", "candidates": [{"category": "sport", "title": None}]}
CHAT = {"messages": [{"role": "user", "content": "I like hiking"}]}


@functools.cache
def recommender():
    model, own = build(num_joint_layers=2, initializer_range=0.4), processor()
    catalogue = Catalogue.from_dataset(ITEMS, model, own, progress=False)
    return pipeline("recommendation", model=model, processor=own, catalogue=catalogue, max_new_tokens=6)


@pytest.fixture
def recommend():
    return recommender()


def texts(recommend, requests, task, **options):
    written = Writer(recommend.model, recommend.processor).write(requests, task, **{"max_new_tokens": 6, **options})
    return [[text.text for text in own] for own in written]


def test_an_explanation_is_written_for_each_item_of_a_ranking(recommend):
    plain = recommend(REQUEST, task="click", explain=True)
    rows = recommend(REQUEST, task="explanation")
    without = {"text": 0, "finish": 0, "checked": 0}
    assert _rounded([{**row, **without} for row in plain]) == _rounded([{**row, **without} for row in rows])
    assert _rounded(rows) == _rounded(recommend(REQUEST, task="click", explain="text"))
    items = {row["item"]: item for item in REQUEST["candidates"] for row in rows if row["item"].startswith(_name(item))}
    expected = texts(recommend, [{**SOURCE, "candidates": [items[row["item"]]]} for row in rows], "explanation")
    assert [[row["text"]] for row in rows] == expected and len({row["text"] for row in rows}) > 1
    found = recommend(SOURCE, task="explanation", top_k=2)
    assert [row["item_id"] for row in found] == [row["item_id"] for row in recommend(SOURCE, task="retrieval", top_k=2)]
    assert all({"because", "text", "finish"} <= set(row) for row in found)
    mentioned = recommend({**REQUEST, "mention": {"features": ["price"]}}, task="explanation", top_k=1)[0]
    assert _rounded({**mentioned, **without}) == _rounded({**rows[0], **without})
    assert mentioned["text"] != rows[0]["text"]


def test_explanations_are_checked(recommend):
    words = Vocabulary.of_catalogue(recommend.catalogue.snapshot(), recommend.processor)
    request = {**SOURCE, "candidates": ITEMS}
    for row in recommend(request, task="explanation"):
        item = recommend.catalogue.item(row["item_id"])
        found = check(row["text"], request, item, row["because"], words, recommend.processor)
        assert row["checked"] == {"names": found.names, "agrees": found.agrees, "unsupported": found.unsupported}
    (row,) = recommend({"user": "a man", "candidates": ["a tent"]}, task="explanation")
    assert row["checked"] == {"names": [], "agrees": None, "unsupported": []}


def test_blocked_texts_are_empty_with_their_reason(recommend):
    guard = Guard(block_items=["i2"], block_texts=["^"], reasons={"^": "no letters"})
    for task, key in (("query", "text"), ("conversation", "content"), ("explanation", "text")):
        for row in recommend(CHAT if task == "conversation" else SOURCE, task=task, guard=guard, top_k=1):
            assert (row[key], row["finish"], row["reason"]) == ("", "blocked", "no letters")
            assert "checked" not in row and row.get("item_id") != "i2"


def _name(item):
    return item if isinstance(item, str) else item["title"]


def test_queries_fields_and_replies(recommend):
    (query,) = recommend(SOURCE, task="query")
    assert [[query["text"]]] == texts(recommend, [SOURCE], "query")
    assert set(query) == {"text", "logprob", "finish"} and query["logprob"] < 0
    several = recommend(SOURCE, task="query", top_k=3)
    assert [row["text"] for row in several] == texts(recommend, [SOURCE], "query", num_beams=3, num_texts=3)[0]
    drawn = recommend(SOURCE, task="query", top_k=3, temperature=1.5, seed=4)
    assert [row["text"] for row in drawn] == texts(recommend, [SOURCE], "query", temperature=1.5, num_texts=3, seed=4)[
        0
    ]
    (content,) = recommend(BLANK, task="content")
    assert content["fields"] == {"title": content["text"]} and [[content["text"]]] == texts(
        recommend, [BLANK], "content"
    )
    (reply,) = recommend(CHAT, task="conversation")
    assert reply["role"] == "assistant" and reply["items"] == [] and reply["finish"] in ("end", "length")
    assert [[reply["content"]]] == texts(recommend, [CHAT], "conversation")
    by_id = {"user": "a man", "history": [{"event": "clicked", "item": {"item_id": "i2"}}]}
    full = {"user": "a man", "history": [{"event": "clicked", "item": ITEMS[2]}]}
    assert recommend(by_id, task="query") == recommend(full, task="query") == recommend([full], task="query")[0]
    assert recommend("A woman in her thirties", task="query") == recommend(
        {"user": "A woman in her thirties"}, task="query"
    )


def test_requests_of_several_tasks_share_a_batch(recommend):
    requests = [
        {**SOURCE, "task": "query"},
        {**REQUEST, "explain": "text", "top_k": 2},
        {**CHAT, "task": "conversation"},
        {**SOURCE, "task": "next_item", "top_k": 2},
        {**SOURCE, "task": "query", "top_k": 2},
        SOURCE,
        {**REQUEST, "task": "explanation", "top_k": 1},
    ]
    together = recommend(requests, batch_size=7)
    assert _rounded(together) == _rounded([recommend(request) for request in requests])
    assert [len(answer) for answer in together] == [1, 2, 1, 2, 2, 6, 1]
    wrong = {**SOURCE, "task": "query", "text": "shoes"}
    answers = recommend([*requests, wrong], batch_size=8, on_error="return")
    assert _rounded(answers[:7]) == _rounded(together) and "leave out" in answers[7]["error"]


def _rounded(value):
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return (
        [_rounded(each) for each in value]
        if isinstance(value, list)
        else round(value, 4)
        if isinstance(value, float)
        else value
    )


def test_next_items_are_items_that_may_be_recommended(recommend):
    rows = recommend(SOURCE, task="next_item", top_k=8, exclude_seen=False)
    assert sorted(row["item_id"] for row in rows) == [f"i{number}" for number in range(8)]
    assert [row["rank"] for row in rows] == list(range(1, 9))
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
    order = [row["item_id"] for row in rows]
    assert rows[0]["item"] == recommend.processor.item_texts([recommend.catalogue.item(order[0])])[0]

    def found(**wishes):
        return [row["item_id"] for row in recommend(SOURCE, task="next_item", **{"top_k": 8, **wishes})]

    seen = {"i1", "i3"}
    assert found() == [item_id for item_id in order if item_id not in seen]
    assert found(filter={"category": "sport"}, exclude_seen=False) == [own for own in order if int(own[1]) % 2]
    assert found(block=order[0], exclude_seen=False) == order[1:]
    assert found(guard=Guard(block_items=[order[1]]), exclude_seen=False) == [order[0], *order[2:]]
    catalogue = recommend.catalogue
    catalogue.add([{"item_id": "new", "title": "a red tent"}], recommend.model, recommend.processor, progress=False)
    try:
        assert "new" in found()
    finally:
        catalogue.remove(["new"])
    assert "new" not in found()
    with pytest.raises(ValueError, match="no item left"):
        found(filter=lambda item: False)


def test_plausibility_and_pmi_read_an_items_own_words_with_and_without_a_user(recommend):
    own, model = recommend.processor, recommend.model
    lead = len(own.plausibility_lead())
    assert own.tokenizer.decode_text(own.plausibility_lead()) == "also clicks"

    def likelihood(request, item, without=None):
        batch = own([{**request, "candidates": [item]}], "plausibility", return_tensors="pt")
        ids, start = batch["input_ids"], batch["input_ids"][0].tolist().index(model.config.bos_token_id) + 2 + lead
        if without is not None:
            begin, end = own.read({**request, "candidates": [item]}, "plausibility").events[without]
            batch["hidden_events"] = torch.zeros_like(ids).bool()
            batch["hidden_events"][0, begin:end] = True
        with torch.no_grad():
            logp = model(**batch, plan="flat").logits[0].log_softmax(-1)
        places = torch.arange(start, ids.shape[1])
        return float(logp[places - 1, ids[0, places]].mean())

    items = {own.item_texts([item])[0]: item for item in map(without_stats, REQUEST["candidates"])}
    for row in recommend(REQUEST, task="plausibility"):
        assert row["score"] == pytest.approx(likelihood(SOURCE, items[row["item"]]), abs=1e-5)
    rows = recommend(REQUEST, task="plausibility", pmi=True, explain=True)
    for row in rows:
        item = items[row["item"]]
        assert row["score"] == pytest.approx(likelihood(SOURCE, item) - likelihood({}, item), abs=1e-5)
        expected = [likelihood(SOURCE, item) - likelihood(SOURCE, item, place) for place in range(4)]
        found = [reason["contribution"] for reason in row["because"]]
        assert found == pytest.approx(sorted(expected, reverse=True), abs=1e-5)
    mixed = recommend([{**REQUEST, "pmi": True}, REQUEST], task="plausibility", batch_size=2)
    assert _rounded(mixed) == _rounded([recommend(REQUEST, task="plausibility", pmi=own) for own in (True, False)])


@pytest.mark.parametrize(
    ("request_", "options", "error"),
    [
        (SOURCE, {"task": "query", "no_repeat_ngram_size": 2}, "unknown parameter 'no_repeat_ngram_size'"),
        (SOURCE, {"task": "write"}, "task='write' is unknown: choose one of click.*explanation"),
        (REQUEST, {"task": "click", "num_beams": 2}, "num_beams: task 'click' writes nothing"),
        (REQUEST, {"task": "query"}, "candidates: task 'query' takes at most one, got 4"),
        (REQUEST, {"task": "next_item"}, "candidates: task 'next_item' takes none, got 4"),
        (REQUEST, {"task": "explanation", "num_texts": 2, "num_beams": 2}, "num_texts=2: an item gets one"),
        (SOURCE, {"task": "content"}, "candidates: task 'content' writes one field"),
        (SOURCE, {"task": "next_item", "pin": "i1"}, "leave out pin"),
        (SOURCE, {"task": "query", "explain": True}, "explain: task 'query'"),
        (SOURCE, {"task": "query", "pmi": True}, "pmi: task 'query'"),
        (REQUEST, {"task": "click", "pmi": True}, "pmi: task 'click'"),
        (REQUEST, {"explain": "words"}, "explain='words': give True, False or 'text'"),
        (SOURCE, {"task": "query", "seed": 3}, "seed=3, but nothing is drawn"),
        (
            {"history": [{"event": "clicked", "item": {"item_id": "i9"}}]},
            {"task": "query"},
            r"history\[0\].item: item_id",
        ),
    ],
    ids=str,
)
def test_wrong_requests_name_the_place(recommend, request_, options, error):
    with pytest.raises((ValueError, TypeError), match=error):
        recommend(request_, **options)
