"""(IA)³ (Liu et al. 2022, arXiv:2205.05638) with PEFT's conventions.

In the model, per site: `ia3_l` (batch..., out...) multiplies the layer's output, bias included, or for a
feedforward module (batch..., in...) its input; in the file it is (out, 1) or (1, in). A convolution's vector has
one number a channel, (1, channels, 1, 1) in the file; over the inputs of one with groups it is (groups, in...) in the
model. The arithmetic follows PEFT's `tuners/ia3/layer.py`.
"""

from __future__ import annotations

import dataclasses
from types import MappingProxyType

import jax.numpy as jnp

from jaxadapt.arrays import low_rank
from jaxadapt.arrays.axes import LETTERS, Axes, Operation, Use
from jaxadapt.arrays.per_entry import PerEntry, only_adapted
from jaxadapt.arrays.random_draws import Draw
from jaxadapt.configs import Config, IA3Config, matching
from jaxadapt.core.errors import AttachError, ConfigError
from jaxadapt.keymaps.keymap import Match
from jaxadapt.keymaps.tensor_spec import MethodTensor, Modules
from jaxadapt.methods.base import Array, Drop, Method, Params, shared_value
from jaxadapt.methods.per_entry import adapted_entries


@dataclasses.dataclass(frozen=True)
class IA3Hparams:
    """Whether the site scales its input (feedforward) instead of its output; what convolution it is, if any; which
    entries it has, if not all."""

    feedforward: bool
    conv: bool = False
    groups: int = 1
    used: PerEntry | None = None


