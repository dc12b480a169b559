"""LoRA (Hu et al. 2021, arXiv:2106.09685) with PEFT's conventions: W + s·B·A, s = α/r or α/√r.

Each site has `lora_A` (batch..., r, in...) and `lora_B` (batch..., out..., r): the bytes of the file's A (r, in) and
B (out, r). An embedding's tensors are called `lora_embedding_A` and `lora_embedding_B`. In a convolution the window
belongs to the inputs; in a grouped convolution A sees all channels. With `lora_bias`, `lora_B_bias` (batch..., out...)
is added. The arithmetic follows PEFT's `tuners/lora/layer.py`: x is cast to A's dtype, the scale multiplies the rank-r
side, and the sum is cast to the base output's dtype once, at the end. The variants DoRA, KaSA and aLoRA follow below.

Differences from PEFT, and its faults that are kept:

- PEFT's convolutions ignore the base's dilation (its A then crashes) and padding mode; these follow the base layer.
- PEFT's merge of a grouped convolution fails with an internal error; this one raises `AttachError` with the reason.
- The norm of a grouped DoRA in PEFT mixes channels of several groups; this configuration is refused.
- PEFT adds the product of an `nn.MultiheadAttention`'s output projection twice, from 0.15.0 (the first version that
  adapts it) to 0.21.2 (the newest). Files were trained that way, so it is added twice here as well. Later versions may
  differ (`is_newer_lora_file`). Its dropout has no effect in PEFT, and none here.

DoRA (Liu et al. 2024, arXiv:2402.09353) with PEFT's conventions: m/‖W + s·B·A‖ · (W + s·B·A), bias untouched.

The magnitude m and the norm are per output. The norm is recomputed at each step, but the gradient treats it as a
constant. The arithmetic follows PEFT's `tuners/lora/dora.py`; with dropout, the base product is recomputed on the
dropped input.

KaSA (Wang et al. 2024, arXiv:2412.06071) with PEFT's conventions: W₋ + s·B·diag(d)·A, d trained with A and B.

W₋ is the base weight without its r smallest singular values. `start` computes it (`factors.truncate_svd`), and
`load(read(…, change_base=True), …)` computes it again. It follows PEFT's `tuners/lora/variants.py`, which supports
linear layers only. `optim.kasa_loss` has the penalties of the paper.

aLoRA (arXiv:2504.12397) with PEFT's conventions: a LoRA that adapts only the tokens from its invocation sequence on.

As in PEFT's `tuners/lora/variants.py`, the last occurrence of the sequence counts, and a row without the sequence is
not adapted. The mask of the adapted tokens is data of a call: `jaxadapt.models.invoke` stores it beside A and B under
`MASK`, so one compiled program serves all masks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxadapt.arrays import products
from jaxadapt.configs.base import PEFT_VERSION, Config, release_of
from jaxadapt.configs.lora import LoraConfig, fields_set
from jaxadapt.core.errors import AttachError, ConfigError, met
from jaxadapt.methods.base import (
    Array,
    Axes,
    Draw,
    Drop,
    Effects,
    Examples,
    Floats,
    Match,
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
    as_computable,
    at_least_float32,
    axes_tensor,
    tensor_roles,
)

# ---------------------------------------------------------------- dora


MAGNITUDE = "lora_magnitude_vector"


def output_norms(axes: Axes, w: Array) -> Array:
    """Return the norm of each output's weights, (batch..., out...), in w's dtype."""
    kept = axes.batch_axes + axes.out_axes
    # The squares of small weights underflow in 16 bits.
    lengths = jnp.sqrt(jnp.sum(jnp.square(at_least_float32(w)), axis=axes.in_axes)).astype(w.dtype)
    return lengths.transpose([sorted(kept).index(i) for i in kept])


def magnitude_factor(axes: Axes, params: Params, used: PerEntry | None, changed: Array) -> Array:
    """Return m/‖W + s·B·A‖, (batch..., out...), with 1 in the entries that are not adapted."""
    length = products.mask_unadapted(used, params, jax.lax.stop_gradient(output_norms(axes, changed)), 1.0)
    return products.mask_unadapted(used, params, params[MAGNITUDE] / length, 1.0)


def dora_output(
    hparams: LoraHparams,
    params: Params,
    use: Use | Operation,
    delta: Array,
    x: Array,
    y: Array,
    w: Array,
    dropped: bool,
) -> Array:
    """Return the layer's output without its bias.

    Args:
        delta: s·B·A·x.
        x: the input, after dropout.
        y: the base layer's output without dropout.
        w: the base weight.
        dropped: True if dropout changed x.
    """
    w = as_computable(w)
    transposed = isinstance(use, Use) and use.transposed
    in_rows = hparams.scale is None  # `prepare_rows` computed the factor; only a transposed use needs the weight
    changed = w if in_rows and not transposed else _changed_weight(hparams, params, use.axes, w)
    magnitude = params[MAGNITUDE] if in_rows else magnitude_factor(use.axes, params, hparams.used, changed)
    if transposed:
        return products.run_use(use, x, products.expand_over_weight(use.axes, magnitude) * changed)
    scale = products.expand_over_outputs(use, magnitude, y.ndim)
    base = products.run_use(use, x.astype(w.dtype), w) if dropped else y
    return y + (scale - 1) * base + scale * delta


# ---------------------------------------------------------------- kasa


DIAGONAL = "lora_diag"


def scale_a(params: Params, a: Array) -> Array:
    """Return diag(d)·A for A (batch..., r, in...) and d (batch..., r); return A if there is no d."""
    if DIAGONAL not in params:
        return a
    d = params[DIAGONAL]
    return d.reshape(d.shape + (1,) * (a.ndim - d.ndim)) * a


# ---------------------------------------------------------------- alora


MASK = "tokens"


def invocation_mask(sequence: Sequence[int], ids: Array) -> Array:
    """Return the mask (batch, time) of the adapted tokens: from the last occurrence of the sequence to the end.

    >>> invocation_mask([7, 8], jnp.array([[1, 7, 8, 2], [7, 8, 7, 8], [1, 2, 3, 7]])).astype(int).tolist()
    [[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]]
    """
    length = ids.shape[1]
    starts = length - len(sequence) + 1
    if starts < 1:
        return jnp.zeros(ids.shape, bool)
    hits = jnp.stack([ids[:, i : i + starts] == token for i, token in enumerate(sequence)]).all(0)
    last = jnp.where(hits.any(1), starts - 1 - jnp.argmax(hits[:, ::-1], 1), length)
    return jnp.arange(length)[None] >= last[:, None]


def mask_delta(params: Params, delta: Array, y: Array) -> Array:
    """Return the adapter's output for the adapted tokens, and 0 for the others; raise `AttachError` without a mask."""
    mask = params.get(MASK)
    if mask is None:
        raise AttachError(
            "aLoRA adapts only the tokens after its invocation sequence, so it needs the token ids. Call the model"
            " within jaxadapt.models.invoke(model, ids)"
        )
    if y.shape[: mask.ndim] != mask.shape:
        raise AttachError(
            f"cannot apply aLoRA: the token ids have shape {list(mask.shape)} (batch, time), but a layer's output has"
            f" shape {list(y.shape)}; its leading axes must be the same"
        )
    return jnp.where(mask.reshape(mask.shape + (1,) * (y.ndim - mask.ndim)), delta, 0)


