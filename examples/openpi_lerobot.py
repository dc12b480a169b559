"""openpi's LoRA to LeRobot: an Orbax checkpoint of openpi's training becomes a PEFT folder for LeRobot's policies.

    python examples/openpi_lerobot.py            # 5 seconds; writes a checkpoint and a folder to out/openpi_lerobot
    python examples/openpi_lerobot.py OUT --checkpoint checkpoints/pi0_libero_low_mem_finetune/NAME/29999 --base BASE

BASE is the folder of the policy without LoRA: the same checkpoint in PyTorch, with LeRobot's config.json.
docs/openpi_lerobot.md says how to make it. It prints

    84 tensors for modules such as model.paligemma_with_expert.paligemma.model.language_model.layers.0.self_attn.q_proj
    rank 8 and scale 1: q_proj of PaliGemma
    rank 12 and scale 1: q_proj of the action expert

The ranks are those of a head (2 and 3) times the heads (4), because each head has an A of its own.
"""

from __future__ import annotations

import argparse
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

import jaxadapt
from jaxadapt.models import LoraTree

PREFIX = "base_model.model."
EXPERTS = ("paligemma_with_expert.paligemma.model.language_model.", "paligemma_with_expert.gemma_expert.model.")


def write_checkpoint(
    folder: Path, ranks: Any, sizes: Any = ((32, 64), (16, 32)), depth: int = 3, heads: int = 4, head: int = 6
) -> None:
    """Write random LoRA leaves with the names of openpi's two experts, in place of a training.

    `sizes` are the widths and the inner widths of PaliGemma and the action expert.
    """
    layers: dict[str, Any] = {"attn": {}, "mlp": {}, "mlp_1": {}}
    rng = np.random.default_rng(0)

    def put(module: dict[str, Any], name: str, shape: tuple[int, ...]) -> None:
        module[name] = {"value": rng.normal(0, 0.01, (depth, *shape)).astype(np.float32)}

    for end, (width, inner), rank in zip(("", "_1"), sizes, ranks, strict=True):
        for name, lead, a, b in (
            ("q", (heads,), width, head), ("kv", (2, 1), width, head), ("attn_vec", (heads,), head, width),
        ):  # fmt: skip
            module = layers["attn"][f"{name}_einsum{end}"] = {}
            put(module, "lora_a", (*lead, a, rank))
            put(module, "lora_b", (*lead, rank, b))
        put(layers[f"mlp{end}"], "gating_einsum_lora_a", (2, width, rank))
        put(layers[f"mlp{end}"], "gating_einsum_lora_b", (2, rank, inner))
        put(layers[f"mlp{end}"], "linear_lora_a", (inner, rank))
        put(layers[f"mlp{end}"], "linear_lora_b", (rank, width))
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder.resolve(), {"params": {"PaliGemma": {"llm": {"layers": layers}}}})


def read_lora(folder: Path) -> Any:
    """Return the LoRA leaves of openpi's `params` folder as NumPy arrays; the base is not read."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        every = checkpointer.metadata(folder.resolve()).item_metadata.tree
        lora: dict[str, Any] = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(every):
            keys = [str(getattr(key, "key", key)) for key in path]
            if any("lora" in key for key in keys):
                place = lora
                for key in keys[:-1]:
                    place = place.setdefault(key, {})
                place[keys[-1]] = leaf
        restored = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), lora)
        arguments = ocp.args.PyTreeRestore(item=lora, restore_args=restored, partial_restore=True)
        return checkpointer.restore(folder.resolve(), arguments)["params"]


def main(folder: Path, checkpoint: Path | None, base: str, alphas: tuple[float, float]) -> None:
    """Convert the checkpoint; without one, write a small one first."""
    if checkpoint is None:
        checkpoint, alphas = folder / "checkpoint", (2, 3)
        if not checkpoint.exists():
            write_checkpoint(checkpoint / "params", ranks=(2, 3))
    # openpi's experts have different ranks and alphas. `alpha_pattern` has PEFT's names.
    pattern = {r"gemma_expert\..*self_attn\.\w+": alphas[1]}
    config = jaxadapt.LoraConfig(lora_alpha=alphas[0], alpha_pattern=pattern)
    tree = LoraTree(read_lora(checkpoint / "params"), config=config, on_shared="concat")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*openpi:pi0.*not been verified")
        found = jaxadapt.to_peft(tree, keymap="openpi:pi0")
    # LeRobot's policy has openpi's PyTorch model as its attribute `model`.
    tensors = {key.replace(PREFIX, f"{PREFIX}model.", 1): x for key, x in found.tensors.items()}
    config = found.config.replace(base_model_name_or_path=base)
    jaxadapt.write(jaxadapt.PeftTensors(config, tensors), folder / "adapter")
    if (Path(base) / "config.json").exists():  # LeRobot reads the policy's configuration beside the adapter
        policy = json.loads((Path(base) / "config.json").read_text())
        (folder / "adapter/config.json").write_text(json.dumps({**policy, "use_peft": True}, indent=2))
        for file in Path(base).glob("policy_p*"):  # its normalization
            shutil.copy(file, folder / "adapter")

    modules = [f"model.{expert}layers.0.self_attn.q_proj" for expert in EXPERTS]
    print(f"{len(tensors)} tensors for modules such as {modules[0]}")
    for name, module in zip(("PaliGemma", "the action expert"), modules, strict=True):
        rank, scale = tensors[f"{PREFIX}{module}.lora_A.weight"].shape[0], config.scale_of(module)
        print(f"rank {rank} and scale {scale:g}: q_proj of {name}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", type=Path, default=Path("out/openpi_lerobot"))
    parser.add_argument("--checkpoint", type=Path, help="a step of openpi's training")
    parser.add_argument("--base", default="BASE", help="the policy without LoRA")
    parser.add_argument("--alphas", type=float, nargs=2, default=(16, 32), help="of PaliGemma and the action expert")
    given = parser.parse_args()
    main(given.folder, given.checkpoint, given.base, tuple(given.alphas))
