"""Files for another vocabulary size: copy the rows that both have, and keep the model's own for the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxadapt.adapters.initial_values import has_value
from jaxadapt.adapters.sites import Site
from jaxadapt.adapters.tied import NAMES
from jaxadapt.core.errors import warn
from jaxadapt.keymaps.keymap import KeyMap


def fit_vocabulary(
    tensors: Mapping[str, Any], sites: Sequence[Site], keymap: KeyMap, base: Mapping[str, Any], source: str
) -> dict[str, Any]:
    """Return a file's tensors resized to the model's vocabulary, and warn for each.

    Rows that the file lacks have no effect in an adapter, and are the base's own in a copy. Tensors that differ in
    another way stay unchanged; a later check reports them.
    """
    fitted = dict(tensors)
    for site in sites:
        vocabulary_axes = _vocabulary_axes(site, keymap)
        for tensor, entry in zip(site.tensors, site.entries, strict=True):
            key, expected = entry.keys[0], entry.form.file_shape
            found = tuple(fitted[key].shape) if key in fitted else expected
            differing = [i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b]
            if len(found) != len(expected) or len(differing) != 1 or len(entry.keys) != 1:
                continue
            (axis,) = differing
            if not vocabulary_axes or entry.form.right[axis] != vocabulary_axes:
                continue
            if tensor.name in site.method.neutral:
                rows = np.full(expected, site.method.neutral[tensor.name], fitted[key].dtype)
            elif tensor.is_copy and has_value(base.get(site.leaf), abstract=False):
                rows = np.array(entry.form.encode(np.asarray(base[site.leaf]), 0)).astype(fitted[key].dtype)
            else:
                continue
            common = (slice(None),) * axis + (slice(min(found[axis], expected[axis])),)
            rows[common] = np.asarray(fitted[key])[common]
            fitted[key] = rows
            warn(
                f"{source}: {key} is for a vocabulary of {found[axis]}, and the model's has {expected[axis]}: only the"
                f" first {min(found[axis], expected[axis])} rows are used",
            )
    return fitted


def _vocabulary_axes(site: Site, keymap: KeyMap) -> tuple[str, ...]:
    """Return the names of the axis that counts tokens, of a token embedding or of the head; empty for other weights."""
    roles = site.match.weight.torch_roles
    if site.match.weight.kind in ("embedding", "lookup"):
        return roles["in"]
    module = site.match.module({}) if not site.match.braced else ""
    return roles["out"] if module and (module == keymap.output or module.rpartition(".")[2] in NAMES) else ()
