"""Generative pretraining on raw texts, items and histories (paper, backbone: text infilling and autoregression).

m6rec pretrain pretrain-text pretraining.texts=[english.txt,chinese.txt]
"""

import math
import time
from collections.abc import Iterator, Sequence
from itertools import chain, count
from typing import Any, NamedTuple, cast

import numpy as np
import pandas
from accelerate import PartialState
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ...configuration_m6rec import KINDS, M6RecConfig
from ...processing_m6rec import infilling, masking
from ...segment_cache_m6rec import SegmentCache
from ...tokenization import M6RecProcessor
from ...values_m6rec import IGNORE_INDEX
from ..config.arguments import PretrainingArguments
from ..config.recipe import Recipe, write_json
from ..data.log import Log, read_log
from ..evaluation.texts import perplexity
from ..rows.corpus import (
    HISTORIES,
    ITEMS,
    AnySource,
    Document,
    Source,
    StreamedSource,
    held_out,
    history_source,
    item_keys,
    item_source,
    raw_source,
    vocabulary_texts,
)
from ..rows.packing import PackingCollator
from ..rows.synthetic_users import SyntheticUsers
from .adapters import trainable_parameters
from .build import Run, on_cpu, plain_forward, prepare, save, use_bf16
from .facts import keep_facts
from .trainer import M6RecTrainer


class RowMaker:
    """Makes the row of a document for an objective; all draws come from the given generator.

    Args:
        processor: Formats and encodes.
        length: Maximum number of tokens of a plain document or an infilling row.
        synthetic: Generates synthetic users, for `likes`.
    """

    def __init__(self, processor: M6RecProcessor, length: int, synthetic: SyntheticUsers | None = None) -> None:
        self.processor, self.length, self.synthetic = processor, length, synthetic
        self.ids = processor.tokenizer.structural_ids
        special = {index for index, token in processor.tokenizer.added_tokens_decoder.items() if token.special}
        self.ordinary = [index for index in range(self.ids["vocab_size"]) if index not in special]

    def __call__(self, objective: str, document: Document, rng: np.random.Generator) -> dict[str, Any]:
        """Return `input_ids`, `labels` or `click_labels`, and with item embeddings `item_embedding_ids`."""
        make = {
            "text": self._text,
            "infilling": self._infilling,
            "masked": self._masked,
            "item": self._item,
            "behaviour": self._behaviour,
            "likes": self._likes,
        }[objective]
        return make(document, rng)

    def _stretch(self, document: Document, rng: np.random.Generator, end: Sequence[int] = ()) -> list[int]:
        """Encode a text, followed by `end`; of a text longer than `length` take a random span."""
        ids = [*self.processor.tokenizer.encode_text(document["text"]), *end]
        start = int(rng.integers(max(len(ids) - self.length, 0) + 1))
        return ids[start : start + self.length]

    def _text(self, document: Document, rng: np.random.Generator) -> dict[str, Any]:
        """Causal language modelling of a text; its first token has no context and no label."""
        ids = self._stretch(document, rng, [self.ids["eos_token_id"]])
        return {"input_ids": ids, "labels": [IGNORE_INDEX, *ids[1:]]}

    def _infilling(self, document: Document, rng: np.random.Generator) -> dict[str, Any]:
        text_token_id = self.ids["first_kind_token_id"] + KINDS.index("text")
        ids = infilling(self._stretch(document, rng), self.ids, text_token_id, rng, self.length)
        return {"input_ids": ids, "labels": self.processor.labels(ids)}

    def _masked(self, document: Document, rng: np.random.Generator) -> dict[str, Any]:
        ids = self._stretch(document, rng, [self.ids["eos_token_id"]])
        ended = ids[-1] == self.ids["eos_token_id"]
        end = ids[len(ids) - ended :]
        row, labels = masking(ids[: len(ids) - ended], self.ids["mask_token_id"], self.ordinary, rng)
        return {"input_ids": row + end, "labels": labels + [IGNORE_INDEX] * ended}

    def _item(self, document: Document, rng: np.random.Generator) -> dict[str, Any]:
        """Generate an item's text from its segment, without its embedding, which could replace the text."""
        reading = self.processor.read({"candidates": [document["item"]], "text": document["text"]}, "item_text")
        return {"input_ids": reading.input_ids, "labels": self.processor.labels(reading)}

    def _behaviour(self, document: Document, rng: np.random.Generator) -> dict[str, Any]:
        """Generate a user's next events in the form used without training (paper, zero-shot scoring)."""
        reading = self.processor.read(document["request"], "plausibility")
        row = {"input_ids": reading.input_ids, "labels": self.processor.labels(reading)}
        return row if self.processor.item_rows is None else {**row, "item_embedding_ids": reading.item_embedding_ids}

    def _likes(self, document: Document, rng: np.random.Generator) -> dict[str, Any]:
        """Predict which of the item and other items a synthetic user likes."""
        assert self.synthetic is not None
        request, labels = self.synthetic.draw(self.synthetic.writer.rows[document["item"]["item_id"]], rng)
        reading = self.processor.read(request, "click")
        row = {"input_ids": reading.input_ids, "click_labels": labels}
        return row if self.processor.item_rows is None else {**row, "item_embedding_ids": reading.item_embedding_ids}


