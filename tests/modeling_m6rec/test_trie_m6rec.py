"""A trie lets through exactly the live texts, and beam search under it ranks by likelihood."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList

from m6rec.trie_m6rec import ItemTrie, TrieProcessor
from tests.modeling_m6rec.tiny import BOS, EOS, PAD, SOURCE, SOURCE_END, TEXT, WORDS, Writer, build, pad

SMALL = settings(max_examples=15, deadline=None)
TEXTS = st.lists(st.integers(WORDS[0], WORDS[0] + 3), min_size=1, max_size=4).map(tuple)
CATALOGUES = st.lists(TEXTS, min_size=1, max_size=12)


def names(count, start=0):
    return [f"i{number}" for number in range(start, start + count)]


def twin(texts, live):
    """The tokens that may follow each prefix, as a dict: what a trie must equal."""
    found = {}
    for text, alive in zip(texts, live):
        for place, token in enumerate((*text, EOS) if alive else ()):
            found.setdefault(text[:place], set()).add(token)
    return found


def followers(trie, prefix):
    nodes = trie.root[None]
    for token in prefix:
        nodes = trie.step(nodes, np.array([token]))
    return set(trie.children(nodes)[1].tolist())


def check(trie, texts, live):
    expected = twin(texts, live)
    prefixes = {text[:place] for text in texts for place in range(len(text) + 1)}
    for prefix in prefixes | {(WORDS[-1],), (EOS,)}:
        assert followers(trie, prefix) == expected.get(prefix, set()), prefix
    for text in texts:
        same = [row for row, other in enumerate(texts) if other == text and live[row]]
        assert trie.items([*text, EOS, PAD, EOS]) == same
        assert trie.items(text) == []
    assert len(trie) == sum(live) and trie.depth >= max(map(len, texts)) + 1


@SMALL
@given(CATALOGUES, st.lists(CATALOGUES, max_size=3), st.data())
def test_a_trie_equals_a_dict_of_prefixes(texts, batches, data):
    trie = ItemTrie.from_texts(texts, names(len(texts)), EOS)
    for more in batches:
        trie, texts = trie.add(more, names(len(more), len(texts))), [*texts, *more]
    live = [True] * len(texts)
    check(trie, texts, live)
    gone = data.draw(st.sets(st.integers(0, len(texts) - 1)))
    smaller = trie.remove(f"i{row}" for row in gone)
    live = [row not in gone for row in range(len(texts))]
    check(smaller, texts, live)
    check(trie, texts, [True] * len(texts))  # what others still read has not changed
    flags = data.draw(st.lists(st.booleans(), max_size=len(texts)))
    check(trie.where(np.array(flags, bool)), texts, flags + [False] * (len(texts) - len(flags)))
    rows = [row for row in range(len(texts)) if row not in gone]
    kept = smaller.kept(rows)
    assert list(kept.ids) == [f"i{row}" for row in rows] and len(kept.pieces) <= 1
    if rows:
        check(kept, [texts[row] for row in rows], [True] * len(rows))


def test_pieces_are_merged_at_a_tenth():
    trie = ItemTrie.from_texts([(30, 31 + row % 40, 31 + row // 40) for row in range(1000)], names(1000), EOS)
    counts = []
    for number in range(300):
        trie = trie.add([(29, 30 + number % 40, 30 + number // 40)], [f"new{number}"])
        counts.append([len(piece.order) for piece in trie.pieces])
    assert counts[0] == [1000, 1] and max(map(len, counts)) <= 4
    assert any(len(own) == 1 for own in counts[1:]) and all(sum(own) == 1001 + n for n, own in enumerate(counts))
    assert len(followers(trie, (29,))) == 40 and len(trie) == 1300


def test_arrays_are_what_the_format_says():
    trie = ItemTrie.from_texts([(31, 30), (31,), (29,), (31, 30)], ["a", "b", "c", "d"], EOS)
    (piece,) = trie.pieces
    assert piece.token.tolist() == [-1, 29, 31, EOS, EOS, 30, EOS]
    assert piece.first.tolist() == [1, 3, 4, 6, 6, 6, 7, 7]
    assert piece.low.tolist() == [0, 0, 1, 0, 1, 2, 2] and piece.high.tolist() == [4, 1, 4, 1, 2, 4, 4]
    assert piece.order.tolist() == [2, 1, 0, 3] and piece.levels.tolist() == [0, 1, 3, 6, 7]
    assert {array.dtype for array in piece} == {np.dtype(np.int32)}


def test_a_saved_trie_is_the_same(tmp_path):
    texts = [(31, 30), (31,), (29,), (40, 41, 42)]
    trie = ItemTrie.from_texts(texts[:3], ["a", "b", "c"], EOS).add(texts[3:], ["电影"]).remove(["b"])
    trie.save(tmp_path / "trie.safetensors")
    loaded = ItemTrie.load(tmp_path / "trie.safetensors")
    check(loaded, texts, [True, False, True, True])
    assert list(loaded.ids) == ["a", "b", "c", "电影"]
    check(loaded.remove(["电影"]), texts, [True, False, True, False])
    whole = (tmp_path / "trie.safetensors").read_bytes()
    (tmp_path / "trie.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is damaged"):
        ItemTrie.load(tmp_path / "trie.safetensors")


def test_wrong_texts_and_ids_are_refused():
    with pytest.raises(ValueError, match="item 'b' is empty"):
        ItemTrie.from_texts([(30,), ()], ["a", "b"], EOS)
    with pytest.raises(ValueError, match="item 'a' contains the id that ends"):
        ItemTrie.from_texts([(30, EOS, 31), (30,)], ["a", "b"], EOS)
    with pytest.raises(ValueError, match="2 texts and 1 item ids"):
        ItemTrie.from_texts([(30,), (31,)], ["a"], EOS)
    trie = ItemTrie.from_texts([(30,), (31,)], ["a", "b"], EOS)
    with pytest.raises(ValueError, match="'z' is not among the 2 items"):
        trie.remove(["z"])
    with pytest.raises(ValueError, match="'a' is not among the 1 items"):
        trie.remove(["a"]).remove(["a"])
    with pytest.raises(ValueError, match="no item left"):
        TrieProcessor([trie.remove(["a", "b"])], 5, PAD)
    with pytest.raises(ValueError, match="made of one trie"):
        TrieProcessor([trie, ItemTrie.from_texts([(30,)], ["a"], EOS)], 5, PAD)


# ------------------------------------------------------------------------------------------------------ in `generate`


@functools.cache
def model():
    return build({"num_joint_layers": 2})


def prompts(lengths):
    writer = Writer(3)
    rows = [[SOURCE, *writer.segment(9), *writer.segment(12, 1, own), SOURCE_END, BOS, TEXT] for own in lengths]
    return pad([row + [40] * (number % 2) for number, row in enumerate(rows)], "left")


def likelihood(row, text):
    """The mean log-likelihood of a text and [EOS], by one forward pass without cache."""
    ids = torch.tensor([[*row, *text, EOS]])
    with torch.no_grad():
        logp = model()(ids, plan="flat").logits[0].log_softmax(-1)
    places = torch.arange(len(row), ids.shape[1])
    return float(logp[places - 1, ids[0, places]].mean())


def run(batch, tries, rows, **how):
    """Generate under a trie; also return the processor."""
    processor = TrieProcessor(tries, batch["input_ids"].shape[1], PAD)
    more = {"logits_processor": LogitsProcessorList([processor]), "max_new_tokens": 6, "num_return_sequences": rows}
    out = model().generate(**batch, **more, return_dict_in_generate=True, output_scores=True, **how)
    return processor, out


def search(batch, tries, beams, **how):
    """What beam search finds for each request: texts and scores."""
    processor, out = run(batch, tries, beams, num_beams=beams, do_sample=False, early_stopping="never", **how)
    found = processor.found(out.sequences)
    start = batch["input_ids"].shape[1]
    for place, own in enumerate(found):  # the library's own score of the row
        texts = out.sequences[place * beams : (place + 1) * beams, start:].tolist()
        for text, score in own:
            row = place * beams + [row[: len(text) + 1] for row in texts].index([*text, EOS])
            assert abs(out.sequences_scores[row] - score) < 1e-4
    return [[(tuple(text), score) for text, score in own] for own in found]


def draw(batch, tries, rows, **how):
    """The texts of each row."""
    _, out = run(batch, tries, rows, **how)
    return [tuple(row[: row.index(EOS)]) for row in out.sequences[:, batch["input_ids"].shape[1] :].tolist()]


HOW = st.sampled_from(["greedy", "beams", "sampling", "top_p"])


@settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])  # shrinking is slow
@given(CATALOGUES, CATALOGUES, st.lists(st.integers(1, 6), min_size=1, max_size=3), HOW, st.integers(2, 8), st.data())
def test_every_text_is_a_live_item(texts, more, lengths, how, beams, data):
    """Prefixes of others, equal texts, one token; added and removed items; a filter for each request; left padding."""
    trie = ItemTrie.from_texts(texts, names(len(texts)), EOS).add(more, names(len(more), len(texts)))
    texts = [*texts, *more]
    rows = range(len(texts))
    gone = data.draw(st.sets(st.sampled_from(rows), max_size=len(texts) - 1))
    trie = trie.remove(f"i{row}" for row in gone)
    live = [sorted({*rows} - gone - data.draw(st.sets(st.sampled_from(rows), max_size=2))) for _ in lengths]
    possible = [{texts[row] for row in own or sorted({*rows} - gone)} for own in live]
    tries = [trie.where(np.isin(rows, own)) if own else trie for own in live]
    batch = prompts(lengths)
    if how == "greedy":
        assert all(text in own for text, own in zip(draw(batch, tries, 1, do_sample=False), possible))
    elif how != "beams":
        drawn = draw(batch, tries, 3, do_sample=True, top_p=0.8 if how == "top_p" else 1.0)
        assert all(text in possible[number // 3] for number, text in enumerate(drawn))
    else:
        for number, found in enumerate(search(batch, tries, beams)):
            row = batch["input_ids"][number][batch["attention_mask"][number].bool()].tolist()
            assert found and {text for text, _ in found} <= possible[number]
            assert len({text for text, _ in found}) == len(found) <= beams
            assert all(abs(score - likelihood(row, text)) < 1e-4 for text, score in found)
            if beams >= len(possible[number]):
                best = sorted(possible[number], key=lambda text: -likelihood(row, text))
                assert [text for text, _ in found] == best


def test_caches_and_orders_of_rows_change_nothing():
    trie = ItemTrie.from_texts([(30, 31), (30,), (30, 31, 32), (33,), (34, 30)], names(5), EOS)
    batch, tries = prompts([1, 5]), [trie] * 2
    plain = [[text for text, _ in own] for own in search(batch, tries, 4)]
    assert plain[0] != plain[1]
    for how in ({"cache_implementation": "static"}, {"use_cache": False}):
        assert [[text for text, _ in own] for own in search(batch, tries, 4, **how)] == plain
    ids = torch.tensor([[1, 30, 31], [1, 33, EOS], [1, 39, 30], [1, 30, 31]])
    scores = torch.randn(4, model().config.vocab_size)
    whole = TrieProcessor([trie], 1, PAD)(ids, scores)
    turned = TrieProcessor([trie], 1, PAD)(ids.flip(0), scores.flip(0)).flip(0)
    assert torch.equal(whole, turned)
    allowed = [row.nonzero()[:, 0].tolist() for row in whole > -torch.inf]
    assert allowed == [[PAD, EOS, 32], [PAD], [PAD], [PAD, EOS, 32]] and whole[0, PAD] < -1e6
    assert torch.equal(whole[0, [EOS, 32]], scores[0, [EOS, 32]])


@pytest.mark.parametrize("more", [{"no_repeat_ngram_size": 1}, {"min_new_tokens": 4}, {"suppress_tokens": [31]}])
def test_settings_that_forbid_what_the_trie_needs_are_refused(more):
    trie = ItemTrie.from_texts([(30, 30), (31,)], names(2), EOS).where(np.array([True, "suppress_tokens" in more]))
    with pytest.raises(ValueError, match="no_repeat_ngram_size"):
        draw(prompts([2]), [trie], 1, do_sample=False, **more)
