"""Labels of written text, padding, and text infilling, each against a slow answer."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m6rec.processing_m6rec import infilling, masking, pad, written_labels
from m6rec.tokenization import M6RecProcessor
from tests.fast import examples

IDS = {
    "pad_token_id": 9,
    "mask_token_id": 2,
    "source_token_id": 3,
    "source_end_token_id": 4,
    "bos_token_id": 5,
    "eos_token_id": 6,
    "segment_token_id": 7,
}
ITEM, TEXT = 10, 11


def labels_of(row):
    return written_labels(row, IDS, TEXT)


def test_labels_by_hand():
    source = [3, TEXT, 20, 7, 4]
    assert labels_of([*source, 5, TEXT, 21, 22, 6]) == [-100] * 7 + [21, 22, 6]
    assert labels_of([*source, 5, ITEM, 20, 7, TEXT, 21, 7, 6]) == [-100] * 10 + [21, 7, 6]
    assert labels_of([*source, 5, TEXT, 21]) == [-100] * 8, "left open"
    assert labels_of([*source, 5, ITEM, 20, 7, 6]) == [-100] * 10, "nothing is written"
    two = [5, TEXT, 21, 6, 5, TEXT, 22, 6]
    assert labels_of([*source, *two]) == [-100] * 7 + [21, 6, -100, -100, 22, 6]
    assert labels_of([*source, 5, TEXT, 21, *source, 5, TEXT, 22, 6])[-2:] == [22, 6]
    assert labels_of([*source, 5, TEXT, 21, *source, 5, TEXT, 22, 6])[:-2] == [-100] * 15, "the first was left open"
    assert labels_of([20, 21, 6]) == [20, 21, 6], "a plain document"
    assert labels_of([]) == []


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_by_hand(side):
    rows = [
        {
            "input_ids": [3, 20, 4, 5, 6],
            "labels": [1, 2, 3, 4, 5],
            "click_labels": [1],
            "item_embedding_ids": [0, 8, 0, 0, 0],
        },
        {"input_ids": [3, 4, 5, 6, 5, 6, 5], "click_labels": [0, 1, 0], "interaction_labels": [[1, 0], [0, 0], [1, 1]]},
    ]
    out = pad(rows, IDS, side)
    place = (lambda row, fill: row + [fill] * 2) if side == "right" else (lambda row, fill: [fill] * 2 + row)
    assert out["input_ids"].tolist() == [place(rows[0]["input_ids"], 9), rows[1]["input_ids"]]
    assert torch.equal(out["layout_ids"], out["input_ids"])
    assert out["attention_mask"].tolist() == [place([1] * 5, 0), [1] * 7]
    assert out["item_embedding_ids"].tolist() == [place(rows[0]["item_embedding_ids"], 0), [0] * 7]
    assert out["labels"].tolist() == [place(rows[0]["labels"], -100), [-100] * 7]
    assert out["click_labels"].tolist() == [[1, -100, -100], [0, 1, 0]], "labels of targets pad on the right"
    assert out["interaction_labels"].tolist() == [[[-100, -100]] * 3, [[1, 0], [0, 0], [1, 1]]]
    assert all(value.dtype == torch.int64 for value in out.values())


def test_padding_of_ratings_other_labels_and_tensors():
    rows = [
        {"input_ids": torch.tensor([3, 4, 5, 6]), "rating_labels": 4.5, "hidden_events": [True, False, False, False]},
        {"input_ids": [3, 4, 5, 6, 5, 6], "rating_labels": np.array([1, 2]), "hidden_events": [False] * 6},
    ]
    out = pad(rows, IDS, "right")
    assert out["rating_labels"].tolist() == [[4.5, -100.0], [1.0, 2.0]] and out["rating_labels"].dtype == torch.float32
    assert out["hidden_events"].tolist() == [[True, *[False] * 5], [False] * 6]
    rows = [{"input_ids": [3, 4], "retrieval_labels": [7, 8]}, {"input_ids": [3, 20, 4], "retrieval_labels": [1, 2, 3]}]
    assert pad(rows, IDS, "left")["retrieval_labels"].tolist() == [[-100, 7, 8], [1, 2, 3]], "aligned with tokens"


@pytest.mark.parametrize(
    ("rows", "side", "error"),
    [
        ([], "right", "no rows"),
        ([{"input_ids": [3, 4]}], "both", "'both'"),
        ([{"input_ids": [3, 4, 5, 6], "click_labels": [1, 0]}], "right", "click_labels has 2 labels.*1 targets"),
        ([{"input_ids": [3, 4], "weight": 0.5}], "right", "'weight' of row 0"),
        ([{"input_ids": [3, 4], "extra": [1, 2]}, {"input_ids": [3, 4]}], "right", "row 1 lacks 'extra'"),
    ],
)
def test_padding_refuses(rows, side, error):
    with pytest.raises(ValueError, match=error):
        pad(rows, IDS, side)


@settings(max_examples=examples(200), deadline=None)
@given(st.integers(1, 120), st.integers(9, 90), st.integers(0, 5))
def test_infilling_can_be_undone(length, max_length, seed):
    """Put the written spans back where [MASK] stands: the text must come out, as much of it as fits."""
    text = list(range(100, 100 + length))
    row = infilling(text, IDS, TEXT, np.random.default_rng(seed), max_length)
    end = row.index(4)
    source, target = row[:end], row[end + 1 :]
    assert source[:2] == [3, TEXT] and source[-1] == 7 and target[:2] == [5, TEXT] and target[-1] == 6
    spans = [[]]
    for index in target[2:-1]:
        spans.append([]) if index == 7 else spans[-1].append(index)
    masks = [place for place, index in enumerate(source) if index == 2]
    assert len(masks) == len(spans) and all(spans)
    assert not any(after == before + 1 for before, after in pairwise(masks)), "spans must not touch"
    undone = [each for index in source[2:-1] for each in (spans.pop(0) if index == 2 else [index])]
    assert undone == text[: len(undone)]
    assert len(row) <= max_length
    assert len(undone) == length or len(row) > max_length - 4, "no more is cut than must be"


def test_infilling_masks_the_stated_share():
    text = list(range(100, 300))
    rows = [infilling(text, IDS, TEXT, np.random.default_rng(seed), 1000) for seed in range(20)]
    masks = [row.count(2) for row in rows]
    assert masks == [10] * 20  # 200 tokens * 15% / 3
    assert all(
        len(row) - row.index(4) == 1 + 2 + 30 + 9 + 1 for row in rows
    )  # [EOS'] [BOS] [TEXT] 30 tokens, 9 [SEG], [EOS]
    assert len({tuple(row) for row in rows}) == 20
    again = infilling(text, IDS, TEXT, np.random.default_rng(3), 1000)
    assert again == rows[3]


def test_infilling_of_a_processor(tokenizer):
    processor = M6RecProcessor(tokenizer)
    row, labels = processor.infill("waterproof [MASK] hiking shoes, category boots", np.random.default_rng(0))
    start = row.index(tokenizer.bos_token_id) + 2
    assert labels == [-100] * start + row[start:] and row[-1] == tokenizer.eos_token_id
    with pytest.raises(ValueError, match="text"):
        processor.infill("  ", np.random.default_rng(0))


def test_documents(tokenizer):
    row, labels = M6RecProcessor(tokenizer).document("hiking [EOS]")
    assert row == labels and tokenizer.decode(row) == "hiking [EOS][EOS]" and row.count(tokenizer.eos_token_id) == 1
    row, _ = M6RecProcessor(tokenizer, max_length=8).document("hiking shoes " * 20)
    assert len(row) == 8 and row[-1] == tokenizer.eos_token_id


@given(st.integers(1, 80), st.integers(0, 1000))
def test_masking_hides_the_stated_share_and_tells_what_was_there(length, seed):
    text = list(range(100, 100 + length))
    row, labels = masking(text, 2, [50, 51], np.random.default_rng(seed))
    asked = [place for place, label in enumerate(labels) if label != -100]
    assert len(row) == len(labels) == length and len(asked) == max(1, round(0.15 * length))
    for place in range(length):
        assert labels[place] == text[place] if place in asked else row[place] == text[place]
        assert row[place] in (2, 50, 51, text[place])
    assert text == list(range(100, 100 + length)), "the text is left as it was"
    assert masking(text, 2, [50, 51], np.random.default_rng(seed)) == (row, labels)


def test_masked_tokens_mostly_are_masks():
    text = list(range(100, 200))
    found = [masking(text, 2, [50, 51], np.random.default_rng(seed))[0] for seed in range(400)]
    count = 400 * 15
    masks, others = (sum(row.count(each) for row in found for each in ids) / count for ids in ([2], [50, 51]))
    assert abs(masks - 0.8) < 5 * (0.16 / count) ** 0.5
    assert abs(others - 0.1) < 5 * (0.09 / count) ** 0.5
