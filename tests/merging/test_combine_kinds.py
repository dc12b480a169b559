"""combine and resize_rank on experts, convolutions and attention: the merged weights are the weighted sums."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

import jaxadapt
from jaxadapt.core import paths

Weight = jaxadapt.Weight
STACKED = Weight("layers_{l}.up", "l.{l}.experts.up", "e i o -> e i o", kind="experts", fan_in_fan_out=True)
BASES: dict[str, tuple[tuple[Weight, ...], dict[str, tuple[int, ...]], dict[str, Any]]] = {
    "experts": (
        (
            Weight("up", "experts.up", "e i o -> e o i", kind="experts"),
            Weight("down", "experts.down", "e o i -> e i o", kind="experts"),
        ),
        {"up": (3, 4, 5), "down": (3, 5, 4)},
        {"target_modules": [], "target_parameters": ["experts.up", "experts.down"]},
    ),
    "turned, stacked": (
        (STACKED.scanned(1),),
        {"layers.up": (3, 2, 4, 5)},
        {"target_modules": [], "target_parameters": ["experts.up"]},
    ),
    "conv": (
        (Weight("c.kernel", "c.weight", "h w i o -> o i h w", kind="conv"),),
        {"c.kernel": (2, 3, 4, 5)},
        {"target_modules": ["c"]},
    ),
    "attention": (
        Weight.attention("attn", "attn"),
        {**{f"attn.{n}.kernel": (8, 2, 4) for n in ("query", "key", "value")}, "attn.out.kernel": (2, 4, 8)},
        {"target_modules": ["attn"]},
    ),
}
each = pytest.mark.parametrize("kind", BASES)


def adapters(kind: str, *ranks: int) -> tuple[Any, list[jaxadapt.Adapter]]:
    lines, shapes, fields = BASES[kind]
    base = paths.unflatten({path: np.zeros(shape, "float32") for path, shape in shapes.items()})
    made: list[jaxadapt.Adapter] = []
    for i, r in enumerate(ranks):
        config = jaxadapt.LoraConfig(r=r, lora_alpha=3 + i, use_rslora=bool(i), **fields)
        fresh = jaxadapt.init(base, config, key=jax.random.key(i), keymap=jaxadapt.KeyMap("mine", tuple(lines)))
        rng = np.random.default_rng(i)
        made.append(jax.tree.map(lambda x, rng=rng: rng.standard_normal(x.shape).astype("float32"), fresh))
    return base, made


def changes(base: Any, adapter: jaxadapt.Adapter) -> dict[str, np.ndarray]:
    return {path: np.asarray(x) for path, x in paths.flatten(jaxadapt.merge(base, adapter)).items()}


def close(found: Any, wanted: Any) -> None:
    assert set(found) == set(wanted)
    for path, x in wanted.items():
        np.testing.assert_allclose(found[path], x, rtol=0, atol=2e-5 * np.abs(x).max(), err_msg=path)


@each
@pytest.mark.parametrize("method", ["cat", "svd"])
def test_the_sum(kind, method):
    """Exact where the ranks are added up, and where the best sum of that rank is all of it."""
    base, made = adapters(kind, 2, 3)
    both = jaxadapt.combine(made, [0.7, -0.3], method=method, svd_rank=5 if method == "svd" else None)
    one, two = (changes(base, adapter) for adapter in made)
    close(changes(base, both), {path: 0.7 * x - 0.3 * two[path] for path, x in one.items()})
    assert both.config.get("r") == both.config.get("lora_alpha") == 5


@each
@pytest.mark.parametrize("method", ["linear", "ties", "ties_svd", "magnitude_prune_svd"])
def test_of_adapters_that_agree_nothing_is_lost(kind, method):
    base, (one,) = adapters(kind, 2)
    more = {"svd_rank": 4} if method.endswith("svd") else {}
    more |= {} if method == "linear" else {"density": 1.0}
    found = jaxadapt.combine([one], [0.5], method=method, **more)
    close(changes(base, found), {path: 0.5 * x for path, x in changes(base, one).items()})


@each
@pytest.mark.parametrize("r", [2, 4])
def test_another_rank(kind, r):
    base, (one,) = adapters(kind, 2)
    resized = jaxadapt.merging.resize_rank(one, r).adapter
    assert resized.config.get("r") == r
    close(changes(base, resized), changes(base, one))


def test_a_grouped_convolution_is_refused():
    """Its A sees all channels, B those of a group: no matrix is their product."""
    line = Weight("c.kernel", "c.weight", "h w i o -> o i h w", kind="conv", groups=2)
    base = {"c": {"kernel": np.zeros((2, 2, 2, 4), "float32")}}
    config = jaxadapt.LoraConfig(r=2, target_modules=["c"])
    adapter = jaxadapt.init(base, config, key=jax.random.key(0), keymap=jaxadapt.KeyMap("mine", (line,)))
    with pytest.raises(jaxadapt.ConfigError, match="expected one pair of matrices"):
        jaxadapt.combine([adapter], [1.0], method="cat")
