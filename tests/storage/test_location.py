"""Adapters and checkpoints behind addresses, in object stores on loopback: the same as on a disk."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import http.server
import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxadapt
from jaxadapt import cli
from jaxadapt.storage import hf_model, location, safetensors
from tests.persistence.test_sharded_files import numbers, original
from tests.support import leave, meshes, processes, small, stores, train_small
from tests.support.small import CARD, CONFIG, WEIGHTS, same

ROOT = Path(__file__).resolve().parents[2]
_number = itertools.count()


@pytest.fixture(scope="module")
def started() -> Iterator[Callable[[str], str]]:
    """The bucket of a kind; its server is started once."""
    with contextlib.ExitStack() as stack:
        yield functools.cache(lambda kind: stack.enter_context(stores.start(kind)))


@pytest.fixture(scope="module", params=stores.KINDS)
def bucket(request: pytest.FixtureRequest, started: Callable[[str], str]) -> str:
    return started(request.param)


@pytest.fixture
def s3(started: Callable[[str], str]) -> str:
    return started("s3")


@pytest.fixture
def gs(started: Callable[[str], str]) -> str:
    return started("gs")


@pytest.fixture
def place(bucket: str) -> str:
    """A folder where nothing is yet."""
    return f"{bucket}/{next(_number)}"


def fail_to_put(monkeypatch: pytest.MonkeyPatch, place: str, name: str) -> None:
    fs = location.to_location(place).store()[0]
    put = fs.put_file

    def failing(local: str, remote: str, **options: Any) -> None:
        if f"/{name}" in remote:  # or a temporary beside it
            raise OSError("the connection is gone")
        put(local, remote, **options)

    monkeypatch.setattr(fs, "put_file", failing)


# ---------------------------------------------------------------- adapters


def test_the_same_files_as_on_a_disk(place: str, tmp_path: Path):
    model = small.trained()
    for name in ("default", "other"):
        if name == "other":
            small.trained(small.IA3, seed=4, name=name, model=model)
        jaxadapt.save(model, place, name=name)
        jaxadapt.save(model, tmp_path, name=name)
    assert stores.files(place) == small.files(tmp_path)
    assert set(stores.files(place)) == {f"{under}{n}" for under in ("", "other/") for n in (CARD, CONFIG, WEIGHTS)}

    held, local = jaxadapt.read(place), jaxadapt.read(tmp_path)
    assert (held.config, held.source) == (local.config, place)
    assert same(dict(held.tensors), dict(local.tensors))
    assert dataclasses.replace(jaxadapt.inspect(place), path=str(tmp_path)) == jaxadapt.inspect(tmp_path)
    assert jaxadapt.read_config(f"{place}/{CONFIG}") == jaxadapt.read_config(place) == local.config
    jaxadapt.write(held, f"{place}/again/")
    assert stores.files(f"{place}/again") == {n: v for n, v in stores.files(place).items() if "/" not in n}

    for name in ("default", "other"):
        want = jaxadapt.extract(model, name=name)
        assert same(jaxadapt.extract(jaxadapt.load(place, small.net(), name=name), name=name).params, want.params)
        assert same(jaxadapt.extract(jaxadapt.load(place, small.base(), name=name), name=name).params, want.params)


def test_what_was_there_is_replaced(place: str, tmp_path: Path):
    """Another configuration over the first: the files are those of a save to a new place, and a person's card stays."""
    jaxadapt.save(small.trained(), place)
    location.to_location(f"{place}/{CARD}").put(str(_written(tmp_path / "card", b"# Mine\n")))
    jaxadapt.save(small.trained(small.IA3), place)
    jaxadapt.save(small.trained(small.IA3), tmp_path / "new")
    assert stores.files(place) == {**small.files(tmp_path / "new"), CARD: b"# Mine\n"}


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("torn", [CONFIG, WEIGHTS])
def test_a_save_that_fails_between_its_files(torn: str, place: str, monkeypatch: pytest.MonkeyPatch):
    """The weights go first, and their header says which configuration they replace: a torn pair is seen to be one."""
    before, after = small.trained(), small.trained(small.LORA.replace(lora_alpha=12), seed=7)
    jaxadapt.save(before, place)
    fail_to_put(monkeypatch, place, torn)
    with pytest.raises(jaxadapt.FileError, match="the connection is gone"):
        jaxadapt.save(after, place)
    assert set(stores.files(place)) == {CARD, CONFIG, WEIGHTS}
    if torn == WEIGHTS:
        found, want = jaxadapt.read(place), before
    else:
        with pytest.warns(UserWarning, match="a save was interrupted after the weights"):
            found = jaxadapt.read(place)
        want = after
    assert found.config.lora_alpha == jaxadapt.extract(want).config.lora_alpha
    assert same(dict(found.tensors), {k: np.asarray(v) for k, v in jaxadapt.to_peft(want).tensors.items()})


