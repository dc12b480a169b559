"""A compact Llama in NNX and in Linen: the configuration, the arithmetic of both, and the layout of weights.

The architecture is the published one (RMSNorm, rotary positions on split halves, grouped-query attention, SwiGLU;
Touvron et al., arXiv:2302.13971 and 2307.09288). Weights have the names and layouts of Hugging Face's Llama
checkpoints: ``model.layers.0.self_attn.q_proj.weight``, (out, in). Both models have Hugging Face's module names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from jaxadapt.arrays.tensor_source import as_source
from jaxadapt.core.errors import ConfigError, MismatchError, met, raise_listed
from jaxadapt.core.paths import Spec, compare, unflatten
from jaxadapt.models.attention_calls import attention
from jaxadapt.models.graph import SharedParam

if TYPE_CHECKING:
    from jaxadapt.serving.generation import KVCache


# ---------------------------------------------------------------- llama


Rope = tuple[jax.Array, jax.Array]
Carry = tuple[jax.Array, "KVCache | None"]
"""The argument and the result of a layer: x (B, T, D), and the cache."""
Run = Callable[[Carry, Rope, "jax.Array | None"], Carry]
"""A layer, a part of it or all layers: called with the carry, the rotations and the mask of the keys."""
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LlamaConfig:
    """The hyperparameters of one Llama, and the storage of its layers.

    Args:
        scan: stack all layers in one that is run by a scan, at ``model.layers.self_attn…``
            instead of ``model.layers.0.self_attn…``.
        scan_axis: the position of the layer axis in every stacked parameter, 0 or 1 (a norm's weight
            has only one other axis).
        remat: recompute the activations of a layer in the backward pass.
        param_dtype: dtype of the parameters and, by promotion, of the arithmetic. Norms, rotations and
            softmax are always computed in float32, and logits are returned in it.

    Raises:
        ConfigError: the numbers of heads do not divide, head_dim is odd, or scan_axis is not 0 or 1.

    >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=2,
    ...                      num_heads=4, num_kv_heads=2, head_dim=4)
    >>> config.to_hf()["rope_parameters"]
    {'rope_type': 'default', 'rope_theta': 10000.0}
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 2048
    scan: bool = False
    scan_axis: int = 0
    remat: bool = False
    param_dtype: jax.typing.DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        wrong = {
            f"{self.num_heads} query heads cannot share {self.num_kv_heads} key/value heads": self.num_heads
            % self.num_kv_heads,
            f"head_dim must be even for rotary positions, found {self.head_dim}": self.head_dim % 2,
            f"scan_axis must be 0 or 1, found {self.scan_axis}": self.scan_axis not in (0, 1),
        }
        if problems := met(wrong):
            raise ConfigError("LlamaConfig: " + "; ".join(problems))

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any]) -> LlamaConfig:
        """Build the configuration from the contents of a Hugging Face ``config.json``.

        Raises:
            ConfigError: the model is no Llama, or computes what this one does not.
        """
        # transformers takes the older field if a file has both.
        rope: Mapping[str, Any] = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
        expected = {
            "model_type": (fields.get("model_type"), "llama"),
            "hidden_act": (fields.get("hidden_act", "silu"), "silu"),
            "attention_bias": (fields.get("attention_bias", False), False),
            "mlp_bias": (fields.get("mlp_bias", False), False),
            "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
        }
        if wrong := [f"{name} is {found!r}, not {want!r}" for name, (found, want) in expected.items() if found != want]:
            raise ConfigError("LlamaConfig does not describe this model: " + "; ".join(wrong))
        heads = fields["num_attention_heads"]
        return cls(
            vocab_size=fields["vocab_size"],
            hidden_size=fields["hidden_size"],
            intermediate_size=fields["intermediate_size"],
            num_layers=fields["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=fields.get("num_key_value_heads") or heads,
            head_dim=fields.get("head_dim") or fields["hidden_size"] // heads,
            rope_theta=float(rope.get("rope_theta", fields.get("rope_theta", 10000.0))),
            rms_norm_eps=fields.get("rms_norm_eps", 1e-6),
            tie_word_embeddings=fields.get("tie_word_embeddings", False),
            max_position_embeddings=fields.get("max_position_embeddings", 2048),
        )

    def to_hf(self) -> dict[str, Any]:
        """Return the contents of a Hugging Face ``config.json`` for the same model.

        The rope base is written twice: transformers 5 reads ``rope_parameters``; older versions and mlx-lm
        read ``rope_theta``, and use 10000 without a warning if it is missing.
        """
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "tie_word_embeddings": self.tie_word_embeddings,
        }


