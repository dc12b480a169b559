"""Full copies of leaves in an adapter: `modules_to_save` and trained biases, with PEFT's conventions.

Each site has one tensor, `copy`, with the shape of the base leaf; the file uses the name and layout of the base weight.
The copy of an active adapter replaces the leaf wherever its module reads it, and the base leaf does not change. In PEFT
a token embedding and the head tied to it are two modules, so a copy of one does not affect the other. Methods that
train copies of their targets' parameters, such as LN_TUNING, have the same base class.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NoReturn

import jax.numpy as jnp

from jaxadapt.arrays import low_rank
from jaxadapt.arrays.axes import LETTERS, Axes, Operation, Use
from jaxadapt.arrays.per_entry import PerEntry
from jaxadapt.configs.base import Config
from jaxadapt.core.errors import AttachError
from jaxadapt.keymaps.weight import MethodTensor
from jaxadapt.methods.base import Array, Drop, Effects, Method, Params, Start, Target, adapted_entries

# ---------------------------------------------------------------- full copy


@dataclasses.dataclass(frozen=True)
class CopyHparams:
    """Hyperparameters of a copied leaf.

    Attributes:
        because: the field of the configuration that requests the copy, for messages.
        used: 1 for each copied entry and 0 for the others; None if all are copied.
    """

    because: str
    used: PerEntry | None = None


class FullCopy(Method):
    """Use of a copy W' in place of W."""

    peft_type = ""  # not a method of PEFT: it accompanies any of them
    copies = True

    def __init__(self, because: str, wrapper: str = "", lookup: bool = False) -> None:
        """Create the method.

        Args:
            because: the field of the configuration that requests the copy.
            wrapper: what PEFT's key has between the names of the module and the parameter: ".base_layer" for each
                adapter around the same module.
            lookup: the weight is a token embedding that is also the head; the copy replaces it only in the lookup.
        """
        self._because, self._wrapper = because, wrapper
        self.replaces = not lookup

    def tensors(self, config: Config, target: Target) -> tuple[MethodTensor, ...]:
        used = None if target.modules.all else target.modules.each(lambda _: 1, 0)
        return (
            MethodTensor("copy", self._wrapper, (), (), is_copy=True, from_base=True, scale_power=1, used_sizes=used),
        )

    def hparams(self, config: Config, target: Target) -> CopyHparams:
        return CopyHparams(self._because, adapted_entries(target.modules))

    def effects(self, hparams: CopyHparams) -> Effects:
        return Effects("replaces", "weight" if self.replaces else "use")

    def init(self, config: Config, tensor: MethodTensor, start: Start) -> Array:
        return start.w

    def follows(self, hparams: CopyHparams, primitive: str) -> bool:
        return primitive == "gather"

    def output(
        self,
        hparams: CopyHparams,
        params: Params,
        use: Use | Operation,
        x: Array,
        y: Array,
        drop: Drop | None,
        w: Array,
    ) -> Array:
        assert not self.replaces, "a replaced leaf has no output hook"
        if isinstance(use, Use) and use.transposed:
            return y
        return low_rank.run_use(use, x, params["copy"].astype(w.dtype))

    def weight(self, hparams: CopyHparams, params: Params, axes: Axes, w: Array) -> Array:
        if not self.replaces:
            raise AttachError(
                f"{hparams.because} copies this weight only for the token lookup, but the weight is also the head, so"
                " there is no single effective weight. Build the model with a separate head (as PEFT's merge does), or"
                " train with ensure_weight_tying"
            )
        copy = params["copy"].astype(w.dtype)
        if hparams.used is None:
            return copy
        batch = "".join(LETTERS[i] for i in axes.batch_axes)
        used = low_rank.expand_to_letters(hparams.used.layer_values(params), batch, LETTERS[: axes.rank])
        return jnp.where(used > 0, copy, w)

    def unweight(self, hparams: CopyHparams, params: Params, axes: Axes, w: Array) -> NoReturn:
        raise AttachError(
            f"cannot unmerge {hparams.because}: the copy replaced the original weight entirely. Keep the parameters"
            " from before the merge"
        )


# ---------------------------------------------------------------- copies


class CopyingMethod(Method):
    """A method whose sites all have the methods that `copy_of` returns, so that it has no arithmetic of its own."""

    scope = "copies"

    def _refuse(self, *args: Any, **options: Any) -> NoReturn:
        raise AssertionError(f"{self.peft_type} trains copies, which have methods of their own")

    tensors = hparams = effects = init = output = weight = unweight = _refuse
