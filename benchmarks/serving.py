"""A batch whose rows have adapters of their own, beside the bare base, one shared adapter, and PEFT's `adapter_names`.

    python -m benchmarks.serving [--layers 6] [--rows 64] [--with-peft]

The model is the demo's Llama with the widths of SmolLM2-135M, and the adapters are LoRAs of rank 8 on all seven
projections, in float32. A decode step has one token a row, a prefill 16; there is no KV cache, so both are one call of
the model. `put` is compared with the same copies as one jitted, donated call of JAX alone.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

import jaxadapt
from benchmarks.measure import Times, Way, installed, interleave, judge, parsed
from jaxadapt import serving
from jaxadapt.demo.llama import LlamaConfig
from jaxadapt.demo.llama_nnx import Llama

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 8


def sizes(given: argparse.Namespace) -> dict[str, int]:
    if given.smoke:
        return {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "num_kv_heads": 2}
    return {"vocab_size": 4096, "hidden_size": 576, "intermediate_size": 1536, "num_heads": 9, "num_kv_heads": 3}


def make_model(given: argparse.Namespace) -> Llama:
    widths = sizes(given)
    config = LlamaConfig(num_layers=given.layers, head_dim=widths["hidden_size"] // widths["num_heads"], **widths)
    return Llama(config, rngs=nnx.Rngs(0))


def lora() -> jaxadapt.LoraConfig:
    return jaxadapt.LoraConfig(r=RANK, target_modules=TARGETS, init_lora_weights=False)


def jax_ways(given: argparse.Namespace, tokens: int) -> tuple[dict[str, Way], dict[str, Way]]:
    """The ways to call the model, and the ways to bring in an adapter."""
    model = make_model(given)
    ids = np.random.default_rng(0).integers(0, 64, (given.rows, tokens))
    adapters = [jaxadapt.init(lora(), model, key=jax.random.key(i)) for i in range(2)]
    bank = serving.create(model, lora(), slots=given.rows + 1)
    for slot in range(1, given.rows + 1):
        bank = serving.put(bank, slot, adapters[slot % 2])
    plain, shared, banked = nnx.clone(model), nnx.clone(model), nnx.clone(model)
    jaxadapt.adapt(shared, lora(), rngs=nnx.Rngs(1))
    serving.attach(banked, bank)

    def compiled(model: Any) -> Any:
        graphdef, state = nnx.split(model)
        return functools.partial(jax.jit(lambda state, ids: nnx.merge(graphdef, state)(ids)), state)

    graphdef, state = nnx.split(banked)

    @jax.jit
    def routed(rows: Any, state: Any, ids: Any) -> Any:
        with serving.route(nnx.merge(graphdef, state), rows) as model:
            return model(ids)

    ways = {"base": compiled(plain), "one shared adapter": compiled(shared)}
    for count in dict.fromkeys((1, min(8, given.rows), given.rows)):
        rows = bank.select(1 + np.arange(given.rows) % count)
        ways[f"bank, {count} adapters"] = functools.partial(routed, rows, state)
    calls = {name: Way(lambda _, f=f: f(ids).block_until_ready()) for name, f in ways.items()}

    held = {"put": bank, "JAX": jax.tree.map(lambda x: x + 0, bank)}
    prepared = serving.prepare(bank, adapters[0])

    @functools.partial(jax.jit, donate_argnums=0)
    def copy(arrays: Any, new: Any, slot: Any) -> Any:
        return jax.tree.map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, slot, 0), arrays, new)

    def put(_: Any) -> None:
        held["put"] = jax.block_until_ready(serving.put(held["put"], 1, prepared))

    held["JAX"] = held["JAX"].arrays

    def alone(_: Any) -> None:
        held["JAX"] = jax.block_until_ready(copy(held["JAX"], prepared, np.int32(1)))

    select = np.arange(given.rows) + 1
    swaps = {
        "the same copies in JAX alone": Way(alone),
        "put, prepared": Way(put),
        "prepare": Way(lambda _: serving.prepare(bank, adapters[0])),
        "select": Way(lambda _: jax.block_until_ready(held["put"].select(select))),
    }
    return calls, swaps


def peft_ways(given: argparse.Namespace, tokens: int) -> dict[str, Way]:
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    widths = sizes(given)
    config = transformers.LlamaConfig(
        vocab_size=widths["vocab_size"], hidden_size=widths["hidden_size"], num_hidden_layers=given.layers,
        intermediate_size=widths["intermediate_size"], num_attention_heads=widths["num_heads"],
        num_key_value_heads=widths["num_kv_heads"], use_cache=False,
    )  # fmt: skip
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 64, (given.rows, tokens)))
    fields = LoraConfig(r=RANK, target_modules=TARGETS, init_lora_weights=False)
    model = get_peft_model(transformers.LlamaForCausalLM(config), fields, adapter_name="t0").eval()
    names = [f"t{i}" for i in range(given.rows)]
    for name in names[1:]:
        model.add_adapter(name, fields)

    def run(**options: Any) -> Any:
        with torch.no_grad():
            return model(ids, **options)

    def base(_: Any) -> Any:
        with model.disable_adapter():
            return run()

    ways = {"PEFT, base": Way(base), "PEFT, one shared adapter": Way(lambda _: run())}
    for count in dict.fromkeys((1, min(8, given.rows), given.rows)):
        chosen = [names[i % count] for i in range(given.rows)]
        ways[f"PEFT, {count} adapters"] = Way(lambda _, chosen=chosen: run(adapter_names=chosen))
    return ways


def show(title: str, times: Mapping[str, Times], against: Mapping[str, str]) -> dict[str, float]:
    """Print a table of medians, and return the median of each way's ratio to another, round by round."""
    print(f"\n### {title}\n\n| way | median ms | ratio |\n|---|---|---|")
    ratios: dict[str, float] = {}
    for name, of in times.items():
        other = times[against[name]]
        ratios[name] = statistics.median(a / b for a, b in zip(of.clock, other.clock, strict=True))
        print(f"| {name} | {1e3 * statistics.median(of.clock):.2f} | {ratios[name]:.2f} × {against[name]} |")
    return ratios


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--layers", type=int, default=6)
    options.add_argument("--rows", type=int, default=64)
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--with-peft", action="store_true")
    given = parsed(options, layers=1, rows=4, rounds=1)
    missed: list[str] = []
    for title, tokens in (("decode, 1 token a row", 1), ("prefill, 16 tokens a row", 16)):
        calls, swaps = jax_ways(given, tokens)
        if given.with_peft and installed("peft"):
            calls |= peft_ways(given, tokens)
        against = {n: "PEFT, one shared adapter" if n.startswith("PEFT") else "one shared adapter" for n in calls}
        ratios = show(title, interleave(calls, given.rounds), against)
        most = f"bank, {given.rows} adapters"
        if tokens > 1 and ratios[most] > 1.05:
            missed.append(f"prefill of {given.rows} adapters ≤ 1.05 × one shared adapter: {ratios[most]:.2f}")
    ratios = show("bringing in an adapter", interleave(swaps, given.rounds), dict.fromkeys(swaps, next(iter(swaps))))
    if ratios["put, prepared"] > 1.3:
        missed.append(f"put ≤ 1.3 × the same copies in JAX alone: {ratios['put, prepared']:.2f}")
    judge(missed, given)


if __name__ == "__main__":
    main()
