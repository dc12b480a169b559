"""safetensors: byte equality with the reference library, attacks, memory layouts, slices."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxadapt import FileError, FormatError, MismatchError
from jaxadapt.arrays.tensor_source import NAMES, numpy_dtype
from jaxadapt.storage import safetensors as codec

DTYPES = [numpy_dtype(code) for code in NAMES.values()]


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def save(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> bytes:
    codec.write(path, {k: (v.dtype, v.shape) for k, v in tensors.items()}, tensors.__getitem__, metadata)
    return path.read_bytes()


def filled(shape: tuple[int, ...], dtype: np.dtype, seed: int = 0) -> np.ndarray:
    """Random bits, NaNs included; a bool is 0 or 1."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 2 if dtype.kind == "b" else 256, int(np.prod(shape)) * dtype.itemsize, np.uint8)
    return raw.view(dtype).reshape(shape)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# --- against the reference library --------------------------------------------------------------------------


def test_bytes_equal_torch_save_file(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    dtypes = [
        torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int16,
        torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64,
    ]  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    shapes = [(), (0,), (3,), (2, 5), (4, 0, 2), (1, 1, 7)]
    tensors = {
        f'layer.{i}."é\n\t\\/{chr(1)}😀\x7f': torch.randn(shapes[i % 6], generator=generator).to(dtypes[i % 13])
        for i in range(80)
    }
    theirs, ours = tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors"
    for metadata in ({"format": "pt"}, None, {"jaxadapt": '{"r": 8, "ü": "\\n"}'}):
        save_file(tensors, theirs, metadata=metadata)
        loaded = codec.read(theirs)
        assert save(ours, loaded, metadata) == theirs.read_bytes()
        for key, tensor in tensors.items():
            raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
            assert loaded[key].tobytes() == raw
            assert loaded[key].shape == tuple(tensor.shape)


def test_library_reads_ours_and_we_read_theirs(tmp_path: Path) -> None:
    # the dtypes the library's numpy side knows in both directions
    tensors = {name: filled((3, 4), np.dtype(name)) for name in ("float32", "float16", "int64", "uint8", "bool")}
    save(tmp_path / "ours", tensors, {"a": "b", "c": "d"})
    loaded = safetensors.numpy.load_file(tmp_path / "ours")
    assert all(same(loaded[key], value) for key, value in tensors.items())
    safetensors.numpy.save_file(tensors, tmp_path / "theirs", {"a": "b"})
    loaded = codec.read(tmp_path / "theirs")
    assert all(same(loaded[key], value) for key, value in tensors.items())
    assert codec.read_header(tmp_path / "theirs").metadata == {"a": "b"}


def test_the_bits_of_a_dtype_are_numpys() -> None:
    assert {code: codec.BITS[code] for code in NAMES.values()} == {
        code: 8 * numpy_dtype(code).itemsize for code in NAMES.values()
    }


def test_output_does_not_depend_on_the_order_of_arguments(tmp_path: Path) -> None:
    a, b = np.ones(2, "f4"), np.ones(3, "f4")
    first = save(tmp_path / "1", {"a": a, "b": b}, {"x": "1", "y": "2"})
    assert first == save(tmp_path / "2", {"b": b, "a": a}, {"y": "2", "x": "1"})
    assert list(codec.read_header(tmp_path / "1").metadata) == ["x", "y"]


def test_empty(tmp_path: Path) -> None:
    assert save(tmp_path / "f", {}) == struct.pack("<Q", 8) + b"{}      "
    assert codec.read(tmp_path / "f") == {}


# --- layouts ------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "C": lambda a: a,
    "Fortran": lambda a: np.asfortranarray(a.view(f"V{a.dtype.itemsize}")).view(a.dtype) if a.ndim > 1 else a,
    "reversed": lambda a: a[tuple([slice(None, None, -1)] * a.ndim)],
    "transposed": lambda a: a.T,
    "strided": lambda a: np.repeat(a, 2, axis=0)[::2] if a.ndim else a,
    "broadcast": lambda a: np.broadcast_to(a, (3, *a.shape)),
    "read-only": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
    "unaligned": lambda a: np.frombuffer(b"x" + a.tobytes(), np.uint8)[1:].view(a.dtype).reshape(a.shape),
}


@settings(max_examples=150, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), max_size=4).map(tuple),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(list(LAYOUTS)),
    seed=st.integers(0, 9),
)
def test_any_layout(
    tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, ...], dtype: np.dtype, layout: str, seed: int
) -> None:
    array = LAYOUTS[layout](filled(shape, dtype, seed))
    path = tmp_path_factory.getbasetemp() / "layout"
    raw = save(path, {"x": array})
    assert raw.endswith(array.tobytes())  # tobytes is in C order
    loaded = codec.read(path)["x"]
    assert same(loaded, array)
    assert loaded.flags.c_contiguous
    assert loaded.flags.writeable
    assert loaded.size == 0 or loaded.ctypes.data % 64 == 0


