"""Adapters of experts in PEFT, transformers and vLLM: PEFT's files as they are, and what `jaxadapt export` writes.

    python -m tests.full.programs.vllm_experts FOLDER            # FOLDER: made by environments.py
    python -m tests.full.programs.vllm_experts FOLDER mixtral    # one model; the results are in vllm_experts.json

The models are tiny and random. Each adapter is made by PEFT on transformers' own class and has random values. The
reference is PEFT: its log-probabilities, and the change of each weight when it merges the adapter.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import subprocess
import sys
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers

from jaxadapt import AdapterError
from jaxadapt.export import export_adapter
from tests.full.programs import measure

RESULTS = Path(__file__).with_name("vllm_experts.json")
MODULES = Path(__file__).parents[2] / "export" / "recorded_vllm_modules.json"
TOKENS = [3, 7, 1, 9, 4, 20, 11, 2]
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 32, "intermediate_size": 32, "max_position_embeddings": 64, "num_experts_per_tok": 2,
    "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
# {model_type: (configuration, model, fields beside SIZES)}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {
        "num_experts": 4, "moe_intermediate_size": 32, "norm_topk_prob": True, "decoder_sparse_step": 1}),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", {"num_local_experts": 4, "layer_types": ["full_attention"] * 2}),
    "llama4_text": ("Llama4TextConfig", "Llama4ForCausalLM", {
        "num_local_experts": 4, "num_experts_per_tok": 1, "moe_layers": [0, 1], "intermediate_size_mlp": 48}),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", {
        "n_routed_experts": 4, "moe_intermediate_size": 32, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
        "n_shared_experts": 1, "q_lora_rank": 16, "kv_lora_rank": 32, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32,
        "v_head_dim": 32, "num_key_value_heads": 2, "routed_scaling_factor": 2.5}),
}  # fmt: skip
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
CASES: dict[str, dict[str, Any]] = {
    "routed experts": {"target_parameters": BOTH, "target_modules": ["o_proj"]},
    "gate and up only": {"target_parameters": BOTH[:1], "target_modules": []},
    "down only": {"target_parameters": BOTH[1:], "target_modules": []},
    "router": {"target_parameters": ["mlp.gate.weight"], "target_modules": ["o_proj"]},
    "shared experts": {"target_modules": r".*\.shared_experts?\.(gate|up|down)_proj"},
}
"""{name: fields of PEFT's configuration}."""
OTHERWISE: dict[tuple[str, str], dict[str, Any]] = {
    ("router", "gpt_oss"): {"target_parameters": ["router.weight"]},
    ("router", "llama4_text"): {"target_parameters": ["router.weight"]},
    # PEFT takes the modules of DeepSeek's shared experts for routed experts.
    ("shared experts", "deepseek_v3"): {
        "target_modules": [], "target_parameters": [f"shared_experts.{p}_proj.weight" for p in ("gate", "up", "down")]},
}  # fmt: skip
"""{(case, model): other fields}."""
LACKS = {  # PEFT's wrapper of DeepSeek's router hides the bias that the router adds to its scores
    "router": {"deepseek_v3"},
    "shared experts": {"mixtral", "qwen3_moe", "gpt_oss"},
}
"""{case: the models that have no such adapter}."""
MIXED = ("mixtral", "qwen3_moe")
"""The models that also run with `--enable-mixed-moe-lora-format`."""


def make_base(kind: str, folder: Path) -> measure.Base:
    """Write a tiny random model of a type to a folder."""
    config, model, more = MODELS[kind]
    torch.manual_seed(0)
    base = getattr(transformers, model)(getattr(transformers, config)(**SIZES | more)).eval()
    for parameter in base.parameters():
        size = 0.2 if parameter.ndim > 1 else 0.1
        parameter.data = torch.randn(parameter.shape) * size + (parameter.ndim == 1)
    base.save_pretrained(folder)
    return measure.Base(folder, folder, TOKENS)


def make_adapter(base: measure.Base, folder: Path, name: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Write PEFT's adapter of a case with random values; return its log-probabilities, and each weight's change."""
    model = base.model()
    fields = {**CASES[name], **OTHERWISE.get((name, model.config.model_type), {})}
    before = {key: x.clone() for key, x in model.state_dict().items()}
    config = peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **copy.deepcopy(fields))
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        adapted = peft.get_peft_model(model, config).eval()
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape) * 0.2
        adapted.save_pretrained(folder)
        found = measure.log_probabilities(measure.peft_logits(adapted, base))
        merged = adapted.merge_and_unload().state_dict()
    changes = {key: (x - before[key]).numpy() for key, x in merged.items() if not torch.equal(x, before[key])}
    return found, changes


# ---------------------------------------------------------------- vllm


PACKED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}  # fmt: skip


def place_in_vllm(
    programs: Path, base: measure.Base, adapters: list[Path], out: Path, mixed: bool = False
) -> list[str | dict[str, np.ndarray]]:
    """Return the change of each weight that vLLM will compute, under transformers' names, or the error, by adapter."""
    request = {"model": str(base.folder), "adapters": list(map(str, adapters)), "mixed": mixed, "out": str(out)}
    command = [programs / "vllm/bin/python", measure.HERE / "run_vllm_experts.py", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-6000:]
    found: list[str | dict[str, np.ndarray]] = [{} for _ in adapters]
    for key, value in np.load(out).items():
        number, _, rest = key.partition("/")
        if rest == "refused":
            found[int(number)] = str(value)
            continue
        placed = found[int(number)]
        assert isinstance(placed, dict)
        module, _, slice_number = rest.rpartition("/")
        placed |= in_transformers(module, int(slice_number), value)
    return found


def in_transformers(module: str, number: int, delta: np.ndarray) -> dict[str, np.ndarray]:
    """Return `{name of a part of a weight: change}` of one slice of a layer in vLLM."""
    name = module.replace(".block_sparse_moe.", ".mlp.").replace(".attn.", ".self_attn.")
    if name.endswith(".experts"):
        return {f"{name}.{number}": delta}
    owner, _, last = name.rpartition(".")
    return {f"{owner}.{PACKED.get(last, (last,))[number]}": delta}


def error_of(kind: str, placed: dict[str, np.ndarray], changes: dict[str, np.ndarray]) -> dict[str, float]:
    """Return `{weight: ‖placed − PEFT's‖ / ‖PEFT's‖}`; 1 for a weight that nothing changes."""
    errors: dict[str, float] = {}
    for key, change in changes.items():
        if ".experts." in key:
            owner, _, which = key.rpartition(".")
            slices = [placed[name] for name in sorted(placed) if name.rpartition(".")[0] == owner]
            got = slices[-1] if which == "down_proj" else np.concatenate(slices[:-1], axis=1)
            want = change.swapaxes(1, 2) if kind in ("gpt_oss", "llama4_text") else change
        else:
            got, want = placed[key.removesuffix(".weight")], change
        errors[key] = float(np.linalg.norm(got - want) / np.linalg.norm(want))
    untouched = [
        name for name, x in placed.items() if x.any() and not any(name in key or ".experts." in name for key in changes)
    ]
    assert not untouched, untouched
    return errors


def outcome(kind: str, placed: str | dict[str, np.ndarray], changes: dict[str, np.ndarray]) -> str | dict[str, float]:
    """Return the error of vLLM, or the largest relative error by the last two parts of the weights' names."""
    if isinstance(placed, str):
        return placed
    largest: dict[str, float] = {}
    for key, error in error_of(kind, placed, changes).items():
        name = ".".join(key.removesuffix(".weight").split(".")[-2:])
        largest[name] = max(error, largest.get(name, 0.0))
    return largest


# ---------------------------------------------------------------- all programs


def difference(model: Any, base: measure.Base, want: np.ndarray) -> float:
    return float(np.abs(measure.log_probabilities(measure.peft_logits(model, base)) - want).max())


def measure_model(kind: str, programs: Path, work: Path) -> dict[str, dict[str, Any]]:
    """Return `{case: {program and form: result}}` of one model."""
    warnings.simplefilter("ignore")
    base = make_base(kind, work / "base")
    alone = measure.log_probabilities(measure.peft_logits(base.model(), base))
    results: dict[str, dict[str, Any]] = {}
    changes: dict[str, dict[str, np.ndarray]] = {}
    files: dict[tuple[str, str], Path] = {}
    for name in CASES:
        if kind in LACKS.get(name, ()):
            continue
        folder = work / name.replace(" ", "-")
        want, changes[name] = make_adapter(base, folder, name)
        found = results[name] = {"effect": float(np.abs(want - alone).max())}
        found["peft"] = difference(peft.PeftModel.from_pretrained(base.model(), folder).eval(), base, want)
        files[name, "peft's file"] = folder
        out = Path(f"{folder}-vllm")
        try:
            export_adapter(folder, out, "vllm", base=base.folder / "config.json")
        except AdapterError as error:
            found["export"] = str(error).partition(": ")[2]
        else:
            files[name, "exported"] = out
        for form in ("peft's file", "exported"):
            if (name, form) not in files:
                continue
            model = base.model()
            try:
                model.load_adapter(str(files[name, form]))
                found[f"transformers, {form}"] = difference(model, base, want)
            except Exception as error:  # the outcome to record
                found[f"transformers, {form}"] = f"{type(error).__name__}: {error}"
    for mixed in (False, True)[: 2 if kind in MIXED else 1]:
        chosen = {key: path for key, path in files.items() if not mixed or key[1] == "peft's file"}
        placed = place_in_vllm(programs, base, list(chosen.values()), work / f"{'mixed-' * mixed}placed.npz", mixed)
        for (name, form), found in zip(chosen, placed, strict=True):
            results[name][f"vllm, {'mixed, ' * mixed}{form}"] = outcome(kind, found, changes[name])
    return results


def measure_apart(kind: str, programs: Path, work: Path) -> dict[str, dict[str, Any]]:
    """Return what `measure_model` returns, from a process of its own.

    transformers' `load_adapter` replaces a method of PEFT for models such as Mixtral
    (`integrations/peft.py: patch_moe_parameter_targeting`). Adapters of GPT-OSS in the same process are then wrong.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure_model, kind, programs, work).result()


def record_modules(kind: str, modules: dict[str, list[str]]) -> None:
    """Write the names of the modules that vLLM reads in the second layer, for the tests of CI."""
    recorded = json.loads(MODULES.read_text()) if MODULES.exists() else {}
    recorded[kind] = {name: names for name, names in modules.items() if ".layers.1." in name}
    MODULES.write_text(json.dumps(recorded, indent=1) + "\n")


def main() -> None:
    programs, chosen = Path(sys.argv[1]), sys.argv[2:] or list(MODELS)
    for kind in chosen:
        with tempfile.TemporaryDirectory() as folder:
            results = measure_apart(kind, programs, Path(folder))
            found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            found[kind] = results
            modules = json.loads((Path(folder) / "placed.npz.modules.json").read_text())
            record_modules(kind, modules)
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
