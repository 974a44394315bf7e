"""Packed documents give the losses, gradients and states they have by themselves."""

import itertools

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m6rec import M6RecConfig, M6RecForRecommendation
from m6rec.train.rows.packing import PackingCollator, pack
from m6rec.train.runs.pretrain import RowMaker, all_sources
from tests.fast import examples, some

OPENERS = frozenset({3, 5})
CAUSAL = ("text", "infilling", "item", "behaviour")
BOTH_WAYS = ("masked", "infilling", "item", "behaviour")
LEARNED = {"position_embedding_type": "learned"}
"""Rotary positions tell distances only, so that they cannot show where counting begins anew."""
SUMMARIES = {"num_joint_layers": 2, "segment_summary": 1, "history_attention": "bidirectional"}


def documents(lengths, first=9):
    return [{"input_ids": [first, *[20] * (n - 1)], "labels": [-100, *[20] * (n - 1)]} for n in lengths]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(5, 40))
@settings(max_examples=examples(60), deadline=None)
def test_every_document_is_there_once_and_no_row_is_too_long(lengths, length):
    rows = [
        {"input_ids": [3 if number % 3 == 0 else 9, *[100 + number] * (n - 1)], "labels": [number] * n}
        for number, n in enumerate(lengths)
    ]
    found = []
    for row in pack(rows, length, OPENERS):
        size = len(row["input_ids"])
        numbers = row["attention_mask"]
        assert len(row["labels"]) == len(numbers) == size and "item_embedding_ids" not in row
        assert size <= length or max(numbers) == 1
        assert numbers == sorted(numbers) and set(numbers) == set(range(1, max(numbers) + 1))
        cuts = [numbers.index(number) for number in range(1, max(numbers) + 1)] + [size]
        members = [row["labels"][start:stop] for start, stop in itertools.pairwise(cuts)]
        assert len({labels[0] % 3 == 0 for labels in members}) == 1, "requests and documents are kept apart"
        found += members
    assert sorted(found) == sorted(row["labels"] for row in rows)


def test_rows_are_filled_the_longest_first():
    rows = pack(documents([2, 7, 3, 5, 1, 2]), 10, OPENERS)
    assert [len(row["input_ids"]) for row in rows] == [10, 10]  # 7 + 3, 5 + 2 + 2 + 1


def test_memory_rows_stay_beside_their_tokens():
    with_memory = {"input_ids": [3, 7, 7], "labels": [1, 2, 3], "item_embedding_ids": [0, 5, 6]}
    without = {"input_ids": [5, 7], "labels": [4, 5]}
    (row,) = pack([without, with_memory], 10, OPENERS)
    assert row["item_embedding_ids"] == [0, 5, 6, 0, 0] and row["labels"] == [1, 2, 3, 4, 5]


@pytest.fixture
def made(run):
    """Rows of each objective, short ones and long ones."""
    make = RowMaker(run.processor, 40)
    texts, items, events = [{"text": f"{'很 long ' * n}text {n}"} for n in range(1, 14)], *all_sources(run, [])
    rng = numpy.random.default_rng(1)
    plain = {name: [make(name, each, rng) for each in texts] for name in ("text", "masked", "infilling")}
    asked = {"item": items, "behaviour": events}
    return plain | {name: [make(name, own[place], rng) for place in range(9)] for name, own in asked.items()}


def model_of(run, **config):
    torch.manual_seed(3)
    sizes = {"hidden_size": 24, "intermediate_size": 30, "num_hidden_layers": 3, "num_attention_heads": 4}
    ids = run.processor.tokenizer.structural_ids
    model = M6RecForRecommendation(M6RecConfig(**ids, **sizes, max_position_embeddings=256, **config))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.25)
    return model.eval()


def gradient_of(model, batch, **more):
    model.zero_grad()
    loss = model(**batch, num_items_in_batch=1, **more).loss
    loss.backward()
    return loss.detach(), {
        name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None
    }


DOCUMENTS = ("causal", "bidirectional")
LAYERS = {"all joint": {}, "segment layers": {"num_joint_layers": 1}, "learned": LEARNED, "summaries": SUMMARIES}


@pytest.mark.parametrize(
    ("document", "layers"),
    some(itertools.product(DOCUMENTS, LAYERS), zip(itertools.cycle(DOCUMENTS), LAYERS)),
)
def test_packed_losses_and_gradients_are_the_unpacked_ones(run, made, document, layers):
    model = model_of(run, document_attention=document, **LAYERS[layers])
    for objective in CAUSAL if document == "causal" else BOTH_WAYS:
        rows = made[objective]
        batch = PackingCollator(run.collator, 400, OPENERS)(rows)
        assert len(batch["input_ids"]) < len(rows) / 2
        for plan in ("flat", "compact"):
            expected, slopes = gradient_of(model, run.collator(rows), plan=plan)
            found, packed = gradient_of(model, batch, plan=plan)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            assert slopes.keys() == packed.keys()
            for name, slope in slopes.items():
                torch.testing.assert_close(packed[name], slope, rtol=1e-4, atol=1e-4 * float(slope.abs().max() + 1))


@pytest.mark.parametrize(
    "layers", [{}, {"num_joint_layers": 1}, LEARNED], ids=["all joint", "segment layers", "learned"]
)
@pytest.mark.parametrize("document", ["causal", "bidirectional"])
def test_no_document_sees_another(run, layers, document):
    model = model_of(run, document_attention=document, **layers)
    rng = numpy.random.default_rng(0)
    parts = [rng.integers(40, 300, size).tolist() for size in (5, 3, 6)]
    ids, mask = torch.tensor([sum(parts, [])]), torch.tensor([[1] * 5 + [2] * 3 + [3] * 6])
    logits = model(input_ids=ids, attention_mask=mask).logits
    alone = [model(input_ids=torch.tensor([part])).logits for part in parts]
    torch.testing.assert_close(logits, torch.cat(alone, 1), rtol=1e-5, atol=1e-5)
    undivided = model(input_ids=ids, attention_mask=mask.clamp_max(1)).logits
    assert (undivided - logits)[0, 5:].abs().amax() > 0.1, "the numbers of the mask are what keeps them apart"


def test_nothing_predicts_the_first_token_of_a_document(run):
    """A loss over a border would ask the end of one text for the beginning of another."""
    model = model_of(run)
    ids, mask = torch.tensor([[50, 51, 60, 61]]), torch.tensor([[1, 1, 2, 2]])
    found = model(input_ids=ids, attention_mask=mask, labels=ids, num_items_in_batch=1).loss
    apart = [model(input_ids=part, labels=part, num_items_in_batch=1).loss for part in (ids[:, :2], ids[:, 2:])]
    torch.testing.assert_close(found, sum(apart))


def test_plans_that_take_one_request_a_row_refuse_packed_documents(run):
    model = model_of(run, num_joint_layers=1)
    batch = {"input_ids": torch.tensor([[50, 51, 60, 61]]), "attention_mask": torch.tensor([[1, 1, 2, 2]])}
    with pytest.raises(ValueError, match="one request a row"):
        model(**batch, plan="shared_prefix")
