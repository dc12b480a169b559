"""One call of a Linen model with adapters.

The adapters' tensors are added to `params` beside the weights that they adapt, and so are those of the rows of a batch.
An interceptor of method calls applies them, and dequantizes weights. The call of the outermost module adds the virtual
tokens of a prompt method.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from flax.core import FrozenDict, meta, unfreeze
from flax.core.scope import Scope, in_filter, subtract_filters

from jaxadapt.adapters.adapter import (
    CONFIG_NODE,
    Adapter,
    Site,
    collection_name,
    integers_name,
    map_stack,
)
from jaxadapt.adapters.sites import sites_of
from jaxadapt.arrays import quantized
from jaxadapt.configs import matching
from jaxadapt.configs.base import Config
from jaxadapt.configs.prompts import PromptLearningConfig
from jaxadapt.configs.table import FACTS
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, raise_listed
from jaxadapt.methods.applied import (
    Applicable,
    AppliedMethod,
    apply_rows,
    together,
)
from jaxadapt.methods.base import Drop, get_method
from jaxadapt.methods.prompt import BaseSizes
from jaxadapt.models import attention_calls, call, prompts, trees

SEP = "~"  # marks the names of leaves that are added to `params` for one call and never stored
DROPOUT = "dropout"  # the random stream that `flax.linen.Dropout` uses

# ---------------------------------------------------------------- intercepted calls


def is_own_method(context: Any) -> bool:
    """Return True if the call is of a method of a bound module's class, other than `setup`.

    A function that `nn.scan`, `nn.cond` … runs on the module's scope is not a method; the calls in it are intercepted.
    """
    return (
        context.method_name != "setup"
        and context.module.scope is not None
        and any(context.method_name in vars(c) for c in type(context.module).__mro__)
    )


def refuse_mapped(context: Any, adapted: Mapping[tuple[str, ...], Iterable[str]]) -> None:
    """Raise `AttachError` if a module with adapted leaves is called with transformed variables (`nn.map_variables`)."""
    module = context.module
    if isinstance(module, nn.WeightNorm | nn.SpectralNorm):
        inner = module.layer_instance.scope
        mapped = [path for path in adapted if inner is not None and path[: len(inner.path)] == inner.path]
    else:
        mapped = [module.scope.path] if is_mapped(module.scope) and module.scope.path in adapted else []
    if leaves := [".".join((*path, leaf)) for path in mapped for leaf in adapted[path]]:
        raise AttachError(f"{', '.join(leaves)}: {MAPPED}. Exclude the layer with exclude_modules")


MAPPED = (
    "its weight passes through nn.map_variables (which nn.WeightNorm and nn.SpectralNorm also use),"
    " which would change the adapter too"
)


def is_mapped(scope: Scope) -> bool:
    """Return True if a scope's variables pass through `nn.map_variables`, which Flax records in `debug_path`."""
    return any("map_variables(" in part for part in scope.debug_path)


