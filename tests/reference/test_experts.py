"""`target_parameters` as PEFT has it, on tiny mixtures of experts: files, configurations, merged weights, layers.

The logits of whole models are in `tests/keymaps/families/test_proof.py`.
"""

from __future__ import annotations

import copy
import functools
import tracemalloc
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

pytest.importorskip("torch")
pytest.importorskip("peft")

from peft.utils.save_and_load import get_peft_model_state_dict

import jaxadapt
from jaxadapt.core import paths
from jaxadapt.keymaps import families, plan
from jaxadapt.keymaps import plan as pieces
from jaxadapt.models import LoraTree
from jaxadapt.storage import safetensors
from tests.keymaps.families import jax_side, specimen_arrays, torch_side
from tests.keymaps.families.specimens import BY_NAME, recorded
from tests.support import peft_harness as harness

pytestmark = pytest.mark.peft

KINDS = ("mixtral", "qwen3_moe", "gpt_oss", "llama4", "deepseek_v3")
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def fields(*parameters: str, **more: Any) -> dict[str, Any]:
    return {"r": 2, "lora_alpha": 3, "target_modules": [], "target_parameters": list(parameters), **more}


SETTINGS: dict[str, dict[str, Any]] = {
    "both": fields(*BOTH, target_modules=["o_proj"], use_rslora=True),
    "first": fields("gate_up_proj"),
    "second": fields("mlp.experts.down_proj", "feed_forward.experts.down_proj"),
    # A pattern is held against the parameter's own name; what is doubled here is what transformers doubles.
    "patterns": fields(*BOTH, rank_pattern={r".*\.gate_up_proj": 4}, alpha_pattern={"down_proj": 7, "experts": 9}),
    "linear": fields("q_proj.weight", "kv_b_proj.weight", "router.weight", "mlp.gate.weight", "layers.1.mlp.w"),
    "all biases": fields(*BOTH, "router.weight", "k_proj.weight", target_modules=["o_proj"], bias="all"),
    "adapted biases": fields(*BOTH, "router.weight", "k_proj.weight", target_modules=["o_proj"], bias="lora_only"),
    "one layer": fields("model.layers.2.mlp.experts.down_proj", "model.layers.2.feed_forward.experts.down_proj"),
}


@functools.cache
def base(kind: str) -> dict[str, Any]:
    specimen = BY_NAME[kind]
    return paths.unflatten(specimen_arrays.base_leaves(specimen, jax_side.side(specimen).shapes))


