"""DoRA on the projections of Flax's attention layers and on stacked experts, beside PEFT's on one `nn.Linear` each.

Where PEFT has no DoRA (an `nn.MultiheadAttention`, a parameter of `target_parameters`) both raise.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

pytest.importorskip("torch")
pytest.importorskip("peft")

import peft
import torch

import jaxadapt
from jaxadapt import KeyMap, Weight
from tests.support import peft_harness as harness
from tests.support.twins import trees

pytestmark = pytest.mark.peft

WIDTH, INNER, HEADS, EXPERTS = 8, 6, 2, 3
HEAD = WIDTH // HEADS
X = np.random.RandomState(0).standard_normal((2, 5, WIDTH)).astype("float32")
NAMES = {"query": "q", "key": "k", "value": "v"}
TABLE = KeyMap(
    "block",
    (
        *(Weight(f"attn.{ours}.kernel", f"attn.{name}.weight", "i n h -> (n h) i") for ours, name in NAMES.items()),
        *(Weight(f"attn.{ours}.bias", f"attn.{name}.bias", "n h -> (n h)") for ours, name in NAMES.items()),
        Weight("attn.out.kernel", "attn.o.weight", "n h o -> o (n h)"),
        Weight("attn.out.bias", "attn.o.bias", "o -> o"),
        Weight("up.kernel", "experts.{e}.up.weight", "{e} i o -> o i"),
        Weight("down.kernel", "experts.{e}.down.weight", "{e} i o -> o i"),
    ),
)
FIELDS: dict[str, Any] = {"r": 2, "lora_alpha": 3, "use_dora": True}
CASES: dict[str, dict[str, Any]] = {
    "attention": {**FIELDS, "target_modules": ["q", "k", "v", "o"], "use_rslora": True},
    "experts": {**FIELDS, "target_modules": ["up", "down"]},
    "some of each": {
        **FIELDS, "target_modules": r"attn\.(q|o)|experts\.(0|2)\.up|experts\.1\.down", "rank_pattern": {r"attn\.o": 3},
    },
}  # fmt: skip


class TorchAttention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (torch.nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Any) -> Any:
        q, k, v = (p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        return self.o(torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TorchExpert(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(WIDTH, INNER, bias=False)
        self.down = torch.nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: Any) -> Any:
        return self.down(torch.tanh(self.up(x)))


class TorchBlock(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = TorchAttention()
        self.experts = torch.nn.ModuleList([TorchExpert() for _ in range(EXPERTS)])

    def forward(self, x: Any) -> Any:
        x = x + self.attn(x)
        return x + sum(expert(x) for expert in self.experts)


class NnxBlock(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.attn = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.up = nnx.Einsum("btd,edf->ebtf", (EXPERTS, WIDTH, INNER), rngs=rngs)
        self.down = nnx.Einsum("ebtf,efd->ebtd", (EXPERTS, INNER, WIDTH), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attn(x)
        return x + self.down(jnp.tanh(self.up(x))).sum(0)


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + nn.MultiHeadDotProductAttention(HEADS, name="attn")(x)
        up = nn.Einsum((EXPERTS, WIDTH, INNER), "btd,edf->ebtf", use_bias=False, name="up")(x)
        return x + nn.Einsum((EXPERTS, INNER, WIDTH), "ebtf,efd->ebtd", use_bias=False, name="down")(jnp.tanh(up)).sum(
            0
        )


@functools.cache
def torch_block() -> Any:
    torch.manual_seed(3)
    return TorchBlock().eval()


def leaves() -> dict[str, np.ndarray]:
    """Return PyTorch's weights at our paths, by the rules of the two libraries, without the keymap."""
    state = {key: value.detach().numpy() for key, value in torch_block().state_dict().items()}
    out = {f"attn.{ours}.kernel": state[f"attn.{n}.weight"].T.reshape(WIDTH, HEADS, HEAD) for ours, n in NAMES.items()}
    out |= {f"attn.{ours}.bias": state[f"attn.{n}.bias"].reshape(HEADS, HEAD) for ours, n in NAMES.items()}
    out |= {
        "attn.out.kernel": state["attn.o.weight"].T.reshape(HEADS, HEAD, WIDTH),
        "attn.out.bias": state["attn.o.bias"],
    }
    for name in ("up", "down"):
        out[f"{name}.kernel"] = np.stack([state[f"experts.{e}.{name}.weight"].T for e in range(EXPERTS)])
    return out


class Twin:
    """Our block in one API, with an adapter: a configuration for a new one, or PEFT's folder."""

    def __init__(self, api: str, given: Any) -> None:
        base, fresh = trees.nest(leaves()), isinstance(given, jaxadapt.LoraConfig)
        if api == "nnx":
            model = NnxBlock()
            trees.fill(model, leaves())
            if fresh:
                jaxadapt.adapt(model, given, rngs=nnx.Rngs(0), keymap=TABLE)
            else:
                jaxadapt.load(given, model, keymap=TABLE)
            graph, self.held, rest = nnx.split(model, jaxadapt.AdapterParam, ...)
            self.tree: Any = lambda held: nnx.merge(graph, held, rest, copy=True)
            self.run: Any = lambda held, x: nnx.merge(graph, held, rest, copy=True)(x)
            return
        if fresh:
            held, config = jaxadapt.init(base, given, key=jax.random.key(0), keymap=TABLE).collection, given
        else:
            held, config = jaxadapt.load(given, {"params": base}, keymap=TABLE), jaxadapt.read_config(given)
        self.held = {name: x for name, x in held.items() if name != "params"}
        module: Any = jaxadapt.adapt(LinenBlock(), config, keymap=TABLE)
        self.tree = lambda held: {"params": base, **held}
        self.run = lambda held, x: module.apply({"params": base, **held}, x)

    def output(self) -> np.ndarray:
        return np.asarray(jax.jit(self.run)(self.held, X))

    def gradients(self) -> dict[str, np.ndarray]:
        """Return the gradients of the sum of squares of the output, at PEFT's keys."""
        found = jax.jit(jax.grad(lambda held: jnp.sum(jnp.square(self.run(held, X)))))(self.held)
        return {key: np.asarray(x) for key, x in jaxadapt.to_peft(self.tree(found)).tensors.items()}