@pytest.mark.parametrize("dtype", [">f4", ">i2", ">c8", ">f8", "<f4"])
def test_byte_orders(tmp_path: Path, dtype: str) -> None:
    array = np.arange(6).reshape(2, 3).astype(dtype)
    save(tmp_path / "f", {"x": array, "t": array.T})
    loaded = codec.read(tmp_path / "f")
    assert np.array_equal(loaded["x"], array)
    assert np.array_equal(loaded["t"], array.T)
    assert loaded["x"].dtype.isnative


@pytest.mark.parametrize("shape", [(700, 1300), (1300, 3, 900), (3_000_000,), (2, 2_500_000)])
def test_larger_than_the_buffers(tmp_path: Path, shape: tuple[int, ...]) -> None:
    array = filled(shape, np.dtype(ml_dtypes.bfloat16))
    tensors = {"a": array, "b": array.T, "c": array[::-1], "d": filled((5,), np.dtype("u1")), "e": array[1:]}
    save(tmp_path / "f", tensors)
    loaded = codec.read(tmp_path / "f")
    assert all(same(loaded[key], value) for key, value in tensors.items())


# --- writing ------------------------------------------------------------------------------------------------


def test_get_is_called_once_a_key_in_file_order_and_progress_adds_up(tmp_path: Path) -> None:
    arrays = {
        "b": np.ones((4,), "f4"),
        "a": np.ones((4,), "f4"),
        "wide": np.ones((2,), "f8"),
        "z": np.ones(3, "i1"),
    }
    calls: list[str] = []
    steps: list[int] = []

    def get(key: str) -> np.ndarray:
        calls.append(key)
        return arrays[key]

    specs = {
        "b": ("F32", (4,)),
        "a": ("float32", [4]),
        "wide": (np.float64, (2,)),
        "z": (np.dtype("i1"), (3,)),
    }
    header = codec.write(tmp_path / "f", specs, get, progress=steps.append)
    assert calls == ["wide", "a", "b", "z"]
    assert steps == [16, 16, 16, 3]
    assert header == codec.read_header(tmp_path / "f")
    assert header.size == (tmp_path / "f").stat().st_size


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (np.ones((2, 4), "f4"), r"F32 \[2, 4\]"),
        (np.ones((2, 3), "f8"), "F64"),
        (np.ones((2, 3), "f4,f4"), "void64"),
    ],
)
def test_get_must_keep_its_promise(tmp_path: Path, value: np.ndarray, found: str) -> None:
    (tmp_path / "f").write_bytes(b"old")
    with pytest.raises(MismatchError, match=rf"'x': expected F32 \[2, 3\], found {found}"):
        codec.write(tmp_path / "f", {"x": ("F32", (2, 3))}, lambda key: value)
    assert (tmp_path / "f").read_bytes() == b"old"
    assert names(tmp_path) == ["f"]


@pytest.mark.parametrize(
    ("specs", "metadata", "message"),
    [
        ({"x": ("F33", (1,)), "y": ("F32", (-1,)), "__metadata__": ("F32", ())}, {}, "(?s)F33.*-1.*reserved"),
        ({"x": ("F32", (True,))}, {}, "integers"),
        ({"x": ("F32", (2**62, 4))}, {}, "overflows"),
        ({"x": (np.dtype("c16"), (1,))}, {}, "complex128"),
        ({"\ud800": ("F32", ())}, {}, "not valid text"),
        ({}, {"a": 1}, "expected strings"),
        ({}, {"a": "x" * 100_000_001}, "at most 100000000 bytes"),
    ],
)
def test_nothing_is_touched_before_specs_are_valid(
    tmp_path: Path, specs: object, metadata: object, message: str
) -> None:
    def get(key: str) -> np.ndarray:
        raise AssertionError

    with pytest.raises(FileError, match=message) as caught:
        codec.write(tmp_path / "f", specs, get, metadata)  # pyright: ignore[reportArgumentType]
    assert len(str(caught.value)) < 2000
    assert names(tmp_path) == []


def test_memory_is_bounded(tmp_path: Path) -> None:
    import tracemalloc

    array = np.zeros((4000, 4000), "f4")  # 64 MB; its transpose needs a copy
    tracemalloc.start()
    try:
        codec.write(tmp_path / "f", dict.fromkeys("ab", ("F32", (4000, 4000))), lambda key: array.T)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_tensor_is_released_before_the_next_one_is_computed(tmp_path: Path) -> None:
    import tracemalloc

    tracemalloc.start()
    try:
        codec.write(tmp_path / "f", dict.fromkeys("abc", ("U8", (8 << 20,))), lambda _: np.zeros(8 << 20, "u1"))
        assert tracemalloc.get_traced_memory()[1] < 9 << 20
    finally:
        tracemalloc.stop()


# --- reading ------------------------------------------------------------------------------------------------


