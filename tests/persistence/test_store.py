"""Saving and loading: what may be saved, what a folder holds, what loading does to a model."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
import warnings
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import save_file

import jaxadapt
from jaxadapt import AttachError, ConfigError, FileError, KeyMapError, MismatchError, serving
from jaxadapt.storage import safetensors, torch_bin
from jaxadapt.storage.safetensors import parse
from tests.support import small
from tests.support.small import CARD, CONFIG, IA3, LORA, WEIGHTS, X, files, same

PREFIX = "base_model.model."


# ---- what may be saved -------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [LORA, IA3], ids=["LORA", "IA3"])
def test_models_states_variables_and_adapters_save_the_same_bytes(config, tmp_path):
    model, variables = small.trained(config), small.variables(config)
    collection = config.peft_type.lower()
    trees = {
        "model": model,
        "state": nnx.state(model),
        "adapter state": nnx.state(model, jaxadapt.AdapterParam),
        "variables": variables,
        "collections": {collection: variables[collection]},
        "names": variables[collection],
        "tree": variables[collection]["default"],
        "adapter": jaxadapt.extract(model),
    }
    for name, tree in trees.items():
        jaxadapt.save(tree, tmp_path / name)
    first = files(tmp_path / "model")
    assert sorted(first) == sorted([CONFIG, WEIGHTS, CARD])
    assert files(tmp_path / "variables") == first
    tensors = safetensors.read(tmp_path / "model" / WEIGHTS)
    without_base = [name for name in trees if name not in ("model", "variables")]  # whose files lack its fingerprint
    for name in without_base:
        assert files(tmp_path / name) == files(tmp_path / "adapter"), name
        assert (tmp_path / name / CONFIG).read_bytes() == first[CONFIG]
        found = safetensors.read(tmp_path / name / WEIGHTS)
        assert {key: x.tobytes() for key, x in found.items()} == {key: x.tobytes() for key, x in tensors.items()}


def test_a_saved_file_is_what_peft_would_have_written(tmp_path):
    model = small.trained()
    jaxadapt.save(model, tmp_path, base_model="org/base")
    header = safetensors.read_header(tmp_path / WEIGHTS)
    assert {k: (t.dtype, t.shape) for k, t in header.tensors.items()} == {
        f"{PREFIX}q_proj.lora_A.weight": ("F32", (2, 6)),
        f"{PREFIX}q_proj.lora_B.weight": ("F32", (8, 2)),
        f"{PREFIX}up_proj.lora_A.weight": ("F32", (2, 8)),
        f"{PREFIX}up_proj.lora_B.weight": ("F32", (6, 2)),
    }
    assert header.metadata["format"] == "pt"
    values = json.loads((tmp_path / CONFIG).read_text())
    assert values["inference_mode"] is True
    assert values["peft_version"] == "0.21.2"
    assert values["base_model_name_or_path"] == "org/base"
    assert values == json.loads(header.metadata["jaxadapt"])["config"]
    assert (tmp_path / CONFIG).read_text() == json.dumps(values, indent=2, sort_keys=True)
    assert "base_model: org/base" in (tmp_path / CARD).read_text()
    tensors = jaxadapt.read(tmp_path).tensors
    held = model.q_proj.lora["default"]["kernel"]
    np.testing.assert_array_equal(tensors[f"{PREFIX}q_proj.lora_A.weight"], np.asarray(held["lora_A"][...]))


def test_saving_after_jitted_optimizer_steps(tmp_path):
    model = small.trained()
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=jaxadapt.AdapterParam)

    @nnx.jit
    def step(model, optimizer, x):
        grads = nnx.grad(lambda m: (m(x) ** 2).mean(), argnums=nnx.DiffState(0, jaxadapt.AdapterParam))(model)
        optimizer.update(model, grads)

    before = jaxadapt.extract(model)
    for _ in range(2):
        step(model, optimizer, X)
    assert not same(before, jaxadapt.extract(model))
    jaxadapt.save(model, tmp_path)
    assert same(jaxadapt.extract(jaxadapt.load(tmp_path, small.net())), jaxadapt.extract(model))


def test_saving_after_jitted_linen_steps(tmp_path):
    module = jaxadapt.adapt(small.LinenNet(), LORA)
    variables = small.variables()
    tx = optax.adam(1e-2)
    opt = tx.init(variables["lora"])

    @jax.jit
    def step(variables, opt, x):
        def loss(lora):
            return (module.apply({**variables, "lora": lora}, x) ** 2).mean()

        updates, opt = tx.update(jax.grad(loss)(variables["lora"]), opt)
        return {**variables, "lora": optax.apply_updates(variables["lora"], updates)}, opt

    for _ in range(2):
        variables, opt = step(variables, opt, X)
    jaxadapt.save(variables, tmp_path)
    assert same(jaxadapt.load(tmp_path, small.base())["lora"], variables["lora"])


def test_tensors_of_any_memory_layout(tmp_path):
    adapter = small.host_adapter()
    values = {p: np.arange(x.size, dtype="f4").reshape(x.shape) for p, x in adapter.flat().items()}
    layouts = {
        "C": np.ascontiguousarray,
        "F": np.asfortranarray,
        "strided": lambda x: np.repeat(x, 2, 0)[::2],
        "reversed": lambda x: x[::-1].copy()[::-1],
        "big-endian": lambda x: x.astype(">f4"),
    }
    for name, change in layouts.items():
        tree = {
            site: {"kernel": {t: change(values[f"{site}.kernel.{t}"]) for t in ("lora_A", "lora_B")}}
            for site in ("q_proj", "up_proj")
        }
        jaxadapt.save(jaxadapt.Adapter(adapter.config, tree), tmp_path / name)
        assert files(tmp_path / name) == files(tmp_path / "C"), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes_are_kept(dtype, tmp_path):
    model = small.net()
    jaxadapt.adapt(model, LORA, rngs=nnx.Rngs(0), dtype=dtype)
    jaxadapt.inject(model, small.noisy(jaxadapt.extract(model)))
    jaxadapt.save(model, tmp_path / "a")
    assert {str(t.dtype) for t in jaxadapt.read(tmp_path / "a").tensors.values()} == {dtype}
    for target in (small.net(), small.base()):
        loaded = jaxadapt.extract(jaxadapt.load(tmp_path / "a", target))
        assert same(loaded, jaxadapt.extract(model))
    jaxadapt.write(jaxadapt.read(tmp_path / "a"), tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_dtype_converts_on_the_way(tmp_path):
    model = small.trained()
    jaxadapt.save(model, tmp_path, dtype=jnp.bfloat16)
    tensors = jaxadapt.read(tmp_path).tensors
    assert {t.dtype for t in tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}
    mine = jaxadapt.to_peft(model).tensors
    for key, value in tensors.items():
        np.testing.assert_array_equal(value, mine[key].astype(ml_dtypes.bfloat16))
    loaded = jaxadapt.load(tmp_path, small.net(), dtype="float32")
    assert {x.dtype for x in jax.tree.leaves(jaxadapt.extract(loaded))} == {np.dtype("float32")}


def test_other_names_go_to_subfolders(tmp_path):
    model = small.trained()
    small.trained(IA3, 2, "fr", model)
    small.trained(LORA, 3, "de", model)
    for name in ("default", "fr", "de"):
        jaxadapt.save(model, tmp_path, name=name)
    assert set(files(tmp_path)) == {f"{at}{name}" for at in ("", "fr/", "de/") for name in (CONFIG, WEIGHTS, CARD)}
    again = small.net()
    for name in ("default", "fr", "de"):
        jaxadapt.load(tmp_path, again, name=name)
    for name in ("default", "fr", "de"):
        assert same(jaxadapt.extract(again, name=name), jaxadapt.extract(model, name=name)), name
    # A folder that holds the adapter itself may be given any name here.
    other = jaxadapt.load(tmp_path / "fr", small.net(), name="mine")
    assert same(jaxadapt.extract(other, name="mine"), jaxadapt.extract(model, name="fr"))
    assert jaxadapt.read_config(tmp_path / "fr") == jaxadapt.extract(model, name="fr").config


@pytest.mark.parametrize("name", ["..", "a/b", "", ".", None, np.int64(3)])
def test_names_that_are_no_subfolder_are_refused(name, tmp_path):
    with pytest.raises(jaxadapt.AdapterError):
        jaxadapt.save(small.adapter(), tmp_path / "out", name=name)
    assert files(tmp_path) == {}


# ---- what may not ------------------------------------------------------------------------------------------


def test_values_that_are_none_are_refused(tmp_path):
    abstract = jaxadapt.init(small.base()["params"], LORA)
    with pytest.raises(AttachError, match=r"q_proj\.kernel\.lora_A: abstract"):
        jaxadapt.save(abstract, tmp_path / "out")
    with pytest.raises(AttachError, match=r"q_proj\.kernel\.lora_A: traced"):
        jax.jit(lambda a: jaxadapt.save(a, tmp_path / "out"))(small.adapter())
    donated = small.adapter()
    for leaf in jax.tree.leaves(donated):
        leaf.delete()
    with pytest.raises(AttachError, match=r"q_proj\.kernel\.lora_A: deleted"):
        jaxadapt.save(donated, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_peft_tensors_and_adapters_never_pass_for_each_other(tmp_path):
    adapter = small.adapter()
    tensors = jaxadapt.to_peft(adapter)
    with pytest.raises(AttachError, match=r"PeftTensors; write them with jaxadapt\.write\(tensors, path\)"):
        jaxadapt.save(tensors, tmp_path / "out")
    with pytest.raises(AttachError, match="PeftTensors"):
        jaxadapt.to_peft(tensors)
    for other in (adapter, small.trained(), small.variables(), dict(tensors.tensors)):
        with pytest.raises(AttachError, match=r"write: expected PeftTensors.*jaxadapt\.save"):
            jaxadapt.write(other, tmp_path / "out")
    with pytest.raises(AttachError, match=r"expected PeftTensors.*found Adapter.*inject"):
        jaxadapt.from_peft(adapter, small.net())
    with pytest.raises(jaxadapt.AdapterError, match="PeftTensors"):
        jaxadapt.merge(small.base()["params"], tensors)
    assert not (tmp_path / "out").exists()


def test_tensors_that_are_no_arrays_are_listed(tmp_path):
    odd = jaxadapt.PeftTensors(LORA, {"a": [1.0], "b": np.zeros(2), "c": None})
    with pytest.raises(MismatchError) as caught:
        jaxadapt.write(odd, tmp_path / "out")
    assert "a: list" in str(caught.value)
    assert "c: NoneType" in str(caught.value)
    with pytest.raises(MismatchError, match="adapter without tensors"):
        jaxadapt.write(jaxadapt.PeftTensors(LORA, {}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- in memory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [LORA, IA3], ids=["LORA", "IA3"])
def test_to_peft_and_back(config):
    model = small.trained(config)
    tensors = jaxadapt.to_peft(model)
    assert all(isinstance(x, np.ndarray) for x in tensors.tensors.values())
    for target in (model, small.net(), small.base(), small.base()["params"], nnx.eval_shape(small.net)):
        assert same(jaxadapt.from_peft(tensors, target), jaxadapt.extract(model))


def test_to_peft_inside_jit():
    adapter = small.adapter()
    traced = jax.jit(lambda a: dict(jaxadapt.to_peft(a).tensors))(adapter)
    for key, value in jaxadapt.to_peft(adapter).tensors.items():
        np.testing.assert_array_equal(traced[key], value)


def test_from_peft_inside_jit_takes_stacked_and_fused_leaves():
    line = jaxadapt.Weight("kv", "h.{l}.{p}_proj.weight", "{p} i {l} n h -> (n h) i", p=("k", "v"))
    table = jaxadapt.KeyMap("t", (line,))
    base = {"kv": jax.ShapeDtypeStruct((2, 4, 3, 2, 5), "float32")}
    config = jaxadapt.LoraConfig(r=2, target_modules=["k_proj", "v_proj"])
    adapter = small.noisy(jaxadapt.init(base, config, key=jax.random.key(0), keymap=table))
    tensors = jaxadapt.to_peft(adapter)
    assert len(tensors.tensors) == 12

    @jax.jit
    def back(given: Any) -> Any:
        return jaxadapt.from_peft(jaxadapt.PeftTensors(config, given), base, keymap=table)

    held = dict(tensors.tensors)
    assert same(back(held), adapter)
    assert same(jaxadapt.from_peft(tensors, base, keymap=table), adapter)
    first, *rest = held
    named = {key.replace(".weight", ".default.weight"): value for key, value in held.items()}
    with pytest.warns(UserWarning, match="the adapter's name 'default' is removed"):
        assert same(back(named), adapter)
    mixed = {first: jnp.asarray(held[first]), **{key: held[key] for key in rest}}
    assert same(jaxadapt.from_peft(jaxadapt.PeftTensors(config, mixed), base, keymap=table), adapter)


def test_what_from_peft_gives_does_not_change_with_its_source():
    tensors = {k: np.array(v) for k, v in jaxadapt.to_peft(small.adapter()).tensors.items()}
    adapter = jaxadapt.from_peft(jaxadapt.PeftTensors(LORA, tensors), small.base())
    for value in tensors.values():
        value[...] = 0
    assert same(adapter, small.adapter())


def test_extract_and_inject():
    a, b = small.trained(seed=1), small.trained(seed=2)
    jaxadapt.inject(b, jaxadapt.extract(a))
    assert same(jaxadapt.extract(a), jaxadapt.extract(b))
    np.testing.assert_array_equal(a(X), b(X))
    variables = jaxadapt.inject(small.variables(seed=3), jaxadapt.extract(a))
    assert same(jaxadapt.extract(variables), jaxadapt.extract(a))


# ---- what a folder holds -----------------------------------------------------------------------------------


def test_the_same_content_is_the_same_bytes_whatever_was_there(tmp_path):
    jaxadapt.save(small.trained(), tmp_path / "fresh")
    jaxadapt.save(small.trained(IA3), tmp_path / "used")
    (tmp_path / "used" / CARD).unlink()
    jaxadapt.save(small.trained(), tmp_path / "used")
    assert files(tmp_path / "fresh") == files(tmp_path / "used")


def test_write_gives_back_what_read_took(tmp_path):
    jaxadapt.save(small.trained(IA3), tmp_path / "a")
    jaxadapt.save(small.trained(), tmp_path / "a", base_model="org/base")
    (tmp_path / "a" / CARD).unlink()
    jaxadapt.write(jaxadapt.read(tmp_path / "a"), tmp_path / "b")
    (tmp_path / "b" / CARD).unlink()
    assert files(tmp_path / "a") == files(tmp_path / "b")
    jaxadapt.write(jaxadapt.read(tmp_path / "a"), tmp_path / "a")
    (tmp_path / "a" / CARD).unlink()
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_files_have_the_modes_of_new_files(tmp_path):
    for mask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        before = os.umask(mask)
        try:
            jaxadapt.save(small.adapter(), tmp_path / oct(mask))
        finally:
            os.umask(before)
        modes = {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / oct(mask)).iterdir()}
        assert modes == {mode}


def test_the_card_is_written_once_and_other_files_stay(tmp_path):
    (tmp_path / CARD).write_text("mine")
    (tmp_path / "notes.txt").write_text("keep")
    (tmp_path / "sub").mkdir()
    jaxadapt.save(small.adapter(), tmp_path)
    jaxadapt.save(small.adapter(seed=2), tmp_path)
    assert (tmp_path / CARD).read_text() == "mine"
    assert {p.name for p in tmp_path.iterdir()} == {CARD, CONFIG, WEIGHTS, "notes.txt", "sub"}


def test_an_older_bin_beside_it_is_pointed_out(tmp_path):
    (tmp_path / "adapter_model.bin").write_bytes(b"old")
    with pytest.warns(UserWarning, match=r"adapter_model\.bin is an older adapter"):
        jaxadapt.save(small.adapter(), tmp_path)
    assert (tmp_path / "adapter_model.bin").read_bytes() == b"old"


def test_inspect_reads_headers_only(tmp_path):
    jaxadapt.save(small.adapter(), tmp_path, dtype="bfloat16", base_model="org/base")
    info = jaxadapt.inspect(tmp_path)
    assert info.config == LORA
    assert info.config.base_model_name_or_path == "org/base"
    assert info.parameters == 2 * (6 + 8 + 8 + 6)
    assert info.nbytes == 2 * info.parameters
    assert "org/base" in repr(info)
    assert "lora_A" not in repr(info)  # of a large model that would be pages
    assert info.file_bytes == (tmp_path / WEIGHTS).stat().st_size
    assert info.dtypes == ("BF16",)
    assert info.modules == ("q_proj", "up_proj")
    assert info.tensors[f"{PREFIX}up_proj.lora_B.weight"] == ("BF16", (6, 2))
    as_json = json.loads(json.dumps(info.to_dict()))
    assert as_json["config"]["r"] == 2
    assert as_json["modules"] == ["q_proj", "up_proj"]


def test_modules_are_those_the_configuration_targets(tmp_path):
    config = jaxadapt.LoraConfig(r=2, target_modules=r".*\.layer\.\d+\.q", modules_to_save=None)
    tensors = {f"{PREFIX}m.layer.3.{m}.lora_{x}.weight": np.ones((2, 2), "f4") for m in "qk" for x in "AB"}
    save_file({**tensors, f"{PREFIX}classifier.weight": np.ones((2, 2), "f4")}, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text(config.to_json())
    assert list(jaxadapt.inspect(tmp_path).modules) == ["q"]


def test_read_config_takes_folders_files_and_folders_without_weights(tmp_path):
    jaxadapt.save(small.adapter(IA3), tmp_path)
    assert jaxadapt.read_config(tmp_path) == IA3
    assert jaxadapt.read_config(tmp_path / CONFIG) == IA3
    (tmp_path / WEIGHTS).unlink()
    assert jaxadapt.read_config(tmp_path) == IA3


# ---- two files cannot be replaced at one instant -----------------------------------------------------------


def interrupted(path: Path, before: jaxadapt.Adapter, after: jaxadapt.Adapter) -> None:
    """A folder as it is when a save of `after` over `before` dies between its two files."""
    jaxadapt.save(before, path)
    old = (path / CONFIG).read_bytes()
    small.save_without_end(after, path)
    (path / CONFIG).write_bytes(old)


def test_after_an_interrupted_save_the_header_wins(tmp_path):
    interrupted(tmp_path, small.adapter(IA3), small.adapter())
    for look in (jaxadapt.read_config, jaxadapt.inspect, jaxadapt.read):
        with pytest.warns(UserWarning, match="a save was interrupted"):
            found = look(tmp_path)
        assert (found if look is jaxadapt.read_config else found.config) == LORA
    with pytest.warns(UserWarning, match="a save was interrupted"):
        model = jaxadapt.load(tmp_path, small.net())
    assert same(jaxadapt.extract(model), small.adapter())


@pytest.mark.parametrize("then", [LORA, IA3, LORA.replace(lora_alpha=3)], ids=["the same", "the older", "another"])
def test_a_save_after_an_interrupted_one_mends_the_folder(then, tmp_path):
    interrupted(tmp_path / "a", small.adapter(IA3), small.adapter())
    jaxadapt.save(small.adapter(then), tmp_path / "a")
    jaxadapt.save(small.adapter(then), tmp_path / "b")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_second_interruption_in_a_row_still_loads(tmp_path):
    interrupted(tmp_path / "a", small.adapter(IA3), small.adapter())
    # The JSON is IA3's still; the next save dies at the same point.
    old = (tmp_path / "a" / CONFIG).read_bytes()
    interrupted(tmp_path / "b", small.adapter(IA3), small.adapter(LORA.replace(lora_alpha=3)))
    (tmp_path / "a" / WEIGHTS).write_bytes((tmp_path / "b" / WEIGHTS).read_bytes())
    assert (tmp_path / "a" / CONFIG).read_bytes() == old
    with pytest.warns(UserWarning, match="interrupted"):
        assert jaxadapt.read(tmp_path / "a").config.lora_alpha == 3


def test_writing_what_was_read_mends_an_interrupted_folder(tmp_path):
    interrupted(tmp_path, small.adapter(IA3), small.adapter())
    with pytest.warns(UserWarning, match="interrupted"):
        tensors = jaxadapt.read(tmp_path)
    jaxadapt.write(tensors, tmp_path)
    assert same(jaxadapt.extract(jaxadapt.load(tmp_path, small.net())), small.adapter())


def edit(path: Path, **changes) -> None:
    values = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps(values | changes))


def test_an_edited_configuration_wins(tmp_path):
    jaxadapt.save(small.adapter(), tmp_path)
    edit(tmp_path, lora_alpha=64, mine="kept")
    with pytest.warns(UserWarning, match=r"was edited after the weights were written \(lora_alpha, mine\)"):
        tensors = jaxadapt.read(tmp_path)
    assert tensors.config.lora_alpha == 64
    assert tensors.config.extra == {"mine": "kept"}


def test_an_edit_of_the_layout_alone_is_none(tmp_path):
    jaxadapt.save(small.adapter(), tmp_path)
    edit(tmp_path)
    assert jaxadapt.read(tmp_path).config == LORA


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"r": 4}, "has rank 2, not 4"),
        ({"rank_pattern": {"up_proj": 3}}, "has rank 2, not 3"),
        ({"target_modules": ["q_proj"]}, "it does not target base_model.model.up_proj.lora_A.weight"),
        ({"peft_type": "XLORA"}, "their type is LORA"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_an_edit_that_the_tensors_contradict_does_not_win(changes, why, tmp_path):
    jaxadapt.save(small.adapter(), tmp_path)
    edit(tmp_path, **changes)
    with pytest.warns(UserWarning, match="contradict it") as caught:
        model = jaxadapt.load(tmp_path, small.net())
    assert why in str(caught[0].message)
    assert same(jaxadapt.extract(model), small.adapter())


def test_a_foreign_files_configuration_is_the_json(tmp_path):
    jaxadapt.save(small.adapter(), tmp_path)
    tensors = jaxadapt.read(tmp_path).tensors
    specs = {k: (v.dtype, v.shape) for k, v in tensors.items()}
    safetensors.write(tmp_path / WEIGHTS, specs, tensors.__getitem__, {"format": "pt"})
    edit(tmp_path, lora_alpha=1)
    assert jaxadapt.read(tmp_path).config.lora_alpha == 1


# ---- loading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [LORA, IA3], ids=["LORA", "IA3"])
def test_load_into_plain_adapted_and_abstract_targets(config, tmp_path):
    model = small.trained(config)
    jaxadapt.save(model, tmp_path)
    adapted = jaxadapt.adapt(small.net(), config, rngs=nnx.Rngs(9))
    for target in (small.net(), adapted, small.trained(config, 7)):
        loaded = jaxadapt.load(tmp_path, target)
        assert loaded is target
        np.testing.assert_array_equal(loaded(X), model(X))
    abstract = jaxadapt.load(tmp_path, nnx.eval_shape(small.net))
    assert isinstance(abstract.q_proj.kernel.get_value(), jax.ShapeDtypeStruct)
    assert same(jaxadapt.extract(abstract), jaxadapt.extract(model))
    module = jaxadapt.adapt(small.LinenNet(), config)
    for target in (
        small.base(),
        small.variables(config, 7),
        module.init(jax.random.key(0), X) | small.base(),
    ):
        variables = jaxadapt.load(tmp_path, target)
        np.testing.assert_allclose(module.apply(variables, X), model(X), rtol=1e-6)
    shapes = jax.eval_shape(lambda: small.base())
    assert same(jaxadapt.extract(jaxadapt.load(tmp_path, shapes)), jaxadapt.extract(model))


def test_loading_keeps_the_base_and_the_given_variables(tmp_path):
    jaxadapt.save(small.trained(), tmp_path)
    model = small.net()
    kernel = model.q_proj.kernel.get_value()
    jaxadapt.load(tmp_path, model)
    assert model.q_proj.kernel.get_value() is kernel
    target = {**small.base(), "batch_stats": {"x": 1}}
    variables = jaxadapt.load(tmp_path, target)
    assert set(target) == {"params", "batch_stats"}
    assert set(variables) == {"params", "batch_stats", "lora"}
    assert variables["params"] is target["params"]


def test_loading_the_same_configuration_replaces_values_in_place(tmp_path):
    """Variables that an optimizer or another holder knows stay the same objects."""
    jaxadapt.save(small.trained(seed=1), tmp_path)
    model = small.trained(seed=2)
    held = model.q_proj.lora["default"]["kernel"]["lora_A"]
    graph = nnx.graphdef(model)
    jaxadapt.load(tmp_path, model)
    assert model.q_proj.lora["default"]["kernel"]["lora_A"] is held
    assert nnx.graphdef(model) == graph
    assert same(jaxadapt.extract(model), small.adapter(seed=1))


def test_another_configuration_needs_replace(tmp_path):
    jaxadapt.save(small.trained(LORA.replace(r=3)), tmp_path)
    for target in (small.trained(), small.variables()):
        before = jaxadapt.extract(target)
        with pytest.raises(ConfigError, match=r"r \(2 attached, 3 in the file\).*replace=True") as caught:
            jaxadapt.load(tmp_path, target)
        assert str(tmp_path) in str(caught.value)
        assert same(jaxadapt.extract(target), before)
        loaded = jaxadapt.load(tmp_path, target, replace=True)
        assert jaxadapt.extract(loaded).config.r == 3


BEGUN = LORA.replace(init_lora_weights="gaussian", lora_dropout=0.5)


@pytest.mark.parametrize("fields", [{}, {"init_lora_weights": False}, {"lora_dropout": 0.1}], ids=str)
def test_an_adapter_that_began_otherwise_loads_without_a_compilation(fields, tmp_path):
    jaxadapt.save(small.trained(LORA.replace(**fields), seed=2), tmp_path)
    want = small.trained(LORA, seed=2)(X)
    model, traced = small.trained(BEGUN), []
    model.eval()

    @nnx.jit
    def run(model, x):
        traced.append(1)
        return model(x)

    run(model, X)
    jaxadapt.load(tmp_path, model)
    np.testing.assert_allclose(run(model, X), want, rtol=1e-6)
    variables = small.variables(BEGUN)
    structure = jax.tree.structure(variables)  # jit compiles once for each structure
    variables = jaxadapt.load(tmp_path, variables)
    assert jax.tree.structure(variables) == structure
    assert len(traced) == 1
    assert jaxadapt.extract(model).config == BEGUN == jaxadapt.extract(variables).config
    assert same(jaxadapt.extract(model).params, small.adapter(seed=2).params)
    model = jaxadapt.load(tmp_path, model, rngs=nnx.Rngs(0))
    assert not np.array_equal(model(X), model(X))  # the attached dropout, with the new random stream


def test_a_bank_takes_adapters_that_began_otherwise():
    bank = serving.create(small.base(), LORA, slots=3)
    for slot, config in enumerate((BEGUN, LORA.replace(init_lora_weights=False)), 1):
        adapter = small.adapter(config, seed=slot)
        bank = serving.put(bank, slot, adapter)
        assert same(serving.get(bank, slot, adapter), adapter)


@pytest.mark.parametrize(("attached", "began"), [(True, "mica"), ("mica", False), ("pissa", True)])
def test_a_start_that_changes_what_is_computed_needs_replace(attached, began, tmp_path):
    """MiCA's A is not trained, and PiSSA changes the base."""
    file, held = (
        dataclasses.replace(small.adapter(), config=LORA.replace(init_lora_weights=start))
        for start in (began, attached)
    )
    jaxadapt.save(file, tmp_path)
    variables = {**small.base(), **held.named("default")}
    with pytest.raises(ConfigError, match="init_lora_weights .*replace=True"):
        jaxadapt.load(tmp_path, variables)


