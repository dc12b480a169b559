"""`verify` and `repair`: real files, files damaged on purpose, files of other programs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import jaxadapt
from jaxadapt.cli import main
from jaxadapt.persistence import verify_folder
from tests.support import small
from tests.support.configs import class_of

P = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SIZES = {"self_attn.q_proj": (8, 6), "mlp.up_proj": (12, 6)}
BASE = {f"model.layers.{l}.{name}.weight": shape for l in range(6) for name, shape in SIZES.items()}
BASE["model.embed_tokens.weight"] = (30, 6)
SETTINGS = jaxadapt.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"])
Tensors = dict[str, np.ndarray]


def sound() -> Tensors:
    rng = np.random.default_rng(0)
    return {
        f"{P}{key.removesuffix('.weight')}.lora_{name}.weight": (0.02 * rng.standard_normal(shape)).astype("float32")
        for key, (out, inner) in BASE.items()
        if "layers" in key
        for name, shape in (("A", (4, inner)), ("B", (out, 4)))
    }


def codes(path: Any, base: Any = None, severity: str = "") -> list[str]:
    """The kinds of the errors and warnings."""
    found = jaxadapt.verify(path, base)
    return [f.code for f in found if (f.severity == severity if severity else f.severity != "note")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    jaxadapt.write(jaxadapt.PeftTensors(SETTINGS, sound()), tmp_path / "sound")
    return tmp_path / "sound"


def damaged(folder: Path, tensors: Tensors, **changes: Any) -> Path:
    """A folder beside with these tensors, written by another library, and with a changed configuration."""
    out = folder.parent / "damaged"
    out.mkdir()
    save_file(tensors, out / WEIGHTS)
    (out / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | changes))
    return out


# ---------------------------------------------------------------- real files

# {kinds of errors and warnings: the configurations in real-adapters/configs that have them}. All others have none.
REAL_CONFIGS = {
    "configuration": "040 203 215",
    "whole-model": "044",
    "other-library": "074 087 088 206 207 216 218 225",
    "unknown-method": "105 106 196 197",
    "old-layout": "226",
}
# (weights, its configuration, kinds of the errors and warnings).
REAL_FOLDERS = (
    ("000", "031", []), ("001", "040", ["configuration", "no-adapter"]), ("005", "058", []), ("007", "061", []),
    ("008", "071", []), ("009", "076", []), ("011", "086", []), ("014", "199", []),
    ("015", "215", ["unreadable", "configuration"]), ("018", "222", []),
    ("019", "226", ["old-layout", "shape", "rank"]), ("020", "228", []),
)  # fmt: skip


def test_real_configurations(real_adapters: Path):
    files = sorted((real_adapters / "configs").glob("*.json"))
    assert len(files) == 229
    expected = {stem: kinds for kinds, stems in REAL_CONFIGS.items() for stem in stems.split()}
    assert {f.stem: ", ".join(found) for f in files if (found := codes(f))} == expected


@pytest.mark.parametrize(("weights", "config", "expected"), REAL_FOLDERS)
def test_real_folders(weights: str, config: str, expected: list[str], real_adapters: Path, tmp_path: Path):
    file = next((real_adapters / "weights").glob(f"{weights}_*"))
    shutil.copy(file, tmp_path / file.name.partition("_")[2])
    shutil.copy(real_adapters / "configs" / f"{config}.json", tmp_path / CONFIG)
    assert codes(tmp_path) == expected
    if not expected:  # what has no finding can be read
        assert jaxadapt.read(tmp_path).tensors


def test_real_weights_alone(real_adapters: Path):
    found = {f.name[:3]: codes(f) for f in sorted((real_adapters / "weights").glob("*_adapter_model.*"))}
    odd = {"001": ["no-adapter"], "015": ["unreadable"]}
    assert found == {weights: odd.get(weights, ["configuration-missing"]) for weights, _, _ in REAL_FOLDERS}


# ---------------------------------------------------------------- sound files


@pytest.mark.parametrize("base", [None, BASE, "llama"])
def test_a_sound_adapter_has_only_notes(folder: Path, base: Any):
    found = jaxadapt.verify(folder, base)
    assert [(f.severity, f.code, f.found) for f in found] == [
        ("note", "method", "LORA adapter, 24 tensors, 12 adapted modules"),
        ("note", "scale", "rank 4 and scale 2 in 12 modules (q_proj, up_proj)"),
    ]


def test_scales_by_module(tmp_path: Path):
    config = SETTINGS.replace(rank_pattern={"q_proj": 4}, r=4, alpha_pattern={"up_proj": 3}, use_rslora=True)
    jaxadapt.write(jaxadapt.PeftTensors(config, sound()), tmp_path)
    notes = {f.found: f.subjects for f in jaxadapt.verify(tmp_path) if f.code == "scale"}
    assert sorted(notes) == [
        "rank 4 and scale 1.5 in 6 modules (up_proj)", "rank 4 and scale 4 in 6 modules (q_proj)",
    ]  # fmt: skip


def test_a_scale_divides_by_the_rank_of_its_module(tmp_path: Path):
    config = SETTINGS.replace(r=16, lora_alpha=16, rank_pattern={"q_proj": 4, "up_proj": 4})
    jaxadapt.write(jaxadapt.PeftTensors(config, sound()), tmp_path)
    (note,) = [f.found for f in jaxadapt.verify(tmp_path) if f.code == "scale"]
    assert note.startswith("rank 4 and scale 4 in 12 modules")


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_one_matrix_of_a_pair_alone_names_the_missing_one(half: str, folder: Path):
    key = f"{P}model.layers.3.mlp.up_proj.{half}.weight"
    found = jaxadapt.verify(damaged(folder, {k: x for k, x in sound().items() if k != key}))
    assert [f.subjects for f in found if f.code == "missing"] == [(key,)]


def test_an_embedding_for_fewer_tokens_than_the_base_has_is_another_vocabulary(tmp_path: Path):
    """Its A has one column for each token: (r, 20), where the base has 30 rows."""
    config = jaxadapt.LoraConfig(r=4, target_modules=["embed_tokens"])
    module = f"{P}model.embed_tokens.lora_embedding_"
    tensors = {f"{module}A": np.full((4, 20), 0.1, "f4"), f"{module}B": np.full((6, 4), 0.1, "f4")}
    jaxadapt.write(jaxadapt.PeftTensors(config, tensors), tmp_path)
    assert codes(tmp_path, BASE, "error") == ["vocabulary"]


@pytest.mark.parametrize("config", [small.LORA, small.IA3])
def test_adapters_of_this_library(config: jaxadapt.Config, tmp_path: Path):
    jaxadapt.save(jaxadapt.init(small.base()["params"], config, key=jax.random.key(0)), tmp_path / "fresh")
    jaxadapt.save(small.adapter(config), tmp_path / "trained")
    jaxadapt.save(small.adapter(config), tmp_path / "orbax", format="orbax")
    shapes = {"q_proj.weight": (8, 6), "up_proj.weight": (6, 8)}
    huge = ["huge"] if config is small.LORA else []  # the values of these networks are near 1
    assert codes(tmp_path / "fresh", shapes) == ["untrained"]
    assert codes(tmp_path / "trained", shapes) == codes(tmp_path / "orbax", shapes) == huge


UNTRAINED = {
    "RANDLORA": {"r": 2}, "OFT": {"oft_block_size": 2}, "WAVEFT": {"n_frequency": 5}, "PEANUT": {"r": 2},
    "LOKR": {"r": 1, "decompose_both": True}, "HIRA": {"r": 2}, "VERA": {"r": 2}, "LOHA": {"r": 2},
}  # fmt: skip


@pytest.mark.parametrize("peft_type", UNTRAINED)
def test_a_fresh_adapter_is_found(peft_type: str, tmp_path: Path):
    config = class_of(peft_type)(target_modules=["q_proj", "up_proj"], **UNTRAINED[peft_type])
    jaxadapt.save(jaxadapt.init(small.base()["params"], config, key=jax.random.key(0)), tmp_path / "fresh")
    jaxadapt.save(small.adapter(config), tmp_path / "trained")
    assert codes(tmp_path / "fresh") == ["untrained"]
    assert "untrained" not in codes(tmp_path / "trained")


def test_no_library_of_arrays_is_needed_for_a_configuration(folder: Path):
    code = (
        "import sys, jaxadapt\n"
        f"assert jaxadapt.verify({str(folder / CONFIG)!r})\n"
        "assert not {'torch', 'jax', 'numpy'} & set(sys.modules), 'imported'\n"
        f"assert jaxadapt.verify({str(folder)!r}, 'llama')\n"
        "assert not {'torch', 'flax'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------- damage that can be repaired


def renamed(change: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {change(key): value for key, value in tensors.items()}


def with_base_weights(tensors: Tensors) -> Tensors:
    """The state dict of a complete PEFT model."""
    names = {key.replace(".weight", ".poem.weight"): value for key, value in tensors.items()}
    base = {f"{P}{key.replace('.weight', '.base_layer.weight')}": np.ones(s, "float32") for key, s in BASE.items()}
    return names | base


REPAIRABLE: dict[str, tuple[Callable[[Tensors], Tensors], dict[str, Any], list[str]]] = {
    "torch.compile": (renamed(lambda k: k.replace(P, f"{P}_orig_mod.")), {}, ["wrapper-names"]),
    "DataParallel": (renamed(lambda k: f"module.{k}"), {}, ["wrapper-names"]),
    "FSDP": (renamed(lambda k: k.replace(".lora", "._fsdp_wrapped_module.lora")), {}, ["wrapper-names"]),
    "no prefix": (renamed(lambda k: k.removeprefix(P)), {}, ["prefix"]),
    "PEFT twice": (renamed(lambda k: P + k), {}, ["prefix"]),
    "adapter's name": (renamed(lambda k: k.replace(".weight", ".default.weight")), {}, ["adapter-name"]),
    "loralib": (renamed(lambda k: k.removesuffix(".weight")), {}, ["tensor-names"]),
    "everything": (
        renamed(lambda k: "module._orig_mod." + k.removeprefix(P).replace(".weight", ".default.weight")), {},
        ["wrapper-names", "prefix", "adapter-name"],
    ),
    "stored twice": (lambda t: t | {k.removeprefix(P): v for k, v in t.items()}, {}, ["prefix", "duplicate"]),
    "complete PEFT model": (with_base_weights, {}, ["adapter-name"]),
    "peft_type": (dict, {"peft_type": "PeftType.lora"}, ["configuration"]),
    "rank": (dict, {"r": 4.0, "rank_pattern": None, "alpha_pattern": None}, ["configuration"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REPAIRABLE)
def test_what_is_certain_is_repaired_bit_for_bit(case: str, folder: Path):
    change, fields, expected = REPAIRABLE[case]
    found = damaged(folder, change(sound()), **fields)
    before = {file.name: file.read_bytes() for file in found.iterdir()}
    assert codes(found) == expected
    assert all(f.repairable for f in jaxadapt.verify(found) if f.severity != "note")
    result = jaxadapt.repair(found)
    assert result.path == str(found) + "-repaired"
    assert len(result.done) >= 1
    assert not result.remaining
    for name in (CONFIG, WEIGHTS):
        assert (Path(result.path) / name).read_bytes() == (folder / name).read_bytes()
    assert {file.name: file.read_bytes() for file in found.iterdir()} == before
    assert jaxadapt.repair(result.path).path is None


def test_a_lost_configuration_is_read_from_the_header(folder: Path):
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).unlink()
    for reader in (jaxadapt.read, jaxadapt.inspect):
        with pytest.warns(UserWarning, match="is missing; using the copy of the configuration"):
            assert reader(folder).config == SETTINGS
    assert codes(folder) == ["configuration-lost"]
    jaxadapt.repair(folder, folder)  # in place: asked for
    assert (folder / CONFIG).read_text() == text
    assert codes(folder) == []


def test_a_damaged_configuration_is_written_again_from_the_header(folder: Path):
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(text[:50])
    assert codes(folder) == ["configuration"]
    out = jaxadapt.repair(folder, folder.parent / "out").path
    assert (Path(out or "") / CONFIG).read_text() == text


def test_repair_never_writes_over_another_adapter(folder: Path):
    found = damaged(folder, renamed(lambda k: k.removeprefix(P))(sound()))
    with pytest.raises(jaxadapt.FileError, match="the folder contains an adapter"):
        jaxadapt.repair(found, folder)
    assert codes(folder) == []


def test_repair_never_writes_beside_the_bin_file_of_another_adapter(folder: Path, tmp_path: Path):
    found = damaged(folder, renamed(lambda k: k.removeprefix(P))(sound()))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "adapter_model.bin").write_bytes(b"somebody's")
    with pytest.raises(jaxadapt.FileError, match="the folder contains an adapter"):
        jaxadapt.repair(found, tmp_path / "theirs")
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["adapter_model.bin"]


def test_load_repairs_on_request(tmp_path: Path):
    jaxadapt.save(small.adapter(), tmp_path / "sound")
    stored = jaxadapt.read(tmp_path / "sound")
    found = {f"_orig_mod.{key.removeprefix(P)}": value for key, value in stored.tensors.items()}
    path = damaged(tmp_path / "sound", found)
    with pytest.raises(jaxadapt.MismatchError):
        jaxadapt.load(path, small.net())
    with pytest.warns(UserWarning, match=r"repaired while reading.*\n  4 keys: the names of wrapping"):
        model = jaxadapt.load(jaxadapt.read(path, repair=True), small.net())
    assert np.array_equal(model(small.X), jaxadapt.load(tmp_path / "sound", small.net())(small.X))
    assert codes(path, severity="error") == ["wrapper-names", "prefix"]


# ---------------------------------------------------------------- damage that nobody can repair


def changed(part: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: change(value) if part in key else value for key, value in tensors.items()}


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if part not in key}


def kohya(tensors: Tensors) -> Tensors:
    def name(key: str) -> str:
        module, _, tensor = key.removeprefix(P).partition(".lora_")
        return f"lora_unet_{module.replace('.', '_')}.lora_{'down' if tensor[0] == 'A' else 'up'}.weight"

    return {name(key): value for key, value in tensors.items()}


def mlx(tensors: Tensors) -> Tensors:
    return {
        key.removeprefix(P).replace("_A.weight", "_a").replace("_B.weight", "_b"): np.ascontiguousarray(value.T)
        for key, value in tensors.items()
    }


EXTRA = {f"{P}model.extra.weight": np.ones((2, 2), "float32")}
TABLE = {f"{P}model.embed_tokens.weight": np.ones((20, 6), "float32")}
BEYOND: dict[str, tuple[Callable[[Tensors], Tensors], dict[str, Any], list[str]]] = {
    "ZeRO-3": (changed("q_proj", lambda x: x[:0, 0]), {}, ["empty"]),
    "no B": (without("layers.3.mlp.up_proj.lora_B"), {}, ["missing"]),
    "no magnitude": (dict, {"use_dora": True}, ["missing"]),
    "no bias": (dict, {"lora_bias": True}, ["missing"]),
    "no head": (dict, {"modules_to_save": ["lm_head"]}, ["missing"]),
    "no rows": (dict, {"trainable_token_indices": [1, 2]}, ["missing"]),
    "no layer": (without("layers.3.mlp"), {}, ["missing", "layers"]),
    "extra": (lambda t: t | EXTRA, {}, ["unexpected"]),
    "NaN": (changed("layers.3.mlp.up_proj.lora_A", lambda x: x * np.nan), {}, ["not-finite"]),
    "infinity": (changed("layers.3.mlp.up_proj.lora_A", lambda x: x.astype("float16") + np.inf), {}, ["not-finite"]),
    "untrained": (changed("lora_B", lambda x: x * 0), {}, ["untrained"]),
    "huge": (changed("layers.2.self_attn.q_proj.lora_B", lambda x: x * 300), {}, ["huge"]),
    "another rank": (dict, {"r": 2}, ["rank"]),
    "other targets": (dict, {"target_modules": ["q_proj"]}, ["untargeted"]),
    "more targets": (dict, {"target_modules": ["q_proj", "up_proj", "gate_proj"]}, ["target-without-tensors"]),
    "another base": (renamed(lambda k: k.replace("layers", "h")), {}, ["base"]),
    "another size": (changed("q_proj.lora_B", lambda x: x[:6]), {}, ["shape"]),
    "A without B": (changed("q_proj.lora_B", lambda x: x[:, :3]), {}, ["shape"]),
    "another vocabulary": (lambda t: t | TABLE, {}, ["vocabulary"]),
    "no model. prefix": (renamed(lambda k: k.replace("model.layers", "layers")), {}, ["prefix"]),
    "a vision-language model": (renamed(lambda k: k.replace("model.layers", "model.language_model.layers")), {},
                                ["renamed"]),
    "several adapters": (lambda t: {k.replace(".weight", f".{n}.weight"): v for k, v in t.items() for n in "ab"}, {},
                         ["several-adapters"]),
    "two values": (lambda t: t | {k.removeprefix(P): v + 1 for k, v in t.items()}, {}, ["prefix", "duplicate"]),
    "a newer PEFT": (dict, {"peft_version": "0.99.0", "use_magic": True}, ["newer-peft"]),
    "an unknown method": (dict, {"peft_type": "MAGIC"}, ["unknown-method"]),
    "another method": (dict, {"peft_type": "LOHA"}, ["missing"]),
    "kohya-ss": (kohya, {}, ["other-library"]),
    "MLX": (mlx, {}, ["other-library"]),
    "a model": (lambda t: {k.replace("lora_A.", ""): v for k, v in t.items() if "lora_A" in k}, {}, ["whole-model"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BEYOND)
def test_other_damage_is_found_and_not_repaired(case: str, folder: Path):
    change, fields, expected = BEYOND[case]
    found = damaged(folder, change(sound()), **fields)
    assert codes(found, BASE) == expected
    for finding in jaxadapt.verify(found, BASE):
        if finding.severity != "note":
            assert finding.found
            assert finding.expected
            assert finding.remedy
    if expected[0] in ("several-adapters", "other-library", "whole-model") or case == "two values":
        with pytest.raises(jaxadapt.MismatchError, match="cannot be repaired with certainty"):
            jaxadapt.repair(found)
    else:
        assert jaxadapt.repair(found).path is None


@pytest.mark.parametrize("stack", ["text_encoder_2.layers.", "layers_", ""])
def test_the_layer_that_lacks_a_module_is_named_whatever_comes_before_its_number(stack: str, folder: Path):
    tensors = renamed(lambda k: k.replace("model.layers.", stack))(without("layers.3.mlp")(sound()))
    (found,) = (f for f in jaxadapt.verify(damaged(folder, tensors)) if f.code == "layers")
    assert list(found.subjects) == [f"{stack}3.mlp.up_proj"]


def test_a_second_tensor_of_a_dtype_that_numpy_lacks_is_found_too(folder: Path):
    name = next(iter(sound())).replace(".weight", ".default.weight")
    found = damaged(folder, sound() | {name: np.zeros(12, "uint8")})
    raw = (found / WEIGHTS).read_bytes()
    (found / WEIGHTS).write_bytes(raw.replace(b'"U8","shape":[12]', b'"F4","shape":[24]'))
    assert codes(found, BASE)[0] == "duplicate"
    with pytest.raises(jaxadapt.MismatchError, match="with different values; remove the wrong one of each"):
        jaxadapt.repair(found)


def other_folders(tmp: Path) -> dict[str, Path]:
    """Folders and files that hold no adapter of PEFT."""
    for name in ("run", "model", "mlx", "diffusers", "parent/fr", "empty", "config"):
        (tmp / name).mkdir(parents=True)
    (tmp / "run" / "step-000000100.safetensors").write_bytes(b"")
    save_file({"w": np.ones(2, "float32")}, tmp / "model" / "model.safetensors")
    save_file(mlx(sound()), tmp / "mlx" / "adapters.safetensors")
    (tmp / "mlx" / CONFIG).write_text('{"lora_parameters": {"rank": 4}, "num_layers": 2}')
    save_file(kohya(sound()), tmp / "diffusers" / "pytorch_lora_weights.safetensors")
    (tmp / "parent" / "fr" / CONFIG).write_text("{}")
    (tmp / "config" / CONFIG).write_text(SETTINGS.to_json())
    return {
        "training-run": tmp / "run", "whole-model": tmp / "model", "other-library": tmp / "diffusers",
        "subfolders": tmp / "parent", "no-adapter": tmp / "empty", "no-weights": tmp / "config",
    }  # fmt: skip


def test_other_folders_are_recognized(tmp_path: Path):
    for code, path in other_folders(tmp_path).items():
        assert codes(path) == [code]
        with pytest.raises(jaxadapt.MismatchError, match="cannot be repaired"):
            jaxadapt.repair(path)
    (found,) = jaxadapt.verify(tmp_path / "mlx")
    assert (found.severity, found.code) == ("error", "other-library")
    assert "scale: expected a number, found None" in found.found
    assert codes(tmp_path / "run" / "step-000000100.safetensors") == ["training-run"]
    with pytest.raises(jaxadapt.FileError, match="no such folder"):
        jaxadapt.verify(tmp_path / "nothing")


def test_read_raises_the_error_of_the_first_finding(folder: Path, tmp_path: Path):
    for path in (*other_folders(tmp_path).values(), folder):
        if path == folder:
            (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-8])
        with pytest.raises(jaxadapt.FileError) as caught:
            jaxadapt.read(path)
        assert jaxadapt.verify(path)[0].found in str(caught.value)


def test_a_truncated_file_and_two_files(folder: Path):
    (folder / "adapter_model.bin").write_bytes(b"")
    assert codes(folder) == ["two-files"]
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-8])
    assert codes(folder) == ["unreadable", "two-files"]


@pytest.mark.parametrize("name", ["lamma", "nothing/here"])
def test_a_base_that_is_not_there(folder: Path, name: str):
    with pytest.raises(jaxadapt.FileError, match=f"{name}: no such folder or file"):
        jaxadapt.verify(folder, name)


@pytest.mark.parametrize("kind", ["folder", "file", "index", "json"])
def test_bases_are_read_without_their_tensors(kind: str, folder: Path, tmp_path: Path):
    path = tmp_path / "base"
    path.mkdir()
    tensors = {key: np.zeros(shape, "float32") for key, shape in BASE.items()}
    names = list(tensors)
    if kind == "json":
        path = tmp_path / "shapes.json"
        path.write_text(json.dumps(BASE))
    elif kind == "index":
        files = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(names)}
        for file in set(files.values()):
            save_file({n: tensors[n] for n in names if files[n] == file}, path / file)
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    else:
        save_file(tensors, path / "model.safetensors")
        path = path / "model.safetensors" if kind == "file" else path
    assert codes(folder, path) == []
    assert codes(damaged(folder, changed("q_proj.lora_B", lambda x: x[:6])(sound())), path) == ["shape"]
    if kind == "json":
        path.write_text(json.dumps({"model": BASE}))
        with pytest.raises(
            jaxadapt.FormatError, match=r"shapes such as \{name: \[2, 3\]\}, found no list of integers at:\n  model$"
        ):
            jaxadapt.verify(folder, path)


WORDS = (
    "base_model model q_proj lora_A lora_B weight default module _orig_mod 0 7 999999 ia3_l lora_down modules_to_save"
)
NAMES = st.sampled_from([*WORDS.split(), "base_layer", "", "é"])
FIELD_NAMES = (
    "peft_type r lora_alpha target_modules rank_pattern alpha_pattern bias modules_to_save use_dora peft_version"
)
FIELDS = st.sampled_from([*FIELD_NAMES.split(), "trainable_token_indices", "magic"])
TEXTS = st.sampled_from(["LORA", "lora", "IA3", "(", "q.*", ""])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 40) | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.lists(NAMES, min_size=1, max_size=7).map(".".join), st.lists(st.integers(0, 3), max_size=3), max_size=5
    ),
    st.dictionaries(FIELDS, VALUES, max_size=5),
    st.booleans(),
)
def test_any_tensors_and_settings_give_findings(tensors, fields, is_lora):
    """Neither `verify` nor `repair` fails in another way than they say, and a repaired folder needs no repair."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "a"
        folder.mkdir()
        save_file({key: np.zeros(shape, "float16") for key, shape in tensors.items()}, folder / WEIGHTS)
        sound_fields = {"peft_type": "LORA", "target_modules": ["q_proj"]} if is_lora else {}
        (folder / CONFIG).write_text(json.dumps(sound_fields | fields))
        for found in jaxadapt.verify(folder, BASE):
            assert found.severity in ("error", "warning", "note")
        try:
            result = jaxadapt.repair(folder)
        except jaxadapt.MismatchError:
            return
        if result.path is not None:
            assert not any(f.repairable for f in jaxadapt.verify(result.path))


