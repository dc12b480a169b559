"""Where training starts: the initialisations that look at the base, at data or at gradients, and the way back.

PiSSA, OLoRA, CorDA and LoRA-GA put a part of the base weights into the adapter and take it out of the base. So `start`
gives both, the adapter and the base it belongs to, and `for_original_base` turns what was trained into a plain LoRA for
the base as it was.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxadapt import attach, bind, eva, factors, merging, nnx, observing, paths, planning, products, sharding
from jaxadapt.adapter import Adapter, Recipe
from jaxadapt.configs import LoraConfig
from jaxadapt.errors import AttachError, ConfigError, MismatchError
from jaxadapt.factors import Factors
from jaxadapt.keymap import KeyMap

Array = Any
Rows = list[Factors]

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
    name: str = attach.DEFAULT,
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

    Together, adapter and base compute what the base did before. Which base that is:

    | `init_lora_weights` | the base | needs |
    |---|---|---|
    | true, "gaussian", "orthogonal", "eva" | stays | `key`; "eva": `batches` |
    | "pissa", "olora" | W − s·B·A | |
    | "pissa_niter_4" (any number) | W − s·B·A | `key` |
    | "corda" | W − s·B·A | `batches` |
    | "lora_ga" | W − s·B·A | `gradients`, `key` |

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
    if is_model and name in nnx.names(base):
        raise AttachError(f"there is an adapter {name!r} already; choose another name=, or delete it first")
    if key is None and rngs is not None:
        key = rngs.params()
    kind = _kind(config)
    given = {"batches": (batches, _FROM_DATA), "gradients": (gradients, ("lora_ga",)), "mask": (mask, ("eva",))}
    idle = [what for what, (value, kinds) in given.items() if value is not None and kind not in kinds]
    lost = [what for what, (value, kinds) in given.items() if value is None and kind in kinds and what != "mask"]
    if key is None and kind in ("", "pissa_niter", "orthogonal", "lora_ga"):
        lost.append("key")
    if idle or lost:
        problems = [f"{what} has no effect" for what in idle] + [f"{what} is needed" for what in lost]
        raise AttachError(f"init_lora_weights={config.init_lora_weights!r}: " + ", ".join(problems))

    def plan(config: LoraConfig) -> tuple[Recipe, tuple[bind.Bound, ...]]:
        if is_model:
            return planning.on_model(base, config, keymap, stack_axes, example)
        return planning.on_tree(base, config, keymap)

    weights = planning.base_of(base)
    recipe, bounds = plan(config)
    begin = _Beginning(kind, recipe, bounds, weights, key)
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
    adapter, new = begin.assembled(made, dtype, planning.placement(base))
    if is_model:
        merging.replaced(base, new)
        nnx.attach(base, adapter.recipe, begin.bounds, name, adapter.flat(), rngs)
        return Started(base, jax.tree.map(lambda x: jnp.array(x, copy=True), adapter))
    return Started(merging.replaced(base, new) if new else base, adapter)


def for_original_base(trained: Any, first: Adapter, name: str = attach.DEFAULT) -> Adapter:
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
    >>> residual, first = start(config, params)
    >>> plain = for_original_base(first, first)
    >>> plain.config.r, plain.config.init_lora_weights
    (4, True)
    >>> bool(np.allclose(jaxadapt.merge(params, plain)["q"]["kernel"], params["q"]["kernel"], atol=1e-4))
    True
    """
    adapter = attach.extract(trained, name)
    config = adapter.config
    why = products.not_a_product(config)
    if why or not isinstance(config, LoraConfig):
        raise ConfigError("the change since the start is no product of two matrices: " + "; ".join(why))
    if config.use_rslora and (config.rank_pattern or config.alpha_pattern):
        raise ConfigError(
            "use_rslora with rank_pattern or alpha_pattern: no patterns of a doubled rank have the same scales (PEFT"
            " refuses it too); jaxadapt.to_lora((original, merged), r) approximates the change"
        )
    now, then = adapter.flat(), first.flat()
    differ = [p for p in now.keys() | then.keys() if p not in now or p not in then or now[p].shape != then[p].shape]
    if differ or config != first.config:
        raise MismatchError(
            "the adapter at the start is not of the same shapes and configuration"
            + ("; they differ at:\n" + paths.listing(sorted(differ)) if differ else "")
        )
    shapes = {leaf: {t: tuple(x.shape) for t, x in ts.items()} for leaf, ts in adapter.sites.items()}
    out: dict[str, Array] = {}
    for bound in bind.recover(config, adapter.keymap, shapes):
        for tensor, entry in zip(bound.tensors, bound.entries, strict=True):
            old = -then[entry.path] if tensor.name in bound.method.scaled else then[entry.path]
            out[entry.path] = jnp.concatenate([now[entry.path], old], entry.form.left.index("~r"))
    doubled = config.replace(
        r=2 * config.r,
        lora_alpha=config.lora_alpha * math.sqrt(2) if config.use_rslora else 2 * config.lora_alpha,
        rank_pattern={pattern: 2 * r for pattern, r in config.rank_pattern.items()},
        alpha_pattern={pattern: 2 * alpha for pattern, alpha in config.alpha_pattern.items()},
        init_lora_weights=True, eva_config=None, corda_config=None, lora_ga_config=None, loftq_config={},
    )  # fmt: skip
    return Adapter(doubled, paths.unflatten(out), adapter.keymap)