def test_another_method_of_the_same_name_gives_way_too(tmp_path):
    jaxadapt.save(small.trained(IA3), tmp_path)
    model = small.trained(IA3)
    loaded = jaxadapt.load(tmp_path, small.trained(LORA), replace=True)
    np.testing.assert_array_equal(loaded(X), model(X))
    variables = jaxadapt.load(tmp_path, small.variables(LORA), replace=True)
    assert set(variables) == {"params", "ia3"}


def test_a_second_name_keeps_both(tmp_path):
    jaxadapt.save(small.trained(IA3), tmp_path)
    model = jaxadapt.load(tmp_path, small.trained(LORA), name="second")
    np.testing.assert_array_equal(model(X), small.trained(IA3)(X))  # the loaded one is active
    jaxadapt.activate(model, "default")
    np.testing.assert_array_equal(model(X), small.trained(LORA)(X))


def test_a_loaded_dropout_rate_needs_rngs_to_be_active(tmp_path):
    jaxadapt.save(small.trained(LORA.replace(lora_dropout=0.5)), tmp_path)
    quiet = jaxadapt.load(tmp_path, small.net())
    np.testing.assert_array_equal(quiet(X), quiet(X))
    loud = jaxadapt.load(tmp_path, small.net(), rngs=nnx.Rngs(0))
    assert not np.array_equal(loud(X), loud(X))


