"""The model against other models, its heads against arithmetic, keeping and loading."""

import json

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from m6rec import M6RecConfig, M6RecForRecommendation, M6RecModel
from m6rec.losses_m6rec import retrieval_loss
from tests.modeling_m6rec.tiny import (
    BERT,
    BOS,
    EOS,
    ITEM,
    MASK,
    OPTIONS,
    PAD,
    SEG,
    SMALL,
    TEXT,
    VOCAB,
    Writer,
    build,
    close,
    everywhere,
    item_rows,
    pad,
    scores,
    small,
)

GIVEN, WRITTEN = [[40, 41, SEG, 42, BOS, 50, ITEM, 51], [60, 61, 62], [36, EOS, 37, 38, 39]], [[60, 61, 62], [36, 37]]


def llama_like(model):
    """The transformers class with the same weights."""
    config = model.config
    shape = {
        key: getattr(config, key)
        for key in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "rope_parameters",
            "pad_token_id",
            "tie_word_embeddings",
        )
    }
    llama = LlamaForCausalLM(LlamaConfig(**shape, rms_norm_eps=config.norm_eps)).eval()
    names = {
        "embeddings.tokens": "embed_tokens",
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
    }
    weights = model.state_dict()
    for old, new in names.items():
        weights = {key.replace(old, new): value for key, value in weights.items()}
    assert not llama.load_state_dict(weights, strict=False).missing_keys
    return llama


@pytest.mark.parametrize("joint", (1, 2, 4))
@pytest.mark.parametrize("side", ("left", "right"))
@pytest.mark.parametrize("plan", ("flat", "compact"))
def test_plain_row_equals_a_plain_causal_transformer(joint, side, plan):
    model = build({"num_joint_layers": joint, "segment_summary": 1 if joint < 4 else None})
    llama, batch = llama_like(model), pad(GIVEN, side)
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    valid = batch["attention_mask"].bool()
    with torch.no_grad():
        close(model(**batch, plan=plan).logits[valid], llama(**batch, position_ids=positions).logits[valid])


@pytest.mark.parametrize("targets", (0, 1))
def test_structured_row_equals_a_plain_causal_transformer_when_all_is_causal(targets):
    model = build({"num_joint_layers": 4, "history_attention": "causal"})
    with torch.no_grad():
        model.model.embed_kind.weight.zero_()
        model.model.embed_event.weight.zero_()
    writer = Writer(17)
    ids = torch.tensor([writer.source() + writer.candidate() * targets])
    close(model(ids).logits, llama_like(model)(ids).logits)


def bert_like(model):
    """BERT with the same weights."""
    config = model.config
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "layer_norm_eps": config.norm_eps,
        "pad_token_id": config.pad_token_id,
        "tie_word_embeddings": False,
    }
    names = {
        "model.embeddings.tokens.": "bert.embeddings.word_embeddings.",
        "model.embeddings.positions.": "bert.embeddings.position_embeddings.",
        "model.embeddings.types.": "bert.embeddings.token_type_embeddings.",
        "model.embeddings.norm.": "bert.embeddings.LayerNorm.",
        "model.layers.": "bert.encoder.layer.",
        "self_attn.q_proj": "attention.self.query",
        "self_attn.k_proj": "attention.self.key",
        "self_attn.v_proj": "attention.self.value",
        "self_attn.o_proj": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "mlp.up_proj": "intermediate.dense",
        "mlp.down_proj": "output.dense",
        "mlp_norm": "output.LayerNorm",
        "lm_transform.dense": "cls.predictions.transform.dense",
        "lm_transform.norm": "cls.predictions.transform.LayerNorm",
        "lm_head.weight": "cls.predictions.decoder.weight",
        "lm_head.bias": "cls.predictions.bias",
    }
    weights = model.state_dict()
    for old, new in names.items():
        weights = {key.replace(old, new): value for key, value in weights.items()}
    weights["cls.predictions.decoder.bias"] = weights["cls.predictions.bias"]
    bert = BertForMaskedLM(BertConfig(**shape)).eval()
    missing = bert.load_state_dict(weights, strict=False).missing_keys
    assert not [key for key in missing if "position_ids" not in key], missing
    return bert


