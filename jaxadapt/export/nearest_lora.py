"""The nearest plain LoRA of a rank for an adapter of any method, from its file and the base model's."""

from __future__ import annotations

import dataclasses
import os

import numpy as np

from jaxadapt.adapters.adapter import PeftTensors
from jaxadapt.configs import lora
from jaxadapt.core import paths
from jaxadapt.core.errors import ConfigError
from jaxadapt.export import file_formats
from jaxadapt.keymaps import pytorch
from jaxadapt.keymaps.keymap import PEFT_PREFIX
from jaxadapt.merging import rank_reduction
from jaxadapt.persistence import peft
from jaxadapt.storage import hf_model, location
from jaxadapt.storage.source import as_source


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
        reduced = rank_reduction.to_lora(file_formats.with_pytorch_names(tensors), rank)
    else:
        with hf_model.open_model(location.to_location(base)) as source:
            hf_model.refuse_packed(source)
            keymap = file_formats.base_keymap(tensors, source.shapes)
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
