"""Write tests/persistence/recorded_mlx: a LoRA and a DoRA that mlx-lm trained, their base, and mlx-lm's logits.

python -m tests.full.programs.record_mlx FOLDER     # with the environments of environments.py
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

from tests.export import test_adapter_export as tiny
from tests.full.programs import measure

TARGET = Path(__file__).parents[2] / "persistence" / "recorded_mlx"
# A rank and a scale whose product is no float: PEFT must divide lora_alpha by the rank to get the scale again.
PARAMETERS = {"rank": 3, "scale": 2.3, "dropout": 0.1}
ADAPTERS = {
    "lora": {"num_layers": 1, "lora_parameters": PARAMETERS},  # without keys: every linear layer of the last block
    "dora": {
        "fine_tune_type": "dora",
        "num_layers": 2,
        "lora_parameters": {**PARAMETERS, "keys": ["self_attn.q_proj", "mlp.down_proj"]},
    },
}
TOKENS = [3, 7, 1, 9, 4, 20, 11, 2]


def main(programs: Path) -> None:
    shutil.rmtree(TARGET, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        tiny.model_of("llama").save_pretrained(work / "base")
        base = measure.Base(work / "base", work, TOKENS)
        measure.train_in_mlx(base, programs, ADAPTERS, 24)
        names = [None, *(str(work / name) for name in ADAPTERS)]
        found = measure.logits("mlx", programs, base.folder, names, base, work / "logits.npy")
        for name in ("base", *ADAPTERS):
            (TARGET / name).mkdir(parents=True)
            for path in (work / name).glob("*.*"):
                if not path.name.startswith(("0", "generation")):
                    shutil.copy(path, TARGET / name)
        np.save(TARGET / "logits.npy", found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
