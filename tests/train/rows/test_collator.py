"""Batches: each user place is asked for the item that came next, among items that are each there once."""

import numpy as np
import pytest
import torch

from m6rec.train.config.arguments import TaskArguments
from m6rec.train.rows.collator import CatalogueRows, M6RecDataCollator
from m6rec.train.rows.examples import read_requests, training_rows
from m6rec.train.runs.build import prepare

NEGATIVES = ["batch", "sampled", "catalogue"]


def collator_of(run, seed=0, padding_side="right", items=None, **task):
    catalogue = run.catalogue
    if items is not None:
        catalogue = CatalogueRows.read(items, np.arange(1, len(items) + 1), run.processor)
    return M6RecDataCollator(run.processor, run.model.config, catalogue, TaskArguments(**task), seed, padding_side)


def rows_of(run, number=8, **task):
    return training_rows(run.writer, run.split.train, run.processor, TaskArguments(**task))[:number]


def walk(ids, names):
    """User places of a row by a walk over its tokens: the head's, then the last [SEG] of each event."""
    head, events, kind, in_event = None, [], None, False
    for place, name in enumerate(names[index] for index in ids):
        if name == "[BOS']":
            head = place
        elif name in ("[EOS']", "[NOW]"):
            in_event = False
        elif name == "[EVENT]":
            in_event = True
            events.append(None)
        if name.isupper() and name.startswith("[") and name not in ("[SEG]", "[BOS']", "[EOS']"):
            kind = name
        if name == "[SEG]" and in_event:
            events[-1] = place
        elif name == "[SEG]" and kind == "[USER]":
            head = place
    return [head, *events]


def asked(run, batch):
    """(row, place, text of the item that is to be found) for each label of a batch."""
    tokenizer, labels = run.processor.tokenizer, batch["retrieval_labels"]
    found = []
    for row, place in (labels != -100).nonzero().tolist():
        item = batch["item_input_ids"][labels[row, place]]
        kept = item[batch["item_attention_mask"][labels[row, place]] > 0]
        found.append((row, place, tokenizer.decode(kept, skip_special_tokens=True)))
    return found


def expected(run, rows, shift):
    """The same by a walk over each row and its `next_items`."""
    tokenizer = run.processor.tokenizer
    names = {index: name for name, index in tokenizer.get_vocab().items()}
    found = []
    for number, row in enumerate(rows):
        for place, item in zip(walk(row["input_ids"], names), row["next_items"], strict=True):
            if item != -100:
                text = tokenizer.decode(run.catalogue.input_ids[item], skip_special_tokens=True)
                found.append((number, place + shift(row), text))
    return found


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_each_user_place_is_asked_for_the_item_that_came_next(run, negatives, padding_side):
    rows = rows_of(run, 12)
    batch = collator_of(run, padding_side=padding_side, negatives=negatives, num_sampled=5)(rows)
    width = batch["input_ids"].shape[1]
    shift = (lambda row: width - len(row["input_ids"])) if padding_side == "left" else lambda row: 0
    assert asked(run, batch) == expected(run, rows, shift)
    assert len({len(row["input_ids"]) for row in rows}) > 1, "some rows are padded"
    titles = {run.writer.item(item_id)["title"] for item_id in run.split.train["item_id"]}
    assert all(text.rpartition(", ")[0] in titles for _, _, text in asked(run, batch))


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_each_item_to_choose_among_is_there_once(run, negatives):
    rows = rows_of(run, 3)
    batch = collator_of(run, negatives=negatives, num_sampled=4)(rows)
    items = [tuple(item) for item in batch["item_input_ids"].tolist()]
    assert len(set(items)) == len(items) == len(batch["candidate_embedding_ids"])
    positives = {item for row in rows for item in row["next_items"] if item != -100}
    if negatives == "batch":
        assert len(items) == len(positives)
    elif negatives == "catalogue":
        learnt = np.flatnonzero(run.catalogue.counts)  # what was nobody's next is no negative either
        assert len(items) == len(learnt) == 13 < len(run.writer.items)
        lengths = batch["item_attention_mask"].sum(1).tolist()
        assert [list(ids[:n]) for ids, n in zip(items, lengths)] == [run.catalogue.input_ids[row] for row in learnt]
    else:
        assert len(positives) <= len(items) <= len(positives) + 4


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_evidence_is_that_of_the_events_before_each_label(run, negatives):
    rows, seen = rows_of(run, 5), []
    collator = collator_of(run, negatives=negatives, num_sampled=4)

    def evidence(users, histories, times, candidates):
        seen.extend(zip(users, [history.tolist() for history in histories], [own.tolist() for own in times]))
        return torch.arange(len(users) * len(run.writer.items)).float().view(len(users), -1)[:, candidates]

    collator.evidence = evidence
    batch = collator(rows)
    frame, expected, following, starts = run.split.train, [], [], {}
    for row in rows:
        user, met, times = row["events"]
        mine = frame[frame["user_id"] == user]
        own = [run.writer.rows[item_id] for item_id in mine["item_id"]]
        start, count = starts.get(user, 0), len(row["next_items"])
        assert met == own[start : start + count - 1]
        assert times == mine["timestamp"].tolist()[start : start + count - 1]
        for place in range(int(start > 0), count):
            following.append(own[start + place])
            expected.append((user, met[:place], times[:place]))
        starts[user] = start + count - 1
    assert seen == expected
    labels = batch["retrieval_labels"][batch["retrieval_labels"] != -100]
    assert batch["item_evidence"].shape == (len(labels), len(batch["candidate_embedding_ids"]))
    positive = batch["item_evidence"].gather(1, labels[:, None])[:, 0]
    assert positive.tolist() == [place * len(run.writer.items) + item for place, item in enumerate(following)]


