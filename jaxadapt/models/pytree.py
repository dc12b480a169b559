"""Adapters on any model that is a pytree and is called, such as an Equinox module.

Such a model is a registered node of `jax.tree_util` with arrays in it, and `model(*inputs)` calls it. A `Function` is
such a model, made of a function and its parameters. An adapted model is an `AdaptedTree`: it holds the base and the
adapters, and it is called as the base is. One trace of a call shows the roles of the axes of all weights, and
`tracing.rewrite` lets the adapters follow the weights through the whole call. No library of such models is imported.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxadapt.adapters import selection
from jaxadapt.adapters.adapter import Adapter, Recipe, Site, Sites, is_array
from jaxadapt.adapters.sites import sites_of
from jaxadapt.arrays import quantized
from jaxadapt.configs.base import Config
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, raise_listed, repeated
from jaxadapt.keymaps.keymap import GENERIC, KeyMap, entry_from_axes, fitting_match
from jaxadapt.keymaps.weight import Weight
from jaxadapt.methods.applied import AppliedMethod, Hook, Stacked, together
from jaxadapt.methods.base import CALL_KEY, Drop, get_method
from jaxadapt.models import call, planning, tracing, trees

if TYPE_CHECKING:
    from jaxadapt.models.linen_wrapper import Survey

# ---------------------------------------------------------------- leaves


def dotted_path(keys: Sequence[Any]) -> str:
    """Return the path of a leaf as `paths.flatten` returns it, without empty names."""
    return paths.join(*(jax.tree_util.keystr((key,), simple=True) for key in keys))


def leaves(tree: Any, wanted: Collection[str] | None = None) -> dict[str, Any]:
    """Return `{path: array}` of the arrays in a pytree, or of the `wanted` ones.

    Raises `AttachError` for quantized arrays, and if two arrays share a path.
    """
    pairs = jax.tree_util.tree_leaves_with_path(tree, is_leaf=quantized.is_quantized)
    found = [(dotted_path(keys), leaf) for keys, leaf in pairs]
    raise_listed(
        AttachError,
        "the weights of a model that is a pytree cannot be quantized; pass the dense model:",
        (path for path, leaf in found if quantized.is_quantized(leaf)),
    )
    arrays = [(path, leaf) for path, leaf in found if is_array(leaf)]
    raise_listed(
        AttachError,
        "these arrays of the model share a path with another one; rename them:",
        repeated([path for path, _ in arrays]),
    )
    by_path = dict(arrays)
    return by_path if wanted is None else {path: by_path[path] for path in wanted}


def fill(tree: Any, new: Mapping[str, Any]) -> Any:
    """Return a pytree with other arrays at some paths."""
    raise_listed(
        AttachError,
        "the weights of a model that is a pytree cannot be quantized; leave them dense:",
        (path for path, x in new.items() if quantized.is_quantized(x)),
    )
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: new.get(dotted_path(keys), leaf) if is_array(leaf) else leaf, tree
    )


# ---------------------------------------------------------------- models


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class Function:
    """A function of parameters as a model: `Function(fn, params)(*inputs)` is `fn(params, *inputs)`.

    A pytree, whose leaves are those of `params` and have their paths. `fn` is compared by identity, so that a jitted
    function is compiled again for another one.

    Args:
        fn: the function, called as `fn(params, *inputs)`.
        params: a pytree of arrays, such as Haiku's parameters.

    >>> import jax.numpy as jnp
    >>> model = Function(lambda params, x: x @ params["up"], {"up": jnp.ones((3, 2))})
    >>> model(jnp.ones(3)).tolist()
    [3.0, 3.0]
    """

    fn: Callable[..., Any]
    params: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return `fn(params, *args, **kwargs)`."""
        return self.fn(self.params, *args, **kwargs)

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any]], Callable[..., Any]]:
        """Flatten the model for JAX; the parameters have no name in the paths of their leaves."""
        return ((jax.tree_util.GetAttrKey(""), self.params),), self.fn

    @classmethod
    def tree_unflatten(cls, fn: Callable[..., Any], children: tuple[Any]) -> Function:
        """Rebuild the model that `tree_flatten_with_keys` flattened."""
        return cls(fn, children[0])


