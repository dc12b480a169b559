"""`examples/tunix_checkpoints.py`: CheckpointManager inside Tunix's training loop, with Qwix's LoRA leaves."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxadapt
from jaxadapt.models import LoraTree
from tests.models.foreign import real
from tests.support.small import same

pytestmark = [
    pytest.mark.skipif(
        not all(importlib.util.find_spec(name) for name in ("tunix", "qwix")),
        reason="needs the extra `test` (tunix, qwix)",
    ),
    pytest.mark.usefixtures("foreign_model"),
    pytest.mark.filterwarnings("ignore"),  # Tunix's own, of many kinds
]
NAME = "tunix-qwen3-tied"
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tunix_checkpoints.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tunix_checkpoints", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lora(model: Any) -> Any:
    return nnx.state(model, nnx.LoRAParam)


def model_input(batch: Any) -> dict[str, Any]:
    length = batch.input_tokens.shape[1]
    mask = jnp.tril(jnp.ones((length, length), bool))
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": batch.input_mask,
        "positions": jnp.broadcast_to(jnp.arange(length), batch.input_tokens.shape),
        "attention_mask": jnp.broadcast_to(mask, (len(batch.input_tokens), length, length)),
    }


def trainer(steps: int, accumulate: int | None = None) -> Any:
    from tunix.sft import peft_trainer

    config = peft_trainer.TrainingConfig(
        eval_every_n_steps=10_000, max_steps=steps, gradient_accumulation_steps=accumulate
    )
    made = peft_trainer.PeftTrainer(real.make(NAME).tree, optax.adam(1e-2), config)
    return made.with_gen_model_input_fn(model_input)


class Data:
    """Batches that know where they are, as Grain's iterators do; `interrupt` sends SIGTERM with one of them."""

    def __init__(self, count: int = 4, interrupt: int | None = None) -> None:
        from tunix.sft import peft_trainer

        rng = np.random.default_rng(0)
        every = [rng.integers(1, 16, (2, 6)) for _ in range(count)]
        self.batches = [peft_trainer.TrainingInput(input_tokens=i, input_mask=np.ones_like(i)) for i in every]
        self.interrupt, self.next = interrupt, 0

    def get_state(self) -> dict[str, int]:
        return {"next": self.next}

    def set_state(self, state: dict[str, int] | None) -> None:
        self.next = 0 if state is None else state["next"]

    def __iter__(self) -> Iterator[Any]:
        while self.next < len(self.batches):
            self.next += 1
            if self.next == self.interrupt:
                os.kill(os.getpid(), signal.SIGTERM)
            yield self.batches[self.next - 1]


def run(example: ModuleType, made: Any, manager: jaxadapt.CheckpointManager, data: Data, **options: Any) -> Any:
    checkpoints = example.Checkpoints(manager, position=data.get_state, **options)
    made.with_training_hooks(checkpoints)
    data.set_state(checkpoints.resume(made))
    made.train(data)
    return made


@pytest.mark.parametrize("accumulate", [None, 2])
def test_resuming_inside_tunix(example: ModuleType, accumulate: int | None, tmp_path: Path):
    count = 4 * (accumulate or 1)
    whole = jaxadapt.CheckpointManager(tmp_path / "whole")
    one = trainer(4, accumulate)
    before = jax.tree.map(np.asarray, lora(one.model))
    run(example, one, whole, Data(count), every=1)
    assert whole.steps == [1, 2, 3, 4]
    assert not same(lora(one.model), before)

    manager = jaxadapt.CheckpointManager(tmp_path / "run", keep=2)
    run(example, trainer(2, accumulate), manager, Data(count), every=2)
    again = run(example, trainer(2, accumulate), manager, Data(count), every=3)
    assert manager.steps == [3, 4]
    assert same(lora(again.model), lora(one.model))  # bit for bit
    assert same(nnx.state(again.optimizer), nnx.state(one.optimizer))

    # Every kept step is a PEFT folder away, without the model.
    told = real.told(NAME)
    manager.export(4, tmp_path / "peft", keymap=real.specimen(NAME).keymap, **told)
    jaxadapt.save(LoraTree(again.model, **told), tmp_path / "direct", keymap=real.specimen(NAME).keymap)
    assert same(jaxadapt.read(tmp_path / "peft").tensors, jaxadapt.read(tmp_path / "direct").tensors)
    with pytest.raises(jaxadapt.AttachError, match=r"contains qwix LoRA parameters.*use export"):
        manager.adapter(4)
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    with pytest.raises(jaxadapt.MismatchError, match="qwix LoRA parameters saved"):
        manager.restore(model, opt_state=nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param))


def test_a_preempted_run_and_somebody_elses_hooks(example: ModuleType, tmp_path: Path):
    """SIGTERM ends the loop at a whole step, which is saved; MaxText's own hooks go on being called, and asked."""

    class Theirs(example.Nothing):
        told: list[str] = []  # noqa: RUF012 (a test's)

        def on_train_start(self, train_ctx: Any) -> None:
            self.told.append("start")

        def on_train_step_start(self, train_ctx: Any) -> None:
            self.told.append(f"step {train_ctx.train_steps}")

        def on_train_end(self, train_ctx: Any) -> None:
            self.told.append("end")

    one = run(example, trainer(4), jaxadapt.CheckpointManager(tmp_path / "whole"), Data(), every=9)
    with (
        pytest.raises(SystemExit) as left,
        jaxadapt.CheckpointManager(tmp_path / "run") as manager,
        manager.preemption() as stop,
    ):
        run(example, trainer(4), manager, Data(interrupt=3), every=9, stop=stop, inner=Theirs())
    assert left.value.code == 143
    assert manager.steps == [2]
    assert Theirs.told == ["start", "step 0", "step 1"]
    again = run(example, trainer(2), manager, Data(), every=9, inner=Theirs())
    assert again.training_hooks.told[3:] == ["start", "step 0", "step 1", "end"]
    assert same(lora(again.model), lora(one.model))
    assert same(nnx.state(again.optimizer), nnx.state(one.optimizer))
    # Where the data does not know where it is, the batches are counted.
    counted = example.Checkpoints(jaxadapt.CheckpointManager(tmp_path / "counted"), every=1)
    made = trainer(3)
    made.with_training_hooks(counted)
    made.train(Data().batches)
    assert example.Checkpoints(counted.manager, every=1).resume(trainer(1)) == 3
