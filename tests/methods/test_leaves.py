"""A method is one file and one row: LoRA, and each other method, work without the files of all the others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jaxadapt

# A process in which one file of a method after the other can be imported, and no other method's.
ALONE = """
import sys
from pathlib import Path

import numpy as np
from flax import nnx

import jaxadapt
from jaxadapt.configs.base import class_of
from jaxadapt.configs.table import FACTS
from jaxadapt.methods import METHODS

folder = Path(sys.argv[1])
entry = jaxadapt.Weight("q_proj.kernel", "q_proj.weight", "i o -> o i")
keymap = jaxadapt.KeyMap("net", (entry,), order=("q_proj",))
files = {peft_type: f"jaxadapt.methods.{peft_type.lower()}" for peft_type in FACTS}
assert not set(files.values()) & set(sys.modules), "imported with the package"
sys.modules |= dict.fromkeys(files.values())  # no file of a method can be imported


class Net(nnx.Module):
    def __init__(self):
        self.embed_tokens = nnx.Embed(24, 8, rngs=nnx.Rngs(0))
        self.q_proj, self.norm = nnx.Linear(8, 8, rngs=nnx.Rngs(1)), nnx.LayerNorm(8, rngs=nnx.Rngs(2))

    def __call__(self, ids):
        return self.norm(self.q_proj(self.embed_tokens(ids)))


del sys.modules[files["LORA"]]
config = jaxadapt.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"], trainable_token_indices=[1, 3])
model = jaxadapt.adapt(Net(), config, rngs=nnx.Rngs(1))
jaxadapt.save(model, folder / "lora")
jaxadapt.load(folder / "lora", Net())
assert not [f for f in jaxadapt.verify(folder / "lora") if f.severity == "error"]
assert np.isfinite(jaxadapt.merge(model)(np.arange(3))).all()
sys.modules[files["LORA"]] = None

for peft_type, file in files.items():
    del sys.modules[file]
    method = METHODS[peft_type]
    if method.scope == "site" and peft_type != "LORA":
        config = class_of(peft_type)(**{"target_modules": ["q_proj"], **method.examples[0]})
        jaxadapt.save(jaxadapt.adapt(Net(), config, keymap=keymap, rngs=nnx.Rngs(1)), folder / peft_type)
        jaxadapt.load(folder / peft_type, Net(), keymap=keymap)
    sys.modules[file] = None
print("works")
"""


def test_each_method_works_without_the_others(tmp_path: Path):
    command = [sys.executable, "-W", "ignore", "-c", ALONE, str(tmp_path)]
    root = str(Path(jaxadapt.__file__).parents[1])
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env={**os.environ, "PYTHONPATH": root})
    assert done.stdout == "works\n", done.stderr
