"""A dtype that cannot hold an adapter's values is an error at each place that takes a dtype, and never other values."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxadapt
from jaxadapt import serving
from jaxadapt.export import export_adapter, export_base
from jaxadapt.export.conversion import convert_format
from jaxadapt.export.merge_files import merge_folder
from jaxadapt.merging import to_lora
from jaxadapt.models import LoraTree

CONFIG = jaxadapt.LoraConfig(r=2, lora_alpha=2, target_modules=["q", "v"])
BASE = {name: {"kernel": np.ones((4, 6), "float32")} for name in ("q", "v")}
TABLE = jaxadapt.KeyMap("own", tuple(jaxadapt.Weight(f"{m}.kernel", f"{m}.weight", "i o -> o i") for m in BASE))
NOT_FLOATS = ["int8", "uint8", "int32", "bool", "complex64", int, "float17", {}]
FLOATS = {
    "bf16": ml_dtypes.bfloat16, "BF16": ml_dtypes.bfloat16, "fp16": "float16", "F16": "float16", "fp32": "float32",
    jnp.bfloat16: ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn, np.float64: "float64", ">f4": "float32",
}  # fmt: skip


def adapter(large: float = 1e5) -> jaxadapt.Adapter:
    """Three values of q's A and one of v's B are large."""
    new = jaxadapt.init(BASE, CONFIG, key=jax.random.key(0), keymap=TABLE)
    q, v = new.params["q"]["kernel"], new.params["v"]["kernel"]
    q["lora_A"], v["lora_B"] = q["lora_A"].at[0, :3].set(large), v["lora_B"].at[5, 1].set(-large)
    return new


def doors(folder: Path) -> dict[str, Callable[[Any], Any]]:
    """{name: a call with a dtype}."""
    made, out = adapter(), folder / "out"
    jaxadapt.save(made, folder / "in")
    jaxadapt.save(made, folder / "orbax", format="orbax")
    in_memory = {key: jnp.asarray(x) for key, x in jaxadapt.to_peft(made).tensors.items()}
    qwix = {
        name: {"kernel_lora_a": np.zeros((4, 2), "float32"), "kernel_lora_b": np.zeros((2, 6), "float32")}
        for name in BASE
    }
    return {
        "save": lambda dtype: jaxadapt.save(made, out, dtype=dtype),
        "export in memory": lambda dtype: export_adapter(made, out, dtype=dtype),
        "save bin": lambda dtype: jaxadapt.save(made, out, dtype=dtype, format="bin"),
        "save orbax": lambda dtype: jaxadapt.save(made, out, dtype=dtype, format="orbax"),
        "load": lambda dtype: jaxadapt.load(folder / "in", {"params": BASE}, keymap=TABLE, dtype=dtype),
        "load into a tree": lambda dtype: jaxadapt.load(
            folder / "in", LoraTree(qwix, lora_alpha=2), keymap=TABLE, dtype=dtype
        ),
        "load orbax": lambda dtype: jaxadapt.load(folder / "orbax", {"params": BASE}, keymap=TABLE, dtype=dtype),
        "from_peft": lambda dtype: jaxadapt.from_peft(jaxadapt.read(folder / "in"), BASE, keymap=TABLE, dtype=dtype),
        "from_peft of JAX arrays": lambda dtype: jaxadapt.from_peft(
            jaxadapt.PeftTensors(CONFIG, in_memory), BASE, keymap=TABLE, dtype=dtype
        ),
        "convert": lambda dtype: convert_format(folder / "in", out, dtype=dtype),
        "export": lambda dtype: export_adapter(folder / "in", out, dtype=dtype),
        "to_lora": lambda dtype: to_lora(made, 2, dtype=dtype),
    }  # fmt: skip


NAMES = ["save", "export in memory", "save bin", "save orbax", "load", "load into a tree", "load orbax", "from_peft",
         "from_peft of JAX arrays", "convert", "export", "to_lora"]  # fmt: skip


@pytest.mark.parametrize("door", NAMES)
def test_a_dtype_that_cannot_hold_the_values_is_refused(door: str, tmp_path: Path) -> None:
    """It counts the values and names the tensors, and nothing is written."""
    call = doors(tmp_path)[door]
    for dtype in ["float16", "fp16", *([] if door.startswith("export") else ["float8_e4m3fn", "float8_e5m2"])]:
        with pytest.raises(jaxadapt.MismatchError) as caught:
            call(dtype)
        assert "4 finite values overflow float" in str(caught.value)
        assert "q" in str(caught.value) and ": 3" in str(caught.value)  # noqa: PT018
    for dtype in NOT_FLOATS:
        with pytest.raises(jaxadapt.ConfigError, match="floating-point dtype"):
            call(dtype)
    assert not (tmp_path / "out").exists()
    call("bf16")


@pytest.mark.parametrize("spelling", FLOATS, ids=str)
def test_usual_spellings_of_a_dtype_are_understood(spelling: Any, tmp_path: Path) -> None:
    jaxadapt.save(adapter(1.0), tmp_path, dtype=spelling)
    stored = load_file(tmp_path / "adapter_model.safetensors") if "F8" not in str(spelling) else {}
    found = {x.dtype for x in stored.values()} or {x.dtype for x in jaxadapt.read(tmp_path).tensors.values()}
    assert found == {np.dtype(FLOATS[spelling])}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("door", ["save", "convert", "load"])
def test_a_cast_gives_numpys_values(door: str, dtype: str, tmp_path: Path) -> None:
    made = adapter(100.0)
    jaxadapt.save(made, tmp_path / "in")
    if door == "save":
        jaxadapt.save(made, tmp_path / "out", dtype=dtype)
    elif door == "convert":
        convert_format(tmp_path / "in", tmp_path / "out", dtype=dtype)
    else:
        jaxadapt.save(jaxadapt.load(tmp_path / "in", {"params": BASE}, keymap=TABLE, dtype=dtype), tmp_path / "out")
    wide, narrow = (jaxadapt.read(tmp_path / name).tensors for name in ("in", "out"))
    for key, x in wide.items():
        assert narrow[key].tobytes() == x.astype(np.dtype(getattr(ml_dtypes, dtype, dtype))).tobytes()


@pytest.mark.parametrize("dtype", ["int8", "bool", "complex64"])
def test_write_refuses_integers_where_a_method_has_numbers(dtype: str, tmp_path: Path) -> None:
    tensors = jaxadapt.to_peft(adapter(1.0))
    cast: Mapping[str, Any] = {key: x.astype(dtype) for key, x in tensors.tensors.items()}
    with pytest.raises(jaxadapt.MismatchError, match=rf"floating-point numbers, found:\n.*lora_A.weight: {dtype}"):
        jaxadapt.write(jaxadapt.PeftTensors(CONFIG, cast), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_new_adapters_banks_and_models_take_only_float_dtypes(tmp_path: Path) -> None:
    save_file({"q.weight": np.ones((6, 4), "float32"), "v.weight": np.ones((6, 4), "float32")}, tmp_path / "m")
    calls: list[Callable[[Any], Any]] = [
        lambda dtype: jaxadapt.init(BASE, CONFIG, key=jax.random.key(0), keymap=TABLE, dtype=dtype),
        lambda dtype: serving.create(BASE, CONFIG, slots=2, keymap=TABLE, dtype=dtype),
        lambda dtype: export_base(BASE, tmp_path / "out", keymap=TABLE, dtype=dtype),
    ]
    jaxadapt.save(adapter(1.0), tmp_path / "in")
    (tmp_path / "m").rename(tmp_path / "model.safetensors")
    calls.append(
        lambda dtype: merge_folder(tmp_path / "model.safetensors", tmp_path / "in", tmp_path / "o", dtype=dtype)
    )
    for call in calls:
        with pytest.raises(jaxadapt.ConfigError, match="floating-point dtype"):
            call("int8")
        call("bf16")


def test_a_bank_whose_dtype_cannot_hold_an_adapter_refuses_it() -> None:
    """NaN is held by every dtype: such an adapter changes only its own rows."""
    made = serving.create(BASE, CONFIG, slots=2, keymap=TABLE, dtype="float16")
    with pytest.raises(jaxadapt.AttachError, match=r"q\.kernel: 3 finite values of lora_A overflow the bank's float16"):
        serving.prepare(made, adapter())
    (row, *_) = serving.prepare(made, adapter(np.nan))
    assert np.isnan(row["lora_A"]).sum() == 3


def test_a_base_weight_too_large_for_the_files_dtype_is_refused(tmp_path: Path) -> None:
    base = {"q": {"kernel": np.full((4, 6), 1e5, "float32")}}
    with pytest.raises(jaxadapt.MismatchError, match=r"24 finite values overflow float16, .*\n  q\.weight: 24"):
        export_base(base, tmp_path / "out", keymap=TABLE, dtype="float16")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e5m2"])
@pytest.mark.parametrize("door", ["load", "load into a tree", "load orbax"])
def test_a_file_with_nan_loads_with_one_warning_that_counts(door: str, dtype: str, tmp_path: Path) -> None:
    """Infinity of either sign counts too; the values are loaded as they are."""
    made = adapter(np.nan)
    made.params["q"]["kernel"]["lora_B"] = made.params["q"]["kernel"]["lora_B"].at[0].set([np.inf, -np.inf])
    call = doors(tmp_path)[door]
    for name in ("in", "orbax"):
        shutil.rmtree(tmp_path / name)
        jaxadapt.save(made, tmp_path / name, dtype=dtype, format="orbax" if name == "orbax" else "safetensors")
    with pytest.warns(UserWarning, match=r"6 values are NaN or infinite; .*(\n  .*: [321]){3}$") as caught:
        loaded = call(None if door != "load into a tree" else "float32")
    assert len(caught) == 1
    assert sum(int((~np.isfinite(x.astype("float32"))).sum()) for x in jax.tree.leaves(loaded)) == 6
