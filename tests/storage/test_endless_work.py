"""Small files that once took minutes to refuse: each is refused at once, or the child is killed after two minutes."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxadapt.storage import safetensors

CODE = """
import sys
from jaxadapt import FormatError
from jaxadapt.storage import safetensors, torch_bin
try:
    (safetensors.read_header if sys.argv[1].endswith(".safetensors") else torch_bin.read)(sys.argv[1])
except FormatError as error:
    print(str(error)[:2000])
"""


def refused(path: Path) -> str:
    done = subprocess.run([sys.executable, "-c", CODE, path], capture_output=True, text=True, timeout=900)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr[-2000:]
    return done.stdout


def with_header(path: Path, tensors: str) -> Path:
    raw = tensors.encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + b"\0" * 8)
    return path


def described(shape: str, offsets: str = "[0,8]") -> str:
    return f'{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}'


def test_a_shape_of_two_million_axes(tmp_path):
    shape = json.dumps([2**31] * 2_000_000)
    said = refused(with_header(tmp_path / "x.safetensors", described(shape)))
    assert "'a': expected at most 64 axes, found 2000000" in said


@pytest.mark.parametrize("offsets", ["[{n},{n}]", "[0,{n}]", "[{less},{n}]"])
def test_offsets_of_as_many_digits_as_python_reads(tmp_path, offsets):
    n = 10**4300 - 1
    sys.set_int_max_str_digits(0)
    try:
        held = described("[2]", offsets.format(n=n, less=n - 8))
    finally:
        sys.set_int_max_str_digits(4300)
    assert "overflow 63 bits" in refused(with_header(tmp_path / "x.safetensors", held))


def test_tensors_called_like_the_fields_of_one(tmp_path):
    save_file({n: np.ones(2, np.float32) for n in ("dtype", "shape", "data_offsets")}, tmp_path / "x.safetensors")
    held = safetensors.read_header(tmp_path / "x.safetensors").tensors
    assert held.keys() == load_file(tmp_path / "x.safetensors").keys()
    said = refused(with_header(tmp_path / "y.safetensors", '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'))
    assert "expected an object of tensors, found the description of one" in said


def packed(path: Path, state: bytes, storage: bytes = b"\0" * 8) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", state)
        file.writestr("x/data/0", storage)
    return path


IDENTITY = (
    b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x02tQ"  # ("storage", FloatStorage, "0", …)
)
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def number(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little")
    return b"\x8b" + struct.pack("<i", len(raw)) + raw


def test_a_shape_that_recalls_one_huge_integer(tmp_path):
    huge = number(1 << (8 * 4_000_000)) + b"q\x01"
    shape = b"(" + b"h\x01" * 64 + b"t"
    arguments = b"(" + IDENTITY + b"K\x00" + shape + b"(" + b"K\x00" * 64 + b"t\x89}t"
    # The integer is the value of another key, and recalled from there.
    state = b"\x80\x02}" + b"X\x01\0\0\0n" + huge + b"s" + b"X\x01\0\0\0a" + REBUILD + arguments + b"Rs."
    assert "overflows 63 bits" in refused(packed(tmp_path / "x.bin", state))


TENSOR = IDENTITY + b"K\x00K\x02\x85K\x01\x85\x89"  # storage, offset, shape, strides, requires_grad


@pytest.mark.parametrize("part", ["arguments", "notes"])
def test_a_long_value_that_is_recalled_again_and_again(tmp_path, part):
    """Each of 100,000 tensors goes through the same 200,000 items, of which none is wrong."""
    if part == "arguments":
        long = b"(" + TENSOR + b"K\x00" * 200_000 + b"tq\x01"
        one = REBUILD + b"h\x01R"
    else:
        long = b"}(" + b"".join(b"J" + struct.pack("<i", n) + b"K\x00" for n in range(200_000)) + b"uq\x01"
        one = REBUILD + b"(" + TENSOR + b"}h\x01tR"
    items = b"".join(b"X\x08\0\0\0" + b"%08d" % n + one for n in range(100_000))
    state = b"\x80\x02}X\x01\0\0\0n" + long + b"s(" + items + b"u."
    assert "not a state dict" in refused(packed(tmp_path / "x.bin", state))


def test_a_file_of_a_few_hundred_bytes_takes_no_memory(tmp_path):
    """An expanded tensor: a stride of 0 repeats one element."""
    shape = b"J" + struct.pack("<i", 64 << 20) + b"\x85"
    state = b"\x80\x02}X\x01\0\0\0a" + REBUILD + b"(" + IDENTITY + b"K\x00" + shape + b"K\x00\x85\x89}tRs."
    path = packed(tmp_path / "x.bin", state)
    assert path.stat().st_size < 600
    assert "the tensors claim 268435456 bytes, more than a file of" in refused(path)
