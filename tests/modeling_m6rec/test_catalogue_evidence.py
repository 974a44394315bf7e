"""Evidence in a catalogue: searches equal a slow twin, counts depend on the events alone, and none is lost."""

import copy
import errno
import gc
import hashlib
import json
import math
import os
import random
import signal
import threading
import time
import types
from dataclasses import replace

import numpy as np
import pandas
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from m6rec import Catalogue, M6RecConfig, catalogue_m6rec
from m6rec.catalogue_m6rec import EVENTS, EVIDENCE, JOURNAL, MANIFEST, TEXTS_ONLY, Past
from m6rec.item_features_m6rec import Evidence, ItemWeights, Postings, Reader
from tests.fast import examples, meet
from tests.modeling_m6rec.conversion.backbones import own_tokenizer
from tests.modeling_m6rec.faults import finish, fork

WIDTH = 4
TITLES = ["red shoes", "blue shoes", "red hat", "tea pot", "green tea", "tea", "", "a red tea pot", "hat", "shoes"]
MODEL = types.SimpleNamespace(config=M6RecConfig.preset("tiny", embedding_dim=WIDTH), fingerprint=lambda: "f" * 64)
PROCESSOR = types.SimpleNamespace(item_texts=lambda items: [item["title"] for item in items])
RULE = Evidence(learnt=0.5)
TOKENIZER = own_tokenizer("bert")
READER = Reader.quantized(
    TOKENIZER.backend_tokenizer.to_str(), np.random.default_rng(0).normal(size=(len(TOKENIZER) - 5, 6)), 5, "of a test"
)


def item(number, title=None):
    return {"item_id": f"i{number}", "title": TITLES[number % len(TITLES)] if title is None else title}


