"""What a request does not decide is computed once, and a change of it is noticed at the next request."""

import copy
import itertools
import pickle

import peft
import pytest
import torch

from m6rec import (
    Catalogue,
    RecommendationPipeline,
    SegmentCache,
    formatting_m6rec,
    item_features_m6rec,
    layout_m6rec,
    network_m6rec,
    segment_cache_m6rec,
)
from m6rec.layout_m6rec import gather_tokens, latest, pick
from m6rec.segment_cache_m6rec import UserStates
from m6rec.values_m6rec import KnownItem
from tests.fast import some
from tests.modeling_m6rec.shop import ITEMS, REQUEST, build, processor

REQUESTS = [
    {"user": "a man", "history": [{"event": "clicked", "item": {"item_id": own}} for own in ids]}
    for ids in (["i1", "i3"], ["i3", "i3", "i0"], ["i5"])
]


def make(model, **more):
    own = processor()
    return RecommendationPipeline(
        model=model, processor=own, device="cpu", catalogue=Catalogue.from_dataset(ITEMS, model, own), **more
    )


def spelled(request, catalogue):
    """The slow twin of a request: it gives its items with all their fields."""
    history = [{**event, "item": catalogue.item(event["item"]["item_id"])} for event in request["history"]]
    return {**request, "history": history}


@pytest.mark.parametrize("options", [{}, {"explain": True}, {"exclude_seen": False}, {"task": "click", "top_k": 3}])
def test_items_by_id_are_answered_like_items_with_all_their_fields(options):
    recommend = make(build())
    [recommend(request, **options) for request in REQUESTS]  # states of texts are now kept: their rounding is fixed
    expected = [recommend(spelled(request, recommend.catalogue), **options) for request in REQUESTS]
    assert [recommend(request, **options) for request in REQUESTS] == expected
    recommend.processor = processor()  # which knows no text
    assert [recommend(request, **options) for request in REQUESTS] == expected


def test_an_item_is_formatted_once(monkeypatch):
    recommend, formatted = make(build()), []
    for request in REQUESTS:
        recommend(request)

    def count(self, item, place):
        formatted.append(item)
        raise AssertionError("this item is known")

    monkeypatch.setattr(formatting_m6rec.RequestFormatter, "_kept_item", count)
    rows = [recommend(request) for request in REQUESTS]
    assert not formatted and all(rows)


def test_weights_are_looked_at_as_often_for_a_long_history_as_for_a_short_one(monkeypatch):
    recommend, looks = make(build()), []
    slow = segment_cache_m6rec._identity
    monkeypatch.setattr(segment_cache_m6rec, "_identity", lambda *given: looks.append(1) or slow(*given))
    counts = []
    for length in (1, 1, 20):
        looks.clear()
        recommend({"history": [{"event": "clicked", "item": {"item_id": "i1"}}] * length})
        counts.append(len(looks))
    assert counts[1:] == [1, 1]  # the first request encodes texts


def step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.item_projection.weight.grad = torch.ones_like(model.item_projection.weight)
    optimizer.step()


def in_place(model):
    with torch.no_grad():
        model.item_projection.weight.mul_(1.5)


def replaced(model):
    model.item_projection.weight = torch.nn.Parameter(model.item_projection.weight.detach() + 0.5)


