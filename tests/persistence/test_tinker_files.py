"""Tinker's downloaded adapters under PEFT's names: a weight changes by lora_alpha / r · B·A of Tinker's tensors."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import jaxadapt
from jaxadapt.cli import main
from jaxadapt.core import paths
from jaxadapt.export.conversion import TreeOptions, convert
from jaxadapt.models import LoraTree

P, RANK, ALPHA, HIDDEN, WIDE, EXPERTS, VOCABULARY = "base_model.model.", 2, 6, 8, 12, 3, 16
SETTINGS = {"r": RANK, "lora_alpha": ALPHA}
WHOLE = {**SETTINGS, "peft_type": "LORA", "target_modules": "all-linear", "base_model_name_or_path": "org/base"}
DENSE = {
    **{f"self_attn.{end}": shape for end, shape in zip(("q_proj", "k_proj"), ((8, 8), (4, 8)), strict=True)},
    **{f"mlp.{end}": shape for end, shape in zip(("gate_proj", "down_proj"), ((12, 8), (8, 12)), strict=True)},
}
ATTENTION = {name: shape for name, shape in DENSE.items() if name.startswith("self_attn")}
HEADS = ("model.unembed_tokens", "model.lm_head")
NAMES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
TOKENS = [[3, 7, 1, 9, 4, 2]]

Tensors = dict[str, np.ndarray]


def pair(module: str, a: tuple[int, ...], b: tuple[int, ...], seed: int) -> Tensors:
    random = np.random.default_rng(seed)
    shapes = {"A": a, "B": b}
    return {f"{P}{module}.lora_{s}.weight": 0.3 * random.standard_normal(x, "f4") for s, x in shapes.items()}


def dense(modules: Mapping[str, tuple[int, int]], head: str = "model.unembed_tokens", rank: int = RANK) -> Tensors:
    """Two layers and the head, as Tinker names them."""
    shapes = {f"model.layers.{n}.{name}": shape for n in range(2) for name, shape in modules.items()}
    shapes |= {head: (VOCABULARY, HIDDEN)}
    found: Tensors = {}
    for seed, (name, (out, inputs)) in enumerate(shapes.items()):
        found |= pair(name, (rank, inputs), (out, rank), seed)
    return found


def experts(shared: bool, rank: int = RANK) -> Tensors:
    """The experts of two layers; shared: one A for the inputs of the block, and one B for its outputs."""
    found: Tensors = {}
    one = 1 if shared else EXPERTS
    for layer in range(2):
        module = f"model.layers.{layer}.mlp.experts"
        found |= pair(f"{module}.w1", (one, rank, HIDDEN), (EXPERTS, WIDE, rank), 50 + layer)
        found |= pair(f"{module}.w3", (one, rank, HIDDEN), (EXPERTS, WIDE, rank), 60 + layer)
        found |= pair(f"{module}.w2", (EXPERTS, rank, WIDE), (one, HIDDEN, rank), 70 + layer)
    return found


def changes(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """{PyTorch's module: the change of its weight}, by Tinker's own rule."""
    found: Tensors = {}
    for key, a in tensors.items():
        module = key.removeprefix(P).removesuffix(".lora_A.weight")
        if module == key.removeprefix(P):
            continue
        change = ALPHA / RANK * np.matmul(tensors[f"{P}{module}.lora_B.weight"], a)
        block, _, name = module.rpartition(".")
        if name in NAMES:
            found |= {f"{block}.{e}.{NAMES[name]}": change[e] for e in range(len(change))}
        else:
            found["lm_head" if name == "unembed_tokens" else module] = change
    return found


def joint_changes(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """{PyTorch's weight or parameter: its change}, as Tinker's cookbook adds them to weights that hold several."""
    scale, found = ALPHA / RANK, dict[str, np.ndarray]()
    is_qwen35 = any(".in_proj_q." in key for key in tensors)  # transformers has its experts as (out, in), GPT-OSS' not
    for key, a in tensors.items():
        module = key.removeprefix(P).removesuffix(".lora_A.weight")
        if module == key.removeprefix(P) or not a.size:
            continue
        change = scale * np.matmul(tensors[f"{P}{module}.lora_B.weight"], a)  # (…, out, in)
        owner, _, name = module.replace("backbone.", "model.").replace(".attn.", ".self_attn.").rpartition(".")
        if name[:8] == "in_proj_":  # queries, keys and values are in the file in this order
            weight = f"{owner}.in_proj_qkv.weight"
            found[weight] = np.concatenate([*([found[weight]] if weight in found else []), change])
        elif name in NAMES and ".mixer." in owner:
            found[f"{owner}.{'up_proj' if name == 'w1' else 'down_proj'}"] = change
        elif name == "w2":
            found[f"{owner}.down_proj"] = change if is_qwen35 else change.swapaxes(1, 2)
        elif name in NAMES and is_qwen35:
            both = found.setdefault(f"{owner}.gate_up_proj", np.zeros((EXPERTS, 2 * WIDE, HIDDEN), "f4"))
            both[:, slice(WIDE) if name == "w1" else slice(WIDE, None)] = change
        elif name in NAMES:
            both = found.setdefault(f"{owner}.gate_up_proj", np.zeros((EXPERTS, HIDDEN, 2 * WIDE), "f4"))
            both[:, :, int(name == "w3") :: 2] = change.swapaxes(1, 2)
        else:
            found["lm_head.weight" if module in HEADS else f"{owner}.{name}.weight"] = change
    return found


def write(folder: Path, tensors: Tensors, settings: Mapping[str, Any] = SETTINGS) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def peft_changes(tensors: jaxadapt.PeftTensors) -> Tensors:
    """{module: the change of its weight}, as PEFT computes it."""
    config, arrays, found = tensors.config, tensors.tensors, dict[str, np.ndarray]()
    assert isinstance(config, jaxadapt.LoraConfig)
    for key in arrays:
        module = key.removeprefix(P).removesuffix(".lora_A.weight")
        if key.endswith(".lora_A.weight"):
            scale = config.alpha_of(module) / config.rank_of(module)
            found[module] = scale * arrays[f"{P}{module}.lora_B.weight"] @ arrays[key]
    return found


CASES = {
    "dense": dense(DENSE),
    "shared": dense(ATTENTION) | experts(shared=True),
    "own": dense(ATTENTION) | experts(shared=False),
    "another rank": dense(ATTENTION, rank=4) | experts(shared=True, rank=1),
}


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("settings", [SETTINGS, WHOLE], ids=["bare", "whole"])
@pytest.mark.parametrize("case", CASES)
def test_the_change_of_each_module_is_tinkers(case: str, settings: dict[str, Any], tmp_path: Path):
    source = write(tmp_path / "tinker", CASES[case], settings)
    expected = changes(CASES[case])
    convert(source, tmp_path / "peft")
    for tensors in (jaxadapt.read(source), jaxadapt.read(tmp_path / "peft")):
        found = peft_changes(tensors)
        assert found.keys() == expected.keys()
        for module, change in expected.items():
            np.testing.assert_allclose(found[module], change, rtol=1e-6, atol=1e-6)  # float32, another order
        assert all(x.ndim == 2 for x in tensors.tensors.values())
    assert jaxadapt.read_config(source) == jaxadapt.read(source).config == jaxadapt.read_config(tmp_path / "peft")


def test_the_tensors_are_the_bytes_of_the_file(tmp_path: Path):
    read = jaxadapt.read(write(tmp_path / "tinker", CASES["shared"])).tensors
    for expert in range(EXPERTS):
        module = f"{P}model.layers.1.mlp.experts.{expert}.down_proj.lora_"
        stored = f"{P}model.layers.1.mlp.experts.w2.lora_"
        np.testing.assert_array_equal(read[f"{module}A.weight"], CASES["shared"][f"{stored}A.weight"][expert])
        np.testing.assert_array_equal(read[f"{module}B.weight"], CASES["shared"][f"{stored}B.weight"][0])
    assert len(read) == 2 * len(changes(CASES["shared"]))


def test_the_configuration(tmp_path: Path):
    config: Any = jaxadapt.read_config(write(tmp_path / "a", CASES["shared"], WHOLE))
    assert (config.r, config.lora_alpha, config.base_model_name_or_path) == (RANK, ALPHA, "org/base")
    assert set(config.target_modules) == {"q_proj", "k_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}
    some = {key: x for key, x in CASES["dense"].items() if "layers.0.mlp" not in key}  # not in every layer
    config = jaxadapt.read_config(write(tmp_path / "b", some))
    mlp = {f"model.layers.1.mlp.{end}_proj" for end in ("gate", "down")}
    assert set(config.target_modules) == {"q_proj", "k_proj", "lm_head"} | mlp


def test_every_command_takes_the_folder(tmp_path: Path):
    source = write(tmp_path / "tinker", CASES["shared"])
    convert(source, tmp_path / "peft")
    info, same = jaxadapt.inspect(source), jaxadapt.inspect(tmp_path / "peft")
    assert (info.tensors, info.config, info.form, same.form) == (same.tensors, same.config, "Tinker's folder", "PEFT")
    assert "jaxadapt convert" in CliRunner().invoke(main, ["inspect", str(source)]).output
    assert jaxadapt.analysis.diff(jaxadapt.read(source), jaxadapt.read(tmp_path / "peft")).is_equal
    (found, *notes) = jaxadapt.verify(source)
    assert (found.code, found.remedy) == ("other-library", f"run: jaxadapt convert {source} OUT")
    assert [each.code for each in notes] == ["method", "scale"]
    assert not [each for each in jaxadapt.verify(tmp_path / "peft") if each.severity != "note"]
    assert jaxadapt.read(source, repair=True).tensors.keys() == jaxadapt.read(source).tensors.keys()


def test_a_file_of_pefts_stays_pefts(tmp_path: Path):
    """PEFT's names for the same projections, with and without jaxadapt's copy of the configuration."""
    names = [f"model.layers.0.block_sparse_moe.experts.{e}.w1" for e in range(2)]
    tensors = {key: x for name in names for key, x in pair(name, (RANK, 8), (8, RANK), 1).items()}
    settings = {**SETTINGS, "peft_type": "LORA", "target_modules": ["w1"]}
    assert jaxadapt.inspect(write(tmp_path / "a", tensors, settings)).form == "PEFT"
    own = pair("experts.w1", (RANK, 8), (8, RANK), 1)  # a model whose module has this name
    assert jaxadapt.inspect(write(tmp_path / "c", own, settings)).form == "PEFT"
    jaxadapt.write(jaxadapt.PeftTensors(jaxadapt.LoraConfig(r=RANK, target_modules=["w1"]), own), tmp_path / "b")
    assert jaxadapt.inspect(tmp_path / "b").form == "PEFT"
    assert jaxadapt.read(tmp_path / "b").tensors.keys() == own.keys()


# ---------------------------------------------------------------- PEFT


def tiny(kind: str, **fields: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": WIDE, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "tie_word_embeddings": False,
        "max_position_embeddings": 32,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}TextConfig" if kind.startswith("Qwen3_5") else f"{kind}Config")(
        **sizes | fields
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for weight in model.parameters():  # an untrained model's logits are nearly zero
            weight.copy_(0.4 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())))
    return model


MODELS = {
    "dense": ("Qwen3", {}),
    "llama": ("Llama", {}),
    "shared": ("Qwen3Moe", {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": WIDE}),
    "own": ("Qwen3Moe", {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": WIDE}),
}


@pytest.mark.peft
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")  # of PEFT's own patterns for experts
@pytest.mark.parametrize("case", MODELS)
def test_peft_computes_what_the_merged_weights_compute(case: str, tmp_path: Path):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    kind, fields = MODELS[case]
    tensors = CASES["dense" if case == "llama" else case]
    convert(write(tmp_path / "tinker", tensors), tmp_path / "peft")
    base, merged, tokens = tiny(kind, **fields), tiny(kind, **fields), torch.tensor(TOKENS)
    state, used = merged.state_dict(), 0
    with torch.no_grad():
        for module, change in changes(tensors).items():
            add = torch.from_numpy(change)
            if match := re.fullmatch(r"(.+)\.experts\.(\d+)\.(gate|up|down)_proj", module):
                joint = "down_proj" if match[3] == "down" else "gate_up_proj"
                rows = {"gate": slice(0, WIDE), "up": slice(WIDE, None), "down": slice(None)}[match[3]]
                state[f"{match[1]}.experts.{joint}"][int(match[2]), rows] += add
            else:
                state[f"{module}.weight"] += add
            used += 1
        before, expected = base(tokens).logits, merged(tokens).logits
        model = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()
        found = model(tokens).logits
    assert used == len(changes(tensors))
    assert (expected - before).abs().max() > 0.5
    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=1e-4)  # float32, sums in another order


# {family: (class, its settings, its tensors, target_parameters)}, where several modules of Tinker are one weight
GROUPED = {f"attn.{end}": shape for end, shape in (("q_proj", (8, 8)), ("o_proj", (8, 8)))}
LINEAR = {f"linear_attn.in_proj_{end}": shape for end, shape in (("q", (8, 8)), ("k", (8, 8)), ("v", (16, 8)))}
LINEAR_LAYER = LINEAR | {"linear_attn.out_proj": (8, 16), "mlp.up_proj": (12, 8)}
GATED = {"self_attn.q_proj": (16, 8), "self_attn.k_proj": (4, 8), "mlp.up_proj": (12, 8)}


def in_layer(number: int, modules: Mapping[str, tuple[int, int]], root: str = "model", rank: int = RANK) -> Tensors:
    shapes = {f"{root}.layers.{number}.{name}": shape for name, shape in modules.items()}
    pairs = (pair(name, (rank, i), (o, rank), len(name) + number) for name, (o, i) in shapes.items())
    return {key: x for found in pairs for key, x in found.items()}


def nemotron() -> Tensors:
    block = f"{P}backbone.layers.1.mixer.experts"
    found = in_layer(0, {"mixer.q_proj": (8, 8), "mixer.o_proj": (8, 8)}, "backbone")
    found |= in_layer(1, {"mixer.shared_experts.up_proj": (12, 8)}, "backbone")
    found |= pair(block.removeprefix(P) + ".w1", (1, RANK, HIDDEN), (EXPERTS, WIDE, RANK), 50)
    found |= pair(block.removeprefix(P) + ".w2", (EXPERTS, RANK, WIDE), (1, HIDDEN, RANK), 51)
    found |= {f"{block}.w3.lora_{side}.weight": np.zeros(0, "f4") for side in "AB"}
    return found | pair("model.lm_head", (RANK, HIDDEN), (VOCABULARY, RANK), 52)


HYBRID = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 4, "linear_value_head_dim": 4,
}  # fmt: skip
SHARED_EXPERT = {"mlp.shared_expert.up_proj": (12, 8)}
JOINT: dict[str, tuple[str, dict[str, Any], Tensors, tuple[str, ...]]] = {
    "gpt-oss": (
        "GptOss", {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2},
        dense(GROUPED) | experts(shared=True), ("experts.gate_up_proj", "experts.down_proj"),
    ),
    "gpt-oss, parts": (  # another rank, experts' own factors, one layer without gate and one without down
        "GptOss", {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2},
        in_layer(0, GROUPED) | {
            key: x for key, x in experts(shared=False, rank=3).items()
            if "0.mlp.experts.w1" not in key and "1.mlp.experts.w2" not in key
        },
        tuple(f"model.layers.{n}.mlp.experts.{name}" for n, name in
              ((0, "gate_up_proj"), (1, "gate_up_proj"), (0, "down_proj"))),
    ),
    "qwen3.5": (
        "Qwen3_5", HYBRID,
        in_layer(0, LINEAR_LAYER) | in_layer(1, GATED) | pair("model.unembed_tokens", (RANK, 8), (VOCABULARY, RANK), 3),
        (),
    ),
    "qwen3.5, experts": (  # one layer without gate
        "Qwen3_5Moe", HYBRID | {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": WIDE,
                                "shared_expert_intermediate_size": WIDE},
        in_layer(0, LINEAR | SHARED_EXPERT) | in_layer(1, {"self_attn.q_proj": (16, 8)} | SHARED_EXPERT)
        | {key: x for key, x in experts(shared=True).items() if "1.mlp.experts.w1" not in key},
        ("experts.gate_up_proj", "experts.down_proj"),
    ),
    "nemotron": (
        "NemotronH", {"layers_block_type": ["attention", "moe", "mamba"], "num_hidden_layers": 3, "n_groups": 1,
                      "n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": WIDE,
                      "moe_shared_expert_intermediate_size": WIDE, "ssm_state_size": 4, "mamba_num_heads": 2,
                      "mamba_head_dim": 4},
        nemotron(), ("experts.up_proj", "experts.down_proj"),
    ),
}  # fmt: skip


@pytest.mark.peft
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")  # PEFT looks for modules only
@pytest.mark.parametrize("case", JOINT)
def test_peft_computes_the_weights_that_hold_several_modules(case: str, tmp_path: Path):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    kind, fields, tensors, parameters = JOINT[case]
    source = write(tmp_path / "tinker", tensors)
    convert(source, tmp_path / "peft")
    read, expected = jaxadapt.read(source), joint_changes(tensors)
    assert sorted(read.config.get("target_parameters") or ()) == sorted(parameters)
    assert read.config == jaxadapt.read_config(tmp_path / "peft")
    base, tokens = tiny(kind, **fields), torch.tensor(TOKENS)
    merged = copy.deepcopy(base)
    state = merged.state_dict()
    assert expected.keys() <= state.keys()
    with torch.no_grad():
        before = base(tokens, use_cache=False).logits
        for name, change in expected.items():
            state[name] += torch.from_numpy(change)
        after = merged(tokens, use_cache=False).logits
        model = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()  # a key too few is a warning
        found = model(tokens, use_cache=False).logits
    assert (after - before).abs().max() > 0.1
    np.testing.assert_allclose(found.numpy(), after.numpy(), atol=1e-4)  # float32, sums in another order
    assert not [each for each in jaxadapt.verify(tmp_path / "peft") if each.severity != "note"]


@pytest.mark.peft
def test_merge_changes_the_weights_of_a_folder_as_tinker_does(tmp_path: Path):
    tensors, (kind, fields) = CASES["shared"], MODELS["shared"]
    tiny(kind, **fields).save_pretrained(tmp_path / "base")
    source, out = write(tmp_path / "tinker", tensors), tmp_path / "merged"
    done = CliRunner().invoke(main, ["merge", str(tmp_path / "base"), str(source), "--out", str(out)])
    assert done.exit_code == 0, done.output
    base, merged = (load_file(folder / "model.safetensors") for folder in (tmp_path / "base", out))
    expected = {f"{module}.weight": change for module, change in changes(tensors).items()}
    assert expected.keys() <= base.keys() == merged.keys()
    for key, weight in base.items():
        np.testing.assert_allclose(merged[key], weight + expected.get(key, 0), atol=1e-5)


# ---------------------------------------------------------------- JAX


def test_a_jax_model_loads_the_folder(tmp_path: Path):
    expected = changes(CASES["dense"])
    base = paths.unflatten({f"{name}.kernel": np.zeros(x.shape[::-1], "f4") for name, x in expected.items()})
    loaded = jaxadapt.load(write(tmp_path / "tinker", CASES["dense"]), {"params": base})
    merged: Any = jaxadapt.merge(loaded)["params"]
    for name, change in expected.items():
        node = merged
        for part in name.split("."):
            node = node[part]
        np.testing.assert_allclose(node["kernel"], change.T, atol=1e-5)


def qwen3_moe() -> dict[str, Any]:
    """The parameters of a JAX model, all zero, with the experts of a layer in two arrays."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.embedding": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,),
        "lm_head.kernel": (HIDDEN, VOCABULARY),
    }  # fmt: skip
    for n in range(2):
        layer = {
            "self_attn.q_proj.kernel": (8, 8), "self_attn.k_proj.kernel": (8, 4), "self_attn.v_proj.kernel": (8, 4),
            "self_attn.o_proj.kernel": (8, 8), "self_attn.q_norm.weight": (4,), "self_attn.k_norm.weight": (4,),
            "input_layernorm.weight": (HIDDEN,), "post_attention_layernorm.weight": (HIDDEN,),
            "mlp.gate.kernel": (HIDDEN, EXPERTS), "mlp.experts.gate_up_proj": (EXPERTS, HIDDEN, 2 * WIDE),
            "mlp.experts.down_proj": (EXPERTS, WIDE, HIDDEN),
        }  # fmt: skip
        shapes |= {f"model.layers.{n}.{name}": shape for name, shape in layer.items()}
    return {"params": paths.unflatten({name: np.zeros(shape, "f4") for name, shape in shapes.items()})}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("case", ["shared", "own"])