@pytest.mark.parametrize("joint", (2, 4))
@pytest.mark.parametrize("plan", ("flat", "compact"))
def test_bidirectional_plain_row_equals_bert(joint, plan):
    model = build({**BERT, "num_joint_layers": joint, "num_key_value_heads": 6}, document_attention="bidirectional")
    bert, batch = bert_like(model), pad(GIVEN)
    valid = batch["attention_mask"].bool()
    labels = torch.where(batch["input_ids"] == 42, 43, -100)
    batch["input_ids"][batch["input_ids"] == 42] = MASK
    with torch.no_grad():
        ours, theirs = model(**batch, plan=plan, labels=labels), bert(**batch, labels=labels)
    close(ours.logits[valid], theirs.logits[valid])
    close(ours.loss, theirs.loss)


@small
def test_eager_equals_sdpa_and_padding_sees_itself(settings):
    writer = Writer(10)
    batch = pad([writer.source(2) + writer.candidate(), writer.prompt(1)])
    sdpa, eager = (build(settings, attn_implementation=kind) for kind in ("sdpa", "eager"))
    assert (sdpa.config._attn_implementation, eager.config._attn_implementation) == ("sdpa", "eager")
    with torch.no_grad():
        one, other = (model(**batch, plan="flat", output_attentions=model is eager) for model in (sdpa, eager))
    close(other.logits, one.logits)
    assert len(other.attentions) == 4
    for weights in other.attentions:
        own = weights.diagonal(dim1=2, dim2=3).transpose(1, 2)[~batch["attention_mask"].bool()]
        close(own, torch.ones_like(own))


def test_hidden_states_are_recorded_by_the_flat_plan():
    model, row = build(SMALL[0]), torch.tensor([Writer(1).source()])
    assert len(model(row, output_hidden_states=True).hidden_states) >= 4
    with pytest.raises(ValueError, match="plan='compact'"):
        model(row, output_hidden_states=True, plan="compact")


def test_item_memory_moves_the_item_and_only_from_the_joint_layers_on():
    model, writer = build({"num_joint_layers": 2}), Writer(11)
    ids = torch.tensor([writer.source(2) + writer.candidate()])
    memory = item_rows(ids)
    with torch.no_grad():
        none, some = (model.embed(input_ids=ids, item_embedding_ids=rows) for rows in (torch.zeros_like(ids), memory))
        close(model.embed(input_ids=ids).item_vectors, none.item_vectors)
        first, second = (model.model(ids, item_embedding_ids=rows).segment_states for rows in (None, memory))
    assert ((none.item_vectors - some.item_vectors).abs().amax(-1) > 1e-3).all()
    assert torch.equal(first, second)


def test_new_items_have_a_bonus_in_every_product_and_others_have_none():
    model, writer = build({"num_joint_layers": 2}), Writer(11)
    ids = torch.tensor([writer.source(3) + writer.candidate()])
    memory, states = item_rows(ids), torch.randn(4, model.config.hidden_size)
    rows = torch.tensor([0, 2, 5, 9])
    with torch.no_grad():
        model.model.item_memory.weight[5] = 0.0  # of an item that training never met
        before, items = (
            model.embed(input_ids=ids, item_embedding_ids=memory),
            model.embed_items(states=states, memory_ids=rows),
        )
        digest = model.fingerprint()
        model.config.cold_item_bias = 0.25
        after, others = (
            model.embed(input_ids=ids, item_embedding_ids=memory),
            model.embed_items(states=states, memory_ids=rows),
        )
        texts = model.embed_items(states=states)
    assert model.fingerprint() != digest
    width = model.config.embedding_dim + 1
    assert after.user_vectors.shape[-1] == after.item_vectors.shape[-1] == others.shape[-1] == width
    user, own = before.user_vectors[0, -1], after.user_vectors[0, -1]
    close(others @ own, items @ user + 0.25 * torch.tensor([1, 0, 1, 0]))
    close(texts[:, -1], torch.full((4,), 0.25))
    with pytest.raises(Exception, match=r"cold_item_bias=1\.0 needs item memory"):
        M6RecConfig.preset("tiny", cold_item_bias=1.0)


def test_resize_item_memory_keeps_rows_and_new_rows_say_nothing():
    model, writer = build({"num_joint_layers": 2}), Writer(11)
    ids = torch.tensor([writer.source(2)])
    memory, plain = item_rows(ids), model.embed(input_ids=ids).item_vectors
    before = model.embed(input_ids=ids, item_embedding_ids=memory).item_vectors
    model.resize_item_embeddings(20)
    assert model.config.num_item_embeddings == 20
    close(model.embed(input_ids=ids, item_embedding_ids=memory).item_vectors, before)
    close(model.embed(input_ids=ids, item_embedding_ids=memory + 10 * (memory > 0)).item_vectors, plain)
    model.resize_item_embeddings(0)
    close(model.embed(input_ids=ids, item_embedding_ids=memory).item_vectors, plain)
    with pytest.raises(ValueError, match="-1 rows"):
        model.resize_item_embeddings(-1)


