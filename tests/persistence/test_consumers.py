"""Which programs read an adapter: the verdicts are those of the measurements, on files that this library wrote."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import jaxadapt
from jaxadapt import GenericConfig
from jaxadapt.cli import main
from jaxadapt.persistence import consumers
from tests.support import small

KEYS = tuple(f"base_model.model.model.layers.0.{m}.lora_{n}.weight" for m in ("q_proj", "up_proj") for n in "AB")
PROGRAMS = ("PEFT", "transformers load_adapter", "vLLM", "llama.cpp")
RIGHT, WRONG, REFUSED, UNKNOWN = "right", "wrong", "refused", "unknown"
EMBEDDED = (*KEYS, *(f"base_model.model.model.embed_tokens.{n}" for n in ("lora_embedding_A", "lora_embedding_B")))
TABLE = "base_model.model.model.embed_tokens.base_layer.weight"
HEADS = (
    *KEYS,
    *(f"base_model.model.lm_head.lora_{n}.weight" for n in "AB"),
    "base_model.model.lm_head.base_layer.weight",
)
ROWS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"

# What each program did with the adapter, beside PEFT's log-probabilities on the same base (SmolLM2-135M): (settings,
# keys, tied, verdict of each program in PROGRAMS). PEFT 0.21.2, transformers 5.12.1 and 5.24.0, vLLM 0.32.0, the
# converter of llama-cpp-python 0.3.36.
MEASURED = {
    "plain": ({}, KEYS, True, (RIGHT, RIGHT, RIGHT, RIGHT)),
    "a float alpha": ({"lora_alpha": 13.37}, KEYS, True, (RIGHT, RIGHT, RIGHT, RIGHT)),
    "an expression": ({"target_modules": ".*(q|up)_proj"}, KEYS, True, (RIGHT, RIGHT, RIGHT, RIGHT)),
    "some layers": ({"layers_to_transform": [0]}, KEYS, True, (RIGHT, RIGHT, RIGHT, RIGHT)),
    "rank_pattern": ({"rank_pattern": {"q_proj": 4}}, KEYS, True, (RIGHT, RIGHT, RIGHT, RIGHT)),
    "alpha_pattern": ({"alpha_pattern": {"q_proj": 4}}, KEYS, True, (RIGHT, RIGHT, RIGHT, WRONG)),
    "rsLoRA": ({"use_rslora": True}, KEYS, True, (RIGHT, RIGHT, RIGHT, WRONG)),
    "DoRA": ({"use_dora": True}, (*KEYS, "base_model.model.x.lora_magnitude_vector"), True,
             (RIGHT, WRONG, REFUSED, REFUSED)),
    "lora_bias": ({"lora_bias": True}, (*KEYS, "base_model.model.x.lora_B.bias"), True,
                  (RIGHT, RIGHT, REFUSED, REFUSED)),
    "a copy of the embedding": ({"modules_to_save": ["embed_tokens"]},
                                (*KEYS, "base_model.model.model.embed_tokens.weight"), True,
                                (RIGHT, WRONG, REFUSED, REFUSED)),
    "a copy of the head": ({"modules_to_save": ["lm_head"]}, (*KEYS, "base_model.model.lm_head.weight"), False,
                           (RIGHT, WRONG, REFUSED, REFUSED)),
    "copies of norms": ({"modules_to_save": ["input_layernorm"]},
                        (*KEYS, "base_model.model.model.layers.0.input_layernorm.weight"), True,
                        (RIGHT, WRONG, REFUSED, WRONG)),
    "an embedding, tied": ({"target_modules": ["q_proj", "embed_tokens"]}, (*EMBEDDED, TABLE), True,
                           (RIGHT, RIGHT, RIGHT, REFUSED)),
    "an embedding, untied": ({"target_modules": ["q_proj", "embed_tokens"]}, (*EMBEDDED, TABLE), False,
                             (RIGHT, RIGHT, RIGHT, RIGHT)),
    "a head, untied": ({"target_modules": ["q_proj", "lm_head"]}, HEADS, False, (RIGHT, RIGHT, RIGHT, RIGHT)),
    "rows of tokens": ({"trainable_token_indices": [1]}, (*KEYS, ROWS), True, (RIGHT, WRONG, REFUSED, REFUSED)),
    "aLoRA": ({"alora_invocation_tokens": [1, 2]}, KEYS, True, (RIGHT, WRONG, REFUSED, WRONG)),
    "KaSA": ({"kasa_config": {"beta": 0.1}}, (*KEYS, "base_model.model.x.lora_diag"), True,
             (RIGHT, RIGHT, REFUSED, REFUSED)),
    "MiCA": ({"init_lora_weights": "mica"}, KEYS, True, (RIGHT, RIGHT, RIGHT, RIGHT)),
    "PiSSA": ({"init_lora_weights": "pissa"}, KEYS, True, (RIGHT, UNKNOWN, REFUSED, WRONG)),
}  # fmt: skip


def verdicts(config: jaxadapt.Config, keys=(), tied=None) -> dict[str, str]:
    return {reader.name: reader.verdict for reader in consumers.judge_readers(config, keys, tied)}


@pytest.mark.parametrize("case", MEASURED)
def test_the_rules_are_the_measurements(case: str):
    settings, keys, tied, measured = MEASURED[case]
    config = jaxadapt.LoraConfig(**{"r": 8, "target_modules": ["q_proj", "up_proj"], **settings})
    found = verdicts(config, keys, tied)
    assert tuple(found[name] for name in PROGRAMS) == measured
    assert found["MLX"] == REFUSED
    for reader in consumers.judge_readers(config, keys, tied):
        assert reader.version
        assert bool(reader.reasons) == (reader.verdict != RIGHT)


def test_routed_experts_are_exported_for_llama_cpp_and_mlx():
    config = jaxadapt.LoraConfig(target_modules=[], target_parameters=["experts.gate_up_proj"])
    found = {reader.name: reader for reader in consumers.judge_readers(config, ())}
    assert found["llama.cpp"].verdict == REFUSED
    assert found["llama.cpp"].reasons == ("target_parameters: its converter stops at experts",)
    assert "--for gguf --base BASE" in found["llama.cpp"].remedy
    assert found["MLX"].remedy == "jaxadapt export ADAPTER --for mlx --base BASE --out FOLDER"


def test_other_methods():
    found = verdicts(jaxadapt.IA3Config(target_modules=["q_proj"]), ["base_model.model.q_proj.ia3_l"])
    assert [found[name] for name in PROGRAMS] == [RIGHT, RIGHT, REFUSED, REFUSED]  # measured
    found = verdicts(jaxadapt.VeraConfig(target_modules=["q_proj"]))
    assert [found[name] for name in PROGRAMS] == [RIGHT, UNKNOWN, REFUSED, REFUSED]
    assert set(verdicts(GenericConfig(peft_type="MAGIC")).values()) == {REFUSED}


@pytest.mark.parametrize(
    ("settings", "program", "verdict", "reason"),
    [
        ({"use_rslora": True}, "SGLang", WRONG, "use_rslora: ignored"),
        ({"target_modules": "q.*"}, "SGLang", REFUSED, "target_modules is an expression: refused"),
        ({"rank_pattern": {"q": 2}}, "SGLang", REFUSED, "rank_pattern: expected one rank"),
        ({"rank_pattern": {"q": 2}}, "TGI and LoRAX", WRONG, "rank_pattern: the scale is that of r"),
        ({"use_rslora": True}, "TGI and LoRAX", RIGHT, ""),
        ({"use_rslora": True}, "TensorRT-LLM", RIGHT, ""),
        ({"use_dora": True}, "TensorRT-LLM", RIGHT, ""),
        ({"alpha_pattern": {"q": 2}}, "TensorRT-LLM", WRONG, "alpha_pattern: ignored"),
        ({"lora_alpha": 13.37}, "Ollama", REFUSED, "lora_alpha=13.37: expected an integer"),
        ({"lora_alpha": 16.0}, "Ollama", RIGHT, ""),
        ({"modules_to_save": ["score"]}, "vLLM", RIGHT, ""),
        (
            {"target_parameters": ["w"]},
            "vLLM",
            WRONG,
            "target_parameters: gate, up and down are right for GPT-OSS, without effect in Mixtral, and else refused",
        ),
        ({"target_parameters": ["w"]}, "transformers load_adapter", RIGHT, ""),
    ],
)
def test_programs_that_were_read(settings, program: str, verdict: str, reason: str):
    config = jaxadapt.LoraConfig(**{"target_modules": ["q_proj"], **settings})
    found = next(r for r in consumers.judge_readers(config, ()) if r.name == program)
    assert (found.verdict, "; ".join(found.reasons)) == (verdict, reason)


EVERY_PROPERTY = [
    (jaxadapt.LoraConfig(lora_alpha=1.5, use_rslora=True, use_dora=True, bias="all", target_modules="q.*",
                         rank_pattern={"q": 2}, alpha_pattern={"q": 3},
                         trainable_token_indices=[1], target_parameters=["w"], init_lora_weights="pissa",
                         modules_to_save=["norm", "score", "lm_head"], use_bdlora={"nblocks": 2}), (), None),
    (jaxadapt.LoraConfig(target_modules=["q"], lora_bias=True, layers_to_transform=[0]), (), None),
    (jaxadapt.LoraConfig(target_modules=["q"], alora_invocation_tokens=[1]), ["base_model.model.q.unknown"], None),
    (jaxadapt.LoraConfig(target_modules=["q"], kasa_config={"beta": 0.1}), (), None),
    (
        jaxadapt.LoraConfig(target_modules=["up_proj"], target_parameters=["gate.weight"], use_rslora=True),
        [
            f"base_model.model.0.mlp.{name}.lora_A.weight"
            for name in ("shared_experts.up_proj", "gate", "experts.0.up_proj")
        ],
        None,
    ),
    (
        jaxadapt.LoraConfig(target_modules=[], target_parameters=["experts.down_proj"]),
        ["base_model.model.0.mlp.experts.lora_A.weight"],
        None,
    ),
    (jaxadapt.LoraConfig(target_modules=["wte"]), (), None),
    (jaxadapt.LoraConfig(target_modules=["wte"]), (), True),
    (jaxadapt.IA3Config(target_modules=["q"]), (), None),
    (jaxadapt.VeraConfig(target_modules=["q"]), (), None),
    (GenericConfig(peft_type="MAGIC"), (), None),
]  # fmt: skip


def test_every_property_that_a_rule_may_name_is_one_that_adapters_have():
    found = {name for config, keys, tied in EVERY_PROPERTY for name in consumers._properties(config, list(keys), tied)}
    assert found == consumers.PROPERTIES
    assert {name for _, rule in consumers._RULES.values() for name in rule} <= found


def test_a_misspelt_property_is_an_error_and_not_right(monkeypatch):
    _, rule = consumers._RULES["vLLM"]
    misspelt = {"use_dora" if name == "dora" else name: verdict for name, verdict in rule.items()}
    with pytest.raises(ValueError, match=r"vLLM: unknown properties of an adapter: \['use_dora'\]"):
        consumers.require_known(misspelt, "vLLM")
    monkeypatch.setattr(consumers, "_SETTINGS", {"use_dora": "use_dora"})
    with pytest.raises(ValueError, match="unknown properties"):
        consumers.judge_readers(jaxadapt.LoraConfig(target_modules=["q"], use_dora=True))


GGUF = "jaxadapt export ADAPTER --for gguf --base BASE --out FILE.gguf"
MLX = "jaxadapt export ADAPTER --for mlx --out FOLDER"
MLX_EXPERTS = "jaxadapt export ADAPTER --for mlx --base BASE --out FOLDER"
PLAIN = "jaxadapt export ADAPTER --for plain --out FOLDER"
MERGE = "jaxadapt merge BASE ADAPTER --out FOLDER"
MERGE_IN_MEMORY = "jaxadapt.export.export_base(MODEL, FOLDER, ADAPTER)"


@pytest.mark.parametrize(
    ("settings", "program", "remedy"),
    [
        ({}, "llama.cpp", ""),
        ({}, "MLX", MLX),
        ({"use_rslora": True, "alpha_pattern": {"q": 2}}, "llama.cpp", GGUF),
        ({"use_rslora": True}, "Ollama", GGUF),
        ({"use_rslora": True}, "SGLang", PLAIN),
        ({"target_modules": "q.*"}, "SGLang", PLAIN),
        ({"init_lora_weights": "pissa"}, "llama.cpp", f"{GGUF} --first START"),
        ({"init_lora_weights": "pissa"}, "vLLM", f"{PLAIN} --first START"),
        ({"use_bdlora": {"nblocks": 2}}, "vLLM", PLAIN),
        ({"layer_replication": [[0, 1]]}, "vLLM", MERGE_IN_MEMORY),
        ({"target_parameters": ["w"]}, "MLX", MLX_EXPERTS),
        ({"target_parameters": ["w"]}, "vLLM", "jaxadapt export ADAPTER --for vllm --base BASE --out FOLDER"),
        ({"target_parameters": ["w"], "modules_to_save": ["lm_head"]}, "vLLM", MERGE_IN_MEMORY),
        ({"use_dora": True}, "llama.cpp", MERGE),
        ({"use_dora": True, "use_rslora": True}, "transformers load_adapter", MERGE),
        ({"use_dora": True, "use_rslora": True}, "MLX", MLX),
        ({"lora_bias": True}, "MLX", f"{MERGE}: if the adapted modules of the base have biases"),
        ({"layers_to_transform": [1]}, "TGI and LoRAX", MERGE),
        ({"layers_to_transform": [1]}, "MLX", MLX),
        ({"alora_invocation_tokens": [1]}, "llama.cpp", ""),
        ({"kasa_config": {"beta": 0.1}}, "vLLM", ""),
    ],
)
def test_the_way_out(settings, program: str, remedy: str):
    config = jaxadapt.LoraConfig(**{"target_modules": ["q_proj"], **settings})
    found = next(r for r in consumers.judge_readers(config) if r.name == program)
    assert found.remedy == remedy


@pytest.mark.parametrize(
    ("block", "fields", "verdict"),
    [
        ("mlp.shared_expert", {"target_modules": ["up_proj"]}, WRONG),
        ("mlp.shared_experts", {"target_modules": [], "target_parameters": ["up_proj.weight"]}, RIGHT),
        (
            "mlp.shared_experts",
            {"target_modules": ["up_proj"], "target_parameters": ["shared_experts.down_proj.weight"]},
            WRONG,
        ),
        ("mlp.shared_experts", {"target_modules": ["up_proj"]}, WRONG),
        ("mlp.shared_experts", {"target_modules": [], "target_parameters": ["shared_experts.up_proj.weight"]}, RIGHT),
        ("feed_forward.shared_expert", {"target_modules": ["up_proj"]}, RIGHT),
    ],
)
def test_shared_experts_that_peft_takes_for_routed_ones(block: str, fields, verdict: str):
    """Measured on DeepSeek-V3 and Llama 4; tests/export/test_expert_forms.py runs it."""
    keys = [f"base_model.model.model.layers.1.{block}.up_proj.lora_{n}.weight" for n in "AB"]
    readers = {r.name: r for r in consumers.judge_readers(jaxadapt.LoraConfig(**fields), keys)}
    for name in ("PEFT", "transformers load_adapter"):
        assert readers[name].verdict == verdict
        remedy = "jaxadapt export ADAPTER --for transformers --out FOLDER"
        assert readers[name].remedy == (remedy if verdict == WRONG else "")


def judged(program: str, modules: list[str], **fields) -> consumers.Reader:
    keys = [f"base_model.model.model.layers.1.{module}.lora_{n}.weight" for module in modules for n in "AB"]
    return {r.name: r for r in consumers.judge_readers(jaxadapt.LoraConfig(**fields), keys)}[program]


def test_a_gate_of_shared_experts_is_no_expert():
    assert judged("PEFT", ["mlp.shared_expert_gate"], target_modules=["shared_expert_gate"]).verdict == RIGHT


def test_a_dense_layer_beside_single_experts_is_taken_for_routed_ones_too():
    modules, targets = ["mlp.up_proj", "mlp.experts.0.up_proj"], ["up_proj"]
    assert judged("PEFT", modules, target_modules=targets).verdict == WRONG
    assert judged("PEFT", modules[:1], target_modules=targets).verdict == RIGHT


def test_parameters_that_are_no_experts_are_right_in_programs_that_read_keys():
    """Their keys are those of the modules."""
    dense = {"target_modules": [], "target_parameters": ["q_proj.weight"]}
    assert judged("vLLM", ["self_attn.q_proj"], **dense).verdict == RIGHT
    assert judged("llama.cpp", ["self_attn.q_proj"], **dense).verdict == RIGHT
    fused = {"target_modules": [], "target_parameters": ["experts.down_proj"]}
    assert judged("vLLM", ["mlp.experts"], **fused).verdict == WRONG
    router = judged("vLLM", ["mlp.gate"], target_modules=[], target_parameters=["gate.weight"])
    assert router.reasons == ("target_parameters: without effect in Mixtral, and else right",)
    assert "--for vllm --base BASE" in router.remedy


def test_sglang_stops_at_fused_experts_and_routers():
    """Its own code of 0.5.23 raises an error for each (tests/full/programs/run_sglang_experts.py)."""
    fields = {"target_modules": ["o_proj"], "target_parameters": ["experts.down_proj", "gate.weight"]}
    found = judged("SGLang", ["mlp.experts", "self_attn.o_proj"], **fields)
    assert found.verdict == REFUSED
    assert "target_parameters: stops at all experts in one parameter" in found.reasons
    assert "target_parameters: has no LoRA for routers" in judged("SGLang", ["mlp.gate"], **fields).reasons
    single = [f"mlp.experts.0.{name}_proj" for name in ("gate", "up", "down")]
    assert judged("SGLang", single, target_modules=["gate_proj", "up_proj", "down_proj"]).verdict == RIGHT


@pytest.mark.parametrize(
    ("kind", "case", "measured"),
    [
        ("gpt_oss", "routed experts", RIGHT),
        ("gpt_oss", "gate and up only", REFUSED),
        ("gpt_oss", "down only", REFUSED),
        ("gpt_oss", "router", RIGHT),
        ("mixtral", "routed experts", WRONG),
        ("mixtral", "down only", WRONG),
        ("mixtral", "router", WRONG),
        ("qwen3_moe", "routed experts", REFUSED),
        ("qwen3_moe", "router", RIGHT),
        ("llama4_text", "gate and up only", REFUSED),
        ("deepseek_v3", "routed experts", REFUSED),
        ("another", "routed experts", WRONG),
    ],
)
def test_the_base_decides_what_vllm_does_with_experts(kind: str, case: str, measured: str):
    """tests/full/programs/vllm_experts.json has what vLLM did with PEFT's file of each case."""
    parameters = {
        "routed experts": ["experts.gate_up_proj", "experts.down_proj"], "gate and up only": ["experts.gate_up_proj"],
        "down only": ["experts.down_proj"], "router": ["mlp.gate.weight"],
    }[case]  # fmt: skip
    modules = {"routed experts": ["mlp.experts.base_layer", "mlp.experts"], "router": ["mlp.gate"]}
    keys = [
        f"base_model.model.model.layers.1.{name}.lora_{n}.weight"
        for name in modules.get(case, ["mlp.experts"])
        for n in "AB"
    ]
    config = jaxadapt.LoraConfig(target_modules=[], target_parameters=parameters)
    found = next(r for r in consumers.judge_readers(config, keys, kind=kind) if r.name == "vLLM")
    assert found.verdict == measured
    assert found.remedy == ("" if measured == RIGHT else "jaxadapt export ADAPTER --for vllm --base BASE --out FOLDER")
    recorded = json.loads((Path(__file__).parents[1] / "full/programs/vllm_experts.json").read_text())
    if kind in recorded:  # an error, or {module: its distance to PEFT's change}
        result = recorded[kind][case]["vllm, peft's file"]
        worst = None if isinstance(result, str) else max(result.values())
        assert measured == (REFUSED if worst is None else RIGHT if worst < 1e-6 else WRONG)


