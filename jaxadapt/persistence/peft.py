"""Between a model's layout and PEFT's, in memory: what stands between `attach` and the files of `store`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxadapt import methods
from jaxadapt.adapters import (
    base_weights,
    embeddings,
    experts,
    full_copies,
    initial_values,
    joint_tensors,
    renaming,
    sharding,
    sites,
    state_dict_keys,
    tied,
    vocabulary,
)
from jaxadapt.adapters.adapter import Adapter, PeftTensors
from jaxadapt.configs import PEFT_VERSION, Config, lora_variants
from jaxadapt.core import paths
from jaxadapt.core.errors import AdapterError, AttachError, ConfigError, MismatchError, TargetError, warn
from jaxadapt.core.progress import Report, no_report
from jaxadapt.keymaps import families, parts
from jaxadapt.keymaps import plan as plans
from jaxadapt.keymaps.keymap import PEFT_PREFIX, KeyMap, warn_unproved
from jaxadapt.keymaps.plan import Encoded
from jaxadapt.methods.lora import method
from jaxadapt.models import attachment, planning
from jaxadapt.models.foreign import tree as foreign
from jaxadapt.models.linen import collections
from jaxadapt.persistence import device_arrays, multihost


def to_peft(
    tree: Any,
    name: str = attachment.DEFAULT,
    *,
    config: Config | None = None,
    keymap: KeyMap | str | None = None,
    lora_alpha: float | None = None,
    on_shared: str | None = None,
) -> PeftTensors:
    """An adapter under PEFT's names and in PyTorch's layout, in memory.

    Args:
        tree: what `extract` takes: an `Adapter`, an NNX model or state, Linen variables, another library's tree.
        config, keymap: only where the tree lost them, or to rename by another table.
        lora_alpha: of another library's tree, where it stores none.
        on_shared: as in `save`.

    The tensors are made when they are asked for, as numpy views where the layouts allow (inside jit: as
    traced arrays). Raises `AttachError` or `KeyMapError`.

    >>> import jax, jaxadapt
    >>> base = {"q": {"kernel": jax.ShapeDtypeStruct((4, 6), "float32")}}
    >>> adapter = jaxadapt.init(jaxadapt.LoraConfig(r=2, target_modules=["q"]), base, key=jax.random.key(0))
    >>> {key: x.shape for key, x in to_peft(adapter).tensors.items()}
    {'base_model.model.q.lora_A.weight': (2, 4), 'base_model.model.q.lora_B.weight': (6, 2)}
    """
    tensors = collect_tensors(tree, name, config, keymap, lora_alpha, None, "it is one already", True, on_shared)
    return merge_joint_tensors(tensors, tree, name, config, keymap, on_shared, "to_peft")


def merge_joint_tensors(
    tensors: PeftTensors, tree: Any, name: str, config: Config | None, keymap: Any, on_shared: str | None, call: str
) -> PeftTensors:
    """What several leaves hold of one tensor of PyTorch's, in one; and what one leaf holds of several, in several."""
    held = tensors.tensors
    if isinstance(held, Encoded) and tensors.config.get("ensure_weight_tying"):
        table = rename_adapter(extract_adapter(tree, name, config, keymap, ""), keymap).keymap
        more = tied.repeat_for_heads(held.plan.entries, table)
        held = dataclasses.replace(held, plan=plans.make_plan([*held.plan.entries, *more]))
        tensors = dataclasses.replace(tensors, tensors=held)
    if not isinstance(held, Encoded) or not (
        parts.has_parts(held.plan.keys) or experts.may_have_experts(held.plan.keys)
    ):
        return tensors
    if not isinstance(tree, Adapter) and attachment.find_foreign(tree) is not None:
        return tensors
    adapter = rename_adapter(extract_adapter(tree, name, config, keymap, ""), keymap)
    if not (parts.has_parts(held.plan.keys) or adapter.keymap.single):
        return tensors
    if multihost.is_distributed(held.leaves.values()):
        raise AttachError(
            "PyTorch keeps several of these weights in one tensor, to be put together from leaves that are partly in"
            " other processes: gather the adapter's arrays first (they are small), as jax.experimental.multihost_utils"
            " does"
        )
    if adapter.keymap.single:
        return PeftTensors(*experts.split_experts(tensors.config, held, adapter.keymap), tensors.source)
    bounds = sites.sites_of(adapter)
    new, whole = joint_tensors.join_tensors(tensors.config, bounds, held, on_shared, call)
    return PeftTensors(new, whole, tensors.source)


