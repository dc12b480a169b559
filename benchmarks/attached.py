"""Loading into, changing and saving an adapter that is attached to a model of 30 unrolled layers, beside PEFT.

    python -m benchmarks.io [--attached-only]

The model has the projections of SmolLM2-135M as 210 `nnx.Linear`s in bfloat16, the adapter 420 tensors of float32 (10
MB). The time goes to the walk over the model and to the number of arrays, so the base's values do not matter: layers
share one array for each shape. PEFT has a torch model with the same modules.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import jaxadapt
from benchmarks import io_alone
from benchmarks.measure import Way, apart, ratio, serve, table
from jaxadapt.models import graph

LAYERS, HIDDEN, KV, INNER, RANK = 30, 576, 192, 1536, 8
PROJECTIONS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN, KV), "self_attn.v_proj": (HIDDEN, KV),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (HIDDEN, INNER), "mlp.up_proj": (HIDDEN, INNER),
    "mlp.down_proj": (INNER, HIDDEN),
}  # fmt: skip
FOLDER, OTHER, FILE = "attached", "attached-other", "adapter_model.safetensors"
LEAST_LOAD, LEAST_CONVERT = "JAX alone: read, device_put, walk and set", "the walk, the values and to_peft(adapter)"
LOAD, HOTSWAP = "jaxadapt.load, into the attached adapter", "PEFT hotswap_adapter"
INJECT, ACTIVATE, SET = "jaxadapt.inject", "jaxadapt.activate", "PEFT set_adapter"
CONVERT, CONVERT_ADAPTER = "jaxadapt.to_peft(model)", "jaxadapt.to_peft(adapter)"
SAVE, SAVE_ADAPTER = "jaxadapt.save(model)", "jaxadapt.save(adapter)"
TARGETS = ((LOAD, HOTSWAP, 0.75), (INJECT, SET, 1.0), (CONVERT, LEAST_CONVERT, 1.25), (SAVE, SAVE_ADAPTER, 1.5))


class Block(nnx.Module):
    """Some of a layer's projections."""

    def __init__(self, name: str, rngs: nnx.Rngs) -> None:
        options = {"use_bias": False, "kernel_init": zeros, "param_dtype": jnp.bfloat16, "rngs": rngs}
        for module, shape in PROJECTIONS.items():
            block, attribute = module.split(".")
            if block == name:
                setattr(self, attribute, nnx.Linear(*shape, **options))


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.self_attn, self.mlp = Block("self_attn", rngs), Block("mlp", rngs)


