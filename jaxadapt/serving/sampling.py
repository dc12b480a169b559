"""How the next token of a row is chosen from its logits, and how probable tokens are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import log_softmax, softmax

from jaxadapt.core.errors import ConfigError

LARGEST = float(np.finfo(np.float32).max)
TOP = 20
"""The number of most probable tokens in `Scores`; OpenAI's interface allows as many."""
_BLOCK = 16


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The settings that choose the next token of a row.

    Args:
        temperature: what the logits are divided by; 0 takes the token with the largest one.
        top_k: the number of tokens to choose from; 0 for all.
        top_p: choose from the fewest most probable tokens whose probabilities sum to at least this.
        seed: of the row's random numbers. A row's draws depend on its seed and its position only, so they do not depend
            on the batch.
        scores: True to compute the log-probabilities of the row's tokens, `Scores`; they change no choice.

    Raises:
        ConfigError: a value is out of its range.

    >>> Sampling(temperature=0.7, top_p=0.9).top_k
    0
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    scores: bool = False

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be {expected}, found {getattr(self, name)}"
            for name, expected, right in (
                ("temperature", f"at least 0 and at most {LARGEST:.4g} (float32)", 0 <= self.temperature <= LARGEST),
                ("top_k", "at least 0 and below 2**31", 0 <= self.top_k < 2**31),
                ("top_p", "above 0 and at most 1", 0 < self.top_p <= 1),
                ("seed", "at least 0 and below 2**32", 0 <= self.seed < 2**32),
            )
            if not right
        ]
        if problems:
            raise ConfigError("Sampling: " + "; ".join(problems))


GREEDY = Sampling()

DTYPES = {"temperature": np.float32, "top_k": np.int32, "top_p": np.float32, "seed": np.uint32, "scores": np.bool_}
"""The dtype of each field in a batch."""


def restrict(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Return logits (B, V) with -inf in place of the tokens that top_k and top_p (B) leave out, top_k first.

    The most probable token always stays, and so do tokens that are as probable as the last one that stays.
    """
    ordered = -jnp.sort(-logits, axis=-1)
    size = logits.shape[-1]
    count = jnp.where(top_k > 0, jnp.minimum(top_k, size), size)
    ordered = jnp.where(jnp.arange(size)[None] < count[:, None], ordered, -jnp.inf)
    probabilities = softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    first = jnp.arange(size)[None] == 0  # also if top_p is 0 in float32
    kept = ((before < top_p[:, None]) | first) & (ordered > -jnp.inf)
    least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)


def choose(logits: jax.Array, positions: jax.Array, settings: Mapping[str, jax.Array]) -> jax.Array:
    """Choose a token in each row.

    Args:
        logits: float32 (B, V).
        positions: int32 (B), the places of the new tokens, which make draws differ.
        settings: the fields of `Sampling`, each (B).

    Returns:
        int32 (B).
    """
    temperature, top_k, top_p = settings["temperature"], settings["top_k"], settings["top_p"]
    sampled = temperature >= jnp.finfo(jnp.float32).tiny  # devices may take a smaller number for 0
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw(logits: jax.Array) -> jax.Array:
        # The largest becomes 0, so that a tiny temperature leaves it finite and makes the others -inf.
        scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / jnp.where(sampled, temperature, 1.0)[:, None]
        limited = sampled & ((top_k > 0) | (top_p < 1))
        # Sorting a large vocabulary takes long, so rows that do not ask for it do not wait for it.
        scaled = jax.lax.cond(jnp.any(limited), lambda x: restrict(x, top_k, top_p), lambda x: x, scaled)
        keys = jax.vmap(lambda seed, place: jax.random.fold_in(jax.random.key(seed), place))
        drawn = jax.vmap(jax.random.categorical)(keys(settings["seed"], positions), scaled)
        return jnp.where(sampled, drawn.astype(jnp.int32), greedy)

    return jax.lax.cond(jnp.any(sampled), draw, lambda _: greedy, logits)


class Scores(NamedTuple):
    """Log-probabilities at several places, of the model alone: temperature, top_k and top_p do not change them.

    Attributes:
        logprobs: float32 (N), of the token at each place.
        top: float32 (N, TOP), the largest ones, in descending order.
        ids: int32 (N, TOP), their tokens.
    """

    logprobs: jax.Array | np.ndarray
    top: jax.Array | np.ndarray
    ids: jax.Array | np.ndarray


def score(logits: jax.Array, tokens: jax.Array, wanted: jax.Array) -> Scores:
    """Return the scores of tokens (N) by their logits (N, V); zeros, which cost nothing, if `wanted` () is False."""
    places, size = logits.shape
    count = min(TOP, size)

    def compute_one(given: tuple[jax.Array, jax.Array]) -> Scores:
        logs = log_softmax(given[0].astype(jnp.float32))
        top, ids = jax.lax.top_k(logs, count)
        return Scores(logs[given[1]], top, ids.astype(jnp.int32))

    def compute(logits: jax.Array) -> Scores:  # in blocks: a program has the memory for it also if it is not wanted
        return jax.lax.map(compute_one, (logits, tokens), batch_size=_BLOCK)

    def skip(_: jax.Array) -> Scores:
        top = jnp.zeros((places, count), jnp.float32)
        return Scores(jnp.zeros((places,), jnp.float32), top, jnp.zeros((places, count), jnp.int32))

    return jax.lax.cond(wanted, compute, skip, logits)
