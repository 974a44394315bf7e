"""Atomic writes of files and folders: a reader finds the complete old content or the complete new content.

New content is written under a hidden name in the same folder, synchronised to disk, and renamed to its place. After an
error or with a full disk it is removed and the old content stays. A killed process leaves hidden names; the next write
to the same place, or `recover`, finishes or removes them. Hidden names that a live process writes to are locked, if the
system has file locks, and are not touched. Files get the mode of the umask, independently of the library that writes.

A folder cannot replace another in one renaming: for a moment, or after a kill in that moment, there is no folder at
the place. `standing` then finds the old folder.

A `Journal` is extended instead, one record at a time: each record is complete or absent.
"""

import errno
import hashlib
import importlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

PARTIAL, COMPLETE, REPLACED = ".partial-", ".complete-", ".replaced-"
"""Prefixes of hidden names: being written; complete files being moved to their places; about to be removed."""
HIDDEN = re.compile(r"(?P<kind>\.partial-|\.complete-|\.replaced-)(?:[0-9a-f]{16}-)?(?P<name>.+)")
JOURNAL = "files.json"
"""File in a folder of complete files: names to move, in order, and patterns of files that become obsolete."""
FILES = "model"
"""Part of a hidden name for several files of a folder."""
MOST_WRITERS = 100
"""Number of retries if another writer's folder takes the place between the two renamings."""
_fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None
UNLOCKED = -1