def test_keys_and_lazy_file(tmp_path: Path) -> None:
    tensors = {key: filled((3, 2), np.dtype("f2"), seed) for seed, key in enumerate("abcd")}
    save(tmp_path / "f", tensors)
    with codec.TensorFile(tmp_path / "f") as file:
        assert file.read_many([]) == {}
        assert file.read_many(["c", "a"]).keys() == {"a", "c"}
        with pytest.raises(KeyError, match="x"):
            file.read_many(["a", "x"])
        assert list(file) == list(tensors)
        assert len(file) == 4
        assert "a" in file
        assert "x" not in file
        assert all(same(file[key], value) for key, value in tensors.items())
        # replaced meanwhile: the open file stays what it was
        save(tmp_path / "f", {"a": np.zeros((3, 2), "f2")})
        assert same(file["b"], tensors["b"])
        with pytest.raises(KeyError):
            file["x"]
    with pytest.raises(FileError, match="closed"):
        file["a"]


def test_truncated_while_open(tmp_path: Path) -> None:
    save(tmp_path / "f", {"a": np.zeros(10, "f4"), "b": np.zeros(10, "f4")})
    with codec.TensorFile(tmp_path / "f") as file:
        os.truncate(tmp_path / "f", file.header.size - 1)
        file["a"]
        for read in (
            lambda: file["b"],
            lambda: file.read_many("ab"),
            lambda: file.read_slice("b", [slice(9, 10)]),
        ):
            with pytest.raises(FormatError, match="'b': expected .* truncated"):
                read()


SLICED: list[tuple[int, ...]] = [(), (7,), (37, 5), (3, 0), (4, 9, 3000), (5, 33, 2)]
bound = st.none() | st.integers(-40, 40)
any_slice = st.builds(slice, bound, bound, st.sampled_from([None, 1, 1, 2, 7, -1, -3]))


@settings(max_examples=200, deadline=None)
@given(
    array=st.sampled_from(
        [filled(shape, np.dtype(ml_dtypes.bfloat16)) for shape in [(), (7,), (37, 5), (3, 0), (4, 9, 3000), (5, 33, 2)]]
    ),
    slices=st.lists(any_slice, max_size=3),
)
def test_slices(tmp_path_factory: pytest.TempPathFactory, array: np.ndarray, slices: list[slice]) -> None:
    path = tmp_path_factory.getbasetemp() / f"slices{array.shape}"
    if not path.exists():
        save(path, {"x": array})
    with codec.TensorFile(path) as file:
        if len(slices) > array.ndim:
            with pytest.raises(IndexError):
                file.read_slice("x", slices)
        else:
            assert same(file.read_slice("x", slices), array[tuple(slices)].copy())


def test_slices_read_only_their_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = filled((64, 32_768), np.dtype("f4"))
    save(tmp_path / "f", {"x": array})
    read: list[int] = []
    real = os.preadv
    with codec.TensorFile(tmp_path / "f") as file:
        monkeypatch.setattr(os, "preadv", lambda *a: read.append(real(*a)) or read[-1])
        for slices, most in [((slice(8, 16),), 8 * 131_072), ((slice(None), slice(0, 4096)), 64 * 4096 * 4)]:
            read.clear()
            assert same(file.read_slice("x", slices), np.ascontiguousarray(array[slices]))
            assert sum(read) == most


def test_jax_takes_the_memory(tmp_path: Path) -> None:
    jax = pytest.importorskip("jax")
    save(tmp_path / "f", {"x": filled((64, 3), np.dtype(ml_dtypes.bfloat16))})
    array = codec.read(tmp_path / "f")["x"]
    on_device = jax.device_put(array, jax.devices("cpu")[0], may_alias=True)
    assert on_device.unsafe_buffer_pointer() == array.ctypes.data


def test_header_needs_the_standard_library_only(tmp_path: Path) -> None:
    save(tmp_path / "f", {"x": np.ones(3, "f4")})
    code = (
        "import sys\nfrom jaxadapt.storage import atomic, safetensors, torch_bin\n"
        f"safetensors.read_header({str(tmp_path / 'f')!r})\n"
        "bad = {'jax', 'numpy', 'ml_dtypes', 'torch', 'safetensors'} & set(sys.modules)\n"
        "sys.exit(repr(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_descriptor_is_leaked(tmp_path: Path) -> None:
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    save(tmp_path / "f", {"x": np.ones(3, "f4")})
    (tmp_path / "bad").write_bytes(b"nonsense, nonsense")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        codec.read(tmp_path / "f")
        save(tmp_path / "g", {"x": np.ones(3, "f4")})
        with pytest.raises(FormatError):
            codec.TensorFile(tmp_path / "bad")
        with pytest.raises(MismatchError):
            codec.write(tmp_path / "g", {"x": ("F32", ())}, lambda key: np.ones(3, "f4"))
    assert len(list(Path("/proc/self/fd").iterdir())) == before