# ---------------------------------------------------------------- checks


def check_site(config: LoraConfig, match: Match, r: int) -> None:
    """Raise `ConfigError` for settings that PEFT lacks for the kind of weight at a site."""
    groups, kind, init = match.weight.groups, match.weight.kind, config.init_lora_weights
    asked = [f"{name}={value!r}" for name, value in fields_set(config, "tensor").items()]
    tied = [f"{name}={value!r}" for name in ("use_dora", "lora_dropout") if (value := config.get(name))]
    without_kasa = {
        "use_dora=True": config.use_dora,
        f"init_lora_weights={init!r}": isinstance(init, str) and init.lower() != "gaussian",
        "a layer that is not a plain linear one (embedding, convolution, attention, Conv1D)": (
            kind not in ("linear", "fused") or match.weight.fan_in_fan_out
        ),
    }
    without_alora = {
        "use_dora": config.use_dora,
        "kasa_config": config.kasa_config is not None,
        "init_lora_weights='mica'": str(init).lower() == "mica",
        "an empty list of tokens": not config.alora_invocation_tokens,
        "a layer that is not linear": kind not in ("linear", "fused"),
    }
    kasa = [] if config.kasa_config is None else met(without_kasa)
    alora = [] if config.alora_invocation_tokens is None else met(without_alora)
    problems = {
        f"the rank {r} must be a multiple of the convolution's {groups} groups": r % groups,
        "use_dora is not supported on a grouped convolution, where PEFT's norm mixes the weights of several groups; set"
        " use_dora=False, or exclude the module": groups > 1 and config.use_dora,
        f"{', '.join(asked)} is not supported on an nn.MultiheadAttention: PEFT has no such adapter (its bias there has"
        " no effect in the forward pass); remove the setting, or exclude the module": kind == "attention" and asked,
        f"{', '.join(tied)} cannot be combined with ensure_weight_tying: PEFT then treats the lookup and the head"
        " differently, but they are one weight; remove one of the settings": (
            kind == "embedding" and config.ensure_weight_tying and tied
        ),
        f"kasa_config with {', '.join(kasa)}: PEFT has no such adapter": kasa,
        "kasa_config is not supported on a part of an nn.Linear, whose parts would share one diagonal; remove the"
        " setting, or exclude the module": kind == "fused" and config.kasa_config is not None,
        f"alora_invocation_tokens with {', '.join(alora)}: PEFT has no such adapter": alora,
        "init_lora_weights='mica' with use_dora=True: PEFT has no such adapter": (init, config.use_dora)
        == ("mica", True),
        "lora_bias=True is not supported on an embedding, which has no output bias; set lora_bias=False, or exclude the"
        " module": kind == "embedding" and config.lora_bias,
    }
    for problem in met(problems):
        raise ConfigError(f"{match.leaf}: {problem}")


