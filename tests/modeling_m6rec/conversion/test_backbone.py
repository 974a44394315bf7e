"""From a published checkpoint to an M6Rec: which rows new tokens begin with, what is refused, what is kept."""

import importlib

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, OPTConfig, OPTForCausalLM

from m6rec import M6RecForRecommendation
from m6rec.conversion import FAMILIES, load_backbone, load_tokenizer
from m6rec.tokenization import M6RecTokenizer
from tests.modeling_m6rec.conversion.backbones import HEADS, batch, own_tokenizer, publish, tiny

convert = M6RecForRecommendation.from_backbone


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


# ------------------------------------------------------------------------------------------------- where it comes from


@pytest.mark.parametrize("family", HEADS)
def test_a_folder_a_loaded_model_and_a_saved_conversion_are_the_same(family, tmp_path):
    source = tiny(family)
    publish(tmp_path / "own", family, source)
    ids = batch(source.config.vocab_size, "right", (6, 6))[0]
    wanted = logits(source, ids)
    of_folder, of_model = convert(tmp_path / "own", 2), convert(source, 2, tmp_path / "own")
    of_folder.save_pretrained(tmp_path / "ours")
    again = AutoModel.from_pretrained(tmp_path / "ours")
    for model in (of_folder, of_model, again):
        assert type(model) is M6RecForRecommendation
        torch.testing.assert_close(logits(model, ids)[..., : wanted.shape[-1]], wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(again, ids), logits(of_folder, ids)), "all rows, the new ones too"
    assert torch.equal(logits(of_model, ids), logits(of_folder, ids)), "new rows are always alike"
    places = {"_name_or_path", "custom_pipelines"}
    left, right = (
        {key: value for key, value in model.config.to_dict().items() if key not in places}
        for model in (again, of_folder)
    )
    assert left == right
    assert again.generation_config.eos_token_id == of_folder.generation_config.eos_token_id


def test_new_layers_stand_on_top_of_a_sentence_embedder():
    source = tiny("bert", "BertModel")
    layers = source.config.num_hidden_layers
    fields = {"num_hidden_layers": layers + 2, "segment_pooling": "mean", "segment_summary": 1}
    model = convert(source, 2, own_tokenizer("bert"), **fields)
    assert model.config.num_segment_layers == layers and len(model.model.layers) == layers + 2
    item = [model.config.kind_token_ids["item"], 40, 41, 42, model.config.segment_token_id]
    row = torch.tensor([[model.config.bos_token_id, *item, model.config.eos_token_id]])
    source.resize_token_embeddings(model.config.vocab_size)
    source.get_input_embeddings().weight.data = model.model.embeddings.tokens.weight.data
    with torch.no_grad():
        wanted = source(torch.tensor([item])).last_hidden_state.mean(1)[0]
        torch.testing.assert_close(model.item_states(torch.tensor([item]))[0], wanted)
        torch.testing.assert_close(model.model(row, plan="flat").segment_states[0, 5], wanted)
    new = model.model.layers[layers].mlp.up_proj.weight
    assert 0 < float(new.detach().std()) < 0.1, "drawn, not left empty"
    assert model.config.initializer_range == source.config.initializer_range, "the backbone's, not that of the width"


@pytest.mark.parametrize(("family", "base"), [("bert", "BertModel"), ("llama", "LlamaModel")])
def test_a_folder_without_a_head_says_so_and_is_read(family, base, tmp_path, caplog):
    caplog.set_level("DEBUG", "m6rec.conversion.backbone")
    source = tiny(family, base)
    model = convert(publish(tmp_path, family, source))
    assert f"{base} has no head" in caplog.text
    assert model.config.tie_word_embeddings and not model.config.lm_head_transform and not model.config.lm_head_bias
    ids = batch(source.config.vocab_size, "right", (6,))[0]
    with torch.no_grad():
        torch.testing.assert_close(model.model(ids).last_hidden_state, source(ids).last_hidden_state)


