"""Full training of single rows of a token embedding: LoRA's `trainable_token_indices`, and TRAINABLE_TOKENS.

Each site has one tensor, `trainable_tokens_delta` (tokens, dim), in the order of the configuration's indices, in the
model and in the file. Despite its name it holds the rows themselves, as in PEFT's `tuners/trainable_tokens/layer.py`.
The rows of an active adapter replace those of the embedding in every use, including the head of a model with tied
embeddings. For TRAINABLE_TOKENS, PEFT writes them once more under the name of such a head; so does `save` if it sees
the base, and a reader does not insist on it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn

import jax.numpy as jnp

from jaxadapt.arrays.axes import Axes, Operation, Use
from jaxadapt.arrays.random_draws import Draw
from jaxadapt.configs import Config
from jaxadapt.configs.full_rank import TrainableTokensConfig
from jaxadapt.core.errors import AttachError, ConfigError
from jaxadapt.keymaps.weight import MethodTensor
from jaxadapt.methods.base import Array, Drop, Effects, Method, Params, Start, Target
from jaxadapt.methods.copies import CopyingMethod

NAME = "trainable_tokens_delta"


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


class TrainableTokens(Method):
    """Replacement of single rows of W."""

    peft_type = ""  # not a method of PEFT: it accompanies LORA, or is what `TokenRows` trains
    copies = True

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
        self.replaced_rows = frozenset(tokens)

    def tensors(self, config: Config, target: Target) -> tuple[MethodTensor, ...]:
        if target.match.weight.kind not in ("embedding", "linear") or target.match.roles["batch"] or target.match.stack:
            raise ConfigError(
                f"{target.leaf}: {self._because} applies only to a token embedding or a head; remove this weight from"
                " it"
            )
        size = (target.out_size if self._is_head(target) else target.in_size) if target.is_known else None
        outside = [i for i in self._tokens if size is not None and i >= size]
        if outside:
            raise target.refuse(
                f"{self._because}: tokens outside the vocabulary of {size}: {outside}. Resize the model's vocabulary,"
                " or remove these tokens"
            )
        dim = "in" if self._is_head(target) else "out"
        own = (("n", len(self._tokens)),)
        suffix = f"{self._wrapper}.{NAME}"
        from_base = not self._random
        return (MethodTensor(NAME, suffix, ("n", dim), (("n",), (dim,)), own, from_base=from_base, scale_power=1),)

    def hparams(self, config: Config, target: Target) -> TokensHparams:
        return TokensHparams(self._tokens, self._is_head(target), self._because)

    def effects(self, hparams: TokensHparams) -> Effects:
        return Effects("replaces", "weight")

    def init(self, config: Config, tensor: MethodTensor, start: Start) -> Draw | Array:
        if self._random:
            return Draw("normal", 1.0)
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
            f"cannot unmerge {hparams.because}: its rows replaced the original ones entirely. Keep the parameters from"
            " before the merge"
        )

    @staticmethod
    def _is_head(target: Target) -> bool:
        return target.kind != "embedding"

    @staticmethod
    def _order(hparams: TokensHparams, axes: Axes) -> tuple[int, ...]:
        return (*axes.out_axes, *axes.in_axes) if hparams.head else (*axes.in_axes, *axes.out_axes)

    def _by_token(self, hparams: TokensHparams, axes: Axes, w: Array) -> Array:
        """Return the weight with its axes as (token, dim...)."""
        return jnp.asarray(w).transpose(self._order(hparams, axes))


class TokenRows(CopyingMethod):
    """Training of single rows of the targets."""

    peft_type = "TRAINABLE_TOKENS"
    as_head = MappingProxyType({NAME: NAME})
    ties_heads = True

    def check(self, config: TrainableTokensConfig) -> None:
        if not config.token_indices:
            raise ConfigError("token_indices: expected the tokens to train, found none")

    def copy_of(self, config: TrainableTokensConfig, parameter: str) -> Method | None:
        if parameter != "weight":
            return None
        return TrainableTokens(tuple(config.token_indices), "token_indices", "", not config.init_weights)

    def examples(self) -> Sequence[Mapping[str, Any]]:
        return ({"target_modules": ["embed_tokens"], "token_indices": [3, 1, 20]},)


METHOD = TokenRows()