CHANGES = {
    "in place": in_place,
    "a step of an optimizer": step,
    "other weights": lambda model: model.load_state_dict(build(seed=1).state_dict()),
    "other tensors": lambda model: model.load_state_dict(build(seed=1).state_dict(), assign=True),
    "a new parameter": replaced,
    "another number type": lambda model: model.to(torch.bfloat16),
    "a setting": lambda model: setattr(model.config, "segment_pooling", "mean"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_the_model_is_noticed_at_the_next_request(name):
    model = build()
    recommend = make(model)
    before = recommend(REQUESTS[0])
    CHANGES[name](model)
    with pytest.raises(ValueError, match="fingerprint"):
        recommend(REQUESTS[0])
    recommend.catalogue.encode(model, recommend.processor)
    assert recommend(REQUESTS[0]) == make(model)(REQUESTS[0]) != before


def test_a_switched_adapter_is_noticed():
    settings = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(build()), settings)
    model.add_adapter("other", settings)
    recommend = make(model)
    before = recommend(REQUESTS[0])
    model.set_adapter("other")
    with pytest.raises(ValueError, match="fingerprint"):
        recommend(REQUESTS[0])
    model.set_adapter("default")
    assert recommend(REQUESTS[0]) == before
    with model.disable_adapter(), pytest.raises(ValueError, match="fingerprint"):
        recommend(REQUESTS[0])


def test_a_replaced_item_has_its_new_text_at_the_next_request():
    recommend = make(build())
    asked = {"history": [{"event": "clicked", "item": {"item_id": "i1"}}]}
    recommend(asked, explain=True)
    recommend.catalogue.add(
        [{"item_id": "i1", "title": "red tent"}], recommend.model, recommend.processor, replace=True
    )
    (event,) = recommend(asked, explain=True)[0]["because"]
    assert "red tent" in event["event"] and event["item_id"] == "i1"
    assert [row["item"] for row in recommend(asked, exclude_seen=False) if row["item_id"] == "i1"] == ["red tent"]


def test_callers_cannot_change_a_known_item():
    recommend = make(build())
    expected = recommend(REQUESTS[0])
    recommend.catalogue.item("i1")["title"] = "changed"
    recommend.catalogue.fields("i1")["title"] = "changed"
    given = {"history": REQUESTS[0]["history"], "candidates": [{"item_id": "i0"}]}
    recommend(given, filter=lambda fields: fields.update(title="changed") or True)
    assert recommend(REQUESTS[0]) == expected and recommend.catalogue.item("i0") == ITEMS[0]


def test_a_known_item_is_copied_as_a_plain_mapping():
    known = KnownItem({"title": "x"})
    known.segment = object(), object()
    for twin in (copy.copy(known), copy.deepcopy(known), pickle.loads(pickle.dumps(known))):
        assert type(twin) is dict and twin == known


# ------------------------------------------------------------------ fewer operations for a request that comes by itself


def slow_latest(where):
    """The twin that an exported graph uses."""
    index, rank = torch.arange(where.shape[1]).expand_as(where), where.cumsum(1)
    places = torch.full((where.shape[0], where.shape[1] + 2), -1)
    return places.scatter(1, torch.where(where, rank, where.shape[1] + 1), index).gather(1, rank)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_operations_on_one_row_are_those_on_several(rows, share):
    generator = torch.Generator().manual_seed(0)
    where = torch.rand(rows, 9, generator=generator) < share
    assert torch.equal(latest(where), slow_latest(where))
    slot = torch.where(where, 0, -1)
    twin = torch.cat((slot, torch.full_like(slot[:1], -1)))  # a further row: the way of several rows
    picked, whole = pick(slot, 1), pick(twin, 1)
    assert torch.equal(picked.columns, whole.columns[:rows]) and torch.equal(picked.present, whole.present[:rows])
    for values in (torch.rand(rows, 9, 4), torch.arange(9).repeat(rows, 1)):
        further = torch.cat((values, values[:1]))
        found = gather_tokens(further, torch.cat((picked.columns, picked.columns[:1])))
        assert torch.equal(gather_tokens(values, picked.columns), found[:rows])


@pytest.mark.parametrize("more", [{}, {"tfidf_weight": 0.3}])
def test_vectors_of_users_need_no_vectors_of_items(more):
    model, own = build(**more), processor()
    if more:
        model.model.word_sketch.fit(own.encode_items(ITEMS))
    batch = own(
        [{"user": "a man", "history": [{"item": item} for item in ITEMS[:3]]}, "a woman"],
        "retrieval",
        return_tensors="pt",
    )
    with torch.no_grad():
        whole, users = model(**batch), model(**batch, return_vectors="users")
    assert torch.equal(whole.user_vectors.nan_to_num(9), users.user_vectors.nan_to_num(9))
    assert whole.item_vectors is not None and (users.item_vectors is None) == (not more)


# ------------------------------------------------------------------------------------- users, from segments


WHO = [
    {"user": "a man", "facts": ["likes blue", "lives in Oslo"], "history": [{"item": item} for item in ITEMS[:3]]},
    "a woman",
    {"history": [*REQUEST["history"], {"event": "left"}], "now": REQUEST["now"]},
    {"user": "a man", "history": ["yoga mat"] * 7, "now": "spring"},
    {"facts": ["likes blue"]},
    {"history": [{"event": "left"}]},
]
KINDS_OF_MODELS = {
    "whole segments": {"segment_summary": None},
    "one token": {"segment_summary": 1, "bow_embeddings": True},
    "two tokens, no verbs": {"segment_summary": 2, "skipped_kinds": ["event"], "num_joint_layers": 2},
    "positions in segments": {"joint_positions": "segment", "entry_norm": True, "segment_pooling": "mean"},
    "no item embeddings": {
        **{"num_item_embeddings": 0, "position_embedding_type": "learned"},
        **{"joint_positions": "segment", "skipped_kinds": ["age"]},
    },
    "words of the last items": {"tfidf_weight": 0.5, "segment_summary": 1},
    "words, new items, no verbs": {"tfidf_weight": 0.5, "cold_item_bias": 0.3, "skipped_kinds": ["event"]},
}


def build_read(**more):
    """Build a model that knows how rare words are."""
    model = build(**more)
    if more.get("tfidf_weight"):
        model.model.word_sketch.fit(processor().encode_items(ITEMS))
    return model


def sources_of(model, readings):
    """Return the segments of readings with the beginning and the end of a source."""
    first, last = ((index,) for index in (model.config.source_token_id, model.config.source_end_token_id))
    return [[(first, 0), *each.pieces, (last, 0)] for each in readings]


def slow_users(model, own, readings):
    """The twin: the last of each row's user vectors, of rows of ids."""
    features = [{"input_ids": each.input_ids, "item_embedding_ids": each.item_embedding_ids} for each in readings]
    with torch.no_grad():
        vectors = model(**own.pad(features), plan="cached", segment_cache=SegmentCache()).user_vectors
    return torch.stack([each[each.isfinite().all(-1)][-1] for each in vectors])


@pytest.mark.parametrize(
    ("time", "name"),
    some(
        itertools.product(["gap", "ago"], KINDS_OF_MODELS),
        zip(itertools.cycle(["gap", "ago"]), KINDS_OF_MODELS),
    ),
)
def test_users_read_by_segments_are_those_read_by_ids(name, time):
    model, own, cache = build_read(**KINDS_OF_MODELS[name]), processor(time=time, max_length=90), SegmentCache()
    assert model.reads_sources
    for requests in (WHO, WHO[:1], WHO[::-1], WHO[2:3] * 3):
        readings = own.read_many(requests, "retrieval")
        sources = sources_of(model, readings)
        assert [[index for ids, _ in own for index in ids] for own in sources] == [each.input_ids for each in readings]
        with torch.no_grad():
            found = [model.embed_users(sources, cache) for _ in range(2)]
        torch.testing.assert_close(found[0], slow_users(model, own, readings), rtol=0, atol=1e-6)
        assert torch.equal(*found)


@pytest.mark.parametrize("name", KINDS_OF_MODELS)
def test_histories_read_by_segments_go_on_from_what_was_read(name):
    model, own = build_read(**KINDS_OF_MODELS[name]), processor(max_length=400)
    cache, users, version = SegmentCache(), UserStates(), object()
    events = [{"event": "clicked", "item": ITEMS[place % len(ITEMS)]} for place in range(9)]

    def ask(requests, version=version, users=users):
        readings = own.read_many(requests, "retrieval")
        with torch.no_grad():
            found = model.embed_users(sources_of(model, readings), cache, None, version, users)
        torch.testing.assert_close(found, slow_users(model, own, readings), rtol=0, atol=5e-6)

    def batch(sizes):
        return [{"user": f"man {user}", "history": events[:size], "now": "spring"} for user, size in enumerate(sizes)]

    ask(batch([3, 0, 8]))
    assert (users.hits, users.positions_reused) == (0, 0) and len(users) == 3
    ask(batch([4, 1, 8, 2]))  # one more, the first, none more, and a new user
    assert users.hits == 3 and len(users) == 4
    ran = users.positions_run
    ask(batch([5]))
    assert users.positions_run - ran <= users.positions_reused // 2
    ask(batch([7, 9, 2, 3]))
    ask([{**batch([7])[0], "history": [*events[:3], *events[5:9]]}])  # another history with the same beginning
    ask(WHO)
    hits = users.hits
    ask([batch([7, 9])[1]])
    assert users.hits == hits + 1
    users.clear()
    ask(batch([5]))
    assert users.hits == hits + 1


def test_the_last_place_of_a_user_is_computed_again_where_the_last_event_has_no_token_that_stays():
    model, own = build(segment_summary=1, skipped_kinds=["event"]), processor()
    history = [{"event": "clicked", "item": ITEMS[0]}, {"event": "clicked", "item": ITEMS[1]}, {"event": "left"}]
    readings, users, cache = own.read_many([{"history": history}], "retrieval"), UserStates(), SegmentCache()
    batch = own.pad([{"input_ids": readings[0].input_ids, "item_embedding_ids": readings[0].item_embedding_ids}])
    expected = slow_users(model, own, readings)
    with torch.no_grad():
        for _ in range(2):
            vectors = model(**batch, plan="cached", segment_cache=cache, user_states=users).user_vectors
            torch.testing.assert_close(vectors[:, -1], expected, rtol=0, atol=5e-6)
            found = model.embed_users(sources_of(model, readings), cache, user_states=users)
            torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)
    assert users.hits == 3


