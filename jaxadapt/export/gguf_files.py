"""GGUF files of whole models and of adapters, for llama.cpp and Ollama, by the package `gguf`.

A model is read with PyTorch's names and layouts, and written after a merge:

    GGUF file ──GgufTensors──► {PyTorch key: float32 tensor} ──merge_files.plan_merge──► {…} ──► f16, bf16 or q8_0

An adapter is written in its plain form:

    PEFT tensors ──plain_lora──► one rank, scale 1 ──the architecture's names and rows──► `blk.0.attn_q.weight.lora_a`

The only module of the library that imports `gguf`. Tensors are numpy arrays in PyTorch's layout (rows first); the
file lists the sizes of an axis in the opposite order. A table has the layout in which llama.cpp stores each
architecture that is exported: names, order of rows, transposed and shifted weights. The rules are those of
llama.cpp's converter, `conversion/*.py` in the sources of llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import math
import mmap
import os
import re
import struct
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxadapt.adapters.peft_tensors import PeftTensors, require_floats
from jaxadapt.arrays.tensor_source import TensorSource, TensorSpec, as_source, numpy_dtype
from jaxadapt.configs import lora
from jaxadapt.configs.validation import is_int
from jaxadapt.core.errors import (
    ConfigError,
    FileError,
    FormatError,
    MismatchError,
    Report,
    byte_counter,
    raise_as,
    raise_listed,
)
from jaxadapt.merging.pairs import lora_pairs
from jaxadapt.storage import atomic, hf_model, local_files, location

# ---------------------------------------------------------------- files


INSTALL = "pip install 'jaxadapt[gguf]'"
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
"""{dtype: type of a GGUF tensor}, of the types that are written."""

Specs = Mapping[str, tuple[str, tuple[int, ...]]]
"""`{tensor: (type, shape)}`, with the types of `TYPES`."""


class Field(NamedTuple):
    """A field of a GGUF file. The types are GGUF's names ("STRING", "UINT32", "ARRAY"); `item` is that of an array."""

    value: Any
    type: str
    item: str | None = None


def _gguf() -> Any:
    try:
        return importlib.import_module("gguf")
    except ModuleNotFoundError as error:
        raise FileError(f"GGUF files need the package gguf, which is not installed; run: {INSTALL}") from error


def tensor_names(architecture: str, layers: int) -> Callable[[str], tuple[str, str] | None]:
    """Return a function from a PyTorch key to its GGUF tensor: (kind, name), as llama.cpp's converter names it.

    >>> tensor_names("llama", 1)("model.layers.0.self_attn.q_proj.weight")
    ('ATTN_Q', 'blk.0.attn_q.weight')
    """
    gguf = _gguf()
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[architecture], 1)  # as large as its number of layers, which a file may state

    def name_of(key: str) -> tuple[str, str] | None:
        number = _LAYER.search(key)
        if number is not None and int(number[0]) >= layers:
            return None
        found = table.get_type_and_name(_LAYER.sub("0", key, 1), try_suffixes=(".weight", ".bias"))
        if found is None:
            return None
        return found[0].name, found[1] if number is None else found[1].replace("blk.0.", f"blk.{number[0]}.", 1)

    return name_of


_LAYER = re.compile(r"(?<=\.)(?:0|[1-9][0-9]{0,17})(?=\.)")
"""The number of a layer in a key."""


def write(
    path: str | os.PathLike[str],
    architecture: str,
    fields: Mapping[str, Field],
    specs: Specs,
    get: Callable[[str], np.ndarray],
    report: Report,
    task: str,
    *,
    ahead: bool = False,
) -> None:
    """Write a GGUF file durably and atomically, holding one tensor at a time.

    Args:
        path: the file.
        architecture: the field general.architecture.
        fields: the other fields.
        specs: the type and shape of each tensor, in the file's order.
        get: returns a tensor of that shape; it is converted to the type of its spec.
        report: called with (task, bytes done, bytes of all tensors).
        ahead: True to call `get` in a thread for the next two tensors while one is written.

    Raises:
        FileError: the package is missing, or the file cannot be written; an existing file is then unchanged.
        MismatchError: a finite value is infinite in the type.
    """
    gguf = _gguf()
    target = location.to_location(path)
    if isinstance(target, location.Address):
        raise FileError(f"{target}: expected a local path for a GGUF file; copy it to the object store afterwards")

    def packed(name: str) -> np.ndarray:
        values, kind = get(name), specs[name][0]
        with np.errstate(over="ignore"):
            data = pack(values, kind)
        is_finite = kind != "F16" or np.isfinite(data.view("float16")).all()
        if not is_finite and np.isfinite(np.asarray(values, "float32")).all():
            raise MismatchError(f"{target}: {name}: values above 65504 do not fit float16; write bfloat16 or float32")
        return data

    sizes = {name: _nbytes(gguf, kind, shape) for name, (kind, shape) in specs.items()}
    header, alignment = _header(gguf, target, architecture, fields, specs, sizes)
    count = byte_counter(report, task, sum(sizes.values()))
    with atomic.open_replacement(target) as replacement:
        replacement.write(memoryview(header + bytes(-len(header) % alignment)))
        with contextlib.closing(local_files.map_ahead(packed, specs) if ahead else (packed(x) for x in specs)) as data:
            for name in specs:
                replacement.write(next(data).reshape(-1).data)
                replacement.write(memoryview(bytes(-sizes[name] % alignment)))
                count(sizes[name])


