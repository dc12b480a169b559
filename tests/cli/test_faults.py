"""Faults in arguments and values that once ended in a traceback, in no end, or in a file that is wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import save_file

import jaxadapt
from jaxadapt.cli import main
from jaxadapt.core.errors import repeated
from jaxadapt.persistence.formats import mlx_files
from tests.support import small
from tests.support.small import WEIGHTS, files

Q = "base_model.model.model.layers.0.self_attn.q_proj"


def lora(folder: Path, a: Any, b: Any, **fields: Any) -> Path:
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]} | fields
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({f"{Q}.lora_A.weight": a, f"{Q}.lora_B.weight": b}, folder / "adapter_model.safetensors")
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


def full(value: float, rank: int = 2) -> tuple[np.ndarray, np.ndarray]:
    return np.full((rank, 4), value, "f4"), np.full((4, rank), value, "f4")


@pytest.mark.parametrize(
    ("value", "says"), [(np.nan, "an earlier step"), (np.inf, "an earlier step"), (3e38, "overflow")]
)
def test_resize_writes_no_adapter_that_is_not_finite(value, says, tmp_path):
    done = run("resize", lora(tmp_path / "in", *full(value)), "--rank", 1, "--out", tmp_path / "out")
    assert (done.exit_code, says in done.stderr) == (1, True), done.output
    assert not (tmp_path / "out").exists()


def test_resize_does_not_replace_an_adapter(tmp_path):
    adapter, other = lora(tmp_path / "in", *full(1)), lora(tmp_path / "other", *full(2))
    before = files(other)
    done = run("resize", adapter, "--rank", 1, "--out", other)
    assert (done.exit_code, "has an adapter already" in done.stderr) == (1, True), done.output
    assert files(other) == before
    assert "the target is the source" in run("resize", adapter, "--rank", 1, "--out", adapter).stderr


def test_a_product_that_overflows_is_combined_into_an_error(tmp_path):
    """LAPACK's SVD does not end on an infinity."""
    adapters = [lora(tmp_path / str(value), *full(value)) for value in (3e38, 1)]
    done = run("combine", *adapters, "--weights", "1,1", "--out", tmp_path / "out")
    assert (done.exit_code, "the result" in done.stderr) == (1, True), done.output
    assert not (tmp_path / "out").exists()


def test_diff_has_a_status_for_differences_and_another_for_errors(tmp_path):
    one, other = lora(tmp_path / "one", *full(1)), lora(tmp_path / "other", *full(2))
    status = [run("diff", one, second).exit_code for second in (one, other, tmp_path / "nowhere")]
    assert status == [0, 1, 2]
    assert run("inspect", tmp_path / "nowhere").exit_code == 1


def test_exchanged_arguments_are_an_error(tmp_path):
    model = small.trained()
    for call in (
        lambda: jaxadapt.save(tmp_path / "out", model),
        lambda: jaxadapt.load(model, tmp_path / "out"),
        lambda: jaxadapt.load(small.variables(), tmp_path / "out"),
        lambda: jaxadapt.read(model),
    ):
        with pytest.raises(jaxadapt.FileError, match=r"expected a path, found .*; the order is save\(model, path\)"):
            call()


@pytest.mark.parametrize("program", ["mlx", "gguf"])
def test_factors_of_four_axes_are_refused(program, tmp_path):
    a, b = full(1)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2", "num_attention_heads": 2, "num_hidden_layers": 1}')
    out = tmp_path / f"out{'.gguf' if program == 'gguf' else ''}"
    adapter = lora(tmp_path / "in", a, b.reshape(4, 2, 1, 1))
    done = run("export", adapter, "--for", program, "--base", tmp_path, "--out", out)
    assert (done.exit_code, "expected matrices" in done.stderr) == (1, True), done.output
    assert not out.exists()


