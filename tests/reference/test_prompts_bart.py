"""A prefix on BART: an encoder with a decoder whose positions are learned, so that they begin after the prefix.

float32; the tolerance 1e-5 of the largest value covers the order of the sums, which differs between the libraries.
"""

from __future__ import annotations

import functools
import warnings
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
from tests.support.prompts import close
from tests.support.twins import bart

pytestmark = pytest.mark.peft

IDS, DECODER = (np.random.RandomState(i).randint(3, 32, (2, time)) for i, time in ((0, 5), (1, 4)))
MASK = np.array([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])  # padded on either side


@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_pefts_adapter_gives_pefts_logits(api: str, tmp_path: Path) -> None:
    config = peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)
    base = bart.torch_bart()
    twin = bart.twin_of(base, api)
    torch.manual_seed(3)
    model = peft.get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = {"input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": DECODER}
        want = model(**{name: torch.tensor(x) for name, x in given.items()}).logits.numpy()
    if api == "nnx":
        run: Any = jaxadapt.load(tmp_path, twin)
    else:
        module = jaxadapt.adapt(twin[0], jaxadapt.read_config(tmp_path))
        run = functools.partial(module.apply, jaxadapt.load(tmp_path, twin[1]))
    close(jax.jit(run)(jnp.asarray(IDS), jnp.asarray(DECODER), jnp.asarray(MASK)), want)
