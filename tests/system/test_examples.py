"""The programs of examples/, each started as its docstring says, and their files in other programs.

Elsewhere: `equinox_lora.py` in tests/models/test_pytree_libraries.py, `tunix_checkpoints.py` in
tests/training/test_checkpoint_tunix.py, `gemma_vllm.py` in tests/models/foreign/test_gemma_program.py (on
Python 3.13), and, with `maxtext_sft.py`, in tests/full/test_examples_full.py.
"""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import yaml

import jaxadapt
from tests.support import compiling

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples"
MODULES = ("tunix_checkpoints",)  # imported by programs, and started by none


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run one program in this process as its command does; return its names."""
    monkeypatch.setattr(sys, "argv", [name, str(folder)])
    return runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")


def test_the_list_has_every_program():
    listed = set(re.findall(r"\]\((\S+)\)", (FOLDER / "README.md").read_text(encoding="utf-8")))
    assert listed == {path.name for path in FOLDER.iterdir() if path.is_file()} - {"README.md"}


def write_base(model: Any, folder: Path) -> None:
    """Save a model of transformers with random weights; norms differ, so that none takes another's place."""
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(float(name.endswith("norm.weight")), 0.2)
    model.save_pretrained(folder)


def in_peft(folder: Path, tokens: Any) -> tuple[Any, Any]:
    """Return the logits of the base in `folder` and with its adapter, in PyTorch."""
    import peft
    import torch
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    with torch.no_grad():
        plain = base(torch.tensor(tokens)).logits.numpy()
        adapted = peft.PeftModel.from_pretrained(base, str(folder / "adapter"))
        return plain, adapted(torch.tensor(tokens)).logits.numpy()


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_each_program_is_short_and_says_its_command(path: Path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    said = ast.get_docstring(ast.parse(text)) or ""
    if path.stem not in MODULES:
        assert re.search(rf"^    python examples/{path.name}\b.*\b\d+ seconds", said, re.M), said
        assert re.search(r"\bprints\b.*\n\n    \S", said, re.S), said


@pytest.mark.peft
def test_own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, foreign_model: None):
    """On a base that transformers wrote, the adapter computes the same in PEFT."""
    import torch
    import transformers

    torch.manual_seed(0)
    sizes = runpy.run_path(str(FOLDER / "own_model.py"))["SIZE"].to_hf()
    config = transformers.LlamaConfig(**{key: x for key, x in sizes.items() if key != "architectures"})
    write_base(transformers.LlamaForCausalLM(config), tmp_path / "base")
    names = run("own_model", tmp_path, monkeypatch)
    out = capsys.readouterr().out
    first, last = map(float, re.findall(r"[\d.]+", out.partition("\n")[0]))
    assert last < 0.8 * first
    assert "is the base of the training, by 8 of its weights" in out
    assert not re.search("^(error|warning)", out, re.M)

    keymap = names["KEYMAP"]
    model = jaxadapt.export.import_base(tmp_path / "base", names["OwnModel"](), keymap=keymap)
    tokens = np.random.default_rng(0).integers(0, 64, (2, 12))
    plain = np.asarray(model(jnp.asarray(tokens)))
    jaxadapt.load(tmp_path / "adapter", model, keymap=keymap)
    want_plain, want = in_peft(tmp_path, tokens)
    size = np.abs(want).max()  # float32 in another order of sums
    np.testing.assert_allclose(plain, want_plain, atol=1e-5 * size)
    np.testing.assert_allclose(np.asarray(model(jnp.asarray(tokens))), want, atol=1e-5 * size)
    assert np.abs(want - want_plain).max() > 0.1 * size


