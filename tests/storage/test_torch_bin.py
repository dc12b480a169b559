"""PyTorch files without torch: equal to `torch.load`, closed to everything but tensors."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxadapt import FileError, FormatError
from jaxadapt.storage import torch_bin

ROOT = Path(__file__).resolve().parent.parent.parent
REAL = Path(os.environ.get("JAXADAPT_REAL_ADAPTERS", ROOT.parent / "shared" / "real-adapters")) / "weights"

torch = pytest.importorskip("torch")

LEGACY = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])


def save(value: object, path: Path, *, legacy: bool = False) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)


def raw(tensor: Any) -> bytes:
    tensor = tensor.detach().contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def assert_equal(loaded: dict[str, np.ndarray], expected: dict[str, Any]) -> None:
    assert list(loaded) == list(expected)
    for key, array in loaded.items():
        assert array.shape == tuple(expected[key].shape), key
        assert str(expected[key].dtype) == f"torch.{array.dtype.name}", key
        assert array.tobytes() == raw(expected[key]), key
        assert array.flags.c_contiguous


def everything() -> dict[str, Any]:
    dtypes = [
        "float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
        "complex64", "complex128",
    ]  # fmt: skip
    base = torch.arange(-60, 60, dtype=torch.float32).reshape(4, 5, 6)
    made = {name: base.to(getattr(torch, name)) for name in dtypes}
    made |= {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(3, 0, 2),
        "transposed": base.permute(2, 0, 1),
        "slice": base[1:3, ::2, 5:],
        "expanded": torch.tensor([1.0, 2.0])[:, None].expand(2, 1000),
        "shared": made["float32"][2],
        "again": made["float32"],
        "parameter": torch.nn.Parameter(base[0]),
        "buffer": torch.nn.Parameter(base[1], requires_grad=False),
        "ünïcode\n": base,
    }
    return made


@LEGACY
def test_equal_to_torch_load(tmp_path: Path, legacy: bool) -> None:
    tensors = everything()
    save(tensors, tmp_path / "f", legacy=legacy)
    expected = torch.load(tmp_path / "f", weights_only=True)
    assert_equal(torch_bin.read(tmp_path / "f"), expected)
    shapes = torch_bin.keys_and_shapes(tmp_path / "f")
    assert {key: shape for key, (_, shape) in shapes.items()} == {k: tuple(v.shape) for k, v in expected.items()}
    assert shapes["bfloat16"] == ("BF16", (4, 5, 6))


def test_types_that_came_after_the_legacy_format(tmp_path: Path) -> None:
    names = [
        "uint16",
        "uint32",
        "uint64",
        "float8_e4m3fn",
        "float8_e5m2",
        "float8_e4m3fnuz",
        "float8_e5m2fnuz",
    ]
    tensors = {name: torch.arange(48, dtype=torch.uint8).view(getattr(torch, name))[1:] for name in names}
    save(tensors, tmp_path / "f")
    assert_equal(torch_bin.read(tmp_path / "f"), tensors)


@LEGACY
def test_module_state_dict(tmp_path: Path, legacy: bool) -> None:
    """An OrderedDict with attributes, as `Module.state_dict()` gives."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    save(module.state_dict(), tmp_path / "f", legacy=legacy)
    assert_equal(torch_bin.read(tmp_path / "f"), module.state_dict())
    save({}, tmp_path / "f", legacy=legacy)
    assert torch_bin.read(tmp_path / "f") == {}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickle_protocols(tmp_path: Path, protocol: int) -> None:
    tensors = {"a": torch.ones(2), "b" * 300: torch.ones(3)}
    torch.save(tensors, tmp_path / "f", pickle_protocol=protocol)
    assert_equal(torch_bin.read(tmp_path / "f"), tensors)


def test_big_endian(tmp_path: Path) -> None:
    values = {
        "f": np.arange(6, dtype=">f4").reshape(2, 3),
        "c": np.arange(3, dtype=">c8"),
        "b": np.ones(2, ">u1"),
    }
    save({k: torch.from_numpy(v.astype(v.dtype.newbyteorder("<"))) for k, v in values.items()}, tmp_path / "f")
    records = contents(tmp_path / "f")
    for number, value in enumerate(values.values()):
        records[f"f/data/{number}"] = value.tobytes()
    records["f/byteorder"] = b"big"
    pack(tmp_path / "f", records)
    loaded = torch_bin.read(tmp_path / "f")
    assert all(np.array_equal(loaded[key], value) for key, value in values.items())
    assert all(array.dtype.isnative for array in loaded.values())
    records["f/byteorder"] = b"middle"
    pack(tmp_path / "f", records)
    with pytest.raises(FormatError, match="byteorder: expected little or big"):
        torch_bin.read(tmp_path / "f")


