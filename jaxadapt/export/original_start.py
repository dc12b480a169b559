"""The initial adapter of a PiSSA or OLoRA file, computed again from the original base as PEFT does on loading."""

from __future__ import annotations

import dataclasses
import os

import jax
import numpy as np

from jaxadapt.adapters.adapter import PeftTensors
from jaxadapt.configs import LoraConfig
from jaxadapt.core import paths
from jaxadapt.core.errors import ConfigError
from jaxadapt.export import file_formats
from jaxadapt.initializers.kinds import init_kind
from jaxadapt.initializers.start_adapter import start
from jaxadapt.keymaps import pytorch
from jaxadapt.persistence import peft
from jaxadapt.storage import hf_model, location


def initial_adapter(tensors: PeftTensors, base: str | os.PathLike[str]) -> PeftTensors:
    """Return the initial adapter of a configuration whose initialization reads only the base weights.

    Args:
        tensors: the trained adapter.
        base: the folder of the original base model, whose adapted weights are read.

    Raises:
        ConfigError: the initialization cannot be repeated, because it depends on data, gradients or random numbers.
        MismatchError: the base has other modules.
    """
    config = tensors.config
    assert isinstance(config, LoraConfig)
    kind = init_kind(config)
    if kind.from_run or config.init_lora_weights == "loftq":
        raise ConfigError(
            f"{tensors.source}: init_lora_weights={config.init_lora_weights!r} cannot be repeated from the base: it"
            f" depends on {kind.from_run or 'the rounding of the quantized base'}. Pass the initial adapter"
            " (first=, `--first FOLDER`)"
        )
    with hf_model.open_model(location.to_location(base)) as weights:
        hf_model.refuse_packed(weights)
        keymap = file_formats.base_keymap(tensors, weights.shapes)
        adapted = {f"{module}.weight" for module in pytorch.adapted_keys(tensors.tensors)}
        read = [key for key in weights if (match := keymap.match(key)) and ".".join(match.parameter({})) in adapted]
        leaves = {key: np.asarray(weights[key]) for key in read}
    with jax.default_matmul_precision("highest"):
        first = start(config, paths.unflatten(leaves), keymap=keymap, dtype="float32").adapter
    return dataclasses.replace(peft.to_peft(first), config=config, source=f"the start of {tensors.source}")
