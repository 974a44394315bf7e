"""A model as two ONNX files, made smaller with 8-bit weights, and answers through onnxruntime.

The files are the two stages of the network: "reader" reads segments, "joint" joins their states and has the heads
(`export`). `OnnxModel` runs them in place of the torch model of a pipeline and keeps the states of read segments.

Shapes: B rows, T tokens of a row, K kept tokens of a row, W states of segments, H = hidden_size, D = vector_width.
"""

import gzip
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .configuration_m6rec import M6RecConfig
from .export import to_onnx
from .item_features_m6rec import reads_item_rows
from .layout_m6rec import layout, pick, summary_keys
from .modeling_m6rec import M6RecForRecommendation, M6RecOutput
from .network_m6rec import M6RecPreTrainedModel

STAGES = ("reader", "joint")
"""Parts of the model that are exported, in the order in which they run."""

WEIGHTS = ("float32", "int8")
"""Number types of weights: float32, or 8-bit weights with activations quantised at run time."""

MANIFEST = "onnx.json"

MOST_OF_FLOAT32 = 0.35
"""Largest share of the float32 weights' bytes that 8-bit weights may take; more means that some were left out."""

KEPT_SEGMENTS = 50_000
"""Number of segments whose states an OnnxModel keeps."""

LEAST_COLUMNS = 32
"""Fewest columns of a matrix whose products are quantised: narrower ones, such as the score head, save nothing."""

READ_AT_ONCE = 64
"""Number of segments of similar length that are read together."""


def export_onnx(
    model: M6RecForRecommendation, folder: str | Path, weights: str = "float32", exit_layer: int | None = None
) -> dict[str, Any]:
    """Write both stages of a model as ONNX files, its configuration and a manifest.

    Args:
        model: The model, on the CPU, with segment layers.
        folder: The folder; reader.onnx, joint.onnx, config.json and onnx.json are written into it.
        weights: "float32" or "int8".
        exit_layer: Number of joint layers; None = all.

    Returns:
        The manifest: weights, exit layer, fingerprint of the model, and for each file its sizes in bytes, plain and by
        gzip, and for int8 the number of matrix products with 8-bit weights.

    Raises:
        ValueError: If the weights are unknown, or the model cannot be exported or quantised.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights={weights!r}: choose one of {list(WEIGHTS)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for part in STAGES:
        path = to_onnx(model, folder / f"{part}.onnx", part, exit_layer=exit_layer if part == "joint" else None)
        facts = quantize(path) if weights == "int8" else {}
        content = path.read_bytes()
        files[path.name] = {"bytes": len(content), "gzip": len(gzip.compress(content, 6)), **facts}
    model.config.save_pretrained(folder)
    manifest = {
        "format_version": 1,
        "weights": weights,
        "exit_layer": exit_layer,
        "fingerprint": model.fingerprint(),
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def quantize(path: str | Path) -> dict[str, Any]:
    """Replace the weights of an ONNX file by 8-bit weights, one scale per output channel, in place.

    Products of matrices multiply 8-bit numbers: activations are quantised as they come. Weights that layers share are
    folded into one table first, since the quantiser skips weights behind a transposition without a word.

    Args:
        path: The file.

    Returns:
        `products`, the number of matrix products with 8-bit weights, and `share`, the bytes of all weights relative to
        float32.

    Raises:
        ValueError: If weights were left in float32.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path = Path(path)
    before, folded = _weight_bytes(path)[0], path.with_suffix(".folded.onnx")
    quant_pre_process(path, folded, skip_symbolic_shape=True)
    # Without reduce_range, sums of products saturate at 16 bits on x86 processors without VNNI.
    kind, narrow = QuantType.QInt8, _narrow_products(folded)
    quantize_dynamic(folded, path, weight_type=kind, per_channel=True, reduce_range=True, nodes_to_exclude=narrow)
    folded.unlink()
    after, products = _weight_bytes(path)
    share = after / before
    if not products or share > MOST_OF_FLOAT32:
        raise ValueError(
            f"{path.name} was not quantised: {products} matrix products have 8-bit weights, and all weights take "
            f"{share:.0%} of their float32 size (at most {MOST_OF_FLOAT32:.0%} expected): use weights='float32'"
        )
    return {"products": products, "share": round(share, 4)}