def test_heads_that_mean_nothing_here_are_left_out(tmp_path):
    source = tiny("bert", "BertForPreTraining")
    ids = batch(source.config.vocab_size, "right", (6,))[0]
    with torch.no_grad():
        wanted = source(ids).prediction_logits
    for model in (convert(publish(tmp_path, "bert", source)), convert(source, None, own_tokenizer("bert"))):
        torch.testing.assert_close(logits(model, ids)[..., : wanted.shape[-1]], wanted, rtol=1e-4, atol=1e-4)


def test_numbers_keep_their_type_unless_told_and_positions_stay_exact(tmp_path):
    publish(tmp_path, "llama", tiny("llama").to(torch.bfloat16))
    assert convert(tmp_path).dtype == torch.bfloat16
    assert torch.equal(convert(tmp_path).model.rotary.inv_freq, tiny("llama").model.rotary_emb.inv_freq)
    assert convert(tmp_path, dtype="float32").dtype == torch.float32
    assert convert(load_backbone(tmp_path), None, tmp_path, dtype=torch.float32).dtype == torch.float32


def test_fields_are_heeded(tmp_path):
    publish(tmp_path, "bert")
    given = {"segment_summary": 1, "embedding_dim": 12, "num_options": 3, "history_attention": "bidirectional"}
    given |= {"hidden_dropout": 0.3, "num_item_embeddings": 5, "interactions": ["like"], "segment_attention": "causal"}
    given |= {"entry_norm": True, "entry_dropout": 0.1}
    model = convert(tmp_path, num_joint_layers=1, **given)
    assert {name: getattr(model.config, name) for name in given} == given
    assert model.item_projection.weight.shape == (12, 24)
    assert torch.equal(model.user_projection.weight, model.item_projection.weight)
    assert len(model.model.item_memory.weight) == 6 and model.score_head.out_features == 2 + 5 + 1
    assert model.config.vocab_size == len(M6RecTokenizer.from_backbone(own_tokenizer("bert"), num_options=3))
    plain = convert(tmp_path).config
    assert (plain.hidden_dropout, plain.attention_dropout, plain.num_options) == (0.1, 0.1, 16)


def test_only_the_package_can_convert(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ImportError, match="install m6rec"):
        convert("anything")


# ----------------------------------------------------------------------------------------------------------- new tokens


def rows_of(model, *names):
    table = model.get_input_embeddings().weight
    return [table[getattr(model.config, name)] for name in names]


def test_new_tokens_begin_as_the_backbones_own_or_around_the_mean():
    source, own = tiny("llama"), own_tokenizer("llama")
    model = convert(source, None, own)
    for ours, theirs in (
        (model.get_input_embeddings().weight, source.get_input_embeddings().weight),
        (model.get_output_embeddings().weight, source.get_output_embeddings().weight),
    ):
        known, config = len(theirs), model.config
        assert torch.equal(ours[:known], theirs)
        assert torch.equal(ours[config.bos_token_id], theirs[own.bos_token_id])
        assert torch.equal(ours[config.eos_token_id], theirs[own.eos_token_id])
        assert torch.equal(ours[config.unk_token_id], theirs[own.unk_token_id])
        torch.testing.assert_close(ours[config.pad_token_id], theirs.mean(0))
        kinds = ours[list(config.kind_token_ids.values())]
        spread = (kinds - theirs.mean(0)).norm(dim=1) / (theirs - theirs.mean(0)).norm(dim=1).mean()
        assert ((spread > 0.25) & (spread < 0.9)).all(), "half as far from the mean as words"
        assert torch.pdist(kinds).min() > 0.3, "apart from each other"
    assert model.generation_config.eos_token_id == sorted({model.config.eos_token_id, own.eos_token_id})


def test_drawn_rows_vary_as_the_backbones_tokens_do():
    source = tiny("gpt2", vocab_size=270)
    with torch.no_grad():
        source.transformer.wte.weight[:, 1:] *= 0.01  # all there is to say stands in the first number
        source.transformer.wte.weight[:, 0] += 3
    model = convert(source, None, own_tokenizer("gpt2"), num_options=400)
    drawn = model.get_input_embeddings().weight[model.config.first_option_token_id :]
    old = source.transformer.wte.weight
    torch.testing.assert_close(drawn.std(0) / old.std(0), torch.full((24,), 0.5), rtol=0.15, atol=0)
    assert (drawn.mean(0) - old.mean(0)).abs().max() < 0.05


