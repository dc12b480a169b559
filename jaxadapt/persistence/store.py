"""Save and load: the whole path on one page.

model / variables ──extract──► Adapter ──plan.encode──► PeftTensors ──folder.write──► files
                  ◄──attach──          ◄─plan.decode──              ◄──folder.read───
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxadapt.adapters import embeddings, sites
from jaxadapt.adapters.adapter import Adapter, PeftTensors, Recipe, name_donated_arrays
from jaxadapt.configs import Config, lora_variants
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, ConfigError, FileError, MismatchError
from jaxadapt.core.progress import LOGGER, Progress, Report, reporter
from jaxadapt.initializers import original_base
from jaxadapt.keymaps.keymap import PEFT_PREFIX, KeyMap
from jaxadapt.keymaps.plan import Encoded
from jaxadapt.models import attachment, base_params, planning
from jaxadapt.models.foreign import tree as foreign
from jaxadapt.models.linen import collections
from jaxadapt.models.nnx import attach as nnx
from jaxadapt.persistence import folder, multihost, orbax_folder, peft
from jaxadapt.storage import hub, location, orbax
from jaxadapt.storage.location import Place


def save(
    tree: Any,
    path: str | os.PathLike[str],
    *,
    name: str = attachment.DEFAULT,
    config: Config | None = None,
    keymap: KeyMap | str | None = None,
    lora_alpha: float | None = None,
    base_model: str | None = None,
    dtype: Any = None,
    save_embedding_layers: bool | str = "auto",
    format: str = "safetensors",  # noqa: A002 (what it is called everywhere)
    shared: bool | None = None,
    timeout: float = 300,
    on_shared: str | None = None,
    progress: Progress = None,
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
            ends the save in all, with an error, within twice `timeout` seconds.
        on_shared: "concat" puts different As side by side where PyTorch has one for several of our weights (queries,
            keys and values of an `nn.MultiheadAttention`); by default they are refused.
        progress: None, True (a bar on a terminal or in a notebook) or a function of ("save", bytes done, bytes in all);
            of several processes each counts what it writes itself. An Orbax checkpoint is told of when it is there.

    Durable and atomic; raises `AdapterError` (what is wrong, and the way out), and then the old adapter is
    still there, whole, unless the error says that the new one is in place. A model card that cannot be written is a
    warning.

    >>> import tempfile, jax, jaxadapt
    >>> base = {"q": {"kernel": jax.numpy.ones((4, 6))}}
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> adapter = jaxadapt.init(config, base, key=jax.random.key(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save({"params": base, **adapter.collection}, folder)
    ...     sorted(jaxadapt.inspect(folder).tensors)
    ['base_model.model.q.lora_A.weight', 'base_model.model.q.lora_B.weight']
    """
    if format not in ("safetensors", "orbax"):
        raise FileError(f"{path}: format {format!r}: expected 'safetensors' or 'orbax'")
    instead = "jaxadapt.write(tensors, path) writes them"
    changes: dict[str, Any] = {"inference_mode": True}
    if base_model is not None:
        changes["base_model_name_or_path"] = base_model
    if format == "orbax":
        _refuse({"lora_alpha": lora_alpha}, "format='orbax' takes this library's adapters, which carry their own")
        adapter = peft.rename_adapter(peft.extract_adapter(tree, name, config, keymap, instead), keymap)
        peft.require_values(adapter.flat(), traced=False, elsewhere=True)
        adapter = dataclasses.replace(adapter, config=adapter.config.replace(**changes))
        if dtype is not None:
            with name_donated_arrays(adapter.flat()):
                adapter = jax.tree.map(lambda x: x.astype(dtype), adapter)
        with reporter(progress) as report:
            orbax_folder.write(adapter, _below(path, name), alone=jax.process_count() == 1)
            _told_at_once(report, "save", adapter)
        LOGGER.info("%s: an Orbax checkpoint of %d arrays written", _below(path, name), len(adapter.flat()))
        return
    tensors = peft.collect_tensors(tree, name, config, keymap, lora_alpha, dtype, instead, False, on_shared)
    tensors = _with_embeddings(tensors, tree, name, config, keymap, save_embedding_layers)
    tensors = peft.merge_joint_tensors(tensors, tree, name, config, keymap, on_shared, "save")
    tensors = dataclasses.replace(tensors, config=tensors.config.replace(**changes))
    if isinstance(tensors.tensors, Encoded) and multihost.is_distributed(tensors.tensors.leaves.values()):
        with reporter(progress) as report:
            multihost.write_shared(tensors, _below(path, name), shared, timeout, report)
    else:
        folder.write(tensors, _below(path, name), progress=progress)


