"""A batch whose rows have adapters of their own, beside the bare base, one shared adapter, JAX alone, and PEFT.

    python -m benchmarks.serving [--layers 6] [--rows 64] [--known 10 1000 5000] [--with-peft] [--busy]

The model is the demo's Llama with the widths of SmolLM2-135M, and the adapters are LoRAs of rank 8 on all seven
projections, in float32. A decode step has one token a row, a prefill 16; there is no KV cache, so both are one call of
the model. "JAX alone" is the least that such a call costs: the bare call, and the adapters' own products, from the same
gathered arrays, in a program of their own. The limit of decoding is the bare call and the time to read the used
adapters' bytes once, at the rate of a sum over as many bytes. `put` is compared with the same copies as one jitted,
donated call of JAX alone, and with PEFT's `hotswap_adapter` and `set_adapter`. Beside a process that saves an adapter
in a loop, no lease of this adapter may fail. Every ratio is the median over interleaved rounds, of the clock's seconds;
with `--busy`, of the processor's, for a machine that other work uses.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxadapt
from benchmarks.measure import Times, Way, environment, installed, interleave, judge, parsed, ratio, table
from jaxadapt import serving
from jaxadapt.demo.llama import PROJECTIONS, Llama, LlamaConfig

RANK = 8
BASE, SHARED = "bare base", "one shared adapter"


def sizes(given: argparse.Namespace) -> dict[str, int]:
    if given.smoke:
        return {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "num_kv_heads": 2}
    return {"vocab_size": 4096, "hidden_size": 576, "intermediate_size": 1536, "num_heads": 9, "num_kv_heads": 3}


def make_model(given: argparse.Namespace) -> Llama:
    widths = sizes(given)
    config = LlamaConfig(num_layers=given.layers, head_dim=widths["hidden_size"] // widths["num_heads"], **widths)
    return Llama(config, rngs=nnx.Rngs(0))


def lora() -> jaxadapt.LoraConfig:
    return jaxadapt.LoraConfig(r=RANK, target_modules=list(PROJECTIONS), init_lora_weights=False)


def counts(given: argparse.Namespace) -> list[int]:
    return sorted({1, min(8, given.rows), given.rows})


def compiled(model: Any) -> Any:
    graphdef, state = nnx.split(model)
    return functools.partial(jax.jit(lambda state, ids: nnx.merge(graphdef, state)(ids)), state)


def routed(model: Any) -> Any:
    graphdef, state = nnx.split(model)

    @jax.jit
    def call(state: Any, rows: Any, ids: Any) -> Any:
        with serving.route(nnx.merge(graphdef, state), rows) as model:
            return model(ids)

    return functools.partial(call, state)


@jax.jit
def products_alone(arrays: Sequence[Mapping[str, Any]], inputs: Mapping[int, Any]) -> Any:
    """The products of each row with its adapter at every site, each from the same input, and nothing else."""

    def one(tensors: Mapping[str, Any], x: Any) -> Any:
        h = x @ tensors["lora_A"].T * tensors["scale"]
        return h @ tensors["lora_B"].reshape(RANK, -1)

    def site(tensors: Mapping[str, Any]) -> Any:
        flat = {**tensors, "lora_A": tensors["lora_A"].reshape(len(tensors["lora_A"]), RANK, -1)}
        return jax.vmap(one)(flat, inputs[flat["lora_A"].shape[-1]])

    return [site(tensors) for tensors in arrays]


@jax.jit
def read_once(arrays: Any) -> Any:
    """A sum over all numbers, to measure the rate of reading."""
    return [x.sum() for x in jax.tree.leaves(arrays)]


class Ours:
    """The model, a full bank and compiled calls."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, model = given, make_model(given)
        self.adapters = [jaxadapt.init(model, lora(), key=jax.random.key(i)) for i in range(2)]
        self.bank = serving.create(model, lora(), slots=given.rows + 1)
        for slot in range(1, given.rows + 1):
            self.bank = serving.put(self.bank, slot, self.adapters[slot % 2])
        shared, self.base = nnx.clone(model), nnx.clone(model)
        jaxadapt.adapt(shared, lora(), rngs=nnx.Rngs(1))
        self.plain, self.shared = compiled(nnx.clone(model)), compiled(shared)
        self.call = routed(serving.attach(model, self.bank))

    def calls(self, tokens: int) -> dict[str, Way]:
        """The ways to call the model with as many tokens a row."""
        rows = self.given.rows
        ids = np.random.default_rng(0).integers(0, 64, (rows, tokens))
        ways = {BASE: lambda: self.plain(ids), SHARED: lambda: self.shared(ids)}
        for count in counts(self.given):
            chosen = self.bank.select(1 + np.arange(rows) % count)
            ways[f"bank, {count} adapters"] = functools.partial(self.call, chosen, ids)
        widths = {site.weight.shape[0] if "o_proj" not in site.row.leaf else sizes(self.given)["hidden_size"]
                  for site in self.bank.layout.places}  # fmt: skip
        inputs = {width: jnp.ones((rows, tokens, width)) for width in widths}
        ways["the adapters' products alone"] = functools.partial(products_alone, chosen.arrays, inputs)
        ways["reading the adapters once"] = functools.partial(read_once, chosen.arrays)
        return {name: Way(lambda _, f=f: jax.block_until_ready(f())) for name, f in ways.items()}

    def swaps(self, folder: Path) -> dict[str, Way]:
        """The ways to bring an adapter into a slot."""
        held: dict[str, Any] = {
            "put": jax.tree.map(jnp.copy, self.bank),
            "JAX": jax.tree.map(jnp.copy, self.bank.arrays),
        }
        prepared = serving.prepare(self.bank, self.adapters[0])

        @functools.partial(jax.jit, donate_argnums=0)
        def copy(arrays: Any, new: Any, slot: Any) -> Any:
            return jax.tree.map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, slot, 0), arrays, new)

        def put(_: Any) -> None:
            held["put"] = jax.block_until_ready(serving.put(held["put"], 1, prepared))

        def alone(_: Any) -> None:
            held["JAX"] = jax.block_until_ready(copy(held["JAX"], prepared, np.int32(1)))

        def from_folder(_: Any) -> None:
            adapter = jaxadapt.from_peft(jaxadapt.read(folder), self.base)
            held["put"] = jax.block_until_ready(serving.put(held["put"], 1, adapter))

        select = np.arange(self.given.rows) + 1
        return {
            "the same copies in JAX alone": Way(alone),
            "put, prepared": Way(put),
            "read a folder, prepare and put": Way(from_folder),
            "select": Way(lambda _: jax.block_until_ready(held["put"].select(select))),
        }

    def beside_saves(self, folder: Path) -> list[str]:
        """Lease an adapter while a process saves it in a loop; print what it took, and return the errors."""
        errors: list[str] = []
        versions: set[int] = set()
        seconds: list[float] = []
        bank = jax.tree.map(jnp.copy, self.bank)
        pool = serving.AdapterPool(bank, self.base, {"a": folder}, host_bytes=0)
        saver = multiprocessing.get_context("spawn").Process(target=save_forever, args=(self.adapters, str(folder)))
        saver.start()
        pauses = np.random.default_rng(0).uniform(0, 0.05, self.given.leases)
        first = pool.version("a").id
        while pool.add("a", folder).id == first and saver.is_alive():  # until it saves
            time.sleep(0.01)
        for pause in pauses:
            time.sleep(pause)
            start = time.perf_counter()
            try:
                with pool.lease(["a"]) as ids:
                    versions.add(ids.versions[0])
            except jaxadapt.AdapterError as error:
                errors.append(str(error))
            seconds.append(time.perf_counter() - start)
        saver.kill()
        saver.join()
        median, last = (1e3 * np.percentile(seconds, p) for p in (50, 99))
        print(f"\n{len(pauses)} leases beside a loop of saves: {len(errors)} failed, {len(versions)} versions,"
              f" median {median:.0f} ms, p99 {last:.0f} ms")  # fmt: skip
        return errors

    def known(self, folder: Path, tokens: int = 1) -> dict[str, Way]:
        """Leasing 8 adapters among many known ones, selecting their rows, and a decode step."""
        ids = np.random.default_rng(0).integers(0, 64, (self.given.rows, tokens))
        names = [f"user{i % min(8, self.given.rows)}" for i in range(self.given.rows)]
        ways: dict[str, Way] = {}
        for number in self.given.known:
            bank = jax.tree.map(jnp.copy, self.bank)
            pool = serving.AdapterPool(bank, self.base, {f"user{i}": folder for i in range(number)})

            def run(_: Any, pool: Any = pool) -> None:
                with pool.lease(names) as leased:
                    jax.block_until_ready(self.call(pool.select(leased), ids))

            ways[f"{number} known adapters"] = Way(run)
        return ways


