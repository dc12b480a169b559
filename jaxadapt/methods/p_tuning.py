"""P_TUNING (arXiv:2103.10385; PEFT's `tuners/p_tuning/model.py`): embeddings that a trained network computes.

The stored form is that of PROMPT_TUNING: the output of the network. The trained form has an embedding table, for "LSTM"
the parameters of a bidirectional LSTM, and dense layers with ReLU between them: three for "MLP", two for "LSTM".
"""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import relu, sigmoid

from jaxadapt.core.errors import ConfigError
from jaxadapt.methods.prompt import EMBEDDINGS, Array, Draw, EmbeddingPrompt, Examples, Params, dense

_DIRECTIONS = ("forward", "reverse")


class PTuning(EmbeddingPrompt, peft_type="P_TUNING"):
    """Embeddings before those of the tokens, computed by a trained network."""

    examples: Examples = (
        {"num_virtual_tokens": 3, "encoder_hidden_size": 5},
        {"num_virtual_tokens": 3, "encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 5},
    )

    def shapes(self, config: Any, *, stored: bool) -> dict[str, tuple[int, ...]]:
        whole = super().shapes(config, stored=True)
        if stored:
            return whole
        is_lstm = config.encoder_reparameterization_type == "LSTM"
        if config.encoder_dropout and is_lstm:
            raise ConfigError(
                f"P_TUNING: encoder_dropout={config.encoder_dropout} is not implemented; set 0.0 (a file with dropout"
                " loads, because it holds the network's output)"
            )
        (rows, d), h = whole[EMBEDDINGS], config.encoder_hidden_size or config.token_dim
        shapes: dict[str, tuple[int, ...]] = {"embedding": (rows, d)}
        for layer, direction in itertools.product(range(config.encoder_num_layers if is_lstm else 0), _DIRECTIONS):
            prefix = f"lstm_{layer}_{direction}"
            shapes |= {f"{prefix}_input": (2 * h if layer else d, 4 * h), f"{prefix}_hidden": (h, 4 * h)} | {
                f"{prefix}_input_bias": (4 * h,),
                f"{prefix}_hidden_bias": (4 * h,),
            }
        for i, (before, after) in enumerate(itertools.pairwise([2 * h, 2 * h, d] if is_lstm else [d, h, h, d])):
            shapes |= {f"kernel_{i}": (before, after), f"bias_{i}": (after,)}
        return shapes

    def draw(self, config: Any, name: str) -> Draw:
        if name == "embedding":
            return super().draw(config, name)
        if name.startswith("lstm"):  # torch's nn.LSTM draws all its tensors alike
            return Draw.kaiming(config.encoder_hidden_size or config.token_dim)
        return Draw.kaiming(self.shapes(config, stored=False)[name.replace("bias", "kernel")][0])

    def encode(self, config: Any, shared: Params) -> Array:
        x = shared["embedding"]
        if config.encoder_reparameterization_type == "LSTM":
            for layer in range(config.encoder_num_layers):
                x = jnp.concatenate([_lstm(shared, f"lstm_{layer}_{d}", x, d) for d in _DIRECTIONS], axis=-1)
            return dense(shared, 1, relu(dense(shared, 0, x)))
        for i in range(2):
            x = relu(dense(shared, i, x))
        return dense(shared, 2, x)


def _lstm(shared: Params, prefix: str, xs: Array, direction: str) -> Array:
    """Return the hidden states (n, h) of one direction of an LSTM layer over xs (n, d); gates in torch's order."""
    kernel = shared[f"{prefix}_hidden"]
    inputs = xs @ shared[f"{prefix}_input"] + (shared[f"{prefix}_input_bias"] + shared[f"{prefix}_hidden_bias"])[None]

    def step(state: tuple[Array, Array], x: Array) -> tuple[tuple[Array, Array], Array]:
        hidden, cell = state
        entry, forget, candidate, out = jnp.split(x + hidden @ kernel, 4)
        cell = sigmoid(forget) * cell + sigmoid(entry) * jnp.tanh(candidate)
        hidden = sigmoid(out) * jnp.tanh(cell)
        return (hidden, cell), hidden

    zeros = jnp.zeros(kernel.shape[0], inputs.dtype)
    return jax.lax.scan(step, (zeros, zeros), inputs, reverse=direction == "reverse")[1]
