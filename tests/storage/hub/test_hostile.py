"""A Hub, or a mirror, that means harm: nothing is written outside the cache, and the token goes nowhere else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

import jaxadapt
from jaxadapt import FileError
from tests.support import hub_server, small
from tests.support.small import CARD, CONFIG, WEIGHTS

pytestmark = pytest.mark.network

REPO = "org/tuned"


@pytest.fixture
def held(hub, tmp_path) -> dict[str, bytes]:
    """What an honest repository holds, which is on the Hub."""
    jaxadapt.save(small.trained(), tmp_path / "out", base_model="org/base")
    files = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    hub.put(REPO, files)
    return files


@pytest.fixture
def other() -> Iterator[hub_server.Hub]:
    """A server that nobody named, to which the token must not go."""
    with hub_server.serving() as served:
        yield served


def everything(folder: Path) -> set[str]:
    return {str(Path(at, name)) for at, _, names in os.walk(folder) for name in names}


def outside(tmp_path: Path) -> set[str]:
    return {path for path in everything(tmp_path) if not path.startswith(str(tmp_path / "cache") + os.sep)}


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, CARD])
@pytest.mark.parametrize("tag", ["{out}/stolen", "../../../stolen", "..", "a/b", "x" * 200, "sp ace"])
def test_an_etag_that_is_no_hash_writes_nothing(hub, held, tmp_path, name, tag):
    before = outside(tmp_path)
    tag = tag.format(out=tmp_path)
    hub.lies[name] = {"ETag": f'"{tag}"', "X-Linked-Etag": f'"{tag}"'}
    with pytest.raises(FileError, match=r"expected a hash as ETag") as caught:
        jaxadapt.pull(REPO)
    assert name in str(caught.value)
    assert not hub.asked("GET", name)
    assert outside(tmp_path) == before
    assert not any("stolen" in path for path in everything(tmp_path))


@pytest.mark.parametrize("commit", ["../../../../stolen", "{out}/stolen", "main"])
@pytest.mark.parametrize("name", [CONFIG, CARD])
def test_a_commit_that_is_a_path_writes_nothing(hub, held, tmp_path, commit, name):
    """The client notes that a file is missing in a folder called like the commit."""
    commit = commit.format(out=tmp_path)
    hub.lies[name] = {"X-Repo-Commit": commit}
    with pytest.raises(FileError, match="expected a commit"):
        jaxadapt.pull(REPO)
    hub.repos[REPO].commits[hub.repos[REPO].refs["main"]].pop(name)
    with pytest.raises(FileError, match="expected a commit"):
        jaxadapt.pull(REPO)
    assert not any("stolen" in path for path in everything(tmp_path))


@pytest.mark.parametrize("kind", ["X-Xet-Refresh-Route", "Link"])
def test_the_token_goes_to_no_other_server_for_xet(hub, other, held, monkeypatch, kind):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    route = f"{other.url}/steal"
    said = route if kind != "Link" else f'<{route}>; rel="xet-auth"'
    hub.lies[WEIGHTS] = {"X-Xet-Hash": "a" * 64, kind: said}
    with pytest.raises(FileError, match="expected a Xet address on the server that was asked"):
        jaxadapt.pull(REPO, token=hub_server.READ)
    assert not other.requests
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the way out that the error names
    assert (jaxadapt.pull(REPO, token=hub_server.READ) / WEIGHTS).read_bytes() == held[WEIGHTS]
    assert not other.requests


def test_the_token_follows_no_link_to_a_next_page(hub, other):
    hub.put(REPO, {"model.safetensors": b"x"})
    for end in ("/tree/main", f"/models/{REPO}", "/revision/main", "/refs"):
        hub.lies[end] = {"Link": f'<{other.url}/steal>; rel="next"'}
    with pytest.raises(FileError, match=r"found \.gitattributes|found model\.safetensors"):
        jaxadapt.pull(REPO, token=hub_server.READ)
    with pytest.raises(FileError, match="no revision 'nope'; found main"):
        jaxadapt.pull(f"{REPO}@nope", token=hub_server.READ)
    assert not other.requests


def test_a_configuration_without_end_is_not_fetched(hub, held):
    hub.lies[CONFIG] = {"Content-Length": str(1 << 40)}
    with pytest.raises(FileError, match="expected at most 16777216 bytes, found 1099511627776"):
        jaxadapt.pull(REPO)
    assert not hub.asked("GET", CONFIG)


def test_a_cached_file_that_is_a_link_to_elsewhere_is_refused(hub, held, tmp_path):
    folder = jaxadapt.pull(REPO)
    (tmp_path / "secret").write_bytes(held[CONFIG])
    (folder / CONFIG).unlink()
    (folder / CONFIG).symlink_to(tmp_path / "secret")
    with pytest.raises(FileError, match=r"expected a file of the cache .*secret; remove it"):
        jaxadapt.pull(REPO)


def test_a_cache_that_a_person_moved_serves_on(hub, held, tmp_path):
    first = jaxadapt.pull(REPO)
    repository = first.parents[1]
    repository.rename(tmp_path / "moved")
    repository.symlink_to(tmp_path / "moved")
    assert jaxadapt.pull(REPO) == first
    (tmp_path / "cache").rename(tmp_path / "bigger")
    (tmp_path / "cache").symlink_to(tmp_path / "bigger")
    assert (jaxadapt.pull(REPO) / CONFIG).read_bytes() == held[CONFIG]


def test_a_server_that_answers_twice_in_two_ways_is_found_out(hub, held, tmp_path, monkeypatch):
    """What remains of the client's fault (see SECURITY.md): the file is written, and is not taken for the cache's."""
    tag = f'"{tmp_path}/stolen"'

    def lie(self: hub_server.Handler) -> dict[str, str]:
        second = self.path.endswith(WEIGHTS) and len(hub.asked("HEAD", WEIGHTS)) > 1
        return {"ETag": tag, "X-Linked-Etag": tag} if second else {}

    monkeypatch.setattr(hub_server.Handler, "lie", lie)
    with pytest.raises(FileError, match=r"expected a file of the cache .*stolen; remove it"):
        jaxadapt.pull(REPO)


def test_what_is_cached_costs_one_question_a_file(hub, held):
    folder = jaxadapt.pull(REPO)
    hub.requests.clear()
    assert jaxadapt.pull(REPO) == folder
    assert len(hub.requests) == 1  # whether the branch moved; the other files are of the commit it names


def test_a_servers_words_are_shown_as_text(hub, held, tmp_path, monkeypatch):
    """In an error, in a warning that the client logs, and in what a push prints."""
    evil = "\x9b2J\x1b]0;owned\x07"

    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    env |= {
        "HF_HUB_DISABLE_XET": "1",
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": hub_server.WRITE,
    }

    def shown(*args: str) -> str:
        command = [sys.executable, "-m", "jaxadapt", *args]
        done = subprocess.run(command, env=env, capture_output=True, check=False, timeout=900)
        text = (done.stdout + done.stderr).decode()
        assert "owned" in text
        assert all(c.isprintable() or c == "\n" for c in text), ascii(text)
        return text

    hub.lies[CONFIG] = {"X-HF-Warning": f"topic; {evil}"}
    shown("pull", REPO)
    hub.lies.clear()
    hub.answers["/api/repos/create"] = 418
    hub.lies["/api/repos/create"] = {"X-Error-Message": evil}
    assert "418" in shown("push", str(tmp_path / "out"), REPO, "--no-picture")
    hub.answers.clear()
    hub.lies.clear()
    monkeypatch.setattr(hub_server.Handler, "commit_id", lambda self, oid: evil)
    shown("push", str(tmp_path / "out"), REPO, "--no-picture")
