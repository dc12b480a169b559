"""push, pull and hf:// addresses against a Hub on loopback, through the real client."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import yaml
from huggingface_hub import constants
from safetensors.numpy import save

import jaxadapt
from jaxadapt.persistence import consumers
from jaxadapt.storage import hub as door
from jaxadapt.storage import location
from jaxadapt.storage.hub import client_bars
from tests.support import hub_server, small
from tests.support.small import CARD, CONFIG, WEIGHTS

pytestmark = pytest.mark.network

REPO = "org/tuned"


@pytest.fixture
def saved(tmp_path) -> Path:
    jaxadapt.save(small.trained(), tmp_path / "out", base_model="org/base")
    return tmp_path / "out"


def contents(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir()}


def pushed(hub: hub_server.Hub, source, repo=REPO, card=None, **options) -> Any:
    card = dataclasses.replace(card or jaxadapt.Card(), picture=False)
    return jaxadapt.push(source, repo, token=hub_server.WRITE, card=card, **options)


# ---- there and back ----------------------------------------------------------------------------------------


def test_what_is_pushed_is_pulled(hub, saved):
    (saved / "notes.txt").write_text("mine alone")
    (saved / "checkpoint").mkdir()
    where = pushed(hub, saved)
    files = hub.files(REPO)
    assert set(files) == {CONFIG, WEIGHTS, CARD, ".gitattributes"}
    assert hub.repos[REPO].messages == ["initial commit", "LORA adapter, saved by jaxadapt"]  # one commit
    assert where.url.startswith(hub.url)
    back = jaxadapt.pull(REPO)
    assert contents(back) == {name: files[name] for name in (CONFIG, WEIGHTS, CARD)}
    assert {name: files[name] for name in (CONFIG, WEIGHTS)} == {n: (saved / n).read_bytes() for n in (CONFIG, WEIGHTS)}
    assert where.address == f"hf://{REPO}@{hub.repos[REPO].refs['main']}"


def test_a_model_is_pushed_and_loaded_by_address(hub, tmp_path):
    model = small.trained()
    where = pushed(hub, model, base_model="org/base")
    again = jaxadapt.load(where.address, small.net())
    assert small.same(jaxadapt.extract(model), jaxadapt.extract(again))
    assert np.array_equal(model(small.X), again(small.X))
    variables = jaxadapt.load(f"hf://{REPO}", small.base())
    assert small.same(jaxadapt.extract(variables), jaxadapt.extract(model))


def test_tensors_are_pushed(hub, saved):
    pushed(hub, jaxadapt.read(saved))
    assert hub.files(REPO)[WEIGHTS] == (saved / WEIGHTS).read_bytes()
    with pytest.raises(jaxadapt.AttachError, match="base_model: applies to models only"):
        pushed(hub, jaxadapt.read(saved), base_model="org/other")


def test_only_the_adapters_files_are_fetched(hub, saved):
    hub.put(REPO, {**contents(saved), "model.safetensors": b"x" * 1000, "optimizer.pt": b"y", "fr/" + CONFIG: b"{}"})
    jaxadapt.load(f"hf://{REPO}", small.net())
    assert {path.rpartition("/")[2] for path in hub.asked("GET", "resolve")} == {CONFIG, WEIGHTS}
    hub.requests.clear()
    jaxadapt.read_config(f"hf://{REPO}")
    assert not hub.asked("GET")  # from the cache, after a look whether it is new
    assert len(hub.asked("HEAD")) == 1


def test_read_config_has_the_configuration_of_the_tensors_program(hub, saved):
    """Tinker's files have PEFT's names, and a configuration that may look like PEFT's."""
    tensors = {
        f"base_model.model.{module}.lora_{side}.weight": np.ones(shape, "f4")
        for module, out in (("model.layers.0.self_attn.q_proj", 6), ("model.unembed_tokens", 9))
        for side, shape in (("A", (2, 4)), ("B", (out, 2)))
    }
    config = {"peft_type": "LORA", "target_modules": "all-linear", "r": 2, "lora_alpha": 6}
    hub.put(REPO, {CONFIG: json.dumps(config).encode(), WEIGHTS: save(tensors)})
    found = jaxadapt.read_config(f"hf://{REPO}")
    assert found == jaxadapt.read(f"hf://{REPO}").config
    assert found.target_modules == ("lm_head", "q_proj")


