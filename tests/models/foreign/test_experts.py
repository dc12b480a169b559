"""Qwix's LoRA on arrays of all experts as PEFT's `target_parameters`, both ways; what it computes is by hand."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxadapt
from jaxadapt.core import paths
from jaxadapt.export.conversion import TreeOptions, convert
from jaxadapt.keymaps import families, plan
from jaxadapt.keymaps import plan as pieces
from jaxadapt.models import LoraTree
from tests.keymaps.families import specimen_arrays
from tests.keymaps.families.specimens import BY_NAME, recorded

R, ALPHA, E = 2, 4.0, 4
# Gate and up in one leaf, in two, in turns, and stacked; {l} is a layer.
TREES = {
    "mixtral": ("model.layers.{l}.mlp.experts.", ("gate_up_proj",), "down_proj", None),
    "llama4": ("model.layers.{l}.feed_forward.experts.", ("gate_up_proj",), "down_proj", None),  # (in, out) in PEFT too
    "maxtext-mixtral": ("decoder.layers_{l}.MoeBlock_0.", ("wi_0", "wi_1"), "wo", None),
    "maxtext-gpt_oss": ("decoder.layers_{l}.GptOssMlp.", ("wi_0", "wi_1"), "wo", None),
    "maxtext-qwen3_moe-scan1": ("decoder.layers.moe_block.", ("wi_0", "wi_1"), "wo", 1),
    "maxtext-llama4-scout": ("decoder.layers_{l}.Llama4MoEBlock_0.MoeBlock_0.", ("wi_0", "wi_1"), "wo", None),
}
each = pytest.mark.parametrize("name", TREES)
shared_b = pytest.mark.parametrize("shared", [False, True], ids=["own B", "one B"])


@functools.cache
def base(name: str) -> dict[str, np.ndarray]:
    if name in ("mixtral", "llama4"):
        d, f = 16, 24
        experts = {"gate_up_proj": (E, d, 2 * f), "down_proj": (E, f, d)}
        at = TREES[name][0]
        shapes = {at.format(l=i) + p: s for i in range(3) for p, s in experts.items()}
        router = at.replace("experts", "gate" if name == "mixtral" else "router") + "kernel"
        shapes |= {router.format(l=i): (d, E) for i in range(3)}
        return specimen_arrays.base_leaves(BY_NAME[name], shapes)
    return specimen_arrays.base_leaves(BY_NAME[name], recorded(name)["leaves"])


def experts_of(name: str) -> list[str]:
    at, wide, down, stack = TREES[name]
    return [at.format(l=i) + leaf for leaf in (*wide, down) for i in ([0] if stack is not None else layers_of(name))]


def layers_of(name: str) -> range:
    return range(4 if name == "maxtext-llama4-scout" else 3)


def tree(name: str, shared: bool, seed: int = 0, equal: bool = False) -> dict[str, Any]:
    """`equal`: gate's A is up's, as a file of PEFT's has it (Llama 4's: its one B, which reads the other way)."""
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
    made = plan.base_plan(families.get_family(BY_NAME[name].table), {path: x.shape for path, x in leaves.items()})
    back, groups = made.encode(leaves), pieces.group_by_file_key(made.keys).items()
    return {key: pieces.join_parts([back[part] for part in parts], parts, np) for key, parts in groups}


def computed(held: jaxadapt.PeftTensors, name: str) -> dict[str, np.ndarray]:
    """`{parameter: s·B·A}` as PEFT computes it from a file: A's rows are expert-major, B's columns rank-major."""
    out: dict[str, np.ndarray] = {}
    config, found = held.config, {key: np.asarray(x) for key, x in held.tensors.items()}
    block = "feed_forward" if "llama4" in name else "mlp"
    for i in layers_of(name):
        for depth, parameter in ((".base_layer", "gate_up_proj"), ("", "down_proj")):
            at = f"base_model.model.model.layers.{i}.{block}.experts{depth}.lora_"
            r = config.get("rank_pattern").get(parameter, config.get("r"))
            alpha = config.get("alpha_pattern").get(parameter, config.get("lora_alpha"))
            a, b = found[f"{at}A.weight"], found[f"{at}B.weight"]
            delta = np.einsum("oke,eki->eoi", b.reshape(len(b), r, E), a.reshape(E, r, -1)) * alpha / r
            turned = "gpt_oss" in name
            out[f"model.layers.{i}.{block}.experts.{parameter}"] = delta.transpose(0, 2, 1) if turned else delta
    assert len(found) == 4 * len(layers_of(name))
    return out


@each
@shared_b
def test_out(name, shared):
    concat = None if len(TREES[name][1]) == 1 else "concat"
    table = BY_NAME[name].table
    if concat:
        with pytest.raises(jaxadapt.MismatchError, match=r'(?s)gate_up_proj.*on_shared="concat"'):
            jaxadapt.to_peft(LoraTree(tree(name, shared), lora_alpha=ALPHA), keymap=table)
    held = jaxadapt.to_peft(LoraTree(tree(name, shared), lora_alpha=ALPHA, on_shared=concat), keymap=table)
    assert held.config.get("target_modules") in (None, (), [])
    assert set(held.config.get("target_parameters")) == {"experts.gate_up_proj", "experts.down_proj"}
    before, after = in_torch(name, base(name)), in_torch(name, merged(name, shared))
    for key, delta in computed(held, name).items():
        np.testing.assert_allclose(before[key] + delta, after[key], rtol=0, atol=2e-5, err_msg=key)


def test_untrained_gate_and_up_of_llama4_share_no_b():
    """Both Bs of Qwix are zero, so PEFT's As are equal; PEFT's B is Qwix's A, and these differ."""
    leaves = paths.flatten(tree("maxtext-llama4-scout", False))
    untrained = paths.unflatten({path: x * (not path.endswith("_lora_b")) for path, x in leaves.items()})
    with pytest.raises(jaxadapt.MismatchError, match=r'(?s)gate_up_proj.*two Bs.*on_shared="concat"'):
        jaxadapt.to_peft(LoraTree(untrained, lora_alpha=ALPHA), keymap="maxtext:llama4")
    held = jaxadapt.to_peft(LoraTree(untrained, lora_alpha=ALPHA, on_shared="concat"), keymap="maxtext:llama4")
    assert not any(np.any(delta) for delta in computed(held, "maxtext-llama4-scout").values())


