"""Qwix's LoRA on arrays of all experts as PEFT's `target_parameters`, both ways; what it computes is by hand."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxadapt
from jaxadapt import families, paths, pieces, plan
from tests.families import core
from tests.families.specimens import BY_NAME, recorded

R, ALPHA, E = 2, 4.0, 4
# Gate and up in one leaf, in two, in turns, and stacked; {l} is a layer.
TREES = {
    "mixtral": ("model.layers.{l}.mlp.experts.", ("gate_up_proj",), "down_proj", None),
    "maxtext-mixtral": ("decoder.layers_{l}.MoeBlock_0.", ("wi_0", "wi_1"), "wo", None),
    "maxtext-gpt_oss": ("decoder.layers_{l}.GptOssMlp.", ("wi_0", "wi_1"), "wo", None),
    "maxtext-qwen3_moe-scan1": ("decoder.layers.moe_block.", ("wi_0", "wi_1"), "wo", 1),
}
each = pytest.mark.parametrize("name", TREES)
shared_b = pytest.mark.parametrize("shared", [False, True], ids=["own B", "one B"])


@functools.cache
def base(name: str) -> dict[str, np.ndarray]:
    if name == "mixtral":
        d, f = 16, 24
        experts = {"gate_up_proj": (E, d, 2 * f), "down_proj": (E, f, d)}
        shapes = {f"model.layers.{i}.mlp.experts.{p}": s for i in range(3) for p, s in experts.items()}
        shapes |= {f"model.layers.{i}.mlp.gate.kernel": (d, E) for i in range(3)}
        return core.base_leaves(BY_NAME[name], shapes)
    return core.base_leaves(BY_NAME[name], recorded(name)["leaves"])


def experts_of(name: str) -> list[str]:
    at, wide, down, stack = TREES[name]
    return [at.format(l=i) + leaf for leaf in (*wide, down) for i in ([0] if stack is not None else range(3))]


def tree(name: str, shared: bool, seed: int = 0, equal: bool = False) -> dict[str, Any]:
    """`equal`: gate's A is up's, as a file of PEFT's has it."""
    rng = np.random.default_rng(seed)
    out: dict[str, Any] = dict(base(name))
    stack = TREES[name][3]
    for leaf in experts_of(name):
        shape = list(out[leaf].shape)
        layers = [shape.pop(stack)] if stack is not None else []
        for side, own in (("a", (E, shape[1], R)), ("b", (R, shape[2]) if shared else (E, R, shape[2]))):
            dims = list(own)
            if layers:
                dims[stack:stack] = layers
            out[f"{leaf}_lora_{side}"] = rng.standard_normal(dims).astype("float32")
        if equal and leaf.endswith("wi_1"):
            out[f"{leaf}_lora_a"] = out[f"{leaf.replace('wi_1', 'wi_0')}_lora_a"]
    return paths.unflatten(out)


def merged(name: str, shared: bool, **how: Any) -> dict[str, np.ndarray]:
    """The base with what Qwix's leaves compute, in the model's layout."""
    flat, stack = paths.flatten(tree(name, shared, **how)), TREES[name][3]
    out = dict(base(name))
    for leaf in experts_of(name):
        a, b = flat[f"{leaf}_lora_a"], flat[f"{leaf}_lora_b"]
        one = functools.partial(np.einsum, "edr,rf->edf" if shared else "edr,erf->edf")
        if stack is None:
            delta = one(a, b)
        else:
            delta = np.stack([one(np.take(a, i, stack), np.take(b, i, stack)) for i in range(3)], stack)
        out[leaf] = out[leaf] + ALPHA / R * delta
    return out


