"""What flows into a model's layers, seen while it runs on data: for initialisations that begin from activations.

A probe at each site holds a statistic as if it were a parameter, changes no output, and hands back the new statistic
as that parameter's gradient. So the statistics are computed on the device, inside the model's own scan, jit and
remat, in NNX and Linen alike, at the price of one backward pass.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxadapt.adapters import sites as bind
from jaxadapt.adapters.adapter import Recipe
from jaxadapt.arrays.axes import Operation, Use
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError
from jaxadapt.initializers import decompositions
from jaxadapt.keymaps import plan
from jaxadapt.keymaps.tensor_spec import MethodTensor
from jaxadapt.methods import Method
from jaxadapt.methods.base import Array, Drop, Params
from jaxadapt.models.linen import survey, wrapper
from jaxadapt.models.linen.interceptor import SEP, Interceptor, LeafAdapter
from jaxadapt.models.nnx import attach

Update = Callable[[Array, Array, Array], Array]
"""`(state, inputs (tokens, in) in float32, mask (tokens,)) -> state` of one call."""

_NAME = "~observed"


@dataclasses.dataclass(frozen=True)
class Statistic:
    """A matrix (rows, in) that is kept of a layer's inputs; its last row counts the calls, at its first entry."""

    update: Update
    rows: int


class _Probe(Method):
    """Watches; its static value is a `Statistic`'s update.

    No configuration asks for it and nothing is bound to it, so it has no tensors, statics or fresh values of its own.
    """

    peft_type = "LORA"

    def check(self, config: Any) -> None: ...

    def tensors(self, config: Any, site: Any, modules: Any) -> Any:
        raise NotImplementedError

    def hparams(self, config: Any, site: Any, modules: Any) -> Any:
        raise NotImplementedError

    def fresh(self, config: Any, tensor: Any, fan_in: int) -> Any:
        raise NotImplementedError

    def output(
        self, static: Update, params: Params, use: Use | Operation, x: Array, y: Array, drop: Drop | None, w: Array
    ) -> Array:
        if not isinstance(use, Use) or use.transposed:
            return y  # a tied head: in PEFT another module
        if set(use.letters("batch")) & set(use.x):
            raise AttachError("its inputs differ from matrix to matrix (experts): no one covariance is theirs")
        inputs = use.letters("in")
        others = [i for i, letter in enumerate(use.x) if letter not in inputs]
        lead = tuple(x.shape[i] for i in others)
        flat = x.transpose([*others, *map(use.x.index, inputs)]).reshape(-1, params["state"].shape[-1])
        mask = params["mask"]
        if mask.shape[-1] not in (1, len(flat)):
            raise AttachError(f"its inputs {lead} are not of the mask's size, {mask.shape[-1]}")
        return _seen(static, params["state"], flat.astype(jnp.float32), jnp.broadcast_to(mask[0], len(flat)), y)

    def weight(self, static: Any, params: Params, axes: Any, w: Array) -> Array:
        raise AttachError("its weight is used in a way in which its inputs cannot be seen; leave the layer out")

    unweight = weight


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _seen(update: Update, state: Array, x: Array, mask: Array, y: Array) -> Array:
    return y


def _seen_forward(update: Update, state: Array, x: Array, mask: Array, y: Array) -> tuple[Array, Any]:
    return y, (state, x, mask)


def _seen_backward(update: Update, kept: Any, given: Array) -> tuple[Array, Array, Array, Array]:
    state, x, mask = kept
    with jax.default_matmul_precision("highest"):
        return update(state, x, mask), jnp.zeros_like(x), jnp.zeros_like(mask), given


_seen.defvjp(_seen_forward, _seen_backward)


def gram(state: Array, x: Array, mask: Array) -> Array:
    """The sum of xᵀ·x, x over its largest entry, as CorDA has it: (in + 1, in), the last row counting calls."""
    x = x / jnp.abs(jnp.max(x))
    return jnp.concatenate([x.T @ x, jnp.zeros_like(state[:1]).at[0, 0].set(1)])


def moments(state: Array, x: Array, mask: Array) -> Array:
    """Mean, variance, and in the last row calls and tokens: two layers of the same inputs have the same."""
    count, mean, variance = _moments(x, mask)
    return jnp.stack([mean, variance, jnp.zeros_like(mean).at[:2].set(jnp.array([1, count]))])


