"""A disk that is full, really: the error is ours, the cache is sound, and with room again all goes on.

"disk" is a file system of one megabyte, where this process may mount one; "limit" is the kernel's own refusal to let a
file grow, which runs everywhere.
"""

from __future__ import annotations

import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

import jaxadapt
from tests.support import full_disk, hub_server, small
from tests.support.small import CARD, CONFIG, WEIGHTS

pytestmark = pytest.mark.network

REPO = "org/tuned"
SAID = {
    "disk": "No space left on device; .*free some space, or choose another path",
    "limit": "File too large; .*ulimit -f",
}


class Disk:
    """A folder with little room, until it is given more."""

    def __init__(self, kind: str, path: Path) -> None:
        self.kind, self.path = kind, path
        self._before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self) -> None:
        """Leave room for nothing at all; or for small files, where it is the size of one file that is limited."""
        if self.kind == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, self._before[1]))
            return
        free = shutil.disk_usage(self.path).free
        (self.path / "filler").write_bytes(b"x" * (free - 8192))

    def shrink(self) -> None:
        """Leave room for small files only."""
        if self.kind == "limit":
            self.fill()

    def grow(self) -> None:
        if self.kind == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, self._before)
            return
        (self.path / "filler").unlink(missing_ok=True)
        subprocess.run(["mount", "-o", "remount,size=16m", str(self.path)], check=True)


@pytest.fixture(params=["disk", "limit"])
def disk(request, tmp_path: Path) -> Iterator[Disk]:
    path = tmp_path / "disk"
    path.mkdir()
    made = Disk(request.param, path)
    if made.kind == "disk":
        with full_disk.small_file_system(path, "1m", instead="limit"):
            yield made
        return
    try:
        yield made
    finally:
        made.grow()


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """An adapter of two megabytes."""
    held = {"base_model.model.q_proj.lora_A.weight": np.random.default_rng(0).standard_normal((2, 250_000), "f4"),
            "base_model.model.q_proj.lora_B.weight": np.ones((8, 2), "f4")}  # fmt: skip
    jaxadapt.write(jaxadapt.PeftTensors(small.LORA.replace(target_modules=["q_proj"]), held, ""), tmp_path / "large")
    return tmp_path / "large"


def contents(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir() if p.is_file()}


@pytest.mark.filterwarnings("ignore:Not enough free disk space")  # the client's own, before it tries
def test_pull(hub, disk, large, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(disk.path / "cache"))
    jaxadapt.save(small.trained(), tmp_path / "little")
    hub.put("org/little", contents(tmp_path / "little"))
    hub.put(REPO, contents(large))
    jaxadapt.pull("org/little")
    disk.shrink()
    for pull in (jaxadapt.pull, lambda repo: jaxadapt.load(f"hf://{repo}", small.net())):
        with pytest.raises(jaxadapt.FileError, match=rf"hf://{REPO}.*{SAID[disk.kind]}"):
            pull(REPO)
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(jaxadapt.FileError, match="not in the cache"):
            jaxadapt.pull(REPO)  # half a file is not taken for one
        assert small.same(
            jaxadapt.extract(jaxadapt.load("hf://org/little", small.net())), jaxadapt.extract(small.trained())
        )
    disk.grow()
    assert contents(jaxadapt.pull(REPO)) == contents(large)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert contents(jaxadapt.pull(REPO)) == contents(large)


def test_pushing_a_model_needs_room_to_save_it(hub, disk, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(disk.path))
    model = jaxadapt.PeftTensors(
        small.LORA.replace(target_modules=["q_proj"]),
        {"base_model.model.q_proj.lora_A.weight": np.ones((2, 250_000), "f4"),
         "base_model.model.q_proj.lora_B.weight": np.ones((8, 2), "f4")},
        "",
    )  # fmt: skip
    disk.shrink()
    with pytest.raises(jaxadapt.FileError, match=rf"{WEIGHTS}: cannot write: {SAID[disk.kind]}"):
        jaxadapt.push(model, REPO, token=hub_server.WRITE, card=jaxadapt.Card(picture=False))
    assert hub.requests == []
    assert list(disk.path.iterdir()) == []  # nor is anything left of it
    disk.grow()
    jaxadapt.push(model, REPO, token=hub_server.WRITE, card=jaxadapt.Card(picture=False))
    assert {CONFIG, WEIGHTS, CARD} <= hub.files(REPO).keys()


@pytest.mark.filterwarnings("ignore:Not enough free disk space")
def test_pushing_reads_the_card_that_is_there(hub, disk, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(disk.path / "cache"))
    jaxadapt.save(small.trained(), tmp_path / "out")
    hub.put(REPO, {CARD: b"# Mine\n" + b"x" * 700_000})
    before = hub.files(REPO)
    disk.fill()
    with pytest.raises(jaxadapt.FileError, match=rf"push to hf://{REPO}.*{SAID[disk.kind]}"):
        jaxadapt.push(tmp_path / "out", REPO, token=hub_server.WRITE, card=jaxadapt.Card(picture=False))
    assert hub.files(REPO) == before
    disk.grow()
    jaxadapt.push(tmp_path / "out", REPO, token=hub_server.WRITE, card=jaxadapt.Card(picture=False))
    assert b"# Mine" in hub.files(REPO)[CARD]
    assert hub.files(REPO)[WEIGHTS] == (tmp_path / "out" / WEIGHTS).read_bytes()
