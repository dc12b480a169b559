"""Every field of PEFT's LoraConfig: honoured as PEFT does, or refused at attaching and at loading, with the way out."""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

pytest.importorskip("torch")
pytest.importorskip("peft")

import peft
import torch
from peft.tuners.lora.variants import QALoraLinearVariant

import jaxadapt
from tests.support import peft_harness as harness
from tests.support.twins import llama, trees
from tests.support.twins.tiny import Net

pytestmark = pytest.mark.peft

EMB = Net(emb=True)

# Values of fields that are honoured; on a fresh adapter PEFT's keys, shapes and configuration come of each. What they
# compute is shown by the tests named behind them.
HONOURED: dict[str, dict[str, Any]] = {
    "task_type": {"task_type": "SEQ_CLS"},
    "peft_type": {"peft_type": "LORA"},
    "auto_mapping": {"auto_mapping": {"base_model_class": "Network"}},
    "peft_version": {},
    "base_model_name_or_path": {"base_model_name_or_path": "org/base"},
    "revision": {"revision": "main"},
    "inference_mode": {},
    "r": {"r": 3},
    "target_modules": {"target_modules": r"layers\.\d\.lin"},
    "exclude_modules": {"exclude_modules": ["layers.1.lin"]},
    "lora_alpha": {"lora_alpha": 5},
    "lora_dropout": {"lora_dropout": 0.25},  # attach/test_nnx_training, test_linen_wrapper
    "fan_in_fan_out": {},  # twins of GPT-2
    "bias": {"bias": "all"},  # test_lora_matrix
    "use_rslora": {"use_rslora": True},  # test_lora_matrix
    "modules_to_save": {"modules_to_save": ["head"]},  # test_lora_matrix
    "init_lora_weights": {"init_lora_weights": "gaussian"},
    "layers_to_transform": {"layers_to_transform": [1], "target_modules": ["layers.1.lin"]},
    "layers_pattern": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "rank_pattern": {"rank_pattern": {r"layers\.1\.lin": 1}},
    "alpha_pattern": {"alpha_pattern": {"lin": 1.5}},
    "megatron_core": {"megatron_core": "megatron.core"},
    "trainable_token_indices": {"trainable_token_indices": {"emb": [3, 1]}},  # test_lora_matrix
    "use_dora": {"use_dora": True},  # test_lora_matrix
    "alora_invocation_tokens": {"alora_invocation_tokens": [1, 2]},  # test_alora
    "qalora_group_size": {"qalora_group_size": 4},  # speaks of use_qalora only
    "lora_bias": {"lora_bias": True},  # test_lora_matrix
    "ensure_weight_tying": {},  # test_tied
    "layer_replication": {},  # below
}
ELSEWHERE = {"target_parameters", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "kasa_config"}
"""Fields that have their own tests: of experts and of initializations."""

REFUSED: dict[str, Any] = {
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 2},
    "velora_config": {"num_groups": 2},
    "monteclora_config": {"num_samples": 2},
    "megatron_config": {"tensor_model_parallel_size": 1},
}
RUNTIME = {"runtime_config"}
"""Fields that PEFT never writes: how it uses one machine's memory."""


def test_every_field_has_its_place():
    """A new field of PEFT's, or of ours, has to be put in one of these lists by somebody who has read what it does."""
    theirs = {f.name for f in dataclasses.fields(peft.LoraConfig)}
    ours = {f.name for f in dataclasses.fields(jaxadapt.LoraConfig)} - {"extra"}
    assert theirs - RUNTIME == ours
    lists = [set(HONOURED), ELSEWHERE, set(REFUSED)]
    assert set().union(*lists) == ours
    assert sum(map(len, lists)) == len(ours)


VARIANTS = ["use_bdlora", "arrow_config", "velora_config", "monteclora_config"]


@pytest.mark.parametrize("field", [*VARIANTS, "megatron_config"])
def test_an_empty_object_is_a_variant_with_its_defaults(field: str):
    """In PEFT it fails, or adds parameters to each module; Megatron's counts as unset."""

    def peft_names(**fields: Any) -> set[str] | None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return set(peft.get_peft_model(EMB.torch(), peft.LoraConfig(**fields_of(fields))).state_dict())
            except (AttributeError, ValueError):
                return None

    config, is_plain = jaxadapt.LoraConfig(**fields_of({field: {}})), field == "megatron_config"
    assert (peft_names(**{field: {}}) == peft_names()) is is_plain
    if is_plain:
        jaxadapt.init(params(), config, keymap=TABLE, key=jax.random.key(0))
    else:
        with pytest.raises(jaxadapt.ConfigError, match=f"not supported: {field}="):
            jaxadapt.init(params(), config, keymap=TABLE, key=jax.random.key(0))


