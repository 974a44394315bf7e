"""Losses reach every parameter, by every plan; adapters of PEFT train, write and stay exact."""

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from m6rec.layout_m6rec import layout
from tests.modeling_m6rec.test_generation import brute_force, prompts
from tests.modeling_m6rec.tiny import (
    EOS,
    OPTION,
    OPTIONS,
    SEG,
    SMALL,
    SOURCE_END,
    TEXT,
    Writer,
    build,
    close,
    config_of_ids,
    everywhere,
    few,
    item_rows,
    pad,
    scores,
    small,
)


def training_batch(retrieval=False, seed=12):
    """Two rows with two given targets and a written one, and every kind of label."""
    writer = Writer(seed)
    options = [OPTION, *OPTIONS, SEG, SOURCE_END]
    rows = [writer.source(n)[:-1] + options + writer.candidate() + writer.candidate() + writer.text() for n in (2, 3)]
    batch = pad(rows, "left")
    lay = layout(**batch, config=config_of_ids())
    ids = batch["input_ids"]
    batch["labels"] = ids.masked_fill(~lay.written | (ids == TEXT), -100)
    batch["click_labels"] = torch.tensor([[1, 0, -100], [0, 1, -100]])
    batch["rating_labels"] = torch.tensor([[5.0, 1.0, -100.0], [2.0, 3.0, -100.0]])
    batch["interaction_labels"] = torch.tensor([[[1, 0, 1], [0, 1, 0], [-100] * 3]] * 2)
    batch["layout_ids"] = ids
    batch["item_embedding_ids"] = item_rows(ids)
    if retrieval:
        last = ids.new_full(ids.shape, -100)
        for row in range(2):
            event = lay.event[row] * (ids[row] == SEG)
            last[row, int(event.argmax() if not event.any() else (event == event.max()).nonzero()[-1])] = row
        items = pad([writer.segment(12, 2, 5) for _ in range(3)])
        batch["retrieval_labels"] = last
        batch["item_input_ids"], batch["item_attention_mask"] = items["input_ids"], items["attention_mask"]
        batch["candidate_embedding_ids"] = torch.tensor([1, 2, 3])
    return batch


@everywhere
@pytest.mark.parametrize("plan", ("flat", "compact"))
def test_every_parameter_moves_in_one_step_of_all_losses(settings, plan):
    model = build(settings, item_embedding_dropout=0.0).train()
    has_vectors = model.config.num_segment_layers > 0
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    out = model(**training_batch(retrieval=has_vectors), plan=plan)
    assert set(out.losses) == {"text", "click", "rating", "interaction"} | ({"retrieval"} if has_vectors else set())
    out.loss.backward()
    optimizer.step()
    still = {key for key, value in model.named_parameters() if torch.equal(value, before[key])}
    heads = {key for key in before if key.startswith(("item_norm", "user_projection", "item_projection"))}
    # The key bias shifts all scores of a query alike: softmax does not see it, its gradient is zero.
    invisible = {key for key in still if key.endswith("k_proj.bias")}
    assert still - invisible == (set() if has_vectors else heads)
    assert all(value.isfinite().all() for value in model.parameters())
    # Of the tables, the touched rows and no others.
    ids = torch.cat([training_batch(True)[key].flatten() for key in ("input_ids", "item_input_ids")])
    if not model.config.tie_word_embeddings and has_vectors:
        moved = (model.model.embeddings.tokens.weight != before["model.embeddings.tokens.weight"]).any(1)
        assert set(moved.nonzero().flatten().tolist()) <= set(ids.tolist())


@everywhere
def test_absent_targets_and_places_leave_gradients_finite(settings):
    """Rows with fewer targets, events or items than others hold NaN in the output, and none in any gradient."""
    model, writer = build(settings).train(), Writer(31)
    batch = pad([writer.source(3) + writer.candidate() + writer.candidate(), writer.source(0) + writer.candidate()])
    out = model(
        **batch, click_labels=torch.tensor([[1, 0], [1, -100]]), item_embedding_ids=item_rows(batch["input_ids"])
    )
    loss = out.loss
    for vectors in (out.user_vectors, out.item_vectors):
        if vectors is not None:
            assert vectors.isnan().any()
            loss = loss + vectors[vectors.isfinite().all(-1)].square().sum(0).mean()
    assert out.scores.isnan().any()
    loss.backward()
    for key, value in model.named_parameters():
        assert value.grad is None or value.grad.isfinite().all(), key


