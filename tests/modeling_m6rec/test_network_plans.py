"""Every plan gives the flat plan's numbers, and no number depends on what it should not depend on."""

import itertools
import random
from unittest import mock

import pytest
import torch
from hypothesis import assume, given
from hypothesis import settings as example
from hypothesis import strategies as st

from m6rec import SegmentCache, network_m6rec
from m6rec.layout_m6rec import SegmentKey, layout, user_places
from tests.fast import examples
from tests.modeling_m6rec.tiny import (
    ALL,
    BERT,
    BOS,
    EOS,
    ITEM,
    NOW,
    OPTION,
    PLANS,
    SEG,
    SMALL,
    SOURCE,
    SOURCE_END,
    TEXT,
    USER,
    WORDS,
    Writer,
    build,
    by_pairs,
    causal,
    close,
    everywhere,
    few,
    item_rows,
    pad,
    scores,
    small,
    states,
)

TOGETHER = (0, network_m6rec.TOGETHER)
"""Targets behind their source, each as a row of its own, or all in one row with it."""


@by_pairs
def test_plans_agree(settings):
    model, writer = build(settings), Writer(1)
    rows = [
        writer.source(n) + [token for _ in range(k) for token in writer.candidate()] + writer.text() * (k % 2)
        for n, k in ((3, 3), (0, 1), (2, 4))
    ]
    for side in ("right", "left"):
        batch, cache = pad(rows, side), SegmentCache()
        batch["item_embedding_ids"] = item_rows(batch["input_ids"])
        batch["hidden_events"] = layout(**pad(rows, side), config=model.config).event == 2
        with torch.no_grad():
            flat = model(**batch, plan="flat", return_plausibility=True)
            assert flat.scores.isfinite().all(-1).sum() == 8 + 2
            for plan in (*PLANS[1:], "cached"):  # the cached plan cold, then warm
                out = model(**batch, plan=plan, segment_cache=cache, return_plausibility=True)
                for field in ("scores", "plausibility", "user_vectors", "item_vectors"):
                    if getattr(flat, field) is not None:
                        close(getattr(out, field), getattr(flat, field))
        assert cache.hits > 0 or not model.config.num_segment_layers


MODELS = st.fixed_dictionaries(
    {
        "num_joint_layers": st.integers(1, 4),
        "segment_summary": st.sampled_from([None, 1, 2, 3]),
        "segment_pooling": st.sampled_from(["last", "mean"]),
        "written_attention": st.sampled_from(["segment", "source"]),
        "skipped_kinds": st.sampled_from([None, ["event"], ["age", "user", "text"]]),
        "history_attention": st.sampled_from(["causal", "bidirectional"]),
        "segment_attention": st.sampled_from(["causal", "bidirectional"]),
        "joint_positions": st.sampled_from(["request", "segment"]),
        "num_hidden_groups": st.sampled_from([1, 2, 3, 4]),
        "position_embedding_type": st.sampled_from(["rotary", "learned"]),
        "norm_position": st.sampled_from(["pre", "post"]),
        "num_key_value_heads": st.sampled_from([1, 3, 6]),
    }
)


@pytest.fixture(params=TOGETHER)
def together(request, monkeypatch):
    monkeypatch.setattr(network_m6rec, "TOGETHER", request.param)


@example(max_examples=examples(80), deadline=None)
@given(MODELS, st.lists(st.tuples(st.integers(0, 6), st.integers(1, 6)), min_size=1, max_size=4), st.integers(0, 99))
def test_plans_agree_whatever_the_model(fields, shapes, seed):
    whole = fields["num_joint_layers"] == 4
    assume(not (whole and (fields["segment_summary"] or fields["segment_pooling"] == "mean")))
    assume(whole or fields["position_embedding_type"] == "rotary" or fields["joint_positions"] == "segment")
    block = (
        {**BERT, "position_embedding_type": fields["position_embedding_type"]}
        if fields["norm_position"] == "post"
        else {}
    )
    model, writer = build({**block, **fields}, initializer_range=0.15), Writer(seed)
    batch = pad(
        [
            writer.source(n) + [token for _ in range(k) for token in writer.candidate()] + writer.text()
            for n, k in shapes
        ]
    )
    with torch.no_grad():
        flat = model(**batch, plan="flat", return_plausibility=True)
        cache = SegmentCache()
        for plan, together in itertools.product((*PLANS[1:], "cached"), TOGETHER):
            with mock.patch.object(network_m6rec, "TOGETHER", together):
                out = model(**batch, plan=plan, segment_cache=cache if plan == "cached" else None,
                            return_plausibility=True)  # fmt: skip
            close(out.scores, flat.scores)
            close(out.plausibility, flat.plausibility)
            if not whole:
                close(out.user_vectors, flat.user_vectors)


