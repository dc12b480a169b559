"""SIGTERM as a question that the training loop asks: the handler is there for the length of a block, and only then."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Generator

import jax

from jaxadapt.core.errors import ConfigError


@contextlib.contextmanager
def catch_sigterm(wait: Callable[[], None]) -> Generator[Callable[[int], bool]]:
    """`stop(step)` within the block; after it `wait` is called, and the program leaves if the signal came.

    See `CheckpointManager.preemption`.
    """
    if jax.distributed.is_initialized():  # JAX has a handler of its own then, outside of Python
        with _agreed(wait) as stop:
            yield stop
        return
    came: list[int] = []
    try:
        before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    except ValueError as error:
        raise ConfigError("preemption() must be entered in the main thread, the only one to get signals") from error
    try:
        yield lambda step: bool(came)
        wait()
    finally:
        # None: it was set outside of Python, and cannot be put back; the default is the nearest
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
    if came:
        if callable(before):
            signal.raise_signal(signal.SIGTERM)
        else:
            raise SystemExit(128 + signal.SIGTERM)


@contextlib.contextmanager
def _agreed(wait: Callable[[], None]) -> Generator[Callable[[int], bool]]:
    from jax.experimental import multihost_utils

    answers: dict[int, bool] = {}

    def stop(step: int) -> bool:
        if step not in answers:  # JAX counts the calls: one a step, however often a loop asks
            answers.clear()
            answers[step] = multihost_utils.reached_preemption_sync_point(step)
        return answers[step]

    yield stop
    wait()
    if any(answers.values()):
        raise SystemExit(128 + signal.SIGTERM)