def vector(item):
    seed = int.from_bytes(hashlib.sha256(repr(sorted(item.items())).encode()).digest()[:4], "little")
    return torch.nn.functional.normalize(torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.fixture(autouse=True)
def embedded(monkeypatch):
    def embed(items, *_):
        return torch.stack([vector(each) for each in items]) if items else torch.empty(0, WIDTH)

    monkeypatch.setattr(catalogue_m6rec, "embed", embed)


LINEAR = np.random.default_rng(1).normal(size=(6, 6)).astype(np.float32)
LINEAR[np.random.default_rng(2).random((6, 6)) < 0.3] = 0
"""Weights of a linear model from each of the first six items to each of them; they stay when items go and come."""


def make(count=10, rule=RULE):
    items = [item(number) for number in range(count)]
    without = rule and replace(rule, linear=0.0)
    catalogue = Catalogue.from_dataset(items, MODEL, PROCESSOR, evidence=without, reader=READER)
    if rule and rule.linear:
        catalogue.set_evidence(rule, item_weights=weights(count))
    return catalogue


def weights(count):
    """`LINEAR` for a catalogue of `count` items, in the order of their numbers."""
    table = np.zeros((count, count), np.float32)
    table[:6, :6] = LINEAR[:count, :count]
    return ItemWeights.of_rows(np.tile(np.arange(count), (count, 1)), table)


def users(count=3, seed=0):
    drawn = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(drawn, dim=-1)


def event(user, number, time=None):
    found = {"user_id": user, "item_id": f"i{number}"}
    return found if time is None else {**found, "timestamp": time}


# ------------------------------------------------------------------------------------------------------- the slow twin


def slow_counts(rule, events):
    """Sum over pairs of events of each user; `events` in the order in which they came."""
    counts, end = {}, max((each["timestamp"] for each in events), default=0)
    for user in {each["user_id"] for each in events}:
        own = sorted((each for each in events if each["user_id"] == user), key=lambda each: each["timestamp"])
        for later in range(len(own)):
            for step, weight in enumerate(rule.steps, 1):
                if later >= step and own[later - step]["item_id"] != own[later]["item_id"]:
                    if rule.half_life is not None:
                        weight *= 0.5 ** ((end - own[later]["timestamp"]) / rule.half_life)
                    pair = own[later - step]["item_id"], own[later]["item_id"]
                    ways = [1, rule.backwards]
                    if rule.share_ties and own[later - step]["timestamp"] == own[later]["timestamp"]:
                        ways = [sum(ways) / 2] * 2
                    for each, way in zip((pair, pair[::-1]), ways):
                        counts[each] = counts.get(each, 0) + weight * way
    return counts


def slow_words(texts):
    words = sorted({word for text in texts for word in text.split()})
    found = [sum(word in text.split() for text in texts) for word in words]
    rarity = [math.log((1 + len(texts)) / (1 + number)) + 1 for number in found]

    def read(text):
        own = np.array([weight if word in text.split() else 0.0 for word, weight in zip(words, rarity)])
        unknown = {*text.split()} - {*words}
        return own / max(math.sqrt((own**2).sum() + len(unknown) * (math.log(1 + len(texts)) + 1) ** 2), 1e-12)

    return read


def slow_reader(texts):
    """Sums of tokens' vectors, each token once, by its rarity among the texts."""
    tokens = {text: {*TOKENIZER(text, add_special_tokens=False)["input_ids"]} for text in [*texts, *TITLES]}

    def read(text):
        own = tokens.get(text) or {*TOKENIZER(text, add_special_tokens=False)["input_ids"]}
        found = np.zeros(6)
        for token in own - {*range(5)}:
            number = sum(token in tokens[each] for each in texts)
            weight = math.log((1 + len(texts)) / (1 + number)) + 1
            found += weight * READER.vectors[token - 5].astype(float) * READER.scales[token - 5]
        return found / max(np.linalg.norm(found), 1e-12)

    return read


def slow_shares(rule, times):
    """The weight of each item of a history: by the number of later items, or the mean of those of its tie."""
    ages = range(len(times) - 1, -1, -1)
    found = [rule.recency[age] if age < len(rule.recency) else 0.0 for age in ages]
    ties = [[place] for place in range(len(times))]
    for place in range(1, len(times)):
        if rule.share_ties and times[place] == times[place - 1]:
            ties[place] = ties[place - 1]
            ties[place].append(place)
    return [sum(found[other] for other in tie) / len(tie) for tie in ties]


def slow_weights(rule, history):
    """Each entry of a history with its weight: items count by later items, queries by later items and queries."""
    shares = iter(slow_shares(rule, [past.time for past in history if past.kind == "item"]))
    for place, past in enumerate(history):
        later = [other.kind for other in history[place + 1 :] if other.kind != "profile"]
        age = len(later) if past.kind == "query" else later.count("item")
        recency = rule.recency[age] if age < len(rule.recency) else 0.0
        if past.kind == "item":
            yield past, next(shares)
        else:
            yield past, rule.queries * recency if past.kind == "query" else rule.profile


NUMBERS = {f"i{number}": number for number in range(6)}


def slow_scores(rule, items, events, user, history):
    """All scores by dense matrices; `items` by id."""
    texts = [each["title"] for each in items.values()]
    counts, read, read_static = slow_counts(rule, events), slow_words(texts), slow_reader(texts)
    names = [*dict.fromkeys([*items, *(each["item_id"] for each in events)])]
    table = np.array([[counts.get((first, second), 0.0) for second in names] for first in names])
    table = table.reshape(len(names), len(names))
    follows = (
        table / np.maximum(table.sum(1), 1)[:, None] ** rule.out_power / np.maximum(table.sum(0), 1) ** rule.in_power
    )
    follows = rule.transitions * (follows + rule.second * follows @ follows) + rule.again * np.eye(len(names))
    met = np.log1p([sum(each["item_id"] == name for each in events) for name in names])
    scores = {}
    for name, own in items.items():
        score = rule.learnt * float(user.double() @ vector(own).double()) if rule.learnt else 0.0
        score += rule.popularity * met[names.index(name)] / max(met.max(), 1e-12)
        for past, weight in slow_weights(rule, history):
            text = items[past.item_id]["title"] if past.item_id in items else past.text
            words = rule.words if met[names.index(name)] else rule.words * (1 + rule.unseen)
            score += weight * words * float(read(text or "") @ read(own["title"]))
            score += weight * rule.texts * float(read_static(text or "") @ read_static(own["title"]))
            if {past.item_id, name} <= {*NUMBERS}:
                score += weight * rule.linear * float(LINEAR[NUMBERS[past.item_id], NUMBERS[name]])
            if past.item_id in names:
                score += weight * follows[names.index(past.item_id), names.index(name)]
        scores[name] = score
    return scores


def agree(found, scores, top_k, left_out=(), allowed=lambda name: True):
    """Compare a ranking with scores of all items, of which near equal ones may change places."""
    kept = {name: score for name, score in scores.items() if name not in left_out and allowed(name)}
    best = sorted(kept.values(), reverse=True)[:top_k]
    assert [score for _, score in found] == pytest.approx(best, abs=2e-6)
    assert all(score == pytest.approx(kept[name], abs=2e-6) for name, score in found)
    assert len({name for name, _ in found}) == len(found) == len(best)


RULES = [
    Evidence(learnt=0.5),
    Evidence(learnt=0.0),
    Evidence(learnt=1.0, half_life=40.0, popularity=0.2, again=0.7),
    Evidence(learnt=0.3, words=2.0, steps=(1.0, 0.0, 0.5), recency=(1.0, 0.5), backwards=1.0, second=0.0),
    Evidence(learnt=0.2, words=0.0, texts=0.7, queries=0.6, profile=1.5),
    Evidence(learnt=0.0, texts=0.4, popularity=0.1),
    Evidence(learnt=0.5, unseen=0.7),
    Evidence(learnt=0.2, linear=0.8, again=0.3),
    Evidence(learnt=0.3, share_ties=True, steps=(1.0, 0.7, 0.5), recency=(1.0, 0.5), half_life=40.0),
]
NAMES = ["rule", "untrained", "decay", "other", "texts", "both", "unseen", "linear", "ties"]
number = st.integers(0, 12)
moment = st.one_of(st.integers(0, 200), st.integers(0, 2))
batch = st.lists(st.tuples(st.sampled_from("abc"), number, moment), max_size=5)
titled = st.lists(st.tuples(number, st.sampled_from(TITLES)), max_size=3, unique_by=lambda own: own[0])
change = st.one_of(
    st.tuples(st.just("observe"), batch),
    st.tuples(st.just("forget"), st.lists(st.sampled_from("abcd"), max_size=2)),
    st.tuples(st.just("add"), titled),
    st.tuples(st.just("remove"), st.lists(number, max_size=2, unique=True)),
    st.tuples(st.sampled_from(["save", "compact", "copy", "encode"]), st.none()),
)
past = st.one_of(
    number.map(lambda own: Past(f"i{own}")),
    st.tuples(number, st.integers(0, 1)).map(lambda own: Past(f"i{own[0]}", time=float(own[1]))),
    st.tuples(number, st.sampled_from(TITLES)).map(lambda own: Past(f"i{own[0]}", own[1])),
    st.sampled_from([*TITLES, "an unknown tea"]).map(lambda text: Past(None, text)),
    st.tuples(st.sampled_from([*TITLES, "a tea cat"]), st.sampled_from(["query", "profile"])).map(
        lambda own: Past(None, *own)
    ),
)


SIZES = {"EXTRA": [0, 16], "MORE": [0, 96], "EXACT_SHARE": [1, 0.3], "POSTINGS": [0, 3, 4096], "AT_ONCE": [1, 128]}
"""How much of a search is done at once."""


@pytest.mark.parametrize(("kind", "name"), meet([None, "flat"], NAMES))
@settings(max_examples=examples(25), deadline=None)
@given(data=st.data())
def test_searches_are_those_of_dense_matrices(kind, name, data, tmp_path_factory):
    rule = RULES[NAMES.index(name)]
    with pytest.MonkeyPatch.context() as patch:
        for name, values in SIZES.items():
            patch.setattr(catalogue_m6rec, name, data.draw(st.sampled_from(values)))
        catalogue = make(6, rule)
        items, events = {own["item_id"]: own for own in map(item, range(6))}, []
        catalogue.build_index(kind)
        for name, what in data.draw(st.lists(change, max_size=6)):
            catalogue = apply(catalogue, name, what, items, events, tmp_path_factory)
        histories = data.draw(st.lists(st.lists(past, max_size=7), min_size=2, max_size=2))
        out, top_k = data.draw(st.sets(number, max_size=3)), data.draw(st.integers(1, 8))
        few = data.draw(st.booleans())
        found = catalogue.search(
            users(2),
            top_k,
            [{f"i{own}" for own in out}, None],
            (lambda fields: "tea" in fields["title"]) if few else None,
            histories,
        )
    for ranking, user, history, left_out in zip(found, users(2), histories, ({f"i{own}" for own in out}, ())):
        scores = slow_scores(rule, items, events, user, history)
        agree(ranking, scores, top_k, left_out, lambda name: not few or "tea" in items[name]["title"])


def apply(catalogue, name, what, items, events, folders):
    """Change a catalogue, and what the slow twin has."""
    if name == "observe":
        new = [event(*own) for own in what]
        catalogue.observe(new)
        events += new
    elif name == "forget":
        count = len(events)
        events[:] = [own for own in events if own["user_id"] not in what]
        assert catalogue.forget(what) == count - len(events)
    elif name == "add":
        new = [item(*own) for own in what]
        catalogue.add(new, MODEL, PROCESSOR, replace=True)
        for own in new:
            items.pop(own["item_id"], None)
            items[own["item_id"]] = own
    elif name == "remove":
        gone = [f"i{own}" for own in what if f"i{own}" in items]
        catalogue.remove(gone)
        for own in gone:
            del items[own]
    elif name == "save":
        folder = folders.mktemp("catalogue") / "kept"
        catalogue.save(folder)
        catalogue = Catalogue.load(folder)
    elif name == "copy":
        catalogue = copy.deepcopy(catalogue)
    elif name == "encode":
        catalogue.encode(MODEL, PROCESSOR)
    else:
        catalogue.build_index(None if catalogue.index is None else catalogue.index.kind)
    return catalogue


@pytest.mark.parametrize("kind", [None, "flat"])
def test_common_words_are_read_only_if_they_can_matter(kind, monkeypatch):
    catalogue = Catalogue.from_dataset(
        [item(number, f"shop {number // 2} {'sale' if number % 3 else 'new'}") for number in range(300)],
        MODEL,
        PROCESSOR,
        evidence=Evidence(learnt=0.02),
    )
    asked = {"top_k": 2, "histories": [["i7", "i30"], ["i101", Past(None, "sale 17")], ["i4"]]}
    expected = [dict(own) for own in catalogue.search(users(), **{**asked, "top_k": 300})]
    catalogue.build_index(kind)
    for name, value in (("EXACT_SHARE", 0.3), ("MORE", 0), ("POSTINGS", 50)):
        monkeypatch.setattr(catalogue_m6rec, name, value)
    if kind:
        monkeypatch.setattr(catalogue_m6rec, "_search_all", None)
    read, entries = [], Postings.entries
    monkeypatch.setattr(Postings, "entries", lambda own, words: read.append(words) or entries(own, words))
    found = catalogue.search(users(), **asked)
    common = {catalogue._state.counted.words.vocabulary[word] for word in ("shop", "sale", "new")}
    assert read and not common & {*np.concatenate(read).tolist()}
    for own, scores in zip(found, expected):
        agree(own, scores, 2)


# -------------------------------------------------------------------------------------------------------------- counts


def state(catalogue):
    """What was counted, to the bit."""
    transitions = catalogue._state.counted.transitions
    names = catalogue._state.counted.names
    keys, totals = transitions.counts()
    pairs = {(names[key >> 31], names[key & (1 << 31) - 1]): int(total) for key, total in zip(keys, totals)}
    return pairs, transitions.unit, {name: int(met) for name, met in zip(names, transitions.met) if met}


@pytest.mark.parametrize("settings_", [{}, {"half_life": 30.0}, {"share_ties": True}], ids=["plain", "decay", "ties"])
@settings(max_examples=examples(60), deadline=None)
@given(batches=st.lists(batch, max_size=5), gone=st.sets(st.sampled_from("abcd"), max_size=2))
def test_counts_depend_on_the_events_alone(settings_, batches, gone):
    """Not on batches nor on the order of users and times; and a user who is forgotten was never there."""
    rule = Evidence(learnt=0, **settings_)
    several, once, without = (make(3, rule) for _ in range(3))
    for own in batches:
        assert several.observe([event(*each) for each in own]) == len(own)
    every = [event(*each) for own in batches for each in own]
    once.observe(every)
    assert state(several) == state(once)
    several.forget(gone)
    without.observe([each for each in every if each["user_id"] not in gone])
    assert state(several) == state(without)
    several.observe([event("a", 1, 400), event("d", 2, 3)])
    without.observe([event("a", 1, 400), event("d", 2, 3)])
    assert state(several) == state(without)


def test_events_without_times_come_in_the_order_given():
    timed, plain = make(), make()
    timed.observe([event("a", number, 10 + number) for number in (0, 1, 2)])
    plain.observe([event("a", number) for number in (0, 1)])
    plain.observe(pandas.DataFrame([event("a", 2)]))
    assert state(timed) == state(plain)
    with pytest.raises(ValueError, match=r"events\[1\]: no timestamp, but others have one"):
        plain.observe([event("a", 0, 5), event("a", 1)])
    with pytest.raises(ValueError, match="half_life lets events decay by their age"):
        make(rule=Evidence(half_life=10)).observe([event("a", 0)])
    assert state(timed) == state(plain), "nothing was counted of what was refused"


def test_events_without_times_are_no_ties():
    sharing, plain = make(rule=replace(RULE, share_ties=True)), make()
    for each in (sharing, plain):
        each.observe([event("a", number) for number in (0, 1)] + [event("b", 3), event("a", 2)])
        each.observe([event("a", 5), event("b", 4)])
    assert state(sharing)[0] == state(plain)[0]
    sharing.observe([event("c", number, 7) for number in (0, 1)])
    plain.observe([event("c", number, 7) for number in (0, 1)])
    pairs, others = state(sharing)[0], state(plain)[0]
    assert pairs["i1", "i0"] == others["i1", "i0"] + (1 << 28) and pairs["i0", "i1"] == others["i0", "i1"] - (1 << 28)


def test_a_data_frame_is_read_as_its_rows():
    """By column: each way in which pandas marks a missing time is none."""
    rows = [event("a", 0, 1), event("a", 2, 3), event("b", 1, 2)]
    by_row, by_column = make(), make()
    by_row.observe(rows)
    by_column.observe(pandas.DataFrame(rows).assign(other="x"))
    assert state(by_row) == state(by_column)
    by_row, untimed = make(), pandas.DataFrame([event("a", 0), event("a", 2)])
    by_row.observe([event("a", 0), event("a", 2)])
    for missing in (float("nan"), pandas.NaT, pandas.NA, None):
        by_column = make()
        by_column.observe(untimed.assign(timestamp=missing))
        assert state(by_row) == state(by_column)
    with pytest.raises(ValueError, match=r"events\[1\]\.user_id"):
        make().observe(pandas.DataFrame([event("a", 0), event(pandas.NA, 1)]))
    with pytest.raises(ValueError, match=r"events\[0\]\.item_id"):
        make().observe(pandas.DataFrame({"user_id": ["a"]}))


def test_late_events_find_their_place():
    late, ordered = make(), make()
    ordered.observe([event("a", 0, 1), event("a", 1, 2), event("a", 2, 3)])
    late.observe([event("a", 0, 1), event("a", 2, 3)])
    late.observe([event("a", 1, 2)])
    assert state(late) == state(ordered)


def test_a_new_item_gets_evidence_with_its_first_buyers():
    catalogue = make(3, Evidence(learnt=0, words=0))
    catalogue.observe([event("a", 0, 1), event("a", 77, 2)])
    assert "i77" not in dict(catalogue.search(torch.zeros(1, WIDTH), 9, histories=[["i0"]])[0])
    catalogue.add([item(77)], MODEL, PROCESSOR)
    assert catalogue.search(torch.zeros(1, WIDTH), 1, histories=[["i0"]])[0][0] == ("i77", 1.0)


def test_settings_change_and_are_counted_anew():
    events = [event(user, number, 10 * number) for user in "ab" for number in range(4)]
    changed, fresh = make(rule=Evidence()), make(rule=Evidence(steps=(1,), backwards=0, words=1))
    for each in (changed, fresh):
        each.observe(events)
    assert state(changed) != state(fresh)
    changed.set_evidence(fresh.evidence)
    assert state(changed) == state(fresh) and changed.evidence == fresh.evidence
    assert changed.search(users(), 9, histories=[["i1"]] * 3) == fresh.search(users(), 9, histories=[["i1"]] * 3)


def test_without_evidence_a_catalogue_answers_as_before(tmp_path):
    plain, off = make(rule=None), make()
    expected = plain.search(users(), 4)
    off.observe([event("a", 0, 1), event("a", 1, 2)])
    off.set_evidence(None)
    assert off.search(users(), 4) == expected and off.evidence is None
    assert make(rule=Evidence()).search(users(), 4) == [
        [(name, pytest.approx(score)) for name, score in own] for own in expected
    ]
    with pytest.raises(ValueError, match="no evidence"):
        plain.search(users(), 4, histories=[[]] * 3)
    with pytest.raises(ValueError, match="no evidence: call set_evidence"):
        plain.observe([event("a", 0)])
    plain.save(tmp_path / "plain")
    assert '"format": 1,' in (tmp_path / "plain" / "catalogue.json").read_text()


def test_an_untrained_catalogue_gets_vectors_later():
    catalogue = make(rule=Evidence(learnt=0))
    catalogue.observe([event("a", 0, 1), event("a", 1, 2)])
    with pytest.raises(ValueError, match=r"call encode\(model, processor, learnt=0.5\)"):
        catalogue.set_evidence(Evidence(learnt=0.5))
    catalogue.encode(MODEL, PROCESSOR, learnt=0.5)
    expected = make(rule=Evidence(learnt=0.5))
    expected.observe([event("a", 0, 1), event("a", 1, 2)])
    assert catalogue.search(users(), 5, histories=[["i0"]] * 3) == expected.search(users(), 5, histories=[["i0"]] * 3)


@pytest.mark.parametrize(("texts", "linear"), [(0.0, 0.0), (0.6, 0.0), (0.0, 0.7)])
def test_evidence_scores_sum_to_what_search_adds(texts, linear):
    catalogue = make(rule=Evidence(learnt=0, popularity=0.5, again=0.3, texts=texts, linear=linear))
    catalogue.observe([event(user, number, number) for user in "abc" for number in range(3)])
    history = ["i0", Past(None, "tea pot"), "i2", Past("gone", "red"), "i1", "i2", "i0"]
    history = [Past(None, "a red tea", "profile"), *history[:5], Past(None, "a hat", "query"), *history[5:]]
    names = list(catalogue)
    found = catalogue.evidence_scores(history, names)
    scores = dict(catalogue.search(top_k=10, histories=[history])[0])
    assert found.words.shape == found.transitions.shape == found.texts.shape == (9, 10)
    assert not found.words[1:3].any() and not found.transitions[:3].any(), "older than the last five"
    assert found.words[0].any() and found.words[6].any() and found.texts.any() == bool(texts)
    assert found.sum() == pytest.approx([scores[name] for name in names], abs=1e-12)
    outside = catalogue.evidence_scores(history, [Past("new", TITLES[3]), Past(None, "")])
    assert outside.words[:, 0] == pytest.approx(found.words[:, 3]) and not outside.transitions.any()
    assert outside.texts[:, 0] == pytest.approx(found.texts[:, 3]) and not outside.texts[:, 1].any()
    assert not outside.words[:, 1].any() and not outside.popularity.any()


def test_texts_are_switched_on_and_off(tmp_path):
    catalogue, fresh = make(rule=Evidence(learnt=0)), make(rule=Evidence(learnt=0, texts=0.5))
    for each in (catalogue, fresh):
        each.remove(["i3"])
    with pytest.raises(ValueError, match="the processor that words them"):
        catalogue.set_evidence(fresh.evidence)
    catalogue.set_evidence(fresh.evidence, PROCESSOR, READER)
    assert catalogue.search(top_k=9, histories=[["i0"]]) == fresh.search(top_k=9, histories=[["i0"]])
    assert catalogue.evidence_digest() == fresh.evidence_digest()
    fresh.save(tmp_path / "kept")
    assert Reader.of(tmp_path / "kept" / "reader.safetensors").notice == "of a test"
    (tmp_path / "kept" / "reader.safetensors").unlink()
    with pytest.raises(ValueError, match=r"reader\.safetensors is missing: save the catalogue again"):
        Catalogue.load(tmp_path / "kept")
    catalogue.set_evidence(Evidence(learnt=0))
    assert catalogue._state.counted.reading is None
    catalogue.save(tmp_path / "plain")
    assert not (tmp_path / "plain" / "reader.safetensors").exists()


def test_weights_of_a_linear_model_are_learnt_elsewhere(tmp_path):
    catalogue, rule = make(6, Evidence(learnt=0)), Evidence(learnt=0, transitions=0, words=0, linear=2.0)
    with pytest.raises(ValueError, match="no weights between items: give item_weights, or set linear=0"):
        catalogue.set_evidence(rule)
    with pytest.raises(ValueError, match="item_weights has 5 rows, and the catalogue 6 items"):
        catalogue.set_evidence(rule, item_weights=weights(5))
    before = catalogue.evidence_digest()
    catalogue.set_evidence(rule, item_weights=weights(6))
    found = catalogue.search(top_k=6, histories=[["i1", "i4"]])
    expected = 2 * (LINEAR[4].astype(float) + 0.6 * LINEAR[1].astype(float))
    assert dict(found[0]) == pytest.approx({f"i{number}": own for number, own in enumerate(expected)}, abs=1e-7)
    catalogue.set_evidence(replace(rule, linear=1.0))  # they stay, and events do not change them
    catalogue.set_evidence(rule)
    catalogue.observe([event("a", 1, 1), event("a", 5, 2)])
    assert catalogue.search(top_k=6, histories=[["i1", "i4"]]) == found
    digest = catalogue.evidence_digest()
    assert digest != before
    catalogue.set_evidence(rule, item_weights=ItemWeights.of_rows(np.arange(6)[:, None], np.ones((6, 1))))
    assert catalogue.evidence_digest() != digest


# ---------------------------------------------------------------------------------------------------- without a model


def test_a_catalogue_needs_no_model(tmp_path):
    items = [item(number) for number in range(10)]
    catalogue = Catalogue.from_dataset(items[:9], reader=READER)
    expected = Catalogue.from_dataset(items[:9], MODEL, PROCESSOR, evidence=TEXTS_ONLY, reader=READER)
    asked = {"top_k": 9, "histories": [["i0"], [Past(None, "red tea", "query")], []]}
    assert catalogue.search(**asked) == expected.search(**asked)
    catalogue.add(items[9:])
    expected.add(items[9:], MODEL, PROCESSOR)
    for each in (catalogue, expected):
        each.observe([event("a", 0, 1), event("a", 9, 2)])
    assert catalogue.search(**asked)[0][0][0] == "i9"
    catalogue.save(tmp_path / "kept")
    again = Catalogue.load(tmp_path / "kept", MODEL)  # of any model
    assert again.search(**asked) == catalogue.search(**asked) == expected.search(**asked)
    again.encode(MODEL, PROCESSOR, learnt=0.5)
    again.check(MODEL)
    with pytest.raises(ValueError, match="made by a model with fingerprint ffff"):
        again.check(types.SimpleNamespace(fingerprint=lambda: "0" * 64))
    assert again.dimension == WIDTH and again.search(users(), 3, histories=asked["histories"])


def test_what_a_catalogue_without_a_model_cannot_do():
    with pytest.raises(ValueError, match=r"learnt=0.5, but there is no model"):
        Catalogue.from_dataset([item(0)], evidence=RULE)
    with pytest.raises(ValueError, match="search needs user_vectors, or histories"):
        make().search(histories=[["i0"]])
    with pytest.raises(ValueError, match="add needs the model"):
        make(3).add([item(7)])
    catalogue = Catalogue.from_dataset([item(0)], reader=READER)
    catalogue.set_evidence(None)
    with pytest.raises(ValueError, match="no model has made the catalogue's vectors"):
        catalogue.check(MODEL)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"words": -1}, "words=-1: give a number from 0 to 1000"),
        ({"steps": ()}, r"steps=\(\): give 1 to 100 numbers"),
        ({"recency": "abc"}, "recency='abc'"),
        ({"half_life": 0}, "half_life=0"),
        ({"learnt": float("nan")}, "learnt=nan"),
        ({"second": True}, "second=True"),
        ({"share_ties": 1}, "share_ties=1: give true or false"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Evidence(**wrong)


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        ([{"item_id": "i1"}], ValueError, r"events\[0\].user_id"),
        ([event("a", 1), {"user_id": "a"}], ValueError, r"events\[1\].item_id"),
        ([event("a", 1, "yesterday")], ValueError, r"events\[0\].timestamp"),
        (["a"], TypeError, r"events\[0\]: expected a mapping"),
        ("a", TypeError, "expected a list"),
    ],
)
def test_events_that_cannot_be_read_are_refused(wrong, kind, message):
    catalogue = make()
    with pytest.raises(kind, match=message):
        catalogue.observe(wrong)
    assert state(catalogue) == state(make())