def quietly(f: Any, *args: Any, **kwargs: Any) -> Any:
    """Entries that match nothing are warned of; the settings are for all models at once."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(target_parameters|(rank|alpha)_pattern):")
        warnings.filterwarnings("ignore", category=RuntimeWarning)
        return f(*args, **kwargs)


@functools.cache
def adapted(kind: str, setting: str) -> Any:
    from peft import LoraConfig

    return quietly(harness.make_peft, torch_side.base(kind), LoraConfig(**copy.deepcopy(SETTINGS[setting])))


EVERY = pytest.mark.parametrize(("kind", "setting"), [(k, s) for k in KINDS for s in SETTINGS])


@EVERY
def test_a_fresh_adapter_has_pefts_keys_and_shapes(kind, setting):
    config = jaxadapt.LoraConfig(**SETTINGS[setting])
    ours = jaxadapt.to_peft(quietly(jaxadapt.init, base(kind), config, key=jax.random.key(0))).tensors
    theirs = get_peft_model_state_dict(adapted(kind, setting))
    assert harness.specs(ours) == harness.specs(theirs)


@EVERY
def test_pefts_file_merges_to_pefts_weights_and_is_saved_as_it_was(kind, setting, tmp_path):
    model = adapted(kind, setting)
    harness.save(model, tmp_path / "peft")
    adapter = quietly(jaxadapt.from_peft, jaxadapt.read(tmp_path / "peft"), base(kind))
    merged = jaxadapt.merge(base(kind), adapter)
    table = families.get_family(kind)
    flat = {path: np.asarray(x) for path, x in paths.flatten(merged).items()}
    found = plan.base_plan(table, {path: x.shape for path, x in flat.items()}).encode(flat)
    before = torch_side.base(kind).state_dict()
    for key, x in copy.deepcopy(model).merge_and_unload().state_dict().items():
        np.testing.assert_allclose(found[key], x.numpy(), rtol=0, atol=1e-6, err_msg=key)
        np.testing.assert_array_equal((found[key] != before[key].numpy()).any(), (x != before[key]).any().numpy())
    jaxadapt.save(adapter, tmp_path / "ours")
    ours, theirs = harness.read_tensors(tmp_path / "ours"), harness.read_tensors(tmp_path / "peft")
    assert {k: v.tobytes() for k, v in ours.items()} == {k: v.tobytes() for k, v in theirs.items()}
    assert harness.read_json(tmp_path / "ours") == harness.read_json(tmp_path / "peft")


def test_where_target_modules_is_null_peft_chooses_for_some_models():
    adapter = jaxadapt.init(base("mixtral"), jaxadapt.LoraConfig(**fields(*BOTH, target_modules=None)))
    assert adapter.config.get("target_modules") == ("q_proj", "v_proj")
    for kind in ("qwen3_moe", "gpt_oss", "deepseek_v3"):
        adapter = jaxadapt.init(base(kind), jaxadapt.LoraConfig(**fields(*BOTH, target_modules=None)))
        assert adapter.config.get("target_modules") is None
        with pytest.raises(jaxadapt.AdapterError, match="target_modules"):
            jaxadapt.init(base(kind), jaxadapt.LoraConfig(r=2))


# ---- refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout=0.1 cannot be combined with target_parameters"),
        ({"use_dora": True}, "use_dora=True cannot be combined with target_parameters"),
        ({"lora_bias": True}, "lora_bias=True cannot be combined with target_parameters"),
        ({"target_modules": ["q_proj"], "target_parameters": ["q_proj.weight"]}, "both select these weights"),
        ({"target_parameters": ["embed_tokens.weight"]}, "kind 'embedding'"),
        ({"target_parameters": ["input_layernorm.weight"]}, "kind 'vector'"),
        ({"target_parameters": ["gate_up"]}, "'gate_up' matches no parameter; near misses: gate_up_proj"),
        ({"target_modules": ["gate"], "target_parameters": None}, "kind 'parameter'"),
    ],
)
def test_what_peft_would_refuse_or_break_on(more, says):
    config = jaxadapt.LoraConfig(**{**fields(*BOTH), **more})
    with pytest.raises(jaxadapt.AdapterError, match=says):
        jaxadapt.init(base("mixtral"), config)


def test_a_name_that_matches_nothing_beside_others_is_warned_of():
    with pytest.warns(UserWarning, match="'experts.up' matches no parameter"):
        jaxadapt.init(base("mixtral"), jaxadapt.LoraConfig(**fields(*BOTH, "experts.up")))


def test_a_model_without_a_table_says_what_is_needed():
    params = {"experts": {"up": np.zeros((4, 3, 5), "float32")}}
    with pytest.raises(jaxadapt.KeyMapError, match=r"kind='experts'.*(?s:.)*experts.up \(4, 3, 5\)"):
        jaxadapt.init(params, jaxadapt.LoraConfig(**fields("experts.up")))
    line = jaxadapt.Weight("experts.up", "experts.up", "e i o -> e o i", kind="experts")
    table = jaxadapt.KeyMap("mine", (line,))
    adapter = jaxadapt.init(params, jaxadapt.LoraConfig(**fields("experts.up")), keymap=table)
    shapes = {key: x.shape for key, x in adapter.flat().items()}
    assert shapes == {"experts.up.lora_A": (4, 2, 3), "experts.up.lora_B": (4, 5, 2)}


# ---- layers ----------------------------------------------------------------------------------------------

E, D, F, T = 3, 4, 5, 6
SIZES = jnp.array([2, 0, 4])


def einsum(x: Any, up: Any, down: Any) -> Any:
    return jnp.einsum("etf,efd->td", nn.silu(jnp.einsum("td,edf->etf", x, up)), down)


def per_expert(x: Any, up: Any, down: Any) -> Any:
    mid = jnp.einsum("td,edf->tef", x, up)
    return jnp.einsum("tef,efd->etd", mid, down).sum(0)


def ragged(x: Any, up: Any, down: Any) -> Any:
    return jax.lax.ragged_dot(nn.silu(jax.lax.ragged_dot(x, up, SIZES)), down, SIZES)


def sliced(x: Any, up: Any, down: Any) -> Any:
    return sum((x @ up[i]) @ down[i] for i in range(E))


class Experts(nnx.Module):
    def __init__(self, how: Any, rngs: nnx.Rngs):
        self.how = how
        self.up = nnx.Param(jax.random.normal(rngs.params(), (E, D, F)))
        self.down = nnx.Param(jax.random.normal(rngs.params(), (E, F, D)))

    def __call__(self, x: Any) -> Any:
        return self.how(x, self.up[...], self.down[...])


class LinenExperts(nn.Module):
    how: Any

    @nn.compact
    def __call__(self, x: Any) -> Any:
        shapes = {"up": (E, D, F), "down": (E, F, D)}
        return self.how(x, *(self.param(n, nn.initializers.normal(1.0), s) for n, s in shapes.items()))


class Net(nnx.Module):
    def __init__(self, how: Any, rngs: nnx.Rngs):
        self.experts = Experts(how, rngs)

    def __call__(self, x: Any) -> Any:
        return self.experts(x)


class LinenNet(nn.Module):
    how: Any

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return LinenExperts(self.how, name="experts")(x)


def table(right: str) -> jaxadapt.KeyMap:
    """`right`: PyTorch has (expert, out, in), or (expert, in, out) and PEFT does not know it, as of Llama 4."""
    names = ("experts.up", "experts.down")
    return jaxadapt.KeyMap("mine", tuple(jaxadapt.Weight(n, n, f"e i o -> {right}", kind="experts") for n in names))


HOW = {einsum: (True, False), per_expert: (True, True), ragged: (True, True), sliced: (False, False)}
CONFIG = jaxadapt.LoraConfig(**fields("experts.up", "experts.down"))
X = jax.random.normal(jax.random.key(1), (T, D))


def trained(adapter: jaxadapt.Adapter) -> jaxadapt.Adapter:
    leaves, tree = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    return tree.unflatten([0.3 * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)])


@pytest.mark.parametrize("right", ["e o i", "e i o"])
@pytest.mark.parametrize("how", HOW, ids=lambda how: how.__name__)
def test_a_layer_of_experts_computes_what_its_merged_weights_do(how, right):
    """Where the product runs along the experts' axes the low-rank one stands beside it, else in the weight."""
    model = jaxadapt.adapt(Net(how, nnx.Rngs(0)), CONFIG, rngs=nnx.Rngs(1), keymap=table(right), example=[X])
    plain = jnp.array(Net(how, nnx.Rngs(0))(X))
    np.testing.assert_allclose(model(X), plain, rtol=1e-6)
    adapter = trained(jaxadapt.extract(model))
    jaxadapt.inject(model, adapter)
    report = str(jaxadapt.summary(model, X))
    assert (report.count("traced"), report.count("effective weight")) == (sum(HOW[how]), 2 - sum(HOW[how]))

    def merged(adapter: jaxadapt.Adapter) -> Any:
        weights = jaxadapt.merge({"experts": {p: vars(model.experts)[p][...] for p in ("up", "down")}}, adapter)
        return how(X, weights["experts"]["up"], weights["experts"]["down"])

    scale = float(jnp.abs(merged(adapter)).max())
    np.testing.assert_allclose(model(X), merged(adapter), rtol=0, atol=1e-5 * scale)
    assert float(jnp.abs(model(X) - plain).max()) > 0.1
    graph, rest, other = nnx.split(model, jaxadapt.AdapterParam, ...)
    grads = jax.jit(jax.grad(lambda state: (nnx.merge(graph, state, other)(X) ** 2).sum()))(rest)
    expected = jax.jit(jax.grad(lambda adapter: (merged(adapter) ** 2).sum()))(adapter).flat()
    for path, grad in jaxadapt.extract(grads).flat().items():
        np.testing.assert_allclose(grad, expected[path], rtol=0, atol=1e-5 * float(jnp.abs(expected[path]).max()))

    module = LinenNet(how)
    params = {"experts": {p: vars(model.experts)[p][...] for p in ("up", "down")}}
    linen = jaxadapt.adapt(module, CONFIG, keymap=table(right))
    out = linen.apply({"params": params, **adapter.collection}, X)
    np.testing.assert_allclose(out, model(X), rtol=0, atol=1e-5 * scale)


