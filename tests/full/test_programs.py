"""Exported adapters in the programs themselves: next-token log-probabilities equal PEFT's.

llama.cpp, mlx-lm and vLLM run in environments of their own, which this command makes (see the file):

    python tests/full/programs/environments.py FOLDER
    JAXADAPT_PROGRAMS=FOLDER python -m pytest tests/full/test_programs.py

`python -m tests.full.programs.table FOLDER` writes the results into docs/files.md.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

from tests.full.programs import measure

FOLDER = os.environ.get("JAXADAPT_PROGRAMS")
pytestmark = [
    pytest.mark.peft,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # PEFT's and transformers' own, of tied weights
    pytest.mark.skipif(not FOLDER, reason="make the programs' environments first; the docstring has the command"),
]
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2"]
REFUSED = {
    "llama": {"DoRA", "lora_bias", "a copy of the embedding", "copies of norms", "target embed_tokens (tied)",
              "trainable tokens", "IA3", "aLoRA"},
    "mlx": {"lora_bias", "a copy of the embedding", "copies of norms", "target embed_tokens (tied)",
            "trainable tokens", "IA3", "aLoRA"},
    "vllm": {"DoRA", "lora_bias", "a copy of the embedding", "copies of norms", "trainable tokens", "IA3", "aLoRA"},
    "transformers": {"DoRA", "lora_bias", "a copy of the embedding", "copies of norms", "trainable tokens", "IA3",
                     "aLoRA"},
}  # fmt: skip
PROGRAMS = Path(FOLDER or ".")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Any:
    work = tmp_path_factory.mktemp("smollm2")
    base = measure.smollm2(work)
    return measure.measure(base, PROGRAMS, work, list(measure.CASES), list(REFUSED))


@pytest.mark.parametrize("name", measure.CASES)
@pytest.mark.parametrize("program", REFUSED)
def test_smollm2(results: Any, program: str, name: str) -> None:
    got = results[name][program]
    assert results[name]["effect"] > 0.05 or name == "aLoRA"  # whose tokens are not in the prompt
    if name in REFUSED[program]:
        assert "jaxadapt merge" in got or "some tokens only" in got
    else:
        assert got < 1e-3, got  # float32 on both sides


@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_in_llama_cpp(family: str, tmp_path: Path) -> None:
    """Linear layers of every kind, with other scales than 1, in a GGUF base that llama.cpp's converter wrote."""
    base = measure.small(tmp_path, PROGRAMS, family)
    _, targets = measure.tiny.FAMILIES[family]
    options = {"fan_in_fan_out": True} if family == "gpt2" else {}
    want = measure.trained(base, tmp_path / "in", target_modules=targets, use_rslora=True, size=0.2,
                           alpha_pattern={targets[1]: 2}, **options)  # fmt: skip
    assert measure.export_case("", tmp_path / "in", tmp_path / "out.gguf", "gguf", base) == ""
    plain, got = measure.run("llama", PROGRAMS, base.gguf, [None, str(tmp_path / "out.gguf")], base, tmp_path / "x.npy")
    alone = abs(plain - measure.log_probabilities(measure.peft_logits(base.model(), base))).max()
    assert abs(got - want).max() < max(1e-3, 5 * alone)  # llama.cpp's own noise: 2e-3 in Gemma 2, 1e-6 in the others
    assert abs(got - plain).max() > 0.1


@pytest.mark.parametrize("family", ["qwen3", "phi3"])
def test_other_architectures_in_mlx(family: str, tmp_path: Path) -> None:
    base = measure.small(tmp_path, PROGRAMS, family)
    _, targets = measure.tiny.FAMILIES[family]
    names = [None]
    wanted = []
    for dora in (False, True):
        want = measure.trained(base, tmp_path / f"in{dora}", target_modules=targets, use_rslora=True, use_dora=dora,
                               size=0.2, rank_pattern={targets[1]: 2})  # fmt: skip
        assert measure.export_case("", tmp_path / f"in{dora}", tmp_path / f"out{dora}", "mlx", base) == ""
        wanted.append(want)
        names.append(str(tmp_path / f"out{dora}"))
    plain, *found = measure.run("mlx", PROGRAMS, base.folder, names, base, tmp_path / "x.npy")
    for got, want in zip(found, wanted, strict=True):
        assert abs(got - want).max() < 1e-3
        assert abs(got - plain).max() > 0.1


def test_merged_models(tmp_path: Path) -> None:
    """What has no form as an adapter is right as a merged model; in 16 and 8 bits as near as the base itself."""
    base = measure.smollm2(tmp_path)
    names = ["no adapter", "DoRA", "IA3", "copies of norms", "a copy of the embedding"]
    results = measure.measure_merged(base, PROGRAMS, tmp_path, names)
    for found in results.values():
        assert found["folder"] < 1e-3
        assert found["float32"] < 1e-3
        for dtype in ("float16", "bfloat16", "q8_0"):
            assert found[dtype] < 4 * results["no adapter"][dtype]
