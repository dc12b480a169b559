"""The base class of methods that train copies of their targets' parameters, such as LN_TUNING."""

from __future__ import annotations

from typing import Any, NoReturn

from jaxadapt.methods.base import Method


class CopyingMethod(Method):
    """A method whose sites all have the methods that `copy_of` returns, so that it has no arithmetic of its own."""

    scope = "copies"

    def _refuse(self, *args: Any, **options: Any) -> NoReturn:
        raise AssertionError(f"{self.peft_type} trains copies, which have methods of their own")

    tensors = hparams = effects = init = output = weight = unweight = _refuse