@few
@pytest.mark.usefixtures("together")
def test_the_state_of_every_token_agrees(settings):
    """Also that of each target's [BOS], which no head reads, and which the first one stands for."""
    model, writer = build({**settings, "segment_summary": None}).model, Writer(3)
    batch = pad([writer.source(n) + [token for _ in range(4) for token in writer.candidate()] for n in (2, 2, 4)])
    valid = batch["attention_mask"].bool()
    with torch.no_grad():
        flat = model(**batch, plan="flat").last_hidden_state
        for plan in PLANS[1:]:
            close(model(**batch, plan=plan, segment_cache=SegmentCache()).last_hidden_state[valid], flat[valid])


@few
@pytest.mark.usefixtures("together")
def test_many_candidates_in_chunks(settings):
    model, writer = build(settings), Writer(16)
    batch = pad([writer.source(2) + [token for _ in range(k) for token in writer.candidate()] for k in (27, 51)])
    close(scores(model, batch, plan="cached"), scores(model, batch, plan="flat"))


@few
@pytest.mark.usefixtures("together")
def test_rows_of_unlike_shapes_run_apart_and_in_their_order(settings):
    model, writer = build(settings), Writer(17)
    shapes = ((1, 1), (9, 1), (1, 20), (9, 20), (1, 1), (9, 2), (0, 0))
    rows = [writer.source(n) + [token for _ in range(k) for token in writer.candidate()] for n, k in shapes]
    with torch.no_grad():
        flat = model(**pad(rows), plan="flat", exit_layer=1)
        for plan in ("shared_prefix", "cached"):
            out = model(**pad(rows), plan=plan, exit_layer=1)
            close(out.scores, flat.scores)
            if flat.user_vectors is not None:
                close(out.user_vectors, flat.user_vectors)


@few
@pytest.mark.parametrize("plan", PLANS[1:])
@pytest.mark.usefixtures("together")
def test_scores_alone_cost_the_last_layer_their_own_tokens_only(settings, plan):
    model, writer = build(settings), Writer(21)
    row = torch.tensor([writer.source(3) + [token for _ in range(4) for token in writer.candidate()]])
    sizes = []
    handle = model.model.layers[-1].mlp.register_forward_hook(
        lambda _, args, out: sizes.append(args[0][..., 0].numel())
    )
    with torch.no_grad():
        everything = model(input_ids=row, plan=plan, segment_cache=SegmentCache())
        sizes.clear()
        found = model.score(input_ids=row, plan=plan, segment_cache=SegmentCache())
    handle.remove()
    close(found, model.read_scores(everything.scores, "click"))
    if model.config.num_hidden_groups == model.config.num_hidden_layers:
        assert sizes[-1] == 4 and sum(sizes) <= 4 + 1  # and one token that stands for a source of which none is asked
    out = model(input_ids=row, plan=plan, segment_cache=SegmentCache(), return_logits=False, return_vectors=False)
    assert out.user_vectors is None is out.item_vectors


@everywhere
@pytest.mark.parametrize("plan", ("flat", "compact"))
def test_left_padding_equals_right_and_batched_equals_single(settings, plan):
    model, writer = build(settings), Writer(2)
    rows = [writer.source(n) + writer.candidate() + writer.candidate() for n in (0, 2, 4)]
    with torch.no_grad():
        right, left = (model(**pad(rows, side), plan=plan) for side in ("right", "left"))
        for row in range(3):
            close(scores(model, pad(rows[row : row + 1]), plan=plan)[0], right.scores[row])
    for field in ("scores", "user_vectors", "item_vectors"):
        if getattr(right, field) is not None:
            close(getattr(left, field), getattr(right, field))


