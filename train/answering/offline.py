"""A file of requests answered into a file of answers: in bounded memory, resumed after a kill, each exactly once.

Requests are answered in chunks. A finished chunk is a file of its own in the hidden folder `.NAME.parts` beside the
output; it appears whole or not at all, and its name holds a digest of the model, the options and the very requests that
it answers. So a run that starts again takes over exactly the chunks that it would have written itself. Once all are
there, they are put together in the order of the input, take the place of the output in one step, and leave.
"""

import hashlib
import io
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
from tqdm.auto import tqdm

from ...atomic_m6rec import atomic_file, recover, write_atomic
from ...pipeline_m6rec import RecommendationPipeline
from ...segment_cache_m6rec import digest_weight, digest_weights
from ...values_m6rec import normalize_id
from ...version import __version__
from ..evaluation.tables import why_unwritable
from .loading import Failed, RequestReader

logger = logging.getLogger(__name__)
JOB_FILE = "job.json"
FORMAT = 3
"""Of the parts; rises when answers are written otherwise."""
ADVICE = ". Go on with the same as then, choose another --output, or throw that work away with --restart"
REASON = {"event": pyarrow.string(), "item_id": pyarrow.string()}
REASON |= {name: pyarrow.float64() for name in ("contribution", "learnt", "words", "transitions")}
ITEM = {
    "rank": pyarrow.int32(),
    "item": pyarrow.string(),
    "item_id": pyarrow.string(),
    "score": pyarrow.float64(),
    "interactions": pyarrow.map_(pyarrow.string(), pyarrow.float64()),
    "parts": pyarrow.map_(pyarrow.string(), pyarrow.float64()),
    "because": pyarrow.list_(pyarrow.struct(REASON)),
    "exit_layer": pyarrow.int32(),
}
SCHEMA = pyarrow.schema(
    {
        "row": pyarrow.int64(),
        "request_id": pyarrow.string(),
        "answer": pyarrow.list_(pyarrow.struct(ITEM)),
        "error": pyarrow.string(),
    }
)
"""Columns of a .parquet of answers: the request's place in the input, counted from 0; its `request_id`, if it has one;
its items, null where the request cannot be answered; why it cannot. What an item does not have is null."""


@dataclass(frozen=True)
class Job:
    """What is answered into what, and how."""

    source: Path
    output: Path
    """`.parquet`: a table by SCHEMA. `.jsonl`: an object a line with the same fields, without those that are null."""
    model: str
    """The `fingerprint` of what answers."""
    options: dict[str, Any] = field(default_factory=dict)
    """Parameters of the pipeline's call."""
    batch_size: int = 16
    chunk_size: int = 1024
    """Requests that are saved together. States of texts are kept within a chunk, so that its answers do not depend on
    which chunks were answered before."""
    skip_errors: bool = False
    """A request that cannot be answered leaves its error in the output; else it ends the run."""
    texts: bool = True
    """Repeat the text of each item in the answers; else only of those without an id."""

    def __post_init__(self) -> None:
        if self.output.suffix not in (".jsonl", ".parquet"):
            raise ValueError(f"{self.output} is neither .jsonl nor .parquet: name the answers by what they shall be")
        if self.output == self.source or (self.output.exists() and self.output.samefile(self.source)):
            raise ValueError(f"{self.source} is the input and the output: the answers would replace the requests")
        for name in ("batch_size", "chunk_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give a whole number from 1 up")

    @property
    def decisive(self) -> dict[str, Any]:
        """All that decides what the answers to given requests are, by name."""
        own = {"batch_size": self.batch_size, "chunk_size": self.chunk_size, "texts": self.texts, "format": FORMAT}
        return {"model": self.model, **self.options, **own}

    def reader(self) -> RequestReader:
        """Open the requests."""
        return RequestReader(self.source, strict=not self.skip_errors)

    def digest(self, requests: Sequence[Any]) -> str:
        """Name what the answers to requests depend on."""
        told = json.dumps([self.decisive, requests], default=str)
        return hashlib.sha256(told.encode()).hexdigest()[:32]


