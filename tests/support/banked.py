"""Adapters of several kinds on the blocks of `meshes`, as PEFT's tensors, and what each computes, in numpy."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jaxadapt
from jaxadapt import serving
from tests.support import meshes
from tests.support.meshes import HEAD, HEADS, LAYERS, LinenBlock

NAMES = ("q", "o", "up", "down")
SIZES = {"q": (16, 16), "o": (16, 16), "up": (16, 32), "down": (32, 16)}  # in, out
KINDS = ("lora", "rslora", "bias", "dora", "ia3")
MAX_RANK = 4
ROWS, TIME = 5, 3
FEEDFORWARD = ["down"]


@dataclasses.dataclass(frozen=True)
class Given:
    """One adapter: its kind, rank, alpha and targets, and another rank and alpha for the second layer."""

    kind: str
    r: int
    alpha: int
    targets: tuple[str, ...]
    pattern: tuple[int, int] | None = None
    seed: int = 0

    @property
    def config(self) -> jaxadapt.Config:
        targets = list(self.targets)
        if self.kind == "ia3":
            return jaxadapt.IA3Config(
                target_modules=targets, feedforward_modules=[n for n in targets if n in FEEDFORWARD]
            )
        ranks, alphas = ({}, {}) if self.pattern is None else ({"h.1.up": self.pattern[0]}, {"h.1.up": self.pattern[1]})
        return jaxadapt.LoraConfig(
            r=self.r, lora_alpha=self.alpha, target_modules=targets, use_rslora=self.kind == "rslora",
            use_dora=self.kind == "dora", lora_bias=self.kind == "bias", rank_pattern=ranks, alpha_pattern=alphas,
        )  # fmt: skip

    def _own(self, layer: int, name: str) -> tuple[int, float]:
        """The rank and the scale of one module."""
        r, alpha = (self.r, self.alpha) if self.pattern is None or (layer, name) != (1, "up") else self.pattern
        return r, alpha / (math.sqrt(r) if self.kind == "rslora" else r)

    @functools.cached_property
    def tensors(self) -> dict[tuple[int, str], dict[str, np.ndarray]]:
        """The file's tensors of each module."""
        rng = np.random.default_rng(self.seed)

        def draw(*shape: int) -> np.ndarray:
            return (rng.standard_normal(shape) / 2).astype("f4")

        found: dict[tuple[int, str], dict[str, np.ndarray]] = {}
        for layer in range(LAYERS):
            for name in self.targets:
                inn, out = SIZES[name]
                if self.kind == "ia3":
                    found[layer, name] = {"ia3_l": 1 + (draw(1, inn) if name in FEEDFORWARD else draw(out, 1))}
                    continue
                r, _ = self._own(layer, name)
                tensors = {"lora_A.weight": draw(r, inn), "lora_B.weight": draw(out, r)}
                tensors |= {"lora_B.bias": draw(out)} if self.kind == "bias" else {}
                tensors |= {"lora_magnitude_vector": 1 + np.abs(draw(out))} if self.kind == "dora" else {}
                found[layer, name] = tensors
        return found

    def peft(self) -> jaxadapt.PeftTensors:
        return jaxadapt.PeftTensors(
            self.config,
            {
                f"base_model.model.h.{layer}.{name}.{tensor}": x
                for (layer, name), tensors in self.tensors.items()
                for tensor, x in tensors.items()
            },
        )

    def adapter(self, scanned: bool) -> jaxadapt.Adapter:
        return jaxadapt.from_peft(self.peft(), meshes.base(scanned), keymap=meshes.table(scanned))

    def linear(self, layer: int, name: str, x: np.ndarray, w: np.ndarray, b: np.ndarray) -> np.ndarray:
        """The adapted module by the papers' formulas; w is (in, out)."""
        own = self.tensors.get((layer, name))
        if own is None:
            return x @ w + b
        if self.kind == "ia3":
            vector = own["ia3_l"].ravel()
            return (x * vector) @ w + b if name in FEEDFORWARD else (x @ w + b) * vector
        scale = self._own(layer, name)[1]
        change = scale * own["lora_A.weight"].T @ own["lora_B.weight"].T
        if self.kind == "dora":
            new = w + change
            return x @ (new * own["lora_magnitude_vector"] / np.sqrt((new**2).sum(0))) + b
        return x @ (w + change) + b + (scale * own["lora_B.bias"] if self.kind == "bias" else 0)


def params(scanned: bool) -> dict[str, Any]:
    """The parameters of `meshes.base` with biases that are not zero."""

    def fill(path: Any, x: Any) -> Any:
        if path[-1].key != "bias":
            return x
        last = x.shape[1:] if scanned else x.shape
        values = np.linspace(-1, 1, int(np.prod(last)), dtype="f4").reshape(last)
        return np.broadcast_to(values, x.shape).copy()

    return jax.tree_util.tree_map_with_path(fill, meshes.base(scanned))