def collect_tensors(
    tree: Any,
    name: str,
    config: Config | None,
    keymap: Any,
    lora_alpha: float | None,
    dtype: Any,
    instead: str,
    traced: bool,
    on_shared: str | None = None,
) -> PeftTensors:
    guest = None if isinstance(tree, Adapter | PeftTensors) else attachment.find_foreign(tree)
    if guest is not None:
        require_values(guest.leaves, traced, elsewhere=not traced)
        call = "to_peft(tree" if traced else "save(tree, path"
        config, _, tensors = foreign.tree_to_peft(guest, config, keymap, lora_alpha, call, dtype, on_shared)
        return PeftTensors(config, tensors, f"this {guest.dialect.name} tree")
    if lora_alpha is not None:
        raise ConfigError("lora_alpha is for the trees of other libraries; an adapter of this one carries its own")
    return _encoded(extract_adapter(tree, name, config, keymap, instead), keymap, dtype, traced)


def extract_adapter(tree: Any, name: str, config: Config | None, keymap: Any, instead: str) -> Adapter:
    if isinstance(tree, PeftTensors):
        raise AttachError(f"expected an adapter in a model's layout, found PeftTensors; {instead}")
    adapter = attachment.extract(tree, name, config=config, keymap=keymap)
    return adapter if config is None else dataclasses.replace(adapter, config=config)


def require_values(leaves: Mapping[str, Any], traced: bool, elsewhere: bool = False) -> None:
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
        raise AttachError("these parameters have no values to save:\n" + paths.bullets(problems))


def _encoded(adapter: Adapter, keymap: KeyMap | str | None, dtype: Any, traced: bool) -> PeftTensors:
    shapes, leaves = adapter.shapes, adapter.flat()
    require_values(leaves, traced, elsewhere=not traced)
    adapter = rename_adapter(adapter, keymap)
    config, table = adapter.config, adapter.keymap
    warn_unproved(table)
    bounds, astray = sites.sites_from_shapes(config, table, shapes), sites.untargeted(config, table, shapes)
    if astray:
        raise MismatchError(
            "these modules or parameters carry tensors, but target_modules (or target_parameters) of the configuration"
            " does not name them, so a reader would drop them:\n" + paths.bullets(astray)
        )
    host = not any(isinstance(leaf, Tracer) for leaf in leaves.values())
    if host:
        _need_zeros(bounds, leaves)
    encoded = sites.make_file_plan(bounds).encode(leaves, dtype, host)
    return PeftTensors(config, encoded, "this adapter")


def _need_zeros(bounds: Sequence[sites.Site], leaves: Mapping[str, Any]) -> None:
    """Raise `MismatchError` for numbers in layers or ranks that the configuration leaves out, which no file holds."""
    odd: list[str] = []
    for entry in (e for b in bounds for e in b.entries if e.form.partial):
        leaf, used = leaves[entry.path], entry.form.by_tensor([1] * entry.form.count) > 0
        xp: Any = np if multihost.is_local(leaf) else jnp
        if bool(xp.any(xp.where(used, 0, leaf) != 0)):
            odd.append(f"{entry.path} {tuple(leaf.shape)}")
    if odd:
        raise MismatchError(
            "these arrays hold numbers in layers, parts or ranks that the configuration (target_modules,"
            " layers_to_transform, exclude_modules, rank_pattern) leaves out, and a file would lose them. Training"
            " keeps them at zero, so something else wrote to them, or another configuration was meant:\n"
            + paths.bullets(odd)
        )


