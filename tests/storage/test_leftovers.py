"""What a killed writer left, its temporary files and empty folders, is removed by the next run, also a refused one."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

import jaxadapt
from jaxadapt.cli import main
from jaxadapt.export import conversion, merge_files
from jaxadapt.storage import atomic

MODULE = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def here(tmp_path: Path) -> Path:
    pair = {"lora_A": np.ones((2, 4), "f4"), "lora_B": np.ones((4, 2), "f4")}
    tensors = {f"base_model.model.{MODULE}.{name}.weight": x for name, x in pair.items()}
    jaxadapt.write(jaxadapt.PeftTensors(jaxadapt.LoraConfig(r=2, target_modules=["q_proj"]), tensors), tmp_path / "in")
    (tmp_path / "base").mkdir()
    save_file({f"{MODULE}.weight": np.ones((4, 4), "f4")}, tmp_path / "base" / "model.safetensors")
    return tmp_path


def left(folder: Path, name: str, is_folder: bool = False) -> None:
    """Leave what a writer of this name leaves that is killed."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(ZeroDivisionError), atomic.open_replacement(folder / name) as writer:
        raise ZeroDivisionError
    # Without a lock: the kernel unlocks the files of a process that ends.
    (writer.temporary / "inside").mkdir(parents=True) if is_folder else writer.temporary.touch()


RUNS = {
    "merge": (["merge", "base", "{}", "--out", "new/out"], ["new/out", "model-00001-of-00002.safetensors"]),
    "mlx": (["export", "{}", "--for", "mlx", "--out", "new/out"], ["new/out", "adapters.safetensors"]),
    "orbax": (["convert", "{}", "new/out", "--format", "orbax"], ["new", "out"]),
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("adapter", ["in", "nowhere"])
def test_the_next_run_removes_what_a_killed_run_left(adapter, run, here, monkeypatch):
    monkeypatch.chdir(here)
    command, (folder, name) = RUNS[run]
    left(here / folder, name, is_folder=run == "orbax")
    done = CliRunner().invoke(main, [each.format(adapter) for each in command])
    assert done.exit_code == (adapter == "nowhere"), done.output
    assert not list(here.rglob(".*")), list(here.rglob("*"))
    assert (here / folder).exists() == (adapter == "in")


@pytest.mark.parametrize("run", RUNS)
def test_a_refused_run_removes_the_empty_folder_of_a_killed_run_and_nothing_else(run, here, monkeypatch):
    monkeypatch.chdir(here)
    command, _ = RUNS[run]
    for content in ([], ["notes.txt"]):
        (here / "new/out").mkdir(parents=True, exist_ok=True)
        for each in content:
            (here / "new/out" / each).touch()
        assert CliRunner().invoke(main, [each.format("nowhere") for each in command]).exit_code == 1
        assert (here / "new/out").exists() == bool(content)
        assert (here / "new").exists()


def test_a_run_that_is_refused_at_once_removes_what_a_killed_run_left(here, monkeypatch):
    """By a check of its arguments, before it opens any file of the adapter or the base."""
    monkeypatch.chdir(here)
    model, tree = {"q": {"kernel": np.ones((4, 4), "f4")}}, conversion.TreeOptions(sizes={"q": 4})
    calls: dict[str, tuple[str, type[jaxadapt.AdapterError], Callable[[Path], object]]] = {
        "merge": ("out", jaxadapt.FileError, lambda out: merge_files.merge_folder("nowhere", "in", out)),
        "merge gguf": ("out.gguf", jaxadapt.FileError, lambda out: merge_files.merge_gguf("nowhere.gguf", "in", out)),
        "program": ("out", jaxadapt.ConfigError, lambda out: jaxadapt.export.export_adapter("in", out, "other")),
        "gguf": ("out.gguf", jaxadapt.ConfigError, lambda out: jaxadapt.export.export_adapter("in", out, "gguf")),
        "base": ("out", jaxadapt.KeyMapError, lambda out: jaxadapt.export.export_base(model, out, keymap="llama")),
        "format": ("out", jaxadapt.FileError, lambda out: conversion.convert_format("in", out, format="other")),
        "tree": ("out", jaxadapt.ConfigError, lambda out: conversion.convert("in", out, tree)),
        "dtype": ("out.safetensors", jaxadapt.ConfigError, lambda out: conversion.convert("in", out, dtype="float16")),
    }
    for name, (out, kind, call) in calls.items():
        left(here / "new", out)
        if out == "out":
            left(here / "new/out", "model.safetensors")
        with pytest.raises(kind):
            call(Path("new", out))
        assert not (here / "new").exists(), name


def test_a_run_in_progress_keeps_its_files(here):
    with atomic.open_replacement(here / "base" / "model.safetensors") as writer:
        with pytest.raises(ZeroDivisionError), atomic.clean_target(here / "base"):
            raise ZeroDivisionError
        assert writer.temporary.exists()


def test_an_export_that_fails_leaves_no_folder(here, monkeypatch):
    """As on a full disk."""

    def fail(fd: int, _: memoryview, offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", fail)
    for call in (
        lambda: jaxadapt.export.export_adapter(here / "in", here / "new/out", "mlx"),
        lambda: jaxadapt.export.export_base({"q": {"kernel": np.ones((4, 4), "f4")}}, here / "new/out", keymap=TABLE),
    ):
        with pytest.raises(jaxadapt.FileError, match="No space left"):
            call()
        assert not (here / "new").exists()


TABLE = jaxadapt.KeyMap("mine", (jaxadapt.Weight("q.kernel", "q.weight", "i o -> o i"),))