@pytest.mark.peft
@pytest.mark.filterwarnings("ignore")  # Tunix's own, of many kinds
def test_tunix_qwen3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, foreign_model: None):
    """On a base that transformers wrote, Tunix's training resumes, and its adapter computes the same in PEFT."""
    import torch
    import transformers

    torch.manual_seed(0)
    monkeypatch.syspath_prepend(str(FOLDER))
    config = runpy.run_path(str(FOLDER / "tunix_qwen3.py"))["CONFIG"]
    config = transformers.Qwen3Config(**{key: x for key, x in config.items() if key != "architectures"})
    write_base(transformers.Qwen3ForCausalLM(config), tmp_path / "base")
    names = run("tunix_qwen3", tmp_path, monkeypatch)
    said = capsys.readouterr().out
    first, last = map(float, re.findall(r"[\d.]+", said.partition(" after")[0]))
    assert last < 0.8 * first
    assert not re.search("^(error|warning)", said, re.M)
    assert jaxadapt.CheckpointManager(tmp_path / "run").steps == [10, 20]

    tokens = names["batch"](0)
    plain, adapted = in_peft(tmp_path, tokens)
    for logits, printed in ((plain, first), (adapted, last)):
        loss = torch.nn.functional.cross_entropy(torch.tensor(logits[:, :-1]).mT, torch.tensor(tokens[:, 1:]))
        assert float(loss) == pytest.approx(printed, abs=6e-4)  # a printed digit

    run("tunix_qwen3", tmp_path, monkeypatch)  # all steps are done
    assert capsys.readouterr().out == said
    (tmp_path / "run/step-000000020.safetensors").unlink()
    run("tunix_qwen3", tmp_path, monkeypatch)  # from step 10
    assert capsys.readouterr().out == said


