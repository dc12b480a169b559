"""A model with other numbers of layers than a family has is not of the family, whose numbers later layers would get."""

from __future__ import annotations

import pytest

from jaxadapt import KeyMapError
from jaxadapt.keymaps import families
from tests.keymaps.families.specimens import BY_NAME, recorded


@pytest.mark.parametrize(("name", "table"), [("maxtext-deepseek2", "maxtext:deepseek2")])
def test_one_more_dense_layer(name: str, table: str):
    leaves = recorded(name)["leaves"]
    assert families.resolve_keymap("auto", leaves).name == table
    more = {
        path.replace("dense_layers_0", "dense_layers_1"): x for path, x in leaves.items() if "dense_layers_0" in path
    }
    assert more
    assert families.resolve_keymap("auto", leaves | more).name == "generic"


@pytest.mark.parametrize(
    ("name", "keymap", "words"),
    [
        ("maxtext-kimi_k2", "maxtext:deepseek_v3", "dense_layers_{l}.*: 1 layers, expected 3"),
        ("maxtext-kimi_k2-scan0", "maxtext:deepseek_v3/scan0", "dense_layers.*: 1 layers, expected 3"),
        ("maxtext-deepseek_v3-scan1", "maxtext:kimi_k2/scan1", "dense_layers.*: 3 layers, expected 1"),
        ("maxtext-gemma3-4b-scan1", "maxtext:gemma3-27b/scan1", "layers.layers_0.*: 5 layers, expected 10"),
    ],
)
def test_a_named_family_of_another_size_is_refused(name: str, keymap: str, words: str):
    """Its numbers of later layers would be wrong: layer 1 of a Kimi K2 would be saved as layer 3."""
    leaves = recorded(name)["leaves"]
    with pytest.raises(KeyMapError, match=words):
        families.resolve_keymap(keymap, leaves)
    own = BY_NAME[name].table
    assert families.resolve_keymap(own, leaves).name == own
    without = {path: shape for path, shape in leaves.items() if "dense" not in path and "layers.layers_" not in path}
    assert families.resolve_keymap(keymap, without).name == keymap  # nothing to count
