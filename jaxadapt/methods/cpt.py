"""CPT (arXiv:2410.17222; PEFT's `tuners/cpt/model.py` and `PeftModelForCausalLM._cpt_forward`).

The trained form has the embeddings of the examples' tokens, which are fixed, and a vector for each (`delta_embedding`),
both (n, token_dim). The stored form is their sum, so a file cannot be trained further in the trained form.

Every call uses the projected vectors: one longer than ε = opt_projection_epsilon · sqrt(token_dim / 2048) has norm ε.
As in PEFT the gradient does not pass through the projection, and outputs of examples get none. PEFT also replaces the
parameter by its projection at every call; `project` does so, call it after each step of the optimizer.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp

from jaxadapt.configs.prompts import CPTConfig
from jaxadapt.core.errors import ConfigError, MismatchError
from jaxadapt.methods.prompt import (
    EMBEDDINGS,
    Array,
    Draw,
    EmbeddingPrompt,
    Examples,
    Params,
    Shapes,
    StartData,
    Strings,
    tensor_roles,
)

FIXED, DELTA = "embedding", "delta_embedding"
IGNORED = -100
"""The label of a token without loss."""


class Cpt(EmbeddingPrompt, peft_type="CPT"):
    """Embeddings of examples before those of the tokens, each moved by a short vector."""

    roles: Strings = tensor_roles(frozen=FIXED)
    examples: Examples = (
        {
            "cpt_token_ids": (7, 3, 5),
            "cpt_tokens_type_mask": (1, 2, 4),
            "opt_projection_epsilon": 10.0,
            "task_type": "CAUSAL_LM",
        },
    )

    def shapes(self, config: Any, *, stored: bool) -> dict[str, tuple[int, ...]]:
        whole = super().shapes(config, stored=stored)
        return whole if stored else dict.fromkeys((FIXED, DELTA), whole[EMBEDDINGS])

    def draw(self, config: Any, name: str) -> Draw:
        if name == DELTA:
            return Draw("constant", 0.0)
        raise ConfigError(
            "CPT: the prompt starts from the embeddings of cpt_token_ids; create the adapter with"
            " jaxadapt.initializers.start(model, config)"
        )

    def start_setting(self, config: Any) -> tuple[str, tuple[str, ...]]:
        return self.peft_type, ()

    def start_values(self, config: Any, shapes: Shapes, data: StartData) -> dict[str, Array]:
        return {FIXED: data.embed("cpt_token_ids", np.asarray(config.cpt_token_ids))}

    def encode(self, config: Any, shared: Params) -> Array:
        delta = shared[DELTA]
        kinds = np.remainder(np.asarray(config.cpt_tokens_type_mask), 4)
        trained = jnp.where(jnp.asarray(kinds > 0)[:, None], delta, jax.lax.stop_gradient(delta))
        unchanged = trained - jax.lax.stop_gradient(trained)  # zeros, with the gradient of the parameter
        return jax.lax.stop_gradient(shared[FIXED]) + jax.lax.stop_gradient(project(config, delta)) + unchanged


def project(config: CPTConfig, delta: Array) -> Array:
    """Shorten the vectors that are longer than the configuration allows.

    Args:
        config: the configuration, with `token_dim`.
        delta: the tensor `delta_embedding`, (n, token_dim).

    Returns an array like `delta`. A zero vector stays as it is.

    >>> config = CPTConfig(cpt_token_ids=[3], token_dim=2048, task_type="CAUSAL_LM")
    >>> float(jnp.linalg.norm(project(config, jnp.ones((1, 2048))))) < 0.1001
    True
    """
    kinds = np.asarray(config.cpt_tokens_type_mask)
    width = np.sqrt(np.float32(delta.shape[-1] / 2048))
    largest = np.full(kinds.shape, 1e-10, np.float32)
    for kind, epsilon in ((1, "format_epsilon"), (2, "epsilon"), (3, "format_epsilon")):
        largest[kinds % 4 == kind] = getattr(config, f"opt_projection_{epsilon}") * width
    norms = jnp.linalg.norm(delta.astype(jnp.float32), axis=-1)
    limit = jnp.asarray(largest)
    factors = jnp.where(norms > 0, limit / jnp.maximum(norms, limit), 1.0)
    return (delta * factors[:, None]).astype(delta.dtype)


def loss(config: CPTConfig, logits: Array, labels: Array, types: Array | None = None) -> Array:
    """Return CPT's loss: the mean cross-entropy of the outputs, in the examples of the prompt and in the input.

    Token t is predicted from the logits of token t - 1. With `opt_weighted_loss_type="decay"`, the last output of a row
    has weight 1, and each one before it `opt_loss_decay_factor` times the weight of the next.

    Args:
        config: the configuration.
        logits: (batch, n + time, vocabulary), of the virtual tokens and the tokens.
        labels: the token ids (batch, time); -100 for a token without loss.
        types: integers (batch, time), the types of the tokens as in `cpt_tokens_type_mask`. By default 4: all of them
            are outputs of one example.

    Returns a scalar, in nats, NaN if no token has a loss (as in PEFT). Raises `MismatchError` if the shapes contradict
    each other, and `ConfigError` if by default no token of the input has a loss (PEFT's is NaN then). The source is
    PEFT's `CPTEmbedding.calculate_loss`.

    >>> config = CPTConfig(cpt_token_ids=[3, 4], cpt_tokens_type_mask=[2, 4], task_type="CAUSAL_LM")
    >>> float(loss(config, jnp.zeros((1, 5, 8)), jnp.array([[1, 2, 3]]))) - float(jnp.log(8.0))
    0.0
    """
    batch, time = labels.shape
    n = config.num_virtual_tokens or 0
    last = max(config.cpt_tokens_type_mask or (0,))
    if types is None and last % 4:
        raise ConfigError(
            f"CPT's loss: the default types of the input follow the largest type of the prompt, {last}. With a largest"
            " type that is not a multiple of 4, no input token is an output. End cpt_tokens_type_mask with a multiple"
            " of 4, or pass types="
        )
    given = jnp.full((batch, time), 4, jnp.int32) if types is None else types
    if given.shape != labels.shape or logits.ndim != 3 or logits.shape[:2] != (batch, n + time):
        raise MismatchError(
            f"CPT's loss: expected logits (batch, {n} + time, vocabulary), labels and types (batch, time), found"
            f" {list(logits.shape)}, {list(labels.shape)} and {list(given.shape)}"
        )
    own = jnp.asarray(config.cpt_tokens_type_mask, given.dtype)
    given = jnp.where(given > 0, given + last, given)
    kinds = jnp.concatenate([jnp.broadcast_to(own[None], (batch, n)), given], axis=1)[:, 1:]
    ids = jnp.asarray(config.cpt_token_ids, labels.dtype)
    labels = jnp.concatenate([jnp.broadcast_to(ids[None], (batch, n)), labels], axis=1)[:, 1:]
    counted = (kinds > 0) & (kinds % 4 == 0) & (labels != IGNORED)
    scores = logits[:, :-1].astype(jnp.float32)
    own_scores = jnp.take_along_axis(scores, jnp.where(counted, labels, 0)[..., None], axis=-1)[..., 0]
    losses = logsumexp(scores, axis=-1) - own_scores
    if config.opt_weighted_loss_type == "decay":
        losses = losses * config.opt_loss_decay_factor ** _later_outputs(kinds)
    return jnp.where(counted, losses, 0).sum() / counted.sum()


def _later_outputs(types: Array) -> Array:
    """Return for each token the number of different outputs of its row whose type is larger than its own."""
    ordered = jnp.sort(jnp.where((types > 0) & (types % 4 == 0), types, 0), axis=1)
    first = jnp.concatenate([ordered[:, :1] > 0, ordered[:, 1:] > ordered[:, :-1]], axis=1)
    return ((ordered[:, None] > types[:, :, None]) & first[:, None]).sum(-1).astype(jnp.float32)
