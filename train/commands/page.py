"""The page of `m6rec export --to web`: its code, and model, catalogue and evidence in the form that the code reads."""

import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from ...catalogue_m6rec import CatalogueView
from ...configuration_m6rec import M6RecConfig
from ...item_features_m6rec import reads_item_rows
from ...modeling_m6rec import M6RecForRecommendation
from ...onnx_model import MANIFEST, OnnxModel, export_onnx
from ...pipeline_m6rec import RecommendationPipeline
from .page_evidence import evidence_files

PAGE = Path(__file__).resolve().parents[2] / "web"
"""The files of the page."""
BASE = Path(__file__).resolve().parents[1] / "demo" / "page" / "base.css"
"""The style that it shares with the demo."""

RUNTIME_FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
"""What the page needs of onnxruntime-web."""

SETTINGS = ("template", "max_length", "max_events", "time", "item_rows", "options", "truncation_stride", "max_segment")
"""Settings of a processor that the page reads."""


def write_page(
    recommend: RecommendationPipeline,
    folder: Path,
    weights: str,
    exit_layer: int | None,
    runtime: str | None,
    say: Callable[[str], object],
) -> dict[str, Any]:
    """Write the page of a model into a folder.

    A catalogue that ranks by evidence alone does not read the model: its page has neither graphs nor runtime.

    Args:
        recommend: The model with its catalogue.
        folder: The folder.
        weights: "float32" or "int8".
        exit_layer: Number of joint layers; None = all.
        runtime: A folder with the files of onnxruntime-web; None = npm downloads them.
        say: Receives a line with the size.

    Returns:
        Facts of the graphs by file name: bytes, plain and by gzip, and the number of products with 8-bit weights.

    Raises:
        ValueError: If there is no catalogue, or the model cannot be exported.
    """
    if recommend.catalogue is None:
        raise ValueError("the page needs a catalogue, and this model has none: make one with Catalogue.from_dataset")
    catalogue = recommend.catalogue.snapshot()
    learnt = catalogue.evidence is None or catalogue.evidence.learnt > 0
    shutil.copytree(
        PAGE, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.py", "__pycache__", "package.json")
    )
    shutil.copy(BASE, folder)
    own, files = folder / "model", {}
    own.mkdir()
    manifest = _manifest(recommend, catalogue, weights)
    if learnt:
        catalogue.check(recommend.model)
        files = export_onnx(cast(M6RecForRecommendation, recommend.model), own, weights, exit_layer)["files"]
        manifest["model"] = _model_settings(recommend) | {"unknown_user": _unknown_user(recommend, own)}
        for name in ("config.json", MANIFEST):
            (own / name).unlink()
        (own / "vectors.bin").write_bytes(vector_bytes(catalogue.vectors(list(catalogue)).numpy(), weights))
        copy_runtime(folder / "vendor", runtime)
    recommend.processor.tokenizer.backend_tokenizer.save(str(own / "tokenizer.json"), pretty=False)
    (own / "items.json").write_text(_compact(_items(catalogue)), encoding="utf-8")
    counted = catalogue.counted()
    if counted is not None:
        manifest["evidence"], content, vocabulary = evidence_files(counted)
        (own / "evidence.bin").write_bytes(content)
        (own / "words.json").write_text(_compact(vocabulary), encoding="utf-8")
        if counted.rule.texts:
            say("the page does not compare texts by the static reader (texts of the evidence), and says so")
    (own / "manifest.json").write_text(_compact(manifest), encoding="utf-8")
    sizes = [path.stat().st_size for path in own.iterdir()]
    say(f"model and catalogue of {len(catalogue)} items: {sum(sizes) / 1e6:.2f} MB")
    return files


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _items(catalogue: CatalogueView) -> dict[str, Any]:
    ids = list(catalogue)
    return {"ids": ids, "items": [catalogue.item(item_id) for item_id in ids]}


def _unknown_user(recommend: RecommendationPipeline, folder: Path) -> list[float]:
    """Return the vector of a user without a history by the exported graphs, so that the first list needs no session."""
    row = recommend.processor.read({}, "retrieval")
    users = OnnxModel.load(folder, threads=1)(torch.tensor([row.input_ids])).user_vectors
    return [float(value) for value in users[0, 0]]


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
    """Return what the page has to know of processor and catalogue; the model and the evidence come later."""
    processor = recommend.processor
    return {
        "model": None,
        "evidence": None,
        "processor": {name: getattr(processor, name) for name in SETTINGS},
        "ids": processor.tokenizer.structural_ids,
        "kinds": recommend.model.config.kind_token_ids,
        "catalogue": {"width": catalogue.dimension, "weights": weights, "exclude_seen": catalogue.exclude_seen},
    }


def _model_settings(recommend: RecommendationPipeline) -> dict[str, Any]:
    config = recommend.model.config
    return {
        "hidden_size": config.hidden_size,
        "segment_summary": config.segment_summary,
        "skipped_kinds": config.skipped_kinds,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "reads_item_rows": reads_item_rows(cast(M6RecConfig, config)),
        "tasks": list(config.scored),
        "trained_tasks": config.trained_tasks,
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


__all__ = ["PAGE", "RUNTIME_FILES", "copy_runtime", "vector_bytes", "write_page"]