# ---------------------------------------------------------------- commands


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_commands(folder: Path):
    assert run("verify", folder).exit_code == 0
    assert "no problem found" in run("verify", folder).output
    found = damaged(folder, renamed(lambda k: f"module.{k}")(sound()))
    result = run("verify", found)
    assert result.exit_code == 1
    assert f"jaxadapt repair {found} repairs wrapper-names" in result.output
    document = json.loads(run("verify", found, "--json").output)
    assert (document["error"], document["findings"][0]["code"]) == (1, "wrapper-names")
    assert run("repair", found, "--out", "x", "--in-place").exit_code == 2
    result = run("repair", found, "--json")
    assert (result.exit_code, json.loads(result.output)["remaining"]) == (0, [])
    assert run("repair", found, "--in-place").exit_code == run("verify", found).exit_code == 0
    assert "nothing to repair" in run("repair", found).output


def test_the_repaired_copy_of_this_folder_is_beside_it(folder: Path, monkeypatch: pytest.MonkeyPatch):
    found = damaged(folder, renamed(lambda k: f"module.{k}")(sound()))
    monkeypatch.chdir(found)
    assert run("repair", ".").exit_code == 0
    assert codes(found.parent / f"{found.name}-repaired") == []
    assert not [path for path in found.iterdir() if path.is_dir()]


