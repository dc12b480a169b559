"""A folder in which every flush and every renaming fails in turn: wholly old, wholly new, or the error says which."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

import jaxadapt
from jaxadapt import FileError
from jaxadapt.persistence.formats import Wanted
from jaxadapt.persistence.formats import peft_folder as folder
from jaxadapt.storage import safetensors
from tests.support import small
from tests.support.small import CARD, CONFIG, LORA, WEIGHTS

ROOT = Path(__file__).resolve().parents[2]
OLD, NEW = small.adapter(), small.adapter(LORA.replace(lora_alpha=1), seed=9)
Save = Callable[[jaxadapt.Adapter, Path], None]


def save_as_several_processes_do(adapter: jaxadapt.Adapter, path: Path) -> None:
    tensors = jaxadapt.to_peft(adapter)
    tensors = jaxadapt.PeftTensors(tensors.config.replace(inference_mode=True), tensors.tensors)

    def put(writer: Any, specs: Any, metadata: Any) -> safetensors.Header:
        return safetensors.write_to(writer, specs, lambda key: np.asarray(tensors.tensors[key]), metadata)

    folder.write_folder(tensors, path, Wanted("safetensors"), None, put)


WAYS: list[Save] = [jaxadapt.save, save_as_several_processes_do]


def pair(path: Path) -> tuple[bytes, bytes] | None:
    """The two files that belong together."""
    held = [path / CONFIG, path / WEIGHTS]
    return (held[0].read_bytes(), held[1].read_bytes()) if all(p.exists() for p in held) else None


def expected(path: Path, adapter: jaxadapt.Adapter) -> tuple[bytes, bytes]:
    jaxadapt.save(adapter, path)
    found = pair(path)
    assert found is not None
    return found


def without_digest(found: tuple[bytes, bytes] | None) -> tuple[bytes, bytes] | None:
    """With the digest of the JSON that was replaced blank, as it is after a save that was not cut short."""
    if found is None:
        return None
    size = int.from_bytes(found[1][:8], "little") + 8
    header = json.loads(found[1][8:size])
    own = json.loads(header["__metadata__"]["jaxadapt"])
    return found[0], found[1].replace(own["replaces"].encode(), b"0" * 64)


class Failing:
    """Calls of one function, of which the `nth` fails, or all from there on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, nth: int, on: bool, number: int) -> None:
        self.calls, self.failed = 0, False
        real = getattr(owner, name)

        def call(*args: Any, **more: Any) -> Any:
            self.calls += 1
            if self.calls == nth or (on and self.calls > nth):
                self.failed = True
                raise OSError(number, os.strerror(number))
            return real(*args, **more)

        monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize("first", [False, True], ids=["over another", "first"])
@pytest.mark.parametrize("on", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("save", WAYS, ids=["alone", "together"])
@pytest.mark.parametrize(("owner", "name"), [(os, "fsync"), (Path, "replace"), (os, "close"), (os, "dup")])
def test_every_call_fails_in_its_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, save: Save, on: bool, first: bool
) -> None:
    new = expected(tmp_path / "new", NEW)
    old = None if first else expected(tmp_path / "old", OLD)
    seen: set[str] = set()
    for nth in range(1, 100):
        target = tmp_path / f"{nth}" / "below"
        if not first:
            jaxadapt.save(OLD, target)
        said = ""
        with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            failing = Failing(patch, owner, name, nth, on, errno.EIO)
            try:
                save(NEW, target)
            except FileError as error:
                said = str(error)
        warned = [str(w.message) for w in caught]
        found = without_digest(pair(target))
        if not said:  # all that failed was the card, or what says nothing of the data
            assert found == new
            assert not warned or all("model card" in text for text in warned)
            seen.add("warned" if warned else "nothing")
        elif "the new file" in said:
            assert found == new
            seen.add("new")
        elif "already in" in said:  # the way back failed as well
            assert (name, on) == ("replace", True)
            assert f"already in {target / WEIGHTS}, and not in {target / CONFIG}" in said
            seen.add("apart")
        else:
            assert found == old, said
            assert not first or not target.parent.exists()
            assert first or "untouched" in said
            seen.add("old")
        if target.exists():
            assert {p.name for p in target.iterdir()} <= {CONFIG, WEIGHTS, CARD}
        if not failing.failed:
            break
    else:
        raise AssertionError("it never ended")
    if name != "close":
        assert {"old", "warned"} <= seen
    assert ("new" in seen) == (name == "fsync")


