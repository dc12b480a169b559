"""Small NNX modules for attach tests; see `layers.Case`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxadapt.arrays.layout import Axes
from tests.support.twins import layers
from tests.support.twins.layers import CONV, EFFECTIVE, EITHER, IO, JOIN, MHA, REFUSED, SPLIT, Case, one


def r(seed: int = 0) -> nnx.Rngs:
    return nnx.Rngs(seed)


def normal(seed: int, *shape: int) -> nnx.Param[jax.Array]:
    return nnx.Param(jax.random.normal(jax.random.key(seed), shape) * 0.3)


class Held(nnx.Module):
    """One layer under a name: `Held(name=layer)`."""

    def __init__(self, **layer: nnx.Module) -> None:
        ((self.name, module),) = layer.items()
        setattr(self, self.name, module)

    def __call__(self, *args: Any) -> jax.Array:
        return getattr(self, self.name)(*args)


def held(build: Callable[[], nnx.Module]) -> Callable[[], nnx.Module]:
    return lambda: Held(layer=build())


class Block(nnx.Module):
    """A residual pair of general layers: 8 -> (2, 4) -> 8."""

    def __init__(self, rngs: nnx.Rngs, dropout: float = 0.0) -> None:
        self.q = nnx.LinearGeneral(8, (2, 4), rngs=rngs)
        self.o = nnx.LinearGeneral((2, 4), 8, axis=(-2, -1), rngs=rngs)
        self.drop = nnx.Dropout(dropout, rngs=rngs, deterministic=True) if dropout else None

    def __call__(self, x: jax.Array) -> jax.Array:
        h = jnp.tanh(self.q(x))
        return x + self.o(h if self.drop is None else self.drop(h))


BLOCK = {"q.kernel": SPLIT, "o.kernel": JOIN}


class Mixed(nnx.Module):
    """Several kinds of layers, a list, and one layer called twice under two names."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.lin = nnx.Linear(8, 8, rngs=rngs)
        self.q = nnx.LinearGeneral(8, (2, 4), rngs=rngs)
        self.e = nnx.Einsum("btnh,nhd->btd", (2, 4, 8), (8,), rngs=rngs)
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(2)])
        self.shared = self.lin

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.shared(self.e(jnp.tanh(self.q(self.lin(x)))))
        for layer in self.layers:
            x = layer(jnp.tanh(x))
        return x


class Stack(nnx.Module):
    """Three blocks stacked on `axis` of every parameter, run by a scan."""

    def __init__(self, rngs: nnx.Rngs, axis: int = 0, remat: bool = False) -> None:
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=self.axes(axis))
        def make(rngs: nnx.Rngs) -> Block:
            return Block(rngs)

        self.blk = make(rngs)
        self.axis, self.remat = axis, remat

    @staticmethod
    def axes(axis: int) -> nnx.StateAxes:
        return nnx.StateAxes({nnx.Param: axis, ...: 0})

    def __call__(self, x: jax.Array) -> jax.Array:
        def layer(block: Block, x: jax.Array) -> jax.Array:
            return block(x)

        run: Any = nnx.remat(layer) if self.remat else layer
        return nnx.scan(run, in_axes=(self.axes(self.axis), nnx.Carry), out_axes=nnx.Carry)(self.blk, x)


class Mapped(nnx.Module):
    """Two linears stacked on axis 0, each applied to its own entry of the batch."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        @nnx.split_rngs(splits=2)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs: nnx.Rngs) -> nnx.Linear:
            return nnx.Linear(8, 6, rngs=rngs)

        self.lin = make(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.vmap(lambda m, x: m(x), in_axes=(0, 0), out_axes=0)(self.lin, x)


class Remat(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.blk = Block(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.remat(lambda m, x: m(x))(self.blk, x)


class Branches(nnx.Module):
    """A layer that is called inside `nnx.cond`."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.lin = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.cond(x.sum() > -1e9, lambda m, x: m(x), lambda m, x: x, self.lin, x)


class Normed(nnx.Module):
    """BatchNorm beside a linear: `nnx.BatchStat` changes in the call, adapters or not."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.lin = nnx.Linear(8, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.lin(x))


class Tied(nnx.Module):
    """Embedding and output head are one table, the head through `attend`."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(11, 8, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.embed.attend(jnp.tanh(self.embed(ids)))


