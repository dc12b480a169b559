"""The seven invariants, by name, small; the long forms are in the tests named."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxadapt
from jaxadapt.keymaps import families, plan
from jaxadapt.storage import safetensors
from tests.support import small
from tests.support.small import CONFIG, IA3, LORA, WEIGHTS, X, files, same

METHODS = pytest.mark.parametrize("config", [LORA, IA3], ids=["LORA", "IA3"])
ROOT = Path(__file__).resolve().parents[2]
IDS = np.random.RandomState(0).randint(0, 64, (2, 9))


# 1 (also test_store.py, codecs/)


@METHODS
def test_invariant_1_write_of_read_is_the_file(config, tmp_path):
    jaxadapt.save(small.trained(config), tmp_path / "a")
    jaxadapt.write(jaxadapt.read(tmp_path / "a"), tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")


@pytest.mark.peft
def test_invariant_1_for_pefts_files_tensor_for_tensor(tmp_path):
    from tests.support import peft_harness as harness

    for name in ("llama-lora", "gpt2-ia3"):
        setting = harness.setting(name)
        harness.save(harness.make_peft(torch_base(setting.family), setting.peft()), tmp_path / name)
        tensors = jaxadapt.read(tmp_path / name)
        jaxadapt.write(tensors, tmp_path / "again")
        theirs, ours = (harness.read_tensors(tmp_path / n) for n in (name, "again"))
        assert list(ours) == list(theirs)
        for key, value in theirs.items():
            assert ours[key].dtype == value.dtype
            np.testing.assert_array_equal(ours[key], value)
        assert (tmp_path / "again" / CONFIG).read_bytes() == (tmp_path / name / CONFIG).read_bytes()


def torch_base(family):
    from tests.support.twins import gpt2, llama

    return llama.torch_llama() if family == "llama" else gpt2.torch_gpt2(gpt2.Shape())


# 2 (also attach/, test_methods.py, test_merging.py)


@METHODS
def test_invariant_2_fresh_adapters_change_nothing_and_detach_gives_the_base_back(config):
    model = small.net()
    graph, state, out = nnx.graphdef(model), nnx.state(model), model(X)
    kernel = model.q_proj.kernel.get_value()
    jaxadapt.adapt(model, config, rngs=nnx.Rngs(3))
    np.testing.assert_array_equal(model(X), out)
    jaxadapt.inject(model, small.noisy(jaxadapt.extract(model)))
    assert abs(np.asarray(model(X) - out)).max() > 0.1
    jaxadapt.detach(model)
    assert nnx.graphdef(model) == graph
    assert same(nnx.to_pure_dict(nnx.state(model)), nnx.to_pure_dict(state))
    assert model.q_proj.kernel.get_value() is kernel

    module = jaxadapt.adapt(small.LinenNet(), config)
    variables = module.init(jax.random.key(0), X)
    plain = small.LinenNet().init(jax.random.key(0), X)
    assert same(variables["params"], plain["params"])
    np.testing.assert_array_equal(module.apply(variables, X), small.LinenNet().apply(plain, X))
    assert jaxadapt.detach(module) == small.LinenNet()


@METHODS
def test_invariant_2_merge_equals_apply_and_unmerge_undoes_it(config):
    model = small.trained(config)
    base = small.base()["params"]
    merged = jaxadapt.merge(base, jaxadapt.extract(model))
    np.testing.assert_allclose(small.LinenNet().apply({"params": merged}, X), model(X), rtol=1e-5, atol=1e-6)
    back = jaxadapt.unmerge(merged, jaxadapt.extract(model))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), back, base)


# 3 and 5 (also interchange/)


@pytest.mark.peft
@pytest.mark.parametrize("name", ["llama-lora", "llama-ia3"])
def test_invariant_3_peft_loads_what_we_save_and_we_load_what_it_saves(name, tmp_path):
    from tests.support import peft_harness as harness
    from tests.support.twins import llama

    setting, base = harness.setting(name), torch_base("llama")
    theirs = harness.make_peft(base, setting.peft())
    harness.save(theirs, tmp_path / "peft")
    model = jaxadapt.load(tmp_path / "peft", llama.twin_of(base))
    np.testing.assert_allclose(model(jnp.asarray(IDS)), harness.logits(theirs, IDS), rtol=1e-5, atol=1e-5)
    jaxadapt.save(model, tmp_path / "ours")
    loaded = harness.load(base, tmp_path / "ours")
    assert loaded.complaints == []
    np.testing.assert_allclose(harness.logits(loaded.model, IDS), harness.logits(theirs, IDS), rtol=1e-5, atol=1e-5)


def test_invariant_5_one_file_fits_linen_and_nnx_scanned_and_unrolled(tmp_path):
    """Made without torch: the weights of one NNX Llama, laid out in every other way by the family's table."""
    from jaxadapt.demo import llama
    from jaxadapt.demo.llama import LinenLlama, to_linen, to_nnx

    shape = {
        "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_layers": 2, "num_heads": 2,
        "num_kv_heads": 1, "head_dim": 8, "rope_theta": 1e4, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
        "max_position_embeddings": 32,
    }  # fmt: skip
    first = llama.LlamaConfig(**shape)
    rng = np.random.default_rng(0)
    weights = {k: rng.standard_normal(s).astype("f4") * 0.2 for k, s in llama.hf_shapes(first).items()}
    config = jaxadapt.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"])
    model = to_nnx(first, weights)
    adapter = small.noisy(jaxadapt.init(model, config, key=jax.random.key(0)))
    jaxadapt.save(adapter, tmp_path)
    run = nnx.jit(lambda model, ids: model(ids))
    ids = jnp.asarray(IDS)
    outputs = []
    for axis in (None, 0, 1):
        c = llama.LlamaConfig(**shape, scan=axis is not None, scan_axis=axis or 0)
        if axis != 0:
            outputs.append(run(jaxadapt.load(tmp_path, to_nnx(c, weights)), ids))
        if axis != 1:
            module = jaxadapt.adapt(LinenLlama(c), config)
            variables = jaxadapt.load(tmp_path, to_linen(c, weights))
            outputs.append(jax.jit(module.apply)(variables, ids))
    assert abs(np.asarray(outputs[0] - run(model, ids))).max() > 1e-2
    for output in outputs:
        np.testing.assert_allclose(output, outputs[0], rtol=1e-5, atol=1e-5)