def test_a_module_called_lora_is_no_collection():
    """Bare parameters whose module happens to be called as a method is."""
    params = {"lora": {"q_proj": {"kernel": np.zeros((6, 8), "f4")}}}
    adapter = jaxadapt.init(params, LORA.replace(target_modules=["q_proj"]), key=jax.random.key(0))
    assert same(jaxadapt.from_peft(jaxadapt.to_peft(adapter), params), adapter)


def test_flaxs_own_attention_loads_where_the_adapted_module_says_how_its_kernels_lie(tmp_path):
    x, key = np.ones((1, 3, 8), "f4"), jax.random.key(0)
    plain = nn.MultiHeadDotProductAttention(2)
    config = jaxadapt.LoraConfig(r=2, target_modules=["query", "out"], init_lora_weights=False)
    module = jaxadapt.adapt(plain, config)
    variables = {**module.init(key, x), "params": plain.init(key, x)["params"]}
    jaxadapt.save(variables, tmp_path)
    with pytest.raises(KeyMapError, match=r"query.kernel \(8, 2, 4\)(.|\n)*adapt\(module, config\).init, key, x\)"):
        jaxadapt.load(tmp_path, {"params": variables["params"]})
    made = jax.eval_shape(module.init, key, x)["lora"]
    again = jaxadapt.load(tmp_path, {"params": variables["params"], "lora": made})
    np.testing.assert_array_equal(module.apply(again, x), module.apply(variables, x))