def test_new_tokens_take_next_to_nothing_from_words():
    """Where all logits are far below 0, as GPT-2's are, a row of zeros would take everything."""
    source = tiny("gpt2")
    with torch.no_grad():
        source.transformer.wte.weight += 2
        source.transformer.ln_f.bias.fill_(-3)
    ids = batch(270, "right", (6,))[0]
    wanted, found = logits(source, ids), logits(convert(source, None, own_tokenizer("gpt2")), ids)
    assert wanted.max() < -20
    assert (found.logsumexp(-1) - wanted.logsumexp(-1)).max() < 0.2


def test_untrained_writing_ends_where_the_backbone_ends(tmp_path):
    source, own = tiny("gpt2"), own_tokenizer("gpt2")
    with torch.no_grad():  # whatever it reads, it writes </s>
        source.transformer.ln_f.weight.zero_()
        source.transformer.ln_f.bias.copy_(source.transformer.wte.weight[own.eos_token_id] * 9)
    convert(source, 1, own).save_pretrained(tmp_path)
    written = AutoModel.from_pretrained(tmp_path).generate(torch.tensor([[40, 41]]), max_new_tokens=5, do_sample=False)
    assert written.tolist() == [[40, 41, own.eos_token_id]]


def test_bert_keeps_its_own_special_tokens_and_lends_its_ends():
    source, own = tiny("bert"), own_tokenizer("bert")
    model = convert(source, None, own)
    assert (model.config.pad_token_id, model.config.unk_token_id, model.config.mask_token_id) == (0, 1, 4)
    table = source.get_input_embeddings().weight
    pad, mask, first, last = rows_of(model, "pad_token_id", "mask_token_id", "bos_token_id", "eos_token_id")
    for found, wanted in ((pad, 0), (mask, 4), (first, own.cls_token_id), (last, own.sep_token_id)):
        assert torch.equal(found, table[wanted])
    assert model.config.bos_token_id >= len(table) and model.config.eos_token_id >= len(table)
    bias = source.cls.predictions.bias
    assert torch.equal(model.lm_head.bias[: len(table)], bias)
    assert model.lm_head.bias[model.config.eos_token_id] == bias[own.sep_token_id]


@pytest.mark.parametrize("resized", [True, False])
def test_tokens_that_were_added_before_are_kept(resized):
    own, source = own_tokenizer("llama"), tiny("llama")
    own.add_tokens(["<extra>"])
    own.add_special_tokens({"pad_token": "<pad>", "extra_special_tokens": ["<|user|>"]})
    known = len(source.get_input_embeddings().weight)
    if resized:
        source.resize_token_embeddings(len(own), mean_resizing=False)
    model = convert(source, None, own)
    ids = torch.tensor([[own.convert_tokens_to_ids(name) for name in ("<extra>", "<|user|>", "<pad>", "<s>")]])
    assert torch.equal(ids, torch.tensor([[known, known + 2, known + 1, 0]]))
    tokenizer = M6RecTokenizer.from_backbone(own)
    assert model.config.vocab_size == len(tokenizer) == len(own) + 33
    assert tokenizer.convert_tokens_to_ids("<|user|>") == known + 2
    if resized:
        torch.testing.assert_close(logits(model, ids)[..., : len(own)], logits(source, ids), rtol=1e-4, atol=1e-4)


