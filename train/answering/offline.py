"""Answers a file of requests in bounded memory; a killed run can be resumed, and each request is answered exactly once.

Requests are answered in chunks. Each finished chunk is a separate file in the hidden folder `.NAME.parts` next to the
output. It is written atomically, and its name contains a digest of the model, the options and its requests. So a
restarted run reuses exactly the chunks that it would have written itself. When all chunks exist, they are concatenated
in the order of the input, replace the output atomically, and are removed.
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
from ...values_m6rec import normalize_id, short
from ...version import __version__
from ..evaluation.tables import why_unwritable
from .loading import Failed, RequestReader

logger = logging.getLogger(__name__)
JOB_FILE = "job.json"
FORMAT = 5
"""Version of the parts' format; increased when the format of answers changes."""
ADVICE = ". Go on with the same as then, choose another --output, or throw that work away with --restart"
REASON = {"event": pyarrow.string(), "item_id": pyarrow.string()}
REASON |= {name: pyarrow.float64() for name in ("contribution", "learnt", "words", "transitions")}
MENTION = {"item_id": pyarrow.string(), "start": pyarrow.int32(), "end": pyarrow.int32(), "score": pyarrow.float64()}
CHECK = {"names": pyarrow.list_(pyarrow.int32()), "agrees": pyarrow.bool_()}
CHECK |= {"unsupported": pyarrow.list_(pyarrow.string())}
ITEM = {
    "rank": pyarrow.int32(),
    "item": pyarrow.string(),
    "item_id": pyarrow.string(),
    "score": pyarrow.float64(),
    "penalty": pyarrow.float64(),
    "boost": pyarrow.float64(),
    "pinned": pyarrow.bool_(),
    "interactions": pyarrow.map_(pyarrow.string(), pyarrow.float64()),
    "parts": pyarrow.map_(pyarrow.string(), pyarrow.float64()),
    "because": pyarrow.list_(pyarrow.struct(REASON)),
    "exit_layer": pyarrow.int32(),
    "text": pyarrow.string(),
    "logprob": pyarrow.float64(),
    "fields": pyarrow.map_(pyarrow.string(), pyarrow.string()),
    "role": pyarrow.string(),
    "content": pyarrow.string(),
    "items": pyarrow.list_(pyarrow.struct(MENTION)),
    "finish": pyarrow.string(),
    "reason": pyarrow.string(),
    "checked": pyarrow.struct(CHECK),
}
SCHEMA = pyarrow.schema(
    {
        "row": pyarrow.int64(),
        "request_id": pyarrow.string(),
        "answer": pyarrow.list_(pyarrow.struct(ITEM)),
        "error": pyarrow.string(),
    }
)
"""Columns of a .parquet of answers: the request's index in the input, from 0; its `request_id`, if it has one; its
items, null if the request cannot be answered; the error in that case. Missing fields of an item are null."""


@dataclass(frozen=True)
class Job:
    """Input, output and options of a run."""

    source: Path
    output: Path
    """`.parquet`: a table by SCHEMA. `.jsonl`: one object per line with the same fields, without null fields."""
    model: str
    """The `fingerprint` of the pipeline."""
    options: dict[str, Any] = field(default_factory=dict)
    """Parameters of the pipeline's call."""
    batch_size: int = 16
    chunk_size: int = 1024
    """Number of requests that are saved together. Segment states are cached only within a chunk, so that its answers do
    not depend on earlier chunks."""
    skip_errors: bool = False
    """Write the error of a request that cannot be answered to the output; else it ends the run."""
    texts: bool = True
    """Include the text of each item in the answers; else only of items without an id."""

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
        """All settings that affect the answers to given requests, by name."""
        own = {"batch_size": self.batch_size, "chunk_size": self.chunk_size, "texts": self.texts, "format": FORMAT}
        options = json.loads(json.dumps(self.options, default=repr))
        return {"model": self.model, **options, **own}

    def reader(self) -> RequestReader:
        """Open the requests."""
        return RequestReader(self.source, strict=not self.skip_errors)

    def digest(self, requests: Sequence[Any]) -> str:
        """Return a digest of everything that the answers to requests depend on."""
        content = json.dumps([self.decisive, requests], default=str)
        return hashlib.sha256(content.encode()).hexdigest()[:32]


class Chunk(NamedTuple):
    """A range of requests that are answered and saved together."""

    number: int
    row: int
    """Index of the first request, from 0."""
    size: int
    digest: str


