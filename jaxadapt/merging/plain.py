"""Variants of LoRA that are trained in another way and compute what a plain LoRA does: their file as a plain LoRA's.

As PEFT 0.21.2 computes them (`tuners/lora/variants.py`). numpy only; no model is needed.
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
    """The plain LoRA that computes what a file of one of these variants does, exactly.

    | field | what becomes of it |
    |---|---|
    | `use_bdlora` | the blocks of A or B get the zeros between them: A (r, in), B (out, r) |
    | `use_qalora` (arXiv:2309.14717; on a GPTQ base) | A (r, in/group) for each input of a group, times in/group² |
    | `velora_config`, `monteclora_config` | left out with their tensors, which only training uses |

    What is trained after that is a plain LoRA, no more the variant. Other files come back as they are.

    Raises `ConfigError` for what is no LoRA, `MismatchError` where a tensor has no such blocks.

    >>> import numpy as np
    >>> config = LoraConfig(r=2, target_modules=["q"], use_bdlora={"target_modules_bd_a": ["q"], "nblocks": 2})
    >>> a, b = "base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"
    >>> plain_lora(PeftTensors(config, {a: np.ones((2, 2)), b: np.ones((3, 2))})).tensors[a].tolist()
    [[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]
    """
    config = tensors.config
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"{tensors.source}: plain_lora is for LORA, and this is {config.peft_type}")
    held = {
        key: x
        for key, x in tensors.tensors.items()
        if not any(config.get(field) and part in f"{key}." for field, part in _ONLY_IN_TRAINING.items())
    }
    if config.use_bdlora:
        held = {key: _with_zeros(config.use_bdlora, key, x, tensors.source) for key, x in held.items()}
    if config.use_qalora:
        size = config.qalora_group_size
        held = {key: _spread(x, size) if key.endswith(".lora_A.weight") else x for key, x in held.items()}
    none = dict.fromkeys(("use_bdlora", *_ONLY_IN_TRAINING))
    return dataclasses.replace(tensors, config=config.replace(**none, use_qalora=False), tensors=held)


def _with_zeros(how: Mapping[str, Any], key: str, x: Array, source: str) -> Array:
    """The blocks of one tensor on the diagonal of a matrix, if it is made of blocks."""
    import numpy as np

    module, dot, side = key.removeprefix(PEFT_PREFIX).rpartition(".lora_")
    field = {"A.weight": "target_modules_bd_a", "B.weight": "target_modules_bd_b"}.get(side) if dot else None
    patterns, count = how.get(field or "") or (), how.get("nblocks", 1)
    if not any(pattern in module for pattern in patterns):  # as PEFT asks: anywhere in the name
        return x
    if x.shape[0] % count:
        raise MismatchError(f"{source}: {key}: expected rows for {count} blocks (use_bdlora), found {list(x.shape)}")
    rows, columns = x.shape[0] // count, x.shape[1]
    out = np.zeros((x.shape[0], columns * count), x.dtype)
    for i in range(count):
        mine = slice(i * rows, (i + 1) * rows)
        out[mine, i * columns : (i + 1) * columns] = x[mine]
    return out


def _spread(a: Array, size: int) -> Array:
    """A on the inputs themselves: PEFT averages each group of them, and multiplies by the number of groups."""
    import numpy as np

    return np.repeat(np.asarray(a) * np.asarray(a.shape[1] / size, a.dtype), size, axis=1)
