"""A NaN or an infinity in an adapter, a base or a merged weight: refused unless it is asked for."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import jaxadapt
from jaxadapt.cli import main
from jaxadapt.export import conversion, merge_files
from tests.support import small

RNG = np.random.default_rng(0)
P = "base_model.model."


def folders(tmp_path: Path, dtype: str = "float32") -> tuple[Path, Path]:
    """A base of two weights and an adapter of one of them."""
    base = tmp_path / "base"
    base.mkdir()
    held = {f"{m}.weight": RNG.standard_normal((6, 4)).astype(dtype) for m in ("q", "v")}
    save_file(held, base / "model.safetensors")
    config = jaxadapt.LoraConfig(r=2, lora_alpha=2, target_modules=["q"])
    factors = {"A": RNG.standard_normal((2, 4)), "B": RNG.standard_normal((6, 2))}
    tensors = {f"{P}q.lora_{s}.weight": x.astype("float32") for s, x in factors.items()}
    jaxadapt.write(jaxadapt.PeftTensors(config, tensors, ""), tmp_path / "adapter")
    return base, tmp_path / "adapter"


def spoil(file: Path, key: str, value: float) -> None:
    held = {name: np.array(x) for name, x in load_file(file).items()}
    held[key].flat[-1] = value
    save_file(held, file)


def command(*args: Any) -> Any:
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_adapter_that_is_not_finite(value, tmp_path):
    base, adapter = folders(tmp_path)
    spoil(adapter / "adapter_model.safetensors", f"{P}q.lora_B.weight", value)
    ran = command("merge", base, adapter, "--out", tmp_path / "out")
    assert ran.exit_code != 0
    assert f"{adapter}: {P}q.lora_B.weight" in ran.output
    assert "--allow-nan" in ran.output
    assert not (tmp_path / "out").exists()
    assert command("merge", base, adapter, "--out", tmp_path / "out", "--allow-nan").exit_code == 0
    assert not np.isfinite(load_file(tmp_path / "out/model.safetensors")["q.weight"]).all()


def test_a_base_that_is_not_finite_says_all_its_tensors(tmp_path):
    base, adapter = folders(tmp_path)
    for key in ("q.weight", "v.weight"):  # one that the adapter changes, and one that is copied
        spoil(base / "model.safetensors", key, np.nan)
    with pytest.raises(jaxadapt.MismatchError, match=r"q\.weight, of the base\n.*v\.weight, of the base"):
        merge_files.merge_folder(base, adapter, tmp_path / "out", max_shard_size=100)
    assert not (tmp_path / "out").exists()
    merge_files.merge_folder(base, adapter, tmp_path / "out", allow_nan=True)
    assert np.isnan(load_file(tmp_path / "out/model.safetensors")["v.weight"]).sum() == 1


def test_a_sum_that_the_dtype_cannot_hold(tmp_path):
    base, adapter = folders(tmp_path)
    spoil(base / "model.safetensors", "v.weight", 1e5)
    with pytest.raises(jaxadapt.MismatchError, match=r"allow-nan(.|\n)*v\.weight$"):
        merge_files.merge_folder(base, adapter, tmp_path / "out", dtype="float16")


def test_each_tensor_is_looked_at_once(tmp_path):
    base, adapter = folders(tmp_path)
    looked: list[Any] = []

    def profile(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_name == "is_finite":
            looked.append(frame.f_locals["x"].size)

    sys.setprofile(profile)
    try:
        merge_files.merge_folder(base, adapter, tmp_path / "out")
    finally:
        sys.setprofile(None)
    assert sorted(looked) == [8, 12, 24, 24]  # A, B, q and v


def test_combining_adapters_that_are_not_finite(tmp_path):
    _, adapter = folders(tmp_path)
    spoil(adapter / "adapter_model.safetensors", f"{P}q.lora_A.weight", np.nan)
    args = ["combine", adapter, adapter, "--weights", "1,1", "--method", "cat", "--out", tmp_path / "out"]
    ran = command(*args)
    assert ran.exit_code != 0
    assert f"{P}q.lora_A.weight" in ran.output
    assert not (tmp_path / "out").exists()
    assert command(*args, "--allow-nan").exit_code == 0


def spoilt(tree: Any, value: float = np.nan) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x).at[(0,) * x.ndim].set(value), tree)


@pytest.mark.parametrize("host", [False, True])
def test_in_memory(host, tmp_path):
    adapter, base = small.adapter(), small.base()["params"]
    if host:
        adapter, base = jax.tree.map(np.asarray, (adapter, base))
    bad, ill = spoilt(adapter), spoilt(base, np.inf)
    if host:
        bad, ill = jax.tree.map(np.asarray, (bad, ill))
    for call in (jaxadapt.merge, jaxadapt.unmerge):
        with pytest.raises(jaxadapt.MismatchError, match=r"allow_nan=True(.|\n)*adapter: q_proj\.kernel\.lora_A"):
            call(base, bad)
        with pytest.raises(jaxadapt.MismatchError, match=r"allow_nan=True(.|\n)*base: q_proj\.kernel"):
            call(ill, adapter, donate=True)
        assert not np.isfinite(call(base, bad, allow_nan=True)["q_proj"]["kernel"]).all()
    keymap = jaxadapt.KeyMap("mine", (jaxadapt.Weight("{path}.kernel", "{path}.weight", "i o -> o i"),
                                      jaxadapt.Weight("{path}.bias", "{path}.bias", "o -> o")))  # fmt: skip
    with pytest.raises(jaxadapt.MismatchError, match="adapter: "):
        jaxadapt.export.export_base(base, tmp_path, bad, keymap=keymap)
    assert not tmp_path.exists()  # an empty folder goes, as what a killed run leaves
    jaxadapt.export.export_base(base, tmp_path, bad, keymap=keymap, allow_nan=True)
    jaxadapt.export.export_base(base, tmp_path / "base", keymap=keymap)
    with pytest.raises(jaxadapt.MismatchError, match="adapter: "):
        jaxadapt.export.import_base(tmp_path / "base", base, bad, keymap=keymap)
    jaxadapt.export.import_base(tmp_path / "base", base, bad, keymap=keymap, allow_nan=True)


def test_traced_arrays_are_not_looked_at():
    adapter, base = small.adapter(), small.base()["params"]
    assert np.isnan(jax.jit(jaxadapt.merge)(base, spoilt(adapter))["q_proj"]["kernel"]).any()
    jax.jit(lambda: jaxadapt.merge(base, adapter))()
    bad = spoilt(adapter)
    with pytest.raises(jaxadapt.MismatchError, match="adapter: "):  # closed over, they have values
        jax.jit(lambda: jaxadapt.merge(base, bad))()


def test_inspect_names_the_modules(tmp_path):
    _, adapter = folders(tmp_path)
    assert "NaN" not in command("inspect", adapter, "--norms").output
    spoil(adapter / "adapter_model.safetensors", f"{P}q.lora_A.weight", np.inf)
    assert "modules with a NaN or an infinity: 1\n  q\n" in command("inspect", adapter, "--norms").output
    found = json.loads(command("inspect", adapter, "--norms", "--json").output)["norms"]
    assert found["not_finite"] == ["q"]


def test_adapters_of_one_name_are_looked_at_each_by_itself():
    config = jaxadapt.LoraConfig(r=1, target_modules=["q"])
    bad, good = (jaxadapt.PeftTensors(config, {f"{P}q.lora_A.weight": np.array([[x]])}, "one") for x in (np.nan, 1.0))
    with pytest.raises(jaxadapt.MismatchError, match=r"\n  one: base_model.model.q.lora_A.weight$"):
        conversion.refuse_nan([bad, good], "combine")
