"""A history that is read from where it ended gives the numbers of reading it all, and is never another's."""

import copy
import itertools
import pickle
from unittest import mock

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m6rec import RecommendationPipeline, SegmentCache, network_m6rec, segment_cache_m6rec
from m6rec.layout_m6rec import layout
from m6rec.segment_cache_m6rec import UserStates
from tests.fast import examples, some
from tests.modeling_m6rec import shop
from tests.modeling_m6rec.tiny import (
    ALL,
    BOS,
    EOS,
    EVENT,
    ITEM,
    NOW,
    SEG,
    SMALL,
    SOURCE,
    SOURCE_END,
    TEXT,
    USER,
    Writer,
    build,
    close,
    item_rows,
    pad,
)

CAUSAL = [settings for settings in ALL if settings.get("history_attention", "causal") == "causal"]
MODELS = {}


def model_of(number):
    return MODELS.setdefault(number, build(CAUSAL[number], initializer_range=0.15))


def ask(model, rows, users=None, cache=None, side="right", sources=True, **more):
    """Scores, plausibility and, of rows with sources, last user vectors; by the flat plan if no users are kept."""
    batch = {**pad(rows, side), **more}
    batch.setdefault("item_embedding_ids", item_rows(batch["input_ids"]))
    plan = {"plan": "flat"}
    if users is not None:
        plan = {"plan": "cached", "user_states": users, "segment_cache": SegmentCache() if cache is None else cache}
    with torch.no_grad():
        out = model(**batch, **plan, return_logits=False, return_plausibility=True)
    vectors = None
    if sources and out.user_vectors is not None:
        vectors = torch.stack([own[own.isfinite().all(-1)][-1] for own in out.user_vectors])
    return out.scores, out.plausibility, vectors


def same(found, expected):
    for one, other in zip(found, expected):
        if other is not None:
            close(one, other)


def user(seed):
    """The head of a source, seven events, and a way to make requests of them."""
    writer = Writer(seed)
    return [SOURCE, *writer.segment(USER)], [writer.event() for _ in range(7)], writer


def request(head, events, writer, candidates=2):
    now = writer.segment(NOW) if writer.random.random() < 0.7 else []
    targets = [token for _ in range(candidates) for token in writer.candidate()]
    return head + sum(events, []) + now + [SOURCE_END] + targets + writer.text()


@settings(max_examples=examples(30), deadline=None)
@given(
    st.integers(0, len(CAUSAL) - 1),
    st.lists(
        st.lists(st.tuples(st.integers(0, 2), st.integers(0, 7), st.integers(0, 3)), min_size=1, max_size=3),
        min_size=2,
        max_size=5,
    ),
    st.sampled_from(["right", "left"]),
    st.sampled_from([0, network_m6rec.TOGETHER]),
)
def test_whatever_was_asked_before_the_numbers_are_those_of_reading_all(number, batches, side, together):
    model, users, cache = model_of(number), UserStates(), SegmentCache()
    people = [user(seed) for seed in (1, 2)]
    people.append((people[0][0], people[0][1][:3] + people[1][1][:4], people[1][2]))  # begins as another does
    for batch in batches:
        rows = [request(people[who][0], people[who][1][:events], people[who][2], k) for who, events, k in batch]
        with mock.patch.object(network_m6rec, "TOGETHER", together):
            found = ask(model, rows, users, cache, side)
        same(found, ask(model, rows, side=side))


def run_tokens(model, call):
    """How many source tokens went through each joint layer (sources come first, one call each)."""
    seen, handles = [], []
    for layer in model.model.layers[model.config.num_segment_layers :]:
        handles.append(
            layer.register_forward_hook(
                lambda _, args, kwargs, out: seen.append(tuple(args[0].shape[:2])) if "key_cache" in kwargs else None,
                with_kwargs=True,
            )
        )
    call()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("summary", (None, 1))
