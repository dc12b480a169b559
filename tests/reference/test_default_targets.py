"""The modules that a configuration without targets adapts, beside PEFT's choice for the same model."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

from jaxadapt import OSFConfig
from jaxadapt.adapters import selection
from jaxadapt.keymaps import families
from tests.keymaps.families import torch_side
from tests.keymaps.families.specimens import BY_NAME, recorded
from tests.support import peft_harness as harness

pytestmark = pytest.mark.peft


@pytest.mark.parametrize("name", ["flax-bert", "flax-gpt-neo", "flax-llama"])
def test_osf_without_targets_adapts_all_linear_layers_where_peft_has_no_default(name: str):
    from peft import OSFConfig as PeftOSFConfig

    model = harness.make_peft(torch_side.base(name), PeftOSFConfig())
    theirs = {key.partition(".osf_svd_params")[0] for key in model.state_dict() if ".osf_svd_params" in key}
    keymap = families.get_family(BY_NAME[name].table)
    found = selection.select_sites(
        selection.resolve_config(OSFConfig(), keymap, recorded(name)["leaves"]), keymap, recorded(name)["leaves"]
    )
    assert {f"base_model.model.{module}" for site in found for module in site.modules} == theirs