class Layers(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([Layer(rngs) for _ in range(LAYERS)])


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.model = Layers(rngs)


def zeros(_: Any, shape: tuple[int, ...], dtype: Any, **__: Any) -> jax.Array:
    return _zeros(shape, dtype)


@functools.cache
def _zeros(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.zeros(shape, dtype)


def adapted() -> Model:
    names = [module.split(".")[1] for module in PROJECTIONS]
    config = jaxadapt.LoraConfig(r=RANK, lora_alpha=16, target_modules=names)
    return jaxadapt.adapt(Model(nnx.Rngs(0)), config, keymap="llama", rngs=nnx.Rngs(1))


def load_way(folder: Path) -> Way:
    model, paths = adapted(), itertools.cycle([folder / OTHER, folder / FOLDER])
    return Way(lambda _: jaxadapt.load(next(paths), model))


def inject_way(folder: Path) -> Way:
    model = adapted()
    adapters = itertools.cycle([jax.tree.map(jnp.ones_like, jaxadapt.extract(model)), jaxadapt.extract(model)])
    return Way(lambda _: jaxadapt.inject(model, next(adapters)))


def activate_way(folder: Path) -> Way:
    model = jaxadapt.adapt(adapted(), jaxadapt.read_config(folder / FOLDER), name="other", rngs=nnx.Rngs(2))
    names = itertools.cycle(["default", "other"])
    return Way(lambda _: jaxadapt.activate(model, next(names)))


def device_put_way(folder: Path) -> Way:
    host = list(jaxadapt.read(folder / FOLDER).tensors.values())
    return Way(lambda _: jax.block_until_ready(jax.device_put(host, may_alias=True)))


def least_load_way(folder: Path) -> Way:
    """Load without a plan or a check: the file's tensors in its order go to the model's variables in theirs."""
    model, files = adapted(), itertools.cycle([folder / OTHER / FILE, folder / FOLDER / FILE])
    shapes = [x.shape for x in variables(model)]

    def load(_: Any) -> None:
        arrays = jax.device_put(io_alone.read(next(files), shapes), may_alias=True)
        for variable, array in zip(variables(model), arrays, strict=True):
            variable.set_raw_value(array)

    return Way(load)


def variables(model: Model) -> list[Any]:
    return [x for _, x in graph.walk(model) if isinstance(x, jaxadapt.AdapterParam)]


def least_convert_way(folder: Path) -> Way:
    """The walk, the variables' values by path, and the conversion of the adapter that these are the values of."""
    model = adapted()
    adapter = jaxadapt.extract(model)

    def convert(_: Any) -> object:
        entries = [(path, x) for path, x in graph.walk(model) if isinstance(x, jaxadapt.AdapterParam)]
        values = {".".join(map(str, path)): x.get_value() for path, x in entries}
        return values, jaxadapt.to_peft(adapter)

    return Way(convert)


def of_model(work: Callable[[Any, Path], object]) -> Callable[[Path], Way]:
    def way(folder: Path) -> Way:
        model = adapted()
        return Way(lambda _: work(model, folder / "saved"))

    return way


def of_adapter(work: Callable[[Any, Path], object]) -> Callable[[Path], Way]:
    def way(folder: Path) -> Way:
        adapter = jaxadapt.extract(adapted())
        return Way(lambda _: work(adapter, folder / "saved-adapter"))

    return way


def torch_model(folder: Path) -> Any:
    """PEFT's model with both adapters, on a base whose weights share one element each."""
    import peft
    import torch

    def linear(shape: tuple[int, int]) -> Any:
        module = torch.nn.Linear(*shape, bias=False, device="meta", dtype=torch.bfloat16)
        weight = torch.zeros((), dtype=torch.bfloat16).expand(shape[::-1])
        module.weight = torch.nn.Parameter(weight, requires_grad=False)
        return module

    def layer() -> Any:
        blocks: dict[str, Any] = {}
        for module, shape in PROJECTIONS.items():
            block, name = module.split(".")
            blocks.setdefault(block, torch.nn.ModuleDict())[name] = linear(shape)
        return torch.nn.ModuleDict(blocks)

    base = torch.nn.Module()
    base.model = torch.nn.Module()
    base.model.layers = torch.nn.ModuleList([layer() for _ in range(LAYERS)])
    model = peft.PeftModel.from_pretrained(base, str(folder / FOLDER), autocast_adapter_dtype=False)
    model.load_adapter(str(folder / OTHER), adapter_name="other", autocast_adapter_dtype=False)
    return model


def hotswap_way(folder: Path) -> Way:
    from peft.utils.hotswap import hotswap_adapter

    model, paths = torch_model(folder), itertools.cycle([folder / OTHER, folder / FOLDER])
    return Way(lambda _: hotswap_adapter(model, str(next(paths)), adapter_name="default"))


def set_adapter_way(folder: Path) -> Way:
    model, names = torch_model(folder), itertools.cycle(["other", "default"])
    return Way(lambda _: model.set_adapter(next(names)))


WAYS: dict[str, Callable[[Path], Way]] = {
    LOAD: load_way,
    LEAST_LOAD: least_load_way,
    "JAX alone: device_put of the tensors in memory": device_put_way,
    HOTSWAP: hotswap_way,
    INJECT: inject_way,
    ACTIVATE: activate_way,
    SET: set_adapter_way,
    CONVERT: of_model(lambda model, _: jaxadapt.to_peft(model)),
    LEAST_CONVERT: least_convert_way,
    CONVERT_ADAPTER: of_adapter(lambda adapter, _: jaxadapt.to_peft(adapter)),
    SAVE: of_model(jaxadapt.save),
    SAVE_ADAPTER: of_adapter(jaxadapt.save),
    "the walk alone": of_model(lambda model, _: graph.walk(model)),
    "Flax alone: nnx.state(model)": of_model(lambda model, _: nnx.state(model)),
}


def run(rounds: int, folder: Path, with_peft: bool) -> list[str]:
    """Print the table; return the targets missed."""
    adapter = jaxadapt.extract(adapted())
    jaxadapt.save(adapter, folder / FOLDER)
    jaxadapt.save(jax.tree.map(jnp.ones_like, adapter), folder / OTHER)
    words = [sys.executable, "-m", "benchmarks.attached", "--way"]
    names = [name for name in WAYS if with_peft or not name.startswith("PEFT")]
    times = apart({name: [[*words, name, str(folder)]] for name in names}, rounds, os.environ)
    beside = {ours: (other, limit) for ours, other, limit in TARGETS if other in times}
    rows: list[list[object]] = []
    missed: list[str] = []
    for name, t in times.items():
        row = [f"{x * 1e3:.1f}" for x in (statistics.median(t.clock), min(t.clock), statistics.median(t.processor))]
        if name not in beside:
            rows.append([name, *row, "", "", "", ""])
            continue
        other, limit = beside[name]
        factor, busy = ratio(t.clock, times[other].clock), ratio(t.processor, times[other].processor)
        rows.append([name, *row, other, f"{factor:.2f}", f"{busy:.2f}", f"{limit:g}"])
        if factor > limit:
            missed.append(f"30 layers: {name} {factor:.2f} x {other}, target {limit:g}")
    count = len(jax.tree.leaves(adapter))
    title = f"**30 unrolled layers, {count} tensors of {sum(x.nbytes for x in jax.tree.leaves(adapter)) / 1e6:.0f} MB"
    head = ["way", "median ms", "best ms", "CPU ms", "beside", "x clock", "x CPU time", "target"]
    print(table(f"{title}, each way in a process of its own, median of {rounds} rounds**", head, rows), flush=True)
    return missed


def main() -> None:
    options = argparse.ArgumentParser(description="one way of benchmarks.io, in a process of its own")
    options.add_argument("--way", nargs=2, required=True)
    name, folder = options.parse_args().way
    jax.block_until_ready(jnp.zeros(()))
    serve(WAYS[name](Path(folder)))


if __name__ == "__main__":
    main()
