"""keras-hub's models where a table does more than rename: numbered blocks, and leaves that are parts of a tensor."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors import numpy

import jaxadapt
from jaxadapt import ConfigError, KeyMapError, MismatchError, TargetError
from jaxadapt.core import paths
from jaxadapt.export import conversion
from jaxadapt.keymaps import check, families, plan
from tests.keymaps.families import specimen_arrays
from tests.keymaps.families.specimens import BY_NAME, recorded

if importlib.util.find_spec("peft") is not None:
    from tests.keymaps.families import torch_side

CONFIG = jaxadapt.LoraConfig(r=2, target_modules=["c_attn"])


def base(name: str) -> dict[str, Any]:
    return paths.unflatten(specimen_arrays.base_leaves(BY_NAME[name], recorded(name)["leaves"]))


@pytest.mark.parametrize("name", ["keras-mixtral", "keras-qwen2moe", "keras-qwen3moe"])
def test_blocks_are_found_whatever_their_number_is(name):
    """Keras numbers them on from model to model: the second one of a process begins where the first ended."""
    shapes = recorded(name)["leaves"]
    later = {leaf.replace("_block_", "_block_1").replace("_block.", "_block_40."): s for leaf, s in shapes.items()}
    assert later.keys().isdisjoint(leaf for leaf in shapes if "_block" in leaf)
    assert len(later) == len(shapes)
    keymap = families.resolve_keymap("auto", later)
    assert keymap.name == BY_NAME[name].table
    first, second = (plan.base_plan(keymap, each) for each in (shapes, later))
    assert [(e.form, e.keys) for e in first.entries] == [(e.form, e.keys) for e in second.entries]


def test_the_file_of_a_tree_has_the_numbers_of_the_target(tmp_path: Path):
    """PyTorch's names do not tell them."""
    shapes, folder, target = recorded("keras-qwen2moe")["leaves"], tmp_path / "peft", tmp_path / "tree.safetensors"
    config = jaxadapt.LoraConfig(r=2, target_modules=["shared_expert_gate"], init_lora_weights=False)
    adapter = jaxadapt.init(base("keras-qwen2moe"), config, key=jax.random.key(0))
    jaxadapt.save(adapter, folder)
    to = conversion.TreeOptions(to_keymap="keras:qwen_moe")
    with pytest.raises(KeyMapError, match=r"(?s)0\.mlp\.shared_expert_gate: no entry matches.*--like"):
        conversion.convert(folder, target, to)
    assert not target.exists()
    numpy.save_file({leaf: np.zeros(shape, "float32") for leaf, shape in shapes.items()}, tmp_path / "like.safetensors")
    conversion.convert(folder, target, dataclasses.replace(to, like=tmp_path / "like.safetensors"))
    written = numpy.load_file(target)
    assert written.keys() == {path.replace(".kernel.lora_", ".lora_kernel_").lower() for path in adapter.flat()}
    a = next(path for path in written if "layer_1." in path and path.endswith("_a"))
    np.testing.assert_array_equal(written[a].T, _read_a(adapter, "transformer_layer_1."))


def _read_a(adapter: jaxadapt.Adapter, layer: str) -> np.ndarray:
    return np.asarray(next(x for path, x in adapter.flat().items() if path.startswith(layer) and path.endswith("_A")))


def test_a_model_with_other_norms_is_another_gemma():
    gemma, gemma2 = (recorded(f"keras-{name}")["leaves"] for name in ("gemma", "gemma2"))
    same = "decoder_block_0.pre_ffw_norm.scale"
    keys = [families.resolve_keymap("auto", leaves).match(same).weight.file_key for leaves in (gemma, gemma2)]
    assert keys == [
        "model.layers.{l}.post_attention_layernorm.weight",
        "model.layers.{l}.pre_feedforward_layernorm.weight",
    ]


def test_a_bert_without_a_classifier_may_be_an_electra():
    """The leaves of keras-hub 0.32's ElectraBackbone: with embeddings as wide as its layers, and narrower ones."""
    bert = {leaf: s for leaf, s in recorded("keras-bert")["leaves"].items() if not leaf.startswith("logits.")}
    with pytest.raises(KeyMapError, match=r"several keymaps: keras:bert, keras:electra \(not verified\)"):
        families.resolve_keymap("auto", bert)
    narrow = {leaf: (*s[:-1], 12) if "_embedding." in leaf else s for leaf, s in bert.items()}
    projection = {"embeddings_projection.kernel": (12, 16), "embeddings_projection.bias": (16,)}
    with pytest.raises(KeyMapError, match="looks like 'keras:electra', but that keymap has not been verified"):
        families.resolve_keymap("auto", narrow | projection)


def test_the_parts_of_c_attn_are_selected_together():
    """By PyTorch's name, also by "all-linear"; PEFT's fan_in_fan_out is that of Conv1D."""
    tree = base("keras-gpt2")
    for targets in (["c_attn"], "all-linear"):
        adapter = jaxadapt.init(tree, CONFIG.replace(target_modules=targets), key=jax.random.key(0))
        assert adapter.config.fan_in_fan_out is True
        found = {path for path in adapter.flat() if path.startswith("transformer_layer_1.self_attention.")}
        assert {f"transformer_layer_1.self_attention.{p}.kernel.lora_A" for p in ("query", "key", "value")} <= found


