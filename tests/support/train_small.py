"""A small training in NNX and Linen, resumed from a CheckpointManager.

    python -m tests.support.train_small API FOLDER STOP [LOG]

As a program it trains up to step STOP, saves there, and kills itself: nothing is closed or waited for but that save.
With LOG it goes on from where it was, for others to kill.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jaxadapt

CONFIG = jaxadapt.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.25, target_modules=["up", "down"])
TX = optax.adamw(optax.linear_schedule(1e-2, 1e-3, 20))


class Net(nnx.Module):
    """With dropout and batch statistics: state that is neither base nor adapter."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.drop = nnx.Dropout(0.25, rngs=rngs)
        self.down = nnx.Linear(16, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.drop(nnx.relu(self.norm(self.up(x)))))


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.BatchNorm(use_running_average=False, name="norm")(nn.Dense(16, name="up")(x))
        return nn.Dense(2, name="down")(nn.Dropout(0.25, deterministic=False)(nn.relu(x)))


def batch(position: int) -> tuple[jax.Array, jax.Array]:
    x = jax.random.normal(jax.random.fold_in(jax.random.key(3), position), (4, 8))
    return x, jnp.sin(x[:, :2])


class NNX:
    """One training: everything `save` and `restore` need, and `step`."""

    def __init__(self) -> None:
        self.model = Net(nnx.Rngs(0))
        jaxadapt.adapt(self.model, CONFIG, rngs=nnx.Rngs(1))
        self.optimizer = nnx.Optimizer(self.model, TX, wrt=jaxadapt.AdapterParam)
        self.rngs = nnx.Rngs(noise=jax.random.key(5, impl="rbg"))
        self.position = 0

    @staticmethod
    @nnx.jit
    def _step(model: Net, optimizer: Any, rngs: nnx.Rngs, x: jax.Array, y: jax.Array) -> jax.Array:
        x = x + 0.1 * jax.random.normal(rngs.noise(), x.shape)

        def loss(model: Net) -> jax.Array:
            return jnp.mean((model(x) - y) ** 2)

        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, jaxadapt.AdapterParam))(model)
        optimizer.update(model, grads)
        return value

    def step(self) -> float:
        value = self._step(self.model, self.optimizer, self.rngs, *batch(self.position))
        self.position += 1
        return float(value)

    def save(self, manager: jaxadapt.CheckpointManager, step: int, **more: Any) -> None:
        data = {"position": self.position}
        manager.save(step, self.model, opt_state=self.optimizer, rng=self.rngs, data=data, **more)

    def restore(self, manager: jaxadapt.CheckpointManager, step: int | None = None) -> int:
        back = manager.restore(self.model, step, opt_state=self.optimizer, rng=self.rngs)
        assert back.model is self.model
        assert back.opt_state is self.optimizer
        self.position = back.data["position"]
        return back.step


class Linen:
    def __init__(self) -> None:
        self.module = jaxadapt.adapt(LinenNet(), CONFIG)
        keys = {"params": jax.random.key(0), "dropout": jax.random.key(2)}
        self.variables = self.module.init(keys, batch(0)[0])
        self.opt_state = TX.init(self.variables["lora"])
        self.key = jax.random.key(5)
        self.position = 0

    def step(self) -> float:
        x, y = batch(self.position)
        self.position += 1
        self.variables, self.opt_state, self.key, value = self._jitted(self.variables, self.opt_state, self.key, x, y)
        return float(value)

    @property
    def _jitted(self) -> Any:
        module = self.module
        if module not in _STEPS:

            def step(variables: Any, opt_state: Any, key: jax.Array, x: jax.Array, y: jax.Array) -> Any:
                key, drop = jax.random.split(key)

                def loss(lora: Any) -> Any:
                    held = {**variables, "lora": lora}
                    out, changed = module.apply(held, x, rngs={"dropout": drop}, mutable=["batch_stats"])
                    return jnp.mean((out - y) ** 2), changed

                (value, changed), grads = jax.value_and_grad(loss, has_aux=True)(variables["lora"])
                updates, opt_state = TX.update(grads, opt_state, variables["lora"])
                lora = optax.apply_updates(variables["lora"], updates)
                return {**variables, **changed, "lora": lora}, opt_state, key, value

            # Donated, as in earnest: what a save that is under way reads must not be written over.
            _STEPS[module] = jax.jit(step, donate_argnums=(0, 1, 2))
        return _STEPS[module]

    def save(self, manager: jaxadapt.CheckpointManager, step: int, **more: Any) -> None:
        data = {"position": self.position}
        manager.save(step, self.variables, opt_state=self.opt_state, rng=self.key, data=data, **more)

    def restore(self, manager: jaxadapt.CheckpointManager, step: int | None = None) -> int:
        back = manager.restore(self.variables, step, opt_state=self.opt_state)
        self.variables, self.opt_state, self.key = back.model, back.opt_state, back.rng
        self.position = back.data["position"]
        return back.step


_STEPS: dict[Any, Any] = {}
APIS: dict[str, Any] = {"nnx": NNX, "linen": Linen}


def go_on(training: Any, manager: jaxadapt.CheckpointManager, stop: int, log: str) -> None:
    """From the last checkpoint to step `stop`, a save a step, nothing waited for; each loss a line of a file."""
    done = training.restore(manager) if manager.latest is not None else 0
    with open(log, "a", encoding="ascii") as file:  # noqa: PTH123
        for step in range(done + 1, stop + 1):
            file.write(f"{step} {training.step().hex()}\n")
            file.flush()
            training.save(manager, step)


def main() -> None:
    api, folder, stop = sys.argv[1], sys.argv[2], int(sys.argv[3])
    training = APIS[api]()
    manager = jaxadapt.CheckpointManager(folder, keep=2 if sys.argv[4:] else None)
    if sys.argv[4:]:
        go_on(training, manager, stop, sys.argv[4])
        return
    for step in range(1, stop + 1):
        training.step()
        training.save(manager, step)
    manager.wait()
    training.step()  # lost, and repeated bit for bit
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
