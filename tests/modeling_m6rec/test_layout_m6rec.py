"""The layout and the masks against the rules written a second time, as a walk over tokens."""

import itertools
import random

import pytest
import torch

from m6rec.configuration_m6rec import KINDS
from m6rec.layout_m6rec import joint_mask, layout, mean_at_close, pick, read_by_text, segment_mask, summary_keys
from tests.fast import some
from tests.modeling_m6rec.tiny import (
    BOS,
    EOS,
    EVENT,
    NOW,
    OPTION,
    SEG,
    SOURCE,
    SOURCE_END,
    TEXT,
    USER,
    WORDS,
    Writer,
    config_of_ids,
    name,
    pad,
    pairwise,
)


def slow_layout(row, mask):
    """The rules of the layout written as a walk over one row."""
    out = {
        field: [0] * len(row)
        for field in "source written request target kind event segment segment_position request_position".split()
    }
    structured = next((token in (SOURCE, BOS) for token, real in zip(row, mask) if real), False)
    region = request = target = event = segment = place = source_length = kind = 0
    document = -1
    in_event = text = False
    fresh = True
    for t, (token, real) in enumerate(zip(row, mask)):
        if not real:
            continue
        if structured:
            if token == SOURCE:
                request, region, event, in_event, text, place, source_length = request + 1, 1, 0, False, False, 0, 0
            if token == BOS:
                source_length = place if region == 1 else source_length
                region, target, text, place = 2, target + 1, False, source_length
            marker = token in (SOURCE, SOURCE_END, BOS, EOS)
            if marker or USER <= token <= OPTION or fresh:
                segment, kind = segment + 1, token - USER + 1 if USER <= token <= OPTION else 0
                pos = 0
            if region == 1 and token == EVENT:
                event, in_event = event + 1, True
            if region == 1 and token in (NOW, SOURCE_END):
                in_event = False
            text |= region == 2 and token == TEXT
            fresh = marker or token == SEG
        elif real != document:
            request, document = (0 if segment == 0 else request + 1), real
            segment, pos, place = segment + 1, 0, 0
        source = structured and region == 1
        values = dict(
            source=source,
            written=not structured or text,
            request=request,
            target=0 if source else target,
            kind=kind,
            event=event if source and in_event else 0,
            segment=segment,
            segment_position=pos,
            request_position=place,
        )
        for field, value in values.items():
            out[field][t] = int(value)
        pos, place = pos + 1, place + 1
    return out


def random_row(rng, length):
    return [
        rng.choice([SOURCE, SOURCE_END, BOS, EOS, SEG, SEG, *range(USER, OPTION + 1), 40, 41, 42])
        for _ in range(length)
    ]


def random_rows(seed):
    rng = random.Random(seed)
    rows = [random_row(rng, 40) for _ in range(40)]
    for row in rows[:30]:
        row[0] = rng.choice([SOURCE, SOURCE, BOS])
    mask = torch.ones(40, 40, dtype=torch.long)
    for row in range(40):
        mask[row, : rng.randint(0, 6)] = 0
        mask[row, 40 - rng.randint(0, 6) :] = 0
        if row % 3 == 0:
            mask[row, 20 : 20 + rng.randint(0, 4)] = 0
        if row % 2:  # several documents, where the row is plain; else the numbers say nothing
            mask[row] *= torch.tensor(sorted(rng.choices((1, 2, 3, 7), k=40)))
    return torch.tensor(rows), mask


@pytest.mark.parametrize("seed", range(6))
def test_layout_equals_the_walk_over_tokens(seed):
    ids, mask = random_rows(seed)
    lay = layout(ids, mask, config_of_ids())
    for row in range(len(ids)):
        for field, value in slow_layout(ids[row].tolist(), mask[row].tolist()).items():
            assert getattr(lay, field)[row].long().tolist() == value, (row, field)


@pytest.mark.parametrize("seed", range(6))
def test_layout_is_prefix_stable(seed):
    ids, mask = random_rows(seed)
    config = config_of_ids()
    whole = layout(ids, mask, config)
    for length in range(1, ids.shape[1]):
        for whole_field, field in zip(whole, layout(ids[:, :length], mask[:, :length], config)):
            assert torch.equal(whole_field[:, :length], field)


@pytest.mark.parametrize("seed", range(3))
def test_layout_does_not_depend_on_the_side_of_padding(seed):
    writer = Writer(seed)
    rows = [writer.source(n) + writer.candidate() for n in range(4)]
    for right, left in zip(*(layout(**pad(rows, side), config=config_of_ids()) for side in ("right", "left"))):
        for row, ids in enumerate(rows):
            assert torch.equal(right[row, : len(ids)], left[row, -len(ids) :])


WAYS = (True, False)
RULES = [
    dict(zip(("history", "forward", "document", "summary", "skipped"), values))
    for values in itertools.product(WAYS, WAYS, WAYS, (None, 1, 2), (None, ("event", "text")))
]


