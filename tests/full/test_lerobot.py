"""LeRobot's own π0 policy takes the adapter that examples/openpi_lerobot.py makes of an openpi checkpoint.

LeRobot needs Python 3.12 or newer, and packages that jaxadapt's tests do not install. In an environment of their own:

    pip install jaxadapt pytest 'lerobot==0.6.1' 'transformers>=5.4,<5.6' 'peft>=0.18' scipy

Skipped without it. The policy has its real sizes and no values of its own (the device "meta"), so it needs no download.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

if importlib.util.find_spec("lerobot") is None:
    pytest.skip("needs lerobot; the docstring has the command", allow_module_level=True)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # LeRobot's own
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "openpi_lerobot.py"


def new_policy() -> Any:
    """Return π0 with the sizes of gemma_2b and gemma_300m."""
    import torch
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.pi0.configuration_pi0 import PI0Config
    from lerobot.policies.pi0.modeling_pi0 import PI0Policy

    config = PI0Config(
        input_features={"observation.state": PolicyFeature(FeatureType.STATE, (32,))},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (32,))},
        device="cpu",
    )
    config.device = "meta"
    with torch.device("meta"):
        return PI0Policy(config)


def test_lerobots_policy_takes_every_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import peft

    names = runpy.run_path(str(EXAMPLE))
    real = {"sizes": ((2048, 16_384), (1024, 4096)), "depth": 18, "heads": 8, "head": 256}
    names["write_checkpoint"](tmp_path / "checkpoint/params", (2, 3), **real)
    monkeypatch.setattr(sys, "argv", ["openpi_lerobot", str(tmp_path)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")
        adapted = peft.PeftModel.from_pretrained(new_policy(), str(tmp_path / "adapter"), low_cpu_mem_usage=True)
    loaded = {name: x for name, x in adapted.named_parameters() if ".lora_" in name}
    written = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert len(written) == 2 * 2 * 7 * 18
    assert {name.replace(".default", "") for name in loaded} == written.keys()
    for name, x in loaded.items():  # the shapes are of the configuration's ranks and of the policy's layers
        assert x.shape == written[name.replace(".default", "")].shape, name
