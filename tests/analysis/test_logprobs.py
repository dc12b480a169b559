"""The verdict on a server is right for PEFT in bfloat16 and for the faults that servers have."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import jaxadapt
from jaxadapt.analysis import compare_logprobs
from jaxadapt.cli import main

BASE = [[-2.0, -1.0, -3.0], [-0.5, -4.0]]
Tables = dict[str, list[list[float]]]


def tables(change: float, noise: float = 0.0, name: str = "fr") -> Tables:
    """Tables of a base and of one adapter, which differs by `change`; all are `noise` away from BASE."""
    base = [[x - noise for x in row] for row in BASE]
    return {"base": base, name: [[x - change for x in row] for row in base]}


def test_the_numbers():
    (found,) = compare_logprobs(tables(0.25, noise=0.125), tables(0.5))
    assert found.to_dict() == {
        "name": "fr", "verdict": "applied", "nearest": "fr", "distance": 0.125, "noise": 0.125, "change": 0.25,
        "expected_change": 0.5, "along": 0.5,
    }  # fmt: skip
    assert str(found) == "fr: applied: 0.125 nats from the expected log-probabilities, with a noise of 0.125"


@pytest.mark.parametrize(
    ("served", "expected", "noise", "verdict"),
    [
        (0.5, 0.5, 0.1, "applied"),
        (0.0, 0.5, 0.1, "not applied"),
        (0.05, 0.5, 0.1, "not applied"),
        (0.2, 0.5, 0.05, "applied otherwise"),
        (1.0, 0.5, 0.1, "applied otherwise"),
        (0.3, 0.3, 0.1001, "undecided"),
        (0.0, 0.0, 0.0, "undecided"),
        (0.5, 0.5, 0.0, "applied"),
        (0.5, 0.5001, 0.0, "applied"),  # sums in another order
        (0.00029, 0.00029, 0.0, "undecided"),
        (0.5, 0.51, 0.0, "applied otherwise"),
    ],
)
def test_the_noise_without_an_adapter_is_the_measure(served: float, expected: float, noise: float, verdict: str):
    (found,) = compare_logprobs(tables(served, noise), tables(expected))
    assert found.verdict == verdict
    assert f"fr: {verdict}: " in str(found)


def test_an_adapter_that_is_not_applied_is_never_applied():
    """At any noise: a change of at most three times the noise is undecided, and a larger one is missed."""
    random = np.random.default_rng(0)
    base = -random.exponential(2.0, (1, 40))
    for noise in (0.01, 0.1, 1.0):
        for size in np.geomspace(0.3, 30, 12) * noise:
            served = base - noise * np.abs(random.standard_normal(base.shape))
            wanted = np.minimum(base + size * random.standard_normal(base.shape), 0)
            (found,) = compare_logprobs({"base": served, "fr": served}, {"base": base, "fr": wanted})
            assert found.verdict == ("undecided" if found.expected_change <= 3 * found.noise else "not applied")


@pytest.mark.parametrize(("applied", "verdict"), [(0.0, "not applied"), (0.5, "applied otherwise"), (1.0, "applied")])
def test_a_server_whose_answers_vary_has_the_same_verdict(applied: float, verdict: str):
    """Its two tables without effect differ by more than the noise: each has a noise of its own."""
    random = np.random.default_rng(0)
    base = -1 - random.exponential(2.0, (4, 60))
    wanted = base + 0.1 * random.standard_normal(base.shape)
    right = {"base": base, "fr": base + applied * (wanted - base)}
    served = {name: x + 0.01 * random.standard_normal(base.shape) for name, x in right.items()}
    (found,) = compare_logprobs(served, {"base": base, "fr": np.minimum(wanted, 0)})
    assert applied or found.change > found.noise
    assert found.verdict == verdict


# ---------------------------------------------------------------- PEFT as a server


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Return the log-probabilities of a text by PEFT, of an adapter's folder in a dtype."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    state = {
        key: 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(n))
        for n, (key, weight) in enumerate(transformers.LlamaForCausalLM(config).state_dict().items())
    }
    tokens = torch.tensor(np.random.default_rng(1).integers(0, 40, (2, 24)))

    def measure(folder: Path | None, dtype: str) -> list[list[float]]:
        model = transformers.LlamaForCausalLM(config)
        model.load_state_dict(state)
        model = model if folder is None else peft.PeftModel.from_pretrained(model, folder)
        with torch.no_grad():
            scores = model.to(getattr(torch, dtype))(tokens).logits[:, :-1].float().log_softmax(-1)
        return scores.gather(-1, tokens[:, 1:, None])[..., 0].tolist()

    return measure


def adapter(folder: Path, seed: int, scale: float = 1.0) -> Path:
    random, config = (
        np.random.default_rng(seed),
        jaxadapt.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "up_proj"]),
    )
    tensors = {
        f"base_model.model.model.layers.{n}.{module}.lora_{side}.weight": scale * random.standard_normal(shape, "f4")
        for n in range(2)
        for module, out in (("self_attn.q_proj", 16), ("mlp.up_proj", 24))
        for side, shape in (("A", (2, 16)), ("B", (out, 2)))
    }
    jaxadapt.write(jaxadapt.PeftTensors(config, tensors), folder)
    return folder


def with_double_scale(folder: Path) -> Path:
    out = folder.with_name(folder.name + "-doubled")
    read = jaxadapt.read(folder)
    jaxadapt.write(jaxadapt.PeftTensors(read.config.replace(lora_alpha=16), read.tensors), out)
    return out


def without_up_proj(folder: Path) -> Path:
    """As a server that drops the modules which it does not know."""
    out = folder.with_name(folder.name + "-dropped")
    shutil.copytree(folder, out)
    tensors = load_file(out / "adapter_model.safetensors")
    save_file(
        {k: x * (0 if "up_proj.lora_B" in k else 1) for k, x in tensors.items()}, out / "adapter_model.safetensors"
    )
    return out


@pytest.mark.peft
def test_the_faults_of_a_server_in_bfloat16(measured: Any, tmp_path: Path):
    fr, de = (adapter(tmp_path / name, seed, 0.3) for name, seed in (("fr", 1), ("de", 2)))
    tiny = adapter(tmp_path / "tiny", 3, 0.01)
    expected = {"base": measured(None, "float32"), "fr": measured(fr, "float32"), "de": measured(de, "float32")}
    right = {name: measured(folder, "bfloat16") for name, folder in (("base", None), ("fr", fr), ("de", de))}
    faults = {
        "right": (right["fr"], "applied", "fr"),
        "silent": (right["base"], "not applied", "base"),
        "mixed up": (right["de"], "another adapter", "de"),
        "scale": (measured(with_double_scale(fr), "bfloat16"), "applied otherwise", None),
        "dropped": (measured(without_up_proj(fr), "bfloat16"), "applied otherwise", None),
    }
    for case, (table, verdict, nearest) in faults.items():
        one, other = compare_logprobs({**right, "fr": table}, expected)
        assert (one.name, one.verdict, other.verdict) == ("fr", verdict, "applied"), (case, str(one))
        assert nearest in (None, one.nearest), case
        assert 1e-3 < one.noise < one.expected_change / 3
        assert case != "scale" or one.along > 1.2
        assert case != "dropped" or one.along < 0.9
    small = {"base": expected["base"], "tiny": measured(tiny, "float32")}
    (found,) = compare_logprobs({"base": right["base"], "tiny": measured(tiny, "bfloat16")}, small)
    assert found.verdict == "undecided"


# ---------------------------------------------------------------- the command, and what is refused


def run(tmp_path: Path, served: Any, expected: Any, *words: str) -> Any:
    for name, document in (("served", served), ("expected", expected)):
        (tmp_path / f"{name}.json").write_text(document if isinstance(document, str) else json.dumps(document))
    return CliRunner().invoke(
        main, ["compare-logprobs", str(tmp_path / "served.json"), str(tmp_path / "expected.json"), *words]
    )


def test_the_command_says_it_and_its_status_too(tmp_path: Path):
    good = run(tmp_path, tables(0.5, 0.1), tables(0.5))
    assert (good.exit_code, good.output[:12]) == (0, "fr: applied:")
    bad = run(tmp_path, tables(0.0, 0.1), tables(0.5), "--json")
    assert (bad.exit_code, json.loads(bad.stdout)["fr"]["verdict"]) == (1, "not applied")


@pytest.mark.parametrize(
    ("served", "expected", "message"),
    [
        (tables(0.5), tables(0.5, name="de"), r"same names in both.*\n  de\n  fr"),
        ({"fr": BASE}, {"fr": BASE}, r"'base'.*\n  base"),
        (tables(0.5), {"base": BASE, "fr": BASE[:1]}, r"\[3, 2\] tokens in the served base, and\D+\[3\] in the exp"),
        ({"base": [], "fr": []}, {"base": [], "fr": []}, "no tokens"),
        ({"base": [[0.5]], "fr": [[-1.0]]}, {"base": [[-0.5]], "fr": [[-1.0]]}, "served base, text 0: .*found 0.5"),
        ({"base": [[-1.0]], "fr": [[-1.0]]}, '{"base": [[-1]], "fr": [[NaN]]}', "expected fr, text 0: .*found nan"),
        ({"base": [[-1.0, None]], "fr": [[-1.0]]}, tables(0.5), "served base, text 0: expected a number"),
        ({"base": [["-1"]], "fr": [[-1.0]]}, tables(0.5), "expected a number for each token"),
        ({"base": [[[-1], [-2, -3]]], "fr": [[-1.0]]}, tables(0.5), "served base, text 0: expected a number"),
        ({"base": [-1.0]}, tables(0.5), r"expected tables such as"),
        ([1], tables(0.5), "served.json"),
        ("{", tables(0.5), "served.json"),
        ('{"base": [[-1]], "base": [[-2]]}', tables(0.5), "served.json"),
    ],
)  # fmt: skip
def test_what_is_no_table_is_refused(served: Any, expected: Any, message: str, tmp_path: Path):
    done = run(tmp_path, served, expected)
    assert done.exit_code == 2
    assert re.search(message, done.output, re.DOTALL), done.output


@pytest.mark.parametrize("table", [[-1.0, -2.0], np.array([-1.0, -2.0]), [{"a": -1.0}]])
def test_a_table_that_is_no_list_of_lists_is_refused(table: Any):
    with pytest.raises(jaxadapt.FormatError, match="served base, text 0: expected a number for each token"):
        compare_logprobs({"base": table, "fr": BASE}, {"base": BASE, "fr": BASE})