def is_model(tree: Any) -> bool:
    """Return True for a pytree with arrays that is called as a model is.

    >>> import jax.numpy as jnp
    >>> is_model(Function(jnp.dot, jnp.ones(3))), is_model([jnp.ones(3)]), is_model(jnp.dot)
    (True, False, False)
    """
    if not callable(tree) or isinstance(tree, jax.tree_util.Partial) or jax.tree_util.all_leaves([tree]):
        return False
    return any(is_array(leaf) or quantized.is_quantized(leaf) for leaf in jax.tree.leaves(tree))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("base", "adapters", "dropout_key"),
    meta_fields=("active", "deterministic", "warned"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class AdaptedTree:
    """A model that is a pytree, with adapters: called as the model is. `jaxadapt.adapt` and `load` return it.

    A frozen pytree. Attributes of the base are those of the adapted model, too, but calls of its parts, as in
    `model.layers[0](x)`, are those of the base.

    Args:
        base: the model without adapters.
        adapters: `{name: adapter}`.
        active: the names of the adapters that a call applies.
        dropout_key: the random key of the adapters' dropout in a call, or None. Set it in each training step,
            `model.clone(dropout_key=key)`.
        deterministic: True turns the adapters' dropout off. None: it is on in calls with a `dropout_key`, with one
            warning if a call lacks it. False: it is on, and a call without the key is an error.

    >>> import jax.numpy as jnp
    >>> model = AdaptedTree(Function(lambda params, x: x @ params["up"], {"up": jnp.ones((3, 2))}))
    >>> model(jnp.ones(3)).tolist()
    [3.0, 3.0]
    """

    base: Any
    adapters: Mapping[str, Adapter] = dataclasses.field(default_factory=dict[str, Adapter])
    active: tuple[str, ...] = ()
    dropout_key: Any = None
    deterministic: bool | None = None
    warned: call.Warned = dataclasses.field(default_factory=call.Warned, repr=False)

    def clone(self, **changes: Any) -> AdaptedTree:
        """Return a copy with other values for some fields.

        >>> import jax.numpy as jnp, jaxadapt
        >>> base = Function(lambda params, x: x @ params["up"], {"up": jnp.ones((3, 2))})
        >>> config = jaxadapt.LoraConfig(r=2, target_modules=["up"], lora_dropout=0.1)
        >>> model = jaxadapt.adapt(base, config, key=jax.random.key(0), example=[jnp.ones(3)])
        >>> model.clone(dropout_key=jax.random.key(1))(jnp.ones(3)).tolist()
        [3.0, 3.0]
        """
        return dataclasses.replace(self, **changes)

    def with_adapters(self, adapters: Mapping[str, Adapter]) -> AdaptedTree:
        """Return a copy with these adapters in place of those with the same names, or beside the others."""
        return self.clone(adapters={**self.adapters, **adapters})

    def attach(self, name: str, adapter: Adapter, deterministic: bool | None = None) -> AdaptedTree:
        """Return a copy with an adapter that is active, too. `deterministic` is that of the copy, unless it is None."""
        refuse_unfollowed(adapter.config)
        copy = self if deterministic is None else self.clone(deterministic=deterministic)
        active = (*(each for each in self.active if each != name), name)
        return copy.with_adapters({name: adapter}).clone(active=active)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the base."""
        # "base" is missing while copy or pickle builds an instance; dunder names are protocol look-ups by Python.
        if name == "base" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.base, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base with the active adapters applied.

        Raises `AttachError` for a use of an adapted weight that no adapter can follow.
        """
        return self.apply(operator.call, *args, **kwargs)

    def apply(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return `fn(base, *args, **kwargs)` with the active adapters applied, for a method other than the call.

        >>> import jax.numpy as jnp
        >>> base = Function(lambda params, x: x @ params["up"], {"up": jnp.ones((3, 2))})
        >>> AdaptedTree(base).apply(lambda model, x: 2 * model(x), jnp.ones(3)).tolist()
        [6.0, 6.0]
        """
        hooks, weights = self._hooks(), leaves(self.base)
        raise_listed(
            AttachError,
            "the adapters adapt weights that the base lacks:",
            (leaf for leaf in hooks if leaf not in weights),
        )

        def run(changed: Mapping[str, Any], *args: Any, **kwargs: Any) -> tuple[Any, Mapping[str, Any]]:
            return fn(fill(self.base, changed), *args, **kwargs), {}

        model = call.Layer(
            type(self.base).__name__,
            self.base,
            operator.call,
            fn is operator.call,
            weights,
            functools.partial(fn, self.base),
            run,
            lambda _: None,
        )
        return call.run_adapted(model, hooks, {}, args, kwargs)[0]

    def _hooks(self) -> dict[str, Hook]:
        """Return `{leaf: the active adapters on it}` with their tensors, and dropout if it is on."""
        found: dict[str, list[tuple[Site, AppliedMethod, frozenset[str]]]] = {}
        dropping: dict[str, None] = {}
        for name in self.active:
            adapter = self.adapters[name]
            values, shared = adapter.sites, adapter.shared
            for site in sites_of(adapter):
                rate = site.method.dropout(site.hparams)
                dropping |= {name: None} if rate else {}
                whole = {} if site.method.copies else shared
                params = {**whole, **values[site.leaf], **site.data}
                hook = AppliedMethod.in_call(site, params, self._drop(rate, f"{name}: {site.leaf}"))
                found.setdefault(site.leaf, []).append((site, hook, frozenset({*whole, CALL_KEY})))
        trees.refuse_rival_copies({name: self.adapters[name] for name in self.active})
        if dropping and self.dropout_key is None and not self.deterministic:
            call.report_no_dropout(
                dropping,
                self.deterministic,
                self.warned,
                "the model has no dropout_key",
                "Call model.clone(dropout_key=key)",
                "In training call model.clone(dropout_key=key) with another key in each step, and evaluate with"
                " model.clone(deterministic=True)",
            )
        hooks: dict[str, Hook] = {}
        for leaf, each in found.items():
            stacks = {site.match.stack for site, _, _ in each}
            if len(stacks) > 1:
                raise AttachError(f"{leaf}: the active adapters disagree on the axes that stack layers: {stacks}")
            methods = tuple(hook for _, hook, _ in each)
            (stack,) = stacks
            hooks[leaf] = Stacked(methods, stack, tuple(x for _, _, x in each)) if stack else together(methods)
        return hooks

    def _drop(self, rate: float, place: str) -> Drop | None:
        if not rate or self.dropout_key is None or self.deterministic:
            return None
        return Drop(rate, lambda: jax.random.fold_in(self.dropout_key, zlib.crc32(place.encode())))


def adapter_filter(model: Any) -> Any:
    """Return a tree like an adapted model, True at the parameters to train, for `equinox.partition` and its kin.

    The base is one False, so that the tree is a prefix of the model. Tensors that training must not change, such as
    VeRA's projections, are False, and so are inactive adapters.

    Raises `AttachError` for any other object than a model that `jaxadapt.adapt` or `load` returned.

        trained, rest = equinox.partition(model, jaxadapt.models.adapter_filter(model))

    >>> import jax.numpy as jnp, jaxadapt
    >>> base = Function(lambda params, x: x @ params["up"], {"up": jnp.ones((3, 2))})
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["up"])
    >>> model = jaxadapt.adapt(base, config, key=jax.random.key(0), example=[jnp.ones(3)])
    >>> adapter_filter(model).adapters["default"].params
    {'up': {'lora_A': True, 'lora_B': True}}
    """
    if not isinstance(model, AdaptedTree):
        raise AttachError(f"expected an adapted model that is a pytree, found {type(model).__name__}")
    adapters: dict[str, Adapter] = {}
    for name, adapter in model.adapters.items():
        sites = sites_of(adapter)
        frozen = {
            paths.join(site.leaf, tensor.name) for site in sites for tensor in site.tensors if not tensor.trained
        } | {each.entry.path for each in sites.shared if not each.tensor.trained}
        marks = {path: name in model.active and path not in frozen for path in adapter.flat()}
        adapters[name] = dataclasses.replace(adapter, params=paths.unflatten(marks))
    return model.clone(base=False, adapters=adapters, dropout_key=None if model.dropout_key is None else False)


# ---------------------------------------------------------------- planning


@dataclasses.dataclass(frozen=True)
class TreeParams(planning.BaseParams):
    """The base parameters of a model that is a pytree; `target` is an `AdaptedTree`."""

    assumes_flax = False
    """The layers have layouts of their own."""

    @functools.cached_property
    def keymap(self) -> KeyMap | None:
        """The keymap of an adapter that the model has, if any."""
        return next((adapter.keymap for adapter in self.target.adapters.values()), None)

    def plan(
        self,
        config: Config,
        keymap: KeyMap,
        stack_axes: Sequence[int] | None,
        example: Sequence[Any] | None,
        found: Mapping[str, tuple[int, ...]] | None,
    ) -> tuple[Recipe, Sites]:
        """Return the recipe and sites of `plan_adapter`, with the axis roles that a call with the inputs shows."""
        from jaxadapt.models.linen_wrapper import Survey  # here, where a plan needs it; calls do without

        refuse_unfollowed(config)
        if stack_axes is not None:
            raise AttachError(
                "stack_axes: for NNX models only; pass example=[inputs of one call], whose scans show them"
            )
        survey, vectors = Survey(self.shapes, frozenset(), frozenset()), list[Weight]()
        if example is not None:
            vectors = self._trace(survey, keymap, example)
        entries = survey.entries(keymap) + [
            entry for entry in vectors if not _has_entry(keymap, entry.leaf, self.shapes)
        ]
        known = {*survey.roles, *(entry.leaf for entry in entries)}
        guessed = [leaf for leaf, shape in self.shapes.items() if len(shape) > 1 and leaf not in known]
        return selection.make_recipe(
            config,
            keymap,
            self.shapes,
            entries,
            unsure=frozenset(guessed) if keymap == GENERIC else selection.NONE,
            never_linear=survey.refused,
            found=found,
            check=survey.check,
            weights=lambda: self.leaves,
        )

    def _trace(self, survey: Survey, keymap: KeyMap, example: Sequence[Any]) -> list[Weight]:
        """Add the axis roles of the weights, or the reasons why there are none, to a survey.

        Returns entries for vectors, such as biases, that are stacked because a scan takes their layers one by one.
        """
        base = self.target.base
        weights = {path: x for path, x in self.leaves.items() if x.ndim > 1 and jnp.issubdtype(x.dtype, jnp.floating)}
        found = tracing.uses(lambda new, *args: fill(base, new)(*args), weights, *example)
        vectors: list[Weight] = []
        scans = {leaf: [tracing.unscan(use)[0] for use in uses] or [{}] for leaf, uses in found.items()}
        for leaf, uses in found.items():
            stacks, shape = list(dict.fromkeys(map(tuple, scans[leaf]))), weights[leaf].shape
            places = _places(leaf, {path: set(first.values()) for path, (first, *_) in scans.items()}, scans[leaf][0])
            if len(stacks) == 1 and len(shape) == len(stacks[0]) + 1:
                vectors.append(entry_from_axes(leaf, shape, tracing.Axes((), (0,)), stacks[0], "vector", places=places))
                continue
            try:
                roles = _find_roles([tracing.unscan(use)[1] for use in uses], leaf, stacks)
            except AttachError as error:
                is_known = leaf.endswith("bias") or _has_entry(keymap, leaf, self.shapes)
                survey.refused |= {} if is_known else {leaf: str(error)}
                continue
            survey.roles[leaf], survey.stack[leaf], survey.places[leaf] = roles, stacks[0], places
            survey.certain.add(leaf)
        return vectors


def _has_entry(keymap: KeyMap, leaf: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Return True if a keymap, other than the generic one, has an entry for a leaf of that many axes."""
    return keymap.name != GENERIC.name and fitting_match(keymap, leaf, shapes[leaf]) is not None


def _places(leaf: str, scans: Mapping[str, Collection[int]], taken: Mapping[int, int]) -> tuple[int, ...]:
    """Return the places of layers' numbers in the path of a leaf's module: after the names that a scan's leaves share.

    Args:
        scans: `{path of a leaf: the scans that take it}`.
        taken: `{stacked axis: the scan that takes it}` of the leaf.

    >>> _places("layers.attn.q.weight", {"layers.attn.q.weight": [7], "layers.up.weight": [7]}, {0: 7})
    (1,)
    """
    places: list[int] = []
    for scan in taken.values():
        split = [path.split(".")[:-1] for path, of_leaf in scans.items() if scan in of_leaf]
        shared = [names for names in zip(*split, strict=False) if len(set(names)) == 1]
        places.append(min(max(len(shared), 1), max(leaf.count(".") - 1, 0)))
    return tuple(places)


def _find_roles(uses: Sequence[tracing.WeightUse], leaf: str, stacks: Sequence[tuple[int, ...]]) -> call.Roles:
    """Return the roles of a weight's axes, without those that scans take, which all uses must share.

    Raises `AttachError` if its uses do not show them.
    """
    if len(stacks) > 1:
        raise AttachError(f"scans take it over different axes, {stacks}, and so it is not known which stack layers")
    for use in uses:
        if isinstance(use, tracing.OtherUse) and use.axes is not None:
            return call.Roles(use.axes, "conv" if use.primitive.startswith("conv") else "embedding", use.groups)
    return call.Roles(call.infer_axes(uses, leaf))


def refuse_unfollowed(config: Config) -> None:
    """Raise `AttachError` for an adapter that needs more of a call than its weights: virtual tokens, or the tokens."""
    method = get_method(config)
    if method.scope == "model":
        raise AttachError(
            f"{method.peft_type} adds virtual tokens to a call, which needs an NNX or a Linen model; on a model that is"
            " a pytree, adapt weights"
        )
    if config.get("alora_invocation_tokens") is not None:
        raise AttachError(
            "alora_invocation_tokens: for NNX and Linen models only; on a model that is a pytree, use LoRA"
        )


def adapt(
    model: AdaptedTree,
    name: str,
    config: Config,
    keymap: KeyMap | str | None,
    dtype: Any,
    options: Mapping[str, Any],
) -> AdaptedTree:
    """Return a model with a new adapter; `options` are those of `jaxadapt.adapt`."""
    base = TreeParams(leaves(model.base), model)
    recipe, sites = planning.plan_adapter(base, config, keymap, options["stack_axes"], options["example"])
    values = base.new_values(recipe, sites, options["key"], dtype, "a random key: pass key=jax.random.key(seed)")
    return model.attach(name, Adapter.of_leaves(recipe.config, values, recipe.keymap), options["deterministic"])
