"""Exported adapters in the programs themselves: next-token log-probabilities equal PEFT's.

llama.cpp, mlx-lm and vLLM run in environments of their own, which this command makes (see the file):

    python tests/full/programs/environments.py FOLDER
    JAXADAPT_PROGRAMS=FOLDER python -m pytest tests/full/test_programs.py

With JAXADAPT_PROGRAMS_RECORD=1 the results go into the tables of docs/exports.md, as those of
`python -m tests.full.programs.table FOLDER` do.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

pytest.importorskip("torch")
pytest.importorskip("peft")

import jaxadapt
from jaxadapt.cli import main
from jaxadapt.export import export_adapter
from jaxadapt.export.conversion import convert
from tests.export import test_adapter_export as tiny
from tests.full.programs import environments, experts, measure, table, vllm_experts

FOLDER = os.environ.get("JAXADAPT_PROGRAMS")
pytestmark = [
    pytest.mark.peft,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # PEFT's and transformers' own, of tied weights
    pytest.mark.skipif(not FOLDER, reason="make the programs' environments first; the docstring has the command"),
]
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2"]
REFUSED = {
    "llama": {"DoRA", "lora_bias", "a copy of the embedding", "copies of norms", "target embed_tokens (tied)",
              "trainable tokens", "IA3", "aLoRA"},
    "mlx": {"lora_bias", "a copy of the embedding", "copies of norms", "target embed_tokens (tied)",
            "trainable tokens", "IA3", "aLoRA"},
    "vllm": {"DoRA", "lora_bias", "a copy of the embedding", "copies of norms", "trainable tokens", "IA3", "aLoRA"},
    "transformers": {"DoRA", "lora_bias", "a copy of the embedding", "copies of norms", "trainable tokens", "IA3",
                     "aLoRA"},
}  # fmt: skip
PROGRAMS = Path(FOLDER or ".")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> tuple[measure.Base, Path]:
    work = tmp_path_factory.mktemp("smollm2")
    return measure.smollm2(work), work


@pytest.fixture(scope="module")
def results(smollm2) -> Any:
    """Return a function of a program's name that measures all adapters in it, once."""
    base, work = smollm2
    wanted = measure.train(base, work, list(measure.CASES))
    effects = measure.effects(wanted)
    record(effects, {})

    @functools.cache
    def measured(program: str) -> measure.Results:
        found = measure.measure(base, PROGRAMS, work, wanted, program)
        record({name: {program: value} for name, value in found.items()}, {})
        return {name: {**effects[name], program: value} for name, value in found.items()}

    return measured


def record(adapters: measure.Results, merged: measure.Results) -> None:
    if os.environ.get("JAXADAPT_PROGRAMS_RECORD"):
        table.record(adapters, merged)


@pytest.mark.parametrize("name", [measure.BASE_ALONE, *measure.CASES])
@pytest.mark.parametrize("program", REFUSED)
def test_smollm2(results: Any, program: str, name: str) -> None:
    found = results(program)[name]
    got = found[program]
    assert found["effect"] > 0.05 or name in ("aLoRA", measure.BASE_ALONE)  # aLoRA's tokens are not in the prompt
    if name in REFUSED[program]:
        assert "jaxadapt merge" in got or "some tokens only" in got
    else:
        assert got < 1e-3, got  # float32 on both sides


@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_in_llama_cpp(family: str, tmp_path: Path) -> None:
    """Linear layers of every kind, with other scales than 1, in a GGUF base that llama.cpp's converter wrote."""
    base = measure.small(tmp_path, PROGRAMS, family)
    _, targets = measure.tiny.FAMILIES[family]
    options = {"fan_in_fan_out": True} if family == "gpt2" else {}
    want = measure.trained(base, tmp_path / "in", target_modules=targets, use_rslora=True, size=0.2,
                           alpha_pattern={targets[1]: 2}, **options)  # fmt: skip
    assert measure.export_case("", tmp_path / "in", tmp_path / "out.gguf", "gguf", base) == ""
    plain, got = measure.run("llama", PROGRAMS, base.gguf, [None, str(tmp_path / "out.gguf")], base, tmp_path / "x.npy")
    alone = abs(plain - measure.log_probabilities(measure.peft_logits(base.model(), base))).max()
    assert abs(got - want).max() < max(1e-3, 5 * alone)  # llama.cpp's GELU in float16: 7e-4 in Gemma 2
    assert abs(got - plain).max() > 0.1


