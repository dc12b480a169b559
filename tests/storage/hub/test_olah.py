"""Against olah, a Hub that others wrote: read-only, over a git repository on this disk."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants

import jaxadapt
from tests.storage.hub.conftest import turned_to
from tests.support import small
from tests.support.small import CARD, CONFIG, WEIGHTS

OLAH = shutil.which("olah-cli", path=str(Path(sys.executable).parent)) or shutil.which("olah-cli")
pytestmark = [
    pytest.mark.network,
    pytest.mark.skipif(OLAH is None, reason="needs olah, of the extra `test`"),
]
REPO = "org/tuned"


def git(folder: Path, *args: str) -> str:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", *args]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """Two adapters, the second in a subfolder; a tag on the first commit, and a branch with a third adapter."""
    root = tmp_path_factory.mktemp("olah")
    folder = root / "mirrors" / "models" / REPO
    folder.mkdir(parents=True)
    git(folder, "init", "-q", "-b", "main")

    def commit(model, path, name="default"):
        jaxadapt.save(model, path, name=name, base_model="org/base")
        git(folder, "add", ".")
        git(folder, "commit", "-q", "-m", "an adapter")
        return git(folder, "rev-parse", "HEAD")

    (folder / "model.safetensors").write_bytes(b"x" * 1000)  # whatever else is there
    first = commit(small.trained(seed=1), folder)
    git(folder, "tag", "v1")
    commit(small.trained(seed=2, name="fr"), folder, "fr")
    git(folder, "checkout", "-q", "-b", "step-2")
    commit(small.trained(seed=3), folder)
    git(folder, "checkout", "-q", "-b", "bare", "main")  # in the old format, and without a card
    git(folder, "rm", "-q", CARD)
    git(folder, "mv", WEIGHTS, "adapter_model.bin")
    git(folder, "commit", "-q", "-m", "older")
    git(folder, "checkout", "-q", "main")
    return root, first


@pytest.fixture(scope="module")
def address(repository):
    root, _ = repository
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (root / "olah.toml").write_text(
        f'[basic]\nhost = "127.0.0.1"\nport = {port}\nrepos-path = {json.dumps(str(root / "repos"))}\n'
        f"mirrors-path = [{json.dumps(str(root / 'mirrors'))}]\n[accessibility]\noffline = true\n"
    )
    command = [OLAH, "-c", str(root / "olah.toml"), "--log-path", str(root / "logs")]
    with (root / "out.txt").open("wb") as out, subprocess.Popen(command, cwd=root, stdout=out, stderr=out) as olah:
        url = f"http://127.0.0.1:{port}"
        try:
            for _ in range(300):
                try:
                    urllib.request.urlopen(f"{url}/api/models/{REPO}/revision/main", timeout=5).close()
                    break
                except OSError:
                    assert olah.poll() is None, (root / "out.txt").read_text()
                    time.sleep(0.2)
            else:
                raise AssertionError((root / "out.txt").read_text())
            yield url
        finally:
            olah.kill()


@pytest.fixture
def olah(address, monkeypatch, tmp_path):
    turned_to(monkeypatch, address, tmp_path / "cache")
    yield address
    huggingface_hub.close_session()


def test_adapters_are_loaded_by_address(olah, repository):
    _, first = repository
    places = {
        f"hf://{REPO}": 1, f"hf://{REPO}@v1": 1, f"hf://{REPO}@{first}": 1, f"hf://{REPO}@step-2": 3,
        f"hf://{REPO}/fr": 2,
    }  # fmt: skip
    for place, seed in places.items():
        found = jaxadapt.extract(jaxadapt.load(place, small.net()))
        assert small.same(found, jaxadapt.extract(small.trained(seed=seed))), place
    both = jaxadapt.load(f"hf://{REPO}", small.net())
    jaxadapt.load(f"hf://{REPO}", both, name="fr")
    assert np.array_equal(
        jaxadapt.to_peft(both, name="fr").tensors["base_model.model.q_proj.lora_A.weight"],
        jaxadapt.to_peft(small.trained(seed=2)).tensors["base_model.model.q_proj.lora_A.weight"],
    )


def test_only_the_adapter_is_fetched_and_then_served_offline(olah, repository, monkeypatch):
    root, _ = repository
    folder = jaxadapt.pull(REPO)
    assert {p.name for p in folder.iterdir()} == {CONFIG, WEIGHTS, CARD}
    here = root / "mirrors" / "models" / REPO
    assert all((folder / name).read_bytes() == (here / name).read_bytes() for name in (CONFIG, WEIGHTS, CARD))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert jaxadapt.pull(REPO) == folder


def test_what_need_not_be_there(olah):
    """Of what is not there, olah says that there is no such repository."""
    named = jaxadapt.load(f"hf://{REPO}", small.net(), name="de")  # no such subfolder: the root
    assert small.same(jaxadapt.extract(named, name="de"), jaxadapt.extract(small.trained(seed=1)))
    assert {p.name for p in jaxadapt.pull(f"{REPO}@bare").iterdir()} == {CONFIG, "adapter_model.bin"}


def test_what_is_not_there_is_said(olah):
    for place in ("hf://org/nowhere", f"hf://{REPO}@v9", f"hf://{REPO}/de"):
        with pytest.raises(jaxadapt.FileError, match=f"{place}: cannot read it: there is no such repository"):
            jaxadapt.load(place, small.net())
    with pytest.raises(jaxadapt.FileError, match=rf"hf://{REPO}: cannot push to it"):
        jaxadapt.push(jaxadapt.pull(REPO), REPO, token="hf_any", card=jaxadapt.Card(picture=False))