# --------------------------------------------------------------------------------------------------------------- files


def kept(folder):
    """A catalogue with events in a folder."""
    catalogue = make()
    catalogue.observe([event(user, (number * number) % 7, 10 * number) for user in "abc" for number in range(5)])
    catalogue.save(folder)
    return catalogue


def test_events_are_in_the_folder_before_observe_returns(tmp_path):
    catalogue = kept(tmp_path / "catalogue")
    catalogue.observe([event("a", 6, 100), event("new", 8, 5)])
    catalogue.forget("b")
    again = Catalogue.load(tmp_path / "catalogue")
    assert state(again) == state(catalogue)
    assert (tmp_path / "catalogue" / JOURNAL).is_file()
    catalogue.save(tmp_path / "catalogue")
    assert not (tmp_path / "catalogue" / JOURNAL).exists()
    assert state(Catalogue.load(tmp_path / "catalogue")) == state(catalogue)
    events = pyarrow.parquet.read_table(tmp_path / "catalogue" / EVENTS)
    assert {*events["user_id"].to_pylist()} == {"a", "c", "new"}
    catalogue.observe([event("a", 1, 200)])
    assert state(Catalogue.load(tmp_path / "catalogue")) == state(catalogue)


def test_one_catalogue_at_a_time_writes_the_journal(tmp_path):
    kept(tmp_path / "catalogue")
    first, second = (Catalogue.load(tmp_path / "catalogue") for _ in range(2))
    first.observe([event("a", 6, 100)])
    before = state(second)
    with pytest.raises(BlockingIOError, match="another process, or another object"):
        second.observe([event("a", 7, 110)])
    with pytest.raises(BlockingIOError):
        second.save(tmp_path / "catalogue")
    assert state(second) == before
    del first
    gc.collect()
    second.observe([event("a", 7, 110)])
    expected = make()
    expected.observe([event(user, (number * number) % 7, 10 * number) for user in "abc" for number in range(5)])
    expected.observe([event("a", 6, 100), event("a", 7, 110)])
    assert state(second) == state(expected), "the events of the first were read before"
    assert state(Catalogue.load(tmp_path / "catalogue")) == state(expected)