class Chunk(NamedTuple):
    """Requests that are answered and saved together."""

    number: int
    row: int
    """Of the first request, counted from 0."""
    size: int
    digest: str


class Answered(NamedTuple):
    """What came of a chunk."""

    number: int
    data: bytes
    """The chunk's part of the output, in the output's format."""
    errors: int
    failure: str | None = None
    """Why the run ends here."""


class Report(NamedTuple):
    """What came of a run: requests, those of them that an earlier run had finished, those that have an error."""

    requests: int
    kept: int
    errors: int


Run = Callable[[Job, list[Chunk]], Iterator[Answered]]
"""Answers chunks, in any order."""


def answer_file(job: Job, run: Run, restart: bool = False) -> Report:
    """Answer a file of requests, going on where an interrupted run of the same job stopped.

    Args:
        job: What is answered.
        run: Answers the chunks that are not there yet: `answer_here` with its pipeline, or `answer_with_ray`.
        restart: Throw away what an interrupted run has left.

    Raises:
        ValueError: A request cannot be answered and `skip_errors` was not said (the message names its row), or the
            folder of parts is another job's.
        OSError: Parts or output cannot be written. Finished chunks stay in all cases.
    """
    chunks = list(_chunks(job))
    parts = Parts(job)
    with _told_where(parts.folder):
        parts.claim(chunks, restart)
    missing = [chunk for chunk in chunks if not parts.has(chunk)]
    count = sum(chunk.size for chunk in chunks)
    kept = count - sum(chunk.size for chunk in missing)
    sizes = {chunk.number: chunk for chunk in missing}
    with tqdm(total=count, initial=kept, desc="Answering", unit="request", delay=1, disable=None) as bar:
        for answered in run(job, missing) if missing else ():
            if answered.failure is not None:
                raise ValueError(f"{answered.failure}{parts.kept()}")
            with _told_where(parts.folder):
                parts.put(sizes[answered.number], answered)
            bar.update(sizes[answered.number].size)
    with _told_where(parts.folder):
        errors = parts.assemble(chunks)
    return Report(count, kept, errors)


def answer_here(recommend: RecommendationPipeline, job: Job, chunks: list[Chunk]) -> Iterator[Answered]:
    """Answer chunks in this process, one after the other."""
    reader = job.reader()
    for chunk in chunks:
        yield answer_chunk(recommend, reader, job, chunk)


def answer_chunk(recommend: RecommendationPipeline, reader: RequestReader, job: Job, chunk: Chunk) -> Answered:
    """Answer a chunk. The result depends on job and chunk alone, to the bit on machines and threads that are alike."""
    requests = reader.read(chunk.row, chunk.size)
    if job.digest(requests) != chunk.digest:
        return Answered(chunk.number, b"", 0, f"{job.source} was changed while it was read: run it again")
    recommend.segment_cache.clear()
    names, asked = zip(*map(_named, requests))
    rows: list[dict[str, Any]] = []
    for start in range(0, len(asked), job.batch_size):
        answers = _answers(recommend, asked[start : start + job.batch_size], job.options)
        for place, answer in enumerate(answers, start):
            told = _row(answer, job.texts)
            if (message := told.get("error")) is not None and requests[place] is not answer:
                told["error"] = f"{reader.places[place]}: {message}"
            rows.append({"row": chunk.row + place, "request_id": names[place], **told})
            if "error" in told and not job.skip_errors:
                return Answered(chunk.number, b"", 1, told["error"])
    errors = sum("error" in told for told in rows)
    encode = _table if job.output.suffix == ".parquet" else _lines
    return Answered(chunk.number, encode(rows), errors)


def _chunks(job: Job) -> Iterator[Chunk]:
    """Cut the requests into chunks; reads all of them once, a chunk at a time."""
    reader, row, number = job.reader(), 0, 0
    while requests := reader.read(row, job.chunk_size):
        yield Chunk(number, row, len(requests), job.digest(requests))
        row, number = row + len(requests), number + 1


def _named(request: Any) -> tuple[str | None, Any]:
    """Part a request from its `request_id`, which no model reads."""
    if not isinstance(request, dict) or "request_id" not in request:
        return None, request
    asked = {name: value for name, value in request.items() if name != "request_id"}
    try:
        return normalize_id(request["request_id"], "request_id"), asked
    except ValueError as error:
        return None, Failed(str(error))