@each
@shared_b
def test_as_an_adapter_of_ours(name, shared):
    adapter = jaxadapt.extract(LoraTree(tree(name, shared), lora_alpha=ALPHA), keymap=BY_NAME[name].table)
    found = paths.flatten(jaxadapt.merge(paths.unflatten(base(name)), adapter))
    for leaf, x in merged(name, shared).items():
        np.testing.assert_allclose(found[leaf], x, rtol=0, atol=2e-5, err_msg=leaf)


@each
@shared_b
def test_file_and_back(name, shared, tmp_path):
    """Into a tree of other values."""
    table, mine = BY_NAME[name].table, tree(name, shared, equal=True)
    jaxadapt.save(LoraTree(mine, lora_alpha=ALPHA), tmp_path, keymap=table)
    back = jaxadapt.load(tmp_path, LoraTree(tree(name, shared, seed=1), lora_alpha=ALPHA), keymap=table)
    for path, x in paths.flatten(mine).items():
        np.testing.assert_array_equal(paths.flatten(back)[path], x, err_msg=path)


def test_with_a_lora_for_each_expert():
    mine = tree("maxtext-mixtral", False)
    held = jaxadapt.to_peft(LoraTree(mine, lora_alpha=ALPHA), keymap="maxtext:mixtral/per-expert")
    flat = paths.flatten(mine)
    key = "base_model.model.model.layers.1.block_sparse_moe.experts.3.w3.lora_A.weight"
    np.testing.assert_array_equal(held.tensors[key], flat["decoder.layers_1.MoeBlock_0.wi_1_lora_a"][3].T)
    assert len(held.tensors) == 3 * 3 * E * 2
    back = jaxadapt.from_peft(held, paths.unflatten(base("maxtext-mixtral")), keymap="maxtext:mixtral")
    again = jaxadapt.inject(LoraTree(tree("maxtext-mixtral", False, seed=1), lora_alpha=ALPHA), back)
    for path, x in flat.items():
        np.testing.assert_array_equal(paths.flatten(again)[path], x, err_msg=path)


def lora_of(tree: Any) -> dict[str, np.ndarray]:
    return {path: np.ascontiguousarray(x) for path, x in paths.flatten(tree).items() if "_lora_" in path}


