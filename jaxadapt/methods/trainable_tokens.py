"""Some rows of a table of tokens, trained in full: PEFT's `trainable_token_indices`.

In the model, per site: `trainable_tokens_delta` (tokens, dim), in the order of the configuration's indices; the same
in the file. Despite its name it holds the rows themselves, as in PEFT's `tuners/trainable_tokens/layer.py`: an
active adapter's rows stand in for the table's, in every use of it, the head of a model with tied embeddings too.
"""

from __future__ import annotations

import dataclasses
from typing import NoReturn

import jax.numpy as jnp

from jaxadapt.arrays.axes import Axes, Operation, Use
from jaxadapt.configs import Config
from jaxadapt.core.errors import AttachError, ConfigError
from jaxadapt.keymaps.keymap import Match
from jaxadapt.keymaps.tensor_spec import MethodTensor, Modules
from jaxadapt.methods.base import Array, Drop, Method, Params

NAME = "trainable_tokens_delta"


@dataclasses.dataclass(frozen=True)
class TokensHparams:
    """Which rows, and whether the tokens are the weight's inputs (a lookup) or its outputs (a head)."""

    tokens: tuple[int, ...]
    head: bool = False

    @property
    def because(self) -> str:
        """Why the leaf is copied, as `Copied` says it."""
        return "trainable_token_indices"


class TrainableTokens(Method):
    """W with other rows for some tokens."""

    peft_type = ""  # of LORA's configuration, where it goes with any other field
    copies = replaces = True

    def __init__(self, tokens: tuple[int, ...]) -> None:
        self._tokens = tokens

    def check(self, config: Config) -> None:
        pass

    def tensors(self, config: Config, site: Match, modules: Modules) -> tuple[MethodTensor, ...]:
        if site.weight.kind not in ("embedding", "linear") or site.roles["batch"] or site.stack:
            raise ConfigError(f"{site.leaf}: trainable_token_indices is for a table of tokens or a head")
        dim = "out" if site.weight.kind == "embedding" else "in"
        own = (("n", len(self._tokens)),)
        suffix = f".token_adapter.{NAME}"
        return (MethodTensor(NAME, suffix, ("n", dim), (("n",), (dim,)), own, from_base=True, scale_power=1),)

    def hparams(self, config: Config, site: Match, modules: Modules) -> TokensHparams:
        return TokensHparams(self._tokens, site.weight.kind != "embedding")

    def fresh(self, config: Config, tensor: MethodTensor, fan_in: int) -> NoReturn:
        raise AssertionError("the rows begin as the table's")

    def from_base(self, static: TokensHparams, params: Params, axes: Axes, w: Array) -> dict[str, Array]:
        return {NAME: jnp.take(self._by_token(static, axes, w), jnp.array(static.tokens), axis=0)}

    def output(
        self,
        static: TokensHparams,
        params: Params,
        use: Use | Operation,
        x: Array,
        y: Array,
        drop: Drop | None,
        w: Array,
    ) -> NoReturn:
        raise AssertionError("the rows take the table's place, and no part in a product")

    def weight(self, static: TokensHparams, params: Params, axes: Axes, w: Array) -> Array:
        rows = self._by_token(static, axes, w).at[jnp.array(static.tokens)].set(params[NAME].astype(w.dtype))
        return rows.transpose([self._order(static, axes).index(i) for i in range(axes.rank)])

    def unweight(self, static: TokensHparams, params: Params, axes: Axes, w: Array) -> NoReturn:
        raise AttachError(
            "trainable_token_indices puts other rows into the table, and nothing of the original ones is left in it;"
            " keep the parameters as they were before merging"
        )

    @staticmethod
    def _order(static: TokensHparams, axes: Axes) -> tuple[int, ...]:
        return (*axes.out_axes, *axes.in_axes) if static.head else (*axes.in_axes, *axes.out_axes)

    def _by_token(self, static: TokensHparams, axes: Axes, w: Array) -> Array:
        """The weight as (token, dim...)."""
        return jnp.asarray(w).transpose(self._order(static, axes))
