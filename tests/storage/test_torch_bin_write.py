"""PyTorch's `.bin`, written without torch: torch and PEFT read it, and every bit is the same."""

from __future__ import annotations

import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner

import jaxadapt
from jaxadapt.cli import main
from jaxadapt.storage import atomic, torch_bin
from tests.support import small

RNG = np.random.default_rng(0)
PLAIN = "float32 float16 float64 int8 int16 int32 int64 uint8 bool complex64 uint16 uint32 uint64"
SHORT = "bfloat16 float8_e5m2 float8_e4m3fn float8_e4m3fnuz float8_e5m2fnuz"


def everything() -> dict[str, np.ndarray]:
    made: dict[str, Any] = {name: RNG.integers(0, 2, (3, 4)).astype(name) for name in PLAIN.split()}
    made |= {name: RNG.standard_normal((3, 5)).astype(getattr(ml_dtypes, name)) for name in SHORT.split()}
    return made | {
        "scalar": np.asarray(3.5, "f4"), "empty": np.zeros((3, 0, 2), "f4"), "turned": RNG.standard_normal((4, 6)).T,
        "large": RNG.standard_normal(70000), "big-endian": np.arange(3, dtype=">f4"), "ünï\n": np.ones(2, "f4"),
        "NaN": np.full(3, np.nan, "f4"),
    }  # fmt: skip


def native(value: np.ndarray) -> bytes:
    return np.ascontiguousarray(value).astype(value.dtype.newbyteorder("=")).tobytes()


def write(path: Path, tensors: dict[str, np.ndarray]) -> int:
    specs = {key: (value.dtype, value.shape) for key, value in tensors.items()}
    with atomic.open_replacement(path) as writer:
        return torch_bin.write_to(writer, specs, tensors.__getitem__)


@pytest.mark.peft  # torch
@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_every_bit(tmp_path: Path, mmap: bool):
    import torch

    tensors = everything()
    assert write(tmp_path / "f", tensors) == (tmp_path / "f").stat().st_size
    found = torch.load(tmp_path / "f", weights_only=True, mmap=mmap)
    assert list(found) == list(tensors)
    for key, value in tensors.items():
        assert tuple(found[key].shape) == value.shape
        bits = found[key].reshape(-1).view(torch.uint8).numpy().tobytes() if value.size else b""
        assert bits == native(value), key
        if key in (*PLAIN.split(), *SHORT.split()):
            assert str(found[key].dtype) == f"torch.{key}"
    torch.save(found, tmp_path / "g")  # and back
    for key, value in torch_bin.read(tmp_path / "g").items():
        assert native(value) == native(tensors[key])


def test_our_reader_and_zipfile_read_it(tmp_path: Path):
    tensors = everything()
    write(tmp_path / "f", tensors)
    assert zipfile.ZipFile(tmp_path / "f").testzip() is None
    for key, value in torch_bin.read(tmp_path / "f").items():
        assert (native(value), value.shape) == (native(tensors[key]), tensors[key].shape)


def test_every_record_begins_at_a_multiple_of_64_bytes(tmp_path: Path):
    """Readers that map a file into memory need it."""
    write(tmp_path / "f", everything() | {"x" * n: np.ones(n, "i1") for n in range(1, 130)})
    raw = (tmp_path / "f").read_bytes()
    for record in zipfile.ZipFile(tmp_path / "f").infolist():
        lengths = struct.unpack_from("<HH", raw, record.header_offset + 26)  # of the name and of the extra fields
        assert (record.header_offset + 30 + sum(lengths)) % 64 == 0, record.filename


@pytest.mark.peft
@pytest.mark.parametrize("limit", [0, 100])
def test_files_beyond_4_gib_by_a_lower_limit(tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch):
    """The fields of ZIP64, used from `limit` on in place of 4 GiB."""
    import torch

    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
    tensors = {"a": np.arange(200, dtype="f4"), "b": np.ones((2, 3), "f8")}
    write(tmp_path / "f", tensors)
    assert zipfile.ZipFile(tmp_path / "f").testzip() is None
    found = torch.load(tmp_path / "f", weights_only=True)
    assert all(native(found[key].numpy()) == native(value) for key, value in tensors.items())


def test_what_cannot_be_written(tmp_path: Path):
    with pytest.raises(jaxadapt.FileError, match="dtype int4: safetensors files cannot hold it"):
        write(tmp_path / "f", {"a": np.zeros(2, ml_dtypes.int4)})
    expected = pytest.raises(jaxadapt.MismatchError, match=r"tensor 'a': expected F32 \[3\], found F64 \[3\]")
    with expected, atomic.open_replacement(tmp_path / "f") as writer:
        torch_bin.write_to(writer, {"a": ("f4", (3,))}, lambda _: np.zeros(3))
    assert not list(tmp_path.iterdir())


def test_one_tensor_in_memory(tmp_path: Path):
    specs = {str(i): (np.dtype("f4"), (1 << 20,)) for i in range(8)}
    tracemalloc.start()
    with atomic.open_replacement(tmp_path / "f") as writer:
        torch_bin.write_to(writer, specs, lambda _: np.ones(1 << 20, "f4"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * (4 << 20)  # one tensor of 4 MB, and the next while it is made


# ---------------------------------------------------------------- folders


def test_save_write_and_convert(tmp_path: Path):
    adapter = small.adapter()
    jaxadapt.save(adapter, tmp_path / "a", format="bin")
    jaxadapt.write(jaxadapt.to_peft(adapter), tmp_path / "b", format="bin")
    jaxadapt.save(adapter, tmp_path / "c")
    assert CliRunner().invoke(main, ["convert", f"{tmp_path}/c", f"{tmp_path}/d", "--format", "bin"]).exit_code == 0
    assert CliRunner().invoke(main, ["convert", f"{tmp_path}/d", f"{tmp_path}/e"]).exit_code == 0
    for name in "abd":
        assert sorted(p.name for p in (tmp_path / name).iterdir()) == ["README.md", small.CONFIG, "adapter_model.bin"]
        assert small.same(jaxadapt.read(tmp_path / name).tensors, jaxadapt.read(tmp_path / "c").tensors)
    weights = [(tmp_path / name / small.WEIGHTS).read_bytes() for name in "ce"]
    assert weights[0] == weights[1]
    loaded = jaxadapt.load(tmp_path / "a", small.net())
    assert small.same(jaxadapt.extract(loaded).params, adapter.params)


def test_bin_beside_safetensors_is_refused(tmp_path: Path):
    jaxadapt.save(small.adapter(), tmp_path)
    before = small.files(tmp_path)
    with pytest.raises(jaxadapt.FileError, match="which readers would take instead"):
        jaxadapt.save(small.adapter(), tmp_path, format="bin")
    assert small.files(tmp_path) == before
    with pytest.raises(jaxadapt.FileError, match="expected 'safetensors' or 'bin'"):
        jaxadapt.write(jaxadapt.to_peft(small.adapter()), tmp_path, format="pt")


@pytest.mark.peft
def test_peft_loads_it(tmp_path: Path):
    import torch
    from peft.utils.save_and_load import load_peft_weights

    jaxadapt.save(small.adapter(), tmp_path, format="bin")
    ours = jaxadapt.read(tmp_path).tensors
    theirs = load_peft_weights(str(tmp_path), device="cpu")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], torch.from_numpy(np.asarray(value))) for key, value in ours.items())
