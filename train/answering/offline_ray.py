"""Answers chunks of requests by workers of Ray Data, on one or several machines. Needs the extra `ray`."""

import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow

from .loading import load_recommender
from .offline import Answered, Chunk, Job, answer_chunk, fingerprint

OBJECT_STORE_BYTES = 128 << 20
"""Object store size of a cluster that is started here; Ray's default is a third of the memory."""


class ChunkWorker:
    """A worker: loads the model once, then answers chunks of the input, which it reads itself.

    Args:
        model: The folder or the Hub id of the model.
        job: Input, output and options.
    """

    def __init__(self, model: str, job: Job) -> None:
        self._recommend, self._reader, self._job = load_recommender(model), job.reader(), job
        self._other = fingerprint(self._recommend) != job.model
        self._model = model

    def __call__(self, batch: pyarrow.Table) -> pyarrow.Table:
        """Answer the chunks that the rows of a table name."""
        return pyarrow.Table.from_pylist([self._answer(Chunk(**row))._asdict() for row in batch.to_pylist()], ANSWERED)

    def _answer(self, chunk: Chunk) -> Answered:
        if self._other:
            message = f"a worker finds another model in {self._model!r} than the run began with: copy it there again"
            return Answered(chunk.number, b"", 0, message)
        return answer_chunk(self._recommend, self._reader, self._job, chunk)


ANSWERED = pyarrow.schema(
    {
        "number": pyarrow.int64(),
        "data": pyarrow.large_binary(),
        "errors": pyarrow.int64(),
        "failure": pyarrow.string(),
    }
)


def answer_with_ray(model: str, workers: int, job: Job, chunks: list[Chunk]) -> Iterator[Answered]:
    """Answer chunks by workers that each load the model; tasks of a dead worker are retried by another.

    Joins the cluster of this process or of `RAY_ADDRESS`, where all machines must have the input under the same path;
    else starts a local cluster, and stops it at the end.

    Args:
        model: The folder or the Hub id of the model, valid for the workers.
        workers: Number of workers; at most the number of CPUs of the cluster.
        job: Input, output and options.
        chunks: The chunks to answer.

    Raises:
        ImportError: Ray is not installed.
    """
    model = str(Path(model).absolute()) if Path(model).is_dir() else model
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # disable Ray's usage reports
    try:
        ray, data = importlib.import_module("ray"), importlib.import_module("ray.data")
    except ImportError as error:
        raise ImportError(f"--ray needs Ray Data ({error}): pip install 'm6rec[ray]'") from error
    joined = ray.is_initialized()
    if not joined:
        _start(ray, workers)
    try:
        data.DataContext.get_current().enable_progress_bars = False
        size = max(1, min(workers, len(chunks), int(ray.cluster_resources().get("CPU", 1))))
        # One block per chunk: a dead worker loses one chunk, and each chunk arrives when it is finished.
        rows = data.from_items([chunk._asdict() for chunk in chunks], override_num_blocks=len(chunks))
        answered = rows.map_batches(
            ChunkWorker,
            fn_constructor_args=(model, job),
            batch_size=1,
            batch_format="pyarrow",
            compute=data.ActorPoolStrategy(size=size),
            num_cpus=1,
        )
        for row in answered.iter_rows():
            yield Answered(**row)
    finally:
        if not joined:
            ray.shutdown()


def _start(ray: Any, workers: int) -> None:
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False)
        return
    ray.init(
        address="local",
        num_cpus=workers,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )


__all__ = ["ChunkWorker", "answer_with_ray"]
