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


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
def test_given_positions_follow_those_of_a_prompts_tokens_where_peft_ignores_them(tmp_path: Path) -> None:
    """As docs/prompts.md says; transformers computes the same from these embeddings and positions."""
    torch.manual_seed(3)
    base = torch_base()
    model = peft.get_peft_model(copy.deepcopy(base), PROMPT.peft()).eval()
    model.save_pretrained(tmp_path)
    places = np.maximum(MASKS["left"].cumsum(1) - 1, 0)
    ids, mask, positions = (torch.tensor(x) for x in (IDS, MASKS["left"], places))
    with torch.no_grad():
        ignored = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits.numpy()
        np.testing.assert_array_equal(ignored, model(input_ids=ids, attention_mask=mask).logits.numpy())
        virtual = model.get_prompt(len(ids))
        n = virtual.shape[1]
        first = torch.arange(n).expand(len(ids), n)
        want = base(
            inputs_embeds=torch.cat([virtual, base.get_input_embeddings()(ids)], 1),
            attention_mask=torch.cat([torch.ones_like(first), mask], 1),
            position_ids=torch.cat([first, n + positions], 1),
        ).logits.numpy()
    run: Any = jaxadapt.load(tmp_path, gpt2_positions.twin_of(base, "nnx"))
    close(run(jnp.asarray(IDS), mask=jnp.asarray(MASKS["left"]), positions=jnp.asarray(places)), want)
    assert abs(ignored - want).max() > 1e-2 * abs(want).max()
