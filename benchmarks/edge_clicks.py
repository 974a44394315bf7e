"""Clicks through the steps of `edge.py`: a teacher, its distilled student, the student pruned, and each in 8 bits.

python benchmarks/edge_clicks.py --work /tmp/edge_clicks --data DIR [--steps teacher student]

One seed. The teacher is the recipe `video` without its pretraining, learning clicks alone for one epoch of
MovieLens-100K split by time; the student has a shape of a third of its parameters and learns the teacher's scores and
the clicks; it is then pruned to 80% zeros. Measured on the test part: AUC, megabytes, and processor milliseconds for
100 candidates whose texts have been read, on one thread. "ratio" is the AUC over the teacher's; `untrained` is the best
rule without training. Writes the key "clicks" of benchmarks/results/edge.json. About 15 processor minutes.
"""

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

import torch
from edge import BATCH, RESULTS, SHAPE, milliseconds

from m6rec import RecommendationPipeline
from m6rec.onnx_model import MANIFEST, OnnxModel, export_onnx
from m6rec.train.answering.loading import load_pipeline
from m6rec.train.config.recipe import load_recipe
from m6rec.train.evaluation.reports import scoring_report
from m6rec.train.runs.build import prepare
from m6rec.train.runs.finetune import examples_of, finetune

EPOCHS = {"teacher": 1, "student": 1, "pruned": 0.5}


def recipe_of(kind: str, work: Path, data: str | None) -> Any:
    """The recipe of a teacher, a student or a pruned student: the recipe `video`, and what differs."""
    changed = {"task.learn": ["click"], "training.output_dir": str(work / kind), "data.directory": data}
    changed["training.num_train_epochs"] = EPOCHS[kind]
    changed["pretraining.output_dir"] = None
    if kind != "teacher":
        changed |= {"distillation.teacher": str(work / "teacher"), "distillation.labels": 0.5}
        changed |= {"distillation.scores": 1, "distillation.vectors": 0, "distillation.relations": 0}
    if kind == "student":
        changed |= {f"model.shape.{name}": value for name, value in SHAPE.items()}
    if kind == "pruned":
        changed |= {
            "model.checkpoint": str(work / "student"),
            "model.shape": {},
            "model.config": {},
            "tuning.pruning": 0.8,
        }
    return load_recipe("video", [f"{name}={json.dumps(value)}" for name, value in changed.items()])


def auc_of(model: OnnxModel, run: Any, examples: Any) -> float:
    """AUC of an exported model."""
    found: list[Any] = [None] * len(examples.rows)
    order = sorted(range(len(examples.rows)), key=lambda place: len(examples.rows[place]["input_ids"]))
    for start in range(0, len(order), BATCH):
        places = order[start : start + BATCH]
        rows = [examples.rows[place] for place in places]
        batch = run.processor.pad([dict(row) for row in rows])
        given = {name: batch[name] for name in ("input_ids", "attention_mask", "item_embedding_ids") if name in batch}
        scores = model.read_scores(model(**given).scores, "click")
        for place, row, own in zip(places, rows, scores, strict=True):
            found[place] = own[: row["input_ids"].count(model.config.bos_token_id)]
    return float(scoring_report(torch.cat(found).double().numpy(), examples, "click")["auc"])


def rows_of(kind: str, work: Path, data: str | None) -> list[dict[str, Any]]:
    """The rows of a trained model: in torch, float32, and as ONNX files in 8 bits."""
    place, files = work / kind, work / f"onnx-{kind}"
    recommend = load_pipeline(str(place))
    weights = [*recommend.model.parameters()]
    content = (place / "model.safetensors").read_bytes()
    count = sum(weight.numel() for weight in weights)
    own = {
        "model": kind,
        "auc": json.loads((place / "metrics.json").read_text())["click"]["m6rec"]["auc"],
        "mb": len(content) / 1e6,
        "mb_gz": len(gzip.compress(content, 6)) / 1e6,
        "native_ms": milliseconds(recommend),
        "parameters": count,
        "zeros": sum(int((weight == 0).sum()) for weight in weights) / count,
    }
    if not (files / MANIFEST).is_file():
        export_onnx(recommend.model, files, "int8")
    manifest, model = json.loads((files / MANIFEST).read_text()), OnnxModel.load(files, threads=1)
    run = prepare(recipe_of(kind, work, data))
    through = RecommendationPipeline(
        model=model, processor=recommend.processor, catalogue=recommend.catalogue, device="cpu"
    )
    small = {
        "model": f"{kind}, int8",
        "auc": auc_of(model, run, examples_of(run, "test", "click")),
        "mb": sum(each["bytes"] for each in manifest["files"].values()) / 1e6,
        "mb_gz": sum(each["gzip"] for each in manifest["files"].values()) / 1e6,
        "native_ms": milliseconds(through),
    }
    return [own, small]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data")
    parser.add_argument("--steps", nargs="+", choices=[*EPOCHS], default=[*EPOCHS])
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for kind in options.steps:
        if not (options.work / kind / "metrics.json").is_file():
            finetune(recipe_of(kind, options.work, options.data))
        rows += rows_of(kind, options.work, options.data)
    for row in rows:
        row["ratio"] = row["auc"] / rows[0]["auc"]
        row |= {name: round(value, 4) for name, value in row.items() if isinstance(value, float)}
    rules = json.loads((options.work / "teacher" / "metrics.json").read_text())["click"]
    rules = {name: row["auc"] for name, row in rules.items() if name != "m6rec"}
    best = max(rules, key=rules.__getitem__)
    result = json.loads(RESULTS.read_text())
    result["clicks"] = {"seeds": [0], "rows": rows, "untrained": {"model": best, "auc": round(rules[best], 4)}}
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["clicks"]))


if __name__ == "__main__":
    main()
