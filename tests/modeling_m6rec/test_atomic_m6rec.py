"""Files and folders appear whole, wherever a process is killed, whatever the system refuses, and for every reader."""

import contextlib
import errno
import os
import signal
import stat
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from m6rec import atomic_m6rec
from m6rec.atomic_m6rec import atomic_file, atomic_files, atomic_folder, recover, standing, write_atomic
from tests.fast import examples
from tests.modeling_m6rec.faults import finish, fork

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json")
OLD = {"a": "old", "config.json": "old"}
NEW = {"config.json": "new", "b/c": "new", "a": "new", "model.safetensors": "new"}


def tree(folder):
    """All that a folder holds: name -> text."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def fill(folder, content):
    for name, text in content.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(text)


def test_a_folder_takes_its_place_in_one_step(tmp_path):
    place = tmp_path / "deep" / "checkpoint-2"
    with atomic_folder(place) as partial:
        fill(partial, OLD)
        assert not place.exists()
    with atomic_folder(place) as partial:
        fill(partial, NEW)
        assert tree(place) == OLD
    assert tree(place) == NEW
    with pytest.raises(OSError, match="no room"), atomic_folder(place) as partial:
        fill(partial, OLD)
        raise OSError(errno.ENOSPC, "no room")
    assert tree(tmp_path) == {f"deep/checkpoint-2/{name}": text for name, text in NEW.items()}


def test_a_file_takes_its_place_in_one_step(tmp_path):
    place = tmp_path / "deep" / "report.json"
    write_atomic(place, "片\r\n")
    assert place.read_bytes() == "片\r\n".encode()
    with atomic_file(place) as partial:
        partial.write_bytes(b"new")
        assert place.read_bytes() != b"new"
    with pytest.raises(KeyError), atomic_file(place) as partial:
        partial.write_bytes(b"half")
        raise KeyError("none")
    assert os.listdir(place.parent) == ["report.json"]
    assert place.read_bytes() == b"new"


def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    fill(tmp_path, {"disk/films/a": "old", "disk/note": "old"})
    (tmp_path / "films").symlink_to(tmp_path / "disk" / "films")
    (tmp_path / "note").symlink_to(tmp_path / "disk" / "note")
    with atomic_folder(tmp_path / "films") as partial:
        fill(partial, {"a": "new"})
    write_atomic(tmp_path / "note", "new")
    assert (tmp_path / "films").is_symlink()
    assert (tmp_path / "note").is_symlink()
    assert tree(tmp_path / "disk") == {"films/a": "new", "note": "new"}


def test_a_file_is_no_folder(tmp_path):
    fill(tmp_path, {"films": "precious"})
    with pytest.raises(NotADirectoryError, match="films is a file"), atomic_folder(tmp_path / "films"):
        pass
    assert tree(tmp_path) == {"films": "precious"}


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
def test_modes_follow_the_umask(tmp_path, mask):
    """Safetensors writes 0600, and a copy of a file that may only be read is one, too."""
    before = os.umask(mask)
    try:
        with atomic_folder(tmp_path / "whole") as partial:
            save_file({"x": torch.ones(2)}, partial / "model.safetensors")
            (partial / "code.py").write_text("")
            (partial / "code.py").chmod(0o400)
        with atomic_files(tmp_path / "files") as partial:
            save_file({"x": torch.ones(2)}, partial / "model.safetensors")
        with atomic_file(tmp_path / "one" / "x.safetensors") as partial:
            save_file({"x": torch.ones(2)}, partial)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == {0o666 & ~mask}
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 4


def test_only_what_is_open_for_writing_is_flushed(tmp_path, monkeypatch):
    """As on Windows, where fsync of a file that is open for reading fails, and a folder cannot be opened."""
    fcntl = pytest.importorskip("fcntl")
    real, flushed = os.fsync, []

    def fsync(descriptor):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flushed.append(real(descriptor))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(atomic_m6rec, "_sync_names", lambda folder: None)
    monkeypatch.setattr(atomic_m6rec, "_fcntl", None)
    with atomic_folder(tmp_path / "whole") as partial:
        fill(partial, {"a": "", "b/c": ""})
    with atomic_files(tmp_path / "files") as partial:
        fill(partial, {"a": ""})
    write_atomic(tmp_path / "one", "")
    assert len(flushed) == 5
    assert sorted(tree(tmp_path)) == ["files/a", "one", "whole/a", "whole/b/c"]


class Killed(BaseException):
    """Stands for a process that ends between two calls of the file system."""


def calls_until(monkeypatch, count):
    """End the process before the call with this number; returns how many were made."""
    made = [0]

    def counted(function):
        def call(*args, **kwargs):
            made[0] += 1
            if made[0] >= count:
                raise Killed
            return function(*args, **kwargs)

        return call

    for owner, name in ((os, "replace"), (Path, "unlink"), (Path, "mkdir"), (Path, "touch"), (os, "fsync")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    # A killed process cleans nothing up, and may be killed in the middle of removing a folder.
    remove = atomic_m6rec.shutil.rmtree

    def removed(path, *args, **kwargs):
        made[0] += 1
        if made[0] >= count:
            for file in sorted(Path(path).rglob("*")) if Path(path).is_dir() else ():
                if file.is_file():
                    os.unlink(file)
                    break
            raise Killed
        return remove(path, *args, **kwargs)

    monkeypatch.setattr(atomic_m6rec.shutil, "rmtree", removed)
    return made


def write_folder(folder, content=NEW):
    with atomic_folder(folder / "checkpoint-2") as partial:
        fill(partial, content)


def write_shared(folder, content=NEW):
    with atomic_folder(folder / "checkpoint-2", shared=True) as partial:
        fill(partial, content)


def write_files(folder, content=NEW):
    with atomic_files(folder / "checkpoint-2") as partial:
        fill(partial, content)


@pytest.mark.parametrize("again", [False, True], ids=["recovered", "written again"])
@pytest.mark.parametrize("write", [write_folder, write_shared, write_files])
def test_wherever_a_save_ends_the_old_or_the_new_is_there(tmp_path, write, again):
    """Ends the process before each call of the file system in turn, then starts the next one."""
    for count in range(1, 100):
        folder = tmp_path / str(count)
        fill(folder, {f"checkpoint-2/{name}": text for name, text in OLD.items()})
        with pytest.MonkeyPatch.context() as monkeypatch:
            made = calls_until(monkeypatch, count)
            with contextlib.suppress(Killed):
                write(folder)
        as_it_is = tree(standing(folder / "checkpoint-2"))
        if write is not write_files:
            assert as_it_is in (OLD, NEW)
        elif as_it_is.get("config.json") == "new":
            assert {name: as_it_is[name] for name in NEW} == NEW, "a configuration stands for a whole model"
        if again:
            write(folder, {**NEW, "a": "newer"})
            assert tree(folder / "checkpoint-2") == {**NEW, "a": "newer"}
        else:
            recover(folder)
            recover(folder / "checkpoint-2")
            assert tree(folder / "checkpoint-2") in (OLD, NEW), count
        assert [path.name for path in folder.iterdir()] == ["checkpoint-2"]
        assert not [path for path in folder.rglob(".*")]
        if made[0] < count:
            break
    assert 8 < count < 99
    assert tree(folder / "checkpoint-2")["b/c"] == "new"


def test_wherever_the_save_of_a_file_ends_the_old_or_the_new_is_there(tmp_path):
    place = tmp_path / "report.json"
    for count in range(1, 20):
        write_atomic(place, "old")
        with pytest.MonkeyPatch.context() as monkeypatch:
            made = calls_until(monkeypatch, count)
            with contextlib.suppress(Killed):
                write_atomic(place, "new")
        assert place.read_text() in ("old", "new")
        recover(tmp_path)
        assert os.listdir(tmp_path) == ["report.json"]
        if made[0] < count:
            break
    assert 2 < count < 19
    assert place.read_text() == "new"


def test_a_save_finishes_the_one_before(tmp_path):
    """Also one of version 0.1, which listed names only and put nothing in front of them."""
    fill(
        tmp_path,
        {".complete-model/a": "first", ".complete-model/b": "first", ".complete-model/files.json": '["a", "b"]'},
    )
    with atomic_files(tmp_path) as partial:
        fill(partial, {"a": "second", "config.json": "second"})
    assert tree(tmp_path) == {"a": "second", "b": "first", "config.json": "second"}


def test_what_earlier_versions_left_is_put_right(tmp_path):
    fill(
        tmp_path, {".partial-checkpoint-7/x": "", ".replaced-checkpoint-3/old": "text", ".replaced-checkpoint-4/x": ""}
    )
    fill(tmp_path, {"checkpoint-4/y": "", ".hidden-model/z": "", ".partial": "theirs"})
    recover(tmp_path)
    assert tree(tmp_path) == {
        "checkpoint-3/old": "text",
        "checkpoint-4/y": "",
        ".hidden-model/z": "",
        ".partial": "theirs",
    }


def test_weights_of_another_kind_do_not_outlive_their_model(tmp_path):
    kept = {"notes.txt": "kept", "catalogue/items": "kept"}
    fill(tmp_path, {"model.safetensors": "old", "model.safetensors.index.json": "old", "config.json": "old", **kept})
    with atomic_files(tmp_path, obsolete=WEIGHTS) as partial:
        fill(partial, {"adapter_model.safetensors": "new", "adapter_config.json": "new", "config.json": "new"})
    assert tree(tmp_path) == {
        "adapter_model.safetensors": "new", "adapter_config.json": "new", "config.json": "new", **kept
    }  # fmt: skip


@given(st.lists(st.sampled_from(["a", "b/c", "config.json", "model.safetensors"]), unique=True, min_size=1))
@settings(max_examples=examples(20), deadline=None)
def test_any_files_take_their_places(tmp_path_factory, names):
    folder = tmp_path_factory.mktemp("any")
    fill(folder, OLD)
    with atomic_files(folder) as partial:
        fill(partial, dict.fromkeys(names, "new"))
    assert tree(folder) == {**OLD, **dict.fromkeys(names, "new")}


def test_a_full_disk_by_any_name_is_an_oserror_and_other_errors_are_themselves(tmp_path):
    for raised, expected in (
        (RuntimeError("PytorchStreamWriter failed writing file"), OSError),
        (RecursionError("too deep"), RecursionError),
        (ValueError("wrong"), ValueError),
    ):
        with pytest.raises(expected, match=str(raised)), atomic_folder(tmp_path / "x"):
            raise raised
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.name != "posix", reason="needs locks")
def test_what_another_writer_is_writing_is_left_alone(tmp_path):
    with atomic_folder(tmp_path / "x") as slow:
        fill(slow, {"a": "slow"})
        with atomic_folder(tmp_path / "x") as fast:
            fill(fast, {"a": "fast"})
        recover(tmp_path)
        assert tree(slow) == {"a": "slow"}
        assert tree(tmp_path / "x") == {"a": "fast"}
    assert tree(tmp_path) == {"x/a": "slow"}


@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_many_writers_to_one_place(tmp_path):
    """Threads of several processes: each save is whole, the last one stays, and nothing is left."""

    def write(name):
        for number in range(15):
            with atomic_folder(tmp_path / "x") as partial:
                fill(partial, {"a": f"{name} {number}", "b": f"{name} {number}"})
            write_atomic(tmp_path / "y", f"{name} {number}")

    def work(name):
        failed = []

        def thread(own):
            try:
                write(own)
            except OSError as error:
                failed.append(error)

        threads = [threading.Thread(target=thread, args=(f"{name} {number}",)) for number in range(2)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert failed == []

    processes = [fork(work, name) for name in "ABC"]
    assert [finish(process) for process in processes] == [0, 0, 0]
    assert tree(tmp_path)["x/a"] == tree(tmp_path)["x/b"]
    assert sorted(os.listdir(tmp_path)) == ["x", "y"]


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_a_killed_process_leaves_what_the_next_one_removes(tmp_path):
    def die(write):
        with write() as partial:
            fill(partial, {"a": "half"}) if partial.is_dir() else partial.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    for write in (
        lambda: atomic_folder(tmp_path / "x"),
        lambda: atomic_files(tmp_path),
        lambda: atomic_file(tmp_path / "y"),
    ):
        assert finish(fork(die, write)) == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 3
    with atomic_folder(tmp_path / "x") as partial:
        fill(partial, {"a": "whole"})
    with atomic_files(tmp_path) as partial:
        fill(partial, {"z": "whole"})
    write_atomic(tmp_path / "y", "whole")
    assert tree(tmp_path) == {"x/a": "whole", "y": "whole", "z": "whole"}


def test_a_failed_swap_brings_the_old_folder_back(tmp_path, monkeypatch):
    fill(tmp_path, {"x/a": "old"})
    real = os.replace

    def replace(source, target):
        if Path(source).name.startswith(".partial") and Path(target).name == "x":
            raise OSError(errno.EACCES, "in use")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="in use"), atomic_folder(tmp_path / "x") as partial:
        fill(partial, {"a": "new"})
    assert tree(tmp_path) == {"x/a": "old"}
