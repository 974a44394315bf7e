"""Losses are sums over known labels divided by their weight: by hand, and over parts of a batch."""

import pytest
import torch

from m6rec import losses_m6rec
from m6rec.layout_m6rec import layout
from m6rec.losses_m6rec import (
    label_weights,
    loss_names,
    retrieval_loss,
    retrieval_losses,
    score_loss,
    text_targets,
)
from tests.modeling_m6rec.test_training import training_batch
from tests.modeling_m6rec.tiny import SMALL, build, close, config_of_ids, name, pad

WEIGHTS = {"click": [0.25, 3.0], "rating": [1.0, 2.0, 3.0, 4.0, 5.0], "interaction": [2.0, 1.0, 0.5]}
SETTINGS = [
    {"num_joint_layers": 2, "class_weights": WEIGHTS, "interactions": ["like", "share", "skip"]},
    {
        "num_joint_layers": 2,
        "rating_loss": "regression",
        "class_weights": {"rating": WEIGHTS["rating"]},
        "label_smoothing": 0.2,
        "exit_layers": [1],
    },
]


@pytest.mark.parametrize("settings", SETTINGS, ids=["weighted", "smoothed"])
@pytest.mark.parametrize("plan", ("flat", "compact"))
def test_weights_of_a_batch_give_its_mean_and_those_of_two_the_mean_of_both(settings, plan):
    model, batch = build(settings, item_embedding_dropout=0.0), training_batch(retrieval=True)
    weights = label_weights(batch, model.config)
    assert set(weights) == set(loss_names(model.config))
    mean = model(**batch, plan=plan, only_losses=True).losses
    for loss, value in model(**batch, plan=plan, only_losses=True, num_items_in_batch=weights).losses.items():
        close(value, mean[loss], msg=loss)
    shared = ("item_input_ids", "item_attention_mask", "candidate_embedding_ids")
    parts = [{key: value if key in shared else value[row : row + 1] for key, value in batch.items()} for row in (0, 1)]
    found = [model(**part, plan=plan, only_losses=True, num_items_in_batch=weights).losses for part in parts]
    for loss, value in mean.items():
        close(found[0][loss] + found[1][loss], value, msg=loss)
        assert not torch.isclose(found[0][loss], found[1][loss], rtol=1e-3), "the parts differ"


def test_means_are_weighted_by_class():
    config = config_of_ids(class_weights={"click": [1.0, 3.0], "rating": WEIGHTS["rating"]}, num_joint_layers=2)
    logits = torch.tensor([[[0.0, 1.0], [2.0, 0.0], [9.0, 9.0]]])
    own = [torch.tensor(1.0).exp().add(1).log() - 1.0, torch.tensor(2.0).exp().add(1).log()]  # -log p of class 1
    expected = (3 * own[0] + 3 * own[1]) / 6
    close(score_loss("click", logits, torch.tensor([[1, 1, -100]]), config), expected)
    against = torch.tensor(2.0).exp().add(1).log() - 2.0  # -log p of class 0
    close(score_loss("click", logits, torch.tensor([[1, 0, -100]]), config), (3 * own[0] + against) / 4)
    close(score_loss("click", logits, torch.tensor([[1, 0, -100]]), config, 8.0), (3 * own[0] + against) / 8)
    ratings = torch.tensor([[2.0, 5.0]])
    by_hand = torch.full((1, 2, 5), 0.2).log()  # all alike: -log p is log 5, whatever the weights
    close(score_loss("rating", by_hand, ratings, config), torch.tensor(5.0).log())
    close(score_loss("rating", by_hand, ratings, config, 14.0), torch.tensor(5.0).log() / 2)
    assert label_weights({"click_labels": torch.tensor([[1, 0, -100]]), "rating_labels": ratings}, config) == {
        "click": torch.tensor(4.0),
        "rating": torch.tensor(7.0),
    }


def test_positives_of_an_interaction_count_more_and_the_mean_is_over_labels():
    config = config_of_ids(class_weights={"interaction": [4.0]}, interactions=["like"], num_joint_layers=2)
    logits, labels = torch.zeros(1, 3, 1), torch.tensor([[[1], [0], [-100]]])
    close(score_loss("interaction", logits, labels, config), torch.tensor(2.0).log() * (4 + 1) / 2)


def test_nothing_known_is_a_loss_of_zero_that_can_be_learnt():
    config = config_of_ids(num_joint_layers=2, interactions=["like"], class_weights={"click": [1.0, 2.0]})
    for task, classes, labels in (
        ("click", 2, torch.full((2, 3), -100)),
        ("rating", 5, torch.full((2, 3), -100.0)),
        ("interaction", 1, torch.full((2, 3, 1), -100)),
    ):
        for weight in (None, 0.0, 7.0):
            logits = torch.randn(2, 3, classes, requires_grad=True)
            value = score_loss(task, logits, labels, config, weight)
            value.backward()
            assert value == 0
            assert not logits.grad.any()


