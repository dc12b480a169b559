"""Train adapters with mlx-lm's own loop, in an environment with mlx[cpu] and mlx-lm, on random tokens.

python train_mlx.py '{"model": "base/", "vocabulary": 24, "adapters": {"a/": {"fine_tune_type": "dora"}}}'

The values of "adapters" are settings of mlx_lm.lora; the others are its defaults.
"""

from __future__ import annotations

import json
import random
import sys
import types
from pathlib import Path

import mlx.core as mx
from mlx_lm.lora import CONFIG_DEFAULTS, train_model
from mlx_lm.utils import load_model


class Tokens(list):
    """Token sequences in the place of one of mlx-lm's datasets of text."""

    def process(self, item: list[int]) -> tuple[list[int], int]:
        return item, 0


def main() -> None:
    request = json.loads(sys.argv[1])
    mx.set_default_device(mx.cpu)
    draw = random.Random(0)
    for folder, settings in request["adapters"].items():
        model, _ = load_model(Path(request["model"]))
        given = {"batch_size": 4, "iters": 8, "learning_rate": 0.01, "save_every": 4, "model": "org/base"}
        args = types.SimpleNamespace(**{**CONFIG_DEFAULTS, **given, **settings, "train": True, "adapter_path": folder})
        data = Tokens([draw.randrange(request["vocabulary"]) for _ in range(12)] for _ in range(8))
        train_model(args, model, data, Tokens(), None)


main()
