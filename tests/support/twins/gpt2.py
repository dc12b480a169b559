"""GPT-2 in NNX and in Linen, with the names and layouts that transformers' Flax models had.

`Conv1D` is a module of its own, not a Dense: its kernel is (out, in) and is transposed inside the call.
PyTorch's Conv1D stores (in, out). So one twin tests a custom leaf module, `fan_in_fan_out` and tying.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from tests.support.twins import trees


@dataclasses.dataclass(frozen=True)
class Shape:
    """The numbers of one GPT-2. `scan_axis` stacks the layers on that axis; None leaves them unrolled."""

    vocab: int = 64
    positions: int = 32
    width: int = 32
    layers: int = 2
    heads: int = 4
    eps: float = 1e-5
    scan_axis: int | None = None


def conv1d(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """(..., in) times an (out, in) kernel, transposed first as transformers' FlaxConv1D did."""
    y = lax.dot_general(x, kernel.transpose(), (((x.ndim - 1,), (0,)), ((), ())))
    return y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


def attention(qkv: jax.Array, heads: int) -> jax.Array:
    """Causal self-attention of a fused (batch, time, 3·width) projection, to (batch, time, width)."""
    batch, time, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    q, k, v = (t.reshape(batch, time, heads, width // heads) for t in jnp.split(qkv, 3, axis=-1))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(width // heads)
    mask = jnp.tril(jnp.ones((1, 1, time, time), bool))
    weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(scores.dtype).min), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, time, width)


def positions_of(ids: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(ids.shape[1])[None], ids.shape)


# ---- NNX ---------------------------------------------------------------------------------------------


