"""PEFT's adapters beside ours: several named ones on one torch Llama, and the same in our layouts."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.save_and_load import get_peft_model_state_dict

import jaxadapt
from jaxadapt.demo.llama import to_linen
from tests.support.configs import class_of
from tests.support.twins import llama

PREFIX = "base_model.model."
LAYERS = 2


@functools.cache
def torch_base() -> Any:
    return llama.torch_llama(layers=LAYERS, width=16, inner=24, heads=2, kv_heads=1)


def params(scan: bool = False) -> dict[str, Any]:
    """The base parameters in our layout."""
    base = torch_base()
    return to_linen(llama.config_of(base, scan=scan), llama.weights_of(base))["params"]


def model_with(configs: Mapping[str, Mapping[str, Any]], seed: int = 0, made: Any = LoraConfig) -> Any:
    """A PEFT model with these adapters, all of random values."""
    model: Any = None
    for name, fields in configs.items():
        config = made(task_type="CAUSAL_LM", **copy.deepcopy(dict(fields)))
        if model is None:
            model = get_peft_model(copy.deepcopy(torch_base()), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "ia3_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tensors_of(model: Any, name: str) -> jaxadapt.PeftTensors:
    """One adapter of a PEFT model, as its file would hold it."""
    fields = {k: sorted(v) if isinstance(v, set) else v for k, v in model.peft_config[name].to_dict().items()}
    fields = {k: getattr(v, "value", v) for k, v in fields.items()}
    found = get_peft_model_state_dict(model, adapter_name=name)
    return jaxadapt.PeftTensors(
        class_of(fields["peft_type"]).from_dict(fields), {k: v.detach().numpy().copy() for k, v in found.items()}
    )


def ours(model: Any, names: Sequence[str], scan: bool = False) -> list[jaxadapt.Adapter]:
    """The adapters of a PEFT model in our layout."""
    return [jaxadapt.from_peft(tensors_of(model, name), params(scan)) for name in names]


def deltas(model: Any, name: str) -> dict[str, np.ndarray]:
    """PEFT's own ΔW of one adapter, by module."""
    found = {path: m for path, m in model.base_model.model.named_modules() if isinstance(m, LoraLayer)}
    with torch.no_grad():
        return {path: m.get_delta_weight(name).numpy() for path, m in found.items() if name in m.lora_A}


def our_deltas(adapter: jaxadapt.Adapter) -> dict[str, np.ndarray]:
    """s·B·A by module, from what our file would hold, in float64."""
    peft = jaxadapt.to_peft(adapter)
    stems = [k.removesuffix(".lora_A.weight") for k in peft.tensors if k.endswith(".lora_A.weight")]
    out: dict[str, np.ndarray] = {}
    for stem in stems:
        a, b = (np.asarray(peft.tensors[f"{stem}.lora_{x}.weight"], "float64") for x in "AB")
        scale = adapter.config.lora_alpha / (len(a) ** 0.5 if adapter.config.use_rslora else len(a))
        out[stem.removeprefix(PREFIX)] = scale * b @ a
    return out


@contextlib.contextmanager
def recorded_bernoulli() -> Iterator[list[np.ndarray]]:
    """What `torch.bernoulli` drew, in order."""
    seen: list[np.ndarray] = []
    real = torch.bernoulli

    def draw(*args: Any, **kwargs: Any) -> Any:
        mask = real(*args, **kwargs)
        seen.append(mask.numpy().copy())
        return mask

    torch.bernoulli = draw
    try:
        yield seen
    finally:
        torch.bernoulli = real
