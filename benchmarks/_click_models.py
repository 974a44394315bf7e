"""Click models of other libraries, which `scoring_speed.py --quality` compares with M6-Rec.

All are initialised from MiniLM and use the same rows as M6-Rec: a source (the user's events) and candidates, each
between [BOS] and [EOS]. Cross-encoders encode source and candidate together, two-tower models separately.
"""

import importlib
import random
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _rivals import minilm_folder
from torch import nn
from torch.nn import functional
from transformers import AutoModel, AutoModelForSequenceClassification, get_linear_schedule_with_warmup

Pair = tuple[list[int], list[int]]
"""Ids of a source and of one candidate."""
AT_ONCE = 64
"""Number of candidates that are scored together."""


class Rival:
    """Learns and predicts likes of candidates from rows of ids."""

    candidates: int
    """Number of candidates of each row that are learnt."""

    def __init__(self, run: Any, rate: float, seed: int, batch: int) -> None:
        torch.manual_seed(seed)
        self.run, self.rate, self.seed, self.batch = run, rate, seed, batch
        self.start, self.segment_end = run.model.config.bos_token_id, run.model.config.segment_token_id

    def pairs(self, ids: list[int]) -> list[Pair]:
        """Return the row's source with each of its candidates."""
        starts = [index for index, token in enumerate(ids) if token == self.start]
        return [(ids[: starts[0]], ids[start:end]) for start, end in pairwise([*starts, len(ids)])]

    def drawn(self, count: int) -> Iterator[list[tuple[Pair, float]]]:
        """Yield batches from `count` training rows, in an order drawn by the seed: pairs with their labels."""
        from m6rec.train.runs.training_set import training_set

        data = training_set(self.run, {})
        order = random.Random(self.seed).sample(range(len(data)), min(count, len(data)))
        for start in range(0, len(order), self.batch):
            rows = [data[index] for index in order[start : start + self.batch]]
            labelled = [list(zip(self.pairs(row["input_ids"]), row["click_labels"])) for row in rows]
            yield [pair for own in labelled for pair in own[: self.candidates]]

    def padded(self, rows: list[list[int]]) -> dict[str, torch.Tensor]:
        """Pad ids on the right."""
        pad = self.run.processor.tokenizer.pad
        return dict(pad({"input_ids": rows}, padding_side="right", return_tensors="pt"))

    def take_words(self, model: Any) -> Any:
        """Copy our embeddings into a MiniLM model: they contain its words and our special tokens."""
        model.set_input_embeddings(nn.Embedding.from_pretrained(self.run.model.model.embeddings.tokens.weight.clone()))
        return model.requires_grad_(True)