def _answers(recommend: RecommendationPipeline, requests: Sequence[Any], options: dict[str, Any]) -> list[Any]:
    """Answer requests together; if one of them fails, one by one."""
    alone = len(requests) == 1
    if alone and isinstance(requests[0], Failed):
        return [requests[0]]
    if not any(isinstance(request, Failed) for request in requests):
        try:
            return recommend(list(requests), batch_size=len(requests), **options)
        except OSError:  # of the disk or the network, not of a request
            raise
        except Exception as error:  # noqa: BLE001  whatever the model's code raises concerns this request alone
            if alone:
                return [_failed(error)]
    return [answer for request in requests for answer in _answers(recommend, [request], options)]


def _failed(error: Exception) -> Failed:
    """Word the error of a request; one that no check has raised with the name of its type."""
    logger.debug("a request cannot be answered", exc_info=error)
    return Failed(str(error) if type(error) in (TypeError, ValueError) else f"{type(error).__name__}: {error}")


def _row(answer: Any, texts: bool) -> dict[str, Any]:
    """Write an answer as JSON can hold it, or the error in its place."""
    if isinstance(answer, Failed):
        return {"error": answer.message}
    items = [entry if texts or entry.get("item_id") is None else _without_text(entry) for entry in answer]
    try:
        json.dumps(items)
    except (TypeError, ValueError) as error:  # an id that is no number and no text
        return {"error": str(error)}
    return {"answer": items}


def _without_text(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name != "item"}


def _lines(rows: Sequence[dict[str, Any]]) -> bytes:
    told = ({name: value for name, value in row.items() if value is not None} for row in rows)
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in told).encode(errors="backslashreplace")


def _table(rows: Sequence[dict[str, Any]]) -> bytes:
    cells = [{"answer": None, "error": None, **row} for row in rows]
    for row in cells:
        row["answer"] = None if row["answer"] is None else list(map(_cell, row["answer"]))
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(_encodable(cells), SCHEMA), buffer)
    return buffer.getvalue()


def _encodable(value: Any) -> Any:
    """Escape, at any depth, halves of characters, which JSON can name and UTF-8 cannot hold."""
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {name: _encodable(inner) for name, inner in value.items()}
    return type(value)(map(_encodable, value)) if isinstance(value, list | tuple) else value


def _cell(item: dict[str, Any]) -> dict[str, Any]:
    """Write an item as SCHEMA has it: ids as texts, interactions and parts as pairs."""
    told = _with_text_id(item)
    told |= {name: list(item[name].items()) for name in ("interactions", "parts") if name in item}
    if "because" in item:
        told["because"] = list(map(_with_text_id, item["because"]))
    return told


def _with_text_id(entry: dict[str, Any]) -> dict[str, Any]:
    known = entry.get("item_id") is not None
    return {**entry, "item_id": normalize_id(entry["item_id"], "item_id")} if known else dict(entry)


def fingerprint(recommend: RecommendationPipeline) -> str:
    """Return a digest of all that answers: weights, settings, adapters, processor, catalogue and this version."""
    model, catalogue = recommend.model, recommend.catalogue
    settings = {name: value for name, value in model.config.to_dict().items() if not name.startswith(("_", "transf"))}
    adapters = {name: adapter.to_dict() for name, adapter in getattr(model, "peft_config", {}).items()}
    digest = hashlib.sha256(json.dumps([__version__, settings, adapters], default=_plain).encode())
    digest_weights(digest, [model])
    with tempfile.TemporaryDirectory() as folder:
        recommend.processor.save_pretrained(folder)
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    if catalogue is not None:
        for name in catalogue:
            digest.update(json.dumps([name, catalogue.item(name)], default=str).encode())
        digest_weight(digest, "vectors", catalogue.vectors(list(catalogue)))
        digest.update(catalogue.evidence_digest().encode())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)  # a set has no order to rely on