def test_read_config_fetches_only_the_configuration(hub, saved):
    hub.put(REPO, {CONFIG: contents(saved)[CONFIG]})  # there are no weights
    assert jaxadapt.read_config(f"hf://{REPO}").r == jaxadapt.read_config(saved).r


def test_inspect_read_and_read_config_take_addresses(hub, saved):
    hub.put(REPO, contents(saved))
    there, here = f"hf://{REPO}", saved
    assert jaxadapt.inspect(there).tensors == jaxadapt.inspect(here).tensors
    assert jaxadapt.inspect(there).path == there
    assert jaxadapt.read_config(there).to_dict() == jaxadapt.read_config(here).to_dict()
    a, b = jaxadapt.read(there), jaxadapt.read(here)
    assert {k: v.tobytes() for k, v in a.tensors.items()} == {k: v.tobytes() for k, v in b.tensors.items()}


def test_a_bin_is_fetched_where_there_is_no_safetensors(hub, saved):
    held = contents(saved)
    hub.put(REPO, {CONFIG: held[CONFIG], "adapter_model.bin": b"PK"})
    assert set(contents(jaxadapt.pull(REPO))) == {CONFIG, "adapter_model.bin"}
    pushed(hub, saved)  # what readers would take is what was pushed
    assert "adapter_model.bin" not in hub.files(REPO)
    assert len(hub.repos[REPO].messages) == 2


def test_mlx_folders_are_fetched_and_read(hub, tmp_path):
    folder = Path(__file__).parents[2] / "persistence" / "recorded_mlx" / "lora"
    held = contents(folder)
    hub.put(REPO, {**held, "0000100_adapters.safetensors": held["adapters.safetensors"]})
    assert jaxadapt.inspect(f"hf://{REPO}").tensors == jaxadapt.inspect(folder).tensors
    assert {path.rpartition("/")[2] for path in hub.asked("GET", "resolve")} == set(held)
    assert jaxadapt.read_config(f"hf://{REPO}") == jaxadapt.read_config(folder)
    with pytest.raises(jaxadapt.FileError, match="or mlx-lm's folder, which other readers of the Hub do not know"):
        pushed(hub, folder, "org/mlx")


def test_several_adapters_share_a_repository_as_in_peft(hub, tmp_path):
    first = small.trained()
    pushed(hub, first)
    french = small.trained(seed=7, name="fr")
    pushed(hub, french, name="fr")
    assert {p for p in hub.files(REPO) if "/" in p} == {f"fr/{n}" for n in (CONFIG, WEIGHTS, CARD)}
    both = jaxadapt.load(f"hf://{REPO}", small.net())
    jaxadapt.load(f"hf://{REPO}", both, name="fr")
    assert small.same(jaxadapt.extract(both), jaxadapt.extract(first))
    assert small.same(jaxadapt.extract(both, name="fr"), jaxadapt.extract(french, name="fr"))
    alone = jaxadapt.load(f"hf://{REPO}/fr", small.net())
    assert small.same(jaxadapt.extract(alone), jaxadapt.extract(french, name="fr"))
    named = jaxadapt.load(f"hf://{REPO}", small.net(), name="other")  # no such subfolder: the root, as with folders
    assert small.same(jaxadapt.extract(named, name="other"), jaxadapt.extract(first))


def test_branches_tags_commits_and_pull_requests(hub, saved, tmp_path):
    first = pushed(hub, saved, tag="v1")
    jaxadapt.save(small.trained(seed=9), tmp_path / "two", base_model="org/base")
    pushed(hub, tmp_path / "two", f"{REPO}@feature%2Ftwo", commit_message="step 2")
    pr = pushed(hub, tmp_path / "two", create_pr=True)
    old, new = ((at / WEIGHTS).read_bytes() for at in (saved, tmp_path / "two"))
    assert hub.repos[REPO].messages[-2] == "step 2"
    assert pr.url.endswith("/discussions/1")
    for address, want in {
        f"hf://{REPO}": old, f"{REPO}@v1": old, first.address: old, f"{REPO}@main": old,
        f"hf://{REPO}@feature%2Ftwo": new, f"{REPO}@refs/pr/1": new, pr.address: new,
    }.items():  # fmt: skip
        assert (jaxadapt.pull(address) / WEIGHTS).read_bytes() == want, address


