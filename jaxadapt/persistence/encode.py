"""From a model's layout to PEFT's: extract the adapter of a tree once, then encode it as `PeftTensors`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxadapt.adapters import embeddings, experts, joint_tensors, prompt_sites, renaming, sites, tied
from jaxadapt.adapters.adapter import Adapter, PeftTensors
from jaxadapt.configs import Config
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, ConfigError, MismatchError
from jaxadapt.keymaps import families, parts
from jaxadapt.keymaps import plan as plans
from jaxadapt.keymaps.keymap import KeyMap, warn_unproved
from jaxadapt.keymaps.plan import Encoded
from jaxadapt.models import attachment, planning
from jaxadapt.models.foreign import tree as foreign
from jaxadapt.models.nnx import attach
from jaxadapt.persistence import multihost


def encode_tree(
    tree: Any,
    name: str,
    config: Config | None,
    keymap: KeyMap | str | None,
    lora_alpha: float | None,
    on_shared: str | None,
    *,
    in_memory: bool,
    dtype: Any = None,
    save_embedding_layers: bool | str = False,
) -> PeftTensors:
    """Return the tensors that PEFT's file holds for the adapter of a tree.

    Args:
        tree: anything `extract` takes.
        in_memory: True for `to_peft`, which accepts traced arrays. False for `save`, which accepts arrays that are
            partly in other processes.

    Raises `AttachError`, `ConfigError`, `KeyMapError` or `MismatchError`.
    """
    guest = None if isinstance(tree, Adapter) else attachment.find_foreign(tree)
    if guest is not None:
        require_values(guest.leaves, traced=in_memory, elsewhere=not in_memory)
        call = "to_peft(tree" if in_memory else "save(tree, path"
        new, _, values = foreign.tree_to_peft(guest, config, keymap, lora_alpha, call, dtype, on_shared)
        tensors = PeftTensors(new, values, f"this {guest.dialect.name} tree")
        if isinstance(values, Encoded) and new.get("ensure_weight_tying"):
            tensors = _repeat_for_heads(tensors, values, extract_adapter(tree, name, config, keymap))
        embeddings.may_need_embeddings(new, save_embedding_layers)  # raises for an unknown value
        return tensors
    if lora_alpha is not None:
        raise ConfigError("lora_alpha applies only to trees of other libraries; this adapter stores its own alpha")
    adapter = prompt_sites.as_stored(extract_adapter(tree, name, config, keymap, in_memory=in_memory))
    tensors = _encode(adapter, dtype)
    tensors = _with_embeddings(tensors, adapter, tree, save_embedding_layers)
    return _join_or_split(tensors, adapter, on_shared, "to_peft" if in_memory else "save")


def extract_adapter(
    tree: Any, name: str, config: Config | None, keymap: KeyMap | str | None, in_memory: bool | None = None
) -> Adapter:
    """Extract the adapter of a tree, with the target names of the given keymap.

    `in_memory`, if not None, requires values as in `encode_tree`.
    """
    adapter = attachment.extract(tree, name, config=config, keymap=keymap)
    if config is not None:
        adapter = dataclasses.replace(adapter, config=config)
    if in_memory is not None:
        require_values(adapter.flat(), traced=in_memory, elsewhere=not in_memory)
    if keymap in (None, "auto"):
        return adapter
    before = sites.sites_of(adapter)
    new = families.resolve_keymap(keymap, {})
    return dataclasses.replace(adapter, config=renaming.rename_targets(adapter.config, before, new), keymap=new)


def require_values(leaves: Mapping[str, Any], traced: bool, elsewhere: bool = False) -> None:
    """Raise `AttachError` for parameters whose values cannot be saved.

    Args:
        traced: accept traced arrays.
        elsewhere: accept arrays that are partly in other processes.
    """

    def obstacle(leaf: Any) -> str | None:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return "abstract: a shape only"
        if isinstance(leaf, Tracer):
            return None if traced else "traced: inside jit, grad or vmap"
        if isinstance(leaf, jax.Array) and leaf.is_deleted():
            return "deleted: it was donated to a jitted function"
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and not elsewhere:
            return "partly in other processes: only jaxadapt.save can write it"
        return None

    problems = [f"{path}: {reason}" for path, leaf in leaves.items() if (reason := obstacle(leaf))]
    if problems:
        raise AttachError("these parameters have no values to save:\n" + paths.bullets(problems))


def _encode(adapter: Adapter, dtype: Any) -> PeftTensors:
    config, keymap, shapes, leaves = adapter.config, adapter.keymap, adapter.shapes, adapter.flat()
    warn_unproved(keymap)
    adapter_sites = sites.sites_from_shapes(config, keymap, shapes)
    untargeted = sites.untargeted(config, keymap, shapes)
    if untargeted:
        raise MismatchError(
            "these modules or parameters have tensors, but target_modules (or target_parameters) of the configuration"
            " does not name them, so a reader would drop them:\n" + paths.bullets(untargeted)
        )
    host = not any(isinstance(leaf, Tracer) for leaf in leaves.values())
    if host:
        _require_zeros(adapter_sites, leaves)
    encoded = sites.make_file_plan(adapter_sites).encode(leaves, dtype, host)
    return PeftTensors(config, encoded, "this adapter")


def _require_zeros(adapter_sites: Sequence[sites.Site], leaves: Mapping[str, Any]) -> None:
    """Raise `MismatchError` for nonzero values in layers or ranks that the configuration excludes."""
    nonzero: list[str] = []
    for entry in (e for site in adapter_sites for e in site.entries if e.form.is_partial):
        leaf, used = leaves[entry.path], entry.form.expand_by_tensor([1] * entry.form.count) > 0
        xp: Any = np if multihost.is_local(leaf) else jnp
        if bool(xp.any(xp.where(used, 0, leaf) != 0)):
            nonzero.append(f"{entry.path} {tuple(leaf.shape)}")
    if nonzero:
        raise MismatchError(
            "these arrays have nonzero values in layers, parts or ranks that the configuration excludes"
            " (target_modules, layers_to_transform, exclude_modules, rank_pattern), and a file would lose them."
            " Training keeps them at zero: either other code wrote to them, or the configuration is not the adapter's"
            " own:\n" + paths.bullets(nonzero)
        )


def _with_embeddings(tensors: PeftTensors, adapter: Adapter, tree: Any, save: bool | str) -> PeftTensors:
    """Add the base's embedding and head if `save_embedding_layers` asks for them."""
    encoded = tensors.tensors
    if not embeddings.may_need_embeddings(tensors.config, save) or not isinstance(encoded, Encoded):
        return tensors
    has_base = isinstance(tree, attach.nnx.Module) or (isinstance(tree, Mapping) and "params" in tree)
    base = planning.base_arrays(tree) if has_base else None
    adapter_sites = sites.sites_of(adapter)
    more = embeddings.add_embeddings(encoded, adapter.config, adapter.keymap, adapter_sites, base, save)
    return dataclasses.replace(tensors, tensors=more)


