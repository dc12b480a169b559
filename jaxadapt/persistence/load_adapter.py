"""Load an adapter into a model, and convert PEFT's tensors to a model's layout.

    file ──formats.open_place──► PeftTensors, read on demand
    model ──carriers.lora_carrier──► Carrier, with the one walk over the model ──Carrier.base──► BaseParams
    both ──bind, by planning.plan_adapter──► Expected: the sites and the plan of their tensors
    an attached adapter with the file's configuration and tensors ──_bind_to_attached──► Expected, with its own sites
         ──rules.fit──► the plan's tensors ──rules.load_arrays──► Adapter on the devices ──Carrier.attach──► the model

A format that keeps the model's layout (Orbax) reads its adapters itself: `Format.read_adapter`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxadapt.adapters import experts, initial_values, peft_tensors, sites
from jaxadapt.adapters.adapter import Adapter, Recipe, Site, Sites
from jaxadapt.adapters.peft_tensors import PeftTensors
from jaxadapt.arrays.tensor_source import as_source, float_dtype, is_float
from jaxadapt.configs import lora
from jaxadapt.configs.base import PEFT_VERSION, Config, release_of
from jaxadapt.core import paths
from jaxadapt.core.errors import (
    LOGGER,
    AdapterError,
    AttachError,
    ConfigError,
    MismatchError,
    Progress,
    Report,
    TargetError,
    no_report,
    reporter,
    warn,
)
from jaxadapt.keymaps import pytorch
from jaxadapt.keymaps.keymap import PEFT_PREFIX, KeyMap
from jaxadapt.methods.base import file_sizes, get_method
from jaxadapt.methods.lora import is_newer_lora_file
from jaxadapt.models import planning, trees
from jaxadapt.models.carriers import DEFAULT, Carrier, carrier, lora_carrier, refuse
from jaxadapt.models.foreign import tree as foreign
from jaxadapt.persistence import fingerprint, folder, formats, rules, save_adapter
from jaxadapt.storage import location

# ---------------------------------------------------------------- load


def load(
    source: str | os.PathLike[str] | PeftTensors,
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
        keymap: the model's family, a `KeyMap`, or None to recognize it.
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
            replicated. From a path, a process reads the parts that its own devices hold, or a whole tensor if they
            hold half.
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
    options = rules.Options(keymap, requested_dtype(dtype), shardings, bool(strict), held.given)
    if held.foreign is None and not held.has_base:
        if not isinstance(source, PeftTensors):
            location.to_location(source)  # raises if the two arguments are exchanged
        raise held.unsupported("an NNX model or Linen variables, {'params': …}, as the target")
    if held.foreign is not None:
        refuse(
            {
                "replace": replace or None, "rngs": rngs, "shardings": shardings, "stack_axes": held.given.stack_axes,
                "example": held.given.example, "strict": None if strict is True else strict,
                "dtype": options.dtype if options.dtype == AUTOCAST else None,
            },
            f"no effect on a target with {held.foreign.dialect.name} parameters, which are filled in place; omit it",
        )  # fmt: skip
    with reporter(progress) as report, _open(source, name, held, report) as content:
        if held.foreign is not None and isinstance(content, PeftTensors):
            tensors = folder.in_memory(content, lambda _, done, total: report("load", done, total))
            return foreign.fill_tree(held.foreign, tensors, keymap, options.dtype)
        parameters, present = held.base(), held.attached(name)
        if isinstance(content, PeftTensors):
            origin, stored, change_base = content.source, content.fingerprint, content.change_base
            adapter, adapter_sites = adapter_from_tensors(content, parameters, options, report, present, check=True)
        else:
            place, read_adapter = content
            origin, stored = os.fspath(place.path), None
            adapter, adapter_sites, change_base = read_adapter(place, parameters, present, name, options, report)
        _check_base(stored, parameters, adapter, adapter_sites, origin, strict == "base")
    LOGGER.info("%s: fits %d weights, by the keymap %s", origin, len(adapter_sites), adapter.keymap.name)
    if present is not None and not replace:
        adapter, adapter_sites = _keep_dropout_and_start(present.config, adapter, adapter_sites)
    if present is not None:
        adapter = _in_place_of(present, adapter, options.dtype, origin, replace=replace, name=name)
    changed = _changed_base(parameters, change_base, present, adapter, adapter_sites, origin)
    return held.attach(adapter, adapter_sites, name, present, rngs, changed)


@contextlib.contextmanager
def _open(
    source: str | os.PathLike[str] | PeftTensors, name: str, held: Carrier, report: Report
) -> Generator[PeftTensors | tuple[formats.Place, formats.ReadAdapter]]:
    """Yield the tensors of an adapter, or the place and the reader of one in the layout of a model (Orbax).

    LoRA leaves of another library are filled from tensors, whatever the format.
    """
    place = source if isinstance(source, PeftTensors) else _find(source, name, report)
    if isinstance(place, PeftTensors):
        if place.fit_vocabulary and held.foreign is not None:
            raise AttachError(
                f"{place.source}: fit_vocabulary=True: no effect on parameters of {held.foreign.dialect.name}"
            )
        yield peft_tensors.without_names(place)
    elif held.foreign is None and (found := formats.find(place)) is not None and found.read_adapter is not None:
        yield place, found.read_adapter
    else:
        with formats.open_place(place) as opened:
            yield opened.tensors


def _find(path: str | os.PathLike[str], name: str, report: Report) -> formats.Place:
    """Return the place of the adapter called `name`: its subfolder if that holds an adapter, else the path itself."""
    if name == DEFAULT or location.is_hub_address(path):
        return formats.look(path, report, None if name == DEFAULT else name)
    if location.is_dir(subfolder := save_adapter.adapter_folder(path, name)):
        place = formats.look(subfolder)
        if formats.find(place) is not None or location.CONFIG in (place.names or ()):
            return place
    return formats.look(path)


def _keep_dropout_and_start(
    present: Config, adapter: Adapter, adapter_sites: Sequence[Site]
) -> tuple[Adapter, Sequence[Site]]:
    """Return a file's adapter, and its sites, with the attached adapter's dropout and way to begin.

    The adapter stays as it is if the configurations differ in more, if a start changes more than the initial values (a
    variant of the method), or if a start changes the base.
    """
    own = adapter.config
    if type(own) is not type(present) or own == present or lora.changes_base(own):
        return adapter, adapter_sites
    fields = [field.name for field in dataclasses.fields(own)]
    dropping = own.replace(**{name: present.get(name) for name in fields if "dropout" in name})
    config = dropping.replace(**{name: present.get(name) for name in fields if name.startswith("init_")})
    if config != present or lora.changes_base(config):
        return adapter, adapter_sites
    before, after = (Adapter(each, adapter.params, adapter.keymap) for each in (dropping, config))
    old_sites, new_sites = sites.sites_of(before), sites.sites_of(after)
    return (after, new_sites) if old_sites == new_sites else (adapter, adapter_sites)


def _in_place_of(present: Adapter, adapter: Adapter, dtype: Any, origin: str, *, replace: bool, name: str) -> Adapter:
    """Return the adapter that replaces the attached one, in the wider dtype of both unless `dtype` is given.

    Raises `ConfigError` or `MismatchError` if the two differ, unless `replace` is True.
    """
    ways_out = "load(…, replace=True) replaces the adapter{}, and load(…, name=…) keeps both"
    if present.config != adapter.config:
        if replace:
            return adapter
        raise ConfigError(
            f"{origin}: the configuration differs from that of the attached adapter {name!r} in"
            f" {present.config.differences(adapter.config)}; {ways_out.format('')}"
        )
    is_encoded = bool(adapter.shared) and present.shapes != adapter.shapes
    if is_encoded and not replace:
        raise MismatchError(
            f"{origin}: the attached adapter {name!r} has an encoder, but the file holds only an encoder's output"
            f" ({', '.join(adapter.shared)}); {ways_out.format(' by one without its encoder')}"
        )
    return adapter if dtype is not None or is_encoded else _promote(adapter, present)


def _check_base(
    stored: fingerprint.Fingerprint | None,
    parameters: planning.BaseParams,
    adapter: Adapter,
    adapter_sites: Sequence[Site],
    origin: str,
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
    fingerprint.check(stored, found, origin, strict=strict)


def _promote(adapter: Adapter, present: Adapter) -> Adapter:
    """Cast values up to the dtype they replace, so that an optimizer's small steps are not lost in 16 bits."""
    new = adapter.flat()
    old = new | present.flat()  # a tensor that the attached adapter lacks keeps its dtype
    if len({x.dtype for x in (*new.values(), *old.values())}) == 1:
        return adapter
    wider = {pair: jnp.promote_types(*pair) for pair in {(x.dtype, old[path].dtype) for path, x in new.items()}}
    if all(kept == pair[0] for pair, kept in wider.items()):
        return adapter
    promoted = {path: x.astype(wider[x.dtype, old[path].dtype]) for path, x in new.items()}
    return Adapter.of_leaves(adapter.config, promoted, adapter.keymap)


