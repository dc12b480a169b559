"""PEANuT (Zhong et al. 2024, arXiv:2410.01870) with PEFT's conventions: W + s·(net(Wᵀ)·Bᵀ)ᵀ.

The network's rows are the weight's columns: h = f(Wᵀ·Aᵀ), then `depth` encoders h = f(h·Eᵀ) and `depth` decoders
h = f(h·Dᵀ) + the input of the encoder on the other side. Because the change is a function of the whole weight, the
layer runs with the effective weight. The arithmetic follows PEFT's `tuners/peanut/layer.py`. An activation of
transformers that is not in `ACTIVATIONS` is refused, such as those with parameters of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax.nn as functions
import jax.numpy as jnp

from jaxadapt.configs.low_rank import PeanutConfig
from jaxadapt.core.errors import ConfigError
from jaxadapt.methods.matrix import (
    Array,
    Effects,
    Examples,
    MatrixMethod,
    MethodTensor,
    OwnHparams,
    Params,
    Strings,
    Target,
    axes_tensor,
    own_tensor,
    tensor_roles,
)


def _gelu(x: Array) -> Array:
    return functions.gelu(x, approximate=False)


ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    **dict.fromkeys(("gelu", "gelu_python"), _gelu),
    **dict.fromkeys(
        ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate"), functions.gelu
    ),
    "gelu_10": lambda x: jnp.clip(_gelu(x), -10, 10),
    "hardswish": functions.hard_swish,
    "leaky_relu": functions.leaky_relu,
    "linear": lambda x: x,
    "mish": functions.mish,
    "quick_gelu": lambda x: x * functions.sigmoid(1.702 * x),
    "relu": functions.relu,
    "relu2": lambda x: functions.relu(x) ** 2,
    "relu6": functions.relu6,
    "sigmoid": functions.sigmoid,
    **dict.fromkeys(("silu", "swish"), functions.silu),
    "tanh": jnp.tanh,
}
"""The activation functions by their names in transformers."""


class Peanut(MatrixMethod, peft_type="PEANUT"):
    """A network that computes the change from the weight."""

    scaled: frozenset[str] = frozenset({"peanut_B"})
    roles: Strings = tensor_roles(A="peanut_A", B="peanut_B")
    examples: Examples = ({"r": 3}, {"r": 4, "depth": 2, "act_fn": "silu", "scaling": 0.5, "init_weights": False})
    changes: Effects | None = Effects("adds", form="weight", reads=True)

    def check(self, config: PeanutConfig) -> None:
        if config.act_fn not in ACTIVATIONS:
            raise ConfigError(
                f"cannot apply PEANUT with act_fn {config.act_fn!r}; jaxadapt has {', '.join(sorted(ACTIVATIONS))}"
            )

    def tensors(self, config: PeanutConfig, target: Target) -> tuple[MethodTensor, ...]:
        r = (("r", config.r),)
        hidden = [f"{side}.{i}" for side in ("peanut_encoders", "peanut_decoders") for i in range(config.depth)]
        return (
            axes_tensor("peanut_A", "r out", r, suffix=".peanut_A.weight"),
            *(own_tensor(name.replace(".", "_"), (config.r, config.r), f".{name}.weight") for name in hidden),
            axes_tensor("peanut_B", "out r", r, suffix=".peanut_B.weight"),
        )

    def own(self, config: PeanutConfig, target: Target) -> OwnHparams:
        return OwnHparams(config.scaling, variant=config.act_fn)

    def delta(self, own: OwnHparams, params: Params, w: Array) -> Array:
        f = ACTIVATIONS[own.variant]
        h = f(w.T @ params["peanut_A"].T)
        inputs: list[Array] = []
        while (name := f"peanut_encoders_{len(inputs)}") in params:
            inputs.append(h)
            h = f(h @ params[name].T)
        for i in range(len(inputs)):
            h = f(h @ params[f"peanut_decoders_{i}"].T) + inputs.pop()
        return own.scale * (h @ params["peanut_B"].T).T
