"""The base class of methods that train copies of their targets' parameters, such as LN_TUNING."""

from __future__ import annotations

from typing import Any, NoReturn

from jaxadapt.arrays.axes import Axes, Operation, Use
from jaxadapt.keymaps.tensor_spec import MethodTensor
from jaxadapt.methods.base import Array, Drop, Effects, Method, Params, Start, Target


class CopyingMethod(Method):
    """A method whose sites all have the methods that `copy_of` returns, so that it has no arithmetic of its own."""

    scope = "copies"

    def tensors(self, config: Any, target: Target) -> tuple[MethodTensor, ...]:
        return self._refuse()

    def hparams(self, config: Any, target: Target) -> None:
        return self._refuse()

    def effects(self, hparams: Any) -> Effects:
        return self._refuse()

    def init(self, config: Any, tensor: MethodTensor, start: Start) -> Array:
        return self._refuse()

    def output(
        self, hparams: Any, params: Params, use: Use | Operation, x: Array, y: Array, drop: Drop | None, w: Array
    ) -> Array:
        return self._refuse()

    def weight(self, hparams: Any, params: Params, axes: Axes, w: Array) -> Array:
        return self._refuse()

    def unweight(self, hparams: Any, params: Params, axes: Axes, w: Array) -> Array:
        return self._refuse()

    def _refuse(self) -> NoReturn:
        raise AssertionError(f"{self.peft_type} trains copies, which have methods of their own")
