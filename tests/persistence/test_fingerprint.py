"""The fingerprint of a base: one for each base, in every layout, sharding and dtype, and another for another base."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import jaxadapt
from jaxadapt.cli import main
from jaxadapt.core import paths
from jaxadapt.demo import llama
from jaxadapt.export import export_base
from jaxadapt.export.merge_files import merge_folder
from jaxadapt.persistence import fingerprint

CONFIG = llama.LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8
)
LORA = jaxadapt.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])


def weights(seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """A checkpoint of Hugging Face with values that bfloat16 holds exactly."""
    c, rng = CONFIG, np.random.default_rng(seed)
    heads, kv, d, f = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.hidden_size, c.intermediate_size
    layer = {
        "self_attn.q_proj": (heads, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, heads), "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f),
        "input_layernorm": (d,), "post_attention_layernorm": (d,),
    }  # fmt: skip
    shapes = {f"model.layers.{i}.{name}.weight": shape for i in range(c.num_layers) for name, shape in layer.items()}
    shapes |= {"model.embed_tokens.weight": (c.vocab_size, d), "model.norm.weight": (d,)}
    return {
        name: rng.standard_normal(shape).astype(ml_dtypes.bfloat16).astype("float32") for name, shape in shapes.items()
    }


def nnx_model(seed: int = 0, **fields: Any) -> llama.Llama:
    return llama.to_nnx(dataclasses.replace(CONFIG, **fields), weights(seed))


def saved(tree: Any, folder: Path) -> dict[str, Any] | None:
    jaxadapt.save(tree, folder)
    with safe_open(folder / "adapter_model.safetensors", "np") as file:
        return json.loads(file.metadata()["jaxadapt"]).get("base")


def adapted(model: Any, config: Any = LORA) -> Any:
    jaxadapt.adapt(model, config, rngs=nnx.Rngs(1))
    return model


def linen_variables(**fields: Any) -> dict[str, Any]:
    config = dataclasses.replace(CONFIG, **fields)
    params = llama.to_linen(config, weights())
    adapter = jaxadapt.init(params["params"], LORA, key=jax.random.key(0))
    return {**params, **adapter.collection}


def sharded() -> Any:
    model = adapted(nnx_model())
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("x", "y"))
    for module in (layer.self_attn.q_proj for layer in model.model.layers):
        module.kernel.set_value(jax.device_put(module.kernel.get_value(), NamedSharding(mesh, PartitionSpec("x", "y"))))
    return model


def test_one_base_has_one_fingerprint(tmp_path: Path):
    expected = saved(adapted(nnx_model()), tmp_path / "0")
    checkpoint = weights()
    assert expected is not None
    assert len(expected) == 6  # all adapted weights, since they are few
    for key, each in expected.items():  # the values are those at some place of the checkpoint
        bits = np.array([int(each["bf16"][i : i + 4], 16) for i in range(0, 32, 4)], "u2").view(ml_dtypes.bfloat16)
        assert list(checkpoint[key].shape) == each["shape"]
        assert set(bits.astype("float32")) <= set(checkpoint[key].ravel())
    others = {
        "scanned": adapted(nnx_model(scan=True)),
        "scanned on axis 1": adapted(nnx_model(scan=True, scan_axis=1)),
        "bfloat16": adapted(nnx_model(param_dtype=jnp.bfloat16)),
        "sharded": sharded(),
        "Linen": linen_variables(),
        "Linen, scanned": linen_variables(scan=True),
    }
    for name, tree in others.items():
        assert saved(tree, tmp_path / name) == expected, name
    assert saved(adapted(nnx_model(seed=1)), tmp_path / "1") != expected
    quantized = adapted(jaxadapt.models.quantize(nnx_model(), "int8", modules=["q_proj", "down_proj"]))
    assert saved(quantized, tmp_path / "q") is None
    assert saved(jaxadapt.extract(adapted(nnx_model())), tmp_path / "a") is None  # without its base


def with_qwix_leaves(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters with Qwix's LoRA leaves beside the kernels that `LORA` names."""
    flat, rng = paths.flatten(params), np.random.default_rng(3)
    for path, kernel in list(flat.items()):
        if path.endswith(("q_proj.kernel", "down_proj.kernel")):
            flat[f"{path}_lora_a"] = rng.standard_normal((kernel.shape[0], 2)).astype("float32")
            flat[f"{path}_lora_b"] = rng.standard_normal((2, kernel.shape[1])).astype("float32")
    return paths.unflatten(flat)