def save_forever(adapters: Sequence[jaxadapt.Adapter], folder: str) -> None:
    while True:
        for adapter in adapters:
            jaxadapt.save(adapter, folder)


class Peft:
    """The same in PEFT."""

    def __init__(self, given: argparse.Namespace) -> None:
        import transformers
        from peft import LoraConfig, get_peft_model

        widths = sizes(given)
        config = transformers.LlamaConfig(
            vocab_size=widths["vocab_size"], hidden_size=widths["hidden_size"], num_hidden_layers=given.layers,
            intermediate_size=widths["intermediate_size"], num_attention_heads=widths["num_heads"],
            num_key_value_heads=widths["num_kv_heads"], use_cache=False,
        )  # fmt: skip
        fields = LoraConfig(r=RANK, target_modules=list(PROJECTIONS), init_lora_weights=False)
        self.given, self.names = given, [f"t{i}" for i in range(given.rows)]
        self.model = get_peft_model(transformers.LlamaForCausalLM(config), fields, adapter_name="t0").eval()
        for name in self.names[1:]:
            self.model.add_adapter(name, fields)

    def calls(self, tokens: int) -> dict[str, Way]:
        import torch

        ids = torch.from_numpy(np.random.default_rng(0).integers(0, 64, (self.given.rows, tokens)))

        def run(**options: Any) -> Any:
            with torch.no_grad():
                return self.model(ids, **options)

        def base(_: Any) -> Any:
            with self.model.disable_adapter():
                return run()

        ways = {f"PEFT, {BASE}": Way(base), f"PEFT, {SHARED}": Way(lambda _: run())}
        for count in counts(self.given):
            chosen = [self.names[i % count] for i in range(self.given.rows)]
            ways[f"PEFT, {count} adapters"] = Way(lambda _, chosen=chosen: run(adapter_names=chosen))
        return ways

    def swaps(self, folder: Path) -> dict[str, Way]:
        from peft.utils.hotswap import hotswap_adapter

        turns = iter(self.names * 1000)
        self.model.save_pretrained(str(folder), selected_adapters=["t0"])
        return {
            "PEFT, hotswap_adapter": Way(lambda _: hotswap_adapter(self.model, str(folder / "t0"), "t1")),
            "PEFT, set_adapter": Way(lambda _: self.model.set_adapter(next(turns))),
        }


