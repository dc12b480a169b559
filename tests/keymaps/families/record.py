"""Records what the real JAX classes say of the specimens whose packages the tests' own environment lacks.

    python tests/keymaps/families/record.py [SPECIMEN …]

writes `recorded/<specimen>.json`: the paths and shapes of the model's weights, and its logits with an adapter that
`jaxadapt.load` put there. It takes the specimens whose library can be imported:

    transformers' Flax classes   Python 3.11, `pip install jax==0.10.2 flax==0.12.8 transformers==4.57.6`
    gemma                        Python 3.13, `pip install gemma==4.0.1 'sentencepiece<0.2.2'`
    MaxText                      Python 3.13, `pip install maxtext==0.2.5 pathwaysutils` and what its import asks for:
                                 qwix, aqtp, omegaconf, transformers, datasets, grain, drjax, tokamax, jinja2, sympy …
    keras-hub                    Python 3.11, `pip install jax==0.10.2 flax==0.12.8 keras tokenizers sentencepiece`
                                 and `pip install --no-deps keras-hub==0.32.0`
    EasyDeL                      Python 3.11, `pip install easydel==0.3.0 jax==0.9.2`
    Bonsai                       Python 3.11, the extra `test`, and `pip install --no-deps` of github.com/jax-ml/bonsai
                                 (commit 3628425)
    twins of tests/support/twins the environment of the tests; by their names, as only tests/full runs recorded ones

The proofs (`test_proof.py`) compare with PyTorch, which need not be here.
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
from tests.keymaps.families.specimens import RECORDED, SPECIMENS  # noqa: E402


def main(names: list[str]) -> None:
    for specimen in SPECIMENS:
        live = specimen.side.startswith(("tunix", "moe"))  # in every environment of the tests
        if specimen.name not in names if names else not jax_side.here(specimen) or live:
            continue
        side = jax_side.side(specimen)
        with tempfile.TemporaryDirectory() as folder:
            specimen_arrays.write_adapter(specimen, side.shapes, Path(folder))
            target = side.make(specimen_arrays.base_leaves(specimen, side.shapes))
            logits, _ = side.adapted(target, Path(folder), specimen.keymap)
        found = {
            "versions": jax_side.versions(specimen),
            "leaves": side.shapes,
            "logits": [float(f"{x:.8g}") for x in np.asarray(logits, "float32").ravel()],
        }
        path = RECORDED / f"{specimen.name}.json"
        path.write_text(json.dumps(found, indent=0) + "\n", encoding="utf-8")
        print(specimen.name, logits.shape, float(np.abs(logits).max()))


if __name__ == "__main__":
    main(sys.argv[1:])
