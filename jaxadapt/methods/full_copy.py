"""A leaf of which the adapter holds a full copy: `modules_to_save` and trained biases, with PEFT's conventions.

In the model, per site: `copy`, as the base's leaf is; in the file the base weight's own name and layout. An
active adapter's copy stands in for the leaf wherever its module reads it; the original stays as it is. In PEFT the
table of tokens and a head that is tied to it are two modules, so one's copy leaves the other as it is.
"""

from __future__ import annotations

import dataclasses
from typing import NoReturn

import jax.numpy as jnp

from jaxadapt.arrays import low_rank
from jaxadapt.arrays.axes import LETTERS, Axes, Operation, Use
from jaxadapt.arrays.per_entry import PerEntry
from jaxadapt.configs import Config
from jaxadapt.core.errors import AttachError
from jaxadapt.keymaps.keymap import Match
from jaxadapt.keymaps.tensor_spec import MethodTensor, Modules
from jaxadapt.methods.base import Array, Drop, Method, Params
from jaxadapt.methods.per_entry import adapted_entries


@dataclasses.dataclass(frozen=True)
class CopyHparams:
    """Why the leaf is copied, and which of its entries are, if not all."""

    because: str
    used: PerEntry | None = None


class FullCopy(Method):
    """W' instead of W."""

    peft_type = ""  # of no method of PEFT's: it goes with any
    copies = True

    def __init__(self, because: str, wrapped: bool = False, lookup: bool = False) -> None:
        """`lookup`: of a table of tokens that is the head as well, in whose place it does not stand there."""
        self._because, self._wrapped = because, wrapped
        self.replaces = not lookup

    def check(self, config: Config) -> None:
        pass

    def tensors(self, config: Config, site: Match, modules: Modules) -> tuple[MethodTensor, ...]:
        wrapped = ".base_layer" if self._wrapped else ""
        used = None if modules.all else modules.each(lambda _: 1, 0)
        return (MethodTensor("copy", wrapped, (), (), is_copy=True, from_base=True, scale_power=1, used=used),)

    def hparams(self, config: Config, site: Match, modules: Modules) -> CopyHparams:
        return CopyHparams(self._because, adapted_entries(modules))

    def fresh(self, config: Config, tensor: MethodTensor, fan_in: int) -> NoReturn:
        raise AssertionError("a copy begins as the base's leaf")

    def from_base(self, static: CopyHparams, params: Params, axes: Axes, w: Array) -> dict[str, Array]:
        return {"copy": w}

    def follows(self, static: CopyHparams, primitive: str) -> bool:
        return primitive == "gather"

    def output(
        self, static: CopyHparams, params: Params, use: Use | Operation, x: Array, y: Array, drop: Drop | None, w: Array
    ) -> Array:
        assert not self.replaces, "a copy takes the leaf's place, and no part in a product"
        if isinstance(use, Use) and use.transposed:
            return y
        return low_rank.run_use(use, x, params["copy"].astype(w.dtype))

    def weight(self, static: CopyHparams, params: Params, axes: Axes, w: Array) -> Array:
        if not self.replaces:
            raise AttachError(
                f"{static.because} holds a copy for the lookup of tokens alone, and this weight is the head as well:"
                " there is none that is both. Build the model with a head of its own (PEFT's merge does), or train with"
                " ensure_weight_tying"
            )
        copy = params["copy"].astype(w.dtype)
        if static.used is None:
            return copy
        batch = "".join(LETTERS[i] for i in axes.batch_axes)
        used = low_rank.expand_to_letters(static.used.layer_values(params), batch, LETTERS[: axes.rank])
        return jnp.where(used > 0, copy, w)

    def unweight(self, static: CopyHparams, params: Params, axes: Axes, w: Array) -> NoReturn:
        raise AttachError(
            f"{static.because} puts a copy into the leaf's place, and nothing of the original is left in it; keep the"
            " parameters as they were before merging"
        )
