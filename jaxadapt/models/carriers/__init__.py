"""Carriers: what kind of tree holds base parameters and adapters is decided here, once for each call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
from flax import nnx

from jaxadapt.adapters.adapter import Adapter
from jaxadapt.core.errors import AttachError
from jaxadapt.models.carriers.base import DEFAULT as DEFAULT
from jaxadapt.models.carriers.base import Carrier as Carrier
from jaxadapt.models.carriers.base import check_free as check_free
from jaxadapt.models.carriers.base import refuse as refuse
from jaxadapt.models.carriers.nnx_kinds import Model as Model
from jaxadapt.models.carriers.nnx_kinds import Object, State
from jaxadapt.models.carriers.tree_kinds import Foreign, Params, Value, Variables
from jaxadapt.models.carriers.tree_kinds import Module as Module
from jaxadapt.models.carriers.tree_kinds import Wrapper as Wrapper
from jaxadapt.models.foreign.tree import LoraTree, describe_unknown, find_lora
from jaxadapt.models.linen.wrapper import Adapted
from jaxadapt.models.planning import BaseParams

_KINDS: tuple[tuple[type[Any], type[Carrier]], ...] = (  # the first that fits: an nnx.Dict is a Mapping too
    (nnx.Module, Model),
    (nnx.State, State),
    (nnx.Pytree, Object),
    (Adapter, Value),
    (Adapted, Wrapper),
    (nn.Module, Module),
    (Mapping, Params),
)


def carrier(tree: Any) -> Carrier:
    """Return the carrier of a tree, for its base parameters and the adapters of jaxadapt."""
    kind = next((kind for cls, kind in _KINDS if isinstance(tree, cls)), Carrier)
    return Variables(tree) if kind is Params and isinstance(tree.get("params"), Mapping) else kind(tree)


def lora_carrier(tree: Any) -> Carrier:
    """Return the carrier of a tree, for its adapters: those of jaxadapt, else the LoRA leaves of another library.

    Raises `KeyMapError` if a known layout matches only some of the LoRA leaves, and `AttachError` for options of a
    `LoraTree` that apply only to trees of other libraries.
    """
    given = tree if isinstance(tree, LoraTree) else None
    own = carrier(tree if given is None else given.tree)
    found = None if own.has_adapters() else find_lora(given or LoraTree(tree), own.walk())
    if found is not None:
        return Foreign(found, own)
    if given is None:
        return own
    own.on_shared = given.on_shared
    near = "" if own.has_adapters() else describe_unknown(given.tree)
    why = f"applies only to trees of other libraries; jaxadapt's adapters store their own{near}"
    refuse({"lora_alpha": given.lora_alpha}, why)
    refuse({"slot": given.slot}, f"expected a tree whose arrays hold several adapters, found no LoRA leaves{near}")
    return own


def base_params(tree: Any) -> BaseParams:
    """Return the base parameters of an NNX model, or of nested mappings. Raises `AttachError` for variables."""
    held = carrier(tree)
    if isinstance(held, Variables):
        raise AttachError("expected base parameters, found variables; pass variables['params']")
    return held.base()
