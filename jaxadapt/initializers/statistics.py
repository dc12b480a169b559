"""Statistics of the inputs of a model's layers, for initializations that use activations.

A probe at each site stores a statistic as a parameter. It changes no output, and the parameter's gradient is the new
statistic. So statistics are computed on the device, inside the model's scan, jit and remat, in NNX and Linen, at the
cost of one backward pass.

With EVA (arXiv:2410.07170), A starts as the principal components of a layer's inputs, and the ranks follow the
variance. As PEFT 0.21.2 (`tuners/lora/eva.py`), it iterates over the batches, repeatedly if necessary, until the
components of every layer converge from one batch to the next. PEFT leaves the order of equal explained variances open;
here the first layer wins.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from jaxadapt.adapters.adapter import Recipe, Site
from jaxadapt.configs.lora import LoraConfig
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, ConfigError, raise_listed
from jaxadapt.initializers import kinds
from jaxadapt.keymaps import plan
from jaxadapt.methods.base import Array, Drop, Effects, Method, MethodTensor, Operation, Params, Use
from jaxadapt.models import attachment, graph, nnx_adapters
from jaxadapt.models.carriers import carrier
from jaxadapt.models.linen_call import Overlay, intercept, key_paths

# ---------------------------------------------------------------- statistics


Update = Callable[[Array, Array, Array], Array]
"""`(state, inputs (tokens, in) in float32, mask (tokens,)) -> state`, for one call of the layer.

