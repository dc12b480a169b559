"""The PyTorch side of a specimen: transformers and PEFT, with the weights its names say."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")  # --doctest-modules opens this file too
pytest.importorskip("peft")

import torch
import transformers
from peft import LoraConfig, get_peft_model

from tests.keymaps.families import specimen_arrays
from tests.keymaps.families.specimens import BY_NAME, INPUTS, Specimen, values


@functools.cache
def base(name: str) -> Any:
    specimen = BY_NAME[name]
    cls = getattr(transformers, specimen.torch)
    model = cls(cls.config_class(**specimen.config, attn_implementation="eager")).eval()
    # transformers 5 ties the head until it reads a file that holds another.
    if specimen.name in ("flax-t5-v1.1", "bonsai-umt5"):
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        kept = model.state_dict()  # with a tied weight under each of its names: it is set under its first
        buffers = {key: x for key, x in model.named_buffers() if key in kept and x.is_floating_point()}
        for key, x in [*model.named_parameters(), *buffers.items()]:
            x.copy_(torch.from_numpy(values(key, tuple(x.shape))))
    return model


def state(specimen: Specimen) -> dict[str, np.ndarray]:
    return {key: x.detach().numpy() for key, x in base(specimen.name).state_dict().items()}


@functools.cache
def adapted(name: str) -> Any:
    """A PEFT model on a copy of the base; in the file its tensors have the values their names say."""
    specimen = BY_NAME[name]
    fan = {"fan_in_fan_out": True} if specimen.torch.startswith("GPT2") else {}
    model = get_peft_model(copy.deepcopy(base(name)), LoraConfig(**specimen.lora, **fan)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                file_key = key.replace(".default", "")
                parameter.copy_(torch.from_numpy(specimen_arrays.adapter_values(file_key, tuple(parameter.shape))))
    return model


@functools.cache
def logits(name: str, adapter: bool) -> np.ndarray:
    model = adapted(name) if adapter else base(name)
    return outputs(copy.deepcopy(model).double() if BY_NAME[name].double else model, BY_NAME[name].inputs)


def outputs(model: Any, inputs: Iterable[str]) -> np.ndarray:
    """The logits of a model, or its last states if it has no head."""
    with torch.no_grad():
        out = model(**{key.partition("/")[0]: torch.from_numpy(INPUTS[key]) for key in inputs})
    return next(out[key] for key in ("logits", "logits_per_image", "last_hidden_state") if key in out).numpy()


def save(specimen: Specimen, folder: Path) -> Path:
    adapted(specimen.name).save_pretrained(str(folder))
    return folder
