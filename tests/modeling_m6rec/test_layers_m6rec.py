"""The layers' faster forms against slow ones that are written out, and the last layer for some tokens only."""

import pytest
import torch

from m6rec import SegmentCache, layers_m6rec, network_m6rec
from m6rec.layers_m6rec import SharedKeys, eager_attention_forward, shared_attention
from m6rec.layout_m6rec import Picked, gather_tokens
from tests.fast import meet
from tests.modeling_m6rec.tiny import BOS, GRID, ITEM, SEG, SMALL, WORDS, Writer, build, close, item_rows, name, pad

DIM, GROUPS, HEADS = 5, 2, 6


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def attended(query, keys, values, bias):
    """Attention of one query, written out: Q-less, over K x D keys and values with K biases."""
    weights = torch.stack([(query @ key) * 0.3 + extra for key, extra in zip(keys, bias)]).exp()
    return sum(weight * value for weight, value in zip(weights / weights.sum(), values))


def module():
    found = torch.nn.Module()
    return found.eval()


def test_plain_attention_is_attention():
    rows, queries, keys = 2, 3, 4
    query, bias = drawn(rows, HEADS, queries, DIM), drawn(rows, 1, queries, keys)
    key, value = drawn(rows, GROUPS, keys, DIM), drawn(rows, GROUPS, keys, DIM) * 2
    found, weights = eager_attention_forward(module(), query, key, value, bias, 0.3)
    for row in range(rows):
        for head in range(HEADS):
            group = head // (HEADS // GROUPS)
            for place in range(queries):
                wanted = attended(query[row, head, place], key[row, group], value[row, group], bias[row, 0, place])
                close(found[row, place, head], wanted)
    assert weights.shape == (rows, HEADS, queries, keys)
    close(weights.sum(-1), torch.ones(rows, HEADS, queries))


@pytest.mark.parametrize("biased", [True, False])
def test_a_row_that_goes_on_after_kept_keys_is_a_user_with_one_target(biased):
    users, queries, far, near = 3, 2, 4, 2
    query, bias = drawn(users, HEADS, queries, DIM), drawn(users, 1, queries, near)
    key, value = drawn(users, GROUPS, near, DIM), drawn(users, GROUPS, near, DIM) * 2
    unseen = drawn(users, 1, 1, far) if biased else None
    shared = SharedKeys(drawn(users, GROUPS, far, DIM), drawn(users, GROUPS, far, DIM) * 3, unseen)
    found, _ = eager_attention_forward(module(), query, *shared.before(key, value, bias), 0.3)
    close(found, shared_attention(query, key, value, bias, 0.3, shared))


@pytest.mark.parametrize("scores_at_once", [1, 200, 1 << 19])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("biased", [True, False])
def test_shared_attention_is_attention_to_both(monkeypatch, scores_at_once, queries, biased):
    monkeypatch.setattr(layers_m6rec, "SCORES_AT_ONCE", scores_at_once)
    users, slots, far, near = 2, 5, 4, 3
    query, bias = drawn(users * slots, HEADS, queries, DIM), drawn(users * slots, 1, queries, near)
    key, value = drawn(users * slots, GROUPS, near, DIM), drawn(users * slots, GROUPS, near, DIM) * 2
    unseen = drawn(users, 1, 1, far) if biased else None
    shared = SharedKeys(drawn(users, GROUPS, far, DIM), drawn(users, GROUPS, far, DIM) * 3, unseen)
    found = shared_attention(query, key, value, bias, 0.3, shared)
    assert found.shape == (users * slots, queries, HEADS, DIM)
    for row in range(users * slots):
        user = row // slots
        far_bias = torch.zeros(far) if unseen is None else unseen[user, 0, 0]
        for head in range(HEADS):
            group = head // (HEADS // GROUPS)
            keys = torch.cat((shared.key[user, group], key[row, group]))
            values = torch.cat((shared.value[user, group], value[row, group]))
            for place in range(queries):
                own = torch.cat((far_bias, bias[row, 0, place]))
                close(found[row, place, head], attended(query[row, head, place], keys, values, own))


def test_picking_tokens_and_putting_them_back():
    values = drawn(2, 4, 3)
    index = torch.tensor([[3, 0], [1, 1]])
    close(gather_tokens(values, index), torch.stack([values[0, [3, 0]], values[1, [1, 1]]]))
    close(gather_tokens(values[..., 0], index), torch.stack([values[0, [3, 0], 0], values[1, [1, 1], 0]]))
    back = Picked(index, torch.tensor([[True, True], [True, False]])).back(gather_tokens(values, index), 4)
    wanted = torch.zeros(2, 4, 3)
    wanted[0, 3], wanted[0, 0], wanted[1, 1] = values[0, 3], values[0, 0], values[1, 1]
    close(back, wanted)


