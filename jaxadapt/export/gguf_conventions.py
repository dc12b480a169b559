"""The layout in which llama.cpp stores each architecture: names, order of rows, transposed and shifted weights.

Data on the architectures that are exported. The rules are those of llama.cpp's converter, `conversion/*.py` in the
sources of llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxadapt.configs.validation import is_int
from jaxadapt.core.errors import ConfigError, FormatError
from jaxadapt.export import gguf_files, untying
from jaxadapt.storage import location

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
