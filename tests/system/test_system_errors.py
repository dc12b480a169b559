"""Whatever the operating system answers, the user gets an error of this library that names the path."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxadapt
from jaxadapt import FileError
from jaxadapt.analysis import measure_norms
from jaxadapt.configs import validation
from jaxadapt.export import merge_files
from jaxadapt.storage import safetensors
from tests.support import no_rights, small
from tests.support.small import CONFIG, WEIGHTS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def told() -> Iterator[list[tuple[str, str, str, str, str]]]:
    """See no_rights.py: what each operation says of each obstacle."""
    with tempfile.TemporaryDirectory(prefix="jaxadapt-test-") as made:
        Path(made).chmod(0o755)  # pytest's own folders are open to their owner only
        try:
            run = subprocess.run(
                [sys.executable, "-m", "tests.support.no_rights", made],
                cwd=ROOT, capture_output=True, text=True, timeout=900, check=False,
            )  # fmt: skip
            assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
            lines = [line for line in run.stdout.splitlines() if line.startswith("told ")]
            yield [tuple(line) for line in json.loads(lines[0].removeprefix("told "))]
        finally:
            subprocess.run(["chmod", "-R", "u+rwx", made], check=True)


MEANT = {"long name": "File name too long", "below a long name": "File name too long"}


@pytest.mark.parametrize("obstacle", sorted({**no_rights.READING, **no_rights.WRITING}))
def test_what_is_closed_or_too_long_is_said_with_its_path(told: Any, obstacle: str) -> None:
    mine = [line for line in told if line[1] == obstacle]
    assert len(mine) >= len(no_rights.writers(Path()))
    for operation, _, path, error, message in mine:
        if (operation, obstacle) == ("save, by a name", "folder that is written to and not read"):
            assert error == "NoneType"  # its own folder is new, and may be read
            continue
        assert error == "ours", (operation, error, message)
        assert path in message, (operation, message)
        assert MEANT.get(obstacle, "Permission denied") in message, (operation, message)


# ---- errors that no folder gives ---------------------------------------------------------------------------


def broken(*_: Any, **__: Any) -> Any:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


class BadClose(io.FileIO):
    """A file that says on closing that something was wrong."""

    def close(self) -> None:
        was = self.closed
        super().close()
        if not was:
            broken()


def old_and_bin(path: Path) -> Path:
    """The same adapter as PyTorch's own file."""
    torch = pytest.importorskip("torch")
    tensors = jaxadapt.to_peft(small.adapter())
    jaxadapt.save(small.adapter(), path)
    (path / WEIGHTS).unlink()
    held = {key: torch.from_numpy(np.array(x)) for key, x in tensors.tensors.items()}
    torch.save(held, path / "adapter_model.bin")
    return path


@pytest.mark.parametrize("kind", ["safetensors", pytest.param("bin", marks=pytest.mark.peft)])
def test_an_error_of_closing_what_was_read_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    if kind == "bin":
        old_and_bin(tmp_path)
    else:
        jaxadapt.save(small.adapter(), tmp_path)
    monkeypatch.setattr(io, "FileIO", BadClose)
    assert len(jaxadapt.read(tmp_path).tensors) == 4
    assert jaxadapt.inspect(tmp_path).parameters == sum(x.size for x in small.adapter().flat().values())


def test_an_error_of_fstat_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jaxadapt.save(small.adapter(), tmp_path)
    monkeypatch.setattr(os, "fstat", broken)
    with pytest.raises(FileError, match=f"{WEIGHTS}: cannot read: Input/output error"):
        safetensors.read_header(tmp_path / WEIGHTS)
    with pytest.raises(FileError, match=r"adapter_config.json: cannot read: Input/output error"):  # what is replaced
        jaxadapt.save(small.adapter(), tmp_path)
    with pytest.raises(FileError, match=f"{WEIGHTS}: cannot write: Input/output error.*untouched"):
        jaxadapt.save(small.adapter(), tmp_path / "new")
    monkeypatch.undo()
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")]


