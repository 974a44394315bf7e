"""The adapters beside the feed-forward blocks: the paper's formula, and what PEFT asks of a method."""

import peft
import pytest
import torch
from transformers.integrations.peft import MIN_PEFT_VERSION, check_peft_version

from m6rec import M6RecForRecommendation
from m6rec.tuning import M6RecAdapterConfig, tune
from m6rec.tuning.adapter import NO_ADAPTERS
from m6rec.tuning.methods import special_tokens
from tests.modeling_m6rec.tiny import BERT, OPTIONS, Writer, build, close, pad

TWO_STAGES = {"num_joint_layers": 2}
BLOCKS = {
    "plain": TWO_STAGES,
    "shared": {**TWO_STAGES, "num_hidden_groups": 2},
    "bert": {**TWO_STAGES, **BERT, "tie_word_embeddings": True},
}


def rows(seed=3, count=3):
    writer = Writer(seed)
    batch = pad([writer.source(3) + writer.candidate() + writer.candidate() for _ in range(count)])
    return {**batch, "layout_ids": batch["input_ids"]}


def outputs(model, batch=None, **more):
    model.eval()
    with torch.no_grad():
        return model(**(batch or rows()), **more)


@torch.no_grad()
def shake(model):
    """Give everything that is trained other values."""
    for weight in model.parameters():
        if weight.requires_grad:
            weight.add_(torch.randn_like(weight) * 0.3)
    return model


@torch.no_grad()
@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_adds_what_the_paper_says(block):
    model = build(BLOCKS[block])
    tuned = shake(tune(model, "adapter", [], r=5))
    mlp = model.model.layers[0].mlp
    down, up = mlp.m6rec_adapter_down["default"], mlp.m6rec_adapter_up["default"]
    scale, states = mlp.m6rec_adapter_scale["default"], torch.randn(2, 3, 36)
    for place in states.view(-1, 36):
        inner = [max(0.0, float(place @ row + bias)) for row, bias in zip(down.weight, down.bias)]
        beside = [
            float(scale) * (sum(a * b for a, b in zip(inner, row.tolist())) + float(bias))
            for row, bias in zip(up.weight, up.bias)
        ]
        expected = mlp.base_layer(place) + torch.tensor(beside)
        torch.testing.assert_close(mlp(place), expected, rtol=1e-4, atol=1e-4)
    assert down.weight.shape == (5, 36)
    wrapped = [name for name, part in tuned.named_modules() if name.endswith(".mlp")]
    assert len(wrapped) == model.config.num_hidden_groups


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("method", ["adapter", "option", "option-adapter"])
def test_tuning_begins_and_ends_with_the_model_as_it_was(block, method):
    model = build(BLOCKS[block], score_head="linear" if method == "adapter" else "option")
    if model.lm_head.bias is not None:
        torch.nn.init.normal_(model.lm_head.bias)
    before = outputs(model)
    tuned = tune(model, method, ["click"])
    same = outputs(tuned)
    close(same.scores, before.scores, rtol=0, atol=0)
    close(same.logits, before.logits, rtol=0, atol=0)
    shaken = outputs(shake(tuned))
    assert not torch.equal(shaken.scores, before.scores)
    assert not torch.equal(shaken.logits, before.logits)
    with tuned.disable_adapter():
        disabled = outputs(tuned)
    close(disabled.scores, before.scores, rtol=0, atol=0)
    close(disabled.logits, before.logits, rtol=0, atol=0)


def test_scores_are_products_with_the_trained_options():
    model = build(TWO_STAGES)
    tuned = shake(tune(model, "option", ["click"]))
    batch = rows()
    seen = []
    model.model.norm.register_forward_hook(lambda module, args, out: seen.append(out))
    found = outputs(tuned, batch, plan="flat").scores
    ends = [(row == model.config.eos_token_id).nonzero().flatten().tolist() for row in batch["input_ids"]]
    places = special_tokens(model.config)
    delta = model.model.embeddings.tokens.token_adapter.trainable_tokens_delta["default"]
    for row, own in enumerate(ends):
        for target, end in enumerate(own):
            for label in range(model.config.num_labels):
                option = delta[places.index(OPTIONS[label])]
                assert found[row, target, label].item() == pytest.approx(float(seen[0][row, end] @ option), abs=1e-4)


