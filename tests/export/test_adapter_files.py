"""Commands that change adapter files without a model, against numpy and PEFT's names."""

from __future__ import annotations

import dataclasses
import json
import shutil
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
from jaxadapt.export import adapter_files
from jaxadapt.models import LoraTree
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


def test_modules_that_are_no_targets_are_refused_and_float64_is_said(tmp_path: Path):
    """PEFT ignores the tensors of a module that is no target, so no result may contain their change."""
    for name, targets in (("narrow", ["q_proj"]), ("wide", ["q_proj", "up_proj"])):
        config = CONFIG.replace(target_modules=targets, init_lora_weights="pissa" if name == "narrow" else True)
        jaxadapt.write(jaxadapt.PeftTensors(config.with_default_init(), tensors()), tmp_path / name)
        jaxadapt.write(jaxadapt.PeftTensors(config, tensors()), tmp_path / f"{name} start")
    refused = pytest.raises(jaxadapt.MismatchError, match=r"does not select these modules(.|\n)*up_proj")
    with refused:
        adapter_files.resize_files(tmp_path / "narrow", 2, tmp_path / "out")
    with refused:
        adapter_files.combine_folders([tmp_path / "wide", tmp_path / "narrow"], [1, 1], tmp_path / "out")
    with refused:
        adapter_files.undo_start(tmp_path / "narrow start", tmp_path / "narrow start", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    wide = jaxadapt.PeftTensors(CONFIG, {key: x.astype("float64") for key, x in tensors().items()}, "wide")
    jaxadapt.write(wide, tmp_path / "wider")
    with pytest.warns(UserWarning, match="float64") as found:
        adapter_files.resize_files(tmp_path / "wider", 2, tmp_path / "out")
    (said,) = [str(each.message) for each in found if "float64" in str(each.message)]
    assert said.endswith("float64 tensors become float32, because jax_enable_x64 is off")
    assert {x.dtype.name for x in jaxadapt.read(tmp_path / "out").tensors.values()} == {"float32"}


@pytest.mark.filterwarnings("ignore:modules_to_save")  # it is in no model here
def test_what_a_copied_module_prevents_is_said(tmp_path: Path):
    config = CONFIG.replace(modules_to_save=["norm"])
    copy = {f"{P}model.norm.weight": np.ones(8, "float32")}
    jaxadapt.write(jaxadapt.PeftTensors(config, tensors() | copy), tmp_path / "a")
    for words, message in (
        (["resize", "--rank", "2", "--out", str(tmp_path / "x")], "more than a plain LoRA: modules_to_save=('norm',)"),
        (["convert", str(tmp_path / "x"), "--format", "orbax"], "only a model has places for all tensors"),
    ):
        result = CliRunner().invoke(main, [words[0], str(tmp_path / "a"), *words[1:]])
        assert (result.exit_code, message in " ".join(result.output.split())) == (1, True), result.output
    assert not (tmp_path / "x").exists()


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


def test_rename_names_the_tensors_that_would_get_one_name(folder: Path, tmp_path: Path):
    words = ["--from", "model.layers.0.self_attn.q_proj", "--to", "model.layers.1.mlp.up_proj", "--out"]
    refused = CliRunner().invoke(main, ["rename", str(folder), *words, str(tmp_path / "new")])
    q, up = (f"{P}{module}.lora_A.weight" for module in MODULES)
    assert f"choose another beginning:\n  {q} and {up} would be called {up}\n" in refused.output
    assert not (tmp_path / "new").exists()


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


@pytest.mark.parametrize("to", ["", "outer.model."])
def test_rename_keeps_ranks_scales_and_copies(to: str, tmp_path: Path):
    """Patterns that match only the old names, layers, exclusions, and a module that was trained in full."""
    q, up = MODULES
    config = CONFIG.replace(
        target_modules=r"model\.layers\.\d\.(self_attn|mlp)\.\w+", exclude_modules=r"model\.layers\.3.*", r=3,
        rank_pattern={"^model.layers.*": 4}, alpha_pattern={r"model\.layers\.1\..*": 20},
        modules_to_save=["model.norm"],
    )  # fmt: skip
    norm = {f"{P}model.norm.weight": np.arange(8, dtype="float32")}
    old = jaxadapt.PeftTensors(config, tensors() | norm)
    jaxadapt.write(old, tmp_path / "a")
    run("rename", tmp_path / "a", "--from", "model.", "--to", to, "--out", tmp_path / "b")
    new = jaxadapt.read(tmp_path / "b")
    for module in (q, up):
        np.testing.assert_array_equal(change(new, module.replace("model.", to, 1)), change(old, module))
    np.testing.assert_array_equal(new.tensors[f"{P}{to}norm.weight"], norm[f"{P}model.norm.weight"])
    assert list(new.config.modules_to_save) == [f"{to}norm"]
    assert not [f for f in jaxadapt.verify(tmp_path / "b") if f.severity == "error"]


def test_rename_gives_a_copied_module_the_name_in_the_base(tmp_path: Path):
    shapes = {**{f"{name}.weight": shape for name, shape in MODULES.items()}, "model.norm.weight": (8,)}
    renamed = {key.replace("model.", "model.language_model.", 1): shape for key, shape in shapes.items()}
    (tmp_path / "base.json").write_text(json.dumps(renamed))
    copies = {f"{P}model.norm.weight": np.ones(8, "float32"), f"{P}lm_head.weight": np.ones((3, 8), "float32")}
    config = CONFIG.replace(modules_to_save=["norm", "lm_head"])
    jaxadapt.write(jaxadapt.PeftTensors(config, tensors() | copies), tmp_path / "a")
    run("rename", tmp_path / "a", "--base", tmp_path / "base.json", "--out", tmp_path / "b")
    names = {key.removeprefix(P).removesuffix(".weight") for key in jaxadapt.read(tmp_path / "b").tensors}
    assert {"model.language_model.norm", "lm_head"} <= names


def test_rename_keeps_the_inputs_that_ia3_scales(tmp_path: Path):
    names = ["model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj"]
    config = jaxadapt.IA3Config(target_modules=names, feedforward_modules=names[1:])
    vectors = {f"{P}{names[0]}.ia3_l": np.ones((6, 1), "float32"), f"{P}{names[1]}.ia3_l": np.ones((1, 6), "float32")}
    jaxadapt.write(jaxadapt.PeftTensors(config, vectors), tmp_path / "a")
    run("rename", tmp_path / "a", "--from", "", "--to", "outer.", "--out", tmp_path / "b")
    renamed = jaxadapt.read(tmp_path / "b").config
    assert set(renamed.target_modules) == {f"outer.{name}" for name in names}
    assert list(renamed.feedforward_modules) == [f"outer.{names[1]}"]


def test_rename_leaves_tensors_of_the_whole_adapter_alone(tmp_path: Path):
    config = jaxadapt.VeraConfig(r=2, target_modules=["q_proj"])
    shared = {"base_model.vera_A": np.ones((2, 8), "float32"), "base_model.vera_B": np.ones((10, 2), "float32")}
    module = f"{P}layers.0.q_proj."
    own = {f"{module}vera_lambda_b": np.ones(10, "float32"), f"{module}vera_lambda_d": np.ones(2, "float32")}
    jaxadapt.write(jaxadapt.PeftTensors(config, shared | own), tmp_path / "a")
    run("rename", tmp_path / "a", "--from", "", "--to", "outer.", "--out", tmp_path / "b")
    wanted = {*shared, *(key.replace("layers", "outer.layers") for key in own)}
    assert set(jaxadapt.read(tmp_path / "b").tensors) == wanted


def test_an_empty_name_is_not_the_working_directory(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As "$OUT" of a shell that has no such variable."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    result = CliRunner().invoke(main, ["rename", str(folder), "--from", "model.", "--to", "x.", "--out", ""])
    assert (result.exit_code, "found an empty string" in result.output) == (1, True), result.output
    assert not list((tmp_path / "here").iterdir())


@pytest.mark.parametrize("command", ["resize", "rename", "combine", "export", "undo-start", "convert"])
def test_a_command_does_not_replace_what_it_reads(command: str, folder: Path, tmp_path: Path):
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    options = {
        "resize": ["--rank", "2"], "rename": ["--from", "model.", "--to", "x."], "combine": ["--weights", "1"],
        "undo-start": ["--first", str(folder)],
    }.get(command, [])  # fmt: skip
    target = [str(tmp_path / "link")] if command == "convert" else ["--out", str(tmp_path / "link")]
    result = CliRunner().invoke(main, [command, str(folder), *target, *options])
    assert (result.exit_code, "the target is the source" in " ".join(result.output.split())) == (1, True), result.output
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("command", ["combine", "extract"])
def test_nor_what_it_reads_in_second_place_or_as_one_file(command: str, folder: Path, tmp_path: Path):
    shutil.copytree(folder, tmp_path / "first")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    words = {
        "combine": [str(tmp_path / "first"), str(folder), "--weights", "1,1"],
        "extract": [str(folder / "adapter_model.safetensors"), "--config", str(tmp_path / "first")],
    }[command]
    result = CliRunner().invoke(main, [command, *words, "--out", str(folder)])
    assert (result.exit_code, "the target is the source" in " ".join(result.output.split())) == (1, True), result.output
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_results_keep_the_fingerprint_of_the_base(tmp_path: Path):
    from tests.support import small

    for name, seed in (("a", 1), ("b", 2)):
        jaxadapt.save(small.trained(seed=seed), tmp_path / name)
    base = jaxadapt.read(tmp_path / "a").fingerprint
    assert base
    run("resize", tmp_path / "a", "--rank", 8, "--out", tmp_path / "resized")
    run("combine", tmp_path / "a", tmp_path / "b", "--weights", "1,1", "--out", tmp_path / "both")
    assert jaxadapt.read(tmp_path / "resized").fingerprint == jaxadapt.read(tmp_path / "both").fingerprint == base
    key = next(iter(base))
    other = {**base, key: {**base[key], "bf16": "3f80" * 8}}
    held = jaxadapt.read(tmp_path / "b")
    jaxadapt.write(dataclasses.replace(held, fingerprint=other), tmp_path / "b")
    with pytest.warns(UserWarning, match="were trained on different base models: 1 of 2 compared weights differ"):
        adapter_files.combine_folders([tmp_path / "a", tmp_path / "b"], [1, 1], tmp_path / "mixed")
    assert jaxadapt.read(tmp_path / "mixed").fingerprint is None


def test_start_undo_gives_a_plain_lora(tmp_path: Path):
    """ΔW = s·(B·A − B₀·A₀): what the training added to the original base."""
    config = CONFIG.replace(init_lora_weights="pissa")
    first, trained = (jaxadapt.PeftTensors(config, tensors(seed)) for seed in (1, 2))
    jaxadapt.write(first, tmp_path / "first")
    jaxadapt.write(trained, tmp_path / "trained")
    result = run(
        "undo-start", tmp_path / "trained", "--first", tmp_path / "first", "--out", tmp_path / "plain", "--json"
    )
    assert json.loads(result.output)["rank"] == 8
    plain = jaxadapt.read(tmp_path / "plain")
    assert plain.config.init_lora_weights is True
    for module in MODULES:
        wanted = change(trained, module) - change(first, module)
        np.testing.assert_allclose(change(plain, module), wanted, rtol=1e-5, atol=1e-5)
    again = CliRunner().invoke(
        main, ["undo-start", f"{tmp_path}/plain", "--first", f"{tmp_path}/first", "--out", f"{tmp_path}/x"]
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
    assert "there is no adapter 'default'; choose one with --name: de, fr" in missing.output
    lost = CliRunner().invoke(main, ["extract", f"{tmp_path}/model.safetensors", "--out", f"{tmp_path}/x"])
    assert "pass --config" in lost.output
    (tmp_path / "other.json").write_text(CONFIG.replace(r=8).to_json())
    words = ["extract", f"{tmp_path}/model.safetensors", "--name", "fr", "--config", f"{tmp_path}/other.json"]
    other = CliRunner().invoke(main, [*words, "--out", f"{tmp_path}/x"])
    assert "rank 4 in the file and 8 in the configuration" in " ".join(other.output.split())
    assert not (tmp_path / "x").exists()


def test_extract_of_a_file_without_tensors_says_what_it_expects(folder: Path, tmp_path: Path):
    (tmp_path / "shapes.json").write_text("{}")
    for config in (None, folder):
        with pytest.raises(
            jaxadapt.FileError, match=r"shapes\.json: expected a file of weights or an Orbax checkpoint"
        ):
            adapter_files.extract_files(tmp_path / "shapes.json", tmp_path / "out", config=config)


@pytest.mark.parametrize(("bias", "count"), [("none", 0), ("lora_only", 2), ("all", 3)])
def test_extract_takes_the_trained_biases(bias: str, count: int, tmp_path: Path):
    biases = {f"{P}{module}.base_layer.bias": np.ones(3, "float32") for module in MODULES} | {
        f"{P}model.norm.bias": np.ones(3, "float32")
    }
    save_file(state_dict() | biases, tmp_path / "model.safetensors")
    jaxadapt.write(jaxadapt.PeftTensors(CONFIG.replace(bias=bias), tensors()), tmp_path / "config")
    run("extract", tmp_path / "model.safetensors", "--name", "de", "--config", tmp_path / "config",
        "--out", tmp_path / "de")  # fmt: skip
    assert sum(key.endswith(".bias") for key in jaxadapt.read(tmp_path / "de").tensors) == count


def test_extract_from_an_orbax_checkpoint(tmp_path: Path):
    base = {"q": {"kernel": np.zeros((4, 6), "f4")}}
    config = jaxadapt.LoraConfig(r=2, target_modules=["q"], init_lora_weights=False)
    adapter = jaxadapt.init(base, config, key=jax.random.key(0))
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
        LoraTree({f"{layer}{end}": tree[f"w{end}"] for end in ("", "_lora_a", "_lora_b")}, lora_alpha=6.0),
        keymap="tunix:qwen3",
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


def test_the_name_of_this_folder_is_not_a_dot(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (folder / "other").mkdir()
    jaxadapt.write(jaxadapt.PeftTensors(CONFIG, tensors(1)), folder / "other")
    monkeypatch.chdir(folder / "other")
    run("convert", ".", "..", tmp_path / "both")
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == ["adapter", "other"]


def test_convert_several_and_subfolders(folder: Path, tmp_path: Path):
    jaxadapt.write(jaxadapt.PeftTensors(CONFIG, tensors(1)), tmp_path / "other")
    run("convert", folder, tmp_path / "other", tmp_path / "both", "--format", "bin")
    run("convert", tmp_path / "both", tmp_path / "again")
    for name in ("adapter", "other"):
        file = "adapter_model.safetensors"
        assert (tmp_path / "again" / name / file).read_bytes() == (tmp_path / name / file).read_bytes()
    twice = CliRunner().invoke(main, ["convert", str(folder), str(folder), str(tmp_path / "x")])
    assert "several sources have the name adapter" in twice.output


def test_a_value_too_large_for_float16_is_refused(tmp_path: Path):
    large = {key: x * 1e5 for key, x in tensors().items()}
    jaxadapt.write(jaxadapt.PeftTensors(CONFIG, large), tmp_path / "a")
    result = CliRunner().invoke(main, ["convert", f"{tmp_path}/a", f"{tmp_path}/b", "--dtype", "float16"])
    assert result.exit_code == 1
    assert "finite values overflow float16, whose largest is 65504; use bfloat16" in result.output
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