def rope_at(config: LlamaConfig, positions: jax.Array) -> Rope:
    """Return cosines and sines of the rotations at positions (B, T), each (B, T, head_dim / 2) float32."""
    half = config.head_dim // 2
    frequencies = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions.astype(jnp.float32)[..., None] * frequencies[None, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, rope: Rope) -> jax.Array:
    """Rotate x (B, T, heads, head_dim); element i of the first half pairs with element i of the second.

    `rope` is what `rope_at` returns.
    """
    cos, sin = (table[:, :, None, :] for table in rope)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def run_model(
    config: LlamaConfig,
    parts: tuple[Callable[[jax.Array], jax.Array], Run, Callable[[jax.Array], jax.Array]],
    inputs: tuple[jax.Array | None, jax.Array | None],
    mask: jax.Array | None,
    positions: jax.Array | None,
    cache: KVCache | None,
) -> Carry:
    """Return the hidden states (B, T, D) after all layers and the last norm, and the cache with the new tokens.

    `parts` are the embedding, the layers and the norm, and `inputs` tokens (B, T) or, without them, embeddings
    (B, T, D). `mask` is of the tokens (B, T), 0 or False for padding; the mask of the keys is (B, 1, 1, T).

    Raises:
        MismatchError: there are neither tokens nor embeddings, or a mask is given beside a cache.
    """
    (embed, layers, norm), (tokens, embeddings) = parts, inputs
    x = embeddings if tokens is None else embed(tokens)
    if x is None:
        raise MismatchError("Llama: expected tokens or embeddings, found neither")
    if cache is not None and mask is not None:
        raise MismatchError("Llama: a call with a cache takes no mask; lower the cache's lengths to leave out tokens")
    if positions is None:
        positions = jnp.arange(x.shape[1])[None] + (0 if cache is None else cache.lengths[:, None])
    keys = None if mask is None else (mask != 0)[:, None, None, :]
    keys = keys if cache is None else cache.mask(x.shape[1])
    x, cache = layers((x, cache), rope_at(config, positions), keys)
    return norm(x), None if cache is None else cache.advance(x.shape[1])


def run_block(parts: tuple[Any, Run, Any, Any], carry: Carry, rope: Rope, mask: jax.Array | None) -> Carry:
    """Return the result of one layer, whose `parts` are a norm, the attention, a norm and the feed-forward network."""
    before_attention, attend, before_mlp, mlp = parts
    x, cache = carry
    mixed, cache = attend((before_attention(x), cache), rope, mask)
    x = x + mixed
    return x + mlp(before_mlp(x)), cache


