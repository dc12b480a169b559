"""Which steps a CheckpointManager has while a save is under way, when it fails, and later; a model without the rest."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import jax
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import jaxadapt
from tests.support import small
from tests.support.small import same

LOSSES = {1: 3.0, 2: 2.0, 3: 1.0}


class Gate:
    """A `progress=` that holds every write back until it opens, and makes it fail where `error` is set."""

    def __init__(self) -> None:
        self.go, self.error = threading.Event(), False

    def open(self) -> None:
        self.go.set()

    def __call__(self, task: str, done: int, total: int) -> None:
        if task == "save":
            assert self.go.wait(60)
            if self.error:
                raise jaxadapt.FileError("the disk is full")


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.open()


def on_disk(folder: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step-")) for path in folder.glob("step-*"))


def saved(folder: Path, gate: Gate, steps: dict[int, float], **options: Any) -> jaxadapt.CheckpointManager:
    """A manager whose last save is still under way."""
    manager = jaxadapt.CheckpointManager(folder, minimize="loss", progress=gate, **options)
    *before, last = steps
    gate.open()
    for step in before:
        manager.save(step, small.host_adapter(fill=step), metrics={"loss": steps[step]})
    manager.wait()
    gate.go.clear()
    manager.save(last, small.host_adapter(fill=last), metrics={"loss": steps[last]})
    return manager


def test_a_step_counts_as_soon_as_save_has_returned_as_in_orbax(tmp_path: Path, gate: Gate) -> None:
    theirs = ocp.CheckpointManager(
        tmp_path / "orbax", options=ocp.CheckpointManagerOptions(best_fn=lambda m: m["loss"], best_mode="min")
    )
    manager = jaxadapt.CheckpointManager(tmp_path / "ours", minimize="loss", progress=gate)
    with theirs:
        for step, loss in LOSSES.items():
            theirs.save(step, args=ocp.args.StandardSave({"x": np.ones(2)}), metrics={"loss": loss})
            gate.go.clear()
            manager.save(step, small.host_adapter(fill=step), metrics={"loss": loss})
            want = (theirs.all_steps(), theirs.latest_step(), theirs.best_step())
            assert (manager.steps, manager.latest, manager.best) == want == ([*range(1, step + 1)], step, step)
            assert manager.metrics(step) == {"loss": loss}
            assert on_disk(tmp_path / "ours") == [*range(1, step)]
            gate.open()
            manager.wait()
            assert (manager.steps, manager.latest, manager.best) == want


def test_the_best_step_is_kept_where_a_metric_is_named_as_in_orbax(tmp_path: Path) -> None:
    losses = {1: 2.0, 2: 0.5, 3: 3.0, 4: 1.0, 5: 4.0, 6: 5.0}
    options = ocp.CheckpointManagerOptions(max_to_keep=2, best_fn=lambda m: m["loss"], best_mode="min")
    ours = jaxadapt.CheckpointManager(tmp_path / "ours", keep=2, minimize="loss")
    with ocp.CheckpointManager(tmp_path / "orbax", options=options) as theirs, ours:
        for step, loss in losses.items():
            theirs.save(step, args=ocp.args.JsonSave({}), metrics={"loss": loss})
            ours.save(step, small.host_adapter(fill=step), metrics={"loss": loss})
        assert ours.best == theirs.best_step() == 2
    assert on_disk(tmp_path / "ours") == [2, 5, 6]
    with jaxadapt.CheckpointManager(tmp_path / "loss only as a record", keep=2) as unnamed:
        for step, loss in losses.items():
            unnamed.save(step, small.host_adapter(), metrics={"loss": loss})
    assert unnamed.steps == [5, 6]


def test_best_says_so_if_the_best_step_is_deleted(tmp_path: Path) -> None:
    for steps in ({1: 2.0, 2: 0.5, 3: 3.0}, {4: 1.0, 5: 4.0}):  # the second manager resumes the run
        with jaxadapt.CheckpointManager(tmp_path, keep=2, keep_best=0, minimize="loss") as manager:
            for step, loss in steps.items():
                manager.save(step, small.host_adapter(fill=step), metrics={"loss": loss})
    for run in (manager, jaxadapt.CheckpointManager(tmp_path)):
        with pytest.warns(UserWarning, match=r"best step that was saved, 2 \(loss 0\.5\), is deleted; .* left is 4"):
            assert run.best == 4
    assert jaxadapt.CheckpointManager(tmp_path, maximize="loss").best == 5  # it is known of the run's objective only
    again = jaxadapt.CheckpointManager(tmp_path / "again", minimize="loss")
    for step, loss in {1: 2.0, 2: 0.5, 3: 3.0}.items():
        again.save(step, small.host_adapter(fill=step), metrics={"loss": loss})
    again.rollback(1)
    again.save(5, small.host_adapter(), metrics={"loss": 9.0})
    assert again.best == 1  # what a rollback deletes does not count


def test_metrics_without_the_one_that_decides_are_a_warning(tmp_path: Path) -> None:
    """With a misspelled name, `keep=` would delete the best step without a word. Steps without metrics are no fault."""
    adapter = small.host_adapter()
    with jaxadapt.CheckpointManager(tmp_path, keep=1, minimize="loss") as manager:
        with pytest.warns(UserWarning, match="step 1 has eval_loss, seen, and not loss, which decides"):
            manager.save(1, adapter, metrics={"eval_loss": 1.0, "seen": 3})
        manager.save(2, adapter)
        manager.save(3, adapter, metrics={"loss": 1.0, "seen": 9})


@pytest.mark.parametrize("data", [{"": 7}, {"": {"": 7}}, {"a": {"": 7}, "": [8]}, 7])
def test_data_with_empty_keys_is_restored(data: Any, tmp_path: Path) -> None:
    with jaxadapt.CheckpointManager(tmp_path) as manager:
        manager.save(1, small.host_adapter(), data=data)
    assert manager.restore(small.host_adapter()).data == data


def test_the_best_is_exported_right_after_it_was_saved(tmp_path: Path) -> None:
    with jaxadapt.CheckpointManager(tmp_path / "run", minimize="loss") as manager:
        for step, loss in LOSSES.items():
            manager.save(step, small.adapter(seed=step), metrics={"loss": loss})
        manager.export(manager.best, tmp_path / "best")
    jaxadapt.save(small.adapter(seed=3), tmp_path / "direct")
    assert small.files(tmp_path / "best") == small.files(tmp_path / "direct")


@pytest.mark.parametrize(
    ("policy", "steps", "kept", "best"),
    [
        ({}, {1: 1.0, 2: 2.0, 3: 3.0}, [1, 2, 3], 1),
        ({"keep": 2}, {1: 2.0, 2: 1.0, 3: 3.0}, [2, 3], 2),
        ({"keep": 2}, {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}, [1, 3, 4], 1),
        ({"keep": 1, "keep_best": 1}, {1: 1.0, 2: 2.0, 3: 3.0}, [1, 3], 1),
        ({"keep": 1, "keep_best": 1}, {1: 3.0, 2: 2.0, 3: 1.0}, [3], 3),
        ({"keep": 1, "keep_every": 2}, {2: 2.0, 3: 3.0, 4: 4.0, 5: 5.0}, [2, 4, 5], 2),
        ({"keep": 1, "keep_best": 1}, {1: 3.0, 2: 1.0, 3: float("nan")}, [2, 3], 2),
    ],
)
@pytest.mark.parametrize("fails", [False, True])
def test_what_a_save_deletes_counts_no_longer_unless_it_fails(
    policy: dict[str, int], steps: dict[int, float], kept: list[int], best: int, fails: bool, tmp_path: Path, gate: Gate
) -> None:
    manager = saved(tmp_path, gate, steps, **policy)
    before = on_disk(tmp_path)
    assert (manager.steps, manager.latest, manager.best) == (kept, kept[-1], best)
    gate.error = fails
    gate.open()
    if fails:
        with pytest.raises(jaxadapt.FileError, match="the disk is full"):
            manager.wait()
    manager.wait()
    assert manager.steps == on_disk(tmp_path) == (before if fails else kept)
    assert manager.best == min((s for s in manager.steps if steps[s] == steps[s]), key=lambda s: steps[s])


def test_a_step_that_cannot_be_deleted_is_no_reason_to_ask_the_other_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the process that deletes steps has this error. The others would not join it in looking at the folder."""
    manager = jaxadapt.CheckpointManager(tmp_path, keep=1, minimize="loss")
    manager.save(1, small.host_adapter(), metrics={"loss": 2})
    manager.wait()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", Mock(side_effect=PermissionError(13, "no")))
        manager.save(2, small.host_adapter(), metrics={"loss": 1})
        with pytest.raises(jaxadapt.FileError, match="step-000000001.*cannot delete"):
            manager.wait()
    monkeypatch.setattr(manager, "_run_on_leader", Mock(side_effect=AssertionError))
    manager.save(3, small.host_adapter(), metrics={"loss": 3})
    manager.wait()
    assert (manager.steps, manager.best) == ([2, 3], 2)


