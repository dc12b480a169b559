"""`start` beside PEFT: what the adapter holds (s·B·A) and what is left in the base, for every initialization.

Singular vectors have no sign, and QR none either, so products are compared and not factors.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
import torch
from peft.tuners.lora import corda as peft_corda
from peft.tuners.lora import loraga as peft_loraga
from safetensors.numpy import load_file

import jaxadapt
from jaxadapt.initializers import kinds
from jaxadapt.keymaps import families, plan
from jaxadapt.models.carriers import carrier
from tests.merging.test_resize import deltas
from tests.reference.record_bitsandbytes import LOFTQ, RANK, RECORDED
from tests.support import peft_harness as harness
from tests.support.twins import gpt2, llama

pytestmark = pytest.mark.peft

IDS = np.random.RandomState(0).randint(0, 64, (12, 11))
MASK = (np.arange(11) < np.random.RandomState(1).randint(7, 12, (12, 1))).astype("int64")
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}
PRE = "base_model.model."


def fields(family, kind, **more):
    conv = {"fan_in_fan_out": True} if family == "gpt2" else {}
    return {"r": 4, "lora_alpha": 6, "target_modules": TARGETS[family], "init_lora_weights": kind, **conv} | more


@functools.cache
def torch_base(family):
    return llama.torch_llama(layers=2) if family == "llama" else gpt2.torch_gpt2(gpt2.Shape(layers=2))


def twin(family, api, scan=None):
    """(base, forward): what `start` takes, with torch's weights."""
    if family == "llama":
        found = llama.twin_of(torch_base(family), api, scan=scan is not None, scan_axis=scan or 0)
    else:
        found = gpt2.make_gpt2(api, scan_axis=scan, layers=2)[1]
    if api == "nnx":
        return found, lambda model, batch: model(batch["input_ids"])
    module, variables = found
    return variables["params"], lambda params, batch: module.apply({"params": params}, batch["input_ids"])


def peft_side(family, config, kind, rows=12, seed=0):
    """{module: s·B·A} and {module: base weight}, of PEFT."""
    model, config = copy.deepcopy(torch_base(family)), copy.deepcopy(config)
    for module in model.modules():  # PEFT takes LoRA-GA's gradients in training mode
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    torch.manual_seed(seed)
    if kind == "corda":
        peft_corda.preprocess_corda(model, config, lambda: [model(torch.tensor(IDS[i : i + 1])) for i in range(rows)])
    if kind == "lora_ga":

        def step():
            model(torch.tensor(IDS[:2])).logits.square().mean().backward()

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of backward hooks on what needs no gradient
            peft_loraga.preprocess_loraga(model, config, step)
    model = peft.get_peft_model(model, config, low_cpu_mem_usage=kind == "eva")
    if kind == "eva":
        with torch.no_grad():
            peft.initialize_lora_eva_weights(model, batches(torch.tensor), show_progress_bar=False)
    return model


def batches(make):
    return [{"input_ids": make(IDS[i : i + 6]), "attention_mask": make(MASK[i : i + 6])} for i in (0, 6)]


def peft_products(model):
    found, base = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            stem = name.removeprefix(PRE)
            a, b = (x["default"].weight.detach().double().numpy() for x in (module.lora_A, module.lora_B))
            found[stem] = module.scaling["default"] * b @ a
            base[stem] = module.get_base_layer().weight.detach().numpy()
    return found, base


def our_base(base):
    leaves = carrier(base).leaves()
    shapes = {path: tuple(x.shape) for path, x in leaves.items()}
    encoded = plan.base_plan(families.resolve_keymap(None, shapes), shapes).encode(leaves)
    return {key.removesuffix(".weight"): np.asarray(x) for key, x in encoded.items()}


def compare(ours, base, model, tolerance):
    """Tolerance: of the largest number; an SVD in float32 by two libraries (4e-5 on some processors)."""
    found, left = peft_products(model)
    mine, now = deltas(ours), our_base(base)
    assert mine.keys() == found.keys()
    for module, expected in found.items():
        atol = tolerance * max(abs(expected).max(), 1e-3)
        np.testing.assert_allclose(mine[module], expected, rtol=0, atol=atol, err_msg=module)
        np.testing.assert_allclose(now[module], left[module], rtol=0, atol=atol, err_msg=module)