def check_parameter(config: LoraConfig, match: Match) -> None:
    """Raise `ConfigError` for settings that PEFT's ParamWrapper lacks: it computes only W + s·B·A."""
    unsupported = fields_set(config, "tensor", "token") | {
        name: value
        for name in ("lora_dropout", "fan_in_fan_out", "init_lora_weights")
        if (value := config.get(name)) and (name != "init_lora_weights" or value == "mica")
    }
    problems = [f"{name}={value!r}" for name, value in unsupported.items() if name != "bias"]
    if problems:
        raise ConfigError(
            f"{match.leaf}: {', '.join(problems)} cannot be combined with target_parameters: PEFT only adds s·B·A to"
            " such a parameter; leave these fields at their defaults"
        )


_PLAIN = "jaxadapt.merging.convert_variant(jaxadapt.read(…)) converts such a file to an equivalent LoRA"
REFUSED_FIELDS: dict[str, str] = {
    "use_qalora": f"applies only to bases quantized with GPTQ, and no JAX model is: {_PLAIN}"
    " (with another base the file is a plain LoRA already: set use_qalora=False)",
    "use_bdlora": f"makes A or B block-diagonal, which PEFT uses only to shard a LoRA over devices: {_PLAIN}",
    "arrow_config": "routes each token among other adapters: load those adapters separately",
    "velora_config": f"compresses activations for the backward pass, in training only: {_PLAIN}",
    "monteclora_config": f"redraws its factors, in training only: {_PLAIN}",
    "megatron_config": "is for Megatron's parallel layers: set it to null; the base's shardings determine the layout",
    "enable_lora": "is a field of PEFT 0.2 for layers with several projections: current PEFT drops it and computes"
    " something else",
}
"""Fields that change the computation and are not supported, with the reason; PEFT no longer has the last one."""


