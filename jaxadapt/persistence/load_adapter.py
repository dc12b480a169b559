"""Load an adapter folder into a model.

    file ──folder.open_adapter──► PeftTensors, read on demand
    model ──carriers.lora_carrier──► Carrier, whose `base` walks it ──planning.plan_adapter──► Sites and their plan
    both ──rules.fit──► the plan's tensors ──peft.load_arrays──► Adapter on the devices ──Carrier.attach──► the model

A format that keeps the model's layout (Orbax) is read by `_from_orbax` instead of by rules.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxadapt.adapters import peft_tensors, sites
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
from jaxadapt.models.carriers import DEFAULT, Carrier, lora_carrier, refuse
from jaxadapt.models.foreign import tree as foreign
from jaxadapt.models.planning import BaseParams
from jaxadapt.persistence import fingerprint, folder, formats, peft, rules, save_adapter
from jaxadapt.persistence.formats import Place
from jaxadapt.storage.location import to_location


def load(
    source: str | os.PathLike[str] | peft_tensors.PeftTensors,
    model: Any,
    *,
    name: str = DEFAULT,
    keymap: KeyMap | str | None = None,
    dtype: Any = None,
    replace: bool = False,
    rngs: Any = None,
    shardings: Any = None,
    strict: bool | str = True,
    progress: Progress = None,
) -> Any:
    """Read an adapter folder, written by jaxadapt or PEFT, into a model.

    If the target already contains LoRA parameters of another library (Qwix, `nnx.LoRA`, gemma, …), they are filled in
    place and nothing is attached. Wrap the target in a `LoraTree` if its tree does not store its alpha. If the file's
    scale differs, B is multiplied accordingly.

    Args:
        source: the folder; an address of an object store ("s3://bucket/folder", "gs://…") or of the Hub
            ("hf://org/name@revision/subfolder"). For a `name` other than "default", the subfolder of that name if it
            exists. Or `PeftTensors`: `jaxadapt.read` has the options for files that need repair, that belong to a
            changed base, or that are for another vocabulary.
        model: an NNX model, plain or adapted, changed in place and returned; or Linen variables
            (`{"params": base}` is enough), returned with the collection added. Abstract ones work too. A `LoraTree` of
            one says what happens where it has one A for several modules of the file, and how custom layers store
            their weights.
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
        shardings: the parameters' shardings: one `Sharding` for all, or a tree of them like the adapter's (an
            `Adapter` or nested dicts). By default each follows the base weight it adapts, axis by axis; the rank is
            replicated. From a path, a process reads only the bytes that its own devices hold.
        strict: True: every tensor must fit; a base other than the one the adapter was trained on, by the fingerprint
            in the file (a few values of the base's weights), is a warning. "base": as True, and another base is
            refused, and a file or a base without fingerprint. If the base is spread over several processes, all of them
            call `load` with strict="base", and all of them refuse another base; by default each compares the values
            that its devices hold. False: load the tensors that fit and warn of the rest, as in `import_base`. Tensors
            that the file lacks start as in a fresh adapter (LoRA's A is random, from a fixed seed, and B is 0; a copy
            of `modules_to_save` is the base's); tensors that the model has no place for are ignored. Wrong shapes are
            still refused, and so is a file without any fitting tensor.
        progress: None, True (bars on a terminal or in a notebook) or a function of ("load", bytes done, bytes in all);
            for an address of the Hub also of each file fetched, by its name.

    The base is never changed, except by tensors that were read with `change_base=True`. Nothing is attached unless
    everything fits. Raises `AdapterError`; `MismatchError` lists all missing, unexpected and wrongly shaped tensors
    together.

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
    if strict not in (True, False, "base"):
        raise MismatchError(f'strict={strict!r}: expected True, False or "base"')
    held = lora_carrier(model, takes=("stack_axes", "example"))
    options = rules.Options(keymap, peft.requested_dtype(dtype), shardings, bool(strict), held.given)
    if held.foreign is None and not held.has_base:
        if not isinstance(source, peft_tensors.PeftTensors):
            to_location(source)  # raises if the two arguments are exchanged
        raise held.unsupported("an NNX model or Linen variables, {'params': …}, as the target")
    if held.foreign is not None:
        refuse(
            {
                "replace": replace or None, "rngs": rngs, "shardings": shardings, "stack_axes": held.given.stack_axes,
                "example": held.given.example, "strict": None if strict is True else strict,
                "dtype": options.dtype if options.dtype == peft.AUTOCAST else None,
            },
            f"no effect on a target with {held.foreign.dialect.name} leaves, which are filled in place; leave it out",
        )  # fmt: skip
    with reporter(progress) as report, _open(source, name, held, report) as opened:
        if held.foreign is not None and not isinstance(opened, Place):
            tensors = folder.in_memory(opened, lambda _, done, total: report("load", done, total))
            return foreign.fill_tree(held.foreign, tensors, keymap, options.dtype)
        parameters, present = held.base(), held.attached(name)
        if isinstance(opened, Place):
            text, stored = os.fspath(opened.path), None
            adapter, adapter_sites, policy = _from_orbax(text, parameters, present, name, options, report)
        else:
            text, stored, policy = opened.source, opened.fingerprint, opened.change_base
            adapter, adapter_sites = peft.adapter_from_tensors(opened, parameters, options, report, check=True)
        _check_base(stored, parameters, adapter, adapter_sites, text, strict == "base")
    LOGGER.info("%s: %d weights adapted, by the keymap %s", text, len(adapter_sites), adapter.keymap.name)
    if present is not None and not replace:
        adapter, adapter_sites = _trained_as(present.config, adapter, adapter_sites)
    if present is not None:
        adapter = _in_place_of(present, adapter, options.dtype, text, replace=replace, name=name)
    changed = _changed_base(parameters, policy, present, adapter, adapter_sites, text)
    return held.attach(adapter, adapter_sites, name, present, rngs, changed)


@contextlib.contextmanager
def _open(
    source: str | os.PathLike[str] | peft_tensors.PeftTensors, name: str, held: Carrier, report: Report
) -> Generator[peft_tensors.PeftTensors | Place]:
    """Open an adapter. Return the place of a format that keeps a model's layout, unless it fills foreign leaves."""
    place = source if isinstance(source, peft_tensors.PeftTensors) else folder.find_adapter(source, name, report)
    if isinstance(place, peft_tensors.PeftTensors):
        if place.fit_vocabulary and held.foreign is not None:
            raise AttachError(
                f"{place.source}: fit_vocabulary=True: no effect on leaves of {held.foreign.dialect.name}"
            )
        yield peft_tensors.without_names(place)
    elif held.foreign is None and (found := formats.find(place)) is not None and found.write_adapter is not None:
        yield place
    else:
        with folder.open_adapter(place) as tensors:
            yield tensors


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


def _in_place_of(present: Adapter, adapter: Adapter, dtype: Any, source: str, *, replace: bool, name: str) -> Adapter:
    """Return the adapter that replaces the attached one, in the wider dtype of both unless `dtype` is given.

    Raises `ConfigError` or `MismatchError` if the two differ, unless `replace` is True.
    """
    ways_out = "load(…, replace=True) replaces the adapter{}, and load(…, name=…) keeps both"
    if present.config != adapter.config:
        if replace:
            return adapter
        raise ConfigError(
            f"{source}: the configuration differs from that of the attached adapter {name!r} in"
            f" {present.config.differences(adapter.config)}; {ways_out.format('')}"
        )
    is_encoded = bool(adapter.shared) and present.shapes != adapter.shapes
    if is_encoded and not replace:
        raise MismatchError(
            f"{source}: the attached adapter {name!r} has an encoder, but the file holds only an encoder's output"
            f" ({', '.join(adapter.shared)}); {ways_out.format(' by one without its encoder')}"
        )
    return adapter if dtype is not None or is_encoded else _promote(adapter, present)


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
        found = save_adapter.combine_values(
            "the comparison of the bases", found, fingerprint.merge, save_adapter.MultihostFolder.timeout
        )
    fingerprint.check(stored, found, source, strict=strict)


def _promote(adapter: Adapter, attached: Adapter) -> Adapter:
    """Cast values up to the dtype they replace, so that an optimizer's small steps are not lost in 16 bits."""
    old, new = attached.flat(), adapter.flat()
    wider = {pair: jnp.promote_types(*pair) for pair in {(x.dtype, old[path].dtype) for path, x in new.items()}}
    if all(kept == pair[0] for pair, kept in wider.items()):
        return adapter
    promoted = {path: x.astype(wider[x.dtype, old[path].dtype]) for path, x in new.items()}
    return Adapter(adapter.config, paths.unflatten(promoted), adapter.keymap)


def _changed_base(
    parameters: BaseParams,
    policy: bool | None,
    present: Adapter | None,
    adapter: Adapter,
    adapter_sites: Sequence[Site],
    source: str,
) -> dict[str, Any]:
    """Return {leaf: array} of the base weights that load must change for the adapter; empty if none.

    `policy` is the `change_base` of the tensors.
    """
    if policy is None:
        lora.require_original_base(adapter.config, source)
    if not policy:
        return {}
    if not lora.changes_base(adapter.config):
        raise AttachError(f"{source}: change_base=True: this adapter does not change its base; leave change_base= out")
    if present is not None and lora.changes_base(present.config):
        raise AttachError(
            f"{source}: change_base=True, but the attached adapter has already changed this base; read it with"
            " change_base=False"
        )
    return start_adapter.residual_base(adapter.recipe, adapter_sites, parameters.leaves)


def _from_orbax(
    path: str,
    base: BaseParams,
    attached: Adapter | None,
    name: str,
    options: rules.Options,
    report: Report,
) -> tuple[Adapter, Sequence[Site], bool | None]:
    """Read an Orbax checkpoint into the layout of a base; return the adapter, its sites and its `change_base`."""
    from jaxadapt.persistence.formats import orbax_folder

    stored = orbax_folder.find_adapter(path, attached, name)
    stored_sites = sites.sites_of(stored.adapter)
    keys = [key.removeprefix(PEFT_PREFIX) for site in stored_sites for entry in site.entries for key in entry.keys]
    keymap = planning.target_keymap(base, options.keymap, keys)
    shared = {key: each.entry.shape for each in stored_sites.shared for key in each.entry.keys}
    recipe, target_sites = planning.plan_adapter(
        base, stored.adapter.config, keymap, options.given.stack_axes, options.given.example, shared
    )
    planning.check_kernels(recipe.config, base, target_sites)
    wanted, found = (
        {entry.path: (entry.shape, entry.keys) for _, entry in tensor_entries(each)}
        for each in (target_sites, stored_sites)
    )
    if wanted != found:  # another layout (scanned, fused, another keymap or vocabulary): convert by PEFT's names
        tensors = orbax_folder.adapter_tensors(orbax_folder.read(path, stored), path)
        return *peft.adapter_from_tensors(tensors, base, options, report, check=True), stored.change_base
    placement = peft.adapter_placement(options.shardings, base, target_sites)
    like = {p: jax.ShapeDtypeStruct(wanted[p][0], jnp.float32, sharding=s) for p, s in placement.items()}
    if attached is not None and options.shardings is None:
        like |= {p: x for p, x in attached.flat().items() if p in wanted}
    flat = _cast_values(orbax_folder.read(path, stored, like).flat(), options.dtype, path)
    adapter = Adapter(recipe.config, paths.unflatten(jax.tree.map(jnp.asarray, flat)), recipe.keymap)
    orbax_folder.report_total(report, "load", adapter)
    return adapter, target_sites, stored.change_base


def _cast_values(own: Mapping[str, Any], dtype: Any, source: str) -> dict[str, Any]:
    """Return the values of a checkpoint in the requested dtype; warn of NaN and infinity."""
    with np.errstate(over="ignore"):  # `explain_not_finite` names the tensors
        dtypes = {p: x.dtype if p.endswith(".copy") else peft.memory_dtype(x.dtype, dtype) for p, x in own.items()}
        flat = {p: x.astype(dtypes[p]) for p, x in own.items()}
    bad = [([p], flat[p].dtype, 0) for p in finite.names_not_finite(flat)]
    finite.warn_not_finite(finite.explain_not_finite(bad, own.__getitem__, source), source)
    return flat
