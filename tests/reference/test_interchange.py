"""Adapters go between real PEFT and our twins of its models, both ways, with equal outputs.

Invariants 3 and 5 of tests/system/test_invariants.py: PEFT loads what we save with no missing and no unexpected key, we
load what PEFT saves, and one file fits NNX and Linen, scanned and unrolled.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import jaxadapt
from tests.support import peft_harness as harness
from tests.support.twins import gpt2, llama, trees

pytestmark = pytest.mark.peft

IDS = np.random.RandomState(0).randint(0, 64, (2, 11))
CLOSE = 1e-5  # of the largest logit (about 3): float32 sums of the two libraries differ in their order
LAYERS = 3


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=CLOSE * abs(np.asarray(expected)).max())


# ---- the two sides ---------------------------------------------------------------------------------------


@functools.cache
def torch_base(family: str) -> Any:
    if family == "llama":
        return llama.torch_llama(layers=LAYERS)
    return gpt2.torch_gpt2(gpt2.Shape(layers=LAYERS))


@dataclasses.dataclass(frozen=True)
class Twin:
    """One of our models: a family, an API, and the axis its layers are stacked on (None: unrolled)."""

    family: str
    api: str
    scan: int | None = None

    def __str__(self) -> str:
        return f"{self.family}-{self.api}" + ("" if self.scan is None else f"-scan{self.scan}")

    @property
    def table(self) -> str:
        """The name `keymap=` has for it."""
        return self.family if self.scan is None else f"{self.family}/scan{self.scan}"

    def make(self) -> Any:
        """A model with the torch model's weights: NNX, or (module, {"params": …})."""
        base = torch_base(self.family)
        if self.family == "llama":
            return llama.twin_of(base, self.api, scan=self.scan is not None, scan_axis=self.scan or 0)
        shape = gpt2.Shape(layers=LAYERS, scan_axis=self.scan)
        leaves = gpt2.leaves_from_torch(base.state_dict(), self.scan)
        if self.api == "linen":
            return gpt2.LinenGPT2(shape), {"params": trees.nest(leaves)}
        model = gpt2.GPT2(shape, rngs=nnx.Rngs(0))
        trees.fill(model, leaves)
        return model

    def load(self, folder: Path, **options: Any) -> np.ndarray:
        """Load a folder into a plain twin and run it."""
        if self.api == "nnx":
            return run_nnx(jaxadapt.load(folder, self.make(), **options))
        module, base = self.make()
        variables = jaxadapt.load(folder, base, **options)
        return run_linen(jaxadapt.adapt(module, jaxadapt.read_config(folder), **options), variables)

    def save(self, config: Any, folder: Path, seed: int = 3, **options: Any) -> np.ndarray:
        """Adapt a plain twin, give the adapter random values, save it, and run it."""
        keymap = {"keymap": options["keymap"]} if "keymap" in options else {}
        if self.api == "nnx":
            model = self.make()
            jaxadapt.adapt(model, config, rngs=nnx.Rngs(0), **keymap)
            nnx.update(model, randomized(nnx.state(model, jaxadapt.AdapterParam), config, seed))
            jaxadapt.save(model, folder, **options)
            return run_nnx(model)
        module, base = self.make()
        adapted = jaxadapt.adapt(module, config, **keymap)
        variables = {**adapted.init(jax.random.key(0), IDS), **base}
        collection = config.peft_type.lower()
        variables[collection] = randomized(variables[collection], config, seed)
        jaxadapt.save(variables, folder, **options)
        return run_linen(adapted, variables)


def run_nnx(model: nnx.Module) -> np.ndarray:
    return np.asarray(model(jnp.asarray(IDS)))


def run_linen(module: Any, variables: Any) -> np.ndarray:
    return np.asarray(jax.jit(module.apply)(variables, IDS))