def test_a_jax_model_of_experts_loads_the_folder(case: str, fused: bool, tmp_path: Path):
    """gate and up have an A each, so that a joint array needs their ranks concatenated: on loading, or in a file."""
    source, expected = write(tmp_path / "tinker", CASES[case]), changes(CASES[case])
    with pytest.raises(jaxadapt.MismatchError, match=r'gate_up_proj.*on_shared="concat"'):
        jaxadapt.load(source, qwen3_moe())
    if fused:
        options = TreeOptions(from_keymap="qwen3_moe/per-expert", to_keymap="qwen3_moe", on_shared="concat")
        convert(source, tmp_path / "fused", options)
        config: Any = jaxadapt.read_config(tmp_path / "fused")
        assert config.target_parameters == ("experts.gate_up_proj", "experts.down_proj")
        loaded = jaxadapt.load(tmp_path / "fused", qwen3_moe())
    else:
        loaded = jaxadapt.load(source, LoraTree(qwen3_moe(), on_shared="concat"))
    merged: Any = jaxadapt.merge(loaded)["params"]
    np.testing.assert_allclose(merged["lm_head"]["kernel"], expected["lm_head"].T, atol=1e-5)
    for layer in range(2):
        block = merged["model"]["layers"][str(layer)]["mlp"]["experts"]
        for expert in range(EXPERTS):
            gate, up, down = (
                expected[f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj"].T for name in ("gate", "up", "down")
            )
            joint = np.concatenate([gate, up], axis=1)
            np.testing.assert_allclose(block["gate_up_proj"][expert], joint, atol=1e-5)
            np.testing.assert_allclose(block["down_proj"][expert], down, atol=1e-5)


def gpt_oss() -> dict[str, Any]:
    """The parameters of a JAX model, all zero."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.embedding": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,),
        "lm_head.kernel": (HIDDEN, VOCABULARY),
    }  # fmt: skip
    for n in range(2):
        layer = {
            **{f"self_attn.{name}_proj.kernel": (8, 4 if name in "kv" else 8) for name in "qkvo"},
            **{f"self_attn.{name}_proj.bias": (4 if name in "kv" else 8,) for name in "qkvo"},
            "self_attn.sinks": (2,), "input_layernorm.weight": (8,), "post_attention_layernorm.weight": (8,),
            "mlp.router.kernel": (HIDDEN, EXPERTS), "mlp.router.bias": (EXPERTS,),
            "mlp.experts.gate_up_proj": (EXPERTS, HIDDEN, 2 * WIDE), "mlp.experts.gate_up_proj_bias": (EXPERTS, 24),
            "mlp.experts.down_proj": (EXPERTS, WIDE, HIDDEN), "mlp.experts.down_proj_bias": (EXPERTS, HIDDEN),
        }  # fmt: skip
        shapes |= {f"model.layers.{n}.{name}": shape for name, shape in layer.items()}
    return {"params": paths.unflatten({name: np.zeros(shape, "f4") for name, shape in shapes.items()})}


def test_a_jax_gpt_oss_loads_the_folder(tmp_path: Path):
    tensors = JOINT["gpt-oss"][2]
    merged: Any = jaxadapt.merge(jaxadapt.load(write(tmp_path / "tinker", tensors), gpt_oss()))["params"]
    for name, change in joint_changes(tensors).items():
        node = merged
        for part in name.removesuffix(".weight").split("."):
            node = node[part]
        found = node["kernel"].T if name.endswith(".weight") else node
        np.testing.assert_allclose(found, change, atol=1e-5)


def test_experts_that_the_cookbook_has_converted_are_read(tmp_path: Path):
    """Its adapters of Qwen 3.5 have single experts beside in_proj_q, in_proj_k and in_proj_v."""
    experts = {f"mlp.experts.{expert}.gate_proj": (WIDE, HIDDEN) for expert in range(EXPERTS)}
    tensors = in_layer(0, LINEAR | experts, "model.language_model")
    found = peft_changes(jaxadapt.read(write(tmp_path / "tinker", tensors)))
    expected = {name.removesuffix(".weight"): x for name, x in joint_changes(tensors).items()}
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        np.testing.assert_allclose(found[name], change, atol=1e-6)


def test_16_bit_tensors_keep_their_bits(tmp_path: Path):
    """Joined weights are made of the file's own numbers and zeros."""
    tensors = {key: x.astype(ml_dtypes.bfloat16) for key, x in JOINT["gpt-oss"][2].items()}
    read = jaxadapt.read(write(tmp_path / "tinker", tensors)).tensors
    block = f"{P}model.layers.1.mlp.experts"
    a, b = (read[f"{block}.base_layer.lora_{side}.weight"] for side in "AB")
    assert {x.dtype.name for x in read.values()} == {"bfloat16"}
    assert (a.shape, b.shape) == ((EXPERTS * 2 * RANK, HIDDEN), (2 * WIDE, 2 * RANK * EXPERTS))
    up = b.reshape(2 * WIDE, 2 * RANK, EXPERTS)[1::2, RANK:, 2]
    np.testing.assert_array_equal(up, tensors[f"{block}.w3.lora_B.weight"][2])
    assert not b.reshape(2 * WIDE, 2 * RANK, EXPERTS)[1::2, :RANK].any()


# ---------------------------------------------------------------- refused

W1, Q = "model.layers.0.mlp.experts.w1", "model.layers.0.self_attn.q_proj"
BROKEN: dict[str, tuple[Tensors, str]] = {
    "no B": ({f"{P}{W1}.lora_A.weight": np.ones((3, 2, 8), "f4")}, rf"{W1}: expected lora_A.weight and lora_B.weight"),
    "matrix": (pair(W1, (2, 8), (8, 2), 0), rf"{W1}: expected A \(experts, r, in\).*found \[2, 8\] and \[8, 2\]"),
    "ranks": (pair(W1, (3, 2, 8), (3, 8, 4), 0), rf"{W1}: expected A .*found \[3, 2, 8\] and \[3, 8, 4\]"),
    "counts": (pair(W1, (2, 2, 8), (3, 8, 2), 0), rf"{W1}: expected as many experts.*found 2 and 3"),
    "too many": (pair(W1, (1, 1, 8), (4097, 1, 1), 0), rf"{W1}: expected at most 4096 experts, found 4097"),
    "both shared": (pair(W1, (1, 2, 8), (1, 8, 2), 0), rf"{W1}: A and B are both shared"),
    "empty": (pair(W1, (0, 2, 8), (0, 8, 2), 0), rf"{W1}: expected A .*found \[0, 2, 8\]"),
    "stacked": (pair(Q, (3, 2, 8), (3, 8, 2), 0), rf"{Q}: expected A \(r, in\) and B \(out, r\)"),
    "elsewhere": (pair("model.layers.0.moe.experts.w1", (3, 2, 8), (3, 8, 2), 0), "the names in Tinker's source"),
    "another name": ({f"{P}model.layers.0.other": np.ones(2, "f4")}, r"layers.0.other: expected base_model.model.<mod"),
    "integers": (
        {f"{P}{Q}.lora_{s}.weight": np.ones((2, 2), "i4") for s in "AB"}, f"{Q}: expected floating-point numbers",
    ),
    "two heads": (pair("model.lm_head", (2, 8), (16, 2), 0), "model.unembed_tokens: lm_head has an adapter already"),
    "embedding": (pair("model.embed_tokens", (2, 8), (16, 2), 0), "model.embed_tokens: .*no adapter of the token"),
    "Nemotron": (pair("backbone.layers.0.mixer.x_proj", (2, 8), (8, 2), 0), "x_proj: Nemotron: .*rows of in_proj"),
    "Nemotron's gate": (pair("model.layers.0.mixer.experts.w3", (1, 2, 8), (3, 8, 2), 0), r"w3: Nemotron: .*no gate"),
    "Nemotron twice": (
        pair("model.layers.0.mixer.experts.w1", (1, 2, 8), (3, 8, 2), 0)
        | pair("backbone.layers.0.mixer.experts.w1", (1, 2, 8), (3, 8, 2), 0), "experts.up_proj is there twice",
    ),
    "Qwen 3.5": (
        pair("model.layers.0.linear_attn.in_proj_q", (2, 8), (8, 2), 0), "in_proj_qkv: .*all three, found in_proj_q$",
    ),
    "Qwen 3.5's inputs": (
        in_layer(0, {f"linear_attn.in_proj_{end}": (8, 8 + (end == "v")) for end in "qkv"}),
        "found inputs 8 and 8 and 9",
    ),
    "GPT-OSS": (
        pair("model.layers.0.attn.q_proj", (2, 8), (8, 2), 0) | pair(W1, (1, 2, 8), (3, 8, 2), 0)
        | pair(W1.replace("w1", "w3"), (1, 2, 8), (4, 9, 2), 0),
        "gate_up_proj: the parts .* found outputs 8 and 9; experts 3 and 4",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_an_error_names_the_tensor(case: str, tmp_path: Path):
    tensors, message = BROKEN[case]
    source = write(tmp_path / "tinker", pair("model.unembed_tokens", (2, 8), (16, 2), 9) | tensors)
    with pytest.raises(jaxadapt.MismatchError, match=message):
        jaxadapt.read(source)
    (found,) = jaxadapt.verify(source)
    assert (found.code, found.severity) == ("other-library", "error")
    assert re.search(message, found.found, re.DOTALL)
    done = CliRunner().invoke(main, ["convert", str(source), str(tmp_path / "out")])
    assert (done.exit_code, (tmp_path / "out").exists()) == (1, False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 2}, "expected a JSON object with r and lora_alpha"),
        ({**WHOLE, "peft_type": "IA3"}, "IA3|r"),
        ({**WHOLE, "use_rslora": True}, "use_rslora: expected False, found True"),
        ({**WHOLE, "use_dora": True}, "use_dora"),
        ({**WHOLE, "alpha_pattern": {"q_proj": 3}}, "alpha_pattern"),
        ({**WHOLE, "lora_alpha": "six"}, "lora_alpha"),
        ({**WHOLE, "r": 0}, "r: expected"),
    ],
)
def test_a_configuration_with_another_scale_is_refused(settings: dict[str, Any], message: str, tmp_path: Path):
    source = write(tmp_path / "tinker", CASES["dense"], settings)
    with pytest.raises(jaxadapt.ConfigError, match=message):
        jaxadapt.read(source)
    assert "error" in {found.severity for found in jaxadapt.verify(source)}