def test_the_checkpoints_of_a_run_are_branches_and_its_best_is_a_tag(hub, tmp_path):
    with jaxadapt.CheckpointManager(tmp_path / "run", minimize="loss") as manager:
        for step, loss in enumerate((0.5, 0.3, 0.4)):
            manager.save(step, small.adapter(seed=step), metrics={"loss": loss})
    for step in manager.steps:
        manager.export(step, tmp_path / str(step))
        tag = "best" if step == manager.best else None
        card = jaxadapt.Card(metrics=manager.metrics(step))
        pushed(hub, tmp_path / str(step), f"{REPO}@step-{step}", tag=tag, card=card)
    for revision, step in {"step-0": 0, "step-1": 1, "step-2": 2, "best": 1}.items():
        found = jaxadapt.read(f"hf://{REPO}@{revision}").tensors
        want = jaxadapt.to_peft(small.adapter(seed=step)).tensors
        assert {k: v.tobytes() for k, v in found.items()} == {k: np.asarray(v).tobytes() for k, v in want.items()}
    assert "| loss | 0.3 |" in (jaxadapt.pull(f"{REPO}@best") / CARD).read_text()


def test_a_tag_that_is_there_is_refused_before_anything_is_sent(hub, saved, tmp_path):
    pushed(hub, saved, tag="v1")
    jaxadapt.save(small.trained(seed=9), tmp_path / "two", base_model="org/base")
    before = hub.repos[REPO].messages.copy()
    with pytest.raises(jaxadapt.FileError, match="the tag 'v1' exists already"):
        pushed(hub, tmp_path / "two", tag="v1")
    assert hub.repos[REPO].messages == before
    pushed(hub, tmp_path / "two", tag="v2")
    assert (jaxadapt.pull(f"{REPO}@v2") / WEIGHTS).read_bytes() == (tmp_path / "two" / WEIGHTS).read_bytes()


def test_nothing_is_fetched_when_saving(hub, saved, tmp_path):
    jaxadapt.save(small.trained(), tmp_path / "again", base_model="org/base")
    jaxadapt.write(jaxadapt.read(saved), tmp_path / "more")
    assert hub.requests == []
    for refused in (lambda: jaxadapt.save(small.trained(), f"hf://{REPO}"),
                    lambda: jaxadapt.save(small.trained(), f"hf://{REPO}", format="orbax"),
                    lambda: jaxadapt.write(jaxadapt.read(saved), f"hf://{REPO}")):  # fmt: skip
        with pytest.raises(jaxadapt.FileError, match=r"upload to the Hub with jaxadapt\.push"):
            refused()
    assert hub.requests == []


def test_pushing_the_same_again_makes_no_commit(hub, saved):
    first = pushed(hub, saved)
    assert pushed(hub, saved).address == first.address
    assert len(hub.repos[REPO].commits) == 2


# ---- the cache, and no network -----------------------------------------------------------------------------


def test_the_cache_serves_offline(hub, saved, monkeypatch):
    pushed(hub, saved)
    jaxadapt.load(f"hf://{REPO}", small.net(), name="fr")
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("default", "fr"):
        assert jaxadapt.load(f"hf://{REPO}", small.net(), name=name) is not None
    assert hub.requests == []
    with pytest.raises(jaxadapt.FileError, match=r"org/other.*HF_HUB_OFFLINE=1 forbids"):
        jaxadapt.pull("org/other")
    with pytest.raises(jaxadapt.FileError, match=r"cannot push to it: HF_HUB_OFFLINE=1 forbids access.*; unset it$"):
        jaxadapt.push(saved, "org/other")
    # Whether there is a "de" nobody has looked: its absence is not made up.
    with pytest.raises(jaxadapt.FileError, match=r"tuned/de.*HF_HUB_OFFLINE=1"):
        jaxadapt.load(f"hf://{REPO}", small.net(), name="de")


def test_the_cache_serves_while_the_hub_is_down(hub, saved, monkeypatch):
    pushed(hub, saved)
    jaxadapt.pull(REPO)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    )
    assert (jaxadapt.pull(REPO) / WEIGHTS).read_bytes() == (saved / WEIGHTS).read_bytes()
    with pytest.raises(jaxadapt.FileError, match=r"org/other.*the Hub cannot be reached, and it is not in the cache"):
        jaxadapt.pull("org/other")