class Share(NamedTuple):
    """Share of the training rows of an objective and a source."""

    objective: str
    source: AnySource
    share: float
    """All shares sum to 1."""


def mix(sources: Sequence[AnySource], arguments: PretrainingArguments) -> list[Share]:
    """Divide the rows among objectives, by weight, and the rows of an objective among its sources.

    Raises:
        ValueError: If an objective has no source.
    """
    weights = arguments.texts if isinstance(arguments.texts, dict) else None
    total, found = sum(arguments.objectives.values()), []
    for objective, weight in arguments.objectives.items():
        if not weight:
            continue
        own = [source for source in sources if _teaches(source, objective)]
        mass: list[float] = [len(source) for source in own]
        if any(isinstance(source, StreamedSource) for source in own):  # sizes are unknown: sources alternate
            mass = [min(size, 1) for size in mass]
        if weights and objective in ("text", "infilling", "masked"):
            mass = [weights.get(source.name, 0) if len(source) else 0 for source in own]
        if not sum(mass):
            needed = {"item": "items", "likes": "items", "behaviour": "training events"}.get(objective, "texts")
            raise ValueError(
                f"pretraining.objectives {objective!r} has no {needed} to learn from: name them (data, "
                "pretraining.texts), hold fewer out, or give it the weight 0"
            )
        found += [Share(objective, s, weight / total * each / sum(mass)) for s, each in zip(own, mass) if each]
    return found


def _teaches(source: AnySource, objective: str) -> bool:
    if objective == "behaviour":
        return source.name == HISTORIES
    return source.name == ITEMS if objective in ("item", "likes") else source.name != HISTORIES


