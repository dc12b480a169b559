"""One small transformer block, in NNX and Linen with the same names, and eight ways to lay it over eight devices."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jaxadapt
from jaxadapt.core import paths

D, HEADS, HEAD, F, LAYERS = 16, 8, 2, 32, 2
CONFIG = jaxadapt.LoraConfig(r=3, lora_alpha=6, target_modules=["q", "o", "up", "down"])
X = np.random.default_rng(0).standard_normal((8, D)).astype("float32")

# PyTorch's names and layouts for a stack of blocks; `TABLE.scanned()` is the same with the layers in one array.
TABLE = jaxadapt.KeyMap(
    "blocks",
    tuple(
        jaxadapt.Weight(f"blocks.{{l}}.{name}.kernel", f"h.{{l}}.{name}.weight", pattern)
        for name, pattern in {
            "q": "d n h -> (n h) d", "o": "n h d -> d (n h)", "up": "d f -> f d", "down": "f d -> d f",
        }.items()
    ),
)  # fmt: skip

# Axes of each kernel: "F" is cut as FSDP cuts, "T" as tensor parallelism does.
CUTS: dict[str, dict[str, tuple[str | None, ...]]] = {
    "fsdp": {"q": ("F", None, None), "o": (None, None, "F"), "up": ("F", None), "down": ("F", None)},
    "tp": {"q": (None, "T", None), "o": ("T", None, None), "up": (None, "T"), "down": ("T", None)},
    "both": {"q": ("F", "T", None), "o": ("T", None, "F"), "up": ("F", "T"), "down": ("T", "F")},
}
MESHES: dict[str, tuple[tuple[int, ...], tuple[str, ...], dict[str, Any]]] = {
    "8": ((8,), ("x",), {"F": "x", "T": "x"}),
    "4x2": ((4, 2), ("fsdp", "tp"), {"F": "fsdp", "T": "tp"}),
    "2x2x2": ((2, 2, 2), ("data", "fsdp", "tp"), {"F": ("data", "fsdp"), "T": "tp"}),
}
LAYOUTS = [(mesh, cut) for mesh in MESHES for cut in CUTS if (mesh, cut) != ("8", "both")]


def mesh_of(name: str, kind: AxisType = AxisType.Auto) -> Mesh:
    shape, axes, _ = MESHES[name]
    return jax.make_mesh(shape, axes, axis_types=(kind,) * len(shape))


def names(leaf: str, mesh: str, cut: str) -> tuple[Any, ...]:
    """What the layout says of each axis of one kernel (without stacked ones)."""
    return tuple(MESHES[mesh][2].get(str(axis)) for axis in CUTS[cut][leaf.split(".")[-2]])


def spec(leaf: str, mesh: str, cut: str, ndim: int) -> PartitionSpec:
    """The spec of one base leaf; biases are replicated and so are stacked axes."""
    if not leaf.endswith("kernel"):
        return PartitionSpec()
    own = names(leaf, mesh, cut)
    return PartitionSpec(*[None] * (ndim - len(own)), *own)


def wanted(leaf: str, tensor: str, mesh: str, cut: str, stacked: bool = False) -> PartitionSpec:
    """By hand: lora_A has the inputs' cut, lora_B the outputs'."""
    q, (*front, last) = leaf.split(".")[-2] == "q", names(leaf, mesh, cut)
    inputs, out = ([front[0]], [*front[1:], last]) if q else (front, [last])
    own = [None, *inputs] if tensor == "lora_A" else [*out, None]
    return PartitionSpec(*[None] * stacked, *own)


class Block(nnx.Module):
    """d -> heads -> d -> f -> d."""

    def __init__(self, rngs: nnx.Rngs, said: Any = None) -> None:
        def told(name: str) -> Any:
            return {} if said is None else {"kernel_metadata": {"out_sharding": names(f"{name}.kernel", *said)}}

        self.q = nnx.LinearGeneral(D, (HEADS, HEAD), rngs=rngs, **told("q"))
        self.o = nnx.LinearGeneral((HEADS, HEAD), D, axis=(-2, -1), rngs=rngs, **told("o"))
        self.up = nnx.Linear(D, F, rngs=rngs, **told("up"))
        self.down = nnx.Linear(F, D, rngs=rngs, **told("down"))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.o(jnp.tanh(self.q(x)))
        return x + self.down(jnp.tanh(self.up(x)))


class Blocks(nnx.Module):
    """Two of them, unrolled or in one array each."""

    def __init__(self, rngs: nnx.Rngs, scanned: bool) -> None:
        self.scanned = scanned
        if scanned:
            self.blocks = nnx.vmap(Block, in_axes=0)(nnx.Rngs(0).split(LAYERS))
        else:
            self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.scanned:
            axes = nnx.StateAxes({jaxadapt.models.SharedParam: None, ...: 0})
            return nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, axes), out_axes=nnx.Carry)(x, self.blocks)
        for block in self.blocks:
            x = block(x)
        return x


class LinenBlock(nn.Module):
    """As `Block`; `said` puts the kernels of `up` and `down` in boxes (DenseGeneral's own cannot be under a mesh)."""

    said: Any = None
    logical: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def told(name: str) -> Any:
            init = nn.initializers.lecun_normal()
            if self.said is None or name in ("q", "o"):
                return init
            box = nn.with_logical_partitioning if self.logical else nn.with_partitioning
            axes = CUTS[self.said[1]][name] if self.logical else names(f"{name}.kernel", *self.said)
            return box(init, axes)

        h = jnp.tanh(nn.DenseGeneral((HEADS, HEAD), name="q", kernel_init=told("q"))(x))
        x = x + nn.DenseGeneral(D, axis=(-2, -1), name="o", kernel_init=told("o"))(h)
        h = jnp.tanh(nn.Dense(F, name="up", kernel_init=told("up"))(x))
        return x + nn.Dense(D, name="down", kernel_init=told("down"))(h)


def base(scanned: bool, seed: int = 0) -> dict[str, Any]:
    """The parameters of `Blocks` as a tree of numpy arrays (Linen's `params`)."""
    rng = np.random.default_rng(seed)
    shapes = {"q": (D, HEADS, HEAD), "o": (HEADS, HEAD, D), "up": (D, F), "down": (F, D)}
    layers = [
        {n: {"kernel": rng.standard_normal(s).astype("f4") / 4, "bias": np.zeros(_bias(n, s), "f4")}
         for n, s in shapes.items()}
        for _ in range(LAYERS)
    ]  # fmt: skip
    if scanned:
        return {"blocks": jax.tree.map(lambda *x: np.stack(x), *layers)}
    return {"blocks": {str(i): layer for i, layer in enumerate(layers)}}


def _bias(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[1:] if name == "q" else shape[-1:]


def placed(params: Any, mesh: Mesh, name: str, cut: str) -> Any:
    """The tree on the devices of a mesh."""
    flat = paths.flatten(params)
    where = {p: NamedSharding(mesh, spec(p, name, cut, x.ndim)) for p, x in flat.items()}
    return paths.unflatten(jax.device_put(flat, where))


def model(params: Any, scanned: bool) -> Blocks:
    """An NNX model that holds these very arrays (or specs)."""
    out = nnx.eval_shape(lambda: Blocks(nnx.Rngs(0), scanned))
    flat = paths.flatten(params)
    for path, var in nnx.to_flat_state(nnx.state(out, nnx.Param)):
        var.set_value(flat[paths.join(*map(str, path))])
    return out


def table(scanned: bool) -> jaxadapt.KeyMap:
    return TABLE.scanned() if scanned else TABLE


def adapter(flat: dict[str, Any], scanned: bool) -> jaxadapt.Adapter:
    return jaxadapt.Adapter(CONFIG, paths.unflatten(flat), table(scanned))


def like(mesh: Mesh, layout: tuple[str, str], scanned: bool) -> dict[str, NamedSharding]:
    """`{path: sharding}` of the adapter, by hand."""
    flat = jaxadapt.init(base(scanned), CONFIG, keymap=table(scanned)).flat()
    specs = {p: wanted(p.rpartition(".")[0], p.rpartition(".")[2], *layout, stacked=scanned) for p in flat}
    return {path: NamedSharding(mesh, spec) for path, spec in specs.items()}