def _moments(x: Array, mask: Array) -> tuple[Array, Array, Array]:
    count = jnp.sum(mask)
    mean = mask @ x / jnp.maximum(count, 1)
    return count, mean, mask @ (x - mean[None]) ** 2 / jnp.maximum(count, 1)


@dataclasses.dataclass(frozen=True)
class Components:
    """One step of incremental PCA, as PEFT's `utils/incremental_pca.py` does it.

    The state is `k` components, then singular values, mean, variance, and (calls, tokens seen). With fewer tokens than
    components nothing is learnt, as in PEFT.
    """

    k: int

    def __call__(self, state: Array, x: Array, mask: Array) -> Array:
        k, width = self.k, state.shape[-1]
        old, sigma, mean, variance, seen = state[:k], state[k, :k], state[k + 1], state[k + 2], state[-1, 1]
        count, here, spread = _moments(x, mask)
        total = jnp.maximum(seen + count, 1)
        new_mean = (seen * mean + count * here) / total
        new_variance = (seen * variance + count * spread + seen * count / total * (mean - here) ** 2) / total
        shift = jnp.sqrt(seen / total * count) * (mean - here)
        rows = jnp.concatenate([sigma[:, None] * old, (x - here[None]) * mask[:, None], shift[None]])
        q = min(2 * k, *rows.shape)
        omega = jax.random.normal(jax.random.key(42), (min(rows.shape), q))
        _, found, v = decompositions.svd_lowrank(rows, 4, omega)
        v = v * jnp.sign(jnp.take_along_axis(v, jnp.argmax(jnp.abs(v), 1)[:, None], 1))
        wide = jnp.zeros(width)
        info = wide.at[0].set(1).at[1].set(seen + count)
        rest = jnp.stack([wide.at[:k].set(found[:k]), new_mean, new_variance, info])
        return jnp.where(count < k, state.at[-1, 0].set(1), jnp.concatenate([v[:k], rest]))


# ---------------------------------------------------------------- running a model with probes


Observer = Callable[..., dict[str, Array]]


def make_observer(
    base: Any,
    recipe: Recipe,
    bounds: Sequence[bind.Site],
    statistics: Mapping[str, Statistic],
    forward: Callable[[Any, Any], Any],
) -> Observer:
    """`observe(states, batch, mask=None)`: the statistics after one batch, `{leaf: (…, rows, in)}`, stacked as weights.

    `states` are those so far (a leaf without one begins with zeros), `mask` says which tokens count, in the shape of
    the layers' inputs without their last axis.

    Args:
        base: an NNX model, which stays as it is, or Linen's base parameters.
        statistics: what to keep of each leaf's inputs.
        forward: `forward(base, batch)`; what it returns has to depend on all these layers.
    """
    is_model = isinstance(base, attach.nnx.Module)
    run = _run_nnx(base, recipe, forward) if is_model else _run_linen(base, bounds, statistics, forward)

    def observe(states: Mapping[str, Array], batch: Any, mask: Array | None = None) -> dict[str, Array]:
        flat = jnp.ones((1, 1)) if mask is None else jnp.asarray(mask, jnp.float32).reshape(1, -1)
        probes = [_probe(recipe, b, statistics[b.leaf], flat.size) for b in bounds]
        values: dict[str, Array] = {}
        for bound, probe in zip(bounds, probes, strict=True):
            state, over = probe.entries
            values[state.path] = states.get(bound.leaf, jnp.zeros(state.shape))
            values[over.path] = jnp.broadcast_to(jnp.expand_dims(flat, bound.match.stack), over.shape)
        found = run(probes, values, batch)
        new = {b.leaf: found[paths.join(b.leaf, "state")] for b in bounds}
        _check_calls(bounds, new)
        return new

    return observe


def _check_calls(bounds: Sequence[bind.Site], new: Mapping[str, Array]) -> None:
    """Raise where a layer did not take part, and so has learnt nothing."""
    idle = [b.leaf for b in bounds if not bool(jnp.all(split_layers(b, new[b.leaf])[:, -1, 0] > 0))]
    if idle:
        raise AttachError(
            "what forward returns does not depend on these layers, so their inputs were not seen; let it return all the"
            " model's outputs, or leave them out with exclude_modules:\n" + paths.bullets(idle)
        )


