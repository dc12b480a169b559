"""What a table's flags do to save, load and summary, on a tree of two kernels."""

from __future__ import annotations

import warnings

import jax
import numpy as np
import pytest

import jaxadapt
from jaxadapt import KeyMap, MismatchError, Weight

LINES = (
    Weight("layers.{l}.q.kernel", "model.layers.{l}.q.weight", "d h -> h d", scale=("h", -0.5)),
    Weight("layers.{l}.o.kernel", "model.layers.{l}.o.weight", "h d -> d h"),
)
VL = (("vl", (("model.", "model.language_model."),)),)
CONFIG = jaxadapt.LoraConfig(r=2, target_modules=["q", "o"])


def base(h: int = 12):
    return {"layers": {str(l): {"q": {"kernel": np.ones((4, h))}, "o": {"kernel": np.ones((h, 4))}} for l in range(2)}}


def adapter(table: KeyMap, h: int = 12) -> jaxadapt.Adapter:
    return jaxadapt.init(base(h), CONFIG, key=jax.random.key(0), keymap=table)


def test_saving_with_a_table_that_is_not_proved_says_so(tmp_path):
    with pytest.warns(UserWarning, match="the keymap 'mine' has not been verified"):
        jaxadapt.save(adapter(KeyMap("mine", LINES, proved=False)), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jaxadapt.save(adapter(KeyMap("mine", LINES)), tmp_path)


@pytest.mark.parametrize(("h", "rounds"), [(12, True), (16, False)])
def test_summary_names_the_table_and_what_it_rounds(h, rounds):
    held = adapter(KeyMap("mine", LINES, proved=False), h)
    text = str(jaxadapt.summary({"params": base(h), **held.collection}))
    assert "PyTorch names by the keymap 'mine', which is not tested" in text
    assert ("weight times 0.288675, not a power of two" in text) == rounds


def test_a_file_in_another_spelling_is_read_and_written_in_it(tmp_path):
    table = KeyMap("mine", LINES, spellings=VL)
    jaxadapt.save(adapter(table.with_spelling("vl")), tmp_path / "a")
    file = jaxadapt.read(tmp_path / "a")
    assert all(key.startswith("base_model.model.model.language_model.layers.") for key in file.tensors)
    again = jaxadapt.from_peft(file, base(), keymap=table)
    assert again.keymap == table.with_spelling("vl")
    jaxadapt.save(again, tmp_path / "b")
    for key, x in jaxadapt.read(tmp_path / "b").tensors.items():
        np.testing.assert_allclose(x, file.tensors[key], rtol=1e-6)  # q's B is rounded twice


def test_an_error_names_the_table():
    table = KeyMap("mine", LINES)
    file = jaxadapt.to_peft(adapter(table, 16))
    with pytest.raises(MismatchError, match="keymap is 'mine'"):
        jaxadapt.from_peft(file, base(), keymap=table)
