"""Memory and time are bounded by the size of a file, as SECURITY.md promises: sizes are checked before work begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxadapt
from jaxadapt import MismatchError
from tests.support import small
from tests.support.small import CONFIG, WEIGHTS


def folder_of(here: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    here.mkdir()
    (here / CONFIG).write_text(json.dumps(config))
    save_file(tensors, here / WEIGHTS, {"format": "pt"})
    return here


def test_projections_are_not_drawn_before_the_files_tensors_fit(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxadapt.methods.vera.draw_projections", lambda *_: pytest.fail("drawn"))
    config = {"peft_type": "VERA", "r": 10**8, "target_modules": ["q_proj"]}
    one = {"base_model.model.q_proj.vera_lambda_d": np.ones(2, "f4")}
    here = folder_of(tmp_path / "vera", config, one)
    for saved in (True, False):
        (here / CONFIG).write_text(json.dumps(config | {"save_projection": saved}))
        for strict in (True, False):
            with pytest.raises(MismatchError, match=r"vera_lambda_d: expected \[100000000\], found \[2\]"):
                jaxadapt.load(here, small.net(), strict=strict)


@pytest.mark.parametrize("strict", [True, False])
def test_a_rank_that_no_tensor_of_the_file_confirms_is_bounded_by_the_base(strict, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxadapt.methods.unilora.deal_indices", lambda *_: pytest.fail("drawn"))
    config = {"peft_type": "UNILORA", "r": 10**8, "theta_d_length": 4, "target_modules": ["q_proj"]}
    here = folder_of(tmp_path / "unilora", config, {"base_model.unilora_theta_d": np.ones(4, "f4")})
    with pytest.raises(MismatchError, match="asks for 2800000000 values that the file lacks"):
        jaxadapt.load(here, small.net(), strict=strict)