def rename_adapter(adapter: Adapter, keymap: KeyMap | str | None) -> Adapter:
    """The adapter as another table names it."""
    if keymap in (None, "auto"):
        return adapter
    before = sites.sites_of(adapter)
    table = families.resolve_keymap(keymap, {})
    return dataclasses.replace(adapter, config=renaming.rename_targets(adapter.config, before, table), keymap=table)


def from_peft(
    tensors: PeftTensors,
    target: Any,
    *,
    keymap: KeyMap | str | None = None,
    dtype: Any = None,
    stack_axes: Sequence[int] | None = None,
    example: Sequence[Any] | None = None,
    shardings: Any = None,
    base: str | None = None,
    on_shared: str | None = None,
    strict: bool = True,
) -> Adapter:
    """PEFT's tensors as an adapter in the layout of `target`.

    Args:
        target: an NNX model, Linen variables, base parameters, or the shapes of any of them.
        keymap, dtype, stack_axes, example, shardings, on_shared, strict: as in `load`; so is `base`, which can only be
            "changed" here.

    Raises `MismatchError` listing every missing, unexpected, wrongly shaped or unusable tensor.

    >>> import jax, jaxadapt
    >>> base = {"q": {"kernel": jax.numpy.ones((4, 6))}}
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> adapter = jaxadapt.init(config, base, key=jax.random.key(0))
    >>> again = from_peft(jaxadapt.to_peft(adapter), base)
    >>> again.config == config, again.params["q"]["kernel"]["lora_A"].shape
    (True, (2, 4))
    """
    if base not in (None, "changed"):
        raise AttachError(f"base={base!r}: from_peft changes no base; expected 'changed', for a target that was")
    if isinstance(tensors, PeftTensors) and base is None:  # pyright: ignore[reportUnnecessaryIsInstance]
        way_out = "; base='changed' says that this target is the changed base"
        lora_variants.require_original_base(tensors.config, tensors.source, way_out)
    parameters = planning.target_base(target)
    adapter, _ = adapter_from_tensors(
        tensors, parameters, keymap, dtype, stack_axes, example, shardings, on_shared=on_shared, strict=strict
    )
    return collections.boxed(adapter, parameters.held)


def is_spread(base: planning.BaseParams, shardings: Any) -> bool:
    """Whether an adapter is to be put anywhere but on the default device."""
    return shardings is not None or any(place is not None for place in base.shardings.values())


