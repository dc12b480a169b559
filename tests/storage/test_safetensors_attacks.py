"""safetensors files that lie, are damaged, or are no files: one clean error each, naming file and tensor."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxadapt import FileError, FormatError
from jaxadapt.storage import safetensors as codec


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def packed(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(start: object, stop: object, shape: object, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


ATTACKS: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "at least 8 bytes, found 0"),
    "seven bytes": (b"1234567", "at least 8 bytes, found 7"),
    "no header": (struct.pack("<Q", 10), "at most the 0 bytes left, found 10"),
    "header beyond end": (struct.pack("<Q", 50) + b"{}", "at most the 2 bytes left, found 50"),
    "header just beyond end": (struct.pack("<Q", 10) + b"{}", "at most the 2 bytes left, found 10"),
    "header of 2**64-1": (b"\xff" * 8 + b"{}", "at most 100000000 bytes, found 18446744073709551615"),
    "header over 100 MB": (struct.pack("<Q", 100_000_001) + b"{}", "at most 100000000"),
    "empty header": (packed(b""), "expected a JSON object"),
    "not JSON": (packed(b"{nonsense}"), "expected JSON"),
    "not UTF-8": (packed(b'{"a\xff": 1}'), "expected UTF-8, found byte 0xff at 3"),
    "UTF-16": (packed('{"a": 1}'.encode("utf-16")), "expected a JSON object"),
    "a list": (packed(b"[1, 2]"), "expected a JSON object"),
    "a space first": (packed(b" {}"), "expected a JSON object"),
    "two values": (packed(b"{} {}"), "expected JSON"),
    "NaN": (packed(b'{"a": NaN}'), "NaN is not JSON"),
    "minus zero": (
        packed(b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}'),
        "expected integers >= 0, found -0",
    ),
    "minus one": (packed({"a": entry(0, 0, [-1])}), "'a'"),
    "deep lists": (packed(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"), "nested too deeply"),
    "deep objects": (packed(b'{"a":' * 200_000 + b"1" + b"}" * 200_000), "nested too deeply"),
    "duplicate tensor": (
        packed(b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"a":{}}', b"1234"),
        "duplicate",
    ),
    "duplicate field": (packed(b'{"a":{"dtype":"F32","dtype":"F32"}}'), "duplicate keys.*dtype"),
    "metadata number": (packed({"__metadata__": {"a": 1}}), "__metadata__: expected an object of strings"),
    "metadata list": (packed({"__metadata__": []}), "__metadata__"),
    "tensor is a number": (packed({"a": 1}), "'a': expected an object, found 1"),
    "offsets that are no list": (
        packed({"a": {**entry(0, 4, [1]), "data_offsets": None}}, b"1234"),
        "'a': expected the fields .* found data_offsets None",
    ),
    "missing field": (packed({"a": {"dtype": "F32", "shape": []}}), "'a': expected the fields"),
    "unknown field": (packed({"a": {**entry(0, 4, []), "stride": 1}}, b"1234"), "'a': expected the fields"),
    "unknown dtype": (
        packed({"a": entry(0, 4, [1], "F31")}, b"1234"),
        "'a': expected a dtype of .* found 'F31'",
    ),
    "dtype no string": (packed({"a": entry(0, 4, [1], ["F32"])}, b"1234"), "'a': expected a dtype"),
    "shape no list": (packed({"a": entry(0, 4, 1)}, b"1234"), "'a': expected a shape"),
    "negative dimension": (packed({"a": entry(0, 4, [-1, -1])}, b"1234"), "'a': expected a shape"),
    "fractional dimension": (packed({"a": entry(0, 4, [1.0])}, b"1234"), "'a': expected a shape"),
    "true as dimension": (packed({"a": entry(0, 4, [True])}, b"1234"), "'a': expected a shape"),
    "overflow": (packed({"a": entry(0, 0, [2**32, 2**32, 2**32])}), "overflows 63 bits"),
    "overflow behind a zero": (packed({"a": entry(0, 0, [0, 2**40, 2**40])}), "overflows 63 bits"),
    "65 axes": (packed({"a": entry(0, 4, [1] * 65)}, b"1234"), "at most 64 axes"),
    "huge integer": (
        packed(b'{"a":{"dtype":"F32","shape":[' + b"9" * 4000 + b'],"data_offsets":[0,4]}}'),
        "overflows",
    ),
    "monstrous integer": (
        packed(b'{"a":{"dtype":"F32","shape":[' + b"9" * 9000 + b'],"data_offsets":[0,4]}}'),
        "JSON",
    ),
    "wrong size": (packed({"a": entry(0, 4, [2])}, b"1234"), r"'a': expected 8 bytes for F32 \[2\], found 4"),
    "half a byte": (packed({"a": entry(0, 1, [1], "F4")}, b"1"), "does not fill whole bytes"),
    "negative offset": (packed({"a": entry(-4, 0, [1])}, b"1234"), "'a': expected data_offsets"),
    "start after stop": (packed({"a": entry(4, 0, [1])}, b"1234"), "'a': expected data_offsets"),
    "one offset": (
        packed({"a": {**entry(0, 4, [1]), "data_offsets": [0]}}, b"1234"),
        "'a': expected data_offsets",
    ),
    "beyond end": (packed({"a": entry(0, 8, [2])}, b"1234"), "found [0-9]+ bytes; it is truncated"),
    "100 GB": (packed({"a": entry(0, 10**11, [25 * 10**9])}, b"1234"), "found [0-9]+ bytes; it is truncated"),
    "overlap": (
        packed({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, b"x" * 12),
        "'b' overlaps tensor 'a'",
    ),
    "same bytes": (
        packed({"a": entry(0, 4, [1]), "b": entry(0, 4, [1])}, b"1234"),
        "'b' overlaps tensor 'a'",
    ),
    "gap": (
        packed({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, b"x" * 12),
        "'b' leaves a gap after tensor 'a'",
    ),
    "gap at the start": (packed({"a": entry(4, 8, [1])}, b"x" * 8), "leaves a gap after the header"),
    "bytes left over": (packed({"a": entry(0, 4, [1])}, b"x" * 8), "expected the file to end"),
    "lone surrogate": (
        packed(b'{"\\ud800":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}', b"1234"),
        "surrogate",
    ),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
    "zip file": (b"PK\x03\x04" + b"\0" * 100, "a PyTorch file"),
}


@pytest.mark.parametrize("name", list(ATTACKS))
def test_attack(tmp_path: Path, name: str) -> None:
    data, message = ATTACKS[name]
    path = tmp_path / "file.safetensors"
    path.write_bytes(data)
    for read in (codec.read_header, codec.read):
        with pytest.raises(FormatError, match=message) as caught:
            read(path)
        assert str(path) in str(caught.value)
        assert len(str(caught.value)) < 1500


def test_a_truncated_file_is_one_problem_however_many_tensors_it_lacks(tmp_path: Path) -> None:
    path = tmp_path / "f"
    whole = packed({f"t{i}": entry(4 * i, 4 * i + 4, [1]) for i in range(40)}, b"x" * 160)
    path.write_bytes(whole[:-100])
    with pytest.raises(FormatError, match=f"at {len(whole)} bytes, found {len(whole) - 100} bytes; it is tr") as caught:
        codec.read_header(path)
    assert ";" not in str(caught.value).partition("; it is truncated")[0]


def test_all_problems_stand_in_one_error(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(packed({f"t{i}": entry(0, 9, [i], "F1" if i % 2 else "F32") for i in range(40)}, b"x" * 9))
    with pytest.raises(FormatError, match=r"'t0'.*'t1'.*'t9'.*; and 30 more"):
        codec.read_header(path)


def test_types_without_an_array(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(packed({"a": entry(0, 1, [2], "F4"), "b": entry(1, 5, [1])}, b"x" * 5))
    assert codec.read_header(path).tensors["a"].nbytes == 1
    with codec.TensorFile(path) as file:
        assert file.read_many(["b"])["b"].shape == (1,)
    with pytest.raises(FormatError, match="'a': dtype F4"):
        codec.read(path)


@settings(max_examples=300, deadline=None)
@given(position=st.integers(0, 250), byte=st.integers(0, 255), cut=st.integers(0, 20) | st.just(0))
def test_damaged_files_fail_cleanly_or_agree_with_the_library(
    tmp_path_factory: pytest.TempPathFactory, position: int, byte: int, cut: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged"
    data = bytearray(packed({"__metadata__": {"k": "v"}, "a": entry(0, 8, [2]), "bb": entry(8, 12, [1, 1])}, b"x" * 12))
    data[position % len(data)] = byte
    path.write_bytes(data[: len(data) - cut])
    try:
        ours = codec.read(path)
    except FormatError:
        return
    theirs = safetensors.numpy.load(path.read_bytes())
    assert all(same(theirs[key], value) for key, value in ours.items())
    assert theirs.keys() == ours.keys()


@pytest.mark.parametrize("read", [codec.read_header, codec.read, codec.TensorFile])
def test_paths_that_are_no_files(tmp_path: Path, read: Callable[[object], object]) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    cases = {
        "missing": "No such file",
        "": "directory",
        "file/below": "not a directory",
        "fifo": "regular file",
        "loop": "links",
        "nul\0": "null",
        "n" * 300: "shorter name",
    }
    for name, message in cases.items():
        with pytest.raises(FileError, match=message) as caught:
            read(str(tmp_path / name))
        assert type(caught.value) is FileError


PLAIN = (
    '{"__metadata__":{"k":"v"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
    '"b":{"dtype":"BF16","shape":[],"data_offsets":[8,10]}}  '
)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("", ""),
        ('"__metadata__":{"k":"v"},', ""),
        ('{"k":"v"}', "{}"),
        ('{"k":"v"}', "null"),
        ('{"k":"v"}', '{"k":1}'),
        ('{"k":"v"}', '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'),
        ('{"k":"v"}', '{"k":{}'),
        ('{"k":"v"},', '{"k":"v"},"c":{},'),
        ('{"k":"v"},', '{"k":"v"},"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},'),
        ('{"k":"v"},', '{"k":"v"},"c":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},'),
        ('{"k":"v"}', '{"k":"\\ud800"}'),
        ('"a"', '"b"'),
        ('"a"', '"__metadata__"'),
        ('"a"', '"\\u0061"'),
        ('"a"', '"ä"'),
        ('"a"', '"a\n"'),
        ("F32", "F31"),
        ("F32", "F4"),
        ("[2]", "[1,2]"),
        ("[2]", "[2,1,1,1,1,1,1,1,1]"),
        ("[2]", "[0]"),
        ("[2]", "[02]"),
        ("[2]", "[2,]"),
        ("[2]", "[3]"),
        ("[2]", "[-2]"),
        ("[2]", "[2.0]"),
        ("[0,8]", "[0, 8]"),
        ("[0,8]", "[1,9]"),
        ("[0,8]", "[8,0]"),
        ("[8,10]", "[6,8]"),
        ("[8,10]", "[8,12]"),
        ("[]", "[1000000000000000000]"),
        ("}}  ", "},}"),
        ("}}  ", "}}}"),
        ("}}  ", "}"),
        ("}}  ", "},"),
        ("}}  ", "},  "),
        ("}}  ", '},"c":{}}'),
        ("}}  ", "}}\n"),
        ("}}  ", "}} x"),
        (',"b"', ',,"b"'),
        ('{"__', '{,"__'),
    ],
)
def test_a_header_as_it_is_written_reads_like_one_with_other_spaces(old: str, new: str) -> None:
    text = PLAIN.replace(old, new, 1)
    results: list[object] = []
    for raw in (text.encode(), text.replace('"dtype":', '"dtype" :', 1).encode()):
        try:
            results.append(codec.parse("f", raw, 8 + len(raw) + 10)[:2])
        except FormatError as error:
            results.append(re.sub(r"line .*|[0-9]", "", str(error)))  # the places and sizes differ by the space
    assert results[0] == results[1]
