"""Initial values of adapters: torch's distributions, one program for all shapes, equal inside and outside jit."""

from __future__ import annotations

import zlib

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


def test_the_same_inside_vmap():
    keys = jax.random.split(KEY, 3)
    found = jax.vmap(lambda key: random_draws.draw_arrays(key, WANTED, "float32"))(keys)
    for i, key in enumerate(keys):
        for path, x in random_draws.draw_arrays(key, WANTED, "float32").items():
            np.testing.assert_array_equal(found[path][i], x)


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
def test_the_values_are_those_of_jaxs_bits(key):
    """Chunk i of an array has the bits of the key folded with the CRC-32 of its path and i, for keys of every kind."""
    draws = {"a": (Draw("uniform", 2.0), (5000,)), "b": (Draw("uniform", 2.0), (3,))}
    found = random_draws.draw_arrays(key, draws, "float32")
    for path, (_, (size,)) in draws.items():
        keys = [jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(path.encode())), i) for i in range(2)]
        bits = np.concatenate([jax.random.bits(k, (4096,)) for k in keys])[:size]
        np.testing.assert_array_equal(found[path], (bits >> 8) / np.float32(2**22) - np.float32(2))


def test_one_program_draws_adapters_of_every_size():
    random_draws._bits.clear_cache()
    for count in (1, 3, 16, 17, 33):  # chunks
        base = {f"m{n}": {"kernel": jax.ShapeDtypeStruct((8 + n, 6 + n), "f4")} for n in range(count)}
        jaxadapt.init(base, jaxadapt.LoraConfig(r=2, target_modules=list(base)), key=KEY)
    assert random_draws._bits._cache_size() == 1


def test_kaiming_uniform_as_torchs():
    torch = pytest.importorskip("torch")
    base = {"q": {"kernel": jax.ShapeDtypeStruct((64, 50), "f4")}}
    a = jaxadapt.init(base, jaxadapt.LoraConfig(r=40, target_modules=["q"]), key=KEY).params["q"]["kernel"]["lora_A"]
    torch.manual_seed(0)
    theirs = torch.nn.init.kaiming_uniform_(torch.empty(40, 64), a=5**0.5).numpy()
    assert abs(np.asarray(a)).max() == pytest.approx(abs(theirs).max(), rel=2e-3)
    assert np.asarray(a).std() == pytest.approx(theirs.std(), rel=0.03)
