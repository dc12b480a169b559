"""The Linen twin of ``llama_nnx``: the same model, the same dotted parameter paths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import unflatten_dict

from jaxadapt.demo.llama import Carry, LlamaConfig, Rope, attend, make_leaves, rms_norm, start_call

if TYPE_CHECKING:
    from jaxadapt.serving.generation import KVCache


def _dense(config: LlamaConfig, features: int, name: str) -> nn.Dense:
    return nn.Dense(features, use_bias=False, param_dtype=config.param_dtype, name=name)


class RMSNorm(nn.Module):
    """Root-mean-square normalization with one parameter, ``weight``."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        weight = self.param("weight", nn.initializers.ones, (x.shape[-1],), self.config.param_dtype)
        return rms_norm(x, weight, self.config.rms_norm_eps)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, carry: Carry, rope: Rope, mask: jax.Array | None) -> Carry:
        config = self.config
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        sizes = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": config.hidden_size}
        return attend(config, [_dense(config, size, name) for name, size in sizes.items()], carry, rope, mask)


class MLP(nn.Module):
    """SwiGLU feed-forward."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gate = _dense(self.config, self.config.intermediate_size, "gate_proj")(x)
        up = _dense(self.config, self.config.intermediate_size, "up_proj")(x)
        return _dense(self.config, self.config.hidden_size, "down_proj")(jax.nn.silu(gate) * up)


class Block(nn.Module):
    """One layer: (x (B, T, D), cache) -> (the same, None), the pair that ``nn.scan`` expects from its body."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, carry: Carry, rope: Rope, mask: jax.Array | None = None) -> tuple[Carry, None]:
        x, cache = carry
        normed = RMSNorm(self.config, name="input_layernorm")(x)
        mixed, cache = Attention(self.config, name="self_attn")((normed, cache), rope, mask)
        x = x + mixed
        normed = RMSNorm(self.config, name="post_attention_layernorm")(x)
        return (x + MLP(self.config, name="mlp")(normed), cache), None


class Layers(nn.Module):
    """The layers as a sequence, named by their numbers."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, carry: Carry, rope: Rope, mask: jax.Array | None) -> tuple[Carry, None]:
        block: Any = nn.remat(Block) if self.config.remat else Block
        for l in range(self.config.num_layers):
            carry, _ = block(self.config, name=str(l))(carry, rope, mask)
        return carry, None


def _layers(config: LlamaConfig) -> Any:
    if not config.scan:
        return Layers(config)
    # A scan already prevents moving operations out of the loop, so remat need not prevent it.
    block: Any = nn.remat(Block, prevent_cse=False) if config.remat else Block
    scan: Any = nn.scan  # the annotation of in_axes does not allow nn.broadcast
    return scan(
        block,
        variable_axes={"params": config.scan_axis},
        split_rngs={"params": True, "dropout": True},
        in_axes=(nn.broadcast, nn.broadcast),
        length=config.num_layers,
    )(config)


class LlamaModel(nn.Module):
    """Embedding, layers and final norm: tokens (B, T) -> ((B, T, D), cache); see `Llama` for the arguments."""

    config: LlamaConfig

    def setup(self) -> None:
        config = self.config
        self.embed_tokens = nn.Embed(config.vocab_size, config.hidden_size, param_dtype=config.param_dtype)
        self.layers = _layers(config)
        self.norm = RMSNorm(config)

    def __call__(
        self,
        tokens: jax.Array | None = None,
        mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        embeddings: jax.Array | None = None,
        cache: KVCache | None = None,
    ) -> Carry:
        given = embeddings if tokens is None else self.embed_tokens(tokens)
        x, rope, attended, cache = start_call(self.config, given, mask, positions, cache)
        (x, cache), _ = self.layers((x, cache), rope, attended)
        return self.norm(x), None if cache is None else cache.advance(x.shape[1])

    def attend(self, x: jax.Array) -> jax.Array:
        """Return the logits (B, T, V) of hidden states with tied embeddings."""
        return self.embed_tokens.attend(x)


class Llama(nn.Module):
    """A causal language model whose parameters have Hugging Face's module paths.

    ``module.apply(variables, tokens)`` takes int32 tokens (B, T) and returns logits (B, T, V) in float32. Optional
    arguments: ``mask`` (B, T), 0 for padding; ``positions`` (B, T), by default 0 … T-1; ``embeddings`` (B, T, D) in
    place of tokens. With ``cache``, a `KVCache`, the tokens follow those that it holds, and the result is the pair
    (logits, cache); positions then begin after those, and there is no mask.

    >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=2,
    ...                      num_heads=4, num_kv_heads=2, head_dim=4)
    >>> variables = Llama(config).init(jax.random.key(0), jnp.zeros((1, 3), jnp.int32))
    >>> variables["params"]["model"]["layers"]["1"]["self_attn"]["k_proj"]["kernel"].shape
    (16, 8)
    """

    config: LlamaConfig

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array | None = None,
        *,
        mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        embeddings: jax.Array | None = None,
        cache: KVCache | None = None,
    ) -> Any:
        model = LlamaModel(self.config, name="model")
        x, cache = model(tokens, mask, positions, embeddings, cache)
        tied = self.config.tie_word_embeddings
        head = model.attend if tied else _dense(self.config, self.config.vocab_size, "lm_head")
        logits = head(x).astype(jnp.float32)
        return logits if cache is None else (logits, cache)


def to_linen(config: LlamaConfig, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a Hugging Face checkpoint to ``{"params": …}`` of this module.

    Args:
        config: the model, with its ``scan`` and ``param_dtype``.
        weights: name -> array (out, in), see ``llama.make_leaves``.

    Raises:
        MismatchError: the weights do not fit the configuration.
    """
    leaves = {path: jnp.asarray(array, config.param_dtype) for path, array in make_leaves(config, weights)}
    return {"params": unflatten_dict(leaves, sep=".")}