@pytest.mark.parametrize("config", [jaxadapt.IA3Config, jaxadapt.VeraConfig, jaxadapt.LoHaConfig])
@pytest.mark.parametrize("targets", [["c_attn"], "all-linear"])
def test_only_lora_is_divided_among_the_parts(config, targets):
    with pytest.raises(TargetError, match=r"self_attention\.query\.kernel: kind 'fused'"):
        jaxadapt.init(base("keras-gpt2"), config(target_modules=targets), key=jax.random.key(0))


@pytest.mark.parametrize("name", ["lora_ga", "pissa"])
def test_a_part_is_not_initialized_at_random_in_place_of_what_is_asked(name):
    """PEFT computes these from the module's whole weight or gradient."""
    tree, config = base("keras-gpt2"), CONFIG.replace(init_lora_weights=name)
    data = {"data": tree} if name == "lora_ga" else {}
    with pytest.raises(ConfigError, match=r"query\.kernel: it needs a linear layer whose weight is one parameter"):
        jaxadapt.initializers.start(tree, config, key=jax.random.key(0), **data)


def test_kasa_is_not_divided_among_the_parts():
    config = CONFIG.replace(target_modules=["qkv_proj"], kasa_config={})
    with pytest.raises(ConfigError, match="kasa_config is not supported on a part of an nn.Linear"):
        jaxadapt.init(base("keras-phi3"), config, key=jax.random.key(0))


def test_alora_adapts_the_parts():
    config = CONFIG.replace(target_modules=["qkv_proj"], alora_invocation_tokens=[1, 2])
    adapter = jaxadapt.init(base("keras-phi3"), config, key=jax.random.key(0))
    assert "transformer_layer_1.attention.query.kernel.lora_A" in adapter.flat()


def test_a_phi3_with_fewer_key_heads_is_refused_by_name(tmp_path: Path):
    """Its queries are no third of PyTorch's tensor."""
    shapes = {
        leaf: (s[0], 2, s[2]) if leaf.endswith(("attention.key.kernel", "attention.value.kernel")) else s
        for leaf, s in recorded("keras-phi3")["leaves"].items()
    }
    tree = paths.unflatten({leaf: np.zeros(shape, "float32") for leaf, shape in shapes.items()})
    config = jaxadapt.LoraConfig(r=2, target_modules=["qkv_proj"])
    with pytest.raises(TargetError, match="qkv_proj"):
        jaxadapt.init(tree, config, key=jax.random.key(0))
    with pytest.raises(KeyMapError, match="(?s)'keras:phi3'.*key.kernel.*where n is 2; it is 4"):
        jaxadapt.export.export_base(tree, tmp_path / "whole")
    named = {"keymap": "keras:phi3"}
    adapter = jaxadapt.init(tree, config, key=jax.random.key(0), **named)
    differing = r"(?s)parts of one tensor.*qkv_proj.*query.kernel.* \(16, .*key.kernel.* \(8, "
    with pytest.raises(MismatchError, match=differing):
        jaxadapt.save(jaxadapt.models.LoraTree(adapter, on_shared="concat"), tmp_path / "whole")
    with pytest.raises(MismatchError, match=differing):
        jaxadapt.export.export_base(tree, tmp_path / "whole", **named)
    assert not (tmp_path / "whole").exists()
    assert check.check_keymap(families.get_family("keras:phi3"), shapes).problems.keys() == {"misshapen"}


@pytest.mark.parametrize(
    ("name", "leaf"), [("keras-roberta", "position_embedding"), ("keras-gemma4-e", "layer_scalar")]
)
def test_a_whole_model_with_a_leaf_that_has_no_entry_is_refused_by_name(name: str, leaf: str, tmp_path: Path):
    with pytest.raises(KeyMapError, match=rf"(?s)'{BY_NAME[name].table}'.*{leaf}.*no entry"):
        jaxadapt.export.export_base(base(name), tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


@pytest.mark.peft
@pytest.mark.parametrize("name", ["keras-gpt2", "keras-phi3"])
@pytest.mark.parametrize("dora", [False, True])
def test_trained_parts_compute_in_peft_what_they_compute_here(name: str, dora: bool, tmp_path: Path):
    """Each leaf has an A of its own after training; their ranks are concatenated for PEFT's one."""
    import torch
    from peft import PeftModel

    tree, specimen = base(name), BY_NAME[name]
    config = jaxadapt.LoraConfig(**specimen.lora, use_dora=dora)
    adapter = jaxadapt.init(tree, config, key=jax.random.key(0))
    rng = np.random.default_rng(0)
    adapter = jax.tree.map(lambda x: x + np.asarray(0.3 * rng.standard_normal(x.shape), "float32"), adapter)
    with pytest.raises(MismatchError, match="PEFT stores one A"):
        jaxadapt.save(adapter, tmp_path)
    jaxadapt.save(jaxadapt.models.LoraTree(adapter, on_shared="concat"), tmp_path)
    theirs = PeftModel.from_pretrained(_copy(torch_side.base(name)), str(tmp_path)).merge_and_unload().state_dict()
    merged = plan.base_plan(families.get_family(specimen.table), recorded(name)["leaves"])
    ours = merged.encode({p: np.asarray(x) for p, x in paths.flatten(jaxadapt.merge(tree, adapter)).items()})
    for key, parts in plan.group_by_file_key(merged.keys).items():
        joined = plan.join_parts([ours[part] for part in parts], parts, np)
        # Sums of products of float32 numbers of about 1, in another order.
        np.testing.assert_allclose(joined, theirs[key].to(torch.float32).numpy(), rtol=1e-5, atol=2e-5, err_msg=key)


def _copy(model: Any) -> Any:
    import copy

    return copy.deepcopy(model)