def test_all_files_are_of_one_commit(hub, saved, tmp_path):
    """Another push between the configuration and the weights."""
    old = hub.put(REPO, contents(saved))
    jaxadapt.save(small.trained(small.IA3), tmp_path / "new")

    def late():
        if len(hub.repos[REPO].commits) == 1:
            hub.put(REPO, contents(tmp_path / "new"))

    hub.before[WEIGHTS] = late
    assert jaxadapt.inspect(f"hf://{REPO}").config.peft_type == "LORA"
    assert len(hub.repos[REPO].commits) == 2
    assert jaxadapt.pull(f"{REPO}@{old}").name == old


def test_an_interrupted_download_goes_on(hub, saved, monkeypatch):
    big = {"base_model.model.q_proj.lora_A.weight": np.random.default_rng(0).standard_normal((2, 60_000), "f4"),
           "base_model.model.q_proj.lora_B.weight": np.ones((8, 2), "f4")}  # fmt: skip
    jaxadapt.write(jaxadapt.PeftTensors(small.LORA.replace(target_modules=["q_proj"]), big, ""), saved)
    hub.put(REPO, contents(saved))
    hub.cut[WEIGHTS] = [300_000]
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50_000)
    seen: list[tuple[str, int, int]] = []
    got = jaxadapt.pull(REPO, progress=lambda *at: seen.append(at))
    assert (got / WEIGHTS).read_bytes() == (saved / WEIGHTS).read_bytes()
    ranges = [h["range"] for m, p, h in low(hub.requests) if m == "GET" and WEIGHTS in p and "range" in h]
    assert ranges
    assert int(ranges[-1].removeprefix("bytes=").rstrip("-")) > 0  # not from the beginning
    size = len(hub.files(REPO)[WEIGHTS])
    assert [at for at in seen if at[0] == WEIGHTS][-1] == (WEIGHTS, size, size)


def low(requests):
    return [(m, p, {k.lower(): v for k, v in h.items()}) for m, p, h in requests]


def test_a_connection_that_breaks_for_good_leaves_the_cache_sound(hub, saved, monkeypatch):
    hub.put(REPO, contents(saved))
    hub.cut[WEIGHTS] = [10] * 50
    with pytest.raises(jaxadapt.FileError, match=rf"hf://{REPO}.*(connection|Consistency)") as caught:
        jaxadapt.load(f"hf://{REPO}", small.net())
    assert "try again" in str(caught.value)
    hub.cut.clear()
    assert jaxadapt.load(f"hf://{REPO}", small.net()) is not None
    assert (jaxadapt.pull(REPO) / WEIGHTS).read_bytes() == (saved / WEIGHTS).read_bytes()


def test_a_push_tells_how_much_is_sent(hub, saved):
    big = {"base_model.model.q_proj.lora_A.weight": np.zeros((2, 120_000), "f4"),
           "base_model.model.q_proj.lora_B.weight": np.ones((8, 2), "f4")}  # fmt: skip
    tensors = jaxadapt.PeftTensors(small.LORA.replace(target_modules=["q_proj"]), big, "")
    told: list[tuple[str, int, int]] = []
    pushed(hub, tensors, progress=lambda *at: told.append(at))
    files = hub.files(REPO)
    size = sum(len(files[name]) for name in (CONFIG, WEIGHTS, CARD))
    assert [at for at in told if at[0] == "save"][-1] == ("save", 960_064, 960_064)
    done = [at[1] for at in told if at[0] == "upload"]
    assert {at[2] for at in told if at[0] == "upload"} == {size}
    assert (done[0], done[-1]) == (0, size)
    assert done == sorted(done)
    assert len(set(done)) > 5  # not only at its end
    told.clear()
    hub.hangs_up.add("/lfs/")
    with pytest.raises(jaxadapt.FileError, match="the connection failed"):
        pushed(hub, saved, repo="org/second", progress=lambda *at: told.append(at))
    assert told[-1][1] < told[-1][2]


