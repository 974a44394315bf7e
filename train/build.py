"""From a recipe to what a run needs: log, split, tokenizer, processor, model."""

import logging
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoProcessor, set_seed

from ..configuration_m6rec import M6RecConfig
from ..modeling_m6rec import M6RecForRecommendation
from ..tokenization import M6RecProcessor, M6RecTokenizer, load_template
from .collator import CatalogueRows, M6RecDataCollator
from .data import Log, read_log
from .examples import RequestWriter
from .recipe import Recipe
from .splits import Split, by_time, leave_one_out

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """What a run works with."""

    recipe: Recipe
    log: Log
    split: Split
    writer: RequestWriter
    processor: M6RecProcessor
    model: M6RecForRecommendation
    catalogue: CatalogueRows
    collator: M6RecDataCollator

    @property
    def texts(self) -> list[str]:
        """Text of each item of the catalogue, for the baselines."""
        return item_texts(self.log)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    random.seed(seed)
    set_seed(seed)


def has_bf16(device: str = "cpu") -> bool:
    """Say whether this machine multiplies bfloat16 in hardware."""
    if device != "cpu":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def item_texts(log: Log) -> list[str]:
    """Return the texts of all items, their fields joined."""
    return [" ".join(log.item_fields(item_id).values()) for item_id in log.items.index]


def make_split(recipe: Recipe, log: Log) -> Split:
    """Hold out the events that the recipe's evaluation asks for."""
    arguments = recipe.evaluation
    if arguments.split == "leave-one-out":
        return leave_one_out(log.interactions, recipe.data.seed)
    return by_time(log.interactions, arguments.valid_fraction, arguments.test_fraction, recipe.data.seed)


def make_processor(recipe: Recipe, log: Log, writer: RequestWriter) -> M6RecProcessor:
    """Take the checkpoint's processor, or train a tokenizer on the log's texts and make a new one.

    The texts are those of items and users; nothing of the events is read, so that no held-out event can leak.
    """
    text = recipe.text
    if recipe.model.checkpoint:
        processor = AutoProcessor.from_pretrained(recipe.model.checkpoint)
        tokenizer, settings = processor.tokenizer, {"template": processor.template, "time": processor.time}
        rows = processor.item_rows
    else:
        template, rows = load_template(text.domain, text.language), None
        # Appending an event must not change what earlier ones say, where history is causal.
        both_ways = recipe.model.config.get("history_attention") == "bidirectional"
        settings = {"template": template, "time": "ago" if both_ways else "gap"}
        tokenizer = M6RecTokenizer.train(_training_texts(log, template), vocab_size=text.vocab_size)
    if recipe.model.item_memory:
        rows = dict(rows or {})
        for item_id in writer.item_ids:
            rows.setdefault(item_id, len(rows) + 1)
    return M6RecProcessor(tokenizer, max_length=text.max_length, max_events=text.max_events, item_rows=rows, **settings)


def _training_texts(log: Log, template: dict[str, Any]) -> list[str]:
    """Texts a new tokenizer learns from: items, users, and all words of the template."""
    users = [] if log.users is None else log.users.astype(str).agg(" ".join, axis=1).tolist()
    return [*item_texts(log), *users, *_words(template)]


def _words(template: Any) -> list[str]:
    if isinstance(template, str):
        return [template]
    parts = template.values() if isinstance(template, dict) else template if isinstance(template, list) else ()
    return [word for part in parts for word in _words(part)]


def make_model(recipe: Recipe, processor: M6RecProcessor) -> M6RecForRecommendation:
    """Load the checkpoint, or make a new model that fits the processor."""
    arguments, rows = recipe.model, processor.item_rows
    fields = dict(arguments.config)
    if recipe.task.interactions:
        fields["interactions"] = list(recipe.task.interactions)
    if arguments.checkpoint:
        model = AutoModel.from_pretrained(arguments.checkpoint, **fields)
    else:
        lengths = {"max_position_embeddings": max(processor.max_length, fields.pop("max_position_embeddings", 0))}
        ids = processor.tokenizer.structural_ids
        model = M6RecForRecommendation(M6RecConfig.preset(arguments.preset, **{**ids, **lengths, **fields}))
    if arguments.attention:
        model.set_attn_implementation(arguments.attention)
    if arguments.freeze_segments:
        model.model.freeze_segments()
    if rows and max(rows.values()) != model.config.num_item_memory:
        model.resize_item_memory(max(rows.values()))
    return model


def prepare(recipe: Recipe) -> Run:
    """Read the data, hold out what is evaluated, and make processor and model."""
    seed_everything(recipe.seed)
    log = read_log(recipe.data)
    split = make_split(recipe, log)
    writer = RequestWriter(log)
    processor = make_processor(recipe, log, writer)
    model = make_model(recipe, processor)
    rows = [writer.rows[item_id] for item_id in split.train["item_id"]]
    counts = np.bincount(rows, minlength=len(writer.item_ids))
    catalogue = CatalogueRows.read(writer.items, counts, processor)
    collator = M6RecDataCollator(processor, model.config, catalogue, recipe.task, recipe.seed)
    logger.info("%d parameters, %d items, %d training events", model.num_parameters(), len(counts), len(split.train))
    return Run(recipe, log, split, writer, processor, model, catalogue, collator)


__all__ = ["Run", "has_bf16", "item_texts", "make_model", "make_processor", "make_split", "prepare", "seed_everything"]
