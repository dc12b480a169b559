"""A refusal of `export`, `merge`, `convert`, `load`, `rename` or `inspect` names a way out, and the advised call works.

tests/serving/test_ways_out.py does this for `put`.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

import jaxadapt
from jaxadapt import AdapterError
from jaxadapt.cli import main
from jaxadapt.configs.matching import PEFT_TYPES
from jaxadapt.core import paths
from jaxadapt.export import export_adapter, export_base
from jaxadapt.methods import METHODS
from jaxadapt.persistence import consumers
from tests.support.configs import class_of

KEYMAP = jaxadapt.KeyMap(
    "net",
    (
        jaxadapt.Weight("experts.w", "experts.w", "e i o -> e o i", kind="experts"),
        jaxadapt.Weight("{path}.kernel", "{path}.weight", "i o -> o i"),
        jaxadapt.Weight("{path}.bias", "{path}.bias", "o -> o"),
        jaxadapt.Weight("{path}.scale", "{path}.weight", "o -> o"),
        jaxadapt.Weight("{path}.embedding", "{path}.weight", "v d -> v d", kind="embedding"),
    ),
    order=("emb", "norm", "q", "up"),
)


def parameters(*, biases: bool = True) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "emb.embedding": (24, 8), "norm.scale": (8,), "norm.bias": (8,), "q.kernel": (8, 16), "up.kernel": (16, 8),
    }  # fmt: skip
    shapes |= {"q.bias": (16,), "up.bias": (8,)} if biases else {}
    return paths.unflatten({path: jnp.asarray(rng.standard_normal(shape), "float32") for path, shape in shapes.items()})


def adapted(config: Any, params: Any, folder: Path) -> jaxadapt.Adapter:
    """Save an adapter of random values."""
    adapter, rng = jaxadapt.init(params, config, key=jax.random.key(0), keymap=KEYMAP), np.random.default_rng(1)
    roles = METHODS[config.peft_type].roles
    values = {
        path: x
        if roles.get(path.rpartition(".")[2]) == "frozen" or not jnp.issubdtype(x.dtype, jnp.floating)
        else x + jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype)
        for path, x in adapter.flat().items()
    }
    adapter = jaxadapt.Adapter(config=adapter.config, params=paths.unflatten(values), keymap=adapter.keymap)
    jaxadapt.save(adapter, folder)
    return adapter


def run(*args: object) -> str:
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == 0, result.output
    return result.output


def follow(message: str, adapter: jaxadapt.Adapter, tmp_path: Path) -> None:
    """Do what a refusal advises; the result has the values of the merge in memory."""
    base, saved, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    wanted = jaxadapt.merge(parameters(), adapter)
    export_base(parameters(), base, keymap=KEYMAP)
    if "jaxadapt merge BASE ADAPTER --out FOLDER" in message:
        run("merge", base, saved, "--out", out)
    else:
        assert "export_base(" in message, message
        export_base(parameters(), out, adapter, keymap=KEYMAP)
    found = load_file(out / "model.safetensors")
    export_base(wanted, tmp_path / "wanted", keymap=KEYMAP)
    for key, x in load_file(tmp_path / "wanted" / "model.safetensors").items():
        np.testing.assert_allclose(found[key], x, rtol=1e-5, atol=1e-5, err_msg=key)  # float32 sums in another order
    if "--rank R --base BASE" in message:
        assert export_adapter(saved, tmp_path / "near", "vllm", rank=2, base=base).error


FIELDS: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True}, "biases": {"bias": "all"}, "an output bias": {"lora_bias": True},
    "copies": {"modules_to_save": ["norm"]}, "tokens": {"trainable_token_indices": {"emb": [1, 2]}},
}  # fmt: skip
OTHERS = sorted(name for name, method in METHODS.items() if method.scope != "model" and name != "LORA")
CASES = [*FIELDS, *(pytest.param(x, marks=() if x in ("IA3", "LN_TUNING") else pytest.mark.full) for x in OTHERS)]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", CASES)
def test_what_export_and_inspect_advise_for_an_adapter_works(kind: str, tmp_path: Path):
    targets = {"LN_TUNING": ["norm"], "TRAINABLE_TOKENS": ["emb"]}.get(kind, ["q", "up"])
    if kind in FIELDS:
        config: Any = jaxadapt.LoraConfig(r=2, target_modules=targets, **FIELDS[kind])
    else:
        cls: Any = class_of(kind)
        config = cls(**{**METHODS[kind].examples[0], "target_modules": targets})
    adapter = adapted(config, parameters(), tmp_path / "adapter")
    with pytest.raises(AdapterError) as refused:
        export_adapter(tmp_path / "adapter", tmp_path / "out", "vllm")
    follow(str(refused.value), adapter, tmp_path)
    info = jaxadapt.inspect(tmp_path / "adapter")
    (vllm,) = [r for r in consumers.judge_readers(info.config, info.tensors) if r.name == "vLLM"]
    in_memory = "export_base(" in str(refused.value)
    assert ("export_base(" if in_memory else "jaxadapt merge BASE ADAPTER --out FOLDER") in vllm.remedy


FIELDS_OF = {"CPT": {"cpt_token_ids": [7, 3], "cpt_tokens_type_mask": [1, 2]}}
PROMPTS = [name for name in PEFT_TYPES if name not in METHODS or METHODS[name].scope == "model"]


@pytest.mark.parametrize("peft_type", PROMPTS)
def test_no_merge_is_advised_for_a_method_that_none_has(peft_type: str):
    """tests/serving/test_ways_out.py loads each of the prompts."""
    cls = class_of(peft_type)
    config = jaxadapt.Config.from_dict(
        {"peft_type": peft_type, "task_type": "CAUSAL_LM", **FIELDS_OF.get(peft_type, {})}
    )
    with pytest.raises(AdapterError) as refused:
        export_adapter(jaxadapt.PeftTensors(config, {}), "out", "vllm")
    assert "jaxadapt merge" not in str(refused.value)
    assert ("PEFT and jaxadapt.load run it" if cls is not None else "only PEFT runs") in str(refused.value)
    assert not any(r.remedy for r in consumers.judge_readers(config))


def test_a_merge_for_experts_is_advised_in_memory(tmp_path: Path):
    """The files do not contain the layout of a parameter (`target_parameters`), so `jaxadapt merge` refuses them."""
    rng = np.random.default_rng(0)
    params = {**parameters(), "experts": {"w": jnp.asarray(rng.standard_normal((2, 8, 6)), "float32")}}
    config = jaxadapt.LoraConfig(r=2, target_modules=[], target_parameters=["experts.w"])
    adapter = adapted(config, params, tmp_path / "adapter")
    info = jaxadapt.inspect(tmp_path / "adapter")
    remedies = {r.name: r.remedy for r in consumers.judge_readers(info.config, info.tensors) if r.remedy}
    assert remedies["MLX"] == "jaxadapt export ADAPTER --for mlx --base BASE --out FOLDER"
    with pytest.raises(AdapterError, match=r"pass base= \(`--base`\)"):
        export_adapter(tmp_path / "adapter", tmp_path / "mlx", "mlx")
    (tmp_path / "config.json").write_text('{"model_type": "mine"}')
    with pytest.raises(AdapterError, match="mine") as refused:
        export_adapter(tmp_path / "adapter", tmp_path / "mlx", "mlx", base=tmp_path / "config.json")
    assert not (tmp_path / "mlx").exists()
    assert "jaxadapt merge" not in str(refused.value)
    assert "export_base(model, folder, adapter)" in str(refused.value)
    export_base(params, tmp_path / "base", keymap=KEYMAP)
    merge = CliRunner().invoke(main, ["merge", *(str(tmp_path / x) for x in ("base", "adapter")), "--out", "x"])
    assert "export_base(model, folder, adapter)" in " ".join(merge.output.split())
    export_base(params, tmp_path / "merged", adapter, keymap=KEYMAP)
    found = load_file(tmp_path / "merged" / "model.safetensors")["experts.w"]
    wanted = jaxadapt.merge(params, adapter)["experts"]["w"]
    np.testing.assert_allclose(found.swapaxes(1, 2), wanted, rtol=1e-5, atol=1e-5)


def test_an_output_bias_for_a_base_without_biases_stays_an_adapter(tmp_path: Path):
    config = jaxadapt.LoraConfig(r=2, target_modules=["q", "up"], lora_bias=True)
    params = parameters(biases=False)
    adapted(config, params, tmp_path / "adapter")
    export_base(params, tmp_path / "base", keymap=KEYMAP)
    with pytest.raises(AdapterError, match="if the adapted modules of the base have biases; else only PEFT and jaxad"):
        export_adapter(tmp_path / "adapter", tmp_path / "out", "vllm")
    merge = ["merge", tmp_path / "base", tmp_path / "adapter", "--out", tmp_path / "out"]
    result = CliRunner().invoke(main, [str(arg) for arg in merge])
    assert "keep the adapter beside it" in " ".join(result.output.split())
    variables = jaxadapt.load(tmp_path / "adapter", {"params": params}, keymap=KEYMAP)
    assert jaxadapt.extract(variables).config.lora_bias


def test_rename_says_that_the_names_fit(tmp_path: Path):
    config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    adapted(config, parameters(), tmp_path / "adapter")
    export_base(parameters(), tmp_path / "base", keymap=KEYMAP)
    rename = ["rename", tmp_path / "adapter", "--base", tmp_path / "base", "--out", tmp_path / "out"]
    result = CliRunner().invoke(main, [str(arg) for arg in rename])
    assert re.search(r"the names are those of \S+base already; nothing to rename", " ".join(result.output.split()))


@pytest.mark.filterwarnings("ignore:modules_to_save.*matches no module")
def test_a_trained_copy_of_a_tied_head_is_named(tmp_path: Path):
    """PEFT writes it as lm_head.weight. In place of the base's embedding it would change the lookup."""
    tied = dataclasses.replace(KEYMAP, output="lm_head", tied=(("lm_head.weight", "model.embed_tokens.weight"),))
    params = {"model": {"embed_tokens": {"embedding": parameters()["emb"]["embedding"]}, "q": parameters()["q"]}}
    head = np.random.default_rng(3).standard_normal((24, 8)).astype("float32")
    key = "base_model.model.model.q.lora_{}.weight"
    tensors = {key.format("A"): np.ones((2, 8), "f4"), key.format("B"): np.ones((16, 2), "f4")}
    config = jaxadapt.LoraConfig(r=2, target_modules=["q"], modules_to_save=["lm_head"])
    adapter = jaxadapt.PeftTensors(config, {**tensors, "base_model.model.lm_head.weight": head})
    jaxadapt.write(adapter, tmp_path / "adapter")
    with pytest.raises(jaxadapt.MismatchError, match=r"(?s)copy of a head.*lm_head\.weight.*jaxadapt merge") as refused:
        jaxadapt.load(tmp_path / "adapter", {"params": params}, keymap=tied)
    assert "yourself" not in str(refused.value)
    export_base(params, tmp_path / "base", keymap=tied)
    (tmp_path / "base" / "config.json").write_text('{"tie_word_embeddings": true}')
    run("merge", tmp_path / "base", tmp_path / "adapter", "--out", tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    np.testing.assert_array_equal(merged["lm_head.weight"], head)
    np.testing.assert_array_equal(merged["model.embed_tokens.weight"], params["model"]["embed_tokens"]["embedding"])
    separate = {"params": {**params, "lm_head": {"kernel": jnp.zeros((8, 24))}}}
    loaded = jaxadapt.extract(jaxadapt.load(tmp_path / "adapter", separate, keymap=tied))
    np.testing.assert_array_equal(jaxadapt.merge(separate["params"], loaded)["lm_head"]["kernel"], head.T)


def test_an_orbax_checkpoint_is_written_by_a_model_where_files_do_not_suffice(tmp_path: Path):
    params = {**parameters(), "experts": {"w": jnp.ones((2, 8, 6))}}
    config = jaxadapt.LoraConfig(r=2, target_modules=[], target_parameters=["experts.w"])
    adapted(config, params, tmp_path / "adapter")
    convert = ["convert", tmp_path / "adapter", tmp_path / "orbax", "--format", "orbax"]
    result = CliRunner().invoke(main, [str(arg) for arg in convert])
    assert "call jaxadapt.save(model, path, format='orbax')" in " ".join(result.output.split())
    variables = jaxadapt.load(tmp_path / "adapter", {"params": params}, keymap=KEYMAP)
    jaxadapt.save(variables, tmp_path / "orbax", format="orbax")
    assert jaxadapt.read_config(tmp_path / "orbax").get("target_parameters") == ("experts.w",)


def test_kasa_is_merged_into_the_base_that_it_changes(tmp_path: Path):
    config = jaxadapt.LoraConfig(r=2, target_modules=["q"], kasa_config={"beta": 0.1})
    started = jaxadapt.initializers.start(parameters(), config, key=jax.random.key(0), keymap=KEYMAP)
    jaxadapt.save(started.adapter, tmp_path / "adapter")
    with pytest.raises(
        AdapterError, match=r"jaxadapt\.load\(jaxadapt\.read\(…, change_base=True\), model\), jaxadapt\.merge"
    ):
        export_adapter(tmp_path / "adapter", tmp_path / "out", "vllm")
    loaded = jaxadapt.load(
        jaxadapt.read(tmp_path / "adapter", change_base=True), {"params": parameters()}, keymap=KEYMAP
    )
    wanted = jaxadapt.merge(started.base, started.adapter)
    np.testing.assert_allclose(jaxadapt.merge(loaded)["params"]["q"]["kernel"], wanted["q"]["kernel"], atol=1e-5)


def test_the_ways_out_of_merge_work(tmp_path: Path):
    adapter = adapted(jaxadapt.LoraConfig(r=2, target_modules=["q"]), parameters(), tmp_path / "adapter")
    values = {path: x * jnp.nan for path, x in adapter.flat().items()}
    damaged = dataclasses.replace(adapter, params=paths.unflatten(values))
    with pytest.raises(AdapterError, match="allow_nan=True merges them nevertheless"):
        jaxadapt.merge(parameters(), damaged)
    assert jnp.isnan(jaxadapt.merge(parameters(), damaged, allow_nan=True)["q"]["kernel"]).all()
    export_base(parameters(), tmp_path / "base", keymap=KEYMAP)
    merge = ["merge", str(tmp_path / "base"), str(tmp_path / "adapter"), "--out"]
    refused = CliRunner().invoke(main, [*merge, str(tmp_path / "x.gguf")])
    assert "merge into a folder" in " ".join(refused.output.split())
    run(*merge, tmp_path / "x")


def test_an_adapter_of_a_tied_lookup_is_merged_with_a_separate_head():
    own = (
        jaxadapt.Weight("emb.embedding", "emb.weight", "v d -> v d", kind="embedding"),
        jaxadapt.Weight("lm_head.kernel", "lm_head.weight", "i o -> o i"),
    )
    ties = (("lm_head.weight", "emb.weight"),)
    tied = jaxadapt.KeyMap("tied", (*own, *KEYMAP.weights), output="lm_head", tied=ties, order=KEYMAP.order)
    config = jaxadapt.LoraConfig(r=2, target_modules=["emb"], init_lora_weights=False)
    adapter = jaxadapt.init(parameters(), config, key=jax.random.key(0), keymap=tied)
    with pytest.raises(AdapterError, match="Build the model with a separate head"):
        jaxadapt.merge(parameters(), adapter)
    separate = {**parameters(), "lm_head": {"kernel": parameters()["emb"]["embedding"].T}}
    merged = jaxadapt.merge(separate, adapter)
    assert (merged["lm_head"]["kernel"] == separate["lm_head"]["kernel"]).all()
    assert not (merged["emb"]["embedding"] == separate["emb"]["embedding"]).all()


def test_the_ways_out_of_load_for_an_adapter_of_a_changed_base_work(tmp_path: Path):
    config = jaxadapt.LoraConfig(r=2, target_modules=["q"], init_lora_weights="pissa")
    started = jaxadapt.initializers.start(parameters(), config, key=jax.random.key(0), keymap=KEYMAP)
    jaxadapt.save(started.adapter, tmp_path / "first")
    trained = dataclasses.replace(started.adapter, params=jax.tree.map(lambda x: 2 * x, started.adapter.params))
    jaxadapt.save(trained, tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"(?s)change_base=True.*change_base=False.*for_original_base"):
        jaxadapt.load(tmp_path / "adapter", {"params": parameters()}, keymap=KEYMAP)
    wanted = jaxadapt.merge(started.base, trained)["q"]["kernel"]
    run("undo-start", tmp_path / "adapter", "--first", tmp_path / "first", "--out", tmp_path / "plain")
    for folder, base, options in (
        ("adapter", parameters(), {"change_base": True}), ("adapter", started.base, {"change_base": False}),
        ("plain", parameters(), {}),
    ):  # fmt: skip
        loaded = jaxadapt.load(jaxadapt.read(tmp_path / folder, **options), {"params": base}, keymap=KEYMAP)
        np.testing.assert_allclose(jaxadapt.merge(loaded)["params"]["q"]["kernel"], wanted, atol=1e-4)


def test_an_adapter_with_other_base_weights_is_loaded_after_they_are_replaced(tmp_path: Path):
    adapter = adapted(jaxadapt.LoraConfig(r=2, target_modules=["q"]), parameters(), tmp_path / "adapter")
    tensors = jaxadapt.to_peft(adapter)
    weight = np.ones((16, 8), "float32")
    own = {**tensors.tensors, "base_model.model.q.base_layer.weight": weight}
    jaxadapt.write(jaxadapt.PeftTensors(tensors.config, own), tmp_path / "own")
    with pytest.raises(AdapterError, match="Replace the base parameters yourself"):
        jaxadapt.load(tmp_path / "own", {"params": parameters()}, keymap=KEYMAP)
    replaced = parameters()
    replaced["q"]["kernel"] = jnp.asarray(jaxadapt.read(tmp_path / "own").tensors[[*own][-1]]).T
    assert jaxadapt.extract(jaxadapt.load(tmp_path / "own", {"params": replaced}, keymap=KEYMAP)).config.r == 2


def test_the_ways_out_of_load_beside_an_attached_adapter_work(tmp_path: Path):
    adapted(jaxadapt.LoraConfig(r=2, target_modules=["q"]), parameters(), tmp_path / "adapter")
    other = adapted(jaxadapt.LoraConfig(r=3, target_modules=["up"]), parameters(), tmp_path / "other")
    variables = {"params": parameters(), **other.collection}
    with pytest.raises(AdapterError, match=r"load\(…, replace=True\) replaces .* load\(…, name=…\) keeps both"):
        jaxadapt.load(tmp_path / "adapter", variables, keymap=KEYMAP)
    replaced = jaxadapt.load(tmp_path / "adapter", variables, keymap=KEYMAP, replace=True)
    assert jaxadapt.extract(replaced).config.r == 2
    both = jaxadapt.load(tmp_path / "adapter", variables, name="second", keymap=KEYMAP)
    assert [jaxadapt.extract(both, name=name).config.r for name in ("default", "second")] == [3, 2]