def bind_layer(module: nn.Module, method: str, plain: Callable[..., Any]) -> call.Layer:
    """Return one method of a module as a layer that an adapter can run.

    Its `run` works on a copy of the module's scope without the leaves marked with `SEP`, and draws the same random
    numbers as the plain call. The changed state is that of the mutable collections other than "params", such as a cache
    or batch statistics.
    """
    scope = module.scope
    assert scope is not None

    def run(weights: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        variables: dict[str, Any] = unfreeze(dict(scope.variables()))
        variables["params"] = {k: v for k, v in variables.get("params", {}).items() if SEP not in k} | dict(weights)
        # A scope belongs to the trace that creates it, so it is created here and not outside `run`.
        mutable = subtract_filters(scope.mutable, "params")
        copy = Scope(variables, scope.rngs, scope.name, mutable, path=scope.path, flags=scope.flags)
        copy.rng_counters = scope.rng_counters
        y = getattr(module.copy(parent=copy), method)(*args, **kwargs)
        captured = copy.get_variable("intermediates", method)
        # The outer call captures this output too (capture_intermediates), so it is removed here.
        if isinstance(captured, tuple) and captured and captured[-1] is y:
            copy.put_variable("intermediates", method, captured[:-1])
        return y, {k: v for k, v in copy.mutable_variables().items() if k != "params"}

    def write_back(changed: Mapping[str, Any]) -> None:
        for collection, tree in changed.items():
            for key, value in unfreeze(dict(tree)).items():
                scope.put_variable(collection, key, value)

    own = {k: v for k, v in scope.variables().get("params", {}).items() if not isinstance(v, Mapping) and SEP not in k}
    return call.Layer(
        ".".join(scope.path),
        module,
        getattr(type(module), method),
        method == "__call__",
        {k: meta.unbox(v) for k, v in own.items()},
        plain,
        run,
        write_back,
    )


# ---------------------------------------------------------------- one call of a module with adapted leaves


@dataclasses.dataclass(frozen=True)
class LeafAdapter:
    """One adapter, or those of a batch's rows, at one leaf.

    Attributes:
        site: the method at this leaf.
        key: the name in `params` of its tensors during the call, `{"own": tensors, "shared": tensors}`. The second
            are those that all layers and all rows have in common.
        whole: such tensors that are not in `params`, because the model's scan would slice them there.
    """

    site: Applicable
    key: str
    whole: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])

    @property
    def rate(self) -> float:
        """The dropout rate."""
        return self.site.method.dropout(self.site.hparams)

    def make_hook(self, scope: Any, drop: Drop | None) -> AppliedMethod:
        """Return the method with the tensors that `scope` holds."""
        if self.whole and any("jit(" in part for part in scope.debug_path):
            raise AttachError(
                f"{'.'.join(scope.path)}: cannot pass {', '.join(self.whole)}, which belong to the whole adapter, into"
                " nn.jit around or inside a scan over layers: its compiled function would keep the first values. Remove"
                " that nn.jit, and compile the whole call with jax.jit"
            )
        held = scope.get_variable("params", self.key)
        own, shared = dict(held["own"]), {**held.get("shared", {}), **self.whole}
        if isinstance(self.site, call.RowSite):
            return apply_rows(self.site, self.site.how, own, shared)
        return AppliedMethod.in_call(self.site, own | shared, drop)


