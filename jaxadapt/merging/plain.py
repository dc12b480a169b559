"""Variants of LoRA that are trained differently but compute what a plain LoRA does: convert their files to plain LoRA.

They follow PEFT 0.21.2 (`tuners/lora/variants.py`). numpy only; no model is needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxadapt.adapters.peft_tensors import PeftTensors
from jaxadapt.configs import LoraConfig
from jaxadapt.core.errors import ConfigError, MismatchError
from jaxadapt.keymaps.keymap import PEFT_PREFIX

Array = Any

_ONLY_IN_TRAINING = {"velora_config": ".lora_velora_embed", "monteclora_config": ".lora_monteclora_sampler."}


def plain_lora(tensors: PeftTensors) -> PeftTensors:
    """Convert the file of a LoRA variant to a plain LoRA that computes exactly the same.

    | field | conversion |
    |---|---|
    | `use_bdlora` | zeros are put between the blocks of A or B: A (r, in), B (out, r) |
    | `use_qalora` (arXiv:2309.14717; on a GPTQ base) | A (r, in/group) repeats for each input, times in/group² |
    | `velora_config`, `monteclora_config` | removed with their tensors, which only training uses |

    Further training trains a plain LoRA, not the variant. Other files are returned unchanged.

    Raises `ConfigError` for an adapter that is not LoRA, `MismatchError` if a tensor does not divide into the blocks.

    >>> import numpy as np
    >>> config = LoraConfig(r=2, target_modules=["q"], use_bdlora={"target_modules_bd_a": ["q"], "nblocks": 2})
    >>> a, b = "base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"
    >>> plain_lora(PeftTensors(config, {a: np.ones((2, 2)), b: np.ones((3, 2))})).tensors[a].tolist()
    [[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]
    """
    config = tensors.config
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"{tensors.source}: plain_lora converts LORA only, found {config.peft_type}")
    arrays = {
        key: x
        for key, x in tensors.tensors.items()
        if not any(config.get(field) and part in f"{key}." for field, part in _ONLY_IN_TRAINING.items())
    }
    if config.use_bdlora:
        arrays = {key: _blocks_to_matrix(config.use_bdlora, key, x, tensors.source) for key, x in arrays.items()}
    if config.use_qalora:
        size = config.qalora_group_size
        arrays = {key: _repeat_inputs(x, size) if key.endswith(".lora_A.weight") else x for key, x in arrays.items()}
    unset = dict.fromkeys(("use_bdlora", *_ONLY_IN_TRAINING))
    return dataclasses.replace(tensors, config=config.replace(**unset, use_qalora=False), tensors=arrays)


def _blocks_to_matrix(bdlora: Mapping[str, Any], key: str, x: Array, source: str) -> Array:
    """Return a tensor's blocks on the diagonal of a matrix; other tensors unchanged."""
    import numpy as np

    module, dot, side = key.removeprefix(PEFT_PREFIX).rpartition(".lora_")
    field = {"A.weight": "target_modules_bd_a", "B.weight": "target_modules_bd_b"}.get(side) if dot else None
    patterns, count = bdlora.get(field or "") or (), bdlora.get("nblocks", 1)
    if not any(pattern in module for pattern in patterns):  # as in PEFT, anywhere in the name
        return x
    if x.shape[0] % count:
        raise MismatchError(f"{source}: {key}: expected rows for {count} blocks (use_bdlora), found {list(x.shape)}")
    rows, columns = x.shape[0] // count, x.shape[1]
    matrix = np.zeros((x.shape[0], columns * count), x.dtype)
    for i in range(count):
        block = slice(i * rows, (i + 1) * rows)
        matrix[block, i * columns : (i + 1) * columns] = x[block]
    return matrix


def _repeat_inputs(a: Array, size: int) -> Array:
    """Return A on the inputs themselves: PEFT averages each group of inputs and multiplies by the number of groups."""
    import numpy as np

    return np.repeat(np.asarray(a) * np.asarray(a.shape[1] / size, a.dtype), size, axis=1)
