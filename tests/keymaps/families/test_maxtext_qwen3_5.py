"""MaxText's Qwen 3.5 has the leaves of its Qwen3-Next, and two of them hold rows of two of PyTorch's modules.

(maxtext 0.2.5, `QWEN3_5_MAXTEXT_TO_HF_PARAM_HOOK_FN`: q, k, v and z of each key head stand side by side.)
"""

from __future__ import annotations

import jax
import pytest

import jaxadapt
from jaxadapt import KeyMapError, MismatchError, TargetError
from jaxadapt.core import paths
from jaxadapt.keymaps import families, plan
from tests.keymaps.families.specimens import recorded

SHAPES = recorded("maxtext-qwen3_next")["leaves"]
KEYMAP = "maxtext:qwen3_5"


def init(target: str) -> jaxadapt.Adapter:
    tree = paths.unflatten({path: jax.ShapeDtypeStruct(shape, "float32") for path, shape in SHAPES.items()})
    return jaxadapt.init(tree, jaxadapt.LoraConfig(r=2, target_modules=[target]), key=jax.random.key(0), keymap=KEYMAP)


def test_a_model_is_taken_for_neither():
    with pytest.raises(KeyMapError, match=r"maxtext:qwen3_next, maxtext:qwen3_5; select one"):
        families.resolve_keymap("auto", SHAPES)


def test_an_adapter_of_the_joined_projections_is_refused():
    with pytest.raises(TargetError, match=r"in_proj_qkvz.kernel: kind 'other'"):
        init("in_proj_qkv")
    with pytest.raises(TargetError, match="found none that matches 'in_proj_z'"):
        init("in_proj_z")


def test_a_whole_model_is_refused():
    with pytest.raises(MismatchError, match=r"layers.0.linear_attn.in_proj_qkv.weight: .*in_proj_ba.*in_proj_qkvz"):
        plan.base_plan(families.get_family(KEYMAP), SHAPES)


def test_the_other_layers_have_transformers_names():
    for target, count in (("out_proj", 3), ("q_proj", 1), ("shared_expert.up_proj", 4)):
        assert len(paths.flatten(init(target).params)) == 2 * count