class Answered(NamedTuple):
    """The result of a chunk."""

    number: int
    data: bytes
    """The chunk's part of the output, in the output's format."""
    errors: int
    failure: str | None = None
    """The reason why the run must end after this chunk."""


class Report(NamedTuple):
    """Counts of a run: all requests, those finished by an earlier run, those with an error."""

    requests: int
    kept: int
    errors: int


Run = Callable[[Job, list[Chunk]], Iterator[Answered]]
"""Answers chunks, in any order."""


def answer_file(job: Job, run: Run, restart: bool = False) -> Report:
    """Answer a file of requests; an interrupted run of the same job is resumed.

    Args:
        job: Input, output and options.
        run: Answers the missing chunks: `answer_here` with its pipeline, or `answer_with_ray`.
        restart: Discard the chunks of an interrupted run.

    Raises:
        ValueError: A request cannot be answered and `skip_errors` is false (the message names its row), or the folder
            of parts belongs to another job.
        OSError: Parts or output cannot be written. Finished chunks are kept in all cases.
    """
    chunks = list(_chunks(job))
    parts = Parts(job)
    with naming_folder(parts.folder):
        parts.claim(chunks, restart)
    missing = [chunk for chunk in chunks if not parts.has(chunk)]
    count = sum(chunk.size for chunk in chunks)
    kept = count - sum(chunk.size for chunk in missing)
    sizes = {chunk.number: chunk for chunk in missing}
    with tqdm(total=count, initial=kept, desc="Answering", unit="request", delay=1, disable=None) as bar:
        for answered in run(job, missing) if missing else ():
            if answered.failure is not None:
                raise ValueError(f"{answered.failure}{parts.kept()}")
            with naming_folder(parts.folder):
                parts.put(sizes[answered.number], answered)
            bar.update(sizes[answered.number].size)
    with naming_folder(parts.folder):
        errors = parts.assemble(chunks)
    return Report(count, kept, errors)


def answer_here(recommend: RecommendationPipeline, job: Job, chunks: list[Chunk]) -> Iterator[Answered]:
    """Answer chunks in this process, one after the other."""
    reader = job.reader()
    for chunk in chunks:
        yield answer_chunk(recommend, reader, job, chunk)


def answer_chunk(recommend: RecommendationPipeline, reader: RequestReader, job: Job, chunk: Chunk) -> Answered:
    """Answer a chunk. The result depends only on job and chunk, bitwise on equal machines with equal threads."""
    requests = reader.read(chunk.row, chunk.size)
    if job.digest(requests) != chunk.digest:
        return Answered(chunk.number, b"", 0, f"{job.source} was changed while it was read: run it again")
    recommend.segment_cache.clear()
    names, inputs = zip(*map(_named, requests))
    rows: list[dict[str, Any]] = []
    for start in range(0, len(inputs), job.batch_size):
        answers = _answers(recommend, inputs[start : start + job.batch_size], job.options)
        for place, answer in enumerate(answers, start):
            row = _row(answer, job.texts)
            if (message := row.get("error")) is not None and requests[place] is not answer:
                row["error"] = f"{reader.places[place]}: {message}"
            rows.append({"row": chunk.row + place, "request_id": names[place], **row})
            if "error" in row and not job.skip_errors:
                return Answered(chunk.number, b"", 1, row["error"])
    errors = sum("error" in row for row in rows)
    encode = _table if job.output.suffix == ".parquet" else _lines
    return Answered(chunk.number, encode(rows), errors)


def _chunks(job: Job) -> Iterator[Chunk]:
    """Divide the requests into chunks; reads all requests once, one chunk at a time."""
    reader, row, number = job.reader(), 0, 0
    while requests := reader.read(row, job.chunk_size):
        yield Chunk(number, row, len(requests), job.digest(requests))
        row, number = row + len(requests), number + 1


def _named(request: Any) -> tuple[str | None, Any]:
    """Separate a request from its `request_id`, which is not a model input."""
    if not isinstance(request, dict) or "request_id" not in request:
        return None, request
    inputs = {name: value for name, value in request.items() if name != "request_id"}
    try:
        return normalize_id(request["request_id"], "request_id"), inputs
    except ValueError as error:
        return None, Failed(str(error))


def _answers(recommend: RecommendationPipeline, requests: Sequence[Any], options: dict[str, Any]) -> list[Any]:
    """Answer requests together; a request without an answer gets its error."""
    known = [request for request in requests if not isinstance(request, Failed)]
    answers = iter(recommend(known, batch_size=len(known), on_error="return", **options) if known else ())
    return [request if isinstance(request, Failed) else _answer(next(answers)) for request in requests]


