"""Checkpoints of a training run: asynchronous, rotated, and resumed bit for bit.

    with jaxadapt.CheckpointManager("run/", keep=3) as manager:
        manager.save(step, model, opt_state=optimizer, rng=rngs, data=position)
    …
    manager.restore(model, opt_state=optimizer, rng=rngs)

Each step is one safetensors file, which needs one write and one flush and is replaced atomically. (Orbax takes several
times as long for the same bytes: benchmarks/README.md.) If several processes share the arrays, each writes its own
bytes of the file, and process 0 commits it. For an object store, process 0 gathers and uploads all arrays.

A save runs in the background, one at a time, and is completed even if the program ends. On SIGTERM, a loop saves its
last step with a signal handler that is installed for one `with` block.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib
import numbers
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Iterable, Mapping
from types import TracebackType
from typing import Any

import jax

from jaxadapt.adapters.adapter import Adapter, Recipe, name_donated_arrays
from jaxadapt.configs.base import Config
from jaxadapt.core import paths
from jaxadapt.core.errors import (
    LOGGER,
    AdapterError,
    AttachError,
    ConfigError,
    FileError,
    FormatError,
    Progress,
    raise_as,
    reporter,
)
from jaxadapt.models.foreign import get_dialect
from jaxadapt.models.foreign.tree import ForeignTree, LoraTree
from jaxadapt.persistence import run_folder, save_adapter
from jaxadapt.storage import atomic, local_files, location
from jaxadapt.training import step_files

# ---------------------------------------------------------------- background


class Background:
    """A runner that starts one thread for each task, also while the program ends.

    The thread is not a daemon, so the interpreter joins it before it ends. An error is kept until `wait` raises it. If
    the program ends before that, the error is printed and the exit status is 1.
    """

    def __init__(self) -> None:
        self._task: concurrent.futures.Future[None] | None = None
        self._process = os.getpid()  # of the task
        self._joins_early = False

    @property
    def task(self) -> concurrent.futures.Future[None] | None:
        """The task that `wait` waits for; None in a forked process, which has no thread that could end it."""
        return self._task if self._process == os.getpid() else None

    @property
    def running(self) -> bool:
        return self.task is not None and not self.task.done()

    def start(self, work: Callable[[], None], needs_executors: bool) -> None:
        """Wait for the previous task and start a new one.

        Args:
            work: the task.
            needs_executors: join the task before executors shut down. Orbax's saves run on executors, and packages of
                object stores look up host names on one; they accept no work after the main thread has ended.
        """
        self.wait()
        if needs_executors and not self._joins_early:
            self._joins_early = True
            # `atexit` and joining the thread are both too late. Executors are closed by a hook of the interpreter, so
            # the task must be joined in the same kind of hook (tests/training/test_background.py). Hooks run in reverse
            # order, so the executors' hook must be registered first; importing the module does this.
            importlib.import_module("concurrent.futures.thread")
            threading._register_atexit(self._join)  # pyright: ignore  # noqa: PGH003 (neither public nor in the stubs)
        atexit.unregister(self._exit)
        atexit.register(self._exit)
        may_begin = threading.Event()

        def run() -> None:
            may_begin.wait()
            work()

        self._process = os.getpid()
        try:
            self._task = local_files.start(run)
        finally:
            may_begin.set()  # only now, so that the task does not delay the training loop by sharing the interpreter

    def wait(self) -> None:
        """Wait until the task is done. Raise its error, once, if it failed."""
        self._join()
        task, self._task = self.task, None
        if task is not None:
            task.result()

    def _join(self) -> None:
        if self.task is not None:
            concurrent.futures.wait([self.task])

    def _exit(self) -> None:
        """Print an error that was never raised, and exit with status 1."""
        error = None if self.task is None else self.task.exception()
        if error is None:
            return
        sys.stderr.write("a checkpoint was not saved:\n")
        traceback.print_exception(error)
        atexit.unregister(self._exit)
        # Run the other exit functions, which `os._exit` would skip. An exception here would not change the status.
        atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage]
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


# ---------------------------------------------------------------- preemption


@contextlib.contextmanager
def catch_sigterm(wait: Callable[[], None]) -> Generator[Callable[[int], bool]]:
    """Yield `stop(step)`; after the block call `wait`, and exit the program if the signal arrived.

    See `CheckpointManager.preemption`.
    """
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
def synchronize_stop(wait: Callable[[], None]) -> Generator[Callable[[int], bool]]:
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


# ---------------------------------------------------------------- manager


def is_multi_process(taken: step_files.Snapshot | None) -> bool:
    """Return True if several processes share the arrays, without starting a JAX backend if no array has done so."""
    has_arrays = taken is not None and any(isinstance(x, jax.Array) for x in taken.arrays.values())
    return (has_arrays or jax.distributed.is_initialized()) and jax.process_count() > 1


def remove_steps(paths: Iterable[location.Location]) -> None:
    """Remove steps in this order. Raise `FileError` if this fails."""
    for path in paths:
        with local_files.file_errors("delete", path):
            path.unlink(missing_ok=True)


def _check_counts(keep: int | None, keep_best: int | None, keep_every: int | None, *, ranked: bool) -> None:
    """Raise `ConfigError` for invalid or contradictory numbers of steps; `ranked` says if a metric is given."""
    for name, count in (("keep", keep), ("keep_best", keep_best), ("keep_every", keep_every)):
        if count is not None and not isinstance(count, numbers.Integral):
            raise ConfigError(f"{name}={count!r}: expected an integer")
    checks = {
        f"keep={keep}: expected at least 1, or None for all": keep is None or keep >= 1,
        f"keep_best={keep_best}, keep_every={keep_every}: expected positive numbers": (
            (keep_best or 0) >= 0 and (keep_every is None or keep_every >= 1)
        ),
        "keep_best= needs minimize= or maximize=, the metric that decides which step is best": ranked or not keep_best,
        "keep_best= and keep_every= have no effect with keep=None, which keeps all steps": (
            keep is not None or not (keep_best or keep_every)
        ),
    }
    if problems := [problem for problem, right in checks.items() if not right]:
        raise ConfigError("\n".join(problems))


@dataclasses.dataclass(frozen=True)
class Restored:
    """A restored checkpoint.

    Attributes:
        step: the number of the step.
        model: the given NNX model or state, filled in place; Linen variables and `Adapter`s as new values.
        opt_state, rng, data: the saved values; None if there were none.
        metrics: the metrics given to `save`.
    """

    step: int
    model: Any
    opt_state: Any
    rng: Any
    data: Any
    metrics: dict[str, float]


def _read_below(step: step_files.StoredStep, prefix: str) -> dict[str, Any]:
    """Read the arrays whose names begin with a prefix; return them by the rest of their names."""
    found = step_files.read_step_arrays(step, {name: None for name in step.arrays if name.startswith(prefix)})
    return {name.removeprefix(prefix): value for name, value in found.items()}


def _stored_foreign_tree(stored: step_files.Snapshot, leaves: Mapping[str, Any]) -> ForeignTree:
    """Return a saved tree of another library with its leaves only, enough to convert them to PEFT's names."""
    damaged = "the checkpoint's description of its tree is damaged"
    with raise_as(FormatError, damaged, KeyError, TypeError, AttributeError):
        return ForeignTree(
            given=LoraTree(None),
            dialect=get_dialect(stored.guest["dialect"]),
            leaves=dict(leaves),
            put=lambda new: new,
            base={path: tuple(shape) for path, shape in stored.guest["base"].items()},
            stored=dict(stored.guest["stored"]),
        )


