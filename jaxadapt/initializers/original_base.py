"""Undo the change that an initialisation makes to the base: convert to a plain LoRA, or change the base again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jaxadapt.adapters import sites
from jaxadapt.adapters.adapter import Adapter, Recipe
from jaxadapt.arrays.layout import RANK, FileLayout
from jaxadapt.configs import LoraConfig, lora
from jaxadapt.core import paths
from jaxadapt.core.errors import ConfigError, MismatchError
from jaxadapt.initializers.initialize import Initialization
from jaxadapt.initializers.kinds import init_kind
from jaxadapt.models.carriers import DEFAULT, lora_carrier

Array = Any


def for_original_base(trained: Any, first: Adapter, name: str = DEFAULT) -> Adapter:
    """Convert a trained adapter to a plain LoRA for the original base, before `start` changed it.

    Writes ΔW = s·(B·A − B₀·A₀) exactly as one product of twice the rank, A' = [A; A₀] and B' = [B, −B₀]. The scale
    stays: rank, alpha and their patterns are doubled (with `use_rslora` alpha is multiplied by √2). PEFT's
    `save_pretrained(path_initial_model_for_weight_conversion=…)` does the same. Reduce the rank with `resize_rank`.

    Args:
        trained: a model, variables or an `Adapter`, as in `extract`.
        first: `start(…).adapter`.

    Raises `ConfigError` if ΔW is not such a product (DoRA; rsLoRA with patterns, as in PEFT), `MismatchError` if
    `first` belongs to another adapter.

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
    adapter = lora_carrier(trained).extract(name)
    config = adapter.config
    if config.get("init_lora_weights") == "loftq":
        raise ConfigError(
            "cannot convert a LoftQ adapter: LoftQ quantized the base, and the adapter does not contain the rounding"
            " error. Keep the changed base (export_base), or load the file with base='original', which quantizes the"
            " base again"
        )
    why = lora.reasons_not_a_product(config)
    if why or not isinstance(config, LoraConfig):
        raise ConfigError(
            "cannot convert: the change since the start is not a product of two matrices: " + "; ".join(why)
        )
    if config.use_rslora and (config.rank_pattern or config.alpha_pattern):
        raise ConfigError(
            "cannot convert use_rslora with rank_pattern or alpha_pattern: no patterns of the doubled rank have the"
            " same scales (PEFT refuses it too). jaxadapt.merging.to_lora((original, merged), r) approximates it"
        )
    new, old = adapter.flat(), first.flat()
    differ = [p for p in new.keys() | old.keys() if p not in new or p not in old or new[p].shape != old[p].shape]
    if differ or config != first.config:
        raise MismatchError(
            "first: expected an adapter of the same shapes and configuration as the trained one"
            + ("; they differ at:\n" + paths.bullets(sorted(differ)) if differ else "")
        )
    out: dict[str, Array] = {}
    for site in sites.sites_of(adapter):
        for tensor, entry in zip(site.tensors, site.entries, strict=True):
            start = -old[entry.path] if tensor.name in site.method.scaled else old[entry.path]
            out[entry.path] = _concatenate_ranks(entry.form, new[entry.path], start)
    doubled = config.with_default_init().replace(
        r=2 * config.r,
        lora_alpha=config.lora_alpha * config.scale_divisor(2),
        rank_pattern={pattern: 2 * r for pattern, r in config.rank_pattern.items()},
        alpha_pattern={pattern: 2 * alpha for pattern, alpha in config.alpha_pattern.items()},
    )
    return Adapter(doubled, paths.unflatten(out), adapter.keymap)


def _concatenate_ranks(form: FileLayout, new: Any, old: Any) -> Any:
    """Concatenate two arrays of one layout along the rank; per tensor if the tensors differ in rank."""
    axis = form.left.index(RANK)
    if form.ranks is None:
        return jnp.concatenate([new, old], axis)
    out = jnp.zeros([2 * n if i == axis else n for i, n in enumerate(form.shape)], new.dtype)
    for i, rank in enumerate(form.ranks):
        first = form.index(i)
        second = tuple(slice(rank, 2 * rank) if j == axis else part for j, part in enumerate(first))
        out = out.at[first].set(new[first]).at[second].set(old[first])
    return out


def residual_base(
    recipe: Recipe, adapter_sites: Sequence[sites.Site], weights: Mapping[str, Array]
) -> dict[str, Array]:
    """Return {leaf: array} of the base weights that PEFT changes when it loads an adapter with this configuration.

    Raises `ConfigError` for initialisations that cannot be repeated, in PEFT either.
    """
    config: Any = recipe.config
    kind = init_kind(config)
    if kind.from_run:
        raise ConfigError(
            f"{lora.init_field(config)}: cannot repeat the change of the base, which depends on"
            f" {kind.from_run} (PEFT's load cannot either). Load onto the changed base with base='changed', or convert"
            " the adapter where it was trained, with for_original_base (in PEFT"
            " path_initial_model_for_weight_conversion)"
        )
    initialization = Initialization(kind, recipe, adapter_sites, weights, None)
    return initialization.assemble(initialization.factors(), None, {})[1]