class IA3(Method):
    """W·l, over the outputs or (feedforward) the inputs."""

    peft_type = "IA3"
    kinds = frozenset({"linear", "conv"})
    roles = MappingProxyType({"ia3_l": "vector"})

    def check(self, config: Config) -> None:
        assert isinstance(config, IA3Config)

    def tensors(self, config: IA3Config, site: Match, modules: Modules) -> tuple[MethodTensor, ...]:
        static, used = self.hparams(config, site, modules), None if modules.all else modules.each(lambda _: 1, 0)
        if static.conv:
            return (dataclasses.replace(_of_convolution(static, site), used=used),)
        if static.feedforward:
            return (MethodTensor("ia3_l", ".ia3_l", ("batch", "in"), ((), ("in",)), scale_power=0, used=used),)
        return (MethodTensor("ia3_l", ".ia3_l", ("batch", "out"), (("out",), ()), scale_power=0, used=used),)

    def hparams(self, config: IA3Config, site: Match, modules: Modules) -> IA3Hparams:
        one = shared_value("feedforward", {m: matching.is_feedforward(config, m) for m in modules})
        return IA3Hparams(one, site.weight.kind == "conv", site.weight.groups, adapted_entries(modules))

    def fresh(self, config: IA3Config, tensor: MethodTensor, fan_in: int) -> Draw:
        return Draw("constant", 1.0) if config.init_ia3_weights else Draw("normal", 1.0)

    def follows(self, static: IA3Hparams, primitive: str) -> bool:
        return static.conv and not static.feedforward and primitive == "conv_general_dilated"

    def input(self, static: IA3Hparams, params: Params, use: Use, x: Array) -> Array:
        letters, scale = self._letters(static, use), _vector(static, params)
        if not self._over_input(static, use):
            return x
        if not set(letters) <= set(use.x):
            raise AttachError(
                "a feedforward IA3 vector differs between the parts of a fused weight that share one input;"
                " leave the module out of feedforward_modules"
            )
        return (x.astype(scale.dtype) * low_rank.expand_to_letters(scale, letters, use.x)).astype(x.dtype)

    def output(
        self, static: IA3Hparams, params: Params, use: Use | Operation, x: Array, y: Array, drop: Drop | None, w: Array
    ) -> Array:
        if isinstance(use, Operation):
            return (y * low_rank.expand_over_outputs(use, _vector(static, params), y.ndim)).astype(y.dtype)
        if self._over_input(static, use):
            return y
        scale = _vector(static, params)
        return (y * low_rank.expand_to_letters(scale, self._letters(static, use), use.y)).astype(y.dtype)

    def weight(self, static: IA3Hparams, params: Params, axes: Axes, w: Array) -> Array:
        return (w * self._over_weight(static, params, axes, w)).astype(w.dtype)

    def unweight(self, static: IA3Hparams, params: Params, axes: Axes, w: Array) -> Array:
        return (w / self._over_weight(static, params, axes, w)).astype(w.dtype)

    def scales_bias(self, static: IA3Hparams) -> bool:
        return not static.feedforward

    def bias(self, static: IA3Hparams, params: Params, bias: Array) -> Array:
        scale = self._over_bias(static, params, bias)
        return bias if scale is None else (bias * scale).astype(bias.dtype)

    def unbias(self, static: IA3Hparams, params: Params, bias: Array) -> Array:
        scale = self._over_bias(static, params, bias)
        return bias if scale is None else (bias / scale).astype(bias.dtype)

    @staticmethod
    def _over_bias(static: IA3Hparams, params: Params, bias: Array) -> Array | None:
        if static.feedforward:
            return None
        scale = _vector(static, params)
        if scale.size != bias.size:
            raise AttachError(
                f"IA3 scales a layer's bias, and this one has shape {bias.shape} where the vector has {scale.shape};"
                " leave the module out, or make it a feedforward module"
            )
        return scale.reshape(bias.shape)

    @staticmethod
    def _letters(static: IA3Hparams, use: Use) -> str:
        letters = use.letters("in" if static.feedforward else "out")
        return use.letters("batch") + (letters[:1] if static.conv and static.feedforward else letters)

    @staticmethod
    def _over_input(static: IA3Hparams, use: Use) -> bool:
        return static.feedforward != use.transposed

    @staticmethod
    def _over_weight(static: IA3Hparams, params: Params, axes: Axes, w: Array) -> Array:
        scale, role = _vector(static, params), axes.in_axes if static.feedforward else axes.out_axes
        if static.conv and static.feedforward:
            role = axes.in_axes[:1]  # the channels, without the window
            if static.groups > 1:  # each output channel sees those of its group
                (out,) = axes.out_axes
                scale, role = jnp.repeat(scale, w.shape[out] // static.groups, axis=0), (out, *role)
        letters = "".join(LETTERS[i] for i in axes.batch_axes + role)
        return low_rank.expand_to_letters(scale, letters, LETTERS[: axes.rank])


def _of_convolution(static: IA3Hparams, site: Match) -> MethodTensor:
    window = ((),) * (len(site.weight.right) - 2)
    if len(window) < 2:
        raise ConfigError(
            f"{site.leaf}: PEFT has IA3 for convolutions over two and three dimensions, and none over one; leave the"
            " module out of target_modules"
        )
    if not static.feedforward:
        return MethodTensor("ia3_l", ".ia3_l", ("batch", "out"), ((), ("out",), *window), scale_power=0)
    channels = site.roles["channels"]
    if len(channels) != 1 or channels != site.weight.torch_roles["channels"]:
        raise ConfigError(
            f"{site.leaf}: a feedforward IA3 vector has one number for each input channel, and this leaf has no axis of"
            f" its own for them ({site.weight.pattern!r}); leave the module out of feedforward_modules"
        )
    several, own = ((("g",), (("g", static.groups),))) if static.groups > 1 else ((), ())
    scaled = (*several, "channels")
    return MethodTensor("ia3_l", ".ia3_l", ("batch", *scaled), ((), scaled, *window), own, scale_power=0)


def _vector(static: IA3Hparams, params: Params) -> Array:
    """l, and ones in entries that are not adapted."""
    return only_adapted(static.used, params, params["ia3_l"], 1.0)
