"""What an exported graph can hold in place of `cummax`, `bincount` and choices by mask gives the very same numbers."""

import random

import pytest
import torch

from m6rec.item_features_m6rec import Tfidf
from m6rec.layout_m6rec import closes_item, latest, layout, mean_at_close, user_places
from tests.modeling_m6rec.tiny import GRID, PAD, SEG, VOCAB, Writer, build, config_of_ids, pad

STRUCTURE = [*range(4, 18)]


def hostile(seed, rows=24, tokens=40):
    """Rows in which structure stands in any order, several requests to a row, padding anywhere."""
    draw = random.Random(seed)
    words = [*STRUCTURE * 4, *range(29, VOCAB), PAD]
    return torch.tensor([[draw.choice([4, 6, 29]), *draw.choices(words, k=tokens - 1)] for _ in range(rows)])


def requests(seed):
    writer = Writer(seed)
    rows = [writer.source(n % 4) + writer.candidate() + writer.candidate() for n in range(12)]
    return pad([*rows, rows[0] + rows[5], rows[3] + rows[2] + rows[7]])["input_ids"]


EXAMPLES = [hostile(seed) for seed in range(4)] + [requests(0), requests(1), torch.full((2, 1), PAD)]


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
def test_latest_is_a_running_maximum(share):
    torch.manual_seed(0)
    where = torch.rand(17, 33) < share
    index = torch.arange(33).expand_as(where)
    assert torch.equal(latest(where), index.masked_fill(~where, -1).cummax(1).values)


@pytest.mark.parametrize("ids", EXAMPLES)
@pytest.mark.parametrize("skipped", [None, ["event"], ["now", "user"]])
def test_places_of_users_rise_above_all_before(ids, skipped):
    config = config_of_ids(skipped_kinds=skipped)
    lay = layout(ids, None, config)
    encoded = (lay.event > 0) | lay.source & (lay.kind == 1)
    left_out = torch.zeros_like(encoded)
    for kind in skipped or ():
        left_out |= (lay.kind == config.kind_token_ids[kind] - config.first_kind_token_id + 1) & ~lay.written
    reads = (ids == SEG) & encoded & ~left_out | lay.source & (ids == config.source_token_id)
    number = (lay.request * (ids.shape[1] + 1) + lay.event) * reads
    highest = torch.nn.functional.pad(number.cummax(1).values, (1, -1))
    place = (number > highest).cumsum(1)
    expected = torch.full((len(ids), int(place.max())), -1)
    for row, column in reads.nonzero().tolist():
        expected[row, place[row, column] - 1] = column
    assert torch.equal(user_places(ids, lay, config), expected)


@pytest.mark.parametrize("ids", EXAMPLES)
def test_mean_of_a_segment(ids):
    torch.manual_seed(0)
    lay = layout(ids, None, config_of_ids())
    states, closing = torch.randn(*ids.shape, 5), ids == SEG
    slots = int(lay.segment.max()) + 1
    slot = lay.segment + torch.arange(len(ids))[:, None] * slots
    count = torch.bincount(slot.flatten(), minlength=len(ids) * slots).clamp_min(1)
    total = states.new_zeros(len(count), 5).index_add(0, slot.flatten(), states.flatten(0, 1))
    expected = torch.where((closing & lay.valid & ~lay.written)[..., None], (total / count[:, None])[slot], states)
    assert torch.equal(mean_at_close(states, lay, closing), expected)


@pytest.mark.parametrize("ids", EXAMPLES)
@pytest.mark.parametrize("virtual", [0, 2])
def test_words_in_rows_are_those_of_bags(ids, virtual):
    network = build({**GRID[0], "bow_embeddings": True}).model
    lay = layout(ids, None, network.config)
    states = torch.randn(len(ids), virtual + ids.shape[1], network.config.hidden_size)
    item = (lay.kind == 4) & lay.valid & ~lay.written
    closing = item & (ids == SEG)
    words = item & ~closing & (lay.segment_position > 0)
    expected = states.clone()
    for row, column in closing.nonzero().tolist():
        own = ids[row][words[row] & (lay.segment[row] == lay.segment[row, column])]
        if len(own):
            bag = network.word_memory(own, torch.tensor([0]))[0]
            expected[row, virtual + column] += bag / torch.tensor(len(own)).sqrt()
    with torch.no_grad():
        assert torch.equal(network.add_to_rows(states, ids, lay), expected)


@pytest.mark.parametrize("ids", EXAMPLES)
def test_sketches_of_the_words_that_are_chosen(ids):
    model = build({**GRID[0], "tfidf_weight": 0.3})
    lay = layout(ids, None, model.config)
    closing = closes_item(ids, lay, model.config)
    items = int(closing.sum(1).max())
    expected = torch.zeros(len(ids), items, model.config.tfidf_dim)
    for row in range(len(ids)):
        for number, column in enumerate(closing[row].nonzero()[:, 0].tolist()):
            own = (lay.segment[row] == lay.segment[row, column]) & (lay.segment_position[row] > 0) & lay.valid[row]
            words = ids[row][own & (ids[row] != SEG)][None]
            here = torch.ones_like(words, dtype=torch.bool)
            expected[row, number] = model.model.word_sketch(words, torch.zeros_like(words), 1, here)[0]
    assert torch.equal(Tfidf().sketches(model.model, ids, lay, closing), expected)