@pytest.mark.parametrize("ruled", some(RULES, pairwise(RULES)), ids=name)
def test_masks_equal_the_rules_token_by_token(ruled):
    history, forward, document, summary, skipped = ruled.values()
    ways = {True: "bidirectional", False: "causal"}
    config = config_of_ids(
        history_attention=ways[history],
        segment_attention=ways[forward],
        document_attention=ways[document],
        num_joint_layers=2,
        segment_summary=summary,
        skipped_kinds=skipped and list(skipped),
    )
    ids, mask = random_rows(7)
    lay = layout(ids, mask, config)
    keys = summary_keys(lay, ids == SEG, config)
    alone, together = segment_mask(lay, 40, config).tolist(), joint_mask(lay, 40, config, keys).tolist()
    tokens_of = ids.tolist()
    for row in range(len(ids)):
        rule = slow_layout(ids[row].tolist(), mask[row].tolist())
        real, source, written, segment = mask[row].tolist(), rule["source"], rule["written"], rule["segment"]
        members = {number: [t for t in range(40) if real[t] and segment[t] == number] for number in segment}
        is_key = list(map(bool, real))
        for tokens in members.values() if summary else ():
            if tokens and tokens_of[row][tokens[-1]] == SEG and not written[tokens[-1]]:
                for t in tokens[:-summary]:
                    is_key[t] = False
        for t in range(40):
            if rule["kind"][t] and KINDS[rule["kind"][t] - 1] in (skipped or ()) and not written[t]:
                is_key[t] = False
        for q, k in itertools.product(range(40), range(40)):
            if not real[q]:
                continue
            plain = document and written[q] and not rule["target"][q]
            see = real[k] and segment[q] == segment[k] and (k <= q or forward and not written[q] or plain)
            assert alone[row][q][k] == bool(see)
            if source[k]:
                see = k <= q or history and source[q]
            else:
                see = not source[q] and rule["target"][q] == rule["target"][k] and (k <= q or plain)
            assert together[row][q][k] == (see and is_key[k] and rule["request"][q] == rule["request"][k])


@pytest.mark.parametrize("history", ("causal", "bidirectional"))
def test_written_text_sees_the_past_of_its_source_and_target_token_by_token(history):
    settings = {"num_joint_layers": 2, "segment_summary": 1, "skipped_kinds": ["event"], "history_attention": history}
    plain, config = config_of_ids(**settings), config_of_ids(**settings, written_attention="source")
    ids, mask = random_rows(8)
    lay = layout(ids, mask, config)
    hidden, keys = (lay.event == 1), summary_keys(lay, ids == SEG, config)
    text_keys, read = lay.valid & ~hidden, read_by_text(lay)
    masks = segment_mask(lay, 40, config, hidden), joint_mask(lay, 40, config, keys & ~hidden, text_keys)
    before = segment_mask(lay, 40, plain, hidden), joint_mask(lay, 40, plain, keys & ~hidden)
    masks, before, hidden, real = ([each.tolist() for each in own] for own in (masks, before, hidden, mask))
    texts = 0
    for row in range(len(ids)):
        rule = slow_layout(ids[row].tolist(), real[row])
        seen = [False] * 40
        for q, k in itertools.product(range(40), range(40)):
            text = rule["written"][q] and rule["target"][q] > 0
            reach = rule["source"][k] or rule["target"][q] == rule["target"][k]
            see = bool(real[row][k]) and rule["request"][q] == rule["request"][k] and reach
            seen[k] |= bool(text) and see
            if not real[row][q]:
                continue
            texts += bool(text)
            for found, old in zip(masks, before):
                wanted = see and k <= q and not hidden[row][k] if text else old[row][q][k]
                assert found[row][q][k] == wanted, (row, q, k)
        assert read[row].tolist() == seen
    assert texts > 1000


def test_picked_tokens_go_back_where_they_came_from():
    slot = torch.tensor([[0, -1, 1, 0, 1, 1], [-1, 1, -1, -1, -1, -1]])
    states = torch.arange(1.0, 13).view(2, 6, 1)
    picked = pick(slot, 2)
    assert picked.columns[0].tolist()[:2] == [0, 3] and picked.columns[0].tolist()[3:] == [2, 4, 5]
    assert picked.present.tolist() == [[True, True, False, True, True, True], [False, False, False, True, False, False]]
    back = picked.back(picked.of(states), 6)
    assert torch.equal(back, states * (slot >= 0)[..., None])


def test_kinds_and_options_have_their_own_places():
    config = config_of_ids()
    assert set(config.kind_token_ids.values()).isdisjoint(config.structural_token_ids[:6])
    row = torch.tensor([[SOURCE, OPTION, 18, 19, SEG, SOURCE_END, BOS, EOS]])
    lay = layout(row, None, config)
    assert lay.kind[0].tolist() == [0, 9, 9, 9, 9, 0, 0, 0]
    assert lay.segment[0].tolist() == [1, 2, 2, 2, 2, 3, 4, 5]


@pytest.mark.parametrize("seed", range(3))
def test_the_mean_of_a_given_segment_stands_where_it_closes_and_nowhere_else(seed):
    config, writer = config_of_ids(), Writer(seed)
    written = [BOS, TEXT, WORDS[0], SEG, WORDS[1], EOS]  # a stray [SEG] in what is written closes nothing
    batch = pad([writer.source(2) + writer.candidate() + written, writer.source(1)[:-3]])
    ids = batch["input_ids"]
    lay, states = layout(ids, batch["attention_mask"], config), torch.randn(*ids.shape, 5)
    found = mean_at_close(states, lay, ids == SEG)
    for row, place in itertools.product(range(len(ids)), range(ids.shape[1])):
        wanted = states[row, place]
        if ids[row, place] == SEG and lay.valid[row, place] and not lay.written[row, place]:
            wanted = states[row, lay.segment[row] == lay.segment[row, place]].mean(0)
        torch.testing.assert_close(found[row, place], wanted)
    assert lay.written[0][ids[0] == SEG].any(), "the stray one is there"