def test_a_change_of_weights_is_noticed_by_kept_histories_read_by_segments_and_by_ids():
    model, own, users, cache = build(segment_summary=1), processor(), UserStates(), SegmentCache()
    request = {"history": [{"event": "clicked", "item": ITEMS[place]} for place in range(4)]}
    reading = own.read_many([request], "retrieval")
    batch = own.pad([{"input_ids": reading[0].input_ids, "item_embedding_ids": reading[0].item_embedding_ids}])

    def ask(version):
        found = model.embed_users(sources_of(model, reading), cache, None, version, users)
        torch.testing.assert_close(found, slow_users(model, own, reading), rtol=0, atol=5e-6)

    with torch.no_grad():
        first, second = object(), object()
        ask(first)
        model(**batch, plan="cached", segment_cache=cache, user_states=users)
        ask(first)
        assert users.hits == 2  # by ids and by segments are one
        model.model.norm.weight.mul_(1.5)
        model.model.layers[-1].self_attn.k_proj.weight.mul_(1.5)
        ask(second)
        assert users.hits == 2
        model.model.layers[-1].self_attn.k_proj.weight.mul_(1.5)
        model(**batch, plan="cached", segment_cache=cache, user_states=users)
        assert users.hits == 2
        ask(object())
        assert users.hits == 3


