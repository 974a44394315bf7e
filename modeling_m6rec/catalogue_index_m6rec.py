"""FAISS indexes over a catalogue's base vectors.

Shapes: B users, N vectors, K found for each user, D = vector_width.
"""

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

SETTINGS = {"flat": (), "hnsw": ("M", "efConstruction", "efSearch"), "ivf": ("nlist", "nprobe", "seed")}
"""Kinds of index, and the settings of each."""
LARGEST = 1 << 16
"""More of any setting would only exhaust memory or time."""
POINTS_A_LIST = 39
"""FAISS's own floor: centroids of fewer vectors are no centroids of anything."""
TRAINING_POINTS_A_LIST = 64


class Found(NamedTuple):
    """What a search found for one user."""

    scores: torch.Tensor
    """K, falling."""
    rows: torch.Tensor
    """K, of the vectors."""
    floor: float
    """Vectors that were not found may score this much, and by a search that is exact no more."""


def nearest(users: torch.Tensor, vectors: torch.Tensor, count: int) -> list[Found]:
    """Find the nearest of N x D vectors by comparing with all."""
    scores = users @ vectors.T
    return _founds(*scores.topk(min(count, len(vectors))), len(vectors))


def _founds(scores: torch.Tensor, rows: torch.Tensor, total: int) -> list[Found]:
    """Take B x K scores and rows apart, where -1 stands for rows that FAISS did not find."""
    founds = []
    for own, reached in zip(scores, rows):
        own, reached = own[reached >= 0], reached[reached >= 0]
        lowest = own[-1].item() if len(own) else torch.inf
        founds.append(Found(own, reached, -torch.inf if len(own) == total else lowest))
    return founds


def check_settings(kind: Any, settings: Mapping[str, Any]) -> None:
    """Make sure that there is such an index.

    Raises:
        ValueError: There is none, or it has no such setting.
    """
    if not isinstance(kind, str) or kind not in SETTINGS:
        raise ValueError(f"there is no index {kind!r}: choose one of {list(SETTINGS)}, or None for exact search")
    if not isinstance(settings, Mapping):
        raise ValueError(f"settings of the index {kind!r}: expected names and numbers, got {settings!r}")
    for name, value in settings.items():
        if name not in SETTINGS[kind]:
            takes = f"it takes {', '.join(SETTINGS[kind])}" if SETTINGS[kind] else "it takes none"
            raise ValueError(f"the index {kind!r} has no setting {name!r}: {takes}")
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST:
            raise ValueError(f"{name}={value!r}: give a whole number from 1 to {LARGEST}")
    if settings.get("M") == 1:
        raise ValueError("M=1 makes a graph that leads nowhere: give 2 or more")


class VectorIndex:
    """An index by inner product over vectors that do not change; it is built in memory, and never read from a file.

    - "flat" compares with every vector, as exact search does.
    - "hnsw" walks a graph. `M`: neighbours of a vector (32); `efConstruction`: how widely a new vector's neighbours are
      looked for (80); `efSearch`: how widely a search looks (64; 128 from 100,000 vectors on).
    - "ivf" compares with the vectors of some lists, each around a centroid. `nlist`: lists (four times the root of N;
      never more than one for 39 vectors); `nprobe`: lists that a search looks at (a 32nd of them, and 8 at least);
      `seed` of the centroids (1234).

    The same vectors make the same flat or ivf index again; a graph is the same only if one thread builds it, since
    several add vectors in a varying order.

    Imported after torch, FAISS uses torch's OpenMP runtime; imported before it, one of its own. Either way it is given
    as many threads as torch has: `torch.set_num_threads` governs both, and the workers of a data loader, which have
    one, can search. Other processes that are forked after a search must not search with several threads: OpenMP's are
    gone there, and it waits for them for ever, as under torch itself.

    Where more vectors are equal than have links to each other (2 M), a graph falls apart, and searches miss some.

    Args:
        kind: "flat", "hnsw" or "ivf".
        given: Settings, by FAISS's names.
        vectors: N x D, normalised, float32; they are copied.
    """

    def __init__(self, kind: str, given: Mapping[str, int], vectors: torch.Tensor) -> None:
        check_settings(kind, given)
        self.kind, self.given = kind, dict(given)
        self._faiss = _import_faiss()
        self.settings = self._complete(len(vectors))
        """All settings that are in force."""
        data = vectors.contiguous().numpy()
        with self._threads():
            self._index = self._make(vectors.shape[1])
            if len(data):  # nothing can be trained on nothing
                self._index.train(data)
                self._index.add(data)

    def search(self, users: torch.Tensor, count: int, breadth: int = 1) -> list[Found]:
        """Find the nearest vectors.

        Args:
            users: B x D, float32, on the CPU.
            count: K, how many for each user.
            breadth: How many times as widely as usual an approximate index looks.
        """
        if not self._index.ntotal:
            return nearest(users, users[:0], count)
        options: dict[str, Any] = {}
        if self.kind == "hnsw":
            wide = min(self.settings["efSearch"] * breadth, self._index.ntotal)
            options["params"] = self._faiss.SearchParametersHNSW(efSearch=wide)
        elif self.kind == "ivf":
            wide = min(self.settings["nprobe"] * breadth, self.settings["nlist"])
            options["params"] = self._faiss.SearchParametersIVF(nprobe=wide)
        with self._threads():
            scores, rows = self._index.search(users.contiguous().numpy(), count, **options)
        return _founds(torch.from_numpy(scores), torch.from_numpy(rows), self._index.ntotal)

    def _complete(self, count: int) -> dict[str, int]:
        """Add to the given settings those that suit N."""
        if self.kind == "hnsw":
            return {"M": 32, "efConstruction": 80, "efSearch": 64 if count < 100_000 else 128} | self.given
        if self.kind == "flat":
            return {}
        most = max(count // POINTS_A_LIST, 1)
        if self.given.get("nlist", 1) > most:
            logger.warning_once(f"nlist={self.given['nlist']} is too much for {count} vectors: {most} lists are made")
        lists = min(self.given.get("nlist", int(4 * count**0.5)), most)
        return {"nprobe": max(lists // 32, 8), "seed": 1234} | self.given | {"nlist": max(lists, 1)}

    def _make(self, dimension: int) -> Any:
        """Make an empty index."""
        faiss = self._faiss
        metric = faiss.METRIC_INNER_PRODUCT
        if self.kind == "flat":
            return faiss.IndexFlatIP(dimension)
        if self.kind == "hnsw":
            index = faiss.IndexHNSWFlat(dimension, self.settings["M"], metric)
            index.hnsw.efConstruction = self.settings["efConstruction"]
            return index
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dimension), dimension, self.settings["nlist"], metric)
        index.cp.seed = self.settings["seed"]
        index.cp.min_points_per_centroid = 1  # few lists are our doing: no warnings
        index.cp.max_points_per_centroid = TRAINING_POINTS_A_LIST
        return index

    @contextmanager
    def _threads(self) -> Iterator[None]:
        """Let FAISS use as many threads as torch does; the setting is the calling thread's."""
        before = self._faiss.omp_get_max_threads()
        self._faiss.omp_set_num_threads(torch.get_num_threads())
        try:
            yield
        finally:
            self._faiss.omp_set_num_threads(before)


def _import_faiss() -> Any:
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise ImportError(
            "an index needs FAISS: pip install faiss-cpu; without an index (None) searches are exact"
        ) from error


__all__ = ["SETTINGS", "Found", "VectorIndex", "check_settings", "nearest"]
