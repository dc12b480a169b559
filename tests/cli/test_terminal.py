"""What somebody else wrote reaches a terminal as text: it obeys none of it, and rich takes none of it for markup."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import pty
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

import jaxadapt
from jaxadapt.cli import main, output
from tests.support import small
from tests.support.small import CONFIG, WEIGHTS

# Moves the cursor, sets the title, clears (8 bits), shows backwards, joins nothing, ends a line in three ways.
EVIL = "\x1b[31mred\x1b[0m\x1b]0;owned\x07\x9b2J\u202eexe\u2066\u200b\u200f\u061c\ufeff\u00ad\r\u2028\x85\x7f"
EVIL += "[bold]b[/bold]"
SAFE = "\\x1b[31mred"


def is_safe(text: str) -> None:
    assert all(c.isprintable() or c == "\n" for c in text), ascii(text)


def run(*args: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(main, [str(a) for a in args], catch_exceptions=False)
    is_safe(done.stdout)
    is_safe(done.stderr)
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture
def evil(tmp_path) -> Path:
    """An adapter that has such names wherever a file can."""
    here = tmp_path / "out"
    here.mkdir()
    held = {
        "peft_type": "LORA", "r": 2, "target_modules": [f"q{EVIL}"], "base_model_name_or_path": f"org/{EVIL}",
        "modules_to_save": [f"head{EVIL.replace('[', '')}"], "rank_pattern": {}, "peft_version": EVIL, EVIL: EVIL,
        "revision": EVIL, "task_type": "CAUSAL_LM",
    }  # fmt: skip
    (here / CONFIG).write_text(json.dumps(held))
    name = f"base_model.model.layers.0.q{EVIL}"
    tensors = {f"{name}.lora_A.weight": np.ones((2, 4), "f4"), f"{name}.lora_B.weight": np.ones((6, 2), "f4")}
    save_file(tensors, here / WEIGHTS)
    return here


@pytest.mark.parametrize("options", [["--tensors"], ["--norms"], ["--json"], ["--json", "--tensors"]])
def test_inspect(evil, options):
    code, out, _ = run("inspect", evil, *options)
    assert code == 0
    assert "owned" in out
    if "--json" in options:
        assert json.loads(out)["config"]["peft_version"] == EVIL  # what it means is as it was
    else:
        assert "[bold]b[/bold]" in out.replace("\n", "").replace(" ", "")


@pytest.mark.parametrize("value", [{"r": EVIL}, {"peft_type": EVIL}, {"target_modules": "(" + EVIL}, {"bias": EVIL}])
def test_errors_of_a_configuration(evil, value):
    held = json.loads((evil / CONFIG).read_text()) | value
    (evil / CONFIG).write_text(json.dumps(held))
    code, _, err = run("inspect", evil)
    assert code == 1
    assert "Error" in err


def test_errors_of_files(tmp_path):
    folder = tmp_path / f"a{EVIL.replace('/', '')}"
    folder.mkdir()
    (folder / f"b{EVIL.replace('/', '')}").touch()
    code, _, err = run("inspect", folder)
    assert code == 1
    assert SAFE in err
    (tmp_path / "shapes.json").write_text(json.dumps({f"x{EVIL}": [2, 3], "embed": {"embedding": [4, 2]}}))
    assert run("check-keymap", "llama", "--model", tmp_path / "shapes.json")[0] == 1
    assert run("check-keymap", "llama", "--model", tmp_path / "shapes.json", "--json")[0] in (0, 1)


def test_merge_and_combine(evil, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    save_file({f"layers.0.w{EVIL}.weight": np.ones((6, 4), "f4")}, base / "model.safetensors")
    (base / "config.json").write_text("{}")
    code, _, err = run("merge", base, evil, "--out", tmp_path / "merged")
    assert code == 1
    assert SAFE in err
    other = tmp_path / "other"
    shutil.copytree(evil, other)
    run("combine", evil, other, "--weights", "1,1", "--out", tmp_path / "both")


def test_metrics_of_a_run(tmp_path):
    """Their names are the heads of a table, in which rich would take them for markup."""
    with jaxadapt.CheckpointManager(tmp_path) as manager:
        manager.save(3, small.host_adapter(), metrics={EVIL: 1.5})
    code, out, _ = run("checkpoints", tmp_path)
    assert code == 0
    assert "[bold]b[/bold]" in out


@pytest.mark.filterwarnings("default")
def test_warnings_and_logs(evil, monkeypatch):

    def read(*args: object) -> None:
        warnings.warn(EVIL, stacklevel=1)
        logging.getLogger("huggingface_hub").warning("the server says %s", EVIL)
        raise jaxadapt.FileError(EVIL)

    monkeypatch.setattr(os, "preadv", read)
    said: list[str] = []
    heard = logging.Handler()
    heard.emit = lambda record: said.append(heard.format(record))
    logger = logging.getLogger("huggingface_hub")
    logger.addHandler(heard)
    try:
        code, _, err = run("inspect", evil)
    finally:
        logger.removeHandler(heard)
    assert code == 1
    assert err.count(SAFE) >= 2
    assert SAFE in said[0]
    is_safe(said[0])


def test_titles_lists_and_heat(capsys):
    output.print_list(EVIL, [EVIL], 8)
    output.print_words(EVIL, [EVIL])
    output.print_heat(EVIL, [EVIL], [EVIL], [[1.0]])
    output.print_table((EVIL,), [(EVIL,)], numbers=(EVIL,))
    output.print_pairs([(EVIL, EVIL)])
    output.print_lines(EVIL)
    out = capsys.readouterr().out
    is_safe(out)
    assert out.count("[bold]b[/bold]") >= 7


def test_a_summary_shows_names_as_they_are():
    summary = jaxadapt.summary(small.trained())
    row = dataclasses.replace(summary.rows[0], adapter=f"a{EVIL}")
    text = str(dataclasses.replace(summary, rows=(row,)))
    assert "[bold]b[/bold]" in text.replace("\n", "").replace(" ", "")
    is_safe(text)


def test_on_a_terminal(evil):
    """A real one, on which rich may draw: all that it gets are rich's and click's own colors."""
    parent, child = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "200"}
    with subprocess.Popen(
        [sys.executable, "-m", "jaxadapt", "inspect", str(evil), "--tensors"], stdout=child, stderr=child, env=env
    ):
        os.close(child)
        text = b""
        try:
            while part := os.read(parent, 65536):
                text += part
        except OSError:  # the other end is closed
            pass
    os.close(parent)
    assert b"owned" in text
    for evil_part in (b"\x1b[31m", b"\x1b]0;", "\u202e".encode(), "\x9b".encode(), b"\x07"):
        assert evil_part not in text