def test_one_event_costs_its_own_tokens_and_the_end(summary, monkeypatch):
    monkeypatch.setattr(network_m6rec, "TOGETHER", 0)
    model, users, cache = build({"num_joint_layers": 2, "segment_summary": summary}), UserStates(), SegmentCache()
    head, events, writer = user(3)
    now = writer.segment(NOW)
    rows = [head + sum(events[:count], []) + now + [SOURCE_END] + writer.candidate() for count in (5, 6)]
    ask(model, rows[:1], users, cache)
    read, before = cache.misses, users.positions_run
    seen = run_tokens(model, lambda: ask(model, rows[1:], users, cache))
    kept = (lambda tokens: tokens.count(SEG)) if summary else len
    new = kept(events[5]) + kept(now) + 1
    assert users.positions_run - before == new and seen == [(1, new + 1)] * 2  # and the targets' [BOS]
    assert users.positions_reused == kept(head + sum(events[:5], [])) + (1 if summary else 0)  # and [BOS']
    segments = "".join(map(chr, events[5])).split(chr(SEG))[:-1]
    candidate = [token for token in rows[1][len(head + sum(events[:6], []) + now) + 1 :] if token != EOS]
    assert cache.misses - read <= len(segments) + candidate.count(SEG) and (users.hits, users.misses) == (1, 1)


def test_one_segment_and_one_position_where_an_event_is_one_segment():
    model, users, cache = build({"num_joint_layers": 3, "segment_summary": 1}), UserStates(), SegmentCache()
    events, target = [[EVENT, word, word, SEG] for word in range(30, 50)], [BOS, ITEM, 70, SEG, EOS]
    rows = [[SOURCE, USER, 40, SEG, *sum(events[:count], []), SOURCE_END, *target] for count in range(1, 21)]
    for row in rows:
        read, run = cache.misses, users.positions_run
        same(ask(model, [row], users, cache), ask(model, [row]))
    assert cache.misses - read == 1 and users.positions_run - run == 2  # its [SEG], and [EOS']
    assert len(users) == 1  # what went on replaced what it went on from


def test_an_unchanged_history_reads_its_last_segment_again():
    model, users, cache = build({"num_joint_layers": 2, "segment_summary": 1}), UserStates(), SegmentCache()
    head, events, writer = user(4)
    row = request(head, events, writer)
    ask(model, [row], users, cache)
    run = users.positions_run
    same(ask(model, [row], users, cache), ask(model, [row]))
    assert users.positions_run - run == 1 + row[len(head + sum(events, [])) : row.index(SOURCE_END)].count(SEG) + 1
    shorter = request(head, events[:3], writer)
    same(ask(model, [shorter], users, cache), ask(model, [shorter]))
    assert users.hits == 2 and len(users) == 1


# ----------------------------------------------------------------------------------------------- a miss, never wrong


def weights(model):
    with torch.no_grad():
        model.model.layers[-1].mlp.down_proj.weight.mul_(1.5)


def event_table(model):
    with torch.no_grad():
        model.model.embed_event.weight[1:].add_(0.5)


def replaced_weights(model):
    layer = model.model.layers[-1].self_attn.k_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach() * -1)


def summary(model):
    model.config.segment_summary = 2