def _with_embeddings(
    tensors: PeftTensors, tree: Any, name: str, config: Config | None, keymap: Any, wanted: bool | str
) -> PeftTensors:
    held = tensors.tensors
    if (
        not embeddings.may_need_embeddings(tensors.config, wanted)
        or not isinstance(held, Encoded)
        or attachment.find_foreign(tree)
    ):
        return tensors
    adapter = peft.rename_adapter(peft.extract_adapter(tree, name, config, keymap, ""), keymap)
    bounds = sites.sites_of(adapter)
    has_base = isinstance(tree, nnx.nnx.Module) or (isinstance(tree, Mapping) and "params" in tree)
    base = planning.base_arrays(tree) if has_base else None
    return dataclasses.replace(
        tensors, tensors=embeddings.add_embeddings(held, adapter.config, adapter.keymap, bounds, base, wanted)
    )


def _below(path: str | os.PathLike[str], name: str) -> Place:
    """The folder of an adapter called `name`: PEFT puts all but "default" into a subfolder."""
    if hub.is_address(path):
        raise FileError(f"{path}: expected a folder; jaxadapt.push(model, 'org/name') sends it to the Hub")
    if name == attachment.DEFAULT:
        return location.to_location(path)
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0"):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise FileError(f"{path}: {name!r} cannot name a subfolder; choose a name without slashes")
    return location.to_location(path) / name


def _holding(below: Place, path: str | os.PathLike[str]) -> Place:
    """The subfolder, if an adapter is in it; else the folder."""
    above = location.to_location(path)
    return below if below == above or location.exists(below / folder.CONFIG) else above


