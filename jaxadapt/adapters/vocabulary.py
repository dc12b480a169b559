"""A file for another vocabulary: the rows that the model has are taken, and it keeps its own for the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxadapt.adapters.full_copies import LOOKUP
from jaxadapt.adapters.initial_values import has_value
from jaxadapt.adapters.sites import Site
from jaxadapt.adapters.tied import NAMES
from jaxadapt.core.errors import warn
from jaxadapt.keymaps.keymap import KeyMap

_ZEROS = ("lora_embedding_A", "lora_B", "lora_B_bias")  # of which a row of zeros changes nothing


def fit_vocabulary(
    tensors: Mapping[str, Any], bounds: Sequence[Site], keymap: KeyMap, base: Mapping[str, Any], source: str
) -> dict[str, Any]:
    """A file's tensors with as many rows of the vocabulary as the model has, and a warning that says which.

    Rows that the file lacks are zeros in an adapter, and the base's own in a copy. What differs otherwise stays as it
    is, for the error that lists it.
    """
    out = dict(tensors)
    for bound in bounds:
        vocabulary = _vocabulary(bound, keymap)
        for tensor, entry in zip(bound.tensors, bound.entries, strict=True):
            key, want = entry.keys[0], entry.form.file_shape
            have = tuple(out[key].shape) if key in out else want
            odd = [i for i, (a, b) in enumerate(zip(have, want, strict=False)) if a != b]
            if len(have) != len(want) or len(odd) != 1 or len(entry.keys) != 1:
                continue
            (axis,) = odd
            if not vocabulary or entry.form.right[axis] != vocabulary:
                continue
            if tensor.name in _ZEROS:
                rows = np.zeros(want, out[key].dtype)
            elif tensor.is_copy and has_value(base.get(bound.leaf), abstract=False):
                rows = np.array(entry.form.encode(np.asarray(base[bound.leaf]), 0)).astype(out[key].dtype)
            else:
                continue
            both = (slice(None),) * axis + (slice(min(have[axis], want[axis])),)
            rows[both] = np.asarray(out[key])[both]
            out[key] = rows
            warn(
                f"{source}: {key} is for a vocabulary of {have[axis]}, and the model has {want[axis]}: the first"
                f" {min(have[axis], want[axis])} rows were taken",
            )
    return out


def _vocabulary(bound: Site, keymap: KeyMap) -> tuple[str, ...]:
    """The names of the axis that counts tokens: of a table of tokens, or of the head."""
    roles = bound.match.weight.torch_roles
    if bound.match.weight.kind in ("embedding", LOOKUP):
        return roles["in"]
    module = bound.match.module({}) if not bound.match.braced else ""
    return roles["out"] if module and (module == keymap.output or module.rpartition(".")[2] in NAMES) else ()