def test_mlx_needs_the_base_for_a_lora_of_each_expert():
    """`export --for mlx` stops without it (tests/export/test_expert_forms.py)."""
    single = [f"mlp.experts.0.{name}_proj" for name in ("gate", "up", "down")]
    assert judged("MLX", single, target_modules=["gate_proj", "up_proj", "down_proj"]).remedy == MLX_EXPERTS
    assert judged("MLX", ["mlp.up_proj"], target_modules=["up_proj"]).remedy == MLX


def test_inspect_knows_the_base(tmp_path):
    config = jaxadapt.LoraConfig(r=1, target_modules=[], target_parameters=["gate_up_proj", "down_proj"])
    keys = [f"base_model.model.layers.0.mlp.experts{x}.lora_{n}.weight" for x in (".base_layer", "") for n in "AB"]
    jaxadapt.write(jaxadapt.PeftTensors(config, {key: np.zeros((2, 2), "float32") for key in keys}), tmp_path / "out")
    (tmp_path / "config.json").write_text('{"model_type": "gpt_oss", "tie_word_embeddings": false}')

    def verdict(*options: str) -> str:
        done = CliRunner().invoke(main, ["inspect", str(tmp_path / "out"), "--json", *options])
        assert done.exit_code == 0, done.output
        return next(r["verdict"] for r in json.loads(done.output)["readers"] if r["name"] == "vLLM")

    assert verdict() == WRONG
    assert verdict("--base", str(tmp_path)) == RIGHT
    assert verdict("--base", str(tmp_path / "config.json")) == RIGHT
    done = CliRunner().invoke(main, ["inspect", str(tmp_path / "out"), "--base", str(tmp_path / "no")])
    assert done.exit_code == 1
    assert "no config.json" in done.output