def test_saving_never_loses_events_of_others(tmp_path):
    kept(tmp_path / "catalogue")
    first, other = Catalogue.load(tmp_path / "catalogue"), make()
    first.observe([event("a", 6, 100)])
    expected = state(first)
    del first
    gc.collect()
    for catalogue in (other, make(rule=None)):
        with pytest.raises(ValueError, match="holds events that were observed and not saved"):
            catalogue.save(tmp_path / "catalogue")
    late = Catalogue.load(tmp_path / "catalogue")
    early = Catalogue.load(tmp_path / "catalogue")
    late.save(tmp_path / "catalogue")
    with pytest.raises(ValueError, match="was saved anew"):
        early.save(tmp_path / "catalogue")
    with pytest.raises(ValueError, match="was saved anew"):
        early.observe([event("a", 1, 1000)])
    assert state(Catalogue.load(tmp_path / "catalogue")) == expected
    other.save(tmp_path / "catalogue")
    assert state(Catalogue.load(tmp_path / "catalogue")) == state(other)


def test_without_a_journal_events_stay_in_memory(tmp_path):
    kept(tmp_path / "catalogue")
    names = sorted(path.name for path in (tmp_path / "catalogue").iterdir())
    catalogue = Catalogue.load(tmp_path / "catalogue", journal=False)
    catalogue.observe([event("a", 6, 100)])
    assert sorted(path.name for path in (tmp_path / "catalogue").iterdir()) == names