def test_a_step_whose_write_failed_is_gone_before_the_error_is_raised(tmp_path: Path, gate: Gate) -> None:
    manager = saved(tmp_path, gate, LOSSES)
    gate.error = True
    gate.open()
    assert manager._saving.task is not None
    assert manager._saving.task.exception() is not None  # which waits
    assert (manager.steps, manager.latest, manager.best) == ([1, 2], 2, 2)
    with pytest.raises(jaxadapt.FileError, match=r"no step 3; found \[1, 2\]"):
        manager.metrics(3)
    with pytest.raises(jaxadapt.FileError, match="the disk is full"):
        manager.export(None, tmp_path / "out")
    gate.error = False
    manager.export(None, tmp_path / "out")  # of step 2
    manager.save(3, small.host_adapter(fill=30), metrics={"loss": 0.0})
    assert (manager.steps, manager.best) == ([1, 2, 3], 3)


@pytest.mark.parametrize("fails", [False, True])
def test_a_step_saved_again_has_its_new_metrics_unless_that_fails(fails: bool, tmp_path: Path, gate: Gate) -> None:
    manager = saved(tmp_path, gate, LOSSES)
    gate.open()
    manager.wait()
    gate.go.clear()
    manager.save(3, small.host_adapter(fill=9), metrics={"loss": 9.0})
    assert (manager.steps, manager.best, manager.metrics(3)) == ([1, 2, 3], 2, {"loss": 9.0})
    gate.error = fails
    gate.open()
    if fails:
        with pytest.raises(jaxadapt.FileError, match="full"):
            manager.wait()
    manager.wait()
    assert (manager.best, manager.metrics(3)) == ((3, {"loss": 1.0}) if fails else (2, {"loss": 9.0}))


