"""One linear layer "a.q" with one adapter: ours on its weight (outputs, inputs), and PEFT's module for the file."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxadapt import KeyMap, Weight
from jaxadapt.adapters import initial_values, selection
from jaxadapt.adapters.adapter import make_file_plan
from jaxadapt.arrays.products import Use
from jaxadapt.methods import AppliedMethod
from tests.support.configs import class_of

LINEAR = Weight("w", "a.q.weight", "o i -> o i")


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def hook_of(
    config: Any,
    shape: tuple[int, ...],
    file: Any = None,
    seed: int = 0,
    stacked: bool = False,
    weight: Weight = LINEAR,
    noise: bool = True,
) -> AppliedMethod:
    """The adapter of a file `{end of the key: array}`, or a new one, by default with noise on what training changes."""
    if stacked:
        weight, shape = Weight("w", "h.{l}.q.weight", "{l} o i -> o i"), (2, *shape)
    in_file = None if file is None else {key: x.shape for key, x in file.items()}
    found = selection.select_sites(config, KeyMap("t", (weight,)), {"w": shape}, found=in_file)
    (site,) = found
    given = {} if file is None else make_file_plan(found).decode(file)
    values = initial_values.init_values(config, found, jax.random.key(seed), base={"w": numbers(*shape)}, given=given)
    params = {path.rpartition(".")[2]: x for path, x in values.items()}
    if file is None and noise:
        trained = [t.name for t in site.tensors if t.trained]
        params |= {name: params[name] + 0.3 * numbers(*params[name].shape, seed=seed + 1) for name in trained}
    return AppliedMethod(site.method, site.hparams, params | dict(site.data), site.axes)


def run(hook: Any, w: Any, x: Any) -> Any:
    """x·Wᵀ as a layer runs it."""
    if hook.by_weight:
        return jnp.einsum("bi,oi->bo", x, hook.weight(jnp.asarray(w)))
    use = Use("bi", "oi", "bo", hook.axes)
    x = hook.input(use, jnp.asarray(x), jnp.asarray(w))
    return hook.output(use, x, jnp.einsum("bi,oi->bo", x, w), jnp.asarray(w))


class OneLayer:
    """PEFT's layer with noise on its trained parameters, and ours with the tensors of its file."""

    def __init__(self, config_class: str, shape: tuple[int, int], conv1d: bool = False, **fields: Any) -> None:
        import peft
        import torch
        from transformers.pytorch_utils import Conv1D

        self.w = numbers(*shape)
        layer = Conv1D(shape[0], shape[1]) if conv1d else torch.nn.Linear(shape[1], shape[0])
        base = torch.nn.ModuleDict({"a": torch.nn.ModuleDict({"q": layer})})
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(self.w.T.copy() if conv1d else self.w))
            layer.bias.zero_()
        config = getattr(peft, config_class)(target_modules=["q"], **fields)
        torch.manual_seed(0)
        model = peft.inject_adapter_in_model(config, base).eval()
        self.module = model["a"]["q"]
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.module.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        state = peft.get_peft_model_state_dict(model)
        self.file = {f"base_model.model.{key}": x.numpy() for key, x in state.items()}
        peft_type = str(config.peft_type.value)
        ours = class_of(peft_type)
        assert ours is not None
        self.hook = hook_of(ours(target_modules=["q"], **fields), shape, self.file)

    def with_params(self, params: Any) -> AppliedMethod:
        return dataclasses.replace(self.hook, params={**self.hook.params, **params})

    def run(self, hook: Any, x: Any) -> Any:
        return run(hook, self.w, x)

    def peft(self, x: np.ndarray) -> np.ndarray:
        import torch

        with torch.no_grad():
            return self.module(torch.from_numpy(x)).numpy()

    def peft_gradients(self, x: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
        """PEFT's gradients of the weighted sum of the outputs, `{end of the parameter's name: array}`."""
        import torch

        self.module.zero_grad()
        (self.module(torch.from_numpy(x)) * torch.from_numpy(weights)).sum().backward()
        found = self.module.named_parameters()
        return {f".{n}".replace(".default", ""): p.grad.numpy() for n, p in found if p.grad is not None}

    def peft_weight(self) -> np.ndarray:
        """PEFT's merged weight (outputs, inputs)."""
        self.module.merge()
        merged = self.module.get_base_layer().weight.detach().numpy().copy()
        self.module.unmerge()
        return merged if merged.shape == self.w.shape else merged.T