def test_a_full_disk_counts_nothing(tmp_path, monkeypatch):
    catalogue = kept(tmp_path / "catalogue")
    catalogue.observe([event("a", 6, 100)])
    before, size = state(catalogue), (tmp_path / "catalogue" / JOURNAL).stat().st_size

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        catalogue.observe([event("a", 7, 110)])
    monkeypatch.undo()
    assert state(catalogue) == before and (tmp_path / "catalogue" / JOURNAL).stat().st_size == size
    catalogue.observe([event("a", 8, 120)])
    assert state(Catalogue.load(tmp_path / "catalogue")) == state(catalogue)


def test_events_may_be_left_out_of_a_folder(tmp_path):
    """As of one that is published: it ranks, and observes, but cannot say what to forget."""
    catalogue = kept(tmp_path / "catalogue")
    (tmp_path / "catalogue" / EVENTS).unlink()
    other = Catalogue.load(tmp_path / "catalogue", journal=False)
    asked = users(), 9, None, None, [["i1", "i2"]] * 3
    assert other.search(*asked) == catalogue.search(*asked)
    for message, change in {
        "not known what was counted of whom": lambda: other.forget("a"),
        "nothing can be counted anew": lambda: other.set_evidence(Evidence(steps=(1,))),
    }.items():
        with pytest.raises(ValueError, match=message):
            change()
    for each in (other, catalogue):
        each.observe([event("new", 0, 1000), event("new", 5, 1001)])
    assert other.search(*asked) == catalogue.search(*asked)
    other.save(tmp_path / "other")
    with pytest.raises(ValueError, match="not known"):
        Catalogue.load(tmp_path / "other").forget("a")