@small
def test_checkpointing_changes_no_gradient(settings):
    grads = []
    for checkpointing in (False, True):
        model = build(settings, item_embedding_dropout=0.0).train()
        if checkpointing:
            enable = "activation_checkpointing_enable"  # the name before Transformers 5.24 is gradient_...
            getattr(model, enable if hasattr(model, enable) else "gradient_checkpointing_enable")()
        model(**training_batch()).loss.backward()
        grads.append({key: value.grad for key, value in model.named_parameters() if value.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for key, grad in grads[0].items():
        close(grads[1][key], grad)


def test_item_memory_is_dropped_per_occurrence_in_training_only():
    model = build({"num_joint_layers": 2}, item_embedding_dropout=0.5)
    states, ids = torch.zeros(1, 4000, 36), torch.ones(1, 4000, dtype=torch.long)
    kept = (model.train().model.add_to_items(states, ids) != 0).any(-1).float().mean()
    assert 0.45 < kept < 0.55
    assert (model.eval().model.add_to_items(states, ids) != 0).any(-1).all()


def test_what_enters_the_joint_layers_is_dropped_in_training_only():
    texts = Writer(5).source(3)
    model, lay = (
        build({"num_joint_layers": 2}, entry_dropout=0.25).model,
        layout(**pad([texts]), config=config_of_ids()),
    )
    states = torch.ones(1, len(texts), 36)
    whole = model.eval().enter(states, lay)
    entered = torch.stack([model.train().enter(states, lay) for _ in range(40)])
    kept = entered != 0
    assert 0.2 < 1 - kept.float().mean() < 0.3
    close(entered[kept], (whole / 0.75).expand_as(entered)[kept])


@few
def test_trainer_runs_bare_and_learns(settings, tmp_path):
    model = build(settings)
    batch = training_batch()
    rows = [{key: value[row] for key, value in batch.items()} for row in range(2)] * 4
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=12, per_device_train_batch_size=2, learning_rate=0.02, report_to="none",
        logging_steps=1, use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]


@few
def test_peft_lora_learns_and_writes(settings):
    model, batch = build(settings), training_batch()
    lora = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj", "down_proj"]))
    optimizer = torch.optim.AdamW([value for value in lora.parameters() if value.requires_grad], lr=0.02)
    losses = []
    for _ in range(5):
        loss = lora(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    rows = prompts()
    text = lora.eval().generate(**rows, max_new_tokens=5, do_sample=False)
    assert torch.equal(text, brute_force(model, rows["input_ids"], rows["attention_mask"], 5)[:, : text.shape[1]])
    given = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        close(scores(model, given, plan="cached"), lora(**given, plan="flat").scores)


@few
@pytest.mark.parametrize("method", ("prefix", "prompt"))
def test_peft_virtual_tokens(settings, method):
    model, batch = build(settings), training_batch()
    kind = PrefixTuningConfig if method == "prefix" else PromptTuningConfig
    tuned = get_peft_model(model, kind(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with torch.no_grad():
        for parameter in (value for value in tuned.parameters() if value.requires_grad):
            parameter.normal_(std=0.5)
    tuned(**batch).loss.backward()
    assert all(value.grad.abs().sum() > 0 for value in tuned.parameters() if value.requires_grad)
    tuned.eval()
    rows = prompts()

    def call(ids, mask):
        return tuned(input_ids=ids, attention_mask=mask, layout_ids=ids).logits

    expected = brute_force(model, rows["input_ids"], rows["attention_mask"], 6, call=call)
    assert not torch.equal(expected, brute_force(model, rows["input_ids"], rows["attention_mask"], 6))
    text = tuned.generate(**rows, max_new_tokens=6, do_sample=False)
    assert torch.equal(text, expected[:, : text.shape[1]])
    ids = rows["input_ids"][2:3, rows["attention_mask"][2].argmax() :]  # left padding makes no difference
    close(call(ids, torch.ones_like(ids))[0, -1], call(rows["input_ids"][2:3], rows["attention_mask"][2:3])[0, -1])
    beams = tuned.generate(**rows, max_new_tokens=6, num_beams=3, do_sample=False)
    assert beams.shape[1] > rows["input_ids"].shape[1]
    with pytest.raises(ValueError, match="plan='cached'"):
        tuned(**{key: batch[key] for key in ("input_ids", "attention_mask", "layout_ids")}, plan="cached")


@small
def test_virtual_tokens_change_no_segment_state(settings):
    model, batch = build(settings), training_batch()
    tuned = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    given = {key: batch[key] for key in ("input_ids", "attention_mask", "layout_ids")}
    seen = []
    model.model.register_forward_hook(lambda module, args, out: seen.append(out.segment_states.detach()))
    with torch.no_grad():
        for parameter in (value for value in tuned.parameters() if value.requires_grad):
            parameter.normal_(std=0.5)
        tuned.eval()(**given)
        model(**given, plan="flat")
    valid = batch["attention_mask"].bool()
    if settings.get("written_attention") == "source":  # written text reads virtual tokens, as it reads its source
        valid &= ~layout(batch["layout_ids"], batch["attention_mask"], model.config).written.bool()
    close(seen[0][valid], seen[1][valid], atol=5e-5)  # sums over three more keys, whose weights are zero


def test_end_of_written_text_is_learned():
    """Labels hold the closing [EOS]: a model that learned one text by heart stops after it."""
    model, row = build(SMALL[0]).train(), torch.tensor([[4, 9, 40, 8, 5, 6, 16, 50, 51, 52, EOS]])
    labels = row.masked_fill(torch.arange(11) < 7, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(40):
        model(row, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    text = model.eval().generate(row[:, :7], max_new_tokens=10, do_sample=False)
    assert text[0].tolist() == row[0].tolist()