class MixedRows(Dataset):
    """An epoch of rows: as many as the sources have documents, in the given shares.

    Each source has its own order, and is repeated if its share exceeds its size. Each draw depends only on (seed,
    epoch) or (seed, epoch, index).

    Args:
        shares: Objectives and sources.
        make: Makes a row.
        seed: Of all draws.
    """

    def __init__(self, shares: Sequence[Share], make: RowMaker, seed: int) -> None:
        self.shares, self.make, self.seed = list(shares), make, seed
        self.sources = [cast(Source, share.source) for share in shares]
        self.size = sum(len(source) for source in {id(source): source for source in self.sources}.values())
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the rows of an epoch."""
        self.epoch = epoch
        rng = np.random.default_rng([self.seed, epoch])
        # Fractional rows of a share are rounded at random per epoch: on average all shares are exact.
        edges = np.cumsum([0.0, *(share.share for share in self.shares)]) * self.size
        edges = np.floor(edges + rng.random()).astype(int)
        edges[-1] = self.size
        walks = {id(source): source.order(rng) for source in self.sources}
        parts = [
            np.stack([np.full(rows, number), np.fromiter(walks[id(source)], int, rows)])
            for number, (source, rows) in enumerate(zip(self.sources, np.diff(edges).tolist()))
        ]
        self.plan = rng.permutation(np.concatenate(parts, axis=1), axis=1)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, place = self.plan[:, index].tolist()
        rng = np.random.default_rng([self.seed, self.epoch, index])
        return self.make(self.shares[number].objective, self.sources[number][place], rng)


class MixedStream(IterableDataset):
    """An infinite stream of rows, in the given shares; each draw depends on (seed, number of the row).

    Rows are distributed in turn to the processes of a training (by the Trainer) and to a data loader's workers: no row
    is used twice.

    Args:
        shares: Objectives and sources.
        make: Makes a row.
        seed: Of all draws.
    """

    def __init__(self, shares: Sequence[Share], make: RowMaker, seed: int) -> None:
        self.shares, self.make, self.seed = list(shares), make, seed

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        workers, own = (worker.num_workers, worker.id) if worker else (1, 0)
        walks = {id(share.source): share.source.walk(self.seed) for share in self.shares}
        odds = [share.share for share in self.shares]
        for number in count():
            rng = np.random.default_rng([self.seed, number])
            share = self.shares[int(rng.choice(len(odds), p=odds))]
            document = next(walks[id(share.source)])
            if number % workers == own:
                yield self.make(share.objective, document, rng)


def validation_rows(
    shares: Sequence[Share], make: RowMaker, arguments: PretrainingArguments, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """Make the held-out rows of each objective, independent of the training."""
    found = {}
    for objective in dict.fromkeys(share.objective for share in shares):
        own = [share.source for share in shares if share.objective == objective]
        rows = -(-arguments.valid_rows // len(own))
        documents = [document for source in own for document in source.validation(rows, seed)]
        if documents:
            draws = (np.random.default_rng([seed, index]) for index in count())
            found[objective] = [make(objective, document, rng) for document, rng in zip(documents, draws)]
    return found


def check(recipe: Recipe, config: M6RecConfig) -> None:
    """Raise if a model cannot learn a recipe's objectives.

    Raises:
        ValueError: The message names all problems.
    """
    arguments = recipe.pretraining
    wanted = {name for name, weight in arguments.objectives.items() if weight}
    both_ways = config.document_attention == "bidirectional"
    longest = config.max_position_embeddings
    problems = {
        "pretraining.objectives 'text' writes a text on, but with document_attention 'bidirectional' every token sees "
        "itself: give it the weight 0, and `masked` its own": both_ways and "text" in wanted,
        "pretraining.objectives 'masked' needs a model that reads documents in both directions, but document_attention "
        "is 'causal': give it the weight 0, and `text` its own": not both_ways and "masked" in wanted,
        "pretraining.streaming goes on without an end: set training.max_steps (or pretraining.training.max_steps), "
        f"which is {recipe.training.get('max_steps', -1)}": arguments.streaming
        and recipe.training.get("max_steps", -1) < 1,
        f"pretraining.length={arguments.length}, but the model has learned positions for {longest} tokens only": bool(
            arguments.length and config.position_embedding_type == "learned" and arguments.length > longest
        ),
    }
    if any(problems.values()):
        raise ValueError("; ".join(text for text, wrong in problems.items() if wrong))


def raw_sources(arguments: PretrainingArguments) -> list[AnySource]:
    """Open the raw texts that a recipe names."""
    names = [name for name in arguments.texts if name != ITEMS]
    return [raw_source(name, arguments.valid_fraction, arguments.streaming) for name in names]


def all_sources(run: Run, raw: Sequence[AnySource]) -> list[AnySource]:
    """Return the raw texts and the sources of a run's log; of its events only the training events."""
    if not len(run.log.items):
        return list(raw)
    share, task = run.recipe.pretraining.valid_fraction, run.recipe.task
    items = item_source(run.log, run.writer, run.processor, share)
    events = history_source(run.writer, run.split.train, run.processor.max_events, task.targets, share)
    return [*raw, items, events]