def _join_or_split(tensors: PeftTensors, adapter: Adapter, on_shared: str | None, call: str) -> PeftTensors:
    """Join leaves that are one tensor in PyTorch, and split leaves that are several."""
    encoded = tensors.tensors
    if not isinstance(encoded, Encoded):
        return tensors
    if tensors.config.get("ensure_weight_tying"):
        tensors = _repeat_for_heads(tensors, encoded, adapter)
        encoded = tensors.tensors
        assert isinstance(encoded, Encoded)
    has_parts = parts.has_parts(encoded.plan.keys)
    if not (has_parts or (adapter.keymap.single and experts.may_have_experts(encoded.plan.keys))):
        return tensors
    if multihost.is_distributed(encoded.leaves.values()):
        raise AttachError(
            "cannot join these weights: PyTorch stores several of them in one tensor, and the arrays are partly in"
            " other processes. Gather the adapter's arrays first (they are small), with"
            " jax.experimental.multihost_utils"
        )
    if adapter.keymap.single:
        return PeftTensors(*experts.split_experts(tensors.config, encoded, adapter.keymap), tensors.source)
    joined = joint_tensors.join_tensors(tensors.config, sites.sites_of(adapter), encoded, on_shared, call)
    return PeftTensors(*joined, tensors.source)


def _repeat_for_heads(tensors: PeftTensors, encoded: Encoded, adapter: Adapter) -> PeftTensors:
    """Add the head's tensors for tied weights: PEFT stores them under both names (`ensure_weight_tying`)."""
    more = tied.repeat_for_heads(encoded.plan.entries, adapter.keymap)
    repeated = dataclasses.replace(encoded, plan=plans.make_plan([*encoded.plan.entries, *more]))
    return dataclasses.replace(tensors, tensors=repeated)
