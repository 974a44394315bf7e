"""A store may lose a value, it never tells a wrong one: torn, rotten, foreign and failing files, kills, and crowds."""

import errno
import os
import random
import shutil
import signal
import time

import pytest

from m6rec.segment_cache_m6rec import DIGEST, SegmentStore
from tests.fast import some
from tests.modeling_m6rec.faults import BOUND, Faults, finish, fork, key, use, values

KEY, OTHER = key("a"), key("b")
OLD, NEW = b"the old value", b"a new one, which is longer"


def files(directory):
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.glob("??/*")}


def stored(directory, value=NEW, name=KEY):
    """The one file of one put."""
    SegmentStore(directory, BOUND).put(name, value)
    return directory / name[:2] / name


# ------------------------------------------------------------------------------------------------------ a store's work


def test_what_was_put_is_there_also_after_a_restart(tmp_path):
    store = SegmentStore(tmp_path / "new" / "folder", BOUND)
    assert store.get(KEY, 100) is None
    store.put(KEY, OLD)
    store.put(OTHER, b"")
    store.put(KEY, NEW)
    for again in (store, SegmentStore(str(store.directory), BOUND)):
        assert again.get(KEY, 100) == NEW and again.get(OTHER, 100) == b""
        assert again.get(KEY, len(NEW)) == NEW and again.damaged == again.failures == 0
    assert SegmentStore(store.directory, BOUND).num_bytes == len(NEW) + 2 * DIGEST


def test_a_value_longer_than_it_can_be_is_none(tmp_path):
    stored(tmp_path)
    store = SegmentStore(tmp_path, BOUND)
    assert store.get(KEY, len(NEW) - 1) is None and store.damaged == 1


def test_the_files_used_longest_ago_leave_first(tmp_path):
    """Files of 100 bytes in a folder of 1,600: a sweep leaves 1,500, so 15 files."""
    store = SegmentStore(tmp_path, 1600)
    for number in range(16):
        store.put(key(number), bytes(100 - DIGEST))
        os.utime(tmp_path / key(number)[:2] / key(number), (number, number))
        if number == 14:
            assert store.get(key(0), 100) is not None  # used just now
    kept = [number for number in range(16) if store.get(key(number), 100) is not None]
    assert kept == [0, *range(2, 16)] and store.num_bytes == 1500


def test_one_process_keeps_the_bound_at_every_moment(tmp_path):
    store, chance = SegmentStore(tmp_path, 5000), random.Random(0)
    for number in range(300):
        store.put(key(number), chance.randbytes(chance.randint(0, 280)))
        assert sum(map(len, files(tmp_path).values())) <= 5000
    assert sum(map(len, files(tmp_path).values())) > 4000
    store.put(KEY, bytes(5000 - DIGEST + 1))
    assert store.get(KEY, 5000) is None and len(files(tmp_path)) > 10  # what is too large removes nothing


def test_opening_sweeps_what_is_too_much_now(tmp_path):
    for number in range(10):
        stored(tmp_path, bytes(100 - DIGEST), key(number))
    assert SegmentStore(tmp_path, 400).num_bytes == 300 and len(files(tmp_path)) == 3


def test_other_files_of_the_folder_are_let_alone(tmp_path):
    path = stored(tmp_path)
    (tmp_path / "README").write_text("mine" * 100)
    path.with_name("notes.txt").write_text("mine" * 100)
    (tmp_path / "ab").write_text("a file where a folder would be")
    (path.parent / key("c")).mkdir()
    (path.parent / key("d")).symlink_to(tmp_path / "README")
    left_by_a_kill = path.with_name(f"{KEY}.{'0' * 32}")
    left_by_a_kill.write_bytes(bytes(500))
    store = SegmentStore(tmp_path, 100)
    assert not path.exists() and not left_by_a_kill.exists() and store.num_bytes == 0
    assert (tmp_path / "README").exists() and path.with_name("notes.txt").exists() and (tmp_path / "ab").exists()
    assert (path.parent / key("c")).is_dir() and (path.parent / key("d")).is_symlink() and store.failures == 0


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="max_disk_bytes=0"):
        SegmentStore(tmp_path, 0)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file' is a file"):
        SegmentStore(tmp_path / "file", BOUND)


# ------------------------------------------------------------------------------------------------ torn, rotten, foreign


def check(directory, allowed):
    """A store opens on a folder, tells nothing but what is allowed, and takes a new value."""
    store = SegmentStore(directory, BOUND)
    found = store.get(KEY, 100)
    assert found in allowed
    store.put(KEY, NEW)
    assert store.get(KEY, 100) == NEW and store.failures == 0
    return found


@pytest.mark.parametrize("before", (None, OLD), ids=("first", "replacing"))
def test_every_prefix_and_truncation_of_a_put(tmp_path, before):
    """A put makes a folder, writes a file under another name and renames it; each reaches the disk or does not."""
    whole = stored(tmp_path / "whole").read_bytes()
    assert len(whole) == len(NEW) + DIGEST
    seen = set()
    for size in range(len(whole) + 1):
        torn = (whole[:size], whole[:size] + bytes(len(whole) - size))  # the rest is missing, or not written yet
        for renamed, data in ((renamed, data) for renamed in (False, True) for data in torn):
            shutil.rmtree(tmp_path / "store", ignore_errors=True)
            place = tmp_path / "store" / KEY[:2] / KEY
            place.parent.mkdir(parents=True)
            if before is not None:
                stored(tmp_path / "store", before)
            (place if renamed else place.with_name(f"{KEY}.{'a' * 32}")).write_bytes(data)
            expected = before if not renamed else NEW if data == whole else None
            assert check(tmp_path / "store", (expected,)) == expected
            seen.add(expected)
    assert seen == {None, before, NEW}