def adapter_from_tensors(
    tensors: PeftTensors,
    base: planning.BaseParams,
    keymap: Any,
    dtype: Any,
    stack_axes: Any,
    example: Any,
    shardings: Any,
    on_mismatch: str | None = None,
    report: Report = no_report,
    on_shared: str | None = None,
    strict: bool = True,
) -> tuple[Adapter, tuple[sites.Site, ...]]:
    """The adapter, and its sites."""
    if not isinstance(tensors, PeftTensors):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise AttachError(
            f"expected PeftTensors (from read or to_peft), found {type(tensors).__name__};"
            " jaxadapt.inject puts an Adapter into a model"
        )
    tensors = state_dict_keys.without_names(tensors)
    try:
        keys = [key.removeprefix(PEFT_PREFIX) for key in tensors.tensors]
        methods.get_method(tensors.config)
        table = planning.target_keymap(base, keymap, keys)
        if experts.may_have_experts(keys):
            tensors = experts.fuse_experts(tensors, table, on_shared, "load or from_peft")
        recipe, bounds = planning.plan_adapter(base, tensors.config, table, stack_axes, example)
        planning.check_kernels(base, bounds)
        plan = sites.make_file_plan(bounds)
    except AdapterError as error:
        way_out = _of_attention(tensors.tensors) if isinstance(error, TargetError) else ""
        raise type(error)(f"{tensors.source}: {error}{way_out}") from error
    if method.doubtful_twice(tensors.config, (b.match for b in bounds if not b.method.copies)):
        warn(
            f"{tensors.source}: PEFT {tensors.config.peft_version} wrote it. PEFT up to {PEFT_VERSION} adds the product"
            " of an nn.MultiheadAttention's output projection twice, and so does this library. Whether this version"
            " does is not known. If it adds it once, halve that projection's lora_B"
        )
    if parts.has_parts(plan.keys):
        tensors = dataclasses.replace(tensors, tensors=parts.cut_parts(tensors.tensors, plan.keys))
    if on_mismatch == "skip":
        rows = vocabulary.fit_vocabulary(tensors.tensors, bounds, recipe.keymap, base.leaves, tensors.source)
        tensors = dataclasses.replace(tensors, tensors=rows)
    specs = device_arrays.tensor_specs(tensors.tensors)
    dtypes = {key: spec.dtype for key, spec in specs.items()}
    asked, dtype = dtype, None if dtype == AUTOCAST else dtype
    kinds = {d: memory_dtype(d, asked) for d in set(dtypes.values())}
    no_floats = {d for d in kinds if not jnp.issubdtype(d, jnp.floating)}
    odd = [f"{k}: {d.name}, expected floats" for k, d in dtypes.items() if d in no_floats and k in plan.keys]
    shapes = {key: spec.shape for key, spec in specs.items()}
    if tensors.config.get("ensure_weight_tying"):
        again = tied.redundant_head_keys(tensors.tensors, plan.entries, recipe.keymap, tensors.source)
        shapes = {key: shape for key, shape in shapes.items() if key not in again}
    if shapes.keys() - plan.keys.keys():
        of_base = embeddings.embedding_keys(
            tensors.tensors, shapes, plan.keys, recipe.keymap, base.leaves, tensors.source
        )
        of_base |= full_copies.redundant_keys(tensors.tensors, plan.keys, tensors.source)
        shapes = {key: shape for key, shape in shapes.items() if key not in of_base}
        more = {key: shape for key, shape in shapes.items() if key not in plan.keys}
        of_base = base_weights.base_weight_keys(
            tensors.tensors, more, recipe.keymap, base.leaves, tensors.source, strict
        )
        shapes = {key: shape for key, shape in shapes.items() if key not in of_base}
    if strict or not plan.keys.keys() & shapes.keys():
        try:
            plan.check(shapes, tensors.source, odd, recipe.keymap.name if strict else "")
        except MismatchError as error:
            raise MismatchError(f"{error}{_of_attention(shapes.keys() - plan.keys.keys())}") from error
    else:
        plan.check({**plan.shapes, **{k: s for k, s in shapes.items() if k in plan.keys}}, tensors.source, odd)
        more = _made_up(tensors, plan, shapes, recipe.config, bounds, base)
        tensors = dataclasses.replace(tensors, tensors={**_of(tensors.tensors, plan), **more}) if more else tensors
        dtypes |= {key: np.dtype(x.dtype) for key, x in more.items()}
        kinds |= {d: memory_dtype(d, asked) for d in set(dtypes.values())}
    if dtype is None and np.dtype("float64") in dtypes.values() and jnp.zeros(0, float).dtype != "float64":
        warn(f"{tensors.source}: float64 tensors become float32, since jax_enable_x64 is off")
    where = adapter_placement(shardings, base, bounds) if is_spread(base, shardings) else {}
    copied = {key for b in bounds if b.method.copies for e in b.entries for key in e.keys}
    wide = {key: d if key in copied else kinds[d] for key, d in dtypes.items()}
    leaves = device_arrays.load_arrays(plan, tensors.tensors, wide, dtype, where, report)
    if dtype is None and wide != dtypes:  # arrays in memory come with their own
        for entry in plan.entries:
            if any(wide[key] != dtypes[key] for key in entry.keys):
                leaves[entry.path] = leaves[entry.path].astype(entry.dtype(wide))
    return Adapter(recipe.config, paths.unflatten(leaves), recipe.keymap), bounds


