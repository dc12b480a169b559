"""(IA)³ (Liu et al. 2022, arXiv:2205.05638) with PEFT's conventions.

Each site has one tensor, `ia3_l`. With shape (batch..., out...) it multiplies the layer's output, bias included; for a
feedforward module it has shape (batch..., in...) and multiplies the input. In the file it is (out, 1) or (1, in). A
convolution's vector has one number a channel, (1, channels, 1, 1) in the file; over the inputs of a grouped convolution
it is (groups, in...) in the model. The arithmetic follows PEFT's `tuners/ia3/layer.py`.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jaxadapt.arrays import products
from jaxadapt.configs.full_rank import IA3Config
from jaxadapt.configs.matching import is_feedforward
from jaxadapt.core.errors import AttachError, ConfigError
from jaxadapt.methods.base import (
    Array,
    Axes,
    Draw,
    Drop,
    Effects,
    Examples,
    Floats,
    Method,
    MethodTensor,
    Operation,
    Params,
    PerEntry,
    Start,
    Strings,
    Target,
    Use,
    adapted_entries,
    axes_tensor,
    shared_value,
    tensor_roles,
)


@dataclasses.dataclass(frozen=True)
class IA3Hparams:
    """Hyperparameters of one site.

    Attributes:
        feedforward: True if the vector scales the input, False if it scales the output.
        conv: True if the weight is a convolution's.
        groups: the groups of the convolution.
        used: 1 for each adapted entry and 0 for the others; None if all are adapted.
    """

    feedforward: bool
    conv: bool
    groups: int
    used: PerEntry | None


class IA3(Method, peft_type="IA3"):
    """Multiplication of W by a vector over its outputs or (feedforward) its inputs."""

    kinds: frozenset[str] = frozenset({"linear", "conv"})
    roles: Strings = tensor_roles(vector="ia3_l")
    sums = True
    neutral: Floats = Floats({"ia3_l": 1.0})
    row_neutral: Floats = Floats({"ia3_l": 1.0})
    examples: Examples = ({"feedforward_modules": []}, {"feedforward_modules": ".*"})

    def tensors(self, config: IA3Config, target: Target) -> tuple[MethodTensor, ...]:
        match, window = target.match, len(target.match.weight.right) - 2
        hparams = self.hparams(config, target)
        if hparams.conv and window < 2:
            raise ConfigError(
                f"{match.leaf}: PEFT implements IA3 for 2-D and 3-D convolutions, but not for 1-D; remove the module"
                " from target_modules"
            )
        if not hparams.feedforward:
            return (axes_tensor("ia3_l", "1 out" + " 1" * window if hparams.conv else "out 1"),)
        if not hparams.conv:
            return (axes_tensor("ia3_l", "1 in"),)
        channels = match.roles["channels"]
        if len(channels) != 1 or channels != match.weight.torch_roles["channels"]:
            raise ConfigError(
                f"{match.leaf}: a feedforward IA3 vector has one number for each input channel, but no axis of this"
                f" parameter holds only the input channels ({match.weight.pattern!r}); remove the module from"
                " feedforward_modules"
            )
        group_axis, own = (("g",), (("g", hparams.groups),)) if hparams.groups > 1 else ((), ())
        scaled = (*group_axis, "channels")
        torch = ((), scaled, *((),) * window)
        return (MethodTensor("ia3_l", ".ia3_l", ("batch", *scaled), torch, own, scale_power=0),)

    def hparams(self, config: IA3Config, target: Target) -> IA3Hparams:
        feedforward = shared_value("feedforward", {m: is_feedforward(config, m) for m in target.modules})
        used = adapted_entries(target.modules)
        return IA3Hparams(feedforward, target.kind == "conv", target.match.weight.groups, used)

    def starts_unchanged(self, config: IA3Config) -> bool:
        return config.init_ia3_weights

    def init(self, config: IA3Config, tensor: MethodTensor, start: Start) -> Draw:
        return Draw("constant", 1.0) if config.init_ia3_weights else Draw("normal", 1.0)

    def follows(self, hparams: IA3Hparams, primitive: str) -> bool:
        return hparams.conv and not hparams.feedforward and primitive == "conv_general_dilated"

    def input(self, hparams: IA3Hparams, params: Params, use: Use | Operation, x: Array, w: Array) -> Array:
        if isinstance(use, Operation) or hparams.feedforward == use.transposed:  # then the output is scaled
            return x
        letters, scale = self._scale_letters(hparams, use), _vector(hparams, params)
        if not set(letters) <= set(use.x):
            raise AttachError(
                "cannot scale the input: the parts of a fused weight share one input, but their feedforward IA3 vectors"
                " differ. Remove the module from feedforward_modules"
            )
        return (x.astype(scale.dtype) * products.expand_to_letters(scale, letters, use.x)).astype(x.dtype)

    def output(
        self, hparams: IA3Hparams, params: Params, use: Use | Operation, x: Array, y: Array, drop: Drop | None, w: Array
    ) -> Array:
        if isinstance(use, Operation):
            return (y * products.expand_over_outputs(use, _vector(hparams, params), y.ndim)).astype(y.dtype)
        if hparams.feedforward != use.transposed:  # then the input is scaled
            return y
        scale = _vector(hparams, params)
        return (y * products.expand_to_letters(scale, self._scale_letters(hparams, use), use.y)).astype(y.dtype)

    def weight(self, hparams: IA3Hparams, params: Params, axes: Axes, w: Array) -> Array:
        return (w * self._scale_over_weight(hparams, params, axes, w)).astype(w.dtype)

    def unweight(self, hparams: IA3Hparams, params: Params, axes: Axes, w: Array) -> Array:
        return (w / self._scale_over_weight(hparams, params, axes, w)).astype(w.dtype)

    def effects(self, hparams: IA3Hparams) -> Effects:
        return Effects("changes", bias=None if hparams.feedforward else "scales")

    def bias(self, hparams: IA3Hparams, params: Params, axes: Axes, bias: Array, undo: bool = False) -> Array:
        if hparams.feedforward:
            return bias
        scale = _vector(hparams, params)
        if scale.size != bias.size:
            raise AttachError(
                f"cannot scale the layer's bias with the IA3 vector: the bias has shape {bias.shape}, the vector"
                f" {scale.shape}. Exclude the module, or make it a feedforward module"
            )
        scale = scale.reshape(bias.shape)
        return (bias / scale if undo else bias * scale).astype(bias.dtype)

    def row_hparams(self, hparams: IA3Hparams) -> IA3Hparams:
        return dataclasses.replace(hparams, used=None)

    def row_params(self, hparams: IA3Hparams, params: Params, entries: tuple[int, ...]) -> dict[str, Array]:
        return {"ia3_l": params["ia3_l"], products.USED: products.entry_values(hparams.used or 1.0, entries)}

    @staticmethod
    def _scale_letters(hparams: IA3Hparams, use: Use) -> str:
        letters = use.letters("in" if hparams.feedforward else "out")
        return use.letters("batch") + (letters[:1] if hparams.conv and hparams.feedforward else letters)

    @staticmethod
    def _scale_over_weight(hparams: IA3Hparams, params: Params, axes: Axes, w: Array) -> Array:
        scale, role = _vector(hparams, params), axes.in_axes if hparams.feedforward else axes.out_axes
        if hparams.conv and hparams.feedforward:
            role = axes.in_axes[:1]  # the channels, without the window
            if hparams.groups > 1:  # each output channel sees those of its group
                (out,) = axes.out_axes
                scale, role = jnp.repeat(scale, w.shape[out] // hparams.groups, axis=0), (out, *role)
        letters = "".join(products.LETTERS[i] for i in axes.batch_axes + role)
        return products.expand_to_letters(scale, letters, products.LETTERS[: axes.rank])


def _vector(hparams: IA3Hparams, params: Params) -> Array:
    """Return the vector l, with ones in the entries that are not adapted."""
    if products.USED in params:  # where each row has its own adapter
        return jnp.where(products.expand_leading(params[products.USED], params["ia3_l"]) != 0, params["ia3_l"], 1.0)
    return products.mask_unadapted(hparams.used, params, params["ia3_l"], 1.0)
