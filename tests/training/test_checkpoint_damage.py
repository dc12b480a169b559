"""What a CheckpointManager restores from files that were damaged or exchanged: what was saved, or nothing."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxadapt
from tests.support import small

MU = np.arange(2048, dtype="float32").reshape(32, 64)


def saved(folder: Path, *steps: int) -> jaxadapt.CheckpointManager:
    manager = jaxadapt.CheckpointManager(folder, minimize="loss")
    for step in steps:
        state = {"mu": MU + step, "count": step}
        manager.save(step, small.host_adapter(fill=step), opt_state=state, data={"seen": 7 * step}, metrics={"loss": 1})
    manager.wait()
    return manager


def test_a_flipped_bit_in_a_step_is_never_restored_silently(tmp_path: Path) -> None:
    manager = saved(tmp_path, 3)
    (file,) = tmp_path.iterdir()
    good, want = file.read_bytes(), manager.restore(small.host_adapter())
    rng, ends = random.Random(0), int.from_bytes(good[:8], "little")
    silent: list[int] = []
    errors: list[str] = []
    for position in [*range(8), *rng.sample(range(8, ends), 80), *rng.sample(range(ends, len(good)), 80)]:
        bad = bytearray(good)
        bad[position] ^= 1 << rng.randrange(8)
        file.write_bytes(bad)
        try:
            found = manager.restore(small.host_adapter())
        except jaxadapt.AdapterError as error:
            errors.append(str(error))
        else:  # such as a space of the header that became another white space
            silent += [] if small.same([*map(vars, [found])], [*map(vars, [want])]) else [position]
    assert not silent
    assert all("step-000000003" in error for error in errors)


def test_a_damaged_name_of_an_array_that_is_stored_as_bytes_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    manager = jaxadapt.CheckpointManager(tmp_path)
    manager.save(3, small.host_adapter(), opt_state={"mu": jnp.ones(3, "int4")})
    manager.wait()
    (file,) = tmp_path.iterdir()
    data = file.read_bytes()
    place = data.index(b'"opt_state/mu":{"dtype"')
    file.write_bytes(data[: place + 11] + b"x" + data[place + 12 :])
    with pytest.raises(jaxadapt.FormatError, match="step-000000003.*its header is damaged"):
        manager.restore(small.host_adapter(), opt_state={"mu": jnp.ones(3, "int4")})


@pytest.mark.parametrize("restore", ["the model only", "an adapter", "an export", "on a mesh"])
def test_only_the_arrays_that_are_read_are_checked(restore: str, tmp_path: Path) -> None:
    manager = saved(tmp_path, 3)
    (file,) = tmp_path.iterdir()
    data = file.read_bytes()
    place = data.index(MU[5, :8].__add__(3).tobytes())
    file.write_bytes(data[:place] + b"\x01" + data[place + 1 :])
    if restore == "the model only":
        manager.restore(small.host_adapter(), model_only=True)
    elif restore == "an adapter":
        manager.adapter()
    elif restore == "an export":
        manager.export(3, tmp_path / "out")
    mesh = jax.make_mesh((4,), ("x",))
    for spec in (PartitionSpec("x"), PartitionSpec(None, "x")):
        mu = jax.device_put(jnp.zeros(MU.shape), NamedSharding(mesh, spec))
        with pytest.raises(jaxadapt.FormatError, match=r"step-000000003.*CRC-32 differs.*\n  opt_state/mu$"):
            manager.restore(small.host_adapter(), opt_state={"mu": mu, "count": 0})
        file.write_bytes(data)
        restored = manager.restore(small.host_adapter(), opt_state={"mu": mu, "count": 0})
        np.testing.assert_array_equal(restored.opt_state["mu"], MU + 3)
        file.write_bytes(data[:place] + b"\x01" + data[place + 1 :])


def test_two_steps_that_were_exchanged_are_not_restored(tmp_path: Path) -> None:
    manager = saved(tmp_path, 1, 2)
    one, two = sorted(tmp_path.iterdir())
    one.rename(tmp_path / "other")
    two.rename(one)
    (tmp_path / "other").rename(two)
    calls: list[Any] = [manager.restore, lambda like, step: manager.adapter(step)]
    for call in calls:
        with pytest.raises(jaxadapt.FormatError, match=r"step-000000002\.safetensors: contains step 1, so the file"):
            call(small.host_adapter(), 2)
    two.rename(one)
    assert manager.restore(small.host_adapter(), 1).data == {"seen": 7}
