"""The command line, as a person types it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import jax
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import jaxadapt
from jaxadapt.cli import COMMANDS, main
from jaxadapt.merging.combination import OPERATORS
from jaxadapt.persistence import consumers
from tests.support import small


@pytest.fixture
def folder(tmp_path):
    spec = jax.ShapeDtypeStruct((8, 6), "float32")
    base = {"model": {"layers": {"0": {"self_attn": {"q_proj": {"kernel": spec}, "v_proj": {"kernel": spec}}}}}}
    config = jaxadapt.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], use_rslora=True)
    adapter = jaxadapt.init(base, config, key=jax.random.key(0), keymap="llama")
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


def test_a_name_of_the_hub_without_its_scheme_is_recognized(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "for the Hub's repository give hf://org/name@v1/fr" in run("inspect", "org/name@v1/fr").output
    with pytest.raises(jaxadapt.FileError, match="for the Hub's repository give hf://org/name$"):
        jaxadapt.load("org/name", small.net())
    assert "hf://" not in run("inspect", tmp_path / "out").output
    assert "hf://" not in run("inspect", "out").output


def test_a_warning_is_said_without_the_line_it_comes_from(folder):
    held = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**held, "lora_alpha": 8}))  # a person's edit
    code = "from jaxadapt.cli import main; main()"
    env = {**os.environ, "PYTHONPATH": str(Path(jaxadapt.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code, "inspect", str(folder)], env=env, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr.startswith(f"Warning: {folder}")
    assert "UserWarning" not in done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_with_an_example(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"jaxadapt {command}" in result.output.split("Example:")[1]
    assert "--json" in result.output
    for option in main.get_command(click.Context(main), command).params:
        assert isinstance(option, click.Argument) or option.help


def examples():
    """Every line of an example in a help page, as its own words; what the shell does with the output is left out."""
    for name in (None, *COMMANDS):
        command = main if name is None else main.get_command(click.Context(main), name)
        page = command.get_help(click.Context(command, info_name="jaxadapt", max_content_width=200))
        for line in page.split("Example:\n")[1].split("\n\n")[0].splitlines():
            for part in re.findall(r"jaxadapt [^|>()&]+", line):
                yield shlex.split(re.sub(r"   .*", "", part))[1:]


@pytest.mark.parametrize("words", examples(), ids=" ".join)
def test_every_example_of_the_help_pages_is_a_command(words):
    name, *rest = words
    with main.get_command(click.Context(main), name).make_context(name, list(rest)) as made:
        assert made.params["as_json"] is ("--json" in rest)


def test_the_help_page_lists_every_command():
    result = run("--help")
    assert result.exit_code == 0
    groups = result.output.split("Look at an adapter:")[1].splitlines()
    lines = [line for line in groups if line.startswith("  ")]
    assert [line.split()[0] for line in lines] == list(COMMANDS)
    assert all(line.endswith(".") and not line.endswith("...") for line in lines)  # what each does, in full


def test_a_command_misspelt_is_guessed():
    assert "Did you mean 'inspect'?" in run("inspekt").output
    assert "No such command 'x'" in run("x").output


def test_no_color_is_heard(folder):
    for words in (("inspect", folder, "--norms"), ("inspect", folder / "no")):
        said = [CliRunner(env=env).invoke(main, [str(w) for w in words], color=True) for env in ({}, {"NO_COLOR": "1"})]
        assert ("\x1b" in said[0].output) is (words[1] != folder)  # rich asks for a terminal, and click was told of one
        assert "\x1b" not in said[1].output


def test_exit_statuses(folder, monkeypatch):
    assert run("inspect", folder).exit_code == 0
    assert run("inspect", folder / "no").exit_code == 1
    assert run("inspect", folder, "--no-such-option").exit_code == 2
    assert run("inspekt").exit_code == 2

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "preadv", stopped)
    assert run("inspect", folder).exit_code == 130


@pytest.mark.parametrize("width", [40, 80, 200])
def test_tables_fit_the_terminal(folder, run_folder, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    shapes = folder.parent / "shapes.json"
    shapes.write_text('{"model.layers.0.self_attn.q_proj.kernel": [8, 6], "model.odd.name.of.some.length": [4, 4]}')
    for command in (
        ("inspect", folder, "--tensors", "--norms"), ("families",), ("families", "llama"), ("checkpoints", run_folder),
        ("check-keymap", "llama", "--model", shapes), ("combine", folder, folder, "--weights", "1,1", "--out", "new"),
    ):  # fmt: skip
        monkeypatch.chdir(folder.parent)
        result = run(*command)
        assert result.exit_code == (command[0] == "check-keymap")
        assert max(map(len, result.output.splitlines())) <= width


def test_in_a_pipe_no_line_is_folded(folder, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert any(line.split()[0] == key for line in run("inspect", folder, "--tensors").output.splitlines() if line)
    told = next(line for line in run("inspect", folder).output.splitlines() if line.startswith("refused by"))
    assert len(told) > 80


def test_families():
    assert "llama" in run("families").output
    listed = json.loads(run("families", "--json").output)
    assert ("gpt2", True) in [(entry["name"], entry["proved"]) for entry in listed]
    lines = json.loads(run("families", "llama/scan0", "--json").output)
    assert any(line["pattern"].startswith("{l}") for line in lines)
    assert "did you mean 'llama' or 'llama4'?" in run("families", "lama").output
    assert run("families", "nosuch").exit_code == 1
    error = run("families", "lama").stderr
    assert "did you mean 'llama'" in error
    assert len(error) < 400  # it listed all of them


def test_one_tensor_is_no_tensors(tmp_path):
    config = jaxadapt.PromptTuningConfig(num_virtual_tokens=2, token_dim=4, task_type="CAUSAL_LM")
    jaxadapt.write(jaxadapt.PeftTensors(config, {"prompt_embeddings": np.ones((2, 4), "f4")}), tmp_path / "out")
    assert "8 parameters in 1 tensor, F32" in run("inspect", tmp_path / "out").output


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell):
    script = run("completion", shell).output
    assert "_JAXADAPT_COMPLETE" in script
    assert json.loads(run("completion", shell, "--json").stdout) == {"shell": shell, "script": script[:-1]}


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("in", {"inspect"}),
        ("c", {"combine", "compare-logprobs", "convert", "check-keymap", "checkpoints", "completion"}),
        ("inspect --n", {"--norms"}),
        ("demo --api l", {"linen"}),
        ("merge --dtype b", {"bfloat16"}),
        ("completion ", {"bash", "zsh", "fish"}),
        ("push --no", {"--no-picture"}),
        ("export out/ --for t", {"transformers", "tgi", "tensorrt-llm"}),
        ("families gemma:gemma4", {"gemma:gemma4", "gemma:gemma4-moe"}),
        ("check-keymap a", {"auto"}),
        ("convert a b --to gpt2", {"gpt2", "gpt2-dense"}),
        ("convert a b --from bert", {"bert"}),
        ("extract a --keymap bert", {"bert"}),
        ("convert a b --dialect q", {"qwix"}),
        ("demo --method lo", {"loha", "lokr", "lora"}),
        ("combine a --method ", {*OPERATORS}),
    ],
)
def test_completion_knows_commands_options_and_choices(typed, offered, monkeypatch):
    assert completed(typed, monkeypatch) == {("plain", word) for word in offered}


def test_completion_imports_no_jax():
    """Its answer to a key is to come at once."""
    code = (
        "import os, sys\nfrom jaxadapt.cli import main\n"
        "for words in sys.argv[1:]:\n"
        "    os.environ |= {'COMP_WORDS': f'jaxadapt {words}', 'COMP_CWORD': str(len(words.split(' ')))}\n"
        "    try: main([], prog_name='jaxadapt')\n"
        "    except SystemExit: pass\n"
        "print(*[name for name in ('jax', 'numpy', 'flax') if name in sys.modules])"
    )
    typed = [
        "families falcon",
        "convert a b --dialect qw",
        "demo --method hr",
        "combine a --method ca",
        "export a --for ml",
    ]
    env = {**os.environ, "_JAXADAPT_COMPLETE": "bash_complete", "PYTHONPATH": str(Path(jaxadapt.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code, *typed], capture_output=True, text=True, timeout=900, env=env)
    *offered, modules, end = done.stdout.split("\n")
    assert offered == [f"plain,{word}" for word in ("falcon", "qwix", "hra", "cat", "mlx")], done.stderr
    assert (modules, end) == ("", "")


def test_the_help_of_export_names_every_program():
    text = run("export", "--help").output
    assert [name for name in consumers.PROGRAMS if not re.search(rf"\b{name}\b", text)] == []


def options():
    """Every option of every command that takes a number."""
    for name in COMMANDS:
        command = main.get_command(click.Context(main), name)
        yield from (
            pytest.param(each, id=f"{name} {each.name}")
            for each in command.params
            if isinstance(each.type, click.types.IntParamType | click.types.FloatParamType)
        )


@pytest.mark.parametrize("option", options())
def test_a_number_of_letters_is_called_no_valid_number(option):
    """click's own types for a range call it "not a valid integer range", as if a range was expected."""
    with pytest.raises(click.BadParameter, match="^'a' is not a valid (integer|float)\\.$"):
        option.type.convert("a", option, None)


