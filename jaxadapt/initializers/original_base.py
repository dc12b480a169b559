"""The way back from a base that an initialisation changed: a plain LoRA for the original, or that base once more."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jaxadapt.adapters import sites
from jaxadapt.adapters.adapter import Adapter, Recipe
from jaxadapt.arrays.layout import RANK, FileLayout
from jaxadapt.configs import LoraConfig, lora_variants
from jaxadapt.core import paths
from jaxadapt.core.errors import ConfigError, MismatchError
from jaxadapt.initializers.initialize import Initialization, init_kind
from jaxadapt.models import attachment

Array = Any


def for_original_base(trained: Any, first: Adapter, name: str = attachment.DEFAULT) -> Adapter:
    """A plain LoRA for the base as it was before `start` changed it: what the training learnt, and nothing else.

    ΔW = s·(B·A − B₀·A₀) is written as one product, A' = [A; A₀] and B' = [B, −B₀], of twice the rank, exactly; the
    scale stays (rank and alpha are doubled, the patterns with them; alpha by √2 with `use_rslora`). PEFT's
    `save_pretrained(path_initial_model_for_weight_conversion=…)` does the same. `resize_rank` makes it smaller.

    Args:
        trained: what `extract` takes: a model, variables, an `Adapter`.
        first: `start(…).adapter`.

    Raises `ConfigError` where ΔW is no such product (DoRA; rsLoRA with patterns, as in PEFT), `MismatchError` where
    `first` is not of the same adapter.

    >>> import numpy as np, jaxadapt
    >>> params = {"q": {"kernel": np.arange(24.0).reshape(4, 6).astype("float32")}}
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"], init_lora_weights="olora")
    >>> residual, first = jaxadapt.initializers.start(config, params)
    >>> plain = jaxadapt.initializers.for_original_base(first, first)
    >>> plain.config.r, plain.config.init_lora_weights
    (4, True)
    >>> bool(np.allclose(jaxadapt.merge(params, plain)["q"]["kernel"], params["q"]["kernel"], atol=1e-4))
    True
    """
    adapter = attachment.extract(trained, name)
    config = adapter.config
    if config.get("init_lora_weights") == "loftq":
        raise ConfigError(
            "LoftQ quantised the base, and what that lost is in no adapter: keep the base that was left (export_base),"
            " or load the file with base='original', which quantises it in the same way again"
        )
    why = lora_variants.reasons_not_a_product(config)
    if why or not isinstance(config, LoraConfig):
        raise ConfigError("the change since the start is no product of two matrices: " + "; ".join(why))
    if config.use_rslora and (config.rank_pattern or config.alpha_pattern):
        raise ConfigError(
            "use_rslora with rank_pattern or alpha_pattern: no patterns of a doubled rank have the same scales (PEFT"
            " refuses it too); jaxadapt.merging.to_lora((original, merged), r) approximates the change"
        )
    now, then = adapter.flat(), first.flat()
    differ = [p for p in now.keys() | then.keys() if p not in now or p not in then or now[p].shape != then[p].shape]
    if differ or config != first.config:
        raise MismatchError(
            "the adapter at the start is not of the same shapes and configuration"
            + ("; they differ at:\n" + paths.bullets(sorted(differ)) if differ else "")
        )
    out: dict[str, Array] = {}
    for bound in sites.sites_of(adapter):
        for tensor, entry in zip(bound.tensors, bound.entries, strict=True):
            old = -then[entry.path] if tensor.name in bound.method.scaled else then[entry.path]
            out[entry.path] = _side_by_side(entry.form, now[entry.path], old)
    doubled = config.replace(
        r=2 * config.r,
        lora_alpha=config.lora_alpha * math.sqrt(2) if config.use_rslora else 2 * config.lora_alpha,
        rank_pattern={pattern: 2 * r for pattern, r in config.rank_pattern.items()},
        alpha_pattern={pattern: 2 * alpha for pattern, alpha in config.alpha_pattern.items()},
        init_lora_weights=True, eva_config=None, corda_config=None, lora_ga_config=None, loftq_config={},
    )  # fmt: skip
    return Adapter(doubled, paths.unflatten(out), adapter.keymap)


def _side_by_side(form: FileLayout, now: Any, old: Any) -> Any:
    """Two arrays of one arrangement along the rank, tensor by tensor where these have ranks of their own."""
    axis = form.left.index(RANK)
    if form.ranks is None:
        return jnp.concatenate([now, old], axis)
    out = jnp.zeros([2 * n if at == axis else n for at, n in enumerate(form.shape)], now.dtype)
    for i, rank in enumerate(form.ranks):
        first = form.index(i)
        second = tuple(slice(rank, 2 * rank) if at == axis else where for at, where in enumerate(first))
        out = out.at[first].set(now[first]).at[second].set(old[first])
    return out


def residual_base(recipe: Recipe, bounds: Sequence[sites.Site], weights: Mapping[str, Array]) -> dict[str, Array]:
    """`{leaf: array}`: the base weights as PEFT leaves them when it loads an adapter with such a configuration.

    Raises `ConfigError` where PEFT does not get them back either.
    """
    config: Any = recipe.config
    kind = init_kind(config)
    why = {
        "pissa_niter": "a randomised SVD, which is another one in each run",
        "corda": "the data it was made with",
        "lora_ga": "the gradients it was made with",
    }.get(kind)
    if why is not None:
        raise ConfigError(
            f"{lora_variants.init_field(config)}: what it took out of the base weights depends on {why}"
            " (and PEFT's own load does not find them either). Load onto the base that was left, with"
            " base='changed', or convert the adapter where it was trained: for_original_base, in PEFT"
            " path_initial_model_for_weight_conversion"
        )
    begin = Initialization(kind, recipe, bounds, weights, None)
    return begin.assembled({b.leaf: begin.rows(b) for b in begin.pairs}, None, {})[1]
