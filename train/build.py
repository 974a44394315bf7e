"""From a recipe to what a run needs: log, split, tokenizer, processor, model."""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
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
SCORE_FIELDS: tuple[str, ...] = ("interactions", "rating_values", "rating_loss")
"""Fields of the configuration that decide the outputs of the score head."""


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
    set_seed(seed)


def on_cpu() -> bool:
    """Say whether a run computes on the CPU, because there is no GPU."""
    return not torch.cuda.is_available()


def use_bf16() -> bool:
    """Say whether the device of a run multiplies bfloat16 in hardware."""
    if not on_cpu():
        return torch.cuda.is_bf16_supported()
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
        tokenizer, rows = processor.tokenizer, processor.item_rows
        settings = {name: getattr(processor, name) for name in ("template", "time", "options")}
    else:
        template, rows = load_template(text.domain, text.language), None
        # Appending an event must not change what earlier ones say, where history is causal.
        both_ways = recipe.model.config.get("history_attention") == "bidirectional"
        settings = {"template": template, "time": "ago" if both_ways else "gap"}
        tokenizer = M6RecTokenizer.train(_training_texts(log, template), vocab_size=text.vocab_size)
    if recipe.model.item_memory:
        rows = dict(rows or {})
        new = [item_id for item_id in writer.item_ids if item_id not in rows]
        rows |= {item_id: row for row, item_id in enumerate(new, max(rows.values(), default=0) + 1)}
    return M6RecProcessor(tokenizer, max_length=text.max_length, max_events=text.max_events, item_rows=rows, **settings)


def _training_texts(log: Log, template: dict[str, Any]) -> list[str]:
    """Texts a new tokenizer learns from: items, users, and all words of the template."""
    users = [] if log.users is None else [" ".join(texts) for texts in log.users.itertuples(index=False, name=None)]
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
        scored = {name: fields.pop(name) for name in SCORE_FIELDS if name in fields}
        # A checkpoint kept in half precision is trained in full, unless the recipe says otherwise.
        model = AutoModel.from_pretrained(arguments.checkpoint, **{"dtype": "float32", **fields})
        _change_scores(model, scored)
    else:
        lengths = {"max_position_embeddings": max(processor.max_length, fields.pop("max_position_embeddings", 0))}
        ids = processor.tokenizer.structural_ids
        model = M6RecForRecommendation(M6RecConfig.preset(arguments.preset, **{**ids, **lengths, **fields}))
    if arguments.attention:
        model.set_attn_implementation(arguments.attention)
    if rows and max(rows.values()) != model.config.num_item_memory:
        model.resize_item_memory(max(rows.values()))
    return model


def _change_scores(model: M6RecForRecommendation, fields: dict[str, Any]) -> None:
    """Let a loaded model score what the recipe names; outputs that keep their name keep their weights."""
    config, before = model.config, model.config.score_names
    for name, value in fields.items():
        setattr(config, name, value)
    config.validate()
    names = config.score_names
    config.id2label, config.label2id = dict(enumerate(names)), {name: index for index, name in enumerate(names)}
    if model.score_head is None or names == before:
        return
    old, new = model.score_head, nn.Linear(config.hidden_size, len(names)).to(model.score_head.weight)
    nn.init.normal_(new.weight, std=config.initializer_range)
    nn.init.zeros_(new.bias)
    with torch.no_grad():
        for row, name in enumerate(names):
            if name in before:
                new.weight[row], new.bias[row] = old.weight[before.index(name)], old.bias[before.index(name)]
    model.score_head = new


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


def plain_forward(model: torch.nn.Module) -> None:
    """Take back what bf16 training leaves: a `forward` of the instance that computes in bfloat16 ever after."""
    for name in ("forward", "_original_forward"):
        vars(model).pop(name, None)


def save(run: Run) -> None:
    """Write model, processor and resolved recipe into the output folder."""
    run.model.save_pretrained(run.recipe.output_dir)
    run.processor.save_pretrained(run.recipe.output_dir)
    run.recipe.save(run.recipe.output_dir)


__all__ = [
    "Run",
    "item_texts",
    "make_model",
    "make_processor",
    "make_split",
    "on_cpu",
    "plain_forward",
    "prepare",
    "save",
    "seed_everything",
    "use_bf16",
]