def split_layers(bound: bind.Site, state: Array) -> Array:
    """A leaf's statistic as (layers, rows, in)."""
    stack = bound.match.stack
    first = jnp.moveaxis(state, stack, range(len(stack)))
    return first.reshape(-1, *first.shape[-2:])


def stack_layers(bound: bind.Site, rows: Array) -> Array:
    """The inverse of `split_layers`, for leaves that stack on one axis or none."""
    stack = bound.match.stack
    return jnp.asarray(rows[0]) if not stack else jnp.moveaxis(jnp.asarray(rows), 0, stack[0])


def _probe(recipe: Recipe, bound: bind.Site, statistic: Statistic, tokens: int) -> bind.Site:
    sizes = {name: n for e in bound.entries for name, n in zip(e.form.left, e.form.shape, strict=True)}
    own = {"state": (statistic.rows, bound.fan_in), "mask": (1, tokens)}
    tensors = tuple(
        MethodTensor(name, f".{name}", ("k", "n"), (("k",), ("n",)), (("k", k), ("n", n)), scale_power=0)
        for name, (k, n) in own.items()
    )
    entries = tuple(plan.plan_entry(recipe.keymap, bound.match, t, sizes) for t in tensors)
    return dataclasses.replace(bound, method=_Probe(), hparams=statistic.update, tensors=tensors, entries=entries)


def sum_outputs(out: Any) -> Array:
    """Something that depends on everything a model returned."""
    leaves = [x for x in jax.tree.leaves(out) if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.inexact)]
    return sum((jnp.sum(x.astype(jnp.float32)) for x in leaves), start=jnp.zeros(()))


def _run_nnx(model: Any, recipe: Recipe, forward: Any) -> Any:
    def gradient(graphdef: Any, states: Any, rest: Any, batch: Any) -> Any:
        def loss(states: Any) -> Array:
            mine = jax.tree.map(lambda x: x, rest)  # variables belong to the trace they are made in
            return sum_outputs(forward(attach.nnx.merge(graphdef, states, mine), batch))

        return jax.grad(loss)(states)

    jitted = jax.jit(gradient, static_argnums=0)  # one of this run: it keeps what `forward` holds

    def run(probes: Sequence[bind.Site], values: Mapping[str, Array], batch: Any) -> dict[str, Array]:
        before = attach.active_names(model)
        attach.attach(model, recipe, probes, _NAME, values)
        try:
            grads = jitted(*attach.nnx.split(model, _is_state, ...), batch)
            return {path: var.get_value() for path, var in attach.adapter_variables(grads)[_NAME].items()}
        finally:
            attach.delete(model, _NAME)
            attach.activate(model, before)

    return run


def _is_state(path: Sequence[Any], value: Any) -> bool:
    return isinstance(value, attach.AdapterParam) and path[-1] == "state" and _NAME in path


def _run_linen(params: Any, bounds: Sequence[bind.Site], statistics: Mapping[str, Statistic], forward: Any) -> Any:
    known = wrapper.key_paths(params)
    sites: dict[tuple[str, ...], dict[str, list[LeafAdapter]]] = {}
    where: dict[str, tuple[str, ...]] = {}
    for bound in bounds:
        *path, leaf = known[bound.leaf]
        keys = {name: f"{leaf}{SEP}{name}{SEP}observed" for name in ("state", "mask")}
        site = LeafAdapter(_Probe(), statistics[bound.leaf].update, bound.axes, keys)
        sites.setdefault(tuple(path), {})[leaf] = [site]
        where |= {paths.join(bound.leaf, name): (*path, key) for name, key in keys.items()}

    def loss(states: Mapping[str, Array], masks: Mapping[str, Array], params: Any, batch: Any) -> Array:
        inner = survey.overlay(params, {where[path]: x for path, x in {**masks, **states}.items()})
        with wrapper.nn.intercept_methods(Interceptor(sites)):
            return sum_outputs(forward(inner, batch))

    gradient = jax.jit(jax.grad(loss))

    def run(probes: Sequence[bind.Site], values: Mapping[str, Array], batch: Any) -> dict[str, Array]:
        states = {path: x for path, x in values.items() if path.endswith(".state")}
        masks = {path: x for path, x in values.items() if path not in states}
        return gradient(states, masks, params, batch)

    return run
