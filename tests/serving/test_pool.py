"""The pool: names become slots, leases hold them, and an error belongs to the adapter that caused it."""

from __future__ import annotations

import gc
import os
import shutil
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxadapt
from jaxadapt import AttachError, FileError, serving
from jaxadapt.serving import pool as pools
from tests.support import small

LORA = small.LORA.replace(r=2)


def value(number: int) -> float:
    return float(number + 1)


def write(root: Path, name: str, number: int) -> None:
    """A folder whose lora_A is `value(number)` everywhere, so that a row shows whose it is."""
    adapter = small.adapter(LORA)
    flat = {path: np.full(x.shape, value(number), "f4") for path, x in adapter.flat().items()}
    jaxadapt.save(jaxadapt.Adapter(adapter.config, jaxadapt.core.paths.unflatten(flat), adapter.keymap), root / name)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    for number in range(8):
        write(root, f"a{number}", number)
    (root / "broken").mkdir()
    (root / "broken" / "adapter_config.json").write_text("{")
    (root / "notes").mkdir()
    return root


def make(folders, slots=4, **options) -> serving.AdapterPool:
    bank = serving.create(small.base(), LORA, slots=slots)
    return serving.AdapterPool(bank, small.base(), folders, **options)


def marks(pool, ids) -> list[float]:
    return pool.select(ids).arrays[0]["lora_A"][:, 0, 0].tolist()


def on_reading(monkeypatch, call) -> None:
    """Call a function with the name of each adapter whose weights are opened, before they are."""
    original = os.open

    def opening(path, *args, **options):
        if str(path).endswith("adapter_model.safetensors"):
            call(Path(path).parent.name)
        return original(path, *args, **options)

    monkeypatch.setattr(os, "open", opening)


def test_rows_get_their_adapters_and_the_base(folders):
    pool = make(folders)
    assert pool.names() == [*(f"a{n}" for n in range(8)), "broken"]
    with pool.lease(["a3", None, "a1", "a3"]) as ids:
        assert marks(pool, ids) == [value(3), 0, value(1), value(3)]
        assert ids.versions[0] == ids.versions[3] == pool.version("a3").id != ids.versions[2]
        assert (ids.versions[1], ids[1], len(ids)) == (0, 0, 4)
        assert pool.select([[ids[0], ids[2]]], weights=[[0.5, 2.0]]).how == "mixture"
        assert pool.select(ids, implementation="layer").how == "layer"
    assert pool.version("a3").config.r == 2
    assert pool.version("a3").nbytes > 100


def test_the_least_recently_used_adapter_without_a_lease_leaves(folders):
    pool = make(folders, slots=3)
    with pool.lease(["a0"]):
        for name in ("a1", "a2", "a3"):
            with pool.lease([name]):
                assert sorted(pool.resident()) == ["a0", name]
        with (
            pool.lease(["a1"]),
            pytest.raises(AttachError, match="other leases hold 2 of the 2 slots"),
            pool.lease(["a2"]),
        ):
            pass
    with pool.lease(["a1", "a2"]):
        assert sorted(pool.resident()) == ["a1", "a2"]


def test_a_lease_waits_for_another_to_end(folders, monkeypatch):
    """The end of the other lease wakes it, not the end of its own time."""
    pool, woken = make(folders, slots=2), []
    original = pool._changed.wait
    monkeypatch.setattr(pool._changed, "wait", lambda left: woken.append(original(left)))
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with pool.lease(["a0"]):
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait(10)
    threading.Timer(0.1, leave.set).start()
    with pool.lease(["a1"], wait=10) as ids:
        assert marks(pool, ids) == [value(1)]
    thread.join()
    assert woken
    assert all(woken)


def test_two_leases_that_hold_a_part_of_their_slots_cannot_block_each_other(folders, monkeypatch):
    """Both batches need both slots, and have loaded one adapter when they load the other."""
    pool, found, both = make(folders, slots=3), {}, threading.Barrier(2)
    on_reading(monkeypatch, lambda name: both.wait(120) if name in ("a1", "a3") else None)

    def batch(names: list[str]) -> None:
        with pool.lease(names, wait=120) as ids:
            found[names[0]] = marks(pool, ids)

    threads = [threading.Thread(target=batch, args=(names,)) for names in (["a0", "a1"], ["a2", "a3"])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"a0": [value(0), value(1)], "a2": [value(2), value(3)]}


def queue(pool, names: list[str], found: list) -> threading.Thread:
    """A thread whose lease waits; it adds its names and what its rows hold to `found`."""

    def batch() -> None:
        with pool.lease(names, wait=120) as ids:
            found.append((names, marks(pool, ids)))

    before = len(pool._queue)
    thread = threading.Thread(target=batch)
    thread.start()
    end = time.monotonic() + 120
    while len(pool._queue) == before and time.monotonic() < end:
        time.sleep(0.001)
    assert len(pool._queue) == before + 1
    return thread


