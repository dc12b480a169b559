"""The pool and those who write its folders: an adapter's own files make its versions, and no save fails a lease."""

from __future__ import annotations

import os
import shutil
import threading

import pytest

from jaxadapt import AttachError, FileError
from jaxadapt.serving import pool as pools
from tests.serving.test_pool import make, marks, value, write
from tests.support.small import WEIGHTS


@pytest.fixture
def disturb(monkeypatch):
    """Call a function in the middle of the first readings, before the tensors are read."""

    def disturb(*changes) -> None:
        original, left = pools.read, list(changes)

        def read(path):
            if left:
                left.pop(0)()
            return original(path)

        monkeypatch.setattr(pools, "read", read)

    return disturb


def test_only_the_adapters_own_files_make_a_version(tmp_path):
    write(tmp_path, "a", 0)
    pool = make(tmp_path)
    first, folder = pool.version("a"), tmp_path / "a"
    assert first.nbytes == sum((folder / name).stat().st_size for name in ("adapter_config.json", WEIGHTS))
    for name in ("train.log", f".{WEIGHTS}.1.0123456789abcdef.tmp", "README.md", "optimizer.bin"):
        with (folder / name).open("a") as file:
            file.write("step 1\n")
        with pool.lease(["a"]) as ids:
            assert ids.versions == (first.id,)
    write(tmp_path, "a", 1)
    with pool.lease(["a"]) as ids:
        assert ids.versions != (first.id,)


def test_a_folder_replaced_by_one_of_equal_sizes_and_times_is_a_new_version(tmp_path):
    for number, name in enumerate("ab"):
        write(tmp_path, name, number)
        for path in (tmp_path / name).iterdir():
            os.utime(path, ns=(10**18, 10**18))
    pool = make({"a": tmp_path / "a"})
    with pool.lease(["a"]) as ids:
        assert marks(pool, ids) == [value(0)]
    (tmp_path / "a").rename(tmp_path / "old")
    (tmp_path / "b").rename(tmp_path / "a")
    with pool.lease(["a"]) as ids:
        assert marks(pool, ids) == [value(1)]


@pytest.mark.parametrize("way", ["lease", "prefetch", "adapter"])
def test_a_reading_that_a_save_disturbs_is_tried_again(tmp_path, disturb, way):
    write(tmp_path, "a", 0)
    pool = make(tmp_path)
    disturb(lambda: write(tmp_path, "a", 1))
    if way == "adapter":
        assert pool.adapter("a").flat()["q_proj.kernel.lora_A"][0, 0] == value(1)
        return
    if way == "prefetch":
        assert pool.prefetch(["a"])["a"].result(30) == pool.version("a")
    with pool.lease(["a"]) as ids:
        assert marks(pool, ids) == [value(1)]
        assert ids.versions == (pool.version("a").id,)
    pool.close()


def test_a_reading_that_is_disturbed_twice_fails_and_serves_no_old_values(tmp_path, disturb):
    """The writer is one that does not lock the folder, as PEFT's."""
    for number, name in enumerate("abc"):
        write(tmp_path, name, number)
        os.utime(tmp_path / name / WEIGHTS, ns=(number, number))  # the copies differ in their times on every system
    pool = make({"a": tmp_path / "a"})
    disturb(*(lambda name=name: shutil.copy2(tmp_path / name / WEIGHTS, tmp_path / "a" / WEIGHTS) for name in "bc"))
    with pytest.raises(FileError, match="the adapter changed while it was read"), pool.lease(["a"]):
        pass
    with pool.lease(["a"]) as ids:
        assert marks(pool, ids) == [value(2)]


def test_no_lease_fails_beside_a_saving_loop(tmp_path):
    """Each lease gets an adapter that was there while it was taken."""
    write(tmp_path, "a", 0)
    pool = make(tmp_path, host_bytes=0)
    begun, saved, stop = [0], [0], threading.Event()

    def save() -> None:
        while not stop.is_set():
            begun.append(begun[-1] + 1)
            write(tmp_path, "a", begun[-1])
            saved.append(begun[-1])

    thread = threading.Thread(target=save)
    thread.start()
    try:
        for _ in range(40):
            first = saved[-1]
            with pool.lease(["a"]) as ids:
                (mark,) = marks(pool, ids)
            assert value(first) <= mark <= value(begun[-1])
    finally:
        stop.set()
        thread.join()


def test_a_folder_added_beside_a_running_pool_is_found_by_the_next_lease(tmp_path):
    root = tmp_path / "adapters"
    write(root, "a", 0)
    write(tmp_path, "outside", 1)
    shutil.copytree(root / "a", tmp_path, dirs_exist_ok=True)  # so that ".." and "" would lead to an adapter
    pool = make(root)
    write(root, "b", 2)
    with pool.lease(["b", None, "a"]) as ids:
        assert marks(pool, ids) == [value(2), 0, value(0)]
    assert pool.names() == ["a", "b"]
    pool.remove("b")
    for name in ("b", "c", "..", ".", "", "../outside", str(tmp_path / "outside"), "b/", "a\0"):
        with pytest.raises(AttachError, match="the pool has no adapter"), pool.lease([name]):
            pass
    pool.add("b", root / "b")
    with pool.lease(["b"]) as ids:
        assert marks(pool, ids) == [value(2)]
    closed = make({"a": root / "a"})
    with pytest.raises(AttachError, match="the pool has no adapter 'b'"), closed.lease(["b"]):
        pass


def test_a_folder_with_a_circular_link_does_not_stop_the_pool(tmp_path):
    for number, name in enumerate("ab"):
        write(tmp_path, name, number)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "a" / WEIGHTS).unlink()
    (tmp_path / "a" / WEIGHTS).symlink_to(WEIGHTS)
    pool = make(tmp_path)
    failed = {}
    with pool.lease(["b", "a", "loop"], failed=failed) as ids:
        assert marks(pool, ids)[0] == value(1)
    assert failed.keys() == {"a", "loop"}
    assert WEIGHTS in str(failed["a"])


def test_a_folder_with_the_name_of_the_base_is_not_listed(tmp_path):
    for number, name in enumerate(["a", "__base__"]):
        write(tmp_path, name, number)
    with pytest.warns(UserWarning, match="'__base__' is the name of the base.*rename the folder"):
        pool = make(tmp_path)
    assert pool.names() == ["a"]
    with pool.lease(["__base__"]) as ids:
        assert marks(pool, ids) == [0]
    for wrong in (lambda: pool.add("__base__", tmp_path / "a"), lambda: make({"__base__": tmp_path / "a"})):
        with pytest.raises(AttachError, match="is the name of the base; choose another name"):
            wrong()
