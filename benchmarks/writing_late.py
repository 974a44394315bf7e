"""What late interaction costs writing: perplexity of explanations with 4 joint layers against all joint, on equal rows.

    python benchmarks/writing_late.py --backbone FOLDER [--data DIR] [--steps 24] [--tests 64] [--seeds 0] [--bf16]

FOLDER holds SmolLM2-135M-Instruct or another causal language model, DIR the clothing reviews (by default
$M6REC_DATA/clothing-reviews). A source holds the reader's age and two sentences of other reviews of the same article
([FACT]), the candidate its category and department; the text is the beginning of a review with 4 or 5 stars. Test rows
are of 60 articles that training does not hold. All models are trained on the same rows in the same order, all weights,
8 rows a step; --bf16 computes in bfloat16, for processors that can. `source_gain` is the perplexity with the facts of
another row, divided by that with the own facts, - 1.
"""

import argparse
import copy
import json
import math
import os
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch
from transformers import AutoTokenizer

from m6rec import M6RecForRecommendation, M6RecProcessor, M6RecTokenizer
from m6rec.layers_m6rec import inference_mode

TASK = "explanation"
MODELS: dict[str, dict[str, Any]] = {
    "all joint": {},
    "4 joint, written_attention=source": {"num_joint_layers": 4, "written_attention": "source"},
    "4 joint, written_attention=segment": {"num_joint_layers": 4, "written_attention": "segment"},
}
ROWS, RATE, WARM = 8, 1e-4, 3
TEST_ARTICLES, FACT_WORDS, TEXT_WORDS, REVIEWS = 60, 22, 30, 6
SHIFT = 7
"""Distance of the test row whose facts stand in for a row's own."""

Row = dict[str, Any]


def reviews(folder: Path, most: int = 3) -> dict[str, list[Row]]:
    """Read the reviews and make requests with their texts, in a drawn order: "train" and "test".

    Args:
        folder: Folder of the clothing reviews.
        most: Most reviews of an article in the training part.
    """
    table = pandas.read_parquet(folder / "WomensClothingE-CommerceReviews.parquet.brotli")
    table.columns = [name.strip().lower() for name in table.columns]
    article, text, kind, department, rating = (
        next(name for name in table.columns if part in name)
        for part in ("clothing", "review text", "class", "department", "rating")
    )
    table[text] = table[text].fillna("").str.replace(r"\s+", " ", regex=True).str.strip()
    table = table[table[text].str.len() > 40]
    draw, groups = random.Random(0), table.groupby(article)
    articles = [number for number, size in groups.size().items() if size >= REVIEWS]
    draw.shuffle(articles)
    found: dict[str, list[Row]] = {"train": [], "test": []}
    for place, number in enumerate(articles):
        own, part = groups.get_group(number), "test" if place < TEST_ARTICLES else "train"
        order = list(own.index)
        draw.shuffle(order)
        half = order[: len(order) // 2]
        for index in order[len(order) // 2 :][: 2 if part == "test" else most]:
            row = own.loc[index]
            if row[rating] < 4:
                continue
            facts = [beginning(own.loc[other, text], FACT_WORDS) for other in draw.sample(half, 2)]
            item = {"category": str(row[kind]), "department": str(row[department])}
            request = {"user": {"age": int(row["age"])}, "facts": facts, "candidates": [item]}
            found[part].append({**request, "text": beginning(row[text], TEXT_WORDS)})
    for rows in found.values():
        draw.shuffle(rows)
    return found


def beginning(text: str, words: int) -> str:
    """Cut a text to some words, at the end of a sentence if one ends behind 40 characters."""
    start = " ".join(text.split()[:words])
    ends = [end.end() for end in re.finditer(r"[.!?](?=\s|$)", start) if end.end() > 40]
    return start[: ends[-1]] if ends else start


def batch(processor: M6RecProcessor, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """Encode rows, with the labels of their texts."""
    encoded = processor.read_many(rows, TASK)
    return processor.pad([{"input_ids": row.input_ids, "labels": processor.labels(row)} for row in encoded])


def likelihood(
    model: M6RecForRecommendation, processor: M6RecProcessor, rows: Sequence[Row], bf16: bool
) -> tuple[float, int]:
    """Return the perplexity of the texts, and the number of their tokens."""
    total, count = 0.0, 0
    with inference_mode(model), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        for start in range(0, len(rows), 2 * ROWS):
            given = batch(processor, rows[start : start + 2 * ROWS])
            known = int((given["labels"] != -100).sum())
            total += known * float(model(**given, only_losses=True).losses["text"])
            count += known
    return math.exp(total / count), count


def train(
    model: M6RecForRecommendation, processor: M6RecProcessor, rows: Sequence[Row], steps: int, seed: int, bf16: bool
) -> None:
    """Train all weights on 8 rows a step."""
    draw, order = random.Random(seed), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01, betas=(0.9, 0.98))
    model.train()
    for step in range(steps):
        if len(order) < ROWS:
            order = list(range(len(rows)))
            draw.shuffle(order)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / WARM) * max(0.1, 1 - step / steps)
        given = batch(processor, [rows[order.pop()] for _ in range(ROWS)])
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(**given, only_losses=True).losses["text"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def late_cost(
    backbone: str,
    data: Path,
    steps: int,
    tests: int,
    seeds: Sequence[int],
    names: Sequence[str] = tuple(MODELS),
    bf16: bool = False,
) -> dict[str, Any]:
    """Train and measure each model.

    Args:
        backbone: Folder or Hub id of a causal language model.
        data: Folder of the clothing reviews.
        steps: Steps of 8 rows.
        tests: Number of test texts.
        seeds: Seeds of the training order.
        names: The models, among MODELS.
        bf16: Whether to compute in bfloat16.

    Returns:
        `late_cost`, the relative perplexity of 4 joint layers whose written text attends to its source, against all
        joint - 1, mean over the seeds; and a row for each model and seed.
    """
    read, own = reviews(data), AutoTokenizer.from_pretrained(backbone)
    test = read["test"][:tests]
    others = copy.deepcopy(test)
    for place, row in enumerate(others):
        row["facts"] = test[(place + SHIFT) % len(test)]["facts"]
    processor = M6RecProcessor.from_template(M6RecTokenizer.from_backbone(own))
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        for name in names:
            fields = MODELS[name]
            torch.manual_seed(seed)
            model = M6RecForRecommendation.from_backbone(backbone, tokenizer=own, dtype="float32", **fields)
            before, _ = likelihood(model, processor, test, bf16)
            train(model, processor, read["train"], steps, seed, bf16)
            (after, tokens), (foreign, _) = (likelihood(model, processor, some, bf16) for some in (test, others))
            row = {
                "model": name,
                "seed": seed,
                "untrained": before,
                "perplexity": after,
                "source_gain": foreign / after - 1,
            }
            rows.append({**row, "tokens": tokens, "steps": steps})
            print(json.dumps(rows[-1]), flush=True)
    found = {name: np.array([row["perplexity"] for row in rows if row["model"] == name]) for name in names}
    costs = {name: float((found[name] / found["all joint"] - 1).mean()) for name in names}
    return {"late_cost": costs["4 joint, written_attention=source"], "costs": costs, "rows": rows}


def main() -> None:
    """Print the figures, and write them if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backbone", required=True, help="folder or Hub id of a causal language model")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("M6REC_DATA", ".")) / "clothing-reviews")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--tests", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = late_cost(given.backbone, given.data, given.steps, given.tests, given.seeds, given.models, given.bf16)
    print(json.dumps({name: value for name, value in found.items() if name != "rows"}))
    if given.output:
        given.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