@everywhere
def test_packed_requests_equal_separate_rows(settings):
    model, writer = build(settings), Writer(3)
    rows = [writer.source(n) + writer.candidate() + writer.candidate() for n in (1, 3, 2)]
    packed = torch.tensor([sum(rows, [])])
    apart = [states(model, torch.tensor([row]), plan="flat")[0] for row in rows]
    close(states(model, packed, plan="flat")[0], torch.cat(apart))
    for plan in ("flat", "compact"):
        with torch.no_grad():
            together, single = model(packed, plan=plan), [model(torch.tensor([row]), plan=plan) for row in rows]
        close(together.scores[0], torch.cat([out.scores[0] for out in single]))
        if together.user_vectors is not None:
            close(together.user_vectors[0], torch.cat([out.user_vectors[0] for out in single]))
    for plan in ("shared_prefix", "cached"):
        with pytest.raises(ValueError, match="one request a row"):
            model(packed, plan=plan)


@everywhere
def test_candidates_in_one_row_equal_rows(settings):
    model, writer = build(settings), Writer(4)
    source, candidates = writer.source(), [writer.candidate() for _ in range(4)]
    apart = scores(model, pad([source + candidate for candidate in candidates]), plan="flat")[:, 0]
    for plan in PLANS:
        close(scores(model, {"input_ids": torch.tensor([source + sum(candidates, [])])}, plan=plan)[0], apart)


@everywhere
def test_a_candidate_does_not_change_another_and_permuting_permutes(settings):
    model, writer = build(settings), Writer(5)
    source, candidates = writer.source(), [writer.candidate() for _ in range(4)]
    for plan in PLANS:

        def ask(chosen, plan=plan):
            return scores(model, {"input_ids": torch.tensor([source + sum(chosen, [])])}, plan=plan)[0]

        before = ask(candidates)
        after = ask([candidates[0], writer.candidate(), *candidates[2:]])
        close(after[[0, 2, 3]], before[[0, 2, 3]])
        assert (after[1] - before[1]).abs().max() > 1e-3
        close(ask([candidates[index] for index in (2, 0, 3, 1)]), before[[2, 0, 3, 1]])


@everywhere
def test_a_segment_state_depends_on_its_segment_only(settings):
    model, writer = build(settings), Writer(6)
    if model.config.position_embedding_type == "learned" and model.config.joint_positions == "request":
        pytest.skip("without segment layers learned positions are those of the request")
    ids = torch.tensor([writer.source() + writer.candidate()])
    lay = layout(ids, None, model.config)
    place = int(((lay.event == 1) & (lay.kind == 4) & (ids >= WORDS[0])).nonzero()[0, 1])
    changed = ids.clone()
    changed[0, place] = WORDS[0] + (ids[0, place] - WORDS[0] + 1) % len(WORDS)
    with torch.no_grad():
        before, after = (model.model(x, plan="flat").segment_states for x in (ids, changed))
    same = lay.segment[0] != lay.segment[0, place]
    assert torch.equal(before[0, same], after[0, same])
    assert not torch.equal(before[0, place], after[0, place])


@causal
def test_appending_an_event_equals_recomputing(settings):
    model, writer = build(settings), Writer(7)
    heads = [writer.head(n) for n in (1, 3)]
    first = pad(heads, "left")
    with torch.no_grad():
        out = model.model(**first, item_embedding_ids=item_rows(first["input_ids"]), use_cache=True)
        cache, ids, mask = out.past_key_values, first["input_ids"], first["attention_mask"]
        seen = [out.last_hidden_state]
        for part in ("event", "event", "tail"):
            tail = writer.segment(NOW) + [SOURCE_END] + writer.candidate()
            new = pad([writer.event() if part == "event" else tail for _ in heads], "right")
            ids, mask = torch.cat((ids, new["input_ids"]), 1), torch.cat((mask, new["attention_mask"]), 1)
            out = model.model(
                new["input_ids"], mask, layout_ids=ids, item_embedding_ids=item_rows(ids), past_key_values=cache
            )
            seen.append(out.last_hidden_state)
        again = model.model(ids, mask, item_embedding_ids=item_rows(ids), use_cache=True)
    valid = mask.bool()
    close(torch.cat(seen, 1)[valid], again.last_hidden_state[valid])
    for old, new in zip(cache.layers, again.past_key_values.layers):
        close(old.keys.transpose(1, 2)[valid], new.keys.transpose(1, 2)[valid])


