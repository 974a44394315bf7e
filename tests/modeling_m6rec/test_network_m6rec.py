"""Word memory: what is learnt of words by themselves, beside what the segment layers make of a text."""

import pytest
import torch
from torch.nn import functional

from m6rec import M6RecForRecommendation, SegmentCache

from .tiny import EVENT, IDS, ITEM, PLANS, SEG, SOURCE, SOURCE_END, TEXT, VOCAB, Writer, build, close, pad

WORDY = {"num_joint_layers": 2, "segment_summary": 1, "bow_embeddings": True}
ITEMS = [[ITEM, 40, 41, 40, SEG], [ITEM, 50, SEG], [ITEM, SEG]]


def by_hand(model, items):
    """The vectors of items, word by word."""
    states = model.item_states(**pad(items))
    found = []
    for state, (_, *words, _) in zip(states, items):
        for word in words:
            state = state + model.model.word_memory.weight[word] / len(words) ** 0.5
        found.append(functional.normalize(model.item_projection(model.item_norm(state)), dim=-1))
    return torch.stack(found)


def test_an_item_is_its_text_and_what_is_known_of_each_of_its_words():
    for pooling in ("last", "mean"):
        model = build(WORDY, segment_pooling=pooling)
        with torch.no_grad():
            wanted = by_hand(model, ITEMS)
            close(model.embed_items(**pad(ITEMS)), wanted)
            close(model.embed_items(**pad(ITEMS), states=model.item_states(**pad(ITEMS))), wanted)
            row = torch.tensor([[SOURCE, *ITEMS[0], *ITEMS[2], *ITEMS[1], SOURCE_END]])
            for plan in PLANS:
                close(model.embed(input_ids=row, plan=plan).item_vectors[0], wanted[[0, 2, 1]])
            with pytest.raises(ValueError, match="without bow_embeddings"):
                model.embed_items(states=model.item_states(**pad(ITEMS)))


def test_words_that_are_no_items_or_are_being_written_are_not_remembered():
    model, other = build(WORDY), build(WORDY)
    torch.nn.init.normal_(other.model.word_memory.weight)
    row = torch.tensor([[SOURCE, EVENT, 40, SEG, SOURCE_END, 5, TEXT, 41, 42, 7]])
    with torch.no_grad():
        close(model(row).logits, other(row).logits, rtol=0, atol=0)
        encoded = torch.cat((row[:, :4], torch.tensor([ITEMS[0]]), row[:, 4:]), 1)
        assert (model(encoded).logits - other(encoded).logits)[:, 12:].abs().max() > 1e-3


def test_of_new_models_no_word_is_known():
    model = build(WORDY)
    fresh = M6RecForRecommendation(model.config)
    assert not fresh.model.word_memory.weight.any()
    plain = build({**WORDY, "bow_embeddings": False})
    fresh.load_state_dict(plain.state_dict(), strict=False)
    row = torch.tensor([Writer(3).source(3)])
    with torch.no_grad():
        close(fresh.eval().embed(input_ids=row).user_vectors, plain.embed(input_ids=row).user_vectors, rtol=0, atol=0)


def test_word_memory_is_saved_and_is_part_of_the_fingerprint(tmp_path):
    model = build(WORDY)
    model.save_pretrained(tmp_path)
    again = M6RecForRecommendation.from_pretrained(tmp_path)
    assert torch.equal(again.model.word_memory.weight, model.model.word_memory.weight)
    before = model.fingerprint()
    assert again.fingerprint() == before
    with torch.no_grad():
        model.model.word_memory.weight[40, 0] += 1e-3
    assert model.fingerprint() != before


def test_states_in_a_cache_outlive_a_change_of_word_memory():
    model, cache = build(WORDY), SegmentCache()
    rows = torch.tensor([Writer(5).source(3)])
    with torch.no_grad():
        first = model.embed(input_ids=rows, plan="cached", segment_cache=cache).user_vectors
        model.model.word_memory.weight.mul_(-1)
        misses = cache.misses
        second = model.embed(input_ids=rows, plan="cached", segment_cache=cache).user_vectors
        assert cache.misses == misses and cache.hits > 0
        close(second, model.embed(input_ids=rows, plan="flat").user_vectors)
    assert (first - second).abs().max() > 1e-3


def test_word_memory_learns_of_the_words_that_were_read_and_of_no_others():
    model = build(WORDY).train()
    row = torch.tensor([[SOURCE, EVENT, 60, SEG, *ITEMS[0], SOURCE_END]])
    labels = torch.full_like(row, -100)
    labels[0, 8] = 1
    items = pad(ITEMS)
    batch = {"item_input_ids": items["input_ids"], "item_attention_mask": items["attention_mask"]}
    model(row, retrieval_labels=labels, **batch).loss.backward()
    learnt = model.model.word_memory.weight.grad.any(1).nonzero().flatten().tolist()
    assert learnt == [40, 41, 50]


def test_word_memory_grows_and_shrinks_with_the_vocabulary():
    model = build(WORDY)
    before = model.model.word_memory.weight.clone()
    model.resize_token_embeddings(VOCAB + 6)
    after = model.model.word_memory.weight
    assert torch.equal(after[:VOCAB], before) and not after[VOCAB:].any() and len(after) == VOCAB + 6
    model.resize_token_embeddings(VOCAB - 2)
    assert torch.equal(model.model.word_memory.weight, before[: VOCAB - 2])
    assert build({"num_joint_layers": 2}).resize_token_embeddings(VOCAB + 1).weight.shape[0] == VOCAB + 1
    assert IDS["vocab_size"] == VOCAB


def test_an_event_of_which_all_is_skipped_is_no_place_of_the_user():
    model = build({"num_joint_layers": 2, "segment_summary": 1}, skipped_kinds=["event"])
    verb, item = [EVENT, 30, SEG], [ITEM, 31, 32, SEG]
    whole = pad([[SOURCE, *verb, *item, *verb, *verb, *item, SOURCE_END]])
    with torch.no_grad():
        vectors = [model.embed(**whole, plan=plan).user_vectors for plan in PLANS]
    for found in vectors:
        assert found.shape[1] == 3 and found.isfinite().all()  # the head, and the two events with an item
        close(found, vectors[0])
