"""The difference of two changes ΔW = s·B·A, from their factors.

ΔW is never computed. Norms and products follow from small Gram matrices, as
⟨B₁·A₁, B₂·A₂⟩ = tr(B₁ᵀB₂ · A₂A₁ᵀ), and ‖ΔW₁ − ΔW₂‖² = ‖ΔW₁‖² + ‖ΔW₂‖² − 2⟨ΔW₁, ΔW₂⟩. Two steps of one run, whose
factors are nearly equal, would lose their digits in this sum. With the scales in the As and equal ranks,
ΔW₁ − ΔW₂ = (B₁ − B₂)·A₁ + B₂·(A₁ − A₂) keeps them. The angles between two subspaces have the cosines σ(Q₁ᵀQ₂), with
orthonormal bases Q (Björck and Golub 1973), which follow from the Gram matrices as well.

The Gram matrices are sums over blocks in float64, so that the factors are read once and never stored in float64.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np


class Factors(NamedTuple):
    """s·A and B of a module, or of each of its experts, in the dtypes of the file."""

    a: np.ndarray
    """(experts, r, in)"""
    b: np.ndarray
    """(experts, out, r)"""
    scale: np.ndarray
    """(experts, r, 1), float64; the rows of A are multiplied by it."""


class ProductDifference(NamedTuple):
    """The difference of two products; the fields are those of `ModuleDifference`."""

    norms: tuple[float, float]
    distance: float
    cosine: float
    output_angles: tuple[float, float] | None
    input_angles: tuple[float, float] | None


_BLOCK = 1 << 16
"""Elements that are converted to float64 at a time, so that they stay in the processor's cache."""
_NEAR = 1e-4
"""Ratio of the squared distance to the squared norms below which it is computed from the factors' differences."""


class _Grams(NamedTuple):
    """XᵀX, XᵀY and YᵀY of each expert, in float64."""

    x: np.ndarray
    xy: np.ndarray
    y: np.ndarray


def _grams(x: np.ndarray, y: np.ndarray, s: np.ndarray | None, t: np.ndarray | None, differ: bool) -> _Grams:
    """Return the Gram matrices of the rows of s·x and t·y; those of s·x − t·y and t·y if `differ`.

    Args:
        x, y: (experts, rows, n), in any memory layout.
        s, t: (experts, rows, 1); None for 1.
        differ: True to take the difference for s·x. It is formed before it is multiplied, so it keeps its digits.
    """
    import numpy as np

    experts, rows, n = x.shape
    total = rows + y.shape[1]
    sums = np.zeros((experts, total, total))
    step = max(1, _BLOCK // total)
    # The blocks have the memory layout of the factors: A's rows are contiguous, and so are those of B, transposed.
    by_rows = x.strides[2] <= x.strides[1]
    memory = np.empty((total, step) if by_rows else (step, total))
    for i in range(experts):
        for start in range(0, n, step):
            size = min(step, n - start)
            both = memory[:, :size] if by_rows else memory[:size].T
            for part, factor, scale in ((both[:rows], x, s), (both[rows:], y, t)):
                part[...] = factor[i, :, start : start + size]
                if scale is not None:
                    part *= scale[i]
            if differ:
                both[:rows] -= both[rows:]
            sums[i] += both @ both.T
    return _Grams(sums[:, :rows, :rows], sums[:, :rows, rows:], sums[:, rows:, rows:])


def compare_products(one: Factors, other: Factors) -> ProductDifference:
    """Compare s₁·B₁·A₁ with s₂·B₂·A₂ of the same sizes and number of experts; the norms are over all experts."""
    a = _grams(one.a, other.a, one.scale, other.scale, False)
    b = _grams(one.b.swapaxes(1, 2), other.b.swapaxes(1, 2), None, None, False)
    squares = [max(float((p * q).sum()), 0.0) for p, q in ((a.x, b.x), (a.y, b.y))]
    norms = math.sqrt(squares[0]), math.sqrt(squares[1])
    product = float((a.xy * b.xy).sum())
    square = squares[0] + squares[1] - 2 * product
    if one.a.shape == other.a.shape and square < _NEAR * (squares[0] + squares[1]):
        # ΔW₁ − ΔW₂ = F·A₁ + B₂·E, with F = B₁ − B₂, E = A₁ − A₂ and A₁ = A₂ + E
        e = _grams(one.a, other.a, one.scale, other.scale, True)
        f = _grams(one.b.swapaxes(1, 2), other.b.swapaxes(1, 2), None, None, True)
        square = float((f.x * a.x).sum() + 2 * (f.xy * (e.x + e.xy.swapaxes(1, 2))).sum() + (f.y * e.x).sum())
    cosine = product / (norms[0] * norms[1]) if norms[0] and norms[1] else math.nan
    cosine = cosine if math.isnan(cosine) else max(-1.0, min(1.0, cosine))
    return ProductDifference(norms, math.sqrt(max(square, 0.0)), cosine, *_angles(b, a))


_SMALLEST = 1e-13
"""Ratio to the largest eigenvalue of a Gram matrix below which a direction counts as none; about 3e-7 of the factor."""
_WELL_CONDITIONED = 1e-3
"""Ratio of the diagonal of a Cholesky factor above which the angles follow from it to about 1e-10."""


def _angles(*sides: _Grams) -> list[tuple[float, float] | None]:
    """Return the smallest and largest principal angle of each side over all experts, in degrees."""
    import numpy as np

    x, xy, y = (np.concatenate(parts) for parts in zip(*sides, strict=True))
    cosines = _cosines_by_cholesky(x, xy, y)
    if cosines is None:
        return [_angles_by_eigenvectors(*side) for side in sides]
    angles = np.degrees(np.arccos(np.clip(cosines, -1, 1))).reshape(len(sides), -1)
    return [(float(row.min()), float(row.max())) for row in angles]


def _cosines_by_cholesky(x: np.ndarray, xy: np.ndarray, y: np.ndarray) -> np.ndarray | None:
    """Return the singular values of L⁻¹·XᵀY·M⁻ᵀ for XᵀX = L·Lᵀ, YᵀY = M·Mᵀ; None if one is nearly singular."""
    import numpy as np

    try:
        factors = [np.linalg.cholesky(gram) for gram in (x, y)]
    except np.linalg.LinAlgError:
        return None
    for factor in factors:
        diagonal = factor.diagonal(axis1=1, axis2=2)
        if not (diagonal.min(1, initial=np.inf) > _WELL_CONDITIONED * diagonal.max(1, initial=0)).all():
            return None  # also for NaN
    half = np.linalg.solve(factors[0], xy)
    return np.linalg.svd(np.linalg.solve(factors[1], half.swapaxes(1, 2)), compute_uv=False)


def _angles_by_eigenvectors(x: np.ndarray, xy: np.ndarray, y: np.ndarray) -> tuple[float, float] | None:
    """Return the smallest and largest angle of factors that may lack ranks."""
    import numpy as np

    found: list[float] = []
    for one, mixed, other in zip(x, xy, y, strict=True):
        bases: list[Any] = []
        for gram in (one, other):
            if not np.isfinite(gram).all():
                return None
            values, vectors = np.linalg.eigh(gram)
            kept = values > _SMALLEST * max(values[-1], 0.0)
            bases.append(vectors[:, kept] / np.sqrt(values[kept]))
        if not bases[0].shape[1] or not bases[1].shape[1]:
            return None
        cosines = np.linalg.svd(bases[0].T @ mixed @ bases[1], compute_uv=False)
        found += np.degrees(np.arccos(np.clip(cosines, -1, 1))).tolist()
    return (min(found), max(found)) if found else None
