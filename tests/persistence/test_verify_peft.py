"""What `verify` and `repair` say about a file, against PEFT's own reading of it."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxadapt
from jaxadapt.export.adapter_files import extract_files

pytestmark = pytest.mark.peft
P = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
X = np.random.default_rng(7).standard_normal((2, 6)).astype("float32")


def net(stack: str = "model") -> Any:
    """A model whose layers are in a module of this name."""
    import torch

    torch.manual_seed(0)
    layers = [("q_proj", torch.nn.Linear(6, 8)), ("act", torch.nn.Tanh()), ("up_proj", torch.nn.Linear(8, 6))]
    model = torch.nn.Module()
    inner = torch.nn.Sequential()
    for name, layer in layers:
        inner.add_module(name, layer)
    model.add_module(stack, inner)
    model.forward = inner.forward
    return model


def trained(folder: Path, base: Any = None, **fields: Any) -> Any:
    """A PEFT model with random adapter values, also saved to `folder`."""
    import torch
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(base or net(), LoraConfig(**{"r": 2, "target_modules": ["q_proj", "up_proj"], **fields}))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    return model


def outputs(folder: Any = None, base: Any = None) -> np.ndarray:
    """The outputs of PEFT's model with the adapter in `folder`; without one, those of the base."""
    import torch
    from peft import PeftModel

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = net() if base is None else base
        model = model if folder is None else PeftModel.from_pretrained(model, folder)
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


# ---------------------------------------------------------------- files that PEFT loads without effect, or otherwise


NAMES_OF_OTHERS = (
    ("model", "model", "error"),
    ("model", "language_model", "error"),
    ("encoder", "text_model", "warning"),
)


@pytest.mark.parametrize(("stack", "outer", "severity"), NAMES_OF_OTHERS)
def test_names_that_peft_loads_without_effect_are_found(stack: str, outer: str, severity: str, tmp_path: Path):
    """The adapter of `model.model.…`, `language_model.model.…` or `text_model.encoder.…` on a base without these."""
    holder = held(net(stack), outer)
    trained(tmp_path, holder)
    assert np.array_equal(outputs(tmp_path, net(stack)), outputs(None, net(stack)))
    base = {key: value.shape for key, value in net(stack).state_dict().items()}
    found = {f.code: f for f in jaxadapt.verify(tmp_path, base) if f.severity != "note"}
    assert {code: f.severity for code, f in found.items()} == {"prefix": severity}
    assert "PEFT loads an adapter without effect" in found["prefix"].expected