class ReadOutside(nnx.Module):
    """The decoder takes the encoder's kernel out of it: no adapter on `enc` can reach that product."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.enc = nnx.Linear(8, 6, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(self.enc(x)) @ self.enc.kernel[...].T


# ---- leaf modules of nobody's library ------------------------------------------------------------------


class OwnEinsum(nnx.Module):
    """As Tunix has it: the equation is fixed, the weight is called `w`."""

    def __init__(self, equation: str, *shape: int) -> None:
        self.einsum_str, self.w = equation, normal(1, *shape)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.einsum(self.einsum_str, x, self.w[...])


class OwnAttention(nnx.Module):
    """Query, fused key/value and output projections as einsums (Gemma's layout)."""

    def __init__(self) -> None:
        self.q_einsum = OwnEinsum("btd,ndh->btnh", 4, 8, 2)
        self.kv_einsum = OwnEinsum("bsd,ckdh->cbskh", 2, 2, 8, 2)
        self.attn_vec_einsum = OwnEinsum("btnh,nhd->btd", 4, 2, 8)

    def __call__(self, x: jax.Array) -> jax.Array:
        q, (k, v) = self.q_einsum(x), self.kv_einsum(x)
        k, v = jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2)
        weights = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", q, k), axis=-1)
        return self.attn_vec_einsum(jnp.einsum("bnts,bsnh->btnh", weights, v))


class Own(nnx.Module):
    """A leaf module that does `use(x, w)` with its weight."""

    def __init__(self, use: Callable[[jax.Array, jax.Array], jax.Array], *shape: int) -> None:
        self.use, self.w = use, normal(2, *shape)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.use(x, self.w[...])


def own(use: Callable[[jax.Array, jax.Array], jax.Array], *shape: int) -> Callable[[], nnx.Module]:
    return held(lambda: Own(use, *shape))


def stacked(axis: int) -> dict[str, int]:
    return {f"blk.{leaf}": axis for leaf in BLOCK}


IN_BLK = {f"blk.{leaf}": axes for leaf, axes in BLOCK.items()}
KERNEL, W = "layer.kernel", "layer.w"