def _changed_base(
    parameters: planning.BaseParams,
    change_base: bool | None,
    present: Adapter | None,
    adapter: Adapter,
    adapter_sites: Sequence[Site],
    origin: str,
) -> dict[str, Any]:
    """Return {leaf: array} of the base weights that load must change for the adapter; empty if none.

    `change_base` is that of the tensors.
    """
    if change_base is None:
        lora.require_original_base(adapter.config, origin)
    if not change_base:
        return {}
    if not lora.changes_base(adapter.config):
        raise AttachError(f"{origin}: change_base=True: this adapter does not change its base; leave change_base= out")
    if present is not None and lora.changes_base(present.config):
        raise AttachError(
            f"{origin}: change_base=True, but the attached adapter has already changed this base; read it with"
            " change_base=False"
        )
    from jaxadapt.initializers import start_adapter  # here only: few adapters change their base

    return start_adapter.residual_base(adapter.recipe, adapter_sites, parameters.leaves)


# ---------------------------------------------------------------- from PEFT


def from_peft(
    tensors: PeftTensors,
    model: Any,
    *,
    keymap: KeyMap | str | None = None,
    dtype: Any = None,
    shardings: Any = None,
    strict: bool = True,
) -> Adapter:
    """Convert PEFT's tensors to an adapter in the layout of `model`.

    Args:
        tensors: from `read` or `to_peft`. With `change_base=True` they are refused: only `load` changes a base.
        model: an NNX model, Linen variables, base parameters, or the shapes of any of them; or a `LoraTree` of one.
        keymap, dtype, shardings: as in `load`.
        strict: as in `load`, True or False.

    Raises `MismatchError` listing every missing, unexpected, wrongly shaped or unusable tensor.

    >>> import jax, jaxadapt
    >>> base = {"q": {"kernel": jax.numpy.ones((4, 6))}}
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> adapter = jaxadapt.init(base, config, key=jax.random.key(0))
    >>> again = from_peft(jaxadapt.to_peft(adapter), base)
    >>> again.config == config, again.params["q"]["kernel"]["lora_A"].shape
    (True, (2, 4))
    """
    if not isinstance(tensors, PeftTensors):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise AttachError(
            f"expected PeftTensors (from read or to_peft), found {type(tensors).__name__};"
            " add an Adapter to a model with jaxadapt.inject"
        )
    if tensors.change_base is None:
        lora.require_original_base(tensors.config, tensors.source)
    if tensors.change_base:
        raise AttachError(
            f"{tensors.source}: change_base=True: from_peft changes no base; pass the tensors to load, or read them"
            " with change_base=False if the base of the model is changed"
        )
    if strict not in (True, False):
        raise AttachError(f"strict={strict!r}: expected True or False; only load compares the base")
    given = foreign.LoraTree.of(model)
    refuse({"config": given.config}, "applies to a tree that is read, not to one that is filled")
    parameters = carrier(given.tree).base()
    options = rules.Options(keymap, requested_dtype(dtype), shardings, strict, given)
    tensors = peft_tensors.without_names(tensors)
    return trees.box_like_base(adapter_from_tensors(tensors, parameters, options)[0], parameters.held)