@functools.cache
def torch_net() -> Any:
    return EMB.torch().eval()


@functools.cache
def params() -> Any:
    return trees.nest(EMB.leaves("linen", None, torch_net()))


TABLE = EMB.table("linen")


def fields_of(more: dict[str, Any]) -> dict[str, Any]:
    return {"r": 2, "target_modules": ["lin"], **more}


@pytest.mark.parametrize("field", [name for name, value in HONOURED.items() if value])
@pytest.mark.filterwarnings("ignore:task_type. SEQ_CLS trains its head")  # of which this model has none
def test_a_fresh_adapter_has_pefts_keys_and_configuration(field, tmp_path):
    fields = fields_of(HONOURED[field])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = {key: value for key, value in fields.items() if key not in ("peft_type", "auto_mapping")}
        model = peft.get_peft_model(EMB.torch(), peft.LoraConfig(**given))
        harness.save(model, tmp_path / "peft")
    adapter = jaxadapt.init(params(), jaxadapt.LoraConfig(**fields), key=jax.random.key(0), keymap=TABLE)
    jaxadapt.save(adapter, tmp_path / "ours", save_embedding_layers=False)
    mine, theirs = (harness.read_tensors(tmp_path / who) for who in ("ours", "peft"))
    assert harness.specs(mine) == harness.specs(theirs)
    ours, want = (harness.read_json(tmp_path / who) for who in ("ours", "peft"))
    idle = {"auto_mapping", "base_model_name_or_path"}  # PEFT names its own model there
    assert {k: v for k, v in ours.items() if k not in idle} == {k: v for k, v in want.items() if k not in idle}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    adapter = jaxadapt.init(params(), jaxadapt.LoraConfig(**fields_of({})), key=jax.random.key(0), keymap=TABLE)
    jaxadapt.write(jaxadapt.to_peft(adapter), tmp_path)
    return tmp_path


@pytest.mark.parametrize("field", REFUSED)
@pytest.mark.filterwarnings("ignore:.*was edited")
def test_it_is_refused_wherever_it_comes_in(field, folder):
    """At attaching and at loading, in both APIs, with one error: what it is, and the way out."""
    config = jaxadapt.LoraConfig(**fields_of({field: REFUSED[field]}))
    data = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**data, field: REFUSED[field]}))
    model = EMB.nnx(torch_net())
    before = nnx.graphdef(model)
    asked = [
        lambda: jaxadapt.adapt(model, config, rngs=nnx.Rngs(0), keymap=EMB.table()),
        lambda: jaxadapt.adapt(EMB.linen(), config, keymap=TABLE),
        lambda: jaxadapt.init(params(), config, keymap=TABLE),
        lambda: jaxadapt.load(folder, model, keymap=EMB.table()),
        lambda: jaxadapt.load(folder, {"params": params()}, keymap=TABLE),
    ]
    said = set()
    for ask in asked:
        with pytest.raises(jaxadapt.ConfigError, match=f"are not supported: {field}=.*, which .*[:,]") as caught:
            ask()
        said.add(str(caught.value).partition("asks for")[2])
    assert len(said) == 1
    assert nnx.graphdef(model) == before
    assert jaxadapt.read(folder).config.get(field)  # and is kept, byte for byte, where nothing is computed


# ---- the ways out that the errors name --------------------------------------------------------------------------


WAYS_OUT: dict[str, list[Any]] = {
    "velora_config": [peft.VeloraConfig(num_groups=2, init_type="random")],
    "monteclora_config": [peft.MontecloraConfig(num_samples=2)],
    "use_bdlora": [
        peft.tuners.lora.config.BdLoraConfig(**{f"target_modules_bd_{side}": ["lin"]}, nblocks=nblocks)
        for side, nblocks in (("a", 2), ("b", 4))
    ],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in WAYS_OUT for value in WAYS_OUT[field]])