@pytest.mark.parametrize("nth", range(1, 12))
def test_an_error_of_stat_names_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    """Each call in its turn, of reading, of writing, and of a model's folder."""
    jaxadapt.save(small.adapter(), tmp_path / "adapter")
    jaxadapt.export.export_base(no_rights.BASE, tmp_path / "base", keymap=no_rights.TABLE)
    real = Path.stat
    operations: list[Callable[[], Any]] = [
        lambda: jaxadapt.inspect(tmp_path / "adapter"),
        lambda: jaxadapt.read_config(tmp_path / "adapter"),
        lambda: jaxadapt.save(small.adapter(seed=4), tmp_path / "adapter"),
        lambda: jaxadapt.export.import_base(tmp_path / "base", no_rights.BASE, keymap=no_rights.TABLE),
        lambda: merge_files.merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"),
        lambda: jaxadapt.CheckpointManager(tmp_path / "run").save(1, small.adapter()),
    ]
    for operation in operations:
        calls: list[Path] = []

        def stat(self: Path, calls: list[Path] = calls, **options: Any) -> os.stat_result:
            if self.is_relative_to(tmp_path):
                calls.append(self)
                if len(calls) == nth:
                    broken()
            return real(self, **options)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "stat", stat)
            try:
                operation()
            except FileError as error:
                assert str(tmp_path) in str(error)  # noqa: PT017 (it may also succeed)
            except UserWarning as warning:
                assert "is saved, but not its model card" in str(warning)  # noqa: PT017


def test_old_weights_that_cannot_be_deleted_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers may take them for the new ones, so this is an error though the new ones are there."""
    jaxadapt.export.export_base(no_rights.BASE, tmp_path, keymap=no_rights.TABLE)
    monkeypatch.setattr(Path, "unlink", broken)
    with pytest.raises(
        FileError, match=r"the new weights are in place, but .* delete them yourself:\n  model\.safetensors"
    ):
        jaxadapt.export.export_base(no_rights.BASE, tmp_path, keymap=no_rights.TABLE, max_shard_size=100)
    assert (tmp_path / "model.safetensors.index.json").exists()


def test_a_working_directory_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(
        FileError, match="run: cannot find: .*; the working directory was deleted; pass an absolute path"
    ):
        jaxadapt.CheckpointManager("run")
    with pytest.raises(FileError, match="run: cannot find: .*pass an absolute path"):
        jaxadapt.save(small.adapter(), "run", format="orbax")
    with pytest.raises(FileError, match="run"):
        jaxadapt.save(small.adapter(), "run")
    monkeypatch.chdir(tmp_path)


# ---- what push reads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["a folder", "not UTF-8"])
def test_a_card_that_cannot_be_read_is_not_pushed_over(tmp_path: Path, kind: str) -> None:
    """Nothing was sent yet, and another card would go in its place: an error, where `save` has a warning."""
    jaxadapt.save(small.adapter(), tmp_path)
    (tmp_path / "README.md").unlink()
    if kind == "a folder":
        (tmp_path / "README.md").mkdir()
    else:
        (tmp_path / "README.md").write_bytes("für".encode("latin-1"))
    with pytest.raises(FileError, match=r"README\.md: .*(not UTF-8 text .invalid start byte at byte 1|Is a directory)"):
        jaxadapt.push(tmp_path, "org/name", card=jaxadapt.Card(picture=False))


# ---- headers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["shape", "data_offsets"])
def test_minus_zero_is_no_size(tmp_path: Path, where: str) -> None:
    """The format's own reader refuses it as well; a "-0" in a name is none."""
    reference = pytest.importorskip("safetensors")
    shape, offsets = ("[-0]", "[0,0]") if where == "shape" else ("[0]", "[-0,0]")
    for text, good in ((f'{{"x":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}', False),
                       ('{"x-0":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}', True)):  # fmt: skip
        raw = text.encode() + b" " * (-len(text) % 8)
        path = tmp_path / "f"
        path.write_bytes(len(raw).to_bytes(8, "little") + raw)
        if good:
            assert list(safetensors.read_header(path).tensors) == ["x-0"]
            continue
        with pytest.raises(reference.SafetensorError), reference.safe_open(str(path), "np"):
            pass
        with pytest.raises(jaxadapt.FormatError, match="expected integers >= 0, found -0"):
            safetensors.read_header(path)


# ---- configurations ----------------------------------------------------------------------------------------