# the tables that 3 and 5 stand on


@pytest.mark.peft
@pytest.mark.parametrize("scan", [None, 0, 1])
@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("llama", False), ("gpt2", True)])
def test_family_tables_map_the_real_base_weights_both_ways(family, tied, scan):
    """PyTorch → JAX → PyTorch, bit for bit; every PyTorch weight is claimed once, but for tied ones."""
    from tests.support.twins import gpt2, llama

    if family == "llama":
        base = llama.torch_llama(tied=tied)
        model = llama.twin_of(base, scan=scan is not None, scan_axis=scan or 0)
        leaves = {
            ".".join(map(str, path)): np.asarray(leaf[...])
            for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))
        }
    else:
        base = gpt2.torch_gpt2(gpt2.Shape())
        leaves = gpt2.leaves_from_torch(base.state_dict(), scan)
    weights = {name: x.detach().numpy() for name, x in base.state_dict().items()}
    table = families.resolve_keymap("auto", {k: v.shape for k, v in leaves.items()})
    assert table.name == family + ("" if scan is None else f"/scan{scan}")
    made = plan.base_plan(table, {k: v.shape for k, v in leaves.items()})
    encoded = dict(made.encode(leaves))
    assert set(weights) - set(encoded) == ({"lm_head.weight"} if tied else set())
    assert set(encoded) <= set(weights)
    for key, value in encoded.items():
        np.testing.assert_array_equal(value, weights[key], err_msg=key)
    for path, leaf in made.decode({k: weights[k] for k in encoded}).items():
        np.testing.assert_array_equal(leaf, leaves[path], err_msg=path)