@pytest.mark.parametrize("family", ["qwen3", "phi3"])
def test_other_architectures_in_mlx(family: str, tmp_path: Path) -> None:
    base = measure.small(tmp_path, PROGRAMS, family)
    _, targets = measure.tiny.FAMILIES[family]
    names = [None]
    wanted = []
    for dora in (False, True):
        want = measure.trained(base, tmp_path / f"in{dora}", target_modules=targets, use_rslora=True, use_dora=dora,
                               size=0.2, rank_pattern={targets[1]: 2})  # fmt: skip
        assert measure.export_case("", tmp_path / f"in{dora}", tmp_path / f"out{dora}", "mlx", base) == ""
        wanted.append(want)
        names.append(str(tmp_path / f"out{dora}"))
    plain, *found = measure.run("mlx", PROGRAMS, base.folder, names, base, tmp_path / "x.npy")
    for got, want in zip(found, wanted, strict=True):
        assert abs(got - want).max() < 1e-3
        assert abs(got - plain).max() > 0.1


# Fields of config.json that mlx-lm reads and transformers 5 no longer writes.
OLD_FIELDS = {"gpt2": {"n_ctx": 32}, "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.5}}


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gpt2", "gpt_neox"])
def test_adapters_that_mlx_trained(family: str, tmp_path: Path) -> None:
    """PEFT computes mlx-lm's log-probabilities from the converted folder, and from it exported and converted again."""
    tiny.model_of(family).save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps(config | OLD_FIELDS.get(family, {})))
    if family == "gpt2":  # mlx-lm knows the names of the published file
        path = tmp_path / "base/model.safetensors"
        save_file({key.removeprefix("transformer."): x for key, x in load_file(path).items()}, path, {"format": "pt"})
    base = measure.Base(tmp_path / "base", tmp_path, [3, 7, 1, 9, 4, 20, 11, 2])
    settings = {"num_layers": 1, "lora_parameters": {"rank": 3, "scale": 2.3, "dropout": 0.1}}
    kinds = {kind: {"fine_tune_type": kind, **settings} for kind in ("lora", "dora")}
    measure.train_in_mlx(base, PROGRAMS, kinds, 24)
    plain, *found = measure.run("mlx", PROGRAMS, base.folder, [None, *(str(tmp_path / kind) for kind in kinds)], base,
                                tmp_path / "x.npy")  # fmt: skip
    alone = abs(plain - measure.log_probabilities(measure.peft_logits(base.model(), base))).max()
    assert alone < 1e-4
    for kind, want in zip(kinds, found, strict=True):
        convert(tmp_path / kind, tmp_path / f"{kind}-peft")
        export_adapter(tmp_path / f"{kind}-peft", tmp_path / f"{kind}-mlx", "mlx")
        convert(tmp_path / f"{kind}-mlx", tmp_path / f"{kind}-again")
        for name in (f"{kind}-peft", f"{kind}-again"):
            got = measure.read_by_peft(base, tmp_path / name)
            assert abs(got - want).max() < 1e-4, name  # float32 on both sides
        assert abs(want - plain).max() > 0.05


@pytest.mark.parametrize(
    ("program", "kind"),
    [("mlx", kind) for kind in experts.KINDS] + [("llama", kind) for kind in experts.KINDS if kind != "deepseek_v3"],
)
def test_routed_experts(program: str, kind: str, tmp_path: Path, record_property: Any) -> None:
    """Experts, routers and shared experts, as PEFT adapts them in transformers 5, and all of them at once.

    `--junitxml` records each case's difference and effect.
    """
    base = experts.small(tmp_path, PROGRAMS, program, kind)
    plain = measure.log_probabilities(measure.peft_logits(base.model(), base))
    wanted, files = [plain], [None]
    for name, fields in experts.cases(kind).items():
        folder = tmp_path / name.replace(" ", "-")
        wanted.append(experts.train(base, folder, fields))
        files.append(f"{folder}.gguf" if program == "llama" else f"{folder}-mlx")
        export_adapter(folder, files[-1], "gguf" if program == "llama" else "mlx", base=base.folder / "config.json")
        assert abs(wanted[-1] - plain).max() > 0.3, name
    model = base.gguf if program == "llama" else tmp_path / "mlx"
    found = measure.run(program, PROGRAMS, model, files, base, tmp_path / "x.npy")
    # float32 on both sides; mlx-lm's Llama 4 has another epsilon.
    close = 1e-3 if (program, kind) == ("mlx", "llama4") else 1e-4
    for name, got, want in zip(["no adapter", *experts.cases(kind)], found, wanted, strict=True):
        record_property(name, f"{abs(got - want).max():.1e} of {abs(want - plain).max():.1f}")
        assert abs(got - want).max() < close, name


