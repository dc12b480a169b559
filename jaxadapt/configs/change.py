"""The size of the change that an adapter makes to a weight. NumPy is imported where it is used."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


@dataclasses.dataclass(frozen=True)
class Change:
    """The size of the change that an adapter makes to one weight.

    Attributes:
        norm: the norm, as `describe_change` of the configuration or of the method describes it.
        effective_rank: exp of the entropy of the change's normalized singular values; None if it has none.
        rank: the rank r, if the method has one.
        scale: the scale s, if the method has one.
    """

    norm: float
    effective_rank: float | None = None
    rank: int | None = None
    scale: float | None = None


def effective_rank(s: np.ndarray[Any, Any]) -> float:
    """Return exp of the entropy of normalized singular values (Roy and Vetterli 2007); 0 if all are 0.

    >>> import numpy as np
    >>> effective_rank(np.array([2.0, 2.0, 0.0]))
    2.0
    """
    import numpy as np

    p = s[s > 0] / max(s.sum(), np.finfo(s.dtype).tiny)
    return float(np.exp(-(p * np.log(p)).sum())) if p.size else 0.0


def change_of_matrix(delta: np.ndarray[Any, Any], rank: int | None = None) -> Change:
    """Return the Frobenius norm and the effective rank of a change (out, in), in float64."""
    import numpy as np

    if not np.isfinite(delta).all():  # a diverged run, on which decompositions fail
        return Change(math.nan, None, rank)
    s = np.linalg.svd(delta, compute_uv=False)
    return Change(float(np.sqrt((s**2).sum())), effective_rank(np.where(s > 1e-12 * s.max(), s, 0.0)), rank)
