"""GGUF files of whole models and of adapters, for llama.cpp and Ollama.

A model is read with PyTorch's names and layouts, and written after a merge:

    GGUF file ──GgufTensors──► {PyTorch key: float32 tensor} ──merge_files.plan_merge──► {…} ──► f16, bf16 or q8_0

An adapter is written in its plain form:

    PEFT tensors ──plain_lora──► one rank, scale 1 ──the architecture's names and rows──► `blk.0.attn_q.weight.lora_a`

A table has the layout in which llama.cpp stores each architecture that is exported: names, order of rows, transposed
and shifted weights. The rules are those of llama.cpp's converter, `conversion/*.py` in the sources of
llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxadapt.adapters.peft_tensors import PeftTensors, require_floats
from jaxadapt.arrays.tensor_source import TensorSource, TensorSpec, as_source
from jaxadapt.configs import lora
from jaxadapt.configs.validation import is_int
from jaxadapt.core.errors import ConfigError, FileError, FormatError, MismatchError, raise_listed
from jaxadapt.core.progress import LOGGER, Progress, Report, byte_counter, reporter
from jaxadapt.export import gguf_files, merge_files, untying
from jaxadapt.merging.pairs import lora_pairs
from jaxadapt.persistence import folder
from jaxadapt.storage import atomic, location

# ---------------------------------------------------------------- gguf conventions


Array = Any


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The conventions of one architecture.

    Attributes:
        name: general.architecture in GGUF.
        interleaves: True if the rows of queries and keys are reordered: llama.cpp rotates neighbouring rows 2i and 2i+1
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

LINEAR = ("ATTN_Q", "ATTN_K", "ATTN_V", "ATTN_QKV", "ATTN_OUT", "FFN_GATE", "FFN_UP", "FFN_DOWN", "OUTPUT")
"""The kinds of tensors to which llama.cpp adds a LoRA, besides TOKEN_EMBD."""


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
        counts = {"ATTN_Q": self.heads, "ATTN_K": self.kv_heads} if self.architecture.interleaves else {}
        return counts.get(kind)


def read_base(path: Any) -> Base:
    """Read the facts of a base model from its folder, its config.json or a GGUF file.

    Raises:
        FileError, FormatError: the file cannot be read, or lacks a field.
        ConfigError: the architecture is not among those that are exported.
    """
    place = location.to_location(path)
    if place.suffix == ".gguf":
        return gguf_base(gguf_files.File(place))
    place = place / "config.json" if place.name != "config.json" else place
    config = untying.read_model_config(place)
    if config is None:
        raise FormatError(f"{place}: expected the config.json of the base model, or a .gguf file, found none")
    architecture = _find_architecture(ARCHITECTURES.get(str(config.get("model_type"))), config.get("model_type"), place)
    text: Any = config.get("text_config")
    inner: Mapping[str, Any] = text if isinstance(text, Mapping) else config

    def number(*names: str, default: int | None = None) -> int:
        value: Any = next((inner[name] for name in names if inner.get(name) is not None), default)
        if not is_int(value) or value < 1:
            raise FormatError(f"{place}: expected a positive integer in {' or '.join(names)}, found {value!r}")
        return value

    heads = number("num_attention_heads", "n_head")
    kv_heads = number("num_key_value_heads", default=heads)
    return Base(
        str(place), architecture, number("num_hidden_layers", "n_layer"), heads, kv_heads, untying.is_tied(config)
    )


def gguf_base(file: gguf_files.File) -> Base:
    """Return the facts of a base model in a GGUF file. Raises `ConfigError` for other architectures."""
    name = file.value("general.architecture")
    found = next((each for each in ARCHITECTURES.values() if each.name == name), None)
    architecture = _find_architecture(found, name, file.path)
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
    is_number = {field: is_int(value) and value > 0 for field, value in numbers.items()}
    if wrong := [f"{name}.{field}={value!r}" for field, value in numbers.items() if not is_number[field]]:
        raise FormatError(f"{file.path}: expected one positive integer for each field, found {', '.join(wrong)}")
    if layers > (count := len(file.names)):  # each has tensors
        raise FormatError(f"{file.path}: expected the tensors of {layers} layers ({name}.block_count), found {count}")
    return Base(str(file.path), architecture, layers, heads, kv_heads, "output.weight" not in file.names)


def _find_architecture(found: Architecture | None, name: object, source: Any) -> Architecture:
    if found is None:
        raise ConfigError(
            f"{source}: cannot write GGUF for the architecture {name!r}; expected one of {', '.join(ARCHITECTURES)}."
            " For another, merge the adapter (`jaxadapt merge`) and convert the model with llama.cpp's own converter"
        )
    return found


def interleave_rows(values: Array, heads: int) -> Array:
    """Return the rows of queries or keys in llama.cpp's order: row i and row i + half of a head become neighbours.

    >>> import numpy as np
    >>> interleave_rows(np.array([[0], [1], [2], [3]]), heads=1).T
    array([[0, 2, 1, 3]])
    """
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def deinterleave_rows(values: Array, heads: int) -> Array:
    """Return rows in transformers' order; the inverse of `interleave_rows`.

    >>> import numpy as np
    >>> deinterleave_rows(np.array([[0], [2], [1], [3]]), heads=1).T
    array([[0, 1, 2, 3]])
    """
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


# ---------------------------------------------------------------- gguf model


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
        is_linear = self._kinds[key] in LINEAR and key.endswith(".weight")
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
    tensors = GgufTensors(file, gguf_base(file))
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
    found = collections.Counter(file.kind(name) for name in file.names if len(file.shape(name)) > 1)
    if not found:
        raise FormatError(f"{file.path}: expected the matrices of a model, found none")
    ((most, _),) = found.most_common(1)
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


# ---------------------------------------------------------------- gguf adapter


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """One tensor of the file: the key of its source, and the change of its rows or axes."""

    key: str
    heads: int | None = None
    turned: bool = False


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
    kind = gguf_files.TYPES[dtype or "float32"]
    specs = {name: (kind, _shape(each, arrays)) for name, each in plan.items()}
    config: Any = tensors.config
    fields = {
        "general.type": gguf_files.Field("adapter", "STRING"),
        "adapter.type": gguf_files.Field("lora", "STRING"),
        "adapter.lora.alpha": gguf_files.Field(float(config.lora_alpha), "FLOAT32"),
    }
    count = byte_counter(report, "export", gguf_files.total_bytes(specs))
    get = functools.partial(_value, arrays, plan)
    gguf_files.write(path, base.architecture.name, fields, specs, get, count, ahead=True)
    return len(specs)


def _plan(tensors: PeftTensors, arrays: TensorSource, base: Base) -> dict[str, _Tensor]:
    """Return `{GGUF name: tensor}`. Raises `MismatchError` listing the modules without a form."""
    name_of = gguf_files.tensor_names(base.architecture.name, base.layers)
    plan: dict[str, _Tensor] = {}
    problems: list[str] = []
    for module, keys in lora_pairs(arrays).items():
        kind, name = name_of(f"{module.replace('language_model.', '')}.weight") or ("", "")
        is_table = "lora_embedding" in keys["A"]
        a, b = (arrays.specs[keys[side]].shape for side in "AB")
        heads = base.head_count(kind)
        if not name:
            problems.append(f"{module}: {base.architecture.name} has no such tensor in GGUF")
        elif kind not in LINEAR and kind != "TOKEN_EMBD":
            problems.append(f"{module}: llama.cpp adds no LoRA to {name}")
        elif kind in ("TOKEN_EMBD", "OUTPUT") and base.tied is not False:
            problems.append(f"{module}: the head is tied to the token embedding, which llama.cpp cannot adapt")
        elif len(a) != 2 or len(b) != 2 or a[0] != b[1] or (is_table != (kind == "TOKEN_EMBD")):
            problems.append(f"{module}: expected matrices A (r, in) and B (out, r), found {list(a)} and {list(b)}")
        elif heads is not None and b[0] % (2 * heads):
            problems.append(f"{module}: expected rows for {heads} heads ({base.source}), found {b[0]}")
        else:
            plan[f"{name}.lora_a"] = _Tensor(keys["A"], turned=is_table)
            plan[f"{name}.lora_b"] = _Tensor(keys["B"], heads)
    advice = lora.merge_advice(tensors.config)
    raise_listed(MismatchError, f"{tensors.source}: llama.cpp has no form for these modules; {advice}:", problems)
    return plan


def _shape(each: _Tensor, arrays: TensorSource) -> tuple[int, ...]:
    shape = tuple(arrays.specs[each.key].shape)
    return shape[::-1] if each.turned else shape


def _value(arrays: TensorSource, plan: Mapping[str, _Tensor], name: str) -> np.ndarray:
    each = plan[name]
    values = np.asarray(arrays[each.key])
    if each.turned:
        return values.T
    return values if each.heads is None else interleave_rows(values, each.heads)