# ---------------------------------------------------------------------------------------------------------- heads


def two_targets():
    writer = Writer(21)
    return pad([writer.source(2) + writer.candidate() + writer.candidate(), writer.source(1) + writer.candidate()])


@everywhere
def test_scores_are_probabilities_and_ratings(settings):
    model = build(settings, interactions=["like", "share"], rating_values=[1.0, 3.0, 9.0])
    if settings.get("rating_loss") == "regression":
        assert model.config.num_labels == 5
    clicks, shares = model.score(**two_targets()), model.score("interaction", **two_targets())
    known = torch.tensor([[True, True], [True, False]])
    assert torch.equal(clicks.isfinite(), known) and ((clicks[known] > 0) & (clicks[known] < 1)).all()
    assert shares.shape == (2, 2, 2) and ((shares[known] > 0) & (shares[known] < 1)).all()
    ratings = model.score("rating", **two_targets())[known]
    if model.config.rating_loss == "classes":
        assert ((ratings > 1) & (ratings < 9)).all()
    logits = scores(model, two_targets())
    both = logits[..., :2].softmax(-1)[known]
    close(both.sum(-1), torch.ones(3))
    close(both[:, 1], clicks[known])
    with pytest.raises(ValueError, match="'clicks'"):
        model.score("clicks", **two_targets())


def test_option_head_reads_the_option_tokens_embeddings():
    model = build({"num_joint_layers": 2, "score_head": "option", "embedding_size": 20})
    batch = two_targets()
    with torch.no_grad():
        out = model.model(**batch, plan="flat")
    end = int((batch["input_ids"][1] == EOS).nonzero()[-1])
    embeds = model.model.embeddings.tokens.weight[list(OPTIONS)[:10]]
    expected = model.model.embeddings.projection(embeds) @ out.last_hidden_state[1, end]
    close(scores(model, batch)[1, 0], expected)


def test_click_rating_and_interaction_losses_equal_arithmetic():
    weights = {"click": [1.0, 3.0], "rating": [1.0, 1.0, 1.0, 1.0, 2.0], "interaction": [1.0, 2.0, 1.0]}
    model = build({"num_joint_layers": 2}, class_weights=weights, label_smoothing=0.1)
    batch = two_targets()
    logits = scores(model, batch)
    known = logits[[0, 0, 1], [0, 1, 0]]
    click = torch.tensor([[1, 0], [1, -100]])
    logp = known[:, :2].log_softmax(-1)
    smooth = torch.full((3, 2), 0.05)
    smooth[[0, 1, 2], [1, 0, 1]] = 0.95
    weight = torch.tensor([1.0, 3.0])
    expected = -(smooth * logp * weight).sum() / (3 + 1 + 3)
    close(model(**batch, click_labels=click).loss, expected, rtol=1e-4)
    rating = torch.tensor([[5.0, 2.0], [3.0, -100.0]])
    logp, weight = known[:, 2:7].log_softmax(-1), torch.tensor(weights["rating"])
    smooth = torch.full((3, 5), 0.02)
    smooth[[0, 1, 2], [4, 1, 2]] += 0.9
    close(model(**batch, rating_labels=rating).loss, -(smooth * logp * weight).sum() / (2 + 1 + 1), rtol=1e-4)
    interaction = torch.tensor([[[1, 0, 1], [0, 0, -100]], [[1, 1, 0], [-100, -100, -100]]])
    probability, total = known[:, 7:].sigmoid(), 0.0
    for row, target in zip(probability, interaction.flatten(0, 1)[:3]):
        for p, y, w in zip(row, target, weights["interaction"]):
            if y >= 0:
                soft = 0.95 if y else 0.05
                total -= w * soft * p.log() + (1 - soft) * (1 - p).log()
    close(model(**batch, interaction_labels=interaction).loss, total / 8, rtol=1e-4)
    together = model(**batch, click_labels=click, rating_labels=rating)
    close(together.loss, together.losses["click"] + together.losses["rating"])
    model.config.loss_weights = {"rating": 0.25}
    close(
        model(**batch, click_labels=click, rating_labels=rating).loss,
        together.losses["click"] + 0.25 * together.losses["rating"],
    )