@causal
def test_user_vectors_do_not_see_later_events_or_now(settings):
    if settings["num_joint_layers"] == 4:
        pytest.skip("no vectors without segment layers")
    model, writer = build(settings), Writer(8)
    head, event = writer.head(3), writer.event()
    tail = event + writer.segment(NOW) + [SOURCE_END] + writer.candidate()
    for plan in PLANS:
        with torch.no_grad():
            short, long = (model.embed(input_ids=torch.tensor([row]), plan=plan) for row in (head, head + tail))
        assert short.user_vectors.shape[1] == 4 and long.user_vectors.shape[1] == 5
        close(long.user_vectors[:, :4], short.user_vectors)


def test_the_head_of_a_source_is_user_or_its_marker():
    model, writer = build(SMALL[0]), Writer(9)
    user, event = writer.segment(USER), writer.event()
    for head, place in (([SOURCE], 0), ([SOURCE, *user], len(user))):
        row = torch.tensor([head + event + [SOURCE_END]])
        with torch.no_grad():
            out = model.model(row, plan="flat")
            vectors = model.embed(input_ids=row).user_vectors[0]
            read = model.user_projection(out.last_hidden_state[0, [place, len(head + event) - 1]])
            expected = torch.nn.functional.normalize(read, dim=-1)
        close(vectors, expected)


@small
def test_a_hidden_event_is_seen_by_nobody(settings):
    model, writer = build(settings), Writer(18)
    events = [writer.event() for _ in range(3)]
    other = events[:1] + [[token if token < WORDS[0] else WORDS[-1] for token in events[1]]] + events[2:]
    head, tail = [SOURCE, *writer.segment(USER)], [SOURCE_END, *writer.candidate()]
    rows = [torch.tensor([head + sum(chosen, []) + tail]) for chosen in (events, other)]
    hidden = layout(rows[0], None, model.config).event == 2
    first, second = (scores(model, {"input_ids": row}, hidden_events=hidden) for row in rows)
    close(first, second)
    shown = [scores(model, {"input_ids": row}) for row in rows]
    assert (shown[0] - shown[1]).abs().max() > 1e-3 and (shown[0] - first).abs().max() > 1e-3


@everywhere
def test_texts_in_one_row_equal_rows(settings):
    model, writer = build(settings), Writer(14)
    source, texts = writer.source(), [[BOS, TEXT, *writer.random.choices(WORDS, k=4), EOS] for _ in range(3)]
    with torch.no_grad():
        for plan in PLANS:
            together = model(torch.tensor([source + sum(texts, [])]), plan=plan).logits[0, len(source) :].view(3, 7, -1)
            apart = model(torch.tensor([source + text for text in texts]), plan=plan).logits[:, len(source) :]
            close(together, apart)


@everywhere
def test_compact_form_equals_masked_form_for_kept_tokens(settings):
    model, writer = build(settings), Writer(19)
    source, text = writer.source(3), writer.text()
    row = torch.tensor([source + writer.candidate() + text])
    masked, compact = (states(model, row, plan=plan)[0] for plan in ("flat", "compact"))
    kept = compact.abs().sum(-1) > 0
    assert kept.all() == (model.config.segment_summary is None)
    if model.config.written_attention == "source":
        assert kept[: len(source)].all() and kept[-len(text) :].all()
    close(compact[kept], masked[kept])


@everywhere
def test_cached_plan_keeps_given_written_and_plain_text_apart(settings):
    model, cache = build(settings, document_attention="bidirectional"), SegmentCache()
    text = [TEXT, 40, 41, 42, SEG]
    given = [SOURCE, USER, 50, SEG, *text, SOURCE_END, BOS, *text, EOS, BOS, *text, ITEM, 40, SEG, EOS]
    batch = pad([given, text])
    flat = states(model, **{"ids": batch["input_ids"]}, attention_mask=batch["attention_mask"], plan="flat")
    cached = states(
        model, batch["input_ids"], attention_mask=batch["attention_mask"], plan="cached", segment_cache=cache
    )
    kept = cached.abs().sum(-1) > 0
    close(cached[kept], flat[kept])


@everywhere
@pytest.mark.usefixtures("together")
def test_gradients_through_plans_equal_the_flat_ones(settings):
    model, writer = build(settings), Writer(15)
    batch = pad([writer.source(n) + writer.candidate() + writer.candidate() for n in (3, 1)])
    memory, grads = item_rows(batch["input_ids"]), []
    for plan in PLANS:
        model.zero_grad()
        out = model(**batch, item_embedding_ids=memory, plan=plan, segment_cache=SegmentCache(), return_logits=False)
        out.scores.sigmoid().sum().backward()
        grads.append({name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None})
    for other in grads[1:]:
        assert {name for name, grad in other.items() if grad.any()} == {n for n, grad in grads[0].items() if grad.any()}
        for key, grad in grads[0].items():
            rounding = 1e-5 * max(1.0, float(grad.abs().max()))
            close(other.get(key, torch.zeros_like(grad)), grad, rtol=1e-4, atol=rounding)


