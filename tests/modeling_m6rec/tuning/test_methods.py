"""The nine methods: what each trains and nothing else, on which modules, and what is kept while it trains."""

import pytest
import torch
from peft.utils import ModulesToSaveWrapper

from m6rec import KINDS, SegmentCache
from m6rec.tuning import METHODS, heads, parameter_counts, peft_config, tune
from m6rec.tuning.methods import special_tokens
from tests.fast import meet
from tests.modeling_m6rec.tiny import BERT, OPTIONS, PAD, Writer, build, close, pad
from tests.modeling_m6rec.tuning.test_adapter import BLOCKS, TWO_STAGES, outputs, rows, shake

ADAPTERS = [method for method in METHODS if method != "full"]
CLICKS = torch.tensor([[0, 1], [1, 0], [1, 1]])
RETRIEVAL = ["user_projection", "item_projection", "item_norm"]
MARKS = {
    "lora": "lora_",
    "adalora": "lora_",
    "ia3": "ia3_",
    "adapter": "m6rec_adapter_",
    "prefix": "prompt_encoder",
    "prompt": "prompt_encoder",
    "option": "trainable_tokens_delta",
    "option-adapter": ("trainable_tokens_delta", "m6rec_adapter_"),
}
"""What the names of a method's own weights hold."""


def settings_of(method):
    return {"total_step": 10} if method == "adalora" else {}


def own(method, name):
    marks = MARKS[method]
    return any(mark in name for mark in ((marks,) if isinstance(marks, str) else marks))


def retrieval(batch):
    """Labels for the first place of each row, and two items to choose among."""
    labels = torch.full_like(batch["input_ids"], -100)
    items = pad([Writer(8).segment(12), Writer(9).segment(12)])
    first = (batch["input_ids"] == 8).int().argmax(1)  # the user's [SEG]
    labels[torch.arange(len(labels)), first] = torch.tensor([0, 1, 0])
    return {
        "retrieval_labels": labels,
        "item_input_ids": items["input_ids"],
        "item_attention_mask": items["attention_mask"],
    }


@pytest.mark.parametrize(("block", "method"), meet(["shared", "bert"], METHODS))
def test_a_step_moves_all_that_is_trained_and_nothing_else(method, block):
    model = build(BLOCKS[block], item_embedding_dropout=0.0)
    tuned = tune(model, method, ["click", "retrieval"], **settings_of(method))
    batch = rows()
    given = {**batch, **retrieval(batch), "click_labels": CLICKS}
    optimizer = torch.optim.SGD([weight for weight in tuned.parameters() if weight.requires_grad], lr=0.5)
    before = {name: weight.detach().clone() for name, weight in tuned.named_parameters()}
    for _ in range(3):  # what begins at zero holds the rest back at first
        tuned(**given).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    head = () if "option" in method else ("score_head",)
    for name, weight in tuned.named_parameters():
        moved = not torch.equal(weight, before[name])
        if method == "full":
            # Nothing is written and no item has memory here; tied, the writing head moves with the embeddings.
            assert moved != name.startswith(("lm_", "model.item_memory")), name
            continue
        wanted = own(method, name) or any(f"{part}.modules_to_save" in name for part in (*RETRIEVAL, *head))
        assert moved == weight.requires_grad == wanted, name


@pytest.mark.parametrize("method", ADAPTERS)
def test_only_the_heads_of_the_tasks_are_trained_whole(method):
    tuned = tune(build(TWO_STAGES), method, ["click", "retrieval"], **settings_of(method))
    wrapped = {
        name.rpartition("model.")[2] for name, part in tuned.named_modules() if isinstance(part, ModulesToSaveWrapper)
    }
    expected = {*RETRIEVAL, *([] if "option" in method else ["score_head"])}
    assert {name.removeprefix("base_") for name in wrapped} == expected


def test_heads_by_task():
    plain, bert = build(TWO_STAGES).config, build({**TWO_STAGES, **BERT}).config
    option = build({**TWO_STAGES, "score_head": "option"}).config
    narrow = build({**TWO_STAGES, "embedding_size": 20, "tie_word_embeddings": True}).config
    assert heads(plain, ["rating", "click"]) == ["score_head"]
    assert heads(option, ["interaction", "retrieval"]) == RETRIEVAL
    assert heads(plain, ["writing"]) == []
    assert heads(bert, ["writing"]) == heads(narrow, ["writing"]) == ["lm_transform"]


def test_more_modules_can_be_trained_whole_beside_the_heads():
    config = peft_config("lora", build(TWO_STAGES), ["click"], modules_to_save=["item_memory", "score_head"], r=3)
    assert config.modules_to_save == ["score_head", "item_memory"]
    assert (config.r, config.lora_alpha) == (3, 16)


def test_targets_are_blocks_not_heads():
    for method in ("lora", "adalora", "ia3", "adapter"):
        tuned = tune(build({**TWO_STAGES, **BERT}), method, ["click"], **settings_of(method))
        assert tuned.base_model.targeted_module_names
        assert all(name.startswith("model.layers.") for name in tuned.base_model.targeted_module_names)
        count = {"lora": 6, "adalora": 6, "ia3": 3, "adapter": 1}[method]  # of each of four layers, without gate_proj
        assert len(tuned.base_model.targeted_module_names) == 4 * count


