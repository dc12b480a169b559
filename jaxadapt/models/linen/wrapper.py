"""Adapters on Linen modules: a wrapper with the module's `init`, `apply` and `bind`.

An adapter is stored in its own collection, `{"params": base, "lora": {name: tree}}`. For a call, its tensors are added
to `params` beside the weights that they adapt, so that the model's scan, vmap and remat transform them like the
weights. An interceptor applies them when the weight's module is called. The call of the outermost module adds the
virtual tokens of a prompt method.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Collection, Hashable, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.core import meta

from jaxadapt.adapters import initial_values, selection
from jaxadapt.adapters.adapter import Adapter, Recipe, Sites, collection_name, integers_name, is_array
from jaxadapt.adapters.selection import make_recipe
from jaxadapt.adapters.sites import sites_of
from jaxadapt.configs.base import Config
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, warn
from jaxadapt.keymaps.families import resolve_keymap
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.methods.prompt import BaseSizes, PromptMethod
from jaxadapt.methods.registry import get_method
from jaxadapt.models import prompts
from jaxadapt.models.attention_calls import Findable, is_findable, with_width
from jaxadapt.models.call import RowLayout, Rows
from jaxadapt.models.linen import collections
from jaxadapt.models.linen.interceptor import DROPOUT, UseRecorder, called_scopes, check_reads, survey_module
from jaxadapt.models.linen.overlay import Overlay, add_rows, build_overlay, key_paths

# ---------------------------------------------------------------- prompts


def find_attention(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """Intercept the calls of Flax's attention modules, so that a trace shows those of their attention function."""
    module = context.module
    is_attention = isinstance(module, nn.MultiHeadDotProductAttention) and context.method_name == "__call__"
    if not is_attention or is_findable(module.attention_fn):
        return next_fun(*args, **kwargs)
    copy = module.clone(parent=module.scope, attention_fn=Findable(module.attention_fn))
    return copy(*args, **kwargs)


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

        def embed(tokens: Any) -> Any:
            return _embed(lambda: apply(variables, *args, **kwargs), tokens, prompt.method.peft_type)

        args, rest = prompts.with_embeddings(prompt, type(module).__call__, args, rest, embed)
        return apply(variables, *args, **rest, **options)

    def run(state: Any, *args: Any, **kwargs: Any) -> Any:
        variables, rngs = state
        with nn.intercept_methods(find_attention):
            return apply(variables, *args, **{**options, **({} if rngs is None else {"rngs": rngs}), **kwargs})

    def base() -> dict[str, Any]:
        return paths.flatten(collections.unbox_tree(variables.get("params", {})))

    state = (variables, options.get("rngs"))
    return prompts.call_with_keys(run, prompt, type(module).__call__, args, rest, state, base)


class _EmbeddedError(Exception):
    """Ends a call once the embeddings of its tokens are known."""

    def __init__(self, embeddings: Any) -> None:
        super().__init__()
        self.embeddings = embeddings


def _embed(call: Callable[[], Any], tokens: Any, peft_type: str) -> Any:
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
        return found.embeddings
    raise AttachError(
        f"{peft_type}: the module does not embed its tokens with an nn.Embed, so their embeddings are unknown. Pass"
        " embeddings to the call in place of tokens"
    )


def measure_base(module: nn.Module, rngs: Any, args: Any, kwargs: Any) -> BaseSizes:
    """Return the sizes of a base model that a trace of its `init` shows."""

    def run(rngs: Any, args: Any, kwargs: Any) -> Any:
        with nn.intercept_methods(find_attention):
            return module.init(rngs, *args, **kwargs)

    traced = jax.eval_shape(lambda x: x, (rngs, args, kwargs))
    return prompts.measure_base(run, *traced)


# ---------------------------------------------------------------- the wrapper


_CACHE_SIZE = 64

