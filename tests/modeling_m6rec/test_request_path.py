"""On its way to an answer a request is encoded once, and the layout of a row is computed once."""

import pytest
import torch

from m6rec import Catalogue, RecommendationPipeline, layout_m6rec, modeling_m6rec, network_m6rec, ranking_m6rec
from m6rec.formatting_m6rec import RequestFormatter
from m6rec.layout_m6rec import layout
from m6rec.processing_m6rec import M6RecProcessor, Truncator
from tests.modeling_m6rec.shop import ITEMS, REQUEST, SOURCE, build, processor

MODEL = build(tfidf_weight=0.4, tfidf_dim=64, segment_summary=1, bow_embeddings=True)
PROCESSOR = processor()
MODEL.model.word_sketch.fit(PROCESSOR.encode_items(ITEMS))
CATALOGUE = Catalogue.from_dataset(ITEMS, MODEL, PROCESSOR)
EXPLAINED = {"explain": True, "exclude_seen": True}
FILTERED = {"filter": lambda fields: True, "top_k": 2}
ASKED = [("rating", {}), ("interaction", {}), ("plausibility", {})]
ASKED += [(task, options) for task in ("click", "retrieval") for options in (EXPLAINED, FILTERED)]


class Counter:
    """Counts calls of functions, and what was given to them."""

    def __init__(self, monkeypatch):
        self.monkeypatch, self.calls = monkeypatch, {}

    def watch(self, owner, name):
        function, found = getattr(owner, name), self.calls.setdefault(name, [])

        def counted(*args, **kwargs):
            found.append(args)
            return function(*args, **kwargs)

        self.monkeypatch.setattr(owner, name, counted)


@pytest.fixture
def counter(monkeypatch):
    return Counter(monkeypatch)


@pytest.mark.parametrize(("task", "options"), ASKED, ids=[f"{task}-{'-'.join(options)}" for task, options in ASKED])
def test_a_request_is_encoded_once_a_call(counter, task, options):
    recommend = RecommendationPipeline(model=MODEL, processor=PROCESSOR, catalogue=CATALOGUE, device="cpu")
    requests = [REQUEST, SOURCE, {**SOURCE, "candidates": []}, {**REQUEST, "history": REQUEST["history"][:2]}]
    for name in ("read_many", "encode_items"):
        counter.watch(M6RecProcessor, name)
    counter.watch(Truncator, "read")
    counter.watch(RequestFormatter, "event")
    answers = recommend(requests, task=task, batch_size=len(requests), **options)
    assert [len(rows) > 0 for rows in answers] == [True, True, False, True]
    assert sum(len(given) for _, given, *_ in counter.calls["read_many"]) == len(requests)
    ranked = [own["candidates"] for own in requests if "candidates" in own] if task == "retrieval" else []
    items = sum(len(given) for _, given in counter.calls["encode_items"])
    assert items == sum(map(len, ranked))
    assert len(counter.calls["read"]) == len(requests) + items
    assert len(counter.calls["event"]) == sum(len(request["history"]) for request in requests)


def test_the_text_of_an_item_is_its_wording(counter):
    expected = [PROCESSOR.read({"history": [{"item": item}]}, "retrieval").segments[-1][1] for item in ITEMS]
    counter.watch(Truncator, "read")
    assert PROCESSOR.item_texts(ITEMS) == expected
    assert not counter.calls["read"]
    short = processor(max_length=30)
    assert short.item_texts([{"title": "hiking " * 40}]) == ["hiking " * 39 + "hiking"]


def test_errors_name_the_place_whatever_is_asked_first():
    recommend = RecommendationPipeline(model=MODEL, processor=PROCESSOR, catalogue=CATALOGUE, device="cpu")
    for options in ({"task": "click"}, {"task": "click", "exclude_seen": True}, {"task": "retrieval"}):
        for candidates in ({}, {"candidates": ["tent"]}):
            with pytest.raises(ValueError, match=r"history\[1\]\.item"):
                recommend({"history": ["mat", {"item": {"title": ""}}], **candidates}, **options)
            with pytest.raises(TypeError, match=r"history\[0\]"):
                recommend({"history": [7], **candidates}, **options)


def test_the_layout_of_rows_is_computed_once(counter):
    batch = PROCESSOR([REQUEST, {**REQUEST, "history": []}], "click", return_tensors="pt")
    for module in (layout_m6rec, modeling_m6rec, network_m6rec, ranking_m6rec):
        if getattr(module, "layout", None) is layout:
            counter.watch(module, "layout")
    with torch.no_grad():
        MODEL.embed(**batch)
    assert len(counter.calls["layout"]) == 1


@pytest.mark.parametrize("task", ["click", "retrieval"])
def test_an_explained_answer_computes_one_layout_for_each_batch_of_rows(counter, task):
    recommend = RecommendationPipeline(model=MODEL, processor=PROCESSOR, catalogue=CATALOGUE, device="cpu")
    for module in (layout_m6rec, modeling_m6rec, network_m6rec, ranking_m6rec):
        if getattr(module, "layout", None) is layout:
            counter.watch(module, "layout")
    counter.watch(network_m6rec.M6RecModel, "forward")
    recommend(REQUEST, task=task, explain=True)
    # The first of the two batches of task "retrieval" is read by the segments of the history.
    assert len(counter.calls["layout"]) == len(counter.calls["forward"]) == (1 if task == "retrieval" else 2)


@pytest.mark.parametrize("time", ["gap", "ago"])
def test_the_processor_says_where_events_stand_as_the_layout_does(time):
    for more in ({}, {"max_events": 2}, {"max_length": 130}, {"max_length": 60}):
        own = processor(time=time, options=2, **more)
        for task in ("click", "retrieval"):
            row = own.read({**REQUEST, "now": {"timestamp": 1_300_000}, "facts": ["likes blue"]}, task)
            event = layout(torch.tensor([row.input_ids]), None, MODEL.config).event[0]
            expected = torch.zeros_like(event)
            for number, (first, end) in enumerate(row.events, 1):
                expected[first:end] = number
            assert torch.equal(event, expected)