@pytest.mark.peft
def test_openpi_lerobot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    """In PEFT, each layer under LeRobot's names gets the product that openpi's einsums compute."""
    import peft
    import torch

    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text('{"type": "pi0"}')
    (base / "policy_preprocessor.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["openpi_lerobot", str(tmp_path), "--base", str(base)])
    names = runpy.run_path(str(FOLDER / "openpi_lerobot.py"), run_name="__main__")
    assert "rank 12 and scale 1: q_proj of the action expert" in capsys.readouterr().out
    adapter = tmp_path / "adapter"
    assert json.loads((adapter / "config.json").read_text()) == {"type": "pi0", "use_peft": True}
    assert (adapter / "policy_preprocessor.json").exists()

    layers = names["read_lora"](tmp_path / "checkpoint/params")["PaliGemma"]["llm"]["layers"]
    wanted: dict[str, np.ndarray[Any, Any]] = {}
    for end, root in zip(("", "_1"), names["EXPERTS"], strict=True):

        def product(equation: str, module: dict[str, Any], name: str = "") -> Any:
            return np.einsum(equation, module[f"{name}lora_a"]["value"], module[f"{name}lora_b"]["value"])

        attention, mlp = layers["attn"], layers[f"mlp{end}"]
        q = product("lndr,lnrh->lnhd", attention[f"q_einsum{end}"])
        k, v = product("lpkdr,lpkrh->plkhd", attention[f"kv_einsum{end}"])
        o = product("lnhr,lmrd->ldnh", attention[f"attn_vec_einsum{end}"])  # all heads add to one hidden vector
        gate, up = product("lpdr,lprf->plfd", mlp, "gating_einsum_")
        down = product("lfr,lrd->ldf", mlp, "linear_")
        for name, changes in {
            "self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v, "self_attn.o_proj": o,
            "mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": down,
        }.items():  # fmt: skip
            outs = 1 if name.endswith("o_proj") else changes.ndim - 2
            for layer, change in enumerate(changes):
                change = change.reshape(int(np.prod(change.shape[:outs])), -1)
                wanted[f"model.{root}layers.{layer}.{name}"] = change

    policy = torch.nn.Module()
    for path, change in wanted.items():
        *parents, last = path.split(".")
        node = policy
        for parent in parents:
            if parent not in dict(node.named_children()):
                node.add_module(parent, torch.nn.Module())
            node = node.get_submodule(parent)
        node.add_module(last, torch.nn.Linear(change.shape[1], change.shape[0], bias=False))
    loaded = peft.PeftModel.from_pretrained(policy, str(adapter)).base_model.model
    for path, change in wanted.items():
        found = loaded.get_submodule(path).get_delta_weight("default").detach().numpy()
        np.testing.assert_allclose(found, change, rtol=1e-4, atol=1e-7, err_msg=path)  # float32


def test_rl_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    run("rl_weights", tmp_path, monkeypatch)
    out = capsys.readouterr().out
    rewards = [float(x) for x in re.findall(r"reward ([\d.]+)", out)]
    assert len(rewards) == 12
    assert rewards[0] < 0.6 < 0.7 < rewards[-1]  # chance is 0.5
    assert re.search(r"^a server without the newest weights: policy: applied otherwise", out, re.M)
    assert re.search(r"^with them: policy: applied: ", out, re.M)
    assert "the adapter was trained on another base" in out
    assert jaxadapt.inspect(tmp_path).config.r == 4


def test_serve_three_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    run("serve_three_adapters", tmp_path, monkeypatch)
    *answers, last = capsys.readouterr().out.splitlines()
    assert last == "10 answers, each the one of its adapter alone; 2 programs compiled"
    said = {line.rpartition(" -> ")[::2] for line in answers if "->" in line}
    assert len(said) == 5  # the base, three adapters, and another version of "a"


@pytest.mark.slow
@pytest.mark.network
def test_two_processes(tmp_path: Path):
    """Two processes that the program starts, then two that find each other by Slurm's variables and resume."""
    words = [sys.executable, str(FOLDER / "two_processes.py"), str(tmp_path), "--steps"]
    env = {**os.environ, **compiling.ENV, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    out = subprocess.run([*words, "5"], env=env, capture_output=True, text=True, timeout=600, check=True).stdout
    assert "2 processes, 4 devices, mesh {'data': 2, 'model': 2}" in out
    losses = dict(re.findall(r"^step (\d+): loss ([\d.]+)$", out, re.M))
    assert list(losses) == ["1", "2", "3", "4", "5"]
    assert float(losses["5"]) < float(losses["1"])
    (alone,) = re.findall(r"one process reads .*: loss ([\d.]+)$", out, re.M)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env |= {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_COORDINATOR_PORT": str(port)}
    env |= {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    both = [
        subprocess.Popen(
            [*words, "6", "--cluster"],
            env={**env, "SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=600) for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], said
    steps = dict(re.findall(r"^step (\d+): loss ([\d.]+)$", said[0][0], re.M))
    assert list(steps) == ["6"]
    assert abs(float(steps["6"]) - float(alone)) < 2e-3  # two layouts, and a printed digit
    assert jaxadapt.CheckpointManager(tmp_path / "run").steps == [5]


def test_the_files_for_clusters_start_the_program():
    """Neither runs here: Slurm's variables do in `test_two_processes`, and of GKE's file the fields agree."""
    text = (FOLDER / "slurm.sh").read_text(encoding="utf-8")
    subprocess.run(["bash", "-n", str(FOLDER / "slurm.sh")], check=True)
    (line,) = re.findall(r"^srun (.+)$", text, re.M)
    assert shlex.split(line)[:3] == ["python", "examples/two_processes.py", "--cluster"]
    job = yaml.safe_load((FOLDER / "jobset.yaml").read_text(encoding="utf-8"))
    assert (job["kind"], job["apiVersion"]) == ("JobSet", "jobset.x-k8s.io/v1alpha2")
    (group,) = job["spec"]["replicatedJobs"]
    hosts = group["template"]["spec"]
    assert hosts["parallelism"] == hosts["completions"] == 2
    pod = hosts["template"]["spec"]
    chips = np.prod([int(n) for n in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")])
    (container,) = pod["containers"]
    assert chips == 2 * container["resources"]["limits"]["google.com/tpu"]
    assert container["command"][:3] == ["python", "examples/two_processes.py", "--cluster"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
