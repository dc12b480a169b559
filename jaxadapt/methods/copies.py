"""Copies of leaves in an adapter, in full or by rows, with PEFT's conventions.

`modules_to_save` and trained biases are full copies. Each site has one tensor, `copy`, with the shape of the base leaf;
the file uses the name and layout of the base weight. The copy of an active adapter replaces the leaf wherever its
module reads it, and the base leaf does not change. In PEFT a token embedding and the head tied to it are two modules,
so a copy of one does not affect the other.

LoRA's `trainable_token_indices` are copies of rows. A site has one tensor, `trainable_tokens_delta` (tokens, dim), in
the order of the configuration's indices, in the model and in the file. Despite its name it holds the rows themselves,
as in PEFT's `tuners/trainable_tokens/layer.py`. The rows of an active adapter replace those of the embedding in every
use, including the head of a model with tied embeddings.

Methods that train copies of their targets' parameters subclass `CopyingMethod`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal, NoReturn

import jax.numpy as jnp

from jaxadapt.arrays import products
from jaxadapt.configs.base import Config
from jaxadapt.core.errors import AttachError, ConfigError
from jaxadapt.methods.base import (
    Array,
    Axes,
    Draw,
    Drop,
    Effects,
    Method,
    MethodTensor,
    Operation,
    Params,
    PerEntry,
    Start,
    Target,
    Use,
    adapted_entries,
    require_weights,
)

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


class _Copy(Method):
    """A copy of a weight, or of some of its rows, which replaces the original; its hyperparameters have `because`."""

    peft_type = ""  # not a method of PEFT: it accompanies one, or is what a `CopyingMethod` trains
    copies = True

    def output(
        self, hparams: Any, params: Params, use: Use | Operation, x: Array, y: Array, drop: Drop | None, w: Array
    ) -> Array:
        raise AssertionError("a replaced leaf has no output hook")

    def unweight(self, hparams: Any, params: Params, axes: Axes, w: Array) -> NoReturn:
        raise AttachError(
            f"cannot unmerge {hparams.because}: the copy replaced the original weight entirely, or rows of it. Keep the"
            " parameters from before the merge"
        )


class FullCopy(_Copy):
    """Use of a copy W' in place of W."""

    def __init__(self, because: str, wrapper: str = "", lookup: bool = False) -> None:
        """Create the method.

        Args:
            because: the field of the configuration that requests the copy.
            wrapper: what PEFT's key has between the names of the module and the parameter: ".base_layer" for each
                adapter around the same module.
            lookup: the weight is a token embedding that is also the head; the copy replaces it only in the lookup.
        """
        self._because, self._wrapper = because, wrapper
        self.replaces: bool = not lookup

    def tensors(self, config: Config, target: Target) -> tuple[MethodTensor, ...]:
        return (MethodTensor("copy", self._wrapper, (), (), is_copy=True, from_base=True, scale_power=1),)

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
        return products.run_use(use, x, params["copy"].astype(w.dtype))

    def weight(self, hparams: CopyHparams, params: Params, axes: Axes, w: Array) -> Array:
        if not self.replaces:
            raise AttachError(
                f"{hparams.because} copies this weight only for the token lookup, but the weight is also the head, so"
                " there is no single effective weight. Build the model with a separate head (as PEFT's merge does)"
                + (", or train with ensure_weight_tying" if hparams.because == "modules_to_save" else "")
            )
        copy = params["copy"].astype(w.dtype)
        if hparams.used is None:
            return copy
        batch = "".join(products.LETTERS[i] for i in axes.batch_axes)
        used = products.expand_to_letters(hparams.used.layer_values(params), batch, products.LETTERS[: axes.rank])
        return jnp.where(used > 0, copy, w)


# ---------------------------------------------------------------- rows


ROWS = "trainable_tokens_delta"
"""The tensor of copied rows."""


