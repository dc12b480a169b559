"""Base parameters of a model by path, with the keymap for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxadapt.adapters.adapter import is_array
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, KeyMapError, raise_listed
from jaxadapt.keymaps import families
from jaxadapt.keymaps.generic import GENERIC
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.models.carriers import carrier
from jaxadapt.models.nnx import graph, survey


def collect_base_leaves(
    params: Any, keymap: KeyMap | str | None, *, allow_generic: bool = False
) -> tuple[dict[str, Any], KeyMap]:
    """Return the base weights of a model, of variables or of parameters as `{path: array}`, and their keymap.

    Raise `KeyMapError` if no family's keymap fits, unless `allow_generic`. Of an NNX model, state that is not a
    parameter is included if the keymap has an entry for it (for example the bias of MaxText's routers).
    """
    held = carrier(params)
    leaves = held.leaves()
    walk = held.walk()
    if walk is not None and (loose := walk.unowned):
        raise AttachError(
            "cannot collect all parameters: some are not direct attributes of an nnx.Module (for example inside a"
            " dict). Store each in a module, or pass the parameters as a tree of arrays:\n" + paths.bullets(loose)
        )
    not_arrays = [f"{path}: {type(x).__name__}" for path, x in leaves.items() if not is_array(x)]
    raise_listed(
        AttachError,
        "expected arrays as base parameters (for quantized ones call jaxadapt.models.dequantize first), found:",
        not_arrays,
    )
    resolved = families.resolve_keymap(keymap, leaf_shapes(leaves))
    if resolved is GENERIC and not allow_generic:
        raise unknown_names_error(leaf_shapes(leaves))
    if walk is not None:
        state = {path: var.get_value() for path, var in survey.layer_state(params).items() if resolved.match(path)}
        leaves = dict(sorted({**leaves, **state}.items(), key=lambda item: graph.natural_key(item[0])))
    return leaves, resolved


def leaf_shapes(leaves: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return `{path: shape}`."""
    return {path: tuple(x.shape) for path, x in leaves.items()}


def unknown_names_error(shapes: Mapping[str, tuple[int, ...]]) -> KeyMapError:
    """Return the error for parameters that no family's keymap matches."""
    return KeyMapError(
        "cannot export or import these parameters: no known model family matches them, so their PyTorch names are"
        " unknown. Pass keymap=<family>, or a KeyMap with an entry for each:\n"
        + paths.bullets(f"{path} {shape}" for path, shape in shapes.items())
        + families.describe_nearest_family(shapes)
    )