def attend(
    config: LlamaConfig, layers: Sequence[Callable[[jax.Array], jax.Array]], carry: Carry, rope: Rope, mask: Any
) -> Carry:
    """Return causal grouped-query attention with rotary positions; `layers` are the projections q, k, v and o."""
    x, cache = carry
    query, key, value, output = layers
    heads = (*x.shape[:2], -1, config.head_dim)
    q, k = (rotate(layer(x).reshape(heads), rope) for layer in (query, key))
    v = value(x).reshape(heads)
    if cache is not None:
        cache, k, v = cache.append(k, v)
    return output(attention(q, k, v, mask=mask, is_causal=cache is None).reshape(*x.shape[:2], -1)), cache


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Return x / rms(x) * weight for x (B, T, D) and weight (D,), with the mean in float32."""
    wide = x.astype(jnp.float32)
    scaled = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return scaled.astype(x.dtype) * weight[None, None]


def hf_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Return the name and shape (out, in) of every tensor of the model's Hugging Face checkpoint."""
    hidden = config.hidden_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (config.intermediate_size, hidden),
        "mlp.up_proj": (config.intermediate_size, hidden),
        "mlp.down_proj": (hidden, config.intermediate_size),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        **{f"model.layers.{l}.{name}.weight": shape for l in range(config.num_layers) for name, shape in layer.items()},
        "model.norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def make_leaves(config: LlamaConfig, weights: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Convert a Hugging Face checkpoint to this model's leaves, one at a time.

    Args:
        config: the model; its ``scan`` and ``scan_axis`` decide the storage of layers.
        weights: name -> array, (out, in), as in ``hf_shapes``, also a source that reads each on demand. A tied
            model's checkpoint may also contain ``lm_head.weight`` if it equals the embedding.

    Returns:
        Pairs (dotted leaf path, array), for both APIs: kernels (in, out), stacked if scanned. Arrays
        may be views of the given ones; dtypes are unchanged. All weights are checked before the first pair.

    Raises:
        MismatchError: tensors are missing, unexpected or of another shape; the message lists all of them.
    """
    head, table = "lm_head.weight", "model.embed_tokens.weight"
    given, expected = as_source(weights), hf_shapes(config)
    found = given.shapes
    if config.tie_word_embeddings and {head, table} <= found.keys() and np.array_equal(given[head], given[table]):
        del found[head]
    wanted, held = ({name: Spec(shape) for name, shape in shapes.items()} for shapes in (expected, found))
    raise_listed(MismatchError, "the weights do not fit this LlamaConfig:", map(str, compare(wanted, held)), limit=64)

    sources: dict[str, list[str]] = {}
    for name in expected:  # in this order, so that layers are stacked by number
        module = name.removesuffix(".weight")
        kind = "embedding" if module.endswith("embed_tokens") else "weight" if module.endswith("norm") else "kernel"
        path = f"{module}.{kind}"
        if config.scan and path.startswith("model.layers."):
            path = f"model.layers.{path.split('.', 3)[3]}"
        sources.setdefault(path, []).append(name)
    return (_leaf(config, path, [np.asarray(given[name]) for name in names]) for path, names in sources.items())


def _leaf(config: LlamaConfig, path: str, arrays: list[np.ndarray]) -> tuple[str, np.ndarray]:
    if path.endswith(".kernel"):
        arrays = [array.T for array in arrays]
    stacked = config.scan and path.startswith("model.layers.")
    return path, np.stack(arrays, config.scan_axis) if stacked else arrays[0]


# ---------------------------------------------------------------- nnx


def _linear(config: LlamaConfig, in_features: int, out_features: int, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(in_features, out_features, use_bias=False, param_dtype=config.param_dtype, rngs=rngs)


class RMSNorm(nnx.Module):
    """Root-mean-square normalization with one parameter, ``weight``."""

    def __init__(self, config: LlamaConfig) -> None:
        self.weight: nnx.Param[jax.Array] = nnx.Param(jnp.ones((config.hidden_size,), config.param_dtype))
        self.eps: float = config.rms_norm_eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.weight[...], self.eps)


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj: nnx.Linear = _linear(config, config.hidden_size, queries, rngs)
        self.k_proj: nnx.Linear = _linear(config, config.hidden_size, keys, rngs)
        self.v_proj: nnx.Linear = _linear(config, config.hidden_size, keys, rngs)
        self.o_proj: nnx.Linear = _linear(config, queries, config.hidden_size, rngs)

    def __call__(self, carry: Carry, rope: Rope, mask: jax.Array | None) -> Carry:
        return attend(self.config, (self.q_proj, self.k_proj, self.v_proj, self.o_proj), carry, rope, mask)


class MLP(nnx.Module):
    """SwiGLU feed-forward."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        self.gate_proj: nnx.Linear = _linear(config, config.hidden_size, config.intermediate_size, rngs)
        self.up_proj: nnx.Linear = _linear(config, config.hidden_size, config.intermediate_size, rngs)
        self.down_proj: nnx.Linear = _linear(config, config.intermediate_size, config.hidden_size, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    """One layer: (x (B, T, D), cache) -> the same."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        self.input_layernorm: RMSNorm = RMSNorm(config)
        self.self_attn: Attention = Attention(config, rngs=rngs)
        self.post_attention_layernorm: RMSNorm = RMSNorm(config)
        self.mlp: MLP = MLP(config, rngs=rngs)

    def __call__(self, carry: Carry, rope: Rope, mask: jax.Array | None = None) -> Carry:
        parts = (self.input_layernorm, self.self_attn, self.post_attention_layernorm, self.mlp)
        return run_block(parts, carry, rope, mask)


class LlamaModel(nnx.Module):
    """Embedding, layers and final norm: tokens (B, T) -> ((B, T, D), cache); see `Llama` for the arguments."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embed_tokens: nnx.Embed = nnx.Embed(
            config.vocab_size, config.hidden_size, param_dtype=config.param_dtype, rngs=rngs
        )
        self.layers: Any
        if config.scan:
            self.layers = nnx.vmap(lambda keys: Block(config, rngs=keys), out_axes=self._axes())(
                rngs.split(config.num_layers)
            )
        else:
            self.layers = nnx.List([Block(config, rngs=rngs) for _ in range(config.num_layers)])
        self.norm: RMSNorm = RMSNorm(config)

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
        def layer(block: Block, carry: Carry, rope: Rope, mask: jax.Array | None) -> Carry:
            return block(carry, rope, mask)

        run: Any = nnx.remat(layer) if self.config.remat else layer

        def layers(carry: Carry, rope: Rope, mask: jax.Array | None) -> Carry:
            if self.config.scan:
                in_axes = (self._axes(), nnx.Carry, None, None)
                return nnx.scan(run, in_axes=in_axes, out_axes=nnx.Carry)(self.layers, carry, rope, mask)
            for block in self.layers:
                carry = run(block, carry, rope, mask)
            return carry

        parts = (self.embed_tokens, layers, self.norm)
        return run_model(self.config, parts, (tokens, embeddings), mask, positions, cache)


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
        self.model: LlamaModel = LlamaModel(config, rngs=rngs)
        if not config.tie_word_embeddings:
            self.lm_head: nnx.Linear = _linear(config, config.hidden_size, config.vocab_size, rngs)

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
        head = self.model.embed_tokens.attend if self.config.tie_word_embeddings else self.lm_head
        logits = head(x).astype(jnp.float32)
        return logits if cache is None else (logits, cache)


