"""Targets that name the matrices of experts and reach no routed expert: a warning that names the parameters."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import pytest

import jaxadapt

LAYER = "model.layers.{}."
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]


def base(shared: bool = True, layers: int = 3) -> dict:
    """Qwen 3 MoE's leaves in layers with experts, and a dense layer before them."""
    flat = {"model.embed_tokens.embedding": (24, 8), "model.norm.weight": (8,), "lm_head.kernel": (8, 24)}
    for layer in range(layers):
        start = LAYER.format(layer)
        flat |= {f"{start}self_attn.{p}_proj.kernel": (8, 8) for p in "qkvo"}
        flat |= {f"{start}self_attn.{p}_norm.weight": (4,) for p in "qk"}
        flat |= {f"{start}{name}.weight": (8,) for name in ("input_layernorm", "post_attention_layernorm")}
        if layer:
            experts = f"{start}mlp.experts."
            flat |= {f"{start}mlp.gate.kernel": (8, 4)}
            flat |= {f"{experts}gate_up_proj": (4, 8, 12), f"{experts}down_proj": (4, 6, 8)}
        elif shared:
            sizes = {"gate": (8, 6), "up": (8, 6), "down": (6, 8)}
            flat |= {f"{start}mlp.{p}_proj.kernel": size for p, size in sizes.items()}
    return jaxadapt.core.paths.unflatten({path: jnp.zeros(shape) for path, shape in flat.items()})


def told(layers: int = 3, **fields) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        jaxadapt.init(base(layers=layers), jaxadapt.LoraConfig(r=2, **fields), key=jax.random.key(0))
    return [str(each.message) for each in found]


@pytest.mark.parametrize("targets", [["q_proj", "up_proj"], "all-linear", r".*_proj"])
def test_targets_without_routed_experts_are_told(targets):
    (text,) = told(target_modules=targets)
    assert "no routed expert" in text
    assert "model.layers.1-2.mlp.experts.{gate_up,down}_proj (4)" in text
    assert "its targets reach only model.layers.0.mlp." in text
    assert text.endswith(f"Name them too: target_parameters={PARAMETERS}")


def test_all_linear_that_becomes_ends_of_names_is_told_once():
    assert len(told(layers=6, target_modules="all-linear")) == 1  # 20 modules or more


def test_nothing_is_told_of_experts_that_are_adapted_or_not_named():
    assert told(target_modules=["up_proj"], target_parameters=PARAMETERS) == []
    assert told(target_modules=["q_proj"]) == []


@pytest.mark.parametrize("targets", [["mlp.up_proj"], ["model.layers.0.mlp.up_proj"], r".*\d\.mlp\.up_proj"])
def test_nothing_is_told_of_targets_that_name_other_layers_on_purpose(targets):
    assert told(target_modules=targets) == []


def test_nothing_is_told_of_layers_without_experts():
    assert told(target_modules=["up_proj"], layers_to_transform=[0]) == []


def test_an_error_of_no_match_names_the_parameters():
    with pytest.raises(jaxadapt.AdapterError, match=r"found none that matches 'up_proj'(?s:.*)target_parameters="):
        jaxadapt.init(base(shared=False), jaxadapt.LoraConfig(r=2, target_modules=["up_proj"]))


def test_a_method_of_modules_only_is_said_to_be_one():
    config = jaxadapt.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    with pytest.warns(UserWarning, match="IA3 adapts modules only; LoRA reaches them by target_parameters="):
        jaxadapt.init(base(), config)


def test_verify_tells_it_of_a_base_in_files(tmp_path):
    from safetensors.numpy import save_file

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter = jaxadapt.init(base(), jaxadapt.LoraConfig(r=2, target_modules=["up_proj"]), key=jax.random.key(0))
    jaxadapt.save(adapter, tmp_path / "out")
    keys = ["model.layers.0.mlp.up_proj", *(f"model.layers.1.mlp.experts.{e}.up_proj" for e in range(4))]
    save_file({f"{key}.weight": jnp.zeros((6, 8)).__array__() for key in keys}, tmp_path / "base.safetensors")
    found = {each.code: each for each in jaxadapt.verify(tmp_path / "out", base=tmp_path / "base.safetensors")}
    assert found["experts"].severity == "warning"
    assert "model.layers.1.mlp.experts.gate_up_proj" in found["experts"].found
    assert "missing" not in found


def test_a_load_and_verify_say_in_one_line_which_modules_have_no_place(tmp_path):
    config = jaxadapt.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=PARAMETERS)
    adapter = jaxadapt.init(base(), config, key=jax.random.key(0))
    jaxadapt.save(adapter, tmp_path / "out")
    leaves = jaxadapt.core.paths.flatten(base())
    dense = jaxadapt.core.paths.unflatten({path: x for path, x in leaves.items() if "experts" not in path})
    with pytest.warns(UserWarning, match="target_parameters"), pytest.raises(jaxadapt.AdapterError) as error:
        jaxadapt.from_peft(jaxadapt.read(tmp_path / "out"), dense)
    first, *_ = str(error.value).splitlines()
    assert first.endswith("the model has no place for model.layers.1-2.mlp.experts.{gate_up,down}_proj (4)")