@pytest.mark.skipif(not REAL.is_dir(), reason="set JAXADAPT_REAL_ADAPTERS to a folder of real adapters")
def test_real_adapters() -> None:
    files = sorted(REAL.glob("*.bin"))
    assert files
    for path in files:
        try:
            expected = torch.load(path, weights_only=True, map_location="cpu")
        except pickle.UnpicklingError:
            with pytest.raises(FormatError, match="expected a PyTorch file"):
                torch_bin.read(path)
            continue
        assert_equal(torch_bin.read(path), expected)


def test_neither_torch_nor_numpy_is_needed_to_look(tmp_path: Path) -> None:
    save({"a": torch.ones(3)}, tmp_path / "f")
    code = (
        "import sys\nfrom jaxadapt.storage import torch_bin\n"
        f"assert torch_bin.keys_and_shapes({str(tmp_path / 'f')!r}) == {{'a': ('F32', (3,))}}\n"
        f"assert 'numpy' not in sys.modules\ntorch_bin.read({str(tmp_path / 'f')!r})\n"
        "assert not {'torch', 'jax'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- what is not a state dict -------------------------------------------------------------------------------


@LEGACY
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            {"a": torch.ones(1), "epoch": 3, "s": "x"},
            "'epoch': expected a tensor, found a value of type int\n  's'",
        ),
        (
            {"model": {"w": torch.ones(1)}},
            "'model': expected a tensor, found a dict\nSave only the state dict",
        ),
        ({3: torch.ones(1)}, "3: expected a key of valid text"),
        ({(1, 2): torch.ones(1)}, "keys that are strings"),
        ([torch.ones(1)], "expected a state dict, found a value of type list"),
        (torch.ones(1), "expected a state dict, found a tensor"),
        ({"a": torch.nn.Linear(1, 1)}, r"'torch.nn.modules.linear.Linear'.* nothing in a file is executed"),
        ({"a": np.ones(2)}, "nothing in a file is executed"),
        ({"a": torch.ones(2).to_sparse()}, "_rebuild_sparse_tensor.* nothing in a file is executed"),
        ({"a": torch.ones(2, dtype=torch.complex64).conj()}, "conjugated"),
        ({"a": torch.ones(2, device="meta")}, "_rebuild_meta_tensor_no_storage"),
        ({"a": {1, 2}}, "builtins.set|__builtin__.set"),
    ],
)
def test_other_values(tmp_path: Path, value: object, message: str, legacy: bool) -> None:
    save(value, tmp_path / "f", legacy=legacy)
    for read in (torch_bin.read, torch_bin.keys_and_shapes):
        with pytest.raises(FormatError, match=message) as caught:
            read(tmp_path / "f")
        assert str(tmp_path / "f") in str(caught.value)


class Evil:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch executed",)


@LEGACY
def test_nothing_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, legacy: bool) -> None:
    monkeypatch.chdir(tmp_path)
    save({"a": Evil()}, tmp_path / "f", legacy=legacy)
    with pytest.raises(FormatError, match=r"'posix.system', which no state dict needs"):
        torch_bin.read(tmp_path / "f")
    (tmp_path / "plain").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(FormatError, match=r"'posix.system'"):
        torch_bin.read(tmp_path / "plain")
    assert not (tmp_path / "executed").exists()


# --- damaged and hostile files ------------------------------------------------------------------------------


