"""Full training of single rows of a token embedding: PEFT's `trainable_token_indices`.

Each site has one tensor, `trainable_tokens_delta` (tokens, dim), in the order of the configuration's indices, in the
model and in the file. Despite its name it holds the rows themselves, as in PEFT's `tuners/trainable_tokens/layer.py`.
The rows of an active adapter replace those of the embedding in every use, including the head of a model with tied
embeddings.
"""

from __future__ import annotations

import dataclasses
from typing import NoReturn

import jax.numpy as jnp

from jaxadapt.arrays.axes import Axes, Operation, Use
from jaxadapt.configs import Config
from jaxadapt.core.errors import AttachError, ConfigError
from jaxadapt.keymaps.tensor_spec import MethodTensor
from jaxadapt.methods.base import Array, Drop, Effects, Method, Params, Start, Target

NAME = "trainable_tokens_delta"


@dataclasses.dataclass(frozen=True)
class TokensHparams:
    """Hyperparameters of the trained rows.

    Attributes:
        tokens: the indices of the rows.
        head: True if the tokens are the weight's outputs (a head), False if they are its inputs (a lookup).
    """

    tokens: tuple[int, ...]
    head: bool = False

    @property
    def because(self) -> str:
        """The field of the configuration that requests the rows, as in `CopyHparams`."""
        return "trainable_token_indices"


class TrainableTokens(Method):
    """Replacement of single rows of W."""

    peft_type = ""  # not a method of PEFT: it is a field of LORA's configuration
    copies = True

    def __init__(self, tokens: tuple[int, ...]) -> None:
        self._tokens = tokens

    def tensors(self, config: Config, target: Target) -> tuple[MethodTensor, ...]:
        if target.match.weight.kind not in ("embedding", "linear") or target.match.roles["batch"] or target.match.stack:
            raise ConfigError(
                f"{target.leaf}: trainable_token_indices applies only to a token embedding or a head; remove this"
                " weight from it"
            )
        dim = "out" if target.match.weight.kind == "embedding" else "in"
        own = (("n", len(self._tokens)),)
        suffix = f".token_adapter.{NAME}"
        return (MethodTensor(NAME, suffix, ("n", dim), (("n",), (dim,)), own, from_base=True, scale_power=1),)

    def hparams(self, config: Config, target: Target) -> TokensHparams:
        return TokensHparams(self._tokens, target.match.weight.kind != "embedding")

    def effects(self, hparams: TokensHparams) -> Effects:
        return Effects("replaces", "weight")

    def init(self, config: Config, tensor: MethodTensor, start: Start) -> Array:
        assert start.axes is not None
        return jnp.take(self._by_token(start.hparams, start.axes, start.w), jnp.array(start.hparams.tokens), axis=0)

    def output(
        self,
        hparams: TokensHparams,
        params: Params,
        use: Use | Operation,
        x: Array,
        y: Array,
        drop: Drop | None,
        w: Array,
    ) -> NoReturn:
        raise AssertionError("a replaced leaf has no output hook")

    def weight(self, hparams: TokensHparams, params: Params, axes: Axes, w: Array) -> Array:
        rows = self._by_token(hparams, axes, w).at[jnp.array(hparams.tokens)].set(params[NAME].astype(w.dtype))
        return rows.transpose([self._order(hparams, axes).index(i) for i in range(axes.rank)])

    def unweight(self, hparams: TokensHparams, params: Params, axes: Axes, w: Array) -> NoReturn:
        raise AttachError(
            "cannot unmerge trainable_token_indices: its rows replaced the original ones entirely. Keep the parameters"
            " from before the merge"
        )

    @staticmethod
    def _order(hparams: TokensHparams, axes: Axes) -> tuple[int, ...]:
        return (*axes.out_axes, *axes.in_axes) if hparams.head else (*axes.in_axes, *axes.out_axes)

    def _by_token(self, hparams: TokensHparams, axes: Axes, w: Array) -> Array:
        """Return the weight with its axes as (token, dim...)."""
        return jnp.asarray(w).transpose(self._order(hparams, axes))