ODD: list[Any] = [
    None, True, 5, -1, 1.5, "x", "(", "\ud800", [], [5], [None], ["("], ["\ud800"], [[1]], [[3, 1]], [{}],
    {}, {"q": None}, {"q": 5}, {"(": 1}, {"\ud800": 1}, {"q": "\udc00"}, {"q": {"r": []}},
]  # fmt: skip
# Of other types than LORA the fields that are read of any type, and one that nobody knows.
FIELDS = {
    "LORA": sorted(jaxadapt.LoraConfig().to_dict().keys() - {"peft_type"}),
    "IA3": sorted({*jaxadapt.IA3Config().to_dict(), *validation.COMMON, "mine"} - {"peft_type"}),
    "XLORA": sorted({*validation.COMMON, "r", "mine"}),
    "ADALORA": sorted({*validation.COMMON, "r"}),
}


@pytest.mark.parametrize(("kind", "field"), [(kind, field) for kind, fields in FIELDS.items() for field in fields])
def test_any_value_of_any_field_is_read_or_refused(tmp_path: Path, kind: str, field: str) -> None:
    """Never another exception, of whatever looks at the folder; and what is refused has its field named."""
    tensors = jaxadapt.to_peft(small.adapter(small.IA3 if kind == "IA3" else small.LORA))
    plain = tensors.config.to_dict() | {"peft_type": kind}
    # The file as PEFT would have written it: without our copy of the configuration.
    held = {key: (x.dtype, x.shape) for key, x in tensors.tensors.items()}
    safetensors.write(tmp_path / WEIGHTS, held, lambda key: np.asarray(tensors.tensors[key]), {"format": "pt"})
    looks: list[Callable[[], Any]] = [
        lambda: jaxadapt.inspect(tmp_path).modules,
        lambda: json.dumps(jaxadapt.inspect(tmp_path).to_dict(), ensure_ascii=False).encode(),
        lambda: str(jaxadapt.inspect(tmp_path)).encode(),
        lambda: jaxadapt.load(tmp_path, {"params": no_rights.BASE}),
        lambda: measure_norms(jaxadapt.read(tmp_path)),
    ]
    for value in ODD:
        (tmp_path / CONFIG).write_text(json.dumps(plain | {field: value}))
        try:
            config = jaxadapt.read_config(tmp_path)
        except jaxadapt.ConfigError as error:
            assert f"{field}" in str(error)  # noqa: PT017 (it may also be valid)
            with pytest.raises(jaxadapt.ConfigError):
                jaxadapt.inspect(tmp_path)
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for look in looks:
                with contextlib.suppress(jaxadapt.AdapterError):
                    look()
            jaxadapt.write(jaxadapt.PeftTensors(config, tensors.tensors), tmp_path / "new")


@pytest.mark.parametrize(
    ("kind", "field", "value", "said"),
    [
        ("IA3", "target_parameters", [5], "target_parameters: expected a list of strings or null"),
        ("IA3", "layer_replication", {"q": None}, r"layer_replication: expected a list of \[start, end\] pairs"),
        ("IA3", "layers_pattern", ["("], "layers_pattern: expected a regular expression"),
        ("XLORA", "layers_pattern", 5, "layers_pattern: expected a list of strings"),
        ("XLORA", "trainable_token_indices", "x", "trainable_token_indices: expected a list of integers"),
        ("LORA", "base_model_name_or_path", "org/\ud800", r"base_model_name_or_path: expected text, .*lone surrogate"),
        ("LORA", "mine", {"a": ["\ud800"]}, r"mine: a: expected text, found '\\ud800'"),
        ("LORA", "mine", {"\ud800": 1}, "lone surrogate"),
    ],
)
def test_a_value_that_nothing_can_use_is_refused_by_its_name(
    tmp_path: Path, kind: str, field: str, value: Any, said: str
) -> None:
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": kind, field: value}))
    with pytest.raises(jaxadapt.ConfigError, match=said) as caught:
        jaxadapt.read_config(tmp_path)
    assert str(tmp_path / CONFIG) in str(caught.value)


def test_half_a_character_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    jaxadapt.save(small.adapter(), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(jaxadapt.ConfigError, match="base_model_name_or_path: expected text"):
        jaxadapt.save(small.adapter(seed=3), tmp_path, base_model="org/\ud800")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