A state is a matrix (rows, in); the first entry of its last row counts the calls.
"""

_NAME = "~observed"


class _Probe(Method):
    """A method that observes inputs; its hyperparameter is the `Update` of its state.

    No configuration selects it, so it defines no tensors, hyperparameters or initial values.
    """

    peft_type = "LORA"

    def _refuse(self, *args: Any, **options: Any) -> NoReturn:
        raise NotImplementedError

    tensors = hparams = init = _refuse

    def effects(self, hparams: Any) -> Effects:
        return Effects("changes")

    def output(
        self, hparams: Update, params: Params, use: Use | Operation, x: Array, y: Array, drop: Drop | None, w: Array
    ) -> Array:
        if not isinstance(use, Use) or use.transposed:
            return y  # a tied head, which is another module in PEFT
        if set(use.letters("batch")) & set(use.x):
            raise AttachError(
                "its inputs differ between its matrices (experts), so they have no common covariance; exclude the layer"
            )
        inputs = use.letters("in")
        others = [i for i, letter in enumerate(use.x) if letter not in inputs]
        lead = tuple(x.shape[i] for i in others)
        flat = x.transpose([*others, *map(use.x.index, inputs)]).reshape(-1, params["state"].shape[-1])
        mask = params["mask"]
        if mask.shape[-1] not in (1, len(flat)):
            raise AttachError(f"expected a mask of the size of its inputs {lead}, found size {mask.shape[-1]}")
        return _observe(hparams, params["state"], flat.astype(jnp.float32), jnp.broadcast_to(mask[0], len(flat)), y)

    def weight(self, hparams: Any, params: Params, axes: Any, w: Array) -> Array:
        raise AttachError("its inputs are unknown, because its weight is not used in a product; exclude the layer")

    unweight = weight


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _observe(update: Update, state: Array, x: Array, mask: Array, y: Array) -> Array:
    return y


def _observe_forward(update: Update, state: Array, x: Array, mask: Array, y: Array) -> tuple[Array, Any]:
    return y, (state, x, mask)


def _observe_backward(update: Update, saved: Any, cotangent: Array) -> tuple[Array, Array, Array, Array]:
    state, x, mask = saved
    with jax.default_matmul_precision("highest"):
        return update(state, x, mask), jnp.zeros_like(x), jnp.zeros_like(mask), cotangent


_observe.defvjp(_observe_forward, _observe_backward)


def gram(state: Array, x: Array, mask: Array) -> Array:
    """Return the sum of xᵀ·x, x divided by its largest entry as in CorDA: (in + 1, in); the last row counts calls."""
    x = x / jnp.abs(jnp.max(x))
    return jnp.concatenate([x.T @ x, jnp.zeros_like(state[:1]).at[0, 0].set(1)])


def moments(state: Array, x: Array, mask: Array) -> Array:
    """Return mean, variance, and (calls, tokens) in the last row; layers with equal inputs have equal moments."""
    count, mean, variance = _moments(x, mask)
    return jnp.stack([mean, variance, jnp.zeros_like(mean).at[:2].set(jnp.array([1, count]))])


def _moments(x: Array, mask: Array) -> tuple[Array, Array, Array]:
    count = jnp.sum(mask)
    mean = mask @ x / jnp.maximum(count, 1)
    return count, mean, mask @ (x - mean[None]) ** 2 / jnp.maximum(count, 1)


def components(state: Array, x: Array, mask: Array) -> Array:
    """Return the state after one step of incremental PCA, following PEFT's `utils/incremental_pca.py`.

    The state consists of k components, then singular values, mean, variance, and (calls, tokens seen). A call with
    fewer tokens than components changes nothing, as in PEFT.
    """
    k = len(state) - 4
    old, sigma, mean, variance, seen = state[:k], state[k, :k], state[k + 1], state[k + 2], state[-1, 1]
    count, batch_mean, batch_variance = _moments(x, mask)
    total = jnp.maximum(seen + count, 1)
    new_mean = (seen * mean + count * batch_mean) / total
    new_variance = (seen * variance + count * batch_variance + seen * count / total * (mean - batch_mean) ** 2) / total
    shift = jnp.sqrt(seen / total * count) * (mean - batch_mean)
    rows = jnp.concatenate([sigma[:, None] * old, (x - batch_mean[None]) * mask[:, None], shift[None]])
    omega = jax.random.normal(jax.random.key(42), (min(rows.shape), min(2 * k, *rows.shape)))
    _, singular_values, v = kinds.svd_lowrank(rows, 4, omega)
    v = v * jnp.sign(jnp.take_along_axis(v, jnp.argmax(jnp.abs(v), 1)[:, None], 1))
    empty = jnp.zeros(state.shape[-1])
    info = empty.at[0].set(1).at[1].set(seen + count)
    rest = jnp.stack([empty.at[:k].set(singular_values[:k]), new_mean, new_variance, info])
    return jnp.where(count < k, state.at[-1, 0].set(1), jnp.concatenate([v[:k], rest]))


# ---------------------------------------------------------------- running a model with probes


Observer = Callable[..., dict[str, Array]]


def make_observer(
    base: Any,
    recipe: Recipe,
    adapter_sites: Sequence[Site],
    update: Update,
    rows: Mapping[str, int],
    forward: Callable[[Any, Any], Any],
) -> Observer:
    """Return `observe(states, batch, mask=None)`, which runs the model on a batch and returns the new statistics.

    These are `{leaf: (layers, rows, in)}`. `states` are the previous statistics (zeros for leaves without one). `mask`
    selects the tokens that count, in the shape of the layers' inputs without their last axis.

    Args:
        base: an NNX model, which stays unchanged, or Linen's base parameters.
        update: computes the statistic of a leaf's inputs.
        rows: `{leaf: the rows of its statistic}`.
        forward: `forward(base, batch)`; its outputs must depend on all these layers.
    """
    run = (
        _run_nnx(base, recipe, forward) if carrier(base).in_place else _run_linen(base, adapter_sites, update, forward)
    )

    def observe(states: Mapping[str, Array], batch: Any, mask: Array | None = None) -> dict[str, Array]:
        flat = jnp.ones((1, 1)) if mask is None else jnp.asarray(mask, jnp.float32).reshape(1, -1)
        probes = [_probe(recipe, site, update, rows[site.leaf], flat.size) for site in adapter_sites]
        values: dict[str, Array] = {}
        for site, probe in zip(adapter_sites, probes, strict=True):
            state, token_mask = probe.entries
            values[state.path] = (
                _stack_layers(site, states[site.leaf]) if site.leaf in states else jnp.zeros(state.shape)
            )
            values[token_mask.path] = jnp.broadcast_to(jnp.expand_dims(flat, site.match.stack), token_mask.shape)
        gradients = run(probes, values, batch)
        new = {site.leaf: _split_layers(site, gradients[paths.join(site.leaf, "state")]) for site in adapter_sites}
        raise_listed(
            AttachError,
            "forward's outputs do not depend on these layers, so their inputs were not observed. Return all of the"
            " model's outputs, or exclude the layers with exclude_modules:",
            [leaf for leaf, state in new.items() if not bool(jnp.all(state[:, -1, 0] > 0))],
        )
        return new

    return observe


def _split_layers(site: Site, state: Array) -> Array:
    """Return a leaf's statistic, stacked as the weight, as (layers, rows, in)."""
    stack = site.match.stack
    first = jnp.moveaxis(state, stack, range(len(stack)))
    return first.reshape(-1, *first.shape[-2:])


