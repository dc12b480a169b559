"""LoRA (Hu et al. 2021, arXiv:2106.09685) with PEFT's conventions: W + s·B·A, s = α/r or α/√r.

In the model, per site: `lora_A` (batch..., r, in...) and `lora_B` (batch..., out..., r): the bytes of the file's
A (r, in) and B (out, r). A lookup's are called `lora_embedding_A` and `lora_embedding_B`; in a convolution the window
belongs to the inputs, and in a grouped one A sees all channels. `lora_B_bias` (batch..., out...) is added with
`lora_bias`. The arithmetic follows PEFT's `tuners/lora/layer.py`: x is cast to A's dtype, the scale sits on the
rank-r side, and the sum is cast to the base output's dtype once, at the end. Variants are files of their own.

PEFT's faults, as decided here: its convolutions ignore the base's dilation (its own A then crashes) and padding
mode, ours follow the base layer; its merge of a grouped convolution fails, ours says why there can be none; the
norm of a grouped DoRA mixes channels of several groups, so that is refused. The output projection of an
`nn.MultiheadAttention` gets its product twice there, from 0.15.0, the first version that adapts it, to 0.21.2, the
newest: files were trained so, so it is twice here as well (`doubtful_twice`: of a file of a later version that is not
known). That its dropout does nothing there is followed too.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Sequence
from types import MappingProxyType
from typing import Any

import jax

from jaxadapt.arrays import low_rank
from jaxadapt.arrays.axes import Axes, Operation, Use
from jaxadapt.arrays.per_entry import PerEntry, only_adapted
from jaxadapt.arrays.random_draws import Draw
from jaxadapt.configs import PEFT_VERSION, Config, LoraConfig, matching
from jaxadapt.core.errors import AttachError, ConfigError
from jaxadapt.keymaps.keymap import Match
from jaxadapt.keymaps.tensor_spec import MethodTensor, Modules
from jaxadapt.methods.base import Array, Drop, Method, Params, as_computable
from jaxadapt.methods.lora import alora, dora, kasa
from jaxadapt.methods.per_entry import adapted_entries, per_entry


@dataclasses.dataclass(frozen=True)
class LoraHparams:
    """What the arithmetic of one site needs: the scale s, the dropout rate, and which kind of LoRA it is.

    `scale` and `used` (1 or 0) are of each entry where the leaf's layers or parts differ, `used` only where it takes
    more than zeros in A and B to leave a layer as it is. `kind` is the weight's, where it is no plain matrix; `tied`
    says that a table of tokens is adapted in both its uses, as head too; `frozen` that B is never trained (MiCA,
    arXiv:2604.01694);
    `invoked` that only some tokens are adapted (aLoRA).
    """

    scale: float | PerEntry
    dropout: float = 0.0
    kind: str = ""
    groups: int = 1
    dora: bool = False
    bias: bool = False
    tied: bool = False
    frozen: bool = False
    invoked: bool = False
    used: PerEntry | None = None


class Lora(Method):
    """W + s·B·A."""

    peft_type = "LORA"
    kinds = frozenset({"linear", "embedding", "conv", "attention"})
    scaled = frozenset({"lora_B", "lora_B_bias", "lora_embedding_B"})
    roles = MappingProxyType(
        {
            "lora_A": "A",
            "lora_B": "B",
            "lora_B_bias": "bias",
            "lora_magnitude_vector": "vector",
            "lora_diag": "vector",
            "lora_embedding_A": "embedding",
            "lora_embedding_B": "embedding",
        }
    )

    def __init__(self, depth: int | None = None) -> None:
        if depth is not None:
            self.wrapper_depth = depth

    def on_parameter(self, depth: int) -> Lora:
        return Lora(depth)

    def check(self, config: Config) -> None:
        assert isinstance(config, LoraConfig)
        problems = [f"{name}={value!r}, which {why}" for name, why in _REFUSED.items() if (value := config.get(name))]
        if problems:
            raise ConfigError(
                "this LoRA configuration asks for what jaxadapt cannot honour exactly, and will not ignore: "
                + "; ".join(problems)
            )

    def tensors(self, config: LoraConfig, site: Match, modules: Modules) -> tuple[MethodTensor, ...]:
        ranks = modules.each(lambda m: matching.pattern_value(config.rank_pattern, m, config.r), 0)
        r, alike = max(ranks), len(set(ranks)) == 1
        own, kind, groups = (("r", r),), site.weight.kind, site.weight.groups
        for rank in set(ranks) - {0}:
            _check_site(config, site, rank)
        if self.wrapper_depth is not None:
            _check_parameter(config, site)
        if kind == "embedding":
            a, b, last = "lora_embedding_A", "lora_embedding_B", ""
        else:
            a, b, last = "lora_A", "lora_B", ".weight"
        wrapped = ".base_layer" * (self.wrapper_depth or 0)
        window = ((),) * (len(site.weight.right) - 2) if kind == "conv" else ()
        several = ("g",) if groups > 1 else ()
        # Of experts in one array A's rows are in order of the experts, and B's columns in order of the rank.
        torch_a, torch_b = (("experts", "r"), (*several, "in")), (("out",), ("r", "experts"), *window)
        own_a, own_b = (*own, *(("g", groups) for _ in several)), (("r", r // groups),)
        found = [
            MethodTensor(a, f"{wrapped}.{a}{last}", ("batch", "r", *several, "in"), torch_a, own_a, scale_power=0),
            MethodTensor(b, f"{wrapped}.{b}{last}", ("batch", "out", "r"), torch_b, own_b, scale_power=1),
        ]
        if config.lora_bias:
            found.append(MethodTensor("lora_B_bias", ".lora_B.bias", ("batch", "out"), (("out",),), scale_power=1))
        if config.kasa_config is not None:
            found.append(kasa.tensor(r))
        if config.use_dora:
            found.append(dora.tensor(site))
        if alike:
            return tuple(found)
        return tuple(dataclasses.replace(t, used=_used(t, ranks, r)) for t in found)

    def hparams(self, config: LoraConfig, site: Match, modules: Modules) -> LoraHparams:
        kind, attention = site.weight.kind, site.weight.kind == "attention"
        times = 2 if attention and not site.weight.part else 1  # the output projection: see above
        scales = {times * lora_scale(config, m) for m in modules}
        one = min(scales)
        more = config.use_dora or config.lora_bias  # whose gradients are not zero where A and B are
        return LoraHparams(
            one if len(scales) == 1 else per_entry(modules, lambda m: times * lora_scale(config, m), one),
            0.0 if kind in ("attention", "embedding") else config.lora_dropout,  # PEFT drops no tokens
            "" if kind in ("attention", "linear") else kind,
            site.weight.groups,
            config.use_dora,
            config.lora_bias,
            kind == "embedding" and config.ensure_weight_tying,
            str(config.init_lora_weights).lower() == "mica",
            config.alora_invocation_tokens is not None,
            adapted_entries(modules) if more else None,
        )

    def role(self, static: LoraHparams, tensor: str) -> str:
        return "frozen" if static.frozen and tensor.endswith("_B") else super().role(static, tensor)

    def dropout(self, static: LoraHparams) -> float:
        return static.dropout

    def follows(self, static: LoraHparams, primitive: str) -> bool:
        if primitive == "ragged_dot_general":
            return not (static.dora or static.bias or static.kind in ("conv", "embedding"))
        return {"conv": "conv_general_dilated", "embedding": "gather"}.get(static.kind) == primitive

    def forward(self, static: LoraHparams) -> bool:
        return not static.kind and super().forward(static)  # (an embedding's product is a tied head's)

    def apart(self, static: LoraHparams) -> bool:
        return static.dora

    def fresh(self, config: LoraConfig, tensor: MethodTensor, fan_in: int) -> Draw:
        init = config.init_lora_weights
        if init not in (True, False, "gaussian") or config.kasa_config is not None:
            what = f"init_lora_weights={init!r}" if config.kasa_config is None else "kasa_config"
            raise ConfigError(
                f"{what} begins from more than random numbers (the base weights, data, gradients):"
                " jaxadapt.initializers.start(config, base, …) takes what it needs, and says which base comes of it."
                " jax.eval_shape"
                " gives the shapes, and jaxadapt.load needs no more"
            )
        if init is not False and tensor.name in ("lora_B", "lora_B_bias", "lora_embedding_A"):
            return Draw("constant", 0.0)
        if tensor.name.startswith("lora_embedding"):
            return Draw("normal", 1.0)
        own = dict(tensor.own)
        r = own.get("r", 1)
        if init == "gaussian":
            return Draw("normal", 1 / r)
        # torch's Kaiming-uniform with a = sqrt(5) is U(-1/sqrt(fan_in), 1/sqrt(fan_in))
        return Draw("uniform", 1 / math.sqrt(fan_in * own.get("g", 1) if tensor.name == "lora_A" else r))

    def from_base(self, static: LoraHparams, params: Params, axes: Axes, w: Array) -> dict[str, Array]:
        return {dora.MAGNITUDE: dora.norm(axes, _changed(static, params, axes, w))} if static.dora else {}

    def output(
        self, static: LoraHparams, params: Params, use: Use | Operation, x: Array, y: Array, drop: Drop | None, w: Array
    ) -> Array:
        if static.kind == "embedding" and not static.tied and isinstance(use, Use):
            return y  # the head of a model with tied embeddings: in PEFT another module, and not adapted
        x = x if drop is None else drop(x)
        scale = _scale(static, params)
        delta = low_rank.low_rank_delta(use, scale, static.groups, *_factors(static, params), x, y)
        if static.dora:
            w = as_computable(w)
            changed = _changed(static, params, use.axes, w)
            along = dora.factor(use.axes, params, static.used, changed)
            return dora.output(use, along, w, changed, delta, x, y, drop is not None).astype(y.dtype)
        if static.bias:
            delta = delta + low_rank.expand_over_outputs(use, _bias(static, params), y.ndim)
        if static.invoked:
            delta = alora.only(params, delta, y)
        return (y + delta).astype(y.dtype)

    def weight(self, static: LoraHparams, params: Params, axes: Axes, w: Array) -> Array:
        return self._effective(static, params, axes, w, _changed)

    def merged(self, static: LoraHparams, params: Params, axes: Axes, w: Array) -> Array:
        return self._effective(static, params, axes, w, _added)

    def _effective(
        self, static: LoraHparams, params: Params, axes: Axes, w: Array, change: Callable[..., Array]
    ) -> Array:
        if static.groups > 1:
            raise AttachError(
                "LoRA's A sees all channels of a grouped convolution, so W + s·B·A would be a weight without groups:"
                " there is none to merge into, and nothing but the layer's own convolution can follow it"
            )
        _need_one_weight(static)
        changed = change(static, params, axes, w)
        if static.dora:
            changed = dora.weight(axes, dora.factor(axes, params, static.used, changed), changed)
        return changed.astype(w.dtype)

    def unweight(self, static: LoraHparams, params: Params, axes: Axes, w: Array) -> Array:
        _need_one_weight(static)
        if static.dora:
            raise AttachError(
                "DoRA scales W + s·B·A to the length m, and its own length, which W would need, is not left in it; keep"
                " the parameters as they were before merging"
            )
        return low_rank.add_product(axes, w, -_scale(static, params), *_factors(static, params)).astype(w.dtype)

    def adds_bias(self, static: LoraHparams) -> bool:
        return static.bias

    def merged_bias(self, static: LoraHparams, params: Params, bias: Array, sign: int) -> Array:
        return (bias + sign * _bias(static, params).reshape(bias.shape)).astype(bias.dtype)


def doubtful_twice(config: Config, sites: Iterable[Match]) -> bool:
    """Whether a file with an output projection of attention is of a later PEFT, which may add its product once."""
    known, said = (
        [int(n) for n in re.findall(r"\d+", version)[:3]] for version in (PEFT_VERSION, config.peft_version or "")
    )
    projections = (site.weight.kind == "attention" and not site.weight.part for site in sites)
    return config.peft_type == "LORA" and said > known and any(projections)


def lora_scale(config: LoraConfig, module: str) -> float:
    """s = α/r or α/√r of one PyTorch module."""
    r = matching.pattern_value(config.rank_pattern, module, config.r)
    alpha = matching.pattern_value(config.alpha_pattern, module, config.lora_alpha)
    return alpha / math.sqrt(r) if config.use_rslora else alpha / r


def _factors(static: LoraHparams, params: Params) -> tuple[Array, Array]:
    kind = "lora_embedding" if "lora_embedding_A" in params else "lora"
    a, b = kasa.in_a(params, params[f"{kind}_A"]), params[f"{kind}_B"]
    return a, jax.lax.stop_gradient(b) if static.frozen else b


def _scale(static: LoraHparams, params: Params) -> Any:
    """s: one number, or the layer's own as an array (batch...)."""
    return static.scale.layer_values(params) if isinstance(static.scale, PerEntry) else static.scale


