"""Where training starts: the initialisations that look at the base, at data or at gradients.

PiSSA, OLoRA, CorDA and LoRA-GA put a part of the base weights into the adapter and take it out of the base, and LoftQ
quantises the base. So `start` gives both, the adapter and the base it belongs to; `originals` has the way back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxadapt.adapters import sites
from jaxadapt.adapters.adapter import Adapter, Recipe
from jaxadapt.configs import LoraConfig, lora_variants
from jaxadapt.core.errors import AttachError, ConfigError
from jaxadapt.initializers import eva
from jaxadapt.initializers import statistics as observing
from jaxadapt.initializers.decompositions import Factors
from jaxadapt.initializers.initialize import Initialization, Rows, init_kind, init_settings
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.merging import factors
from jaxadapt.models import attachment, base_params, planning
from jaxadapt.models.linen import collections
from jaxadapt.models.nnx import attach as nnx

Array = Any

_FROM_DATA = ("eva", "corda")


class Started(NamedTuple):
    """An adapter as it starts, and the base it belongs to.

    Attributes:
        base: the parameters, with other weights where the initialisation takes something out of them; the very same
            arrays elsewhere. For an NNX model: that model, changed so in place, with the adapter attached.
        adapter: its values at the start. Keep it: `for_original_base` needs it.
    """

    base: Any
    adapter: Adapter


def start(
    config: LoraConfig,
    base: Any,
    *,
    key: Any = None,
    name: str = attachment.DEFAULT,
    keymap: KeyMap | str | None = None,
    dtype: Any = None,
    rngs: Any = None,
    stack_axes: Sequence[int] | None = None,
    example: Sequence[Any] | None = None,
    batches: Iterable[Any] | None = None,
    forward: Callable[[Any, Any], Any] | None = None,
    mask: Callable[[Any], Any] | None = None,
    gradients: Any = None,
) -> Started:
    """Begin a LoRA adapter as `init_lora_weights` says, whatever that needs, as PEFT 0.21.2 does.

    Together, adapter and base compute what the base did before (with "loftq" and KaSA nearly). Which base that is:

    | `init_lora_weights` | the base | needs |
    |---|---|---|
    | true, "gaussian", "orthogonal", "eva" | stays | `key`; "eva": `batches` |
    | "mica" (B is never trained then) | stays | |
    | "pissa", "olora" | W − s·B·A | |
    | "pissa_niter_4" (any number) | W − s·B·A | `key` |
    | "loftq" | W in 4 or 8 bits, dense (`quantize` then holds it as it is) | |
    | "corda" | W − s·B·A | `batches` |
    | "lora_ga" | W − s·B·A | `gradients`, `key` |
    | any of the first two, with `kasa_config` | W without its r smallest singular values | `key` |

    Args:
        base: nested mappings of base parameters (a new tree is returned), or an NNX model (changed in place; the
            adapter is attached under `name` and active).
        key: a JAX random key, where something is drawn.
        name, keymap, dtype, rngs, stack_axes, example: as in `adapt` and `init`.
        batches: what the model shall see, in evaluation mode. "eva" goes through them until its components settle
            (PEFT: `initialize_lora_eva_weights`), "corda" once, a sample each (`preprocess_corda`).
        forward: `forward(base, batch)`, the model's outputs. For an NNX model by default `model(batch)`, with a
            tuple `model(*batch)`, with a mapping `model(**batch)`; for parameters it is needed.
        mask: "eva": `mask(batch)`, true for tokens that count; by default from "attention_mask" and "labels" of a
            mapping, as PEFT does.
        gradients: "lora_ga": of a loss by the base parameters, a tree like them (an `nnx.State` for a model);
            averaged over batches.

    Raises `ConfigError` for what the configuration asks and cannot be had exactly, `AttachError` for what is missing.
    Nothing is changed then.

    >>> import jax, numpy as np, jaxadapt
    >>> params = {"q": {"kernel": np.random.default_rng(0).standard_normal((4, 6)).astype("float32")}}
    >>> config = jaxadapt.LoraConfig(r=2, lora_alpha=2, target_modules=["q"], init_lora_weights="pissa")
    >>> residual, adapter = start(config, params)
    >>> bool(np.allclose(jaxadapt.merge(residual, adapter)["q"]["kernel"], params["q"]["kernel"], atol=1e-6))
    True
    """
    if not isinstance(config, LoraConfig):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"start: expected a LoraConfig, found {type(config).__name__}; jaxadapt.adapt begins others")
    is_model = isinstance(base, nnx.nnx.Module)
    if is_model and name in nnx.adapter_names(base):
        raise AttachError(f"there is an adapter {name!r} already; choose another name=, or delete it first")
    if key is None and rngs is not None:
        key = nnx.next_key(rngs)
    kind = init_kind(config)
    given = {"batches": (batches, _FROM_DATA), "gradients": (gradients, ("lora_ga",)), "mask": (mask, ("eva",))}
    idle = [what for what, (value, kinds) in given.items() if value is not None and kind not in kinds]
    lost = [what for what, (value, kinds) in given.items() if value is None and kind in kinds and what != "mask"]
    if key is None and kind in ("", "pissa_niter", "orthogonal", "lora_ga", "kasa"):
        lost.append("key")
    if idle or lost:
        problems = [f"{what} has no effect" for what in idle] + [f"{what} is needed" for what in lost]
        raise AttachError(f"{lora_variants.init_field(config)}: " + ", ".join(problems))

    walked = planning.BaseParams.from_tree(base)

    def plan(config: LoraConfig) -> tuple[Recipe, tuple[sites.Site, ...]]:
        return planning.plan_adapter(walked, config, keymap, stack_axes, example)

    weights = walked.leaves
    recipe, bounds = plan(config)
    begin = Initialization(kind, recipe, bounds, weights, key)
    if kind == "eva":
        run = _forward(base, forward)
        recipe, bounds, found = _eva(plan, begin, base, batches, run, mask)
        begin = dataclasses.replace(begin, recipe=recipe, bounds=bounds)
        made = {b.leaf: _eva_rows(b, recipe.keymap, found) for b in begin.pairs}
    elif kind == "corda":
        seen = _covariances(begin, base, batches, _forward(base, forward))
        made = {b.leaf: begin.corda(b, seen[b.leaf]) for b in begin.pairs}
    elif kind == "lora_ga":
        slopes = _leaves(gradients)
        made = {b.leaf: begin.lora_ga(b, slopes) for b in begin.pairs}
    else:
        made = {b.leaf: begin.rows(b) for b in begin.pairs} if kind else {}
    adapter, new = begin.assembled(made, dtype, walked.shardings)
    if is_model:
        base_params.replace_leaves(base, new)
        nnx.attach(base, adapter.recipe, begin.bounds, name, adapter.flat(), rngs)
        return Started(base, jax.tree.map(lambda x: jnp.array(x, copy=True), adapter))
    return Started(base_params.replace_leaves(base, new) if new else base, collections.boxed(adapter, walked.held))


def _leaves(tree: Any) -> dict[str, Any]:
    """`{path: array}` of gradients, however they are held."""
    if isinstance(tree, nnx.nnx.Module):
        return planning.base_arrays(tree)
    return {p: x for p, x in base_params.base_leaves(tree).items() if x is not None}


# ---------------------------------------------------------------- from data


def _forward(base: Any, given: Callable[[Any, Any], Any] | None) -> Callable[[Any, Any], Any]:
    if given is not None:
        return given
    if not isinstance(base, nnx.nnx.Module):
        raise AttachError(
            "forward is needed for bare parameters, as in"
            " forward=lambda params, batch: module.apply({'params': params}, batch)"
        )
    return _called


def _called(model: Any, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def _covariances(begin: Initialization, base: Any, batches: Any, forward: Any) -> dict[str, dict[str, Array]]:
    """`{leaf: {module: (in, in)}}`, averaged over the calls."""
    statistics = {b.leaf: observing.Statistic(observing.gram, b.fan_in + 1) for b in begin.pairs}
    observe = observing.make_observer(base, begin.recipe, begin.pairs, statistics, forward)
    sums: dict[str, Array] = {}
    for batch in batches:
        found = observe({}, batch)
        sums = {leaf: sums[leaf] + x if sums else x for leaf, x in found.items()}
    if not sums:
        raise AttachError("CorDA needs batches=, and there is none")
    out: dict[str, dict[str, Array]] = {}
    for b in begin.pairs:
        rows = observing.split_layers(b, sums[b.leaf])
        out[b.leaf] = {m: rows[layer, :-1] / rows[layer, -1, 0] for m, layer in b.layers.items()}
    return out


def _eva(
    plan: Any, begin: Initialization, base: Any, batches: Any, forward: Any, mask: Any
) -> tuple[Recipe, tuple[sites.Site, ...], dict[str, Array]]:
    """The configuration with the ranks that the data ask for, bound anew, and A for each module."""
    config: Any = begin.recipe.config
    fields = [f.name for f in dataclasses.fields(eva.Settings)]
    chosen = eva.Settings(**init_settings(config, "eva_config", fields))

    def watch(bounds: Sequence[sites.Site], statistics: Any) -> observing.Observer:
        return observing.make_observer(base, begin.recipe, bounds, statistics, forward)

    found = eva.components(config, begin.pairs, batches, watch, chosen, mask)
    recipe, bounds = plan(eva.redistribute_ranks(config, found, chosen))
    return recipe, bounds, {m: jnp.asarray(x) for m, x in found.items()}


def _eva_rows(b: sites.Site, table: KeyMap, found: Mapping[str, Array]) -> Rows:
    out = factors.matrix_sizes(b)[0]
    return [Factors(found[m], jnp.zeros((out, len(found[m])))) for m in factors.site_modules(b, table)]
