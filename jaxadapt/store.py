"""Save and load: the whole path on one page.

    model / variables ──extract──► Adapter ──plan.encode──► PeftTensors ──folder.write──► files
                      ◄──attach──          ◄─plan.decode──              ◄──folder.read───
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxadapt import (
    attach,
    bind,
    embeddings,
    families,
    folder,
    foreign,
    hub,
    linen,
    methods,
    nnx,
    nnx_survey,
    orbax_folder,
    paths,
    sharding,
    targets,
    together,
    transfer,
)
from jaxadapt.adapter import Adapter, PeftTensors, Recipe
from jaxadapt.codecs import orbax
from jaxadapt.configs import Config
from jaxadapt.errors import AdapterError, AttachError, ConfigError, FileError, MismatchError
from jaxadapt.keymap import PEFT_PREFIX, KeyMap
from jaxadapt.plan import Encoded


def to_peft(
    tree: Any,
    name: str = attach.DEFAULT,
    *,
    config: Config | None = None,
    keymap: KeyMap | str | None = None,
    lora_alpha: float | None = None,
) -> PeftTensors:
    """An adapter under PEFT's names and in PyTorch's layout, in memory.

    Args:
        tree: what `extract` takes: an `Adapter`, an NNX model or state, Linen variables, another library's tree.
        config, keymap: only where the tree lost them, or to rename by another table.
        lora_alpha: of another library's tree, where it stores none.

    The tensors are made when they are asked for, as numpy views where the layouts allow (inside jit: as
    traced arrays). Raises `AttachError` or `KeyMapError`.

    >>> import jax, jaxadapt
    >>> base = {"q": {"kernel": jax.ShapeDtypeStruct((4, 6), "float32")}}
    >>> adapter = jaxadapt.init(jaxadapt.LoraConfig(r=2, target_modules=["q"]), base, key=jax.random.key(0))
    >>> {key: x.shape for key, x in to_peft(adapter).tensors.items()}
    {'base_model.model.q.lora_A.weight': (2, 4), 'base_model.model.q.lora_B.weight': (6, 2)}
    """
    return _to_peft(tree, name, config, keymap, lora_alpha, None, "it is one already", traced=True)


def _to_peft(
    tree: Any,
    name: str,
    config: Config | None,
    keymap: Any,
    lora_alpha: float | None,
    dtype: Any,
    instead: str,
    traced: bool,
) -> PeftTensors:
    guest = tree if isinstance(tree, foreign.Found) else None
    if guest is None and not isinstance(tree, Adapter | PeftTensors):
        guest = attach.guest_in(tree)
    if guest is not None:
        with_values(guest.leaves, traced, elsewhere=not traced)
        call = "to_peft(tree" if traced else "save(tree, path"
        config, known, _ = foreign.take(guest, config, keymap, lora_alpha, call)
        host = not any(isinstance(leaf, Tracer) for leaf in guest.leaves.values())
        return PeftTensors(config, known.plan.encode(guest.leaves, dtype, host), f"this {guest.dialect.name} tree")
    if lora_alpha is not None:
        raise ConfigError("lora_alpha is for the trees of other libraries; an adapter of this one carries its own")
    adapter = _extract(tree, name, config, keymap, instead)
    with_values(adapter.flat(), traced, elsewhere=not traced)
    return _encoded(adapter, keymap, dtype)


def _extract(tree: Any, name: str, config: Config | None, keymap: Any, instead: str) -> Adapter:
    if isinstance(tree, PeftTensors):
        raise AttachError(f"expected an adapter in a model's layout, found PeftTensors; {instead}")
    adapter = attach.extract(tree, name, config=config, keymap=keymap)
    return adapter if config is None else dataclasses.replace(adapter, config=config)


def with_values(leaves: Mapping[str, Any], traced: bool, elsewhere: bool = False) -> None:
    """Raise `AttachError` where a parameter has no value that could leave the program."""

    def why(leaf: Any) -> str | None:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return "abstract: a shape only"
        if isinstance(leaf, Tracer):
            return None if traced else "traced: inside jit, grad or vmap"
        if isinstance(leaf, jax.Array) and leaf.is_deleted():
            return "deleted: it was donated to a jitted function"
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and not elsewhere:
            return "partly in other processes, where only save can follow"
        return None

    problems = [f"{path}: {reason}" for path, leaf in leaves.items() if (reason := why(leaf))]
    if problems:
        raise AttachError("these parameters have no values to save:\n" + paths.listing(problems))


def warn_unproved(table: KeyMap, level: int) -> None:
    """Say so where a table is used to write that has not been proved; `level` as in `warnings.warn`."""
    if not table.proved:
        warnings.warn(
            f"the table {table.name!r} is not proved against the real models: compare the outputs in PyTorch before you"
            " rely on what it names",
            stacklevel=level,
        )


def _encoded(adapter: Adapter, keymap: KeyMap | str | None, dtype: Any = None) -> PeftTensors:
    adapter = _renamed(adapter, keymap)
    config, table = adapter.config, adapter.keymap
    warn_unproved(table, 5)
    bounds = bind.recover(config, table, _shapes(adapter))
    astray = [m for b in bounds if not b.method.replaces for m in b.modules if not targets.matches(config, m)]
    if astray:
        raise MismatchError(
            "these modules carry tensors, but target_modules of the configuration does not name them, so a reader would"
            " drop them:\n" + paths.listing(astray)
        )
    leaves = adapter.flat()
    host = not any(isinstance(leaf, Tracer) for leaf in leaves.values())
    encoded = bind.file_plan(bounds).encode(leaves, dtype, host)
    return PeftTensors(config, encoded, "this adapter")


def _shapes(adapter: Adapter) -> dict[str, dict[str, tuple[int, ...]]]:
    return {leaf: {t: tuple(a.shape) for t, a in ts.items()} for leaf, ts in adapter.sites.items()}


def _renamed(adapter: Adapter, keymap: KeyMap | str | None) -> Adapter:
    """The adapter as another table names it."""
    if keymap in (None, "auto"):
        return adapter
    before = bind.recover(adapter.config, adapter.keymap, _shapes(adapter))
    table = families.resolve(keymap, {})
    return dataclasses.replace(adapter, config=bind.renamed(adapter.config, before, table), keymap=table)


def save(
    tree: Any,
    path: str | os.PathLike[str],
    *,
    name: str = attach.DEFAULT,
    config: Config | None = None,
    keymap: KeyMap | str | None = None,
    lora_alpha: float | None = None,
    base_model: str | None = None,
    dtype: Any = None,
    save_embedding_layers: bool | str = "auto",
    format: str = "safetensors",  # noqa: A002 (what it is called everywhere)
    shared: bool | None = None,
    timeout: float = 300,
) -> None:
    """Write an adapter, and nothing but the adapter, as a folder that PEFT reads.

    Two arguments do for whatever this library made: NNX models and states, Linen variables, `Adapter`s,
    after any number of jitted updates. An adapter not called "default" goes to the subfolder of its name,
    as PEFT puts it.

    The LoRA leaves of another library (Qwix, `nnx.LoRA`, gemma, …) are recognised by their paths; rank and
    `target_modules` follow from the tree.

    Args:
        config: where the tree has lost its configuration, or never had one (the error says so).
        keymap: to name the tensors by another table than the one the model was adapted with.
        lora_alpha: of another library's tree, where it stores none; instead of `config`.
        base_model: what `base_model_name_or_path` shall say; never looked up anywhere.
        dtype: of the tensors in the file; as in memory by default.
        save_embedding_layers: whether the base's table of tokens and head go into the file too, as PEFT has it: "auto"
            where they are adapted under the names "embed_tokens" or "lm_head" and the tree has their values; true
            always, for a vocabulary that was resized; false never.
        format: "orbax" for an Orbax checkpoint instead: the parameters in the model's layout and the configuration,
            in one commit, at a path where nothing is yet. With several processes all of them call `save`.
        shared, timeout: of arrays of which several processes hold parts; then all of them call `save`, and each writes
            its own bytes into the one file at once. `shared=False`: the processes have no file system in common (None:
            found out), and everything goes through process 0, a leaf at a time. One that fails, dies or stays away
            ends the save in all, with an error, within `timeout` seconds.

    Durable and atomic; raises `AdapterError` (what is wrong, and the way out), and then the old adapter is
    still there, whole.
    """
    if format not in ("safetensors", "orbax"):
        raise FileError(f"{path}: format {format!r}: expected 'safetensors' or 'orbax'")
    instead = "jaxadapt.write(tensors, path) writes them"
    changes: dict[str, Any] = {"inference_mode": True}
    if base_model is not None:
        changes["base_model_name_or_path"] = base_model
    if format == "orbax":
        _refuse({"lora_alpha": lora_alpha}, "format='orbax' takes this library's adapters, which carry their own")
        adapter = _renamed(_extract(tree, name, config, keymap, instead), keymap)
        with_values(adapter.flat(), traced=False, elsewhere=True)
        adapter = dataclasses.replace(adapter, config=adapter.config.replace(**changes))
        if dtype is not None:
            adapter = jax.tree.map(lambda x: x.astype(dtype), adapter)
        orbax_folder.write(adapter, _under(path, name), alone=jax.process_count() == 1)
        return
    tensors = _to_peft(tree, name, config, keymap, lora_alpha, dtype, instead, traced=False)
    tensors = _with_embeddings(tensors, tree, name, config, keymap, save_embedding_layers)
    tensors = dataclasses.replace(tensors, config=tensors.config.replace(**changes))
    if isinstance(tensors.tensors, Encoded) and together.spread(tensors.tensors.leaves.values()):
        together.write(tensors, _below(path, name), shared, timeout)
    else:
        folder.write(tensors, _below(path, name))


def _with_embeddings(
    tensors: PeftTensors, tree: Any, name: str, config: Config | None, keymap: Any, wanted: bool | str
) -> PeftTensors:
    held = tensors.tensors
    if not embeddings.perhaps(tensors.config, wanted) or not isinstance(held, Encoded) or attach.guest_in(tree):
        return tensors
    adapter = _renamed(_extract(tree, name, config, keymap, ""), keymap)
    bounds = bind.recover(adapter.config, adapter.keymap, _shapes(adapter))
    has_base = isinstance(tree, nnx.nnx.Module) or (isinstance(tree, Mapping) and "params" in tree)
    base = attach.base_of(tree) if has_base else None
    return dataclasses.replace(
        tensors, tensors=embeddings.added(held, adapter.config, adapter.keymap, bounds, base, wanted)
    )


def _under(path: str | os.PathLike[str], name: str) -> str | os.PathLike[str]:
    """As `_below`, for addresses too, which a `Path` would mangle."""
    text = os.fspath(path)
    below = _below("", name)
    return _below(path, name) if "://" not in text else text if name == attach.DEFAULT else f"{text}/{below}"


def _below(path: str | os.PathLike[str], name: str) -> Path:
    """The folder of an adapter called `name`: PEFT puts all but "default" into a subfolder."""
    if hub.is_address(path):
        raise FileError(f"{path}: expected a folder; jaxadapt.push(model, 'org/name') sends it to the Hub")
    if name == attach.DEFAULT:
        return Path(path)
    if name in ("", ".", "..") or set(name) & set("/\\\0"):
        raise FileError(f"{path}: {name!r} cannot name a subfolder; choose a name without slashes")
    return Path(path) / name


def from_peft(
    tensors: PeftTensors,
    target: Any,
    *,
    keymap: KeyMap | str | None = None,
    dtype: Any = None,
    stack_axes: Sequence[int] | None = None,
    example: Sequence[Any] | None = None,
    shardings: Any = None,
) -> Adapter:
    """PEFT's tensors as an adapter in the layout of `target`.

    Args:
        target: an NNX model, Linen variables, base parameters, or the shapes of any of them.
        keymap, dtype, stack_axes, example, shardings: as in `load`.

    Raises `MismatchError` listing every missing, unexpected, wrongly shaped or unusable tensor.
    """
    return _decoded(tensors, target, keymap, dtype, stack_axes, example, shardings)[0]


def _decoded(
    tensors: PeftTensors, target: Any, keymap: Any, dtype: Any, stack_axes: Any, example: Any, shardings: Any
) -> tuple[Adapter, tuple[bind.Bound, ...]]:
    """The adapter, and its sites."""
    if not isinstance(tensors, PeftTensors):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise AttachError(
            f"expected PeftTensors (from read or to_peft), found {type(tensors).__name__};"
            " jaxadapt.inject puts an Adapter into a model"
        )
    try:
        keys = [key.removeprefix(PEFT_PREFIX) for key in tensors.tensors]
        recipe, bounds = _plan_for(target, tensors.config, keymap, keys, stack_axes, example)
        plan = bind.file_plan(bounds)
    except AdapterError as error:
        raise type(error)(f"{tensors.source}: {error}") from error
    specs = transfer.specs(tensors.tensors)
    dtypes = {key: spec.dtype for key, spec in specs.items()}
    odd = [f"{k}: {d.name}, expected floats" for k, d in dtypes.items() if not jnp.issubdtype(d, jnp.floating)]
    shapes = {key: spec.shape for key, spec in specs.items()}
    if shapes.keys() - plan.keys.keys():
        base = attach.base_of(target)
        of_base = embeddings.carried(tensors.tensors, shapes, plan.keys, recipe.keymap, base, tensors.source)
        shapes = {key: shape for key, shape in shapes.items() if key not in of_base}
    plan.check(shapes, tensors.source, odd, recipe.keymap.name)
    if dtype is None and np.dtype("float64") in dtypes.values() and jnp.zeros(0, float).dtype != "float64":
        warnings.warn(
            f"{tensors.source}: float64 tensors become float32, since jax_enable_x64 is off", stacklevel=3
        )
    where = _where(shardings, target, bounds)
    leaves = transfer.arrays(plan, tensors.tensors, dtypes, dtype, where)
    return Adapter(recipe.config, paths.unflatten(leaves), recipe.keymap), bounds


def _where(shardings: Any, target: Any, bounds: Sequence[bind.Bound]) -> dict[str, Any]:
    """`{path: sharding}`: what was asked for, else what follows from the base."""
    if shardings is not None:
        return sharding.asked(shardings.params if isinstance(shardings, Adapter) else shardings, bounds)
    base = target["params"] if isinstance(target, Mapping) and "params" in target else target
    return sharding.for_adapter(bounds, attach.placement(base))


def _plan_for(
    target: Any, config: Config, keymap: KeyMap | str | None, keys: Sequence[str], stack_axes: Any, example: Any
) -> tuple[Recipe, tuple[bind.Bound, ...]]:
    """The recipe and sites on `target`, with the names spelt as in the file's `keys`."""
    methods.of(config)
    if isinstance(target, linen.Adapted | linen.nn.Module):
        raise AttachError(
            "a Linen module holds no parameters; give the variables, {'params': …}, as the target"
        )
    if isinstance(target, nnx.nnx.Module):
        known = [v for by_path in nnx.variables(target).values() for v in by_path.values()]
        if known and keymap is None:
            keymap = known[0].get_metadata()["adapter"].recipe.keymap
        shapes = nnx_survey.base_shapes(nnx.base_leaves(target))
        table = families.resolve(keymap, shapes).spelt_as(keys, shapes)
        return attach.plan_nnx(target, config, table, stack_axes, example)
    if not isinstance(target, Mapping | nnx.nnx.State):
        raise AttachError(
            f"expected an NNX model or Linen variables as the target, found {type(target).__name__}"
        )
    params = target["params"] if "params" in target else target  # noqa: SIM401 (a State has no get)
    if keymap is None:
        keymap = _attached_table(target)
    shapes = attach.tree_shapes(params)
    return attach.plan_tree(params, config, families.resolve(keymap, shapes).spelt_as(keys, shapes))