class Conv1D(nnx.Module):
    def __init__(self, inputs: int, out: int, *, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (out, inputs)) * 0.02)
        self.bias = nnx.Param(jnp.zeros((out,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return conv1d(x, self.kernel[...], self.bias[...])


class Attention(nnx.Module):
    def __init__(self, shape: Shape, *, rngs: nnx.Rngs) -> None:
        self.c_attn = Conv1D(shape.width, 3 * shape.width, rngs=rngs)
        self.c_proj = Conv1D(shape.width, shape.width, rngs=rngs)
        self.heads = shape.heads

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.c_proj(attention(self.c_attn(x), self.heads))


class MLP(nnx.Module):
    def __init__(self, shape: Shape, *, rngs: nnx.Rngs) -> None:
        self.c_fc = Conv1D(shape.width, 4 * shape.width, rngs=rngs)
        self.c_proj = Conv1D(4 * shape.width, shape.width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.c_proj(jax.nn.gelu(self.c_fc(x), approximate=True))


class Block(nnx.Module):
    def __init__(self, shape: Shape, *, rngs: nnx.Rngs) -> None:
        self.ln_1 = nnx.LayerNorm(shape.width, epsilon=shape.eps, rngs=rngs)
        self.attn = Attention(shape, rngs=rngs)
        self.ln_2 = nnx.LayerNorm(shape.width, epsilon=shape.eps, rngs=rngs)
        self.mlp = MLP(shape, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


def stacked(axis: int) -> nnx.StateAxes:
    """Parameters stack on `axis`; what has no second axis (an adapter's dropout keys) stacks in front."""
    return nnx.StateAxes({nnx.Param: axis, ...: 0})


class Transformer(nnx.Module):
    def __init__(self, shape: Shape, *, rngs: nnx.Rngs) -> None:
        self.wte = nnx.Embed(shape.vocab, shape.width, rngs=rngs)
        self.wpe = nnx.Embed(shape.positions, shape.width, rngs=rngs)
        if shape.scan_axis is None:
            self.h = nnx.List([Block(shape, rngs=rngs) for _ in range(shape.layers)])
        else:

            @nnx.split_rngs(splits=shape.layers)
            @nnx.vmap(in_axes=(0,), out_axes=stacked(shape.scan_axis))
            def make(rngs: nnx.Rngs) -> Block:
                return Block(shape, rngs=rngs)

            self.h = make(rngs)
        self.ln_f = nnx.LayerNorm(shape.width, epsilon=shape.eps, rngs=rngs)
        self.scan_axis = shape.scan_axis

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.wte(ids) + self.wpe(positions_of(ids))
        if self.scan_axis is None:
            for block in self.h:
                x = block(x)
        else:

            @nnx.scan(in_axes=(stacked(self.scan_axis), nnx.Carry), out_axes=nnx.Carry)
            def run(block: Block, x: jax.Array) -> jax.Array:
                return block(x)

            x = run(self.h, x)
        return self.ln_f(x)


class GPT2(nnx.Module):
    """Token ids (batch, time) to logits (batch, time, vocab); the head is the tied `wte`."""

    def __init__(self, shape: Shape, *, rngs: nnx.Rngs) -> None:
        self.transformer = Transformer(shape, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.transformer.wte.attend(self.transformer(ids))


# ---- Linen -------------------------------------------------------------------------------------------


class LinenConv1D(nn.Module):
    out: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", nn.initializers.normal(0.02), (self.out, x.shape[-1]))
        bias = self.param("bias", nn.initializers.zeros, (self.out,))
        return conv1d(x, kernel, bias)


class LinenAttention(nn.Module):
    shape: Shape

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        qkv = LinenConv1D(3 * self.shape.width, name="c_attn")(x)
        return LinenConv1D(self.shape.width, name="c_proj")(attention(qkv, self.shape.heads))


class LinenMLP(nn.Module):
    shape: Shape

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.nn.gelu(LinenConv1D(4 * self.shape.width, name="c_fc")(x), approximate=True)
        return LinenConv1D(self.shape.width, name="c_proj")(x)


class LinenBlock(nn.Module):
    shape: Shape

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        x = x + LinenAttention(self.shape, name="attn")(nn.LayerNorm(self.shape.eps, name="ln_1")(x))
        x = x + LinenMLP(self.shape, name="mlp")(nn.LayerNorm(self.shape.eps, name="ln_2")(x))
        return x, None  # the form nn.scan wants


class LinenBlocks(nn.Module):
    """The unrolled layers, named "0", "1", … as in the checkpoint."""

    shape: Shape

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        for i in range(self.shape.layers):
            x, _ = LinenBlock(self.shape, name=str(i))(x)
        return x, None


class LinenTransformer(nn.Module):
    shape: Shape

    def setup(self) -> None:
        shape = self.shape
        self.wte = nn.Embed(shape.vocab, shape.width)
        self.wpe = nn.Embed(shape.positions, shape.width)
        if shape.scan_axis is None:
            self.h = LinenBlocks(shape)
        else:
            self.h = nn.scan(
                LinenBlock,
                variable_axes={"params": shape.scan_axis},
                split_rngs={"params": True, "dropout": True},
                length=shape.layers,
            )(shape)
        self.ln_f = nn.LayerNorm(shape.eps)

    def __call__(self, ids: jax.Array) -> jax.Array:
        x, _ = self.h(self.wte(ids) + self.wpe(positions_of(ids)), None)
        return self.wte.attend(self.ln_f(x))


class LinenGPT2(nn.Module):
    """As `GPT2`; its parameters have the same dotted paths."""

    shape: Shape

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        return LinenTransformer(self.shape, name="transformer")(ids)


# ---- from torch --------------------------------------------------------------------------------------


def leaves_from_torch(state_dict: dict[str, Any], scan_axis: int | None = None) -> dict[str, np.ndarray]:
    """A `GPT2LMHeadModel` state dict as the twins' leaves; the tied `lm_head.weight` is left out."""
    out: dict[str, np.ndarray] = {}
    for key, tensor in state_dict.items():
        array = np.array(tensor.detach().cpu().numpy())
        *_, module, kind = key.split(".")
        if key == "lm_head.weight":
            continue
        if kind == "weight":
            if module.startswith("c_"):  # Conv1D: (in, out) there, (out, in) here
                kind, array = "kernel", np.ascontiguousarray(array.T)
            else:
                kind = "embedding" if module in ("wte", "wpe") else "scale"
        out[key.rpartition(".")[0] + "." + kind] = array
    return out if scan_axis is None else trees.stack(out, scan_axis)


def torch_gpt2(shape: Shape, seed: int = 0) -> Any:
    """A tiny random transformers GPT-2 in eval mode, with weights large enough for tests to see."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=shape.vocab,
            n_positions=shape.positions,
            n_embd=shape.width,
            n_layer=shape.layers,
            n_head=shape.heads,
            layer_norm_epsilon=shape.eps,
            bos_token_id=0,
            eos_token_id=0,
            initializer_range=0.15,
        )
    ).eval()
    with torch.no_grad():  # biases and norms away from 0 and 1, where a mistake could hide
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or ".ln_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def make_gpt2(api: str = "nnx", scan_axis: int | None = None, seed: int = 0, **numbers: Any) -> tuple[Any, Any]:
    """A torch GPT-2 and its twin: an NNX model, or for "linen" the pair (module, {"params": …})."""
    shape = Shape(scan_axis=scan_axis, **numbers)
    torch_model = torch_gpt2(shape, seed)
    leaves = leaves_from_torch(torch_model.state_dict(), scan_axis)
    if api == "linen":
        return torch_model, (LinenGPT2(shape), {"params": trees.nest(leaves)})
    model = GPT2(shape, rngs=nnx.Rngs(0))
    trees.fill(model, leaves)
    return torch_model, model