def test_what_such_a_training_made_computes_what_its_conversion_does(field, value, tmp_path):
    """And what comes of it is a plain LoRA to PEFT too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = harness.make_peft(torch_net(), peft.LoraConfig(**fields_of({"r": 4, field: value})))
        harness.save(model, tmp_path)
    ids = EMB.input()
    with torch.no_grad():
        want = model.eval()(torch.from_numpy(ids)).numpy()
    read = jaxadapt.read(tmp_path)
    with pytest.raises(jaxadapt.ConfigError, match=f"{field}=.*convert_variant"):
        jaxadapt.from_peft(read, params(), keymap=TABLE)
    plain = jaxadapt.merging.convert_variant(read)
    assert plain.config == read.config.replace(**{field: None})
    adapter = jaxadapt.from_peft(plain, params(), keymap=TABLE)
    module = jaxadapt.adapt(EMB.linen(), adapter.config, keymap=TABLE)
    output = module.apply({"params": params(), **adapter.collection}, EMB.ours(ids))
    np.testing.assert_allclose(output, want, rtol=0, atol=1e-5 * abs(want).max())
    jaxadapt.write(plain, tmp_path / "plain")
    again = harness.load(torch_net(), tmp_path / "plain")
    assert again.missing == again.unexpected == []
    with torch.no_grad():
        found = again.model(torch.from_numpy(ids)).numpy()
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5 * abs(want).max())


def test_qalora_is_its_formula():
    """PEFT has it for GPTQ's layers alone, and ignores it elsewhere: its own forward pass beside the plain product."""
    rng, size = np.random.RandomState(0), 4
    a, b, x = (rng.standard_normal(shape).astype("float32") for shape in ((2, 2), (6, 2), (3, 5, 8)))
    weights = {side: {"default": torch.nn.Linear(*w.shape[::-1], bias=False)} for side, w in (("A", a), ("B", b))}
    for side, w in (("A", a), ("B", b)):
        weights[side]["default"].weight.data = torch.from_numpy(w)
    layer = types.SimpleNamespace(
        lora_A=weights["A"], lora_B=weights["B"], lora_dropout={"default": torch.nn.Identity()}, in_features=8,
        scaling={"default": 1.5}, qalora_group_size={"default": size}, training=False,
    )  # fmt: skip
    with torch.no_grad():
        want = QALoraLinearVariant.forward(layer, "default", torch.from_numpy(x), torch.zeros(3, 5, 6)).numpy()
    config = jaxadapt.LoraConfig(r=2, lora_alpha=3, target_modules=["q"], use_qalora=True, qalora_group_size=size)
    keys = [f"base_model.model.q.lora_{side}.weight" for side in "AB"]
    plain = jaxadapt.merging.convert_variant(jaxadapt.PeftTensors(config, dict(zip(keys, (a, b), strict=True))))
    base = {"q": {"kernel": np.zeros((8, 6), "float32")}}
    merged = jaxadapt.merge(base, jaxadapt.from_peft(plain, base))["q"]["kernel"]
    np.testing.assert_allclose(x @ merged, want, rtol=0, atol=1e-5 * abs(want).max())
    ignored = peft.get_peft_model(EMB.torch(), peft.LoraConfig(**fields_of({"use_qalora": True})))
    assert ignored.base_model.model.layers[0].lin.lora_A["default"].weight.shape == (2, 8)
    with pytest.raises(jaxadapt.ConfigError, match="use_qalora=True, which .*use_qalora=False"):
        jaxadapt.init(base, config, key=jax.random.key(0))


def test_blocks_that_do_not_fit_are_named():
    config = jaxadapt.LoraConfig(r=3, target_modules=["q"], use_bdlora={"target_modules_bd_a": ["q"], "nblocks": 2})
    tensors = jaxadapt.PeftTensors(config, {"base_model.model.q.lora_A.weight": np.ones((3, 4))}, "here")
    with pytest.raises(jaxadapt.MismatchError, match=r"here: .*q\.lora_A\.weight: expected rows for 2 blocks"):
        jaxadapt.merging.convert_variant(tensors)
    with pytest.raises(jaxadapt.ConfigError, match="converts LORA only, found IA3"):
        jaxadapt.merging.convert_variant(jaxadapt.PeftTensors(jaxadapt.IA3Config(target_modules=["q"]), {}))


# ---- layer_replication -----------------------------------------------------------------------------------------

PAIRS = [[0, 2], [1, 2]]  # layers 0, 1 and 1 again
IDS = np.random.RandomState(0).randint(0, 64, (2, 7))


def repeated(api: str, order: tuple[int, ...] = (0, 1, 1)) -> Any:
    """The twin of the base with its layers in this order; its parameters come from a torch model built alike."""
    return llama.twin_of(_repeated_torch(order), api)


