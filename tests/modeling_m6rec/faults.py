"""Lets the N-th call that a SegmentStore makes to the system go wrong, and runs and kills processes that use one."""

import hashlib
import os
import random
import signal
import sys
import traceback
from contextlib import contextmanager
from unittest import mock

from m6rec import segment_cache_m6rec
from m6rec.segment_cache_m6rec import SegmentStore

CALLS = ("makedirs", "replace", "unlink", "utime", "scandir")
BOUND = 1 << 16


class Faults:
    """Counts calls to the system; the N-th and those after it go wrong, or only the N-th, or the process dies there."""

    def __init__(self, number, error, lasting=False, kill=False):
        self.number, self.error, self.lasting, self.kill, self.count = number, error, lasting, kill, 0

    def met(self):
        self.count += 1
        hit = self.count >= self.number if self.lasting else self.count == self.number
        if hit and self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        return hit

    def call(self, function):
        def called(*args, **kwargs):
            if self.met():
                raise OSError(self.error, os.strerror(self.error))
            return function(*args, **kwargs)

        return called

    def open(self, *args, **kwargs):
        return _File(self.call(open)(*args, buffering=0, **kwargs), self)

    @contextmanager
    def __call__(self):
        failing = {name: self.call(getattr(os, name)) for name in CALLS}
        with (
            mock.patch.object(segment_cache_m6rec, "open", self.open, create=True),
            mock.patch.multiple(os, **failing),
        ):
            yield self


class _File:
    """A file whose reading, writing and closing may go wrong; writing then leaves half of it."""

    def __init__(self, file, faults):
        self.file, self.faults = file, faults
        self.read = faults.call(file.read)

    def write(self, data):
        if self.faults.met():
            self.file.write(data[: len(data) // 2])
            raise OSError(self.faults.error, os.strerror(self.faults.error))
        return self.file.write(data)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()
        self.faults.call(lambda: None)()  # a full disk may be told of only now


def key(number):
    return hashlib.sha256(str(number).encode()).hexdigest()


def values(number):
    """The values that are ever put for a key; they differ in length and in every part."""
    return [random.Random(f"{number} {version}").randbytes(200 + 700 * version) for version in range(3)]


def use(directory, seed, acknowledge=lambda number: None, rounds=10**9, bound=BOUND):
    """Put, read and sweep at random; whatever is read must have been put for that key."""
    store, chance = SegmentStore(directory, bound), random.Random(seed)
    for _ in range(rounds):
        number = chance.randrange(40)
        action = chance.random()
        if action < 0.5:
            store.put(key(number), chance.choice(values(number)))
            acknowledge(number)
        elif action < 0.98:
            found = store.get(key(number), 2000)
            assert found is None or bytes(found) in values(number), f"wrong value of {number}"
        else:
            store.sweep()
    assert store.damaged == store.failures == 0


def fork(work, *args, **kwargs):
    """Run a function in a fork; its exit code is 1 if it raised."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        work(*args, **kwargs)
        code = 0
    except BaseException:  # noqa: BLE001 - a fork must not go on as if it were its parent
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def finish(process):
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


__all__ = ["BOUND", "Faults", "finish", "fork", "key", "use", "values"]