@pytest.mark.parametrize("name", [EVIDENCE, EVENTS, JOURNAL])
def test_damage_is_refused_by_the_name_of_the_file(tmp_path, name):
    catalogue = kept(tmp_path / "catalogue")
    catalogue.observe([event("a", 6, 100)])
    path = tmp_path / "catalogue" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        Catalogue.load(tmp_path / "catalogue")


def test_evidence_that_is_missing_is_refused(tmp_path):
    kept(tmp_path / "catalogue")
    (tmp_path / "catalogue" / EVIDENCE).unlink()
    with pytest.raises(ValueError, match=f"{EVIDENCE} is missing"):
        Catalogue.load(tmp_path / "catalogue")


def forge(folder, name, data):
    """Replace a file and sign it, as a stranger can."""
    (folder / name).write_bytes(data)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["sha256"][name] = hashlib.sha256(data).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("tensor", "value"),
    [
        ("keys", lambda own: own.flip(0)),
        ("keys", lambda own: own + (1 << 40)),
        ("totals", lambda own: own[1:]),
        ("totals", lambda own: -own),
        ("met", lambda own: own[1:]),
        ("met", lambda own: own.float()),
        ("latest", lambda own: own * float("nan")),
        ("names", lambda own: own[1:]),
        ("names", lambda own: torch.tensor(list(b'["a", 1]'), dtype=torch.uint8)),
        ("word_starts", lambda own: own.flip(0)),
        ("word_columns", lambda own: own + 1000),
        ("vocabulary", lambda own: torch.tensor(list(b"[]"), dtype=torch.uint8)),
    ],
)
def test_forged_evidence_is_refused(tmp_path, tensor, value):
    kept(tmp_path / "catalogue")
    tensors = load_file(tmp_path / "catalogue" / EVIDENCE)
    tensors[tensor] = value(tensors[tensor]).contiguous()
    forge(tmp_path / "catalogue", EVIDENCE, save(tensors))
    with pytest.raises(ValueError, match=f"{EVIDENCE} is damaged"):
        Catalogue.load(tmp_path / "catalogue")