def test_evidence_changes_the_loss_as_it_changes_the_cosines(run):
    collator = collator_of(run)
    plain = collator(rows_of(run, 3))
    collator.evidence = lambda users, histories, times, rows: torch.full((len(users), len(rows)), 0.25)
    same = collator(rows_of(run, 3))
    collator.evidence = lambda users, histories, times, rows: torch.eye(len(users), len(rows))
    other = collator(rows_of(run, 3))
    with torch.no_grad():
        losses = [run.model.eval()(**batch, only_losses=True).losses["retrieval"] for batch in (plain, same, other)]
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=1e-5)
    assert abs(losses[0] - losses[2]) > 1e-3


def test_what_was_learnt_nowhere_is_refused_as_next(run):
    cold = int(np.flatnonzero(run.catalogue.counts == 0)[0])
    row = {**rows_of(run, 1)[0]}
    row["next_items"] = [cold] * len(row["next_items"])
    with pytest.raises(ValueError, match="an item without a training event"):
        collator_of(run, negatives="catalogue")([row])


def test_draws_depend_on_the_seed_and_the_rows_only(run):
    rows = rows_of(run, 2)

    def drawn(seed, rows):
        return collator_of(run, seed, negatives="sampled", num_sampled=3)(rows)["item_input_ids"].tolist()

    collator = collator_of(run, 1, negatives="sampled", num_sampled=3)
    first = collator(rows)["item_input_ids"].tolist()
    collator(rows_of(run, 5))
    torch.manual_seed(11)
    np.random.seed(11)  # noqa: NPY002 - the old global state must not matter either
    assert collator(rows)["item_input_ids"].tolist() == first == drawn(1, rows)
    assert len({str(drawn(seed, rows)) for seed in range(6)}) > 1
    others = [str(drawn(1, rows_of(run, 9)[place : place + 1])) for place in range(6)]
    assert len(set(others)) > 1


TWINS = [{"title": "same", "item_id": "a"}, {"title": "other", "item_id": "b"}, {"title": "same", "item_id": "c"}]


def twin_rows(run):
    requests = [{"history": [{"item": TWINS[0]}, {"item": TWINS[1]}]}]
    rows = read_requests(run.processor, requests, "retrieval", "")
    return [{**rows[0], "next_items": [0, 1, 2]}]


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_items_that_read_the_same_share_a_place(run, negatives):
    batch = collator_of(run, items=TWINS, negatives=negatives)(twin_rows(run))
    assert len(batch["item_input_ids"]) == 2
    labels = batch["retrieval_labels"][batch["retrieval_labels"] != -100].tolist()
    assert labels == [0, 1, 0]


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_items_with_a_memory_of_their_own_do_not(make_recipe, negatives):
    run = prepare(make_recipe(model={"item_embeddings": True}))
    run.processor.item_rows.update({"a": 1, "b": 2, "c": 3})
    batch = collator_of(run, items=TWINS, negatives=negatives)(twin_rows(run))
    assert batch["candidate_embedding_ids"].tolist() == [1, 2, 3]
    assert batch["retrieval_labels"][batch["retrieval_labels"] != -100].tolist() == [0, 1, 2]
    assert batch["item_input_ids"][0].tolist() == batch["item_input_ids"][2].tolist()


