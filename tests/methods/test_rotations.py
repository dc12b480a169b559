"""OFT, BOFT and HRA on convolutions and embeddings, and OFT's two rotations, beside PEFT and formulas in numpy."""

from __future__ import annotations

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxadapt
from jaxadapt import AttachError, ConfigError, KeyMap, Weight
from jaxadapt.adapters import initial_values, selection
from jaxadapt.adapters.adapter import make_file_plan
from jaxadapt.arrays.products import Operation, Use
from jaxadapt.methods import AppliedMethod
from jaxadapt.methods.applied import AppliedMethods
from jaxadapt.models.tracing import rewrite
from tests.support.configs import class_of

CONV = Weight("w", "q.weight", "x y i o -> o i x y", kind="conv")
TABLE = Weight("w", "q.weight", "v d -> v d", kind="embedding")
LINEAR = Weight("w", "q.weight", "i o -> o i")
EXACT = {"use_cayley_neumann": False}
CASES = {
    "OFT series": ("OFT", {"oft_block_size": 6}),
    "OFT exact": ("OFT", {"oft_block_size": 4, **EXACT}),
    "OFT shared": ("OFT", {"oft_block_size": 0, "r": 3, "block_share": True}),
    "OFT projected": ("OFT", {"oft_block_size": 6, "coft": True, "eps": 0.2}),
    "BOFT": ("BOFT", {"boft_block_size": 3}),
    "HRA": ("HRA", {"r": 4}),
    "HRA orthogonal": ("HRA", {"r": 3, "apply_GS": True, "init_weights": False}),
}


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def site_of(peft_type, fields, weight=LINEAR, shape=(8, 6)):
    config = class_of(peft_type)(target_modules=["q"], **fields)
    (site,) = selection.select_sites(config, KeyMap("t", (weight,)), {"w": shape})
    return site


def hook_of(site, **params):
    return AppliedMethod(site.method, site.hparams, {k: jnp.asarray(v) for k, v in params.items()}, site.axes)


def peft_convolution(peft_type, fields, adapters=("default",), **options):
    """A convolution in PEFT with trained adapters, its kernel in JAX's layout, and the tensors of each file."""
    import torch
    from peft import get_peft_model
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils.save_and_load import get_peft_model_state_dict

    torch.manual_seed(0)
    net = torch.nn.Sequential()
    net.add_module("q", torch.nn.Conv2d(3, 5, 2, bias=False, **options))
    kernel = net.q.weight.detach().numpy().transpose(2, 3, 1, 0).copy()
    config = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type](target_modules=["q"], **fields)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(net, config).eval()
        for name in adapters[1:]:
            model.add_adapter(name, config)
        model.base_model.set_adapter(list(adapters))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    states = [get_peft_model_state_dict(model, adapter_name=name) for name in adapters]
    return model, kernel, [{key: value.numpy().copy() for key, value in state.items()} for state in states]


def hook_from(site, state):
    """The method with the tensors of a file."""
    plan = make_file_plan([site])
    assert set(plan.keys) == set(state)
    return hook_of(site, **{path.rpartition(".")[2]: value for path, value in plan.decode(state).items()})


@pytest.mark.peft
@pytest.mark.parametrize("name", [name for name in CASES if "OFT" not in name or "BOFT" in name])
def test_a_convolution_has_pefts_merged_kernel(name):
    import torch

    peft_type, fields = CASES[name]
    model, kernel, (state,) = peft_convolution(peft_type, fields)
    with torch.no_grad():
        x = torch.from_numpy(numbers(2, 3, 4, 4))
        y = model(x).numpy()
        model.merge_adapter()
        (merged,) = [p.detach().numpy() for n, p in model.named_parameters() if n.endswith("base_layer.weight")]
        merged_y = model(x).numpy()
    hook = hook_from(site_of(peft_type, fields, CONV, (2, 2, 3, 5)), state)
    w = jnp.asarray(kernel)
    ours = hook.weight(w)
    np.testing.assert_allclose(np.transpose(ours, (3, 2, 0, 1)), merged, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(hook.unweight(ours), w, rtol=1e-4, atol=1e-5)  # some invert a matrix
    assert np.allclose(y, merged_y, atol=1e-4)  # PEFT's own forward agrees with its merge


@pytest.mark.peft
@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}], ids=["plain", "stride and padding"])
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("OFT")])
def test_oft_on_a_convolution_with_a_window_computes_pefts_layer(name, options):
    """It warns, because PEFT's own merge computes something else, and cannot be merged."""
    import torch

    peft_type, fields = CASES[name]
    adapters = ("default", "other") if name == "OFT series" else ("default",)
    model, kernel, states = peft_convolution(peft_type, fields, adapters, **options)
    x = numbers(2, 3, 5, 4)
    with torch.no_grad():
        want = model(torch.from_numpy(x)).numpy()
        model.merge_adapter()
        assert abs(model(torch.from_numpy(x)).numpy() - want).max() > 0.1 * abs(want).max()
    with pytest.warns(UserWarning, match="PEFT's own merge gives other outputs:\n  w$"):
        site = site_of(peft_type, fields, CONV, (2, 2, 3, 5))
    hooks = tuple(hook_from(site, state) for state in states)
    hook = hooks[0] if len(hooks) == 1 else AppliedMethods(hooks)
    strides, padding = (options.get("stride", 1),) * 2, [(options.get("padding", 0),) * 2] * 2
    numbers_of = ("NHWC", "HWIO", "NHWC")

    def run(weights, x):
        return jax.lax.conv_general_dilated(x, weights["w"], strides, padding, dimension_numbers=numbers_of)

    w = jnp.asarray(kernel)
    y = rewrite(run, {"w": w}, {"w": hook}, jnp.asarray(np.moveaxis(x, 1, 3)))
    np.testing.assert_allclose(np.moveaxis(y, 3, 1), want, rtol=1e-5, atol=1e-5)
    with pytest.raises(AttachError, match="no effective kernel"):
        hook.weight(w)