def test_wrong_labels_are_refused_with_their_value():
    model, batch = build(SMALL[0]), two_targets()
    with pytest.raises(ValueError, match="holds 2"):
        model(**batch, click_labels=torch.tensor([[2, 0], [1, -100]]))
    with pytest.raises(ValueError, match=r"holds 3\.5"):
        model(**batch, rating_labels=torch.tensor([[3.5, 1.0], [1.0, -100.0]]))
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        model(**batch, click_labels=torch.zeros(2, 3))
    with pytest.raises(ValueError, match="item_input_ids"):
        model(**batch, retrieval_labels=torch.full_like(batch["input_ids"], -100))
    unknown = {"click_labels": torch.full((2, 2), -100), "rating_labels": torch.full((2, 2), -100.0)}
    assert model(**batch, **unknown, labels=torch.full_like(batch["input_ids"], -100)).loss == 0


def test_regression_predicts_around_the_middle_and_squares_errors():
    model, batch = build({"num_joint_layers": 2, "rating_loss": "regression"}), two_targets()
    predicted = model.score("rating", **batch)
    close(predicted, scores(model, batch)[..., 2] + 3)
    rating = torch.tensor([[4.5, 1.0], [-100.0, -100.0]])
    loss = model(**batch, rating_labels=rating).loss
    close(loss, ((predicted[0, 0] - 4.5) ** 2 + (predicted[0, 1] - 1) ** 2) / 2)


def test_exit_losses_rise_with_depth_and_sum_to_one():
    model, batch = build({"num_joint_layers": 3, "exit_layers": [1, 2]}), two_targets()
    click = {"click_labels": torch.tensor([[1, 0], [1, -100]])}
    losses = [model(**batch, **click, exit_layer=layer).loss for layer in (1, 2, 3)]
    close(model(**batch, **click).loss, (1 * losses[0] + 2 * losses[1] + 3 * losses[2]) / 6)
    assert len({round(loss.item(), 6) for loss in losses}) == 3
    for plan in ("flat", "shared_prefix", "cached"):
        close(scores(model, batch, exit_layer=2, plan=plan), scores(model, batch, exit_layer=2))
    with pytest.raises(ValueError, match="exit_layer=4"):
        model(**batch, exit_layer=4)


def test_retrieval_loss_equals_arithmetic_and_corrects_for_frequency():
    users, items = (torch.nn.functional.normalize(torch.randn(n, 5), dim=-1) for n in (3, 4))
    labels, frequency = torch.tensor([2, 0, 3]), torch.tensor([0.5, 0.2, 0.2, 0.1]).log()
    for log_frequency in (None, frequency):
        total = 0.0
        for user, label in zip(users, labels):
            terms = [
                (user @ item / 0.07 - (0 if log_frequency is None else log_frequency[i])).exp()
                for i, item in enumerate(items)
            ]
            total -= (terms[label] / sum(terms)).log()
        close(retrieval_loss(users, items, labels, 0.07, log_frequency), total / 3, rtol=1e-4)
    with pytest.raises(ValueError, match="row 4"):
        retrieval_loss(users, items, torch.tensor([4, 0, 0]), 0.07)


def test_in_batch_and_catalogue_retrieval_agree_and_every_event_is_a_target():
    model, writer = build({"num_joint_layers": 2}), Writer(22)
    events, last = [writer.event() for _ in range(3)], writer.segment(ITEM)
    row, ends = [*writer.head(0)], []
    for event in events:
        row += event
        ends.append(len(row) - 1)
    items = [event[event.index(ITEM) :] for event in events] + [last]
    labels = torch.full((1, len(row)), -100)
    labels[0, ends] = torch.tensor([1, 2, 3])
    batch, given = {"input_ids": torch.tensor([row])}, pad(items)
    by_text = model(
        **batch, retrieval_labels=labels, item_input_ids=given["input_ids"], item_attention_mask=given["attention_mask"]
    ).loss
    by_state = model(**batch, retrieval_labels=labels, item_states=model.item_states(**given)).loss
    close(by_text, by_state)
    vectors = model.embed(**batch)
    close(
        by_text, retrieval_loss(vectors.user_vectors[0, 1:], model.embed_items(**given), torch.tensor([1, 2, 3]), 0.07)
    )
    model.config.history_attention = "bidirectional"
    with pytest.raises(ValueError, match="seen the answer"):
        model(**batch, retrieval_labels=labels, item_states=model.item_states(**given))