def test_a_put_that_fails_leaves_nothing(place: str, monkeypatch: pytest.MonkeyPatch):
    fs = location.to_location(place).store()[0]

    def failing(local: str, remote: str, **_: Any) -> None:
        fs.pipe_file(remote, b"half") if location.to_location(place).scheme == "memory" else None
        raise OSError("broken pipe")

    monkeypatch.setattr(fs, "put_file", failing)
    with pytest.raises(jaxadapt.FileError, match=f"{place}/{WEIGHTS}: cannot write: OSError: broken pipe"):
        jaxadapt.save(small.trained(), place)
    assert stores.files(place) == {}


def test_large_files_go_and_come_in_parts(place: str, monkeypatch: pytest.MonkeyPatch):
    """gcsfs uploads in parts beyond 5 MB, s3fs beyond 100 (here 10): what arrives is one object."""
    if place.startswith("s3"):
        monkeypatch.setattr("s3fs.core.calculate_chunksize", lambda size, chunksize: 5 << 20)
    value = np.arange(3 << 20, dtype="u4").reshape(-1, 1024)
    safetensors.write(f"{place}/big", {"x": ("U32", value.shape)}, lambda _: value)
    with safetensors.TensorFile(f"{place}/big") as held:
        assert np.array_equal(held["x"], value)
        for rows in (slice(0, 1), slice(1500, 1600), slice(2500, None)):
            assert np.array_equal(held.read_slice("x", [rows]), value[rows])
        assert np.array_equal(held.read_slice("x", [slice(None), slice(3, 5)]), value[:, 3:5])
    location.to_location(f"{place}/big").unlink()


def test_whole_models_and_the_command_line(place: str, tmp_path: Path):
    """What takes a folder takes an address: base models, merging, another layout."""
    lines = [jaxadapt.Weight(f"{m}.kernel", f"{m}.weight", "i o -> o i") for m in ("q_proj", "up_proj")]
    table = jaxadapt.KeyMap("mine", tuple(lines))
    params = {name: {"kernel": leaves["kernel"]} for name, leaves in small.base()["params"].items()}
    for folder in (f"{place}/base", tmp_path / "base"):
        jaxadapt.export.export_base(params, folder, keymap=table, max_shard_size=100)
    location.to_location(f"{place}/base/config.json").put(str(_written(tmp_path / "base" / "config.json", b"{}")))
    assert stores.files(f"{place}/base") == small.files(tmp_path / "base")
    assert "model-00002-of-00002.safetensors" in stores.files(f"{place}/base")
    assert same(jaxadapt.export.import_base(f"{place}/base", params, keymap=table), params)

    jaxadapt.save(small.adapter(), f"{place}/adapter")
    jaxadapt.save(small.adapter(), tmp_path / "adapter")
    for folder in (place, str(tmp_path)):
        args = ["merge", f"{folder}/base", f"{folder}/adapter", "--out", f"{folder}/merged"]
        result = CliRunner().invoke(cli.main, args)
        assert result.exit_code == 0, result.output
    assert stores.files(f"{place}/merged") == small.files(tmp_path / "merged")
    again = CliRunner().invoke(cli.main, ["merge", f"{place}/base", f"{place}/adapter", "--out", f"{place}/base/"])
    assert "this is the base model" in again.output


