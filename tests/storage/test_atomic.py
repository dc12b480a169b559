"""Writes are all or nothing: killed, without space, without permission, next to what others left behind."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from jaxadapt import FileError
from jaxadapt.storage import atomic, safetensors

ROOT = Path(__file__).resolve().parent.parent.parent


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def save(path: Path | str, megabytes: float = 0.1) -> None:
    array = np.ones((int(megabytes * 250_000), 1), "f4").T
    safetensors.write(path, {"x": ("F32", array.shape)}, lambda key: array)


def test_killed_at_any_moment(tmp_path: Path) -> None:
    script = ROOT / "tests" / "support" / "kill_writer.py"
    subprocess.run(
        [sys.executable, script, tmp_path / "f", "50"],
        check=True,
        timeout=900,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_write_bytes(tmp_path: Path) -> None:
    path = tmp_path / "f"
    for data in (b"", b"one", b"x" * 10_000_000, b"two"):
        atomic.write_bytes(path, data)
        assert path.read_bytes() == data
    assert names(tmp_path) == ["f"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_mode_is_that_of_any_new_file(tmp_path: Path, mask: int) -> None:
    old = os.umask(mask)
    try:
        atomic.write_bytes(tmp_path / "f", b"")
    finally:
        os.umask(old)
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o666 & ~mask


def test_relative_and_odd_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("plain", "./dot", "a[1]*?.x", "new\nline", "ü"):
        atomic.write_bytes(name, name.encode())
        assert Path(name).read_bytes() == name.encode()
    assert len(names(tmp_path)) == 5


def test_symbolic_links_are_replaced_not_followed(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"cached")
    (tmp_path / "f").symlink_to("blob")
    atomic.write_bytes(tmp_path / "f", b"new")
    assert (tmp_path / "blob").read_bytes() == b"cached"
    assert (tmp_path / "f").read_bytes() == b"new"
    assert not (tmp_path / "f").is_symlink()


def test_the_disk_is_flushed_before_and_after_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def spy_fsync(fd: int) -> None:
        events.append("directory" if Path(f"/proc/self/fd/{fd}").is_dir() else "file")
        fsync(fd)

    def spy_replace(self: Path, target: str) -> Path:
        events.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(Path, "replace", spy_replace)
    save(tmp_path / "f")
    assert events == ["file", "rename", "directory"]


# --- what others left behind --------------------------------------------------------------------------------


def test_only_stale_temporary_files_of_the_same_target_go(tmp_path: Path) -> None:
    ours = tmp_path / f".f.99999.{'0' * 16}.tmp"
    keep = [
        tmp_path / f".g.99999.{'0' * 16}.tmp",  # of another target
        tmp_path / f".f.x.99999.{'0' * 16}.tmp",
        tmp_path / ".f.tmp",  # not our pattern
        tmp_path / ".f.99999.zzz.tmp",
        tmp_path / "f.tmp",
    ]
    linked = ours.with_suffix(".old")  # to the old file, of who was killed while renaming
    for path in (ours, linked, *keep):
        path.write_bytes(b"partial")
    directory = tmp_path / f".f.1.{'1' * 16}.tmp"
    directory.mkdir()
    link = tmp_path / f".f.1.{'2' * 16}.tmp"
    link.symlink_to("f")
    os.mkfifo(tmp_path / f".f.1.{'3' * 16}.tmp")
    atomic.write_bytes(tmp_path / "f", b"x")
    assert not ours.exists()
    assert not linked.exists()
    assert all(path.exists() for path in [*keep, directory, link])


def test_two_writers_at_once(tmp_path: Path) -> None:
    """The second sees the first one's temporary file and leaves it alone; the last to finish wins."""
    with atomic.open_replacement(tmp_path / "f") as first:
        first.write(memoryview(b"first"))
        atomic.write_bytes(tmp_path / "f", b"second")
        assert len(names(tmp_path)) == 2
    assert (tmp_path / "f").read_bytes() == b"first"
    assert names(tmp_path) == ["f"]