def test_answers_of_users_read_by_segments_are_bitwise_those_read_by_ids(monkeypatch):
    model = build(segment_summary=1, bow_embeddings=True)
    fast, slow = make(model), make(model)
    for recommend in (fast, slow):
        recommend.warm(progress=False)
        [recommend(request) for request in WHO]  # states of texts are now kept
    found = [fast(request, explain=True) for request in WHO]
    assert len(fast.segment_cache.table)
    monkeypatch.setattr(type(model), "reads_sources", False)
    assert found == [slow(request, explain=True) for request in WHO]


@pytest.mark.parametrize("more", [{"segment_summary": 1}, {"segment_summary": None, "num_joint_layers": 2}])
def test_the_last_place_is_that_of_all_places(more, monkeypatch):
    model, own, cache = build(**more), processor(max_events=80, max_length=1600), SegmentCache()
    histories = [[{"item": ITEMS[place % len(ITEMS)]} for place in range(size)] for size in (*range(1, 14), 22, 40, 64)]
    readings = own.read_many([{"user": "a man", "history": history} for history in histories], "retrieval")
    sources, rows = sources_of(model, readings), []
    joint_stage = network_m6rec.M6RecModel.joint_stage
    monkeypatch.setattr(
        network_m6rec.M6RecModel,
        "joint_stage",
        lambda *given, **named: [rows.append(own.shape[1]) or own for own in joint_stage(*given, **named)],
    )

    def ask():
        with torch.no_grad():
            return torch.cat([model.embed_users([source], cache) for source in sources])

    found, computed = ask(), [*rows]
    monkeypatch.setattr(layout_m6rec, "QUERY_BLOCK", 10_000)
    every = ask()
    assert max(computed) <= 35 < max(rows) and sum(computed) < sum(rows[len(computed) :])
    torch.testing.assert_close(found, every, rtol=0, atol=1e-6)


@pytest.mark.parametrize("more", [{"history_attention": "bidirectional"}, {"local_layers": [2], "local_window": 4}])
def test_other_models_read_users_by_ids(more):
    assert not build(**more).reads_sources