def test_without_a_thread_and_after_a_rollback_the_disk_says(tmp_path: Path) -> None:
    manager = jaxadapt.CheckpointManager(tmp_path, keep=2, minimize="loss", asynchronous=False)
    for step, loss in LOSSES.items():
        manager.save(step, small.host_adapter(fill=step), metrics={"loss": loss})
        assert manager.steps == on_disk(tmp_path) == [*range(max(1, step - 1), step + 1)]
    manager.rollback(2)
    assert (manager.steps, manager.best) == ([2], 2)
    other = jaxadapt.CheckpointManager(tmp_path)
    for step in (3, 4, 5):
        other.save(step, small.host_adapter(fill=step))
    other.wait()
    assert manager.steps == [2, 3, 4, 5]  # its own policy hides nothing that is there


# ---------------------------------------------------------------- what a rollback deletes, and what a save has taken


def test_a_rollback_that_is_cut_short_leaves_the_first_steps(tmp_path: Path) -> None:
    with jaxadapt.CheckpointManager(tmp_path) as manager:
        for step in (0, 1, 3, 4):
            manager.save(step, small.host_adapter())
    (tmp_path / "step-000000002.safetensors").mkdir()  # which cannot be deleted as a file is
    with pytest.raises(jaxadapt.FileError, match="step-000000002"):
        manager.rollback(1)
    assert on_disk(tmp_path) == [0, 1, 2]  # no gap


