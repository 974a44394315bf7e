"""A catalogue's trie holds the texts of its live items at every moment."""

import copy
import pickle

import numpy as np
import pytest

from m6rec import Catalogue, M6RecProcessor
from tests.modeling_m6rec.shop import ITEMS, processor


def walks(trie):
    """All ids that can be written under a trie, and the items that they are."""
    found, open_ = {}, [((), trie.root)]
    while open_:
        written, nodes = open_.pop()
        for token in trie.children(nodes[None])[1].tolist():
            if token == trie.eos_token_id:
                found[written] = [trie.ids[row] for row in trie.items([*written, token])]
            elif all(other != (*written, token) for other, _ in open_):
                open_.append(((*written, token), trie.step(nodes[None], np.array([token]))[0]))
    return found


def texts(own, catalogue):
    """What a catalogue's trie must hold: the slow way."""
    found = {}
    for item_id in catalogue:
        (ids,) = own.written_ids(own.item_texts([catalogue.item(item_id)]))
        found.setdefault(tuple(ids), []).append(item_id)
    return found


def shop():
    return Catalogue.from_dataset(ITEMS, processor=processor())


def test_added_and_removed_items_count_at_once_and_old_states_stay():
    own, catalogue = processor(), shop()
    before = catalogue.snapshot()
    assert walks(catalogue.trie(own)) == texts(own, catalogue)
    catalogue.add([{"item_id": "n1", "title": "yoga mat, extra wide"}, {"item_id": "n2", "title": "水"}])
    catalogue.add([{"item_id": "n3", "title": "yoga mat", "category": "outdoor", "price": 21.0}])  # like i2, but its id
    catalogue.remove(["i0", "n2"])
    now = catalogue.snapshot()
    assert walks(catalogue.trie(own)) == texts(own, catalogue)
    assert ["i2", "n3"] in walks(catalogue.trie(own)).values()
    assert len(catalogue.trie(own)) == len(catalogue) == 9
    catalogue.add([{**ITEMS[1], "title": "a rain coat"}], replace=True)
    assert walks(catalogue.trie(own)) == texts(own, catalogue)
    assert walks(before.trie(own)) == texts(own, before) and walks(now.trie(own)) == texts(own, now)


def test_a_rebuilt_catalogue_keeps_its_texts(monkeypatch):
    own, catalogue = processor(), shop()
    catalogue.trie(own)
    catalogue.remove(["i1", "i5"])
    catalogue.add([{"item_id": "n1", "title": "a tent"}])
    counted = []
    given = M6RecProcessor.written_ids
    monkeypatch.setattr(M6RecProcessor, "written_ids", lambda self, own: counted.append(len(own)) or given(self, own))
    catalogue.build_index(None)
    catalogue.trie(own)
    catalogue.remove(["i2"])
    catalogue.build_index("flat")  # one base matrix: rows get new numbers
    assert catalogue.trie(own).ids == list(catalogue) and counted == [1]
    monkeypatch.undo()
    assert walks(catalogue.trie(own)) == texts(own, catalogue)
    for other in (copy.deepcopy(catalogue), pickle.loads(pickle.dumps(catalogue))):
        assert walks(other.trie(own)) == texts(own, other)
    other = processor(max_events=5)
    assert walks(catalogue.trie(other)) == texts(other, catalogue)


def test_a_filter_and_left_out_items_hold_for_one_call():
    own, catalogue = processor(), shop()
    some = catalogue.trie(own, exclude=["i0", "unknown", 7], filter=lambda item: item["category"] == "outdoor")
    assert sorted(sum(walks(some).values(), [])) == ["i2", "i4", "i6"]
    assert len(walks(catalogue.trie(own))) == 8
    with pytest.raises(ValueError, match="exclude"):
        catalogue.trie(own, exclude=[None])


def test_special_tokens_spelt_out_are_texts_and_long_texts_are_cut():
    own = processor(max_length=64)
    titles = ["[EOS] attack", "[BOS] [SEG]", "a", "aa", " a", "登", "long " * 60]
    catalogue = Catalogue.from_dataset(titles, processor=own)
    trie, found = catalogue.trie(own), walks(catalogue.trie(own))
    assert sorted(sum(found.values(), [])) == [str(number) for number in range(7)]
    assert trie.depth == 33
    written = {own.tokenizer.decode_text(ids).removeprefix(" "): names for ids, names in found.items()}
    assert written["[EOS] attack"] == ["0"] and written["a"] == ["2", "4"] and written["登"] == ["5"]


def test_items_with_unknown_characters_cannot_be_written(caplog, monkeypatch):
    own, catalogue, given = processor(), shop(), M6RecProcessor.written_ids
    unknown = [own.tokenizer.structural_ids["unk_token_id"]]
    monkeypatch.setattr(
        M6RecProcessor,
        "written_ids",
        lambda self, texts: [ids + unknown * ("mat" in text) for ids, text in zip(given(self, texts), texts)],
    )
    assert len(catalogue.trie(own)) == 7 and "1 items cannot be written, such as 'i2'" in caplog.text