def _stack_layers(site: Site, state: Array) -> Array:
    """Return a statistic (layers, rows, in) stacked as the weight: the inverse of `_split_layers`."""
    layers = jnp.asarray(state).reshape(*site.stack_sizes, *state.shape[1:])
    return jnp.moveaxis(layers, range(len(site.match.stack)), site.match.stack)


def _probe(recipe: Recipe, site: Site, update: Update, rows: int, tokens: int) -> Site:
    shapes = {"state": (rows, site.fan_in), "mask": (1, tokens)}
    tensors = tuple(
        MethodTensor(name, f".{name}", ("k", "n"), (("k",), ("n",)), (("k", k), ("n", n)), scale_power=0)
        for name, (k, n) in shapes.items()
    )
    entries = tuple(plan.plan_entry(recipe.keymap, site.match, t, site.axis_sizes) for t in tensors)
    return dataclasses.replace(site, method=_Probe(), hparams=update, tensors=tensors, entries=entries)


def sum_outputs(out: Any) -> Array:
    """Return the sum of a model's outputs, which depends on all of them."""
    leaves = [x for x in jax.tree.leaves(out) if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.inexact)]
    return sum((jnp.sum(x.astype(jnp.float32)) for x in leaves), start=jnp.zeros(()))


def _run_nnx(model: Any, recipe: Recipe, forward: Any) -> Any:
    # One for each observer, because it keeps references of `forward`.
    gradient = attachment.adapter_gradient(lambda model, batch: sum_outputs(forward(model, batch)), _NAME, "state")

    def run(probes: Sequence[Site], values: Mapping[str, Array], batch: Any) -> dict[str, Array]:
        walk = graph.walk_model(model)
        before = tuple(walk.active)
        nnx_adapters.attach(model, recipe, probes, _NAME, values)
        try:
            return gradient(model, batch)[_NAME]
        finally:
            nnx_adapters.delete(model, _NAME)
            nnx_adapters.activate(walk, before)

    return run


def _run_linen(params: Any, adapter_sites: Sequence[Site], update: Update, forward: Any) -> Any:
    known = key_paths(params)

    def loss(values: Mapping[str, Array], params: Any, batch: Any) -> Array:
        overlay = Overlay({"params": params})
        for site in adapter_sites:
            tensors = {name: values[paths.join(site.leaf, name)] for name in ("state", "mask")}
            overlay.add(
                known[site.leaf], dataclasses.replace(site, method=_Probe(), hparams=update), (), _NAME, tensors, {}
            )
        with intercept(overlay):
            return sum_outputs(forward(overlay.module_variables()["params"], batch))

    gradient = jax.jit(jax.grad(loss))
    return lambda probes, values, batch: gradient(values, params, batch)


# ---------------------------------------------------------------- eva


_LIMIT = 1000  # batches; PEFT has no limit


class Settings(NamedTuple):
    """PEFT's `EvaConfig`."""

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True