def adapter_from_tensors(
    tensors: PeftTensors,
    base: planning.BaseParams,
    options: rules.Options,
    report: Report = no_report,
    present: Adapter | None = None,
    check: bool = False,
) -> tuple[Adapter, Sites]:
    """Decode PEFT's tensors into the layout of a base; return the adapter and its sites.

    `present` is the attached adapter of the same name. With `check`, NaN and infinity in the tensors are a warning.

    Raises `MismatchError` listing all tensors that do not fit, and `AdapterError` for a configuration that does not fit
    the base.
    """
    expected = _bind_to_attached(tensors, base, options, present) or bind(tensors, base, options)
    source, recipe, adapter_sites = rules.fit(expected), expected.recipe, expected.sites
    own = {key: spec.dtype for key, spec in source.specs.items()}
    if options.dtype is None and np.dtype("float64") in own.values() and jnp.zeros(0, float).dtype != "float64":
        warn(f"{tensors.source}: float64 tensors become float32, because jax_enable_x64 is off")
    dtypes = _memory_dtypes(own, options.dtype, adapter_sites)
    placement = adapter_placement(options.shardings, base, adapter_sites)
    arrays = dict(source) if expected.on_device else source
    leaves = rules.load_arrays(expected.plan, arrays, dtypes, placement, report, name=tensors.source, check=check)
    if not adapter_sites.all_in_file:
        leaves = initial_values.init_values(
            recipe.config, adapter_sites, jax.random.key(0), base=base.leaves, base_shardings=base.shardings,
            given=leaves,
        )  # fmt: skip
    return Adapter.of_leaves(recipe.config, leaves, recipe.keymap), adapter_sites