def test_what_cannot_be_put_back_is_said_and_still_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration is the weights' own, as after a save that was killed; the next save mends the folder."""
    jaxadapt.save(OLD, tmp_path)
    with monkeypatch.context() as patch:
        Failing(patch, Path, "replace", 2, True, errno.EIO)
        with pytest.raises(FileError, match=rf"already in {tmp_path / WEIGHTS}, and not in {tmp_path / CONFIG}; write"):
            jaxadapt.save(NEW, tmp_path)
    with pytest.warns(UserWarning, match="interrupted"):
        assert jaxadapt.read(tmp_path).config.lora_alpha == 1
    jaxadapt.save(NEW, tmp_path)
    assert pair(tmp_path) == expected(tmp_path / "other", NEW)


def test_without_hard_links_the_error_says_what_is_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jaxadapt.save(OLD, tmp_path)
    with monkeypatch.context() as patch:
        Failing(patch, os, "link", 1, True, errno.EPERM)
        Failing(patch, Path, "replace", 2, False, errno.EIO)
        with pytest.raises(FileError, match=f"already in {tmp_path / WEIGHTS}, and not in"):
            jaxadapt.save(NEW, tmp_path)


def test_an_interrupt_between_the_two_files_puts_back_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = expected(tmp_path, OLD)
    real, calls = Path.replace, list[Path]()

    def stop(self: Path, target: Any) -> Path:
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            jaxadapt.save(NEW, tmp_path)
    assert pair(tmp_path) == old
    assert {p.name for p in tmp_path.iterdir()} == {CONFIG, WEIGHTS, CARD}


