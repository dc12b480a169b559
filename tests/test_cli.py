"""The command line, as a person types it."""

from __future__ import annotations

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from click.testing import CliRunner

import jaxadapt
from jaxadapt.cli import COMMANDS, main
from tests import small


@pytest.fixture
def folder(tmp_path):
    spec = jax.ShapeDtypeStruct((8, 6), "float32")
    base = {"model": {"layers": {"0": {"self_attn": {"q_proj": {"kernel": spec}, "v_proj": {"kernel": spec}}}}}}
    config = jaxadapt.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], use_rslora=True)
    adapter = jaxadapt.init(config, base, key=jax.random.key(0), keymap="llama")
    jaxadapt.save(adapter, tmp_path / "out", base_model="org/tiny")
    return tmp_path / "out"


def run(*args):
    return CliRunner().invoke(main, [str(a) for a in args])


def test_inspect_says_what_matters_and_only_that(folder):
    result = run("inspect", folder)
    assert result.exit_code == 0, result.output
    for text in ("LORA", "org/tiny", "q_proj, v_proj", "use_rslora", "56 parameters in 4 tensors, F32"):
        assert text in result.output
    assert "lora_dropout" not in result.output  # it is what every new configuration says
    assert "lora_A.weight" not in result.output


def test_inspect_lists_tensors(folder):
    output = run("inspect", folder, "--tensors").output
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in output.replace("\n", "")


def test_inspect_json_is_complete(folder):
    data = json.loads(run("inspect", folder, "--json").output)
    assert data["parameters"] == 56
    assert data["config"]["r"] == 2
    assert data["tensors"]["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]["shape"] == [6, 2]


@pytest.mark.parametrize("what", ["missing", "file", "empty"])
def test_errors_are_one_readable_message(tmp_path, what):
    path = tmp_path / "x"
    if what == "file":
        path.write_text("no")
    elif what == "empty":
        path.mkdir()
    result = run("inspect", path)
    assert result.exit_code == 1
    assert "FileError" in result.output
    assert str(path) in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_with_an_example(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"jaxadapt {command}" in result.output.split("Example:")[1]
    assert command in ("completion", "demo") or "--json" in result.output


def test_the_help_page_lists_every_command():
    result = run("--help")
    assert result.exit_code == 0
    listed = [line.split()[0] for line in result.output.split("Commands:")[1].splitlines() if line.strip()]
    assert listed == list(COMMANDS)


def test_exit_statuses(folder, monkeypatch):
    assert run("inspect", folder).exit_code == 0
    assert run("inspect", folder / "no").exit_code == 1
    assert run("inspect", folder, "--no-such-option").exit_code == 2
    assert run("inspekt").exit_code == 2

    def stopped(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxadapt.folder.inspect", stopped)
    assert run("inspect", folder).exit_code == 130


@pytest.mark.parametrize("width", [40, 80, 200])
def test_tables_fit_the_terminal(folder, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    for command in (("inspect", folder, "--tensors"), ("families",), ("families", "llama")):
        result = run(*command)
        assert result.exit_code == 0
        assert max(map(len, result.output.splitlines())) <= width


def test_families():
    assert "llama" in run("families").output
    listed = json.loads(run("families", "--json").output)
    assert ("gpt2", True) in [(entry["name"], entry["proved"]) for entry in listed]
    lines = json.loads(run("families", "llama/scan0", "--json").output)
    assert any(line["pattern"].startswith("{l}") for line in lines)
    assert run("families", "lama").exit_code == 1


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell):
    assert "_JAXADAPT_COMPLETE" in run("completion", shell).output


def test_completion_knows_the_commands(monkeypatch):
    monkeypatch.setenv("_JAXADAPT_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "jaxadapt in")
    monkeypatch.setenv("COMP_CWORD", "1")
    result = CliRunner().invoke(main, [], prog_name="jaxadapt")
    assert "inspect" in result.output


def test_inspect_as_a_process_loads_neither_jax_nor_numpy(folder):
    code = (
        "import sys; from jaxadapt.cli import main\n"
        "try: main(['inspect', sys.argv[1]])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'jax', 'numpy', 'flax'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "LORA" in done.stdout


@pytest.fixture
def run_folder(tmp_path):
    with jaxadapt.CheckpointManager(tmp_path / "run") as manager:
        for step, loss in enumerate((0.5, 0.3, 0.4)):
            manager.save(step, small.adapter(seed=step), metrics={"loss": loss, "seen": 10**step})
    return tmp_path / "run"


def test_checkpoints_are_listed(run_folder):
    rows = run("checkpoints", run_folder, "--minimize", "loss").output.splitlines()
    assert rows[0].split() == ["step", "loss", "seen"]
    assert [row.split() for row in rows[1:]] == [
        ["0", "0.5", "1"], ["1", "0.3", "10", "best"], ["2", "0.4", "100", "latest"]
    ]  # fmt: skip
    listed = json.loads(run("checkpoints", run_folder, "--maximize", "seen", "--json").output)
    assert [(s["step"], s["best"]) for s in listed["steps"]] == [(0, False), (1, False), (2, True)]
    empty = run("checkpoints", run_folder / "no")
    assert empty.exit_code == 1
    assert "there is no checkpoint" in empty.output


@pytest.mark.parametrize(("step", "which"), [("best", 1), ("0", 0), ("latest", 2), (None, 2)])
def test_a_checkpoint_is_exported(run_folder, tmp_path, step, which):
    chosen = () if step is None else ("--step", step)
    result = run("checkpoints", run_folder, "--minimize", "loss", "--export", tmp_path / "out", *chosen, "--json")
    assert json.loads(result.output) == {"step": which, "folder": str(tmp_path / "out")}
    want, got = jaxadapt.to_peft(small.adapter(seed=which)).tensors, jaxadapt.read(tmp_path / "out").tensors
    assert {k: np.asarray(v).tobytes() for k, v in want.items()} == {k: v.tobytes() for k, v in got.items()}


@pytest.mark.parametrize(
    "args", [("--step", "best", "--export", "x"), ("--step", "1"), ("--step", "one", "--export", "x")]
)
def test_checkpoints_used_wrongly(run_folder, args):
    assert run("checkpoints", run_folder, *args).exit_code == 2