@pytest.mark.parametrize("name", [name for name in TREES if name != "maxtext-gpt_oss"])
def test_files_alone(name, tmp_path):
    """`convert`: a tree's file to a folder as `save` writes it, and back; and with a LoRA for each expert."""
    table, mine = BY_NAME[name].table, tree(name, False, equal=True)
    save_file(lora_of(mine), tmp_path / "a.safetensors")
    save_file({path: np.ascontiguousarray(x) for path, x in base(name).items()}, tmp_path / "base.safetensors")
    like = tmp_path / "base.safetensors"
    convert(tmp_path / "a.safetensors", tmp_path / "b", TreeOptions(from_keymap=table, lora_alpha=ALPHA, like=like))
    jaxadapt.save(LoraTree(mine, lora_alpha=ALPHA), tmp_path / "saved", keymap=table)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "b" / file).read_bytes() == (tmp_path / "saved" / file).read_bytes()
    done = convert(tmp_path / "b", tmp_path / "c.safetensors", TreeOptions(to_keymap=table, dialect="qwix", like=like))
    assert (done.rank, done.lora_alpha) == (R, ALPHA)
    back = load_file(tmp_path / "c.safetensors")
    assert set(back) == set(lora_of(mine))
    for path, x in lora_of(mine).items():
        np.testing.assert_array_equal(back[path], x, err_msg=path)
    if "llama4" in name:  # whose experts were never modules
        return
    single = f"{table}/per-expert"
    convert(tmp_path / "b", tmp_path / "each", TreeOptions(from_keymap=table, to_keymap=single))
    convert(tmp_path / "a.safetensors", tmp_path / "too", TreeOptions(from_keymap=single, lora_alpha=ALPHA, like=like))
    each, too = jaxadapt.read(tmp_path / "each").tensors, jaxadapt.read(tmp_path / "too").tensors
    assert any(".experts.3." in key for key in each)
    assert set(each) == set(too)
    convert(tmp_path / "each", tmp_path / "again", TreeOptions(from_keymap=single, to_keymap=table))
    convert(tmp_path / "each", tmp_path / "d.safetensors", TreeOptions(to_keymap=table, dialect="qwix", like=like))
    again, first = jaxadapt.read(tmp_path / "again").tensors, jaxadapt.read(tmp_path / "b").tensors
    assert set(again) == set(first)
    for key, x in first.items():
        np.testing.assert_array_equal(again[key], x, err_msg=key)
    for path, x in load_file(tmp_path / "d.safetensors").items():
        np.testing.assert_array_equal(x, back[path], err_msg=path)


def test_from_one_family_to_another(tmp_path):
    """MaxText's gate and up apart, Hugging Face's in one array: refused where their As differ, unless "concat"."""
    source, target = tree("maxtext-mixtral", False), BY_NAME["mixtral"].table
    save_file(lora_of(source), tmp_path / "a.safetensors")
    told = {"from_keymap": "maxtext:mixtral", "lora_alpha": ALPHA}
    with pytest.raises(jaxadapt.MismatchError, match=r'(?s)gate_up_proj.*on_shared="concat"'):
        convert(tmp_path / "a.safetensors", tmp_path / "b", TreeOptions(**told))
    single = {**told, "from_keymap": "maxtext:mixtral/per-expert"}
    convert(tmp_path / "a.safetensors", tmp_path / "each", TreeOptions(**single))
    with pytest.raises(jaxadapt.MismatchError, match=r'(?s)one A for both.*on_shared="concat"'):
        convert(tmp_path / "each", tmp_path / "c.safetensors", TreeOptions(to_keymap=target, dialect="qwix"))
    done = convert(
        tmp_path / "each", tmp_path / "c.safetensors", TreeOptions(to_keymap=target, dialect="qwix", on_shared="concat")
    )
    assert done.rank == 2 * R
    merged_there = in_torch("maxtext-mixtral", merged("maxtext-mixtral", False))
    leaves = paths.unflatten({**base("mixtral"), **load_file(tmp_path / "c.safetensors")})
    held = jaxadapt.to_peft(LoraTree(leaves, lora_alpha=done.lora_alpha), keymap=target)
    before = in_torch("maxtext-mixtral", base("maxtext-mixtral"))
    for key, delta in computed(held, "mixtral").items():
        np.testing.assert_allclose(before[key] + delta, merged_there[key], rtol=0, atol=2e-5, err_msg=key)


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
    held = jaxadapt.to_peft(LoraTree(model, lora_alpha=ALPHA), keymap=table)
    a, b = (np.asarray(held.tensors[f"base_model.model.experts.lora_{s}.weight"]) for s in "AB")
    assert (a.shape, b.shape) == ((E * R, 3), (5, R * E))
    delta = np.einsum("oke,eki->eio", b.reshape(5, R, E), a.reshape(E, R, 3)) * ALPHA / R
    plain = np.asarray(Experts(nnx.Rngs(0)).up[...])
    np.testing.assert_allclose(model(x), np.einsum("ebd,edf->ebf", x, plain + delta), rtol=0, atol=1e-4)