def bind(
    tensors: PeftTensors, base: planning.BaseParams, options: rules.Options, *, has_values: bool = True
) -> rules.Expected:
    """Bind a file to a base: choose the keymap, fuse the file's single experts if the base's are fused, plan, check.

    `has_values` is False for tensors that are shapes only, whose experts cannot be fused.
    """
    try:
        keys = [key.removeprefix(PEFT_PREFIX) for key in tensors.tensors]
        given = base.keymap if options.keymap is None else options.keymap
        keymap = base.resolve_keymap(given).spelling_for(keys, base.shapes)
        if has_values and peft_tensors.may_have_experts(keys):
            fused = experts.fuse_experts(tensors, keymap, options.given.on_shared)
            tensors = dataclasses.replace(tensors, config=fused.config, tensors=fused.tensors)
        found = {key: shape for key, shape in as_source(tensors.tensors).shapes.items() if shape}
        recipe, adapter_sites = planning.plan_adapter(
            base, tensors.config, keymap, options.given.stack_axes, options.given.example, found
        )
        planning.check_kernels(recipe.config, base, adapter_sites)
    except AdapterError as error:
        hint = rules.attention_hint(tensors.tensors) if isinstance(error, TargetError) else ""
        raise type(error)(f"{tensors.source}: {error}{hint}") from error
    _warn_of_newer_peft(tensors, adapter_sites)
    return rules.Expected(tensors, recipe, adapter_sites, base, options)


@functools.lru_cache(maxsize=1 << 14)  # loading adapters one after the other asks for the same leaves
def _leaf_kind(leaf: str) -> str:
    """Return a leaf without the numbers that tell layers apart, as in "layers.0.q_proj" and "Block_0.Dense_1"."""
    return re.sub(r"(?<![^._])\d+(?=\.)", "", leaf)


def _bind_to_attached(
    tensors: PeftTensors, base: planning.BaseParams, options: rules.Options, present: Adapter | None
) -> rules.Expected | None:
    """Bind a file to an attached adapter that has the file's configuration and tensors; return None for any other.

    The sites are those of the attached adapter: the model is neither selected from nor traced again.
    """
    given, config = options.given, tensors.config
    options_of_plan = (options.keymap, given.stack_axes, given.example, config.get("layer_replication"))
    if present is None or any(option is not None for option in options_of_plan):
        return None
    # Equality ignores the task, and a task adds a head to the targets.
    if config != present.config or config.task_type != present.config.task_type:
        return None
    try:
        adapter_sites = sites.sites_of(present)
    except AdapterError:
        return None  # the file replaces an adapter whose tensors contradict its configuration
    # A leaf of another layer may be a target, too: the model may have got layers since.
    adapted = {site.leaf for site in adapter_sites}
    others = base.shapes.keys() - adapted
    kinds = set(map(_leaf_kind, adapted))
    is_alike = (
        all(
            site.weight_shape == (shape := base.shapes.get(site.leaf, ()))
            or paths.Spec(site.weight_shape).accepts_shape(paths.Spec(shape))
            for site in adapter_sites
        )
        and kinds.isdisjoint(map(_leaf_kind, others))
        and adapter_sites.all_in_file
        and as_source(tensors.tensors).shapes == adapter_sites.file_plan.shapes
    )
    if not is_alike:
        return None
    _warn_of_newer_peft(tensors, adapter_sites)
    return rules.Expected(tensors, Recipe(config, present.keymap, len(adapter_sites)), adapter_sites, base, options)