@pytest.mark.parametrize(
    ("settings", "plan"),
    meet(GRID[::3], ["compact", "shared_prefix", "cached"]),
    ids=lambda own: own if isinstance(own, str) else name(own),
)
def test_what_heads_read_does_not_depend_on_the_other_tokens_of_the_last_layer(settings, plan):
    """Without logits the last layer is computed where heads read; with them everywhere."""
    model, writer = build(settings), Writer(1)
    rows = [writer.source(events) + writer.candidate() + writer.candidate() for events in (0, 3)]
    batch = pad([*rows, writer.source(1) + writer.candidate()])
    batch["item_embedding_ids"] = item_rows(batch["input_ids"])
    widths = []

    def watch(layer, inputs, output):
        widths.append(output.shape[0] * output.shape[1])

    handle = model.model.layers[-1].register_forward_hook(watch)
    with torch.no_grad():
        every = model(**batch, plan=plan, segment_cache=SegmentCache(), return_logits=True)
        all_tokens, widths[:] = sum(widths), []
        some = model(**batch, plan=plan, segment_cache=SegmentCache(), return_logits=False)
    handle.remove()
    assert sum(widths) < all_tokens
    close(some.scores, every.scores)
    if every.user_vectors is not None:
        close(some.user_vectors, every.user_vectors)
        close(some.item_vectors, every.item_vectors)


@pytest.mark.parametrize("settings", SMALL, ids=name)
def test_few_tokens_at_once_change_nothing(monkeypatch, settings):
    model, writer = build(settings), Writer(2)
    row = writer.source(3) + [token for _ in range(7) for token in writer.candidate()]
    batch = pad([row, writer.source(2) + writer.candidate()])
    with torch.no_grad():
        at_once = model.score(**batch, plan="cached")
        monkeypatch.setitem(network_m6rec.TOKENS_AT_ONCE, "cpu", 9)
        monkeypatch.setattr(layers_m6rec, "SCORES_AT_ONCE", 50)
        close(model.score(**batch, plan="cached"), at_once)


def test_targets_are_read_in_even_parts(monkeypatch):
    """Seven targets of three tokens beside [BOS]: two parts by TOKENS_AT_ONCE, none of which is a small rest."""
    model, writer = build(SMALL[0]), Writer(4)
    target = [BOS, ITEM, WORDS[0], SEG]
    sizes = []
    model.model.layers[-1].register_forward_hook(lambda layer, inputs, output: sizes.append(output.shape[0]))
    monkeypatch.setattr(network_m6rec, "TOGETHER", 0)
    monkeypatch.setitem(network_m6rec.TOKENS_AT_ONCE, "cpu", 9)
    with torch.no_grad():
        model(**pad([writer.source(1) + target * 7]), plan="shared_prefix", return_logits=True)
    assert sizes == [1, 4, 3]  # the source; 21 tokens are a little more than twice nine


@pytest.mark.parametrize("settings", SMALL, ids=name)
def test_short_and_long_keys_are_attended_alike(monkeypatch, settings):
    """Up to SHORT keys the plain form takes the place of the fused one."""
    model, writer = build(settings, attn_implementation="sdpa"), Writer(3)
    batch = pad([writer.source(3) + writer.candidate()])
    calls = []

    def plain(*args, **more):
        calls.append(args[2].shape[2])
        return eager_attention_forward(*args, **more)

    monkeypatch.setattr(layers_m6rec, "eager_attention_forward", plain)
    with torch.no_grad():
        monkeypatch.setattr(layers_m6rec, "SHORT", 1000)
        plainly = model.score(**batch, plan="compact")
        assert calls
        calls.clear()
        monkeypatch.setattr(layers_m6rec, "SHORT", 0)
        close(model.score(**batch, plan="compact"), plainly)
    assert not calls


@pytest.mark.parametrize("shape", [(1, 1), (1, 43), (3, 8)])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_norm_without_gradients_is_the_norm_with_gradients(shape, kind):
    norm, states = layers_m6rec.M6RecRMSNorm(24, 1e-6).to(kind), torch.randn(*shape, 24).to(kind)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    expected = norm(states)
    assert expected.requires_grad
    with torch.no_grad():
        assert torch.equal(norm(states), expected)


def test_positions_are_looked_up_as_they_are_computed(monkeypatch):
    rotary, states = build(SMALL[0]).model.rotary, torch.zeros(1, 1)
    with torch.no_grad():
        for last in (3, 290, 1100):
            positions = torch.randint(0, last, (2, 9), generator=torch.Generator().manual_seed(last))
            assert all(map(torch.equal, rotary(states, positions), rotary._computed(states, positions)))
        table = rotary._table
        rotary(states, positions)
        assert rotary._table is table and len(table.cos) > 1000
        monkeypatch.setattr(layers_m6rec, "MOST_KEPT", 9)
        assert rotary(states, torch.tensor([[40_000]]))[0].shape == (1, 1, 1, table.cos.shape[1])
        monkeypatch.undo()
        rotary.inv_freq *= 2  # a change in place, and one by replacement
        assert all(map(torch.equal, rotary(states, positions), rotary._computed(states, positions)))
        rotary.inv_freq = rotary.inv_freq * 2
        assert all(map(torch.equal, rotary(states, positions), rotary._computed(states, positions)))
    assert not torch.equal(rotary._table.cos, table.cos[: len(rotary._table.cos)])
