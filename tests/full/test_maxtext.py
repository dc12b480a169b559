"""`CheckpointManager` inside MaxText's own fine-tuning loop (examples/tunix_checkpoints.py).

MaxText installs on Python 3.13 only. What this loop needs of the much that it asks for, in an environment of their own:

    pip install jaxadapt pytest qwix transformers
    pip install --no-deps maxtext==0.2.5 google-tunix pathwaysutils google-metrax  # and what importing train_sft misses

Skipped without it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import jaxadapt

if importlib.util.find_spec("maxtext") is None or importlib.util.find_spec("tunix") is None:
    pytest.skip("needs maxtext and tunix", allow_module_level=True)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("foreign_model"),
    pytest.mark.filterwarnings("ignore"),  # its own, and its libraries'
]

ROOT = Path(__file__).resolve().parents[2]
STEPS, BATCH, LENGTH = 6, 8, 16


def config(folder: Path, steps: int) -> Any:
    """A Llama of two scanned layers with Qwix's LoRA, trained on tokens of our own."""
    from maxtext import configs
    from maxtext.configs import pyconfig

    file = Path(configs.__path__[0]) / "post_train" / "sft.yml"
    return pyconfig.initialize_pydantic([
        "test", str(file), "run_name=test", f"base_output_directory={folder}", "enable_checkpointing=false",
        "log_config=false", "skip_jax_distributed_system=true", "dataset_type=synthetic",
        "enable_goodput_recording=false",
        f"steps={steps}", f"per_device_batch_size={BATCH / jax.device_count()}", f"max_target_length={LENGTH}",
        "attention=dot_product", "dtype=float32", "weight_dtype=float32", "enable_dropout=false", "eval_interval=-1",
        "decoder_block=llama2", "base_emb_dim=16", "base_num_query_heads=4", "base_num_kv_heads=2", "base_mlp_dim=32",
        "base_num_decoder_layers=2", "head_dim=4", "vocab_size=32", "learning_rate=0.01", "lora.enable_lora=true",
        "lora.lora_rank=4", "lora.lora_alpha=8.0", "lora.lora_module_path=.*(query|value|wi_0)",
        "tokenizer_path=none", "packing=false", "sharding_tolerance=1.0",
        f"learning_rate_schedule_steps={STEPS}",  # else as long as this run
    ])  # fmt: skip


def batches() -> Iterator[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    where = np.broadcast_to(np.arange(LENGTH, dtype="i4"), (BATCH, LENGTH))
    for _ in range(STEPS):
        ids = rng.integers(0, 32, (BATCH, LENGTH + 1), "i4")
        found = {"inputs": ids[:, :-1], "targets": ids[:, 1:]}
        for name in ("inputs", "targets"):
            found |= {f"{name}_position": where, f"{name}_segmentation": np.ones_like(where)}
        yield found


def test_resuming_inside_maxtext(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left after three steps and resumed, it ends with the numbers of a run that was not; PEFT's folder comes out."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from maxtext.trainers.post_train.sft import train_sft
    from tunix.sft import checkpoint_manager
    from tunix_checkpoints import Checkpoints

    def run(folder: Path, steps: int, leave: int | None = None) -> Any:
        given = config(tmp_path / "maxtext", steps)
        trainer, mesh = train_sft.setup_trainer_state(given)
        with jaxadapt.CheckpointManager(folder, keep=2) as manager:
            trainer.checkpoint_manager = checkpoint_manager.CheckpointManager()
            hooks = trainer.training_hooks
            checkpoints = Checkpoints(manager, every=100, stop=lambda step: step == leave, inner=hooks)
            trainer.with_training_hooks(checkpoints)
            with jax.set_mesh(mesh):
                first = checkpoints.resume(trainer) or 0
            trainer.data_hooks.train_data_loader.data_iterator = iter(list(batches())[first:])
            train_sft.train_model(given, trainer, mesh)
        return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(trainer.model, nnx.LoRAParam)))

    whole = run(tmp_path / "whole", STEPS)
    with pytest.raises(SystemExit):
        run(tmp_path / "parts", STEPS, leave=3)
    parts = run(tmp_path / "parts", STEPS - 3)
    manager = jaxadapt.CheckpointManager(tmp_path / "parts")
    assert manager.steps == [3, STEPS]
    assert any(np.abs(x).max() > 0 for path, x in jax.tree.leaves_with_path(whole) if "lora_b" in str(path))
    jax.tree.map(np.testing.assert_array_equal, parts, whole)
    manager.export(None, tmp_path / "peft", lora_alpha=8, keymap="maxtext:llama3.1/scan1")
    modules = {key.split(".")[-3] for key in jaxadapt.read(tmp_path / "peft").tensors}
    assert modules == {"q_proj", "v_proj", "gate_proj"}
    sys.modules.pop("tunix_checkpoints", None)