def residual(recipe: Recipe, bounds: Sequence[bind.Bound], weights: Mapping[str, Array]) -> dict[str, Array]:
    """`{leaf: array}`: the base weights as PEFT leaves them when it loads an adapter with such a configuration.

    Raises `ConfigError` where PEFT does not get them back either.
    """
    config: Any = recipe.config
    kind = _kind(config)
    why = {
        "pissa_niter": "a randomised SVD, which is another one in each run",
        "corda": "the data it was made with",
        "lora_ga": "the gradients it was made with",
    }.get(kind)
    if why is not None:
        raise ConfigError(
            f"init_lora_weights={config.init_lora_weights!r}: what it took out of the base weights depends on {why}"
            " (and PEFT's own load does not find them either). Load onto the base that was left, with"
            " base='changed', or convert the adapter where it was trained: for_original_base, in PEFT"
            " path_initial_model_for_weight_conversion"
        )
    begin = _Beginning(kind, recipe, bounds, weights, None)
    return begin.assembled({b.leaf: begin.rows(b) for b in begin.pairs}, None, {})[1]


# ---------------------------------------------------------------- the kinds


def _kind(config: LoraConfig) -> str:
    """The initialisation, "" for those that need nothing but random numbers."""
    init = config.init_lora_weights
    if not isinstance(init, str) or init.lower() == "gaussian":
        return ""
    kind = "pissa_niter" if init.startswith("pissa_niter_") else init.lower()
    if kind not in ("pissa", "pissa_niter", "olora", "orthogonal", "eva", "corda", "lora_ga"):
        raise ConfigError(f"init_lora_weights={init!r} {_NOT_HERE[kind]}")
    return kind


_NOT_HERE = {
    "loftq": "quantises the base weights by bitsandbytes' rules, on a GPU; it is not built here",
    "mica": "trains A alone and keeps B from changing, which is not built here",
}


