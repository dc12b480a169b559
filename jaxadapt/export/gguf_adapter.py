"""An adapter as a GGUF file, for llama.cpp and Ollama.

PEFT tensors ──plain_form──► one rank, scale 1 ──names and row order of the architecture──► `blk.0.attn_q.weight.lora_a`
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxadapt.adapters.adapter import PeftTensors
from jaxadapt.adapters.peft_tensors import require_floats
from jaxadapt.configs import lora
from jaxadapt.core.errors import MismatchError, raise_listed
from jaxadapt.core.progress import Report, byte_counter
from jaxadapt.export import gguf_files
from jaxadapt.export.gguf_conventions import LINEAR, Base, interleave_rows
from jaxadapt.merging.plain_form import lora_pairs
from jaxadapt.storage.source import TensorSource, as_source


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