NNX: list[Case] = [
    Case("bare", lambda: nnx.Linear(8, 6, rngs=r()), one, {"kernel": IO}),
    Case("linear", held(lambda: nnx.Linear(8, 6, rngs=r())), one, {KERNEL: IO}),
    Case("linear_no_bias", held(lambda: nnx.Linear(8, 6, use_bias=False, rngs=r())), one, {KERNEL: IO}),
    Case(
        "linear_bf16",
        held(lambda: nnx.Linear(8, 6, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=r())),
        one,
        {KERNEL: IO},
    ),
    Case("general_out", held(lambda: nnx.LinearGeneral(8, (2, 4), rngs=r())), one, {KERNEL: SPLIT}),
    Case(
        "general_in_out",
        held(lambda: nnx.LinearGeneral((5, 8), (2, 3), axis=(-2, -1), rngs=r())),
        one,
        {KERNEL: Axes((0, 1), (2, 3))},
    ),
    Case(
        "general_unsorted",  # Flax sorts them
        held(lambda: nnx.LinearGeneral((5, 8), (2, 3), axis=(-1, -2), rngs=r())),
        one,
        {KERNEL: Axes((0, 1), (2, 3))},
    ),
    Case(
        "general_first_axis",
        held(lambda: nnx.LinearGeneral(5, 3, axis=1, rngs=r())),
        one,
        {KERNEL: IO},
    ),
    Case(
        "general_batch",
        held(lambda: nnx.LinearGeneral(8, 6, batch_axis={0: 2}, rngs=r())),
        one,
        {KERNEL: Axes((1,), (2,), (0,))},
    ),
    Case("einsum", held(lambda: nnx.Einsum("btd,dnh->btnh", (8, 3, 4), (3, 4), rngs=r())), one, {KERNEL: SPLIT}),
    Case(
        "einsum_ellipsis",
        held(lambda: nnx.Einsum("...d,do->...o", (8, 6), (6,), rngs=r())),
        one,
        {KERNEL: IO},
    ),
    Case(
        "einsum_fused",
        held(lambda: nnx.Einsum("btd,cdnh->cbtnh", (2, 8, 3, 4), rngs=r())),
        one,
        {KERNEL: Axes((1,), (0, 2, 3))},
    ),
    Case(
        "einsum_batch",
        held(lambda: nnx.Einsum("btd,tdo->bto", (5, 8, 6), rngs=r())),
        one,
        {KERNEL: Axes((1,), (2,), (0,))},
    ),
    Case("block", lambda: Block(r()), one, BLOCK),
    Case("mha", lambda: Held(attn=nnx.MultiHeadAttention(2, 8, decode=False, rngs=r())), one, MHA),
    Case(
        "mixed_shared",
        lambda: Mixed(r()),
        one,
        {
            "lin.kernel": IO,
            "q.kernel": SPLIT,
            "e.kernel": JOIN,
            "layers.0.kernel": IO,
            "layers.1.kernel": IO,
        },
    ),
    Case(
        "sequential",
        held(lambda: nnx.Sequential(nnx.Linear(8, 6, rngs=r()), nnx.relu, nnx.Linear(6, 3, rngs=r(1)))),
        one,
        {"layer.layers.0.kernel": IO, "layer.layers.2.kernel": IO},
    ),
    Case("scan0", lambda: Stack(r()), one, IN_BLK, stack=stacked(0)),
    Case("scan1", lambda: Stack(r(), axis=1), one, IN_BLK, stack=stacked(1)),
    Case("scan0_remat", lambda: Stack(r(), remat=True), one, IN_BLK, stack=stacked(0)),
    Case("scan1_remat", lambda: Stack(r(), axis=1, remat=True), one, IN_BLK, stack=stacked(1)),
    Case("vmap", lambda: Mapped(r()), one, {"lin.kernel": IO}, stack={"lin.kernel": 0}),
    Case("remat", lambda: Remat(r()), one, IN_BLK),
    Case("cond", lambda: Branches(r()), one, {"lin.kernel": IO}),
    Case("dropout", lambda: Block(r(), dropout=0.5), one, BLOCK),
    Case("batchnorm", lambda: Normed(r()), one, {"lin.kernel": IO}, mutable=("batch_stats",)),
    Case("embed", held(lambda: nnx.Embed(11, 8, rngs=r())), layers.tokens, {"layer.embedding": IO}),
    Case("embed_attend", lambda: Tied(r()), layers.tokens, {"embed.embedding": IO}, EITHER),
    Case("own_einsum", held(lambda: OwnEinsum("btd,dnh->btnh", 8, 3, 4)), one, {W: SPLIT}),
    Case(
        "own_attention",
        lambda: Held(attn=OwnAttention()),
        one,
        {
            "attn.q_einsum.w": Axes((1,), (0, 2)),
            "attn.kv_einsum.w": Axes((2,), (0, 1, 3)),
            "attn.attn_vec_einsum.w": JOIN,
        },
    ),
    Case("own_transposed", own(lambda x, w: x @ w.T, 6, 8), one, {W: Axes((1,), (0,))}),
    Case("own_reshaped", own(lambda x, w: x @ w.reshape(8, 12), 8, 3, 4), one, {W: SPLIT}, EITHER),
    Case("own_twice", own(lambda x, w: jnp.tanh(x @ w) @ w, 8, 8), one, {W: IO}),
    Case("own_both_ways", own(lambda x, w: jnp.tanh(x @ w) @ w.T, 8, 6), one, {W: IO}, EITHER),
    Case("own_scaled", own(lambda x, w: x @ (w * 0.5), 8, 6), one, {W: IO}, EITHER),
    Case("own_conv", own(layers.conv, 3, 8, 6), one, {W: CONV}, EFFECTIVE, why="convolution"),
    Case(
        "own_gather",
        held(lambda: Own(lambda i, w: jnp.take(w, i, axis=0), 11, 8)),
        layers.tokens,
        {W: IO},
        EFFECTIVE,
        why="gather",
    ),
    Case("own_squared", own(lambda x, w: x @ w**2, 8, 6), one, {W: IO}, EFFECTIVE, why="not linear in w"),
    Case("own_custom_vjp", own(layers.opaque_matmul, 8, 6), one, {W: IO}, EFFECTIVE, why="custom_vjp"),
    Case("own_cond", own(layers.switched_matmul, 8, 6), one, {W: IO}, EFFECTIVE, why="cond"),
    Case(
        "weight_norm",
        held(lambda: nnx.WeightNorm(nnx.Linear(8, 6, rngs=r()), rngs=r())),
        one,
        {"layer.layer_instance.kernel": IO},
        REFUSED,
        why="WeightNorm",
    ),
    Case("read_outside", lambda: ReadOutside(r()), one, {"enc.kernel": IO}, REFUSED, why="read outside"),
]