def find_components(
    config: LoraConfig,
    adapter_sites: Sequence[Site],
    batches: Iterable[Any],
    watch: Callable[[Sequence[Site], Update, Mapping[str, int]], Observer],
    mask: Callable[[Any], Any] | None = None,
) -> tuple[LoraConfig, dict[str, Array]]:
    """Return the configuration with EVA's ranks, and {module: components (rank, in)}; rank 0 for some.

    Args:
        batches: at least one; iterated over several times if necessary.
        watch: makes an `Observer` of the given sites, as `make_observer` does.
        mask: selects the tokens of a batch that count; by default from its "attention_mask" and "labels", as in PEFT.

    Raises `AttachError` if the components do not converge.
    """
    settings = Settings(**kinds.init_settings(config, "eva_config", Settings._fields))
    batches = list(batches)
    if not batches:
        raise AttachError("EVA needs at least one batch: data has none")
    tokens = mask or (lambda batch: _token_mask(batch, settings))
    wanted = {m: config.rank_of(m) for site in adapter_sites for m in site.modules}
    observe_moments = watch(adapter_sites, moments, {site.leaf: 3 for site in adapter_sites})
    groups = _group_equal_inputs(adapter_sites, observe_moments({}, batches[0], tokens(batches[0])))
    most = {m: max(round(wanted[other] * settings.rho) for other in group) for group in groups.values() for m in group}
    group_sites = [site for site in adapter_sites if not groups.keys().isdisjoint(site.modules)]
    rows = _state_rows(group_sites, most)
    observe = watch(group_sites, components, rows)
    states = {
        site.leaf: np.zeros((math.prod(site.stack_sizes), rows[site.leaf], site.fan_in), "float32")
        for site in group_sites
    }
    found, ranks = _iterate(
        observe, batches, tokens, group_sites, states, groups, most, sum(wanted.values()), settings.tau
    )
    # PEFT whitens in place, so it whitens shared inputs once for each module. That error is not repeated here.
    chosen = {
        m: jnp.asarray(found[head][: ranks[m]] / (np.sqrt(found[head][-4, : ranks[m], None]) if settings.whiten else 1))
        for head, group in groups.items()
        for m in group
    }
    return _with_ranks(config, chosen, settings), chosen


def _state_rows(group_sites: Sequence[Site], most: Mapping[str, int]) -> dict[str, int]:
    """Return {leaf: rows of its state, for k components}; raise `ConfigError` for layers with fewer inputs than k."""
    k = {site.leaf: max(most[m] for m in site.modules) for site in group_sites}
    raise_listed(
        ConfigError,
        "r * rho exceeds the inputs of these layers; lower r or rho:",
        [
            f"{site.leaf}: {k[site.leaf]} components of {site.fan_in} inputs"
            for site in group_sites
            if k[site.leaf] > site.fan_in
        ],
    )
    return {leaf: count + 4 for leaf, count in k.items()}


