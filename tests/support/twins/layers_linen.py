"""Small Linen modules for attach tests; see `layers.Case`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxadapt.arrays.layout import Axes
from tests.support.twins import layers
from tests.support.twins.layers import CONV, EFFECTIVE, EITHER, IO, JOIN, MHA, REFUSED, SPLIT, Case, one


class Held(nn.Module):
    """One layer, made by `build(name)`, under the name `layer` (or another)."""

    build: Callable[[str], nn.Module]
    called: str = "layer"

    @nn.compact
    def __call__(self, *args: Any) -> jax.Array:
        return self.build(self.called)(*args)


def held(layer: type[nn.Module], *args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: Held(lambda name: layer(*args, **kwargs, name=name))


class Block(nn.Module):
    """A residual pair of general layers: 8 -> (2, 4) -> 8."""

    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = jnp.tanh(nn.DenseGeneral((2, 4), name="q")(x))
        if self.dropout:
            h = nn.Dropout(self.dropout, deterministic=False)(h)
        return x + nn.DenseGeneral(8, axis=(-2, -1), name="o")(h)


BLOCK = {"q.kernel": SPLIT, "o.kernel": JOIN}


class SetUp(nn.Module):
    """Layers from `setup`, a list of them, one called twice, and a second method."""

    def setup(self) -> None:
        self.lin = nn.Dense(8)
        self.layers = [nn.Dense(8) for _ in range(2)]

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.lin(x)
        for layer in self.layers:
            x = layer(jnp.tanh(x))
        return self.lin(x)

    def encode(self, x: jax.Array) -> jax.Array:
        return self.lin(x)


class SharedCompact(nn.Module):
    """One compact layer called twice."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        lin = nn.Dense(8, name="lin")
        return lin(jnp.tanh(lin(x)))


class Outer(nn.Module):
    """A module given as an attribute."""

    inner: nn.Module

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.inner(x)


class Subclass(nn.Dense):
    """Not `nn.Dense` itself, but nothing else either."""


class Stack(nn.Module):
    """Three blocks stacked on `axis` of every parameter, run by a scan."""

    axis: int = 0
    remat: bool = False
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        block: Any = nn.remat(Block, prevent_cse=False) if self.remat else Block
        run = nn.scan(
            lambda m, x, _: (m(x), None),
            variable_axes={"params": self.axis},
            split_rngs={"params": True, "dropout": True},
            length=3,
        )
        return run(block(self.dropout, name="blk"), x, None)[0]


class Mapped(nn.Module):
    """`nn.vmap` over the batch: each entry with weights of its own (axis 0), or all with the same (None)."""

    axis: int | None = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = nn.vmap(
            nn.Dense,
            in_axes=0,
            variable_axes={"params": self.axis},
            split_rngs={"params": self.axis is not None},
        )
        return dense(6, name="lin")(x)


