"""Every family computes what its original class does: logits and states at 1e-4, whatever its switches say."""

import copy

import pytest
import torch

from m6rec import M6RecForRecommendation
from m6rec.tokenization import M6RecProcessor, M6RecTokenizer
from tests.fast import meet
from tests.modeling_m6rec.conversion.backbones import CAUSAL, batch, own_tokenizer, tiny

ROPE = {"rope_theta": 500.0, "factor": 4.0}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8}
SMALL = {"rope_type": "default", "rope_theta": 9.0}
CASES = [
    ("bert", {}),
    ("bert", {"hidden_act": "relu", "type_vocab_size": 3, "layer_norm_eps": 1e-3}),
    ("bert", {"tie_word_embeddings": False, "hidden_act": "gelu_new"}),
    ("gpt2", {}),
    ("gpt2", {"tie_word_embeddings": False, "activation_function": "relu", "n_inner": None}),
    ("gpt2", {"is_causal": False, "layer_norm_epsilon": 1e-3}),
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1, "hidden_act": "gelu"}),
    ("llama", {"attention_bias": True, "num_key_value_heads": None, "rms_norm_eps": 1e-3}),
    ("llama", {"mlp_bias": True, "head_dim": 14, "rope_parameters": {"rope_type": "linear", **ROPE}}),
    ("llama", {"rope_parameters": {"rope_type": "llama3", **ROPE, **LLAMA3}, "is_causal": False}),
    ("llama", {"rope_parameters": {"rope_type": "yarn", **ROPE, "original_max_position_embeddings": 8}}),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", **ROPE}, "max_position_embeddings": 4}),
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 4, "rope_parameters": {"rope_theta": 77.0}}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 2, "max_window_layers": 3}),
    ("qwen3", {}),
    ("qwen3", {"tie_word_embeddings": True, "attention_bias": True, "head_dim": 6, "num_key_value_heads": 1}),
    ("gemma3_text", {}),
    ("gemma3_text", {"sliding_window": 1, "attention_bias": True, "layer_types": None}),
    ("gemma3_text", {"layer_types": ["full_attention"] * 3, "tie_word_embeddings": False}),
    (
        "gemma3_text",
        {"rope_parameters": {"full_attention": {"rope_type": "linear", **ROPE}, "sliding_attention": SMALL}},
    ),
]
BASES = [
    ("bert", "BertModel"),
    ("gpt2", "GPT2Model"),
    ("llama", "LlamaModel"),
    ("qwen3", "Qwen3Model"),
    ("gemma3_text", "Gemma3TextModel"),
]


def name(value):
    return value if isinstance(value, str) else "-".join(value) if isinstance(value, dict) else None


def close(left, right):
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("case", "side"),
    meet(CASES, ["left", "right"]),
    ids=lambda case: case if isinstance(case, str) else "-".join([case[0], *case[1]]),
)
def test_logits_are_the_originals(case, side):
    family, changes = case
    source = tiny(family, **changes)
    ids, mask, positions = batch(source.config.vocab_size, side)
    for joint in (None, 1):  # a plain text is one segment: segment layers read it as joint layers do
        model = M6RecForRecommendation.from_backbone(source, joint, own_tokenizer(family))
        with torch.no_grad():
            wanted = source(ids, attention_mask=mask, position_ids=positions).logits
            found = model(ids, attention_mask=mask).logits[..., : source.config.vocab_size]
        assert wanted.std() > 0.5, "logits that say nothing would agree with anything"
        close(found[mask.bool()], wanted[mask.bool()])
    assert model.config.tie_word_embeddings == source.config.tie_word_embeddings


@pytest.mark.parametrize(("family", "base"), BASES, ids=name)
def test_states_of_a_model_without_a_head_are_the_originals(family, base, caplog):
    source = tiny(family, base)
    ids, mask, positions = batch(source.config.vocab_size, "left")
    with caplog.at_level("DEBUG"):
        model = M6RecForRecommendation.from_backbone(source, 2, own_tokenizer(family))
    said = [entry.levelname for entry in caplog.records if f"{base} has no head that writes" in entry.getMessage()]
    assert said == ["DEBUG"], "it says nothing to those who do not want it to write"
    with torch.no_grad():
        wanted = source(ids, attention_mask=mask, position_ids=positions).last_hidden_state
        found = model.model(ids, attention_mask=mask).last_hidden_state
        logits = model(ids, attention_mask=mask).logits
    close(found[mask.bool()], wanted[mask.bool()])
    close(logits, found @ model.get_input_embeddings().weight.T)
    assert model.config.trained_tasks == []


