"""A family is one file and one row: the others, and LoRA on an own model, work without it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jaxadapt

# A process in which one family's file after the other cannot be imported.
WITHOUT = """
import sys
from pathlib import Path

from flax import nnx

import jaxadapt
from jaxadapt.keymaps import families

folder = Path(sys.argv[1])
files = {file: f"jaxadapt.keymaps.families.{file}" for file in families.TABLE}
every = dict(families.FAMILIES)


class Net(nnx.Module):
    def __init__(self):
        self.q_proj = nnx.Linear(4, 4, rngs=nnx.Rngs(0))


for hidden in families.TABLE:
    for module in files.values():
        sys.modules.pop(module, None)
    sys.modules[files[hidden]] = None
    rest = families.load_families({file: names for file, names in families.TABLE.items() if file != hidden})
    assert len(every) - len(rest) == len(families.TABLE[hidden].split())
    families.FAMILIES.clear()
    families.FAMILIES.update(rest)
    config = jaxadapt.LoraConfig(r=2, target_modules=["q_proj"])
    jaxadapt.save(jaxadapt.adapt(Net(), config, rngs=nnx.Rngs(1)), folder / hidden)
    jaxadapt.load(folder / hidden, Net())
    del sys.modules[files[hidden]]
print("works")
"""


def test_the_rest_works_without_a_family(tmp_path: Path):
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT, str(tmp_path)]
    root = str(Path(jaxadapt.__file__).parents[1])
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env={**os.environ, "PYTHONPATH": root})
    assert done.stdout == "works\n", done.stderr
