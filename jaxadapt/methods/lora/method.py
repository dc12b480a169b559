"""LoRA (Hu et al. 2021, arXiv:2106.09685) with PEFT's conventions: W + s·B·A, s = α/r or α/√r.

Each site has `lora_A` (batch..., r, in...) and `lora_B` (batch..., out..., r): the bytes of the file's A (r, in) and
B (out, r). An embedding's tensors are called `lora_embedding_A` and `lora_embedding_B`. In a convolution the window
belongs to the inputs; in a grouped convolution A sees all channels. With `lora_bias`, `lora_B_bias` (batch..., out...)
is added. The arithmetic follows PEFT's `tuners/lora/layer.py`: x is cast to A's dtype, the scale multiplies the rank-r
side, and the sum is cast to the base output's dtype once, at the end. Each variant has its own file.

Differences from PEFT, and its faults that are kept:

- PEFT's convolutions ignore the base's dilation (its A then crashes) and padding mode; these follow the base layer.
- PEFT's merge of a grouped convolution fails with an internal error; this one raises `AttachError` with the reason.
- The norm of a grouped DoRA in PEFT mixes channels of several groups; this configuration is refused.
- PEFT adds the product of an `nn.MultiheadAttention`'s output projection twice, from 0.15.0 (the first version that
  adapts it) to 0.21.2 (the newest). Files were trained that way, so it is added twice here as well. Later versions may
  differ (`is_newer_attention_file`). Its dropout has no effect in PEFT, and none here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from jaxadapt.arrays import low_rank
from jaxadapt.arrays.axes import USED, Axes, Operation, PerEntry, Use, entry_values, expand_leading, mask_unadapted
from jaxadapt.arrays.random_draws import Draw
from jaxadapt.configs import PEFT_VERSION, Config, LoraConfig
from jaxadapt.core.errors import AttachError, ConfigError
from jaxadapt.keymaps.keymap import Match
from jaxadapt.keymaps.weight import MethodTensor
from jaxadapt.methods.base import Array, Drop, Effects, Method, Params, Start, Target, adapted_entries, as_computable
from jaxadapt.methods.lora import alora, dora, kasa
from jaxadapt.methods.lora.checks import REFUSED_FIELDS, check_parameter, check_site

SCALE = "scale"
"""The tensor that holds the scale s where every row of a batch has its own adapter."""


@dataclasses.dataclass(frozen=True)
class LoraHparams:
    """Hyperparameters of one site.

    Attributes:
        scale: the scale s; a `PerEntry` if the leaf's layers or parts differ; None if it is a tensor, as the rows of a
            batch have it.
        dropout: the dropout rate.
        kind: the weight's kind, "" for a plain matrix.
        groups: the groups of a convolution.
        dora: True for DoRA.
        bias: True if the adapter has a bias (`lora_bias`).
        tied: True if an embedding is adapted in its use as the head, too.
        frozen: True if B is never trained (MiCA, arXiv:2604.01694).
        invoked: True if only some tokens are adapted (aLoRA).
        used: 1 for each adapted entry and 0 for the others. None if all are adapted, or if zeros in A and B are enough
            to leave an entry unchanged.
    """

    scale: float | PerEntry | None
    dropout: float
    kind: str
    groups: int
    dora: bool
    bias: bool
    tied: bool
    frozen: bool
    invoked: bool
    used: PerEntry | None


class Lora(Method):
    """LoRA and its variants: W + s·B·A."""

    peft_type = "LORA"
    kinds = frozenset({"linear", "embedding", "conv", "attention"})
    scaled = frozenset({"lora_B", "lora_B_bias", "lora_embedding_B"})
    row_neutral = MappingProxyType({dora.MAGNITUDE: 1.0})
    row_padded = frozenset({"r"})
    row_turned = frozenset({"lora_B"})
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

    # The nesting depth of PEFT's ParamWrapper, if the weight is adapted through target_parameters.
    wrapper_depth: int | None = None
    neutral = MappingProxyType({"lora_embedding_A": 0.0, "lora_B": 0.0, "lora_B_bias": 0.0})
    # The head's B is the embedding's A, transposed, and the head's A is the embedding's B.
    as_head = MappingProxyType({"lora_embedding_A": "lora_B.weight", "lora_embedding_B": "lora_A.weight"})

    def __init__(self, depth: int | None = None) -> None:
        if depth is not None:
            self.wrapper_depth = depth
            self.on_parameters = True

    def for_parameter(self, depth: int) -> Lora:
        return Lora(depth)

    def check(self, config: Config) -> None:
        assert isinstance(config, LoraConfig)
        problems = [
            f"{name}={value!r}, which {why}" for name, why in REFUSED_FIELDS.items() if (value := config.get(name))
        ]
        if problems:
            raise ConfigError(
                "this LoRA configuration sets fields that change the computation and are not supported: "
                + "; ".join(problems)
            )

    def tensors(self, config: LoraConfig, target: Target) -> tuple[MethodTensor, ...]:
        match, kind, groups = target.match, target.kind, target.match.weight.groups
        r = target.rank(config.rank_of)
        for rank in {config.rank_of(module) for module in target.modules}:
            check_site(config, match, rank)
        if self.wrapper_depth is not None:
            check_parameter(config, match)
        if kind == "embedding":
            a, b, last = "lora_embedding_A", "lora_embedding_B", ""
        else:
            a, b, last = "lora_A", "lora_B", ".weight"
        wrapped = ".base_layer" * (self.wrapper_depth or 0)
        window = ((),) * (len(match.weight.right) - 2) if kind == "conv" else ()
        group_axis = ("g",) if groups > 1 else ()
        # For experts in one array, A's rows are ordered by expert first, and B's columns by rank first.
        torch_a, torch_b = (("experts", "r"), (*group_axis, "in")), (("out",), ("r", "experts"), *window)
        own_a, own_b = (("r", r), *((g, groups) for g in group_axis)), (("r", r // groups),)
        tensors = [
            MethodTensor(a, f"{wrapped}.{a}{last}", ("batch", "r", *group_axis, "in"), torch_a, own_a, scale_power=0),
            MethodTensor(b, f"{wrapped}.{b}{last}", ("batch", "out", "r"), torch_b, own_b, scale_power=1),
        ]
        if config.lora_bias:
            tensors.append(MethodTensor("lora_B_bias", ".lora_B.bias", ("batch", "out"), (("out",),), scale_power=1))
        if config.kasa_config is not None:
            tensors.append(kasa.diagonal_tensor(r))
        if config.use_dora:
            tensors.append(dora.magnitude_tensor(match))
        return target.with_ranks(tensors, config.rank_of)

    def hparams(self, config: LoraConfig, target: Target) -> LoraHparams:
        match, kind, times = target.match, target.kind, target.match.weight.products
        needs_mask = config.use_dora or config.lora_bias  # their gradients are nonzero even where A and B are zero
        return LoraHparams(
            target.value(lambda module: times * config.scale_of(module)),
            0.0 if kind in ("attention", "embedding") else config.lora_dropout,  # PEFT has no dropout for these
            "" if kind in ("attention", "linear") else kind,
            match.weight.groups,
            config.use_dora,
            config.lora_bias,
            kind == "embedding" and config.ensure_weight_tying,
            str(config.init_lora_weights).lower() == "mica",
            config.alora_invocation_tokens is not None,
            adapted_entries(target.modules) if needs_mask else None,
        )

    def role(self, hparams: LoraHparams, tensor: str) -> str:
        return "frozen" if hparams.frozen and tensor.endswith("_B") else super().role(hparams, tensor)

    def dropout(self, hparams: LoraHparams) -> float:
        return hparams.dropout

    def follows(self, hparams: LoraHparams, primitive: str) -> bool:
        if primitive == "ragged_dot_general":
            return not (hparams.dora or hparams.bias or hparams.kind in ("conv", "embedding"))
        return {"conv": "conv_general_dilated", "embedding": "gather"}.get(hparams.kind) == primitive

    def forward(self, hparams: LoraHparams) -> bool:
        return not hparams.kind and super().forward(hparams)  # an embedding's product is that of a tied head

    def effects(self, hparams: LoraHparams) -> Effects:
        return Effects(
            "changes" if hparams.dora else "adds",
            bias="adds" if hparams.bias else None,
            reads=hparams.dora,
            sees="product" if hparams.dora else "layer",
        )

    def starts_unchanged(self, config: LoraConfig) -> bool:
        return config.init_lora_weights is not False

    def init(self, config: LoraConfig, tensor: MethodTensor, start: Start) -> Draw | Array:
        if tensor.name == dora.MAGNITUDE:
            assert start.axes is not None
            return dora.output_norms(start.axes, _changed_weight(start.hparams, start.params, start.axes, start.w))
        init = config.init_lora_weights
        if init not in (True, False, "gaussian") or config.kasa_config is not None:
            setting = f"init_lora_weights={init!r}" if config.kasa_config is None else "kasa_config"
            raise ConfigError(
                f"cannot initialize with {setting} from random numbers: it needs the base weights, data or gradients."
                " Use jaxadapt.initializers.start(config, base, …), which also returns the base to train with. For"
                " jaxadapt.load the shapes are enough: jax.eval_shape gives them"
            )
        if init is not False and tensor.name in ("lora_B", "lora_B_bias", "lora_embedding_A"):
            return Draw("constant", 0.0)
        if tensor.name.startswith("lora_embedding"):
            return Draw("normal", 1.0)
        own_sizes = dict(tensor.own)
        r = own_sizes.get("r", 1)
        if init == "gaussian":
            return Draw("normal", 1 / r)
        return Draw.kaiming(start.fan_in * own_sizes.get("g", 1) if tensor.name == "lora_A" else r)

    def output(
        self,
        hparams: LoraHparams,
        params: Params,
        use: Use | Operation,
        x: Array,
        y: Array,
        drop: Drop | None,
        w: Array,
    ) -> Array:
        if hparams.kind == "embedding" and not hparams.tied and isinstance(use, Use):
            return y  # the head of a model with tied embeddings: a separate module in PEFT, which is not adapted
        x = x if drop is None else drop(x)
        scale = _scale(hparams, params)
        delta = low_rank.low_rank_delta(use, scale, hparams.groups, *_factors(hparams, params), x, y)
        if hparams.dora:
            w = as_computable(w)
            if hparams.scale is None:  # `prepare_rows` computed the factor; only a transposed use needs the weight
                transposed = isinstance(use, Use) and use.transposed
                changed = _changed_weight(hparams, params, use.axes, w) if transposed else w
                magnitude = params[dora.MAGNITUDE]
            else:
                changed = _changed_weight(hparams, params, use.axes, w)
                magnitude = dora.magnitude_factor(use.axes, params, hparams.used, changed)
            return dora.output(use, magnitude, w, changed, delta, x, y, drop is not None).astype(y.dtype)
        if hparams.bias:
            delta = delta + low_rank.expand_over_outputs(use, _bias(hparams, params), y.ndim)
        if hparams.invoked:
            delta = alora.mask_delta(params, delta, y)
        return (y + delta).astype(y.dtype)

    def weight(self, hparams: LoraHparams, params: Params, axes: Axes, w: Array) -> Array:
        return self._effective(hparams, params, axes, w, _changed_weight)

    def merged(self, hparams: LoraHparams, params: Params, axes: Axes, w: Array) -> Array:
        return self._effective(hparams, params, axes, w, _merged_weight)

    def _effective(
        self, hparams: LoraHparams, params: Params, axes: Axes, w: Array, change: Callable[..., Array]
    ) -> Array:
        if hparams.groups > 1:
            raise AttachError(
                "LoRA on a grouped convolution has no effective weight, because A sees all channels and W + s·B·A would"
                " be a weight without groups: it can be neither merged nor applied outside the layer's own convolution"
            )
        _check_single_weight(hparams)
        changed = change(hparams, params, axes, w)
        if hparams.dora:
            changed = dora.effective_weight(axes, dora.magnitude_factor(axes, params, hparams.used, changed), changed)
        return changed.astype(w.dtype)

    def unweight(self, hparams: LoraHparams, params: Params, axes: Axes, w: Array) -> Array:
        _check_single_weight(hparams)
        if hparams.dora:
            raise AttachError(
                "cannot unmerge DoRA: it scaled W + s·B·A to the norm m, and the original norm, which W needs, is lost."
                " Keep the parameters from before the merge"
            )
        return low_rank.add_product(axes, w, -_scale(hparams, params), *_factors(hparams, params)).astype(w.dtype)

    def bias(self, hparams: LoraHparams, params: Params, axes: Axes, bias: Array, undo: bool = False) -> Array:
        if not hparams.bias:
            return bias
        added = _bias(hparams, params).reshape(bias.shape)
        return (bias - added if undo else bias + added).astype(bias.dtype)

    def row_hparams(self, hparams: LoraHparams) -> LoraHparams:
        problem = "it is an aLoRA, which adapts only some tokens of a row" if hparams.invoked else None
        if hparams.kind:
            problem = f"it adapts {'an' if hparams.kind == 'embedding' else 'a'} {hparams.kind}, not a matrix product"
        if problem is not None:
            raise AttachError(f"the rows of a batch cannot each have a LoRA of their own here: {problem}")
        return dataclasses.replace(hparams, scale=None, dropout=0.0, frozen=False, used=None)

    def row_params(self, hparams: LoraHparams, params: Params, entries: tuple[int, ...]) -> dict[str, Array]:
        scale, used = (entry_values(1.0 if x is None else x, entries) for x in (hparams.scale, hparams.used))
        tensors = {name: x for name, x in params.items() if name != kasa.DIAGONAL}
        tensors |= {"lora_A": kasa.scale_a(params, params["lora_A"]), SCALE: scale}
        if hparams.bias:
            bias = params["lora_B_bias"]
            tensors["lora_B_bias"] = bias * used.reshape(entries + (1,) * (bias.ndim - used.ndim)).astype(bias.dtype)
        if hparams.dora:
            tensors[USED] = used
        return tensors

    def row_pair(self, hparams: LoraHparams, params: Params) -> tuple[Array, Array, Array] | None:
        return None if hparams.dora or hparams.bias else (params[SCALE], params["lora_A"], params["lora_B"])

    def prepare_rows(self, hparams: LoraHparams, params: Params, axes: Axes, w: Array) -> dict[str, Array]:
        tensors = {name: x for name, x in params.items() if name != USED}
        if hparams.dora:
            length = dora.output_norms(axes, _changed_weight(hparams, params, axes, as_computable(w)))
            used = expand_leading(params[USED], length)
            tensors[dora.MAGNITUDE] = jnp.where(used > 0, params[dora.MAGNITUDE] / length, 1.0)
        return tensors

    def call_data(self, config: LoraConfig, given: Mapping[str, Array]) -> dict[str, Array]:
        tokens, sequence = given.get("tokens"), config.alora_invocation_tokens
        if not sequence or tokens is None:
            return {}
        return {alora.MASK: tokens if tokens.dtype == bool else alora.invocation_mask(tuple(sequence), tokens)}

    def examples(self) -> Sequence[Mapping[str, Any]]:
        return ({"r": 2, "lora_alpha": 3}, {"r": 3, "lora_alpha": 5, "use_rslora": True})


def is_newer_attention_file(config: Config, sites: Iterable[Match]) -> bool:
    """Return True if a file adapts an attention's output projection and is of a newer PEFT than `PEFT_VERSION`.

    A newer PEFT may add the product of that projection once instead of twice.
    """
    known, file_version = (
        [int(n) for n in re.findall(r"\d+", version)[:3]] for version in (PEFT_VERSION, config.peft_version or "")
    )
    projections = (match.weight.products == 2 for match in sites)
    return config.peft_type == "LORA" and file_version > known and any(projections)


def _factors(hparams: LoraHparams, params: Params) -> tuple[Array, Array]:
    kind = "lora_embedding" if "lora_embedding_A" in params else "lora"
    a, b = kasa.scale_a(params, params[f"{kind}_A"]), params[f"{kind}_B"]
    return a, jax.lax.stop_gradient(b) if hparams.frozen else b


def _scale(hparams: LoraHparams, params: Params) -> Any:
    """Return the scale s: one number, or an array (batch...) of the layer's scales."""
    if hparams.scale is None:
        return params[SCALE]
    return hparams.scale.layer_values(params) if isinstance(hparams.scale, PerEntry) else hparams.scale


def _bias(hparams: LoraHparams, params: Params) -> Array:
    """Return s times the adapter's bias."""
    return low_rank.scale_factor(
        _scale(hparams, params), mask_unadapted(hparams.used, params, params["lora_B_bias"], 0.0)
    )


def _changed_weight(hparams: LoraHparams, params: Params, axes: Axes, w: Array) -> Array:
    """Return W + s·B·A, in the dtype of the sum."""
    a, b = _factors(hparams, params)
    if not isinstance(hparams.scale, float):
        return w + low_rank.multiply_factors(axes, low_rank.scale_factor(_scale(hparams, params), a), b)
    return w + hparams.scale * low_rank.multiply_factors(axes, a, b)


def _merged_weight(hparams: LoraHparams, params: Params, axes: Axes, w: Array) -> Array:
    """Return W + s·B·A, computed in one pass without intermediate arrays."""
    return low_rank.add_product(axes, w, _scale(hparams, params), *_factors(hparams, params))


def _check_single_weight(hparams: LoraHparams) -> None:
    if hparams.invoked:
        raise AttachError(
            "aLoRA adapts only the tokens after its invocation sequence, so it has no single effective weight: it can"
            " be neither merged nor applied outside a matrix product"
        )
