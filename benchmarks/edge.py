"""A teacher, its distilled student, the student pruned, and each in 8 bits: quality, size and time; and the page.

python benchmarks/edge.py m6rec-ml100k --work /tmp/edge --data DIR [--seeds 0 1 2] [--modules node_modules]

The teacher is the quickstart's model. For each seed a student of a third of its parameters is distilled and then pruned
to 80% zeros (`student` and `pruned` below are their recipes); what lies in --work already is used again, so that an
interrupted run goes on. Each model is measured on the test films of MovieLens-100K (full ranking, seen films left out)
in torch, and as ONNX files in 8 bits with item vectors in 8 bits, after each of its exit layers; and for one request
with 100 candidates whose texts have been read, in processor milliseconds on one thread. "ratio" is the mean of NDCG@10
over the teacher's. The teacher's page is then compared with the pipeline under Node on random histories, in float32 and
8 bits; --fitted names folders of `m6rec fit`, whose pages are compared as well. --modules, a folder with
@sparticuz/chromium and puppeteer-core, adds the times that the pages show in headless Chromium.
Writes benchmarks/results/edge.json. The students take about 10 processor minutes each, all else 10 minutes.
"""

import argparse
import gzip
import json
import platform
import random
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoProcessor

from m6rec import RecommendationPipeline, SegmentCache
from m6rec.onnx_model import MANIFEST, OnnxModel, export_onnx
from m6rec.train.answering.loading import load_pipeline
from m6rec.train.commands.export import export
from m6rec.train.commands.page import vector_bytes
from m6rec.train.config.recipe import load_recipe
from m6rec.train.evaluation.reports import ranking_examples
from m6rec.train.metrics.ranking import target_ranks
from m6rec.train.runs.build import prepare
from m6rec.train.runs.finetune import finetune
from m6rec.train.runs.pruning import prunable, prune_least
from m6rec.tuning import load_model

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "edge.json"
CANDIDATES, HISTORY, ROUNDS, BATCH, K = 100, 20, 15, 32, 10
SHAPE = {
    **{"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 3, "num_joint_layers": 2},
    **{"num_attention_heads": 4, "embedding_size": 32, "embedding_dim": 64},
}
CONFIG = {
    **{"segment_summary": 1, "bow_embeddings": True, "embedding_temperature": 0.07, "hidden_dropout": 0.1},
    **{"initializer_range": 0.02, "exit_layers": [1]},
}


def student(teacher: str, output: Path, seed: int) -> dict[str, Any]:
    """The recipe of a student: the quickstart's, with a smaller shape and the teacher."""
    return {
        "data": {"source": "ml-100k", "seed": 0},
        "text": {"domain": "video", "max_events": 50, "max_length": 1600},
        "model": {
            **{"preset": "tiny", "attention": "eager", "freeze_segments": True, "item_embeddings": True},
            **{"shape": SHAPE, "config": CONFIG},
        },
        "distillation": {"teacher": teacher, "labels": 0.5, "vectors": 1, "scores": 0, "relations": 0},
        "task": {"learn": ["retrieval"], "negatives": "catalogue", "shuffle_ties": True},
        "evaluation": {"split": "leave-one-out", "exclude_seen": True},
        "tuning": {"average_checkpoints": 5},
        "training": {
            **{"output_dir": str(output), "num_train_epochs": 10, "per_device_train_batch_size": 64},
            **{"learning_rate": 2e-3, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.05},
            **{"weight_decay": 0.01, "eval_strategy": "steps", "eval_steps": 0.25, "save_strategy": "epoch"},
            **{"save_total_limit": 5, "logging_strategy": "epoch", "seed": seed},
        },
    }


def pruned(teacher: str, start: Path, output: Path, seed: int) -> dict[str, Any]:
    """The recipe that goes on from a student, until four fifths of its trained weights are zero."""
    recipe = student(teacher, output, seed)
    recipe["model"] = {
        **{"checkpoint": str(start), "attention": "eager"},
        **{"freeze_segments": True, "item_embeddings": True},
    }
    recipe["tuning"] = {"pruning": 0.8}
    recipe["training"] |= {"num_train_epochs": 2, "lr_scheduler_type": "linear", "eval_strategy": "no"}
    recipe["training"] |= {"save_total_limit": 1}
    recipe["evaluation"]["baselines"] = ["popularity"]  # the student's run has them all
    return recipe


def prune_frozen(source: Path, target: Path) -> None:
    """Save a student with four fifths of its frozen weights, token embeddings and segment layers, set to zero.

    They were drawn and never trained, so that nothing has to adapt but the layers above, which are trained next.
    """
    model, processor = load_model(str(source), dtype="float32"), AutoProcessor.from_pretrained(source)
    everything = dict(prunable(model))
    model.model.freeze_segments()
    trained = dict(prunable(model))
    frozen = [weight.detach() for name, weight in everything.items() if name not in trained]
    prune_least(frozen, [weight.abs() for weight in frozen], 0.8)
    model.requires_grad_(True)
    model.save_pretrained(target)
    processor.save_pretrained(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--modules", type=Path)
    parser.add_argument("--requests", type=int, default=1000, help="histories for the comparison of page and pipeline")
    parser.add_argument(
        "--steps", nargs="+", choices=["student", "pruned", "page"], default=["student", "pruned", "page"]
    )
    parser.add_argument("--fitted", nargs="*", default=[], help="folders that `m6rec fit` wrote")
    options = parser.parse_args()
    print("time budget: 40 minutes for three seeds")
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    more = [] if options.data is None else [f"data.directory={json.dumps(options.data)}"]
    folders = {"teacher": [Path(options.teacher)]}
    for kind in ("student", "pruned"):
        if kind in options.steps:
            folders[kind] = [trained(options, kind, seed, more) for seed in options.seeds]
    test = Test(load_recipe(student(options.teacher, options.work / "test", 0), more))
    rows = [row for kind, own in folders.items() for row in rows_of(kind, own, test, options)]
    for row in rows:
        row["ratio"] = round(row["ndcg@10"] / rows[0]["ndcg@10"], 4)
    result: dict[str, Any] = {"machine": platform.machine(), "seeds": options.seeds, "rows": rows}
    result["untrained"] = best_untrained(folders)
    if "page" in options.steps:
        result |= page(options.teacher, options)
        for row in rows:
            if row["model"] == "teacher, int8":  # which is the page's
                row["browser_ms"] = result["page"].get("candidates100_ms")
    result["fitted"] = [fitted(folder, options) for folder in options.fitted]
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


def trained(options: argparse.Namespace, kind: str, seed: int, more: list[str]) -> Path:
    """The folder of a student, or of a pruned student, which is trained unless it is there."""
    place = options.work / f"{kind}-{seed}"
    if not (place / "metrics.json").is_file():
        recipe = student(options.teacher, place, seed)
        if kind == "pruned":
            start = options.work / f"start-{seed}"
            prune_frozen(options.work / f"student-{seed}", start)
            recipe = pruned(options.teacher, start, place, seed)
        finetune(load_recipe(recipe, more))
    return place


def best_untrained(folders: dict[str, list[Path]]) -> dict[str, Any]:
    """The best row of the runs' reports that needs no training."""
    own = [json.loads((path / "metrics.json").read_text()) for path in folders.get("student", folders["teacher"])]
    rows = {name: row["ndcg@10"] for name, row in own[0]["retrieval"].items() if name != "m6rec"}
    name = max(rows, key=rows.__getitem__)
    return {"model": name, "ndcg@10": round(rows[name], 4)}


# ------------------------------------------------------------------------------------------------------------- quality


class Test:
    """The test films of the log, each after its user's history.

    Args:
        recipe: Names log and split.
    """

    def __init__(self, recipe: Any) -> None:
        self.run = prepare(recipe)
        writer = self.run.writer
        arguments = (self.run.split, "test", recipe.evaluation, recipe.seed)
        self.examples = ranking_examples(writer, self.run.processor, *arguments)
        self.ids = writer.item_ids

    def ndcg(self, model: Any, vectors: torch.Tensor, exit_layer: int | None) -> float:
        """NDCG@10 of a model by its user vectors and M x D item vectors."""
        rows, users = self.examples.rows, []
        how: dict[str, Any] = {}
        if not isinstance(model, OnnxModel):
            how = {"exit_layer": exit_layer, "return_logits": False, "plan": "cached", "segment_cache": SegmentCache()}
        for start in range(0, len(rows), BATCH):
            batch = self.run.processor.pad([dict(row) for row in rows[start : start + BATCH]])
            given = {name: batch[name] for name in ("input_ids", "attention_mask", "item_embedding_ids")}
            with torch.no_grad():
                found = model(**given, **how).user_vectors
            known = (~found.isnan().any(-1)).sum(1) - 1
            users.append(found[torch.arange(len(found)), known])
        scores = (torch.cat(users) @ vectors.T).double().numpy()
        ranks = target_ranks(scores, self.examples.targets, self.examples.histories)
        return float(np.where(ranks <= K, 1 / np.log2(ranks + 1), 0).mean())


def rows_of(kind: str, folders: list[Path], test: Test, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of a kind of model, means over its seeds: torch and 8 bits, after each exit layer."""
    loaded = [load_pipeline(str(folder)) for folder in folders]
    config = loaded[0].model.config
    exits = sorted({*(config.exit_layers or []), config.num_joint_layers})
    rows = []
    for exit_layer in reversed(exits):
        name = kind if exit_layer == exits[-1] else f"{kind}, exit {exit_layer}"
        own = [whole_row(each, test, exit_layer, folder) for each, folder in zip(loaded, folders)]
        rows.append({"model": name, **means(own)})
        own = [
            small_row(each, test, exit_layer, options.work / f"onnx-{folder.resolve().name}-{exit_layer}")
            for each, folder in zip(loaded, folders)
        ]
        rows.append({"model": f"{name}, int8", **means(own)})
    return rows


def means(rows: list[dict[str, float]]) -> dict[str, Any]:
    found: dict[str, Any] = {name: round(statistics.mean(row[name] for row in rows), 4) for name in rows[0]}
    return {**found, "browser_ms": None}


def item_vectors(recommend: RecommendationPipeline, ids: list[str]) -> torch.Tensor:
    assert recommend.catalogue is not None
    return recommend.catalogue.vectors(ids)


def whole_row(recommend: RecommendationPipeline, test: Test, exit_layer: int, folder: Path) -> dict[str, Any]:
    """Figures of a model in torch, float32; its size on disk is that of its weights."""
    content = (folder / "model.safetensors").read_bytes()
    weights = [weight for weight in recommend.model.parameters()]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    count = sum(weight.numel() for weight in weights)
    return {
        "ndcg@10": test.ndcg(recommend.model, item_vectors(recommend, test.ids), exit_layer),
        "mb": len(content) / 1e6,
        "mb_gz": len(gzip.compress(content, 6)) / 1e6,
        "native_ms": milliseconds(recommend, exit_layer),
        "parameters": count,
        "zeros": zeros / count,
    }


def small_row(recommend: RecommendationPipeline, test: Test, exit_layer: int, folder: Path) -> dict[str, Any]:
    """Figures of a model as ONNX files in 8 bits, with item vectors in 8 bits."""
    if not (folder / MANIFEST).is_file():
        last = exit_layer == recommend.model.config.num_joint_layers
        export_onnx(recommend.model, folder, "int8", None if last else exit_layer)
    manifest = json.loads((folder / MANIFEST).read_text())
    model = OnnxModel.load(folder, threads=1)
    content = vector_bytes(item_vectors(recommend, test.ids).numpy(), "int8")
    count = len(test.ids)
    scales, small = np.frombuffer(content[: 4 * count], "<f4"), np.frombuffer(content[4 * count :], np.int8)
    vectors = torch.from_numpy(scales[:, None] * small.reshape(count, -1))
    own = RecommendationPipeline(
        model=model, processor=recommend.processor, catalogue=recommend.catalogue, device="cpu"
    )
    return {
        "ndcg@10": test.ndcg(model, vectors, None),
        "mb": sum(each["bytes"] for each in manifest["files"].values()) / 1e6,
        "mb_gz": sum(each["gzip"] for each in manifest["files"].values()) / 1e6,
        "native_ms": milliseconds(own),
    }


def milliseconds(recommend: RecommendationPipeline, exit_layer: int | None = None) -> float:
    """Processor time of one request with candidates, the median of several; the first one reads the texts."""
    assert recommend.catalogue is not None
    ids = list(recommend.catalogue)
    history = [{"item": {"item_id": item_id}} for item_id in ids[-HISTORY:]]
    request = {"history": history, "candidates": [{"item_id": item_id} for item_id in ids[:CANDIDATES]]}
    times = []
    for _ in range(ROUNDS + 1):
        start = time.process_time()
        recommend(request, task="click", exit_layer=exit_layer)
        times.append(1000 * (time.process_time() - start))
    return statistics.median(times[1:])


# ------------------------------------------------------------------------------------------------------------ the page


def page(teacher: str, options: argparse.Namespace) -> dict[str, Any]:
    """Agreement of the page with the pipeline in float32 and 8 bits; its size, and what it shows in Chromium."""
    whole, found = load_pipeline(teacher), {}
    requests = histories(whole, options.requests)
    expected = [[row["item_id"] for row in rows] for rows in whole(requests, top_k=K)]
    for weights in ("float32", "int8"):
        folder = options.work / f"page-{weights}"
        if not (folder / "index.html").is_file():
            export(teacher, folder, "web", weights)
        found[f"overlap_{weights}"] = overlap(folder, requests, expected, options.work / "requests.json")
    folder = options.work / "page-int8"
    result = sizes(folder)
    if options.modules is not None:
        result |= in_browser(folder, options.modules, "Toy Story")
    return {**found, "page": result}


def sizes(folder: Path) -> dict[str, Any]:
    """Megabytes of a page without onnxruntime-web, plain and by gzip."""
    files = [path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.parent.name != "vendor"]
    packed = sum(len(gzip.compress(content, 6)) for content in files)
    return {"mb": round(sum(map(len, files)) / 1e6, 2), "mb_gz": round(packed / 1e6, 2)}


def fitted(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Agreement of the page of a fit with the pipeline, its size and its times."""
    whole, folder = load_pipeline(name), options.work / f"page-{Path(name).parent.name}-{Path(name).name}"
    assert whole.catalogue is not None and whole.catalogue.evidence is not None
    if not (folder / "index.html").is_file():
        export(name, folder, "web", "int8")
    requests = histories(whole, options.requests)
    expected = whole(requests, top_k=K)
    place = options.work / "requests.json"
    names = [[row["item_id"] for row in rows] for rows in expected]
    result = {"items": len(whole.catalogue), "learnt": whole.catalogue.evidence.learnt, **sizes(folder)}
    result["overlap"] = overlap(folder, requests, names, place)
    if options.modules is not None:
        result |= in_browser(folder, options.modules, expected[0][0]["item"])
    return result


def histories(recommend: RecommendationPipeline, count: int) -> list[dict[str, Any]]:
    """Random histories of up to 20 items of the catalogue."""
    assert recommend.catalogue is not None
    draw, ids = random.Random(0), list(recommend.catalogue)
    return [
        {"history": [{"item": {"item_id": each}} for each in draw.sample(ids, draw.randint(1, HISTORY))]}
        for _ in range(count)
    ]


def overlap(folder: Path, requests: list[dict[str, Any]], expected: list[list[str]], place: Path) -> float:
    """Mean share of the pipeline's ten best items among the page's."""
    place.write_text(json.dumps({"requests": requests, "options": {"topK": K}}))
    script = ROOT / "tests" / "web" / "answers.mjs"
    command = ["node", str(script), str(ROOT / "web" / "m6rec"), str(folder), str(place)]
    answers = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=900).stdout)["answers"]
    shares = [len({row["item_id"] for row in own} & {*names}) / K for own, names in zip(answers, expected)]
    return round(float(np.mean(shares)), 4)


def in_browser(folder: Path, modules: Path, words: str) -> dict[str, Any]:
    """What a page shows in headless Chromium."""
    script = ROOT / "tests" / "web" / "page.mjs"
    command = ["node", str(script), str(ROOT / "web" / "m6rec"), str(folder), str(modules), "-", words]
    seen = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout)
    result = {"first_list_s": seen["first_list_ms"] / 1000, "ready_s": seen["ready_ms"] / 1000}
    times = ("list_ms", "new_item_ms", *(f"candidates100_{how}" for how in ("ms", "processor_ms", "second_ms")))
    result |= {name: seen[name] for name in times if seen.get(name) is not None}
    return {name: round(value, 3) for name, value in result.items()}


if __name__ == "__main__":
    main()
