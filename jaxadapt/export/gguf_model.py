"""A whole model in a GGUF file, read with PyTorch's names and layouts, and written after a merge.

GGUF file ──GgufTensors──► {PyTorch key: float32 tensor} ──merge_files.plan_merge──► {…} ──► GGUF file (f16, bf16, q8_0)
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxadapt.core.errors import ConfigError, FileError, FormatError, MismatchError, raise_listed
from jaxadapt.core.progress import LOGGER, Progress, byte_counter, reporter
from jaxadapt.export import gguf_conventions, gguf_files, merge_files
from jaxadapt.export.gguf_conventions import Base, deinterleave_rows, interleave_rows
from jaxadapt.persistence import folder
from jaxadapt.storage import atomic, location
from jaxadapt.storage.source import TensorSource, TensorSpec

_FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}
"""llama.cpp's numbers of these types in general.file_type."""
_FLOATS = {"F32", "F16", "BF16"}
"""The types whose values are those of the model; the others are quantized."""

_FLAT = ("embed_tokens", "norm")
_LAYER = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.qkv_proj", "self_attn.o_proj",
    "self_attn.q_norm", "self_attn.k_norm", "mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj", "mlp.down_proj",
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
)  # fmt: skip
_GPT2_FLAT = ("wte", "wpe", "ln_f")
_GPT2_LAYER = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")


class GgufTensors(TensorSource):
    """The tensors of a GGUF file under PyTorch's keys, in float32 and in PyTorch's row order."""

    def __init__(self, file: gguf_files.File, base: Base) -> None:
        """Find the PyTorch key of each tensor; tensors without one (rotary factors) are left out."""
        self.source = str(file.path)
        self._file, self.base = file, base
        name_of = gguf_files.tensor_names(base.architecture.name, base.layers)
        present, self.names = set(file.names), dict[str, str]()
        self._kinds: dict[str, str] = {}
        for key in _candidates(base, "blk.0.ffn_gate.weight" in present):
            kind, name = name_of(key) or ("", "")
            if name in present and name not in self.names.values():
                self.names[key], self._kinds[key] = name, kind
        counts = {key: base.head_count(kind) for key, kind in self._kinds.items()}
        uneven = [
            f"{self.names[key]}: {self._shape(key, self.names[key])[0]} rows for {count} heads"
            for key, count in counts.items()
            if count and self._shape(key, self.names[key])[0] % (2 * count)
        ]
        raise_listed(FormatError, f"{file.path}: the fields state other heads than the tensors have:", uneven)

    @functools.cached_property
    def specs(self) -> dict[str, TensorSpec]:
        return {key: TensorSpec(self._shape(key, name), np.dtype("float32")) for key, name in self.names.items()}

    def _shape(self, key: str, name: str) -> tuple[int, ...]:
        shape = self._file.shape(name)
        return shape[::-1] if self._is_turned(key) else shape

    def _is_turned(self, key: str) -> bool:
        is_linear = self._kinds[key] in gguf_conventions.LINEAR and key.endswith(".weight")
        return self.base.architecture.turned and is_linear and key != "lm_head.weight"

    def _shift(self, key: str) -> float:
        return 1.0 if self.base.architecture.shifted and key.endswith("norm.weight") else 0.0

    def read(self, key: str) -> np.ndarray:
        values = self._file.read(self.names[key])
        heads = self.base.head_count(self._kinds[key])
        values = values if heads is None else deinterleave_rows(values, heads)
        values = values.T if self._is_turned(key) else values
        return np.ascontiguousarray(values - np.float32(self._shift(key)) if self._shift(key) else values)

    def to_gguf(self, key: str, values: np.ndarray) -> np.ndarray:
        """Return a tensor with GGUF's rows and layout, the inverse of `read`."""
        values = np.asarray(values, "float32")
        if key not in self.names:
            return values  # a head of its own
        values = values + np.float32(self._shift(key)) if self._shift(key) else values
        values = values.T if self._is_turned(key) else values
        heads = self.base.head_count(self._kinds[key])
        return values if heads is None else interleave_rows(values, heads)


def _candidates(base: Base, has_gate: bool) -> Iterator[str]:
    """Yield the keys that a model of the architecture may have; fused and separate ones exclude each other."""
    if base.architecture.turned:
        flat, layer, prefix, lists = _GPT2_FLAT, _GPT2_LAYER, "transformer", "h"
    else:
        flat, layer, prefix, lists = _FLAT, _LAYER, "model", "layers"
    left_out = "mlp.gate_up_proj" if has_gate else "mlp.up_proj"
    modules = [f"{prefix}.{name}" for name in flat]
    modules += [f"{prefix}.{lists}.{i}.{name}" for i in range(base.layers) for name in layer if name != left_out]
    for module in [*modules, "lm_head"]:
        yield f"{module}.weight"
        yield f"{module}.bias"


