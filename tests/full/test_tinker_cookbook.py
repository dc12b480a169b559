"""Tinker's cookbook itself: its merge changes the weights that the CI's test expects, and its PEFT adapters are read.

The cookbook's conversion needs none of its other packages: `pip download --no-deps tinker-cookbook==0.6.1`, unpack the
wheel, and name its folder in TINKER_COOKBOOK. Without it, the tests are skipped.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxadapt
from tests.persistence.test_tinker_files import ALPHA, JOINT, RANK, joint_changes, tiny, write

FOLDER = os.environ.get("TINKER_COOKBOOK", "")
pytestmark = pytest.mark.skipif(not FOLDER, reason="TINKER_COOKBOOK names no folder")


@pytest.fixture(scope="module")
def cookbook() -> Any:
    """Return the modules of the merge and of the adapters, without the package's imports of Tinker's client."""
    for name in ("tinker_cookbook", "tinker_cookbook.weights"):
        module = types.ModuleType(name)
        module.__path__ = [str(Path(FOLDER, *name.split(".")))]
        sys.modules[name] = module
    return [importlib.import_module(f"tinker_cookbook.weights.{name}") for name in ("_merge", "_adapter")]


def checkpoint(kind: str, state: dict[str, Any]) -> dict[str, Any]:
    """The names and the single experts that a checkpoint of Nemotron has."""
    if kind != "NemotronH":
        return dict(state)
    found = {key.replace("model.layers", "backbone.layers"): x for key, x in state.items()}
    for key in [key for key in found if key.endswith((".experts.up_proj", ".experts.down_proj"))]:
        stacked, (block, _, end) = found.pop(key), key.rpartition(".")
        found |= {f"{block}.{expert}.{end}.weight": x for expert, x in enumerate(stacked)}
    return found


def profile_of(merge: Any, kind: str, config: Any, keys: set[str]) -> Any:
    own = {**config.to_dict(), "architectures": [f"{kind}ForCausalLM"]}
    return merge.detect_merge_profile(own | ({"model_type": "qwen3_5"} if kind.startswith("Qwen3_5") else {}), keys)


@pytest.mark.parametrize("case", JOINT)
def test_its_merge_changes_the_same_weights(case: str, cookbook: Any):
    import torch

    merge, _ = cookbook
    kind, fields, tensors, _ = JOINT[case]
    model = tiny(kind, **fields)
    before = {key: x.clone().numpy() for key, x in model.state_dict().items()}
    state, given = checkpoint(kind, model.state_dict()), {key: torch.from_numpy(x) for key, x in tensors.items()}
    profile = profile_of(merge, kind, model.config, set(state))
    settings = {"lora_alpha": ALPHA, "r": RANK}
    with torch.no_grad():
        for operations in merge.plan_merge_ops(given, settings, set(state), profile).values():
            for operation in operations:
                merge.apply_merge_op(state, operation)  # the state has the model's own memory
    expected = joint_changes(tensors)
    for key, x in model.state_dict().items():
        change = expected[key] if key in expected else np.zeros(x.shape)
        np.testing.assert_allclose(x.numpy() - before[key], change, atol=1e-6)


def test_its_peft_adapter_of_qwen35_is_read_as_the_download(cookbook: Any, tmp_path: Path):
    """The cookbook leaves in_proj_q, in_proj_k and in_proj_v apart, which PEFT does not find in the model."""
    import torch

    merge, adapter = cookbook
    kind, fields, tensors, _ = JOINT["qwen3.5"]
    model = tiny(kind, **fields)
    keys, given = set(model.state_dict()), {key: torch.from_numpy(x) for key, x in tensors.items()}
    profile = profile_of(merge, kind, model.config, keys)
    converted, targets, _ = adapter._convert_adapter(given, keys, profile)
    settings = adapter._build_peft_config({"r": RANK, "lora_alpha": ALPHA}, "org/base", targets)
    written = write(tmp_path / "peft", {key: x.numpy() for key, x in converted.items()}, settings)
    one, other = jaxadapt.read(written), jaxadapt.read(write(tmp_path / "tinker", tensors))
    assert one.tensors.keys() == other.tensors.keys()
    assert all(np.array_equal(x, other.tensors[key]) for key, x in one.tensors.items())
    assert one.config.get("rank_pattern") == other.config.get("rank_pattern")
