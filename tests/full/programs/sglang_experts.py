"""Adapters of experts in SGLang: PEFT's files as they are, and in the form of `jaxadapt export --for vllm`.

    python -m tests.full.programs.sglang_experts FOLDER qwen3_moe  # FOLDER/sglang/bin/python has SGLang's wheel

The models and adapters are those of `vllm_experts.py`; the results are in sglang_experts.json. SGLang's wheel (0.5.23,
installed without its dependencies) imports on a CPU with PyTorch's CPU wheel, transformers, triton, apache-tvm-ffi and
the small packages that it names.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from jaxadapt.export import export_adapter
from tests.full.programs import measure, vllm_experts

RESULTS = Path(__file__).with_name("sglang_experts.json")
FIELDS: dict[str, dict[str, Any]] = {
    "gpt_oss": {"swiglu_limit": 7.0},
    "deepseek_v3": {"moe_layer_freq": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 1.0, "original_max_position_embeddings": 64}},
}  # fmt: skip
"""Fields of the published models' configurations that SGLang's classes need on a CPU; they change no weight."""


def measure_model(kind: str, python: Path, work: Path) -> dict[str, dict[str, Any]]:
    """Return `{case: {form: the error of SGLang, or the largest relative error by weight}}` of one model."""
    base = vllm_experts.make_base(kind, work / "base")
    path = base.folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **FIELDS.get(kind, {})}))
    changes: dict[str, dict[str, np.ndarray]] = {}
    files: dict[tuple[str, str], Path] = {}
    for name in vllm_experts.CASES:
        if kind in vllm_experts.LACKS.get(name, ()):
            continue
        folder = work / name.replace(" ", "-")
        _, changes[name] = vllm_experts.make_adapter(base, folder, name)
        files[name, "peft's file"], files[name, "for vllm"] = folder, Path(f"{folder}-vllm")
        export_adapter(folder, files[name, "for vllm"], "vllm", base=base.folder / "config.json")
    request = {"model": str(base.folder), "adapters": list(map(str, files.values())), "modules": None,
               "out": str(work / "placed.npz")}  # fmt: skip
    command = [python, measure.HERE / "run_sglang_experts.py", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    return collect(kind, list(files), changes, dict(np.load(request["out"])))


def collect(
    kind: str, labels: list[tuple[str, str]], changes: dict[str, dict[str, np.ndarray]], found: dict[str, np.ndarray]
) -> dict[str, dict[str, Any]]:
    """Return the results from the arrays of `run_sglang_experts.py`, whose names begin with the adapter's number."""
    results: dict[str, dict[str, Any]] = {}
    for number, (name, form) in enumerate(labels):
        own = {key.partition("/")[2]: x for key, x in found.items() if key.startswith(f"{number}/")}
        placed: str | dict[str, np.ndarray] = str(own["refused"]) if "refused" in own else {}
        for key, delta in own.items() if isinstance(placed, dict) else ():
            module, _, part = key.rpartition("/")
            placed |= vllm_experts.in_transformers(module, int(part), delta)
        results.setdefault(name, {})[form] = vllm_experts.outcome(kind, placed, changes[name])
    return results


def main() -> None:
    python = Path(sys.argv[1]) / "sglang/bin/python"
    for kind in sys.argv[2:] or list(vllm_experts.MODELS):
        with tempfile.TemporaryDirectory() as folder:
            results = measure_model(kind, python, Path(folder))
        found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps(found | {kind: results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
