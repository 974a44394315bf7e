"""Writing honours the layout at every step, whatever the cache and the search."""

from unittest import mock

import pytest
import torch

from m6rec import network_m6rec
from m6rec.layout_m6rec import Continuation, joint_mask, layout, segment_mask
from tests.modeling_m6rec.tiny import (
    BOS,
    EOS,
    PAD,
    SMALL,
    SOURCE_END,
    TEXT,
    WORDS,
    Writer,
    build,
    close,
    everywhere,
    few,
    item_rows,
    pad,
    small,
)

CACHES = ({}, {"use_cache": False}, {"cache_implementation": "static"})


def brute_force(model, ids, mask, steps, call=None, **more):
    """Greedy decoding by whole forward passes, no cache."""
    call = call or (lambda ids, mask: model(input_ids=ids, attention_mask=mask, plan="flat", **more).logits)
    done = torch.zeros(len(ids), dtype=torch.bool)
    for _ in range(steps):
        with torch.no_grad():
            logits = call(ids, mask)[:, -1]
        logits[:, model.config.structural_token_ids] = float("-inf")
        token = logits.argmax(-1).masked_fill(done, PAD)
        done = done | (token == EOS)
        ids, mask = torch.cat((ids, token[:, None]), 1), torch.cat((mask, torch.ones_like(token)[:, None]), 1)
    return ids


def prompts(seed=9, plain=True):
    writer = Writer(seed)
    rows = [writer.prompt(n) for n in (0, 1, 3)]
    return pad(rows + [[40, 41, 42, 43]] if plain else rows, "left")


@everywhere
def test_generate_with_cache_equals_without_equals_brute_force(settings):
    wide = 1.0 if settings.get("norm_position") == "post" else 0.25  # post-norm evens out: wider weights vary more
    model, batch = build(settings, tie_word_embeddings=False, initializer_range=wide), prompts()
    expected = brute_force(model, batch["input_ids"], batch["attention_mask"], 8)
    assert len(set(expected[:, -8:].flatten().tolist())) > 5  # else the comparison would be empty
    for more in CACHES:
        text = model.generate(**batch, max_new_tokens=8, do_sample=False, **more)
        assert torch.equal(text, expected[:, : text.shape[1]]), more
    rows = {key: value[2:3] for key, value in batch.items()}  # prompt lookup takes one row only
    text = model.generate(**rows, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=2)
    assert torch.equal(text, expected[2:3, : text.shape[1]])
    beams = [
        model.generate(**batch, num_beams=3, max_new_tokens=8, min_new_tokens=8, do_sample=False, **more)
        for more in CACHES
    ]
    assert torch.equal(beams[0], beams[1]) and torch.equal(beams[0], beams[2])


@pytest.mark.parametrize("settings", [SMALL[0], SMALL[2], SMALL[-1]], ids=("segment", "bidirectional", "source"))
@pytest.mark.parametrize("cache", ({}, {"cache_implementation": "static"}), ids=("dynamic", "static"))
def test_the_layout_of_a_prompt_is_computed_once(settings, cache):
    model, batch, counted = build(settings), prompts(), []
    with mock.patch.object(network_m6rec, "layout", lambda *args: counted.append(args) or layout(*args)):
        for more in ({"do_sample": False}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}):
            counted.clear()
            model.generate(**batch, max_new_tokens=6, min_new_tokens=6, **more, **cache)
            assert len(counted) == 1


@pytest.mark.parametrize("settings", [SMALL[0], SMALL[-1], {"num_joint_layers": 4}], ids=("segment", "source", "joint"))
def test_a_layout_that_is_continued_is_the_layout_of_all_ids(settings):
    """Token by token, also after an [EOS] that ends a text."""
    config, batch = build(settings).config, prompts()
    ids, mask, going = batch["input_ids"], batch["attention_mask"], None
    torch.manual_seed(0)
    for step in range(9):
        lay = layout(ids, mask, config)
        hidden = lay.event == 1
        masks = segment_mask(lay, 1, config, hidden), joint_mask(lay, 1, config, lay.valid & ~hidden)
        wanted = Continuation.after(ids, lay, masks, config)
        if going is not None:
            for found, field in zip((*going.last, *going[1:]), (*wanted.last, *wanted[1:])):
                assert torch.equal(found.long(), field.long()), step
        token = torch.randint(WORDS[0], WORDS[-1], (len(ids), 1))
        token[step % 4] = EOS if step % 3 == 1 else token[step % 4]
        going = wanted.followed_by(token, config)
        ids, mask = torch.cat((ids, token), 1), torch.cat((mask, torch.ones_like(token)), 1)
    assert Continuation.after(ids[:, :4], layout(ids[:, :4], None, config), masks, config) is None


