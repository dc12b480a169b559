"""The number of trained values of each method on a model, for `jaxadapt methods`."""

from __future__ import annotations

from jaxadapt.analysis import method_sizes
from jaxadapt.methods import METHODS


def test_sizes_of_each_method_on_a_model():
    shapes = {"q.kernel": (32, 64), "up.kernel": (64, 32)}
    sizes = method_sizes.method_sizes(shapes)
    assert sizes.keys() == set(METHODS)
    assert sizes["LORA"] == 8 * (32 + 64) * 2
    assert all(size for size in sizes.values())