@dataclasses.dataclass(frozen=True)
class Overlay:
    """One call of an adapted module: its variables, separated into base and adapters, and what the call adds to them.

    Args:
        base: the variables without the adapters' collections.
        adapters: the adapters' collections.
        active: the active adapters.
        dropout: True if the call has a random stream "dropout". Each site with a dropout rate then draws from it.
        prompt: the active adapter with virtual tokens, if any.
        quantized_scopes: the scope paths of modules with quantized parameters.
        leaves: `{keys: value}` added to the base parameters, or replacing some of them, during the call.
        sites: `{scope path: {leaf: one LeafAdapter per adapter}}`.
        with_dropout: the names of the active adapters that have dropout, as keys.
        running: the scope paths of modules whose plain call is in progress. The methods that such a call uses are not
            intercepted.
        notes: for `summary`, `{dotted leaf: how its adapter follows it}`, which the calls fill; None for other calls.
    """

    base: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    adapters: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    active: Mapping[str, Adapter] = dataclasses.field(default_factory=dict[str, Adapter])
    dropout: bool = False
    prompt: prompts.Prompt | None = None
    quantized_scopes: frozenset[trees.Keys] = frozenset()
    leaves: dict[trees.Keys, Any] = dataclasses.field(default_factory=dict[trees.Keys, Any])
    sites: dict[trees.Keys, dict[str, list[LeafAdapter]]] = dataclasses.field(
        default_factory=dict[trees.Keys, dict[str, list[LeafAdapter]]]
    )
    with_dropout: dict[str, None] = dataclasses.field(default_factory=dict[str, None])
    running: list[trees.Keys] = dataclasses.field(default_factory=list[trees.Keys])
    notes: dict[str, str] | None = None

    def add(
        self,
        keys: trees.Keys,
        site: Applicable,
        stack: Sequence[int],
        number: Any,
        tensors: Mapping[str, Any],
        shared: Mapping[str, Any],
    ) -> None:
        """Add the tensors of a site beside the leaf at `keys`.

        Args:
            stack: the axes of the leaf that stack layers.
            number: distinguishes the sites of one leaf.
            tensors: the tensors with these axes.
            shared: the tensors that all layers have in common. The model's scan would slice them in `params`.
        """
        *path, leaf = keys
        # The hyperparameters are part of the added names, so that a jit inside the model (nn.jit) traces anew when they
        # change.
        text = repr((number, site.method.peft_type, site.hparams, site.axes, site.axes.torch))
        name = f"{leaf}{SEP}{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        self.leaves[(*path, name)] = {"own": dict(tensors), "shared": {} if stack else dict(shared)}
        of_leaf = self.sites.setdefault(tuple(path), {}).setdefault(leaf, [])
        of_leaf.append(LeafAdapter(site, name, shared if stack else {}))

    def module_variables(self) -> dict[str, Any]:
        """Return the variables with which the module is called."""
        if not self.leaves:
            return dict(self.base)
        return {**self.base, "params": trees.overlay(self.base["params"], self.leaves)}

    def restore(self, changed: Mapping[str, Any], mutable: Any, path: trees.Keys = ()) -> Any:
        """Return the collections that a call returned, without the added leaves and with the adapters' collections.

        Args:
            changed: the collections of the module, or of the submodule at `path`.
            mutable: the collections to return.
        """
        out, size = dict(changed), len(path)
        leaves = [keys[size:] for keys in self.leaves if keys[:size] == path]
        if "params" in out and leaves:
            replaced = {k: trees.lookup(self.base["params"], (*path, *k)) for k in leaves if SEP not in k[-1]}
            out["params"] = trees.overlay(_without(out["params"], set(leaves) - replaced.keys()), replaced)
        out |= {c: tree for c, tree in self.adapters.items() if in_filter(mutable, c)}
        return FrozenDict(out) if isinstance(changed, FrozenDict) else out

    def intercept(self, next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        """Apply the adapters of a module, and dequantize its weights, when one of its methods is called."""
        scope = context.module.scope
        if not is_own_method(context) or scope.path in self.running:
            return next_fun(*args, **kwargs)
        refuse_mapped(context, self.sites)
        hooks = {
            leaf: together([each.make_hook(scope, self._make_dropout(each.rate, scope)) for each in adapters])
            for leaf, adapters in self.sites.get(scope.path, {}).items()
            # A copy of the scope lacks the tensors: its caller applies the adapters.
            if scope.has_variable("params", adapters[0].key)
        }
        if not hooks and scope.path not in self.quantized_scopes:
            return next_fun(*args, **kwargs)

        def plain(*args: Any, **kwargs: Any) -> Any:
            self.running.append(scope.path)
            try:
                return next_fun(*args, **kwargs)
            finally:
                self.running.pop()

        layer = bind_layer(context.module, context.method_name, plain)
        if self.notes is not None and hooks:
            name = f"{type(context.module).__name__}.{context.method_name}".removesuffix(".__call__")
            notes = call.describe(name, layer, hooks, args, kwargs)
            self.notes.update({".".join((*scope.path, leaf)): note for leaf, note in notes.items()})
        return call.apply(layer, hooks, args, kwargs)

    def _make_dropout(self, rate: float, scope: Scope) -> Drop | None:
        """Return a dropout with a key from the scope's stream, or None if dropout is off."""
        if not rate or not self.dropout:
            return None
        if not scope.has_rng(DROPOUT):
            prefix = scope.root.path  # of the lifted transform, in which all layers see the same random streams
            layers = [
                ".".join(path)
                for path, leaves in self.sites.items()
                if path[: len(prefix)] == prefix and any(x.rate for leaf in leaves.values() for x in leaf)
            ]
            raise AttachError(
                f'the call has rngs={{"{DROPOUT}": …}}, but these layers with dropout do not get it:\n'
                + paths.bullets(layers)
                + f'\nPass split_rngs={{"params": True, "{DROPOUT}": True}} to the nn.scan (or nn.vmap, …) around them,'
                " or turn the adapters' dropout off with model.clone(deterministic=True)"
            )
        key = scope.make_rng(DROPOUT)
        return Drop(rate, lambda: key)


def intercept(overlay: Overlay) -> AbstractContextManager[None]:
    """Return a context in which the calls of Linen modules apply the overlay's adapters."""
    return nn.intercept_methods(overlay.intercept)


def build_overlay(
    variables: Mapping[str, Any],
    configs: Mapping[str, Config],
    active: Sequence[str],
    data: Mapping[str, Mapping[str, Any]],
    has_stream: bool,
) -> Overlay:
    """Build the overlay of one call.

    Args:
        variables: the variables as the caller has them.
        configs: `{name: configuration}` of the wrapper's adapters.
        active: the names of the adapters to apply, in this order.
        data: `{adapter: {name: array}}` of this call.
        has_stream: True if the call has a random stream for dropout.

    Raises `AttachError` for an active adapter that the variables lack, or that does not fit the base or its
    configuration.
    """
    adapters = _adapter_collections(variables, configs)
    base = {c: _as_dicts(tree) for c, tree in variables.items() if c not in adapters}
    params = base.get("params", {})
    keys_by_leaf = key_paths(params)
    read = {name: _read_adapter(adapters, name, configs[name], keys_by_leaf) for name in active}
    virtual = {
        name: prompts.Prompt(adapter.recipe, adapter.shared, data.get(name, {}))
        for name, adapter in read.items()
        if get_method(adapter.config).scope == "model"
    }
    stored = frozenset(k[:-1] for k in keys_by_leaf.values() if quantized.is_quantized(trees.lookup(params, k)))
    overlay = Overlay(base, adapters, read, has_stream, prompts.only_one(virtual), stored)
    for order, (name, adapter) in enumerate(read.items()):
        values = adapter.sites
        for site in sites_of(adapter):
            keys = keys_by_leaf[site.leaf]
            if site.method.copies and site.effects.form == "weight":
                old = quantized.to_dense(overlay.leaves[keys] if keys in overlay.leaves else trees.lookup(params, keys))
                overlay.leaves[keys] = meta.replace_boxed(
                    old, map_stack(site, lambda a, w: a.weight(w), values[site.leaf], meta.unbox(old))
                )
                continue
            if site.method.dropout(site.hparams):
                overlay.with_dropout[name] = None
            number = order, has_stream, name in overlay.with_dropout
            tensors = values[site.leaf] | _repeat_data(site, data.get(name, {}), trees.lookup(params, keys))
            overlay.add(keys, site, site.match.stack, number, tensors, {} if site.method.copies else adapter.shared)
    trees.refuse_rival_copies(read)
    return overlay


def _as_dicts(tree: Any) -> Any:
    """Return a tree with dicts in place of mappings that JAX takes for leaves, such as a `mappingproxy`."""
    if not any(isinstance(leaf, Mapping) for leaf in jax.tree.leaves(tree)):
        return tree
    return jax.tree.map(lambda leaf: _as_dicts(dict(leaf)) if isinstance(leaf, Mapping) else leaf, tree)


def _read_adapter(
    adapters: Mapping[str, Any], name: str, config: Config, keys_by_leaf: Mapping[str, trees.Keys]
) -> Adapter:
    """Return an active adapter; raise `AttachError` unless it has the wrapper's configuration and fits the base."""
    collection = collection_name(config)
    tree = trees.find_adapters(adapters).get((collection, name))
    if tree is None:
        raise AttachError(
            f"the variables hold no adapter {name!r} in {collection!r}. Create it with init, or load it with load"
        )
    # meta.unbox applies the sharding constraints of the boxes, as it does for the base.
    adapter = trees.read_adapter(meta.unbox(tree), name)
    if adapter.config != _resolve_like(config, adapter.config):
        argument = "" if name == "default" else f", name={name!r}"
        raise AttachError(
            f"the adapter {name!r} in the variables has another configuration than in this wrapper. Wrap the module"
            f" with the adapter's: jaxadapt.adapt(module, jaxadapt.extract(variables{argument}).config{argument})"
        )
    raise_listed(
        AttachError,
        f"the adapter {name!r} adapts weights that the base parameters lack:",
        (leaf for leaf in adapter.sites if leaf not in keys_by_leaf),
    )
    return adapter


def _resolve_like(config: Config, resolved: Config) -> Config:
    """Return a wrapper's configuration with the fields that `init` resolves taken from an adapter's configuration.

    These are unset targets, "all-linear" and `fan_in_fan_out`.
    """
    config = matching.with_task_heads(config)
    targets = {name for defaults in FACTS[config.peft_type].default_targets.values() for name in defaults}
    taken = [name for name in targets if config.get(name) is None and name in config.to_dict()]
    if isinstance(config, PromptLearningConfig):
        taken += [name for name, value in config.to_dict().items() if value is None]
    if config.get("fan_in_fan_out") is not None:
        taken.append("fan_in_fan_out")
    if str(config.get("target_modules")).lower() == matching.ALL_LINEAR:
        config = config.with_targets(resolved.get("target_modules"))
    return config.replace(**{name: resolved.get(name) for name in taken}) if taken else config


def _repeat_data(site: Site, of_call: Mapping[str, Any], w: Any) -> dict[str, Any]:
    """Return the layer numbers of a site and the data of a call, stacked as the leaf `w` is."""
    stack = site.match.stack
    # The axes of the layer numbers become the weight's stacked axes, which a scan slices.
    added = [axis for axis in range(max(stack, default=0)) if axis not in stack]
    numbers = {key: jnp.expand_dims(jnp.asarray(x), added) for key, x in site.data.items()}
    return numbers | {key: repeat_on_stack(x, stack, trees.unbox_tree(w).shape) for key, x in of_call.items()}


def repeat_on_stack(x: Any, stack: Sequence[int], shape: Sequence[int]) -> Any:
    """Repeat an array for each layer that a weight of this shape stacks on these axes."""
    for axis in stack:
        x = jnp.repeat(jnp.expand_dims(x, axis), shape[axis], axis)
    return x


def _without(tree: Mapping[str, Any], added: Collection[trees.Keys], path: trees.Keys = ()) -> dict[str, Any]:
    """Return a parameter tree without the leaves that a call added; `path` leads to the tree."""
    kept = {k: v for k, v in tree.items() if (*path, k) not in added}
    return {k: _without(v, added, (*path, k)) if isinstance(v, Mapping) else v for k, v in kept.items()}


def _adapter_collections(variables: Mapping[str, Any], configs: Mapping[str, Config]) -> dict[str, Any]:
    """Return the collections of the wrapper's adapters, and of all others that have a configuration."""
    names = {collection_name(config) for config in configs.values()} | {
        k[0] for k, inner in trees.find_adapters(variables).items() if k[1:] and CONFIG_NODE in inner
    }
    names |= set(map(integers_name, names))
    return {c: variables[c] for c in variables if c in names}


def key_paths(tree: Any) -> dict[str, trees.Keys]:
    """Return `{dotted path: keys}` for the leaves of nested mappings, whose keys may contain dots."""
    return {".".join(keys): keys for keys in traverse_util.flatten_dict(_as_dicts(tree))}


# ---------------------------------------------------------------- rows


def add_rows(overlay: Overlay, layout: call.RowLayout, rows: call.Rows | None) -> None:
    """Add a batch's rows to the overlay of a call; raise `AttachError` without them, or if they do not fit the base."""
    if rows is None:
        raise AttachError(call.NO_ROUTE)
    rows.check_layout(layout)
    keys_by_leaf = key_paths(overlay.base.get("params", {}))
    raise_listed(
        AttachError,
        "the bank is for another base; the parameters lack these weights:",
        (site.leaf for site in layout.sites if site.leaf not in keys_by_leaf),
    )
    for number, (site, arrays) in enumerate(zip(rows.sites, rows.arrays, strict=True)):
        shared = {} if site.shared is None else rows.shared[site.shared]
        overlay.add(keys_by_leaf[site.leaf], site, site.stack, ("rows", number), arrays, shared)


# ---------------------------------------------------------------- prompts


def find_attention(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """Intercept the calls of Flax's attention modules, so that a trace shows those of their attention function."""
    module = context.module
    is_attention = isinstance(module, nn.MultiHeadDotProductAttention) and context.method_name == "__call__"
    if not is_attention or attention_calls.is_findable(module.attention_fn):
        return next_fun(*args, **kwargs)
    return module.clone(parent=module.scope, attention_fn=attention_calls.Findable(module.attention_fn))(
        *args, **kwargs
    )


def call_module(
    module: nn.Module,
    prompt: prompts.Prompt,
    apply: Callable[..., Any],
    variables: Mapping[str, Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Call `apply(variables, *args, **kwargs)` with the virtual tokens of an adapter.

    Raises `AttachError` for another method than `__call__`.
    """
    method = kwargs.get("method")
    if not (method is None or method == "__call__" or method is type(module).__call__):
        name = method if isinstance(method, str) else method.__name__
        raise AttachError(
            f"{prompt.recipe.config.peft_type} adds virtual tokens only to the module's __call__, but the call is of"
            f" {name!r}. Call {name!r} without the adapter, model.clone(active=())"
        )
    options = {name: kwargs[name] for name in ("rngs", "method", "capture_intermediates") if name in kwargs}
    rest = {name: value for name, value in kwargs.items() if name not in options}
    if (hooked := prompts.hooked_call(module, prompt)) is not None:
        name, first = hooked
        return apply(variables, *first, *args, **{**kwargs, "method": name})
    if prompt.method.adds == "embeddings":
        plain = functools.partial(apply, variables, *args, **kwargs)
        embed = functools.partial(_embed, plain, prompt.method.peft_type)
        args, rest = prompts.with_embeddings(prompt, type(module).__call__, args, rest, embed)
        return apply(variables, *args, **rest, **options)

    def run(state: Any, args: Any, kwargs: Any) -> Any:
        variables, options = state
        with nn.intercept_methods(find_attention):
            return apply(variables, *args, **options, **kwargs)

    return prompts.call_with_keys(
        run,
        prompt,
        type(module).__call__,
        args,
        rest,
        state=(variables, options),
        base=lambda: paths.flatten(trees.unbox_tree(variables.get("params", {}))),
    )


class _EmbeddedError(Exception):
    """Ends a call once the embeddings of its tokens are known; they are its argument."""


def _embed(call: Callable[[], Any], peft_type: str, tokens: Any) -> Any:
    """Return the embeddings of the tokens of a call, by the module's own `nn.Embed`. The call ends with them."""

    def stop(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        y = next_fun(*args, **kwargs)
        given = [*args, *kwargs.values()]
        if isinstance(context.module, nn.Embed) and context.method_name == "__call__" and given[0] is tokens:
            raise _EmbeddedError(y)
        return y

    try:
        with nn.intercept_methods(stop):
            call()
    except _EmbeddedError as found:
        return found.args[0]
    raise AttachError(
        f"{peft_type}: the module does not embed its tokens with an nn.Embed, so their embeddings are unknown. Pass"
        " embeddings to the call in place of tokens"
    )


def measure_base(module: nn.Module, rngs: Any, args: Any, kwargs: Any) -> BaseSizes:
    """Return the sizes of a base model that a trace of its `init` shows."""

    def run(rngs: Any, args: Any, kwargs: Any) -> Any:
        with nn.intercept_methods(find_attention):
            return module.init(rngs, *args, **kwargs)

    return attention_calls.measure_base(run, *jax.eval_shape(lambda x: x, (rngs, args, kwargs)))