def compare_up_to_signs(ours, base, model, tolerance):
    """LoRA-GA's A and B are of different singular triples, so their signs do not cancel in B·A: row by row instead.

    And what is left of the base, with our signs put into what PEFT took out of it.
    """
    held, now = jaxadapt.to_peft(ours).tensors, our_base(base)
    taken, residual = peft_products(model)
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            signed, stem = {}, name.removeprefix(PRE)
            for side in "AB":
                theirs = getattr(module, f"lora_{side}")["default"].weight.detach().numpy()
                mine = np.asarray(held[f"{name}.lora_{side}.weight"])
                x, y = (m if side == "A" else m.T for m in (mine, theirs))
                y = y * np.sign((x * y).sum(1, keepdims=True))
                np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * abs(y).max(), err_msg=f"{name} {side}")
                signed[side] = y if side == "A" else y.T
            conv = ours.config.fan_in_fan_out
            turned = lambda w, conv=conv: w.T if conv else w  # noqa: E731 (a Conv1D's weight is (in, out))
            change = module.scaling["default"] * signed["B"] @ signed["A"]
            expected = turned(residual[stem]) + taken[stem] - change
            atol = tolerance * abs(change).max()
            np.testing.assert_allclose(turned(now[stem]), expected, rtol=0, atol=atol, err_msg=stem)


def gradients(base, forward):
    def loss(base):
        return jnp.mean(forward(base, {"input_ids": jnp.asarray(IDS[:2])}) ** 2)

    if isinstance(base, nnx.Module):
        return nnx.jit(nnx.grad(loss))(base)
    return jax.jit(jax.grad(loss))(base)


SIDES = [("llama", "nnx", None), ("llama", "linen", 0), ("gpt2", "nnx", 1)]


KINDS = [(kind, *side) for kind in ("pissa", "olora", "corda", "corda_kpm", "lora_ga") for side in SIDES]


@pytest.mark.parametrize(("kind", "family", "api", "scan"), [*KINDS, ("pissa_niter_2", "llama", "linen", 0)])
def test_what_is_taken_out_of_the_base_is_what_peft_takes(kind, family, api, scan, tmp_path):
    base, forward = twin(family, api, scan)
    before = forward(base, {"input_ids": IDS})
    kind, _, method = kind.partition("_") if kind == "corda_kpm" else (kind, "", "ipm")
    # A randomized SVD is exact with as many vectors as there are: LoRA-GA has 4r of 32, PiSSA r.
    more = {"lora_ga": {"r": 8}, "pissa_niter_2": {"r": 32}}.get(kind, {})
    if kind == "pissa_niter_2":
        more["rank_pattern"] = {"v_proj": 16}
    extra = {"corda": {"corda_config": peft_corda_config(method)}, "lora_ga": {"lora_ga_config": peft.LoraGAConfig()}}
    theirs = peft.LoraConfig(**fields(family, kind, **more, **extra.get(kind, {})))
    corda = {"corda_config": {"corda_method": method}} if kind == "corda" else {}
    config = jaxadapt.LoraConfig(**fields(family, kind, **more, **corda))
    given = {"key": jax.random.key(1)} if kind.startswith("pissa_niter") else {}
    if kind == "corda":
        inputs = [{"input_ids": IDS[i : i + 1]} for i in range(12)]
        given = {"data": jaxadapt.initializers.Batches(inputs, forward)}
    if kind == "lora_ga":
        given = {"data": gradients(base, forward), "key": jax.random.key(0)}
    if family == "gpt2" and kind == "olora":
        with pytest.raises(jaxadapt.ConfigError, match="Conv1D's transposed weight"):
            jaxadapt.initializers.start(base, config)
        return
    left, adapter = jaxadapt.initializers.start(base, config, **given)
    # CorDA inverts a covariance of condition 1e3; LoRA-GA squares that of a gradient
    tolerance = {"corda": 2e-3, "lora_ga": 1e-3}.get(kind, 1e-4)
    model = peft_side(family, theirs, kind)
    if kind == "lora_ga":
        compare_up_to_signs(adapter, left, model, tolerance)
    else:
        compare(adapter, left, model, tolerance)
    if api == "nnx":
        assert left is base
        after = left(IDS)
    else:
        after = forward(jaxadapt.merge(left, adapter), {"input_ids": IDS})
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-4 * abs(before).max())


