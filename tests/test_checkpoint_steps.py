"""Which steps a CheckpointManager has while a save is under way, when it fails, and after a rollback."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest

import jaxadapt
from jaxadapt import step_files
from tests import small

LOSSES = {1: 3.0, 2: 2.0, 3: 1.0}


class Gate:
    """What holds every write back until it opens, and makes it fail where `error` is set."""

    def __init__(self) -> None:
        self.go, self.error = threading.Event(), False

    def open(self) -> None:
        self.go.set()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made, write = Gate(), step_files.write

    def held(*args: Any) -> None:
        assert made.go.wait(60)
        if made.error:
            raise jaxadapt.FileError("the disk is full")
        write(*args)

    monkeypatch.setattr(step_files, "write", held)
    yield made
    made.open()


def on_disk(folder: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step-")) for path in folder.glob("step-*"))


def saved(folder: Path, gate: Gate, steps: dict[int, float], **options: Any) -> jaxadapt.CheckpointManager:
    """A manager whose last save is still under way."""
    manager = jaxadapt.CheckpointManager(folder, minimize="loss", **options)
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
    manager = jaxadapt.CheckpointManager(tmp_path / "ours", minimize="loss")
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
        ({"keep": 2}, {1: 1.0, 2: 2.0, 3: 3.0}, [2, 3], 2),
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


def test_a_step_whose_write_failed_is_gone_before_the_error_is_raised(tmp_path: Path, gate: Gate) -> None:
    manager = saved(tmp_path, gate, LOSSES)
    gate.error = True
    gate.open()
    assert manager._saving.thread is not None
    manager._saving.thread.join()
    assert (manager.steps, manager.latest, manager.best) == ([1, 2], 2, 2)
    with pytest.raises(jaxadapt.FileError, match=r"no step 3; found \[1, 2\]"):
        manager.metrics(3)
    with pytest.raises(jaxadapt.FileError, match="the disk is full"):
        manager.export(None, tmp_path / "out")
    manager.export(None, tmp_path / "out")  # of step 2
    gate.error = False
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
    manager, position = jaxadapt.CheckpointManager(tmp_path), np.arange(4)
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
        assert f"{name}: in the checkpoint, not in the target" in str(caught.value)
    assert "opt_state/mu" not in str(caught.value)
