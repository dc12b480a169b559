"""Leaves that are one matrix in PyTorch, for arithmetic that looks at all of it (its SVD, its largest values).

Queries, keys and values of an `nn.MultiheadAttention` share one A there, and so do gate and up of experts (Llama 4's
share one B). An adapter from PEFT's file holds equal copies of it; put together, what is computed here is what PEFT
computes, and the copies stay equal. Trained here they are no more so, and each leaf is a matrix by itself.
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
from jaxadapt.keymaps import parts as pieces
from jaxadapt.merging.factors import FactorRows, Factors

Array = Any


@dataclasses.dataclass(frozen=True)
class JointMatrix:
    """The leaves of one matrix: most often a single one, else several that have the factor `shared` in common."""

    leaves: tuple[str, ...]
    shared: str = ""

    def is_present(self, held: Mapping[str, Factors]) -> bool:
        return self.leaves[0] in held

    def factors(self, held: Mapping[str, Factors]) -> Factors:
        """The pair of the whole, where it is there."""
        pairs = [held[leaf] for leaf in self.leaves]
        a, b = self.join([p.a for p in pairs], [p.b for p in pairs])
        return dataclasses.replace(pairs[0], a=a, b=b)

    def join(self, a: Sequence[Array], b: Sequence[Array]) -> tuple[Array, Array]:
        """A (n, r, in) and B (n, out, r), or what is shaped like them, of the whole."""
        if not self.shared:
            return a[0], b[0]
        return (a[0], jnp.concatenate(b, 1)) if self.shared == "a" else (jnp.concatenate(a, 2), b[0])

    def split(self, made: FactorRows, like: Mapping[str, Factors]) -> dict[str, FactorRows]:
        """New matrices of the whole as those of each leaf."""
        if not self.shared:
            return {self.leaves[0]: made}
        own, axis = ("b", 1) if self.shared == "a" else ("a", 2)
        ends = np.cumsum([getattr(like[leaf], own).shape[axis] for leaf in self.leaves])
        parts = jnp.split(getattr(made, own), ends[:-1].tolist(), axis)
        return {leaf: dataclasses.replace(made, **{own: x}) for leaf, x in zip(self.leaves, parts, strict=True)}


def joint_matrices(held: Sequence[Mapping[str, Factors]]) -> list[JointMatrix]:
    """The matrices of several adapters. Raises `AttachError` inside jit where nobody can tell what is one."""
    like = {leaf: pair for pairs in held for leaf, pair in pairs.items()}
    found: dict[Hashable, list[str]] = {}
    for leaf, pair in like.items():
        found.setdefault(pair.modules if pair.match.weight.part else leaf, []).append(leaf)
    out: list[JointMatrix] = []
    for leaves in found.values():
        side = _shared(like[leaves[0]])
        several = [[getattr(p[leaf], side) for leaf in leaves if leaf in p] for p in held] if side else []
        if any(isinstance(x, Tracer) for xs in several for x in xs):
            raise AttachError(
                "inside jit nobody can tell whether these share a factor, and are one matrix as in PEFT:\n"
                + paths.bullets(leaves)
                + "\nCall it outside"
            )
        if side and all(not xs or (len(xs) == len(leaves) and joint_tensors.bitwise_equal(xs)) for xs in several):
            out.append(JointMatrix(tuple(leaves), side))
        else:
            out += [JointMatrix((leaf,)) for leaf in leaves]
    return out


def _shared(pair: Factors) -> str:
    """The factor that a part has in common with the others: "a", "b", or "" of a whole matrix."""
    of = [pieces.parse_part_key(entry.keys[0]) for entry in pair.entries]
    return next((side for side, piece in zip("ab", of, strict=True) if piece is not None and piece.axis is None), "")