def test_every_flipped_bit_is_found(tmp_path):
    path = stored(tmp_path)
    whole = path.read_bytes()
    store = SegmentStore(tmp_path, BOUND)
    for bit in range(8 * len(whole)):
        rotten = bytearray(whole)
        rotten[bit // 8] ^= 1 << bit % 8
        path.write_bytes(rotten)
        assert store.get(KEY, 100) is None and store.damaged == bit + 1
    check(tmp_path, (None,))


def test_foreign_files_in_its_place_are_not_told(tmp_path):
    path, other = stored(tmp_path), stored(tmp_path, OLD, OTHER)

    def link():
        path.unlink()
        path.symlink_to(other)

    for damage in (
        lambda: shutil.copy(other, path),  # a whole value, of another key
        lambda: path.write_bytes(b""),
        lambda: path.write_bytes(b"{}" * 25_000),
        lambda: path.write_bytes(path.read_bytes() + b"\0"),
        link,
    ):
        damage()
        check(tmp_path, (None,))
        assert SegmentStore(tmp_path, BOUND).get(OTHER, 100) == OLD


def test_a_folder_in_the_place_of_a_value_loses_that_value_only(tmp_path):
    path = stored(tmp_path)
    path.unlink()
    path.mkdir()
    store = SegmentStore(tmp_path, BOUND)
    store.put(KEY, NEW)
    assert store.get(KEY, 100) is None and store.failures == 2
    store.put(OTHER, NEW)
    assert store.get(OTHER, 100) == NEW and path.is_dir()


# ----------------------------------------------------------------------------------------------------- a failing system


@pytest.mark.parametrize("lasting", (False, True), ids=("once", "from then on"))
@pytest.mark.parametrize("error", (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EMFILE))
def test_the_nth_call_fails(tmp_path, error, lasting):
    """Whatever fails, nothing is raised, a put is all or nothing, and what failed is counted."""
    for number in range(1, 100):
        folder = tmp_path / f"{number}"
        stored(folder, OLD)
        for age in range(5):  # something for a sweep to remove
            stored(folder, bytes(1000), key(age))
            os.utime(folder / key(age)[:2] / key(age), (age, age))
        with Faults(number, error, lasting)() as faults:
            store = SegmentStore(folder, 5000)
            first = store.get(KEY, 100)
            store.put(KEY, NEW)
            found = store.get(KEY, 100)
        assert first in (OLD, None) and found in (OLD, NEW, None) and store.damaged == 0
        kept = SegmentStore(folder, BOUND).get(KEY, 100)
        assert kept in (OLD, NEW) and (found is None or kept == found)
        if faults.count < number:
            assert (first, found, store.failures) == (OLD, NEW, 0)
            break
        assert lasting or store.failures <= 1
        assert (first, found) == (OLD, NEW) or store.failures
        assert lasting or not [name for name in files(folder) if "." in name]  # nothing unfinished is left
    assert 10 < number < 99


def test_a_process_that_dies_at_its_nth_call(tmp_path):
    for number in range(1, 100):
        folder = tmp_path / f"{number}"
        stored(folder, OLD)

        def work(folder=folder, number=number):
            with Faults(number, 0, kill=True)():
                SegmentStore(folder, BOUND).put(KEY, NEW)

        code = finish(fork(work))
        check(folder, (OLD, NEW))
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert number > 5


# ------------------------------------------------------------------------------------------------------ several at once


def run_and_kill(directory, rounds, seed):
    """Two processes use a folder, one or both are killed; returns how many values outlived a round in the mean."""
    chance, outlived = random.Random(seed), 0
    for number in range(rounds):
        notes = directory.with_suffix(f".{number}")
        out = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        bound = BOUND if number % 2 else 1 << 14  # half of the rounds with evictions

        def acknowledge(kept, out=out):
            os.write(out, b"%d\n" % kept)

        children = [fork(use, directory, f"{seed} {number} {child}", acknowledge, bound=bound) for child in range(2)]
        for child in children:
            time.sleep(chance.uniform(0, 0.015))
            assert os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None, "a process failed"
            os.kill(child, signal.SIGKILL)
        assert [finish(child) for child in children] == [-signal.SIGKILL] * 2
        os.close(out)
        store = SegmentStore(directory, bound)
        assert store.num_bytes == sum(map(len, files(directory).values())) <= bound
        found = {kept: store.get(key(kept), 2000) for kept in range(40)}
        assert all(value is None or bytes(value) in values(kept) for kept, value in found.items())
        assert store.damaged == store.failures == 0
        if bound == BOUND and store.num_bytes < bound // 2:  # nothing had to leave: what was acknowledged is there
            assert all(found[int(kept)] is not None for kept in notes.read_text().split())
        outlived += sum(value is not None for value in found.values())
    return outlived / rounds


@pytest.mark.parametrize("kills", some([8, 200], [8]))
def test_kills(tmp_path, kills):
    assert run_and_kill(tmp_path / "store", rounds=kills, seed=200) > 5


def test_processes_write_read_and_sweep_at_once(tmp_path):
    children = [fork(use, tmp_path / "store", seed, rounds=600, bound=1 << 14) for seed in range(3)]
    assert [finish(child) for child in children] == [0, 0, 0]
    store = SegmentStore(tmp_path / "store", 1 << 14)
    assert 0 < store.num_bytes <= 1 << 14
    assert not [name for name in files(tmp_path / "store") if "." in name]


def test_a_fork_goes_on_with_its_parents_store(tmp_path):
    store = SegmentStore(tmp_path, BOUND)
    store.put(KEY, OLD)

    def work():
        assert store.get(KEY, 100) == OLD
        store.put(KEY, NEW)

    assert finish(fork(work)) == 0 and store.get(KEY, 100) == NEW