class Parts:
    """The finished chunks of a job, in the folder `.NAME.parts` beside its output.

    Args:
        job: The job.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self.folder = job.output.with_name(f".{job.output.name}.parts")
        self._done = self.folder.with_name(f"{self.folder.name}.done")
        self._errors: dict[str, int] = {}
        """By chunk, of those that are finished."""

    def claim(self, chunks: Sequence[Chunk], restart: bool) -> None:
        """Make the folder this job's and see what is finished.

        Raises:
            ValueError: It is another job's, and `restart` was not said.
        """
        shutil.rmtree(self._done, ignore_errors=True)
        recover(self.folder)
        for path in self.folder.glob("*-*-*.part"):
            name, _, errors = path.stem.rpartition("-")
            self._errors[name] = int(errors)
        if restart or not self._errors:
            self._errors.clear()
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        self._refuse_other_options()
        if not any(_name(chunk) in self._errors for chunk in chunks):
            raise ValueError(
                f"{self.folder} holds the finished work of an interrupted run on other requests than those of "
                f"{self._job.source}{ADVICE}"
            )

    def has(self, chunk: Chunk) -> bool:
        """Say whether a chunk is finished, and without errors if the job takes none."""
        errors = self._errors.get(_name(chunk))
        return errors is not None and (errors == 0 or self._job.skip_errors)

    def put(self, chunk: Chunk, answered: Answered) -> None:
        """Keep a finished chunk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._errors:
            write_atomic(self.folder / JOB_FILE, json.dumps(self._job.decisive, indent=2))
        write_atomic(self._path(_name(chunk), answered.errors), answered.data)
        self._errors[_name(chunk)] = answered.errors

    def assemble(self, chunks: Sequence[Chunk]) -> int:
        """Put all chunks together, in their order, in the place of the output, and remove the folder.

        Returns:
            How many requests have an error.
        """
        errors = [self._errors[_name(chunk)] for chunk in chunks]
        paths = [self._path(_name(chunk), wrong) for chunk, wrong in zip(chunks, errors)]
        self.folder.mkdir(parents=True, exist_ok=True)
        join = _join_tables if self._job.output.suffix == ".parquet" else _join_lines
        with atomic_file(self._job.output) as whole:
            join(paths, whole)
        self.folder.rename(self._done)  # a kill that leaves some of the parts leaves none that is asked for
        shutil.rmtree(self._done)
        return sum(errors)

    def kept(self) -> str:
        """Say where finished work is kept, if there is any."""
        return f"; {len(self._errors)} finished chunks are kept in {self.folder}" if self._errors else ""

    def _refuse_other_options(self) -> None:
        path = self.folder / JOB_FILE
        then = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        now = json.loads(json.dumps(self._job.decisive))
        if then is None or then == now:
            return
        other = [name for name in {**then, **now} if then.get(name) != now.get(name)]
        told = ", ".join(f"{name} was {then.get(name)!r}, is {now.get(name)!r}" for name in other)
        raise ValueError(f"{self.folder} holds the finished work of an interrupted run: {told}{ADVICE}")

    def _path(self, name: str, errors: int) -> Path:
        return self.folder / f"{name}-{errors}.part"


def _name(chunk: Chunk) -> str:
    return f"{chunk.number:08d}-{chunk.digest}"


def _join_lines(paths: Sequence[Path], whole: Path) -> None:
    with whole.open("wb") as file:
        for path in paths:
            with path.open("rb") as part:
                shutil.copyfileobj(part, file)


def _join_tables(paths: Sequence[Path], whole: Path) -> None:
    with pyarrow.parquet.ParquetWriter(whole, SCHEMA) as writer:
        for path in paths:
            with pyarrow.parquet.ParquetFile(path) as part:
                writer.write_table(part.read())


@contextmanager
def _told_where(folder: Path) -> Iterator[None]:
    """Say of what cannot be written why, and what becomes of the finished work."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"answers cannot be written: {error}. {why_unwritable(error, folder.parent)} Finished chunks are kept in "
            f"{folder}; then the same command goes on from them"
        ) from error


__all__ = [
    "SCHEMA",
    "Answered",
    "Chunk",
    "Job",
    "Report",
    "Run",
    "answer_chunk",
    "answer_file",
    "answer_here",
    "fingerprint",
]