def contents(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def pack(path: Path, records: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in records.items():
            archive.writestr(name, data)


class Tensor:
    """Pickles as `_rebuild_tensor_v2` with any arguments."""

    def __init__(self, *arguments: object, function: Any = torch._utils._rebuild_tensor_v2) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[object, ...]]:
        return self.reduced


class Identity:
    def __init__(self, *parts: object) -> None:
        self.parts = parts


class Pickler(pickle.Pickler):
    def persistent_id(self, obj: object) -> object:
        return obj.parts if isinstance(obj, Identity) else None


def dumped(value: object) -> bytes:
    stream = io.BytesIO()
    Pickler(stream, 2).dump(value)
    return stream.getvalue()


def tensor(
    shape: object = (2,), strides: object = (1,), offset: object = 0, count: object = 2,
    kind: object = torch.FloatStorage, key: object = "0", **more: Any,
) -> Tensor:  # fmt: skip
    return Tensor(Identity("storage", kind, key, "cpu", count), offset, shape, strides, False, OrderedDict(), **more)


HOSTILE: dict[str, tuple[object, str]] = {
    "shape beyond": (tensor((3,)), "beyond its 2 elements"),
    "stride beyond": (tensor((2,), (2,)), "beyond its 2 elements"),
    "offset beyond": (tensor((1,), (1,), 2), "beyond its 2 elements"),
    "negative offset": (tensor((1,), (1,), -1), "an offset of integers >= 0"),
    "negative stride": (tensor((2,), (-1,), 1), "strides of integers >= 0"),
    "negative shape": (tensor((-2,)), "a shape of integers >= 0"),
    "fractional": (tensor((2.0,)), "a shape of integers"),
    "bool": (tensor((True,)), "a shape of integers"),
    "list": (tensor([2]), "a shape of integers"),
    "two strides": (tensor((2,), (1, 1)), "as many strides as axes"),
    "100 axes": (tensor((1,) * 100, (1,) * 100), "at most 64"),
    "terabytes": (tensor((2**38,), (0,)), "claim 1099511627776 bytes"),
    "overflow": (tensor((2**40, 2**40), (0, 0)), "overflows"),
    "overflow behind zero": (tensor((0, 2**62, 2**62), (0, 0, 0)), "overflows"),
    "storage count lies": (tensor((3,), count=3), "expected 12 bytes, found 8"),
    "storage is huge": (tensor((2,), count=2**60), "expected .* bytes, found 8"),
    "storage negative": (tensor(count=-1), "size of integers"),
    "no such record": (tensor(key="1"), "'data/1' is missing"),
    "record elsewhere": (tensor(key="../data.pkl"), "missing"),
    "key no string": (tensor(key=0), "type and key"),
    "type no storage": (tensor(kind=torch.float32), "type and key"),
    "type no global": (tensor(kind="FloatStorage"), "type and key"),
    "module": (Tensor(Identity("module", 1, 2, 3, 4), 0, (2,), (1,)), "description of a storage"),
    "no storage": (Tensor(1, 0, (2,), (1,), False, OrderedDict()), "arguments that PyTorch never uses"),
    "no arguments": (Tensor(), "arguments that PyTorch never uses"),
    "no dtype": (tensor(kind=torch.storage.UntypedStorage), "expected a dtype"),
    "v3 without dtype": (tensor(function=torch._utils._rebuild_tensor_v3), "expected a dtype"),
    "calls a dtype": (
        Tensor(1, function=torch.storage.UntypedStorage),
        "calls 'torch.storage.UntypedStorage'",
    ),
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_hostile_tensors(tmp_path: Path, name: str) -> None:
    value, message = HOSTILE[name]
    pack(tmp_path / "f", {"x/data.pkl": dumped({"a": value}), "x/data/0": b"\0" * 8})
    with pytest.raises(FormatError, match=message):
        torch_bin.read(tmp_path / "f")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no end|damaged"),
        (b"\x80\x02.", "a value from an empty stack"),
        (b"\x80\x02}q\x00", "damaged|no end"),
        (b"\x80\x02h\x05.", "recalls value 5"),
        (b"\x80\x02t.", "closes a group"),
        (b"\x80\x02(.", "from an empty stack"),
        (b"\x80\x02]K\x01K\x02s.", "adds items to a value that is not a dict"),
        (b"\x80\x02}(K\x01u.", "a key without a value"),
        (b"\x80\x02K\x01)R.", "calls a value that is not a function"),
        (b"\x80\x02cos\nsystem\n.", "'os.system'"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "'os.system'"),
        (b"\x80\x04K\x01K\x02\x93.", "not a name"),
        (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "opcode NEWOBJ"),
        (b"\x80\x02ccollections\nOrderedDict\n}b.", "adds items to a value that is not a dict"),
        (b"\x80\x02(cos\nsystem\no.", "'os.system'"),
        (b"(ios\nsystem\n.", "opcode INST"),
        (b"\x80\x02\x82\x01.", "opcode EXT1"),
        (b"\x80\x02X\xff\xff\xff\xff.", "damaged"),
        (b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.", "damaged"),
        (b"\x80\x02r\xff\xff\xff\xff.", "from an empty stack"),
        (b"\x80\x02\x8b\xff\xff\xff\x7f.", "damaged"),
        (
            b"\x80\x02" + b")\x85" + b"\x85" * 200_000 + b".",
            "expected a state dict, found a value of type tuple",
        ),
        (b"\x80\x02}" + b"(" * 200_000 + b".", "from an empty stack"),
        (b"\xff" * 100, "damaged"),
    ],
)
def test_hostile_pickles(tmp_path: Path, data: bytes, message: str) -> None:
    pack(tmp_path / "f", {"x/data.pkl": data})
    with pytest.raises(FormatError, match=message):
        torch_bin.read(tmp_path / "f")
    if data.startswith(b"\x80"):
        (tmp_path / "legacy").write_bytes(data)
        with pytest.raises(FormatError):
            torch_bin.read(tmp_path / "legacy")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_hostile_zip_files(tmp_path: Path) -> None:
    path = tmp_path / "f"
    records = {"x/data.pkl": dumped({"a": tensor()}), "x/data/0": b"\0" * 8}

    def check(message: str) -> None:
        with pytest.raises(FormatError, match=message):
            torch_bin.read(path)

    pack(path, records, zipfile.ZIP_DEFLATED)
    check("is compressed")
    pack(path, {"x/data/0": b""})
    check("one record data.pkl, found 0")
    pack(path, {**records, "y/data.pkl": b""})
    check("one record data.pkl, found 2")
    with zipfile.ZipFile(path, "w") as archive:
        for name in [*records, "x/data/0"]:
            archive.writestr(name, records[name])
    check("expected a PyTorch file")
    pack(path, records)
    good = path.read_bytes()
    assert torch_bin.read(path)["a"].tolist() == [0, 0]
    flipped = bytearray(good)
    flipped[good.index(b"\0" * 8, good.index(b"x/data/0"))] ^= 1
    path.write_bytes(flipped)
    check("CRC|valid PyTorch file")
    path.write_bytes(good.replace(struct.pack("<II", 8, 8), struct.pack("<II", 2**31, 2**31)))
    check("claims more bytes than the file has")


@LEGACY
def test_truncated_anywhere(tmp_path: Path, legacy: bool) -> None:
    save({"a": torch.ones(3), "b": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "f", legacy=legacy)
    data = (tmp_path / "f").read_bytes()
    for size in range(len(data)):
        (tmp_path / "f").write_bytes(data[:size])
        with pytest.raises(FormatError):
            torch_bin.read(tmp_path / "f")


@settings(max_examples=300, deadline=None)
@given(
    st.booleans(),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_damaged_anywhere(
    tmp_path_factory: pytest.TempPathFactory, legacy: bool, changes: list[tuple[float, int]]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    good = folder / f"good{legacy}"
    if not good.exists():
        save({"a": torch.ones(3), "b": torch.ones(2, 2).T}, good, legacy=legacy)
    data = bytearray(good.read_bytes())
    for where, byte in changes:
        data[int(where * len(data))] = byte
    (folder / "damaged").write_bytes(data)
    with contextlib.suppress(FormatError):  # damage to a value goes unnoticed, or the CRC shows it
        torch_bin.read(folder / "damaged")


@pytest.mark.parametrize("read", [torch_bin.read, torch_bin.keys_and_shapes])
def test_paths(tmp_path: Path, read: Callable[[object], object]) -> None:
    for path, message in [(tmp_path, "directory"), (tmp_path / "missing", "No such file")]:
        with pytest.raises(FileError, match=message):
            read(path)
    for data, message in [
        (b"", "expected a PyTorch file"),
        (b"Placeholder binary", "18 bytes that begin with b'Placeholder bina'"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (pickle.dumps({"a": 1}, 2), "a pickle that torch.save did not write"),
    ]:
        (tmp_path / "f").write_bytes(data)
        with pytest.raises(FormatError, match=message):
            read(tmp_path / "f")


@pytest.mark.parametrize(("offset", "count", "fits"), [(0, 10, True), (7, 3, True), (8, 3, False), (0, 11, False)])
def test_a_view_ends_within_its_storage(offset: int, count: int, fits: bool) -> None:
    """Also where only keys and shapes are read, so that numpy sees no bytes."""
    kind = torch_bin.Global("torch.FloatStorage")
    identity = ("storage", kind, "0", "cpu", 10, ("1", offset, count))
    if fits:
        assert torch_bin._parse_storage(identity).count == count
        return
    with pytest.raises(torch_bin.UnsupportedPickle, match="a view ends beyond its 10 elements"):
        torch_bin._parse_storage(identity)


@pytest.mark.parametrize("view", [("1", 0), ("1", 0, 10, 0), ["1", 0, 10], 3])
def test_a_view_is_a_key_an_offset_and_a_count(view: object) -> None:
    identity = ("storage", torch_bin.Global("torch.FloatStorage"), "0", "cpu", 10, view)
    with pytest.raises(
        torch_bin.UnsupportedPickle, match="expected a view of integers >= 0, found a negative integer or another type"
    ):
        torch_bin._parse_storage(identity)


@pytest.mark.parametrize(
    ("flags", "plain"), [({}, True), ({"conj": False}, True), ({"conj": False, "neg": True}, False)]
)
def test_a_tensor_is_plain_if_no_flag_changes_its_values(flags: dict[str, bool], plain: bool) -> None:
    storage = torch_bin._Storage("0", "F32", 6, 0, 6)
    arguments = (storage, 0, (2, 3), (3, 1), False, {}, flags)
    if plain:
        assert torch_bin._rebuild("torch._utils._rebuild_tensor_v2", arguments).shape == (2, 3)
        return
    with pytest.raises(torch_bin.UnsupportedPickle, match="lazily conjugated or negated"):
        torch_bin._rebuild("torch._utils._rebuild_tensor_v2", arguments)
