"""Adapters on Linen modules: a plain wrapper with `init` and `apply` as ever.

The adapter lives in a collection of its own, `{"params": base, "lora": {name: tree}}`. For a call its
leaves are laid into `params` beside the weight they adapt, so that the model's own scan, vmap and remat
carry them along, and an interceptor computes with them where the weight's module is called.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import zlib
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict, meta
from flax.core.scope import in_filter

from jaxadapt import methods
from jaxadapt.adapters import initial_values, selection
from jaxadapt.adapters import sites as bind
from jaxadapt.adapters.adapter import CONFIG_NODE, Adapter, Recipe, collection_name, is_array
from jaxadapt.arrays import quantized
from jaxadapt.configs import Config, matching
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, warn
from jaxadapt.keymaps.families import resolve_keymap
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.methods.lora import alora
from jaxadapt.models.linen import collections, survey
from jaxadapt.models.linen.interceptor import DROPOUT, SEP, Interceptor, LeafAdapter, UseRecorder

_KEPT = 64  # of what is remembered about earlier calls

# ---------------------------------------------------------------- the wrapper


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A Linen module with adapters: `init`, `apply` and `bind` as the module's own.

    Not itself an `nn.Module`: it is the outermost thing, and the module inside stays what it was.

    Args:
        module: the base module.
        adapters: `((name, config), …)`.
        active: the names applied by `apply`, in this order.
        keymap: a family's name, a `KeyMap`, or None to recognise it.
        dtype: of new adapter parameters; float32 by default.
        tokens: `{name: mask}` of the tokens that aLoRA adapters adapt; `jaxadapt.models.invoke` sets them.
        deterministic: whether the adapters' dropout (`lora_dropout`) is off. None: it is on in calls whose `rngs` have
            a stream "dropout". False: it is on, and a call without the stream is an error. True: it is off.

    `deterministic` is a field of the wrapper, and `clone` switches it. It is no argument of `apply`, because every
    argument of `apply` goes to the module, which may have a `deterministic` of its own:
    `model.clone(deterministic=True).apply(variables, x, deterministic=False)` turns off the adapters' dropout alone.
    """

    module: nn.Module
    adapters: tuple[tuple[str, Config], ...]
    active: tuple[str, ...]
    keymap: KeyMap | str | None = None
    dtype: Any = None
    tokens: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any], repr=False, compare=False)
    deterministic: bool | None = None
    # Signatures of calls known to read no adapted weight behind its module's back.
    _checked: set[Hashable] = dataclasses.field(default_factory=set[Hashable], init=False, repr=False, compare=False)
    # Holds "dropout" once a call has brought that stream or has warned of its absence. Clones share the set.
    _settled: set[str] = dataclasses.field(default_factory=set[str], repr=False, compare=False, kw_only=True)

    def clone(self, **changes: Any) -> Adapted:
        """Copy the wrapper with other values for some fields, as `nn.Module.clone` does.

        >>> import jaxadapt
        >>> config = jaxadapt.LoraConfig(r=2, target_modules=["layers_0"], lora_dropout=0.1)
        >>> model = jaxadapt.adapt(nn.Sequential([nn.Dense(2)]), config)
        >>> model.clone(deterministic=True).deterministic
        True
        """
        return dataclasses.replace(self, **changes)

    def __getattr__(self, name: str) -> Any:
        """Whatever the wrapper has not itself: the module's fields and methods, `apply(…, method=module.encode)`."""
        if name == "module" or name.startswith("__"):  # before a copy has its fields, and what Python asks for
            raise AttributeError(name)
        return getattr(self.module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise AttachError(
            "an adapted Linen module is called with apply(variables, …), and is no part of another module: adapt the"
            " outermost one, where target_modules may name this one's layers alone"
        )

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """`{"params": base, …, "lora": {name: tree}}`, the base bit for bit as the module's `init` gives it.

        Takes what the module's `init` takes. `rngs` may have a key for the collection ("lora"); else the
        adapter's initial values come from a fold of "params". Abstract under `jax.eval_shape`.

        Raises `TargetError`, `KeyMapError` or `AttachError` for what the configuration names and cannot have.
        """
        recipes = self._recipes(rngs, args, kwargs)
        return self._joined(recipes, rngs, self.module.init(rngs, *args, **kwargs))

    def init_with_output(self, rngs: Any, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """The output of the base (a fresh adapter does not change it) and the variables."""
        recipes = self._recipes(rngs, args, kwargs)
        y, variables = self.module.init_with_output(rngs, *args, **kwargs)
        return y, self._joined(recipes, rngs, variables)

    def _recipes(self, rngs: Any, args: Any, kwargs: Any) -> dict[str, tuple[Recipe, tuple[bind.Site, ...]]]:
        """What each adapter will be, from shapes alone: nothing is computed before everything fits."""
        found = survey.survey_module(self.module, rngs, args, kwargs)
        taken = found.collections & {collection_name(config) for _, config in self.adapters}
        if taken:
            raise AttachError(f"the module has a collection {sorted(taken)} of its own, where its adapter would go")
        keymap = resolve_keymap(self.keymap, found.shapes)
        lines = found.entries(keymap)
        table = keymap.with_entries(lines)
        out: dict[str, tuple[Recipe, tuple[bind.Site, ...]]] = {}
        for name, config in self.adapters:
            config = selection.resolve_config(config, table, found.shapes)
            found.check(config, table)
            bounds = selection.select_sites(config, table, found.shapes)
            found.check_saved([b.leaf for b in bounds if b.method.copies and b.hparams.because == "modules_to_save"])
            mine = {b.leaf for b in bounds}
            full = bind.with_copy_entries(keymap.with_entries(w for w in lines if w.leaf in mine), bounds)
            out[name] = Recipe(config, full), bounds
        return out

    def _joined(self, recipes: Mapping[str, Any], rngs: Any, variables: Mapping[str, Any]) -> dict[str, Any]:
        out = dict(variables)
        leaves = paths.flatten(variables.get("params", {}))
        base = {path: collections.unbox_tree(leaf) for path, leaf in leaves.items()}
        for name, (recipe, bounds) in recipes.items():
            key = _fresh_key(rngs, collection_name(recipe.config), name)
            where = collections.base_shardings(leaves)
            values = initial_values.init_values(recipe.config, bounds, key, self.dtype, base=base, where=where)
            adapter = Adapter(recipe.config, paths.unflatten(values), recipe.keymap)
            for held, tree in collections.boxed(adapter, leaves).named(name).items():
                out[held] = {**out.get(held, {}), **tree}
        return out

    def apply(self, variables: Mapping[str, Any], *args: Any, mutable: Any = False, **kwargs: Any) -> Any:
        """The module's `apply` with the active adapters; `rngs`, `method`, `mutable` and the rest as there.

        With `mutable` the adapters' collections are returned, unchanged, if it includes them. `lora_dropout`
        is on if `rngs` has a "dropout"; the field `deterministic` changes that. Of its absence a wrapper with
        `deterministic=None` warns once, if no earlier call has brought the stream.

        Raises `AttachError` if the variables lack an active adapter, have lost its configuration, or
        carry another than the wrapper's, if this call uses an adapted weight where no adapter can follow, or if
        `rngs` has a "dropout" that an adapted layer with dropout does not see (`split_rngs` of `nn.scan` says which).
        """
        overlay = self._overlay(variables, kwargs.get("rngs"))
        self._check(overlay, args, kwargs, mutable)
        with nn.intercept_methods(overlay.interceptor):
            out = self.module.apply(overlay.inner(), *args, mutable=mutable, **kwargs)
        if mutable is False:
            return out
        y, changed = out
        return y, overlay.without(changed, mutable)

    def bind(self, variables: Mapping[str, Any], *args: Any, **options: Any) -> BoundModule:
        """The module bound to these variables, for interactive use; `rngs` and `mutable` as there."""
        overlay = self._overlay(variables, options.get("rngs"))

        def check(method: str, args: Any, kwargs: Any) -> None:
            self._check(overlay, args, {**kwargs, "method": method, "rngs": options.get("rngs")}, True)

        return BoundModule(self.module.bind(overlay.inner(), *args, **options), overlay, check)

    def notes(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> dict[str, str]:
        """How each adapted weight is followed, `{leaf: note}`, seeing one abstract `apply`."""
        overlay = self.clone(deterministic=True)._overlay(variables, None)
        recorder = UseRecorder(overlay.interceptor.sites, overlay.interceptor.quantized_scopes)
        with nn.intercept_methods(recorder):
            jax.eval_shape(lambda: self.module.apply(overlay.inner(), *args, **kwargs))
        return recorder.notes

    def tabulate(self, rngs: Any, *args: Any, **kwargs: Any) -> str:
        """The base module's own table; `jaxadapt.summary` shows the adapter's."""
        return self.module.tabulate(rngs, *args, **kwargs)

    def _check_dropout(self, names: Collection[str], drops: bool) -> None:
        """Refuse, or warn once of, a call that trains without the dropout that these adapters have."""
        if drops:
            self._settled.add(DROPOUT)
        elif names and not self.deterministic:
            off = f'{", ".join(names)}: lora_dropout is off, since this call has no rngs={{"{DROPOUT}": key}}'
            if self.deterministic is False:
                raise AttachError(f"{off}, and deterministic=False asks for it; give the call that stream")
            if DROPOUT not in self._settled:
                self._settled.add(DROPOUT)
                warn(f"{off}; give it in training, and evaluate with model.clone(deterministic=True)")

    def _overlay(self, variables: Mapping[str, Any], rngs: Any) -> _Overlay:
        drops = not self.deterministic and isinstance(rngs, Mapping) and DROPOUT in rngs
        dropping: list[str] = []
        wanted = dict(self.adapters)
        names = {collection_name(config) for config in wanted.values()}
        names |= {c for c in methods.COLLECTIONS if _is_ours(variables.get(c))}
        held = {c: variables[c] for c in variables if c in names}
        base = {c: v for c, v in variables.items() if c not in names}
        extra: dict[tuple[str, ...], Any] = {}
        sites: dict[tuple[str, ...], dict[str, list[LeafAdapter]]] = {}
        replaced: dict[str, dict[str, methods.Method]] = {}
        known = key_paths(base.get("params", {})) if self.active else {}
        for order, name in enumerate(self.active):
            tree = held.get(collection_name(wanted[name]), {}).get(name)
            if tree is None:
                raise AttachError(
                    f"the variables hold no adapter {name!r} in {collection_name(wanted[name])!r};"
                    " make one with init, or load it"
                )
            # unbox puts the constraints of their boxes on them, as on the base's
            adapter = collections.read_collection(meta.unbox(tree), name)
            if adapter.config != _resolved_like(wanted[name], adapter.config):
                said = "" if name == "default" else f", name={name!r}"
                raise AttachError(
                    f"the adapter {name!r} carries another configuration than this wrapper's; wrap the module"
                    f" with its own: jaxadapt.adapt(module, jaxadapt.extract(variables{said}).config{said})"
                )
            values = adapter.sites
            missing = [leaf for leaf in values if leaf not in known]
            if missing:
                raise AttachError(
                    f"the adapter {name!r} adapts weights which the base parameters lack:\n" + paths.bullets(missing)
                )
            shapes = tuple(
                (leaf, tuple((t, tuple(a.shape)) for t, a in tensors.items())) for leaf, tensors in values.items()
            )
            for bound in _recovered(adapter.recipe, shapes):
                *path, leaf = known[bound.leaf]
                if bound.method.replaces:
                    replaced.setdefault(bound.leaf, {})[name] = bound.method
                    before = quantized.to_dense(survey.lookup(base["params"], known[bound.leaf]))
                    new = bind.map_stack(bound, lambda a, w: a.weight(w), values[bound.leaf], meta.unbox(before))
                    extra[known[bound.leaf]] = meta.replace_boxed(before, new)
                    continue
                dropping += [name] if bound.method.dropout(bound.hparams) and name not in dropping else []
                # The arithmetic is part of the name: a jit inside the model (nn.jit) traces anew for another.
                text = repr((order, bound.method.peft_type, bound.hparams, bound.axes, drops and name in dropping))
                mark = hashlib.sha256(text.encode()).hexdigest()[:12]
                keys = {tensor: f"{leaf}{SEP}{tensor}{SEP}{mark}" for tensor in values[bound.leaf]}
                extra |= {(*path, key): values[bound.leaf][tensor] for tensor, key in keys.items()}
                for what, number in bound.data.items():
                    keys[what] = f"{leaf}{SEP}{what}{SEP}{mark}"
                    extra[(*path, keys[what])] = _stacked(number, bound.match.stack)
                if name in self.tokens:
                    keys[alora.MASK] = f"{leaf}{SEP}{alora.MASK}{SEP}{mark}"
                    shape = collections.unbox_tree(survey.lookup(base["params"], known[bound.leaf])).shape
                    extra[(*path, keys[alora.MASK])] = alora.stacked(self.tokens[name], bound.match.stack, shape)
                site = LeafAdapter(bound.method, bound.hparams, bound.axes, keys)
                sites.setdefault(tuple(path), {}).setdefault(leaf, []).append(site)
        methods.refuse_rivals(replaced)
        self._check_dropout(dropping, drops)
        return _Overlay(base, held, extra, Interceptor(sites, _compressed(base.get("params", {})), drops))

    def _check(self, overlay: _Overlay, args: Any, kwargs: Any, mutable: Any) -> None:
        """Once for each kind of call: that it reads no adapted weight outside that weight's own module."""
        sites = overlay.interceptor.sites
        adapted = sorted((*path, leaf) for path, leaves in sites.items() for leaf in leaves)
        signature = _signature((overlay.base, adapted, args, kwargs, mutable))
        if not sites or signature in self._checked:
            return

        def run(params: Any, interceptor: Any) -> Any:
            with nn.intercept_methods(interceptor):
                out = self.module.apply({**overlay.base, "params": params}, *args, mutable=mutable, **kwargs)
            return out if mutable is False else out[0]

        params = overlay.base["params"]
        survey.check_reads(run, {path: list(leaves) for path, leaves in sites.items()}, params)
        self._warn_of_gaps(overlay, lambda: survey.called_scopes(run, params))
        if len(self._checked) >= _KEPT:
            self._checked.clear()
        self._checked.add(signature)

    def _warn_of_gaps(self, overlay: _Overlay, called: Callable[[], Collection[tuple[str, ...]]]) -> None:
        """An `init` whose call did not reach a layer makes no adapter for it; a later call may."""
        known = key_paths(overlay.base["params"])
        base = collections.unbox_tree(overlay.base["params"])
        shapes = {leaf: tuple(survey.lookup(base, path).shape) for leaf, path in known.items()}
        wanted = dict(self.adapters)
        for name in self.active:
            tree = overlay.held[collection_name(wanted[name])][name]
            adapter = collections.read_collection(meta.unbox(tree), name)
            lacking = selection.unselected_matrices(adapter.config, adapter.keymap, shapes, adapter.sites)
            reached = called() if lacking else ()
            used = [leaf for leaf in lacking if known[leaf][:-1] in reached]
            if used:
                warn(
                    f"this call uses weights that target_modules names and the adapter {name!r} lacks, so they stay the"
                    " base's: the init that made it did not reach them. One that does, or jaxadapt.init(config, params,"
                    f" key=…), makes it whole:\n{paths.bullets(used)}"
                )


@dataclasses.dataclass(frozen=True)
class _Overlay:
    """Variables taken apart: the base's, the adapters' collections, and what a call adds to `params`."""

    base: Mapping[str, Any]
    held: Mapping[str, Any]
    extra: Mapping[tuple[str, ...], Any]
    interceptor: Interceptor

    def inner(self) -> dict[str, Any]:
        if not self.extra:
            return dict(self.base)
        return {**self.base, "params": survey.overlay(self.base["params"], self.extra)}

    def without(self, changed: Mapping[str, Any], mutable: Any) -> Any:
        """Collections that a call returned, as the caller knows them."""
        out = dict(changed)
        if "params" in out and self.extra:
            own = {path: survey.lookup(self.base["params"], path) for path in self.extra if SEP not in path[-1]}
            out["params"] = survey.overlay(_pruned(out["params"]), own)
        out |= {c: tree for c, tree in self.held.items() if in_filter(mutable, c)}
        return FrozenDict(out) if isinstance(changed, FrozenDict) else out


def _pruned(tree: Mapping[str, Any]) -> dict[str, Any]:
    kept = {k: v for k, v in tree.items() if isinstance(v, Mapping) or SEP not in k}
    return {k: _pruned(v) if isinstance(v, Mapping) else v for k, v in kept.items()}


def _is_ours(collection: Any) -> bool:
    return isinstance(collection, Mapping) and any(
        isinstance(tree, Mapping) and CONFIG_NODE in tree for tree in collection.values()
    )


def key_paths(tree: Any, prefix: tuple[str, ...] = ()) -> dict[str, tuple[str, ...]]:
    """`{dotted path: keys}` of the leaves of a tree whose own keys may have dots."""
    out: dict[str, tuple[str, ...]] = {}
    for key, value in tree.items():
        path = (*prefix, key)
        out |= key_paths(value, path) if isinstance(value, Mapping) else {".".join(path): path}
    return out


def _compressed(tree: Any, path: tuple[str, ...] = ()) -> frozenset[tuple[str, ...]]:
    """The paths of the modules that hold quantised weights."""
    inside = [_compressed(v, (*path, k)) for k, v in tree.items() if isinstance(v, Mapping)]
    here = any(quantized.is_quantized(v) for v in tree.values())
    return frozenset({path} if here else ()).union(*inside)


_Shapes = tuple[tuple[str, tuple[tuple[str, tuple[int, ...]], ...]], ...]


@functools.lru_cache(maxsize=_KEPT)
def _recovered(recipe: Recipe, shapes: _Shapes) -> tuple[bind.Site, ...]:
    """The sites of an adapter; kept, since a model called outside jit asks at every call."""
    return bind.sites_from_shapes(recipe.config, recipe.keymap, {leaf: dict(tensors) for leaf, tensors in shapes})


def _signature(call: Any) -> Hashable:
    """What decides which code of the model runs: structure and plain arguments (not, we trust, shapes)."""
    leaves, tree = jax.tree.flatten(call)
    return tree, tuple(
        None if is_array(leaf) else leaf if isinstance(leaf, Hashable) else repr(leaf) for leaf in leaves
    )


def _stacked(x: Any, stack: Sequence[int]) -> Any:
    """An array of the stacked axes alone, with these where the weights have them: a scan cuts it alike."""
    shape = [1] * (max(stack) + 1)
    for axis, size in zip(stack, x.shape, strict=True):
        shape[axis] = size
    return jnp.asarray(x.reshape(shape))


def _fresh_key(rngs: Any, collection: str, name: str) -> Any:
    if isinstance(rngs, Mapping):
        rngs = rngs[collection] if collection in rngs else rngs.get("params", next(iter(rngs.values())))
    return jax.random.fold_in(rngs, zlib.crc32(f"{collection}.{name}".encode()))


def _resolved_like(mine: Config, theirs: Config) -> Config:
    """The wrapper's configuration as `init` would have resolved it ("all-linear", fan_in_fan_out)."""
    changes: dict[str, Any] = {}
    mine = matching.with_task_heads(mine)
    for name in ("target_modules", "feedforward_modules"):
        if mine.get(name) is None and name in mine.to_dict():
            changes[name] = theirs.get(name)
    if mine.get("fan_in_fan_out") is not None:
        changes["fan_in_fan_out"] = theirs.get("fan_in_fan_out")
    if str(mine.get("target_modules")).lower() == matching.ALL_LINEAR:
        names = changes["target_modules"] = theirs.get("target_modules")
        if isinstance(mine.get("feedforward_modules"), tuple):
            changes["feedforward_modules"] = [n for n in names if matching.is_feedforward(mine, n)]
    return mine.replace(**changes) if changes else mine


@dataclasses.dataclass(frozen=True)
class BoundModule:
    """A bound module whose calls, and whose submodules' calls, apply the adapters."""

    module: Any
    overlay: _Overlay
    check: Callable[[str, Any, Any], None] | None = None  # of the root: its submodules' calls are their own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(self.module, "__call__")(*args, **kwargs)

    @property
    def variables(self) -> Any:
        """The variables, the adapters' collections among them."""
        return self.overlay.without(self.module.variables, True)

    def unbind(self) -> tuple[nn.Module, Any]:
        """The module inside, unbound, and the variables."""
        module, variables = self.module.unbind()
        return module, self.overlay.without(variables, True)

    def __getattr__(self, name: str) -> Any:
        return self._wrapped(getattr(self.module, name), name)

    def _wrapped(self, value: Any, name: str = "") -> Any:
        if isinstance(value, nn.Module):
            return BoundModule(value, self.overlay)
        if type(value) in (list, tuple):
            return type(value)(self._wrapped(v) for v in value)
        if isinstance(value, Mapping):
            return {k: self._wrapped(v) for k, v in value.items()}
        return self._call(value, name) if callable(value) else value

    def _call(self, f: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.check is not None and name:
                self.check(name, args, kwargs)
            with nn.intercept_methods(self.overlay.interceptor):
                return f(*args, **kwargs)

        return call