@dataclasses.dataclass(frozen=True)
class _Beginning:
    """The sites of an adapter that is to begin in one of these ways."""

    kind: str
    recipe: Recipe
    bounds: tuple[bind.Bound, ...] | Sequence[bind.Bound]
    weights: Mapping[str, Array]
    key: Any

    def __post_init__(self) -> None:
        problems: list[str] = []
        for b in self.bounds if self.kind else ():
            if not b.method.replaces and self.kind != "lora_ga" and not _has_matrices(b):
                problems.append(f"{b.leaf}: PEFT begins embeddings, convolutions and the like in no such way")
        problems += [f"{b.leaf}: {why}" for b in self.pairs if self.kind for why in self._obstacles(b)]
        if problems:
            init = getattr(self.recipe.config, "init_lora_weights", None)
            raise ConfigError(f"init_lora_weights={init!r} is not to be had here:\n" + paths.listing(problems))

    def _obstacles(self, b: bind.Bound) -> list[str]:
        r, leaf = _rank(b), self.weights[b.leaf]
        if isinstance(leaf, jax.ShapeDtypeStruct | Tracer):
            return ["its values are needed, and only its shape is here"]
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return [f"its values are of dtype {leaf.dtype}"]
        outs, inns = products.sizes(b)
        most = min(outs, inns) // (2 if self.kind == "lora_ga" else 1)
        if self.kind == "orthogonal":
            return [f"the rank has to be even, and is {r}"] if r % 2 else []
        if self.kind == "olora" and b.site.weight.fan_in_fan_out:
            return ["PEFT decomposes a Conv1D's weight the wrong way round, and its layer then fails or is another one"]
        return [f"of {outs} x {inns} numbers, rank {r} (at most {most} here)"] if r > most else []

    @property
    def pairs(self) -> list[bind.Bound]:
        """The sites whose A and B are more than random numbers, with these two alone."""
        return [_pair(b) for b in self.bounds if _has_matrices(b)]

    def matrices(self, b: bind.Bound) -> Array:
        """The weights of a site, (modules, out, in) in float32."""
        return products.weight_rows(self.recipe.keymap, b, products.wide(jnp.asarray(self.weights[b.leaf])))

    def keys(self, b: bind.Bound, count: int) -> Array:
        return jax.random.split(jax.random.fold_in(self.key, zlib.crc32(b.leaf.encode())), count)

    def rows(self, b: bind.Bound) -> Rows:
        """The factors that need the weights alone."""
        w, r, s = self.matrices(b), _rank(b), b.static.scale
        if self.kind == "pissa":
            return [factors.pissa(one, r, s) for one in w]
        if self.kind == "olora":
            return [factors.olora(one, r) for one in w]
        keys = self.keys(b, len(w))
        if self.kind == "pissa_niter":
            steps = int(str(self.recipe.config.get("init_lora_weights")).rpartition("_")[2])
            shape = (min(w.shape[1:]), r)
            omegas = [jax.random.normal(k, shape) for k in keys]
            return [factors.pissa_fast(x, r, s, steps, omega) for x, omega in zip(w, omegas, strict=True)]
        _, out, inn = w.shape
        dtype = self.weights[b.leaf].dtype
        shapes = ((r, r), (inn, r // 2), (r // 2, out))
        drawn = [map(jax.random.normal, jax.random.split(key, 3), shapes) for key in keys]
        return [Factors(*(x.astype(dtype) for x in factors.orthogonal(*d))) for d in drawn]

    def corda(self, b: bind.Bound, covariances: Mapping[str, Array]) -> Rows:
        given: Any = self.recipe.config.get("corda_config") or {}
        method = given.get("corda_method", "ipm")
        if method not in ("ipm", "kpm"):
            raise ConfigError(f"corda_config: corda_method: expected 'ipm' or 'kpm', found {method!r}")
        r, s, names = _rank(b), b.static.scale, products.modules(b, self.recipe.keymap)
        try:
            pairs = zip(names, self.matrices(b), strict=True)
            return [factors.corda(w, covariances[m], r, s, method == "kpm") for m, w in pairs]
        except AttachError as error:
            raise AttachError(f"{b.leaf}: {error}") from error

    def lora_ga(self, b: bind.Bound, gradients: Mapping[str, Array]) -> Rows:
        how = factors.Gradient(**_settings(self.recipe.config, "lora_ga_config", factors.Gradient._fields))
        if how.direction not in factors.GA_DIRECTIONS or how.scale not in factors.GA_SCALES:
            raise ConfigError(
                f"lora_ga_config: expected a direction of {factors.GA_DIRECTIONS} and a scale of {factors.GA_SCALES},"
                f" found {how.direction!r} and {how.scale!r}"
            )
        leaf = self.weights[b.leaf]
        slope = gradients.get(b.leaf)
        if slope is None or tuple(slope.shape) != tuple(leaf.shape):
            found = "none" if slope is None else f"one of shape {tuple(slope.shape)}"
            raise MismatchError(f"gradients: for {b.leaf} {tuple(leaf.shape)} there is {found}")
        table = self.recipe.keymap
        # The leaf is PyTorch's weight times a factor, so PyTorch's gradient is the leaf's times that factor.
        rows = products.weight_rows(table, b, products.wide(jnp.asarray(slope)), scaled=False)
        rows = rows * products.factor(table, b, leaf.shape)
        w = self.matrices(b)
        # For a Conv1D PEFT takes the first axis of what it stores, which there is the input's.
        wide = w.shape[2] if b.site.weight.fan_in_fan_out else w.shape[1]
        keys = self.keys(b, len(w))
        return [
            factors.lora_ga(x, g, _rank(b), b.static.scale, how, wide, leaf.dtype, k)
            for x, g, k in zip(w, rows, keys, strict=True)
        ]

    def assembled(
        self, made: Mapping[str, Rows], dtype: Any, where: Mapping[str, Any]
    ) -> tuple[Adapter, dict[str, Any]]:
        """The adapter with these factors at its sites, and the base weights that it changes."""
        config: Any = self.recipe.config
        plain = config.replace(init_lora_weights=True if self.kind else config.init_lora_weights)
        key = jax.random.key(0) if self.key is None else self.key  # (then everything drawn is replaced below)
        values = bind.fresh(plain, self.bounds, key, dtype, base=self.weights, where=where)
        mine = [b for b in self.pairs if b.leaf in made]
        new: dict[str, Array] = {}
        for b in mine:
            a, bb = (jnp.stack([getattr(f, side) for f in made[b.leaf]]) for side in "ab")
            new |= products.placed(b, a, bb)[1]
        kind = jnp.dtype(jnp.float32 if dtype is None else dtype)
        values |= sharding.placed({p: x.astype(kind) for p, x in new.items()}, sharding.for_adapter(mine, dict(where)))
        base: dict[str, Any] = {}
        if products.changes_the_base(config):
            pairs = paths.unflatten({p: values[p] for p in new})
            taken = Adapter(plain.replace(use_dora=False), pairs, self.recipe.keymap)
            with jax.default_matmul_precision("highest"):
                changes = merging.changes(self.weights, taken, lambda a, w: a.unweight(w), lambda a, x: x)
                base = {leaf: changed.value() for leaf, changed in changes.items()}
        for b in (b for b in self.bounds if b.leaf in made):
            derived = [t.name for t in b.tensors if t.from_base]  # the magnitudes of DoRA, of what they start from
            if derived:
                pair = {t.name: values[paths.join(b.leaf, t.name)] for t in b.tensors if not t.from_base}
                w = jnp.asarray(base.get(b.leaf, self.weights[b.leaf]))
                found = bind.over_stack(b, lambda a, w: a.from_base(w), pair, w)
                for name in derived:
                    at = paths.join(b.leaf, name)
                    values[at] = found[name].astype(values[at].dtype)
        return Adapter(config, paths.unflatten(values), self.recipe.keymap), base


def _pair(b: bind.Bound) -> bind.Bound:
    """A site without what follows from A, B and the base (DoRA's magnitudes)."""
    kept = [(t, e) for t, e in zip(b.tensors, b.entries, strict=True) if not t.from_base]
    tensors, entries = zip(*kept, strict=True) if kept else ((), ())
    return dataclasses.replace(b, tensors=tensors, entries=entries)


def _has_matrices(b: bind.Bound) -> bool:
    return not b.method.replaces and b.site.weight.kind == "linear" and products.is_pair(_pair(b))


def _rank(b: bind.Bound) -> int:
    return dict(b.tensors[0].own)["r"]


def _settings(config: Any, field: str, known: Iterable[str]) -> dict[str, Any]:
    given: Mapping[str, Any] = config.get(field) or {}
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ConfigError(f"{field}: unknown {', '.join(unknown)}; known are {', '.join(known)}")
    return dict(given)


def _leaves(tree: Any) -> dict[str, Any]:
    """`{path: array}` of gradients, however they are held."""
    if isinstance(tree, nnx.nnx.Module):
        return planning.base_of(tree)
    return {p: x for p, x in merging.leaves(tree).items() if x is not None}


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


def _covariances(begin: _Beginning, base: Any, batches: Any, forward: Any) -> dict[str, dict[str, Array]]:
    """`{leaf: {module: (in, in)}}`, averaged over the calls."""
    statistics = {b.leaf: observing.Statistic(observing.gram, b.fan_in + 1) for b in begin.pairs}
    observe = observing.observer(base, begin.recipe, begin.pairs, statistics, forward)
    sums: dict[str, Array] = {}
    for batch in batches:
        found = observe({}, batch)
        sums = {leaf: sums[leaf] + x if sums else x for leaf, x in found.items()}
    if not sums:
        raise AttachError("CorDA needs batches=, and there is none")
    out: dict[str, dict[str, Array]] = {}
    for b in begin.pairs:
        rows = observing.layers(b, sums[b.leaf])
        per = len(b.modules) // len(rows)
        out[b.leaf] = {m: rows[i // per, :-1] / rows[i // per, -1, 0] for i, m in enumerate(b.modules)}
    return out


def _eva(
    plan: Any, begin: _Beginning, base: Any, batches: Any, forward: Any, mask: Any
) -> tuple[Recipe, tuple[bind.Bound, ...], dict[str, Array]]:
    """The configuration with the ranks that the data ask for, bound anew, and A for each module."""
    config: Any = begin.recipe.config
    fields = [f.name for f in dataclasses.fields(eva.Settings)]
    settings = eva.Settings(**_settings(config, "eva_config", fields))

    def watch(bounds: Sequence[bind.Bound], statistics: Any) -> observing.Observer:
        return observing.observer(base, begin.recipe, bounds, statistics, forward)

    found = eva.components(config, begin.pairs, batches, watch, settings, mask)
    recipe, bounds = plan(eva.redistributed(config, found, settings))
    return recipe, bounds, {m: jnp.asarray(x) for m, x in found.items()}


def _eva_rows(b: bind.Bound, table: KeyMap, found: Mapping[str, Array]) -> Rows:
    out = products.sizes(b)[0]
    return [Factors(found[m], jnp.zeros((out, len(found[m])))) for m in products.modules(b, table)]
