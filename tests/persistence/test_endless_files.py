"""A configuration, a card or an index that is a pipe, a device or a file without end: an error, at once."""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

import jaxadapt
from jaxadapt import ConfigError, FileError
from jaxadapt.cli import main
from tests.support import small
from tests.support.small import CARD, CONFIG, WEIGHTS

KINDS = {
    "pipe": "expected a regular file, found a device, pipe or socket",
    "device": "expected a regular file, found a device, pipe or socket",
    "endless": r"expected text of at most \d+ bytes, found 1099511627776",
}


def replaced(path: Path, kind: str) -> None:
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, 1 << 40)  # takes no room on the disk


@pytest.fixture
def held(tmp_path) -> Path:
    jaxadapt.save(small.adapter(), tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("kind", KINDS)
def test_a_configuration(held, kind):
    replaced(held / CONFIG, kind)
    for look in (jaxadapt.read, jaxadapt.inspect, jaxadapt.read_config, lambda path: jaxadapt.load(path, small.net())):
        with pytest.raises(FileError, match=f"{re.escape(str(held / CONFIG))}: cannot read: {KINDS[kind]}"):
            look(held)
    said = CliRunner().invoke(main, ["inspect", str(held)])
    assert said.exit_code == 1
    assert str(held / CONFIG) in said.stderr
    before = (held / WEIGHTS).read_bytes()
    with pytest.raises(FileError, match=KINDS[kind]):  # what it replaces is no save's to judge
        jaxadapt.save(small.adapter(), held)
    assert (held / WEIGHTS).read_bytes() == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_card_stays_as_it_is(held, kind):
    """A save leaves whatever a person put in its place."""
    replaced(held / CARD, kind)
    link = kind == "device"  # somebody's own arrangement: left without a word
    with contextlib.nullcontext() if link else pytest.warns(UserWarning, match="saved, but not its model card"):
        jaxadapt.save(small.adapter(), held)
    assert (held / CARD).is_fifo() if kind == "pipe" else not (held / CARD).is_fifo()
    assert (held / CARD).is_symlink() == (kind == "device")
    if kind == "endless":
        assert (held / CARD).stat().st_size == 1 << 40


@pytest.mark.parametrize("kind", KINDS)
def test_the_index_of_a_model(tmp_path, kind):
    replaced(tmp_path / "model.safetensors.index.json", kind)
    with pytest.raises(FileError, match=KINDS[kind]):
        jaxadapt.export.import_base(tmp_path, small.base()["params"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("option", ["--model", "family"])
def test_what_check_keymap_reads(tmp_path, kind, option):
    replaced(tmp_path / "x.py", kind)
    replaced(tmp_path / "x.json", kind)
    family, model = ("llama", "x.json") if option == "--model" else (f"{tmp_path / 'x.py'}:TABLE", "y.json")
    (tmp_path / "y.json").write_text(json.dumps({"a": [2]}))
    said = CliRunner().invoke(main, ["check-keymap", family, "--model", str(tmp_path / model)])
    assert said.exit_code == 1
    assert re.search(KINDS[kind], said.stderr), said.stderr


def test_sixteen_megabytes_are_read(held):
    """A configuration just as large as it may be."""
    text = (held / CONFIG).read_text()
    (held / CONFIG).write_text(text + " " * ((16 << 20) - len(text)))
    jaxadapt.read(held)
    (held / CONFIG).write_text(text + " " * ((16 << 20) - len(text) + 1))
    with pytest.raises(FileError, match="at most 16777216 bytes, found 16777217"):
        jaxadapt.read(held)
    (held / CONFIG).write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        jaxadapt.read(held)