@pytest.mark.parametrize("save", WAYS, ids=["alone", "together"])
def test_both_files_are_flushed_then_renamed_then_their_folder_is_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: Save
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def spy_fsync(fd: int) -> None:
        path = Path(f"/proc/self/fd/{fd}").readlink()
        events.append("file" if path.is_file() else path.name)
        fsync(fd)

    def spy_replace(self: Path, target: Any) -> Path:
        events.append(f"-> {Path(target).name}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(Path, "replace", spy_replace)
    target = tmp_path / "a" / "b"
    both = ["file", "file", f"-> {WEIGHTS}", f"-> {CONFIG}", "b"]
    card = ["file", f"-> {CARD}", "b"]
    save(OLD, target)
    assert sorted(events[:2]) == sorted(["a", tmp_path.name])  # the folders that were made
    assert events[2:] == both + card
    events.clear()
    save(NEW, target)
    assert events == both + card


def test_between_the_two_renames_jaxadapt_reads_the_new_adapter_and_others_read_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, killed, replace = tmp_path / "run", tmp_path / "killed", Path.replace
    jaxadapt.save(OLD, run)

    def copy(self: Path, target: Any) -> Path:
        if Path(target).name == CONFIG:
            shutil.copytree(run, killed)
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", copy)
        jaxadapt.save(NEW, run)
    with pytest.warns(UserWarning, match=r"interrupted after the weights(.|\n)*save again"):
        found = jaxadapt.read(killed)
    assert found.config.lora_alpha == NEW.config.lora_alpha
    new = jaxadapt.to_peft(NEW).tensors
    assert all(np.array_equal(x, new[key]) for key, x in found.tensors.items())
    assert json.loads((killed / CONFIG).read_text())["lora_alpha"] == OLD.config.lora_alpha  # what PEFT takes


def test_a_set_of_shards_is_put_back_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model in several files: those that were renamed already go again, and the old set is whole."""
    base = {"q_proj": {"kernel": np.ones((4, 6), "f4")}, "up_proj": {"kernel": np.ones((4, 6), "f4")}}
    jaxadapt.export.export_base(base, tmp_path, keymap=TABLE, max_shard_size=100)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for nth in (1, 2, 3):
        with monkeypatch.context() as patch:
            Failing(patch, Path, "replace", nth, False, errno.EIO)
            with pytest.raises(FileError, match="untouched"):
                jaxadapt.export.export_base(base, tmp_path, keymap=TABLE, max_shard_size=100)
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


TABLE = jaxadapt.KeyMap("plain", (jaxadapt.Weight("{path}.kernel", "{path}.weight", "i o -> o i"),))


def test_in_a_store_the_error_says_what_is_where(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is put back there, and each file is put as a whole."""
    place, store = "memory://faults/adapter", fsspec.get_filesystem_class("memory")
    jaxadapt.save(OLD, place)
    put, calls = store.put_file, list[str]()

    def refuse(self: Any, local: str, remote: str, **options: Any) -> None:
        calls.append(next(name for name in (WEIGHTS, CONFIG, CARD) if f"/{name}" in remote))
        if len(calls) == 2:
            raise OSError("the connection failed")
        put(self, local, remote, **options)

    with monkeypatch.context() as patch:
        patch.setattr(store, "put_file", refuse)
        with pytest.raises(FileError, match=rf"connection failed; .* already in {place}/{WEIGHTS}, and not in {place}"):
            jaxadapt.save(NEW, place)
    assert calls == [WEIGHTS, CONFIG]
    with pytest.warns(UserWarning, match="interrupted"):
        assert jaxadapt.read(place).config.lora_alpha == 1


# ---- a reader beside a saver -------------------------------------------------------------------------------


def test_a_reader_beside_a_saving_loop_is_told_nothing(tmp_path: Path) -> None:
    """Each read is one whole adapter, with the alpha it was saved with, and without a warning."""
    program = (
        "import sys, jaxadapt; from tests.support import small; from tests.support.small import LORA\n"
        "both = [small.adapter(LORA.replace(lora_alpha=a), seed=a) for a in (1, 2)]\n"
        "print('ready', flush=True)\n"
        "while True: [jaxadapt.save(one, sys.argv[1]) for one in both]\n"
    )
    values: dict[float, dict[str, Any]] = {}
    for alpha in (1, 2):
        jaxadapt.save(small.adapter(LORA.replace(lora_alpha=alpha), seed=alpha), tmp_path / "one")
        values[alpha] = jaxadapt.read(tmp_path / "one").tensors
    jaxadapt.save(small.adapter(LORA.replace(lora_alpha=1), seed=1), tmp_path / "run")
    saver = subprocess.Popen([sys.executable, "-c", program, tmp_path / "run"], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert saver.stdout is not None
        assert saver.stdout.readline()
        seen: list[int] = []
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(300):
                found = jaxadapt.read(tmp_path / "run")
                alpha = found.config.lora_alpha
                assert all(np.array_equal(x, values[alpha][key]) for key, x in found.tensors.items())
                seen.append(alpha)
                jaxadapt.inspect(tmp_path / "run")
                jaxadapt.read_config(tmp_path / "run")
        assert set(seen) == {1, 2}
    finally:
        saver.kill()
        saver.wait()
        assert saver.stdout is not None
        saver.stdout.close()


def test_a_save_that_ends_while_the_reader_looks_again_is_no_interrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The JSON takes its place between two looks of the reader, which no save between two processes can time."""
    jaxadapt.save(OLD, tmp_path)
    before = (tmp_path / CONFIG).read_bytes()
    small.save_without_end(NEW, tmp_path)
    after = (tmp_path / CONFIG).read_bytes()
    (tmp_path / CONFIG).write_bytes(before)
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            (tmp_path / CONFIG).write_bytes(after)

    monkeypatch.setattr(time, "sleep", sleep)
    assert jaxadapt.read(tmp_path).config.lora_alpha == 1
    assert len(waited) == 3
    assert sum(waited) < 1


# ---- the model card ----------------------------------------------------------------------------------------


def odd_card(path: Path, kind: str) -> None:
    if kind == "a folder":
        path.mkdir()
    elif kind == "not UTF-8":
        path.write_bytes("Ein Adapter für Übersetzer".encode("latin-1"))
    else:
        path.write_text("mine")


@pytest.mark.parametrize("kind", ["a folder", "not UTF-8", "no text can be made"])
def test_a_card_that_cannot_be_written_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    jaxadapt.save(OLD, tmp_path / "run")
    (tmp_path / "run" / CARD).unlink()
    odd_card(tmp_path / "run" / CARD, kind)
    if kind == "no text can be made":
        monkeypatch.setattr(folder.consumers, "refresh_card", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match=rf"run is saved, but not its model card: .*{'zero' if '1' in kind else ''}"):
        jaxadapt.save(NEW, tmp_path / "run")
    assert pair(tmp_path / "run") == expected(tmp_path / "other", NEW)
    if kind == "not UTF-8":
        assert (tmp_path / "run" / CARD).read_bytes().decode("latin-1").endswith("Übersetzer")


def test_a_card_that_is_a_link_is_a_persons(tmp_path: Path) -> None:
    jaxadapt.save(OLD, tmp_path)
    (tmp_path / CARD).unlink()
    (tmp_path / CARD).symlink_to("nowhere")
    jaxadapt.save(NEW, tmp_path)
    assert (tmp_path / CARD).readlink() == Path("nowhere")
