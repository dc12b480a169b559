"""A stacked model whose keymap is named: all its layers get adapters, or an error names those without."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import pytest

import jaxadapt
from jaxadapt import KeyMapError, TargetError, Weight
from jaxadapt.core import paths
from jaxadapt.keymaps import families
from tests.keymaps.families.specimens import recorded

BLOCKS = "maxtext:gemma4-blocks/scan1"
REST = "decoder.layers_remainder.local_layers."


def shapes() -> dict[str, tuple[int, ...]]:
    """MaxText's stacked Gemma 4 with two blocks of six layers and two layers that fill no block.

    (maxtext 0.2.5 has a block of its own for the rest, `layers_remainder`, which stacks its local layers alone.)
    """
    found = recorded("maxtext-gemma4-31b-blocks-scan1")["leaves"]
    local = {path: shape for path, shape in found.items() if ".local_layers." in path}
    rest = {
        path.replace("decoder.scanned_blocks.local_layers.", REST): (*shape[:1], 2, *shape[3:])
        for path, shape in local.items()
    }
    assert rest
    return found | rest


def init(keymap: Any, found: dict[str, tuple[int, ...]] | None = None, **fields: Any) -> dict[str, Any]:
    tree = paths.unflatten({p: jax.ShapeDtypeStruct(x, "float32") for p, x in (found or shapes()).items()})
    config = jaxadapt.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **fields})
    return paths.flatten(jaxadapt.init(tree, config, key=jax.random.key(0), keymap=keymap).params)


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], r".*\.(q|down)_proj"])
def test_layers_that_fill_no_block_are_named(targets: Any):
    with pytest.raises(KeyMapError, match="pass a KeyMap with an entry for each") as caught:
        init(BLOCKS, target_modules=targets)
    _, *named = str(caught.value).splitlines()
    assert {line.split()[0].removeprefix(REST) for line in named} == {"self_attention.query.kernel", "mlp.wo.kernel"}


def test_all_linear_leaves_out_no_layer():
    """A matrix without an entry may be no linear layer; one with the names of an adapted layer is none of these."""
    found = {path.replace(REST, "decoder.layers_remainder.layers_0."): x for path, x in shapes().items()}
    found |= {path: (x[0], *x[2:]) for path, x in found.items() if ".layers_0." in path}
    matrices = {path: x for path, x in found.items() if ".layers_0." not in path or len(x) == 2}
    with pytest.raises(KeyMapError, match="pass a KeyMap with an entry for each") as caught:
        init(BLOCKS, matrices, target_modules="all-linear")
    assert len(str(caught.value).splitlines()) == 1 + 3  # gate, up and down


def test_an_entry_for_each_is_a_way_out():
    family = families.get_family(BLOCKS)
    entry = Weight(f"{REST}self_attention.query.kernel", "model.layers.{l}.self_attn.q_proj.weight",
                   "d {l} n h -> (n h) d", layers=(1, 12))  # fmt: skip
    keymap = dataclasses.replace(family, name="fourteen", weights=(*family.weights, entry))
    found = init(keymap)
    assert len(found) == 6
    tree = paths.unflatten({p: jax.ShapeDtypeStruct(x, "float32") for p, x in shapes().items()})
    config = jaxadapt.LoraConfig(r=2, target_modules=["q_proj"])
    adapter = jaxadapt.init(tree, config, key=jax.random.key(0), keymap=keymap)
    layers = {key.split(".")[4] for key in jaxadapt.to_peft(adapter).tensors}
    assert layers == {str(number) for number in range(14)}


@pytest.mark.parametrize("excluded", [[f"{REST}self_attention.query"], r"decoder\.layers_remainder\..*"])
def test_leaving_them_out_is_a_way_out(excluded: Any):
    assert not any("remainder" in path for path in init(BLOCKS, exclude_modules=excluded))


def test_layers_that_are_not_asked_for_are_no_error():
    assert len(init(BLOCKS, layers_to_transform=[0])) == 2


def test_another_tower_with_these_names_is_no_layer_of_the_model():
    tower = {"vision_encoder.layers_0.self_attention.query.kernel": (8, 2, 4)}
    assert len(init(BLOCKS, recorded("maxtext-gemma4-31b-blocks-scan1")["leaves"] | tower)) == 4


@pytest.mark.parametrize(
    ("specimen", "name", "stacked"),
    [
        ("maxtext-gemma4-31b-blocks-scan1", "maxtext:gemma4-blocks", "maxtext:gemma4-blocks/scan1"),
        ("maxtext-llama3-scan1", "maxtext:llama3", "maxtext:llama3/scan1"),
    ],
)
def test_the_name_of_the_unrolled_layers_on_a_stacked_model(specimen: str, name: str, stacked: str):
    found = recorded(specimen)["leaves"]
    with pytest.raises(TargetError, match=f"the model's layers are stacked: pass keymap='{stacked}'"):
        init(name, found)
    assert len(init(stacked, found)) >= 2
    with pytest.raises(TargetError) as caught:  # the right name, and a wrong target
        init(stacked, found, target_modules=["q_porj"])
    assert "stacked" not in str(caught.value)