class Remat(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.remat(Block)(name="blk")(x)


class Jitted(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.jit(Block)(name="blk")(x)


class Branches(nn.Module):
    """A layer called inside `nn.cond`; initialized outside it, as cond asks."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        lin = nn.Dense(8, name="lin")
        if self.is_initializing():
            return lin(x)
        return nn.cond(x.sum() > -1e9, lambda m, x: lin(x), lambda m, x: x, self, x)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.BatchNorm(use_running_average=False)(nn.Dense(8, name="lin")(x))


class Sown(nn.Module):
    """Writes an intermediate beside its layer."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.Dense(8, name="lin")(x)
        self.sow("intermediates", "y", y)
        return y


class ShareScope(nn.Module):
    """The layer's parameters lie in this module's own scope: the leaf is `layer.kernel`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        lin = nn.Dense(8)
        nn.share_scope(self, lin)
        return lin(x)


class Tied(nn.Module):
    """Embedding and output head are one table, the head through `attend`."""

    def setup(self) -> None:
        self.embed = nn.Embed(11, 8)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.embed.attend(jnp.tanh(self.embed(ids)))


class ReadOutside(nn.Module):
    """The decoder takes the encoder's kernel out of it: no adapter on `enc` can reach that product."""

    def setup(self) -> None:
        self.enc = nn.Dense(6)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = jnp.tanh(self.enc(x))
        return h @ self.enc.variables["params"]["kernel"].T


class Doubled(nn.Module):
    """`nn.map_variables` shows its layer other parameters than the ones that are stored."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def double(variables: Any) -> Any:
            return jax.tree.map(lambda t: t * 2, variables)

        return nn.map_variables(nn.Dense, "params", trans_in_fn=double, init=True)(6, name="layer")(x)


class Normalized(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.WeightNorm(nn.Dense(6, name="layer"))(x)


# ---- leaf modules of nobody's library ------------------------------------------------------------------


class OwnEinsum(nn.Module):
    """The equation comes with the call; `weight_name` names the leaf (Gemma's layout)."""

    shape: tuple[int, ...]
    weight_name: str = "w"

    @nn.compact
    def __call__(self, equation: str, x: jax.Array) -> jax.Array:
        w = self.param(self.weight_name, nn.initializers.normal(0.3), self.shape)
        return jnp.einsum(equation, x, w)


class FeedForward(nn.Module):
    """Two weights in one scope: both modules share this one's, so a module path is not a weight's name."""

    width: int = 8
    hidden: int = 6
    transposed: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (2, self.hidden, self.width) if self.transposed else (2, self.width, self.hidden)
        gating = OwnEinsum(shape, "gating_einsum")
        nn.share_scope(self, gating)
        gate = gating("...F,NHF->...NH" if self.transposed else "...F,NFH->...NH", x)
        linear = OwnEinsum((self.hidden, self.width), "linear")
        nn.share_scope(self, linear)
        return linear("...H,HF->...F", nn.gelu(gate[..., 0, :]) * gate[..., 1, :])


class Attention(nn.Module):
    """Query, fused key/value and output projections as einsums; two key/value heads for four queries."""

    def setup(self) -> None:
        self.q_einsum = OwnEinsum((4, 8, 2))
        self.kv_einsum = OwnEinsum((2, 2, 8, 2))
        self.attn_vec_einsum = OwnEinsum((4, 2, 8))

    def __call__(self, x: jax.Array) -> jax.Array:
        q = self.q_einsum("BTD,NDH->BTNH", x)
        k, v = self.kv_einsum("BSD,CKDH->CBSKH", x)
        k, v = jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2)
        weights = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", q, k), axis=-1)
        return self.attn_vec_einsum("BTNH,NHD->BTD", jnp.einsum("bnts,bsnh->btnh", weights, v))


ATTENTION = {
    "q_einsum.w": Axes((1,), (0, 2)),
    "kv_einsum.w": Axes((2,), (0, 1, 3)),
    "attn_vec_einsum.w": JOIN,
}


class GemmaBlock(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        x = x + Attention(name="attn")(x)
        return x + FeedForward(name="mlp")(x), None


class GemmaStack(nn.Module):
    """Gemma-like blocks, unrolled under `layer_0`, … or stacked under `layers`."""

    scan: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.scan:
            block: Any = nn.remat(GemmaBlock, prevent_cse=False)
            stack = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
            return stack(name="layers")(x, None)[0]
        for i in range(2):
            x, _ = GemmaBlock(name=f"layer_{i}")(x)
        return x


def feed_forward(transposed: bool = False) -> dict[str, Axes]:
    gating = Axes((2,), (0, 1)) if transposed else Axes((1,), (0, 2))
    return {"gating_einsum": gating, "linear": IO}


GEMMA = {f"attn.{leaf}": axes for leaf, axes in ATTENTION.items()} | {
    f"mlp.{leaf}": axes for leaf, axes in feed_forward().items()
}


class Own(nn.Module):
    """A leaf module that does `use(x, w)` with its weight."""

    use: Callable[[jax.Array, jax.Array], jax.Array]
    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.use(x, self.param("w", nn.initializers.normal(0.3), self.shape))


def own(use: Callable[[jax.Array, jax.Array], jax.Array], *shape: int) -> Callable[[], nn.Module]:
    return held(Own, use, shape)


def under(prefix: str, roles: dict[str, Axes]) -> dict[str, Axes]:
    return {f"{prefix}.{leaf}": axes for leaf, axes in roles.items()}


IN_BLK = under("blk", BLOCK)
KERNEL, W = "layer.kernel", "layer.w"
PARTITIONED = nn.with_partitioning(nn.initializers.lecun_normal(), ("a", "b"))
SEQUENTIAL = {"layer.layers_0.kernel": IO, "layer.layers_2.kernel": IO}

LINEN: list[Case] = [
    Case("bare", lambda: nn.Dense(6), one, {"kernel": IO}),
    Case("dense", held(nn.Dense, 6), one, {KERNEL: IO}),
    Case("dense_no_bias", held(nn.Dense, 6, use_bias=False), one, {KERNEL: IO}),
    Case("dense_bf16", held(nn.Dense, 6, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16), one, {KERNEL: IO}),
    Case("dense_subclass", held(Subclass, 6), one, {KERNEL: IO}),
    Case("general_out", held(nn.DenseGeneral, (2, 4)), one, {KERNEL: SPLIT}),
    Case("general_in_out", held(nn.DenseGeneral, (2, 3), axis=(-2, -1)), one, {KERNEL: Axes((0, 1), (2, 3))}),
    Case("general_unsorted", held(nn.DenseGeneral, (2, 3), axis=(-1, -2)), one, {KERNEL: Axes((0, 1), (2, 3))}),
    Case("general_first_axis", held(nn.DenseGeneral, 3, axis=1), one, {KERNEL: IO}),
    Case(
        "general_batch",
        held(nn.DenseGeneral, 6, axis=-1, batch_dims=(0,)),
        one,
        {KERNEL: Axes((1,), (2,), (0,))},
    ),
    Case("einsum", held(nn.Einsum, (8, 3, 4), "btd,dnh->btnh"), one, {KERNEL: SPLIT}),
    Case("einsum_ellipsis", held(nn.Einsum, (8, 6), "...d,do->...o", use_bias=False), one, {KERNEL: IO}),
    Case(
        "einsum_at_call",
        lambda: Held(lambda name: nn.Einsum((8, 3, 4), name=name)),
        lambda: (layers.x(), "btd,dnh->btnh"),
        {KERNEL: SPLIT},
    ),
    Case(
        "einsum_fused",
        held(nn.Einsum, (2, 8, 3, 4), "btd,cdnh->cbtnh", use_bias=False),
        one,
        {KERNEL: Axes((1,), (0, 2, 3))},
    ),
    Case(
        "einsum_batch",
        held(nn.Einsum, (5, 8, 6), "btd,tdo->bto", use_bias=False),
        one,
        {KERNEL: Axes((1,), (2,), (0,))},
    ),
    Case("block", Block, one, BLOCK),
    Case("setup_shared", SetUp, one, {"lin.kernel": IO, "layers_0.kernel": IO, "layers_1.kernel": IO}),
    Case("compact_shared", SharedCompact, one, {"lin.kernel": IO}),
    Case("attribute", lambda: Outer(nn.Dense(6)), one, {"inner.kernel": IO}),
    Case("sequential", held(nn.Sequential, [nn.Dense(6), nn.relu, nn.Dense(3)]), one, SEQUENTIAL),
    Case("mha", lambda: Held(lambda n: nn.MultiHeadDotProductAttention(2, name=n), "attn"), one, MHA),
    Case("partitioned", held(nn.Dense, 6, kernel_init=PARTITIONED), one, {KERNEL: IO}),
    Case("share_scope", lambda: Held(lambda n: ShareScope(name=n)), one, {KERNEL: IO}),
    Case("scan0", Stack, one, IN_BLK, stack=dict.fromkeys(IN_BLK, 0)),
    Case("scan1", lambda: Stack(1), one, IN_BLK, stack=dict.fromkeys(IN_BLK, 1)),
    Case("scan0_remat", lambda: Stack(0, True), one, IN_BLK, stack=dict.fromkeys(IN_BLK, 0)),
    Case(
        "scan1_dropout",
        lambda: Stack(1, True, 0.5),
        one,
        IN_BLK,
        stack=dict.fromkeys(IN_BLK, 1),
        rngs=("dropout",),
    ),
    Case("vmap", Mapped, one, {"lin.kernel": IO}, stack={"lin.kernel": 0}),
    Case("vmap_same", lambda: Mapped(None), one, {"lin.kernel": IO}),
    Case("remat", Remat, one, IN_BLK),
    Case("nn_jit", Jitted, one, IN_BLK),
    Case("cond", Branches, one, {"lin.kernel": IO}),
    Case("dropout", lambda: Block(0.5), one, BLOCK, rngs=("dropout",)),
    Case("batchnorm", Normed, one, {"lin.kernel": IO}, mutable=("batch_stats",)),
    Case("sown", Sown, one, {"lin.kernel": IO}, mutable=("intermediates",)),
    Case("rnn", lambda: nn.RNN(nn.LSTMCell(6), name="rnn"), one, {"cell.hi.kernel": IO, "cell.ii.kernel": IO}),
    Case("embed", held(nn.Embed, 11, 8), layers.tokens, {"layer.embedding": IO}),
    Case("embed_attend", Tied, layers.tokens, {"embed.embedding": IO}, EITHER),
    Case(
        "own_einsum",
        lambda: Held(lambda name: OwnEinsum((8, 3, 4), name=name)),
        lambda: ("btd,dnh->btnh", layers.x()),
        {W: SPLIT},
    ),
    Case("gemma_mlp", held(FeedForward), one, under("layer", feed_forward())),
    Case("gemma_mlp_root", FeedForward, one, feed_forward()),
    Case("gemma_mlp_transposed", held(FeedForward, transposed=True), one, under("layer", feed_forward(True))),
    Case("gemma_attention", held(Attention), one, under("layer", ATTENTION)),
    Case("gemma_unrolled", GemmaStack, one, under("layer_0", GEMMA) | under("layer_1", GEMMA)),
    Case(
        "gemma_scan_remat",
        lambda: GemmaStack(True),
        one,
        under("layers", GEMMA),
        stack=dict.fromkeys(under("layers", GEMMA), 0),
    ),
    Case("own_transposed", own(lambda x, w: x @ w.T, 6, 8), one, {W: Axes((1,), (0,))}),
    Case("own_reshaped", own(lambda x, w: x @ w.reshape(8, 12), 8, 3, 4), one, {W: SPLIT}, EITHER),
    Case("own_twice", own(lambda x, w: jnp.tanh(x @ w) @ w, 8, 8), one, {W: IO}),
    Case("own_both_ways", own(lambda x, w: jnp.tanh(x @ w) @ w.T, 8, 6), one, {W: IO}, EITHER),
    Case("own_scaled", own(lambda x, w: x @ (w * 0.5), 8, 6), one, {W: IO}, EITHER),
    Case("own_conv", own(layers.conv, 3, 8, 6), one, {W: CONV}, EFFECTIVE, why="convolution"),
    Case(
        "own_gather",
        own(lambda i, w: jnp.take(w, i, axis=0), 11, 8),
        layers.tokens,
        {W: IO},
        EFFECTIVE,
        why="gather",
    ),
    Case("own_squared", own(lambda x, w: x @ w**2, 8, 6), one, {W: IO}, EFFECTIVE, why="not linear in w"),
    Case("own_custom_vjp", own(layers.opaque_matmul, 8, 6), one, {W: IO}, EFFECTIVE, why="custom_vjp"),
    Case("own_cond", own(layers.switched_matmul, 8, 6), one, {W: IO}, EFFECTIVE, why="cond"),
    Case("weight_norm", Normalized, one, {KERNEL: IO}, REFUSED, why="WeightNorm"),
    Case("map_variables", Doubled, one, {KERNEL: IO}, REFUSED, why="map_variables"),
    Case("read_outside", ReadOutside, one, {"enc.kernel": IO}, REFUSED, why="read outside"),
]