# 4 (also attach/)


def test_invariant_4_only_adapter_leaves_are_trained_and_saved(tmp_path):
    model = small.trained()
    wrt = nnx.DiffState(0, jaxadapt.AdapterParam)
    grads = nnx.grad(lambda m: (m(X) ** 2).mean(), argnums=wrt)(model)
    paths = {".".join(map(str, p)) for p, _ in nnx.to_flat_state(grads)}
    assert len(paths) == 4
    assert all("lora" in p for p in paths)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=jaxadapt.AdapterParam)
    moments = [x for x in jax.tree.leaves(nnx.state(optimizer)) if getattr(x, "ndim", 0)]
    assert sorted(x.shape for x in moments) == sorted([(6, 2), (2, 8), (8, 2), (2, 6)] * 2)
    jaxadapt.save(model, tmp_path)
    assert len(jaxadapt.read(tmp_path).tensors) == 4
    assert all(".lora_" in key for key in jaxadapt.read(tmp_path).tensors)


def test_invariant_4_the_compiled_step_holds_no_gradient_of_a_frozen_weight():
    """Of the sizes 6 x 8 and 8 x 6 there are the weights themselves, and no product."""
    module, variables = jaxadapt.adapt(small.LinenNet(), LORA), small.variables()

    def loss(lora, params):
        return (module.apply({"params": params, "lora": lora}, X) ** 2).mean()

    text = jax.jit(jax.grad(loss)).lower(variables["lora"], variables["params"]).compile().as_text()
    made = re.findall(r"= f32\[(?:6,8|8,6)\]\S* (\w+)\(", text)
    assert "dot" not in made
    full = jax.jit(jax.grad(loss, 1)).lower(variables["lora"], variables["params"]).compile().as_text()
    assert "dot" in re.findall(r"= f32\[(?:6,8|8,6)\]\S* (\w+)\(", full)


# 6 (also codecs/test_atomic.py, full/test_kill.py)


def test_invariant_6_a_killed_writer_leaves_the_old_adapter_or_the_new(tmp_path):
    command = [sys.executable, "-m", "tests.support.kill_save", str(tmp_path / "out"), "50"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2400, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


# 7 (also test_bad_input.py, codecs/)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_invariant_7_nothing_in_a_file_is_executed(tmp_path):
    here, mark = tmp_path / "out", tmp_path / "executed"
    jaxadapt.save(small.adapter(), here)
    (here / WEIGHTS).unlink()
    with zipfile.ZipFile(here / "adapter_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"x": Evil(mark)}, protocol=2))
        archive.writestr("archive/version", "3\n")
    for target in (small.net(), small.base()):
        with pytest.raises(jaxadapt.FormatError, match=r"adapter_model\.bin.*nothing in a file is executed"):
            jaxadapt.load(here, target)
    assert not mark.exists()


def test_invariant_7_bad_bytes_name_the_file_and_the_tensor(tmp_path):
    """Any one byte of a file may be wrong: it loads as something, or an `AdapterError` names the file."""
    jaxadapt.save(small.adapter(), tmp_path)
    good = (tmp_path / WEIGHTS).read_bytes()
    end = safetensors.read_header(tmp_path / WEIGHTS).data_start
    rng = np.random.default_rng(0)
    refused: list[str] = []
    for at in rng.choice(end, 200, replace=False):
        bad = bytearray(good)
        bad[at] ^= 1 << rng.integers(8)
        (tmp_path / WEIGHTS).write_bytes(bad)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a bit of our copy of the configuration: the JSON wins
                jaxadapt.load(tmp_path, small.base())
        except jaxadapt.AdapterError as error:
            refused.append(str(error))
    assert len(refused) > 100
    assert all(str(tmp_path) in text for text in refused)