def test_another_librarys_tree_has_the_fingerprint_of_its_base(tmp_path: Path):
    """The same as an adapter of jaxadapt on that base, so that a load onto another base warns."""
    params = llama.to_linen(CONFIG, weights())["params"]
    expected = saved(linen_variables(), tmp_path / "own")
    assert expected is not None
    for name, tree in {"params": with_qwix_leaves(params), "vars": {"params": with_qwix_leaves(params)}}.items():
        assert saved(jaxadapt.models.LoraTree(tree, lora_alpha=4), tmp_path / name) == expected
    jaxadapt.load(tmp_path / "params", nnx_model(), strict="base")
    with pytest.raises(jaxadapt.MismatchError, match="trained on another base"):
        jaxadapt.load(tmp_path / "params", nnx_model(seed=1), strict="base")


@pytest.mark.parametrize("change", ["no base", "int8", "float8_e4m3fn", "shapes"])
def test_a_tree_without_values_of_its_base_has_none(change: str, tmp_path: Path):
    """Only LoRA leaves, quantized weights (the scale is in another leaf), and shapes."""
    flat = paths.flatten(with_qwix_leaves(llama.to_linen(CONFIG, weights())["params"]))
    for path, kernel in list(flat.items()):
        if path.endswith(("q_proj.kernel", "down_proj.kernel")):
            del flat[path]
            if change in ("int8", "float8_e4m3fn"):
                flat[f"{path}.array.qvalue"] = np.asarray(kernel).astype(getattr(ml_dtypes, change, change))
                flat[f"{path}.array.scale"] = np.ones((1, kernel.shape[1]), "float32")
            elif change == "shapes":
                flat[path] = jax.ShapeDtypeStruct(kernel.shape, kernel.dtype)
    tree = jaxadapt.models.LoraTree(paths.unflatten(flat), lora_alpha=4)
    jaxadapt.save(tree, tmp_path, keymap="llama")
    assert jaxadapt.read(tmp_path).fingerprint is None


def test_a_load_onto_another_base_warns(tmp_path: Path):
    saved(adapted(nnx_model()), tmp_path)
    jaxadapt.load(tmp_path, nnx_model(scan=True), strict="base")
    with pytest.warns(UserWarning, match="was trained on another base: 6 of 6 compared weights differ"):
        jaxadapt.load(tmp_path, nnx_model(seed=1))
    other = nnx_model(seed=1)
    with pytest.raises(jaxadapt.MismatchError, match='Load the adapter onto its own base, or without strict="base"'):
        jaxadapt.load(tmp_path, other, strict="base")
    jaxadapt.write(dataclasses.replace(jaxadapt.read(tmp_path), fingerprint=None), tmp_path / "none")
    with pytest.raises(jaxadapt.MismatchError, match="has no fingerprint of its base"):
        jaxadapt.load(tmp_path / "none", nnx_model(), strict="base")


@pytest.mark.parametrize("values", [("7f80", "3f80"), ("3f80", "ff80"), ("7f80", "ff80"), ("7f80", "7fc0")])
def test_an_infinite_value_is_near_no_other(values: tuple[str, str]):
    stored, found = ({"q.weight": {"shape": [4, 4], "bf16": each + "3f80" * 7}} for each in values)
    with pytest.raises(jaxadapt.MismatchError, match=r"trained on another base.*q\.weight: other values"):
        fingerprint.check(stored, found, "here", strict=True)
    fingerprint.check(stored, stored, "here", strict=True)


