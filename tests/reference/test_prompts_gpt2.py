"""Prompts on GPT-2, whose positions are learned, as PEFT computes them; with every padding.

float32; the tolerance 1e-5 of the largest value covers the order of the sums, which differs between the libraries.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
import torch

import jaxadapt
from tests.support.prompts import IDS, MASKS, PREFIX, PROMPT, Case, close
from tests.support.twins import gpt2_positions

pytestmark = pytest.mark.peft


@functools.cache
def torch_base() -> Any:
    return gpt2_positions.torch_gpt2()


@pytest.mark.parametrize("api", ["nnx", "linen"])
@pytest.mark.parametrize("case", [PREFIX, PROMPT], ids=["prefix", "prompt"])
def test_pefts_adapter_gives_pefts_logits(case: Case, api: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = peft.get_peft_model(copy.deepcopy(torch_base()), case.peft()).eval()
    model.save_pretrained(tmp_path)
    twin = gpt2_positions.twin_of(torch_base(), api)
    if api == "nnx":
        run: Any = jaxadapt.load(tmp_path, twin)
    else:
        module = jaxadapt.adapt(twin[0], jaxadapt.read_config(tmp_path))
        run = functools.partial(module.apply, jaxadapt.load(tmp_path, twin[1]))
    compiled = jax.jit(lambda ids, mask: run(ids, mask=mask))
    for mask in MASKS.values():
        with torch.no_grad():
            want = model(input_ids=torch.tensor(IDS), attention_mask=torch.tensor(mask)).logits.numpy()
        close(compiled(jnp.asarray(IDS), jnp.asarray(mask)), want)
    # positions that are given move by the number of virtual tokens, as PEFT moves them for a prefix
    if case is PREFIX:
        places = np.maximum(MASKS["left"].cumsum(1) - 1, 0)
        given = {"input_ids": IDS, "attention_mask": MASKS["left"], "position_ids": places}
        with torch.no_grad():
            want = model(**{name: torch.tensor(x) for name, x in given.items()}).logits.numpy()
        found = jax.jit(lambda *a: run(a[0], mask=a[1], positions=a[2]))(*map(jnp.asarray, given.values()))
        close(found, want)
