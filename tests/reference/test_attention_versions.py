"""The factor 2 of an `nn.MultiheadAttention`'s output projection, by the version of PEFT that wrote the file."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import jaxadapt
from tests.reference.test_attention import TABLE, leaves, peft_net
from tests.support import peft_harness as harness
from tests.support.twins import trees

pytestmark = pytest.mark.peft
PEFT_VERSION = jaxadapt.LoraConfig().peft_version


@pytest.mark.parametrize(
    ("version", "warned"),
    [
        (None, False),
        ("0.15.0", False),
        (PEFT_VERSION, False),
        (f"{PEFT_VERSION}.1", False),  # a rebuild of the same release
        ("0.21.3", True),
        ("0.22.0.dev0@abc", True),
        ("1.0", True),
    ],
)
@pytest.mark.parametrize("target", ["attn", "head"])
def test_a_file_of_a_later_version_is_told_of(version: str | None, warned: bool, target: str, tmp_path: Path):
    """The one that is installed is compared in test_attention: twice."""
    harness.save(peft_net(target_modules=[target]), tmp_path)
    held: dict[str, Any] = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**held, "peft_version": version}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        variables = jaxadapt.load(tmp_path, {"params": trees.nest(leaves())}, keymap=TABLE)
        jaxadapt.load(tmp_path, variables)  # into the adapter that is attached now
    said = [str(w.message) for w in caught if "output projection twice" in str(w.message)]
    assert len(said) == 2 * (warned and target == "attn")
    assert all(f"written by PEFT {version}" in text for text in said)


def test_peft_writes_its_version_and_the_newest_that_was_compared_is_installed(tmp_path: Path):
    import peft

    harness.save(peft_net(target_modules=["attn"]), tmp_path)
    assert (
        json.loads((tmp_path / "adapter_config.json").read_text())["peft_version"] == peft.__version__ == PEFT_VERSION
    )
