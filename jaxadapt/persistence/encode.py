"""From a model's layout to PEFT's: extract the adapter of a tree once, then encode it as `PeftTensors`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxadapt import methods
from jaxadapt.adapters import base_weights, experts, full_copies, joint_tensors, sites, state_dict_keys
from jaxadapt.adapters.adapter import SHARED_NODE, Adapter, PeftTensors
from jaxadapt.configs import Config, lora
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, MismatchError, raise_listed
from jaxadapt.keymaps import families, plan
from jaxadapt.keymaps import plan as plans
from jaxadapt.keymaps.keymap import KeyMap, warn_unproved
from jaxadapt.keymaps.plan import Encoded
from jaxadapt.models.carriers import Carrier, lora_carrier
from jaxadapt.models.foreign import tree as foreign
from jaxadapt.persistence import fingerprint, multihost


@dataclasses.dataclass(frozen=True)
class Source:
    """The adapter of a tree, taken apart once for `to_peft` and `save`."""

    held: Carrier
    adapter: Adapter

    @functools.cached_property
    def leaves(self) -> dict[str, Any]:
        """`{path: array}` of the adapter."""
        return self.adapter.flat()

    @functools.cached_property
    def sites(self) -> sites.Sites:
        """The adapter's sites."""
        return sites.sites_of(self.adapter)


def take_adapter(
    held: Carrier,
    name: str,
    config: Config | None,
    keymap: KeyMap | str | None,
    lora_alpha: float | None = None,
    *,
    in_memory: bool,
) -> Source:
    """Take the adapter out of a tree, with the target names of the given keymap.

    Raises `AttachError` for parameters without values; `in_memory` is as in `encode_tree`.
    """
    adapter = held.extract(name, config, keymap, lora_alpha)
    source = Source(held, adapter if config is None else dataclasses.replace(adapter, config=config))
    require_values(source.leaves, traced=in_memory, elsewhere=not in_memory)
    if keymap in (None, "auto"):
        return source
    new = families.resolve_keymap(keymap, {})
    config = state_dict_keys.rename_targets(source.adapter.config, source.sites, new)
    return Source(held, dataclasses.replace(source.adapter, config=config, keymap=new))


def encode_tree(
    tree: Any,
    name: str,
    config: Config | None,
    keymap: KeyMap | str | None,
    lora_alpha: float | None,
    on_shared: str | None,
    *,
    in_memory: bool,
    save_embedding_layers: bool | str = False,
    timeout: float = 300,
) -> PeftTensors:
    """Return the tensors that PEFT's file holds for the adapter of a tree.

    Args:
        tree: anything `extract` takes.
        in_memory: True for `to_peft`, which accepts traced arrays. False for `save`, which accepts arrays that are
            partly in other processes.
        timeout: in seconds, for each answer of another process.

    With `in_memory=False` and an adapter that is spread over several processes, all of them call this.

    Raises `AttachError`, `ConfigError`, `KeyMapError` or `MismatchError`.
    """
    held = lora_carrier(tree)
    if held.foreign is not None:
        require_values(held.foreign.leaves, traced=in_memory, elsewhere=not in_memory)
        tensors, known = foreign.tree_to_peft(held.foreign, config, keymap, lora_alpha, on_shared)
        base_weights.may_need_embeddings(tensors.config, save_embedding_layers)  # raises for an unknown value
        if not isinstance(tensors.tensors, Encoded):
            return tensors
        return dataclasses.replace(
            tensors, tensors=_repeat_for_heads(tensors.config, tensors.tensors, known.own_keymap, None)
        )
    source = take_adapter(held, name, config, keymap, lora_alpha, in_memory=in_memory)
    if stored := methods.get_method(source.adapter.config).stored(source.adapter.config, source.adapter.shared):
        params = {**source.adapter.params, SHARED_NODE: stored}
        source = Source(held, dataclasses.replace(source.adapter, params=params))
    encoded = _with_embeddings(source, _encode(source), save_embedding_layers)
    config, keymap = source.adapter.config, source.adapter.keymap
    leaves = held.leaves() if held.has_base else None
    encoded = _repeat_for_heads(config, encoded, keymap, leaves)
    tensors = _join_or_split(source, encoded, on_shared)
    return PeftTensors(*tensors, "this adapter", None if in_memory else _fingerprint(source, timeout))


