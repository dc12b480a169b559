"""Run mlx-lm, in an environment with mlx[cpu] and mlx-lm: the logits of a prompt, with and without adapters.

python run_mlx.py '{"model": "base/", "adapters": [null, "a/"], "tokens": [1, 2, 3], "out": "logits.npy"}'
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model


def main() -> None:
    request = json.loads(sys.argv[1])
    mx.set_default_device(mx.cpu)
    found = []
    for adapter in request["adapters"]:
        model, _ = load_model(Path(request["model"]))
        if adapter is not None:
            model = load_adapters(model, adapter)
        model.eval()
        found.append(np.array(model(mx.array([request["tokens"]]))[0].astype(mx.float32)))
    np.save(request["out"], np.stack(found))


main()