@pytest.mark.filterwarnings("ignore:.*has no config.json")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_verify_compares_the_folder_of_the_base(dtype: str, tmp_path: Path):
    saved(adapted(nnx_model()), tmp_path / "adapter")
    export_base(nnx_model(), tmp_path / "right", dtype=dtype)
    export_base(nnx_model(seed=1), tmp_path / "wrong", dtype=dtype)
    right, wrong = (
        CliRunner().invoke(main, ["verify", str(tmp_path / "adapter"), "--base", str(tmp_path / name), "--json"])
        for name in ("right", "wrong")
    )
    assert right.exit_code == 0, right.output
    assert "base" in {found["code"] for found in json.loads(right.output)["findings"]}
    assert wrong.exit_code == 1
    (found,) = [f for f in json.loads(wrong.output)["findings"] if f["severity"] == "error"]
    assert found["code"] == "other-base"
    assert len(found["subjects"]) == 6


def test_a_merge_into_another_base_warns(tmp_path: Path):
    saved(adapted(nnx_model()), tmp_path / "adapter")
    for name, seed in (("right", 0), ("wrong", 1)):
        (tmp_path / name).mkdir()
        save_file(weights(seed), tmp_path / name / "model.safetensors")
    merge_folder(tmp_path / "right", tmp_path / "adapter", tmp_path / "merged")
    with pytest.warns(UserWarning, match="was trained on another base: 6 of 6 compared weights differ"):
        merge_folder(tmp_path / "wrong", tmp_path / "adapter", tmp_path / "merged")


def test_it_stays_when_the_file_is_written_again(tmp_path: Path):
    expected = saved(adapted(nnx_model()), tmp_path / "a")
    jaxadapt.write(jaxadapt.read(tmp_path / "a"), tmp_path / "b")
    assert jaxadapt.read(tmp_path / "b").fingerprint == expected
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "b" / "adapter_model.safetensors"
    ).read_bytes()
    assert CliRunner().invoke(main, ["convert", f"{tmp_path}/a", f"{tmp_path}/c", "--dtype", "bfloat16"]).exit_code == 0
    assert jaxadapt.read(tmp_path / "c").fingerprint == expected
    assert {x.dtype.name for x in load_file(tmp_path / "a" / "adapter_model.safetensors").values()} == {"float32"}


DAMAGED = ({}, [], {"q": 1}, {"q": {"shape": [0], "bf16": "0" * 32}}, {"q": {"shape": [1], "bf16": "xyz"}})


@pytest.mark.parametrize("base", DAMAGED)
def test_a_damaged_fingerprint_is_none(base: Any, tmp_path: Path):
    from jaxadapt.persistence import fingerprint

    assert fingerprint.parse(base) is None


def one_weight(values: Any) -> dict[str, Any]:
    digits = "".join(f"{int(x):04x}" for x in np.asarray(values, ml_dtypes.bfloat16).view("uint16"))
    return {"q.weight": {"shape": [len(values)], "bf16": digits}}


def test_a_base_whose_values_are_all_one_unit_off_is_another_one():
    """A quarter of the values may be, as a keymap's factor rounds them."""
    stored = np.linspace(1, 1.9, 8).astype(ml_dtypes.bfloat16)
    above = (stored.view("uint16") + 1).view(ml_dtypes.bfloat16)
    few = np.where(np.arange(8) < 2, above, stored)
    assert fingerprint.differences(one_weight(stored), one_weight(few)) == []
    off = fingerprint.differences(one_weight(stored), one_weight(above))
    assert off == ["all weights: values that differ in the last place"]


def test_processes_have_no_common_fingerprint_if_one_of_them_has_none():
    assert fingerprint.merge([one_weight([1.0]), None]) is None
