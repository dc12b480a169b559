"""mlx-lm's folder under PEFT's names: files that mlx-lm trained, the way back of the writer, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import jaxadapt
from jaxadapt.arrays.tensor_source import as_source, transpose
from jaxadapt.cli import main
from jaxadapt.export import export_adapter
from jaxadapt.export.conversion import convert
from jaxadapt.persistence.formats import mlx_files
from tests.support import fuzz_mlx_files

# A LoRA and a DoRA that mlx-lm 0.32.2 trained and saved, their base, and mlx-lm's logits:
# tests/full/programs/record_mlx.py.
RECORDED = Path(__file__).parent / "recorded_mlx"
TOKENS = [3, 7, 1, 9, 4, 20, 11, 2]
P = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"


# ---------------------------------------------------------------- files of mlx-lm


@pytest.mark.peft
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_peft_computes_what_mlx_computes(kind: str, tmp_path: Path):
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    done = CliRunner().invoke(main, ["convert", str(RECORDED / kind), str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    plain, lora, dora = np.load(RECORDED / "logits.npy")
    base = transformers.AutoModelForCausalLM.from_pretrained(RECORDED / "base").eval()
    with torch.no_grad():
        tokens = torch.tensor([TOKENS])
        np.testing.assert_allclose(base(tokens).logits[0], plain, atol=1e-5)  # the same base, in float32
        model = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
        got = model(tokens).logits[0].numpy()
    want = lora if kind == "lora" else dora
    assert abs(want - plain).max() > 0.05
    np.testing.assert_allclose(got, want, atol=2e-5)  # logits of about 5, sums in another order
    assert isinstance(model, peft.PeftModelForCausalLM)


def test_the_tensors_are_those_of_the_file(tmp_path: Path):
    for kind, modules in (("lora", 7), ("dora", 4)):
        convert(RECORDED / kind, tmp_path / kind)
        config, tensors = (
            jaxadapt.read_config(tmp_path / kind),
            load_file(tmp_path / kind / "adapter_model.safetensors"),
        )
        stored = load_file(RECORDED / kind / WEIGHTS)
        assert len(tensors) == len(stored) == modules * (3 if kind == "dora" else 2)
        for key, x in stored.items():
            name, _, end = key.rpartition(".")
            ends = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}
            np.testing.assert_array_equal(tensors[f"{P}{name}.{ends[end]}"], x.T)
        assert (config.r, config.lora_alpha / config.r, config.lora_dropout) == (3, 2.3, 0.1)
        assert (config.use_dora, config.base_model_name_or_path) == (kind == "dora", "org/base")
        assert set(config.target_modules) == {key.rpartition(".")[0] for key in stored}
    assert jaxadapt.read_config(RECORDED / "lora") == jaxadapt.read_config(tmp_path / "lora")


def test_every_command_takes_the_folder(tmp_path: Path):
    convert(RECORDED / "lora", tmp_path / "peft")
    info, same = jaxadapt.inspect(RECORDED / "lora"), jaxadapt.inspect(tmp_path / "peft")
    assert (info.tensors, info.config, info.form, same.form) == (same.tensors, same.config, "mlx-lm's folder", "PEFT")
    assert "jaxadapt convert" in CliRunner().invoke(main, ["inspect", str(RECORDED / "lora")]).output
    assert jaxadapt.analysis.diff(jaxadapt.read(RECORDED / "lora"), jaxadapt.read(tmp_path / "peft")).is_equal
    (found, *notes) = jaxadapt.verify(RECORDED / "lora")
    assert (found.code, found.remedy) == ("other-library", f"run: jaxadapt convert {RECORDED / 'lora'} OUT")
    assert [each.code for each in notes] == ["method", "scale"]
    shapes = {key: x.shape for key, x in load_file(RECORDED / "base" / "model.safetensors").items()}
    assert [each.severity for each in jaxadapt.verify(RECORDED / "lora", shapes)].count("error") == 1
    # a checkpoint of the training is a file beside the configuration
    shutil.copytree(RECORDED / "lora", tmp_path / "run")
    (tmp_path / "run" / WEIGHTS).rename(tmp_path / "run" / "0000004_adapters.safetensors")
    convert(tmp_path / "run" / "0000004_adapters.safetensors", tmp_path / "step")
    assert jaxadapt.analysis.diff(jaxadapt.read(tmp_path / "step"), jaxadapt.read(tmp_path / "peft")).is_equal
    (tmp_path / "alone").mkdir()
    shutil.copy(RECORDED / "lora" / WEIGHTS, tmp_path / "alone")
    with pytest.raises(jaxadapt.FileError, match="no adapter_config.json"):
        jaxadapt.read(tmp_path / "alone")
    with pytest.raises(jaxadapt.FileError, match="cannot replace mlx-lm's file of this name"):
        jaxadapt.write(jaxadapt.read(RECORDED / "lora"), tmp_path / "run")


def test_a_jax_model_loads_the_folder():
    weights = load_file(RECORDED / "base" / "model.safetensors")
    base: dict[str, Any] = {}
    for key, x in weights.items():
        node = base
        *path, last = key.removesuffix(".weight").split(".")
        for name in path:
            node = node.setdefault(name, {})
        node[last] = {"kernel": x.T} if x.ndim == 2 else {"scale": x}
    loaded = jaxadapt.load(RECORDED / "lora", {"params": base})
    stored = load_file(RECORDED / "lora" / WEIGHTS)
    flat = jaxadapt.extract(loaded).flat()
    assert len(flat) == len(stored)
    for path, x in flat.items():
        module, _, end = path.rpartition(".kernel.")
        np.testing.assert_array_equal(x, stored[f"{module}.{end.lower()}"].T)


# ---------------------------------------------------------------- the way back


def write(folder: Path, tensors: dict[str, np.ndarray], **fields: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    document = {"fine_tune_type": "lora", "num_layers": 4,
                "lora_parameters": {"rank": 2, "scale": 20.0, "dropout": 0.0}} | fields  # fmt: skip
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in document.items() if v is not None}))
    save_file(tensors, folder / WEIGHTS)
    return folder


def pair(module: str, dtype: Any = "float32") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(len(module))
    shapes = {"lora_a": (6, 2), "lora_b": (2, 8)}
    return {f"{module}.{name}": rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


MODULES = {
    "llama": ["model.layers.1.self_attn.q_proj"],
    "gpt2": ["transformer.h.0.attn.c_attn", "transformer.h.3.mlp.c_fc"],
    "gptj": ["transformer.h.5.attn.q_proj"],
    "gpt_neox": ["gpt_neox.layers.2.attention.dense", "gpt_neox.layers.2.mlp.dense_h_to_4h"],
    "a model with images": ["model.language_model.layers.0.mlp.up_proj"],
    "an embedding and its own head": ["model.embed_tokens", "lm_head"],
}


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("model", MODULES)
def test_what_the_writer_writes_comes_back(model: str, dora: bool, tmp_path: Path):
    modules = MODULES[model]
    if dora and "model.embed_tokens" in modules:
        modules = ["lm_head"]
    config = jaxadapt.LoraConfig(r=2, lora_alpha=8, target_modules=modules, use_dora=dora)
    rng, tensors = np.random.default_rng(0), dict[str, np.ndarray]()
    for module in modules:
        name, end = ("lora_embedding", "") if module == "model.embed_tokens" else ("lora", ".weight")
        for side, shape in (("A", (2, 6)), ("B", (8, 2))):
            tensors[f"{P}{module}.{name}_{side}{end}"] = rng.standard_normal(shape).astype(ml_dtypes.bfloat16)
        if dora:
            tensors[f"{P}{module}.lora_magnitude_vector"] = rng.standard_normal(8).astype("float32")
    jaxadapt.write(jaxadapt.PeftTensors(config, tensors), tmp_path / "in")
    (tmp_path / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": false}')
    export_adapter(tmp_path / "in", tmp_path / "mlx", "mlx", base=tmp_path / "config.json")
    back = jaxadapt.read(tmp_path / "mlx")
    assert set(back.config.target_modules) == set(modules)
    assert (back.config.use_dora, back.config.r, back.config.lora_alpha) == (dora, 2, 2)
    assert back.config.fan_in_fan_out == (model == "gpt2")
    assert back.tensors.keys() == tensors.keys()
    for key, x in tensors.items():  # the writer multiplies B by the scale of 4, which is exact
        want = np.asarray(4, x.dtype) * x if "_B" in key else x
        np.testing.assert_array_equal(np.asarray(back.tensors[key]).astype("float32"), want.astype("float32"))


def test_the_scale_is_exact():
    rng = np.random.default_rng(0)
    for scale, rank in zip(
        [20.0, 0.1, 2.3, *rng.uniform(0.01, 40, 500)], [8, 3, 3, *rng.integers(1, 200, 500)], strict=True
    ):
        alpha = mlx_files.alpha_of(float(scale), int(rank))
        again = json.loads(json.dumps(alpha)) / int(rank)
        assert abs(again - scale) <= np.spacing(scale)
        assert np.float32(again) == np.float32(scale)
    assert mlx_files.alpha_of(20.0, 8) == 160
    assert isinstance(mlx_files.alpha_of(20.0, 8), int)


def test_transposed_tensors_are_read_in_parts():
    x = np.arange(12, dtype="float32").reshape(3, 4).astype(ml_dtypes.bfloat16)
    turned = transpose(as_source({"x": x}), {"y": "x"})
    assert (turned.specs["y"].shape, turned["y"].dtype) == ((4, 3), x.dtype)
    np.testing.assert_array_equal(turned["y"], x.T)
    np.testing.assert_array_equal(turned.read_slice("y", (slice(1, 3),)), x.T[1:3])
    np.testing.assert_array_equal(turned.read_slice("y", (slice(1, 3), slice(2, 3))), x.T[1:3, 2:3])
    np.testing.assert_array_equal(turned.read_slice("y", (slice(5, 7),), (12,)), x.T.reshape(12)[5:7])


# ---------------------------------------------------------------- what is refused


Q, EMBEDDING = "model.layers.0.self_attn.q_proj", "model.embed_tokens"
OLD = {"fine_tune_type": None, "lora_layers": 16, "num_layers": None, "use_dora": False}


def parameters(**fields: Any) -> dict[str, Any]:
    return {"lora_parameters": {"rank": 2, "scale": 20.0, "dropout": 0.0} | fields}


EXPERTS = {f"{Q}.lora_a": np.ones((4, 2, 6), "float32"), f"{Q}.lora_b": np.ones((4, 8, 2), "float32")}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a full fine-tune": ({"model.norm.weight": np.ones(2, "float32")}, {"fine_tune_type": "full"}, "whole weights"),
    "another kind": (pair(Q), {"fine_tune_type": "loha"}, "found 'loha'"),
    "experts": (EXPERTS, {}, "all 4 experts"),
    "no b": ({f"{Q}.lora_a": pair(Q)[f"{Q}.lora_a"]}, {}, "expected lora_a and lora_b, found lora_a"),
    "no m": (pair(Q), {"fine_tune_type": "dora"}, "expected lora_a, lora_b and m"),
    "an m": (pair(Q) | {f"{Q}.m": np.ones(8, "float32")}, {}, "found lora_a, lora_b, m"),
    "a wrong m": (pair(Q) | {f"{Q}.m": np.ones(6, "float32")}, {"fine_tune_type": "dora"}, r"expected m \(8,\)"),
    "another rank": (pair(Q), parameters(rank=3), r"expected lora_a \(in, 3\)"),
    "another tensor": (pair(Q) | {"model.norm.weight": np.ones(2, "float32")}, {}, r"norm\.weight: expected lora_a"),
    "nothing": ({}, {}, "no module"),
    "an embedding": (pair(Q) | pair(EMBEDDING), {}, "the head may be tied"),
    "a DoRA of an embedding": (
        pair(EMBEDDING) | {f"{EMBEDDING}.m": np.ones(8, "float32")}, {"fine_tune_type": "dora"}, "normalizes the rows"),
    "two names": (pair("model.h.0.attn.c_attn") | pair("transformer.h.0.attn.c_attn"), {}, "two modules of the file"),
    "no scale": (pair(Q), parameters(scale=None), "scale: expected a number, found None"),
    "a scale that is no number": (pair(Q), parameters(scale=float("nan")), "scale: expected a number, found nan"),
    "a huge scale": (pair(Q), parameters(scale=10**400), "scale: expected a number"),
    "a rank that is no number": (pair(Q), parameters(rank=True), "rank: expected a positive integer, found True"),
    "a dropout of 1": (pair(Q), parameters(dropout=1), "dropout: expected"),
    "no parameters": (pair(Q), {"lora_parameters": [1]}, r"expected an object, found \[1\]"),
    "an old alpha": (pair(Q), OLD | parameters(alpha=16, scale=10.0), r"alpha/rank = 80, later versions by scale"),
    "PEFT's configuration": (pair(Q), {"peft_type": "LORA"}, "expected mlx-lm's configuration"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_has_no_form_for_is_refused(case: str, tmp_path: Path):
    tensors, fields, message = REFUSED[case]
    folder = write(tmp_path / "in", tensors, **fields)
    for call in (jaxadapt.read, jaxadapt.inspect, lambda path: convert(path, tmp_path / "out")):
        with pytest.raises(jaxadapt.AdapterError, match=message):
            call(folder)
    assert not (tmp_path / "out").exists()
    (found,) = jaxadapt.verify(folder)
    assert (found.severity, found.code) == ("error", "other-library")
    with pytest.raises(jaxadapt.MismatchError, match="cannot be repaired"):
        jaxadapt.repair(folder)


READ: dict[str, tuple[dict[str, Any], float]] = {
    "an alpha that is the rank": (OLD | parameters(alpha=2), 20.0),
    "an alpha that newer versions ignore": (parameters(alpha=16), 20.0),
    "no dropout": ({"lora_parameters": {"rank": 2, "scale": 0.5}}, 0.5),
}


@pytest.mark.parametrize("case", READ)
def test_older_files_are_read(case: str, tmp_path: Path):
    fields, scale = READ[case]
    config = jaxadapt.read(write(tmp_path, pair(Q), **fields)).config
    assert config.lora_alpha / config.r == scale


def test_embeddings_beside_their_own_head(tmp_path: Path):
    tensors = pair(EMBEDDING) | pair("lm_head")
    found = jaxadapt.read(write(tmp_path, tensors)).tensors
    np.testing.assert_array_equal(found[f"{P}{EMBEDDING}.lora_embedding_A"], tensors[f"{EMBEDDING}.lora_a"].T)
    np.testing.assert_array_equal(found[f"{P}{EMBEDDING}.lora_embedding_B"], tensors[f"{EMBEDDING}.lora_b"].T)
    assert f"{P}lm_head.lora_A.weight" in found


def test_damaged_files_are_refused(tmp_path: Path):
    damage: list[Callable[[Path], Any]] = [
        lambda path: (path / CONFIG).write_text("{"),
        lambda path: (path / CONFIG).write_text("[" * 100_000),
        lambda path: (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-8]),
    ]
    for number, change in enumerate(damage):
        folder = write(tmp_path / str(number), pair(Q))
        change(folder)
        with pytest.raises(jaxadapt.AdapterError, match=str(folder)):
            jaxadapt.read(folder)
        assert [each.code for each in jaxadapt.verify(folder)] == ["other-library"]


def test_random_adapters_are_read_or_refused():
    found = fuzz_mlx_files.main(3_000)
    assert min(found[kind] for kind in ("refused", "LoRA", "DoRA")) > 200


def test_a_file_with_linear_layers_beside_gpt2s_is_not_of_conv1d_alone(tmp_path: Path):
    """PEFT's fan_in_fan_out is one setting for all modules: true only if each is a Conv1D."""
    gpt2 = pair("transformer.h.0.attn.c_attn")
    assert jaxadapt.read(write(tmp_path / "all", gpt2)).config.fan_in_fan_out is True
    assert jaxadapt.read(write(tmp_path / "mixed", gpt2 | pair("lm_head"))).config.fan_in_fan_out is False