def load(
    path: str | os.PathLike[str],
    target: Any,
    *,
    name: str = attachment.DEFAULT,
    keymap: KeyMap | str | None = None,
    dtype: Any = None,
    replace: bool = False,
    rngs: Any = None,
    stack_axes: Sequence[int] | None = None,
    example: Sequence[Any] | None = None,
    shardings: Any = None,
    lora_alpha: float | None = None,
    on_shared: str | None = None,
    autocast_adapter_dtype: bool = False,
    on_mismatch: str | None = None,
    base: str | None = None,
    strict: bool = True,
    progress: Progress = None,
) -> Any:
    """Read an adapter folder (ours or PEFT's) into a model.

    Into a model, variables or any pytree with another library's LoRA leaves (Qwix, `nnx.LoRA`, gemma, …) the values go
    where those leaves are, with nothing attached.

    Args:
        path: the folder, an address of an object store ("s3://bucket/folder", "gs://…"), or of the Hub,
            "hf://org/name@revision/subfolder"; for a `name` other than "default" its subfolder of that name, if there
            is one.
        target: an NNX model, plain or adapted, changed in place and returned; or Linen variables
            (`{"params": base}` is enough), returned with the collection added. Abstract ones work too.
        name: what the adapter is called on this model; it becomes the active one.
        keymap: the model's family, a `KeyMap`, or None to recognise it.
        dtype: of the parameters in memory; the file's by default, and float32 for one of 8 bits. Into an
            attached adapter the wider of the two, so that training goes on in float32 from a file of 16 bits.
        autocast_adapter_dtype: as in PEFT, where it is the default: true makes float32 of what a file has in fewer
            bits.
        replace: an attached adapter of that name with another configuration gives way.
        rngs: NNX: for dropout in further training; without it dropout is off.
        stack_axes, example: as in `adapt`.
        shardings: where the parameters shall be: one `Sharding` for all, or a tree of them like the adapter's (an
            `Adapter` or nested dicts). By default each follows the base weight it adapts, axis by axis; the rank is
            replicated. A process reads only the bytes that its own devices hold.
        lora_alpha: the alpha by which another library's target scales, where its tree does not tell. If the file's
            scale differs, B is multiplied accordingly.
        on_mismatch: "skip" takes of tensors for another vocabulary the rows that the model has, with a warning; rows
            that the file lacks stay the base's. By default such a file is refused.
        on_shared: "concat" puts different As side by side where such a target has one for several modules, if its rank
            has room, and where a model has gate and up of all experts in one array, and the file a LoRA for each; by
            default they are refused.
        base: for an adapter whose initialisation took a part out of the base weights (PiSSA, OLoRA, …) and that was not
            converted: "original", the target has the weights as they were, and they are changed here as PEFT changes
            them on loading; "changed", the target has what was left of them. Without it such a file is refused.
        strict: False takes what fits and warns of the rest, as in `import_base`: tensors that the file lacks begin as
            in a fresh adapter (LoRA's A is drawn, from one seed, and B is 0; a copy of `modules_to_save` is the
            base's), and tensors that the model has no place for are left out. Wrong shapes are refused all the same,
            and so is a file of which nothing fits.
        progress: None, True (bars on a terminal or in a notebook) or a function of ("load", bytes done, bytes in all);
            of an address of the Hub also of each file that is fetched, by its name.

    Otherwise the base is never touched, and nothing is attached unless everything fits. Raises `AdapterError`,
    `MismatchError` with all missing, unexpected and wrongly shaped tensors together.

    >>> import tempfile, jax, jaxadapt
    >>> base = {"q": {"kernel": jax.numpy.ones((4, 6))}}
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> adapter = jaxadapt.init(config, base, key=jax.random.key(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     jaxadapt.save(adapter, folder)
    ...     variables = load(folder, {"params": base})
    >>> variables["lora"]["default"]["q"]["kernel"]["lora_B"].shape
    (6, 2)
    """
    if autocast_adapter_dtype:
        _refuse({"dtype": dtype}, "autocast_adapter_dtype=True asks for another; give one of them")
        dtype = peft.AUTOCAST
    if isinstance(path, str) and hub.is_address(path):
        with reporter(progress) as report:
            path = hub.fetch_folder(path, None if name == attachment.DEFAULT else name, report)
    below = _below(path, name)
    guest = attachment.find_foreign(target)
    if guest is not None:
        unused = {
            "replace": replace or None, "rngs": rngs, "stack_axes": stack_axes, "example": example,
            "shardings": shardings, "on_mismatch": on_mismatch,
            "autocast_adapter_dtype": autocast_adapter_dtype or None, "strict": None if strict else False,
        }  # fmt: skip
        _refuse(unused, f"the target has {guest.dialect.name} leaves already, where the values go")
        with reporter(progress) as report:
            tensors = folder.read(_holding(below, path), progress=lambda _, done, total: report("load", done, total))
        return foreign.fill_tree(
            guest, tensors.config, tensors.tensors, keymap=keymap, lora_alpha=lora_alpha, on_shared=on_shared,
            dtype=dtype, source=tensors.source,
        )  # fmt: skip
    _refuse({"lora_alpha": lora_alpha}, "for targets with another library's LoRA leaves only")
    bare = isinstance(target, Mapping) and "params" not in target and not isinstance(target, nnx.nnx.Module)  # nnx.Dict
    if bare or isinstance(target, nnx.nnx.State):
        raise AttachError(
            f"expected an NNX model or Linen variables, {{'params': …}}, as the target, found {type(target).__name__};"
            " for bare parameters, from_peft(read(path), params) gives the adapter"
        )
    if base not in (None, "original", "changed"):
        raise AttachError(f"base={base!r}: expected 'original' or 'changed'")
    if on_mismatch not in (None, "skip"):
        raise MismatchError(f'on_mismatch: expected None or "skip", found {on_mismatch!r}')
    options = keymap, dtype, stack_axes, example, shardings, on_mismatch
    checkpoint = next((p for p in dict.fromkeys((below, location.to_location(path))) if orbax.is_checkpoint(p)), None)
    if checkpoint is not None:
        with reporter(progress) as report:
            adapter, bounds = _from_orbax(checkpoint, target, name, options, strict)
            _told_at_once(report, "load", adapter)
        source = os.fspath(checkpoint)
    else:
        parameters = planning.target_base(target)
        ahead = jax.process_count() == 1  # else it would read what only the others need
        with reporter(progress) as report, folder.open_adapter(_holding(below, path), ahead=ahead) as tensors:
            adapter, bounds = peft.adapter_from_tensors(tensors, parameters, *options, report, on_shared, strict)
        source = tensors.source
    LOGGER.info("%s: %d weights adapted, by the table %s", source, len(bounds), adapter.keymap.name)
    present = _attached_config(target, name)
    if present is not None and present != adapter.config and not replace:
        raise ConfigError(
            f"{source}: its configuration differs from that of the attached adapter {name!r} in"
            f" {present.differences(adapter.config)}; load(…, replace=True) takes the file's, and"
            " load(…, name=…) keeps both"
        )
    if dtype is None and present is not None and present == adapter.config:
        adapter = _as_wide(adapter, attachment.extract(target, name))
    new = _residual(target, base, present, adapter, bounds, source)
    same = present is not None and present == adapter.config and Recipe(present).origin == adapter.recipe.origin
    if not isinstance(target, nnx.nnx.Module):
        into: Any = target
        if new:
            into = collections.with_entry(into, "params", base_params.replace_leaves(into["params"], new))
        if present == adapter.config and attachment.extract(into, name).shapes == adapter.shapes:
            return collections.with_values(into, name, adapter.flat(), None if same else adapter.recipe)
        return attachment.with_adapter(into if present is None else attachment.delete(into, name), adapter, name)
    if same and rngs is None:
        nnx.inject(adapter, target, name)
        nnx.activate(target, (name,))
        return target
    if present is not None or rngs is not None or new:
        _rehearse(target, adapter, bounds, name, rngs)
    if new:
        base_params.replace_leaves(target, new)
    if present is not None:
        nnx.delete(target, name)
    nnx.attach(target, adapter.recipe, bounds, name, adapter.flat(), rngs)
    return target


