"""`m6rec export`: writes a trained model as ONNX files, or as a page that recommends in a browser without a server.

m6rec export m6rec-ml100k films-onnx --to onnx --weights int8
m6rec export m6rec-ml100k films-page --to web --weights int8
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from ...atomic_m6rec import atomic_folder
from ...modeling_m6rec import M6RecForRecommendation
from ...onnx_model import MANIFEST, WEIGHTS, OnnxModel, export_onnx
from ...pipeline_m6rec import FOLDER, RecommendationPipeline
from ..answering.loading import load_pipeline
from .page import write_page

REQUESTS = 50
"""Number of random histories on which the exported model is compared with the model."""


class Agreement(NamedTuple):
    """How far an exported model agrees with the model, on random histories of the catalogue's items."""

    overlap: float
    """Mean share of the model's ten best items among the exported model's ten best."""
    difference: float
    """Largest difference of the score of an item that is in both lists."""


def export(
    model: str,
    output: str | Path,
    target: str = "onnx",
    weights: str = "float32",
    exit_layer: int | None = None,
    runtime: str | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Export a model into a folder, atomically.

    Args:
        model: Folder or Hub id of a trained model.
        output: The folder; it must not exist, or hold an earlier export.
        target: "onnx": ONNX files, processor and catalogue; "web": the page.
        weights: "float32" or "int8".
        exit_layer: Number of joint layers; None = all.
        runtime: For "web", a folder with the files of onnxruntime-web; None = npm downloads it.
        say: Receives the report.

    Raises:
        FileExistsError: If the folder holds other files.
        ValueError: If the model cannot be exported.
    """
    folder = Path(output)
    marker = {"onnx": MANIFEST, "web": "index.html"}[target]
    if folder.exists() and any(folder.iterdir()) and not (folder / marker).is_file():
        raise FileExistsError(f"{str(folder)!r} holds other files: name another folder")
    recommend = load_pipeline(model)
    with atomic_folder(folder) as partial:
        if target == "web":
            for name, facts in write_page(recommend, Path(partial), weights, exit_layer, runtime, say).items():
                _report_file(name, facts, say)
        else:
            _write_onnx(recommend, Path(partial), weights, exit_layer, say)
    say(f"written to {folder}")


def _write_onnx(
    recommend: RecommendationPipeline, folder: Path, weights: str, exit_layer: int | None, say: Callable[[str], None]
) -> None:
    manifest = export_onnx(cast(M6RecForRecommendation, recommend.model), folder, weights, exit_layer)
    recommend.processor.save_pretrained(folder)
    if recommend.catalogue is not None:
        recommend.catalogue.save(folder / FOLDER)
        found = agreement(recommend, _through_onnx(recommend, folder), exit_layer)
        manifest["agreement"] = found._asdict()
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    _report(manifest, say)


def _report(manifest: dict[str, Any], say: Callable[[str], None]) -> None:
    for name, facts in manifest["files"].items():
        _report_file(name, facts, say)
    if "agreement" in manifest:
        found = manifest["agreement"]
        say(
            f"top 10 of {REQUESTS} random histories: {found['overlap']:.1%} the same items as the model, "
            f"scores differ by at most {found['difference']:.1e}"
        )


def _report_file(name: str, facts: dict[str, Any], say: Callable[[str], object]) -> None:
    products = f", {facts['products']} products with 8-bit weights" if "products" in facts else ""
    say(f"{name}: {facts['bytes'] / 1e6:.2f} MB, {facts['gzip'] / 1e6:.2f} MB by gzip{products}")


def _through_onnx(recommend: RecommendationPipeline, folder: Path) -> RecommendationPipeline:
    return RecommendationPipeline(
        model=OnnxModel.load(folder), processor=recommend.processor, catalogue=recommend.catalogue, device="cpu"
    )


def agreement(
    recommend: RecommendationPipeline, exported: RecommendationPipeline, exit_layer: int | None = None
) -> Agreement:
    """Compare the ten best items of an exported model with the model's, on random histories of up to 20 items."""
    assert recommend.catalogue is not None
    draw, ids = random.Random(0), list(recommend.catalogue)
    histories = [draw.sample(ids, min(draw.randint(1, 20), len(ids))) for _ in range(REQUESTS)]
    requests = [{"history": [{"item": {"item_id": each}} for each in own]} for own in histories]
    options = {"task": "retrieval", "top_k": 10, "exclude_seen": False}
    overlaps, differences = [], [0.0]
    for own, other in zip(recommend(requests, exit_layer=exit_layer, **options), exported(requests, **options)):
        scores = {row["item_id"]: row["score"] for row in own}
        both = [row for row in other if row["item_id"] in scores]
        overlaps.append(len(both) / len(own))
        differences += [abs(row["score"] - scores[row["item_id"]]) for row in both]
    return Agreement(float(np.mean(overlaps)), max(differences))


__all__ = ["WEIGHTS", "Agreement", "agreement", "export"]
