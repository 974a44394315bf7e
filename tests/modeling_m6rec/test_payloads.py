"""Segments with equal ids that carry different payloads share no state, in any plan and in any cache."""

import itertools

import pytest
import torch

from m6rec import SegmentCache
from m6rec.layout_m6rec import SegmentKey
from m6rec.network_m6rec import M6RecModel, last_states
from m6rec.segment_cache_m6rec import UserStates
from tests.modeling_m6rec.tiny import BOS, EOS, EVENT, GRID, ITEM, PLANS, SEG, SOURCE, SOURCE_END, build, close, pad

SETTINGS = next(s for s in GRID if s["num_joint_layers"] == 2 and s["history_attention"] == "causal")
LIGHT, DARK = b"light", b"dark"
ITEM_IDS = (ITEM, 40, 41, SEG)
VERB = (EVENT, 50, SEG)
ROW = [SOURCE, *VERB, *ITEM_IDS, *VERB, *ITEM_IDS, SOURCE_END, BOS, *ITEM_IDS, EOS, BOS, *ITEM_IDS, EOS]
FIRST, SECOND, CANDIDATE, OTHER = 3, 5, 8, 11
"""Numbers of the segments of the four items."""


@pytest.fixture(autouse=True)
def embedding(monkeypatch):
    """What a segment carries moves the embeddings of all its tokens."""

    def embed(self, ids, lay, payloads=()):
        states = self.embeddings.tokens(ids)
        for row, own in enumerate(payloads):
            for number, payload in own.items():
                moved = (lay.segment[row] == number) & lay.valid[row]
                states = states + torch.zeros_like(states).index_fill(0, torch.tensor(row), 1.0) * (
                    moved[:, None] * sum(payload) / 500
                )
        return states

    monkeypatch.setattr(M6RecModel, "embed_ids", embed)


def numbers(model, payloads, **more):
    """Scores and last user vectors; a user's kept beginning is left out of the vectors."""
    batch = pad([ROW] * len(payloads))
    with torch.no_grad():
        out = model(**batch, payloads=payloads, return_logits=False, **more)
    return out.scores, torch.stack([own[own.isfinite().all(-1)][-1] for own in out.user_vectors])


MIXED = [
    {},
    {FIRST: LIGHT, SECOND: DARK, CANDIDATE: LIGHT},
    {FIRST: DARK, SECOND: LIGHT, CANDIDATE: LIGHT, OTHER: DARK},
    {CANDIDATE: DARK, OTHER: LIGHT},
]


def test_the_payloads_tell_the_rows_apart():
    scores, users = numbers(build(SETTINGS), MIXED, plan="flat")
    for one, other in itertools.combinations(range(len(MIXED)), 2):
        assert not torch.allclose(scores[one], scores[other], atol=1e-3)
    close(scores[0, 0], scores[0, 1])
    assert not torch.allclose(scores[3, 0], scores[3, 1], atol=1e-3)
    assert not torch.allclose(users[1], users[2], atol=1e-3)


@pytest.mark.parametrize("plan", PLANS[1:])
def test_each_plan_keeps_them_apart_within_a_batch(plan):
    model = build(SETTINGS)
    for found, expected in zip(numbers(model, MIXED, plan=plan), numbers(model, MIXED, plan="flat")):
        close(found, expected)


def test_caches_keep_them_apart_between_calls(tmp_path):
    model, users = build(SETTINGS), UserStates()
    caches = [SegmentCache(directory=tmp_path), SegmentCache(directory=tmp_path)]
    for cache, _ in itertools.product(caches, range(2)):  # cold, then warm; then from the disk
        for payload in MIXED:
            expected = numbers(model, [payload], plan="flat")
            for more in ({}, {"user_states": users}):
                for found, own in zip(numbers(model, [payload], plan="cached", segment_cache=cache, **more), expected):
                    close(found, own)
    assert caches[0].misses == caches[1].disk_hits > 0 == caches[1].misses
    assert users.positions_reused and len(users) == 3  # the last row has the source of the first


def test_a_user_goes_on_from_a_beginning_with_the_same_payloads_only():
    model, users = build(SETTINGS), UserStates()
    for payload in ({FIRST: LIGHT}, {FIRST: LIGHT, SECOND: DARK}, {FIRST: DARK, SECOND: DARK}):
        before = users.positions_reused
        expected = numbers(model, [payload], plan="flat")
        for found, own in zip(numbers(model, [payload], plan="cached", user_states=users), expected):
            close(found, own)
        assert (users.positions_reused > before) == (SECOND in payload)


def test_items_that_stand_alone_are_kept_apart():
    network, cache = build(SETTINGS).model, SegmentCache()
    keys = [SegmentKey(0, ITEM_IDS, payload) for payload in (b"", LIGHT, DARK)]
    with torch.no_grad():
        apart = torch.cat([last_states(network, [key]) for key in keys])
        close(last_states(network, keys, cache), apart)
        close(last_states(network, keys[::-1], cache), apart.flip(0))
        rows = network(**pad([ROW]), payloads=MIXED[1:2], standalone=keys, plan="cached", segment_cache=cache)
    close(rows.standalone_states, apart)
    assert (apart[:, None] - apart).abs().amax(-1).fill_diagonal_(1.0).min() > 1e-3
    assert cache.hits > len(keys)
