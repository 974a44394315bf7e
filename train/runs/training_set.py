"""The training rows of a run: its own rows, and replayed rows of earlier runs to avoid forgetting.

An earlier run is replayed from the recipe in its output folder: with its data, the training part of its split, its
processor with the template of its domain, and its tasks. Only the model is the new one.
"""

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from transformers import AutoProcessor

from ..config.recipe import load_saved
from ..data.log import read_log
from ..rows.collator import M6RecDataCollator
from ..rows.examples import RetrievalRows, ScoringRows, retrieval_rows
from ..rows.writing import writing_examples
from .build import Run, catalogue_rows, make_split, make_writer, wanted_in

logger = logging.getLogger(__name__)
Part = Sequence[dict[str, Any]] | ScoringRows | RetrievalRows


class TrainingSet(Dataset):
    """Rows of a run, and a share of replayed rows that are drawn again in each epoch.

    Each draw depends only on (seed, epoch, index); each replayed row is drawn independently: first an earlier run,
    uniformly, then one of its rows.

    Args:
        parts: The run's own rows; `set_epoch` is called on parts that have it.
        replayed: Rows of each earlier run.
        share: Share of the replayed rows among all rows.
        seed: Seed of the draws.
    """

    def __init__(
        self, parts: Sequence[Part], replayed: Sequence[Sequence[Part]] = (), share: float = 0.0, seed: int = 0
    ) -> None:
        self.parts, self.replayed, self.seed, self.epoch = list(parts), list(replayed), seed, 0
        self.own = sum(map(len, self.parts))
        self.drawn = round(self.own * share / (1 - share)) if self.replayed else 0

    def set_epoch(self, epoch: int) -> None:
        """Draw the replayed rows of an epoch."""
        self.epoch = epoch
        for part in itertools.chain(self.parts, *self.replayed):
            if isinstance(part, ScoringRows | RetrievalRows):
                part.set_epoch(epoch)

    def __len__(self) -> int:
        return self.own + self.drawn

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        if index < self.own:
            return _row(self.parts, index)
        rng = np.random.default_rng([self.seed, self.epoch, index])
        parts = self.replayed[rng.integers(len(self.replayed))]
        return _row(parts, int(rng.integers(sum(map(len, parts)))))


def _row(parts: Sequence[Part], index: int) -> dict[str, Any]:
    for part in parts:
        if index < len(part):
            return part[index]
        index -= len(part)
    raise IndexError(index)


def training_parts(run: Run, retrieval: bool = True) -> list[Part]:
    """Encode the training part of a run as rows of retrieval (optional), scoring tasks and writing."""
    recipe = run.recipe
    source = (run.writer, run.split.train, run.processor)
    parts: list[Part] = []
    if retrieval and "retrieval" in recipe.task.learn:
        bidirectional = run.model.config.history_attention == "bidirectional"
        if recipe.task.shuffle_ties:
            parts.append(RetrievalRows(*source, bidirectional, recipe.seed))
        else:
            parts.append(retrieval_rows(*source, bidirectional))
        if recipe.task.learns_dialogues:
            parts.append(wanted_in(run, "train").rows(run.processor))
    if recipe.task.scored:
        rows = ScoringRows(*source, recipe.task, recipe.seed)
        # Negatives are drawn in each epoch; rows that do not change are encoded once.
        parts.append(rows if recipe.task.negatives_per_event else rows.read(range(len(rows))))
    if "writing" in recipe.task.learn:
        arguments = (run.split, "train", recipe.task, recipe.evaluation, recipe.seed)
        parts.append(writing_examples(run.writer, run.processor, *arguments).rows)
    return parts


def training_set(run: Run, earlier: Mapping[str, Run]) -> TrainingSet:
    """Encode all training rows of a run."""
    replayed = [training_parts(each, retrieval=False) for each in earlier.values()]
    return TrainingSet(training_parts(run), replayed, run.recipe.task.replay_share, run.recipe.seed)


def earlier_runs(run: Run) -> dict[str, Run]:
    """Build the earlier runs in the recipe's `task.replay`, by the names of their folders, with the run's model.

    Raises:
        ValueError: If this model cannot encode an earlier run, or the run has nothing to replay.
    """
    found: dict[str, Run] = {}
    for folder in run.recipe.task.replay:
        name = Path(folder).resolve().name
        if name in found:
            raise ValueError(f"task.replay names two folders called {name!r}: reports would mix them up; rename one")
        found[name] = _earlier_run(run, folder)
    return found


def _earlier_run(run: Run, folder: str) -> Run:
    recipe = load_saved(folder)
    processor = AutoProcessor.from_pretrained(folder)
    for problem in _problems(run, recipe.task, processor):
        raise ValueError(f"task.replay: {folder} {problem}")
    if "retrieval" in recipe.task.learn:
        logger.warning("%s: retrieval is measured but not replayed: its catalogue is not that of this run", folder)
    log = read_log(recipe.data)
    split = make_split(recipe, log)
    writer = make_writer(recipe, log, split)
    if run.processor.item_rows is not None and processor.item_rows is not None:
        both = [item_id for item_id in writer.rows if item_id in run.writer.rows]
        if taken := [item_id for item_id in both if writer.item(item_id) != run.writer.item(item_id)]:
            raise ValueError(
                f"task.replay: {folder} has an item {taken[0]!r} that is not this run's, and both would have one row "
                "of the item memory: give the ids of one log a prefix, or leave model.item_embeddings out of both runs"
            )
    catalogue = catalogue_rows(writer, split, processor, recipe)
    collator = M6RecDataCollator(processor, run.model.config, catalogue, recipe.task, recipe.seed)
    return Run(recipe, log, split, writer, processor, run.model, catalogue, collator)


def _problems(run: Run, task: Any, processor: Any) -> Iterator[str]:
    """Yield the reasons why an earlier run cannot be replayed."""
    if processor.tokenizer.get_vocab() != run.processor.tokenizer.get_vocab():
        yield "has another tokenizer: its rows would mean nothing to this model; go on from its checkpoint"
    if task.learn == ["retrieval"]:
        yield (
            "learnt retrieval only, against a catalogue that this run does not have: what can be replayed are clicks, "
            "ratings, interactions and writing"
        )
    if lacking := [name for name in task.scored if name not in run.model.config.scored]:
        yield f"learnt {', '.join(lacking)}, for which this model has no outputs: go on from its checkpoint"
    names = list(task.interactions)
    if names and names != run.model.config.interactions:
        yield f"learnt the interactions {names}, but this model has {run.model.config.interactions}"
    rows = run.processor.item_rows or {}
    if any(rows.get(item_id) != row for item_id, row in (processor.item_rows or {}).items()):
        yield "has an item memory that this model has not: go on from its checkpoint"


__all__ = ["TrainingSet", "earlier_runs", "training_parts", "training_set"]
