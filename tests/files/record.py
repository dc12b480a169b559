"""Write the folder of one release: an adapter of each method, and the numbers that every later version must read.

    python -m tests.files.record VERSION

Run it once for a release, and never again for the same version.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxadapt
from jaxadapt import KeyMap, Weight
from jaxadapt.methods import METHODS
from tests.support.configs import class_of

HERE = Path(__file__).parent
NAMES = ("k", "q", "up")
KEYMAP = KeyMap(
    "net",
    (Weight("{path}.kernel", "{path}.weight", "i o -> o i"), Weight("{path}.bias", "{path}.bias", "o -> o")),
    order=NAMES,
)
BASE, NUMBERS = "base.npz", "numbers.npz"


def draw(shape: Any, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def make_base() -> dict[str, np.ndarray]:
    return {
        f"{name}.{leaf}": draw(shape, 10 * n + m)
        for n, name in enumerate(NAMES)
        for m, (leaf, shape) in enumerate({"kernel": (8, 16), "bias": (16,)}.items())
    }


def nest(flat: Any) -> dict[str, dict[str, Any]]:
    return {name: {leaf: flat[f"{name}.{leaf}"] for leaf in ("kernel", "bias")} for name in NAMES}


def merged_numbers(folder: Path, base: dict[str, dict[str, Any]]) -> dict[str, np.ndarray]:
    """The weights of a base with the adapter of a folder merged into it."""
    adapter = jaxadapt.from_peft(jaxadapt.read(folder), base, keymap=KEYMAP)
    merged = jaxadapt.merge(base, adapter)
    return {f"merged.{name}.{leaf}": np.asarray(x) for name, leaves in merged.items() for leaf, x in leaves.items()}


def stored_numbers(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of a folder, as bytes."""
    return {f"tensor.{key}": np.asarray(x) for key, x in jaxadapt.read(folder).tensors.items()}


def cases() -> dict[str, jaxadapt.Config]:
    """The configuration of each folder: every method, and LoRA with the options that change its files."""
    found = {
        peft_type: class_of(peft_type)(**{"target_modules": ["q", "up"], **method.examples[0]})
        for peft_type, method in sorted(METHODS.items())
        if method.scope == "site"
    }
    lora = {
        "dora": {"use_dora": True, "use_rslora": True},
        "patterns": {"rank_pattern": {"up": 3}, "alpha_pattern": {"q": 7}},
        "copies": {"modules_to_save": ["k"], "bias": "lora_only"},
    }
    targets = ["q", "up"]
    return found | {
        f"LORA-{name}": jaxadapt.LoraConfig(r=2, lora_alpha=5, target_modules=targets, **options)
        for name, options in lora.items()
    }


def main(version: str) -> None:
    out = HERE / version
    out.mkdir()
    np.savez(out / BASE, **make_base())
    base = nest(make_base())
    for name, config in cases().items():
        adapter = jaxadapt.init(base, config, key=jax.random.key(0), keymap=KEYMAP)
        noisy = jax.tree.map(
            lambda x: x + 0.1 * draw(x.shape, 7).astype(x.dtype) if x.dtype.kind == "f" else x, adapter
        )
        jaxadapt.write(jaxadapt.to_peft(noisy), out / name)
        (out / name / "README.md").unlink(missing_ok=True)
        numbers = stored_numbers(out / name) | merged_numbers(out / name, base)
        np.savez_compressed(out / name / NUMBERS, **numbers)


if __name__ == "__main__":
    main(sys.argv[1])
