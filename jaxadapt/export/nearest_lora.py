"""The nearest plain LoRA of a rank for an adapter of any method, from its file and the base model's."""

from __future__ import annotations

import dataclasses
import functools
import os

import jax
import numpy as np

from jaxadapt import methods
from jaxadapt.adapters.adapter import PeftTensors
from jaxadapt.configs import lora_variants
from jaxadapt.core import paths
from jaxadapt.core.errors import ConfigError
from jaxadapt.keymaps import pytorch
from jaxadapt.merging import rank_reduction
from jaxadapt.persistence import peft
from jaxadapt.storage import hf_model, location


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
    lora_variants.require_original_base(tensors.config, tensors.source)
    is_product = not lora_variants.reasons_not_a_product(tensors.config)
    if base is None and not is_product:
        raise ConfigError(
            f"{tensors.source}: the change of the weights depends on the base here; pass the base model's folder"
            " (base=, `--base FOLDER`)"
        )
    shapes = {key: tuple(x.shape) for key, x in tensors.tensors.items()}
    sizes = functools.partial(methods.file_sizes, tensors.config)
    if base is None or is_product:
        weights = pytorch.weight_shapes(shapes)
        specs = {key: jax.ShapeDtypeStruct(shape, "float32") for key, shape in weights.items()}
        keymap = pytorch.state_dict_keymap(weights, shapes, tensors.source, sizes)
        adapter = peft.from_peft(tensors, paths.unflatten(specs), keymap=keymap)
        reduced = rank_reduction.to_lora(adapter, rank)
    else:
        with hf_model.open_model(location.to_location(base)) as source:
            hf_model.refuse_packed(source)
            arrays = {key: np.asarray(source[key]) for key in source}
        base_shapes = {key: x.shape for key, x in arrays.items()}
        turned = bool(tensors.config.get("fan_in_fan_out"))
        keymap = pytorch.state_dict_keymap(base_shapes, shapes, tensors.source, sizes, turned)
        params = paths.unflatten(arrays)
        reduced = rank_reduction.to_lora(peft.from_peft(tensors, params, keymap=keymap), rank, params=params)
    encoded = peft.to_peft(reduced.adapter)
    return dataclasses.replace(encoded, source=tensors.source), {name: float(e) for name, e in reduced.error.items()}
