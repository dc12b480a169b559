"""The program of docs/finetune.md, and its folder in PEFT on the base that the program wrote."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.peft


def test_its_adapter_computes_the_same_in_peft(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import peft
    import torch
    import transformers

    monkeypatch.chdir(tmp_path)
    page = (root / "docs/finetune.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {"__name__": "__main__"}
    program = max(re.findall(r"^```python\n(.*?)^```", page, re.M | re.S), key=len)
    exec(compile(program, "docs/finetune.md", "exec"), names)
    assert names["held_out_loss"] < 3.0  # log(64) = 4.16 before
    base = transformers.AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, "adapter")
    tokens = names["held_out"]
    with torch.no_grad():
        want = model(torch.tensor(tokens)).logits.numpy()
    found = np.asarray(names["model"](jnp.asarray(tokens)))
    np.testing.assert_allclose(found, want, atol=1e-4 * np.abs(want).max())