@few
def test_beams_find_what_an_exhaustive_search_finds(settings):
    """With as many beams as there are words, two steps of beam search are exhaustive."""
    model, batch = build(settings), {key: value[1:2] for key, value in prompts().items()}
    allowed = [index for index in range(model.config.vocab_size) if index not in model.config.structural_token_ids]

    def logp(ids):
        with torch.no_grad():
            out = model(input_ids=ids, plan="flat").logits[:, -1].log_softmax(-1)
        out[:, model.config.structural_token_ids] = float("-inf")
        return out

    ids = batch["input_ids"]
    first = logp(ids)[0]
    best, pair = -float("inf"), None
    for token in (token for token in allowed if token != EOS):
        second = logp(torch.cat((ids, torch.tensor([[token]])), 1))[0]
        second[EOS] = -float("inf")
        if first[token] + second.max() > best:
            best, pair = first[token] + second.max(), [token, int(second.argmax())]
    text = model.generate(**batch, num_beams=len(WORDS) + 5, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert text[0, -2:].tolist() == pair


@few
def test_left_padding_changes_no_text(settings):
    model, batch = build(settings), prompts()
    together = model.generate(**batch, max_new_tokens=6, do_sample=False)
    for row in range(4):
        ids = batch["input_ids"][row : row + 1, batch["attention_mask"][row].argmax() :]
        alone = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        assert together[row, batch["input_ids"].shape[1] :][: len(alone)].tolist() == alone.tolist()


@small
def test_a_row_may_end_long_before_others_also_without_padding(settings):
    """The library gives no mask of rows of one length; then only pad ids are padding."""
    model, writer = build(settings), Writer(3)
    rows = [[*writer.head(1), SOURCE_END, BOS, TEXT] for _ in range(40)]
    rows = [row for row in rows if len(row) == len(rows[0])][:2]
    ids = torch.tensor(rows)
    start = ids.shape[1]

    def ends(written, scores):
        scores = scores.clone()
        scores[1, EOS] = -torch.inf
        scores[0, EOS] = 1e9 if written.shape[1] == start + 1 else -torch.inf
        return scores

    text = model.generate(ids, max_new_tokens=6, do_sample=False, logits_processor=[ends])
    assert text[0, start + 1 :].tolist() == [EOS, PAD, PAD, PAD, PAD]
    alone = model.generate(
        ids[1:],
        max_new_tokens=6,
        do_sample=False,
        logits_processor=[lambda written, scores: ends(written, scores.expand(2, -1))[1:]],
    )
    assert torch.equal(text[1:], alone)


@few
def test_sampling_writes_no_structure_and_honours_own_suppressions(settings):
    model, batch = build(settings), prompts()
    torch.manual_seed(1)
    text = model.generate(**batch, max_new_tokens=40, do_sample=True, temperature=3.0, suppress_tokens=[50])
    new = text[:, batch["input_ids"].shape[1] :]
    seen = set(new.flatten().tolist())
    assert len(seen) > 20 and 50 not in seen
    assert seen & set(model.config.structural_token_ids) <= {PAD}  # padding after [EOS] only
    for row in new:
        ended = (row == EOS).cumsum(0).bool()
        assert not (row[~ended] == PAD).any()


@few
def test_generate_carries_item_ids(settings):
    model, batch = build(settings), prompts()
    memory = item_rows(batch["input_ids"])
    expected = brute_force(model, batch["input_ids"], batch["attention_mask"], 8, item_embedding_ids=memory)
    for more in CACHES:
        text = model.generate(
            **batch, layout_ids=batch["input_ids"], item_embedding_ids=memory, max_new_tokens=8, do_sample=False, **more
        )
        assert torch.equal(text, expected[:, : text.shape[1]])


@small
def test_cached_logits_equal_uncached_step_by_step(settings):
    model, batch = build(settings), prompts()
    ids = torch.cat((batch["input_ids"], torch.randint(WORDS[0], WORDS[-1], (4, 6))), 1)
    mask = torch.cat((batch["attention_mask"], torch.ones(4, 6, dtype=torch.long)), 1)
    whole, start, cache = model(ids, mask, plan="flat").logits, batch["input_ids"].shape[1], None
    for end in (start, start + 1, start + 2, start + 6):
        begin = 0 if cache is None else cache.get_seq_length()
        out = model(ids[:, begin:end], mask[:, :end], layout_ids=ids[:, :end], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        valid = mask[:, begin:end].bool()
        close(out.logits[valid], whole[:, begin:end][valid])
        assert (out.user_vectors is None) == (begin > 0 or not model.config.num_segment_layers)


def test_generate_refuses_what_it_cannot_write():
    model, writer = build(SMALL[0]), Writer(1)
    source = torch.tensor([writer.source()])
    with pytest.raises(ValueError, match="TEXT"):
        model.generate(source, max_new_tokens=2)
    with pytest.raises(ValueError, match="left"):
        model.generate(**pad([writer.prompt(0), writer.prompt(3)]), max_new_tokens=2)
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate(**prompts(), max_new_tokens=2, prefill_chunk_size=4)
    with pytest.raises(ValueError, match="input_ids"):
        model.generate(inputs_embeds=torch.zeros(1, 3, 36), max_new_tokens=2)
    bidirectional = build(SMALL[0], document_attention="bidirectional")
    with pytest.raises(ValueError, match="both directions"):
        bidirectional.generate(torch.tensor([[40, 41]]), max_new_tokens=2)
    text = bidirectional.generate(**prompts(plain=False), max_new_tokens=2)
    assert text.shape[1] > prompts()["input_ids"].shape[1]


def test_chunks_that_cut_given_text_are_refused():
    writer = Writer(2)
    row = torch.tensor([writer.source(1) + writer.candidate()])
    for settings in (SMALL[0], SMALL[2]):
        model = build(settings)
        whole, lay = model(row, plan="flat").logits, model.model(row, plan="flat").layout
        for place in range(1, row.shape[1]):
            cache = model.model(row[:, :place], use_cache=True).past_key_values
            inside = lay.segment[0, place - 1] == lay.segment[0, place]
            inside |= settings["history_attention"] == "bidirectional" and bool(
                lay.source[0, place - 1] & lay.source[0, place]
            )
            chunk = {"input_ids": row[:, place:], "layout_ids": row, "past_key_values": cache}
            if inside:
                with pytest.raises(ValueError, match="cache ends inside"):
                    model(**chunk)
            else:
                close(model(**chunk).logits, whole[:, place:])


def test_a_filled_cache_needs_all_ids():
    model = build(SMALL[0])
    cache = model(torch.tensor([Writer(1).source()]), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="layout_ids"):
        model(torch.tensor([[5, 12, 40, 8, 7]]), past_key_values=cache)
    with pytest.raises(ValueError, match="layout_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 36))
    with pytest.raises(ValueError, match="holds 4 ids, but only 2"):
        model(torch.tensor([[40, 41]]), layout_ids=torch.tensor([[40, 41, 42, 43]]))


def test_the_end_of_a_segment_is_structure_and_is_never_written():
    model, batch = build(SMALL[0], lm_head_bias=True), prompts()
    seg = model.config.segment_token_id
    with torch.no_grad():
        model.lm_head.bias[seg] = 1e4  # the likeliest token by far
    for how in ({"do_sample": False}, {"do_sample": True}, {"num_beams": 2}):
        text = model.generate(**batch, max_new_tokens=4, **how)
        assert seg not in text[:, batch["input_ids"].shape[1] :]
    assert seg in model.config.structural_token_ids


@few
def test_guidance_takes_the_layout_of_both_prompts(settings):
    model, writer = build(settings, tie_word_embeddings=False), Writer(9)
    rows, against = pad([writer.prompt(1), writer.prompt(3)], "left"), pad([writer.prompt(0), writer.prompt(1)], "left")

    def guided(scale):
        text = model.generate(
            **rows,
            max_new_tokens=5,
            min_new_tokens=5,
            do_sample=False,
            guidance_scale=scale,
            negative_prompt_ids=against["input_ids"],
            negative_prompt_attention_mask=against["attention_mask"],
        )
        return text[:, -5:]

    def expected(scale):
        ids, masks = [[batch[name] for batch in (rows, against)] for name in ("input_ids", "attention_mask")]
        for _ in range(5):
            with torch.no_grad():
                first, second = (
                    model(one, mask, plan="flat").logits[:, -1].log_softmax(-1) for one, mask in zip(ids, masks)
                )
            logits = scale * (first - second) + second
            logits[:, [*model.config.structural_token_ids, EOS]] = float("-inf")
            token = logits.argmax(-1)[:, None]
            ids = [torch.cat((one, token), 1) for one in ids]
            masks = [torch.cat((mask, torch.ones_like(token)), 1) for mask in masks]
        return ids[0][:, -5:]

    for scale in (1.0, 1.5, 3.0):
        assert torch.equal(guided(scale), expected(scale)), scale
    with pytest.raises(ValueError, match="negative_prompt_ids"):
        model.generate(**rows, max_new_tokens=2, guidance_scale=2.0)
    with pytest.raises(ValueError, match="TEXT"):
        model.generate(
            **rows, max_new_tokens=2, guidance_scale=2.0, negative_prompt_ids=torch.tensor([writer.source()])
        )