def test_an_exception_of_the_function_ends_a_push_and_a_pull(hub, saved):
    """And leaves Hub and cache as they were."""

    class Enough(Exception):
        pass

    def stop(what, done, total):
        if done:
            raise Enough

    hub.put(REPO, {"x": b""})
    with pytest.raises(Enough):
        pushed(hub, saved, progress=stop)
    assert set(hub.files(REPO)) == {"x"}
    hub.put(REPO, contents(saved))
    for fetch in (lambda: jaxadapt.pull(REPO, progress=stop), lambda: jaxadapt.read(f"hf://{REPO}", progress=stop)):
        with pytest.raises(Enough):
            fetch()
    assert contents(jaxadapt.pull(REPO)) == contents(saved)


def test_loading_an_address_tells_of_what_is_fetched_and_then_of_what_is_loaded(hub, saved):
    hub.put(REPO, contents(saved))
    told: list[tuple[str, int, int]] = []
    jaxadapt.load(f"hf://{REPO}", small.net(), progress=lambda *at: told.append(at))
    assert list(dict.fromkeys(at[0] for at in told)) == [CONFIG, WEIGHTS, "load"]
    assert all(at[1] == at[2] for at in {at[0]: at for at in told}.values())
    jaxadapt.read(f"hf://{REPO}", progress=lambda *at: told.append(at))
    assert told[-1][0] == "read"


# ---- who may ----------------------------------------------------------------------------------------------


def test_private_repositories_need_the_token(hub, saved, monkeypatch):
    pushed(hub, saved, private=True)
    assert hub.repos[REPO].private
    with pytest.raises(jaxadapt.FileError, match=r"gives no access to it.*check the name, or log in: `hf auth login`"):
        jaxadapt.pull(REPO)
    assert jaxadapt.pull(REPO, token=hub_server.READ).is_dir()
    monkeypatch.setenv("HF_TOKEN", hub_server.READ)
    assert jaxadapt.load(f"hf://{REPO}", small.net()) is not None


def test_private_is_not_ignored_where_the_repository_is_public(hub, saved):
    hub.put(REPO, {"x": b""})
    with pytest.raises(jaxadapt.FileError, match="private=True, but the repository exists and is public"):
        pushed(hub, saved, private=True)
    assert set(hub.files(REPO)) == {"x"}


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, r"requires a login.*hf auth login"),
        ("hf_wrong", r"requires a login.*Invalid credentials.*give another token"),
        (hub_server.READ, r"lacks the permission.*right to write.*give another token"),
        (True, r"token=True, but no token is stored.*hf auth login"),
    ],
)
def test_no_token_or_a_wrong_one(hub, saved, token, message):
    with pytest.raises(jaxadapt.FileError, match=rf"hf://{REPO}: cannot push to it: .*{message}"):
        jaxadapt.push(saved, REPO, token=token, card=jaxadapt.Card(picture=False))
    assert not hub.repos


def test_what_is_not_there_is_said(hub, saved):
    with pytest.raises(jaxadapt.FileError, match=r"hf://org/nowhere: cannot read it: there is no such repository"):
        jaxadapt.pull("org/nowhere")
    hub.put(REPO, {"fr/" + n: d for n, d in contents(saved).items()})
    hub.repos[REPO].refs["refs/tags/v1"] = hub.repos[REPO].refs["main"]
    with pytest.raises(jaxadapt.FileError, match=r"no revision 'v2'; found main, v1"):
        jaxadapt.pull(f"{REPO}@v2")
    with pytest.raises(jaxadapt.FileError, match=r"no adapter there: expected adapter_config.json.*adapters in: fr"):
        jaxadapt.load(f"hf://{REPO}", small.net())
    hub.put("org/half", {CONFIG: contents(saved)[CONFIG]})
    with pytest.raises(jaxadapt.FileError, match=r"json and adapter_model.safetensors; found adapters in: its root"):
        jaxadapt.pull("org/half")
    hub.repos[REPO].gated = True
    with pytest.raises(jaxadapt.FileError, match=r"gated.*accept its conditions"):
        jaxadapt.pull(f"{REPO}/fr", token=hub_server.READ)


@pytest.mark.parametrize("status", [400, 500])
def test_a_hub_that_fails(hub, saved, status, monkeypatch):
    hub.answers["commit"] = status
    with pytest.raises(jaxadapt.FileError, match=rf"answered {status}.*told to"):
        pushed(hub, saved)
    assert hub.repos[REPO].messages == ["initial commit"]


