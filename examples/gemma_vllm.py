"""Train LoRA with Google's gemma package (Linen), write a PEFT folder, and export it for vLLM and llama.cpp.

    pip install 'jaxadapt[gguf]' gemma           # gemma 4 needs Python 3.12 or newer
    python examples/gemma_vllm.py                # 20 seconds; writes to out/gemma_vllm
    vllm serve out/gemma_vllm/base --enable-lora --lora-modules mine=out/gemma_vllm/vllm
    llama-cli -m BASE.gguf --lora out/gemma_vllm/adapter.gguf  # BASE.gguf by llama.cpp's convert_hf_to_gguf.py

gemma's LoRA does not scale, so PEFT's alpha equals the rank. gemma has one A for keys and values, and one for gate and
up; the folder repeats it. The base is a small random Gemma 3: `gm.nn.Gemma3_1B()` and `gm.ckpts.load_params` take its
place. It prints

    held-out loss 4.959 -> 2.974 after 20 steps
    note: LORA adapter for out/gemma_vllm/base, 28 tensors, 14 adapted modules
    note: rank 4 and scale 1 in 14 modules (down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj)
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from gemma import gm, peft

import jaxadapt
from jaxadapt.export import export_adapter, export_base

LOCAL, GLOBAL = gm.nn.AttentionType.LOCAL_SLIDING, gm.nn.AttentionType.GLOBAL
CONFIG = {  # of Hugging Face, for vLLM and llama.cpp
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "vocab_size": 64, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "query_pre_attn_scalar": 8, "sliding_window": 512, "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
    },
    "rms_norm_eps": 1e-6, "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True, "dtype": "float32",
    "max_position_embeddings": 1024,
}  # fmt: skip


SIZE = dataclasses.replace(
    gm.nn.Gemma3_270M().config, num_embed=64, embed_dim=32, hidden_dim=48, num_heads=4, num_kv_heads=2, head_dim=8,
    attention_types=(LOCAL, GLOBAL),
)  # fmt: skip


def batch(step: int) -> jax.Array:
    """Return tokens (8, 16): each row counts on from a random token. There is no 0, which is gemma's padding."""
    return jnp.asarray(1 + (np.random.default_rng(step).integers(0, 63, (8, 1)) + np.arange(16)) % 63, jnp.int32)


def main(folder: Path) -> None:
    """Train, save the adapter, verify it, and export it."""
    model = gm.nn.LoRA(rank=4, model=gm.nn.Gemma3_270M(config=SIZE, dtype=jnp.float32), dtype=jnp.float32)
    base, lora = peft.split_params(model.init(jax.random.key(0), batch(0))["params"])
    rng = np.random.default_rng(0)  # gemma's own random values are too small to learn from; norms stay
    base = jax.tree.map(lambda x: x if x.ndim == 1 else jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype), base)
    optimizer = optax.adam(1e-2)

    def loss(lora: Any, tokens: jax.Array) -> jax.Array:
        logits = model.apply({"params": peft.merge_params(base, lora)}, tokens).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()

    @jax.jit
    def train_step(lora: Any, state: Any, tokens: jax.Array) -> Any:
        updates, state = optimizer.update(jax.grad(loss)(lora, tokens), state)
        return optax.apply_updates(lora, updates), state

    evaluate, state = jax.jit(loss), optimizer.init(lora)
    first = float(evaluate(lora, batch(0)))
    for step in range(1, 21):
        lora, state = train_step(lora, state, batch(step))
    print(f"held-out loss {first:.3f} -> {float(evaluate(lora, batch(0))):.3f} after 20 steps")

    (folder / "base").mkdir(parents=True, exist_ok=True)
    (folder / "base/config.json").write_text(json.dumps(CONFIG))
    export_base({"params": base}, folder / "base")
    params = {"params": peft.merge_params(base, lora)}
    jaxadapt.save(params, folder / "adapter", base_model=str(folder / "base"))
    for finding in jaxadapt.verify(folder / "adapter", folder / "base"):
        print(f"{finding.severity}: {finding.found}")
    export_adapter(folder / "adapter", folder / "vllm", "vllm")
    export_adapter(folder / "adapter", folder / "adapter.gguf", "gguf", base=folder / "base")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/gemma_vllm"))
