"""What `verify` and `repair` say about a file, against PEFT's own reading of it."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxadapt
from jaxadapt.export.adapter_files import extract_files

pytestmark = pytest.mark.peft
P = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
X = np.random.default_rng(7).standard_normal((2, 6)).astype("float32")


def net() -> Any:
    import torch

    torch.manual_seed(0)
    layers = [("q_proj", torch.nn.Linear(6, 8)), ("act", torch.nn.Tanh()), ("up_proj", torch.nn.Linear(8, 6))]
    model = torch.nn.Module()
    model.model = torch.nn.Sequential()
    for name, layer in layers:
        model.model.add_module(name, layer)
    model.forward = model.model.forward
    return model


def trained(folder: Path, seed: int = 1, **fields: Any) -> Any:
    """A PEFT model with random adapter values, also saved to `folder`."""
    import torch
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(net(), LoraConfig(**{"r": 2, "target_modules": ["q_proj", "up_proj"], **fields}))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return model


def outputs(folder: Any = None) -> np.ndarray:
    """The outputs of PEFT's model with the adapter in `folder`; without one, those of the base."""
    import torch
    from peft import PeftModel

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = net() if folder is None else PeftModel.from_pretrained(net(), folder)
        return model(torch.from_numpy(X)).numpy()


def codes(path: Any, base: Any = None) -> list[str]:
    return [f.code for f in jaxadapt.verify(path, base) if f.severity != "note"]


def beside(sound: Path, tensors: dict[str, Any], **changes: Any) -> Path:
    """A folder with other tensors, and the changed configuration of the sound one."""
    out = sound.parent / "found"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, out / WEIGHTS)
    (out / CONFIG).write_text(json.dumps(json.loads((sound / CONFIG).read_text()) | changes))
    return out


# ---------------------------------------------------------------- the modules that hold a PEFT model

HOLDERS = (
    "module", "module.module", "_orig_mod", "_orig_mod.module", "module._orig_mod", "_fsdp_wrapped_module",
    "_forward_module", "_forward_module.module", "model", "net", "policy", "actor.module", "pretrained_model",
    "student.model", "llm",
)  # fmt: skip


def held(model: Any, path: str) -> Any:
    """A module that holds the model at a path, as DataParallel, torch.compile, Fabric and trainers of policies do."""
    import torch

    for name in reversed(path.split(".")):
        holder = torch.nn.Module()
        holder.add_module(name, model)
        model = holder
    return model


@pytest.mark.parametrize("path", HOLDERS)
def test_keys_of_a_module_that_holds_the_peft_model_are_repaired_with_effect(path: str, tmp_path: Path):
    model = trained(tmp_path / "sound")
    right, plain = outputs(tmp_path / "sound"), outputs()
    assert not np.allclose(right, plain)
    whole = {key: value.numpy() for key, value in held(model, path).state_dict().items()}
    saved = {f"{path}.{key}": value for key, value in load_file(tmp_path / "sound" / WEIGHTS).items()}
    for tensors in (whole, saved):
        found = beside(tmp_path / "sound", tensors)
        assert "wrapper-names" in codes(found)
        assert np.array_equal(outputs(found), plain)
        result = jaxadapt.repair(found, tmp_path / "repaired")
        assert not result.remaining
        assert np.array_equal(outputs(result.path), right)
        shutil.rmtree(tmp_path / "repaired")


def test_an_actor_and_a_critic_in_one_file_are_not_repaired(tmp_path: Path):
    trained(tmp_path / "sound")
    tensors = load_file(tmp_path / "sound" / WEIGHTS)
    found = beside(tmp_path / "sound", {f"{name}.{k}": v for name in ("actor", "critic") for k, v in tensors.items()})
    assert codes(found) == ["several-adapters"]
    with pytest.raises(jaxadapt.MismatchError, match=r"several PEFT models: actor\.base_model\.model\., critic"):
        jaxadapt.repair(found, tmp_path / "repaired")
    with pytest.raises(jaxadapt.MismatchError, match="expected the state dict of one PEFT model, found"):
        extract_files(found / WEIGHTS, tmp_path / "repaired")
    assert not (tmp_path / "repaired").exists()
