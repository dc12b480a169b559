"""Load an adapter folder into a model.

files ──folder.open_adapter──► PeftTensors ──peft.adapter_from_tensors──► Adapter ──attach──► model / variables
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxadapt.adapters import sites
from jaxadapt.adapters.adapter import Adapter
from jaxadapt.adapters.site import Site, tensor_entries
from jaxadapt.arrays import finite
from jaxadapt.configs import lora
from jaxadapt.configs.base import Config
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, ConfigError, MismatchError
from jaxadapt.core.progress import LOGGER, Progress, Report, reporter
from jaxadapt.initializers import start_adapter
from jaxadapt.keymaps.keymap import PEFT_PREFIX, KeyMap
from jaxadapt.models import planning
from jaxadapt.models.carriers import DEFAULT, lora_carrier, refuse
from jaxadapt.models.foreign import tree as foreign
from jaxadapt.models.planning import BaseParams
from jaxadapt.persistence import fingerprint, folder, formats, peft, reading, rules, save_adapter

_TIMEOUT = 300.0  # seconds for each answer of another process


def load(
    path: str | os.PathLike[str],
    model: Any,
    *,
    name: str = DEFAULT,
    keymap: KeyMap | str | None = None,
    dtype: Any = None,
    replace: bool = False,
    rngs: Any = None,
    stack_axes: Sequence[int] | None = None,
    example: Sequence[Any] | None = None,
    shardings: Any = None,
    on_mismatch: str | None = None,
    base: str | None = None,
    strict: bool = True,
    repair: bool = False,
    strict_base: bool = False,
    progress: Progress = None,
) -> Any:
    """Read an adapter folder, written by jaxadapt or PEFT, into a model.

    If the target already contains LoRA parameters of another library (Qwix, `nnx.LoRA`, gemma, …), they are filled in
    place and nothing is attached. Wrap the target in a `LoraTree` if its tree does not store its alpha. If the file's
    scale differs, B is multiplied accordingly.

    Args:
        path: the folder; an address of an object store ("s3://bucket/folder", "gs://…") or of the Hub
            ("hf://org/name@revision/subfolder"). For a `name` other than "default", the subfolder of that name if it
            exists.
        model: an NNX model, plain or adapted, changed in place and returned; or Linen variables
            (`{"params": base}` is enough), returned with the collection added. Abstract ones work too. A `LoraTree` of
            one says what happens where it has one A for several modules of the file.
        name: the adapter's name on this model; the adapter becomes the active one.
        keymap: the model's family, a `KeyMap`, or None to recognise it.
        dtype: the parameters' dtype in memory. By default the file's, float32 for 8-bit tensors, and into an attached
            adapter the wider of the two, so that training continues in float32 from a 16-bit file. "autocast" converts
            tensors of fewer than 32 bits to float32, as PEFT's `autocast_adapter_dtype` does by default. A dtype in
            which finite values become infinite or NaN is an error; a file that holds such values is a warning.
        replace: replace an attached adapter of that name whose configuration differs. Without it, an adapter that
            differs only in its dropout or in how it began (`init_lora_weights`) gets the attached adapter's values of
            these fields.
        rngs: NNX: for dropout in further training; without it dropout is off.
        stack_axes, example: as in `adapt`.
        shardings: the parameters' shardings: one `Sharding` for all, or a tree of them like the adapter's (an
            `Adapter` or nested dicts). By default each follows the base weight it adapts, axis by axis; the rank is
            replicated. A process reads only the bytes that its own devices hold.
        on_mismatch: "skip" loads, from tensors for another vocabulary, the rows that the model has, with a warning;
            rows that the file lacks keep the base's values. By default such a file is refused.
        base: for an unconverted adapter whose initialisation took a part out of the base weights (PiSSA, OLoRA, …).
            "original": the target has the original weights, and load changes them as PEFT does. "changed": the target
            has the changed weights already. Without it such a file is refused.
        strict: False loads the tensors that fit and warns of the rest, as in `import_base`. Tensors that the file lacks
            start as in a fresh adapter (LoRA's A is random, from a fixed seed, and B is 0; a copy of `modules_to_save`
            is the base's); tensors that the model has no place for are ignored. Wrong shapes are still refused, and so
            is a file without any fitting tensor.
        repair: True corrects names and settings that have only one meaning, as `jaxadapt.repair` does in files,
            and warns of each: keys with _orig_mod., module. or .default., or without PEFT's prefix, a lost
            adapter_config.json, … The files stay as they are.
        strict_base: True refuses a base other than the one the adapter was trained on, by the fingerprint in the file
            (a few values of the base's weights), and a file or a base without one. By default another base is a
            warning. If the base is spread over several processes, all of them call `load` with strict_base=True, and
            all of them refuse another base; by default each compares the values that its devices hold.
        progress: None, True (bars on a terminal or in a notebook) or a function of ("load", bytes done, bytes in all);
            for an address of the Hub also of each file fetched, by its name.

    Otherwise the base is never changed. Nothing is attached unless everything fits. Raises `AdapterError`;
    `MismatchError` lists all missing, unexpected and wrongly shaped tensors together.

    >>> import tempfile, jax, jaxadapt
    >>> base = {"q": {"kernel": jax.numpy.ones((4, 6))}}
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> adapter = jaxadapt.init(base, config, key=jax.random.key(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     jaxadapt.save(adapter, folder)
    ...     variables = load(folder, {"params": base})
    >>> variables["lora"]["default"]["q"]["kernel"]["lora_B"].shape
    (6, 2)
    """
    dtype = peft.requested_dtype(dtype)
    with reporter(progress) as report:
        place = folder.find_adapter(path, name, report)
    held = lora_carrier(model)
    if held.foreign is None and not held.has_base:
        raise held.unsupported("an NNX model or Linen variables, {'params': …}, as the target")
    open_file = reading.open_repaired if repair else folder.open_adapter
    if held.foreign is not None:
        unused = {
            "replace": replace or None, "rngs": rngs, "stack_axes": stack_axes, "example": example,
            "shardings": shardings, "on_mismatch": on_mismatch, "strict": None if strict else False,
            "dtype": dtype if dtype == peft.AUTOCAST else None, "strict_base": strict_base or None,
        }  # fmt: skip
        refuse(
            unused,
            f"no effect on a target with {held.foreign.dialect.name} leaves, which are filled in place; leave them out",
        )
        with reporter(progress) as report, open_file(place) as adapter:
            tensors = folder.in_memory(adapter, lambda _, done, total: report("load", done, total))
        return foreign.fill_tree(held.foreign, tensors, keymap, dtype)
    if base not in (None, "original", "changed"):
        raise AttachError(f"base={base!r}: expected 'original' or 'changed'")
    if on_mismatch not in (None, "skip"):
        raise MismatchError(f'on_mismatch: expected None or "skip", found {on_mismatch!r}')
    parameters, present = held.base(), held.attached(name)
    options = rules.Options(keymap, dtype, stack_axes, example, shardings, on_mismatch, held.on_shared, strict)
    found = formats.find(place)
    if found is not None and found.write_adapter is not None:  # a format that keeps the model's layout
        source = os.fspath(place.path)
        with reporter(progress) as report:
            adapter, adapter_sites = _from_orbax(source, parameters, present, name, options, report)
    else:
        with reporter(progress) as report, open_file(place) as tensors:
            adapter, adapter_sites = peft.adapter_from_tensors(tensors, parameters, options, report, check=True)
        source = tensors.source
        _check_base(tensors.base, parameters, adapter, adapter_sites, source, strict_base)
    LOGGER.info("%s: %d weights adapted, by the keymap %s", source, len(adapter_sites), adapter.keymap.name)
    if present is not None and not replace:
        adapter, adapter_sites = _trained_as(present.config, adapter, adapter_sites)
    if present is not None and present.config != adapter.config and not replace:
        raise ConfigError(
            f"{source}: the configuration differs from that of the attached adapter {name!r} in"
            f" {present.config.differences(adapter.config)}; load(…, replace=True) replaces the adapter, and"
            " load(…, name=…) keeps both"
        )
    if present is not None and present.config == adapter.config:
        is_encoded = bool(adapter.shared) and present.shapes != adapter.shapes
        if is_encoded and not replace:
            raise MismatchError(
                f"{source}: the attached adapter {name!r} has an encoder, but the file holds only an encoder's"
                f" output ({', '.join(adapter.shared)}); load(…, replace=True) replaces the adapter by one without"
                " its encoder, and load(…, name=…) keeps both"
            )
        if dtype is None and not is_encoded:
            adapter = _promote(adapter, present)
    changed = _changed_base(parameters, base, present, adapter, adapter_sites, source)
    return held.attach(adapter, adapter_sites, name, present, rngs, changed)


def _trained_as(attached: Config, adapter: Adapter, adapter_sites: Sequence[Site]) -> tuple[Adapter, Sequence[Site]]:
    """Return a file's adapter, and its sites, with the attached adapter's dropout and way to begin.

    The adapter stays as it is if the configurations differ in more, if a start changes more than the initial values (a
    variant of the method), or if a start changes the base.
    """
    own = adapter.config
    if type(own) is not type(attached) or own == attached or lora.changes_base(own):
        return adapter, adapter_sites
    fields = [field.name for field in dataclasses.fields(own)]
    dropping = own.replace(**{name: attached.get(name) for name in fields if "dropout" in name})
    config = dropping.replace(**{name: attached.get(name) for name in fields if name.startswith("init_")})
    if config != attached or lora.changes_base(config):
        return adapter, adapter_sites
    before, after = (Adapter(each, adapter.params, adapter.keymap) for each in (dropping, config))
    same = sites.sites_of(before) == sites.sites_of(after)
    return (after, sites.sites_of(after)) if same else (adapter, adapter_sites)


def _check_base(
    stored: fingerprint.Fingerprint | None,
    parameters: BaseParams,
    adapter: Adapter,
    adapter_sites: Sequence[Site],
    source: str,
    strict: bool,
) -> None:
    """Compare the base with the one that the adapter was trained on.

    If the base is spread over several processes, each compares the values that it holds. With `strict` all of them must
    agree before one attaches the adapter, so that they exchange these values.
    """
    if stored is None and not strict:
        return
    found = (
        None
        if stored is None
        else fingerprint.of_base(lambda _: parameters.leaves, adapter.keymap, adapter_sites, stored)
    )
    if strict and stored is not None and save_adapter.is_distributed(parameters.leaves.values()):
        found = save_adapter.combine_values("the comparison of the bases", found, fingerprint.merge, _TIMEOUT)
    fingerprint.check(stored, found, source, strict=strict)


def _promote(adapter: Adapter, attached: Adapter) -> Adapter:
    """Cast values up to the dtype they replace, so that an optimizer's small steps are not lost in 16 bits."""
    old, new = attached.flat(), adapter.flat()
    pairs = {(x.dtype, old[path].dtype) for path, x in new.items()}
    wider = {pair: jnp.promote_types(*pair) for pair in pairs}
    if all(wider[pair] == pair[0] for pair in pairs):
        return adapter
    flat = {path: x.astype(wider[x.dtype, old[path].dtype]) for path, x in new.items()}
    return Adapter(adapter.config, paths.unflatten(flat), adapter.keymap)


def _changed_base(
    parameters: BaseParams,
    which: str | None,
    present: Adapter | None,
    adapter: Adapter,
    adapter_sites: Sequence[Site],
    source: str,
) -> dict[str, Any]:
    """Return {leaf: array} of the base weights that load must change for the adapter; empty if none."""
    if which is None:
        lora.require_original_base(adapter.config, source)
    if which != "original":
        return {}
    if not lora.changes_base(adapter.config):
        raise AttachError(f"{source}: base='original': this adapter does not change its base; leave base= out")
    if present is not None and lora.changes_base(present.config):
        raise AttachError(
            f"{source}: base='original', but the attached adapter has already changed this base; pass base='changed'"
        )
    return start_adapter.residual_base(adapter.recipe, adapter_sites, parameters.leaves)


def _from_orbax(
    path: str,
    base: BaseParams,
    attached: Adapter | None,
    name: str,
    options: rules.Options,
    report: Report,
) -> tuple[Adapter, tuple[Site, ...]]:
    """Read an Orbax checkpoint into the layout of a base; return the adapter and its sites."""
    from jaxadapt.persistence.formats import orbax_folder

    stored = orbax_folder.find_adapter(path, attached, name)
    stored_sites = sites.sites_of(stored.adapter)
    keys = [key.removeprefix(PEFT_PREFIX) for site in stored_sites for entry in site.entries for key in entry.keys]
    keymap = planning.target_keymap(base, options.keymap, keys)
    shared = {key: each.entry.shape for each in stored_sites.shared for key in each.entry.keys}
    recipe, target_sites = planning.plan_adapter(
        base, stored.adapter.config, keymap, options.stack_axes, options.example, shared
    )
    planning.check_kernels(recipe.config, base, target_sites)
    wanted, found = (
        {entry.path: (entry.shape, entry.keys) for _, entry in tensor_entries(each)}
        for each in (target_sites, stored_sites)
    )
    if wanted != found:  # another layout (scanned, fused, another keymap or vocabulary): convert by PEFT's names
        tensors = orbax_folder.adapter_tensors(orbax_folder.read(path, stored), path)
        return peft.adapter_from_tensors(tensors, base, options, report, check=True)
    placement = peft.adapter_placement(options.shardings, base, target_sites)
    like = {p: jax.ShapeDtypeStruct(wanted[p][0], jnp.float32, sharding=s) for p, s in placement.items()}
    if attached is not None and options.shardings is None:
        like |= {p: x for p, x in attached.flat().items() if p in wanted}
    own = orbax_folder.read(path, stored, like).flat()
    with np.errstate(over="ignore"):  # `explain_not_finite` names the tensors
        dtypes = {
            p: x.dtype if p.endswith(".copy") else peft.memory_dtype(x.dtype, options.dtype) for p, x in own.items()
        }
        flat = {p: x.astype(dtypes[p]) for p, x in own.items()}
    bad = [([p], flat[p].dtype, 0) for p in finite.names_not_finite(flat)]
    finite.warn_not_finite(finite.explain_not_finite(bad, own.__getitem__, os.fspath(path)), os.fspath(path))
    adapter = Adapter(recipe.config, paths.unflatten(jax.tree.map(jnp.asarray, flat)), recipe.keymap)
    orbax_folder.report_total(report, "load", adapter)
    return adapter, target_sites
