"""Train LoRA on an Equinox model, save it in PEFT's format, and load it again.

    pip install jaxadapt equinox
    python examples/equinox_lora.py              # 10 seconds; writes the adapter to out/equinox

The names in the file are the model's own paths (`layers.0`, …). It prints the loss after 20 steps:

    0.27
"""

import sys
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import jaxadapt
from jaxadapt.models import LoraTree, adapter_filter


def main(folder: str) -> float:
    """Train for twenty steps; return the last loss."""
    base = eqx.nn.MLP(4, 1, 32, 2, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (64, 4))
    y = jnp.sin(x.sum(-1, keepdims=True))

    config = jaxadapt.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    model = jaxadapt.adapt(base, config, key=jax.random.key(2), example=[x[0]])
    trained, rest = eqx.partition(model, adapter_filter(model))
    tx = optax.adam(1e-2)
    state = tx.init(trained)

    @eqx.filter_value_and_grad
    def loss(trained: Any, rest: Any) -> Any:
        return jnp.mean((jax.vmap(eqx.combine(trained, rest))(x) - y) ** 2)

    @eqx.filter_jit
    def step(trained: Any, rest: Any, state: Any) -> Any:
        value, gradients = loss(trained, rest)
        updates, state = tx.update(gradients, state)
        return eqx.apply_updates(trained, updates), state, value

    value = jnp.inf
    for _ in range(20):
        trained, state, value = step(trained, rest, state)

    model = eqx.combine(trained, rest)
    jaxadapt.save(model, folder)
    again = jaxadapt.load(folder, LoraTree(base, example=[x[0]]))
    assert jnp.array_equal(jax.vmap(again)(x), jax.vmap(model)(x))
    return float(value)


if __name__ == "__main__":
    print(f"{main(sys.argv[1] if len(sys.argv) > 1 else 'out/equinox'):.2f}")