def test_experts_in_16_bits():
    """The sum in a ragged product is the weight's dtype, as the product itself is."""
    model = jaxadapt.adapt(Net(ragged, nnx.Rngs(0)), CONFIG, rngs=nnx.Rngs(1), keymap=table("e o i"))
    jaxadapt.inject(model, trained(jaxadapt.extract(model)))
    exact = model(X)
    for name in ("up", "down"):
        vars(model.experts)[name].set_value(vars(model.experts)[name][...].astype(jnp.bfloat16))
    out = model(X.astype(jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype("float32"), exact, rtol=0, atol=0.03 * float(jnp.abs(exact).max()))


# ---- leaves that are parts of one tensor in PyTorch --------------------------------------------------------

APART = ("maxtext-mixtral", "maxtext-qwen3_moe-scan1", "maxtext-gpt_oss")


@functools.cache
def split_base(name: str) -> dict[str, Any]:
    return paths.unflatten(specimen_arrays.base_leaves(BY_NAME[name], recorded(name)["leaves"]))


def torch_weights(name: str, leaves: Any) -> dict[str, np.ndarray]:
    """A model's weights under PyTorch's names, as a merged export writes them."""
    flat = {path: np.asarray(x) for path, x in paths.flatten(leaves).items()}
    made = plan.base_plan(families.get_family(BY_NAME[name].table), {path: x.shape for path, x in flat.items()})
    back = made.encode(flat)
    groups = pieces.group_by_file_key(made.keys)
    return {key: pieces.join_parts([back[part] for part in parts], parts, np) for key, parts in groups.items()}


@pytest.mark.parametrize("more", [{}, {"use_rslora": True, "rank_pattern": {"down_proj": 3}}], ids=["plain", "ranks"])
@pytest.mark.parametrize("name", APART)
def test_gate_and_up_apart_are_one_parameter_in_peft(name, more, tmp_path):
    """Each leaf has an A of its own: as long as they differ, only ranks side by side say the same in PEFT."""
    config = jaxadapt.LoraConfig(**fields(*BOTH, target_modules=["o_proj"], **more))
    fresh = jaxadapt.init(split_base(name), config, key=jax.random.key(0), keymap=BY_NAME[name].table)
    adapter = trained(fresh)
    with pytest.raises(jaxadapt.MismatchError, match=r"(?s)one A for .*experts\.base_layer\.lora_A.*on_shared"):
        jaxadapt.save(adapter, tmp_path)
    jaxadapt.save(LoraTree(adapter, on_shared="concat"), tmp_path)
    loaded = harness.load(torch_side.base(name), tmp_path)
    # (PEFT looks for patterns among modules alone, and warns of those of parameters, which it follows.)
    assert not [text for text in loaded.complaints if "pattern keys did not match any targeted module" not in text]
    merged = torch_weights(name, jaxadapt.merge(split_base(name), adapter))
    before = torch_weights(name, split_base(name))
    for key, x in loaded.model.merge_and_unload().state_dict().items():
        np.testing.assert_allclose(merged[key], x.numpy(), rtol=0, atol=2e-6, err_msg=key)
        adapted_ = key.endswith(("gate_up_proj", "down_proj", "o_proj.weight"))
        assert (np.abs(before[key] - x.numpy()).max() > 0.01) == adapted_, key
    # And such a file is read back: its A is both leaves', and stays one.
    again = jaxadapt.from_peft(jaxadapt.read(tmp_path), split_base(name), keymap=BY_NAME[name].table)
    twice = torch_weights(name, jaxadapt.merge(split_base(name), again))
    for key, x in twice.items():
        np.testing.assert_allclose(x, merged[key], rtol=0, atol=2e-6, err_msg=key)
    jaxadapt.save(again, tmp_path / "again")
    ours, theirs = harness.read_tensors(tmp_path / "again"), harness.read_tensors(tmp_path)
    assert {k: v.tobytes() for k, v in ours.items()} == {k: v.tobytes() for k, v in theirs.items()}


def test_where_the_parts_are_what_a_reads_the_b_is_shared():
    """Llama 4's: PEFT takes (expert, in, out) for (expert, out, in), and so its A covers gate and up."""
    lines = [
        jaxadapt.Weight(f"wi_{i}", f"experts.gate_up_proj[f {i}/2]", "e d f -> e d f", kind="experts") for i in range(2)
    ]
    table = jaxadapt.KeyMap("mine", tuple(lines))
    base = {f"wi_{i}": np.zeros((E, D, F), "float32") for i in range(2)}
    config = jaxadapt.LoraConfig(**fields("gate_up_proj"))
    adapter = trained(jaxadapt.init(base, config, key=jax.random.key(0), keymap=table))
    with pytest.raises(jaxadapt.MismatchError, match="lora_B"):
        jaxadapt.to_peft(adapter)
    held = jaxadapt.to_peft(LoraTree(adapter, on_shared="concat"))
    a, b = (np.asarray(held.tensors[f"base_model.model.experts.lora_{side}.weight"]) for side in "AB")
    assert (held.config.r, a.shape, b.shape) == (4, (E * 4, 2 * F), (D, 4 * E))
    delta = np.einsum("okE,Eki->Eoi", b.reshape(D, 4, E), a.reshape(E, 4, 2 * F)) * held.config.lora_alpha / 4
    merged = jaxadapt.merge(base, adapter)
    np.testing.assert_allclose(delta, np.concatenate([merged["wi_0"], merged["wi_1"]], 2), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*has no config.json")
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_folders_of_models_have_their_experts_apart(kind, tmp_path):
    """transformers saves a tensor for each expert, under the names of its version 4: we read that, and write it."""
    torch_side.base(kind).save_pretrained(tmp_path / "theirs")
    theirs = safetensors.read(tmp_path / "theirs" / "model.safetensors")
    assert any(".experts.0." in key for key in theirs)
    want = paths.flatten(base(kind))
    target = paths.unflatten({path: np.zeros_like(x) for path, x in want.items()})
    found = paths.flatten(jaxadapt.export.import_base(tmp_path / "theirs", target, keymap=kind))
    assert found.keys() == want.keys()
    for path, x in want.items():
        np.testing.assert_array_equal(found[path], x, err_msg=path)
    jaxadapt.export.export_base(base(kind), tmp_path / "ours", keymap=f"{kind}/per-expert")
    ours = safetensors.read(tmp_path / "ours" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for key, x in theirs.items():
        np.testing.assert_array_equal(ours[key], x, err_msg=key)


@pytest.mark.filterwarnings("ignore:.*has no config.json")
def test_a_folder_that_lacks_an_expert_says_which(tmp_path):
    jaxadapt.export.export_base(base("mixtral"), tmp_path, keymap="mixtral/per-expert")
    file = tmp_path / "model.safetensors"
    tensors = safetensors.read(file)
    del tensors["model.layers.0.block_sparse_moe.experts.1.w3.weight"]
    safetensors.write(file, {k: (x.dtype, x.shape) for k, x in tensors.items()}, tensors.__getitem__)
    with pytest.raises(jaxadapt.MismatchError, match=r"layers\.0\.mlp\.experts\.gate_up_proj: part 1 of expert 1"):
        jaxadapt.export.import_base(tmp_path, base("mixtral"), keymap="mixtral")


@pytest.mark.filterwarnings("ignore:.*has no config.json")
def test_experts_apart_into_leaves_apart(tmp_path):
    """Gate and up are leaves of their own in MaxText, whose scaled queries round once more."""
    name = next(name for name in APART if "mixtral" in name)
    table = BY_NAME[name].table
    jaxadapt.export.export_base(split_base(name), tmp_path, keymap=f"{table}/per-expert")
    target = jax.tree.map(np.zeros_like, split_base(name))
    found = paths.flatten(jaxadapt.export.import_base(tmp_path, target, keymap=table))
    for path, x in paths.flatten(split_base(name)).items():
        np.testing.assert_allclose(found[path], x, rtol=2e-7 if "query" in path else 0, err_msg=path)


@pytest.mark.filterwarnings("ignore:.*has no config.json")
@pytest.mark.parametrize("spelling", ["", "/per-expert"])
def test_experts_are_not_all_in_memory_at_once(spelling, tmp_path):
    """Into leaves that are parts of the file's tensors, only what is being read is there besides the model."""
    layers, e, d, f, at = 10, 4, 128, 256, "decoder.layers_{}.MoeBlock_0."
    shapes = {"wi_0": (e, d, f), "wi_1": (e, d, f), "wo": (e, f, d), "gate.kernel": (d, e)}
    leaves = {at.format(i) + name: np.zeros(shape, "float32") for i in range(layers) for name, shape in shapes.items()}
    jaxadapt.export.export_base(paths.unflatten(leaves), tmp_path, keymap=f"maxtext:mixtral{spelling}")
    target = paths.unflatten({path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in leaves.items()})
    tracemalloc.start()
    try:
        found = jaxadapt.export.import_base(tmp_path, target, keymap="maxtext:mixtral")
        peak = tracemalloc.get_traced_memory()[1] - sum(x.nbytes for x in jax.tree.leaves(found))
    finally:
        tracemalloc.stop()
    largest = 2 * e * d * f * 4
    # Each of the reading threads has one tensor; all of the model's experts are fifteen times the largest.
    assert peak < 7 * largest