def test_files_of_another_float_type_load_as_they_are(tmp_path):
    adapter = small.host_adapter(width=8)
    tensors = {k: np.asarray(v, "float64") / 3 for k, v in jaxadapt.to_peft(adapter).tensors.items()}
    jaxadapt.write(jaxadapt.PeftTensors(adapter.config, tensors), tmp_path)
    params = {n: {"kernel": np.zeros((8, 8), "f4")} for n in ("q_proj", "up_proj")}
    with pytest.warns(UserWarning, match="float64 tensors become float32"):
        loaded = jaxadapt.load(tmp_path, {"params": params})
    assert {x.dtype for x in jax.tree.leaves(loaded["lora"])} == {np.dtype("float32")}
    loaded = jaxadapt.load(tmp_path, {"params": params}, dtype="float16")
    assert {x.dtype for x in jax.tree.leaves(loaded["lora"])} == {np.dtype("float16")}
    assert jaxadapt.read(tmp_path).tensors[f"{PREFIX}q_proj.lora_A.weight"].dtype == np.float64


# ---- other people's files ----------------------------------------------------------------------------------


def test_real_adapters_are_written_as_they_were_read(real_adapters, tmp_path):
    """Every stored weights file, under a configuration of its kind, tensor for tensor."""
    counted = 0
    for path in sorted((real_adapters / "weights").glob("*_adapter_model.*")):
        here = tmp_path / path.name
        here.mkdir()
        (here / path.name.partition("_")[2]).write_bytes(path.read_bytes())
        config = real_adapters / "configs" / f"{path.name[:3]}.json"
        try:
            before = safetensors.read(path) if path.suffix == ".safetensors" else torch_bin.read(path)
        except jaxadapt.AdapterError:
            continue  # one is 44 bytes of nothing, one is no adapter
        text = config.read_bytes() if config.exists() else b""
        (here / CONFIG).write_bytes(text)
        try:
            jaxadapt.read_config(here / CONFIG)
        except jaxadapt.AdapterError:
            text = LORA.to_json().encode()
            (here / CONFIG).write_bytes(text)
        tensors = jaxadapt.read(here)
        jaxadapt.write(tensors, here / "again")
        again = jaxadapt.read(here / "again")
        assert again.config.to_dict() == tensors.config.to_dict()
        assert json.loads((here / "again" / CONFIG).read_text()).items() >= json.loads(text).items()
        assert set(again.tensors) == set(before)
        for key, value in before.items():
            assert again.tensors[key].dtype == value.dtype
            np.testing.assert_array_equal(again.tensors[key], value)
        if path.name.startswith("001_"):  # a whole model under the name of an adapter
            with pytest.raises(jaxadapt.MismatchError, match="none of the 606 tensors belongs to an adapter"):
                jaxadapt.inspect(here)
        else:
            jaxadapt.inspect(here).to_dict()
        counted += 1
    assert counted >= 8


