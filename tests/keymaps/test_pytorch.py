"""Keymaps of PyTorch's state dicts: the orientation of each weight from the sizes of its tensors."""

from __future__ import annotations

import functools

import pytest

from jaxadapt import IA3Config, LoraConfig, MismatchError
from jaxadapt.keymaps import pytorch
from jaxadapt.methods import get_method
from jaxadapt.methods.base import file_sizes


def lora(module, out, inputs, r=2):
    prefix = f"base_model.model.{module}.lora_"
    return {f"{prefix}A.weight": (r, *inputs), f"{prefix}B.weight": (out, r, *(1 for _ in inputs[1:]))}


def sizes_by(config):
    return functools.partial(file_sizes, get_method(config), config)


_sizes = sizes_by(LoraConfig(r=2, target_modules=["q"]))


def entry(shapes, tensors, **options):
    inputs = any(len(shape) > 1 and shape[:1] == (1,) for shape in tensors.values())
    config = IA3Config(target_modules=["q"], feedforward_modules=".*" if inputs else [])
    config = config if any("ia3_l" in key for key in tensors) else LoraConfig(r=2, target_modules=["q"])
    keymap = pytorch.state_dict_keymap(shapes, tensors, "it", sizes_by(config), **options)
    return {w.leaf: w for w in keymap.weights}


@pytest.mark.parametrize("turned", [False, True])
def test_sizes_say_which_axis_is_the_input(turned):
    shape = (4, 6) if turned else (6, 4)
    assert entry({"q.weight": shape}, lora("q", 6, (4,)))["q.weight"].fan_in_fan_out is turned
    for vector in ((6, 1), (1, 4)):
        found = entry({"q.weight": shape}, {"base_model.model.q.ia3_l": vector})
        assert found["q.weight"].fan_in_fan_out is turned


@pytest.mark.parametrize("turned", [False, True])
def test_square_weights_are_as_their_namesakes(turned):
    shapes = {"a.q.weight": (4, 6) if turned else (6, 4), "b.q.weight": (4, 4), "c.k.weight": (6, 6)}
    tensors = lora("a.q", 6, (4,)) | lora("b.q", 4, (4,))
    assert entry(shapes, tensors, fan_in_fan_out=not turned)["b.q.weight"].fan_in_fan_out is turned
    tensors |= lora("c.k", 6, (6,))
    assert entry(shapes, tensors, fan_in_fan_out=turned)["c.k.weight"].fan_in_fan_out is turned
    with pytest.raises(MismatchError, match=r"(?s)cannot determine the orientation.*fan_in_fan_out is .*c\.k"):
        entry(shapes, tensors, fan_in_fan_out=not turned)


@pytest.mark.parametrize("setting", [False, True])
def test_square_weights_alone_are_as_the_setting_says(setting):
    assert entry({"q.weight": (4, 4)}, lora("q", 4, (4,)), fan_in_fan_out=setting)["q.weight"].fan_in_fan_out is setting


def test_kinds_follow_from_the_tensors():
    shapes = {"conv.weight": (8, 3, 2, 2), "emb.weight": (9, 4), "rows.weight": (9, 4), "norm.weight": (4,),
              "other.weight": (8, 3, 2, 2), "head.weight": (5, 4)}  # fmt: skip
    tensors = {
        **lora("conv", 8, (3, 2, 2)),
        "base_model.model.emb.lora_embedding_A": (2, 9),
        "base_model.model.emb.lora_embedding_B": (4, 2),
        "base_model.model.rows.token_adapter.trainable_tokens_delta": (1, 4),
    }
    kinds = {leaf: w.kind for leaf, w in entry(shapes, tensors).items()}
    assert kinds == {
        "conv.weight": "conv", "emb.weight": "embedding", "rows.weight": "embedding", "norm.weight": "vector",
        "other.weight": "other", "head.weight": "linear",
    }  # fmt: skip
    assert pytorch.weight_shapes(tensors) == {"conv.weight": (8, 3, 2, 2), "emb.weight": (9, 4)}


@pytest.mark.parametrize(("channels", "groups"), [(3, 1), (6, 2), (12, 4), (7, 1)])
def test_groups_follow_from_the_input_channels_of_ia3(channels, groups):
    found = entry({"c.weight": (8, 3, 2, 2)}, {"base_model.model.c.ia3_l": (1, channels, 1, 1)})
    assert found["c.weight"].groups == groups


@pytest.mark.parametrize(
    ("model", "adapter", "expected"),
    [
        ("q.weight", "q", "q.weight"),
        ("model.q.weight", "q", "q.weight"),
        ("q.weight", "transformer.q", "transformer.q.weight"),
        ("h.q.weight", "other", "h.q.weight"),
    ],
)
def test_a_first_part_of_the_names_may_differ(model, adapter, expected):
    assert pytorch.match_model_keys({model: (6, 4)}, [adapter]) == {model: expected}


def test_every_module_that_the_model_lacks_is_listed():
    with pytest.raises(MismatchError, match=r"it: the model has no place for a\.\{k,v\}"):
        pytorch.state_dict_keymap({"a.q.weight": (6, 4)}, lora("a.k", 6, (4,)) | lora("a.v", 6, (4,)), "it", _sizes)
    keymap = pytorch.state_dict_keymap(
        {"emb.weight": (6, 4)}, lora("head", 6, (4,)), "it", _sizes, tied=(("head.weight", "emb.weight"),)
    )
    assert keymap.tied == (("head.weight", "emb.weight"),)


@pytest.mark.parametrize(
    ("targets", "warned"), [(["q_proj"], False), (["q_proj", "up_proj"], True), ("all-linear", True), (None, False)]
)
def test_only_targets_that_name_an_experts_matrices_or_all_layers_are_told_of(targets, warned):
    config = LoraConfig(target_modules=targets)
    assert bool(pytorch.routed_left_out(config, ["0.q_proj"], ["0.experts.down_proj"])) is warned