@pytest.mark.parametrize("column", ["user_id", "item_number", "timestamp"])
def test_forged_events_are_refused(tmp_path, column):
    kept(tmp_path / "catalogue")
    rows = pyarrow.parquet.read_table(tmp_path / "catalogue" / EVENTS).to_pylist()
    for wrong in ({"user_id": "", "item_number": 99, "timestamp": float("inf")}[column], None):
        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([*rows[:-1], {**rows[-1], column: wrong}]), sink)
        forge(tmp_path / "catalogue", EVENTS, sink.getvalue().to_pybytes())
        with pytest.raises(ValueError, match=f"{EVENTS} is damaged"):
            Catalogue.load(tmp_path / "catalogue")


@pytest.mark.parametrize(
    ("tensor", "value"),
    [
        ("linear_starts", lambda own: own.flip(0)),
        ("linear_starts", lambda own: own[:0]),
        ("linear_columns", lambda own: own + 1000),
        ("linear_columns", lambda own: own.float()),
        ("linear_values", lambda own: own[1:]),
        ("linear_values", lambda own: own * float("nan")),
        ("linear_values", None),
    ],
)
def test_forged_item_weights_are_refused(tmp_path, tensor, value):
    make(rule=Evidence(learnt=0.5, linear=1.0)).save(tmp_path / "catalogue")
    tensors = load_file(tmp_path / "catalogue" / EVIDENCE)
    changed = {} if value is None else {tensor: value(tensors[tensor]).contiguous()}
    tensors = {name: own for name, own in tensors.items() if name != tensor} | changed
    forge(tmp_path / "catalogue", EVIDENCE, save(tensors))
    with pytest.raises(ValueError, match=f"{EVIDENCE} is damaged"):
        Catalogue.load(tmp_path / "catalogue")