def test_nothing_warns_where_nothing_is_wrong(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = small.trained()
        for _ in range(2):
            jaxadapt.save(model, tmp_path)
            jaxadapt.load(tmp_path, model)
            jaxadapt.write(jaxadapt.read(tmp_path), tmp_path)
    raw = (tmp_path / WEIGHTS).read_bytes()
    header = parse("x", raw[8 : 8 + int.from_bytes(raw[:8], "little")], len(raw))
    assert json.loads(header.metadata["jaxadapt"])["replaces"] == "0" * 64


def test_save_takes_strings_and_makes_parents(tmp_path):
    jaxadapt.save(small.adapter(), str(tmp_path / "a" / "b"))
    assert jaxadapt.read(str(tmp_path / "a" / "b")).config == LORA
    with pytest.raises(FileError):
        jaxadapt.save(small.adapter(), tmp_path / "a" / "b" / WEIGHTS)


def test_load_asks_for_variables_and_not_for_bare_parameters(tmp_path):
    spec = jax.ShapeDtypeStruct((4, 6), "float32")
    config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    jaxadapt.save(jaxadapt.init({"q": {"kernel": spec}}, config, key=jax.random.key(0)), tmp_path)
    with pytest.raises(jaxadapt.AttachError, match="'params'"):
        jaxadapt.load(tmp_path, {"q": {"kernel": spec}})
    assert set(jaxadapt.load(tmp_path, {"params": {"q": {"kernel": spec}}})) == {"params", "lora"}
    with pytest.raises(jaxadapt.AttachError, match="variables"):
        jaxadapt.init({"params": {"q": {"kernel": spec}}}, config)


def test_loading_takes_the_files_origin_too(tmp_path):
    def net():
        class Net(nnx.Module):
            def __init__(self, rngs):
                self.q = nnx.Linear(4, 6, rngs=rngs)

        return Net(nnx.Rngs(0))

    config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    for name in ("a", "b"):
        jaxadapt.save(jaxadapt.adapt(net(), config, rngs=nnx.Rngs(1)), tmp_path / name, base_model=f"org/{name}")
    model = jaxadapt.load(tmp_path / "b", jaxadapt.load(tmp_path / "a", net()))
    assert jaxadapt.extract(model).config.base_model_name_or_path == "org/b"


def test_jit_hands_back_where_each_adapter_comes_from():
    """Equal configurations are one to jit, and it gives its output the first that it saw."""
    step = jax.jit(lambda adapter: jax.tree.map(lambda x: 2 * x, adapter))
    config = small.LORA.replace(task_type="CAUSAL_LM")
    for one in (config.replace(base_model_name_or_path=f"org/{name}", revision=name) for name in "ab"):
        after = step(dataclasses.replace(small.adapter(), config=one)).config
        assert after.to_dict() == one.to_dict()
    assert step(dataclasses.replace(small.adapter(), config=config.replace(task_type=None))).config.task_type is None


# ---- reinforcement learning: an adapter pushed to a server at every step ------------------------------------


def test_no_copy_where_the_layouts_agree():
    """On the host a tensor is a view of the very memory that JAX has, transposed or not."""
    adapter = small.adapter()
    for key, tensor in jaxadapt.to_peft(adapter).tensors.items():
        assert any(np.shares_memory(tensor, np.asarray(leaf)) for leaf in adapter.flat().values()), key


def test_a_push_is_compiled_once():
    """The plan is static: new values at every step go through one program."""
    traces = []

    @jax.jit
    def push(adapter: Any) -> Any:
        traces.append(1)
        return dict(jaxadapt.to_peft(adapter).tensors)

    for seed in range(3):
        adapter = small.adapter(seed=seed)
        pushed = push(adapter)
        for key, tensor in jaxadapt.to_peft(adapter).tensors.items():
            np.testing.assert_array_equal(pushed[key], tensor)
    assert len(traces) == 1


def test_a_sharded_adapter_is_pushed_as_a_whole():
    """Inside jit and outside, from eight devices, and the result stays on them."""
    mesh = jax.make_mesh((len(jax.devices()),), ("x",))
    rng = np.random.RandomState(0)
    line = jaxadapt.Weight("q.kernel", "q.weight", "d n h -> (n h) d")
    base = {"q": {"kernel": jax.ShapeDtypeStruct((16, 8, 2), "float32")}}
    config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    plain = jaxadapt.init(base, config, key=jax.random.key(0), keymap=jaxadapt.KeyMap("t", (line,)))
    plain = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), plain)
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    spread = jax.tree.map(lambda x: jax.device_put(x, place) if x.shape[0] % 8 == 0 else x, plain)
    inside = jax.jit(lambda a: dict(jaxadapt.to_peft(a).tensors))(spread)
    for key, tensor in jaxadapt.to_peft(plain).tensors.items():
        np.testing.assert_array_equal(inside[key], tensor)
        np.testing.assert_array_equal(jaxadapt.to_peft(spread).tensors[key], tensor)
    assert any(len(x.sharding.device_set) > 1 for x in inside.values())