@pytest.mark.parametrize("given", ["x=a", "x", "=3", "x=0", "x=-1", "x=1.5", "x=1" + "0" * 18])
def test_an_axis_of_another_form_is_told_what_is_expected(given):
    result = run("convert", "a", "b", "--axis", "h=2", "--axis", given)
    assert result.exit_code == 2
    assert f"--axis': expected NAME=SIZE, such as h=128, found '{given}'" in " ".join(result.output.split())


@pytest.mark.parametrize("typed", ["inspect ", "push ", "merge base/ out/ --out ", "inspect x --plot "])
def test_completion_leaves_paths_to_the_shell(typed, monkeypatch):
    assert {kind for kind, _ in completed(typed, monkeypatch)} == {"file"}


def completed(typed, monkeypatch):
    monkeypatch.setenv("_JAXADAPT_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", f"jaxadapt {typed}")
    monkeypatch.setenv("COMP_CWORD", str(len(f"jaxadapt {typed}x".split()) - 1))
    lines = CliRunner().invoke(main, [], prog_name="jaxadapt").output.splitlines()
    return {tuple(line.split(",", 1)) for line in lines}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_is_answered_as_its_script_asks(shell, monkeypatch):
    """With the variables that the script sets, in the form that it takes apart: a process each."""
    script = run("completion", shell).output
    word, last = {  # what follows COMP_WORDS= and COMP_CWORD= there, where "jaxadapt c" is typed
        "bash": ('"${COMP_WORDS[*]}"', "$COMP_CWORD"),
        "zsh": ('"${words[*]}"', "$((CURRENT-1))"),
        "fish": ("(commandline -cp)", "(commandline -t)"),
    }[shell]
    assert f"COMP_WORDS={word}" in script
    assert f"COMP_CWORD={last}" in script
    assert f"_JAXADAPT_COMPLETE={shell}_complete" in script

    def answer(typed):
        words = typed.split(" ")
        monkeypatch.setenv("_JAXADAPT_COMPLETE", f"{shell}_complete")
        monkeypatch.setenv("COMP_WORDS", typed)
        monkeypatch.setenv("COMP_CWORD", words[-1] if shell == "fish" else str(len(words) - 1))
        lines = CliRunner().invoke(main, [], prog_name="jaxadapt").output.splitlines()
        if shell == "zsh":
            return list(zip(lines[::3], lines[1::3], lines[2::3], strict=True))
        pairs = [line.split(",", 1) for line in lines]
        return [(kind, *rest.partition("\t")[::2]) for kind, rest in pairs]

    short = {name: main.get_command(click.Context(main), name).get_short_help_str(200) for name in COMMANDS}
    told = {name: "" if shell == "bash" else short[name] for name in COMMANDS if name.startswith("c")}
    assert sorted(answer("jaxadapt c")) == sorted(("plain", name, text) for name, text in told.items())
    assert any("," in text for text in told.values()) or shell == "bash"
    assert ("string split -m 1" in script) is (shell == "fish")  # at the first comma alone
    assert [kind for kind, *_ in answer("jaxadapt inspect ou")] == ["file"]
    assert [value for _, value, _ in answer("jaxadapt demo --api l")] == ["linen"]


