"""The programs of examples/ whose framework needs an environment of its own; PEFT computes the losses that they print.

    JAXADAPT_GEMMA_PYTHON=/path/to/python JAXADAPT_MAXTEXT_PYTHON=/path/to/python \\
        python -m pytest tests/full/test_examples_full.py

Each variable is the Python of an environment with jaxadapt's dependencies and gemma (with the extra `gguf`), or MaxText
(tests/full/test_maxtext.py lists the packages). Without its variable a test is skipped. The docstring of
tests/full/test_openpi_full.py and of test_lerobot.py say what openpi's example was compared with.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.peft, pytest.mark.slow]


@pytest.mark.parametrize("name", ["gemma_vllm", "maxtext_sft"])
def test_peft_computes_the_printed_losses(name: str, tmp_path: Path):
    variable = f"JAXADAPT_{name.partition('_')[0].upper()}_PYTHON"
    if not (python := os.environ.get(variable)):
        pytest.skip(f"needs {variable}; the docstring says what it is")
    path = os.pathsep.join([str(ROOT), os.environ.get("JAXADAPT_EXAMPLES_PATH", "")])
    words = [python, "-W", "ignore", str(ROOT / "examples" / f"{name}.py"), str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": path, "XLA_FLAGS": ""}
    run = subprocess.run(words, env=env, capture_output=True, text=True, timeout=900, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    (printed,) = re.findall(r"^held-out loss ([\d.]+) -> ([\d.]+) after 20 steps$", run.stdout, re.M)
    assert not re.search("^(error|warning)", run.stdout, re.M)

    rng = np.random.default_rng(0)
    if name == "maxtext_sft":  # it has an input for each target
        tokens = torch.tensor((rng.integers(0, 64, (8, 1)) + np.arange(17)) % 64)
    else:
        tokens = torch.tensor(1 + (rng.integers(0, 63, (8, 1)) + np.arange(16)) % 63)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)

    def loss(model: torch.nn.Module) -> float:
        with torch.no_grad():
            logits = model(tokens[:, :-1]).logits
            return float(torch.nn.functional.cross_entropy(logits.mT, tokens[:, 1:]))

    assert loss(base) == pytest.approx(float(printed[0]), abs=1e-3)  # a printed digit
    adapted = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    assert loss(adapted) == pytest.approx(float(printed[1]), abs=1e-3)
    if name == "gemma_vllm":
        adapted = peft.PeftModel.from_pretrained(adapted.unload(), str(tmp_path / "vllm"))
        assert loss(adapted) == pytest.approx(float(printed[1]), abs=1e-3)