@pytest.mark.parametrize("where", ["repos/create", "preupload", "/lfs/", "/commit/"])
def test_a_connection_that_breaks_while_pushing(hub, saved, where):
    """Nothing of it is seen on the Hub, and the next push makes it whole."""
    hub.put(REPO, {"x": b""})
    hub.hangs_up.add(where)
    with pytest.raises(jaxadapt.FileError, match=rf"hf://{REPO}: cannot push to it: the connection failed.*try again"):
        pushed(hub, saved)
    assert set(hub.files(REPO)) == {"x"}
    hub.hangs_up.clear()
    pushed(hub, saved)
    assert hub.files(REPO)[WEIGHTS] == (saved / WEIGHTS).read_bytes()


def test_a_broken_adapter_is_not_uploaded(hub, saved):
    (saved / WEIGHTS).write_bytes((saved / WEIGHTS).read_bytes()[:-3])
    with pytest.raises(jaxadapt.FormatError):
        pushed(hub, saved)
    assert hub.requests == []


def test_an_orbax_checkpoint_is_not_uploaded(hub, saved, tmp_path):
    jaxadapt.save(small.adapter(), tmp_path / "run", format="orbax")
    with pytest.raises(jaxadapt.FileError, match="an Orbax checkpoint"):
        pushed(hub, tmp_path / "run")
    assert hub.requests == []
    jaxadapt.write(jaxadapt.read(tmp_path / "run"), tmp_path / "folder")  # as the message says
    pushed(hub, tmp_path / "folder")
    assert WEIGHTS in hub.files(REPO)


@pytest.mark.parametrize(
    "text", ["name", "a/b/../c", "hf://datasets/org/name", "org/na me", "hf://", "org/name@/x", "/a/b"]
)
def test_addresses_that_are_none(text):
    with pytest.raises(jaxadapt.FileError):
        location.parse_hub_address(text)


# ---- the card ----------------------------------------------------------------------------------------------


def test_the_card_of_a_push(hub, saved):
    pushed(hub, saved, f"{REPO}/fr", card=jaxadapt.Card("apache-2.0", {"held-out loss": 1.5}))
    text = hub.files(REPO)[f"fr/{CARD}"].decode()
    held = huggingface_hub.ModelCard(text).data.to_dict()
    assert held == {
        "base_model": "org/base", "library_name": "peft", "license": "apache-2.0",
        "tags": ["base_model:adapter:org/base", "lora", "jax", "jaxadapt"],
    }  # fmt: skip
    loads = 'load("hf://org/tuned/fr", model)', '"org/tuned", subfolder="fr")', "vllm serve org/base"
    for piece in (*loads, "| held-out loss | 1.5 |"):
        assert piece in text
    assert not consumers.is_edited(text)


def test_a_picture_goes_with_the_card(hub, saved):
    jaxadapt.push(saved, REPO, token=hub_server.WRITE, card=jaxadapt.Card(picture=True))
    files = hub.files(REPO)
    assert files["adapter_norms.png"].startswith(b"\x89PNG")
    assert "](adapter_norms.png)\n\nLayer by module: " in files[CARD].decode()  # shown, and explained
    commits = len(hub.repos[REPO].commits)
    jaxadapt.push(saved, REPO, token=hub_server.WRITE, card=jaxadapt.Card(picture=True))
    assert len(hub.repos[REPO].commits) == commits  # drawn alike
    oft = jaxadapt.Config.from_dict({"peft_type": "OFT", "target_modules": ["q"], "oft_block_size": 2})
    held = jaxadapt.PeftTensors(oft, {"base_model.model.q.oft_R.weight": np.ones((2, 1), "f4")}, "")
    with pytest.raises(jaxadapt.ConfigError, match="OFT"):
        jaxadapt.push(held, "org/oft", token=hub_server.WRITE, card=jaxadapt.Card(picture=True))
    jaxadapt.push(held, "org/oft", token=hub_server.WRITE)
    assert "adapter_norms.png" not in hub.files("org/oft")


