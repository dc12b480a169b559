"""Methods on one layer, beside PEFT's: each form of each method, outputs, merged weights and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxadapt
from jaxadapt import AttachError, ConfigError, DeftConfig, DeloraConfig, FourierFTConfig, PeanutConfig, WaveFTConfig
from jaxadapt.methods import METHODS, waveft
from jaxadapt.methods.applied import AppliedMethods
from jaxadapt.methods.matrix import TorchRandom
from tests.methods.one_layer import OneLayer, hook_of, numbers, run
from tests.support.configs import class_of

CASES = {
    "fourier": ("FourierFTConfig", {"n_frequency": 40, "scaling": 20.0}),
    "fourier-conv1d": ("FourierFTConfig", {"n_frequency": 9, "random_loc_seed": 3, "fan_in_fan_out": True}),
    "wave-db1": ("WaveFTConfig", {"n_frequency": 40}),
    "wave-conv1d": ("WaveFTConfig", {"n_frequency": 20, "fan_in_fan_out": True}),
    "wave-db2": ("WaveFTConfig", {"n_frequency": 60, "wavelet_family": "db2"}),
    "wave-db7": ("WaveFTConfig", {"n_frequency": 60, "wavelet_family": "db7"}),
    "wave-db10": ("WaveFTConfig", {"n_frequency": 60, "wavelet_family": "db10"}),
    "wave-sym3": ("WaveFTConfig", {"n_frequency": 60, "wavelet_family": "sym3"}),
    "wave-none": ("WaveFTConfig", {"n_frequency": 30, "use_idwt": False}),
    "wave-proportional": ("WaveFTConfig", {"n_frequency": 30, "proportional_parameters": True}),
    "delora": ("DeloraConfig", {"r": 3, "delora_lambda": 4}),
    "delora-random": ("DeloraConfig", {"r": 2, "init_weights": False}),
    "deft-relu": ("DeftConfig", {"r": 3}),
    "deft-qr": ("DeftConfig", {"r": 3, "decomposition_method": "qr", "alpha": 5}),
    "deft-para": ("DeftConfig", {"r": 3, "para": True}),
    "deft-para-qr": ("DeftConfig", {"r": 3, "para": True, "decomposition_method": "qr"}),
    "deft-conv1d": ("DeftConfig", {"r": 3, "decomposition_method": "qr", "fan_in_fan_out": True}),
    "deft-wide": ("DeftConfig", {"r": 20, "decomposition_method": "qr"}),
    "peanut": ("PeanutConfig", {"r": 3}),
    "peanut-deep": ("PeanutConfig", {"r": 3, "depth": 3, "act_fn": "gelu", "scaling": 0.5}),
}


@pytest.mark.peft
@pytest.mark.filterwarnings("ignore:.*DEFT with r=13")  # of "deft-wide"
@pytest.mark.parametrize("name", CASES)
def test_outputs_weights_and_gradients_are_pefts(name):
    """The odd sizes matter to wavelets. Sums of float32 in another order, and an inverse in DEFT's gradient of QR."""
    pytest.importorskip("peft")
    config_class, fields = CASES[name]
    layer = OneLayer(config_class, (13, 9), conv1d="conv1d" in name, **fields)
    x, weights = numbers(4, 9, seed=5), numbers(4, 13, seed=6)
    want = layer.peft(x)
    close = {"rtol": 1e-4, "atol": 1e-5 * abs(want).max()}
    np.testing.assert_allclose(layer.run(layer.hook, x), want, **close)
    np.testing.assert_allclose(layer.hook.weight(jnp.asarray(layer.w)), layer.peft_weight(), **close)

    def loss(params):
        return (layer.run(layer.with_params(params), x) * weights).sum()

    theirs = layer.peft_gradients(x, weights)
    ours = jax.jit(jax.grad(loss))(dict(layer.hook.params))
    trained = {end.removesuffix(".weight")[1:].replace(".", "_"): g for end, g in theirs.items()}
    assert trained
    for tensor, grad in trained.items():
        size = abs(grad).max()
        np.testing.assert_allclose(ours[tensor], grad, rtol=1e-3, atol=1e-4 * size, err_msg=tensor)
    for tensor in set(ours) - set(trained):
        np.testing.assert_array_equal(ours[tensor], 0, err_msg=tensor)


