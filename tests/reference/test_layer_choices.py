"""PEFT adapters that choose by layer, in models whose layers one array stacks: the same outputs, training and files."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
import torch
from flax import nnx
from safetensors.numpy import load_file

import jaxadapt
from tests.support.peft_harness import CONFIG, WEIGHTS, make_peft
from tests.support.twins.llama import torch_llama, twin_of

pytestmark = [
    pytest.mark.peft,
    pytest.mark.filterwarnings("ignore:.*lora_bias=True.*no bias"),  # PEFT, of the Llama's layers
    pytest.mark.filterwarnings("ignore:.*invalid shape.*lora_B.bias"),  # and of the bias that it saves itself
]

IDS = np.random.RandomState(0).randint(0, 64, (2, 11))
QV = ["q_proj", "v_proj"]
LORA: dict[str, dict[str, Any]] = {
    "layers": {"target_modules": [*QV, "down_proj"], "layers_to_transform": [1]},
    "regex": {"target_modules": r".*layers\.(0|2)\.self_attn\.(q|o)_proj|.*layers\.1\.mlp\.up_proj"},
    "excluded": {"target_modules": QV, "exclude_modules": r".*layers\.0\..*v_proj"},
    "ranks": {"target_modules": QV, "rank_pattern": {r"1\.self_attn\.q_proj": 2, r"2\.self_attn\.v_proj": 7}},
    "alphas": {"target_modules": QV, "alpha_pattern": {r"0\.self_attn\.q_proj": 3}},
    "everything": {
        "target_modules": [*QV, "up_proj"], "layers_to_transform": [0, 2], "use_rslora": True,
        "rank_pattern": {r"2\.self_attn\.q_proj": 3}, "alpha_pattern": {r"2\.mlp\.up_proj": 1},
    },
    "dora": {
        "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2], "use_dora": True,
        "rank_pattern": {r"2\.self_attn\.q_proj": 6},
    },
    "bias": {"target_modules": QV, "layers_to_transform": [1, 2], "lora_bias": True, "rank_pattern": {r"1.*": 2}},
    "copies": {"target_modules": QV, "layers_to_transform": [0], "modules_to_save": ["layers.1.mlp.up_proj"]},
}  # fmt: skip
IA3 = {
    "ia3": {
        "target_modules": r".*layers\.(0|1)\.self_attn\.k_proj|.*layers\.2\.mlp\.down_proj",
        "feedforward_modules": r".*down_proj",
    }
}


@functools.cache
def torch_model() -> Any:
    return torch_llama(layers=3)


@functools.cache
def trained(name: str) -> Any:
    """PEFT's model with an adapter that does something."""
    fields = {"task_type": "CAUSAL_LM", **{**LORA, **IA3}[name]}
    config = peft.IA3Config(**fields) if name in IA3 else peft.LoraConfig(r=4, lora_alpha=6, **fields)
    return make_peft(torch_model(), config)


def saved(name: str, path: Path) -> tuple[Path, np.ndarray]:
    """The adapter's folder, and the logits."""
    model = trained(name)
    model.save_pretrained(path)
    with torch.no_grad():
        return path, model(torch.from_numpy(IDS)).logits.numpy()


def loaded(folder: Path, api: str, axis: int | None) -> tuple[Any, Any, Any]:
    """`(logits of the adapter, the adapter, what save takes)` of a twin with the file's adapter."""
    twin = twin_of(torch_model(), api, scan=axis is not None, scan_axis=axis or 0)
    if api == "nnx":
        jaxadapt.load(folder, twin)
        twin.eval()
        graph, params, rest = nnx.split(twin, jaxadapt.AdapterParam, ...)
        return lambda params: nnx.merge(graph, params, jax.tree.map(lambda x: x, rest))(IDS), params, twin
    module, variables = twin
    variables = jaxadapt.load(folder, variables)
    wrapper = jaxadapt.adapt(module, jaxadapt.read_config(folder))
    collection = "ia3" if "ia3" in variables else "lora"
    return (
        lambda held: wrapper.apply({**variables, collection: held}, IDS),
        variables[collection],
        variables,
    )