def _header(
    gguf: Any,
    target: Path,
    architecture: str,
    fields: Mapping[str, Field],
    specs: Specs,
    sizes: Mapping[str, int],
) -> tuple[bytes, int]:
    """Return the bytes before the tensors, and the alignment of all; `sizes` are those of the tensors in bytes."""
    raise_listed(
        FormatError,
        f"{target}: the package gguf cannot write these fields, empty arrays:",
        (name for name, field in fields.items() if field.type == "ARRAY" and not field.value),
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header.gguf"  # the package writes only files
        writer = gguf.GGUFWriter(path, architecture)
        if "general.alignment" in fields:  # readers place the tensors by this field
            writer.data_alignment = int(fields["general.alignment"].value)
        for name, field in fields.items():
            item = None if field.item is None else gguf.GGUFValueType[field.item]
            writer.add_key_value(name, field.value, gguf.GGUFValueType[field.type], item)
        for name, (kind, shape) in specs.items():
            writer.add_tensor_info(name, shape, np.dtype("float32"), sizes[name], gguf.GGMLQuantizationType[kind])
        with local_files.file_errors("write", target), contextlib.closing(writer):
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        return path.read_bytes(), writer.data_alignment


def _nbytes(gguf: Any, kind: str, shape: Sequence[int]) -> int:
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return math.prod(shape) // block * size


def pack(values: np.ndarray, kind: str) -> np.ndarray:
    """Return a tensor as the bytes of a GGUF type.

    >>> pack(np.ones((1, 32), "float32"), "Q8_0").shape
    (1, 34)
    """
    if kind != "Q8_0":
        return np.ascontiguousarray(values, numpy_dtype(kind)).view("uint8")  # gguf's own BF16 is 20 times slower
    gguf = _gguf()
    return gguf.quants.quantize(np.ascontiguousarray(values, "float32"), gguf.GGMLQuantizationType[kind])


_FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""{number of a type of a field: letter of `struct`}; 8 is a string and 9 an array."""
_MAX_AXES = 4


class Tensor(NamedTuple):
    """A tensor in a file: its type, its shape (rows first), the place of its bytes and their number."""

    kind: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class File:
    """An opened GGUF file. Its tensors stay in the file, by a memory map, until they are read.

    Each count and length in the header is checked against the file's size. The package's own reader checks none, and
    needs 1,400 bytes for each string of an array.

    Attributes:
        path: the file.
        fields: `{name: field}`, without those of the file's structure.
        tensors: `{name: tensor}`, in the file's order.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open a file.

        Raises:
            FileError: the file or the package `gguf` is missing.
            FormatError: it is no GGUF file.
        """
        gguf = _gguf()
        self.path: location.Location = location.to_location(path)
        if isinstance(self.path, location.Address) or not location.is_file(self.path):
            raise FileError(f"{self.path}: expected a local GGUF file, found none")
        expected = f"{self.path}: expected a GGUF file, but reading failed"
        with local_files.read_errors(self.path), raise_as(FormatError, expected, ValueError, KeyError):
            with self.path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._read_header(gguf)

    def value(self, name: str, default: Any = None) -> Any:
        """Return the value of a field, or the default."""
        return self.fields[name].value if name in self.fields else default

    def read(self, name: str) -> np.ndarray:
        """Return a tensor in float32. Raises `FormatError` for a type that the package cannot read."""
        gguf, tensor = _gguf(), self.tensors[name]
        rows = np.frombuffer(self._data, "uint8", tensor.nbytes, tensor.start).reshape(*tensor.shape[:-1], -1)
        refused = f"{self.path}: {name}: the package gguf cannot read the type {tensor.kind}"
        with raise_as(FormatError, refused, NotImplementedError, advice="; convert the file to F16 or Q8_0 first"):
            return gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[tensor.kind]).reshape(tensor.shape)

    def _read_header(self, gguf: Any) -> None:
        """Read the fields and the tensors. Raises `ValueError` if the header is damaged."""
        if self._take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        (version,) = self._numbers(4)
        if version not in (2, 3):
            raise ValueError(
                "big-endian; convert it to little-endian" if version % 65536 == 0 else f"version {version}"
            )
        tensor_count, field_count = self._numbers(10, 2)
        self.fields: dict[str, Field] = self._named(field_count, lambda: self._field(gguf.GGUFValueType))
        alignment = self.fields.get("general.alignment", Field(32, "UINT32"))
        if alignment.type != "UINT32" or alignment.value.bit_count() != 1:
            raise ValueError(f"general.alignment: {alignment.value!r}")
        found = self._named(tensor_count, lambda: self._tensor(gguf))
        begin = self._data.tell() + -self._data.tell() % alignment.value
        self.tensors: dict[str, Tensor] = {
            name: tensor._replace(start=begin + tensor.start) for name, tensor in found.items()
        }
        for name, tensor in self.tensors.items():
            if tensor.start + tensor.nbytes > len(self._data):
                raise ValueError(f"{name}: {tensor.nbytes} bytes at byte {tensor.start} of {len(self._data)}")

    def _take(self, count: int) -> bytes:
        if count > len(self._data) - self._data.tell():
            raise ValueError(f"{count} bytes at byte {self._data.tell()} of {len(self._data)}")
        return self._data.read(count)

    def _numbers(self, kind: int, count: int = 1) -> tuple[Any, ...]:
        return struct.unpack(f"<{count}{_FORMS[kind]}", self._take(count * struct.calcsize(f"<{_FORMS[kind]}")))

    def _text(self) -> str:
        return self._take(*self._numbers(10)).decode()

    def _named(self, count: int, read: Callable[[], Any]) -> dict[str, Any]:
        """Return names with what follows each; a count that is too large ends at the file's end."""
        items: dict[str, Any] = {}
        for _ in range(count):
            name = self._text()
            if name in items:
                raise ValueError(f"twice {name!r}")
            items[name] = read()
        return items

    def _field(self, types: Any) -> Field:
        (kind,) = self._numbers(4)
        if kind != 9:
            return Field(self._text() if kind == 8 else self._numbers(kind)[0], types(kind).name)
        (item,), (count,) = self._numbers(4), self._numbers(10)
        if item == 9:
            raise ValueError("an array of arrays")
        values = [self._text() for _ in range(count)] if item == 8 else list(self._numbers(item, count))
        return Field(values, "ARRAY", types(item).name if count else None)

    def _tensor(self, gguf: Any) -> Tensor:
        (axes,) = self._numbers(4)
        if not 1 <= axes <= _MAX_AXES:
            raise ValueError(f"a tensor of {axes} axes")
        shape = self._numbers(10, axes)[::-1]
        if 0 in shape:
            raise ValueError(f"a tensor of the shape {list(shape)}")
        kind = gguf.GGMLQuantizationType(*self._numbers(4))
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise ValueError(f"a row of {shape[-1]} values in blocks of {block}")
        (offset,) = self._numbers(10)
        return Tensor(kind.name, shape, offset, math.prod(shape) // block * size)


# ---------------------------------------------------------------- conventions


Array = Any


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The conventions of one architecture.

    Attributes:
        name: general.architecture in GGUF.
        interleaves: True if the rows of queries and keys are reordered: llama.cpp rotates neighboring rows 2i and 2i+1
            of a head, transformers the rows i and i + half.
        turned: True if PyTorch stores its linear weights as (in, out), GGUF as (out, in).
        shifted: True if GGUF stores the weights of norms plus one.
    """

    name: str
    interleaves: bool = False
    turned: bool = False
    shifted: bool = False


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", interleaves=True),
    "mistral": Architecture("llama", interleaves=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma", shifted=True),
    "gemma2": Architecture("gemma2", shifted=True),
    "gemma3": Architecture("gemma3", shifted=True),
    "gemma3_text": Architecture("gemma3", shifted=True),
    "phi3": Architecture("phi3"),
    "gpt2": Architecture("gpt2", turned=True),
}
"""{model_type of config.json: conventions}."""

OF_ADAPTERS: Mapping[str, Architecture] = {
    **ARCHITECTURES,
    "mixtral": Architecture("llama", interleaves=True),
    "qwen3_moe": Architecture("qwen3moe"),
    "gpt_oss": Architecture("gpt-oss"),
    "llama4": Architecture("llama4"),
    "llama4_text": Architecture("llama4"),
}  # for adapters alone: whole models of the additional types are not written

LINEAR = (
    "ATTN_Q", "ATTN_K", "ATTN_V", "ATTN_QKV", "ATTN_OUT", "FFN_GATE", "FFN_UP", "FFN_DOWN", "OUTPUT",
    "FFN_GATE_INP", "FFN_GATE_SHEXP", "FFN_UP_SHEXP", "FFN_DOWN_SHEXP",
)  # fmt: skip
"""The kinds of matrices to which llama.cpp adds a LoRA, besides TOKEN_EMBD."""

STACKS = ("FFN_GATE_EXP", "FFN_UP_EXP", "FFN_DOWN_EXP")  # of experts, in the same way


@dataclasses.dataclass(frozen=True)
class Base:
    """The facts of a base model that determine its files for llama.cpp.

    Attributes:
        source: the file that states it, for messages.
        architecture: its conventions.
        layers: the number of layers.
        heads: the number of heads of queries.
        kv_heads: the number of heads of keys.
        tied: True if the head is the token embedding; None if the file does not state it.
    """

    source: str
    architecture: Architecture
    layers: int
    heads: int
    kv_heads: int
    tied: bool | None

    def head_count(self, kind: str) -> int | None:
        """Return the number of heads whose rows are reordered in tensors of a kind; None if they are not."""
        return {"ATTN_Q": self.heads, "ATTN_K": self.kv_heads}.get(kind) if self.architecture.interleaves else None


def read_base(path: Any) -> Base:
    """Read the facts of a base model from its folder, its config.json or a GGUF file.

    Raises:
        FileError, FormatError: the file cannot be read, or lacks a field.
        ConfigError: the architecture is not among those that are exported.
    """
    place = location.to_location(path)
    if place.suffix == ".gguf":
        return gguf_base(File(place), OF_ADAPTERS)
    place = place / "config.json" if place.name != "config.json" else place
    config = hf_model.read_model_config(place)
    if config is None:
        raise FormatError(f"{place}: expected the config.json of the base model, or a .gguf file, found none")
    architecture = _find_architecture(config.get("model_type"), OF_ADAPTERS, place)
    inner = hf_model.text_fields(config)

    def number(*names: str, default: int | None = None) -> int:
        value: Any = next((inner[name] for name in names if inner.get(name) is not None), default)
        if not is_int(value) or value < 1:
            raise FormatError(f"{place}: expected a positive integer in {' or '.join(names)}, found {value!r}")
        return value

    heads = number("num_attention_heads", "n_head")
    kv_heads = number("num_key_value_heads", default=heads)
    return Base(
        str(place), architecture, number("num_hidden_layers", "n_layer"), heads, kv_heads, hf_model.is_tied(config)
    )


def gguf_base(file: File, known: Mapping[str, Architecture] = ARCHITECTURES) -> Base:
    """Return the facts of a base model in a GGUF file. Raises `ConfigError` for other architectures than `known`."""
    name = file.value("general.architecture")
    architecture = _find_architecture(name, {each.name: each for each in known.values()}, file.path)
    if file.value("general.type", "model") != "model":
        raise FormatError(f"{file.path}: expected a whole model, found general.type {file.value('general.type')!r}")
    if (parts := file.value("split.count", 1)) != 1:
        raise FormatError(
            f"{file.path}: one of the {parts} files of a model; join them first (llama-gguf-split --merge {file.path}"
            " MODEL.gguf) and pass the result"
        )
    layers, heads = (file.value(f"{name}.{field}") for field in ("block_count", "attention.head_count"))
    kv_heads = file.value(f"{name}.attention.head_count_kv", heads)
    numbers = {"block_count": layers, "attention.head_count": heads, "attention.head_count_kv": kv_heads}
    if wrong := [f"{name}.{field}={x!r}" for field, x in numbers.items() if not is_int(x) or x < 1]:
        raise FormatError(f"{file.path}: expected one positive integer for each field, found {', '.join(wrong)}")
    if layers > (count := len(file.tensors)):  # each has tensors
        raise FormatError(f"{file.path}: expected the tensors of {layers} layers ({name}.block_count), found {count}")
    return Base(str(file.path), architecture, layers, heads, kv_heads, "output.weight" not in file.tensors)


def _find_architecture(name: object, known: Mapping[str, Architecture], source: Any) -> Architecture:
    if str(name) not in known:
        raise ConfigError(
            f"{source}: cannot write GGUF for the architecture {name!r}; expected one of {', '.join(known)}."
            " For another, merge the adapter (`jaxadapt merge`) and convert the model with llama.cpp's own converter"
        )
    return known[str(name)]


INTERLEAVED, HALVES = (2, -1), (-1, 2)
"""The axes of a head's rows before they are exchanged for llama.cpp's order, and for transformers'."""


def reorder_rows(values: Array, heads: int | None, axes: tuple[int, int]) -> Array:
    """Return the rows of queries or keys in another order: row i and row i + half of a head are neighbors in llama.cpp.

    Without heads, the rows stay.

    >>> import numpy as np
    >>> reorder_rows(np.array([[0], [1], [2], [3]]), 1, INTERLEAVED).T
    array([[0, 2, 1, 3]])
    >>> reorder_rows(np.array([[0], [2], [1], [3]]), 1, HALVES).T
    array([[0, 1, 2, 3]])
    """
    turned = values if heads is None else values.reshape(heads, *axes, *values.shape[1:]).swapaxes(1, 2)
    return turned.reshape(values.shape)


# ---------------------------------------------------------------- model


_LLAMA = (
    "model.embed_tokens", "model.norm",
    *("model.layers.{l}." + name for name in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.qkv_proj", "self_attn.o_proj",
        "self_attn.q_norm", "self_attn.k_norm", "mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj", "mlp.down_proj",
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
    )), "lm_head",
)  # fmt: skip
_GPT2 = (
    "transformer.wte", "transformer.wpe", "transformer.ln_f",
    *("transformer.h.{l}." + name for name in (
        "ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj",
    )), "lm_head",
)  # fmt: skip
"""The modules of the architectures with LLaMA's names, and of GPT-2; {l} is the number of a layer."""


class GgufTensors(TensorSource):
    """The tensors of a GGUF file under PyTorch's keys, in float32 and in PyTorch's row order."""

    def __init__(self, file: File, base: Base) -> None:
        """Find the PyTorch key of each tensor; tensors without one (rotary factors) are left out."""
        self.source: str = str(file.path)
        self.base: Base = base
        name_of = tensor_names(base.architecture.name, base.layers)
        self.names: dict[str, str] = {}
        self._file = file
        self._kinds: dict[str, str] = {}
        for key in _candidates(base, "blk.0.ffn_gate.weight" in file.tensors):
            kind, name = name_of(key) or ("", "")
            if name in file.tensors and name not in self.names.values():
                self.names[key], self._kinds[key] = name, kind
        rows = {key: (self.specs[key].shape[0], base.head_count(kind)) for key, kind in self._kinds.items()}
        raise_listed(
            FormatError,
            f"{file.path}: the fields state other heads than the tensors have:",
            [
                f"{self.names[key]}: {n} rows for {heads} heads"
                for key, (n, heads) in rows.items()
                if heads and n % (2 * heads)
            ],
        )

    @functools.cached_property
    def specs(self) -> dict[str, TensorSpec]:
        shapes = {key: self._file.tensors[name].shape for key, name in self.names.items()}
        return {
            key: TensorSpec(shape[::-1] if self._is_turned(key) else shape, np.dtype("float32"))
            for key, shape in shapes.items()
        }

    def _is_turned(self, key: str) -> bool:
        is_linear = self._kinds[key] in LINEAR and key.endswith(".weight") and key != "lm_head.weight"
        return self.base.architecture.turned and is_linear

    def _shift(self, key: str) -> float:
        return 1.0 if self.base.architecture.shifted and key.endswith("norm.weight") else 0.0

    def read(self, key: str) -> np.ndarray:
        values = reorder_rows(self._file.read(self.names[key]), self.base.head_count(self._kinds[key]), HALVES)
        values = values.T if self._is_turned(key) else values
        return np.ascontiguousarray(values - np.float32(self._shift(key)) if self._shift(key) else values)

    def to_gguf(self, key: str, values: np.ndarray) -> np.ndarray:
        """Return a tensor with GGUF's rows and layout, the inverse of `read`."""
        values = np.asarray(values, "float32")
        if key not in self.names:
            return values  # a head of its own
        values = values + np.float32(self._shift(key)) if self._shift(key) else values
        values = values.T if self._is_turned(key) else values
        return reorder_rows(values, self.base.head_count(self._kinds[key]), INTERLEAVED)


def _candidates(base: Base, has_gate: bool) -> list[str]:
    """Return the keys that a model of the architecture may have; fused and separate ones exclude each other."""
    left_out = ".gate_up_proj" if has_gate else ".up_proj"
    names = [name for name in (_GPT2 if base.architecture.turned else _LLAMA) if not name.endswith(left_out)]
    modules = dict.fromkeys(name.format(l=layer) for layer in range(base.layers) for name in names)
    return [f"{module}.{end}" for module in modules for end in ("weight", "bias")]


# ---------------------------------------------------------------- adapter


def write_adapter(
    tensors: PeftTensors, path: str | os.PathLike[str], base: Base, dtype: str | None, report: Report
) -> int:
    """Write a LoRA in its plain form as a GGUF file. Return the number of its tensors.

    Args:
        tensors: the adapter in its plain form.
        path: the file.
        base: the facts of the base model.
        dtype: "float32" (default), "float16" or "bfloat16". llama.cpp rounds activations to the dtype of A.
        report: called with ("export", bytes done, total bytes).

    Raises:
        MismatchError: llama.cpp has no form for a tensor; the message lists all of them.
    """
    arrays = as_source(tensors.tensors)
    require_floats(tensors.config, arrays.specs, os.fspath(path))
    plan = _plan(tensors, arrays, base)
    shapes = arrays.shapes
    specs = {
        name: (TYPES[dtype or "float32"], shapes[key][:: -1 if turned else 1])
        for name, (key, _, turned) in plan.items()
    }
    fields = {
        "general.type": Field("adapter", "STRING"),
        "adapter.type": Field("lora", "STRING"),
        "adapter.lora.alpha": Field(float(tensors.config.get("lora_alpha")), "FLOAT32"),
    }

    def get(name: str) -> np.ndarray:
        key, heads, turned = plan[name]
        values = np.asarray(arrays[key])
        return values.T if turned else reorder_rows(values, heads, INTERLEAVED)

    write(path, base.architecture.name, fields, specs, get, report, "export", ahead=True)
    return len(specs)


def _plan(tensors: PeftTensors, arrays: TensorSource, base: Base) -> dict[str, tuple[str, int | None, bool]]:
    """Return `{GGUF name: (key, the heads whose rows are reordered, True for swapped axes)}`.

    Raises `MismatchError` listing the modules without a form.
    """
    name_of = tensor_names(base.architecture.name, base.layers)
    plan: dict[str, tuple[str, int | None, bool]] = {}
    problems: list[str] = []
    for module, keys in lora_pairs(arrays).items():
        kind, name = name_of(f"{module.replace('language_model.', '')}.weight") or ("", "")
        is_table = "lora_embedding" in keys.a
        a, b = (arrays.specs[key].shape for key in keys)
        heads = base.head_count(kind)
        are_pair = len(a) == len(b) == (3 if kind in STACKS else 2) and a[:-2] == b[:-2] and a[-2] == b[-1]
        rules = (
            (not name, f"{base.architecture.name} has no such tensor in GGUF"),
            (kind not in (*LINEAR, *STACKS, "TOKEN_EMBD"), f"llama.cpp adds no LoRA to {name}"),
            (
                kind in ("TOKEN_EMBD", "OUTPUT") and base.tied is not False,
                "the head is tied to the token embedding, which llama.cpp cannot adapt",
            ),
            (
                not are_pair or is_table != (kind == "TOKEN_EMBD"),
                f"expected matrices A (r, in) and B (out, r), found {list(a)} and {list(b)}",
            ),
            (
                heads is not None and are_pair and b[0] % (2 * heads),
                f"expected rows for {heads} heads ({base.source}), found {b[0] if b else b}",
            ),
        )
        problems += [f"{module}: {problem}" for applies, problem in rules if applies][:1]
        plan |= {f"{name}.lora_a": (keys.a, None, is_table), f"{name}.lora_b": (keys.b, heads, False)}
    raise_listed(
        MismatchError,
        f"{tensors.source}: llama.cpp has no form for these modules; {lora.merge_advice(tensors.config)}:",
        problems,
    )
    return plan
