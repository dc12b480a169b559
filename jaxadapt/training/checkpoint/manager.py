"""Checkpoints while training: asynchronous, rotated, resumed bit for bit.

    with jaxadapt.CheckpointManager("run/", keep=3) as manager:
        manager.save(step, model, opt_state=optimizer, rng=rngs, data=position)
    …
    manager.restore(model, opt_state=optimizer, rng=rngs)

Each step is one safetensors file: a single write and a single flush, replaced as a whole. (For the same bytes Orbax
takes a multiple of a raw write: benchmarks/README.md.) Where several processes share the arrays, each writes its own
bytes into it, and one of them commits; into an object store process 0 puts what `save` has gathered there.
"""

from __future__ import annotations

import contextlib
import functools
import numbers
import os
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, NamedTuple

import jax

from jaxadapt.adapters.adapter import Adapter, Recipe, name_donated_arrays
from jaxadapt.core import paths
from jaxadapt.core.errors import AdapterError, AttachError, ConfigError, FileError
from jaxadapt.core.progress import LOGGER, Progress, reporter
from jaxadapt.persistence import multihost, run_folder
from jaxadapt.persistence.run_folder import RunFolder, Said
from jaxadapt.persistence.save_adapter import save
from jaxadapt.storage import location
from jaxadapt.storage.location import Place
from jaxadapt.training.checkpoint import preemption, snapshot, step_files, step_reading
from jaxadapt.training.checkpoint import restore as resuming
from jaxadapt.training.checkpoint.background import Background
from jaxadapt.training.checkpoint.restore import Restored
from jaxadapt.training.checkpoint.snapshot import Snapshot


class _Handed(NamedTuple):
    """What `save` was given last."""

    step: int
    said: Said


