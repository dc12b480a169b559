"""An adapter as mlx-lm's folder: adapters.safetensors and adapter_config.json, for LoRA and DoRA.

mlx-lm adapts the modules that `keys` names, with one rank and one scale, and computes x·lora_a·lora_b: both are the
transposes of PEFT's. `persistence/mlx_files.py` reads such a folder. Read in mlx-lm 0.32.2 (`tuner/utils.py`,
`tuner/lora.py`, `tuner/dora.py`).
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
from typing import Any

import numpy as np

from jaxadapt.adapters.adapter import PeftTensors
from jaxadapt.adapters.peft_tensors import require_floats
from jaxadapt.configs import lora
from jaxadapt.core.errors import FileError, MismatchError, raise_listed
from jaxadapt.core.progress import Report, byte_counter
from jaxadapt.keymaps.keymap import PEFT_PREFIX
from jaxadapt.merging.plain_form import MAGNITUDE, lora_pairs
from jaxadapt.persistence import mlx_files
from jaxadapt.storage import atomic, location, safetensors
from jaxadapt.storage.source import TensorSource, as_source

_TABLES = re.compile(r"(^|\.)(embed_tokens|wte|lm_head)$")


def write_adapter(tensors: PeftTensors, path: str | os.PathLike[str], tied: bool | None, report: Report) -> int:
    """Write a LoRA or DoRA in its plain form as mlx-lm's folder. Return the number of its tensors.

    Args:
        tensors: the adapter in its plain form, with DoRA's magnitudes.
        path: the folder.
        tied: True if the base's head is its token embedding; None if unknown.
        report: called with ("export", bytes done, total bytes).

    Raises:
        MismatchError: mlx-lm has no form for a tensor; the message lists all of them.
        FileError: the folder contains a PEFT adapter, or cannot be written.
    """
    folder = location.to_location(path)
    if location.exists(folder / "adapter_model.safetensors"):
        raise FileError(
            f"{folder}: contains a PEFT adapter, whose configuration has the same name; choose another folder"
        )
    arrays, config = as_source(tensors.tensors), _config(tensors)
    modules = lora_pairs(arrays)
    require_floats(tensors.config, arrays.specs, folder)
    _refuse_modules(tensors, arrays, modules, tied, bool(config.use_dora))
    keys = {name: mlx_files.mlx_name(name) for name in modules}
    plan: dict[str, tuple[str, bool]] = {}  # {name in the file: (key, True to transpose)}
    for module, pair in modules.items():
        for side in "AB":
            plan[f"{keys[module]}.lora_{side.lower()}"] = pair[side], True
        if config.use_dora:
            plan[f"{keys[module]}.m"] = f"{PEFT_PREFIX}{module}{MAGNITUDE}", False
    specs = {name: _spec(arrays, *item) for name, item in plan.items()}
    document: dict[str, Any] = {
        "fine_tune_type": "dora" if config.use_dora else "lora",
        "num_layers": 0,  # no layers by position: `keys` has full names
        "lora_parameters": {"rank": config.r, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys.values())},
    }
    if config.base_model_name_or_path:
        document["model"] = config.base_model_name_or_path
    count = byte_counter(report, "export", sum(dtype.itemsize * math.prod(shape) for dtype, shape in specs.values()))
    atomic.make_folder(folder)
    with atomic.replacing_all([folder / mlx_files.WEIGHTS, folder / mlx_files.CONFIG]) as (weights, text):
        get = functools.partial(_value, arrays, plan)
        safetensors.write_to(weights, specs, get, {"format": "mlx"}, progress=count, ahead=True)
        text.write(memoryview(json.dumps(document, indent=4, sort_keys=True).encode()))
    return len(specs)


def _config(tensors: PeftTensors) -> Any:
    return tensors.config


def _refuse_modules(
    tensors: PeftTensors, arrays: TensorSource, modules: dict[str, dict[str, str]], tied: bool | None, dora: bool
) -> None:
    problems: list[str] = []
    for module, keys in modules.items():
        a, b = (arrays.specs[keys[side]].shape for side in "AB")
        if tensors.config.get("target_parameters"):
            problems.append(f"{module}: mlx-lm adapts modules, and this is a parameter (target_parameters)")
        elif len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            problems.append(f"{module}: expected matrices A (r, in) and B (out, r), found {list(a)} and {list(b)}")
        elif _TABLES.search(module) and tied is not False:
            why = "the head is tied to it" if tied else "the head may be tied to it; pass base="
            problems.append(f"{module}: mlx-lm would change the token embedding and the head; {why}")
        elif dora and "lora_embedding" in keys["A"]:
            problems.append(f"{module}: mlx-lm normalizes the rows of a DoRA embedding, PEFT its columns")
    advice = lora.merge_advice(tensors.config)
    raise_listed(MismatchError, f"{tensors.source}: mlx-lm has no form for these modules; {advice}:", problems)


def _spec(arrays: TensorSource, key: str, turned: bool) -> tuple[Any, tuple[int, ...]]:
    shape, dtype = arrays.specs[key]
    return dtype, tuple(shape[::-1] if turned else shape)


def _value(arrays: TensorSource, plan: dict[str, tuple[str, bool]], name: str) -> np.ndarray:
    key, turned = plan[name]
    values = np.asarray(arrays[key])
    return np.ascontiguousarray(safetensors.little_bits(values).T).view(values.dtype) if turned else values