def in_torch(name: str, leaves: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    made = plan.base_plan(families.named(BY_NAME[name].table), {path: x.shape for path, x in leaves.items()})
    back, groups = made.encode(leaves), pieces.groups(made.keys).items()
    return {key: pieces.together([back[part] for part in parts], parts, np) for key, parts in groups}


def computed(held: jaxadapt.PeftTensors, name: str) -> dict[str, np.ndarray]:
    """`{parameter: s·B·A}` as PEFT computes it from a file: A's rows are expert-major, B's columns rank-major."""
    out: dict[str, np.ndarray] = {}
    config, found = held.config, {key: np.asarray(x) for key, x in held.tensors.items()}
    for i in range(3):
        for depth, parameter in ((".base_layer", "gate_up_proj"), ("", "down_proj")):
            at = f"base_model.model.model.layers.{i}.mlp.experts{depth}.lora_"
            r = config.get("rank_pattern").get(parameter, config.get("r"))
            alpha = config.get("alpha_pattern").get(parameter, config.get("lora_alpha"))
            a, b = found[f"{at}A.weight"], found[f"{at}B.weight"]
            delta = np.einsum("oke,eki->eoi", b.reshape(len(b), r, E), a.reshape(E, r, -1)) * alpha / r
            turned = "gpt_oss" in name
            out[f"model.layers.{i}.mlp.experts.{parameter}"] = delta.transpose(0, 2, 1) if turned else delta
    assert len(found) == 12
    return out


@each
@shared_b
def test_out(name, shared):
    concat = "concat" if name != "mixtral" else None
    table = BY_NAME[name].table
    if concat:
        with pytest.raises(jaxadapt.MismatchError, match=r'(?s)gate_up_proj.*on_shared="concat" to to_peft'):
            jaxadapt.to_peft(tree(name, shared), keymap=table, lora_alpha=ALPHA)
    held = jaxadapt.to_peft(tree(name, shared), keymap=table, lora_alpha=ALPHA, on_shared=concat)
    assert held.config.get("target_modules") in (None, (), [])
    assert set(held.config.get("target_parameters")) == {"experts.gate_up_proj", "experts.down_proj"}
    before, after = in_torch(name, base(name)), in_torch(name, merged(name, shared))
    for key, delta in computed(held, name).items():
        np.testing.assert_allclose(before[key] + delta, after[key], rtol=0, atol=2e-5, err_msg=key)


@each
@shared_b
def test_as_an_adapter_of_ours(name, shared):
    adapter = jaxadapt.extract(tree(name, shared), keymap=BY_NAME[name].table, lora_alpha=ALPHA)
    found = paths.flatten(jaxadapt.merge(paths.unflatten(base(name)), adapter))
    for leaf, x in merged(name, shared).items():
        np.testing.assert_allclose(found[leaf], x, rtol=0, atol=2e-5, err_msg=leaf)


@each
@shared_b
def test_file_and_back(name, shared, tmp_path):
    """Into a tree of other values."""
    table, mine = BY_NAME[name].table, tree(name, shared, equal=True)
    jaxadapt.save(mine, tmp_path, keymap=table, lora_alpha=ALPHA)
    back = jaxadapt.load(tmp_path, tree(name, shared, seed=1), keymap=table, lora_alpha=ALPHA)
    for path, x in paths.flatten(mine).items():
        np.testing.assert_array_equal(paths.flatten(back)[path], x, err_msg=path)


def test_with_a_lora_for_each_expert():
    mine = tree("maxtext-mixtral", False)
    held = jaxadapt.to_peft(mine, keymap="maxtext:mixtral/per-expert", lora_alpha=ALPHA)
    flat = paths.flatten(mine)
    key = "base_model.model.model.layers.1.block_sparse_moe.experts.3.w3.lora_A.weight"
    np.testing.assert_array_equal(held.tensors[key], flat["decoder.layers_1.MoeBlock_0.wi_1_lora_a"][3].T)
    assert len(held.tensors) == 3 * 3 * E * 2
    back = jaxadapt.from_peft(held, paths.unflatten(base("maxtext-mixtral")), keymap="maxtext:mixtral")
    again = jaxadapt.inject(back, tree("maxtext-mixtral", False, seed=1), lora_alpha=ALPHA)
    for path, x in flat.items():
        np.testing.assert_array_equal(paths.flatten(again)[path], x, err_msg=path)


def test_qwix_itself(foreign_model):
    """A layer that Qwix adapts, einsum over experts: its output is that of the merged weights of our file."""
    qwix = pytest.importorskip("qwix")
    from flax import nnx

    class Experts(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.up = nnx.Param(jax.random.normal(rngs.params(), (E, 3, 5)))

        def __call__(self, x: Any) -> Any:
            return jnp.einsum("ebd,edf->ebf", x, self.up[...])

    x = jax.random.normal(jax.random.key(1), (E, 2, 3))
    provider = qwix.LoraProvider(module_path=".*", rank=R, alpha=ALPHA)
    model = qwix.apply_lora_to_model(Experts(nnx.Rngs(0)), provider, x, rngs=nnx.Rngs(1))
    rng = np.random.default_rng(0)
    for _, var in nnx.iter_graph(model):
        if isinstance(var, nnx.LoRAParam):
            var.set_value(jnp.asarray(rng.standard_normal(var.shape), "float32"))
    line = jaxadapt.Weight("up", "experts.up", "e d f -> e f d", kind="experts")
    table = jaxadapt.KeyMap("mine", (line,))
    held = jaxadapt.to_peft(model, keymap=table, lora_alpha=ALPHA)
    a, b = (np.asarray(held.tensors[f"base_model.model.experts.lora_{s}.weight"]) for s in "AB")
    assert (a.shape, b.shape) == ((E * R, 3), (5, R * E))
    delta = np.einsum("oke,eki->eio", b.reshape(5, R, E), a.reshape(E, R, 3)) * ALPHA / R
    plain = np.asarray(Experts(nnx.Rngs(0)).up[...])
    np.testing.assert_allclose(model(x), np.einsum("ebd,edf->ebf", x, plain + delta), rtol=0, atol=1e-4)
