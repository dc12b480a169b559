"""Initial values of adapters: torch's distributions, one program for all shapes, equal inside and outside jit."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import jaxadapt
from jaxadapt.arrays import random_draws
from jaxadapt.arrays.random_draws import Draw

KEY = jax.random.key(3)
WANTED = {
    "a": (Draw("uniform", 0.25), (60, 100)),
    "b": (Draw("constant", 0.0), (5, 7)),
    "c": (Draw("normal", 0.5), (90, 100)),
    "d": (Draw("uniform", 1.0), (3,)),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_in_and_outside_jit_bit_for_bit(dtype):
    found = random_draws.draw_arrays(KEY, WANTED, dtype)
    traced = jax.jit(lambda key: random_draws.draw_arrays(key, WANTED, dtype))(KEY)
    outside = jax.jit(lambda: random_draws.draw_arrays(KEY, WANTED, dtype))()  # the key a constant of what is traced
    assert {p: (x.shape, x.dtype.name) for p, x in found.items()} == {p: (s, dtype) for p, (_, s) in WANTED.items()}
    for path, x in found.items():
        np.testing.assert_array_equal(x, traced[path])
        np.testing.assert_array_equal(x, outside[path])


def test_each_array_depends_on_its_own_path_and_shape_only():
    found = random_draws.draw_arrays(KEY, WANTED, "float32")
    for path, x in random_draws.draw_arrays(KEY, {p: WANTED[p] for p in reversed(WANTED)}, "float32").items():
        np.testing.assert_array_equal(x, found[path])
    other = random_draws.draw_arrays(KEY, {"z": WANTED["a"]}, "float32")["z"]
    assert (other == found["a"]).mean() < 0.01
    assert (random_draws.draw_arrays(jax.random.key(4), WANTED, "float32")["a"] == found["a"]).mean() < 0.01


def test_the_distributions():
    """The Kolmogorov-Smirnov distance of 6000 and 9000 draws; one key in 10⁵ exceeds the bound."""
    found = random_draws.draw_arrays(KEY, WANTED, "float32")
    uniform, normal = np.sort(found["a"].ravel()), np.sort(found["c"].ravel())
    assert -0.25 <= uniform[0] < -0.2499
    assert 0.2499 < uniform[-1] < 0.25
    np.testing.assert_allclose((uniform + 0.25) / 0.5, np.linspace(0, 1, 6000), atol=2.5 / np.sqrt(6000))
    from statistics import NormalDist

    cdf = [NormalDist(0, 0.5).cdf(x) for x in normal]
    np.testing.assert_allclose(cdf, np.linspace(0, 1, 9000), atol=2.5 / np.sqrt(9000))
    halves = found["a"].reshape(2, -1)
    assert abs(np.corrcoef(halves)[0, 1]) < 0.1  # two chunks are two draws


@pytest.mark.parametrize(
    "key", [KEY, jax.random.PRNGKey(2**31), jax.random.key(5, impl="rbg")], ids=["key", "raw", "rbg"]
)
def test_numpys_bits_are_jaxs(key):
    words = np.array([[0, 0], [1, 2], [2**32 - 1, 7], *([2**31, i] for i in range(9))], np.uint32)
    chunks = [jax.random.fold_in(jax.random.fold_in(key, first), second) for first, second in words]
    found = np.stack([jax.random.bits(k, (4096,)) for k in chunks])
    used = [4096, 5, 1, *range(4090, 4094), 7, 7, 4096, 4096, 2]
    for mine, theirs, count in zip(random_draws._chunks(key, words, used), found, used, strict=True):
        np.testing.assert_array_equal(mine[:count], theirs[:count])
    np.testing.assert_array_equal(random_draws._bits(key, words), found)


@pytest.mark.parametrize("key", [KEY, jax.random.key(2**31), jax.random.key(5, impl="rbg")], ids=["3", "2^31", "rbg"])
def test_numpys_fold_in_is_jaxs(key):
    for data in (0, 1, 2**32 - 1):
        theirs = jax.random.fold_in(key, data)
        traced = jax.jit(random_draws.fold_in, static_argnums=1)(key, data)
        for mine in (
            random_draws.fold_in(key, data),
            traced,
            jax.jit(lambda k=key, d=data: random_draws.fold_in(k, d))(),
        ):
            assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
            np.testing.assert_array_equal(jax.random.key_data(mine), jax.random.key_data(theirs))


def test_nothing_is_compiled_for_few_and_one_program_for_many(monkeypatch):
    base = {n: {"kernel": jax.ShapeDtypeStruct((8 + i, 6 + i), "f4")} for i, n in enumerate("abcdef")}
    config = jaxadapt.LoraConfig(r=2, target_modules=list("abcdef"))
    random_draws._bits.clear_cache()
    few = jaxadapt.init(base, config, key=KEY).params
    assert random_draws._bits._cache_size() == 0
    monkeypatch.setattr(random_draws, "_MAX_NUMPY_CHUNKS", 3)
    many = jaxadapt.init(base, config, key=KEY).params
    assert random_draws._bits._cache_size() == 1
    jax.tree.map(np.testing.assert_array_equal, few, many)


def test_kaiming_uniform_as_torchs():
    torch = pytest.importorskip("torch")
    base = {"q": {"kernel": jax.ShapeDtypeStruct((64, 50), "f4")}}
    a = jaxadapt.init(base, jaxadapt.LoraConfig(r=40, target_modules=["q"]), key=KEY).params["q"]["kernel"]["lora_A"]
    torch.manual_seed(0)
    theirs = torch.nn.init.kaiming_uniform_(torch.empty(40, 64), a=5**0.5).numpy()
    assert abs(np.asarray(a)).max() == pytest.approx(abs(theirs).max(), rel=2e-3)
    assert np.asarray(a).std() == pytest.approx(theirs.std(), rel=0.03)