@pytest.mark.parametrize("dtype", ["int8", "complex64"])
@pytest.mark.parametrize("form", ["kohya-ss", "diffusers", "mlx"])
def test_factors_that_are_no_floats_are_written_in_no_form(dtype, form, tmp_path):
    a, b = (x.astype(dtype) for x in full(1))
    adapter = lora(tmp_path / "in", a, b, lora_alpha=1001)
    out = tmp_path / ("out" if form == "mlx" else "out.safetensors")
    if form == "mlx":
        done = run("export", adapter, "--for", "mlx", "--out", out)
    else:
        tensors = jaxadapt.read(adapter).tensors
        save_file({k.replace("model.layers", "unet.blocks"): x for k, x in tensors.items()}, adapter / WEIGHTS)
        done = run("convert", adapter, out, "--format", form)
    says = rf"expected floating-point numbers, found:\s+base_model.*lora_A.weight: {dtype}"
    assert done.exit_code == 1, done.output
    assert re.search(says, done.stderr), done.stderr
    assert not out.exists()


class Counted(str):
    """A text that counts its comparisons."""

    __slots__ = ()
    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        Counted.compared += 1
        return str.__eq__(self, other)


def test_the_modules_of_mlx_are_compared_a_few_times_each(tmp_path, monkeypatch):
    name = mlx_files.translate_name
    monkeypatch.setattr(mlx_files, "translate_name", lambda module, to: Counted(name(module, to)))
    weights = {f"model.layers.{i}.q.{part}": np.ones((2, 2), "f4") for i in range(200) for part in ("lora_a", "lora_b")}
    save_file(weights, tmp_path / "adapters.safetensors")
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 1.0, "dropout": 0.0}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert len(jaxadapt.read(tmp_path).tensors) == 400
    assert Counted.compared < 20 * 200
    assert repeated(["b", "a", "b", "a", "c"]) == ["a", "b"]


@pytest.mark.parametrize("example", [{"tokens": np.zeros((1, 2), int)}, np.zeros((1, 2), int)], ids=["dict", "array"])
@pytest.mark.parametrize(
    "config", [small.LORA, jaxadapt.PromptTuningConfig(num_virtual_tokens=2)], ids=["lora", "prompt"]
)
def test_an_example_that_is_no_list_is_an_error(config, example):
    with pytest.raises(jaxadapt.AttachError, match=r"example: expected a list of the inputs of one call, .*found"):
        jaxadapt.adapt(small.net(), config, example=example)


def test_adaption_prompts_are_refused_by_a_base_without_their_attention():
    """GPT-2's base, and a Llama of one layer for a file of two."""
    prompt, gate = np.ones((1, 2, 8), "f4"), np.ones(1, "f4")
    tensors = {
        f"base_model.model.model.layers.1.self_attn.{name}": x
        for name, x in (("adaption_prompt", prompt), ("adaption_gate", gate))
    }
    config = jaxadapt.AdaptionPromptConfig(adapter_len=2, adapter_layers=1, target_modules="self_attn")
    attention = {name: {"kernel": np.ones((8, 8), "f4")} for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    gpt2 = {"transformer": {"h": {"0": {"attn": {"c_attn": {"kernel": np.ones((8, 24), "f4")}}}}}}
    llama = {"model": {"layers": {"0": {"self_attn": attention}}}}
    for base, keymap in ((gpt2, "gpt2"), (llama, None)):
        with pytest.raises(jaxadapt.TargetError, match="expected at least 2 attention modules .* as in Llama, found"):
            jaxadapt.from_peft(jaxadapt.PeftTensors(config, tensors), base, keymap=keymap)
    llama["model"]["layers"]["1"] = {"self_attn": attention}
    assert len(jaxadapt.from_peft(jaxadapt.PeftTensors(config, tensors), llama).shared) == 2


@pytest.mark.parametrize("command", [("inspect",), ("inspect", "--norms"), ("diff",), ("verify",)])
def test_a_layer_number_of_5000_digits_is_a_name(command, tmp_path):
    """Python converts at most 4300 digits."""
    here = lora(tmp_path / "in", *full(1))
    tensors = jaxadapt.read(here).tensors
    save_file({key.replace("layers.0", f"layers.{'1' * 5000}"): x for key, x in tensors.items()}, here / WEIGHTS)
    done = run(*command, here, *([here] if command == ("diff",) else []))
    assert isinstance(done.exception, SystemExit | None), done.exception
