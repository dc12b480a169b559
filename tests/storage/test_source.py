"""Views over tensor sources give what numpy's own indexing gives, from files and from memory, and read no more."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxadapt import MismatchError
from jaxadapt.arrays import tensor_source as source
from jaxadapt.keymaps import plan
from jaxadapt.storage import safetensors

TENSORS = {key: np.arange(12, dtype="f4").reshape(4, 3) + 100 * n for n, key in enumerate("abcd")}


@pytest.fixture(params=["file", "memory", "view"])
def tensors(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[source.TensorSource]:
    if request.param == "memory":
        yield source.as_source(TENSORS)
        return
    safetensors.write(tmp_path / "f", {k: (x.dtype, x.shape) for k, x in TENSORS.items()}, TENSORS.__getitem__)
    with safetensors.TensorFile(tmp_path / "f") as file:
        yield file if request.param == "file" else source.combine("two files", [file])


def check(found: source.TensorSource, want: dict[str, np.ndarray]) -> None:
    assert list(found) == list(found.specs) == list(want)
    assert len(found) == len(want)
    counted: list[int] = []
    every = found.read_many(found, counted.append)
    assert sum(counted) == sum(x.nbytes for x in want.values())
    for key, value in want.items():
        assert found.specs[key] == (value.shape, value.dtype)
        assert found.nbytes(key) == value.nbytes
        memory = np.zeros(value.nbytes, np.uint8)
        flat = (slice(1, None, 2),)
        for read in (found[key], every[key], found.read(key), found.read_into(key, memory), found.read_slice(key, ())):
            np.testing.assert_array_equal(read, value)
        np.testing.assert_array_equal(found.read_slice(key, flat), value[flat])
        np.testing.assert_array_equal(found.read_slice(key, flat, (value.size,)), value.reshape(-1)[flat])
    assert "x" not in found
    with pytest.raises(KeyError):
        found.read("x")


def test_as_they_are(tensors: source.TensorSource) -> None:
    assert source.as_source(tensors) is tensors
    check(tensors, TENSORS)


def test_renamed(tensors: source.TensorSource) -> None:
    check(
        source.rename(tensors, {"z": "a", "y": "a", "b": "b"}),
        dict(zip("zyb", [TENSORS[k] for k in "aab"], strict=True)),
    )


def test_cut(tensors: source.TensorSource) -> None:
    parts = {"a1": ("a", (slice(0, 2),)), "a2": ("a", (slice(2, 4), slice(1, 3))), "b1": ("b", (slice(1, 3),))}
    want = {k: TENSORS[k] for k in "cd"} | {key: TENSORS[name][index] for key, (name, index) in parts.items()}
    check(source.cut(tensors, parts), want)


def test_stacked(tensors: source.TensorSource) -> None:
    want = {"z": TENSORS["d"], "s": np.stack([np.concatenate([TENSORS[k] for k in row]) for row in ("ab", "bc")])}
    found = source.stack(tensors, {"s": [["a", "b"], ["b", "c"]]}, {"z": "d"})
    check(found, want)
    for index in [(slice(1, 2),), (slice(None), slice(3, 6)), (slice(0, 2), slice(5, None, 2), slice(1, 2))]:
        np.testing.assert_array_equal(found.read_slice("s", index), want["s"][index])
    check(source.cut(found, {"p": ("s", (slice(0, 1), slice(2, 7)))}), {"z": want["z"], "p": want["s"][:1, 2:7]})


def test_rows_that_differ() -> None:
    arrays = {"a": np.zeros((2, 3), "f4"), "b": np.zeros((2, 4), "f4")}
    message = "these tensors: cannot stack the tensors of s: expected equal shapes and dtypes, found float32 [2, 3];"
    with pytest.raises(MismatchError, match=re.escape(message)):
        source.stack(source.as_source(arrays), {"s": [["a"], ["b"]]}, {})


def test_encoded_leaves_are_a_source() -> None:
    import jaxadapt

    base = {"q": {"kernel": np.ones((4, 6), "f4")}}
    adapter = jaxadapt.init(base, jaxadapt.LoraConfig(r=2, target_modules=["q"]), key=jnp.zeros(2, "u4"))
    encoded: Any = jaxadapt.to_peft(adapter).tensors
    assert isinstance(encoded, plan.Encoded)
    want = {key: np.asarray(value) for key, value in encoded.items()}
    check(encoded, want)
    check(source.rename(encoded, {"z": next(iter(want))}), {"z": next(iter(want.values()))})


def test_a_view_of_a_file_reads_only_the_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value = np.arange(1 << 20, dtype="u1").reshape(1024, 1024)
    safetensors.write(tmp_path / "f", {"x": (value.dtype, value.shape)}, lambda _: value)
    with safetensors.TensorFile(tmp_path / "f") as file:
        asked: list[int] = []
        read = os.preadv
        monkeypatch.setattr(os, "preadv", lambda *at: asked.append(read(*at)) or asked[-1])
        part = source.rename(source.cut(file, {"p": ("x", (slice(10, 20),))}), {"q": "p"})
        np.testing.assert_array_equal(part["q"], value[10:20])
    assert asked == [10 * 1024]


def test_a_block_of_tensors_is_read_only_if_the_file_has_it_so(tensors: source.TensorSource) -> None:
    memory = np.zeros(2 * 48, np.uint8)
    is_file = not isinstance(tensors, source.Arrays)
    assert tensors.read_block(["b", "c"], memory) == is_file
    if is_file:
        np.testing.assert_array_equal(memory.view("f4").reshape(8, 3), np.concatenate([TENSORS["b"], TENSORS["c"]]))
    before = memory.copy()
    for keys, size in ((["b", "d"], 96), (["c", "b"], 96), (["b", "c"], 97), (["b"], 96)):
        assert not tensors.read_block(keys, memory[:size] if size < 97 else np.zeros(97, np.uint8))
        np.testing.assert_array_equal(memory, before)


FLOATS = [source.numpy_dtype(name) for name in source.NAMES.values() if name[0] == "F" or name == "BF16"]


@pytest.mark.parametrize("one", FLOATS, ids=str)
@pytest.mark.parametrize("other", FLOATS, ids=str)
def test_the_common_dtype_of_two_floats_has_the_exponents_and_the_digits_of_both(one, other):
    common = source.common_dtype([one, other])
    for dtype in (one, other):
        size = 8 * dtype.itemsize  # the sign, the exponent and the first digits: at most 16 bits
        bits = np.arange(1 << min(16, size), dtype="uint64") << np.uint64(max(0, size - 16))
        values = bits.astype(f"u{dtype.itemsize}").view(dtype)
        with np.errstate(invalid="ignore"):  # NaN
            np.testing.assert_array_equal(values.astype(common).astype("float64"), values.astype("float64"))
