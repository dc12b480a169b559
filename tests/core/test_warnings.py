"""A warning points at the user's line that called the library, through any frames in between."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import jaxadapt
from jaxadapt.models import LoraTree
from tests.support import small
from tests.system.test_house import PACKAGE

Given = Callable[[Path], object]
NO_K = small.LORA.replace(alpha_pattern={"k_proj": 3})
TABLE = jaxadapt.KeyMap("mine", (jaxadapt.Weight("q_proj.kernel", "q_proj.weight", "i o -> o i"),))
UNPROVED = dataclasses.replace(TABLE, proved=False)
Q = {"q_proj": {"kernel": np.ones((6, 8), "f4")}}
MORE = {**Q, "k_proj": Q["q_proj"]}
QWIX = {"q_proj": {**Q["q_proj"], "kernel_lora_a": np.ones((6, 2)), "kernel_lora_b": np.ones((2, 8))}}


def edited(at: Path) -> None:
    jaxadapt.save(small.adapter(), at)
    text = (at / small.CONFIG).read_text()
    (at / small.CONFIG).write_text(text.replace('"lora_alpha": 6', '"lora_alpha": 7'))


def beside_a_bin(at: Path) -> None:
    (at / "adapter_model.bin").write_bytes(b"old")


def wide(at: Path) -> None:
    tensors = {k: np.asarray(v, "float64") for k, v in jaxadapt.to_peft(small.adapter()).tensors.items()}
    jaxadapt.write(jaxadapt.PeftTensors(small.LORA, tensors), at)


def base(at: Path) -> None:
    jaxadapt.export.export_base(Q, at, keymap=TABLE)


@pytest.mark.parametrize(
    ("given", "call"),
    [
        (edited, lambda at: jaxadapt.read(at)),
        (edited, lambda at: jaxadapt.read_config(at)),
        (edited, lambda at: jaxadapt.inspect(at)),
        (edited, lambda at: jaxadapt.load(at, small.net())),
        (edited, lambda at: jaxadapt.load(at, small.base())),
        (wide, lambda at: jaxadapt.load(at, small.net())),
        (wide, lambda at: jaxadapt.from_peft(jaxadapt.read(at), small.net())),
        (beside_a_bin, lambda at: jaxadapt.save(small.adapter(), at)),
        (beside_a_bin, lambda at: jaxadapt.write(jaxadapt.to_peft(small.adapter()), at)),
        (Path.exists, lambda at: jaxadapt.adapt(small.net(), NO_K, rngs=nnx.Rngs(0))),
        (Path.exists, lambda at: jaxadapt.init(small.base()["params"], NO_K, key=jax.random.key(0))),
        (Path.exists, lambda at: jaxadapt.adapt(small.LinenNet(), NO_K).init(jax.random.key(0), small.X)),
        (Path.exists, lambda at: jaxadapt.export.export_base(Q, at, keymap=UNPROVED)),
        (Path.exists, lambda at: jaxadapt.save(LoraTree(QWIX, lora_alpha=2), at, keymap=UNPROVED)),
        (base, lambda at: jaxadapt.export.import_base(at, MORE, keymap=TABLE, strict=False)),
    ],
)  # fmt: skip
def test_a_warning_points_at_the_callers_line(given: Given, call: Given, tmp_path):
    given(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(tmp_path)
    assert caught
    for warning in caught:
        assert (warning.filename, warning.lineno) == (__file__, call.__code__.co_firstlineno), warning.message


def test_every_warning_is_such_a_one():
    sources = {path.name: path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    assert [name for name, text in sources.items() if "warnings.warn" in text] == ["errors.py"]
