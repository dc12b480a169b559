"""The size of a change of a weight, with NumPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from jaxadapt.methods.base import Change


def effective_rank(s: np.ndarray[Any, Any]) -> float:
    """Return exp of the entropy of normalized singular values (Roy and Vetterli 2007); 0 if all are 0.

    >>> effective_rank(np.array([2.0, 2.0, 0.0]))
    2.0
    """
    p = s[s > 0] / max(s.sum(), np.finfo(s.dtype).tiny)
    return float(np.exp(-(p * np.log(p)).sum())) if p.size else 0.0


def change_of_matrix(delta: np.ndarray[Any, Any], rank: int | None = None) -> Change:
    """Return the Frobenius norm and the effective rank of a change (out, in), in float64."""
    if not np.isfinite(delta).all():  # a diverged run, on which decompositions fail
        return Change(math.nan, None, rank)
    s = np.linalg.svd(delta, compute_uv=False)
    return Change(float(np.sqrt((s**2).sum())), effective_rank(np.where(s > 1e-12 * s.max(), s, 0.0)), rank)
