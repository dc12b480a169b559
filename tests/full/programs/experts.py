"""Tiny mixtures of experts with random weights, as transformers and as mlx-lm read them, and adapters of every part.

PEFT writes the adapters, and jaxadapt in Tunix' own Qwen 3.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file

import jaxadapt
from tests.full.programs import environments, measure

SIZES = {
    "vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 4, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    "tie_word_embeddings": False, "num_experts_per_tok": 2, "intermediate_size": 20,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 4, "moe_intermediate_size": 12, "norm_topk_prob": True,
                               "mlp_only_layers": [], "decoder_sparse_step": 1,  # Tunix has this theta alone
                               "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "gpt_oss": ("GptOss", {"num_local_experts": 4, "sliding_window": 32}),
    "llama4": ("Llama4", {"num_hidden_layers": 4, "num_local_experts": 4, "num_experts_per_tok": 1,
                          "interleave_moe_layer_step": 1,
                          "intermediate_size_mlp": 28, "attention_chunk_size": 64, "attn_temperature_tuning": False}),
    "deepseek_v3": ("DeepseekV3", {"n_routed_experts": 4, "moe_intermediate_size": 12, "n_group": 2, "topk_group": 1,
                                   "first_k_dense_replace": 1, "n_shared_experts": 1, "q_lora_rank": 8,
                                   "kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
                                   "head_dim": 4, "num_key_value_heads": 4, "routed_scaling_factor": 2.5}),
}  # fmt: skip
"""{model type: (transformers' classes, further fields of its configuration)}."""

BLOCKS = {"llama4": "feed_forward"}
ROUTERS = {"mixtral": "mlp.gate", "qwen3_moe": "mlp.gate", "gpt_oss": "mlp.router", "llama4": "feed_forward.router"}
SHARED = {"llama4": "shared_expert", "deepseek_v3": "shared_experts"}
ATTENTION = {"deepseek_v3": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"]}
TOKENS = [3, 7, 1, 9, 4, 20, 11, 2]


def model_of(kind: str) -> Any:
    """A tiny model of transformers' own class, with random weights."""
    torch.manual_seed(0)
    name, fields = KINDS[kind]
    config_name = "Llama4TextConfig" if kind == "llama4" else f"{name}Config"
    config = getattr(transformers, config_name)(**{**SIZES, **fields}, experts_implementation="eager")
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        parameter.data = torch.randn_like(parameter) * 0.2 + ("norm" in name)
    return model


def cases(kind: str) -> dict[str, dict[str, Any]]:
    """Return {case: fields of PEFT's configuration}."""
    block = f"{BLOCKS.get(kind, 'mlp')}.experts"
    both = [f"{block}.gate_up_proj", f"{block}.down_proj"]
    attention = ATTENTION.get(kind, ["q_proj", "k_proj", "v_proj", "o_proj"])
    found: dict[str, dict[str, Any]] = {
        "experts": {"target_modules": [], "target_parameters": both},
        "gate and up": {"target_modules": [], "target_parameters": both[:1]},
        "down": {"target_modules": [], "target_parameters": both[1:]},
        "experts and attention": {"target_modules": attention, "target_parameters": both, "use_rslora": True},
    }
    if kind in ROUTERS:
        found["router"] = {"target_modules": [], "target_parameters": [f"{ROUTERS[kind]}.weight"]}
    if kind in SHARED:
        modules = [f"{SHARED[kind]}.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
        if kind == "deepseek_v3":  # PEFT takes these modules for the routed experts, and not these parameters
            parameters = [f"{name}.weight" for name in modules]
            found["shared experts"] = {"target_modules": [], "target_parameters": parameters}
            found["everything"] = {"target_modules": attention, "target_parameters": [*parameters, *both]}
        else:
            found["shared experts"] = {"target_modules": modules}
            found["everything"] = {"target_modules": [*modules, *attention], "target_parameters": both}
    return found


def save_for_mlx(kind: str, source: Path, folder: Path) -> None:
    """Write a model of transformers as mlx-lm reads it: `rope_theta` beside the sizes, and its own names of experts."""
    folder.mkdir()
    config = json.loads((source / "config.json").read_text())
    rope = config.pop("rope_parameters", {}) or {}
    config = {**config, "rope_theta": rope.get("rope_theta", 10000.0), "rope_scaling": None}
    if kind == "qwen3_moe":  # transformers 5 writes the name of Mixtral's field
        config["num_experts"] = KINDS[kind][1]["num_experts"]
    weights = load_file(source / "model.safetensors")
    if kind == "llama4":
        config = {"model_type": "llama4", "text_config": {**config, "model_type": "llama4_text"}}
        weights = {f"language_model.{key}": x for key, x in weights.items()}
    if kind == "gpt_oss":  # mlx-lm reads the published, quantized experts, or its own names
        own: dict[str, np.ndarray] = {}
        for key, x in weights.items():
            if "gate_up_proj" in key:
                tail = ".bias" if key.endswith("_bias") else ".weight"
                stem = key.removesuffix("_bias").removesuffix("gate_up_proj")
                parts = (x[..., ::2], x[..., 1::2])
                own |= {
                    f"{stem}{name}{tail}": part if tail == ".bias" else part.swapaxes(1, 2)
                    for name, part in zip(("gate_proj", "up_proj"), parts, strict=True)
                }
            elif key.endswith("experts.down_proj"):
                own[f"{key}.weight"] = x.swapaxes(1, 2)
            else:
                own[key.replace("down_proj_bias", "down_proj.bias")] = x
        weights = {key: np.ascontiguousarray(x) for key, x in own.items()}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def train(base: measure.Base, folder: Path, fields: dict[str, Any]) -> np.ndarray:
    """Write PEFT's adapter with random values to a folder; return PEFT's log-probabilities."""
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "task_type": "CAUSAL_LM", **fields})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base.model(), config).eval()
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn(parameter.shape, generator=generator) * 0.3
        model.save_pretrained(folder)
        return measure.log_probabilities(measure.peft_logits(model, base))


def qwen3_in_tunix(base: measure.Base) -> Any:
    """Return Tunix' own Qwen 3 with the experts and the weights of a tiny base."""
    from tunix.models.qwen3 import model as qwen3

    sizes = {**SIZES, **KINDS["qwen3_moe"][1]}
    config = qwen3.ModelConfig(
        num_layers=sizes["num_hidden_layers"], vocab_size=sizes["vocab_size"], embed_dim=sizes["hidden_size"],
        hidden_dim=sizes["moe_intermediate_size"], num_heads=sizes["num_attention_heads"], head_dim=sizes["head_dim"],
        num_kv_heads=sizes["num_key_value_heads"], rope_theta=1_000_000, norm_eps=1e-6,
        num_experts=sizes["num_experts"], num_experts_per_tok=sizes["num_experts_per_tok"],
    )  # fmt: skip
    return jaxadapt.export.import_base(base.folder, qwen3.Qwen3(config, rngs=nnx.Rngs(0)))


def log_probabilities_in_tunix(model: Any) -> np.ndarray:
    positions = jnp.arange(len(TOKENS))
    causal = positions[:, None] >= positions
    logits, _ = model(jnp.array([TOKENS]), positions[None], None, causal[None])
    return measure.log_probabilities(np.asarray(logits[0]))


def adapt_in_tunix(model: Any) -> None:
    """Attach an adapter of experts, routers and attention with random values."""
    parameters = [*cases("qwen3_moe")["experts"]["target_parameters"], f"{ROUTERS['qwen3_moe']}.weight"]
    config = jaxadapt.LoraConfig(
        r=3, lora_alpha=5, use_rslora=True, target_modules=["q_proj", "o_proj"], target_parameters=parameters
    )
    jaxadapt.adapt(model, config, rngs=nnx.Rngs(1))
    rng, state = np.random.default_rng(1), nnx.state(model, jaxadapt.AdapterParam)
    nnx.update(model, jax.tree.map(lambda x: x + 0.3 * rng.standard_normal(x.shape).astype(x.dtype), state))


def small(work: Path, programs: Path, program: str, kind: str) -> measure.Base:
    """Write a tiny model for transformers, and for one program: mlx-lm's folder, or llama.cpp's file."""
    folder, path = work / "base", work / "base.gguf"
    model_of(kind).save_pretrained(folder)
    if program == "mlx":
        save_for_mlx(kind, folder, work / "mlx")
    else:
        command = [sys.executable, measure.HERE / "convert_base.py", environments.llama_sources(programs), folder, path]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    return measure.Base(folder, path, TOKENS)
