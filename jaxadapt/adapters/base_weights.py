"""A base's token embedding and head in an adapter's file: PEFT's `save_embedding_layers`.

If an adapter is on the embeddings, PEFT writes the base's token embedding and head to the adapter's file; on request
it does so for any adapter, for a vocabulary that was resized. PEFT loads them into the base. Here the file is written
alike, but loading never changes the base (`persistence.rules`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxadapt.adapters import full_copies
from jaxadapt.adapters.full_copies import NAMES
from jaxadapt.adapters.site import Site
from jaxadapt.configs import matching
from jaxadapt.configs.base import Config
from jaxadapt.core.errors import AttachError, ConfigError
from jaxadapt.keymaps import plan
from jaxadapt.keymaps.keymap import KeyMap, Match
from jaxadapt.keymaps.plan import Encoded
from jaxadapt.keymaps.weight import MethodTensor


def is_embedding(keymap: KeyMap, match: Match | None) -> bool:
    """Return True for a token embedding or a head."""
    if match is None or match.braced:
        return False
    module, parameter = match.parameter({})
    if parameter != "weight":
        return False
    is_token_embedding = match.weight.kind == "embedding" and module.rpartition(".")[2] in full_copies.INPUTS
    return is_token_embedding or module == keymap.output or module.rpartition(".")[2] in full_copies.NAMES


def _targets_embedding(config: Config, modules: Sequence[str]) -> bool:
    """Return True if PEFT sees an embedding among the targets; it only knows the usual names."""
    names = config.get("target_modules")
    if isinstance(names, str):
        return any(
            module.rpartition(".")[2] in full_copies.NAMES and matching.is_target(config, module) for module in modules
        )
    return any(name in (names or ()) for name in full_copies.NAMES)


def may_need_embeddings(config: Config, mode: bool | str) -> bool:
    """Return True if the file may need embeddings, judging by the configuration only.

    Raises `ConfigError` for an unknown `mode` (PEFT's `save_embedding_layers`).
    """
    if mode not in (True, False, "auto"):
        raise ConfigError(f"save_embedding_layers: expected true, false or 'auto', found {mode!r}")
    names = config.get("target_modules")
    return mode is True or (mode == "auto" and (isinstance(names, str) or _targets_embedding(config, ())))


def add_embeddings(
    tensors: Encoded,
    config: Config,
    keymap: KeyMap,
    sites: Sequence[Site],
    base: Mapping[str, Any] | None,
    mode: bool | str,
) -> Encoded:
    """Return an adapter's tensors with the embeddings that PEFT would save with them.

    Args:
        base: `{leaf: array}` of the base parameters; None for an adapter without a model.
        mode: as PEFT's `save_embedding_layers`: "auto", true or false.
    """
    if base is None and mode is True:
        raise AttachError(
            "save_embedding_layers=True: an adapter without its model does not hold the embeddings; save the model"
        )
    if base is None or not mode:
        return tensors
    matches = [match for leaf in base if is_embedding(keymap, match := keymap.match(leaf)) and match is not None]
    modules = {match.module({}): match for match in matches if len(match.weight.left) == base[match.leaf].ndim}
    adapted = {module for site in sites if not site.method.copies for module in site.modules}
    targeted = _targets_embedding(config, list(modules))
    if mode == "auto" and (not targeted or config.get("trainable_token_indices") is not None):
        return tensors
    entries, leaves = [*tensors.plan.entries], dict(tensors.leaves)
    for module, match in modules.items():
        inner = ".base_layer" if module in adapted else ""
        tensor = MethodTensor("base", inner, (), (), is_copy=True, scale_power=1)
        entry = plan.plan_entry(keymap, match, tensor, plan.axis_sizes(match, base[match.leaf].shape))
        if (inner or not targeted) and tensors.plan.keys.keys().isdisjoint(entry.keys):
            entries.append(entry)
            leaves[entry.path] = base[match.leaf]
    return dataclasses.replace(tensors, plan=plan.make_plan(entries), leaves=leaves)


def vocabulary_axes(site: Site, keymap: KeyMap) -> tuple[str, ...]:
    """Return the names of the axis that counts tokens, of a token embedding or of the head; empty for other weights."""
    roles = site.match.weight.torch_roles
    if site.match.weight.kind in ("embedding", "lookup"):
        return roles["in"]
    module = site.match.module({}) if not site.match.braced else ""
    return roles["out"] if module and (module == keymap.output or module.rpartition(".")[2] in NAMES) else ()