def test_gpt_oss_attention_has_the_name_of_transformers(tmp_path: Path):
    tensors = pair("model.layers.0.attn.q_proj", (2, 8), (8, 2), 0) | pair("model.unembed_tokens", (2, 8), (16, 2), 1)
    found = peft_changes(jaxadapt.read(write(tmp_path / "tinker", tensors)))
    assert found.keys() == {Q, "lm_head"}


def test_experts_alone_are_read_if_the_base_has_a_name(tmp_path: Path):
    """PEFT would take GPT-OSS' for those of a model with gate and up one after the other, without an error."""
    alone = {key: x for key, x in JOINT["gpt-oss"][2].items() if ".attn." not in key}
    with pytest.raises(jaxadapt.MismatchError, match=r"experts.w1: .*set base_model_name_or_path in adapter_config"):
        jaxadapt.read(write(tmp_path / "unnamed", alone))
    for base, parameters in (("openai/gpt-oss-20b", ("experts.gate_up_proj", "experts.down_proj")), ("org/moe", None)):
        settings = {**SETTINGS, "base_model_name_or_path": base}
        found = jaxadapt.read(write(tmp_path / base.replace("/", "-"), alone, settings)).config
        assert found.get("target_parameters") == parameters
    other = CASES["own"] | {f"{P}{Q}.lora_{s}.weight": np.ones((2, 2), "f4") for s in "AB"}
    settings = {**SETTINGS, "base_model_name_or_path": "org/moe-like-gpt-oss"}  # the modules tell it
    assert jaxadapt.read(write(tmp_path / "other", other, settings)).config.get("target_parameters") is None


def test_nothing_writes_tinkers_files(tmp_path: Path):
    source = write(tmp_path / "tinker", CASES["dense"])
    done = CliRunner().invoke(main, ["convert", str(source), str(tmp_path / "out"), "--format", "tinker"])
    assert done.exit_code != 0
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(main, ["export", str(source), "--for", "tinker", "--out", str(tmp_path / "out")])
    assert (done.exit_code, (tmp_path / "out").exists()) == (1, False)
    assert "found 'tinker'" in done.output
    with pytest.raises(jaxadapt.ConfigError, match="found 'tinker'"):
        jaxadapt.export.export_adapter(source, tmp_path / "out", "tinker")
    jaxadapt.write(jaxadapt.read(source), tmp_path / "peft")
    assert load_file(tmp_path / "peft" / "adapter_model.safetensors").keys() == jaxadapt.read(source).tensors.keys()