def _attached_table(variables: Any) -> KeyMap | None:
    for collection in linen.collections(variables).values():
        for name, tree in collection.items():
            return linen.read_collection(tree, name).keymap
    return None


def load(
    path: str | os.PathLike[str],
    target: Any,
    *,
    name: str = attach.DEFAULT,
    keymap: KeyMap | str | None = None,
    dtype: Any = None,
    replace: bool = False,
    rngs: Any = None,
    stack_axes: Sequence[int] | None = None,
    example: Sequence[Any] | None = None,
    shardings: Any = None,
    lora_alpha: float | None = None,
    on_shared: str | None = None,
) -> Any:
    """Read an adapter folder (ours or PEFT's) into a model.

    Into a model, variables or any pytree with another library's LoRA leaves (Qwix, `nnx.LoRA`, gemma, …) the values go
    where those leaves are, with nothing attached.

    Args:
        path: the folder, or an address of the Hub, "hf://org/name@revision/subfolder"; for a `name` other than
            "default" its subfolder of that name, if there is one.
        target: an NNX model, plain or adapted, changed in place and returned; or Linen variables
            (`{"params": base}` is enough), returned with the collection added. Abstract ones work too.
        name: what the adapter is called on this model; it becomes the active one.
        keymap: the model's family, a `KeyMap`, or None to recognise it.
        dtype: of the parameters in memory; the file's by default.
        replace: an attached adapter of that name with another configuration gives way.
        rngs: NNX: for dropout in further training; without it dropout is off.
        stack_axes, example: as in `adapt`.
        shardings: where the parameters shall be: one `Sharding` for all, or a tree of them like the adapter's (an
            `Adapter` or nested dicts). By default each follows the base weight it adapts, axis by axis; the rank is
            replicated. A process reads only the bytes that its own devices hold.
        lora_alpha: the alpha by which another library's target scales, where its tree does not tell. If the file's
            scale differs, B is multiplied accordingly.
        on_shared: "concat" puts different As side by side where such a target has one for several modules, if its rank
            has room; by default they are refused.

    The base is never touched, and nothing is attached unless everything fits. Raises `AdapterError`,
    `MismatchError` with all missing, unexpected and wrongly shaped tensors together.
    """
    if isinstance(path, str) and hub.is_address(path):
        path = hub.folder_of(path, None if name == attach.DEFAULT else name)
    below = _below(path, name)
    guest = attach.guest_in(target)
    if guest is not None:
        unused = {
            "replace": replace or None, "rngs": rngs, "stack_axes": stack_axes, "example": example,
            "shardings": shardings,
        }  # fmt: skip
        _refuse(unused, f"the target has {guest.dialect.name} leaves already, where the values go")
        tensors = folder.read(below if (below / folder.CONFIG).exists() else path)
        return foreign.put(
            guest, tensors.config, tensors.tensors, keymap=keymap, lora_alpha=lora_alpha, on_shared=on_shared,
            dtype=dtype, source=tensors.source,
        )  # fmt: skip
    _refuse({"lora_alpha": lora_alpha, "on_shared": on_shared}, "for targets with another library's LoRA leaves only")
    if isinstance(target, nnx.nnx.State) or (isinstance(target, Mapping) and "params" not in target):
        raise AttachError(
            f"expected an NNX model or Linen variables, {{'params': …}}, as the target, found {type(target).__name__};"
            " for bare parameters, from_peft(read(path), params) gives the adapter"
        )
    checkpoint = next((p for p in (_under(path, name), path) if orbax.found(p)), None)
    if checkpoint is not None:
        adapter, bounds = _from_orbax(checkpoint, target, name, (keymap, dtype, stack_axes, example, shardings))
        source = os.fspath(checkpoint)
    else:
        with folder.opened(below if (below / folder.CONFIG).exists() else path) as tensors:
            adapter, bounds = _decoded(tensors, target, keymap, dtype, stack_axes, example, shardings)
        source = tensors.source
    present = _attached_config(target, name)
    if present is not None and present != adapter.config and not replace:
        raise ConfigError(
            f"{source}: its configuration differs from that of the attached adapter {name!r} in"
            f" {present.differences(adapter.config)}; load(…, replace=True) takes the file's, and"
            " load(…, name=…) keeps both"
        )
    if not isinstance(target, nnx.nnx.Module):
        bare = target if present is None else attach.delete(target, name)
        return attach.with_adapter(bare, adapter, name)
    if present is not None and present == adapter.config and Recipe(present).origin == adapter.recipe.origin:
        nnx.inject(adapter, target, name)
        nnx.activate(target, (name,))
        return target
    if present is not None or rngs is not None:
        _rehearse(target, adapter, bounds, name, rngs)
    if present is not None:
        nnx.delete(target, name)
    nnx.attach(target, adapter.recipe, bounds, name, adapter.flat(), rngs)
    return target


