"""Commands that change adapter files without a model, against numpy and PEFT's names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import jaxadapt
from jaxadapt.cli import main
from jaxadapt.storage import orbax

P = "base_model.model."
CONFIG = jaxadapt.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
Arrays = dict[str, np.ndarray[Any, Any]]
MODULES = {"model.layers.0.self_attn.q_proj": (10, 8), "model.layers.1.mlp.up_proj": (12, 8)}


def tensors(seed: int = 0, modules: Any = MODULES) -> Arrays:
    rng, out = np.random.default_rng(seed), Arrays()
    for module, (rows, columns) in modules.items():
        out[f"{P}{module}.lora_A.weight"] = rng.standard_normal((4, columns)).astype("float32")
        out[f"{P}{module}.lora_B.weight"] = rng.standard_normal((rows, 4)).astype("float32")
    return out


def change(adapter: jaxadapt.PeftTensors, module: str) -> np.ndarray[Any, Any]:
    a, b = (np.asarray(adapter.tensors[f"{P}{module}.lora_{side}.weight"], "float64") for side in "AB")
    return adapter.config.scale_of(module) * b @ a


def run(*args: object) -> Any:
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    jaxadapt.write(jaxadapt.PeftTensors(CONFIG, tensors()), tmp_path / "adapter")
    return tmp_path / "adapter"


def test_resize_keeps_the_best_approximation(folder: Path, tmp_path: Path):
    result = json.loads(run("resize", folder, "--rank", 2, "--out", tmp_path / "two", "--json").output)
    old, new = jaxadapt.read(folder), jaxadapt.read(tmp_path / "two")
    assert (new.config.r, new.config.lora_alpha, new.config.task_type) == (2, 2, "CAUSAL_LM")
    for module in MODULES:
        u, s, vh = np.linalg.svd(change(old, module))
        best = u[:, :2] * s[:2] @ vh[:2]
        np.testing.assert_allclose(change(new, module), best, rtol=1e-4, atol=1e-5)  # an SVD in float32
        lost = np.linalg.norm(s[2:]) / np.linalg.norm(s)
        np.testing.assert_allclose(result["error"][module], lost, rtol=1e-4)


def test_rename_takes_the_names_of_the_base(folder: Path, tmp_path: Path):
    names = {module.replace("model.", "model.language_model.", 1): shape for module, shape in MODULES.items()}
    (tmp_path / "base.json").write_text(json.dumps({f"{name}.weight": shape for name, shape in names.items()}))
    found = jaxadapt.verify(folder, tmp_path / "base.json")
    assert [(f.severity, f.code) for f in found if f.severity == "error"] == [("error", "renamed")]
    run("rename", folder, "--base", tmp_path / "base.json", "--out", tmp_path / "new")
    run("rename", folder, "--from", "model.", "--to", "model.language_model.", "--out", tmp_path / "same")
    old, new = tensors(), load_file(tmp_path / "new" / "adapter_model.safetensors")
    assert set(new) == {key.replace("model.layers", "model.language_model.layers") for key in old}
    for key, x in old.items():
        np.testing.assert_array_equal(new[key.replace("model.layers", "model.language_model.layers")], x)
    assert all(f.severity != "error" for f in jaxadapt.verify(tmp_path / "new", tmp_path / "base.json"))
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "new" / file).read_bytes() == (tmp_path / "same" / file).read_bytes()


def test_rename_changes_the_names_in_the_configuration(tmp_path: Path):
    config = CONFIG.replace(
        target_modules=list(MODULES), rank_pattern={"model.layers.0.self_attn.q_proj": 4}, r=2, lora_alpha=3
    )
    adapter = tensors() | {k: x[..., :2, :] if "A" in k else x[:, :2] for k, x in tensors().items() if "up_proj" in k}
    jaxadapt.write(jaxadapt.PeftTensors(config, adapter), tmp_path / "a")
    run("rename", tmp_path / "a", "--from", "model.", "--to", "", "--out", tmp_path / "b")
    renamed = jaxadapt.read(tmp_path / "b").config
    assert set(renamed.target_modules) == {module.removeprefix("model.") for module in MODULES}
    assert dict(renamed.rank_pattern) == {"layers.0.self_attn.q_proj": 4}
    assert CliRunner().invoke(main, ["rename", str(tmp_path / "a"), "--from", "x.", "--out", "c"]).exit_code == 1


def test_start_undo_gives_a_plain_lora(tmp_path: Path):
    """ΔW = s·(B·A − B₀·A₀): what the training added to the original base."""
    config = CONFIG.replace(init_lora_weights="pissa")
    first, trained = (jaxadapt.PeftTensors(config, tensors(seed)) for seed in (1, 2))
    jaxadapt.write(first, tmp_path / "first")
    jaxadapt.write(trained, tmp_path / "trained")
    result = run("start", tmp_path / "trained", "--undo", tmp_path / "first", "--out", tmp_path / "plain", "--json")
    assert json.loads(result.output)["rank"] == 8
    plain = jaxadapt.read(tmp_path / "plain")
    assert plain.config.init_lora_weights is True
    for module in MODULES:
        wanted = change(trained, module) - change(first, module)
        np.testing.assert_allclose(change(plain, module), wanted, rtol=1e-5, atol=1e-5)
    again = CliRunner().invoke(
        main, ["start", f"{tmp_path}/plain", "--undo", f"{tmp_path}/first", "--out", f"{tmp_path}/x"]
    )
    assert "nothing to undo" in again.output


def state_dict() -> Arrays:
    """A complete PEFT model with two adapters and its base."""
    out = {f"{P}{module}.base_layer.weight": np.zeros(shape, "float32") for module, shape in MODULES.items()}
    for name, seed in (("fr", 1), ("de", 2)):
        out |= {key.replace(".weight", f".{name}.weight"): x for key, x in tensors(seed).items()}
    return out


def test_extract_one_of_several_adapters_of_a_whole_model(folder: Path, tmp_path: Path):
    save_file(state_dict(), tmp_path / "model.safetensors")
    for name, seed in (("fr", 1), ("de", 2)):
        run("extract", tmp_path / "model.safetensors", "--name", name, "--config", folder, "--out", tmp_path / name)
        found = load_file(tmp_path / name / "adapter_model.safetensors")
        assert found.keys() == tensors().keys()
        for key, x in tensors(seed).items():
            np.testing.assert_array_equal(found[key], x)
        assert jaxadapt.read_config(tmp_path / name).lora_alpha == 6
    missing = CliRunner().invoke(
        main, ["extract", f"{tmp_path}/model.safetensors", "--config", str(folder), "--out", f"{tmp_path}/x"]
    )
    assert "no adapter is called 'default'; choose one with --name: de, fr" in missing.output
    lost = CliRunner().invoke(main, ["extract", f"{tmp_path}/model.safetensors", "--out", f"{tmp_path}/x"])
    assert "pass --config" in lost.output


def test_extract_from_an_orbax_checkpoint(tmp_path: Path):
    base = {"q": {"kernel": np.zeros((4, 6), "f4")}}
    config = jaxadapt.LoraConfig(r=2, target_modules=["q"], init_lora_weights=False)
    adapter = jaxadapt.init(config, base, key=jax.random.key(0))
    leaves = {"params": base, **adapter.collection}
    numpy = jax.tree.map(np.asarray, leaves)
    orbax.save(tmp_path / "run", {"state": numpy}, {}, True)
    (tmp_path / "adapter_config.json").write_text(config.to_json())
    run("extract", tmp_path / "run", "--config", tmp_path / "adapter_config.json", "--out", tmp_path / "out")
    jaxadapt.save(adapter, tmp_path / "saved")
    file = "adapter_model.safetensors"
    assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "saved" / file).read_bytes()


def test_extract_another_librarys_lora_from_an_orbax_checkpoint(tmp_path: Path):
    rng, layer = np.random.default_rng(0), "layers.0.attn.q_proj.w"
    tree = {
        "w": np.zeros((8, 2, 4), "f4"), "w_lora_a": rng.standard_normal((8, 3)).astype("f4"),
        "w_lora_b": rng.standard_normal((3, 2, 4)).astype("f4"),
    }  # fmt: skip
    nested = {"params": {"layers": {"0": {"attn": {"q_proj": tree}}}}}
    orbax.save(tmp_path / "run", {"state": nested}, {}, True)
    run("extract", tmp_path / "run", "--lora-alpha", 6, "--keymap", "tunix:qwen3", "--out", tmp_path / "out")
    expected = jaxadapt.to_peft(
        {f"{layer}{end}": tree[f"w{end}"] for end in ("", "_lora_a", "_lora_b")}, keymap="tunix:qwen3", lora_alpha=6.0
    )
    found = jaxadapt.read(tmp_path / "out")
    assert found.config.lora_alpha == 6
    for key, x in expected.tensors.items():
        np.testing.assert_array_equal(found.tensors[key], np.asarray(x))


def test_convert_between_all_formats_keeps_every_bit(folder: Path, tmp_path: Path):
    path = folder
    for step, form in enumerate(("bin", "orbax", "safetensors", "bin", "safetensors")):
        run("convert", path, tmp_path / str(step), "--format", form)
        path = tmp_path / str(step)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (path / file).read_bytes() == (folder / file).read_bytes()
    run("convert", folder, tmp_path / "half", "--dtype", "bfloat16")
    for key, x in tensors().items():
        half = np.asarray(jaxadapt.read(tmp_path / "half").tensors[key])
        np.testing.assert_array_equal(half, x.astype(ml_dtypes.bfloat16))


def test_convert_several_and_subfolders(folder: Path, tmp_path: Path):
    jaxadapt.write(jaxadapt.PeftTensors(CONFIG, tensors(1)), tmp_path / "other")
    run("convert", folder, tmp_path / "other", tmp_path / "both", "--format", "bin")
    run("convert", tmp_path / "both", tmp_path / "again")
    for name in ("adapter", "other"):
        file = "adapter_model.safetensors"
        assert (tmp_path / "again" / name / file).read_bytes() == (tmp_path / name / file).read_bytes()
    twice = CliRunner().invoke(main, ["convert", str(folder), str(folder), str(tmp_path / "x")])
    assert "several sources are called adapter" in twice.output


def test_a_value_too_large_for_float16_is_refused(tmp_path: Path):
    large = {key: x * 1e5 for key, x in tensors().items()}
    jaxadapt.write(jaxadapt.PeftTensors(CONFIG, large), tmp_path / "a")
    result = CliRunner().invoke(main, ["convert", f"{tmp_path}/a", f"{tmp_path}/b", "--dtype", "float16"])
    assert result.exit_code == 1
    assert "overflows float16; use bfloat16" in result.output
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("kind", ["FINEGATES", "SOME_NEW_TYPE"])
def test_unknown_types_pass_through(kind: str, tmp_path: Path):
    config = jaxadapt.Config.from_dict({"peft_type": kind, "gates": [1, 2], "target_modules": ["q"]})
    content = {f"{P}q.gate": np.ones(3, "float16")}
    jaxadapt.write(jaxadapt.PeftTensors(config, content), tmp_path / "a")
    run("inspect", tmp_path / "a")
    assert run("verify", tmp_path / "a").exit_code == 0
    run("convert", tmp_path / "a", tmp_path / "b", "--format", "bin")
    run("convert", tmp_path / "b", tmp_path / "c")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "c" / file).read_bytes() == (tmp_path / "a" / file).read_bytes()


def test_merge_on_a_device(folder: Path, tmp_path: Path):
    (tmp_path / "base").mkdir()
    weights = {f"{module}.weight": np.ones(shape, "float32") for module, shape in MODULES.items()}
    save_file(weights, tmp_path / "base" / "model.safetensors")
    run("merge", tmp_path / "base", folder, "--out", tmp_path / "a")
    run("merge", tmp_path / "base", folder, "--out", tmp_path / "b", "--device", "cpu:3")
    file = "model.safetensors"
    assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    wrong = CliRunner().invoke(
        main, ["merge", f"{tmp_path}/base", str(folder), "--out", f"{tmp_path}/c", "--device", "tpu"]
    )
    assert wrong.exit_code == 2
    assert "JAX has cpu:0" in wrong.output
