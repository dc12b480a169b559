"""Leaves that are one matrix in PyTorch, joined for arithmetic on the full matrix (its SVD, its largest values).

Queries, keys and values of an `nn.MultiheadAttention` share one A there, and so do gate and up of experts (Llama 4's
share one B). An adapter from PEFT's file holds equal copies of the shared factor. Joined, they give PEFT's result, and
the copies stay equal. After training here the copies differ, and each leaf is treated as its own matrix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxadapt.adapters import joint_tensors
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError
from jaxadapt.keymaps.plan import parse_part_key
from jaxadapt.merging.factors import FactorRows, Factors

Array = Any


@dataclasses.dataclass(frozen=True)
class JointMatrix:
    """The leaves of one matrix: usually one, or several that share the factor `shared`."""

    leaves: tuple[str, ...]
    shared: str = ""

    def is_present(self, factors: Mapping[str, Factors]) -> bool:
        """Return True if an adapter has this matrix."""
        return self.leaves[0] in factors

    def factors(self, by_leaf: Mapping[str, Factors]) -> Factors:
        """Return the factors of the full matrix, of an adapter that has it."""
        parts = [by_leaf[leaf] for leaf in self.leaves]
        a, b = self.join([part.a for part in parts], [part.b for part in parts])
        return dataclasses.replace(parts[0], a=a, b=b)

    def join(self, a: Sequence[Array], b: Sequence[Array]) -> tuple[Array, Array]:
        """Return A (n, r, in) and B (n, out, r) of the full matrix, or other arrays of these shapes."""
        if not self.shared:
            return a[0], b[0]
        return (a[0], jnp.concatenate(b, 1)) if self.shared == "a" else (jnp.concatenate(a, 2), b[0])

    def split(self, rows: FactorRows, like: Mapping[str, Factors]) -> dict[str, FactorRows]:
        """Return the rows of each leaf from those of the full matrix; `like` gives the leaves' sizes."""
        if not self.shared:
            return {self.leaves[0]: rows}
        side, axis = ("b", 1) if self.shared == "a" else ("a", 2)
        ends = np.cumsum([getattr(like[leaf], side).shape[axis] for leaf in self.leaves])
        parts = jnp.split(getattr(rows, side), ends[:-1].tolist(), axis)
        return {leaf: dataclasses.replace(rows, **{side: x}) for leaf, x in zip(self.leaves, parts, strict=True)}


def joint_matrices(adapters: Sequence[Mapping[str, Factors]]) -> list[JointMatrix]:
    """Return the matrices of several adapters.

    Raises `AttachError` inside jit where shared factors cannot be compared.
    """
    factors = {leaf: leaf_factors for by_leaf in adapters for leaf, leaf_factors in by_leaf.items()}
    groups: dict[Hashable, list[str]] = {}
    for leaf, leaf_factors in factors.items():
        groups.setdefault(leaf_factors.modules if leaf_factors.match.weight.part else leaf, []).append(leaf)
    matrices: list[JointMatrix] = []
    for leaves in groups.values():
        side = _shared_side(factors[leaves[0]])
        shared_arrays = (
            [[getattr(by_leaf[leaf], side) for leaf in leaves if leaf in by_leaf] for by_leaf in adapters]
            if side
            else []
        )
        if any(isinstance(x, Tracer) for arrays in shared_arrays for x in arrays):
            raise AttachError(
                "inside jit these shared factors cannot be compared, so the leaves cannot be joined to one matrix as in"
                " PEFT. Call the function outside jit:\n" + paths.bullets(leaves)
            )
        if side and all(
            not arrays or (len(arrays) == len(leaves) and joint_tensors.bitwise_equal(arrays))
            for arrays in shared_arrays
        ):
            matrices.append(JointMatrix(tuple(leaves), side))
        else:
            matrices += [JointMatrix((leaf,)) for leaf in leaves]
    return matrices


def _shared_side(factors: Factors) -> str:
    """Return the factor that a part shares with the others, "a" or "b"; "" for a full matrix."""
    parts = [parse_part_key(entry.keys[0]) for entry in factors.entries]
    return next((side for side, part in zip("ab", parts, strict=True) if part is not None and part.axis is None), "")