def randomized(tree: Any, config: Any, seed: int) -> Any:
    """The same tree with random leaves; IA3 around 1, LoRA around 0."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    if config.peft_type == "IA3":
        values = [1 + 0.4 * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    else:
        values = [0.2 * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, values)


def ours(setting: harness.Setting) -> Any:
    """The setting as our configuration."""
    return {"LORA": jaxadapt.LoraConfig, "IA3": jaxadapt.IA3Config}[setting.method](**setting.fields)


@functools.cache
def peft_model(name: str) -> Any:
    setting = harness.setting(name)
    return harness.make_peft(torch_base(setting.family), setting.peft())


@functools.cache
def peft_logits(name: str) -> np.ndarray:
    return harness.logits(peft_model(name), IDS)


@functools.cache
def base_logits(family: str) -> np.ndarray:
    return harness.logits(torch_base(family), IDS)


# Every twin with the plain settings; the finer ones on one twin of each kind.
TWINS = [Twin("llama", api, scan) for scan in (None, 0, 1) for api in ("nnx", "linen")]
TWINS += [Twin("gpt2", api, scan) for scan in (None, 1) for api in ("nnx", "linen")]
PLAIN = ("llama-lora", "llama-ia3", "gpt2-lora", "gpt2-ia3")
FINE_TWINS = [Twin("llama", "nnx"), Twin("llama", "linen", 1), Twin("gpt2", "nnx", 1), Twin("gpt2", "linen")]
PAIRS = [
    pytest.param(twin, setting.name, id=f"{twin}-{setting.name.partition('-')[2]}")
    for twin in TWINS
    for setting in harness.SETTINGS
    if twin.family == setting.family and (setting.name in PLAIN or twin in FINE_TWINS)
]


# ---- PEFT saves, we load ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("twin", "name"), PAIRS)
def test_we_load_what_peft_saves(twin, name, tmp_path):
    harness.save(peft_model(name), tmp_path)
    expected = peft_logits(name)
    assert abs(expected - base_logits(twin.family)).max() > 0.1
    close(twin.load(tmp_path), expected)


@pytest.mark.parametrize("twin", TWINS, ids=str)
def test_the_table_named_outright_is_the_one_found(twin, tmp_path):
    name = f"{twin.family}-lora"
    harness.save(peft_model(name), tmp_path)
    np.testing.assert_array_equal(twin.load(tmp_path, keymap=twin.table), twin.load(tmp_path))


@pytest.mark.parametrize("name", PLAIN)
def test_one_file_fits_every_twin(name, tmp_path):
    """Invariant 5: NNX and Linen, scanned and unrolled, give equal outputs from the same file."""
    harness.save(peft_model(name), tmp_path)
    outputs = {str(t): t.load(tmp_path) for t in TWINS if t.family == name.partition("-")[0]}
    first = next(iter(outputs.values()))
    for output in outputs.values():
        close(output, first)


def test_half_precision_files_load(tmp_path):
    """What PEFT saves in bfloat16 computes as PEFT does after loading it (in float32 on a float32 base)."""
    import torch

    model = harness.make_peft(torch_base("llama"), harness.setting("llama-lora").peft())
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name:
            parameter.data = parameter.data.to(torch.bfloat16)
    harness.save(model, tmp_path)
    loaded = harness.load(torch_base("llama"), tmp_path)
    for api in ("nnx", "linen"):
        close(Twin("llama", api).load(tmp_path, dtype=jnp.float32), harness.logits(loaded.model, IDS))


# ---- we save, PEFT loads ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("twin", "name"), PAIRS)
def test_peft_loads_what_we_save(twin, name, tmp_path):
    setting = harness.setting(name)
    base = torch_base(twin.family)
    output = twin.save(ours(setting), tmp_path)
    loaded = harness.load(base, tmp_path)
    assert loaded.complaints == []
    assert abs(output - base_logits(twin.family)).max() > 0.1
    close(harness.logits(loaded.model, IDS), output)
    assert harness.specs(harness.read_tensors(tmp_path)) == harness.peft_specs(base, setting.peft())


@pytest.mark.parametrize(("twin", "name"), PAIRS)
def test_our_config_is_the_json_peft_writes(twin, name, tmp_path):
    setting = harness.setting(name)
    harness.save(peft_model(name), tmp_path / "peft")
    theirs = harness.read_json(tmp_path / "peft")
    twin.save(ours(setting), tmp_path / "ours", base_model=theirs["base_model_name_or_path"])
    assert harness.read_json(tmp_path / "ours") == theirs


@pytest.mark.parametrize("name", PLAIN)
def test_every_twin_writes_the_same_file(name, tmp_path):
    """The other half of invariant 5: what one twin loads and saves again does not depend on the twin."""
    harness.save(peft_model(name), tmp_path / "peft")
    expected = harness.read_tensors(tmp_path / "peft")
    written = set()
    for twin in TWINS:
        if twin.family != name.partition("-")[0]:
            continue
        folder = tmp_path / str(twin)
        if twin.api == "nnx":
            jaxadapt.save(jaxadapt.load(tmp_path / "peft", twin.make()), folder)
        else:
            jaxadapt.save(jaxadapt.load(tmp_path / "peft", twin.make()[1]), folder)
        again = harness.read_tensors(folder)
        assert sorted(again) == sorted(expected)
        for key, value in expected.items():
            np.testing.assert_array_equal(again[key], value, err_msg=f"{twin} {key}")
        written.add((folder / harness.WEIGHTS).read_bytes())
        written.add((folder / harness.CONFIG).read_bytes())
    assert len(written) == 2  # one file of weights and one configuration, byte for byte


@pytest.mark.parametrize("twin", FINE_TWINS, ids=str)
def test_all_linear_is_saved_resolved(twin, tmp_path):
    """As in PEFT, "all-linear" leaves the head out, and the file names the modules it stood for."""
    fields = {"target_modules": "all-linear", "r": 2, "lora_alpha": 3, "task_type": "CAUSAL_LM"}
    fields |= {"fan_in_fan_out": True} if twin.family == "gpt2" else {}
    setting = harness.Setting("all-linear", twin.family, "LORA", fields)
    base = torch_base(twin.family)
    output = twin.save(ours(setting), tmp_path)
    loaded = harness.load(base, tmp_path)
    assert loaded.complaints == []
    close(harness.logits(loaded.model, IDS), output)
    assert harness.specs(harness.read_tensors(tmp_path)) == harness.peft_specs(base, setting.peft())
    assert isinstance(json.loads((tmp_path / harness.CONFIG).read_text())["target_modules"], list)


@pytest.mark.filterwarnings("ignore:Model (has|with)")  # PEFT's advice on tied weights
@pytest.mark.parametrize("field", ["modules_to_save", "trainable_token_indices"])
@pytest.mark.parametrize("twin", FINE_TWINS, ids=str)
def test_all_linear_beside_a_trained_embedding(twin, field, tmp_path):
    """The embedding is no linear layer, but it is still there to be trained."""
    embedding = "embed_tokens" if twin.family == "llama" else "wte"
    fields = {"target_modules": "all-linear", field: [embedding] if field == "modules_to_save" else [1, 5]}
    fields |= {"fan_in_fan_out": True} if twin.family == "gpt2" else {}
    setting = harness.Setting("all-linear", twin.family, "LORA", {**fields, "r": 2, "task_type": "CAUSAL_LM"})
    base = torch_base(twin.family)
    output = twin.save(ours(setting), tmp_path)
    assert harness.specs(harness.read_tensors(tmp_path)) == harness.peft_specs(base, setting.peft())
    loaded = harness.load(base, tmp_path)
    assert loaded.missing == loaded.unexpected == []
    close(harness.logits(loaded.model, IDS), output)


@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_conv1d_is_marked_fan_in_fan_out(api, tmp_path):
    """PEFT turns the flag on for a Conv1D and warns; what we save already says it."""
    fields = {"target_modules": ["c_attn"], "task_type": "CAUSAL_LM"}
    Twin("gpt2", api).save(jaxadapt.LoraConfig(**fields), tmp_path)
    assert harness.read_json(tmp_path)["fan_in_fan_out"] is True
    assert harness.load(torch_base("gpt2"), tmp_path).complaints == []


# ---- some layers, the embedding, the head ----------------------------------------------------------------


@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_some_layers_only(api, tmp_path):
    fields = {
        "target_modules": ["q_proj", "up_proj"],
        "layers_to_transform": [0, 2],
        "task_type": "CAUSAL_LM",
    }
    setting = harness.Setting("some-layers", "llama", "LORA", fields)
    base = torch_base("llama")
    output = Twin("llama", api).save(ours(setting), tmp_path / "ours")
    loaded = harness.load(base, tmp_path / "ours")
    assert loaded.complaints == []
    close(harness.logits(loaded.model, IDS), output)
    theirs = harness.make_peft(base, setting.peft())
    harness.save(theirs, tmp_path / "peft")
    close(Twin("llama", api).load(tmp_path / "peft"), harness.logits(theirs, IDS))


@pytest.mark.parametrize("scan", [None, 1])
@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_a_rank_of_one_layer(api, scan, tmp_path):
    """A pattern for one layer fits unrolled and stacked layers."""
    fields = {
        "target_modules": ["q_proj"],
        "r": 4,
        "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2},
        "task_type": "CAUSAL_LM",
    }
    setting = harness.Setting("one-rank", "llama", "LORA", fields)
    theirs = harness.make_peft(torch_base("llama"), setting.peft())
    harness.save(theirs, tmp_path)
    twin = Twin("llama", api, scan)
    close(twin.load(tmp_path), harness.logits(theirs, IDS))