@functools.cache
def _repeated_torch(order: tuple[int, ...]) -> Any:
    base, model = llama.torch_llama(), llama.torch_llama(layers=len(order))
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(base.model.embed_tokens.weight)
        model.model.norm.weight.copy_(base.model.norm.weight)
        for i, layer in enumerate(order):
            model.model.layers[i].load_state_dict(base.model.layers[layer].state_dict())
    return model


@functools.cache
def replicated() -> Any:
    config = peft.LoraConfig(
        r=2, lora_alpha=3, task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], layer_replication=PAIRS
    )
    return harness.make_peft(llama.torch_llama(), config)


@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_layers_that_are_repeated(api, tmp_path):
    """PEFT repeats the base's layers; the same file fits a model built so, and what that saves fits PEFT's base."""
    harness.save(replicated(), tmp_path / "peft")
    want = harness.logits(replicated(), IDS)
    if api == "nnx":
        tree = jaxadapt.load(tmp_path / "peft", repeated(api))
        output = np.asarray(tree(IDS))
    else:
        module, variables = repeated(api)
        tree = jaxadapt.load(tmp_path / "peft", variables)
        output = np.asarray(jaxadapt.adapt(module, jaxadapt.extract(tree).config).apply(tree, IDS))
    np.testing.assert_allclose(output, want, rtol=0, atol=1e-5 * abs(want).max())
    jaxadapt.save(tree, tmp_path / "ours")
    assert harness.read_json(tmp_path / "ours") == harness.read_json(tmp_path / "peft")
    again = harness.load(llama.torch_llama(), tmp_path / "ours")
    assert again.missing == again.unexpected == []
    np.testing.assert_array_equal(harness.logits(again.model, IDS), want)


def test_a_merge_of_repeated_layers_is_right_here(tmp_path):
    """PEFT's is not refused, and puts the products of all repetitions into the weight that they share."""
    harness.save(replicated(), tmp_path)
    module, variables = repeated("linen")
    adapter = jaxadapt.extract(jaxadapt.load(tmp_path, variables))
    output = module.apply({"params": jaxadapt.merge(variables["params"], adapter)}, IDS)
    want = harness.logits(replicated(), IDS)
    np.testing.assert_allclose(output, want, rtol=0, atol=1e-5 * abs(want).max())


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_peft_takes_from_a_repeated_layer_more_than_once(kind, tmp_path):
    """Its repetitions share one weight, so that PEFT's own start is not the base: no such start here."""
    fields = {"r": 2, "target_modules": ["q_proj"], "layer_replication": PAIRS, "init_lora_weights": kind}
    model = peft.get_peft_model(llama.torch_llama(), peft.LoraConfig(task_type="CAUSAL_LM", **fields))
    harness.save(model, tmp_path)
    mine = repeated("nnx")
    assert abs(harness.logits(model, IDS) - mine(IDS)).max() > 0.1
    refused = pytest.raises(jaxadapt.ConfigError, match=r"layers\.1\..*one shared weight")
    with refused:
        jaxadapt.load(jaxadapt.read(tmp_path, change_base=True), mine)
    with refused:
        jaxadapt.initializers.start(mine, jaxadapt.LoraConfig(**fields))


@pytest.mark.parametrize(
    ("order", "message"),
    [((0, 1), r"3 layers, found 2.*\[0, 1, 1\]"), ((0, 1, 0), "layers.2.self_attn")],
)
def test_a_model_with_other_layers_is_refused(order, message, tmp_path):
    harness.save(replicated(), tmp_path)
    with pytest.raises(jaxadapt.ConfigError, match=rf"(?s){message}"):
        jaxadapt.load(tmp_path, repeated("nnx", order))


def test_repeated_layers_without_values_are_taken_on_trust(tmp_path):
    harness.save(replicated(), tmp_path)
    _, variables = repeated("linen")
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)
    with pytest.warns(UserWarning, match="has only shapes here"):
        assert jaxadapt.load(tmp_path, shapes)["lora"]


# ---- targets that nobody named ----------------------------------------------------------------------------------


def test_pefts_own_targets_of_a_known_family():
    _, variables = llama.twin_of(llama.torch_llama(), "linen")
    adapter = jaxadapt.init(variables["params"], jaxadapt.LoraConfig(r=2), key=jax.random.key(0))
    model = peft.get_peft_model(llama.torch_llama(), peft.LoraConfig(r=2))
    assert set(adapter.config.target_modules) == set(model.peft_config["default"].target_modules)