def _warn_of_newer_peft(tensors: PeftTensors, adapter_sites: Sites) -> None:
    """Warn of a newer PEFT's file with fields that are unknown here, or with an attention's output projection.

    The newer PEFT may add the projection's product once.
    """
    config = tensors.config
    unknown = [name for name, value in config.extra.items() if value not in (None, False, {}, [])]
    if unknown and release_of(config.peft_version)[:3] > release_of(PEFT_VERSION):
        warn(
            f"{tensors.source}: written by PEFT {config.peft_version}, with fields that jaxadapt does not know and"
            f" ignores: {', '.join(sorted(unknown))}. It follows PEFT {PEFT_VERSION}: compare the outputs with PEFT's"
        )
    weights = (site.match.weight for site in adapter_sites if not site.method.copies)
    if any(w.kind == "attention" and w.products == 2 for w in weights) and is_newer_lora_file(tensors.config):
        warn(
            f"{tensors.source}: written by PEFT {tensors.config.peft_version}. PEFT up to {PEFT_VERSION} adds the"
            " product of an nn.MultiheadAttention's output projection twice, and so does jaxadapt; newer versions are"
            " untested. If that version adds it once, halve the projection's lora_B"
        )


def _memory_dtypes(own: Mapping[str, Any], requested: Any, adapter_sites: Sites) -> dict[str, Any]:
    """Return the dtypes in memory by key, from a file's: copies keep theirs by default; integers have the method's."""
    new = {dtype: memory_dtype(dtype, requested) for dtype in set(own.values())}
    copied = adapter_sites.copied_keys if requested in (None, AUTOCAST) else ()
    return {key: dtype if key in copied else new[dtype] for key, dtype in own.items()} | adapter_sites.integers


AUTOCAST = "autocast"
"""In place of a dtype: float32 for tensors of fewer bits, as PEFT's `autocast_adapter_dtype`."""


def requested_dtype(dtype: Any) -> Any:
    """Return a caller's dtype in memory: None, `AUTOCAST` or a NumPy dtype. Raises `ConfigError` for any other."""
    return dtype if dtype is None or (isinstance(dtype, str) and dtype == AUTOCAST) else float_dtype(dtype)


def memory_dtype(stored: Any, requested: Any) -> np.dtype[Any]:
    """Return the dtype in memory of a tensor stored as `stored`: float32 for 8-bit floats, which have no arithmetic."""
    if not is_float(stored):
        return np.dtype(stored)
    if requested not in (None, AUTOCAST):
        return np.dtype(requested)
    smallest = 4 if requested == AUTOCAST else 2  # bytes
    return np.dtype("float32" if np.dtype(stored).itemsize < smallest else stored)


def adapter_placement(shardings: Any, base: planning.BaseParams, adapter_sites: Sequence[Site]) -> dict[str, Any]:
    """Return {path: sharding}: the requested shardings, else those that follow from the base; none on one device."""
    if shardings is not None:
        shardings = shardings.flat() if isinstance(shardings, Adapter) else shardings
        return initial_values.requested_shardings(shardings, adapter_sites)
    if all(sharding is None for sharding in base.shardings.values()):
        return {}
    return initial_values.adapter_shardings(adapter_sites, base.shardings)


# ---------------------------------------------------------------- models in files


def with_pytorch_names(tensors: PeftTensors) -> Adapter:
    """Return the adapter for a model whose parameters have PyTorch's names and layouts."""
    shapes = as_source(tensors.tensors).shapes
    weights = pytorch.weight_shapes(shapes)
    base = paths.unflatten({leaf: jax.ShapeDtypeStruct(shape, "float32") for leaf, shape in weights.items()})
    return from_peft(
        tensors,
        base,
        keymap=pytorch.state_dict_keymap(
            weights, shapes, tensors.source, functools.partial(file_sizes, get_method(tensors.config), tensors.config)
        ),
    )


def base_keymap(
    tensors: PeftTensors, base: Mapping[str, tuple[int, ...]], tied: tuple[tuple[str, str], ...] = ()
) -> KeyMap:
    """Return the keymap for an adapter of a model in files, from the shapes of its parameters; see `pytorch`."""
    shapes = as_source(tensors.tensors).shapes
    return pytorch.state_dict_keymap(
        base,
        shapes,
        tensors.source,
        functools.partial(file_sizes, get_method(tensors.config), tensors.config),
        bool(tensors.config.get("fan_in_fan_out")),
        tied,
    )
