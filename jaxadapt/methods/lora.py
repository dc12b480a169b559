"""LoRA (Hu et al. 2021, arXiv:2106.09685) with PEFT's conventions: W + s·B·A, s = α/r or α/√r.

In the model, per site: `lora_A` (batch..., in..., r) and `lora_B` (batch..., r, out...); in the file A is
(r, in) and B (out, r). The arithmetic follows PEFT's `tuners/lora/layer.py`: x is cast to A's dtype, the
scale sits on the rank-r side, and the sum is cast to the base output's dtype once, at the end.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax

from jaxadapt import targets
from jaxadapt.axes import LETTERS, RANK, Axes, Use
from jaxadapt.configs import Config, LoraConfig
from jaxadapt.drawing import Draw
from jaxadapt.errors import ConfigError
from jaxadapt.keymap import Site
from jaxadapt.methods.base import Array, Drop, Method, Params, einsum, explicit, one_value
from jaxadapt.weight import Tensor

_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal", "lora_ga")
"""Initialisations whose saved files apply to the unchanged base."""


@dataclasses.dataclass(frozen=True)
class Static:
    """The scale s and the dropout rate of one site."""

    scale: float
    dropout: float


class Lora(Method):
    """W + s·B·A."""

    peft_type = "LORA"

    def check(self, config: Config) -> None:
        assert isinstance(config, LoraConfig)
        problems = [
            f"{name}={value!r}"
            for name, plain in _NOT_YET.items()
            if (value := getattr(config, name)) != plain and value
        ]
        if config.init_lora_weights not in _PLAIN_INITS:
            problems.append(
                f"init_lora_weights={config.init_lora_weights!r} (such a file changes the base weights unless it was"
                " converted: in PEFT, save with path_initial_model_for_weight_conversion)"
            )
        if problems:
            raise ConfigError(
                "this LoRA configuration asks for what jaxadapt cannot honour exactly yet, and will not ignore: "
                + "; ".join(problems)
            )

    def tensors(self, config: LoraConfig, site: Site, modules: Sequence[str]) -> tuple[Tensor, ...]:
        r = one_value(
            "the rank", {m: targets.pattern_value(config.rank_pattern, m, config.r) for m in modules}
        )
        own = (("r", r),)
        return (
            Tensor("lora_A", ".lora_A.weight", ("batch", "inn", "r"), (("r",), ("inn",)), own, degree=0),
            Tensor("lora_B", ".lora_B.weight", ("batch", "r", "out"), (("out",), ("r",)), own, degree=1),
        )

    def static(self, config: LoraConfig, modules: Sequence[str]) -> Static:
        def scale(module: str) -> float:
            r = targets.pattern_value(config.rank_pattern, module, config.r)
            alpha = targets.pattern_value(config.alpha_pattern, module, config.lora_alpha)
            return alpha / math.sqrt(r) if config.use_rslora else alpha / r

        return Static(one_value("the scale", {m: scale(m) for m in modules}), config.lora_dropout)

    def dropout(self, static: Static) -> float:
        return static.dropout

    def fresh(self, config: LoraConfig, tensor: Tensor, fan_in: int) -> Draw:
        r = dict(tensor.own)["r"]
        init = config.init_lora_weights
        if init not in (True, False, "gaussian"):
            raise ConfigError(
                f"init_lora_weights={init!r} cannot be computed here yet; use True (Kaiming-uniform A, zero B),"
                " 'gaussian' or False, or load an adapter that PEFT initialised"
            )
        if tensor.name == "lora_B" and init is not False:
            return Draw("constant", 0.0)
        if init == "gaussian":
            return Draw("normal", 1 / r)
        # torch's Kaiming-uniform with a = sqrt(5) is U(-1/sqrt(fan_in), 1/sqrt(fan_in))
        return Draw("uniform", 1 / math.sqrt(fan_in if tensor.name == "lora_A" else r))

    def output(
        self, static: Static, params: Params, use: Use, x: Array, y: Array, drop: Drop | None
    ) -> Array:
        x = x if drop is None else drop(x)
        return _add_delta(use, static.scale, params["lora_A"], params["lora_B"], x, y)

    def weight(self, static: Static, params: Params, axes: Axes, w: Array) -> Array:
        return (w + static.scale * _product(params, axes)).astype(w.dtype)

    def unweight(self, static: Static, params: Params, axes: Axes, w: Array) -> Array:
        return (w - static.scale * _product(params, axes)).astype(w.dtype)


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _add_delta(use: Use, scale: float, a: Array, b: Array, x: Array, y: Array) -> Array:
    """y + s·B·A·x. Jitted so that a model of many equal layers traces (and linearises) it once; inlined, so that
    what is compiled is the same as without."""
    batch = use.letters("batch")
    pair = (a, batch + use.letters("inn") + RANK), (b, batch + RANK + use.letters("out"))
    first, last = pair[::-1] if use.transposed else pair
    free = set(use.w) - set(use.x) - set(batch)
    mid = "".join(c for c in use.y if c not in free)
    mid += "".join(c for c in batch if c not in mid) + RANK
    x = x.astype(first[0].dtype)
    h = einsum(f"{use.x},{first[1]}->{mid}", x, first[0], on=explicit(mid, (x, use.x), first))
    delta = einsum(f"{mid},{last[1]}->{use.y}", h * scale, last[0], on=explicit(use.y, (y, use.y)))
    return (y + delta).astype(y.dtype)


def _product(params: Params, axes: Axes) -> Array:
    """B·A in the weight's own axis order."""

    def at(role: Sequence[int]) -> str:
        return "".join(LETTERS[i] for i in role)

    batch = at(axes.batch)
    return einsum(
        f"{batch}{at(axes.inn)}{RANK},{batch}{RANK}{at(axes.out)}->{LETTERS[: axes.rank]}",
        params["lora_A"],
        params["lora_B"],
    )


_NOT_YET: dict[str, Any] = {
    "trainable_token_indices": None,
    "use_dora": False,
    "lora_bias": False,
    "use_qalora": False,
    "layer_replication": None,
    "target_parameters": None,
    "alora_invocation_tokens": None,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
    "velora_config": None,
    "monteclora_config": None,
    "megatron_config": None,
    "ensure_weight_tying": False,
}
"""Fields that change what is computed and are not built yet, with their inert value."""