def write_atomic(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Write one file atomically, texts as UTF-8 with unchanged line ends; missing folders are created."""
    with atomic_file(path) as partial:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)


@contextmanager
def atomic_file(path: str | os.PathLike[str], durable: bool = True, partial: Path | None = None) -> Iterator[Path]:
    """Yield the path of a hidden file to write; it is moved to its place unless an error is raised.

    Args:
        path: The place.
        durable: Wait until the content is on disk, so that a power failure leaves the old file or the new one.
        partial: The hidden file, if the caller names it and removes leftovers of killed processes. A link at the place
            is then replaced itself, not its target.
    """
    if partial is not None:
        with _removed_if_failed(partial):
            yield partial
            _finish_file(partial, None, durable)
            os.replace(partial, path)
        return
    place = _resolved(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    recover(place.parent, place.name)
    partial, lock = _reserve(place, folder=False)
    try:
        mode = partial.stat().st_mode & 0o777
        with _removed_if_failed(partial):
            yield partial
            _finish_file(partial, mode, durable)
            os.replace(partial, place)
        if durable:
            _sync_names(place.parent)
    finally:
        _unlock(lock)


@contextmanager
def atomic_folder(place: str | os.PathLike[str], shared: bool = False) -> Iterator[Path]:
    """Yield a hidden folder to write into; it replaces the folder at the place unless an error is raised.

    Args:
        place: The place. A folder there is replaced completely.
        shared: Several processes write into the hidden folder, whose name is then `shared_partial(place)`.

    Raises:
        NotADirectoryError: If there is a file with that name.
    """
    place = _resolved(place)
    if place.exists() and not place.is_dir():
        raise NotADirectoryError(f"{place} is a file: name a folder, or remove the file first")
    place.parent.mkdir(parents=True, exist_ok=True)
    recover(place.parent, place.name)
    partial, lock = _reserve(place, folder=True, shared=shared)
    try:
        with _removed_if_failed(partial):
            mode = _file_mode(partial)
            yield partial
            _finish_folder(partial, mode)
            _swap(partial, place)
    finally:
        _unlock(lock)


@contextmanager
def atomic_files(
    folder: str | os.PathLike[str], obsolete: Sequence[str] = (), last: Sequence[str] = ("config.json",)
) -> Iterator[Path]:
    """Yield a hidden folder to write into; its files are then moved to `folder`, all or none.

    Other files of the folder stay. If a process is killed during the short time of moving, the next process finishes
    the move.

    Args:
        folder: Folder of the files; it is created if it does not exist.
        obsolete: Patterns of files in `folder` to remove, except new files; nothing is removed if no new file matches a
            pattern.
        last: Names that are moved after all others: if they exist, all files exist.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    recover(folder, FILES)
    place = folder / FILES
    partial, lock = _reserve(place, folder=True)
    try:
        with _removed_if_failed(partial):
            mode = _file_mode(partial)
            yield partial
            names = sorted((path.name for path in partial.iterdir()), key=lambda name: (name in last, name))
            remove = [*obsolete] if any(fnmatch(name, pattern) for name in names for pattern in obsolete) else []
            (partial / JOURNAL).write_text(json.dumps({"move": names, "remove": remove}), encoding="utf-8")
            _finish_folder(partial, mode)
        complete = _hidden(place, COMPLETE)
        os.replace(partial, complete)
        _move_files(complete, folder)
    finally:
        _unlock(lock)


def recover(folder: str | os.PathLike[str], name: str | None = None) -> None:
    """Finish or remove leftovers of killed processes in a folder.

    Args:
        folder: The folder.
        name: Name of the file or folder in it to recover; None = all.
    """
    folder = Path(folder)
    found = [(path, HIDDEN.fullmatch(path.name)) for path in folder.glob(".*-*")] if folder.is_dir() else []
    left = [(path, match["kind"], match["name"]) for path, match in found if match and name in (None, match["name"])]
    for path, kind, own in sorted(left, key=lambda entry: (entry[1], -_changed(entry[0]))):
        lock = _lock(path)
        if lock is None:
            continue  # a live process writes there
        try:
            if kind == COMPLETE:
                _move_files(path, folder)
            elif kind == REPLACED and not (folder / own).exists():
                _bring_back(path, folder / own)  # it was killed between making room and taking the place
            else:
                _remove(path)
        finally:
            _unlock(lock)


def standing(place: str | os.PathLike[str]) -> Path:
    """Return the path for reading a folder: its place or, if missing, the path to which a replacement moved it."""
    place = _resolved(place)
    if place.exists() or not place.parent.is_dir():
        return place
    matches = [(path, HIDDEN.fullmatch(path.name)) for path in place.parent.glob(f"{REPLACED}*{place.name}")]
    moved = [path for path, match in matches if match and match["name"] == place.name]
    return max(moved, key=_changed, default=place)


def shared_partial(place: Path) -> Path:
    """Return the hidden folder that several processes write into."""
    return place.with_name(PARTIAL + place.name)


class Journal:
    """Appends records to a file that one process at a time writes to.

    A record is a line with a checksum and JSON. `append` returns once the record is on disk. An incomplete last line is
    the rest of a record from a process that was killed during `append`: it is ignored, and the next writer removes it.

    Args:
        path: The file.
        known: Bytes of the records that are known already; later records are in `unread`.

    Raises:
        BlockingIOError: If another process, or another object of this process, writes to it.
        ValueError: If it is damaged.
        OSError: If it cannot be written.
    """

    def __init__(self, path: Path, known: int = 0) -> None:
        self.path, self._process = path, os.getpid()
        self._file = path.open("ab", buffering=0)
        try:
            self._claim()
            records, size = read_journal(path.read_bytes(), path, known)
            self._file.truncate(size)
            _sync_names(path.parent)
        except BaseException:  # raised again: whatever it is, an interrupt too, the file must not stay open and claimed
            self.close()
            raise
        self.unread: list[Any] = records
        self.size = size

    def _claim(self) -> None:
        if _fcntl is None:
            return
        try:
            _fcntl.flock(self._file.fileno(), _fcntl.LOCK_EX | _fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(
                error.errno, "another process, or another object of this one, writes to it", str(self.path)
            ) from error
        except OSError:  # some network file systems have no locks
            pass

    @property
    def is_open(self) -> bool:
        """Whether this process writes to it; a fork of the process that opened it does not."""
        return not self._file.closed and self._process == os.getpid()

    def append(self, record: Any) -> None:
        """Append a record; after an error the file is unchanged."""
        data = _journal_line(record)
        try:
            written = 0
            while written < len(data):
                written += self._file.write(data[written:])
            os.fsync(self._file.fileno())
        except BaseException:  # raised again: whatever it is, an interrupt too, no half line may stay
            with suppress(OSError):
                self._file.truncate(self.size)
            raise
        self.size += len(data)

    def close(self) -> None:
        """Release the file for other writers."""
        self._file.close()


def read_journal(data: bytes, path: Path, known: int = 0) -> tuple[list[Any], int]:
    """Read the records of a journal.

    Args:
        data: Content of the file.
        path: The file, for the error.
        known: Bytes at its beginning to skip.

    Returns:
        The records, and the bytes of complete records, including `known`.

    Raises:
        ValueError: If it is damaged.
    """
    size = data.rfind(b"\n") + 1
    if size < known:
        raise ValueError(f"{path} is damaged: {size} bytes, expected at least the {known} that were there before")
    records = []
    for number, line in enumerate(data[known:size].splitlines(), 1):
        digest, _, text = line.partition(b" ")
        if digest != hashlib.sha256(text).hexdigest()[:16].encode():
            raise ValueError(f"{path} is damaged: the checksum of line {number} is wrong")
        records.append(json.loads(text))
    return records, size


def _journal_line(record: Any) -> bytes:
    text = json.dumps(record, separators=(",", ":")).encode()
    return hashlib.sha256(text).hexdigest()[:16].encode() + b" " + text + b"\n"


def _resolved(path: str | os.PathLike[str]) -> Path:
    """Resolve a link, so that its target is replaced, not the link."""
    return Path(path).resolve() if Path(path).is_symlink() else Path(path).absolute()


def _hidden(place: Path, kind: str) -> Path:
    return place.with_name(f"{kind}{secrets.token_hex(8)}-{place.name}")


def _reserve(place: Path, folder: bool, shared: bool = False) -> tuple[Path, int]:
    """Make a hidden file or folder and lock it before a `recover` of another process takes it for a leftover."""
    for _ in range(MOST_WRITERS):
        partial = shared_partial(place) if shared else _hidden(place, PARTIAL)
        if folder:
            partial.mkdir()
        else:
            partial.touch(exist_ok=False)
        lock = _lock(partial)
        if lock is not None:
            return partial, lock
    raise OSError(errno.EACCES, f"{place}: new files in this folder cannot be read and locked")


def _lock(path: Path) -> int | None:
    """Lock a file or folder; a kill releases it.

    Returns:
        The descriptor that holds the lock, `UNLOCKED` without file locks; None if another process holds the lock, or
        the file is gone.
    """
    if _fcntl is None:
        return UNLOCKED
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except (FileNotFoundError, PermissionError):  # removed meanwhile, or another user's
        return None
    try:
        _fcntl.flock(descriptor, _fcntl.LOCK_EX | _fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:  # some network file systems have no locks: there only one process may write to a place at a time
        pass
    try:
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return descriptor
    except FileNotFoundError:
        pass
    os.close(descriptor)
    return None


def _unlock(descriptor: int) -> None:
    if descriptor != UNLOCKED:
        os.close(descriptor)


@contextmanager
def _removed_if_failed(partial: Path) -> Iterator[None]:
    done = False
    try:
        yield
        done = True
    except (RuntimeError, SafetensorError) as error:
        if type(error) not in (RuntimeError, SafetensorError):  # such as RecursionError
            raise
        # So torch and safetensors report a full disk.
        raise OSError(
            f"{partial} could not be written: {error}. Is the disk full? What was saved before is as it was"
        ) from error
    finally:
        if not done:
            _remove(partial)


def _swap(fresh: Path, place: Path) -> None:
    """Replace a folder by a newly written one."""
    for _ in range(MOST_WRITERS):
        old = _hidden(place, REPLACED)
        with suppress(FileNotFoundError):
            os.replace(place, old)
        try:
            os.replace(fresh, place)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST) and fresh.exists():
                _discard(old, place)  # another process has put its folder there meanwhile
                continue
            if old.exists() and not place.exists():
                os.replace(old, place)
            raise
        _sync_names(place.parent)
        _discard(old, place)
        return
    raise OSError(errno.EBUSY, f"other processes replace {place} all the time: let one process write to it")


def _move_files(complete: Path, folder: Path) -> None:
    """Move complete files to their places; it can be repeated after an interruption at any point."""
    journal = complete / JOURNAL
    if journal.exists():  # else they all have, and it was killed while it cleaned up
        content = json.loads(journal.read_text(encoding="utf-8"))
        # Version 0.1 wrote only the names.
        names, patterns = (content, []) if isinstance(content, list) else (content["move"], content["remove"])
        for path in {path for pattern in patterns for path in folder.glob(pattern)}:
            if path.name not in names:
                _remove(path)
        for name in names:
            source, place = complete / name, folder / name
            if source.exists():
                if place.is_dir():
                    shutil.rmtree(place)
                os.replace(source, place)
        _sync_names(folder)
    _remove(complete)


def _remove(path: Path) -> None:
    """Remove a file or a folder; what cannot be removed stays, and the next `recover` tries again."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _bring_back(old: Path, place: Path) -> None:
    """Move a folder back to its place, unless other processes have moved it or have replaced it meanwhile."""
    try:
        os.replace(old, place)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
            raise


def _discard(old: Path, place: Path) -> None:
    """Remove a replaced folder, under a name that marks it as incomplete if removal is interrupted."""
    with suppress(FileNotFoundError):
        os.replace(old, partial := _hidden(place, PARTIAL))
        _remove(partial)


def _changed(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _file_mode(folder: Path) -> int:
    """Return the mode of new files in a folder. Reading the umask would set it, for other threads as well."""
    probe = folder / f"{PARTIAL}mode"
    probe.touch(exist_ok=False)
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    return mode


def _finish_folder(folder: Path, mode: int) -> None:
    """Synchronise a folder's content to disk before it gets its name."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            _finish_file(path, mode, durable=True)
        elif path.is_dir():
            _sync_names(path)
    _sync_names(folder)


def _finish_file(path: Path, mode: int | None, durable: bool) -> None:
    if mode is not None and path.stat().st_mode & 0o777 != mode:
        path.chmod(mode)
    if durable:
        with path.open("r+b") as file:  # Windows flushes only what is open for writing
            os.fsync(file.fileno())


def _sync_names(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


__all__ = [
    "COMPLETE",
    "PARTIAL",
    "REPLACED",
    "Journal",
    "atomic_file",
    "atomic_files",
    "atomic_folder",
    "read_journal",
    "recover",
    "shared_partial",
    "standing",
    "write_atomic",
]