class CheckpointManager(RunFolder):
    """The checkpoints of one training run, in one folder.

    A step counts in `steps`, `latest`, `best` and `metrics` as soon as `save` has returned, and those that `keep=`
    deletes no longer do. If the write fails, the step is gone again, and the next call raises the error.

    Args:
        folder: made at the first save. One job at a time writes to it.
        keep: how many of the last steps stay; None: all.
        keep_best: how many of the best stay besides.
        keep_every: steps that are a multiple of it stay besides.
        minimize, maximize: the metric that says which is best; one of the two. The steps say it for later readers.
        asynchronous: `save` returns when the values are off the device, and the next save waits for it.
        timeout: with several processes, how long one waits for the answer of another, in seconds. All must see the
            folder, and all call `save`, `restore`, `rollback` and `export`.
        progress: None, True (bars on a terminal or in a notebook) or a function of ("save" or "load", bytes done, bytes
            in all), for all that the manager moves; of `save` it is called behind the training loop, and an exception
            of it ends that save. Of several processes each counts what it writes itself.

    Use it as a context manager: leaving the block waits for the last save and raises what went wrong. Left without
    waiting (the program ends, also by an exception or `sys.exit`) the last save still lands; if it fails then, the
    error is printed and the exit status is 1.

    >>> import jax, jaxadapt, tempfile
    >>> base = {"q": {"kernel": jax.ShapeDtypeStruct((4, 6), "float32")}}
    >>> adapter = jaxadapt.init(jaxadapt.LoraConfig(r=2, target_modules=["q"]), base, key=jax.random.key(0))
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
        keep_best: int = 0,
        keep_every: int | None = None,
        minimize: str | None = None,
        maximize: str | None = None,
        asynchronous: bool = True,
        timeout: float = 300,
        progress: Progress = None,
    ) -> None:
        """Raises `ConfigError` for arguments that contradict each other."""
        problems: list[str] = []
        for name, count in (("keep", keep), ("keep_best", keep_best), ("keep_every", keep_every)):
            if count is not None and not isinstance(count, numbers.Integral):
                raise ConfigError(f"{name}={count!r}: expected an integer")
        if keep is not None and keep < 1:
            problems.append(f"keep={keep}: expected at least 1, or None for all")
        if keep_best < 0 or (keep_every is not None and keep_every < 1):
            problems.append(f"keep_best={keep_best}, keep_every={keep_every}: expected positive numbers")
        if keep_best and minimize is None and maximize is None:
            problems.append("keep_best= needs minimize= or maximize=, the metric that says which is best")
        if keep is None and (keep_best or keep_every):
            problems.append("keep_best= and keep_every= add to keep=, which is None: everything is kept")
        if problems:
            raise ConfigError("\n".join(problems))
        super().__init__(folder, minimize=minimize, maximize=maximize)
        self.keep, self.keep_best, self.keep_every = keep, keep_best, keep_every
        self.asynchronous, self.timeout, self.progress = asynchronous, timeout, progress
        self._saving = Background()
        self._last: int | None = None  # the last step, as far as this manager knows; None: it has not looked

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
        """Saves everything that training changes, and nothing of the base.

        Args:
            step: which it is; a step that is there is replaced. Never skipped.
            model: what `extract` takes: an NNX model or state, Linen variables, an `Adapter`. All its adapters are
                saved, with its random streams, batch statistics and other state.
            opt_state: a pytree or an `nnx.Optimizer`.
            rng: random keys, a pytree of them, or `nnx.Rngs`.
            data: where the data loader is: numbers, strings, bytes, arrays, in dicts, lists and tuples.
            metrics: numbers by name.

        Returns when the values are off the device, so arrays may be donated at once. Raises what the save before it
        met, `AttachError` for what cannot be saved, `FileError` if later steps are there (see `rollback`).
        """
        self.wait()
        number, said = run_folder.step_number(step), Said(_measured(metrics), self._own_objective)
        taken = snapshot.take_snapshot(model, {"opt_state": opt_state, "rng": rng, "data": data})
        several = _several(taken)
        if self._last is None or number < self._last:
            self._by_first("save", functools.partial(self._look, number))
        step_files.make_run_folder(self.folder)
        finish = self._begin(number, taken, said, several)
        self._last = number
        address = isinstance(self.folder, location.Address)
        self._saving.start(f"save step {number}", finish, early=address, what=_Handed(number, said))
        if not self.asynchronous:
            self.wait()

    def _look(self, step: int) -> None:
        """Before the first save, and one of an earlier step: nothing later is there, and nothing half-done."""
        later = [s for s in self.steps if s > step]
        if later:
            raise FileError(
                f"{self.folder}: step {step} would lie before {', '.join(map(str, later[:8]))}; go back with"
                f" rollback({max((s for s in self.steps if s <= step), default='…')}), or use another folder"
            )
        step_files.remove_leftovers(self.folder)

    def _begin(self, step: int, taken: Snapshot, said: Said, several: bool) -> Callable[[], None]:
        """Takes the values off the device; what is left to do is returned."""
        path = run_folder.step_path(self.folder, step)
        if not several:
            with name_donated_arrays(taken.arrays):
                values = step_files.copy_to_host(taken.arrays)
            write = functools.partial(step_files.write_step, path, taken, said, values)
        else:
            write = step_files.prepare_shared_write(path, taken, said, self.timeout)

        def finish() -> None:
            with reporter(self.progress) as report:
                write(report)
            LOGGER.info("%s: step %d saved, %d arrays", path, step, len(taken.arrays))
            if not several or _first():
                self._prune()

        return finish

    def _prune(self) -> None:
        if self.keep is None:
            return
        found = run_folder.list_steps(self.folder)
        kept = self._kept(found)
        for step, path in found.items():
            if step not in kept:
                step_files.remove_step(path)

    def _kept(self, found: Mapping[int, Place]) -> dict[int, Place]:
        """Those of these steps that stay when the save is over."""
        if self.keep is None:
            return dict(found)
        kept = set(list(found)[-self.keep :])
        kept |= set(self._ranked(found)[: self.keep_best]) if self.keep_best else set()
        kept |= {s for s in found if self.keep_every and s % self.keep_every == 0}
        return {step: path for step, path in found.items() if step in kept}

    # ------------------------------------------------------------ which steps there are

    def _found(self) -> dict[int, Place]:
        """The steps on the disk; while a save is under way, as they are when it is over.

        With several processes also after it: what a network's file system shows the others may be a minute old.
        """
        handed: _Handed | None = self._saving.what  # before the listing: a save that ends in between is in that
        under_way = self._saving.running
        found = run_folder.list_steps(self.folder)
        if handed is None or not (under_way or _several(None)):
            return found
        path = run_folder.step_path(self.folder, handed.step)
        if handed.step not in found and not under_way and not path.exists():
            return found
        return self._kept(dict(sorted({**found, handed.step: path}.items())))

    def _said_of(self, step: int, path: Place) -> Said:
        handed: _Handed | None = self._saving.what
        if handed is not None and handed.step == step and self._saving.running:
            return handed.said
        return super()._said_of(step, path)

    # ------------------------------------------------------------ waiting and leaving

    def wait(self) -> None:
        """Waits until the last save is on the disk. Raises what went wrong in the background, once."""
        self._saving.wait()

    def close(self) -> None:
        """The same as `wait`; the manager stays usable."""
        self.wait()

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

    # ------------------------------------------------------------ back

    def restore(
        self,
        like: Any,
        step: int | None = None,
        *,
        model_only: bool = False,
        opt_state: Any = None,
        rng: Any = None,
        data: Any = None,
    ) -> Restored:
        """Puts a step back: training goes on as if it had never stopped, bit for bit.

        Args:
            like: what was given to `save`, freshly made: NNX models are filled in place, Linen variables and
                `Adapter`s returned anew. Its arrays say on which devices the values go; abstract ones do.
            step: the latest by default.
            model_only: read nothing else, to evaluate a step, say. `opt_state`, `rng` and `data` stay as they are.
            opt_state, rng, data: examples to fill, likewise; not needed where dicts, lists and tuples were saved.

        Raises `FileError` if there is no such step, `MismatchError` naming everything that does not fit, `ConfigError`
        for a part that is to be filled with `model_only=True`; nothing is changed then.
        """
        parts = {"opt_state": opt_state, "rng": rng, "data": data}
        given = [f"{part}=" for part, example in parts.items() if example is not None]
        if model_only and given:
            raise ConfigError(f"model_only=True reads nothing into {', '.join(given)}: leave one of the two out")
        self.wait()
        found = self._by_first("restore", lambda: self.latest) if step is None else run_folder.step_number(step)
        if found is None:
            raise FileError(f"{self.folder}: there is no checkpoint to restore")
        stored = step_reading.read_stored_step(self._path(found))
        if model_only:
            stored = step_reading.model_alone(stored)
        with reporter(self.progress) as report:
            read = functools.partial(step_reading.read_step_arrays, stored, report=report)
            filled = resuming.fill_parts(like, parts, stored.taken, stored.specs, read, str(stored.path))
        LOGGER.info("%s: step %d restored, %d arrays", stored.path, found, len(stored.specs))
        back = {part: filled.get(part) for part in snapshot.PARTS}
        return Restored(found, filled["model"], **back, metrics=stored.metrics)

    def adapter(self, step: int | None = None, name: str = "default") -> Adapter:
        """One adapter of a step as a value, in numpy arrays; no model is needed."""
        self.wait()
        chosen = self.latest if step is None else run_folder.step_number(step)
        if chosen is None:
            raise FileError(f"{self.folder}: there is no checkpoint")
        stored = step_reading.read_stored_step(self._path(chosen))
        if stored.taken.foreign:
            what = stored.taken.foreign.get("dialect")
            raise AttachError(f"{stored.path}: holds {what} LoRA leaves; export writes them, restore puts them back")
        if name not in stored.taken.recipes:
            raise AttachError(f"{stored.path}: no adapter is called {name!r}; found {sorted(stored.taken.recipes)}")
        begin = snapshot.name_prefix(name)
        flat = step_reading.read_step_arrays(stored, {n: None for n in stored.specs if n.startswith(begin)})
        recipe = Recipe.from_text(stored.taken.recipes[name])
        tree = paths.unflatten({n.removeprefix(begin): value for n, value in flat.items()})
        return Adapter(recipe.config, tree, recipe.keymap)

    def export(self, step: int | None, path: str | os.PathLike[str], **options: Any) -> None:
        """Writes a step's adapters (None: the latest's) as a folder that PEFT reads; no model is needed.

        `options` are those of `jaxadapt.save`, `name=` for one of several adapters; of another library's tree
        `lora_alpha=` or `config=` is needed.
        """
        self.wait()
        options.setdefault("progress", self.progress)
        self._by_first("export", lambda: self._export(step, path, options))

    def _export(self, step: int | None, path: str | os.PathLike[str], options: dict[str, Any]) -> None:
        chosen = self.latest if step is None else run_folder.step_number(step)
        if chosen is None:
            raise FileError(f"{self.folder}: there is no checkpoint to export")
        stored = step_reading.read_stored_step(self._path(chosen))
        if stored.taken.foreign:
            flat = step_reading.read_step_arrays(stored, {n: None for n in stored.specs if n.startswith("guest/")})
            leaves = {n.removeprefix("guest/"): value for n, value in flat.items()}
            save(resuming.stored_foreign_tree(stored.taken, leaves), path, **options)
        for name in [options.pop("name")] if "name" in options else stored.taken.recipes:
            save(self.adapter(chosen, name), path, name=name, **options)

    def rollback(self, step: int) -> None:
        """Deletes every step after `step`, the last first, so that training can go on from there."""
        self.wait()
        self._by_first("rollback", functools.partial(self._rollback, step))
        self._saving.what = None

    def _rollback(self, step: int) -> None:
        self._path(run_folder.step_number(step))
        for later, path in reversed(run_folder.list_steps(self.folder).items()):
            if later > step:
                step_files.remove_step(path)

    def _by_first(self, what: str, work: Callable[[], Any]) -> Any:
        """What process 0 finds or does, in all of them: what others see of a network's folder may be a minute old."""
        return multihost.run_on_leader(f"{self.folder}: {what}", work, self.timeout) if _several(None) else work()

    # ------------------------------------------------------------ preemption

    def preemption(self) -> contextlib.AbstractContextManager[Callable[[int], bool]]:
        """Within the block SIGTERM does not kill; `stop(step)` says whether it has come, and it is time to save.

            with manager.preemption() as stop:
                for step in range(start, end):
                    …
                    if step % 100 == 0 or stop(step):
                        manager.save(step, …)
                    if stop(step):
                        break

        After the block the handler that was there is back, the last save is on the disk, and the program leaves: by
        that handler, or with `SystemExit(143)`. With several processes JAX's own notice is asked, which makes all
        of them stop at the same step; every process must then ask once a step.

        Raises `ConfigError` outside the main thread, where Python has no signals.
        """
        return preemption.catch_sigterm(self.wait)


def _several(taken: Snapshot | None) -> bool:
    """Whether several processes hold the arrays. Starts no JAX backend where no array has."""
    arrays = taken is not None and any(isinstance(x, jax.Array) for x in taken.arrays.values())
    return (arrays or jax.distributed.is_initialized()) and jax.process_count() > 1


def _first() -> bool:
    """Whether this is the process that does what one has to do."""
    return not _several(None) or jax.process_index() == 0


def _measured(metrics: Mapping[str, Any] | None) -> dict[str, float]:
    out: dict[str, float] = {}
    for name, value in (metrics or {}).items():
        try:
            out[str(name)] = float(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise ConfigError(f"metrics: {name}: expected a number, found {value!r}") from error
    return out