def test_the_correction_for_popularity_is_how_often_an_item_is_expected_among_those_chosen(run):
    rows = twin_rows(run)  # three positives; counts are 1, 2, 3, and the twins count as one item of 1 + 3 events
    batch = collator_of(run, items=TWINS, negatives="batch")(rows)
    assert batch["item_log_frequency"].tolist() == pytest.approx([np.log(3 * 4 / 6), np.log(3 * 2 / 6)])
    batch = collator_of(run, items=TWINS, negatives="sampled", num_sampled=9)(rows)
    sampled = [np.log(3 * 4 / 6 + 9 * 2 / 3), np.log(3 * 2 / 6 + 9 * 1 / 3)]
    assert batch["item_log_frequency"].tolist() == pytest.approx(sampled)
    assert "item_log_frequency" not in collator_of(run, items=TWINS, negatives="catalogue")(rows)
    assert "item_log_frequency" not in collator_of(run, items=TWINS, negatives="batch", logq_correction=False)(rows)


@pytest.mark.parametrize("max_length", [40, 60, 80])
def test_events_that_did_not_fit_take_their_labels_along(make_recipe, max_length):
    run = prepare(make_recipe(text={"max_length": max_length, "max_events": 6}))
    rows = rows_of(run, 12)
    names = {index: name for name, index in run.processor.tokenizer.get_vocab().items()}
    kept = [len(walk(row["input_ids"], names)) for row in rows]
    assert any(number < len(row["next_items"]) for number, row in zip(kept, rows)), "some events did not fit"
    tails = [{**row, "next_items": row["next_items"][-number:]} for number, row in zip(kept, rows)]
    for row, tail in zip(rows, tails):
        if len(tail["next_items"]) < len(row["next_items"]):
            tail["next_items"] = [-100, *tail["next_items"][1:]]
    assert asked(run, collator_of(run)(rows)) == expected(run, tails, lambda row: 0)


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_a_batch_in_which_nothing_is_left_to_learn_has_a_loss_of_zero(run, negatives):
    rows = read_requests(run.processor, [{"user": "a person"}], "retrieval", "")
    batch = collator_of(run, negatives=negatives)([{**rows[0], "next_items": [-100, 3]}])  # its event did not fit
    assert (batch["retrieval_labels"] == -100).all()
    loss = run.model(**batch).loss
    loss.backward()
    assert loss.item() == 0


def test_a_history_read_in_both_directions_is_asked_at_its_end_only(make_recipe):
    run = prepare(make_recipe(model={"config": {"history_attention": "bidirectional"}}))
    rows = training_rows(run.writer, run.split.train, run.processor, TaskArguments(), bidirectional=True)
    batch = collator_of(run)(rows)
    assert [(row, place) for row, place, _ in asked(run, batch)] == [
        (row, place[-1]) for row, place in enumerate(places(run, rows))
    ]
    texts = [run.processor.tokenizer.decode(run.catalogue.input_ids[row["next_items"][-1]][1:-1]) for row in rows]
    assert [text for _, _, text in asked(run, batch)] == texts
    assert torch.isfinite(run.model(**batch).loss)


def places(run, rows):
    names = {index: name for name, index in run.processor.tokenizer.get_vocab().items()}
    return [walk(row["input_ids"], names) for row in rows]


def test_rows_of_all_tasks_share_a_batch(run):
    task = {"learn": ["retrieval", "click", "rating"], "targets": 3}
    rows = rows_of(run, None, **task)
    rows = [*rows[:2], *rows[-3:]]
    batch = collator_of(run, **task)(rows)
    for name in ("click_labels", "rating_labels"):
        assert batch[name].shape == (5, 3)
        assert (batch[name][:2] == -100).all()
        for row, labels in zip(rows[2:], batch[name][2:].tolist()):
            assert labels == row[name] + [-100] * (3 - len(row[name]))
    assert asked(run, batch) == expected(run, rows[:2], lambda row: 0)
    assert set(run.model(**batch).losses) == {"click", "rating", "retrieval"}


def test_rows_without_items_to_choose_need_no_catalogue(run):
    rows = rows_of(run, 3, learn=["click"])
    plain = M6RecDataCollator(run.processor, run.model.config)
    batch = plain(rows)
    assert "item_input_ids" not in batch and (batch["retrieval_labels"] == -100).all()
    with pytest.raises(ValueError, match=r"rows with next_items need the catalogue: pass catalogue="):
        plain(rows_of(run, 3))


def test_a_catalogue_is_read_as_items_stand_in_requests(run):
    for item, ids in zip(run.writer.items, run.catalogue.input_ids, strict=True):
        row = run.processor.read({"history": [{"item": item}]}, "retrieval").input_ids
        assert any(row[place : place + len(ids)] == ids for place in range(len(row)))
    assert run.catalogue.memory_ids == [0] * 15
    counts = run.split.train["item_id"].value_counts()
    assert run.catalogue.counts.tolist() == [counts.get(item_id, 0) for item_id in run.writer.item_ids]