# ---------------------------------------------------------------- method


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
    groups: int = 1
    dora: bool = False
    bias: bool = False
    tied: bool = False
    frozen: bool = False
    invoked: bool = False
    used: PerEntry | None = None


class Lora(Method, peft_type="LORA"):
    """LoRA and its variants: W + s·B·A."""

    kinds: frozenset[str] = frozenset({"linear", "embedding", "conv", "attention", "fused"})
    scaled: frozenset[str] = frozenset({"lora_B", "lora_B_bias", "lora_embedding_B"})
    row_neutral: Floats = Floats({MAGNITUDE: 1.0})
    row_padded: frozenset[str] = frozenset({"r"})
    row_turned: frozenset[str] = frozenset({"lora_B"})
    roles: Strings = tensor_roles(
        A="lora_A",
        B="lora_B",
        bias="lora_B_bias",
        vector="lora_magnitude_vector lora_diag",
        embedding="lora_embedding_A lora_embedding_B",
    )

    # The nesting depth of PEFT's ParamWrapper, if the weight is adapted through target_parameters.
    wrapper_depth: int | None = None
    neutral: Floats = Floats({"lora_embedding_A": 0.0, "lora_B": 0.0, "lora_B_bias": 0.0})
    # The head's B is the embedding's A, transposed, and the head's A is the embedding's B.
    as_head: Strings = Strings({"lora_embedding_A": "lora_B.weight", "lora_embedding_B": "lora_A.weight"})
    examples: Examples = ({"r": 2, "lora_alpha": 3}, {"r": 3, "lora_alpha": 5, "use_rslora": True})

    def for_parameter(self, depth: int) -> Lora:
        method = Lora()
        method.wrapper_depth, method.on_parameters = depth, True
        return method

    def check(self, config: Config) -> None:
        assert isinstance(config, LoraConfig)
        # To PEFT an empty object is a variant with its defaults, except that of Megatron.
        problems = [
            f"{name}={value!r}, which {why}"
            for name, why in REFUSED_FIELDS.items()
            if (value := config.get(name)) or (value == {} and name != "megatron_config")
        ]
        if problems:
            raise ConfigError(
                "this LoRA configuration sets fields that change the computation and are not supported: "
                + "; ".join(problems)
            )

    def tensors(self, config: LoraConfig, target: Target) -> tuple[MethodTensor, ...]:
        groups = target.match.weight.groups
        r = target.rank(config.rank_of)
        for rank in {config.rank_of(module) for module in target.modules}:
            check_site(config, target.match, rank)
        if self.wrapper_depth is not None:
            check_parameter(config, target.match)
        a, b, last = (
            ("lora_embedding_A", "lora_embedding_B", "")
            if target.kind == "embedding"
            else ("lora_A", "lora_B", ".weight")
        )
        wrapped = ".base_layer" * (self.wrapper_depth or 0)
        window = ((),) * (len(target.match.weight.right) - 2) if target.kind == "conv" else ()
        group_axis = ("g",) if groups > 1 else ()
        # For experts in one array, A's rows are ordered by expert first, and B's columns by rank first.
        tensors = [
            MethodTensor(
                a,
                f"{wrapped}.{a}{last}",
                ("batch", "r", *group_axis, "in"),
                (("experts", "r"), (*group_axis, "in")),
                (("r", r), *((g, groups) for g in group_axis)),
                scale_power=0,
            ),
            MethodTensor(
                b,
                f"{wrapped}.{b}{last}",
                ("batch", "out", "r"),
                (("out",), ("r", "experts"), *window),
                (("r", r // groups),),
                scale_power=1,
            ),
        ]
        if config.lora_bias:
            tensors.append(axes_tensor("lora_B_bias", "out", suffix=".lora_B.bias", scale_power=1))
        if config.kasa_config is not None:
            tensors.append(axes_tensor(DIAGONAL, "r", (("r", r),)))
        if config.use_dora:
            axes = "1 out" + " 1" * len(window) if target.kind == "conv" else "out"
            tensors.append(axes_tensor(MAGNITUDE, axes, from_base=True, scale_power=1))
        return target.with_ranks(tensors, config.rank_of)

    def hparams(self, config: LoraConfig, target: Target) -> LoraHparams:
        kind = target.kind
        needs_mask = config.use_dora or config.lora_bias  # their gradients are nonzero even where A and B are zero
        return LoraHparams(
            target.value(lambda module: target.match.weight.products * config.scale_of(module)),
            0.0 if kind in ("attention", "embedding") else config.lora_dropout,  # PEFT has no dropout for these
            "" if kind in ("attention", "linear", "fused") else kind,
            target.match.weight.groups,
            config.use_dora,
            config.lora_bias,
            kind == "embedding" and config.ensure_weight_tying,
            str(config.init_lora_weights).lower() == "mica",
            config.alora_invocation_tokens is not None,
            adapted_entries(target.modules) if needs_mask else None,
        )

    def role(self, hparams: LoraHparams, tensor: str) -> str:
        return "frozen" if hparams.frozen and tensor.endswith("_B") else super().role(hparams, tensor)

    def follows(self, hparams: LoraHparams, primitive: str) -> bool:
        if primitive == "ragged_dot_general":
            return not (hparams.dora or hparams.bias or hparams.kind in ("conv", "embedding"))
        return super().follows(hparams, primitive)

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
        if tensor.name == MAGNITUDE:
            assert start.axes is not None
            return output_norms(start.axes, _changed_weight(start.hparams, start.params, start.axes, start.w))
        init = config.init_lora_weights
        if str(init).lower() not in ("true", "false", "gaussian") or config.kasa_config is not None:
            setting = f"init_lora_weights={init!r}" if config.kasa_config is None else "kasa_config"
            raise ConfigError(
                f"cannot initialize with {setting} from random numbers: it needs the base weights, data or gradients."
                " Use jaxadapt.initializers.start(base, config, …), which also returns the base to train with. For"
                " jaxadapt.load the shapes are enough: jax.eval_shape gives them"
            )
        if init is not False and tensor.name in ("lora_B", "lora_B_bias", "lora_embedding_A"):
            return Draw("constant", 0.0)
        if tensor.name.startswith("lora_embedding"):
            return Draw("normal", 1.0)
        own_sizes = dict(tensor.own)
        r = own_sizes.get("r", 1)
        if str(init).lower() == "gaussian":
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
        delta = products.low_rank_delta(use, _scale(hparams, params), hparams.groups, *_factors(hparams, params), x, y)
        if hparams.dora:
            return dora_output(hparams, params, use, delta, x, y, w, drop is not None).astype(y.dtype)
        if hparams.bias:
            delta = delta + products.expand_over_outputs(use, _bias(hparams, params), y.ndim)
        if hparams.invoked:
            delta = mask_delta(params, delta, y)
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
            magnitude = magnitude_factor(axes, params, hparams.used, changed)
            changed = products.expand_over_weight(axes, magnitude) * changed
        return changed.astype(w.dtype)

    def unweight(self, hparams: LoraHparams, params: Params, axes: Axes, w: Array) -> Array:
        _check_single_weight(hparams)
        if hparams.dora:
            raise AttachError(
                "cannot unmerge DoRA: it scaled W + s·B·A to the norm m, and the original norm, which W needs, is lost."
                " Keep the parameters from before the merge"
            )
        return products.add_product(axes, w, -_scale(hparams, params), *_factors(hparams, params)).astype(w.dtype)

    def bias(self, hparams: LoraHparams, params: Params, axes: Axes, bias: Array, undo: bool = False) -> Array:
        if not hparams.bias:
            return bias
        added = _bias(hparams, params).reshape(bias.shape)
        return (bias - added if undo else bias + added).astype(bias.dtype)

    def row_hparams(self, hparams: LoraHparams) -> LoraHparams:
        if hparams.invoked:
            raise AttachError(
                "cannot use a different LoRA per batch row in this layer: it is an aLoRA, which adapts only some tokens"
                " of a row"
            )
        return dataclasses.replace(hparams, scale=None, dropout=0.0, frozen=False, used=None)

    def row_params(self, hparams: LoraHparams, params: Params, entries: tuple[int, ...]) -> dict[str, Array]:
        scale, used = (products.entry_values(1.0 if x is None else x, entries) for x in (hparams.scale, hparams.used))
        tensors = {name: x for name, x in params.items() if name != DIAGONAL} | {
            "lora_A": scale_a(params, params["lora_A"]),
            SCALE: scale,
        }
        if hparams.bias:
            bias = params["lora_B_bias"]
            tensors["lora_B_bias"] = bias * used.reshape(entries + (1,) * (bias.ndim - used.ndim)).astype(bias.dtype)
        if hparams.dora:
            tensors[products.USED] = used
        return tensors

    def row_pair(self, hparams: LoraHparams, params: Params) -> tuple[Array, Array, Array] | None:
        return None if hparams.dora or hparams.bias else (params[SCALE], params["lora_A"], params["lora_B"])

    def prepare_rows(self, hparams: LoraHparams, params: Params, axes: Axes, w: Array) -> dict[str, Array]:
        tensors = {name: x for name, x in params.items() if name != products.USED}
        if hparams.dora:
            length = output_norms(axes, _changed_weight(hparams, params, axes, as_computable(w)))
            used = products.expand_leading(params[products.USED], length)
            tensors[MAGNITUDE] = jnp.where(used > 0, params[MAGNITUDE] / length, 1.0)
        return tensors

    def call_data(self, config: LoraConfig, given: Mapping[str, Array]) -> dict[str, Array]:
        tokens = given.get("tokens")
        if not config.alora_invocation_tokens or tokens is None:
            return {}
        return {
            MASK: tokens if tokens.dtype == bool else invocation_mask(tuple(config.alora_invocation_tokens), tokens)
        }


def is_newer_lora_file(config: Config) -> bool:
    """Return True if a file of LoRA is of a newer PEFT than `PEFT_VERSION`."""
    return config.peft_type == "LORA" and release_of(config.peft_version)[:3] > release_of(PEFT_VERSION)


def _factors(hparams: LoraHparams, params: Params) -> tuple[Array, Array]:
    kind = "lora_embedding" if "lora_embedding_A" in params else "lora"
    b = params[f"{kind}_B"]
    return scale_a(params, params[f"{kind}_A"]), jax.lax.stop_gradient(b) if hparams.frozen else b


def _scale(hparams: LoraHparams, params: Params) -> Any:
    """Return the scale s: one number, or an array (batch...) of the layer's scales."""
    if hparams.scale is None:
        return params[SCALE]
    return hparams.scale.layer_values(params) if isinstance(hparams.scale, PerEntry) else hparams.scale


def _bias(hparams: LoraHparams, params: Params) -> Array:
    """Return s times the adapter's bias."""
    return products.scale_factor(
        _scale(hparams, params), products.mask_unadapted(hparams.used, params, params["lora_B_bias"], 0.0)
    )


def _changed_weight(hparams: LoraHparams, params: Params, axes: Axes, w: Array) -> Array:
    """Return W + s·B·A, in the dtype of the sum."""
    a, b = _factors(hparams, params)
    if not isinstance(hparams.scale, float):
        return w + products.multiply_factors(axes, products.scale_factor(_scale(hparams, params), a), b)
    return w + hparams.scale * products.multiply_factors(axes, a, b)


def _merged_weight(hparams: LoraHparams, params: Params, axes: Axes, w: Array) -> Array:
    """Return W + s·B·A, computed in one pass without intermediate arrays."""
    return products.add_product(axes, w, _scale(hparams, params), *_factors(hparams, params))


def _check_single_weight(hparams: LoraHparams) -> None:
    if hparams.invoked:
        raise AttachError(
            "aLoRA adapts only the tokens after its invocation sequence, so it has no single effective weight: it can"
            " be neither merged nor applied outside a matrix product"
        )