def _narrow_products(path: Path) -> list[str]:
    """Return the names of the matrix products of an ONNX file whose weights have fewer than LEAST_COLUMNS columns."""
    import onnx

    graph = onnx.load(path).graph
    columns = {weight.name: (list(weight.dims) or [0])[-1] for weight in graph.initializer}
    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm")]
    return [
        node.name for node in products if any(columns.get(name, LEAST_COLUMNS) < LEAST_COLUMNS for name in node.input)
    ]


def _weight_bytes(path: Path) -> tuple[int, int]:
    """Return the bytes of all weights of an ONNX file, and the number of its matrix products with 8-bit weights."""
    import onnx

    graph = onnx.load(path).graph
    size = sum(onnx.numpy_helper.to_array(weight).nbytes for weight in graph.initializer)
    return size, sum(node.op_type == "MatMulInteger" for node in graph.node)


class OnnxModel(M6RecPreTrainedModel):
    """Runs an exported model by onnxruntime; a pipeline uses it like the model itself, for retrieval and scores.

    States of segments are kept between calls, up to `KEPT_SEGMENTS`. It does not write, train, leave early by
    `exit_confidence`, or compute plausibility. Item embeddings of standalone items are not part of the files: take the
    item vectors from the catalogue.

    Args:
        config: Configuration of the exported model.
        sessions: An onnxruntime session for each of STAGES.
        fingerprint: Fingerprint of the exported model.
    """

    reads_sources = False
    """Users are embedded from rows of ids."""

    def __init__(self, config: M6RecConfig, sessions: Mapping[str, Any], fingerprint: str = "") -> None:
        super().__init__(config)
        self.anchor = nn.Parameter(torch.zeros(0), requires_grad=False)  # gives device and number type
        self.sessions, self._fingerprint = dict(sessions), fingerprint
        self._states: OrderedDict[tuple[int, ...], np.ndarray] = OrderedDict()

    @classmethod
    def load(cls, folder: str | Path, threads: int | None = None) -> "OnnxModel":
        """Load what `export_onnx` wrote.

        Args:
            folder: The folder.
            threads: Threads of a session; None = onnxruntime's default.
        """
        import onnxruntime

        folder, options = Path(folder), onnxruntime.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads = threads
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        sessions = {
            part: onnxruntime.InferenceSession(str(folder / f"{part}.onnx"), options, ["CPUExecutionProvider"])
            for part in STAGES
        }
        return cls(M6RecConfig.from_pretrained(folder), sessions, manifest["fingerprint"])

    def fingerprint(self) -> str:
        """Return the fingerprint of the exported model, which catalogues are compared with."""
        return self._fingerprint

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        item_embedding_ids: torch.Tensor | None = None,
        hidden_events: torch.Tensor | None = None,
        return_plausibility: bool = False,
        exit_layer: int | None = None,
        decide: Callable[..., torch.Tensor] | None = None,
        **_: Any,
    ) -> M6RecOutput:
        """Compute user vectors and the answers of every scoring task.

        Args:
            input_ids: B x T ids of whole rows.
            attention_mask: B x T, nonzero = not padding.
            item_embedding_ids: B x T rows of item embeddings.
            hidden_events: B x T bool, tokens that no other token attends to.
            return_plausibility: Must be False.
            exit_layer: Must be None: the exported number of joint layers is fixed.
            decide: Must be None.

        Returns:
            `user_vectors`, B x 1 x D, and `scores`, a mapping from task to B x N answers, for `read_scores`.

        Raises:
            ValueError: If the files cannot compute what is requested.
        """
        if return_plausibility or exit_layer is not None or decide is not None:
            raise ValueError(
                "an exported model computes retrieval and scores after a fixed number of joint layers: leave out "
                "plausibility and exit_confidence, and give exit_layer to the export"
            )
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        lay = layout(input_ids, mask, self.config)
        keys = summary_keys(lay, input_ids == self.config.segment_token_id, self.config)
        kept = pick(torch.where(keys, 0, -1), 1)
        states = self._segment_states(input_ids.numpy(), lay.segment.numpy(), kept.columns.numpy())
        hidden = torch.zeros_like(keys) if hidden_events is None else hidden_events.bool()
        given = {
            "input_ids": input_ids.numpy(),
            "attention_mask": mask.long().numpy(),
            "hidden_events": hidden.numpy(),
            "kept": torch.where(kept.present, kept.columns, -1).numpy(),
            "states": states,
        }
        if reads_item_rows(self.config):
            rows = torch.zeros_like(input_ids) if item_embedding_ids is None else item_embedding_ids
            given["item_embedding_ids"] = rows.numpy()
        users, *scores = map(torch.from_numpy, self.sessions["joint"].run(None, given))
        answers: Any = dict(zip(self.config.scored, scores, strict=True))
        return M6RecOutput(user_vectors=users[:, None], scores=answers)

    def read_scores(self, scores: Mapping[str, torch.Tensor], task: str) -> torch.Tensor:
        """Return the answers of a task, B x N (x I)."""
        return scores[task]

    def embed_items(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, memory_ids: torch.Tensor | None = None, **_: Any
    ) -> torch.Tensor:
        """Embed standalone items without item embeddings: M x L ids of [ITEM] ... [SEG] -> M x D.

        Raises:
            ValueError: If an item has an embedding, which only the model itself can add.
        """
        if memory_ids is not None and memory_ids.any():
            raise ValueError(
                "candidates with item embeddings cannot be embedded by an exported model: rank the catalogue, or use "
                "a scoring task"
            )
        given = {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}
        return torch.from_numpy(self.sessions["reader"].run(["item_vectors"], given)[0])

    def _segment_states(self, ids: np.ndarray, segments: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Read segments that are not kept, and gather the states of B x K kept columns: B x K x H."""
        rows = [_cut(own, numbers) for own, numbers in zip(ids, segments)]
        missing = {key: None for row in rows for _, key in row if key not in self._states}
        for batch in _alike([*missing]):
            self._read(batch)
        found = np.zeros((*columns.shape, self.config.hidden_size), np.float32)
        for number, row in enumerate(rows):
            if row:
                start = row[0][0]
                states = np.concatenate([self._states[key] for _, key in row])
                found[number] = states[np.clip(columns[number] - start, 0, len(states) - 1)]
                for _, key in row:
                    self._states.move_to_end(key)
        while len(self._states) > KEPT_SEGMENTS:
            self._states.popitem(last=False)
        return found

    def _read(self, batch: Sequence[tuple[int, ...]]) -> None:
        width = max(map(len, batch))
        ids = np.full((len(batch), width), self.config.pad_token_id, np.int64)
        mask = np.zeros_like(ids)
        for row, key in enumerate(batch):
            ids[row, : len(key)], mask[row, : len(key)] = key, 1
        (states,) = self.sessions["reader"].run(["states"], {"input_ids": ids, "attention_mask": mask})
        for key, own in zip(batch, states):
            self._states[key] = own[: len(key)].copy()


def _cut(ids: np.ndarray, segments: np.ndarray) -> list[tuple[int, tuple[int, ...]]]:
    """Cut a row into segments: the start and the ids of each; padding belongs to none."""
    places = np.flatnonzero(segments)
    if not len(places):
        return []
    starts = places[np.flatnonzero(np.diff(segments[places], prepend=0))].tolist()
    ends = [*starts[1:], int(places[-1]) + 1]
    return [(start, tuple(ids[start:end].tolist())) for start, end in zip(starts, ends)]


def _alike(keys: list[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Group segments of similar length."""
    keys.sort(key=len)
    for start in range(0, len(keys), READ_AT_ONCE):
        yield keys[start : start + READ_AT_ONCE]


__all__ = ["MANIFEST", "STAGES", "WEIGHTS", "OnnxModel", "export_onnx", "quantize"]
