"""Sizes and times of a model as ONNX files and as a page, in float32 and with 8-bit weights.

python benchmarks/edge.py m6rec-ml100k --work /tmp/edge [--modules node_modules]

Exports the model into --work (what is there already is used again) and writes benchmarks/results/edge.json: megabytes
of the graphs, plain and by gzip; processor milliseconds on one thread for one request with 100 candidates whose texts
have been read, by torch and by onnxruntime; overlap of the ten best items with the model's on 50 random histories. With
--modules, a folder of @sparticuz/chromium and puppeteer-core, also the times that the page shows in headless Chromium.
"""

import argparse
import json
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from m6rec import RecommendationPipeline
from m6rec.onnx_model import MANIFEST, OnnxModel
from m6rec.train.answering.loading import load_pipeline
from m6rec.train.commands.export import agreement, export

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "edge.json"
CANDIDATES, HISTORY, ROUNDS = 100, 20, 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--modules", type=Path)
    options = parser.parse_args()
    print("time budget: 5 minutes")
    torch.set_num_threads(1)
    whole = load_pipeline(options.model)
    rows: list[dict[str, Any]] = [{"model": "torch float32", "native_ms": milliseconds(whole)}]
    for weights in ("float32", "int8"):
        folder = options.work / f"onnx-{weights}"
        if not (folder / MANIFEST).is_file():
            export(options.model, folder, "onnx", weights)
        rows.append(measured(whole, folder, weights))
    result: dict[str, Any] = {"machine": platform.machine(), "parameters": parameters(whole), "rows": rows}
    result["overlap_int8"] = rows[-1]["overlap"]
    if options.modules is not None:
        result["page"] = page(options.model, options.work / "page", options.modules)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


def parameters(recommend: RecommendationPipeline) -> int:
    return sum(weight.numel() for weight in recommend.model.parameters())


def measured(whole: RecommendationPipeline, folder: Path, weights: str) -> dict[str, Any]:
    """Sizes, time and agreement of exported files."""
    files = json.loads((folder / MANIFEST).read_text())["files"].values()
    model = OnnxModel.load(folder, threads=1)
    own = RecommendationPipeline(model=model, processor=whole.processor, catalogue=whole.catalogue, device="cpu")
    size, packed = (sum(each[name] for each in files) / 1e6 for name in ("bytes", "gzip"))
    facts = {"model": f"onnx {weights}", "mb": round(size, 2), "mb_gz": round(packed, 2)}
    return {**facts, "native_ms": milliseconds(own), **agreement(whole, own)._asdict()}


def milliseconds(recommend: RecommendationPipeline) -> float:
    """Processor time of one request with candidates, the median of several; the first one reads the texts."""
    assert recommend.catalogue is not None
    ids = list(recommend.catalogue)
    history = [{"item": {"item_id": item_id}} for item_id in ids[-HISTORY:]]
    request = {"history": history, "candidates": [{"item_id": item_id} for item_id in ids[:CANDIDATES]]}
    times = []
    for _ in range(ROUNDS + 1):
        start = time.process_time()
        recommend(request, task="click")
        times.append(1000 * (time.process_time() - start))
    return round(statistics.median(times[1:]), 1)


def page(model: str, folder: Path, modules: Path) -> dict[str, Any]:
    """Size of the page, and what it shows in Chromium."""
    if not (folder / "index.html").is_file():
        export(model, folder, "web", "int8")
    script = ROOT / "tests" / "web" / "page.mjs"
    command = ["node", str(script), str(ROOT / "web" / "m6rec"), str(folder), str(modules), "-", "Toy Story"]
    seen = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout)
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.parent.name != "vendor"]
    names = ("first_list_ms", "list_ms", "candidates100_ms", "new_item_ms")
    return {"mb": round(sum(sizes) / 1e6, 2), **{name: round(seen[name], 1) for name in names}}


if __name__ == "__main__":
    main()