def test_arrays_of_numpy_may_be_written_to_when_save_has_returned(tmp_path: Path, gate: Gate) -> None:
    manager, position = jaxadapt.CheckpointManager(tmp_path, progress=gate), np.arange(4)
    manager.save(1, small.host_adapter(), data={"position": position})
    position += 100
    gate.open()
    assert manager.restore(small.host_adapter()).data["position"].tolist() == [0, 1, 2, 3]


def test_what_the_checkpoint_holds_and_the_target_lacks_is_named(tmp_path: Path) -> None:
    manager = jaxadapt.CheckpointManager(tmp_path)
    manager.save(1, small.host_adapter(), opt_state={"mu": np.ones(2), "nu": np.ones(2), "count": 3})
    with pytest.raises(jaxadapt.MismatchError) as caught:
        manager.restore(small.host_adapter(), opt_state={"mu": np.zeros(2)})
    for name in ("opt_state/nu", "opt_state/count"):
        assert f"{name}: unexpected" in str(caught.value)
    assert "opt_state/mu" not in str(caught.value)


# ---------------------------------------------------------------- a model without its optimizer


PARTS: dict[str, Any] = {
    "opt_state": {"mu": np.ones(1000, "f4"), "key": jax.random.key(3), "fp8": np.ones(3, ml_dtypes.float8_e4m3b11fnuz)},
    "rng": jax.random.key(1),
    "data": {"position": np.arange(3), "seen": 7},
}


