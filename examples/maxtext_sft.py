"""Fine-tune a Llama of MaxText with LoRA in MaxText's own loop: from Hugging Face's weights to a PEFT folder.

    python examples/maxtext_sft.py               # 40 seconds; writes base, run and adapter to out/maxtext_sft
    jaxadapt verify out/maxtext_sft/adapter --base out/maxtext_sft/base

MaxText needs Python 3.13; tests/full/test_maxtext.py lists the packages. The family of a Llama is passed as `keymap=`,
because MaxText's weights do not show its RoPE. Its layers are stacked on axis 1. `normalize_embedding_logits=false` is
needed for a tied head, whose logits MaxText otherwise divides by the square root of the width. The base is small and
random; a real one is a folder of `hf download`, with its sizes in SIZE. It prints

    held-out loss 4.682 -> 3.299 after 20 steps
    note: LORA adapter for out/maxtext_sft/base, 12 tensors, 6 adapted modules
    note: rank 4 and scale 2 in 6 modules (gate_proj, q_proj, v_proj)

and what MaxText itself prints.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from maxtext import configs
from maxtext.configs import pyconfig
from maxtext.trainers.post_train.sft import train_sft
from tunix.sft import checkpoint_manager
from tunix_checkpoints import Checkpoints

import jaxadapt
from jaxadapt.demo.llama import Llama, LlamaConfig
from jaxadapt.export import export_base, import_base
from jaxadapt.models import LoraTree

KEYMAP, ALPHA, STEPS, LENGTH, ROWS = "maxtext:llama3/scan1", 8, 20, 16, 8
SIZE = LlamaConfig(64, 32, 48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, rms_norm_eps=1e-5)


def settings(folder: Path, steps: int) -> Any:
    """Return MaxText's configuration of a Llama of two stacked layers with Qwix's LoRA."""
    file = Path(configs.__path__[0]) / "post_train" / "sft.yml"
    return pyconfig.initialize_pydantic([
        "maxtext", str(file), "run_name=sft", f"base_output_directory={folder}", "enable_checkpointing=false",
        "log_config=false", "skip_jax_distributed_system=true", "dataset_type=synthetic", "tokenizer_path=none",
        "enable_goodput_recording=false", f"steps={steps}", f"learning_rate_schedule_steps={STEPS}",
        f"per_device_batch_size={ROWS / jax.device_count()}", f"max_target_length={LENGTH}", "eval_interval=-1",
        "attention=dot_product", "dtype=float32", "weight_dtype=float32", "enable_dropout=false", "packing=false",
        "decoder_block=llama2", f"base_emb_dim={SIZE.hidden_size}", f"base_num_query_heads={SIZE.num_heads}",
        f"base_num_kv_heads={SIZE.num_kv_heads}", f"base_mlp_dim={SIZE.intermediate_size}",
        f"base_num_decoder_layers={SIZE.num_layers}", f"head_dim={SIZE.head_dim}", f"vocab_size={SIZE.vocab_size}",
        f"rope_max_timescale={int(SIZE.rope_theta)}", "logits_via_embedding=true", "normalize_embedding_logits=false",
        "learning_rate=0.02", "lora.enable_lora=true", "lora.lora_rank=4", f"lora.lora_alpha={ALPHA}",
        "lora.lora_module_path=.*(query|value|wi_0)", "sharding_tolerance=1.0",
    ])  # fmt: skip


def batch(step: int) -> dict[str, np.ndarray]:
    """Return the arrays of MaxText's batches: each row counts on from a random token."""
    ids = (np.random.default_rng(step).integers(0, 64, (ROWS, 1)) + np.arange(LENGTH + 1)).astype("i4") % 64
    found = {"inputs": ids[:, :-1], "targets": ids[:, 1:]}
    where = np.broadcast_to(np.arange(LENGTH, dtype="i4"), (ROWS, LENGTH))
    for name in ("inputs", "targets"):
        found |= {f"{name}_position": where, f"{name}_segmentation": np.ones_like(where)}
    return found


def main(folder: Path) -> None:
    """Read the base, train, save the adapter and verify it."""
    base = folder / "base"
    if not base.exists():
        base.mkdir(parents=True)
        (base / "config.json").write_text(json.dumps(SIZE.to_hf()))
        export_base(Llama(SIZE, rngs=nnx.Rngs(0)), base)
    held_out = batch(0)

    def evaluate(model: Any) -> float:
        logits = model(*(jnp.asarray(held_out[name]) for name in ("inputs", "inputs_position", "inputs_segmentation")))
        return float(optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(held_out["targets"])).mean())

    with jaxadapt.CheckpointManager(folder / "run", keep=2) as manager, manager.preemption() as stop:
        left = STEPS - (manager.latest or 0)  # MaxText's loop counts the steps of one run
        given = settings(folder / "maxtext", max(left, 1))
        trainer, mesh = train_sft.setup_trainer_state(given)
        trainer.checkpoint_manager = checkpoint_manager.CheckpointManager()  # one of nothing, in place of MaxText's own
        checkpoints = Checkpoints(manager, every=10, stop=stop, inner=trainer.training_hooks)
        trainer.with_training_hooks(checkpoints)
        with jax.set_mesh(mesh):
            weights = nnx.state(trainer.model, nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam)))
            nnx.update(trainer.model, import_base(base, weights, keymap=KEYMAP))
            first = evaluate(trainer.model)
            checkpoints.resume(trainer)
        batches: Iterator[Any] = (batch(step) for step in range(STEPS - left + 1, STEPS + 1))
        trainer.data_hooks.train_data_loader.data_iterator = batches
        if left:
            train_sft.train_model(given, trainer, mesh)
    with jax.set_mesh(mesh):
        print(f"held-out loss {first:.3f} -> {evaluate(trainer.model):.3f} after {STEPS} steps")
        tree = LoraTree(trainer.model, lora_alpha=ALPHA)
        jaxadapt.save(tree, folder / "adapter", keymap=KEYMAP, base_model=str(base))
    for finding in jaxadapt.verify(folder / "adapter", base):
        print(f"{finding.severity}: {finding.found}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/maxtext_sft"))
