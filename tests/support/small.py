"""A network of two layers, in NNX and Linen with the same names, and adapters on it: for tests of files."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxadapt
from jaxadapt.persistence.formats import peft_folder

LORA = jaxadapt.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "up_proj"])
IA3 = jaxadapt.IA3Config(target_modules=["q_proj", "up_proj"], feedforward_modules=["up_proj"])
CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
STEP, CRC = "jaxadapt_step", "jaxadapt_crc32"  # in the header of a checkpoint
X = np.random.default_rng(0).standard_normal((3, 6)).astype("float32")


class Net(nnx.Module):
    """6 -> 8 -> 6."""

    def __init__(self, rngs: nnx.Rngs, dtype: Any = jnp.float32) -> None:
        self.q_proj = nnx.Linear(6, 8, rngs=rngs, param_dtype=dtype)
        self.up_proj = nnx.Linear(8, 6, rngs=rngs, param_dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.up_proj(jnp.tanh(self.q_proj(x)))


class LinenNet(nn.Module):
    """The same in Linen."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(6, name="up_proj")(jnp.tanh(nn.Dense(8, name="q_proj")(x)))


def net(seed: int = 0, **options: Any) -> Net:
    return Net(nnx.Rngs(seed), **options)


def base(seed: int = 0) -> dict[str, Any]:
    """`{"params": …}` of the Linen network, with the values of `net(seed)`."""
    model = net(seed)
    return {
        "params": {
            name: {k: getattr(getattr(model, name), k)[...] for k in ("kernel", "bias")}
            for name in ("q_proj", "up_proj")
        }
    }


def noisy(tree: Any, seed: int = 1) -> Any:
    """The same tree with other values, each near 1: neither zero nor one."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    values = [jnp.asarray(1 + 0.5 * rng.standard_normal(x.shape), x.dtype) for x in leaves]
    return jax.tree.unflatten(structure, values)


def trained(config: Any = LORA, seed: int = 1, name: str = "default", model: Any = None, **options: Any) -> Any:
    """An NNX network with an adapter that has done something."""
    model = net() if model is None else model
    jaxadapt.adapt(model, config, rngs=nnx.Rngs(5), name=name, **options)
    adapter = jaxadapt.extract(model, name=name)
    jaxadapt.inject(model, noisy(adapter, seed), name=name)
    return model


def variables(config: Any = LORA, seed: int = 1, name: str = "default") -> dict[str, Any]:
    """Linen variables with the very adapter of `trained(config, seed)`."""
    adapter = jaxadapt.init(base()["params"], config, key=jax.random.key(0))
    return {**base(), **noisy(adapter, seed).named(name)}


def adapter(config: Any = LORA, seed: int = 1) -> jaxadapt.Adapter:
    return noisy(jaxadapt.init(base()["params"], config, key=jax.random.key(0)), seed)


def host_adapter(r: int = 2, fill: float = 1.0, width: int = 8) -> jaxadapt.Adapter:
    """An adapter of numpy arrays, all of one value."""
    sites = {
        name: {"kernel": {"lora_A": np.full((r, width), fill, "f4"), "lora_B": np.full((width, r), fill, "f4")}}
        for name in ("q_proj", "up_proj")
    }
    return jaxadapt.Adapter(jaxadapt.LoraConfig(r=r, target_modules=["q_proj", "up_proj"]), sites)


def save_without_end(adapter: jaxadapt.Adapter, folder: Path) -> None:
    """Save over an adapter, and leave the digest of the JSON that was replaced, as a save that is killed then."""
    with mock.patch.object(peft_folder, "_blank_digest"):
        jaxadapt.save(adapter, folder)


def files(folder: Path) -> dict[str, bytes]:
    """Everything under a folder, by relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def same(a: Any, b: Any) -> bool:
    """Whether two trees hold the same arrays, bit for bit, with the same dtypes; of adapters also what gives them
    meaning, but for the name of the base model."""
    if isinstance(a, jaxadapt.Adapter) and isinstance(b, jaxadapt.Adapter):
        return a.config == b.config and a.keymap == b.keymap and same(a.params, b.params)
    x, y = jax.tree.leaves(a), jax.tree.leaves(b)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        p.dtype == q.dtype and np.array_equal(np.asarray(p), np.asarray(q)) for p, q in zip(x, y, strict=True)
    )