BASE = Given("lora", 1, 1, ())


def alone(given: Given, x: np.ndarray) -> np.ndarray:
    """The output of the whole model with one adapter, in float64."""
    x = x.astype("f8")
    blocks = params(False)["blocks"]
    for layer in range(LAYERS):
        leaves = blocks[str(layer)].items()
        own = {n: (p["kernel"].reshape(SIZES[n]).astype("f8"), p["bias"].ravel()) for n, p in leaves}
        h = np.tanh(given.linear(layer, "q", x, *own["q"]))
        x = x + given.linear(layer, "o", h, *own["o"])
        h = np.tanh(given.linear(layer, "up", x, *own["up"]))
        x = x + given.linear(layer, "down", h, *own["down"])
    return x


assert SIZES["q"][1] == HEADS * HEAD


class _Step(LinenBlock):
    def __call__(self, x: Any, _: Any = None) -> Any:
        return super().__call__(x), None


class _Unrolled(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        for i in range(LAYERS):
            x = LinenBlock(name=str(i))(x)
        return x


class LinenBlocks(nn.Module):
    """As `meshes.Blocks`."""

    scanned: bool

    @nn.compact
    def __call__(self, x: Any) -> Any:
        if not self.scanned:
            return _Unrolled(name="blocks")(x)
        step = nn.scan(_Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
        return step(name="blocks")(x, None)[0]


def create(base: Any, scanned: bool, slots: int = 6, configs: Any = None) -> serving.Bank:
    """An empty bank with room for every kind of `Given`, or for these."""
    if configs is not None:
        return serving.create(base, configs, slots=slots, keymap=meshes.table(scanned))
    targets = list(NAMES)
    lora = jaxadapt.LoraConfig(r=MAX_RANK, target_modules=targets)
    configs = [
        lora,
        lora.replace(use_dora=True),
        lora.replace(lora_bias=True),
        jaxadapt.IA3Config(target_modules=targets, feedforward_modules=FEEDFORWARD),
    ]
    return serving.create(base, configs, slots=slots, keymap=meshes.table(scanned))


@dataclasses.dataclass
class Served:
    """A banked model with its compiled step."""

    api: str
    scanned: bool
    slots: int = 6
    configs: Any = None

    def __post_init__(self) -> None:
        base = params(self.scanned)
        if self.api == "nnx":
            from flax import nnx

            model = meshes.model(base, self.scanned)
            self.base: Any = model
            self.bank = create(model, self.scanned, self.slots, self.configs)
            serving.attach(model, self.bank)
            graphdef, state = nnx.split(model)

            def step(state: Any, rows: Any, x: Any) -> Any:
                with serving.route(nnx.merge(graphdef, state), rows) as routed:
                    return routed(x)
        else:
            state = self.base = {"params": base}
            self.bank = create(state, self.scanned, self.slots, self.configs)
            module = serving.attach(LinenBlocks(self.scanned), self.bank)

            def step(state: Any, rows: Any, x: Any) -> Any:
                with serving.route(module, rows) as routed:
                    return routed.apply(state, x)

        self.step = jax.jit(step)
        self.state = state

    def put(self, slot: int, adapter: Any) -> None:
        self.bank = serving.put(self.bank, slot, adapter, self.base)

    def __call__(self, ids: Any, x: np.ndarray, rows: Any = None) -> np.ndarray:
        rows = self.bank.select(np.asarray(ids, np.int32)) if rows is None else rows
        return np.asarray(self.step(self.state, rows, jnp.asarray(x)))


@functools.cache
def served(api: str, scanned: bool) -> Served:
    return Served(api, scanned)


INPUT = np.random.default_rng(3).standard_normal((ROWS, TIME, meshes.D)).astype("f4")


def check_rows(served: Served, adapters: list[Given], ids: list[int]) -> None:
    """Each row is as with its adapter alone; a row whose id is no slot is NaN.

    float32 over eight products and their nonlinearities, beside float64: the worst cases that a search finds differ by
    3e-5 of the largest value.
    """
    for slot, given in enumerate(adapters, 1):
        served.put(slot, given.adapter(served.scanned))
    y = served(ids, INPUT)
    for row, slot in enumerate(ids):
        if not 0 <= slot < served.slots:
            assert np.isnan(y[row]).all()
            continue
        want = alone(adapters[slot - 1] if 0 < slot <= len(adapters) else BASE, INPUT[row])
        np.testing.assert_allclose(y[row], want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
