"""A compact Llama in Flax NNX, with Hugging Face's module names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxadapt.demo.llama import Carry, LlamaConfig, Rope, attend, make_leaves, rms_norm, start_call
from jaxadapt.models.nnx.graph import SharedParam

if TYPE_CHECKING:
    from jaxadapt.serving.generation import KVCache


def _linear(config: LlamaConfig, in_features: int, out_features: int, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(in_features, out_features, use_bias=False, param_dtype=config.param_dtype, rngs=rngs)


class RMSNorm(nnx.Module):
    """Root-mean-square normalization with one parameter, ``weight``."""

    def __init__(self, config: LlamaConfig) -> None:
        self.weight = nnx.Param(jnp.ones((config.hidden_size,), config.param_dtype))
        self.eps = config.rms_norm_eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.weight[...], self.eps)


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = _linear(config, config.hidden_size, queries, rngs)
        self.k_proj = _linear(config, config.hidden_size, keys, rngs)
        self.v_proj = _linear(config, config.hidden_size, keys, rngs)
        self.o_proj = _linear(config, queries, config.hidden_size, rngs)

    def __call__(self, carry: Carry, rope: Rope, mask: jax.Array | None) -> Carry:
        return attend(self.config, (self.q_proj, self.k_proj, self.v_proj, self.o_proj), carry, rope, mask)


class MLP(nnx.Module):
    """SwiGLU feed-forward."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        self.gate_proj = _linear(config, config.hidden_size, config.intermediate_size, rngs)
        self.up_proj = _linear(config, config.hidden_size, config.intermediate_size, rngs)
        self.down_proj = _linear(config, config.intermediate_size, config.hidden_size, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    """One layer: (x (B, T, D), cache) -> the same."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        self.input_layernorm = RMSNorm(config)
        self.self_attn = Attention(config, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, carry: Carry, rope: Rope, mask: jax.Array | None = None) -> Carry:
        x, cache = carry
        mixed, cache = self.self_attn((self.input_layernorm(x), cache), rope, mask)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class LlamaModel(nnx.Module):
    """Embedding, layers and final norm: tokens (B, T) -> ((B, T, D), cache); see `Llama` for the arguments."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embed_tokens = nnx.Embed(config.vocab_size, config.hidden_size, param_dtype=config.param_dtype, rngs=rngs)
        self.layers: Any
        if config.scan:
            create = nnx.vmap(lambda keys: Block(config, rngs=keys), out_axes=self._axes())
            self.layers = create(rngs.split(config.num_layers))
        else:
            self.layers = nnx.List([Block(config, rngs=rngs) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config)

    def _axes(self) -> nnx.StateAxes:
        # Parameters (also adapters) are stacked along scan_axis. Other variables of a layer, such as the keys of an
        # adapter's dropout, may have no second axis, so they are stacked along axis 0. Tensors that belong to a whole
        # adapter are not stacked.
        return nnx.StateAxes({SharedParam: None, nnx.Param: self.config.scan_axis, ...: 0})

    def __call__(
        self,
        tokens: jax.Array | None = None,
        *,
        mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        embeddings: jax.Array | None = None,
        cache: KVCache | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        given = embeddings if tokens is None else self.embed_tokens(tokens)
        x, rope, attended, cache = start_call(self.config, given, mask, positions, cache)

        def layer(block: Block, carry: Carry, rope: Rope, mask: jax.Array | None) -> Carry:
            return block(carry, rope, mask)

        run: Any = nnx.remat(layer) if self.config.remat else layer
        if self.config.scan:
            run = nnx.scan(run, in_axes=(self._axes(), nnx.Carry, None, None), out_axes=nnx.Carry)
            x, cache = run(self.layers, (x, cache), rope, attended)
        else:
            for block in self.layers:
                x, cache = run(block, (x, cache), rope, attended)
        return self.norm(x), None if cache is None else cache.advance(x.shape[1])


class Llama(nnx.Module):
    """A causal language model whose leaves have Hugging Face's module paths.

    ``model(tokens)`` takes int32 tokens (B, T) and returns logits (B, T, V) in float32. Optional arguments: ``mask``
    (B, T), 0 for padding; ``positions`` (B, T), by default 0 … T-1; ``embeddings`` (B, T, D) in place of tokens. With
    ``cache``, a `KVCache`, the tokens follow those that it holds, and the result is the pair (logits, cache); positions
    then begin after those, and there is no mask.

    >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=2,
    ...                      num_heads=4, num_kv_heads=2, head_dim=4)
    >>> model = Llama(config, rngs=nnx.Rngs(0))
    >>> model.model.layers[1].self_attn.k_proj.kernel.shape
    (16, 8)
    >>> model(jnp.zeros((1, 3), jnp.int32)).shape
    (1, 3, 32)
    """

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.model = LlamaModel(config, rngs=rngs)
        if not config.tie_word_embeddings:
            self.lm_head = _linear(config, config.hidden_size, config.vocab_size, rngs)

    def __call__(
        self,
        tokens: jax.Array | None = None,
        *,
        mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        embeddings: jax.Array | None = None,
        cache: KVCache | None = None,
    ) -> Any:
        x, cache = self.model(tokens, mask=mask, positions=positions, embeddings=embeddings, cache=cache)
        tied = self.config.tie_word_embeddings
        logits = (self.model.embed_tokens.attend(x) if tied else self.lm_head(x)).astype(jnp.float32)
        return logits if cache is None else (logits, cache)


def to_nnx(config: LlamaConfig, weights: Mapping[str, Any]) -> Llama:
    """Build the model from a Hugging Face checkpoint, without initializing it first.

    Args:
        config: the model, with its ``scan`` and ``param_dtype``.
        weights: name -> array (out, in), see ``llama.make_leaves``.

    Raises:
        MismatchError: the weights do not fit the configuration.
    """
    leaves = make_leaves(config, weights)  # raises errors before anything is built
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    variables = {".".join(map(str, path)): v for path, v in nnx.to_flat_state(nnx.state(model))}
    for path, array in leaves:
        variables[path].set_value(jnp.asarray(array, config.param_dtype))
    return model