class Looped(Rival):
    """Trains a module in a plain loop: binary cross-entropy, AdamW, learning rate with 10% warm-up, then decay."""

    module: nn.Module

    def logits(self, pairs: list[Pair]) -> torch.Tensor:
        """Return one logit per pair."""
        raise NotImplementedError

    def train(self, count: int) -> None:
        """Go once through so many training rows."""
        steps = max(count // self.batch, 1)
        optimizer = torch.optim.AdamW(self.module.parameters(), lr=self.rate, weight_decay=0.01)
        schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
        self.module.train()
        for labelled in islice(self.drawn(count), steps):
            pairs, labels = zip(*labelled)
            loss = functional.binary_cross_entropy_with_logits(self.logits(list(pairs)), torch.tensor(labels).float())
            loss.backward()
            nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    @torch.no_grad()
    def predict(self, rows: list[dict[str, Any]]) -> np.ndarray:
        """Probability of a like of each candidate of each row."""
        self.module.eval()
        pairs = iter([pair for row in rows for pair in self.pairs(row["input_ids"])])
        found = []
        while part := list(islice(pairs, AT_ONCE)):
            found.append(self.logits(part).sigmoid())
        return torch.cat(found).double().numpy()


class CrossEncoder(Looped):
    """Hugging Face's sequence classification: the user is encoded again for each candidate."""

    candidates = 2

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        model = AutoModelForSequenceClassification.from_pretrained(minilm_folder(), num_labels=1)
        self.module = self.take_words(model)

    def logits(self, pairs: list[Pair]) -> torch.Tensor:
        batch = self.padded([source + candidate for source, candidate in pairs])
        sources = torch.tensor([len(source) for source, _ in pairs])
        of_candidate = torch.arange(batch["input_ids"].shape[1]) >= sources[:, None]
        return self.module(**batch, token_type_ids=of_candidate * batch["attention_mask"]).logits[:, 0]


class TwoTower(Looped):
    """The cosine of MiniLM's vectors of user and candidate (means of states), with a scale and an offset."""

    candidates = 8

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        tower = self.take_words(AutoModel.from_pretrained(minilm_folder()))
        scale = nn.ParameterList([torch.tensor(5.0), torch.tensor(0.0)])
        self.module = nn.ModuleDict({"tower": tower, "scale": scale})

    def vectors(self, rows: list[list[int]]) -> torch.Tensor:
        """Encode each distinct row once."""
        distinct = {tuple(row): None for row in rows}
        numbers = {row: number for number, row in enumerate(distinct)}
        batch = self.padded([list(row) for row in distinct])
        mask = batch["attention_mask"][..., None]
        states = self.module["tower"](**batch).last_hidden_state
        means = functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
        return means[[numbers[tuple(row)] for row in rows]]

    def logits(self, pairs: list[Pair]) -> torch.Tensor:
        users, items = (self.vectors([pair[side] for pair in pairs]) for side in (0, 1))
        scale, offset = self.module["scale"]
        return scale * (users * items).sum(-1) + offset


class SentenceTransformers(Rival):
    """sentence-transformers' CrossEncoder, trained by its own trainer, on texts instead of ids.

    Raises:
        ImportError: If sentence-transformers is not installed.
    """

    candidates = 2

    def __init__(self, run: Any, rate: float, seed: int, batch: int, folder: Path) -> None:
        super().__init__(run, rate, seed, batch)
        self.package = importlib.import_module("sentence_transformers.cross_encoder")
        self.model = self.package.CrossEncoder(str(minilm_folder()), num_labels=1, max_length=512)
        self.folder = folder

    def text(self, ids: list[int]) -> str:
        """Return the words of each segment, with commas between."""
        found, own = [], []
        for token in ids:
            own.append(token)
            if token == self.segment_end:
                found.append(self.run.processor.tokenizer.decode(own, skip_special_tokens=True).strip())
                own = []
        return ", ".join(text for text in found if text)

    def train(self, count: int) -> None:
        """Go once through so many training rows."""
        datasets = importlib.import_module("datasets")
        losses = importlib.import_module("sentence_transformers.cross_encoder.losses")
        pairs, labels = zip(*(one for rows in self.drawn(count) for one in rows))
        sources, candidates = ([self.text(pair[side]) for pair in pairs] for side in (0, 1))
        table = datasets.Dataset.from_dict({"user": sources, "item": candidates, "label": list(map(float, labels))})
        arguments = self.package.CrossEncoderTrainingArguments(
            output_dir=str(self.folder),
            num_train_epochs=1,
            per_device_train_batch_size=self.batch * self.candidates,
            learning_rate=self.rate,
            warmup_steps=0.1,
            weight_decay=0.01,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=self.seed,
        )
        loss = losses.BinaryCrossEntropyLoss(self.model)
        self.package.CrossEncoderTrainer(model=self.model, args=arguments, train_dataset=table, loss=loss).train()

    def predict(self, rows: list[dict[str, Any]]) -> np.ndarray:
        """Probability of a like of each candidate of each row."""
        pairs = [tuple(map(self.text, pair)) for row in rows for pair in self.pairs(row["input_ids"])]
        found = self.model.predict(pairs, batch_size=AT_ONCE, activation_fn=nn.Sigmoid(), show_progress_bar=False)
        return np.asarray(found, dtype=float).ravel()


__all__ = ["CrossEncoder", "SentenceTransformers", "TwoTower"]
