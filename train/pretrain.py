"""Generative pretraining on the items' texts (paper, backbone: text infilling and autoregressive language modelling).

m6rec pretrain movielens training.output_dir=runs/films-pretrained
"""

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from ..items_m6rec import item_texts
from ..modeling_m6rec import M6RecForRecommendation
from ..tokenization import M6RecProcessor
from .build import Run, on_cpu, plain_forward, prepare, save, use_bf16
from .collator import UNKNOWN, M6RecDataCollator
from .recipe import Recipe, write_json

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
        self.texts = item_texts(processor, items)

    def set_epoch(self, epoch: int) -> None:
        """Draw anew."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, self.epoch, index])
        objective = self.names[int(rng.choice(len(self.names), p=self.weights))]
        return text_row(self.processor, self.items[index], self.texts[index], objective, rng)


class EachEpochAnew(TrainerCallback):
    """Tells rows of text which epoch it is; with several processes the data loader does not.

    Args:
        rows: The rows that are trained on.
    """

    def __init__(self, rows: TextRows) -> None:
        self.rows = rows

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the epoch, also where training is resumed within one."""
        self.rows.set_epoch(int(state.epoch))


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
        # Nothing stands before a row's first token that could predict it.
        count += int((batch["labels"][:, 1:] != UNKNOWN).sum())
    return math.exp(total / count)


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """Make the Trainer's arguments; what a recipe says of evaluation during training is meant for fine-tuning."""
    never = {"eval_strategy": "no", "load_best_model_at_end": False}
    recipe = dataclasses.replace(recipe, training={**recipe.training, **never})
    return recipe.training_arguments(use_cpu=on_cpu(), bf16=use_bf16())


def fit(run: Run) -> dict[str, float]:
    """Train on the texts of the items; returns the perplexity of each objective on held-out texts.

    The collator is that of fine-tuning; labels are what tells the two apart.
    """
    arguments, seed = run.recipe.pretraining, run.recipe.seed
    items = run.writer.items
    order = np.random.default_rng(seed).permutation(len(items))
    held_out = int(len(order) * arguments.valid_fraction)
    valid, train = ([items[index] for index in part] for part in (order[:held_out], order[held_out:]))
    rows = TextRows(train, run.processor, arguments.objectives, seed)
    if "text" in rows.names and run.model.config.document_attention == "bidirectional":
        raise ValueError(
            "pretraining.objectives 'text' writes a text on, but with document_attention 'bidirectional' every token "
            "sees itself: give it the weight 0"
        )
    settings = training_arguments(run.recipe)
    trainer = Trainer(
        model=run.model,
        args=settings,
        train_dataset=rows,
        data_collator=run.collator,
        callbacks=[EachEpochAnew(rows)],
    )
    trainer.train(resume_from_checkpoint=settings.resume_from_checkpoint)
    plain_forward(run.model)
    run.model.eval()
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


__all__ = [
    "EachEpochAnew",
    "TextRows",
    "fit",
    "perplexity",
    "pretrain",
    "text_row",
    "training_arguments",
]
