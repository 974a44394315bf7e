"""How pretraining mixes its sources: shares by weight or size, draws that depend on nothing else, endless streams."""

import itertools
import math
from collections import Counter

import pytest
import torch
from torch.utils.data import DataLoader
from transformers.trainer_pt_utils import IterableDatasetShard

from m6rec.train.config.arguments import PretrainingArguments
from m6rec.train.rows.corpus import Source, StreamedSource
from m6rec.train.runs.pretrain import MixedRows, MixedStream, mix


def source(name, size):
    lines = [f"{name} {number}" for number in range(size)]
    return Source(name, [{"text": line, "item": {}, "request": {}} for line in lines], lines, 0.0)


def echo(objective, document, rng):
    return objective, document["text"], rng.integers(1 << 30)


def shares_of(sources, **arguments):
    return mix(sources, PretrainingArguments(**arguments))


def test_an_epoch_has_each_document_once_and_objectives_by_weight():
    shares = shares_of([source("items", 40)], objectives={"text": 1, "infilling": 1, "item": 2})
    rows = MixedRows(shares, echo, 3)
    assert len(rows) == 40
    for epoch in range(3):
        rows.set_epoch(epoch)
        drawn = [rows[index] for index in range(40)]
        assert Counter(objective for objective, *_ in drawn) == {"text": 10, "infilling": 10, "item": 20}
        assert len({text for _, text, _ in drawn}) == 40


def test_small_shares_have_their_due_in_the_long_run():
    rows, counts = (
        MixedRows(shares_of([source("items", 1)], objectives={"text": 1, "infilling": 3}), echo, 0),
        Counter(),
    )
    for epoch in range(400):
        rows.set_epoch(epoch)
        counts.update(rows[index][0] for index in range(1))
    assert abs(counts["text"] - 100) < 5 * math.sqrt(75)


def test_sources_share_by_size_or_by_weight():
    sources = [source("a", 30), source("b", 10), source("items", 20), source("histories", 40)]
    by_size = MixedRows(shares_of(sources, objectives={"text": 3, "behaviour": 2}), echo, 0)
    assert Counter(by_size[i][1].split()[0] for i in range(100)) == {"a": 30, "b": 10, "items": 20, "histories": 40}
    objectives = {"masked": 1, "item": 1, "behaviour": 2}
    weighted = MixedRows(shares_of(sources, texts={"a": 1, "b": 4}, objectives=objectives), echo, 0)
    drawn = Counter((name, text.split()[0]) for name, text, _ in map(weighted.__getitem__, range(100)))
    assert drawn == {("masked", "a"): 5, ("masked", "b"): 20, ("item", "items"): 25, ("behaviour", "histories"): 50}
    repeated = Counter(weighted[i][1] for i in range(100) if weighted[i][1].startswith("b "))
    assert set(repeated.values()) == {2} and len(repeated) == 10, "walked twice, each as often"


def test_streams_whose_sizes_nobody_knows_take_turns_with_the_others():
    streamed = StreamedSource("s", lambda: iter(["s"]), 0.0)
    shares = shares_of([streamed, source("items", 99), source("empty", 0)], objectives={"text": 1, "item": 1})
    found = [(share.objective, share.source.name, share.share) for share in shares]
    assert found == [("text", "s", 0.25), ("text", "items", 0.25), ("item", "items", 0.5)]


def test_an_objective_without_documents_is_refused():
    for objective, missing in (("behaviour", "training events"), ("item", "items"), ("masked", "texts")):
        with pytest.raises(ValueError, match=f"'{objective}' has no {missing} to learn from"):
            shares_of([source("items", 0)], objectives={objective: 1})


@pytest.mark.parametrize("order", [range(15), range(14, -1, -1), [7, 3, 7, 7, 0, 3]])
def test_draws_depend_on_seed_epoch_and_index_only(order):
    shares = shares_of([source("items", 15)], objectives={"text": 1, "infilling": 2})
    rows, fresh = MixedRows(shares, echo, 3), MixedRows(shares, echo, 3)
    for epoch in (2, 0, 2):
        rows.set_epoch(epoch)
        for index in order:
            fresh.set_epoch(5)
            _ = fresh[index], torch.rand(3)
            fresh.set_epoch(epoch)
            assert rows[index] == fresh[index]
    rows.set_epoch(0)
    first, others = [rows[i] for i in range(15)], [MixedRows(shares, echo, 4)]
    rows.set_epoch(1)
    for other in (rows, *others):
        assert sum(a != b for a, b in zip(first, (other[i] for i in range(15)))) > 10


def stream(seed=1):
    lines = [f"s {number}" for number in range(50)]
    sources = [StreamedSource("s", lambda: iter(lines), 0.0), source("items", 20), source("histories", 20)]
    return MixedStream(shares_of(sources, objectives={"text": 2, "item": 1, "behaviour": 1}), echo, seed)


def test_a_stream_goes_on_without_end_in_the_given_shares():
    drawn = list(itertools.islice(stream(), 4000))
    counts = Counter(objective for objective, *_ in drawn)
    for objective, share in (("text", 0.5), ("item", 0.25), ("behaviour", 0.25)):
        assert abs(counts[objective] / 4000 - share) < 5 * math.sqrt(0.25 / 4000)
    assert drawn == list(itertools.islice(stream(), 4000)) != list(itertools.islice(stream(2), 4000))
    rounds = Counter(text for _, text, _ in drawn if text.startswith("s "))
    assert len(rounds) == 50 and max(rounds.values()) - min(rounds.values()) <= 1


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_have_disjoint_rows_and_together_all_of_them(workers):
    loader = DataLoader(stream(), batch_size=None, num_workers=workers, collate_fn=list)
    assert list(itertools.islice(loader, 30)) == [list(row) for row in itertools.islice(stream(), 30)]


def test_processes_have_disjoint_rows_and_together_all_of_them():
    parts = [IterableDatasetShard(stream(), batch_size=2, num_processes=3, process_index=i) for i in range(3)]
    taken = [list(itertools.islice(part, 8)) for part in parts]
    together = [row for turn in range(0, 8, 2) for own in taken for row in own[turn : turn + 2]]
    assert together == list(itertools.islice(stream(), 24))