def _as_wide(adapter: Adapter, attached: Adapter) -> Adapter:
    """The values in no fewer bits than those they replace: an optimizer's steps would be lost in 16 of them."""
    there = attached.flat()
    flat = {p: x.astype(jnp.promote_types(x.dtype, there[p].dtype)) for p, x in adapter.flat().items()}
    return Adapter(adapter.config, paths.unflatten(flat), adapter.keymap)


def _told_at_once(report: Report, what: str, adapter: Adapter) -> None:
    """Of what Orbax moved, which says nothing while it does."""
    total = sum(x.nbytes for x in adapter.flat().values())
    report(what, total, total)


def _residual(
    target: Any, which: str | None, present: Config | None, adapter: Adapter, bounds: Sequence[sites.Site], source: str
) -> dict[str, Any]:
    """The base weights that are to change, where the adapter belongs to a changed base."""
    if which is None:
        lora_variants.require_original_base(adapter.config, source, _WHICH_BASE)
    if which != "original":
        return {}
    if not lora_variants.changes_base(adapter.config):
        raise AttachError(f"{source}: base='original': this adapter belongs to the original base as it is")
    if present is not None and lora_variants.changes_base(present):
        raise AttachError(f"{source}: base='original', but the attached adapter has changed this base already")
    return original_base.residual_base(adapter.recipe, bounds, planning.base_arrays(target))


_WHICH_BASE = (
    ". load(…, base='original') takes that part out of the target's weights, as PEFT does on loading;"
    " load(…, base='changed') says that it is out already. jaxadapt.initializers.for_original_base (in PEFT"
    " path_initial_model_for_weight_conversion) makes a plain LoRA where the adapter was trained"
)


def _refuse(given: Mapping[str, Any], why: str) -> None:
    unused = [what for what, value in given.items() if value is not None]
    if unused:
        raise AttachError(f"{', '.join(unused)}: {why}")


def _from_orbax(
    path: str | os.PathLike[str], target: Any, name: str, options: tuple[Any, Any, Any, Any, Any, Any], strict: bool
) -> tuple[Adapter, tuple[sites.Site, ...]]:
    """The adapter of an Orbax checkpoint in the layout of the target, and its sites."""
    keymap, dtype, stack_axes, example, shardings, _ = options
    attached = attachment.extract(target, name) if _attached_config(target, name) is not None else None
    found = orbax_folder.find_adapter(path, attached, name)
    ours = sites.sites_of(found.adapter)
    keys = [key.removeprefix(PEFT_PREFIX) for b in ours for e in b.entries for key in e.keys]
    base = planning.target_base(target)
    table = planning.target_keymap(base, keymap, keys)
    recipe, bounds = planning.plan_adapter(base, found.adapter.config, table, stack_axes, example)
    planning.check_kernels(base, bounds)
    theirs, mine = ({e.path: (e.shape, e.keys) for b in bs for e in b.entries} for bs in (bounds, ours))
    if theirs != mine:  # laid out otherwise (scanned, fused, another table or vocabulary): by way of PEFT's names
        return peft.adapter_from_tensors(
            orbax_folder.adapter_tensors(orbax_folder.read(path, found), path), base, *options, strict=strict
        )
    where = peft.adapter_placement(shardings, base, bounds)
    like = {p: jax.ShapeDtypeStruct(theirs[p][0], jnp.float32, sharding=place) for p, place in where.items()}
    if attached is not None and shardings is None:
        like |= attached.flat()
    adapter = orbax_folder.read(path, found, like)
    flat = adapter.flat()
    flat = {p: x if p.endswith(".copy") else x.astype(peft.memory_dtype(x.dtype, dtype)) for p, x in flat.items()}
    return Adapter(recipe.config, paths.unflatten(jax.tree.map(jnp.asarray, flat)), recipe.keymap), bounds


def _rehearse(model: Any, adapter: Adapter, bounds: Sequence[sites.Site], name: str, rngs: Any) -> None:
    """Attach to an abstract copy first: what fails there must not cost the model the adapter it has."""
    graphdef, state = nnx.nnx.split(model)
    copy = nnx.nnx.merge(graphdef, jax.eval_shape(lambda: state))
    if name in nnx.adapter_names(copy):
        nnx.delete(copy, name)
    rngs = None if rngs is None else nnx.nnx.clone(rngs)
    nnx.attach(copy, adapter.recipe, bounds, name, adapter.flat(), rngs)


def _attached_config(target: Any, name: str) -> Config | None:
    if isinstance(target, nnx.nnx.Module):
        return nnx.extract(target, name).config if name in nnx.adapter_names(target) else None
    for collection in collections.adapter_collections(target).values():
        if name in collection:
            return collections.read_collection(collection[name], name).config
    return None
