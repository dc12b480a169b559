"""The nearest plain LoRA of a rank for an adapter of any method, from its file and the base model's.

The initial adapter of a PiSSA or OLoRA file, computed again from the original base as PEFT does on loading.
"""

from __future__ import annotations

import dataclasses
import os

import jax
import numpy as np

from jaxadapt.adapters.adapter import PeftTensors
from jaxadapt.configs import lora
from jaxadapt.configs.lora import LoraConfig
from jaxadapt.core import paths
from jaxadapt.core.errors import ConfigError
from jaxadapt.initializers.kinds import init_kind
from jaxadapt.initializers.start_adapter import start
from jaxadapt.keymaps import pytorch
from jaxadapt.keymaps.keymap import PEFT_PREFIX
from jaxadapt.merging import rank_reduction
from jaxadapt.persistence import peft
from jaxadapt.storage import hf_model, location
from jaxadapt.storage.source import as_source

# ---------------------------------------------------------------- nearest lora


def nearest_lora(
    tensors: PeftTensors, rank: int, base: str | os.PathLike[str] | None
) -> tuple[PeftTensors, dict[str, float]]:
    """Return a plain LoRA of a rank, and `{module: ‖ΔW − ΔW'‖ / ‖ΔW‖}`.

    Args:
        tensors: the adapter.
        rank: the rank of the result. For a LoRA, its largest rank or more loses nothing.
        base: the base model's folder, which methods other than LoRA need.

    Raises:
        ConfigError: the change is not one of weights alone, or the base is missing.
        MismatchError: the base has other modules.
    """
    lora.require_original_base(tensors.config, tensors.source)
    is_product = not lora.reasons_not_a_product(tensors.config)
    if base is None and not is_product:
        raise ConfigError(
            f"{tensors.source}: the change of the weights depends on the base here; pass the base model's folder"
            " (base=, `--base FOLDER`)"
        )
    if base is None or is_product:
        reduced = rank_reduction.to_lora(peft.with_pytorch_names(tensors), rank)
    else:
        with hf_model.open_model(location.to_location(base)) as source:
            hf_model.refuse_packed(source)
            keymap = peft.base_keymap(tensors, source.shapes)
            names = {key: ".".join(match.parameter({})) for key in source if (match := keymap.match(key)) is not None}
            # none in a file of tensors of the whole adapter only (UNILORA)
            if modules := _modules(as_source(tensors.tensors).shapes):
                names = {key: name for key, name in names.items() if _module(name) in modules}
            arrays = {key: np.asarray(source[key]) for key in names}
        params = paths.unflatten(arrays)
        reduced = rank_reduction.to_lora(peft.from_peft(tensors, params, keymap=keymap), rank, params=params)
    encoded = peft.to_peft(reduced.adapter)
    encoded = dataclasses.replace(encoded, source=tensors.source, base=tensors.base)
    return encoded, {name: float(e) for name, e in reduced.error.items()}


def _modules(shapes: pytorch.Shapes) -> set[str]:
    """Return the modules of an adapter's file, also those with a copy of their parameters."""
    own = [key.removeprefix(PEFT_PREFIX) for key in shapes if key.startswith(PEFT_PREFIX)]
    return {*pytorch.adapted_shapes(shapes), *(_module(name.replace(".base_layer", "")) for name in own)}


def _module(name: str) -> str:
    return name.rpartition(".")[0]


# ---------------------------------------------------------------- original start


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
        keymap = peft.base_keymap(tensors, weights.shapes)
        adapted = {f"{module}.weight" for module in pytorch.adapted_keys(tensors.tensors)}
        read = [key for key in weights if (match := keymap.match(key)) and ".".join(match.parameter({})) in adapted]
        leaves = {key: np.asarray(weights[key]) for key in read}
    with jax.default_matmul_precision("highest"):
        first = start(config, paths.unflatten(leaves), keymap=keymap, dtype="float32").adapter
    return dataclasses.replace(peft.to_peft(first), config=config, source=f"the start of {tensors.source}")