@everywhere
def test_plausibility_equals_a_loop(settings):
    model, writer = build(settings), Writer(23)
    row = writer.source(1) + writer.text() + writer.candidate() + writer.text()
    ids = torch.tensor([row])
    with torch.no_grad():
        logp = model(ids, plan="flat").logits[0].log_softmax(-1)
        found = model.plausibility(input_ids=ids)[0]
    assert found.isfinite().tolist() == [True, False, True]
    for number, start in ((0, row.index(TEXT)), (2, len(row) - row[::-1].index(TEXT) - 1)):
        values = []
        for place in range(start + 1, len(row)):
            values.append(logp[place - 1, row[place]])
            if row[place] == EOS:
                break
        close(found[number], torch.stack(values).mean())


@everywhere
@pytest.mark.parametrize("padding", [0, 3])
def test_plausibility_leaves_out_a_lead_as_far_as_each_text_begins_with_it(settings, padding):
    model, lead = build(settings), [30, 31, 32]
    texts = [[30, 31, 32, 40, 30, 31, 32], [30, 31, 33, 32], [31, 30, 31, 32], [30, 31, 32]]
    row = [PAD] * padding + Writer(23).source(1)
    spans = []
    for text, left_out in zip(texts, (3, 2, 0, 3)):
        row += [BOS, TEXT, *text, EOS]
        spans.append(range(len(row) - len(text) - 1 + left_out, len(row)))
    ids = torch.tensor([row])
    with torch.no_grad():
        logp = model(ids, plan="flat").logits[0].log_softmax(-1)
        found = model.plausibility(input_ids=ids, plausibility_lead=lead)[0]
    for value, span in zip(found, spans, strict=True):
        close(value, torch.stack([logp[place - 1, row[place]] for place in span]).mean())


# --------------------------------------------------------------------------------------------------------- keeping


@everywhere
def test_save_load_is_exact(settings, tmp_path):
    model = build(settings)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file() and not list(tmp_path.glob("*.bin"))
    again, info = M6RecForRecommendation.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    batch = two_targets()
    for field in ("scores", "logits"):
        assert torch.equal(getattr(model(**batch), field).nan_to_num(), getattr(again(**batch), field).nan_to_num())
    assert again.fingerprint() == model.fingerprint()
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["auto_map"]["AutoModel"] == saved["auto_map"]["AutoModelForCausalLM"]


def test_auto_classes_and_bare_network(tmp_path):
    model, batch = build(SMALL[1]), two_targets()
    model.save_pretrained(tmp_path)
    for auto in (AutoModel, AutoModelForCausalLM):
        assert type(auto.from_pretrained(tmp_path)) is M6RecForRecommendation
    bare = M6RecModel.from_pretrained(tmp_path)
    close(bare(**batch).last_hidden_state, model.model(**batch).last_hidden_state, rtol=0, atol=0)
    half = AutoModel.from_pretrained(tmp_path, dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    known = torch.tensor([[True, True], [True, False]])
    assert (half.score(**batch) - model.score(**batch))[known].abs().max() < 0.1


def test_fingerprint_follows_item_vectors_only(tmp_path):
    model = build(SMALL[0])
    before = model.fingerprint()
    with torch.no_grad():
        model.user_projection.weight.add_(1)
        model.model.layer(3).mlp.up_proj.weight.add_(1)
        assert model.fingerprint() == before
        model.model.layer(0).mlp.up_proj.weight[0, 0] += 1e-3
    assert model.fingerprint() != before


def test_resize_token_embeddings_keeps_the_old_tokens():
    for settings in ({"num_joint_layers": 2, "tie_word_embeddings": True, "embedding_size": 20}, SMALL[0]):
        model, batch = build(settings), two_targets()
        with torch.no_grad():
            before = model(**batch).logits
            model.resize_token_embeddings(VOCAB + 6)
            after = model(**batch).logits
        assert after.shape[-1] == VOCAB + 6 == model.config.vocab_size
        close(after[..., :VOCAB], before)


def test_attention_that_cannot_take_our_masks_is_refused():
    for kind in ("flex_attention", "flash_attention_2"):
        with pytest.raises((ValueError, ImportError)):
            build(SMALL[0], attn_implementation=kind)


@small
def test_attentions_carry_gradients(settings):
    model = build(settings)
    model.set_attn_implementation("eager")
    out = model(**two_targets(), output_attentions=True)
    assert len(out.attentions) == model.config.num_hidden_layers
    for weights in out.attentions:
        weights.retain_grad()
    out.scores.nan_to_num().sum().backward()
    assert all(weights.grad is not None and weights.grad.abs().sum() > 0 for weights in out.attentions)
