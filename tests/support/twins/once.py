"""Models whose computation is written once, for NNX and for Linen, over the layers that torch's state dict names.

In NNX the modules are nested as their names say; in Linen they lie beside each other and have the whole name, dots
included. In both, the dotted paths of the leaves are those that transformers' Flax models had.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.support.twins import gpt2, trees

Shapes = Mapping[str, Any]
Call = Callable[..., Any]


class RmsNorm(nnx.Module):
    """T5's norm."""

    def __init__(self, size: int) -> None:
        self.weight = nnx.Param(jnp.ones(size))

    def __call__(self, x: Any) -> Any:
        return _rms(x, self.weight[...])


class LinenRmsNorm(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return _rms(x, self.param("weight", nn.initializers.ones, (x.shape[-1],)))


def _rms(x: Any, weight: Any) -> Any:
    return x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * weight[None, None]


class Node(nnx.Module):
    """A module that only holds others."""


def kind_of(module: str, shapes: Shapes) -> str:
    """Return which layer a module of the state dict is."""
    if any(name in module for name in ("embed", "attention_bias")) and len(shapes["weight"]) == 2:
        return "embed"
    if module in ("shared", "model.shared", "wte", "transformer.wte", "transformer.wpe", "model.embed_tokens"):
        return "embed"
    if len(shapes["weight"]) == 2:
        return "conv1d" if module.rpartition(".")[2].startswith("c_") else "dense"
    return "norm" if "bias" in shapes else "rms"


def modules_of(state_dict: Mapping[str, Any], leave_out: tuple[str, ...] = ()) -> dict[str, dict[str, np.ndarray]]:
    """Return `{module: {parameter: array}}` of a torch state dict."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in state_dict.items():
        module, _, name = key.rpartition(".")
        if module not in leave_out and name in ("weight", "bias"):
            found.setdefault(module, {})[name] = np.array(tensor.detach().numpy())
    return found


def leaves_of(modules: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return `{leaf: array}` of the Flax model."""
    names = {"dense": "kernel", "conv1d": "kernel", "embed": "embedding", "norm": "scale", "rms": "weight"}
    out: dict[str, np.ndarray] = {}
    for module, arrays in modules.items():
        kind = kind_of(module, {name: x.shape for name, x in arrays.items()})
        for name, x in arrays.items():
            leaf = names[kind] if name == "weight" else name
            out[f"{module}.{leaf}"] = np.ascontiguousarray(x.T) if leaf == "kernel" else x
    return out


class OnceNnx(nnx.Module):
    """The model in NNX; subclasses have `__call__`, which uses `self.layer(name)`."""

    def __init__(self, modules: Mapping[str, Mapping[str, np.ndarray]], eps: float) -> None:
        rngs = nnx.Rngs(0)
        for module, arrays in modules.items():
            *parents, last = module.split(".")
            node: Any = self
            for part in parents:
                if part not in vars(node):
                    setattr(node, part, Node())
                node = vars(node)[part]
            rows, *columns = arrays["weight"].shape
            kind = kind_of(module, {name: x.shape for name, x in arrays.items()})
            made: Any = {
                "dense": lambda r=rows, c=columns, b="bias" in arrays: nnx.Linear(c[0], r, use_bias=b, rngs=rngs),
                "conv1d": lambda r=rows, c=columns: gpt2.Conv1D(r, c[0], rngs=rngs),
                "embed": lambda r=rows, c=columns: nnx.Embed(r, c[0], rngs=rngs),
                "norm": lambda r=rows: nnx.LayerNorm(r, epsilon=eps, rngs=rngs),
                "rms": lambda r=rows: RmsNorm(r),
            }[kind]()
            setattr(node, last, made)
        trees.fill(self, leaves_of(modules))

    def layer(self, name: str) -> Any:
        node: Any = self
        for part in name.split("."):
            node = vars(node)[part]
        return node


class OnceLinen(nn.Module):
    """The model in Linen; subclasses have a compact `__call__`, which uses `self.layer(name)`."""

    shapes: Any  # `((module, ((parameter, shape), …)), …)`
    eps: float

    @classmethod
    def of(cls, modules: Mapping[str, Mapping[str, np.ndarray]], eps: float, **fields: Any) -> tuple[Any, Any]:
        """Return the module and its variables."""
        shapes = tuple((m, tuple((n, x.shape) for n, x in arrays.items())) for m, arrays in modules.items())
        params: dict[str, Any] = {}
        for leaf, x in leaves_of(modules).items():
            module, _, name = leaf.rpartition(".")
            params.setdefault(module, {})[name] = jnp.asarray(x)
        return cls(shapes, eps, **fields), {"params": params}

    def setup(self) -> None:
        layers: dict[str, Any] = {}
        for module, named in self.shapes:
            shapes = dict(named)
            rows, *columns = shapes["weight"]
            layers[module] = {
                "dense": lambda r=rows, b="bias" in shapes: nn.Dense(r, use_bias=b),
                "conv1d": lambda c=columns: gpt2.LinenConv1D(c[0]),
                "embed": lambda r=rows, c=columns: nn.Embed(r, c[0]),
                "norm": lambda: nn.LayerNorm(self.eps),
                "rms": lambda: LinenRmsNorm(),
            }[kind_of(module, shapes)]()
        for module, layer in layers.items():
            setattr(self, module, layer)  # a name with dots is a name like others

    def layer(self, name: str) -> Any:
        return getattr(self, name)
