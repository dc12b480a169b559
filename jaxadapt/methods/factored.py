"""Methods whose change of a weight is a product B·A of two matrices that they compute from their tensors."""

from __future__ import annotations

import abc
from typing import Any

from jaxadapt.methods.base import Array, Params
from jaxadapt.methods.matrix import MatrixMethod


class FactoredMethod(MatrixMethod):
    """A method with W + B·A. A subclass defines `factors`, and `delta` or `after` only where they are cheaper."""

    @abc.abstractmethod
    def factors(self, own: Any, params: Params, shape: tuple[int, int]) -> tuple[Array, Array]:
        """Return A (r, in) and B (out, r), with the scale, of a linear weight of the given shape (out, in)."""

    def delta(self, own: Any, params: Params, w: Array) -> Array:
        a, b = self.factors(own, params, w.shape)
        return b @ a

    def after(self, own: Any, params: Params, x: Array, y: Array) -> Array:
        a, b = self.factors(own, params, (y.shape[-1], x.shape[-1]))
        return y + (x.astype(a.dtype) @ a.T) @ b.T

    def plain_rank(self, config: Any) -> int:
        rank: int = config.r
        return rank