@pytest.mark.parametrize("kind", [kind for kind in experts.KINDS if kind != "deepseek_v3"])
def test_the_converter_of_llama_cpp(kind: str, tmp_path: Path) -> None:
    """It stops at PEFT's routed experts. It reads routers, and shared experts of Llama 4."""
    base = experts.small(tmp_path, PROGRAMS, "llama", kind)
    wanted, files = [], []
    for name in experts.cases(kind).keys() & {"experts", "router", "shared experts"}:
        folder, file = tmp_path / name.replace(" ", "-"), tmp_path / f"{name}.gguf"
        want = experts.train(base, folder, experts.cases(kind)[name])
        program = [sys.executable, environments.llama_sources(PROGRAMS) / "convert_lora_to_gguf.py"]
        arguments = [folder, "--base", base.folder, "--outfile", file, "--outtype", "f32"]
        done = subprocess.run([*program, *arguments], capture_output=True, text=True)
        if name == "experts":
            assert done.returncode
            assert re.search("Can not map tensor|Unprocessed experts", done.stderr), done.stderr[-3000:]
        else:
            assert done.returncode == 0, done.stderr[-3000:]
            wanted.append(want)
            files.append(str(file))
    if files:
        found = measure.run("llama", PROGRAMS, base.gguf, files, base, tmp_path / "x.npy")
        assert abs(found - np.stack(wanted)).max() < 1e-4  # float32 on both sides


@pytest.mark.usefixtures("foreign_model")
@pytest.mark.parametrize("program", ["mlx", "llama"])
def test_experts_that_jaxadapt_saved(program: str, tmp_path: Path, record_property: Any) -> None:
    """An adapter in Tunix' own model, saved by jaxadapt in both forms and exported: the program has Tunix' results."""
    pytest.importorskip("tunix")
    base = experts.small(tmp_path, PROGRAMS, program, "qwen3_moe")
    model = experts.qwen3_in_tunix(base)
    plain = experts.log_probabilities_in_tunix(model)
    experts.adapt_in_tunix(model)
    want = experts.log_probabilities_in_tunix(model)
    # Gate and up have an A each in Tunix. One parameter holds both in PEFT, with twice the rank.
    jaxadapt.save(jaxadapt.models.LoraTree(model, on_shared="concat"), tmp_path / "all")
    jaxadapt.save(model, tmp_path / "each", keymap="tunix:qwen3_moe/per-expert")
    form, ending = ("gguf", ".gguf") if program == "llama" else ("mlx", "-mlx")
    files = [f"{tmp_path / name}{ending}" for name in ("all", "each")]
    for name, file in zip(("all", "each"), files, strict=True):
        command = ["export", str(tmp_path / name), "--for", form, "--out", file, "--base", str(base.folder)]
        done = CliRunner().invoke(main, command)
        assert done.exit_code == 0, done.output
    folder = base.gguf if program == "llama" else tmp_path / "mlx"
    alone, *found = measure.run(program, PROGRAMS, folder, [None, *files], base, tmp_path / "x.npy")
    assert abs(want - plain).max() > 1
    assert abs(alone - plain).max() < 1e-5  # float32 on both sides
    record_property("effect", f"{abs(want - plain).max():.1f}")
    peft = measure.read_by_peft(base, tmp_path / "all")
    for name, got in zip(("all", "each", "PEFT"), (*found, peft), strict=True):
        record_property(name, f"{abs(got - want).max():.1e}")
        assert abs(got - want).max() < 1e-4, name


def test_merged_models(smollm2) -> None:
    """What has no form as an adapter is right as a merged model; in 16 and 8 bits as near as the base itself."""
    base, work = smollm2
    results = measure.measure_merged(base, PROGRAMS, work, table.MERGED)
    record({}, results)
    for found in results.values():
        assert found["folder"] < 1e-3
        assert found["float32"] < 1e-3
        for dtype in ("float16", "bfloat16", "q8_0"):
            assert found[dtype] < 4 * results[measure.BASE_ALONE][dtype]


@pytest.mark.parametrize("kind", vllm_experts.MODELS)
def test_experts_in_peft_transformers_and_vllm(kind: str, tmp_path: Path) -> None:
    """vLLM computes LoRA of experts on a GPU only. Its own code places the tensors; B·A of each is PEFT's change."""
    found = vllm_experts.measure_apart(kind, PROGRAMS, tmp_path)
    for name, results in found.items():
        assert results["effect"] > 0.1
        assert results["peft"] == 0
        assert results["transformers, peft's file"] < 1e-5
        exported = results["vllm, exported"]
        assert isinstance(exported, dict), exported
        assert max(exported.values()) < 1e-6, (name, exported)  # float32
    as_they_are = [found[name]["vllm, peft's file"] for name in ("routed experts", "gate and up only", "down only")]
    if kind == "gpt_oss":
        assert max(as_they_are[0].values()) < 1e-6
        assert as_they_are[1:] == ["AssertionError: "] * 2
    elif kind == "mixtral":  # loads without a message, and changes no expert
        assert all(each[key] == 1 for each in as_they_are for key in each if key.startswith("experts."))
    else:
        assert all("contains fused 3D MoE weights" in each for each in as_they_are)
