"""Exported routed experts: the stacks in mlx-lm's and llama.cpp's files are the changes of PEFT's merged weights."""

from __future__ import annotations

import copy
import functools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxadapt
from jaxadapt.export import export_adapter

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
gguf = pytest.importorskip("gguf")
from tests.full.programs import experts  # noqa: E402

pytestmark = [pytest.mark.peft, pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")]

MLX = {"mixtral": "block_sparse_moe.switch_mlp", "qwen3_moe": "mlp.switch_mlp", "gpt_oss": "mlp.experts",
       "llama4": "feed_forward.experts", "deepseek_v3": "mlp.switch_mlp"}  # fmt: skip


@functools.cache
def base(kind: str) -> Any:
    return experts.model_of(kind)


def wrapped(kind: str, folder: Path, **fields: Any) -> Any:
    """PEFT's model with random values, saved to a folder beside the base's config.json."""
    model = peft.get_peft_model(copy.deepcopy(base(kind)), peft.LoraConfig(**{"r": 3, "lora_alpha": 5, **fields}))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.3
    model.save_pretrained(folder)
    base(kind).config.save_pretrained(folder.parent)
    return model


def changes(kind: str, model: Any) -> dict[str, np.ndarray]:
    """Return {gate_proj, up_proj, down_proj, router: the change (expert, out, in)} of the last layer, by PEFT."""
    before, after = base(kind).state_dict(), model.merge_and_unload().state_dict()
    last = f"model.layers.{base(kind).config.num_hidden_layers - 1}."
    block = f"{last}{experts.BLOCKS.get(kind, 'mlp')}.experts."
    wide, down = ((after[k] - before[k]).numpy() for k in (f"{block}gate_up_proj", f"{block}down_proj"))
    if kind in ("gpt_oss", "llama4"):  # (expert, in, out)
        wide, down = wide.swapaxes(1, 2), down.swapaxes(1, 2)
    half = wide.shape[1] // 2
    gate, up = (wide[:, ::2], wide[:, 1::2]) if kind == "gpt_oss" else (wide[:, :half], wide[:, half:])
    found = {"gate_proj": gate, "up_proj": up, "down_proj": down}
    if kind in experts.ROUTERS:
        key = f"{last}{experts.ROUTERS[kind]}.weight"
        found["router"] = (after[key] - before[key]).numpy()
    return found


@pytest.mark.parametrize("kind", experts.KINDS)
def test_both_files_hold_the_changes_that_peft_merges(kind, tmp_path):
    parameters = experts.cases(kind)["experts"]["target_parameters"]
    router = [f"{experts.ROUTERS[kind]}.weight"] if kind in experts.ROUTERS else []
    fields = {"target_modules": ["o_proj"], "target_parameters": parameters + router, "use_rslora": True}
    want = changes(kind, wrapped(kind, tmp_path / "in", **fields))
    assert all(abs(x).max() > 0.1 for x in want.values())

    export_adapter(tmp_path / "in", tmp_path / "mlx", "mlx", base=tmp_path)
    last = base(kind).config.num_hidden_layers - 1
    layer = f"{'language_model.' if kind == 'llama4' else ''}model.layers.{last}."
    file = load_file(tmp_path / "mlx/adapters.safetensors")
    keys = json.loads((tmp_path / "mlx/adapter_config.json").read_text())["lora_parameters"]["keys"]
    assert {key.rpartition(".lora_")[0] for key in file} == set(keys)
    routers = {"mixtral": "block_sparse_moe.gate"}
    for name, change in want.items():
        place = layer + (
            routers.get(kind, experts.ROUTERS.get(kind, "")) if name == "router" else f"{MLX[kind]}.{name}"
        )
        a, b = file[f"{place}.lora_a"], file[f"{place}.lora_b"]
        got = (a @ b).T if name == "router" else b @ a
        np.testing.assert_allclose(got, change, atol=1e-6)  # float32: PEFT's difference of two weights

    if kind == "deepseek_v3":
        assert "architecture 'deepseek_v3'" in refusal(tmp_path, "gguf", base=tmp_path)
        return
    export_adapter(tmp_path / "in", tmp_path / "x.gguf", "gguf", base=tmp_path)
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    tensors = {tensor.name: np.asarray(tensor.data) for tensor in reader.tensors}
    for name, change in want.items():
        place = f"blk.{last}." + ("ffn_gate_inp" if name == "router" else f"ffn_{name.removesuffix('_proj')}_exps")
        got = tensors[f"{place}.weight.lora_b"] @ tensors[f"{place}.weight.lora_a"]
        np.testing.assert_allclose(got, change, atol=1e-6)
    assert f"blk.{last}.attn_output.weight.lora_a" in tensors


@pytest.mark.parametrize("program", ["mlx", "gguf"])
def test_single_experts_give_the_same_stacks(program, tmp_path):
    """transformers 4's names, as jaxadapt saves them too: one LoRA for each expert."""
    fields = experts.cases("mixtral")["experts"]
    wrapped("mixtral", tmp_path / "in", **fields)
    export_adapter(tmp_path / "in", tmp_path / "single", "vllm", base=tmp_path)
    found = []
    for name in ("in", "single"):
        path = tmp_path / (f"{name}.gguf" if program == "gguf" else f"{name}-mlx")
        export_adapter(tmp_path / name, path, program, base=tmp_path / "config.json")
        found.append(
            {t.name: np.asarray(t.data) for t in gguf.GGUFReader(path).tensors}
            if program == "gguf"
            else load_file(path / "adapters.safetensors")
        )
    assert found[0].keys() == found[1].keys()
    for key, x in found[0].items():
        np.testing.assert_array_equal(x, found[1][key])


def test_patterns_and_ranks_of_experts_become_one_rank(tmp_path):
    fields = {"target_modules": ["o_proj"], "target_parameters": ["gate_up_proj", "down_proj"], "r": 2}
    model = wrapped(
        "deepseek_v3", tmp_path / "in", rank_pattern={"down_proj": 4}, alpha_pattern={"o_proj": 9}, **fields
    )
    result = export_adapter(tmp_path / "in", tmp_path / "mlx", "mlx", base=tmp_path)
    file = load_file(tmp_path / "mlx/adapters.safetensors")
    want = changes("deepseek_v3", model)
    assert result.rank >= 4
    for name, change in want.items():
        place = f"model.layers.1.mlp.switch_mlp.{name}"
        np.testing.assert_allclose(file[f"{place}.lora_b"] @ file[f"{place}.lora_a"], change, atol=1e-6)


def refusal(folder: Path, program: str, **options: Any) -> str:
    out = folder / ("x.gguf" if program == "gguf" else "out")
    with pytest.raises(jaxadapt.AdapterError) as error:
        export_adapter(folder / "in", out, program, **options)
    assert not out.exists()
    return str(error.value)


def test_refused(tmp_path):
    wrapped("qwen3_moe", tmp_path / "in", **experts.cases("qwen3_moe")["experts"])
    assert "pass base=" in refusal(tmp_path, "mlx")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "qwen9_moe"}))
    text = refusal(tmp_path, "mlx", base=tmp_path)
    assert "'qwen9_moe'" in text
    assert "merge" in text
    other = {**config, **{name: 8 for name in ("num_experts", "num_local_experts") if name in config}}
    (tmp_path / "config.json").write_text(json.dumps(other))
    for program in ("mlx", "gguf"):
        assert re.search(r"expected all 8 experts of the base, found 4", refusal(tmp_path, program, base=tmp_path))