def _of_attention(keys: Iterable[str]) -> str:
    """The way out where a table lacks the lines of an `nn.MultiheadAttention`; PEFT alone has such names."""
    marks = (key.removeprefix(PEFT_PREFIX).partition(".base_layer.out_proj.lora_") for key in keys)
    modules = sorted({module for module, found, _ in marks if found})
    if not modules:
        return ""
    return (
        "\nThese are each an nn.MultiheadAttention in PyTorch, which holds queries, keys and values in one tensor. Give"
        " a KeyMap with their lines, which Weight.attention(path here, name there) makes:\n" + paths.bullets(modules)
    )


def _of(tensors: Mapping[str, Any], plan: plans.Plan) -> dict[str, Any]:
    return {key: tensors[key] for key in plan.keys if key in tensors}


def _made_up(
    tensors: PeftTensors,
    plan: plans.Plan,
    found: Mapping[str, Sequence[int]],
    config: Config,
    bounds: Sequence[sites.Site],
    base: planning.BaseParams,
) -> dict[str, Any]:
    """What a file lacks, as a fresh adapter has it; warns of that, and of what nothing takes."""
    missing, unexpected = [k for k in plan.keys if k not in found], [k for k in found if k not in plan.keys]
    said = [
        f"{len(keys)} {what}:\n{paths.bullets(keys, len(keys))}"
        for what, keys in (
            ("are missing, and begin as in a fresh adapter", missing),
            ("have no place in the model, and are left out", unexpected),
        )
        if keys
    ]
    if said:
        warn(f"{tensors.source}: strict=False takes what fits. Of its tensors\n" + "\n".join(said))
    if not missing:
        return {}
    lacking = set(missing)
    some = [b for b in bounds if any(key in lacking for e in b.entries for key in e.keys)]
    try:
        leaves = initial_values.init_values(config, some, jax.random.key(0), base=base.leaves)
    except AdapterError as error:
        raise type(error)(f"{tensors.source}: what it lacks cannot be made up: {error}") from error
    traced = any(isinstance(x, jax.Array) for x in _of(tensors.tensors, plan).values())
    made = sites.make_file_plan(some).encode(leaves, host=not traced)
    kinds = {
        np.dtype(spec.dtype) for key, spec in device_arrays.tensor_specs(tensors.tensors).items() if key in plan.keys
    }
    copied = {key for b in some if b.method.copies for e in b.entries for key in e.keys}
    like = kinds.pop() if len(kinds) == 1 else None
    return {key: made[key] if like is None or key in copied else made[key].astype(like) for key in missing}


AUTOCAST = "autocast"
"""Instead of a dtype: float32 for what has fewer bits, as PEFT's `autocast_adapter_dtype`."""


def memory_dtype(found: Any, asked: Any) -> np.dtype[Any]:
    """The dtype in memory of a tensor that a file has as `found`: in 8 bits nothing can be computed."""
    if asked not in (None, AUTOCAST):
        return np.dtype(asked)
    narrow = jnp.issubdtype(found, jnp.floating) and np.dtype(found).itemsize < (4 if asked == AUTOCAST else 2)
    return np.dtype("float32" if narrow else found)


def adapter_placement(shardings: Any, base: planning.BaseParams, bounds: Sequence[sites.Site]) -> dict[str, Any]:
    """`{path: sharding}`: what was asked for, else what follows from the base."""
    if shardings is not None:
        return sharding.requested_shardings(shardings.flat() if isinstance(shardings, Adapter) else shardings, bounds)
    return sharding.adapter_shardings(bounds, base.shardings)