def _iterate(
    observe: Observer,
    batches: Sequence[Any],
    tokens: Callable[[Any], Any],
    group_sites: Sequence[Site],
    states: dict[str, np.ndarray],
    groups: Mapping[str, Sequence[str]],
    most: Mapping[str, int],
    budget: int,
    tau: float,
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Observe batches until the components converge; return the state of each group and the rank of each module."""
    places = {m: (site.leaf, layer) for site in group_sites for m, layer in site.layers.items()}
    state_of = {m: states[places[m][0]][places[m][1]] for m in groups}  # parts of the same arrays
    converged = {m: np.zeros(most[m], bool) for m in groups}
    ranks = dict(most)
    for batch in itertools.islice(itertools.cycle(batches), _LIMIT):
        if all(state[-1, 1] > 0 for state in state_of.values()):
            ranks = _distribute_ranks(groups, most, budget, state_of)
        going_on = [m for m in groups if not converged[m][: ranks[m]].all()]
        if not going_on:
            return state_of, ranks
        after = jax.tree.map(np.asarray, observe(states, batch, tokens(batch)))
        raise_listed(
            AttachError,
            "EVA does not support a layer that runs several times in one call of the model; exclude these with"
            " exclude_modules:",
            [leaf for leaf, state in after.items() if state[:, -1, 0].max() > 1],
        )
        for module in going_on:
            leaf, layer = places[module]
            before, state = state_of[module], after[leaf][layer]
            if 0 < before[-1, 1] < state[-1, 1]:
                converged[module] = _cosines(before, state, most[module]) >= tau
            before[:] = state
    raise AttachError(f"EVA: the components did not converge after {_LIMIT} batches; use larger batches or a lower tau")


def _group_equal_inputs(adapter_sites: Sequence[Site], seen: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return {module: the modules with the same inputs, itself first}."""
    groups: dict[str, list[str]] = {}
    known: list[tuple[np.ndarray, str]] = []
    for site in adapter_sites:
        rows = np.asarray(seen[site.leaf])
        for module, layer in site.layers.items():
            head = next((m for other, m in known if _equal_inputs(rows[layer], other)), module)
            if head == module:
                known.append((rows[layer], module))
            groups.setdefault(head, []).append(module)
    return groups


def _equal_inputs(one: np.ndarray, other: np.ndarray) -> bool:
    """Return True if two statistics are equal up to the order of summation."""
    return one.shape == other.shape and np.allclose(one[:2], other[:2], rtol=1e-5, atol=1e-7 * abs(one[:2]).max())


def _cosines(before: np.ndarray, after: np.ndarray, k: int) -> np.ndarray:
    a, b = before[:k], after[:k]
    return (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-8)


def _distribute_ranks(
    groups: Mapping[str, Sequence[str]], most: Mapping[str, int], budget: int, states: Mapping[str, np.ndarray]
) -> dict[str, int]:
    """Distribute the budget to the components that explain the most variance; return {module: rank}."""
    # The share of the variance that each component explains, from its singular value, the variance and the tokens.
    explained = {m: x[-4, : most[m]] ** 2 / (x[-2].sum() * x[-1, 1]) for m, x in states.items()}
    head = {m: first for first, group in groups.items() for m in group}
    order = [*groups, *(m for first, group in groups.items() for m in group if m != first)]
    keys = [m for m in order for _ in range(most[m])]
    values = np.concatenate([explained[head[m]][: most[m]] for m in order])
    counts = dict.fromkeys(order, 0)
    for i in np.argsort(-values, kind="stable")[:budget]:
        counts[keys[i]] += 1
    for m in order[len(groups) :]:  # among modules with equal inputs the first gets the largest rank
        if counts[head[m]] < counts[m]:
            counts[head[m]], counts[m] = counts[m], counts[head[m]]
    return counts


def _token_mask(batch: Any, settings: Settings) -> Any:
    """Return the mask of tokens that are attended to and, with `use_label_mask`, have a label; None: all."""
    if not isinstance(batch, Mapping):
        return None
    masks = [np.asarray(batch["attention_mask"]) != 0] if "attention_mask" in batch else []
    if settings.use_label_mask and "labels" in batch:
        masks.append(np.asarray(batch["labels"]) != settings.label_mask_value)
    return np.logical_and.reduce(masks) if masks else None


def _with_ranks(config: LoraConfig, rows_by_module: Mapping[str, Array], settings: Settings) -> LoraConfig:
    """Return the configuration with EVA's ranks, as PEFT writes it: full module names, alphas as floats."""

    def alpha(module: str, new: int) -> float:
        old, r = config.alpha_of(module), config.rank_of(module)
        return old * (new / r) if new != r and settings.adjust_scaling_factors else old

    ranks = {module: len(rows) for module, rows in sorted(rows_by_module.items()) if len(rows)}
    alphas = {module: alpha(module, new) for module, new in ranks.items()}
    return config.replace(
        target_modules=list(ranks),
        rank_pattern={module: new for module, new in ranks.items() if new != config.r},
        alpha_pattern={module: new for module, new in alphas.items() if new != config.lora_alpha},
    )
