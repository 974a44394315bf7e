"""What user and item vectors are made of, beside what was learnt."""

import copy
import math

import pytest
import torch

from m6rec import M6RecConfig, M6RecForRecommendation, SegmentCache
from m6rec.item_features_m6rec import TFIDF_ITEMS, vector_width
from m6rec.layout_m6rec import layout
from m6rec.segment_cache_m6rec import UserStates
from tests.modeling_m6rec.tiny import ITEM, PLANS, SEG, SOURCE_END, VOCAB, Writer, build, close, item_rows, pad

SETTINGS = {"num_joint_layers": 2, "segment_summary": 1, "bow_embeddings": True, "tfidf_weight": 0.4}


def learnt_only(model):
    other = copy.deepcopy(model)
    other.config.tfidf_weight = other.config.cold_item_bias = 0.0
    return other


def items_of(row):
    """Words of each [ITEM] segment of a row, and where its [SEG] stands."""
    found = []
    for place, token in enumerate(row):
        if token == ITEM:
            end = row.index(SEG, place)
            found.append((row[place + 1 : end], end))
    return found


def likeness(model, one, other):
    """By hand: the cosine of two texts' words, of those that share no place in the sketch."""
    rarity = model.model.word_sketch.rarity
    weights = [{word: words.count(word) * float(rarity[word]) for word in words} for words in (one, other)]
    norms = [math.sqrt(sum(value**2 for value in own.values())) or 1.0 for own in weights]
    return sum(value * weights[1].get(word, 0) for word, value in weights[0].items()) / norms[0] / norms[1]


def alike(model, row, hidden=()):
    """By hand: E x M likenesses of a row's items to the last five before each place where its user is read."""
    ids = torch.tensor([row])
    lay = layout(ids, None, model.config)
    items, found = items_of(row), []
    for event in range(int(lay.event.max()) + 1):
        recent = [
            words
            for words, end in items
            if lay.source[0, end] and lay.event[0, end] <= event and int(lay.event[0, end]) not in hidden
        ][-TFIDF_ITEMS:]
        sums = [sum(likeness(model, words, other) for words in recent) for other, _ in items]
        found.append([total / max(len(recent), 1) for total in sums])
    return torch.tensor(found)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("side", ("left", "right"))
def test_likeness_of_words_is_added_to_the_product(side, plan):
    model, writer = build(SETTINGS, tfidf_dim=1 << 12), Writer(5)
    rows = [writer.source(events) + writer.candidate() + writer.candidate() for events in (8, 0, 3)]
    batch = pad(rows, side)
    batch["item_embedding_ids"] = item_rows(batch["input_ids"])
    with torch.no_grad():
        out, learnt = model.embed(**batch, plan=plan), learnt_only(model).embed(**batch, plan=plan)
    assert out.user_vectors.shape[-1] == out.item_vectors.shape[-1] == vector_width(model.config)
    assert vector_width(model.config) == model.config.embedding_dim + (1 << 12)
    for row, expected in enumerate(alike(model, row) for row in rows):
        events, items = expected.shape
        products = out.user_vectors[row, :events] @ out.item_vectors[row, :items].T
        before = learnt.user_vectors[row, :events] @ learnt.item_vectors[row, :items].T
        close(products, before + 0.4 * expected, rtol=1e-4, atol=1e-4)
    assert (alike(model, rows[0])[-1] - alike(model, rows[0])[-2]).abs().max() > 1e-2


def test_a_narrow_sketch_is_close():
    model, writer = build(SETTINGS, tfidf_dim=256), Writer(4)
    row = writer.source(8) + writer.candidate()
    with torch.no_grad():
        out, learnt = (
            model.embed(input_ids=torch.tensor([row])),
            learnt_only(model).embed(input_ids=torch.tensor([row])),
        )
    found = (out.user_vectors @ out.item_vectors.mT - learnt.user_vectors @ learnt.item_vectors.mT)[0] / 0.4
    expected = alike(model, row)
    assert (found - expected).abs().mean() < 0.03 < expected.abs().mean()


def test_an_event_that_is_hidden_is_not_compared_with():
    model, writer = build(SETTINGS, tfidf_dim=1 << 12), Writer(6)
    row = writer.source(7) + writer.candidate()
    ids = torch.tensor([row])
    hidden = layout(ids, None, model.config).event == 5
    with torch.no_grad():
        out = model.embed(input_ids=ids, hidden_events=hidden)
        learnt = learnt_only(model).embed(input_ids=ids, hidden_events=hidden)
    found = (out.user_vectors @ out.item_vectors.mT - learnt.user_vectors @ learnt.item_vectors.mT)[0] / 0.4
    shown = [event for event in range(8) if event != 5]
    close(found[shown], alike(model, row, hidden=(5,))[shown], rtol=1e-3, atol=1e-3)


