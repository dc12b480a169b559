"""A specimen's weights and adapter in the layout of its JAX model, without PyTorch: what `record.py` starts from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxadapt
from jaxadapt.core import paths
from jaxadapt.keymaps import families, plan
from jaxadapt.keymaps import plan as pieces
from tests.keymaps.families.specimens import PEFT_PREFIX, Specimen, values

Shapes = Mapping[str, tuple[int, ...]]


def source(specimen: Specimen, key: str) -> str:
    """The key whose values a tied weight has."""
    return (
        dict(families.get_family(specimen.table).tied).get(key, key)
        if key in (*specimen.unused, *specimen.copies)
        else key
    )


def base_leaves(specimen: Specimen, shapes: Shapes) -> dict[str, np.ndarray]:
    made = base_plan(specimen, shapes)
    tensors = {key: values(source(specimen, key), shape) for key, shape in whole(made).items()}
    leaves = made.decode(pieces.cut_parts(tensors, made.keys))
    for leaf, (rows, *others) in specimen.unmapped:
        if not others:
            leaves[leaf] = values(rows, (1,)).reshape(())
            continue
        (added,), first, (count, width) = others, specimen.config["pad_token_id"] + 1, shapes[leaf]
        every = values(rows, (specimen.config["max_position_embeddings"], width))
        leaves[leaf] = every[first : first + count] + values(added, (1, width))
    for leaf, layers in specimen.joined:
        rows = [_joined_rows(specimen.config, keys, shapes[leaf]) for keys in layers]
        leaves[leaf] = np.stack(rows, axis=1) if len(shapes[leaf]) == 3 else rows[0]
    return leaves


def _joined_rows(config: Mapping[str, Any], keys: tuple[str, str], shape: tuple[int, ...]) -> np.ndarray:
    """MaxText's `in_proj_qkvz` or `in_proj_ba`, (in, out): rows of two modules, side by side for each key head.

    (maxtext 0.2.5, `QWEN3_5_MAXTEXT_TO_HF_PARAM_HOOK_FN`: q, k, v and z of a key head, or b and a.)
    """
    heads, width = config["linear_num_key_heads"], shape[0]
    queries = heads * config["linear_key_head_dim"]
    each = config["linear_num_value_heads"] * (config["linear_value_head_dim"] if "qkv" in keys[0] else 1)
    first = values(keys[0], (shape[-1] - each, width))
    parts = np.split(first, [queries, 2 * queries]) if "qkv" in keys[0] else [first]
    rows = [x.reshape(heads, -1, width) for x in (*parts, values(keys[1], (each, width)))]
    return np.concatenate(rows, axis=1).reshape(-1, width).T


def base_plan(specimen: Specimen, shapes: Shapes) -> plan.Plan:
    """The plan of the leaves that have an entry."""
    unmapped = dict((*specimen.unmapped, *specimen.joined))
    return plan.base_plan(
        families.get_family(specimen.table), {leaf: x for leaf, x in shapes.items() if leaf not in unmapped}
    )


def whole(made: plan.Plan) -> Shapes:
    """The tensors of a file, put together where a plan has parts of them."""
    return {
        key: pieces.joined_shape(parts, made.shapes[parts[0]])
        for key, parts in pieces.group_by_file_key(made.keys).items()
    }


def adapter_values(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor of this name in an adapter's file."""
    assert key.startswith(PEFT_PREFIX), key
    return values(key, shape)


def write_adapter(specimen: Specimen, shapes: Shapes, folder: Path) -> None:
    """The adapter as PEFT would have written it, from the names our table gives its tensors."""
    config = jaxadapt.LoraConfig(**specimen.lora)
    tree = paths.unflatten({p: jax.ShapeDtypeStruct(s, "float32") for p, s in shapes.items()})
    fresh = jaxadapt.init(tree, config, key=jax.random.key(0), keymap=specimen.table)
    # Zeros, since gate and up of experts are one A in PEFT's file, so their values must be equal.
    made = jaxadapt.to_peft(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), fresh)).tensors
    tensors = {key: adapter_values(key, x.shape) for key, x in made.items()}
    jaxadapt.write(jaxadapt.PeftTensors(config, tensors), folder)
