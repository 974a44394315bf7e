"""`m6rec export`: writes a trained model as ONNX files, or as a page that recommends in a browser without a server.

m6rec export m6rec-ml100k films-onnx --to onnx --weights int8
m6rec export m6rec-ml100k films-page --to web --weights int8
"""

import json
import random
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from ...atomic_m6rec import atomic_folder
from ...catalogue_m6rec import CatalogueView
from ...configuration_m6rec import M6RecConfig
from ...item_features_m6rec import reads_item_rows
from ...modeling_m6rec import M6RecForRecommendation
from ...onnx_model import MANIFEST, WEIGHTS, OnnxModel, export_onnx
from ...pipeline_m6rec import FOLDER, RecommendationPipeline
from ..answering.loading import load_pipeline

PAGE = Path(__file__).resolve().parents[2] / "web"
"""The files of the page."""

RUNTIME_FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
"""What the page needs of onnxruntime-web."""

SETTINGS = ("template", "max_length", "max_events", "time", "item_rows", "options", "truncation_stride", "max_segment")
"""Settings of a processor that the page reads."""

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
            _write_page(recommend, Path(partial), weights, exit_layer, runtime, say)
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
        products = f", {facts['products']} products with 8-bit weights" if "products" in facts else ""
        say(f"{name}: {facts['bytes'] / 1e6:.2f} MB, {facts['gzip'] / 1e6:.2f} MB by gzip{products}")
    if "agreement" in manifest:
        found = manifest["agreement"]
        say(
            f"top 10 of {REQUESTS} random histories: {found['overlap']:.1%} the same items as the model, "
            f"scores differ by at most {found['difference']:.1e}"
        )


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


# ----------------------------------------------------------------------------------------------------------- the page


def _write_page(
    recommend: RecommendationPipeline,
    folder: Path,
    weights: str,
    exit_layer: int | None,
    runtime: str | None,
    say: Callable[[str], None],
) -> None:
    if recommend.catalogue is None:
        raise ValueError("the page needs a catalogue, and this model has none: make one with Catalogue.from_dataset")
    catalogue = recommend.catalogue.snapshot()
    catalogue.check(recommend.model)
    shutil.copytree(
        PAGE, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.py", "__pycache__", "package.json")
    )
    own = folder / "model"
    manifest = export_onnx(cast(M6RecForRecommendation, recommend.model), own, weights, exit_layer)
    for name in ("config.json", MANIFEST):
        (own / name).unlink()
    recommend.processor.tokenizer.backend_tokenizer.save(str(own / "tokenizer.json"), pretty=False)
    (own / "items.json").write_text(_compact(_items(catalogue)), encoding="utf-8")
    (own / "vectors.bin").write_bytes(vector_bytes(catalogue.vectors(list(catalogue)).numpy(), weights))
    (own / "manifest.json").write_text(_compact(_manifest(recommend, catalogue, weights)), encoding="utf-8")
    copy_runtime(folder / "vendor", runtime)
    _report(manifest, say)
    if catalogue.evidence is not None:
        say("the page ranks by the model alone: it does not read the catalogue's evidence (words, transitions)")
    sizes = [path.stat().st_size for path in own.iterdir()]
    say(f"model and catalogue of {len(catalogue)} items: {sum(sizes) / 1e6:.2f} MB")


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _items(catalogue: CatalogueView) -> dict[str, Any]:
    ids = list(catalogue)
    return {"ids": ids, "items": [catalogue.item(item_id) for item_id in ids]}


def vector_bytes(vectors: np.ndarray, weights: str) -> bytes:
    """Write N x D vectors as float32, or as N float32 factors and N x D 8-bit numbers.

    Args:
        vectors: The vectors.
        weights: "float32" or "int8".
    """
    if weights == "float32":
        return vectors.astype("<f4").tobytes()
    scales = np.maximum(np.abs(vectors).max(1, initial=0.0), 1e-12) / 127
    small = np.rint(vectors / scales[:, None]).astype(np.int8)
    return scales.astype("<f4").tobytes() + small.tobytes()


def _manifest(recommend: RecommendationPipeline, catalogue: CatalogueView, weights: str) -> dict[str, Any]:
    """Return what the page has to know of model, processor and catalogue."""
    config, processor = recommend.model.config, recommend.processor
    return {
        "model": {
            "hidden_size": config.hidden_size,
            "segment_summary": config.segment_summary,
            "skipped_kinds": config.skipped_kinds,
            "pad_token_id": config.pad_token_id,
            "bos_token_id": config.bos_token_id,
            "reads_item_rows": reads_item_rows(cast(M6RecConfig, config)),
            "tasks": list(config.scored),
            "trained_tasks": config.trained_tasks,
        },
        "processor": {name: getattr(processor, name) for name in SETTINGS},
        "ids": processor.tokenizer.structural_ids,
        "kinds": config.kind_token_ids,
        "catalogue": {"width": catalogue.dimension, "weights": weights, "exclude_seen": catalogue.exclude_seen},
    }


def copy_runtime(folder: Path, runtime: str | None = None) -> None:
    """Put the files of onnxruntime-web into a folder.

    Args:
        folder: The folder, which is made.
        runtime: A folder that holds them; None = npm downloads the version that web/package.json names.

    Raises:
        ValueError: If the given folder lacks a file, or npm is not there or fails.
    """
    folder.mkdir()
    if runtime is not None:
        missing = [name for name in RUNTIME_FILES if not (Path(runtime) / name).is_file()]
        if missing:
            raise ValueError(f"--runtime {runtime}: the folder lacks {', '.join(missing)} of onnxruntime-web (dist/)")
        for name in RUNTIME_FILES:
            shutil.copy(Path(runtime) / name, folder / name)
        return
    wanted = json.loads((PAGE / "package.json").read_text(encoding="utf-8"))["dependencies"]["onnxruntime-web"]
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError(
            "the page needs onnxruntime-web: install npm, or name a folder with its dist/ files by --runtime"
        )
    with tempfile.TemporaryDirectory() as place:
        command = [npm, "pack", f"onnxruntime-web@{wanted}", "--silent"]
        done = subprocess.run(command, cwd=place, check=False, capture_output=True, text=True, timeout=300)
        packed = list(Path(place).glob("*.tgz"))
        if done.returncode or not packed:
            raise ValueError(
                f"npm could not fetch onnxruntime-web {wanted}: {done.stderr.strip() or done.stdout.strip()}"
            )
        with tarfile.open(packed[0]) as archive:
            for name in RUNTIME_FILES:
                content = archive.extractfile(f"package/dist/{name}")
                assert content is not None  # a file, not a folder
                (folder / name).write_bytes(content.read())


__all__ = ["WEIGHTS", "Agreement", "agreement", "copy_runtime", "export", "vector_bytes"]