# ---------------------------------------------------------------- PEFT's own opinion


@pytest.mark.peft
def test_peft_loads_the_damaged_files_without_effect_and_the_repaired_ones_rightly(tmp_path: Path):
    """The findings claim it: PEFT warns only, and its outputs are the base's."""
    import warnings

    import torch
    from peft import PeftModel

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = torch.nn.Linear(6, 8)
            self.up_proj = torch.nn.Linear(8, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.up_proj(torch.tanh(self.q_proj(x)))

    net = Net()
    jaxadapt.save(small.adapter(), tmp_path / "sound")
    stored = dict(jaxadapt.read(tmp_path / "sound").tensors)

    def outputs(path: Path) -> np.ndarray:
        import copy

        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return PeftModel.from_pretrained(copy.deepcopy(net), path)(torch.from_numpy(small.X)).numpy()

    with torch.no_grad():
        plain = net(torch.from_numpy(small.X)).numpy()
    right = outputs(tmp_path / "sound")
    assert not np.allclose(plain, right)
    for case in ("torch.compile", "DataParallel", "no prefix", "PEFT twice", "loralib"):
        path = damaged(tmp_path / "sound", REPAIRABLE[case][0](stored))
        assert np.array_equal(outputs(path), plain), case
        assert np.array_equal(outputs(Path(jaxadapt.repair(path).path or "")), right), case
        shutil.rmtree(path)
        shutil.rmtree(f"{path}-repaired")


def test_names_that_transformers_renamed_in_several_parts_of_a_model():
    """A vision-language model before transformers 4.52, on a base saved since: each part begins otherwise."""
    base = {
        "model.language_model.layers.0.q_proj.weight": (8, 8), "model.vision_tower.layers.0.q_proj.weight": (8, 8),
        "model.multi_modal_projector.linear_1.weight": (8, 8),
    }  # fmt: skip
    old = ["language_model.model.layers.0.q_proj", "vision_tower.layers.0.q_proj", "multi_modal_projector.linear_1"]
    assert verify_folder.names_in_base(old, base) == dict(
        zip(old, (key.removesuffix(".weight") for key in base), strict=True)
    )
    assert verify_folder.names_in_base([*old, "lost"], base) is None
    assert verify_folder.names_in_base(["layers.0.q_proj"], {"model.layers.0.q_proj.weight": (8, 8)}) == {
        "layers.0.q_proj": "model.layers.0.q_proj"
    }
