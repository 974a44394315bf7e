"""Written text that attends to its source in every layer, and given text that does not change by it."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError

from m6rec import M6RecConfig, M6RecForRecommendation, RecommendationPipeline, SegmentCache, ranking_m6rec
from m6rec.layout_m6rec import layout
from m6rec.segment_cache_m6rec import UserStates, _digest
from m6rec.tuning import tune
from tests.modeling_m6rec import shop
from tests.modeling_m6rec.test_generation import brute_force
from tests.modeling_m6rec.tiny import (
    BERT,
    BOS,
    EOS,
    EVENT,
    ITEM,
    PAD,
    PLANS,
    SEG,
    SOURCE,
    SOURCE_END,
    TEXT,
    USER,
    WORDS,
    Writer,
    build,
    close,
    item_rows,
    pad,
    scores,
)
from tests.modeling_m6rec.tuning.test_adapter import shake

DEEP = [
    {"num_joint_layers": 1, "segment_summary": 1, "bow_embeddings": True},
    {"num_joint_layers": 3, "segment_attention": "causal", "skipped_kinds": ["event", "now"], "exit_layers": [1]},
    {**BERT, "num_joint_layers": 2, "history_attention": "bidirectional"},
]
deep = pytest.mark.parametrize("settings", DEEP, ids=("summary", "skipped", "bert"))


def both(settings, **more):
    """The same weights with written text that attends to its segment, and to its source, in the segment layers."""
    models = [build(settings, written_attention=value, **more) for value in ("segment", "source")]
    for old, new in zip(*(model.state_dict().values() for model in models)):
        assert torch.equal(old, new)
    return models


def likelihoods(model, rows, **more):
    with torch.no_grad():
        out = model(**pad(rows), return_plausibility=True, return_logits=False, **more)
    return out.plausibility


# -------------------------------------------------------------------------------------------------- given text stays


@deep
@pytest.mark.parametrize("plan", ("compact", "cached"))
def test_rows_without_written_text_are_equal_to_the_last_bit(settings, plan):
    writer = Writer(1)
    batch = pad([writer.source(n) + writer.candidate() + writer.candidate() for n in (0, 3, 5)])
    batch["item_embedding_ids"] = item_rows(batch["input_ids"])
    found = []
    for model in both(settings):
        model.requires_grad_(False)
        out = model.model(**batch, plan=plan, segment_cache=SegmentCache())
        vectors = model(**batch, plan=plan, segment_cache=SegmentCache())
        found.append((out.segment_states, out.last_hidden_state, vectors.scores, vectors.user_vectors.nan_to_num()))
    for old, new in zip(*found):
        assert torch.equal(old, new)


@deep
def test_item_vectors_fingerprint_and_kept_states_are_those_of_either_setting(settings, tmp_path):
    writer = Writer(2)
    items = pad([writer.segment(ITEM) for _ in range(5)])
    old, new = both(settings)
    with torch.no_grad():
        assert torch.equal(old.embed_items(**items), new.embed_items(**items))
    assert old.fingerprint() == new.fingerprint() and _digest(old.model) == _digest(new.model)
    row = {"input_ids": torch.tensor([writer.source(3) + writer.candidate()])}
    first, second = SegmentCache(directory=tmp_path), SegmentCache(directory=tmp_path)
    before, after = (
        scores(model, row, plan="cached", segment_cache=cache) for model, cache in ((old, first), (new, second))
    )
    assert torch.equal(before, after)
    assert second.disk_hits == second.hits > 0 and second.misses == 0


@deep
@pytest.mark.parametrize("plan", PLANS)
def test_a_written_target_changes_no_given_text(settings, plan):
    """Scores and vectors of a row are the same with and without text that reads it."""
    model, writer = build(settings, written_attention="source"), Writer(3)
    source, candidates = writer.source(3), writer.candidate() + writer.candidate()
    with torch.no_grad():
        alone, joined = (
            model(torch.tensor([source + candidates + text]), plan=plan, segment_cache=SegmentCache())
            for text in ([], writer.text())
        )
    close(joined.scores[:, :2], alone.scores)
    close(joined.user_vectors, alone.user_vectors)
    close(joined.item_vectors[:, : alone.item_vectors.shape[1]], alone.item_vectors)


# --------------------------------------------------------------------------------------------- what written text reads


@deep
@pytest.mark.parametrize("plan", PLANS)
def test_a_word_that_given_text_skips_changes_what_is_written(settings, plan):
    old, new = both(settings)
    row = [SOURCE, USER, 50, 51, SEG, SOURCE_END, BOS, ITEM, 60, SEG, EOS, BOS, ITEM, 61, SEG, TEXT, 40, 41, 42, EOS]
    if old.config.skipped_kinds:
        row[1:5] = [EVENT, 50, 51, SEG]  # a kind that is skipped
    other = [*row[:2], 55, *row[3:]]
    texts = [[likelihoods(model, [one], plan=plan)[0, 1] for one in (row, other)] for model in (old, new)]
    clicks = [scores(new, pad([one]), plan=plan)[0, 0] for one in (row, other)]
    unread = old.config.segment_summary == 1 and old.config.segment_attention == "causal"
    assert (texts[1][0] - texts[1][1]).abs() > 1e-3
    if old.config.skipped_kinds or unread:
        close(texts[0][0], texts[0][1])
    if old.config.skipped_kinds:
        close(clicks[0], clicks[1])


@deep
@pytest.mark.parametrize("plan", PLANS)
def test_written_text_sees_neither_another_target_nor_a_hidden_event(settings, plan):
    model, writer = build(settings, written_attention="source"), Writer(5)
    events = [writer.event() for _ in range(3)]
    changed = [events[0], [token if token < WORDS[0] else WORDS[-1] for token in events[1]], events[2]]
    text, tail = writer.text(), [SOURCE_END]
    rows = [[SOURCE, *sum(some, []), *tail, *writer.text(), *text] for some in (events, changed)]
    hidden = layout(**pad(rows[:1]), config=model.config).event == 2
    first, second = (likelihoods(model, [row], plan=plan, hidden_events=hidden)[0, 1] for row in rows)
    close(first, second)
    shown = [likelihoods(model, [row], plan=plan)[0, 1] for row in rows]
    assert (shown[0] - shown[1]).abs() > 1e-4
    lone = likelihoods(model, [[SOURCE, *sum(events, []), *tail, *text]], plan=plan, hidden_events=hidden)[0, 0]
    close(first, lone)


@deep
def test_users_whose_history_is_kept_give_the_same_texts(settings):
    model, writer = build(settings, written_attention="source"), Writer(6)
    users, cache, head = UserStates(), SegmentCache(), writer.head(3)
    tail = writer.event() + [SOURCE_END]
    asked = [[*head, SOURCE_END, *writer.candidate()], [*head, *tail, *writer.text()], [*head, *tail, *writer.text()]]
    with torch.no_grad():
        for row in asked:
            ids = torch.tensor([row])
            given = {"return_plausibility": True, "return_logits": False}
            found = model(ids, plan="cached", user_states=users, segment_cache=cache, **given)
            wanted = model(ids, plan="flat", **given)
            close(found.plausibility, wanted.plausibility)
            close(found.scores, wanted.scores)


@deep
@pytest.mark.parametrize("plan", PLANS[1:])
def test_gradients_of_written_text_are_those_of_the_flat_plan(settings, plan):
    model, writer = build(settings, written_attention="source"), Writer(7)
    batch = pad([writer.source(2) + writer.candidate() + writer.text(), writer.source(4) + writer.candidate()])
    grads = []
    for how in ("flat", plan):
        model.zero_grad()
        out = model(**batch, plan=how, segment_cache=SegmentCache(), return_plausibility=True, return_logits=False)
        (out.plausibility.nansum() + out.scores[..., 0].nansum()).backward()
        grads.append({name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None})
    assert grads[0]["model.embeddings.tokens.weight"].any()
    for name, grad in grads[0].items():
        rounding = 1e-5 * max(1.0, float(grad.abs().max()))
        close(grads[1].get(name, torch.zeros_like(grad)), grad, rtol=1e-4, atol=rounding)


@deep
def test_gradient_checkpointing_changes_no_gradient(settings):
    model, writer = build(settings, written_attention="source"), Writer(8)
    batch, grads = pad([writer.source(2) + writer.text()]), []
    batch["labels"] = torch.where(layout(**batch, config=model.config).written, batch["input_ids"], -100)
    model.train()
    for _ in range(2):
        model.zero_grad()
        model(**batch, only_losses=True).loss.backward()
        grads.append(model.model.embeddings.tokens.weight.grad.clone())
        model.gradient_checkpointing_enable()
    close(grads[0], grads[1])


def test_many_candidates_are_ranked_by_plausibility_in_short_rows(monkeypatch):
    model, own = shop.build(written_attention="source", num_joint_layers=1), shop.processor()
    request = {**shop.SOURCE, "candidates": [*shop.TITLES, *shop.REQUEST["candidates"]]}
    recommend = RecommendationPipeline(model=model, processor=own)
    sizes, scores = [], []
    model.model.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[1]))
    for limit in (ranking_m6rec.TEXT_TOKENS_AT_ONCE, 250):
        monkeypatch.setattr(ranking_m6rec, "TEXT_TOKENS_AT_ONCE", limit)
        rows = recommend(request, task="plausibility", top_k=50)
        scores.append({row["item"]: row["score"] for row in rows})
    assert scores[1] == pytest.approx(scores[0], abs=1e-4) and len(scores[0]) > 8
    assert sizes[0] > 250 >= max(sizes[1:])


# ---------------------------------------------------------------------------------------------------- virtual tokens


@deep
@pytest.mark.parametrize("method", ("prefix", "prompt", "lora"))
def test_generate_with_tuned_models_equals_whole_passes(settings, method):
    tuned = shake(tune(build(settings, written_attention="source", tie_word_embeddings=False), method, ["writing"]))
    writer = Writer(9)
    batch = pad([writer.prompt(n) for n in (0, 1, 3)], "left")

    def call(ids, mask):
        return tuned(input_ids=ids, attention_mask=mask, layout_ids=ids).logits

    expected = brute_force(tuned.base_model, batch["input_ids"], batch["attention_mask"], 6, call)
    text = tuned.generate(**batch, layout_ids=batch["input_ids"], max_new_tokens=6, do_sample=False)
    assert torch.equal(text, expected[:, : text.shape[1]])


def test_a_prefix_reaches_written_text_in_the_segment_layers_and_given_text_not():
    tuned = shake(tune(build({"num_joint_layers": 1}, written_attention="source"), "prefix", ["writing"]))
    writer = Writer(10)
    ids = torch.tensor([writer.source(2) + writer.text()])
    written = layout(ids, None, tuned.base_model.config).written[0]
    with torch.no_grad():
        plain = tuned.base_model.model(ids, plan="flat").segment_states[0]
        inner = []
        handle = tuned.base_model.model.register_forward_hook(lambda _, args, out: inner.append(out.segment_states))
        tuned(input_ids=ids, layout_ids=ids)
        handle.remove()
    close(inner[0][0][~written], plain[~written])
    assert (inner[0][0][written] - plain[written]).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------------ configuration


def test_positions_that_depend_on_the_row_are_refused():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(
        StrictDataclassClassValidationError, match="rope_type='dynamic' depend on the length of the row"
    ):
        M6RecConfig.preset("tiny", written_attention="source", rope_parameters=rope)
    assert M6RecConfig.preset("tiny").written_attention == "segment", "old checkpoints keep it"


def test_with_all_layers_joint_either_setting_is_the_same_model():
    writer = Writer(11)
    ids = torch.tensor([writer.source(2) + writer.text()])
    with torch.no_grad():
        old, new = (model(ids).logits for model in both({"num_joint_layers": 4}))
    assert torch.equal(old, new)


def test_a_saved_model_writes_as_before(tmp_path):
    model, writer = build(DEEP[0], written_attention="source"), Writer(12)
    model.save_pretrained(tmp_path)
    again = M6RecForRecommendation.from_pretrained(tmp_path).eval()
    assert again.config.written_attention == "source"
    batch = pad([writer.prompt(2)], "left")
    texts = [one.generate(**batch, max_new_tokens=5, do_sample=False, pad_token_id=PAD) for one in (model, again)]
    assert torch.equal(*texts)