def test_deft_beside_another_adapter_projects_the_base():
    one, two = (hook_of(DeftConfig(target_modules=["q"], r=2), (8, 6), seed=n) for n in (0, 5))
    w, x = numbers(8, 6), numbers(3, 6, seed=1)
    changes = [np.asarray(hook.weight(w)) - w for hook in (one, two)]
    want = x @ (w + sum(changes)).T
    np.testing.assert_allclose(run(AppliedMethods((one, two)), w, x), want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(AppliedMethods((one, two)).weight(jnp.asarray(w)), w + sum(changes), atol=1e-5)


@pytest.mark.parametrize("config", [DeftConfig(target_modules=["q"], r=2), PeanutConfig(target_modules=["q"], r=2)])
def test_a_change_that_depends_on_the_weight_cannot_be_unmerged(config):
    hook = hook_of(config, (8, 6))
    with pytest.raises(AttachError, match="cannot unmerge"):
        hook.unweight(hook.weight(jnp.asarray(numbers(8, 6))))


def test_a_file_of_delora_without_the_norms_gets_those_of_the_base():
    model = nnx.Dict(q=nnx.Linear(6, 8, rngs=nnx.Rngs(0)))
    base = {"q": {"kernel": model.q.kernel[...], "bias": model.q.bias[...]}}
    adapter = jaxadapt.extract(jaxadapt.adapt(model, DeloraConfig(target_modules=["q"], r=2), rngs=nnx.Rngs(1)))
    file = jaxadapt.to_peft(adapter)
    kept = {key: x for key, x in file.tensors.items() if not key.endswith("w_norm")}
    assert len(kept) == 3
    again = jaxadapt.from_peft(jaxadapt.PeftTensors(file.config, kept), base)
    (norms,) = (x for path, x in again.flat().items() if path.endswith("w_norm"))
    np.testing.assert_allclose(norms, np.linalg.norm(base["q"]["kernel"], axis=1), rtol=1e-6)


def test_deloras_dropout_drops_entries_of_the_input():
    hook = hook_of(DeloraConfig(target_modules=["q"], module_dropout=0.25), (8, 6))
    assert hook.method.dropout(hook.hparams) == 0.25


@pytest.mark.parametrize("config_class", [FourierFTConfig, WaveFTConfig])
def test_there_are_at_most_as_many_frequencies_as_entries(config_class):
    with pytest.raises(ConfigError, match="n_frequency of at most 48.* found 49"):
        hook_of(config_class(target_modules=["q"], n_frequency=49), (8, 6))


@pytest.mark.parametrize("peft_type", ["FOURIERFT", "WAVEFT"])
def test_values_beyond_a_modules_own_number_have_no_effect(peft_type):
    method, name = METHODS[peft_type], f"{peft_type.lower()}_spectrum"
    config = class_of(peft_type)(target_modules=["q"], n_frequency=5)
    own = hook_of(config, (8, 6)).hparams.own
    grad = jax.grad(lambda v: method.delta(own, {name: v}, jnp.zeros((8, 6))).sum())(jnp.ones(9))
    np.testing.assert_array_equal(grad[5:], 0)
    assert (np.asarray(method.delta(own, {name: jnp.ones(9)}, jnp.zeros((8, 6)))) != 0).any()


def test_a_new_wave_adapter_needs_its_numbers_stated():
    with pytest.raises(ConfigError, match="proportional_parameters"):
        hook_of(WaveFTConfig(target_modules=["q"], proportional_parameters=True), (8, 6))


@pytest.mark.parametrize("config", [WaveFTConfig(wavelet_family="coif3"), PeanutConfig(act_fn="prelu")])
def test_what_jaxadapt_lacks_is_refused_by_name(config):
    with pytest.raises(ConfigError, match="'coif3'; jaxadapt has db1|'prelu'; jaxadapt has gelu"):
        METHODS[config.peft_type].check(config)


def test_a_wavelet_that_is_not_used_is_not_refused():
    METHODS["WAVEFT"].check(WaveFTConfig(wavelet_family="coif3", use_idwt=False))


@pytest.mark.parametrize("order", range(1, 11))
def test_the_filters_are_orthogonal_and_smooth(order):
    """The two properties that define Daubechies' filters: unit products, and a zero of the order at −1."""
    low = waveft._daubechies(order)
    for shift in range(order):
        assert low[2 * shift :] @ low[: len(low) - 2 * shift] == pytest.approx(float(shift == 0), abs=1e-9)
    for power in range(order):
        terms = (-1.0) ** np.arange(2 * order) * low * np.linspace(0, 1, 2 * order) ** power
        assert terms.sum() == pytest.approx(0, abs=1e-9)


def test_positions_among_very_many_entries_are_refused():
    """From there on, PyTorch shuffles in another way (torch.randperm(214748364))."""
    assert TorchRandom(777).permutation(214748363, 2).tolist() == [11440646, 199500216]
    with pytest.raises(ConfigError, match="214,748,364"):
        TorchRandom(777).permutation(214748364, 2)