def to_nnx(config: LlamaConfig, weights: Mapping[str, Any]) -> Llama:
    """Build the model from a Hugging Face checkpoint, without initializing it first.

    Args:
        config: the model, with its ``scan`` and ``param_dtype``.
        weights: name -> array (out, in), see ``make_leaves``.

    Raises:
        MismatchError: the weights do not fit the configuration.
    """
    leaves = make_leaves(config, weights)  # raises errors before anything is built
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    variables = {".".join(map(str, path)): v for path, v in nnx.to_flat_state(nnx.state(model))}
    for path, array in leaves:
        variables[path].set_value(jnp.asarray(array, config.param_dtype))
    return model


# ---------------------------------------------------------------- linen


def _dense(config: LlamaConfig, features: int, name: str) -> nn.Dense:
    return nn.Dense(features, use_bias=False, param_dtype=config.param_dtype, name=name)


class Configured(nn.Module):
    """A module of the model with these hyperparameters."""

    config: LlamaConfig


class LinenRMSNorm(Configured):
    """Root-mean-square normalization with one parameter, ``weight``."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        weight = self.param("weight", nn.initializers.ones, (x.shape[-1],), self.config.param_dtype)
        return rms_norm(x, weight, self.config.rms_norm_eps)


class LinenAttention(Configured):
    """Causal grouped-query attention with rotary positions."""

    @nn.compact
    def __call__(self, carry: Carry, rope: Rope, mask: jax.Array | None) -> Carry:
        config = self.config
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        sizes = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": config.hidden_size}
        return attend(config, [_dense(config, size, name) for name, size in sizes.items()], carry, rope, mask)


class LinenMLP(Configured):
    """SwiGLU feed-forward."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gate = _dense(self.config, self.config.intermediate_size, "gate_proj")(x)
        up = _dense(self.config, self.config.intermediate_size, "up_proj")(x)
        return _dense(self.config, self.config.hidden_size, "down_proj")(jax.nn.silu(gate) * up)