class Layer:
    """One linear layer that PEFT has begun, with what it drew."""

    def __init__(self, kind, monkeypatch):
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(12, 10, bias=False)
        self.weight = self.linear.weight.detach().numpy().copy()
        self.drawn = []
        randn = torch.randn

        def recorded(*shape, **options):
            self.drawn.append(randn(*shape, **options))
            return self.drawn[-1]

        with monkeypatch.context() as patched:
            patched.setattr(torch, "randn", recorded)
            config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], init_lora_weights=kind)
            model = peft.get_peft_model(torch.nn.Sequential(self.linear), config)
        layer = model.base_model.model[0]
        self.a, self.b = (x["default"].weight.detach().numpy() for x in (layer.lora_A, layer.lora_B))
        self.left = layer.get_base_layer().weight.detach().numpy()
        self.drawn = [jnp.asarray(x.numpy()) for x in self.drawn]


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_from_the_same_draws_the_randomized_svd_is_pefts(steps, monkeypatch):
    """Few rounds, where what comes of it still depends on the draws."""
    theirs = Layer(f"pissa_niter_{steps}", monkeypatch)
    (omega,) = theirs.drawn
    found = kinds.pissa_fast(jnp.asarray(theirs.weight), 1.5, steps, omega)
    product = 1.5 * found.b @ found.a
    np.testing.assert_allclose(product, 1.5 * theirs.b @ theirs.a, rtol=0, atol=2e-6)
    np.testing.assert_allclose(theirs.weight - product, theirs.left, rtol=0, atol=2e-6)
    exact = kinds.pissa(jnp.asarray(theirs.weight), 4, 1.5)
    assert steps > 1 or abs(product - 1.5 * exact.b @ exact.a).max() > 1e-3


def test_orthogonal_factors_are_pefts_and_take_nothing_out_of_the_base(monkeypatch):
    theirs = Layer("orthogonal", monkeypatch)
    np.testing.assert_array_equal(theirs.left, theirs.weight)
    found = kinds.orthogonal(*theirs.drawn)
    for mine, want in ((found.a, theirs.a), (found.b.T, theirs.b.T)):
        sign = np.sign((mine * want).sum(1, keepdims=True))
        np.testing.assert_allclose(mine, sign * want, rtol=0, atol=1e-6)
    base = {"q": {"kernel": jnp.asarray(theirs.weight.T)}}
    config = jaxadapt.LoraConfig(r=4, lora_alpha=6, target_modules=["q"], init_lora_weights="orthogonal")
    left, adapter = jaxadapt.initializers.start(base, config, key=jax.random.key(0))
    assert left is base
    (change,) = deltas(adapter).values()
    assert all(abs(x).max() > 0.05 for x in adapter.sites["q.kernel"].values())
    for product in (1.5 * theirs.b @ theirs.a, change):  # B·A is nothing, to rounding
        np.testing.assert_allclose(product, 0, rtol=0, atol=1e-6)


def peft_corda_config(method):
    from peft.tuners.lora.config import CordaConfig

    return CordaConfig(corda_method=method)


# (rank 8 and rho 2: PEFT's randomized SVD then has as many vectors as there are inputs, and is exact)
@pytest.mark.parametrize(
    ("api", "scan", "settings"),
    [
        ("nnx", None, {}),
        ("linen", None, {"whiten": True, "adjust_scaling_factors": False}),
        ("linen", 0, {"rho": 1.0}),
    ],
)
def test_eva_finds_the_components_and_ranks_that_peft_finds(api, scan, settings):
    base, forward = twin("llama", api, scan)
    theirs = peft.LoraConfig(**fields("llama", "eva", r=8, eva_config=peft.EvaConfig(**settings)))
    config = jaxadapt.LoraConfig(**fields("llama", "eva", r=8, eva_config=settings))
    model = peft_side("llama", theirs, "eva")
    data = jaxadapt.initializers.Batches(batches(jnp.asarray), forward)
    left, adapter = jaxadapt.initializers.start(base, config, data)
    saved = model.peft_config["default"]
    assert set(adapter.config.target_modules) == set(saved.target_modules)
    assert dict(adapter.config.rank_pattern) == saved.rank_pattern
    assert dict(adapter.config.alpha_pattern) == saved.alpha_pattern
    held = jaxadapt.to_peft(adapter).tensors
    for name, module in model.named_modules():
        shared = settings.get("whiten") and not name.endswith("down_proj")  # PEFT whitens those twice
        if isinstance(module, peft.tuners.lora.LoraLayer) and not shared:
            a = module.lora_A["default"].weight.detach().numpy()
            mine = np.asarray(held[f"{name}.lora_A.weight"])
            np.testing.assert_allclose(mine, a, rtol=0, atol=5e-3 * abs(a).max(), err_msg=name)  # signs too
            assert not np.asarray(held[f"{name}.lora_B.weight"]).any()
    assert left is base