# ---------------------------------------------------------------- reading no more than is needed


def use_blocks(monkeypatch: pytest.MonkeyPatch, size: int, head: int | None = None) -> None:
    """Fetch blocks of so many bytes, and as many when an object is opened."""
    for name, count in (("_HEAD", head or size), ("_BLOCK", size)):
        monkeypatch.setattr(location, name, count)


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The ranges that are asked for in memory://, in blocks of 4000 bytes."""
    from fsspec.implementations.memory import MemoryFileSystem

    asked: list[tuple[int, int]] = []
    cat = MemoryFileSystem.cat_file

    def cat_file(self: Any, path: str, start: int | None = None, end: int | None = None, **more: Any) -> bytes:
        if path.endswith(WEIGHTS):
            asked.append((start or 0, -1 if end is None else end))
        return cat(self, path, start, end, **more)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    use_blocks(monkeypatch, 4000)
    return asked


def test_a_header_is_one_request(requests: list[tuple[int, int]]):
    jaxadapt.write(jaxadapt.to_peft(small.host_adapter(width=4000)), "memory://header")
    requests.clear()
    assert jaxadapt.inspect("memory://header").parameters == 4 * 8000
    assert requests == [(0, 4000)]


def test_only_the_bytes_of_a_slice_are_read(requests: list[tuple[int, int]]):
    value = np.arange(40_000, dtype="f4").reshape(100, 400)
    safetensors.write(f"memory://slice/{WEIGHTS}", {"x": ("F32", value.shape)}, lambda _: value)
    with safetensors.TensorFile(f"memory://slice/{WEIGHTS}") as held:
        requests.clear()
        start = held.header.data_start
        assert np.array_equal(held.read_slice("x", [slice(50, 60)]), value[50:60])  # 16 KB: a request of its own
        assert requests == [(start + 50 * 1600, start + 60 * 1600)]
        requests.clear()
        assert np.array_equal(held.read_slice("x", [slice(70, 71), slice(0, 100)]), value[70:71, :100])
        assert np.array_equal(held.read_slice("x", [slice(70, 71), slice(20, 90)]), value[70:71, 20:90])
        assert requests == [(112_000, 116_000)]  # the block they lie in, fetched once


def test_each_device_gets_its_part_and_no_byte_is_read_twice(requests: list[tuple[int, int]]):
    mesh = Mesh(np.array(jax.devices()).reshape(8), ("x",))
    adapter = small.host_adapter(width=800)
    adapter = jax.tree.map(lambda x: x + np.arange(x.size, dtype="f4").reshape(x.shape), adapter)
    jaxadapt.save(adapter, "memory://parts")
    spec = jax.ShapeDtypeStruct((800, 800), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("x")))
    base = {"params": {name: {"kernel": spec} for name in ("q_proj", "up_proj")}}
    requests.clear()
    found = jaxadapt.extract(jaxadapt.load("memory://parts", base))
    assert same(found.params, adapter.params)
    assert len({str(s.index) for s in found.flat()["q_proj.kernel.lora_A"].addressable_shards}) == 8
    asked = sum(end - start for start, end in requests)
    assert (
        asked < location.total_size(location.to_location(f"memory://parts/{WEIGHTS}")) + 4000
    )  # what begins in the head comes again