def seconds(of: Times, given: argparse.Namespace) -> list[float]:
    return of.processor if given.busy else of.clock


def show(
    title: str, times: Mapping[str, Times], against: Mapping[str, str], given: argparse.Namespace
) -> dict[str, float]:
    """Print a table of medians, and return the median of each way's ratio to another, round by round."""
    ratios = {name: ratio(seconds(of, given), seconds(times[against[name]], given)) for name, of in times.items()}
    rows = [
        (name, *(f"{1e3 * statistics.median(x):.2f}" for x in (of.clock, of.processor)), f"{ratios[name]:.2f}",
         against[name])
        for name, of in times.items()
    ]  # fmt: skip
    print(table(f"### {title}", ("way", "median ms", "CPU ms", "ratio", "to"), rows))
    return ratios


def judge_calls(times: Mapping[str, Times], tokens: int, given: argparse.Namespace) -> list[str]:
    """Compare a call with its targets, print the limits, and return the missed targets."""
    most = seconds(times[f"bank, {given.rows} adapters"], given)
    base, reading, alone = (
        seconds(times[name], given) for name in (BASE, "reading the adapters once", "the adapters' products alone")
    )
    limits = {
        f"the {BASE} and reading the adapters' bytes": [a + b for a, b in zip(base, reading, strict=True)],
        f"JAX alone: the {BASE} and the adapters' products": [a + b for a, b in zip(base, alone, strict=True)],
    }
    found = {name: ratio(most, limit) for name, limit in limits.items()}
    print("\n" + "\n".join(f"- {given.rows} adapters ÷ ({name}): {x:.2f}" for name, x in found.items()))
    if tokens > 1:
        found = ratio(most, seconds(times[SHARED], given))
        return (
            []
            if found <= 1.05
            else [f"prefill of {tokens} tokens and {given.rows} adapters ≤ 1.05 × one shared adapter: {found:.2f}"]
        )
    first = next(iter(found.values()))
    return [] if first <= 1.15 else [f"decode of {given.rows} adapters ≤ 1.15 × its limit by bytes: {first:.2f}"]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--layers", type=int, default=6)
    options.add_argument("--rows", type=int, default=64)
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--prefill", type=int, nargs="+", default=[16], help="tokens a row")
    options.add_argument("--known", type=int, nargs="+", default=[10, 1000, 5000])
    options.add_argument("--leases", type=int, default=1000, help="beside a loop of saves")
    options.add_argument("--with-peft", action="store_true")
    options.add_argument("--busy", action="store_true", help="judge the processor's seconds, not the clock's")
    given = parsed(options, layers=1, rows=4, rounds=1, known=[5, 10], leases=5)
    print(environment("jax", "flax", "peft", "torch", "transformers"))
    missed: list[str] = []
    ours, peft = Ours(given), Peft(given) if given.with_peft and installed("peft") else None
    prefills = {f"prefill, {tokens} tokens a row": tokens for tokens in given.prefill}
    for title, tokens in {"decode, 1 token a row": 1, **prefills}.items():
        ways = ours.calls(tokens) | ({} if peft is None else peft.calls(tokens))
        times = interleave(ways, given.rounds)
        show(title, times, {n: f"PEFT, {SHARED}" if n.startswith("PEFT") else SHARED for n in ways}, given)
        missed += judge_calls(times, tokens, given)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "ours"
        jaxadapt.save(ours.adapters[0], folder)
        ways = ours.swaps(folder) | ({} if peft is None else peft.swaps(Path(root) / "peft"))
        times, first = interleave(ways, given.rounds), next(iter(ways))
        ratios = show("bringing in an adapter", times, dict.fromkeys(ways, first), given)
        if ratios["put, prepared"] > 1.3:
            missed.append(f"put ≤ 1.3 × the same copies in JAX alone: {ratios['put, prepared']:.2f}")
        if peft is not None:
            found = ratio(*(seconds(times[name], given) for name in ("put, prepared", "PEFT, hotswap_adapter")))
            if found > 0.3:
                missed.append(f"put ≤ 0.3 × PEFT's hotswap_adapter: {found:.2f}")
        ways = ours.known(folder)
        times, first = interleave(ways, 3 * given.rounds), next(iter(ways))
        ratios = show("lease, select and decode, 8 adapters", times, dict.fromkeys(ways, first), given)
        missed += [f"{name}: flat within 10 %: {x:.2f}" for name, x in ratios.items() if abs(x - 1) > 0.1]
        if errors := ours.beside_saves(folder):
            missed.append(f"leases beside a loop of saves: {len(errors)} failed, such as: {errors[0]}")
    judge(missed, given)


if __name__ == "__main__":
    main()
