"""Records what SkyRL-tx and EasyDeL compute with their own LoRA, and with a PEFT file that was loaded into it.

pip install jaxadapt easydel==0.3.0 jax==0.9.2       # one environment
pip install jaxadapt skyrl-tx[jax,tinker]==0.3.0     # another
python tests/models/foreign/record_others.py easydel-llama # in each its own
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

jax.config.update("jax_default_matmul_precision", "highest")

import jaxadapt  # noqa: E402
from jaxadapt.models import LoraTree  # noqa: E402
from jaxadapt.models.carriers import lora_carrier  # noqa: E402
from tests.models.foreign import others  # noqa: E402

PACKAGES = {"skyrl": "skyrl-tx", "easydel": "easydel"}


def crcs(leaves: dict[str, Any]) -> dict[str, int]:
    return {path: zlib.crc32(np.ascontiguousarray(x).tobytes()) for path, x in leaves.items()}


def main(name: str) -> None:
    library = name.partition("-")[0]
    made = getattr(others, library)()
    found = lora_carrier(made.model).foreign
    assert found is not None
    flat = {".".join(map(str, path)): v for path, v in nnx.to_flat_state(nnx.state(made.model))}
    base = {p: tuple(v.shape) for p, v in flat.items() if isinstance(v, nnx.Param) and p not in found.leaves}
    unwrapped = {p.replace(".base_module", ""): shape for p, shape in base.items()}
    known = others.base(unwrapped)
    for path in base:
        flat[path].set_value(jnp.asarray(known[path.replace(".base_module", "")]))
    for path, x in found.leaves.items():
        flat[path].set_value(jnp.asarray(others.value(path, x.shape)))
    logits = made.run(others.SLOT)
    with tempfile.TemporaryDirectory() as folder:
        others.write_peft(name, unwrapped, folder)
        target = LoraTree(made.model, slot=others.INTO) if library == "skyrl" else made.model
        jaxadapt.load(folder, target, keymap="llama")
    after = lora_carrier(made.model).foreign
    assert after is not None
    done = {
        "versions": {package: importlib.metadata.version(package) for package in ("jax", "flax", PACKAGES[library])},
        "base": base,
        "lora": {path: tuple(x.shape) for path, x in found.leaves.items()},
        "logits": [float(f"{x:.8g}") for x in np.asarray(logits, "float32").ravel()],
        "loaded": [float(f"{x:.8g}") for x in np.asarray(made.run(others.INTO), "float32").ravel()],
        "crc": crcs(after.leaves),
    }
    (others.RECORDED / f"{name}.json").write_text(json.dumps(done, indent=0) + "\n", encoding="utf-8")
    print(name, np.abs(np.asarray(logits)).max())


if __name__ == "__main__":
    main(sys.argv[1])