def adapter(model):
    config = peft.LoraConfig(target_modules=["k_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)


def dtype(model):
    model.to(torch.float64)


@pytest.mark.parametrize("change", (weights, event_table, replaced_weights, summary, adapter, dtype))
def test_a_changed_model_is_a_miss(change):
    model, users = build({"num_joint_layers": 2, "segment_summary": 1}), UserStates()
    head, events, writer = user(5)
    rows = [request(head, events[:count], writer) for count in (5, 6)]
    ask(model, rows[:1], users)
    change(model.eval())
    same(ask(model, rows[1:], users), ask(model, rows[1:]))
    assert users.positions_reused == 0 and users.hits == 0 and len(users) == 1


def test_an_adapter_switched_off_is_a_miss():
    model, users = build({"num_joint_layers": 2}), UserStates()
    adapter(model)
    head, events, writer = user(5)
    rows = [request(head, events[:count], writer) for count in (5, 6)]
    ask(model, rows[:1], users)
    for part in model.modules():
        if isinstance(part, peft.tuners.tuners_utils.BaseTunerLayer):
            part.enable_adapters(False)
    same(ask(model, rows[1:], users), ask(model, rows[1:]))
    assert users.positions_reused == 0


def test_another_head_and_a_history_cut_at_the_front_share_no_event():
    model, users, cache = build({"num_joint_layers": 2}), UserStates(), SegmentCache()
    head, events, writer = user(6)
    ask(model, [request(head, events, writer)], users, cache)
    other = [[SOURCE, USER, 40, SEG, *sum(events, []), SOURCE_END, *writer.candidate(), *writer.text()]]
    same(ask(model, other, users, cache), ask(model, other))
    assert users.positions_reused == 0
    cut = [request(head, events[1:], writer)]
    same(ask(model, cut, users, cache), ask(model, cut))
    assert users.positions_reused == len(head) and users.hits == 1


def test_another_item_memory_is_another_history():
    model, users, cache = build({"num_joint_layers": 2}), UserStates(), SegmentCache()
    head, events, writer = user(7)
    row = request(head, events, writer)
    ask(model, [row], users, cache)
    for memory in (item_rows(torch.tensor([row])) % 9 + (item_rows(torch.tensor([row])) > 0), None):
        same(ask(model, [row], users, cache, item_embedding_ids=memory), ask(model, [row], item_embedding_ids=memory))
    assert users.positions_reused < 3 * len(head + events[0])


def test_bidirectional_history_and_hidden_events_and_training_take_no_part():
    for settings_, hide, grad in (
        ({"num_joint_layers": 2, "history_attention": "bidirectional"}, False, False),
        ({"num_joint_layers": 2}, True, False),
        ({"num_joint_layers": 2}, False, True),
    ):
        model, users = build(settings_), UserStates()
        head, events, writer = user(8)
        rows = [request(head, events[:count], writer) for count in (5, 6)]
        for row in rows:
            hidden = layout(torch.tensor([row]), None, model.config).event == 2
            more = {"hidden_events": hidden} if hide else {}
            if grad:
                batch = {**pad([row]), "plan": "cached", "user_states": users}
                out = model(**batch, segment_cache=SegmentCache(), return_logits=False)
                assert out.scores.requires_grad
            else:
                same(ask(model, [row], users, **more), ask(model, [row], **more))
        assert len(users) == 0 and users.stats()["positions_reused"] == 0


def test_a_shown_history_does_not_serve_where_an_event_is_hidden():
    model, users = build({"num_joint_layers": 2}), UserStates()
    head, events, writer = user(8)
    row = request(head, events, writer)
    ask(model, [row], users)
    hidden = layout(torch.tensor([row]), None, model.config).event == 2
    same(ask(model, [row], users, hidden_events=hidden), ask(model, [row], hidden_events=hidden))


def test_hashes_that_collide_are_told_apart(monkeypatch):
    monkeypatch.setattr(segment_cache_m6rec, "hash", lambda _: 7, raising=False)
    model, users, cache = build({"num_joint_layers": 2}), UserStates(), SegmentCache()
    for seed in (1, 2, 1, 2):
        head, events, writer = user(seed)
        row = request(head, events, writer)
        same(ask(model, [row], users, cache), ask(model, [row]))


def test_rows_without_a_source_are_read_as_ever():
    model, users = build({"num_joint_layers": 2, "document_attention": "bidirectional"}), UserStates()
    writer = Writer(9)
    rows = [writer.candidate(), [TEXT, 40, 41], request(*user(9)[:2], writer)]
    for _ in range(2):
        same(ask(model, rows, users, sources=False), ask(model, rows, sources=False))
    assert len(users) == 1 and users.hits == 1


def test_fewer_layers_are_another_history():
    model, users = build({"num_joint_layers": 3}), UserStates()
    head, events, writer = user(10)
    for count, exit_layer in ((3, 1), (4, 3), (5, 1), (6, 2), (7, 3)):
        rows = [request(head, events[:count], writer)]
        same(ask(model, rows, users, exit_layer=exit_layer), ask(model, rows, exit_layer=exit_layer))
    assert users.hits == 2


# -------------------------------------------------------------------------------------------------------- the store


def test_the_least_recently_used_leave_first():
    model = build(SMALL[1])
    sizes = UserStates()
    rows = [request(*user(seed)) for seed in range(4)]
    for row in rows:
        ask(model, [row], sizes)
    users = UserStates(max_bytes=sizes.num_bytes - 1)
    for row in rows[:3]:
        ask(model, [row], users)
    ask(model, [rows[0]], users)
    ask(model, [rows[3]], users)
    assert 0 < users.num_bytes <= users.max_bytes and len(users) == 3 and users.hits == 1
    ask(model, [rows[0]], users)
    assert users.hits == 2
    ask(model, [rows[1]], users)
    assert users.positions_reused > 0 and users.stats()["bytes"] == users.num_bytes
    users.clear()
    assert len(users) == users.num_bytes == 0
    ask(model, rows, UserStates(max_bytes=10))


def test_bytes_are_those_of_what_is_kept():
    model, users = build(SMALL[1]), UserStates()
    for seed in range(3):
        head, events, writer = user(seed)
        for count in range(1, 7):
            ask(model, [request(head, events[:count], writer)], users)
    assert users.num_bytes == sum(kept.num_bytes for kept in users._kept.values()) and len(users) == 3
    assert set(map(id, users._index.values())) == set(map(id, users._kept.values()))


def test_copies_start_empty():
    users = UserStates(max_bytes=123456)
    ask(build(SMALL[0]), [request(*user(1))], users)
    for other in (copy.deepcopy(users), pickle.loads(pickle.dumps(users))):
        assert len(other) == 0 and other.max_bytes == 123456
    assert len(users) == 1


def test_refusals():
    with pytest.raises(ValueError, match="max_bytes=0"):
        UserStates(max_bytes=0)
    with pytest.raises(ValueError, match="'compact'"):
        build(SMALL[0])(**pad([request(*user(1))]), plan="compact", user_states=UserStates())


# ------------------------------------------------------------------------------------------------------ the pipeline


def make(model, **more):
    return RecommendationPipeline(model=model, processor=shop.processor(), device="cpu", **more)


TASKS = ("click", "rating", "interaction", "plausibility", "retrieval")


@pytest.mark.parametrize(
    ("task", "batch_size"), some(itertools.product(TASKS, (1, 3)), zip(TASKS, itertools.cycle((1, 3))))
)
def test_a_pipeline_that_keeps_users_answers_the_same(task, batch_size):
    model = shop.build(segment_summary=1)
    recommend, forgetful = make(model, user_states=True), make(model)
    for count in (1, 2, 4, 3):
        requests = [
            {**shop.REQUEST, "user": name, "history": shop.REQUEST["history"][:count]} for name in ("a", "b", "a")
        ]
        answers = recommend(requests, task=task, batch_size=batch_size, explain=True)
        for rows, others in zip(answers, forgetful(requests, task=task, explain=True), strict=True):
            assert [row["item"] for row in rows] == [row["item"] for row in others]
            assert [row["score"] for row in rows] == pytest.approx([row["score"] for row in others], rel=1e-5, abs=1e-5)
            for row, other in zip(rows, others):
                found, expected = ({r["event"]: r["contribution"] for r in each["because"]} for each in (row, other))
                assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert recommend.user_states.hits >= 6 and forgetful.user_states is None


def test_a_full_history_goes_on_from_what_was_read_until_events_are_forgotten():
    model = shop.build(segment_summary=1)
    processor = shop.processor()
    recommend = RecommendationPipeline(model=model, processor=processor, device="cpu", user_states=True)
    event = shop.REQUEST["history"][0]
    histories = [[{**event, "item": f"thing {place}"} for place in range(count)] for count in range(1, 14)]
    processor.max_events, reused = 6, {}
    for processor.truncation_stride in (1, 3):
        recommend.user_states.clear()
        reused[processor.truncation_stride] = []
        for history in histories:
            before = recommend.user_states.positions_reused
            rows = recommend({**shop.REQUEST, "history": history}, task="click")
            reused[processor.truncation_stride].append(recommend.user_states.positions_reused - before)
            again = RecommendationPipeline(model=model, processor=processor, device="cpu")
            others = again({**shop.REQUEST, "history": history}, task="click")
            assert [row["score"] for row in rows] == pytest.approx([row["score"] for row in others], abs=1e-5)
    assert all(reused[1][1:6]) and max(reused[1][6:]) < min(reused[1][1:6])  # the head at most
    fresh = [place for place in range(6, 13) if reused[3][place] < min(reused[1][1:6])]
    assert fresh == [6, 9, 12]  # where the 7th, 10th and 13th event let three others go


def test_users_may_be_shared_by_pipelines():
    model, users = shop.build(), UserStates()
    make(model, user_states=users)(shop.REQUEST)
    make(model, user_states=users)(shop.REQUEST)
    assert users.hits == 1
    other = shop.build(seed=1)
    rows = make(other, user_states=users)(shop.REQUEST)
    assert [row["score"] for row in rows] == pytest.approx([row["score"] for row in make(other)(shop.REQUEST)])
    assert users.hits == 1