class CheckpointManager(run_folder.RunFolder):
    """The checkpoints of one training run in one folder.

    `steps`, `latest`, `best` and `metrics` include a step as soon as `save` returns, and exclude the steps that `keep=`
    deletes. If the write fails, the step is removed again and the next call raises the error.

    Use the manager as a context manager: leaving the block waits for the last save and raises its error. If the program
    ends without waiting (also by an exception or `sys.exit`), the last save is still completed; if it fails, the error
    is printed and the exit status is 1.

    Args:
        folder: a folder or an address, created at the first save. Only one job at a time may write to it.
        keep: the number of latest steps to keep. None keeps all.
        keep_best: the number of best steps to keep in addition. Default: 1 with `minimize` or `maximize`, else 0.
        keep_every: keep in addition the steps that are multiples of this number.
        minimize, maximize: the metric that decides which step is best; give one of the two. It is recorded in the steps
            for later readers.
        asynchronous: if True, `save` returns when the values are copied off the device, and the next save waits for the
            write.
        timeout: the number of seconds that a process waits for another one. All processes must see the folder and call
            `save`, `restore`, `rollback` and `export`.
        progress: None, True (bars on a terminal or in a notebook) or a function of ("save" or "load", bytes done, total
            bytes), for all transfers. For saves it is called in the background, and an exception in it ends the save.
            Each process counts the bytes that it writes itself.

    >>> import jax, jaxadapt, tempfile
    >>> base = {"q": {"kernel": jax.ShapeDtypeStruct((4, 6), "float32")}}
    >>> adapter = jaxadapt.init(base, jaxadapt.LoraConfig(r=2, target_modules=["q"]), key=jax.random.key(0))
    >>> folder = tempfile.TemporaryDirectory()
    >>> with CheckpointManager(folder.name, keep=2, keep_best=1, minimize="loss") as manager:
    ...     for step, loss in enumerate([0.5, 0.3, 0.4, 0.6]):
    ...         manager.save(step, adapter, data={"seen": 32 * step}, metrics={"loss": loss})
    >>> manager.steps, manager.latest, manager.best
    ([1, 2, 3], 3, 1)
    >>> manager.restore(adapter, step=1).data
    {'seen': 32}
    >>> folder.cleanup()
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep: int | None = None,
        keep_best: int | None = None,
        keep_every: int | None = None,
        minimize: str | None = None,
        maximize: str | None = None,
        asynchronous: bool = True,
        timeout: float = 300,
        progress: Progress = None,
    ) -> None:
        """Raise `ConfigError` for invalid or contradictory arguments."""
        _check_counts(keep, keep_best, keep_every, ranked=minimize is not None or maximize is not None)
        super().__init__(folder, minimize=minimize, maximize=maximize)
        self.keep: int | None = keep
        self.keep_every: int | None = keep_every
        self.keep_best: int = len(self._own_objective) if keep_best is None else keep_best
        self.asynchronous: bool = asynchronous
        self.timeout: float = timeout
        self.progress: Progress = progress
        self._saving = Background()
        # The last step passed to `save`, unless its write failed or it was rolled back; alike in all processes.
        self._last: run_folder.StepRecord | None = None

    def __repr__(self) -> str:
        return f"CheckpointManager({str(self.folder)!r}, steps {self.steps})"

    # ------------------------------------------------------------ saving

    def save(
        self,
        step: int,
        model: Any,
        *,
        opt_state: Any = None,
        rng: Any = None,
        data: Any = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        """Save all state that training changes, without the base.

        Return when the values are copied off the device, so that the arrays may be donated.

        Args:
            step: the number of the step. An existing step is replaced.
            model: an NNX model or state, Linen variables, or an `Adapter`. All its adapters are saved, and its random
                streams, batch statistics and other state.
            opt_state: a pytree or an `nnx.Optimizer`.
            rng: random keys, a pytree of them, or `nnx.Rngs`.
            data: the position of the data loader: numbers, strings, bytes and arrays in dicts, lists and tuples.
            metrics: numbers by name.

        Raises:
            AttachError: something cannot be saved.
            FileError: the folder contains later steps (see `rollback`).
            AdapterError: the previous save failed.
        """
        self.wait()
        number = run_folder.step_number(step)
        taken = step_files.take_snapshot(model, {"opt_state": opt_state, "rng": rng, "data": data})
        last = self._last
        best = (
            last.best
            if last is not None and number > last.step
            else self._run_on_leader("save", lambda: self._check_folder(number))
        )
        record = run_folder.make_record(number, metrics or {}, self._own_objective, best)
        atomic.make_folder(self.folder)
        finish = self._begin_save(taken, record, is_multi_process(taken))
        self._last = record
        self._saving.start(finish, needs_executors=isinstance(self.folder, location.Address))
        if not self.asynchronous:
            self.wait()

    def _check_folder(self, step: int) -> tuple[int, float] | None:
        """Raise `FileError` if the folder has later steps; remove leftovers. Return the best step before `step`."""
        if later := [s for s in self.steps if s > step]:
            raise FileError(
                f"{self.folder}: cannot save step {step}, because the folder contains later steps"
                f" ({', '.join(map(str, later[:8]))}); go back with"
                f" rollback({max((s for s in self.steps if s <= step), default='…')}), or use another folder"
            )
        if not isinstance(self.folder, location.Address):  # an upload is one step and leaves nothing
            atomic.remove_leftovers(self.folder, run_folder.NAME.pattern)
        earlier = {s: path for s, path in run_folder.list_steps(self.folder).items() if s < step}
        return next(iter(self._rank_steps(earlier).items()), None) if self._own_objective else None

    def _begin_save(
        self, taken: step_files.Snapshot, record: run_folder.StepRecord, is_shared: bool
    ) -> Callable[[], None]:
        """Copy the values off the device, and return a function that does the rest of the save."""
        path = run_folder.step_path(self.folder, record.step)
        if not is_shared:
            with name_donated_arrays(taken.arrays):
                values = step_files.copy_to_host(taken.arrays)
            write = functools.partial(step_files.write_step, path, taken, record, values)
        else:
            write = step_files.prepare_shared_write(path, taken, record, self.timeout)

        def finish() -> None:
            try:
                with reporter(self.progress) as report:
                    write(report)
            except BaseException:
                self._last = None
                raise
            LOGGER.info("%s: step %d saved, %d arrays", path, record.step, len(taken.arrays))
            if not is_shared or jax.process_index() == 0:
                self._prune()

        return finish

    def _prune(self) -> None:
        if self.keep is None:
            return
        steps = run_folder.list_steps(self.folder)
        kept = self._select_kept(steps)
        remove_steps(path for step, path in steps.items() if step not in kept)

    def _select_kept(self, steps: Mapping[int, location.Location]) -> dict[int, location.Location]:
        """Return the steps that are kept after the save."""
        if self.keep is None:
            return dict(steps)
        ranked = [step for step in self._rank_steps(steps) if step in steps] if self.keep_best else []
        every = (step for step in steps if self.keep_every and step % self.keep_every == 0)
        kept = {*list(steps)[-self.keep :], *ranked[: self.keep_best], *every}
        return {step: path for step, path in steps.items() if step in kept}

    # ------------------------------------------------------------ steps

    def _list_steps(self) -> dict[int, location.Location]:
        """Return the steps on disk or, during a save, the steps after it.

        With several processes also after a save, because a network file system may show a state that is a minute old.
        """
        # Read both before listing: a save that ends in between is then in the list.
        last_save = self._last
        is_running = self._saving.running
        steps = run_folder.list_steps(self.folder)
        if last_save is None or not (is_running or is_multi_process(None)):
            return steps
        path = run_folder.step_path(self.folder, last_save.step)
        if last_save.step not in steps and not is_running and not location.exists(path):
            return steps
        return self._select_kept(dict(sorted({**steps, last_save.step: path}.items())))

    def _read_record(self, step: int, path: location.Location) -> run_folder.StepRecord:
        last = self._last
        if last is not None and last.step == step and self._saving.running:
            return last
        return super()._read_record(step, path)

    # ------------------------------------------------------------ waiting

    def wait(self) -> None:
        """Wait until the last save is on disk. Raise its error, once, if it failed."""
        self._saving.wait()

    close = wait  # the manager stays usable

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except AdapterError as failed:
            if not isinstance(error, Exception):
                raise
            error.add_note(f"and the last checkpoint was not saved: {failed}")

    # ------------------------------------------------------------ restoring

    def restore(
        self,
        like: Any,
        step: int | str | None = None,
        *,
        model_only: bool = False,
        opt_state: Any = None,
        rng: Any = None,
        data: Any = None,
    ) -> Restored:
        """Restore a step, so that training continues bit for bit.

        Args:
            like: a new model like the saved one. NNX models are filled in place; Linen variables and `Adapter`s are
                returned as new values. Its arrays, which may be abstract, decide the devices.
            step: the number of the step, "best" or "latest", the default.
            model_only: restore only the model, for example to evaluate a step.
            opt_state, rng, data: new values like the saved ones, to fill in the same way. Values saved as dicts, lists
                and tuples need none.

        Raises:
            FileError: the step does not exist.
            MismatchError: something does not fit; the message lists all problems.
            ConfigError: `opt_state`, `rng` or `data` is given with `model_only=True`. After any error, nothing is
                changed.
        """
        parts = {"opt_state": opt_state, "rng": rng, "data": data}
        given = [f"{part}=" for part, example in parts.items() if example is not None]
        if model_only and given:
            raise ConfigError(
                f"model_only=True does not restore {', '.join(given)}: remove model_only=True or these arguments"
            )
        self.wait()
        number = self._run_on_leader("restore", functools.partial(self.find_step, step, "cannot restore: "))
        stored = step_files.read_stored_step(self._path(number))
        if model_only:
            arrays, values = (
                {name: value for name, value in named.items() if name.partition("/")[0] not in step_files.PARTS}
                for named in (stored.arrays, stored.values)
            )
            stored = dataclasses.replace(stored, arrays=arrays, values=values, plain={})
        with reporter(self.progress) as report:
            filled = step_files.fill_parts(like, parts, stored, report)
        LOGGER.info("%s: step %d restored, %d arrays", stored.path, number, len(stored.arrays))
        return Restored(step=number, metrics=stored.metrics, **dict.fromkeys(step_files.PARTS) | filled)

    def adapter(self, step: int | str | None = None, name: str = "default") -> Adapter:
        """Return one adapter of a step as a value with numpy arrays. No model is needed; `step` is as in `restore`."""
        self.wait()
        stored = step_files.read_stored_step(self._path(self.find_step(step)))
        if stored.guest:
            raise AttachError(
                f"{stored.path}: contains {stored.guest.get('dialect')} LoRA parameters, not an adapter of"
                " jaxadapt; use export() or restore()"
            )
        if name not in stored.recipes:
            raise AttachError(f"{stored.path}: there is no adapter {name!r}; found {sorted(stored.recipes)}")
        params = _read_below(stored, step_files.name_prefix(name))
        recipe = Recipe.from_text(stored.recipes[name])
        return Adapter(recipe.config, paths.unflatten(params), recipe.keymap)

    def export(
        self,
        step: int | str | None,
        path: str | os.PathLike[str],
        *,
        config: Config | None = None,
        lora_alpha: float | None = None,
        on_shared: str | None = None,
        **options: Any,
    ) -> None:
        """Write the adapters of a step to a folder that PEFT can load; `step` is as in `restore`.

        No model is needed, so the folder has no fingerprint of the base; restore the step and `save` it for one.
        `options` are those of `jaxadapt.save`. `name=` selects one of several adapters. `config`, `lora_alpha` and
        `on_shared` are those of `jaxadapt.models.LoraTree`: a tree of another library needs `lora_alpha=` or `config=`.
        """
        self.wait()
        options.setdefault("progress", self.progress)
        self._run_on_leader(
            "export",
            lambda: self._export(
                step, path, {"config": config, "lora_alpha": lora_alpha, "on_shared": on_shared}, options
            ),
        )

    def _export(
        self, step: int | str | None, path: str | os.PathLike[str], wrap: Mapping[str, Any], options: dict[str, Any]
    ) -> None:
        number = self.find_step(step, "cannot export: ")
        stored = step_files.read_stored_step(self._path(number))
        if stored.guest:
            tree = _stored_foreign_tree(stored, _read_below(stored, "guest/"))
            save_adapter.save(LoraTree(tree, **wrap), path, **options)
        for name in [options.pop("name")] if "name" in options else stored.recipes:
            save_adapter.save(LoraTree(self.adapter(number, name), **wrap), path, name=name, **options)

    def rollback(self, step: int) -> None:
        """Delete every step after `step`, the last first, so that training can continue from `step`."""
        self.wait()
        self._run_on_leader("rollback", functools.partial(self._rollback, step))
        self._last = None

    def _rollback(self, step: int) -> None:
        self._path(run_folder.step_number(step))
        remove_steps(path for later, path in reversed(run_folder.list_steps(self.folder).items()) if later > step)

    def _run_on_leader(self, name: str, work: Callable[[], Any]) -> Any:
        """Run `work` on process 0 and return its result in all processes.

        The other processes may see a state of a network file system that is a minute old.
        """
        if not is_multi_process(None):
            return work()
        return save_adapter.run_on_leader(f"{self.folder}: {name}", work, self.timeout)

    # ------------------------------------------------------------ preemption

    def preemption(self) -> contextlib.AbstractContextManager[Callable[[int], bool]]:
        """Catch SIGTERM in a `with` block; `stop(step)` returns True if it has arrived and it is time to save::

            with manager.preemption() as stop:
                for step in range(start, end):
                    …
                    if step % 100 == 0 or stop(step):
                        manager.save(step, …)
                    if stop(step):
                        break

        After the block, the last save is on disk and the previous handler is restored. If SIGTERM arrived, the program
        exits through that handler, or with `SystemExit(143)`. With several processes, `stop` uses JAX's preemption
        notice, so that all stop after the same step; then every process must call `stop` once per step.

        Raises:
            ConfigError: the caller is not in the main thread, the only one that receives signals.
        """
        # In a distributed program, JAX has its own handler, outside of Python.
        return (synchronize_stop if jax.distributed.is_initialized() else catch_sigterm)(self.wait)