def test_leases_get_their_turns_in_order_and_load_again_what_lost_its_slot(folders):
    """The second batch needs one free slot only, and the third finds a0 in a slot when it comes."""
    pool, found = make(folders, slots=3, host_bytes=0), []
    with pool.lease(["a0"]):
        pass
    with pool.lease(["a2"]):
        threads = [queue(pool, names, found) for names in (["a3", "a4"], ["a5"], ["a0", "a1"])]
        with pytest.raises(AttachError, match="'a0' into slots: an earlier lease waits for slots"), pool.lease(["a0"]):
            pass
        assert len(pool._pins) == 1
    for thread in threads:
        thread.join()
    assert found == [
        (["a3", "a4"], [value(3), value(4)]),
        (["a5"], [value(5)]),
        (["a0", "a1"], [value(0), value(1)]),
    ]
    failed = {}
    with (
        pytest.raises(AttachError, match="cannot lease 3 adapters at once: the bank has 2 slots"),
        pool.lease(["a0", "a1", "a2"], wait=120, failed=failed),
    ):
        pass
    assert not failed
    assert not pool._queue


def test_an_error_belongs_to_its_own_adapter(folders):
    pool = make(folders)
    failed = {}
    with pool.lease(["a0", "broken", "nobody", None], failed=failed) as ids:
        found = marks(pool, ids)
    assert found[0] == value(0)
    assert np.isnan(found[1:3]).all()
    assert found[3] == 0
    assert set(failed) == {"broken", "nobody"}
    assert "broken" in str(failed["broken"])
    with pytest.raises(AttachError, match="no adapter 'nobody'"), pool.lease(["a0", "nobody"]):
        pass
    with pytest.raises(AttachError, match=r"(?s)broken:.*nobody:"), pool.lease(["broken", "nobody"]):
        pass
    assert not pool._pins


@pytest.mark.parametrize(("module", "function"), [(pools, "read"), (pools, "write_slot")])
def test_a_lease_that_failed_once_is_followed_by_others(folders, monkeypatch, module, function):
    pool, original, errors = make(folders, slots=2), getattr(module, function), [FileError("once")]

    def fail_once(*args):
        if errors:
            raise errors.pop()
        return original(*args)

    monkeypatch.setattr(module, function, fail_once)
    with pytest.raises(FileError, match="once"), pool.lease(["a0"]):
        pass
    for number in (0, 1, 0):
        with pool.lease([f"a{number}"]) as ids:
            assert marks(pool, ids) == [value(number)]


def test_a_name_gets_a_new_version_while_the_old_one_is_leased(tmp_path):
    write(tmp_path, "a", 0)
    pool = make(tmp_path)
    with pool.lease(["a"]) as old:
        write(tmp_path, "a", 5)
        assert pool.add("a", tmp_path / "a").id != old.versions[0]
        with pool.lease(["a"]) as new:
            assert marks(pool, old) == [value(0)]
            assert marks(pool, new) == [value(5)]
            assert old.versions != new.versions
    assert pool.add("a", tmp_path / "a").id == new.versions[0]


def test_a_lease_sees_changed_files_of_an_adapter_in_a_slot(tmp_path):
    write(tmp_path, "a", 0)
    pool = make(tmp_path)
    with pool.lease(["a"]) as old:
        write(tmp_path, "a", 5)
        with pool.lease(["a"]) as new, pool.lease(["a"]) as again:
            assert (marks(pool, old), marks(pool, new)) == ([value(0)], [value(5)])
            assert again.versions == new.versions != old.versions
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(FileError, match="cannot read the adapter folder"), pool.lease(["a"]):
        pass


def test_host_memory_keeps_to_its_budget_and_saves_reading(folders, monkeypatch):
    bank = serving.create(small.base(), LORA, slots=2)
    pool = serving.AdapterPool(bank, small.base(), folders, host_bytes=2 * bank.layout.slot_bytes)
    read = []
    on_reading(monkeypatch, read.append)
    for future in pool.prefetch(["a0", "a1"]).values():
        future.result(30)
    for name in ("a0", "a1", "a0", "a2", "a1"):
        with pool.lease([name]):
            assert len(pool._host) <= 2
    assert sorted(read[:2]) == ["a0", "a1"]
    assert read[2:] == ["a2", "a1"]
    pool.close()
    small_pool = serving.AdapterPool(serving.create(small.base(), LORA, slots=2), small.base(), folders, host_bytes=1)
    with small_pool.lease(["a0"]):
        assert not small_pool._host


def test_an_adapter_that_is_being_read_is_read_once_whatever_host_memory_is_full_of(folders, monkeypatch):
    pool, read, go_on = make(folders, host_bytes=1), [], threading.Event()

    def wait_for_others(name):
        read.append(name)
        assert name != "a0" or go_on.wait(30)

    on_reading(monkeypatch, wait_for_others)
    first = pool.prefetch(["a0"])["a0"]
    with pool.lease(["a1"]):  # there is no room for it, and none for a0
        second = pool.prefetch(["a0"])["a0"]
        with pytest.raises(TimeoutError):
            second.result(0.5)
    go_on.set()
    assert first.result(30) == second.result(30)
    assert sorted(read) == ["a0", "a1"]
    pool.close()