def same_files(one: Path, other: Path) -> None:
    mine, theirs = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    assert mine.keys() == theirs.keys()
    for key, value in theirs.items():
        assert mine[key].dtype == value.dtype, key
        assert np.array_equal(mine[key], value), key
    assert json.loads((one / CONFIG).read_text()) == json.loads((other / CONFIG).read_text())


@pytest.mark.parametrize(("api", "axis"), [("nnx", 0), ("nnx", 1), ("linen", 1)])
@pytest.mark.parametrize("name", [*LORA, *IA3])
def test_a_file_computes_the_same_and_comes_back(name, api, axis, tmp_path):
    folder, want = saved(name, tmp_path / "peft")
    logits, params, model = loaded(folder, api, axis)
    np.testing.assert_allclose(logits(params), want, atol=1e-5, rtol=1e-5)
    jaxadapt.save(model, tmp_path / "ours")
    same_files(tmp_path / "ours", folder)


def by_key(model: Any) -> dict[str, np.ndarray]:
    return {key: np.asarray(x) for key, x in jaxadapt.to_peft(model).tensors.items()}


def steps(logits: Any, params: Any, count: int = 3) -> tuple[Any, Any]:
    """The first gradient, and the parameters after some steps of AdamW with weight decay."""
    tx = optax.adamw(1e-2, weight_decay=0.1)
    ids = jnp.asarray(IDS)

    def loss(params: Any) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits(params)[:, :-1], ids[:, 1:]).mean()

    gradient = jax.jit(jax.grad(loss, allow_int=False))
    state, first = tx.init(params), None
    for _ in range(count):
        grads = gradient(params)
        first = grads if first is None else first
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return first, params


def unused(adapter: jaxadapt.Adapter) -> dict[str, np.ndarray]:
    """What of each array no tensor of PEFT's file holds: told by a file of ones."""
    ones = jax.tree.map(lambda x: jnp.ones_like(x), adapter)
    tensors = jaxadapt.PeftTensors(
        adapter.config, {k: np.ones(v.shape, v.dtype) for k, v in jaxadapt.to_peft(adapter).tensors.items()}
    )
    base = twin_of(torch_model(), "linen", scan=True)[1]["params"]
    held = jaxadapt.from_peft(tensors, base).flat()
    return {path: np.asarray(x - held[path]) != 0 for path, x in ones.flat().items()}


@pytest.mark.parametrize("name", ["layers", "alphas", "everything", "dora", "bias", "copies", "ia3"])
def test_training_is_the_unrolled_models_and_leaves_the_rest_alone(name, tmp_path):
    """Gradients and three steps of AdamW with weight decay, and exact zeros where nothing is adapted."""
    folder, _ = saved(name, tmp_path)
    found = {}
    for axis in (None, 0):
        logits, params, model = loaded(folder, "nnx", axis)
        grads, after = steps(logits, params)
        extracted = jaxadapt.extract(model)
        found[axis] = [jaxadapt.extract(state) for state in (grads, after)]
        if axis == 0:
            where = unused(extracted)
            assert any(x.any() for x in where.values()) == (name != "alphas")
            for state in found[axis]:
                for path, x in state.flat().items():
                    assert not np.asarray(x)[where[path]].any(), path
    for ours, theirs, atol in zip(found[0], found[None], (1e-6, 1e-4), strict=True):  # AdamW divides by √v: noise grows
        mine, want = by_key(ours), by_key(theirs)
        assert mine.keys() == want.keys()
        for key, value in want.items():
            np.testing.assert_allclose(mine[key], value, atol=atol, rtol=1e-3, err_msg=key)


@pytest.mark.parametrize("name", ["everything", "dora", "bias", "copies", "ia3"])
def test_linen_gradients_are_zero_where_nothing_is_adapted(name, tmp_path):
    folder, _ = saved(name, tmp_path)
    logits, params, model = loaded(folder, "linen", 0)
    where = unused(jaxadapt.extract(model))
    collection = "ia3" if name in IA3 else "lora"
    grads = jax.jit(jax.grad(lambda p: jnp.square(logits(p)).mean()))(params)
    found = jaxadapt.extract({**model, collection: grads}).flat()
    for path, x in found.items():
        assert not np.asarray(x)[where[path]].any(), path
        assert np.asarray(x)[~where[path]].any(), path