def test_two_adapters_of_either_kind_take_turns():
    model = build({**TWO_STAGES, "score_head": "option"})
    plain = outputs(model).scores
    tuned = shake(tune(model, "option-adapter", ["click"]))
    first = outputs(tuned).scores
    settings = {"score_names": model.config.score_names, "task_type": "CAUSAL_LM"}
    tokens = special_tokens(model.config)
    more = M6RecAdapterConfig(target_modules=NO_ADAPTERS, trainable_token_indices=tokens, **settings)
    tuned.add_adapter("second", more)
    close(outputs(tuned).scores, first, rtol=0, atol=0)
    tuned.set_adapter("second")
    close(outputs(tuned).scores, plain, rtol=0, atol=0)
    second = outputs(shake(tuned)).scores
    assert not torch.equal(second, plain)
    tuned.set_adapter("default")
    close(outputs(tuned).scores, first, rtol=0, atol=0)
    tuned.delete_adapter("second")
    close(outputs(tuned).scores, first, rtol=0, atol=0)


def test_an_adapter_and_lora_stand_in_one_model(tmp_path):
    """PeftModel and PeftMixedModel take one type, or those of a fixed list; the library's own door takes both."""
    try:
        check_peft_version(MIN_PEFT_VERSION)
    except ValueError as error:
        pytest.skip(f"this Transformers takes no adapters from the PEFT that is installed: {error}")
    model = build(TWO_STAGES)
    model.save_pretrained(tmp_path / "base")
    model = M6RecForRecommendation.from_pretrained(tmp_path / "base")
    tuned = shake(tune(model, "adapter", []))
    tuned.save_pretrained(tmp_path / "adapter")
    expected = outputs(tuned).scores
    both = M6RecForRecommendation.from_pretrained(tmp_path / "adapter")
    both.add_adapter(peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False), "lora")
    found = {}
    for active in (["default"], ["lora"], ["default", "lora"]):
        both.set_adapter(active)
        found[tuple(active)] = outputs(both).scores
    close(found["default",], expected, rtol=0, atol=0)
    with torch.no_grad():
        for block in both.model.layers:
            block.mlp.m6rec_adapter_scale["default"].zero_()
    close(outputs(both).scores, found["lora",], rtol=0, atol=0)
    assert not torch.equal(found["default", "lora"], found["lora",])
    with pytest.raises(ValueError, match="not compatible with the `PeftMixedModel`"):
        peft.get_peft_model(build(TWO_STAGES), M6RecAdapterConfig(), mixed=True)


def test_a_whole_head_and_options_do_not_share_a_model():
    tuned = tune(build(TWO_STAGES), "adapter", ["click"])
    names = tuned.config.score_names
    with pytest.raises(ValueError, match="another adapter of this model has trained a score head"):
        tuned.add_adapter("options", M6RecAdapterConfig(score_names=names, task_type="CAUSAL_LM"))


def test_options_of_another_model_are_refused():
    with pytest.raises(ValueError, match=r"options stand for \['no', 'yes'\]"):
        peft.get_peft_model(build(TWO_STAGES), M6RecAdapterConfig(score_names=["no", "yes"]))


def test_what_is_not_linear_is_not_merged():
    tuned = tune(build(TWO_STAGES), "option-adapter", ["click"])
    before = outputs(shake(tuned)).scores
    with pytest.raises(ValueError, match="not linear and cannot be merged"):
        tuned.merge_and_unload()
    close(outputs(tuned).scores, before, rtol=0, atol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_trained_options_are_merged(tied):
    tuned = shake(tune(build({**TWO_STAGES, "tie_word_embeddings": tied}), "option", ["click"]))
    before = outputs(tuned)
    merged = tuned.merge_and_unload()
    assert type(merged) is M6RecForRecommendation
    close(outputs(merged).scores, before.scores)
    close(outputs(merged).logits, before.logits)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="r=0"):
        M6RecAdapterConfig(r=0)
    with pytest.raises(ValueError, match=r"chooses 'model.layers.0.self_attn', a M6RecAttention"):
        tune(build(TWO_STAGES), "adapter", [], target_modules=["self_attn"])