def test_completion_works_in_a_real_shell(tmp_path):
    program = tmp_path / "jaxadapt"
    program.write_text(f"#!{sys.executable}\nfrom jaxadapt.cli import main\nmain()\n")
    program.chmod(0o755)
    script = (
        'eval "$(jaxadapt completion bash)"; complete -p jaxadapt; COMP_WORDS=(jaxadapt insp); COMP_CWORD=1;'
        ' _jaxadapt_completion jaxadapt; echo "offered: ${COMPREPLY[*]}"'
    )
    root = str(Path(jaxadapt.__file__).parents[1])
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": root}
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, timeout=900)
    assert done.stdout.splitlines()[-1] == "offered: inspect", done.stderr
    assert "complete -o nosort -F _jaxadapt_completion jaxadapt" in done.stdout


# What each needs at most, of what takes long to load; the exit status.
LIGHT = {
    "inspect": (("inspect", "out"), set(), 0),
    "inspect --norms": (("inspect", "out", "--norms"), {"numpy"}, 0),
    "inspect, of PEFT": (("inspect", "theirs"), set(), 0),
    "families": (("families",), set(), 0),
    "methods": (("methods",), set(), 0),
    "families NAME": (("families", "llama"), set(), 0),
    "check-keymap": (("check-keymap", "auto", "--model", "shapes.json"), set(), 0),
    "completion": (("completion", "zsh"), set(), 0),
    "checkpoints": (("checkpoints", "run"), set(), 0),
    "checkpoints, best": (("checkpoints", "run", "--minimize", "loss", "--json"), set(), 0),
    "pull": (("pull", "org/name"), {"huggingface_hub"}, 1),
    "push": (("push", "out", "org/name", "--no-picture"), {"huggingface_hub"}, 1),
    "--help": (("--help",), set(), 0),
    "--version": (("--version",), set(), 0),
}


