"""An array that another thread donates while it is saved is named in an error, and what was saved before stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxadapt
from jaxadapt import AttachError, FileError
from jaxadapt.storage import orbax
from tests.support import small


def donate(adapter: jaxadapt.Adapter) -> None:
    """What a jitted function with `donate_argnums` does to its argument."""
    for leaf in jax.tree.leaves(adapter):
        leaf.delete()


def once(adapter: jaxadapt.Adapter) -> Callable[[str, int, int], None]:
    """A progress function in the place of the other thread: it is called between two tensors."""
    return lambda what, done, total: donate(adapter) if 0 < done < total else None


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_an_adapter(tmp_path: Path) -> None:
    jaxadapt.save(small.adapter(), tmp_path)
    before = files(tmp_path)
    new = small.adapter(seed=5)
    said = r"(?s)lora_[AB]\.weight: the array was donated"
    with pytest.raises(AttachError, match=said):
        jaxadapt.save(new, tmp_path, progress=once(new))
    assert files(tmp_path) == before


def test_tensors_of_peft(tmp_path: Path) -> None:
    tensors = jaxadapt.to_peft(small.adapter())
    held = {key: jax.numpy.asarray(np.array(x)) for key, x in tensors.tensors.items()}
    next(iter(held.values())).delete()
    with pytest.raises(AttachError, match="the array was donated"):
        jaxadapt.write(jaxadapt.PeftTensors(tensors.config, held), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_orbax_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = small.adapter()

    def save(path: Path, *_: Any) -> None:  # what ours does then; Orbax itself leaves threads that wait for ever
        donate(adapter)
        try:
            np.asarray(jax.tree.leaves(adapter)[0])
        except RuntimeError as error:
            raise FileError(f"{path}: Orbax cannot write it") from error

    monkeypatch.setattr(orbax, "save", save)
    with pytest.raises(AttachError, match=r"(?s)donated to a jitted function.*q_proj.*lora_A"):
        jaxadapt.save(adapter, tmp_path / "new", format="orbax")
    assert not list(tmp_path.iterdir())


def test_a_step_of_training(tmp_path: Path) -> None:
    """The values are copied before `save` returns, so only arrays that were donated before it are missed."""
    adapter = small.adapter()
    with jaxadapt.CheckpointManager(tmp_path) as manager:
        manager.save(1, small.adapter())
        manager.wait()
        donate(adapter)
        with pytest.raises(AttachError, match=r"(?s)donated to a jitted function.*lora_A"):
            manager.save(2, adapter)
        assert manager.steps == [1]


def test_a_model(tmp_path: Path) -> None:
    base = jax.tree.map(jax.numpy.asarray, small.base()["params"])
    with pytest.raises(AttachError, match=r"(?s)donated to a jitted function.*kernel"):
        jaxadapt.export.export_base(base, tmp_path, keymap=TABLE, progress=once(base))
    assert not tmp_path.exists()


TABLE = jaxadapt.KeyMap(
    "plain",
    (
        jaxadapt.Weight("{path}.kernel", "{path}.weight", "i o -> o i"),
        jaxadapt.Weight("{path}.bias", "{path}.bias", "o -> o"),
    ),
)