def test_many_threads(tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for _ in range(10):
                atomic.write_bytes(tmp_path / "f", bytes([number]) * 1000)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(set((tmp_path / "f").read_bytes())) == 1
    assert names(tmp_path) == ["f"]


def test_a_new_folder_that_another_writer_takes_for_a_leftover_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, removed = os.open, list[Path]()

    def open_late(path: Path, *rest: int, **options: int) -> int:
        if not removed and str(path).endswith(".tmp"):
            removed.append(path)
            path.rmdir()
        return real(path, *rest, **options)

    monkeypatch.setattr(os, "open", open_late)
    with atomic.staging_folder(tmp_path / "f") as staged:
        staged.mkdir()
        staged.rename(tmp_path / "f")
    assert removed
    assert names(tmp_path) == ["f"]


# --- failures -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def unchanged(directory: Path) -> Iterator[None]:
    before = {name: (directory / name).read_bytes() for name in names(directory) if (directory / name).is_file()}
    yield
    assert before == {
        name: (directory / name).read_bytes() for name in names(directory) if (directory / name).is_file()
    }


@pytest.mark.parametrize("error", [ValueError("from get"), KeyboardInterrupt(), OSError(5, "from get")])
def test_exceptions_of_the_caller_pass_and_nothing_changes(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "f").write_bytes(b"old")
    array = np.ones((2000, 2000), "f4")

    def get(key: str) -> np.ndarray:
        if key == "c":
            raise error
        return array

    with unchanged(tmp_path), pytest.raises(type(error)) as caught:
        safetensors.write(tmp_path / "f", dict.fromkeys("abcd", ("F32", array.shape)), get)
    assert caught.value is error
    assert threading.active_count() < 10


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").write_bytes(b"old")
    cases = {
        "directory": "found a directory",
        "directory/": "found a directory",
        "new/": "expected the path of a file",
        "directory/..": "found a directory",
        "missing/f": "missing does not exist; create it first",
        "file/f": "not a directory",
        "nul\0": "null",
        "n" * 250: "shorter name",
    }
    for name, message in cases.items():
        path = f"{tmp_path}/{name}"
        with unchanged(tmp_path), pytest.raises(FileError, match=message) as caught:
            save(path)
        assert path in str(caught.value)
        with unchanged(tmp_path), pytest.raises(FileError, match=message):
            atomic.write_bytes(path, b"new")


@contextlib.contextmanager
def without_privileges() -> Iterator[None]:
    """Root passes every permission check: be nobody for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_no_permission(tmp_path: Path) -> None:
    # pytest's own directories are open to their owner only
    work = Path("/tmp") / f"jaxadapt-test-{os.getpid()}"
    work.mkdir(mode=0o755)
    try:
        save(work / "f")
        (work / "f").chmod(0o000)
        work.chmod(0o555)
        with without_privileges():
            with pytest.raises(FileError, match=r"f: cannot write: .*denied.*untouched.*permissions"):
                save(work / "f")
            with pytest.raises(FileError, match=r"f: cannot read: .*denied.*permissions"):
                safetensors.read_header(work / "f")
        work.chmod(0o755)
        assert names(work) == ["f"]
    finally:
        work.chmod(0o755)
        (work / "f").unlink(missing_ok=True)
        work.rmdir()


@contextlib.contextmanager
def mounted(where: Path, options: str) -> Iterator[None]:
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(where)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("cannot mount a file system here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(where)], check=True)


def test_disk_full(tmp_path: Path) -> None:
    with mounted(tmp_path, "size=4m"):
        save(tmp_path / "f", 1)
        with (
            unchanged(tmp_path),
            pytest.raises(FileError, match=r"f: cannot write: No space.*untouched; free some"),
        ):
            save(tmp_path / "f", 20)
        save(tmp_path / "f", 1)


def test_read_only_file_system(tmp_path: Path) -> None:
    with mounted(tmp_path, "size=1m"):
        save(tmp_path / "f", 0.1)
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path)], check=True)
        with unchanged(tmp_path), pytest.raises(FileError, match="read-only: choose another path"):
            save(tmp_path / "f", 0.1)


def test_file_size_limit(tmp_path: Path) -> None:
    save(tmp_path / "f", 0.1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:  # Python ignores SIGXFSZ, so the write fails halfway
        with (
            unchanged(tmp_path),
            pytest.raises(FileError, match=r"f: cannot write: File too large.*ulimit -f"),
        ):
            save(tmp_path / "f", 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    save(tmp_path / "f", 2)


@pytest.mark.parametrize("call", ["fsync", "pwrite"])
def test_a_failing_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    save(tmp_path / "f")

    def fail(*args: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, call, fail)
    with (
        unchanged(tmp_path),
        pytest.raises(FileError, match=r"f: cannot write: Input/output error.*untouched"),
    ):
        save(tmp_path / "f", 10)


@pytest.mark.skipif(sys.platform != "linux", reason="posix_fadvise")
def test_a_large_file_leaves_the_cache_but_for_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, at, size, what: calls.append((at, size)))
    monkeypatch.setattr(atomic, "_WRITEBACK_BYTES", 10)
    monkeypatch.setattr(atomic, "_CACHED_BYTES", 20)
    with atomic.open_replacement(tmp_path / "f") as writer:
        for size in (9, 3, 8, 25):
            writer.write(memoryview(b"x" * size))
    assert (tmp_path / "f").read_bytes() == b"x" * 45
    # Started range by range, and the oldest dropped; but not the page of the header, which may be overwritten.
    assert calls == [(10, 10), (20, 10), (30, 10), (10, 10)]


def test_a_system_that_writes_little_at_an_offset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:2], at))
    with (tmp_path / "f").open("wb") as file:
        atomic.write_at(file.fileno(), memoryview(b"abcdef"), 1, "f")
    assert (tmp_path / "f").read_bytes() == b"\0abcdef"


@pytest.mark.parametrize("most", [1, 5, 6, 7, 100])
def test_a_system_that_writes_little_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    parts = [bytes([n]) * n for n in (3, 0, 5, 1, 6, 2)]
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:most], at))
    with atomic.open_replacement(tmp_path / "f") as writer:
        for part in parts:
            writer.write(memoryview(part))
        writer.write(memoryview(b"end"))
    assert (tmp_path / "f").read_bytes() == b"".join(parts) + b"end"


def test_files_that_cannot_be_linked_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / "f", tmp_path / "g"]
    for path in paths:
        path.write_bytes(b"old")
    refused: list[object] = []

    def refuse(*args: object, **options: object) -> object:
        refused.append(args[0])
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with atomic.replacing_all(paths) as writers:
        for writer in writers:
            writer.write(memoryview(b"new"))
    assert len(refused) == 1  # the last file needs no link
    assert [(p.name, p.read_bytes()) for p in sorted(tmp_path.iterdir())] == [("f", b"new"), ("g", b"new")]


def test_the_directory_cannot_be_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync
    number = 5

    def fail(fd: int) -> None:
        if Path(f"/proc/self/fd/{fd}").is_dir():
            raise OSError(number, os.strerror(number))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(FileError, match="flush its directory: .* the new file is in place"):
        save(tmp_path / "f")
    number = 22  # EINVAL: a file system that does not do it
    save(tmp_path / "f")