def test_rslora_of_single_experts_in_peft():
    """tests/reference/test_per_expert.py measures it."""
    modules = [f"mlp.experts.0.{name}_proj" for name in ("gate", "up", "down")]
    fields = {"target_modules": ["gate_proj", "up_proj", "down_proj"]}
    found = judged("PEFT", modules, use_rslora=True, **fields)
    assert (found.verdict, found.remedy) == (WRONG, "jaxadapt export ADAPTER --for plain --out FOLDER")
    assert judged("PEFT", modules, **fields).verdict == RIGHT
    assert judged("PEFT", ["self_attn.q_proj"], use_rslora=True, target_modules=["q_proj"]).verdict == RIGHT


def test_vllm_stops_at_a_part_of_an_expert():
    """`PackedLoRALayerWeights.pack_moe` of 0.32.0."""
    own = [f"block_sparse_moe.experts.0.{name}" for name in ("w1", "w3", "w2")]
    found = judged("vLLM", own[:2], target_modules=["w1", "w3"])
    assert found.verdict == REFUSED
    assert found.remedy == "jaxadapt export ADAPTER --for vllm --out FOLDER"
    assert judged("vLLM", own, target_modules=["w1", "w3", "w2"]).verdict == RIGHT
    assert judged("vLLM", ["mixer.experts.0.up_proj"], target_modules=["up_proj"]).verdict == RIGHT  # without a gate


