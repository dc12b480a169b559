"""Adapters really trained with Qwix and Flax's own LoRA, opened by PEFT, and PEFT's put into their models."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("qwix")

import qwix

import jaxadapt
from jaxadapt.models import LoraTree
from tests.support import peft_harness as harness
from tests.support.twins import llama

pytestmark = [pytest.mark.peft, pytest.mark.usefixtures("foreign_model")]

IDS = np.random.RandomState(0).randint(0, 64, (2, 11))
CLOSE = 1e-5  # of the largest logit (about 3): float32 sums of the two libraries differ in their order
RANK, ALPHA = 4, 6.0
NAMES = ("q_proj", "o_proj", "down_proj")


@functools.cache
def torch_base() -> Any:
    return llama.torch_llama()


def close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=CLOSE * abs(np.asarray(expected)).max())


@dataclasses.dataclass
class Theirs:
    """A model with another library's LoRA: its tree, how it runs, and which leaves of the tree are trained."""

    tree: Any
    logits: Callable[[Any], Any]
    told: dict[str, Any]

    def train(self, steps: int = 3) -> None:
        """A few steps of Adam on the LoRA leaves alone."""
        if isinstance(self.tree, nnx.Module):
            optimizer = nnx.Optimizer(self.tree, optax.adam(0.05), wrt=nnx.LoRAParam)
            gradient = nnx.jit(
                nnx.grad(
                    lambda m: -jax.nn.log_softmax(self.logits(m))[..., 3].mean(),
                    argnums=nnx.DiffState(0, nnx.LoRAParam),
                )
            )
            for _ in range(steps):
                optimizer.update(self.tree, gradient(self.tree))
            return
        mask = jax.tree_util.tree_map_with_path(lambda path, _: "lora" in str(path[-1]), self.tree)
        optimizer = optax.multi_transform({True: optax.adam(0.05), False: optax.set_to_zero()}, mask)
        state = optimizer.init(self.tree)
        gradient = jax.jit(jax.grad(lambda tree: -jax.nn.log_softmax(self.logits(tree))[..., 3].mean()))
        for _ in range(steps):
            updates, state = optimizer.update(gradient(self.tree), state)
            self.tree = optax.apply_updates(self.tree, updates)


def provider() -> Any:
    return qwix.LoraProvider(module_path=f".*({'|'.join(NAMES)})", rank=RANK, alpha=ALPHA)


@nnx.jit
def run_nnx(model: nnx.Module) -> Any:
    return model(jnp.asarray(IDS))


def qwix_nnx() -> Theirs:
    model = qwix.apply_lora_to_model(llama.twin_of(torch_base()), provider(), jnp.asarray(IDS), rngs=nnx.Rngs(1))
    return Theirs(model, run_nnx, {"lora_alpha": ALPHA})


def qwix_linen(axis: int) -> Theirs:
    module, base = llama.twin_of(torch_base(), "linen", scan=True, scan_axis=axis)
    module = qwix.apply_lora_to_model(module, provider())
    fresh = module.init(jax.random.key(1), jnp.asarray(IDS))
    known = dict(jax.tree_util.tree_leaves_with_path(base))
    tree = jax.tree_util.tree_map_with_path(lambda path, leaf: known.get(path, leaf), fresh)
    return Theirs(tree, jax.jit(lambda variables: module.apply(variables, jnp.asarray(IDS))), {"lora_alpha": ALPHA})


def flax_lora(kind: str) -> Theirs:
    model = llama.twin_of(torch_base())
    for path, module in list(nnx.iter_graph(model)):
        for name in NAMES:
            if isinstance(module, nnx.Module) and name in vars(module):
                linear = vars(module)[name]
                inputs, out = linear.kernel.shape
                if kind == "wrapper":
                    new: Any = nnx.LoRA(inputs, RANK, out, base_module=linear, rngs=nnx.Rngs(len(path)))
                else:
                    new = nnx.LoRALinear(inputs, out, lora_rank=RANK, use_bias=False, rngs=nnx.Rngs(len(path)))
                    new.kernel.set_value(linear.kernel.get_value())
                setattr(module, name, new)
    return Theirs(model, run_nnx, {})