@pytest.mark.parametrize("side", ("left", "right"))
def test_the_first_token_of_a_document_is_predicted_by_nothing(side):
    config = config_of_ids(num_joint_layers=2)
    batch = pad([[40, 41, 42], [50, 51]], side)
    ids = batch["input_ids"]
    targets = text_targets(ids.masked_fill(batch["attention_mask"] == 0, -100), layout(**batch, config=config), config)
    assert [[target for target in row if target != -100] for row in targets.tolist()] == [[41, 42], [51]]
    packed = {"input_ids": torch.tensor([[40, 41, 42, 50, 51]]), "attention_mask": torch.tensor([[1, 1, 1, 2, 2]])}
    targets = text_targets(packed["input_ids"], layout(**packed, config=config), config)
    assert targets.tolist() == [[41, 42, -100, 51, -100]]
    assert label_weights({**packed, "labels": packed["input_ids"]}, config)["text"] == 3
    both_ways = config_of_ids(num_joint_layers=2, document_attention="bidirectional")
    assert label_weights({**packed, "labels": packed["input_ids"]}, both_ways)["text"] == 5


@pytest.mark.parametrize("settings", SMALL, ids=name)
def test_only_losses_are_the_losses_and_nothing_else(settings):
    model = build(settings).train()
    batch = training_batch(retrieval=model.config.num_segment_layers > 0)
    batch["item_embedding_ids"] = torch.zeros_like(batch["item_embedding_ids"])  # item memory is dropped at random
    batch.pop("candidate_embedding_ids", None)
    whole, only = model(**batch), model(**batch, only_losses=True)
    close(only.loss, whole.loss)
    assert set(only.keys()) == {"loss", "losses"}
    assert {loss: value.item() for loss, value in only.losses.items()} == {
        loss: pytest.approx(value.item(), rel=1e-5) for loss, value in whole.losses.items()
    }


@pytest.mark.parametrize("at_once", [1, 40, 10**6])
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("informed", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_the_retrieval_loss_of_some_users_at_a_time_is_that_of_all(monkeypatch, at_once, corrected, informed, bf16):
    monkeypatch.setattr(losses_m6rec, "PRODUCTS_AT_ONCE", {"cpu": at_once})
    torch.manual_seed(0)
    labels, logs = torch.randint(13, (11,)), torch.randn(13) if corrected else None
    users, items = (torch.nn.functional.normalize(torch.randn(n, 7), dim=-1) for n in (11, 13))
    evidence = torch.rand(11, 13) if informed else None
    found = []
    for loss in (retrieval_loss, lambda *given, evidence: retrieval_losses(*given, evidence).sum() / 5):
        own = users.clone().requires_grad_(), items.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            weight = (5,) if loss is retrieval_loss else ()
            value = loss(*own, labels, 0.07, logs, *weight, evidence=evidence)
        (3 * value).backward()
        found.append((value.detach(), *(each.grad for each in own)))
    tolerance = {"rtol": 0.02, "atol": 0.08} if bf16 else {}
    for fast, slow in zip(*found):
        assert fast.dtype == slow.dtype == torch.float32
        torch.testing.assert_close(fast, slow, **tolerance)


def test_the_retrieval_loss_of_no_users_is_zero_and_of_unknown_items_refused():
    users, items = torch.zeros(0, 7, requires_grad=True), torch.randn(3, 7, requires_grad=True)
    loss = retrieval_loss(users, items, torch.zeros(0, dtype=torch.long), 0.07)
    loss.backward()
    assert loss == 0 and not items.grad.any()
    with pytest.raises(ValueError, match="row 3, but only 3 items"):
        retrieval_loss(torch.randn(1, 7), items, torch.tensor([3]), 0.07)


def test_evidence_is_added_to_the_cosines_of_each_user_and_item():
    users, items = (torch.nn.functional.normalize(torch.randn(n, 7), dim=-1) for n in (2, 3))
    evidence, labels = torch.tensor([[0.0, 0.5, 0.0], [0.25, 0.0, 0.0]]), torch.tensor([1, 2])
    found = retrieval_loss(users, items, labels, 0.07, evidence=evidence)
    close(found, torch.nn.functional.cross_entropy((users @ items.T + evidence) / 0.07, labels))
    with pytest.raises(ValueError, match=r"evidence has shape \(3,\); .* for each of 2 users and 3 items"):
        retrieval_loss(users, items, labels, 0.07, evidence=evidence[0])