# ---- dtypes of what is attached already --------------------------------------------------------------------


@pytest.mark.parametrize("api", ["nnx", "linen"])
@pytest.mark.parametrize(("file", "attached", "wanted"), [
    ("bfloat16", "float32", "float32"), ("float16", "float32", "float32"), ("float32", "bfloat16", "float32"),
    ("bfloat16", "bfloat16", "bfloat16"),
])  # fmt: skip
def test_training_goes_on_in_no_fewer_bits_than_it_had(api, file, attached, wanted, tmp_path):
    """PEFT copies a file's values into the parameters there are; adam's steps of 1e-4 would be lost in bfloat16's."""
    trained = jaxadapt.extract(small.trained(LORA))
    jaxadapt.save(jax.tree.map(lambda x: x.astype(file), trained), tmp_path)
    if api == "nnx":
        target = small.net()
        jaxadapt.adapt(target, LORA, rngs=nnx.Rngs(0), dtype=attached)
    else:
        target = small.variables(LORA)
        target["lora"] = jax.tree.map(lambda x: jnp.asarray(x, attached), target["lora"])
    got = jaxadapt.extract(jaxadapt.load(tmp_path, target)).flat()
    assert {str(x.dtype) for x in got.values()} == {wanted}
    for path, value in trained.flat().items():
        np.testing.assert_array_equal(np.asarray(got[path], np.float32), np.asarray(value.astype(file), np.float32))
    as_asked = jaxadapt.extract(jaxadapt.load(tmp_path, target, dtype="bfloat16")).flat()
    assert {str(x.dtype) for x in as_asked.values()} == {"bfloat16"}


def test_a_configuration_that_differs_is_named_field_by_field(tmp_path):
    model = small.trained(LORA)
    jaxadapt.save(model, tmp_path)  # inference_mode is true in a file, and makes no other configuration of it
    other = small.net()
    jaxadapt.adapt(other, LORA.replace(lora_alpha=99), rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match=r"in lora_alpha \(99 attached, \d+ in the file\);"):
        jaxadapt.load(tmp_path, other)
    with pytest.raises(AttachError, match=r"another configuration: lora_alpha \(99 attached, \d+ given\)"):
        jaxadapt.inject(other, jaxadapt.extract(model))
    variables = small.variables(LORA.replace(lora_alpha=99))
    with pytest.raises(AttachError, match=r"another configuration: lora_alpha \(99 attached, \d+ given\)"):
        jaxadapt.inject(variables, jaxadapt.extract(small.variables(LORA)))
