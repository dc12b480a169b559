"""Our own adapters in Tunix's training loop, as they are: it trains every `nnx.LoRAParam`."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import jaxadapt

pytest.importorskip("tunix")

from tests.keymaps.families import jax_side, specimen_arrays
from tests.keymaps.families.specimens import BY_NAME
from tests.support.small import same
from tests.training.test_checkpoint_tunix import Data, model_input

pytestmark = [pytest.mark.usefixtures("foreign_model"), pytest.mark.filterwarnings("ignore")]


def test_tunix_trains_our_adapter_and_nothing_else(tmp_path):
    from tunix.sft import peft_trainer

    specimen = BY_NAME["tunix-qwen3-tied"]
    side = jax_side.side(specimen)
    model = side.make(specimen_arrays.base_leaves(specimen, side.shapes))
    config = jaxadapt.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    jaxadapt.adapt(model, config, rngs=nnx.Rngs(0))
    base = jax.tree.map(np.asarray, nnx.state(model, jaxadapt.models.BaseParam))
    before = {path: np.asarray(x) for path, x in jaxadapt.extract(model).flat().items()}

    training = peft_trainer.TrainingConfig(eval_every_n_steps=10_000, max_steps=3)
    trainer = peft_trainer.PeftTrainer(model, optax.adam(1e-2), training).with_gen_model_input_fn(model_input)
    trainer.train(Data(3))
    assert same(jax.tree.map(np.asarray, nnx.state(trainer.model, jaxadapt.models.BaseParam)), base)
    after = jaxadapt.extract(trainer.model).flat()
    assert before.keys() == after.keys()
    assert all(np.abs(after[path] - x).max() > 1e-4 for path, x in before.items())  # three steps of about 1e-2

    jaxadapt.save(trainer.model, tmp_path)
    fresh = jaxadapt.load(tmp_path, side.make(specimen_arrays.base_leaves(specimen, side.shapes)))
    np.testing.assert_array_equal(side.logits(fresh), side.logits(trainer.model))
