"""PEFT itself, for tests to compare with: adapters on tiny torch models, saved, loaded, and their outputs.

The only place in the project that calls PEFT; imported by tests that need the extra `test`.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")  # --doctest-modules opens this file too, where the extra `test` is absent
pytest.importorskip("peft")

import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    get_peft_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors import safe_open

torch.set_num_threads(1)

CONFIGS = {"LORA": LoraConfig, "IA3": IA3Config}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclasses.dataclass(frozen=True)
class Setting:
    """One adapter configuration that both sides can build: `method` and the fields that are not default."""

    name: str
    family: str
    method: str
    fields: dict[str, Any]

    def peft(self) -> Any:
        """PEFT's own config object; the fields are copied, as PEFT changes some in place."""
        return CONFIGS[self.method](**copy.deepcopy(self.fields))


_LLAMA_ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_GPT2_ALL = ["c_attn", "c_proj", "c_fc"]
_LM: dict[str, Any] = {"task_type": "CAUSAL_LM"}
# PEFT sets this itself for a Conv1D, with a warning that tests count as an error.
_CONV: dict[str, Any] = {"fan_in_fan_out": True}


def _lora(**fields: Any) -> dict[str, Any]:
    return {"r": 4, "lora_alpha": 6, **_LM, **fields}


def _ia3(**fields: Any) -> dict[str, Any]:
    return {**_LM, **fields}


SETTINGS = [
    Setting("llama-lora", "llama", "LORA", _lora(target_modules=["q_proj", "v_proj", "down_proj"])),
    Setting(
        "llama-lora-patterns",
        "llama",
        "LORA",
        _lora(
            target_modules=_LLAMA_ALL,
            use_rslora=True,
            rank_pattern={"k_proj": 2, r"mlp\.up_proj": 3},
            alpha_pattern={"o_proj": 1.5, "k_proj": 5},
        ),
    ),
    Setting("llama-lora-regex", "llama", "LORA", _lora(target_modules=r".*\.self_attn\.(q|o)_proj")),
    Setting(
        "llama-ia3",
        "llama",
        "IA3",
        _ia3(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
    Setting("gpt2-lora", "gpt2", "LORA", _lora(target_modules=["c_attn", "c_fc"], **_CONV)),
    Setting(
        "gpt2-lora-patterns",
        "gpt2",
        "LORA",
        _lora(
            target_modules=_GPT2_ALL,
            use_rslora=True,
            rank_pattern={r"attn\.c_proj": 2},
            alpha_pattern={"c_fc": 3},
            **_CONV,
        ),
    ),
    Setting(
        "gpt2-ia3",
        "gpt2",
        "IA3",
        _ia3(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], **_CONV),
    ),
]


def setting(name: str) -> Setting:
    (found,) = (s for s in SETTINGS if s.name == name)
    return found


def make_peft(torch_model: Any, config: Any, *, seed: int = 1) -> PeftModel:
    """A PEFT model on a copy of `torch_model` whose adapter does something: B is not 0, IA3 is not 1."""
    model = get_peft_model(copy.deepcopy(torch_model), copy.deepcopy(config)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "ia3_" in name:
                parameter.copy_(1 + 0.4 * noise)
            elif "lora_" in name:
                parameter.copy_(0.2 * noise)
    return model


def save(model: PeftModel, folder: Path, **options: Any) -> Path:
    model.save_pretrained(str(folder), **options)
    return folder


def logits(model: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(np.asarray(ids, np.int64))).logits.float().numpy()


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What came of loading a folder with PEFT. PEFT only warns about what does not fit, or says nothing."""

    model: PeftModel
    missing: list[str]
    unexpected: list[str]
    warnings: list[str]

    @property
    def complaints(self) -> list[str]:
        """All of it; empty if every tensor of the file found its place and every place its tensor."""
        return [*self.missing, *self.unexpected, *self.warnings]


def load(torch_model: Any, folder: Path) -> Loaded:
    """`PeftModel.from_pretrained` on a copy of `torch_model`, with everything it did not say aloud."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(copy.deepcopy(torch_model), str(folder)).eval()
        # from_pretrained drops the list of unexpected keys, so the same tensors are loaded once more.
        result = set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
    prefixes = ("lora_", "ia3_", "modules_to_save")
    return Loaded(
        model=model,
        missing=[key for key in result.missing_keys if any(p in key for p in prefixes)],
        unexpected=list(result.unexpected_keys),
        warnings=[str(w.message) for w in caught if not issubclass(w.category, DeprecationWarning)],
    )


def read_json(folder: Path) -> dict[str, Any]:
    """`adapter_config.json` with `target_modules` and the like, which PEFT writes in random order, sorted."""
    found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    for field in ("target_modules", "feedforward_modules", "exclude_modules"):
        if isinstance(found.get(field), list):
            found[field] = sorted(found[field])
    return found


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    with safe_open(str(folder / WEIGHTS), "np") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)


def specs(tensors: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Key -> (shape, dtype name), for numpy and torch tensors alike."""
    return {k: (tuple(v.shape), str(v.dtype).removeprefix("torch.")) for k, v in sorted(tensors.items())}


def assert_same_files(folder: Path, other: Path) -> None:
    """The tensors are equal bit for bit, and so are the configurations."""
    again, before = read_tensors(folder), read_tensors(other)
    assert specs(again) == specs(before)
    assert all(np.array_equal(again[key], value) for key, value in before.items())
    assert read_json(folder) == read_json(other)


def peft_specs(torch_model: Any, config: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Keys, shapes and dtypes that PEFT would write for this configuration."""
    return specs(get_peft_model_state_dict(make_peft(torch_model, config)))
