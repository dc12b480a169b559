"""A model with more dense layers than a family has is not of the family, whose numbers its experts would get."""

from __future__ import annotations

import pytest

from jaxadapt.keymaps import families
from tests.keymaps.families.specimens import recorded


@pytest.mark.parametrize(("name", "table"), [("maxtext-deepseek2", "maxtext:deepseek2")])
def test_one_more_dense_layer(name: str, table: str):
    leaves = recorded(name)["leaves"]
    assert families.resolve_keymap("auto", leaves).name == table
    more = {
        path.replace("dense_layers_0", "dense_layers_1"): x for path, x in leaves.items() if "dense_layers_0" in path
    }
    assert more
    assert families.resolve_keymap("auto", leaves | more).name == "generic"