def test_rows_that_stand_for_no_token_make_room():
    source = tiny("qwen2", vocab_size=280)  # rounded up from 270
    model = convert(source, None, own_tokenizer("qwen2"))
    assert model.config.vocab_size == len(model.get_input_embeddings().weight) == 270 + 33
    ids = batch(270, "right", (6,))[0]
    torch.testing.assert_close(logits(model, ids)[..., :270], logits(source, ids)[..., :270], rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------------------------------------------- refused


def test_other_architectures_are_refused_with_the_list_of_those_that_are_not(tmp_path):
    supported = "supported: bert, gpt2, llama, qwen2, qwen3"
    other = OPTForCausalLM(
        OPTConfig(vocab_size=50, hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(ValueError, match=f"'opt' is not supported as a backbone; {supported}"):
        convert(other, None, own_tokenizer("llama"))
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=supported):
        convert(tmp_path)
    assert list(FAMILIES) == list(HEADS)


@pytest.mark.parametrize(
    ("family", "lost"),
    [
        ("llama", "model.layers.1.mlp.up_proj.weight"),
        ("bert", "cls.predictions.transform.dense.weight"),
        ("gpt2", "transformer.h.2.attn.c_attn.bias"),
    ],
)
def test_a_checkpoint_without_a_weight_is_refused(family, lost, tmp_path):
    path = publish(tmp_path, family) / "model.safetensors"
    weights = load_file(path)
    del weights[lost]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks {lost}"):
        convert(tmp_path)


def test_a_checkpoint_with_weights_too_many_is_refused(tmp_path):
    path = publish(tmp_path, "llama") / "model.safetensors"
    save_file({**load_file(path), "model.layers.0.gate.weight": torch.ones(3)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"has no place for model\.layers\.0\.gate\.weight"):
        convert(tmp_path)


def test_a_head_that_would_be_lost_is_refused(tmp_path):
    source = tiny("bert", "BertForSequenceClassification")
    with pytest.raises(ValueError, match=r"Classification has no place for classifier\.weight, classifier"):
        convert(source, None, own_tokenizer("bert"))
    with pytest.raises(ValueError, match=r"lacks cls\.predictions.* and has no place for classifier\.bias"):
        convert(publish(tmp_path, "bert", source))


def test_weights_that_are_no_numbers_are_refused():
    source = tiny("llama")
    with pytest.raises(ValueError, match=r"float32 on meta: load the backbone whole"):
        convert(source.to("meta"), None, own_tokenizer("llama"))
    source = tiny("llama")
    packed = torch.nn.Parameter(torch.ones(38, 24, dtype=torch.int8), requires_grad=False)
    source.model.layers[1].mlp.up_proj.weight = packed
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is torch\.int8"):
        convert(source, None, own_tokenizer("llama"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 2}, "num_hidden_layers=2 contradicts the backbone, which has 3"),
        ({"hidden_size": 32}, "hidden_size=32 contradicts the backbone, which has 24"),
        ({"norm_type": "layer"}, "norm_type='layer' contradicts the backbone, which has 'rms'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True contradicts"),
        ({"num_hidden_groups": 1}, "num_hidden_groups=1 contradicts the backbone, which has 3"),
        ({"vocab_size": 999}, "vocab_size=999 contradicts the backbone, which has 303"),
        ({"num_joint_layer": 1}, "no field num_joint_layer"),
        ({"num_joint_layers": 4}, r"num_joint_layers=4 is not in 1\.\.3"),
        ({"segment_summary": 1}, "segment_summary needs segment layers"),
    ],
)
def test_fields_that_contradict_the_backbone_are_refused(fields, message):
    with pytest.raises(Exception, match=message):
        convert(tiny("llama"), tokenizer=own_tokenizer("llama"), **fields)


def test_a_tokenizer_that_is_not_the_backbones_is_refused():
    source = tiny("llama", vocab_size=500)
    with pytest.raises(ValueError, match="a loaded LlamaForCausalLM has no tokenizer"):
        convert(source)
    with pytest.raises(ValueError, match="the tokenizer has 270 tokens, the backbone rows for 500"):
        convert(source, None, own_tokenizer("llama"))
    with pytest.raises(ValueError, match="the tokenizer has 270 tokens, the backbone rows for 200"):
        convert(tiny("llama", vocab_size=200), None, own_tokenizer("llama"))
    with pytest.raises(ValueError, match="is an M6RecTokenizer: give the backbone's own"):
        convert(tiny("llama"), None, M6RecTokenizer.from_backbone(own_tokenizer("llama")))


def test_tokenizers_are_loaded_or_refused(tmp_path):
    own_tokenizer("bert").save_pretrained(tmp_path)
    tiny("bert").save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).get_vocab() == own_tokenizer("bert").get_vocab()
