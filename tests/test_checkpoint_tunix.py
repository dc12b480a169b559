"""CheckpointManager inside Tunix's training loop, on its own models with Qwix's LoRA leaves."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxadapt
from tests.dialects import real
from tests.small import same

pytestmark = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("tunix", "qwix")), reason="needs the extra `test` (tunix, qwix)"
)
NAME = "tunix-qwen3-tied"


def lora(model: Any) -> Any:
    return nnx.state(model, nnx.LoRAParam)


def trainer(manager: jaxadapt.CheckpointManager, steps: int) -> Any:
    """A Tunix trainer that resumes from a manager, and saves to it: all that it takes is one hook class."""
    from tunix.sft import hooks, peft_trainer

    class Checkpoints(hooks.TrainingHooks):
        def on_train_start(self, train_ctx: Any) -> None:
            self.first = 0
            if manager.latest is not None:
                back = manager.restore(train_ctx.model, opt_state=train_ctx.optimizer)
                self.first = back.step
                assert back.data == {"batches": 2}

        def on_train_step_start(self, train_ctx: Any) -> None:
            # Steps are dispatched ahead of their metrics: here the model is what the count says.
            if train_ctx.train_steps:
                self.save(train_ctx)

        def on_train_end(self, train_ctx: Any) -> None:
            self.save(train_ctx)
            manager.wait()

        def save(self, train_ctx: Any) -> None:
            step = self.first + train_ctx.train_steps
            manager.save(step, train_ctx.model, opt_state=train_ctx.optimizer, data={"batches": step})

        def on_train_step_end(self, train_ctx: Any, train_step: int, train_loss: float) -> None: ...
        def on_eval_step_start(self, train_ctx: Any) -> None: ...
        def on_eval_step_end(self, train_ctx: Any, eval_loss: float) -> None: ...

    config = peft_trainer.TrainingConfig(eval_every_n_steps=10_000, max_steps=steps)
    made = peft_trainer.PeftTrainer(real.make(NAME).tree, optax.adam(1e-2), config)

    def model_input(batch: Any) -> dict[str, Any]:
        length = batch.input_tokens.shape[1]
        mask = jnp.tril(jnp.ones((length, length), bool))
        return {
            "input_tokens": batch.input_tokens,
            "input_mask": batch.input_mask,
            "positions": jnp.broadcast_to(jnp.arange(length), batch.input_tokens.shape),
            "attention_mask": jnp.broadcast_to(mask, (len(batch.input_tokens), length, length)),
        }

    made.with_training_hooks(Checkpoints())
    return made.with_gen_model_input_fn(model_input)


def batches(first: int) -> list[Any]:
    from tunix.sft import peft_trainer

    rng = np.random.default_rng(0)
    every = [rng.integers(1, 16, (2, 6)) for _ in range(4)]
    return [peft_trainer.TrainingInput(input_tokens=ids, input_mask=np.ones_like(ids)) for ids in every[first:]]


@pytest.mark.usefixtures("foreign_model")
@pytest.mark.filterwarnings("ignore")  # Tunix's own, of many kinds
def test_resuming_inside_tunix(tmp_path: Path):
    whole = jaxadapt.CheckpointManager(tmp_path / "whole")
    one = trainer(whole, 4)
    before = jax.tree.map(np.asarray, lora(one.model))
    one.train(batches(0))
    assert whole.steps == [1, 2, 3, 4]
    assert not same(lora(one.model), before)

    manager = jaxadapt.CheckpointManager(tmp_path / "run", keep=2)
    trainer(manager, 2).train(batches(0))
    again = trainer(manager, 2)
    again.train(batches(2))
    assert manager.steps == [3, 4]
    assert same(lora(again.model), lora(one.model))  # bit for bit
    assert same(nnx.state(again.optimizer), nnx.state(one.optimizer))

    # Every kept step is a PEFT folder away, without the model.
    told = real.told(NAME)
    manager.export(4, tmp_path / "peft", **told)
    jaxadapt.save(again.model, tmp_path / "direct", **told)
    assert same(jaxadapt.read(tmp_path / "peft").tensors, jaxadapt.read(tmp_path / "direct").tensors)
    with pytest.raises(jaxadapt.AttachError, match="export writes them"):
        manager.adapter(4)
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    with pytest.raises(jaxadapt.MismatchError, match="qwix LoRA leaves saved"):
        manager.restore(model, opt_state=nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param))