def test_a_persons_card_on_the_hub_stays(hub, saved):
    pushed(hub, saved)
    mine = hub.files(REPO)[CARD].decode().replace("## Use it", "## Mine\n\nI wrote this.\n\n## Use it")
    mine = mine.replace("library_name: peft\n", "license: mit\n")
    hub.put(REPO, {CARD: mine.encode()})
    pushed(hub, saved, card=jaxadapt.Card(metrics={"loss": 3}))
    text = hub.files(REPO)[CARD].decode()
    assert text.split("---\n", 2)[2] == mine.split("---\n", 2)[2]
    assert yaml.safe_load(text.split("---\n")[1])["library_name"] == "peft"
    assert "license: mit" in text
    # One that nobody touched is written anew, and one that a person wrote in the folder goes to the Hub.
    hub.put(REPO, {CARD: b""})
    hub.repos[REPO].commits[hub.repos[REPO].refs["main"]].pop(CARD)
    pushed(hub, saved, card=jaxadapt.Card(metrics={"loss": 3}))
    pushed(hub, saved, card=jaxadapt.Card(metrics={"loss": 4}))
    assert "| loss | 4 |" in hub.files(REPO)[CARD].decode()
    (saved / CARD).write_text("# All mine\n")
    pushed(hub, saved)
    assert hub.files(REPO)[CARD].decode().endswith("---\n\n# All mine\n")
    assert (saved / CARD).read_text() == "# All mine\n"
    (saved / CARD).write_text("# All mine, second edition\n")
    pushed(hub, saved)
    assert "second edition" in hub.files(REPO)[CARD].decode()


def test_a_card_the_hub_refuses_is_said(hub, saved):
    (saved / CARD).write_text("---\nlicense: [a, b]\n---\n# mine\n")
    with pytest.raises(jaxadapt.FileError, match="license"):
        pushed(hub, saved)
    assert CARD not in hub.files(REPO)


# ---- PEFT ---------------------------------------------------------------------------------------------------


@pytest.mark.peft
def test_peft_pulls_what_we_pushed_and_the_reverse(hub, tmp_path, monkeypatch):
    import peft
    import torch

    class Tiny(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.q_proj, self.up_proj = torch.nn.Linear(6, 8), torch.nn.Linear(8, 6)

        def forward(self, x):
            return self.up_proj(torch.tanh(self.q_proj(x)))

    model = small.trained(name="fr")
    pushed(hub, model, name="fr")
    loaded = peft.PeftModel.from_pretrained(Tiny(), REPO, subfolder="fr")
    state = {k.replace(".default", ""): v.numpy() for k, v in loaded.state_dict().items() if "lora" in k}
    ours = jaxadapt.to_peft(model, name="fr").tensors
    assert {k: np.asarray(v).tobytes() for k, v in ours.items()} == {k: v.tobytes() for k, v in state.items()}

    config = peft.LoraConfig(r=3, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(Tiny(), config)
    monkeypatch.setenv("HF_TOKEN", hub_server.WRITE)
    theirs.push_to_hub("org/theirs")
    back = jaxadapt.load("hf://org/theirs", small.net())
    x = theirs.state_dict()["base_model.model.q_proj.lora_A.default.weight"].numpy()
    assert np.array_equal(jaxadapt.to_peft(back).tensors["base_model.model.q_proj.lora_A.weight"], x)


def test_a_pull_request_creates_no_repository_that_is_there(hub, saved, monkeypatch):
    """Who may open a pull request may often not create a repository; one that is missing is created for it."""
    asked = []
    created = huggingface_hub.HfApi.create_repo
    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_repo", lambda self, *a, **k: asked.append(a) or created(self, *a, **k)
    )
    pushed(hub, saved, create_pr=True)
    assert len(asked) == 1
    pushed(hub, saved, create_pr=True)
    assert len(asked) == 1
    pushed(hub, saved)
    assert len(asked) == 2


def test_the_clients_bars_come_back():
    from huggingface_hub.utils import are_progress_bars_disabled

    assert not are_progress_bars_disabled()
    with contextlib.suppress(KeyError), client_bars(False):
        assert are_progress_bars_disabled()
        raise KeyError
    assert not are_progress_bars_disabled()


def test_the_first_cause_of_the_clients_errors_is_named():
    middle, outer = ValueError("while uploading"), RuntimeError("while committing")
    middle.__cause__, outer.__cause__ = OSError("the reason"), middle
    with (
        pytest.raises(jaxadapt.FileError, match="cannot read it: the reason; try again"),
        door.translate_errors(location.parse_hub_address(f"hf://{REPO}"), None),
    ):
        raise outer