def test_a_linear_weight_as_a_parameter_and_deepseeks_latents_are_refused_in_mlx(tmp_path):
    fields = {"target_modules": ["kv_b_proj"], "target_parameters": ["experts.down_proj"]}
    wrapped("deepseek_v3", tmp_path / "in", **fields)
    assert "mlx-lm splits its weight" in refusal(tmp_path, "mlx", base=tmp_path)
    path = tmp_path / "in/adapter_config.json"
    config = json.loads(path.read_text())
    config |= {"target_modules": [], "target_parameters": ["o_proj.weight"]}
    path.write_text(json.dumps(config))
    save_file({f"base_model.model.model.layers.0.self_attn.o_proj.lora_{s}.weight": np.ones((3, 3), "float32")
               for s in "AB"}, tmp_path / "in/adapter_model.safetensors")  # fmt: skip
    assert "no routed experts" in refusal(tmp_path, "mlx", base=tmp_path)


def test_dora_of_single_experts_is_refused(tmp_path):
    base("mixtral").config.save_pretrained(tmp_path)
    stem = "base_model.model.model.layers.{}.mlp.experts.{}.w1"
    shapes = {"lora_A.weight": (2, 16), "lora_B.weight": (20, 2), "lora_magnitude_vector": (20,)}
    tensors = {
        f"{stem.format(layer, e)}.{name}": np.ones(shape, "float32")
        for layer in range(2) for e in range(4) for name, shape in shapes.items()
    }  # fmt: skip
    config = jaxadapt.LoraConfig(r=2, target_modules=["w1"], use_dora=True)
    jaxadapt.write(jaxadapt.PeftTensors(config, tensors), tmp_path / "in")
    assert "without DoRA" in refusal(tmp_path, "mlx", base=tmp_path)


@pytest.mark.parametrize("fields", [{"num_local_experts": 0}, {"num_local_experts": 16, "moe_layers": []}])
def test_a_dense_llama4_has_its_own_names_in_mlx(fields, tmp_path):
    """mlx-lm 0.32.2 reads `llama4_text` without experts by a model of its own, and drops unknown names silently."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama4_text", **fields}))
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    tensors = {key.format(side): np.ones((2, 2), "float32") for side in "AB"}
    config = jaxadapt.LoraConfig(r=2, target_modules=["q_proj"])
    export_adapter(jaxadapt.PeftTensors(config, tensors), tmp_path / "mlx", "mlx", base=tmp_path)
    assert {*load_file(tmp_path / "mlx/adapters.safetensors")} == {
        f"model.layers.0.self_attn.q_proj.lora_{side}" for side in "ab"
    }
