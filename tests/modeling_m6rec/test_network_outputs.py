"""The cache has two names, and both work wherever a cache goes in or comes out."""

import copy
import pickle

import pytest
import torch
from torch.utils import _pytree as pytree
from transformers import DynamicCache, GenerationConfig, StaticCache

from m6rec import M6RecOutput
from m6rec.network_m6rec import CACHE_NAMES, CachedOutput, one_cache
from tests.modeling_m6rec.test_generation import brute_force, prompts
from tests.modeling_m6rec.tiny import SMALL, Writer, build, close, pad

names = pytest.mark.parametrize("given", CACHE_NAMES)


def filled(model, ids):
    return model(ids, use_cache=True).cache


def test_outputs_have_the_cache_under_both_names():
    model, row = build(SMALL[0]), torch.tensor([Writer(1).source()])
    for out in (model(row, use_cache=True), model.model(row, use_cache=True)):
        assert isinstance(out, CachedOutput) and isinstance(out.cache, DynamicCache)
        for name in CACHE_NAMES:
            assert name in out and getattr(out, name) is out[name] is out.get(name) is out.cache
        assert [key for key in out if key in CACHE_NAMES] == ["cache"]  # one field
        assert any(part is out.cache for part in out.to_tuple())
    for out in (model(row), M6RecOutput(scores=torch.ones(1))):
        for name in CACHE_NAMES:
            assert name not in out and getattr(out, name) is None is out.get(name)
            assert out.get(name, 3) == 3
            with pytest.raises(KeyError):
                out[name]


@names
def test_outputs_take_the_cache_under_both_names(given):
    cache = DynamicCache()
    out, other = M6RecOutput(scores=torch.ones(1)), M6RecOutput(scores=torch.ones(1))
    setattr(out, given, cache)
    other[given] = cache
    for each in (out, other, copy.copy(out), pytree.tree_map(lambda leaf: leaf, out)):
        assert each.past_key_values is each["cache"] is cache and list(each.keys()) == ["scores", "cache"]
    assert pickle.loads(pickle.dumps(M6RecOutput(scores=torch.ones(1), cache=3))).past_key_values == 3


def test_no_warning_of_a_name_that_is_meant_to_work(caplog, recwarn):
    model, row = build(SMALL[0]), torch.tensor([Writer(1).source()])
    out = model(row, use_cache=True)
    assert out.past_key_values is out["past_key_values"]
    model.generate(**prompts(), max_new_tokens=2, do_sample=False)
    assert not [record for record in caplog.records if "deprecated" in record.getMessage()]
    assert not [warning for warning in recwarn if "past_key_values" in str(warning.message)]


@names
def test_forward_goes_on_from_a_cache_by_either_name(given):
    model, writer = build(SMALL[0]), Writer(2)
    source = writer.source(2)
    row = torch.tensor([source + writer.candidate()])
    ids, rest = row[:, : len(source)], row[:, len(source) :]
    for part in (model, model.model):
        out = part(rest, layout_ids=row, **{given: filled(model, ids)})
        whole = part(row, plan="flat")
        assert out[given].get_seq_length() == row.shape[1]
        got, want = (each.scores if part is model else each.last_hidden_state for each in (out, whole))
        close(got, want if part is model else want[:, len(source) :])


def test_two_caches_are_one_argument():
    model, row = build(SMALL[0]), torch.tensor([Writer(1).source()])
    first, second, empty = filled(model, row), filled(model, row), DynamicCache()
    assert one_cache(None, None) is None
    assert one_cache(first, None) is one_cache(None, first) is one_cache(first, first) is first
    assert one_cache(first, empty) is one_cache(empty, first) is first
    assert one_cache(empty, None) is one_cache(empty, DynamicCache()) is empty
    with pytest.raises(ValueError, match="two filled caches"):
        model(row, layout_ids=row, cache=first, past_key_values=second)


@names
@pytest.mark.parametrize("kind", ["dynamic", "static", "filled"])
def test_generate_uses_a_given_cache_by_either_name(given, kind, recwarn):
    model, batch = build(SMALL[0], tie_word_embeddings=False, initializer_range=0.25), prompts()
    size = batch["input_ids"].shape[1] + 6
    if kind == "static":
        cache = StaticCache(config=model.config, max_cache_len=size)
    else:
        cache = DynamicCache(config=model.config)
    if kind == "filled":  # what was read already, such as of a shared prompt
        model(batch["input_ids"][:, :-1], batch["attention_mask"][:, :-1], cache=cache)
    text = model.generate(**batch, max_new_tokens=6, min_new_tokens=6, do_sample=False, **{given: cache})
    expected = model.generate(**batch, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert torch.equal(text, expected)
    assert int(cache.get_seq_length()) == size - 1
    assert not [warning for warning in recwarn if "past_key_values" in str(warning.message)]


@pytest.mark.parametrize("settings", SMALL)
def test_assisted_decoding_writes_what_greedy_decoding_writes(settings):
    model = build(settings, tie_word_embeddings=False, initializer_range=0.25)
    assistant = copy.deepcopy(model)
    with torch.no_grad():  # it agrees now and then only
        assistant.lm_head.weight += 0.1 * torch.randn_like(assistant.lm_head.weight)
    rows = {key: value[2:3] for key, value in prompts().items()}
    expected = brute_force(model, rows["input_ids"], rows["attention_mask"], 8)
    for helper in (assistant, model):
        text = model.generate(**rows, max_new_tokens=8, do_sample=False, assistant_model=helper)
        assert torch.equal(text, expected[:, : text.shape[1]])


def test_what_generate_returns_holds_a_cache_that_can_be_used_again():
    model, batch = build(SMALL[0], tie_word_embeddings=False, initializer_range=0.25), prompts()
    how = GenerationConfig(do_sample=False, return_dict_in_generate=True)
    out = model.generate(**batch, generation_config=how, max_new_tokens=3, min_new_tokens=3)
    mask = torch.cat((batch["attention_mask"], torch.ones(4, 3, dtype=torch.long)), 1)
    more = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    cache = getattr(out, "cache", None) or out.past_key_values
    text = model.generate(out.sequences, attention_mask=mask, past_key_values=cache, **more)
    assert torch.equal(text, model.generate(out.sequences, attention_mask=mask, **more))


@names
def test_inputs_are_prepared_with_the_cache_under_both_names(given):
    model, row = build(SMALL[0]), torch.tensor([Writer(1).prompt(1)])
    cache = filled(model, row[:, :-1])
    prepared = model.prepare_inputs_for_generation(row, 1, attention_mask=torch.ones_like(row), **{given: cache})
    assert prepared["input_ids"].tolist() == row[:, -1:].tolist()
    assert prepared["cache"] is prepared["past_key_values"] is cache
    assert torch.equal(prepared["layout_ids"], row)
    assert not {*CACHE_NAMES} & {*model.prepare_inputs_for_generation(row)}


@names
def test_gradient_checkpointing_keeps_no_cache_and_refuses_a_filled_one(given):
    model, writer = build(SMALL[0]), Writer(3)
    row = torch.tensor([writer.source() + writer.candidate()])
    cache = filled(model, row[:, : len(writer.source())])
    model.train().gradient_checkpointing_enable()
    assert model(row, use_cache=True).cache is None
    assert model(row, **{given: DynamicCache()}).cache is None
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model(row, layout_ids=row, **{given: cache})
    batch = pad([writer.prompt(1)], "left")
    text = model.generate(**batch, max_new_tokens=3, do_sample=False)  # without gradients nothing is computed twice
    assert torch.equal(text, model.eval().generate(**batch, max_new_tokens=3, do_sample=False))
