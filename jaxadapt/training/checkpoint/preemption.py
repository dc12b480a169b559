"""Handling of SIGTERM in a training loop, with a signal handler that is installed for one `with` block."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Generator

import jax

from jaxadapt.core.errors import ConfigError


@contextlib.contextmanager
def catch_sigterm(wait: Callable[[], None]) -> Generator[Callable[[int], bool]]:
    """Yield `stop(step)`; after the block call `wait`, and exit the program if the signal arrived.

    See `CheckpointManager.preemption`.
    """
    if jax.distributed.is_initialized():  # then JAX has its own handler, outside of Python
        with _synchronized_stop(wait) as stop:
            yield stop
        return
    received: list[int] = []
    try:
        previous = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    except ValueError as error:
        raise ConfigError(
            "preemption() must be entered in the main thread, the only one that receives signals"
        ) from error
    try:
        yield lambda step: bool(received)
        wait()
    finally:
        # None: the handler was set outside of Python and cannot be restored, so use the default.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)
    if received:
        if callable(previous):
            signal.raise_signal(signal.SIGTERM)
        else:
            raise SystemExit(128 + signal.SIGTERM)


@contextlib.contextmanager
def _synchronized_stop(wait: Callable[[], None]) -> Generator[Callable[[int], bool]]:
    """Yield `stop(step)`, which becomes True at the same step in all processes."""
    from jax.experimental import multihost_utils

    answers: dict[int, bool] = {}

    def stop(step: int) -> bool:
        if step not in answers:  # JAX counts calls, so call it once per step
            answers.clear()
            answers[step] = multihost_utils.reached_preemption_sync_point(step)
        return answers[step]

    yield stop
    wait()
    if any(answers.values()):
        raise SystemExit(128 + signal.SIGTERM)