def fit(run: Run, raw: Sequence[AnySource] | None = None) -> dict[str, dict[str, float]]:
    """Train; returns the perplexity of each objective on held-out texts, `before` and `after` training.

    The collator is that of fine-tuning; rows differ in their labels.

    Args:
        run: Model, processor and log.
        raw: Opened raw texts; None: those of the recipe.
    """
    arguments, seed, config = run.recipe.pretraining, run.recipe.seed, run.model.config
    check(run.recipe, config)
    shares = mix(all_sources(run, raw_sources(arguments) if raw is None else raw), arguments)
    longest = config.max_position_embeddings if config.position_embedding_type == "learned" else math.inf
    wanted = {share.objective for share in shares}
    synthetic: SyntheticUsers | None = None
    if "likes" in wanted:
        synthetic = SyntheticUsers(run.writer, run.split.train, run.recipe.task, run.processor.max_events)
    if wanted <= {"likes", "behaviour"} and run.recipe.model.freeze_segments:  # others train segment layers
        run.model.model.freeze_segments()
        run.segment_cache = SegmentCache()
    make = RowMaker(run.processor, arguments.length or int(min(run.processor.max_length, longest)), synthetic)
    settings = run.recipe.training_arguments(
        use_cpu=on_cpu(), bf16=use_bf16(), accelerator_config={"dispatch_batches": False}
    )
    rows = MixedStream(shares, make, seed) if arguments.streaming else MixedRows(shares, make, seed)
    structured = frozenset((make.ids["source_token_id"], make.ids["bos_token_id"]))
    main = settings.process_index == 0  # only one process measures
    valid = validation_rows(shares, make, arguments, seed) if main else {}

    def measure() -> dict[str, float]:
        return {
            objective: perplexity(run.model, own, run.collator, settings.bf16, settings.per_device_eval_batch_size)
            for objective, own in valid.items()
        }

    trainer = M6RecTrainer(
        run,
        stage="pretrain",
        figures=lambda: {f"{objective}_perplexity": value for objective, value in measure().items()},
        model=run.model,
        args=settings,
        train_dataset=rows,
        data_collator=PackingCollator(run.collator, make.length, structured) if arguments.pack else run.collator,
    )
    before = measure()
    trainer.train(resume_from_checkpoint=settings.resume_from_checkpoint)
    plain_forward(run.model)
    after = measure()
    run.model.eval()
    learnt = {"writing", "plausibility"} if wanted - {"likes"} else set()
    learnt |= {"click"} if synthetic else set()
    run.model.config.trained_tasks = sorted({*(config.trained_tasks or []), *learnt})
    return {objective: {"before": before[objective], "after": after[objective]} for objective in valid}


def pretrain(recipe: Recipe) -> dict[str, dict[str, float]]:
    """Run a recipe's pretraining from data to saved model; returns and writes the perplexities.

    With several processes, one measures and writes; the other processes return nothing.
    """
    recipe = recipe.for_pretraining()
    raw = raw_sources(recipe.pretraining)
    log = _log(recipe)
    run = prepare(recipe, log, _vocabulary(raw, log, recipe))
    start = time.monotonic()
    found = fit(run, raw)
    if PartialState().is_main_process:
        save(run)
        write_json(recipe.output_dir / "metrics.json", {"perplexity": found})
        seconds = {"training and its measurement": time.monotonic() - start}
        keep_facts(run, seconds, trainable_parameters(run.model)[0], "m6rec pretrain")
    PartialState().wait_for_everyone()
    return found


def _log(recipe: Recipe) -> Log:
    """Read the log; it is empty if a recipe names only raw texts."""
    data = recipe.data
    if data.source != "tables" or data.interactions or data.items or not recipe.pretraining.texts:
        return read_log(data)
    events = pandas.DataFrame({"user_id": [], "item_id": [], "timestamp": []}, dtype=object)
    return Log(events, pandas.DataFrame(index=pandas.Index([], name="item_id")))


def _vocabulary(raw: Sequence[AnySource], log: Log, recipe: Recipe) -> Iterator[str]:
    """Texts to train a new tokenizer on, without held-out ones."""
    items = (text for text in item_keys(log) if not held_out(text, recipe.pretraining.valid_fraction))
    return chain(items, *(vocabulary_texts(source, recipe.seed) for source in raw))


__all__ = [
    "MixedRows",
    "MixedStream",
    "RowMaker",
    "Share",
    "all_sources",
    "check",
    "fit",
    "mix",
    "pretrain",
    "raw_sources",
    "validation_rows",
]
