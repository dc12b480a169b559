"""push, pull and inspect of the Hub, as a person types them."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

import jaxadapt
from jaxadapt.cli import main
from tests.support import hub_server, small
from tests.support.small import CARD, CONFIG, WEIGHTS

pytestmark = pytest.mark.network

REPO = "org/tuned"


@pytest.fixture
def saved(tmp_path):
    jaxadapt.save(small.trained(), tmp_path / "out", base_model="org/base")
    return tmp_path / "out"


def run(*args):
    return CliRunner().invoke(main, [str(a) for a in args])


def test_push_inspect_and_pull(hub, saved, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub_server.WRITE)
    pushed = run("push", saved, REPO, "--metric", "loss=3.25", "--metric", "note=fine", "--license", "mit",
                 "--no-picture", "--tag", "v1", "-m", "first", "--json")  # fmt: skip
    assert pushed.exit_code == 0, pushed.output
    document = json.loads(pushed.stdout)
    address = document["address"]
    assert document["readers"] == json.loads(run("inspect", saved, "--json").stdout)["readers"] != []
    assert hub.repos[REPO].messages[-1] == "first"
    page = hub.files(REPO)[CARD].decode()
    assert "| loss | 3.25 |\n| note | fine |" in page
    assert "license: mit" in page
    for place in (address, f"hf://{REPO}@v1"):
        assert json.loads(run("inspect", place, "--json").stdout)["config"]["r"] == 2
    pulled = run("pull", f"{REPO}@v1", "--out", tmp_path / "copy")
    assert pulled.stdout.strip() == str(tmp_path / "copy")
    assert {p.name for p in (tmp_path / "copy").iterdir()} == {CONFIG, WEIGHTS, CARD}
    assert (tmp_path / "copy" / WEIGHTS).read_bytes() == (saved / WEIGHTS).read_bytes()
    assert not any(p.is_symlink() for p in (tmp_path / "copy").iterdir())  # nobody edits the cache by mistake
    assert json.loads(run("pull", REPO, "--json").stdout)["folder"] == str(jaxadapt.pull(REPO))
    monkeypatch.setenv("COLUMNS", "40")
    said = run("push", saved, REPO, "--no-picture").stdout  # whole, to be copied
    assert re.search(r"^address  hf://org/tuned@[0-9a-f]{40}$", said, re.M)
    assert "read by" in said


def test_processes_of_their_own_with_nothing_but_the_environment(saved, tmp_path):
    """HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE, as a person sets them in a shell."""

    def shell(*words, **more):
        env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
        env |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(root), **more}
        command = [sys.executable, "-m", "jaxadapt", *map(str, words)]
        return subprocess.run(command, env=env, cwd=tmp_path, text=True, capture_output=True, timeout=900)

    root = Path(jaxadapt.__file__).parents[1]
    with hub_server.serving() as hub:
        made = shell("push", saved, REPO, "--private", "--no-picture", HF_ENDPOINT=hub.url, HF_TOKEN=hub_server.WRITE)
        assert (made.returncode, made.stderr) == (0, "")
        assert hub.repos[REPO].private
        closed = shell("pull", REPO, HF_ENDPOINT=hub.url)
        assert closed.returncode == 1
        assert "the token gives no access to it" in closed.stderr
        pulled = shell("pull", REPO, HF_ENDPOINT=hub.url, HF_TOKEN=hub_server.READ)
        assert pulled.stderr == ""
        folder = Path(pulled.stdout.strip())
        assert folder.is_relative_to(tmp_path / "home")
        assert (folder / WEIGHTS).read_bytes() == (saved / WEIGHTS).read_bytes()
    again = shell("inspect", f"hf://{REPO}", "--json", HF_HUB_OFFLINE="1")
    assert json.loads(again.stdout)["config"]["r"] == 2
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        assert f"not in the cache, and {name}=1 forbids fetching it" in shell("pull", "org/other", **{name: "1"}).stderr


def test_pull_does_not_put_two_adapters_into_one_folder(hub, saved, tmp_path):
    hub.put(REPO, {name: (saved / name).read_bytes() for name in (CONFIG, WEIGHTS)})
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "adapter_model.bin").write_bytes(b"older")
    result = run("pull", REPO, "--out", tmp_path / "copy")
    assert result.exit_code == 1
    assert "adapter_model.bin" in result.output


def test_a_pull_whose_weights_cannot_be_written_leaves_the_configuration_that_was_there(hub, saved, tmp_path):
    hub.put(REPO, {name: (saved / name).read_bytes() for name in (CONFIG, WEIGHTS)})
    (tmp_path / "copy" / "adapter_model.safetensors").mkdir(parents=True)  # as a full disk would: no file comes of it
    (tmp_path / "copy" / "adapter_config.json").write_text("{}")
    result = run("pull", REPO, "--out", tmp_path / "copy")
    assert result.exit_code == 1
    assert "adapter_model.safetensors: cannot write" in result.output
    assert (tmp_path / "copy" / "adapter_config.json").read_text() == "{}"
    assert len(list((tmp_path / "copy").iterdir())) == 2


@pytest.mark.parametrize("kind", ["safetensors", "bin", "orbax"])
def test_a_conversion_to_the_hub_is_refused_and_push_uploads_it(kind, hub, saved, monkeypatch):
    refused = run("convert", saved, f"hf://{REPO}", "--format", kind)
    assert refused.exit_code == 1
    assert "upload to the Hub with jaxadapt.push" in " ".join(refused.output.split())
    assert hub.requests == []
    monkeypatch.setenv("HF_TOKEN", hub_server.WRITE)
    assert run("push", saved, REPO, "--no-picture").exit_code == 0
    assert small.same(jaxadapt.read(f"hf://{REPO}").tensors, jaxadapt.read(saved).tensors)


def test_errors_of_the_hub_are_readable(hub, saved):
    result = run("push", saved, REPO, "--no-picture")
    assert result.exit_code == 1
    assert "FileError: hf://org/tuned: cannot push to it: the Hub requires a login" in result.output
    assert "Traceback" not in result.output
    assert run("push", saved, REPO, "--metric", "loss").exit_code == 2


def test_addresses_are_taken_wherever_an_adapter_is_read(hub, saved, tmp_path):
    hub.put(REPO, {name: (saved / name).read_bytes() for name in (CONFIG, WEIGHTS)})
    base = small.base()["params"]  # the adapter's own, or merge warns
    weights = {f"{m}.weight": np.asarray(base[m]["kernel"]).T.copy() for m in base}
    save_file(weights, tmp_path / "model.safetensors")
    for place, out in ((saved, tmp_path / "folder"), (f"hf://{REPO}", tmp_path / "address")):
        for words in (
            ("convert", place, out / "convert"),
            ("combine", place, place, "--weights", "1,1", "--method", "linear", "--out", out / "combine"),
            ("merge", tmp_path / "model.safetensors", place, "--out", out / "merge"),
        ):
            done = run(*words)
            assert done.exit_code == 0, done.output
    assert len(small.files(tmp_path / "folder")) == 3 + 3 + 1
    assert small.files(tmp_path / "folder") == small.files(tmp_path / "address")


def test_verbose_says_what_is_done(hub, saved, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub_server.WRITE)
    heard = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logger = logging.getLogger("jaxadapt")
    logger.addHandler(handler)
    try:
        run("-v", "push", saved, REPO, "--no-picture")
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    assert any("3 files" in line and "commit" in line for line in heard)
