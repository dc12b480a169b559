"""Records what models with their library's own LoRA compute, for environments without that library.

    python tests/models/foreign/record.py

writes `recorded/<specimen>.json` for what can be imported here: the paths and shapes of the LoRA leaves, and the
logits; of one also the leaves that a few steps of training make of them, and the logits then. The environments are
those of `tests/keymaps/families/record.py`.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import jax
import numpy as np

jax.config.update("jax_default_matmul_precision", "highest")

from tests.keymaps.families import jax_side, specimen_arrays  # noqa: E402
from tests.models.foreign import real  # noqa: E402


def main(names: list[str]) -> None:
    for name in names or [n for n in real.NAMES if real.here(n) and not n.startswith("tunix")]:
        made = real.make(name)
        logits = np.asarray(made.logits(made.tree), "float32")
        found = {
            "versions": jax_side.versions(real.specimen(name)),
            "lora": real.shapes(made.tree),
            "logits": [float(f"{x:.8g}") for x in logits.ravel()],
        }
        if name == real.TRAINED:
            tree = real.train(made)
            after = np.asarray(made.logits(tree), "float32")
            found |= {"trained": real.packed(tree), "after": [float(f"{x:.8g}") for x in after.ravel()]}
        if name.startswith("keras"):
            with tempfile.TemporaryDirectory() as folder:
                specimen_arrays.write_adapter(
                    real.specimen(name), jax_side.side(real.specimen(name)).shapes, Path(folder)
                )
                there, tree = real.loaded(name, Path(folder))
            found |= {
                "loaded": [float(f"{x:.8g}") for x in np.asarray(there.logits(tree), "float32").ravel()],
                "crc": real.crcs(tree),
            }
        path = real.RECORDED / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(found, indent=0) + "\n", encoding="utf-8")
        print(name, logits.shape, float(np.abs(logits).max()))


if __name__ == "__main__":
    main(sys.argv[1:])
