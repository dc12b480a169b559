"""VeRA (Kopiczko et al. 2024, arXiv:2310.11454) with PEFT's conventions: W + (b∘B)·(d∘A).

A (r, inputs) and B (outputs, r) are random and belong to the whole adapter, with the sizes of its largest module; each
module uses their first columns and rows. Only the vectors b (out) and d (r) are trained. The projections are PyTorch's
own random numbers (`tuners/vera/model.py`), so a file without them (`save_projection=False`) has the same ones here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp

from jaxadapt.arrays.random_draws import Draw, TorchRandom
from jaxadapt.configs.fixed_bases import PveraConfig, VeraConfig
from jaxadapt.core.errors import MismatchError, raise_listed
from jaxadapt.keymaps.weight import MethodTensor, own_tensor
from jaxadapt.methods.base import Array, Params, Start, Target
from jaxadapt.methods.matrix import DropoutHparams, FactoredMethod


class Vera(FactoredMethod):
    """Shared random projections, scaled by two vectors per module."""

    peft_type = "VERA"
    row_padded = frozenset({"rank"})
    scaled = frozenset({"vera_lambda_b"})
    roles = MappingProxyType(
        {"vera_lambda_b": "vector", "vera_lambda_d": "vector", "vera_A": "frozen", "vera_B": "frozen"}
    )

    def tensors(self, config: VeraConfig, target: Target) -> tuple[MethodTensor, ...]:
        return (
            MethodTensor("vera_lambda_b", ".vera_lambda_b", ("batch", "out"), (("out",),), scale_power=0),
            MethodTensor(
                "vera_lambda_d", ".vera_lambda_d", ("batch", "rank"), (("rank",),), (("rank", config.r),), scale_power=0
            ),
        )

    def shared(
        self, config: VeraConfig, targets: Sequence[Target], found: Mapping[str, tuple[int, ...]]
    ) -> tuple[MethodTensor, ...]:
        return projections("vera", config, targets, found, config.r)

    def own(self, config: VeraConfig, target: Target) -> DropoutHparams:
        return DropoutHparams(config.vera_dropout)

    def init(self, config: VeraConfig, tensor: MethodTensor, start: Start) -> Draw | Array:
        if tensor.name == "vera_lambda_b":
            return Draw("constant", 0.0 if config.init_weights else 1.0)
        if tensor.name == "vera_lambda_d":
            return Draw("constant", config.d_initial) if config.init_weights else Draw("normal", 1.0)
        a, b = draw_projections(config.projection_prng_key, start.shared["vera_A"], start.shared["vera_B"])
        return a if tensor.name == "vera_A" else b

    def factors(self, own: DropoutHparams, params: Params, shape: tuple[int, int]) -> tuple[Array, Array]:
        out, inputs = shape
        a = params["vera_lambda_d"][:, None] * params["vera_A"][:, :inputs]
        return a, params["vera_lambda_b"][:, None] * params["vera_B"][:out]

    def after(self, own: DropoutHparams, params: Params, x: Array, y: Array) -> Array:
        d = params["vera_lambda_d"]
        h = d * jnp.einsum("...i,ri->...r", x.astype(d.dtype), params["vera_A"][:, : x.shape[-1]])
        return y + params["vera_lambda_b"] * jnp.einsum("...r,or->...o", h, params["vera_B"][: y.shape[-1]])

    def examples(self) -> Sequence[Mapping[str, Any]]:
        return ({"r": 3}, {"r": 4, "save_projection": False, "projection_prng_key": 7})


def draw_projections(seed: int, a: Sequence[int], b: Sequence[int]) -> tuple[Array, Array]:
    """Return projections of these shapes by PyTorch's Kaiming-uniform of the last axis; B's numbers follow A's."""
    random = TorchRandom(seed)
    bounds = (math.sqrt(6 / shape[-1]) for shape in (a, b))
    first, second = (random.uniform(shape, -bound, bound) for shape, bound in zip((a, b), bounds, strict=True))
    return first, second


def projections(
    prefix: str,
    config: VeraConfig | PveraConfig,
    targets: Sequence[Target],
    found: Mapping[str, tuple[int, ...]],
    rows: int,
) -> tuple[MethodTensor, ...]:
    """Return the specifications of A (rows, inputs) and B (outputs, r), for the largest modules of a new adapter."""
    names, saved = (f"{prefix}_A", f"{prefix}_B"), config.save_projection
    a, b = (found.get(name) for name in names)
    inputs = max(target.in_size for target in targets) if a is None else a[-1]
    outputs = max(target.out_size for target in targets) if b is None else b[0]
    needs = (
        (names[0], inputs, "inputs", lambda target: target.in_size),
        (names[1], outputs, "outputs", lambda target: target.out_size),
    )
    check_projections(targets, needs)
    shapes = zip(names, ((rows, inputs), (outputs, config.r)), strict=True)
    return tuple(own_tensor(name, x, trained=False, optional=True, in_file=saved) for name, x in shapes)


def check_projections(
    targets: Sequence[Target], needs: Sequence[tuple[str, int, str, Callable[[Target], int]]]
) -> None:
    """Raise `MismatchError` if shared projections are too small for a module of the base.

    Args:
        needs: `(tensor, size, name of the size, function of the size that a module needs)`.
    """
    raise_listed(
        MismatchError,
        "the adapter's shared tensors are too small for these modules, so the adapter is of another base model:",
        [
            f"{next(iter(target.modules))} has {needed} {axis}, {name} has {size}"
            for target in targets
            if target.is_known
            for name, size, axis, need in needs
            if (needed := need(target)) > size
        ],
    )


METHOD = Vera()
