"""The table of file formats: a format is one file and one row, and the others work without it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jaxadapt
from jaxadapt.persistence import formats

# A process that cannot import one format: LoRA on an own model, and every other format.
WITHOUT = """
import sys
from pathlib import Path

hidden, folder = sys.argv[1], Path(sys.argv[2])
sys.modules[f"jaxadapt.persistence.formats.{hidden}"] = None
from jaxadapt.persistence import formats
del formats.FORMATS[hidden]

import numpy as np
from flax import nnx
import jaxadapt
from jaxadapt.export.conversion import convert

class Net(nnx.Module):
    def __init__(self):
        self.q_proj = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

config = jaxadapt.LoraConfig(r=2, target_modules=["q_proj"])
jaxadapt.save(jaxadapt.adapt(Net(), config, rngs=nnx.Rngs(1)), folder / "out")
expected = jaxadapt.extract(jaxadapt.load(folder / "out", Net())).params
assert jaxadapt.inspect(folder / "out").parameters == 16
assert [found.severity for found in jaxadapt.verify(folder / "out")].count("error") == 0
convert(folder / "out", folder / "bin", format="bin")
assert jaxadapt.read(folder / "bin").config.r == 2
if hidden != "orbax_folder":
    jaxadapt.save(jaxadapt.load(folder / "out", Net()), folder / "orbax", format="orbax")
    assert jaxadapt.inspect(folder / "orbax").parameters == 16
if hidden != "mlx_files":
    jaxadapt.export.export_adapter(folder / "out", folder / "mlx", "mlx")
    assert jaxadapt.read(folder / "mlx").config.r == 2
if hidden != "image_files":
    names = {f"base_model.model.unet.mid.to_q.lora_{side}.weight": np.ones((2, 2), "f4") for side in "AB"}
    image = jaxadapt.PeftTensors(jaxadapt.LoraConfig(r=2, target_modules=["unet.mid.to_q"]), names)
    jaxadapt.write(image, folder / "image")
    convert(folder / "image", folder / "image.safetensors", format="diffusers")
    assert jaxadapt.read(folder / "image.safetensors").config.r == 2
print("works")
"""


@pytest.mark.parametrize("hidden", [name for name in formats.FORMATS if name != "peft_folder"])
def test_the_rest_works_without_a_format(hidden: str, tmp_path: Path):
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT, hidden, str(tmp_path)]
    root = str(Path(jaxadapt.__file__).parents[1])
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env={**os.environ, "PYTHONPATH": root})
    assert done.stdout == "works\n", done.stderr


def test_each_style_belongs_to_one_format():
    rows = formats.FORMATS.values()
    styles = [style for row in rows for style in (*row.folders, *row.files, *row.exports)]
    assert len(set(styles)) == len(styles)
    assert all(formats.writer(style) for style in styles)


def test_a_folder_of_pefts_files_is_read_as_pefts(tmp_path: Path):
    """Whatever else is in it: the files that a save would replace are those that a reader takes."""
    keys = {f"base_model.model.q.lora_{side}.weight": np.ones((2, 2), "f4") for side in "AB"}
    adapter = jaxadapt.PeftTensors(jaxadapt.LoraConfig(r=2, target_modules=["q"]), keys)
    jaxadapt.write(adapter, tmp_path)
    for name in ("_METADATA", "adapters.safetensors", "pytorch_lora_weights.safetensors"):
        (tmp_path / name).write_bytes(b"")
    assert jaxadapt.read(tmp_path).tensors.keys() == keys.keys()
    assert jaxadapt.inspect(tmp_path).form == "PEFT"
