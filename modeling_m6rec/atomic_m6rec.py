"""Files and folders that appear whole: a reader finds the old content or the new one, never half of either.

New content is written under a hidden name in the same folder, brought to the disk, and takes its place by renaming. An
error or a full disk removes it and leaves the old content. A killed process leaves hidden names; the next write to the
same place, or `recover`, finishes or removes them. What a live process is writing is locked, where the system has file
locks, and is left alone. Files get the mode that the umask gives, whatever the library that wrote them does.

A folder cannot replace another in one renaming: for a moment, or after a kill in that moment, it has no folder at its
name. `standing` finds the old one then.

A `Journal` is appended to instead, a record at a time: each is there whole, or not at all.
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
"""How hidden names begin: being written; complete files on the move to their places; about to be removed."""
HIDDEN = re.compile(r"(?P<kind>\.partial-|\.complete-|\.replaced-)(?:[0-9a-f]{16}-)?(?P<name>.+)")
JOURNAL = "files.json"
"""In a folder of complete files: the names to move, in order, and the patterns of files that they make obsolete."""
FILES = "model"
"""What stands in a hidden name for several files of a folder."""
MOST_WRITERS = 100
"""Another writer may put its folder in place between our two renamings so many times."""
_fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None
UNLOCKED = -1


def write_atomic(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Write one file, texts as UTF-8 with the line ends that they have; missing folders are made."""
    with atomic_file(path) as partial:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)


@contextmanager
def atomic_file(path: str | os.PathLike[str], durable: bool = True, partial: Path | None = None) -> Iterator[Path]:
    """Yield the path of a hidden file to write; it takes its place unless an error is raised.

    Args:
        path: The place.
        durable: Wait until the content is on the disk, so that a power cut leaves the old file or the new one.
        partial: The hidden file, if the caller names it and removes what killed processes leave of it. A link in the
            place is then replaced itself, not what it points to.
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
    """Yield a hidden folder to write into; it takes its place, also that of an old folder, unless an error is raised.

    Args:
        place: The place. What stands there is replaced as a whole.
        shared: Several processes write into the hidden folder, whose name is then `shared_partial(place)`.

    Raises:
        NotADirectoryError: A file has that name.
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
    """Yield a hidden folder to write into; its files then take their places in `folder`, all or none.

    Other files of the folder stay. A process that is killed while the files move, which takes no time to speak of, is
    finished by the next one.

    Args:
        folder: Where the files belong; it is made if need be.
        obsolete: Patterns of files in `folder` that are removed, unless they are among the new ones or none of the new
            ones matches any of the patterns.
        last: Names that are moved after all others: who finds them finds all.
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
    """Finish or remove what killed processes have left in a folder.

    Args:
        folder: The folder.
        name: Of the file or folder in it that is put right; None = all.
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
    """Return where a folder is to be read: at its place, or if that is missing, where a replacement has moved it."""
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

    A record is a line of a checksum and JSON. `append` returns once it is on the disk. A last line without its end is
    what a killed process has left of a record before `append` returned: it is not read, and the next writer removes it.

    Args:
        path: The file.
        known: Bytes of the records that are known already; those behind are `unread`.

    Raises:
        BlockingIOError: Another process, or another object of this one, writes to it.
        ValueError: It is damaged.
        OSError: It cannot be written.
    """

    def __init__(self, path: Path, known: int = 0) -> None:
        self.path, self._process = path, os.getpid()
        self._file = path.open("ab", buffering=0)
        try:
            self._claim()
            records, size = read_journal(path.read_bytes(), path, known)
            self._file.truncate(size)
            _sync_names(path.parent)
        except BaseException:
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
        """Append a record; on an error the file is as it was."""
        data = _journal_line(record)
        try:
            written = 0
            while written < len(data):
                written += self._file.write(data[written:])
            os.fsync(self._file.fileno())
        except BaseException:
            with suppress(OSError):
                self._file.truncate(self.size)
            raise
        self.size += len(data)

    def close(self) -> None:
        """Let others write to it."""
        self._file.close()


def read_journal(data: bytes, path: Path, known: int = 0) -> tuple[list[Any], int]:
    """Read the records of a journal.

    Args:
        data: What the file holds.
        path: The file, for the error.
        known: Bytes at its beginning that are not read.

    Returns:
        The records, and how many bytes whole records take, `known` included.

    Raises:
        ValueError: It is damaged.
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
    """Follow a link: what it points to is replaced, not the link."""
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
        The descriptor that holds the lock, `UNLOCKED` where there are no locks; None if another process holds it, or
        it is gone.
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
    """Put a written folder in the place of another."""
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
    """Let complete files take their places; may be begun again at any point."""
    journal = complete / JOURNAL
    if journal.exists():  # else they all have, and it was killed while it cleaned up
        content = json.loads(journal.read_text(encoding="utf-8"))
        # Version 0.1 wrote the names alone.
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
    """Give a folder its place again, unless other processes have moved it or have put another there meanwhile."""
    try:
        os.replace(old, place)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
            raise


def _discard(old: Path, place: Path) -> None:
    """Remove a folder that was replaced, under a name that nobody takes for a whole one if this is interrupted."""
    with suppress(FileNotFoundError):
        os.replace(old, partial := _hidden(place, PARTIAL))
        _remove(partial)


def _changed(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _file_mode(folder: Path) -> int:
    """Return the mode of new files in a folder. Asking for the umask would set it, for other threads as well."""
    probe = folder / f"{PARTIAL}mode"
    probe.touch(exist_ok=False)
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    return mode


def _finish_folder(folder: Path, mode: int) -> None:
    """Make sure that all of a folder is on the disk before it gets its name."""
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