def _refuse(given: Mapping[str, Any], why: str) -> None:
    unused = [what for what, value in given.items() if value is not None]
    if unused:
        raise AttachError(f"{', '.join(unused)}: {why}")


def _from_orbax(
    path: str | os.PathLike[str], target: Any, name: str, options: tuple[Any, Any, Any, Any, Any]
) -> tuple[Adapter, tuple[bind.Bound, ...]]:
    """The adapter of an Orbax checkpoint in the layout of the target, and its sites."""
    keymap, dtype, stack_axes, example, shardings = options
    attached = attach.extract(target, name) if _attached_config(target, name) is not None else None
    found = orbax_folder.find(path, attached, name)
    ours = bind.recover(found.adapter.config, found.adapter.keymap, _shapes(found.adapter))
    keys = [key.removeprefix(PEFT_PREFIX) for b in ours for e in b.entries for key in e.keys]
    recipe, bounds = _plan_for(target, found.adapter.config, keymap, keys, stack_axes, example)
    theirs, mine = ({e.path: (e.shape, e.keys) for b in bs for e in b.entries} for bs in (bounds, ours))
    if theirs != mine:  # laid out otherwise (scanned, fused, another table): by way of PEFT's names
        return _decoded(orbax_folder.tensors(orbax_folder.read(path, found), path), target, *options)
    where = _where(shardings, target, bounds)
    like = {p: jax.ShapeDtypeStruct(theirs[p][0], jnp.float32, sharding=place) for p, place in where.items()}
    if attached is not None and shardings is None:
        like |= attached.flat()
    adapter = orbax_folder.read(path, found, like)
    flat = adapter.flat()
    if dtype is not None:
        flat = {p: x.astype(dtype) for p, x in flat.items()}
    return Adapter(recipe.config, paths.unflatten(jax.tree.map(jnp.asarray, flat)), recipe.keymap), bounds


def _rehearse(model: Any, adapter: Adapter, bounds: Sequence[bind.Bound], name: str, rngs: Any) -> None:
    """Attach to an abstract copy first: what fails there must not cost the model the adapter it has."""
    graphdef, state = nnx.nnx.split(model)
    copy = nnx.nnx.merge(graphdef, jax.eval_shape(lambda: state))
    if name in nnx.names(copy):
        nnx.delete(copy, name)
    rngs = None if rngs is None else nnx.nnx.clone(rngs)
    nnx.attach(copy, adapter.recipe, bounds, name, adapter.flat(), rngs)


def _attached_config(target: Any, name: str) -> Config | None:
    if isinstance(target, nnx.nnx.Module):
        return nnx.extract(target, name).config if name in nnx.names(target) else None
    for collection in linen.collections(target).values():
        if name in collection:
            return linen.read_collection(collection[name], name).config
    return None