def test_requests_of_one_row_are_compared_with_their_own_items():
    model, writer = build(SETTINGS), Writer(10)
    rows = [writer.source(events) + writer.candidate() for events in (3, 7, 0, 2)]
    packed = torch.tensor([sum(rows, [])])
    with torch.no_grad():
        together = model.embed(input_ids=packed)
        apart = [model.embed(input_ids=torch.tensor([row])) for row in rows]
    close(together.user_vectors[0], torch.cat([out.user_vectors[0] for out in apart]))
    close(together.item_vectors[0], torch.cat([out.item_vectors[0] for out in apart]))


def test_items_by_themselves_have_the_vectors_that_they_have_in_rows():
    model, writer = build(SETTINGS), Writer(7)
    row = writer.source(3)
    segments = [[ITEM, *words, SEG] for words, _ in items_of(row)]
    with torch.no_grad():
        items = model.embed(input_ids=torch.tensor([row])).item_vectors[0]
        batch = pad(segments)
        close(items, model.embed_items(batch["input_ids"], batch["attention_mask"]))
        close(items, torch.cat([model.embed_items(torch.tensor([segment])) for segment in segments]))
        states = model.item_states(batch["input_ids"], batch["attention_mask"])
        close(items, model.embed_items(batch["input_ids"], batch["attention_mask"], states))
    model = build({**SETTINGS, "bow_embeddings": False})
    with pytest.raises(ValueError, match="no words to compare"):
        model.embed_items(states=states)


@pytest.mark.parametrize("events", (0, 2, 5, 9))
def test_a_kept_user_is_compared_with_all_its_last_items(events):
    model, users, cache = build(SETTINGS), UserStates(), SegmentCache()
    writer = Writer(8)
    head, more, target = writer.head(events), writer.event(), writer.candidate()
    for row in (head, head + more, head + more + writer.event(), head):
        ids = torch.tensor([[*row, SOURCE_END, *target]])
        with torch.no_grad():
            found = model.embed(input_ids=ids, plan="cached", user_states=users, segment_cache=cache)
            whole = model.embed(input_ids=ids, plan="flat")
        for one, all_of_it in ((found.user_vectors, whole.user_vectors), (found.item_vectors, whole.item_vectors)):
            close(one[0], all_of_it[0, all_of_it.shape[1] - one.shape[1] :])
    assert users.positions_reused > 0


def test_no_loss_knows_of_it_nor_of_the_bonus():
    model, writer = build(SETTINGS, cold_item_bias=0.3), Writer(9)
    ids = torch.tensor([writer.source(3)])
    labels = torch.full_like(ids, -100)
    labels[(ids == SEG) & (layout(ids, None, model.config).event > 0)] = 1
    items = {
        "item_input_ids": torch.tensor([[ITEM, 40, SEG], [ITEM, 50, SEG]]),
        "candidate_embedding_ids": torch.tensor([0, 2]),
    }
    losses = [own(input_ids=ids, retrieval_labels=labels, **items).loss for own in (model, learnt_only(model))]
    close(*losses)


def test_rare_words_weigh_more_and_counts_are_saved(tmp_path):
    model = M6RecForRecommendation(build(SETTINGS).config)
    sketch = model.model.word_sketch
    with pytest.raises(ValueError, match=r"word_sketch\.fit"):
        model.embed_items(torch.tensor([[ITEM, 40, SEG]]))
    sketch.fit([[40, 41], [40, 42, 42], [40]])
    close(sketch.rarity[[40, 41, 42, 43]], torch.tensor([1.0, 2.0, 2.0, 4.0]).log())
    digest = model.fingerprint()
    model.save_pretrained(tmp_path)
    again = M6RecForRecommendation.from_pretrained(tmp_path)
    assert torch.equal(again.model.word_sketch.rarity, sketch.rarity) and again.fingerprint() == digest
    again.model.word_sketch.fit([[40], [41]])
    assert again.fingerprint() != digest
    again.config.tfidf_weight = 0.2
    assert again.fingerprint() != digest
    model.resize_token_embeddings(VOCAB + 2)
    close(sketch.rarity[-3:], torch.tensor(4.0).log().expand(3))


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(Exception, match=r"tfidf_weight=-1\.0 is negative"):
        M6RecConfig.preset("tiny", tfidf_weight=-1.0)
    with pytest.raises(Exception, match="tfidf_dim=0"):
        M6RecConfig.preset("tiny", tfidf_dim=0)
