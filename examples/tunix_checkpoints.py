"""`jaxadapt.CheckpointManager` inside Tunix's training loop, and MaxText's, whose fine-tuning is Tunix's.

    from tunix_checkpoints import Checkpoints

    with jaxadapt.CheckpointManager("gs://bucket/run", keep=3) as manager, manager.preemption() as stop:
        trainer = peft_trainer.PeftTrainer(model, optax.adam(1e-4), config)  # Qwix's LoRA is on the model already
        checkpoints = Checkpoints(manager, every=100, stop=stop)
        trainer.with_training_hooks(checkpoints)
        trainer.train(batches[checkpoints.resume(trainer) or 0 :])
    manager.export(None, "out/", lora_alpha=16, keymap="tunix:qwen3")  # for PEFT and vLLM

MaxText sets hooks of its own (`maxtext.trainers.post_train.sft.train_sft`), which go on being called, and it saves and
resumes by itself even with `enable_checkpointing=false`:

    trainer, mesh = train_sft.setup_trainer_state(config)
    trainer.checkpoint_manager = checkpoint_manager.CheckpointManager()  # tunix.sft's, of nothing: there is one
    checkpoints = Checkpoints(manager, every=100, stop=stop, inner=trainer.training_hooks)
    trainer.with_training_hooks(checkpoints)
    with jax.set_mesh(mesh):
        checkpoints.resume(trainer)
    train_sft.train_model(config, trainer, mesh)
    manager.export(None, "out/", lora_alpha=config.lora.lora_alpha, keymap="maxtext:llama3.1/scan1")

`max_steps` counts the steps of one run of the loop: after `resume`, those that are left. The loop has to be given the
data that is left, too. With an iterator that knows where it is, such as Grain's, say `position=iterator.get_state`, and
`iterator.set_state(checkpoints.resume(trainer))`; otherwise the number of batches is kept.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

from tunix.sft import hooks

import jaxadapt


class Nothing(hooks.TrainingHooks):
    """Hooks that do nothing."""

    def on_train_start(self, train_ctx: Any) -> None: ...
    def on_train_end(self, train_ctx: Any) -> None: ...
    def on_train_step_start(self, train_ctx: Any) -> None: ...
    def on_train_step_end(self, train_ctx: Any, train_step: int, train_loss: float) -> None: ...
    def on_eval_step_start(self, train_ctx: Any) -> None: ...
    def on_eval_step_end(self, train_ctx: Any, eval_loss: float) -> None: ...


class Checkpoints:
    """Training hooks that save every `every` steps, at the end, and when `stop(step)` says so; then the program leaves.

    Saved are the LoRA leaves, the optimizer's state, random streams, and where the data is; never the base.
    """

    def __init__(
        self,
        manager: jaxadapt.CheckpointManager,
        every: int,
        stop: Callable[[int], bool] = lambda step: False,
        position: Callable[[], Any] | None = None,
        inner: Any = None,
    ) -> None:
        self.manager, self.every, self.stop = manager, every, stop
        self.position, self.inner = position, inner or Nothing()
        self.first = self.batches = 0
        self.data: Any = None  # where the data is after the batches that the model has seen
        self.last: int | None = None  # the step that the last batch was for

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)  # what is not done here is for the other hooks

    def resume(self, trainer: Any) -> Any:
        """Puts the last checkpoint into a trainer, and gives where the data was; None if there is none."""
        if self.manager.latest is None:
            return None
        back = self.manager.restore(trainer.model, opt_state=trainer.optimizer)
        self.first, self.data = back.step, back.data
        self.batches = 0 if self.position else back.data
        return back.data

    def on_train_step_start(self, train_ctx: Any) -> None:
        # Steps are dispatched ahead of their metrics: here, not at a step's end, the model is what the count says. But
        # the batch of this step is taken already. Of gradient accumulation only the first batch counts.
        step = self.first + train_ctx.train_steps
        if step != self.last and step > self.first:
            leaves = self.stop(step)
            if leaves or step % self.every == 0:
                self.save(train_ctx, step)
            if leaves:
                raise SystemExit(128 + signal.SIGTERM)
        self.last = step
        self.batches += 1
        self.data = self.position() if self.position else self.batches
        self.inner.on_train_step_start(train_ctx)

    def on_train_end(self, train_ctx: Any) -> None:
        self.save(train_ctx, self.first + train_ctx.train_steps)
        self.manager.wait()
        self.inner.on_train_end(train_ctx)

    def save(self, train_ctx: Any, step: int) -> None:
        self.manager.save(step, train_ctx.model, opt_state=train_ctx.optimizer, data=self.data)