@pytest.mark.parametrize("name", LIGHT)
def test_commands_that_need_no_jax_start_without_it(name, folder, run_folder):
    words, needs, status = LIGHT[name]
    (folder.parent / "shapes.json").write_text('{"model.layers.0.self_attn.q_proj.kernel": [8, 6]}')
    shutil.copytree(folder, folder.parent / "theirs")
    weights = folder.parent / "theirs" / small.WEIGHTS
    save_file(load_file(weights), weights, metadata={"format": "pt"})  # without jaxadapt's copy of the configuration
    code = (
        "import sys; from jaxadapt.cli import main\n"
        "try: main(sys.argv[2:])\n"
        "except SystemExit as end: assert end.code == int(sys.argv[1]), end.code\n"
        "heavy = 'jax jaxlib flax optax orbax numpy matplotlib huggingface_hub fsspec torch'.split()\n"
        "print(*[name for name in heavy if name in sys.modules], file=sys.stderr)"
    )
    root = str(Path(jaxadapt.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code, str(status), *words], cwd=folder.parent, capture_output=True, text=True,
        timeout=900, env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": root},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert set(done.stderr.splitlines()[-1].split()) <= needs


JSON = {
    "inspect": ("inspect", "out"),
    "inspect --norms": ("inspect", "out", "--norms"),
    "inspect --plot": ("inspect", "out", "--plot", "norms.png"),
    "merge": ("merge", "base", "out", "--out", "new"),
    "export": ("export", "out", "--out", "new"),
    "combine": ("combine", "out", "out", "--weights", "1,-1", "--out", "new"),
    "convert": ("convert", "out", "new"),
    "convert several": ("convert", "out", "copy", "new"),
    "resize": ("resize", "out", "--rank", "1", "--out", "new"),
    "rename": ("rename", "out", "--from", "model.", "--to", "inner.", "--out", "new"),
    "extract": ("extract", "out/adapter_model.safetensors", "--out", "new"),
    "check-keymap": ("check-keymap", "llama", "--checkpoint", "base"),
    "verify": ("verify", "out"),
    "repair": ("repair", "out"),
    "diff": ("diff", "out", "out"),
    "checkpoints": ("checkpoints", "run"),
    "checkpoints --export": ("checkpoints", "run", "--export", "new"),
    "families": ("families",),
    "methods": ("methods",),
    "families NAME": ("families", "gpt2"),
    "completion": ("completion", "fish"),
    "compare-logprobs": ("compare-logprobs", "logprobs.json", "logprobs.json"),
}
"""Beside demo (`tests/demo/test_demo.py`), push and pull (`tests/storage/hub/test_cli.py`), serve and export, and start
(`tests/export/test_adapter_files.py`)."""


@pytest.mark.parametrize("name", JSON)
def test_with_json_standard_output_is_json_and_nothing_else(name, folder, run_folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    key = "model.layers.0.self_attn.{}.weight"
    weights = {key.format(m): np.ones((6, 8), "f4") for m in ("q_proj", "v_proj")}
    Path("base").mkdir()
    save_file(weights, "base/model.safetensors")
    shutil.copytree("out", "copy")
    Path("logprobs.json").write_text('{"base": [[null, -1.5]], "fr": [[null, -0.5]]}')
    result = run(*JSON[name], "--json")
    assert json.loads(result.stdout)
    assert result.exit_code == 0


@pytest.mark.parametrize("seen", [True, False], ids=["a terminal", "a pipe"])
def test_long_work_shows_bars_with_bytes_per_second_on_a_terminal_alone(seen, folder):
    """`python -m jaxadapt merge` as a process, its standard error a terminal or not; its result is the same."""
    weights = {f"model.layers.0.self_attn.{m}_proj.weight": np.ones((6, 8), "f4") for m in "qv"}
    weights |= {f"x{i}": np.ones((1024, 4096), "f4") for i in range(8)}
    save_file(weights, folder.parent / "model.safetensors")
    root = str(Path(jaxadapt.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": root, "TERM": "xterm", "COLUMNS": "100"}
    words = ["merge", "model.safetensors", "out", "--out", "new", "--json"]
    ours, theirs = pty.openpty() if seen else os.pipe()
    with subprocess.Popen(
        [sys.executable, "-m", "jaxadapt", *words], cwd=folder.parent, env=env, stdout=subprocess.PIPE, stderr=theirs
    ) as process:
        os.close(theirs)
        said = b""
        with contextlib.suppress(OSError):  # a terminal whose other side has gone
            while more := os.read(ours, 1 << 16):
                said += more
        os.close(ours)
        result, _ = process.communicate(timeout=900)
    assert process.returncode == 0, said
    assert json.loads(result) == {"folder": "new", "changed": 2}
    if seen:
        assert re.search(r"merge .*━.*134\.2 MB.*[kMG]B/s", said.decode())
    else:
        assert said == b""


def test_every_command_has_a_test_of_its_json():
    tested = {words[0] for words in JSON.values()} | {"demo", "push", "pull", "undo-start", "export", "serve"}
    assert tested == set(COMMANDS)


@pytest.fixture
def run_folder(tmp_path):
    with jaxadapt.CheckpointManager(tmp_path / "run") as manager:
        for step, loss in enumerate((0.5, 0.3, 0.4)):
            manager.save(step, small.adapter(seed=step), metrics={"loss": loss, "seen": 10**step})
    return tmp_path / "run"


def test_factors_separated_by_blanks_are_asked_for_with_commas():
    result = run("combine", "a", "b", "--weights", "0.7", "0.3", "--out", "new")
    assert result.exit_code == 2
    assert "separate the factors by commas: --weights 0.7,0.3" in result.output


def test_the_own_messages_of_the_stores_clients_are_shown_only_on_request(caplog):
    client = logging.getLogger("huggingface_hub.utils._http")

    def seen(*options: str) -> list[str]:
        caplog.clear()
        assert run(*options, "families").exit_code == 0
        client.warning("Retrying in 1s [Retry 1/5].")
        client.warning("'timed out' thrown while requesting HEAD https://…")
        client.warning("the server's own words")
        logging.getLogger("gcsfs").error("_request out of retries")
        return [record.getMessage() for record in caplog.records]

    try:
        assert len(seen("--verbose")) == 4
        assert seen() == ["the server's own words"]
    finally:
        run("--verbose", "families")


def test_checkpoints_are_listed(run_folder):
    rows = run("checkpoints", run_folder, "--minimize", "loss").output.splitlines()
    assert rows[0].split() == ["step", "loss", "seen"]
    assert [row.split() for row in rows[1:]] == [
        ["0", "0.5", "1"], ["1", "0.3", "10", "best"], ["2", "0.4", "100", "latest"]
    ]  # fmt: skip
    listed = json.loads(run("checkpoints", run_folder, "--maximize", "seen", "--json").output)
    assert [(s["step"], s["best"]) for s in listed["steps"]] == [(0, False), (1, False), (2, True)]
    with jaxadapt.CheckpointManager(run_folder) as manager:
        manager.save(3, small.adapter(), metrics={"loss": float("nan")})
    output = run("checkpoints", run_folder, "--json").output
    strict = json.loads(output, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert strict["steps"][3]["metrics"] == {"loss": None}
    empty = run("checkpoints", run_folder / "no")
    assert empty.exit_code == 1
    assert "no such folder" in empty.output
    (run_folder / "none").mkdir()
    assert "no checkpoint found" in run("checkpoints", run_folder / "none").output
    misspelt = run("checkpoints", run_folder, "--minimize", "los")
    assert misspelt.exit_code == 1
    assert "no step has the metric 'los'; found ['loss', 'seen']" in misspelt.output


@pytest.mark.filterwarnings("ignore:metrics. step . has loss, seen, and not other")
def test_the_best_checkpoint_is_the_one_by_the_metric_that_the_run_optimized(tmp_path):
    runs = {"loss": {"minimize": "loss"}, "seen": {"maximize": "seen"}, "other": {"minimize": "other"}}
    for name, objective in runs.items():
        with jaxadapt.CheckpointManager(tmp_path / name, **objective) as manager:
            for step, loss in enumerate((0.5, 0.3, 0.4)):
                manager.save(step, small.adapter(seed=step), metrics={"loss": loss, "seen": 10**step})
    rows = {name: run("checkpoints", tmp_path / name).output.splitlines()[1:] for name in runs}
    assert [" ".join(row.split()) for row in rows["loss"]] == [
        "0 0.5 1",
        "1 0.3 10 best (smallest loss)",
        "2 0.4 100 latest",
    ]
    assert rows["seen"][2].endswith("best (largest seen), latest")
    assert not any("best" in row for row in rows["other"])  # which no step has
    listed = {name: json.loads(run("checkpoints", tmp_path / name, "--json").output) for name in runs}
    assert {name: found["objective"] for name, found in listed.items()} == runs
    assert [s["step"] for s in listed["loss"]["steps"] if s["best"]] == [1]
    asked = json.loads(run("checkpoints", tmp_path / "seen", "--minimize", "loss", "--json").output)
    assert (asked["objective"], [s["step"] for s in asked["steps"] if s["best"]]) == ({"minimize": "loss"}, [1])
    exported = run("checkpoints", tmp_path / "loss", "--step", "best", "--export", tmp_path / "out", "--json")
    assert json.loads(exported.output)["step"] == 1


def test_the_folder_of_a_run_is_told_from_that_of_an_adapter(run_folder):
    result = run("inspect", run_folder)
    assert result.exit_code == 1
    assert f"contains training checkpoints: `jaxadapt checkpoints {run_folder}` lists and" in result.output


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
