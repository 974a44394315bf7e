"""Generative pretraining on the items' texts (paper, backbone: text infilling and autoregressive language modelling).

m6rec pretrain movielens training.output_dir=runs/films-pretrained
"""

import logging
import math
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import Trainer

from ..modeling_m6rec import M6RecForRecommendation
from ..tokenization import M6RecProcessor
from .build import Run, on_cpu, prepare, save, use_bf16
from .collator import M6RecDataCollator
from .recipe import Recipe, write_json

logger = logging.getLogger(__name__)
ROWS_AT_ONCE = 64


class TextRows(Dataset):
    """Rows of text, one objective a text and epoch; every draw depends on (seed, epoch, index) and on nothing else.

    Args:
        items: Items with their fields.
        processor: Words and encodes them.
        objectives: Objective -> weight.
        seed: Of objectives and masks.
    """

    def __init__(
        self, items: list[dict[str, Any]], processor: M6RecProcessor, objectives: dict[str, float], seed: int
    ) -> None:
        self.items, self.processor, self.seed, self.epoch = items, processor, seed, 0
        self.names = [name for name, weight in objectives.items() if weight > 0]
        weights = np.array([objectives[name] for name in self.names])
        self.weights = weights / weights.sum()
        self.texts = [item_text(processor, item) for item in items]

    def set_epoch(self, epoch: int) -> None:
        """Draw anew; the Trainer calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, self.epoch, index])
        objective = self.names[int(rng.choice(len(self.names), p=self.weights))]
        return text_row(self.processor, self.items[index], self.texts[index], objective, rng)


def item_text(processor: M6RecProcessor, item: dict[str, Any]) -> str:
    """Return an item's text as the processor words it."""
    return next(
        text for kind, text in processor.read({"history": [{"item": item}]}, "retrieval").segments if kind == "item"
    )


def text_row(
    processor: M6RecProcessor, item: dict[str, Any], text: str, objective: str, rng: np.random.Generator
) -> dict[str, Any]:
    """Make the row of one text for an objective of `PretrainingArguments`."""
    if objective == "text":
        ids, labels = processor.document(text)
    elif objective == "infilling":
        ids, labels = processor.infill(text, rng)
    else:
        reading = processor.read({"candidates": [item], "text": text}, "item_text")
        ids, labels = reading.input_ids, processor.labels(reading)
    return {"input_ids": ids, "labels": labels}


@torch.no_grad()
def perplexity(
    model: M6RecForRecommendation, rows: list[dict[str, Any]], collator: M6RecDataCollator, bf16: bool = False
) -> float:
    """Return exp of the mean negative log-likelihood of a labelled token."""
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(rows), ROWS_AT_ONCE):
        batch = {name: value.to(model.device) for name, value in collator(rows[start : start + ROWS_AT_ONCE]).items()}
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            loss = model(**batch, num_items_in_batch=1, return_logits=False).loss
        total += float(loss)
        # A document's first token has nothing before it that could predict it.
        shifted = batch["labels"] if model.config.document_attention == "bidirectional" else batch["labels"][:, 1:]
        count += int((shifted != -100).sum())
    return math.exp(total / count)


def fit(run: Run) -> dict[str, float]:
    """Train on the texts of the items; returns the perplexity of each objective on held-out texts.

    The collator is that of fine-tuning; labels are what tells the two apart.
    """
    arguments, seed = run.recipe.pretraining, run.recipe.seed
    order = np.random.default_rng(seed).permutation(len(run.writer.items))
    held_out = int(len(order) * arguments.valid_fraction)
    valid, train = ([run.writer.items[index] for index in part] for part in (order[:held_out], order[held_out:]))
    rows = TextRows(train, run.processor, arguments.objectives, seed)
    trainer = Trainer(
        model=run.model,
        args=run.recipe.training_arguments(
            use_cpu=on_cpu(), bf16=use_bf16(), eval_strategy="no", load_best_model_at_end=False
        ),
        train_dataset=rows,
        data_collator=run.collator,
    )
    trainer.train()
    found = {}
    for objective in rows.names if valid else []:
        fixed = TextRows(valid, run.processor, {objective: 1.0}, seed)
        found[objective] = perplexity(run.model, [fixed[i] for i in range(len(fixed))], run.collator, use_bf16())
    trained = {*(run.model.config.trained_tasks or []), "writing", "plausibility"}
    run.model.config.trained_tasks = sorted(trained)
    return found


def pretrain(recipe: Recipe) -> dict[str, float]:
    """Run a recipe's pretraining from data to saved model; returns and writes the perplexities."""
    run = prepare(recipe)
    found = fit(run)
    save(run)
    write_json(recipe.output_dir / "metrics.json", {"perplexity": found})
    return found


__all__ = ["TextRows", "fit", "item_text", "perplexity", "pretrain", "text_row"]