def trained(base, adapter, seed=3):
    """The adapter after something was learnt."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + 0.05 * jnp.asarray(rng.standard_normal(x.shape), x.dtype), adapter)


@pytest.mark.parametrize("kind", ["pissa", "olora"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_converted_adapter_applies_to_the_original_base_in_peft(kind, use_rslora, tmp_path):
    base, forward = twin("llama", "linen", 0)
    patterns = {} if use_rslora else {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"down_proj": 5}}
    config = jaxadapt.LoraConfig(**fields("llama", kind, use_rslora=use_rslora, task_type="CAUSAL_LM", **patterns))
    left, first = jaxadapt.initializers.start(base, config)
    now = trained(left, first)
    expected = forward(jaxadapt.merge(left, now), {"input_ids": IDS})
    plain = jaxadapt.initializers.for_original_base(now, first)
    assert plain.config.init_lora_weights is True
    assert plain.config.lora_alpha == (6 * np.sqrt(2) if use_rslora else 12)
    jaxadapt.save(plain, tmp_path)
    loaded = harness.load(torch_base("llama"), tmp_path)
    assert not loaded.complaints
    found = harness.logits(loaded.model, IDS)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * abs(found).max())  # A·B − A₀·B₀ cancels


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_another_rank_would_take_another_part_out_of_the_base(kind, tmp_path):
    """PEFT takes W − s·B₀·A₀ of the rank and the scale in the file, so that only a converted adapter is resized."""
    base, forward = twin("llama", "linen", 0)
    left, first = jaxadapt.initializers.start(base, jaxadapt.LoraConfig(**fields("llama", kind, task_type="CAUSAL_LM")))
    now = trained(left, first)
    for change in (jaxadapt.merging.resize_rank, jaxadapt.merging.to_lora):
        with pytest.raises(jaxadapt.ConfigError, match=f"for_original_base.*\n  init_lora_weights='{kind}'"):
            change(now, 4)
    small, error = jaxadapt.merging.resize_rank(jaxadapt.initializers.for_original_base(now, first), 8)
    assert max(error.values()) < 1e-6
    jaxadapt.save(small, tmp_path)
    expected = forward(jaxadapt.merge(left, now), {"input_ids": IDS})
    found = harness.logits(harness.load(torch_base("llama"), tmp_path).model, IDS)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * abs(found).max())  # A·B − A₀·B₀ cancels


def test_the_conversion_is_the_one_peft_makes(tmp_path):
    theirs = peft.LoraConfig(**fields("llama", "pissa", task_type="CAUSAL_LM"))
    model = peft.get_peft_model(copy.deepcopy(torch_base("llama")), theirs)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(tmp_path / "first"))
    model.peft_config["default"].init_lora_weights = "pissa"
    model.save_pretrained(str(tmp_path / "now"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, of a second adapter beside PiSSA: that is how it converts
        model.save_pretrained(str(tmp_path / "plain"), path_initial_model_for_weight_conversion=str(tmp_path / "first"))
    base = twin("llama", "linen", 0)[0]
    now, first = (
        jaxadapt.from_peft(jaxadapt.read(tmp_path / name, change_base=False), base) for name in ("now", "first")
    )
    first = dataclasses.replace(first, config=now.config)
    plain = jaxadapt.to_peft(jaxadapt.initializers.for_original_base(now, first))
    expected = harness.read_tensors(tmp_path / "plain")
    assert plain.tensors.keys() == expected.keys()
    for key, x in expected.items():
        np.testing.assert_array_equal(np.asarray(plain.tensors[key]), x, err_msg=key)
    said = harness.read_json(tmp_path / "plain")
    assert (plain.config.r, plain.config.lora_alpha) == (said["r"], said["lora_alpha"])


@pytest.mark.parametrize("kind", ["pissa", "olora"])
@pytest.mark.parametrize(("api", "scan"), [("nnx", None), ("linen", 0)])
def test_an_unconverted_file_changes_the_base_on_request_as_in_peft(kind, api, scan, tmp_path):
    theirs = peft.LoraConfig(**fields("llama", kind, task_type="CAUSAL_LM"))
    model = peft.get_peft_model(copy.deepcopy(torch_base("llama")), theirs)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "lora_" in name:
                x.add_(0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(len(name))))
    model.save_pretrained(str(tmp_path))
    expected = harness.logits(harness.load(torch_base("llama"), tmp_path).model, IDS)
    base, forward = twin("llama", api, scan)
    target = base if api == "nnx" else {"params": base}
    with pytest.raises(jaxadapt.ConfigError, match=f"init_lora_weights='{kind}'.*change_base=True"):
        jaxadapt.load(tmp_path, target)
    with pytest.raises(jaxadapt.ConfigError, match="change_base=False"):
        jaxadapt.from_peft(jaxadapt.read(tmp_path), target)
    loaded = jaxadapt.load(jaxadapt.read(tmp_path, change_base=True), target)
    if api == "nnx":
        found = loaded(IDS)
        with pytest.raises(jaxadapt.AttachError, match="has already changed this base"):
            jaxadapt.load(jaxadapt.read(tmp_path, change_base=True), loaded)
    else:
        found = forward(jaxadapt.merge(loaded["params"], jaxadapt.extract(loaded)), {"input_ids": IDS})
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * abs(expected).max())


# ---- LoftQ, which PEFT leaves to bitsandbytes and a GPU: what they made of one weight is recorded ----------------


def loftq(bits, steps, **more):
    made = {"loftq_bits": bits, "loftq_iter": steps}
    options = {"r": RANK, "lora_alpha": RANK, "target_modules": ["q"], "init_lora_weights": "loftq", **more}
    return jaxadapt.LoraConfig(loftq_config=made, **options)


@pytest.mark.parametrize("alpha", [RANK, 3 * RANK])
@pytest.mark.parametrize(("bits", "steps"), LOFTQ)
def test_loftq_is_pefts_with_the_sum_near_the_weight_at_any_scale(bits, steps, alpha):
    """The quantized base is PEFT's; so is B·A, which PEFT does not divide by the scale."""
    found = load_file(RECORDED)
    base = {"q": {"kernel": jnp.asarray(found["weight"].T)}}
    left, adapter = jaxadapt.initializers.start(base, loftq(bits, steps, lora_alpha=alpha))
    theirs = found[f"loftq.{bits}.{steps}.base"]
    atol = 1e-6 * abs(theirs).max()  # an SVD in float32 by two libraries, and so the next quantization
    np.testing.assert_allclose(left["q"]["kernel"].T, theirs, rtol=0, atol=atol)
    (change,) = deltas(adapter).values()
    np.testing.assert_allclose(change, found[f"loftq.{bits}.{steps}.product"], rtol=0, atol=atol)
    before, merged = base["q"]["kernel"], jaxadapt.merge(left, adapter)["q"]["kernel"]
    assert jnp.linalg.norm(merged - before) < jnp.linalg.norm(left["q"]["kernel"] - before)