@pytest.mark.peft
@pytest.mark.parametrize("fields", [CASES["OFT series"][1], {"oft_block_size": 3, **EXACT}], ids=["series", "exact"])
def test_an_embedding_is_rotated_after_the_lookup(fields):
    import torch
    from peft import OFTConfig, get_peft_model

    torch.manual_seed(0)
    net = torch.nn.Sequential()
    net.add_module("q", torch.nn.Embedding(10, 6))
    table = net.q.weight.detach().numpy().copy()
    model = get_peft_model(net, OFTConfig(target_modules=["q"], **fields)).eval()
    ids = np.array([[1, 7, 7], [0, 2, 9]])
    site = site_of("OFT", fields, TABLE, (10, 6))
    r = numbers(*site.shapes["oft_embedding_R"], seed=1) * 0.3
    with torch.no_grad():
        (parameter,) = [p for p in model.parameters() if p.requires_grad]
        parameter.copy_(torch.from_numpy(r))
        want = model(torch.from_numpy(ids)).numpy()
    (key,) = site.entries[0].keys
    assert key == "base_model.model.q.oft_embedding_R.weight"
    hook = hook_of(site, oft_embedding_R=r)
    assert hook.follows("gather")
    lookup = Operation(lambda x, w: jnp.take(w, x, axis=0), 2, site.axes)
    y = hook.output(lookup, jnp.asarray(ids), jnp.asarray(table[ids]), jnp.asarray(table))
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(hook.weight(jnp.asarray(table))[ids], want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(hook.unweight(hook.weight(jnp.asarray(table))), table, rtol=1e-4, atol=1e-5)
    one_hot = jnp.eye(10)[ids]  # a lookup by a product
    y = hook.output(Use("btv", "vd", "btd", site.axes), one_hot, one_hot @ table, jnp.asarray(table))
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    # The head of a model with tied embeddings is a module of its own.
    head, h = Use("bd", "vd", "bv", site.axes), jnp.asarray(numbers(2, 6))
    np.testing.assert_array_equal(hook.output(head, h, h @ table.T, jnp.asarray(table)), h @ table.T)


def rotation(vector, size):
    """(I − K)·(I + K)⁻¹ with numpy."""
    k = np.zeros((size, size))
    k[np.triu_indices(size, 1)] = vector
    k -= k.T
    return (np.eye(size) - k) @ np.linalg.inv(np.eye(size) + k)


def test_the_two_settings_of_oft_turn_in_opposite_directions():
    """PEFT's fault, kept: one file is two rotations, depending on `use_cayley_neumann`."""
    vectors, w = numbers(2, 6, seed=1) * 0.05, numbers(8, 6)
    blocks = np.zeros((8, 8))
    for n, vector in enumerate(vectors):
        blocks[4 * n : 4 * n + 4, 4 * n : 4 * n + 4] = rotation(vector, 4)
    fields = {"oft_block_size": 4}
    exact = hook_of(site_of("OFT", {**fields, **EXACT}), oft_R=vectors).weight(jnp.asarray(w))
    series = hook_of(site_of("OFT", {**fields, "num_cayley_neumann_terms": 8}), oft_R=vectors).weight(jnp.asarray(w))
    np.testing.assert_allclose(exact, blocks @ w, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(series, blocks.T @ w, rtol=1e-5, atol=1e-5)  # the terms from K⁷ on are below 1e-6


def test_weights_that_peft_cannot_rotate_are_refused():
    flat = Weight("w", "q.weight", "x y i o -> o i x y", kind="conv", groups=1)
    grouped = Weight("w", "q.weight", "x y i o -> o i x y", kind="conv", groups=2)
    for peft_type in ("OFT", "BOFT", "HRA"):
        with pytest.raises(ConfigError, match="square kernel"):
            site_of(peft_type, {}, flat, (2, 3, 4, 6))
        with pytest.raises(ConfigError, match="2 groups"):
            site_of(peft_type, {}, grouped, (2, 2, 2, 6))
    with pytest.warns(UserWarning, match="one butterfly factor and not 2, as in PEFT without its CUDA extension"):
        site_of("BOFT", {"boft_n_butterfly_factor": 2})
    with pytest.raises(ConfigError, match="blocks that divide the size 8 of its inputs; found 3"):
        site_of("BOFT", {"boft_block_size": 3})
    with pytest.raises(ConfigError, match="at most the number of inputs"):
        site_of("HRA", {"r": 9, "apply_GS": True, "init_weights": False})
    with pytest.warns(UserWarning, match="blocks of 4, because 5 does not divide the size 8"):
        site_of("OFT", {"oft_block_size": 5})


def test_a_start_that_would_differ_from_peft_is_refused():
    fields = {"apply_GS": True, "r": 2}
    config = class_of("HRA")(target_modules=["q"], **fields)
    with pytest.raises(ConfigError, match="Gram-Schmidt cannot make orthogonal"):
        initial_values.init_values(config, [site_of("HRA", fields)], jax.random.key(0))


@pytest.mark.peft
@pytest.mark.filterwarnings("ignore")  # of PEFT's missing extension, and of the one factor
def test_linen_reads_pefts_boft_file_of_a_convolution_as_nnx_does(tmp_path):
    """PEFT trains one factor and states two; Linen's collection is made before the file is read."""
    import torch
    from peft import BOFTConfig, get_peft_model

    torch.manual_seed(0)
    base = torch.nn.Sequential()
    base.add_module("q", torch.nn.Conv2d(3, 5, 2))
    kernel, bias = (p.detach().numpy().copy() for p in base.parameters())
    config = BOFTConfig(target_modules=["q"], boft_block_size=2, boft_n_butterfly_factor=2, init_weights=False)
    model = get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path)
    x = numbers(2, 4, 4, 3)
    with torch.no_grad():
        want = model(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy().transpose(0, 2, 3, 1)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Conv(5, (2, 2), padding="VALID", name="q")(x)

    adapted = jaxadapt.adapt(Net(), jaxadapt.read(tmp_path).config)
    collection = jax.eval_shape(adapted.init, jax.random.key(0), x)["boft"]
    params = {"q": {"kernel": jnp.asarray(kernel.transpose(2, 3, 1, 0)), "bias": jnp.asarray(bias)}}
    variables = jaxadapt.load(tmp_path, {"params": params, "boft": collection})
    np.testing.assert_allclose(adapted.apply(variables, x), want, rtol=1e-5, atol=1e-5)


def test_a_file_of_one_factor_is_read_whatever_the_configuration_says():
    """Without its CUDA extension PEFT trains one factor and saves a configuration with two."""
    config = class_of("BOFT")(target_modules=["q"], boft_n_butterfly_factor=2)
    table = KeyMap("t", (LINEAR,))
    key = "base_model.model.q.boft_R"
    (site,) = selection.select_sites(config, table, {"w": (8, 6)}, found={key: (1, 2, 4, 4)})
    assert site.shapes["boft_R"] == (1, 2, 4, 4)
    with pytest.raises(ConfigError, match="several butterfly factors"):
        selection.select_sites(config, table, {"w": (8, 6)}, found={key: (2, 2, 4, 4)})


@pytest.mark.peft
def test_the_projection_of_constrained_oft_hides_nothing_from_the_gradient():
    """PEFT projects the parameters themselves before it computes, so its gradient is that at the projected values."""
    import torch
    from peft import OFTConfig, get_peft_model

    fields = {"oft_block_size": 6, "coft": True, "eps": 0.05}
    torch.manual_seed(0)
    net = torch.nn.Sequential()
    net.add_module("q", torch.nn.Linear(6, 8, bias=False))
    kernel = net.q.weight.detach().numpy().copy().T
    model = get_peft_model(net, OFTConfig(target_modules=["q"], **fields))
    site = site_of("OFT", fields, LINEAR, (6, 8))
    r, x, c = numbers(*site.shapes["oft_R"], seed=1), numbers(4, 6), numbers(4, 8, seed=2)
    (parameter,) = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        parameter.copy_(torch.from_numpy(r))
    (model(torch.from_numpy(x)) * torch.from_numpy(c)).sum().backward()

    def loss(oft_R):
        return jnp.sum((x @ hook_of(site, oft_R=oft_R).weight(jnp.asarray(kernel))) * c)

    assert np.abs(parameter.detach().numpy() - r).max() > 0.1  # it was projected
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(jnp.asarray(r)), parameter.grad.numpy(), rtol=1e-4, atol=1e-5)