def _answer(answer: Any) -> Any:
    return Failed(answer["error"]) if isinstance(answer, dict) else answer


def _row(answer: Any, texts: bool) -> dict[str, Any]:
    """Convert an answer to JSON values, or to its error."""
    if isinstance(answer, Failed):
        return {"error": answer.message}
    items = [entry if texts or entry.get("item_id") is None else _without_text(entry) for entry in answer]
    try:
        json.dumps(items)
    except (TypeError, ValueError) as error:  # an id that is neither a number nor a text
        return {"error": str(error)}
    return {"answer": items}


def _without_text(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name != "item"}


def _lines(rows: Sequence[dict[str, Any]]) -> bytes:
    filled = ({name: value for name, value in row.items() if value is not None} for row in rows)
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in filled).encode(errors="backslashreplace")


def _table(rows: Sequence[dict[str, Any]]) -> bytes:
    cells = [{"answer": None, "error": None, **row} for row in rows]
    for row in cells:
        row["answer"] = None if row["answer"] is None else list(map(_cell, row["answer"]))
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(_encodable(cells), SCHEMA), buffer)
    return buffer.getvalue()


def _encodable(value: Any) -> Any:
    """Escape, at any depth, lone surrogates, which JSON can express and UTF-8 cannot encode."""
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {name: _encodable(inner) for name, inner in value.items()}
    return type(value)(map(_encodable, value)) if isinstance(value, list | tuple) else value


def _cell(item: dict[str, Any]) -> dict[str, Any]:
    """Convert an item to SCHEMA: ids as texts, interactions and parts as pairs."""
    cell = _with_text_id(item)
    cell |= {name: list(item[name].items()) for name in ("interactions", "parts", "fields") if name in item}
    if "because" in item:
        cell["because"] = list(map(_with_text_id, item["because"]))
    return cell


def _with_text_id(entry: dict[str, Any]) -> dict[str, Any]:
    known = entry.get("item_id") is not None
    return {**entry, "item_id": normalize_id(entry["item_id"], "item_id")} if known else dict(entry)


def fingerprint(recommend: RecommendationPipeline) -> str:
    """Return a digest of a pipeline: weights, settings, adapters, processor, catalogue and this version."""
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
        digest.update(catalogue.evidence_digest().encode() + (b"" if catalogue.exclude_seen else b"seen"))
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)  # the order of a set is undefined


class Parts:
    """The finished chunks of a job, in the folder `.NAME.parts` next to its output.

    Args:
        job: The job.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self.folder = job.output.with_name(f".{job.output.name}.parts")
        self._done = self.folder.with_name(f"{self.folder.name}.done")
        self._errors: dict[str, int] = {}
        """Number of errors of each finished chunk, by name."""

    def claim(self, chunks: Sequence[Chunk], restart: bool) -> None:
        """Reserve the folder for this job and list the finished chunks.

        Raises:
            ValueError: It belongs to another job, and `restart` is false.
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
        """Return whether a chunk is finished, and without errors unless the job skips errors."""
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
        """Concatenate all chunks in order, replace the output with the result, and remove the folder.

        Returns:
            Number of requests with an error.
        """
        errors = [self._errors[_name(chunk)] for chunk in chunks]
        paths = [self._path(_name(chunk), wrong) for chunk, wrong in zip(chunks, errors)]
        self.folder.mkdir(parents=True, exist_ok=True)
        join = _join_tables if self._job.output.suffix == ".parquet" else _join_lines
        with atomic_file(self._job.output) as whole:
            join(paths, whole)
        self.folder.rename(self._done)  # parts left by a kill are then not mistaken for finished work
        shutil.rmtree(self._done)
        return sum(errors)

    def kept(self) -> str:
        """Return a message with the folder of finished chunks, if there are any."""
        return f"; {len(self._errors)} finished chunks are kept in {self.folder}" if self._errors else ""

    def _refuse_other_options(self) -> None:
        path = self.folder / JOB_FILE
        then = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        now = json.loads(json.dumps(self._job.decisive))
        if then is None or then == now:
            return
        other = [name for name in {**then, **now} if then.get(name) != now.get(name)]
        differences = ", ".join(f"{name} was {short(then.get(name))}, is {short(now.get(name))}" for name in other)
        raise ValueError(f"{self.folder} holds the finished work of an interrupted run: {differences}{ADVICE}")

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
def naming_folder(folder: Path) -> Iterator[None]:
    """Add to errors of writing the reason, and the location of finished chunks."""
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