def test_a_model_is_restored_without_its_optimizer(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    manager = jaxadapt.CheckpointManager(tmp_path, progress=lambda *at: told.append(at))
    optimizer = optax.adam(1e-3).init(small.adapter().params)
    manager.save(1, small.trained(seed=3), opt_state=optimizer, rng=PARTS["rng"], data=PARTS["data"])
    manager.save(2, small.trained(seed=4), **PARTS, metrics={"loss": 2.0})
    model = small.trained(seed=5)
    for step, seed in ((1, 3), (2, 4)):
        with pytest.raises(jaxadapt.MismatchError, match="model_only=True") if step == 1 else contextlib.nullcontext():
            manager.restore(small.trained(seed=9), step)  # what is no plain tree needs an example
        told.clear()
        back = manager.restore(model, step, model_only=True)
        want = small.adapter(seed=seed).params
        assert same(jaxadapt.extract(model).params, want)
        assert (back.model, back.opt_state, back.rng, back.data) == (model, None, None, None)
        assert told[-1] == ("load", *[sum(x.nbytes for x in jax.tree.leaves(want))] * 2)  # nothing else is read
    assert back.metrics == {"loss": 2.0}
    # What else a model has is still checked, and still put back.
    with pytest.raises(jaxadapt.MismatchError, match="the adapter 'default' has another configuration"):
        manager.restore(small.trained(small.IA3), 1, model_only=True)
    scaled = small.trained(jaxadapt.extract(model).config.replace(lora_alpha=99))
    with pytest.raises(jaxadapt.MismatchError, match=r"the checkpoint's: lora_alpha \(99 attached, \d+ saved\)"):
        manager.restore(scaled, 1, model_only=True)


@pytest.mark.parametrize("part", PARTS)
def test_a_part_to_be_filled_with_the_model_only_is_a_contradiction(part: str, tmp_path: Path) -> None:
    manager = jaxadapt.CheckpointManager(tmp_path)
    manager.save(1, small.host_adapter(), **PARTS)
    with pytest.raises(jaxadapt.ConfigError, match=rf"model_only=True does not restore {part}=: remove"):
        manager.restore(small.host_adapter(), model_only=True, **{part: PARTS[part]})


def test_the_model_s_other_state_comes_back_alone_too(tmp_path: Path) -> None:
    variables = small.variables(seed=3) | {"batch_stats": {"bn": {"mean": np.arange(3.0)}}}
    with jaxadapt.CheckpointManager(tmp_path) as manager:
        manager.save(0, variables, **PARTS)
        empty = small.variables(seed=5) | {"batch_stats": {"bn": {"mean": np.zeros(3)}}}
        back = manager.restore(empty, model_only=True).model
    assert back["batch_stats"]["bn"]["mean"].tolist() == [0, 1, 2]
    assert same(jaxadapt.extract(back).params, small.adapter(seed=3).params)


# ---------------------------------------------------------------- which step a run calls the best


@pytest.mark.parametrize("mode", ["minimize", "maximize"])
def test_a_run_knows_later_which_step_is_its_best(mode: str, tmp_path: Path) -> None:
    with jaxadapt.CheckpointManager(tmp_path, **{mode: "loss"}) as manager:
        for step, loss in LOSSES.items():
            manager.save(step, small.host_adapter(), metrics={"loss": loss, "seen": -loss})
    again, best = jaxadapt.CheckpointManager(tmp_path), {"minimize": 3, "maximize": 1}[mode]
    assert (again.objective, again.best) == ({mode: "loss"}, best)
    again.save(4, small.host_adapter(), metrics={"loss": 2.5})  # of a manager that says nothing of it
    assert (again.objective, again.best) == ({mode: "loss"}, best)
    again.wait()
    assert (again.objective, again.best) == ({mode: "loss"}, best)
    other = jaxadapt.CheckpointManager(tmp_path, **{mode: "seen"})  # what is given counts
    assert (other.objective, other.best) == ({mode: "seen"}, {"minimize": 1, "maximize": 3}[mode])


def test_a_run_that_never_said_it_has_no_best(tmp_path: Path) -> None:
    with jaxadapt.CheckpointManager(tmp_path) as manager:
        manager.save(1, small.host_adapter(), metrics={"loss": 1.0})
        assert manager.objective == {}
        with pytest.raises(jaxadapt.ConfigError, match=r"minimize= \(--minimize\) or maximize="):
            _ = manager.best


@pytest.mark.parametrize("objective", ['"loss"', "[]", '{"minimum": "loss"}', '{"minimize": "a", "maximize": "b"}'])
def test_a_damaged_objective_names_the_file(objective: str, tmp_path: Path) -> None:
    with jaxadapt.CheckpointManager(tmp_path, minimize="loss") as manager:
        manager.save(1, small.host_adapter())
    (file,) = tmp_path.iterdir()
    with safe_open(file, "numpy") as held:
        metadata = held.metadata()
    metadata[small.STEP] = metadata[small.STEP].replace('{"minimize": "loss"}', objective)
    save_file(load_file(file), file, metadata)
    with pytest.raises(jaxadapt.FormatError, match="step-000000001.*damaged"):
        _ = jaxadapt.CheckpointManager(tmp_path).best


def test_the_parents_of_a_new_run_folder_are_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it a crash could lose the folder with all its steps."""
    flushed: list[str] = []
    fsync = os.fsync

    def spy(fd: int) -> None:
        flushed.append(str(Path(f"/proc/self/fd/{fd}").readlink()))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", spy)
    with jaxadapt.CheckpointManager(tmp_path / "new" / "run") as manager:
        manager.save(1, small.adapter())
    assert {str(tmp_path), str(tmp_path / "new")} <= set(flushed)