def _bias(static: LoraHparams, params: Params) -> Array:
    """s times the adapter's own bias."""
    return low_rank.scaled(_scale(static, params), only_adapted(static.used, params, params["lora_B_bias"], 0.0))


def _used(tensor: MethodTensor, ranks: Sequence[int], r: int) -> tuple[int, ...]:
    """What the file has of each entry: the rank (of a grouped convolution's B a part of it), or just the tensor."""
    own = dict(tensor.own).get("r")
    return tuple(min(rank, 1) if own is None else rank * own // r for rank in ranks)


def _changed(static: LoraHparams, params: Params, axes: Axes, w: Array) -> Array:
    """W + s·B·A, in the dtype of the sum."""
    a, b = _factors(static, params)
    if isinstance(static.scale, PerEntry):
        return w + low_rank.product(axes, low_rank.scaled(_scale(static, params), a), b)
    return w + static.scale * low_rank.product(axes, a, b)


def _added(static: LoraHparams, params: Params, axes: Axes, w: Array) -> Array:
    """The same in one pass."""
    return low_rank.add_product(axes, w, _scale(static, params), *_factors(static, params))


def _need_one_weight(static: LoraHparams) -> None:
    if static.invoked:
        raise AttachError(
            "an aLoRA leaves some tokens as they are, and adapts others: there is no weight that does both, to merge"
            " into or to stand in where a weight is used otherwise than in a product"
        )


def _check_site(config: LoraConfig, site: Match, r: int) -> None:
    groups, kind = site.weight.groups, site.weight.kind
    if r % groups:
        raise ConfigError(f"{site.leaf}: a rank of {r} cannot be shared among the {groups} groups of the convolution")
    if groups > 1 and config.use_dora:
        raise ConfigError(
            f"{site.leaf}: use_dora on a convolution with groups: PEFT's norm there mixes the weights of several groups"
        )
    asked = [f"{name}={value!r}" for name in ("use_dora", "lora_bias", "bias") if (value := config.get(name))]
    asked = [what for what in asked if what != "bias='none'"]
    if kind == "attention" and asked:
        raise ConfigError(
            f"{site.leaf}: {', '.join(asked)} on an nn.MultiheadAttention, for which PEFT has no such adapter (what it"
            " has of biases there takes no part in its forward pass); leave the field out, or the module"
        )
    apart = [f"{name}={value!r}" for name in ("use_dora", "lora_dropout") if (value := config.get(name))]
    if kind == "embedding" and config.ensure_weight_tying and apart:
        raise ConfigError(
            f"{site.leaf}: {', '.join(apart)} with ensure_weight_tying: PEFT treats the lookup and the head differently"
            " there, and they are one weight; leave one of the fields out"
        )
    if config.kasa_config is not None and (odd := kasa.problems(config, site)):
        raise ConfigError(f"{site.leaf}: kasa_config with {', '.join(odd)}: PEFT has no such adapter")
    if config.alora_invocation_tokens is not None and (odd := alora.problems(config, site)):
        raise ConfigError(f"{site.leaf}: alora_invocation_tokens with {', '.join(odd)}: PEFT has no such adapter")
    if kind == "embedding" and config.lora_bias:
        raise ConfigError(f"{site.leaf}: lora_bias=True is for layers with an output bias, not for embeddings")


def _check_parameter(config: LoraConfig, site: Match) -> None:
    """As PEFT's ParamWrapper: the sum W + s·B·A is all it has, with no place for an input or a bias."""
    odd = {
        "lora_dropout": config.lora_dropout, "fan_in_fan_out": config.fan_in_fan_out, "lora_bias": config.lora_bias,
        "use_dora": config.use_dora, "bias": config.bias if config.bias != "none" else None,
        "kasa_config": config.kasa_config, "alora_invocation_tokens": config.alora_invocation_tokens,
    }  # fmt: skip
    found = [f"{name}={value!r}" for name, value in odd.items() if value]
    if found:
        raise ConfigError(
            f"{site.leaf}: a parameter that target_parameters names has no {', '.join(found)}: PEFT adds s·B·A to it,"
            " and nothing else; leave these fields at their defaults"
        )


_PLAIN = "jaxadapt.merging.plain_lora(jaxadapt.read(…)) makes of such a file the plain LoRA that computes the same"
_REFUSED: dict[str, str] = {
    "use_qalora": f"PEFT has for bases quantised with GPTQ only, and none of them is a JAX model: {_PLAIN}"
    " (one of another base is a plain LoRA already: use_qalora=False)",
    "use_bdlora": f"makes A or B block-diagonal, and PEFT does it only to spread a LoRA over devices: {_PLAIN}",
    "arrow_config": "routes every token among other adapters: load those by themselves",
    "velora_config": f"compresses activations for the backward pass, in training alone: {_PLAIN}",
    "monteclora_config": f"draws its factors anew, in training alone: {_PLAIN}",
    "megatron_config": "is for Megatron's parallel layers: null; the base's shardings say what lies where",
    "enable_lora": "is of PEFT 0.2, for layers that hold several projections: PEFT itself drops it and computes"
    " something else",
}
"""Fields that change what is computed and are not honoured, with the reason; the last is none of PEFT's any more."""