def request(candidates=("the cat", "shoes")):
    return {
        "user": "the cat",
        "history": ["shoes of the cat", {"event": "read", "item": "the"}],
        "candidates": candidates,
    }


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", CAUSAL)
def test_a_structured_row_is_the_causal_model_where_all_layers_are_joint(family, tied):
    source, own = tiny(family, tie_word_embeddings=tied), own_tokenizer(family)
    model = M6RecForRecommendation.from_backbone(source, None, own)
    processor = M6RecProcessor.from_template(M6RecTokenizer.from_backbone(own))
    wider = copy.deepcopy(source)
    wider.resize_token_embeddings(model.config.vocab_size, mean_resizing=False)
    with torch.no_grad():
        wider.get_input_embeddings().weight.copy_(model.get_input_embeddings().weight)
        wider.get_output_embeddings().weight.copy_(model.get_output_embeddings().weight)
    both = processor([request()], return_tensors="pt")
    with torch.no_grad():
        found = model(**both).logits[0]
        start = source_end = int((both["input_ids"][0] == model.config.bos_token_id).nonzero()[0])
        for candidate in request()["candidates"]:  # each goes on from the source as if it stood alone
            wanted = wider(processor([request([candidate])], return_tensors="pt")["input_ids"]).logits[0]
            end = start + len(wanted) - source_end
            close(found[:source_end], wanted[:source_end])
            close(found[start:end], wanted[source_end:])
            start = end
    assert start == len(found)


def test_kinds_and_ordinals_say_nothing_yet_and_the_other_heads_are_ready():
    model = M6RecForRecommendation.from_backbone(tiny("llama"), 1, own_tokenizer("llama"))
    assert model.model.embed_kind.weight.abs().sum() == model.model.embed_event.weight.abs().sum() == 0
    assert torch.equal(model.item_norm.weight, torch.ones(24))
    for layer in (model.score_head, model.user_projection, model.item_projection):
        assert 0.01 < layer.weight.std() < 0.03
    assert not model.training


@pytest.mark.parametrize(
    ("family", "joint", "expected"),
    [
        ("bert", None, ("bidirectional", "bidirectional", "causal", "segment")),
        ("gpt2", None, ("causal", "causal", "causal", "request")),
        ("gpt2", 1, ("causal", "causal", "causal", "segment")),
        ("qwen2", 1, ("causal", "causal", "causal", "request")),
        ("gemma3_text", 1, ("causal", "causal", "causal", "request")),
    ],
)
def test_how_text_is_read_suits_the_family(family, joint, expected):
    config = M6RecForRecommendation.from_backbone(tiny(family), joint, own_tokenizer(family)).config
    assert config.num_joint_layers == (joint or 3)
    found = (config.segment_attention, config.document_attention, config.history_attention, config.joint_positions)
    assert found == expected
    assert config.trained_tasks == ([] if family == "bert" else ["plausibility", "writing"])
    assert config.written_attention == ("segment" if family == "bert" else "source")


def test_a_backbone_whose_segment_layers_read_no_source_has_not_learnt_to_write():
    given = {"tokenizer": own_tokenizer("llama"), "written_attention": "segment"}
    source = tiny("llama")
    split, whole = (M6RecForRecommendation.from_backbone(source, joint, **given).config for joint in (1, None))
    assert split.trained_tasks == ["plausibility"] and whole.trained_tasks == ["plausibility", "writing"]
    dynamic = tiny("llama", rope_parameters={"rope_type": "dynamic", **ROPE})
    config = M6RecForRecommendation.from_backbone(dynamic, 1, own_tokenizer("llama")).config
    assert config.written_attention == "segment" and config.trained_tasks == ["plausibility"]


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("bert", {"is_decoder": True}, "is_decoder=True"),
        ("bert", {"is_decoder": True, "add_cross_attention": True}, "is_decoder=True; add_cross_attention=True"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights=False"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, "sliding_attention"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "sliding_attention"),
    ],
)
def test_what_a_block_cannot_hold_is_refused(family, changes, message):
    source = tiny(family, **changes)
    if changes.get("add_cross_attention"):  # the reason is said before weights without a place are
        source = tiny(family)
        for field, value in changes.items():
            setattr(source.config, field, value)
    with pytest.raises(ValueError, match=f"cannot hold this backbone: .*{message}"):
        M6RecForRecommendation.from_backbone(source, None, own_tokenizer(family))


def test_generating_beyond_a_window_gives_the_originals_text():
    source = tiny("gemma3_text")
    model = M6RecForRecommendation.from_backbone(source, 1, own_tokenizer("gemma3_text"))
    ids = torch.randint(5, 200, (2, 4), generator=torch.Generator().manual_seed(1))
    how = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    own = [*range(source.config.vocab_size, model.config.vocab_size)]
    kept = source.generate(ids, pad_token_id=0, suppress_tokens=[0, 1, 2], **how)
    assert torch.equal(model.generate(ids, pad_token_id=0, suppress_tokens=[0, 1, 2, *own], **how), kept)
    assert len(set(kept[:, 4:].flatten().tolist())) > 4
