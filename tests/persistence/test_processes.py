"""Several processes save one file: byte for byte that of one; and what happens when one of them fails or dies."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxadapt
from tests.persistence.test_sharded_files import numbers, original
from tests.support import hub_server, killed, meshes
from tests.support.processes import run

WEIGHTS = "adapter_model.safetensors"


def version_in(folder: Path) -> int:
    """Which of the two versions is there, whole."""
    found = jaxadapt.from_peft(jaxadapt.read(folder), meshes.base(False), keymap=meshes.TABLE).flat()
    for version in (0, 1):
        want = numbers(False, version)
        if all(np.array_equal(np.asarray(found[path]), want[path]) for path in want):
            return version
    raise AssertionError("the adapter is of neither version")


def test_two_processes_write_the_file_of_one(tmp_path: Path) -> None:
    write_the_file_of_one(tmp_path, count=2)


def write_the_file_of_one(tmp_path: Path, count: int) -> None:
    jaxadapt.save(original(False), tmp_path / "alone")
    with hub_server.serving() as hub:
        cache = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_CACHE": str(tmp_path / "cache")}
        env = {"HF_ENDPOINT": hub.url, **cache}
        said = run("save_and_load", tmp_path, count=count, devices=8 // count, env=env)
    pushed, repo = hub.files("org/spread"), hub.repos["org/spread"]
    assert repo.messages == ["initial commit", "LORA adapter, saved by jaxadapt"]  # one, and nothing new in the second
    addresses = [re.findall(r"hf://\S+", out) for out in said]  # among what gloo has to say
    assert addresses == [[f"hf://org/spread@{repo.refs['main']}"] * 2] * count
    saved = sorted(p.parent.name for p in tmp_path.glob("*/*.safetensors") if p.parent.name != "fresh")
    assert [name for name in saved if name.endswith("-all")] == [*(f"{i}-all" for i in range(8)), "nnx-all"]
    assert [name for name in saved if name.endswith("-one")] == ["0-one", "3-one", "6-one"]
    want = {name: (tmp_path / "alone" / name).read_bytes() for name in (WEIGHTS, "adapter_config.json", "README.md")}
    assert (pushed[WEIGHTS], pushed["adapter_config.json"]) == (want[WEIGHTS], want["adapter_config.json"])
    for name in saved:
        assert {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} == want, name
    assert "apart0" in saved
    assert not (tmp_path / "apart1").exists()
    # each process was told of what it wrote itself, and of all of it
    size = jaxadapt.inspect(tmp_path / "alone").nbytes
    for name in saved:
        told = [p.read_text().split() for p in sorted(tmp_path.glob(f"{name}-told.*"))]
        if name.endswith(("0-all", "-one")):
            assert len(told) == count
            assert sum(int(done) for _, done, _ in told) == size, name
        assert all(what == "save" and done == total for what, done, total in told), name
        assert not told or name.endswith("-all") or told[1][1] == "0"  # through process 0
    # fresh values do not depend on the devices either
    fresh = jaxadapt.from_peft(jaxadapt.read(tmp_path / "fresh"), meshes.base(False), keymap=meshes.TABLE)
    one = jaxadapt.init(meshes.base(False), meshes.CONFIG, key=jax.random.key(3), keymap=meshes.TABLE)
    for path, x in one.flat().items():
        np.testing.assert_array_equal(x, fresh.flat()[path])


def test_two_processes_have_the_fingerprint_of_one(tmp_path: Path) -> None:
    alone = {"params": jax.tree.map(jax.numpy.asarray, meshes.base(False)), **original(False).collection}
    jaxadapt.save(alone, tmp_path / "alone")
    said = run("on_bases", tmp_path, count=2, devices=4)
    expected = jaxadapt.read(tmp_path / "alone").fingerprint
    assert expected is not None
    assert len(expected) == 8
    for number in range(3):
        assert (tmp_path / f"{number}" / WEIGHTS).read_bytes() == (tmp_path / "alone" / WEIGHTS).read_bytes()
    # What differs is in process 1: with strict="base" both refuse the base, and by default process 1 warns.
    assert ["another base" in out for out in said] == [False, True]
    assert "no warning" in said[0]


def test_what_fails_in_one_fails_in_all(tmp_path: Path) -> None:
    what_fails_in_one_fails_in_all(tmp_path, count=2)


def what_fails_in_one_fails_in_all(tmp_path: Path, count: int) -> None:
    run("faults", tmp_path, count=count, devices=8 // count)
    assert version_in(tmp_path / "new") == 0
    assert version_in(tmp_path / "after") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["after", "file", "new"]  # nor temporary files:
    assert all(len(list(place.iterdir())) == 3 for place in (tmp_path / "after", tmp_path / "new"))


# All moments, with two processes and with four, and the next run of as many: tests/full/test_several.py.
HERE = [
    killed.Case("adapter", -1, "write"),
    killed.Case("manager", 0, "commit"),
    killed.Case("orbax", 0, "arrays done"),
]


@pytest.mark.slow
def test_the_survivors_of_a_killed_process_end_and_what_was_there_is_whole(tmp_path: Path) -> None:
    assert set(HERE) <= set(killed.CASES)
    killed.all_of(HERE, tmp_path, count=2, at_once=3, next_run=1)