def test_option_tuning_trains_every_token_that_structures_a_request():
    config = build(TWO_STAGES).config
    tokens = special_tokens(config)
    assert set(OPTIONS) <= set(tokens)
    assert len(tokens) == len(set(tokens)) == 5 + len(KINDS) + config.num_options
    assert not {PAD, config.mask_token_id, config.unk_token_id} & set(tokens)


@pytest.mark.parametrize("method", ADAPTERS)
def test_frozen_segments_stay_frozen_under_adapters(method):
    model = build({**TWO_STAGES, "num_joint_layers": 1})
    model.model.freeze_segments()
    if "option" in method:
        with pytest.raises(ValueError, match=f"^{method} tuning trains"):
            tune(model, method, ["click"])
        return
    tuned = tune(model, method, ["click"], **settings_of(method))
    assert model.model.segments_are_frozen
    if method not in ("prefix", "prompt"):
        assert {name.split(".")[2] for name in tuned.base_model.targeted_module_names} == {"3"}
    cache, batch = SegmentCache(), rows()
    optimizer = torch.optim.SGD([weight for weight in tuned.parameters() if weight.requires_grad], lr=0.1)
    how = {} if method in ("prefix", "prompt") else {"plan": "cached", "segment_cache": cache}
    for _ in range(2):
        cached, flat = tuned(**batch, click_labels=CLICKS, **how).loss, tuned(**batch, click_labels=CLICKS).loss
        close(cached, flat)
        cached.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert how == {} or cache.hits > 0


@pytest.mark.parametrize("method", ["lora", "adalora", "ia3", "adapter", "option", "option-adapter"])
def test_adapters_below_the_joint_layers_are_trained_without_a_cache(method):
    model = build(TWO_STAGES)
    tuned = tune(model, method, ["click"], **settings_of(method))
    cache, batch = SegmentCache(), rows()
    assert not model.model.segments_are_frozen
    tuned(**batch, click_labels=CLICKS, plan="cached", segment_cache=cache).loss.backward()
    assert len(cache) == 0


@pytest.mark.parametrize("method", ["lora", "ia3", "adapter", "option-adapter"])
def test_kept_states_and_vectors_belong_to_the_active_adapter(method):
    model = build({**TWO_STAGES, "score_head": "option"} if "option" in method else TWO_STAGES)
    tuned = shake(tune(model, method, ["click"]))
    tuned.add_adapter("other", peft_config(method, model, ["click"]))
    tuned.set_adapter("other")
    shake(tuned)
    cache, batch, prints = SegmentCache(), rows(), set()

    def check():
        cached = outputs(tuned, batch, plan="cached", segment_cache=cache).scores
        close(cached, outputs(tuned, batch, plan="flat").scores, rtol=1e-4, atol=1e-4)
        prints.add(tuned.fingerprint())

    for name in ("default", "other", "default"):
        tuned.set_adapter(name)
        check()
    with tuned.disable_adapter():
        check()
    check()
    assert len(prints) == 3


def test_prompt_tuning_of_narrow_embeddings_has_their_width():
    tuned = tune(build({**TWO_STAGES, "embedding_size": 20, "tie_word_embeddings": True}), "prompt", ["click"])
    assert tuned.prompt_encoder["default"].embedding.weight.shape == (16, 20)
    assert outputs(tuned).scores.isfinite().all()


def test_prefixes_begin_as_small_as_weights_do():
    model = build(TWO_STAGES, initializer_range=0.02)
    weight = tune(model, "prefix", ["click"]).prompt_encoder["default"].embedding.weight
    assert 0.018 < weight.std().item() < 0.022


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_writing_is_learnt_at_the_same_tokens_with_virtual_ones(method):
    tuned = shake(tune(build(TWO_STAGES), method, ["writing"]))
    writer = Writer(4)
    batch = pad([writer.source(2) + writer.text() for _ in range(3)])
    ids = batch["input_ids"]
    labels = torch.full_like(ids, -100)
    expected, count = 0.0, 0
    logits = outputs(tuned, {**batch, "layout_ids": ids}).logits[:, -ids.shape[1] :].log_softmax(-1)
    for row in range(3):
        start = ids[row].tolist().index(16) + 1  # behind [TEXT]
        stop = int(batch["attention_mask"][row].sum())
        labels[row, start:stop] = ids[row, start:stop]
        for place in range(start, stop):
            expected -= logits[row, place - 1, ids[row, place]].item()
            count += 1
    found = outputs(tuned, {**batch, "layout_ids": ids, "labels": labels})
    assert found.loss.item() == pytest.approx(expected / count, rel=1e-5)


def test_parameters_are_counted_without_adapters():
    model = build({"num_joint_layers": 4})
    total = sum(weight.numel() for weight in model.parameters())
    assert parameter_counts(model) == (total, total)
    tuned = tune(model, "adapter", ["click"], r=2)
    head = (36 + 1) * model.config.num_labels
    assert parameter_counts(tuned) == (4 * (36 * 2 + 2 + 2 * 36 + 36 + 1) + head, total)


def test_unknown_methods_and_settings_are_named():
    model = build(TWO_STAGES)
    with pytest.raises(ValueError, match="no tuning method 'lorra'"):
        tune(model, "lorra", [])
    with pytest.raises(ValueError, match="ia3 has no setting 'rank'"):
        tune(model, "ia3", [], rank=3)
    assert peft_config("full", model, ["click"]) is None
