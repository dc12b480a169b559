"""Every notebook runs, cell by cell, offline and in a few steps; the Hub it shares on is the tests' own."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from tests.support import hub_server
from tests.support.little_model import little_package as little_package
from tests.support.little_model import little_smollm2 as little_smollm2

NOTEBOOKS = sorted((Path(__file__).resolve().parents[3] / "notebooks").glob("*.ipynb"))
NAMES = [
    "anatomy_of_an_adapter",
    "finetune_and_share",
    "from_pytorch_and_back",
    "mesh_and_resume",
    "serve_many_adapters",
    "your_own_model",
]
SHARING = NAMES[1:3]  # these upload to the Hub
TORCH = ["from_pytorch_and_back", "your_own_model"]
REPO = "me/tuned"


def cells(path: Path) -> list[tuple[str, str, list[str], list[dict]]]:
    """(kind, source, tags, outputs) of each."""
    held = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [(c["cell_type"], "".join(c["source"]), c["metadata"].get("tags", []), c.get("outputs", [])) for c in held]


def first_words(text: str) -> list[list[str]]:
    """Numbers differ between machines and numbers of steps; the words before them do not."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    return [re.split(r"[\d:]", line)[0].split()[:3] for line in plain.splitlines() if line.strip()]


class Shown:
    """Stands for what IPython displays: it must be there."""

    def __init__(self, data: str | bytes, **options: object) -> None:
        assert data
        assert isinstance(data, str) or data.startswith(b"\x89PNG")


def shell(line: str) -> None:
    command = [sys.executable, "-m", *shlex.split(line)]
    print(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_there_are_six() -> None:
    assert [path.stem for path in NOTEBOOKS] == NAMES


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_it_opens_as_it_was_run(path: Path) -> None:
    """The first code cell installs; then come settings that send nothing anywhere; what was shown is kept."""
    held = [cell for cell in cells(path) if cell[0] == "code"]
    assert "%pip install" in held[0][1]
    assert held[1][2] == ["parameters"]
    assert ('REPO = ""' in held[1][1]) is (path.stem in SHARING)
    assert "FAST = False" in held[1][1]
    kept = [out for cell in held for out in cell[3]]
    assert not [out for out in kept if out["output_type"] == "error" or out.get("name") == "stderr"]
    assert sum("image/png" in out.get("data", {}) for out in kept) >= 2
    # Every cell that prints or shows has its output.
    assert not [
        source
        for _, source, _, outputs in held
        if re.search(r"^(print|Image|Markdown|%%sh)|plt.show", source, re.M) and not outputs
    ]


def first_cell(path: Path, monkeypatch: pytest.MonkeyPatch, here: dict[str, str]) -> tuple[str, str]:
    """The JAX and the jaxadapt that the first cell asks pip for, where these packages are installed."""
    source = next(source for kind, source, _, _ in cells(path) if kind == "code")
    plain = "\n".join(line for line in source.splitlines() if not line.startswith("%"))
    found = [types.SimpleNamespace(name=name, version=version) for name, version in here.items()]
    monkeypatch.setattr("importlib.metadata.distributions", lambda: found)
    space: dict[str, str] = {}
    exec(plain, space)
    assert '%pip install -q "{jax_here}" "{source}[' in source
    return space["jax_here"], space["source"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
@pytest.mark.parametrize(
    ("plugin", "old"),
    [
        ("numpy", "jax"),
        ("jax-cuda12-plugin", "jax[cuda12]"),
        ("jax-cuda13-plugin", "jax[cuda13]"),
        ("libtpu", "jax[tpu]"),
    ],
)
def test_the_first_cell_keeps_the_jax_that_is_there(
    path: Path, plugin: str, old: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Colab's GPU and TPU machines have JAX with its plugin. Only a JAX that is too old changes, with its plugin."""
    for version, wanted in {
        "0.10.0": "jax==0.10.0",
        "0.12.0.1": "jax==0.12.0.1",
        "1.0": "jax==1.0",
        "0.9.2": old,
    }.items():
        assert first_cell(path, monkeypatch, {plugin: "1", "jax": version})[0] == wanted
    assert first_cell(path, monkeypatch, {plugin: "1"})[0] == old


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_first_cell_installs_the_checkout_that_it_is_in(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path.parent)
    assert first_cell(path, monkeypatch, {})[1] == ".."
    assert first_cell(path, monkeypatch, {"jaxadapt": "0.1.0"})[1] == "jaxadapt"  # such as an editable one
    monkeypatch.chdir(tmp_path)
    assert first_cell(path, monkeypatch, {})[1] == "jaxadapt"


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.usefixtures("little_smollm2", "foreign_model")
@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=pytest.mark.peft if p.stem in TORCH else ()) for p in NOTEBOOKS],
    ids=lambda p: p.stem,
)
def test_it_runs(path: Path, hub: hub_server.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", hub_server.WRITE)
    monkeypatch.setenv("COLUMNS", "80")  # as where the stored output was made, whatever ran before
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    space: dict[str, object] = {"__name__": "__main__", "shell": shell, "Image": Shown, "Markdown": Shown}
    for number, (kind, source, tags, outputs) in enumerate(cells(path)):
        if kind != "code" or "install" in tags:
            continue
        lines = source.removeprefix("%%sh\n").splitlines() if source.startswith("%%sh\n") else []
        code = "\n".join(f"shell({line!r})" for line in lines) or source
        code = re.sub(r"^from IPython.display .*$", "", code, flags=re.M)
        exec(compile(code, f"{path.name}, cell {number}", "exec"), space)
        if "parameters" in tags:
            space |= {"REPO": REPO, "FAST": True}
        printed = capsys.readouterr().out
        kept = "".join("".join(out.get("text", "")) for out in outputs)
        if "varies" not in tags:
            assert not outputs or first_words(printed) == first_words(kept), f"cell {number}"
    shutil.rmtree("smollm2", ignore_errors=True)  # half a gigabyte, which pytest would keep
    if path.stem not in SHARING:
        assert not hub.repos
        return
    held = hub.files(REPO)
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= held.keys()
    assert hub.repos[REPO].private
    assert "pytorch" not in path.stem or "small/adapter_model.safetensors" in held