@pytest.mark.parametrize(("family", "api", "scan"), [("llama", "nnx", None), ("llama", "linen", 0)])
def test_a_base_left_by_loftq_is_held_in_four_bits_as_it_is(family, api, scan, tmp_path):
    base = twin(family, api, scan)[0]
    config = jaxadapt.LoraConfig(**fields(family, "loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 2}))
    left, adapter = jaxadapt.initializers.start(base, config)
    weights = {p: np.asarray(x) for p, x in carrier(left).leaves().items()}
    small = jaxadapt.models.quantize(left, modules=TARGETS[family])
    again = carrier(jaxadapt.models.dequantize(nnx.clone(small) if api == "nnx" else small)).leaves()
    for path, w in weights.items():
        np.testing.assert_array_equal(again[path], w, err_msg=path)
    with pytest.raises(jaxadapt.ConfigError, match="LoftQ quantized the base"):
        jaxadapt.initializers.for_original_base(adapter, adapter)
    jaxadapt.save(adapter, tmp_path)
    fresh = twin(family, api, scan)[0]
    loaded = jaxadapt.load(jaxadapt.read(tmp_path, change_base=True), fresh if api == "nnx" else {"params": fresh})
    for path, w in carrier(loaded).leaves().items():
        np.testing.assert_array_equal(w, weights[path], err_msg=path)


def test_loftq_is_for_weights_as_they_were():
    base = jaxadapt.models.quantize({"q": {"kernel": np.ones((64, 64), "float32")}}, modules=["q"])
    with pytest.raises(jaxadapt.ConfigError, match="quantized"):
        jaxadapt.initializers.start(base, loftq(4, 1))
    conv = jaxadapt.LoraConfig(**fields("gpt2", "loftq", loftq_config={"loftq_bits": 4}))
    with pytest.raises(jaxadapt.ConfigError, match="Conv1D's transposed weight"):
        jaxadapt.initializers.start(twin("gpt2", "linen")[0], conv)
