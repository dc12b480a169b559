"""Adapters of experts for vLLM: PEFT computes the same from the written form, and vLLM has a place for each tensor.

`recorded_vllm_modules.json` has the names of the modules that vLLM 0.32.0 reads, as `tests/full/programs/
run_vllm_experts.py` wrote them. tests/full/test_programs.py compares what vLLM makes of the files with PEFT.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import peft
import torch
from safetensors.numpy import load_file

import jaxadapt
from jaxadapt.export import export_adapter
from tests.keymaps.families import torch_side
from tests.support import peft_harness as harness

pytestmark = [
    pytest.mark.peft,
    pytest.mark.filterwarnings(
        "ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"
    ),  # PEFT's own, of its conversion
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

MODULES: dict[str, dict[str, list[str]]] = json.loads(
    Path(__file__).with_name("recorded_vllm_modules.json").read_text()
)
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"target_parameters": [*BOTH, "mlp.gate.weight"], "target_modules": ["o_proj"]}),
    "mixtral, gate and up": ("mixtral", {"target_parameters": BOTH[:1], "target_modules": []}),
    "mixtral, ranks": (
        "mixtral",
        {"target_parameters": BOTH, "target_modules": ["q_proj"], "rank_pattern": {"down_proj": 4},
         "alpha_pattern": {"gate_up_proj": 5}, "use_rslora": True},
    ),
    "qwen3_moe, gate and up of another rank": (
        "qwen3_moe",
        {"target_parameters": BOTH[:1], "target_modules": ["o_proj"], "rank_pattern": {"gate_up_proj": 4}},
    ),
    "qwen3_moe": ("qwen3_moe", {"target_parameters": [*BOTH, "mlp.gate.weight"], "target_modules": ["v_proj"]}),
    "deepseek_v3": ("deepseek_v3", {"target_parameters": BOTH[1:], "target_modules": ["o_proj"]}),
    "llama4": ("llama4", {"target_parameters": [*BOTH, "router.weight"], "target_modules": ["o_proj"]}),
    "llama4, down": ("llama4", {"target_parameters": BOTH[1:], "target_modules": []}),
    "gpt_oss": ("gpt_oss", {"target_parameters": [*BOTH, "router.weight"], "target_modules": ["o_proj"]}),
    "gpt_oss, gate and up": ("gpt_oss", {"target_parameters": BOTH[:1], "target_modules": []}),
    "gpt_oss, down": ("gpt_oss", {"target_parameters": BOTH[1:], "target_modules": [], "use_rslora": True}),
}  # fmt: skip
"""{case: (model, fields of PEFT's configuration)}."""


def logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.arange(12).reshape(2, 6)).logits.numpy()


def written(case: str, folder: Path) -> tuple[Any, Any]:
    """Write PEFT's adapter and its export for vLLM; return the base and PEFT's model."""
    kind, fields = CASES[case]
    base = copy.deepcopy(torch_side.base(kind))
    model = harness.make_peft(base, peft.LoraConfig(r=2, lora_alpha=3, **copy.deepcopy(fields)))
    harness.save(model, folder / "in")
    base.config.save_pretrained(folder / "base")
    export_adapter(folder / "in", folder / "out", "vllm", base=folder / "base")
    return torch_side.base(kind), model


def modules_of(folder: Path) -> list[str]:
    keys = load_file(folder / "adapter_model.safetensors")
    return [key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in keys]


@pytest.mark.parametrize("case", CASES)
def test_peft_computes_the_same_and_vllm_has_the_modules(case: str, tmp_path: Path):
    base, model = written(case, tmp_path)
    kind, _ = CASES[case]
    known = set[str]().union(*MODULES[base.config.model_type].values())
    assert {in_vllm(kind, name) for name in modules_of(tmp_path / "out")} <= known
    config = jaxadapt.read_config(tmp_path / "out")
    assert config.get("r") == config.get("lora_alpha")
    want, alone = logits(model), logits(base)
    assert abs(want - alone).max() > 1e-2
    if kind == "llama4":  # PEFT has no single experts of Llama 4
        merged = merged_llama4(base, tmp_path / "out")
    else:
        merged = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out").eval()
    # float32: only the order of the multiplications differs
    np.testing.assert_allclose(logits(merged), want, atol=2e-5 * max(1, abs(want).max()))


def merged_llama4(base: Any, folder: Path) -> Any:
    """Add each pair's B·A to the weight of the module that it names."""
    model, tensors = copy.deepcopy(base), load_file(folder / "adapter_model.safetensors")
    weights = dict(model.named_parameters())
    for name in dict.fromkeys(modules_of(folder)):
        a, b = (torch.from_numpy(tensors[f"base_model.model.{name}.lora_{side}.weight"]) for side in "AB")
        owner, _, rest = name.partition(".experts.")
        if not rest:
            weights[f"{name}.weight"].data += b @ a
            continue
        number, _, projection = rest.partition(".")
        if projection == "down_proj":
            weights[f"{owner}.experts.down_proj"].data[int(number)] += (b @ a).T
        else:
            size = len(b)
            half = slice(size) if projection == "gate_proj" else slice(size, 2 * size)
            weights[f"{owner}.experts.gate_up_proj"].data[int(number), :, half] += (b @ a).T
    return model


def in_vllm(kind: str, module: str) -> str:
    """Return the name in the second layer under which vLLM looks for a module of a file."""
    name = re.sub(r"\.layers\.\d+\.", ".layers.1.", module).removesuffix(".base_layer")
    return name.replace(".self_attn.", ".attn.") if kind == "gpt_oss" else name


def adapter(parameters: list[str]) -> jaxadapt.PeftTensors:
    key = "base_model.model.model.layers.0.mlp.experts.lora_{}.weight"
    tensors = {key.format("A"): np.ones((8, 4), "f4"), key.format("B"): np.ones((6, 8), "f4")}
    return jaxadapt.PeftTensors(jaxadapt.LoraConfig(r=2, target_modules=[], target_parameters=parameters), tensors)


@pytest.mark.parametrize(
    ("base", "parameters", "says"),
    [
        (None, BOTH[1:], r"depends on the model.*--base FOLDER"),
        ({"model_type": "glm4_moe"}, BOTH[1:], r"known for mixtral.*'glm4_moe'.*export_base\(.*jaxadapt merge"),
        (
            {"model_type": "mixtral"},
            ["experts.down_proj", "q_proj.weight"],
            r"(?s)of mixtral.*jaxadapt merge.*q_proj.we",
        ),
    ],
)
def test_what_no_form_is_known_for_is_refused(base: Any, parameters: list[str], says: str, tmp_path: Path):
    given = tmp_path / "config.json"
    if base is not None:
        given.write_text(json.dumps(base))
    with pytest.raises(jaxadapt.ConfigError, match=says):
        export_adapter(adapter(parameters), tmp_path / "out", "vllm", base=None if base is None else given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "llama4_text"])