def test_a_change_of_word_vectors_is_noticed_by_the_table_of_states():
    model = build(segment_summary=1, bow_embeddings=True)
    own, cache = processor(), SegmentCache()
    pieces = [((model.config.source_token_id,), 0), *own.read(WHO[0], "retrieval").pieces]
    pieces.append(((model.config.source_end_token_id,), 0))
    with torch.no_grad():
        before = model.embed_users([pieces], cache)
        model.model.word_memory.weight.add_(0.1)
        after = model.embed_users([pieces], cache)
        assert not torch.equal(before, after)
        assert torch.equal(after, model.embed_users([pieces], SegmentCache()))


def test_a_full_table_of_states_starts_again_and_answers_the_same():
    model, own = build(segment_summary=1), processor()
    whole, small = SegmentCache(), SegmentCache(max_bytes=4 * 4 * model.config.hidden_size * 8)
    ends = [((index,), 0) for index in (model.config.source_token_id, model.config.source_end_token_id)]
    for request in [*WHO, *WHO[::-1]]:
        source = [ends[0], *own.read(request, "retrieval").pieces, ends[1]]
        with torch.no_grad():
            assert torch.allclose(model.embed_users([source], small), model.embed_users([source], whole), atol=1e-6)
        assert small.table._used <= 8
    small.clear()
    assert not len(small.table)


@pytest.mark.parametrize("most", [2, 99])
def test_vectors_of_words_are_kept_until_the_rarity_of_words_changes(most, monkeypatch):
    monkeypatch.setattr(item_features_m6rec, "KEPT_SKETCHES", most)
    model, own, cache = build_read(tfidf_weight=0.5), processor(), SegmentCache()
    sketch = model.model.word_sketch
    made, of_texts = [], sketch._of_texts
    monkeypatch.setattr(sketch, "_of_texts", lambda texts: made.extend(texts) or of_texts(texts))

    def ask(number):
        reading = own.read_many([{"history": [{"item": item} for item in ITEMS[number : number + 3]]}], "retrieval")
        with torch.no_grad():
            found = model.embed_users(sources_of(model, reading), cache)
        torch.testing.assert_close(found, slow_users(model, own, reading), rtol=0, atol=1e-6)

    for number in (0, 0, 1, 0):
        ask(number)
    assert len(made) == 4 or most == 2
    assert copy.deepcopy(model).model.word_sketch._kept is None
    sketch.rarity[::2] *= 3
    ask(0)
    sketch.fit(own.encode_items(ITEMS[:4]))
    ask(0)
    assert len(sketch._kept[2]) == 3
    item_features_m6rec.forget_texts(model)
    assert sketch._kept is None


@pytest.mark.parametrize("room", [1 << 30, 4 * 4 * 32 * 8])
def test_a_warm_pipeline_takes_the_states_of_items_from_the_table(room, monkeypatch):
    model = build(segment_summary=1, bow_embeddings=True)
    cold, warm = make(model), make(model, segment_cache=SegmentCache(max_bytes=room))
    warm.warm(progress=False, item_ids=["i1"])
    table = warm.segment_cache.table
    assert len(table) == 1
    warm.warm(progress=False)
    asked = {"history": [{"item": item} for item in ITEMS[:3]]}
    made = []
    last_rows = network_m6rec.M6RecModel.last_rows
    monkeypatch.setattr(
        network_m6rec.M6RecModel,
        "last_rows",
        lambda self, segments, **more: made.extend(segments) or last_rows(self, segments, **more),
    )
    found, new = warm(asked), [*made]
    assert found == cold(asked)
    item = model.config.kind_token_ids["item"]
    if room == 1 << 30:
        assert len(table) >= len(ITEMS) and not any(ids[0] == item for ids in new)
    else:
        assert table._used * table._states[0].nbytes <= table.max_bytes


def test_what_is_kept_with_a_segment_is_that_of_its_processor():
    long, short = processor(), processor(max_length=30)
    request = {"user": "a man", "history": [{"item": {"title": "hiking " * 40}}, {"item": ITEMS[0]}]}
    for task in ("retrieval", "retrieval"):
        expected = [processor(max_length=size).read(request, task).input_ids for size in (1024, 30)]
        assert [own.read(request, task).input_ids for own in (long, short)] == expected


def test_the_ids_that_decide_the_layout_are_a_tensor_of_their_own():
    batch = processor().pad([{"input_ids": [5, 6, 7]}, {"input_ids": [5]}])
    batch["input_ids"].zero_()
    assert batch["layout_ids"][0].tolist() == [5, 6, 7]