def test_keys_show_modules_that_layers_lack():
    """With full names in target_modules, as an export writes them, the configuration does not say it."""
    config = jaxadapt.LoraConfig(target_modules=["model.layers.1.q_proj"])
    keys = [f"base_model.model.model.layers.{i}.{m}.lora_{n}.weight" for i, m in ((0, "k"), (1, "k"), (1, "q"))
            for n in "AB"]  # fmt: skip
    found = {r.name: r for r in consumers.judge_readers(config, keys)}["TGI and LoRAX"]
    assert found.verdict == WRONG
    assert found.reasons == (
        "model.layers.*.q of some layers: modules that some layers lack are left out in all layers",
    )


def test_inspect_and_the_card_show_them(tmp_path):
    jaxadapt.save(small.adapter(small.LORA.replace(use_rslora=True)), tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "As it is: PEFT, transformers load_adapter, vLLM, TGI and LoRAX, TensorRT-LLM." in card
    row = "| {} | silently computes something else | `use_rslora`: ignored | `{}` |"
    assert row.format("llama.cpp, Ollama", GGUF) in card
    assert row.format("SGLang", PLAIN) in card
    assert "llama.cpp (the converter of llama-cpp-python 0.3.36, measured)" in card
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path)], env={"COLUMNS": "200"}).output
    line = next(line for line in shown.splitlines() if line.startswith("misread by"))
    assert line.rstrip() == f"misread by    llama.cpp, Ollama: use_rslora: ignored. What helps: {GGUF}"
    document = json.loads(CliRunner().invoke(main, ["inspect", str(tmp_path), "--json"]).output)
    assert {r["name"]: r["verdict"] for r in document["readers"]}["llama.cpp"] == WRONG


@pytest.mark.parametrize("alpha", [16.0, 16, 13.5])
def test_an_integral_alpha_is_written_as_an_integer(alpha: float, tmp_path):
    """Everything else in the files stays, and PEFT's reader takes both."""
    for name, value in (("float", alpha), ("int", int(alpha) if alpha == 16 else alpha)):
        jaxadapt.save(small.adapter(small.LORA.replace(lora_alpha=value)), tmp_path / name)
    assert small.files(tmp_path / "float") == small.files(tmp_path / "int")
    written = json.loads((tmp_path / "float" / small.CONFIG).read_text())["lora_alpha"]
    assert (written, type(written)) == ((16, int) if alpha == 16 else (13.5, float))
    assert jaxadapt.read_config(tmp_path / "float") == small.LORA.replace(lora_alpha=alpha)


@pytest.mark.peft
def test_peft_reads_the_integral_alpha(tmp_path):
    from peft import PeftConfig

    jaxadapt.save(small.adapter(small.LORA.replace(lora_alpha=16.0)), tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).lora_alpha == 16
