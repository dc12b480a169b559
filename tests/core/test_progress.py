"""The argument `progress=` of every function that moves bytes, and the logger."""

from __future__ import annotations

import ast
import io
import logging
import shutil
import sys

import jax
import numpy as np
import pytest
from flax import nnx

import jaxadapt
from jaxadapt.core import errors
from jaxadapt.core.errors import LOGGER, escape_text
from jaxadapt.export import adapter_files, merge_files
from jaxadapt.export.conversion import convert
from jaxadapt.models import LoraTree
from tests.support import small
from tests.support.small import WEIGHTS

ADAPTER = 2 * 2 * (6 + 8) * 4  # bytes: two modules of rank 2, 6 × 8, in float32
KERNELS = 2 * 6 * 8 * 4
BASE = KERNELS + (6 + 8) * 4
TABLE = jaxadapt.KeyMap(
    "small",
    tuple(
        jaxadapt.Weight(f"{m}.{leaf}", f"{m}.{key}", axes)
        for m in ("q_proj", "up_proj")
        for leaf, key, axes in (("kernel", "weight", "i o -> o i"), ("bias", "bias", "o -> o"))
    ),
)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a small jaxadapt adapter, a small Orbax adapter and a small base model."""
    monkeypatch.chdir(tmp_path)
    jaxadapt.save(small.adapter(), "peft")
    jaxadapt.save(small.adapter(), "orbax", format="orbax")
    jaxadapt.export.export_base(small.net(), "base", keymap=TABLE)
    with jaxadapt.CheckpointManager("run") as manager:
        manager.save(1, small.adapter())
    return tmp_path


def qwix():
    base = small.base()["params"]
    return {m: {**base[m], "kernel_lora_a": np.ones((*base[m]["kernel"].shape[:1], 2), "f4"),
                "kernel_lora_b": np.ones((2, *base[m]["kernel"].shape[1:]), "f4")} for m in base}  # fmt: skip


def merged(progress):
    return jaxadapt.merge(small.net(), small.adapter(), progress=progress)


def managed(progress):
    manager = jaxadapt.CheckpointManager("new", progress=progress)
    manager.save(1, small.adapter())
    manager.wait()


def restored(progress):
    return jaxadapt.CheckpointManager("run", progress=progress).restore(small.adapter(seed=1))


# What is called, under which name it tells, and how many bytes there are.
WORK = {
    "save, NNX": (lambda p: jaxadapt.save(small.trained(), "new", progress=p), "save", ADAPTER),
    "save, Linen": (lambda p: jaxadapt.save(small.variables(), "new", progress=p), "save", ADAPTER),
    "save, dtype": (lambda p: jaxadapt.save(small.adapter(), "new", dtype="float16", progress=p), "save", ADAPTER // 2),
    "save, Orbax": (lambda p: jaxadapt.save(small.adapter(), "new", format="orbax", progress=p), "save", ADAPTER),
    "save, Qwix": (lambda p: jaxadapt.save(LoraTree(qwix(), lora_alpha=2), "new", progress=p), "save", ADAPTER),
    "write": (lambda p: jaxadapt.write(jaxadapt.read("peft"), "new", progress=p), "save", ADAPTER),
    "read": (lambda p: jaxadapt.read("peft", progress=p), "read", ADAPTER),
    "read, Orbax": (lambda p: jaxadapt.read("orbax", progress=p), "read", ADAPTER),
    "load, NNX": (lambda p: jaxadapt.load("peft", small.net(), progress=p), "load", ADAPTER),
    "load, Linen": (lambda p: jaxadapt.load("peft", small.base(), progress=p), "load", ADAPTER),
    "load, dtype": (lambda p: jaxadapt.load("peft", small.net(), dtype="bfloat16", progress=p), "load", ADAPTER // 2),
    "load, Orbax": (lambda p: jaxadapt.load("orbax", small.net(), progress=p), "load", ADAPTER),
    "load, Qwix": (lambda p: jaxadapt.load("peft", LoraTree(qwix(), lora_alpha=6), progress=p), "load", ADAPTER),
    "merge": (merged, "merge", KERNELS),
    "unmerge": (lambda p: jaxadapt.unmerge(small.base()["params"], small.adapter(), progress=p), "unmerge", KERNELS),
    "export": (lambda p: jaxadapt.export.export_base(small.net(), "new", keymap=TABLE, progress=p), "export", BASE),
    "export, merged": (
        lambda p: jaxadapt.export.export_base(small.net(), "new", small.adapter(), keymap=TABLE, progress=p),
        "export", BASE,
    ),
    "import": (lambda p: jaxadapt.export.import_base("base", small.net(3), keymap=TABLE, progress=p), "import", BASE),
    "merge of files": (lambda p: merge_files.merge_folder("base", "peft", "new", progress=p), "merge", BASE),
    "combine of files": (
        lambda p: adapter_files.combine_folders(["peft", "peft"], [1, 1], "new", progress=p), "save", ADAPTER
    ),
    "convert": (lambda p: convert("peft", "new", progress=p), "save", ADAPTER),
    "manager, save": (managed, "save", ADAPTER),
    "manager, restore": (restored, "load", ADAPTER),
    "manager, export": (
        lambda p: jaxadapt.CheckpointManager("run", progress=p).export(1, "new"), "save", ADAPTER,
    ),
}  # fmt: skip


@pytest.mark.parametrize("work", WORK)
def test_a_function_is_told_of_every_byte(work, here):
    call, name, total = WORK[work]
    told: list[tuple[str, int, int]] = []
    call(lambda *at: told.append(at))
    mine = [at for at in told if at[0] == name]
    assert {at[2] for at in mine} == {total}
    done = [at[1] for at in mine]
    assert done == sorted(done)
    assert done[-1] == total
    assert "Orbax" in work or done[0] == 0
    assert "Orbax" in work or "read" in work or len(set(done)) > 1


@pytest.fixture
def show_short(monkeypatch):
    """Have a bar for the shortest work too, from the call on."""
    return lambda: monkeypatch.setattr(errors, "SHORT", 0)


@pytest.mark.parametrize("work", WORK)
def test_true_draws_nothing_where_nobody_sees_it(work, here, capfd, monkeypatch, show_short):
    monkeypatch.setenv("FORCE_COLOR", "1")  # colors are asked for, as in many a CI; that makes no terminal of a log
    show_short()
    WORK[work][0](True)
    assert capfd.readouterr() == ("", "")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    "work", ["save, NNX", "load, NNX", "merge", "export", "import", "merge of files", "manager, save"]
)
def test_true_draws_bars_on_a_terminal(work, here, monkeypatch, show_short):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "90")
    monkeypatch.delenv("NO_COLOR", raising=False)
    call, name, total = WORK[work]
    call(True)
    assert screen.getvalue() == ""  # it is over before it is seen
    shutil.rmtree("new", ignore_errors=True)
    show_short()
    call(True)
    text = screen.getvalue()
    assert f"{name} " in text
    assert "━" in text
    assert f"{total} bytes" in text.replace(f"{total}/{total}", str(total))


class Enough(Exception):
    pass


@pytest.mark.parametrize("work", WORK)
def test_an_exception_of_the_function_ends_the_work_with_nothing_half_done(work, here):
    def stop(what, done, total):
        if done:
            raise Enough

    before = small.files(here)
    with pytest.raises(Enough):
        WORK[work][0](stop)
    if work == "save, Orbax":  # which is told of when it is there
        assert jaxadapt.inspect("new").parameters == ADAPTER // 4
    else:
        assert small.files(here) == before


def test_a_model_is_untouched_where_the_function_stops_it(here):
    def stop(what, done, total):
        if done:
            raise Enough

    for call in (
        lambda model: jaxadapt.load("peft", model, progress=stop),
        lambda model: jaxadapt.merge(model, small.adapter(), in_place=True, progress=stop),
        lambda model: jaxadapt.export.import_base("base", model, keymap=TABLE, progress=stop),
    ):
        model = small.net(3)
        structure, values = nnx.split(model)
        with pytest.raises(Enough):
            call(model)
        assert nnx.split(model)[0] == structure
        assert small.same(nnx.state(model), values)


def test_progress_changes_no_value(here):
    for way in (None, False, True, lambda *_: None):
        assert small.same(nnx.state(merged(way)), nnx.state(merged(None)))
        jaxadapt.save(small.adapter(), "new", progress=way)
        assert (here / "new" / WEIGHTS).read_bytes() == (here / "peft" / WEIGHTS).read_bytes()


def test_merge_under_jit_tells_while_it_is_traced(here):
    told: list[tuple[str, int, int]] = []
    base, adapter = small.base()["params"], small.adapter()
    found = jax.jit(lambda b, a: jaxadapt.merge(b, a, progress=lambda *at: told.append(at)))(base, adapter)
    assert told[-1] == ("merge", KERNELS, KERNELS)
    want = jaxadapt.merge(base, adapter)
    for path in ("q_proj", "up_proj"):  # XLA may fuse the product with the sum
        np.testing.assert_allclose(found[path]["kernel"], want[path]["kernel"], rtol=1e-6)


# ---- the logger --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("work", "says"),
    [
        ("save, NNX", "new: 4 tensors written, "),
        ("save, Orbax", "new: an Orbax checkpoint of 4 arrays written"),
        ("load, NNX", "peft: fits 2 weights, by the keymap "),
        ("export", "new: 4 tensors, "),
        ("import", "base/model.safetensors: 4 weights read with the keymap small"),
        ("merge of files", "new: 2 of 4 tensors changed"),
        ("manager, save", "step-000000001.safetensors: step 1 saved, 4 arrays"),
        ("manager, restore", "step-000000001.safetensors: step 1 restored, 4 arrays"),
    ],
)
def test_the_logger_says_what_was_done(work, says, here, caplog):
    with caplog.at_level(logging.INFO, logger="jaxadapt"):
        WORK[work][0](None)
    assert {record.name for record in caplog.records if record.name.startswith("jaxadapt")} == {"jaxadapt"}
    said = [record.getMessage().removeprefix(f"{here}/new/").removeprefix(f"{here}/run/") for record in caplog.records]
    assert any(text.startswith(says) for text in said), caplog.text


def test_the_logger_is_the_only_one_and_leaves_the_program_its_handlers(root):
    assert logging.getLogger("jaxadapt") is LOGGER
    assert LOGGER.handlers == []
    made = [
        path.relative_to(root).as_posix()
        for path in sorted((root / "jaxadapt").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "getLogger"
    ]
    assert set(made) <= {"jaxadapt/core/errors.py", "jaxadapt/cli/__init__.py"}  # the second turns its level


def test_bars_that_never_began_leave_no_line(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "dumb")  # rich draws nothing on it
    with errors.reporter(True) as report:
        report("read", 3, 12)
    assert screen.getvalue() == ""


def test_usual_text_is_as_it_was():
    text = "Gewicht ü × 重み — “q” ⌘ é"
    assert escape_text(text) == text
    assert escape_text("a\nb", keep="\n") == "a\nb"
    assert escape_text("\ud800") == "\\ud800"