@dataclasses.dataclass(frozen=True)
class TokensHparams:
    """Hyperparameters of the trained rows.

    Attributes:
        tokens: the indices of the rows.
        head: True if the tokens are the weight's outputs (a head), False if they are its inputs (a lookup).
        because: the field of the configuration that requests the rows, for messages.
    """

    tokens: tuple[int, ...]
    head: bool = False
    because: str = "trainable_token_indices"


class RowCopy(_Copy):
    """Replacement of single rows of W."""

    def __init__(
        self,
        tokens: tuple[int, ...],
        because: str = "trainable_token_indices",
        wrapper: str = ".token_adapter",
        random: bool = False,
    ) -> None:
        """Create the method.

        Args:
            tokens: the indices of the rows.
            because: the field of the configuration that requests the rows, for messages.
            wrapper: what PEFT's key has between the names of the module and the tensor.
            random: the rows start with random values.
        """
        self._tokens, self._because, self._wrapper, self._random = tokens, because, wrapper, random
        self.replaced_rows: frozenset[int] | None = frozenset(tokens)

    def tensors(self, config: Config, target: Target) -> tuple[MethodTensor, ...]:
        is_head = target.kind != "embedding"
        if target.kind not in ("embedding", "linear") or target.match.roles["batch"] or target.match.stack:
            raise ConfigError(
                f"{target.leaf}: {self._because} applies only to a token embedding or a head; remove this weight from"
                " it"
            )
        size = (target.out_size if is_head else target.in_size) if target.is_known else None
        outside = [i for i in self._tokens if size is not None and i >= size]
        if outside:
            raise target.refuse(
                f"{self._because}: tokens outside the vocabulary of {size}: {outside}. Resize the model's vocabulary,"
                " or remove these tokens"
            )
        dim = "in" if is_head else "out"
        return (
            MethodTensor(
                ROWS,
                f"{self._wrapper}.{ROWS}",
                ("n", dim),
                (("n",), (dim,)),
                (("n", len(self._tokens)),),
                from_base=not self._random,
                scale_power=1,
            ),
        )

    def hparams(self, config: Config, target: Target) -> TokensHparams:
        return TokensHparams(self._tokens, target.kind != "embedding", self._because)

    def effects(self, hparams: TokensHparams) -> Effects:
        return Effects("replaces", "weight")

    def init(self, config: Config, tensor: MethodTensor, start: Start) -> Draw | Array:
        if self._random:
            return Draw("normal", 1.0)
        assert start.axes is not None
        return jnp.take(self._by_token(start.hparams, start.axes, start.w), jnp.array(start.hparams.tokens), axis=0)

    def weight(self, hparams: TokensHparams, params: Params, axes: Axes, w: Array) -> Array:
        rows = self._by_token(hparams, axes, w).at[jnp.array(hparams.tokens)].set(params[ROWS].astype(w.dtype))
        return rows.transpose([self._order(hparams, axes).index(i) for i in range(axes.rank)])

    @staticmethod
    def _order(hparams: TokensHparams, axes: Axes) -> tuple[int, ...]:
        return (*axes.out_axes, *axes.in_axes) if hparams.head else (*axes.in_axes, *axes.out_axes)

    def _by_token(self, hparams: TokensHparams, axes: Axes, w: Array) -> Array:
        """Return the weight with its axes as (token, dim...)."""
        return jnp.asarray(w).transpose(self._order(hparams, axes))


# ---------------------------------------------------------------- methods without arithmetic


class WithoutArithmetic(Method):
    """A method that computes nothing at a site: it adds tokens to the input, or its sites have methods of their own."""

    def _refuse(self, *args: Any, **options: Any) -> NoReturn:
        require_weights(self)
        raise AssertionError(f"{self.peft_type} trains copies, which have methods of their own")

    tensors: Any = _refuse
    hparams: Any = _refuse
    effects: Any = _refuse
    init: Any = _refuse
    output: Any = _refuse
    weight: Any = _refuse
    unweight: Any = _refuse


class CopyingMethod(WithoutArithmetic):
    """A method whose sites all have the methods that `copy_of` returns, so that it has no arithmetic of its own."""

    scope: ClassVar[Literal["site", "model", "copies"]] = "copies"