@pytest.mark.parametrize("wrong", [{"words": -1}, {"unknown": 1}, {"steps": []}])
def test_forged_settings_are_refused(tmp_path, wrong):
    kept(tmp_path / "catalogue")
    path = tmp_path / "catalogue" / MANIFEST
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "evidence": {**manifest["evidence"], **wrong}}))
    with pytest.raises(ValueError, match=f"{MANIFEST} is damaged"):
        Catalogue.load(tmp_path / "catalogue")


# ----------------------------------------------------------------------------------------------- threads and processes


def observe_until_killed(folder, pipe, number):
    """Observe, tell what was acknowledged, and save now and then."""
    catalogue = Catalogue.load(folder)
    for round in range(100_000):
        name = f"{number}-{round}"
        catalogue.observe([event(name, 0, 1.0), event(name, 1, 2.0)])
        os.write(pipe, f"{name}\n".encode())
        if round % 7 == 6:
            catalogue.save(folder)


@pytest.mark.skipif(os.name != "posix", reason="kills processes")
@pytest.mark.parametrize("kills", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_kills_lose_no_event_that_was_acknowledged(tmp_path, kills):
    folder, chance = tmp_path / "catalogue", random.Random(0)
    make(2, Evidence(learnt=0)).save(folder)
    acknowledged = set()
    for number in range(kills):
        read, write = os.pipe()
        process = fork(lambda number=number, write=write: observe_until_killed(folder, write, number))
        os.close(write)
        with os.fdopen(read) as lines:
            for _ in range(chance.randint(1, 12)):
                acknowledged.add(lines.readline().strip())
            time.sleep(chance.uniform(0, 0.004))
            os.kill(process, signal.SIGKILL)
            acknowledged |= {line.strip() for line in lines if line.endswith("\n")}
        finish(process)
        found = Catalogue.load(folder)
        missing = acknowledged - {*found._log.numbers}
        assert not missing and len(found._log) == 2 * len(found._log.numbers), (number, missing)
        assert state(found) == state_of_pairs(len(found._log.numbers))


def state_of_pairs(count):
    one, half = count << 30, count << 29
    pairs = {("i0", "i1"): one, ("i1", "i0"): half}
    return (pairs, 1 / (1 << 30), {"i0": count, "i1": count}) if count else ({}, 1 / (1 << 30), {})


def test_threads_search_and_observe_at_once():
    catalogue = make(4, Evidence(learnt=0, words=0))
    raised, done = [], threading.Event()

    def watch():
        """Each answer is of one moment: what follows i0 has been counted as often as it follows i1."""
        while not done.is_set():
            view = catalogue.snapshot()
            found = [dict(own) for own in view.search(torch.zeros(2, WIDTH), 4, histories=[["i0"], ["i1"]])]
            if found[0]["i2"] != found[1]["i2"] or found != [
                dict(own) for own in view.search(torch.zeros(2, WIDTH), 4, histories=[["i0"], ["i1"]])
            ]:
                raised.append(found)

    def work(number):
        for round in range(30):
            names = [f"{number}-{round}-{item}" for item in range(2)]
            catalogue.observe([event(names[own], what, time) for own in range(2) for time, what in ((1, own), (2, 2))])
            if round % 3 == 0:
                catalogue.forget(names)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)] + [threading.Thread(target=watch)]
    for each in threads:
        each.start()
    for each in threads[:3]:
        each.join()
    done.set()
    threads[3].join()
    expected = make(4, Evidence(learnt=0, words=0))
    for user in range(60):
        expected.observe([event(f"{own}-{user}", what, time) for own in range(2) for time, what in ((1, own), (2, 2))])
    assert raised == [] and state(catalogue) == state(expected)
