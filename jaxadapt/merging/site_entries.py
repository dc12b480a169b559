"""The tensors of a plain LoRA's site as rows of matrices: their plan entries, names and shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxadapt.adapters.sites import Site
from jaxadapt.core.errors import ConfigError
from jaxadapt.keymaps.plan import PlanEntry

Array = Any


def select_rows(rows: Array, modules: Sequence[str], selected: Sequence[str]) -> Array:
    """Return the rows of the selected modules, in their order."""
    positions = {module: i for i, module in enumerate(modules)}
    return rows if tuple(modules) == tuple(selected) else rows[np.array([positions[module] for module in selected])]


def count_experts(site: Site) -> int:
    """Return the number of experts in one PyTorch tensor of this leaf; 1 for other leaves."""
    sizes = site.entries[0].form.axis_sizes
    return math.prod(sizes[axis] for axis in site.match.roles["experts"])


def row_names(site: Site, entry: PlanEntry) -> list[str]:
    """Return a name for each matrix of a leaf."""
    kind = site.match.weight.kind
    if kind not in ("experts", "attention"):
        return entry_stems(site, entry)
    stems = [key.rpartition(".lora_")[0] for key in entry.keys]
    return (
        [f"{stem}#{expert}" for stem in stems for expert in range(count_experts(site))] if kind == "experts" else stems
    )


def to_matrices(site: Site, side: str, x: Array) -> Array:
    """Return file tensors (n, …) as matrices; A's rows are (expert, rank) and B's columns (rank, expert)."""
    count, rank = count_experts(site), dict(site.tensors[0].own)["r"]
    if side == "A":
        return x.reshape(x.shape[0] * count, rank, -1)
    return jnp.moveaxis(x.reshape(x.shape[0], x.shape[1], rank, count), 3, 1).reshape(-1, x.shape[1], rank)


def from_matrices(site: Site, entry: PlanEntry, side: str, x: Array) -> Array:
    """Invert `_to_matrices`."""
    shape, count = entry.form.file_shape, count_experts(site)
    if side == "B":
        x = jnp.moveaxis(x.reshape(-1, count, x.shape[1], x.shape[2]), 1, 3)
    return x.reshape(-1, *shape)


def tensor_name(entry: PlanEntry) -> str:
    """Return the tensor's name in the adapter."""
    return entry.path.rpartition(".")[2]


def factor_entries(site: Site) -> tuple[PlanEntry, PlanEntry]:
    """Return the entries of A and B; raise `ConfigError` for a site with other tensors, or without matrices."""
    entries = {tensor.name: entry for tensor, entry in zip(site.tensors, site.entries, strict=True)}
    a, b = (next((entry for name, entry in entries.items() if name.endswith(suffix)), None) for suffix in ("_A", "_B"))
    are_matrices = a is not None and b is not None and len(a.form.file_shape) == len(b.form.file_shape) == 2
    has_experts = bool(site.axes.batch_axes) and not site.match.roles["fused"]
    is_shared = has_experts or site.match.weight.kind == "attention"  # several leaves form one module
    if a is None or b is None or not are_matrices or len(entries) != 2 or is_shared:
        tensors = ", ".join(f"{name} {list(entry.form.file_shape)}" for name, entry in entries.items())
        raise ConfigError(
            f"{site.leaf}: expected one pair of matrices A and B, found {tensors} (a variant of LoRA, or a convolution"
            " with groups); leave this leaf out"
        )
    return a, b


def product_entries(site: Site) -> tuple[PlanEntry, PlanEntry]:
    """Return the entries of A and B of a leaf whose change is B·A, matrix by matrix; raise `ConfigError` for others."""
    entry = site.match.weight
    entries = {tensor.name: tensor_entry for tensor, tensor_entry in zip(site.tensors, site.entries, strict=True)}
    if len(entries) == 2 and "lora_A" in entries and "lora_B" in entries and entry.groups == 1:
        return entries["lora_A"], entries["lora_B"]
    return factor_entries(site)


def entry_stems(site: Site, entry: PlanEntry) -> list[str]:
    """Return the keys of an entry without the tensor's suffix."""
    (suffix,) = (tensor.suffix for tensor in site.tensors if tensor.name == tensor_name(entry))
    return [key.removesuffix(suffix) for key in entry.keys]