def test_rows_take_adapters_by_name_as_in_peft(folders):
    pool = make(folders, slots=5)
    module = serving.attach(small.LinenNet(), pool._bank)
    x = np.stack([small.X[0]] * 4)
    names = ["a3", "__base__", {"a1": 0.5, "a2": -1.5}, None]
    with serving.route(module, pool, adapter_names=names) as routed:
        y = np.asarray(routed.apply(small.base(), x))
        assert len(pool._pins) == 3
    assert not pool._pins
    base = small.net()(x)
    np.testing.assert_array_equal(y[1], base[1])
    np.testing.assert_array_equal(y[3], base[3])
    alone = jaxadapt.merge(small.base()["params"], pool.adapter("a3"))
    np.testing.assert_allclose(y[0], small.LinenNet().apply({"params": alone}, x)[0], rtol=1e-5)
    w = {name: np.asarray(x["kernel"], "f8") for name, x in small.base()["params"].items()}
    for name, weight in names[2].items():
        merged = jaxadapt.merge(small.base()["params"], pool.adapter(name))
        for leaf in w:
            w[leaf] = w[leaf] + weight * (
                np.asarray(merged[leaf]["kernel"], "f8") - small.base()["params"][leaf]["kernel"]
            )
    want = np.tanh(x[2] @ w["q_proj"]) @ w["up_proj"]  # the biases are zero
    np.testing.assert_allclose(y[2], want, rtol=1e-4)
    with (
        pytest.raises(AttachError, match="expected the name of each row's adapter"),
        serving.route(module, pool),
    ):
        pass
    with (
        pytest.raises(AttachError, match="Rows with adapter_names"),
        serving.route(module, pool.select([0]), adapter_names=["a1"]),
    ):
        pass
    with pytest.raises(AttachError, match="no adapter 'nobody'"), serving.route(module, pool, adapter_names=["nobody"]):
        pass


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileError, match="cannot list"):
        make(tmp_path / "none")
    with pytest.raises(FileError, match="cannot read the adapter folder"):
        make({"a": tmp_path / "none"})


def test_five_thousand_known_adapters(folders, monkeypatch):
    """A lease reads the adapters that it names, and looks at no other folder."""
    pool = make({f"user{n}": folders / f"a{n % 8}" for n in range(5000)})
    looked: list[str] = []
    list_files = serving.pool.list_files
    monkeypatch.setattr(serving.pool, "list_files", lambda path: looked.append(str(path)) or list_files(path))
    with pool.lease(["user4999", "user1"]) as ids:
        assert marks(pool, ids) == [value(4999 % 8), value(1)]
    assert {*looked} == {str(folders / "a7"), str(folders / "a1")}
    assert len(looked) < 10


def exercise(folders: Path, seconds: float, threads: int = 4) -> int:
    """Lease, check every row, and end, from several threads; return the number of batches."""
    pool = make(folders, slots=5, host_bytes=700)  # of three adapters
    with pool.lease(["a0", None, "a1"]) as ids:  # compiles
        marks(pool, ids)
    compiled, live = programs(), live_bytes()
    stop, errors, counts = time.monotonic() + seconds, [], [0] * threads

    def work(number: int) -> None:
        rng = np.random.default_rng(number)
        try:
            while time.monotonic() < stop:
                numbers = rng.integers(-2, 8, 3).tolist()
                names = [None if n == -1 else "broken" if n == -2 else f"a{n}" for n in numbers]
                failed = {}
                with pool.lease(names, failed=failed, wait=60) as ids:
                    found = marks(pool, ids)
                for n, name, mark in zip(numbers, names, found, strict=True):
                    assert np.isnan(mark) if name in failed else mark == (0 if n == -1 else value(n))
                assert failed.keys() == {"broken"} & set(names)
                counts[number] += 1
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors, errors
    assert not pool._pins
    assert all(future.done() for future in pool._host.values())
    assert min(counts) > 0
    assert programs() == compiled
    gc.collect()
    assert live_bytes() <= live  # less where arrays of earlier tests are freed meanwhile
    return sum(counts)


def programs() -> tuple[int, int]:
    """The number of compiled programs of `put` and of `select`."""
    return serving.bank.write._cache_size(), serving.bank._gather_rows._cache_size()


def live_bytes() -> int:
    """The bytes of all arrays on the devices."""
    return sum(x.nbytes for x in jax.live_arrays())


def test_threads_lease_and_evict_and_each_row_is_its_own(folders):
    assert exercise(folders, 2) > 8


def test_a_name_that_is_no_text_is_refused(folders):
    pool = make(folders)
    with pytest.raises(AttachError, match="name of each row's adapter, or None for the base, found 3"), pool.lease([3]):
        pass
    with pytest.raises(AttachError, match="found 3"), pool.rows(["a1", 3]):
        pass