def _fingerprint(source: Source, timeout: float) -> fingerprint.Fingerprint | None:
    """Return the fingerprint of the tree's base; None without one, or if the adapter changed it.

    If the adapter is spread over several processes, their values are joined. A base that is spread although its adapter
    is not has no fingerprint: only one of the processes may be saving.
    """
    if not source.held.has_base or lora.changes_base(source.adapter.config):
        return None
    found = fingerprint.of_base(source.held.some_leaves, source.adapter.keymap, source.sites)
    if multihost.is_distributed(source.leaves.values()):
        return multihost.combine_values("the fingerprint of the base", found, fingerprint.merge, timeout)
    return found if found is None or fingerprint.is_complete(found) else None


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
    raise_listed(AttachError, "these parameters have no values to save:", problems)


def _encode(source: Source) -> Encoded:
    adapter, leaves = source.adapter, source.leaves
    warn_unproved(adapter.keymap)
    adapter_sites = source.sites
    sites.require_complete(leaves, adapter_sites)
    if adapter_sites.untargeted:
        raise MismatchError(
            "these modules or parameters have tensors, but target_modules (or target_parameters) of the configuration"
            " does not name them, so a reader would drop them:\n" + paths.bullets(adapter_sites.untargeted)
        )
    host = not any(isinstance(leaf, Tracer) for leaf in leaves.values())
    if host:
        _require_zeros(adapter_sites, leaves)
    return sites.make_file_plan(adapter_sites).encode(leaves, host)


def _require_zeros(adapter_sites: Sequence[sites.Site], leaves: Mapping[str, Any]) -> None:
    """Raise `MismatchError` for nonzero values in layers or ranks that the configuration excludes."""
    nonzero: list[str] = []
    for entry in (e for site in adapter_sites for e in site.entries if e.form.is_partial):
        leaf, used = leaves[entry.path], entry.form.expand_by_tensor([1] * entry.form.count) > 0
        xp: Any = np if multihost.is_local(leaf) else jnp
        if bool(xp.any(xp.where(used, 0, leaf) != 0)):
            nonzero.append(f"{entry.path} {tuple(leaf.shape)}")
    raise_listed(
        MismatchError,
        "these arrays have nonzero values in layers, parts or ranks that the configuration excludes"
        " (target_modules, layers_to_transform, exclude_modules, rank_pattern), and a file would lose them."
        " Training keeps them at zero: either other code wrote to them, or the configuration is not the adapter's"
        " own:",
        nonzero,
    )


def _with_embeddings(source: Source, encoded: Encoded, save: bool | str) -> Encoded:
    """Add the base's embedding and head if `save_embedding_layers` asks for them."""
    adapter, held = source.adapter, source.held
    if not base_weights.may_need_embeddings(adapter.config, save):
        return encoded
    base = held.leaves() if held.has_base else None
    return base_weights.add_embeddings(encoded, adapter.config, adapter.keymap, source.sites, base, save)


def _join_or_split(source: Source, encoded: Encoded, on_shared: str | None) -> tuple[Config, Mapping[str, Any]]:
    """Join leaves that are one tensor in PyTorch, and split leaves that are several."""
    config, keymap = source.adapter.config, source.adapter.keymap
    has_parts = plan.has_parts(encoded.plan.keys)
    if not (has_parts or (keymap.per_expert and experts.may_have_experts(encoded.plan.keys))):
        return config, encoded
    if multihost.is_distributed(encoded.leaves.values()):
        raise AttachError(
            "cannot join these weights: PyTorch stores several of them in one tensor, and the arrays are partly in"
            " other processes. Gather the adapter's arrays first (they are small), with"
            " jax.experimental.multihost_utils"
        )
    if keymap.per_expert:
        return experts.split_experts(config, encoded, keymap)
    return joint_tensors.join_tensors(config, source.sites, encoded, on_shared)


def _repeat_for_heads(config: Config, encoded: Encoded, keymap: KeyMap, leaves: Iterable[str] | None) -> Encoded:
    """Add the head's tensors for tied weights: PEFT stores them under both names. `leaves` are the base's, if known."""
    if not full_copies.repeats_heads(config, keymap, leaves):
        return encoded
    more = full_copies.repeat_for_heads(config, encoded.plan.entries, keymap)
    return dataclasses.replace(encoded, plan=plans.make_plan([*encoded.plan.entries, *more]))