@atomic.cleans("out")
def merge_gguf(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    allow_nan: bool = False,
    progress: Progress = None,
) -> int:
    """Merge an adapter of any method into the model of a GGUF file and write another GGUF file.

    The matrices are dequantized to float32, changed, and rounded once to `dtype`. Vectors stay float32, and so does the
    table of positions. A matrix whose rows do not divide into blocks of 32 is float16 instead of q8_0. All other fields
    of the file stay, the tokenizer's included. One tensor is in memory at a time.

    Args:
        base: the GGUF file of the model.
        adapter: the adapter's folder or address.
        out: the file to write.
        dtype: "float32", "float16", "bfloat16" or "q8_0". Default: that of the base, if it is one of them.
        allow_nan: accept a NaN or an infinity in the adapter.
        progress: as in `merge_folder`.

    Returns:
        The number of changed weights.

    Raises:
        AdapterError: something does not fit. Then nothing is written.
    """
    source, target = location.to_location(base), location.to_location(out)
    if target.suffix != ".gguf":
        raise FileError(f"{target}: cannot write the merged model here: expected a file name ending in .gguf")
    if location.is_same(source, target):
        raise FileError(f"{target}: cannot write the merged model here: this is the base model; choose another file")
    file = gguf_files.File(source)
    tensors = GgufTensors(file, gguf_conventions.gguf_base(file))
    kind = _matrix_kind(file, dtype)
    with reporter(progress) as report:
        peft_tensors = folder.read(adapter, progress=report)
        if not allow_nan:
            merge_files.refuse_nan([peft_tensors], "merge")
        if {file.kind(name) for name in file.names} <= _FLOATS:
            merge_files.warn_of_another_base(tensors, peft_tensors)
        plan = merge_files.plan_merge(tensors, source, peft_tensors, tensors.base.tied)
        keys = {name: key for key, name in tensors.names.items()}
        specs = {name: (_kind(name, file.shape(name), kind), file.shape(name)) for name in file.names}
        if plan.is_untied:
            keys["output.weight"] = "lm_head.weight"
            shape = tuple(plan.specs["lm_head.weight"].shape)
            specs["output.weight"] = _kind("output.weight", shape, kind), shape
        fields = file.fields()
        architecture = fields.pop("general.architecture").value
        fields["general.file_type"] = gguf_files.Field(_FILE_TYPES[kind], "UINT32")
        if kind == "Q8_0":
            fields["general.quantization_version"] = gguf_files.Field(2, "UINT32")
        count = byte_counter(report, "merge", gguf_files.total_bytes(specs))

        def get(name: str) -> np.ndarray:
            key = keys.get(name)
            if key not in plan.changed and name in file.names:
                return file.read(name)
            assert key is not None
            values = tensors.to_gguf(key, plan.value(key, unrounded=True))
            if not allow_nan and not np.isfinite(values).all():
                raise MismatchError(
                    f"{target}: the merged tensor {name} has a NaN or an infinity; check the values of the adapter and"
                    " the base, or pass allow_nan=True (`--allow-nan`)"
                )
            return values

        gguf_files.write(target, architecture, fields, specs, get, count)
    LOGGER.info("%s: %d of %d tensors changed", target, plan.count, len(specs))
    return plan.count


def _matrix_kind(file: gguf_files.File, dtype: str | None) -> str:
    if dtype is not None:
        return gguf_files.TYPES[dtype]
    found: dict[str, int] = {}
    for name in file.names:
        if len(file.shape(name)) > 1:
            found[file.kind(name)] = found.get(file.kind(name), 0) + 1
    if not found:
        raise FormatError(f"{file.path}: expected the matrices of a model, found none")
    most = max(found, key=lambda kind: found[kind])
    if most not in gguf_files.TYPES.values():
        raise ConfigError(
            f"{file.path}: its matrices are {most}, which cannot be written; pass dtype= (`--dtype`):"
            f" {', '.join(gguf_files.TYPES)}"
        )
    return most


def _kind(name: str, shape: Any, matrices: str) -> str:
    if len(shape) < 2 or name == "position_embd.weight":
        return "F32"
    return "F16" if matrices == "Q8_0" and shape[-1] % 32 else matrices