class LinenBlock(Configured):
    """One layer: (x (B, T, D), cache) -> (the same, None), the pair that ``nn.scan`` expects from its body."""

    @nn.compact
    def __call__(self, carry: Carry, rope: Rope, mask: jax.Array | None = None) -> tuple[Carry, None]:
        parts = (
            LinenRMSNorm(self.config, name="input_layernorm"),
            LinenAttention(self.config, name="self_attn"),
            LinenRMSNorm(self.config, name="post_attention_layernorm"),
            LinenMLP(self.config, name="mlp"),
        )
        return run_block(parts, carry, rope, mask), None


class LinenLayers(Configured):
    """The layers as a sequence, named by their numbers."""

    @nn.compact
    def __call__(self, carry: Carry, rope: Rope, mask: jax.Array | None) -> tuple[Carry, None]:
        block: Any = nn.remat(LinenBlock) if self.config.remat else LinenBlock
        for l in range(self.config.num_layers):
            carry, _ = block(self.config, name=str(l))(carry, rope, mask)
        return carry, None


def _layers(config: LlamaConfig) -> Any:
    if not config.scan:
        return LinenLayers(config)
    # A scan already prevents moving operations out of the loop, so remat need not prevent it.
    block: Any = nn.remat(LinenBlock, prevent_cse=False) if config.remat else LinenBlock
    scan: Any = nn.scan  # the annotation of in_axes does not allow nn.broadcast
    return scan(
        block,
        variable_axes={"params": config.scan_axis},
        split_rngs={"params": True, "dropout": True},
        in_axes=(nn.broadcast, nn.broadcast),
        length=config.num_layers,
    )(config)


class LinenLlamaModel(Configured):
    """Embedding, layers and final norm: tokens (B, T) -> ((B, T, D), cache)."""

    def setup(self) -> None:
        config = self.config
        self.embed_tokens: nn.Embed = nn.Embed(config.vocab_size, config.hidden_size, param_dtype=config.param_dtype)
        self.layers: Any = _layers(config)
        self.norm: LinenRMSNorm = LinenRMSNorm(config)

    def __call__(
        self,
        tokens: jax.Array | None = None,
        mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        embeddings: jax.Array | None = None,
        cache: KVCache | None = None,
    ) -> Carry:
        parts = (self.embed_tokens, lambda *given: self.layers(*given)[0], self.norm)
        return run_model(self.config, parts, (tokens, embeddings), mask, positions, cache)


class LinenLlama(Configured):
    """The Linen module with the parameters of `Llama`.

    ``module.apply(variables, tokens)`` has the arguments and the result of a call of `Llama`.

    >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=2,
    ...                      num_heads=4, num_kv_heads=2, head_dim=4)
    >>> variables = LinenLlama(config).init(jax.random.key(0), jnp.zeros((1, 3), jnp.int32))
    >>> variables["params"]["model"]["layers"]["1"]["self_attn"]["k_proj"]["kernel"].shape
    (16, 8)
    """

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
        model = LinenLlamaModel(self.config, name="model")
        x, cache = model(tokens, mask, positions, embeddings, cache)
        tied = self.config.tie_word_embeddings
        head = model.embed_tokens.attend if tied else _dense(self.config, self.config.vocab_size, "lm_head")
        logits = head(x).astype(jnp.float32)
        return logits if cache is None else (logits, cache)


def to_linen(config: LlamaConfig, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a Hugging Face checkpoint to ``{"params": …}`` of `LinenLlama`.

    Args:
        config: the model, with its ``scan`` and ``param_dtype``.
        weights: name -> array (out, in), see ``make_leaves``.

    Raises:
        MismatchError: the weights do not fit the configuration.
    """
    leaves = {path: jnp.asarray(array, config.param_dtype) for path, array in make_leaves(config, weights)}
    return {"params": unflatten(leaves)}
