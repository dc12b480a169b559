"""Train one adapter in several processes on one mesh, with checkpoints, and save it as one PEFT folder.

    python examples/two_processes.py             # 20 seconds; starts two processes; writes to out/two_processes
    python examples/two_processes.py --steps 20  # resumes after step 10

On a cluster, examples/slurm.sh and examples/jobset.yaml start it with --cluster. It prints

    2 processes, 4 devices, mesh {'data': 2, 'model': 2}
    step 1: loss 4.586 ...
    step 10: loss 2.491
    one process reads out/two_processes/adapter: loss 2.433
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxadapt
from jaxadapt.demo.llama import Llama, LlamaConfig

SIZE = LlamaConfig(64, 32, 64, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8)
LORA = jaxadapt.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
ROWS = 16  # of a batch; the number of processes divides it


def batch(step: int) -> np.ndarray:
    """Return tokens (ROWS, 16), the same in every process: each row counts on from a random token."""
    return (np.random.default_rng(step).integers(0, 64, (ROWS, 1)) + np.arange(16)) % 64


def loss_of(model: Llama, tokens: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model(tokens)[:, :-1], tokens[:, 1:]).mean()


@nnx.jit
def train_step(model: Llama, optimizer: nnx.Optimizer, tokens: jax.Array) -> jax.Array:
    loss, grads = nnx.value_and_grad(loss_of, argnums=nnx.DiffState(0, jaxadapt.AdapterParam))(model, tokens)
    optimizer.update(model, grads)
    return loss


def spread(model: Llama, mesh: jax.sharding.Mesh) -> None:
    """Lay the base over the mesh: kernels (in, out) are split over "model"."""

    def lay(path: tuple, x: jax.Array) -> jax.Array:
        module = path[-2] if path[-1] == "kernel" else ""
        spec = P("model") if module in ("o_proj", "down_proj") else P(None, "model") if module else P()
        values = np.asarray(x)
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: values[index])

    flat = nnx.to_flat_state(nnx.state(model))
    nnx.update(model, nnx.from_flat_state([(path, leaf.replace(lay(path, leaf[...]))) for path, leaf in flat]))


def train(folder: Path, steps: int) -> None:
    """Train in this process, one of several that make the same calls."""
    auto, shape = jax.sharding.AxisType.Auto, (jax.process_count(), jax.local_device_count())
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(auto, auto))
    say = print if jax.process_index() == 0 else lambda _: None
    say(f"{jax.process_count()} processes, {jax.device_count()} devices, mesh {dict(mesh.shape)}")
    model = Llama(SIZE, rngs=nnx.Rngs(0))
    spread(model, mesh)
    jaxadapt.adapt(model, LORA, rngs=nnx.Rngs(1))  # the adapter has the shardings of its base
    optimizer = nnx.Optimizer(model, optax.adam(3e-2), wrt=jaxadapt.AdapterParam)
    own = np.split(np.arange(ROWS), jax.process_count())[jax.process_index()]  # the rows that this process reads
    with jaxadapt.CheckpointManager(folder / "run", keep=2) as manager, manager.preemption() as stop:
        first = 0 if manager.latest is None else manager.restore(model, opt_state=optimizer).step
        for step in range(first + 1, steps + 1):
            tokens = jax.make_array_from_process_local_data(NamedSharding(mesh, P("data")), batch(step)[own])
            loss = train_step(model, optimizer, tokens)
            say(f"step {step}: loss {loss:.3f}")
            if step % 5 == 0 or stop(step):  # SIGTERM to one process stops all of them after the same step
                manager.save(step, model, opt_state=optimizer)
            if stop(step):
                break
    jaxadapt.save(model, folder / "adapter")  # each process writes its part of one file


def start_two(folder: Path, steps: int) -> None:
    """Start this program twice on this machine, with two CPU devices each, and read the folder in one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    words = [sys.executable, __file__, str(folder), "--steps", str(steps), "--address", address, "--process"]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    both = [subprocess.Popen([*words, str(index)], env=env) for index in range(2)]
    if codes := [code for process in both if (code := process.wait())]:
        raise SystemExit(codes[0])
    model = jaxadapt.load(folder / "adapter", Llama(SIZE, rngs=nnx.Rngs(0)), strict="base")
    loss = nnx.jit(loss_of)(model, jnp.asarray(batch(steps + 1)))  # what the next step of a longer run prints
    print(f"one process reads {folder / 'adapter'}: loss {loss:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", type=Path, default=Path("out/two_processes"))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--cluster", action="store_true", help="JAX finds the processes: Slurm, or TPUs in GKE")
    parser.add_argument("--address", help="of process 0")
    parser.add_argument("--process", type=int)
    given = parser.parse_args()
    if not given.cluster and given.process is None:
        start_two(given.folder, given.steps)
    else:
        jax.distributed.initialize(given.address, None if given.cluster else 2, given.process)
        train(given.folder, given.steps)