KINDS: dict[str, Callable[[], Theirs]] = {
    "qwix-nnx": qwix_nnx,
    "qwix-linen-scan1": lambda: qwix_linen(1),
    "nnx.LoRA": lambda: flax_lora("wrapper"),
    "nnx.LoRALinear": lambda: flax_lora("LoRALinear"),
}
each = pytest.mark.parametrize("kind", KINDS)


@each
def test_peft_opens_what_they_trained(kind: str, tmp_path):
    """Scaled once, no head lost or moved, every key in its place, target_modules named: the outputs are theirs."""
    theirs = KINDS[kind]()
    before = np.asarray(theirs.logits(theirs.tree))
    theirs.train()
    expected = np.asarray(theirs.logits(theirs.tree))
    assert abs(expected - before).max() > 0.1  # it learnt something
    jaxadapt.save(LoraTree(theirs.tree, **theirs.told), tmp_path)
    config = jaxadapt.read_config(tmp_path)
    assert set(config.target_modules) == set(NAMES)
    assert config.lora_alpha == (ALPHA if theirs.told else RANK)
    loaded = harness.load(torch_base(), tmp_path)
    assert not loaded.complaints
    close(harness.logits(loaded.model, IDS), expected)


@functools.cache
def peft_model(alpha: float) -> Any:
    settings = {"r": RANK, "lora_alpha": alpha, "target_modules": list(NAMES), "task_type": "CAUSAL_LM"}
    return harness.make_peft(torch_base(), harness.LoraConfig(**settings))


@pytest.mark.parametrize(("kind", "alpha"), [*((kind, ALPHA) for kind in KINDS), ("qwix-nnx", 2 * ALPHA)])
def test_they_run_what_peft_trained(kind: str, alpha: float, tmp_path):
    model = peft_model(alpha)
    harness.save(model, tmp_path)
    theirs = KINDS[kind]()
    rounds = not theirs.told  # what does not scale has 1.5 and 3 multiplied into B
    if rounds:
        with pytest.warns(UserWarning, match="rounded once"):
            tree = jaxadapt.load(tmp_path, LoraTree(theirs.tree, **theirs.told))
    else:
        tree = jaxadapt.load(tmp_path, LoraTree(theirs.tree, **theirs.told))
    assert (tree is theirs.tree) == isinstance(tree, nnx.Module)
    close(theirs.logits(tree), harness.logits(model, IDS))


@pytest.mark.parametrize("kind", ["qwix-nnx", "nnx.LoRA", "qwix-linen-scan1"])
def test_a_state_of_the_lora_leaves_will_do(kind: str, tmp_path):
    """What their users keep of a model: `nnx.state(model, nnx.LoRAParam)`, or the LoRA leaves of `params`."""
    theirs = KINDS[kind]()
    jaxadapt.save(LoraTree(theirs.tree, **theirs.told), tmp_path / "whole")
    if isinstance(theirs.tree, nnx.Module):
        part: Any = nnx.state(theirs.tree, nnx.LoRAParam)
    else:
        leaves = jax.tree_util.tree_leaves_with_path(theirs.tree["params"])
        part = {".".join(k.key for k in path): x for path, x in leaves if "lora" in path[-1].key}
    keymap = "llama" if "scan" not in kind else f"llama/{kind[-5:]}"
    jaxadapt.save(LoraTree(part, **theirs.told), tmp_path / "part", keymap=keymap)
    whole, some = (jaxadapt.read(tmp_path / name).tensors for name in ("whole", "part"))
    assert set(whole) == set(some)
    for key, x in whole.items():
        np.testing.assert_array_equal(x, some[key])
    if isinstance(theirs.tree, nnx.Module):
        fresh = KINDS[kind]()
        jaxadapt.load(tmp_path / "whole", LoraTree(nnx.state(fresh.tree, nnx.LoRAParam), **theirs.told), keymap=keymap)
        close(fresh.logits(fresh.tree), theirs.logits(theirs.tree))
