"""Values in a folder, one file each, shared by any number of processes. It may lose a value, never tell a wrong one.

There is no index and no lock, so nothing goes stale and nothing stays locked when a process is killed: a file takes its
name by renaming, when it is whole, and whoever reads it believes it only if its digest bears it out.
"""

import hashlib
import os
import re
import stat
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from transformers.utils import logging

from .atomic_m6rec import atomic_file

logger = logging.get_logger(__name__)

DIGEST = hashlib.sha256().digest_size
KEPT_FREE = 16
"""A sweep leaves 1/16 of the bound free, which a process then fills before it sweeps again."""
OWN_NAME = re.compile(r"[0-9a-f]{64}(\.[0-9a-f]{32})?")
"""A value, or one that was being written; the folder's other files are let alone."""


class SegmentStore:
    """Keeps values by 64 hexadecimal digits in a folder.

    Several processes may read, write and sweep at once, also after a fork; renaming within a folder is all that is
    asked of the file system, so that it may be a network's. Nothing waits for the disk: what a power cut tears or
    empties is found out and written again. A folder that cannot be written to is read; one that cannot be read holds
    nothing. The digests guard against accidents: do not use a folder that others may forge files in.

    When the folder is opened, and after every sixteenth of the bound that a process has written, the files that were
    written, or read by any process, longest ago are removed. One process thus keeps the bound, P processes exceed it by
    at most (P - 1) / 16. What killed processes left unfinished counts, and leaves in its turn.

    Args:
        directory: The folder; it is made if need be.
        max_bytes: Bytes of files that are kept at most.
    """

    def __init__(self, directory: str | Path, max_bytes: int) -> None:
        self.directory = Path(directory).expanduser().absolute()
        if max_bytes <= 0:
            raise ValueError(f"max_disk_bytes={max_bytes} keeps nothing: give a positive number of bytes, or no folder")
        if self.directory.exists() and not self.directory.is_dir():
            raise NotADirectoryError(f"directory={str(directory)!r} is a file: give a folder, which is made if need be")
        self.directory.mkdir(parents=True, exist_ok=True)
        self.max_bytes = max_bytes
        self.damaged = self.failures = 0
        self.sweep()

    def get(self, key: str, longest: int) -> bytearray | None:
        """Return the value of a key; None if there is none that is whole, or it has more than `longest` bytes."""
        path = self._path(key)
        try:
            with open(path, "rb") as file:
                data = bytearray(file.read(longest + DIGEST + 1))
        except FileNotFoundError:
            return None
        except OSError as error:
            self._failed("read", error)
            return None
        value, found = data[:-DIGEST], data[-DIGEST:]
        if len(value) > longest or _digest(key, value) != found:
            self.damaged += 1
            return None
        with suppress(OSError):
            os.utime(path)  # used just now
        return value

    def put(self, key: str, value: bytes) -> None:
        """Keep a value, also in the place of a damaged one. If that cannot be done, the old state of things remains."""
        path, data = self._path(key), value + _digest(key, value)
        if len(data) > self.max_bytes:
            return
        partial = path.with_name(f"{key}.{uuid.uuid4().hex}")
        try:
            os.makedirs(path.parent, exist_ok=True)
            with atomic_file(path, durable=False, partial=partial), open(partial, "xb") as file:
                file.write(data)
        except OSError as error:
            self._failed("write", error)
            return
        self.num_bytes += len(data)
        self._until_sweep -= len(data)
        if self._until_sweep <= 0:
            self.sweep()

    def sweep(self) -> None:
        """Measure the folder, and remove the files used longest ago until a sixteenth of the bound is free."""
        found = list(self._files())
        self.num_bytes = sum(size for _, size, _ in found)
        self._until_sweep = self.max_bytes // KEPT_FREE
        room = self.max_bytes - self._until_sweep
        if self.num_bytes <= room:
            return
        for _, size, path in sorted(found):
            try:
                os.unlink(path)
            except FileNotFoundError:
                pass  # another process was faster
            except OSError as error:
                self._failed("remove", error)
                continue
            self.num_bytes -= size
            if self.num_bytes <= room:
                return

    def _files(self) -> Iterator[tuple[int, int, str]]:
        """Yield time of last use, size and path of each of our files."""
        for folder in _entries(self.directory):
            for file in _entries(folder.path) if re.fullmatch("[0-9a-f]{2}", folder.name) else ():
                with suppress(OSError):  # removed in this moment
                    facts = file.stat(follow_symlinks=False)
                    if OWN_NAME.fullmatch(file.name) and stat.S_ISREG(facts.st_mode):
                        yield facts.st_mtime_ns, facts.st_size, file.path

    def _path(self, key: str) -> Path:
        return self.directory / key[:2] / key

    def _failed(self, what: str, error: OSError) -> None:
        self.failures += 1
        logger.warning_once(f"segment states on disk: cannot {what} in {self.directory}: {error.strerror or error}")


def _digest(key: str, value: bytes | bytearray) -> bytes:
    """Digest a value and the key that it belongs to."""
    digest = hashlib.sha256(key.encode())
    digest.update(value)
    return digest.digest()


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """List a folder; one that cannot be read, or is gone, is empty."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []


__all__ = ["SegmentStore"]