@everywhere
@pytest.mark.usefixtures("together")
def test_learning_what_comes_next_is_the_same_through_every_plan(settings):
    """Where users alone are read, the last layer computes their tokens only, and learns the same."""
    model, writer = build({**settings, "history_attention": "causal"}), Writer(16)
    if not model.config.num_segment_layers:
        pytest.skip("no item vectors with all layers joint")
    batch, items = pad([writer.source(n) for n in (3, 1)]), pad([writer.segment(ITEM) for _ in range(4)])
    lay = layout(**batch, config=model.config)
    places = user_places(batch["input_ids"], lay, model.config)
    labels = torch.full_like(batch["input_ids"], -100)
    for row in range(2):
        ends = places[row][places[row] >= 0]
        labels[row, ends] = torch.arange(len(ends)) % 4
    given = {"item_input_ids": items["input_ids"], "item_attention_mask": items["attention_mask"]}
    tokens, grads = [], []
    model.model.layers[-1].mlp.register_forward_hook(lambda _, args, out: tokens.append(args[0][..., 0].numel()))
    for plan in PLANS:
        model.zero_grad()
        tokens.clear()
        batch |= {"retrieval_labels": labels, **given}
        model(**batch, plan=plan, segment_cache=SegmentCache(), only_losses=True).loss.backward()
        grads.append({name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None})
        if plan != "flat" and model.config.num_hidden_groups == model.config.num_hidden_layers:
            assert sum(tokens) == places.numel()  # padding among them
    for other in grads[1:]:
        for key in grads[0]:
            close(other.get(key, torch.zeros_like(grads[0][key])), grads[0][key], rtol=1e-4)


def test_items_by_themselves_equal_items_in_a_row():
    for settings in SMALL[:3] + [ALL[-1]]:
        model, writer = build(settings), Writer(20)
        items = [writer.segment(ITEM, 1, 6) for _ in range(5)]
        rows = torch.tensor([[SOURCE, USER, 40, SEG, *itertools.chain(*items), SOURCE_END]])
        memory = item_rows(rows)
        with torch.no_grad():
            inside = model.embed(input_ids=rows, item_embedding_ids=memory).item_vectors[0]
            alone = model.embed_items(**pad(items), memory_ids=memory[memory > 0])
            states_first = model.item_states(**pad(items))
        close(alone, inside)
        words = pad(items) if model.config.bow_embeddings else {}
        close(model.embed_items(states=states_first, memory_ids=memory[memory > 0], **words), inside)


@pytest.mark.parametrize("tokens", (1024, 16384))
def test_batches_of_texts_hold_little_padding(tokens):
    """Lengths as of film titles with their genres: most are short, few are long."""
    draw = random.Random(0)
    segments = [SegmentKey(0, (1,) * min(max(int(draw.lognormvariate(2.4, 0.45)), 4), 45)) for _ in range(420)]
    batches = list(network_m6rec._batches(list(range(420)), segments, tokens))
    assert sorted(number for batch in batches for number in batch) == list(range(420))
    sizes = [[len(segments[number][1]) for number in batch] for batch in batches]
    padded = [len(own) * max(own) for own in sizes]
    assert max(padded) <= tokens and sum(padded) < 1.15 * sum(map(sum, sizes)) and len(batches) <= 16


def test_refusals():
    model, row = build(SMALL[0]), torch.tensor([[SOURCE, USER, 40, SEG, SOURCE_END]])
    with pytest.raises(ValueError, match="'fastest'"):
        model(row, plan="fastest")
    with pytest.raises(ValueError, match="'cached' takes whole rows"):
        model(row, plan="cached", use_cache=True)
    with pytest.raises(ValueError, match=r"\[SEG\]"):
        model.embed_items(torch.tensor([[ITEM, 40, 41]]))
    lone_target_first = torch.tensor([[BOS, ITEM, 40, SEG, EOS, SOURCE, USER, 41, SEG, OPTION, 18, SEG, SOURCE_END]])
    with pytest.raises(ValueError, match="one request a row"):
        model(lone_target_first, plan="shared_prefix")