def tiny(kind: str) -> Any:
    import torch
    import transformers as t

    torch.manual_seed(0)
    if kind == "GPT2Model":
        return t.GPT2Model(t.GPT2Config(n_embd=4, n_layer=1, n_head=1, vocab_size=8, n_positions=4))
    sizes = {"hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1, "num_attention_heads": 1}
    return t.LlamaForCausalLM(t.LlamaConfig(vocab_size=8, tie_word_embeddings=True, **sizes))


def logits(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model.eval()(torch.tensor([[1, 2, 3]])).logits.numpy()


def test_a_base_without_its_head_leaves_out_the_prefix(tmp_path: Path):
    """transformers writes GPT2Model without "transformer.", and adds it for GPT2LMHeadModel."""
    from peft import PeftModel
    from transformers import GPT2LMHeadModel

    tiny("GPT2Model").save_pretrained(tmp_path / "base")
    base = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    model = trained(tmp_path / "adapter", base, target_modules=["c_attn"], fan_in_fan_out=True)
    again = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert np.array_equal(logits(model), logits(again))
    assert codes(tmp_path / "adapter", tmp_path / "base") == []


def test_null_targets_are_pefts_default_of_the_model_type(tmp_path: Path):
    from peft import PeftModel

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    tiny("Llama").save_pretrained(tmp_path / "base")
    trained(tmp_path / "sound", tiny("Llama"), target_modules=names)
    tensors = load_file(tmp_path / "sound" / WEIGHTS)
    found = beside(tmp_path / "sound", tensors, target_modules=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ignoring = PeftModel.from_pretrained(tiny("Llama"), found)
    assert len(load_file(found / WEIGHTS)) == 14
    assert sum("lora_" in name for name, _ in ignoring.named_parameters()) == 4
    (error,) = (f for f in jaxadapt.verify(found, tmp_path / "base") if f.severity == "error")
    assert (error.severity, error.code, len(error.subjects)) == ("error", "untargeted", 5)
    assert "PEFT takes q_proj, v_proj and ignores 5 modules" in error.found
    assert [f.severity for f in jaxadapt.verify(found) if f.code == "untargeted"] == ["warning"]
    read = {key: value for key, value in tensors.items() if "q_proj" in key or "v_proj" in key}
    assert codes(beside(tmp_path / "sound", read, target_modules=None), tmp_path / "base") == []


def test_null_targets_of_a_type_whose_default_is_all_linear_layers_are_sound(tmp_path: Path):
    """OSF, on a model for which PEFT lists no names; without the type, PEFT's default is not known."""
    base = {"layers": {"up_proj": {"kernel": np.ones((4, 6), "f4")}}}
    config = jaxadapt.OSFConfig(effective_rank=2, target_modules=["up_proj"])
    jaxadapt.save(jaxadapt.init(base, config, key=jax.random.key(0)), tmp_path / "sound")
    found = beside(tmp_path / "sound", load_file(tmp_path / "sound" / WEIGHTS), target_modules=None)
    (tmp_path / "base").mkdir()
    save_file({"layers.up_proj.weight": np.ones((6, 4), "f4")}, tmp_path / "base" / "model.safetensors")
    for kind, expected in (("falcon", []), (None, ["untargeted"])):
        (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": kind}))
        assert codes(found, tmp_path / "base") == expected


def test_an_alpha_that_is_missing_or_zero_is_found(tmp_path: Path):
    trained(tmp_path / "sound", lora_alpha=16)
    tensors, right, plain = load_file(tmp_path / "sound" / WEIGHTS), outputs(tmp_path / "sound"), outputs()
    assert codes(tmp_path / "sound") == []
    found = beside(tmp_path / "sound", tensors, lora_alpha=0)
    assert np.array_equal(outputs(found), plain)
    assert codes(found) == ["alpha"]
    eight = outputs(beside(tmp_path / "sound", tensors, lora_alpha=8))
    values = json.loads((tmp_path / "sound" / CONFIG).read_text())
    del values["lora_alpha"]
    (found / CONFIG).write_text(json.dumps(values))
    assert np.array_equal(outputs(found), eight)
    assert not np.allclose(eight, right)
    (warning,) = (f for f in jaxadapt.verify(found) if f.severity != "note")
    assert (warning.code, warning.found) == ("alpha", "lora_alpha is missing: PEFT takes 8")


def test_integers_are_read_by_peft_as_the_values_themselves(tmp_path: Path):
    trained(tmp_path / "sound")
    tensors = load_file(tmp_path / "sound" / WEIGHTS)
    integers = {key: np.round(value / np.abs(value).max() * 127).astype("int8") for key, value in tensors.items()}
    found = beside(tmp_path / "sound", integers)
    values = beside(tmp_path / "sound", {key: value.astype("float32") for key, value in integers.items()})
    as_floats = outputs(values)
    assert np.abs(as_floats - outputs(tmp_path / "sound")).max() > 100
    found = beside(tmp_path / "sound", integers)
    assert np.array_equal(outputs(found), as_floats)
    assert codes(found) == ["dtype"]


def test_a_dora_file_whose_configuration_denies_it_is_found(tmp_path: Path):
    trained(tmp_path / "sound", use_dora=True)
    found = beside(tmp_path / "sound", load_file(tmp_path / "sound" / WEIGHTS), use_dora=False)
    assert np.abs(outputs(found) - outputs(tmp_path / "sound")).max() > 0.01
    (error,) = (f for f in jaxadapt.verify(found) if f.severity == "error")
    assert (error.code, len(error.subjects)) == ("variant", 2)
    assert codes(tmp_path / "sound") == []


def test_a_whole_model_is_no_adapter_for_extract_and_inspect(tmp_path: Path):
    trained(tmp_path / "adapter", tiny("Llama"))
    tiny("Llama").save_pretrained(tmp_path / "base")
    with pytest.raises(jaxadapt.MismatchError, match="expected tensors of LORA, found none among 11 tensors"):
        extract_files(tmp_path / "base" / "model.safetensors", tmp_path / "out", config=tmp_path / "adapter")
    assert not (tmp_path / "out").exists()
    named = beside(tmp_path / "adapter", load_file(tmp_path / "base" / "model.safetensors"))
    with pytest.raises(jaxadapt.MismatchError, match="none of the 11 tensors belongs to an adapter"):
        jaxadapt.inspect(named)


# ---------------------------------------------------------------- no false alarms


SOUND: dict[str, dict[str, Any]] = {
    "a tied embedding": {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    "a tied head": {"target_modules": ["lm_head", "q_proj"], "ensure_weight_tying": True},
    "excluded": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]},
    "excluded by a longer name": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["self_attn.v_proj"]},
    "excluded by an expression": {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*mlp\..*"},
    "saved in full": {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["v_proj"]},
}


@pytest.mark.parametrize("case", SOUND)
def test_an_adapter_that_peft_saved_has_no_problem(case: str, tmp_path: Path):
    base = tiny("Llama")
    base.save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained(tmp_path / "sound", base, **SOUND[case])
    assert codes(tmp_path / "sound") == codes(tmp_path / "sound", tmp_path / "base") == []


# ---------------------------------------------------------------- configurations that PEFT refuses, with one meaning


def replaced(old: str, new: str) -> Callable[[str], str]:
    return lambda text: text.replace(old, new)


RANKS = "rank_pattern: ranks became integers"
TEXTS = {
    "a byte order mark": (lambda text: "\ufeff" + text, "the byte order mark at the beginning removed"),
    "a trailing comma": (replaced("\n}", ",\n}"), "1 trailing comma removed"),
    "a trailing comma in a list": (replaced("\n  ]", ",\n  ]"), "1 trailing comma removed"),
    "a rank as a text": (replaced('"r": 2,', '"r": "2",'), "r: '2' became 2"),
    "an alpha as a text": (replaced('alpha": 16,', 'alpha": "16",'), "lora_alpha: '16' became 16"),
    "ranks as texts": (replaced('"q_proj": 3', '"q_proj": "3"'), RANKS),
}


@pytest.mark.parametrize("case", TEXTS)
def test_a_configuration_that_peft_refuses_and_that_has_one_meaning_is_repaired(case: str, tmp_path: Path):
    change, done = TEXTS[case]
    trained(tmp_path / "sound", lora_alpha=16, rank_pattern={"q_proj": 3})
    found = beside(tmp_path / "sound", load_file(tmp_path / "sound" / WEIGHTS))
    text = (tmp_path / "sound" / CONFIG).read_text()
    (found / CONFIG).write_text(change(text))
    assert (found / CONFIG).read_text() != text
    with pytest.raises((ValueError, TypeError)):
        outputs(found)
    assert codes(found) == ["configuration"]
    result = jaxadapt.repair(found)
    assert (result.done, result.remaining) == ((done,), ())
    assert np.array_equal(outputs(result.path), outputs(tmp_path / "sound"))


def test_a_key_that_is_there_twice_has_no_one_meaning(tmp_path: Path):
    trained(tmp_path / "sound")
    found = beside(tmp_path / "sound", load_file(tmp_path / "sound" / WEIGHTS))
    (found / CONFIG).write_text("\ufeff" + (tmp_path / "sound" / CONFIG).read_text().replace("{", '{"r": 4,', 1))
    with pytest.raises(jaxadapt.MismatchError, match="cannot be repaired"):
        jaxadapt.repair(found)