def output(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(X)).numpy()


def close(found: Any, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * abs(wanted).max())


@pytest.mark.parametrize("api", ["nnx", "linen"])
@pytest.mark.parametrize("case", CASES)
def test_pefts_dora_gives_its_output_gradients_and_file(case, api, tmp_path):
    model = harness.make_peft(torch_block(), peft.LoraConfig(**copy.deepcopy(CASES[case])))
    harness.save(model, tmp_path / "peft")
    twin, want = Twin(api, tmp_path / "peft"), output(model)
    assert abs(want - output(torch_block())).max() > 0.1
    close(twin.output(), want)
    torch.sum(torch.square(model(torch.from_numpy(X)))).backward()
    named = {name.replace(".default", ""): p.grad for name, p in model.named_parameters() if p.grad is not None}
    theirs = {name.replace("_vector.weight", "_vector"): grad.numpy() for name, grad in named.items()}
    ours = twin.gradients()
    assert ours.keys() == theirs.keys()
    for key, grad in theirs.items():
        close(ours[key], grad)
    jaxadapt.save(twin.tree(twin.held), tmp_path / "ours")
    mine, file = (harness.read_tensors(tmp_path / who) for who in ("ours", "peft"))
    assert mine.keys() == file.keys()
    assert all(np.array_equal(mine[key], x) for key, x in file.items())
    assert harness.read_json(tmp_path / "ours") == harness.read_json(tmp_path / "peft")
    merged = jaxadapt.merge(trees.nest(leaves()), jaxadapt.extract(twin.tree(twin.held)))
    state = copy.deepcopy(model).merge_and_unload().state_dict()
    close(np.asarray(merged["up"]["kernel"])[2].T, state["experts.2.up.weight"].numpy())
    close(np.asarray(merged["attn"]["out"]["kernel"]).reshape(WIDTH, WIDTH).T, state["attn.o.weight"].numpy())
    close(np.asarray(LinenBlock().apply({"params": merged}, X)), want)


@pytest.mark.parametrize("api", ["nnx", "linen"])
@pytest.mark.parametrize("case", CASES)
def test_peft_opens_our_dora(case, api, tmp_path):
    twin = Twin(api, jaxadapt.LoraConfig(**CASES[case]))
    close(twin.output(), output(torch_block()))  # a new adapter changes nothing: its magnitudes are the norms
    for _ in range(3):  # training moves only what the configuration selects
        steps = jax.jit(jax.grad(lambda held: jnp.sum(jnp.square(twin.run(held, X)))))(twin.held)
        twin.held = jax.tree.map(lambda x, step: x - 0.1 * step / jnp.maximum(abs(step).max(), 1e-6), twin.held, steps)
    jaxadapt.save(twin.tree(twin.held), tmp_path, base_model="block")
    loaded = harness.load(torch_block(), tmp_path)
    assert loaded.complaints == []
    assert abs(twin.output() - output(torch_block())).max() > 0.1
    close(output(loaded.model), twin.output())


# ---- what PEFT refuses -----------------------------------------------------------------------------------


class TorchStack(torch.nn.Module):
    """Experts in one parameter, beside an attention layer with one tensor for queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = torch.nn.MultiheadAttention(WIDTH, HEADS)
        self.mlp = torch.nn.ParameterDict({"up": torch.nn.Parameter(torch.ones(EXPERTS, INNER, WIDTH))})


STACK = KeyMap(
    "stack", (*Weight.attention("attn", "attn"), Weight("mlp.up", "mlp.up", "e i o -> e o i", kind="experts"))
)
REFUSED = {
    "nn.MultiheadAttention": (
        {"target_modules": ["attn"]}, "does not support DoRA",
        "use_dora=True is not supported on an nn.MultiheadAttention: PEFT has no such adapter",
    ),
    "target_parameters": (
        {"target_modules": [], "target_parameters": ["mlp.up"]}, "does not work with use_dora=True",
        "use_dora=True cannot be combined with target_parameters",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_refuses_is_refused(case):
    fields, theirs, ours = REFUSED[case]
    with pytest.raises(ValueError, match=theirs):
        peft.get_peft_model(TorchStack(), peft.LoraConfig(**FIELDS, **copy.deepcopy(fields)))
    layer = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=nnx.Rngs(0))
    base = {"attn": nnx.to_pure_dict(nnx.state(layer, nnx.Param)), "mlp": {"up": jnp.ones((EXPERTS, WIDTH, INNER))}}
    with pytest.raises(jaxadapt.ConfigError, match=ours):
        jaxadapt.init(base, jaxadapt.LoraConfig(**FIELDS, **fields), keymap=STACK)
