"""Models of libraries that pin other versions than ours, with their own LoRA on: SkyRL-tx and EasyDeL.

Only `record_others.py` imports them, each in an environment of its own; the tests have what it wrote down. Weights have
the values that their names say, as in `tests/keymaps/families`, so that PyTorch's models are those of two specimens
there.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxadapt.keymaps import families, plan
from jaxadapt.models import LoraTree
from tests.keymaps.families import specimen_arrays
from tests.keymaps.families.specimens import BY_NAME, IDS, PROJ, values

RECORDED = Path(__file__).parent / "recorded"
TORCH = {"skyrl-qwen3": "tunix-qwen3-tied", "easydel-llama": "flax-llama"}
"""The specimen whose PyTorch model it is."""
SLOTS, ROOM, SLOT, INTO = 3, 5, 1, 2
RANKS, SCALES = np.array([5, 3, 0], np.int32), np.array([1, 5 / 3, 0], np.float32)
"""Of SkyRL-tx: how many slots, the rank there is room for, the slot that is trained and one that is filled."""


def config_of(name: str) -> dict[str, Any]:
    config = dict(BY_NAME[TORCH[name]].config)
    return {**config, "rope_theta": config["rope_parameters"]["rope_theta"]}


def value(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """A LoRA leaf, or the ranks and scales of a slot; what lies beyond a slot's rank is zero."""
    if path.endswith("lora_ranks"):
        return RANKS
    if path.endswith("lora_scaling"):
        return SCALES
    x = values(path, shape)
    for slot, rank in enumerate(RANKS if "lora_A" in path or "lora_B" in path else ()):
        x[slot, ..., rank:] *= "lora_A" not in path
        x[slot, ..., rank:, :] *= "lora_B" not in path
    return x


def base(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The values of a Llama's or Qwen's base leaves."""
    known = {path: shape for path, shape in shapes.items() if families.get_family("llama").match(path)}
    made = plan.base_plan(families.get_family("llama"), known)
    leaves = made.decode({key: values(key, shape) for key, shape in made.shapes.items()})
    # (EasyDeL calls the scale of a norm "kernel", which the table has no line for.)
    norms = {p: values(p.replace(".kernel", ".weight"), s) for p, s in shapes.items() if p not in known}
    return leaves | norms


def write_peft(name: str, shapes: dict[str, tuple[int, ...]], folder: Any) -> None:
    """The adapter of its specimen, as PEFT would have written it."""
    known = {path: shape for path, shape in shapes.items() if families.get_family("llama").match(path)}
    specimen_arrays.write_adapter(dataclasses.replace(BY_NAME[TORCH[name]], table="llama"), known, Path(folder))


def tree_of(name: str, leaves: Any) -> Any:
    """What the verbs take as the tree."""
    return LoraTree(leaves, slot=SLOT) if name.startswith("skyrl") else leaves


def recorded(name: str) -> dict[str, Any]:
    found = json.loads((RECORDED / f"{name}.json").read_text(encoding="utf-8"))
    for part in ("base", "lora"):
        found[part] = {path: tuple(shape) for path, shape in found[part].items()}
    return found


@dataclasses.dataclass(frozen=True)
class Model:
    """`run(slot)` gives the logits of what is in it now."""

    model: nnx.Module
    run: Callable[[int], Any]


def skyrl() -> Model:
    configs, qwen3 = (importlib.import_module(f"tx.models.{m}") for m in ("configs", "qwen3"))
    hf = importlib.import_module("transformers").Qwen3Config(**config_of("skyrl-qwen3"))
    config = configs.Qwen3Config(hf, max_lora_adapters=SLOTS, max_lora_rank=ROOM, shard_attention_heads=False)
    mesh = jax.make_mesh((1, 1, 1), ("fsdp", "tp", "ep"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    ids = jnp.asarray(IDS, jnp.int32)
    with jax.set_mesh(mesh):
        model = qwen3.Qwen3ForCausalLM(config, dtype=jnp.float32, rngs=nnx.Rngs(0))

    def run(slot: int) -> Any:
        with jax.set_mesh(mesh):
            which = jnp.full(len(IDS), slot)
            out = model(ids, attention_mask=jnp.ones_like(ids), adapter_indices=which)
            return model.compute_logits(out.last_hidden_state, which)

    return Model(model, run)


def easydel() -> Model:
    importlib.import_module("easydel")
    where = "easydel.modules.llama"
    layers, utils = importlib.import_module("easydel.layers"), importlib.import_module("easydel.infra.utils")
    config = importlib.import_module(f"{where}.llama_configuration").LlamaConfig(**config_of("easydel-llama"))

    def frequencies(*_: Any, **__: Any) -> Any:
        """As EasyDeL 0.3.0 computes them, but not rounded to bfloat16 whatever the dtype is."""
        size, most = config.head_dim, config.granted_freq_max_position_embedding
        return utils.ModuleCaches(
            layers.get_frequencies(head_size=size, rotary_dim=size, max_position=most, base=config.rope_theta)
        )

    object.__setattr__(config, "get_basic_frequencies", frequencies)
    config.add_basic_configurations(
        sharding_axis_dims=(1, 1, 1, 1, 1), use_sharding_constraint=False, attn_mechanism="vanilla",
        attn_dtype=jnp.float32, attn_softmax_dtype=jnp.float32,
    )  # fmt: skip
    cls = importlib.import_module(f"{where}.modeling_llama").LlamaForCausalLM
    with config.mesh:
        model = cls(config=config, dtype=jnp.float32, param_dtype=jnp.float32, precision="highest", rngs=nnx.Rngs(0))
        model = model.apply_lora_to_layers(lora_rank=3, lora_pattern="|".join(PROJ), verbose=False, rngs=nnx.Rngs(1))

    def run(slot: int) -> Any:
        with config.mesh:
            return model(input_ids=jnp.asarray(IDS, jnp.int32)).logits

    return Model(model, run)