@pytest.mark.parametrize("stem", ["layers.0", "model.language_model.layers.0"])
def test_experts_under_names_that_the_base_lacks_are_refused(kind: str, stem: str, tmp_path: Path):
    """vLLM would drop those of Mixtral without a message."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    given = adapter(BOTH[1:])
    tensors = {key.replace("model.layers.0", stem): x for key, x in given.tensors.items()}
    given = jaxadapt.PeftTensors(given.config, tensors)
    with pytest.raises(jaxadapt.ConfigError, match=rf"(?s)no such modules.*{stem}\.mlp\.experts$"):
        export_adapter(given, tmp_path / "out", "vllm", base=tmp_path)
    assert not (tmp_path / "out").exists()


def single_experts(base: Any, names: list[str], config: jaxadapt.LoraConfig) -> tuple[dict[str, np.ndarray], Any]:
    """Return random LoRAs of these projections of all single experts, and a base with their changes."""
    rng, tensors, changed = np.random.default_rng(0), dict[str, np.ndarray](), copy.deepcopy(base)
    for owner, experts in changed.named_modules():
        if not owner.endswith(".experts"):
            continue
        size = experts.gate_up_proj.shape[1] // 2
        places = {"gate_proj": slice(size), "up_proj": slice(size, 2 * size), "down_proj": slice(None)}
        for e in range(len(experts.down_proj)):
            for name in names:
                weight = experts.down_proj if name == "down_proj" else experts.gate_up_proj
                module, part = f"{owner}.{e}.{name}", weight.data[e, places[name]]
                rank = config.rank_of(module)
                a, b = (rng.standard_normal(s).astype("f4") for s in ((rank, part.shape[1]), (len(part), rank)))
                part += config.scale_of(module) * torch.from_numpy(b @ a)
                tensors |= {f"base_model.model.{module}.lora_{s}.weight": x for s, x in (("A", a), ("B", b))}
    return tensors, changed


@pytest.mark.parametrize("names", [["gate_proj"], ["gate_proj", "up_proj"], ["down_proj"]])
def test_parts_of_single_experts_get_zeros_for_vllm(names: list[str], tmp_path: Path):
    """As jaxadapt saves them, and PEFT with transformers 4: no parameters, and no base is needed."""
    base = torch_side.base("qwen3_moe")
    config = jaxadapt.LoraConfig(r=2, lora_alpha=3, target_modules=names, rank_pattern={r"experts\.1\.\w+": 3})
    tensors, changed = single_experts(base, names, config)
    export_adapter(jaxadapt.PeftTensors(config, tensors), tmp_path / "out", "vllm")
    written = load_file(tmp_path / "out/adapter_model.safetensors")
    experts = {name.rpartition(".")[0] for name in modules_of(tmp_path / "out")}
    assert {*modules_of(tmp_path / "out")} == {f"{e}.{p}_proj" for e in experts for p in ("gate", "up", "down")}
    assert {x.shape[0] for key, x in written.items() if key.endswith("A.weight")} == {3}
    merged = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out").eval()
    want = logits(changed)
    assert abs(want - logits(base)).max() > 1e-2
    np.testing.assert_allclose(logits(merged), want, atol=2e-5 * max(1, abs(want).max()))


def test_weights_of_linear_layers_as_parameters_stay_as_they_are(tmp_path: Path):
    """vLLM reads them under the keys of modules."""
    stem = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    tensors = {stem.format("A"): np.ones((2, 4), "f4"), stem.format("B"): np.ones((6, 2), "f4")}
    config = jaxadapt.LoraConfig(r=2, lora_alpha=2, target_modules=[], target_parameters=["q_proj.weight"])
    export_adapter(jaxadapt.PeftTensors(config, tensors), tmp_path / "out", "vllm")
    written = load_file(tmp_path / "out/adapter_model.safetensors")
    assert written.keys() == tensors.keys()
    for key, x in written.items():
        np.testing.assert_array_equal(x, tensors[key])


def test_shared_experts_beside_single_ones_are_refused_for_transformers(tmp_path: Path):
    stem = "base_model.model.model.layers.0.mlp.{}.up_proj.lora_{}.weight"
    tensors = {stem.format(block, s): np.ones((2, 2), "f4") for block in ("shared_experts", "experts.0") for s in "AB"}
    given = jaxadapt.PeftTensors(jaxadapt.LoraConfig(r=2, target_modules=["up_proj"]), tensors)
    with pytest.raises(jaxadapt.ConfigError, match=r"(?s)as parameters only.*shared_experts\.up_proj$"):
        export_adapter(given, tmp_path / "out", "transformers")
    assert not (tmp_path / "out").exists()


def test_shared_experts_without_effect_in_peft_are_named_as_parameters(tmp_path: Path):
    """PEFT 0.21.2 takes their modules for routed experts (huggingface/peft#3711), with a warning."""
    base = torch_side.base("deepseek_v3")
    rng, tensors, wanted = np.random.default_rng(0), dict[str, np.ndarray](), copy.deepcopy(base)
    for name, module in wanted.named_modules():
        if isinstance(module, torch.nn.Linear) and "_proj" in name and (".mlp." in name or "o_proj" in name):
            a = rng.standard_normal((2, module.in_features)).astype("f4")
            b = rng.standard_normal((module.out_features, 2)).astype("f4")
            module.weight.data += 1.5 * torch.from_numpy(b @ a)
            tensors |= {f"base_model.model.{name}.lora_{side}.weight": x for side, x in (("A", a), ("B", b))}
    config = jaxadapt.LoraConfig(r=2, lora_alpha=3, target_modules=["gate_proj", "up_proj", "down_proj", "o_proj"])
    jaxadapt.write(jaxadapt.PeftTensors(config, tensors), tmp_path / "in")
    export_adapter(tmp_path / "in", tmp_path / "out", "transformers")
    found = [
        logits(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name).eval()) for name in ("in", "out")
    ]
    want = logits(wanted)
    np.testing.assert_allclose(found[1], want, atol=2e-5 * abs(want).max())
    assert abs(found[0] - want).max() > 0.1  # the day this fails, PEFT is mended, and the rule can go
    base.config.save_pretrained(tmp_path / "base")
    export_adapter(tmp_path / "out", tmp_path / "vllm", "vllm", base=tmp_path / "base")
    written, read = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("vllm", "out"))
    assert written.keys() == tensors.keys()
    for key, x in written.items():
        np.testing.assert_array_equal(x, read[key])