# ---------------------------------------------------------------- the wrapper


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A Linen module with adapters, with the module's `init`, `apply` and `bind`.

    The wrapper is not an `nn.Module`, so it cannot be a submodule. The module inside it is unchanged.

    Args:
        module: the base module.
        adapters: `((name, config), …)`.
        active: the names of the adapters that `apply` applies, in this order.
        keymap: a family's name, a `KeyMap`, or None to recognise the family.
        dtype: the dtype of new adapter parameters; float32 by default.
        layout: the sites of the bank of adapters, if the module has one; `jaxadapt.serving.attach` sets it.
        rows: the adapters of the rows of the calls; `jaxadapt.serving.route` sets it.
        data: `{adapter: {name: array}}` of the calls, such as an aLoRA's tokens; `jaxadapt.models.invoke` sets it.
        deterministic: True turns the adapters' dropout off. False turns it on, and a call without a random stream
            "dropout" raises. None turns it on in calls whose `rngs` have that stream.

    `deterministic` is a field of the wrapper, which `clone` changes. It is not an argument of `apply`, because `apply`
    passes every argument to the module, which may have an argument `deterministic` too:
    `model.clone(deterministic=True).apply(variables, x, deterministic=False)` turns off only the adapters' dropout.
    """

    module: nn.Module
    adapters: tuple[tuple[str, Config], ...]
    active: tuple[str, ...]
    keymap: KeyMap | str | None = None
    dtype: Any = None
    data: Mapping[str, Mapping[str, Any]] = dataclasses.field(
        default_factory=dict[str, Mapping[str, Any]], repr=False, compare=False
    )
    deterministic: bool | None = None
    layout: RowLayout | None = dataclasses.field(default=None, repr=False)
    rows: Rows | None = dataclasses.field(default=None, repr=False, compare=False)
    # Signatures of calls that were checked: they read no adapted weight outside its module.
    _checked: set[Hashable] = dataclasses.field(default_factory=set[Hashable], init=False, repr=False, compare=False)
    # Holds "dropout" after a call had that stream, or after the warning that it lacked one. Clones share the set.
    _seen_streams: set[str] = dataclasses.field(default_factory=set[str], repr=False, compare=False, kw_only=True)

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
        """Return an attribute of the module, for example for `apply(…, method=model.encode)`."""
        # "module" is missing while copy or pickle builds an instance; dunder names are protocol look-ups by Python.
        if name == "module" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise AttachError(
            "an adapted Linen module cannot be part of another module; call it with apply(variables, …). To adapt a"
            " part of a model, adapt the outermost module, and select the part's layers with target_modules"
        )

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Initialise the variables, `{"params": base, …, "lora": {name: tree}}`.

        The base values are bit for bit those of the module's `init`. Under `jax.eval_shape` the result is abstract.

        Args:
            rngs: a key or `{stream: key}`. The initial values of an adapter come from the stream that is named like its
                collection ("lora"), else from a key folded from "params".
            args: the positional arguments of the module's `init`.
            kwargs: the keyword arguments of the module's `init`.

        Raises `TargetError`, `KeyMapError` or `AttachError` for modules that the configuration selects and that cannot
        be adapted.
        """
        plans = self._plan_adapters(rngs, args, kwargs)
        return self._add_adapters(plans, rngs, self.module.init(rngs, *args, **kwargs))

    def init_with_output(self, rngs: Any, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Return the output of the module's `init_with_output`, without adapters, and the variables as from `init`.

        A new adapter with default initial values does not change the output.
        """
        plans = self._plan_adapters(rngs, args, kwargs)
        y, variables = self.module.init_with_output(rngs, *args, **kwargs)
        return y, self._add_adapters(plans, rngs, variables)

    def _plan_adapters(self, rngs: Any, args: Any, kwargs: Any) -> dict[str, tuple[Recipe, Sites]]:
        """Return `{name: (recipe, sites)}` from shapes only, so that all checks run before any computation."""
        has_prompt = any(get_method(config).scope == "model" for _, config in self.adapters)
        sizes = measure_base(self.module, rngs, args, kwargs) if has_prompt else BaseSizes()
        model = survey_module(self.module, rngs, args, kwargs)
        own = {collection_name(config) for _, config in self.adapters}
        occupied = model.collections & (own | set(map(integers_name, own)))
        if occupied:
            raise AttachError(
                f"cannot add the adapter: the module has a collection {sorted(occupied)} of its own. Rename that"
                " collection in the module"
            )
        keymap = resolve_keymap(self.keymap, model.shapes)
        entries = model.entries(keymap)
        plans: dict[str, tuple[Recipe, Sites]] = {}
        for name, config in self.adapters:
            method = get_method(config)
            if isinstance(method, PromptMethod):
                config = method.complete(config, with_width(sizes, keymap, model.shapes))
            plans[name] = make_recipe(config, keymap, model.shapes, entries, check=model.check)
        for _, sites in plans.values():
            model.check_saved([s.leaf for s in sites if s.method.copies and s.hparams.because == "modules_to_save"])
        return plans

    def _add_adapters(self, plans: Mapping[str, Any], rngs: Any, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Return the variables with the collections of new adapters."""
        out = dict(variables)
        leaves = paths.flatten(variables.get("params", {}))
        base = {path: collections.unbox_tree(leaf) for path, leaf in leaves.items()}
        for name, (recipe, sites) in plans.items():
            key = _adapter_key(rngs, collection_name(recipe.config), name)
            shardings = collections.base_shardings(leaves)
            values = initial_values.init_values(
                recipe.config, sites, key, self.dtype, base=base, base_shardings=shardings
            )
            adapter = Adapter(recipe.config, paths.unflatten(values), recipe.keymap)
            for collection, tree in box_like_base(adapter, leaves).named(name).items():
                out[collection] = {**out.get(collection, {}), **tree}
        return out

    def apply(self, variables: Mapping[str, Any], *args: Any, mutable: Any = False, **kwargs: Any) -> Any:
        """Call the module's `apply` with the active adapters.

        The adapters' dropout is on if `rngs` has a stream "dropout", unless the field `deterministic` says otherwise.
        With `deterministic=None` a wrapper warns once if no call so far had that stream.

        Args:
            variables: the variables as from `init`.
            args: the positional arguments of the module's `apply`.
            mutable: as for the module's `apply`. If it includes the adapters' collections, they are returned unchanged.
            kwargs: the keyword arguments of the module's `apply`: `rngs`, `method` and others.

        Returns what the module's `apply` returns.

        Raises `AttachError` if the variables lack an active adapter or its configuration, if the configuration is not
        the wrapper's, if the call uses an adapted weight where no adapter can follow, or if `rngs` has a stream
        "dropout" that an adapted layer with dropout does not see (see `split_rngs` of `nn.scan`).
        """
        overlay = self._make_overlay(variables, kwargs.get("rngs"))
        self._check_reads(overlay, args, kwargs, mutable)

        def call(variables: Any, *args: Any, **kwargs: Any) -> Any:
            with nn.intercept_methods(overlay.interceptor):
                return self.module.apply(variables, *args, mutable=mutable, **kwargs)

        variables = overlay.module_variables()
        if overlay.prompt is None:
            out = call(variables, *args, **kwargs)
        else:
            out = call_module(self.module, overlay.prompt, call, variables, args, kwargs)
        if mutable is False:
            return out
        y, changed = out
        return y, overlay.restore(changed, mutable)

    def bind(self, variables: Mapping[str, Any], *args: Any, **options: Any) -> BoundModule:
        """Bind the module and its active adapters to variables, for interactive use.

        Args:
            variables: the variables as from `init`.
            args: the positional arguments of the module's `bind`.
            options: the keyword arguments of the module's `bind`: `rngs` and `mutable`.
        """
        overlay = self._make_overlay(variables, options.get("rngs"))
        if overlay.prompt is not None:
            raise AttachError("cannot bind a module to an adapter with virtual tokens; call apply")

        def check(method: str, args: Any, kwargs: Any) -> None:
            self._check_reads(overlay, args, {**kwargs, "method": method, "rngs": options.get("rngs")}, True)

        return BoundModule(self.module.bind(overlay.module_variables(), *args, **options), overlay, check)

    def notes(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> dict[str, str]:
        """Return `{leaf: note}` on how each adapted weight is followed in one abstract `apply`."""
        overlay = self.clone(deterministic=True)._make_overlay(variables, None)
        recorder = UseRecorder(overlay.interceptor.sites, overlay.interceptor.quantized_scopes)
        with nn.intercept_methods(recorder):
            jax.eval_shape(lambda: self.module.apply(overlay.module_variables(), *args, **kwargs))
        return recorder.notes

    def tabulate(self, rngs: Any, *args: Any, **kwargs: Any) -> str:
        """Return the base module's own table. `jaxadapt.summary` shows the adapters."""
        return self.module.tabulate(rngs, *args, **kwargs)

    def _check_dropout(self, names: Collection[str], has_stream: bool) -> None:
        """Raise, or warn once, if these adapters have dropout and a call has no random stream for it."""
        if has_stream:
            self._seen_streams.add(DROPOUT)
        elif names and not self.deterministic:
            problem = f'{", ".join(names)}: dropout is off, because this call has no rngs={{"{DROPOUT}": key}}'
            if self.deterministic is False:
                raise AttachError(f"{problem}, but deterministic=False asks for it. Pass that stream to the call")
            if DROPOUT not in self._seen_streams:
                self._seen_streams.add(DROPOUT)
                warn(f"{problem}. Pass it in training, and evaluate with model.clone(deterministic=True)")

    def _make_overlay(self, variables: Mapping[str, Any], rngs: Any) -> Overlay:
        """Return the overlay of one call, after the check for dropout without a random stream."""
        has_stream = not self.deterministic and isinstance(rngs, Mapping) and DROPOUT in rngs
        overlay = build_overlay(variables, dict(self.adapters), self.active, self.data, has_stream)
        if self.layout is not None:
            overlay = add_rows(overlay, self.layout, self.rows)
        self._check_dropout(overlay.with_dropout, has_stream)
        return overlay

    def _check_reads(self, overlay: Overlay, args: Any, kwargs: Any, mutable: Any) -> None:
        """Raise `AttachError` if a call reads an adapted weight outside the weight's module.

        Each call signature is checked once.
        """
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
        check_reads(run, {path: list(leaves) for path, leaves in sites.items()}, params)
        self._warn_of_missing(overlay, lambda: called_scopes(run, params))
        if len(self._checked) >= _CACHE_SIZE:
            self._checked.clear()
        self._checked.add(signature)

    def _warn_of_missing(self, overlay: Overlay, called: Callable[[], Collection[tuple[str, ...]]]) -> None:
        """Warn of targeted weights that a call uses and an adapter lacks.

        An `init` whose call does not reach a layer creates no adapter tensors for it.
        """
        keys_by_leaf = key_paths(overlay.base["params"])
        base = collections.unbox_tree(overlay.base["params"])
        shapes = {leaf: tuple(collections.lookup(base, keys).shape) for leaf, keys in keys_by_leaf.items()}
        for name, adapter in overlay.active.items():
            missing = selection.unselected_matrices(adapter.config, adapter.keymap, shapes, adapter.sites)
            scopes = called() if missing else ()
            used = [leaf for leaf in missing if keys_by_leaf[leaf][:-1] in scopes]
            if used:
                warn(
                    "this call uses weights that target_modules selects and that are not adapted, because the adapter"
                    f" {name!r} lacks tensors for them: its init did not call their modules. Call init with arguments"
                    f" that do, or use jaxadapt.init(params, config, key=…):\n{paths.bullets(used)}"
                )


def _signature(call: Any) -> Hashable:
    """Return the structure and the non-array arguments of a call. Shapes are assumed not to select the model's code."""
    leaves, tree = jax.tree.flatten(call)
    return tree, tuple(
        None if is_array(leaf) else leaf if isinstance(leaf, Hashable) else repr(leaf) for leaf in leaves
    )


def _adapter_key(rngs: Any, collection: str, name: str) -> Any:
    """Return the key for an adapter's initial values, from the stream named like its collection or from "params"."""
    if isinstance(rngs, Mapping):
        rngs = rngs[collection] if collection in rngs else rngs.get("params", next(iter(rngs.values())))
    return jax.random.fold_in(rngs, zlib.crc32(f"{collection}.{name}".encode()))


def box_like_base(adapter: Adapter, base: Mapping[str, Any]) -> Adapter:
    """Return the adapter with each tensor boxed like its base weight, so that `nn.get_partition_spec` works on it.

    Args:
        base: the base parameters with their boxes, nested or by dotted path.
    """
    boxes = {leaf: box for leaf, box in paths.flatten(base).items() if isinstance(box, meta.Partitioned)}
    if not boxes:
        return adapter
    values = adapter.flat()
    for site in sites_of(adapter):
        if site.leaf in boxes:
            box = boxes[site.leaf]
            for entry in site.entries:
                names = initial_values.propagate_axes(site.match, entry.form, tuple(box.names))
                values[entry.path] = box.replace(value=values[entry.path], names=names)
    return dataclasses.replace(adapter, params=paths.unflatten(values))


@dataclasses.dataclass(frozen=True)
class BoundModule:
    """A bound module whose calls, and those of its submodules, apply the adapters."""

    module: Any
    overlay: Overlay
    check: Callable[[str, Any, Any], None] | None = None  # None for submodules

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._wrap_call(self.module, "__call__")(*args, **kwargs)

    @property
    def variables(self) -> Any:
        """The variables, including the adapters' collections."""
        return self.overlay.restore(self.module.variables, True)

    def unbind(self) -> tuple[nn.Module, Any]:
        """Return the unbound base module and the variables, including the adapters' collections."""
        module, variables = self.module.unbind()
        return module, self.overlay.restore(variables, True)

    def __getattr__(self, name: str) -> Any:
        return self._wrap(getattr(self.module, name), name)

    def _wrap(self, value: Any, name: str = "") -> Any:
        """Return an attribute with its modules and functions wrapped, so that their calls apply the adapters."""
        if isinstance(value, nn.Module):
            return BoundModule(value, self.overlay)
        if type(value) in (list, tuple):
            return type(value)(self._wrap(v) for v in value)
        if isinstance(value, Mapping):
            return {k: self._wrap(v) for k, v in value.items()}
        return self._wrap_call(value, name) if callable(value) else value

    def _wrap_call(self, f: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.check is not None and name:
                self.check(name, args, kwargs)
            with nn.intercept_methods(self.overlay.interceptor):
                return f(*args, **kwargs)

        return call