def test_many_threads_share_a_block(requests: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch):
    use_blocks(monkeypatch, 100_000, head=4000)
    value = np.arange(24_000, dtype="f4").reshape(-1, 10)
    safetensors.write(f"memory://threads/{WEIGHTS}", {"x": ("F32", value.shape)}, lambda _: value)
    with safetensors.TensorFile(f"memory://threads/{WEIGHTS}") as held:
        requests.clear()
        wrong: list[int] = []

        def read(number: int) -> None:
            for row in range(1000 + number, 2000, 8):
                if not np.array_equal(held.read_slice("x", [slice(row, row + 1)]), value[row : row + 1]):
                    wrong.append(row)

        threads = [threading.Thread(target=read, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (wrong, len(requests)) == ([], 1)


@pytest.mark.usefixtures("requests")
def test_a_block_is_fetched_by_its_reader_and_again_after_an_error(monkeypatch: pytest.MonkeyPatch):
    """No thread can be started while a program ends, and an error must not stay in the cache."""
    from fsspec.implementations.memory import MemoryFileSystem

    value = np.arange(40_000, dtype="f4").reshape(100, 400)
    safetensors.write(f"memory://again/{WEIGHTS}", {"x": ("F32", value.shape)}, lambda _: value)
    with safetensors.TensorFile(f"memory://again/{WEIGHTS}") as held:
        fetch, threads = MemoryFileSystem.cat_file, list[threading.Thread]()

        def fail_once(self: Any, *args: Any, **options: Any) -> bytes:
            threads.append(threading.current_thread())
            if len(threads) == 1:
                raise OSError("the connection is gone")
            return fetch(self, *args, **options)

        monkeypatch.setattr(MemoryFileSystem, "cat_file", fail_once)
        with pytest.raises(jaxadapt.FileError, match="the connection is gone"):
            held.read_slice("x", [slice(70, 71), slice(0, 100)])
        assert np.array_equal(held.read_slice("x", [slice(70, 71), slice(0, 100)]), value[70:71, :100])
        assert threads == [threading.current_thread()] * 2


@pytest.mark.usefixtures("requests")
def test_an_object_that_is_replaced_while_it_is_read():
    """Of the same size, so that nothing but what the store says of it tells."""
    address = "memory://replaced"
    jaxadapt.write(jaxadapt.to_peft(small.host_adapter(width=800)), address)
    with pytest.raises(jaxadapt.FormatError, match=f"{WEIGHTS}: the object was replaced while"):  # noqa: PT012, SIM117
        with safetensors.TensorFile(f"{address}/{WEIGHTS}") as held:
            _ = held[next(iter(held))]
            jaxadapt.write(jaxadapt.to_peft(small.host_adapter(width=800, fill=2)), address)
    assert not jaxadapt.read(address).tensors.keys() ^ held.keys()


# ---------------------------------------------------------------- checkpoints


def test_resuming_from_a_store(place: str):
    """8 steps in one go, against 3, and 5 more by another manager; optimizer, dropout and position included."""
    whole, first, second = (train_small.APIS["linen"]() for _ in range(3))
    expected = [whole.step() for _ in range(8)]
    with jaxadapt.CheckpointManager(place) as manager:
        for step in range(1, 4):
            assert first.step() == expected[step - 1]
            first.save(manager, step)
    assert second.restore(jaxadapt.CheckpointManager(place)) == 3
    assert [second.step() for _ in range(5)] == expected[3:]


def test_which_steps_stay_in_a_store(place: str, tmp_path: Path):
    with jaxadapt.CheckpointManager(place, keep=2, keep_best=1, keep_every=3, minimize="loss") as manager:
        for step, loss in enumerate([5, 1, 4, 2, 3, 6]):
            manager.save(step, small.adapter(seed=step), metrics={"loss": loss})
    names = [f"step-{s:09d}.safetensors" for s in (0, 1, 3, 4, 5)]
    assert sorted(stores.files(place)) == names
    assert (manager.steps, manager.latest, manager.best) == ([0, 1, 3, 4, 5], 5, 1)
    again = jaxadapt.CheckpointManager(f"{place}/", maximize="loss")
    assert (again.best, again.metrics(1)) == (5, {"loss": 1.0})
    assert same(again.adapter(3).params, jax.tree.map(np.asarray, small.adapter(seed=3).params))
    again.export(again.best, f"{place}/peft")
    jaxadapt.save(small.adapter(seed=5), tmp_path)
    assert stores.files(f"{place}/peft") == small.files(tmp_path)
    with pytest.raises(jaxadapt.FileError, match=r"cannot save step 2, .* \(3, 4, 5\); go back with rollback\(1\)"):
        again.save(2, small.adapter())
    again.rollback(1)
    again.save(2, small.adapter(seed=20))
    again.save(2, small.adapter(seed=21))  # replaced
    assert again.restore(small.adapter()).step == 2
    assert again.steps == [0, 1, 2]
    assert same(again.restore(small.adapter()).model.params, small.adapter(seed=21).params)


def test_a_run_in_a_store_from_the_command_line(place: str, tmp_path: Path):
    with jaxadapt.CheckpointManager(f"{place}/run") as manager:
        for step, loss in enumerate([0.5, 0.25, 0.75]):
            manager.save(step, small.adapter(seed=step), metrics={"loss": loss})

    def run(*args: str) -> str:
        result = CliRunner().invoke(cli.main, args)
        assert result.exit_code == 0, result.output
        return result.output

    listed = json.loads(run("checkpoints", f"{place}/run", "--minimize", "loss", "--json"))
    assert listed["folder"] == f"{place}/run"
    assert [(s["step"], s["metrics"]["loss"], s["best"]) for s in listed["steps"]] == [
        (0, 0.5, False), (1, 0.25, True), (2, 0.75, False)
    ]  # fmt: skip
    assert "0.25" in run("checkpoints", f"{place}/run")
    out = f"{place}/best"
    export = run("checkpoints", f"{place}/run", "--minimize", "loss", "--step", "best", "--export", out, "--json")
    assert json.loads(export) == {"step": 1, "folder": out}
    jaxadapt.save(small.adapter(seed=1), tmp_path)
    assert stores.files(out) == small.files(tmp_path)
    assert json.loads(run("inspect", out, "--json"))["parameters"] == 56


def test_an_error_of_the_store_in_the_background_is_raised(s3: str, gs: str):
    for address in (s3, gs):
        manager = jaxadapt.CheckpointManager(address.replace("bucket", "nobucket/run"))
        manager.save(1, small.host_adapter())
        with pytest.raises(jaxadapt.FileError, match="nobucket/run/step-000000001.safetensors: cannot write: there is"):
            manager.wait()


def leaving(how: str, address: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.support.leave", how, address]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)


def test_leaving_without_waiting_lands_the_checkpoint_in_a_store(s3: str):
    """It lands, or the program says that it did not. (Why a hook before `atexit` is needed: test_background.py.)"""
    address = f"{s3}/{next(_number)}"
    run = leaving("end", address)
    assert run.returncode == 0, run.stderr
    assert "unfinished" in run.stdout, "the save was over before the program was left: the test tests nothing"
    back = jaxadapt.CheckpointManager(address).restore(leave.adapter(0))
    assert same(back.model.params, leave.adapter().params)
    failed = leaving("end", address.replace("bucket", "nobucket"))
    assert failed.returncode == 1
    assert "a checkpoint was not saved" in failed.stderr
    assert "there is no such bucket" in failed.stderr


@pytest.mark.parametrize(("kind", "what"), [("s3", "folder"), ("gs", "manager")])
def test_a_killed_save_leaves_the_old_or_the_new(kind: str, what: str, started: Callable[[str], str]):
    """A few kills; 50 each in tests/full/test_kill.py."""
    command = [sys.executable, "-m", "tests.support.kill_store", what, f"{started(kind)}/{next(_number)}", "6"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


# ---------------------------------------------------------------- what cannot be


@pytest.mark.parametrize("call", ["read", "inspect", "read_config", "load"])
def test_where_nothing_is(call: str, place: str):
    arguments = (small.net(),) if call == "load" else ()
    with pytest.raises(jaxadapt.FileError, match=f"{place}: .*expected a folder that contains {CONFIG}"):
        getattr(jaxadapt, call)(place, *arguments)


def test_an_address_without_an_adapter_says_what_is_there(place: str):
    jaxadapt.save(small.trained(), f"{place}/inner")
    with pytest.raises(
        jaxadapt.FileError, match=rf"{place}: no {CONFIG} and .*; found inner; these subfolders contain adapters"
    ):
        jaxadapt.read(place)
    with pytest.raises(jaxadapt.FileError, match=f"{WEIGHTS}: expected a folder that contains .* found a file"):
        jaxadapt.read(f"{place}/inner/{WEIGHTS}")


def test_no_such_bucket(s3: str):
    address = s3.replace("bucket", "nobucket")
    with pytest.raises(jaxadapt.FileError, match="s3://nobucket/a: the bucket does not exist"):
        jaxadapt.read(f"{address}/a")
    with pytest.raises(jaxadapt.FileError, match=f"s3://nobucket/a/{WEIGHTS}: cannot write: there is no such bucket"):
        jaxadapt.save(small.trained(), f"{address}/a")


@pytest.fixture
def fresh_s3(s3: str) -> Iterator[str]:
    """With nothing kept of former sessions, and one attempt a request."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    retries, s3fs.S3FileSystem.retries = s3fs.S3FileSystem.retries, 1
    with stores.environment(AWS_MAX_ATTEMPTS="1"):
        yield s3
    s3fs.S3FileSystem.retries = retries
    s3fs.S3FileSystem.clear_instance_cache()


def refused(bucket: str, why: str) -> None:
    """Whatever is asked for, the error names the address and says why."""
    for call in (
        lambda: jaxadapt.read(f"{bucket}/a"),
        lambda: jaxadapt.save(small.trained(), f"{bucket}/a"),
        lambda: jaxadapt.CheckpointManager(f"{bucket}/a").save(1, small.host_adapter()),
    ):
        with pytest.raises(jaxadapt.FileError, match=f"{bucket}/a.*: cannot .*: {why}"):
            call()


def test_no_credentials(fresh_s3: str, tmp_path: Path):
    nothing = dict.fromkeys(stores.KEYS)
    with stores.environment(**nothing, AWS_SHARED_CREDENTIALS_FILE=str(tmp_path), AWS_CONFIG_FILE=str(tmp_path / "no")):
        refused(fresh_s3, "there are no credentials for it .*AWS_ACCESS_KEY_ID")


def test_not_allowed(fresh_s3: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("moto.settings.INITIAL_NO_AUTH_ACTION_COUNT", 0)  # from now on the server looks at the keys
    refused(fresh_s3, "the store does not allow it .*; check the credentials")


def test_no_connection(fresh_s3: str):
    with stores.environment(AWS_ENDPOINT_URL="http://localhost:9"):
        refused(fresh_s3, "the connection failed .*; check the network")


def test_addresses_that_nothing_knows(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(jaxadapt.FileError, match="nowhere://x/y: Protocol not known: nowhere; expected a path, or"):
        jaxadapt.read("nowhere://x/y")
    with pytest.raises(jaxadapt.FileError, match="hf://org/name: expected a local folder; upload to the Hub"):
        jaxadapt.CheckpointManager("hf://org/name")
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(jaxadapt.FileError, match=r"s3://b/run: s3:// needs a package .*; pip install 'jaxadapt\[s3\]'"):
        jaxadapt.CheckpointManager("s3://b/run")
    with pytest.raises(jaxadapt.FileError, match=r"s3://b/a.*pip install 'jaxadapt\[s3\]'"):
        jaxadapt.save(small.trained(), "s3://b/a")


def test_a_url_of_this_machine_is_a_path(tmp_path: Path):
    jaxadapt.save(small.trained(), f"file://{tmp_path}/a")
    assert set(small.files(tmp_path / "a")) == {CARD, CONFIG, WEIGHTS}
    assert jaxadapt.read(f"file://{tmp_path}/a").config.r == 2


# ---------------------------------------------------------------- Orbax


def test_orbax_on_gs(gs: str):
    address = f"{gs}/{next(_number)}"
    adapter = small.adapter(seed=5)
    jaxadapt.save(adapter, address, format="orbax")
    info = jaxadapt.inspect(address)
    assert (info.parameters, info.file_bytes) == (56, sum(map(len, stores.files(address).values())))
    assert same(jaxadapt.extract(jaxadapt.load(address, small.base())).params, adapter.params)
    with pytest.raises(jaxadapt.FileError, match="the path exists"):
        jaxadapt.save(adapter, address, format="orbax")
    location.to_location(f"{address}/commit_success.txt").unlink()  # as a writer that was killed leaves it
    with pytest.raises(jaxadapt.FileError, match=f"no {CONFIG}"):
        jaxadapt.read(address)


def test_orbax_never_sees_s3(s3: str):
    address = f"{s3}/{next(_number)}"
    with pytest.raises(jaxadapt.FileError, match=f"{address}: Orbax cannot use s3://.*format='safetensors'"):
        jaxadapt.save(small.adapter(), address, format="orbax")
    assert stores.files(address) == {}
    assert not Path("s3:").exists()
    jaxadapt.save(small.adapter(), address, format="safetensors")  # as the error advises
    assert same(jaxadapt.extract(jaxadapt.load(address, small.base())).params, small.adapter().params)


# ---------------------------------------------------------------- several processes


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_several_processes_in_a_store(kind: str, started: Callable[[str], str], tmp_path: Path):
    """What nobody can write in parts process 0 gathers; the files are those of one process."""
    place = f"{started(kind)}/processes"
    processes.run("in_a_store", tmp_path, argument=place)
    jaxadapt.save(original(False), tmp_path / "one")
    assert stores.files(f"{place}/adapter") == {p.name: p.read_bytes() for p in (tmp_path / "one").iterdir()}
    exported = jaxadapt.from_peft(jaxadapt.read(f"{place}/exported"), meshes.base(False), keymap=meshes.TABLE)
    assert same(exported.flat(), numbers(False, 1))
    assert set(stores.files(f"{place}/run")) == {"step-000000001.safetensors"}


@pytest.mark.peft
def test_a_models_bin_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    torch = pytest.importorskip("torch")
    torch.save({"x": torch.arange(6.0)}, tmp_path / "pytorch_model.bin")
    place = location.to_location("memory://bin/pytorch_model.bin")
    assert isinstance(place, location.Address)
    place.put(str(tmp_path / "pytorch_model.bin"))
    fs = place.store()[0]
    get, fetched = fs.get_file, []
    monkeypatch.setattr(fs, "get_file", lambda remote, local: fetched.append(remote) or get(remote, local))
    with hf_model.open_model(location.to_location("memory://bin")) as tensors:
        np.testing.assert_array_equal(tensors.read("x"), np.arange(6, dtype="f4"))
    assert len(fetched) == 1


def test_a_configuration_that_cannot_be_read_is_not_a_missing_one(tmp_path: Path):
    """The base of an export may be given as a file in place of its folder."""
    for place in (tmp_path / "config.json", location.to_location("memory://nowhere/config.json")):
        assert hf_model.read_tied(place) is None
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(jaxadapt.FileError, match="a part of the path is a file, not a directory"):
        hf_model.read_tied(tmp_path / "model.safetensors" / "config.json")
    (tmp_path / "config.json").symlink_to("config.json")
    with pytest.raises(jaxadapt.FileError, match="links of the path form a loop"):
        hf_model.read_tied(tmp_path / "config.json")


# ---------------------------------------------------------------- texts of unknown size


@pytest.fixture
def silent_server() -> Iterator[str]:
    """A server that states no size. Its texts have 3000 bytes, or no end."""
    pytest.importorskip("aiohttp")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            with contextlib.suppress(OSError):  # the reader hangs up
                for _ in itertools.count() if self.path.endswith("endless") else range(3):
                    self.wfile.write(b"x" * 1000)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("localhost", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}"
        server.shutdown()


def test_a_text_whose_size_no_server_states(silent_server: str):
    assert location.read_text_bytes(location.to_location(f"{silent_server}/text")) == b"x" * 3000
    for name in ("text", "endless"):
        with pytest.raises(jaxadapt.FileError, match="expected text of at most 2999 bytes, found more; check"):
            location.read_text_bytes(location.to_location(f"{silent_server}/{name}"), 2999)


def test_a_text_whose_size_the_system_states_as_0():
    place = Path("/proc/self/status")
    if not place.exists():
        pytest.skip("needs /proc")
    assert place.stat().st_size == 0
    assert location.read_text_bytes(place).startswith(b"Name:")
    with pytest.raises(jaxadapt.FileError, match="expected text of at most 9 bytes, found more"):
        location.read_text_bytes(place, 9)
